"""The methods under contract: settings of each, and a run of three steps with what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from small_runs import Bench, trainer_of
from transformers import AutoModelForCausalLM

from finetune import stages
from finetune.config.adapter import SETTINGS, AdapterSection
from finetune.data import load_data
from finetune.data_starts import StartInputs
from finetune.methods import why_not_merged
from finetune.model import find_base
from finetune.run_folder import RunFolder

IDS = torch.arange(3, 60).unsqueeze(0)


@dataclass(frozen=True)
class Case:
    """A method under some settings.

    Attributes:
        overrides: of the config, where r is 4 and lora_alpha 8 if the method has them.
        starts_as_base: whether the logits at step 0 are the base's bit for bit; None where they
            are others by design: random vectors before the text, or LoftQ's correction.
        quantized: storage of the base.
    """

    overrides: tuple[str, ...] = ()
    starts_as_base: bool | None = True
    quantized: str = "none"

    @property
    def adapter_values(self) -> dict[str, Any]:
        """The adapter section; r and lora_alpha only where the method has them."""
        given = {}
        for override in self.overrides:
            key, _, value = override.partition("=")
            if key.startswith("adapter."):
                given[key.removeprefix("adapter.")] = yaml.safe_load(value)
        known = SETTINGS[given.get("method", "lora")]
        return {k: v for k, v in {"r": 4, "lora_alpha": 8}.items() if k in known} | given


UNPACKED = ("data.packing=false", "adapter.num_virtual_tokens=5")
CASES = {
    "lora": Case(),
    "lora patterns": Case(
        (
            "adapter.rank_pattern={down_proj: 3, 'layers.1.self_attn.q_proj': 6}",
            "adapter.alpha_pattern={v_proj: 5}",
        )
    ),
    "lora layers": Case(("adapter.layers=1",)),
    "lora gaussian": Case(("adapter.init=gaussian",)),
    "rslora": Case(("adapter.use_rslora=true",)),
    "pissa": Case(("adapter.init=pissa",), starts_as_base=False),
    "pissa rslora": Case(
        ("adapter.init=pissa", "adapter.use_rslora=true", "adapter.rank_pattern={v_proj: 2}"),
        starts_as_base=False,
    ),
    "olora": Case(("adapter.init=olora",), starts_as_base=False),
    "corda": Case(("adapter.init=corda",), starts_as_base=False),
    "eva": Case(("adapter.init=eva",)),
    "loftq": Case(("adapter.init=loftq",), starts_as_base=None, quantized="nf4"),
    "dora": Case(("adapter.method=dora",)),
    "dora rslora": Case(("adapter.method=dora", "adapter.use_rslora=true")),
    "qlora nf4": Case(quantized="nf4"),
    "qlora fp4": Case(quantized="fp4"),
    "qlora int8": Case(quantized="int8"),
    "qdora nf4": Case(("adapter.method=dora",), quantized="nf4"),
    "qdora fp4": Case(("adapter.method=dora",), quantized="fp4"),
    "lora+": Case(("adapter.method=lora+", "adapter.loraplus_lr_ratio=4")),
    "adalora": Case(
        ("adapter.method=adalora", "adapter.init_r=6", "adapter.target_r=5", "adapter.tfinal=1")
    ),
    "vera": Case(("adapter.method=vera", "adapter.r=32")),
    "loha": Case(("adapter.method=loha",)),
    "lokr": Case(("adapter.method=lokr",)),
    "lokr product": Case(("adapter.method=lokr", "adapter.r=2")),
    "oft": Case(("adapter.method=oft", "adapter.oft_block_size=16")),
    "ia3": Case(("adapter.method=ia3", "train.learning_rate=0.05")),
    "miss": Case(("adapter.method=miss",)),
    "boft": Case(("adapter.method=boft",)),
    "hra": Case(("adapter.method=hra",), starts_as_base=False),
    "ln_tuning": Case(("adapter.method=ln_tuning", "train.learning_rate=0.05")),
    "trainable_tokens": Case(
        ("adapter.method=trainable_tokens", "adapter.token_indices=[3, 5, 9, 20]")
    ),
    "prompt_tuning": Case(
        ("adapter.method=prompt_tuning", *UNPACKED, "train.learning_rate=0.1"), starts_as_base=None
    ),
    "prefix_tuning": Case(
        ("adapter.method=prefix_tuning", *UNPACKED, "train.activation_checkpointing=false"),
        starts_as_base=None,
    ),
}
MERGED = [
    name
    for name, case in CASES.items()
    if case.quantized == "none"
    and not why_not_merged(AdapterSection.model_validate(case.adapter_values))
]


def plain(folder: Path, dtype: str = "float32") -> Any:
    """The base through transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def logits(model: Any) -> torch.Tensor:
    """(tokens, vocabulary) logits of a fixed text, float32."""
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0].float()


def attached(run: RunFolder, base: Path, dtype: str = "float32") -> Any:
    """The published adapter through plain PEFT."""
    return PeftModel.from_pretrained(plain(base, dtype), run.adapter).eval()


def inputs_of(run: RunFolder) -> StartInputs:
    """What the initialisation of a run could look at."""
    config = run.config()
    base = find_base(config, run.path)
    data = load_data(config, base.tokenizer, base.chat_format)
    return stages.start_inputs(config, base, data)


@dataclass
class Trained:
    """A finished run of three steps.

    Attributes:
        run: its folder; the adapter is published.
        base: the base's folder.
        dtype: of the base.
        before: every parameter when the run began.
        after: the same when it ended.
        trains: names of those that trained.
        num_trainable: parameters that trained, counted.
        logits: of the trained model in memory, through our attention.
        trainer: for a look inside.
    """

    run: RunFolder
    base: Path
    dtype: str
    before: dict[str, torch.Tensor] = field(repr=False)
    after: dict[str, torch.Tensor] = field(repr=False)
    trains: set[str] = field(repr=False)
    num_trainable: int = 0
    logits: torch.Tensor | None = field(default=None, repr=False)
    trainer: Any = None


def train_case(folder: Path, base: Path, case: Case, dtype: str = "float32") -> Trained:
    """Trains three steps through our trainer and publishes the adapter."""
    bench = Bench(folder, base)
    values = yaml.safe_load(bench.config_file.read_text())
    values["adapter"] = case.adapter_values
    bench.config_file.write_text(yaml.safe_dump(values))
    others = [o for o in case.overrides if not o.startswith("adapter.")]
    loaded = bench.load(
        "train.max_steps=3", f"base.dtype={dtype}", f"base.quantization={case.quantized}", *others
    )
    trainer = trainer_of(loaded)
    model = trainer.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = RunFolder(Path(loaded.config.run.dir) / loaded.config.run.name)
    stages.publish(run, stages.prepare_base(loaded.config, run, first=True), trainer, first=True)
    count = sum(after[name].numel() for name in trains)
    result = Trained(run, base, dtype, before, after, trains, count)
    result.logits, result.trainer = logits(model.eval()), trainer
    return result
