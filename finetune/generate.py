"""`generate` and `chat`: text from a run or a model folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import InputError
from finetune.inference import (
    Opened,
    Sampling,
    continue_prompts,
    folder_config,
    open_folder,
    open_variant,
    trained_variant,
)
from finetune.llama.chat import ChatFormat
from finetune.llama.tokenizer import encode_text
from finetune.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """The verb `generate`."""
    parser = _parser("generate")
    parser.add_argument(
        "--prompt", required=True, help="the user's message, or the text to go on from"
    )
    parser.add_argument("--raw", action="store_true", help="no prompt format: BOS and the text")
    parser.add_argument("--json", action="store_true", help='{"ids": […], "text": "…"} on stdout')
    args = parser.parse_args(list(argv))
    opened = open_any(Path(args.target), args.raw)
    ids = next(continue_prompts(opened, [_prompt_ids(opened, args)], _sampling(args)))
    text = opened.base.tokenizer.decode(ids, skip_special_tokens=True)
    print(json.dumps({"ids": ids, "text": text}, ensure_ascii=False) if args.json else text)
    return 0


def main_chat(argv: Sequence[str]) -> int:
    """The verb `chat`: a conversation until an empty line or the end of input."""
    args = _parser("chat").parse_args(list(argv))
    opened = open_any(Path(args.target), raw=False)
    chat_format = _chat_format(opened)
    messages: list[dict[str, str]] = []
    print("an empty line ends the conversation", file=sys.stderr)
    while text := _read_line():
        messages.append({"role": "user", "content": text})
        prompt = chat_format.prompt(opened.base.tokenizer, messages)
        ids = next(continue_prompts(opened, [prompt], _sampling(args)))
        answer = opened.base.tokenizer.decode(ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(answer)
    return 0


def open_any(target: Path, raw: bool) -> Opened:
    """What a run trained, or the model in a folder.

    Raises:
        InputError: neither.
    """
    if (target / "config.yaml").exists():
        run = RunFolder(target)
        return open_variant(run, trained_variant(run))
    if not any((target / name).exists() for name in ("config.json", "params.json")):
        raise InputError(
            f"{target}: is neither a run (config.yaml) nor a model (config.json or params.json)"
        )
    recipe = "pretrain" if raw else "sft"
    return open_folder(target, folder_config(target, recipe))


def _prompt_ids(opened: Opened, args: argparse.Namespace) -> list[int]:
    tokenizer = opened.base.tokenizer
    if args.raw:
        text_ids = encode_text(tokenizer, args.prompt) if args.prompt else []
        return [tokenizer.bos_token_id, *text_ids]
    messages = [{"role": "user", "content": args.prompt}]
    return _chat_format(opened).prompt(tokenizer, messages)


def _chat_format(opened: Opened) -> ChatFormat:
    if opened.base.chat_format is None:
        raise InputError(
            f"{opened.base.name}: trained on plain text, without a prompt format; "
            "`generate --raw` goes on from a text"
        )
    return opened.base.chat_format


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m finetune {verb}", description=__doc__)
    parser.add_argument("target", help="a run folder or a model folder")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    return parser


def _sampling(args: argparse.Namespace) -> Sampling:
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise InputError("temperature is at least 0, top-p in (0, 1], max-new-tokens at least 1")
    if args.temperature == 0 and args.top_p != 1.0:
        raise InputError("--top-p has no effect at temperature 0 (greedy); leave it out")
    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
