"""The state in a checkpoint, looked at before a library takes it over.

A manifest says that files are as they were written, not who wrote them. torch, NumPy and
transformers take what they are given: a generator's position outside its numbers is read all the
same, a schedule's keys become attributes, a moment of another shape fails in the middle of a step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.artifact import read_json, refuse_special
from finetune.errors import CheckFailed, is_out_of_memory

MAX_BYTES = 256 << 20
MAX_DEPTH = 16
_MAX_STEP = 1 << 52

_ODD = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError)


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Turns whatever a file of a checkpoint leads to into one sentence.

    Raises:
        CheckFailed: it holds something else than training writes.
    """
    try:
        yield
    except _ODD as error:
        if is_out_of_memory(error):
            raise
        cause = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise CheckFailed(
            f"{path}: is not what training writes ({cause.splitlines()[0][:200]}). Move the "
            "checkpoint away: the run goes on from the one before"
        ) from error


def read_state(path: Path) -> Any:
    """A JSON file of a checkpoint, no larger and no deeper than training makes one.

    Raises:
        InputError: missing, or no JSON.
        CheckFailed: too large or too deep.
    """
    refuse_special(path)
    size = path.stat().st_size if path.exists() else 0
    with as_written(path):
        _need(size <= MAX_BYTES, f"{size:,} bytes; {MAX_BYTES:,} are allowed")
        value = read_json(path)
        _need(not _is_deep(value), f"nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, _NESTED))
        level = [child for part in inner for child in part if isinstance(child, _NESTED)]
        if not level:
            return False
    return True


_NESTED = (dict, list)


def _need(ok: bool, otherwise: str) -> None:
    if not ok:
        raise ValueError(otherwise)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def is_count(value: Any, limit: int = _MAX_STEP) -> bool:
    """Whether it is a whole number from 0 to `limit`."""
    return type(value) is int and 0 <= value <= limit


# --- optimizer --------------------------------------------------------------------------------

_WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes hides its tensors from FSDP in there
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2")
_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})
_SGD = frozenset({"momentum_buffer"})
_TWO_STATES = frozenset({"step", "state1", "state2"})
_EIGHT_BITS = _TWO_STATES | {"qmap1", "qmap2", "absmax1", "absmax2"}
_BLOCK = 256  # numbers that share an absmax in bitsandbytes


