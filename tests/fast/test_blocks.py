"""A whole Llama with the fast parts, each alone and all, against the libraries' own layers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from adapted import with_adapter
from tolerances import FAST_BFLOAT16, FAST_GRADIENT_FLOAT32

from finetune.config import FastSection
from finetune.fast import blocks
from finetune.fast.blocks import speed_up
from finetune.fast.loss import pack, token_losses
from finetune.fast.place import as_on_gpu

pytestmark = pytest.mark.usefixtures("library")

PARTS = [name for name in FastSection.model_fields if name != "allocator"]  # of the model
OFF = FastSection(**dict.fromkeys(PARTS, False))
DOCUMENTS = [
    ([5, 40, 41, 42, 2, 43], [False, False, True, True, True, False]),
    ([7], [True]),
    ([9, 60, 61, 62], [False] * 4),
    ([3, *range(100, 130)], [False, *[True] * 30]),
]
ALIKE = [  # one beginning goes on in several ways, one document is all of another, one is twice
    ([5, 40, 41, 42, 2], [False, False, True, True, True]),
    ([5, 40, 41, 50, 2], [False, False, True, True, True]),
    ([7, 8], [True, True]),
    ([5, 40], [False, True]),
    ([5, 40, 41, 42, 2], [False, False, True, True, True]),
    ([7, 8, 9], [False, True, True]),
]


def losses_and_gradients(model, parts, documents=DOCUMENTS, scale=1.0):
    """One micro-batch; gradients are added to what is there."""
    torch.manual_seed(1)
    losses = token_losses(
        model,
        pack(documents),
        in_blocks=parts.loss,
        dense=not parts.attention,
        beginnings=parts.beginnings,
        products=parts.products,
    )
    (losses.sum() * scale).backward()
    named = model.named_parameters()
    return losses.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def distance(one, other) -> float:
    """Largest relative difference of losses and of the gradient of any tensor."""
    assert one[1].keys() == other[1].keys()
    pairs = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in one[1])]
    return max(((a - b).double().norm() / b.double().norm()).item() for a, b in pairs if len(a))


def both(model, parts, documents=DOCUMENTS):
    plain = copy.deepcopy(model)
    speed_up(model, parts)
    return losses_and_gradients(model, parts, documents), losses_and_gradients(
        plain, OFF, documents
    )


SWITCHES = [
    *[FastSection(**{key: key == only for key in PARTS}) for only in PARTS],
    OFF.model_copy(update={"attention": True, "beginnings": True}),
    FastSection(),
]


@pytest.mark.parametrize("parts", SWITCHES, ids=lambda p: "+".join(k for k, v in p if v))
@pytest.mark.parametrize("preset", ["llama3-8b", "llama2-7b", "llama3.2-1b"])
def test_losses_and_gradients_are_the_libraries(tiny_llama, preset, parts):
    """Grouped and full attention; head apart from the embedding and tied to it."""
    found = both(with_adapter(tiny_llama(preset)), parts, [*DOCUMENTS, *ALIKE])
    assert distance(*found) < FAST_GRADIENT_FLOAT32


@pytest.mark.parametrize(
    "documents",
    [
        [([4, 5], [True, True])],
        [([4], [True]), ([5, 6, 7], [True] * 3)],
        DOCUMENTS[:1] * 9,
        ALIKE,
        [*DOCUMENTS, *ALIKE],
    ],
    ids=["two tokens", "one token", "nine documents", "one beginning", "many"],
)
def test_any_documents(tiny_llama, documents):
    found = both(with_adapter(tiny_llama()), FastSection(), documents)
    assert distance(*found) < FAST_GRADIENT_FLOAT32


@pytest.mark.parametrize("documents", [[([4, 5, 6], [False] * 3)], [([4], [True])]])
def test_nothing_to_train_is_a_gradient_of_zero(tiny_llama, documents):
    model = with_adapter(tiny_llama())
    speed_up(model, FastSection())
    losses, gradients = losses_and_gradients(model, FastSection(), documents)
    assert losses.shape == (0,)
    assert len(gradients) == 2 * 7 * len(model.base_model.model.model.layers)
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_dropout_draws_what_peft_draws(tiny_llama):
    model = with_adapter(tiny_llama(), lora_dropout=0.3)
    assert distance(*both(model, FastSection())) < FAST_GRADIENT_FLOAT32


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["gate_proj", "o_proj", "v_proj", "k_proj", "q_proj"]},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"layers_to_transform": [1]},
        # in the first layer, only one of gate and up has a gradient
        {"target_modules": ["up_proj", "down_proj"]},
        {"target_modules": ["gate_proj", "down_proj"]},
    ],
    ids=str,
)
def test_adapters_on_some_layers_and_of_other_kinds(tiny_llama, settings):
    found = both(with_adapter(tiny_llama(), **settings), FastSection())
    assert distance(*found) < FAST_GRADIENT_FLOAT32


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["k_proj", "up_proj", "down_proj"], ["gate_proj", "o_proj"]]
)
def test_layers_without_an_adapter_leave_the_others_theirs(tiny_llama, monkeypatch, targets):
    """q and v alone are the LoRA paper's choice."""
    model = with_adapter(tiny_llama(), target_modules=targets, lora_dropout=0.3)
    taken, real = [], blocks.projection_of

    def noting(layer):
        projection = real(layer)
        taken.extend([] if projection is None else [layer])
        return projection

    monkeypatch.setattr(blocks, "projection_of", noting)
    found = both(model, FastSection())
    assert {id(layer) for layer in taken} == {
        id(m) for n, m in model.named_modules() if n.endswith(tuple(targets))
    }
    assert distance(*found) < FAST_GRADIENT_FLOAT32


