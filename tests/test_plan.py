"""The arithmetic of `plan` against transformers' and PEFT's counts on models without memory."""

from __future__ import annotations

import contextlib
import json
import resource
from dataclasses import replace

import pytest
import torch
from small_runs import trainer_of

from finetune.__main__ import main
from finetune.budget import architecture_of_base, budget_of
from finetune.calibration import measure
from finetune.config.loader import load
from finetune.devices import DEVICES, GIB, Cluster, Device
from finetune.errors import InputError
from finetune.fast import attention, blocks, loss, products
from finetune.fast.head import _ON_GPU, LEAST_ROWS, NUM_LOGITS
from finetune.fast.loss import pack, token_losses
from finetune.footprint import (
    FIRST,
    LAST,
    build_layer,
    head_footprint,
    layer_footprints,
    layer_pass,
    layout_of,
    pinned,
)
from finetune.llama.architecture import PRESETS, to_llama_config
from finetune.plan import lines, plan_of
from finetune.workload import workload_of

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
        return budget_of(load(file, overrides).config)

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
    in_bfloat16 = planned("llama3.1-405b").base
    assert in_bfloat16 == 2 * plan.parameters.total
    assert 0.25 < plan.base / in_bfloat16 < 0.28


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_bytes_of_the_base_are_those_that_are_held(planned, small_base, quantization, tmp_path):
    from finetune.config.base import BaseSection
    from finetune.model import quantization_config, read_weights

    file = tmp_path / "own.yaml"
    file.write_text(
        f"recipe: sft\nbase: {{path: {small_base}, dtype: bfloat16, quantization: {quantization}}}"
        "\ndata: {train: rows.jsonl}\n"
    )
    plan = budget_of(load(file).config)
    section = BaseSection(path=str(small_base), dtype="bfloat16", quantization=quantization)
    import torch

    settings = {"dtype": torch.bfloat16}
    if quantization != "none":
        settings["quantization_config"] = quantization_config(section)
    model = read_weights(small_base, **settings)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    if quantization == "none":
        assert plan.base == held
    else:  # scales are beside the parameters, or rounded up to whole blocks
        assert 0.97 < plan.base / held < 1.05


def test_full_weights(planned):
    plan = planned("llama3.2-1b", "adapter.method=none", "base.dtype=float32")
    assert plan.trainable == plan.parameters.total == 1_235_814_400
    assert plan.optimizer == 8 * plan.trainable
    assert plan.adapter == 0


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "sgd"])
def test_the_moments_are_those_that_an_optimiser_keeps(planned, optim):
    import torch

    if "8bit" in optim:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="8-bit moments need bitsandbytes")
    weight = torch.nn.Parameter(torch.zeros(256, 1024))
    kinds = {
        "adamw_torch_fused": lambda: torch.optim.AdamW([weight], fused=True),
        "adamw_8bit": lambda: bitsandbytes.optim.AdamW8bit([weight]),
        "sgd": lambda: torch.optim.SGD([weight], lr=0.1),
    }
    optimizer = kinds[optim]()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.numel() > 256]
    held = sum(v.numel() * v.element_size() for v in kept)
    plan = planned("llama3.2-1b", f"train.optim={optim}")
    assert plan.optimizer / plan.trainable == pytest.approx(held / weight.numel(), abs=0.05)


