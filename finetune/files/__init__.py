"""What a config names -> files -> rows.

`find_files` says which files a path stands for, `read_rows` reads one of them. Neither knows what
the columns mean: that is `finetune.shapes`.
"""

from __future__ import annotations

from finetune.files.findings import MAX_FINDINGS, Findings, refuse
from finetune.files.paths import TYPES, find_files
from finetune.files.reading import iter_rows, read_rows
from finetune.files.row import Row

__all__ = [
    "MAX_FINDINGS",
    "TYPES",
    "Findings",
    "Row",
    "find_files",
    "iter_rows",
    "read_rows",
    "refuse",
]
