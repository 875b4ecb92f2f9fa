"""lm-evaluation-harness beside our own numbers: the same prompts, choices, answers, likelihoods."""

from __future__ import annotations

import math

import pytest
from harness_tasks import (
    PAIRS,
    QUESTIONS,
    TEXTS,
    answers_of,
    asked,
    asked_to_write,
    evaluate,
    needs_harness,
    scored,
    write_choice,
    write_generation,
    write_rolling,
    written,
)
from tolerances import HARNESS_LOG_LIKELIHOOD

from finetune.inference import Sampling, continue_prompts, open_variant

pytestmark = pytest.mark.usefixtures("one_thread")


@needs_harness
class TestTwoRoutes:
    def test_choices_of_plain_text(self, text, tmp_path, capsys):
        write_choice(tmp_path / "tasks")
        code, ours, error = evaluate(capsys, text.path)
        assert code == 0, error
        own = answers_of(text, ours, "own")
        code, found, _ = evaluate(
            capsys, text.path, "--lm-eval", "sums", "--lm-eval-tasks", tmp_path / "tasks"
        )
        task = found["tasks"]["sums"]
        assert (code, task["scorer"], task["version"]) == (0, "lm-eval:acc", 2.0)
        assert task["answers"] == len(QUESTIONS)
        assert task["score"] == ours["tasks"]["own"]["score"] == task["metrics"]["acc"]
        theirs = answers_of(text, found, "sums")
        for key in ("written", "expected", "score"):
            assert [a[key] for a in theirs] == [a[key] for a in own]
        assert len({a["written"] for a in theirs}) > 1
        assert 0 < task["score"] < 1
        assert task["stderr"] == pytest.approx(
            math.sqrt(task["score"] * (1 - task["score"]) / (len(QUESTIONS) - 1))
        )

    @pytest.mark.parametrize("kind", ["chat", "text"])
    def test_log_likelihoods_of_choices(self, request, kind, tmp_path):
        run = request.getfixturevalue(kind)
        opened = open_variant(run, "adapter" if kind == "chat" else "model")
        ours = scored(opened, PAIRS)
        assert asked(opened, PAIRS) == pytest.approx(ours, rel=HARNESS_LOG_LIKELIHOOD)

    @pytest.mark.parametrize(
        "name", ["lora", "trainable_tokens", "prompt_tuning", "prefix_tuning", "qlora nf4"]
    )
    def test_methods(self, trained, name):
        """The harness ties weights anew and pads; neither may change what the model says."""
        run = trained(name).run
        opened = open_variant(run, "adapter")
        questions = [row["question"] for row in QUESTIONS[:6]]
        ours, said = scored(opened, PAIRS[:12]), written(opened, questions)
        assert asked(opened, PAIRS[:12]) == pytest.approx(ours, rel=HARNESS_LOG_LIKELIHOOD)
        assert asked_to_write(opened, questions) == said
        base = scored(open_variant(run, "base"), PAIRS[:12])
        assert base != pytest.approx(ours, rel=HARNESS_LOG_LIKELIHOOD)

    def test_answers_that_are_written(self, chat, tmp_path, capsys):
        opened = open_variant(chat, "adapter")
        questions = [row["question"] for row in QUESTIONS]
        said = written(opened, questions)
        # Right, wrong, right … by what our own generation wrote.
        rows = [
            {"question": q, "answer": w if n % 2 else "something else"}
            for n, (q, w) in enumerate(zip(questions, said, strict=True))
        ]
        write_generation(tmp_path / "tasks", rows)
        _, found, _ = evaluate(
            capsys, chat.path, "--lm-eval", "writes", "--lm-eval-tasks", tmp_path / "tasks"
        )
        answers = answers_of(chat, found, "writes")
        assert [a["written"] for a in answers] == said
        assert len(set(said)) > 1
        assert found["tasks"]["writes"]["score"] == 0.5
        task = found["tasks"]["writes"]
        assert (task["scorer"], task["metrics"]["exact_match"]) == ("lm-eval:exact_match", 0.5)

    @pytest.mark.parametrize("kind", ["chat", "text"])
    def test_plain_text(self, request, kind, tmp_path, capsys):
        run = request.getfixturevalue(kind)
        write_rolling(tmp_path / "tasks")
        data = tmp_path / "tasks" / "text.jsonl"
        _, ours, _ = evaluate(capsys, run.path, "--text", data)
        _, found, _ = evaluate(
            capsys, run.path, "--lm-eval", "text", "--lm-eval-tasks", tmp_path / "tasks"
        )
        task = found["tasks"]["text"]
        assert task["scorer"] == "lm-eval:-bits_per_byte"
        expected = pytest.approx(ours["bits_per_byte"], rel=HARNESS_LOG_LIKELIHOOD)
        assert -task["score"] == expected
        assert task["metrics"]["bits_per_byte"] == expected
        assert len({a["score"] for a in answers_of(run, found, "text")}) == len(TEXTS)


