"""The suite must fail when the code is wrong: each mutation is made in a copy and tested there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("finetune", "tests", "assets", "configs", "pyproject.toml")

# What goes wrong: (file, the line as it is, the line as it would be, the tests that must notice)
MUTATIONS = {
    "mask shifted by one": (
        "finetune/llama/chat.py",
        "        return Rendered(ids, mask)",
        "        return Rendered(ids, [False, *mask[:-1]])",
        "tests/llama/test_chat.py",
    ),
    "end of turn not trained": (
        "finetune/llama/segments.py",
        '        yield Segment("</s>", True, index, is_answer)\n\n\ndef llama2',
        '        yield Segment("</s>", control=True)\n\n\ndef llama2',
        "tests/llama/test_chat.py",
    ),
    "a tool's result trained": (
        "finetune/llama/segments.py",
        '    is_answer = role == "assistant"\n    yield from header(',
        '    is_answer = role in ("assistant", "tool")\n    yield from header(',
        "tests/llama/test_chat_tools.py",
    ),
    "labels shifted twice": (
        "finetune/fast/loss.py",
        "    targets = labels[0, 1:]",
        "    targets = labels[0, 2:]",
        "tests/fast/test_loss.py",
    ),
    "packed documents see each other": (
        "finetune/fast/attention.py",
        "_whole_documents(query, key, value, lengths)",
        "_whole_documents(query, key, value, [sum(lengths)])",
        "tests/fast/test_attention.py",
    ),
    "merge scaled by another factor": (
        "finetune/merging/update.py",
        "addmm_(b[rows], a, alpha=self.scale)",
        "addmm_(b[rows], a, alpha=1.01 * self.scale)",
        "tests/test_merge.py",
    ),
    "loss divided by micro-batches": (
        "finetune/trainer.py",
        "        loss = loss_sum * (",
        "        loss = loss_sum / self.args.gradient_accumulation_steps * (",
        "tests/test_trainer.py",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_line_is_in_the_code(name: str) -> None:
    """Else the slow test would be the first to say that it tests nothing."""
    file, right, _, _ = MUTATIONS[name]
    _text_with(REPOSITORY / file, right)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_line_fails_the_suite(name: str, tmp_path: Path) -> None:
    file, right, wrong, tests = MUTATIONS[name]
    for part in COPIED:
        source, target = REPOSITORY / part, tmp_path / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    mutated = tmp_path / file
    text = _text_with(mutated, right)
    assert _failures(tmp_path, tests) == 0
    mutated.write_text(text.replace(right, wrong), encoding="utf-8")
    assert _failures(tmp_path, tests) == 1


def _text_with(path: Path, line: str) -> str:
    text = path.read_text(encoding="utf-8")
    assert text.count(line) == 1, f"{path} has changed: the mutation does not fit any more"
    return text


def _failures(folder: Path, tests: str) -> int:
    """pytest's exit code: 0 all passed, 1 some failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode
