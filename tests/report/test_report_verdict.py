"""The verdict says what the files say: better, worse, no more than chance, what nobody knows."""

from __future__ import annotations

import pytest

from finetune.reports.facts import Facts, State
from finetune.reports.metrics import Training
from finetune.reports.results import Difference, ModelScores, Result, TaskScore
from finetune.reports.verdict import judge, overall


def difference(metric="loss", value=-0.5, p_value=0.001, **more):
    known = {
        "low": value - 0.1,
        "high": value + 0.1,
        "num_better": 5,
        "num_worse": 1,
        "num_same": 0,
    }
    return Difference(metric, "base", value, p_value=p_value, **{**known, **more})


def model(name="adapter", loss=1.0, score=0.5):
    tasks = {"exact_match": TaskScore(score)}
    return ModelScores(name, {"loss": loss, "rows": 6.0}, {}, {}, tasks)


def facts(*differences, state="finished", **more):
    result = Result(
        "heldout", None, None, (model(), model("base", 1.5, 0.25)), differences, {}, {}, {}
    )
    return Facts("run", State(state), results=(result,), **more)


@pytest.mark.parametrize(
    ("differences", "outcome", "level"),
    [
        ([difference()], "better", "good"),
        ([difference(value=0.5)], "worse", "stop"),
        ([difference(p_value=0.05)], "level", "warn"),
        ([difference(p_value=None)], "level", "warn"),
        ([difference(value=-0.0001)], "level", "warn"),  # rounding, however sure
        ([difference(), difference("exact_match", 0.2)], "better", "good"),
        ([difference(), difference("exact_match", -0.2)], "mixed", "warn"),
        ([difference(), difference("exact_match", 0.2, p_value=0.4)], "better", "good"),
        ([difference("exact_match", 0.0, p_value=0.001)], "level", "warn"),
        ([], None, "plain"),
    ],
)
def test_the_outcome_against_the_base(differences, outcome, level):
    found = facts(*differences)
    assert overall(found) == outcome
    assert judge(found).level == level


def test_lower_and_higher_are_the_right_way_round():
    text = judge(facts(difference(), difference("exact_match", 0.25))).text
    assert "is better than the base: the loss is 0.5000 nats a token lower" in text
    assert "(95 %: −0.6000 to −0.4000, p 0.001)" in text
    assert "exact match is 25.0 points higher" in text
    text = judge(facts(difference(value=0.5), difference("exact_match", -0.25))).text
    assert "is worse than the base: the loss is 0.5000 nats a token higher" in text
    assert "exact match is 25.0 points lower" in text
    assert (
        "exact match differs by no more than chance"
        in judge(facts(difference("exact_match", -0.25, p_value=0.5))).text
    )


def test_numbers_stand_beside_the_bases():
    assert judge(facts(difference())).figures == (
        ("1.500 → 1.000", "held-out loss"),
        ("25.0 % → 50.0 %", "exact match"),
    )


@pytest.mark.parametrize(
    ("heldout", "said"),
    [
        (((0, 3.0), (4, 1.0)), "fell from 3.0000 (before training) to 1.0000 (step 4)."),
        (((2, 3.0), (4, 1.0)), "fell from 3.0000 (step 2) to 1.0000 (step 4)."),
        (
            ((2, 1.0), (4, 3.0)),
            "rose from 1.0000 (step 2) to 3.0000 (step 4); it was lowest, 1.0000",
        ),
        (((2, 3.0), (3, 0.5), (4, 1.0)), "to 1.0000 (step 4); it was lowest, 0.5000, at step 3"),
        (((2, 3.0),), "was 3.0000 nats a token at step 2"),
    ],
)
def test_the_course_of_the_heldout_loss(heldout, said):
    assert said in judge(Facts("run", State("finished"), training=Training((), heldout))).text


def unknown(found):
    return " | ".join(judge(found).unknown)


def test_what_is_not_known_is_said():
    adapter = {"kind": "adapter", "sha256": "1"}
    bare = Facts("run", State("finished"), adapter=adapter, data={"heldout": {"rows_read": 0}})
    assert "none are held out" in unknown(bare)
    assert "better than the base" in unknown(bare)
    assert "merge RUN" in unknown(bare)
    whole = facts(
        difference(), adapter=adapter, merge={"adapter_sha256": "1", "proof": {"prompts": 0}}
    )
    assert unknown(whole) == ""
    assert "too few rows" in unknown(facts(difference(p_value=None)))
    assert "merge RUN" not in unknown(Facts("run", State("finished"), adapter={"kind": "model"}))
    alone = facts()
    assert "--against base" in unknown(alone)


def test_what_a_finished_run_noted_is_said():
    state = State("finished", 0, "stopped early after step 3: 2 evaluations without improvement")
    steps = ({"step": 3, "loss": 1.0},)
    found = Facts(
        "run", state, training=Training(steps, ()), adapter={"kind": "adapter", "step": 2}
    )
    text = judge(found).text
    assert "Training ended after step 3, with the weights of step 2." in text
    assert "Note: stopped early after step 3" in text
    assert "weights of step" not in judge(Facts("run", state, training=Training(steps, ()))).text
