"""lm-evaluation-harness beside our own numbers: the same prompts, choices, answers and likelihoods.

Most of it needs the extra `lm-eval` and is skipped without it; `make setup-lm-eval` installs it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys

import pytest
import yaml
from small_runs import Bench, write_rows
from tolerances import HARNESS_LOG_LIKELIHOOD

from finetune.__main__ import main
from finetune.heldout import score_rows
from finetune.inference import Sampling, continue_prompts, open_variant
from finetune.merge import merge
from finetune.prepared import Document
from finetune.run_folder import RunFolder
from finetune.shapes import Example

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness: extra lm-eval"
)
pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), str(a + b + 10), "none"], "label": a % 3}
    for a in range(4)
    for b in range(4)
]
TEXTS = [
    {"text": " ".join(f"{a} + {b} = {a + b}." for b in range(count))}
    for a, count in ((3, 4), (7, 9))
]


def evaluate(capsys, *argv):
    """`eval … --json`: exit code, the object on stdout, stderr."""
    code = main(["eval", *map(str, argv), "--json"])
    captured = capsys.readouterr()
    assert code in (0, 2, 3), captured.err
    return code, json.loads(captured.out) if captured.out else None, captured.err


def write_task(folder, name, rows, **settings):
    """A YAML file beside its data."""
    folder.mkdir(exist_ok=True)
    data = write_rows(folder / f"{name}.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 2.0},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def mean_of(metric):
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def write_choice(folder, rows=QUESTIONS, name="sums", **settings):
    write_task(
        folder,
        name,
        rows,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="label",
        metric_list=[mean_of("acc"), mean_of("acc_norm")],
        **settings,
    )


def write_generation(folder, rows, name="writes"):
    write_task(
        folder,
        name,
        rows,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [], "max_gen_toks": 8, "do_sample": False},
        metric_list=[mean_of("exact_match")],
    )


def write_rolling(folder, rows=TEXTS, name="text"):
    write_task(
        folder,
        name,
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
    )


def answers_of(run, result, task):
    lines = (run.eval / result["tasks"][task]["answers_file"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def own_task(**settings):
    return f"eval.tasks={json.dumps([{'name': 'own', **settings}])}"


@pytest.fixture(autouse=True)
def _own_datasets(tmp_path, monkeypatch):
    """What `datasets` keeps of the files goes with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("finetune.hub.OFFLINE_BY_CHOICE", True)
    monkeypatch.setattr("finetune.harness.tasks.OFFLINE_BY_CHOICE", True)


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, small_base):
    """A finished run with a prompt format, merged."""
    run = Bench(tmp_path_factory.mktemp("chat"), small_base).train("train.learning_rate=0.05")
    merge(run)
    return run


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, small_base):
    """A finished run on plain text, with the choices as a task of our own."""
    folder = tmp_path_factory.mktemp("plain")
    bench = Bench(folder, small_base)
    rows = write_rows(folder / "text.jsonl", [{"text": f"{n} + 1 = {n + 1}"} for n in range(12)])
    asked = write_rows(folder / "asked.jsonl", QUESTIONS)
    task = {
        "scorer": "multiple_choice",
        "data": str(asked),
        "prompt": "{question}",
        "choices": "choices",
        "answer": "label",
    }
    heldout = write_rows(folder / "heldout.jsonl", [{"text": "13 + 1 = 14"}])
    files = (f"data.train={rows}", f"data.heldout={heldout}")
    return bench.train("recipe=pretrain", "adapter.method=none", *files, own_task(**task))


@pytest.fixture
def chat(chat_run, tmp_path):
    return RunFolder(shutil.copytree(chat_run.path, tmp_path / "chat"))


@pytest.fixture
def text(text_run, tmp_path):
    return RunFolder(shutil.copytree(text_run.path, tmp_path / "plain"))


