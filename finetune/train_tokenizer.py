"""`train-tokenizer`: a new SentencePiece BPE tokenizer with Llama 2's settings.

For a base of one's own (`base.architecture` with random weights). The file is loaded once it is
written, and so proven equal to what SentencePiece itself says of it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from finetune.errors import CannotContinue, InputError
from finetune.llama.downloads import refuse_failed_download
from finetune.shapes import read_examples

SMALLEST = 256 + 4  # a piece for every byte, and <unk> <s> </s> <pad>


def train_sentencepiece(
    lines: Iterable[str],
    vocab_size: int,
    control_symbols: Sequence[str] = (),
    max_piece_length: int = 16,
) -> bytes:
    """A BPE model as Llama 1 and 2 have it: identity normalisation, bytes for what has no piece,
    digits one by one, a space in front; and a padding token, which theirs lack.

    Args:
        lines: texts without line breaks (a line break is a byte piece, as in Llama 2).
        vocab_size: pieces in all, the 256 bytes, 4 special tokens and control symbols included.
        control_symbols: tokens of a prompt format; typed in a text they stay text. From id 4 on.
        max_piece_length: characters of the longest piece.

    Returns:
        the content of tokenizer.model; `<unk>` 0, `<s>` 1, `</s>` 2, `<pad>` 3.

    Raises:
        InputError: the vocabulary is too small, or the texts are too few for it.

    Source: Kudo and Richardson 2018, arXiv:1808.06226; the settings are those in Llama 2's own
        tokenizer.model (`trainer_spec`, `normalizer_spec`).
    """
    import sentencepiece

    smallest = SMALLEST + len(control_symbols) + 1
    if vocab_size < smallest:
        raise InputError(f"--vocab-size {vocab_size}: too small; at least {smallest}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            max_sentencepiece_length=max_piece_length,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece="<unk>",
            bos_piece="<s>",
            eos_piece="</s>",
            pad_piece="<pad>",
            control_symbols=list(control_symbols),
            num_threads=1,  # the same file on every machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"SentencePiece could not make {vocab_size} pieces of these texts "
            f"({str(error).strip().splitlines()[-1]}); try another --vocab-size, or give more text"
        ) from None
    return model.getvalue()


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file, or of every text and message of a .json or .jsonl file.

    Raises:
        InputError: unreadable, or of another type.
    """
    if path.suffix in (".json", ".jsonl"):
        for example in read_examples(path)[1]:
            for text in (example.text, *(m["content"] for m in example.messages)):
                yield from text.split("\n")
        return
    refuse_failed_download(path)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def main(argv: Sequence[str]) -> int:
    """The verb `train-tokenizer`."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune train-tokenizer", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, help=".txt, .json or .jsonl")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces in all")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.model to write")
    parser.add_argument(
        "--control", action="append", default=[], metavar="TOKEN", help="a control token; repeat"
    )
    parser.add_argument("--json", action="store_true", help="what was made, as JSON on stdout")
    args = parser.parse_args(list(argv))
    if args.out.exists():
        raise InputError(f"{args.out}: exists already; choose another name or remove it first")
    lines = [line for path in args.files for line in read_lines(path)]
    content = train_sentencepiece(lines, args.vocab_size, args.control)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = _publish(args.out, content, lines)
    print(
        f"{args.out}: {facts['pieces']:,} pieces; {facts['characters_per_token']:.3f} characters "
        f"a token on {facts['lines']:,} lines",
        file=sys.stderr,
    )
    if args.json:
        print(json.dumps(facts))
    return 0


def _publish(out: Path, content: bytes, lines: Sequence[str]) -> dict[str, float]:
    """Writes the file under its name once it is whole, proven and measured."""
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        facts = _measured(temporary, lines)
        os.replace(temporary, out)
    except OSError as error:
        raise CannotContinue(f"{out}: could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return facts


def _measured(path: Path, lines: Sequence[str]) -> dict[str, float]:
    from finetune.llama.tokenizer import encode_texts, load_tokenizer

    tokenizer = load_tokenizer(path)
    shown = [line for line in lines if line][:5000]
    num_tokens = sum(map(len, encode_texts(tokenizer, shown)))
    return {
        "pieces": len(tokenizer),
        "lines": len(shown),
        "characters_per_token": sum(map(len, shown)) / max(1, num_tokens),
    }
