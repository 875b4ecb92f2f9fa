"""A comparison of methods as a table and as a plot."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADER = (
    "| method | held-out loss | exact match, % | rate | trained | KB | ms a step | peak, MiB |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def as_markdown(result: dict[str, Any]) -> str:
    """One line a method, the lowest held-out loss first; ± is half the range over the seeds."""
    rows = sorted(
        result["methods"].items(), key=lambda item: statistics.mean(item[1]["heldout_loss"])
    )
    return "\n".join([HEADER, *(_line(name, row) for name, row in rows)])


def _line(name: str, row: dict[str, Any]) -> str:
    cells = [
        name,
        _spread(row["heldout_loss"], ".4f"),
        _spread([100 * share for share in row["exact_match"]], ".1f"),
        f"{row['learning_rate']:g}",
        f"{row['trainable']:,}",
        f"{row['bytes'] / 1000:,.0f}",
        f"{row['ms_a_step']:.0f}" if "ms_a_step" in row else "–",
        f"{row['peak_mib']:,}" if "peak_mib" in row else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format((max(values) - min(values)) / 2, form)}"


def show(result: dict[str, Any], plot: Path | None) -> None:
    """Prints the table, and draws the plot where one is asked for."""
    print(as_markdown(result))
    if plot:
        draw(result, plot)


def draw(result: dict[str, Any], path: Path) -> None:
    """Held-out loss over the number of trained parameters; bars are the range over the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "methods"  # the same file for the same numbers
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for name, row in result["methods"].items():
        losses = row["heldout_loss"]
        mean = statistics.mean(losses)
        bars = [[mean - min(losses)], [max(losses) - mean]]
        axes.errorbar([row["trainable"]], [mean], yerr=bars, marker="o", capsize=3)
        axes.annotate(
            name, (row["trainable"], mean), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xscale="log", yscale="log", xlabel="trained parameters")
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title(f"{result['steps']} steps on llama-nano, each at its best rate", fontsize=10)
    axes.grid(which="both", alpha=0.2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws a kept result again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    show(json.loads(args.result.read_text(encoding="utf-8")), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
