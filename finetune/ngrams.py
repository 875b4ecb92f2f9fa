"""Texts as n-grams that can be compared: folded, cut into units, hashed.

The hashes are the same in every process and on every machine, which Python's own `hash` is not.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NUM_UNITS = 13  # of an n-gram
Hashes = npt.NDArray[np.uint64]

# Thai and Lao, Myanmar, Khmer, kana, Han: written without spaces between words, so that each
# character is a unit. Source: the block ranges of the Unicode code charts.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
LOOSE_ENDS = " .?。؟।"  # ends of sentences that people leave out; not "!", as 5! is not 5


def fold(text: str) -> str:
    """The text without what people write in different ways and mean alike.

    Invisible format characters (BOM, zero width, soft hyphen, direction marks, variation selectors)
    taken out, NFKC, case folded, each run of white space one space, no `LOOSE_ENDS` at the end.
    Other punctuation stays, outside too: -5 is not 5. Source: after toNFKC_Casefold of the Unicode
    Standard, section 3.13.
    """
    if not text.isascii():
        text = _patterns().invisible.sub("", text)
        # Folding can undo the normal form, hence twice.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = " ".join(text.casefold().split())
    return folded.rstrip(LOOSE_ENDS) or folded


def units(folded: str) -> list[str]:
    """What n-grams are made of: words without punctuation, and characters of `UNSPACED` scripts.

    Args:
        folded: as `fold` gives it.
    """
    return _patterns().unit.findall(folded)


class GramHasher:
    """The n-grams of folded texts as hashes of 64 bits.

    A hash is the sum of the units' own hashes, each times an odd weight for its place, modulo 2^64.
    Each unit is hashed once, so one object serves many texts.
    """

    def __init__(self) -> None:
        self._unit_hashes = _UnitHashes()
        weights = [_number(f"place {place}") | 1 for place in range(NUM_UNITS)]
        self._weights = np.array(weights, dtype=np.uint64)

    def __call__(self, folded: str) -> Hashes:
        """The distinct n-grams in rising order `(n-grams,)`; none for a text of under 13 units."""
        words = units(folded)
        num_grams = len(words) - NUM_UNITS + 1
        if num_grams < 1:
            return np.zeros(0, np.uint64)
        hashes = np.fromiter(map(self._unit_hashes.__getitem__, words), np.uint64, len(words))
        grams = np.zeros(num_grams, np.uint64)
        for place, weight in enumerate(self._weights):
            grams += weight * hashes[place : place + num_grams]
        return np.unique(grams)


class _UnitHashes(dict[str, int]):
    def __missing__(self, unit: str) -> int:
        self[unit] = value = _number(unit)
        return value


def _number(text: str) -> int:
    return int.from_bytes(digest(text)[:8], "little")


def digest(*texts: str) -> bytes:
    """16 bytes of BLAKE2b over texts, each closed by a byte that UTF-8 does not have."""
    result = blake2b(digest_size=16)
    for text in texts:
        result.update(text.encode("utf-8", "surrogatepass") + b"\xff")
    return result.digest()


class _Patterns(NamedTuple):
    invisible: re.Pattern[str]
    unit: re.Pattern[str]


@functools.cache
def _patterns() -> _Patterns:
    """Both patterns, from the categories of Unicode; \\w would cut words of Indic scripts at marks.

    Beyond the first plane only emoji and other pictures are told from letters: `re` tests every
    range there one by one.
    """
    categories = [unicodedata.category(chr(code)) for code in range(0x10000)]
    between = _ranges(code for code, name in enumerate(categories) if name[0] in "PSZC")
    invisible = _ranges(code for code, name in enumerate(categories) if name == "Cf")
    return _Patterns(
        re.compile(f"[{invisible}\ufe00-\ufe0f\U000e0000-\U000e0fff]"),
        re.compile(f"[{UNSPACED}]|[^{between}{UNSPACED}\U0001f000-\U0001faff]+"),
    )


def _ranges(codes: Iterable[int]) -> str:
    """Rising code points as the inside of a character class."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in runs)
