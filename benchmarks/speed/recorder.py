"""What a contender's process notes of itself: the end of each optimizer step, and its memory.

On a GPU the memory is what torch's allocator gave out at most, else the process's resident size.

Every contender uses this one file, in its own environment; it needs torch and nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.peaks import memory_gib


def contender_parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every contender has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    return parser


class Recorder:
    """Hooks every optimizer of the process; made after the imports, before the model.

    Args:
        result: where the notes go.
    """

    def __init__(self, result: Path) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._result, self._ends = result, [time.perf_counter()]
        self._after_imports = 1024 * memory_gib("self")["VmRSS"]
        register_optimizer_step_post_hook(self._note)

    def _note(self, *_: Any) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    def write(self, **facts: Any) -> None:
        """Seconds between the ends of consecutive steps; the first from the hook's own start.

        Args:
            facts: losses, tokens and whatever else the contender knows.
        """
        import torch

        seconds = [b - a for a, b in zip(self._ends, self._ends[1:], strict=False)]
        memory = {"after_imports": self._after_imports, "peak": 1024 * memory_gib("self")["VmHWM"]}
        if torch.cuda.is_available():
            memory = {"after_imports": 0.0, "peak": torch.cuda.max_memory_allocated() / 2**20}
        notes = {"seconds": seconds, "memory_mib": memory, **facts}
        self._result.write_text(json.dumps(notes), encoding="utf-8")
