"""A module imports only from the lines above its own; the first lines import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from source_files import (
    PACKAGE,
    ROOT,
    imported_names,
    module_name,
    package_files,
    statements_run_on_import,
)

# docs/architecture.md has the same list. A package stands for all its modules, save those that
# have a line of their own. A new module gets a line here first.
LINES = (
    "errors",
    "artifact llama.architecture llama.architecture_spec llama.hyperparameters llama.params_json"
    " pages llama.presets ngrams mojibake hashing copies comparison scorers collectives trackers"
    " sharing devices heap",
    "config overlap cache adapter_settings state_files",
    "best",
    "methods identity starts layer_merge rank_schedule drift watchdog",
    "llama fast run_folder ledger suspicion hub precision",
    "budget",
    "data_starts revisions",
    "adapters",
    "files",
    "shapes",
    "prepared",
    "rendering mixture",
    "row_work",
    "preparation",
    "data_cache",
    "data model packing",
    "batching tokens excerpts skeleton sliding tasks",
    "summary merging proof_layers proof_weights workload",
    "footprint",
    "peak calibration",
    "checkpoint heldout preview inspection proof_combined plan shrinking",
    "evaluation inference witness fit",
    "trainer answers",
    "recipes monitor proof exports scoring reports",
    "stages resume",
    "train generate merge export report doctor verify train_tokenizer scoreboard subject",
    "harness",
    "eval",
    "smoke",
    "__main__",
)
LEVELS = {name: level for level, line in enumerate(LINES) for name in line.split()}

# `train --smoke` hands over to smoke, which runs train and the verbs after it.
ALLOWED_UPWARDS = {("train", "smoke")}

LIGHT = {"errors", "artifact", "cache", "config", "run_folder", "files", "shapes", "ledger"}
LIGHT |= {
    "plan",
    "budget",
    "peak",
    "devices",
    "workload",
    "ngrams",
    "overlap",
    "suspicion",
    "mojibake",
    "prepared",
    "mixture",
    "report",
}
LIGHT |= {"pages", "methods", "drift", "comparison", "scorers", "best", "trackers", "sharing"}
LIGHT |= {"reports"}
WITHOUT_TORCH = sorted(LIGHT | {name for name in LEVELS if name.startswith("llama.")})
HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"}

FILES = {module_name(path): path for path in package_files()}
MODULES = sorted(name for name in FILES if name)


def line_of(module: str) -> str | None:
    """The entry of LINES that a module belongs to: its own, or its package's."""
    return next((name for name in (module, module.split(".")[0]) if name in LEVELS), None)


def own_imports(source: str) -> set[str]:
    """The modules of this package that a source imports, inside functions as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [name.removeprefix("finetune.") for name in imported_names(node) if "." in name]
        found |= {name for name in names if name in FILES}
    return found


def wrong_imports(module: str, source: str) -> list[str]:
    own = line_of(module)
    wrong = []
    for target in sorted(own_imports(source) - {module}):
        line = line_of(target)
        same_package = module.split(".")[0] == target.split(".")[0] and "." in module + target
        same = LEVELS[line] == LEVELS[own] and same_package
        if LEVELS[line] >= LEVELS[own] and not same and (module, target) not in ALLOWED_UPWARDS:
            wrong.append(target)
    return wrong


def test_every_module_has_a_line():
    assert [module for module in MODULES if line_of(module) is None] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_the_lines_above(module):
    wrong = wrong_imports(module, FILES[module].read_text())
    assert not wrong, f"{module} imports {wrong}, which do not stand above it"


def test_an_import_from_below_is_seen():
    assert wrong_imports("errors", "from finetune.artifact import sha") == ["artifact"]
    assert wrong_imports("config.loader", "def f():\n    import finetune.data") == ["data"]
    assert wrong_imports("data", "from finetune import model") == ["model"]
    assert "llama.chat" in wrong_imports("llama.presets", "from finetune.llama import chat")
    assert wrong_imports("config.loader", "from finetune.config.tree import Tree") == []


def test_only_smoke_and_the_command_line_import_train():
    importers = {module for module in MODULES if "train" in own_imports(FILES[module].read_text())}
    assert importers <= {"smoke", "__main__"}


@pytest.mark.parametrize("entry", WITHOUT_TORCH)
def test_no_heavy_import_at_module_level(entry):
    for module in [name for name in MODULES if name == entry or name.startswith(entry + ".")]:
        tree = ast.parse(FILES[module].read_text())
        nodes = statements_run_on_import(tree)
        roots = {name.split(".")[0] for node in nodes for name in imported_names(node)}
        assert not roots & HEAVY, f"{module} imports {roots & HEAVY} when it is imported"


def test_the_light_modules_load_no_torch():
    light = [name for name in MODULES if name in WITHOUT_TORCH or name.startswith("config.")]
    code = "\n".join(f"import finetune.{name}" for name in light)
    code += f"\nimport sys; heavy = {HEAVY!r} & set(sys.modules); assert not heavy, heavy"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_every_package_has_an_init():
    folders = {path.parent for path in package_files()}
    assert [f for f in folders if not (f / "__init__.py").is_file()] == []
    assert PACKAGE in folders
