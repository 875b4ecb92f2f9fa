"""A model's config.json and a recipe's strings: data, never code to import, fetch or run."""

from __future__ import annotations

import itertools
import json
import shutil
import sys

import pytest
import torch
from planting import Canary

from finetune import merge
from finetune.config.loader import load
from finetune.config.schema import KNOWN_PATHS
from finetune.errors import FinetuneError, InputError
from finetune.llama.config_json import passed_on
from finetune.model import find_base, load_model, read_architecture

KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
KERNELS += ("experts_implementation", "_experts_implementation_internal")
KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "intermediate_size", "head_dim", "rms_norm_eps", "rope_parameters"),
    *("rope_scaling", "rope_theta", "hidden_act", "tie_word_embeddings", "bos_token_id"),
    *("eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range", "use_cache"),
    *("layer_types", "id2label", "sub_configs", "text_config", "per_layer_config", "__class__"),
    *("to_dict", "output_attentions", "kernel_config", "use_kernels", "pretraining_tp"),
    *("max_position_embeddings", "attribute_map", "architectures", "_name_or_path", "model_type"),
)
VALUES = ("x", -1, 0, 1 << 70, 0.5, True, [], ["evil.Evil"], {"a": 1}, {"": "evil/kernel"}, None)


@pytest.fixture
def folder(small_base, tmp_path):
    return shutil.copytree(small_base, tmp_path / "base")


def say(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestConfigJson:
    @pytest.fixture(autouse=True)
    def _modules(self, folder, canary: Canary, monkeypatch):
        """The folder holds the code that it names, and is on the import path as well."""
        canary.plant(folder)
        (folder / "evil.py").write_text(canary.code)
        monkeypatch.syspath_prepend(str(folder))

    @pytest.mark.parametrize("value", [{"AutoModelForCausalLM": "evil.Evil"}, "evil.Evil"])
    def test_code_in_the_place_of_the_model_is_refused(self, bench, folder, ended, value):
        say(folder, auto_map=value)
        said = ended(2, "train", bench.config_file, f"base.path={folder}")
        assert "no such code is run" in said

    @pytest.mark.parametrize("key", KERNELS)
    @pytest.mark.parametrize("value", ["evil/kernel", "evil/kernel@main:f", {"": "evil/kernel"}])
    def test_a_kernel_from_the_hub_is_refused(self, folder, key, value):
        say(folder, **{key: value})
        with pytest.raises(InputError, match="names a kernel to fetch"):
            read_architecture(folder)

    @pytest.mark.parametrize("value", [{"quant_method": "gptq"}, {"load_in_4bit": True}, "evil"])
    def test_weights_in_other_codes_are_refused(self, bench, folder, ended, value):
        say(folder, quantization_config=value)
        said = ended(2, "train", bench.config_file, f"base.path={folder}")
        assert "base.quantization quantises them" in said

    def test_the_tokenizers_code_is_passed_over(self, bench, folder, ended):
        settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        ended(0, "tokenize", folder, "--text", "x")
        ended(0, "preview", bench.config_file, f"base.path={folder}")

    def test_whatever_it_says_it_is_refused_or_a_plain_llama(self, bench, folder):
        """A third of all pairs of a key and a value, through the loader that training uses."""
        config = bench.load(f"base.path={folder}").config
        whole = (folder / "config.json").read_text()
        loaded = 0
        for key, value in itertools.islice(itertools.product(KEYS, VALUES), 0, None, 3):
            (folder / "config.json").write_text(whole)
            say(folder, **{key: value})
            try:
                base = find_base(config, bench.folder / "run")
                model = load_model(base, config.base, torch.device("cpu"))
            except FinetuneError:
                continue
            loaded += 1
            assert type(model).__name__ == "LlamaForCausalLM"
            assert model.config._attn_implementation == "plumbtune_documents"
        assert loaded > 40


def test_only_what_describes_a_llama_is_passed_on(bench, folder, ended):
    say(folder, kernel_config={"x": "evil/kernel"}, _commit_hash="0", to_dict="x", _evil=1)
    run = bench.train(f"base.path={folder}", "train.max_steps=1")
    merge.merge(run)
    ended(0, "export", run.path, "--format", "hf", "--out", bench.folder / "hf")
    for made in (run.merged, bench.folder / "hf"):
        keys = json.loads((made / "config.json").read_text()).keys()
        assert keys & {"kernel_config", "_commit_hash", "to_dict", "_evil"} == set()
    assert passed_on({"attn_implementation": "evil/kernel", "auto_map": {}, "dtype": "x"}) == {
        "dtype": "x"
    }


class TestRecipeStrings:
    """A module on the import path that a string of the config names is not imported."""

    @pytest.fixture(autouse=True)
    def _module(self, tmp_path, canary, monkeypatch):
        (tmp_path / "evil.py").write_text(canary.code)
        monkeypatch.syspath_prepend(str(tmp_path))

    @pytest.mark.parametrize("value", ["evil.Evil", "evil:Evil", "evil", "os.system"])
    @pytest.mark.parametrize(
        "key",
        [
            *("recipe", "base.dtype", "base.quantization", "adapter.method", "adapter.init"),
            *("data.chat_format", "data.on_overflow", "data.train_on", "train.optim"),
            *("train.lr_scheduler_type", "train.report_to", "eval.tasks", "run.seed"),
        ],
    )
    def test_where_a_name_is_asked_for_another_is_refused(self, bench, key, value):
        with pytest.raises(InputError, match=key):
            load(bench.config_file, [f"{key}={value}"])

    @pytest.mark.parametrize("value", ["evil.Evil", "!!python/object/apply:os.system [ls]"])
    def test_no_setting_imports_anything(self, bench, value):
        for key in KNOWN_PATHS:
            try:
                load(bench.config_file, [f"{key}={value}"])
            except InputError:
                continue
        assert "evil" not in sys.modules

    def test_a_yaml_object_is_refused_and_not_made(self, bench, canary, ended):
        text = bench.config_file.read_text()
        for tag in ("object/apply:exec", "object/new:exec", "name:os.system", "module:evil"):
            bench.config_file.write_text(
                f"{text}\nextra: !!python/{tag} [{json.dumps(canary.code)}]\n"
            )
            assert "found the tag !!python/" in ended(2, "train", bench.config_file)


class TestShell:
    """CVE-2024-52803: the output folder's name went to a shell."""

    @pytest.mark.parametrize("form", ["x; touch {}", "$(touch {})", "`touch {}`", "x\n touch {} #"])
    def test_a_folder_may_have_any_name(self, bench, canary, ended, monkeypatch, form):
        monkeypatch.chdir(bench.folder)
        name = form.format("canary")
        ended(0, "train", bench.config_file, f"run.dir={json.dumps(name)}", "train.max_steps=1")
        assert (bench.folder / name / "small" / "adapter").is_dir()
        ended(0, "eval", bench.folder / name / "small")
        assert not (bench.folder / "canary").exists()

    def test_a_run_may_not(self, bench, ended):
        said = ended(2, "train", bench.config_file, "run.name='x; touch canary'")
        assert "run.name" in said
