"""A finished run of any documented shape with random weights, made on disk without loading it.

    python -m benchmarks.random_run FOLDER --preset llama3.1-8b --shards 4

FOLDER/base is a Hugging Face folder (bfloat16, a synthetic tokenizer of the right size), FOLDER/run
a run folder whose adapter is a LoRA on all seven projections with random A and B. The numbers
depend on nothing but names and shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.random_checkpoint import NUM_SPECIAL, shape_of, tiktoken_ranks
from finetune import artifact
from finetune.llama.architecture import PRESETS, Architecture, to_llama_config
from finetune.llama.safetensors_stream import Planned, write_model

if TYPE_CHECKING:
    from torch import Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, NUM_ROWS = 16, 32, 5
_STD = 0.02


def make_run(folder: Path, arch: Architecture, num_shards: int) -> None:
    """Writes base and run; the folder's name appears when all of it is there."""
    stage = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(stage, ignore_errors=True)
    (stage / "run").mkdir(parents=True)
    shapes = _shapes(arch)
    _write_base(stage / "base", arch, shapes, num_shards)
    os.rename(stage, folder)
    _write_run(folder, shapes)


def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight of the architecture, by its name in a Hugging Face folder."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(to_llama_config(arch))
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _write_base(
    folder: Path, arch: Architecture, shapes: dict[str, tuple[int, ...]], num_shards: int
) -> None:
    folder.mkdir()
    plan = [Planned(name, "bfloat16", shape) for name, shape in shapes.items()]
    total, largest = sum(t.num_bytes for t in plan), max(t.num_bytes for t in plan)

    def make(name: str) -> Tensor:
        import torch

        return random_tensor(name, shapes[name]).to(torch.bfloat16)

    size = max(total // num_shards, largest) if num_shards > 1 else total
    write_model(folder, plan, lambda: make, size)
    config = to_llama_config(arch, "bfloat16").to_json_string(use_diff=False)
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(tiktoken_ranks(arch.vocab_size - NUM_SPECIAL))


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Seeded normal numbers, float32; a norm's are about 1."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape).normal_(std=_STD, generator=generator)
    return tensor.add_(1.0) if tensor.dim() == 1 else tensor


def _write_run(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    from finetune.config.loader import dump, load
    from finetune.model import find_base

    run, rows = folder / "run", folder / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in _rows()), encoding="utf-8")
    config = {
        "recipe": "pretrain",
        "run": {"name": "run", "dir": str(folder)},
        "base": {"path": str(folder / "base")},
        "adapter": {"r": RANK, "lora_alpha": ALPHA},
        "data": {"train": str(rows)},
    }
    config_file = folder / "config.yaml"
    config_file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    loaded = load(config_file)
    (run / "config.yaml").write_text(dump(loaded), encoding="utf-8")
    base = find_base(loaded.config, run)
    facts = {"kind": "adapter", "base": base.name, "base_fingerprint": base.fingerprint()}
    with artifact.staged(run / "adapter", facts) as stage:
        _write_adapter(stage, base.name, shapes)


def _rows() -> Iterator[dict[str, str]]:
    return ({"text": "abcdefghij klmnopqrst uvwxyz " * (1 + n)} for n in range(NUM_ROWS))


def _write_adapter(folder: Path, base_name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    ).save_pretrained(str(folder))
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.endswith(PROJECTIONS):
            for part, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
                key = f"base_model.model.{module}.lora_{part}.weight"
                tensors[key] = random_tensor(key, size)
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama3.1-8b")
    parser.add_argument("--shards", type=int, default=4, help="at least so many files")
    parser.add_argument("--small", action="store_true", help="its tiny relative")
    args = parser.parse_args()
    make_run(args.folder.resolve(), shape_of(args.preset, args.small), args.shards)


if __name__ == "__main__":
    main()
