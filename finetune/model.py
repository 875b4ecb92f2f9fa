"""The base of a run: found, checked and loaded.

Whatever `base:` names (hub id, Hugging Face folder, Meta folder, documented architecture)
becomes one `Base`: a local Hugging Face folder with safetensors, its architecture, its tokenizer
and its prompt format. Everything after this module sees only that.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from finetune import artifact
from finetune.adapters import fingerprint_of_files
from finetune.cache import cache_root
from finetune.config import RunConfig
from finetune.config.base import BaseSection
from finetune.errors import CannotContinue, InputError
from finetune.fast.attention import register
from finetune.hub import download
from finetune.identity import BaseIdentity, merged_adapters_of, tokenizer_hash
from finetune.llama import config_json
from finetune.llama.architecture import (
    HUB_IDS,
    Architecture,
    architecture_of,
    from_llama_config,
    from_params_json,
    to_llama_config,
)
from finetune.llama.chat import FORMATS, ChatFormat, detect_format
from finetune.llama.meta_format import cached_import
from finetune.llama.tokenizer import load_tokenizer, save_tokenizer
from finetune.llama.weight_files import files_by_weight, refuse_too_few_bytes
from finetune.revisions import base_revision
from finetune.run_folder import RunFolder

logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A base on disk.

    Attributes:
        name: what the user wrote, or the run's `base` folder for random weights.
        folder: a Hugging Face folder.
        architecture: its documented hyperparameters.
        tokenizer: as exact as the original.
        chat_format: None for recipes on plain text.
        revision: commit hash of a hub snapshot, else None.
    """

    name: str
    folder: Path
    architecture: Architecture
    tokenizer: PreTrainedTokenizerFast
    chat_format: ChatFormat | None
    revision: str | None = None

    def fingerprint(self, files: dict[str, str] | None = None) -> str:
        """One hash over weights and shape: the same base has the same, another another.

        Args:
            files: sha256 of the weight files by name, where they are known already.
        """
        files = files or fingerprint_of_files(weight_files(self.folder))
        return artifact.sha256_of_json({"files": files, "architecture": asdict(self.architecture)})

    def identity(self, fingerprint: str | None = None) -> BaseIdentity:
        """What an adapter records of this base, and asks of the next it is put on.

        Args:
            fingerprint: where it is known already; it is read from every byte of the weights.
        """
        style = self.chat_format
        return BaseIdentity(
            fingerprint=fingerprint or self.fingerprint(),
            tokenizer_sha256=tokenizer_hash(self.tokenizer),
            chat_format=style.name if style else None,
            chat_format_sha256=artifact.sha256_of_json([style.jinja(), style.stops])
            if style
            else None,
            vocab_size=self.architecture.vocab_size,
            merged_adapters=merged_adapters_of(self.folder),
        )


def find_base(config: RunConfig, run_path: Path) -> Base:
    """Makes whatever `base:` names into a local folder, and reads what it is.

    Args:
        run_path: the run folder; random weights are written to its `base/`.

    Raises:
        InputError: missing, unreadable, or no Llama.
        CheckFailed: another commit of a hub id than the run's, or files that the hub does not have.
    """
    section = config.base
    revision = None
    if section.architecture is not None:
        folder = run_path / "base"
        if not folder.exists():
            _write_random_base(config, folder)
        name = str(folder)
    elif section.is_hub_id:
        assert section.path is not None
        folder = download(section.path, base_revision(section, RunFolder(run_path)))
        name, revision = section.path, folder.name
    else:
        assert section.path is not None
        name, folder = section.path, Path(section.path)
        if is_meta_layout(folder):
            folder = converted(folder, section.tokenizer)
            name = str(folder)
    return open_base(folder, section, config, name, revision)


