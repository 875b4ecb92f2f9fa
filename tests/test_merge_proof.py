"""The proof's layer-by-layer figures against whole models, and what it measures beside them."""

from __future__ import annotations

import shutil

import pytest
import tolerances
import torch
from peft import PeftModel
from small_runs import Bench
from transformers import AutoModelForCausalLM

from finetune import proof as proof_module
from finetune.__main__ import main
from finetune.inference import folder_config, open_folder
from finetune.merge import merge
from finetune.model import find_base
from finetune.proof import _proof_documents
from finetune.proof_weights import WEIGHT_ULPS, _block_error
from finetune.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_base) -> RunFolder:
    return Bench(tmp_path_factory.mktemp("run"), small_base).train()


@pytest.fixture
def run(trained, tmp_path) -> RunFolder:
    return RunFolder(shutil.copytree(trained.path, tmp_path / "copy"))


def whole_logits(model, documents):
    with torch.no_grad():
        rows = [torch.tensor([document.input_ids]) for document in documents]
        return [model(input_ids=ids, use_cache=False).logits[0].double() for ids in rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_by_layer_gives_the_figures_of_whole_models(run, small_base, dtype):
    proof = merge(run, dtype=dtype)["proof"]
    documents = _proof_documents(run, find_base(run.config(), run.path))
    base = AutoModelForCausalLM.from_pretrained(small_base)
    attached = whole_logits(PeftModel.from_pretrained(base, run.adapter).eval(), documents)
    merged = whole_logits(AutoModelForCausalLM.from_pretrained(run.merged).eval(), documents)
    pairs = list(zip(attached, merged, strict=True))
    p, q = (torch.cat(side).log_softmax(-1) for side in (attached, merged))
    count = sum(map(len, attached))
    spread = sum(float(a.std()) * len(a) for a in attached) / count
    expected = {
        "max_logit_difference": float(max((a - b).abs().max() for a, b in pairs)),
        "mean_logit_difference": float((torch.cat(attached) - torch.cat(merged)).abs().mean()),
        "kl": float((p.exp() * (p - q)).sum() / count),
    }
    expected["relative_logit_difference"] = expected["max_logit_difference"] / spread
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    assert proof["tokens"] == count
    if dtype == "float32":  # the differences are rounding, and so are the differences of these
        assert proof["same_next_token"] == same == count
        assert expected["max_logit_difference"] <= tolerances.MERGED_LOGITS_FLOAT32
        return
    logits, wanted = torch.cat(merged), torch.cat(attached).argmax(-1, keepdim=True)
    best, level = logits.topk(2).values.T, 2**-8 * logits.amax(-1).abs()  # in bfloat16
    surely = (logits.argmax(-1) == wanted[:, 0]) & (best[0] - best[1] > level)
    perhaps = best[0] - logits.gather(1, wanted)[:, 0] <= level
    assert perhaps.sum() - surely.sum() < count / 8
    assert surely.sum() <= proof["same_next_token"] <= perhaps.sum(), "but where two are level"
    for name, value in expected.items():
        assert proof[name] == pytest.approx(value, rel=tolerances.LAYERWISE_PROOF), name


def test_what_was_trained_in_16_bits_is_multiplied_in_float32(bench, small_base):
    """Else the arithmetic's own rounding would be most of the difference, the deeper the more."""
    run = bench.train("base.dtype=bfloat16")
    proof = merge(run)["proof"]
    base = find_base(run.config(), run.path)
    documents = _proof_documents(run, base)
    plain = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.bfloat16).float()
    merged = AutoModelForCausalLM.from_pretrained(run.merged).float()
    attached = whole_logits(PeftModel.from_pretrained(plain, run.adapter).eval(), documents)
    pairs = zip(attached, whole_logits(merged.eval(), documents), strict=True)
    worst = float(max((a - b).abs().max() for a, b in pairs))
    assert proof["dtype"] == "bfloat16", "the limits are those of the merged type"
    assert proof["max_logit_difference"] == pytest.approx(worst, rel=tolerances.LAYERWISE_PROOF)


