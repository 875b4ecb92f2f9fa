"""RMSNorm, rotary embedding and SwiGLU against transformers' and against differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import FAST_BFLOAT16, FAST_FLOAT32, FAST_FLOAT64
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from finetune.fast.pointwise import rms_norm, rotate, swiglu

TYPES = [
    (torch.float64, FAST_FLOAT64),
    (torch.float32, FAST_FLOAT32),
    (torch.bfloat16, FAST_BFLOAT16),
]


def numbers(*shape, dtype=torch.float64, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def angles(tokens: int, width: int):
    steps = torch.arange(tokens, dtype=torch.float64)[None, :, None]
    turns = steps * (0.7 ** torch.arange(width // 2, dtype=torch.float64))
    both = torch.cat([turns, turns], -1)
    return both.cos(), both.sin()


def compared(ours, plain, inputs) -> float:
    """Values and gradients, the largest relative difference; the plain side in float64."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = ours(*inputs), plain(*wide)
    weights = torch.linspace(-1, 2, found.shape[-1], dtype=torch.float64)
    (found.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(found.detach(), expected.detach())]
    pairs += [(a.grad, b.grad) for a, b in zip(inputs, wide, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    assert all(t.grad.dtype == t.dtype for t in inputs)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def plain_norm(x, weight):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


@pytest.mark.parametrize(("dtype", "limit"), TYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_rms_norm(dtype, limit, scale):
    x = (numbers(2, 7, 32).detach() * scale).to(dtype).requires_grad_()
    weight = numbers(32, seed=1, dtype=dtype)
    assert compared(lambda x, w: rms_norm(x, w, 1e-3), plain_norm, [x, weight]) < limit


def test_rms_norm_is_transformers():
    module = LlamaRMSNorm(32, eps=1e-3)
    module.weight.data = numbers(32, seed=1, dtype=torch.float32).detach()
    x = numbers(2, 7, 32, dtype=torch.float32).detach()
    assert torch.allclose(rms_norm(x, module.weight, 1e-3), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "limit"), TYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_rotation(dtype, limit, batch):
    cos, sin = (t.expand(batch, -1, -1) for t in angles(9, 16))
    x = numbers(batch, 4, 9, 16, dtype=dtype)
    plain = lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0]  # noqa: E731
    assert compared(lambda x: rotate(x, cos.to(dtype), sin.to(dtype)), plain, [x]) < limit


def test_rotation_of_a_transposed_view():
    """As attention has it: (batch, tokens, heads, head_dim), transposed."""
    cos, sin = angles(9, 16)
    x = numbers(1, 9, 4, 16).detach().transpose(1, 2)
    assert torch.allclose(rotate(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0])


@pytest.mark.parametrize(("dtype", "limit"), TYPES)
def test_swiglu(dtype, limit):
    inputs = [numbers(5, 33, dtype=dtype), numbers(5, 33, seed=1, dtype=dtype)]
    assert compared(swiglu, lambda gate, up: F.silu(gate) * up, inputs) < limit


def test_gradients_are_the_differences_of_the_values():
    x, weight, gate = numbers(3, 8), numbers(8, seed=1), numbers(3, 8, seed=2)
    cos, sin = angles(3, 8)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    assert check(swiglu, (x, gate))
    assert check(lambda x: rotate(x, cos, sin), (numbers(1, 2, 3, 8),))
