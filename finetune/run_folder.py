"""`runs/<name>/`: the one folder that train writes and every later verb reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.artifact import make_folder, read_json, remove, sweep, write_json, write_text
from finetune.config import RunConfig
from finetune.config.base import is_commit
from finetune.config.loader import Loaded, dump, read_run_config
from finetune.drift import Change, changes_between, free_settings, refused, remember
from finetune.errors import InputError

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "safetensors")
_PRIVATE = 0o700  # rows of the data stand in what a run writes; whoever shares it says so by chmod


@dataclass(frozen=True)
class RunFolder:
    """Names and files of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved config, with the origin of every value."""
        return self.path / "config.yaml"

    @property
    def state_file(self) -> Path:
        """run.json: state, exit code, reason."""
        return self.path / "run.json"

    @property
    def environment_file(self) -> Path:
        """environment.json: versions, machine, and the base as it was found."""
        return self.path / "environment.json"

    @property
    def data_file(self) -> Path:
        """data.json: files, hashes and ledger of the rows."""
        return self.path / "data.json"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Full weights, only after full-weight training."""
        return self.path / "model"

    @property
    def start(self) -> Path:
        """What an initialisation took from the base (`adapter.init`), for resume and publishing."""
        return self.path / "start"

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.path / "merged"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """A line for every step."""
        return self.path / "metrics.jsonl"

    @property
    def fit_file(self) -> Path:
        """What `train.fit: auto` chose."""
        return self.path / "fit.json"

    @property
    def witness(self) -> Path:
        """What the trained model said at a few tokens, for what is loaded later."""
        return self.path / "witness.safetensors"

    @property
    def eval(self) -> Path:
        """Results of evaluations."""
        return self.path / "eval"

    def config(self) -> RunConfig:
        """The run's resolved config."""
        return read_run_config(self.path)

    def state(self) -> dict[str, Any]:
        """run.json, or nothing for a run that never started.

        Raises:
            InputError: it is not what `write_state` wrote.
        """
        state = read_json(self.state_file) if self.state_file.exists() else {}
        if not isinstance(state, dict):
            raise InputError(f"{self.state_file}: holds {type(state).__name__}, no JSON object")
        return state

    def recorded_commit(self, hub_id: str) -> str | None:
        """The commit of a base on the hub that the run began with; None before its first start."""
        path = self.environment_file
        known = read_json(path) if path.exists() else None
        if not isinstance(known, dict) or known.get("base_hub_id") != hub_id:
            return None
        commit = known.get("base_revision")
        return commit if isinstance(commit, str) and is_commit(commit) else None

    def recorded_files(self) -> list[str]:
        """The files of rows that the run began with; none before its first start."""
        path = self.data_file
        known = read_json(path) if path.exists() else None
        files = known.get("files") if isinstance(known, dict) else None
        return list(files) if isinstance(files, dict) else []

    def write_state(self, **facts: Any) -> None:
        """Replaces run.json."""
        write_json(self.state_file, facts)

    @property
    def is_finished(self) -> bool:
        """Whether training ended well."""
        return self.state().get("state") == "finished"


def open_run(loaded: Loaded, allowed: Sequence[str] = ()) -> RunFolder:
    """The run folder of a config, made where it is new.

    A folder whose only start was refused for its input holds nothing: the corrected config may
    have it.

    Args:
        allowed: settings that may differ from those the run began with.

    Raises:
        InputError: the folder belongs to another config; every differing key is named.
    """
    run = run_of(loaded)
    if run.config_file.exists():
        known = run.config()
        changes = changes_between(known, loaded.config)
        changes = [change for change in changes if not _only_pins(run, change, loaded.config)]
        if not changes:
            return run
        if not _never_began(run):
            _take_over(run, changes, allowed, free_settings(known, loaded.config))
        else:
            for other in (run.environment_file, run.data_file, run.fit_file):  # of the other config
                other.unlink(missing_ok=True)
            if (run.path / "base").is_dir():  # random weights, of the other config
                remove(run.path / "base")
    make_folder(run.path, _PRIVATE)
    write_text(run.config_file, dump(loaded))
    return run


def _only_pins(run: RunFolder, change: Change, config: RunConfig) -> bool:
    """Whether a branch was replaced by the commit that it was when the run began."""
    hub_id = config.base.path
    pinned = change.key == "base.revision" and hub_id is not None
    return pinned and change.after is not None and change.after == run.recorded_commit(hub_id or "")


def _take_over(
    run: RunFolder, changes: Sequence[Change], allowed: Sequence[str], free: frozenset[str]
) -> None:
    """Says and remembers the changes of a run that goes on, where they may be."""
    if others := refused(changes, allowed, free):
        hint = (
            "choose another run.name, remove the folder, or allow what is meant: --allow-change KEY"
        )
        findings = [f"{run.path}: holds a run of another config; {hint}", *map(str, others)]
        raise InputError(findings)
    acting = [change for change in changes if change.key in set(allowed) - free]
    if acting and run.is_finished:
        raise InputError(
            f"{run.path}: is finished; a change of {', '.join(c.key for c in acting)} would train "
            "nothing. Choose another run.name"
        )
    latest = run.checkpoints / "latest.json"
    named = read_json(latest) if latest.exists() else None
    step = named.get("step") if isinstance(named, dict) else None
    remember([c for c in changes if c.key != "run.resume"], run.path, step)
    for change in changes:
        print(f"changed  {change}", file=sys.stderr)


def run_of(loaded: Loaded) -> RunFolder:
    """The run folder of a config, whether it exists or not."""
    section = loaded.config.run
    return RunFolder(Path(section.dir) / section.name)


def _never_began(run: RunFolder) -> bool:
    """Whether the folder's start was refused (exit 2) before a checkpoint or a result."""
    if run.checkpoints.is_dir() and any(run.checkpoints.iterdir()):
        return False
    return run.state().get("exit_code") == 2 and not (run.adapter.exists() or run.model.exists())


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Holds the run folder for this process; a lock ends with its process, however that dies.

    Raises:
        InputError: another process trains or merges in it.
    """
    with (run.path / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise InputError(f"{run.path}: another process ({owner}) is at work in it") from None
        file.seek(0)
        file.truncate()
        file.write(f"pid {os.getpid()}")
        file.flush()
        sweep(run.path)
        sweep(run.checkpoints)
        yield


def find_run(name: str | None, runs: Path = Path("runs"), need: str = "config.yaml") -> RunFolder:
    """The run a person names, or the newest one, which is then named aloud.

    Args:
        need: a file or folder the run must have.

    Raises:
        InputError: there is none.
    """
    if name:
        run = RunFolder(Path(name))
        if not (run.path / need).exists():
            raise InputError(f"{run.path}: is no run with {need}; `train` makes one")
        return run
    candidates = [p for p in runs.iterdir() if (p / need).exists()] if runs.is_dir() else []
    if not candidates:
        raise InputError(f"{runs}: holds no run with {need}; train first, or name a run")
    newest = max(candidates, key=lambda path: (path / need).stat().st_mtime)
    print(f"run      {newest} (the newest)", file=sys.stderr)
    return RunFolder(newest)


def environment() -> dict[str, Any]:
    """Versions and machine, without names of hosts, users or paths."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
