"""A LoRA adapter as a GGUF file that llama.cpp puts on a GGUF of the base (`--lora`).

llama.cpp adds (alpha / r)·B·A to a matrix, with one alpha for the file and r read from each B.
Where an adapter's scale differs from that (rsLoRA, alpha or rank patterns) the quotient goes into
B. B's rows are the base matrix's rows, so those of q and k are permuted as the base's are.

Source: `llama_adapter_lora_init` and `llama_adapter_lora_weight::get_scale` in llama.cpp's
src/llama-adapter.cpp and .h; convert_lora_to_gguf.py for the key names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import artifact
from finetune.errors import CheckFailed, InputError
from finetune.exports.gguf_model import gguf_name
from finetune.exports.gguf_stream import GgufTensor, fitting_type, write_gguf
from finetune.exports.huggingface import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.llama.hyperparameters import Architecture
from finetune.llama.meta_layout import Weight, hf_to_meta_rows, num_rotated_heads, weights_of

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """The update of one matrix.

    Attributes:
        weight: the base's matrix.
        a: (r, in).
        b: (out, r), as PEFT has it.
        scale: the update is scale · b·a.
    """

    weight: Weight
    a: Tensor
    b: Tensor
    scale: float


def read_pairs(adapter: Path, arch: Architecture) -> tuple[list[Pair], float]:
    """Every pair of a PEFT LoRA folder, matched with the base's shapes, and the file's alpha.

    Raises:
        InputError: a method, a target or an option that GGUF has no place for.
        CheckFailed: tensors that are no pairs, or do not fit the base.
    """
    from safetensors.torch import load_file

    settings = artifact.read_json(adapter / ADAPTER_CONFIG)
    _refuse_others(adapter, settings)
    weights = {weight.hf: weight for weight in weights_of(arch)}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(adapter / ADAPTER_WEIGHTS).items():
        module, _, part = key.removeprefix(_PREFIX).rpartition(".lora_")
        parts.setdefault(module, {})[part] = tensor
    found = [f for module, pair in parts.items() if (f := _misfit(module, pair, weights))]
    if found or not parts:
        raise CheckFailed("\n".join(f"{adapter}: {f}" for f in found or ["holds no tensor"]))
    pairs = [
        Pair(
            weights[f"{module}.weight"],
            parts[module]["A.weight"],
            parts[module]["B.weight"],
            _scale(settings, module, parts[module]["A.weight"].shape[0]),
        )
        for module in sorted(parts)
    ]
    if arch.tie_word_embeddings and any(p.weight.hf == "lm_head.weight" for p in pairs):
        raise InputError(f"{adapter}: adapts lm_head, which a tied model's GGUF does not have")
    return pairs, float(settings["lora_alpha"]) or 1.0


def _refuse_others(adapter: Path, settings: Mapping[str, Any]) -> None:
    found = []
    if settings.get("peft_type") != "LORA":
        found.append(f"is {settings.get('peft_type')}; llama.cpp loads LoRA only")
    if settings.get("use_dora"):
        found.append("is DoRA, whose magnitudes GGUF has no place for")
    for key in ("modules_to_save", "trainable_token_indices", "layer_replication"):
        if settings.get(key):
            found.append(f"has {key}, which GGUF has no place for")
    if settings.get("bias", "none") != "none":
        found.append("trains biases, which a Llama does not have")
    if found:
        hint = "merge it and export --format gguf"
        raise InputError([f"{adapter}: {finding}; {hint}" for finding in found])


def _misfit(module: str, pair: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> str | None:
    if set(pair) != {"A.weight", "B.weight"}:
        return f"{module}: not a pair of lora_A and lora_B, but {', '.join(sorted(pair))}"
    weight = weights.get(f"{module}.weight")
    if weight is None:
        return f"{module}: no matrix of this Llama"
    shape = (pair["B.weight"].shape[0], pair["A.weight"].shape[1])
    if shape != weight.shape or pair["A.weight"].shape[0] != pair["B.weight"].shape[1]:
        return f"{module}: B·A is {shape}, the base has {weight.shape}"
    return None


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's scale of a module; its own alpha, where a pattern matches its name's end.

    Source: `get_pattern_key` in peft/utils/other.py.
    """
    alpha = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def adapter_tensors(pairs: list[Pair], alpha: float, arch: Architecture) -> list[GgufTensor]:
    """A and B of every matrix, in float32, as llama.cpp multiplies them."""
    planned = []
    for pair in pairs:
        name, b = gguf_name(pair.weight.hf), pair.b.float()
        rank = b.shape[1]
        quotient = pair.scale * rank / alpha
        if not math.isclose(quotient, 1.0, rel_tol=1e-12):
            b = b * quotient
        if pair.weight.rotated:
            b = hf_to_meta_rows(b, num_rotated_heads(pair.weight, arch))
        for part, tensor in (("a", pair.a.float()), ("b", b)):
            shape = tuple(tensor.shape)
            kind = fitting_type("f32", shape)
            planned.append(GgufTensor(f"{name}.lora_{part}", shape, kind, _once(tensor)))
    return planned


def _once(tensor: Tensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter([tensor])


def write_gguf_adapter(path: Path, tensors: list[GgufTensor], alpha: float, name: str) -> None:
    """Writes the file."""

    def add_keys(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)

    write_gguf(path, tensors, add_keys)
