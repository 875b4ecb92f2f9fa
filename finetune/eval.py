"""`eval RUN`: the run's models, loaded fresh from disk, on the same held-out rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import scoreboard
from finetune.artifact import write_json
from finetune.config import RunConfig
from finetune.data import load_data, load_heldout
from finetune.errors import InputError
from finetune.inference import (
    VARIANTS,
    Opened,
    folder_config,
    open_folder,
    open_variant,
    trained_variant,
)
from finetune.prepared import Document
from finetune.run_folder import RunFolder, find_run
from finetune.scoring import Scores, probe, score_model


def main(argv: Sequence[str]) -> int:
    """The verb `eval`."""
    args = _parse(argv)
    if args.probe:
        return _main_probe(args)
    if args.fail_if_worse and not args.against:
        raise InputError("--fail-if-worse has no effect without --against; name what to beat")
    subject = find_subject(args.target, args.against, args.run)
    config = subject.config
    documents: list[Document] = []
    scores: list[Scores] = []
    vocabulary: dict[str, int] = {}
    ask = "exact_match" in config.eval.tasks and config.recipe != "pretrain"
    for name in subject.models:
        opened = subject.open(name)
        vocabulary = vocabulary or opened.base.tokenizer.get_vocab()
        if opened.base.tokenizer.get_vocab() != vocabulary:
            raise InputError(
                f"{name}: has another tokenizer than {subject.models[0]}; not compared"
            )
        documents = documents or heldout_documents(config, opened, args.data)
        batch_size, new_tokens = config.eval.per_device_eval_batch_size, config.eval.max_new_tokens
        scores.append(score_model(opened, documents, batch_size, new_tokens, ask))
        print(f"eval     {opened.name}: {scoreboard.line(scores[-1])}", file=sys.stderr)
    against = [scoreboard.paired(scores[0], other) for other in scores[1:]]
    result = scoreboard.as_json(scores, against)
    if subject.run:
        _save(subject.run, result, args.data)
    print(json.dumps(result, indent=2) if args.json else scoreboard.table(scores, against))
    if args.fail_if_worse:
        scoreboard.refuse_worse(against)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m finetune eval", description=__doc__)
    parser.add_argument("target", nargs="?", help="a run or model folder; left out: the newest run")
    parser.add_argument("--data", type=Path, help="held-out rows (default: the run's own)")
    parser.add_argument("--against", default="", help="base, merged, a folder (comma between)")
    parser.add_argument("--run", help="for a model folder: the run whose rows and format are used")
    parser.add_argument("--probe", type=Path, help="rows of prompt and answer, as plain text")
    parser.add_argument(
        "--fail-if-worse", action="store_true", help="exit 3 if surely worse (5 %%)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(list(argv))


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        config: says how rows are rendered and scored.
        models: variants of the run, or folders; the one asked about first.
        run: None for a model folder of no run.
    """

    config: RunConfig
    models: tuple[str, ...]
    run: RunFolder | None

    def open(self, name: str) -> Opened:
        """One of the models, loaded fresh from disk."""
        if self.run and name in VARIANTS:
            return open_variant(self.run, name)
        if (Path(name) / "config.yaml").exists():
            other = RunFolder(Path(name))
            return open_variant(other, trained_variant(other))
        return open_folder(Path(name), self.config)


def find_subject(target: str | None, against: str = "", run_name: str | None = None) -> Subject:
    """Whether a target is a run or a model folder, and what it is compared with.

    Raises:
        InputError: nothing there, or a comparison that is neither a variant nor a folder.
    """
    others = tuple(name for name in against.split(",") if name)
    unknown = [n for n in others if n not in ("base", "merged") and not Path(n).is_dir()]
    if unknown:
        raise InputError(f"--against {', '.join(unknown)}: neither base, merged nor a folder")
    folder = Path(target) if target else None
    if folder is None or (folder / "config.yaml").exists() or not folder.is_dir():
        run = find_run(target)
        return Subject(run.config(), (trained_variant(run), *others), run)
    beside = folder.parent if (folder.parent / "config.yaml").exists() else None
    if run_name or beside:
        run = find_run(run_name or str(beside))
        return Subject(run.config(), (str(folder), *others), run)
    if {"base", "merged"} & set(others):
        raise InputError(f"{folder}: is a model folder of no run; name the run with --run")
    return Subject(folder_config(folder), (str(folder), *others), None)


def heldout_documents(config: RunConfig, opened: Opened, data: Path | None) -> list[Document]:
    """The rows to score: a file of the caller's, or the run's held-out rows.

    Raises:
        InputError: there are none.
    """
    tokenizer, chat_format = opened.base.tokenizer, opened.base.chat_format
    if data is None and not config.data.train:
        raise InputError("a model folder of no run brings no rows: give --data FILE or --run RUN")
    if data is not None:
        documents, ledger = load_heldout(data, config, tokenizer, chat_format)
        print("\n".join(ledger.lines()), file=sys.stderr)
    else:
        loaded = load_data(config, tokenizer, chat_format)
        documents = loaded.heldout[:]
        print("\n".join(loaded.ledgers[1].lines()), file=sys.stderr)
    if not documents:
        raise InputError("no held-out rows: give data.heldout in the config, or --data FILE")
    return documents


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


def _save(run: RunFolder, result: dict[str, Any], data: Path | None) -> None:
    run.eval.mkdir(exist_ok=True)
    name = f"{data.stem}.json" if data else "heldout.json"
    write_json(run.eval / name, result)
