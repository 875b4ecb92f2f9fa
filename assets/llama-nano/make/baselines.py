"""Exact match of two baselines that learn nothing: the floor under every adapter.

    python baselines.py --train ../data/train.jsonl --heldout ../data/heldout.jsonl

`frequent` answers with the family's most frequent training answer. `nearest` answers as the
training row whose last user message shares the most words (Jaccard overlap) does.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from instructions import Row, read_rows

Baseline = Callable[[Row], str]


def words(row: Row) -> frozenset[str]:
    """Words, numbers and signs of the conversation up to the answer, without system prompts."""
    messages = row["messages"]
    assert isinstance(messages, list)
    text = " ".join(turn["content"] for turn in messages[:-1] if turn["role"] == "user")
    return frozenset(re.findall(r"\w+|[^\w\s]", text.lower()))


def frequent(train: list[Row]) -> Baseline:
    """The family's most frequent training answer."""
    answers: dict[object, Counter[str]] = defaultdict(Counter)
    for row in train:
        answers[row["family"]][str(row["answer"])] += 1
    return lambda row: answers[row["family"]].most_common(1)[0][0]


def nearest(train: list[Row]) -> Baseline:
    """The answer of the training row with the largest word overlap."""
    known = [(words(row), str(row["answer"])) for row in train]

    def answer(row: Row) -> str:
        own = words(row)
        return max(known, key=lambda pair: len(own & pair[0]) / len(own | pair[0]))[1]

    return answer


def score(rows: list[Row], baseline: Baseline) -> dict[str, Counter[str]]:
    """Rows right and rows asked, per family and template kind."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        right = baseline(row) == row["answer"]
        for group in ("all", str(row["template"]), str(row["family"])):
            counts[group].update(rows=1, right=int(right))
    return counts


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    args = parser.parse_args()
    train, heldout = read_rows(args.train), read_rows(args.heldout)
    scores = [score(heldout, make(train)) for make in (frequent, nearest)]
    print(f"{'':10} {'rows':>5} {'frequent':>9} {'nearest':>9}")
    families = sorted(set(scores[0]) - {"all", "seen", "unseen"})
    for group in ("all", "seen", "unseen", *families):
        shares = [100 * counts[group]["right"] / counts[group]["rows"] for counts in scores]
        rows = scores[0][group]["rows"]
        print(f"{group:10} {rows:5} {shares[0]:8.1f}% {shares[1]:8.1f}%")


if __name__ == "__main__":
    main()
