"""The base of a run: found, refused where it is not whole, loaded in the type that was asked."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import NANO, flip_bit, same_bits, trainer_of, write_base
from transformers import AutoModelForCausalLM

from finetune import artifact
from finetune.adapters import report_parameters
from finetune.errors import InputError
from finetune.model import (
    find_base,
    generation_config,
    load_model,
    read_tokenizer,
    untrained_ids,
    weight_files,
)

CPU = torch.device("cpu")


@pytest.fixture
def copied(small_base, tmp_path):
    """A copy of the base that a test may spoil."""
    return shutil.copytree(small_base, tmp_path / "copied")


def opened(bench, *overrides):
    """The base of a config and its weights."""
    config = bench.load(*overrides).config
    base = find_base(config, bench.folder / "run")
    return base, load_model(base, config.base, CPU)


def edit_json(path, **values):
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content))


class TestLoading:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_weights_have_the_type_asked_for_and_rope_stays_float32(self, bench, dtype):
        _, model = opened(bench, f"base.dtype={dtype}")
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        rope = {n: b for n, b in model.named_buffers() if "inv_freq" in n}
        assert rope
        assert {b.dtype for b in rope.values()} == {torch.float32}
        _, exact = opened(bench)
        assert same_bits(rope, {n: b for n, b in exact.named_buffers() if "inv_freq" in n})
        for name, weight in exact.named_parameters():
            rounded = weight.to(getattr(torch, dtype))
            assert torch.equal(rounded, dict(model.named_parameters())[name])

    @pytest.mark.parametrize("preset", ["llama3.2-1b", "llama3-8b", "llama2-7b"])
    def test_logits_are_those_of_plain_transformers(self, bench, tmp_path, preset):
        folder = write_base(tmp_path / preset, preset, seed=5)
        _, model = opened(bench, f"base.path={folder}")
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        ids = torch.arange(3, 90).unsqueeze(0)
        with torch.no_grad():
            difference = model.eval()(ids).logits - theirs.eval()(ids).logits
        assert difference.abs().max() < 1e-4

    def test_a_base_in_shards_is_the_base_in_one_file(self, bench, small_base, tmp_path):
        folder = write_base(tmp_path / "sharded", max_shard_size="600KB")
        assert len(weight_files(folder)) > 2
        _, sharded = opened(bench, f"base.path={folder}")
        _, whole = opened(bench)
        assert same_bits(dict(sharded.named_parameters()), dict(whole.named_parameters()))

    def test_random_weights_follow_the_seed(self, bench):
        shape = "{preset: llama3-8b, dim: 32, n_layers: 1, n_heads: 4, n_kv_heads: 2,"
        shape += " vocab_size: 1024, ffn_dim_multiplier: null, multiple_of: 32}"
        settings = ("base.path=null", f"base.architecture={shape}", f"base.tokenizer={NANO}")
        folders = {}
        for name, seed in (("one", 0), ("again", 0), ("other", 1)):
            config = bench.load(*settings, f"run.seed={seed}").config
            folders[name] = find_base(config, bench.folder / name).folder
        read = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
        assert same_bits(read["one"], read["again"])
        assert not same_bits(read["one"], read["other"])
        assert artifact.findings_of(folders["one"]) == []
        before = (folders["one"] / "model.safetensors").stat().st_mtime_ns
        find_base(bench.load(*settings).config, bench.folder / "one")
        assert (folders["one"] / "model.safetensors").stat().st_mtime_ns == before

    def test_a_bfloat16_random_base_keeps_rope_exact(self, bench):
        shape = "{dim: 64, n_layers: 1, n_heads: 2, vocab_size: 1024, context: 4096}"
        settings = ("base.path=null", f"base.architecture={shape}", f"base.tokenizer={NANO}")
        _, model = opened(bench, *settings, "base.dtype=bfloat16")
        expected = 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        assert torch.allclose(model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-6)


class TestWhatIsRefused:
    def refused(self, bench, folder, match, *overrides):
        with pytest.raises(InputError, match=match):
            opened(bench, f"base.path={folder}", *overrides)

    def test_no_such_folder(self, bench, tmp_path):
        self.refused(bench, tmp_path / "nowhere", "no such folder")

    def test_a_folder_without_a_config(self, bench, copied):
        (copied / "config.json").unlink()
        self.refused(bench, copied, "config.json: no such file")

    def test_another_kind_of_model(self, bench, copied):
        edit_json(copied / "config.json", model_type="mistral")
        self.refused(bench, copied, "model_type is 'mistral'")

    def test_no_weights(self, bench, copied):
        (copied / "model.safetensors").unlink()
        self.refused(bench, copied, "no model.safetensors")

    def test_pickled_weights_alone(self, bench, copied):
        torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
        (copied / "model.safetensors").unlink()
        self.refused(bench, copied, "pickled weights .* are not read")

    @pytest.mark.parametrize("length", [0, 5, 5000, -1])
    def test_cut_off_weights(self, bench, copied, length):
        path = copied / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        self.refused(bench, copied, "model.safetensors")

    def test_a_weight_is_missing(self, bench, copied):
        path = copied / "model.safetensors"
        weights = load_file(path)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, path, {"format": "pt"})
        self.refused(bench, copied, "missing.*layers.1.mlp.up_proj")

    def test_a_weight_too_many(self, bench, copied):
        path = copied / "model.safetensors"
        weights = load_file(path) | {"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}
        save_file(weights, path, {"format": "pt"})
        self.refused(bench, copied, "unexpected.*layers.2.mlp.up_proj")

    def test_a_weight_of_another_shape(self, bench, copied):
        path = copied / "model.safetensors"
        weights = load_file(path)
        name = "model.layers.0.self_attn.o_proj.weight"
        weights[name] = weights[name][:, :-1].contiguous()
        save_file(weights, path, {"format": "pt"})
        self.refused(bench, copied, "layers.0.self_attn.o_proj")

    def test_a_shard_is_missing(self, bench, tmp_path):
        folder = write_base(tmp_path / "sharded", max_shard_size="600KB")
        weight_files(folder)[1].unlink()
        self.refused(bench, folder, "shards of the index are missing: model-00002")

    def test_an_index_that_points_outside(self, bench, tmp_path, small_base):
        folder = write_base(tmp_path / "sharded", max_shard_size="600KB")
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        first = next(iter(content["weight_map"]))
        content["weight_map"][first] = f"../../{small_base.name}/model.safetensors"
        index.write_text(json.dumps(content))
        self.refused(bench, folder, "a file of the same folder is allowed")

    def test_an_index_that_names_another_file_than_the_weights(self, bench, tmp_path):
        folder = write_base(tmp_path / "sharded", max_shard_size="600KB")
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        files = sorted(set(content["weight_map"].values()))
        first = next(name for name, file in content["weight_map"].items() if file == files[0])
        content["weight_map"][first] = files[1]
        index.write_text(json.dumps(content))
        self.refused(bench, folder, f"{files[1]}: has no {first}")

    @pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[1]", "<html>"])
    def test_an_index_that_is_none(self, bench, tmp_path, content):
        folder = write_base(tmp_path / "sharded", max_shard_size="600KB")
        (folder / "model.safetensors.index.json").write_text(content)
        self.refused(bench, folder, "model.safetensors.index.json")

    def test_no_tokenizer(self, bench, copied):
        for path in copied.glob("tokenizer*"):
            path.unlink()
        self.refused(bench, copied, "tokenizer")

    def test_a_tokenizer_with_more_ids_than_the_model(self, bench, tmp_path):
        from finetune.llama.architecture import PRESETS, scaled_down, to_llama_config
        from finetune.llama.tokenizer import load_tokenizer

        folder = tmp_path / "few"
        config = to_llama_config(scaled_down(PRESETS["llama3-8b"], 1000), "float32")
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        load_tokenizer(NANO / "tokenizer.model").save_pretrained(folder)
        self.refused(bench, folder, "the tokenizer has 1024 ids, the model 1000")

    def test_a_hub_id_that_is_not_in_the_cache_of_an_offline_machine(self, bench, monkeypatch):
        monkeypatch.setattr("finetune.hub.OFFLINE_BY_CHOICE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        self.refused(
            bench, "meta-llama/Llama-3.2-1B-Instruct", r"HF_HUB_OFFLINE is set.*local folder"
        )


class TestFingerprint:
    def test_of_a_copy_is_the_same_and_of_another_bit_is_another(self, bench, copied):
        base, _ = opened(bench)
        same, _ = opened(bench, f"base.path={copied}")
        assert same.fingerprint() == base.fingerprint()
        flip_bit(copied / "model.safetensors", 0.99)
        other, _ = opened(bench, f"base.path={copied}")
        assert other.fingerprint() != base.fingerprint()

    def test_of_another_shape_over_the_same_weights_is_another(self, bench, copied):
        base, _ = opened(bench)
        edit_json(copied / "config.json", rms_norm_eps=1e-4)
        other, _ = opened(bench, f"base.path={copied}")
        assert other.fingerprint() != base.fingerprint()


class TestTokens:
    def test_ids_that_training_never_touched_are_found(self, bench):
        _, model = opened(bench)
        assert untrained_ids(model, list(range(1024))) == []
        with torch.no_grad():
            model.get_input_embeddings().weight[[7, 900]] *= 1e-4
        assert untrained_ids(model, [5, 7, 8, 900, 901]) == [7, 900]

    def test_they_are_said_before_training(self, bench, copied, capfd):
        path = copied / "model.safetensors"
        weights = load_file(path)
        trainer_of(bench.load(f"base.path={copied}"))
        assert "never trained" not in capfd.readouterr().err
        weights["model.embed_tokens.weight"][[5, 1000]] = 0.0  # 5 is <|user|>, 1000 is in no row
        save_file(weights, path, {"format": "pt"})
        trainer_of(bench.load(f"base.path={copied}", "run.name=bare"))
        said = capfd.readouterr().err
        assert "use 1 token ids that the base never trained: <|user|>;" in said

    def test_generation_stops_where_the_format_says(self, bench):
        base, _ = opened(bench)
        assert generation_config(base) == {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": base.tokenizer.pad_token_id,
            "do_sample": False,
        }

    @pytest.mark.parametrize("recipe", ["sft", "pretrain"])
    def test_a_base_of_random_weights_stops_there_too(self, bench, recipe):
        """Its folder is a base like any other: others generate from it with its own settings."""
        overrides = (
            f"recipe={recipe}",
            *(["data.max_length=64"] if recipe == "pretrain" else []),
            "base={architecture: {dim: 64, n_layers: 1, n_heads: 4, vocab_size: 1024}, "
            f"tokenizer: {NANO}}}",
        )
        base = find_base(bench.load(*overrides).config, bench.folder / "run")
        settings = json.loads((base.folder / "generation_config.json").read_text())
        assert settings == generation_config(base)
        assert settings["eos_token_id"] == 2
        model = AutoModelForCausalLM.from_pretrained(base.folder)
        assert model.generation_config.eos_token_id == 2
        artifact.verify(base.folder)

    def test_the_tokenizer_of_preview_is_the_tokenizer_of_training(self, bench):
        base, _ = opened(bench)
        tokenizer, chat_format = read_tokenizer(bench.load().config)
        assert tokenizer.get_vocab() == base.tokenizer.get_vocab()
        assert chat_format == base.chat_format


class TestQuantized:
    @pytest.fixture(autouse=True)
    def _with_bitsandbytes(self):
        pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")

    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_projections_are_quantized_and_the_rest_is_not(self, bench, kind):
        _, model = opened(bench, f"base.quantization={kind}", "base.dtype=bfloat16")
        kinds = {n.rsplit(".", 1)[-1]: type(m).__name__ for n, m in model.named_modules()}
        assert kinds["q_proj"] == kinds["down_proj"] == "Linear4bit"
        assert kinds["lm_head"] == "Linear"
        state = model.model.layers[0].mlp.up_proj.weight.quant_state
        assert (state.quant_type, state.nested) == (kind, True)

    def test_4_bit_numbers_are_the_same_before_and_after_a_forward_pass(self, bench):
        """bitsandbytes would repack them in place on CPUs with bfloat16 units, in evaluation."""
        import bitsandbytes.functional as bnb

        _, model = opened(bench, "base.quantization=nf4")
        weight = model.model.layers[0].mlp.up_proj.weight
        before = bnb.dequantize_4bit(weight.data, weight.quant_state)
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(3, 20).unsqueeze(0), use_cache=False)
        assert torch.equal(bnb.dequantize_4bit(weight.data, weight.quant_state), before)

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads maps as Linux has them")
    def test_the_files_pages_are_left(self, bench, kind):
        """One tensor in them holds all of them: the full weights, beside the packed ones."""

        def num_mapped() -> int:  # by this test and those before it
            gc.collect()
            return Path("/proc/self/maps").read_text().count("model.safetensors")

        before = num_mapped()
        _, plain = opened(bench)
        embedding = plain.get_input_embeddings().weight.detach().clone()
        assert num_mapped() > before
        del plain
        before = num_mapped()
        _, model = opened(bench, f"base.quantization={kind}")
        assert num_mapped() <= before
        assert torch.equal(model.get_input_embeddings().weight, embedding)

    def test_the_report_counts_what_4_bit_numbers_stand_for(self, bench):
        plain = report_parameters(opened(bench)[1])
        quantized = report_parameters(opened(bench, "base.quantization=nf4")[1])
        assert quantized.num_total == plain.num_total

    def test_the_adapter_stays_float32_in_training(self, bench):
        """TRL casts adapters on quantised bases to bfloat16, where small updates vanish."""
        trainer = trainer_of(
            bench.load("base.quantization=nf4", "base.dtype=bfloat16", "train.max_steps=3")
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                assert parameter.dtype == torch.float32
                assert not torch.equal(parameter, before[name]), name
            else:
                assert torch.equal(parameter, before[name]), name
