"""Every method is planned: its activations without memory, and what it holds as PEFT holds it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import calibration
from finetune.budget import budget_of
from finetune.config.adapter import SETTINGS, SOFT_PROMPTS
from finetune.config.loader import load
from finetune.devices import DEVICES, Cluster, Device
from finetune.footprint import AnyNumber
from finetune.llama.architecture import PRESETS, to_llama_config
from finetune.methods import method_of
from finetune.plan import plan_of

TINY = """\
recipe: sft
base:
  architecture: {dim: 128, n_layers: 4, n_heads: 4, vocab_size: 1024, context: 8192}
  tokenizer: assets/llama-nano
  dtype: float32
data: {train: rows.jsonl}
"""
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


# Of the seven projections, forward and backward, in three places; nobody asks the first layer's
# q, k and v for a gradient of their input.
UNPACKED = 7 * 2 * 3 - 3


@pytest.mark.parametrize(
    ("method", "quantization", "times"),
    [
        ("lora", "nf4", UNPACKED),
        ("lora", "fp4", UNPACKED),
        ("dora", "nf4", UNPACKED + 7 * 3),  # its norms read the weight too
        ("lora", "int8", 0),  # bitsandbytes writes that in torch's own operations
    ],
)
def test_a_quantised_layer_is_timed_as_it_trains(
    tmp_path, monkeypatch, method, quantization, times
):
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    file = tmp_path / "plan.yaml"
    file.write_text(TINY)
    config = load(file, (f"adapter.method={method}", f"base.quantization={quantization}")).config
    asked: Counter[str] = Counter()

    def once(run):
        with Asked(asked):
            run()
        return 1.0

    monkeypatch.setattr(calibration, "_timed", once)
    plan = plan_of(config, Cluster(Device("cpu", "cpu", None, None)))
    assert plan.seconds is not None
    found = [asked[f"bitsandbytes::{name}"] for name in ("dequantize_4bit", "gemm_4bit")]
    assert sum(found) == times


class Asked(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    def __init__(self, asked: Counter[str]) -> None:
        super().__init__()
        self.asked = asked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked[func.name().rsplit(".", 1)[0]] += 1
        return func(*args, **(kwargs or {}))
