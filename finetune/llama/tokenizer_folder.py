"""What a Hugging Face folder says about its tokenizer beside tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.llama.downloads import read_json_object

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_folder(folder: Path) -> dict[str, Any]:
    """Special tokens by role, the chat template and the length, as keyword arguments.

    Only what is data is taken: never the class, nor code. Empty where the folder has none.

    Raises:
        InputError: a file is there but is not JSON, or the template no text.
    """
    settings: dict[str, Any] = {}
    # The newer file wins; the older one only fills gaps.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config = read_json_object(folder / name)
            tokens = {role: _content(config.get(role)) for role in _ROLES}
            settings |= {role: token for role, token in tokens.items() if token is not None}
            for key in ("model_max_length", "chat_template"):
                if config.get(key) is not None:
                    settings[key] = config[key]
    template = folder / "chat_template.jinja"
    if template.is_file():
        try:
            settings["chat_template"] = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{template}: is no text in UTF-8 ({error})") from None
    return settings


def _content(token: Any) -> str | None:
    """A token is written as a string or as an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
