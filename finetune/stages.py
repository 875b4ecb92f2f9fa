"""The stages of a run between its config and its trainer, each saying what it found."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import set_seed

from finetune import adapters, artifact, checkpoint, identity, witness
from finetune.batching import first_rows, steps_of
from finetune.config import RunConfig
from finetune.config.adapter import READS_DATA
from finetune.data import RunData, load_data
from finetune.data_starts import NUM_TOKENS, StartInputs
from finetune.drift import acting_settings
from finetune.errors import CannotContinue, CheckFailed, InputError
from finetune.fast.blocks import speed_up
from finetune.llama.downloads import read_json_object
from finetune.llama.safetensors_pieces import Stored, stored_tensors
from finetune.llama.tokenizer import save_tokenizer
from finetune.model import (
    Base,
    find_base,
    load_model,
    untrained_ids,
    weight_files,
    write_generation_config,
)
from finetune.precision import uses_bf16_autocast
from finetune.preview import show_example
from finetune.recipes import Parts
from finetune.revisions import rows_as_begun, warn_of_rows, warn_unpinned
from finetune.run_folder import RunFolder, environment

if TYPE_CHECKING:
    from finetune.packing import BatchPlan
    from finetune.trainer import OurSeams


def device_of_rank() -> torch.device:
    """The GPU of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def prepare_base(config: RunConfig, run: RunFolder, first: bool) -> Base:
    """Finds the base; the first rank writes what is not there yet, the others wait for it."""
    with first_rank_first(first):
        base = find_base(config, run.path)
    if first:
        name = base.chat_format.name if base.chat_format else "none (plain text)"
        _say(f"base     {base.name}: prompt format {name}, {len(base.tokenizer):,} token ids")
        fingerprint = base.fingerprint()
        _refuse_other_base(run, fingerprint)
        warn_unpinned("base.revision", config.base.revision, base.revision)
        facts = {
            "base_hub_id": base.name if base.revision else None,
            "base_revision": base.revision,
            "base_fingerprint": fingerprint,
        }
        artifact.write_json(run.environment_file, {**environment(), **facts})
    return base


def _refuse_other_base(run: RunFolder, fingerprint: str) -> None:
    path = run.environment_file
    if not checkpoint.list_checkpoints(run.checkpoints) or not path.exists():
        return
    if read_json_object(path).get("base_fingerprint") != fingerprint:
        raise CheckFailed(
            f"{run.path}: its checkpoints were trained on another base; the base's files have "
            "changed since. Put them back, or choose another run.name"
        )


def prepare_data(
    config: RunConfig, run: RunFolder, base: Base, first: bool, allowed: Sequence[str] = ()
) -> RunData:
    """Rows to documents, prepared by the first rank; the ledger is printed and saved.

    Args:
        allowed: settings that may have changed; one of `data` may change the rows.
    """
    with first_rank_first(first):
        data = load_data(rows_as_begun(config, run), base.tokenizer, base.chat_format)
    if first:
        facts = data.as_json()
        warn_of_rows(config, data.file_hashes)
        if not any(key.startswith("data.") for key in allowed):
            _refuse_other_rows(run, facts)
        artifact.write_json(run.data_file, facts)
        _say("\n".join(data.lines()))
        _say(show_example(base.tokenizer, data.train[0]))
    return data


def _refuse_other_rows(run: RunFolder, found: dict[str, Any]) -> None:
    """A run that goes on sees the rows it began with, or its order means nothing."""
    path = run.data_file
    if not checkpoint.list_checkpoints(run.checkpoints) or not path.exists():
        return
    before = read_json_object(path)
    if before.get("documents_sha256") == found["documents_sha256"]:
        return
    files = before.get("files")
    known = files if isinstance(files, dict) else {}
    changed = [name for name, hash_ in found["files"].items() if known.get(name) != hash_]
    what = ", ".join(changed) or "not the files, but how they are rendered,"
    raise InputError(
        f"{run.path}: its checkpoints were trained on other rows; {what} changed since. "
        "Put them back, or choose another run.name"
    )


def prepare_model(
    config: RunConfig, run: RunFolder, base: Base, data: RunData, first: bool
) -> torch.nn.Module:
    """The base with a fresh adapter (or with all weights trainable), and the parameter report."""
    model = load_model(base, config.base, device_of_rank())
    set_seed(config.run.seed)
    if config.adapter.method == "none":
        trained: torch.nn.Module = model
    else:
        if first:
            _warn_untrained(model, base, data)
        with first_rank_first(first):
            inputs = start_inputs(config, base, data)
            trained = adapters.attach(model, config.adapter, base.name, run.start, inputs)
    speed_up(trained, config.fast)
    if first:
        report = adapters.report_parameters(trained, *_working_types(config))
        _say("\n".join(report.lines()))
    return trained


def start_inputs(config: RunConfig, base: Base, data: RunData) -> StartInputs:
    """Rows of the training side in the order of the seed, and the base's weights; both are read
    only where the initialisation asks for them."""

    @functools.cache
    def stored() -> dict[str, Stored]:
        paths = weight_files(base.folder)
        return {tensor.name: tensor for path in paths for tensor in stored_tensors(path)}

    dtype = getattr(torch, config.base.dtype)
    looks = config.adapter.init in READS_DATA
    rows = first_rows(config, data, NUM_TOKENS) if looks else []
    return StartInputs(rows, lambda name: stored()[name].read().to(dtype))


