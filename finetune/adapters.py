"""An adapter put on its base, counted, saved, and loaded onto that base alone.

What the methods are is in `finetune.methods`; which base an adapter belongs to in
`finetune.identity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM

from finetune import rank_schedule
from finetune.artifact import sha256_of
from finetune.config.adapter import CHANGES_BASE, AdapterSection
from finetune.data_starts import StartInputs, clean_corda, prepare_corda, start_eva, start_loftq
from finetune.errors import CheckFailed, InputError
from finetune.identity import ADAPTER_FILES, BaseIdentity, settings_of, verified_facts
from finetune.layer_merge import merged_weight
from finetune.llama.architecture import from_llama_config
from finetune.llama.weight_files import tensors_in
from finetune.methods import method_of
from finetune.starts import changes_base, keep_start, restore_start, save_as_plain_lora

__all__ = ["ADAPTER_FILES", "ParameterReport", "attach", "fingerprint_of_files", "load_adapter"]
__all__ += ["merged_weight", "report_parameters", "save_adapter"]


def attach(
    model: LlamaForCausalLM,
    adapter: AdapterSection,
    base_name: str,
    start: Path | None = None,
    inputs: StartInputs | None = None,
) -> PeftModel:
    """Puts a fresh adapter, in float32, on a base.

    Args:
        base_name: what the user wrote as the base; never made absolute.
        start: where initialisations that take from the base keep what they took; where the folder
            exists, the same is taken again.
        inputs: what initialisations may look at; those that do need it.

    Raises:
        InputError: a setting that does not fit the base, such as a target that matches nothing.
    """
    method = method_of(adapter)
    if findings := method.findings(adapter, from_llama_config(model.config)):
        raise InputError(findings)
    restored = adapter.init in CHANGES_BASE and start is not None and start.is_dir()
    config = method.peft_config(adapter, base_name)
    if restored:
        config.init_lora_weights = True
    elif adapter.init == "corda":
        prepare_corda(model, config, _needed(inputs))
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    # PEFT puts the folder the base was read from in the place of what the user wrote.
    config.base_model_name_or_path = base_name
    if restored:
        assert start is not None
        restore_start(peft_model, start)
        config.init_lora_weights = adapter.init
    else:
        _look(peft_model, adapter, inputs)
        if adapter.init in CHANGES_BASE and start is not None:
            keep_start(peft_model, start)
    return peft_model


def _look(model: PeftModel, adapter: AdapterSection, inputs: StartInputs | None) -> None:
    """What an initialisation does after PEFT has put its layers in."""
    if adapter.init == "corda":
        clean_corda(model)
    elif adapter.init == "eva":
        start_eva(model, _needed(inputs))
    elif adapter.init == "loftq":
        start_loftq(model, _needed(inputs))


def _needed(inputs: StartInputs | None) -> StartInputs:
    assert inputs is not None, "an initialisation that looks at rows or weights gets them"
    return inputs


@dataclass(frozen=True)
class ParameterReport:
    """What is trained, and in which types.

    Attributes:
        matched: target name -> number of layers that carry it.
        num_trainable: parameters that train.
        num_total: all parameters, adapter included.
        dtypes: base, adapter (or weights), compute, optimizer -> its types.
    """

    matched: dict[str, int]
    num_trainable: int
    num_total: int
    dtypes: dict[str, str]

    def lines(self) -> list[str]:
        """The report for the terminal."""
        share = 100 * self.num_trainable / self.num_total
        result = [
            f"model    {self.num_trainable:,} of {self.num_total:,} parameters train "
            f"({share:.2f} %)"
        ]
        if self.matched:
            found = ", ".join(f"{name} x{count}" for name, count in self.matched.items())
            result.append(f"         adapter on {found}")
        return [*result, *(f"dtype    {part:<10} {name}" for part, name in self.dtypes.items())]


def report_parameters(
    model: torch.nn.Module, compute: str | None = None, optimizer: str | None = None
) -> ParameterReport:
    """Counts trainable and total parameters and the layers that an adapter matched.

    Args:
        compute: the type of the products; None where nothing is computed.
        optimizer: the type of the optimizer's moments; None where nothing is trained.
    """
    matched: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            short = name.rsplit(".", 1)[-1]
            matched[short] = matched.get(short, 0) + 1
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [
        p for n, p in model.named_parameters() if not p.requires_grad and ".ranknum." not in n
    ]  # AdaLoRA's ranknum is a number in the clothes of a parameter
    num_trainable = sum(p.numel() for p in trained)
    types = {
        "base": _dtype_names(frozen),
        "adapter" if frozen else "weights": _dtype_names(trained),
        "compute": compute,
        "optimizer": optimizer,
    }
    shown = {part: names for part, names in types.items() if names}
    return ParameterReport(matched, num_trainable, num_trainable + _num_stored(frozen), shown)


def _dtype_names(parameters: list[torch.nn.Parameter]) -> str:
    names = {_dtype_name(p): None for p in sorted(parameters, key=_dtype_name)}
    return ", ".join(names)


def _dtype_name(parameter: torch.nn.Parameter) -> str:
    """The type of a parameter; of packed 4-bit numbers their own, not the bytes they lie in."""
    state = getattr(parameter, "quant_state", None)
    return state.quant_type if state else str(parameter.dtype).removeprefix("torch.")


def _num_stored(parameters: list[torch.nn.Parameter]) -> int:
    """Parameters, counting a packed 4-bit tensor by the shape it stands for."""
    return sum(
        state.shape.numel() if (state := getattr(p, "quant_state", None)) else p.numel()
        for p in parameters
    )


def save_adapter(model: PeftModel, folder: Path, start: Path | None = None) -> None:
    """Writes the adapter in PEFT's own format, without the model card PEFT would add.

    Args:
        start: what `attach` kept there, for initialisations that took from the base.
    """
    if changes_base(model.peft_config["default"]):
        assert start is not None, "what was taken from the base is needed to put it back"
        save_as_plain_lora(model, start, folder)
    elif rank_schedule.is_adalora(model.peft_config["default"]):
        rank_schedule.save_as_plain_lora(model, folder)
    else:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(
    model: LlamaForCausalLM, folder: Path, base: BaseIdentity | None = None
) -> PeftModel:
    """A published adapter on its base, every key accounted for.

    Args:
        base: what lies under `model`; None where there is none to compare.

    Raises:
        CheckFailed: the folder differs from its manifest, the base is another one, keys are
            missing, unexpected or of another shape.
    """
    verified_facts(folder, base)
    with settings_of(folder, [name for name, _ in model.named_modules()]):
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    weights = tensors_in(folder / ADAPTER_FILES[1])
    _check_keys(folder, peft_model, weights)
    set_peft_model_state_dict(peft_model, weights)
    peft_model.requires_grad_(False)
    return peft_model.eval()


def _check_keys(folder: Path, model: PeftModel, weights: Mapping[str, torch.Tensor]) -> None:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tensor.shape for name, tensor in state.items()}
    differing = sorted(set(expected) ^ set(weights))
    if differing:
        shown = ", ".join(differing[:5]) + (" …" if len(differing) > 5 else "")
        raise CheckFailed(f"{folder}: {len(differing)} adapter keys missing or unexpected: {shown}")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise CheckFailed(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, the base and "
                f"adapter_config.json ask for {tuple(shape)}"
            )


def fingerprint_of_files(paths: list[Path]) -> dict[str, str]:
    """sha256 of each weight file, by name."""
    return {path.name: sha256_of(path) for path in sorted(paths)}
