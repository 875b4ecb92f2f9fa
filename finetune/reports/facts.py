"""The files of a run folder as facts for a page. None of them has to be there."""

from __future__ import annotations

import fcntl
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.artifact import MANIFEST
from finetune.config import RunConfig
from finetune.errors import InputError
from finetune.reports.metrics import Training, read_training
from finetune.reports.reading import Problems, count, mapping, number, read_lines, read_object, text
from finetune.reports.results import Result, read_results
from finetune.run_folder import RunFolder
from finetune.sharing import shared, shared_text

_SECTION = re.compile(r"([a-z_]+):\s*")
_SETTING = re.compile(r"(?:  )?([a-z_0-9]+): (.*?) +# ([^#]*)")
_IDLE = re.compile(r"  # ([a-z_0-9]+) +# (no effect .*)")
_HIDDEN = "…"  # where a path of this machine was
_ORIGIN = re.compile(r"(.+):\d+")


@dataclass(frozen=True)
class Setting:
    """One line of the resolved config.

    Attributes:
        key: `section.key`.
        value: as YAML; None for a setting without effect here.
        origin: where the value comes from: `file:line`, override or default.
    """

    key: str
    value: str | None
    origin: str

    @property
    def is_default(self) -> bool:
        """Whether nobody chose it."""
        return self.value is None or self.origin.startswith("default")


@dataclass(frozen=True)
class State:
    """How far a run is, as run.json and the folder's lock say.

    Attributes:
        name: finished, running, interrupted, failed, killed (nobody wrote its end), not started.
        exit_code: of the process that ended.
        reason: why it ended.
        checkpoint: step of the newest checkpoint.
    """

    name: str
    exit_code: int | None = None
    reason: str | None = None
    checkpoint: int | None = None


@dataclass(frozen=True)
class Facts:
    """All that a run folder says; a part that is missing is empty.

    Attributes:
        name: of the run.
        state: how far it is.
        settings: the resolved config, line by line.
        config: the same as settings; None where this version cannot read it.
        training: the metrics.
        data: data.json.
        environment: environment.json.
        adapter: what the manifest of the trained adapter (or model) says.
        merge: merge.json.
        results: evaluations, the run's own held-out rows first.
        changes: settings that were changed on the way, with --allow-change.
        problems: files that could not be read.
    """

    name: str
    state: State
    settings: tuple[Setting, ...] = ()
    config: RunConfig | None = None
    training: Training = field(default_factory=Training)
    data: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[Result, ...] = ()
    changes: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()

    def value(self, key: str) -> str | None:
        """A setting's value as YAML; None where it is not known."""
        return next((s.value for s in self.settings if s.key == key), None)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, where the config or the epochs so far say it."""
        if self.config is None:
            return None
        if self.config.train.max_steps:
            return self.config.train.max_steps
        epoch, epochs = self.training.epoch, self.config.train.num_train_epochs
        return round(self.training.last_step / epoch * epochs) if epoch and epochs else None

    @property
    def has_heldout(self) -> bool | None:
        """Whether rows are held out; None where nothing says it."""
        counts = mapping(self.data.get("heldout"))
        if (rows := count(counts.get("rows_read"))) is not None:
            return rows > 0
        if self.config is None:
            return None
        return bool(self.config.data.heldout or self.config.data.heldout_fraction)

    @property
    def is_merge_stale(self) -> bool:
        """Whether merge.json is about another adapter than the run's."""
        ours, merged = text(self.adapter.get("sha256")), text(self.merge.get("adapter_sha256"))
        return None not in (ours, merged) and ours != merged

    def commands(self) -> list[str]:
        """What makes the run again, from its config or from its folder's own."""
        parent = self.value("run.dir") or "runs"
        folder = f"{'runs' if _HIDDEN in parent else parent}/{self.name}"
        lines = [f"train {self._config_again(folder)}"]
        if self.merge:
            lines.append(f"merge {folder}")
        if self.results:
            others = [m.name for m in self.results[0].models[1:] if m.name in ("base", "merged")]
            against = f" --against {','.join(others)}" if others else ""
            lines.append(f"eval {folder}{against}")
        lines = [f"python -m finetune {line}" for line in (*lines, f"report {folder}")]
        versions = mapping(self.environment.get("packages")).items()
        pinned = [f"{name}=={str(found).split('+')[0]}" for name, found in versions if found]
        return [shlex.join(["pip", "install", *pinned]), *lines] if pinned else lines

    def _config_again(self, folder: str) -> str:
        """The config and what was laid over it; the run's own copy where it came from several."""
        files = {found[1] for s in self.settings if (found := _ORIGIN.fullmatch(s.origin))}
        if len(files) != 1:
            return shlex.join([f"{folder}/config.yaml", f"run.name={self.name}-again"])
        chosen = [s for s in self.settings if s.origin == "override"]
        shown = [f"{s.key}={s.value}" for s in chosen if s.key != "run.dir"]
        return shlex.join([*files, *shown])


