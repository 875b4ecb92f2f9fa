"""Initialisations of LoRA that look at the run's own rows, or at what quantising took: EVA, CorDA,
LoftQ.

    EVA     A = the first r right singular vectors of what the layer reads, B = 0
    CorDA   W·C = U·S·V, C the covariance of what the layer reads; the r largest directions of
            W = (U·S)·(V·C⁻¹) move into the adapter, as with PiSSA
    LoftQ   s·B·A = the rank-r part of W - dequantised(W), so that step 0 is near the full base

Sources: EVA, Paischer et al. 2024, arXiv:2410.07170; CorDA, Yang et al. 2024, arXiv:2406.05223
(its knowledge-preserving mode is not offered); LoftQ, Li et al. 2023, arXiv:2310.08659 (one step
of its alternation: the base's codes stay as they are). EVA and CorDA run PEFT's code; PEFT 0.21's
own LoftQ for a loaded base runs on CUDA alone and leaves s out, so that lora_alpha 2r starts with
twice the correction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.integrations import dequantize_bnb_weight

from finetune.errors import InputError
from finetune.fast.attention import no_mask
from finetune.fast.loss import IGNORED, Packed

NUM_TOKENS = 1 << 16  # of the rows that are looked at; CorDA's authors use 256 rows of 2048
MAX_BATCHES = 2000  # until EVA's directions stand still


@dataclass(frozen=True)
class StartInputs:
    """What an initialisation may look at.

    Attributes:
        rows: packed rows of the training side, in the order of the seed.
        weight_on_disk: a tensor's name in the base -> its numbers before quantising, in the type
            the base is held in.
    """

    rows: Sequence[Packed]
    weight_on_disk: Callable[[str], torch.Tensor]


def forward_inputs(packed: Packed, device: torch.device) -> dict[str, Any]:
    """What the bare model is called with."""
    return {
        "input_ids": packed.input_ids.to(device),
        "position_ids": packed.position_ids.to(device),
        "attention_mask": no_mask(device),
        "document_lengths": packed.document_lengths,
        "use_cache": False,
        "logits_to_keep": 1,
    }


def prepare_corda(model: Any, config: Any, inputs: StartInputs) -> None:
    """Measures what every targeted layer reads; PEFT's `corda` then finds it there."""
    config.corda_config = CordaConfig(corda_method="ipm")

    def run() -> None:
        for packed in inputs.rows:
            model(**forward_inputs(packed, model.device))

    preprocess_corda(model, config, run_model=run)


def clean_corda(model: torch.nn.Module) -> None:
    """Takes away what `prepare_corda` left on the layers."""
    for module in model.modules():
        if hasattr(module, "eigens"):
            del module.eigens


def start_eva(model: PeftModel, inputs: StartInputs) -> None:
    """Puts A where the layer's inputs vary most; ranks stay as the config says.

    Raises:
        InputError: fewer tokens in a row than ranks, or no convergence.
    """
    config: Any = model.peft_config["default"]
    config.eva_config = EvaConfig(rho=1.0)
    enough = [row for row in inputs.rows if _num_trained(row) >= _largest_rank(model)]
    if not enough:
        raise InputError(
            f"adapter.init: eva needs rows of at least {_largest_rank(model)} trained tokens (the "
            "rank) once packed; raise data.max_length, or lower adapter.r"
        )
    calls = iter(range(MAX_BATCHES))

    def forward(peft_model: Any, row: _Row) -> None:
        if next(calls, None) is None:
            raise InputError(
                f"adapter.init: eva found no stable directions in {MAX_BATCHES} batches; lower "
                "adapter.r, or give more rows"
            )
        peft_model(**forward_inputs(row.packed, peft_model.device))

    initialize_lora_eva_weights(
        model,
        dataloader=[_Row(packed) for packed in enough],
        forward_fn=forward,
        prepare_model_inputs_fn=lambda row, _: row.packed.labels[0] != IGNORED,
        prepare_layer_inputs_fn=lambda read, mask, _: _first(read)[0][mask.to(_first(read).device)],
        gather_distributed_inputs=False,  # every rank looks at the same rows
        show_progress_bar=False,
    )
    config.eva_config, config.init_lora_weights = None, True  # from here on a plain LoRA


@dataclass(frozen=True)
class _Row:
    """A row as PEFT hands it on: it asks whatever it gets to move to the device."""

    packed: Packed

    def to(self, device: torch.device) -> _Row:
        """Itself; `forward_inputs` moves what is in it."""
        return self


def start_loftq(model: PeftModel, inputs: StartInputs) -> None:
    """Gives every adapter the largest part of what quantising took from its layer."""
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        stored: Any = layer.get_base_layer().weight
        whole = inputs.weight_on_disk(f"{name}.weight").to(stored.device).float()
        lost = whole - dequantize_bnb_weight(stored).float()
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        rank, root = layer.r["default"], s.sqrt()
        b = u[:, :rank] * root[:rank] / layer.scaling["default"]
        a = root[:rank, None] * vh[:rank]
        layer.lora_A["default"].weight.data = a.contiguous()
        layer.lora_B["default"].weight.data = b.contiguous()


def _largest_rank(model: Any) -> int:
    return max(m.r["default"] for m in model.modules() if isinstance(m, LoraLayer))


def _num_trained(packed: Packed) -> int:
    return int((packed.labels != IGNORED).sum())


def _first(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return tensor
