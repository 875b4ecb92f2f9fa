"""The arithmetic of `plan` against transformers' and PEFT's counts on models without memory."""

from __future__ import annotations

import json
import resource

import pytest

from finetune.__main__ import main
from finetune.config.loader import load
from finetune.errors import InputError
from finetune.llama.architecture import PRESETS, to_llama_config
from finetune.plan import GIB, plan_of

CONFIG = """\
recipe: sft
base: {{architecture: {preset}, tokenizer: assets/llama-nano}}
data: {{train: rows.jsonl}}
"""


@pytest.fixture
def planned(tmp_path):
    def make(preset: str, *overrides: str):
        file = tmp_path / "plan.yaml"
        file.write_text(CONFIG.format(preset=preset))
        return plan_of(load(file, overrides).config)

    return make


@pytest.mark.parametrize("preset", ["llama2-7b", "llama3.2-3b", "llama3.1-405b"])
@pytest.mark.parametrize("targets", ["[q_proj, v_proj]", "[o_proj, k_proj, up_proj, down_proj]"])
def test_counts_are_those_of_peft_on_a_model_without_memory(planned, preset, targets):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    plan = planned(preset, "adapter.r=7", f"adapter.target_modules={targets}")
    with torch.device("meta"):
        model = LlamaForCausalLM(to_llama_config(PRESETS[preset]))
        num_base = sum(p.numel() for p in model.parameters())
        names = targets.strip("[]").split(", ")
        peft_model = get_peft_model(model, LoraConfig(r=7, target_modules=names))
    assert plan.parameters.total == num_base
    assert plan.trainable == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)


def test_published_counts_of_adapters(planned):
    """PEFT's method comparison on Llama 3.2 3B: LoRA r 32 on q, v; r 10 on the MLP."""
    attention = planned("llama3.2-3b", "adapter.r=32", "adapter.target_modules=[q_proj, v_proj]")
    mlp = planned(
        "llama3.2-3b", "adapter.r=10", "adapter.target_modules=[gate_proj, up_proj, down_proj]"
    )
    assert attention.parameters.total == 3_212_749_824
    assert (attention.trainable, mlp.trainable) == (9_175_040, 9_461_760)


def test_the_405b_model_is_planned_without_allocating_it(planned):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = planned("llama3.1-405b", "base.quantization=nf4")
    assert plan.parameters.total == 405_853_388_800
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
    in_bfloat16 = planned("llama3.1-405b").bytes_by_part["base"]
    assert in_bfloat16 == 2 * plan.parameters.total
    assert 0.25 < plan.bytes_by_part["base"] / in_bfloat16 < 0.28


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_bytes_of_the_base_are_those_that_are_held(planned, small_base, quantization, tmp_path):
    from finetune.config.base import BaseSection
    from finetune.model import quantization_config, read_weights

    file = tmp_path / "own.yaml"
    file.write_text(
        f"recipe: sft\nbase: {{path: {small_base}, dtype: bfloat16, quantization: {quantization}}}"
        "\ndata: {train: rows.jsonl}\n"
    )
    plan = plan_of(load(file).config)
    section = BaseSection(path=str(small_base), dtype="bfloat16", quantization=quantization)
    import torch

    settings = {"dtype": torch.bfloat16}
    if quantization != "none":
        settings["quantization_config"] = quantization_config(section)
    model = read_weights(small_base, **settings)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    if quantization == "none":
        assert plan.bytes_by_part["base"] == held
    else:  # scales are beside the parameters, or rounded up to whole blocks
        assert 0.97 < plan.bytes_by_part["base"] / held < 1.05


def test_full_weights(planned):
    plan = planned("llama3.2-1b", "adapter.method=none", "base.dtype=float32")
    assert plan.trainable == plan.parameters.total == 1_235_814_400
    assert plan.bytes_by_part["optimizer"] == 8 * plan.trainable
    assert plan.bytes_by_part["adapter"] == 0


def test_an_optimiser_whose_memory_is_not_known_is_said_to_be_so(planned):
    plan = planned("llama3.2-1b", "train.optim=paged_adamw_8bit")
    assert plan.bytes_by_part["optimizer"] is None
    assert "optimizer unknown" in "\n".join(plan.lines())


def test_the_verb_plans_every_shipped_config(capsys):
    for config, parameters in [("lora_8b", 8_030_261_248), ("qlora_8b", 8_030_261_248),
                               ("lora_1b", 1_235_814_400), ("lora_nano", 2_600_000)]:  # fmt: skip
        assert main(["plan", f"configs/{config}.yaml", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["parameters"] == pytest.approx(parameters, rel=0.05)
        assert plan["bytes"] == sum(size or 0 for size in plan["bytes_by_part"].values())
    assert main(["plan", "configs/lora_8b.yaml"]) == 0
    assert f"base {2 * 8_030_261_248 / GIB:.2f} GiB" in capsys.readouterr().out


def test_a_meta_folder_is_planned_as_it_is(shared, tmp_path):
    file = tmp_path / "own.yaml"
    folder = shared("models/stories260K")
    file.write_text(f"recipe: sft\nbase: {{path: {folder}}}\ndata: {{train: rows.jsonl}}\n")
    assert plan_of(load(file).config).parameters.total == 260_032


def test_what_only_a_download_would_tell_is_refused(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("recipe: sft\nbase: {path: someone/else}\ndata: {train: rows.jsonl}\n")
    with pytest.raises(InputError, match="not known without a download"):
        plan_of(load(file).config)
