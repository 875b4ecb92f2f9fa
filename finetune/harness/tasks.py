"""Tasks of lm-evaluation-harness: found by name, looked at, and their data read, before any model.

A folder's tasks are looked for first; the harness's own are read (thousands of files) only where a
name is not among them. A task whose data is a file stays offline; one that names a dataset of the
hub lifts that, unless the user has set HF_HUB_OFFLINE.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import OFFLINE_BY_CHOICE
from finetune.errors import InputError
from finetune.hub import go_online

_OF_FILES = {"arrow", "csv", "json", "pandas", "parquet", "text", "xml"}  # formats of `datasets`
_NUM_NAMED = 20


@dataclass(frozen=True)
class HarnessTasks:
    """What is asked.

    Attributes:
        names: as given: tasks, groups, tags.
        manager: the harness's `TaskManager`.
        tasks: name -> the harness's `Task`; groups are taken apart.
    """

    names: tuple[str, ...]
    manager: Any
    tasks: Mapping[str, Any]


def find_tasks(names: Sequence[str], folder: Path | None) -> HarnessTasks:
    """The tasks, with their data.

    Raises:
        InputError: a name that is none, data that is not there, or a task that runs code of the
            model's or of the hub's; all of them together.
    """
    manager = _manager(names, folder)
    findings: list[str] = []
    tasks: dict[str, Any] = {}
    for name in names:
        for leaf, config in _leaves(manager.task_index, name):
            _allow_its_data(leaf, config or {})
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # the harness and `datasets` raise whatever they meet
            findings.append(f"--lm-eval {name}: {_said(error)}")
    findings += [found for name, task in tasks.items() for found in _refusals(name, task)]
    if findings:
        raise InputError(findings)
    return HarnessTasks(tuple(names), manager, tasks)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise InputError(f"--lm-eval-tasks {folder}: no such folder")
    path = str(folder) if folder else None
    manager = TaskManager(include_path=path, include_defaults=False)
    if _unknown(manager, names):
        print("lm-eval  reading the tasks that come with the harness", file=sys.stderr)
        manager = TaskManager(include_path=path, include_defaults=True)
    unknown = [name for name in _unknown(manager, names) if name in names]
    if unknown:
        findings = [_not_found(name, manager, folder) for name in unknown]
        raise InputError(findings + list(_unreadable(folder)))
    return manager


def _unknown(manager: Any, names: Sequence[str]) -> list[str]:
    """Names that no file describes, those that a group mentions among them."""
    index = manager.task_index
    leaves = [leaf for name in names for leaf in _leaves(index, name)]
    return [name for name, config in leaves if config is None]


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The tasks behind a name, each with what its file says; None where there is no file."""
    entry = index.get(name)
    if entry is None:
        yield name, None
    elif entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _leaves(index, task)
    elif entry.kind.name == "GROUP":
        yield from _members(index, entry.cfg)
    else:
        yield name, entry.cfg


def _members(
    index: Mapping[str, Any], group: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    for member in group.get("task") or ():
        if isinstance(member, str):
            yield from _leaves(index, member)
            continue
        name = member.get("group") or member.get("task")
        if name in index:
            yield from _leaves(index, name)
        elif "group" in member:
            yield from _members(index, member)
        else:
            yield str(name), member


def _allow_its_data(name: str, config: Mapping[str, Any]) -> None:
    """Lifts the offline mode for a task whose data is the hub's."""
    path = config.get("dataset_path")
    if not isinstance(path, str) or path in _OF_FILES or Path(path).exists():
        return
    go_online("lm-eval", f"{name}: {path}")
    if not OFFLINE_BY_CHOICE:
        import datasets

        datasets.config.HF_HUB_OFFLINE = False  # it has read the setting when it was imported


def _not_found(name: str, manager: Any, folder: Path | None) -> str:
    known = manager.all_tasks
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    if folder is None:
        return f"--lm-eval {name}: the harness has no such task{hint}"
    own = [n for n, e in manager.task_index.items() if e.yaml_path and _is_in(e.yaml_path, folder)]
    listed = ", ".join(sorted(own)[:_NUM_NAMED]) or "nothing"
    return f"--lm-eval {name}: neither {folder} nor the harness has it{hint}; {folder} has {listed}"


def _is_in(path: Path, folder: Path) -> bool:
    return folder.resolve() in Path(path).resolve().parents


def _unreadable(folder: Path | None) -> Iterator[str]:
    """The harness leaves out files it cannot read, and says nothing."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # yaml's, and the harness's own
            yield f"{path}: cannot be read: {_said(error)}"


def _refusals(name: str, task: Any) -> Iterator[str]:
    if name == "loss":
        yield f"--lm-eval {name}: a task may not be called loss; the held-out loss is"
    if getattr(task, "UNSAFE_CODE", False):
        yield f"--lm-eval {name}: runs code that a model has written; never done here"
    if getattr(task, "MULTIMODAL", False):
        yield f"--lm-eval {name}: asks about pictures or sound; Llama models here read text"
    metrics = getattr(task, "_metric_fn_list", {}) if not task.config.process_results else {}
    for metric in [name for name, function in metrics.items() if function is None]:
        yield (
            f"--lm-eval {name}: its metric {metric} is not the harness's own; metrics of the "
            "`evaluate` library are code from the hub, and are not run"
        )


def _said(error: Exception) -> str:
    """The first line of what a library said, without what stands for no more than its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{lines[0] if lines else 'failed'} ({type(error).__name__})"
