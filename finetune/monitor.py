"""What watches a run from outside the loss: progress, metrics of every step, signals."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.artifact import write_text
from finetune.errors import CannotContinue
from finetune.trainer import OurSeams

SAME_REQUEST_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by the first signal, read at step boundaries; a second one ends the process at once.

    A scheduler that signals a job's whole process tree, and a launcher that passes a signal on,
    make two of one: what follows within `SAME_REQUEST_SECONDS` is the same request.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.received_at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if self.received is not None:
            if now - self.received_at < SAME_REQUEST_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received, self.received_at = number, now
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


class Progress:
    """Loss, tokens a second and time left: a bar on a terminal, else a line now and then."""

    def __init__(self, logging_steps: int) -> None:
        self.logging_steps = logging_steps
        self.heldout_loss: float | None = None
        self.bar: tqdm[Any] | None = None

    def begin(self, step: int, max_steps: int) -> None:
        """Starts after `step` steps of `max_steps`."""
        self.first, self.last, self.started = step, max_steps, time.monotonic()
        if sys.stderr.isatty():
            self.bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True)

    def step(self, step: int, loss: float, num_tokens: int, seconds: float) -> None:
        """Shows one step.

        Args:
            num_tokens: all tokens of the step, over all ranks.
            seconds: the step took.
        """
        shown = {"loss": f"{loss:.4f}", "tok/s": f"{num_tokens / max(seconds, 1e-9):,.0f}"}
        if self.heldout_loss is not None:
            shown["heldout"] = f"{self.heldout_loss:.4f}"
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        elif step % self.logging_steps == 0 or step == self.last:
            left = (time.monotonic() - self.started) / (step - self.first) * (self.last - step)
            facts = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step     {step}/{self.last}: {facts}, {left:,.0f} s left", file=sys.stderr)

    def heldout(self, step: int, loss: float, is_best: bool) -> None:
        """Shows a held-out loss.

        Args:
            loss: nats per token.
            is_best: whether it is the lowest of a run where that decides something.
        """
        self.heldout_loss = loss
        which = " (before training)" if step == 0 else ", the best so far" if is_best else ""
        tqdm.write(f"heldout  step {step}: {loss:.4f} nats a token{which}", file=sys.stderr)

    def end(self) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()


class StepMetrics(TrainerCallback):
    """A line of metrics.jsonl for every step, on the first rank."""

    def __init__(self, trainer: OurSeams, path: Path, progress: Progress) -> None:
        self.trainer, self.path, self.progress = trainer, path, progress
        self.file: TextIO | None = None
        self.heldout_steps: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drops the lines of steps that a resumed run will do again."""
        done = state.global_step  # of 0 nothing is kept: other rows may be held out now
        kept = [row for row in read_metrics(self.path) if done and row["step"] <= done]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.heldout_steps = {row["step"] for row in kept if "heldout_loss" in row}
        self.progress.begin(state.global_step, state.max_steps)
        self.started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Writes and shows the step."""
        seconds, self.started = time.monotonic() - self.started, time.monotonic()
        trainer = self.trainer
        self._write(
            control.should_save,  # a checkpoint goes on from here: these lines are its own
            step=state.global_step,
            epoch=state.epoch,
            loss=trainer.step_loss,
            tokens_trained=trainer.step_tokens,
            tokens=trainer.step_num_tokens,
            grad_norm=trainer.step_grad_norm,
            learning_rate=trainer.step_learning_rate,
            seconds=round(seconds, 4),
            **({"spikes": [str(s) for s in trainer.step_spikes]} if trainer.step_spikes else {}),
            **({"micro_batch_pieces": trainer.num_pieces} if trainer.num_pieces > 1 else {}),
        )
        for spike in trainer.step_spikes:
            done = " (skipped)" if trainer.ours.on_spike == "skip" else ""
            print(f"spike    step {state.global_step}{done}: {spike}", file=sys.stderr)
        self.progress.step(state.global_step, trainer.step_loss, trainer.step_num_tokens, seconds)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **_: Any,
    ) -> None:
        """Writes and shows the held-out loss, once a step: a run that went on may have it."""
        step, loss = state.global_step, metrics["eval_loss"]
        if step not in self.heldout_steps:
            self._write(True, step=step, heldout_loss=loss)  # may come after the last checkpoint
        self.progress.heldout(step, loss, is_best=step == self.trainer.best.best_step)
        self.started = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The time a checkpoint takes is not the next step's."""
        self.started = time.monotonic()

    def close(self) -> None:
        """Ends the bar and the file."""
        self.progress.end()
        if self.file is not None:
            self.file.close()

    def _write(self, to_disk: bool, **values: Any) -> None:
        """A line; it and all before it outlive a power cut where `to_disk` says so."""
        assert self.file is not None, "training has begun"
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
            if to_disk:
                os.fsync(self.file.fileno())
        except OSError as error:
            raise CannotContinue(f"{self.path}: could not be written: {error}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that a killed process left half-written."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
