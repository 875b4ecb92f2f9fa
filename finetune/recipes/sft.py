"""Supervised fine-tuning: the next-token loss on the assistant's words and their end of turn.

    loss = - sum over trained tokens t of log p(x_t | x_<t)  /  number of trained tokens

Source: Ouyang et al. 2022, "Training language models to follow instructions", arXiv:2203.02155
(the supervised stage); masking by segments: `finetune.llama.chat`.
"""

from __future__ import annotations

from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from finetune.recipes.assembly import (
    Parts,
    engine_arguments,
    head_seen_bare,
    placeholder_rows,
    trained_dtypes_kept,
    trainer_inputs,
)
from finetune.trainer import OurSeams


class SeamedSFTTrainer(OurSeams, SFTTrainer):
    """TRL's SFTTrainer with the toolkit's data, loss, checkpoints and evaluation."""


def build(parts: Parts) -> OurSeams:
    """Puts TRL's trainer together for a run."""
    inputs = trainer_inputs(parts)
    arguments = SFTConfig(
        **engine_arguments(parts),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = placeholder_rows(len(inputs.train))
    with trained_dtypes_kept(parts.model), head_seen_bare(parts.model):
        trainer = SeamedSFTTrainer(
            model=parts.model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows if inputs.heldout else None,
            processing_class=parts.tokenizer,
            data_collator=list,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.set_inputs(inputs)
    return trainer
