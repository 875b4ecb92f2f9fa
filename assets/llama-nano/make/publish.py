"""Copy a finished pretraining run into the asset folder, with its curve.

python publish.py --run ../../../runs/pretrain_nano --out ..
"""

import argparse
import json
import shutil
from pathlib import Path

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
CURVE_EVERY = 100  # steps


def curve(metrics: Path) -> list[dict[str, float]]:
    """Every held-out loss, and the mean training loss of the steps since the line before."""
    lines, losses, tokens = [], [], 0
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        if "heldout_loss" in row:
            lines.append(
                {"step": row["step"], "tokens": tokens, "heldout_loss": row["heldout_loss"]}
            )
            continue
        losses.append(row["loss"])
        tokens += row["tokens"]
        if row["step"] % CURVE_EVERY == 0:
            mean = sum(losses) / len(losses)
            lines.append({"step": row["step"], "tokens": tokens, "loss": round(mean, 4)})
            losses = []
    return lines


def main() -> None:
    """Read the arguments, copy, say the last held-out loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name in FILES:
        shutil.copyfile(args.run / "model" / name, args.out / name)
    lines = curve(args.run / "metrics.jsonl")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (args.out / "pretraining_curve.jsonl").write_text(text)
    held = [line for line in lines if "heldout_loss" in line]
    print(f"{args.out}: {len(FILES)} files; held-out loss {held[-1]['heldout_loss']:.4f}")


if __name__ == "__main__":
    main()
