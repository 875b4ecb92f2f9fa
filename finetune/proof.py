"""The proof of a merge: base + adapter in one hand, the reloaded merged folder in the other.

Three routes, none of them the code that merged: every weight against the base's with PEFT's own
update, logits on held-out rows, and greedy text. Tolerances: docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from finetune.data import load_data, load_heldout
from finetune.errors import CheckFailed
from finetune.fast.attention import no_mask
from finetune.fast.loss import pack
from finetune.heldout import evaluating
from finetune.inference import Opened, Sampling, continue_prompts, open_folder, open_variant
from finetune.model import Base
from finetune.prepared import Document
from finetune.run_folder import RunFolder

NUM_ROWS = 32
NUM_PROMPTS = 16
NEW_TOKENS = 24


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
# Every merged entry is a nearest number of its type to W + s·B·A: half a unit in the last place,
# and what the float32 product B·A itself may be off, relative to its largest entry. A limit
# relative to W would let a wrong scale pass wherever the update is small.
WEIGHT_ULPS = 0.51
UPDATE_ROUNDING = 1e-5


def prove(run: RunFolder, base: Base, folder: Path) -> dict[str, Any]:
    """Compares a merged folder with the run's base and adapter.

    Returns:
        the differences, as in merge.json.

    Raises:
        CheckFailed: a matrix was not changed or not by PEFT's update, another tensor was
            changed, or a difference is beyond the tolerance of the dtype.
    """
    config = run.config()
    documents = _proof_documents(run, base)
    attached = open_variant(run, "adapter", full_precision=True)
    merged = open_folder(folder, config, name="merged")
    dtype = str(merged.model.dtype).removeprefix("torch.")
    if merged.model.dtype != attached.model.dtype:
        # The same weights computed in two types differ by more than the merge: float32 decides.
        attached.model.float()
    tolerance = TOLERANCES[dtype]
    result = {
        "dtype": dtype,
        "rows": len(documents),
        **_compare_weights(attached, merged),
        **_compare_logits(attached, merged, documents),
        **_compare_text(attached, merged, documents),
    }
    if config.base.quantization != "none":
        # The adapter was trained on the quantised base; it is merged into the original one.
        trained = open_variant(run, "adapter")
        result["kl_from_quantized"] = _compare_logits(trained, merged, documents)["kl"]
    findings = _beyond(result, tolerance)
    if findings:
        raise CheckFailed("the merge proof failed, nothing is published: " + "; ".join(findings))
    return result


def _beyond(result: dict[str, Any], tolerance: Tolerance) -> list[str]:
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
    if tolerance.text and result["same_text"] != result["prompts"]:
        findings.append(f"greedy text differs on {result['prompts'] - result['same_text']} prompts")
    return findings


def _proof_documents(run: RunFolder, base: Base) -> list[Document]:
    """Held-out documents, or training ones where the run has none held out."""
    config = run.config()
    if config.data.heldout:
        source = config.data.heldout[0]
        documents, _ = load_heldout(source, config, base.tokenizer, base.chat_format)
        if documents:
            return documents[:NUM_ROWS]
    data = load_data(config, base.tokenizer, base.chat_format)
    return (data.heldout or data.train)[:NUM_ROWS]


def _compare_weights(attached: Opened, merged: Opened) -> dict[str, Any]:
    """Targeted matrices against PEFT's W + delta, every other tensor against the base's."""
    merged.model.requires_grad_(False)
    found = dict(merged.model.named_parameters())
    layers = {
        _base_name(name): module
        for name, module in attached.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    errors = [_error_in_ulps(found[name], module) for name, module in layers.items()]
    others = {_base_name(n): p for n, p in attached.model.named_parameters() if "lora_" not in n}
    return {
        "max_weight_error_ulps": float(torch.tensor(errors).max()),
        "unchanged": [n for n, m in layers.items() if _is_base(found[n], m.get_base_layer())],
        "changed_unasked": [
            name
            for name, weight in others.items()
            if name in found and name not in layers and not _equal(found[name], weight)
        ],
    }


def _base_name(name: str) -> str:
    """The base's name of a tensor, or of a layer's weight, under PEFT."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return name if name.endswith(".weight") else f"{name}.weight"


def _is_base(found: torch.Tensor, layer: Any) -> bool:
    return _equal(found, dequantized(layer))


def _equal(found: torch.Tensor, base: torch.Tensor) -> bool:
    return torch.equal(found, base.detach().to(found.dtype))


def _error_in_ulps(found: torch.Tensor, layer: Any) -> float:
    """Largest |merged - (W + delta)| of a matrix in units of the merged type's last place."""
    delta = layer.get_delta_weight("default").double()
    expected = dequantized(layer.get_base_layer()).double() + delta
    limits = torch.finfo(found.dtype)
    _, exponent = torch.frexp(expected.abs().clamp(min=limits.smallest_normal))
    last_place = torch.ldexp(torch.full_like(expected, limits.eps / 2), exponent)
    slack = UPDATE_ROUNDING * delta.abs().max()
    return float((((found.double() - expected).abs() - slack) / last_place).max())


def dequantized(layer: Any) -> torch.Tensor:
    """The weight of a linear layer as numbers, whatever its storage."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).detach()


def logits_of(opened: Opened, document: Document) -> torch.Tensor:
    """(tokens, vocabulary) logits of one document, float32."""
    packed = pack([(document.input_ids, document.train_mask)])
    with evaluating(opened.model):
        output = opened.model(
            input_ids=packed.input_ids.to(opened.device),
            position_ids=packed.position_ids.to(opened.device),
            attention_mask=no_mask(opened.device),
            document_lengths=packed.document_lengths,
            use_cache=False,
        )
    return output.logits[0].float()


def _compare_logits(
    attached: Opened, merged: Opened, documents: Sequence[Document]
) -> dict[str, float]:
    worst: list[float] = []
    total, kl, count, spread = 0.0, 0.0, 0, 0.0
    for document in documents:
        ours, theirs = logits_of(attached, document), logits_of(merged, document)
        difference = (ours - theirs).abs()
        worst.append(float(difference.max()))
        total += float(difference.double().mean()) * len(ours)
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        spread += float(ours.double().std()) * len(ours)
        count += len(ours)
    largest = float(torch.tensor(worst).max())  # max() of Python would drop a NaN
    return {
        "tokens": count,
        "max_logit_difference": largest,
        "mean_logit_difference": total / count,
        "relative_logit_difference": largest / (spread / count),
        "kl": max(kl / count, 0.0),
    }


def _compare_text(
    attached: Opened, merged: Opened, documents: Sequence[Document]
) -> dict[str, int]:
    prompts = [_prompt_of(document) for document in documents[:NUM_PROMPTS]]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    pairs = zip(
        continue_prompts(attached, prompts, sampling),
        continue_prompts(merged, prompts, sampling),
        strict=True,
    )
    return {"prompts": len(prompts), "same_text": sum(a == b for a, b in pairs)}


def _prompt_of(document: Document) -> list[int]:
    """The ids before the first trained token."""
    first = next((i for i, t in enumerate(document.train_mask) if t and i), 1)
    return document.input_ids[:first]


__all__ = ["TOLERANCES", "Tolerance", "dequantized", "logits_of", "prove"]
