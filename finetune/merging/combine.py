"""Several adapters as one: what each combination does to the matrices A and B of one layer.

    linear       A = Σ ±√|w·s| · A_i     B = Σ √|w·s| · B_i       (± is the sign of w·s)
    cat          A = [w·s · A_i; …]      B = [B_i, …]             so that B·A = Σ w·s · B_i·A_i
    ties         as linear, after each A_i and B_i has kept its largest entries; an entry is the
                 mean of the members that have the sign of their sum
    dare_linear  as linear, after entries are dropped at random and the rest divided by the density
    dare_ties    as ties, after the same

s is an adapter's own scale, w its weight. Only cat is the sum of the updates: the others add A and
B apart, so that B·A has every product B_i·A_j. The numbers are those of PEFT 0.21, float32, bit
for bit; what is random is drawn from a generator of the seed and the layer's name, A before B, in
the order of the adapters. Sources: Yadav et al. 2023 (TIES), arXiv:2306.01708; Yu et al. 2023
(DARE), arXiv:2311.03099; `add_weighted_adapter` in PEFT's tuners/lora/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune import artifact
from finetune.merging.members import Combination
from finetune.merging.update import LowRank, Update, by_rows

_BLOCK_ENTRIES = 1 << 22
_Pruned = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Combined:
    """W + B·A, with A and B made of several adapters'.

    Attributes:
        module: the layer's name in the base.
        updates: of the adapters that change this layer.
        weights: one for each of them.
        combination: how.
    """

    module: str
    updates: tuple[LowRank, ...]
    weights: tuple[float, ...]
    combination: Combination

    @property
    def parts(self) -> Sequence[str]:
        """Names of every A and B, adapter by adapter."""
        return [name for update in self.updates for name in update.parts]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of B·A."""
        return self.updates[0].shape

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r), float32; r is the sum of the ranks for cat, else the rank."""
        pairs = list(zip(self.updates, self.weights, strict=True))
        if self.combination.how == "cat":
            a = torch.cat([update.a * weight * update.scale for update, weight in pairs])
            return a, torch.cat([update.b for update in self.updates], dim=1)
        scales = [weight * update.scale for update, weight in pairs]
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(r, s) for r, s in zip(roots, scales, strict=True)]
        pruned = self._pruned()
        a = self._added([update.a for update in self.updates], signed, pruned)
        return a, self._added([update.b for update in self.updates], roots, pruned)

    def apply(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W + B·A; the sum is rounded to float32 at its end, so opposed weights may cancel."""
        a, b = (factor.double() for factor in self.factors())

        def wide(rows: slice) -> torch.Tensor:
            return torch.addmm(weight[rows].double(), b[rows], a).float()

        return by_rows(weight.shape, dtype, _BLOCK_ENTRIES, wide)

    def _pruned(self) -> _Pruned:
        how, density = self.combination.how, self.combination.density
        if how == "linear" or density == 1:
            return lambda matrix: matrix
        assert density is not None, f"{how} has a density"
        if how == "ties":
            return lambda matrix: _largest(matrix, density)
        generator = torch.Generator().manual_seed(seed_of(self.combination, self.module))
        return lambda matrix: _at_random(matrix, density, generator)

    def _added(
        self, matrices: Sequence[torch.Tensor], weights: Sequence[float], pruned: _Pruned
    ) -> torch.Tensor:
        """The weighted sum; for ties, its mean over the members that agree in sign."""
        kept = torch.stack([pruned(matrix) for matrix in matrices])
        weighted = kept * torch.tensor(weights).view(-1, 1, 1)
        if not self.combination.how.endswith("ties"):
            return weighted.sum(0)
        positive = kept.sum(0) >= 0
        agrees = kept.sign() == torch.where(positive, 1, -1)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)


def combined_updates(
    combination: Combination, of_members: Sequence[dict[str, LowRank]]
) -> dict[str, Update]:
    """The update of every matrix that one of the adapters changes, by the base's tensor name.

    Args:
        of_members: each member's updates, in the combination's order.
    """
    weights = [member.weight for member in combination.members]
    found: dict[str, Update] = {}
    for name in sorted({name for updates in of_members for name in updates}):
        having = [(u[name], w) for u, w in zip(of_members, weights, strict=True) if name in u]
        updates, own = zip(*having, strict=True)
        found[name] = Combined(name.removesuffix(".weight"), updates, own, combination)
    return found


def seed_of(combination: Combination, module: str) -> int:
    """The seed of a layer's draws: they do not depend on which layers come before it."""
    return int(artifact.sha256_of_json([combination.seed, module])[:15], 16)


def _largest(matrix: torch.Tensor, density: float) -> torch.Tensor:
    """The matrix with all but its entries of largest size set to zero."""
    entries, kept = matrix.reshape(-1), torch.zeros(matrix.numel())
    places = entries.abs().topk(int(density * len(entries))).indices
    kept[places] = entries[places]
    return kept.view(matrix.shape)


def _at_random(matrix: torch.Tensor, density: float, generator: Any) -> torch.Tensor:
    """The matrix with entries dropped at random, the others divided by the density."""
    mask = torch.bernoulli(torch.full_like(matrix, density), generator=generator)
    return matrix * mask / density
