"""The held-out loss: one number for every batch size, and nothing left behind by taking it."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tolerances import HELDOUT_BATCHES, HELDOUT_REFERENCE, HELDOUT_ROWS

from finetune.errors import CannotContinue, InputError
from finetune.fast.loss import IGNORED, pack, token_losses
from finetune.heldout import HeldoutLoss, evaluating, score, score_rows, total_of
from finetune.prepared import Document
from finetune.shapes import Example

CPU = torch.device("cpu")


def documents_of(num_documents: int = 37, seed: int = 0) -> list[Document]:
    """Ragged: 1 to 40 tokens, a question of any length, some without a trained token."""
    chance = random.Random(seed)
    documents = []
    for number in range(num_documents):
        length = chance.randint(1, 40)
        asked = chance.randint(0, length)
        ids = [chance.randrange(1024) for _ in range(length)]
        mask = [place >= asked for place in range(length)]
        documents.append(Document(Example(f"heldout.jsonl:{number + 1}"), ids, mask))
    return documents


def reference(model: torch.nn.Module, documents: list[Document]) -> tuple[float, int]:
    """Sum and count by transformers' own loss, a document at a time, eager attention."""
    total, count = 0.0, 0
    for document in documents:
        pairs = zip(document.input_ids, document.train_mask, strict=True)
        labels = [i if m and p else IGNORED for p, (i, m) in enumerate(pairs)]
        num_trained = sum(label != IGNORED for label in labels)
        if num_trained:
            with torch.no_grad():
                out = model(torch.tensor([document.input_ids]), labels=torch.tensor([labels]))
            total += out.loss.double().item() * num_trained
            count += num_trained
    return total, count


def test_the_loss_is_the_sum_over_the_count(tiny_llama):
    documents = documents_of()
    found = score(tiny_llama(), documents, 4, CPU)
    total, count = reference(tiny_llama("llama3-8b", "eager"), documents)
    assert found.num_tokens == count
    assert found.loss_sum == pytest.approx(total, rel=HELDOUT_REFERENCE)
    assert found.loss == pytest.approx(total / count, rel=HELDOUT_REFERENCE)
    assert found.perplexity == math.exp(found.loss)
    mean_of_means = sum(s / n for s, n in found.rows if n) / sum(1 for _, n in found.rows if n)
    assert abs(mean_of_means / found.loss - 1) > 100 * HELDOUT_REFERENCE


@pytest.mark.parametrize("preset", ["llama3-8b", "llama3.2-1b"])
def test_the_number_is_the_same_for_every_batch_size(tiny_llama, preset):
    documents = documents_of()
    one_by_one = score(tiny_llama(preset), documents, 1, CPU)
    for batch_size in (*range(2, 17), 36, 37, 1000):
        found = score(tiny_llama(preset), documents, batch_size, CPU)
        assert found.num_tokens == one_by_one.num_tokens
        assert found.loss_sum == pytest.approx(one_by_one.loss_sum, rel=HELDOUT_BATCHES)
        assert [n for _, n in found.rows] == [d.num_trained for d in documents]
        for (loss, _), (alone, _) in zip(found.rows, one_by_one.rows, strict=True):
            assert loss == pytest.approx(alone, rel=HELDOUT_ROWS)


def test_a_shuffled_set_has_the_same_loss(tiny_llama):
    documents = documents_of()
    shuffled = random.Random(1).sample(documents, len(documents))
    found, again = (score(tiny_llama(), d, 5, CPU) for d in (documents, shuffled))
    assert again.loss_sum == pytest.approx(found.loss_sum, rel=HELDOUT_BATCHES)
    assert again.num_tokens == found.num_tokens


@pytest.mark.parametrize("num_ranks", [2, 3, 50])
def test_the_shares_of_ranks_add_up_to_the_whole(tiny_llama, num_ranks):
    documents = documents_of()
    whole = score(tiny_llama(), documents, 4, CPU)
    shares = [score_rows(tiny_llama(), documents[r::num_ranks], 4, CPU) for r in range(num_ranks)]
    together = total_of([row for share in shares for row in share])
    assert together.num_tokens == whole.num_tokens
    assert together.loss_sum == pytest.approx(whole.loss_sum, rel=HELDOUT_BATCHES)


