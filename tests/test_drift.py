"""A run that goes on with another config: what may change, what is refused, and that it acts."""

from __future__ import annotations

import json

import pytest
from small_runs import adapter_tensors, losses, same_bits, step_lines
from test_resume import stopped_at

from finetune.config.schema import SECTIONS
from finetune.drift import FIXED, FREE
from finetune.errors import InputError
from finetune.train import main, train

SETTINGS = ("train.max_steps=8", "train.save_steps=2", "train.warmup_steps=0")
# A setting of each kind that decides what is trained, and another value of it.
DECIDING = {
    "train.learning_rate": "0.005",
    "train.max_steps": "9",
    "train.per_device_train_batch_size": "1",
    "train.gradient_accumulation_steps": "2",
    "train.lr_scheduler_type": "linear",
    "train.warmup_steps": "1",
    "train.weight_decay": "0.1",
    "train.adam_beta1": "0.8",
    "train.max_grad_norm": "0.5",
    "train.optim": "sgd",
    "train.bf16": "true",
    "train.activation_checkpointing": "true",
    "run.seed": "5",
    "data.max_length": "96",
    "data.packing": "false",
    "data.train_on": "all",
    "data.chat_format": "llama3",
    "data.on_overflow": "error",
    "data.date_string": "1 Jan 2020",
    "adapter.r": "2",
    "adapter.lora_alpha": "2",
    "adapter.use_rslora": "true",
    "adapter.lora_dropout": "0.5",
    "adapter.target_modules": "[q_proj]",
    "base.dtype": "bfloat16",
}


@pytest.fixture
def stopped(bench, monkeypatch):
    """A run that was killed during its fifth step."""
    stopped_at(bench, monkeypatch, 5, *SETTINGS)
    return bench


def test_the_free_settings_are_settings():
    keys = {f"{name}.{key}" for name, model in SECTIONS.items() for key in model.model_fields}
    assert keys >= FREE
    assert keys >= set(DECIDING)
    assert not FREE & set(DECIDING)


def test_every_deciding_setting_is_refused_with_both_values(stopped):
    for key, value in DECIDING.items():
        same = [setting for setting in SETTINGS if not setting.startswith(f"{key}=")]
        with pytest.raises(InputError) as caught:
            train(stopped.load(*same, f"{key}={value}"))
        assert any(line.startswith(f"{key}: the folder has") for line in caught.value.findings), key
        assert "--allow-change" in caught.value.findings[0]
    assert not (stopped.run_folder().path / "changes.jsonl").exists()


def test_free_settings_change_and_the_run_ends_the_same(stopped, tmp_path, small_base, capfd):
    from small_runs import Bench

    (tmp_path / "straight").mkdir()
    straight = Bench(tmp_path / "straight", small_base).train(*SETTINGS)
    free = ("train.logging_steps=1", "train.save_total_limit=3", "train.eval_steps=3")
    run = stopped.train(*SETTINGS, *free)
    assert losses(run) == losses(straight)
    assert same_bits(adapter_tensors(run), adapter_tensors(straight))
    assert "changed  train.logging_steps" in capfd.readouterr().err
    lines = [json.loads(x) for x in (run.path / "changes.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {x.split("=")[0] for x in free}
    assert {line["after_step"] for line in lines} == {4}
    assert run.config().train.logging_steps == 1


def test_an_allowed_learning_rate_acts_from_there_on(stopped):
    run = stopped.run_folder()
    config = stopped.load(*SETTINGS, "train.learning_rate=0.001")
    assert train(config, ["train.learning_rate"]) == 0
    rates = [line["learning_rate"] for line in step_lines(run)]
    assert rates[3] > 0.005  # of step 4, by the old peak of 0.01
    assert rates[4] == pytest.approx(rates[3] / 10, rel=0.5)
    assert run.config().train.learning_rate == 0.001


def test_an_allowed_decay_acts_too(stopped):
    config = stopped.load(*SETTINGS, "train.weight_decay=0.5")
    assert train(config, ["train.weight_decay"]) == 0
    groups = json.loads(
        (stopped.run_folder().checkpoints / "step-000008" / "optimizer.json").read_text()
    )["param_groups"]
    assert {group["weight_decay"] for group in groups} >= {0.5}


@pytest.mark.parametrize("key", ["adapter.r", "base.path", "recipe"])
def test_what_holds_other_weights_is_allowed_by_nobody(stopped, key):
    value = {"adapter.r": "2", "base.path": str(stopped.base), "recipe": "sft"}[key]
    with pytest.raises(InputError, match="cannot change within a run"):
        train(stopped.load(*SETTINGS, f"{key}={value}", "run.seed=3"), [key])
    assert key.split(".")[0] in FIXED


def test_other_rows_are_taken_only_where_data_may_change(stopped):
    config = stopped.load(*SETTINGS, "data.train_on=all")
    assert train(config, ["data.train_on"]) == 0
    assert len(losses(stopped.run_folder())) == 8


def test_a_finished_run_is_not_changed(bench):
    bench.train("train.max_steps=2")
    with pytest.raises(InputError, match="is finished; a change of train.max_steps would train"):
        train(bench.load("train.max_steps=4"), ["train.max_steps"])


def test_the_command_line_takes_the_flag_more_than_once(stopped):
    arguments = [str(stopped.config_file), *SETTINGS, "train.learning_rate=0.002", "run.seed=9"]
    flags = ["--allow-change", "train.learning_rate", "--allow-change", "run.seed"]
    assert main([*arguments, *flags]) == 0
