"""What a config holds from the first step to the last: weights, gradients, the optimizer's moments.

All of it is arithmetic on the architecture, without torch: a config of 405B takes milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune import artifact
from finetune.config import RunConfig
from finetune.errors import InputError
from finetune.llama.architecture import (
    HUB_IDS,
    Architecture,
    PartCounts,
    architecture_of,
    from_llama_config,
)
from finetune.methods import method_of

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# bitsandbytes: 4 bits, an 8-bit scale for 64 of them, a float32 for 256 scales (double
# quantisation); or 8 bits. The float32 scale of a row of int8 is too little to show.
_QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_QUANTIZED_BYTES["fp4"] = _QUANTIZED_BYTES["nf4"]
# Bytes of the moments for a parameter of so many bytes. 8 bits: one byte each and a float32 scale
# for 256 of them (bitsandbytes' blocks); paged ones lie in the host's memory when they must.
_MOMENT_BYTES = {
    "adamw_torch": lambda size: 2 * size,
    "adamw_torch_fused": lambda size: 2 * size,
    "adamw_8bit": lambda _: 2 * (1 + 4 / 256),
    "paged_adamw_8bit": lambda _: 2 * (1 + 4 / 256),
    "paged_adamw_32bit": lambda _: 8.0,
    "sgd": lambda _: 0.0,
}


@dataclass(frozen=True)
class Budget:
    """Bytes held for good, and the counts behind them.

    Attributes:
        architecture: of the base.
        parameters: of the base, by part.
        trainable: parameters that train.
        base: bytes of the base; of all weights where all of them train.
        adapter: of the adapter, with what of it never trains.
        gradients: of what trains.
        optimizer: of its moments.
    """

    architecture: Architecture
    parameters: PartCounts
    trainable: int
    base: int
    adapter: int
    gradients: int
    optimizer: int

    def by_part(self) -> dict[str, int]:
        """Bytes by name."""
        names = ("base", "adapter", "gradients", "optimizer")
        return {name: getattr(self, name) for name in names}


def budget_of(config: RunConfig, arch: Architecture | None = None) -> Budget:
    """The budget of a config; nothing is allocated, nothing fetched.

    Args:
        arch: of the base, where it is known already.

    Raises:
        InputError: the base's architecture is not known without a download.
    """
    arch = arch or architecture_of_base(config)
    parameters = arch.num_parameters()
    is_full = config.adapter.method == "none"
    trained = parameters.total if is_full else num_adapter_parameters(arch, config)
    frozen = 0 if is_full else method_of(config.adapter).num_frozen(config.adapter, arch)
    size = BYTES[config.base.dtype if is_full else "float32"]  # adapters are float32
    return Budget(
        architecture=arch,
        parameters=parameters,
        trainable=trained,
        base=_base_bytes(arch, config),
        adapter=0 if is_full else int(size * (trained + frozen)),
        gradients=int(size * trained),
        optimizer=int(_MOMENT_BYTES[config.train.optim](size) * trained),
    )


def num_adapter_parameters(arch: Architecture, config: RunConfig) -> int:
    """Trainable parameters of the config's adapter: its method's closed formula.

    Raises:
        InputError: a setting that does not fit the base.
    """
    method = method_of(config.adapter)
    if findings := method.findings(config.adapter, arch):
        raise InputError(findings)
    return method.num_trainable(config.adapter, arch)


def _base_bytes(arch: Architecture, config: RunConfig) -> int:
    """The base's weights as they are held: quantisation leaves embedding, norms and head."""
    counts, size = arch.num_parameters(), BYTES[config.base.dtype]
    linear = counts.attention + counts.mlp
    in_blocks = _QUANTIZED_BYTES.get(config.base.quantization, size)
    return int(linear * in_blocks + (counts.total - linear) * size)


def architecture_of_base(config: RunConfig) -> Architecture:
    """The architecture that `base:` names: a preset, a documented hub id, or a local folder.

    Raises:
        InputError: neither; only a download would tell.
    """
    base = config.base
    if base.architecture is not None:
        return architecture_of(base.architecture)
    assert base.path is not None
    folder = Path(base.path)
    if (folder / "config.json").is_file():
        return from_llama_config(artifact.read_json(folder / "config.json"))
    if (folder / "params.json").is_file():
        from finetune.llama.meta_checkpoint import read_checkpoint

        return read_checkpoint(folder).arch  # the weights tell vocabulary and tied head
    if base.path in HUB_IDS:
        return architecture_of(HUB_IDS[base.path])
    raise InputError(
        f"base.path {base.path}: neither a folder nor a documented hub id, so its architecture is "
        "not known without a download; name a local folder"
    )
