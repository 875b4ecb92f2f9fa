"""JSON answers: strict parsing, schemas, equality, fences."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.scorers import make
from finetune.scorers.json_validity import JsonValidity

SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab"\\é\n', max_size=3)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab"), v, max_size=3)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
        ('[{"b": {"a": 1, "a": 2}}]', "the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("-Infinity", "-Infinity is no number"),
        ("1e999", "too large for a float"),
        ('{"a": 1} done', "Extra data"),
        ('{"a": 1}{"a": 1}', "Extra data"),
        ("{'a': 1}", "Expecting property name"),
        ('{"a": 1,}', ""),
        ("[1, 2", ""),
        ("", "Expecting value"),
        ("// no\n1", "Expecting value"),
        ("01", "Extra data"),
        ("\u00a01", "Expecting value"),
        ("\ufeff1", ""),
        ('"a\nb"', "Invalid control character"),
        ("```json\n1\n```", "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
    ],
)
def test_what_is_not_strict_json(text, reason):
    scorer = make("json", {})
    assert scorer.score(text, []) == 0
    assert scorer.why_not(text).startswith("is not JSON: ")
    assert reason in scorer.why_not(text)


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_what_is_written_by_a_json_library_is_json(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert make("json", {}).score(f" \n{text}\t", []) == 1
    assert make("json", {}).score(text + ",", []) == 0


@given(VALUES, VALUES)
def test_values_are_equal_where_their_canonical_texts_are(one, other):
    scorer = make("json", {"equals": True})
    canonical = [json.dumps(value, sort_keys=True) for value in (one, other)]
    score = scorer.score(json.dumps(one, indent=1), [json.dumps(other)])
    assert score == (canonical[0] == canonical[1])
    assert scorer.score(json.dumps(one), ["[0.5]", json.dumps(one)]) == 1


@pytest.mark.parametrize(
    ("written", "expected", "score"),
    [
        ("1.0", "1", 1),
        ("true", "1", 0),
        ("[false]", "[0]", 0),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1),
        ("[1, 2]", "[2, 1]", 0),
        ("null", "false", 0),
        ('"1"', "1", 0),
    ],
)
def test_equality(written, expected, score):
    assert make("json", {"equals": True}).score(written, [expected]) == score


def test_a_fence_only_where_it_is_allowed_and_alone():
    fenced = make("json", {"fenced": True})
    for right in ("```json\n{}\n```", "\n```\n[1]\n```\n", '```JSON\n{\n "a": "```"}```', "{}"):
        assert fenced.score(right, []) == 1, right
    for wrong in ("Here: ```json\n{}\n```", "```json\n{}\n``` done", "```yaml\n{}\n```"):
        assert fenced.score(wrong, []) == 0, wrong
    assert make("json", {}).score("```json\n{}\n```", []) == 0


SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"age": {"$ref": "#/$defs/age"}, "name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "x", "age": 3}', None),
        ('{"age": 3}', "$: 'name' is a required property"),
        ('{"name": "x", "age": -1}', "$.age: -1 is less than the minimum of 0"),
        ('{"name": "x", "age": 1.5}', "$.age: 1.5 is not of type 'integer'"),
        ('{"name": "x", "eyes": 2}', "$: Additional properties are not allowed"),
        ("[]", "$: [] is not of type 'object'"),
    ],
)
def test_a_schema_as_a_mapping_and_as_a_file(text, reason, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    for schema in (SCHEMA, str(file)):
        scorer = make("json", {"schema": schema})
        assert scorer.score(text, []) == (reason is None)
        assert (scorer.why_not(text) or "").startswith(f"does not fit the schema: {reason}") or (
            reason is None and scorer.why_not(text) is None
        )
        assert scorer.settings()["schema"] == SCHEMA


def test_a_schema_file_that_is_no_json(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text("{'type': 1}")
    with pytest.raises(InputError, match="cannot be read as a JSON file: Expecting property"):
        make("json", {"schema": str(file)})
    with pytest.raises(InputError, match="cannot be read as a JSON file: .*Is a directory"):
        make("json", {"schema": str(tmp_path)})


def test_older_drafts_are_read_as_what_they_are():
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3}
    strict = make("json", {"schema": old | {"exclusiveMinimum": True}})
    assert strict.score("3", []) == 0
    assert make("json", {"schema": old}).score("3", []) == 1


def test_a_schema_without_end_is_an_error_and_no_score():
    endless = make("json", {"schema": {"$ref": "#"}})
    with pytest.raises(InputError, match="the schema refers to itself without end"):
        endless.score("1", [])


@pytest.mark.parametrize("key", ["$ref", "$dynamicRef"])
def test_nothing_is_fetched_for_a_schema(key, monkeypatch):
    schema = {"items": {key: "http://127.0.0.1:9/other.json"}}
    with pytest.raises(InputError, match="schema: refers to 'http://127.0.0.1:9/other.json'"):
        make("json", {"schema": schema})
    fetched = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request: fetched.append(request))
    with pytest.raises(InputError, match="does not hold 'http://127.0.0.1:9/other.json'"):
        JsonValidity(schema).score("[1]", [])
    assert fetched == []
