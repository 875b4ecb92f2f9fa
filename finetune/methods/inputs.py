"""Methods that change what the model reads: vectors before the text, or some of its embeddings."""

from __future__ import annotations

from typing import Any

from finetune.config.adapter import AdapterSection
from finetune.llama.architecture import Architecture
from finetune.methods.method import Method, common


class TrainableTokens(Method):
    """Trainable tokens: the embeddings of some ids are trained, E'[i] = E[i] + delta[i].

    Where the base ties head and embedding, the head's rows change with them. Source: PEFT's
    documentation of TrainableTokensConfig.
    Cost: dim parameters an id.
    When: a few ids that the base never trained, such as chat tokens of a base model.
    """

    name = "trainable_tokens"
    why_not_merged = (
        "a merge proves decoder layers, and trained embeddings lie outside of them: serve the "
        "adapter beside its base, or merge it with PEFT's merge_and_unload, unproven"
    )

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's TrainableTokensConfig."""
        from peft import TrainableTokensConfig

        return TrainableTokensConfig(
            token_indices=sorted(adapter.token_indices),
            target_modules=["embed_tokens"],
            **common(base_name),
        )

    def num_trainable(self, adapter: AdapterSection, arch: Architecture) -> int:
        """A row of the embedding for each id."""
        return len(adapter.token_indices) * arch.dim

    def num_frozen(self, adapter: AdapterSection, arch: Architecture) -> int:
        """The rows as they were."""
        return self.num_trainable(adapter, arch)

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """Ids the base does not have."""
        if not adapter.token_indices:
            return ["adapter.token_indices: empty; name the ids whose embeddings train"]
        beyond = [str(i) for i in adapter.token_indices if i >= arch.vocab_size]
        if not beyond:
            return []
        named, last = ", ".join(beyond[:8]), arch.vocab_size - 1
        return [f"adapter.token_indices: found {named}; the base has ids 0 to {last}"]


class PromptTuning(Method):
    """Prompt tuning: p trained vectors stand before the embeddings of every document.

    Paper: Lester et al. 2021, arXiv:2104.08691. They start as embeddings of ids drawn at random.
    Cost: p · dim parameters; p tokens of the context.
    When: many small tasks on one large frozen base; it needs a high rate and a large base.
    """

    name = "prompt_tuning"
    why_not_merged = (
        "prompt tuning trains vectors that are read before the text; no weight of the base holds "
        "them: serve the adapter beside its base"
    )

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's PromptTuningConfig."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            num_virtual_tokens=adapter.num_virtual_tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
            **common(base_name),
        )

    def num_trainable(self, adapter: AdapterSection, arch: Architecture) -> int:
        """An embedding for each virtual token."""
        return adapter.num_virtual_tokens * arch.dim

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """The context holds them beside the text."""
        if adapter.num_virtual_tokens < arch.context:
            return []
        return [
            f"adapter.num_virtual_tokens: found {adapter.num_virtual_tokens}; the base reads "
            f"{arch.context} tokens, and the text is to have some of them"
        ]


class PrefixTuning(PromptTuning):
    """Prefix tuning: p trained keys and values stand before those of the text in every layer.

    Paper: Li and Liang 2021, arXiv:2101.00190, without its reparametrisation. They start at
    random, so that step 0 is not the base.
    Cost: 2 · layers · p · kv heads · head_dim parameters; p tokens of the context.
    When: prompt tuning does not reach far enough, and nothing may be merged.
    """

    name = "prefix_tuning"
    why_not_merged = (
        "prefix tuning trains keys and values that stand before the text; no weight of the base "
        "holds them: serve the adapter beside its base"
    )

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's PrefixTuningConfig."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            num_virtual_tokens=adapter.num_virtual_tokens, **common(base_name)
        )

    def num_trainable(self, adapter: AdapterSection, arch: Architecture) -> int:
        """A key and a value for each virtual token, key-value head and layer."""
        return 2 * arch.n_layers * adapter.num_virtual_tokens * arch.n_kv_heads * arch.head_dim
