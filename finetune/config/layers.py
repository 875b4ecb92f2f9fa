"""extends, the file, the overrides: laid over each other, key by key, into one tree."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.config import tree
from finetune.config.train import EVALUATION
from finetune.config.tree import Tree

MAX_EXTENDS_DEPTH = 8

_ADAPTER_KEYS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")


def read_file(path: Path, above: tuple[Path, ...] = ()) -> Tree:
    """A config file laid over the files it extends.

    Args:
        path: the file.
        above: the files that led here, to find cycles.
    """
    resolved = path.resolve()
    if resolved in above:
        return Tree({}, findings=[f"{path}: extends itself through {above[-1].name}"])
    if len(above) >= MAX_EXTENDS_DEPTH:
        return Tree({}, findings=[f"{path}: found more than {MAX_EXTENDS_DEPTH} levels of extends"])
    own = _parse_file(path)
    parents, findings = _take_extends(own, path)
    result = Tree({})
    for parent in parents:
        lay_over(result, read_file(parent, (*above, resolved)))
    lay_over(result, own)
    result.findings += findings
    return result


def _parse_file(path: Path) -> Tree:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return Tree({}, findings=[f"{path}: found bytes that are not UTF-8; allowed: a YAML file"])
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return Tree({}, findings=[f"{path}: {reason}; allowed: a YAML file that can be read"])
    result = tree.parse(text, str(path))
    if result.values is None:
        result.values = {}
    if not isinstance(result.values, dict):
        kind = type(result.values).__name__
        result.findings.append(f"{path}:1: found a {kind}; allowed: a mapping of sections")
        result.values = {}
    return result


def _take_extends(own: Tree, path: Path) -> tuple[list[Path], list[str]]:
    """Removes `extends` from a file's tree; the files it names, and what is wrong with it."""
    if "extends" not in own.values:
        return [], []
    names = own.values.pop("extends")
    names = names if isinstance(names, list) else [names]
    if all(isinstance(name, str) and name for name in names):
        return [path.parent / name for name in names], []
    where = own.origins[("extends",)]
    return [], [f"{where} extends: found {names!r}; allowed: a file's name, or a list of them"]


def lay_over(under: Tree, over: Tree) -> None:
    """Lays `over` on `under`, in place: a `section.key` is replaced whole, the rest stays.

    A later layer's choice also removes what only belonged to the choice it replaces:
    `max_steps` in an override takes the place of `num_train_epochs` in the file.
    """
    for section, key in _displaced(under.values, over.values):
        under.values[section].pop(key, None)
        _forget(under, (section, key))
    for name, value in over.values.items():
        below = under.values.get(name)
        if isinstance(below, dict) and (isinstance(value, dict) or value is None):
            for key, item in (value or {}).items():
                _forget(under, (name, key))
                below[key] = item
        else:
            _forget(under, (name,))
            under.values[name] = copy.deepcopy(value)
    under.origins.update(over.origins)
    under.findings += over.findings


def _forget(layer: Tree, path: tree.Path) -> None:
    for known in [known for known in layer.origins if known[: len(path)] == path]:
        del layer.origins[known]


def _displaced(under: dict[str, Any], over: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings below that a layer above takes out of force; absent there and set below."""
    displaced: list[tuple[str, str]] = []
    for trigger, keys in _DISPLACES.items():
        if _chosen(over, trigger) not in (None, _chosen(under, trigger)):
            displaced += keys
    if _chosen(over, ("adapter", "method")) == "none":
        displaced += [("adapter", key) for key in _ADAPTER_KEYS]
    if over.get("recipe") == "pretrain":
        displaced += [("data", key) for key in ("chat_format", "date_string", "train_on")]
        displaced += [("eval", key) for key in ("tasks", "max_new_tokens")]
    if _empties(over, ("eval", "tasks")):
        displaced.append(("eval", "max_new_tokens"))
    if _empties(over, ("data", "heldout")) and not _chosen(over, ("data", "heldout_fraction")):
        displaced += [("train", key) for key in EVALUATION]
    if _empties(over, ("train", "eval_steps")):
        displaced += [("train", key) for key in EVALUATION if key.startswith(("load", "early"))]
    if _empties(over, ("train", "early_stopping_patience")):
        displaced.append(("train", "early_stopping_threshold"))
    for path in dict.fromkeys(displaced):
        if _chosen(under, path) is not None and _chosen(over, path) is None:
            yield path


def _empties(layer: dict[str, Any], path: tuple[str, str]) -> bool:
    section = layer.get(path[0])
    return isinstance(section, dict) and path[1] in section and not section[path[1]]


def _chosen(layer: dict[str, Any], path: tuple[str, str]) -> Any:
    section = layer.get(path[0])
    return section.get(path[1]) if isinstance(section, dict) else None


_DISPLACES: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("base", "path"): (("base", "architecture"), ("base", "revision")),
    ("base", "architecture"): (("base", "path"), ("base", "revision")),
    ("data", "heldout"): (("data", "heldout_fraction"),),
    ("data", "heldout_fraction"): (("data", "heldout"),),
    ("train", "max_steps"): (("train", "num_train_epochs"),),
    ("train", "num_train_epochs"): (("train", "max_steps"),),
    ("train", "lr_scheduler_type"): (("train", "lr_scheduler_kwargs"),),
}


def read_overrides(overrides: Sequence[str], under: Tree) -> Tree:
    """`section.key=value` arguments as one layer; values are read as YAML.

    Args:
        overrides: the arguments.
        under: the files, where a longer path (`base.architecture.n_layers=4`) changes a mapping.
    """
    layer = Tree({})
    for override in overrides:
        path_text, equals, value_text = override.partition("=")
        path = tuple(path_text.strip().split("."))
        where = f"override {path_text.strip()}"
        if not equals or not all(path):
            layer.findings.append(
                f"override {override!r}: found no key; allowed: section.key=value"
            )
        elif path == ("extends",):
            layer.findings.append(f"{where}: only a file can extend another")
        elif path in layer.origins:
            layer.findings.append(f"{where}: found twice")
        else:
            value = tree.parse(value_text, where, has_lines=False)
            layer.findings += value.findings
            if not value.findings:
                _put(layer, under, path, value.values, where)
    return layer


def _put(layer: Tree, under: Tree, path: tree.Path, value: Any, where: str) -> None:
    """Sets one path of the override layer; a deeper one works on a copy of what is below."""
    if len(path) > 2:
        _copy_up(layer, under, (path[0], path[1]))
    target = layer.values
    for depth, name in enumerate(path[:-1], start=1):
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            outer = ".".join(path[:depth])
            message = f"{where}: {outer} is {target!r}, not a mapping; give {outer} as a whole"
            layer.findings.append(message)
            return
    target[path[-1]] = value
    layer.origins[path] = "override"


def _copy_up(layer: Tree, under: Tree, path: tuple[str, str]) -> None:
    """Takes a value and its origins from below into a layer that does not have it yet."""
    below = _chosen(under.values, path)
    section = layer.values.setdefault(path[0], {})
    if below is None or not isinstance(section, dict) or path[1] in section:
        return
    section[path[1]] = copy.deepcopy(below)
    kept = {known: origin for known, origin in under.origins.items() if known[:2] == path}
    layer.origins.update(kept)