def test_all_weights_may_train(tiny_llama):
    model = copy.deepcopy(tiny_llama("llama3.2-1b")).train()
    assert distance(*both(model, FastSection())) < FAST_GRADIENT_FLOAT32


def rows_of_layers(model):
    """Tokens that go through each layer's MLP."""
    speed_up(model, FastSection())
    rows = []
    for layer in model.base_model.model.model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    losses_and_gradients(model, FastSection())
    return rows


@pytest.mark.parametrize(
    ("settings", "num_rows"), [({}, 3 + 30), ({"lora_dropout": 0.3}, 42)], ids=["plain", "dropout"]
)
def test_the_last_layer_goes_on_with_what_the_loss_reads(tiny_llama, library, settings, num_rows):
    """Of 42 tokens 33 are supervised; where dropout is drawn, all go on."""
    *others, last = rows_of_layers(with_adapter(tiny_llama(), **settings))
    assert last == num_rows
    assert set(others) == {48 if library == "onednn" and not settings else 42}


def test_the_last_layer_ends_nowhere_where_kernels_cost_more(tiny_llama, monkeypatch, library):
    """Of 48 tokens, with fillers, 15 are not read."""
    model = with_adapter(tiny_llama())
    mlp = model.base_model.model.model.layers[-1].mlp
    saved = 4 * 15 * sum(parameter.numel() for parameter in mlp.parameters())
    for least, rows in ((saved, 33), (saved + 1, 48 if library == "onednn" else 33)):
        monkeypatch.setattr(blocks, "LEAST_SAVED", least)
        assert rows_of_layers(model)[-1] == rows


def test_gradients_add_up_over_micro_batches(tiny_llama):
    model = with_adapter(tiny_llama())
    plain = copy.deepcopy(model)
    speed_up(model, FastSection())
    for documents in (DOCUMENTS[:1], DOCUMENTS[1:]):
        found = losses_and_gradients(model, FastSection(), documents)
        expected = losses_and_gradients(plain, OFF, documents)
    assert distance(found, expected) < FAST_GRADIENT_FLOAT32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_may_be_recomputed(tiny_llama, reentrant):
    model = with_adapter(tiny_llama(), lora_dropout=0.3)
    model.enable_input_require_grads()
    expected = losses_and_gradients(copy.deepcopy(model), OFF)
    speed_up(model, FastSection())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert distance(losses_and_gradients(model, FastSection()), expected) < FAST_GRADIENT_FLOAT32


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(tiny_llama, autocast):
    model = with_adapter(tiny_llama())
    expected = losses_and_gradients(copy.deepcopy(model), OFF)
    speed_up(model, FastSection())
    if not autocast:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = losses_and_gradients(model, FastSection())
    assert {g.dtype for g in found[1].values()} == {torch.float32}
    assert distance(found, expected) < 8 * FAST_BFLOAT16  # through every layer


@pytest.mark.parametrize("parts", [FastSection(), OFF.model_copy(update={"attention": True})])
def test_autocast_on_a_gpu_gives_attention_one_type(tiny_llama, parts):
    """The rotation leaves float32 beside bfloat16 values; a GPU's kernels take neither mix."""
    model = with_adapter(tiny_llama())
    expected = losses_and_gradients(copy.deepcopy(model), OFF)
    speed_up(model, parts)
    with torch.autocast("cpu", torch.bfloat16), as_on_gpu(True):
        found = losses_and_gradients(model, parts)
    assert distance(found, expected) < 8 * FAST_BFLOAT16


def test_float16_keeps_the_small_gradients_of_an_adapter(tiny_llama):
    """B near zero and a loss over many tokens: below what float16 holds."""
    wide = with_adapter(tiny_llama())
    for name, parameter in wide.named_parameters():
        if "lora_B" in name:
            parameter.data *= 2e-3
    model = copy.deepcopy(wide)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.half()
    plain = copy.deepcopy(model)
    speed_up(model, FastSection())

    def of_a(model, parts):
        found = losses_and_gradients(model, parts, scale=1 / 8192)[1]
        return torch.cat([g.flatten() for name, g in found.items() if "lora_A" in name])

    exact, fast, twin = of_a(wide, OFF), of_a(model, FastSection()), of_a(plain, OFF)
    assert (fast - exact).norm() < 2 * (twin - exact).norm() + 0.02 * exact.norm()


def test_another_attention_is_left_alone(tiny_llama):
    model = with_adapter(tiny_llama())
    speed_up(model, FastSection())
    model.base_model.model.set_attn_implementation("eager")
    ids = torch.tensor([[1, 5, 9, 13]])
    plain = with_adapter(tiny_llama("llama3-8b", "eager"))
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


def test_without_gradients_the_libraries_run(tiny_llama):
    model = with_adapter(tiny_llama()).eval()
    plain = copy.deepcopy(model)
    speed_up(model, FastSection())
    ids = torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


def test_names_and_copies_are_the_same(tiny_llama):
    model = with_adapter(tiny_llama())
    before = list(model.state_dict())
    speed_up(model, FastSection())
    assert list(model.state_dict()) == before
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    losses_and_gradients(twin, FastSection())
    assert all(p.grad is None for p in model.parameters())


def test_every_combination_of_switches_runs(tiny_llama):
    expected = losses_and_gradients(with_adapter(tiny_llama()), OFF, ALIKE)
    for values in itertools.product([False, True], repeat=len(PARTS)):
        parts = FastSection(**dict(zip(PARTS, values, strict=True)))
        model = with_adapter(tiny_llama())
        speed_up(model, parts)
        assert distance(losses_and_gradients(model, parts, ALIKE), expected) < FAST_GRADIENT_FLOAT32
