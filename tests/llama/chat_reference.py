"""A second way to ids and mask: each format written out once more, encoded by other libraries.

The package grows ids segment by segment through a rebuilt tokenizer. Here SentencePiece and
tiktoken themselves encode the longest strings the format has (Llama 2: a whole exchange, as
Meta's reference code does), and the mask comes from lengths.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from original_tokenizers import Oracle, spm_oracle, tiktoken_encoding
from small_tokenizers import sentencepiece_model, tiktoken_model
from transformers import PreTrainedTokenizerFast

from finetune.llama.chat import FORMATS, ChatFormat
from finetune.llama.tokenizer import load_tokenizer

Messages = Sequence[dict[str, str]]
DATE = "05 May 2025"
NANO = Path(__file__).resolve().parents[2] / "assets" / "llama-nano" / "tokenizer.model"


@dataclass(frozen=True)
class Case:
    """A prompt format under one tokenizer file."""

    format_name: str
    tokenizer: PreTrainedTokenizerFast
    oracle: Oracle
    encoding: tiktoken.Encoding | None = None

    @functools.cached_property
    def added(self) -> dict[str, int]:
        """The control tokens."""
        return {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items()}

    @property
    def format(self) -> ChatFormat:
        return FORMATS[self.format_name]

    def control(self, token: str) -> int:
        return self.added[token]

    def as_answer(self, text: str) -> str:
        """An answer's text as it stands between the control tokens."""
        if self.format_name == "nano":
            return text
        return text.strip() + (" " if self.format_name == "llama2" else "")

    def render(self, messages: Messages, train_on: str = "assistant"):
        return self.format.render(self.tokenizer, messages, train_on, DATE)

    def prompt(self, messages: Messages) -> list[int]:
        return self.format.prompt(self.tokenizer, messages, DATE)


def case_files(name: str, shared: Callable[[str], Path], folder: Path) -> Case:
    """A format with the genuine tokenizer, or, `-small`, with one of our own of the same kind."""
    format_name, is_small = name.removesuffix("-small"), name.endswith("-small")
    if is_small:
        file, is_spm = folder / "tokenizer.model", format_name == "llama2"
        file.write_bytes(sentencepiece_model(500) if is_spm else tiktoken_model(700))
        facts = {"vocab_size": 500 if is_spm else 700, "use_scaled_rope": format_name == "llama3.1"}
        (folder / "params.json").write_text(json.dumps(facts))
    else:
        file = NANO if name == "nano" else shared(f"tokenizers/{format_name[:6]}/tokenizer.model")
    if format_name in ("nano", "llama2"):
        return Case(format_name, load_tokenizer(file), spm_oracle(file))
    tokenizer, encoding = _tiktoken_pair(file)
    return Case(format_name, tokenizer, encoding.encode_ordinary, encoding)


@functools.cache  # the genuine file takes seconds, and serves two formats
def _tiktoken_pair(file: Path) -> tuple[PreTrainedTokenizerFast, tiktoken.Encoding]:
    return load_tokenizer(file), tiktoken_encoding(file)


def reference(case: Case, messages: Messages, train_on: str) -> tuple[list[int], list[bool]]:
    """Ids and train mask of a conversation, from the documents of the format."""
    family = {"nano": _nano, "llama2": _llama2}.get(case.format_name, _llama3)
    ids, answers = family(case, messages)
    if train_on == "all":
        bos = case.control(case.format.bos)
        return ids, [i != bos for i in ids]
    chosen = answers[-1:] if train_on == "last" else answers
    trained = {place for start, end in chosen for place in range(start, end)}
    return ids, [place in trained for place in range(len(ids))]


Spans = list[tuple[int, int]]  # of each answer with its end of turn: first place, place after


def _nano(case: Case, messages: Messages) -> tuple[list[int], Spans]:
    ids, answers = [case.control("<s>")], []
    for message in messages:
        ids += [case.control(f"<|{message['role']}|>")]
        start = len(ids)
        ids += [*case.oracle(message["content"]), case.control("</s>")]
        if message["role"] == "assistant":
            answers.append((start, len(ids)))
    return ids, answers


def _llama2(case: Case, messages: Messages) -> tuple[list[int], Spans]:
    ids, answers, system = [], [], ""
    turns = [(m["role"], m["content"].strip()) for m in messages]
    if turns[0][0] == "system":
        system = "<<SYS>>\n" + turns.pop(0)[1] + "\n<</SYS>>\n\n"
    for number in range(0, len(turns), 2):
        question = "[INST] " + (system if number == 0 else "") + turns[number][1] + " [/INST]"
        before = case.oracle(question)
        ids += [case.control("<s>")]
        if number + 1 == len(turns):
            ids += before
            break
        whole = case.oracle(question + " " + turns[number + 1][1] + " ")
        assert whole[: len(before)] == before, "the answer changed the question's ids"
        answers.append((len(ids) + len(before), len(ids) + len(whole) + 1))
        ids += [*whole, case.control("</s>")]
    return ids, answers


def _llama3(case: Case, messages: Messages) -> tuple[list[int], Spans]:
    turns = [(m["role"], m["content"].strip()) for m in messages]
    if case.format_name != "llama3":
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
        turns.insert(0, ("system", dates + system))
    ids, answers = [case.control("<|begin_of_text|>")], []
    gap = len(case.oracle("\n\n"))
    for role, content in turns:
        ids += [case.control("<|start_header_id|>"), *case.oracle(role)]
        ids += [case.control("<|end_header_id|>")]
        start = len(ids) + gap
        ids += [*case.oracle("\n\n" + content), case.control("<|eot_id|>")]
        if role == "assistant":
            answers.append((start, len(ids)))
    return ids, answers
