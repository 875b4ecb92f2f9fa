"""A SentencePiece BPE `tokenizer.model` (Llama 1, Llama 2, and what is trained like them)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from finetune.errors import InputError
from finetune.llama.merges import ordered_merges

_SPACE = "▁"  # U+2581, which SentencePiece writes for a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class TokenizerParts:
    """A rebuilt tokenizer, its special tokens, and the original to compare it with.

    Attributes:
        tokenizer: the rebuilt one; control tokens are added tokens, nothing adds BOS yet.
        bos, eos, unk, pad: special tokens by role, None where the file has none.
        encode_original: texts -> ids by the original library, without BOS.
        probe: the vocabulary as text, to be compared with the original's ids.
    """

    tokenizer: Tokenizer
    bos: str | None
    eos: str | None
    unk: str | None
    pad: str | None
    encode_original: Callable[[Sequence[str]], list[list[int]]]
    probe: tuple[str, ...]


def read_sentencepiece(path: Path) -> TokenizerParts:
    """Rebuilds a SentencePiece BPE model for `tokenizers`.

    Normalising is a dummy prefix and spaces written as U+2581; there is no pre-tokenizer, so
    the whole text is one word, as for SentencePiece itself; characters without a piece become
    bytes. Control pieces never match inside text; user-defined pieces always do.

    Raises:
        InputError: the file is damaged, or of a kind that no Llama uses.
    """
    model = parse_sentencepiece(path)
    _refuse_other_kinds(path, model)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    symbols = [text for text, _, kind in pieces if kind == _USER_DEFINED]
    mergeable = {text: -score for text, score, kind in pieces if kind in (_NORMAL, _USER_DEFINED)}
    unk = next(text for text, _, kind in pieces if kind == _UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            vocab={text: token_id for token_id, (text, _, _) in enumerate(pieces)},
            merges=ordered_merges(mergeable.items(), mergeable),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=bool(model.trainer_spec.byte_fallback),
            # A symbol cut out below is one word and must become one piece.
            ignore_merges=bool(symbols),
        )
    )
    prefixed = bool(model.normalizer_spec.add_dummy_prefix)
    tokenizer.normalizer = _normalizer(prefixed)
    if symbols:
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = "|".join(re.escape(symbol) for symbol in longest_first)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = _decoder(prefixed)
    special = [text for text, _, kind in pieces if kind in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in special]
    )
    plain = [text.replace(_SPACE, " ") for text in mergeable]
    after_symbol = [symbols[0] + text for text in plain] if symbols else []
    encode = sentencepiece_encoder(model.SerializeToString())
    return TokenizerParts(tokenizer, *_roles(model, unk), encode, (*plain, *after_symbol))


def parse_sentencepiece(path: Path) -> Any:
    """The parsed file.

    Raises:
        InputError: it is damaged or cut off.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise InputError(
            f"{path}: is neither a SentencePiece model nor tiktoken ranks, or was cut off"
        ) from None
    num_pieces, stated = len(model.pieces), model.trainer_spec.vocab_size
    if not model.HasField("trainer_spec") or not model.HasField("normalizer_spec"):
        raise InputError(f"{path}: is a SentencePiece model that was cut off; download it again")
    if num_pieces < stated:
        raise InputError(f"{path}: has {num_pieces} of the {stated} pieces it states; cut off")
    return model


def _refuse_other_kinds(path: Path, model: Any) -> None:
    """What the rebuilt tokenizer could not repeat exactly is refused, not approximated."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    found = []
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type)
        found.append(f"its model type is {kind}; the documented Llamas use BPE")
    if normalizer.precompiled_charsmap:
        found.append(f"it normalises text by {normalizer.name!r}; Llamas use 'identity'")
    if normalizer.remove_extra_whitespaces:
        found.append("it removes extra white space; Llamas keep it")
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        found.append("it does not write spaces as a prefix U+2581, as Llamas do")
    kinds = [piece.type for piece in model.pieces]
    if _UNUSED in kinds:
        found.append("it has unused pieces; the documented Llamas have none")
    if kinds.count(_UNKNOWN) != 1:
        found.append(f"it has {kinds.count(_UNKNOWN)} unknown tokens, one is needed")
    if tied := _tied_pieces(model):
        found.append(f"the pieces {tied} have one score, so that neither is joined first")
    if trainer.byte_fallback and kinds.count(_BYTE) != 256:
        found.append(f"it has {kinds.count(_BYTE)} byte pieces, 256 are needed")
    if found:
        raise InputError([f"{path}: {finding}" for finding in found])


def _tied_pieces(model: Any) -> list[str]:
    """Pieces of equal score, whose order of joining a list of merges cannot express.

    Runs of one letter are well: Llama 2 scores its runs of spaces alike (see `merges`).
    """
    by_score: dict[float, list[str]] = {}
    for piece in model.pieces:
        if piece.type == _NORMAL and len(piece.piece) > 1:
            by_score.setdefault(piece.score, []).append(piece.piece)
    tied = (group for group in by_score.values() if len(group) > 1)
    return next((group[:4] for group in tied if len(set("".join(group))) > 1), [])


def _normalizer(prefixed: bool) -> Any:
    escape = normalizers.Replace(" ", _SPACE)
    return normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if prefixed else escape


def _decoder(prefixed: bool) -> Any:
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(parts + ([decoders.Strip(" ", 1, 0)] if prefixed else []))


def _roles(model: Any, unk: str) -> tuple[str | None, str | None, str, str | None]:
    """BOS, EOS, unknown and padding token, by the ids that the model was trained with."""
    trainer = model.trainer_spec
    ids = (trainer.bos_id, trainer.eos_id, trainer.pad_id)
    bos, eos, pad = (
        model.pieces[i].piece
        if 0 <= i < len(model.pieces) and model.pieces[i].type == _CONTROL
        else None
        for i in ids
    )
    return bos, eos, unk, pad


def sentencepiece_encoder(proto: bytes) -> Callable[[Sequence[str]], list[list[int]]]:
    """Texts -> ids, without BOS, by SentencePiece itself."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        ids: list[list[int]] = processor.encode(list(texts))
        return ids

    return encode
