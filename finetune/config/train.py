"""`train:` the optimisation; names and meanings as in transformers' TrainingArguments."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune.config.section import Count, Section

SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
"""The keyword arguments each schedule takes. Source: transformers.optimization, 5.23."""

EVALUATION = (
    *("eval_steps", "eval_on_start", "load_best_model_at_end"),
    *("early_stopping_patience", "early_stopping_threshold"),
)
"""What has an effect only where there are held-out rows."""


class TrainSection(Section):
    """Length, batch, optimiser, schedule, precision and how often things happen."""

    num_train_epochs: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Passes over the training rows; 1 where neither this nor `max_steps` is given."""

    max_steps: Count | None = None
    """Optimiser steps, instead of `num_train_epochs`."""

    per_device_train_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 4
    """Rows in a micro-batch of one device; with packing, packs of max_length tokens."""

    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Micro-batches summed into one optimiser step."""

    fit: Literal["none", "auto"] = "none"
    """`auto`: per_device_train_batch_size, gradient_accumulation_steps and activation_checkpointing
    are chosen to fit the device; the product of the first two, the rows of a step, is kept. A step
    that runs out of memory nevertheless is done again in smaller pieces."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate."""

    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "cosine"
    """Course of the learning rate after the warm-up."""

    lr_scheduler_kwargs: dict[str, str | int | float] = Field(default_factory=dict)
    """The schedule's own arguments, such as {min_lr_rate: 0.1} of cosine_with_min_lr."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up from 0."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay (norms and biases are exempt)."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's second moment."""

    adam_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Term added to Adam's denominator."""

    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 switches clipping off."""

    on_spike: Literal["record", "skip", "stop"] = "record"
    """What a loss or gradient norm over six deviations above the last 128 steps does: it is written
    to metrics.jsonl; with `skip` the step moves no weight, with `stop` the run ends."""

    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "sgd",
    ] = "adamw_torch_fused"
    """The optimiser; the 8-bit and paged ones come from bitsandbytes."""

    bf16: Literal["auto"] | bool = "auto"
    """Autocast to bfloat16; `auto`: where the device has it and the base is not bfloat16 yet."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""

    activation_offloading: bool = False
    """What the backward pass needs waits in the computer's memory, not in the GPU's, and is copied
    each way. Not a number changes. With activation_checkpointing: the layers' inputs alone."""

    logging_steps: Count = 10
    """Optimiser steps between lines on the terminal (metrics.jsonl has every step)."""

    eval_steps: Count | None = None
    """Optimiser steps between held-out losses; null: only at the end."""

    eval_on_start: bool = True
    """A held-out loss before step 1: the base's number, and memory it lacks is seen early."""

    load_best_model_at_end: bool = False
    """Publish the weights of the evaluation with the lowest held-out loss, not the last ones. Its
    checkpoint is saved at once and kept beside the `save_total_limit` newest."""

    early_stopping_patience: Count | None = None
    """Evaluations without a lower held-out loss after which the run stops; null: it never does."""

    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Nats per token by which the held-out loss must fall below the lowest so far to count."""

    save_steps: Count = 100
    """Optimiser steps between checkpoints."""

    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least 2, so that one is left when the newest is damaged."""

    report_to: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Tracker that gets the metrics as well."""

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_by_default(cls, data: Any) -> Any:
        lengths = ("num_train_epochs", "max_steps")
        if isinstance(data, dict) and all(data.get(key) is None for key in lengths):
            return {**data, "num_train_epochs": 1.0}
        return data

    def most_saves(self, num_steps: int) -> int:
        """Checkpoints that one process writes in so many steps, at most: those that are due, one
        where it is stopped, and where the best is kept, one an evaluation."""
        evaluated = self.load_best_model_at_end
        evaluations = math.ceil(num_steps / (self.eval_steps or num_steps or 1)) * evaluated
        return math.ceil(num_steps / self.save_steps) + 1 + evaluations

    def checkpoints_at_once(self, num_saves: int | None) -> int:
        """Those on the disk while one is written: the `save_total_limit` newest, the best and it.

        Args:
            num_saves: of the run, which may be fewer; None where nothing tells.
        """
        most = self.save_total_limit + self.load_best_model_at_end + 1
        return most if num_saves is None else min(most, num_saves)
