"""How equal two routes to one number must be, and why; measured values are a tenth or less."""

from __future__ import annotations

SUM_ORDER_FLOAT32 = 1e-6
"""Gradients of one step cut into micro-batches in other ways, packed or recomputed: the norm of the
difference, relative; measured 4.4e-7 (a single tensor: 8.0e-7). A mean of means: above 1e-2."""

BFLOAT16_GRADIENT = 0.1
"""The gradient of one tensor through bfloat16 products (8 bits of mantissa) against float32: the
norm of the difference, relative; measured 2.7e-2."""

MERGED_LOGITS_FLOAT32 = 1e-4
"""Logits of W + s·B·A against W and B·A apart, in float32, where logits are about 1 to 2; measured
1.1e-5. Trained against not: above 0.1."""

MERGED_KL_LOW_PRECISION = 5e-3
"""Nats a token between attached and merged, where the merged weights are rounded to the type;
measured 2.6e-4 in bfloat16, 4.1e-6 in float16."""

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

HELDOUT_FLOAT64 = 1e-9
"""The held-out loss of a model in float64, packed in batches of 1 to 16 and padded left or right by
plain transformers (its norms in float64 too), relative; measured 2.2e-16. Attention in float32
inside a float64 model, which ours once had: 4.2e-9."""

HELDOUT_PADDED = 1e-6
"""The same in float32; measured 3.8e-9."""

HELDOUT_ROWS = 3e-6
"""The loss of one document in batches of 1 to all, relative: no averaging of float32's roundings;
measured 2.8e-7."""

TWO_RANKS_ADAPTER = 2e-5
"""A tensor of an adapter after eight AdamW steps on gradients summed in another order, by gloo: the
norm of the difference, relative; measured 1.0e-6, the losses of the steps 5.5e-8."""

STEP_ZERO_FLOAT32 = 1e-4
"""Logits at step 0 against the base's where an initialisation takes s·B0·A0 out of W and adds it
again (PiSSA, OLoRA), float32; measured 1.0e-5. Every other method: equal bit for bit."""

RELOADED_FLOAT32 = 1e-4
"""Logits of the trained model in memory, of the published adapter in our loader and in plain PEFT,
float32; measured 1.4e-5 for PiSSA, whose published adapter is another sum, and 0 for the others."""

LAYERWISE_PROOF = 0.3
"""Figures of a merge to bfloat16, layer by layer and from whole models, relative: their bfloat16
products are summed in another order; measured 3.0e-2 (the KL)."""

GGUF_FLOAT32 = 2.5e-6
"""Logits of a GGUF file by the float64 reference against its source by transformers in float64, in
f32 or the stored type: root mean square relative to that of the logits; measured 2.2e-7 (the
float32 of RoPE's frequencies). One matrix in the other rotary layout: above 1e-2."""

GGUF_FLOAT16 = 1e-2
"""The same with the weights rounded to f16; measured 9.2e-4."""

GGUF_BFLOAT16 = 7e-2
"""The same, bf16; measured 6.8e-3."""

GGUF_Q8_0 = 2.5e-1
"""The same, q8_0 (8 bits and a scale for 32 weights); measured 2.3e-2."""

LLAMA_CPP = 5e-3
"""llama.cpp's own logits on an exported f32 file, with and without an adapter, against transformers
in float64, as above; measured 5.5e-4 (its keys and values are kept in f16). No adapter: 0.2."""

DRAWN_POINTS = 1e-2
"""Places of a drawn line's points and the numbers they stand for, in points of 1/72 inch; measured
4.9e-7 (the digits that are written)."""

SCORE_FORMULAS = 1e-12
"""ROUGE-L, BLEU and chrF against their formulas, from 0 to 1, in float64; measured 1.1e-16."""

PUBLISHED_SCORES = 1e-5
"""The same against the examples that rouge-score and sacrebleu publish, as far as their digits go;
measured 5.6e-6 (three digits after the point, of 100)."""

HARNESS_LOG_LIKELIHOOD = 5e-6
"""Log-likelihoods by lm-evaluation-harness against our own, relative, in float32;
measured 4.4e-7. A second BOS that is scored, in plain text: above 1e-2."""

FAST_FLOAT64 = 1e-12
"""A fast part against its plain twin, both in float64: values and gradients, the norm of the
difference, relative; measured 2.6e-16."""

FAST_FLOAT32 = 2e-6
"""A fast part in float32 against its twin in float64, the same; measured 1.8e-7."""

FAST_BFLOAT16 = 2e-2
"""The same in bfloat16, whose mantissa has 8 bits; measured 7.5e-3. Through all layers of a small
Llama eight times that is allowed; measured 3.1e-2."""

FAST_GRADIENT_FLOAT32 = 2e-5
"""A whole Llama of small size with the fast parts against the libraries' layers, float32: losses
and the gradient of any tensor; measured 2.3e-6. A projection left out: above 0.1."""
