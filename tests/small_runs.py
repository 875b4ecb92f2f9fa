"""Small real runs: a random Llama of two layers, a few embedded rows, one config, about a second.

A run goes through `finetune.train.train`, as the command line's does; `trainer_of` stops before
the first step, for tests that look inside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from finetune import artifact
from finetune.config.loader import Loaded, load
from finetune.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "assets" / "llama-nano"

DEFAULTS: dict[str, dict[str, Any]] = {
    "run": {"name": "small"},
    "base": {"dtype": "float32"},
    "adapter": {"r": 4, "lora_alpha": 8},
    "data": {"max_length": 128},
    "train": {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "max_steps": 4,
        "bf16": False,
    },
}


def write_base(
    folder: Path,
    preset: str = "llama3.2-1b",
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "5GB",
) -> Path:
    """A random base of a preset's shape in small, with the embedded tokenizer.

    Its matrices have the size that keeps activations at 1, so that attention is far from uniform
    and every weight matters to the logits.
    """
    from transformers import LlamaForCausalLM

    from finetune.llama.architecture import PRESETS, scaled_down, to_llama_config
    from finetune.llama.tokenizer import load_tokenizer

    config = to_llama_config(scaled_down(PRESETS[preset], 1024), dtype)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                std = 0.15 if "embed" in name else weight.shape[1] ** -0.5
                weight.normal_(0.0, std, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    load_tokenizer(NANO / "tokenizer.model").save_pretrained(folder)
    return folder


def embedded_rows(side: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of the embedded data: train or heldout."""
    lines = (NANO / "data" / f"{side}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[start : start + count]]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Bench:
    """A folder with rows and a config, from which runs are made.

    Args:
        folder: empty; runs go to its `runs/`.
        base: a base's folder.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.train_file = write_rows(folder / "train.jsonl", embedded_rows("train", 24))
        self.heldout_file = write_rows(folder / "heldout.jsonl", embedded_rows("heldout", 9))
        values = {key: dict(section) for key, section in DEFAULTS.items()}
        values["run"]["dir"] = str(folder / "runs")
        values["base"]["path"] = str(base)
        values["data"] |= {"train": str(self.train_file), "heldout": str(self.heldout_file)}
        self.config_file = folder / "small.yaml"
        self.config_file.write_text(yaml.safe_dump({"recipe": "sft", **values}), encoding="utf-8")

    def load(self, *overrides: str) -> Loaded:
        """The config with overrides."""
        return load(self.config_file, overrides)

    def run_folder(self, *overrides: str) -> RunFolder:
        """Where a run with these overrides is kept."""
        section = self.load(*overrides).config.run
        return RunFolder(Path(section.dir) / section.name)

    def train(self, *overrides: str) -> RunFolder:
        """A whole run."""
        from finetune.train import train

        assert train(self.load(*overrides)) == 0
        return self.run_folder(*overrides)


def trainer_of(loaded: Loaded) -> Any:
    """The trainer of a run, put together as `train` does, before its first step."""
    from finetune import stages
    from finetune.recipes import RECIPES
    from finetune.run_folder import open_run

    run = open_run(loaded)
    base = stages.prepare_base(loaded.config, run, first=True)
    data = stages.prepare_data(loaded.config, run, base, first=True)
    model = stages.prepare_model(loaded.config, run, base, data, first=True)
    return RECIPES[loaded.config.recipe](
        stages.gather_parts(loaded.config, run, base, data, model, 1)
    )


def step_lines(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are steps, in file order."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def heldout_lines(run: RunFolder) -> list[tuple[int, float]]:
    """(step, held-out loss) of the lines of metrics.jsonl that are evaluations, in file order."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(line["step"], line["heldout_loss"]) for line in lines if "heldout_loss" in line]


def losses(run: RunFolder) -> list[float]:
    """The loss of every step, in order; each step is there once."""
    lines = step_lines(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def adapter_tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    """The published adapter."""
    return load_file(str(run.adapter / "adapter_model.safetensors"))


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all tensors together, over the norm of the first."""
    assert set(one) == set(other)
    difference = torch.cat([(one[name] - other[name]).double().flatten() for name in one])
    return float(difference.norm() / torch.cat([t.double().flatten() for t in one.values()]).norm())


def worst_tensor(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The same for each tensor alone; the largest."""
    return max(relative_difference({n: one[n]}, {n: other[n]}) for n in one)


def flip_bit(path: Path, place: float = 0.9) -> None:
    """Flips one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    path.write_bytes(bytes(content))


def republish(folder: Path, **facts: Any) -> None:
    """Writes the manifest anew over what a test has changed, some facts with it."""
    manifest = folder / artifact.MANIFEST
    known = json.loads(manifest.read_text())["facts"]
    manifest.unlink()
    artifact._write_manifest(folder, known | facts)