def read_tokenizer(config: RunConfig) -> tuple[PreTrainedTokenizerFast, ChatFormat | None]:
    """Tokenizer and prompt format of a config, without its weights."""
    section = config.base
    if section.architecture is not None:
        architecture = architecture_of(section.architecture)
        assert section.tokenizer is not None, "the config asks for it with an architecture"
        tokenizer = load_tokenizer(Path(section.tokenizer))
    else:
        assert section.path is not None
        folder = Path(section.path)
        if section.is_hub_id:
            folder = download(section.path, section.revision, with_weights=False)
        tokenizer = load_tokenizer(Path(section.tokenizer) if section.tokenizer else folder)
        if is_meta_layout(folder):
            params = artifact.read_json(folder / "params.json")
            architecture = from_params_json(params, vocab_size=len(tokenizer))
        else:
            architecture = read_architecture(folder)
    return tokenizer, _format_of(config, architecture, tokenizer)


def is_meta_layout(folder: Path) -> bool:
    """Meta's params.json and no config.json: a missing shard is then the importer's to name."""
    return (folder / "params.json").is_file() and not (folder / "config.json").is_file()


def converted(folder: Path, tokenizer: str | None = None) -> Path:
    """The Hugging Face folder of a Meta folder, converted once and kept in the cache."""
    return cached_import(folder, cache_root(), Path(tokenizer) if tokenizer else None)


def open_base(
    folder: Path, section: BaseSection, config: RunConfig, name: str, revision: str | None = None
) -> Base:
    """Reads a Hugging Face folder: architecture, tokenizer, prompt format.

    Raises:
        InputError: no config.json, no Llama, no weights, no tokenizer, an unfit vocabulary.
    """
    architecture = read_architecture(folder)
    refuse_too_few_bytes(folder, weight_files(folder), architecture.num_parameters().total)
    tokenizer = load_tokenizer(Path(section.tokenizer) if section.tokenizer else folder)
    if len(tokenizer) > architecture.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} ids, the model {architecture.vocab_size}"
        )
    chat_format = _format_of(config, architecture, tokenizer)
    if chat_format and (tokenizer.chat_template is None or config.data.chat_format != "auto"):
        tokenizer.chat_template = chat_format.jinja()
    return Base(name, folder, architecture, tokenizer, chat_format, revision)


def _format_of(
    config: RunConfig, architecture: Architecture, tokenizer: PreTrainedTokenizerFast
) -> ChatFormat | None:
    """Plain text has none."""
    return None if config.recipe == "pretrain" else choose_format(config, architecture, tokenizer)


def choose_format(
    config: RunConfig, architecture: Architecture, tokenizer: PreTrainedTokenizerFast
) -> ChatFormat:
    """The config's prompt format, or the documented one of the base, with the config's date."""
    scaling = architecture.rope_scaling
    chat_format = (
        detect_format(tokenizer, scaling.factor if scaling else None)
        if config.data.chat_format == "auto"
        else FORMATS[config.data.chat_format]
    )
    return replace(chat_format, date_string=config.data.date_string)


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder.

    Raises:
        InputError: no such folder, no config.json, or a model that is not a documented Llama.
    """
    if not folder.is_dir():
        known = f"; documented hub ids: {', '.join(HUB_IDS)}" if "/" in str(folder) else ""
        raise InputError(f"base.path {folder}: no such folder{known}")
    config = artifact.read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{folder}/config.json: model_type is {found!r}; only llama is trained")
    if found := config_json.findings_of(config):
        raise InputError([f"{folder}/config.json: {finding}" for finding in found])
    return from_llama_config(config)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, as its index names them, or the single file.

    Raises:
        InputError: none, a shard of the index is missing, or a file is cut off.
    """
    return sorted(set(files_by_weight(folder).values()))


def load_model(base: Base, section: BaseSection, device: torch.device) -> LlamaForCausalLM:
    """The weights of a base, in the type and storage its section asks for.

    RoPE frequencies stay float32 whatever the type: the model is loaded in it, never cast to it.

    Raises:
        CannotContinue: not enough memory.
    """
    settings: dict[str, object] = {
        "dtype": DTYPES[section.dtype],
        "attn_implementation": register(),
        "use_safetensors": True,
        "local_files_only": True,
    }
    if section.quantization != "none":
        settings["quantization_config"] = quantization_config(section)
        if device.type != "cpu":
            settings["device_map"] = {"": device}
    model = read_weights(base.folder, **settings)
    _keep_4_bit_layout(model)
    if section.quantization != "none" and device.type == "cpu":
        _leave_file(model)
    return model


