"""Text from a model: batched as alone, stopped where it should, drawn as the model says."""

from __future__ import annotations

import collections
import json
import shutil

import pytest
import torch
from small_runs import Bench, flip_bit
from transformers import AutoModelForCausalLM

from finetune.__main__ import main
from finetune.errors import CheckFailed, InputError
from finetune.inference import (
    Opened,
    Sampling,
    continue_prompts,
    open_folder,
    open_variant,
    pick_device,
    trained_variant,
)
from finetune.merge import merge
from finetune.run_folder import RunFolder

# Ragged on purpose: the shortest is BOS alone.
PROMPTS = [[1], [1, 40, 41, 42], [1, *range(100, 160)], [1, 7], [1, *range(300, 311)]]


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_base):
    """A finished run, merged."""
    run = Bench(tmp_path_factory.mktemp("run"), small_base).train()
    merge(run)
    return run


def base_of(bench, *overrides) -> Opened:
    """The base of a config, opened."""
    from finetune.run_folder import open_run

    return open_variant(open_run(bench.load(*overrides)), "base")


def greedy_by_hand(folder, prompt, count):
    """Argmax of plain transformers' last logits, without cache, batch or padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def no_stops(monkeypatch, *stops):
    monkeypatch.setattr(Opened, "stop_ids", lambda self: list(stops))


class TestGreedy:
    def test_a_batch_gives_each_prompt_what_it_gets_alone(self, bench, monkeypatch):
        no_stops(monkeypatch)
        opened, sampling = base_of(bench), Sampling(max_new_tokens=12)
        alone = [next(continue_prompts(opened, [p], sampling)) for p in PROMPTS]
        assert list(continue_prompts(opened, PROMPTS, sampling)) == alone
        assert list(continue_prompts(opened, PROMPTS, sampling, batch_size=2)) == alone
        assert len({tuple(ids) for ids in alone}) == len(PROMPTS), "the prompts matter"

    def test_it_is_the_argmax_of_plain_transformers(self, bench, monkeypatch, small_base):
        no_stops(monkeypatch)
        found = list(continue_prompts(base_of(bench), PROMPTS, Sampling(max_new_tokens=12)))
        for prompt, ids in zip(PROMPTS, found, strict=True):
            assert ids == greedy_by_hand(small_base, prompt, 12)

    def test_an_answer_ends_before_its_stop(self, bench, monkeypatch):
        no_stops(monkeypatch)
        opened = base_of(bench)
        whole = list(continue_prompts(opened, PROMPTS, Sampling(max_new_tokens=12)))
        stop, other = whole[2][5], whole[4][3]
        no_stops(monkeypatch, stop, other)
        cut = list(continue_prompts(opened, PROMPTS, Sampling(max_new_tokens=12)))
        for ids, short in zip(whole, cut, strict=True):
            ends = [i for i, token in enumerate(ids) if token in (stop, other)]
            assert short == ids[: min(ends, default=12)]
        assert len(cut[2]) <= 5
        assert len(cut[4]) <= 3

    def test_settings_of_the_bases_folder_change_nothing(self, bench, tmp_path, small_base):
        """Llama's own generation_config.json samples; others penalise repetition."""
        base = shutil.copytree(small_base, tmp_path / "opinionated")
        settings = {
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 3,
            "repetition_penalty": 3.0,
            "no_repeat_ngram_size": 1,
            "min_new_tokens": 5,
        }
        (base / "generation_config.json").write_text(json.dumps(settings))
        plain = list(continue_prompts(base_of(bench), PROMPTS, Sampling(max_new_tokens=12)))
        opened = base_of(bench, f"base.path={base}", "run.name=opinionated")
        assert list(continue_prompts(opened, PROMPTS, Sampling(max_new_tokens=12))) == plain

    def test_the_mode_of_the_model_is_put_back(self, bench):
        opened = base_of(bench)
        opened.model.train()
        list(continue_prompts(opened, PROMPTS[:1], Sampling(max_new_tokens=1)))
        assert opened.model.training


class TestSampling:
    def test_a_seed_repeats_and_another_differs(self, bench):
        opened = base_of(bench)

        def draw(seed):
            return list(continue_prompts(opened, PROMPTS, Sampling(8, 1.0, 0.9, seed)))

        assert draw(3) == draw(3)
        assert draw(3) != draw(4)

    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
    def test_draws_follow_the_models_probabilities(self, bench, monkeypatch, temperature, top_p):
        """Nothing else cuts the tail: transformers would draw from the 50 likeliest alone."""
        no_stops(monkeypatch)
        opened, count = base_of(bench), 4000
        prompts = [[1, 40, 41, 42]] * count
        sampling = Sampling(1, temperature, top_p, seed=1)
        drawn = collections.Counter(
            ids[0] for ids in continue_prompts(opened, prompts, sampling, batch_size=count)
        )
        with torch.no_grad():
            logits = opened.model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].double()
        p = (logits / temperature).softmax(-1)
        likeliest = p.argsort(descending=True)
        nucleus = likeliest[(p[likeliest].cumsum(0) - p[likeliest]) < top_p]
        assert set(drawn) <= set(nucleus.tolist())
        q = torch.zeros_like(p)
        q[nucleus] = p[nucleus] / p[nucleus].sum()
        frequency = torch.tensor([drawn[i] / count for i in range(len(p))], dtype=torch.float64)
        # Total variation of 4,000 honest draws over 1,024 ids: about half of sum sqrt(2q/πn).
        expected = float((2 * q * (1 - q) / (torch.pi * count)).sqrt().sum() / 2)
        assert float((frequency - q).abs().sum() / 2) < 1.3 * expected
        assert len(drawn) > 100 or top_p < 1


