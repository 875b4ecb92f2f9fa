"""Datasets of the hub: through the library that reads them, here from a folder of the same name."""

from __future__ import annotations

import json

import pytest
from small_runs import NANO

from finetune import hub
from finetune.config.loader import load
from finetune.data import load_data
from finetune.errors import InputError
from finetune.llama.chat import FORMATS

CONFIG = """\
recipe: sft
base: {{architecture: {{dim: 64, n_layers: 1, n_heads: 4, vocab_size: 1024}}, tokenizer: {nano}}}
data: {{train: {source}}}
"""


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """`owner/name` below the current folder, which `datasets` takes before the hub's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "OFFLINE_BY_CHOICE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    rows = [
        {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "A"}]}
        for i in range(7)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def config_of(tmp_path, source: str):
    (tmp_path / "hub.yaml").write_text(CONFIG.format(nano=NANO, source=source))
    return load(tmp_path / "hub.yaml").config


def test_a_split_is_read_as_its_rows(dataset, tmp_path, nano_tokenizer):
    config = config_of(tmp_path, "{path: hf://datasets/owner/name, split: 'train[2:5]'}")
    data = load_data(config, nano_tokenizer, FORMATS["nano"])
    assert [list(d.example.messages) for d in data.train] == [r["messages"] for r in dataset[2:5]]
    (path,) = data.file_hashes
    assert path.endswith(".parquet")
    again = load_data(config, nano_tokenizer, FORMATS["nano"])
    assert again.documents_sha256 == data.documents_sha256


def test_what_the_hub_does_not_have_is_refused(dataset, tmp_path, nano_tokenizer):
    for source, says in [
        ("{path: hf://datasets/owner/none, split: train}", "owner/none"),
        ("{path: hf://datasets/owner/name, split: none}", "split none"),
    ]:
        with pytest.raises(InputError, match=says) as caught:
            load_data(config_of(tmp_path, source), nano_tokenizer, FORMATS["nano"])
        assert "HF_HUB_OFFLINE is set" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{path: hf://datasets/owner/name}", "a split"),
        ("{path: hf://datasets/name, split: train}", "needs owner/name"),
        ("{path: hf://datasets/../../etc, split: train}", "needs owner/name"),
        ("{path: rows.jsonl, split: train}", "split has no effect on rows.jsonl"),
        ("{path: rows.jsonl, revision: main}", "revision has no effect"),
    ],
)
def test_settings_that_say_nothing_are_refused(tmp_path, source, says):
    with pytest.raises(InputError, match=says):
        config_of(tmp_path, source)
