"""The exception tree and the exit codes of every command.

| code | means | exception |
|---|---|---|
| 0 | done | |
| 2 | the input is wrong: config, data, paths, a refused change of settings | `InputError` |
| 3 | a check failed: merge proof, verification, leak, foreign base | `CheckFailed` |
| 4 | the run cannot go on: disk, memory, non-finite numbers | `CannotContinue` |
| 75 | stopped by a signal, resumable | `Interrupted` |
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence


class FinetuneError(Exception):
    """An error meant for the person at the terminal; its text is the whole message."""

    exit_code = 1


class InputError(FinetuneError):
    """The input is wrong. Carries every finding, so that one run shows all of them.

    Args:
        findings: one sentence, or several, each saying where, what was found, what is allowed.
    """

    exit_code = 2

    def __init__(self, findings: str | Sequence[str]) -> None:
        self.findings = [findings] if isinstance(findings, str) else list(findings)
        assert self.findings, "an InputError without a finding says nothing"
        super().__init__("\n".join(self.findings))


class CheckFailed(FinetuneError):
    """A check of the toolkit's own failed: what was about to be published is not right."""

    exit_code = 3


class CannotContinue(FinetuneError):
    """The input was right, but the run cannot go on: disk, memory, non-finite numbers."""

    exit_code = 4


class Interrupted(FinetuneError):
    """A signal stopped the run at a step boundary; the same command goes on from there."""

    exit_code = 75


def exit_code_of(error: BaseException) -> int:
    """The exit code of the contract for any exception that ends a command."""
    if isinstance(error, FinetuneError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    if is_of_the_system(error) or is_out_of_memory(error):
        return CannotContinue.exit_code
    return 1


def is_of_the_system(error: BaseException | None) -> bool:
    """safetensors and tokenizers are written in Rust: theirs is no OSError, but quotes one."""
    quotes = "(os error " in str(error) and not isinstance(error, FinetuneError)
    return isinstance(error, OSError) or quotes


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out.

    torch has a class of its own for a GPU's allocator, none for CPUs nor for what libraries ask of
    a GPU (cuBLAS, pinned memory); it is not imported for this."""
    if isinstance(error, RuntimeError):
        says_so = any(words in str(error) for words in _OUT_OF_MEMORY)
        return says_so or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError)


def describe(error: BaseException) -> str:
    """One message for the terminal, without a traceback."""
    if isinstance(error, InputError) and len(error.findings) > 1:
        lines = "\n".join(f"  - {finding}" for finding in error.findings)
        return f"error: {len(error.findings)} findings:\n{lines}"
    if isinstance(error, KeyboardInterrupt):
        return "error: interrupted"
    if isinstance(error, FinetuneError):
        return f"error: {error}"
    kind = type(error).__name__
    if is_out_of_memory(error):
        return (
            f"error: out of memory ({kind}: {error}). A smaller train.per_device_train_batch_size "
            "or data.max_length takes less, train.activation_checkpointing much less"
        )
    return f"error: {kind}: {error} (show where with --debug; please report it if it looks wrong)"


def run_command(command: Callable[[list[str]], int | None], argv: Sequence[str]) -> int:
    """Runs a verb and turns whatever it raises into a message on stderr and an exit code.

    Args:
        command: takes the arguments after the verb, returns an exit code or None for 0.
        argv: the arguments; `--debug` among them shows tracebacks.
    """
    args = [arg for arg in argv if arg != "--debug"]
    debug = len(args) != len(argv)
    try:
        code = command(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FinetuneError, KeyboardInterrupt, Exception) as error:
        if debug:
            traceback.print_exc()
        print(describe(error), file=sys.stderr)
        return exit_code_of(error)
