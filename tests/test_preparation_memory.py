"""Memory holds a block of rows, whatever the files hold."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import preparation
from finetune.errors import InputError
from finetune.files import Findings
from finetune.shapes import Example

NANO = Path(__file__).resolve().parents[1] / "assets" / "llama-nano" / "tokenizer.model"

PEAKS = """
import json, sys
from pathlib import Path
from finetune.config.loader import load
from finetune.data import load_data
from finetune.llama.chat import FORMATS
from finetune.llama.tokenizer import load_tokenizer

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

tokenizer, peaks = load_tokenizer(sys.argv[2]), []
for train in sys.argv[3:]:
    config = load(sys.argv[1], [f"data.train={train}"]).config
    load_data(config, tokenizer, None if config.recipe == "pretrain" else FORMATS["nano"])
    peaks.append(peak())
print(json.dumps(peaks))
"""


def corpus(path: Path, megabytes: float, recipe: str, num_characters: int) -> Path:
    chance = random.Random(path.name)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 9))) for _ in range(3000)]
    third = num_characters // 3
    with path.open("w") as file:
        while file.tell() < megabytes * 1e6:
            text = " ".join(chance.choices(words, k=num_characters // 6))
            turns = [("user", text[:third]), ("assistant", text[third:])]
            row = {"messages": [{"role": r, "content": c} for r, c in turns]}
            file.write(json.dumps({"text": text} if recipe == "pretrain" else row) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak in /proc")
@pytest.mark.parametrize(
    ("recipe", "num_characters"), [("pretrain", 2000), ("sft", 1500), ("pretrain", 30_000)]
)
def test_sixty_megabytes_need_hardly_more_memory_than_six(
    tmp_path, config_of, recipe, num_characters
):
    """60 MB after 6 MB. On two busy cores 60 MB take 35 to 60 seconds and the peak is some 230 MB
    over the imports, of which six megabytes need all but 10; blocks counted by rows alone took
    2.7 GB for 40 MB of texts of 30,000 characters.
    """
    files = [corpus(tmp_path / f"{size}.jsonl", size, recipe, num_characters) for size in (6, 60)]
    config_of(files[0], "data.max_length=8000", recipe=recipe)
    config = tmp_path / "config.yaml"
    policy = ", on_overflow: split" if recipe == "pretrain" else ""
    config.write_text(
        config.read_text().replace(
            f"data:\n  train: {files[0]}",
            f"data: {{train: {files[0]}, max_length: 8000{policy}}}",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(config), str(NANO), *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
        env={"FINETUNE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)},
    )
    small, large = json.loads(done.stdout.splitlines()[-1])
    assert large - small < 40e6, f"{small / 1e6:.0f} MB, then {large / 1e6:.0f} MB"


def examples_of(*sizes: int):
    return [
        Example(f"a:{n}", ({"role": "user", "content": "x" * size},)) if n % 2 else
        Example(f"a:{n}", text="x" * size)
        for n, size in enumerate(sizes)
    ]  # fmt: skip


def test_blocks_are_bounded_by_rows_and_by_characters(monkeypatch):
    monkeypatch.setattr(preparation, "BLOCK", 5)
    monkeypatch.setattr(preparation, "BLOCK_CHARACTERS", 100)
    rows = examples_of(*[1] * 12, 60, 60, 60, 500, 1, 99, 1)
    blocks = list(preparation._blocks(iter(rows), Findings()))
    assert [row for block in blocks for row in block] == rows
    assert [len(block) for block in blocks] == [5, 5, 4, 2, 2, 1]
    assert list(preparation._blocks(iter(()), Findings())) == []


def test_the_rows_before_findings_are_handed_out_too():
    def read():
        yield from examples_of(1, 1, 1)
        raise InputError("found")

    findings = Findings()
    assert [len(block) for block in preparation._blocks(read(), findings)] == [3]
    assert (findings.named, findings.total) == (["found"], 1)
