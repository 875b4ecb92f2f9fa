"""What a training checkpoint holds, which are kept, and which one a run goes on from.

`checkpoints/step-NNNNNN/` is staged, hashed and published by one rename (`artifact`). It holds
the trained weights, optimizer and RNG as safetensors and JSON: no pickle is written or read.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from finetune import artifact
from finetune.artifact import write_json
from finetune.config import TrainSection
from finetune.errors import CannotContinue, CheckFailed, InputError
from finetune.llama.weight_files import tensors_in
from finetune.state_files import (
    as_written,
    check_generators,
    check_trainer_state,
    optimizer_state,
    read_state,
    schedule_counts,
)

WEIGHTS = "trained.safetensors"
OPTIMIZER = "optimizer"
SCHEDULER = "scheduler.json"
WATCH = "watch.json"  # what the rolling statistics of spikes have seen
BEST = "best.json"  # what the held-out losses so far decide
PIECES = "pieces.json"  # of a micro-batch, where memory ran out
TRAINER_STATE = "trainer_state.json"  # transformers' own name
LATEST = "latest.json"
_STEP = re.compile(r"step-[0-9]{6,12}")
_TENSOR = "__tensor__"  # stands in JSON where a tensor was


def step_folder(checkpoints: Path, step: int) -> Path:
    """`checkpoints/step-NNNNNN`."""
    return checkpoints / f"step-{step:06d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written; 0 where its folder has another name."""
    return int(folder.name.removeprefix("step-")) if _STEP.fullmatch(folder.name) else 0


