"""What the trained model itself said at a few tokens, kept to compare with what is loaded later.

    KL(trained ‖ loaded) = mean over the kept tokens of Σ_v p_v (log p_v - log q_v)     (nats)

`witness.safetensors` in the run folder: the logits of the model in memory at the end of training,
before each of up to 64 trained tokens of its first rows. `eval` asks the adapter, the merged model
and the base for the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from finetune import artifact
from finetune.errors import CheckFailed
from finetune.fast.loss import pack, rows_for, supervised_logits, to_device
from finetune.heldout import evaluating
from finetune.llama.weight_files import tensors_in
from finetune.prepared import Document

NUM_TOKENS, NUM_ROWS = 64, 8
_MAX_NUMBERS = 1 << 22  # of logits: 16 MiB in float32
_NAMES = ("input_ids", "lengths", "train_mask", "logits")
Rows = Sequence[tuple[list[int], list[bool]]]


def choose(documents: Iterable[Document], vocab_size: int) -> Rows:
    """Ids of the first rows, and marks at the tokens that are asked for, spread evenly."""
    rows = list(itertools.islice((d for d in documents if d.num_trained), NUM_ROWS))
    most = max(min(NUM_TOKENS, _MAX_NUMBERS // vocab_size), len(rows))
    return [(row.input_ids, list(_spread(row.train_mask, most // len(rows)))) for row in rows]


def _spread(mask: Sequence[bool], count: int) -> Iterator[bool]:
    """At most `count` of the marks, evenly; the first token is never asked for."""
    places = [position for position, trained in enumerate(mask) if trained and position]
    kept = {places[i * len(places) // count] for i in range(min(count, len(places)) and count)}
    return (position in kept for position in range(len(mask)))


def keep(path: Path, model: torch.nn.Module, rows: Rows, device: torch.device) -> None:
    """Writes what the model says now."""
    tensors = {
        "input_ids": torch.tensor([i for ids, _ in rows for i in ids], dtype=torch.int32),
        "train_mask": torch.tensor([m for _, mask in rows for m in mask], dtype=torch.uint8),
        "lengths": torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int64),
        "logits": _logits(model, rows, device),
    }
    artifact.write_bytes(path, save(tensors))


def divergence(path: Path, model: torch.nn.Module, device: torch.device) -> tuple[float, int]:
    """KL from the trained model to another, in nats a token, and the number of tokens.

    Raises:
        CheckFailed: the file is not one that `keep` wrote for such a model.
    """
    kept = tensors_in(path)
    if set(kept) != set(_NAMES) or int(kept["lengths"].sum()) != len(kept["input_ids"]):
        raise CheckFailed(f"{path}: is no witness of a run; train again, or remove it")
    lengths = kept["lengths"].tolist()
    ids, masks = (kept[name].split(lengths) for name in ("input_ids", "train_mask"))
    rows = [(i.tolist(), m.bool().tolist()) for i, m in zip(ids, masks, strict=True)]
    trained, found = kept["logits"].double(), _logits(model, rows, device).double()
    if trained.shape != found.shape:
        raise CheckFailed(f"{path}: holds {tuple(trained.shape)}, the model {tuple(found.shape)}")
    log_p, log_q = trained.log_softmax(-1), found.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), len(trained)


def _logits(model: torch.nn.Module, rows: Rows, device: torch.device) -> torch.Tensor:
    """(tokens, vocab) float32 before each marked token."""
    packed = to_device(pack(rows), device)
    with evaluating(model):
        parts = [supervised_logits(model, row).float().cpu() for row in rows_for(model, packed)]
    return torch.cat(parts).contiguous()
