"""The Modelfile: what its template renders has the ids of our prompt formats."""

from __future__ import annotations

import dataclasses

import pytest
from go_templates import render
from small_runs import NANO
from small_tokenizers import sentencepiece_model, tiktoken_model

from finetune.__main__ import main
from finetune.errors import InputError
from finetune.exports.ollama import TEMPLATES, go_template
from finetune.llama.chat import FORMATS
from finetune.llama.tokenizer import load_tokenizer

TURNS = [
    {"role": "user", "content": "What is 4 plus 3?"},
    {"role": "assistant", "content": "4 plus 3 is 7.\n\nYes."},
    {"role": "user", "content": "été  & <s> {{ .System }}"},
    {"role": "assistant", "content": "naïve"},
    {"role": "user", "content": "And then?"},
]
SYSTEM = {"role": "system", "content": "Be brief.\nAlways."}
CONVERSATIONS = [TURNS[:1], TURNS[:3], TURNS, [SYSTEM, *TURNS[:1]], [SYSTEM, *TURNS]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "tokenizer.model").write_bytes(tiktoken_model(700))
    (folder / "params.json").write_text('{"vocab_size": 700, "use_scaled_rope": true}')
    (folder / "llama2.model").write_bytes(sentencepiece_model(600))
    return {
        "nano": load_tokenizer(NANO),
        "llama2": load_tokenizer(folder / "llama2.model"),
        "llama3": load_tokenizer(folder),
    }


def as_ollama(messages) -> dict:
    """What Ollama gives a template: the turns, and the text of the system turns.

    Source: `collate` and `Template.Execute` in ollama/ollama's template/template.go.
    """
    return {
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
        "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
    }


@pytest.mark.parametrize("name", [*TEMPLATES])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda messages: str(len(messages)))
def test_the_rendered_text_has_the_formats_ids(tokenizers, name, messages):
    """`{{ .System }}` and `<s>` in a user's words: the first stays, the second is Ollama's to
    encode, whose tokeniser matches control tokens anywhere; it is left out here."""
    tokenizer = tokenizers[name if name in tokenizers else "llama3"]
    messages = [{**m, "content": m["content"].replace("<s>", "s")} for m in messages]
    chat_format = dataclasses.replace(FORMATS[name], date_string="1 Jan 2025")
    text = render(go_template(chat_format), as_ollama(messages))
    assert tokenizer(text)["input_ids"] == chat_format.prompt(tokenizer, messages)


def test_every_format_has_a_template():
    assert set(TEMPLATES) == set(FORMATS)
    assert render(go_template(None), {"Prompt": "x"}) == "x"
    for date in ('"""', "{{ x }}"):
        with pytest.raises(InputError, match="date_string"):
            go_template(dataclasses.replace(FORMATS["llama3.1"], date_string=date))


def test_the_modelfile_lies_beside_its_gguf(tmp_path):
    out = tmp_path / "out"
    argv = ["export", str(NANO), "--format", "ollama", "--out", str(out)]
    assert main([*argv, "--type", "q8_0", "--chat-format", "nano"]) == 0
    assert main(["verify", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {
        *("llama-nano.gguf", "Modelfile", "README.md", "manifest.json")
    }
    template = go_template(FORMATS["nano"])
    assert (out / "Modelfile").read_text() == (
        f'FROM ./llama-nano.gguf\nTEMPLATE """{template}"""\nPARAMETER stop "</s>"\n'
        "PARAMETER temperature 0\n"
    )
