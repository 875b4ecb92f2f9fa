"""Ids equal to SentencePiece's and tiktoken's, through every way a tokenizer is loaded."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from original_tokenizers import Oracle, spm_oracle, tiktoken_oracle
from small_tokenizers import scored_model, sentencepiece_model, sentences, tiktoken_model
from transformers import AutoTokenizer

from finetune.errors import InputError
from finetune.llama import tokenizer as t
from finetune.llama.tiktoken_file import special_tokens
from finetune.llama.tokenizer_proof import PROBE

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CONTROLS = ("<|system|>", "<|user|>", "<|assistant|>")


@pytest.fixture(scope="session")
def small_files(tmp_path_factory) -> dict[str, tuple[Path, Oracle]]:
    """Files of our own: with a dummy prefix, without, with symbols in the text, and tiktoken's."""
    root = tmp_path_factory.mktemp("small")
    models = {
        "prefix": sentencepiece_model(500, control_symbols=CONTROLS, pad_id=3),
        "no_prefix": sentencepiece_model(480, add_dummy_prefix=False),
        "symbols": sentencepiece_model(500, user_defined_symbols=("<|user|>", "== ", "ab")),
        "no_bytes": sentencepiece_model(230, byte_fallback=False),
        "tiktoken": tiktoken_model(700),
    }
    files = {}
    for name, content in models.items():
        folder = root / name
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(content)
        (folder / "params.json").write_text(json.dumps({"vocab_size": 700}))
        oracle = tiktoken_oracle if name == "tiktoken" else spm_oracle
        files[name] = (folder, oracle(folder / "tokenizer.model"))
    return files


@pytest.fixture(scope="session")
def loaded(small_files):
    return {name: (t.load_tokenizer(f), oracle) for name, (f, oracle) in small_files.items()}


REAL = {
    "llama2": ("tokenizers/llama2/tokenizer.model", spm_oracle),
    "stories": ("models/stories260K/tokenizer.model", spm_oracle),
    "llama3": ("tokenizers/llama3/tokenizer.model", tiktoken_oracle),
}


def real(name: str, shared) -> tuple[Path, Oracle]:
    if name == "nano":
        file = ASSETS / "llama-nano" / "tokenizer.model"
        return file, spm_oracle(file)
    file, oracle = REAL[name]
    return shared(file), oracle(shared(file))


