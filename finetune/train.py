"""`accelerate launch finetune/train.py CONFIG [key=value …]`: one config, one run folder.

Reads like a table of contents: each line of `train` is a stage with a module of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: put the repository first, not finetune/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from finetune.artifact import Place, keep_to_oneself
from finetune.config.loader import Loaded, load
from finetune.errors import (
    CannotContinue,
    FinetuneError,
    InputError,
    Interrupted,
    exit_code_of,
    run_command,
)
from finetune.heap import loading_libraries

if TYPE_CHECKING:
    from finetune.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """Trains what a config says. Returns the exit code of the contract."""
    args = _parse(argv)
    loaded = load(args.config, args.overrides)
    if args.smoke:
        from finetune.smoke import run_smoke

        if num_ranks() > 1:
            raise InputError(f"--smoke runs in one process; this launch has {num_ranks()}")
        return run_smoke(loaded)
    return train(loaded, args.allow_change)


def train(loaded: Loaded, allowed: Sequence[str] = ()) -> int:
    """One run, from its config to its adapter (or model) on disk.

    Args:
        allowed: settings that may differ from those the run began with.

    Raises:
        FinetuneError: with the exit code of the contract; run.json says the same.
    """
    from finetune import peak, trackers
    from finetune.run_folder import locked, open_run, run_of

    check_launch()
    trackers.refuse_missing(loaded.config.train.report_to)
    peak.refuse_offloading(loaded.config)
    _use_all_cores()
    run = open_run(loaded, allowed) if is_first_rank() else run_of(loaded)
    if run.is_finished:
        _say(f"run      {run.path} is finished; nothing to do")
        return 0
    from finetune.stages import leave_ranks

    notes: list[str] = []
    try:
        with contextlib.ExitStack() as stack:
            if is_first_rank():
                stack.enter_context(locked(run))
                notes = stack.enter_context(_state_recorded(run))
            trackers.keep_local(loaded.config.train.report_to, run.path)
            notes += _train(loaded, run, allowed)
    except Interrupted:
        leave_ranks()
        raise
    leave_ranks()
    return 0


def _train(loaded: Loaded, run: RunFolder, allowed: Sequence[str]) -> list[str]:
    """The stages in their order. Returns what a person should know of how training ended."""
    with loading_libraries():
        from finetune import checkpoint, fit, resume, stages
        from finetune.batching import steps_of
        from finetune.fast.allocator import keep_freed_memory
        from finetune.fast.products import keep_small_kernels
        from finetune.monitor import Progress, StepMetrics, StopAtBoundary, stop_on_signals
        from finetune.precision import multiplies_in_bf16
        from finetune.recipes import RECIPES
        from finetune.watchdog import frozen_checksums, refuse_changed

    config = loaded.config
    if multiplies_in_bf16(config):
        keep_small_kernels()
    base = stages.prepare_base(config, run, is_first_rank())
    data = stages.prepare_data(config, run, base, is_first_rank(), allowed)
    known = {"arch": base.architecture, "data": data}
    config = fit.fitted(config, run.fit_file, num_ranks(), is_first_rank(), known)
    model = stages.prepare_model(config, run, base, data, is_first_rank())
    parts = stages.gather_parts(config, run, base, data, model, num_ranks())
    trainer = RECIPES[config.recipe](parts)
    place = Place.of(run.path)
    frozen = frozen_checksums(model)
    _check_ranks(trainer.accelerator.num_processes)
    if is_first_rank():
        _say(stages.describe_steps(parts, trainer.ours.plan))
        stages.warn_of_last_weights(config)
    resumed = resume.choose_checkpoint(parts, run, is_first_rank(), allowed)
    if is_first_rank():
        done = 0 if resumed is None else checkpoint.step_of(resumed)
        num_steps = steps_of(config, data, trainer.ours.plan).total - done
        checkpoint.refuse_small_disk(model, config.train, num_steps, run.path)
    if config.fast.allocator and trainer.args.device.type == "cpu":
        keep_freed_memory()
    with stop_on_signals() as flag:
        stop = StopAtBoundary(flag)
        trainer.add_callback(stop)
        metrics = StepMetrics(trainer, run.metrics, Progress(config.train.logging_steps))
        if is_first_rank():
            trainer.add_callback(metrics)
        try:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            if stop.stopped:
                step = trainer.state.global_step
                raise Interrupted(f"stopped after step {step}, saved; the same command goes on")
        finally:
            metrics.close()
    refuse_changed(frozen, model)
    place.refuse_another()
    stages.keep_witness(run, trainer, is_first_rank())
    stages.publish(run, base, trainer, is_first_rank())
    notes = stages.notes_on_the_end(trainer)
    for note in notes:
        _say(f"note     {note}")
    return notes


@contextlib.contextmanager
def _state_recorded(run: RunFolder) -> Iterator[list[str]]:
    """Keeps run.json true: running, then finished, or the exit code and the reason.

    Yields a list for what a person should know of a run that finishes.
    """
    run.write_state(state="running", exit_code=None, reason=None)
    notes: list[str] = []
    try:
        yield notes
    except BaseException as error:
        state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        reason = str(error) if isinstance(error, FinetuneError) else type(error).__name__
        try:
            run.write_state(state=state, exit_code=exit_code_of(error), reason=reason)
        except CannotContinue as other:  # the disk that ended the run, as a rule
            _say(f"warning: {other}")
        raise
    run.write_state(state="finished", exit_code=0, reason="; ".join(notes) or None)


_RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def num_ranks() -> int:
    """Processes of this launch, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process speaks and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def check_launch() -> None:
    """Refuses a launch that asked for several processes and got one.

    WORLD_SIZE without the rest of what ranks need to meet was set by hand, or by a scheduler that
    starts no others. `accelerate launch --cpu --num_processes 2` starts a single process on a
    machine without a GPU and says nothing (accelerate 1.15).
    """
    asked = _accelerate_num_processes()
    if asked is not None and asked != num_ranks():
        raise InputError(
            f"accelerate launch was asked for {asked} processes and started {num_ranks()}; "
            "on CPU use --multi_gpu --num_processes N (gloo), or torchrun"
        )
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if num_ranks() > 1 and missing:
        raise InputError(
            f"WORLD_SIZE is {num_ranks()}, but {', '.join(missing)} is not set: this process is "
            "alone. Launch with accelerate launch --multi_gpu --num_processes N, or torchrun"
        )


