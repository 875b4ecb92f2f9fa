"""Multiple choice: of given answers, the one that the model finds most likely.

    none:    argmin  loss_i              lm-evaluation-harness's `acc`
    bytes:   argmin  loss_i / bytes_i    its `acc_norm`
    tokens:  argmin  loss_i / tokens_i   the mean loss of a token

loss_i is the sum of the choice's token losses (nats) after the question. Longer choices have higher
sums; dividing by a length takes that away. Bytes do not depend on the tokenizer. The harness
divides by the number of characters of the choice without the space before it, which is the number
of bytes where the text is ASCII.

Source: Gao et al., EleutherAI/lm-evaluation-harness, `lm_eval/api/task.py`, `process_results` of
multiple_choice; Brown et al. 2020, section 2.4 (division by tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from finetune.errors import CannotContinue, InputError
from finetune.scorers.scorer import Scorer


@dataclass(frozen=True)
class MultipleChoice(Scorer):
    """1 where the choice with the lowest loss is an accepted one, else 0.

    Attributes:
        normalize: what the loss of a choice is divided by: none, its bytes or its tokens.
    """

    name: ClassVar[str] = "multiple_choice"
    version: ClassVar[int] = 1
    is_text: ClassVar[bool] = False

    normalize: Literal["none", "bytes", "tokens"] = "none"

    def choose(
        self, loss_sums: Sequence[float], num_bytes: Sequence[int], num_tokens: Sequence[int]
    ) -> int:
        """The index of the choice; of equal ones the first, as in the harness.

        Args:
            loss_sums: of each choice, nats, summed over its tokens.
            num_bytes: of each choice's text in UTF-8, without the space before it.
            num_tokens: of each choice.

        Raises:
            InputError: there are no choices, or an empty one.
            CannotContinue: a loss that is no finite number.
        """
        sizes = {"none": [1] * len(loss_sums), "bytes": num_bytes, "tokens": num_tokens}
        lengths = sizes[self.normalize]
        assert len(loss_sums) == len(lengths), "a length for each choice"
        if findings := list(self._length_findings(lengths)):
            raise InputError(findings)
        if wrong := [i for i, loss in enumerate(loss_sums, 1) if not math.isfinite(loss)]:
            losses = ", ".join(f"{loss_sums[i - 1]} for choice {i}" for i in wrong)
            raise CannotContinue(
                f"{self.name}: the model's loss is {losses}; no choice can be made"
            )
        scaled = [loss / length for loss, length in zip(loss_sums, lengths, strict=True)]
        return scaled.index(min(scaled))

    def score_one(self, written: str, answer: str) -> float:
        """1 or 0.

        Args:
            written: the text of the choice taken.
            answer: the text of an accepted choice.
        """
        return float(written.strip() == answer.strip())

    def _length_findings(self, lengths: Sequence[int]) -> Iterator[str]:
        if not lengths:
            yield f"{self.name}: the row has no choices"
        for number, length in enumerate(lengths, 1):
            if length < 1:
                yield f"{self.name}: choice {number} is empty: it has no {self.normalize}"
