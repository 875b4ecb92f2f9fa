"""Patterns of an adapter's settings: those that people write are used, those without an end not."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from planting import forge_settings
from small_runs import republish

from finetune import adapter_settings
from finetune.adapter_settings import refuse_hostile
from finetune.errors import CannotContinue, CheckFailed
from finetune.identity import settings_of

ENDLESS = (
    r"(([a-z_0-9.]+)+)+x",
    r"(.*)*(.*)*!",
    r"(.|..)*(.|..)*!",
    r"(.?){40}(.?){40}!",
    ".*" * 30 + "!",
    r"model\.layers\.1\.(([a-z_.]+)+)+!",  # on one layer alone
)
PLACES = {
    "target_modules": lambda text: {"target_modules": text},
    "exclude_modules": lambda text: {"exclude_modules": text},
    "rank_pattern": lambda text: {"rank_pattern": {text: 4}},
    "alpha_pattern": lambda text: {"alpha_pattern": {text: 8}},
    "layers_pattern": lambda text: {"layers_pattern": text, "layers_to_transform": [0, 1]},
    "layers_pattern list": lambda text: {"layers_pattern": [text], "layers_to_transform": [0, 1]},
    "modules_to_save": lambda text: {"modules_to_save": [text]},
    "feedforward_modules": lambda text: {"peft_type": "IA3", "feedforward_modules": text},
}
SEVEN = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
WRITTEN = (  # all name the seven matrices of every layer
    "all-linear",
    r".*\.(q|k|v|o|gate|up|down)_proj$",
    rf"model\.layers\.\d+\.(self_attn|mlp)\.({SEVEN})",
    rf"(?:.*?(?:language|model).*?(?:self_attn|attention|mlp|ffn).*?(?:{SEVEN}).*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|mlp)\.(?:(?:{SEVEN})))",
    rf"^(model(?=\.)(?!.*(vision|lm_head)).*\.({SEVEN}))$",
)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(adapter_settings, "SECONDS", 1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("place", PLACES)
def test_a_pattern_without_an_end_is_refused_wherever_it_stands(run, ended, impatient, place):
    shutil.rmtree(run.merged)
    forge_settings(run, **PLACES[place](ENDLESS[0]))
    for verb in ("merge", "eval"):
        said = ended(3, verb, run.path)
        assert "adapter_config.json: its patterns" in said and "List the modules by name" in said


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ENDLESS)
def test_every_kind_of_it_is(tmp_path, impatient, text):
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    begun = time.monotonic()
    with pytest.raises(CheckFailed, match="its patterns"):
        refuse_hostile(tmp_path, {"target_modules": text}, names, 1 << 20)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("text", WRITTEN)
def test_patterns_that_people_write_are_used(run, ended, text):
    """The keys of the file are those that PEFT makes of the pattern, or nothing would load."""
    before = json.loads(_answer(run, ended))
    forge_settings(run, target_modules=text)
    assert json.loads(_answer(run, ended))["loss"] == before["loss"]


def _answer(run, ended):
    ended(0, "eval", run.path)
    return max((run.path / "eval").glob("*.json"), key=lambda p: p.stat().st_mtime_ns).read_text()


def test_so_are_ranks_by_pattern(run, ended):
    rank = json.loads((run.adapter / "adapter_config.json").read_text())["r"]
    forge_settings(run, r=2, rank_pattern={r"layers\.\d+\..*_proj": rank, "q_proj": 1})
    ended(0, "eval", run.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "megatron.evil"},
        {"megatron_core": "evil"},
        {"layer_replication": [[0, 2]] * 1000},
        {"r": 1 << 40},
        {"rank_pattern": {"q_proj": 1 << 40}},
    ],
)
def test_code_other_models_and_sizes_that_no_file_has_are_not_for_peft(run, ended, changes):
    shutil.rmtree(run.merged)
    forge_settings(run, **changes)
    for verb in ("merge", "eval"):
        said = ended(3, verb, run.path)
        assert f"adapter_config.json: {next(iter(changes))}" in said
        assert "PEFT cannot" not in said


@pytest.mark.parametrize("text", ["[1, 2]", '"x"', "3", "null"])
def test_settings_that_are_no_object_are_refused(run, ended, text):
    (run.adapter / "adapter_config.json").write_text(text)
    facts = {"adapter_config": None}
    republish(run.adapter, **facts)
    assert "a JSON object is needed" in ended(3, "eval", run.path)


def test_memory_that_runs_out_is_not_the_settings_fault(run):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with (
        pytest.raises(CannotContinue, match="does not fit into memory"),
        settings_of(run.adapter, []),
    ):
        raise full
    with pytest.raises(CheckFailed, match="PEFT cannot use"), settings_of(run.adapter, []):
        raise RuntimeError("size mismatch")
