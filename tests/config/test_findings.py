"""Every kind of wrong config: one message with the place, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config import RunConfig
from finetune.config.loader import load
from finetune.config.schema import SECTIONS
from finetune.errors import InputError

GOOD = """\
recipe: sft
base:
  path: some/folder/of/mine
data:
  train: rows.jsonl
"""


def findings_of(path: Path, text: str, *overrides: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load(path, overrides)
    return error.value.findings


def only_finding(tmp_path: Path, *overrides: str, text: str = GOOD) -> str:
    findings = findings_of(tmp_path / "x.yaml", text, *overrides)
    assert len(findings) == 1, findings
    return findings[0]


def test_the_good_config_is_good(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    assert load(path).config.data.train[0].path == "rows.jsonl"


def test_unknown_key_has_line_value_hint_and_alternatives(tmp_path):
    path = tmp_path / "x.yaml"
    [finding] = findings_of(path, GOOD + "adapter:\n  rank: 16\n")
    allowed = ", ".join(SECTIONS["adapter"].model_fields)
    assert finding == (
        f"{path}:7 adapter.rank: unknown key (found 16); did you mean adapter.r? allowed: {allowed}"
    )
    assert allowed.startswith("method, r, lora_alpha, lora_dropout, use_rslora, ")


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.lr=1e-4", "train.learning_rate"),
        ("train.learning_rat=1e-4", "train.learning_rate"),
        ("adapter.lora_alfa=1", "adapter.lora_alpha"),
        ("train.seed=1", "run.seed"),
        ("data.max_seq_length=1", "data.max_length"),
        ("trian.optim=sgd", "train"),
        ("model.path=x", "base.path"),
    ],
)
def test_did_you_mean(tmp_path, override, meant):
    assert f"did you mean {meant}?" in only_finding(tmp_path, override)


def test_no_hint_where_nothing_is_near(tmp_path):
    assert "did you mean" not in only_finding(tmp_path, "train.zzzz=1")


@pytest.mark.parametrize(
    ("override", "found", "allowed"),
    [
        ("adapter.r='16'", "'16'", "a whole number >= 1 and <= 4096"),
        ("adapter.r=1.5", "1.5", "a whole number"),
        ("adapter.r=true", "true", "a whole number"),
        ("adapter.r=0", "0", ">= 1"),
        ("adapter.r=null", "null", "a whole number"),
        ("adapter.lora_dropout=1", "1", "a number >= 0 and < 1"),
        ("adapter.use_rslora=1", "1", "true or false"),
        ("adapter.use_rslora=yes", "'yes'", "true or false"),
        ("adapter.method=qlora", "'qlora'", "lora, dora"),
        ("base.dtype=auto", "'auto'", "float32, bfloat16, float16"),
        ("base.path=7", "7", "text that is not empty or null"),
        ("data.train=[]", "", "a .json or .jsonl file"),
        ("data.train=7", "7", "a mapping {path, format, weight, split, revision, columns}"),
        ("data.train={path: a, formt: x}", "", "path, format, weight, split, revision, columns"),
        ("data.train=[{path: a, formt: x}]", "", "path, format, weight, split, revision, columns"),
        ("data.train={format: text}", "", "text that is not empty"),
        (
            "data.train=[a.jsonl, {path: b.jsonl, format: xml}]",
            "'xml'",
            "auto, alpaca, messages",
        ),
        ("data.heldout_fraction=1.5", "1.5", "a number > 0 and < 1"),
        ("data.max_length=inf", "'inf'", "a whole number"),
        ("train.learning_rate=.inf", "inf", "a number > 0 and <= 1"),
        ("train.learning_rate=.nan", "nan", "a number"),
        ("train.learning_rate=fast", "'fast'", "a number"),
        ("train.max_steps=0", "0", "a whole number >= 1 or null"),
        ("train.lr_scheduler_type=cosin", "'cosin'", "linear, cosine"),
        ("train.bf16=maybe", "'maybe'", "auto or true or false"),
        ("train.save_total_limit=1", "1", ">= 2"),
        ("eval.tasks=mmlu", "'mmlu'", "exact_match"),
        ("run.name=a/b", "'a/b'", "letters, digits"),
        ("run.seed=-1", "-1", ">= 0"),
        ("recipe=dpo", "'dpo'", "sft, pretrain"),
        ("recipe=[]", "[]", "sft, pretrain"),
        ("train=3", "3", "a mapping of num_train_epochs"),
    ],
)
def test_wrong_values(tmp_path, override, found, allowed):
    finding = only_finding(tmp_path, override)
    key = override.partition("=")[0]
    assert finding.startswith(f"override {key}")
    if found:
        assert f"found {found}" in finding
    assert allowed in finding.partition("allowed: ")[2]


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        (["base.architecture=llama3-8b"], "base.tokenizer", "brings no tokenizer"),
        (["base.path=null"], "base.path", "missing; allowed: a hub id"),
        (["base.architecture={dim: 7}", "base.tokenizer=t"], "base.architecture", "missing"),
        (["base.architecture=llama9", "base.tokenizer=t"], "base.architecture", "known: llama1"),
        (
            ["base.path=a/b", "base.architecture=llama3-8b", "base.tokenizer=t"],
            "base.path",
            "exactly one",
        ),
        (["base.revision=main"], "base.revision", "no effect where base.path is not a hub id"),
        (["adapter.method=none", "adapter.r=8"], "adapter.r", "no effect without an adapter"),
        (["adapter.method=none", "base.quantization=nf4"], "base.quantization", "allowed: none"),
        (["adapter.target_modules=[q_proj, lm_head]"], "adapter.target_modules", "lm_head cannot"),
        (["adapter.target_modules=embed_tokens"], "adapter.target_modules", "embed_tokens cannot"),
        (["adapter.target_modules=[q_proj, q_proj]"], "adapter.target_modules", "each once"),
        (["adapter.target_modules=[]"], "adapter.target_modules", "at least one"),
        (["recipe=pretrain", "data.chat_format=llama3"], "data.chat_format", "no effect on plain"),
        (["recipe=pretrain", "data.train_on=all"], "data.train_on", "no effect on plain text"),
        (["recipe=pretrain", "data.train={path: a, format: alpaca}"], "data.train", "auto, text"),
        (["data.train={path: a, format: text}"], "data.train", "prompt_completion"),
        (["data.on_overflow=split"], "data.on_overflow", "allowed: drop, error"),
        (["data.heldout=h", "data.heldout_fraction=0.1"], "data.heldout_fraction", "at most one"),
        (["data.heldout=./rows.jsonl"], "data.heldout", "in data.train as well"),
        (["data.train={path: a, columns: {quest: q}}"], "data.train", "allowed: instruction"),
        (["train.max_steps=3", "train.num_train_epochs=1"], "train.max_steps", "exactly one"),
        (["train.eval_steps=5"], "train.eval_steps", "no effect without held-out rows"),
        (["train.eval_on_start=true"], "train.eval_on_start", "no effect without held-out rows"),
        (
            ["data.heldout=h", "train.load_best_model_at_end=true"],
            "train.load_best_model_at_end",
            "no effect without train.eval_steps",
        ),
        (
            ["data.heldout=h", "train.early_stopping_patience=2"],
            "train.early_stopping_patience",
            "no effect without train.eval_steps",
        ),
        (
            ["data.heldout=h", "train.eval_steps=5", "train.early_stopping_threshold=0.1"],
            "train.early_stopping_threshold",
            "no effect without train.early_stopping_patience",
        ),
        (["eval.max_new_tokens=5"], "eval.max_new_tokens", "no effect without a task"),
        (["recipe=pretrain", "eval.tasks=exact_match"], "eval.tasks", "no effect on plain text"),
        (["train.optim=sgd", "train.adam_beta1=0.8"], "train.adam_beta1", "no effect with"),
        (["train.lr_scheduler_kwargs={power: 2}"], "train.lr_scheduler_kwargs", "num_cycles"),
        (["train.lr_scheduler_type=cosine_with_min_lr"], "train.lr_scheduler_kwargs", "min_lr_ra"),
        (["train.lr_scheduler_type=warmup_stable_decay"], "train.lr_scheduler_kwargs", "needs num"),
        (
            ["train.lr_scheduler_type=constant", "train.warmup_steps=5"],
            "train.warmup_steps",
            "constant_with_warmup",
        ),
        (["base.dtype=float16", "train.bf16=true"], "train.bf16", "allowed: auto, false"),
        (["base.dtype=float16", "adapter.method=none"], "base.dtype", "float32, bfloat16"),
        (
            ["base.path=meta-llama/Llama-2-7b-hf", "data.max_length=5000"],
            "data.max_length",
            "at most 4096",
        ),
    ],
)
def test_impossible_combinations(tmp_path, overrides, where, words):
    finding = only_finding(tmp_path, *overrides)
    assert f" {where}: " in finding
    assert words in finding


def test_everything_wrong_is_found_at_once(tmp_path):
    path = tmp_path / "x.yaml"
    text = (
        "recipe: sft\n"
        "base:\n"
        "  quantization: nf4\n"
        "adapter:\n"
        "  method: none\n"
        "data:\n"
        "  train: a.jsonl\n"
        "  train: b.jsonl\n"
        "  max_length: long\n"
        "modle: x\n"
    )
    findings = findings_of(path, text, "train.lr=1", "nonsense", "eval.tasks=[x]")
    places = {finding.partition(": ")[0] for finding in findings}
    assert places == {
        f"{path}:8 data.train",
        "override 'nonsense'",
        f"{path}:10 modle",
        f"{path}:9 data.max_length",
        "override train.lr",
        "override eval.tasks.0",
        f"{path}:3 base.quantization",
        f"{path}:2 base.path",
    }


def test_a_wrong_setting_does_not_cause_a_second_finding(tmp_path):
    finding = only_finding(tmp_path, "adapter.method=qlora", "adapter.r=8")
    assert "adapter.method" in finding


def test_an_empty_file_lacks_what_is_needed(tmp_path):
    path = tmp_path / "x.yaml"
    findings = findings_of(path, "")
    assert [finding.split(": ")[0] for finding in findings] == [
        f"{path} recipe",
        f"{path} base.path",
        f"{path} data.train",
    ]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_file_that_cannot_be_read(tmp_path, make):
    path = tmp_path / "x.yaml"
    make(path)
    with pytest.raises(InputError) as error:
        load(path, ["train.max_steps=3"])
    assert len(error.value.findings) == 1
    assert str(path) in str(error.value)


def test_a_config_put_together_in_python_is_checked_too():
    with pytest.raises(ValueError, match="base.path: missing"):
        RunConfig(recipe="sft", data={"train": "a.jsonl"})
