"""The model card (README.md) of every export: where it comes from, how it was made, its numbers.

Only names, never places: a local path is shown by its last part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import artifact
from finetune.config import RunConfig
from finetune.llama.architecture import HUB_IDS, PRESETS, Architecture
from finetune.run_folder import RunFolder, environment
from finetune.sharing import shared_name

# Source: the licence and the "Additional" clauses of each release, https://www.llama.com/license/
# and LICENSE files of meta-llama/llama and meta-llama/llama-models; identifiers are the hub's.
LICENCES = {
    "llama1": ("other", "Meta's LLaMA licence of 2023: for non-commercial research, by request"),
    "llama2": (
        "llama2",
        'the Llama 2 Community License; copies carry its text and the notice "Llama 2 is licensed '
        "under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
        'Reserved."',
    ),
    "llama3": (
        "llama3",
        'the Meta Llama 3 Community License; show "Built with Meta Llama 3", and begin the name '
        'of a model that you publish with "Llama 3"',
    ),
    **{
        name: (
            name,
            f'the Llama {name.removeprefix("llama")} Community License; show "Built with Llama", '
            'and begin the name of a model that you publish with "Llama"',
        )
        for name in ("llama3.1", "llama3.2", "llama3.3")
    },
}
Loading = Sequence[tuple[str, str]]
LOADING: dict[str, Loading] = {
    "hf": [
        (
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        )
    ],
    "meta": [("sh", "python -m finetune import THIS_FOLDER --out HF_FOLDER")],
    "gguf": [("sh", "llama-cli -m THIS_FOLDER/*.gguf --temp 0")],
    "ollama": [("sh", "cd THIS_FOLDER && ollama create NAME -f Modelfile && ollama run NAME")],
    "peft": [
        (
            "python",
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            'base = AutoModelForCausalLM.from_pretrained("BASE", dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ),
        ("sh", "vllm serve BASE --enable-lora --lora-modules NAME=THIS_FOLDER"),
    ],
    "gguf-lora": [("sh", "llama-cli -m BASE.gguf --lora THIS_FOLDER/*-lora.gguf --temp 0")],
}
_RECIPE_KEYS = {
    "adapter": ("method", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
    "base": ("dtype", "quantization"),
    "data": ("chat_format", "date_string", "max_length", "packing", "train_on"),
    "train": ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "optim"),
}


@dataclass(frozen=True)
class Exported:
    """What a card is about.

    Attributes:
        name: title; the run's name or the folder's.
        what: one sentence on what the folder holds.
        library: the hub's `library_name`: transformers, peft or gguf.
        loading: how to load it, as (language, text) blocks.
        architecture: the model's shape, None where only an adapter is known.
        run: the run it comes from, if any.
        combination: of a merge of several adapters, what its manifest says of them.
    """

    name: str
    what: str
    library: str
    loading: Loading
    architecture: Architecture | None
    run: RunFolder | None
    combination: Mapping[str, Any] | None = None


def card(exported: Exported) -> str:
    """The card's text, ending in a newline."""
    config = exported.run.config() if exported.run else None
    base = _base_name(config)
    generation = generation_of(base, exported.architecture)
    sections = [
        _front_matter(exported, base, generation),
        f"# {exported.name}\n\n{exported.what}",
        *([_adapters(exported.combination, exported.run)] if exported.combination else []),
        *(_of_run(exported.run, config) if exported.run and config else []),
        "## Loading\n\n"
        + "\n\n".join(f"```{kind}\n{text}\n```" for kind, text in exported.loading),
        _licence(generation),
        "## Versions\n\n" + _versions(exported.run),
    ]
    return "\n\n".join(sections) + "\n"


def generation_of(base: str | None, architecture: Architecture | None) -> str | None:
    """`llama3.1` and the like: by the documented hub id, else by a shape that only one has."""
    preset = HUB_IDS.get(base or "", base if base in PRESETS else None)
    if preset is None and architecture is not None:
        found = {n.split("-")[0] for n, p in PRESETS.items() if _same_shape(p, architecture)}
        return found.pop() if len(found) == 1 else None
    return preset.split("-")[0] if preset else None


def _same_shape(one: Architecture, other: Architecture) -> bool:
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "rope_theta"]
    names += ["rope_scaling", "intermediate_size", "norm_eps", "context"]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _base_name(config: RunConfig | None) -> str | None:
    if config is None:
        return None
    if config.base.path is not None:
        return shared_name(config.base.path)
    given = config.base.architecture
    return given if isinstance(given, str) else "random weights of a given shape"


