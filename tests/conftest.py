"""What many tests share: the embedded tokenizer, a tiny Llama, the real files beside the clone."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FINETUNE_SHARED", REPOSITORY.parent / "shared"))
NANO = REPOSITORY / "assets" / "llama-nano"

CONFIG = """\
recipe: {recipe}
run: {{name: test, dir: {dir}}}
base:
  architecture: {{dim: 64, n_layers: 1, n_heads: 4, vocab_size: 1024, context: 8192}}
  tokenizer: {tokenizer}
data:
  train: {train}
train: {{max_steps: 1}}
"""


def pytest_configure() -> None:
    """Workers of pytest-xdist get a core each: models this small lose by a second thread."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


def pytest_collection_finish() -> None:
    _keep_imported()


@pytest.fixture(autouse=True)
def _collects_little():
    """The trainer is imported by the first test that trains: see `_keep_imported`."""
    known = "trl" in sys.modules
    yield
    if not known and "trl" in sys.modules:
        _keep_imported()


def _keep_imported() -> None:
    """Takes what is alive out of the garbage collector's sight.

    Every training starts with `gc.collect()` (accelerate), which walks through half a million
    objects of torch, transformers and pytest: a fifth of the time of a run of three steps.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What tests prepare and convert is kept for the session, and not in the user's cache."""
    before = os.environ.get("FINETUNE_CACHE")
    os.environ["FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["FINETUNE_CACHE"]
    else:
        os.environ["FINETUNE_CACHE"] = before


@pytest.fixture(autouse=True)
def _stays_offline():
    """A test that names a hub id lifts the package's offline mode for its process: the next test
    would wait for a network that is not there."""
    yield
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_OFFLINE = True
    if config := sys.modules.get("datasets.config"):
        config.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("tokenizers/llama2/tokenizer.model")`: the path, or a skip naming it."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{path} is not here; FINETUNE_SHARED names the folder that holds it")
        return path

    return find


@pytest.fixture(scope="session")
def nano_tokenizer():
    """The tokenizer of the embedded base: 1,024 ids."""
    from finetune.llama.tokenizer import load_tokenizer

    return load_tokenizer(NANO / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny_llama():
    """`tiny_llama("llama3-8b")`: a random Llama of that shape in small, in evaluation mode.

    Its weights are five times the usual size, so that attention is far from uniform and a token
    seen or not seen moves the logits. Copy it before changing it: a name gives one object.
    """
    import functools

    import torch
    from transformers import LlamaForCausalLM

    from finetune.fast.attention import register
    from finetune.llama.architecture import PRESETS, scaled_down, to_llama_config

    @functools.cache
    def build(preset: str = "llama3-8b", attention: str | None = None) -> LlamaForCausalLM:
        config = to_llama_config(scaled_down(PRESETS[preset], 1024))
        config.initializer_range *= 5
        config._attn_implementation = attention or register()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    return build


@pytest.fixture
def config_of(tmp_path):
    """`config_of(train_file, "data.max_length=64")`: a RunConfig on the embedded tokenizer."""
    from finetune.config.loader import load

    def build(train: Path, *overrides: str, recipe: str = "sft"):
        file = tmp_path / "config.yaml"
        places = {"dir": tmp_path, "tokenizer": NANO / "tokenizer.model", "train": train}
        file.write_text(CONFIG.format(recipe=recipe, **places))
        return load(file, overrides).config

    return build


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """The folder of a small random base with tied embeddings; copy it before changing it."""
    from small_runs import write_base

    return write_base(tmp_path_factory.mktemp("bases") / "tied")


@pytest.fixture(scope="session")
def untied_base(tmp_path_factory):
    """The same without tying (Llama 3 8B's shape)."""
    from small_runs import write_base

    return write_base(tmp_path_factory.mktemp("bases") / "untied", "llama3-8b")


@pytest.fixture
def bench(tmp_path, small_base):
    """A folder with a few rows and a config, from which small runs are made: `bench.train(…)`."""
    from small_runs import Bench

    return Bench(tmp_path, small_base)


@pytest.fixture(scope="module")
def one_thread():
    """Layers of 64 columns: threads that wait for each other take most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small_base, untied_base):
    """`trained("dora", "untied", "bfloat16")`: three steps of a case of the methods' contract,
    trained once for all tests."""
    from method_cases import CASES, train_case

    made = {}
    bases = {"tied": small_base, "untied": untied_base}

    def build(name, kind="tied", dtype="float32"):
        if CASES[name].quantized != "none":
            pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
        if (name, kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("case")
            made[name, kind, dtype] = train_case(folder, bases[kind], CASES[name], dtype)
        return made[name, kind, dtype]

    return build
