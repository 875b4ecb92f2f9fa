"""What watches a run from outside the loss: progress, metrics of every step, signals."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.trainer import OurSeams

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by the first signal, read at step boundaries; the second signal ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        name = signal.Signals(number).name
        print(
            f"\n{name}: finishing this step, then saving; once more to end at once", file=sys.stderr
        )


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catches SIGINT, SIGTERM and SIGUSR1 while a run trains."""
    flag = StopFlag()
    previous = {number: signal.signal(number, flag) for number in _SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopAtBoundary(TrainerCallback):
    """Ends training at a step boundary, with a checkpoint, once any rank got a signal."""

    def __init__(self, flag: StopFlag) -> None:
        self.flag = flag
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """All ranks agree before any of them stops."""
        if _any_rank(self.flag.received is not None, args.device):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def _any_rank(flag: bool, device: torch.device) -> bool:
    if not dist.is_initialized():
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value)
    return bool(value.item())


class StepMetrics(TrainerCallback):
    """A line of metrics.jsonl for every step, and the progress bar, on the first rank."""

    def __init__(self, trainer: OurSeams, path: Path, show: bool) -> None:
        self.trainer, self.path, self.show = trainer, path, show
        self.bar: tqdm[Any] | None = None
        self.heldout_loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drops the lines of steps that a resumed run will do again."""
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(kept), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            disable=not self.show,
            dynamic_ncols=True,
            file=sys.stderr,
        )
        self.started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Writes the step and moves the bar."""
        seconds, self.started = time.monotonic() - self.started, time.monotonic()
        tokens = self.trainer.step_num_tokens
        self._write(
            step=state.global_step,
            epoch=state.epoch,
            loss=self.trainer.step_loss,
            tokens_trained=self.trainer.step_tokens,
            tokens=tokens,
            grad_norm=self.trainer.step_grad_norm,
            learning_rate=self.trainer.step_learning_rate,
            seconds=round(seconds, 4),
        )
        assert self.bar is not None
        self.bar.update()
        shown = {"loss": f"{self.trainer.step_loss:.4f}", "tok/s": f"{tokens / seconds:,.0f}"}
        if self.heldout_loss is not None:
            shown["heldout"] = f"{self.heldout_loss:.4f}"
        self.bar.set_postfix(shown, refresh=False)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **_: Any,
    ) -> None:
        """Writes the held-out loss."""
        self.heldout_loss = metrics["eval_loss"]
        self._write(step=state.global_step, heldout_loss=self.heldout_loss)
        self.started = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The time a checkpoint takes is not the next step's."""
        self.started = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Closes bar and file."""
        self.close()

    def close(self) -> None:
        """Closes the bar and the file; safe to call twice."""
        if self.bar is not None:
            self.bar.close()
            self.file.close()

    def _write(self, **values: Any) -> None:
        if not self.file.closed:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in _lines(path)]
