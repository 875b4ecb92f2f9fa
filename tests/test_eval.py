"""Evaluation: numbers that do not depend on how they were computed, and a verdict that holds."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import Bench, embedded_rows, write_base, write_rows
from transformers import AutoModelForCausalLM

from finetune.__main__ import main
from finetune.data import load_data
from finetune.inference import open_variant
from finetune.merge import merge
from finetune.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_base):
    """A finished run, merged."""
    run = Bench(tmp_path_factory.mktemp("run"), small_base).train()
    merge(run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may write to."""
    return RunFolder(shutil.copytree(trained.path, tmp_path / "copy"))


def evaluate(capsys, *argv):
    """`eval … --json`: its exit code and its object."""
    code = main(["eval", *map(str, argv), "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else None


class TestNumbers:
    def test_they_are_those_of_plain_transformers_in_float64(self, run, capsys):
        code, result = evaluate(capsys, run.path)
        assert code == 0
        base = open_variant(run, "base").base
        documents = load_data(run.config(), base.tokenizer, base.chat_format).heldout
        model = AutoModelForCausalLM.from_pretrained(
            run.merged, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        total, count = 0.0, 0
        for document in documents:
            ids = torch.tensor([document.input_ids])
            with torch.no_grad():
                log_p = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            for position in range(1, ids.shape[1]):
                if document.train_mask[position]:
                    total, count = total - log_p[position - 1, ids[0, position]].item(), count + 1
        assert result["loss"] == pytest.approx(total / count, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
        assert (result["tokens"], result["rows"]) == (count, 9)

    def test_they_do_not_depend_on_the_batch_size(self, bench, capsys):
        results = []
        for size in (1, 2, 16):
            run = bench.train(f"eval.per_device_eval_batch_size={size}", f"run.name=size-{size}")
            results.append(evaluate(capsys, run.path)[1])
        assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-7)
        assert results[0]["loss"] == pytest.approx(results[2]["loss"], rel=1e-7)
        assert len({(r["tokens"], r["rows"]) for r in results}) == 1

    def test_a_mean_of_row_means_would_be_another_number(self, run, capsys):
        rows = embedded_rows("heldout", 9)
        single = []
        for number, row in enumerate(rows):
            path = write_rows(run.path / f"row{number}.jsonl", [row])
            single.append(evaluate(capsys, run.path, "--data", path)[1])
        whole = evaluate(capsys, run.path)[1]
        tokens = sum(r["tokens"] for r in single)
        mean = sum(r["loss"] * r["tokens"] for r in single) / tokens
        assert whole["loss"] == pytest.approx(mean, rel=1e-7)
        assert abs(whole["loss"] - sum(r["loss"] for r in single) / 9) > 1e-2

    def test_merged_is_adapter_and_base_is_neither(self, run, capsys):
        code, result = evaluate(capsys, run.path, "--against", "base,merged")
        assert (code, result["model"]) == (0, "adapter")
        base, merged = result["against"]
        assert (base["model"], merged["model"]) == ("base", "merged")
        assert merged["loss"] == pytest.approx(result["loss"], abs=1e-5)
        assert abs(base["loss"] - result["loss"]) > 0.1
        recorded = json.loads((run.adapter / "manifest.json").read_text())["facts"]["heldout_loss"]
        assert result["loss"] == pytest.approx(recorded, rel=1e-7)

    def test_it_writes_its_numbers_and_nothing_else(self, run, capsys):
        before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
        _, result = evaluate(capsys, run.path)
        after = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
        new = set(after) - set(before)
        assert [path.parent.name for path in new] == ["eval"]
        assert json.loads(new.pop().read_text()) == result
        assert all(after[path] == content for path, content in before.items())

    def test_a_model_folder_of_no_run(self, run, capsys, tmp_path):
        folder = shutil.copytree(run.merged, tmp_path / "elsewhere")
        rows = write_rows(tmp_path / "rows.jsonl", embedded_rows("heldout", 9))
        code, result = evaluate(capsys, folder, "--data", rows)
        assert code == 0
        assert result["loss"] == pytest.approx(evaluate(capsys, run.path)[1]["loss"], abs=1e-5)
        assert evaluate(capsys, folder)[0] == 2

    def test_columns_of_the_users_own_are_read_everywhere(self, bench, capsys):
        """The proof of a merge and `--data` read files as training did."""
        rows = [r["messages"] for r in embedded_rows("heldout", 30) if len(r["messages"]) == 2]
        named = [{"q": q["content"], "a": a["content"]} for q, a in rows]
        settings = []
        for side, path, part in (
            ("train", bench.train_file, named[4:]),
            ("heldout", bench.heldout_file, named[:4]),
        ):
            write_rows(path, part)
            columns = "columns: {prompt: q, completion: a}"
            settings.append(f"data.{side}=[{{path: {path}, {columns}}}]")
        run = bench.train(*settings, "train.max_steps=1")
        assert merge(run)["proof"]["rows"] == 4
        own = evaluate(capsys, run.path)[1]
        same = evaluate(capsys, run.path, "--data", bench.heldout_file)[1]
        standard = [{"prompt": q["content"], "completion": a["content"]} for q, a in rows[:4]]
        path = write_rows(bench.folder / "standard.jsonl", standard)
        assert own["loss"] == same["loss"] == evaluate(capsys, run.path, "--data", path)[1]["loss"]


class TestAnswers:
    @pytest.fixture(scope="class")
    def learned(self, tmp_path_factory, small_base):
        """Four rows learned by heart."""
        bench = Bench(tmp_path_factory.mktemp("learned"), small_base)
        rows = [r for r in embedded_rows("train", 60) if len(r["messages"]) == 2][:4]
        write_rows(bench.train_file, rows)
        return bench.train(
            *("train.max_steps=60", "adapter.r=16", "train.per_device_train_batch_size=4"),
            *("data.packing=false", "eval.tasks=exact_match", "eval.max_new_tokens=40"),
        )

    def test_rows_learned_by_heart_are_answered_and_stopped(self, learned, capsys):
        path = learned.path.parent.parent / "train.jsonl"
        _, result = evaluate(capsys, learned.path, "--data", path, "--against", "base")
        assert result["exact_match"] == 1.0
        assert result["answers"] == 4
        assert result["loss"] < 0.05
        assert result["against"][0]["exact_match"] == 0.0
        assert result["same_text"] == {"base": 0}

    def test_they_are_counted_by_family_and_template(self, learned, capsys):
        rows = embedded_rows("heldout", 9)
        _, result = evaluate(capsys, learned.path)
        for column in ("family", "template"):
            groups = result["groups"][column]
            counts = {v: sum(r[column] == v for r in rows) for v in {r[column] for r in rows}}
            assert {value: count for value, (_, count) in groups.items()} == counts
            right = sum(right for right, _ in groups.values())
            assert right == round(result["exact_match"] * 9)

    def test_the_table_shows_every_model(self, learned, capsys):
        assert main(["eval", str(learned.path), "--against", "base"]) == 0
        head, _, *lines = capsys.readouterr().out.splitlines()
        assert head.split() == ["adapter", "base"]
        names = [line.split()[0] for line in lines if line]
        assert {"loss", "perplexity", "exact"} <= set(names[:4])
        assert "  template unseen" in "\n".join(lines)

    def test_a_probe_continues_plain_text(self, learned, capsys, tmp_path):
        rows = write_rows(
            tmp_path / "probe.jsonl",
            [{"prompt": "In Egypt the capital is", "answer": "Cairo.", "family": "capital"}] * 3,
        )
        code, result = evaluate(capsys, learned.path, "--probe", rows)
        assert (code, result["answers"]) == (0, 3)
        assert result["groups"]["family"]["capital"][1] == 3
        assert evaluate(capsys, "--probe", rows)[0] == 2

    def test_a_probe_without_its_columns(self, learned, capsys, tmp_path):
        rows = write_rows(tmp_path / "probe.jsonl", [{"prompt": "x"}, {"answer": "y"}])
        assert main(["eval", str(learned.path), "--probe", str(rows)]) == 2
        said = capsys.readouterr().err
        assert "probe.jsonl:1" in said
        assert "probe.jsonl:2" in said


class TestVerdict:
    @pytest.fixture(scope="class")
    def worse(self, tmp_path_factory, small_base):
        """Arguments: the base, against a run that learned something on every row."""
        bench = Bench(tmp_path_factory.mktemp("learned"), small_base)
        run = bench.train("train.max_steps=12", "train.learning_rate=0.003")
        return (small_base, "--run", run.path, "--against", run.path)

    def test_a_worse_model_fails_where_it_is_asked_for(self, worse, capsys):
        assert evaluate(capsys, *worse)[0] == 0
        code, result = evaluate(capsys, *worse, "--fail-if-worse")
        assert code == 3
        assert result["loss"] > result["against"][0]["loss"], "the numbers come all the same"

    def test_a_better_one_passes_and_so_does_an_equal_one(self, bench, capsys):
        run = bench.train("train.max_steps=12", "train.learning_rate=0.003")
        merge(run)
        against = ("--against", "base,merged", "--fail-if-worse")
        assert evaluate(capsys, run.path, *against)[0] == 0
        other = ("--against", str(run.path), "--fail-if-worse")
        assert evaluate(capsys, run.merged, *other)[0] == 0

    def test_what_is_said_is_how_sure_one_can_be(self, worse, capsys):
        assert main(["eval", *map(str, worse), "--fail-if-worse"]) == 3
        captured = capsys.readouterr()
        words = r"loss \+[\d.]+ \(95 %: \+[\d.]+ to \+[\d.]+\), p 0.0039; "
        words += "better on 0 rows, worse on 9, same on 0"
        assert re.search(f" against adapter\n  {words}", captured.out)
        assert re.search(f"error: .* is worse than adapter: {words}", captured.err)

    def test_every_difference_is_in_the_result(self, run, capsys):
        result = evaluate(capsys, run.path, "--against", "base,merged")[1]
        for other in result["against"]:
            loss = result["compared"][other["model"]]["loss"]
            assert loss["difference"] == pytest.approx(result["loss"] - other["loss"], abs=1e-12)
            assert loss["num_higher"] + loss["num_lower"] + loss["num_same"] == 9
        assert result["compared"]["merged"]["loss"]["num_same"] == 9
        assert result["compared"]["merged"]["most_changed"] == []
        changed = result["compared"]["base"]["most_changed"]
        assert {Path(row["where"]).name for row in changed} == {
            f"heldout.jsonl:{n + 1}" for n in range(9)
        }
        apart = [abs(row["loss"] - row["loss_of_other"]) for row in changed]
        assert apart == sorted(apart, reverse=True)

    def test_so_few_rows_that_nothing_could_fail_are_said(self, worse, capsys, tmp_path):
        rows = write_rows(tmp_path / "four.jsonl", embedded_rows("heldout", 4))
        arguments = (*worse, "--data", rows, "--fail-if-worse")
        assert main(["eval", *map(str, arguments)]) == 2
        assert "4 rows are too few" in capsys.readouterr().err

    def test_worse_than_nothing_is_no_question(self, run, capsys):
        assert evaluate(capsys, run.path, "--fail-if-worse")[0] == 2


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--against", "nonsense"), "neither base, merged nor a folder"),
            (("--data", "missing.jsonl"), "no such file"),
        ],
    )
    def test_arguments(self, run, capsys, arguments, message):
        assert main(["eval", str(run.path), *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_a_run_without_heldout_rows(self, bench, capsys):
        run = bench.train("data.heldout=[]", "train.max_steps=1")
        assert main(["eval", str(run.path)]) == 2
        assert "no held-out rows" in capsys.readouterr().err

    def test_a_model_with_another_tokenizer(self, run, capsys, tmp_path):
        """Its loss on the first model's ids would be a number without meaning."""
        other = write_base(tmp_path / "other")
        path = other / "tokenizer.json"
        content = json.loads(path.read_text())
        vocab = content["model"]["vocab"]
        one, two = list(vocab)[500], list(vocab)[501]
        vocab[one], vocab[two] = vocab[two], vocab[one]
        path.write_text(json.dumps(content))
        assert main(["eval", str(run.path), "--against", str(other)]) == 2
        assert "tokenizer" in capsys.readouterr().err


class TestBadInput:
    """Nothing wrong ends in a number that looks right."""

    def test_one_row_has_numbers_and_no_interval(self, run, capsys, tmp_path):
        path = write_rows(tmp_path / "one.jsonl", embedded_rows("heldout", 1))
        code, result = evaluate(capsys, run.path, "--data", path, "--against", "base")
        assert (code, result["rows"]) == (0, 1)
        assert result["compared"]["base"]["loss"]["low"] is None
        assert main(["eval", str(run.path), "--data", str(path), "--against", "base"]) == 0
        assert "nan" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("content", "message"),
        [("", "is empty"), ("\n\n", "is empty"), ('{"question": "x"}\n', "question")],
    )
    def test_files_without_rows_to_score(self, run, capsys, tmp_path, content, message):
        path = tmp_path / "rows.jsonl"
        path.write_text(content)
        assert main(["eval", str(run.path), "--data", str(path)]) == 2
        assert message in capsys.readouterr().err

    def test_rows_longer_than_the_context(self, run, capsys, tmp_path, small_base):
        context = json.loads((small_base / "config.json").read_text())["max_position_embeddings"]
        rows = embedded_rows("heldout", 3)
        rows[1]["messages"][0]["content"] = "word " * context
        path = write_rows(tmp_path / "long.jsonl", rows)
        config = run.path / "config.yaml"
        config.write_text(
            re.sub(r"max_length: 128\b", f"max_length: {2 * context}", config.read_text())
        )
        assert main(["eval", str(run.path), "--data", str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{path}:2: " in error and f"context is {context:,}" in error
        assert f"{path}:1" not in error

    def test_a_run_without_an_adapter(self, bench, capsys):
        run = bench.train()
        shutil.rmtree(run.adapter)
        assert main(["eval", str(run.path)]) == 2
        assert "neither adapter nor model" in capsys.readouterr().err

    def test_weights_that_give_no_numbers(self, run, capsys):
        path = run.merged / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name][0, 0] = math.nan
        save_file(tensors, path, {"format": "pt"})
        (run.merged / "manifest.json").unlink()
        assert main(["eval", str(run.merged), "--run", str(run.path)]) == 4
        assert "the held-out loss is nan" in capsys.readouterr().err
        assert main(["generate", str(run.merged), "--prompt", "Hello"]) == 4
        assert "logits are not numbers" in capsys.readouterr().err
