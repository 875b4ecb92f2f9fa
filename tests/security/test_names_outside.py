"""Names that folders and settings carry: none leads out of its folder, none ends in a trace."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from planting import forge_settings
from small_runs import write_base

from finetune.errors import InputError
from finetune.llama.weight_files import INDEX, files_by_weight

OUTSIDE = ["../base/model.safetensors", "/etc/passwd", "..", ".", "", "sub/x", "a\0b", "x" * 300]
OUTSIDE += ["~/model.safetensors", "model.safetensors/", "é" * 200, "file:///etc/passwd"]


class TestShardIndex:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        return write_base(tmp_path_factory.mktemp("sharded") / "base", max_shard_size="600KB")

    @pytest.fixture
    def sharded(self, whole, tmp_path):
        return shutil.copytree(whole, tmp_path / "sharded")

    @pytest.mark.parametrize("name", [*OUTSIDE, 3, None, ["model.safetensors"]])
    def test_a_name_that_is_no_file_of_the_folder_is_refused(self, sharded, name):
        index = sharded / INDEX
        content = json.loads(index.read_text())
        content["weight_map"][next(iter(content["weight_map"]))] = name
        index.write_text(json.dumps(content))
        with pytest.raises(InputError, match="of the same folder is allowed|are missing"):
            files_by_weight(sharded)

    def test_a_link_out_of_the_folder_gives_nothing_but_weights(self, sharded, tmp_path):
        """The hub's cache is made of such links: what they lead to is held to the same rules."""
        (tmp_path / "secret").write_text("root:x:0:0:canary")
        shard = next(sharded.glob("model-*"))
        shutil.move(shard, tmp_path / "blob")
        shard.symlink_to(tmp_path / "blob")
        assert shard in files_by_weight(sharded).values()
        shard.unlink()
        shard.symlink_to(tmp_path / "secret")
        with pytest.raises(InputError, match="not readable as safetensors") as refused:
            files_by_weight(sharded)
        assert "canary" not in str(refused.value)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    @pytest.mark.parametrize("kind", ["pipe", "device"])
    @pytest.mark.parametrize(
        "name",
        [
            *("model-00001-of-00005.safetensors", "config.json", "tokenizer.json"),
            *("tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
        ],
    )
    def test_a_file_without_an_end_is_not_read(self, bench, sharded, ended, name, kind):
        (sharded / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(sharded / name)
        else:
            (sharded / name).symlink_to("/dev/zero")
        said = ended(2, "train", bench.config_file, f"base.path={sharded}")
        assert name in said or "shards of the index are missing" in said

    def test_neither_are_settings_and_templates_without_one(self, bench, sharded, ended):
        for name in ("generation_config.json", "chat_template.jinja"):
            (sharded / name).unlink(missing_ok=True)
            (sharded / name).symlink_to("/dev/zero")
        overrides = (f"base.path={sharded}", "data.chat_format=nano", "train.max_steps=1")
        ended(0, "train", bench.config_file, *overrides)

    def test_neither_are_rows_or_a_manifest(self, bench, ended):
        for name in ("rows.jsonl", "manifest.json"):
            (bench.folder / name).symlink_to("/dev/zero")
        rows = f"data.train={bench.folder / 'rows.jsonl'}"
        assert "no regular file" in ended(2, "train", bench.config_file, rows)
        assert "no readable manifest" in ended(3, "verify", bench.folder)


class TestAdapterSettings:
    """adapter_config.json of a folder whose manifest was forged along with it."""

    def forge(self, run, **changes):
        shutil.rmtree(run.merged)
        forge_settings(run, **changes)

    @pytest.mark.parametrize(
        "name", ["../../../etc", "/etc/passwd", "a\0b", "x" * 5000, "evil/repo"]
    )
    def test_the_base_that_it_names_is_not_looked_for(self, run, ended, name):
        self.forge(run, base_model_name_or_path=name, revision=name)
        ended(0, "merge", run.path)
        ended(0, "export", run.path, "--format", "peft", "--out", run.path / "out")
        shared = json.loads((run.path / "out" / "adapter_config.json").read_text())
        assert shared["base_model_name_or_path"] in (name.rpartition("/")[2], "evil/repo")

    @pytest.mark.parametrize(
        "changes",
        [
            {"peft_type": "EVIL"},
            {"peft_type": ["LORA"]},
            {"peft_type": "XLORA", "adapters": {"0": "/tmp"}},
            {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "num_virtual_tokens": 2},
            {"r": 1 << 40},
            {"r": -1},
            {"r": "8"},
            {"lora_alpha": "x"},
            {"target_modules": 3},
            {"target_modules": ["nowhere"]},
            {"init_lora_weights": "corda"},
            {"layers_to_transform": "x"},
            {"megatron_config": {"x": 1}, "megatron_core": "antigravity"},
            {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "fly"}},
            {"use_dora": True},
            {"task_type": "EVIL"},
            {"modules_to_save": ["lm_head"]},
        ],
    )
    def test_what_does_not_fit_is_refused(self, run, ended, changes):
        self.forge(run, **changes)
        harmless = "auto_mapping" in changes
        for verb in ("merge", "eval"):
            ended([0] if harmless else [2, 3], verb, run.path)


class TestCheckpoints:
    @pytest.mark.parametrize(
        "text", ['{"step": 2, "folder": "../../../etc"}', '{"folder": "/etc"}', "[]", "3", "{}"]
    )
    def test_what_latest_names_is_not_followed(self, spoilt_bench, run, ended, text):
        """Nor is a folder taken for a checkpoint whose name has no step."""
        shutil.rmtree(run.adapter)
        run.write_state(state="interrupted", exit_code=75, reason="")
        (run.checkpoints / "latest.json").write_text(text)
        (run.checkpoints / "step-evil").mkdir()
        settings = ("train.save_steps=2", "train.logging_steps=7", f"run.dir={run.path.parent}")
        said = ended(0, "train", spoilt_bench.config_file, *settings)
        assert f"from {run.checkpoints / 'step-000004'}" in said
