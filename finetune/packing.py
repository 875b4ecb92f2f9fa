"""Documents to packs, packs to the micro-batches of every rank, in one order for all.

The order of an epoch is a function of the seed and the epoch alone. A step takes the next
`ranks x accumulation x per_device` packs of that order, whoever computes them, so that one rank
and two train on the same steps; the last step is filled with packs that train nothing.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Sampler

from finetune.fast.loss import pack

Pair = tuple[Any, Any]  # ids and train mask of a document: lists or arrays, (tokens,) each
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
        packs: document indices of every pack of the first epoch, and of the others where they are
            the same.
        per_device: packs in one micro-batch.
        accumulation: micro-batches of one rank in a step.
        num_ranks: processes.
        later: the packs of the epochs after the first, where each has its own (a mixture).
    """

    packs: list[list[int]]
    per_device: int
    accumulation: int
    num_ranks: int
    later: tuple[list[list[int]], ...] = ()

    def packs_of(self, epoch: int) -> list[list[int]]:
        """Document indices of every pack of an epoch, counted from 0."""
        if epoch == 0 or not self.later:
            return self.packs
        return self.later[epoch - 1]

    @property
    def packs_per_step(self) -> int:
        """Packs of one optimizer step over all ranks and micro-batches."""
        return self.per_device * self.accumulation * self.num_ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch: of the longest, where their packs differ; the others are
        filled up with packs that train nothing."""
        longest = max(map(len, (self.packs, *self.later)))
        return -(-longest // self.packs_per_step)

    def micro_batches(self, seed: int, epoch: int, rank: int) -> Iterator[list[list[int]]]:
        """This rank's micro-batches of an epoch: the packs of each; none in one that fills up."""
        packs = self.packs_of(epoch)
        order = list(range(len(packs)))
        random.Random(f"epoch {seed} {epoch}").shuffle(order)
        for step in self._steps(order):
            for micro in range(self.accumulation):
                first = (micro * self.num_ranks + rank) * self.per_device
                yield [packs[number] for number in step[first : first + self.per_device]]

    def epoch(self, seed: int, epoch: int, rank: int) -> Iterator[list[int]]:
        """This rank's micro-batches of an epoch: lists of document indices."""
        for packs in self.micro_batches(seed, epoch, rank):
            yield [document for pack in packs for document in pack] or [FILLER]

    def _steps(self, order: list[int]) -> list[list[int]]:
        """The packs of each step: all full but the last. Those of an epoch that is short of whole
        steps are spread evenly instead, so that no step is without one.
        """
        num_steps, size = self.steps_per_epoch, self.packs_per_step
        if len(order) > (num_steps - 1) * size:
            ends = [step * size for step in range(num_steps + 1)]
        else:
            ends = [step * len(order) // num_steps for step in range(num_steps + 1)]
        return [order[start:end] for start, end in itertools.pairwise(ends)]


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


class TokenizedRows:
    """Ids and masks by index, for a DataLoader; `FILLER` is one token that is not trained.

    Args:
        pair: gives ids and train mask of a document by its index.
        num_documents: how many there are.
        filler_id: any id.
    """

    def __init__(self, pair: Callable[[int], Pair], num_documents: int, filler_id: int) -> None:
        self.pair, self.num_documents = pair, num_documents
        self.filler: Pair = ([filler_id], [False])

    def __getitem__(self, index: int) -> Pair:
        return self.filler if index == FILLER else self.pair(index)

    def __len__(self) -> int:
        return self.num_documents


class PackLoader(DataLoader[Any]):
    """A DataLoader over packs; the trainer reaches the sampler's epoch through it."""

    def __init__(self, documents: TokenizedRows, sampler: PackSampler) -> None:
        super().__init__(documents, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
        self.pack_sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch to the sampler."""
        self.pack_sampler.set_epoch(epoch)


def collate(documents: Sequence[Pair]) -> dict[str, Any]:
    """Documents to the row that the loss takes: see `finetune.fast.loss.Packed`."""
    return vars(pack(documents))
