"""What one step of a config trains on: documents, tokens and how many of them are supervised.

Where the rows can be read here, they are (and stay prepared in the cache for `train`); else every
pack is taken to be full, and the plan says so.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.budget import Budget
from finetune.config import RunConfig
from finetune.errors import InputError

if TYPE_CHECKING:
    from finetune.batching import Steps
    from finetune.data import RunData
    from finetune.fast.loss import Packed

_USUAL_DOCUMENT = 256  # tokens of a document where the rows are not known
_USUAL_SUPERVISED = 0.5
_MOST_BATCHES = 1 << 18  # of a run, among which the largest is looked for


@dataclass(frozen=True)
class MicroBatch:
    """Documents that go through the model together.

    Attributes:
        lengths: tokens of each.
        supervised: their trained tokens.
        row: the documents laid end to end; None where they are not here.
    """

    lengths: list[int]
    supervised: int
    row: Packed | None = None

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(self.lengths)

    def behind_vectors(self, count: int) -> MicroBatch:
        """The same with so many trained vectors before each document."""
        return replace(self, lengths=[n + count for n in self.lengths], row=None) if count else self

    def first(self, tokens: int) -> MicroBatch:
        """The first documents, the last of them cut, of so many tokens at most."""
        if self.tokens <= tokens:
            return self
        ends = [min(end, tokens) for end in itertools.accumulate(self.lengths)]
        lengths = [end - start for start, end in itertools.pairwise([0, *ends]) if end > start]
        supervised = max(self.supervised * tokens // self.tokens, 1)
        row = self.row
        if row is not None:
            row = replace(
                row,
                input_ids=row.input_ids[:, :tokens],
                position_ids=row.position_ids[:, :tokens],
                labels=row.labels[:, :tokens],
                document_lengths=lengths,
            )
        return MicroBatch(lengths, supervised, row)


@dataclass(frozen=True)
class Workload:
    """Micro-batches and steps.

    Attributes:
        largest: the micro-batch with the most tokens.
        most_supervised: trained tokens of the micro-batch that has the most.
        usual: a micro-batch of usual size.
        micro_batches: of one device in a step.
        tokens_per_step: of all devices, on average.
        steps: the arithmetic of the run; None where the rows are not here.
        num_steps: of the run; None where nothing tells.
    """

    largest: MicroBatch
    most_supervised: int
    usual: MicroBatch
    micro_batches: int
    tokens_per_step: float
    steps: Steps | None
    num_steps: int | None

    def flops(self, budget: Budget, config: RunConfig) -> float:
        """Of one device's step."""
        each = flops_of(budget, config, self.usual.tokens, self.usual.supervised)
        return self.micro_batches * each

    def as_json(self) -> dict[str, Any]:
        """What a plan shows of it."""
        return {
            "micro_batch_tokens": self.largest.tokens,
            "tokens_per_step": round(self.tokens_per_step),
            "steps": self.num_steps,
            "epochs": None if self.steps is None else self.steps.epochs,
            "rows_known": self.steps is not None,
        }

    def lines(self) -> list[str]:
        """For the terminal."""
        if self.steps is not None:
            return [self.steps.line()]
        return [
            f"steps    base, tokenizer or rows are not here: packs are taken as full, documents as "
            f"{_USUAL_DOCUMENT} tokens, {self.usual.supervised / self.usual.tokens:.0%} of them "
            f"trained; about {self.tokens_per_step:,.0f} tokens a step"
        ]


def flops_of(budget: Budget, config: RunConfig, tokens: int, supervised: int) -> float:
    """Of tokens that train: 4 for each frozen weight and token, 6 for each trained one.

    The head works on supervised tokens alone; attention scores, norms and the optimizer count
    nothing.
    """
    counts, is_full = budget.parameters, config.adapter.method == "none"
    blocks, head = counts.attention + counts.mlp, counts.head or counts.embedding
    recomputed = 2 * blocks if config.train.activation_checkpointing else 0
    factor = 6 if is_full else 4
    per_token = factor * blocks + recomputed + (0 if is_full else 6 * budget.trainable)
    return float(tokens * per_token + supervised * factor * head)


def workload_of(config: RunConfig, num_ranks: int, data: RunData | None = None) -> Workload:
    """The rows of the config where they can be read, else packs that are full.

    Args:
        data: the rows, where they are read already.
    """
    if data is None and _has_rows(config):
        from finetune.data import open_data
        from finetune.model import read_tokenizer

        data = open_data(config, *read_tokenizer(config))
    if data is not None:
        return _of_rows(config, num_ranks, data)
    train, length = config.train, config.data.max_length
    documents = [length] * train.per_device_train_batch_size
    if config.data.packing:
        pack = [_USUAL_DOCUMENT] * (length // _USUAL_DOCUMENT)
        rest = length - sum(pack)
        documents = (pack + [rest] * bool(rest)) * train.per_device_train_batch_size
    share = 1.0 if config.recipe == "pretrain" else _USUAL_SUPERVISED
    batch = MicroBatch(documents, max(int(sum(documents) * share), 1))
    micro_batches = train.gradient_accumulation_steps
    return Workload(
        largest=batch,
        most_supervised=batch.supervised,
        usual=batch,
        micro_batches=micro_batches,
        tokens_per_step=float(batch.tokens * micro_batches * num_ranks),
        steps=None,
        num_steps=train.max_steps,
    )


def _has_rows(config: RunConfig) -> bool:
    """Whether base, tokenizer and training rows lie on this machine: nothing is fetched."""
    from finetune.preparation import source_files

    base = config.base
    tokenizer = base.tokenizer or base.path
    if base.is_hub_id or tokenizer is None or not Path(tokenizer).exists():
        return False
    try:
        return bool(config.data.train and source_files(config)[0])
    except InputError:  # `train` and `data` say what is wrong with them
        return False


def _of_rows(config: RunConfig, num_ranks: int, data: RunData) -> Workload:
    import numpy as np

    from finetune.batching import plan_batches, steps_of
    from finetune.fast.loss import pack

    plan = plan_batches(config, data, num_ranks)
    steps = steps_of(config, data, plan)
    lengths, trained = data.train.lengths, data.train.num_trained
    run = (
        batch
        for epoch in range(math.ceil(steps.epochs))
        for rank in range(num_ranks)
        for batch in itertools.islice(
            plan.epoch(config.run.seed, epoch, rank),
            (steps.total - epoch * steps.per_epoch) * plan.accumulation,
        )
        if batch[0] >= 0
    )
    batches = list(itertools.islice(run, _MOST_BATCHES))
    ends = np.cumsum([len(batch) for batch in batches])
    flat, starts = np.concatenate(batches), np.concatenate(([0], ends[:-1]))
    tokens = np.add.reduceat(lengths[flat].astype(np.int64), starts)
    supervised = np.add.reduceat(trained[flat].astype(np.int64), starts)
    by_size = np.argsort(tokens, kind="stable")

    def documents(number: int) -> MicroBatch:
        row = pack([data.train.pair(index) for index in batches[number]])
        return MicroBatch(row.document_lengths, max(int(supervised[number]), 1), row)

    return Workload(
        largest=documents(by_size[-1]),
        most_supervised=int(supervised.max()),
        usual=documents(by_size[len(by_size) // 2]),
        micro_batches=plan.accumulation,
        tokens_per_step=steps.num_tokens / steps.per_epoch,
        steps=steps,
        num_steps=steps.total,
    )
