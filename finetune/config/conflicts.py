"""What no single section can see: impossible combinations, and settings without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from finetune.config.adapter import SETTINGS
from finetune.config.adapter_conflicts import adapter_conflicts
from finetune.config.conflict import Conflict
from finetune.config.data import COLUMNS
from finetune.config.train import EVALUATION, SCHEDULER_KWARGS
from finetune.errors import InputError
from finetune.llama.architecture import HUB_IDS, Architecture, architecture_of

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig


@dataclass(frozen=True)
class Dependence:
    """A setting that has an effect only under a condition, which `condition` puts in words."""

    section: str
    keys: tuple[str, ...]
    has_effect: Callable[[RunConfig], bool]
    on: str
    condition: str


_OF_ADAPTERS = tuple(dict.fromkeys(key for keys in SETTINGS.values() for key in keys))


def _of_method(key: str) -> Dependence:
    """The dependence of an adapter's setting on its method."""
    methods = [name for name, keys in SETTINGS.items() if key in keys]
    return Dependence(
        "adapter",
        (key,),
        lambda config: config.adapter.method in (*methods, "none"),
        "adapter.method",
        f"with this adapter.method; it belongs to {', '.join(methods)}",
    )


def _of_heldout_rows(section: str, *keys: str) -> Dependence:
    return Dependence(
        section,
        keys,
        lambda config: bool(config.data.heldout) or config.data.heldout_fraction is not None,
        "data.heldout",
        "without held-out rows (data.heldout or data.heldout_fraction)",
    )


DEPENDENCES = (
    Dependence(
        "adapter",
        _OF_ADAPTERS,
        lambda config: config.adapter.method != "none",
        "adapter.method",
        "without an adapter (adapter.method: none)",
    ),
    *map(_of_method, _OF_ADAPTERS),
    Dependence(
        "base",
        ("revision",),
        lambda config: config.base.is_hub_id,
        "base.path",
        "where base.path is not a hub id",
    ),
    Dependence(
        "data",
        ("chat_format", "date_string", "train_on"),
        lambda config: config.recipe != "pretrain",
        "recipe",
        "on plain text (recipe: pretrain)",
    ),
    Dependence(
        "train",
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        lambda config: config.train.optim != "sgd",
        "train.optim",
        "with train.optim: sgd",
    ),
    Dependence(
        "train",
        ("early_stopping_threshold",),
        lambda config: config.train.early_stopping_patience is not None,
        "train.early_stopping_patience",
        "without train.early_stopping_patience",
    ),
    Dependence(
        "train",
        ("load_best_model_at_end", "early_stopping_patience"),
        lambda config: config.train.eval_steps is not None,
        "train.eval_steps",
        "without train.eval_steps: only the end of the run would be scored",
    ),
    _of_heldout_rows("data", "on_overlap"),
    _of_heldout_rows("train", *EVALUATION),
    Dependence(
        "eval",
        ("tasks",),
        lambda config: config.recipe != "pretrain" or any(t.prompt for t in config.eval.tasks),
        "recipe",
        "on plain text (recipe: pretrain), where a task brings its own data and prompt",
    ),
    Dependence(
        "eval",
        ("max_new_tokens",),
        lambda config: any(task.generates for task in config.eval.tasks),
        "eval.tasks",
        "without a task that generates text (eval.tasks: exact_match)",
    ),
)


def without_effect(config: RunConfig) -> dict[str, Dependence]:
    """The settings, as `section.key`, that have no effect in this config, and why."""
    return {
        f"{dependence.section}.{key}": dependence
        for dependence in DEPENDENCES
        if not dependence.has_effect(config)
        for key in dependence.keys
    }


_FORMATS = {
    "sft": ("auto", *(name for name in COLUMNS if name != "text")),
    "pretrain": ("auto", "text"),
}
_OVERFLOW = {
    "sft": ("drop", "error", "truncate_history"),
    "pretrain": ("drop", "error", "split"),
}
_OVERFLOW_WHY = {
    "split": "a split conversation loses its question",
    "truncate_history": "plain text has no turns to leave out",
}


def find_conflicts(config: RunConfig) -> list[Conflict]:
    """Every impossible combination and every setting that was given and has no effect."""
    checks = (
        _idle_settings,
        _base,
        _architecture,
        adapter_conflicts,
        _sources,
        _overflow,
        _weights,
        _length,
        _schedule,
        _precision,
    )
    return [conflict for check in checks for conflict in check(config)]


def _idle_settings(config: RunConfig) -> Iterator[Conflict]:
    for path, dependence in without_effect(config).items():
        section, key = path.split(".")
        if getattr(config, section).was_given(key):
            message = f"has no effect {dependence.condition}; leave it out"
            yield Conflict((path, dependence.on), message)


def _base(config: RunConfig) -> Iterator[Conflict]:
    base, either = config.base, ("base.path", "base.architecture")
    if base.path is not None and base.architecture is not None:
        yield Conflict(either, "found base.architecture as well; exactly one of the two is allowed")
    if base.path is None and base.architecture is None:
        yield Conflict(
            either,
            "missing; allowed: a hub id, a Hugging Face folder or a Meta folder"
            " (or base.architecture: a preset or a mapping, for random weights)",
        )
    if base.architecture is not None and base.tokenizer is None:
        yield Conflict(
            ("base.tokenizer", "base.architecture", "base.path"),
            "missing; base.architecture brings no tokenizer: name a tokenizer folder or file",
        )


