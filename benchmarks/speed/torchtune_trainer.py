"""torchtune 0.6.1: the step of its recipe `lora_finetune_single_device`, on our packs.

python -m benchmarks.speed.torchtune_trainer --folder F --dtype float32 --steps 11 --result FILE

Model, conversion of the weights, packed collation with its block mask, chunked loss and the order
of a step are torchtune's; it needs an environment of its own (torch 2.13.0, torchtune 0.6.1,
torchao 0.9.0). Its recipe clips nothing by default.
"""

from __future__ import annotations

from typing import Any

from benchmarks.speed.peer import read_peer


def main() -> int:
    """Trains on the packs of `steps.json` in their order."""
    import torch
    from safetensors.torch import load_file
    from torchtune.data import padded_collate_packed
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import scale_grads

    peer = read_peer(__doc__)
    shape, steps = peer.shape, peer.steps
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    with peer.building():
        model = lora_llama2(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=shape["vocab_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            embed_dim=shape["hidden_size"],
            max_seq_len=shape["max_position_embeddings"],
            intermediate_dim=shape["intermediate_size"],
            norm_eps=shape["rms_norm_eps"],
            lora_rank=peer.rank,
            lora_alpha=2 * peer.rank,
        )
    weights = load_file(peer.weights)
    model.load_state_dict(hf_to_tune(weights, heads, kv_heads, shape["hidden_size"]), strict=False)
    del weights
    set_trainable_params(model, get_adapter_params(model))
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    model.train()
    losses, length = [], max(sum(len(d[0]) for d in pack) for packs in steps for pack in packs)
    for packs in steps:
        batch = padded_collate_packed([_pack(pack, length, torch) for pack in packs])
        labels = batch.pop("labels")
        num_tokens = (labels != -100).sum()
        logits = model(**batch)
        filler = torch.full((len(labels), 1), -100)
        loss = loss_of(logits, torch.hstack((labels[..., 1:], filler))) * num_tokens
        del logits
        loss.backward()
        scale_grads(model, 1 / num_tokens)
        losses.append(loss.item() / num_tokens.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peer.recorder.write(losses=losses)
    return 0


def _pack(documents: list[Any], length: int, torch: Any) -> dict[str, Any]:
    """One pack, padded to the length of all, as torchtune's PackedDataset makes it."""
    ids = [i for ids, _ in documents for i in ids]
    labels = [label for _, labels in documents for label in labels]
    places = [place for ids, _ in documents for place in range(len(ids))]
    lengths, rest = [len(ids) for ids, _ in documents], length - len(ids)
    return {
        "tokens": torch.tensor(ids + [0] * rest),
        "labels": torch.tensor(labels + [-100] * rest),
        "input_pos": torch.tensor(places + list(range(rest))),
        "seq_lens": torch.tensor(lengths + [rest] * bool(rest)),
    }


if __name__ == "__main__":
    raise SystemExit(main())
