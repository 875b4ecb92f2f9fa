"""One contract for every method: it starts as the base, trains alone, comes back and merges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tolerances
import torch
from method_cases import (
    CASES,
    MERGED,
    Case,
    Trained,
    attached,
    inputs_of,
    logits,
    plain,
)
from peft import PeftConfig
from safetensors.torch import load_file

from finetune import artifact
from finetune.adapters import ADAPTER_FILES, attach, load_adapter, merged_weight, report_parameters
from finetune.config import AdapterSection
from finetune.errors import CheckFailed, InputError
from finetune.inference import open_variant
from finetune.layer_merge import tensors_of
from finetune.llama.architecture import PRESETS, from_llama_config, to_llama_config
from finetune.methods import METHODS, method_of, why_not_merged
from finetune.model import find_base


@pytest.fixture(scope="module", autouse=True)
def _small_layers(one_thread):
    """Of every test here."""


def section_of(done: Trained) -> AdapterSection:
    return done.run.config().adapter


@pytest.mark.parametrize("name", CASES)
class TestTraining:
    def test_it_starts_as_the_base(self, trained, name):
        """PiSSA and OLoRA move a part of W into the adapter and back: equal but for rounding."""
        done, case = trained(name), CASES[name]
        if case.starts_as_base is None:
            return
        expected = logits(open_variant(done.run, "base").model)
        # A fresh one: bitsandbytes' int8 layers change hands of their scales in a forward pass.
        base = open_variant(done.run, "base").model
        model = attach(base, section_of(done), "b", done.run.start, inputs_of(done.run))
        if case.starts_as_base:
            assert torch.equal(logits(model.eval()), expected)
        else:
            worst = (logits(model.eval()) - expected).abs().max()
            assert worst < tolerances.STEP_ZERO_FLOAT32

    def test_the_adapter_trains_and_nothing_else(self, trained, name):
        done = trained(name)
        assert done.trains
        for parameter, before in done.before.items():
            moved = not torch.equal(before, done.after[parameter])
            assert moved == (parameter in done.trains), parameter
            if moved:
                assert before.dtype == torch.float32, parameter

    def test_the_files_of_the_base_are_as_they_were(self, trained, name):
        done = trained(name)
        facts = artifact.read_manifest(done.run.adapter)["facts"]
        assert (
            find_base(done.run.config(), done.run.path).fingerprint() == facts["base_fingerprint"]
        )

    def test_it_trains_as_many_numbers_as_its_formula_says(self, trained, name):
        done = trained(name)
        adapter, arch = section_of(done), from_llama_config(plain(done.base).config)
        assert done.num_trainable == method_of(adapter).num_trainable(adapter, arch)


@pytest.mark.parametrize("name", CASES)
def test_it_comes_back_in_our_loader_and_in_plain_peft(trained, name):
    done, case = trained(name), CASES[name]
    limit = tolerances.RELOADED_FLOAT32
    ours = logits(open_variant(done.run, "adapter").model)
    assert (ours - done.logits).abs().max() <= limit
    if case.quantized == "none":
        assert (logits(attached(done.run, done.base)) - ours).abs().max() <= limit
    base = logits(open_variant(done.run, "base").model)
    assert (ours[-len(base) :] - base).abs().max() > 0.01, "it moved"


@pytest.mark.parametrize("name", MERGED)
class TestMerging:
    @pytest.mark.parametrize("kind", ["tied", "untied"])
    def test_merged_by_peft_is_attached(self, trained, name, kind):
        done = trained(name, kind)
        if refused(done):
            return
        model = attached(done.run, done.base)
        expected = logits(model)
        merged = model.merge_and_unload(safe_merge=True)
        assert (logits(merged) - expected).abs().max() <= tolerances.MERGED_LOGITS_FLOAT32

    def test_in_bfloat16_it_is_merged_in_float32_and_rounded_once(self, trained, name):
        done = trained(name, "tied", "bfloat16")
        if refused(done):
            return
        p = logits(attached(done.run, done.base, "bfloat16")).log_softmax(-1)
        # The base rounded to the type it was trained in, then float32.
        exact = attached(done.run, done.base, "bfloat16").float()
        merged = exact.merge_and_unload(safe_merge=True)
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        q = logits(merged).log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) < tolerances.MERGED_KL_LOW_PRECISION

    def test_a_layer_alone_is_merged_as_the_whole_model_is(self, trained, name):
        done = trained(name)
        if refused(done):
            return
        tensors = load_file(done.run.adapter / ADAPTER_FILES[1])
        config = PeftConfig.from_pretrained(str(done.run.adapter))
        base = dict(plain(done.base).named_parameters())
        merged = attached(done.run, done.base).merge_and_unload(safe_merge=True)
        num_changed = 0
        for parameter, weight in merged.named_parameters():
            module, before = parameter.removesuffix(".weight"), base[parameter].clone()
            if parts := tensors_of(tensors, module):
                found = merged_weight(config, parts, module, base[parameter])
                assert torch.equal(found, weight), module
                assert torch.equal(base[parameter], before), "the base's weight is left alone"
                num_changed += not torch.equal(found, before)
            else:
                assert torch.equal(weight, before), module
        assert num_changed == len(targeted_names(done))

    def test_a_merged_base_is_refused(self, trained, name, tmp_path):
        done = trained(name)
        if refused(done):
            return
        facts = {"kind": "merged", "adapter_sha256": adapter_hash(done)}
        folder = tmp_path / "merged"
        with artifact.staged(folder, facts) as stage:
            model = attached(done.run, done.base)
            model.merge_and_unload(safe_merge=True).save_pretrained(stage)
            base = find_base(done.run.config(), done.run.path)
            base.tokenizer.save_pretrained(stage)
        config = done.run.config()
        section = config.base.model_copy(update={"path": str(folder)})
        merged = find_base(config.model_copy(update={"base": section}), done.run.path)
        with pytest.raises(CheckFailed, match="merged model; this adapter is in it already"):
            load_adapter(plain(folder), done.run.adapter, merged.identity())


def refused(done: Trained) -> bool:
    """Whether the method is never merged; then it says why."""
    reason = why_not_merged(section_of(done))
    assert reason is None or len(reason) > 20
    return reason is not None


def adapter_hash(done: Trained) -> str:
    return artifact.sha256_of(done.run.adapter / ADAPTER_FILES[1])


def targeted_names(done: Trained) -> set[str]:
    from finetune.methods import targeted

    names = [n for n, _ in plain(done.base).named_modules()]
    if section_of(done).method == "ln_tuning":
        return {n for n in names if n.endswith("norm")}
    if section_of(done).method == "trainable_tokens":
        return {"model.embed_tokens"}
    return {m.name for m in targeted(section_of(done), from_llama_config(plain(done.base).config))}


class TestCounts:
    @pytest.mark.parametrize("preset", ["llama3.2-3b"])
    @pytest.mark.parametrize("name", MERGED)
    def test_the_formula_is_what_peft_makes_of_a_documented_llama(self, name, preset, tmp_path):
        adapter = section(CASES[name])
        arch, device = PRESETS[preset], "meta"
        if adapter.method == "boft":  # PEFT reads numbers of it when it is made
            few = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2}
            arch, device = replace(arch, n_layers=1, **few), "cpu"
        with torch.device(device):
            from transformers import LlamaForCausalLM

            model = LlamaForCausalLM(to_llama_config(arch))
            config = method_of(adapter).peft_config(adapter, "b")
            if adapter.init != "default":
                config.init_lora_weights = True  # there are no numbers to start from
            from peft import get_peft_model

            peft_model = get_peft_model(model, config)
        expected = method_of(adapter).num_trainable(adapter, arch)
        assert report_parameters(peft_model).num_trainable == expected

    def test_the_published_counts(self):
        attention = AdapterSection(r=32, target_modules=("q_proj", "v_proj"))
        mlp = AdapterSection(r=10, target_modules=("gate_proj", "up_proj", "down_proj"))
        arch = PRESETS["llama3.2-3b"]
        assert METHODS["lora"].num_trainable(attention, arch) == 9_175_040
        assert METHODS["lora"].num_trainable(mlp, arch) == 9_461_760


def section(case: Case) -> AdapterSection:
    """The adapter section of a case, without a run."""
    return AdapterSection.model_validate(case.adapter_values)


class TestOneLayer:
    """What `merged_weight` refuses."""

    @pytest.fixture
    def parts(self, trained):
        done, module = trained("lora"), "model.layers.0.mlp.up_proj"
        tensors = tensors_of(load_file(done.run.adapter / ADAPTER_FILES[1]), module)
        weight = plain(done.base).get_submodule(module).weight
        return PeftConfig.from_pretrained(str(done.run.adapter)), tensors, module, weight

    def test_tensors_that_are_missing_or_too_many(self, parts):
        config, tensors, module, weight = parts
        with pytest.raises(CheckFailed, match="missing"):
            merged_weight(config, dict(list(tensors.items())[:1]), module, weight)
        with pytest.raises(CheckFailed, match="needed nowhere"):
            merged_weight(config, tensors | {"else": torch.zeros(1)}, module, weight)

    def test_numbers_that_are_not_finite(self, parts):
        config, tensors, module, weight = parts
        broken = {name: tensor * float("nan") for name, tensor in tensors.items()}
        with pytest.raises(CheckFailed, match=module):
            merged_weight(config, broken, module, weight)

    def test_the_random_numbers_of_the_caller_are_left_alone(self, parts):
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        merged_weight(*parts)
        assert torch.equal(torch.rand(2), expected)


class TestSettingsThatDoNotFit:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"layers": (0, 7)}, "adapter.layers: found 7; the base has layers 0 to 1"),
            ({"rank_pattern": {"w1": 2}}, "adapter.rank_pattern: 'w1' matches none"),
            ({"alpha_pattern": {"lm_head": 2}}, "adapter.alpha_pattern: 'lm_head' matches none"),
            (
                {"init": "pissa", "r": 40},
                "adapter.r: found 40 with adapter.init: pissa; .* 32 by 128",
            ),
            ({"method": "hra", "r": 3}, "adapter.r: found 3; reflections come in pairs"),
            (
                {"method": "boft", "boft_block_size": 7},
                "adapter.boft_block_size: found 7; .* 128 columns",
            ),
            ({"method": "trainable_tokens"}, "adapter.token_indices: empty"),
            (
                {"method": "trainable_tokens", "token_indices": (5, 100_000)},
                "adapter.token_indices: found 100000; the base has ids 0 to",
            ),
        ],
    )
    def test_they_are_named(self, small_base, settings, message):
        with pytest.raises(InputError, match=message):
            attach(plain(small_base), AdapterSection(**settings), "b")


def test_virtual_tokens_leave_room_for_the_text():
    adapter = AdapterSection(method="prompt_tuning", num_virtual_tokens=4096)
    found = METHODS["prompt_tuning"].findings(adapter, PRESETS["llama2-7b"])
    assert found == [
        "adapter.num_virtual_tokens: found 4096; the base reads 4096 tokens, and the text is to "
        "have some of them"
    ]
    assert not METHODS["prompt_tuning"].findings(adapter, PRESETS["llama3-8b"])


class TestLoraPlus:
    def test_b_learns_at_another_rate_through_the_whole_schedule(self, trained):
        done = trained("lora+")
        names = {id(p): n for n, p in done.trainer.model.named_parameters()}
        optimizer = done.trainer.optimizer
        rates = {
            names[id(p)]: group["initial_lr"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert set(rates) == done.trains
        for name, rate in rates.items():
            assert rate == pytest.approx(0.04 if "lora_B" in name else 0.01)

    def test_b_moves_further_than_with_one_rate(self, trained):
        """One rate for both is the same run but for B's steps."""
        plus, one = trained("lora+"), trained("lora")
        name = next(n for n in plus.trains if "lora_B" in n)
        assert plus.after[name].norm() > 2 * one.after[name].norm()


class TestResume:
    @pytest.mark.parametrize("name", ["pissa", "olora", "corda"])
    def test_the_same_part_of_the_base_is_taken_again(self, trained, name):
        done = trained(name)
        base = open_variant(done.run, "base").model
        again = attach(base, section_of(done), "b", done.run.start)
        assert set(dict(again.named_parameters())) == set(done.before)
        for parameter, tensor in again.named_parameters():
            assert torch.equal(tensor, done.before[parameter]), parameter
