"""Meta's layout in and out, against a float64 reference that shares no code with either side."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from reference import Scaling, reference_of
from safetensors.torch import load_file, save_file
from small_tokenizers import sentencepiece_model, tiktoken_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from finetune.errors import InputError
from finetune.llama import architecture as a
from finetune.llama import meta_format as meta
from finetune.llama.meta_layout import BY_COLUMNS, BY_ROWS, meta_to_hf_rows
from finetune.llama.tokenizer import fingerprint, load_tokenizer

IDS = [1, 17, 300, 5, 44, 44, 123, 9, 256, 77, 12, 310, 4, 4, 208, 31]
EMBEDDING_SPLITS = {"llama2": BY_COLUMNS, "llama3": BY_ROWS}


def small(family: str, **changes) -> a.Architecture:
    """A Llama of a few thousand weights, 8 query heads, so that 8 shards are possible."""
    spec = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 512}
    spec |= {"multiple_of": 16, "rope_theta": 10000.0, "norm_eps": 1e-5, "context": 16384}
    if family == "llama3":
        spec |= {"use_scaled_rope": True, "rope_theta": 500000.0}
    return a.architecture_of(spec | changes)


@pytest.fixture
def hf_folder(tmp_path):
    """`hf_folder(arch)`: a random model in a Hugging Face folder with its tokenizer's file."""

    def make(arch: a.Architecture, family: str, dtype: str = "float32", seed: int = 0) -> Path:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(a.to_llama_config(arch)).to(getattr(torch, dtype))
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            else:
                torch.nn.init.normal_(weight, std=0.2)
        folder = tmp_path / f"hf-{family}-{seed}"
        model.save_pretrained(folder)
        make_tokenizer = sentencepiece_model if family == "llama2" else tiktoken_model
        (folder / "tokenizer.model").write_bytes(make_tokenizer(arch.vocab_size))
        return folder

    return make


def shards_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(p, weights_only=True) for p in sorted(folder.glob("*.pth"))]


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def test_stories_continue_as_documented(shared, tmp_path):
    source = shared("models/stories260K")
    assert meta.main([str(source), "--out", str(tmp_path / "hf")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=90, do_sample=False)[0].tolist()
    expected = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith(expected)
    params = json.loads((source / "params.json").read_text())
    oracle = reference_of(shards_of(source)[0], params)
    assert (logits_of(tmp_path / "hf", ids) - oracle.logits(ids)).abs().max() < 1e-4
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(source))


