"""The ledger and the packs in lines for the terminal: most important first, each number once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from finetune.batching import Steps
from finetune.ledger import Ledger
from finetune.overlap import Overlap
from finetune.suspicion import CHECKS

NAMED_PLACES = 5
BAR = 40  # characters of the longest bar
_CHECKS = {check.name: check for check in CHECKS}


def side_lines(ledger: Ledger) -> Iterator[str]:
    """One side for a person in a hurry."""
    tokens = ledger.num_tokens_trained + ledger.num_tokens_context
    yield (
        f"{ledger.name:<8} {ledger.num_rows_kept:,} of {ledger.num_rows_read:,} rows kept, "
        f"{ledger.num_documents:,} documents, {tokens:,} tokens: {ledger.num_tokens_trained:,} "
        f"trained ({100 * ledger.num_tokens_trained / (tokens or 1):.1f} %)"
    )
    if ledger.num_rows_dropped:
        yield f"         {_lost(ledger)}"
        yield from reason_lines(ledger.dropped)
    if ledger.shortened:
        yield f"         shortened by {ledger.num_turns_lost:,} turns, the oldest:"
        yield from reason_lines({"rows": ledger.shortened})
    yield from _suspicion_lines(ledger)
    if ledger.duplicates:
        yield "         repeated, the same as an earlier row:"
        yield from reason_lines(repeats_of(ledger))
    yield from histogram_lines(ledger)
    yield from (f"         note: {note}" for note in ledger.notes)


def _lost(ledger: Ledger) -> str:
    tokens = f", {ledger.num_tokens_dropped:,} tokens" if ledger.num_tokens_dropped else ""
    return f"dropped {ledger.num_rows_dropped:,} rows{tokens}:"


def _suspicion_lines(ledger: Ledger) -> Iterator[str]:
    """Suspicions, then what is only to be known; each with what it means."""
    for heading, is_note in (
        ("suspicious, but kept unless dropped above", False),
        ("to know", True),
    ):
        chosen = {r: p for r, p in ledger.suspicious.items() if is_only_note(r) == is_note}
        if chosen:
            yield f"         {heading}:"
            yield from reason_lines(chosen)


def is_only_note(reason: str) -> bool:
    """Whether many good files have rows of this suspicion."""
    return reason in _CHECKS and _CHECKS[reason].note


def explanation_of(reason: str) -> str:
    """What a suspicion means; empty for reasons that explain themselves."""
    return _CHECKS[reason].explanation if reason in _CHECKS else ""


def reason_lines(reasons: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """For each reason the number of rows, what it means, and the first places."""
    for reason, places in reasons.items():
        explained = f": {explanation_of(reason)}" if explanation_of(reason) else ""
        yield f"  {len(places):>9,}  {reason}{explained}"
        rest = len(places) - NAMED_PLACES
        more = f", and {rest:,} more" if rest > 0 else ""
        yield f"             {', '.join(places[:NAMED_PLACES])}{more}"


def repeats_of(ledger: Ledger) -> dict[str, list[str]]:
    """The surplus rows of a side, by kind of equality."""
    kinds = {
        "exact": "to the character",
        "folded": "but for case, spacing and forms of characters",
    }
    found: dict[str, list[str]] = {}
    for group in ledger.duplicates:
        places = [f"{place} (= {group['first']})" for place in group["others"]]
        found.setdefault(kinds[group["kind"]], []).extend(places)
    return found


def histogram_lines(ledger: Ledger) -> Iterator[str]:
    """Bars of text: documents by their length in tokens."""
    bins = bins_of(ledger)
    if not bins:
        return
    yield (
        f"         length in tokens: half up to {ledger.length_at(0.5):,}, 95 % up to "
        f"{ledger.length_at(0.95):,}, the longest {ledger.length_at(1.0):,}"
    )
    most = max(count for _, _, count in bins)
    for first, last, count in bins:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        yield f"  {f'{first:,} to {last:,}':>17}  {bar}{' ' if bar else ''}{count:,}"


def bins_of(ledger: Ledger) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) of each bin of lengths; a bin ends at each power of two."""
    return [(last // 2 + 1, last, count) for last, count in ledger.histogram()]


def packing_lines(steps: Steps) -> Iterator[str]:
    """How full the packs are, and the steps as arithmetic."""
    yield f"packing  {packing_text(steps)}"
    yield steps.line()
    yield f"         {run_text(steps)}"


def packing_text(steps: Steps) -> str:
    """How full the packs of an epoch are."""
    if not steps.is_packed:
        return "off (data.packing: false): every row is a pack of its own, and nothing is padded"
    room = steps.num_packs * steps.max_length
    return (
        f"{steps.num_tokens:,} tokens in {steps.num_packs:,} packs of {steps.max_length:,} = "
        f"{room:,} places: {100 * steps.empty_share:.1f} % empty; these are left out, not padded: "
        "nothing is computed for them"
    )


def run_text(steps: Steps) -> str:
    """Steps and tokens of the whole run."""
    tokens, trained = (
        round(count * steps.epochs) for count in (steps.num_tokens, steps.num_trained)
    )
    return (
        f"the run: {steps.total:,} steps / {steps.per_epoch:,} an epoch = {steps.epochs:.4g} "
        f"epochs, about {tokens:,} tokens ({trained:,} trained)"
    )


def overlap_lines(found: Sequence[Overlap], policy: str) -> Iterator[str]:
    """What the two sides have in common; what stops a run comes first."""
    num_blocking = sum(finding.blocks for finding in found)
    yield (
        f"overlap  {num_blocking:,} held-out rows are trained on too, or almost (data.on_overlap: "
        f"{policy}); {len(found) - num_blocking:,} share only their prompt"
    )
    ordered = sorted(found, key=lambda finding: not finding.blocks)
    for finding in ordered[: 2 * NAMED_PLACES]:
        yield f"           {kind_of(finding):<12} {finding.where} = {finding.other}"
    if len(found) > 2 * NAMED_PLACES:
        yield f"           and {len(found) - 2 * NAMED_PLACES:,} more"


def kind_of(finding: Overlap) -> str:
    """The kind, and of near rows how near."""
    return f"near, {100 * finding.share:.0f} %" if finding.kind == "near" else finding.kind
