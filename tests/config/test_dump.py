"""The resolved config: all of it, its origins, and the same config when it is loaded again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.config.adapter import SETTINGS
from finetune.config.loader import dump, load, read_run_config
from finetune.config.schema import KNOWN_PATHS, SECTIONS
from finetune.config.train import EVALUATION
from finetune.errors import InputError

SFT = """\
recipe: sft
base:
  path: assets/llama-nano
data:
  train:
    - a.jsonl
    - {path: "b c.json", format: alpaca, columns: {instruction: question}}
train:
  learning_rate: 1e-4
"""
FULL_PRETRAIN = [
    "data.train=text.jsonl",
    "recipe=pretrain",
    "base.architecture={preset: llama3-8b, n_layers: 2}",
    "base.tokenizer='1e3'",
    "adapter.method=none",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "lora.yaml"
    path.write_text(SFT)
    return path


@pytest.mark.parametrize(
    "overrides", [[], ["train.max_steps=3"], FULL_PRETRAIN, ["train.bf16=true"]]
)
def test_round_trip(path, tmp_path, overrides):
    loaded = load(path, overrides)
    (tmp_path / "config.yaml").write_text(dump(loaded))
    assert read_run_config(tmp_path) == loaded.config
    again = load(tmp_path / "config.yaml")
    assert [line.split("#")[0] for line in dump(again).splitlines()] == [
        line.split("#")[0] for line in dump(loaded).splitlines()
    ]


def test_every_setting_has_a_line_with_its_origin(path):
    loaded = load(path, ["adapter.r=4"])
    text = dump(loaded)
    values = yaml.safe_load(text)
    written = {f"{s}.{k}" for s, keys in values.items() if isinstance(keys, dict) for k in keys}
    idle = {"base.revision", "data.on_overlap", "eval.max_new_tokens"}
    idle |= {f"train.{key}" for key in EVALUATION}
    others = set(SECTIONS["adapter"].model_fields) - set(SETTINGS["lora"]) - {"method"}
    idle |= {f"adapter.{key}" for key in others}
    assert written | {"recipe"} | idle == set(KNOWN_PATHS)
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["  r".strip()].endswith("# override")
    assert lines["learning_rate"].endswith(f"# {path}:9")
    assert lines["optim"].endswith("# default")
    assert "# no effect without held-out rows" in text


def test_other_yaml_readers_see_the_same_numbers(path):
    values = yaml.safe_load(dump(load(path, ["train.learning_rate=1e-7"])))
    assert values["train"]["learning_rate"] == 1e-7
    assert values["train"]["adam_epsilon"] == 1e-8


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    text=st.text(min_size=1),
    rate=st.floats(1e-12, 1),
    sources=st.lists(st.text(min_size=1), min_size=1, max_size=3),
)
def test_any_text_and_number_survive(path, tmp_path, text, rate, sources):
    from finetune.config.dump import flow

    overrides = [
        f"data.date_string={flow(text)}",
        f"train.learning_rate={flow(rate)}",
        f"data.train={flow(sources)}",
    ]
    loaded = load(path, overrides)
    assert loaded.config.data.date_string == text
    (tmp_path / "config.yaml").write_text(dump(loaded), encoding="utf-8")
    assert read_run_config(tmp_path) == loaded.config


def test_a_config_is_frozen(path):
    config = load(path).config
    with pytest.raises(ValidationError, match="frozen"):
        config.train.learning_rate = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.recipe = "pretrain"


def test_a_folder_without_config_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"no config\.yaml"):
        read_run_config(tmp_path)


def test_loading_is_quick_and_imports_no_torch(path):
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from finetune.config.loader import dump, load\n"
        f"dump(load({str(path)!r}))\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.perf_counter() - start)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.0
