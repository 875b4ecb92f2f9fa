"""Several adapters merged at once, against PEFT's own combination of them on a whole model."""

from __future__ import annotations

import json
import shutil

import pytest
import tolerances
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from small_runs import republish
from transformers import AutoModelForCausalLM

from finetune import artifact
from finetune.__main__ import main
from finetune.errors import CheckFailed
from finetune.inference import open_variant
from finetune.merge import plan_merge
from finetune.merging.combine import Combined, seed_of
from finetune.merging.members import WAYS, asked_for
from finetune.model import find_base
from finetune.run_folder import RunFolder

IDS = torch.arange(3, 100).unsqueeze(0)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def by_peft(monkeypatch, base, runs, weights, how, density=None, seed=0):
    """`add_weighted_adapter` on a whole model, its draws begun anew for each layer as ours are."""
    combination = asked_for(runs[0], [f"{runs[1].path}:1"], how="dare_ties", density=1, seed=seed)
    model = PeftModel.from_pretrained(plain(base), runs[0].adapter, adapter_name="0")
    for number, run in enumerate(runs[1:], 1):
        model.load_adapter(run.adapter, adapter_name=str(number))
    names = {id(m): n.removeprefix("base_model.model.") for n, m in model.named_modules()}
    right = LoraModel._generalized_task_arithmetic_weighted_adapter

    def seeded(self, how, adapters, weights, target, *rest):
        torch.manual_seed(seed_of(combination, names[id(target)]))
        return right(self, how, adapters, weights, target, *rest)

    monkeypatch.setattr(LoraModel, "_generalized_task_arithmetic_weighted_adapter", seeded)
    adapters = [str(n) for n in range(len(runs))]
    model.add_weighted_adapter(adapters, weights, "all", how, density=density)
    monkeypatch.undo()
    model.set_adapter("all")
    return model


DENSITY = {"ties": 0.4, "dare_linear": 0.6, "dare_ties": 0.6}
CASES = {
    **{how: (how, {"one": 1.0, "two": 0.5}) for how in WAYS},
    **{f"{how}, negative": (how, {"one": 0.7, "two": -0.5, "three": 0.3}) for how in WAYS},
    "patterns": ("linear", {"patterns": -1.0, "patterns too": 2.0}),
    "patterns and ties": ("ties", {"patterns": 1.0, "patterns too": 1.0}),
    "ranks and patterns": ("cat", {"patterns": 0.5, "rank 6": 1.5, "one": -0.25}),
    "a part of the matrices": ("dare_ties", {"few": 1.0, "one": 1.0}),
    "pissa and olora": ("ties", {"pissa": 0.5, "olora": 0.5}),
    "lora+": ("cat", {"lora+": 0.5, "one": 0.5}),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "tied") for name in CASES), *((way, "untied") for way in WAYS)]
)
def test_it_is_what_peft_makes_of_them(
    make, merged, monkeypatch, small_base, untied_base, name, kind
):
    how, weights = CASES[name]
    first, *others = weights.items()
    options = [f"--weight={first[1]}", f"--combine={how}"]
    if how in DENSITY:
        options.append(f"--density={DENSITY[how]}")
    if how.startswith("dare"):
        options.append("--seed=3")
    folder, record = merged(first[0], *options, add=others, kind=kind)
    base = small_base if kind == "tied" else untied_base
    runs = [make(run, kind) for run in weights]
    model = by_peft(monkeypatch, base, runs, list(weights.values()), how, DENSITY.get(how), 3)
    expected = logits(model)
    found = load_file(folder / "model.safetensors")
    oracle = dict(model.merge_and_unload(safe_merge=True).named_parameters())
    before = load_file(base / "model.safetensors")
    assert set(found) == set(before)
    changed = [key for key in found if not torch.equal(found[key], before[key])]
    assert len(changed) == record["matrices"] > 0
    for key, weight in found.items():
        if key in changed:
            worst = (weight - oracle[key]).abs().max() / weight.abs().max()
            assert worst < 1e-6, key
        else:
            assert torch.equal(weight, before[key]), key
    assert (logits(plain(folder)) - expected).abs().max() <= tolerances.MERGED_LOGITS_FLOAT32
    assert (expected - logits(plain(base))).abs().max() > 0.1, "they were trained"


