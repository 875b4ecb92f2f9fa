"""The trainer's memory seam: a step that runs out of memory is done again in smaller pieces.

With `train.fit: auto` the micro-batch is chosen from the plan; where the device holds less than
that (another process, gaps in its memory), the step begins anew with every micro-batch cut in half,
and the run keeps to the smaller pieces. The step's tokens and the division by them stay what they
were: sums over pieces are sums over the whole, to rounding. It is said, and stands in
metrics.jsonl.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from transformers import Trainer

from finetune.errors import CannotContinue, is_out_of_memory
from finetune.fast.loss import Packed, cut


class MemorySeam(Trainer):
    """Micro-batches in pieces, as many as memory asks for."""

    ours: Any
    num_pieces: int = 1
    pieces_now: int = 1  # of the micro-batch at hand, which may have fewer documents
    _seen: list[Any]
    _rng: list[torch.Tensor]
    _step_loss_sum: torch.Tensor

    def begin_step(self) -> None:
        """Before the first micro-batch of every step."""
        self._seen = []
        if self.ours.shrinks:
            self._rng = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One micro-batch; where memory runs out, all of the step so far once more."""
        if not self.ours.shrinks:
            return super().training_step(model, inputs, num_items_in_batch)
        self._seen.append(inputs)
        loss = self._in_pieces(model, inputs, num_items_in_batch)
        while loss is None:
            self._shrink(model)
            for seen in self._seen:
                loss = self._in_pieces(model, seen, num_items_in_batch)
                if loss is None:
                    break
        return loss

    def _in_pieces(
        self, model: torch.nn.Module, inputs: Any, num_items: Any
    ) -> torch.Tensor | None:
        """The micro-batch's share of the loss; None where memory ran out."""
        total: torch.Tensor | None = None
        pieces = cut(Packed(**inputs), self.num_pieces)
        self.pieces_now = len(pieces)
        try:
            for piece in pieces:
                loss = super().training_step(model, vars(piece).copy(), num_items)
                total = loss if total is None else total + loss
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return total

    def _shrink(self, model: torch.nn.Module) -> None:
        """Forgets the step so far and halves the pieces; what the failed pass held is free by now.

        Raises:
            CannotContinue: no micro-batch has more documents than pieces, or there are more ranks.
        """
        step = self.state.global_step + 1
        most = max(len(seen["document_lengths"]) for seen in self._seen)
        if self.num_pieces >= most:
            raise CannotContinue(
                f"step {step}: out of memory with one document at a time. "
                "train.activation_checkpointing=true and a smaller data.max_length take less"
            )
        if self.args.world_size > 1:
            raise CannotContinue(
                f"step {step}: out of memory; the other ranks are in the middle of it. "
                "train.fit=none with a smaller train.per_device_train_batch_size takes less"
            )
        model.zero_grad(set_to_none=True)
        self._step_loss_sum.zero_()
        torch.set_rng_state(self._rng[0])
        torch.cuda.set_rng_state_all(self._rng[1:])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.num_pieces *= 2
        print(
            f"warning: step {step} ran out of memory; it is done again, and the run goes on, with "
            f"each micro-batch in {self.num_pieces} pieces. The tokens of a step stay the same",
            file=sys.stderr,
        )