def _accelerate_num_processes() -> int | None:
    """`--num_processes N` of an `accelerate launch` above this process, where that is readable."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, UnicodeDecodeError):
        return None
    # accelerate launch …, accelerate-launch …, python -m accelerate.commands.launch …
    programs = {Path(word).name.split(".")[0] for word in words[:3]}
    if not programs & {"accelerate", "accelerate-launch"}:
        return None
    for word, following in pairwise(words):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            return int(value or following)
    return None


def _check_ranks(num_processes: int) -> None:
    if num_processes != num_ranks():
        raise InputError(
            f"WORLD_SIZE is {num_ranks()}, but {num_processes} ranks found each other; "
            "each would train alone and write the same folder. Launch with --multi_gpu or torchrun"
        )


def _use_all_cores() -> None:
    """The launcher sets OMP_NUM_THREADS=1 even for one process; share the cores among the ranks."""
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, (cores or 1) // local))


def _say(text: str) -> None:
    if is_first_rank():
        print(text, file=sys.stderr)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m finetune train", description=main.__doc__)
    parser.add_argument("config", help="a YAML config, e.g. configs/lora_nano.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. train.learning_rate=1e-4")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="lets a run go on with another value of a setting, e.g. train.learning_rate; repeat",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="the same config on a small random Llama: two steps, eval, merge, no network",
    )
    return parser.parse_intermixed_args(list(argv))


if __name__ == "__main__":
    keep_to_oneself()
    sys.exit(run_command(lambda args: main(args), sys.argv[1:]))
