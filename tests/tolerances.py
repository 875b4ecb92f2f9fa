"""How equal two routes to one number must be, and why; measured values are a tenth or less."""

from __future__ import annotations

SUM_ORDER_FLOAT32 = 1e-6
"""The same float32 sum in another order, relative to the largest entry of a tensor."""
