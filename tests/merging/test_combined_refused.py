"""Adapters that are not combined, and combinations that the proof refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from small_runs import flip_bit, republish

from finetune.merging.combine import Combined
from finetune.run_folder import RunFolder


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--add=WHERE"], "expected PATH:WEIGHT"),
            (["--add=WHERE:"], "expected PATH:WEIGHT"),
            (["--add=WHERE:half"], "expected PATH:WEIGHT"),
            (["--add=WHERE:0"], "a number other than 0"),
            (["--add=WHERE:nan"], "a number other than 0"),
            (["--add=WHERE:inf"], "a number other than 0"),
            (["--add=:1"], "expected PATH:WEIGHT"),
            (["--add=/nowhere:1"], "has no adapter_config.json, adapter_model.safetensors"),
            (["--weight=0"], "--weight: found 0, allowed is any number but 0"),
            (["--add=WHERE:1", "--combine=ties"], "--density: none given"),
            (["--add=WHERE:1", "--combine=ties", "--density=0"], "--density: found 0;"),
            (["--add=WHERE:1", "--combine=dare_ties", "--density=1.1"], "--density: found 1.1"),
            (["--add=WHERE:1", "--combine=ties", "--density=nan"], "--density: found nan"),
            (["--add=WHERE:1", "--density=0.5"], "no effect on --combine cat"),
            (["--add=WHERE:1", "--combine=ties", "--density=0.5", "--seed=1"], "--seed: has no"),
            (["--combine=cat"], "--combine: has no effect without --add"),
            (["--density=0.5", "--seed=1"], "--density, --seed: has no effect without --add"),
        ],
    )
    def test_what_cannot_be_asked_for(self, make, merged, options, words):
        where = str(make("two").path)
        error = merged("one", *(option.replace("WHERE", where) for option in options), code=2)
        assert words in error

    def test_all_findings_at_once(self, make, merged):
        error = merged("one", "--weight=0", "--add=a:b", "--add=c:1", "--combine=ties", code=2)
        assert error.count("\n  - ") == 4

    @pytest.mark.parametrize(
        ("other", "options", "words"),
        [
            ("dora", (), "DoRA divides the rows by norms"),
            ("loha", (), "LOHA as it is set is no product of two matrices"),
            ("rank 6", ("--combine=linear",), "rank 4 in one, 6 in rank-6 (4 such matrices)"),
            ("pissa", ("--combine=ties", "--density=1"), "rank 4 in one, 8 in pissa"),
            ("nf4", (), "quantization nf4, one on none; --base full"),
        ],
    )
    def test_adapters_that_are_not_added(self, merged, other, options, words):
        assert words in merged("one", *options, add=[(other, 1)], code=2)

    def test_the_runs_own_adapter_is_asked_too(self, merged):
        assert "DoRA divides" in merged("dora", add=[("one", 1)], code=2)

    def test_the_same_adapter_twice(self, make, merged, tmp_path):
        alone = shutil.copytree(make("one").adapter, tmp_path / "mine")
        assert "is the same adapter as" in merged("one", f"--add={alone}:1", code=2)
        assert "is the same adapter as" in merged("one", add=[("two", 1), ("two", 1)], code=2)

    def test_an_adapter_of_another_base(self, merged, make):
        error = merged("one", f"--add={make('two', 'untied').path}:1", code=3)
        assert "was trained on a base with fingerprint" in error

    def test_all_that_differs_of_the_base_is_named(self, make, merged, tmp_path):
        other = RunFolder(shutil.copytree(make("two").path, tmp_path / "two"))
        changes = {"vocab_size": 1025, "tokenizer_sha256": "e" * 64, "chat_format_sha256": "d" * 64}
        republish(other.adapter, **changes)
        error = merged("one", f"--add={other.path}:1", code=3)
        for words in ("vocabulary of 1025 ids; this base has 1024", "tokenizer", "prompt format"):
            assert words in error

    def test_an_adapter_of_plain_text_has_no_prompt_format_to_differ(self, make, merged, tmp_path):
        other = RunFolder(shutil.copytree(make("two").path, tmp_path / "two"))
        republish(other.adapter, chat_format=None, chat_format_sha256=None)
        merged("one", f"--add={other.path}:1")

    def test_an_adapter_that_nobody_vouches_for(self, make, merged, tmp_path):
        alone = shutil.copytree(make("two").adapter, tmp_path / "mine")
        (alone / "manifest.json").unlink()
        assert "nothing says which base" in merged("one", f"--add={alone}:1", code=3)

    @pytest.mark.parametrize("damage", ["bit", "alpha"])
    def test_a_damaged_or_edited_adapter(self, make, merged, tmp_path, damage):
        other = RunFolder(shutil.copytree(make("two").path, tmp_path / "two"))
        if damage == "bit":
            flip_bit(other.adapter / "adapter_model.safetensors")
        else:
            file = other.adapter / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 9}))
        words = (
            "adapter_model.safetensors" if damage == "bit" else "lora_alpha is 9, trained with 8"
        )
        assert words in merged("one", f"--add={other.path}:1", code=3)


class TestProof:
    """A combination that is wrong is not published."""

    MUTATIONS = {
        "one weight for all": lambda c: dataclasses.replace(c, weights=(c.weights[0],) * 2),
        "weights swapped": lambda c: dataclasses.replace(c, weights=c.weights[::-1]),
        "one is left out": lambda c: dataclasses.replace(
            c, updates=c.updates[:1], weights=c.weights[:1]
        ),
        "another seed": lambda c: dataclasses.replace(
            c, combination=dataclasses.replace(c.combination, seed=9)
        ),
        "another density": lambda c: dataclasses.replace(
            c, combination=dataclasses.replace(c.combination, density=0.5)
        ),
        "another way": lambda c: dataclasses.replace(
            c, combination=dataclasses.replace(c.combination, how="dare_linear")
        ),
    }

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", MUTATIONS)
    def test_a_wrong_combination(self, merged, monkeypatch, name, dtype):
        right = Combined.factors
        monkeypatch.setattr(Combined, "factors", lambda c: right(self.MUTATIONS[name](c)))
        options = ["--combine=dare_ties", "--density=0.6", f"--dtype={dtype}"]
        error = merged("one", *options, add=[("two", 0.5)], code=3)
        assert "the merge proof failed, nothing is published" in error

    @pytest.mark.parametrize("name", ["one weight for all", "weights swapped", "one is left out"])
    def test_a_wrong_sum(self, merged, monkeypatch, name):
        right = Combined.factors
        monkeypatch.setattr(Combined, "factors", lambda c: right(self.MUTATIONS[name](c)))
        error = merged("one", add=[("two", 0.5)], code=3)
        assert "the merge proof failed, nothing is published" in error

    def test_interrupted_it_leaves_nothing(self, merged, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        right = Combined.apply
        seen = []

        def apply(update, weight, dtype):
            seen.append(update.module)
            return interrupted() if len(seen) == 5 else right(update, weight, dtype)

        monkeypatch.setattr(Combined, "apply", apply)
        assert "interrupted" in merged("one", add=[("two", 0.5)], code=75)
