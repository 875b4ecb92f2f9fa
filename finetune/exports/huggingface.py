"""Full weights as a Hugging Face folder in files of a chosen size, and adapters as PEFT folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import artifact
from finetune.errors import CheckFailed, InputError
from finetune.exports.source import Source
from finetune.llama.config_json import passed_on
from finetune.llama.meta_layout import weights_of
from finetune.llama.safetensors_stream import Planned, write_model
from finetune.llama.stored_weights import HEAD, StoredWeight, stored_weights
from finetune.llama.tokenizer import save_tokenizer
from finetune.model import find_base
from finetune.run_folder import RunFolder
from finetune.sharing import shared_name

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What another machine has no use for: a place on this one, and code that would be run.
_NOT_SHARED = ("_name_or_path", "auto_map", "torch_dtype")


def plan_weights(source: Source) -> list[StoredWeight]:
    """Every weight of the model, found and checked; a tied head is not among them."""
    arch = source.architecture
    weights = [w for w in weights_of(arch) if not (arch.tie_word_embeddings and w.hf == HEAD)]
    return stored_weights(source.folder, arch, weights)


def num_bytes_of(stored: Sequence[StoredWeight]) -> int:
    """What the weights take on disk."""
    return sum(planned.num_bytes for planned in _planned(stored))


def write_hf(
    folder: Path, source: Source, stored: Sequence[StoredWeight], max_file_gib: float
) -> None:
    """Writes weights, config, generation config, tokenizer and chat template.

    Weights keep their type, bit for bit; memory holds one of them.
    """
    by_name = {one.weight.hf: one for one in stored}

    def begin_file() -> Callable[[str], Tensor]:
        return lambda name: by_name[name].read()

    write_model(folder, _planned(stored), begin_file, int(max_file_gib * 2**30))
    config = artifact.read_json(source.folder / "config.json")
    dtype = config.get("dtype", config.get("torch_dtype"))
    config = {key: v for key, v in passed_on(config).items() if key not in _NOT_SHARED}
    _write_json(folder / "config.json", config | ({"dtype": dtype} if dtype else {}))
    _write_json(folder / "generation_config.json", generation_config(source))
    save_tokenizer(source.tokenizer, folder)


def _planned(stored: Sequence[StoredWeight]) -> list[Planned]:
    return [Planned(one.weight.hf, one.dtype, one.weight.shape) for one in stored]


def generation_config(source: Source) -> dict[str, Any]:
    """The folder's own generation_config.json, or greedy with every stop id of the format."""
    own = source.folder / "generation_config.json"
    if own.is_file():
        settings: dict[str, Any] = artifact.read_json(own)
        return {key: value for key, value in settings.items() if key not in _NOT_SHARED}
    ids = source.stop_ids
    return {
        "bos_token_id": source.tokenizer.bos_token_id,
        "eos_token_id": ids[0] if len(ids) == 1 else ids,
        "pad_token_id": source.tokenizer.pad_token_id,
        "do_sample": False,
    }


def adapter_folder(target: Path) -> Path:
    """The adapter of a run, or the folder that is one, verified.

    Raises:
        InputError: there is none.
        CheckFailed: it differs from its manifest.
    """
    folder = target / "adapter" if (target / "config.yaml").is_file() else target
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{target}: is neither a run with an adapter nor an adapter folder")
    if (folder / artifact.MANIFEST).exists():
        artifact.verify(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckFailed(f"{folder}: has no {ADAPTER_WEIGHTS}")
    return folder


def write_peft(folder: Path, adapter: Path, run: RunFolder | None) -> None:
    """Copies an adapter as PEFT and vLLM load it, with the tokenizer it was trained with.

    The weights are the same bytes. A base that was a folder of this machine is named by its last
    part: where the base lies is the loader's to say.
    """
    shutil.copyfile(adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    settings = artifact.read_json(adapter / ADAPTER_CONFIG)
    _write_json(folder / ADAPTER_CONFIG, shared_settings(settings))
    if run is not None:
        save_tokenizer(find_base(run.config(), run.path).tokenizer, folder)


def is_served_by_vllm(adapter: Path) -> bool:
    """Whether vLLM loads it: LoRA with one scale and one rank; it knows no other method.

    Source: vLLM's documentation of LoRA adapters; `use_dora` is refused there, patterns are not
    read.
    """
    settings = artifact.read_json(adapter / ADAPTER_CONFIG)
    apart = ("use_dora", "rank_pattern", "alpha_pattern")
    return settings.get("peft_type") == "LORA" and not any(settings.get(key) for key in apart)


def shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json without the places of this machine."""
    name = settings.get("base_model_name_or_path")
    return settings | {"base_model_name_or_path": shared_name(name) if name else None}


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
