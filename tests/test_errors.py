"""Exit codes and messages: one clear message, a traceback only when it is asked for."""

from __future__ import annotations

import pytest
import torch

from finetune import errors
from finetune.errors import (
    CannotContinue,
    CheckFailed,
    FinetuneError,
    InputError,
    Interrupted,
    run_command,
)


def too_large_for_torch() -> RuntimeError:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError("there is memory for 2**60 numbers")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x"), 2),
        (CheckFailed("x"), 3),
        (CannotContinue("x"), 4),
        (Interrupted("x"), 75),
        (KeyboardInterrupt(), 75),
        (MemoryError(), 4),
        (torch.OutOfMemoryError("CUDA out of memory."), 4),
        (too_large_for_torch(), 4),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), 4),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"), 4),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 1),
        (OSError(28, "No space left on device"), 4),
        (PermissionError("x"), 4),
        (ValueError("x"), 1),
        (AssertionError(), 1),
    ],
)
def test_a_command_ends_with_the_code_of_its_error(error, code, capsys):
    def command(argv):
        raise error

    assert run_command(command, []) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.err.strip() != "error:"


def test_every_kind_has_a_code_of_its_own():
    kinds = FinetuneError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert sorted(codes) == [2, 3, 4, 75]
    assert all(str(code) in errors.__doc__ for code in codes)


def test_all_findings_are_shown(capsys):
    def command(argv):
        raise InputError(["a.yaml:1 one", "a.yaml:2 two"])

    assert run_command(command, []) == 2
    assert capsys.readouterr().err == "error: 2 findings:\n  - a.yaml:1 one\n  - a.yaml:2 two\n"


def test_a_single_finding_stands_alone(capsys):
    assert run_command(lambda argv: (_ for _ in ()).throw(InputError("here: wrong")), []) == 2
    assert capsys.readouterr().err == "error: here: wrong\n"


def test_an_input_error_says_something():
    with pytest.raises(AssertionError):
        InputError([])


def test_debug_shows_the_traceback_and_is_not_an_argument(capsys):
    seen = []

    def command(argv):
        seen.extend(argv)
        raise CheckFailed("the proof")

    assert run_command(command, ["one", "--debug", "two"]) == 3
    assert seen == ["one", "two"]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_what_a_command_returns_is_the_code(returned, code):
    assert run_command(lambda argv: returned, []) == code
