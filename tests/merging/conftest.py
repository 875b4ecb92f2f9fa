"""Small runs, trained once for many tests, and their merges through the command line."""

from __future__ import annotations

import json
import re

import pytest
from small_runs import Bench

from finetune.__main__ import main
from finetune.run_folder import RunFolder

PATTERNS = ("adapter.rank_pattern={down_proj: 3}", "adapter.alpha_pattern={v_proj: 5}")
# Name: settings of the run, its seed.
RUNS = {
    "one": (),
    "two": ("run.seed=5", "train.learning_rate=0.02"),
    "three": ("run.seed=6",),
    "patterns": ("run.seed=7", *PATTERNS),
    "patterns too": ("run.seed=8", *PATTERNS),
    "rank 6": ("run.seed=9", "adapter.r=6", "adapter.target_modules=[q_proj, up_proj]"),
    "few": ("run.seed=14", "adapter.target_modules=[k_proj, down_proj]"),
    "rslora": ("run.seed=10", "adapter.use_rslora=true"),
    "layer 1": ("run.seed=11", "adapter.layers=1"),
    "pissa": ("run.seed=12", "adapter.init=pissa"),
    "olora": ("run.seed=12", "adapter.init=olora"),
    "lora+": ("run.seed=13", "adapter.method=lora+", "adapter.loraplus_lr_ratio=4"),
    "dora": ("adapter.method=dora",),
    "loha": ("adapter.method=loha",),
    "nf4": ("base.quantization=nf4",),
    "nf4 too": ("base.quantization=nf4", "run.seed=5"),
}


@pytest.fixture(scope="module", autouse=True)
def _small_layers(one_thread):
    """Of every test here."""


@pytest.fixture(scope="module")
def make(tmp_path_factory, small_base, untied_base):
    """`make("two")`: a finished run of RUNS, trained once."""
    made = {}
    bases = {"tied": small_base, "untied": untied_base}

    def build(name, kind="tied") -> RunFolder:
        if "nf4" in name:
            pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
        if (name, kind) not in made:
            bench = Bench(tmp_path_factory.mktemp("run"), bases[kind])
            overrides = ("train.max_steps=3", f"run.name={re.sub('[ +]', '-', name)}", *RUNS[name])
            made[name, kind] = bench.train(*overrides)
        return made[name, kind]

    return build


@pytest.fixture
def merged(make, tmp_path, capsys):
    """`merged("one", "--weight", "2", add=[("two", 0.5)])`: folder and merge.json."""

    def run(name, *options, add=(), kind="tied", code=0):
        added = [f"--add={make(other, kind).path}:{weight}" for other, weight in add]
        command = ["merge", str(make(name, kind).path), "--out", str(tmp_path / "out" / "merged")]
        assert main([*command, *added, *options]) == code
        if code:
            assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
            return capsys.readouterr().err
        record = json.loads((tmp_path / "out" / "merge.json").read_text())
        return tmp_path / "out" / "merged", record

    return run
