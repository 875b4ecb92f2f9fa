"""Write the pretraining corpus: one JSON document a row, deterministic from the seed.

python corpus.py --out DIR --seed 0 --tokens 10000000 --tokenizer ../tokenizer.model
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from families import FAMILIES
from variety import SOURCES

# Used to size the corpus when there is no tokenizer yet.
CHARS_PER_TOKEN = 2.8
# The document's <s> and </s>.
MARKS_PER_DOCUMENT = 2
# One document in HELDOUT_ONE_IN goes to the held-out file.
HELDOUT_ONE_IN = 100


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (text, source) pairs; the same for the same seed."""
    rng = Random(f"corpus-{seed}")
    makers: dict[str, tuple[Callable[[Random], str], float]] = {
        name: (family.document, family.weight) for name, family in FAMILIES.items()
    }
    assert makers.keys().isdisjoint(SOURCES)
    makers |= SOURCES
    names = list(makers)
    weights = [weight for _, weight in makers.values()]
    while True:
        for name in rng.choices(names, weights, k=1000):
            yield makers[name][0](rng), name


def token_counter(tokenizer: Path | None) -> Callable[[str], int]:
    """Text -> tokens of its document: exact with a tokenizer, else an estimate."""
    if tokenizer is None:
        return lambda text: round(len(text) / CHARS_PER_TOKEN) + MARKS_PER_DOCUMENT
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return lambda text: len(processor.encode(text)) + MARKS_PER_DOCUMENT


def write_corpus(out: Path, seed: int, num_tokens: int, tokenizer: Path | None) -> dict[str, int]:
    """Write `train.jsonl` and `heldout.jsonl` until the training file has `num_tokens`.

    A held-out text is never a training text; short documents do repeat among the training ones,
    as facts do in any corpus.
    """
    count = token_counter(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    trained: set[str] = set()
    held: set[str] = set()
    totals = {"train": 0, "heldout": 0, "train_documents": 0, "heldout_documents": 0}
    with (out / "train.jsonl").open("w") as train, (out / "heldout.jsonl").open("w") as heldout:
        for index, (text, source) in enumerate(documents(seed)):
            if totals["train"] >= num_tokens:
                break
            row = json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"
            if index % HELDOUT_ONE_IN == 0 and text not in trained and text not in held:
                held.add(text)
                heldout.write(row)
                split = "heldout"
            elif text not in held:
                trained.add(text)
                train.write(row)
                split = "train"
            else:
                continue
            totals[split] += count(text)
            totals[f"{split}_documents"] += 1
    return totals


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, required=True, help="tokens in the training file")
    parser.add_argument("--tokenizer", type=Path, help="counts tokens; else an estimate")
    args = parser.parse_args()
    totals = write_corpus(args.out, args.seed, args.tokens, args.tokenizer)
    print("  ".join(f"{name} {number:,}" for name, number in totals.items()))


if __name__ == "__main__":
    main()
