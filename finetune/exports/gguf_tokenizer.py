"""A tokenizer as the arrays that llama.cpp reads from a GGUF file.

Its `llama` model is SentencePiece's BPE (pieces and scores), its `gpt2` model byte-level BPE
(pieces in GPT-2's letters, and merges); `llama-bpe` names Llama 3's split pattern, BOS in front
and whole words before merges.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer", and
`llama_vocab::impl::load` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from finetune.errors import InputError
from finetune.exports.source import Source, original_tokenizer
from finetune.llama.sentencepiece_file import parse_sentencepiece, sentencepiece_encoder
from finetune.llama.tiktoken_file import SPLIT_PATTERN, looks_like_tiktoken
from finetune.llama.tokenizer import encode_texts
from finetune.llama.tokenizer_proof import prove_equal

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"


@dataclass(frozen=True)
class TokenTable:
    """The vocabulary of a GGUF file.

    Attributes:
        model: `llama` (SentencePiece) or `gpt2` (byte-level BPE).
        pre: how text is split before the pieces; `default` or `llama-bpe`.
        tokens: the pieces, by id.
        types: NORMAL, UNKNOWN, CONTROL …, by id.
        scores: by id; SentencePiece only: the higher, the earlier a pair is joined.
        merges: "left right" in the order of joining; byte-level BPE only.
        add_space_prefix: whether a text begins with a space of its own.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    add_space_prefix: bool


def token_table(source: Source, given: Path | None = None) -> TokenTable:
    """The arrays of a model's tokenizer, filled up to the rows of its embedding.

    Args:
        given: the original tokenizer file, where it lies elsewhere.

    Raises:
        InputError: a kind of tokenizer that llama.cpp has no name for.
    """
    original = original_tokenizer(source, given)
    described = json.loads(source.tokenizer.backend_tokenizer.to_str())
    if original and not _is_tiktoken(original):
        table = _from_sentencepiece(original)
    elif described["model"].get("byte_fallback"):
        table = _from_merges(source, described)
    else:
        table = _from_byte_level(source, described)
    return _filled(table, source.architecture.vocab_size)


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return looks_like_tiktoken(file.read(4096))


def _from_sentencepiece(path: Path) -> TokenTable:
    """The pieces as they stand in the file: GGUF's types have SentencePiece's numbers."""
    model = parse_sentencepiece(path)
    return TokenTable(
        "llama",
        "default",
        tokens=[piece.piece for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        merges=[],
        add_space_prefix=bool(model.normalizer_spec.add_dummy_prefix),
    )


def _from_merges(source: Source, described: Mapping[str, Any]) -> TokenTable:
    """SentencePiece's scores from the order of merges, where only tokenizer.json is left.

    Proven by SentencePiece itself on a model made of the result.
    """
    where = source.folder / "tokenizer.json"
    if described["pre_tokenizer"] is not None:
        raise InputError(
            f"{where}: splits text before its pieces, which SentencePiece's pieces cannot say; "
            "name the original tokenizer.model with --tokenizer"
        )
    model = described["model"]
    tokens = _pieces(source.tokenizer)
    types = _types(tokens, described, source.tokenizer)
    scores = _scores(tokens, [tuple(pair) for pair in model["merges"]])
    prefixed = '"Prepend"' in json.dumps(described["normalizer"])
    table = TokenTable("llama", "default", tokens, types, scores, [], prefixed)
    probe = [
        text.replace(_SPACE, " ")
        for text, kind in zip(tokens, types, strict=True)
        if kind == NORMAL
    ]
    encode = sentencepiece_encoder(_as_proto(table))
    prove_equal(where, lambda texts: encode_texts(source.tokenizer, texts), encode, probe)
    return table


def _pieces(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    by_id = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    return [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(max(by_id) + 1)]


def _types(
    tokens: list[str], described: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast
) -> list[int]:
    """The type of every piece, from tokenizer.json."""
    special = {added["content"]: added["special"] for added in described["added_tokens"]}
    known, model = tokenizer.get_vocab(), described["model"]

    def type_of(text: str) -> int:
        if text == model.get("unk_token"):
            return UNKNOWN
        if text in special:
            return CONTROL if special[text] else USER_DEFINED
        if text not in known:
            return UNUSED
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        return BYTE if is_byte and model.get("byte_fallback") else NORMAL

    return [type_of(text) for text in tokens]


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """A score for each piece that joins pairs in the order of the merges.

    A piece can be joined from several pairs. Pieces whose pairs interleave share a score, as in
    the original: among equals the leftmost pair goes first, in both algorithms.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        piece = "".join(pair)
        first.setdefault(piece, rank)
        last[piece] = rank
    score_of: dict[str, float] = {}
    begin = end = -1
    for piece, rank in first.items():  # in the order of their first pairs
        begin, end = (begin, max(end, last[piece])) if rank < end else (rank, last[piece])
        score_of[piece] = -float(begin)
    lowest = -float(len(merges))
    return [score_of.get(token, lowest) for token in tokens]


def _as_proto(table: TokenTable) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(table.tokens, table.scores, table.types, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = BYTE in table.types
    model.trainer_spec.vocab_size = len(table.tokens)
    model.trainer_spec.unk_piece = table.tokens[table.types.index(UNKNOWN)]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = table.add_space_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return bytes(model.SerializeToString())


def _from_byte_level(source: Source, described: Mapping[str, Any]) -> TokenTable:
    where = source.folder / "tokenizer.json"
    splits = json.dumps(described["pre_tokenizer"])
    if json.dumps(SPLIT_PATTERN) not in splits or '"ByteLevel"' not in splits:
        raise InputError(
            f"{where}: splits text in another way than Llama 3; llama.cpp's llama-bpe would give "
            "other ids"
        )
    tokens = _pieces(source.tokenizer)
    types = _types(tokens, described, source.tokenizer)
    merges = [" ".join(pair) for pair in described["model"]["merges"]]
    return TokenTable("gpt2", "llama-bpe", tokens, types, [], merges, False)


def _filled(table: TokenTable, vocab_size: int) -> TokenTable:
    """The same with unused tokens for the rows of the embedding that no token has."""
    for token_id in range(len(table.tokens), vocab_size):
        table.tokens.append(f"[PAD{token_id}]")
        table.types.append(UNUSED)
        if table.scores:
            table.scores.append(-float(10**6))
    return table


def add_tokenizer(writer: Any, source: Source, table: TokenTable) -> None:
    """Puts a tokenizer's keys into a `gguf.GGUFWriter`."""
    tokenizer = source.tokenizer
    writer.add_tokenizer_model(table.model)
    writer.add_tokenizer_pre(table.pre)
    writer.add_token_list(table.tokens)
    writer.add_token_types(table.types)
    if table.scores:
        writer.add_token_scores(table.scores)
    if table.merges:
        writer.add_token_merges(table.merges)
    if table.model == "llama":
        writer.add_add_space_prefix(table.add_space_prefix)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if source.stop_ids and source.stop_ids[0] != tokenizer.eos_token_id:
        writer.add_eot_token_id(source.stop_ids[0])
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
