"""`merge RUN`: the adapter into full weights, tensor by tensor, with a proof.

    plan -> check -> stream shard by shard -> prove against base + adapter -> publish

Every targeted matrix becomes W + s·B·A in float32, rounded once to the output type. Nothing
carries the final name before the proof has passed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune import artifact
from finetune.adapters import ADAPTER_FILES
from finetune.errors import CheckFailed, InputError
from finetune.llama.tokenizer import save_tokenizer
from finetune.model import (
    DTYPES,
    Base,
    find_base,
    weight_files,
    write_generation_config,
)
from finetune.proof import prove
from finetune.run_folder import RunFolder, find_run

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Update:
    """The low-rank update of one matrix: A (r, in), B (out, r), scale s."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """W + s·B·A in float32; `weight` is (out, in)."""
        return weight.float() + self.scale * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, checked before anything is written.

    Attributes:
        base: the base's folder.
        updates: tensor name in the base -> its update.
        trained_dtype: type the base was held in while the adapter was trained.
        dtype: type of the merged weights.
    """

    base: Base
    updates: dict[str, Update]
    trained_dtype: torch.dtype
    dtype: torch.dtype


def plan_merge(run: RunFolder, dtype: str | None) -> MergePlan:
    """Reads adapter and base and matches them, tensor by tensor.

    Raises:
        InputError: no adapter, or an unknown dtype.
        CheckFailed: damaged adapter, another base, or tensors that do not fit.
    """
    config = run.config()
    if not run.adapter.is_dir():
        why = (
            "trained its full weights; they are in model/"
            if run.model.is_dir()
            else "is not trained yet"
        )
        raise InputError(f"{run.path}: {why}; there is no adapter to merge")
    facts = artifact.verify(run.adapter)["facts"]
    base = find_base(config, run.path)
    if facts["base_fingerprint"] != base.fingerprint():
        raise CheckFailed(f"{run.adapter}: its base has changed since training; not merged")
    updates = read_updates(run.adapter)
    shapes = _base_shapes(base.folder)
    findings = [f for name, u in updates.items() if (f := _misfit(name, u, shapes.get(name)))]
    if findings:
        raise CheckFailed("\n".join(findings))
    trained_dtype = DTYPES[config.base.dtype]
    return MergePlan(base, updates, trained_dtype, DTYPES[dtype] if dtype else trained_dtype)


def read_updates(adapter: Path) -> dict[str, Update]:
    """The update of every targeted matrix of a PEFT LoRA folder, by the base's tensor name.

    Raises:
        CheckFailed: an A without its B, or a key that is neither.
    """
    settings = artifact.read_json(adapter / ADAPTER_FILES[0])
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings["use_rslora"] else rank)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(str(adapter / ADAPTER_FILES[1]), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            module, _, part = key.removeprefix(_PREFIX).rpartition(".lora_")
            pairs.setdefault(f"{module}.weight", {})[part] = file.get_tensor(key)
    broken = [name for name, pair in pairs.items() if set(pair) != {"A.weight", "B.weight"}]
    if broken or not pairs:
        raise CheckFailed(
            f"{adapter}: not pairs of lora_A and lora_B: {', '.join(broken) or 'empty'}"
        )
    return {n: Update(p["A.weight"], p["B.weight"], scale) for n, p in sorted(pairs.items())}


def _base_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                shapes[key] = tuple(file.get_slice(key).get_shape())
    return shapes


def _misfit(name: str, update: Update, shape: tuple[int, ...] | None) -> str | None:
    if shape is None:
        return f"{name}: the adapter has an update for it, the base has no such tensor"
    if shape != (update.b.shape[0], update.a.shape[1]):
        return f"{name}: the base has {shape}, B·A is {(update.b.shape[0], update.a.shape[1])}"
    return None


def merged_tensors(plan: MergePlan, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one base shard, merged where they are targeted, in the output type.

    The base is first rounded to the type it was trained on: that model is the one to reproduce.
    """
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name).to(plan.trained_dtype)
            update = plan.updates.get(name)
            yield name, (update.apply(tensor) if update else tensor).to(plan.dtype).contiguous()


def write_merged(plan: MergePlan, folder: Path) -> None:
    """Streams the base's shards into `folder` in the same layout, with config and tokenizer."""
    for path in weight_files(plan.base.folder):
        save_file(dict(merged_tensors(plan, path)), str(folder / path.name), {"format": "pt"})
    index = plan.base.folder / "model.safetensors.index.json"
    if index.is_file():
        _write_index(index, folder)
    settings = artifact.read_json(plan.base.folder / "config.json")
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(plan.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(plan.base.tokenizer, folder)
    write_generation_config(plan.base, folder)


def _write_index(index: Path, folder: Path) -> None:
    content = artifact.read_json(index)
    sizes = [(folder / name).stat().st_size for name in set(content["weight_map"].values())]
    content["metadata"] = {**content.get("metadata", {}), "total_size": sum(sizes)}
    (folder / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def merge(run: RunFolder, out: Path | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Merges a run's adapter and proves it.

    Args:
        out: where to; the run's `merged/` if None.
        dtype: of the merged weights; the base's if None.

    Returns:
        what merge.json says.

    Raises:
        CheckFailed: the proof failed; nothing is published.
    """
    target = out or run.merged
    plan = plan_merge(run, dtype)
    facts = {
        "kind": "merged",
        "base": plan.base.name,
        "adapter_sha256": artifact.sha256_of(run.adapter / ADAPTER_FILES[1]),
        "dtype": str(plan.dtype).removeprefix("torch."),
    }
    if target.exists():
        return _already_merged(run, plan, target, facts)
    with artifact.staged(target, facts) as stage:
        write_merged(plan, stage)
        result = _proven(run, plan, stage, facts)
    artifact.write_json(target.parent / "merge.json", result)
    return result


def _proven(run: RunFolder, plan: MergePlan, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts, "matrices": len(plan.updates), "proof": prove(run, plan.base, folder)}


def _already_merged(
    run: RunFolder, plan: MergePlan, target: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    if artifact.verify(target)["facts"] != facts:
        raise InputError(f"{target}: holds another merge; remove it or choose another --out")
    print(f"merge    {target} is merged from this adapter already, and verifies", file=sys.stderr)
    record = target.parent / "merge.json"
    result: dict[str, Any] = artifact.read_json(record) if record.exists() else {}
    if any(result.get(key) != value for key, value in facts.items()):
        # Of another merge beside this one, or lost with the process that merged: proven again.
        result = _proven(run, plan, target, facts)
        artifact.write_json(record, result)
    return result


def main(argv: Sequence[str]) -> int:
    """The verb `merge`."""
    parser = argparse.ArgumentParser(prog="python -m finetune merge", description=__doc__)
    parser.add_argument("run", nargs="?", help="a run folder; left out: the newest run")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/merged)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the base's)")
    parser.add_argument("--json", action="store_true", help="print merge.json to stdout")
    args = parser.parse_args(list(argv))
    run = find_run(args.run, need="adapter")
    result = merge(run, args.out, args.dtype)
    proof = result["proof"]
    print(
        f"merged   {args.out or run.merged}: {result['matrices']} matrices, {result['dtype']}; "
        f"logits differ by {proof['max_logit_difference']:.1e} at most, KL {proof['kl']:.1e}, "
        f"same greedy text on {proof['same_text']} of {proof['prompts']} prompts",
        file=sys.stderr,
    )
    if args.json:
        print(json.dumps(result, indent=2))
    return 0
