"""Adapter settings to PEFT, and the manifest that ties an adapter to its base.

LoRA adds a low-rank update to a frozen matrix W of shape (out, in):

    W' = W + s · B·A,   A: (r, in), B: (out, r),   s = lora_alpha / r  (or / sqrt(r), rsLoRA)

B starts at zero, so the model at step 0 is the base. Trainable parameters: r · (in + out) for
every targeted matrix. Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from transformers import LlamaForCausalLM

from finetune.artifact import sha256_of, verify
from finetune.config.adapter import AdapterSection
from finetune.errors import CheckFailed, InputError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def lora_config(adapter: AdapterSection, base_name: str) -> LoraConfig:
    """PEFT's settings for an adapter section.

    Args:
        base_name: what the user wrote as the base; never made absolute.
    """
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        use_rslora=adapter.use_rslora,
        target_modules=list(adapter.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )


def attach(model: LlamaForCausalLM, adapter: AdapterSection, base_name: str) -> PeftModel:
    """Puts a fresh adapter, in float32, on the targeted linear layers of a base.

    Raises:
        InputError: a target that matches no linear layer of the base.
    """
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    } - {"lm_head"}
    missing = [target for target in adapter.target_modules if target not in linear]
    if missing:
        raise InputError(
            f"adapter.target_modules: {', '.join(missing)} matches no linear layer of the base; "
            f"it has {', '.join(sorted(linear))}"
        )
    return get_peft_model(model, lora_config(adapter, base_name), autocast_adapter_dtype=True)


@dataclass(frozen=True)
class ParameterReport:
    """What is trained.

    Attributes:
        matched: target name -> number of layers that carry it.
        num_trainable: parameters that train.
        num_total: all parameters, adapter included.
        dtypes: "base" or "trained" -> the types found there.
    """

    matched: dict[str, int]
    num_trainable: int
    num_total: int
    dtypes: dict[str, list[str]]

    def lines(self) -> list[str]:
        """The report for the terminal."""
        share = 100 * self.num_trainable / self.num_total
        result = [
            f"model    {self.num_trainable:,} of {self.num_total:,} parameters train "
            f"({share:.2f} %)"
        ]
        if self.matched:
            found = ", ".join(f"{name} x{count}" for name, count in self.matched.items())
            result.append(f"         adapter on {found}")
        types = "; ".join(f"{part} {', '.join(names)}" for part, names in self.dtypes.items())
        return [*result, f"         dtypes: {types}"]


def report_parameters(model: torch.nn.Module) -> ParameterReport:
    """Counts trainable and total parameters and the layers that an adapter matched."""
    matched: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            short = name.rsplit(".", 1)[-1]
            matched[short] = matched.get(short, 0) + 1
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    num_trainable = sum(p.numel() for p in trained)
    dtypes = {"trained": _dtype_names(trained)} | ({"base": _dtype_names(frozen)} if frozen else {})
    return ParameterReport(matched, num_trainable, num_trainable + _num_stored(frozen), dtypes)


def _dtype_names(parameters: list[torch.nn.Parameter]) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in parameters})


def _num_stored(parameters: list[torch.nn.Parameter]) -> int:
    """Parameters, counting a packed 4-bit tensor by the shape it stands for."""
    return sum(
        state.shape.numel() if (state := getattr(p, "quant_state", None)) else p.numel()
        for p in parameters
    )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the adapter in PEFT's own format, without the model card PEFT would add."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(
    model: LlamaForCausalLM, folder: Path, base_fingerprint: str | None = None
) -> PeftModel:
    """A published adapter on its base, every key accounted for.

    Args:
        base_fingerprint: of the base under `model`; None where there is none to compare.

    Raises:
        CheckFailed: the folder differs from its manifest, the base is another one, keys are
            missing, unexpected or of another shape.
    """
    facts = verify(folder)["facts"]
    recorded = facts.get("base_fingerprint")
    if base_fingerprint and recorded != base_fingerprint:
        raise CheckFailed(
            f"{folder}: was trained on a base with fingerprint {recorded}; "
            f"this base has {base_fingerprint}"
        )
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    weights = load_peft_weights(str(folder), device="cpu")
    _check_keys(folder, peft_model, weights)
    set_peft_model_state_dict(peft_model, weights)
    peft_model.requires_grad_(False)
    return peft_model.eval()


def _check_keys(folder: Path, model: PeftModel, weights: Mapping[str, torch.Tensor]) -> None:
    expected = {
        name.replace(".default.", "."): p.shape
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    differing = sorted(set(expected) ^ set(weights))
    if differing:
        shown = ", ".join(differing[:5]) + (" …" if len(differing) > 5 else "")
        raise CheckFailed(f"{folder}: {len(differing)} adapter keys missing or unexpected: {shown}")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise CheckFailed(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, the base and "
                f"adapter_config.json ask for {tuple(shape)}"
            )


def fingerprint_of_files(paths: list[Path]) -> dict[str, str]:
    """sha256 of each weight file, by name."""
    return {path.name: sha256_of(path) for path in sorted(paths)}
