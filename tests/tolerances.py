"""How equal two routes to one number must be, and why; measured values are a tenth or less."""

from __future__ import annotations

SUM_ORDER_FLOAT32 = 1e-6
"""The same float32 sum in another order, relative to the largest entry of a tensor."""

BFLOAT16_GRADIENT = 0.1
"""A gradient through bfloat16 products (8 bits of mantissa), relative to its largest entry."""

MERGED_LOGITS_FLOAT32 = 1e-4
"""Logits of W + s·B·A against W and B·A apart, in float32; logits themselves are about 1."""

MERGED_KL_LOW_PRECISION = 5e-3
"""Nats a token between attached and merged, where the merged weights are rounded to 8 bits."""
