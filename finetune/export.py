"""`export`: a run's merged weights, its adapter, or a model folder, in another layout.

| format | what is written |
|---|---|
| hf | Hugging Face safetensors in files of a chosen size, config, tokenizer, chat template |
| meta | params.json, consolidated.NN.pth and tokenizer.model, as Meta ships its checkpoints |
| gguf | one GGUF file for llama.cpp, with tokenizer and chat template |
| ollama | the same, and a Modelfile with the prompt format and its stops |
| peft | the adapter as PEFT and vLLM load it |
| gguf-lora | the adapter as a GGUF file for llama.cpp |
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune import artifact
from finetune.errors import CannotContinue, InputError
from finetune.exports import huggingface
from finetune.exports.card import LOADING, Exported, Loading, card
from finetune.exports.gguf_adapter import adapter_tensors, read_pairs, write_gguf_adapter
from finetune.exports.gguf_model import plan_tensors, write_gguf_model
from finetune.exports.gguf_stream import TYPES, gguf_package
from finetune.exports.gguf_tokenizer import token_table
from finetune.exports.ollama import modelfile
from finetune.exports.source import (
    Source,
    exportable_folder,
    open_source,
    original_tokenizer,
    run_of_folder,
)
from finetune.llama.meta_format import export_checkpoint
from finetune.model import converted, find_base, is_meta_layout, read_architecture

# Which options a format takes beside --out and --json.
OPTIONS = {
    "hf": {"max_file_gib", "chat_format"},
    "meta": {"shards", "tokenizer"},
    "gguf": {"type", "tokenizer", "chat_format"},
    "ollama": {"type", "tokenizer", "chat_format"},
    "peft": set[str](),
    "gguf-lora": {"base"},
}
_OPTIONS = ("shards", "type", "max_file_gib", "tokenizer", "chat_format", "base")


def main(argv: Sequence[str]) -> int:
    """The verb `export`."""
    args = _parse(argv)
    foreign = [name for name in _OPTIONS if getattr(args, name) is not None]
    foreign = [name for name in foreign if name not in OPTIONS[args.format]]
    if foreign:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise InputError(f"{names}: has no effect on --format {args.format}; leave it out")
    if args.out.exists() or args.out.is_symlink():
        raise InputError(f"{args.out}: exists already; choose another name or remove it first")
    told = WRITERS[args.format](args)
    files = artifact.read_manifest(args.out)["files"]
    num_bytes = sum(entry["bytes"] for entry in files.values())
    print(f"exported {args.out}: {len(files)} files, {num_bytes:,} bytes", file=sys.stderr)
    if args.json:
        facts = {"out": str(args.out), "format": args.format, **told}
        print(json.dumps({**facts, "bytes": num_bytes}))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetune export", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("target", type=Path, help="a run folder or a model folder")
    parser.add_argument("--format", choices=tuple(OPTIONS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--type", choices=TYPES, help="GGUF: of the weights (as they are stored)")
    parser.add_argument("--max-file-gib", type=float, help="hf: largest file (5)")
    parser.add_argument("--shards", type=int, help="meta: consolidated.NN.pth files (1)")
    parser.add_argument("--tokenizer", type=Path, help="meta, GGUF: the original tokenizer.model")
    parser.add_argument("--chat-format", help="instead of the run's or the folder's own")
    parser.add_argument("--base", type=Path, help="gguf-lora: an adapter folder's base")
    parser.add_argument("--json", action="store_true", help="what was written, as JSON on stdout")
    return parser.parse_args(list(argv))


def write_hf(args: argparse.Namespace) -> dict[str, Any]:
    """`--format hf`."""
    size = 5.0 if args.max_file_gib is None else args.max_file_gib
    if not size > 0:
        raise InputError(f"--max-file-gib {size}: must be above 0")
    source = open_source(args.target, args.chat_format)
    stored = huggingface.plan_weights(source)
    check_space(args.out, huggingface.num_bytes_of(stored))
    what = "Full weights in Hugging Face's layout."
    with _staged(args, {}) as stage:
        huggingface.write_hf(stage, source, stored, size)
        _write_card(stage, source, what, "transformers", LOADING["hf"])
    return {"max_file_gib": size}


def write_meta(args: argparse.Namespace) -> dict[str, Any]:
    """`--format meta`."""
    folder = exportable_folder(args.target)
    source = open_source(args.target)
    tokenizer = original_tokenizer(source, args.tokenizer)
    if tokenizer is None:
        raise InputError(
            f"{folder}: Meta's layout needs the original tokenizer.model, and there is none of "
            "this tokenizer beside the model or its base; name it with --tokenizer"
        )
    shards = 1 if args.shards is None else args.shards
    readme = _card(source, "Full weights in Meta's layout.", "pytorch", LOADING["meta"])
    export_checkpoint(folder, args.out, shards, tokenizer=tokenizer, readme=readme)
    return {"shards": shards}


def write_gguf(args: argparse.Namespace) -> dict[str, Any]:
    """`--format gguf`, and with a Modelfile `--format ollama`."""
    gguf_package()
    source = open_source(args.target, args.chat_format)
    name, ollama = f"{source.name}.gguf", args.format == "ollama"
    recipe = modelfile(source, name) if ollama else None
    tensors = plan_tensors(source, args.type)
    check_space(args.out, sum(tensor.num_bytes for tensor in tensors))
    table = token_table(source, args.tokenizer)
    types = dict(Counter(tensor.type for tensor in tensors))
    kinds = ", ".join(f"{count} tensors {kind}" for kind, count in types.items())
    what = f"Full weights as a GGUF file ({kinds})" + (", with a Modelfile." if ollama else ".")
    with _staged(args, {"types": types}) as stage:
        write_gguf_model(stage / name, source, tensors, table)
        if recipe is not None:
            (stage / "Modelfile").write_text(recipe, encoding="utf-8")
        _write_card(stage, source, what, "gguf", LOADING[args.format])
    return {"types": types}


def write_peft(args: argparse.Namespace) -> dict[str, Any]:
    """`--format peft`."""
    adapter = huggingface.adapter_folder(args.target)
    run = run_of_folder(args.target)
    loading = LOADING["peft"]
    if not huggingface.is_served_by_vllm(adapter):
        loading = [block for block in loading if "vllm" not in block[1]]
    about = Exported(adapter_name(args.target), "A PEFT adapter.", "peft", loading, None, run)
    with _staged(args, {}) as stage:
        huggingface.write_peft(stage, adapter, run)
        _write(stage / "README.md", card(about))
    return {}


def write_gguf_lora(args: argparse.Namespace) -> dict[str, Any]:
    """`--format gguf-lora`."""
    gguf_package()
    adapter = huggingface.adapter_folder(args.target)
    run = run_of_folder(args.target)
    if args.base is None and run is None:
        raise InputError(f"{args.target}: is the adapter of no run; name its base with --base")
    base = args.base or find_base(run.config(), run.path).folder  # type: ignore[union-attr]
    arch = read_architecture(converted(base) if is_meta_layout(base) else base)
    pairs, alpha = read_pairs(adapter, arch)
    name = adapter_name(args.target)
    what = f"A LoRA adapter of {len(pairs)} matrices as a GGUF file, for a GGUF of its base."
    about = Exported(name, what, "gguf", LOADING["gguf-lora"], arch, run)
    with _staged(args, {"matrices": len(pairs)}) as stage:
        tensors = adapter_tensors(pairs, alpha, arch)
        write_gguf_adapter(stage / f"{name}-lora.gguf", tensors, alpha, name)
        _write(stage / "README.md", card(about))
    return {"matrices": len(pairs)}


def adapter_name(target: Path) -> str:
    """The run's name, or the adapter folder's."""
    run = run_of_folder(target)
    return (run.path if run else target).resolve().name


def _staged(
    args: argparse.Namespace, facts: dict[str, Any]
) -> contextlib.AbstractContextManager[Path]:
    return artifact.staged(args.out, {"kind": "export", "format": args.format, **facts})


def _card(source: Source, what: str, library: str, loading: Loading) -> str:
    known = (source.architecture, source.run, source.combination)
    return card(Exported(source.name, what, library, loading, *known))


def _write_card(stage: Path, source: Source, what: str, library: str, loading: Loading) -> None:
    _write(stage / "README.md", _card(source, what, library, loading))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def check_space(out: Path, num_bytes: int) -> None:
    """Refuses before the first byte what the disk has no room for.

    Raises:
        CannotContinue: less is free than will be written.
    """
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise CannotContinue(
            f"{out}: needs {num_bytes:,} bytes, the disk has {free:,}; nothing written"
        )


WRITERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "hf": write_hf,
    "meta": write_meta,
    "gguf": write_gguf,
    "ollama": write_gguf,
    "peft": write_peft,
    "gguf-lora": write_gguf_lora,
}
