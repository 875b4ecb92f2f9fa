"""Families on lists of words: reversing, picking, following, counting, the odd one, repeating."""

from random import Random

from family import Family, Item
from lexicon import CATEGORIES, COLOURS, LIST_WORDS, NAMES, ORDINALS

TIMES = {"two": 2, "three": 3, "four": 4}


def draw_words(rng: Random, num_words: int) -> list[str]:
    """Distinct words for a list: mostly nouns, sometimes names or colours."""
    pool = rng.choices((LIST_WORDS, NAMES, COLOURS), (8, 1, 1))[0]
    return rng.sample(pool, num_words)


def draw_reverse(rng: Random) -> Item:
    """Three or four words and their reverse."""
    words = draw_words(rng, rng.randint(3, 4))
    listed = ", ".join(words)
    return {"key": listed, "list": listed, "answer": ", ".join(reversed(words))}


def draw_pick(rng: Random) -> Item:
    """A list and one of its words by position."""
    words = draw_words(rng, rng.randint(3, 5))
    index = rng.randrange(len(words))
    which = ORDINALS[index]
    if index == len(words) - 1 and rng.random() < 0.7:
        which = "last"
    listed = ", ".join(words)
    return {"key": listed, "list": listed, "which": which, "answer": words[index]}


def draw_follow(rng: Random) -> Item:
    """A list and the word after one of its words."""
    words = draw_words(rng, rng.randint(3, 5))
    index = rng.randrange(len(words) - 1)
    listed = ", ".join(words)
    return {"key": listed, "list": listed, "x": words[index], "answer": words[index + 1]}


def draw_count(rng: Random) -> Item:
    """A list of two to seven words and its length."""
    words = draw_words(rng, rng.randint(2, 7))
    listed = ", ".join(words)
    return {"key": listed, "list": listed, "answer": str(len(words))}


def draw_odd(rng: Random) -> Item:
    """Three words of one kind and one of another."""
    kinds = [kind for kind in CATEGORIES if kind != "bird"]
    kind, other = rng.sample(kinds, 2)
    odd = rng.choice(CATEGORIES[other])
    words = rng.sample(CATEGORIES[kind], 3)
    words.insert(rng.randrange(4), odd)
    listed = ", ".join(words)
    return {"key": listed, "list": listed, "kind": kind, "answer": odd}


def draw_repeat(rng: Random) -> Item:
    """A word, said two to four times."""
    word = rng.choice(LIST_WORDS)
    times = rng.choice(list(TIMES))
    return {"key": f"{word} {times}", "x": word, "times": times,
            "answer": " ".join([word] * TIMES[times])}  # fmt: skip


FAMILIES = (
    Family(
        "reverse",
        draw_reverse,
        phrases=("the reverse of {list}", "the list {list} in reverse order"),
        statements=("{list} in reverse is {answer}.", "{list} turned around: {answer}."),
        seen=(
            "Reverse {list}.",
            "Reverse the list {list}.",
            "Put {list} in reverse order.",
            "Turn around this list: {list}",
        ),
        unseen=(
            "Please reverse {list}.",
            "Reverse this list: {list}",
            "Turn the list {list} around.",
        ),
    ),
    Family(
        "pick",
        draw_pick,
        phrases=("the {which} word of {list}", "the {which} word in the list {list}"),
        statements=("In {list} the {which} word is {answer}.",),
        seen=(
            "Which word is {which} in {list}?",
            "{list}: which word is {which}?",
            "Look at the list {list}. Which is the {which} word?",
        ),
        unseen=(
            "In the list {list}, which word is {which}?",
            "Which word comes {which} in {list}?",
            "{list}. Pick the {which} word.",
        ),
        weight=1.3,
    ),
    Family(
        "follow",
        draw_follow,
        phrases=("the word after {x} in {list}", "the word just after {x} in the list {list}"),
        statements=("In {list} the word after {x} is {answer}.",),
        seen=(
            "Which word comes after {x} in {list}?",
            "{list}: which word is after {x}?",
            "Look at the list {list}. Which word comes after {x}?",
        ),
        unseen=(
            "In the list {list}, which word comes after {x}?",
            "Which word is just after {x} in {list}?",
            "{list}. Pick the word after {x}.",
        ),
        weight=1.6,
    ),
    Family(
        "count",
        draw_count,
        phrases=("the number of words in {list}", "the number of words in the list {list}"),
        statements=(
            "The list {list} has {answer} words.",
            "There are {answer} words in {list}.",
            "Words in {list}: {answer}.",
        ),
        seen=(
            "How many words are in {list}?",
            "Count the words: {list}",
            "How many words does the list {list} have?",
            "{list}: how many words are there?",
        ),
        unseen=(
            "Count the words in {list}.",
            "How many words are there in the list {list}?",
            "Look at {list}. How many words are there?",
        ),
        weight=1.8,
    ),
    Family(
        "odd",
        draw_odd,
        phrases=("the odd one out of {list}", "the odd word in {list}"),
        statements=(
            "In {list} the odd one out is {answer}.",
            "{list}: all but one are a kind of {kind}; the odd one is {answer}.",
        ),
        seen=(
            "Which is the odd one out: {list}?",
            "{list}: which is the odd one out?",
            "Which word is the odd one in {list}?",
        ),
        unseen=(
            "In {list}, which word is the odd one out?",
            "Pick the odd one out of {list}.",
            "{list}. Which word is odd?",
        ),
        weight=2.0,
    ),
    Family(
        "repeat",
        draw_repeat,
        phrases=("the word {x} {times} times", "{x} {times} times"),
        statements=("{x}, said {times} times, is {answer}.",),
        seen=(
            "Repeat {x} {times} times.",
            "Repeat the word {x} {times} times.",
            "{x}: repeat it {times} times.",
        ),
        unseen=(
            "Please repeat {x} {times} times.",
            "Write {x} and repeat it so that it stands {times} times.",
            "{times} times, repeat the word {x}.",
        ),
        weight=0.8,
    ),
)
