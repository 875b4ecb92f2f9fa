"""Tasks: questions from rows, answers kept as they come, scores that are the scorers' own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from small_runs import NANO, Bench, embedded_rows, write_rows

from finetune import answers
from finetune.__main__ import main
from finetune.config.loader import load
from finetune.errors import InputError
from finetune.inference import Sampling, continue_prompts, iter_continued, open_folder, open_variant
from finetune.run_folder import RunFolder
from finetune.tasks import Asker


def evaluate(capsys, *argv):
    code = main(["eval", *map(str, argv), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else captured.err


@pytest.fixture
def sums(tmp_path):
    """Rows with columns of their own."""
    rows = [
        {"question": f"{a} + {a + 1}", "answer": str(2 * a + 1), "family": "add"} for a in range(6)
    ]
    return write_rows(tmp_path / "sums.jsonl", rows)


def with_tasks(bench: Bench, *tasks: dict) -> RunFolder:
    writes = any(task["scorer"] != "multiple_choice" for task in tasks)
    short = ["eval.max_new_tokens=8"] if writes else []
    return bench.train(f"eval.tasks={json.dumps(list(tasks))}", *short)


class TestConfig:
    def findings(self, bench, task) -> str:
        with pytest.raises(InputError) as caught:
            load(bench.config_file, [f"eval.tasks={json.dumps([task])}"])
        return str(caught.value)

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ("mmlu", "exact_match"),
            ({"name": "a", "scorer": "exactmatch"}, "exact_match"),
            ({"name": "a/b", "scorer": "exact_match"}, "a/b"),
            ({"name": "a", "scorer": "exact_match", "prompt": "{q}"}, "name the rows: data"),
            ({"name": "a", "scorer": "exact_match", "data": "x", "prompt": "q"}, "no column"),
            ({"name": "a", "scorer": "exact_match", "data": "x", "prompt": "{q"}, "brace"),
            ({"name": "a", "scorer": "exact_match", "data": "x", "prompt": "{q:3}"}, "column's"),
            ({"name": "a", "scorer": "exact_match", "answer": "x"}, "answer has no effect"),
            ({"name": "a", "scorer": "exact_match", "top_p": 0.5}, "top_p has no effect"),
            ({"name": "a", "scorer": "exact_match", "choices": "c"}, "leave choices out"),
            ({"name": "a", "scorer": "multiple_choice", "data": "x", "prompt": "{q}"}, "needs"),
            ({"name": "a", "scorer": "regex"}, "pattern"),
            ({"name": "a", "scorer": "regex", "scorer_kwargs": {"pattern": "("}}, "pattern"),
            ({"name": "a", "scorer": "exact_match", "limit": 0}, "limit"),
        ],
    )
    def test_what_cannot_be_asked(self, bench, task, message):
        assert message in self.findings(bench, task)

    def test_a_name_stands_once(self, bench):
        with pytest.raises(InputError, match="exact_match is there twice"):
            load(bench.config_file, ["eval.tasks=[exact_match, exact_match]"])

    def test_a_name_alone_is_a_task(self, bench):
        (task,) = load(bench.config_file, ["eval.tasks=rouge_l"]).config.eval.tasks
        assert (task.name, task.scorer, task.data) == ("rouge_l", "rouge_l", None)


class TestQuestions:
    @pytest.fixture
    def asker(self, bench):
        opened = open_folder(bench.base, bench.load().config)
        return Asker(bench.load().config, opened.base.tokenizer, opened.base.chat_format)

    def task(self, bench, **settings):
        task = {"name": "t", "scorer": "exact_match", **settings}
        return load(bench.config_file, [f"eval.tasks={json.dumps([task])}"]).config.eval.tasks[0]

    def test_columns_become_the_prompt(self, asker, bench, sums):
        task = self.task(bench, data=str(sums), prompt="What is {question}? {{a number}}")
        first = asker.questions(task, [])[0]
        messages = [{"role": "user", "content": "What is 0 + 1? {a number}"}]
        assert list(first.prompt) == asker.chat_format.prompt(asker.tokenizer, messages)
        assert (first.expected, first.where) == (("1",), f"{sums}:1")
        assert dict(first.groups) == {"family": "add"}

    def test_limit_takes_the_first(self, asker, bench, sums):
        task = self.task(bench, data=str(sums), prompt="{question}", limit=2)
        assert [q.expected for q in asker.questions(task, [])] == [("1",), ("3",)]

    def test_braces_in_a_row_are_text(self, asker, bench, tmp_path):
        path = write_rows(tmp_path / "r.jsonl", [{"question": "{answer} {0}", "answer": "a"}])
        task = self.task(bench, data=str(path), prompt="{question}")
        text = asker.tokenizer.decode(list(asker.questions(task, [])[0].prompt))
        assert "{answer} {0}" in text

    def test_every_bad_row_is_named(self, asker, bench, tmp_path):
        rows = [
            {"question": "a", "answer": "b"},
            {"question": ["x"], "answer": "b"},
            {"question": "a"},
            {"quest": "a", "answer": "b"},
        ]
        path = write_rows(tmp_path / "r.jsonl", rows)
        task = self.task(bench, data=str(path), prompt="{question}")
        with pytest.raises(InputError) as caught:
            asker.questions(task, [])
        assert len(caught.value.findings) == 3
        assert f"{path}:2: column question is list" in str(caught.value)
        assert f"{path}:3: no column answer; there are question" in str(caught.value)

    def test_answers_that_nothing_could_match(self, asker, bench, tmp_path):
        rows = [{"question": "a", "answer": "7"}, {"question": "a", "answer": "seven"}]
        path = write_rows(tmp_path / "r.jsonl", rows)
        task = self.task(bench, scorer="numeric", data=str(path), prompt="{question}")
        with pytest.raises(InputError, match=r"r.jsonl:2: numeric: the accepted answer 'seven'"):
            asker.questions(task, [])

    def test_a_scorer_of_the_form_needs_no_answer(self, asker, bench, tmp_path):
        path = write_rows(tmp_path / "r.jsonl", [{"question": "a"}])
        task = self.task(bench, scorer="json", data=str(path), prompt="{question}")
        assert asker.questions(task, [])[0].expected == ()

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"choices": ["a", "a"], "answer": "a"}, "two or more texts that differ"),
            ({"choices": ["a"], "answer": "a"}, "two or more"),
            ({"choices": "ab", "answer": "a"}, "needs a list"),
            ({"choices": ["a", "b"], "answer": 2}, "allowed: 0 to 1"),
            ({"choices": ["a", "b"], "answer": "c"}, "none of the choices"),
            ({"answer": "c"}, "no column choices"),
        ],
    )
    def test_choices_that_are_none(self, asker, bench, tmp_path, row, message):
        path = write_rows(tmp_path / "r.jsonl", [{"question": "q", **row}])
        task = self.task(
            bench, scorer="multiple_choice", data=str(path), prompt="{question}", choices="choices"
        )
        with pytest.raises(InputError, match=message):
            asker.questions(task, [])

    def test_a_choice_is_scored_with_the_end_of_the_answer(self, asker, bench, tmp_path):
        row = {"question": "q", "choices": ["yes", "yes and no"], "answer": 1}
        path = write_rows(tmp_path / "r.jsonl", [row])
        task = self.task(
            bench, scorer="multiple_choice", data=str(path), prompt="{question}", choices="choices"
        )
        (question,) = asker.questions(task, [])
        assert question.expected == ("yes and no",)
        for text, document in question.choices.items():
            said = [i for i, m in zip(document.input_ids, document.train_mask, strict=True) if m]
            assert said[-1] in asker.chat_format.stop_ids(asker.tokenizer)
            assert asker.tokenizer.decode(said[:-1]).strip() == text

    def test_plain_text_goes_on_behind_a_space(self, bench, nano_tokenizer, tmp_path):
        asker = Asker(bench.load().config, nano_tokenizer, None)
        row = {"question": "The capital of Egypt is ", "choices": ["Cairo.", "Paris."], "answer": 0}
        path = write_rows(tmp_path / "r.jsonl", [row])
        task = self.task(
            bench, scorer="multiple_choice", data=str(path), prompt="{question}", choices="choices"
        )
        (question,) = asker.questions(task, [])
        document = question.choices["Cairo."]
        said = [i for i, m in zip(document.input_ids, document.train_mask, strict=True) if m]
        whole = nano_tokenizer.decode(document.input_ids, skip_special_tokens=True)
        assert whole.strip() == "The capital of Egypt is Cairo."
        assert nano_tokenizer.decode(said).strip() == "Cairo."


class TestEval:
    def test_scores_are_the_scorers_on_the_answers_on_disk(self, bench, sums, capsys):
        tasks = [
            {"name": "sums", "scorer": "numeric", "data": str(sums), "prompt": "{question} ="},
            {"name": "exact_match", "scorer": "exact_match"},
            {"name": "rouge", "scorer": "rouge_l"},
        ]
        run = with_tasks(bench, *tasks)
        code, found = evaluate(capsys, run.path, "--against", "base")
        assert code == 0
        assert set(found["tasks"]) == {"sums", "exact_match", "rouge"}
        assert set(found["compared"]["base"]) == {"loss", *found["tasks"], "most_changed"}
        for model in (found, found["against"][0]):
            for name, result in model["tasks"].items():
                lines = (run.eval / result["answers_file"]).read_text().splitlines()
                rows = [json.loads(line) for line in lines]
                assert len(rows) == result["answers"]
                mean = math.fsum(row["score"] for row in rows) / len(rows)
                assert result["score"] == pytest.approx(mean), name
        assert found["tasks"]["sums"]["groups"]["family"]["add"][1] == 6
        assert not list((run.eval / "answers").glob(".asking*")), "nothing half-done is left"

    def test_two_scorers_of_one_question_ask_once(self, bench, capsys, monkeypatch):
        run = with_tasks(
            bench,
            {"name": "a", "scorer": "exact_match"},
            {"name": "b", "scorer": "chrf"},
            {"name": "c", "scorer": "chrf", "temperature": 1.0},
        )
        asked = []
        plain = answers.written_answers
        monkeypatch.setattr(
            "finetune.scoring.written_answers", lambda *a: asked.append(a) or plain(*a)
        )
        assert evaluate(capsys, run.path)[0] == 0
        assert len(asked) == 2

    def test_the_likeliest_choice_is_that_of_plain_transformers(self, bench, capsys, tmp_path):
        rows = [
            {"q": f"word {n}", "options": ["red", "a long answer of many words", "7"], "right": n}
            for n in range(3)
        ]
        path = write_rows(tmp_path / "c.jsonl", rows)
        task = {"name": "c", "scorer": "multiple_choice", "data": str(path), "prompt": "{q}"}
        run = with_tasks(bench, task | {"choices": "options", "answer": "right"})
        code, found = evaluate(capsys, run.path)
        assert code == 0
        opened = open_variant(run, "adapter")
        style, tokenizer = opened.base.chat_format, opened.base.tokenizer
        lines = (run.eval / found["tasks"]["c"]["answers_file"]).read_text().splitlines()
        for row, line in zip(rows, lines, strict=True):
            sums = []
            question = [{"role": "user", "content": row["q"]}]
            start = len(style.prompt(tokenizer, question))
            for option in row["options"]:
                said = [*question, {"role": "assistant", "content": option}]
                ids = torch.tensor([style.render(tokenizer, said).input_ids])
                with torch.no_grad():
                    log_p = opened.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
                picked = log_p.gather(-1, ids[0, 1:, None])[start - 1 :]
                sums.append(picked.sum().item())
            likeliest = row["options"][sums.index(max(sums))]
            assert json.loads(line)["written"] == likeliest
        assert found["tasks"]["c"]["score"] in (0, 1 / 3, 2 / 3, 1)

    def test_sources_and_turns_add_up(self, bench, capsys, tmp_path):
        said = [[m["role"] for m in row["messages"]] for row in embedded_rows("train", 2000)]
        several = [n for n, roles in enumerate(said) if roles.count("assistant") == 2]
        rows = [embedded_rows("train", 1, n)[0] for n in several[:3]]
        more = write_rows(tmp_path / "more.jsonl", [*rows, *embedded_rows("heldout", 2)])
        run = bench.train(f"data.heldout=[{bench.heldout_file}, {more}]", "data.on_overlap=allow")
        code, found = evaluate(capsys, run.path)
        assert code == 0
        for groups in (found["by_source"], found["by_turn"]):
            assert len(groups) == 2
            assert sum(g["tokens"] for g in groups.values()) == found["tokens"]
            total = math.fsum(g["loss"] * g["tokens"] for g in groups.values())
            assert total == pytest.approx(found["loss"] * found["tokens"], rel=1e-12)
        assert list(found["by_turn"]) == ["1", "2"]

    def test_bytes_are_those_of_the_answers(self, bench, capsys):
        run = bench.train()
        _, found = evaluate(capsys, run.path)
        texts = [
            message["content"].strip()
            for row in embedded_rows("heldout", 9)
            for message in row["messages"]
            if message["role"] == "assistant"
        ]
        assert found["bytes"] == sum(len(text.encode()) for text in texts)


class TestSampling:
    PROMPTS = [[1, *range(40, 40 + n)] for n in (3, 9, 1, 30, 4)]

    def test_a_draw_does_not_depend_on_its_batch(self, bench):
        opened = open_folder(bench.base, bench.load().config)
        sampling = Sampling(10, temperature=1.0, top_p=0.95, seed=5)
        together = list(continue_prompts(opened, self.PROMPTS, sampling))
        for number, prompt in enumerate(self.PROMPTS):
            alone = dict(iter_continued(opened, {number: prompt}, sampling, 1))
            assert alone[number] == together[number]
        assert len({tuple(ids) for ids in together}) == len(self.PROMPTS)

    def test_rows_with_one_prompt_draw_differently(self, bench):
        opened = open_folder(bench.base, bench.load().config)
        drawn = list(continue_prompts(opened, [[1, 40]] * 8, Sampling(10, 1.0)))
        assert len({tuple(ids) for ids in drawn}) == 8

    def test_generators_of_the_process_are_not_touched(self, bench):
        opened = open_folder(bench.base, bench.load().config)
        before = torch.get_rng_state()
        list(continue_prompts(opened, self.PROMPTS, Sampling(4, 1.0, seed=3)))
        assert torch.equal(torch.get_rng_state(), before)


class TestGoingOn:
    def test_answers_that_are_there_are_not_asked_again(self, bench, capsys, monkeypatch):
        run = with_tasks(bench, {"name": "t", "scorer": "chrf", "temperature": 0.8})
        _, whole = evaluate(capsys, run.path)
        file = run.eval / whole["tasks"]["t"]["answers_file"]
        expected = file.read_text()
        file.unlink()
        monkeypatch.setattr(answers, "BATCH_SIZE", 2)
        asked = []

        class Stopped(BaseException):
            pass

        def stopping(opened, prompts, *settings):
            for number, ids in iter_continued(opened, prompts, *settings):
                asked.append(number)
                yield number, ids
                if len(asked) == 5:
                    raise Stopped

        monkeypatch.setattr(answers, "iter_continued", stopping)
        with pytest.raises(Stopped):
            main(["eval", str(run.path)])
        (kept,) = (run.eval / "answers").glob(".asking-*.jsonl")
        with kept.open("a") as half:
            half.write("[7, ")  # a kill in the middle of a line
        _, again = evaluate(capsys, run.path)
        assert sorted(asked) == list(range(9)), "each row once, over both starts"
        assert file.read_text() == expected
        assert again["tasks"] == whole["tasks"]
        assert not kept.exists()

    def test_another_model_or_setting_has_its_own(self, bench, tmp_path, monkeypatch):
        opened = open_folder(bench.base, bench.load().config)
        asker = Asker(bench.load().config, opened.base.tokenizer, opened.base.chat_format)
        task = load(bench.config_file, ["eval.tasks=exact_match"]).config.eval.tasks[0]
        rows = write_rows(tmp_path / "r.jsonl", embedded_rows("heldout", 2))
        asked = asker.questions(task.model_copy(update={"data": str(rows)}), [])
        names = []
        monkeypatch.setattr(answers._Kept, "remove", lambda self: names.append(self._path.name))
        for sampling in (Sampling(4), Sampling(5), Sampling(4, 0.5)):
            answers.written_answers(opened, asked, sampling, tmp_path / "store")
        assert len(set(names)) == 3
        answers.written_answers(opened, asked[:1], Sampling(4), tmp_path / "store")
        assert len(set(names)) == 4


def test_the_embedded_config_asks_its_heldout_rows():
    (task,) = load(NANO.parents[1] / "configs" / "lora_nano.yaml", []).config.eval.tasks
    assert (task.name, task.version) == ("exact_match", 1)
