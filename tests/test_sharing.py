"""What is shown to others: names, not places; no secret; nothing else is changed."""

from __future__ import annotations

import os

import pytest

from finetune.sharing import LEFT_OUT, shared, shared_name, shared_text, without_secrets

KEPT = [
    "loss 3.1, where 1.2 ± 0.3 is usual",
    "24 rows/s and/or 1/2, 95 %",
    "assets/llama-nano/data/train.jsonl:12",
    "meta-llama/Llama-3.2-1B",
    "https://example.org/a/b?c=d",
    "hf://datasets/owner/name",
    "</s><|user|> a / b",
    "hf_short and sk-short",
    "",
]
HIDDEN = {
    "/home/jane/data/train.jsonl:12": "…/train.jsonl:12",
    "/home/jane doe/my data/x.bin": "…/x.bin",
    "/home/jane/x: not found": "…/x: not found",
    "no space in /home/jane/x, or /mnt/y": "no space in …/x, or …/y",
    "[/home/jane/a.jsonl, ~/b.jsonl]": "[…/a.jsonl, …/b.jsonl]",
    "'/home/jane doe/x' is gone": "'…/x' is gone",
    "../../jane/x.yaml:3": "…/x.yaml:3",
    "see ../jane/x": "see …/x",
    "~jane/x and ~/y": "…/y",
    "at C:\\Users\\jane\\x.txt now": "at …/x.txt now",
}


@pytest.mark.parametrize("text", KEPT)
def test_what_names_no_place_stays(text):
    assert shared_text(text) == text


@pytest.mark.parametrize("text", HIDDEN)
def test_a_place_becomes_its_last_part(text):
    assert shared_text(text) == HIDDEN[text]
    assert "jane" not in shared_text(text)


def test_what_lies_below_the_working_folder_is_shown_from_there():
    assert shared_text(f"{os.getcwd()}/data/a.jsonl:3") == "data/a.jsonl:3"


@pytest.mark.parametrize(
    "secret",
    [
        *("hf_" + "a1B2" * 9, "ghp_" + "x" * 36, "github_pat_" + "x" * 40, "sk-" + "a" * 40),
        *("AKIA" + "A" * 16, "glpat-" + "x" * 20, "xoxb-" + "1" * 12),
    ],
)
def test_secrets_are_named_not_shown(secret):
    assert without_secrets(f"token={secret}.") == f"token={LEFT_OUT}."
    assert secret not in str(shared({"a": [secret], secret: 1}))


def test_a_password_in_an_address_is_left_out():
    text = shared_text("https://jane:word@example.org/x")
    assert text == f"https://{LEFT_OUT}@example.org/x"


def test_keys_that_become_equal_stay_apart():
    found = shared({"/a/x.jsonl": 1, "/b/x.jsonl": 2, "n": [True, None, 1.5]})
    assert found == {"…/x.jsonl": 1, "…/x.jsonl (2)": 2, "n": [True, None, 1.5]}


def test_a_hub_id_stays_and_a_folder_becomes_its_name(tmp_path):
    assert shared_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert shared_name(str(tmp_path / "base")) == "base"
    assert shared_name("./a/b") == "b"
