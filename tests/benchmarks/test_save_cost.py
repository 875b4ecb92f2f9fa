"""The measurement of a save's cost, at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from small_runs import ROOT


@pytest.mark.slow
def test_it_measures_both_parts(tmp_path):
    command = [sys.executable, "-m", "benchmarks.save_cost", "--small"]
    places = ["--folder", str(tmp_path / "work"), "--json", str(tmp_path / "result.json")]
    subprocess.run([*command, *places], cwd=ROOT, check=False, capture_output=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["demo"]["seconds_a_save"]) == 4, "three intervals, and the end"
    assert result["demo"]["share"] > 0
    assert result["8b"]["bytes"] > 12 * result["8b"]["parameters"], "weights and two moments"