FRAGMENTS = (
    *(" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "▁", "\x00", "\u200b"),
    *("the", "The", " of", "a", "ab", "er", "ere", "Hello", "don't", "IT'S", "1", "23", "4567"),
    *(".", ",", "--", "...", "==", "== ", "()", "{}", '"', "'", "’", "_", "/", "\\", "#"),
    *("é", "e\u0301", "ß", "ſ", "中", "文字", "日本", "한국", "ไทย", "हि", "السلام", "שלום", "🙂"),
    *("👩‍👩‍👧", "\U0010ffff", "<s>", "</s>", "<unk>", "<0x41>", "<pad>", "[INST]", "<<SYS>>"),
    *("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|user|>", "<|us", "|>", "<|"),
)


def generated(num_texts: int, seed: int = 0) -> list[str]:
    """Fragments thrown together, random code points, runs of one letter, and plain sentences."""
    chance = random.Random(seed)
    mixed = [
        "".join(chance.choices(FRAGMENTS, k=chance.randint(1, 24))) for _ in range(num_texts // 2)
    ]
    planes = (range(32, 127), range(0x20, 0x600), range(0x2000, 0xD800), range(0xE000, 0x110000))
    noise = [
        "".join(chr(chance.choice(chance.choice(planes))) for _ in range(chance.randint(1, 16)))
        for _ in range(num_texts // 4)
    ]
    runs = [
        chance.choice(FRAGMENTS) * chance.randint(1, 140) + chance.choice(("", "x", " x"))
        for _ in range(num_texts // 8)
    ]
    return [*PROBE, *mixed, *noise, *runs, *sentences(num_texts // 8)]


def differing(texts: list[str], ours: list[list[int]], oracle: Oracle) -> list[str]:
    assert len(texts) == len(ours)
    return [text for text, ids in zip(texts, ours, strict=True) if ids != oracle(text)]


@pytest.mark.parametrize("name", [*REAL, "nano"])
def test_real_files_give_the_originals_ids(name, shared, tmp_path):
    file, oracle = real(name, shared)
    tokenizer = t.load_tokenizer(file)
    texts = generated(3000)
    assert len(texts) > 3000
    assert differing(texts, t.encode_texts(tokenizer, texts), oracle) == []
    t.save_tokenizer(tokenizer, tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), t.load_tokenizer(tmp_path)):
        assert t.fingerprint(again) == t.fingerprint(tokenizer)
        assert differing(texts, t.encode_texts(again, texts), oracle) == []
        plain = [text for text in texts if not any(s in text for s in again.all_special_tokens)]
        plain = [s for s in plain if not any(c in s for c in again.get_added_vocab())]
        assert len(plain) > 1500
        bos = [again.bos_token_id]
        assert all(again(text).input_ids == bos + oracle(text) for text in plain)


@pytest.mark.parametrize("name", ["prefix", "no_prefix", "symbols", "no_bytes", "tiktoken"])
@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    text=st.one_of(
        st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.builds(lambda unit, n: unit * n, st.sampled_from(FRAGMENTS), st.integers(1, 200)),
        st.binary().map(lambda data: data.decode("utf-8", "replace")),
    )
)
def test_small_files_give_the_originals_ids(name, text, loaded):
    tokenizer, oracle = loaded[name]
    assert t.encode_text(tokenizer, text) == oracle(text)


@pytest.mark.parametrize("name", ["prefix", "no_prefix", "symbols", "no_bytes", "tiktoken"])
def test_plain_autotokenizer_reloads_the_same_ids(name, loaded, tmp_path):
    """Also beside a config.json, which makes transformers look for a Llama tokenizer class."""
    from transformers import LlamaConfig

    tokenizer, oracle = loaded[name]
    t.save_tokenizer(tokenizer, tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    texts = [x for x in generated(600) if not any(s in x for s in again.get_added_vocab())]
    ids = [again(text, add_special_tokens=False).input_ids for text in texts]
    assert differing(texts, ids, oracle) == []
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(again, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
    assert again("a").input_ids[0] == again.bos_token_id


@pytest.mark.parametrize("name", ["prefix", "no_prefix", "tiktoken"])
def test_text_survives_the_round_trip(name, loaded):
    """Every text comes back, except that SentencePiece reads a U+2581 as a space."""
    tokenizer, _ = loaded[name]
    for text in generated(400):
        if "▁" not in text:
            assert tokenizer.decode(t.encode_text(tokenizer, text)) == text


def test_control_tokens_in_content_stay_text_and_the_tokenizer_stays_as_it_was(loaded):
    for name, token in (("prefix", "<|user|>"), ("tiktoken", "<|eot_id|>"), ("prefix", "</s>")):
        tokenizer, _ = loaded[name]
        token_id = t.special_id(tokenizer, token)
        text = f"a{token}b {token}"
        before = tokenizer(text).input_ids
        assert before.count(token_id) == 2  # a plain call matches them
        content = t.encode_text(tokenizer, text)
        assert token_id not in content
        assert tokenizer.decode(content) == text
        assert tokenizer(text).input_ids == before
        assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_an_added_token_that_is_not_special_is_part_of_the_text(loaded, tmp_path):
    tokenizer, _ = loaded["tiktoken"]
    t.save_tokenizer(tokenizer, tmp_path)
    changed = t.load_tokenizer(tmp_path)
    changed.add_tokens(["<tool>"])
    changed.add_special_tokens({"extra_special_tokens": ["<end>"]})
    ids = t.encode_text(changed, "a<tool>b<end>c<|eot_id|>")
    assert t.special_id(changed, "<tool>") in ids
    assert t.special_id(changed, "<end>") not in ids
    assert t.special_id(changed, "<|eot_id|>") not in ids


def test_encoding_from_many_threads(loaded):
    tokenizer, oracle = loaded["prefix"]
    texts = generated(200)
    expected = [oracle(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda text: t.encode_text(tokenizer, text), texts))
        together = list(pool.map(lambda _: t.encode_texts(tokenizer, texts), range(8)))
    assert alone == expected
    assert all(ids == expected for ids in together)


def test_special_ids_and_padding(loaded, shared):
    prefix, tiktoken_like = loaded["prefix"][0], loaded["tiktoken"][0]
    assert [t.special_id(prefix, name) for name in CONTROLS] == [4, 5, 6]
    assert (prefix.bos_token_id, prefix.eos_token_id, prefix.pad_token_id) == (1, 2, 3)
    assert loaded["no_prefix"][0].pad_token == "<unk>"
    assert tiktoken_like.pad_token == "<|reserved_special_token_0|>"  # params.json of a 3.0
    with pytest.raises(InputError, match=r"did you mean '<\|user\|>'"):
        t.special_id(prefix, "<|usr|>")
    llama3 = t.load_tokenizer(shared("tokenizers/llama3/tokenizer.model"))
    facts = json.loads(shared("facts/llama3_special_tokens.json").read_text())
    assert len(facts) == 256
    assert {name: t.special_id(llama3, name) for name in facts} == facts
    assert (llama3.pad_token_id, llama3.eos_token_id, len(llama3)) == (128004, 128001, 128256)
    llama2 = t.load_tokenizer(shared("tokenizers/llama2/tokenizer.model"))
    assert (llama2.bos_token_id, llama2.eos_token_id, llama2.pad_token) == (1, 2, "<unk>")


def test_the_special_tokens_of_llama_3_0():
    """Ids as in meta-llama/llama3's tokenizer: reserved ones are counted on without gaps."""
    names = special_tokens(is_llama_30=True)
    assert [names[i] for i in (0, 1, 2, 5, 6, 7, 8, 9, 10, 255)] == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
        "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>",
        "<|reserved_special_token_250|>",
    ]  # fmt: skip


def test_a_hugging_face_folder_whose_pad_is_eos_gets_another_pad(loaded, tmp_path):
    t.save_tokenizer(loaded["no_prefix"][0], tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "</s>"}))
    assert t.load_tokenizer(tmp_path).pad_token == "<unk>"


def test_a_folder_whose_two_files_disagree_is_refused(loaded, small_files, tmp_path):
    t.save_tokenizer(loaded["no_prefix"][0], tmp_path)
    content = (small_files["no_prefix"][0] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert t.encode_text(t.load_tokenizer(tmp_path), "a b") == t.encode_text(
        loaded["no_prefix"][0], "a b"
    )
    other = (small_files["prefix"][0] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(other)
    with pytest.raises(InputError, match="'Hello world'"):
        t.load_tokenizer(tmp_path)


def test_a_rebuilt_tokenizer_that_differs_is_refused_naming_the_string(small_files, monkeypatch):
    """The proof at load sees a tokenizer whose merges are in another order."""
    from finetune.llama import sentencepiece_file

    right = sentencepiece_file.ordered_merges

    def shuffled(*args):
        merges = right(*args)
        random.Random(0).shuffle(merges)
        return merges

    monkeypatch.setattr(sentencepiece_file, "ordered_merges", shuffled)
    with pytest.raises(InputError, match="cannot be rebuilt exactly"):
        t.load_tokenizer(small_files["prefix"][0])


def test_fingerprints_tell_tokenizers_apart(loaded):
    prints = {name: t.fingerprint(tokenizer) for name, (tokenizer, _) in loaded.items()}
    assert len(set(prints.values())) == len(prints)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"<html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (b"\x00\x01garbage" * 40, "neither a SentencePiece model nor tiktoken"),
        (b"just some words\n" * 40, "neither a SentencePiece model nor tiktoken"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(content, word, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(InputError, match=word) as error:
        t.load_tokenizer(file)
    assert str(file) in str(error.value)
    assert len(error.value.findings) == 1


@pytest.mark.parametrize("name", ["prefix", "tiktoken"])
def test_a_file_cut_off_anywhere_is_refused(name, small_files, tmp_path):
    folder, _ = small_files[name]
    content = (folder / "tokenizer.model").read_bytes()
    (tmp_path / "params.json").write_bytes((folder / "params.json").read_bytes())
    end = len(content) - (50 if name == "prefix" else 1)
    for length in range(1, end, max(1, end // 150)):
        (tmp_path / "tokenizer.model").write_bytes(content[:length])
        with pytest.raises(InputError, match=r"tokenizer\.model"):
            t.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "unigram"}, "UNIGRAM"),
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "extra white space"),
        ({"treat_whitespace_as_suffix": True}, "prefix"),
    ],
)
def test_kinds_of_sentencepiece_that_no_llama_uses_are_refused(changes, word, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_model(320, **changes))
    with pytest.raises(InputError, match=word):
        t.load_tokenizer(file)


@pytest.mark.parametrize("lengths", [(2, 3, 5), (2, 4, 8), (2, 3, 4, 5, 6, 7, 8), (2, 3, 4, 6, 9)])
def test_runs_that_share_a_score_join_leftmost_first(lengths, tmp_path):
    """As Llama 2's runs of spaces do, here with gaps between the lengths."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(scored_model([("▁", -1.0)] + [("▁" * n, -1e9) for n in lengths]))
    tokenizer, oracle = t.load_tokenizer(file), spm_oracle(file)
    texts = [" " * n + end for n in range(80) for end in ("", "x", " x ")]
    assert differing(texts, t.encode_texts(tokenizer, texts), oracle) == []


def test_overlapping_splits_join_as_in_the_original(tmp_path):
    """Random small vocabularies of two letters, every text of up to seven letters."""
    texts = ["".join(x) for n in range(1, 8) for x in itertools.product("er", repeat=n)]
    chance = random.Random(0)
    for number in range(40):
        parts, pieces = {"e", "r"}, [("e", -100.0), ("r", -101.0)]
        for text in chance.sample(texts, len(texts)):
            if len(pieces) < 12 and any(
                text[:cut] in parts and text[cut:] in parts for cut in range(1, len(text))
            ):
                parts.add(text)
                pieces.append((text, -float(len(pieces))))
        file = tmp_path / f"{number}.model"
        file.write_bytes(scored_model(pieces))
        ours = t.encode_texts(t.load_tokenizer(file), texts)
        assert differing(texts, ours, spm_oracle(file)) == []


def test_other_pieces_that_share_a_score_are_refused(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(scored_model([("bc", -1.0), ("ab", -1.0), ("a", -5), ("b", -6), ("c", -7)]))
    with pytest.raises(InputError, match=r"\['bc', 'ab'\] have one score"):
        t.load_tokenizer(file)


def test_half_a_surrogate_pair_is_named(loaded):
    with pytest.raises(InputError, match="text 2: holds half of a surrogate pair"):
        t.encode_texts(loaded["prefix"][0], ["a", "b\ud83d"])


def test_vocabulary_conflicts_are_named(loaded):
    t.check_vocabulary(loaded["prefix"][0], 500, "model")
    with pytest.raises(InputError, match="500 tokens, the model's embedding only 499 rows"):
        t.check_vocabulary(loaded["prefix"][0], 499, "model")


def test_the_verb_prints_ids_without_bos(small_files, tmp_path):
    folder, oracle = small_files["prefix"]
    texts = [" a", "<|user|> hi</s>", "", "x\ny"]
    lines = tmp_path / "lines.jsonl"
    rows = [json.dumps(texts[0]), json.dumps({"text": texts[1]}), *map(json.dumps, texts[2:])]
    lines.write_text("\n".join(rows) + "\n\n")
    command = [sys.executable, "-m", "finetune", "tokenize", str(folder), "--file", str(lines)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"ids": [oracle(text) for text in texts]}
    lines.write_text('"a"\n{"txt": 1}\nnot json\n')
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "lines.jsonl:2" in done.stderr
    assert "lines.jsonl:3" in done.stderr
