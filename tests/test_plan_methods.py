"""Every method is planned: its activations without memory, and what it holds as PEFT holds it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from asked import Asked

from finetune import calibration
from finetune.budget import budget_of
from finetune.config.adapter import SETTINGS, SOFT_PROMPTS
from finetune.config.loader import load
from finetune.devices import DEVICES, Cluster, Device
from finetune.footprint import AnyNumber, layer_footprints
from finetune.llama.architecture import PRESETS, to_llama_config
from finetune.methods import method_of
from finetune.plan import plan_of
from finetune.workload import MicroBatch

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


# Of the seven projections in three places; the backward pass asks the first layer's q, k and v for
# no gradient of their input.
FORWARD, BACKWARD = 7 * 3, 7 * 3 - 3


@pytest.mark.parametrize(
    ("settings", "unpacked", "multiplied"),
    [
        (["base.quantization=nf4"], FORWARD + BACKWARD, 0),
        (["base.quantization=fp4"], FORWARD + BACKWARD, 0),
        (["base.quantization=nf4", "fast.lora=false"], BACKWARD, FORWARD),
        # DoRA's norms read the weight too
        (["base.quantization=nf4", "adapter.method=dora"], FORWARD + BACKWARD, FORWARD),
    ],
)
def test_a_packed_layer_is_timed_as_it_trains(
    tmp_path, monkeypatch, settings, unpacked, multiplied
):
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    asked = operations_timed(tmp_path, monkeypatch, settings)
    assert asked["bitsandbytes::dequantize_4bit"] == unpacked
    assert asked["bitsandbytes::gemm_4bit"] == multiplied


def test_a_layer_of_8_bits_is_timed_as_it_trains(tmp_path, monkeypatch):
    """bitsandbytes writes it in torch's own operations: the weight is cast for each product."""
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    settings = ["fast.lora=false"]  # as those layers train
    packed = operations_timed(tmp_path, monkeypatch, ["base.quantization=int8", *settings])
    plain = operations_timed(tmp_path, monkeypatch, settings)
    assert packed["aten::_to_copy"] - plain["aten::_to_copy"] > FORWARD


def operations_timed(folder, monkeypatch, settings) -> Counter[str]:
    """What torch is asked for while a layer is timed, each place once."""
    file = folder / "plan.yaml"
    file.write_text(TINY)
    asked = Asked()

    def once(run):
        with asked:
            run()
        return 1.0

    monkeypatch.setattr(calibration, "_timed", once)
    config = load(file, settings).config
    assert plan_of(config, Cluster(Device("cpu", "cpu", None, None))).seconds is not None
    return asked.counts


BATCH = MicroBatch([512], 256)


@pytest.mark.parametrize("targets", ["all", "[q_proj, v_proj]"])
@pytest.mark.parametrize(
    "settings", [[], ["fast.lora=false"], ["base.dtype=float16"], ["adapter.method=dora"]], ids=str
)
def test_the_weight_that_is_unpacked_is_counted(tmp_path, targets, settings):
    """Few tokens: the largest weight of a layer is most of what there is."""
    file = tmp_path / "plan.yaml"
    file.write_text(CONFIG.replace("llama3.2-1b", "llama3.1-8b"))
    overrides = [*([] if "dtype" in str(settings) else ["base.dtype=bfloat16"]), *settings]
    overrides += [] if targets == "all" else [f"adapter.target_modules={targets}"]
    plain, packed = (
        layer_footprints(
            load(file, [*overrides, f"base.quantization={kind}"]).config,
            PRESETS["llama3.1-8b"],
            BATCH,
            "cuda",
        ).middle
        for kind in ("none", "nf4")
    )
    largest = 14336 * 4096 * 2
    assert packed.kept == plain.kept
    if "dora" in str(settings):  # whose norms need as much at another time
        assert packed.peak >= plain.peak
    else:
        assert largest / 2 < packed.peak - plain.peak < 1.25 * largest
