"""llama.cpp itself on what was exported, where its Python package is installed.

`pip install llama-cpp-python` builds it with a compiler and cmake.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_runs import NANO, write_base
from small_tokenizers import tiktoken_model
from tolerances import LLAMA_CPP
from transformers import LlamaForCausalLM

from finetune.__main__ import main
from finetune.llama.tokenizer import encode_text, load_tokenizer
from finetune.llama.tokenizer_proof import PROBE
from finetune.model import converted

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp's Python package is not installed")

TEXTS = [text for text in PROBE if text and "\x00" not in text]
STORY = "Once upon a time, there was a little girl named Lily."


def opened(folder, out, *more: str, **settings):
    argv = ["export", str(folder), "--format", "gguf", "--out", str(out)]
    assert main([*argv, *more]) == 0
    (path,) = out.glob("*.gguf")
    settings |= {"n_ctx": 512, "n_threads": 2, "logits_all": True, "verbose": False}
    return llama_cpp.Llama(str(path), **settings)


def greedy(model, ids: list[int], count: int) -> list[int]:
    return [token for token, _ in zip(model.generate(ids, temp=0.0), range(count), strict=False)]


def same_ids(model, tokenizer) -> None:
    for text in TEXTS:
        ours = [tokenizer.bos_token_id, *encode_text(tokenizer, text)]
        assert model.tokenize(text.encode(), add_bos=True, special=False) == ours, text


def logits_differ_by(model, folder, ids: list[int]) -> float:
    model.reset()
    model.eval(ids)
    true = folder
    if not isinstance(folder, torch.nn.Module):
        true = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = true(torch.tensor([ids])).logits[0]
    found = torch.from_numpy(model.scores[: len(ids)].copy()).double()
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.shared
def test_stories260k_tells_the_documented_story(shared, tmp_path):
    folder = shared("models/stories260K")
    model = opened(folder, tmp_path / "out")
    tokenizer = load_tokenizer(folder)
    same_ids(model, tokenizer)
    ids = greedy(model, [tokenizer.bos_token_id], 60)
    assert tokenizer.decode(ids).strip().startswith(STORY)
    assert logits_differ_by(model, converted(folder), [1, *ids]) < LLAMA_CPP


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_the_embedded_base_writes_what_transformers_writes(tmp_path, kind):
    model = opened(NANO, tmp_path / "out", "--type", kind)
    tokenizer = load_tokenizer(NANO)
    same_ids(model, tokenizer)
    prompt = tokenizer("3 + 4 =")["input_ids"]
    theirs = (
        LlamaForCausalLM.from_pretrained(NANO)
        .eval()
        .generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
        .tolist()
    )
    assert greedy(model, prompt, 12) == theirs[len(prompt) :]


@pytest.mark.parametrize("preset", ["llama3.1-8b", "llama3.2-1b"])
def test_scaled_rope_grouped_heads_and_byte_level_pieces(tmp_path, preset):
    base = write_base(tmp_path / "base", preset)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    (base / "tokenizer.model").write_bytes(tiktoken_model(1024))
    model = opened(base, tmp_path / "out", "--chat-format", "llama3.1")
    tokenizer = load_tokenizer(base)
    same_ids(model, tokenizer)
    assert logits_differ_by(model, base, list(range(3, 400, 3))) < LLAMA_CPP
    assert model.token_eos() == tokenizer.eos_token_id


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_does_to_the_base_what_pefts_does(tmp_path, small_base, use_rslora):
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(small_base, dtype=torch.float64)
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=use_rslora, target_modules=["q_proj", "k_proj", "up_proj"]
    )
    attached = get_peft_model(base, config).eval()
    for name, weight in attached.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    attached.save_pretrained(tmp_path / "adapter")
    argv = ["export", str(tmp_path / "adapter"), "--format", "gguf-lora"]
    assert main([*argv, "--base", str(small_base), "--out", str(tmp_path / "lora")]) == 0
    lora = str(tmp_path / "lora" / "adapter-lora.gguf")
    model = opened(small_base, tmp_path / "out", lora_path=lora)
    ids = list(range(3, 400, 3))
    assert logits_differ_by(model, attached, ids) < LLAMA_CPP
    assert logits_differ_by(model, small_base, ids) > 10 * LLAMA_CPP