@pytest.mark.parametrize(
    "name", ["linear", "cat, negative", "ties, negative", "dare_linear", "dare_ties"]
)
def test_a_and_b_are_pefts_bit_for_bit(make, monkeypatch, small_base, name):
    how, weights = CASES[name]
    runs = [make(run) for run in weights]
    (own, *others), density = weights.items(), DENSITY.get(how)
    added = [f"{make(run).path}:{weight}" for run, weight in others]
    seed = 3 if how.startswith("dare") else None
    combination = asked_for(runs[0], added, own[1], how, density, seed)
    updates = plan_merge(runs[0], combination=combination).updates
    model = by_peft(monkeypatch, small_base, runs, list(weights.values()), how, density, 3)
    for key, update in updates.items():
        assert isinstance(update, Combined)
        layer = model.get_submodule(f"base_model.model.{update.module}")
        a, b = update.factors()
        assert torch.equal(a, layer.lora_A["all"].weight[: len(a)]), key
        assert torch.equal(b, layer.lora_B["all"].weight[:, : len(a)]), key
        assert layer.scaling["all"] == 1


def by_hand(base, runs, weights):
    """W + Σ w·s·B·A in float64 from the files alone."""
    expected = {key: w.double() for key, w in load_file(base / "model.safetensors").items()}
    for run, weight in zip(runs, weights, strict=True):
        settings = json.loads((run.adapter / "adapter_config.json").read_text())
        root = 0.5 if settings["use_rslora"] else 1
        for key, a in (tensors := load_file(run.adapter / "adapter_model.safetensors")).items():
            if ".lora_A." in key:
                b = tensors[key.replace("lora_A", "lora_B")].double()
                scale = weight * settings["lora_alpha"] / len(a) ** root
                module = key.removeprefix("base_model.model.").replace(".lora_A", "")
                expected[module] += scale * b @ a.double()
    return expected


def test_adapters_keep_their_own_scale_and_layers(make, merged, small_base):
    """On a whole model PEFT takes both from the first adapter: √r too much, and one layer alone."""
    folder, _ = merged("rslora", add=[("layer 1", -0.5), ("rank 6", 2)])
    runs = [make(name) for name in ("rslora", "layer 1", "rank 6")]
    found = load_file(folder / "model.safetensors")
    for key, expected in by_hand(small_base, runs, (1, -0.5, 2)).items():
        torch.testing.assert_close(found[key].double(), expected, rtol=0, atol=1e-6)


