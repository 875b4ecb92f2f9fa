"""What one step of a config trains on: documents, tokens and how many of them are supervised.

Where the rows can be read here, they are (and stay prepared in the cache for `train`); else every
pack is taken to be full, and the plan says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.budget import Budget
from finetune.config import RunConfig
from finetune.errors import InputError

if TYPE_CHECKING:
    from finetune.batching import Steps
    from finetune.data import RunData

_USUAL_DOCUMENT = 256  # tokens of a document where the rows are not known
_USUAL_SUPERVISED = 0.5


@dataclass(frozen=True)
class Workload:
    """Micro-batches and steps.

    Attributes:
        lengths: tokens of each document of the largest micro-batch.
        supervised: trained tokens of the micro-batch that has the most.
        usual_lengths: of a micro-batch of usual size.
        usual_supervised: of it.
        micro_batches: of one device in a step.
        tokens_per_step: of all devices, on average.
        steps: the arithmetic of the run; None where the rows are not here.
        num_steps: of the run; None where nothing tells.
    """

    lengths: list[int]
    supervised: int
    usual_lengths: list[int]
    usual_supervised: int
    micro_batches: int
    tokens_per_step: float
    steps: Steps | None
    num_steps: int | None

    def flops(self, budget: Budget, config: RunConfig) -> float:
        """Of one device's step."""
        tokens, supervised = sum(self.usual_lengths), self.usual_supervised
        return self.micro_batches * flops_of(budget, config, tokens, supervised)

    def as_json(self) -> dict[str, Any]:
        """What a plan shows of it."""
        return {
            "micro_batch_tokens": sum(self.lengths),
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
            f"{_USUAL_DOCUMENT} tokens, {self.supervised / sum(self.lengths):.0%} of them trained; "
            f"about {self.tokens_per_step:,.0f} tokens a step"
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
    supervised = max(int(sum(documents) * share), 1)
    micro_batches = train.gradient_accumulation_steps
    return Workload(
        documents,
        supervised,
        documents,
        supervised,
        micro_batches,
        float(sum(documents) * micro_batches * num_ranks),
        None,
        train.max_steps,
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
    from finetune.batching import plan_batches, steps_of

    plan = plan_batches(config, data, num_ranks)
    lengths, trained = data.train.lengths, data.train.num_trained
    batches = [batch for batch in plan.epoch(config.run.seed, 0, 0) if batch and batch[0] >= 0]
    by_size = sorted(batches, key=lambda batch: int(lengths[batch].sum()))
    largest, usual = by_size[-1], by_size[len(by_size) // 2]
    if not config.data.packing:  # another epoch or rank may put the longest together
        largest = lengths.argsort()[-plan.per_device :].tolist()
    steps = steps_of(config, data, plan)
    return Workload(
        lengths=lengths[largest].tolist(),
        supervised=max(int(trained[batch].sum()) for batch in batches),
        usual_lengths=lengths[usual].tolist(),
        usual_supervised=max(int(trained[usual].sum()), 1),
        micro_batches=plan.accumulation,
        tokens_per_step=steps.num_tokens / steps.per_epoch,
        steps=steps,
        num_steps=steps.total,
    )
