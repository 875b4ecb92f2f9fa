"""Rows that are probably not what their owner wants, by reason, each with its place.

Nothing is dropped or changed here, and nothing is certain: a text about HTML may well hold tags. No
language is assumed, except by the phrases of `refusal` (English) and the names of control tokens.
What cannot be told from the text alone is not guessed, such as an answer that ends too early.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from finetune.mojibake import has_mojibake
from finetune.overlap import RowText

MIN_PROMPT_REPEATED = 40  # characters; a shorter prompt is also a natural opening of its answer
MIN_RUN = 120  # characters; rulers of dashes and googol stay below
MIN_EQUAL_LINES = 8  # in a row
MIN_LINE = 10  # characters of such a line; shorter ones are drawings, matrices, closing braces
MIN_MARKUP = 3  # tags or entities that no code block holds
MAX_REFUSAL = 400  # characters; a longer answer goes on to say something

CONTROL_TOKEN = re.compile(
    r"<\|[a-z][a-z0-9_]*\|>"  # Llama 3, ChatML and many others
    r"|\[/?INST\]|<</?SYS>>|\A\s*<s>|</s>\s*\Z"  # Llama 2; <s> inside a text is HTML's
    r"|<(?:start|end)_of_turn>"  # Gemma
    r"|^\#\#\# (?:Instruction|Response|Human|Assistant):",  # Alpaca, Guanaco
    re.MULTILINE,
)
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufff9-\ufffb]")
RUN = re.compile(rf"(.)\1{{{MIN_RUN - 1}}}", re.DOTALL)
# No control token is without one of these: most texts need no search by the slow pattern.
IN_CONTROL_TOKENS = ("<", "[", "### ")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#[0-9]{1,6}|#x[0-9a-f]{1,6});", re.IGNORECASE)
TAG = re.compile(
    r"</?(?:a|b|br|div|em|font|h[1-6]|i|img|li|ol|p|span|strong|table|td|th|tr|u|ul)"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
# How code opens; an answer that opens with <p> or <b> is prose out of a page.
DOCUMENT = re.compile(r"\s*<(?:!|\?|html|head|body|style|script|svg|form|div|table)", re.IGNORECASE)
MEANS_MARKUP = re.compile(r"html|xml|svg|css|jsx|markup|\btags?\b|<", re.IGNORECASE)
REFUSAL = re.compile(
    r"(?:i'?m (?:very )?sorry|i apologi[sz]e|sorry|unfortunately)?[ ,.]*(?:but )?"
    r"(?:as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|i(?: a|')m (?:just |only )?an? (?:ai|(?:large )?language model)\b)"
    r".*(?:\bcannot\b|n't\b|\bnot\b|\bunable\b)"
)


@dataclass(frozen=True)
class Check:
    """One reason for suspicion.

    Attributes:
        name: a few words, stable.
        explanation: what it does to training, or what to do.
        holds: whether a row gives the reason.
        note: whether it is to be known only, many good files having some.
    """

    name: str
    explanation: str
    holds: Callable[[RowText], bool]
    note: bool = False


@dataclass(frozen=True)
class Suspicion:
    """The rows that one check finds.

    Attributes:
        check: the reason.
        places: `file:row` of each row, in the order they were given.
    """

    check: Check
    places: tuple[str, ...]


def checks_that_hold(row: RowText) -> tuple[Check, ...]:
    """The reasons for suspicion that one row gives, in the order of `CHECKS`."""
    return tuple(check for check in CHECKS if check.holds(row))


def suspicions(rows: Iterable[RowText]) -> list[Suspicion]:
    """What `CHECKS` find, in their order; checks without a row are left out."""
    places: dict[str, list[str]] = {check.name: [] for check in CHECKS}
    for row in rows:
        for check in checks_that_hold(row):
            places[check.name].append(row.where)
    return [Suspicion(c, tuple(places[c.name])) for c in CHECKS if places[c.name]]


def _in_either(finds: Callable[[str], bool]) -> Callable[[RowText], bool]:
    return lambda row: finds(row.prompt) or finds(row.answer)


def _is_empty(row: RowText) -> bool:
    return not row.folded_answer


def _repeats_prompt(row: RowText) -> bool:
    return bool(row.folded_prompt) and row.folded_prompt == row.folded_answer


def _opens_with_prompt(row: RowText) -> bool:
    prompt, answer = row.folded_prompt, row.folded_answer
    return len(prompt) >= MIN_PROMPT_REPEATED and answer != prompt and answer.startswith(prompt)


def _has_control_token(text: str) -> bool:
    if not any(map(text.__contains__, IN_CONTROL_TOKENS)):
        return False
    return CONTROL_TOKEN.search(text) is not None


def _has_markup(row: RowText) -> bool:
    if "<" not in row.answer and "&" not in row.answer:
        return False
    if MEANS_MARKUP.search(row.prompt):
        return False
    prose = CODE.sub(" ", row.answer)
    tags = 0 if DOCUMENT.match(prose) else len(TAG.findall(prose))
    return max(tags, len(ENTITY.findall(prose))) >= MIN_MARKUP


def _may_have_run(text: str) -> bool:
    """Whether an aligned window, half as long as a run, begins and ends with one character: a run
    holds such a window whole."""
    half = MIN_RUN // 2
    places = zip(text[::half], text[1::half], text[half - 1 :: half], strict=False)
    return any(first == second == last for first, second, last in places)


def _has_long_run(text: str) -> bool:
    if _may_have_run(text) and RUN.search(text):
        return True
    if text.count("\n") < MIN_EQUAL_LINES - 1:
        return False
    lines = [line.strip() for line in text.split("\n")]
    if len(lines) - len(set(lines)) < MIN_EQUAL_LINES - 1:
        return False
    previous, count = "", 0
    for line in lines:
        count = count + 1 if line == previous else 1
        previous = line
        if count >= MIN_EQUAL_LINES and len(line) >= MIN_LINE and any(map(str.isalpha, line)):
            return True
    return False


def _is_refusal(row: RowText) -> bool:
    if len(row.answer) > MAX_REFUSAL:
        return False
    return REFUSAL.match(row.folded_answer.replace("’", "'")) is not None


def _is_trimmed(row: RowText) -> bool:
    # Plain text has no prompt, and is trained as it stands.
    return bool(row.prompt) and any(text != text.strip() for text in (row.prompt, row.answer))


CHECKS = (
    Check("empty answer", "nothing to learn, or only that the answer ends at once", _is_empty),
    Check("answer is the prompt", "the model learns to repeat what it is told", _repeats_prompt),
    Check(
        "answer opens with the prompt",
        "the model learns to repeat the prompt first; answers hold what comes after it",
        _opens_with_prompt,
    ),
    Check(
        "replacement characters",
        "U+FFFD stands where a character was lost; read the source in its own encoding",
        _in_either(lambda text: "\ufffd" in text),
    ),
    Check(
        "wrong encoding",
        "UTF-8 that was read as Latin-1 or Windows-1252 (é has become Ã©)",
        _in_either(has_mojibake),
    ),
    Check(
        "control characters",
        "characters that do not print, save tab and line ends; often \\f or \\b of LaTeX in JSON",
        _in_either(lambda text: CONTROL_CHARACTER.search(text) is not None),
    ),
    Check(
        "HTML in prose",
        f"{MIN_MARKUP} or more tags or entities outside code, where the prompt speaks of none",
        _has_markup,
    ),
    Check(
        "control tokens as text",
        "it stays text and ends no turn; rows that were rendered before are rendered twice",
        _in_either(_has_control_token),
    ),
    Check(
        "long repetition",
        f"one character {MIN_RUN} times or one line {MIN_EQUAL_LINES} times in a row",
        _in_either(_has_long_run),
    ),
    Check(
        "refusal",
        "the answer only says what a language model cannot do (English phrases)",
        _is_refusal,
        note=True,
    ),
    Check(
        "outer white space",
        "the prompt formats of Llama 2 and 3 trim it; no model of theirs learns it",
        _is_trimmed,
        note=True,
    ),
)
