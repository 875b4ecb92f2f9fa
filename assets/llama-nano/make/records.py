"""Families on small records: a field of a record, a record as JSON, a value of JSON, a price."""

import json
from random import Random

from family import Family, Item
from lexicon import FIELDS, THINGS

Record = dict[str, str]


def draw_record(rng: Random, num_fields: int) -> Record:
    """Random fields with random values."""
    fields = rng.sample(list(FIELDS), num_fields)
    return {field: rng.choice(FIELDS[field]) for field in fields}


def record_line(record: Record) -> str:
    """The record in plain notation: "name: Ana; age: 7"."""
    return "; ".join(f"{field}: {value}" for field, value in record.items())


def record_json(record: Record) -> str:
    """The record as JSON; an age is a number, everything else a string."""
    return json.dumps({k: int(v) if k == "age" else v for k, v in record.items()})


def draw_extract(rng: Random) -> Item:
    """A record in plain notation and the value of one field."""
    record = draw_record(rng, rng.randint(2, 4))
    field = rng.choice(list(record))
    line = record_line(record)
    return {"key": line, "record": line, "field": field, "answer": record[field]}


def draw_value(rng: Random) -> Item:
    """A record as JSON and the value of one field."""
    record = draw_record(rng, rng.randint(2, 3))
    field = rng.choice(list(record))
    line = record_json(record)
    return {"key": line, "json": line, "field": field, "answer": record[field]}


def draw_json(rng: Random) -> Item:
    """A record in plain notation and as JSON."""
    record = draw_record(rng, rng.randint(1, 3))
    line = record_line(record)
    return {"key": line, "record": line, "answer": record_json(record)}


def draw_price(rng: Random) -> Item:
    """A list of things with prices and the price of one."""
    things = rng.sample(THINGS, rng.randint(3, 4))
    prices = rng.sample(range(1, 100), len(things))
    index = rng.randrange(len(things))
    line = ", ".join(f"{thing} {price}" for thing, price in zip(things, prices, strict=True))
    return {"key": line, "list": line, "x": things[index], "answer": str(prices[index])}


FAMILIES = (
    Family(
        "extract",
        draw_extract,
        phrases=("the {field}", "the {field} in the record"),
        context="{record}. ",
        statements=(
            "{record}. So the {field} is {answer}.",
            "The {field} in the record {record} is {answer}.",
        ),
        seen=(
            "What is the {field} in this record: {record}?",
            "{record}. Which {field} is it?",
            "Read the record: {record}. What is the {field}?",
        ),
        unseen=(
            "Which {field} is in this record: {record}?",
            "Read this record: {record}. Tell me the {field}.",
            "The record is {record}. What {field} is it?",
        ),
        weight=1.8,
    ),
    Family(
        "json",
        draw_json,
        phrases=("the JSON of {record}", "the JSON for the record {record}"),
        statements=(
            "{record}\n{answer}",
            "{record} as JSON is {answer}.",
            "{answer} is the JSON of {record}.",
        ),
        seen=(
            "Turn {record} into JSON.",
            "Put this record in JSON: {record}",
            "{record}. Make it JSON.",
        ),
        unseen=(
            "Make JSON of this record: {record}",
            "Turn this record into JSON: {record}",
            "{record}. Put it in JSON.",
        ),
        weight=2.2,
    ),
    Family(
        "value",
        draw_value,
        phrases=("the value of {field} in {json}", "the {field} in {json}"),
        statements=("In {json} the {field} is {answer}.", "{json}\nThe {field} is {answer}."),
        seen=(
            "{json} What is the {field}?",
            "Look at {json}. Which {field} is it?",
            "In the JSON {json}, what is the {field}?",
        ),
        unseen=(
            "{json} Which {field} is it?",
            "Look at {json}. What is the {field}?",
            "What is the value of {field}? {json}",
        ),
        weight=1.6,
    ),
    Family(
        "price",
        draw_price,
        phrases=("the price of the {x}",),
        context="{list}. ",
        statements=(
            "{list}. The {x} costs {answer}.",
            "In the list {list} the price of the {x} is {answer}.",
        ),
        seen=(
            "{list}. How much is the {x}?",
            "How much is the {x} in this list: {list}?",
            "{list}. Which price does the {x} have?",
        ),
        unseen=(
            "In this list, how much is the {x}? {list}",
            "These are the prices: {list}. How much is the {x}?",
            "{list}. The {x} has which price?",
        ),
        weight=2.4,
    ),
)
