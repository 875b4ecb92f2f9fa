"""The adapters of one merge and their weights: what is asked for, and what cannot be combined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune import artifact
from finetune.errors import CheckFailed, InputError
from finetune.identity import ADAPTER_FILES, BaseIdentity, verified_facts
from finetune.merging.update import LowRank, read_updates
from finetune.run_folder import RunFolder

WAYS = ("cat", "linear", "ties", "dare_linear", "dare_ties")
RANDOM = ("dare_linear", "dare_ties")
PRUNED = ("ties", *RANDOM)


@dataclass(frozen=True)
class Member:
    """An adapter and its weight.

    Attributes:
        name: the run's, or the adapter folder's; never a path.
        folder: the adapter's.
        weight: what its update is multiplied by; may be negative, never 0.
        quantization: of the base it was trained on; None where no run says it.
    """

    name: str
    folder: Path
    weight: float
    quantization: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Of its weights."""
        return artifact.sha256_of(self.folder / ADAPTER_FILES[1])

    def as_json(self) -> dict[str, Any]:
        """A line of merge.json."""
        return {"name": self.name, "sha256": self.sha256, "weight": self.weight}


@dataclass(frozen=True)
class Combination:
    """Adapters, the run's own first, and how they become one.

    Attributes:
        members: the adapters.
        how: one of WAYS.
        density: share of entries that is kept, above 0 to 1; None where nothing is pruned.
        seed: of the entries that are dropped; None where nothing is random.
    """

    members: tuple[Member, ...]
    how: str = "cat"
    density: float | None = None
    seed: int | None = None

    def facts(self) -> dict[str, Any]:
        """What manifest and merge.json say of it."""
        settings = {"combination": self.how, "density": self.density, "seed": self.seed}
        return {"adapters": [member.as_json() for member in self.members], **settings}

    def lines(self) -> list[str]:
        """For the terminal."""
        listed = ", ".join(f"{member.weight:g} x {member.name}" for member in self.members)
        settings = {"density": self.density, "seed": self.seed}
        said = "".join(f", {key} {value}" for key, value in settings.items() if value is not None)
        return [f"         {self.how} of {listed}{said}"]


def asked_for(
    run: RunFolder,
    added: Sequence[str],
    weight: float | None = None,
    how: str | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Combination | None:
    """The combination that a command line asks for; None where it asks for the run's adapter alone.

    Args:
        added: `PATH:WEIGHT` of runs or adapter folders.
        weight: of the run's own adapter; 1 if None.

    Raises:
        InputError: weights, density or seed that cannot be; all findings.
    """
    if not added and weight is None:
        given = {"--combine": how, "--density": density, "--seed": seed}
        if idle := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{', '.join(idle)}: has no effect without --add OTHER:WEIGHT")
        return None
    how = how or "cat"
    findings = [*_weight_findings("--weight", weight), *_setting_findings(how, density, seed)]
    own = Member(run.path.name, run.adapter, 1.0 if weight is None else weight)
    members = [replace(own, quantization=run.config().base.quantization)]
    for text in added:
        try:
            members.append(_member(text))
        except InputError as error:
            findings += error.findings
    if findings := findings or _twice(members):
        raise InputError(findings)
    return Combination(tuple(members), how, density, (seed or 0) if how in RANDOM else None)


def _setting_findings(how: str, density: float | None, seed: int | None) -> list[str]:
    findings = []
    if how in PRUNED and (density is None or not 0 < density <= 1):
        found = "none given" if density is None else f"found {density:g}"
        findings.append(
            f"--density: {found}; --combine {how} needs the share of each A and B that is kept, "
            "above 0 and at most 1 (0.2 in the paper of TIES, 0.1 to 0.5 in that of DARE)"
        )
    if how not in PRUNED and density is not None:
        findings.append(f"--density: has no effect on --combine {how}, which prunes nothing")
    if how not in RANDOM and seed is not None:
        findings.append(f"--seed: has no effect on --combine {how}, which draws nothing")
    return findings


def _member(text: str) -> Member:
    path, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not path or _weight_findings("", weight):
        raise InputError(
            f"--add {text}: expected PATH:WEIGHT, a run or an adapter folder and a number "
            "other than 0, such as runs/other:0.5"
        )
    return _member_at(Path(path), weight)


def _member_at(path: Path, weight: float) -> Member:
    run = RunFolder(path if (path / "config.yaml").is_file() else path.resolve().parent)
    is_of_run = run.config_file.is_file() and path.resolve() in (
        run.path.resolve(),
        run.adapter.resolve(),
    )
    folder = run.adapter if is_of_run else path
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"--add {path}: has no {', '.join(missing)}; name a trained run or an "
                         "adapter folder")  # fmt: skip
    if not (folder / artifact.MANIFEST).is_file():
        raise CheckFailed(f"--add {path}: has no {artifact.MANIFEST}, so nothing says which base "
                          "it was trained on; name an adapter that `train` wrote")  # fmt: skip
    if not is_of_run:
        return Member(folder.resolve().name, folder, weight)
    quantization = run.config().base.quantization
    return Member(run.path.resolve().name, folder, weight, quantization)


