"""How equal two routes to one number must be, and why; measured values are a tenth or less."""

from __future__ import annotations

SUM_ORDER_FLOAT32 = 1e-6
"""The same float32 sum in another order, relative to the largest entry of a tensor."""

BFLOAT16_GRADIENT = 0.1
"""A gradient through bfloat16 products (8 bits of mantissa), relative to its largest entry."""
