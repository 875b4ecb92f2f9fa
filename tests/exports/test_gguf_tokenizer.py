"""The arrays of a GGUF file's tokenizer: against the original files, and what they encode.

llama.cpp's `llama` model joins the pair of neighbours whose piece scores highest, the leftmost
first; a character without a piece becomes bytes (`llm_tokenizer_spm_session` in
src/llama-vocab.cpp). It is written out here, slowly.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_reading import read_gguf
from sentencepiece import sentencepiece_model_pb2
from small_runs import NANO, write_base
from small_tokenizers import sentencepiece_model, tiktoken_model

from finetune.__main__ import main
from finetune.errors import InputError
from finetune.exports.gguf_tokenizer import TokenTable, token_table
from finetune.exports.source import Source
from finetune.llama.architecture import PRESETS, scaled_down
from finetune.llama.chat import FORMATS
from finetune.llama.tiktoken_file import special_tokens
from finetune.llama.tokenizer import encode_text, load_tokenizer, save_tokenizer
from finetune.llama.tokenizer_proof import PROBE

TEXTS = [text for text in PROBE if "\x00" not in text and len(text) < 90]


def joined_by_score(table: TokenTable, text: str) -> list[int]:
    ids = {token: i for i, token in enumerate(table.tokens) if table.types[i] in (1, 6)}
    text = (" " if table.add_space_prefix and text else "") + text
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(parts[i] + parts[i + 1], i) for i in range(len(parts) - 1)]
        known = [(-table.scores[ids[pair]], i) for pair, i in pairs if pair in ids]
        if not known:
            break
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found: list[int] = []
    for part in parts:
        as_bytes = [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        found += [ids[part]] if part in ids else as_bytes
    return found


def source_of(tokenizer, folder: Path, preset: str = "llama2-7b", **more) -> Source:
    arch = scaled_down(PRESETS[preset], more.pop("vocab_size", len(tokenizer)))
    return Source(folder, folder, None, arch, tokenizer, more.get("chat_format"))


def without_original(path: Path, folder: Path) -> Source:
    """The same tokenizer as tokenizer.json alone."""
    folder.mkdir()
    save_tokenizer(load_tokenizer(path), folder)
    return source_of(load_tokenizer(folder), folder)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "small.model").write_bytes(sentencepiece_model(600))
    (folder / "bare.model").write_bytes(sentencepiece_model(500, add_dummy_prefix=False))
    return {
        "nano": NANO / "tokenizer.model",
        "small": folder / "small.model",
        "bare": folder / "bare.model",
    }


@pytest.mark.parametrize("name", ["nano", "small", "bare", "llama2"])
def test_sentencepiece_arrays_are_the_files_own(originals, shared, name):
    path = originals[name] if name in originals else shared("tokenizers/llama2/tokenizer.model")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    table = token_table(source_of(load_tokenizer(path), path.parent), path)
    assert (table.model, table.pre) == ("llama", "default")
    found = list(zip(table.tokens, table.scores, table.types, strict=True))
    assert found == [(p.piece, p.score, p.type) for p in model.pieces]
    assert table.add_space_prefix == model.normalizer_spec.add_dummy_prefix
    tokenizer = load_tokenizer(path)
    if name != "llama2":  # 32,000 pieces are slow to join this way
        for text in TEXTS:
            assert joined_by_score(table, text) == encode_text(tokenizer, text), text


@pytest.mark.parametrize("name", ["nano", "small", "bare", "llama2"])
def test_scores_made_of_merges_give_the_same_ids(originals, shared, tmp_path, name):
    """`token_table` itself has SentencePiece encode the whole probe with them."""
    path = originals[name] if name in originals else shared("tokenizers/llama2/tokenizer.model")
    source = without_original(path, tmp_path / "json")
    table = token_table(source)
    original = token_table(source, path)
    assert table.tokens == original.tokens
    assert table.types == original.types
    assert table.add_space_prefix == original.add_space_prefix
    assert table.scores != original.scores
    if name != "llama2":
        for text in TEXTS:
            assert joined_by_score(table, text) == encode_text(source.tokenizer, text), text


@pytest.mark.parametrize("small", [True, False])
def test_byte_level_arrays_are_the_ranks_and_special_tokens(shared, tmp_path, small):
    import tiktoken.load

    path = tmp_path / "tokenizer.model"
    if small:
        path.write_bytes(tiktoken_model(700))
    else:
        path = shared("tokenizers/llama3/tokenizer.model")
    size = 700 if small else 128256
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "params.json").write_text(f'{{"vocab_size": {size}, "use_scaled_rope": true}}')
    tokenizer = load_tokenizer(path, model_folder=folder)
    source = source_of(tokenizer, folder, "llama3.1-8b", chat_format=FORMATS["llama3.1"])
    table = token_table(source)
    assert (table.model, table.pre, table.scores) == ("gpt2", "llama-bpe", [])
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    letters = gpt2_letters()
    assert table.tokens[:-256] == ["".join(letters[b] for b in p) for p in ranks]
    assert table.tokens[-256:] == special_tokens(is_llama_30=False)
    assert table.types == [1] * (size - 256) + [3] * 256
    at = {letters[b]: bytes([b]) for b in range(256)}
    joined = [b"".join(at[x] for x in merge.replace(" ", "")) for merge in table.merges]
    assert [ranks[piece] for piece in joined] == sorted(ranks[piece] for piece in joined)
    assert set(joined) == {piece for piece in ranks if len(piece) > 1}
    assert source.stop_ids[0] == size - 256 + 9


def gpt2_letters() -> dict[int, str]:
    """GPT-2's letters of the bytes, from transformers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def test_rows_without_a_token_are_filled_up(originals):
    path = originals["nano"]
    source = source_of(load_tokenizer(path), path.parent, vocab_size=1030)
    table = token_table(source, path)
    assert table.tokens[1024:] == [f"[PAD{i}]" for i in range(1024, 1030)]
    assert table.types[1024:] == [5] * 6
    assert len(table.scores) == 1030