def _weight_findings(where: str, weight: float | None) -> list[str]:
    if weight is None or (math.isfinite(weight) and weight != 0):
        return []
    return [f"{where}: found {weight:g}, allowed is any number but 0 (leave the adapter out)"]


def _twice(members: Sequence[Member]) -> list[str]:
    seen: dict[str, Member] = {}
    findings = []
    for member in members:
        first = seen.setdefault(member.sha256, member)
        if first is not member:
            findings.append(
                f"--add {member.folder}: is the same adapter as {first.folder}; give it once, with "
                "the weight you want it to have"
            )
    return findings


def read_members(combination: Combination, target: str | None) -> list[dict[str, LowRank]]:
    """The updates of each adapter, in order.

    Args:
        target: `--base` as it was given.

    Raises:
        InputError: an adapter whose updates cannot be added, or ranks that differ.
        CheckFailed: an adapter that is not as it was published.
    """
    for member in combination.members:
        verified_facts(member.folder, None)
    found = [read_updates(member.folder) for member in combination.members]
    findings = _storage_findings(combination, target)
    for member, updates in zip(combination.members, found, strict=True):
        if not all(isinstance(update, LowRank) for update in updates.values()):
            findings.append(f"{member.folder}: {_why_not_added(member.folder)}")
    low_rank = [{n: u for n, u in of.items() if isinstance(u, LowRank)} for of in found]
    if combination.how != "cat":
        findings += _rank_findings(combination, low_rank)
    if findings:
        raise InputError(findings)
    return low_rank


def _why_not_added(folder: Path) -> str:
    settings = artifact.read_json(folder / ADAPTER_FILES[0])
    if settings.get("use_dora"):
        why = "DoRA divides the rows by norms that depend on its own W + s·B·A"
    else:
        why = f"{settings.get('peft_type')} as it is set is no product of two matrices"
    return f"{why}, so its update is not added to another; merge it alone"


def _storage_findings(combination: Combination, target: str | None) -> list[str]:
    """An adapter has learnt to correct the base it saw: codes of one kind, or the numbers."""
    first, *others = combination.members
    return [
        f"{other.folder}: was trained on quantization {other.quantization}, {first.name} on "
        f"{first.quantization}; --base full merges them into the weights on disk"
        for other in others
        if target != "full" and other.quantization not in (None, first.quantization)
    ]


def _rank_findings(
    combination: Combination, of_members: Sequence[Mapping[str, LowRank]]
) -> list[str]:
    """A sum of matrices A asks for equal ranks."""
    ranks: dict[str, list[tuple[int, str]]] = {}
    for member, updates in zip(combination.members, of_members, strict=True):
        for name, update in updates.items():
            ranks.setdefault(name, []).append((update.stored_a.shape[0], member.name))
    uneven = {name: of for name, of in ranks.items() if len({rank for rank, _ in of}) > 1}
    if not uneven:
        return []
    name, of = next(iter(uneven.items()))
    listed = ", ".join(f"{rank} in {member}" for rank, member in of)
    return [
        f"--combine {combination.how}: needs equal ranks; {name} has rank {listed} "
        f"({len(uneven)} such matrices); --combine cat takes any"
    ]


def member_findings(combination: Combination, base: BaseIdentity) -> list[str]:
    """What differs between a base and those that the adapters were trained on."""
    findings = []
    for member in combination.members:
        own = artifact.read_manifest(member.folder)["facts"].get("chat_format_sha256")
        # Plain text has no prompt format that could be another one.
        style = base.chat_format_sha256 if own and base.chat_format_sha256 else own
        try:
            verified_facts(member.folder, replace(base, chat_format_sha256=style))
        except CheckFailed as error:
            findings.append(str(error))
    return findings
