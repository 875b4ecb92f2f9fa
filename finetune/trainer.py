"""The mix-in that puts the toolkit's seams around a TRL trainer.

`class SftTrainer(OurSeams, SFTTrainer)`: the engine (accelerate, mixed precision, DDP, trackers,
schedules) stays TRL's and transformers'. Ours are what is trained on (`get_train_dataloader`),
the loss (`compute_loss`), the checkpoints (`_save_checkpoint` and its loaders) and the held-out
loss (`evaluation.EvaluationSeam`). Source of the facts about the engine: the installed transformers
5.23.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.optimizers import create_loraplus_optimizer

from finetune import checkpoint
from finetune.artifact import Place, make_folder, staged, write_json
from finetune.best import BestWatch, Rules
from finetune.collectives import gather_objects, sum_over_ranks
from finetune.config import FastSection
from finetune.errors import CannotContinue
from finetune.evaluation import EvaluationSeam
from finetune.fast.loss import IGNORED, Packed, token_losses
from finetune.fast.offload import offloaded
from finetune.heldout import document_losses
from finetune.packing import FILLER, BatchPlan, PackLoader, PackSampler, TokenizedRows
from finetune.prepared import Document, PreparedDocuments
from finetune.rank_schedule import RankSchedule
from finetune.shrinking import MemorySeam
from finetune.watchdog import Spike, SpikeWatch, StillnessWatch, not_finite


@dataclass(frozen=True)
class TrainerInputs:
    """What the seams need beyond TRL's own arguments.

    Attributes:
        train: documents to train on.
        heldout: documents never trained on; may be empty.
        plan: how packs become steps.
        seed: of the row order.
        checkpoints: folder of the checkpoints.
        trained_on: what the numbers depend on, by hash, for the checkpoints' manifests.
        save_total_limit: checkpoints kept.
        eval_batch_size: documents in one forward pass of the held-out loss.
        rules: what the held-out loss decides.
        lr_ratio: learning rate of LoRA's B over that of A (LoRA+); None where it is one rate.
        ranks: AdaLoRA's schedule; None for every other method.
        on_spike: record, skip or stop.
        fast: which parts of the step are our own.
        shrinks: whether a step that runs out of memory is done again in smaller pieces.
        offloads: whether activations wait in the computer's memory.
    """

    train: PreparedDocuments
    heldout: Sequence[Document]
    plan: BatchPlan
    seed: int
    checkpoints: Path
    trained_on: Mapping[str, Any]
    save_total_limit: int
    eval_batch_size: int
    rules: Rules
    lr_ratio: float | None = None
    ranks: RankSchedule | None = None
    on_spike: str = "record"
    fast: FastSection = field(default_factory=FastSection)
    shrinks: bool = False
    offloads: bool = False


class OurSeams(EvaluationSeam, MemorySeam):
    """Data, loss, checkpoint, evaluation and memory seams; before a TRL trainer in the bases."""

    ours: TrainerInputs
    optimizer: Any
    step_loss: float = math.nan  # nats per trained token of the last step, over all ranks
    step_tokens: int = 0  # supervised tokens of the last step, over all ranks
    step_num_tokens: int = 0  # all tokens of the last step, over all ranks
    step_grad_norm: float = math.nan
    step_learning_rate: float = math.nan
    step_spikes: tuple[Spike, ...] = ()

    def set_inputs(self, inputs: TrainerInputs) -> None:
        """Hands over the documents; the loss is divided by the step's tokens by ourselves."""
        self.ours = inputs
        self.loss_is_scaled_for_ga = True
        make_folder(inputs.checkpoints)
        self._checkpoints = Place.of(inputs.checkpoints)
        self.spikes, self._num_steps = SpikeWatch(), 0
        self.best = BestWatch(inputs.rules)
        self._logged_loss_sum, self._num_logged_tokens = 0.0, 0
        self._stillness = StillnessWatch(self.model)
        if inputs.ranks is not None:
            self.add_callback(inputs.ranks)

    # --- data ---------------------------------------------------------------------------------

    def get_train_dataloader(self) -> PackLoader:
        """This rank's micro-batches; accelerate's own sharding would repeat or lose rows."""
        train = self.ours.train
        sampler = PackSampler(self.ours.plan, self.ours.seed, self.args.process_index)
        return PackLoader(TokenizedRows(train.pair, len(train), filler_id=0), sampler)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One rate for all parameters, or LoRA+'s groups, as PEFT makes them."""
        if self.ours.lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = create_loraplus_optimizer(
            self.model,
            kind,
            loraplus_lr_ratio=self.ours.lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **settings,
        )
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of a step, and its supervised tokens over all of them and all ranks."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.begin_step()
        self._num_micro_batches = len(batches)
        supervised = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        all_tokens = sum(batch["labels"].numel() for batch in batches)
        counts = torch.tensor([supervised, all_tokens], dtype=torch.float64)
        total = sum_over_ranks(counts, device)
        self.step_tokens, self.step_num_tokens = (int(count) for count in total.tolist())
        self._step_loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        return batches, total[0]

    def _run_epoch(self, **kwargs: Any) -> None:
        """One epoch; the engine would add a step to a run that died after its last checkpoint."""
        if self.state.global_step >= self.state.max_steps or self.best.stops:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    # --- loss ---------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of token losses over the step's tokens; times the ranks, whose mean DDP takes."""
        assert num_items_in_batch is not None
        assert not return_outputs
        fast = self.ours.fast
        with offloaded(model) if self.ours.offloads else contextlib.nullcontext():
            losses = token_losses(
                model,
                Packed(**inputs),
                in_blocks=fast.loss,
                dense=not fast.attention,
                beginnings=fast.beginnings,
                products=fast.products,
            )
        loss_sum = losses.sum()
        self._step_loss_sum += loss_sum.detach().double()
        loss = loss_sum * (self.accelerator.num_processes / max(num_items_in_batch.item(), 1.0))
        if self.ours.ranks is not None and self.step_tokens:  # once a step, in parts
            parts = self._num_micro_batches * self.pieces_now
            loss = loss + self.ours.ranks.penalty() / parts
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the engine would walk all modules for it, for every micro-batch."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trackers get our loss, over the tokens of all steps since their last line."""
        if "loss" in logs:
            logs["loss"] = self._logged_loss_sum / max(self._num_logged_tokens, 1)
            self._logged_loss_sum, self._num_logged_tokens = 0.0, 0
        super().log(logs, start_time)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        """Called once a step before the optimizer moves: the place to stop on bad numbers."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if self.step_tokens == 0:  # fillers alone: no momentum and no decay either
            model.zero_grad(set_to_none=True)
        total = sum_over_ranks(self._step_loss_sum, self.args.device).item()
        self.step_loss = total / max(self.step_tokens, 1)
        self._logged_loss_sum += total
        self._num_logged_tokens += self.step_tokens
        self.step_grad_norm, self.step_learning_rate = norm, self._get_learning_rate()
        if not math.isfinite(self.step_loss) or not math.isfinite(norm):
            raise CannotContinue(self._what_is_not_finite(model, norm))
        self._watch(model, norm)
        return norm

    def _watch(self, model: torch.nn.Module, norm: float) -> None:
        """Spikes by the config's policy, and weights that stand still."""
        self._num_steps += 1
        self._stillness.look(self._num_steps, self.step_learning_rate)
        self.step_spikes = ()
        if self.step_tokens:
            self.step_spikes = tuple(self.spikes.look(self.step_loss, norm))
        if not self.step_spikes or self.ours.on_spike == "record":
            return
        found = f"step {self.state.global_step + 1}: {'; '.join(map(str, self.step_spikes))}"
        if self.ours.on_spike == "stop":
            raise CannotContinue(f"{found}; stopped by train.on_spike before the weights moved")
        model.zero_grad(set_to_none=True)

    def _what_is_not_finite(self, model: torch.nn.Module, norm: float) -> str:
        """Which tensors and rows: the weights have not moved yet, so the rows are asked again."""
        rows = [place for place, loss in self._losses_of_step() if not math.isfinite(loss)]
        named = {
            "weights not finite": not_finite(model.named_parameters()),
            "gradients not finite": not_finite((n, p.grad) for n, p in model.named_parameters()),
            "rows whose loss is not finite": rows[:8],
        }
        found = [
            f"step {self.state.global_step + 1}: loss is {self.step_loss}, gradient norm {norm}",
            *(f"{what}: {', '.join(names)}" for what, names in named.items() if names),
        ]
        return f"{'; '.join(found)}. Stopped before the weights moved. Try a lower learning rate"

    def _losses_of_step(self) -> list[tuple[str, float]]:
        """Place and loss of this rank's documents of the step, each by itself."""
        plan, step = self.ours.plan, self.state.global_step
        epoch, place = divmod(step, plan.steps_per_epoch)
        batches = plan.epoch(self.ours.seed, epoch, self.args.process_index)
        mine = itertools.islice(batches, place * plan.accumulation, (place + 1) * plan.accumulation)
        chosen = [index for batch in mine for index in batch if index != FILLER]
        documents = [self.ours.train[index] for index in chosen]
        losses = document_losses(self.model, documents, self.args.device)
        return [(d.example.where, loss) for d, loss in zip(documents, losses, strict=True)]

    # --- checkpoints --------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        states = gather_objects(checkpoint.rng_state())
        if self.args.should_save:
            self._publish_checkpoint(states)
        if dist.is_initialized():
            dist.barrier()

    def _publish_checkpoint(self, rng_states: list[dict[str, Any]]) -> None:
        step = self.state.global_step
        folder = checkpoint.step_folder(self.ours.checkpoints, step)
        self._checkpoints.refuse_another()
        if folder.exists():
            return
        epoch, done = divmod(step, self.ours.plan.steps_per_epoch)
        facts = {
            "kind": "checkpoint",
            "step": step,
            "data_position": {"seed": self.ours.seed, "epoch": epoch, "steps_of_epoch": done},
            "num_ranks": self.args.world_size,
            "trained_on": dict(self.ours.trained_on),
        }
        with staged(folder, facts) as stage:
            checkpoint.save_weights(self.model, stage)
            checkpoint.save_optimizer(self.optimizer, stage)
            checkpoint.save_scheduler(self.lr_scheduler, stage)
            checkpoint.save_rng(rng_states, stage)
            if self.ours.ranks is not None:
                self.ours.ranks.save(stage)
            write_json(stage / checkpoint.WATCH, self.spikes.state())
            write_json(stage / checkpoint.BEST, self.best.state())
            if self.num_pieces > 1:
                write_json(stage / checkpoint.PIECES, {"num_pieces": self.num_pieces})
            self.state.save_to_json(str(stage / checkpoint.TRAINER_STATE))
        checkpoint.write_latest(self.ours.checkpoints, step)
        keep, best = self.ours.save_total_limit, self.best.protected_step
        protected = None if best is None else checkpoint.step_folder(folder.parent, best)
        checkpoint.prune(folder.parent, keep, folder, protected)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.refuse_other_state(Path(resume_from_checkpoint))
        checkpoint.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_optimizer(self.optimizer, Path(checkpoint_path))
            checkpoint.load_scheduler(self.lr_scheduler, Path(checkpoint_path))
            self.spikes.load(Path(checkpoint_path) / checkpoint.WATCH)
            if (Path(checkpoint_path) / checkpoint.BEST).exists():  # not in those of old versions
                self.best.load(Path(checkpoint_path) / checkpoint.BEST)
            self.num_pieces = checkpoint.load_pieces(Path(checkpoint_path))
            if self.ours.ranks is not None:
                self.ours.ranks.load(Path(checkpoint_path))

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_rng(Path(checkpoint_path), self.args.process_index)