def test_the_verb_plans_every_shipped_config(capsys):
    for config, parameters in [("lora_8b", 8_030_261_248), ("qlora_8b", 8_030_261_248),
                               ("lora_1b", 1_235_814_400), ("lora_nano", 2_600_000)]:  # fmt: skip
        arguments = ["plan", f"configs/{config}.yaml", "--device", "h100"]
        assert main([*arguments, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["parameters"] == pytest.approx(parameters, rel=0.05)
        assert plan["bytes"] == sum(plan["bytes_by_part"].values())
        assert plan["fits"]
        # the data sheet knows nothing of float32 products
        assert (plan["seconds_per_step"] is None) == (config == "lora_nano")
    assert main(["plan", "configs/lora_8b.yaml", "--device", "rtx3090"]) == 0
    shown = capsys.readouterr().out
    assert f"base {2 * 8_030_261_248 / GIB:.2f}" in shown
    assert "base, tokenizer or rows are not here" in shown
    assert main(["plan", "configs/lora_8b.yaml", "--device", "l4", "base.quantization=none",
                 "train.activation_checkpointing=false", "data.max_length=8192"]) == 0  # fmt: skip
    assert "does not fit; train.activation_checkpointing=true" in capsys.readouterr().out


def test_a_meta_folder_is_planned_as_it_is(shared, tmp_path):
    file = tmp_path / "own.yaml"
    folder = shared("models/stories260K")
    file.write_text(f"recipe: sft\nbase: {{path: {folder}}}\ndata: {{train: rows.jsonl}}\n")
    assert budget_of(load(file).config).parameters.total == 260_032


def test_what_only_a_download_would_tell_is_refused(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("recipe: sft\nbase: {path: someone/else}\ndata: {train: rows.jsonl}\n")
    with pytest.raises(InputError, match="not known without a download"):
        budget_of(load(file).config)


def cluster(name: str = "h100", count: int = 1, sharding: str = "ddp") -> Cluster:
    return Cluster(DEVICES[name], count, sharding)


@pytest.fixture
def config(tmp_path):
    def make(preset: str, *overrides: str):
        file = tmp_path / "plan.yaml"
        file.write_text(CONFIG.format(preset=preset))
        return load(file, overrides).config

    return make


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_devices_are_refused(capsys, count):
    assert main(["plan", "configs/lora_8b.yaml", "--device", "h100", "--devices", count]) == 2
    assert "--devices" in capsys.readouterr().err


def test_a_head_that_is_wrapped_holds_all_its_logits(config):
    tokens = ("adapter.method=trainable_tokens", "adapter.token_indices=[1, 2]")
    found = plan_of(config("llama3.2-1b", *tokens, "data.max_length=8192"), cluster())
    assert found.bytes_by_part["logits"] > 2 * GIB


def test_vectors_before_the_text_take_memory(config):
    soft = ("adapter.method=prompt_tuning", "data.packing=false")
    few, many = (
        plan_of(config("llama3.2-1b", *soft, f"adapter.num_virtual_tokens={n}"), cluster())
        for n in (20, 2000)
    )
    assert many.bytes_by_part["activations"] > 1.5 * few.bytes_by_part["activations"]


def test_sharding_divides_what_is_held_and_gathers_a_layer(config):
    asked = config("llama3.1-70b", "train.gradient_accumulation_steps=2")
    alone = plan_of(asked, cluster()).bytes_by_part
    ddp = plan_of(asked, cluster(count=8)).bytes_by_part
    fsdp = plan_of(asked, cluster(count=8, sharding="fsdp")).bytes_by_part
    assert ddp == {**alone, "buckets": alone["gradients"]}
    for part in ("base", "adapter", "gradients", "optimizer"):
        assert fsdp[part] == alone[part] // 8
    assert alone["base"] / 80 < fsdp["gathered"] < alone["base"] / 20
    assert fsdp["activations"] == alone["activations"]


def test_the_405b_model_has_activations_without_allocating_one(config):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_of(config("llama3.1-405b", "data.max_length=4096"), cluster())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    assert plan.bytes_by_part["activations"] > 100 * GIB
    assert plan.fits is False
    recomputed = plan_of(
        config("llama3.1-405b", "data.max_length=4096", "train.activation_checkpointing=true"),
        cluster(),
    )
    assert recomputed.bytes_by_part["activations"] < plan.bytes_by_part["activations"] / 8
    assert recomputed.flops > 1.3 * plan.flops


@pytest.mark.parametrize("recomputed", ["false", "true"])
def test_offloaded_activations_are_the_computers(config, recomputed):
    settings = ["data.max_length=4096", f"train.activation_checkpointing={recomputed}"]
    settings += ["train.gradient_accumulation_steps=2"]  # else gradients take their place
    here = plan_of(config("llama3.1-8b", *settings), cluster())
    away = plan_of(config("llama3.1-8b", *settings, "train.activation_offloading=true"), cluster())
    moved = here.bytes_by_part["activations"] - away.bytes_by_part["activations"]
    work, arch = here.workload.largest, PRESETS["llama3.1-8b"]
    layers = layer_footprints(here.config, arch, work, "cuda")
    middle, last = layers.middle, layers.last
    width = 2 * work.tokens * arch.dim  # bytes
    kept = width if recomputed == "true" else middle.kept
    if recomputed == "true":
        assert away.offloaded_bytes == 32 * pinned(width)
    else:  # each tensor by itself
        assert away.offloaded_bytes == 31 * middle.kept_pinned + last.kept_pinned
        assert kept <= middle.kept_pinned < 2 * kept
    # one layer is being worked on, the last or the one before it
    assert moved == max(31 * kept + last.peak, 30 * kept + middle.peak) - max(
        last.peak, middle.peak
    )
    assert here.offloaded_bytes == 0
    assert any("wait in the computer's memory" in line for line in lines(away))


@pytest.mark.parametrize(
    ("size", "block"),
    [(0, 0), (1, 1), (2, 2), (3, 4), (1 << 24, 1 << 24), ((1 << 24) + 1, 1 << 25)],
)
def test_pinned_memory_comes_in_powers_of_two(size, block):
    assert pinned(size) == block


def test_the_head_of_a_gpu_holds_more_logits_at_once(config):
    planned = config("llama3.1-8b", "base.dtype=bfloat16")
    arch = PRESETS["llama3.1-8b"]
    cpu, gpu = (head_footprint(planned, arch, 4096, kind) for kind in ("cpu", "cuda"))
    assert gpu.peak - cpu.peak > 4 * (_ON_GPU - max(NUM_LOGITS, 4096 * LEAST_ROWS)) / 1.1
    assert gpu.peak < 4 * 4096 * arch.vocab_size / 4  # of all logits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_times_rows_that_share_their_beginnings(bench):
    config = bench.load("base.dtype=bfloat16").config
    work = workload_of(config, 1)
    row = pack([([3, 4, 5, 6, n, n + 1], [True] * 6) for n in range(7, 27)])
    batch = replace(work.usual, lengths=row.document_lengths, supervised=100, row=row)
    seconds = measure(config, architecture_of_base(config), batch, 1000, "cuda")
    assert seconds.layers > 0


@pytest.mark.parametrize(("longest", "ratio"), [(0, (1.05, 2)), (1 << 20, (0.8, 1))])
def test_what_a_gpu_keeps_is_counted_in_its_types(monkeypatch, config, longest, ratio):
    """On a CPU, torch's attention copies to float32; that of short documents keeps no result."""
    monkeypatch.setattr(attention, "LONGEST", longest)
    overrides = ("base.dtype=bfloat16",)
    gpu = plan_of(config("llama3.2-1b", *overrides), cluster()).bytes_by_part
    cpu = Cluster(Device("cpu", "cpu", None, None))
    found = plan_of(config("llama3.2-1b", *overrides), cpu, with_time=False)
    assert ratio[0] < found.bytes_by_part["activations"] / gpu["activations"] < ratio[1]
    assert found.fits is None
    assert found.seconds is None


def test_rows_that_are_here_are_counted(bench):
    plan = plan_of(bench.load().config, with_time=False)
    assert plan.workload.steps is not None
    assert plan.as_json()["rows_known"]
    assert plan.as_json()["steps"] == 4
    run = bench.train()
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    largest = max(line["tokens"] for line in lines if "tokens" in line)
    assert plan.workload.largest.tokens >= largest


def test_the_largest_micro_batch_is_that_of_the_run(bench):
    """Of the epochs and the order that the run will have, not the worst that could be."""
    rows = ["data.packing=false", "train.per_device_train_batch_size=2", "train.max_steps=7"]
    work = plan_of(bench.load(*rows).config, with_time=False).workload
    run = bench.train(*rows)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert work.largest.tokens == max(line["tokens"] for line in steps)
    assert work.most_supervised == max(line["tokens_trained"] for line in steps)


@pytest.mark.parametrize(
    "settings", [(), ("fast.beginnings=false",), ("adapter.lora_dropout=0.1",)], ids=str
)
@pytest.mark.parametrize("few_sizes", [False, True])
def test_layers_are_planned_on_what_they_compute(bench, monkeypatch, settings, few_sizes):
    """Rows that reach the query and the output projection: of a run's layers and of the plan's."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: few_sizes)
    monkeypatch.setattr(blocks, "LEAST_SAVED", 0)
    if not few_sizes:
        monkeypatch.setattr(loss, "LEAST_SHARED", 0)
    loaded = bench.load(*settings, "adapter.target_modules=[q_proj, o_proj]")
    config, trainer = loaded.config, trainer_of(loaded)
    work = workload_of(config, 1)
    with rows_seen(trainer.model) as (of_query, of_output):
        token_losses(trainer.model, work.largest.row, beginnings=config.fast.beginnings)
    arch = architecture_of_base(config)
    layer = build_layer(config, arch)
    layout = layout_of(layer, config, work.largest, "cpu")
    with rows_seen(layer) as planned:
        for place in (FIRST, LAST):
            layer_pass(layer, config, arch, work.largest, layout, place, "cpu")()
    assert planned == ([of_query[0], of_query[-1]], [of_output[0], of_output[-1]])
    if "lora_dropout" not in str(settings) and few_sizes:  # which these rows share too little for
        assert of_query[0] == -(-work.largest.tokens // 16) * 16
    else:
        assert (of_query[0] < work.largest.tokens) == (settings == ())
    assert (of_output[-1] < of_query[0]) == ("lora_dropout" not in str(settings))


@contextlib.contextmanager
def rows_seen(model):
    """Rows of each call of q_proj, and of o_proj."""
    seen: tuple[list[int], list[int]] = ([], [])
    hooks = []
    for name, module in model.named_modules():
        for end, rows in zip(("q_proj", "o_proj"), seen, strict=True):
            if name.endswith(end):
                note = lambda _, args, rows=rows: rows.append(args[0].shape[-2])  # noqa: E731
                hooks.append(module.register_forward_pre_hook(note))
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_take_the_place_of_activations(config, micro_batches):
    """Of all weights: added to activations only where they are there from a micro-batch before."""
    steps = f"train.gradient_accumulation_steps={micro_batches}"
    full = config("llama3.2-1b", "adapter.method=none", "base.dtype=bfloat16", steps)
    parts = plan_of(full, cluster()).bytes_by_part
    layers = layer_footprints(full, PRESETS["llama3.2-1b"], workload_of(full, 1).largest, "cuda")
    at_most = 15 * layers.middle.kept + layers.last.peak
    beside = parts["activations"] + parts["logits"]
    assert (beside > at_most) == (micro_batches == 2)
    assert beside + parts["gradients"] > at_most


def test_those_of_an_adapter_too(config):
    one, two = (
        plan_of(
            config("llama3.2-1b", "adapter.r=64", f"train.gradient_accumulation_steps={count}"),
            cluster(),
        ).bytes_by_part
        for count in (1, 2)
    )
    assert one["activations"] + one["logits"] + one["gradients"] == (
        two["activations"] + two["logits"]
    )


def test_a_layers_time_is_measured(bench):
    plan = plan_of(bench.load().config)
    assert 0 < plan.seconds < 5
    assert plan.timing.startswith("measured here")
