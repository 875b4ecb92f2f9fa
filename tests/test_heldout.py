"""The held-out loss: one number for every batch size, and nothing left behind by taking it."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tolerances import (
    HELDOUT_BATCHES,
    HELDOUT_FLOAT64,
    HELDOUT_PADDED,
    HELDOUT_REFERENCE,
    HELDOUT_ROWS,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from finetune.errors import CannotContinue, InputError
from finetune.fast.loss import IGNORED, pack, token_losses
from finetune.heldout import HeldoutLoss, RowScore, Span, evaluating, score, score_rows, total_of
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
    means = [row.loss_sum / row.num_tokens for row in found.rows if row.num_tokens]
    mean_of_means = sum(means) / len(means)
    assert abs(mean_of_means / found.loss - 1) > 100 * HELDOUT_REFERENCE


@pytest.mark.parametrize("preset", ["llama3-8b", "llama3.2-1b"])
def test_the_number_is_the_same_for_every_batch_size(tiny_llama, preset):
    documents = documents_of()
    one_by_one = score(tiny_llama(preset), documents, 1, CPU)
    for batch_size in (*range(2, 17), 36, 37, 1000):
        found = score(tiny_llama(preset), documents, batch_size, CPU)
        assert found.num_tokens == one_by_one.num_tokens
        assert found.loss_sum == pytest.approx(one_by_one.loss_sum, rel=HELDOUT_BATCHES)
        assert [row.num_tokens for row in found.rows] == [d.num_trained for d in documents]
        assert found.num_right == one_by_one.num_right
        for row, alone in zip(found.rows, one_by_one.rows, strict=True):
            assert row.loss_sum == pytest.approx(alone.loss_sum, rel=HELDOUT_ROWS)


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
    sums = [1e16, *[0.1] * 1000, -1e16]
    rows = [RowScore((Span(loss, 1, 1),)) for loss in sums]
    assert total_of(rows).loss_sum == pytest.approx(100, rel=1e-15)
    ids = [n * 37 % 1024 for n in range(2000)]
    long = Document(Example("long"), ids, [True] * 2000)
    with torch.no_grad():
        packed = pack([(ids, long.train_mask)])
        losses = token_losses(tiny_llama(), packed, in_blocks=False).tolist()
    assert score(tiny_llama(), [long], 1, CPU).loss_sum == pytest.approx(
        math.fsum(losses), rel=1e-14
    )
    assert total_of(rows).as_json() == {
        "loss": 100 / 1002,
        "perplexity": math.exp(100 / 1002),
        "token_accuracy": 1.0,
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
    assert score_rows(tiny_llama(), untrained, 4, CPU) == [RowScore(())]


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
    for document, row in zip(documents, found.rows, strict=True):
        if row.num_tokens:
            alone = score(tiny_llama(), [document], 1, CPU)
            assert row.loss_sum == pytest.approx(alone.loss_sum, rel=HELDOUT_ROWS)
        else:
            assert row == RowScore(())
    total = math.fsum(row.loss_sum for row in found.rows)
    right = sum(row.num_right for row in found.rows)
    assert found == HeldoutLoss(total, found.num_tokens, right, found.rows)


def padded_sum(model, documents, side: str) -> tuple[float, int]:
    """Sum of losses and hits by transformers' own forward pass on one padded batch."""
    width = max(len(document.input_ids) for document in documents)
    rows = [padded_row(document, width, side) for document in documents]
    ids, mask, trained = (torch.tensor(part) for part in zip(*rows, strict=True))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, :-1]
    log_p = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    hits = (logits.argmax(-1) == ids[:, 1:]) & trained[:, 1:]
    return -(log_p * trained[:, 1:]).sum().item(), int(hits.sum())


def norm_in_float64(self, hidden: torch.Tensor) -> torch.Tensor:
    """transformers' goes through float32, whatever the model is in: 1e-9 would be out of reach."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)


def padded_row(document: Document, width: int, side: str) -> tuple[list[int], list[int], list[int]]:
    """Ids, attention mask and marks of the trained tokens, the padding on one side."""
    padding = [0] * (width - len(document.input_ids))
    ones = [1] * len(document.input_ids)
    trained = [int(m and p > 0) for p, m in enumerate(document.train_mask)]
    parts = (document.input_ids, ones, trained)
    return tuple([*padding, *x] if side == "left" else [*x, *padding] for x in parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_padded_batches_of_plain_transformers_have_the_same_sums(
    tiny_llama, dtype, batch_size, monkeypatch
):
    """Left, right and without padding, for every batch size: one number."""
    documents = [d for d in documents_of() if d.num_trained]
    ours = copy.deepcopy(tiny_llama()).to(dtype)
    plain = copy.deepcopy(tiny_llama("llama3-8b", "sdpa")).to(dtype)
    if dtype == torch.float64:
        monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    found = score(ours, documents, batch_size, CPU)
    tolerance = HELDOUT_FLOAT64 if dtype == torch.float64 else HELDOUT_PADDED
    for side in ("left", "right"):
        batches = [documents[i : i + batch_size] for i in range(0, len(documents), batch_size)]
        sums = [padded_sum(plain, batch, side) for batch in batches]
        assert found.loss_sum == pytest.approx(math.fsum(s for s, _ in sums), rel=tolerance)
        assert found.num_right == sum(right for _, right in sums)


def test_a_float64_model_is_scored_in_float64(tiny_llama):
    """For every batch size, and by two ranks that score every other row (`_score_heldout`)."""
    documents, model = documents_of(), copy.deepcopy(tiny_llama()).double()
    one = score(model, documents, 1, CPU).loss_sum
    shares = [score_rows(model, documents[rank::2], 2, CPU) for rank in (0, 1)]
    of_two = total_of([row for share in shares for row in share]).loss_sum
    assert of_two == pytest.approx(one, rel=HELDOUT_FLOAT64)
    for batch_size in (2, 7, 16):
        assert score(model, documents, batch_size, CPU).loss_sum == pytest.approx(
            one, rel=HELDOUT_FLOAT64
        )


def test_answers_of_a_row_are_told_apart(tiny_llama):
    ids = [7, 3, 9, 4, 8, 2, 6, 5]
    mask = [True, False, True, True, False, True, False, False]
    row = score(tiny_llama(), [Document(Example("a:1"), ids, mask)], 1, CPU).rows[0]
    assert [span.num_tokens for span in row.spans] == [2, 1]
    for keep, span in ((slice(2, 4), row.spans[0]), (slice(5, 6), row.spans[1])):
        alone = [False] * len(ids)
        alone[keep] = [True] * len(alone[keep])
        expected = score(tiny_llama(), [Document(Example("a:1"), ids, alone)], 1, CPU)
        assert span.loss_sum == pytest.approx(expected.loss_sum, rel=HELDOUT_ROWS)
