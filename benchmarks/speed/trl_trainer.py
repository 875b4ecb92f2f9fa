"""TRL's SFTTrainer: on our packs, or on padded rows as it is by default.

python -m benchmarks.speed.trl_trainer --folder FOLDER --dtype float32 --steps 11 --result FILE
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from benchmarks.speed.recorder import Recorder, contender_parser
from benchmarks.speed.rows import counts_of, packed_rows, single_rows


def main() -> int:
    """Trains on the packs of `steps.json` in their order."""
    parser = contender_parser(__doc__)
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--nf4", action="store_true", help="the base in 4 bits")
    parser.add_argument(
        "--cast-adapter", action="store_true", help="as TRL does over 4 bits: to bfloat16"
    )
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    recorder = Recorder(args.result)
    steps = json.loads((args.folder / "steps.json").read_text(encoding="utf-8"))[: args.steps]
    rows, batch = (single_rows if args.padded else packed_rows)(steps)
    base = args.folder / f"base-{args.dtype}"
    dtype = getattr(torch, args.dtype)
    in_4_bits = {}
    if args.nf4:
        in_4_bits["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **in_4_bits)
    model = PeftModel.from_pretrained(model, args.folder / "adapter", is_trainable=True)
    keeps_adapter = args.nf4 and not args.cast_adapter
    trained = [p for p in model.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in trained] if keeps_adapter else []
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
        if keeps_adapter:
            for parameter, numbers in zip(trained, first, strict=True):
                parameter.data = numbers
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    recorder.write(losses=losses, **counts_of(rows, batch, args.steps))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