def find_resumable(checkpoints: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, every file of it compared with its manifest.

    Args:
        resume: auto (the newest that verifies; damaged ones are set aside aloud), never, or a path.

    Raises:
        CheckFailed: checkpoints exist and none verifies, or the named one does not.
        InputError: `never`, and the folder has checkpoints; or no such path.
    """
    if resume not in ("auto", "never"):
        if not Path(resume).is_dir():
            raise InputError(f"run.resume {resume}: no such checkpoint")
        artifact.verify(Path(resume))
        return Path(resume)
    existing = list_checkpoints(checkpoints)
    if resume == "never" and existing:
        raise InputError(f"run.resume never, but {checkpoints} has {existing[-1].name}; remove it")
    for path in reversed(existing):
        findings = artifact.findings_of(path)
        if not findings:
            return path
        aside = _set_aside(path)
        print(f"warning: {findings[0]}; set aside as {aside.name}", file=sys.stderr)
    damaged = sorted(checkpoints.glob("damaged-*")) if resume == "auto" else []
    if damaged:
        raise CheckFailed(
            f"{checkpoints}: no checkpoint verifies; none is gone on from. {damaged[-1].name} is "
            "what is left; run.resume=never begins anew"
        )
    return None


def _set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that no start takes it for one and a person can look."""
    aside = path.with_name(f"damaged-{path.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"damaged-{path.name}-{number}")
    return path.rename(aside)


def prune(
    checkpoints: Path, keep: int, written: Path | None = None, protected: Path | None = None
) -> None:
    """Removes what is older than the newest `keep` that verify; a damaged one does not count.

    Each is un-published before it is deleted.

    Args:
        written: one whose files this process has just hashed; they are not read again.
        protected: one that stays, whatever its age.
    """
    existing = list_checkpoints(checkpoints)
    if len(existing) <= keep:  # nothing to remove, and so nothing to read
        return
    sound = 0
    while existing and sound < keep:
        newest = existing.pop()
        sound += newest == written or not artifact.findings_of(newest)
    for path in existing:
        if path != protected:
            artifact.remove(path)


_MOMENTS = {"sgd": 0.0, "adamw_8bit": 0.5, "paged_adamw_8bit": 0.5}  # of the weights' bytes
_SPARE_BYTES = 16 << 20  # RNG states, JSON, what the file system itself takes


def refuse_small_disk(
    model: torch.nn.Module, train: TrainSection, num_steps: int, folder: Path
) -> None:
    """Compares the disk with what a run's checkpoints and its result will take.

    Args:
        num_steps: that are to come.
        folder: of the run.

    Raises:
        CannotContinue: they do not fit.
    """
    weights = sum(p.numel() * p.element_size() for p in trained_parameters(model).values())
    one = int(weights * (1 + _MOMENTS.get(train.optim, 2.0))) + _SPARE_BYTES
    existing = list_checkpoints(folder / "checkpoints")
    room = train.checkpoints_at_once(None) - len(existing)
    count = max(min(room, train.most_saves(num_steps)), 1)
    needed, free = one * count + weights, shutil.disk_usage(folder).free
    if free < needed:
        raise CannotContinue(
            f"{folder}: {free:,} bytes are free; {count} more checkpoints of {one:,} bytes and the "
            f"result need {needed:,}. Make room, choose another run.dir, or keep fewer "
            "(train.save_total_limit)"
        )


def write_latest(checkpoints: Path, step: int) -> None:
    """Names the newest checkpoint for people and scripts."""
    write_json(checkpoints / LATEST, {"step": step, "folder": step_folder(checkpoints, step).name})


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by name; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """The trained parameters only: an adapter's checkpoint has the size of the adapter.

    Raises:
        CannotContinue: one is not finite; a checkpoint of it would take a good one's place.
    """
    for name, parameter in trained_parameters(model).items():
        if not bool(torch.isfinite(parameter).all()):
            raise CannotContinue(f"{name} holds non-finite values; no checkpoint is written")
    tensors = {n: p.detach().cpu().contiguous() for n, p in trained_parameters(model).items()}
    save_file(tensors, str(folder / WEIGHTS))


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Puts saved parameters back, bit for bit.

    Raises:
        CheckFailed: names, shapes or types differ from the model's.
    """
    saved, wanted = tensors_in(folder / WEIGHTS), trained_parameters(model)
    if set(saved) != set(wanted):
        differing = sorted(set(saved) ^ set(wanted))
        raise CheckFailed(f"{folder}: trained parameters differ: {', '.join(differing[:5])}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            tensor = saved[name]
            if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                raise CheckFailed(f"{folder}: {name} is {tensor.dtype} {tuple(tensor.shape)}")
            parameter.copy_(tensor)


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Optimizer state: tensors as safetensors, everything else as JSON that points at them."""
    tensors: dict[str, torch.Tensor] = {}
    structure = _without_tensors(optimizer.state_dict(), "state", tensors)
    save_file(tensors, str(folder / f"{OPTIMIZER}.safetensors"))
    _write(folder / f"{OPTIMIZER}.json", structure)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts the moments back; rates, decay and the like stay those of the config.

    They are the same numbers unless a setting was changed on purpose, and then it is to act.

    Raises:
        CheckFailed: a state that this optimizer cannot have.
    """
    path = folder / f"{OPTIMIZER}.json"
    tensors, saved = tensors_in(path.with_suffix(".safetensors")), read_state(path)
    with as_written(path):
        optimizer.load_state_dict(optimizer_state(_with_tensors(saved, tensors), optimizer))


def _without_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON; each tensor in it goes to `tensors` and leaves its name behind."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {str(k): _without_tensors(v, f"{name}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """The schedule's state as JSON."""
    _write(folder / SCHEDULER, scheduler.state_dict())


def load_scheduler(scheduler: Any, folder: Path) -> None:
    """Puts the schedule where it was, with the config's own peak rates, and the rates with it.

    Raises:
        CheckFailed: no place in a schedule.
    """
    path = folder / SCHEDULER
    saved = read_state(path)
    with as_written(path):
        scheduler.last_epoch, scheduler._step_count = schedule_counts(saved)
    shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
    rates = [peak * share for peak, share in zip(scheduler.base_lrs, shares, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def rng_state() -> dict[str, Any]:
    """Every generator this process draws from: Python, NumPy, torch on CPU and GPU."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts generators back where `rng_state` found them.

    Raises:
        ValueError, TypeError, LookupError, RuntimeError: no states of generators.
    """
    check_generators(state)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])


def save_rng(states: list[dict[str, Any]], folder: Path) -> None:
    """The generators of every rank."""
    _write(folder / "rng.json", states)


def load_rng(folder: Path, rank: int) -> None:
    """Restores the generators of this rank.

    Raises:
        CheckFailed: the checkpoint was written by fewer ranks, or holds no such states.
    """
    path = folder / "rng.json"
    states = read_state(path)
    if isinstance(states, list) and rank >= len(states):
        raise CheckFailed(f"{folder}: was written by {len(states)} ranks; rank {rank} has no state")
    with as_written(path):
        restore_rng(states[rank])


def load_pieces(folder: Path) -> int:
    """In how many pieces the run took its micro-batches: 1 where memory never ran out.

    Raises:
        CheckFailed: the file says something else.
    """
    path = folder / PIECES
    if not path.exists():
        return 1
    state = read_state(path)
    with as_written(path):
        number = state["num_pieces"]
        if type(number) is not int or not 1 <= number <= 1 << 16:
            raise ValueError("num_pieces is no number of pieces")
    return number


def refuse_other_state(folder: Path) -> None:
    """Looks at what transformers reads by itself.

    Raises:
        CheckFailed: transformers could not go on with it.
    """
    path = folder / TRAINER_STATE
    saved = read_state(path)
    with as_written(path):
        check_trainer_state(saved, artifact.read_manifest(folder)["facts"]["step"])


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
