"""What an adapter records of the base it was trained on, and how another base is told apart.

PEFT's adapter_config.json names its base and holds no hash of it: on another base, on a base that
the same adapter was merged into, or with another scaling, PEFT loads it without a word.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune import artifact
from finetune.adapter_settings import refuse_hostile
from finetune.errors import CannotContinue, CheckFailed, is_out_of_memory

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LIBRARIES = ("torch", "transformers", "peft", "trl", "safetensors", "tokenizers")


@dataclass(frozen=True)
class BaseIdentity:
    """What of a base an adapter depends on.

    Attributes:
        fingerprint: one hash over weights and shape.
        tokenizer_sha256: of vocabulary, merges, added tokens and pre-tokenisation.
        chat_format: name of the prompt format; None for plain text.
        chat_format_sha256: of the format's template with its date; None for plain text.
        vocab_size: rows of the embedding.
        merged_adapters: where the base is a merged model, the sha256 of every adapter in it.
    """

    fingerprint: str
    tokenizer_sha256: str
    chat_format: str | None
    chat_format_sha256: str | None
    vocab_size: int
    merged_adapters: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The part of an adapter's manifest that is about its base."""
        return {
            "base_fingerprint": self.fingerprint,
            "tokenizer_sha256": self.tokenizer_sha256,
            "chat_format": self.chat_format,
            "chat_format_sha256": self.chat_format_sha256,
            "vocab_size": self.vocab_size,
        }


def tokenizer_hash(tokenizer: Any) -> str:
    """One hash over everything that decides which ids a text becomes.

    Truncation and padding are left out: callers switch them while they work.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    return artifact.sha256_of_json(kept)


def merged_adapters_of(folder: Path) -> tuple[str, ...]:
    """The sha256 of every adapter that a model folder's manifest says was merged into it."""
    if not (folder / artifact.MANIFEST).is_file():
        return ()
    facts = artifact.read_manifest(folder)["facts"]
    own = [facts["adapter_sha256"]] if facts.get("kind") == "merged" else []
    return tuple(facts.get("merged_adapters", own))


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What the manifest says of the adapter itself: its settings, their hash, the libraries."""
    settings = artifact.read_json(folder / ADAPTER_FILES[0])
    return {
        "adapter_config": settings,
        "adapter_config_sha256": artifact.sha256_of_json(settings),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def verified_facts(folder: Path, base: BaseIdentity | None) -> dict[str, Any]:
    """The facts of an adapter folder that is as it was published, and belongs to `base`.

    Args:
        base: under the model; None where there is none to compare.

    Raises:
        CheckFailed: settings or files were edited, or the base is another one; says what differs.
    """
    facts: dict[str, Any] = artifact.read_manifest(folder)["facts"]
    _refuse_edited_settings(folder, facts)
    artifact.verify(folder)
    if not (folder / ADAPTER_FILES[1]).is_file():  # PEFT would go on to a pickle, then to the hub
        raise CheckFailed(f"{folder}: no {ADAPTER_FILES[1]}; pickled weights (.bin) are not read")
    if base is not None:
        _refuse_other_base(folder, facts, base)
    return facts


@contextlib.contextmanager
def settings_of(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Reads or applies adapter_config.json through PEFT, which trusts what is written there.

    Args:
        names: of the modules that PEFT matches the settings' patterns against.

    Raises:
        CheckFailed: settings that PEFT must not see, or on which it fails.
        CannotContinue: they need more memory than there is.
    """
    path = folder / ADAPTER_FILES[0]
    num_bytes = (folder / ADAPTER_FILES[1]).stat().st_size
    refuse_hostile(path, artifact.read_json(path), names, num_bytes)
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, re.error) as error:
        if is_out_of_memory(error):
            raise CannotContinue(
                f"{folder}: the adapter does not fit into memory beside the base ({error})"
            ) from error
        cause = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise CheckFailed(
            f"{path}: PEFT cannot use these settings on this base ({cause})"
        ) from error


def _refuse_edited_settings(folder: Path, facts: Mapping[str, Any]) -> None:
    """r, alpha and rslora are the scale of the update: other numbers are another model."""
    trained = facts.get("adapter_config")
    path = folder / ADAPTER_FILES[0]
    if trained is None or not path.is_file():
        return  # published before settings were recorded, or missing: verify tells
    found = artifact.read_json(path)
    if artifact.sha256_of_json(found) == facts["adapter_config_sha256"]:
        return
    differing = [
        f"{key} is {found.get(key)!r}, trained with {trained.get(key)!r}"
        for key in sorted(set(found) | set(trained))
        if found.get(key) != trained.get(key)
    ]
    raise CheckFailed(f"{path}: was edited since training: {'; '.join(differing)}")


def _refuse_other_base(folder: Path, facts: Mapping[str, Any], base: BaseIdentity) -> None:
    if base.merged_adapters:
        own = artifact.sha256_of(folder / ADAPTER_FILES[1]) in base.merged_adapters
        which = "this adapter is in it already" if own else "another adapter is in it"
        if facts.get("base_fingerprint") != base.fingerprint:
            raise CheckFailed(f"{folder}: the base is a merged model; {which}")
    findings = [
        message.format(facts[key], own)
        for key, message in _MESSAGES.items()
        if key in facts and facts[key] != (own := base.facts()[key])
    ]
    if findings:
        raise CheckFailed("\n".join(f"{folder}: {finding}" for finding in findings))


_MESSAGES = {
    "base_fingerprint": "was trained on a base with fingerprint {}; this base has {}",
    "vocab_size": "was trained on a vocabulary of {} ids; this base has {}",
    "tokenizer_sha256": "was trained with a tokenizer of sha256 {}; this base's has {}",
    "chat_format_sha256": "was trained in a prompt format of sha256 {}; this base's has {}",
}
