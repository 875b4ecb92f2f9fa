"""Pretraining and continued pretraining: the next-token loss on plain text.

Each document is BOS, its text and EOS where the text really ends; everything after BOS is
trained. The settings of the LLaMA paper (Touvron et al. 2023, arXiv:2302.13971, section 2.3) are
in `configs/pretrain_nano.yaml`.
"""

from __future__ import annotations

from finetune.recipes import sft
from finetune.recipes.assembly import Parts
from finetune.trainer import OurSeams


def build(parts: Parts) -> OurSeams:
    """The engine of `sft`; what differs is the documents, all of whose tokens are trained."""
    return sft.build(parts)