def read_facts(run: RunFolder) -> Facts:
    """Reads a run folder; what cannot be read is among the problems."""
    problems: Problems = []
    config = _config(run, problems)
    training = read_training(run.metrics, problems)
    merge = read_object(run.path / "merge.json", problems)
    merge = merge or read_object(run.merged / "merge.json", problems)
    return Facts(
        name=run.path.resolve().name,
        state=_state(run, problems),
        settings=tuple(_settings(run.config_file, problems)),
        config=config,
        training=training,
        data=shared(read_object(run.path / "data.json", problems)),
        environment=shared(read_object(run.path / "environment.json", problems)),
        adapter=_trained(run, problems),
        merge=shared(merge),
        results=tuple(read_results(run.eval, problems)),
        changes=tuple(shared(line) for line in read_lines(run.path / "changes.jsonl", problems)),
        problems=tuple(problems),
    )


def _config(run: RunFolder, problems: Problems) -> RunConfig | None:
    try:
        return run.config()
    except InputError as error:
        problems.append(shared_text(f"{run.config_file}: this version cannot read it: {error}"))
        return None


def _settings(path: Path, problems: Problems) -> Iterator[Setting]:
    """The lines of config.yaml, with the origin that stands in each one's comment."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        problems.append(shared_text(f"{path}: {(error.strerror or str(error)).lower()}"))
        return
    section = ""
    for line in lines:
        if found := _SECTION.fullmatch(line):
            section = f"{found[1]}."
        elif found := _IDLE.fullmatch(line):
            yield Setting(section + found[1], None, found[2])
        elif found := _SETTING.fullmatch(line):
            prefix = section if line.startswith("  ") else ""
            value, origin = shared_text(found[2]), shared_text(found[3].strip())
            yield Setting(prefix + found[1], value, origin)


def _state(run: RunFolder, problems: Problems) -> State:
    facts = read_object(run.state_file, problems)
    latest = read_object(run.checkpoints / "latest.json", problems)
    name = text(facts.get("state")) or "not started"
    if name == "running" and not _is_locked(run.path / "lock"):
        name = "killed"
    reason, code = text(facts.get("reason")), number(facts.get("exit_code"))
    return State(
        name,
        None if code is None else int(code),
        shared_text(reason) if reason else None,
        count(latest.get("step")),
    )


def _is_locked(path: Path) -> bool:
    """Whether a process holds the run; the lock ends with it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _trained(run: RunFolder, problems: Problems) -> Mapping[str, Any]:
    """The facts of the published adapter or model, and the hash of an adapter's weights."""
    for folder in (run.adapter, run.model):
        if folder.is_dir():
            manifest = read_object(folder / MANIFEST, problems)
            weights = mapping(mapping(manifest.get("files")).get("adapter_model.safetensors"))
            facts = {"kind": folder.name, "sha256": weights.get("sha256")}
            return {**shared(mapping(manifest.get("facts"))), **facts}
    return {}
