"""A model as lm-evaluation-harness asks it: the harness's own wrapper, with the ids of the toolkit.

The harness hands over texts. Encoded as it does by itself, three things would go wrong unseen:

- `loglikelihood_rolling` puts BOS before a text whose encoding has one already, and scores it;
- a control token typed in a row's text would become one, and end the turn;
- an answer would go on behind a stop token of the prompt format that is not the tokenizer's EOS.

Imports lm_eval, so it is imported only where that is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from finetune.errors import InputError
from finetune.fast.loss import has_soft_prompt
from finetune.inference import Opened
from finetune.llama.tokenizer import encode_text


@contextlib.contextmanager
def _tied_already(model: Any) -> Iterator[None]:
    """The wrapper ties the weights of what it is given anew; over an embedding that PEFT holds
    (trainable tokens) that fails, and a loaded model is tied already.
    """
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


class HarnessModel(HFLM):
    """The harness's wrapper of a loaded model.

    Attributes:
        num_cut: prompts that were longer than the context and lost their beginning, as the harness
            does it.

    Args:
        opened: the model.
        batch_size: rows in one forward pass; 1 behind trained vectors, where nothing may be padded.
    """

    def __init__(self, opened: Opened, batch_size: int) -> None:
        with _tied_already(opened.model):
            super().__init__(
                pretrained=opened.model,
                backend="causal",
                tokenizer=opened.base.tokenizer,
                max_length=opened.base.architecture.context,
                softmax_dtype=torch.float32,
                batch_size=1 if has_soft_prompt(opened.model) else batch_size,
            )
        self.num_cut = 0
        self._chat_format = opened.base.chat_format
        self._stops = opened.stop_ids()
        self._prompts: dict[str, tuple[list[int], str]] = {}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The run's own rendering; its ids are kept, and the text that stands for them returned.

        Raises:
            InputError: the prompt format has no place for something.
        """
        assert self._chat_format is not None
        opening = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        ids = self._chat_format.prompt(self.tokenizer, messages)
        text = self.tokenizer.decode(ids) + opening
        if self._prompts.setdefault(text, (ids, opening)) != (ids, opening):
            raise InputError(
                f"lm-eval: two rows differ only in a control token that one of them has as text; "
                f"one of them must go: {text[:200]!r}"
            )
        return text

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a text as text, without BOS; of a rendered prompt, the prompt's own."""
        ids, text = self._prompts.get(string, ([], string))
        return ids + (encode_text(self.tokenizer, text) if text else [])

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, width) ids of prompts, padded on the left, and their mask."""
        limit = left_truncate_len or self.max_length
        rows = [self._prompt(string) for string in strings]
        self.num_cut += sum(len(row) > limit for row in rows)
        rows = [row[-limit:] for row in rows]
        width, padding = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = [[padding] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The harness's, where there is room for a question before the answer.

        Raises:
            InputError: there is none.
        """
        longest = {self._longest_answer(request.args[1]) for request in requests}
        if max(longest) >= self.max_length:
            raise InputError(
                f"lm-eval: an answer of {max(longest)} tokens leaves no room for a question in the "
                f"model's context of {self.max_length}; set max_gen_toks in the task's "
                "generation_kwargs"
            )
        return super().generate_until(requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the harness would ask the hub for the model."""
        return {}

    def _longest_answer(self, settings: dict[str, Any]) -> int:
        return int(normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"])

    def _parts(self, text: str) -> tuple[list[int], str]:
        """A prompt's first ids, and the text behind them."""
        return self._prompts.get(text, ([self.tokenizer.bos_token_id], text))

    def _prompt(self, text: str) -> list[int]:
        ids, rest = self._parts(text)
        return ids + (encode_text(self.tokenizer, rest) if rest else [])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ids, before = self._parts(context)
        if before.strip():
            head, tail = super()._encode_pair(before, continuation)
        else:
            head, tail = [], encode_text(self.tokenizer, before + continuation)
        if not 0 < len(tail) <= self.max_length:
            raise InputError(
                f"lm-eval: an answer of {len(tail)} tokens; allowed: 1 to {self.max_length}, the "
                f"model's context: {continuation[:80]!r} after {context[-80:]!r}"
            )
        self.num_cut += len(ids) + len(head) + len(tail) > self.max_length + 1
        return ids + head, tail

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: Sequence[str], **settings: Any
    ) -> torch.Tensor:
        settings["eos_token_id"] = self._stops
        return super()._model_generate(context, max_length, stop, **settings)
