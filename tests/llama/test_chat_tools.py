"""Tools, and exact transcripts: against the published templates and against Meta's own pages.

The templates that Llama 3, 3.1 and 3.2 were published with lie in the installed `trl`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest
from chat_reference import DATE, Case, case_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.llama import chat

EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Without "<": the templates' control tokens are text too, and are matched wherever they stand.
texts = st.one_of(
    st.text(st.characters(exclude_characters="<", codec="utf-8"), max_size=15),
    st.lists(st.sampled_from((" ", "\n", "\n\n", "  a", "1.", "é中", '"', "\\")), max_size=5).map(
        "".join
    ),
)
json_values = st.recursive(
    st.one_of(texts, st.integers(-999, 999), st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(("get_weather", "brave_search", "add"))
arguments = st.dictionaries(st.sampled_from(("city", "query", "n")), json_values, max_size=2)
schemas = st.fixed_dictionaries({"name": names, "description": texts, "parameters": json_values})
results = st.one_of(texts, st.dictionaries(texts, json_values, max_size=2), st.integers(0, 9))

WEATHER = {"name": "get_weather", "parameters": {"type": "object"}}
CALL = {"name": "get_weather", "arguments": {"city": "Bern"}}
TALK = [
    {"role": "user", "content": "Weather in Bern?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": {"celsius": 21}},
    {"role": "assistant", "content": "It is 21 degrees."},
]


@st.composite
def conversations(draw, call_arguments=arguments, tool_names=names):
    """[system] (user (assistant calls, tool)* assistant)+, as the published templates take it."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2))):
            call = {"name": draw(tool_names), "arguments": draw(call_arguments)}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(results)})
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages


@pytest.fixture(scope="module")
def case_of(shared, tmp_path_factory):
    return functools.cache(lambda name: case_files(name, shared, tmp_path_factory.mktemp(name)))


@functools.cache
def published(name: str) -> str:
    """A template as it was published with the model."""
    spec = importlib.util.find_spec("trl")
    path = Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"the installed trl has no chat_templates/{name}.jinja")
    return path.read_text()


def in_openais_form(messages):
    """Calls nested under `function`, as the published templates expect them."""
    return [
        {**m, "tool_calls": [{"type": "function", "function": c} for c in m["tool_calls"]]}
        if m.get("tool_calls")
        else m
        for m in messages
    ]


def ids_by_template(case: Case, template: str, messages, **values) -> list[int]:
    text = case.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, date_string=DATE, **values
    )
    return case.encoding.encode(text, allowed_special="all")


def rendered(case: Case, name: str, messages, tools=(), train_on="assistant"):
    return chat.FORMATS[name].render(case.tokenizer, messages, train_on, DATE, tools)


@pytest.mark.parametrize(
    ("name", "template"),
    [("llama3.1", "llama3_1"), ("llama3.2", "llama3_2"), ("llama3.3", "llama3_1")],
)
@EXAMPLES
@given(messages=conversations(), functions=st.lists(schemas, max_size=2))
def test_functions_are_written_as_by_the_published_template(
    case_of, name, template, messages, functions
):
    case = case_of("llama3.1-small")
    tools = {"tools": functions} if functions else {}
    official = ids_by_template(case, published(template), in_openais_form(messages), **tools)
    assert rendered(case, name, messages, functions).input_ids == official
    assert ids_by_template(case, chat.FORMATS[name].template, messages, **tools) == official


@EXAMPLES
@given(
    messages=conversations(
        st.dictionaries(st.sampled_from(("query", "n")), texts, max_size=2),
    ),
    functions=st.lists(schemas, max_size=1),
)
def test_built_in_tools_are_written_as_by_the_published_template(case_of, messages, functions):
    case, builtin = case_of("llama3.1-small"), ["brave_search", "wolfram_alpha", "code_interpreter"]
    tools = {"builtin_tools": builtin} | ({"tools": functions} if functions else {})
    official = ids_by_template(case, published("llama3_1"), in_openais_form(messages), **tools)
    assert rendered(case, "llama3.1", messages, [*builtin, *functions]).input_ids == official
    assert ids_by_template(case, chat.FORMATS["llama3.1"].template, messages, **tools) == official


