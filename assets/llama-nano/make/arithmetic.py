"""Families on small numbers: sums, differences, the larger of two, sorting three."""

from dataclasses import dataclass
from random import Random

from family import Family, Item, hash_holds


@dataclass(frozen=True)
class Commutative(Family):
    """A held pair is in the corpus only the other way round, and never both ways held."""

    def is_held(self, item: Item) -> bool:
        """True for a held pair whose other order is not held."""
        one, other = item["a"], item["b"]
        return hash_holds(f"{self.name}|{one}|{other}") and not hash_holds(
            f"{self.name}|{other}|{one}"
        )


def draw_add(rng: Random) -> Item:
    """Two numbers up to 10 and their sum."""
    one, other = rng.randint(1, 10), rng.randint(1, 10)
    return {"key": f"{one} {other}", "a": str(one), "b": str(other), "answer": str(one + other)}


def draw_subtract(rng: Random) -> Item:
    """Two numbers up to 14 and their positive difference."""
    one = rng.randint(2, 14)
    other = rng.randint(1, one - 1)
    return {"key": f"{one} {other}", "a": str(one), "b": str(other), "answer": str(one - other)}


def draw_compare(rng: Random) -> Item:
    """Two numbers up to 99 and the larger or the smaller one."""
    one, other = rng.sample(range(1, 100), 2)
    relation, chosen = rng.choice((("larger", max), ("smaller", min)))
    key = "{} {}".format(*sorted((one, other)))
    return {"key": key, "a": str(one), "b": str(other), "rel": relation,
            "answer": str(chosen(one, other))}  # fmt: skip


def draw_sort(rng: Random) -> Item:
    """Three numbers up to 99 and their order."""
    numbers = rng.sample(range(1, 100), 3)
    ordered = ", ".join(map(str, sorted(numbers)))
    return {"key": ordered, "list": ", ".join(map(str, numbers)), "answer": ordered}


FAMILIES = (
    Commutative(
        "add",
        draw_add,
        phrases=("the sum of {a} and {b}", "{a} plus {b}", "{a} + {b}"),
        statements=(
            "{a} + {b} = {answer}.",
            "{a} + {b} = {answer}",
            "{a} apples and {b} more apples make {answer} apples.",
        ),
        seen=("Add {a} and {b}.", "How much is {a} plus {b}?", "Work out {a} + {b}."),
        unseen=("Add {b} to {a}.", "How much is {a} + {b}?", "Please add {a} and {b}."),
        weight=2.2,
    ),
    Family(
        "subtract",
        draw_subtract,
        phrases=("{a} minus {b}", "{a} - {b}"),
        statements=(
            "{a} - {b} = {answer}.",
            "{a} - {b} = {answer}",
            "{a} apples less {b} apples leave {answer} apples.",
        ),
        seen=("Take {b} from {a}.", "How much is {a} minus {b}?", "Work out {a} - {b}."),
        unseen=("Work out {a} minus {b}.", "How much is {a} - {b}?", "Please take {b} from {a}."),
        memorised=True,
        weight=2.0,
    ),
    Family(
        "compare",
        draw_compare,
        phrases=("the {rel} of {a} and {b}", "the {rel} number of {a} and {b}"),
        statements=("Of {a} and {b} the {rel} is {answer}.",),
        seen=(
            "Which is {rel}, {a} or {b}?",
            "Which number is {rel}, {a} or {b}?",
            "{a} or {b}: which is {rel}?",
        ),
        unseen=(
            "Which of {a} and {b} is {rel}?",
            "Of {a} and {b}, which number is {rel}?",
            "{a} and {b}: which number is {rel}?",
        ),
        weight=1.6,
    ),
    Family(
        "sort",
        draw_sort,
        phrases=("the order of {list} from small to large",),
        statements=(
            "{list} in order is {answer}.",
            "{list} sorted is {answer}.",
            "From small to large, {list} is {answer}.",
        ),
        seen=(
            "Sort {list}.",
            "Put {list} in order.",
            "Sort these numbers: {list}",
            "Put the numbers {list} in order from small to large.",
        ),
        unseen=(
            "Order these numbers from small to large: {list}",
            "Sort the numbers {list} from small to large.",
            "Please put {list} in order.",
        ),
        weight=2.4,
    ),
)
