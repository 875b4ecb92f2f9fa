"""Meta's folder, opened and checked: params.json and one or many consolidated.NN.pth."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError
from finetune.llama.downloads import read_json_object, refuse_failed_download
from finetune.llama.hyperparameters import Architecture
from finetune.llama.meta_layout import BY_COLUMNS, BY_ROWS, Weight, join, weights_of
from finetune.llama.params_json import from_params_json

if TYPE_CHECKING:
    from torch import Tensor

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
# Tables of RoPE that Llama 1 and 2 saved along; they follow from the architecture.
_NOT_WEIGHTS = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
_LAYER = re.compile(r"layers\.(\d+)\.")
_MAX_SHOWN = 8


@dataclass(frozen=True)
class MetaCheckpoint:
    """A checked checkpoint: every weight is there, in every shard, with the right shape.

    Attributes:
        folder: where it lies.
        shards: the .pth files in order.
        arch: the architecture; special ids are not set, they are the tokenizer's to say.
        embedding_split: `BY_COLUMNS` (Llama 1, 2) or `BY_ROWS` (Llama 3).
        dtype: the weights' type, by name.
        weights: every stored weight by its Hugging Face name.
    """

    folder: Path
    shards: tuple[Path, ...]
    arch: Architecture
    embedding_split: int
    dtype: str
    weights: Mapping[str, Weight]

    def open(self) -> OpenCheckpoint:
        """Maps the files into memory; drop the result to let go of the pages read so far."""
        return OpenCheckpoint(self, [load_shard(path) for path in self.shards])


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose shards are mapped into memory."""

    checkpoint: MetaCheckpoint
    states: list[dict[str, Tensor]]

    def tensor(self, hf_name: str) -> Tensor:
        """A whole weight, its rows still in Meta's order."""
        weight = self.checkpoint.weights[hf_name]
        return join(weight, [state[weight.meta] for state in self.states])


def is_meta_folder(path: Path) -> bool:
    """Whether a folder is laid out as Meta's checkpoints are."""
    return (path / PARAMS).is_file() and any(map(_SHARD.fullmatch, _names(path)))


def read_checkpoint(folder: Path) -> MetaCheckpoint:
    """Opens Meta's folder and checks that its parts belong together.

    Raises:
        InputError: files that are missing, cut off or no checkpoints, shards of two models, a
            params.json of another size; all findings.
    """
    params = read_json_object(folder / PARAMS)
    shards = _shard_paths(folder)
    states = [load_shard(path) for path in shards]
    arch, embedding_split = _architecture(folder, params, states)
    _check_depth(shards[0], arch, states[0])
    listed = {w.hf: w for w in weights_of(arch, len(shards), embedding_split)}
    if "output.weight" not in states[0]:
        del listed["lm_head.weight"]
    _check_shapes(shards, states, list(listed.values()))
    dtype = _common_dtype(shards, states, list(listed.values()))
    _check_repeated(shards, states, list(listed.values()))
    _check_distinct(shards, states, list(listed.values()))
    checkpoint = MetaCheckpoint(folder, shards, arch, embedding_split, dtype, listed)
    tied = _is_tied(OpenCheckpoint(checkpoint, states))
    return replace(checkpoint, arch=replace(arch, tie_word_embeddings=tied))


