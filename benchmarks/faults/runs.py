"""A small real run in a forked copy of this process, and what must be equal after a fault."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from finetune import artifact
from finetune.errors import exit_code_of
from finetune.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "assets" / "llama-nano"
SHAPE = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 1024, "context": 512}
# 6 steps of 2 micro-batches, dropout, packs, a checkpoint every second step, two of them kept.
SETTINGS = {
    "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "train": {
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6},
        **{"learning_rate": 0.01, "save_steps": 2, "eval_steps": 3, "bf16": False},
    },
}


class Runs:
    """A folder in which one run is made again and again.

    Args:
        folder: empty.
        settings: of the run, by section, over `SETTINGS`.
    """

    def __init__(self, folder: Path, **settings: dict[str, Any]) -> None:
        self.folder = folder.resolve()
        self.config = self.folder / "run.yaml"
        lines = (NANO / "data" / "train.jsonl").read_text(encoding="utf-8").split("\n")
        (self.folder / "train.jsonl").write_text("\n".join(lines[:60]) + "\n", encoding="utf-8")
        held = (NANO / "data" / "heldout.jsonl").read_text(encoding="utf-8").split("\n")
        (self.folder / "heldout.jsonl").write_text("\n".join(held[:5]) + "\n", encoding="utf-8")
        base = {"architecture": SHAPE, "tokenizer": str(NANO / "tokenizer.model")}
        values: dict[str, Any] = {
            "recipe": "sft",
            "run": {"name": "run", "dir": str(self.folder / "runs")},
            "base": {**base, "dtype": "float32"},
            "data": {
                "train": str(self.folder / "train.jsonl"),
                "heldout": str(self.folder / "heldout.jsonl"),
                "max_length": 128,
                "packing": True,
            },
            **{name: dict(section) for name, section in SETTINGS.items()},
        }
        for name, section in settings.items():
            values[name] |= section
        self.config.write_text(yaml.safe_dump(values), encoding="utf-8")
        self.run = RunFolder(self.folder / "runs" / "run")
        train = values["train"]
        self.num_micro_batches_before_the_last_step = (train["max_steps"] - 1) * train[
            "gradient_accumulation_steps"
        ]

    def attempt(
        self, before: Callable[[], None] | None = None, killed_after: float | None = None
    ) -> int:
        """The run in a forked copy; returns its exit code, minus the signal where it was killed.

        Args:
            before: called in the copy, to prepare a fault.
            killed_after: seconds until it gets SIGKILL.
        """
        child = os.fork()
        if child:
            if killed_after is not None:
                time.sleep(killed_after)
                os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 1
        try:
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 2)
            code = _train(self.config, before)
        finally:
            os._exit(code)

    def result(self) -> dict[str, Any]:
        """All that must be the same, by content: a hash for each file, the lines of the metrics."""
        run = self.run
        last = max(run.checkpoints.glob("step-*"))
        files = [*last.glob("*"), *run.adapter.glob("*")]
        kept = {f"{p.parent.name}/{p.name}": artifact.sha256_of(p) for p in files if _counts(p)}
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        for line in lines:
            line.pop("seconds", None)
        stale = [
            p.name for p in (*run.path.iterdir(), *run.checkpoints.iterdir()) if ".tmp-" in p.name
        ]
        return {"files": kept, "metrics": lines, "state": run.state(), "left_over": stale}


def _counts(path: Path) -> bool:
    """trainer_state.json holds times; the manifest its hash."""
    return path.name not in ("trainer_state.json", artifact.MANIFEST)


def _train(config: Path, before: Callable[[], None] | None) -> int:
    from finetune.config.loader import load
    from finetune.errors import describe
    from finetune.train import train

    try:
        loaded = load(config, [])
        if before:
            before()
        return train(loaded)
    except BaseException as error:
        print(describe(error), file=sys.stderr)
        return exit_code_of(error)


def import_all() -> None:
    """Imports what a run imports, in one thread: copies of this process start with it."""
    import torch

    torch.set_num_threads(1)  # a copy of a process with a pool of threads would wait for them
    for name in ("train", "stages", "resume", "monitor", "recipes", "watchdog"):
        importlib.import_module(f"finetune.{name}")
