"""Plain text longer than the context, in windows: every token is scored once.

    loss = -Σ_t log p(x_t | BOS, as many tokens before it as its window has) / number of tokens

A window is BOS and up to `window - 1` tokens; of these the last `stride` are new and are scored.
With stride 1 every token has the whole window before it, and a text that fits in one window has its
plain likelihood. Every window begins with BOS, as every text in training did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from finetune.errors import InputError
from finetune.files import find_files
from finetune.llama.tokenizer import encode_text
from finetune.prepared import Document
from finetune.shapes import Example
from finetune.shapes.reading import read_examples


def windows(
    ids: Sequence[int], bos: int, window: int, stride: int, where: str = ""
) -> Iterator[Document]:
    """The windows of one text, each a document in which the new tokens alone count.

    Args:
        ids: of the text, without BOS.
        window: tokens of the longest window, BOS among them.
        stride: new tokens of every window but the first, which is new as a whole.
    """
    scored = 0
    while scored < len(ids):
        end = min(scored + stride if scored else window - 1, len(ids))
        begin = max(end - (window - 1), 0)
        mask = [False] + [position >= scored for position in range(begin, end)]
        place = Example(f"{where} tokens {scored + 1} to {end}")
        yield Document(place, [bos, *ids[begin:end]], mask)
        scored = end


def windows_of_files(
    name: str, tokenizer: PreTrainedTokenizerFast, window: int, stride: int
) -> tuple[list[Document], int]:
    """The windows of every text in a file, a folder or a pattern, and the texts' bytes (UTF-8).

    Raises:
        InputError: rows that are no plain text; no text at all; a stride that leaves gaps.
    """
    if not 1 <= stride < window:
        raise InputError(f"--stride {stride}: allowed: 1 to {window - 1}, less than the window")
    documents: list[Document] = []
    num_bytes = 0
    for path in find_files(name):
        shape, examples = read_examples(path)
        rows = list(examples)
        if shape != "text":
            raise InputError(f"{path}: holds {shape}; --text reads plain text (a column text)")
        for example in rows:
            ids = encode_text(tokenizer, example.text) if example.text else []
            num_bytes += len(example.text.encode())
            documents += windows(ids, tokenizer.bos_token_id, window, stride, example.where)
    if not documents:
        raise InputError(f"{name}: has no text to score")
    return documents, num_bytes