def load_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one .pth file, mapped where its format allows, by weights-only loading.

    Raises:
        InputError: no checkpoint, cut off, or one that holds more than tensors; nothing in it
            is executed.
    """
    import torch

    refuse_failed_download(path)
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not is_zip and file.read(4) == b"PK\x03\x04":
            raise InputError(f"{path}: was cut off (its zip directory is missing); get it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused here anyway
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: {_unpickling_cause(str(error))}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        # torch's advice to load such files without its safeguard is not passed on.
        cause = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
        raise InputError(f"{path}: is damaged or no PyTorch checkpoint ({cause})") from None
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise InputError(f"{path}: holds no table of named tensors, as Meta's checkpoints do")
    kept = {name: t for name, t in state.items() if not _NOT_WEIGHTS.fullmatch(str(name))}
    for name, tensor in kept.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = "sparse" if tensor.layout != torch.strided else "without content"
            raise InputError(f"{path}: {name} is {kind}; Meta's checkpoints hold plain matrices")
    return kept


def check_intact(shards: Sequence[Path]) -> None:
    """Compares the shards with the checksums that PyTorch stored in them; reads all of them.

    Loading does not do this: a flipped bit would become a wrong weight in silence.

    Raises:
        InputError: content that changed since it was saved; names every file.
    """
    found = []
    for path in shards:
        if not zipfile.is_zipfile(path):
            continue  # the format of before 2020 has none
        with zipfile.ZipFile(path) as archive:
            try:
                damaged = archive.testzip()
            except (zipfile.BadZipFile, OSError) as error:
                damaged = str(error)
        if damaged is not None:
            found.append(f"{path}: was damaged after it was saved (checksum of {damaged})")
    if found:
        raise InputError(found)


def _unpickling_cause(message: str) -> str:
    found = re.search(r"(?:GLOBAL|global|callable|function)\s+[`'\"]?([\w.]+)", message)
    if "Weights only load failed" in message and found:
        return (
            f"holds more than tensors (it asks for {found.group(1)}); files that could run code "
            "are refused, nothing of it was executed"
        )
    return "is no PyTorch checkpoint of tensors alone, or was cut off; nothing of it was executed"


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _shard_paths(folder: Path) -> tuple[Path, ...]:
    names = [name for name in _names(folder) if _SHARD.fullmatch(name)]
    if not names:
        raise InputError(f"{folder}: has no consolidated.NN.pth")
    numbers: dict[int, str] = {}
    for name in names:
        other = numbers.setdefault(int(name.split(".")[1]), name)
        if other != name:
            raise InputError(
                f"{folder}: {other} and {name} are both shard {int(name.split('.')[1])}; take the "
                "one away that is not of this model"
            )
    missing = [n for n in range(max(numbers) + 1) if n not in numbers]
    if missing:
        listed = ", ".join(f"consolidated.{n:02d}.pth" for n in missing)
        raise InputError(f"{folder}: {listed} missing, {names[-1]} is there")
    return tuple(folder / numbers[n] for n in sorted(numbers))


def _architecture(
    folder: Path, params: Mapping[str, Any], states: Sequence[Mapping[str, Tensor]]
) -> tuple[Architecture, int]:
    """The architecture, with the vocabulary from the embedding, and how that was cut."""
    embedding = states[0].get("tok_embeddings.weight")
    if embedding is None or embedding.dim() != 2:
        raise InputError(f"{folder}: its shards have no embedding (tok_embeddings.weight)")
    rows, columns = embedding.shape
    split = BY_ROWS if columns == params.get("dim") else BY_COLUMNS
    num_rows = rows * len(states) if split == BY_ROWS else rows
    stated = params.get("vocab_size", -1)
    try:
        return from_params_json(params, vocab_size=num_rows if stated == -1 else None), split
    except InputError as error:
        raise InputError([f"{folder / PARAMS}: {f}" for f in error.findings]) from None


def _check_depth(shard: Path, arch: Architecture, state: Mapping[str, Tensor]) -> None:
    """Compared before anything is listed by layer: a file may state any number of them."""
    layers = {found.group(1) for name in state if (found := _LAYER.match(str(name)))}
    if len(layers) != arch.n_layers:
        raise InputError(
            f"{shard}: has {len(layers)} layers, {PARAMS} says {arch.n_layers}; they are not of "
            "one model"
        )


def _check_shapes(
    shards: Sequence[Path], states: Sequence[Mapping[str, Tensor]], weights: Sequence[Weight]
) -> None:
    expected = {w.meta: w.shard_shape(len(shards)) for w in weights if w.divides(len(shards))}
    found = [
        f"{w.meta}: {w.shape} cannot be cut into {len(shards)} equal parts"
        for w in weights
        if w.meta not in expected
    ]
    for path, state in zip(shards, states, strict=True):
        found += [f"{path}: {name} missing" for name in expected if name not in state]
        found += [f"{path}: {name} is no weight of this model" for name in state.keys() - expected]
        found += [
            f"{path}: {name} is {tuple(state[name].shape)}, {PARAMS} and {len(shards)} "
            f"shard{'s' if len(shards) > 1 else ''} make it {shape}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ]
    if found:
        more = len(found) - _MAX_SHOWN
        shown = found[:_MAX_SHOWN] + ([f"… and {more} more of this kind"] if more > 0 else [])
        cause = (
            f"{shards[0].parent}: {PARAMS} and the shards are not of one model, or one is missing"
        )
        raise InputError([cause, *shown])


def _common_dtype(
    shards: Sequence[Path], states: Sequence[Mapping[str, Tensor]], weights: Sequence[Weight]
) -> str:
    from finetune.llama.safetensors_stream import dtype_name

    try:
        names = {dtype_name(state[w.meta].dtype) for state in states for w in weights}
    except InputError as error:
        raise InputError(f"{shards[0].parent}: {error}") from None
    if len(names) > 1:
        raise InputError(
            f"{shards[0].parent}: weights of several types: {', '.join(sorted(names))}"
        )
    return names.pop()


def _check_repeated(
    shards: Sequence[Path], states: Sequence[Mapping[str, Tensor]], weights: Sequence[Weight]
) -> None:
    """What several shards repeat must be the same in each, or they are of two models."""
    import torch

    for weight in weights:
        for number, state in enumerate(states):
            first = 0 if weight.split is None else number - number % weight.num_copies
            if number != first and not torch.equal(states[first][weight.meta], state[weight.meta]):
                raise InputError(
                    f"{shards[number]}: is of another model than {shards[first].name}: "
                    f"{weight.meta}, which both repeat, differs"
                )


def _check_distinct(
    shards: Sequence[Path], states: Sequence[Mapping[str, Tensor]], weights: Sequence[Weight]
) -> None:
    """One shard under two names would fit in every other way, and make a wrong model."""
    import torch

    cut = [weight.meta for weight in weights if weight.split is not None and weight.num_copies == 1]
    for number, state in enumerate(states):
        for earlier in range(number):
            # Two parts of a model differ in the first row already: nothing more is read.
            pairs = ((states[earlier][name], state[name]) for name in cut)
            if all(torch.equal(a[0], b[0]) and torch.equal(a, b) for a, b in pairs):
                raise InputError(
                    f"{shards[number]}: holds the same part of the model as "
                    f"{shards[earlier].name}; download both again"
                )


def _is_tied(opened: OpenCheckpoint) -> bool:
    """Whether the head is the embedding: not stored, or stored as the same numbers."""
    import torch

    if "lm_head.weight" not in opened.checkpoint.weights:
        return True
    embedding = opened.checkpoint.weights["model.embed_tokens.weight"]
    rows = [state[embedding.meta][0] for state in opened.states]
    first_row = rows[0] if embedding.split == BY_ROWS else torch.cat(rows)
    if not torch.equal(first_row, opened.states[0]["output.weight"][0]):
        return False  # without reading both to the end
    return torch.equal(opened.tensor("lm_head.weight"), opened.tensor(embedding.hf))
