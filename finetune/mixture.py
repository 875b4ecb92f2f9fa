"""Several sources in one epoch, in the shares that a config asks for.

An epoch has as many trained tokens as all sources together. Each source is an endless stream of its
documents, shuffled anew on every pass, and an epoch takes the next piece of each stream: so that a
source with less than its share goes round more than once, one with more is not read to the end, and
over the epochs no document is left behind. What an epoch holds follows from the seed and its number
alone.

The table of a mixture (share, epochs, size) has the shape of table 1 in Touvron et al. 2023,
"LLaMA", arXiv:2302.13971.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.errors import InputError
from finetune.prepared import Numbers


@dataclass(frozen=True)
class Portion:
    """What one source is of an epoch.

    Attributes:
        name: the source's path.
        share: of the trained tokens that the epoch was found to have, 0 to 1.
        epochs: passes over the source in one epoch of the mixture.
        documents: of the source.
        tokens_trained: of the source, once through.
        bytes: of its files.
    """

    name: str
    share: float
    epochs: float
    documents: int
    tokens_trained: int
    bytes: int


class Mixture:
    """Documents of several sources, and how much of each an epoch takes.

    Args:
        num_trained: (documents,) trained tokens of each.
        sources: (documents,) its source.
        weights: for each source its share of the trained tokens; need not add up to one.
        names: of the sources, for messages and the table.
        seed: of the run.

    Raises:
        InputError: a source without a trained token.
    """

    def __init__(
        self,
        num_trained: Numbers,
        sources: Numbers,
        weights: Sequence[float],
        names: Sequence[str],
        seed: int,
    ) -> None:
        self._trained, self._sources, self._names, self._seed = num_trained, sources, names, seed
        self._tokens = np.bincount(sources, weights=num_trained, minlength=len(weights))
        empty = [name for name, tokens in zip(names, self._tokens, strict=True) if not tokens]
        if empty:
            raise InputError(
                f"data.train: {', '.join(empty)} has a weight and no trained token; remove it"
            )
        shares = np.array(weights, float) / sum(weights)
        self.passes = shares * self._tokens.sum() / self._tokens  # over each source, in one epoch

    def documents(self, epoch: int) -> list[int]:
        """Indices of the documents of one epoch, source by source; some more than once."""
        return [index for number in range(len(self.passes)) for index in self._piece(number, epoch)]

    def _piece(self, number: int, epoch: int) -> list[int]:
        """What one epoch takes of the stream of a source: the documents that begin in it."""
        first, last = (self.passes[number] * (epoch + i) for i in (0, 1))
        taken: list[int] = []
        for turn in range(int(first), int(np.ceil(last))):
            order = np.flatnonzero(self._sources == number).tolist()
            random.Random(f"mixture {self._seed} {number} {turn}").shuffle(order)
            trained = self._trained[order]
            begins = turn + (np.cumsum(trained) - trained) / self._tokens[number]
            # One that trains nothing may come last; it belongs to this pass all the same.
            begins = np.minimum(begins, np.nextafter(turn + 1.0, turn))
            inside = (begins >= first) & (begins < last)
            taken += [index for index, is_in in zip(order, inside, strict=True) if is_in]
        return taken

    def table(self, sizes: Sequence[int], epoch: int = 0) -> list[Portion]:
        """What an epoch really holds of each source.

        Args:
            sizes: bytes of each source's files.
        """
        chosen = np.array(self.documents(epoch), np.int64)
        found = np.bincount(
            self._sources[chosen], weights=self._trained[chosen], minlength=len(sizes)
        )
        documents = np.bincount(self._sources, minlength=len(sizes))
        return [
            Portion(
                name,
                float(found[i] / found.sum()),
                float(found[i] / self._tokens[i]),
                int(documents[i]),
                int(self._tokens[i]),
                sizes[i],
            )
            for i, name in enumerate(self._names)
        ]
