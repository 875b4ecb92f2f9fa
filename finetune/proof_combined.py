"""Several adapters as one, by PEFT's own arithmetic on PEFT's own layers: what a merge is held to.

Each matrix is combined by itself when it is asked for. On a whole model, PEFT 0.21 takes the other
settings of the combined adapter from the first one: with rsLoRA it comes out √r times too large,
and outside that one's `layers` nothing of the others is left. A and B have no such settings.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open

from finetune.adapters import ADAPTER_FILES
from finetune.layer_merge import one_layer, settings_for
from finetune.merging.combine import seed_of
from finetune.merging.members import Combination, Member
from finetune.skeleton import PREFIX

_A, _B = ".lora_A.weight", ".lora_B.weight"
_Pair = tuple[torch.Tensor, torch.Tensor]


class CombinedByPeft:
    """The adapter that PEFT makes of several, of scale 1; ranks are filled up with zeros.

    Its numbers are PEFT's float32 ones held in float64, so that B·A is not rounded again: the
    updates of opposed weights may nearly cancel.
    """

    def __init__(self, combination: Combination) -> None:
        self._combination = combination
        self._ranks: dict[str, list[int]] = {}
        for member in combination.members:
            for module, rank in _ranks_of(member).items():
                self._ranks.setdefault(module, []).append(rank)
        is_sum = combination.how == "cat"
        self._rank = max(sum(ranks) if is_sum else ranks[0] for ranks in self._ranks.values())
        self._last: tuple[str, _Pair] | None = None

    def config(self) -> PeftConfig:
        """A plain LoRA on every matrix that one of the adapters changes."""
        return LoraConfig(r=self._rank, lora_alpha=self._rank, target_modules=sorted(self._ranks))

    def names(self) -> set[str]:
        """As in PEFT's file."""
        return {PREFIX + module + part for module in self._ranks for part in (_A, _B)}

    def tensor(self, name: str) -> torch.Tensor:
        """A (r, in) or B (out, r) of a module, float64."""
        module, is_a = name.removeprefix(PREFIX)[: -len(_A)], name.endswith(_A)
        if self._last is None or self._last[0] != module:
            self._last = module, self._by_peft(module)
        a, b = self._last[1]
        place = torch.zeros(self._rank, a.shape[1]) if is_a else torch.zeros(len(b), self._rank)
        rank = min(len(a), self._rank)
        if is_a:
            place[:rank] = a[:rank]
        else:
            place[:, :rank] = b[:, :rank]
        return place.double()

    def attach(self, model: Any) -> Any:
        """This adapter on a model in memory, float32, for its text."""
        peft_model = get_peft_model(model, self.config(), autocast_adapter_dtype=True)
        tensors = {name: self.tensor(name).float() for name in sorted(self.names())}
        set_peft_model_state_dict(peft_model, tensors)
        return peft_model.requires_grad_(False).eval()

    def _by_peft(self, module: str) -> _Pair:
        """PEFT's combined A and B, float32; those of cat are filled up with zeros."""
        of_module = [(m, found) for m in self._combination.members if (found := _read(m, module))]
        combination, names = self._combination, [str(n) for n in range(len(of_module))]
        weights = [member.weight for member, _ in of_module]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a density of 1 is allowed here
            model = _model_of(module, of_module)
            layer = model.get_submodule(PREFIX + module)
            torch.manual_seed(seed_of(combination, module))
            if combination.how == "cat":
                model.base_model.add_weighted_adapter(names, weights, "all", "cat")
                return layer.lora_A["all"].weight.data, layer.lora_B["all"].weight.data
            a, b = model.base_model._generalized_task_arithmetic_weighted_adapter(
                combination.how, names, weights, layer, combination.density, "total"
            )
        return a, b


def _ranks_of(member: Member) -> dict[str, int]:
    """The rank of every module of an adapter."""
    with safe_open(str(member.folder / ADAPTER_FILES[1]), framework="pt") as file:
        return {
            name.removeprefix(PREFIX).removesuffix(_A): file.get_slice(name).get_shape()[0]
            for name in sorted(file.keys())
            if name.endswith(_A)
        }


def _read(member: Member, module: str) -> dict[str, torch.Tensor]:
    """The adapter's two tensors of a module, or none."""
    with safe_open(str(member.folder / ADAPTER_FILES[1]), framework="pt") as file:
        names = {PREFIX + module + part for part in (_A, _B)} & set(file.keys())
        return {name: file.get_tensor(name) for name in names}


def _model_of(module: str, of_module: list[tuple[Member, dict[str, torch.Tensor]]]) -> Any:
    """A layer by itself under every adapter that has it, named 0, 1, …"""
    first = of_module[0][1]
    shape = (len(first[PREFIX + module + _B]), first[PREFIX + module + _A].shape[1])
    model: Any = None
    for number, (member, tensors) in enumerate(of_module):
        settings = settings_for(PeftConfig.from_pretrained(str(member.folder)), module)
        if model is None:
            root = one_layer(module, torch.empty(shape, device="meta"))
            # PEFT asks the base's weight for its device and type alone: it takes no memory.
            nothing = torch.zeros(1, 1).expand(shape)
            root.get_submodule(module).weight = torch.nn.Parameter(nothing, requires_grad=False)
            model = get_peft_model(root, settings, adapter_name="0")
        else:
            model.add_adapter(str(number), settings)
        set_peft_model_state_dict(model, tensors, adapter_name=str(number))
    return model