@EXAMPLES
@given(messages=conversations())
def test_plain_turns_of_llama_3_are_the_published_templates(case_of, messages):
    plain = [m for m in messages if m["role"] != "tool" and not m.get("tool_calls")]
    case = case_of("llama3-small")
    official = ids_by_template(case, published("llama3"), plain)
    assert rendered(case, "llama3", plain).input_ids == official


def test_a_call_and_its_end_of_turn_are_trained_its_result_is_not(case_of):
    case = case_of("llama3.1-small")
    row = rendered(case, "llama3.1", TALK, [WEATHER])
    trained = [i for i, chosen in zip(row.input_ids, row.train_mask, strict=True) if chosen]
    call = '{"name": "get_weather", "parameters": {"city": "Bern"}}'
    end = case.control("<|eot_id|>")
    assert trained == [*case.oracle(call), end, *case.oracle("It is 21 degrees."), end]


def test_code_is_written_as_on_metas_page_not_as_by_the_template(case_of):
    case = case_of("llama3.1-small")
    call = {"name": "code_interpreter", "arguments": {"code": "print(7)"}}
    messages = [TALK[0], {"role": "assistant", "tool_calls": [call]}]
    row = rendered(case, "llama3.1", messages, ["code_interpreter"])
    tag, end = case.control("<|python_tag|>"), case.control("<|eom_id|>")
    assert row.input_ids[-len(case.oracle("print(7)")) - 2 :] == [
        tag,
        *case.oracle("print(7)"),
        end,
    ]
    ours = ids_by_template(
        case, chat.FORMATS["llama3.1"].template, messages, builtin_tools=["code_interpreter"]
    )
    assert ours == row.input_ids


def test_arguments_as_json_text_are_the_same_call(case_of):
    case = case_of("llama3.1-small")
    nested = {"id": "1", "type": "function", "function": {**CALL, "arguments": '{"city": "Bern"}'}}
    as_text = [TALK[0], {**TALK[1], "tool_calls": [nested]}, *TALK[2:]]
    assert rendered(case, "llama3.1", as_text) == rendered(case, "llama3.1", TALK)


def test_a_prompt_after_a_tools_result_is_what_training_had(case_of):
    case = case_of("llama3.1-small")
    row = rendered(case, "llama3.1", TALK, [WEATHER])
    prompt = chat.FORMATS["llama3.1"].prompt(case.tokenizer, TALK[:3], DATE, [WEATHER])
    assert row.input_ids[: len(prompt)] == prompt
    assert not any(row.train_mask[len(prompt) - 1 : len(prompt)]) and row.train_mask[len(prompt)]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_messages_own_choice_goes_before_the_configs(case_of, train_on):
    case = case_of("llama3.1-small")
    messages = [{**m, "train": m["role"] == "user"} for m in TALK]
    row = rendered(case, "llama3.1", messages, train_on=train_on)
    plain = rendered(case, "llama3.1", TALK, train_on=train_on)
    assert row.input_ids == plain.input_ids
    if train_on != "all":
        trained = [i for i, chosen in zip(row.input_ids, row.train_mask, strict=True) if chosen]
        assert trained == [*case.oracle("Weather in Bern?"), case.control("<|eot_id|>")]
    none = [{**m, "train": False} for m in TALK]
    row = rendered(case, "llama3.1", none, train_on=train_on)
    assert any(row.train_mask) == (train_on == "all")  # headers are no message's words


def changed(index: int, **values) -> list[dict]:
    return [{**m, **values} if i == index else m for i, m in enumerate(TALK)]