def _working_types(config: RunConfig) -> tuple[str, str]:
    """The types of the products and of the optimizer's moments, in words."""
    compute = "bfloat16 (autocast)" if uses_bf16_autocast(config) else config.base.dtype
    trained = config.base.dtype if config.adapter.method == "none" else "float32"
    if config.train.optim == "sgd":
        return compute, "no moments (sgd)"
    return compute, "int8 (blocks)" if "8bit" in config.train.optim else trained


def _warn_untrained(model: torch.nn.Module, base: Base, data: RunData) -> None:
    """An adapter leaves the embeddings as they are: an id the base never trained stays noise."""
    bare = untrained_ids(model, data.train.used_ids())
    if bare:
        names = ", ".join(map(str, base.tokenizer.convert_ids_to_tokens(bare[:8])))
        more = " …" if len(bare) > 8 else ""
        _say(
            f"warning: the rows use {len(bare)} token ids that the base never trained: "
            f"{names}{more}; for chat tokens, use its Instruct model as the base"
        )


def gather_parts(
    config: RunConfig, run: RunFolder, base: Base, data: RunData, model: torch.nn.Module, ranks: int
) -> Parts:
    """Everything a recipe needs."""
    trained_on = what_it_trains_on(config, run, base, data)
    return Parts(config, run.path, model, base.tokenizer, data, ranks, trained_on)


def what_it_trains_on(
    config: RunConfig, run: RunFolder, base: Base, data: RunData
) -> dict[str, Any]:
    """By hash: the settings with a say in the numbers, the documents, the base, its tokenizer."""
    known = read_json_object(run.environment_file)
    return {
        "config_sha256": artifact.sha256_of_json(acting_settings(config)),
        "documents_sha256": data.documents_sha256,
        **base.identity(known["base_fingerprint"]).facts(),
        # sums are cut differently by another number of threads
        "libraries": {**known["packages"], "threads": str(torch.get_num_threads())},
    }


def describe_steps(parts: Parts, plan: BatchPlan) -> str:
    """Steps and tokens as arithmetic, before the first one."""
    return steps_of(parts.config, parts.data, plan).line()


def warn_of_last_weights(config: RunConfig) -> None:
    """Early stopping alone publishes the weights it stopped at, which are past the best."""
    train = config.train
    if train.early_stopping_patience is not None and not train.load_best_model_at_end:
        _say(
            "warning: train.early_stopping_patience without train.load_best_model_at_end: the last "
            "weights are published, not the best"
        )


def notes_on_the_end(trainer: OurSeams) -> list[str]:
    """An early stop, and a held-out loss that training did not improve."""
    if trainer.last_heldout is None:
        return []
    return trainer.best.notes(trainer.step_of_weights, trainer.last_heldout[1].loss)


def keep_witness(run: RunFolder, trainer: OurSeams, first: bool) -> None:
    """What the model to be published says now, for comparison with what is loaded from disk."""
    if first:
        documents = trainer.ours.heldout or trainer.ours.train
        model: Any = trainer.model
        rows = witness.choose(documents, model.config.vocab_size)
        witness.keep(run.witness, model, rows, trainer.args.device)


def publish(run: RunFolder, base: Base, trainer: OurSeams, first: bool) -> None:
    """Writes the trained adapter, or the trained model, with a manifest that names its base."""
    if first:
        is_adapter = hasattr(trainer.model, "peft_config")
        target = run.adapter if is_adapter else run.model
        if target.exists():  # published before the process died; run.json was not
            artifact.remove(target)
        known = read_json_object(run.environment_file)
        facts = {
            "kind": "adapter" if is_adapter else "model",
            "base": base.name,
            "base_revision": base.revision,
            # of the files as they were when the run started, whatever has become of them since
            **base.identity(known["base_fingerprint"]).facts(),
            "step": trainer.step_of_weights,
            "heldout_loss": trainer.last_heldout[1].loss if trainer.last_heldout else None,
        }
        with artifact.staged(target, facts) as stage:
            _write_trained(trainer.model, stage, is_adapter, run.start)
            if is_adapter:
                facts |= identity.adapter_facts(stage)
            save_tokenizer(base.tokenizer, stage)
            if not is_adapter:
                write_generation_config(base, stage)
        _say(f"saved    {target}")
    if dist.is_initialized():
        dist.barrier()


def _write_trained(model: Any, stage: Path, is_adapter: bool, start: Path) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise CannotContinue(f"{name} holds non-finite values; nothing is published")
    if is_adapter:
        adapters.save_adapter(model, stage, start)
    else:
        model.save_pretrained(str(stage))


class first_rank_first:
    """Runs a block on the first rank before the others, where ranks know of each other by file."""

    def __init__(self, first: bool) -> None:
        self.first = first

    def __enter__(self) -> None:
        if not self.first:
            _barrier()

    def __exit__(self, *_: object) -> None:
        if self.first:
            _barrier()


def _barrier() -> None:
    """Brings up the process group (gloo on CPU) where the launch has several ranks, and waits."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def leave_ranks() -> None:
    """Ends the process group together, once the first rank has written all there is to write.

    The launcher takes a rank that ends before the others, or aborts because threads of the group
    are still there when it exits, for a failure, and ends the first rank where it stands.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _say(text: str) -> None:
    print(text, file=sys.stderr)
