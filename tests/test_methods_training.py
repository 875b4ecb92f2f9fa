"""What single methods do in training: ranks fall, vectors stand before the text, runs go on."""

from __future__ import annotations

import pytest
import tolerances
import torch
import yaml
from method_cases import CASES, plain
from safetensors.torch import load_file
from small_runs import Bench, adapter_tensors, losses, same_bits
from test_resume import stopped_at

from finetune import artifact
from finetune.errors import InputError
from finetune.fast.attention import register
from finetune.fast.loss import pack, token_losses
from finetune.inference import Sampling, continue_prompts, open_variant
from finetune.recipes import RECIPES

CHECKPOINTS = ("train.max_steps=5", "train.save_steps=2", "train.save_total_limit=3")
WITH_STATE = ["adalora", "dora", "lora+", "pissa", "vera", "lokr", "boft", "hra", "ln_tuning"]
WITH_STATE += ["trainable_tokens", "prompt_tuning", "prefix_tuning", "qlora nf4", "qlora int8"]


def bench_of(folder, base, name: str, **adapter) -> tuple[Bench, list[str]]:
    """A bench whose config has a case's adapter, and the case's other settings."""
    case, bench = CASES[name], Bench(folder, base)
    values = yaml.safe_load(bench.config_file.read_text())
    values["adapter"] = case.adapter_values | adapter
    bench.config_file.write_text(yaml.safe_dump(values))
    others = [o for o in case.overrides if not o.startswith("adapter.")]
    return bench, [f"base.quantization={case.quantized}", *others]


@pytest.mark.parametrize("name", WITH_STATE)
def test_killed_and_started_again_it_ends_bit_for_bit(tmp_path, small_base, monkeypatch, name):
    if CASES[name].quantized != "none":
        pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    runs = []
    for kind in ("straight", "killed"):
        (tmp_path / kind).mkdir()
        bench, settings = bench_of(tmp_path / kind, small_base, name)
        settings += CHECKPOINTS
        if kind == "killed":
            stopped_at(bench, monkeypatch, 3, *settings)
        runs.append(bench.train(*settings))
    straight, killed = runs
    assert losses(killed) == losses(straight)
    assert same_bits(adapter_tensors(killed), adapter_tensors(straight))
    last = "checkpoints/step-000005/trained.safetensors"
    assert same_bits(load_file(killed.path / last), load_file(straight.path / last))