@pytest.mark.parametrize(
    ("name", "messages", "tools", "says"),
    [
        ("llama3", TALK[:1] + TALK[3:], [WEATHER], "has tools; the format llama3 documents none"),
        ("llama3", TALK, (), "role 'tool'; allowed: system, user, assistant"),
        ("llama3.1", TALK[:2] + TALK[3:], (), "assistant stands where tool is"),
        ("llama3.1", [TALK[0], *TALK[2:]], (), "tool stands where assistant is"),
        ("llama3.1", [*TALK, TALK[2]], (), "tool stands where user is"),
        ("llama3.1", changed(1, tool_calls=[CALL, CALL]), (), "assistant stands where tool is"),
        ("llama3.1", [*changed(1, tool_calls=[CALL, CALL])[:3], TALK[2]], (), "has 2 tool calls"),
        ("llama3.1", changed(1, content="I look it up."), (), "text beside its call"),
        ("llama3.1", changed(1, tool_calls=[{"name": "f", "arguments": "{"}]), (), "are not JSON"),
        ("llama3.1", changed(1, tool_calls=[{"name": "f", "arguments": [1]}]), (), "no JSON obj"),
        ("llama3.1", changed(1, tool_calls=[{"arguments": {}}]), (), "expected {name, arguments}"),
        ("llama3.1", changed(1, tool_calls="f"), (), "tool_calls is not a list"),
        ("llama3.1", changed(0, tool_calls=[CALL]), (), "the user message has tool_calls"),
        ("llama3.1", changed(2, content=None), (), "content of the tool message"),
        ("llama3.1", changed(1, tool_calls=[], content=None), (), "content of the assistant"),
        ("llama3.1", TALK, ["get_weather"], None),
        ("llama3.1", changed(1, tool_calls=[{**CALL, "arguments": {"n": 1}}]), ["get_weather"],
         "expected text only"),
        ("llama3.1", [TALK[0], {"role": "assistant", "tool_calls": [
            {"name": "code_interpreter", "arguments": {"source": "1"}}]}], ["code_interpreter"],
         "expected text only, under code"),
        ("llama3.2", TALK, ["brave_search"], "has built-in tools (brave_search)"),
        ("llama3.1", [{"role": "system", "content": "s", "train": True}, *TALK], (),
         "train: true on a system message"),
        ("llama3.1", changed(1, python_tag=True, content="x")[:2], (), "has python_tag, which"),
        ("llama3.2", changed(1, end="eom", content="x", tool_calls=None)[:2], (), "has end, which"),
        ("llama3.1-verbatim", TALK, (), "takes text only"),
        ("llama3.1-verbatim", TALK[:1], [WEATHER], "as part of the system or user text"),
        ("llama3.1-verbatim", changed(2, content="21"), (), "has tool_calls"),
        ("llama3.1-verbatim", changed(1, tool_calls=[CALL], content="x")[:2], (), "has tool_calls"),
        ("llama3.1-verbatim", [{"role": "assistant", "content": "x", "end": "no"}], (),
         "end is 'no'; allowed: eot, eom"),
    ],
)  # fmt: skip
def test_what_a_format_has_no_place_for_is_refused(case_of, name, messages, tools, says):
    case = case_of("llama3-small" if name == "llama3" else "llama3.1-small")
    if says is None:
        rendered(case, name, messages, tools)
        return
    with pytest.raises(InputError, match=re.escape(says)):
        rendered(case, name, messages, tools)


PAGES = {"llama3_1_prompt_format.md": 6, "llama3_2_text_prompt_format.md": 5}
TURN = re.compile(
    r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(<\|python_tag\|>)?(.*?)<\|(eot|eom)_id\|>",
    re.S,
)


def examples_of(page: str) -> list[str]:
    """Prompt and answer of every chat on a page, as one text."""
    blocks = re.findall(
        r"Input Prompt Format\n```\n(.*?)\n```\s*#+ Model Response Format\n```\n(.*?)\n```",
        page,
        re.S,
    )
    return [
        prompt.rstrip("\n") + "\n\n" + answer for prompt, answer in blocks if "header_id" in prompt
    ]


