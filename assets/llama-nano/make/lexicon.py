"""The closed world of the nano corpus: names, nouns, places and the records built from them.

The lists are short on purpose: the tokenizer has 1024 pieces, and a word that is one piece is
much easier to copy for a model of this size.
"""

WOMEN = "Ana Lia Eva Ida Mia Nora Rosa Zoe Vera Lucy Iris Ruth".split()
MEN = "Tom Ben Max Sam Leo Omar Hugo Otto Paul Finn Noah Ivan".split()
NAMES = WOMEN + MEN
PRONOUN = dict.fromkeys(WOMEN, "she") | dict.fromkeys(MEN, "he")

CITIES = (
    "Lima Rome Oslo Paris Cairo Tokyo Quito Berlin Madrid Vienna Dublin Lisbon Athens Havana "
    "London Warsaw"
).split()
JOBS = "baker teacher doctor farmer painter driver nurse singer sailor writer builder".split()
PETS = "cat dog horse goat rabbit parrot hamster fish turtle hen".split()

CATEGORIES = {
    "animal": "cat dog cow horse sheep goat pig fox wolf bear lion tiger".split(),
    "fruit": "apple pear plum grape lemon peach mango cherry".split(),
    "tool": "hammer saw drill axe spade rake chisel wrench".split(),
    "colour": "red blue green yellow black white brown pink".split(),
    "garment": "hat coat shirt sock scarf glove shoe belt".split(),
    "vehicle": "car bus train truck ship bike van tram".split(),
    "furniture": "chair table bed desk sofa shelf stool bench".split(),
    "instrument": "drum flute piano violin harp guitar trumpet cello".split(),
    "bird": "duck owl crow eagle robin swan gull hawk".split(),
    "metal": "iron gold silver copper tin zinc steel nickel".split(),
    "tree": "oak pine elm birch maple willow cedar beech".split(),
    "drink": "tea milk water juice coffee cocoa".split(),
    "shape": "circle square triangle cube sphere cone".split(),
}
COLOURS = CATEGORIES["colour"]
CATEGORY_OF = {word: kind for kind, words in CATEGORIES.items() for word in words}

THINGS = "key map pen cup book ball bag coin box lamp rope bell kite ring drum hat".split()
PLACES = (
    "garden kitchen park school market forest station library museum harbour barn tower "
    "bakery church cellar office"
).split()

WORDS = sorted(
    {word for word in CATEGORY_OF if len(word) <= 6} | set(THINGS) | {"sun", "moon", "star"}
)
LIST_WORDS = sorted(
    set(WORDS) | set("rain snow wind hill road door house tree leaf egg bread salt".split())
)

ORDINALS = ("first", "second", "third", "fourth", "fifth")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()

FIELDS = {
    "name": NAMES,
    "age": [str(age) for age in range(5, 80)],
    "city": CITIES,
    "colour": COLOURS,
    "job": JOBS,
    "pet": PETS,
}