def test_stories_come_back_bit_for_bit_through_any_number_of_shards(shared, tmp_path):
    source = shared("models/stories260K")
    meta.import_checkpoint(source, tmp_path / "hf")
    (original,) = shards_of(source)
    for num_shards in (1, 2, 4):
        meta.export_checkpoint(tmp_path / "hf", tmp_path / f"m{num_shards}", num_shards)
        meta.import_checkpoint(tmp_path / f"m{num_shards}", tmp_path / f"h{num_shards}")
        meta.export_checkpoint(tmp_path / f"h{num_shards}", tmp_path / f"b{num_shards}")
        (back,) = shards_of(tmp_path / f"b{num_shards}")
        assert back.keys() == original.keys()
        assert all(torch.equal(back[name], original[name]) for name in original)
        kept = json.loads((tmp_path / f"b{num_shards}" / "params.json").read_text())
        assert kept == json.loads((source / "params.json").read_text())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_both_split_rules_and_any_number_of_shards(family, num_shards, tied, hf_folder, tmp_path):
    """8 shards of 4 key heads store each key head twice, as 405B in 16 parts does."""
    arch = small(family, tie_word_embeddings=tied)
    source = hf_folder(arch, family, "bfloat16")
    meta.export_checkpoint(source, tmp_path / "meta", num_shards)
    shards = shards_of(tmp_path / "meta")
    rows, columns = shards[0]["tok_embeddings.weight"].shape
    split = EMBEDDING_SPLITS[family]
    expected = (512 // num_shards, 64) if split == BY_ROWS else (512, 64 // num_shards)
    assert (rows, columns) == expected
    assert shards[0]["layers.0.feed_forward.w2.weight"].shape[0] == 64
    if num_shards == 8:
        for even, odd in zip(shards[::2], shards[1::2], strict=True):
            name = "layers.1.attention.wk.weight"
            assert torch.equal(even[name], odd[name])
    meta.import_checkpoint(tmp_path / "meta", tmp_path / "back", max_file_bytes=60_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    before = LlamaForCausalLM.from_pretrained(source).state_dict()
    after = LlamaForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(weight, after[name]), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert a.from_llama_config(config).rope_scaling == arch.rope_scaling


@pytest.mark.parametrize("name", sorted(a.PRESETS))
def test_transformers_equals_the_reference_for_every_family(name, hf_folder, tmp_path):
    arch = a.scaled_down(a.PRESETS[name], 512)
    if arch.rope_scaling:  # a context of 24 makes the scaling matter for 40 tokens
        stretch = dataclasses.replace(arch.rope_scaling, original_max_position_embeddings=24)
        arch = dataclasses.replace(arch, rope_scaling=stretch)
    source = hf_folder(arch, "llama2")
    ids = (IDS * 3)[:40]
    scaling = arch.rope_scaling and Scaling(arch.rope_scaling.factor, 1.0, 4.0, 24)
    params = {"n_heads": arch.n_heads, "norm_eps": arch.norm_eps, "rope_theta": arch.rope_theta}
    weights = meta_weights(source, arch)
    actual = logits_of(source, ids)
    wanted = reference_of(weights, params, scaling).logits(ids)
    assert (actual - wanted).abs().max() < 1e-4
    if scaling:
        unscaled = reference_of(weights, params).logits(ids)
        assert (actual - unscaled).abs().max() > 1e-2


def meta_weights(hf_folder: Path, arch: a.Architecture) -> dict[str, torch.Tensor]:
    """Meta's tensors from a Hugging Face file, by index arithmetic of the test's own."""
    names = {
        "embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    }  # fmt: skip
    weights = {}
    for name, weight in load_file(hf_folder / "model.safetensors").items():
        new = name.removeprefix("model.")
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        if "q_proj" in name or "k_proj" in name:
            half = arch.head_dim // 2
            head_rows = [i // 2 + half * (i % 2) for i in range(arch.head_dim)]
            heads = weight.shape[0] // arch.head_dim
            weight = weight[[h * arch.head_dim + r for h in range(heads) for r in head_rows]]
        weights[new] = weight
    return weights


def test_an_import_without_the_permutation_fails_the_reference(hf_folder, tmp_path, monkeypatch):
    source = hf_folder(small("llama3"), "llama3")
    meta.export_checkpoint(source, tmp_path / "meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    oracle = reference_of(shards_of(tmp_path / "meta")[0], params, Scaling(8.0, 1.0, 4.0, 8192))
    wanted = oracle.logits(IDS)
    meta.import_checkpoint(tmp_path / "meta", tmp_path / "right")
    assert (logits_of(tmp_path / "right", IDS) - wanted).abs().max() < 1e-4
    monkeypatch.setattr(meta, "meta_to_hf_rows", lambda matrix, num_heads: matrix)
    meta.import_checkpoint(tmp_path / "meta", tmp_path / "wrong")
    assert (logits_of(tmp_path / "wrong", IDS) - wanted).abs().max() > 1e-1


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_each_shard_does_its_part_of_the_products(family, hf_folder, tmp_path):
    """What model parallelism asks of a shard, in Meta's own words: column-parallel parts give a
    slice of the output each, row-parallel parts take a slice of the input and are added up."""
    arch = small(family)
    source = hf_folder(arch, family)
    whole = {name: w.double() for name, w in meta_weights(source, arch).items()}
    meta.export_checkpoint(source, tmp_path / "meta", 4)
    shards = [{k: v.double() for k, v in s.items()} for s in shards_of(tmp_path / "meta")]
    torch.manual_seed(0)
    for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1",
                 "feed_forward.w3"):  # fmt: skip
        key = f"layers.1.{name}.weight"
        x = torch.randn(whole[key].shape[1], dtype=torch.float64)
        slices = [shard[key] @ x for shard in shards]
        assert torch.allclose(torch.cat(slices), whole[key] @ x, rtol=0, atol=1e-12), name
    for name in ("attention.wo", "feed_forward.w2"):
        key = f"layers.1.{name}.weight"
        x = torch.randn(whole[key].shape[1], dtype=torch.float64)
        parts = [shard[key] @ piece for shard, piece in zip(shards, x.chunk(4), strict=True)]
        assert torch.allclose(sum(parts), whole[key] @ x, rtol=0, atol=1e-12), name
    head = [shard["output.weight"] for shard in shards]
    assert torch.equal(torch.cat(head), whole["output.weight"])
    rows = [shard["tok_embeddings.weight"] for shard in shards]
    looked_up = torch.cat(rows)[77] if family == "llama3" else torch.cat([r[77] for r in rows])
    assert torch.equal(looked_up, whole["tok_embeddings.weight"][77])
    assert all(torch.equal(s["norm.weight"], whole["norm.weight"]) for s in shards)


def test_the_permutation_takes_pairs_apart():
    rows = torch.arange(12.0)[:, None]  # two heads of six channels
    turned = meta_to_hf_rows(rows, 2)[:, 0].tolist()
    assert turned == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_the_stop_ids_and_padding_of_a_llama3_folder(hf_folder, tmp_path):
    source = hf_folder(small("llama3"), "llama3")
    meta.export_checkpoint(source, tmp_path / "meta")
    meta.import_checkpoint(tmp_path / "meta", tmp_path / "hf", dtype="bfloat16")
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [257, 264, 265]  # end_of_text, eom, eot after 256 ranks
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (256, 260)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_cache_converts_once_for_each_content(hf_folder, tmp_path):
    source = hf_folder(small("llama2"), "llama2")
    meta.export_checkpoint(source, tmp_path / "meta")
    first = meta.cached_import(tmp_path / "meta", tmp_path / "cache")
    stamp = (first / "config.json").stat().st_mtime_ns
    assert meta.cached_import(tmp_path / "meta", tmp_path / "cache") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    shutil.copytree(tmp_path / "meta", tmp_path / "elsewhere" / "meta")
    assert meta.cached_import(tmp_path / "elsewhere" / "meta", tmp_path / "cache") == first
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-6}))
    assert meta.cached_import(tmp_path / "meta", tmp_path / "cache") != first


# --- bad input: one sentence with the file and the cause, exit 2, nothing written, nothing run


@pytest.fixture
def two_shards(hf_folder, tmp_path) -> Path:
    meta.export_checkpoint(hf_folder(small("llama3"), "llama3"), tmp_path / "meta", 2)
    return tmp_path / "meta"


HTML = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize("content", [HTML, LFS, b""], ids=["html", "lfs", "empty"])
@pytest.mark.parametrize("name", ["params.json", "tokenizer.model", "consolidated.01.pth"])
def test_failed_downloads_are_named(name, content, two_shards, tmp_path):
    (two_shards / name).write_bytes(content)
    cause = {HTML: "web page", LFS: "git-lfs", b"": "empty"}[content]
    refused(two_shards, tmp_path, name, cause)


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model", "consolidated.00.pth"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_cut_off_files_are_named(name, share, two_shards, tmp_path):
    content = (two_shards / name).read_bytes()
    (two_shards / name).write_bytes(content[: int(len(content) * share)])
    refused(two_shards, tmp_path, name)


def test_a_missing_shard(two_shards, tmp_path):
    os.rename(two_shards / "consolidated.01.pth", two_shards / "consolidated.02.pth")
    refused(two_shards, tmp_path, "consolidated.01.pth missing")
    (two_shards / "consolidated.02.pth").unlink()  # the last one: only the shapes can tell
    refused(two_shards, tmp_path, "or one is missing")


@pytest.mark.parametrize("twin", ["consolidated.0.pth", "consolidated.000.pth"])
def test_two_names_of_one_shard(twin, two_shards, hf_folder, tmp_path):
    other = hf_folder(small("llama3"), "llama3", seed=1)
    meta.export_checkpoint(other, tmp_path / "other", 2)
    shutil.copy(tmp_path / "other" / "consolidated.00.pth", two_shards / twin)
    refused(two_shards, tmp_path, twin, "consolidated.00.pth", "are both shard 0")


def test_shards_of_two_models(two_shards, hf_folder, tmp_path):
    other = hf_folder(small("llama3"), "llama3", seed=1)
    meta.export_checkpoint(other, tmp_path / "other", 2)
    shutil.copy(tmp_path / "other" / "consolidated.01.pth", two_shards)
    refused(two_shards, tmp_path, "consolidated.01.pth", "another model", "norm")


def test_one_shard_under_two_names(two_shards, tmp_path):
    shutil.copy(two_shards / "consolidated.00.pth", two_shards / "consolidated.01.pth")
    refused(two_shards, tmp_path, "consolidated.01.pth", "same part", "consolidated.00.pth")


def test_a_params_json_of_another_size(two_shards, tmp_path):
    params = json.loads((two_shards / "params.json").read_text())
    for change in ({"n_layers": 3}, {"dim": 128}, {"n_kv_heads": 8}, {"multiple_of": 256}):
        (two_shards / "params.json").write_text(json.dumps(params | change))
        refused(two_shards, tmp_path, "params.json")
    (two_shards / "params.json").write_text(json.dumps(params | {"n_layers": 10**15}))
    refused(two_shards, tmp_path, "has 2 layers, params.json says 1000000000000000")


def test_a_params_json_of_another_kind_of_model(two_shards, tmp_path):
    params = json.loads((two_shards / "params.json").read_text())
    (two_shards / "params.json").write_text(json.dumps(params | {"vision_chunk_size": 448}))
    refused(two_shards, tmp_path, "params.json", "vision_chunk_size")


def test_a_tokenizer_that_is_too_large(two_shards, tmp_path):
    (two_shards / "tokenizer.model").write_bytes(sentencepiece_model(520))
    refused(two_shards, tmp_path, "520 tokens", "512 rows")


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_runs_code_is_not_run(as_zip, two_shards, tmp_path):
    trace = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    path = two_shards / "consolidated.00.pth"
    torch.save({"norm.weight": Payload()}, path, _use_new_zipfile_serialization=as_zip)
    assert zipfile.is_zipfile(path) is as_zip
    refused(two_shards, tmp_path, "consolidated.00.pth", "more than tensors", "system")
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_one_sentence_whatever_pickle_it_is(protocol, two_shards, tmp_path, recwarn):
    path = two_shards / "consolidated.00.pth"
    path.write_bytes(pickle.dumps({"norm.weight": os.system}, protocol))
    refused(two_shards, tmp_path, "consolidated.00.pth", "nothing of it was executed")
    path.write_bytes(bytes(5000))  # an empty archive of a kind that PyTorch once wrote
    refused(two_shards, tmp_path, "consolidated.00.pth", "damaged")
    with pytest.raises(InputError) as error:
        meta.import_checkpoint(two_shards, tmp_path / "out")
    assert "PyTorch 2" not in str(error.value)
    assert not recwarn.list


def test_a_flipped_bit_in_the_weights_is_seen(two_shards, tmp_path):
    path = two_shards / "consolidated.01.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)  # PyTorch itself notices nothing
    refused(two_shards, tmp_path, "consolidated.01.pth", "damaged", "checksum")


def test_weights_of_other_names_or_types(two_shards, tmp_path):
    path = two_shards / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"extra.weight": torch.zeros(2)}, path)
    refused(two_shards, tmp_path, "extra.weight is no weight")
    torch.save({name: t.half() for name, t in state.items()}, path)
    refused(two_shards, tmp_path, "several types")
    torch.save({name: t.to(torch.int8) for name, t in state.items()}, path)
    refused(two_shards, tmp_path, "weights of type int8")
    torch.save(state | {"norm.weight": state["norm.weight"].to_sparse()}, path)
    refused(two_shards, tmp_path, "norm.weight is sparse")
    torch.save({name: t.to("meta") for name, t in state.items()}, path)
    refused(two_shards, tmp_path, "is without content")
    torch.save([1, 2], path)
    refused(two_shards, tmp_path, "no table of named tensors")


def test_export_refuses_what_cannot_be_cut_or_is_no_llama(hf_folder, tmp_path):
    source = hf_folder(small("llama3"), "llama3")
    for num_shards in (0, 3, 5):
        with pytest.raises(InputError, match=f"num_shards: {num_shards}"):
            meta.export_checkpoint(source, tmp_path / "out", num_shards)
    weights = load_file(source / "model.safetensors")
    save_file({"v_head.weight": torch.zeros(2), **weights}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"v_head\.weight"):
        meta.export_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refused(source: Path, tmp_path: Path, *words: str) -> None:
    """The import fails with these words in its message, and leaves nothing behind."""
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        meta.import_checkpoint(source, tmp_path / "out")
    for word in words:
        assert word in str(error.value)
    assert str(source) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
