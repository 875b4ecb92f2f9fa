"""`export --format gguf`: read back by another reader, computed by the float64 reference."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from gguf_reading import GgufFile, greedy, read_gguf, reference_of_gguf
from safetensors.torch import load_file, save_file
from small_runs import NANO, flip_bit, write_base
from tolerances import GGUF_BFLOAT16, GGUF_FLOAT16, GGUF_FLOAT32, GGUF_Q8_0
from transformers import LlamaForCausalLM

from finetune import artifact, export, merge
from finetune.__main__ import main
from finetune.exports.gguf_model import gguf_name, rope_factors
from finetune.llama.architecture import PRESETS, from_llama_config
from finetune.llama.meta_layout import meta_to_hf_rows

LIMITS = {"f32": GGUF_FLOAT32, "f16": GGUF_FLOAT16, "bf16": GGUF_BFLOAT16, "q8_0": GGUF_Q8_0}
IDS = [1, 5, 900, 17, 300, 44, 601, 7, 7, 250, 1000, 12, 333, 90, 18, 512, 77, 261, 640, 3]


def exported(folder, out, *more: str) -> GgufFile:
    assert main(["export", str(folder), "--format", "gguf", "--out", str(out), *more]) == 0
    assert main(["verify", str(out)]) == 0
    (path,) = out.glob("*.gguf")
    return read_gguf(path)


def source_logits(folder, ids) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def difference(folder, file: GgufFile, ids) -> float:
    """The difference of logits, root mean square, relative to their standard deviation."""
    true = source_logits(folder, ids)
    return float((reference_of_gguf(file).logits(ids) - true).square().mean().sqrt() / true.std())


@pytest.fixture(scope="module")
def bases(tmp_path_factory, small_base, untied_base):
    """Tied with scaled RoPE (3.2), untied (3), untied without grouped heads (2); the embedded."""
    llama2 = write_base(tmp_path_factory.mktemp("bases") / "llama2", "llama2-7b")
    return {"tied": small_base, "untied": untied_base, "llama2": llama2, "nano": NANO}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["tied", "untied", "llama2", "nano"])
def test_the_logits_are_those_of_the_source(bases, tmp_path, name, kind):
    file = exported(bases[name], tmp_path / "out", "--type", kind)
    measured = difference(bases[name], file, IDS)
    assert measured < LIMITS[kind]
    matrices = {t for n, t in file.types.items() if file.tensors[n].dim() == 2}
    assert kind.upper() in matrices
    assert {t for n, t in file.types.items() if file.tensors[n].dim() == 1} == {"F32"}


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_the_embedded_base_writes_the_same_text(tmp_path, nano_tokenizer, kind):
    file = exported(NANO, tmp_path / "out", "--type", kind)
    prompt = nano_tokenizer("3 + 4 =")["input_ids"]
    model = LlamaForCausalLM.from_pretrained(NANO).eval()
    theirs = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )[0].tolist()
    assert greedy(reference_of_gguf(file), prompt, 12) == theirs[len(prompt) :]


def test_in_f32_every_weight_is_the_sources_bit_for_bit(bases, tmp_path):
    for name, folder in bases.items():
        file = exported(folder, tmp_path / name)
        arch = from_llama_config(json.loads((folder / "config.json").read_text()))
        weights = load_file(folder / "model.safetensors")
        expected = {gguf_name(n) for n in weights}
        if arch.rope_scaling:
            expected.add("rope_freqs.weight")
        assert set(file.tensors) == expected
        assert ("output.weight" in file.tensors) != arch.tie_word_embeddings
        for hf_name, weight in weights.items():
            found = file.tensors[gguf_name(hf_name)]
            if "q_proj" in hf_name or "k_proj" in hf_name:
                assert not torch.equal(found, weight)
                found = meta_to_hf_rows(found, weight.shape[0] // arch.head_dim)
            assert torch.equal(found, weight), hf_name


def test_the_keys_say_what_the_model_is(bases, tmp_path):
    keys = exported(bases["tied"], tmp_path / "out").keys
    arch = from_llama_config(json.loads((bases["tied"] / "config.json").read_text()))
    said = {key.removeprefix("llama."): keys[key] for key in keys if key.startswith("llama.")}
    assert said == {
        "vocab_size": arch.vocab_size,
        "context_length": arch.context,
        "embedding_length": arch.dim,
        "block_count": arch.n_layers,
        "feed_forward_length": arch.intermediate_size,
        "attention.head_count": arch.n_heads,
        "attention.head_count_kv": arch.n_kv_heads,
        "attention.key_length": arch.head_dim,
        "attention.value_length": arch.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(arch.norm_eps, rel=1e-6),
        "rope.dimension_count": arch.head_dim,
        "rope.freq_base": arch.rope_theta,
    }
    assert keys["general.architecture"] == "llama"
    assert keys["general.type"] == "model"
    assert keys["general.file_type"] == 0
    assert keys["general.quantization_version"] == 2
    assert not any("/" in str(value) for key, value in keys.items() if key.startswith("general"))


def test_without_permutation_or_divisors_the_logits_are_others(bases, tmp_path):
    """What the comparison is worth: each mistake alone is far above the tolerance."""
    file = exported(bases["tied"], tmp_path / "out")
    tensors = dict(file.tensors)
    tensors["blk.0.attn_k.weight"] = meta_to_hf_rows(tensors["blk.0.attn_k.weight"], 2)
    wrong = GgufFile(file.keys, tensors, file.types)
    assert difference(bases["tied"], wrong, IDS) > 100 * GGUF_FLOAT32
    tensors = {n: t for n, t in file.tensors.items() if n != "rope_freqs.weight"}
    wrong = GgufFile(file.keys, tensors, file.types)
    assert difference(bases["tied"], wrong, IDS) > 100 * GGUF_FLOAT32


def test_the_divisors_of_llama_31_are_the_published_ones():
    """Three regions for 8B: untouched, between, divided by 8; ends and one between by hand."""
    factors = rope_factors(PRESETS["llama3.1-8b"])
    assert len(factors) == 64
    assert factors[:28] == [1.0] * 28
    assert factors[-28:] == [pytest.approx(8.0)] * 28
    assert factors == sorted(factors)
    frequency = 500000.0 ** (-2 * 30 / 128)
    smooth = (8192 / (2 * 3.141592653589793 / frequency) - 1) / 3
    assert factors[30] == pytest.approx(1 / ((1 - smooth) / 8 + smooth))
    assert rope_factors(PRESETS["llama3-8b"]) is None


def test_the_type_is_the_stored_one_unless_asked(tmp_path):
    base = write_base(tmp_path / "base", dtype="bfloat16", max_shard_size="200KB")
    assert len(list(base.glob("model-*.safetensors"))) > 1
    file = exported(base, tmp_path / "out")
    assert {t for n, t in file.types.items() if file.tensors[n].dim() == 2} == {"BF16"}
    assert file.keys["general.file_type"] == 32
    assert difference(base, file, IDS) < GGUF_FLOAT32


def test_a_run_is_exported_with_its_own_prompt_format(bench, tmp_path):
    run = bench.train()
    merge.merge(run)
    file = exported(run.path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["small.gguf"]
    chat_format = merge.find_base(run.config(), run.path).chat_format
    assert file.keys["tokenizer.chat_template"] == chat_format.jinja()
    assert difference(run.merged, file, IDS) < GGUF_FLOAT32


def test_what_cannot_be_written_is_refused(small_base, tmp_path, capsys, monkeypatch):
    def refused(folder, code: int, *more: str, kind: str = "gguf") -> str:
        out = tmp_path / "out"
        assert main(["export", str(folder), "--format", kind, "--out", str(out), *more]) == code
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))
        return capsys.readouterr().err

    assert "--shards: has no effect on --format gguf" in refused(small_base, 2, "--shards", "2")
    assert "--type: has no effect" in refused(small_base, 2, "--type", "f16", kind="meta")
    assert "unknown; allowed: nano" in refused(small_base, 2, "--chat-format", "chatml")
    assert "neither a run" in refused(tmp_path, 2)
    copy = shutil.copytree(small_base, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    large = dict(weights) | {
        "model.layers.0.mlp.up_proj.weight": weights["model.layers.0.mlp.up_proj.weight"]
        .clone()
        .fill_(70000.0)
    }
    save_file(large, copy / "model.safetensors", {"format": "pt"})
    assert "use --type bf16" in refused(copy, 2, "--type", "f16")
    large["model.norm.weight"] = torch.full_like(large["model.norm.weight"], float("nan"))
    save_file(large, copy / "model.safetensors", {"format": "pt"})
    assert "not finite" in refused(copy, 2)
    published = tmp_path / "published"
    with artifact.staged(published) as stage:
        shutil.copytree(small_base, stage, dirs_exist_ok=True)
    flip_bit(published / "model.safetensors")
    assert "its content differs" in refused(published, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    assert "nothing written" in refused(small_base, 4)
    (tmp_path / "there").mkdir()
    argv = ["export", str(small_base), "--format", "gguf", "--out", str(tmp_path / "there")]
    assert main(argv) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_nothing(small_base, tmp_path, monkeypatch, capsys):
    def full(path, source, tensors, table):
        path.write_bytes(b"GGUF")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_gguf_model", full)
    argv = ["export", str(small_base), "--format", "gguf", "--out", str(tmp_path / "out")]
    assert main(argv) == 4
    assert "nothing published" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
