"""`train CONFIG --smoke`: a whole run of any config on a small random Llama, in under a minute.

What stays: every setting of adapter, data handling and optimisation, and the base's family (RoPE
and its scaling, GQA ratio, norm, tied or untied head, quantisation). What is replaced, aloud: the
weights and their size, the number of steps, all but the first rows, and rows or tokenizer where
the config's are absent.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.budget import architecture_of_base
from finetune.config import RunConfig
from finetune.config.data import Source
from finetune.config.loader import Loaded
from finetune.files import find_files, read_rows
from finetune.llama.architecture import HUB_IDS, Architecture, scaled_down
from finetune.methods import why_not_merged

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "llama-nano"
NUM_STEPS = 2
MAX_LENGTH = 256
NUM_ROWS = 64


def run_smoke(loaded: Loaded) -> int:
    """Trains two steps, evaluates and merges with proof, in a folder that is removed afterwards."""
    from finetune import merge
    from finetune.eval import main as evaluate
    from finetune.run_folder import RunFolder
    from finetune.train import train

    with tempfile.TemporaryDirectory(prefix="smoke-") as scratch:
        small = smoke_config(loaded, Path(scratch))
        train(small)
        run = RunFolder(Path(small.config.run.dir) / small.config.run.name)
        if proof_made(small.config):
            proof = merge.merge(run)["proof"]
            _say(f"merged   logits differ by {proof['max_logit_difference']:.1e} at most")
            evaluate([str(run.path), "--against", "base,merged"])
        elif run.adapter.is_dir():
            evaluate([str(run.path), "--against", "base"])
        elif small.config.data.heldout:
            evaluate([str(run.path)])
    _say(f"smoke    {loaded.path} runs: train, eval{', merge' if proof_made(small.config) else ''}")
    return 0


def proof_made(config: RunConfig) -> bool:
    """Whether the config trains an adapter that can be merged."""
    return config.adapter.method != "none" and why_not_merged(config.adapter) is None


def smoke_config(loaded: Loaded, scratch: Path) -> Loaded:
    """The config with the smallest changes that let it run anywhere."""
    config = loaded.config
    tokenizer = _tokenizer_of(config)
    architecture = scaled_down(_architecture_of(config), vocab_size=_vocabulary_size(tokenizer))
    values = config.model_dump(exclude_unset=True)
    values["run"] = {"name": "smoke", "dir": str(scratch), "seed": config.run.seed}
    values["base"] = {
        "architecture": _as_mapping(architecture),
        "tokenizer": str(tokenizer),
        "dtype": config.base.dtype,
        "quantization": config.base.quantization,
    }
    values["data"] = {**values.get("data", {}), **_data_values(config, scratch)}
    train = {k: v for k, v in values.get("train", {}).items() if k != "num_train_epochs"}
    values["train"] = {
        **train,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": min(config.train.gradient_accumulation_steps, 2),
        "warmup_steps": min(config.train.warmup_steps, 1),
        "save_steps": NUM_STEPS,
        "report_to": "none",
    }
    small = RunConfig.model_validate(values)
    origins = {**loaded.origins, "base": "smoke", "data": "smoke", "train.max_steps": "smoke"}
    return Loaded(config=small, origins=origins, path=loaded.path)


def _data_values(config: RunConfig, scratch: Path) -> dict[str, Any]:
    """The first rows of the config's files where they exist, else embedded ones."""
    values: dict[str, Any] = {"heldout_fraction": None}
    if config.recipe != "pretrain":
        values["chat_format"] = (
            "nano" if _tokenizer_of(config) == ASSETS else config.data.chat_format
        )
    for side in ("train", "heldout"):
        sources: tuple[Source, ...] = getattr(config.data, side)
        if sources and all(_exists(source.path) for source in sources):
            values[side] = [_first_rows(s, scratch / f"{side}-{i}") for i, s in enumerate(sources)]
            continue
        named = ", ".join(source.path for source in sources) or "none"
        _say(f"smoke    data.{side}: uses embedded rows instead of {named}")
        values[side] = [{"path": str(_embedded_rows(config.recipe, side, scratch))}]
        if side == "train":  # embedded rows are short; the user's own may need every token
            values["max_length"] = min(config.data.max_length, MAX_LENGTH)
    return values


def _first_rows(source: Source, target: Path) -> dict[str, Any]:
    """The source, cut to its first rows: the whole file is read, and refused if a line is bad."""
    lines, num_rows = [], 0
    for row in itertools.chain.from_iterable(map(read_rows, find_files(source.path))):
        num_rows += 1
        if num_rows <= NUM_ROWS:
            lines.append(_as_json_line(row.columns))
    _say(f"smoke    {source.path}: the first {min(NUM_ROWS, num_rows)} of {num_rows:,} rows")
    path = target.with_suffix(".jsonl")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {**source.model_dump(), "path": str(path)}


def _as_json_line(columns: Mapping[str, Any]) -> str:
    """A row as JSON; Parquet's dates and NaN, which only other columns have, as text and null."""
    plain = json.loads(json.dumps(columns, default=str), parse_constant=lambda name: None)
    return json.dumps(plain, ensure_ascii=False)


def _exists(path: str) -> bool:
    return Path(path).exists() or any(glob.iglob(path, recursive=True))


def _embedded_rows(recipe: str, side: str, scratch: Path) -> Path:
    source = ASSETS / "data" / f"{side}.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    if recipe == "pretrain":
        rows = [json.loads(line)["messages"] for line in lines]
        lines = [json.dumps({"text": " ".join(m["content"] for m in row)}) for row in rows]
    target = scratch / f"{side}.jsonl"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _architecture_of(config: RunConfig) -> Architecture:
    path = config.base.path
    if path is not None and path in HUB_IDS and not Path(path).exists():
        _say(f"smoke    {path} is {HUB_IDS[path]}: a small random Llama of that family")
    return architecture_of_base(config)


def _tokenizer_of(config: RunConfig) -> Path:
    """The config's own tokenizer where it is on disk, else the embedded one."""
    named = [config.base.tokenizer, config.base.path]
    for path in [Path(name) for name in named if name]:
        if path.is_file() or any(
            (path / f).is_file() for f in ("tokenizer.json", "tokenizer.model")
        ):
            return path
    return ASSETS


def _vocabulary_size(tokenizer: Path) -> int:
    from finetune.llama.tokenizer import load_tokenizer

    return len(load_tokenizer(tokenizer))


def _as_mapping(architecture: Architecture) -> dict[str, Any]:
    values = dataclasses.asdict(architecture)
    return {key: value for key, value in values.items() if value is not None}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


__all__ = ["run_smoke", "smoke_config"]
