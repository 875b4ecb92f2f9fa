"""The update of a step: the same however its rows are cut, and the one that plain torch makes."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from safetensors.torch import load_file
from small_runs import (
    Bench,
    adapter_tensors,
    embedded_rows,
    losses,
    relative_difference,
    step_lines,
    trainer_of,
    worst_tensor,
    write_rows,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from finetune.packing import BatchPlan

ONE_STEP = ("train.max_steps=1", "train.optim=sgd", "train.max_grad_norm=0", "data.packing=false")


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, before the optimizer moves."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor | None] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.of = {n: None if p.grad is None else p.grad.clone() for n, p in trained.items()}


def first_step(loaded):
    """The trainer after one step and the gradients of that step; B is not zero, as it starts."""
    trainer, gradients = trainer_of(loaded), Gradients()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.of


def reference_loss(model, documents) -> torch.Tensor:
    """Sum over trained tokens over their number, in plain torch, one document at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for document in documents:
        ids = torch.tensor([document.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        for position in range(1, len(document.input_ids)):
            if document.train_mask[position]:
                log_p = logits[position - 1].double().log_softmax(-1)
                total, count = total - log_p[document.input_ids[position]], count + 1
    return total / count


def plain_model(folder, dtype=torch.float64):
    """The base through plain transformers, with its own attention, mask and head."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def with_rows(bench, count):
    write_rows(bench.train_file, embedded_rows("train", count))
    return bench


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_base):
    """Eight rows of unequal length in one micro-batch."""
    bench = with_rows(Bench(tmp_path_factory.mktemp("whole"), small_base), 8)
    return first_step(bench.load(*ONE_STEP, "train.per_device_train_batch_size=8"))


def assert_same_gradients(expected, found):
    assert relative_difference(expected, found) <= tolerances.SUM_ORDER_FLOAT32
    assert worst_tensor(expected, found) <= 3 * tolerances.SUM_ORDER_FLOAT32


class TestAccumulation:
    @pytest.mark.parametrize(("size", "accumulated"), [(4, 2), (2, 4), (1, 8)])
    def test_the_gradients_do_not_depend_on_how_a_step_is_cut(
        self, bench, whole, size, accumulated
    ):
        expected_trainer, expected = whole
        loaded = with_rows(bench, 8).load(
            *ONE_STEP,
            f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={accumulated}",
        )
        trainer, found = first_step(loaded)
        assert len({len(d.input_ids) for d in trainer.ours.train}) > 4
        assert_same_gradients(expected, found)
        assert trainer.step_loss == pytest.approx(expected_trainer.step_loss, rel=1e-6)
        assert trainer.step_tokens == expected_trainer.step_tokens

    def test_a_mean_of_means_would_have_been_seen(self, whole):
        trainer, _ = whole
        documents, model = trainer.ours.train, trainer.model.eval()
        means = [reference_loss(model, [d]).item() for d in documents]
        assert abs(sum(means) / len(means) - reference_loss(model, documents).item()) > 1e-2

    def test_packs_and_rows_give_the_same_gradients(self, bench, whole):
        loaded = with_rows(bench, 8).load(
            *ONE_STEP[:3], "data.packing=true", "data.max_length=256", "train.save_steps=5"
        )
        trainer, found = first_step(loaded)
        assert sum(len(pack) > 1 for pack in trainer.ours.plan.packs) > 0
        assert len(trainer.ours.plan.packs) <= 2, "the step holds every row"
        assert_same_gradients(whole[1], found)

    def test_recomputed_activations_give_the_same_gradients(self, bench, whole):
        loaded = with_rows(bench, 8).load(
            *ONE_STEP, "train.per_device_train_batch_size=8", "train.activation_checkpointing=true"
        )
        _, found = first_step(loaded)
        assert_same_gradients(whole[1], found)

    def test_a_micro_batch_without_trained_tokens_adds_nothing(self, bench):
        """Three rows, four micro-batches: the fourth is filled up and trains nothing."""
        with_rows(bench, 3)
        alone = first_step(bench.load(*ONE_STEP, "train.per_device_train_batch_size=3"))
        filled = first_step(
            bench.load(
                *ONE_STEP,
                "run.name=filled",
                "train.per_device_train_batch_size=1",
                "train.gradient_accumulation_steps=4",
            )
        )
        micro_batches = list(filled[0].ours.plan.epoch(0, 0, 0))
        assert [batch for batch in micro_batches if batch == [-1]], "none was filled"
        assert_same_gradients(alone[1], filled[1])
        assert filled[0].step_loss == pytest.approx(alone[0].step_loss, rel=1e-6)

    def test_a_step_without_any_trained_token_is_finite_and_still(self, bench):
        trainer = trainer_of(bench.load(*ONE_STEP))
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.ours.plan.packs[:] = [[-1]]
        trainer.train()
        assert trainer.step_tokens == 0
        assert trainer.step_loss == 0.0
        # No gradient at all: with one of zeros, momentum and decay would move the weights.
        assert gradients.of and set(gradients.of.values()) == {None}

    def test_tokens_are_counted_over_the_whole_step(self, bench):
        run = bench.train("train.gradient_accumulation_steps=2", "data.packing=false")
        trainer = trainer_of(bench.load("run.name=counted", "train.gradient_accumulation_steps=2"))
        documents = trainer.ours.train
        plan = BatchPlan([[i] for i in range(len(documents))], 2, 2, 1)
        micro_batches = list(plan.epoch(0, 0, 0))
        for line, first in zip(step_lines(run), range(0, 8, 2), strict=True):
            chosen = [documents[i] for batch in micro_batches[first : first + 2] for i in batch]
            assert line["tokens_trained"] == sum(sum(d.train_mask[1:]) for d in chosen)
            assert line["tokens"] == sum(len(d.input_ids) for d in chosen)


class TestPrecision:
    def test_autocast_stays_near_float32_and_keeps_float32_parts(self, bench, whole):
        loaded = with_rows(bench, 8).load(
            *ONE_STEP, "train.per_device_train_batch_size=8", "train.bf16=true"
        )
        trainer, found = first_step(loaded)
        assert 1e-4 < worst_tensor(whole[1], found) < tolerances.BFLOAT16_GRADIENT
        assert trainer.step_loss == pytest.approx(whole[0].step_loss, rel=1e-2)
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}

    def test_a_bfloat16_base_keeps_its_type_and_trains_a_float32_adapter(self, bench, whole):
        loaded = with_rows(bench, 8).load(
            *ONE_STEP, "train.per_device_train_batch_size=8", "base.dtype=bfloat16"
        )
        trainer, found = first_step(loaded)
        types = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
        assert types == {True: torch.float32, False: torch.bfloat16}
        assert 1e-4 < worst_tensor(whole[1], found) < tolerances.BFLOAT16_GRADIENT
        frequencies = [b for n, b in trainer.model.named_buffers() if "inv_freq" in n]
        assert frequencies and {b.dtype for b in frequencies} == {torch.float32}


class TestAgainstPlainTorch:
    def test_the_loss_of_every_step_is_the_loss_of_its_rows_under_its_weights(self, bench):
        """Recomputed from the checkpoint before the step, by plain transformers in float64."""
        run = bench.train("train.save_steps=1", "train.save_total_limit=9")
        trainer = trainer_of(bench.load("run.name=other"))
        order = list(trainer.ours.plan.epoch(trainer.ours.seed, 0, 0))
        model = trainer.model.double().eval()
        model.base_model.model.set_attn_implementation("eager")
        for step, loss in enumerate(losses(run)):
            if step:
                _load(model, run.checkpoints / f"step-{step:06d}" / "trained.safetensors")
            documents = [trainer.ours.train[index] for index in order[step]]
            assert loss == pytest.approx(reference_loss(model, documents).item(), rel=1e-5)

    def test_two_steps_of_adamw_on_all_weights(self, bench):
        """Our run against AdamW, clipping and warm-up written out by hand in float64."""
        settings = (
            *("recipe=sft", "adapter={method: none}", "data.packing=false", "train.max_steps=2"),
            *("train.per_device_train_batch_size=24", "train.weight_decay=0.1"),
            *("train.adam_epsilon=1e-4", "train.adam_beta2=0.95", "train.max_grad_norm=0.5"),
            *("train.warmup_steps=2", "train.lr_scheduler_type=linear"),
        )
        run = bench.train(*settings)
        documents = trainer_of(bench.load(*settings, "run.name=other")).ours.train
        model = plain_model(bench.base)
        optimizer = AdamWByHand(model, beta2=0.95, epsilon=1e-4, weight_decay=0.1)
        for rate, line in zip((0.0, 0.005), step_lines(run), strict=True):
            loss = reference_loss(model, documents)
            loss.backward()
            norm = optimizer.clip(0.5)
            assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
            assert line["learning_rate"] == pytest.approx(rate)
            optimizer.step(rate)
        trained = plain_model(run.model).state_dict()
        start = plain_model(bench.base).state_dict()
        for name, weight in model.state_dict().items():
            moved = (weight - start[name]).abs().max()
            assert moved > 1e-4, f"{name} did not move"
            assert float((weight - trained[name]).abs().max() / moved) < 1e-3, name

    def test_two_steps_of_adamw_on_an_adapter(self, bench):
        """W + s·B·A written out by hand, trained by hand in float64, against PEFT's layers."""
        settings = (
            *("train.max_steps=2", "train.per_device_train_batch_size=24", "data.packing=false"),
            # Large, as these gradients are small: AdamW would multiply their rounding, which is
            # another on each kind of CPU, by rate over epsilon.
            *("train.adam_epsilon=1e-3", "train.lr_scheduler_type=constant"),
        )
        run = bench.train(*settings)
        trainer = trainer_of(bench.load(*settings, "run.name=other"))
        model = plain_model(bench.base).requires_grad_(False)
        weights = dict(model.named_parameters())
        start = {
            name.removeprefix("base_model.model.").replace(".default", ""): p.detach().double()
            for name, p in trainer.model.named_parameters()
            if p.requires_grad
        }
        factors = torch.nn.ParameterDict(
            {key.replace(".", "/"): value.clone() for key, value in start.items()}
        )
        optimizer = AdamWByHand(factors, beta2=0.999, epsilon=1e-3, weight_decay=0.0)
        for line in step_lines(run):
            updated = dict(weights)
            for key in factors:
                if key.endswith("lora_A/weight"):
                    module = key.removesuffix("/lora_A/weight")
                    b, a = factors[f"{module}/lora_B/weight"], factors[key]
                    name = module.replace("/", ".") + ".weight"
                    updated[name] = weights[name] + (8 / 4) * (b @ a)
            loss = reference_loss(_Called(model, updated), trainer.ours.train)
            loss.backward()
            assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
            optimizer.clip(1.0)
            optimizer.step(0.01)
        found = adapter_tensors(run)
        for key, factor in factors.items():
            other = found["base_model.model." + key.replace("/", ".")].double()
            moved = (factor - start[key.replace("/", ".")]).detach().abs().max()
            assert float((factor - other).detach().abs().max() / moved) < 1e-3, key


def _load(model, path):
    saved = load_file(path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in saved.items():
            parameters[name].copy_(tensor)


class _Called:
    """A model called with other weights."""

    def __init__(self, model, weights) -> None:
        self.model, self.weights = model, weights

    def __call__(self, **inputs):
        return torch.func.functional_call(self.model, self.weights, kwargs=inputs)


class AdamWByHand:
    """Loshchilov and Hutter 2019, algorithm 2, with bias correction; vectors are not decayed."""

    def __init__(self, module, beta2, epsilon, weight_decay) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.beta1, self.beta2, self.epsilon, self.decay = 0.9, beta2, epsilon, weight_decay
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.count = 0

    def clip(self, limit) -> float:
        """Scales the gradients down to a norm; returns the norm before."""
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in self.parameters))
        for parameter in self.parameters:
            parameter.grad *= min(1.0, limit / norm)
        return norm

    @torch.no_grad()
    def step(self, rate) -> None:
        self.count += 1
        for p, m, v in zip(self.parameters, self.first, self.second, strict=True):
            m.mul_(self.beta1).add_((1 - self.beta1) * p.grad)
            v.mul_(self.beta2).add_((1 - self.beta2) * p.grad**2)
            m_hat, v_hat = m / (1 - self.beta1**self.count), v / (1 - self.beta2**self.count)
            p -= rate * (self.decay * p if p.dim() > 1 else 0.0)
            p -= rate * m_hat / (v_hat.sqrt() + self.epsilon)
            p.grad = None
