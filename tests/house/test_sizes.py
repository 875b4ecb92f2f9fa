"""Files stay readable in one sitting."""

from __future__ import annotations

import pytest
from source_files import ROOT

MAX_NUM_LINES = 400
FOLDERS = ("finetune", "tests", "benchmarks", "assets")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_not_too_long(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_NUM_LINES, f"{num_lines} lines; split it by noun"
