"""What a peer with a model of its own reads of the workload; it needs nothing but torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.recorder import Recorder, contender_parser


@dataclass(frozen=True)
class Peer:
    """Its share of the workload.

    Attributes:
        recorder: made when the peer's libraries were imported.
        steps: per step its packs; per pack `[ids, labels]` of each document.
        weights: the base's file, in Hugging Face's names.
        shape: the base's config.json.
        rank: of the adapter; alpha is twice that.
        dtype: of base and adapter.
    """

    recorder: Recorder
    steps: list[Any]
    weights: Path
    shape: dict[str, Any]
    rank: int
    dtype: str

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """New tensors have the peer's type."""
        import torch

        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def read_peer(doc: str | None) -> Peer:
    """From the command line; call it after the peer's imports.

    Raises:
        SystemExit: there is a GPU.
    """
    import torch

    args = contender_parser(doc).parse_args()
    if torch.cuda.is_available():
        raise SystemExit("this peer is compared on CPUs alone")
    recorder = Recorder(args.result)
    base, adapter = args.folder / f"base-{args.dtype}", args.folder / "adapter"
    return Peer(
        recorder,
        json.loads((args.folder / "steps.json").read_text(encoding="utf-8"))[: args.steps],
        base / "model.safetensors",
        json.loads((base / "config.json").read_text(encoding="utf-8")),
        json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"],
        args.dtype,
    )