def optimizer_state(saved: Any, optimizer: Any) -> dict[str, Any]:
    """A saved state as `load_state_dict` takes it, with the optimizer's own settings.

    Args:
        saved: as JSON, tensors put back; its settings (rate, decay …) are left out.
        optimizer: torch's or bitsandbytes', wrapped or not, before its first step.

    Raises:
        ValueError: parameters, names, shapes, types or numbers that cannot be.
    """
    own = optimizer.state_dict()["param_groups"]
    _need(isinstance(saved, dict) and saved.keys() == {"state", "param_groups"}, "not a state")
    groups = saved["param_groups"]
    _need(isinstance(groups, list), "param_groups is no list")
    theirs = [group.get("params") for group in groups]
    _need(theirs == [group["params"] for group in own], "other groups of parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    known = {str(number): number for number in range(len(parameters))}
    state = {known[key]: entry for key, entry in saved["state"].items()}
    for number, entry in state.items():
        with _named(f"parameter {number}"):
            _check_entry(_flat(entry), parameters[number], _kinds_of(optimizer))
    return {"state": state, "param_groups": own}


def _kinds_of(optimizer: Any) -> tuple[frozenset[str], ...]:
    """The sets of names that an entry may have."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if hasattr(inner, "name2qmap"):
        return (_TWO_STATES, _EIGHT_BITS)
    return (_SGD, frozenset()) if type(inner).__name__ == "SGD" else (_ADAM,)


def _flat(entry: Any) -> dict[str, Any]:
    _need(isinstance(entry, dict), "its state is no object")
    inner = entry.get(_WRAPPED, {})
    _need(isinstance(inner, dict), f"{_WRAPPED} is no object")
    return {name: value for name, value in entry.items() if name != _WRAPPED} | inner


def _check_entry(entry: Mapping[str, Any], parameter: Any, kinds: Sequence[frozenset[str]]) -> None:
    _need(frozenset(entry) in kinds, f"has {', '.join(map(str, sorted(entry))) or 'nothing'}")
    in_bytes = "qmap1" in entry
    blocks = -(-parameter.numel() // _BLOCK)
    for name, value in entry.items():
        if name == "step":
            ok = is_count(value) if "state1" in entry else _fits(value, (), False)
            _need(ok and float(value) >= 0, "step is no count")
        elif value is None:
            _need(name == "momentum_buffer", f"{name} is null")
        elif name in _MOMENTS:
            _need(_fits(value, parameter.shape, in_bytes), f"{name} does not fit")
        else:
            shape = (_BLOCK,) if name.startswith("qmap") else (blocks,)
            _need(_fits(value, shape, False), f"{name} does not fit")


def _fits(value: Any, shape: Sequence[int], in_bytes: bool) -> bool:
    """Whether it is a tensor of this shape, of bytes or of finite floats."""
    import torch

    if not isinstance(value, torch.Tensor) or tuple(value.shape) != tuple(shape):
        return False
    if in_bytes:
        return value.dtype == torch.uint8
    return value.dtype.is_floating_point and bool(torch.isfinite(value).all())


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


# --- schedule, generators, windows, scores, transformers' own -----------------------------------


def schedule_counts(saved: Any) -> tuple[int, int]:
    """`last_epoch` and `_step_count` of a schedule: all of it that is not the config's.

    Raises:
        ValueError: no counts.
    """
    counts = saved["last_epoch"], saved["_step_count"]
    _need(all(map(is_count, counts)), "last_epoch and _step_count are counts of steps")
    return counts


def check_generators(state: Any) -> None:
    """The states of Python's, NumPy's and torch's generators, before they are set.

    Raises:
        ValueError: numbers that a generator cannot have.
    """
    version, internal, gauss = state["python"]
    _need(version == 3, "python: of another version")
    *words, place = internal
    _need(_are_words(words, 624) and is_count(place, 624), "python: no state of its generator")
    kind, keys, position, has_gauss, cached = state["numpy"]
    _need(kind == "MT19937" and _are_words(keys, 624), "numpy: no state of its generator")
    _need(is_count(position, 624) and has_gauss in (0, 1), "numpy: a position it cannot have")
    _need(is_number(cached) and (gauss is None or is_number(gauss)), "a draw that is no number")
    _need(isinstance(state["cuda"], list), "cuda: no list")
    for number in (state["torch"], *state["cuda"]):
        _need(isinstance(number, list) and len(number) <= 1 << 16, "torch: no state")
        _need(all(is_count(byte, 255) for byte in number), "torch: holds no bytes")


def _are_words(values: Any, count: int) -> bool:
    return len(values) == count and all(is_count(v, 0xFFFFFFFF) for v in values)


def check_windows(state: Any, names: Sequence[str], limit: int) -> None:
    """The last numbers of each name.

    Raises:
        ValueError: other names, too many, or no numbers.
    """
    _need(isinstance(state, dict) and set(state) == set(names), f"expected {', '.join(names)}")
    for values in state.values():
        _need(isinstance(values, list) and len(values) <= limit, f"more than {limit} numbers")
        _need(all(map(is_number, values)), "a value that is no finite number")


def check_ranks(pattern: Any, ranks: Mapping[str, int]) -> None:
    """Which of a matrix's ranks are left, by its name; nothing before the first were dropped.

    Args:
        ranks: of every matrix.

    Raises:
        ValueError: other matrices, or another number of ranks.
    """
    if not pattern:
        _need(pattern is None or pattern == {}, "rank_pattern is no object")
        return
    _need(isinstance(pattern, dict) and set(pattern) == set(ranks), "ranks of other matrices")
    for name, kept in pattern.items():
        whole = isinstance(kept, list) and len(kept) == ranks[name]
        _need(whole and all(type(k) is bool for k in kept), f"{name}: not {ranks[name]} ranks")


_TEXT = (str, type(None))


def check_trainer_state(saved: Any, step: int) -> None:
    """trainer_state.json, which transformers reads by itself.

    Args:
        step: of the checkpoint.

    Raises:
        ValueError: keys it does not know, another step, or values it cannot count on with.
    """
    from transformers import TrainerState

    _need(isinstance(saved, dict), "no object")
    other = sorted(set(saved) - set(vars(TrainerState())))
    _need(not other, f"has {', '.join(other[:3])}")
    found = saved.get("global_step")
    _need(is_count(found) and found == step, f"global_step is {found!r:.40}, not {step}")
    for key in ("epoch", "total_flos", "num_input_tokens_seen"):
        _need(is_number(saved.get(key, 0)), f"{key} is no number")
    for key in ("logging_steps", "eval_steps", "save_steps", "train_batch_size"):
        _need(saved.get(key) is None or is_number(saved[key]), f"{key} is no number")
    for key in ("best_model_checkpoint", "trial_name"):
        _need(isinstance(saved.get(key), _TEXT), f"{key} is no text")
    history = saved.get("log_history", [])
    _need(isinstance(history, list), "log_history is no list")
    _need(all(isinstance(line, dict) for line in history), "log_history has other than objects")
    _need(isinstance(saved.get("stateful_callbacks", {}), dict), "no stateful_callbacks")
