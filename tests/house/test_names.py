"""File names: none hides a library's module, none says nothing."""

from __future__ import annotations

import sys
from importlib.metadata import packages_distributions

from source_files import PACKAGE, package_files

VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "core", "base_utils"}


def top_level_names() -> set[str]:
    """What `accelerate launch finetune/train.py` puts first on the import path."""
    files = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return (files | folders) - {"__init__", "__main__"}


def test_no_file_hides_a_module_of_the_standard_library():
    assert top_level_names() & sys.stdlib_module_names == set()


def test_no_file_hides_a_module_of_a_dependency():
    installed = set(packages_distributions()) - {"finetune"}
    assert {"datasets", "tokenizers", "torch"} <= installed
    known = {"datasets", "evaluate", "tokenizers", "torch", "peft", "trl", "wandb", "mlflow"}
    assert top_level_names() & (installed | known) == set()


def test_no_file_has_a_name_that_says_nothing():
    assert [path for path in package_files() if path.stem in VAGUE] == []
