"""What an export starts from: full weights on disk, verified, with what a reader needs of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from finetune import artifact
from finetune.errors import InputError
from finetune.llama.architecture import Architecture
from finetune.llama.chat import FORMATS, ChatFormat, detect_format
from finetune.llama.tokenizer import check_vocabulary, fingerprint, load_tokenizer
from finetune.model import choose_format, converted, find_base, is_meta_layout, read_architecture
from finetune.run_folder import RunFolder

ORIGINALS = ("original/tokenizer.model", "tokenizer.model")


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        target: what the user named: a run or a model folder.
        folder: a Hugging Face folder with its full weights.
        run: the run it comes from, None for a model folder of no run.
        architecture: its hyperparameters.
        tokenizer: as exact as the original; its chat template is the one to write.
        chat_format: its prompt format, None for a model of plain text.
    """

    target: Path
    folder: Path
    run: RunFolder | None
    architecture: Architecture
    tokenizer: PreTrainedTokenizerFast
    chat_format: ChatFormat | None

    @property
    def name(self) -> str:
        """The run's name, or the folder's; never a path."""
        return (self.run.path if self.run else self.target).resolve().name

    @property
    def combination(self) -> dict[str, Any] | None:
        """What the manifest of a merge of several adapters says of them; else None."""
        if not (self.folder / artifact.MANIFEST).exists():
            return None
        facts: dict[str, Any] = artifact.read_manifest(self.folder)["facts"]
        return facts if "combination" in facts else None

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the format's, the taught one first, then the tokenizer's EOS."""
        stops = self.chat_format.stop_ids(self.tokenizer) if self.chat_format else []
        end = self.tokenizer.eos_token_id
        return stops if end is None or end in stops else [*stops, end]


def open_source(target: Path, chat_format: str | None = None) -> Source:
    """The full weights that a run or a folder stands for.

    Args:
        chat_format: the prompt format's name, instead of the run's or the folder's own.

    Raises:
        InputError: a run without full weights, no model at all, or an unknown format.
        CheckFailed: the folder differs from its manifest.
    """
    folder = converted(target) if is_meta_layout(target) else exportable_folder(target)
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, architecture.vocab_size, str(folder))
    run = run_of_folder(target)
    found = _format(run, architecture, tokenizer, chat_format)
    if found and (chat_format or tokenizer.chat_template is None):
        tokenizer.chat_template = found.jinja()
    return Source(target, folder, run, architecture, tokenizer, found)


def run_of_folder(target: Path) -> RunFolder | None:
    """The run that a target is, or lies in (`runs/x/merged`)."""
    for folder in (target, target.resolve().parent):
        if (folder / "config.yaml").is_file():
            return RunFolder(folder)
    return None


def exportable_folder(target: Path) -> Path:
    """The full weights that a run or a folder stands for, verified where they have a manifest.

    Raises:
        InputError: a run without full weights, or no model at all.
        CheckFailed: the folder differs from its manifest.
    """
    folder = target
    if (target / "config.yaml").exists():
        run = RunFolder(target)
        folder = run.model if run.model.is_dir() else run.merged
        if not folder.is_dir():
            raise InputError(
                f"{target}: has no full weights yet; `python -m finetune merge {target}` makes them"
                " (--format peft and gguf-lora export the adapter alone)"
            )
    elif is_meta_layout(target):
        raise InputError(f"{target}: is in Meta's layout already")
    elif not (target / "config.json").is_file():
        raise InputError(
            f"{target}: is neither a run (config.yaml) nor a model folder (config.json)"
        )
    if (folder / artifact.MANIFEST).exists():
        artifact.verify(folder)
    return folder


def _format(
    run: RunFolder | None,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerFast,
    named: str | None,
) -> ChatFormat | None:
    """The named format, the run's, or the documented one of a folder that has a chat template."""
    if named is not None and named not in FORMATS:
        raise InputError(f"--chat-format {named}: unknown; allowed: {', '.join(FORMATS)}")
    if run is None:
        scaling = architecture.rope_scaling
        if named:
            return FORMATS[named]
        if tokenizer.chat_template is None:
            return None
        return detect_format(tokenizer, scaling.factor if scaling else None)
    config = run.config()
    if named:
        return replace(FORMATS[named], date_string=config.data.date_string)
    return None if config.recipe == "pretrain" else choose_format(config, architecture, tokenizer)


def original_tokenizer(source: Source, given: Path | None = None) -> Path | None:
    """The original tokenizer file of a model: SentencePiece or tiktoken, not tokenizer.json.

    Looked for where it was named, in the model's folder, in that of the run's base, and where the
    run's config names one.

    Raises:
        InputError: the named one is none, or gives other ids than the model's own tokenizer.
    """
    places = [given] if given else [source.folder, *_base_folder(source)]
    wanted = fingerprint(source.tokenizer)
    for path in (file for place in places for file in _candidates(place) if file.is_file()):
        if fingerprint(load_tokenizer(path, model_folder=source.folder)) == wanted:
            return path
        if given:
            raise InputError(f"{path}: is not the tokenizer of {source.folder}; name the right one")
    if given:
        raise InputError(f"{given}: holds no tokenizer.model")
    return None


def _base_folder(source: Source) -> list[Path]:
    if source.run is None:
        return []
    config = source.run.config()
    named = [Path(config.base.tokenizer)] if config.base.tokenizer else []
    return [find_base(config, source.run.path).folder, *named]


def _candidates(place: Path) -> list[Path]:
    if place.is_file():
        return [] if place.suffix == ".json" else [place]  # tokenizer.json is nobody's original
    return [place / name for name in ORIGINALS]
