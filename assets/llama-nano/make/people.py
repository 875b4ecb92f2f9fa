"""Families on little stories: who has a thing, where a person is."""

from random import Random

from family import Family, Item
from lexicon import NAMES, PLACES, THINGS

HAS = ("{who} has the {what}.", "The {what} is with {who}.", "{who} took the {what}.")
AT = ("{who} is in the {what}.", "{who} went to the {what}.", "{who} is at the {what}.")


def told(rng: Random, forms: tuple[str, ...], pairs: list[tuple[str, str]]) -> str:
    """The pairs as sentences; two of them may be joined by "and"."""
    form = forms[0] if rng.random() < 0.6 else rng.choice(forms)
    sentences = [form.format(who=who, what=what) for who, what in pairs]
    if form is forms[0] and len(pairs) == 2 and rng.random() < 0.3:
        return f"{sentences[0].removesuffix('.')} and {sentences[1]}"
    return " ".join(sentences)


def draw_pairs(rng: Random, pool: list[str]) -> list[tuple[str, str]]:
    """Two or three people, each with another word of the pool."""
    num_pairs = rng.randint(2, 3)
    names, whats = rng.sample(NAMES, num_pairs), rng.sample(pool, num_pairs)
    return list(zip(names, whats, strict=True))


def draw_holder(rng: Random) -> Item:
    """Who has what, and who has one of the things."""
    pairs = draw_pairs(rng, THINGS)
    who, what = rng.choice(pairs)
    story = told(rng, HAS, pairs)
    key = " ".join(f"{one} {other}" for one, other in pairs)
    return {"key": key, "story": story, "x": what, "answer": who}


def draw_place(rng: Random) -> Item:
    """Who is where, and where one person is."""
    pairs = draw_pairs(rng, PLACES)
    who, what = rng.choice(pairs)
    story = told(rng, AT, pairs)
    key = " ".join(f"{one} {other}" for one, other in pairs)
    return {"key": key, "story": story, "x": who, "place": what, "answer": f"the {what}"}


FAMILIES = (
    Family(
        "holder",
        draw_holder,
        phrases=("the person who has the {x}", "the one who has the {x}"),
        context="{story} ",
        statements=(
            "{story} So the {x} is with {answer}.",
            "{story} The {x} belongs to {answer}.",
            "{story} So {answer} has the {x}.",
            "{story} If you want the {x}, ask {answer}.",
        ),
        seen=(
            "{story} Who has the {x}?",
            "{story} The {x} is with whom?",
            "{story} Which person has the {x}?",
            "Who has the {x}? {story}",
        ),
        unseen=(
            "{story} Who is it that has the {x}?",
            "{story} So who has the {x}?",
            "Read this and say who has the {x}: {story}",
        ),
        weight=3.0,
    ),
    Family(
        "place",
        draw_place,
        phrases=("the place where {x} is", "the place of {x}"),
        context="{story} ",
        statements=(
            "{story} So {x} is now in {answer}.",
            "{story} If you look for {x}, go to {answer}.",
            "{story} You can find {x} in {answer}.",
        ),
        seen=(
            "{story} Where is {x}?",
            "{story} Where is {x} now?",
            "{story} In which place is {x}?",
            "Where is {x}? {story}",
        ),
        unseen=(
            "{story} So where is {x}?",
            "{story} Where can I find {x}?",
            "Read this and say where {x} is: {story}",
        ),
        weight=2.4,
    ),
)
