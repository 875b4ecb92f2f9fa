"""Models opened from disk the way a user would open them, and greedy or sampled text from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from finetune import artifact
from finetune.adapters import load_adapter
from finetune.config import (
    AdapterSection,
    BaseSection,
    DataSection,
    EvalSection,
    RunConfig,
    RunSection,
    TrainSection,
)
from finetune.errors import InputError
from finetune.fast.attention import register
from finetune.fast.loss import has_soft_prompt
from finetune.heldout import evaluating
from finetune.model import (
    Base,
    converted,
    find_base,
    is_meta_layout,
    load_model,
    open_base,
    read_weights,
)
from finetune.run_folder import RunFolder

VARIANTS = ("base", "adapter", "model", "merged")


@dataclass(frozen=True)
class Opened:
    """A model ready to be asked.

    Attributes:
        name: base, adapter, model or merged, or a folder's path.
        model: in evaluation mode, on `device`; `Any` because PEFT and transformers are untyped.
        base: its tokenizer and prompt format.
        device: where it lies.
    """

    name: str
    model: Any
    base: Base
    device: torch.device

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the format's, and the tokenizer's EOS."""
        tokenizer = self.base.tokenizer
        stops = self.base.chat_format.stop_ids(tokenizer) if self.base.chat_format else []
        end = tokenizer.eos_token_id
        return stops if end is None or end in stops else [*stops, end]


def pick_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def open_variant(run: RunFolder, variant: str, full_precision: bool = False) -> Opened:
    """One of a run's models, loaded fresh from disk.

    Args:
        variant: base, adapter, model or merged.
        full_precision: open a quantised base unquantised, as `merge --base full` does.

    Raises:
        InputError: the run does not have it.
        CheckFailed: the adapter is damaged or belongs to another base.
    """
    config, device = run.config(), pick_device()
    if variant == "merged":
        return open_folder(run.merged, config, name="merged")
    if variant == "model":
        return open_folder(run.model, config, name="model")
    base = find_base(config, run.path)
    section = config.base
    if full_precision:
        section = section.model_copy(update={"quantization": "none"})
    model: torch.nn.Module = load_model(base, section, device)
    if variant == "adapter":
        if not run.adapter.is_dir():
            raise InputError(f"{run.path}: has no adapter yet; train the run first")
        model = load_adapter(model, run.adapter, base.identity())
    return Opened(variant, model.to(device).eval(), base, device)


def trained_variant(run: RunFolder) -> str:
    """What training left: adapter, or model after full-weight training.

    Raises:
        InputError: neither; the run is not finished.
    """
    for variant, folder in (("adapter", run.adapter), ("model", run.model)):
        if folder.is_dir():
            return variant
    raise InputError(f"{run.path}: has neither adapter nor model; train the run first")


def open_folder(folder: Path, config: RunConfig, name: str | None = None) -> Opened:
    """A Hugging Face (or Meta) folder through plain transformers, with the run's prompt format.

    Raises:
        InputError: no such folder, or none of a Llama.
        CheckFailed: it has a manifest and differs from it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    name = name or str(folder)
    if is_meta_layout(folder):
        folder = converted(folder)
    if (folder / artifact.MANIFEST).exists():
        artifact.verify(folder)
    section = BaseSection(path=str(folder))
    base = open_base(folder, section, config, str(folder))
    device = pick_device()
    model = read_weights(
        folder, attn_implementation=register(), use_safetensors=True, local_files_only=True
    )
    return Opened(name, model.to(device).eval(), base, device)


def folder_config(folder: Path, recipe: str = "sft") -> RunConfig:
    """The defaults of every section, for a model folder that no run describes.

    Not validated: it trains nothing, so it names no training rows.
    """
    return RunConfig.model_construct(
        recipe="pretrain" if recipe == "pretrain" else "sft",
        run=RunSection(),
        base=BaseSection(path=str(folder)),
        adapter=AdapterSection(),
        data=DataSection(),
        train=TrainSection(),
        eval=EvalSection(),
    )


@dataclass(frozen=True)
class Sampling:
    """How text is drawn.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: share of probability kept when sampling.
        seed: of the draws.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def continue_prompts(
    opened: Opened, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int = 32
) -> Iterator[list[int]]:
    """What the model writes after each prompt, without the stop token.

    Prompts of a batch are padded on the left and masked, so that each answer is the one it would
    get alone. Longer prompts go together, so that little is padded.

    Args:
        prompts: ids with BOS.

    Yields:
        the new ids of each prompt, in the order given.
    """
    answers: dict[int, list[int]] = {}
    set_seed(sampling.seed)
    for chosen in _batches(prompts, batch_size, has_soft_prompt(opened.model)):
        texts = _generate(opened, [prompts[index] for index in chosen], sampling)
        answers.update(zip(chosen, texts, strict=True))
    return (answers[index] for index in range(len(prompts)))


def _batches(
    prompts: Sequence[Sequence[int]], size: int, equal_lengths: bool
) -> Iterator[list[int]]:
    """Indices of prompts that go together. Behind trained vectors nothing may be padded: the
    padding would stand between them and the text (PEFT 0.21 counts its positions).
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    groups: list[list[int]] = [order]
    if equal_lengths:
        found = itertools.groupby(order, lambda index: len(prompts[index]))
        groups = [list(group) for _, group in found]
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _generate(
    opened: Opened, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    stops = opened.stop_ids()
    width, padding = max(map(len, prompts)), opened.base.tokenizer.pad_token_id or 0
    rows = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    settings: dict[str, object] = {"do_sample": False}
    if sampling.temperature > 0:
        # top_k=0: transformers' default would draw from the 50 likeliest alone.
        settings = {"do_sample": True, "top_k": 0}
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    with evaluating(opened.model):
        output = opened.model.generate(
            input_ids=torch.tensor(rows, device=opened.device),
            attention_mask=torch.tensor(masks, device=opened.device),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=padding,
            use_cache=True,
            **settings,
        )
    return [_until_stop(row[width:].tolist(), stops) for row in output]


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