class TestOpening:
    def test_variants_are_what_they_are_called(self, run, small_base):
        ids = torch.arange(3, 60).unsqueeze(0)
        with torch.no_grad():
            logits = {
                v: open_variant(run, v).model(ids).logits for v in ("base", "adapter", "merged")
            }
            plain = AutoModelForCausalLM.from_pretrained(small_base)(ids).logits
        assert (logits["base"] - plain).abs().max() < 1e-4
        assert (logits["adapter"] - logits["merged"]).abs().max() < 1e-4
        assert (logits["adapter"] - logits["base"]).abs().max() > 0.1
        assert trained_variant(run) == "adapter"

    def test_a_run_that_is_not_trained(self, bench):
        from finetune.run_folder import open_run

        run = open_run(bench.load())
        with pytest.raises(InputError, match="neither adapter nor model"):
            trained_variant(run)
        with pytest.raises(InputError, match="has no adapter yet"):
            open_variant(run, "adapter")
        with pytest.raises(InputError, match="no such model folder"):
            open_variant(run, "merged")

    def test_a_damaged_merged_folder(self, run, tmp_path):
        copy = RunFolder(shutil.copytree(run.path, tmp_path / "copy"))
        flip_bit(copy.merged / "model.safetensors")
        with pytest.raises(CheckFailed, match="model.safetensors"):
            open_variant(copy, "merged")

    def test_a_folder_of_plain_transformers(self, run, small_base):
        opened = open_folder(small_base, run.config())
        assert (opened.name, opened.device) == (str(small_base), pick_device())
        assert opened.stop_ids() == [2]


class TestGenerate:
    def test_json_has_the_ids_and_their_text(self, run, capsys):
        outputs = []
        for target in (run.path, run.merged):
            argv = ["generate", str(target), "--prompt", "Add 2 and 3.", "--max-new-tokens", "9"]
            assert main([*argv, "--json"]) == 0
            outputs.append(json.loads(capsys.readouterr().out))
            assert main(argv) == 0
            assert capsys.readouterr().out == outputs[-1]["text"] + "\n"
        assert outputs[0] == outputs[1], "merged and attached"
        opened = open_variant(run, "adapter")
        tokenizer = opened.base.tokenizer
        assert tokenizer.decode(outputs[0]["ids"], skip_special_tokens=True) == outputs[0]["text"]
        messages = [{"role": "user", "content": "Add 2 and 3."}]
        prompt = opened.base.chat_format.prompt(tokenizer, messages)
        assert outputs[0]["ids"] == greedy_by_hand(run.merged, prompt, 9)[: len(outputs[0]["ids"])]

    def test_raw_goes_on_from_bos_and_the_text(self, run, capsys):
        argv = ["generate", str(run.merged), "--raw", "--max-new-tokens", "5", "--json"]
        assert main([*argv, "--prompt", ""]) == 0
        ids = json.loads(capsys.readouterr().out)["ids"]
        assert ids == greedy_by_hand(run.merged, [1], 5)[: len(ids)]

    def test_sampling_with_a_seed(self, run, capsys):
        argv = ["generate", str(run.path), "--prompt", "Go", "--temperature", "1.5", "--json"]
        texts = []
        for seed in ("1", "1", "2"):
            assert main([*argv, "--top-p", "0.9", "--seed", seed, "--max-new-tokens", "9"]) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--temperature", "-1"), "temperature is at least 0"),
            (("--top-p", "1.5", "--temperature", "1"), "top-p in"),
            (("--top-p", "0.5"), "no effect at temperature 0"),
            (("--max-new-tokens", "0"), "max-new-tokens at least 1"),
        ],
    )
    def test_settings_without_sense(self, run, capsys, arguments, message):
        assert main(["generate", str(run.path), "--prompt", "x", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_a_folder_of_nothing(self, tmp_path, capsys):
        assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
        assert "neither a run" in capsys.readouterr().err

    def test_a_run_on_plain_text_has_no_prompt_format(self, bench, capsys):
        from small_runs import write_rows

        write_rows(bench.train_file, [{"text": f"The number {n} is a number."} for n in range(20)])
        run = bench.train("recipe=pretrain", "data.heldout=[]", "train.max_steps=1")
        assert main(["generate", str(run.path), "--prompt", "The", "--max-new-tokens", "3"]) == 2
        assert "--raw" in capsys.readouterr().err
        argv = ["generate", str(run.path), "--prompt", "The", "--max-new-tokens", "3", "--raw"]
        assert main(argv) == 0

    def test_a_conversation(self, run, capsys, monkeypatch):
        import io

        monkeypatch.setattr("sys.stdin", io.StringIO("Add 2 and 3.\nAnd 4 and 5?\n\nnot read\n"))
        assert main(["chat", str(run.path), "--max-new-tokens", "5"]) == 0
        first = capsys.readouterr().out
        assert (
            main(["generate", str(run.path), "--prompt", "Add 2 and 3.", "--max-new-tokens", "5"])
            == 0
        )
        assert first.startswith(capsys.readouterr().out)
