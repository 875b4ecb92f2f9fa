"""LitGPT 0.5.13: the step of its recipe `finetune_lora`, on our rows, padded as it pads them.

python -m benchmarks.speed.litgpt_trainer --folder F --dtype float32 --steps 11 --result FILE

Model, conversion of weights, head in chunks, loss and the order of a step are LitGPT's; it has no
packing. The rows of a step of ours are its micro-batch. It needs an environment of its own.
"""

from __future__ import annotations

from typing import Any

from benchmarks.speed.peer import read_peer


def main() -> int:
    """Trains on the rows of `steps.json` in their order."""
    import torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    peer = read_peer(__doc__)
    shape, steps = peer.shape, peer.steps
    names = ("query", "key", "value", "projection", "mlp")
    config = Config(
        name="workload",
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        norm_eps=shape["rms_norm_eps"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        lora_r=peer.rank,
        lora_alpha=2 * peer.rank,
        **{f"lora_{name}": True for name in names},
    )
    with peer.building():
        model: Any = GPT(config)
    weights: dict[str, Any] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(peer.weights))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all("lora_" in name for name in missing), missing
    del weights
    mark_only_lora_as_trainable(model)
    model.max_seq_length = max(len(ids) for packs in steps for pack in packs for ids, _ in pack)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    model.train()
    losses = []
    for packs in steps:
        ids, targets = _padded([document for pack in packs for document in pack], torch)
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, targets[..., 1:])
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    peer.recorder.write(losses=losses)
    return 0


def _padded(documents: list[Any], torch: Any) -> tuple[Any, Any]:
    """(rows, longest) ids and labels."""
    ids = [torch.tensor(ids) for ids, _ in documents]
    labels = [torch.tensor(labels) for _, labels in documents]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


if __name__ == "__main__":
    raise SystemExit(main())
