"""What adapter_config.json may say before PEFT is let near it.

PEFT matches patterns of the file with a regular-expression engine that can be kept busy for years,
imports a module whose name stands there, and makes tensors of any size it is told. The file may be
anybody's: its manifest says that nothing was damaged, not who wrote it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import CheckFailed

SECONDS = 2
"""CPU time that all patterns of an adapter may take on all names of a base; they take milliseconds.
"""

_PLAIN = re.compile(r"[\w.-]*")
_SIZES = (
    *("r", "init_r", "target_r", "num_virtual_tokens", "num_layers", "token_dim"),
    *("oft_block_size", "boft_block_size", "encoder_hidden_size", "num_attention_heads"),
)
_CODE: dict[str, Any] = {"megatron_core": (None, "megatron.core"), "megatron_config": (None, {})}
_BASE: dict[str, Any] = {"layer_replication": (None, []), "adapters": (None, {})}

# Where PEFT 0.21 uses each: tuners_utils.check_target_module_exists, utils.other.get_pattern_key,
# tuners/ia3, tuners/fourierft, tuners/c3a.
_WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")
_KEYS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern", "block_size_pattern")


def refuse_hostile(path: Path, settings: Any, names: Iterable[str], num_bytes: int) -> None:
    """Refuses settings that would run code, never end, or ask for memory that no file fills.

    Args:
        path: of adapter_config.json, for the message.
        settings: its content.
        names: of the modules that PEFT will match.
        num_bytes: of the adapter's weights: no rank is larger.

    Raises:
        CheckFailed: all findings.
    """
    if not isinstance(settings, dict):
        raise CheckFailed(f"{path}: holds {type(settings).__name__}, a JSON object is needed")
    findings = [*_unwanted(settings), *_too_large(settings, num_bytes)]
    patterns = list(_patterns(settings)) if not findings else []
    if patterns and _are_slow(patterns, sorted(set(names))):
        shown = ", ".join(repr(text[:60]) for _, text in patterns[:3])
        findings = [
            f"its patterns ({shown}) need more than {SECONDS} s on the names of the base: such "
            "patterns need not end. List the modules by name"
        ]
    if findings:
        raise CheckFailed("\n".join(f"{path}: {finding}" for finding in findings))


def _unwanted(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, allowed in (_CODE | _BASE).items():
        if settings.get(key) not in allowed:
            does = "names code to import" if key in _CODE else "builds another model"
            yield f"{key} is {settings[key]!r:.80}, which {does}; null is allowed"


def _too_large(settings: Mapping[str, Any], num_bytes: int) -> Iterator[str]:
    """A tensor of this rank would be larger than the whole file."""
    sizes = {key: settings.get(key) for key in _SIZES}
    ranks = settings.get("rank_pattern")
    if isinstance(ranks, dict):
        sizes |= {f"rank_pattern {key[:60]!r}": value for key, value in ranks.items()}
    for key, value in sizes.items():
        if isinstance(value, int) and value > num_bytes:
            yield f"{key} is {value:,}; the weights have {num_bytes:,} bytes, too few for it"


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(whole or start, pattern) of everything that is more than a name."""
    for key in _WHOLE:
        if isinstance(text := settings.get(key), str) and not _PLAIN.fullmatch(text):
            yield "whole", text
    for key in _KEYS:
        for text in settings.get(key) or ():
            if isinstance(text, str) and not _PLAIN.fullmatch(text):
                yield "start", rf"(.*\.)?({text})$"
                yield "start", rf".*\.{text}$"
    saved = settings.get("modules_to_save")
    for text in [saved] if isinstance(saved, str) else saved or ():
        if isinstance(text, str) and not _PLAIN.fullmatch(text):
            yield "start", rf"(^|.*\.){text}($|\..*)"
    layers = settings.get("layers_pattern")
    for text in [layers] if isinstance(layers, str) else layers or ():
        if isinstance(text, str) and not _PLAIN.fullmatch(text):
            yield "start", rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\."


_MATCHING = """\
import json, re, resource, sys, warnings
resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
for kind, text in patterns:
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError):
        continue
    for name in names:
        (pattern.fullmatch if kind == "whole" else pattern.match)(name)
"""


def _are_slow(patterns: list[tuple[str, str]], names: list[str]) -> bool:
    """Matches in a process that the system ends after SECONDS; a match cannot be ended otherwise.

    A pattern that is none is left to PEFT, which says so.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MATCHING.replace("SECONDS", str(SECONDS))],
        input=json.dumps([patterns, names]),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode != 0
