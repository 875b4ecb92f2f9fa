"""Every config that is shipped loads, names what exists, and says how to use it."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from pathlib import Path

import pytest
from source_files import ROOT

from finetune.config.data import Source
from finetune.config.loader import dump, load
from finetune.config.schema import SECTIONS
from finetune.config.section import Section
from finetune.config.task import Task
from finetune.llama.architecture import HUB_IDS

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_there_are_configs():
    assert {"lora_nano.yaml", "pretrain_nano.yaml", "lora_8b.yaml"} <= {p.name for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_loads_and_its_resolved_form_is_equal(path, tmp_path):
    loaded = load(path)
    (tmp_path / "config.yaml").write_text(dump(loaded))
    assert load(tmp_path / "config.yaml").config == loaded.config
    assert loaded.config.run.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_launched_as_its_header_says(path):
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for word in ("# Needs:", "# Run:", "# Change:"):
        assert word in header
    named = re.findall(r"configs/\S+\.yaml", header)
    assert f"configs/{path.name}" in named
    assert all(Path(name).is_file() for name in named)
    overrides = re.findall(r"\.yaml ((?:[a-z_0-9]+\.[a-z_0-9]+=\S+ ?)+)", header)
    assert overrides, "the header shows no override"
    for group in overrides:
        load(path, group.split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_hub_id_is_documented_and_its_revision_is_not_made_up(path):
    base = load(path).config.base
    if base.is_hub_id:
        assert base.path in HUB_IDS
        assert base.revision == "main"


@pytest.mark.parametrize("section", [*SECTIONS.values(), Source, Task], ids=lambda s: s.__name__)
def test_every_setting_is_described(section):
    """A text stands below each, in the class or in the one that it extends."""
    described = set()
    for kind in section.__mro__[: section.__mro__.index(Section)]:
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(text.value.value, str)
                described.add(field.target.id)
    assert set(section.model_fields) - described == set()
