"""What a person does wrong at the command line: one clear message, the right code, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small_runs import ROOT, Bench, embedded_rows, flip_bit, losses, write_rows

from finetune.__main__ import VERBS, main
from finetune.errors import Interrupted
from finetune.run_folder import RunFolder
from finetune.train import train


def alpaca(**columns):
    return {"instruction": "Add.", "input": "1 and 2", "output": "3"} | columns


def messages(*contents):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


class TestTrainRefuses:
    """Each case: what is changed, and what the message must say."""

    def refused(self, bench, capsys, *overrides, code=2):
        """Runs `train`; returns the one message it ends with."""
        assert main(["train", str(bench.config_file), *overrides]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("error:") == 1
        assert "Traceback" not in captured.err
        return captured.err[captured.err.index("error:") :]

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("train.learning_rat=1e-4", ["train.learning_rat", "did you mean", "learning_rate"]),
            ("trian.max_steps=3", ["trian", "train"]),
            ("train.max_steps=many", ["train.max_steps", "many"]),
            ("train.learning_rate=fast", ["train.learning_rate", "fast"]),
            ("adapter.r=0", ["adapter.r", "0"]),
            ("adapter.lora_dropout=1.5", ["adapter.lora_dropout", "1.5"]),
            ("base.dtype=float8", ["base.dtype", "float8", "bfloat16"]),
            ("recipe=rlhf", ["recipe", "rlhf", "sft"]),
            ("train.max_steps", ["train.max_steps"]),
            ("adapter.target_modules=[lm_head]", ["lm_head", "q_proj"]),
            ("train.warmup_steps=-1", ["train.warmup_steps", "-1"]),
        ],
    )
    def test_a_setting(self, bench, capsys, override, said):
        message = self.refused(bench, capsys, override)
        for word in said:
            assert word in message
        assert not bench.run_folder().path.exists()

    def test_all_wrong_settings_at_once(self, bench, capsys):
        wrong = ("train.learning_rat=1", "adapter.r=x", "data.on_overflow=cut")
        message = self.refused(bench, capsys, *wrong)
        assert message.startswith("error: 3 findings:")
        assert all(override.split("=")[0] in message for override in wrong)

    def test_a_place_in_the_file(self, bench, capsys):
        text = bench.config_file.read_text().replace("lora_alpha: 8", "lora_alfa: 8")
        bench.config_file.write_text(text)
        line = next(n for n, row in enumerate(text.splitlines(), 1) if "lora_alfa" in row)
        assert f"{bench.config_file}:{line}" in self.refused(bench, capsys)

    def test_a_target_that_matches_nothing(self, bench, capsys):
        message = self.refused(bench, capsys, "adapter.target_modules=[q_proj, wq]")
        assert "adapter.target_modules: wq matches no linear layer" in message
        assert "q_proj" in message
        assert bench.run_folder().state()["exit_code"] == 2

    @pytest.mark.parametrize("name", ["nowhere.yaml", "."])
    def test_a_missing_config(self, capsys, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        assert main(["train", name]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert name in said

    @pytest.mark.parametrize("text", ["", "recipe: sft\nbase: {path: [", "- a\n- b\n", "\x00"])
    def test_a_config_that_is_none(self, capsys, tmp_path, text):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        assert main(["train", str(path)]) == 2
        said = capsys.readouterr().err
        assert "broken.yaml" in said
        assert "Traceback" not in said

    def test_a_missing_data_file(self, bench, capsys):
        message = self.refused(bench, capsys, "data.train=rows/missing.jsonl")
        assert "rows/missing.jsonl: no such file" in message

    @pytest.mark.parametrize("text", ["", "\n\n  \n", "[]"])
    def test_an_empty_data_file(self, bench, capsys, text):
        bench.train_file.write_text(text)
        message = self.refused(bench, capsys)
        assert str(bench.train_file) in message

    def test_broken_lines_are_all_named(self, bench, capsys):
        good = json.dumps(alpaca())
        bench.train_file.write_text(f'{good}\n{{"instruction": \n{good}\n[1, 2]\n')
        message = self.refused(bench, capsys)
        assert f"{bench.train_file}:2" in message
        assert f"{bench.train_file}:4" in message
        assert f"{bench.train_file}:3" not in message

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"instruction": "Add.", "input": ""}, "output"),
            (alpaca(output=None), "output"),
            (alpaca(output=3), "output"),
            ({"riddle": "?", "answer": "!"}, "riddle, answer"),
        ],
    )
    def test_a_row_that_is_no_example(self, bench, capsys, row, said):
        write_rows(bench.train_file, [alpaca(), row] if "instruction" in row else [row])
        message = self.refused(bench, capsys)
        assert said in message
        assert str(bench.train_file) in message

    def test_a_conversation_in_the_wrong_order(self, bench, capsys):
        bad = {"messages": [{"role": "assistant", "content": "Hi."}]}
        write_rows(bench.train_file, [messages("a", "b"), bad])
        assert f"{bench.train_file}:2" in self.refused(bench, capsys)

    def test_only_rows_without_an_answer(self, bench, capsys):
        write_rows(bench.train_file, [messages("Hello?"), messages("a", " "), alpaca_like_empty()])
        message = self.refused(bench, capsys)
        assert "no row is left to train on" in message
        assert "without an answer" in message

    def test_rows_that_are_all_too_long(self, bench, capsys):
        message = self.refused(bench, capsys, "data.max_length=8")
        assert "longer than data.max_length (8 tokens)" in message

    def test_an_overlong_row_where_it_is_an_error(self, bench, capsys):
        message = self.refused(bench, capsys, "data.max_length=40", "data.on_overflow=error")
        assert "over data.max_length 40" in message

    def test_a_missing_base(self, bench, capsys):
        assert "no such folder" in self.refused(bench, capsys, "base.path=models/none/here")

    def test_a_run_folder_of_another_config(self, bench, capsys):
        bench.train("train.max_steps=1")
        assert "train.max_steps: the folder has 1, the config 2" in self.refused(
            bench, capsys, "train.max_steps=2"
        )

    def test_debug_shows_where(self, bench, capsys):
        code = main(["train", str(bench.config_file), "data.train=missing.jsonl", "--debug"])
        assert code == 2
        assert "Traceback" in capsys.readouterr().err


def alpaca_like_empty():
    return messages("x", "")


class TestTrainSays:
    def test_a_row_without_an_answer_among_others_is_dropped_and_named(self, bench, capsys):
        rows = embedded_rows("train", 8)
        rows[3] = messages("Hello?")
        write_rows(bench.train_file, rows)
        assert main(["train", str(bench.config_file), "train.max_steps=1"]) == 0
        said = capsys.readouterr().err
        assert "7 of 8 rows" in said
        assert f"dropped 1: without an answer ({bench.train_file}:4)" in said
        ledger = json.loads((bench.run_folder().path / "data.json").read_text())["train"]
        assert (ledger["rows_kept"], ledger["rows_dropped"]) == (7, 1)

    def test_nothing_on_stdout_and_no_escape_codes_without_a_terminal(self, bench, capsys):
        assert main(["train", str(bench.config_file), "train.max_steps=1"]) == 0
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "\x1b" not in captured.err


class TestVerbs:
    @pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
    def test_without_a_verb_all_are_listed(self, argv, capsys):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert all(f"  {verb} " in out for verb in VERBS)

    def test_an_unknown_verb(self, capsys):
        assert main(["trian"]) == 2
        said = capsys.readouterr().err
        assert "trian" in said
        assert "train" in said

    @pytest.mark.parametrize("verb", VERBS)
    def test_each_has_help(self, verb, capsys):
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
        assert f"finetune {verb}" in capsys.readouterr().out

    @pytest.mark.parametrize("verb", VERBS)
    def test_an_unknown_flag_ends_with_2(self, verb, capsys):
        with pytest.raises(SystemExit) as ended:
            main([verb, "--no-such-flag"])
        assert ended.value.code == 2
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        "argv",
        [
            ("eval", "runs/none"),
            ("merge", "runs/none"),
            ("generate", "runs/none", "--prompt", "x"),
            ("chat", "runs/none"),
            ("verify", "runs/none"),
            ("eval",),
            ("merge",),
            ("preview", "none.yaml"),
        ],
    )
    def test_a_run_that_is_not_there(self, argv, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main([*argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert "Traceback" not in captured.err
        assert list(tmp_path.iterdir()) == []

    def test_doctor(self, capsys):
        assert main(["doctor", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["packages"]["torch"]
        assert {"gpus", "memory_gib", "disk_free_gib", "bfloat16_units"} <= set(facts)
        assert main(["doctor"]) == 0
        assert "packages" in capsys.readouterr().out


class TestVerify:
    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory, small_base):
        return Bench(tmp_path_factory.mktemp("run"), small_base).train("train.max_steps=2")

    @pytest.fixture
    def run(self, trained, tmp_path):
        return RunFolder(shutil.copytree(trained.path, tmp_path / "copy"))

    def test_a_whole_run(self, run, capsys):
        assert main(["verify", str(run.path), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        names = {path.rsplit("/", 1)[-1] for path in result["folders"]}
        assert names == {"adapter", "step-000002"}
        assert result["findings"] == []

    def test_every_damaged_file_is_named(self, run, capsys):
        flip_bit(run.adapter / "adapter_config.json")
        (run.checkpoints / "step-000002" / "rng.json").unlink()
        assert main(["verify", str(run.path)]) == 3
        said = capsys.readouterr().err
        assert "adapter_config.json" in said
        assert "rng.json: missing" in said
        assert main(["verify", str(run.adapter)]) == 3
        assert "rng.json" not in capsys.readouterr().err

    def test_a_folder_without_anything_published(self, tmp_path, capsys):
        assert main(["verify", str(tmp_path)]) == 2
        assert "manifest.json" in capsys.readouterr().err


def test_ctrl_c_during_training_loses_nothing(bench, monkeypatch):
    """A real process, a real SIGINT: 75, one message, and the same command goes on."""
    command = [sys.executable, "-m", "finetune", "train", str(bench.config_file)]
    settings = ("train.max_steps=5000", "train.save_steps=5000")
    run = bench.run_folder(*settings)
    with subprocess.Popen(
        [*command, *settings], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (run.metrics.exists() and run.metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        out, said = process.communicate(timeout=120)
    assert process.returncode == 75
    assert out == ""
    assert "Traceback" not in said
    assert said.count("error:") == 1
    assert "SIGINT: finishing this step, then saving" in said
    state = run.state()
    assert (state["state"], state["exit_code"]) == ("interrupted", 75)
    stopped = len(losses(run))
    assert f"stopped after step {stopped}" in state["reason"]
    assert not run.adapter.exists()

    from test_train import on_step

    on_step(monkeypatch, lambda trainer: signal.raise_signal(signal.SIGTERM), stopped + 2)
    with pytest.raises(Interrupted, match=f"step {stopped + 2}"):
        train(bench.load(*settings))
    assert len(losses(run)) == stopped + 2


STAGING = """
import sys, time
from pathlib import Path
from finetune import __main__, artifact, doctor

def stage(argv):
    with artifact.staged(Path(sys.argv[1]) / "out") as folder:
        (folder / "half").write_text("x")
        print("staged", flush=True)
        time.sleep(60)

doctor.main = stage
sys.exit(__main__.main(["doctor"]))
"""


def test_a_verb_that_is_ended_leaves_no_staged_folder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", STAGING, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout.readline() == "staged\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert list(tmp_path.iterdir()) == []
