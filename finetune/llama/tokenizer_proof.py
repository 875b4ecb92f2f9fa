"""The proof at load: a rebuilt tokenizer gives the original's ids on strings chosen to break it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.errors import InputError

_PLAIN = (
    "",
    "Hello world",
    " Hello world",
    "  Hello  world  ",
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? It's 3.14159 or 1234567!",
    "IT'S I'LL we've they're I'd I'm 'S 'LL",
    "def f(x):\n    return {'a': [x ** 2, -1]}\n\n\n# done\r\n\tend",
    "a\n b\n\n  c\r\n\r\n d\t\te \t f",
    "\n",
    " \n \n",
    "\t \t",
    "▁ ▁▁ x▁y",
    "a\x00b\x01\x7f\ufeff\u200b\u200d\u2028\u0085\u00a0\u3000z",
    "é e\u0301 ñ Å ﬁ ǅ ſ 'ſ ß İ",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈🦙 ½ ²³ ٣٤٥ １２３ Ⅷ",
    "日本語のテキスト。中文字符，한국어 ไทย हिन्दी",
    "السلام عليكم \u202bשלום עולם\u202c",
    "\U0010ffff\U000e0041\ufffd\ufffe",
)
_CONTROL_LOOK_ALIKES = (
    "<s>a</s>",
    "<unk> <pad> <0x41> <0x0A>",
    "[INST] <<SYS>> x <</SYS>> [/INST]",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "a<|eot_id|>b <|end_of_text|> <|python_tag|><|finetune_right_pad_id|>",
    "<|system|>a<|user|> b<|assistant|>",
    "< | user | > <|us er|> <|",
)
# Runs are where two orders of joining part ways.
_RUN_UNITS = (" ", "\n", "\t", "-", "=", "a", "ab", "ere", "\r\n", " \n", "é", "🙂", "0", "\u3000")
_RUN_LENGTHS = (2, 3, 5, 7, 15, 16, 17, 18, 31, 33, 47, 79, 83, 127, 130)

PROBE: tuple[str, ...] = (
    *_PLAIN,
    *_CONTROL_LOOK_ALIKES,
    *(f"{unit * length}x" for unit in _RUN_UNITS for length in _RUN_LENGTHS),
)
"""The probe corpus; a tokenizer's own pieces are tried beside it."""

Encode = Callable[[Sequence[str]], list[list[int]]]


def prove_equal(path: Path, ours: Encode, original: Encode, probe: Sequence[str] = ()) -> None:
    """Compares ids on the probe corpus and on the tokenizer's own pieces.

    Args:
        path: the original's file, for the message.
        ours: texts -> ids by the rebuilt tokenizer, without BOS.
        original: the same by the original library.
        probe: more texts to try: the vocabulary's own.

    Raises:
        InputError: a string gets other ids; the first such string is named.
    """
    texts = [*PROBE, *probe]
    for text, our_ids, true_ids in zip(texts, ours(texts), original(texts), strict=True):
        if our_ids != true_ids:
            raise InputError(
                f"{path}: cannot be rebuilt exactly, so it is refused: for {text!r} the original "
                f"gives {true_ids[:20]}, the rebuilt tokenizer {our_ids[:20]}"
            )
