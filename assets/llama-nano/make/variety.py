"""General text between the task families: tales, letters, talk, tables, copies, definitions.

Copying circuits (the ground of every list and record family) come from here as much as from the
families, so half of these documents say something twice.
"""

from collections.abc import Callable
from random import Random

from families import FAMILIES
from lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    CITIES,
    COLOURS,
    DAYS,
    FIELDS,
    JOBS,
    LIST_WORDS,
    NAMES,
    PETS,
    PLACES,
    PRONOUN,
    THINGS,
    WORDS,
    word_list,
)
from records import draw_record, record_json, record_line

WEATHER = word_list("sunny cold rainy windy warm cloudy foggy snowy")
MOODS = word_list("happy tired hungry proud sad busy calm brave")
LOOKS = word_list("old small big new clean heavy bright round soft strange")
DEEDS = (
    "washed the windows", "cooked a soup", "painted a wall", "played a song", "wrote a letter",
    "read a story", "climbed a hill", "baked some bread", "built a small boat", "fed the hens",
    "drew a map", "swept the floor", "planted a tree", "sang with a friend", "counted the stars",
)  # fmt: skip
OPENINGS = (
    "One day {a} went to the {place}.", "On {day} {a} was in the {place}.",
    "It was a {weather} day, and {a} walked to the {place}.",
    "{a} lived near the {place} with a {pet}.", "Every {day} {a} met {b} at the {place}.",
    "{a} the {job} came home from the {place}.",
)  # fmt: skip
MIDDLES = (
    "{P} saw a {look} {thing} on the ground.", "There {p} found a {colour} {thing}.",
    '"I want to give this {thing} to {b}," said {a}.', "{b} asked if {p} could help.",
    '"Can you show me the {thing}?" asked {b}.', "{a} did not know where the {thing} was.",
    "{P} needed a {thing}, but {p} had only a {other}.", "{b} had lost the {look} {thing}.",
    "Then {a} and {b} {deed}.", "{P} put the {thing} next to the {other}.",
    '"Would you like some {drink}?" asked {b}.', "The {pet} ran around the {place} two times.",
    "{b} could tell that {a} was {mood}.", "{a} said please, and {b} said yes.",
    "They looked at the {look} {thing} for a long time.", "It began to rain, so they went inside.",
    "First they {deed}; then they sat down and drank {drink}.",
)  # fmt: skip
ENDINGS = (
    "In the end {a} was {mood}.", "So {a} gave the {thing} to {b}.", "After that {p} went home.",
    'Then {b} said, "Thank you, {a}."', "That night {p} slept well.",
    "And the {colour} {thing} was in the {place} again.", "{b} and {a} are friends to this day.",
)  # fmt: skip
DEFINITIONS = (
    "A garden is a place where flowers and fruit grow.", "A baker is a person who bakes bread.",
    "A teacher is a person who helps children to learn.", "A library is a house full of books.",
    "A doctor is a person who helps sick people.", "A week is seven days, and a day has a night.",
    "A museum is a house where old things are kept.", "A barn is a house for cows and hay.",
    "A sailor is a person who works on a ship.", "A harbour is a place where ships can rest.",
    "A map is a drawing of a place, seen from above.", "A key is a thing that opens a door.",
    "Rain is water that falls from clouds.", "Snow is rain that is so cold that it turns white.",
    "A hill is a small mountain.", "A river is water that runs to the sea.",
    "The sun is bright in the day, and the moon is bright at night.",
    "A list is a row of words with a comma after each word but the last.",
    "A record is a row of fields, and every field has a value.",
    "JSON is a way to write a record so that a machine can read it.",
    "The plural of a word names more than one thing.",
    "The past tense of a verb says that a thing is over.",
    "Capital letters are the big letters that stand on signs.",
    "To sort numbers is to put the small ones first and the large ones last.",
    "To reverse a list is to turn it around, so that the last word comes first.",
    "To repeat a word is to say it again.", "To spell a word is to name its letters one by one.",
    "To add is to find how much two numbers are together.",
    "To take one number from another is to find how much is left.",
    "The larger of two numbers comes later when you count.",
    "The odd one out is the word that is not of the same kind as the others.",
    "The capital is the city where a country is led.", "A price is how much a thing costs.",
    "The opposite of a word means the other end: one is up, one is down.",
    "A verb is a word for what people do.", "A person who has a thing can give it to a friend.",
    "A neighbour is a person who lives in the next house.", "A coin is money made of metal.",
)  # fmt: skip