def test_updates_that_nearly_cancel_are_still_proven(make, merged, tmp_path, small_base):
    near = RunFolder(shutil.copytree(make("one").path, tmp_path / "near"))
    weights = near.adapter / "adapter_model.safetensors"
    save_file({k: 1.0001 * t for k, t in load_file(weights).items()}, weights, {"format": "pt"})
    republish(near.adapter)
    folder, record = merged("one", f"--add={near.path}:-1")
    assert record["proof"]["max_weight_error_ulps"] <= 0.5001
    expected = by_hand(small_base, [make("one"), near], (1, -1))
    for key, found in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(found.double(), expected[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", ["0.5", "-2"])
def test_one_adapter_may_have_a_weight(make, merged, small_base, weight):
    folder, record = merged("one", f"--weight={weight}")
    assert [member["weight"] for member in record["adapters"]] == [float(weight)]
    expected = by_hand(small_base, [make("one")], [float(weight)])
    for key, found in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(found.double(), expected[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["full", "dequantized"])
def test_adapters_of_quantized_runs(make, merged, target):
    _, record = merged("nf4", f"--base={target}", add=[("nf4 too", 0.5)])
    assert record["base_weights"] == target
    found = record["proof"]["kl_from_trained"]
    assert found["dequantized"] < found["full"]


class TestFolder:
    def test_record_and_manifest_name_every_adapter(self, make, merged, tmp_path):
        options = ["--combine=dare_ties", "--density=0.5", "--dtype=bfloat16"]
        folder, record = merged("one", *options, add=[("two", 0.5), ("three", -1)])
        assert (record["combination"], record["density"], record["seed"]) == ("dare_ties", 0.5, 0)
        hashes = [
            artifact.sha256_of(make(name).adapter / "adapter_model.safetensors")
            for name in ("one", "two", "three")
        ]
        assert record["adapters"] == [
            {"name": name, "sha256": sha256, "weight": weight}
            for name, sha256, weight in zip(
                ("one", "two", "three"), hashes, (1, 0.5, -1), strict=True
            )
        ]
        facts = artifact.verify(folder)["facts"]
        assert facts["merged_adapters"] == hashes
        assert {**record, **facts} == record
        assert record["proof"]["dtype"] == "bfloat16"

    def test_it_is_no_base_for_any_of_them(self, make, merged, tmp_path, small_base, capsys):
        folder, _ = merged("one", add=[("two", 0.5)])
        for name in ("one", "two"):
            run = RunFolder(shutil.copytree(make(name).path, tmp_path / name))
            config = run.config_file.read_text().replace(str(small_base), str(folder))
            run.config_file.write_text(config)
            with pytest.raises(CheckFailed, match="this adapter is in it already"):
                open_variant(run, "adapter")
            fingerprint = find_base(run.config(), run.path).fingerprint()
            republish(run.adapter, base_fingerprint=fingerprint)
            assert main(["merge", str(run.path)]) == 3
            assert "this adapter is merged into it already" in capsys.readouterr().err
            third = make("three")
            assert main(["merge", str(run.path), f"--add={third.path}:1"]) == 3
            assert "this adapter is merged into it already" in capsys.readouterr().err

    def test_merging_again_changes_nothing_and_another_weight_is_another_merge(
        self, make, merged, capsys
    ):
        folder, record = merged("one", add=[("two", 0.5)])
        assert merged("one", add=[("two", 0.5)])[1] == record
        command = ["merge", str(make("one").path), "--out", str(folder)]
        assert main([*command, f"--add={make('two').path}:0.6"]) == 2
        assert main(command) == 2
        assert capsys.readouterr().err.count("holds another merge") == 2

    def test_an_adapter_folder_stands_for_its_run(self, make, merged, tmp_path):
        alone = shutil.copytree(make("two").adapter, tmp_path / "mine")
        _, record = merged("one", f"--add={alone}:0.5", f"--add={make('three').adapter}:1")
        assert [member["name"] for member in record["adapters"]] == ["one", "mine", "three"]

    def test_a_plan_names_them_and_writes_nothing(self, make, capsys):
        run = make("one")
        before = sorted(run.path.rglob("*"))
        command = ["merge", str(run.path), f"--add={make('two').path}:0.5", "--plan", "--json"]
        assert main(command) == 0
        captured = capsys.readouterr()
        plan = json.loads(captured.out)
        assert [member["weight"] for member in plan["adapters"]] == [1, 0.5]
        (line,) = [t for t in plan["tensors"] if t["name"].endswith("layers.1.mlp.up_proj.weight")]
        assert len(line["adapter"]) == 4
        assert "cat of 1 x one, 0.5 x two" in captured.err
        assert sorted(run.path.rglob("*")) == before


def test_the_card_of_what_is_exported_lists_the_adapters(merged, tmp_path):
    ways = ("--combine", "dare_linear", "--density", "0.5", "--seed", "3", "--weight", "0.75")
    folder, record = merged("one", *ways, add=[("two", -0.5)])
    assert main(["export", str(folder), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "combined by dare_linear, density 0.5, seed 3." in card
    for name, weight, adapter in zip(
        ("one", "two"), ("0.75", "-0.5"), record["adapters"], strict=True
    ):
        assert f"| {name} | {weight} | {adapter['sha256']} |" in card
