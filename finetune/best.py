"""What held-out losses decide while a run trains: which step is the best, and when to stop.

Names and rules are transformers' (`EarlyStoppingCallback`, `load_best_model_at_end`, 5.23). The
loss before step 1 is no candidate: it is the base's, and nothing trained could be published for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.state_files import as_written, is_count, is_number, read_state


@dataclass(frozen=True)
class Rules:
    """What held-out losses may decide.

    Attributes:
        eval_on_start: score before step 1 too.
        eval_steps: steps between held-out losses; None: only at the end.
        load_best_model_at_end: keep the best checkpoint, and publish its weights.
        patience: evaluations without improvement after which a run stops; None: it never does.
        threshold: nats per token by which a loss must fall to be an improvement.
    """

    eval_on_start: bool = True
    eval_steps: int | None = None
    load_best_model_at_end: bool = False
    patience: int | None = None
    threshold: float = 0.0

    @property
    def act(self) -> bool:
        """Whether anything follows from a held-out loss."""
        return self.load_best_model_at_end or self.patience is not None


class BestWatch:
    """The held-out losses of a run so far, as far as they decide something.

    Args:
        rules: of the config.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.last_step: int | None = None
        self.start_loss: float | None = None  # before step 1
        self._forget()

    def _forget(self) -> None:
        self.best_step: int | None = None
        self.best_loss: float | None = None
        self.num_tokens = 0
        self.num_without_improvement = 0

    def is_due_at_start(self, step: int) -> bool:
        """Whether a run that starts after `step` steps owes a held-out loss of these weights.

        A signal leaves no time for the one that is due at its step: it is made up for.
        """
        if step == 0:
            return self.rules.eval_on_start
        return self.last_step != step and step % (self.rules.eval_steps or step + 1) == 0

    def look(self, step: int, loss: float, num_tokens: int) -> bool:
        """Takes a held-out loss in.

        Args:
            step: optimiser steps made.
            loss: nats per trained token, the same number on every rank.
            num_tokens: it was divided by; where it changed, other rows are held out now, whose
                losses compare with no earlier one.

        Returns:
            Whether it is the lowest so far; of equal ones the earlier is.
        """
        if step == self.last_step:  # a run that goes on after its last step scores it again
            return False
        self.last_step = step
        if step == 0:
            self.start_loss = loss
        if step == 0 or not self.rules.act:
            return False
        if num_tokens != self.num_tokens:
            self._forget()
            self.num_tokens = num_tokens
        before = self.best_loss
        if before is None or before - loss > self.rules.threshold:
            self.num_without_improvement = 0
        else:
            self.num_without_improvement += 1
        if before is not None and loss >= before:
            return False
        self.best_step, self.best_loss = step, loss
        return True

    @property
    def protected_step(self) -> int | None:
        """The step whose checkpoint stays, whatever its age."""
        return self.best_step if self.rules.load_best_model_at_end else None

    @property
    def stops(self) -> bool:
        """Whether patience is at an end."""
        patience = self.rules.patience
        return patience is not None and self.num_without_improvement >= patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "last_step": self.last_step,
            "start_loss": self.start_loss,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "num_tokens": self.num_tokens,
            "num_without_improvement": self.num_without_improvement,
            "best_is_kept": self.rules.load_best_model_at_end,
        }

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint's file.

        Raises:
            CheckFailed: it holds something else.
        """
        state = read_state(path)
        with as_written(path):
            for name in ("last_step", "best_step", "num_tokens", "num_without_improvement"):
                if state[name] is not None and not is_count(state[name]):
                    raise ValueError(f"{name} is no count")
            for name in ("start_loss", "best_loss"):
                if state[name] is not None and not is_number(state[name]):
                    raise ValueError(f"{name} is no number")
            if type(state["best_is_kept"]) is not bool:
                raise ValueError("best_is_kept is neither true nor false")
            self.restore(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's state.

        A best step whose checkpoint nobody kept (`load_best_model_at_end` was off then) cannot be
        published: the best is looked for from here on.
        """
        self.last_step, self.start_loss = state["last_step"], state["start_loss"]
        if self.rules.load_best_model_at_end and not state["best_is_kept"]:
            return
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]
        self.num_tokens = state["num_tokens"]
        self.num_without_improvement = state["num_without_improvement"]

    def notes(self, step: int, loss: float) -> list[str]:
        """What a person should know of how the run ended.

        Args:
            step: whose weights are published.
            loss: their held-out loss.
        """
        found = []
        if self.stops:
            found.append(
                f"stopped early after step {self.last_step}: {self.num_without_improvement} "
                f"evaluations without improvement on the held-out loss {self.best_loss:.4f} of "
                f"step {self.best_step} (train.early_stopping_patience)"
            )
        if self.start_loss is not None and loss >= self.start_loss:
            found.append(
                f"training made the held-out loss no better: {self.start_loss:.4f} before step 1, "
                f"{loss:.4f} of step {step}, which is published"
            )
        return found
