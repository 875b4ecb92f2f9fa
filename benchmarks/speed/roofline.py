"""What this machine can do at most: the rate of a matrix product.

What a step needs is `finetune.workload.flops_of`; padding counts nothing, so that a share of 100 %
cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

# rows, in, out: the MLP on a step's tokens, of the 58M base and of 8B
SHAPES = {"cpu": (1024, 512, 1376), "cuda": (4096, 4096, 14336)}


def measured(dtype: str, seconds: float = 3.0) -> float:
    """Median GFLOP/s of the product, of the faster library where there are two."""
    import torch

    from finetune.fast.products import times

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, width, out = SHAPES[device]
    kind = getattr(torch, dtype)
    a, b = (torch.randn(n, width, device=device).to(kind) for n in (rows, out))
    two = device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available()
    rates: list[list[float]] = [[], []] if two else [[]]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for onednn, found in enumerate(rates):
            began = time.perf_counter()
            for _ in range(10):
                times(a, b, bool(onednn))
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(10 * 2 * rows * width * out / (time.perf_counter() - began) / 1e9)
    return max(map(statistics.median, rates))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    print(json.dumps({"gflops": measured(parser.parse_args().dtype)}))
