"""`eval --lm-eval`: its result, its comparison, what it refuses.

Most of it needs the extra `lm-eval` and is skipped without it; `make setup-lm-eval` installs it.
"""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from harness_tasks import (
    QUESTIONS,
    evaluate,
    mean_of,
    needs_harness,
    write_choice,
    write_generation,
    write_rolling,
    write_task,
    written,
)

from finetune.__main__ import main
from finetune.inference import open_variant

pytestmark = pytest.mark.usefixtures("one_thread")


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
    def test_arguments_that_do_not_fit(self, tmp_path, capsys, argv, message):
        code, _, error = evaluate(capsys, tmp_path, *argv)
        assert (code, message in error) == (2, True), error


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
        answers = written(opened, questions)
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
