"""What the garbage collector is spared, and that it is left as it was."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys

import pytest

from finetune.heap import heap_at_rest, loading_libraries


@pytest.fixture(autouse=True)
def _frozen_as_the_suite_has_it():
    yield
    gc.enable()
    gc.freeze()


@pytest.mark.parametrize("caller_froze", [True, False])
def test_the_collector_is_left_as_it_was(caller_froze):
    gc.freeze() if caller_froze else gc.unfreeze()
    before = gc.get_threshold()
    with heap_at_rest():
        assert gc.get_freeze_count() > 1000
    assert gc.get_threshold() == before
    assert (gc.get_freeze_count() > 1000) == caller_froze


@pytest.mark.parametrize("was_on", [True, False])
def test_while_libraries_load_nothing_is_collected(was_on, tmp_path, monkeypatch):
    (tmp_path / "loaded_by_a_test.py").write_text("DEFINED = [[] for _ in range(2000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    gc.enable() if was_on else gc.disable()
    with loading_libraries():
        assert not gc.isenabled()
        importlib.import_module("loaded_by_a_test")
    del sys.modules["loaded_by_a_test"]
    assert gc.isenabled() == was_on
    assert gc.get_freeze_count() > 1000


def test_where_nothing_was_loaded_garbage_stays_garbage():
    """Else a second training in one process would keep the model of the first."""
    gc.unfreeze()
    with loading_libraries():
        import json  # noqa: F401 - known long since
    assert gc.get_freeze_count() == 0


def test_no_library_compiles_at_import():
    code = "import finetune, sys, peft; print('torch._inductor.compile_fx' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert found.stdout.split() == ["False"]
