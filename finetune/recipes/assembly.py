"""What every recipe's trainer is put together from: the parts, and the engine's arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from finetune.batching import plan_batches, steps_of
from finetune.best import Rules
from finetune.config import RunConfig
from finetune.data import RunData
from finetune.packing import BatchPlan
from finetune.precision import uses_bf16_autocast
from finetune.rank_schedule import RankSchedule
from finetune.trainer import TrainerInputs


@dataclass(frozen=True)
class Parts:
    """A run's parts, ready to be put together.

    Attributes:
        config: the run's config.
        run_path: the run folder.
        model: base, with its adapter where there is one.
        tokenizer: of the base.
        data: documents of both sides.
        num_ranks: processes that train.
        trained_on: what the numbers depend on, by hash, for the checkpoints' manifests.
    """

    config: RunConfig
    run_path: Path
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast
    data: RunData
    num_ranks: int
    trained_on: Mapping[str, Any]


def trainer_inputs(parts: Parts) -> TrainerInputs:
    """What the seams need."""
    config = parts.config
    plan = plan_batches(config, parts.data, parts.num_ranks)
    return TrainerInputs(
        train=parts.data.train,
        heldout=parts.data.heldout,
        plan=plan,
        seed=config.run.seed,
        checkpoints=parts.run_path / "checkpoints",
        trained_on=parts.trained_on,
        save_total_limit=config.train.save_total_limit,
        eval_batch_size=config.eval.per_device_eval_batch_size,
        rules=_rules(config),
        lr_ratio=config.adapter.loraplus_lr_ratio if config.adapter.method == "lora+" else None,
        ranks=_rank_schedule(parts, plan),
        on_spike=config.train.on_spike,
        fast=config.fast,
        shrinks=config.train.fit == "auto",
        offloads=config.train.activation_offloading,
    )


def _rules(config: RunConfig) -> Rules:
    train = config.train
    return Rules(
        eval_on_start=train.eval_on_start,
        eval_steps=train.eval_steps,
        load_best_model_at_end=train.load_best_model_at_end,
        patience=train.early_stopping_patience,
        threshold=train.early_stopping_threshold,
    )


def _rank_schedule(parts: Parts, plan: BatchPlan) -> RankSchedule | None:
    if parts.config.adapter.method != "adalora":
        return None
    num_steps = steps_of(parts.config, parts.data, plan).total
    return RankSchedule(cast(PeftModel, parts.model), parts.config.adapter, num_steps)


def engine_arguments(parts: Parts) -> dict[str, Any]:
    """Arguments of TRL's config that follow from ours; everything it might do unasked is off."""
    config, train = parts.config, parts.config.train
    has_heldout = bool(parts.data.heldout)
    return {
        "output_dir": str(parts.run_path),
        "seed": config.run.seed,
        "num_train_epochs": train.num_train_epochs or 1.0,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "lr_scheduler_kwargs": dict(train.lr_scheduler_kwargs),
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "optim": train.optim,
        "bf16": uses_bf16_autocast(config),
        "fp16": False,
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": train.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if has_heldout and train.eval_steps else "no",
        "eval_steps": train.eval_steps,
        "eval_on_start": has_heldout,  # `evaluation` decides: the engine would do it on resume too
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        "report_to": train.report_to,
        "run_name": config.run.name,  # of trackers
        "project": "plumbtune",
        "trackio_static_space_id": False,  # nothing goes to the hub
        "disable_tqdm": True,
        "log_level_replica": "error",
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "push_to_hub": False,
    }


def placeholder_rows(num_documents: int) -> Dataset:
    """TRL asks for a `datasets.Dataset`; the rows themselves come from our own loader."""
    return Dataset.from_dict({"document": list(range(num_documents))})


@contextlib.contextmanager
def trained_dtypes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Undoes TRL's cast of QLoRA adapters to bfloat16: small updates vanish in it."""
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != before[name].dtype:
            parameter.data = before[name].to(parameter.device)


@contextlib.contextmanager
def head_seen_bare(model: torch.nn.Module) -> Iterator[None]:
    """Lets TRL's check of the head pass where trained embeddings are tied to it: TRL would compute
    the loss past such a head, ours goes through the model.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    bare = getattr(head, "base_layer", None)
    if bare is None:
        yield
        return
    vars(model)["get_output_embeddings"] = lambda: bare
    try:
        yield
    finally:
        del vars(model)["get_output_embeddings"]
