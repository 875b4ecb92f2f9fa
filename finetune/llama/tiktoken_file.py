"""Llama 3's `tokenizer.model`: tiktoken ranks, one "base64 rank" a line, and 256 special tokens."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from finetune.errors import InputError
from finetune.llama.merges import ordered_merges
from finetune.llama.sentencepiece_file import TokenizerParts

# Source: `Tokenizer.pat_str` in meta-llama/llama3 and meta-llama/llama-models, a pattern that
# OpenAI published with cl100k_base, with up to three digits a word.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_RANKS = 128000
NUM_SPECIAL = 256

# Source: `Tokenizer.__init__` in meta-llama/llama3 (3.0) and meta-llama/llama-models (3.1 on).
# None is the next reserved token.
_NAMES_30 = (
    *("<|begin_of_text|>", "<|end_of_text|>", None, None, None, None),
    *("<|start_header_id|>", "<|end_header_id|>", None, "<|eot_id|>"),
)
_NAMES_31 = (
    *("<|begin_of_text|>", "<|end_of_text|>", None, None, "<|finetune_right_pad_id|>"),
    *("<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|python_tag|>", "<|image|>"),
)


def special_tokens(is_llama_30: bool) -> list[str]:
    """The 256 special tokens in the order of their ids, for Llama 3.0 or for 3.1 and later."""
    named = _NAMES_30 if is_llama_30 else _NAMES_31
    names: list[str] = []
    num_reserved = 0
    for i in range(NUM_SPECIAL):
        name = named[i] if i < len(named) else None
        if name is None:
            name = f"<|reserved_special_token_{num_reserved}|>"
            num_reserved += 1
        names.append(name)
    return names


def read_tiktoken(
    path: Path, *, num_ranks: int = NUM_RANKS, is_llama_30: bool = False
) -> TokenizerParts:
    """Rebuilds a tiktoken ranks file with Llama 3's split pattern for `tokenizers`.

    Args:
        path: the ranks file.
        num_ranks: how many it must hold; a file that was cut off at a line's end shows by this.
        is_llama_30: name the special tokens as Llama 3.0 does; the ids are the same.

    Raises:
        InputError: a line is not "base64 rank", or ranks are missing.
    """
    ranks = _read_ranks(path)
    _check_ranks(path, ranks, num_ranks)
    letters = byte_letters()

    def spelled(piece: bytes) -> str:
        return piece.decode("latin-1").translate(letters)

    pairs = ordered_merges(((piece, float(rank)) for piece, rank in ranks.items()), ranks)
    tokenizer = Tokenizer(
        BPE(
            vocab={spelled(piece): rank for piece, rank in ranks.items()},
            merges=[(spelled(left), spelled(right)) for left, right in pairs],
            ignore_merges=True,  # tiktoken looks a whole word up before it merges
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = special_tokens(is_llama_30)
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    probe = tuple(text for piece in ranks if (text := as_text(piece)))
    return TokenizerParts(tokenizer, names[0], names[1], None, None, _encoder(ranks), probe)


def looks_like_tiktoken(head: bytes) -> bool:
    """Whether a file starts like a ranks file: base64, a space, a number."""
    words = head.split(b"\n", 1)[0].split()
    return len(words) == 2 and words[1].isdigit() and _decode(words[0]) is not None


def _decode(word: bytes) -> bytes | None:
    try:
        return base64.b64decode(word, validate=True)
    except binascii.Error:
        return None


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        piece = _decode(words[0]) if len(words) == 2 and words[1].isdigit() else None
        if piece is None:
            shown = line[:40].decode("ascii", "replace")
            raise InputError(f"{path}:{number}: {shown!r} is not 'base64 rank'; cut off?")
        ranks[piece] = int(words[1])
    return ranks


def _check_ranks(path: Path, ranks: Mapping[bytes, int], num_ranks: int) -> None:
    if len(ranks) != num_ranks:
        raise InputError(
            f"{path}: holds {len(ranks)} ranks where {num_ranks} are needed; it was cut off, or "
            "belongs to another model"
        )
    if sorted(ranks.values()) != list(range(num_ranks)):
        raise InputError(f"{path}: its ranks are not 0 to {num_ranks - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(f"{path}: has no rank for the single bytes {missing[:5]} …")


def byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def as_text(piece: bytes) -> str | None:
    """A piece as text; None where it is a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _encoder(ranks: dict[bytes, int]) -> Callable[[Sequence[str]], list[list[int]]]:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        import tiktoken

        original = tiktoken.Encoding(
            "llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        return [original.encode_ordinary(text) for text in texts]

    return encode
