"""Every method is planned: its activations without memory, and what it holds as PEFT holds it."""

from __future__ import annotations

import pytest
import torch

from finetune.budget import budget_of
from finetune.config.adapter import SETTINGS, SOFT_PROMPTS
from finetune.config.loader import load
from finetune.devices import DEVICES, Cluster, Device
from finetune.footprint import AnyNumber
from finetune.llama.architecture import PRESETS, to_llama_config
from finetune.methods import method_of
from finetune.plan import plan_of

CONFIG = """\
recipe: sft
base: {architecture: llama3.2-1b, tokenizer: assets/llama-nano}
data: {train: rows.jsonl}
"""
NEEDS = {
    **{method: ["data.packing=false"] for method in SOFT_PROMPTS},
    "trainable_tokens": ["adapter.token_indices=[5]"],
}


@pytest.fixture
def config(tmp_path):
    def make(method: str):
        file = tmp_path / "plan.yaml"
        file.write_text(CONFIG)
        return load(file, (f"adapter.method={method}", *NEEDS.get(method, []))).config

    return make


@pytest.mark.parametrize("method", list(SETTINGS))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_method_is_planned(config, method, device):
    on = DEVICES["h100"] if device == "cuda" else Device("cpu", "cpu", None, None)
    plan = plan_of(config(method), Cluster(on), with_time=False)
    assert plan.bytes_by_part["activations"] > 0


@pytest.mark.parametrize("method", [m for m in SETTINGS if m not in ("none", *SOFT_PROMPTS)])
def test_what_a_method_holds_is_what_peft_holds(config, method):
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    asked = config(method)
    with torch.device("meta"), AnyNumber():
        model = LlamaForCausalLM(to_llama_config(PRESETS["llama3.2-1b"]))
        model.name_or_path = "base"
        frequencies = sum(tensor.nbytes for tensor in model.buffers())
        settings = method_of(asked.adapter).peft_config(asked.adapter, "base")
        model = get_peft_model(model, settings)
    buffers = sum(t.nbytes for t in model.buffers() if t.is_floating_point()) - frequencies
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert budget_of(asked).adapter == trained + buffers