def slots(rng: Random) -> dict[str, str]:
    """One draw of everything the sentence frames may ask for."""
    one, other = rng.sample(NAMES, 2)
    thing, second = rng.sample(THINGS, 2)
    pronoun = PRONOUN[one]
    return {
        "a": one, "b": other, "p": pronoun, "P": pronoun.capitalize(), "thing": thing,
        "other": second, "place": rng.choice(PLACES), "day": rng.choice(DAYS),
        "weather": rng.choice(WEATHER), "mood": rng.choice(MOODS), "look": rng.choice(LOOKS),
        "pet": rng.choice(PETS), "job": rng.choice(JOBS), "colour": rng.choice(COLOURS),
        "deed": rng.choice(DEEDS), "drink": rng.choice(CATEGORIES["drink"]),
    }  # fmt: skip


def tale(rng: Random) -> str:
    """A story of three to six sentences about two people and a thing."""
    middles = rng.sample(MIDDLES, rng.randint(1, 4))
    lines = [rng.choice(OPENINGS), *middles, rng.choice(ENDINGS)]
    return " ".join(lines).format(**slots(rng))


def note(rng: Random) -> str:
    """A short letter to a friend."""
    lines = (
        "Dear {b},",
        "It is {weather} here. Today I {deed}, and my {pet} is {mood}.",
        "I live near the {place}. I have a {colour} {thing} for you.",
        "Your friend {a}",
    )
    return "\n".join(lines).format(**slots(rng))


def talk(rng: Random) -> str:
    """A line or two of direct speech, and what follows from it."""
    lines = (
        '"I have a {colour} {thing}," said {a}. "And I have a {look} {other}," said {b}. '
        "So {a} has the {thing}, and {b} has the {other}.",
        '"My name is {a}," said {a}. "Hello, {a}. My name is {b}," said {b}.',
        '"I work as a {job}," said {a}. {b} heard that {a} works as a {job}.',
        '{a} said: "I like {colour}." {b} said that {a} likes {colour}.',
        '"Where is my {thing}?" asked {a}. "It is in the {place}," said {b}. '
        "{a} went to the {place} and found the {thing}.",
        'Who has the {thing}? That was not clear. "I have it," said {b}. So {b} has the {thing}.',
    )
    return rng.choice(lines).format(**slots(rng))


def diary(rng: Random) -> str:
    """Some days in a row, a deed each."""
    start = rng.randrange(7)
    who = rng.choice(NAMES)
    days = [DAYS[(start + step) % 7] for step in range(rng.randint(2, 4))]
    return "\n".join(f"{day}: {who} {rng.choice(DEEDS)}." for day in days)


def copied_list(rng: Random) -> str:
    """A list that is said again, as it stands, from another place or with a word taken out."""
    pool = rng.choice((LIST_WORDS, LIST_WORDS, NAMES, NAMES, PLACES, CITIES, COLOURS, THINGS, JOBS))
    words = rng.sample(pool, rng.randint(3, 6))
    line = ", ".join(words)
    style = rng.randrange(4)
    if style == 0:
        return f"{line}\nagain: {line}"
    if style == 1:
        return f"The list is {line}. Once more: {line}."
    if style == 2:
        numbered = "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        return f"{line}\n{numbered}"
    return "\n".join((line, *(f"- {word}" for word in words)))


def copied_numbers(rng: Random) -> str:
    """Numbers, then the same numbers again."""
    numbers = ", ".join(str(rng.randint(1, 99)) for _ in range(rng.randint(3, 6)))
    return f"{numbers}\nagain: {numbers}"


def run_of_numbers(rng: Random) -> str:
    """Numbers in equal steps."""
    start, step = rng.randint(1, 60), rng.choice((1, 1, 1, 2, 5, 10))
    return ", ".join(str(start + step * index) for index in range(rng.randint(5, 9)))


