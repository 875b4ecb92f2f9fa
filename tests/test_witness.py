"""The witness: what is loaded from disk says what the trained model said in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from small_runs import flip_bit, trainer_of

from finetune import witness
from finetune.errors import FinetuneError
from finetune.prepared import Document
from finetune.shapes import Example

CPU = torch.device("cpu")
DOCUMENTS = [
    Document(Example(f"h:{n}"), list(range(3, 3 + n)), [i >= n // 2 for i in range(n)])
    for n in (4, 30, 9, 2, 50, 60, 7, 12, 33)
]


def test_tokens_are_spread_over_the_first_rows():
    rows = witness.choose(DOCUMENTS, 1024)
    assert len(rows) == witness.NUM_ROWS
    assert [ids for ids, _ in rows] == [d.input_ids for d in DOCUMENTS[: len(rows)]]
    for (_, mask), document in zip(rows, DOCUMENTS, strict=False):
        assert sum(mask) == min(document.num_trained, 8)
        assert all(m <= t for m, t in zip(mask, document.train_mask, strict=True))
    assert sum(sum(mask) for _, mask in witness.choose(DOCUMENTS, 1 << 19)) == 8, "16 MiB at most"
    assert witness.choose(DOCUMENTS[:1], 1024)[0][1] == [False, False, True, True]


def test_the_divergence_is_that_of_the_formula(tiny_llama, tmp_path):
    rows = witness.choose(DOCUMENTS, 1024)
    trained = tiny_llama()
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.lm_head.weight += 0.01 * torch.randn(
            other.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    witness.keep(tmp_path / "w.safetensors", trained, rows, CPU)
    assert witness.divergence(tmp_path / "w.safetensors", trained, CPU) == (0.0, 42)
    found, count = witness.divergence(tmp_path / "w.safetensors", other, CPU)
    terms = []
    for ids, mask in rows:
        with torch.no_grad():
            p, q = (
                tiny_copy(torch.tensor([ids]), use_cache=False).logits[0].double()
                for tiny_copy in (plain_of(trained, tiny_llama), plain_of(other, tiny_llama))
            )
        kl = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        terms += [kl[place - 1] for place, marked in enumerate(mask) if marked]
    assert count == len(terms) == 42
    assert found == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    assert found > 1e-3


def plain_of(model, tiny_llama):
    """The same weights under transformers' own attention."""
    plain = copy.deepcopy(tiny_llama("llama3-8b", "sdpa"))
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_witness_of_something_else_is_refused(tiny_llama, tmp_path):
    path = tmp_path / "w.safetensors"
    witness.keep(path, tiny_llama(), witness.choose(DOCUMENTS, 1024), CPU)
    flip_bit(path, 0.0)
    with pytest.raises(FinetuneError):
        witness.divergence(path, tiny_llama(), CPU)


def test_training_goes_on_as_if_nothing_had_been_asked(bench, tmp_path):
    trainer = trainer_of(bench.load("adapter.lora_dropout=0.3"))
    trainer.model.train()
    state = torch.get_rng_state()
    rows = witness.choose(trainer.ours.heldout, 1024)
    witness.keep(tmp_path / "w.safetensors", trainer.model, rows, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training
