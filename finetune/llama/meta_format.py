"""Meta checkpoints in and out: a folder as Meta ships it <-> one as transformers loads it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from finetune import artifact
from finetune.cache import kept_in_cache, remembered_sha256
from finetune.errors import CannotContinue, InputError
from finetune.llama.architecture import to_llama_config
from finetune.llama.hyperparameters import Architecture
from finetune.llama.meta_checkpoint import (
    PARAMS,
    MetaCheckpoint,
    check_intact,
    is_meta_folder,
    read_checkpoint,
)
from finetune.llama.meta_export import ORIGINAL, TOKENIZER, export_checkpoint
from finetune.llama.meta_layout import meta_to_hf_rows, num_rotated_heads
from finetune.llama.safetensors_stream import DTYPES, Planned, write_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "cached_import",
    "export_checkpoint",
    "import_checkpoint",
    "is_meta_folder",
    "main",
    "read_checkpoint",
]

MAX_FILE_BYTES = 1_500_000_000  # of one safetensors file, and so about the peak of an import
_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")  # Llama 3; all of those that exist


def import_checkpoint(
    source: Path,
    out: Path,
    dtype: str | None = None,
    *,
    tokenizer: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Converts a Meta folder to a Hugging Face folder and publishes it with one rename.

    The weights stay as they are, except that the rows of the query and key projections change
    their order; a head equal to the embedding is stored once, as tied. Memory holds about one
    output file. Meta's params.json and tokenizer.model are kept in `original/`.

    Args:
        source: folder with params.json, consolidated.NN.pth and tokenizer.model (which may also
            lie in the folder above, as Llama 2's download has it).
        out: the folder to write; must not exist.
        dtype: a type to convert the weights to; None keeps the file's.
        tokenizer: another tokenizer file or folder.
        max_file_bytes: size at which the weights are cut into several files.

    Raises:
        InputError: anything wrong with the source; nothing is written then.
        CannotContinue: the disk refused.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; choose another name or remove it first")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    checkpoint = read_checkpoint(source)
    tokenizer_path = tokenizer or _tokenizer_beside(source)
    loaded, arch = _with_tokenizer(checkpoint, tokenizer_path)
    check_intact(checkpoint.shards)
    with artifact.staged(out, {"kind": "import", "source": str(source)}) as folder:
        _write_weights(checkpoint, arch, folder, dtype, max_file_bytes)
        _write_settings(arch, loaded, folder, dtype or checkpoint.dtype)
        originals = folder / ORIGINAL
        originals.mkdir()
        shutil.copyfile(source / PARAMS, originals / PARAMS)
        if tokenizer_path.name == TOKENIZER:
            shutil.copyfile(tokenizer_path, originals / TOKENIZER)


def cached_import(source: Path, cache_root: Path, tokenizer: Path | None = None) -> Path:
    """The Hugging Face folder of a Meta folder, converted once for each content.

    The name holds a hash of every file's content, so a changed source is converted again.
    Hashes are remembered by size and time of change: large files are read once.

    Args:
        source: Meta's folder.
        cache_root: where conversions are kept.
        tokenizer: another tokenizer file or folder.

    Raises:
        InputError: anything wrong with the source.
    """
    tokenizer = tokenizer or _tokenizer_beside(source)
    files = [source / PARAMS, *read_checkpoint(source).shards, *_files_of(tokenizer)]
    digest = artifact.sha256_of_json([remembered_sha256(file, cache_root) for file in files])
    out = cache_root / f"{source.resolve().name}-{digest[:16]}"
    hash_of = functools.partial(remembered_sha256, root=cache_root)
    if out.exists() and (findings := artifact.findings_of(out, hash_of)):
        print(f"base     {out} is damaged; converted again. {findings[0]}", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            artifact.remove(out)
    if not out.exists():
        try:
            with kept_in_cache():
                import_checkpoint(source, out, tokenizer=tokenizer)
        except (InputError, CannotContinue):
            if not out.exists():  # else another process was faster
                raise
    return out


def _tokenizer_beside(source: Path) -> Path:
    for folder in (source, source.parent):
        if (folder / TOKENIZER).is_file():
            return folder / TOKENIZER
    raise InputError(f"{source}: has no {TOKENIZER}, nor has the folder above it")


def _with_tokenizer(
    checkpoint: MetaCheckpoint, path: Path
) -> tuple[PreTrainedTokenizerFast, Architecture]:
    """The tokenizer, and the architecture with its special ids."""
    from finetune.llama.tokenizer import check_vocabulary, load_tokenizer

    loaded = load_tokenizer(path, model_folder=checkpoint.folder)
    check_vocabulary(loaded, checkpoint.arch.vocab_size, str(checkpoint.folder))
    loaded.model_max_length = checkpoint.arch.context
    vocabulary = loaded.get_vocab()
    names = dict.fromkeys((loaded.eos_token, *_STOPS))
    stops = tuple(vocabulary[name] for name in names if name in vocabulary)
    arch = replace(
        checkpoint.arch,
        bos_token_id=loaded.bos_token_id,
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
    )
    return loaded, arch


def _write_weights(
    checkpoint: MetaCheckpoint, arch: Architecture, folder: Path, dtype: str | None, max_bytes: int
) -> None:
    """Streams the weights into `folder`; each output file maps the sources anew, so that the
    pages of one file are let go before the next begins."""
    import torch

    out_dtype = dtype or checkpoint.dtype
    plan = [
        Planned(weight.hf, out_dtype, weight.shape)
        for weight in checkpoint.weights.values()
        if not (arch.tie_word_embeddings and weight.hf == "lm_head.weight")
    ]
    total = sum(planned.num_bytes for planned in plan)
    progress = _progress()
    task = progress.add_task("import", total=total)

    def begin_file() -> Callable[[str], Tensor]:
        opened = checkpoint.open()

        def make(name: str) -> Tensor:
            weight, tensor = checkpoint.weights[name], opened.tensor(name)
            if weight.rotated:
                tensor = meta_to_hf_rows(tensor, num_rotated_heads(weight, arch))
            tensor = tensor.to(getattr(torch, out_dtype))
            progress.advance(task, tensor.nbytes)
            return tensor

        return make

    with progress:
        write_model(folder, plan, begin_file, max_bytes)


def _progress() -> Progress:
    """A bar on stderr, only where someone watches."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _write_settings(
    arch: Architecture, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: str
) -> None:
    from transformers import GenerationConfig

    from finetune.llama.tokenizer import save_tokenizer

    config = to_llama_config(arch, dtype)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(str(folder))
    GenerationConfig(
        bos_token_id=arch.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(str(folder))
    save_tokenizer(tokenizer, folder)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.iterdir() if p.is_file() and p.name.startswith(("token", "spec")))


def main(argv: list[str]) -> int:
    """`python -m finetune import DIR --out DIR`: a Meta checkpoint to a Hugging Face folder."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune import",
        description="Converts a Meta checkpoint to a folder that transformers loads.",
    )
    parser.add_argument(
        "source", type=Path, help="params.json, consolidated.NN.pth, tokenizer.model"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), help="convert the weights; default: keep")
    parser.add_argument("--tokenizer", type=Path, help="another tokenizer file or folder")
    parser.add_argument("--json", action="store_true", help="what was written, as JSON on stdout")
    args = parser.parse_args(argv)
    import_checkpoint(args.source, args.out, args.dtype, tokenizer=args.tokenizer)
    config = artifact.read_json(args.out / "config.json")
    files = artifact.read_manifest(args.out)["files"]
    num_bytes = sum(entry["bytes"] for entry in files.values())
    if args.json:
        print(json.dumps({"out": str(args.out), "bytes": num_bytes, "dtype": config["dtype"]}))
    else:
        print(f"{args.out}: {len(files)} files, {num_bytes:,} bytes, {config['dtype']}")
    return 0
