"""The facts as tables of texts, in the words of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.reports.facts import Facts, Setting
from finetune.reports.metrics import Training
from finetune.reports.reading import count, listing, mapping, number, text
from finetune.reports.results import ModelScores, Result
from finetune.reports.wording import (
    NONE,
    decimal,
    duration,
    metric,
    percent,
    power,
    signed,
    whole,
)
from finetune.suspicion import CHECKS

MOST_ROWS = 60  # of one breakdown
_EXPLANATIONS = {check.name: check.explanation for check in CHECKS}


@dataclass(frozen=True)
class Table:
    """Texts in rows.

    Attributes:
        heads: of the columns.
        rows: as many cells as heads each.
        num_left_out: rows beyond MOST_ROWS.
        title: above it; may be empty.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_left_out: int = 0
    title: str = ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    shown = tuple(tuple(row) for row in rows[:MOST_ROWS])
    return Table(tuple(heads), shown, max(0, len(rows) - MOST_ROWS), title)


_NUMBERS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("loss", "loss, nats a token", decimal),
    ("perplexity", "perplexity", lambda value: decimal(value, 2)),
    ("bits_per_byte", "bits per byte", decimal),
    ("token_accuracy", "tokens guessed right", percent),
    ("kl_from_trained", "KL from the model as it was trained", power),
)


def scores(result: Result) -> Table:
    """Models as columns, metrics and tasks as rows."""
    models = result.models
    rows = [
        [label, *(show(model.numbers.get(key)) for model in models)]
        for key, label, show in _NUMBERS
        if any(key in model.numbers for model in models)
    ]
    for task in result.tasks:
        rows.append([metric(task), *(_task(model, task) for model in models)])
    if result.same_text:
        same = (result.same_text.get(model.name) for model in models[1:])
        rows.append([f"same text as {models[0].name}", "", *map(whole, same)])
    for key, label in (("rows", "rows"), ("tokens", "tokens scored")):
        if any(key in model.numbers for model in models):
            rows.append([label, *(whole(model.numbers.get(key)) for model in models)])
    return _table(["", *(model.name for model in models)], rows)


def _task(model: ModelScores, task: str) -> str:
    found = model.tasks.get(task)
    if found is None:
        return NONE
    errors = f" ({found.num_errors:,} not scored)" if found.num_errors else ""
    return f"{percent(found.score)}{errors}"


def breakdowns(result: Result) -> Iterator[Table]:
    """Loss by source and by turn where there are several, each task by group."""
    models = result.models
    for title, name in (("By source", "by_source"), ("By turn", "by_turn")):
        parts: list[Mapping[str, Mapping[str, float]]] = [getattr(m, name) for m in models]
        keys = list(dict.fromkeys(key for part in parts for key in part))
        if len(keys) > 1:
            rows = [
                [key, _size(parts, key), *(_loss(part.get(key)) for part in parts)] for key in keys
            ]
            heads = [title.removeprefix("By "), "tokens", *(f"loss, {m.name}" for m in models)]
            yield _table(heads, rows, title)
    for task in result.tasks:
        yield from _groups(result, task)


def _size(parts: Sequence[Mapping[str, Mapping[str, float]]], key: str) -> str:
    sizes = [part[key].get("tokens") for part in parts if key in part]
    return whole(sizes[0] if sizes else None)


def _loss(numbers: Mapping[str, float] | None) -> str:
    return decimal((numbers or {}).get("loss"))


def _groups(result: Result, task: str) -> Iterator[Table]:
    found = [model.tasks[task].groups if task in model.tasks else {} for model in result.models]
    for column in dict.fromkeys(name for groups in found for name in groups):
        values = list(dict.fromkeys(v for groups in found for v in groups.get(column, {})))
        rows = [[v, *(_right(groups.get(column, {}).get(v)) for groups in found)] for v in values]
        heads = [column, *(model.name for model in result.models)]
        yield _table(heads, rows, f"{metric(task).capitalize()} by {column}")


def _right(pair: tuple[float, float] | None) -> str:
    return f"{percent(pair[0] / pair[1])} ({pair[0]:g}/{pair[1]:g})" if pair else NONE


def changed(result: Result) -> Iterator[Table]:
    """The rows whose loss differs most from each other model's."""
    first = result.models[0].name
    for other, found in result.most_changed.items():
        rows = [[w, decimal(a), decimal(b), signed(a - b)] for w, a, b in found]
        yield _table(["row", first, other, "difference"], rows, f"Changed most against {other}")


_LEDGER = (
    ("rows_read", "rows read"),
    ("rows_kept", "rows kept"),
    ("rows_dropped", "rows dropped"),
    ("rows_shortened", "rows shortened"),
    ("documents", "documents"),
    ("tokens", "tokens"),
    ("tokens_trained", "tokens trained"),
    ("tokens_context", "tokens only read"),
    ("tokens_dropped", "tokens dropped"),
    ("length_median", "length, half up to"),
    ("length_max", "length, the longest"),
)


