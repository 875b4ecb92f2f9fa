"""Everything that can be wrong with a merge, found before a byte is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetune import artifact
from finetune.adapters import ADAPTER_FILES, fingerprint_of_files
from finetune.errors import CannotContinue, CheckFailed
from finetune.identity import merged_adapters_of
from finetune.layer_merge import SHARED
from finetune.llama.safetensors_pieces import stored_tensors
from finetune.merging.members import member_findings
from finetune.merging.plan import EMBEDDING, HEAD, MergePlan
from finetune.merging.update import PREFIX
from finetune.skeleton import attached_skeleton

_SPARE_BYTES = 64 << 20  # config, tokenizer, manifest, and what the file system itself takes


def check(plan: MergePlan, target: Path) -> dict[str, str]:
    """Compares plan, adapter, base and disk.

    Args:
        target: the folder to write.

    Returns:
        sha256 of the base's weight files, by name.

    Raises:
        CheckFailed: base, adapter or tensors do not belong together; all findings.
        CannotContinue: nothing but the disk is wrong.
    """
    disk = _disk_findings(plan, target)
    hashes = fingerprint_of_files(list(plan.files))
    findings = [*_base_findings(plan, hashes), *_tensor_findings(plan), *_tied_findings(plan)]
    findings = findings or [
        finding for adapter in plan.adapters for finding in _key_findings(plan, adapter)
    ]
    if findings:
        raise CheckFailed("\n".join([*disk, *findings]))
    if disk:
        raise CannotContinue("\n".join(disk))
    return hashes


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


def _base_findings(plan: MergePlan, hashes: dict[str, str]) -> list[str]:
    merged = merged_adapters_of(plan.base.folder)
    if any(artifact.sha256_of(folder / ADAPTER_FILES[1]) in merged for folder in plan.adapters):
        return [f"{plan.base.folder}: this adapter is merged into it already; merging it again "
                "would apply it twice. Name the base it was trained on"]  # fmt: skip
    if plan.combination is not None:
        return member_findings(plan.combination, plan.base.identity(plan.base.fingerprint(hashes)))
    facts = artifact.read_manifest(plan.adapter)["facts"]
    if facts["base_fingerprint"] != plan.base.fingerprint(hashes):
        return [f"{plan.adapter}: its base has changed since training; not merged"]
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
