"""TRL's SFTTrainer: on our packs, or on padded rows as it is by default.

python -m benchmarks.speed.trl_trainer --folder FOLDER --dtype float32 --steps 11 --result FILE
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from benchmarks.speed.recorder import Recorder, contender_parser

ROWS_IN_A_BATCH = 8  # of the padded run, about as many as two packs hold


def main() -> int:
    """Trains on the packs of `steps.json` in their order."""
    parser = contender_parser(__doc__)
    parser.add_argument("--padded", action="store_true")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    recorder = Recorder(args.result)
    steps = json.loads((args.folder / "steps.json").read_text(encoding="utf-8"))[: args.steps]
    rows, batch = (single_rows if args.padded else packed_rows)(steps)
    base = args.folder / f"base-{args.dtype}"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, args.dtype))
    model = PeftModel.from_pretrained(model, args.folder / "adapter", is_trainable=True)
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            per_device_train_batch_size=batch,
            train_sampling_strategy="sequential",
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_steps=args.steps,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
            data_collator=DataCollatorForLanguageModeling(0, padding_free=not args.padded),
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    counts = [rows[n * batch : (n + 1) * batch] for n in range(args.steps)]
    recorder.write(
        losses=losses,
        tokens=[sum(len(r["input_ids"]) for r in step) for step in counts],
        supervised=[sum(label != -100 for r in step for label in r["labels"]) for step in counts],
    )
    return 0


def packed_rows(steps: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """Packs as rows, and how many of them are a step."""
    rows = [
        {
            "input_ids": [i for ids, _ in pack for i in ids],
            "labels": [label for _, labels in pack for label in labels],
            "seq_lengths": [len(ids) for ids, _ in pack],
        }
        for packs in steps
        for pack in packs
    ]
    return rows, len(steps[0])


def single_rows(steps: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """Documents as rows in the packs' order, enough for all steps, and how many are a step."""
    documents = [document for packs in steps for pack in packs for document in pack]
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in documents]
    while len(rows) < ROWS_IN_A_BATCH * len(steps):
        rows += rows
    return rows, ROWS_IN_A_BATCH


if __name__ == "__main__":
    raise SystemExit(main())
