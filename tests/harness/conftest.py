"""Two finished runs, with a prompt format and without."""

from __future__ import annotations

import shutil

import pytest
from harness_tasks import QUESTIONS, own_task
from small_runs import Bench, write_rows

from finetune.merge import merge
from finetune.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _own_datasets(tmp_path, monkeypatch):
    """What `datasets` keeps of the files goes with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("finetune.hub.OFFLINE_BY_CHOICE", True)
    monkeypatch.setattr("finetune.harness.tasks.OFFLINE_BY_CHOICE", True)


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, small_base):
    """A finished run with a prompt format, merged."""
    run = Bench(tmp_path_factory.mktemp("chat"), small_base).train("train.learning_rate=0.05")
    merge(run)
    return run


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, small_base):
    """A finished run on plain text, with the choices as a task of our own."""
    folder = tmp_path_factory.mktemp("plain")
    bench = Bench(folder, small_base)
    rows = write_rows(folder / "text.jsonl", [{"text": f"{n} + 1 = {n + 1}"} for n in range(12)])
    asked = write_rows(folder / "asked.jsonl", QUESTIONS)
    task = {
        "scorer": "multiple_choice",
        "data": str(asked),
        "prompt": "{question}",
        "choices": "choices",
        "answer": "label",
    }
    heldout = write_rows(folder / "heldout.jsonl", [{"text": "13 + 1 = 14"}])
    files = (f"data.train={rows}", f"data.heldout={heldout}")
    return bench.train("recipe=pretrain", "adapter.method=none", *files, own_task(**task))


@pytest.fixture
def chat(chat_run, tmp_path):
    return RunFolder(shutil.copytree(chat_run.path, tmp_path / "chat"))


@pytest.fixture
def text(text_run, tmp_path):
    return RunFolder(shutil.copytree(text_run.path, tmp_path / "plain"))
