"""One task family: its items, its plain notation for pretraining and its instruction templates.

An item is a mapping of slots to strings, always with `answer` and `key`. The key decides, by a
hash and nothing else, whether the item is held out of the instruction rows; in families that
are not `memorised` a held item is kept out of the pretraining corpus too.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from lexicon import NAMES

Item = dict[str, str]
Message = dict[str, str]

# One item in HELD_ONE_IN is held out.
HELD_ONE_IN = 4

# How a noun phrase becomes a request. Each family trains on half of the shared frames; the
# other half, and the frames of NEW_FRAMES, meet it only in held-out rows.
SHARED_FRAMES = (
    "What is {p}?",
    "Tell me {p}.",
    "Name {p}.",
    "Say {p}.",
    "I want to know {p}.",
    "Find {p}.",
    "Write {p}.",
    "Do you know {p}?",
    "Please tell me {p}.",
    "Give {p}.",
)
NEW_FRAMES = (
    "Please give me {p}.",
    "Can you say {p}?",
    "I need {p}.",
    "Could you tell me {p}?",
    "Show me {p}.",
    "What would {p} be?",
)

# Reported speech: the nearest thing to a question that the pretraining corpus holds.
REPORTED = (
    "{A} asked {B} for {p}. {B} said {answer}.",
    "{A} wanted to know {p}. {B} said it was {answer}.",
    "{A} asked about {p}, and {B} said: {answer}",
    "{A} did not know {p}, but {B} did: {answer}.",
    "{A} found {p}: {answer}.",
    "{A} wrote {p} on the board: {answer}",
    "{A} could name {p}. It was {answer}.",
)


def capitalised(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def hash_holds(text: str) -> bool:
    """True for one text in `HELD_ONE_IN`, the same ones on every machine."""
    return zlib.crc32(text.encode()) % HELD_ONE_IN == 0


@dataclass(frozen=True)
class Family:
    """A task family.

    Attributes:
        name: Its name in every file.
        draw: Random source -> item.
        phrases: Noun phrases for the answer, with slots ("the capital of {x}").
        statements: More plain sentences; one that ends in "{answer}." can be a probe.
        context: Text that stands before the phrase ("{story} "), or nothing.
        seen: Hand-written instruction templates used in training rows.
        unseen: Hand-written instruction templates used in held-out rows only.
        memorised: Held items are in the pretraining corpus (facts and word forms).
        weight: Share of the pretraining documents, relative to other families.
        num_frames: Shared frames among the seen templates.
    """

    name: str
    draw: Callable[[Random], Item]
    phrases: tuple[str, ...]
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    statements: tuple[str, ...] = ()
    context: str = ""
    memorised: bool = False
    weight: float = 1.0
    num_frames: int = 5

    def is_held(self, item: Item) -> bool:
        """True for an item that is held out of the training rows."""
        return hash_holds(f"{self.name}|{item['key']}")

    def sample(self, rng: Random, held: bool | None) -> Item:
        """An item; `held` says whether it must (or must not) be held out, None takes any."""
        while True:
            item = self.draw(rng)
            if held is None or self.is_held(item) == held:
                return item

    def corpus_item(self, rng: Random) -> Item:
        """An item that the pretraining corpus may show."""
        return self.sample(rng, None if self.memorised else False)

    # --- plain notation -------------------------------------------------------------------

    def sentences(self) -> list[str]:
        """Plain statements of one item, each a whole text."""
        own = [self.context + capitalised(phrase) + " is {answer}." for phrase in self.phrases]
        return own + list(self.statements)

    def document(self, rng: Random) -> str:
        """A pretraining document: one to four items in one of three notations."""
        items = [self.corpus_item(rng) for _ in range(rng.randint(1, 4 - bool(self.context)))]
        style = rng.random()
        if style < 0.55:
            return self._stated(rng, items)
        if style < 0.85:
            texts = [self._reported(rng, item) for item in items[:2]]
            joint = " " if texts[0].endswith(".") else "\n"
            return joint.join(texts)
        phrase = rng.choice(self.phrases)
        note = self.context + phrase + ": {answer}"
        return "\n".join(note.format(**item) for item in items)

    def _stated(self, rng: Random, items: list[Item]) -> str:
        sentences = self.sentences()
        if rng.random() < 0.5:
            sentences = [rng.choice(sentences)]
        joint = rng.choice((" ", " ", "\n"))
        return joint.join(rng.choice(sentences).format(**item) for item in items)

    def _reported(self, rng: Random, item: Item) -> str:
        one, other = rng.sample(NAMES, 2)
        text = rng.choice(REPORTED).replace("{p}", rng.choice(self.phrases))
        return (self.context + text).format(A=one, B=other, **item)

    def probe(self, rng: Random) -> tuple[str, str]:
        """(prompt, completion) in plain notation, from a held item."""
        end = " {answer}."
        text = rng.choice([sentence for sentence in self.sentences() if sentence.endswith(end)])
        item = self.sample(rng, True)
        return text.removesuffix(end).format(**item), item["answer"] + "."

    # --- instructions ---------------------------------------------------------------------

    def templates(self, item: Item, seen: bool) -> tuple[str, ...]:
        """The instruction templates of one item; no template is both seen and unseen."""
        start = zlib.crc32(self.name.encode()) % len(SHARED_FRAMES)
        frames = SHARED_FRAMES[start:] + SHARED_FRAMES[:start]
        if seen:
            return self.seen + self._framed(frames[: self.num_frames])
        new = [NEW_FRAMES[(start + step) % len(NEW_FRAMES)] for step in range(2)]
        return self.unseen + self._framed((*frames[-2:], *new))

    def _framed(self, frames: tuple[str, ...]) -> tuple[str, ...]:
        texts = []
        for index, frame in enumerate(frames):
            phrase = self.phrases[index % len(self.phrases)]
            texts.append(self.context + capitalised(frame.replace("{p}", phrase)))
        return tuple(texts)

    def history(self, rng: Random, item: Item) -> list[Message]:
        """Messages that must stand before the request (none, in most families)."""
        return []
