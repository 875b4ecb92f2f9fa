"""`merge RUN`: the adapter into full weights, tensor by tensor, with a proof.

    plan -> check -> stream shard by shard -> prove against base + adapter -> publish

Every targeted matrix becomes W + s·B·A in float32, rounded once to the output type. Nothing
carries the final name before the proof has passed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import artifact
from finetune.adapters import ADAPTER_FILES, fingerprint_of_files
from finetune.errors import InputError
from finetune.identity import merged_adapters_of
from finetune.merging.checks import check, check_base
from finetune.merging.combine import combined_updates
from finetune.merging.members import WAYS, Combination, asked_for, read_members
from finetune.merging.plan import TARGETS, MergePlan, planned_files
from finetune.merging.update import Update, read_updates
from finetune.merging.writing import write_merged
from finetune.methods import why_not_merged
from finetune.model import DTYPES, find_base
from finetune.proof import prove
from finetune.run_folder import RunFolder, find_run, locked


def plan_merge(
    run: RunFolder,
    dtype: str | None = None,
    target: str | None = None,
    combination: Combination | None = None,
) -> MergePlan:
    """Reads adapter and base and matches them, tensor by tensor.

    Args:
        dtype: of the merged weights; the base's if None.
        target: `full` or `dequantized`; if None, the weights the run was trained on.
        combination: of the run's adapter and others; None for the run's alone.

    Raises:
        InputError: no adapter, a method that is not merged, a target without effect, or adapters
            that are not combined.
        CheckFailed: damaged adapter, or one that is not merged.
    """
    config = run.config()
    if not run.adapter.is_dir():
        why = (
            "trained its full weights; they are in model/"
            if run.model.is_dir()
            else "is not trained yet"
        )
        raise InputError(f"{run.path}: {why}; there is no adapter to merge")
    if reason := why_not_merged(config.adapter):
        raise InputError(f"{run.path}: {reason}")
    quantization = config.base.quantization
    if target == "dequantized" and quantization == "none":
        raise InputError("--base dequantized: the run's base is not quantised")
    artifact.verify(run.adapter)
    base = find_base(config, run.path)
    updates = _updates(run, combination, target)
    merged_dtype = dtype or config.base.dtype
    return MergePlan(
        base=base,
        adapter=run.adapter,
        updates=updates,
        trained_dtype=config.base.dtype,
        dtype=merged_dtype,
        quantization=quantization,
        target=target or ("full" if quantization == "none" else "dequantized"),
        files=planned_files(base, updates, merged_dtype),
        combination=combination,
    )


def _updates(
    run: RunFolder, combination: Combination | None, target: str | None
) -> dict[str, Update]:
    if combination is None:
        return read_updates(run.adapter)
    return combined_updates(combination, read_members(combination, target))


def merge(
    run: RunFolder,
    out: Path | None = None,
    dtype: str | None = None,
    target: str | None = None,
    combination: Combination | None = None,
) -> dict[str, Any]:
    """Merges a run's adapter, alone or with others, and proves it.

    Args:
        out: where to; the run's `merged/` if None.
        dtype: of the merged weights; the base's if None.
        target: of a quantised run: `full` or `dequantized` base weights.
        combination: of the run's adapter and others; None for the run's alone.

    Returns:
        what merge.json says.

    Raises:
        CheckFailed: a check or the proof failed; nothing is published.
    """
    folder, plan = out or run.merged, plan_merge(run, dtype, target, combination)
    if folder.exists():
        return _already_merged(run, plan, folder, _facts(plan))
    with locked(run):
        _sweep(folder)
        return _merge(run, plan, folder)


def _merge(run: RunFolder, plan: MergePlan, folder: Path) -> dict[str, Any]:
    _say("\n".join(plan.lines()))
    begun, facts = time.monotonic(), _facts(plan)
    written: dict[str, str] = {}
    check(plan, folder)
    with artifact.staged(folder, facts, written) as stage:
        written |= write_merged(plan, stage)
        seconds = round(time.monotonic() - begun, 2)
        result = {**_proven(run, plan, stage, facts), "seconds": seconds}
    artifact.write_json(folder.parent / "merge.json", result)
    return result


def _sweep(folder: Path) -> None:
    """Removes what killed merges to this folder left: each may be as large as the model."""
    for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(stale)


def _facts(plan: MergePlan) -> dict[str, Any]:
    adapters = [artifact.sha256_of(folder / ADAPTER_FILES[1]) for folder in plan.adapters]
    return {
        "kind": "merged",
        "base": plan.base.name,
        "base_weights": plan.target,
        "adapter_sha256": adapters[0],
        "merged_adapters": [*merged_adapters_of(plan.base.folder), *adapters],
        **(plan.combination.facts() if plan.combination else {}),
        "dtype": plan.dtype,
        "tied": plan.is_tied,
    }


def _proven(run: RunFolder, plan: MergePlan, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    proof = prove(run, plan.base, folder, plan.target, plan.combination)
    return {**facts, "matrices": len(plan.updates), "proof": proof}


def _already_merged(
    run: RunFolder, plan: MergePlan, folder: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    if artifact.verify(folder)["facts"] != facts:
        raise InputError(f"{folder}: holds another merge; remove it or choose another --out")
    _say(f"merge    {folder} is merged from this adapter already, and verifies")
    record = folder.parent / "merge.json"
    result: dict[str, Any] = artifact.read_json(record) if record.exists() else {}
    if any(result.get(key) != value for key, value in facts.items()):
        # Of another merge beside this one, or lost with the process that merged: proven again.
        with locked(run):
            check(plan, None)
            check_base(plan, fingerprint_of_files(list(plan.files)))
            result = _proven(run, plan, folder, facts)
            artifact.write_json(record, result)
    return result


def main(argv: Sequence[str]) -> int:
    """The verb `merge`."""
    args = _parse(argv)
    run = find_run(args.run, need="adapter")
    how = (args.combine, args.density, args.seed)
    combination = asked_for(run, args.add, args.weight, *how)
    if args.plan:
        return _show_plan(run, args, combination)
    result = merge(run, args.out, args.dtype, args.base, combination)
    _say(f"merged   {args.out or run.merged}: {_sentence(result)}")
    if args.json:
        print(json.dumps(result, indent=2))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m finetune merge", description=__doc__)
    parser.add_argument("run", nargs="?", help="a run folder; left out: the newest run")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/merged)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the base's)")
    parser.add_argument(
        "--base",
        choices=TARGETS,
        help="of a quantised run (default: dequantized, the weights it was trained on)",
    )
    parser.add_argument("--plan", action="store_true", help="plan and check, write nothing")
    parser.add_argument("--json", action="store_true", help="print merge.json (or the plan)")
    _add_combining(parser.add_argument_group("several adapters at once"))
    return parser.parse_args(list(argv))


def _add_combining(group: Any) -> None:
    group.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="PATH:WEIGHT",
        help="another run or adapter folder of the same base, and its weight; may be repeated",
    )
    group.add_argument("--weight", type=float, help="of the run's own adapter (default: 1)")
    group.add_argument(
        "--combine",
        choices=WAYS,
        help="cat (default): the weighted sum of the updates; linear: A and B summed apart, which "
        "adds products of one adapter's B and another's A; ties, dare_linear, dare_ties: the same "
        "after pruning A and B. Details: docs/recipes.md",
    )
    group.add_argument(
        "--density", type=float, help="share of A and B that ties and dare keep, above 0 to 1"
    )
    group.add_argument("--seed", type=int, help="of what dare drops (default: 0)")


def _show_plan(
    run: RunFolder, args: argparse.Namespace, combination: Combination | None = None
) -> int:
    plan = plan_merge(run, args.dtype, args.base, combination)
    _say("\n".join(plan.lines()))
    check(plan, args.out or run.merged)
    check_base(plan, fingerprint_of_files(list(plan.files)))
    if args.json:
        print(json.dumps(plan.as_json(), indent=2))
    return 0


def _sentence(result: dict[str, Any]) -> str:
    proof = result["proof"]
    text = (
        f"same greedy text on {proof['same_text']} of {proof['prompts']} prompts"
        + (f" ({proof['ties']} part where two tokens are level)" if proof["ties"] else "")
        if proof["prompts"]
        else f"same next token at {proof['same_next_token']} of {proof['tokens']} places"
    )
    differ = f"logits differ by {proof['max_logit_difference']:.1e} at most, KL {proof['kl']:.1e}"
    return f"{result['matrices']} matrices, {result['dtype']}; {differ}, {text}"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
