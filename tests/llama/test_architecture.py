"""Architectures against the facts file, transformers' own model, and a FLOP counter."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from finetune.errors import InputError
from finetune.llama import architecture as a

MODELS = sorted(a.PRESETS)


def test_arch_json_equals_the_facts_file(shared, capsys):
    facts = json.loads(shared("facts/llama_arch_facts.json").read_text())
    assert a.main(["--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(facts) == 15
    for name, fact in facts.items():
        row = rows[name.split(" ")[0].lower()]
        stated = {k: v for k, v in fact.items() if k not in ("source", "note", "unsourced")}
        assert {key: row[key] for key in stated} == stated, name


def test_every_row_of_arch_has_every_field(capsys):
    assert a.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [*a.PRESETS, "transformer-base"]
    for row in rows:
        assert row.keys() >= rows[0].keys()
        assert a.main([row["name"], "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [row]


def test_the_sizes_of_the_papers():
    """Independent of the facts file: widths and counts that the papers and cards print."""
    widths = {"llama1-33b": 17920, "llama2-70b": 28672, "llama3.1-405b": 53248}
    assert {name: a.PRESETS[name].intermediate_size for name in widths} == widths
    billions = {"llama1-7b": 6.7, "llama1-13b": 13.0, "llama1-33b": 32.5, "llama1-65b": 65.2}
    billions |= {"llama3.1-8b": 8.0, "llama3.2-1b": 1.24, "llama3.2-3b": 3.21}
    for name, size in billions.items():
        assert a.PRESETS[name].num_parameters().total / 1e9 == pytest.approx(size, abs=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_config_and_params_json_both_ways(name):
    arch = a.PRESETS[name]
    config = a.to_llama_config(arch, "bfloat16")
    assert a.from_llama_config(config) == arch
    assert a.from_llama_config(json.loads(config.to_json_string())) == arch
    params = json.loads(json.dumps(a.to_params_json(arch)))
    fields = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"}
    fields |= {"ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope"}
    assert set(params) <= fields  # Meta's own code takes no others
    back = a.from_params_json(
        params,
        tie_word_embeddings=arch.tie_word_embeddings,
        bos_token_id=arch.bos_token_id,
        eos_token_id=arch.eos_token_id,
    )
    assert back == arch


@pytest.mark.parametrize("name", MODELS)
def test_parameters_by_part_equal_those_of_transformers_model(name):
    import torch
    from transformers import LlamaForCausalLM

    arch = dataclasses.replace(a.scaled_down(a.PRESETS[name], 320), n_layers=3)
    with torch.device("meta"):
        model = LlamaForCausalLM(a.to_llama_config(arch))
    counts = {"embedding": 0, "attention": 0, "mlp": 0, "norm": 0, "head": 0}
    for path, weight in model.named_parameters():
        part = next(
            part
            for word, part in [
                ("norm", "norm"), ("embed", "embedding"), ("lm_head", "head"),
                ("attn", "attention"), ("mlp", "mlp"),
            ]
            if word in path
        )  # fmt: skip
        counts[part] += weight.numel()
    assert arch.num_parameters().as_dict() == counts | {"total": sum(counts.values())}


def test_the_405b_model_is_counted_without_allocating_it():
    import torch
    from transformers import LlamaForCausalLM

    arch = a.PRESETS["llama3.1-405b"]
    with torch.device("meta"):
        model = LlamaForCausalLM(a.to_llama_config(arch, "bfloat16"))
    assert model.num_parameters() == arch.num_parameters().total == 405_853_388_800


@pytest.mark.parametrize("name", ["llama1-7b", "llama3.2-3b", "llama3.1-405b"])
def test_flops_equal_those_that_torch_counts(name):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    arch = a.scaled_down(a.PRESETS[name], 320)
    config = a.to_llama_config(arch)
    config._attn_implementation = "eager"  # counts every pair of tokens, masked ones too
    model = LlamaForCausalLM(config)
    num_tokens = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
    expected = num_tokens * arch.flops_per_token(num_tokens).total
    assert counter.get_total_flops() == expected


def test_published_config_files_are_read(shared):
    folder = shared("facts/hf_configs")
    expected = {
        "70B_config_llama2.json": "llama2-70b",
        "8B_config_llama3.json": "llama3-8b",
        "70B_config_llama3.json": "llama3-70b",
        "8B_config_llama3.1.json": "llama3.1-8b",
        "70B_config_llama3.1.json": "llama3.1-70b",
    }
    for file, preset in expected.items():
        assert a.from_llama_config(json.loads((folder / file).read_text())) == a.PRESETS[preset]
    config = json.loads((folder / "7B_config_llama2.json").read_text())
    in_file = dataclasses.replace(a.PRESETS["llama2-7b"], context=2048)  # the file's own number
    assert a.from_llama_config(config) == in_file


def test_a_width_of_ones_own_survives_every_form():
    spec = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 300}
    for width in (1, 100, 170, 171, 172, 173, 640, 997):
        arch = a.architecture_of({**spec, "intermediate_size": width})
        assert arch.intermediate_size == width
        assert a.from_llama_config(a.to_llama_config(arch)).intermediate_size == width
        assert a.from_params_json(a.to_params_json(arch)).intermediate_size == width


def test_scaled_down_keeps_what_decides_the_code_path():
    for name in MODELS:
        big, small = a.PRESETS[name], a.scaled_down(a.PRESETS[name], 512)
        for field in ("tie_word_embeddings", "rope_theta", "rope_scaling", "norm_eps"):
            assert getattr(small, field) == getattr(big, field)
        assert small.head_dim == 16
        assert small.num_parameters().total < 700_000
        if big.n_heads // big.n_kv_heads <= 8:
            assert small.n_heads // small.n_kv_heads == big.n_heads // big.n_kv_heads
        assert all(i < 512 for i in small.eos_token_ids)


def test_params_json_takes_what_it_does_not_say_from_the_documented_model():
    llama32 = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
    llama32 |= {"ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-5}
    llama32 |= {"rope_theta": 500000.0, "use_scaled_rope": True}
    arch = a.from_params_json(llama32)
    assert arch.rope_scaling is not None
    assert (arch.rope_scaling.factor, arch.context) == (32.0, 131072)
    llama2 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5}
    assert a.from_params_json(llama2 | {"vocab_size": -1}, vocab_size=32000).context == 4096
    stretched = dataclasses.replace(arch, rope_scaling=a.RopeScaling(factor=8.0))
    assert a.from_params_json(a.to_params_json(stretched)).rope_scaling == stretched.rope_scaling
    other = a.from_params_json(llama32 | {"n_layers": 3})
    assert other.rope_scaling is not None
    assert other.rope_scaling.factor == 8.0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("llama3.1-8B", ["did you mean 'llama3.1-8b'"]),
        ("meta-llama/Llama-3.1-8B", ["hub id", "llama3.1-8b"]),
        ({"preset": "lama3-8b", "n_layer": 3, "dim": "x"}, ["'llama3-8b'", "'n_layers'", "'x'"]),
        ({"dim": 64}, ["n_layers, n_heads, vocab_size missing"]),
        ({"dim": 60, "n_layers": 0, "n_heads": 7, "vocab_size": 9}, ["n_layers: 0", "divide dim"]),
        ({"preset": "llama3.1-8b", "n_kv_heads": 5}, ["n_kv_heads: 5 does not divide"]),
        ({"preset": "llama3.1-8b", "rope_scaling": {"rope_type": "yarn", "factr": 3}},
         ["'yarn'", "did you mean 'factor'"]),
        ({"preset": "llama3-8b", "tie_word_embeddings": "yes"}, ["'yes' is neither"]),
        ({"preset": "llama3-8b", "n_layers": True}, ["True is not a whole number"]),
        ({"preset": "llama3-8b", "bos_token_id": 128256}, ["outside the vocabulary"]),
        ({"preset": "llama3-8b", "ffn_dim_multiplier": math.inf, "rope_theta": math.inf,
          "rope_scaling": {"factor": math.nan}, "norm_eps": 10**400},
         ["ffn_dim_multiplier: inf is not a finite", "rope_theta: inf", "factor: nan", "norm_eps"]),
        (3, ["neither a preset's name nor a mapping"]),
    ],
)  # fmt: skip
def test_wrong_specs_are_refused_with_all_findings(spec, words):
    with pytest.raises(InputError) as error:
        a.architecture_of(spec)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("value", ["8", math.nan, 0, -8.0, True, [8]])
def test_a_scaling_in_params_json_that_is_no_number_is_refused(value):
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 300, "use_scaled_rope": True}
    stated = a.from_params_json(params | {"rope_scaling_factor": 4}).rope_scaling
    assert stated == a.RopeScaling(factor=4.0)
    with pytest.raises(InputError, match=r"params.json rope_scaling.*factor"):
        a.from_params_json(params | {"rope_scaling_factor": value})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "mistral"}, "mistral"),
        ({"head_dim": 64}, "head_dim"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_size": None}, "hidden_size: missing"),
    ],
)
def test_a_config_that_cannot_be_expressed_is_refused(change, word):
    config = {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 300, "intermediate_size": 352}
    assert a.from_llama_config(config).n_kv_heads == 4
    with pytest.raises(InputError, match=word):
        a.from_llama_config(config | change)


def test_hub_ids_name_presets():
    assert set(a.HUB_IDS.values()) <= set(a.PRESETS)
    for hub_id, preset in {
        "meta-llama/Llama-2-7b-chat-hf": "llama2-7b",
        "meta-llama/Meta-Llama-3-8B-Instruct": "llama3-8b",
        "meta-llama/Meta-Llama-3.1-8B": "llama3.1-8b",
        "meta-llama/Llama-3.1-8B-Instruct": "llama3.1-8b",
        "meta-llama/Llama-3.3-70B-Instruct": "llama3.3-70b",
    }.items():
        assert a.HUB_IDS[hub_id] == preset


def test_reading_a_spec_imports_no_torch():
    code = (
        "import sys; from finetune.llama.architecture import *;"
        "architecture_of({'preset': 'llama3.1-405b', 'n_layers': 2}).num_parameters();"
        "main(['llama3.1-405b', '--json']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
