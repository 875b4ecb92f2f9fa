"""The float64 reference and the small tokenizers of tests/llama serve these tests too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "llama"))