class TestWithoutIt:
    def test_one_sentence_before_any_model_is_loaded(
        self, small_base, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
        folder = shutil.copytree(small_base, tmp_path / "base")
        (folder / "model.safetensors").unlink()
        code, _, error = evaluate(capsys, folder, "--lm-eval", "arc_easy")
        assert code == 2
        assert "pip install plumbtune[lm-eval]" in error
        assert "safetensors" not in error
        assert len(error.splitlines()) == 1

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--limit", "3"], "no effect without --lm-eval"),
            (["--lm-eval-tasks", "x"], "no effect without --lm-eval"),
            (["--lm-eval", "a", "--limit", "0"], "1 or more"),
            (["--lm-eval", "a", "--text", "b"], "--text and --lm-eval: one of them"),
        ],
    )
    def test_arguments_that_do_not_fit(self, chat_run, capsys, argv, message):
        code, _, error = evaluate(capsys, chat_run.path, *argv)
        assert (code, message in error) == (2, True), error


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
        pairs = [(row["question"], choice) for row in QUESTIONS for choice in row["choices"]]
        found = _asked(opened, pairs)
        documents = []
        for question, choice in pairs:
            tokenizer, chat_format = opened.base.tokenizer, opened.base.chat_format
            if chat_format:
                messages = [{"role": "user", "content": question}]
                prompt = chat_format.prompt(tokenizer, messages)
                answer = tokenizer.encode(choice, add_special_tokens=False)
            else:
                prompt = tokenizer.encode(question)
                answer = tokenizer.encode(f"{question} {choice}")[len(prompt) :]
            mask = [False] * len(prompt) + [True] * len(answer)
            documents.append(Document(Example(choice), prompt + answer, mask))
        ours = [-row.loss_sum for row in score_rows(opened.model, documents, 4, opened.device)]
        assert found == pytest.approx(ours, rel=HARNESS_LOG_LIKELIHOOD)

    def test_answers_that_are_written(self, chat, tmp_path, capsys):
        opened = open_variant(chat, "adapter")
        questions = [row["question"] for row in QUESTIONS]
        written = _written(opened, questions)
        # Right, wrong, right … by what our own generation wrote.
        rows = [
            {"question": q, "answer": w if n % 2 else "something else"}
            for n, (q, w) in enumerate(zip(questions, written, strict=True))
        ]
        write_generation(tmp_path / "tasks", rows)
        _, found, _ = evaluate(
            capsys, chat.path, "--lm-eval", "writes", "--lm-eval-tasks", tmp_path / "tasks"
        )
        answers = answers_of(chat, found, "writes")
        assert [a["written"] for a in answers] == written
        assert len(set(written)) > 1
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


def _asked(opened, pairs):
    """Log-likelihoods that the harness's wrapper gives, in the order of the pairs."""
    from lm_eval.api.instance import Instance

    from finetune.harness.model import HarnessModel

    model = HarnessModel(opened, 4)
    requests = []
    for question, choice in pairs:
        context, continuation = question, f" {choice}"
        if opened.base.chat_format:
            context = model.apply_chat_template([{"role": "user", "content": question}])
            continuation = choice
        arguments = (context, continuation)
        requests.append(Instance("loglikelihood", {}, arguments, 0))
    return [found for found, _ in model.loglikelihood(requests, disable_tqdm=True)]


def _written(opened, questions):
    """Answers of our own generation."""
    tokenizer, chat_format = opened.base.tokenizer, opened.base.chat_format
    prompts = [
        chat_format.prompt(tokenizer, [{"role": "user", "content": question}])
        for question in questions
    ]
    continued = continue_prompts(opened, prompts, Sampling(max_new_tokens=8))
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in continued]


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

    def test_bos_stands_once(self, plain):
        bos = plain.tokenizer.bos_token_id
        head, tail = plain._encode_pair("1 + 1 =", " 2")
        assert (head[0], [*head, *tail].count(bos)) == (bos, 1)
        assert plain.tok_batch_encode(["1 + 1 ="])[0][0].tolist().count(bos) == 1
        assert bos not in plain.tok_encode("1 + 1 =")

    def test_what_is_cut_is_counted(self, plain):
        long = "1 + 1 = 2. " * plain.max_length
        plain._encode_pair(long, " 2")
        plain.tok_batch_encode([long, "short"], left_truncate_len=16)
        assert plain.num_cut == 2

    def test_what_does_not_fit_is_refused(self, plain):
        from finetune.errors import InputError

        for answer, message in (("", "of 0 tokens"), ("2 " * plain.max_length, "allowed: 1 to")):
            with pytest.raises(InputError, match=message):
                plain._encode_pair("1 + 1 =", answer)