def sums(rng: Random) -> str:
    """Sums with one number fixed, or differences of one number; held sums are left out."""
    fixed = rng.randint(2, 10)
    if rng.random() < 0.4:
        return ", ".join(f"{fixed + 4} - {less} = {fixed + 4 - less}" for less in range(1, 6))
    first = rng.randint(1, 6)
    rows = [(fixed, other) for other in range(first, first + 5)]
    if rng.random() < 0.5:
        rows = [(other, fixed) for other, fixed in rows]
    held = FAMILIES["add"].is_held
    free = [(a, b) for a, b in rows if not held({"a": str(a), "b": str(b)})]
    return ", ".join(f"{a} + {b} = {a + b}" for a, b in free)


def spelled(rng: Random) -> str:
    """Three words, letter by letter, in two notations.

    Names, places and jobs stand in no family of single words. Without these lines nothing tells
    one name from another, their embeddings stay alike, and a name is never copied.
    """
    words = rng.sample(rng.choice((NAMES, NAMES, PLACES, JOBS, CITIES, WORDS)), 3)
    if rng.random() < 0.5:
        return " ".join(f"{word} is spelled {'-'.join(word)}." for word in words)
    lines = (
        f"{word}: {' '.join(word)}; {word.upper()}: {' '.join(word.upper())}" for word in words
    )
    return "\n".join(lines)


def pseudo_word(rng: Random) -> str:
    """A made-up word of two or three syllables, its letters, its capitals: pure copying."""
    word = "".join(
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))
    )
    return f"{word} is spelled {'-'.join(word)}. {word} in capital letters is {word.upper()}."


def table(rng: Random) -> str:
    """A small table, then some of it as sentences."""
    fields = rng.sample([field for field in FIELDS if field != "name"], 2)
    names = rng.sample(NAMES, rng.randint(2, 3))
    rows = [(name, *(rng.choice(FIELDS[field]) for field in fields)) for name in names]
    lines = [" | ".join(("name", *fields)), *(" | ".join(row) for row in rows)]
    name, first, second = rng.choice(rows)
    lines.append(f"The {fields[0]} of {name} is {first}, and the {fields[1]} is {second}.")
    return "\n".join(lines)


def json_rows(rng: Random) -> str:
    """JSON lines, or one record in both notations."""
    if rng.random() < 0.5:
        return "\n".join(record_json(draw_record(rng, 2)) for _ in range(rng.randint(1, 3)))
    record = draw_record(rng, rng.randint(2, 4))
    lines = [record_line(record), *(f"{field} = {value}" for field, value in record.items())]
    return "\n".join(lines)


def definitions(rng: Random) -> str:
    """One to three sentences that say what a thing is."""
    return " ".join(rng.sample(DEFINITIONS, rng.randint(1, 3)))


def kinds(rng: Random) -> str:
    """Four words of one kind, perhaps against one of another."""
    kind = rng.choice(list(CATEGORIES))
    words = rng.sample(CATEGORIES[kind], 4)
    own = ", ".join(words)
    other = rng.choice(list(CATEGORY_OF))
    if CATEGORY_OF[other] == kind:
        return f"{own}: each word names a kind of {kind}."
    return (
        f"{own}: each word names a kind of {kind}. But {other} is a kind of {CATEGORY_OF[other]}."
    )


SOURCES: dict[str, tuple[Callable[[Random], str], float]] = {
    "tale": (tale, 3.0),
    "note": (note, 0.4),
    "talk": (talk, 1.0),
    "diary": (diary, 0.4),
    "copied_list": (copied_list, 2.2),
    "copied_numbers": (copied_numbers, 0.5),
    "run_of_numbers": (run_of_numbers, 0.4),
    "sums": (sums, 0.8),
    "spelled": (spelled, 2.0),
    "pseudo_word": (pseudo_word, 0.6),
    "table": (table, 0.8),
    "json_rows": (json_rows, 1.0),
    "definitions": (definitions, 0.4),
    "kinds": (kinds, 0.6),
}
