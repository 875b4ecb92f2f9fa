"""The proof of a merge: base + adapter in one hand, the merged folder in the other.

Nothing here is the code that merged: files are read by the safetensors library, the adapter is on
PEFT's own layers, the forward passes are transformers'. Both models go through the rows side by
side, a layer at a time, so that the proof needs no more memory than the merge. Compared are every
weight against PEFT's own update, logits on held-out rows, the next token at every position, and,
where both models fit a budget, greedy text. Tolerances: docs/numerics.md.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import artifact
from finetune.data import load_data, load_heldout
from finetune.errors import CannotContinue, CheckFailed
from finetune.heldout import evaluating
from finetune.inference import Opened, Sampling, continue_prompts, open_folder, open_variant
from finetune.merging.members import Combination
from finetune.model import DTYPES, Base
from finetune.prepared import Document
from finetune.proof_combined import CombinedByPeft
from finetune.proof_layers import Stream, compare_heads, run_layers
from finetune.proof_weights import WEIGHT_ULPS, WeightCheck, bnb_dequantized
from finetune.run_folder import RunFolder
from finetune.skeleton import AdapterFolder, Weights, attached_skeleton, plain_skeleton

NUM_ROWS = 32
NUM_TOKENS = 8192
NUM_PRODUCTS = 2 << 40  # tokens times parameters: 8B is shown fewer tokens, or waits an hour
NUM_PROMPTS = 16
NEW_TOKENS = 24
TEXT_BYTES = 1 << 30  # of both models together: above it, no text is written


@dataclass(frozen=True)
class Tolerance:
    """How far merged may be from attached, by the type of the merged weights.

    Attributes:
        logit: largest logit difference, relative to the spread (standard deviation) of logits.
        kl: mean KL(attached || merged) in nats a token.
        text: whether greedy text must be equal on every prompt.
    """

    logit: float
    kl: float
    text: bool


TOLERANCES = {
    "float32": Tolerance(logit=1e-3, kl=1e-6, text=True),
    "bfloat16": Tolerance(logit=0.25, kl=5e-3, text=False),
    "float16": Tolerance(logit=0.05, kl=1e-3, text=False),
}


def prove(
    run: RunFolder,
    base: Base,
    folder: Path,
    target: str = "full",
    combination: Combination | None = None,
) -> dict[str, Any]:
    """Compares a merged folder with the run's base and adapter.

    Args:
        folder: the merged model.
        target: `full`, or `dequantized`: the base's weights as they were while training.
        combination: where the run's adapter was merged together with others.

    Returns:
        the differences, as in merge.json.

    Raises:
        CheckFailed: a matrix was not changed or not by PEFT's update, another tensor was
            changed, or a difference is beyond the tolerance of the dtype.
    """
    begun = time.monotonic()
    documents = _proof_documents(run, base)
    rows = [document.input_ids for document in documents]
    combined = CombinedByPeft(combination) if combination else None
    streams = _streams(run, base, folder, target, combined)
    dtype = str(streams[1].skeleton.dtype).removeprefix("torch.")
    tolerance = TOLERANCES[dtype]
    weights = WeightCheck(base, streams[0].weights, streams[1].weights)
    run_layers(base, streams, rows, weights.layer)
    weights.outside_layers(streams[0].skeleton, streams[1].skeleton)
    pairs = [(0, 1), (2, 1), (2, 3)][: len(streams) - 1]
    logits, *from_trained = compare_heads(base, streams, pairs)
    result = {
        "dtype": dtype,
        "rows": len(rows),
        **weights.as_json(),
        **logits.as_json([len(ids) for ids in rows]),
        **_compare_text(run, folder, documents, combined, tolerance.logit),
    }
    if from_trained:
        chosen, other = (max(float(d.kl().mean()), 0.0) for d in from_trained)
        result["kl_from_quantized"] = chosen
        names = ("full", "dequantized") if target == "full" else ("dequantized", "full")
        result["kl_from_trained"] = dict(zip(names, (chosen, other), strict=True))
    decides_text = target == "full"
    findings = _beyond(result, tolerance, decides_text)
    if findings:
        raise CheckFailed("the merge proof failed, nothing is published: " + "; ".join(findings))
    return {**result, "seconds": round(time.monotonic() - begun, 2)}


def _streams(
    run: RunFolder, base: Base, folder: Path, target: str, combined: CombinedByPeft | None
) -> list[Stream]:
    """Attached, merged; of a quantised run also the model trained and the other way to merge."""
    section, adapter = run.config().base, combined or AdapterFolder(run.adapter)
    trained = DTYPES[section.dtype]
    merged = DTYPES[artifact.read_json(folder / "config.json")["dtype"]]
    # The same weights computed in two types differ by more than the merge: float32 decides.
    dtype = merged if merged == trained else torch.float32
    full = Weights(base.folder, lambda _, tensor: tensor.to(trained))
    rounded = Weights(
        base.folder,
        lambda name, tensor: bnb_dequantized(name, tensor.to(trained), section.quantization),
    )
    chosen, other = (full, rounded) if target == "full" else (rounded, full)
    # In 16 bits the arithmetic's own rounding grows with the depth until it hides the merge.
    exact = torch.float32 if merged == trained and section.quantization == "none" else None
    streams = [
        Stream(attached_skeleton(base, adapter, dtype), chosen, exact),
        Stream(plain_skeleton(base, merged), Weights(folder), exact),
    ]
    if section.quantization != "none":
        streams += [
            Stream(attached_skeleton(base, adapter, trained, section), full),
            Stream(attached_skeleton(base, adapter, trained), other),
        ]
    return streams


def _beyond(result: dict[str, Any], tolerance: Tolerance, decides_text: bool) -> list[str]:
    limits = {
        "max_weight_error_ulps": WEIGHT_ULPS,
        "relative_logit_difference": tolerance.logit,
        "kl": tolerance.kl,
    }
    findings = [
        f"{name} is {result[name]:.2e}, allowed {limit:.2e} ({result['dtype']})"
        for name, limit in limits.items()
        if not result[name] <= limit
    ]
    if result["unchanged"]:
        findings.append(f"matrices that did not change: {', '.join(result['unchanged'][:5])}")
    if result["changed_unasked"]:
        findings.append(f"tensors changed unasked: {', '.join(result['changed_unasked'][:5])}")
    differ = result["prompts"] - result["same_text"] - result["ties"]
    if tolerance.text and decides_text and differ:
        findings.append(f"greedy text differs on {differ} prompts")
    return findings


def _proof_documents(run: RunFolder, base: Base) -> list[Document]:
    """Held-out documents, or training ones where the run has none held out."""
    config = run.config()
    if config.data.heldout:
        source = config.data.heldout[0]
        documents, _ = load_heldout(source, config, base.tokenizer, base.chat_format)
        if documents:
            return _few(documents[:NUM_ROWS], base)
    data = load_data(config, base.tokenizer, base.chat_format)
    return _few((data.heldout or data.train)[:NUM_ROWS], base)


def _few(documents: Sequence[Document], base: Base) -> list[Document]:
    """The first ones, as long as hidden states and work are small; the first in any case."""
    most = min(NUM_TOKENS, NUM_PRODUCTS // base.architecture.num_parameters().total)
    kept, num_tokens = [documents[0]], len(documents[0].input_ids)
    for document in documents[1:]:
        num_tokens += len(document.input_ids)
        if num_tokens > most:
            break
        kept.append(document)
    return kept


def _compare_text(
    run: RunFolder,
    folder: Path,
    documents: Sequence[Document],
    combined: CombinedByPeft | None,
    allowed: float,
) -> dict[str, Any]:
    """Greedy text of both models, where they fit into memory together.

    Args:
        allowed: how far logits may differ, relative to their spread.
    """
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if 2 * num_bytes > TEXT_BYTES:
        why = "next tokens only: too large for greedy text"
        return {"text": why, "prompts": 0, "same_text": 0, "ties": 0}
    attached = open_variant(run, "base" if combined else "adapter", full_precision=True)
    if combined:
        attached = replace(attached, model=combined.attach(attached.model))
    merged = open_folder(folder, run.config(), name="merged")
    if merged.model.dtype != attached.model.dtype:
        attached.model.float()
    prompts = [_prompt_of(document) for document in documents[:NUM_PROMPTS]]
    models = (attached, merged)
    texts = [_written(model, prompts) for model in models]
    other = [(p, a, b) for p, a, b in zip(prompts, *texts, strict=True) if a != b]
    ties = sum(_is_tie(models, *found, allowed) for found in other)
    same = len(prompts) - len(other)
    return {"text": "greedy", "prompts": len(prompts), "same_text": same, "ties": ties}


def _written(opened: Opened, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy text; none from a model whose logits are no numbers, which its other figures show."""
    try:
        return list(continue_prompts(opened, prompts, Sampling(max_new_tokens=NEW_TOKENS)))
    except CannotContinue:
        return [[] for _ in prompts]


def _is_tie(
    models: tuple[Opened, Opened],
    prompt: Sequence[int],
    one: Sequence[int],
    other: Sequence[int],
    allowed: float,
) -> bool:
    """Whether two texts part where both models give both next tokens the same logit, but for what
    logits may differ by: which of them is larger is then rounding, and another machine's choice."""
    stop = models[0].stop_ids()[:1]
    pairs = itertools.zip_longest([*one, *stop], [*other, *stop])
    place, chosen = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    ids = torch.tensor([[*prompt, *one[:place]]], device=models[0].device)
    for opened in models:
        with evaluating(opened.model):
            logits = opened.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        if abs(logits[chosen[0]] - logits[chosen[1]]) > allowed * logits.std():
            return False
    return True


def _prompt_of(document: Document) -> list[int]:
    """The ids before the first trained token."""
    first = next((i for i, t in enumerate(document.train_mask) if t and i), 1)
    return document.input_ids[:first]


__all__ = ["TOLERANCES", "Tolerance", "prove"]
