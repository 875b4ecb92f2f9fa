"""Mixtures: shares, passes and epochs by counting, and small runs on them."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import adapter_tensors, embedded_rows, losses, same_bits, step_lines, write_rows

from finetune import artifact, checkpoint, stages
from finetune.batching import plan_batches
from finetune.errors import InputError
from finetune.mixture import Mixture
from finetune.packing import FILLER, BatchPlan

EPOCHS = 5


@st.composite
def mixtures(draw) -> Mixture:
    """One to three sources whose documents have 0 to 50 trained tokens. `asked` and `expected` are
    the tokens and the passes of each in an epoch, by the weights."""
    num_sources = draw(st.integers(1, 3))
    sizes = [
        draw(st.lists(st.integers(0, 50), min_size=1, max_size=12)) for _ in range(num_sources)
    ]
    for source in sizes:
        source[0] += 1
    documents = [(tokens, n) for n, source in enumerate(sizes) for tokens in source]
    documents = draw(st.permutations(documents))
    weights = draw(
        st.lists(st.floats(0.05, 20), min_size=num_sources, max_size=num_sources)
        | st.just([float(sum(source)) for source in sizes])  # every source exactly once
    )
    trained, sources = (np.array(column, np.int64) for column in zip(*documents, strict=True))
    names, seed = [f"{n}" for n in range(num_sources)], draw(st.integers(0, 9))
    mixture = Mixture(trained, sources, weights, names, seed)
    tokens = [sum(source) for source in sizes]
    mixture.asked = [weight / sum(weights) * sum(tokens) for weight in weights]
    mixture.expected = [asked / own for asked, own in zip(mixture.asked, tokens, strict=True)]
    return mixture


@given(mixtures())
def test_every_document_is_used_as_often_as_every_other(mixture):
    """After any number of epochs a source's documents differ by one use, and none falls out."""
    used: Counter[int] = Counter()
    for epoch in range(EPOCHS):
        used.update(mixture.documents(epoch))
        for index, source in enumerate(mixture._sources):
            expected = mixture.expected[source] * (epoch + 1)
            assert math.floor(expected - 1e-9) <= used[index] <= math.ceil(expected + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_documents_that_train_nothing_come_once_a_pass_too(seed):
    """The last piece of a split text may be its end alone; last in its pass, it fell out."""
    mixture = Mixture(np.array([3, 0, 2, 0]), np.zeros(4, np.int64), [1], ["a"], seed)
    assert [sorted(mixture.documents(epoch)) for epoch in range(6)] == [[0, 1, 2, 3]] * 6


@given(mixtures())
def test_shares_are_within_one_document_of_what_is_asked(mixture):
    for epoch in range(EPOCHS):
        chosen = mixture.documents(epoch)
        for source, asked in enumerate(mixture.asked):
            own = [int(mixture._trained[i]) for i in chosen if mixture._sources[i] == source]
            tokens = mixture._trained[mixture._sources == source]
            assert abs(sum(own) - asked) <= tokens.max() + 1e-6


@given(mixtures())
def test_epochs_partition_one_stream(mixture):
    """Read as one long epoch, each source's epochs give the same documents in the same order."""
    for source in range(len(mixture.passes)):
        pieces = [i for epoch in range(EPOCHS) for i in mixture._piece(source, epoch)]
        whole = Mixture(
            mixture._trained, mixture._sources, [1.0] * len(mixture.passes), mixture._names,
            mixture._seed,
        )  # fmt: skip
        whole.passes = mixture.passes * EPOCHS
        assert whole._piece(source, 0)[: len(pieces)] == pieces[: len(whole._piece(source, 0))]
        assert abs(len(whole._piece(source, 0)) - len(pieces)) <= 1  # rounding of the product


def test_an_epoch_follows_from_seed_and_number_alone():
    trained, sources = np.arange(1, 41), np.repeat([0, 1], 20)
    one, same, other = (Mixture(trained, sources, [1, 3], ["a", "b"], s) for s in (0, 0, 1))
    forwards = [one.documents(epoch) for epoch in range(3)]
    assert [same.documents(epoch) for epoch in (2, 1, 0)] == forwards[::-1]
    assert [other.documents(epoch) for epoch in range(3)] != forwards
    assert len({tuple(sorted(epoch)) for epoch in forwards}) == 3


def test_equal_weights_times_any_factor_are_the_same_mixture():
    trained, sources = np.arange(1, 41), np.repeat([0, 1], 20)
    found = [Mixture(trained, sources, [w, w * 3], ["a", "b"], 0).documents(1) for w in (1, 7.5)]
    assert found[0] == found[1]


def test_a_source_without_a_trained_token_is_refused_by_name():
    with pytest.raises(InputError, match="b, d has a weight and no trained token"):
        Mixture(np.array([3, 0, 2]), np.array([0, 1, 2]), [1] * 4, ["a", "b", "c", "d"], 0)


packs_of_epochs = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(packs_of_epochs, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_every_epoch_has_as_many_steps_and_its_own_documents(sizes, device, accumulation, ranks):
    first = 0
    epochs = []
    for size in sizes:
        epochs.append([[first + n] for n in range(size)])
        first += size
    plan = BatchPlan(epochs[0], device, accumulation, ranks, tuple(epochs[1:]))
    for epoch, packs in enumerate(epochs):
        shares = [list(plan.epoch(0, epoch, rank)) for rank in range(ranks)]
        assert {len(share) for share in shares} == {plan.steps_per_epoch * accumulation}
        seen = [d for share in shares for batch in share for d in batch if d != FILLER]
        assert Counter(seen) == Counter(d for pack in packs for d in pack)
        assert all(len(batch) <= device for share in shares for batch in share)
        steps = [
            [share[step * accumulation + m] for share in shares for m in range(accumulation)]
            for step in range(plan.steps_per_epoch)
        ]
        empty = [step for step in steps if all(batch == [FILLER] for batch in step)]
        assert len(empty) == max(0, plan.steps_per_epoch - len(packs)), "no more than there must be"


def weighted(bench, *weights: float) -> str:
    """The training rows as sources: long answers and short ones, so that epochs differ."""
    rows = sorted(embedded_rows("train", 8), key=lambda row: len(str(row)))
    size = len(rows) // len(weights)
    files = [
        write_rows(bench.folder / f"source{n}.jsonl", rows[n * size : (n + 1) * size])
        for n in range(len(weights))
    ]
    sources = [f"{{path: {f}, weight: {w}}}" for f, w in zip(files, weights, strict=True)]
    return f"data.train=[{', '.join(sources)}]"


def data_and_plan(bench, num_ranks: int, *overrides: str):
    loaded = bench.load(*overrides)
    base = stages.find_base(loaded.config, bench.folder)
    data = stages.load_data(loaded.config, base.tokenizer, base.chat_format)
    return data, plan_batches(loaded.config, data, num_ranks)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_ranks_and_packing_do_not_change_what_an_epoch_holds(bench, packing):
    overrides = (weighted(bench, 1, 3), f"data.packing={packing}")
    epochs = ("train.num_train_epochs=3", "train.max_steps=null")
    for num_ranks in (1, 2, 3, 4):
        data, plan = data_and_plan(bench, num_ranks, *overrides, *epochs)
        assert len(plan.later) == 2
        for epoch in range(3):
            shares = [plan.epoch(0, epoch, rank) for rank in range(num_ranks)]
            seen = [d for share in shares for batch in share for d in batch if d != FILLER]
            assert sorted(seen) == sorted(data.mixture.documents(epoch))


# Steps of one row: epochs of other lengths leave some steps to fillers.
SETTINGS = (
    *("data.packing=false", "train.per_device_train_batch_size=1", "train.max_steps=null"),
    *("train.num_train_epochs=2", "train.weight_decay=0.5", "train.save_total_limit=500"),
    *("train.gradient_accumulation_steps=1", "data.heldout=null"),
)


def test_a_run_trains_on_what_the_plan_holds(bench):
    overrides = (weighted(bench, 2, 1), *SETTINGS, "train.save_steps=1", "run.name=mixed")
    run = bench.train(*overrides)
    data, plan = data_and_plan(bench, 1, *overrides)
    lines, steps = step_lines(run), plan.steps_per_epoch
    assert len(lines) == 2 * steps
    for epoch in range(2):
        batches = list(plan.epoch(0, epoch, 0))
        expected = [
            (int(data.train.num_trained[batch].sum()), int(data.train.lengths[batch].sum()))
            if batch != [FILLER] else (0, 1)
            for batch in batches
        ]  # fmt: skip
        found = lines[epoch * steps : (epoch + 1) * steps]
        assert [(line["tokens_trained"], line["tokens"]) for line in found] == expected
    chosen = np.array(data.mixture.documents(0))
    held = np.bincount(data.train.sources[chosen], weights=data.train.num_trained[chosen])
    portions = json.loads((run.path / "data.json").read_text())["mixture"]
    assert [p["share"] for p in portions] == pytest.approx((held / held.sum()).tolist())
    check_empty_steps_move_nothing(run, lines)


def check_empty_steps_move_nothing(run, lines) -> None:
    def weights(step: int):
        return load_file(run.checkpoints / f"step-{step:06d}" / "trained.safetensors")

    empty = [line["step"] for line in lines if line["tokens_trained"] == 0]
    assert empty, "epochs of one length: change the rows"
    for step in empty:
        assert same_bits(weights(step - 1), weights(step)), "momentum and decay moved the weights"
    full = next(line["step"] for line in lines[1:] if line["tokens_trained"])
    assert not same_bits(weights(full - 1), weights(full))


@pytest.mark.slow
def test_a_mixture_goes_on_in_its_second_epoch_bit_for_bit(bench):
    settings = (weighted(bench, 2, 1), *SETTINGS, "adapter.lora_dropout=0.2")
    _, plan = data_and_plan(bench, 1, *settings)
    middle = plan.steps_per_epoch + plan.steps_per_epoch // 2
    straight = bench.train(*settings, f"train.save_steps={middle}", "run.name=straight")
    stopped = (*settings, f"train.save_steps={middle}", "run.name=stopped")
    run = bench.train(*stopped)
    for path in run.checkpoints.glob("step-*"):
        if path.name != f"step-{middle:06d}":
            shutil.rmtree(path)
    checkpoint.write_latest(run.checkpoints, middle)
    artifact.remove(run.adapter)
    run.write_state(state="running", exit_code=None, reason=None)
    again = bench.train(*stopped)
    assert losses(again) == losses(straight)
    assert same_bits(adapter_tensors(again), adapter_tensors(straight))
