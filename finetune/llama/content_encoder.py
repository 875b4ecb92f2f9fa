"""Text to ids without special tokens: a companion of each tokenizer, kept as long as it lives.

Byte-level BPE with Llama 3's split pattern is encoded by tiktoken, which takes about a quarter of
the time that `tokenizers` does for the same ids. Whether they are the same is tried on the probe
corpus and the whole vocabulary, once for each tokenizer; where one string differs, `tokenizers` is
used. Every other tokenizer is encoded by `tokenizers` itself.
"""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from finetune import artifact
from finetune.artifact import sha256_of_json
from finetune.cache import cache_root
from finetune.errors import InputError
from finetune.llama.tiktoken_file import SPLIT_PATTERN, as_text, byte_letters
from finetune.llama.tokenizer_proof import PROBE

Encode = Callable[[Sequence[str]], list[list[int]]]

LONGEST_FAST = 20_000  # characters; the pattern's engine is slow, and deep, on very long runs

_lock = threading.Lock()
_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, Encode] = weakref.WeakKeyDictionary()


def content_encoder(tokenizer: PreTrainedTokenizerFast) -> Encode:
    """Texts -> ids: no BOS, control tokens typed in a text stay text. Thread-safe; the tokenizer
    stays as it is."""
    with _lock:
        encoder = _encoders.get(tokenizer)
        if encoder is None:
            encoder = _encoders[tokenizer] = _new_encoder(tokenizer)
    return encoder


def _new_encoder(tokenizer: PreTrainedTokenizerFast) -> Encode:
    exact = by_tokenizers(tokenizer)
    ranks = tiktoken_ranks(tokenizer)
    if ranks is None:
        return exact
    fast = by_tiktoken(ranks)
    return _with_long_texts(fast, exact) if _agree(tokenizer, ranks, fast, exact) else exact


def by_tokenizers(tokenizer: PreTrainedTokenizerFast) -> Encode:
    """The same model, without special tokens to match."""
    content = _content_tokenizer(tokenizer)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encodings = content.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return encode


def _content_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    backend = tokenizer.backend_tokenizer
    if _only_special_tokens_are_added(backend):
        content = Tokenizer(backend.model)  # shared, not copied
        if backend.normalizer is not None:
            content.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            content.pre_tokenizer = backend.pre_tokenizer
        return content
    # Added tokens that are not special are part of how text is written: keep those.
    content = Tokenizer.from_str(backend.to_str())
    content.encode_special_tokens = True
    content.no_truncation()
    content.no_padding()
    return content


def _only_special_tokens_are_added(backend: Tokenizer) -> bool:
    return all(token.special for token in backend.get_added_tokens_decoder().values())


def tiktoken_ranks(tokenizer: PreTrainedTokenizerFast) -> dict[bytes, int] | None:
    """Pieces as bytes -> ids, where the tokenizer is built as Llama 3's is; else None."""
    backend = tokenizer.backend_tokenizer
    model = backend.model
    if not isinstance(model, BPE) or not model.ignore_merges or model.dropout:
        return None
    if backend.normalizer is not None or not _only_special_tokens_are_added(backend):
        return None
    if not _splits_as_llama3(backend.pre_tokenizer):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    byte_of = {ord(letter): byte for byte, letter in byte_letters().items()}
    if not byte_of.keys() >= {ord(letter) for letter in set().union(*vocabulary)}:
        return None  # a piece that is not spelled in byte letters
    ranks = {piece.translate(byte_of).encode("latin-1"): r for piece, r in vocabulary.items()}
    return ranks if all(bytes([byte]) in ranks for byte in range(256)) else None


def _splits_as_llama3(pre_tokenizer: Any) -> bool:
    """Whether text is split by Llama 3's pattern and then spelled in bytes, and nothing else."""
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    parts = state.get("pretokenizers", [])
    if state.get("type") != "Sequence" or [p.get("type") for p in parts] != ["Split", "ByteLevel"]:
        return False
    split, spell = parts
    return (
        split.get("pattern") == {"Regex": SPLIT_PATTERN}
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and not spell.get("add_prefix_space")
        and not spell.get("use_regex")
    )


def by_tiktoken(ranks: dict[bytes, int]) -> Encode:
    """tiktoken with Llama 3's split pattern and no special tokens."""
    import tiktoken

    encoding = tiktoken.Encoding(
        "llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )

    def encode(texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            text.encode()  # tiktoken would mend half a surrogate pair in silence
        return [encoding.encode_ordinary(text) for text in texts]

    return encode


def _with_long_texts(fast: Encode, exact: Encode) -> Encode:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        if max(map(len, texts), default=0) <= LONGEST_FAST:
            return fast(texts)
        return [(fast if len(text) <= LONGEST_FAST else exact)([text])[0] for text in texts]

    return encode


def _agree(
    tokenizer: PreTrainedTokenizerFast, ranks: Iterable[bytes], fast: Encode, exact: Encode
) -> bool:
    """Whether both give the same ids for the probe corpus and every piece; remembered."""
    state = tokenizer.backend_tokenizer.model.__getstate__()
    versions = [version(name) for name in ("tokenizers", "tiktoken")]
    key = sha256_of_json([artifact.sha256_of_bytes(state), list(PROBE), SPLIT_PATTERN, versions])
    note = cache_root() / "encoders" / f"{key}.json"
    with contextlib.suppress(InputError, KeyError, TypeError):  # no note, or none that is whole
        return bool(artifact.read_json(note)["agree"])
    texts = [*PROBE, *(text for piece in ranks if (text := as_text(piece)))]
    agree = fast(texts) == exact(texts)
    with contextlib.suppress(OSError):  # a cache that cannot be written is asked again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_json(note, {"agree": agree})
    return agree
