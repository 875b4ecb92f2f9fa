"""Llama tokenizer files -> one fast tokenizer that gives the original's ids, and its use.

`load_tokenizer` reads SentencePiece and tiktoken files, and folders that hold one or a
tokenizer.json. Content is encoded by `encode_text`, never by calling the tokenizer: a call
matches control tokens inside the text, and whoever writes `<|eot_id|>` in a message would end
the turn.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from finetune.errors import InputError
from finetune.llama.content_encoder import content_encoder
from finetune.llama.downloads import read_json_object, refuse_failed_download
from finetune.llama.sentencepiece_file import TokenizerParts, read_sentencepiece
from finetune.llama.tiktoken_file import (
    NUM_RANKS,
    NUM_SPECIAL,
    looks_like_tiktoken,
    read_tiktoken,
)
from finetune.llama.tokenizer_folder import read_folder
from finetune.llama.tokenizer_proof import prove_equal

# Tokens to pad with, best first; never the end of the text, or it would never be learnt.
_PADS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|reserved_special_token_0|>")


def load_tokenizer(
    path: str | Path, *, model_folder: Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer in a file or folder, proven equal to the original where one is rebuilt.

    `tokenizer(text)` puts BOS in front, as the originals do; `encode_text` never does. BOS, EOS
    and padding are set, and padding is never EOS.

    Args:
        path: a SentencePiece or tiktoken `tokenizer.model`, a `tokenizer.json`, or a folder (Meta's
            or Hugging Face's) with one of them. A folder with both kinds uses tokenizer.json,
            after comparing it with the other.
        model_folder: the model's own folder, where `path` is a file elsewhere: its params.json or
            config.json tells Llama 3.0 from 3.1 and how many tokens there must be.

    Raises:
        InputError: nothing to load, a damaged file, or one that cannot be rebuilt exactly.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".json":
        return _from_json(path.parent, path)
    return _from_original(path, model_folder or path.parent)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of the text alone: no BOS, and control tokens typed in it stay text.

    Thread-safe; the tokenizer is not changed.

    Raises:
        InputError: the text holds half of a surrogate pair, which no file in UTF-8 can hold.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` of many texts, in parallel.

    Raises:
        InputError: as `encode_text`, naming the text.
    """
    encode = content_encoder(tokenizer)
    try:
        return encode(texts)
    except (UnicodeEncodeError, TypeError, AttributeError):
        raise InputError(_unencodable(texts)) from None


def special_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a control token.

    Raises:
        InputError: the vocabulary has no such token; a close one is named.
    """
    token_id = tokenizer.backend_tokenizer.token_to_id(token)
    if token_id is None:
        names = [added.content for added in tokenizer.added_tokens_decoder.values()]
        close = difflib.get_close_matches(token, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"the tokenizer has no token {token!r}{hint}")
    return int(token_id)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A sha256 over all that decides ids: vocabulary, merges, special tokens, normaliser, splits.

    Truncation, padding and the template that adds BOS are left out: they are a caller's choice.
    """
    backend = tokenizer.backend_tokenizer
    added = {i: str(token) for i, token in backend.get_added_tokens_decoder().items()}
    parts = {"added": sorted(added.items())}
    for role in ("bos", "eos", "pad", "unk"):
        parts[role] = getattr(tokenizer, f"{role}_token")
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    # Each serialises itself; through to_str() and JSON, 128,000 pieces take over a second.
    for part in (backend.model, backend.normalizer, backend.pre_tokenizer):
        digest.update(part.__getstate__() if part is not None else b"none")
    return digest.hexdigest()


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, where: str) -> None:
    """Refuses a tokenizer with ids that the model's embedding has no row for.

    Args:
        tokenizer: the tokenizer.
        vocab_size: rows of the embedding.
        where: the model, for the message.

    Raises:
        InputError: the tokenizer is larger than the embedding.
    """
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the model's embedding only "
            f"{vocab_size} rows; they belong to different models"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json so that `AutoTokenizer` gives the same ids.

    The class is named `PreTrainedTokenizerFast`, which every release of transformers knows and
    none rebuilds; `LlamaTokenizer` would be rebuilt, with other ids.
    """
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    as_json, original = folder / "tokenizer.json", folder / "tokenizer.model"
    if as_json.exists():
        tokenizer = _from_json(folder, as_json)
        if original.exists():
            parts = _read_original(original, folder)
            prove_equal(as_json, lambda t: encode_texts(tokenizer, t), parts.encode_original)
        return tokenizer
    if original.exists():
        return _from_original(original, folder)
    raise InputError(
        f"{folder}: has neither tokenizer.json nor tokenizer.model; base.tokenizer names "
        "another folder or file"
    )


def _from_json(folder: Path, path: Path) -> PreTrainedTokenizerFast:
    read_json_object(path)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path}: is no tokenizer.json that can be read ({error})") from None
    backend.no_truncation()
    backend.no_padding()
    settings = read_folder(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    return _with_padding(tokenizer, path)


def _from_original(path: Path, folder: Path) -> PreTrainedTokenizerFast:
    parts = _read_original(path, folder)
    settings = read_folder(folder)
    roles = {"bos_token": parts.bos, "eos_token": parts.eos, "unk_token": parts.unk}
    roles["pad_token"] = parts.pad
    named = {role: token for role, token in roles.items() if token is not None}
    settings = {key: value for key, value in settings.items() if key not in named}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=parts.tokenizer,
        add_bos_token=parts.bos is not None,
        **named,
        **settings,
    )
    prove_equal(path, lambda t: encode_texts(tokenizer, t), parts.encode_original, parts.probe)
    return _with_padding(tokenizer, path)


def _read_original(path: Path, folder: Path) -> TokenizerParts:
    refuse_failed_download(path)
    with path.open("rb") as file:
        head = file.read(4096)
    if not looks_like_tiktoken(head):
        return read_sentencepiece(path)
    vocab_size, is_llama_30 = _facts_beside(folder)
    num_ranks = NUM_RANKS if vocab_size is None else vocab_size - NUM_SPECIAL
    return read_tiktoken(path, num_ranks=num_ranks, is_llama_30=is_llama_30)


def _facts_beside(folder: Path) -> tuple[int | None, bool]:
    """The vocabulary size and whether the model is a Llama 3.0, from the model's own file."""
    for name in ("params.json", "config.json"):
        if (folder / name).exists():
            facts = read_json_object(folder / name)
            scaled = facts.get("use_scaled_rope") or facts.get("rope_scaling")
            scaled = scaled or (facts.get("rope_parameters") or {}).get("rope_type") == "llama3"
            vocab_size = facts.get("vocab_size", -1)
            known = isinstance(vocab_size, int) and vocab_size > NUM_SPECIAL
            return vocab_size if known else None, not scaled
    return None, False