def _front_matter(exported: Exported, base: str | None, generation: str | None) -> str:
    lines = ["---", f"library_name: {exported.library}"]
    if base in HUB_IDS:
        lines.append(f"base_model: {base}")
    if generation:
        lines.append(f"license: {LICENCES[generation][0]}")
    return "\n".join([*lines, "tags:", "- llama", "- plumbtune", "---"])


def _adapters(facts: Mapping[str, Any], run: RunFolder | None) -> str:
    """Which adapters are in the weights, and how they became one."""
    settings = [f"{key} {facts[key]}" for key in ("density", "seed") if facts[key] is not None]
    how = ", ".join([f"Several in one, combined by {facts['combination']}", *settings])
    first = facts["adapters"][0]["name"]
    follows = f" Data, settings and numbers below are those of {first} alone." if run else ""
    rows = [[one["name"], f"{one['weight']:g}", one["sha256"]] for one in facts["adapters"]]
    return f"## Adapters\n\n{how}.{follows}\n\n{_table(['adapter', 'weight', 'sha256'], rows)}"


def _of_run(run: RunFolder, config: RunConfig) -> list[str]:
    sections = [f"Base: {_base_name(config)}. Recipe: {config.recipe}."]
    sections.append("## Data\n\n" + _data(run))
    sections.append("## Settings\n\n" + _settings(config))
    if numbers := _numbers(run):
        sections.append("## Held-out numbers\n\n" + numbers)
    return sections


def _data(run: RunFolder) -> str:
    file = run.path / "data.json"
    if not file.is_file():
        return "Not recorded."
    facts = artifact.read_json(file)
    rows = []
    for side in ("train", "heldout"):
        ledger = facts.get(side)
        if isinstance(ledger, Mapping) and "rows_kept" in ledger:
            counts = (ledger[key] for key in ("rows_read", "rows_kept", "tokens_trained", "tokens"))
            rows.append([side, *(f"{count:,}" for count in counts)])
    return _table(["side", "rows read", "rows kept", "tokens trained", "tokens"], rows)


def _settings(config: RunConfig) -> str:
    values = config.model_dump()
    rows = [["seed", str(config.run.seed)]]
    for section, keys in _RECIPE_KEYS.items():
        if section == "adapter" and config.adapter.method == "none":
            keys = ("method",)
        for key in keys:
            value = values[section].get(key)
            if value is not None:
                rows.append([f"{section}.{key}", _shown(value)])
    return _table(["setting", "value"], rows)


def _shown(value: Any) -> str:
    """A value; of a file only its name."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _numbers(run: RunFolder) -> str:
    """Loss, perplexity and exact match of every model of every result in eval/."""
    rows = []
    for file in sorted(run.eval.glob("*.json")) if run.eval.is_dir() else []:
        result = artifact.read_json(file)
        for scores in (result, *result.get("against", [])):
            match = scores.get("exact_match")
            rows.append(
                [
                    file.stem,
                    shared_name(str(scores.get("model", "model"))),
                    f"{scores['loss']:.4f}",
                    f"{scores['perplexity']:.2f}",
                    "–" if match is None else f"{100 * match:.1f} %",
                    f"{scores['rows']:,}",
                ]
            )
    heads = ["rows of", "model", "loss (nats a token)", "perplexity", "exact match", "rows"]
    return _table(heads, rows) if rows else ""


def _licence(generation: str | None) -> str:
    if generation is None:
        text = (
            "The base's own licence goes on for these weights; this card does not know which it is."
        )
    else:
        text = f"The base's licence goes on for these weights: {LICENCES[generation][1]}."
    return "## Licence\n\n" + text


def _versions(run: RunFolder | None) -> str:
    file = run.path / "environment.json" if run else None
    facts = artifact.read_json(file) if file and file.is_file() else environment()
    made = "Trained" if file and file.is_file() else "Exported"
    packages = {name: v for name, v in facts.get("packages", {}).items() if v}
    listed = ", ".join(f"{name} {found}" for name, found in packages.items())
    return f"{made} with Plumbtune on Python {facts.get('python')}: {listed}."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot break a table; what looks like an escape is JSON's."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|")
