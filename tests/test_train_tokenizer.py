"""A tokenizer of one's own: the verb, what it refuses, and that it is the embedded one's kind."""

from __future__ import annotations

import json

import pytest
import sentencepiece
from small_runs import NANO, embedded_rows

from finetune.__main__ import main
from finetune.llama.tokenizer import encode_texts, load_tokenizer


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in embedded_rows("train", 400)))
    return file


def test_the_verb_makes_a_tokenizer_with_llama_2s_settings(rows, tmp_path, capsys):
    out = tmp_path / "new" / "tokenizer.model"
    argv = ["train-tokenizer", str(rows), "--vocab-size", "400", "--out", str(out), "--json"]
    assert main([*argv, "--control", "<|user|>", "--control", "<|assistant|>"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(out)
    assert facts["pieces"] == len(tokenizer) == 400
    assert 1 < facts["characters_per_token"] < 8
    assert tokenizer.convert_ids_to_tokens(list(range(6))) == [
        *("<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
    ]
    texts = ["Hello  there", " 42 <|user|> é中🙂", "\n\t", ""]
    original = sentencepiece.SentencePieceProcessor(model_file=str(out))
    assert encode_texts(tokenizer, texts) == original.encode(texts)
    ours, embedded = _settings(out), _settings(NANO / "tokenizer.model")
    assert {k for k in ours if ours[k] != embedded[k]} == {"vocab_size", "control_symbols"}


def _settings(path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    names = [f.name for f in spec.DESCRIPTOR.fields]
    return {name: getattr(spec, name) for name in names} | {"normalizer": str(normalizer)}


def test_the_same_texts_give_the_same_file(rows, tmp_path):
    for name in ("a.model", "b.model"):
        argv = ["train-tokenizer", str(rows), "--vocab-size", "400", "--out", str(tmp_path / name)]
        assert main(argv) == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_plain_text_is_read_line_by_line(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 50 + "und noch etwas mehr\n" * 50)
    argv = ["train-tokenizer", str(text), "--vocab-size", "280", "--out", str(tmp_path / "t.model")]
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("size", "content", "says"),
    [
        ("100", b"the cat\n", "too small; at least 261"),
        ("5000", b"the cat\n" * 9, "try another --vocab-size, or give more text"),
        ("300", b"caf\xe9\n", "is not UTF-8"),
        ("300", b"<!doctype html><p>not found</p>", "is a web page"),
        ("300", b"", "is empty"),
    ],
)
def test_what_makes_no_tokenizer_is_refused(tmp_path, capsys, size, content, says):
    file, out = tmp_path / "text.txt", tmp_path / "t.model"
    file.write_bytes(content)
    assert main(["train-tokenizer", str(file), "--vocab-size", size, "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_an_existing_file_is_not_overwritten(rows, tmp_path, capsys):
    out = tmp_path / "t.model"
    out.write_bytes(b"mine")
    assert main(["train-tokenizer", str(rows), "--vocab-size", "400", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err and out.read_bytes() == b"mine"


def test_a_tokenizer_that_fails_its_proof_leaves_no_file(rows, tmp_path):
    out = tmp_path / "new" / "t.model"
    argv = ["train-tokenizer", str(rows), "--vocab-size", "400", "--out", str(out)]
    assert main([*argv, "--control", "x"]) == 2  # cannot be both a letter and a control token
    assert list(out.parent.iterdir()) == []
