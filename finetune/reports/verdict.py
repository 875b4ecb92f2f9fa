"""The verdict: how a run ended, whether it helped and by how much, and what nobody knows yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from finetune.reports.facts import Facts
from finetune.reports.reading import count, mapping, number
from finetune.reports.results import HELDOUT, Difference, Result
from finetune.reports.wording import decimal, metric, p_value, percent, points, power, signed, whole


@dataclass(frozen=True)
class Verdict:
    """What stands at the top of a report.

    Attributes:
        level: good, warn or stop; plain where nothing is to be judged yet.
        headline: a few words.
        sentences: what is known, most important first.
        unknown: what is not, each with the command that finds it out.
        figures: the numbers that matter most, each with what it is.
    """

    level: str
    headline: str
    sentences: tuple[str, ...]
    unknown: tuple[str, ...]
    figures: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """All of it, for a terminal."""
        rest = f"Not known: {'; '.join(self.unknown)}." if self.unknown else ""
        return " ".join(filter(None, [self.headline, *self.sentences, rest]))


def judge(facts: Facts) -> Verdict:
    """Puts the facts into words; nothing is said that no file says."""
    outcome = overall(facts)
    sentences = [*_comparison(facts), _course(facts), _merge(facts)]
    if not is_finished(facts):  # then how it ended comes first
        sentences.insert(0, _state(facts))
    elif facts.state.reason:
        sentences.append(f"Note: {_one_line(facts.state.reason)}")
    return Verdict(
        level=_level(facts, outcome),
        headline=_headline(facts, outcome),
        sentences=tuple(filter(None, sentences)),
        unknown=tuple(_unknown(facts)),
        figures=tuple(_figures(facts)),
    )


def overall(facts: Facts) -> str | None:
    """better, worse, level or mixed than the base; None where they were not compared."""
    found = {d.verdict for result in facts.results[:1] for d in result.against("base")}
    if not found:
        return None
    apart = found - {"level"}
    if len(apart) == 2:
        return "mixed"
    return apart.pop() if apart else "level"


_OUTCOMES = {
    "better": "better than the base",
    "worse": "worse than the base",
    "level": "no different from the base beyond chance",
    "mixed": "better than the base in one metric, worse in another",
    None: "not compared with the base",
}
_STATES = {
    "finished": "Finished",
    "running": "Running",
    "interrupted": "Interrupted",
    "failed": "Failed",
    "killed": "Ended without a word",
    "not started": "Not started",
}


def _headline(facts: Facts, outcome: str | None) -> str:
    state = facts.state.name
    head = _STATES.get(state, state.capitalize())
    if state == "not started":
        return f"{head}."
    if outcome is None and state != "finished":
        return f"{head} {_progress(facts)}."
    return f"{head}: {_OUTCOMES[outcome]}."


def _level(facts: Facts, outcome: str | None) -> str:
    state = facts.state.name
    if state in ("failed", "killed") or outcome == "worse" or facts.is_merge_stale:
        return "stop"
    if state == "interrupted" or outcome in ("level", "mixed"):
        return "warn"
    return "good" if state == "finished" and outcome == "better" else "plain"


def _progress(facts: Facts) -> str:
    step, steps = facts.training.last_step, facts.num_steps
    if not step:
        return "before the first step"
    if steps and steps > step:
        return f"after step {step:,} of {steps:,}"
    return f"after step {step:,}"


def _state(facts: Facts) -> str:
    state = facts.state
    if state.name == "not started":
        return "The folder has a config; nothing was trained."
    saved = f"; the newest checkpoint is of step {state.checkpoint:,}" if state.checkpoint else ""
    if state.name == "running":
        return f"It is being trained; this page is of {_progress(facts)}{saved}."
    again = f"{saved}; the same command goes on from there" if saved else ""
    if state.name == "killed":
        return f"Its process died {_progress(facts)} and left no reason{again}."
    reason = (state.reason or "no reason is recorded").strip()
    return f"It ended {_progress(facts)}{again}. Reason: {_one_line(reason)}"


def _one_line(reason: str) -> str:
    line = " ".join(reason.split())
    line = f"{line[:400]} …" if len(line) > 400 else line
    return line if line.endswith((".", "…")) else f"{line}."


def is_finished(facts: Facts) -> bool:
    """Whether training ended well."""
    return facts.state.name == "finished"


def _weights(facts: Facts) -> str:
    """Which step's weights are published, where they are not the last one's."""
    step = count(facts.adapter.get("step"))
    is_last = step is None or step == facts.training.last_step
    return "" if is_last else f", with the weights of step {step:,}"


def _course(facts: Facts) -> str:
    """How the held-out loss went while the run trained."""
    seen = facts.training.heldout
    ended = f"Training ended {_progress(facts)}{_weights(facts)}" if is_finished(facts) else ""
    if not seen:
        return f"{ended}." if ended else ""
    (first_step, first), (last_step, last) = seen[0], seen[-1]
    ended = f"{ended}; the" if ended else "The"
    if len(seen) == 1:
        return f"{ended} held-out loss was {decimal(first)} nats a token at step {first_step:,}."
    when = f"step {first_step:,}" if first_step else "before training"
    way = "fell" if last < first else "rose" if last > first else "stayed"
    text = (
        f"{ended} held-out loss {way} from {decimal(first)} ({when}) "
        f"to {decimal(last)} (step {last_step:,})"
    )
    best_step, best = min(seen, key=lambda pair: pair[1])
    if best < 0.995 * last:
        text += f"; it was lowest, {decimal(best)}, at step {best_step:,}"
    return f"{text}."


def _comparison(facts: Facts) -> Iterator[str]:
    for result in facts.results[:1]:
        first, base = result.models[0], result.against("base")
        rows = f"{whole(first.numbers['rows'])} " if "rows" in first.numbers else ""
        where = f"{rows}held-out rows" if result.name == HELDOUT else f"{rows}rows of {result.name}"
        outcome = overall(facts)
        if not base:
            yield f"On {where} the {first.name} has {_scores(result)}."
        elif outcome in ("better", "worse"):
            found = "; ".join(map(sentence, base))
            yield f"On {where} the {first.name} is {outcome} than the base: {found}."
        else:
            found = "; ".join(map(sentence, base))
            yield f"On {where}, the {first.name} against the base: {found}."


def sentence(found: Difference) -> str:
    """One difference with its interval."""
    is_loss = found.metric == "loss"
    name = "the loss" if is_loss else metric(found.metric)
    inside = []
    if found.low is not None and found.high is not None:
        ends = (signed(x) if is_loss else points(x) for x in (found.low, found.high))
        inside.append(f"95 %: {' to '.join(ends)}")
    if found.p_value is not None:
        inside.append(f"p {p_value(found.p_value)}")
    details = f" ({', '.join(inside)})" if inside else ""
    if found.verdict == "level":
        return f"{name} differs by no more than chance{details}"
    size = abs(found.difference)
    amount = f"{decimal(size)} nats a token" if is_loss else f"{100 * size:.1f} points"
    return f"{name} is {amount} {'higher' if found.difference > 0 else 'lower'}{details}"


def _scores(result: Result) -> str:
    first = result.models[0]
    parts = [f"loss {decimal(first.numbers['loss'])}"] if "loss" in first.numbers else []
    parts += [f"{metric(name)} {percent(task.score)}" for name, task in first.tasks.items()]
    return ", ".join(parts)


def _figures(facts: Facts) -> Iterator[tuple[str, str]]:
    """Base and model side by side, where both have the number."""
    if not facts.results:
        return
    first, *others = facts.results[0].models
    base = next((model for model in others if model.name == "base"), None)
    if "loss" in first.numbers:
        before = base.numbers.get("loss") if base else None
        yield _pair(before, first.numbers["loss"], lambda x: decimal(x, 3)), "held-out loss"
    for name, task in list(first.tasks.items())[:3]:
        before = base.tasks[name].score if base and name in base.tasks else None
        yield _pair(before, task.score, percent), metric(name)


def _pair(before: float | None, after: float | None, show: Callable[[float | None], str]) -> str:
    return show(after) if before is None else f"{show(before)} → {show(after)}"


def _merge(facts: Facts) -> str:
    if not facts.merge:
        return ""
    if facts.is_merge_stale:
        return "The merged model is of another adapter than this run's; merge again."
    proof = mapping(facts.merge.get("proof"))
    if not proof:
        return "The adapter is merged, but no proof is recorded."
    largest, prompts = number(proof.get("max_logit_difference")), count(proof.get("prompts"))
    parts = [f"logits differ by {power(largest)} at most"] if largest is not None else []
    if prompts:
        same = whole(number(proof.get("same_text")))
        parts.append(f"the same greedy text on {same} of {prompts:,} prompts")
    rest = f": {', '.join(parts)}" if parts else ""
    return f"Merged equals base + adapter, proven{rest}."


def _unknown(facts: Facts) -> Iterator[str]:
    if facts.has_heldout is False:
        yield "how it does on rows it has not seen (none are held out)"
    if not is_finished(facts):
        return
    if not facts.results:
        yield "whether it is better than the base (`eval RUN --against base,merged`)"
    elif not facts.results[0].against("base") and facts.results[0].models[0].name != "base":
        yield "whether it is better than the base (`eval RUN --against base`)"
    elif any(d.p_value is None for d in facts.results[0].against("base")):
        yield "whether the difference is more than chance (too few rows)"
    if not facts.merge and facts.adapter.get("kind") == "adapter":
        yield "whether a merged model is the same (`merge RUN`)"


def summary(verdict: Verdict) -> Sequence[str]:
    """The verdict in lines for a terminal."""
    lines = [f"verdict  {verdict.headline}", *(f"         {s}" for s in verdict.sentences)]
    return lines + [f"unknown  {item}" for item in verdict.unknown]
