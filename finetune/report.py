"""`report RUN`: a run folder as one HTML file, with the verdict at the top.

The page holds what the folder's files say and asks for nothing else: no network, no script. What is
missing or damaged is named in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from finetune import __version__, pages
from finetune.config import RunConfig
from finetune.reports import charts, tables
from finetune.reports.facts import Facts, read_facts
from finetune.reports.masks import masks_of
from finetune.reports.results import Result
from finetune.reports.verdict import Verdict, judge, summary
from finetune.reports.wording import metric, p_value, points, signed
from finetune.run_folder import find_run
from finetune.sharing import shared_name

PAGE = "report.html"
MAX_PLACES = 100  # of one reason, on the page


def main(argv: Sequence[str]) -> int:
    """The verb `report`."""
    args = _parse(argv)
    target = pages.target_of(args.out, "--out") if args.out is not None else None
    run = find_run(args.run)
    target = target or run.path / PAGE
    facts = read_facts(run)
    verdict = judge(facts)
    page = page_of(facts, verdict)
    pages.write(target, page)
    num_bytes = len(page.encode())
    if args.json:
        found = {"report": str(target), "bytes": num_bytes, "state": facts.state.name}
        print(json.dumps({**found, "verdict": verdict.text}, ensure_ascii=False))
    else:
        print(f"report   {target} ({num_bytes / 1000:,.0f} kB)")
        print("\n".join(summary(verdict)))
    for problem in facts.problems:
        print(f"warning: {problem}", file=sys.stderr)
    return 0


def page_of(facts: Facts, verdict: Verdict) -> str:
    """The page of a run's facts; the rows' masks are rendered now."""
    data = facts.data
    return pages.render(
        "report.html",
        facts=facts,
        verdict=verdict,
        version=__version__,
        base=_base_name(facts.config),
        heldout=tables.heldout(facts.training),
        commands="\n".join(facts.commands()),
        figures=[(chart, Markup(chart.svg)) for chart in charts.draw(facts.training)],  # noqa: S704
        thinning_note=charts.thinning_note(facts.training),
        cards=tables.cards(facts),
        results=[_shown(result) for result in facts.results],
        masks=masks_of(facts.config, data),
        reasons=list(tables.reasons(data)),
        notes=tables.notes(data),
        ledger=tables.ledger(data),
        overlap=tables.overlap(data),
        mixture=tables.mixture(data),
        merge=tables.merge(facts.merge),
        chosen=tables.settings([s for s in facts.settings if not s.is_default]),
        defaults=tables.settings([s for s in facts.settings if s.is_default]),
        environment=tables.environment(facts.environment),
        max_places=MAX_PLACES,
    )


def _base_name(config: RunConfig | None) -> str:
    if config is None:
        return "a base that is not known"
    if config.base.path is not None:
        return shared_name(config.base.path)
    given = config.base.architecture
    return given if isinstance(given, str) else "random weights of a given shape"


def _shown(result: Result) -> dict[str, Any]:
    """What the template shows of one evaluation."""
    return {
        "result": result,
        "scores": tables.scores(result),
        "breakdowns": list(tables.breakdowns(result)),
        "changed": list(tables.changed(result)),
        "differences": [
            {
                "of": found,
                "metric": metric(found.metric),
                "amounts": [
                    (signed if found.metric == "loss" else points)(value)
                    for value in (found.difference, found.low, found.high)
                ],
                "p": p_value(found.p_value),
                "num_rows": found.num_better + found.num_same + found.num_worse,
            }
            for found in result.differences
        ],
        "samples": [(metric(task), samples) for task, samples in result.samples.items()],
    }


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    description = "A run as one HTML page: verdict, curves, comparison, samples, data, proof."
    parser = argparse.ArgumentParser(prog="python -m finetune report", description=description)
    parser.add_argument("run", nargs="?", help="a run folder; left out: the newest run")
    parser.add_argument("--out", metavar="FILE", help=f"the page's file (default: RUN/{PAGE})")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(list(argv))
