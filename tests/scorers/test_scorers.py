"""The table of scorers: what is made of a task's settings, and what is said of wrong ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import InputError
from finetune.scorers import SCORERS, make

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = {"regex": {"pattern": "a"}}

# What a right answer, a wrong one and the accepted one are, for each measure.
SAMPLES = {
    "exact_match": ({}, " 4 2\n", "42", "4 2"),
    "normalized_match": ({}, "The  Cat!", "the dog", "a cat"),
    "numeric": ({}, "so it is 42.", "41 of 43", "#### 42"),
    "regex": ({"pattern": r"is (\w+)"}, "it is blue.", "it is red", "blue"),
    "json": ({"equals": True}, '{"a": 1}', '{"a": 2}', '{"a":1.0}'),
    "rouge_l": ({}, "A cat sat.", "dogs ran", "a cat sat"),
    "bleu": ({}, "a cat sat on it", "dogs ran over there", "a cat sat on it"),
    "chrf": ({}, "a cat sat", "du hü", "a cat sat"),
    "multiple_choice": ({"normalize": "bytes"}, "blue", "red", "blue"),
}


def findings_of(name, kwargs):
    with pytest.raises(InputError) as caught:
        make(name, kwargs)
    return caught.value.findings


@pytest.mark.parametrize("name", SCORERS)
def test_a_right_answer_is_1_a_wrong_one_0_and_the_set_a_half(name):
    kwargs, right, wrong, expected = SAMPLES[name]
    scorer = make(name, kwargs)
    assert scorer.name == name
    assert scorer.score(right, [expected]) == 1
    assert scorer.score(wrong, [expected]) == 0
    assert scorer.score(right, ["other 7", expected] if name != "json" else ["7", expected]) == 1
    total = scorer.total([right, wrong], [[expected], [expected]])
    assert total == 0.5 if name not in ("bleu", "chrf") else 0 < total < 1
    assert scorer.total([right], [[expected]]) == 1


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_is_a_frozen_dataclass_with_documented_settings(name):
    scorer = make(name, NEEDED.get(name, {}))
    fields = [field.name for field in dataclasses.fields(scorer)]
    assert sorted(scorer.settings()) == sorted(fields)
    assert scorer.version >= 1
    assert scorer.is_text is (name != "multiple_choice")
    for field in fields:
        assert f"        {field}: " in type(scorer).__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(scorer, field, None)


@pytest.mark.parametrize("name", SCORERS)
def test_settings_from_a_record_make_the_same_scorer(name):
    scorer = make(name, NEEDED.get(name, {}))
    assert make(name, json.loads(json.dumps(scorer.settings()))) == scorer


def test_an_unknown_scorer():
    assert findings_of("rouge", {}) == [
        "scorer: found 'rouge'; did you mean rouge_l? allowed: exact_match, normalized_match, "
        "numeric, regex, json, rouge_l, bleu, chrf, multiple_choice"
    ]
    assert findings_of(None, {})[0].startswith("scorer: found null; allowed: exact_match")


def test_all_findings_about_settings_come_together():
    kwargs = {"tokenise": "13a", "lowercase": "yes", "max_ngram_order": 0, "tokenize": "spm"}
    assert findings_of("bleu", kwargs) == [
        "scorer_kwargs.tokenise: unknown setting of bleu (found '13a'); did you mean tokenize? "
        "allowed: tokenize, lowercase, max_ngram_order, smooth_method",
        "scorer_kwargs.lowercase: found 'yes'; allowed: true or false",
        "scorer_kwargs.tokenize: found 'spm'; allowed: 13a, intl, char, zh, none",
        "scorer_kwargs.max_ngram_order: found 0; allowed: a whole number from 1 to 20",
    ]


@pytest.mark.parametrize(
    ("name", "kwargs", "finding"),
    [
        ("regex", {}, "pattern: missing; allowed: text"),
        ("regex", {"pattern": 5}, "pattern: found 5; allowed: text"),
        (
            "regex",
            {"pattern": "(a", "group": None},
            "pattern: found '(a'; not a regular expression",
        ),
        ("regex", {"pattern": "(a)", "group": 2}, "group: found 2; allowed: null, 0 to 1"),
        (
            "regex",
            {"pattern": "(?P<x>a)", "group": "y"},
            "group: found 'y'; allowed: null, 0 to 1, x",
        ),
        ("regex", {"pattern": "(a)", "group": True}, "group: found true; allowed: text or a whole"),
        ("exact_match", {"strip": True}, "strip: unknown setting of exact_match (found true); all"),
        ("numeric", {"tolerance": "0.1"}, "tolerance: found '0.1'; allowed: a number"),
        ("numeric", {"tolerance": True}, "tolerance: found true; allowed: a number"),
        ("numeric", {"tolerance": float("nan")}, "tolerance: found nan; allowed: a number"),
        ("numeric", {"tolerance": float("inf")}, "tolerance: found inf; allowed: a number"),
        ("numeric", {"tolerance": -1}, "tolerance: found -1; allowed: a number >= 0"),
        ("chrf", {"word_order": 2.0}, "word_order: found 2.0; allowed: a whole number"),
        ("chrf", {"beta": 0}, "beta: found 0; allowed: a whole number from 1 to 100"),
        ("multiple_choice", {"normalize": "byte"}, "normalize: found 'byte'; allowed: none, bytes"),
        ("json", {"schema": ["a"]}, "schema: found ['a']; allowed: a mapping or text or null"),
        (
            "json",
            {"schema": {"type": "strin"}},
            "schema: not a JSON Schema: $.type: 'strin' is not",
        ),
        ("json", {"schema": "none.json"}, "schema: found 'none.json'; cannot be read"),
        ("json", {"schema": {"$schema": "x"}}, "schema: found $schema 'x'; allowed: the drafts"),
        ("json", {"schema": {"$ref": "#/$defs/a"}}, "schema: refers to '#/$defs/a', which it does"),
        ("json", {"schema": {"items": [{"$ref": "http://a.b/c"}]}}, "schema: not a JSON Schema"),
        (
            "json",
            {"schema": {"items": {"$ref": "http://a.b/c"}}},
            "schema: refers to 'http://a.b/c'",
        ),
    ],
)
def test_what_is_said_of_a_wrong_setting(name, kwargs, finding):
    (found,) = findings_of(name, kwargs)
    assert found.startswith(f"scorer_kwargs.{finding}")


def test_no_set_is_scored_without_rows_or_without_accepted_answers():
    for name in SCORERS:
        scorer = make(name, SAMPLES[name][0])
        with pytest.raises(InputError, match="there are no answers to score"):
            scorer.total([], [])
        with pytest.raises(InputError, match="answer 2: .*the row has no accepted answer"):
            scorer.total(["1", "1"], [["1"], []])


@pytest.mark.parametrize(
    ("name", "answer", "reason"),
    [
        ("normalized_match", "A.", "is nothing but articles and punctuation"),
        ("numeric", "four", "has no number"),
        ("rouge_l", "Привет!", "has no letter a to z and no digit"),
        ("bleu", " ", "is empty"),
        ("chrf", "", "is empty"),
        ("json", "{'a': 1}", "is not JSON: Expecting property name"),
    ],
)
def test_an_accepted_answer_that_nothing_can_match_is_refused_and_not_scored(name, answer, reason):
    scorer = make(name, SAMPLES[name][0])
    with pytest.raises(InputError, match=reason):
        scorer.score(answer, [SAMPLES[name][3], answer])
    with pytest.raises(InputError, match=f"answer 1: {name}: the accepted answer .* {reason}"):
        scorer.total([answer], [[answer]])


IN_A_CLOSED_ROOM = """
import json, os, sys
asked = []
def audit(event, args):
    if event.startswith("socket.") and event != "socket.__new__":
        asked.append([event, str(args[1:])])
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        if os.path.dirname(str(args[0])) != os.environ["TMPDIR"]:  # a library tries whether it can
            asked.append([event, str(args[0])])
sys.addaudithook(audit)
import finetune.scorers
heavy = ["torch", "nltk", "rouge_score", "sacrebleu", "jsonschema", "regex", "numpy"]
print(json.dumps([name for name in heavy if name in sys.modules]))
for name, (kwargs, right, wrong, expected) in json.loads(sys.argv[1]).items():
    scorer = finetune.scorers.make(name, kwargs)
    scorer.total([right, wrong], [[expected], [expected]])
    scorer.score(right, [expected])
finetune.scorers.make("rouge_l", {"use_stemmer": True}).score("jumping", ["jumps"])
finetune.scorers.make("json", {"schema": {"type": "object"}}).score("{}", [])
print(json.dumps(asked))
"""


def test_the_libraries_wait_and_write_nothing_and_ask_no_network(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NLTK")}
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IN_A_CLOSED_ROOM, json.dumps(SAMPLES)]
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert [json.loads(line) for line in run.stdout.splitlines()] == [[], []]
    assert list(home.iterdir()) == list(temporary.iterdir()) == []
