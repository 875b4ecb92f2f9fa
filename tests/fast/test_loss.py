"""The next-token loss against a cross entropy written out in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tolerances import LOSS_FLOAT32, PACKED_FLOAT32
from torch import nn

from finetune.fast.loss import IGNORED, Packed, pack, supervised, token_losses

pytestmark = pytest.mark.usefixtures("library")

DOCUMENTS = [
    ([1, 40, 41, 42, 2, 43], [False, False, True, True, True, False]),
    ([1, 50, 51], [True, True, True]),  # its first token is never trained, whatever its mask says
    ([1], [True]),
    ([1, 60, 61, 62], [False] * 4),
    ([1, 70, 71, 72], [False, False, True, True]),
]
TARGETS = [(d, t) for d, (ids, mask) in enumerate(DOCUMENTS) for t in range(1, len(ids)) if mask[t]]


@torch.no_grad()
def reference_losses(model: nn.Module, shift: int = 1) -> torch.Tensor:
    """log(sum of exp) - logit, in float64, from plain calls on one document at a time."""
    losses = []
    for document, place in TARGETS:
        ids = DOCUMENTS[document][0]
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
        before = logits[max(place - shift, 0)].tolist()
        peak = max(before)
        total = math.fsum(math.exp(value - peak) for value in before)
        losses.append(math.log(total) + peak - before[ids[place]])
    return torch.tensor(losses, dtype=torch.float64)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("preset", ["llama3-8b", "llama2-7b", "llama3.2-1b"])
def test_token_losses_are_the_cross_entropy_in_float64(tiny_llama, preset):
    losses = token_losses(tiny_llama(preset), pack(DOCUMENTS))
    assert losses.dtype == torch.float32
    assert relative(losses.detach(), reference_losses(tiny_llama(preset, "eager"))) < LOSS_FLOAT32


@pytest.mark.parametrize("shift", [0, 2])
def test_another_shift_is_not_the_loss(tiny_llama, shift):
    losses = token_losses(tiny_llama(), pack(DOCUMENTS)).detach()
    assert relative(losses, reference_losses(tiny_llama(), shift)) > 0.1


def test_packing_lays_documents_end_to_end():
    packed = pack(DOCUMENTS)
    lengths = [len(ids) for ids, _ in DOCUMENTS]
    assert packed.document_lengths == lengths
    assert packed.input_ids.tolist() == [[i for ids, _ in DOCUMENTS for i in ids]]
    assert packed.position_ids.tolist() == [[p for n in lengths for p in range(n)]]
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    trained = {starts[document] + place for document, place in TARGETS}
    for place, (i, label) in enumerate(
        zip(packed.input_ids[0].tolist(), packed.labels[0].tolist(), strict=True)
    ):
        assert label == (i if place in trained else IGNORED)


def test_a_documents_first_token_is_never_a_target():
    packed = pack([([7, 8, 9], [True] * 3)] * 4)
    positions, targets = supervised(packed.labels)
    assert positions.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert targets.tolist() == [8, 9] * 4


def test_a_target_is_predicted_from_the_place_before_it():
    packed = pack(DOCUMENTS)
    positions, targets = supervised(packed.labels)
    assert (packed.input_ids[0][positions + 1] == targets).all()
    starts = {0, 6, 9, 10, 14}
    assert not starts & {place + 1 for place in positions.tolist()}


def test_ids_that_look_like_padding_or_the_ignored_label_are_trained(tiny_llama):
    losses = token_losses(tiny_llama(), pack([([1, 0, 2, 1, 1023], [False] + [True] * 4)]))
    assert losses.shape == (4,)


def test_ids_and_mask_of_different_length_are_refused():
    with pytest.raises(ValueError, match="a mask for each of its ids"):
        pack([([1, 2, 3], [True, True])])


@pytest.mark.parametrize(
    "documents", [[([1, 2, 3], [False] * 3)], [([1], [True])], [([0], [False])]]
)
def test_nothing_to_train_is_a_zero_with_a_graph(tiny_llama, documents):
    model = copy.deepcopy(tiny_llama()).train()
    losses = token_losses(model, pack(documents))
    assert losses.shape == (0,)
    total = losses.sum()
    assert total.item() == 0
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


def test_gradients_are_those_of_the_reference(tiny_llama):
    """The same sum by transformers' own loss, one document at a time, eager attention."""
    ours, eager = (copy.deepcopy(tiny_llama("llama3-8b", a)).train() for a in (None, "eager"))
    token_losses(ours, pack(DOCUMENTS)).sum().backward()
    for ids, mask in DOCUMENTS:
        labels = [i if m and p else IGNORED for p, (i, m) in enumerate(zip(ids, mask, strict=True))]
        if set(labels) != {IGNORED}:
            row = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
            num_trained = sum(label != IGNORED for label in labels)
            (eager(**row).loss * num_trained).backward()
    expected = dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        theirs = expected[name].grad
        assert theirs.abs().max() > 0
        assert relative(parameter.grad, theirs.double()) < PACKED_FLOAT32, name


def test_the_losses_of_a_row_do_not_depend_on_its_neighbours(tiny_llama):
    model = tiny_llama()
    together = token_losses(model, pack(DOCUMENTS)).detach()
    apart = torch.cat([token_losses(model, pack([d])).detach() for d in DOCUMENTS])
    assert relative(together, apart.double()) < LOSS_FLOAT32


def test_the_head_runs_on_supervised_places_only(tiny_llama):
    model, seen = copy.deepcopy(tiny_llama()), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    token_losses(model, pack(DOCUMENTS))
    assert seen == [(1, len(TARGETS))]


@pytest.mark.parametrize("in_blocks", [False, True])
def test_losses_of_a_bfloat16_model_are_computed_in_float32(tiny_llama, in_blocks):
    model = copy.deepcopy(tiny_llama()).bfloat16()
    packed = pack(DOCUMENTS)
    hidden = []
    model.lm_head.register_forward_hook(lambda _, args, out: hidden.append(args[0][0].detach()))
    losses = token_losses(model, packed, in_blocks=in_blocks)
    assert losses.dtype == torch.float32
    logits = hidden[0] @ model.lm_head.weight.detach().t()
    assert logits.dtype == torch.bfloat16
    _, targets = supervised(packed.labels)
    exact = -logits.double().log_softmax(-1)[range(len(targets)), targets]
    assert relative(losses.detach(), exact) < LOSS_FLOAT32


def test_a_peft_model_is_called_as_a_whole(tiny_llama):
    """B is zero at the start, so the adapter changes nothing; after a change it does."""
    model = get_peft_model(
        copy.deepcopy(tiny_llama()), LoraConfig(r=4, target_modules="all-linear")
    )
    losses = token_losses(model, pack(DOCUMENTS))
    assert torch.equal(losses.detach(), token_losses(tiny_llama(), pack(DOCUMENTS)).detach())
    losses.sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all((gradient != 0).any() for n, gradient in trained.items() if "lora_B" in n)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    assert not torch.equal(token_losses(model, pack(DOCUMENTS)), losses)


def test_a_packed_row_is_what_the_collator_gives():
    from finetune.packing import collate

    assert Packed(**collate(DOCUMENTS)).labels.tolist() == pack(DOCUMENTS).labels.tolist()
