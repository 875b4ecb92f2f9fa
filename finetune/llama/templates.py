"""The prompt formats once more as Jinja chat templates, for other libraries to render.

They are written into every folder whose base brings none; the tests hold them equal to `segments`,
and to the templates that the models were published with.
"""

from __future__ import annotations

from finetune.llama.segments import CALL_AS_JSON, CODE_INTERPRETER

DEFAULT_DATE = "26 Jul 2024"  # what Meta's own template prints where none is given

NANO = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '</s>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
LLAMA2 = (
    "{%- set start = 1 if messages[0]['role'] == 'system' else 0 -%}"
    "{%- for message in messages[start:] -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' -}}"
    "{%- if start and loop.index0 == 0 -%}"
    "{{- '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}"
    "{{- message['content'] | trim + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + message['content'] | trim + ' ' + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)

_ASSISTANT_OPENS = (
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    "{%- endif -%}"
)
LLAMA3 = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}" + _ASSISTANT_OPENS
)
VERBATIM = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}"
    "{%- if message['python_tag'] -%}{{- '<|python_tag|>' -}}{%- endif -%}"
    "{{- message['content'] -}}"
    "{{- '<|eom_id|>' if message['end'] == 'eom' else '<|eot_id|>' -}}"
    "{%- endfor -%}" + _ASSISTANT_OPENS
)

_SYSTEM_OPENS = (
    "{{- bos_token -}}"
    "{%- set start = 1 if messages[0]['role'] == 'system' else 0 -%}"
    "{%- set functions = tools | default(none) -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}"
    "{%- if functions or builtin -%}{{- 'Environment: ipython\\n' -}}{%- endif -%}"
    "{%- if builtin -%}"
    f"{{{{- 'Tools: ' + builtin | reject('equalto', '{CODE_INTERPRETER}') | join(', ') -}}}}"
    "{{- '\\n\\n' -}}"
    "{%- endif -%}"
    "{{- 'Cutting Knowledge Date: December 2023\\nToday Date: '"
    f" + (date_string | default('{DEFAULT_DATE}')) + '\\n\\n' -}}}}"
    "{%- if start -%}{{- messages[0]['content'] | trim -}}{%- endif -%}"
    "{{- '<|eot_id|>' -}}"
)
_CALL = (
    "{%- if message['tool_calls'] | length > 1 -%}"
    "{{- raise_exception('Llama 3.1 to 3.3 have one tool call a message') -}}"
    "{%- endif -%}"
    "{%- set first = message['tool_calls'][0] -%}"
    "{%- set call = first['function'] if first['function'] is defined else first -%}"
    f"{{%- if builtin and call['name'] == '{CODE_INTERPRETER}' -%}}"
    "{{- '<|python_tag|>' + call['arguments']['code'] -}}"
    "{%- elif builtin and call['name'] in builtin -%}"
    "{{- '<|python_tag|>' + call['name'] + '.call(' -}}"
    "{%- for key, value in call['arguments'].items() -%}"
    "{{- (', ' if loop.index0 else '') + key + '=\"' + value + '\"' -}}"
    "{%- endfor -%}{{- ')' -}}"
    "{%- else -%}"
    "{{- '{\"name\": \"' + call['name'] + '\", \"parameters\": ' -}}"
    "{{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson -}}"
    "{{- '}' -}}"
    "{%- endif -%}"
    "{{- '<|eom_id|>' if builtin else '<|eot_id|>' -}}"
)
_INTRODUCTION = (
    "{%- if functions and loop.index0 == 0 -%}"
    "{{- " + repr(CALL_AS_JSON) + " -}}"
    "{%- for schema in functions -%}{{- schema | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}"
    "{%- endif -%}"
)
_TURNS = (
    "{%- for message in messages[start:] -%}"
    "{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}"
    + _INTRODUCTION
    + "{%- if message['tool_calls'] -%}"
    + _CALL
    + "{%- elif role == 'ipython' -%}{{- message['content'] | tojson + '<|eot_id|>' -}}"
    "{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}"
    "{%- endfor -%}" + _ASSISTANT_OPENS
)
LLAMA31 = "{%- set builtin = builtin_tools | default(none) -%}" + _SYSTEM_OPENS + _TURNS
LLAMA32 = "{%- set builtin = none -%}" + _SYSTEM_OPENS + _TURNS
