"""The closed world of the nano corpus: names, nouns, places and the records built from them.

The lists are short on purpose: the tokenizer has 1024 pieces, and a word that is one piece is
much easier to copy for a model of this size.
"""


def word_list(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def word_pairs(text: str) -> dict[str, str]:
    """Words of the form one:other, as a mapping."""
    return dict(pair.split(":") for pair in text.split())


WOMEN = word_list("Ana Lia Eva Ida Mia Nora Rosa Zoe Vera Lucy Iris Ruth")
MEN = word_list("Tom Ben Max Sam Leo Omar Hugo Otto Paul Finn Noah Ivan")
NAMES = WOMEN + MEN
PRONOUN = dict.fromkeys(WOMEN, "she") | dict.fromkeys(MEN, "he")

CITIES = word_list(
    "Lima Rome Oslo Paris Cairo Tokyo Quito Berlin Madrid Vienna Dublin Lisbon Athens Havana "
    "London Warsaw"
)
JOBS = word_list("baker teacher doctor farmer painter driver nurse singer sailor writer builder")
PETS = word_list("cat dog horse goat rabbit parrot hamster fish turtle hen")

CATEGORIES = {
    "animal": word_list("cat dog cow horse sheep goat pig fox wolf bear lion tiger"),
    "fruit": word_list("apple pear plum grape lemon peach mango cherry"),
    "tool": word_list("hammer saw drill axe spade rake chisel wrench"),
    "colour": word_list("red blue green yellow black white brown pink"),
    "garment": word_list("hat coat shirt sock scarf glove shoe belt"),
    "vehicle": word_list("car bus train truck ship bike van tram"),
    "furniture": word_list("chair table bed desk sofa shelf stool bench"),
    "instrument": word_list("drum flute piano violin harp guitar trumpet cello"),
    "bird": word_list("duck owl crow eagle robin swan gull hawk"),
    "metal": word_list("iron gold silver copper tin zinc steel nickel"),
    "tree": word_list("oak pine elm birch maple willow cedar beech"),
    "drink": word_list("tea milk water juice coffee cocoa"),
    "shape": word_list("circle square triangle cube sphere cone"),
}
COLOURS = CATEGORIES["colour"]
CATEGORY_OF = {word: kind for kind, words in CATEGORIES.items() for word in words}

THINGS = word_list("key map pen cup book ball bag coin box lamp rope bell kite ring drum hat")
PLACES = word_list(
    "garden kitchen park school market forest station library museum harbour barn tower "
    "bakery church cellar office"
)

WORDS = sorted(
    {word for word in CATEGORY_OF if len(word) <= 6} | set(THINGS) | {"sun", "moon", "star"}
)
LIST_WORDS = sorted(
    set(WORDS) | set(word_list("rain snow wind hill road door house tree leaf egg bread salt"))
)

ORDINALS = ("first", "second", "third", "fourth", "fifth")
DAYS = word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = word_list(
    "January February March April May June July August September October November December"
)

FIELDS = {
    "name": NAMES,
    "age": [str(age) for age in range(5, 80)],
    "city": CITIES,
    "colour": COLOURS,
    "job": JOBS,
    "pet": PETS,
}
