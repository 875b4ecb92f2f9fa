"""Train the 1024-piece SentencePiece BPE tokenizer, with Llama 2's settings, on the corpus.

python train_tokenizer.py --corpus DIR/train.jsonl --out ../tokenizer.model
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 1024
# ids 4, 5, 6. Control symbols: text that types them is split into ordinary pieces.
ROLE_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>")


def lines(corpus: Path, num_documents: int) -> Iterator[str]:
    """Lines of the first documents; a line break is a byte piece, as in Llama 2."""
    with corpus.open() as rows:
        for _, row in zip(range(num_documents), rows, strict=False):
            yield from json.loads(row)["text"].split("\n")


def train(corpus: Path, out: Path, num_documents: int) -> None:
    """Train on the first documents of the corpus and write the model file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(corpus, num_documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        max_sentencepiece_length=16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece="<unk>",
        bos_piece="<s>",
        eos_piece="</s>",
        pad_piece="<pad>",
        control_symbols=list(ROLE_SYMBOLS),
        num_threads=1,
        minloglevel=1,
    )
    out.write_bytes(model.getvalue())


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=60_000)
    args = parser.parse_args()
    train(args.corpus, args.out, args.documents)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(args.out))
    texts = list(lines(args.corpus, 5_000))
    num_tokens = sum(map(len, processor.encode(texts)))
    print(f"{sum(map(len, texts)) / num_tokens:.3f} characters a token, {VOCAB_SIZE} pieces")


if __name__ == "__main__":
    main()