def sides(data: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The sides of data.json that have rows."""
    found = [(side, mapping(data.get(side))) for side in ("train", "heldout")]
    return [(side, ledger) for side, ledger in found if count(ledger.get("rows_read"))]


def ledger(data: Mapping[str, Any]) -> Table:
    """Rows and tokens of both sides."""
    shown = sides(data)
    rows = [
        [label, *(whole(number(side.get(key))) for _, side in shown)]
        for key, label in _LEDGER
        if any(key in side for _, side in shown)
    ]
    return _table(["", *(name for name, _ in shown)], rows)


@dataclass(frozen=True)
class Reason:
    """Rows that were dropped or look wrong, for one reason.

    Attributes:
        side: train or heldout.
        what: dropped or suspicious.
        reason: in words.
        explanation: what it does to training; may be empty.
        places: of the rows.
    """

    side: str
    what: str
    reason: str
    explanation: str
    places: tuple[str, ...]


def reasons(data: Mapping[str, Any]) -> Iterator[Reason]:
    """Every reason of both sides, those of dropped rows first."""
    for what in ("dropped", "suspicious"):
        for side, found in sides(data):
            for reason, places in mapping(found.get(what)).items():
                explanation = _EXPLANATIONS.get(reason, "")
                names = tuple(str(place) for place in listing(places))
                yield Reason(side, what, reason, explanation, names)


def notes(data: Mapping[str, Any]) -> list[str]:
    """What a person should know of both sides."""
    return [
        f"{side}: {note}" for side, found in sides(data) for note in listing(found.get("notes"))
    ]


def overlap(data: Mapping[str, Any]) -> Table:
    """Held-out rows that the training side has too, by kind."""
    kinds: dict[str, int] = {}
    for finding in listing(data.get("overlap")):
        kind = text(mapping(finding).get("kind")) or "other"
        kinds[kind] = kinds.get(kind, 0) + 1
    return _table(["kind", "held-out rows"], [[kind, whole(n)] for kind, n in kinds.items()])


def mixture(data: Mapping[str, Any]) -> Table:
    """What an epoch holds of each source."""
    rows = []
    for portion in map(mapping, listing(data.get("mixture"))):
        share, epochs = number(portion.get("share")), number(portion.get("epochs"))
        sizes = (whole(number(portion.get(key))) for key in ("documents", "tokens_trained"))
        rows.append([str(portion.get("name")), percent(share), decimal(epochs, 2), *sizes])
    return _table(["source", "share", "passes an epoch", "documents", "tokens trained"], rows)


_PROOF: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    (
        "max_weight_error_ulps",
        "largest error of a weight beyond float32's own, in units of the last place",
        power,
    ),
    ("max_logit_difference", "largest difference of a logit", power),
    ("mean_logit_difference", "mean difference of a logit", power),
    ("relative_logit_difference", "largest difference over the spread of logits", power),
    ("kl", "KL(base + adapter ‖ merged), nats a token", power),
    ("kl_from_quantized", "KL from the quantised model, nats a token", power),
    ("rows", "rows compared", whole),
    ("tokens", "tokens compared", whole),
    ("same_next_token", "same next token", whole),
    ("prompts", "prompts continued", whole),
    ("same_text", "same greedy text", whole),
    ("ties", "prompts that part where two tokens are level", whole),
)


def merge(facts: Mapping[str, Any]) -> Table:
    """The proof of a merge."""
    proof = mapping(facts.get("proof"))
    rows = (
        [["matrices merged", whole(number(facts.get("matrices")))]] if "matrices" in facts else []
    )
    rows += [["type", str(facts["dtype"])]] if "dtype" in facts else []
    rows += [[label, show(number(proof.get(key)))] for key, label, show in _PROOF if key in proof]
    for key, label in (("unchanged", "matrices unchanged"), ("changed_unasked", "others changed")):
        if key in proof:
            rows.append([label, whole(len(listing(proof[key])))])
    return _table(["", "found"], rows)


def settings(chosen: Sequence[Setting]) -> Table:
    """Settings with their origins."""
    rows = [(s.key, "no effect" if s.value is None else s.value, s.origin) for s in chosen]
    return Table(("setting", "value", "from"), tuple(rows))


def environment(facts: Mapping[str, Any]) -> Table:
    """Versions and machine."""
    rows = [
        [key, str(facts[key])] for key in ("python", "system", "machine", "cores") if key in facts
    ]
    rows += [[name, str(v)] for name, v in mapping(facts.get("packages")).items() if v]
    for key, label in (("base_revision", "base, revision"), ("base_fingerprint", "base, sha256")):
        if facts.get(key):
            rows.append([label, str(facts[key])])
    return _table(["", ""], rows)


def heldout(training: Training) -> Table:
    """The held-out losses that the curves show."""
    rows = [[f"step {step:,}", decimal(loss)] for step, loss in training.heldout]
    return _table(["", "held-out loss"], rows)


def cards(facts: Facts) -> list[tuple[str, str]]:
    """(number, what it is) of the whole training."""
    training = facts.training
    if not training.steps:
        return []
    speed = training.speed[1]
    found = [
        (f"{training.last_step:,}", "steps"),
        (decimal(training.epoch, 2), "epochs"),
        (whole(training.total("tokens")), "tokens read"),
        (whole(training.total("tokens_trained")), "tokens trained"),
        (duration(training.total("seconds")), "of training"),
    ]
    if len(speed):
        found.append((whole(float(sorted(speed)[len(speed) // 2])), "tokens a second (median)"))
    return found
