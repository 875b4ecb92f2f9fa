"""YAML + extends + overrides -> RunConfig, with everything that is wrong found in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.config import findings as wording
from finetune.config import layers
from finetune.config.conflicts import find_conflicts
from finetune.config.dump import dump
from finetune.config.schema import KNOWN_PATHS, SECTIONS, Loaded, RunConfig
from finetune.config.tree import Path as KeyPath
from finetune.config.tree import Tree
from finetune.errors import InputError

__all__ = ["Loaded", "dump", "load", "read_run_config"]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Reads a config file, lays overrides over it and checks the whole.

    Args:
        path: a YAML file.
        overrides: `section.key=value` arguments; values are read as YAML.

    Raises:
        InputError: with every finding at once, each with its place, what was found and what is
            allowed.
    """
    path = Path(path)
    tree = layers.read_file(path)
    readable = bool(tree.values) or not tree.findings
    layers.lay_over(tree, layers.read_overrides(overrides, tree))
    if not readable:
        raise InputError(tree.findings)
    _name_after_file(tree, path)
    check = _Check(tree, path)
    config = check.run()
    if check.findings:
        raise InputError(check.findings)
    return Loaded(config, _all_origins(tree), path)


def read_run_config(run_dir: str | Path) -> RunConfig:
    """The resolved config of a run, from its folder.

    Raises:
        InputError: the folder has no config.yaml, or one that is not right.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir}: found no config.yaml; allowed: a run folder written by train")
    return load(path).config


def _name_after_file(tree: Tree, path: Path) -> None:
    run = tree.values.setdefault("run", {})
    if run is None:
        run = tree.values["run"] = {}
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = path.stem
        tree.origins[("run", "name")] = "default: the file's name"


def _all_origins(tree: Tree) -> dict[str, str]:
    return {name: tree.origins.get(tuple(name.split(".")), "default") for name in KNOWN_PATHS}


class _Check:
    """Checks a tree section by section, then across sections, and gathers the findings."""

    def __init__(self, tree: Tree, path: Path) -> None:
        self.tree, self.path = tree, path
        self.findings = list(tree.findings)
        self.wrong: set[str] = set()

    def run(self) -> RunConfig:
        """The config; only whole where there are no findings."""
        self.unknown_sections()
        parts: dict[str, Any] = {name: self.section(name) for name in SECTIONS}
        parts["recipe"] = self.recipe()
        config = self.partial(parts)
        for conflict in find_conflicts(config):
            if not self.wrong.intersection(conflict.paths):
                self.report(tuple(conflict.paths[0].split(".")), conflict.message)
        return config

    def partial(self, parts: dict[str, Any]) -> RunConfig:
        defaults = {name: section() for name, section in SECTIONS.items()}
        return RunConfig.model_construct(**{"recipe": "sft", **defaults, **parts})

    def report(self, path: KeyPath, message: str) -> None:
        origin = next(
            (
                self.tree.origins[path[:n]]
                for n in range(len(path), 0, -1)
                if path[:n] in self.tree.origins
            ),
            str(self.path),
        )
        self.findings.append(f"{origin} {'.'.join(path)}: {message}")

    def unknown_sections(self) -> None:
        for name, value in self.tree.values.items():
            if name not in RunConfig.model_fields:
                message = wording.unknown_key((name,), value, RunConfig, [*KNOWN_PATHS, *SECTIONS])
                self.report((name,), message)

    def recipe(self) -> str:
        field = RunConfig.model_fields["recipe"]
        allowed = wording.describe_field(field)
        value = self.tree.values.get("recipe")
        if value is not None and value in allowed.split(", "):
            return str(value)
        found = "missing" if value is None else f"found {wording.show(value)}"
        self.report(("recipe",), f"{found}; allowed: {allowed}")
        self.wrong.add("recipe")
        return "sft"

    def section(self, name: str) -> BaseModel:
        """One section; a setting that is wrong is reported, and its default stands in for it."""
        model = SECTIONS[name]
        values = self.tree.values.get(name)
        values = {} if values is None else values
        if not isinstance(values, dict):
            keys = ", ".join(model.model_fields)
            self.report((name,), f"found {wording.show(values)}; allowed: a mapping of {keys}")
            self.wrong.update(f"{name}.{key}" for key in model.model_fields)
            return model()
        try:
            return model.model_validate(values)
        except ValidationError as error:
            found = wording.describe_errors(error, model, values, (name,), KNOWN_PATHS)
        for path, message in found.items():
            self.report(path, message)
            self.wrong.add(".".join(path[:2]))
        wrong_keys = {path[1] for path in found}
        rest = {key: value for key, value in values.items() if key not in wrong_keys}
        return model.model_validate(rest)
