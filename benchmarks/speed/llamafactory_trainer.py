"""LLaMA-Factory 0.9.5: its own `run_exp`, on our rows padded, or on our packs (`neat_packing`).

python -m benchmarks.speed.llamafactory_trainer --folder F --dtype float32 --steps 11 --result FILE

The rows reach it tokenized, as its `tokenized_path` takes them; the adapter begins with our first
numbers. Recomputing, its default, is off. In bfloat16 its base is held so and products are
autocast: it refuses more on a CPU. It needs an environment of its own, with the CPU's torch:
torchaudio, which it imports without using it here, is left out, as that brings CUDA.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from benchmarks.speed.recorder import Recorder, contender_parser
from benchmarks.speed.rows import counts_of, packed_rows, single_rows


def main() -> int:
    """Trains on the packs of `steps.json` in their order."""
    parser = contender_parser(__doc__)
    parser.add_argument("--packed", action="store_true")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DISABLE_VERSION_CHECK="1")
    absent = types.ModuleType("torchaudio")
    absent.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = absent
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    steps = json.loads((args.folder / "steps.json").read_text(encoding="utf-8"))[: args.steps]
    rows, batch = (packed_rows if args.packed else single_rows)(steps)
    losses: list[float] = []

    class Losses(TrainerCallback):
        def on_log(
            self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any
        ) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as work:
        tokenized = Path(work) / "tokenized"
        train = Dataset.from_list([_as_it_has_them(row) for row in rows])
        DatasetDict({"train": train}).save_to_disk(tokenized)
        recorder = Recorder(args.result)
        run_exp(
            {
                "model_name_or_path": str(args.folder / f"base-{args.dtype}"),
                "adapter_name_or_path": str(args.folder / "adapter"),
                "stage": "sft",
                "do_train": True,
                "finetuning_type": "lora",
                "template": "llama2",
                "dataset": "named but not read",
                "tokenized_path": str(tokenized),
                "neat_packing": args.packed,
                "flash_attn": "sdpa",
                "disable_gradient_checkpointing": True,
                "disable_shuffling": True,
                "bf16": args.dtype == "bfloat16",
                "use_cpu": True,
                "output_dir": str(Path(work) / "run"),
                "per_device_train_batch_size": batch,
                "learning_rate": 1e-4,
                "lr_scheduler_type": "constant",
                "max_steps": args.steps,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
            },
            callbacks=[Losses()],
        )
    recorder.write(losses=losses, **counts_of(rows, batch, args.steps))
    return 0


def _as_it_has_them(row: dict[str, Any]) -> dict[str, Any]:
    """Its attention mask counts the documents of a pack."""
    lengths = row.get("seq_lengths", [len(row["input_ids"])])
    mask = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    return {"input_ids": row["input_ids"], "labels": row["labels"], "attention_mask": mask}


if __name__ == "__main__":
    raise SystemExit(main())