def test_above_its_budget_the_next_tokens_stand_for_greedy_text(run, monkeypatch, capsys):
    from finetune import proof

    monkeypatch.setattr(proof, "TEXT_BYTES", 1000)
    assert main(["merge", str(run.path)]) == 0
    assert "same next token at 265 of 265 places" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_both_bases_of_a_quantized_run_are_measured(bench, quantization, tmp_path):
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    run = bench.train(f"base.quantization={quantization}")
    full = merge(run, target="full")["proof"]["kl_from_trained"]
    chosen = merge(run, tmp_path / "other")
    found = chosen["proof"]["kl_from_trained"]
    assert chosen["base_weights"] == "dequantized"
    assert found["full"] == pytest.approx(full["full"], rel=0.05)
    assert found["dequantized"] == pytest.approx(full["dequantized"], rel=0.05, abs=1e-9)
    # int8 rounds activations as well, which no weights can hold.
    assert found["dequantized"] < found["full"] / (10 if quantization == "nf4" else 1)


def test_a_base_that_is_not_quantized_has_no_dequantized_weights(run, capsys):
    assert main(["merge", str(run.path), "--base", "dequantized"]) == 2
    assert "the run's base is not quantised" in capsys.readouterr().err


def test_texts_that_part_where_two_tokens_are_level_are_no_difference(small_base):
    """Which of the two is larger depends on the number of threads; a merge that is right would be
    refused on one machine and pass on another."""
    opened = open_folder(small_base, folder_config(small_base))
    prompt, common = [1, 50, 60], [70, 80]
    with torch.no_grad():
        opened.model.lm_head.weight[31] = opened.model.lm_head.weight[30] * (1 + 1e-6)

    def is_tie(one, other):
        return proof_module._is_tie(
            (opened, opened), prompt, [*common, *one], [*common, *other], 1e-3
        )

    assert is_tie([30, 5, 6], [31, 7])
    assert not is_tie([30, 5, 6], [32, 5, 6])
    assert not is_tie([], [30]), "one has ended"


class TestUnitsInTheLastPlace:
    """The quick count of last places against the plain one in float64."""

    BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

    def plain(self, found, expected):
        limits = torch.finfo(found.dtype)
        _, exponent = torch.frexp(expected.abs().clamp(min=limits.smallest_normal))
        place = torch.ldexp(torch.full_like(expected, limits.eps / 2), exponent)
        return float(((found.double() - expected).abs() / place).max())

    @pytest.fixture(params=BITS, ids=str)
    def numbers(self, request):
        """Base, update and their sum rounded once; the update as large as the base or far less."""
        chance = torch.Generator().manual_seed(0)
        base = torch.randn(256, 512, generator=chance).bfloat16()
        size = torch.logspace(-6, 0, 256).unsqueeze(1)
        delta = torch.randn(256, 512, generator=chance) * size
        found = (base.double() + delta.double()).to(request.param)
        return base, delta, found

    def test_right_ones_are_off_by_half_a_place(self, numbers):
        base, delta, found = numbers
        assert _block_error(found, base, delta) <= 0.5001
        whole = base.double() + delta.double()
        assert _block_error(found, whole, None) == pytest.approx(self.plain(found, whole), abs=1e-4)

    @pytest.mark.parametrize("step", [-1, 1])
    def test_one_entry_beside_the_nearest_is_found(self, numbers, step):
        base, delta, found = numbers
        rows = slice(0, 8)  # where updates are small, the product's own rounding hides nothing
        wrong = found[rows].clone()
        wrong.view(self.BITS[found.dtype])[3, 77] += step
        assert _block_error(wrong, base[rows], delta[rows]) > WEIGHT_ULPS

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_below_a_power_of_two_places_are_half_as_wide(self, dtype):
        """A sum that float32 rounds up to 1; the number below 1 is one place off, not half."""
        base, delta = torch.ones(1, 1, dtype=dtype), torch.full((1, 1), -(2.0**-30))
        below = base.clone()
        below.view(torch.int16).sub_(1)
        assert _block_error(base, base, delta) < 1e-3
        assert _block_error(below, base, delta) > 0.99

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_no_number_passes_nothing(self, numbers, value):
        base, delta, found = numbers
        found[0, 0] = value
        assert not _block_error(found, base, delta) <= WEIGHT_ULPS
