"""Files that write a canary if anything ever runs them, and settings that verify though forged."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from small_runs import republish

from finetune import artifact
from finetune.run_folder import RunFolder

PICKLES = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "adapter_model.bin", "adapter.pt"),
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"),
    *("rng_state_0.pth", "random_states_0.pkl", "training_args.bin", "model.pth", "model.pt"),
    *("model.ckpt", "consolidated.00.pth", "value_head.bin", "vhead_file.bin", "weights.mdl"),
    *("tokenizer.pkl", "data.pkl", "cache.joblib", "corda_cache.pt", "flax_model.msgpack"),
)
MODULES = (
    *("modeling_llama.py", "configuration_llama.py", "tokenization_llama.py", "__init__.py"),
    *("custom_generate/generate.py", "sitecustomize.py", "conftest.py", "setup.py", "handler.py"),
)


class Canary:
    """A file that must never be there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = f"open({str(path)!r}, 'w').close()"

    def __reduce__(self):
        return exec, (self.code,)

    @property
    def sings(self) -> bool:
        return self.path.exists()

    def pickle(self, path: Path, kind: int) -> Path:
        """A plain pickle, torch's zip, or torch's format of before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == 0:
            path.write_bytes(pickle.dumps({"a.weight": self}, protocol=4))
        else:
            torch.save({"a.weight": self}, path, _use_new_zipfile_serialization=kind == 1)
        return path

    def plant(self, folder: Path) -> set[str]:
        """Every kind of file, under every name; returns the names."""
        for number, name in enumerate(PICKLES):
            self.pickle(folder / name, number % 3)
        for name in MODULES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(self.code)
        return {*PICKLES, *MODULES}


def forge_settings(run: RunFolder, **changes: Any) -> None:
    """Changes adapter_config.json, and the manifest so that it verifies."""
    path = run.adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings))
    facts = {"adapter_config": settings}
    republish(run.adapter, **facts, adapter_config_sha256=artifact.sha256_of_json(settings))
