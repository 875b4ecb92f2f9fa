"""The workload's documents as rows of a dataset, for trainers that take one."""

from __future__ import annotations

from typing import Any

ROWS_IN_A_BATCH = 8  # of the padded run, about as many as two packs hold


def packed_rows(steps: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """Packs as rows, and how many of them are a step."""
    rows = [
        {
            "input_ids": [i for ids, _ in pack for i in ids],
            "labels": [label for _, labels in pack for label in labels],
            "seq_lengths": [len(ids) for ids, _ in pack],
        }
        for packs in steps
        for pack in packs
    ]
    return rows, len(steps[0])


def single_rows(steps: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """Documents as rows in the packs' order, enough for all steps, and how many are a step."""
    documents = [document for packs in steps for pack in packs for document in pack]
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in documents]
    while len(rows) < ROWS_IN_A_BATCH * len(steps):
        rows += rows
    return rows, ROWS_IN_A_BATCH


def counts_of(rows: list[dict[str, Any]], batch: int, steps: int) -> dict[str, list[int]]:
    """Tokens and supervised tokens of each step that takes so many rows in their order."""
    batches = [rows[n * batch : (n + 1) * batch] for n in range(steps)]
    return {
        "tokens": [sum(len(row["input_ids"]) for row in step) for step in batches],
        "supervised": [
            sum(label != -100 for row in step for label in row["labels"]) for step in batches
        ],
    }
