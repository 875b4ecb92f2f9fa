"""Rows -> examples: what the columns mean, by their documented shape or by the config's word."""

from __future__ import annotations

from finetune.shapes.detection import detect_shape
from finetune.shapes.example import Example, Message, iter_answers
from finetune.shapes.layouts import SHAPES, to_examples
from finetune.shapes.reading import read_examples

__all__ = [
    "SHAPES",
    "Example",
    "Message",
    "detect_shape",
    "iter_answers",
    "read_examples",
    "to_examples",
]
