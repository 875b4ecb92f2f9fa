"""The releases below which a library has a hole that this project would open, and SECURITY.md."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
from packaging.version import Version
from small_runs import ROOT

# What each release mends; the numbers are those of the advisories.
FLOORS = {
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747: weights-only loading
    "transformers": "5.3",  # CVE-2026-1839, CVE-2026-4372: pickled RNG states, kernels by config
    "datasets": "5.2",  # CVE-2026-57845: the pandas builder
    "jinja2": "3.1.6",  # CVE-2024-56326, CVE-2025-27516: ways out of the sandbox
    "safetensors": "0.8",
    "PyYAML": "5.4",  # CVE-2020-14343: objects by the full loader
}


def stated(file: str, sign: str) -> dict[str, str]:
    """Package -> version, of every `package==1.2` (or `>=`) in a file."""
    found = re.findall(rf"([A-Za-z0-9_.-]+){sign}([0-9][0-9.]*)", (ROOT / file).read_text())
    return {name.lower(): number for name, number in found}


@pytest.mark.parametrize("name", FLOORS)
def test_no_older_release_is_allowed_pinned_or_here(name):
    floor = Version(FLOORS[name])
    assert Version(stated("pyproject.toml", ">=")[name.lower()]) >= floor
    assert Version(stated("constraints.txt", "==")[name.lower()]) >= floor
    assert Version(version(name)) >= floor


def test_the_policy_says_what_is_trusted_and_where_to_report():
    text = (ROOT / "SECURITY.md").read_text()
    for part in ("## What is trusted", "## Reporting", "in private", "release is supported"):
        assert part in text
