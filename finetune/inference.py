"""Models opened from disk the way a user would open them, and greedy or sampled text from them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

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
from finetune.errors import CannotContinue, InputError
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
        folder: of the weights that are this model's own (the adapter's, the merged model's).
    """

    name: str
    model: Any
    base: Base
    device: torch.device
    folder: Path

    def weights_sha256(self) -> str:
        """One hash of what was loaded: of its manifest, where it has one."""
        manifest = self.folder / artifact.MANIFEST
        return artifact.sha256_of(manifest) if manifest.exists() else self.base.fingerprint()

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
    folder = run.adapter if variant == "adapter" else base.folder
    return Opened(variant, model.to(device).eval(), base, device, folder)


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
    return Opened(name, model.to(device).eval(), base, device, folder)


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
    """What the model writes after each prompt, in the order given; see `iter_continued`."""
    answers = dict(iter_continued(opened, dict(enumerate(prompts)), sampling, batch_size))
    return (answers[index] for index in range(len(prompts)))


def iter_continued(
    opened: Opened,
    prompts: Mapping[int, Sequence[int]],
    sampling: Sampling,
    batch_size: int = 32,
) -> Iterator[tuple[int, list[int]]]:
    """What the model writes after each prompt, without the stop token, as soon as it is there.

    Prompts of a batch are padded on the left and masked, and each draws from a generator of its
    own, so that every answer is the one it would get alone. Longer prompts go together, so that
    little is padded. No generator of the process is touched.

    Args:
        prompts: number of the row -> ids with BOS; the number goes into its draws.

    Yields:
        number and new ids, batch by batch.
    """
    for chosen in _batches(prompts, batch_size, has_soft_prompt(opened.model)):
        texts = _generate(opened, chosen, [prompts[number] for number in chosen], sampling)
        yield from zip(chosen, texts, strict=True)


def _batches(
    prompts: Mapping[int, Sequence[int]], size: int, equal_lengths: bool
) -> Iterator[list[int]]:
    """Numbers of prompts that go together. Behind trained vectors nothing may be padded: the
    padding would stand between them and the text (PEFT 0.21 counts its positions).
    """
    order = sorted(prompts, key=lambda number: len(prompts[number]))
    groups: list[list[int]] = [order]
    if equal_lengths:
        found = itertools.groupby(order, lambda number: len(prompts[number]))
        groups = [list(group) for _, group in found]
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))


class _OwnDraws(LogitsProcessor):
    """Draws from each row's distribution with the row's own generator.

    The largest of log p - log E, with E exponential, is a draw from p (Gumbel; Maddison et al.
    2014): what is added here, greedy search picks.

    Args:
        numbers: of the rows of a batch.
        seed: of all draws.
    """

    def __init__(self, numbers: Sequence[int], seed: int) -> None:
        self._generators = []
        for number in numbers:
            digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
            own = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            self._generators.append(own)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocab) scores, each with its draw."""
        size = scores.shape[-1]
        draws = [torch.empty(size).exponential_(generator=own) for own in self._generators]
        return scores - torch.stack(draws).log().to(scores)


class _RefuseNan(LogitsProcessor):
    """Stops where the model's logits are no numbers: the largest of them would be some id."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(scores.isnan().any()):
            raise CannotContinue("the model's logits are not numbers (nan); its weights are broken")
        return scores


def _draws(sampling: Sampling, numbers: Sequence[int]) -> LogitsProcessorList:
    steps: list[LogitsProcessor] = [_RefuseNan()]
    if sampling.temperature > 0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        steps.append(_OwnDraws(numbers, sampling.seed))
    return LogitsProcessorList(steps)


def _generate(
    opened: Opened, numbers: Sequence[int], prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    stops = opened.stop_ids()
    width, padding = max(map(len, prompts)), opened.base.tokenizer.pad_token_id or 0
    rows = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with evaluating(opened.model):
        output = opened.model.generate(
            input_ids=torch.tensor(rows, device=opened.device),
            attention_mask=torch.tensor(masks, device=opened.device),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=padding,
            use_cache=True,
            do_sample=False,
            logits_processor=_draws(sampling, numbers),
        )
    return [_until_stop(row[width:].tolist(), stops) for row in output]


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
