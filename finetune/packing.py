"""Documents to packs, packs to the micro-batches of every rank, in one order for all.

The order of an epoch is a function of the seed and the epoch alone. A step takes the next
`ranks x accumulation x per_device` packs of that order, whoever computes them, so that one rank
and two train on the same steps; the last step is filled with packs that train nothing.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Sampler

from finetune.fast.loss import pack

FILLER = -1  # the index of a document of one untrained token


def best_fit(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Packs documents so that each pack holds at most `capacity` tokens.

    Documents come in the order of the seed; each goes where the least room is left that still
    holds it, else it opens a pack. (Longest-first packs a little tighter, but gathers rows of
    one length, often of one kind, in one step.)

    Args:
        lengths: tokens of each document, none above `capacity`.

    Returns:
        packs of document indices; every document once.
    """
    order = list(range(len(lengths)))
    random.Random(f"packs {seed}").shuffle(order)
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), sorted
    for document in order:
        length = lengths[document]
        assert length <= capacity, "overlong documents are dropped, split or refused before"
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
            packs[number].append(document)
        else:
            room, number = capacity, len(packs)
            packs.append([document])
        if room > length:
            bisect.insort(rooms, (room - length, number))
    return packs


@dataclass(frozen=True)
class BatchPlan:
    """How packs become steps.

    Attributes:
        packs: document indices of every pack.
        per_device: packs in one micro-batch.
        accumulation: micro-batches of one rank in a step.
        num_ranks: processes.
    """

    packs: list[list[int]]
    per_device: int
    accumulation: int
    num_ranks: int

    @property
    def packs_per_step(self) -> int:
        """Packs of one optimizer step over all ranks and micro-batches."""
        return self.per_device * self.accumulation * self.num_ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-len(self.packs) // self.packs_per_step)

    def epoch(self, seed: int, epoch: int, rank: int) -> Iterator[list[int]]:
        """This rank's micro-batches of an epoch: lists of document indices."""
        order = list(range(len(self.packs)))
        random.Random(f"epoch {seed} {epoch}").shuffle(order)
        for start in range(0, self.steps_per_epoch * self.packs_per_step, self.packs_per_step):
            step = order[start : start + self.packs_per_step]
            for micro in range(self.accumulation):
                first = (micro * self.num_ranks + rank) * self.per_device
                chosen = step[first : first + self.per_device]
                yield [document for pack in chosen for document in self.packs[pack]] or [FILLER]


class PackSampler(Sampler[list[int]]):
    """The micro-batches of one rank; `set_epoch` chooses the order."""

    def __init__(self, plan: BatchPlan, seed: int, rank: int) -> None:
        self.plan, self.seed, self.rank, self.epoch = plan, seed, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, resumed ones included."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.epoch(self.seed, self.epoch, self.rank)


class Documents:
    """Documents by index, for a DataLoader; `FILLER` is one token that is not trained."""

    def __init__(self, documents: Sequence[tuple[list[int], list[bool]]], filler_id: int) -> None:
        self.documents, self.filler = documents, ([filler_id], [False])

    def __getitem__(self, index: int) -> tuple[list[int], list[bool]]:
        return self.filler if index == FILLER else self.documents[index]

    def __len__(self) -> int:
        return len(self.documents)


class PackLoader(DataLoader[Any]):
    """A DataLoader over packs; the trainer reaches the sampler's epoch through it."""

    def __init__(self, documents: Documents, sampler: PackSampler) -> None:
        super().__init__(documents, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
        self.pack_sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch to the sampler."""
        self.pack_sampler.set_epoch(epoch)


def collate(documents: Sequence[tuple[list[int], list[bool]]]) -> dict[str, Any]:
    """Documents to the row that the loss takes: see `finetune.fast.loss.Packed`."""
    return vars(pack(documents))
