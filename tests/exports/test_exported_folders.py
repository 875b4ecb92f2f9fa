"""`export --format hf`, `peft` and `gguf-lora`, and the model card of every output."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from gguf_reading import read_gguf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_runs import NANO, flip_bit, write_base
from tolerances import GGUF_FLOAT32
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import merge
from finetune.__main__ import main
from finetune.exports.card import LICENCES, generation_of
from finetune.exports.gguf_model import gguf_name
from finetune.exports.huggingface import is_served_by_vllm
from finetune.llama.architecture import HUB_IDS, PRESETS
from finetune.llama.meta_layout import meta_to_hf_rows
from finetune.llama.weight_files import files_by_weight


def export_to(out, target, kind: str, *more: str) -> None:
    assert main(["export", str(target), "--format", kind, "--out", str(out), *more]) == 0
    assert main(["verify", str(out)]) == 0


def weights_of_folder(folder) -> dict[str, torch.Tensor]:
    return {name: load_file(file)[name] for name, file in files_by_weight(folder).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hf_is_cut_anew_and_equal_bit_for_bit(tmp_path, dtype):
    base, out = write_base(tmp_path / "base", dtype=dtype), tmp_path / "out"
    export_to(out, base, "hf", "--max-file-gib", "0.0002")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    for file in out.glob("model-*"):
        assert sum(t.nbytes for t in load_file(file).values()) < 0.0002 * 2**30 or (
            len(load_file(file)) == 1
        )
    before, after = weights_of_folder(base), weights_of_folder(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.tensor([[1, 5, 900, 17]])
    one, other = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (base, out))
    assert other.dtype == getattr(torch, dtype)
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)
    text = "Nora is in the  harbour. <|user|>"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(base)(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_base):
    """A trained and merged run with an evaluation, on all seven projections."""
    from small_runs import Bench

    run = Bench(tmp_path_factory.mktemp("run"), small_base).train()
    merge.merge(run)
    assert main(["eval", str(run.path), "--against", "base,merged"]) == 0
    return run


def test_a_run_in_every_format_has_a_card_without_local_paths(run, tmp_path):
    for kind in ("hf", "gguf", "ollama", "peft", "gguf-lora"):
        export_to(tmp_path / kind, run.path, kind)
        text = (tmp_path / kind / "README.md").read_text()
        assert "/tmp" not in text and str(run.path.parent) not in text
        assert "| train | 24 | 24 |" in text
        assert "| adapter.r | 4 |" in text
        assert "| heldout | merged |" in text
        assert "## Loading" in text and "## Licence" in text and "peft 0" in text
        for file in (tmp_path / kind).glob("*.json"):
            assert "/tmp" not in file.read_text(), file
    stops = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert stops["do_sample"] is False


def test_an_adapter_is_the_same_bytes_for_peft(run, small_base, tmp_path):
    out = tmp_path / "out"
    export_to(out, run.path, "peft")
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (run.adapter / name).read_bytes()
    assert (
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
        == small_base.name
    )
    base = AutoModelForCausalLM.from_pretrained(small_base)
    ids = torch.tensor([[1, 5, 900, 17]])
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, out)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run.merged)(ids).logits
    assert torch.allclose(found, merged, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert "vllm serve" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({}, True),
        ({"use_dora": True}, False),
        ({"rank_pattern": {"q_proj": 2}}, False),
        ({"peft_type": "VERA"}, False),
    ],
)
def test_the_card_names_vllm_only_where_it_serves_the_adapter(tmp_path, settings, served):
    values = {"peft_type": "LORA", "use_dora": False, "rank_pattern": {}, **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert is_served_by_vllm(tmp_path) == served


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"layers.1.self_attn.k_proj": 2}},
    ],
)
def test_a_gguf_adapter_is_pefts_update(tmp_path, small_base, settings):
    """(alpha / r)·B·A of the file, its rows in llama.cpp's order, against PEFT's own product."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small_base), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    export_to(tmp_path / "out", adapter, "gguf-lora", "--base", str(small_base))
    (path,) = (tmp_path / "out").glob("*-lora.gguf")
    file = read_gguf(path)
    assert file.keys["general.type"] == "adapter"
    assert file.keys["general.architecture"] == "llama"
    assert file.keys["adapter.type"] == "lora"
    count = 0
    for module_name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        name = gguf_name(module_name.removeprefix("base_model.model.") + ".weight")
        a, b = file.tensors[f"{name}.lora_a"], file.tensors[f"{name}.lora_b"]
        found = file.keys["adapter.lora.alpha"] / b.shape[1] * (b @ a)
        if "attn_q" in name or "attn_k" in name:
            found = meta_to_hf_rows(found, found.shape[0] // 16)
        expected = module.get_delta_weight("default").detach()
        assert float((found - expected).norm() / expected.norm()) < GGUF_FLOAT32
        count += 1
    assert count * 2 == len(file.tensors) == 28


def test_what_has_no_place_is_refused(run, small_base, tmp_path, capsys):
    def refused(target, code: int, kind: str, *more: str) -> str:
        out = tmp_path / "out"
        assert main(["export", str(target), "--format", kind, "--out", str(out), *more]) == code
        assert not out.exists()
        return capsys.readouterr().err

    assert "neither a run with an adapter" in refused(small_base, 2, "peft")
    assert "neither a run with an adapter" in refused(small_base, 2, "gguf-lora")
    assert "must be above 0" in refused(small_base, 2, "hf", "--max-file-gib", "0")
    assert "no effect on --format peft" in refused(run.path, 2, "peft", "--type", "f16")
    adapter = shutil.copytree(run.adapter, tmp_path / "adapter")
    assert "name its base with --base" in refused(adapter, 2, "gguf-lora")
    based = ("--base", str(small_base))
    assert "B·A is" in refused(adapter, 3, "gguf-lora", "--base", str(NANO))
    flip_bit(adapter / "adapter_model.safetensors")
    assert "its content differs" in refused(adapter, 3, "gguf-lora", *based)
    (adapter / "manifest.json").unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for change, said in (
        ({"use_dora": True}, "is DoRA"),
        ({"peft_type": "VERA"}, "is VERA"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
        assert said in refused(adapter, 2, "gguf-lora", *based)


def test_every_documented_generation_has_its_licence():
    assert {generation_of(name, None) for name in HUB_IDS} | {"llama1"} == set(LICENCES)
    assert generation_of(None, PRESETS["llama3.2-1b"]) == "llama3.2"
    assert generation_of(None, PRESETS["llama3.1-70b"]) is None  # 3.3 has the same shape
    assert generation_of("my-model", None) is None
