"""Data of a run: documents of both sides with train masks, and the ledger of every row and token.

`preparation` writes the documents once for each content and settings; here a run opens them, and
decides what of them it uses: overlap between the sides, and the shares of a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from finetune import artifact
from finetune.artifact import sha256_of_json
from finetune.config import RunConfig
from finetune.config.data import DataSection, Source
from finetune.data_cache import prepare
from finetune.errors import CheckFailed, InputError
from finetune.files import MAX_FINDINGS, find_files, read_rows, refuse
from finetune.ledger import Ledger
from finetune.llama.chat import ChatFormat
from finetune.mixture import Mixture, Portion
from finetune.overlap import Overlap
from finetune.preparation import SIDES, SourceFile, source_files
from finetune.prepared import Document, PreparedDocuments
from finetune.rendering import Renderer
from finetune.shapes import read_examples


@dataclass(frozen=True)
class RunData:
    """Both sides of a run's data, with what became of every row.

    Attributes:
        train: documents to train on.
        heldout: documents never trained on; may be empty.
        ledgers: of train and heldout.
        file_hashes: sha256 of every file.
        overlap: held-out rows that the training side has too, or almost.
        mixture: the shares of the sources in an epoch; None: every document once.
        portions: what an epoch holds of each source.
        documents_sha256: over the ids and masks of both sides.
    """

    train: PreparedDocuments
    heldout: PreparedDocuments
    ledgers: tuple[Ledger, Ledger]
    file_hashes: dict[str, str]
    overlap: tuple[Overlap, ...]
    mixture: Mixture | None
    portions: tuple[Portion, ...]
    documents_sha256: str

    def as_json(self) -> dict[str, Any]:
        """data.json of the run folder."""
        return {
            "files": self.file_hashes,
            "documents_sha256": self.documents_sha256,
            **{ledger.name: ledger.as_json() for ledger in self.ledgers},
            "overlap": [asdict(finding) for finding in self.overlap],
            "mixture": [asdict(portion) for portion in self.portions],
        }

    def lines(self) -> list[str]:
        """Ledgers and mixture for the terminal."""
        shown = [line for side in self.ledgers if side.num_rows_read for line in side.lines()]
        return shown + self.mixture_lines()

    def mixture_lines(self) -> list[str]:
        """The table of the sources; none where there is only one."""
        return _table(self.portions) if len(self.portions) > 1 else []


def load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, chat_format: ChatFormat | None
) -> RunData:
    """Training and held-out documents of a config, prepared now or found in the cache.

    Args:
        chat_format: None for recipes on plain text.

    Raises:
        InputError: unreadable files or rows, a side without a row, overlong rows under `error`.
        CheckFailed: held-out rows that are trained on, under `data.on_overlap: error`.
    """
    data = open_data(config, tokenizer, chat_format)
    refuse_leaks(config.data, data.overlap)
    return data


def open_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, chat_format: ChatFormat | None
) -> RunData:
    """`load_data` for those who only look: what overlap stops a run is in it, and not raised."""
    if not config.data.train:
        raise InputError("data.train: names no file; give at least one")
    files, missing = source_files(config)
    folder = prepare(config, files, tokenizer, chat_format, missing)
    states = artifact.read_json(folder / "ledgers.json")
    train_ledger, heldout_ledger = (Ledger.from_state(states[side]) for side in SIDES)
    train, heldout = (PreparedDocuments(folder / side) for side in SIDES)
    _refuse_empty_sides(config, train, train_ledger, heldout, heldout_ledger)
    found = tuple(Overlap(**finding) for finding in artifact.read_json(folder / "overlap.json"))
    heldout = _without_leaks(config.data, found, heldout, heldout_ledger)
    mixture = _mixture(config, train)
    return RunData(
        train,
        heldout,
        (train_ledger, heldout_ledger),
        {str(file.path): file.sha256 for file in files},
        found,
        mixture,
        _portions(config, files, train, mixture),
        _documents_sha256(folder, len(heldout)),
    )


def _documents_sha256(folder: Path, num_heldout: int) -> str:
    files = artifact.read_manifest(folder)["files"]
    names = [f"{side}/{name}" for side in SIDES for name in ("ids.bin", "mask.bin", "ends.bin")]
    return sha256_of_json([*(files[name]["sha256"] for name in names), num_heldout])


def _refuse_empty_sides(
    config: RunConfig,
    train: PreparedDocuments,
    train_ledger: Ledger,
    heldout: PreparedDocuments,
    heldout_ledger: Ledger,
) -> None:
    fraction = config.data.heldout_fraction
    if fraction and not heldout_ledger.num_rows_read:
        raise InputError(
            f"data.heldout_fraction: {fraction} of {train_ledger.num_rows_read} rows holds none "
            "out; raise it, or name a file in data.heldout"
        )
    _refuse_none("data.train: no row is left to train on", train, train_ledger)
    if heldout_ledger.num_rows_read:
        _refuse_none("data.heldout: no row is left to score", heldout, heldout_ledger)


def _refuse_none(finding: str, documents: Sequence[Document], ledger: Ledger) -> None:
    if not documents:
        raise InputError([finding, *(" ".join(line.split()) for line in ledger.lines())])


def _without_leaks(
    data: DataSection, found: Sequence[Overlap], heldout: PreparedDocuments, ledger: Ledger
) -> PreparedDocuments:
    """Applies `data.on_overlap` to held-out rows that the training side has too."""
    leaks = {finding.where: finding for finding in found if finding.blocks}
    if not leaks or data.on_overlap == "error":
        return heldout
    if data.on_overlap == "allow":
        ledger.notes.append(f"{len(leaks):,} rows are in the training data too, or almost: kept")
        return heldout
    chosen: list[int] = []
    for documents in heldout.rows():
        where = heldout.example(documents[0]).where
        if where in leaks:
            lost = [heldout[index].size for index in documents]
            ledger.take_back(f"{leaks[where].kind} in the training data", where, *lost)
        else:
            chosen += documents
    kept = heldout.only(np.array(chosen, np.int64))
    _refuse_none("data.heldout: every row is in the training data too", kept, ledger)
    return kept


def refuse_leaks(data: DataSection, found: Sequence[Overlap]) -> None:
    """Stops a run whose held-out rows are trained on.

    Raises:
        CheckFailed: naming them, under `data.on_overlap: error`.
    """
    leaks = {finding.where: finding for finding in found if finding.blocks}
    if leaks and data.on_overlap == "error":
        raise CheckFailed("\n".join(_leak_lines(list(leaks.values()))))


def _leak_lines(leaks: Sequence[Overlap]) -> list[str]:
    rest = len(leaks) - MAX_FINDINGS
    return [
        f"{len(leaks):,} held-out rows are trained on as well: their scores would measure memory",
        *(
            f"  {leak.where}: {leak.kind} {leak.other}"
            + (f" ({100 * leak.share:.0f} % of its n-grams)" if leak.kind == "near" else "")
            for leak in leaks[:MAX_FINDINGS]
        ),
        *([f"  and {rest:,} more"] if rest > 0 else []),
        "take them out, or set data.on_overlap: drop (they are not scored) or allow",
    ]


def _mixture(config: RunConfig, train: PreparedDocuments) -> Mixture | None:
    sources = config.data.train
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return None
    names = [source.path for source in sources]
    return Mixture(train.num_trained, train.sources, weights, names, config.run.seed)


def _portions(
    config: RunConfig,
    files: Sequence[SourceFile],
    train: PreparedDocuments,
    mixture: Mixture | None,
) -> tuple[Portion, ...]:
    """The table of the mixture, which is also shown where every document comes once."""
    sizes = [0] * len(config.data.train)
    for file in files:
        if file.side == "train":
            sizes[file.number] += file.path.stat().st_size
    if mixture is not None:
        return tuple(mixture.table(sizes))
    tokens = np.bincount(train.sources, weights=train.num_trained, minlength=len(sizes))
    documents = np.bincount(train.sources, minlength=len(sizes))
    return tuple(
        Portion(s.path, float(t / tokens.sum()), 1.0, int(d), int(t), size)
        for s, t, d, size in zip(config.data.train, tokens, documents, sizes, strict=True)
    )


def _table(portions: Sequence[Portion]) -> list[str]:
    width = max(len(portion.name) for portion in portions)
    head = f"mixture  {'source':<{width}}   share  epochs  documents  trained tokens      size"
    return [head] + [
        f"         {p.name:<{width}} {100 * p.share:6.2f}% {p.epochs:7.2f} {p.documents:10,}"
        f" {p.tokens_trained:15,} {p.bytes / 2**20:6.1f} MiB"
        for p in portions
    ]


def num_epochs(config: RunConfig, steps_per_epoch: int) -> int:
    """Epochs that a run begins."""
    train = config.train
    if train.max_steps:
        return math.ceil(train.max_steps / steps_per_epoch)
    return math.ceil(train.num_train_epochs or 1)


def load_heldout(
    source: Source | Path,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat | None,
) -> tuple[list[Document], Ledger]:
    """One held-out file under a config's rendering, for evaluation; nothing is kept of it.

    Args:
        source: a source of the config; or any file, in one of the formats or with the columns of
            the config's own rows.

    Raises:
        InputError: rows that cannot be read or rendered.
    """
    if isinstance(source, Path):
        source = _like_the_runs_own(source, config.data)
    ledger, documents, findings = Ledger("heldout"), [], []
    renderer = Renderer(config.data, tokenizer, chat_format)
    for path in find_files(source.path):
        shape, examples = read_examples(path, source.format, source.columns)
        if (shape == "text") != (config.recipe == "pretrain"):
            raise InputError(f"{path}: holds {shape}; recipe {config.recipe} does not read that")
        for outcome in renderer(list(examples)):
            ledger.num_rows_read += 1
            documents += outcome.documents
            if outcome.refused:
                findings.append(outcome.refused)
            elif outcome.dropped is not None:
                ledger.drop(outcome.dropped, outcome.example.where, outcome.num_tokens_lost)
            else:
                ledger.keep(*(document.size for document in outcome.documents))
    refuse(findings)
    return documents, ledger


def _like_the_runs_own(path: Path, data: DataSection) -> Source:
    """A file under the run's column names, where it has them."""
    for source in (*data.heldout, *data.train):
        names = set((source.columns or {}).values())
        if names and names <= set(next(read_rows(path)).columns):
            return source.model_copy(update={"path": str(path)})
    return Source(path=str(path))
