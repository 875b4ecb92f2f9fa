"""A Modelfile for Ollama: the prompt formats once more, as Go templates.

Ollama renders the template, and llama.cpp tokenises the result with BOS in front; so no template
writes the first BOS. `.Messages` holds the turns in order, the system turn among them, `.System`
its text. Go templates cannot trim: a text is written as it is given, where the formats of Llama 2
and 3 trim it. Tools have no place here.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.md and template.md.
"""

from __future__ import annotations

from finetune.errors import InputError
from finetune.exports.source import Source
from finetune.llama.chat import ChatFormat

PLAIN = "{{ .Prompt }}"
_NANO = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}</s>{{ end }}<|assistant|>"
# The system text stands inside the first user's turn: a user at index 1 follows a system turn.
_LLAMA2 = (
    "{{ range $i, $_ := .Messages }}"
    '{{ if eq .Role "system" }}[INST] <<SYS>>\n{{ .Content }}\n<</SYS>>\n\n'
    '{{ else if eq .Role "user" }}{{ if ne $i 1 }}[INST] {{ end }}{{ .Content }} [/INST]'
    "{{ else }} {{ .Content }} </s><s>{{ end }}{{ end }}"
)
_TURN = "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_LLAMA3 = "{{ range .Messages }}" + _TURN + "{{ end }}" + _ANSWER
_DATED = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: DATE\n\n{{ .System }}<|eot_id|>"
    '{{ range .Messages }}{{ if ne .Role "system" }}' + _TURN + "{{ end }}{{ end }}" + _ANSWER
)
TEMPLATES = {
    "nano": _NANO,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "llama3.1": _DATED,
    "llama3.2": _DATED,
    "llama3.3": _DATED,
    "llama3.1-verbatim": _LLAMA3,
}


def go_template(chat_format: ChatFormat | None) -> str:
    """A prompt format in Go's syntax, with its date as text; plain text without one.

    Raises:
        InputError: a date that would end the template's quotes or begin an action.
    """
    if chat_format is None:
        return PLAIN
    date = chat_format.date_string
    if any(mark in date for mark in ('"""', "{{", "}}")):
        raise InputError(f"data.date_string: {date!r} cannot be written into a Go template")
    return TEMPLATES[chat_format.name].replace("DATE", date)


def modelfile(source: Source, gguf_file: str) -> str:
    """The Modelfile beside a GGUF file: greedy, with every stop of the format."""
    stops = source.tokenizer.convert_ids_to_tokens(source.stop_ids)
    lines = [f"FROM ./{gguf_file}", f'TEMPLATE """{go_template(source.chat_format)}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, "PARAMETER temperature 0"]) + "\n"
