"""UTF-8 that was read as Latin-1 or Windows-1252: é has become Ã©, ’ has become â€™.

Such a reading makes two to four characters out of one: the first one of Â to ô, the others what the
bytes 80 to BF are in one of the two encodings. Runs of this form that are UTF-8 again give it away.
Good text has some as well, where a letter meets typographic marks: MAÇÔ, voilà », 10 Å². So the
marks and what stands before the run decide. A single damaged character beyond Latin letters, signs
and punctuation is not seen, two of them side by side are.

Source: RFC 3629 (the bytes of UTF-8); WHATWG Encoding Standard (windows-1252).
"""

from __future__ import annotations

import re

# Where Windows-1252 has no character (five bytes), the reading leaves Latin-1's control characters.
_BYTE_OF = {chr(byte): byte for byte in range(0x80, 0x100)}
_BYTE_OF |= {bytes([b]).decode("cp1252", "ignore"): b for b in range(0x80, 0xA0)}
_BYTE_OF.pop("", None)

_REST = "[" + "".join(char for char, byte in _BYTE_OF.items() if byte < 0xC0) + "]"
_RUN = re.compile(f"[Â-ß]{_REST}|[à-ï]{_REST}{{2}}|[ð-ô]{_REST}{{3}}")

_FOLLOWS_WORDS = frozenset("\xa0«»‹›‘’‚“”„…–—•·¡¿")  # what good text sets beside a letter
_POWERS = "¹²³"  # beside a unit
_OF_LATIN = "ÂÃ"  # the first character for é, ñ, £, ° and the rest of Latin-1
_OF_PUNCTUATION = "â"  # the first character for quotes, dashes, €
_OF_FILES = "\ufeff\ufffd"  # the byte order mark; what stands for a lost character

_LOST_TWICE = "锟斤拷"  # two U+FFFD in UTF-8 that were read as GBK


def has_mojibake(text: str) -> bool:
    """Whether a text has runs that only a wrong encoding explains."""
    if text.isascii():
        return False
    end_of_last = -1
    for match in _RUN.finditer(text):
        run, start = match[0], match.start()
        char = bytes(_BYTE_OF[part] for part in run).decode("utf-8", "ignore")
        if not char:
            continue
        if _is_sure(text[max(0, start - 1) : start], run, char):
            return True
        if not _FOLLOWS_WORDS.issuperset(run[1:]):
            if start == end_of_last:
                return True
            end_of_last = match.end()
    return _LOST_TWICE in text


def _is_sure(before: str, run: str, char: str) -> bool:
    """Whether one run is enough.

    Args:
        before: the character before the run, or nothing.
        char: what the run is in UTF-8.
    """
    first, rest = run[0], run[1:]
    typographic = _FOLLOWS_WORDS.issuperset(rest)
    if char in _OF_FILES:
        return True
    if len(run) > 2:
        return (len(run) == 4 or first in _OF_PUNCTUATION) and not typographic
    if before.islower():  # a capital inside a word
        return first in _OF_LATIN or (first.isupper() and rest not in _POWERS)
    if before.isupper():
        return char.isupper() and not typographic
    return first in _OF_LATIN and not typographic
