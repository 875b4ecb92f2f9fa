"""Write plain-notation probes: the start of a pretraining sentence and its exact completion.

    python probe.py --seed 0 --out ../data/probe.jsonl

The base is asked nothing: it continues "The capital of Peru is" greedily, and the completion up
to the length of the answer must be "Lima." exactly.
"""

import argparse
import json
from pathlib import Path
from random import Random

from families import FAMILIES

PROBES_PER_FAMILY = 25


def draw_probes(seed: int, probes_per_family: int) -> list[dict[str, str]]:
    """Distinct probes of every family, on items held out of the instruction rows."""
    rng = Random(f"probe-{seed}")
    probes = []
    for family in FAMILIES.values():
        found: dict[str, str] = {}
        while len(found) < probes_per_family:
            prompt, answer = family.probe(rng)
            found[prompt] = answer
        probes += [
            {"prompt": prompt, "answer": answer, "family": family.name}
            for prompt, answer in found.items()
        ]
    return probes


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-family", type=int, default=PROBES_PER_FAMILY)
    args = parser.parse_args()
    probes = draw_probes(args.seed, args.per_family)
    args.out.write_text("".join(json.dumps(probe, ensure_ascii=False) + "\n" for probe in probes))
    print(f"{len(probes)} probes -> {args.out}")


if __name__ == "__main__":
    main()
