"""An adapter: starts as the base, is all that moves, and comes back from disk as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_runs import Bench, adapter_tensors, flip_bit, republish, same_bits, trainer_of
from transformers import AutoModelForCausalLM

from finetune import artifact
from finetune.adapters import attach, load_adapter, report_parameters
from finetune.config.adapter import AdapterSection
from finetune.errors import CheckFailed, InputError
from finetune.fast.attention import register
from finetune.heldout import score
from finetune.inference import open_variant

IDS = torch.arange(3, 60).unsqueeze(0)


def plain(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_base):
    """A finished run of a few steps."""
    return Bench(tmp_path_factory.mktemp("trained"), small_base).train()


class TestAttach:
    @pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}])
    def test_at_step_zero_the_logits_are_the_bases_bit_for_bit(self, small_base, settings):
        expected = logits(plain(small_base))
        model = attach(plain(small_base), AdapterSection(**settings), "the/base").eval()
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "v_proj", "down_proj")])
    def test_what_trains_is_counted_as_the_paper_does(self, small_base, targets):
        model = plain(small_base)
        shapes = {n: m.weight.shape for n, m in model.named_modules() if hasattr(m, "weight")}
        matched = [shape for name, shape in shapes.items() if name.endswith(targets)]
        num_base = sum(p.numel() for p in model.parameters())
        report = report_parameters(attach(model, AdapterSection(r=3, target_modules=targets), "b"))
        assert report.matched == dict.fromkeys(targets, 2)
        assert report.num_trainable == sum(3 * (out + into) for out, into in matched)
        assert report.num_total == num_base + report.num_trainable

    def test_a_target_that_matches_nothing_is_named_with_what_there_is(self, small_base):
        targets = ("q_proj", "qkv_proj", "w1")
        with pytest.raises(InputError) as caught:
            attach(plain(small_base), AdapterSection(target_modules=targets), "b")
        text = str(caught.value)
        assert "qkv_proj, w1 matches no linear layer" in text
        assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in text
        assert "lm_head" not in text

    def test_two_targets_of_one_name_ending_stay_apart(self, small_base):
        """`proj` is the end of every name and the name of none."""
        with pytest.raises(InputError, match="proj matches no linear layer"):
            attach(plain(small_base), AdapterSection(target_modules=("proj",)), "b")


class TestTraining:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_every_adapter_parameter_moves_and_nothing_else(self, bench, dtype):
        trainer = trainer_of(bench.load("train.max_steps=3", f"base.dtype={dtype}"))
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        buffers = {n: b.clone() for n, b in trainer.model.named_buffers()}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == ("lora_" in name), name
            if moved:
                assert parameter.dtype == torch.float32
        assert same_bits(buffers, dict(trainer.model.named_buffers()))

    def test_the_scale_is_alpha_over_r_or_over_its_root(self, bench):
        for settings, scale in ((("adapter.use_rslora=true",), 8 / 2), ((), 8 / 4)):
            trainer = trainer_of(bench.load(*settings, f"run.name=scale-{len(settings)}"))
            layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
            layer.lora_B["default"].weight.data.normal_()
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            x = torch.randn(1, a.shape[1])
            update = layer(x) - layer.base_layer(x)
            torch.testing.assert_close(update, scale * (x @ a.T @ b.T), rtol=1e-4, atol=1e-5)


class TestOnDisk:
    def test_it_comes_back_as_it_was_trained(self, bench):
        loaded = bench.load()
        run = bench.train()
        trainer = trainer_of(bench.load("run.name=other"))
        trainer._load_from_checkpoint(str(run.checkpoints / "step-000004"))
        opened = open_variant(run, "adapter")
        assert torch.equal(logits(opened.model), logits(trainer.model.eval()))
        documents = trainer.ours.heldout
        recorded = artifact.read_manifest(run.adapter)["facts"]["heldout_loss"]
        batch_size = loaded.config.eval.per_device_eval_batch_size
        assert score(opened.model, documents, batch_size, opened.device).loss == recorded

    def test_plain_peft_on_plain_transformers_gives_the_same_logits(self, trained, small_base):
        theirs = PeftModel.from_pretrained(plain(small_base), trained.adapter).eval()
        ours = open_variant(trained, "adapter").model
        torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
        assert (logits(theirs) - logits(plain(small_base))).abs().max() > 0.1, "it was trained"

    def test_the_folder_holds_what_other_tools_expect_and_no_more(self, trained, small_base):
        names = {path.name for path in trained.adapter.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "manifest.json"} <= names
        assert "README.md" not in names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        facts = artifact.verify(trained.adapter)["facts"]
        assert facts["base"] == str(small_base)
        assert {t.dtype for t in adapter_tensors(trained).values()} == {torch.float32}


class TestWhatIsRefused:
    @pytest.fixture
    def run(self, trained, tmp_path):
        """A copy to damage."""
        from finetune.run_folder import RunFolder

        return RunFolder(shutil.copytree(trained.path, tmp_path / "copy"))

    def change(self, run, edit):
        """Publishes the adapter again with other tensors: its manifest is right, it is not."""
        weights = run.adapter / "adapter_model.safetensors"
        save_file(edit(load_file(weights)), weights, {"format": "pt"})
        republish(run.adapter)

    def test_missing_keys(self, run):
        self.change(run, lambda t: dict(sorted(t.items())[: len(t) // 2]))
        with pytest.raises(CheckFailed, match="14 adapter keys missing or unexpected"):
            open_variant(run, "adapter")

    def test_unexpected_keys(self, run):
        self.change(run, lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.zeros(1)})
        with pytest.raises(CheckFailed, match="1 adapter keys .*lm_head"):
            open_variant(run, "adapter")

    def test_another_shape(self, run):
        self.change(run, lambda t: {n: v[:, :-1].contiguous() for n, v in t.items()})
        with pytest.raises(CheckFailed, match="shape"):
            open_variant(run, "adapter")

    @pytest.mark.parametrize("edit", ['"lora_alpha": 8', '"use_rslora": false', '"r": 4'])
    def test_edited_settings(self, run, edit):
        path = run.adapter / "adapter_config.json"
        text = path.read_text()
        assert edit in text
        path.write_text(text.replace(edit, edit.replace("8", "9").replace("4", "5")))
        if "false" in edit:
            path.write_text(text.replace(edit, '"use_rslora": true'))
        with pytest.raises(CheckFailed, match="adapter_config.json"):
            open_variant(run, "adapter")

    def test_a_flipped_bit(self, run):
        flip_bit(run.adapter / "adapter_model.safetensors")
        with pytest.raises(CheckFailed, match="adapter_model.safetensors"):
            open_variant(run, "adapter")

    def test_a_folder_of_foreign_origin(self, run):
        (run.adapter / artifact.MANIFEST).unlink()
        with pytest.raises(CheckFailed, match="no readable manifest"):
            open_variant(run, "adapter")

    @pytest.mark.parametrize("kind", ["weights", "architecture"])
    def test_another_base(self, run, tmp_path, small_base, kind):
        other = shutil.copytree(small_base, tmp_path / "other")
        if kind == "weights":
            flip_bit(other / "model.safetensors", 0.99)
        else:
            settings = json.loads((other / "config.json").read_text())
            settings["rms_norm_eps"] = 1e-4
            (other / "config.json").write_text(json.dumps(settings))
        text = run.config_file.read_text()
        run.config_file.write_text(text.replace(str(small_base), str(other)))
        with pytest.raises(CheckFailed, match="was trained on a base with fingerprint"):
            open_variant(run, "adapter")

    def test_a_copy_of_the_base_elsewhere_is_the_same_base(self, run, tmp_path, small_base):
        copy = shutil.copytree(small_base, tmp_path / "copied")
        text = run.config_file.read_text()
        run.config_file.write_text(text.replace(str(small_base), str(copy)))
        assert open_variant(run, "adapter").name == "adapter"

    def test_an_adapter_without_its_run_can_be_loaded_without_a_fingerprint(self, run, small_base):
        model = load_adapter(plain(small_base, attn_implementation=register()), run.adapter)
        assert not model.training
        assert not [p for p in model.parameters() if p.requires_grad]
