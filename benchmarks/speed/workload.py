"""The workload every contender gets: a random base, real rows as our own data path renders them,
and the packs of each step in order.

FOLDER/base-float32, base-bfloat16   Hugging Face folders with one tokenizer
FOLDER/rows.jsonl                    messages
FOLDER/steps.json                    per step: packs; per pack: [ids, labels] of each document
FOLDER/adapter/                      LoRA at step 0, in PEFT's format, for all contenders
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FINETUNE_SHARED", ROOT.parent / "shared"))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """A base and how it is trained.

    Attributes:
        architecture: the config's `base.architecture`; a preset's name has its published size, is
            written piece by piece in bfloat16, and has a synthetic tokenizer.
        max_length: tokens of a pack.
        packs: in a step.
        num_rows: of the data file.
        r: rank of the adapter, on all seven projections; alpha is twice that.
        system: a system message before every row.
    """

    architecture: dict[str, Any] | str
    max_length: int
    packs: int
    num_rows: int
    r: int = 16
    system: str | None = None


_SYSTEM = (
    "You are a careful assistant. Answer in the language of the question, briefly, to the point. "
    "If the question rests on a mistake, say so first. If you do not know the answer, say that you "
    "do not know it, and do not make one up."
)
_58M = {"preset": "llama2-7b", "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8}
SIZES = {
    "tiny": Size({**_58M, "dim": 64, "n_layers": 2, "intermediate_size": 176}, 128, 2, 64, 4),
    "58m": Size({**_58M, "intermediate_size": 1376}, 512, 2, 256),
    "58m-system": Size({**_58M, "intermediate_size": 1376}, 512, 2, 256, system=_SYSTEM),
    # One GPU of 80 GB: benchmarks/README.md has the whole command
    "8b": Size("llama3.1-8b", 4096, 1, 900),
    "8b-2048": Size("llama3.1-8b", 2048, 2, 900),
}


def make(folder: Path, size: Size) -> None:
    """Writes what is not there yet.

    Raises:
        SystemExit: the folder holds another size.
    """
    mark, name = folder / "size.json", json.dumps(dataclasses.asdict(size))
    if mark.exists() and mark.read_text(encoding="utf-8") != name:
        raise SystemExit(f"{folder}: holds a workload of another size; choose another --folder")
    if (folder / "steps.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(name, encoding="utf-8")
    if isinstance(size.architecture, str):
        _write_large_base(folder, size)
    else:
        _write_bases(folder, size)
    tokenizer = _tokenizer_of(folder)
    _write_rows(folder / "rows.jsonl", size, tokenizer)
    _write_steps(folder, size, tokenizer)


def config_of(folder: Path, size: Size, dtype: str, name: str, **train: Any) -> dict[str, Any]:
    """The config of our own run on the workload."""
    return {
        "recipe": "sft",
        "run": {"name": name, "dir": str(folder / "runs"), "seed": 0, "resume": "never"},
        "base": {"path": str(folder / f"base-{dtype}"), "dtype": dtype},
        "adapter": {
            "method": "lora",
            "r": size.r,
            "lora_alpha": 2 * size.r,
            "target_modules": TARGETS,
        },
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "chat_format": _format_of(size),
            "max_length": size.max_length,
            "packing": True,
        },
        "train": {
            "per_device_train_batch_size": size.packs,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "bf16": False,
            "logging_steps": 1,
            "save_steps": 100_000,
            **train,
        },
    }


def _format_of(size: Size) -> str:
    return "llama3" if isinstance(size.architecture, str) else "llama2"


def _write_rows(path: Path, size: Size, tokenizer: Any) -> None:
    """The first rows of the instructions that take half a pack at most."""
    rows = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    lines: list[str] = []
    for row in rows:
        question = f"{row['instruction']}\n\n{row['input']}".strip()
        if not row["output"].strip() or len(lines) == size.num_rows:
            continue
        if len(tokenizer(question + row["output"])["input_ids"]) > size.max_length // 2:
            continue
        turns = [("system", size.system)] if size.system else []
        turns += [("user", question), ("assistant", row["output"])]
        messages = [{"role": role, "content": text} for role, text in turns]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tokenizer() -> Any:
    from finetune.llama.tokenizer import load_tokenizer

    return load_tokenizer(SHARED / "tokenizers" / "llama2" / "tokenizer.model")


def _tokenizer_of(folder: Path) -> Any:
    from finetune.llama.tokenizer import load_tokenizer

    return load_tokenizer(folder / "base-bfloat16")


def _write_large_base(folder: Path, size: Size) -> None:
    """Random bfloat16 weights of a documented size, and an adapter with B at zero."""
    from safetensors.torch import load_file, save_file

    from benchmarks.random_run import RANK, make_run
    from finetune.llama.architecture import PRESETS

    assert isinstance(size.architecture, str)
    assert size.r == RANK
    made, adapter = folder / "random", folder / "adapter"
    if not made.exists():
        make_run(made, PRESETS[size.architecture], 4)
        (folder / "base-bfloat16").symlink_to(made / "base")
    shutil.copytree(made / "run" / "adapter", adapter, dirs_exist_ok=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    begun = {name: t.zero_() if "lora_B" in name else t for name, t in weights.items()}
    save_file(begun, adapter / "adapter_model.safetensors", {"format": "pt"})


def _write_bases(folder: Path, size: Size) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, set_seed

    from finetune.llama.architecture import architecture_of, to_llama_config
    from finetune.llama.tokenizer import save_tokenizer

    set_seed(0)
    model = LlamaForCausalLM(to_llama_config(architecture_of(size.architecture)))
    for dtype in ("float32", "bfloat16"):
        base = folder / f"base-{dtype}"
        model.to(getattr(torch, dtype)).save_pretrained(base)
        save_tokenizer(_tokenizer(), base)
        model.float()
    set_seed(0)  # as `train` does: its own adapter begins with the same numbers
    adapter = LoraConfig(
        r=size.r, lora_alpha=2 * size.r, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    get_peft_model(model, adapter).save_pretrained(folder / "adapter")


def _write_steps(folder: Path, size: Size, tokenizer: Any) -> None:
    """The order of our own loader, written down for the others."""
    from finetune.batching import plan_batches
    from finetune.config.loader import load
    from finetune.data import load_data
    from finetune.llama.chat import FORMATS

    file = folder / "workload.yaml"
    file.write_text(yaml.safe_dump(config_of(folder, size, "bfloat16", "workload")))
    config = load(file).config
    data = load_data(config, tokenizer, FORMATS[_format_of(size)])
    plan = plan_batches(config, data, 1)
    steps = []
    for epoch in range(4):
        for packs in plan.micro_batches(config.run.seed, epoch, 0):
            steps.append([[_labelled(*data.train.pair(i)) for i in pack] for pack in packs])
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")


def _labelled(ids: Any, mask: Any) -> list[list[int]]:
    from finetune.fast.loss import pack

    row = pack([(ids, mask)])
    return [row.input_ids[0].tolist(), row.labels[0].tolist()]
