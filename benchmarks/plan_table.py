"""The tables of docs/scaling.md: what `plan` says of the documented sizes on named devices.

python -m benchmarks.plan_table
"""

from __future__ import annotations

from typing import Any

from finetune.config import RunConfig
from finetune.devices import DEVICES, GIB, Cluster
from finetune.plan import Plan, plan_of

SIZES = ("llama3.1-8b", "llama3.1-70b", "llama3.1-405b")
CLUSTERS = {
    "llama3.1-8b": (("rtx4090", 1, "ddp"), ("h100", 1, "ddp"), ("h100", 8, "fsdp")),
    "llama3.1-70b": (("h100", 1, "ddp"), ("h100", 8, "fsdp"), ("h200", 8, "fsdp")),
    "llama3.1-405b": (("h100", 8, "fsdp"), ("h100", 16, "fsdp"), ("h200", 8, "fsdp")),
}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA, bfloat16": {"base": {"quantization": "none"}, "adapter": {"method": "lora", "r": 16}},
    "QLoRA, nf4": {"base": {"quantization": "nf4"}, "adapter": {"method": "lora", "r": 16}},
    "all weights": {"base": {"quantization": "none"}, "adapter": {"method": "none"}},
}
LENGTHS = (2048, 8192)


def main() -> int:
    """Prints one table a size, in Markdown."""
    for size in SIZES:
        print(f"\n### {size}\n")
        print("| | device | tokens | weights | trained | activations | one device | fits | step |")
        print("|---|---|---:|---:|---:|---:|---:|---|---:|")
        for way, sections in WAYS.items():
            for name, count, sharding in CLUSTERS[size]:
                for length in LENGTHS:
                    plan = plan_of(
                        _config(size, sections, length), Cluster(DEVICES[name], count, sharding)
                    )
                    print(_row(way, plan, f"{count} x {name}" if count > 1 else name, length))
    return 0


def _config(size: str, sections: dict[str, Any], length: int) -> RunConfig:
    base = {"architecture": size, "tokenizer": "none", "dtype": "bfloat16", **sections["base"]}
    train = {"per_device_train_batch_size": 1, "activation_checkpointing": True}
    values = {"recipe": "sft", "base": base, "adapter": sections["adapter"], "train": train}
    return RunConfig.model_validate(
        {**values, "data": {"train": ["rows that are elsewhere"], "max_length": length}}
    )


def _row(way: str, plan: Plan, device: str, length: int) -> str:
    parts = plan.bytes_by_part
    trained = sum(parts[part] for part in ("adapter", "gradients", "optimizer"))
    weights = parts["base"] + parts.get("gathered", 0)
    sizes = (weights, trained, parts["activations"] + parts["logits"], plan.peak)
    cells = [way, device, f"{length:,}", *(f"{size / GIB:.1f}" for size in sizes)]
    return f"| {' | '.join([*cells, 'yes' if plan.fits else 'no', f'{plan.seconds:.2g} s'])} |"


if __name__ == "__main__":
    raise SystemExit(main())
