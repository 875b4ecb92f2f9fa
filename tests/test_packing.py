"""Packs and steps: every document once an epoch, the same steps however many ranks take them."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.packing import (
    FILLER,
    BatchPlan,
    PackLoader,
    PackSampler,
    TokenizedRows,
    best_fit,
)

LAYOUTS = list(itertools.product([1, 2, 3, 4], [1, 2, 3], [1, 2, 5]))  # ranks, accumulation, device

lengths_lists = st.lists(st.integers(1, 64), min_size=1, max_size=60)


def plan_of(num_packs: int, per_device: int, accumulation: int, num_ranks: int) -> BatchPlan:
    """Packs of one to three documents, 2.0 on average."""
    sizes = [1 + n % 3 for n in range(num_packs)]
    ends = list(itertools.accumulate(sizes))
    packs = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    return BatchPlan(packs, per_device, accumulation, num_ranks)


def steps_of(plan: BatchPlan, seed: int, epoch: int) -> list[Counter[int]]:
    """The documents of each optimizer step, over all ranks and micro-batches."""
    ranks = [list(plan.epoch(seed, epoch, rank)) for rank in range(plan.num_ranks)]
    assert {len(batches) for batches in ranks} == {plan.steps_per_epoch * plan.accumulation}
    return [
        Counter(
            document
            for batches in ranks
            for batch in batches[step * plan.accumulation : (step + 1) * plan.accumulation]
            for document in batch
            if document != FILLER
        )
        for step in range(plan.steps_per_epoch)
    ]


@given(lengths_lists, st.integers(0, 5))
def test_every_document_is_in_one_pack_and_no_pack_is_too_long(lengths, seed):
    packs = best_fit(lengths, 64, seed)
    assert sorted(d for pack in packs for d in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[d] for d in pack) <= 64 for pack in packs)


@given(lengths_lists, st.integers(0, 5))
def test_a_pack_is_opened_only_when_no_open_one_has_room(lengths, seed):
    """Any two packs together are too long for one, or the second would not have been opened."""
    sums = [sum(lengths[d] for d in pack) for pack in best_fit(lengths, 64, seed)]
    assert all(a + b > 64 for a, b in itertools.combinations(sums, 2))


@given(lengths_lists, st.integers(0, 5))
def test_a_document_goes_where_least_room_is_left(lengths, seed):
    """The same packs by the plain rule, in as many comparisons as there are packs."""
    order = list(range(len(lengths)))
    random.Random(f"packs {seed}").shuffle(order)
    packs: list[list[int]] = []
    for document in order:
        rooms = [64 - sum(lengths[d] for d in pack) for pack in packs]
        fitting = [(room, n) for n, room in enumerate(rooms) if room >= lengths[document]]
        if fitting:
            packs[min(fitting)[1]].append(document)
        else:
            packs.append([document])
    assert best_fit(lengths, 64, seed) == packs


def test_packs_are_full_on_rows_like_the_embedded_ones():
    chance = random.Random(0)
    lengths = [chance.randint(20, 60) for _ in range(3000)]
    packs = best_fit(lengths, 256, seed=0)
    assert sum(lengths) / (256 * len(packs)) > 0.95  # 0.969 measured


def test_packing_is_a_function_of_the_seed_alone():
    lengths = [1 + n * 7 % 50 for n in range(200)]
    random.seed(1)
    first = best_fit(lengths, 64, seed=3)
    random.seed(2)
    assert best_fit(lengths, 64, seed=3) == first != best_fit(lengths, 64, seed=4)


@pytest.mark.parametrize(("num_ranks", "accumulation", "per_device"), LAYOUTS)
@pytest.mark.parametrize("num_packs", [1, 7, 24, 31])
def test_an_epoch_has_every_document_once(num_packs, num_ranks, accumulation, per_device):
    plan = plan_of(num_packs, per_device, accumulation, num_ranks)
    for epoch in (0, 1):
        steps = steps_of(plan, seed=0, epoch=epoch)
        assert len(steps) == -(-num_packs // (num_ranks * accumulation * per_device))
        assert all(steps), "a step without a document"
        seen = sum(steps, Counter())
        assert seen == Counter(d for pack in plan.packs for d in pack)
        assert set(seen.values()) == {1}


@given(
    st.integers(1, 60),
    st.sampled_from([(1, 8, 1), (2, 4, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (8, 1, 1)]),
    st.integers(0, 3),
)
def test_steps_are_the_same_however_they_are_shared_out(num_packs, layout, epoch):
    num_ranks, accumulation, per_device = layout
    together = plan_of(num_packs, 8, 1, 1)
    shared_out = plan_of(num_packs, per_device, accumulation, num_ranks)
    assert steps_of(shared_out, 5, epoch) == steps_of(together, 5, epoch)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_micro_batches_hold_whole_packs_and_every_rank_has_one_each_time(n, device, acc, ranks):
    plan = plan_of(n, device, acc, ranks)
    whole = {tuple(pack) for pack in plan.packs}
    for rank in range(ranks):
        for batch in plan.epoch(0, 0, rank):
            assert batch
            if batch == [FILLER]:
                continue
            cuts = [i for i, d in enumerate(batch) if any(pack[0] == d for pack in plan.packs)]
            ends = [*cuts[1:], len(batch)]
            packs = [tuple(batch[a:b]) for a, b in zip(cuts, ends, strict=True)]
            assert set(packs) <= whole
            assert len(packs) <= device


def test_an_epochs_order_is_a_function_of_seed_and_epoch():
    plan = plan_of(40, 2, 1, 1)
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate()
    orders = {(s, e): list(plan.epoch(s, e, 0)) for s in (0, 1) for e in (0, 1, 2)}
    assert random.getstate() == before
    random.seed(2)
    torch.manual_seed(2)
    again = {(s, e): list(plan.epoch(s, e, 0)) for e in (2, 1, 0) for s in (1, 0)}
    assert orders == again
    assert len({str(order) for order in orders.values()}) == 6


DOCUMENTS = TokenizedRows(lambda n: ([1, 10 + n, 20 + n], [False, False, True]), 49, filler_id=7)


def test_the_loader_gives_the_samplers_micro_batches():
    plan = plan_of(25, 2, 2, 2)
    for rank, epoch in itertools.product((0, 1), (0, 1)):
        loader = PackLoader(DOCUMENTS, PackSampler(plan, 3, rank))
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(loader) == len(batches) == plan.steps_per_epoch * plan.accumulation
        for batch, chosen in zip(batches, plan.epoch(3, epoch, rank), strict=True):
            documents = [DOCUMENTS[d] for d in chosen]
            assert batch["input_ids"].tolist() == [[i for ids, _ in documents for i in ids]]
            assert batch["document_lengths"] == [len(ids) for ids, _ in documents]


def test_the_loader_moves_on_with_the_epoch_and_repeats_it():
    loader = PackLoader(DOCUMENTS, PackSampler(plan_of(25, 2, 1, 1), 0, 0))
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append([batch["input_ids"].tolist() for batch in loader])
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_filler_is_one_token_that_is_not_trained():
    plan = BatchPlan([[0]], per_device=1, accumulation=2, num_ranks=2)
    batches = [
        batch for rank in (0, 1) for batch in PackLoader(DOCUMENTS, PackSampler(plan, 0, rank))
    ]
    assert len(batches) == 4
    fillers = [batch for batch in batches if batch["document_lengths"] == [1]]
    assert len(fillers) == 3
    for batch in fillers:
        assert batch["input_ids"].tolist() == [[7]]
        assert batch["position_ids"].tolist() == [[0]]
        assert batch["labels"].tolist() == [[-100]]
    assert TokenizedRows(lambda n: ([1], [True]), 1, filler_id=0)[FILLER] == ([0], [False])
