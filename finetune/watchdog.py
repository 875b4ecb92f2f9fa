"""Numbers that go wrong while a run trains: spikes, weights that do not move, a base that does.

A spike is a loss or a gradient norm more than six standard deviations over the mean of the last 128
steps. Source of the rule: OLMo-core's SkipStepOptimizer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import CannotContinue, CheckFailed
from finetune.state_files import as_written, check_windows, read_state

WINDOW, SIGMAS = 128, 6.0
MIN_HISTORY = 32  # steps before the spread of a few numbers is taken for a rule
STILL_STEPS = 10
_NUM_WORDS = 1 << 22  # of four bytes, in one sum


@dataclass(frozen=True)
class Spike:
    """A number far above those before it.

    Attributes:
        name: loss or gradient norm.
        value: of this step.
        mean: of the window.
        deviation: standard deviation of the window.
    """

    name: str
    value: float
    mean: float
    deviation: float

    def __str__(self) -> str:
        return (
            f"{self.name} {self.value:.4g}, where {self.mean:.4g} ± {self.deviation:.2g} is usual"
        )


class SpikeWatch:
    """Rolling statistics of loss and gradient norm; what spiked is not counted among them."""

    def __init__(self) -> None:
        self._windows = {name: deque[float](maxlen=WINDOW) for name in ("loss", "gradient norm")}

    def look(self, loss: float, grad_norm: float) -> list[Spike]:
        """The spikes of a step; the step joins the window where there are none."""
        values = {"loss": loss, "gradient norm": grad_norm}
        found = [s for name, value in values.items() if (s := self._spike(name, value))]
        if not found:
            for name, value in values.items():
                self._windows[name].append(value)
        return found

    def _spike(self, name: str, value: float) -> Spike | None:
        window = self._windows[name]
        if len(window) < MIN_HISTORY:
            return None
        mean = math.fsum(window) / len(window)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in window) / (len(window) - 1))
        if value <= mean + SIGMAS * deviation:
            return None
        return Spike(name, value, mean, deviation)

    def state(self) -> dict[str, list[float]]:
        """The windows, for a checkpoint."""
        return {name: list(window) for name, window in self._windows.items()}

    def load(self, path: Path) -> None:
        """Puts the windows of a checkpoint back.

        Raises:
            CheckFailed: the file holds none.
        """
        state = read_state(path)
        with as_written(path):
            self.restore(state)

    def restore(self, state: Mapping[str, Iterable[float]]) -> None:
        """Puts the windows back.

        Raises:
            ValueError: they are none.
        """
        check_windows(state, list(self._windows), WINDOW)
        for name, values in state.items():
            self._windows[name] = deque(values, maxlen=WINDOW)


class StillnessWatch:
    """Stops a run whose trained weights are the same bits after ten steps.

    Args:
        model: with what trains asking for gradients.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._first: int | None = None

    def look(self, num_steps: int, learning_rate: float) -> None:
        """Called after each step of this process, counted from 1.

        Raises:
            CannotContinue: nothing moved.
        """
        if num_steps == 1:
            self._first = checksum(p for p in self._model.parameters() if p.requires_grad)
        elif num_steps == STILL_STEPS + 1:
            now = checksum(p for p in self._model.parameters() if p.requires_grad)
            if now == self._first:
                raise CannotContinue(
                    f"no trained weight moved in {STILL_STEPS} steps (learning rate "
                    f"{learning_rate:.3g}): the rate is too small for the weights' type, or "
                    "nothing that trains has a say in the loss"
                )


def frozen_checksums(model: torch.nn.Module) -> dict[str, int]:
    """For everything that does not train, a number that changes with any of its bits."""
    return {n: checksum([p]) for n, p in model.named_parameters() if not p.requires_grad}


def refuse_changed(before: Mapping[str, int], model: torch.nn.Module) -> None:
    """Compares what does not train with what it was.

    Raises:
        CheckFailed: a bit of it changed.
    """
    now = frozen_checksums(model)
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        raise CheckFailed(
            f"{len(changed)} tensors of the base changed while the adapter trained, first "
            f"{changed[0]}; nothing is published. Faulty memory, or code that writes where it "
            "must not"
        )


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """The sum of all bits' words of tensors, each weighed by its place among them, modulo 2^63.

    One changed bit changes one word by a power of two, and so the sum.
    """
    total = 0
    for place, tensor in enumerate(tensors, start=1):
        octets = tensor.detach().contiguous().view(torch.uint8).flatten()
        words = octets[: len(octets) // 4 * 4].view(torch.int32)
        # torch widens what it sums: in parts, or an embedding takes twice its memory once more
        whole = sum(int(part.sum(dtype=torch.int64).item()) for part in words.split(_NUM_WORDS))
        rest = int(octets[len(octets) // 4 * 4 :].sum(dtype=torch.int64).item())
        total += (2 * place + 1) * (whole + 7 * rest)
    return total % (1 << 63)


def not_finite(named: Iterable[tuple[str, Any]], limit: int = 3) -> list[str]:
    """The first names whose tensors hold numbers that are not finite."""
    found = []
    for name, tensor in named:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            found.append(name)
            if len(found) == limit:
                break
    return found
