"""What was measured, as a table in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

_COLUMNS = (
    *("", "step, s", "min–max", "tokens/s", "supervised/s", "of TRL packed", "of the roofline"),
    *("memory, MiB", "loss, largest difference"),
)
_REFERENCE, _IN_NF4 = "trl packed", "in nf4"  # a base in 4 bits is another model


def lines(run: dict[str, Any], warm: int) -> str:
    """One run: a dtype under an allocator setting.

    Args:
        run: `gflops`, `useful_flops` a step, `notes` by contender.
        warm: steps left out of each process.
    """
    gflops = statistics.median(run["gflops"])
    head = f"{run['dtype']}, allocator: {run['allocator']}; matrix product {gflops:.0f} GFLOP/s"
    rates = {name: _rate(run, name, warm) for name in run["notes"]}
    rows = [_row(run, name, warm, rates, gflops) for name in run["notes"]]
    failed = [f"{name}: failed with {code}" for name, code in run.get("failed", {}).items()]
    table = [f"| {' | '.join(cells)} |" for cells in _ruled(rows)]
    return "\n".join([head, "", *table, *([""] if failed else []), *failed])


def _ruled(rows: list[list[str]]) -> list[list[str]]:
    return [list(_COLUMNS), ["---", *["---:"] * (len(_COLUMNS) - 1)], *rows]


def _counts(run: dict[str, Any], name: str, key: str) -> list[float]:
    """Tokens of each step; a contender with rows of its own has its own."""
    own = run["notes"][name][0].get(key)
    return own or [step[key] for step in run["useful_flops"]]


def _best_seconds(run: dict[str, Any], name: str) -> list[float]:
    """Of each step the faster of its rounds, which had the same rows."""
    return [
        min(seconds) for seconds in zip(*(n["seconds"] for n in run["notes"][name]), strict=True)
    ]


def _rate(run: dict[str, Any], name: str, warm: int) -> float:
    """Tokens a second over the steps counted."""
    return sum(_counts(run, name, "tokens")[warm:]) / sum(_best_seconds(run, name)[warm:])


def _row(
    run: dict[str, Any], name: str, warm: int, rates: dict[str, float], gflops: float
) -> list[str]:
    notes = run["notes"][name]
    all_seconds = [s for n in notes for s in n["seconds"][warm:]]
    supervised = sum(_counts(run, name, "supervised")[warm:]) / sum(_best_seconds(run, name)[warm:])
    flops = _flops(run, name, warm) / sum(_best_seconds(run, name)[warm:]) / 1e9
    memory = statistics.median(
        n["memory_mib"]["peak"] - n["memory_mib"]["after_imports"] for n in notes
    )
    ratio = rates[name] / rates[_REFERENCE] if _REFERENCE in rates else None
    return [
        name,
        f"{statistics.median(all_seconds):.3f}",
        f"{min(all_seconds):.2f}–{max(all_seconds):.2f}",
        f"{rates[name]:.0f}",
        f"{supervised:.0f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{100 * flops / gflops:.0f} %",
        f"{memory:.0f}",
        _loss_difference(run, name),
    ]


def _flops(run: dict[str, Any], name: str, warm: int) -> float:
    """Useful FLOPs of the steps counted, by the tokens the contender saw."""
    steps = run["useful_flops"][warm:]
    packed = sum(step["flops"] for step in steps)
    tokens = sum(_counts(run, name, "tokens")[warm:])
    return float(packed * tokens / sum(step["tokens"] for step in steps))


def _loss_difference(run: dict[str, Any], name: str) -> str:
    """From TRL's losses on the same packs, relative, the largest of all steps."""
    reference_name = f"{_REFERENCE} {_IN_NF4}" if _IN_NF4 in name else _REFERENCE
    notes, reference = run["notes"][name][0], run["notes"].get(reference_name)
    has_same = _counts(run, name, "tokens") == [step["tokens"] for step in run["useful_flops"]]
    if reference is None or name == reference_name or not has_same:
        return ""
    pairs = zip(notes["losses"], reference[0]["losses"], strict=True)
    return f"{max(abs(a - b) / b for a, b in pairs):.1e}"
