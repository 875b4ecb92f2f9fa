"""The trainer's evaluation seam: held-out losses before, while and after it trains, and their say.

Half of the mix-in of `trainer.OurSeams`: when a held-out loss is due, what is saved and stopped
for it (`best`), and which weights the model holds when the run ends.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer, TrainerControl

from finetune import artifact, checkpoint
from finetune.best import BestWatch
from finetune.collectives import gather_objects
from finetune.errors import CannotContinue, CheckFailed
from finetune.heldout import HeldoutLoss, score_rows, total_of
from finetune.watchdog import not_finite

SAME_LOSS = 1e-3
"""Nats per token between two scorings of the same weights: a resumed run may score in batches of
another size, in bfloat16. On one machine and at one size the two are equal."""


class EvaluationSeam(Trainer):
    """When held-out rows are scored, and what follows."""

    ours: Any
    control: TrainerControl
    best: BestWatch
    last_heldout: tuple[int, HeldoutLoss] | None = None
    best_is_loaded: bool = False

    @property
    def step_of_weights(self) -> int:
        """The step after which the model had the weights it has."""
        best = self.best.best_step
        return best if self.best_is_loaded and best is not None else self.state.global_step

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """The engine asks before its first step too (`skip_scheduler`), also of a resumed run."""
        if skip_scheduler and not self.best.is_due_at_start(self.state.global_step):
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss as sum over count, over all ranks; once for each step."""
        step = self.state.global_step
        if self.last_heldout is not None and self.last_heldout[0] == step:
            return _as_metrics(self.last_heldout[1])
        result = self._score_heldout() if step else self._score_before_training()
        self.last_heldout = (step, result)
        is_best = self.best.look(step, result.loss, result.num_tokens)
        metrics = _as_metrics(result)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.best.stops or (is_best and self.best.rules.load_best_model_at_end):
            self.control.should_save = True
        if self.best.stops:
            self.control.should_training_stop = True
        return metrics

    def _score_heldout(self) -> HeldoutLoss:
        ranks, rank = self.args.world_size, self.args.process_index
        mine = self.ours.heldout[rank::ranks]
        rows = score_rows(self.model, mine, self.ours.eval_batch_size, self.args.device)
        return total_of([row for share in gather_objects(rows) for row in share])

    def _score_before_training(self) -> HeldoutLoss:
        """The first forward passes of a run: what is wrong with the base shows here."""
        try:
            return self._score_heldout()
        except CannotContinue as error:
            broken = ", ".join(not_finite(self.model.named_parameters()))
            named = f"; weights not finite: {broken}" if broken else ""
            raise CannotContinue(f"before step 1: {error}{named}") from error

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The last held-out loss and the best weights come before the trackers are closed."""
        ended = self.state.global_step >= self.state.max_steps or self.best.stops
        if ended and self.ours.heldout:  # and was not stopped by a signal
            self.evaluate()
            self._load_best()
        return super()._finalize_training(*args, **kwargs)

    def _load_best(self) -> None:
        """Puts the best checkpoint's weights into the model and scores them again.

        Raises:
            CheckFailed: its files, or its held-out loss, are not what they were.
        """
        step, loss = self.best.protected_step, self.best.best_loss
        if step is None or loss is None:
            return
        folder = checkpoint.step_folder(self.ours.checkpoints, step)
        found = gather_objects(artifact.findings_of(folder) if self.args.should_save else [])
        if found[0]:
            raise CheckFailed(f"{'; '.join(found[0])}: {_ADVICE.format(step=step)}")
        checkpoint.load_weights(self.model, folder)
        if self.ours.ranks is not None:
            self.ours.ranks.load(folder)
        last, again = self.last_heldout, self._score_heldout()
        if not abs(again.loss - loss) <= SAME_LOSS:
            raise CheckFailed(
                f"{folder}: its held-out loss is {again.loss!r} now and was {loss!r} when it was "
                f"saved: {_ADVICE.format(step=step)}"
            )
        self.last_heldout, self.best_is_loaded = (step, again), True
        if self.args.should_save and last is not None:
            beside = "the last" if step == last[0] else f"step {last[0]}: {last[1].loss:.4f}"
            print(
                f"best     step {step}: held-out loss {again.loss:.4f} ({beside}); "
                "its weights are published",
                file=sys.stderr,
            )


_ADVICE = (
    "step {step} has the lowest held-out loss and cannot be published; nothing is. The last "
    "checkpoint stays; to publish that one, give train.load_best_model_at_end=false and "
    "--allow-change train.load_best_model_at_end"
)


def _as_metrics(result: HeldoutLoss) -> dict[str, float]:
    return {"eval_loss": result.loss, "eval_tokens": float(result.num_tokens)}
