"""A real run, trained, merged and evaluated once; tests that damage it take a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_reader import IN_REPORTS, Element, read_page

from finetune.__main__ import main as command
from finetune.report import main
from finetune.run_folder import RunFolder


@pytest.fixture(scope="session")
def whole(tmp_path_factory, small_base) -> RunFolder:
    """Trained for 12 steps, merged, evaluated against base and merged."""
    from small_runs import Bench

    bench = Bench(tmp_path_factory.mktemp("reported"), small_base)
    settings = ("train.max_steps=12", "train.eval_steps=4", "train.save_steps=6")
    run = bench.train(*settings, "eval.tasks=[exact_match]", "eval.max_new_tokens=8")
    assert command(["merge", str(run.path)]) == 0
    assert command(["eval", str(run.path), "--against", "base,merged"]) == 0
    return run


@pytest.fixture
def run(whole, tmp_path) -> RunFolder:
    """A copy to damage."""
    return RunFolder(shutil.copytree(whole.path, tmp_path / "runs" / "small"))


@pytest.fixture
def report(capsys) -> Callable[..., tuple[Element, dict[str, Any]]]:
    """`report(run)`: the page that the verb writes, taken apart, and what it prints as JSON."""

    def call(run: RunFolder, *flags: str) -> tuple[Element, dict[str, Any]]:
        capsys.readouterr()
        assert main([str(run.path), "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        page = Path(found["report"]).read_text(encoding="utf-8")
        assert found["bytes"] == len(page.encode())
        return read_page(page, IN_REPORTS), found

    return call
