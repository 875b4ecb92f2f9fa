"""Preparation of 20,000 conversations: ours beside TRL's own, in one run, interleaved.

python -m benchmarks.prepare_data --folder <folder> --rounds 3 --json <result>.json

Every part runs in a process of its own with an empty cache. Timed is what lies between the file of
rows and documents ready to train: reading, rendering, tokenising, masks, and what each writes to
its cache; imports and the tokenizer (with the choice of its encoder, made once for each) are loaded
before the clock starts. Ours also looks for duplicates and suspicious rows, which TRL does not. Ids
and labels of all rows are compared by their hash. Memory is the sum over a contender's processes of
what belongs to each (Pss: shared pages count once), above what it was when the clock started.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FINETUNE_SHARED", ROOT.parent / "shared"))
NUM_ROWS = 20_000
CONTENDERS = ("ours", "ours again", "trl", "trl, 2 processes")
MAX_LENGTH = 2048


def make_rows(path: Path, num_rows: int) -> None:
    """Conversations made of real instructions by repetition with variation."""
    rows = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["output"].strip()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            row, turn = rows[number % len(rows)], number // len(rows)
            question = f"{row['instruction']}\n\n{row['input']}".strip()
            answer = f"{row['output']} (variation {turn})" if turn else row["output"]
            messages = [
                {"role": "user", "content": f"{question} [{turn}]" if turn else question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def make_tokenizer(folder: Path) -> None:
    """The genuine Llama 3 tokenizer as a folder, with Llama 3's published chat template."""
    import importlib.util

    from finetune.llama.tokenizer import load_tokenizer, save_tokenizer

    tokenizer = load_tokenizer(SHARED / "tokenizers" / "llama3" / "tokenizer.model")
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations is not None
    template = Path(spec.submodule_search_locations[0]) / "chat_templates" / "llama3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def digest(rows: Iterable[tuple[list[int], list[int]]]) -> str:
    """One hash over ids and labels of all rows, in order."""
    total = hashlib.sha256()
    for ids, labels in rows:
        total.update(json.dumps([ids, labels]).encode())
    return total.hexdigest()


def memory_mib() -> float:
    """Pss of this process and its children."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text(encoding="ascii").split()
    total = 0
    for pid in [str(me), *children]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError):  # a child that has just ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


class PeakMemory(threading.Thread):
    """Looks at `memory_mib` five times a second; used as a context."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._before = memory_mib()
        self._peak = self._before
        self._done = threading.Event()

    @property
    def mib(self) -> float:
        """The largest found, above the start."""
        return self._peak - self._before

    def run(self) -> None:
        """Until the context ends."""
        while not self._done.wait(0.2):
            self._peak = max(self._peak, memory_mib())

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._peak = max(self._peak, memory_mib())
        self._done.set()
        self.join()


def run_ours(folder: Path) -> dict[str, Any]:
    """`load_data` and the packs of a run, as `train` makes them."""
    from finetune.batching import plan_batches
    from finetune.config.loader import load
    from finetune.data import load_data
    from finetune.llama.chat import FORMATS
    from finetune.llama.tokenizer import encode_text, load_tokenizer

    config_file = folder / "ours.yaml"
    config_file.write_text(
        f"recipe: sft\nbase: {{architecture: llama3-8b, tokenizer: {folder / 'tokenizer'}}}\n"
        f"data: {{train: {folder / 'rows.jsonl'}, max_length: {MAX_LENGTH}, chat_format: llama3}}\n"
    )
    config = load(config_file).config
    tokenizer = load_tokenizer(folder / "tokenizer")
    encode_text(tokenizer, "")  # the choice of an encoder, made once for each tokenizer
    with PeakMemory() as peak:
        start = time.perf_counter()
        data = load_data(config, tokenizer, FORMATS["llama3"])
        plan = plan_batches(config, data, 1)
        seconds = time.perf_counter() - start
    assert sum(map(len, plan.packs)) == len(data.train)
    return {
        "seconds": seconds,
        "peak_mib": peak.mib,
        "rows": len(data.train),
        "sha256": digest(_labelled(data.train)),
    }


def _labelled(documents: Any) -> Iterator[tuple[list[int], list[int]]]:
    for index in range(len(documents)):
        ids, mask = documents.pair(index)
        pairs = zip(ids.tolist(), mask.tolist(), strict=True)
        yield ids.tolist(), [token if trained else -100 for token, trained in pairs]


def run_trl(folder: Path, num_processes: int | None) -> dict[str, Any]:
    """`SFTTrainer`'s own preparation: assistant-only labels, no packing (its fastest way)."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        max_length=MAX_LENGTH,
        packing=False,
        assistant_only_loss=True,
        dataset_num_proc=num_processes,
    )
    with PeakMemory() as peak:
        start = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
        )
        prepared = trainer.train_dataset
        seconds = time.perf_counter() - start
    pairs = ((row["input_ids"], row["labels"]) for row in prepared)
    return {
        "seconds": seconds,
        "peak_mib": peak.mib,
        "rows": len(prepared),
        "sha256": digest(pairs),
    }


def run_one(name: str, folder: Path) -> dict[str, Any]:
    """One contender in a process of its own, with an empty cache (but `ours again`)."""
    import shutil

    if name != "ours again":
        shutil.rmtree(folder / "cache", ignore_errors=True)
    environment = {
        **os.environ,
        "FINETUNE_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "cache" / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-m", "benchmarks.prepare_data", "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--one", name],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Runs all contenders in turn, `--rounds` times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        processes = 2 if "2" in args.one else None
        is_ours = args.one.startswith("ours")
        result = run_ours(args.folder) if is_ours else run_trl(args.folder, processes)
        print(json.dumps(result))
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    make_rows(args.folder / "rows.jsonl", args.rows)
    make_tokenizer(args.folder / "tokenizer")
    runs = [(name, run_one(name, args.folder)) for _ in range(args.rounds) for name in CONTENDERS]
    summary = summarise(runs, args.rows)
    print(json.dumps(summary, indent=2))
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 0 if summary["same_ids_and_labels"] else 1


def summarise(runs: list[tuple[str, dict[str, Any]]], num_rows: int) -> dict[str, Any]:
    """Medians, and ratios to ours of the same round."""
    by_name = {name: [run for other, run in runs if other == name] for name in CONTENDERS}
    table = {
        name: {
            "seconds": [round(run["seconds"], 2) for run in done],
            "median_seconds": round(statistics.median(run["seconds"] for run in done), 2),
            "rows_per_second": round(num_rows / statistics.median(run["seconds"] for run in done)),
            "peak_mib_above_imports": round(max(run["peak_mib"] for run in done)),
            "rows": done[0]["rows"],
        }
        for name, done in by_name.items()
    }
    ratios = {
        name: round(
            statistics.median(
                theirs["seconds"] / ours["seconds"]
                for theirs, ours in zip(by_name[name], by_name["ours"], strict=True)
            ),
            2,
        )
        for name in CONTENDERS
        if name.startswith("trl")
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "rows": num_rows,
        "contenders": table,
        "times_ours": ratios,
        "same_ids_and_labels": len({run["sha256"] for _, run in runs}) == 1,
    }


if __name__ == "__main__":
    sys.exit(main())
