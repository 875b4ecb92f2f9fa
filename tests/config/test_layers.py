"""extends and overrides: who wins, and what a later choice takes out of force."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.loader import load
from finetune.errors import InputError

PARENT = """\
recipe: sft
base:
  path: meta-llama/Llama-3.2-1B-Instruct
  revision: main
adapter:
  r: 8
data:
  train: [a.jsonl]
  heldout: [h.jsonl]
train:
  num_train_epochs: 3
  lr_scheduler_type: cosine_with_min_lr
  lr_scheduler_kwargs: {min_lr_rate: 0.1}
  eval_steps: 10
  load_best_model_at_end: true
  early_stopping_patience: 3
  early_stopping_threshold: 0.5
eval:
  tasks: exact_match
  max_new_tokens: 7
"""

# What is left of the settings that let a held-out loss decide something, once none is due.
NOTHING_FOLLOWS = {
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "early_stopping_threshold": 0.0,
}


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    path = tmp_path / "parent.yaml"
    path.write_text(PARENT)
    return path


def child_of(parent: Path, text: str, name: str = "child.yaml") -> Path:
    path = parent.parent / name
    path.write_text(text)
    return path


def test_a_file_changes_what_it_extends(parent):
    path = child_of(parent, "extends: parent.yaml\nadapter:\n  lora_alpha: 64\n")
    loaded = load(path, ["train.learning_rate=1e-5"])
    assert (loaded.config.adapter.r, loaded.config.adapter.lora_alpha) == (8, 64)
    assert loaded.config.train.learning_rate == 1e-5
    assert loaded.config.run.name == "child"
    assert loaded.origins["adapter.r"] == f"{parent}:6"
    assert loaded.origins["adapter.lora_alpha"] == f"{path}:3"
    assert loaded.origins["train.learning_rate"] == "override"
    assert loaded.origins["train.optim"] == "default"
    assert loaded.origins["run.name"] == "default: the file's name"


def test_the_last_of_several_parents_wins(parent):
    child_of(parent, "adapter: {r: 4, lora_alpha: 4}", "other.yaml")
    path = child_of(parent, "extends: [parent.yaml, other.yaml]\nadapter: {lora_alpha: 2}\n")
    adapter = load(path).config.adapter
    assert (adapter.r, adapter.lora_alpha) == (4, 2)


def test_a_parent_is_found_beside_its_child(parent, monkeypatch):
    folder = parent.parent / "below"
    folder.mkdir()
    (folder / "child.yaml").write_text("extends: ../parent.yaml\n")
    monkeypatch.chdir(folder)
    assert load("child.yaml").config.adapter.r == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: child.yaml\n", "extends itself"),
        ("extends: nowhere.yaml\n", "no such file"),
        ("extends: 3\n", "allowed: a file's name"),
        ("extends: [parent.yaml, 3]\n", "allowed: a file's name"),
    ],
)
def test_wrong_extends(parent, text, words):
    path = child_of(parent, text)
    with pytest.raises(InputError) as error:
        load(path)
    assert words in error.value.findings[0]


def test_a_cycle_of_two_is_found(parent):
    child_of(parent, "extends: child.yaml\n", "other.yaml")
    with pytest.raises(InputError, match="extends itself through other.yaml"):
        load(child_of(parent, "extends: other.yaml\n"))


def test_lists_and_mappings_are_replaced_whole(parent):
    config = load(
        parent, ["data.train=[x.jsonl]", "train.lr_scheduler_kwargs={min_lr: 1e-6}"]
    ).config
    assert [source.path for source in config.data.train] == ["x.jsonl"]
    assert config.train.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_a_longer_path_changes_one_entry_of_a_mapping(parent):
    shape = "base: {architecture: {preset: llama3.2-1b, n_layers: 4}, tokenizer: t}"
    path = child_of(parent, f"extends: parent.yaml\n{shape}\n")
    loaded = load(path, ["base.architecture.n_layers=2"])
    assert loaded.config.base.architecture == {"preset": "llama3.2-1b", "n_layers": 2}
    with pytest.raises(InputError, match="base.architecture is 'llama3-8b', not a mapping"):
        load(path, ["base.architecture=llama3-8b", "base.architecture.n_layers=2"])


@pytest.mark.parametrize(
    ("overrides", "section", "expected"),
    [
        (["train.max_steps=5"], "train", {"max_steps": 5, "num_train_epochs": None}),
        (["base.path=./folder"], "base", {"path": "./folder", "revision": None}),
        (
            ["base.architecture=llama3-8b", "base.tokenizer=t"],
            "base",
            {"architecture": "llama3-8b", "path": None, "revision": None},
        ),
        (["data.heldout_fraction=0.1"], "data", {"heldout": (), "heldout_fraction": 0.1}),
        (["train.lr_scheduler_type=linear"], "train", {"lr_scheduler_kwargs": {}}),
        (["adapter.method=none"], "adapter", {"method": "none", "r": 16}),
        (["eval.tasks=[]"], "eval", {"max_new_tokens": 128}),
        (["recipe=pretrain"], "eval", {"tasks": (), "max_new_tokens": 128}),
        (["data.heldout=null"], "train", {"eval_steps": None, **NOTHING_FOLLOWS}),
        (["train.eval_steps=null"], "train", NOTHING_FOLLOWS),
        (["train.early_stopping_patience=null"], "train", {"early_stopping_threshold": 0.0}),
    ],
)
def test_a_later_choice_takes_what_it_excludes_out_of_force(parent, overrides, section, expected):
    loaded = load(parent, overrides)
    values = getattr(loaded.config, section)
    assert {key: getattr(values, key) for key in expected} == expected
    gone = [
        f"{section}.{key}"
        for key, value in expected.items()
        if f"{section}.{key}=" not in str(overrides)
    ]
    assert all(loaded.origins[path] == "default" for path in gone)


def test_the_same_choice_again_changes_nothing(parent):
    same = ["train.lr_scheduler_type=cosine_with_min_lr", "train.num_train_epochs=3"]
    assert load(parent, same).config == load(parent).config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_steps", "allowed: section.key=value"),
        ("=3", "allowed: section.key=value"),
        ("train..x=3", "allowed: section.key=value"),
        ("extends=parent.yaml", "only a file can extend"),
        ("train.max_steps=[1", "override train.max_steps: not valid YAML"),
        ("train.max_steps=!!python/none 3", "found the tag"),
        ("recipe.x=3", "recipe: found {'x': 3}; allowed: sft, pretrain"),
    ],
)
def test_wrong_overrides(parent, override, words):
    with pytest.raises(InputError) as error:
        load(parent, [override])
    assert words in "\n".join(error.value.findings)


def test_an_override_given_twice_is_refused(parent):
    with pytest.raises(InputError, match="override adapter.r: found twice"):
        load(parent, ["adapter.r=1", "adapter.r=2"])


def test_an_override_keeps_what_stands_after_the_first_equals_sign(parent):
    assert load(parent, ["data.train=a=b.jsonl"]).config.data.train[0].path == "a=b.jsonl"
