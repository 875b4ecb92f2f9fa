"""An adapter knows its base: on anything else it is refused, and what differs is named."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import Bench, republish

from finetune import artifact
from finetune.adapters import load_adapter
from finetune.errors import CheckFailed, exit_code_of
from finetune.identity import ADAPTER_FILES, LIBRARIES, tokenizer_hash
from finetune.inference import open_variant
from finetune.model import find_base, load_model
from finetune.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_base):
    return Bench(tmp_path_factory.mktemp("trained"), small_base).train("train.max_steps=1")


@pytest.fixture
def run(trained, tmp_path):
    """A copy to damage."""
    return RunFolder(shutil.copytree(trained.path, tmp_path / "copy"))


def base_of(run):
    return find_base(run.config(), run.path)


def refusal(run, **changes) -> str:
    """What is said where the base's identity differs in one thing."""
    base, config = base_of(run), run.config()
    model = load_model(base, config.base, torch.device("cpu"))
    with pytest.raises(CheckFailed) as caught:
        load_adapter(model, run.adapter, dataclasses.replace(base.identity(), **changes))
    assert exit_code_of(caught.value) == 3
    return str(caught.value)


def test_the_manifest_names_everything_the_adapter_depends_on(trained):
    facts = artifact.verify(trained.adapter)["facts"]
    identity = base_of(trained).identity()
    assert facts | identity.facts() == facts
    settings = json.loads((trained.adapter / ADAPTER_FILES[0]).read_text())
    assert facts["adapter_config"] == settings
    assert facts["adapter_config_sha256"] == artifact.sha256_of_json(settings)
    assert set(facts["libraries"]) == set(LIBRARIES)
    assert facts["vocab_size"] == 1024
    assert settings["base_model_name_or_path"] == facts["base"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "f" * 64}, "base with fingerprint"),
        ({"vocab_size": 1025}, "vocabulary of 1024 ids; this base has 1025"),
        ({"tokenizer_sha256": "e" * 64}, "tokenizer of sha256"),
        ({"chat_format_sha256": "d" * 64}, "prompt format of sha256"),
        ({"fingerprint": "f" * 64, "merged_adapters": ("a",)}, "another adapter is in it"),
    ],
)
def test_another_base_is_refused_with_what_differs(run, change, words):
    assert words in refusal(run, **change)


def test_everything_that_differs_is_named_at_once(run):
    text = refusal(run, fingerprint="f" * 64, vocab_size=7, tokenizer_sha256="e" * 64)
    assert [word for word in ("fingerprint", "vocabulary", "tokenizer") if word in text] == [
        "fingerprint",
        "vocabulary",
        "tokenizer",
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("lora_alpha", 9), ("r", 5), ("use_rslora", True), ("target_modules", ["x"])]
)
@pytest.mark.parametrize("republished", [False, True])
def test_edited_settings_are_named_with_both_values(run, key, value, republished):
    path = run.adapter / ADAPTER_FILES[0]
    settings = json.loads(path.read_text())
    trained_with = settings[key]
    path.write_text(json.dumps(settings | {key: value}))
    if republished:  # files and manifest agree; the settings are still not those of training
        republish(run.adapter)
    with pytest.raises(CheckFailed) as caught:
        open_variant(run, "adapter")
    assert f"{key} is {value!r}, trained with {trained_with!r}" in str(caught.value)


@pytest.mark.parametrize("edit", ["missing", "extra"])
def test_keys_that_are_missing_or_too_many(run, edit):
    weights = run.adapter / ADAPTER_FILES[1]
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    if edit == "missing":
        del tensors[name]
    else:
        name = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"
        tensors[name] = torch.zeros(4, 4)
    save_file(tensors, weights, {"format": "pt"})
    republish(run.adapter)
    with pytest.raises(CheckFailed, match="1 adapter keys missing or unexpected") as caught:
        open_variant(run, "adapter")
    assert name in str(caught.value)


def test_the_hash_of_a_tokenizer_is_of_what_it_does(trained, nano_tokenizer):
    tokenizer = base_of(trained).tokenizer
    before = tokenizer_hash(tokenizer)
    tokenizer("a", padding="max_length", truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["<|new|>"])
    assert tokenizer_hash(tokenizer) != before


def test_another_tokenizer_beside_the_same_weights(run, tmp_path, small_base):
    other = shutil.copytree(small_base, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(content))
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace(str(small_base), str(other)))
    with pytest.raises(CheckFailed, match="tokenizer of sha256"):
        open_variant(run, "adapter")
