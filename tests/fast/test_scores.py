"""Scoring without logits: the numbers of the plain head, in any block size, through any wrapper."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tolerances import LOSS_FLOAT32

from finetune.fast import scores as scores_module
from finetune.fast.loss import pack, token_losses
from finetune.fast.scores import token_scores

DOCUMENTS = [
    ([1, 5, 9, 2, 700, 3], [False, False, True, True, True, True]),
    ([4], [True]),
    ([8, 1023, 0, 17], [True, True, False, True]),
]


def scored(model, documents=DOCUMENTS):
    with torch.no_grad():
        return token_scores(model, pack(documents))


def with_adapter(model):
    wrapped = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return wrapped.eval()


@pytest.mark.parametrize("preset", ["llama3-8b", "llama3.2-1b"])
@pytest.mark.parametrize("adapt", [False, True])
def test_losses_are_those_of_the_head_as_a_whole(tiny_llama, preset, adapt):
    model = with_adapter(tiny_llama(preset)) if adapt else tiny_llama(preset)
    with torch.no_grad():
        plain = token_losses(model, pack(DOCUMENTS)).double()
    found = scored(model)
    assert found.losses.dtype == torch.float64
    assert (found.losses - plain).abs().max() <= LOSS_FLOAT32 * plain.abs().max()


@pytest.mark.parametrize("num_logits", [1, 1024, 3 * 1024, 1 << 25])
def test_the_size_of_a_block_changes_nothing(tiny_llama, monkeypatch, num_logits):
    whole = scored(tiny_llama())
    monkeypatch.setattr(scores_module, "NUM_LOGITS", num_logits)
    found = scored(tiny_llama())
    assert (found.losses - whole.losses).abs().max() <= LOSS_FLOAT32 * whole.losses.max()
    assert torch.equal(found.right, whole.right)


def test_no_more_logits_are_held_than_a_block_has(tiny_llama, monkeypatch):
    model, sizes = copy.deepcopy(tiny_llama()), []
    model.lm_head.register_forward_hook(lambda *_: None)
    plain = model.lm_head.forward

    def watched(hidden):
        sizes.append(hidden.shape[:-1].numel())
        return plain(hidden)

    model.lm_head.forward = watched
    monkeypatch.setattr(scores_module, "NUM_LOGITS", 2 * 1024)
    found = scored(model)
    assert max(sizes) == 2 and sum(sizes) == len(found.losses) == 6
    assert model.lm_head.forward is watched


def test_right_is_the_likeliest_id(tiny_llama):
    ids = [1, 5, 9, 2]
    for _ in range(3):  # the likeliest continuation, and one token that is not
        with torch.no_grad():
            logits = tiny_llama()(
                torch.tensor([ids]), attention_mask=None, document_lengths=[len(ids)]
            ).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    wrong = (ids[-1] + 1) % 1024
    found = scored(tiny_llama(), [([*ids[:-1], wrong], [False] * 4 + [True] * 3)])
    assert found.right.tolist() == [True, True, False]


def test_behind_a_soft_prompt(tiny_llama):
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(copy.deepcopy(tiny_llama()), settings).eval()
    with torch.no_grad():
        plain = token_losses(model, pack(DOCUMENTS)).double()
    found = scored(model).losses
    assert (found - plain).abs().max() <= LOSS_FLOAT32 * plain.abs().max()


def test_the_head_comes_back_after_an_error(tiny_llama, monkeypatch):
    model = copy.deepcopy(tiny_llama())
    monkeypatch.setattr(scores_module, "_scored", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scored(model)
    assert "forward" not in vars(model.lm_head)


def test_nothing_supervised(tiny_llama):
    assert scored(tiny_llama(), [([1, 2], [True, False])]).losses.shape == (0,)
