"""Two ranks (gloo) on a cache that holds nothing yet: one prepares, the other waits and opens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from data_cache import left_over, published
from small_runs import ROOT

RANK = """
import json, os, sys, time
from finetune import preparation, stages
from finetune.config.loader import load
from finetune.rendering import Renderer
from finetune.run_folder import run_of

read, loaded_by, rows, times = preparation.read_examples, stages.load_data, [], {}

def slow_read(path, *args):
    time.sleep(1.0)
    shape, examples = read(path, *args)
    return shape, (rows.append(1) or example for example in examples)

def timed_load(*args):
    times["began"] = time.monotonic()
    data = loaded_by(*args)
    times["ended"] = time.monotonic()
    return data

preparation.read_examples, stages.load_data = slow_read, timed_load
loaded = load(sys.argv[1], ())
first = os.environ["RANK"] == "0"
base = stages.find_base(loaded.config, run_of(loaded).path)
data = stages.prepare_data(loaded.config, run_of(loaded), base, first)
print(json.dumps({**times, "rows": len(rows), "hash": data.documents_sha256, "n": len(data.train)}))
stages._barrier()
stages.leave_ranks()
"""


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_the_second_rank_waits_and_reads_no_row(bench, tmp_path):
    bench.run_folder().path.mkdir(parents=True)
    cache, port = tmp_path / "cache", free_port()
    shared = {
        "FINETUNE_CACHE": str(cache), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(bench.config_file)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    one, two = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert (one["rows"], two["rows"]) == (24 + 9, 0)
    assert two["began"] >= one["ended"]
    assert (one["hash"], one["n"]) == (two["hash"], two["n"])
    assert len(published(cache)) == 1 and not left_over(cache)
