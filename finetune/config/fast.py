"""`fast:` the parts of a training step that are our own; each has a plain twin."""

from __future__ import annotations

from finetune.config.section import Section


class FastSection(Section):
    """Parts of the training step, each to be switched off for a comparison.

    Those of the model compute what their twins compute, in another order of sums: equal to
    rounding, not to the bit. Evaluation, merge and export never use them, except for attention."""

    attention: bool = True
    """Attention within each packed document, without a mask over the row; on a GPU all of them in
    one call of torch's FlashAttention, tried on the first rows. false: torch's attention with a
    dense mask."""

    lora: bool = True
    """Base and adapter of a projection as one function, in the type of the base (A, B and their
    gradients stay float32), also of 4 bits; false: PEFT's own layers. Only plain LoRA has it;
    what needs more (DoRA, int8, float16 …) is PEFT's own in any case."""

    products: bool = True
    """Where a CPU has AVX-512 and is not Intel's, the float32 products of training by
    oneDNN, which uses it; false: by MKL, which does not, as torch has them. Where products are
    oneDNN's, bfloat16 included, rows are filled up to a multiple of 16 tokens, and `last_layer`
    waits until it saves more than its kernels for new sizes cost; false: neither."""

    pointwise: bool = True
    """RMSNorm, rotary embedding and SwiGLU as one function each (with `lora`, SwiGLU and the down
    projection are one); false: transformers' own."""

    beginnings: bool = True
    """What documents of a row have in common at their beginning (a template, a system message, a
    question with several answers) is computed once, where that is a sixteenth of the row or more;
    false: for each document. Not where dropout is drawn, nor without `attention`."""

    last_layer: bool = True
    """Behind the last layer's attention only the tokens that the loss reads go on; false: all of
    them. Where dropout is drawn in that layer, all do in any case."""

    loss: bool = True
    """Head and cross entropy on a part of the vocabulary at a time, gradients made with the loss;
    false: all logits of the supervised tokens are held."""

    allocator: bool = True
    """On a CPU with glibc, memory that a step freed is kept for the next one; false: glibc's own
    ways. Settings of glibc in the environment stand in any case. Not a number changes."""
