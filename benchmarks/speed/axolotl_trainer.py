"""axolotl 0.19.0: its own `train`, on our rows padded, or packed by itself (`sample_packing`).

python -m benchmarks.speed.axolotl_trainer --folder F --dtype float32 --steps 11 --result FILE

The rows reach it tokenized, in our packs' order; the adapter begins with our first numbers. Its
LoRA kernels need a GPU, and bfloat16 it refuses on a CPU, so this is float32 alone. It needs an
environment of its own.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.speed.recorder import Recorder, contender_parser
from benchmarks.speed.rows import ROWS_IN_A_BATCH, single_rows

END = 2  # </s>


def main() -> int:
    """Trains on the documents of `steps.json` in their order."""
    parser = contender_parser(__doc__)
    parser.add_argument("--packed", action="store_true")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(AXOLOTL_DO_NOT_TRACK="1", DO_NOT_TRACK="1")
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.train import train

    all_steps = json.loads((args.folder / "steps.json").read_text(encoding="utf-8"))
    rows, _ = single_rows(all_steps[: 2 * args.steps])
    tokens: list[int] = []
    supervised: list[int] = []
    compute_loss = AxolotlTrainer.compute_loss

    def counted(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        trained = inputs["labels"] != -100
        # the end of a turn fills up as well; ours are trained, those are not
        tokens.append(int(((inputs["input_ids"] != END) | trained).sum()))
        supervised.append(int(trained.sum()))
        return compute_loss(self, model, inputs, *rest, **more)

    AxolotlTrainer.compute_loss = counted
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "config.yaml"
        file.write_text(yaml.safe_dump(_config(args, Path(work), rows)), encoding="utf-8")
        recorder = Recorder(args.result)
        config = load_cfg(str(file))
        _, _, trainer = train(cfg=config, dataset_meta=load_datasets(cfg=config))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    recorder.write(losses=losses, tokens=tokens, supervised=supervised)
    return 0


def _config(args: Any, work: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    lines = [json.dumps({**row, "attention_mask": [1] * len(row["input_ids"])}) for row in rows]
    (work / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = json.loads((args.folder / "adapter" / "adapter_config.json").read_text("utf-8"))
    batch = {"micro_batch_size": ROWS_IN_A_BATCH, "sequence_len": 512, "sample_packing": False}
    if args.packed:
        batch |= {
            "micro_batch_size": 2,
            "sample_packing": True,
            "sample_packing_sequentially": True,
        }
    return {
        "base_model": str(args.folder / f"base-{args.dtype}"),
        "lora_model_dir": str(args.folder / "adapter"),
        "adapter": "lora",
        "lora_r": known["r"],
        "lora_alpha": known["lora_alpha"],
        "lora_dropout": 0.0,
        "lora_target_modules": sorted(known["target_modules"]),
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "datasets": [{"path": str(work / "rows.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(work / "prepared"),
        "dataset_num_proc": 1,
        "shuffle_merged_datasets": False,
        "val_set_size": 0,
        **batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "max_steps": args.steps,
        "num_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": str(work / "run"),
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "sdp_attention": True,
        "special_tokens": {"pad_token": "</s>"},
    }


if __name__ == "__main__":
    raise SystemExit(main())
