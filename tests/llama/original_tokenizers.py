"""SentencePiece and tiktoken themselves, as oracles for the tokenizers rebuilt from their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tiktoken

from finetune.llama.tiktoken_file import SPLIT_PATTERN, special_tokens

Oracle = Callable[[str], list[int]]


def spm_oracle(file: Path) -> Oracle:
    """SentencePiece itself, reading the file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(file)).encode


def tiktoken_encoding(file: Path) -> tiktoken.Encoding:
    """tiktoken itself, with ranks read by tiktoken's own loader and specials as Meta adds them."""
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(file))
    specials = {name: len(ranks) + i for i, name in enumerate(special_tokens(False))}
    return tiktoken.Encoding(
        "meta", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def tiktoken_oracle(file: Path) -> Oracle:
    """Ids of a text by tiktoken, control tokens in it as text."""
    return tiktoken_encoding(file).encode_ordinary