def as_messages(text: str) -> list[dict]:
    roles = {"ipython": "tool"}
    return [
        {
            "role": roles.get(role, role),
            "content": content,
            "end": end,
            **({"python_tag": True} if tag else {}),
        }
        for role, tag, content, end in TURN.findall(text)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_chat_of_metas_pages_is_rendered_id_by_id(page, case_of, shared):
    case = case_of("llama3.1")
    chats = examples_of(shared(f"facts/prompt_formats/{page}").read_text())
    assert len(chats) == PAGES[page]
    for text in chats:
        messages = as_messages(text)
        assert text.count("<|start_header_id|>") == len(messages)
        ids = rendered(case, "llama3.1-verbatim", messages).input_ids
        # Meta's reference code encodes the blank line after a header by itself.
        pieces = re.split(r"(?<=<\|end_header_id\|>)(\n\n)", text)
        assert ids == [i for p in pieces for i in case.encoding.encode(p, allowed_special="all")]
        if not any(m["content"].startswith("\n") for m in messages):
            assert ids == case.encoding.encode(text, allowed_special="all")
        template = chat.FORMATS["llama3.1-verbatim"].template
        assert (
            case.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
            == text
        )


@pytest.mark.parametrize("page", PAGES)
def test_the_plain_chats_of_metas_pages_in_the_published_formats(page, case_of, shared):
    """The pages leave the dates out that the published templates print."""
    start = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
    num_plain = 0
    for text in examples_of(shared(f"facts/prompt_formats/{page}").read_text()):
        messages = [{"role": m["role"], "content": m["content"]} for m in as_messages(text)]
        roles = [m["role"] for m in messages]
        if roles[-2:] != ["user", "assistant"] or len(roles) > 3 or "python_tag" in text:
            continue
        if "Today Date" in text or roles.count("user") > 1:
            continue
        num_plain += 1
        for name in ("llama3", "llama3.1", "llama3.2", "llama3.3"):
            case = case_of("llama3" if name == "llama3" else "llama3.1")
            dated = (
                text
                if name == "llama3"
                else (
                    text.replace(start, start + dates, 1)
                    if roles[0] == "system"
                    else text.replace("<|begin_of_text|>", start + dates + "<|eot_id|>", 1)
                )
            )
            official = case.encoding.encode(dated, allowed_special="all")
            assert rendered(case, name, messages).input_ids == official
    assert num_plain >= 1


def test_metas_tool_page_from_its_parts(case_of, shared):
    """The full interaction of the page, from a structured conversation instead of its text."""
    case = case_of("llama3.1")
    page = shared("facts/prompt_formats/llama3_1_prompt_format.md").read_text()
    text = next(t for t in examples_of(page) if "The 100th decimal of pi is 7." in t)
    call = {"name": "wolfram_alpha", "arguments": {"query": "100th decimal of pi"}}
    result = json.loads(re.search(r"ipython<\|end_header_id\|>(.*?)<\|eot_id\|>", text, re.S)[1])
    messages = [
        {"role": "user", "content": "What is the 100th decimal of pi?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": "The 100th decimal of pi is 7."},
    ]
    row = rendered(case, "llama3.1", messages, ["brave_search", "wolfram_alpha"])
    written = case.encoding.decode(row.input_ids)
    assert "Environment: ipython\nTools: brave_search, wolfram_alpha\n" in written
    called = text[text.index("<|python_tag|>") : text.index("<|eom_id|>") + len("<|eom_id|>")]
    assert called in written and written.endswith(
        text[-len("The 100th decimal of pi is 7.<|eot_id|>") :]
    )


@pytest.mark.parametrize("page", PAGES)
def test_the_completions_of_base_models(page, case_of, shared):
    """Plain text: BOS and the text, as recipe `pretrain` and `generate --raw` write it."""
    case = case_of("llama3.1")
    text = shared(f"facts/prompt_formats/{page}").read_text()
    prompt = re.search(r"```\n<\|begin_of_text\|>([^<`]+)\n```", text)[1]
    official = case.encoding.encode("<|begin_of_text|>" + prompt, allowed_special="all")
    assert [case.tokenizer.bos_token_id, *case.oracle(prompt)] == official
