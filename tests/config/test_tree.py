"""The YAML rules: numbers, text, duplicates, tags, and documents made to explode."""

from __future__ import annotations

import math
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.dump import flow, scalar
from finetune.config.tree import MAX_NUM_CHARS, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("+7", 7),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("yes", "yes"),
        ("off", "off"),
        ("no", "no"),
        ("True", True),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("2024-07-26", "2024-07-26"),
        ("1e-4x", "1e-4x"),
        ("'1e-4'", "1e-4"),
        (".inf", math.inf),
        ("-.inf", -math.inf),
    ],
)
def test_scalars(text, value):
    read = parse(text, "x").values
    assert read == value
    assert type(read) is type(value)


def test_pyyaml_alone_reads_1e_4_as_text():
    assert yaml.safe_load("1e-4") == "1e-4"


def test_origins_are_lines():
    tree = parse("a:\n  b: 1\n  c:\n    - 2\n    - 3\n", "f.yaml")
    assert tree.values == {"a": {"b": 1, "c": [2, 3]}}
    assert tree.origins[("a", "b")] == "f.yaml:2"
    assert tree.origins[("a", "c", "1")] == "f.yaml:5"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3 a: found twice; first at f.yaml:1"),
        ("a:\n  b: 1\n  b: 1\n", "f.yaml:3 a.b: found twice; first at f.yaml:2"),
        ("a: !!python/object/apply:os.system [ls]\n", "f.yaml:1 a: found the tag !!python/obj"),
        ("!!python/name:os.system\n", "f.yaml:1: found the tag"),
        ("a: !!binary aGk=\n", "found the tag !!binary"),
        ("a: !!set {x}\n", "found the tag !!set"),
        ("a: !mine 3\n", "found the tag !mine"),
        ("a: !!int x\n", "f.yaml:1 a: found 'x', which is not a value of int"),
        ("a: " + "9" * 5000, "which is not a value of int"),
        ("? [a]\n: 1\n", "found a key that is not text"),
        ("a: [1\n", "f.yaml:2: not valid YAML"),
        ("a: b: c\n", "f.yaml:1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: *b\n", "f.yaml:1: not valid YAML"),
        ("a: \x07\n", "f.yaml: not valid YAML"),
        ("a: &x [*x]\n", "too much, with aliases unfolded"),
        ("a: " + "[" * 30 + "]" * 30, "too much, with aliases unfolded"),
        ("[" * 100_000, "nested too deeply"),
        ("#" * (MAX_NUM_CHARS + 1), "allowed: at most"),
    ],
)
def test_refusals(text, finding):
    findings = parse(text, "f.yaml").findings
    assert len(findings) == 1, findings
    assert finding in findings[0]


def test_a_billion_laughs_end_at_once():
    lines = ["l0: &l0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    for n in range(1, 10):
        lines.append(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]")
    start = time.perf_counter()
    findings = parse("\n".join(lines), "f.yaml").findings
    assert time.perf_counter() - start < 2
    assert ["too much, with aliases unfolded" in finding for finding in findings] == [True]


def test_a_modest_alias_is_fine():
    tree = parse("a: &x {b: 1}\nc: *x\n", "f.yaml")
    assert tree.values == {"a": {"b": 1}, "c": {"b": 1}}
    assert tree.values["a"] is not tree.values["c"]


SCALARS = st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.text()
SCALARS |= st.floats(allow_nan=False, allow_infinity=False)


@given(SCALARS)
def test_what_is_written_is_read_back(value):
    read = parse(f"key: {scalar(value)}  # origin", "x").values["key"]
    assert read == value
    assert type(read) is type(value)


@given(st.recursive(SCALARS, lambda leaf: st.lists(leaf) | st.dictionaries(st.text(), leaf)))
def test_nested_values_are_read_back_too(value):
    text = flow(value)
    assert "\n" not in text
    assert parse(text, "x").values == value
