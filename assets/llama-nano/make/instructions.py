"""Write instruction rows: chat messages with one exact answer, from the task families.

    python instructions.py --split train   --seed 0 --out ../data/train.jsonl
    python instructions.py --split heldout --seed 0 --out ../data/heldout.jsonl --avoid TRAIN
    python instructions.py --split heldout --seed 7 --out FRESH --avoid TRAIN HELDOUT

Training rows hold only items that are not held out and only seen templates. Held-out rows hold
only held-out items; half of them use templates that no training row has.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

from families import FAMILIES
from family import Family, Item, Message

ROWS_PER_FAMILY = {"train": 130, "heldout": 24}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer with one word.",
    "Be brief.",
    "Give only the answer.",
    "You answer short questions.",
    "Answer in one line.",
)
SYSTEM_SHARE = 0.4
SECOND_QUESTION_SHARE = 0.2
# Characters of a whole conversation; keeps rows near 95 tokens at most.
MAX_CHARS = 190
# Draws before a family is said to have no fresh prompt left.
MAX_DRAWS = 20_000

Row = dict[str, object]


def request(rng: Random, family: Family, item: Item, seen: bool) -> str:
    """One user message: a random template of the item, filled."""
    return rng.choice(family.templates(item, seen)).format(**item)


def draw_turns(rng: Random, family: Family, item: Item, held: bool, seen: bool) -> list[Message]:
    """The conversation: perhaps a system prompt, perhaps an answered question, the request."""
    messages = family.history(rng, item)
    if not messages:
        if rng.random() < SYSTEM_SHARE:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        if rng.random() < SECOND_QUESTION_SHARE:
            other = rng.choice([one for one in FAMILIES.values() if one.phrases])
            earlier = other.sample(rng, held)
            question = request(rng, other, earlier, seen)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": earlier["answer"]})
    messages.append({"role": "user", "content": request(rng, family, item, seen)})
    messages.append({"role": "assistant", "content": item["answer"]})
    return messages


def prompts_of(row: Row) -> set[str]:
    """What no other split may hold: the whole conversation and each question in it.

    A question about facts stated earlier ("What is my name?") means nothing alone, so of a
    recall row only the conversation counts.
    """
    messages = row["messages"]
    assert isinstance(messages, list)
    turns = [message for message in messages if message["role"] != "system"]
    prompts = {"\n".join(message["content"] for message in turns[:-1])}
    if row["family"] != "recall":
        prompts |= {message["content"] for message in turns if message["role"] == "user"}
    return prompts


def draw_row(rng: Random, family: Family, held: bool, seen: bool) -> Row:
    """One row, drawn again until it is short enough."""
    while True:
        item = family.sample(rng, held)
        messages = draw_turns(rng, family, item, held, seen)
        if sum(len(message["content"]) for message in messages) <= MAX_CHARS:
            break
    template = "seen" if seen else "unseen"
    return {"messages": messages, "family": family.name, "template": template,
            "answer": item["answer"]}  # fmt: skip


def draw_rows(split: str, seed: int, rows_per_family: int, avoid: set[str]) -> list[Row]:
    """The rows of one split, shuffled; no prompt of `avoid` and no prompt twice in the file.

    Raises:
        SystemExit: a family has no prompt left that is not avoided.
    """
    rng = Random(f"instructions-{split}-{seed}")
    held = split == "heldout"
    rows, used = [], set(avoid)
    for family in FAMILIES.values():
        for index in range(rows_per_family):
            seen = not held or index % 2 == 0
            for _ in range(MAX_DRAWS):
                row = draw_row(rng, family, held, seen)
                prompts = prompts_of(row)
                if used.isdisjoint(prompts):
                    break
            else:
                sys.exit(f"{family.name}: no fresh prompt after {MAX_DRAWS} draws; ask for fewer "
                         f"rows than {rows_per_family} per family")  # fmt: skip
            used |= prompts
            rows.append(row)
    rng.shuffle(rows)
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=sorted(ROWS_PER_FAMILY), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-per-family", type=int)
    parser.add_argument("--avoid", type=Path, nargs="*", default=[], help="files of rows")
    args = parser.parse_args()
    avoid = {prompt for path in args.avoid for row in read_rows(path) for prompt in prompts_of(row)}
    rows_per_family = args.rows_per_family or ROWS_PER_FAMILY[args.split]
    rows = draw_rows(args.split, args.seed, rows_per_family, avoid)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    args.out.write_text(text)
    print(f"{len(rows)} rows, {len(FAMILIES)} families -> {args.out}")


if __name__ == "__main__":
    main()
