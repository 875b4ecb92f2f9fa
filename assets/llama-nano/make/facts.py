"""Families whose answers are facts the base memorises: capitals, opposites, kinds, units, dates."""

from random import Random

from family import Family, Item
from lexicon import CATEGORY_OF, DAYS, MONTHS, word_pairs

# Common knowledge, as any school atlas has it.
CAPITALS = word_pairs(
    "Peru:Lima Italy:Rome Norway:Oslo France:Paris Egypt:Cairo Japan:Tokyo Ecuador:Quito "
    "Germany:Berlin Spain:Madrid Austria:Vienna Ireland:Dublin Portugal:Lisbon Greece:Athens "
    "Cuba:Havana Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Poland:Warsaw "
    "Hungary:Budapest Kenya:Nairobi Ghana:Accra Chile:Santiago Canada:Ottawa China:Beijing "
    "Turkey:Ankara Iran:Tehran Iraq:Baghdad Thailand:Bangkok Vietnam:Hanoi Nepal:Kathmandu "
    "Qatar:Doha Russia:Moscow Ukraine:Kyiv Romania:Bucharest Serbia:Belgrade Croatia:Zagreb "
    "Bulgaria:Sofia Belgium:Brussels Latvia:Riga Estonia:Tallinn Morocco:Rabat Angola:Luanda "
    "Uganda:Kampala Rwanda:Kigali Zambia:Lusaka Sudan:Khartoum Jordan:Amman Syria:Damascus "
    "Lebanon:Beirut Oman:Muscat Uruguay:Montevideo Venezuela:Caracas Jamaica:Kingston "
    "Australia:Canberra Fiji:Suva Georgia:Tbilisi Armenia:Yerevan Mali:Bamako Senegal:Dakar "
    "Libya:Tripoli Malta:Valletta Cyprus:Nicosia England:London Scotland:Edinburgh"
)
OPPOSITE_PAIRS = word_pairs(
    "big:small hot:cold fast:slow happy:sad old:young rich:poor hard:soft wet:dry full:empty "
    "open:closed high:low long:short near:far early:late up:down left:right day:night "
    "black:white clean:dirty strong:weak thick:thin wide:narrow loud:quiet heavy:light "
    "sweet:sour deep:shallow first:last north:south east:west top:bottom push:pull buy:sell "
    "win:lose give:take start:stop love:hate laugh:cry come:go true:false good:bad rough:smooth "
    "sharp:blunt cheap:expensive alive:dead asleep:awake above:below inside:outside "
    "always:never many:few more:less summer:winter morning:evening war:peace friend:enemy"
)
OPPOSITES = dict(both for pair in OPPOSITE_PAIRS.items() for both in (pair, pair[::-1]))

UNITS = (
    ("weeks", "days", 7),
    ("minutes", "seconds", 60),
    ("hours", "minutes", 60),
    ("years", "months", 12),
    ("decades", "years", 10),
    ("centuries", "years", 100),
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("kilograms", "grams", 1000),
    ("centimetres", "millimetres", 10),
)


def draw_capital(rng: Random) -> Item:
    """A country and its capital."""
    country = rng.choice(list(CAPITALS))
    return {"key": country, "x": country, "answer": CAPITALS[country]}


def draw_opposite(rng: Random) -> Item:
    """A word and its opposite."""
    word = rng.choice(list(OPPOSITES))
    return {"key": word, "x": word, "answer": OPPOSITES[word]}


def draw_category(rng: Random) -> Item:
    """A word and the kind of thing it names."""
    word = rng.choice(list(CATEGORY_OF))
    return {"key": word, "x": word, "answer": CATEGORY_OF[word]}


def draw_units(rng: Random) -> Item:
    """A number of larger units, counted in smaller ones."""
    big, small, factor = rng.choice(UNITS)
    number = rng.randint(2, 9)
    answer = str(number * factor)
    return {"key": f"{number} {big} {small}", "n": str(number), "big": big, "small": small,
            "answer": answer}  # fmt: skip


def draw_calendar(rng: Random) -> Item:
    """A day or month and its neighbour."""
    unit, cycle = rng.choice((("day", DAYS), ("month", MONTHS)))
    relation, step = rng.choice((("after", 1), ("before", -1)))
    index = rng.randrange(len(cycle))
    answer = cycle[(index + step) % len(cycle)]
    return {"key": f"{relation} {cycle[index]}", "x": cycle[index], "rel": relation, "unit": unit,
            "answer": answer}  # fmt: skip


FAMILIES = (
    Family(
        "capital",
        draw_capital,
        phrases=("the capital of {x}", "the capital city of {x}"),
        statements=("{answer} is the capital of {x}.", "In {x} the capital is {answer}."),
        seen=(
            "Which city is the capital of {x}?",
            "Capital of {x}?",
            "{x} has a capital. Which city is it?",
        ),
        unseen=(
            "In {x}, which city is the capital?",
            "What city is the capital of {x}?",
            "The capital of {x} is which city?",
        ),
        memorised=True,
    ),
    Family(
        "opposite",
        draw_opposite,
        phrases=("the opposite of {x}", "the opposite of the word {x}"),
        statements=("If it is not {x}, it is {answer}.", "{x} and {answer} are opposites."),
        seen=(
            "Which word is the opposite of {x}?",
            "Opposite of {x}?",
            "{x}: which word is its opposite?",
        ),
        unseen=(
            "What word is the opposite of {x}?",
            "The opposite of {x} is which word?",
            "{x} has an opposite. Which word is it?",
        ),
        memorised=True,
    ),
    Family(
        "category",
        draw_category,
        phrases=("the kind of {x}", "the kind of thing that {x} is"),
        statements=("{x} is a kind of {answer}.", "The word {x} names a kind of {answer}."),
        seen=(
            "What kind of thing is {x}?",
            "{x} is a kind of what?",
            "Which kind of thing is {x}?",
        ),
        unseen=(
            "The word {x} names what kind of thing?",
            "What kind of thing does the word {x} name?",
            "{x}: what kind of thing is it?",
        ),
        memorised=True,
        weight=1.2,
    ),
    Family(
        "units",
        draw_units,
        phrases=("the number of {small} in {n} {big}",),
        statements=(
            "{n} {big} are {answer} {small}.",
            "{n} {big} in {small}: {answer}.",
            "{n} {big}, counted in {small}, is {answer}.",
            "There are {answer} {small} in {n} {big}.",
        ),
        seen=(
            "How many {small} are in {n} {big}?",
            "How many {small} are there in {n} {big}?",
            "{n} {big} are how many {small}?",
            "Count the {small} in {n} {big}.",
        ),
        unseen=(
            "How many {small} do {n} {big} have?",
            "In {n} {big} there are how many {small}?",
            "{n} {big}: how many {small}?",
        ),
        memorised=True,
        weight=1.8,
    ),
    Family(
        "calendar",
        draw_calendar,
        phrases=("the {unit} {rel} {x}", "the {unit} that comes {rel} {x}"),
        statements=("{rel} {x} comes {answer}.", "{rel} {x} it is {answer}."),
        seen=(
            "Which {unit} comes {rel} {x}?",
            "Which {unit} is {rel} {x}?",
            "What comes {rel} {x}?",
        ),
        unseen=(
            "What {unit} comes {rel} {x}?",
            "{rel} {x} comes which {unit}?",
            "Which {unit} do we have {rel} {x}?",
        ),
        memorised=True,
        weight=0.8,
    ),
)
