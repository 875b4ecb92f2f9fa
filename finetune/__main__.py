"""`python -m finetune VERB …`: thin; a verb's module is imported only when it is asked for."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType

from finetune.artifact import keep_to_oneself
from finetune.errors import InputError, run_command
from finetune.heap import loading_libraries

VERBS: dict[str, tuple[str, str, str]] = {
    "train": ("finetune.train", "main", "train what a config says: CONFIG [key=value …]"),
    "data": (
        "finetune.inspection",
        "main",
        "what became of every row, and what training makes of it",
    ),
    "preview": (
        "finetune.preview",
        "main",
        "examples as the model sees them, trained tokens marked",
    ),
    "eval": ("finetune.eval", "main", "held-out loss and exact match of a run's models"),
    "merge": ("finetune.merge", "main", "the adapter into full weights, with a proof"),
    "export": ("finetune.export", "main", "other layouts: Hugging Face, PEFT, GGUF, Ollama, Meta"),
    "report": ("finetune.report", "main", "a run as one HTML page, the verdict at the top"),
    "plan": ("finetune.plan", "main", "parameters and memory of a config, before anything loads"),
    "generate": ("finetune.generate", "main", "text from a run or a model folder"),
    "chat": ("finetune.generate", "main_chat", "the same, as a conversation"),
    "import": ("finetune.llama.meta_format", "main", "a Meta checkpoint to a Hugging Face folder"),
    "arch": ("finetune.llama.architecture", "main", "the documented architectures"),
    "tokenize": ("finetune.llama.tokenizer", "main", "ids and pieces of a text"),
    "train-tokenizer": ("finetune.train_tokenizer", "main", "a new SentencePiece tokenizer"),
    "verify": ("finetune.verify", "main", "compare a folder with its manifest"),
    "doctor": ("finetune.doctor", "main", "what this machine can run"),
}


def main(argv: Sequence[str]) -> int:
    """Runs one verb. Returns the exit code of the contract."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    keep_to_oneself()
    signal.signal(signal.SIGTERM, _end)  # `train` sets handlers of its own
    return run_command(lambda args: _run_verb(argv[0], args), argv[1:])


def _end(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C: what was staged is removed on the way out, which a second signal does not stop."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run_verb(verb: str, args: list[str]) -> int:
    if verb not in VERBS:
        raise InputError(f"no verb {verb!r}; allowed: {', '.join(VERBS)}")
    module, function, _ = VERBS[verb]
    with loading_libraries():
        main_of_verb = getattr(import_module(module), function)
    result: int = main_of_verb(args)
    return result


def _help() -> str:
    lines = [f"  {verb:<15} {what}" for verb, (_, _, what) in VERBS.items()]
    head = "usage: python -m finetune VERB … [--debug]     (each verb has --help)"
    return "\n".join([head, "", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
