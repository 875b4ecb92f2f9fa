"""What `eval` is asked about: which models, on which rows, with which questions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config import RunConfig
from finetune.data import load_data, load_heldout
from finetune.errors import InputError
from finetune.files import Findings
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
from finetune.sliding import windows_of_files
from finetune.tasks import Asker, Question


@dataclass(frozen=True)
class Rows:
    """What every model is scored on.

    Attributes:
        documents: rows to score.
        questions: task's name -> what is asked.
        vocabulary: of the tokenizer that made them.
        num_bytes: of the scored text as a whole, where it is known; else it is counted by row.
    """

    documents: Sequence[Document]
    questions: Mapping[str, Sequence[Question]]
    vocabulary: Mapping[str, int]
    num_bytes: int | None = None

    def refuse_another_tokenizer(self, opened: Opened) -> None:
        """Ids mean something else to a model with another vocabulary.

        Raises:
            InputError: it has one.
        """
        if opened.base.tokenizer.get_vocab() != self.vocabulary:
            raise InputError(
                f"{opened.name}: has another tokenizer than the first model; not compared. Bits "
                "per byte of two separate calls can be"
            )


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

    def is_own(self, name: str) -> bool:
        """Whether a model is one of the run's, not another run's or a folder of no run."""
        if self.run is None:
            return False
        return name in VARIANTS or Path(name).resolve().parent == self.run.path.resolve()

    def rows(self, opened: Opened, data: Path | None) -> Rows:
        """A file of the caller's, or the run's held-out rows, and the questions of the tasks.

        Raises:
            InputError: there are none.
        """
        documents = self._documents(opened, data)
        asker = Asker(self.config, opened.base.tokenizer, opened.base.chat_format)
        tasks = self.config.eval.tasks
        questions = {task.name: asker.questions(task, documents) for task in tasks}
        self._refuse_too_long(opened, documents, questions)
        return Rows(documents, questions, opened.base.tokenizer.get_vocab())

    def _refuse_too_long(
        self,
        opened: Opened,
        documents: Sequence[Document],
        questions: Mapping[str, Sequence[Question]],
    ) -> None:
        """Past the context a model computes numbers that mean nothing, without an error."""
        context = opened.base.architecture.context
        findings = Findings()
        for document in documents:
            if (length := len(document.input_ids)) > context:
                findings.add(
                    f"{document.example.where}: {length:,} tokens; the model's context is "
                    f"{context:,}. Leave the row out, or set data.max_length"
                )
        for task in self.config.eval.tasks:
            longest = task.max_new_tokens or self.config.eval.max_new_tokens
            for question in questions[task.name] if task.generates else ():
                if (length := len(question.prompt) + longest) > context:
                    findings.add(
                        f"{question.where}: eval.tasks.{task.name}: a prompt of "
                        f"{len(question.prompt):,} tokens and {longest:,} new ones are {length:,}; "
                        f"the model's context is {context:,}. Lower max_new_tokens"
                    )
        findings.refuse()

    def text_rows(self, opened: Opened, name: str, window: int, stride: int) -> Rows:
        """Plain text in sliding windows; nothing is asked."""
        tokenizer = opened.base.tokenizer
        documents, num_bytes = windows_of_files(name, tokenizer, window, stride)
        return Rows(documents, {}, tokenizer.get_vocab(), num_bytes)

    def _documents(self, opened: Opened, data: Path | None) -> list[Document]:
        config = self.config
        tokenizer, chat_format = opened.base.tokenizer, opened.base.chat_format
        if data is None and not config.data.train:
            raise InputError(
                "a model folder of no run brings no rows: give --data FILE or --run RUN"
            )
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
