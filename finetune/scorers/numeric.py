"""The number that an answer ends in, as in grade-school arithmetic (GSM8K).

The number is looked for, in this order:

1. directly after the first `####`, with nothing but signs and spaces between (GSM8K's own mark);
2. after the last "answer is", "answer:" or `\\boxed{` that has a number after it: the first one;
3. anywhere: the last one.

Read as numbers: 1,234 and 1 234 (with thin or unbreakable spaces) and LaTeX's 1{,}234, decimals,
.5, signs (also U+2212), 1e6, 3/4, 2 1/2 and \\frac{3}{4}. Currency, percent signs, bold and units
around them are left out: 25% is 25. Digits directly after a letter (m2, CO2) are no number.

Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", and the data set
openai/grade-school-math, whose own rule is 1; lm-evaluation-harness adds rule 3
(`flexible-extract` of gsm8k).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from typing import ClassVar

from finetune.scorers.scorer import Scorer

_QUOTIENT = Context(prec=50)  # 1/3 has no end: equal fractions are rounded equally

_NUMBER = re.compile(
    r"(?P<minus>(?<![^\W_])(?<![)\]}])-)?[+$€£¥₹]?"
    r"(?<![^\W_])(?<!\d\.)"
    r"(?:(?:(?P<whole>\d+) )?(?P<above>\d{1,9})/(?P<below>\d{0,8}[1-9]\d{0,8})(?!\.?\d)"
    r"|(?P<plain>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)"
    r"(?P<exponent>[eE][+-]?\d{1,3}(?!\w))?)"
)
_HASHES = re.compile(r"####[\W_]{0,8}?" + _NUMBER.pattern)
_MARKS = re.compile(r"\banswer\W{0,10}?(?:is\b|[:=])|\\boxed\s*\{", re.IGNORECASE)

_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\uff0d": "-", "\ufe63": "-"})
_FRACTION = re.compile(r"\\[dt]?frac\s?\{\s?(\d{1,9})\s?\}\s?\{\s?(\d{1,9})\s?\}")
_LATEX_COMMA = re.compile(r"\{,\}(?<=\d\{,\})(?=\d)")
_LATEX_SPACE = re.compile(r"\\[,!;:](?<=[\d,]..)(?=\d)")
_THIN_SPACE = re.compile(r"[\u00a0\u2009\u202f](?<=\d.)(?=\d{3}(?!\d))")


@functools.lru_cache(maxsize=256)  # an accepted answer is read more than once
def extract(text: str) -> Decimal | None:
    """The number that a text answers with; None where it has none."""
    text = _without_typesetting(text)
    if match := _HASHES.search(text):
        return _value(match)
    end = len(text)
    for mark in reversed(list(_MARKS.finditer(text))):
        if match := _NUMBER.search(text, mark.end(), end):
            return _value(match)
        end = mark.start()
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class Numeric(Scorer):
    """1 where both texts end in the same number, else 0; an answer without a number is 0.

    Attributes:
        tolerance: how far apart the numbers may be; 0: equal as exact decimals, 72 and 72.00 are.
    """

    name: ClassVar[str] = "numeric"
    version: ClassVar[int] = 1

    tolerance: float = 0.0

    def score_one(self, written: str, answer: str) -> float:
        """1 or 0; the accepted answer may be a number or a whole solution that ends in one."""
        found, right = extract(written), extract(answer)
        if found is None or right is None:
            return 0.0
        # 0.1 of the YAML file is a tenth, not the float next to it.
        return float(abs(Fraction(found) - Fraction(right)) <= Fraction(str(self.tolerance)))

    def why_unusable(self, answer: str) -> str | None:
        """A text without a number."""
        return "has no number" if extract(answer) is None else None

    def findings(self) -> list[str]:
        """The tolerance."""
        if self.tolerance >= 0:
            return []
        return [f"tolerance: found {self.tolerance}; allowed: a number >= 0"]


def _without_typesetting(text: str) -> str:
    text = text.translate(_MINUS_SIGNS).replace("\\$", "$").replace("\\%", "%")
    text = _FRACTION.sub(_fraction, text)
    text = _LATEX_SPACE.sub("", _LATEX_COMMA.sub(",", text))
    return _THIN_SPACE.sub("", text)


def _fraction(match: re.Match[str]) -> str:
    """With a space after a whole number: 1\\frac{1}{2} is 1 1/2, not 11/2."""
    is_mixed = match.string[: match.start()][-1:].isdigit()
    return f"{' ' if is_mixed else ''}{match[1]}/{match[2]}"


def _value(match: re.Match[str]) -> Decimal:
    if match["plain"]:
        value = Decimal(match["plain"].replace(",", "") + (match["exponent"] or ""))
    else:
        value = _QUOTIENT.divide(Decimal(match["above"]), Decimal(match["below"]))
        value = _QUOTIENT.add(Decimal(match["whole"] or 0), value)
    return value.copy_negate() if match["minus"] else value
