"""The faster of two encoders is used only where it gives the same ids; here both are compared."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import sentencepiece_model, tiktoken_model
from test_tokenizer import FRAGMENTS, generated
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from finetune.errors import InputError
from finetune.llama import content_encoder as ce
from finetune.llama.tokenizer import encode_text, encode_texts, load_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    (folder / "tokenizer.model").write_bytes(tiktoken_model(700))
    (folder / "params.json").write_text(json.dumps({"vocab_size": 700}))
    return load_tokenizer(folder)


def both(tokenizer):
    ranks = ce.tiktoken_ranks(tokenizer)
    assert ranks is not None
    return ce.by_tiktoken(ranks), ce.by_tokenizers(tokenizer)


texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=texts)
def test_both_encoders_give_the_same_ids(byte_level, text):
    fast, exact = both(byte_level)
    assert fast([text]) == exact([text])


@pytest.mark.shared
def test_both_give_the_same_ids_with_llama_3s_own_file(shared):
    tokenizer = load_tokenizer(shared("tokenizers/llama3/tokenizer.model"))
    fast, exact = both(tokenizer)
    strings = generated(3000, seed=5)
    assert fast(strings) == exact(strings)


def test_a_reloaded_folder_is_encoded_the_same_way(byte_level, tmp_path):
    save_tokenizer(byte_level, tmp_path)
    again = load_tokenizer(tmp_path)
    assert ce.tiktoken_ranks(again) == ce.tiktoken_ranks(byte_level)
    strings = generated(200)
    assert encode_texts(again, strings) == encode_texts(byte_level, strings)


def changed(tokenizer, change) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokenizer.json was edited."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|eot_id|>")


def test_other_merges_are_noticed_and_the_exact_encoder_is_used(byte_level):
    """The same pieces, joined in another order: tiktoken, which knows only pieces, would differ."""
    other = changed(byte_level, lambda state: state["model"]["merges"].reverse())
    fast, exact = both(other)
    strings = generated(300)
    assert fast(strings) != exact(strings)
    assert encode_texts(other, strings) == exact(strings)
    # The answer is remembered, and not taken for that of the right merges.
    assert encode_texts(byte_level, strings) == both(byte_level)[0](strings)
    assert encode_texts(other, strings) == exact(strings)


def drop_last_splitter(state):
    state["pre_tokenizer"]["pretokenizers"].pop()


def other_pattern(state):
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+"}


def lower_case(state):
    state["normalizer"] = {"type": "Lowercase"}


def looks_no_words_up(state):
    state["model"]["ignore_merges"] = False


def plain_added_token(state):
    state["added_tokens"][0]["special"] = False


@pytest.mark.parametrize(
    "change",
    [drop_last_splitter, other_pattern, lower_case, looks_no_words_up, plain_added_token],
)
def test_what_is_not_built_as_llama_3s_is_left_to_tokenizers(byte_level, change):
    assert ce.tiktoken_ranks(changed(byte_level, change)) is None


def test_a_sentencepiece_model_is_left_to_tokenizers(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(500))
    assert ce.tiktoken_ranks(load_tokenizer(tmp_path / "tokenizer.model")) is None


def test_long_texts_and_half_surrogates(byte_level):
    _, exact = both(byte_level)
    long = "word " * ce.LONGEST_FAST
    assert encode_texts(byte_level, ["a", long]) == exact(["a", long])
    with pytest.raises(InputError, match="surrogate"):
        encode_text(byte_level, "a\ud800b")
    with pytest.raises(InputError, match="text 2: is int"):
        encode_texts(byte_level, ["a", 5])