def _leave_file(model: LlamaForCausalLM) -> None:
    """Copies what was not quantised: as long as one tensor lies in the file's pages, memory holds
    the whole file, full weights included."""
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()


def _keep_4_bit_layout(model: LlamaForCausalLM) -> None:
    """Keeps 4-bit weights in the one layout that everything else can read.

    On a CPU with bfloat16 units, bitsandbytes 0.50 rewrites the packed weights of a layer in place
    at its first forward pass in evaluation mode. Whatever reads their numbers afterwards (DoRA's
    norms, a merge, its proof) gets other numbers, silently: off by 0.57 where |W| is at most 0.36.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def read_weights(folder: Path, **settings: Any) -> LlamaForCausalLM:
    """`from_pretrained` on a folder, with every weight accounted for.

    Raises:
        InputError: weights that are missing, unexpected, or of another shape.
        CannotContinue: not enough memory.
    """
    try:
        model, info = LlamaForCausalLM.from_pretrained(
            # Mismatched sizes are among the findings below, not ignored.
            str(folder),
            config=_llama_config(folder),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            # The folder's own settings (top_k, a repetition penalty) would mix with what is asked
            # for, and differ between a base and its merge.
            generation_config=GenerationConfig(),
            **settings,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CannotContinue(f"{folder}: does not fit into memory ({error})") from error
    findings = [
        f"{folder}: {kind}: {sorted(map(str, keys))[:5]}" for kind, keys in info.items() if keys
    ]
    if findings:
        raise InputError(findings)
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if "inv_freq" in n)
    return model


def _llama_config(folder: Path) -> LlamaConfig:
    """transformers' configuration from the documented numbers alone; config.json stays unread."""
    config = artifact.read_json(folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    known = dtype if isinstance(dtype, str) and dtype in DTYPES else None
    return to_llama_config(read_architecture(folder), known)


def quantization_config(section: BaseSection) -> BitsAndBytesConfig:
    """bitsandbytes' settings: NF4 or FP4 with double quantisation, or 8 bits.

    Source: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314.
    """
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[section.dtype],
    )


def untrained_ids(model: LlamaForCausalLM, ids: list[int]) -> list[int]:
    """Which of `ids` have an embedding row that training never touched: far smaller than usual."""
    rows = model.get_input_embeddings().weight.detach()
    norms = rows.float().norm(dim=1).cpu()  # a GPU would be waited for at every id
    limit = 0.01 * norms.median()
    return [token for token in ids if norms[token] < limit]


def _write_random_base(config: RunConfig, folder: Path) -> None:
    section = config.base
    if section.tokenizer is None:
        raise InputError("base.tokenizer: is needed with base.architecture; name a folder or file")
    assert section.architecture is not None
    architecture = architecture_of(section.architecture)
    tokenizer = load_tokenizer(Path(section.tokenizer))
    set_seed(config.run.seed)
    model = LlamaForCausalLM(to_llama_config(architecture, "float32")).to(DTYPES[section.dtype])
    with artifact.staged(folder, {"base": "random weights", "seed": config.run.seed}) as stage:
        model.save_pretrained(str(stage))
        save_tokenizer(tokenizer, stage)
        chat_format = _format_of(config, architecture, tokenizer)
        write_generation_config(Base("", stage, architecture, tokenizer, chat_format), stage)


def generation_config(base: Base) -> dict[str, object]:
    """generation_config.json of what we write: greedy, with every stop id of the format."""
    stops = base.chat_format.stop_ids(base.tokenizer) if base.chat_format else []
    end = base.tokenizer.eos_token_id
    ids = stops + ([end] if end is not None and end not in stops else [])
    return {
        "bos_token_id": base.tokenizer.bos_token_id,
        "eos_token_id": ids[0] if len(ids) == 1 else ids,
        "pad_token_id": base.tokenizer.pad_token_id,
        "do_sample": False,
    }


def write_generation_config(base: Base, folder: Path) -> None:
    """Writes generation_config.json; transformers' trainer would align it to one stop id."""
    text = json.dumps(generation_config(base), indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
