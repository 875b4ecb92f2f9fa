"""The batches of a run: which documents share a pack, and how many steps that makes."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from finetune.config import RunConfig
from finetune.data import RunData, num_epochs
from finetune.fast.loss import Packed, pack
from finetune.packing import BatchPlan, best_fit


def plan_batches(config: RunConfig, data: RunData, num_ranks: int) -> BatchPlan:
    """Packs the training documents; without packing each is a pack of its own.

    Where the sources have weights, each epoch holds other documents and has its own packs.
    """
    train, mixture = config.train, data.mixture
    plan = BatchPlan(
        _packs(config, data, 0),
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        num_ranks,
    )
    if mixture is None:
        return plan
    epochs = range(1, num_epochs(config, plan.steps_per_epoch))
    later = tuple(_packs(config, data, epoch) for epoch in epochs)
    return dataclasses.replace(plan, later=later)


def _packs(config: RunConfig, data: RunData, epoch: int) -> list[list[int]]:
    chosen = list(range(len(data.train)))
    if data.mixture is not None:
        chosen = data.mixture.documents(epoch)
    if not config.data.packing:
        return [[index] for index in chosen]
    lengths = data.train.lengths[chosen].tolist()
    packs = best_fit(lengths, config.data.max_length, config.run.seed)
    return [[chosen[place] for place in pack] for pack in packs]


def first_rows(config: RunConfig, data: RunData, num_tokens: int) -> list[Packed]:
    """Some training documents laid end to end, for initialisations that look at them.

    Documents come in an order of the seed, whatever the number of ranks, until `num_tokens`.
    """
    order = list(range(len(data.train)))
    random.Random(f"first rows {config.run.seed}").shuffle(order)
    lengths = data.train.lengths
    ends = list(itertools.accumulate(int(lengths[index]) for index in order))
    chosen = order[: bisect.bisect_left(ends, num_tokens) + 1]
    packs = best_fit(lengths[chosen].tolist(), config.data.max_length, config.run.seed)
    return [pack([data.train.pair(chosen[place]) for place in places]) for places in packs]


@dataclass(frozen=True)
class PlannedPack:
    """One pack where it is trained; all counted from 1.

    Attributes:
        step: optimizer step.
        micro_batch: of the step.
        pack: of the micro-batch.
        documents: indices of its documents, in order.
    """

    step: int
    micro_batch: int
    pack: int
    documents: list[int]


def first_packs(plan: BatchPlan, seed: int, count: int) -> list[PlannedPack]:
    """The first packs that the first rank trains on in the first epoch, in order."""
    packs = (
        PlannedPack(number // plan.accumulation + 1, number % plan.accumulation + 1, place, pack)
        for number, batch in enumerate(plan.micro_batches(seed, epoch=0, rank=0))
        for place, pack in enumerate(batch, start=1)
    )
    return list(itertools.islice(packs, count))


@dataclass(frozen=True)
class Steps:
    """Packs, steps and tokens as arithmetic; of the first epoch, where they differ.

    Attributes:
        num_packs: of an epoch.
        is_packed: whether several documents share a pack.
        max_length: tokens that a pack can hold.
        per_device: packs of one micro-batch.
        accumulation: micro-batches of one rank in a step.
        num_ranks: processes.
        per_epoch: optimizer steps of an epoch.
        epochs: of the run; a part of one where it ends earlier.
        total: optimizer steps of the run.
        num_tokens: of an epoch.
        num_trained: trained tokens of an epoch.
    """

    num_packs: int
    is_packed: bool
    max_length: int
    per_device: int
    accumulation: int
    num_ranks: int
    per_epoch: int
    epochs: float
    total: int
    num_tokens: int
    num_trained: int

    @property
    def empty_share(self) -> float:
        """The part of the packs' room, 0 to 1, that no token fills. Nothing is computed there."""
        return 1 - self.num_tokens / (self.num_packs * self.max_length)

    def as_json(self) -> dict[str, Any]:
        """The numbers, and what follows from them; `empty_share` only with packing."""
        share = self.empty_share if self.is_packed else None
        return {**asdict(self), "empty_share": share}

    def line(self) -> str:
        """The arithmetic for the terminal."""
        return (
            f"steps    {self.num_packs:,} {self.unit} / ({self.per_device} a device x "
            f"{self.accumulation} accumulated x {self.num_ranks} ranks) = {self.per_epoch:,} steps "
            f"an epoch; {self.total:,} steps, about {self.num_tokens // self.per_epoch:,} tokens "
            f"({self.num_trained // self.per_epoch:,} trained) each"
        )

    @property
    def unit(self) -> str:
        """What `num_packs` counts."""
        return "packs" if self.is_packed else "rows"


def steps_of(config: RunConfig, data: RunData, plan: BatchPlan) -> Steps:
    """The steps of a run."""
    train, per_epoch = config.train, plan.steps_per_epoch
    total = train.max_steps or math.ceil(per_epoch * (train.num_train_epochs or 1))
    epoch = [document for pack in plan.packs for document in pack]
    return Steps(
        num_packs=len(plan.packs),
        is_packed=config.data.packing,
        max_length=config.data.max_length,
        per_device=plan.per_device,
        accumulation=plan.accumulation,
        num_ranks=plan.num_ranks,
        per_epoch=per_epoch,
        epochs=total / per_epoch,
        total=total,
        num_tokens=int(data.train.lengths[epoch].sum()),
        num_trained=int(data.train.num_trained[epoch].sum()),
    )