@needs_harness
class TestIds:
    @pytest.fixture
    def model(self, chat):
        from finetune.harness.model import HarnessModel

        return HarnessModel(open_variant(chat, "adapter"), 2)

    @pytest.fixture
    def plain(self, text):
        from finetune.harness.model import HarnessModel

        return HarnessModel(open_variant(text, "model"), 2)

    def test_a_prompt_has_the_ids_of_training(self, model, chat):
        opened = open_variant(chat, "adapter")
        stop = opened.base.tokenizer.decode(opened.stop_ids()[0])
        for content in ("1 + 1 =", f"what does {stop} mean?", " spaces  "):
            messages = [{"role": "user", "content": content}]
            expected = opened.base.chat_format.prompt(opened.base.tokenizer, messages)
            prompt = model.apply_chat_template(messages)
            ids, mask = model.tok_batch_encode([prompt])
            assert ids[0].tolist() == expected
            assert mask.all()
            assert model._encode_pair(prompt, "2")[0] == expected
        # By the tokenizer alone a stop token that is typed would end the turn.
        alone = opened.base.tokenizer.encode(f"mean {stop}", add_special_tokens=False)
        assert opened.stop_ids()[0] in alone
        assert opened.stop_ids()[0] not in model.tok_encode(f"mean {stop}")

    def test_an_opening_belongs_to_the_answer(self, model, chat):
        opened = open_variant(chat, "adapter")
        messages = [{"role": "user", "content": "1 + 1?"}]
        expected = opened.base.chat_format.prompt(opened.base.tokenizer, messages)
        with_opening = [*messages, {"role": "assistant", "content": "It is"}]
        prompt = model.apply_chat_template(with_opening, add_generation_prompt=False)
        head, tail = model._encode_pair(prompt, " 2")
        assert head[: len(expected)] == expected
        text = opened.base.tokenizer.decode([*head[len(expected) :], *tail])
        assert text.strip() == "It is 2"

    def test_an_answer_ends_at_the_stops_of_the_format(self, model, chat):
        from lm_eval.api.instance import Instance

        opened = open_variant(chat, "adapter")
        messages = [{"role": "user", "content": "1 + 1 ="}]
        prompt = opened.base.chat_format.prompt(opened.base.tokenizer, messages)
        ids = next(continue_prompts(opened, [prompt], Sampling(max_new_tokens=8)))
        assert model._stops == opened.stop_ids()
        model._stops = [ids[0]]  # a stop that is text, and so is still read
        settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
        arguments = (model.apply_chat_template(messages), settings)
        (said,) = model.generate_until([Instance("generate_until", {}, arguments, 0)], True)
        assert said == opened.base.tokenizer.decode(ids[:1], skip_special_tokens=True)
        assert said != opened.base.tokenizer.decode(ids, skip_special_tokens=True)

    def test_bos_stands_once(self, plain):
        bos = plain.tokenizer.bos_token_id
        head, tail = plain._encode_pair("1 + 1 =", " 2")
        assert (head[0], [*head, *tail].count(bos)) == (bos, 1)
        assert plain.tok_batch_encode(["1 + 1 ="])[0][0].tolist().count(bos) == 1
        assert bos not in plain.tok_encode("1 + 1 =")

    def test_what_is_cut_is_counted(self, plain):
        long = "1 " * plain.max_length
        plain._encode_pair(long, " 2")
        plain.tok_batch_encode([long, "short"], left_truncate_len=16)
        assert plain.num_cut == 2

    def test_what_does_not_fit_is_refused(self, plain):
        from finetune.errors import InputError

        for answer, message in (("", "of 0 tokens"), ("2 " * plain.max_length, "allowed: 1 to")):
            with pytest.raises(InputError, match=message):
                plain._encode_pair("1 + 1 =", answer)
