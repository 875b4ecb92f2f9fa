"""Families on single words: plural, past tense, capitals, spelling, letters, numbers in words."""

from random import Random

from family import Family, Item
from lexicon import ORDINALS, WORDS, word_list, word_pairs

PLURALS = word_pairs(
    "foot:feet tooth:teeth goose:geese mouse:mice child:children man:men woman:women "
    "ox:oxen leaf:leaves knife:knives wife:wives wolf:wolves shelf:shelves loaf:loaves "
    "life:lives thief:thieves box:boxes fox:foxes bus:buses glass:glasses dish:dishes "
    "brush:brushes church:churches peach:peaches bench:benches match:matches watch:watches "
    "city:cities baby:babies lady:ladies story:stories berry:berries cherry:cherries "
    "party:parties army:armies potato:potatoes tomato:tomatoes hero:heroes dog:dogs cat:cats "
    "book:books tree:trees house:houses car:cars key:keys boy:boys girl:girls day:days "
    "toy:toys cup:cups hat:hats lamp:lamps bird:birds hand:hands door:doors river:rivers "
    "road:roads stone:stones song:songs ring:rings horse:horses spoon:spoons apple:apples "
    "window:windows garden:gardens letter:letters teacher:teachers farmer:farmers "
    "flower:flowers basket:baskets picture:pictures mountain:mountains village:villages"
)
PASTS = word_pairs(
    "go:went see:saw eat:ate run:ran give:gave take:took make:made write:wrote sing:sang "
    "swim:swam fly:flew buy:bought bring:brought think:thought catch:caught sell:sold "
    "hear:heard find:found sleep:slept keep:kept break:broke speak:spoke drink:drank "
    "draw:drew grow:grew know:knew throw:threw win:won sit:sat stand:stood lose:lost "
    "build:built send:sent feel:felt meet:met leave:left begin:began wear:wore choose:chose "
    "drive:drove ride:rode hide:hid fall:fell forget:forgot carry:carried study:studied "
    "hurry:hurried stop:stopped walk:walked jump:jumped help:helped open:opened paint:painted "
    "wash:washed cook:cooked play:played climb:climbed laugh:laughed smile:smiled love:loved "
    "dance:danced bake:baked wait:waited ask:asked answer:answered visit:visited "
    "listen:listened kick:kicked rest:rested share:shared finish:finished"
)
ONES = word_list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = word_list(". . twenty thirty forty fifty sixty seventy eighty ninety")


def in_words(number: int) -> str:
    """English words for 0 to 99."""
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def draw_plural(rng: Random) -> Item:
    """A noun and its plural."""
    word = rng.choice(list(PLURALS))
    return {"key": word, "x": word, "answer": PLURALS[word]}


def draw_past(rng: Random) -> Item:
    """A verb and its past tense."""
    word = rng.choice(list(PASTS))
    return {"key": word, "x": word, "answer": PASTS[word]}


def draw_upper(rng: Random) -> Item:
    """A word and itself in capital letters."""
    word = rng.choice(WORDS)
    return {"key": word, "x": word, "answer": word.upper()}


def draw_spell(rng: Random) -> Item:
    """A word and its letters, joined by hyphens."""
    word = rng.choice(WORDS)
    return {"key": word, "x": word, "answer": "-".join(word)}


def draw_letter(rng: Random) -> Item:
    """The first, second or last letter of a word."""
    word = rng.choice(WORDS)
    which, index = rng.choice((("first", 0), ("last", -1), ("second", 1)))
    assert which in (*ORDINALS, "last")
    return {"key": f"{which} {word}", "x": word, "which": which, "answer": word[index]}


def draw_numeral(rng: Random) -> Item:
    """A number from 1 to 99 and its English words."""
    number = rng.randint(1, 99)
    return {"key": str(number), "x": str(number), "answer": in_words(number)}


FAMILIES = (
    Family(
        "plural",
        draw_plural,
        phrases=("the plural of {x}", "the plural of the word {x}"),
        statements=(
            "One {x}, two {answer}.",
            "One {x}, many {answer}.",
            "There is one {x} here and there are three {answer} there.",
        ),
        seen=("Plural of {x}?", "Which word is the plural of {x}?", "{x}: write the plural."),
        unseen=(
            "What word is the plural of {x}?",
            "The plural of {x} is which word?",
            "Put {x} in the plural.",
        ),
        memorised=True,
        weight=1.2,
    ),
    Family(
        "past",
        draw_past,
        phrases=("the past tense of {x}", "the past tense of the verb {x}"),
        statements=(
            "Today we {x}, yesterday we {answer}.",
            "Now they {x}; last week they {answer}.",
            "I {x} every day, and last year I {answer} too.",
            "to {x}: I {x}, I {answer}",
            "The past of {x} is {answer}.",
        ),
        seen=(
            "Past tense of {x}?",
            "Put the verb {x} in the past tense.",
            "{x}: write the past tense.",
        ),
        unseen=(
            "Which word is the past tense of {x}?",
            "The past tense of {x} is which word?",
            "Change the verb {x} to the past tense.",
        ),
        memorised=True,
        weight=2.0,
    ),
    Family(
        "upper",
        draw_upper,
        phrases=("the word {x} in capital letters", "{x} in capital letters"),
        statements=(
            "{answer} is {x} in capital letters.",
            "The sign says {answer}, so there is a {x} near.",
            "small: {x}, capital: {answer}.",
            "{x}, {answer}; {answer}, {x}.",
        ),
        seen=(
            "Put {x} in capital letters.",
            "Print the word {x} in capital letters.",
            "{x}: use capital letters.",
        ),
        unseen=(
            "Change {x} to capital letters.",
            "Use capital letters for {x}.",
            "How do you write {x} in capital letters?",
        ),
        memorised=True,
        weight=1.8,
    ),
    Family(
        "spell",
        draw_spell,
        phrases=("the spelling of {x}", "the spelling of the word {x}"),
        statements=(
            "{answer} makes {x}.",
            "The word {x} is spelled {answer}.",
            "{x} has the letters {answer}.",
        ),
        seen=("Spell {x}.", "How is {x} spelled?", "Spell the word {x}."),
        unseen=(
            "How do you spell {x}?",
            "How is the word {x} spelled?",
            "Please spell {x}.",
        ),
        memorised=True,
        weight=1.2,
    ),
    Family(
        "letter",
        draw_letter,
        phrases=("the {which} letter of {x}", "the {which} letter of the word {x}"),
        statements=("In {x} the {which} letter is {answer}.",),
        seen=(
            "Which letter is the {which} one of {x}?",
            "Which letter comes {which} in {x}?",
            "Look at the word {x}. Which is the {which} letter?",
        ),
        unseen=(
            "In {x}, which letter is {which}?",
            "What letter comes {which} in {x}?",
            "The {which} letter of {x} is which one?",
        ),
        memorised=True,
        weight=1.2,
    ),
    Family(
        "numeral",
        draw_numeral,
        phrases=("the number {x} in words", "{x} in words"),
        statements=("{x} is written {answer}.", "Page {x}, that is page {answer}."),
        seen=(
            "How is {x} written in words?",
            "Put the number {x} in words.",
            "Use words for the number {x}.",
        ),
        unseen=(
            "How do you write {x} in words?",
            "Change the number {x} to words.",
            "In words, how is {x} written?",
        ),
        memorised=True,
        weight=0.8,
    ),
)
