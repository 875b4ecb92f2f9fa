"""What held-out losses decide, against transformers' own callback; its way over a checkpoint."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from finetune.best import BestWatch, Rules

LOSSES = st.lists(st.sampled_from([0.5, 0.9, 1.0, 1.1, 1.3, 2.0]), min_size=1, max_size=20)


def by_transformers(losses, patience, threshold):
    """(best step, step it stops after or None), as the installed library would have it."""
    callback = EarlyStoppingCallback(patience, threshold)
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False)
    state, control = TrainerState(), TrainerControl()
    best = None
    for step, loss in enumerate(losses, start=1):
        callback.on_evaluate(args, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:  # _determine_best_metric
            state.best_metric, best = loss, step
        if control.should_training_stop:
            return best, step
    return best, None


def by_us(losses, rules, resumed_after=None):
    watch = BestWatch(rules)
    for step, loss in enumerate(losses, start=1):
        watch.look(step, loss, 7)
        if step == resumed_after:
            state = json.loads(json.dumps(watch.state()))
            watch = BestWatch(rules)
            watch.restore(state)
        if watch.stops:
            return watch.best_step, step
    return watch.best_step, None


@settings(max_examples=300, deadline=None)
@given(LOSSES, st.integers(1, 4), st.sampled_from([0.0, 0.15, 0.5]), st.integers(1, 20))
@example([2.0, 2.0, 1.0, 1.0], 2, 0.0, 1)
def test_best_and_stop_are_those_of_transformers(losses, patience, threshold, resumed_after):
    rules = Rules(load_best_model_at_end=True, patience=patience, threshold=threshold)
    expected = by_transformers(losses, patience, threshold)
    assert by_us(losses, rules) == expected
    assert by_us(losses, rules, resumed_after) == expected


KEEP_AND_STOP = Rules(load_best_model_at_end=True, patience=3)


def watch_after(*losses, rules=KEEP_AND_STOP):
    watch = BestWatch(rules)
    for step, loss in enumerate(losses):
        watch.look(step, loss, 7)
    return watch


def test_the_base_is_no_candidate_and_is_remembered():
    watch = watch_after(1.0, 3.0, 2.0)
    assert (watch.start_loss, watch.best_step, watch.best_loss) == (1.0, 2, 2.0)
    (note,) = watch.notes(2, 2.0)
    assert note.startswith("training made the held-out loss no better: 1.0000 before step 1, 2.0")
    assert watch_after(3.0, 2.0).notes(1, 2.0) == []


def test_an_early_stop_says_what_it_waited_for():
    watch = watch_after(9.0, 1.5, 2.0, 2.0, 2.0)
    assert watch.stops
    (note,) = watch.notes(1, 1.5)
    assert note.startswith(
        "stopped early after step 4: 3 evaluations without improvement on the held-out loss "
        "1.5000 of step 1"
    )


def test_a_step_scored_twice_counts_once():
    watch = watch_after(9.0, 1.0, 2.0)
    assert not watch.look(2, 2.0, 7)
    assert watch.num_without_improvement == 1


def test_losses_of_other_rows_are_not_compared():
    watch = watch_after(9.0, 1.0, 2.0, 2.0)
    assert watch.look(4, 5.0, 8), "of eight tokens, where seven were held out before"
    assert (watch.best_step, watch.num_without_improvement) == (4, 0)


def test_a_best_whose_checkpoint_nobody_kept_is_forgotten():
    stopping = Rules(patience=3)
    state = watch_after(9.0, 1.0, 2.0, rules=stopping).state()
    keeping = BestWatch(Rules(load_best_model_at_end=True, patience=3))
    keeping.restore(state)
    assert (keeping.start_loss, keeping.best_step, keeping.protected_step) == (9.0, None, None)
    assert keeping.look(3, 4.0, 7)
    again = BestWatch(stopping)
    again.restore(state)
    assert (again.best_step, again.protected_step) == (1, None)


def test_where_nothing_is_to_follow_nothing_does():
    watch = watch_after(1.0, 3.0, 2.0, 4.0, rules=Rules())
    assert (watch.best_step, watch.protected_step, watch.stops) == (None, None, False)
    assert watch.start_loss == 1.0


@pytest.mark.parametrize(
    ("rules", "last_step", "step", "due"),
    [
        (Rules(), None, 0, True),
        (Rules(eval_on_start=False), None, 0, False),
        (Rules(), None, 4, False),
        (Rules(eval_steps=4), 4, 4, False),
        (Rules(eval_steps=4), 0, 4, True),
        (Rules(eval_steps=4), 0, 5, False),
    ],
)
def test_what_a_start_owes(rules, last_step, step, due):
    watch = BestWatch(rules)
    watch.last_step = last_step
    assert watch.is_due_at_start(step) is due
