"""`adapter:` the small weights that are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from finetune.config.section import Section, Texts

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


class AdapterSection(Section):
    """LoRA on the projections of every layer, or none: then the full weights are trained.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """

    method: Literal["lora", "none"] = "lora"
    """`lora`, or `none` to train the full weights."""

    r: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the update B·A of every targeted matrix."""

    lora_alpha: Annotated[int, Field(ge=1, le=65536)] = 32
    """The update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an input of A while training."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead. Source: Kalajdzievski 2023, arXiv:2312.03732."""

    target_modules: Annotated[Texts, AfterValidator(_projections_only)] = PROJECTIONS
    """Names of the linear layers that get an adapter; one that matches nothing stops the run."""
