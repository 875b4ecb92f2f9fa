"""Whatever is written in a config or on the command line: a RunConfig or an InputError."""

from __future__ import annotations

import contextlib

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.config.dump import dump, flow
from finetune.config.loader import load
from finetune.config.schema import KNOWN_PATHS, SECTIONS
from finetune.errors import InputError

ANY_CASE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=100,
    deadline=None,  # a busy machine is no fault of the config
)

PATHS = st.sampled_from(
    [*KNOWN_PATHS, *SECTIONS, "extends", "base.architecture.dim", "data.train.0"]
)
LEAVES = st.sampled_from(
    [None, True, 0, 1, 3, -1, 1e-4, "a", "auto", "none", "sft", "pretrain", "llama3-8b", "x.jsonl"]
)
VALUES = st.recursive(
    LEAVES,
    lambda leaf: (
        st.lists(leaf, max_size=3)
        | st.dictionaries(st.sampled_from(["path", "format", "columns", "dim", "preset"]), leaf)
    ),
    max_leaves=5,
)


def load_or_refuse(path, overrides=()):
    with contextlib.suppress(InputError):
        loaded = load(path, overrides)
        path.write_text(dump(loaded))
        assert load(path).config == loaded.config


@ANY_CASE
@given(st.lists(st.tuples(PATHS, VALUES), max_size=5))
def test_any_overrides(tmp_path, pairs):
    path = tmp_path / "x.yaml"
    base = "base: {architecture: {preset: llama3-8b}, tokenizer: t}"
    path.write_text(f"recipe: sft\n{base}\ndata: {{train: b}}\n")
    load_or_refuse(path, [f"{key}={flow(value)}" for key, value in pairs])


@ANY_CASE
@given(st.dictionaries(st.sampled_from(["recipe", "extends", *SECTIONS]), VALUES))
def test_any_values(tmp_path, values):
    path = tmp_path / "x.yaml"
    path.write_text(flow(values))
    load_or_refuse(path)


@ANY_CASE
@given(st.text(alphabet="ab:-?&*!|>{}[],'\"#%@~ \n\t\\1é", max_size=60))
def test_any_text(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    load_or_refuse(path)


@ANY_CASE
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    load_or_refuse(path)
