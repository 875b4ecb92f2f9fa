"""A canary for each test, and a run whose copies tests may spoil."""

from __future__ import annotations

import shutil

import pytest
from planting import Canary
from small_runs import Bench

from finetune import merge
from finetune.run_folder import RunFolder


@pytest.fixture
def canary(tmp_path):
    """Planted by the test; whatever that does, it must not have sung in the end."""
    canary = Canary(tmp_path / "canary")
    yield canary
    assert not canary.sings


@pytest.fixture(scope="session")
def spoilt_bench(tmp_path_factory, small_base):
    """A bench whose base is full of canaries."""
    folder = tmp_path_factory.mktemp("spoilt")
    canary = Canary(folder / "canary")
    canary.plant(shutil.copytree(small_base, folder / "base"))
    yield Bench(folder, folder / "base")
    assert not canary.sings


@pytest.fixture(scope="session")
def trained(spoilt_bench):
    """Trained, with two checkpoints, and merged."""
    run = spoilt_bench.train("train.save_steps=2")
    merge.merge(run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, which `run.dir` names too."""
    run = RunFolder(shutil.copytree(trained.path, tmp_path / "runs" / "small"))
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace(str(trained.path.parent), str(run.path.parent)))
    return run


@pytest.fixture
def ended(capsys):
    """`ended(3, "merge", folder)`: the verb's one message, where it ends with that code."""
    from finetune.__main__ import main

    def end(codes: int | list[int], *argv: object) -> str:
        code = main([str(word) for word in argv])
        said = capsys.readouterr().err
        assert code in ([codes] if isinstance(codes, int) else codes), said
        assert "Traceback" not in said and said.count("error:") == (code != 0)
        return said

    return end
