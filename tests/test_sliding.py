"""Perplexity in sliding windows: every token once, and the chain rule where the stride is 1."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from small_runs import NANO, Bench
from tolerances import HELDOUT_PADDED

from finetune.__main__ import main
from finetune.errors import InputError
from finetune.heldout import score
from finetune.llama.tokenizer import encode_text
from finetune.sliding import windows, windows_of_files

CPU, BOS = torch.device("cpu"), 1


def text_of(length: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 1024) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 9, 40])
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (8, 1), (8, 3), (8, 7), (64, 32)])
def test_every_token_is_scored_once_and_sees_what_it_may(length, window, stride):
    ids = text_of(length)
    scored = []
    for document in windows(ids, BOS, window, stride):
        assert document.input_ids[0] == BOS and not document.train_mask[0]
        assert len(document.input_ids) <= window
        new = sum(document.train_mask)
        assert all(document.train_mask[len(document.input_ids) - new :]), "the new ones are last"
        begin = len(scored) + new - (len(document.input_ids) - 1)
        assert document.input_ids[1:] == ids[begin : len(scored) + new]
        assert begin == 0 or len(document.input_ids) == window, "as much as fits before them"
        scored += document.input_ids[len(document.input_ids) - new :]
    assert scored == ids


def chain_rule(model, ids: list[int], window: int) -> float:
    """-Σ log p(x_t | BOS and up to window - 2 tokens before it): one forward pass a token."""
    total = []
    for place, token in enumerate(ids):
        context = [BOS, *ids[max(place - (window - 2), 0) : place]]
        with torch.no_grad():
            logits = model(torch.tensor([context])).logits[0, -1]
        total.append(-logits.double().log_softmax(-1)[token].item())
    return math.fsum(total)


@pytest.mark.parametrize("window", [2, 5, 16, 64])
def test_stride_one_is_the_chain_rule(tiny_llama, window):
    ids = text_of(30)
    plain = tiny_llama("llama3-8b", "sdpa")
    found = score(tiny_llama(), list(windows(ids, BOS, window, 1)), 8, CPU)
    assert found.num_tokens == len(ids)
    assert found.loss_sum == pytest.approx(chain_rule(plain, ids, window), rel=HELDOUT_PADDED)


def test_a_text_in_one_window_has_its_plain_likelihood(tiny_llama):
    ids, plain = text_of(30), tiny_llama("llama3-8b", "sdpa")
    with torch.no_grad():
        log_p = plain(torch.tensor([[BOS, *ids]])).logits[0, :-1].double().log_softmax(-1)
    expected = -log_p.gather(-1, torch.tensor(ids)[:, None]).sum().item()
    for stride in (1, 7, 63):
        found = score(tiny_llama(), list(windows(ids, BOS, 64, stride)), 3, CPU)
        assert found.loss_sum == pytest.approx(expected, rel=HELDOUT_PADDED)


def test_bytes_are_those_of_the_text(tmp_path, nano_tokenizer):
    path = tmp_path / "two.jsonl"
    texts = ["Grün ist die Heide. " * 9, "", " In Egypt the capital is Cairo."]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents, num_bytes = windows_of_files(str(path), nano_tokenizer, 16, 5)
    assert num_bytes == sum(len(text.encode()) for text in texts)
    tokens = sum(len(encode_text(nano_tokenizer, text)) for text in texts if text)
    assert sum(d.num_trained for d in documents) == tokens
    assert documents[0].example.where == f"{path}:1 tokens 1 to 15"


@pytest.mark.parametrize(("window", "stride"), [(8, 0), (8, 8), (8, 9)])
def test_a_stride_that_leaves_gaps_is_refused(tmp_path, nano_tokenizer, window, stride):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=f"--stride {stride}: allowed: 1 to 7"):
        windows_of_files(str(tmp_path / "a.txt"), nano_tokenizer, window, stride)


class TestVerb:
    def evaluate(self, capsys, *argv):
        code = main(["eval", *map(str, argv), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else captured.err

    def test_two_models_on_one_text(self, tmp_path, small_base, capsys):
        run = Bench(tmp_path, small_base).train()
        text = tmp_path / "notes.txt"
        lines = (NANO / "data" / "heldout.jsonl").read_text().split("\n")[:20]
        text.write_text("\n".join(json.loads(line)["messages"][0]["content"] for line in lines))
        code, found = self.evaluate(
            capsys, run.path, "--text", text, "--window", 64, "--stride", 16, "--against", "base"
        )
        assert code == 0
        assert found["bytes"] == len(text.read_bytes())
        bits = found["loss"] * found["tokens"] / math.log(2) / found["bytes"]
        assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
        assert found["against"][0]["tokens"] == found["tokens"]
        assert "tasks" not in found and found["compared"]["base"]["loss"]["p_value"] <= 1
        assert (run.eval / "notes.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--window", "8"], "no effect without --text"),
            (["--text", "a", "--data", "b"], "--data and --text: one of them"),
            (["--text", "nowhere.txt"], "nowhere.txt"),
            (["--text", str(NANO / "data" / "heldout.jsonl")], "holds messages"),
            (["--text", "README.md", "--window", "1"], "--window 1: allowed: 2 or more"),
            (["--text", "x.txt", "--window", "999999"], "the model's context"),
        ],
    )
    def test_arguments(self, bench, small_base, capsys, arguments, message, tmp_path):
        (tmp_path / "x.txt").write_text("x")
        code, error = self.evaluate(capsys, small_base, *arguments)
        assert code == 2
        assert message in error
