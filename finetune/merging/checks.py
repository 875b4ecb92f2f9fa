"""What can be wrong with a merge: all but the base's bytes is found before one is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetune import artifact
from finetune.adapters import ADAPTER_FILES
from finetune.errors import CannotContinue, CheckFailed
from finetune.identity import merged_adapters_of
from finetune.layer_merge import SHARED
from finetune.llama.safetensors_pieces import stored_tensors
from finetune.merging.members import member_findings
from finetune.merging.plan import EMBEDDING, HEAD, MergePlan
from finetune.merging.update import PREFIX
from finetune.skeleton import attached_skeleton

_SPARE_BYTES = 64 << 20  # config, tokenizer, manifest, and what the file system itself takes


def check(plan: MergePlan, target: Path | None) -> None:
    """Compares plan, adapter, base and disk; the base's bytes are for `check_base`.

    Args:
        target: the folder to write; None where nothing will be written.

    Raises:
        CheckFailed: base, adapter or tensors do not belong together; all findings.
        CannotContinue: nothing but the disk is wrong.
    """
    disk = _disk_findings(plan, target) if target else []
    findings = [*_base_findings(plan), *_tensor_findings(plan), *_tied_findings(plan)]
    findings = findings or [
        finding for adapter in plan.adapters for finding in _key_findings(plan, adapter)
    ]
    if findings:
        raise CheckFailed("\n".join([*disk, *findings]))
    if disk:
        raise CannotContinue("\n".join(disk))


def check_base(plan: MergePlan, hashes: dict[str, str]) -> None:
    """Compares what was read of the base with what the adapter was trained on.

    Args:
        hashes: sha256 of the base's weight files, by name.

    Raises:
        CheckFailed: they differ.
    """
    facts = artifact.read_manifest(plan.adapter)["facts"]
    if facts["base_fingerprint"] != plan.base.fingerprint(hashes):
        raise CheckFailed(
            f"{plan.adapter}: its base has changed since training, or changed while it was "
            "merged; nothing is published"
        )


def _disk_findings(plan: MergePlan, target: Path) -> list[str]:
    place = target.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return [f"{place}: no folder can be made in it; choose another --out"]
    free, needed = shutil.disk_usage(place).free, plan.num_bytes + _SPARE_BYTES
    if free < needed:
        return [f"{place}: {free:,} bytes are free, the merge needs {needed:,}"]
    return []


def _base_findings(plan: MergePlan) -> list[str]:
    merged = merged_adapters_of(plan.base.folder)
    if any(artifact.sha256_of(folder / ADAPTER_FILES[1]) in merged for folder in plan.adapters):
        return [f"{plan.base.folder}: this adapter is merged into it already; merging it again "
                "would apply it twice. Name the base it was trained on"]  # fmt: skip
    if plan.combination is not None:
        # Every member against the base of the run's own adapter, whose bytes are compared later.
        trained_on = artifact.read_manifest(plan.adapter)["facts"]["base_fingerprint"]
        return member_findings(plan.combination, plan.base.identity(trained_on))
    return []


def _tensor_findings(plan: MergePlan) -> list[str]:
    shapes = {tensor.stored.name: tensor.stored.shape for tensor in plan.tensors}
    findings = []
    for name, update in plan.updates.items():
        shape = shapes.get(name)
        if shape is None:
            findings.append(f"{name}: the adapter has an update for it, the base no such tensor")
        elif update.shape not in (None, shape):
            findings.append(f"{name}: the base has {shape}, B·A is {update.shape}")
    return findings


def _tied_findings(plan: MergePlan) -> list[str]:
    """A tied head and embedding are one matrix: an update of either would be one of both."""
    if not plan.is_tied:
        return []
    return [
        f"{name}: embedding and head are tied; an adapter on one of them merges into both"
        for name in (EMBEDDING, HEAD)
        if name in plan.updates
    ]


def _key_findings(plan: MergePlan, adapter: Path) -> list[str]:
    """An adapter's keys against those of PEFT's own layers on this architecture."""
    skeleton = attached_skeleton(plan.base, adapter)
    expected = {PREFIX + name: shape for name, shape in skeleton.adapter_shapes().items()}
    stored = stored_tensors(adapter / ADAPTER_FILES[1])
    found = {t.name: t.shape for t in stored if t.name not in SHARED}
    differing = sorted(set(expected) ^ set(found))
    if differing:
        shown = ", ".join(differing[:5]) + (" …" if len(differing) > 5 else "")
        return [f"{adapter}: {len(differing)} adapter keys missing or unexpected: {shown}"]
    return [
        f"{adapter}: {name} has shape {found[name]}, the base and adapter_config.json ask "
        f"for {shape}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
