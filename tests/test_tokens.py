"""Tokens as people read them: their texts are the decoded text, their marks are the labels."""

from __future__ import annotations

import functools
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.fast.loss import pack
from finetune.llama.chat import FORMATS
from finetune.llama.tokenizer import encode_text, load_tokenizer
from finetune.prepared import Document
from finetune.shapes import Example
from finetune.tokens import as_table, as_text, control_ids, has_colour, labels_of, tokens_of

TEXTS = st.text(max_size=40) | st.sampled_from(
    [
        "Hello  wörld 漢字🦙\n x",
        "</s> is text",
        "<|user|>",
        "▁",
        "\ufffd",
        "👨\u200d👩\u200d👧",
        " ",
    ]
)


def document_of(tokenizer, *texts: str) -> Document:
    ids = [tokenizer.bos_token_id]
    for text in texts:
        ids += [*encode_text(tokenizer, text), tokenizer.eos_token_id]
    return Document(Example("t.jsonl:1"), ids, [place % 3 > 0 for place in range(len(ids))])


def check_texts(tokenizer, document: Document) -> None:
    tokens = tokens_of(tokenizer, document)
    whole = tokenizer.decode(document.input_ids, clean_up_tokenization_spaces=False)
    assert "".join(token.text for token in tokens) == whole
    assert [token.id for token in tokens] == document.input_ids
    assert [token.piece for token in tokens] == tokenizer.convert_ids_to_tokens(document.input_ids)
    assert [token.position for token in tokens] == list(range(len(tokens)))


@given(TEXTS, TEXTS)
def test_the_texts_are_the_decoded_text(nano_tokenizer, one, other):
    check_texts(nano_tokenizer, document_of(nano_tokenizer, one, other))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_the_texts_are_the_decoded_text_of_real_tokenizers(shared, name):
    tokenizer = load_tokenizer(shared(f"tokenizers/{name}/tokenizer.model"))

    @given(TEXTS, TEXTS)
    def check(one, other):
        check_texts(tokenizer, document_of(tokenizer, one, other))

    check()


@given(TEXTS)
def test_marks_are_the_labels_and_control_tokens_are_none_of_the_text(nano_tokenizer, text):
    document = document_of(nano_tokenizer, text)
    tokens = tokens_of(nano_tokenizer, document)
    labels = pack([(document.input_ids, document.train_mask)]).labels[0].tolist()
    assert labels_of(document) == labels
    assert [token.id if token.trained else -100 for token in tokens] == labels
    assert [token.position for token in tokens if token.control] == [0, len(tokens) - 1]


def test_control_tokens_are_those_no_text_can_become(nano_tokenizer):
    control = control_ids(nano_tokenizer)
    names = nano_tokenizer.convert_ids_to_tokens(sorted(control))
    assert {"<s>", "</s>", "<|user|>", "<|assistant|>"} <= set(names)
    typed = [i for name in names for i in encode_text(nano_tokenizer, name)]
    assert not control & set(typed)


def test_a_character_of_several_tokens_is_the_last_ones(nano_tokenizer):
    tokens = tokens_of(nano_tokenizer, document_of(nano_tokenizer, "a🦙"))
    assert [t.text for t in tokens if "0x" in t.piece] == ["", "", "", "🦙"]


def test_without_colour_brackets_tell_all_four_kinds_apart(nano_tokenizer):
    talk = [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "Yes"}]
    rendered = FORMATS["nano"].render(nano_tokenizer, talk)
    document = Document(Example("t:1"), rendered.input_ids, rendered.train_mask)
    tokens = tokens_of(nano_tokenizer, document)
    shown = as_text(tokens, colour=False)
    assert shown == "⟨<s>⟩⟨<|user|>⟩ </s>⟨</s>⟩⟨<|assistant|>⟩[[ Yes⟨</s>⟩]]"
    coloured = as_text(tokens, colour=True)
    assert "\x1b[90m </s>\x1b[0m" in coloured
    assert "\x1b[90m\x1b[7m</s><|assistant|>\x1b[0m" in coloured
    assert coloured.endswith("\x1b[32m Yes\x1b[0m\x1b[32m\x1b[7m</s>\x1b[0m")


def test_the_table_has_a_line_for_each_token(nano_tokenizer):
    document = document_of(nano_tokenizer, "Say\x1b[2J")
    tokens = tokens_of(nano_tokenizer, document)
    head, *lines = as_table(tokens, colour=False).split("\n")
    assert head.split() == ["position", "id", "in", "loss", "kind", "piece"]
    for token, line in zip(tokens, lines, strict=True):
        position, number, trained, kind, piece = line.split()
        assert (int(position), int(number), piece) == (token.position, token.id, token.piece)
        assert (trained == "trained", kind == "control") == (token.trained, token.control)
    assert "\x1b" not in "".join(lines) + as_text(tokens, colour=False)
    assert as_text(tokens, colour=True).count("\x1b[2J") == 0
    assert as_table(tokens, colour=True).count("\x1b[0m") == len(tokens)


def test_colour_needs_a_terminal_and_no_no_color(monkeypatch):
    class Terminal(io.StringIO):
        isatty = functools.partial(bool, 1)

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colour(Terminal())
    assert not has_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(Terminal())