class TestAdaLora:
    SETTINGS = ("train.max_steps=10",)

    def trained(self, folder, base, **adapter):
        schedule = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, **adapter}
        bench, settings = bench_of(folder, base, "adalora", **schedule)
        return bench.train(*settings, *self.SETTINGS)

    def test_ranks_fall_to_the_target_and_differ_between_layers(self, tmp_path, small_base):
        seen = {}
        build = RECIPES["sft"]

        def watched(parts):
            trainer = build(parts)
            step = trainer.ours.ranks.on_optimizer_step

            def note(args, state, control, **kwargs):
                step(args, state, control, **kwargs)
                seen[state.global_step + 1] = sum(trainer.ours.ranks.ranks.values())

            trainer.ours.ranks.on_optimizer_step = note
            return trainer

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(RECIPES, "sft", watched)
            run = self.trained(tmp_path, small_base)
        num = 14
        assert seen[1] == seen[2] == 6 * num, "before tinit"
        assert seen[2] > seen[3] > seen[5] > seen[7] == 3 * num, "the cubic schedule"
        assert seen[8] == seen[10] == 3 * num, "tfinal"
        settings = artifact.read_json(run.adapter / "adapter_config.json")
        assert settings["peft_type"] == "LORA"
        assert len(set(settings["rank_pattern"].values())) > 1
        for key, tensor in adapter_tensors(run).items():
            layer = key.removeprefix("base_model.model.").split(".lora_")[0]
            rank = tensor.shape[0 if ".lora_A." in key else 1]
            assert rank == settings["rank_pattern"][layer] == settings["alpha_pattern"][layer]

    def test_the_penalty_keeps_directions_orthogonal(self, tmp_path, small_base):
        distances = []
        for weight in (0.0, 50.0):
            folder = tmp_path / str(weight)
            folder.mkdir()
            run = self.trained(folder, small_base, orth_reg_weight=weight)
            saved = load_file(run.path / "checkpoints/step-000010/trained.safetensors")
            grams = [t @ t.T for name, t in saved.items() if ".lora_A." in name]
            distances.append(sum(float((g - torch.eye(len(g))).norm()) for g in grams))
        assert distances[1] < 0.8 * distances[0]

    def test_the_loss_that_is_shown_is_the_tokens_alone(self, tmp_path, small_base):
        shown = []
        for weight in (0.0, 0.5):
            folder = tmp_path / str(weight)
            folder.mkdir()
            shown.append(losses(self.trained(folder, small_base, orth_reg_weight=weight))[0])
        assert shown[0] == shown[1]

    def test_a_run_without_room_for_falling_ranks_is_refused(self, tmp_path, small_base):
        with pytest.raises(InputError, match="leave none of 10 steps"):
            self.trained(tmp_path, small_base, tinit=4, tfinal=6)

    def test_a_target_that_is_no_less_is_refused(self, tmp_path, small_base):
        with pytest.raises(InputError, match=r"adapter.target_r: found 6; it is less than init_r"):
            self.trained(tmp_path, small_base, target_r=6)


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
class TestSoftPrompts:
    @pytest.fixture
    def opened(self, tmp_path, small_base, name):
        bench, settings = bench_of(tmp_path, small_base, name)
        return open_variant(bench.train(*settings, "train.max_steps=3"), "adapter")

    def test_losses_of_a_row_are_those_of_plain_peft_one_document_at_a_time(
        self, opened, small_base, name
    ):
        rows = [
            (list(range(3, 20)), [False] * 8 + [True] * 9),
            ([1, 7, 9, 4], [False] + [True] * 3),
        ]
        found = token_losses(opened.model, pack(rows)).split([9, 3])
        for (ids, mask), losses_found in zip(rows, found, strict=True):
            labels = [i if m else -100 for i, m in zip(ids, mask, strict=True)]
            mean = opened.model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                labels=torch.tensor([labels]),
            ).loss
            assert losses_found.mean() == pytest.approx(float(mean), abs=1e-5)

    def test_answers_of_a_batch_are_those_of_each_alone(self, opened, name):
        prompts = [[1, 5, 9, 30, 31], [1, 8], [1, 40, 41, 42, 43, 44, 45, 46]]
        sampling = Sampling(max_new_tokens=6)
        together = list(continue_prompts(opened, prompts, sampling))
        alone = [next(continue_prompts(opened, [prompt], sampling)) for prompt in prompts]
        assert together == alone

    def test_generation_goes_on_as_the_forward_pass_says(self, opened, name):
        """Token by token, without a cache: the same greedy text."""
        prompt = [1, 5, 9, 30, 31]
        found = next(continue_prompts(opened, [prompt], Sampling(max_new_tokens=4)))
        ids = list(prompt)
        for _ in range(4):
            with torch.no_grad():
                out = opened.model(
                    input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))
                )
            ids.append(int(out.logits[0, -1].argmax()))
        assert ids[len(prompt) :][: len(found)] == found

    def test_packing_is_refused(self, tmp_path, small_base, name):
        bench, _ = bench_of(tmp_path, small_base, name)
        with pytest.raises(InputError, match="data.packing: found true with adapter.method"):
            bench.load("data.packing=true", "train.activation_checkpointing=false")


def test_a_prefix_and_activation_checkpointing_are_refused_together(tmp_path, small_base):
    bench, _ = bench_of(tmp_path, small_base, "prefix_tuning")
    with pytest.raises(InputError, match="activation_checkpointing: found true"):
        bench.load("data.packing=false", "train.activation_checkpointing=true")


def test_trained_embeddings_alone_change(tmp_path, small_base):
    bench, settings = bench_of(tmp_path, small_base, "trainable_tokens")
    run = bench.train(*settings, "train.max_steps=3")
    model = open_variant(run, "adapter").model
    before = plain(small_base).get_input_embeddings().weight
    after = model.merge_and_unload().get_input_embeddings().weight
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert set(changed) <= {3, 5, 9, 20}
    assert changed


def test_our_attention_is_the_one_they_train_with(tmp_path, small_base):
    """Prefix keys stand in the cache before the text's: torch's own attention sees to them."""
    bench, settings = bench_of(tmp_path, small_base, "prefix_tuning")
    model = open_variant(bench.train(*settings, "train.max_steps=2"), "adapter").model
    assert model.config._attn_implementation == register()
    ids = torch.tensor([[1, 5, 9, 30, 31]])
    ours = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.base_model.set_attn_implementation("eager")
    eager = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert (ours - eager).abs().max() < tolerances.STEP_ZERO_FLOAT32
