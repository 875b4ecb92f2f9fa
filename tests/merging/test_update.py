"""W + s·B·A a few rows at a time: the numbers of the whole matrix at once."""

import pytest
import torch
from safetensors.torch import save_file

from finetune.llama.safetensors_pieces import stored_tensors
from finetune.merging import update
from finetune.merging.update import LowRank

OUT, IN, RANK, SCALE = 101, 48, 4, 0.75


@pytest.fixture
def low_rank(tmp_path):
    torch.manual_seed(0)
    save_file({"a": torch.randn(RANK, IN), "b": torch.randn(OUT, RANK)}, tmp_path / "ab")
    a, b = sorted(stored_tensors(tmp_path / "ab"), key=lambda stored: stored.name)
    return LowRank(a, b, SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, OUT])
def test_blocks_of_rows_are_the_whole(low_rank, monkeypatch, dtype, rows):
    """Of one row, of some with a rest, of all; in each type, rounded once from float32."""
    monkeypatch.setattr(update, "_CACHED_ENTRIES", rows * IN)
    weight = torch.randn(OUT, IN).to(dtype)
    before = weight.clone()
    merged = low_rank.apply(weight, dtype)
    exact = weight.double() + SCALE * low_rank.b.double() @ low_rank.a.double()
    assert merged.dtype == dtype
    assert torch.equal(weight, before)
    terms = weight.abs().double() + SCALE * low_rank.b.abs().double() @ low_rank.a.abs().double()
    # The rounding to the type, and that of five float32 terms added in any order.
    eps = torch.finfo(dtype).eps / 2 + 5 * torch.finfo(torch.float32).eps
    assert (merged.double() - exact).abs().le(eps * terms).all()


def test_rows_are_those_of_the_whole(low_rank):
    weight = torch.randn(OUT, IN)
    whole = low_rank.apply(weight, torch.float32)
    part = low_rank.rows(30, 61).apply(weight[30:61], torch.float32)
    torch.testing.assert_close(part, whole[30:61], rtol=1e-6, atol=1e-6)
