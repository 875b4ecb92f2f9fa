"""A Llama's layers with the fast parts put in: the same parameters under the same names.

Only `forward` of attention, MLP, norms and linear layers is replaced, on the instances of one
model, and only while gradients are recorded: evaluation, generation and every other loader run the
libraries' own code. A projection that `lora.projection_of` does not know as plain LoRA runs it in
training too.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from finetune.config import FastSection
from finetune.fast.attention import DOCUMENT_ATTENTION, document_attention
from finetune.fast.beginnings import draws_dropout
from finetune.fast.linear import goes_to_onednn, linear
from finetune.fast.lora import (
    Projection,
    project,
    project_swiglu,
    projection_of,
    type_of_products,
)
from finetune.fast.place import on_cpu
from finetune.fast.pointwise import rms_norm, rotate, swiglu
from finetune.fast.products import makes_kernels

# FLOP that the last layer has to save where it needs kernels of its own: as long as they take.
LEAST_SAVED = 1 << 33


def speed_up(model: torch.nn.Module, parts: FastSection) -> None:
    """Replaces `forward` of a model's attention, MLP, norms and linear layers, as `parts` says.

    Args:
        model: a Llama on `document_attention`, with or without an adapter; changed in place.
    """
    ours: dict[type, Callable[..., Any]] = {}
    if parts.lora or parts.pointwise or parts.last_layer:
        ours |= {LlamaAttention: _attention, LlamaMLP: _mlp}
    if parts.pointwise:
        ours[LlamaRMSNorm] = _norm
    if parts.last_layer:
        ours[LlamaDecoderLayer] = _layer
    if parts.products:
        ours[torch.nn.Linear] = _linear
    for module in model.modules():
        if type(module) in ours:
            forward = _while_gradients_are_recorded(ours[type(module)], parts)
            module.forward = types.MethodType(forward, module)


def _while_gradients_are_recorded(ours: Callable[..., Any], parts: FastSection) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cached = kwargs.get("past_key_values") is not None
        if not torch.is_grad_enabled() or cached or _has_other_attention(self):
            return type(self).forward(self, *args, **kwargs)
        return ours(self, parts, *args, **kwargs)

    return forward


def _has_other_attention(module: Any) -> bool:
    """Whether somebody chose another attention than ours for this model."""
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", DOCUMENT_ATTENTION) != DOCUMENT_ATTENTION


def _attention(
    self: Any,
    parts: FastSection,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: None = None,
    kept: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `LlamaAttention.forward` of transformers 5.23, without a cache; of the `kept` tokens."""
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    layers = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (y.view(heads).transpose(1, 2) for y in _together(hidden_states, parts, layers))
    if parts.pointwise:
        q, k = (rotate(x, *position_embeddings) for x in (q, k))
    else:
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    dropout = self.attention_dropout if self.training else 0.0
    attended, _ = document_attention(
        self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
    )
    rows = attended.reshape(*hidden_states.shape[:-1], -1)
    rows = rows if kept is None else rows[:, kept]
    return _together(rows, parts, (self.o_proj,))[0], None


def _layer(
    self: Any,
    parts: FastSection,
    hidden_states: torch.Tensor,
    *,
    read: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """As `LlamaDecoderLayer.forward`; of the last, tokens that nobody reads come out as zeros.

    Args:
        read: (tokens,) places in the row that the loss reads; None for all.
    """
    attention = self.self_attn
    if (
        read is None
        or attention.layer_idx != attention.config.num_hidden_layers - 1
        or draws_dropout(self)
        or _has_other_attention(attention)
        or not _pays(self, parts, hidden_states, len(read))
    ):
        result: torch.Tensor = type(self).forward(self, hidden_states, **kwargs)
        return result
    attended, _ = attention(self.input_layernorm(hidden_states), kept=read, **kwargs)
    rows = hidden_states[:, read] + attended
    rows = rows + self.mlp(self.post_attention_layernorm(rows))
    return torch.zeros_like(hidden_states, dtype=rows.dtype).index_copy(1, read, rows)


def _pays(layer: Any, parts: FastSection, hidden_states: torch.Tensor, num_read: int) -> bool:
    """Whether a layer that drops tokens saves more than the kernels for those it keeps cost."""
    dtype = type_of_products(hidden_states, layer.input_layernorm.weight.dtype)
    if not on_cpu(hidden_states) or not makes_kernels(parts.products, dtype):
        return True
    weights = sum(parameter.numel() for parameter in layer.mlp.parameters())
    return 4 * (hidden_states.shape[1] - num_read) * weights >= LEAST_SAVED


def _mlp(self: Any, parts: FastSection, x: torch.Tensor) -> torch.Tensor:
    gate, up = _together(x, parts, (self.gate_proj, self.up_proj))
    if not parts.pointwise:
        return _together(self.act_fn(gate) * up, parts, (self.down_proj,))[0]
    down = _fast_projection(gate, parts, self.down_proj)
    if down is not None and down.dropout is None:
        return project_swiglu(gate, up, down, parts.products)
    return _together(swiglu(gate, up), parts, (self.down_proj,))[0]


def _linear(self: Any, parts: FastSection, x: torch.Tensor) -> torch.Tensor:
    if goes_to_onednn(self, x, parts.products):
        return linear(x, self.weight)
    result: torch.Tensor = type(self).forward(self, x)
    return result


def _norm(self: Any, parts: FastSection, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _together(
    x: torch.Tensor, parts: FastSection, layers: tuple[torch.nn.Module, ...]
) -> list[torch.Tensor]:
    """What layers make of one input: those under plain LoRA together, the others by themselves."""
    found = [_fast_projection(x, parts, layer) for layer in layers]
    fast = [projection for projection in found if projection is not None]
    made = iter(project(x, fast, parts.products) if fast else ())
    return [
        layer(x) if projection is None else next(made)
        for layer, projection in zip(layers, found, strict=True)
    ]


def _fast_projection(
    x: torch.Tensor, parts: FastSection, layer: torch.nn.Module
) -> Projection | None:
    """None where the layer runs itself."""
    projection = projection_of(layer) if parts.lora else None
    # float16 ends at 6e-8: the small gradients inside an adapter need PEFT's float32 products
    if projection is None or type_of_products(x, projection.weight.dtype) == torch.float16:
        return None
    return projection