@needs_harness
class TestResult:
    def test_models_are_compared(self, chat, tmp_path, capsys):
        write_choice(tmp_path / "tasks")
        write_rolling(tmp_path / "tasks", [{"text": row["question"]} for row in QUESTIONS])
        code, found, error = evaluate(
            capsys,
            chat.path,
            *("--lm-eval", "sums,text", "--lm-eval-tasks", tmp_path / "tasks"),
            *("--against", "base,merged"),
        )
        assert code == 0
        assert [other["model"] for other in found["against"]] == ["base", "merged"]
        for name in ("base", "merged"):
            assert set(found["compared"][name]) == {"sums", "text", "most_changed"}
        merged, base = found["against"][1], found["against"][0]
        same = found["compared"]["merged"]["sums"]
        assert (same["difference"], same["num_same"]) == (0.0, len(QUESTIONS))
        apart = found["compared"]["base"]["text"]
        difference = found["tasks"]["text"]["score"] - base["tasks"]["text"]["score"]
        assert apart["difference"] == pytest.approx(difference, rel=1e-6)
        assert abs(difference) > 0.01
        assert merged["tasks"]["text"]["score"] == pytest.approx(
            found["tasks"]["text"]["score"], rel=1e-4
        )
        kept = json.loads((chat.eval / "lm-eval.json").read_text())
        assert kept == found
        assert set(kept["lm_eval"]["config_sha256"]) == {"sums", "text"}
        assert kept["lm_eval"]["version"]
        assert (chat.eval / "answers" / "lm-eval.sums.merged.jsonl").exists()
        assert "eval     merged: sums" in error

    def test_the_table(self, chat, tmp_path, capsys):
        write_choice(tmp_path / "tasks")
        write_rolling(tmp_path / "tasks")
        argv = ["--lm-eval", "sums,text", "--lm-eval-tasks", str(tmp_path / "tasks")]
        assert main(["eval", str(chat.path), *argv, "--against", "base", "--limit", "2"]) == 0
        out = capsys.readouterr().out
        assert "/2)" in next(line for line in out.splitlines() if line.startswith("sums"))
        row = next(line for line in out.splitlines() if line.startswith("text"))
        assert "%" not in row and "-" in row

    def test_fail_if_worse(self, chat, small_base, tmp_path, capsys):
        opened = open_variant(chat, "adapter")
        questions = [row["question"] for row in QUESTIONS]
        answers = _written(opened, questions)
        rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
        write_generation(tmp_path / "tasks", rows)
        code, found, error = evaluate(
            capsys,
            small_base,
            *("--run", chat.path, "--lm-eval", "writes", "--lm-eval-tasks", tmp_path / "tasks"),
            *("--against", chat.path, "--fail-if-worse"),
        )
        assert found["against"][0]["tasks"]["writes"]["score"] == 1.0
        assert found["tasks"]["writes"]["score"] < 0.5
        assert code == 3
        assert "writes -" in error


@needs_harness
class TestErrors:
    def test_what_cannot_be_asked_is_named_together(self, chat, tmp_path, capsys):
        folder = tmp_path / "tasks"
        write_choice(folder, name="gone")
        (folder / "gone.jsonl").unlink()
        write_choice(folder, name="code", unsafe_code=True)
        write_choice(folder, name="far", dataset_path="someone/something", dataset_kwargs=None)
        write_task(
            folder,
            "foreign",
            QUESTIONS,
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{label}}",
            metric_list=[mean_of("a_metric_of_the_hub")],
        )
        shutil.rmtree(chat.adapter)  # nothing is loaded before the tasks are known to be good
        chat.model.mkdir()
        names = "gone,code,far,foreign"
        code, _, error = evaluate(capsys, chat.path, "--lm-eval", names, "--lm-eval-tasks", folder)
        assert code == 2
        assert "4 findings" in error
        assert "gone.jsonl" in error
        assert "someone/something" in error
        assert "code that a model has written" in error
        assert "a_metric_of_the_hub is not the harness's own" in error

    def test_no_such_folder(self, chat, tmp_path, capsys):
        code, _, error = evaluate(
            capsys, chat.path, "--lm-eval", "a", "--lm-eval-tasks", tmp_path / "none"
        )
        assert (code, "no such folder" in error) == (2, True)

    @pytest.mark.slow
    def test_unknown_names_and_files_that_cannot_be_read(self, chat, tmp_path, capsys):
        write_choice(tmp_path / "tasks")
        (tmp_path / "tasks" / "broken.yaml").write_text("task: [", encoding="utf-8")
        names = "sumz,broken"
        code, _, error = evaluate(
            capsys, chat.path, "--lm-eval", names, "--lm-eval-tasks", tmp_path / "tasks"
        )
        assert code == 2
        assert "sumz: neither" in error
        assert "has sums" in error
        assert "broken.yaml: cannot be read" in error
