"""`eval TARGET`: models loaded fresh from disk, on the same held-out rows and questions."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import harness, scoreboard, witness
from finetune.artifact import make_folder, write_json, write_text
from finetune.errors import InputError
from finetune.inference import Opened, folder_config, open_folder, open_variant, trained_variant
from finetune.run_folder import RunFolder
from finetune.scoring import Scores, probe, score_rows_and_tasks
from finetune.subject import Rows, Subject, find_subject

DEFAULT_WINDOW = 1024  # tokens; no more than the context of the model


def main(argv: Sequence[str]) -> int:
    """The verb `eval`."""
    args = _parse(argv)
    if args.probe:
        return _main_probe(args)
    subject = find_subject(args.target, args.against, args.run)
    about = _about(args)
    if args.lm_eval:
        names = [name for name in args.lm_eval.split(",") if name]
        scores, found = harness.evaluate(subject, names, args.lm_eval_tasks, args.limit)
        about |= found
    else:
        scores = _scores(subject, args)
    against = [scoreboard.paired(scores[0], other) for other in scores[1:]]
    result = {**scoreboard.as_json(scores, against), **about}
    if subject.run:
        _save(subject.run, result, scores, args)
    print(json.dumps(result, indent=2) if args.json else scoreboard.table(scores, against))
    if args.fail_if_worse:
        scoreboard.refuse_worse(against)
    return 0


def _scores(subject: Subject, args: argparse.Namespace) -> list[Scores]:
    """Every model of the subject, one after the other, on the rows of the first."""
    store = subject.run.eval / "answers" if subject.run else None
    scores: list[Scores] = []
    rows: Rows | None = None
    for name in subject.models:
        opened = subject.open(name)
        if rows is None:
            rows = _rows(subject, opened, args)
        rows.refuse_another_tokenizer(opened)
        found = score_rows_and_tasks(
            opened, rows.documents, rows.questions, subject.config.eval, store
        )
        if rows.num_bytes is not None:
            found = replace(found, num_bytes=(rows.num_bytes,))
        if subject.run and subject.run.witness.exists() and subject.is_own(name):
            kept = witness.divergence(subject.run.witness, opened.model, opened.device)
            found = replace(found, divergence=kept)
        scores.append(found)
        print(f"eval     {opened.name}: {scoreboard.line(found)}", file=sys.stderr)
    return scores


def _rows(subject: Subject, opened: Opened, args: argparse.Namespace) -> Rows:
    if args.text is None:
        return subject.rows(opened, args.data)
    context = opened.base.architecture.context
    window = args.window or min(DEFAULT_WINDOW, context)
    if window > context:
        raise InputError(f"--window {window}: allowed: at most {context}, the model's context")
    return subject.text_rows(opened, args.text, window, args.stride or max(window // 2, 1))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m finetune eval", description=__doc__)
    parser.add_argument("target", nargs="?", help="a run or model folder; left out: the newest run")
    parser.add_argument("--data", type=Path, help="held-out rows (default: the run's own)")
    parser.add_argument("--against", default="", help="base, merged, a folder (comma between)")
    parser.add_argument("--run", help="for a model folder: the run whose rows and format are used")
    parser.add_argument("--text", help="plain text, scored in sliding windows")
    parser.add_argument("--window", type=int, help="tokens of a window (with --text; 1024)")
    parser.add_argument("--stride", type=int, help="new tokens of a window (half of the window)")
    parser.add_argument("--probe", type=Path, help="rows of prompt and answer, as plain text")
    parser.add_argument("--lm-eval", help="tasks of lm-evaluation-harness (comma between)")
    parser.add_argument("--lm-eval-tasks", type=Path, help="a folder that describes such tasks")
    parser.add_argument("--limit", type=int, help="only so many documents (with --lm-eval)")
    parser.add_argument(
        "--fail-if-worse", action="store_true", help="exit 3 if surely worse (5 %%)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(list(argv))
    _refuse_idle(args)
    return args


def _refuse_idle(args: argparse.Namespace) -> None:
    """Arguments that would change nothing, all of them together."""
    found = []
    if args.fail_if_worse and not args.against:
        found.append("--fail-if-worse has no effect without --against; name what to beat")
    if args.text is None and (args.window or args.stride):
        found.append("--window and --stride have no effect without --text")
    if args.lm_eval is None and (args.lm_eval_tasks or args.limit is not None):
        found.append("--lm-eval-tasks and --limit have no effect without --lm-eval")
    if args.limit is not None and args.limit < 1:
        found.append(f"--limit {args.limit}: allowed: 1 or more documents")
    sources = {"--data": args.data, "--text": args.text, "--probe": args.probe}
    sources["--lm-eval"] = args.lm_eval
    if len(given := [name for name, value in sources.items() if value is not None]) > 1:
        found.append(f"{' and '.join(given)}: one of them at a time")
    if args.window is not None and args.window < 2:
        found.append(f"--window {args.window}: allowed: 2 or more tokens")
    if found:
        raise InputError(found)


def _main_probe(args: argparse.Namespace) -> int:
    if not args.target:
        raise InputError("--probe continues plain text: name the run or model folder to probe")
    target = Path(args.target)
    if (target / "config.yaml").exists():
        run = RunFolder(target)
        opened = open_variant(run, trained_variant(run))
    else:
        opened = open_folder(target, folder_config(target, "pretrain"))
    scores = probe(opened, args.probe)
    print(json.dumps(scores.as_json(), indent=2) if args.json else scoreboard.table([scores]))
    return 0


def _about(args: argparse.Namespace) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about: dict[str, Any] = {"created": now.replace("+00:00", "Z")}
    if args.data:
        about["data"] = str(args.data)
    if args.text:
        about |= {"text": args.text, "window": args.window, "stride": args.stride}
    return about


def _save(
    run: RunFolder, result: dict[str, Any], scores: Sequence[Scores], args: argparse.Namespace
) -> None:
    """The numbers in one file, each model's answers to each task in another."""
    source = args.data or (Path(args.text) if args.text else None)
    stem = source.name.split(".")[0] if source else "lm-eval" if args.lm_eval else "heldout"
    for position, model in enumerate(scores):
        kept = result if position == 0 else result["against"][position - 1]
        for name, task in model.tasks.items():
            task_name = name.replace("/", "_")  # the harness takes any name
            file = f"answers/{stem}.{task_name}.{Path(model.name).name}.jsonl"
            make_folder(run.eval / "answers")
            lines = [json.dumps(answer.as_json(), ensure_ascii=False) for answer in task.answers]
            write_text(run.eval / file, "".join(f"{line}\n" for line in lines))
            kept["tasks"][name]["answers_file"] = file
    make_folder(run.eval)
    write_json(run.eval / f"{stem}.json", result)