def _architecture(config: RunConfig) -> Iterator[Conflict]:
    given = config.base.architecture
    preset = given.get("preset") if isinstance(given, dict) else None
    if preset is not None and not isinstance(preset, str):
        yield Conflict(
            ("base.architecture.preset", "base.architecture"),
            f"found {preset!r}; allowed: a preset's name",
        )
        return
    try:
        architecture = _known_architecture(config)
    except InputError as error:
        for finding in error.findings:
            where, _, message = finding.partition(": ")
            yield Conflict((f"base.{where}", "base.architecture"), message)
        return
    if architecture is not None and config.data.max_length > architecture.context:
        yield Conflict(
            ("data.max_length", "base.architecture", "base.path"),
            f"found {config.data.max_length}; allowed: at most {architecture.context},"
            " the context of the base, in tokens",
        )


def _known_architecture(config: RunConfig) -> Architecture | None:
    """The base's shape where the config alone says it: given, or a documented hub id."""
    if config.base.architecture is not None:
        return architecture_of(config.base.architecture)
    preset = HUB_IDS.get(config.base.path or "")
    return architecture_of(preset) if preset else None


def _sources(config: RunConfig) -> Iterator[Conflict]:
    data = config.data
    allowed = _FORMATS[config.recipe]
    for key in ("train", "heldout"):
        for source in getattr(data, key):
            if source.format not in allowed:
                message = f"found format {source.format} ({source.path}) with recipe"
                message += f" {config.recipe}; allowed: {', '.join(allowed)}"
                yield Conflict((f"data.{key}", "recipe"), message)
    if not data.train:
        yield Conflict(("data.train",), "missing; allowed: a .json or .jsonl file, or a list")
    if data.heldout and data.heldout_fraction is not None:
        yield Conflict(
            ("data.heldout_fraction", "data.heldout"),
            "found data.heldout as well; at most one of the two is allowed",
        )
    trained = {PurePath(source.path) for source in data.train}
    for source in data.heldout:
        if PurePath(source.path) in trained:
            message = f"found {source.path} in data.train as well; held-out rows are never trained"
            yield Conflict(("data.heldout", "data.train"), message)


def _overflow(config: RunConfig) -> Iterator[Conflict]:
    policy, allowed = config.data.on_overflow, _OVERFLOW[config.recipe]
    if policy not in allowed:
        yield Conflict(
            ("data.on_overflow", "recipe"),
            f"found {policy} with recipe {config.recipe}; {_OVERFLOW_WHY[policy]}: allowed: "
            f"{', '.join(allowed)}",
        )


def _weights(config: RunConfig) -> Iterator[Conflict]:
    weights = [source.weight for source in config.data.train]
    if None in weights and any(weight is not None for weight in weights):
        bare = ", ".join(s.path for s in config.data.train if s.weight is None)
        yield Conflict(
            ("data.train",),
            f"found a weight for some sources and none for {bare}; allowed: a weight for every "
            "source, or for none",
        )
    if any(source.weight is not None for source in config.data.heldout):
        message = "found a weight; held-out rows are all scored, once each"
        yield Conflict(("data.heldout",), message)


def _length(config: RunConfig) -> Iterator[Conflict]:
    train = config.train
    if train.max_steps is not None and train.num_train_epochs is not None:
        yield Conflict(
            ("train.max_steps", "train.num_train_epochs"),
            "found train.num_train_epochs as well; exactly one of the two is allowed",
        )


def _schedule(config: RunConfig) -> Iterator[Conflict]:
    train, given = config.train, set(config.train.lr_scheduler_kwargs)
    name, paths = train.lr_scheduler_type, ("train.lr_scheduler_kwargs", "train.lr_scheduler_type")
    allowed = SCHEDULER_KWARGS[name]
    if given - set(allowed):
        found = ", ".join(sorted(given - set(allowed)))
        may = ", ".join(allowed) or "none"
        yield Conflict(paths, f"found {found} with schedule {name}; allowed: {may}")
    if name == "cosine_with_min_lr" and len(given & {"min_lr", "min_lr_rate"}) != 1:
        yield Conflict(paths, f"schedule {name} needs exactly one of min_lr, min_lr_rate")
    if name == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield Conflict(paths, f"schedule {name} needs num_decay_steps")
    if name == "constant" and train.warmup_steps:
        yield Conflict(
            ("train.warmup_steps", "train.lr_scheduler_type"),
            f"found {train.warmup_steps} with schedule constant, which has no warm-up;"
            " allowed: 0, or train.lr_scheduler_type: constant_with_warmup",
        )


def _precision(config: RunConfig) -> Iterator[Conflict]:
    if config.base.dtype != "float16":
        return
    if config.adapter.method == "none":
        yield Conflict(
            ("base.dtype", "adapter.method"),
            "found float16 with adapter.method: none; small updates of float16 weights are lost:"
            " allowed: float32, bfloat16",
        )
    if config.train.bf16 is True:
        yield Conflict(
            ("train.bf16", "base.dtype"),
            "found true with base.dtype: float16; allowed: auto, false",
        )
