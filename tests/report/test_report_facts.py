"""Every number on the page is a file's; what is missing or damaged is said, and stops nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import rows_of, section, write_result

from finetune.reports.facts import read_facts
from finetune.reports.metrics import smoothed, thinned
from finetune.reports.results import read_results
from finetune.reports.verdict import judge
from finetune.reports.wording import decimal, percent, signed
from finetune.reports.wording import whole as whole_
from finetune.run_folder import RunFolder, locked


def result_of(run: RunFolder) -> dict:
    return json.loads((run.eval / "heldout.json").read_text())


def test_training_is_the_metrics(whole):
    lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    training = read_facts(whole).training
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 12 == training.last_step
    for column in ("loss", "grad_norm", "learning_rate"):
        assert training.series(column)[1].tolist() == [line[column] for line in steps]
    assert training.total("tokens") == sum(line["tokens"] for line in steps)
    speed = [line["tokens"] / line["seconds"] for line in steps]
    assert training.speed[1].tolist() == speed
    assert training.heldout == tuple(
        (line["step"], line["heldout_loss"]) for line in lines if "heldout_loss" in line
    )
    assert [step for step, _ in training.heldout] == [0, 4, 8, 12]


def test_comparison_is_the_results(whole, report):
    found = result_of(whole)
    page, said = report(whole)
    rows = rows_of(section(page, "comparison"))
    models = [found, *found["against"]]
    assert rows["loss, nats a token"] == [decimal(m["loss"]) for m in models]
    assert rows["exact match"] == [percent(m["exact_match"]) for m in models]
    assert rows["rows"] == [whole_(m["rows"]) for m in models]
    compared = found["compared"]["base"]["loss"]
    table = section(page, "comparison").all("table")[1]
    cells = [cell.text.strip() for cell in table.all("tr")[1].all("td")]
    assert cells[:3] == ["base", "loss", signed(compared["difference"])]
    assert cells[3] == f"{signed(compared['low'])} to {signed(compared['high'])}"
    counts = [compared["num_lower"], compared["num_same"], compared["num_higher"]]
    assert cells[5] == ", ".join(map(str, counts))
    assert f"{abs(compared['difference']):.4f} nats a token" in said["verdict"]


def test_widths_of_wins_and_losses_are_their_shares(whole, report):
    found = result_of(whole)["compared"]["base"]["loss"]
    page, _ = report(whole)
    bar = section(page, "comparison").all(with_class="share")[0]
    shares = {s.classes[0]: s.attributes["style"] for s in bar.all("span")}
    total = sum(found[f"num_{name}"] for name in ("higher", "lower", "same"))
    for kind, key in (("better", "num_lower"), ("same", "num_same"), ("worse", "num_higher")):
        expected = f"width: {100 * found[key] / total:.2f}%" if found[key] else None
        assert shares.get(kind) == expected


def test_ledger_merge_and_environment_are_the_files(whole, report):
    page, _ = report(whole)
    data = json.loads((whole.path / "data.json").read_text())
    rows = rows_of(section(page, "data"))
    for key, label in (("rows_read", "rows read"), ("tokens_trained", "tokens trained")):
        assert rows[label] == [whole_(data[side][key]) for side in ("train", "heldout")]
    proof = json.loads((whole.path / "merge.json").read_text())["proof"]
    merge = rows_of(section(page, "merge"))
    assert merge["same greedy text"] == [str(proof["same_text"])]
    assert merge["tokens compared"] == [str(proof["tokens"])]
    environment = json.loads((whole.path / "environment.json").read_text())
    shown = rows_of(section(page, "environment"))
    assert shown["torch"] == [environment["packages"]["torch"]]
    assert shown["base, sha256"] == [environment["base_fingerprint"]]


def test_older_results_have_their_exact_match_as_a_task(tmp_path):
    old = {"model": "adapter", "loss": 1.0, "rows": 2, "exact_match": 0.5, "answers": 2}
    old["groups"] = {"family": {"add": [1, 2]}}
    (tmp_path / "heldout.json").write_text(json.dumps(old))
    (result,) = read_results(tmp_path, problems := [])
    task = result.models[0].tasks["exact_match"]
    assert (task.score, task.num_answers) == (0.5, 2)
    assert task.groups == {"family": {"add": (1.0, 2.0)}}
    assert problems == []


def test_an_answers_file_outside_the_results_is_not_read(run, report, tmp_path):
    line = {"where": "a:1", "prompt": "q", "expected": ["e"], "written": "w", "score": 1.0}
    write_result(run, {"adapter": [line]})
    (tmp_path / "secret.jsonl").write_text(json.dumps(line | {"prompt": "canary"}) + "\n")
    found = result_of(run)
    for name in ("../../../../secret.jsonl", str(tmp_path / "secret.jsonl"), "a\0b", "x" * 5000):
        found["tasks"]["exact_match"]["answers_file"] = name
        (run.eval / "heldout.json").write_text(json.dumps(found))
        page, _ = report(run)
        assert not section(page, "samples").all("article")


class TestHalfARun:
    def test_only_a_config(self, run, report):
        import shutil

        for path in run.path.iterdir():
            if path.name != "config.yaml":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        page, found = report(run)
        assert found["state"] == "not started"
        assert found["verdict"].startswith("Not started. The folder has a config")
        assert "No step has left a line" in section(page, "curves").text
        assert "Not evaluated" in section(page, "comparison").text
        assert "Not merged" in section(page, "merge").text

    def test_a_failed_run_names_step_and_reason(self, run, report):
        run.write_state(state="failed", exit_code=4, reason="the loss is not finite at step 7")
        page, found = report(run)
        assert found["state"] == "failed"
        assert "the loss is not finite at step 7" in found["verdict"]
        assert "after step 12" in found["verdict"]
        assert "stop" in section(page, "verdict").classes

    def test_a_run_whose_process_died_is_told_from_one_that_goes_on(self, run, report):
        run.write_state(state="running", exit_code=None, reason=None)
        _, found = report(run)
        assert found["state"] == "killed"
        assert "left no reason; the newest checkpoint is of step 12" in found["verdict"]
        with locked(run):
            _, found = report(run)
        assert found["state"] == "running"

    def test_an_interrupted_run_says_how_far(self, run, report):
        lines = run.metrics.read_text().splitlines()[:6]
        run.metrics.write_text("\n".join(lines) + "\n")
        run.write_state(state="interrupted", exit_code=75, reason="stopped after step 5, saved")
        _, found = report(run)
        last = max(json.loads(line)["step"] for line in lines)
        assert f"after step {last} of 12" in found["verdict"]

    @pytest.mark.parametrize(
        "line", ["{not json", "[1]", '{"step": "x", "loss": 1}', "\x00\xff", "9"]
    )
    def test_a_broken_line_of_metrics_is_left_out_and_said(self, run, report, line):
        lines = run.metrics.read_text().splitlines()
        run.metrics.write_text(
            "\n".join([*lines[:4], line, *lines[4:]]) + "\n" + '{"step": 13, "lo'
        )
        page, _ = report(run)
        assert read_facts(run).training.last_step == 12
        if not line.startswith('{"step"'):
            assert "1 lines are no JSON objects and left out (line 5)" in page.text

    @pytest.mark.parametrize("value", ["NaN", "Infinity", '"high"', "null", "true", "1e999", "[]"])
    def test_a_loss_that_is_no_number_is_counted_not_drawn(self, run, report, value):
        with run.metrics.open("a") as file:
            file.write(f'{{"step": 13, "loss": {value}, "grad_norm": {value}, "seconds": 0}}\n')
        page, _ = report(run)
        assert "1 steps have a loss that is no finite number" in section(page, "curves").text
        assert len(read_facts(run).training.series("loss")[0]) == 12


FILES = ["run.json", "environment.json", "data.json", "merge.json", "eval/heldout.json"]
FILES += ["checkpoints/latest.json", "adapter/manifest.json"]
DAMAGE = [
    b"",
    b"{",
    b"[1, 2]",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"train": 3, "tasks": [], "loss": {}}',
]
DAMAGE += [
    b'{"state": 7, "loss": 1, "against": [4], "compared": {"base": 1}, "proof": [], "files": 1}'
]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_stops_nothing(run, report, name):
    for content in DAMAGE:
        (run.path / name).write_bytes(content)
        facts = read_facts(run)
        assert judge(facts).headline
        is_object = content.startswith(b'{"')
        assert is_object or any(f"…/{Path(name).name}" in problem for problem in facts.problems)
    page, _ = report(run)  # after the last one, an object of the wrong types
    assert len(page.all("section")) == 8


def test_what_is_not_readable_is_named_at_the_top(run, report):
    for name in FILES:
        (run.path / name).write_bytes(b"{")
    page, found = report(run)
    said = section(page, "problems").text
    assert all(f"…/{Path(name).name}" in said for name in FILES)
    assert found["state"] == "not started"


@pytest.mark.parametrize("name", [*FILES, "metrics.jsonl", "lock"])
def test_a_folder_in_a_files_place_stops_nothing(run, report, name):
    (run.path / name).unlink()
    (run.path / name).mkdir()
    page, _ = report(run)
    assert len(page.all("section")) == 8


@pytest.mark.parametrize("text", ["recipe: sft\nfuture: {a: 1}\n", "{", "", "\x00", "- a\n"])
def test_a_config_of_another_version_is_said(run, report, text):
    run.config_file.write_text(text)
    page, _ = report(run)
    assert "this version cannot read it" in page.text
    assert "no row can be rendered" in section(page, "masks").text


KEYS = st.sampled_from(
    [
        *("model", "loss", "tasks", "against", "compared", "base", "groups", "score", "by_source"),
        *("most_changed", "difference", "p_value", "exact_match", "same_text", "answers_file"),
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=25,
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, json_values, max_size=8))
def test_any_json_is_read_as_a_result_or_as_a_problem(tmp_path_factory, value):
    from finetune.reports import tables

    folder = tmp_path_factory.mktemp("results")
    (folder / "heldout.json").write_text(json.dumps(value))
    for result in read_results(folder, []):
        tables.scores(result)
        list(tables.breakdowns(result))
        list(tables.changed(result))


def test_a_merge_of_another_adapter_is_said(run, report):
    merge = json.loads((run.path / "merge.json").read_text())
    (run.path / "merge.json").write_text(json.dumps(merge | {"adapter_sha256": "0" * 64}))
    page, found = report(run)
    assert "of another adapter" in found["verdict"]
    assert "stop" in section(page, "verdict").classes


class TestSeries:
    def test_smoothing_is_the_weighted_mean_written_out(self):
        values = np.random.default_rng(0).normal(size=50)
        found = smoothed(values, 7)
        for n in (1, 2, 20, 50):
            weights = np.exp(-np.arange(n)[::-1] / 7)
            assert found[n - 1] == pytest.approx((weights * values[:n]).sum() / weights.sum())

    @settings(deadline=None)
    @given(st.lists(st.floats(-100, 100), min_size=1, max_size=300), st.integers(1, 20))
    def test_a_thinned_line_keeps_its_ends_and_extremes(self, values, most):
        series = (np.arange(len(values), dtype=float), np.array(values))
        steps, kept = thinned(series, most)
        assert len(kept) <= 2 * most + 2
        assert (kept[0], kept[-1]) == (values[0], values[-1])
        assert (kept.min(), kept.max()) == (min(values), max(values))
        assert (np.diff(steps) > 0).all()
        assert all(values[int(s)] == v for s, v in zip(steps, kept, strict=True))

    def test_small_numbers_keep_their_digits(self):
        assert decimal(0.00001234) == "1.2e−05"
        assert decimal(-1.5) == "−1.5000"
        assert (signed(0.25), signed(-0.25), signed(0.0)) == ("+0.2500", "−0.2500", "0.0000")
        assert math.isclose(float(percent(0.8324)[:-2]), 83.2)
