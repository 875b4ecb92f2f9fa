"""Each float32 test of the products by both libraries, whatever machine it runs on."""

from __future__ import annotations

import pytest

from finetune.fast import blocks, products


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch) -> str:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "onednn")
    monkeypatch.setattr(blocks, "LEAST_SAVED", 0)  # small models drop tokens too
    return request.param
