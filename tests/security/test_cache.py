"""What is kept between runs is compared with its manifest before it is used again."""

from __future__ import annotations

import pytest
from small_runs import NANO, flip_bit

from finetune.llama.meta_format import cached_import


@pytest.fixture(scope="module")
def meta(tmp_path_factory, small_base):
    """The small base in Meta's layout."""
    from finetune.__main__ import main

    out = tmp_path_factory.mktemp("meta") / "base"
    argv = ["export", str(small_base), "--format", "meta", "--out", str(out)]
    assert main([*argv, "--tokenizer", str(NANO / "tokenizer.model")]) == 0
    return out


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "delete", "manifest"])
def test_a_damaged_conversion_is_made_again_aloud(meta, tmp_path, capsys, name, damage):
    folder = cached_import(meta, tmp_path)
    assert cached_import(meta, tmp_path) == folder
    assert "damaged" not in capsys.readouterr().err
    whole = (folder / name).read_bytes()
    if damage == "flip":
        flip_bit(folder / name)
    elif damage == "delete":
        (folder / name).unlink()
    else:
        flip_bit(folder / "manifest.json", 0.5)
    assert cached_import(meta, tmp_path) == folder
    assert "is damaged; converted again" in capsys.readouterr().err
    assert (folder / name).read_bytes() == whole
