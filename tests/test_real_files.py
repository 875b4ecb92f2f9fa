"""Every real file beside the clone through the whole data path, with Llama 3.1's own tokenizer.

A person has read the first and the last row of each as `preview` shows them: what is trained is the
assistant's words (all of the text, for plain text) and nothing else. The files are not ours to
copy, so what was read is kept as a hash of its ids and mask.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import yaml

from finetune.artifact import sha256_of_json
from finetune.config.loader import load
from finetune.data import load_data
from finetune.llama.chat import FORMATS
from finetune.llama.tokenizer import load_tokenizer

pytestmark = pytest.mark.shared

# How the source is named where its shape is not detected: preference data says which answer.
SOURCES: dict[str, dict[str, Any]] = {
    "dpo_en_demo.json": {
        "format": "prompt_completion",
        "columns": {"prompt": "conversations", "completion": "chosen"},
    },
    "kto_en_demo.json": {"format": "messages"},
    "torchtune_hh_rlhf_tiny.json": {"format": "messages", "columns": {"messages": "chosen"}},
}
PLAIN_TEXT = {"c4_demo.jsonl", "tinyshakespeare.txt"}
# rows, tokens, trained tokens, and the hash of the first and the last document, of 2026-11-24.
READ = {
    "alpaca_en_demo.json": (999, 197697, 144585, "e95c5e04bd44bbbb"),
    "axolotl_conversation.json": (1, 1931, 1765, "b9dad15c5fa17d8c"),
    "c4_demo.jsonl": (300, 157526, 157221, "5ced233e9bf0359b"),
    "dpo_en_demo.json": (300, 217129, 87998, "17a9c74ca7d50aba"),
    "glaive_toolcall_en_demo.json": (300, 164778, 84622, "ac3f4d25b41b65e4"),
    "gsm8k_train.jsonl": (7473, 1446988, 757147, "2c297e24bb385b3d"),
    "instructions_1100.json": (1100, 66203, 14374, "f4406df6c406a371"),
    "kto_en_demo.json": (300, 192317, 139562, "e71099aea8a273ad"),
    "seed_tasks.jsonl": (175, 25244, 10316, "30244319b0d43a9a"),
    "sharegpt_dummy_conversation.json": (500, 42758, 15727, "d9ad9945498ddf98"),
    "tinyshakespeare.txt": (1, 301770, 301696, "c4762825a99e0b5b"),
    "torchtune_chat_tiny.json": (1, 74, 13, "010973fca6d72331"),
    "torchtune_hh_rlhf_tiny.json": (1, 53, 5, "7c63a6cb2fa20699"),
    "torchtune_instruct_tiny.json": (2, 110, 26, "47ba5e8e2eb03a89"),
}  # fmt: skip


@functools.cache
def tokenizer_of(path):
    return load_tokenizer(path)


def loaded(shared, tmp_path, name: str):
    vocabulary = shared("tokenizers/llama3/tokenizer.model")
    is_text = name in PLAIN_TEXT
    config = {
        "recipe": "pretrain" if is_text else "sft",
        "base": {"architecture": "llama3.1-8b", "tokenizer": str(vocabulary)},
        "data": {"train": [{"path": str(shared(f"data/{name}")), **SOURCES.get(name, {})}]},
    }
    config["data"] |= {"max_length": 4096}
    config["data"] |= {"on_overflow": "split"} if is_text else {"chat_format": "llama3.1"}
    file = tmp_path / "real.yaml"
    file.write_text(yaml.safe_dump(config))
    chat_format = None if is_text else FORMATS["llama3.1"]
    return load_data(load(file).config, tokenizer_of(vocabulary), chat_format)


@pytest.mark.parametrize("name", READ)
def test_what_a_person_has_read_stays_as_it_was(shared, tmp_path, name):
    data = loaded(shared, tmp_path, name)
    ledger, ends = data.ledgers[0], [data.train[0], data.train[-1]]
    found = [[d.input_ids, d.train_mask] for d in ends]
    assert (
        ledger.num_rows_kept,
        int(data.train.lengths.sum()),
        int(data.train.num_trained.sum()),
        sha256_of_json(found)[:16],
    ) == READ[name]
    assert ledger.num_rows_kept == ledger.num_rows_read


def test_no_file_is_left_out(shared):
    assert {path.name for path in shared("data").iterdir()} == set(READ)


@pytest.mark.parametrize("name", sorted(set(READ) - PLAIN_TEXT))
def test_trained_tokens_are_the_answers_of_the_file(shared, tmp_path, name):
    """By another route: each trained span, decoded, is an answer that stands in the file."""
    tokenizer = tokenizer_of(shared("tokenizers/llama3/tokenizer.model"))
    text = shared(f"data/{name}").read_text(encoding="utf-8")
    data = loaded(shared, tmp_path, name)
    for document in [*data.train[:40], *data.train[-40:]]:
        spans: list[list[int]] = []
        before = False
        for token, trained in zip(document.input_ids, document.train_mask, strict=True):
            if trained and not before:
                spans.append([])
            if trained:
                spans[-1].append(token)
            before = trained
        answers = [m for m in document.example.messages if m["role"] == "assistant"]
        trained_answers = [m for m in answers if m.get("train") is not False]
        assert len(spans) == len(trained_answers)
        for ids, message in zip(spans, trained_answers, strict=True):
            said = tokenizer.decode(ids[:-1])
            assert tokenizer.convert_ids_to_tokens(ids[-1]) == "<|eot_id|>"
            if message.get("tool_calls"):
                called = message["tool_calls"][0]
                assert json.loads(said) == {
                    "name": called["name"],
                    "parameters": called["arguments"],
                }
            else:
                assert said == message["content"].strip()
                assert (
                    json.dumps(said)[1:-1] in text
                    or json.dumps(said, ensure_ascii=False)[1:-1] in text
                )