def test_a_tokenizer_that_llama_cpp_cannot_name_is_refused(originals, tmp_path):
    from tokenizers import pre_tokenizers

    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiktoken_model(700))
    (tmp_path / "params.json").write_text('{"vocab_size": 700}')
    tokenizer = load_tokenizer(path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="another way than Llama 3"):
        token_table(source_of(tokenizer, tmp_path / "other"))


def test_the_special_ids_and_the_template_are_in_the_file(small_base, tmp_path):
    out = tmp_path / "out"
    argv = ["export", str(small_base), "--format", "gguf", "--out", str(out)]
    assert main([*argv, "--chat-format", "nano"]) == 0
    (path,) = out.glob("*.gguf")
    keys = read_gguf(path).keys
    tokenizer = load_tokenizer(small_base)
    said = {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items() if "_token" in k}
    assert said == {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.chat_template"] == FORMATS["nano"].jinja()
    assert keys["tokenizer.ggml.tokens"] == [
        tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))
    ]


def test_llama_3s_end_of_turn_is_named_beside_its_end_of_text(tmp_path):
    base = write_base(tmp_path / "base", "llama3.1-8b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    (base / "tokenizer.model").write_bytes(tiktoken_model(1024))
    out = tmp_path / "out"
    argv = ["export", str(base), "--format", "gguf", "--out", str(out)]
    assert main([*argv, "--chat-format", "llama3.1"]) == 0
    (path,) = out.glob("*.gguf")
    keys = read_gguf(path).keys
    tokens = keys["tokenizer.ggml.tokens"]
    assert tokens[keys["tokenizer.ggml.eot_token_id"]] == "<|eot_id|>"
    assert tokens[keys["tokenizer.ggml.eos_token_id"]] == "<|end_of_text|>"
    assert tokens[keys["tokenizer.ggml.bos_token_id"]] == "<|begin_of_text|>"
    assert keys["tokenizer.ggml.pre"] == "llama-bpe"
