"""The merge's benchmark at a tiny size, and what it calls good."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.merge_8b import LIMIT_GIB, is_good, main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path):
    # At this size the start of Python is all the time there is: the limit of time does not hold.
    options = ["--folder", str(tmp_path / "disk"), "--small"]
    assert main([*options, "--json", str(tmp_path / "result.json")]) == 1
    text = (tmp_path / "result.json").read_text()
    assert str(tmp_path) not in text
    result = json.loads(text)
    assert result["files"] >= 4
    assert 0.05 < result["merge"]["peak_gib"] < 1.5
    assert next(iter(result["merge"]["phases"])) == "check"
    assert result["proof"]["rows"] == 5
    assert result["peft"]["peak_gib"] > 0


def test_a_high_peak_and_a_slow_merge_are_not_good():
    phases = {"write": {"seconds": 15.0}, "prove": {"seconds": 99.0}}
    run = {"plain_copy_seconds": 10.0, "merge": {"peak_gib": LIMIT_GIB, "phases": phases}}
    assert is_good(run)
    assert not is_good(run | {"merge": {"peak_gib": LIMIT_GIB + 0.01, "phases": phases}})
    assert not is_good(run | {"plain_copy_seconds": 7.0})
