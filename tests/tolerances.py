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

PACKED_FLOAT32 = 2e-5
"""Logits and gradients of packed documents against each alone, relative to the largest entry;
measured 1.5e-6. A lost boundary moves them by 1.3."""

PACKED_BFLOAT16 = 4e-2
"""Logits of packed documents in bfloat16 against float32 and against eager bfloat16, root mean
square relative to that of the logits; measured 1.5e-2. A lost boundary: 1.1."""

ATTENTION_FLOAT32 = 1e-5
"""One attention in float32 against the formula in float64 and a dense mask, relative to the
largest entry; measured 2.1e-7, gradients 7.6e-7."""

LOSS_FLOAT32 = 3e-6
"""Losses of single tokens in float32 against a cross entropy in float64 of float32 logits, relative
to the largest; measured 2.8e-7. A label shifted by one: 0.23."""

HELDOUT_REFERENCE = 2e-7
"""The held-out loss against transformers' own float32 mean of each document, eager attention,
relative; measured 2.0e-8."""

HELDOUT_BATCHES = 2e-8
"""The held-out loss, a float64 sum of float32 losses, for batches of 1 to all, relative; measured
1.1e-9. The mean of the rows' means differs by 4.6e-3, of batches of 2 by 8.7e-3."""

HELDOUT_ROWS = 3e-6
"""The loss of one document in batches of 1 to all, relative: no averaging of float32's roundings;
measured 2.8e-7."""

TWO_RANKS_ADAPTER = 1e-3
"""An adapter after eight AdamW steps on gradients summed in another order (by gloo), relative to
the largest entry: Adam divides by the gradient's own size, so small ones amplify the difference."""