def test_sums_are_in_float64(tiny_llama):
    """A plain sum would lose the small losses beside the large, or the tenth's last digits."""
    rows = [(1e16, 1), *[(0.1, 1)] * 1000, (-1e16, 1)]
    assert total_of(rows).loss_sum == pytest.approx(100, rel=1e-15)
    ids = [n * 37 % 1024 for n in range(2000)]
    long = Document(Example("long"), ids, [True] * 2000)
    with torch.no_grad():
        losses = token_losses(tiny_llama(), pack([(ids, long.train_mask)])).tolist()
    assert score(tiny_llama(), [long], 1, CPU).loss_sum == pytest.approx(
        math.fsum(losses), rel=1e-14
    )
    assert total_of(rows).as_json() == {
        "loss": 100 / 1002,
        "perplexity": math.exp(100 / 1002),
        "tokens": 1002,
        "rows": 1002,
    }


def with_dropout(model: torch.nn.Module) -> torch.nn.Module:
    adapted = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False),
    )
    return adapted.train()


def state_of(model: torch.nn.Module) -> dict[str, object]:
    """Everything an evaluation might move."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {n: (t.detach().clone(), t.dtype, t.requires_grad) for n, t in tensors},
        "gradients": {n: p.grad is None for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "config": str(model.config),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_unchanged(before: dict[str, object], after: dict[str, object]) -> None:
    old, new = before.pop("tensors"), after.pop("tensors")
    assert old.keys() == new.keys()
    for name, (tensor, *kind) in old.items():
        assert torch.equal(tensor, new[name][0]), name
        assert kind == list(new[name][1:]), name
    for name, value in before.items():
        assert value == after[name], name


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_nothing_is_left_behind(tiny_llama, mode):
    model = with_dropout(tiny_llama()).train(mode != "eval")
    if mode == "mixed":
        model.base_model.model.model.layers[0].eval()
    before = state_of(model)
    score(model, documents_of(), 4, CPU)
    assert_unchanged(before, state_of(model))


def test_dropout_is_off_while_scoring(tiny_llama):
    model = with_dropout(tiny_llama())
    first, second = (score(model, documents_of(), 4, CPU) for _ in range(2))
    assert first == second
    with torch.no_grad():
        probe = torch.tensor([[1, 2, 3]])
        assert not torch.equal(model(probe).logits, model(probe).logits), "dropout is on outside"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", [True, False])
def test_a_loss_that_is_no_number_stops_and_names_the_row(tiny_llama, bad, mode):
    model = copy.deepcopy(tiny_llama()).train(mode)
    documents = documents_of()
    with torch.no_grad():
        model.model.embed_tokens.weight[documents[20].input_ids[0], 0] = bad
    users = {d.example.where for d in documents if documents[20].input_ids[0] in d.input_ids}
    with pytest.raises(CannotContinue, match="the held-out loss is (nan|inf)") as caught:
        score(model, documents, 4, CPU)
    assert str(caught.value).split(": ")[0] in users
    assert caught.value.exit_code == 4
    assert model.training == mode
    assert torch.is_grad_enabled()


def test_nothing_to_score_is_refused(tiny_llama):
    untrained = [Document(Example("a:1"), [1, 2, 3], [True, False, False])]
    for documents in ([], untrained):
        with pytest.raises(InputError, match="no trained token"):
            score(tiny_llama(), documents, 4, CPU)
    assert score_rows(tiny_llama(), [], 4, CPU) == []
    assert score_rows(tiny_llama(), untrained, 4, CPU) == [(0.0, 0)]


def test_the_mode_comes_back_after_an_error(tiny_llama):
    model = copy.deepcopy(tiny_llama()).train()

    def interrupted() -> None:
        with evaluating(model):
            assert not model.training and not torch.is_grad_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.training and torch.is_grad_enabled()


def test_a_row_is_in_the_result_with_its_own_numbers(tiny_llama):
    documents = documents_of()
    found = score(tiny_llama(), documents, 8, CPU)
    assert len(found.rows) == len(documents)
    for document, (loss, count) in zip(documents, found.rows, strict=True):
        if count:
            alone = score(tiny_llama(), [document], 1, CPU)
            assert loss == pytest.approx(alone.loss_sum, rel=HELDOUT_ROWS)
        else:
            assert loss == 0
    assert found == HeldoutLoss(math.fsum(s for s, _ in found.rows), found.num_tokens, found.rows)
