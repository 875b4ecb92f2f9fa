"""`adapter:` the small weights that are trained.

The keys are flat and named as PEFT names them. Which of them a method has is in SETTINGS; a key of
another method is refused as a setting without effect. Formulas and costs: `finetune.methods`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from finetune.config.section import Section, Texts, as_tuple

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IA3_TARGETS = ("k_proj", "v_proj", "down_proj")

_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "ia3": {"target_modules": IA3_TARGETS},
    "vera": {"r": 256},  # it shares its matrices among all layers: rank costs little
}

_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init", "rank_pattern", "alpha_pattern")
_WHERE = ("target_modules", "layers")
SETTINGS: dict[str, tuple[str, ...]] = {
    "lora": (*_LORA, *_WHERE),
    "dora": (*_LORA, *_WHERE),
    "lora+": (*_LORA, "loraplus_lr_ratio", *_WHERE),
    "adalora": (
        *("init_r", "target_r", "lora_alpha", "lora_dropout"),
        *("tinit", "tfinal", "deltaT", "orth_reg_weight"),
        *_WHERE,
    ),
    "vera": ("r", *_WHERE),
    "loha": ("r", "lora_alpha", *_WHERE),
    "lokr": ("r", "lora_alpha", *_WHERE),
    "oft": ("oft_block_size", *_WHERE),
    "boft": ("boft_block_size", *_WHERE),
    "hra": ("r", *_WHERE),
    "ia3": ("target_modules",),
    "miss": ("r", *_WHERE),
    "ln_tuning": (),
    "trainable_tokens": ("token_indices",),
    "prompt_tuning": ("num_virtual_tokens",),
    "prefix_tuning": ("num_virtual_tokens",),
    "none": (),
}
"""method -> the settings that have an effect with it."""

ON_QUANTIZED_BASE = {
    "nf4": ("lora", "lora+", "dora"),
    "fp4": ("lora", "lora+", "dora"),
    "int8": ("lora", "lora+"),
}
"""Storage of the base -> the methods that train on it. DoRA needs the norms of W + s·B·A, and PEFT
0.21 loses the scales of 8-bit weights when it reads them before the first forward pass."""

READS_DATA = ("corda", "eva")
"""Initialisations that look at what the layers read of the run's own rows."""

SOFT_PROMPTS = ("prompt_tuning", "prefix_tuning")
"""Methods that put trained vectors before the text of every document."""

CHANGES_BASE = ("pissa", "olora", "corda")
"""Initialisations that take the adapter's start out of the base's weights."""


def _projections_only(targets: tuple[str, ...]) -> tuple[str, ...]:
    for name in targets:
        if name.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
            raise ValueError(
                f"{name} cannot be a LoRA target: where the embedding and the output head share"
                " their weights (Llama 3.2 1B and 3B), merging it makes another model;"
                f" allowed: {', '.join(PROJECTIONS)}"
            )
    if not targets or len(set(targets)) < len(targets):
        raise ValueError("needs at least one name, each once")
    return targets


def _each_once(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(numbers)) < len(numbers):
        raise ValueError("needs each number once")
    return numbers


Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[int, Field(ge=1, le=65536)]
Index = Annotated[int, Field(ge=0)]
Indices = Annotated[tuple[Index, ...], Field(), AfterValidator(_each_once)]


class AdapterSection(Section):
    """A method of PEFT on the projections of every layer, or none: the full weights are trained.

    Source of the default: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
    arXiv:2106.09685.
    """

    method: Literal[
        "lora", "dora", "lora+", "adalora", "vera", "loha", "lokr", "oft", "boft", "hra", "ia3",
        "miss", "ln_tuning", "trainable_tokens", "prompt_tuning", "prefix_tuning", "none",
    ] = "lora"  # fmt: skip
    """`lora` or another method of docs/recipes.md, or `none` to train the full weights."""

    r: Rank = 16
    """Rank of the update of every targeted matrix (VeRA: 256; HRA: reflections)."""

    lora_alpha: Alpha = 32
    """The update is scaled by lora_alpha / r (LoHa too), or lora_alpha / sqrt(r) with rsLoRA."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an input of A while training."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead. Source: Kalajdzievski 2023, arXiv:2312.03732."""

    init: Literal["default", "gaussian", "pissa", "olora", "corda", "eva", "loftq"] = "default"
    """Start of A and B: `default` (A Kaiming uniform, B zero), or another of docs/recipes.md."""

    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks for some matrices: the end of a layer's name (or a pattern of it) -> rank."""

    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    """Other values of lora_alpha for some matrices, named as in `rank_pattern`."""

    loraplus_lr_ratio: Annotated[float, Field(gt=0, le=1024)] = 16.0
    """Learning rate of B over that of A, which is train.learning_rate."""

    init_r: Rank = 12
    """AdaLoRA: rank of every matrix at the start."""

    target_r: Rank = 8
    """AdaLoRA: average rank over all matrices at the end; less than init_r."""

    tinit: Annotated[int, Field(ge=0)] | None = None
    """AdaLoRA: steps before ranks fall; a tenth of the run's if not given."""

    tfinal: Annotated[int, Field(ge=0)] | None = None
    """AdaLoRA: steps after ranks have fallen; three tenths of the run's if not given."""

    deltaT: Annotated[int, Field(ge=1)] = 1
    """AdaLoRA: steps between two allocations of ranks."""

    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5
    """AdaLoRA: weight of the penalty that keeps the directions of A and B orthogonal."""

    oft_block_size: Annotated[int, Field(ge=2, le=4096)] = 32
    """Columns of W that one rotation turns; the width of every targeted matrix is a multiple."""

    boft_block_size: Annotated[int, Field(ge=2, le=4096)] = 8
    """Columns of W that one rotation turns; the width of every targeted matrix is a multiple."""

    token_indices: Indices = ()
    """Ids whose embeddings train; the tokenizer's, as `tokenize` shows them."""

    num_virtual_tokens: Annotated[int, Field(ge=1, le=65536)] = 20
    """Trained vectors before every document; they take part of the context."""

    target_modules: Annotated[Texts, AfterValidator(_projections_only)] = PROJECTIONS
    """Names of the linear layers that get an adapter; one that matches nothing stops the run."""

    layers: Indices = ()
    """Numbers of the decoder layers that get an adapter, from 0; empty for all."""

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, data: Any) -> Any:
        """A single number may stand for a list of one; some methods have defaults of their own."""
        if not isinstance(data, dict):
            return data
        for name in ("layers", "token_indices"):
            if name in data:
                data = {**data, name: as_tuple(data[name])}
        for name, value in _OWN_DEFAULTS.get(str(data.get("method")), {}).items():
            if data.get(name) is None:
                data = {**data, name: value}
        return data