def _with_padding(tokenizer: PreTrainedTokenizerFast, path: Path) -> PreTrainedTokenizerFast:
    """Makes sure of a padding token that is not the end of the text."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    for token in (*_PADS, tokenizer.unk_token):
        if token in vocabulary and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return tokenizer
    raise InputError(
        f"{path}: has no token to pad with other than the end of the text; one of {_PADS} or an "
        "unknown token is needed"
    )


def _unencodable(texts: Sequence[Any]) -> list[str]:
    found = []
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            found.append(f"text {number}: is {type(text).__name__}, not a string")
        elif any("\ud800" <= letter <= "\udfff" for letter in text):
            found.append(f"text {number}: holds half of a surrogate pair: {text[:60]!r}")
    return found or ["a text could not be encoded"]


def main(argv: list[str]) -> int:
    """`python -m finetune tokenize FOLDER_OR_FILE [--text T | --file LINES.jsonl] [--json]`."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune tokenize",
        description="Ids of text, without BOS; control tokens typed in it stay text.",
    )
    parser.add_argument("path", help="a tokenizer.model or tokenizer.json, or a folder with one")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="one text; standard input if neither is given")
    source.add_argument("--file", help='a .jsonl file: each line a JSON string or {"text": …}')
    parser.add_argument("--json", action="store_true", help='{"ids": [[…], …]} on stdout')
    args = parser.parse_args(argv)
    if args.file is not None:
        texts = _read_lines(Path(args.file))
    else:
        texts = [sys.stdin.read() if args.text is None else args.text]
    tokenizer = load_tokenizer(args.path)
    rows = encode_texts(tokenizer, texts)
    if args.json:
        print(json.dumps({"ids": rows}))
        return 0
    for ids in rows:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        print(
            f"{len(ids)} tokens: " + " ".join(f"{p}({i})" for p, i in zip(pieces, ids, strict=True))
        )
    return 0


def _read_lines(path: Path) -> list[str]:
    """The texts of a .jsonl file; blank lines are skipped, every wrong line is reported."""
    refuse_failed_download(path)
    texts: list[str] = []
    found: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            found.append(f"{path}:{number}: is not JSON ({error})")
            continue
        text = row.get("text") if isinstance(row, dict) else row
        if isinstance(text, str):
            texts.append(text)
        else:
            found.append(f'{path}:{number}: is neither a JSON string nor {{"text": "…"}}')
    if found:
        raise InputError(found)
    return texts
