"""Train the 1024-piece SentencePiece BPE tokenizer, with Llama 2's settings, on the corpus.

python assets/llama-nano/make/train_tokenizer.py --corpus DIR/train.jsonl --out tokenizer.model
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # where `finetune` lies

from finetune.train_tokenizer import train_sentencepiece

VOCAB_SIZE = 1024
# ids 4, 5, 6. Control symbols: text that types them is split into ordinary pieces.
ROLE_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>")


def lines(corpus: Path, num_documents: int) -> Iterator[str]:
    """Lines of the first documents; a line break is a byte piece, as in Llama 2."""
    with corpus.open() as rows:
        for _, row in zip(range(num_documents), rows, strict=False):
            yield from json.loads(row)["text"].split("\n")


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=60_000)
    args = parser.parse_args()
    model = train_sentencepiece(lines(args.corpus, args.documents), VOCAB_SIZE, ROLE_SYMBOLS)
    args.out.write_bytes(model)


if __name__ == "__main__":
    main()
