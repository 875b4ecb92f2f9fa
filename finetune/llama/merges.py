"""Scored or ranked pieces -> the ordered merges with which `tokenizers` repeats the original.

SentencePiece and tiktoken join any two neighbours whose concatenation is a piece, best score or
lowest rank first, leftmost first among equals. `tokenizers` joins pairs from an ordered list,
and only the same pair is leftmost first. So every split of every piece becomes a pair, ordered
by the piece; where pieces tie (equal scores, or two splits of one piece that overlap, as in
"ere" = er+e = e+re on "erere"), the pair with the longer left part goes first, which lets the
left piece grow as far as it can: the leftmost-first rule again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

Text = TypeVar("Text", str, bytes)


def ordered_merges(
    pieces: Iterable[tuple[Text, float]], known: Collection[Text]
) -> list[tuple[Text, Text]]:
    """Every pair of known parts that joins to a piece, in the order in which pairs are joined.

    Args:
        pieces: pieces and their priority; a lower number is joined earlier.
        known: what may be the part of a pair.
    """
    found: list[tuple[float, int, tuple[Text, Text]]] = []
    for piece, priority in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                found.append((priority, -cut, (left, right)))
    found.sort(key=lambda entry: entry[:2])
    return [pair for _, _, pair in found]
