"""The README's table from several evaluations, one a seed: `python -m tests.table EVAL.json ...`

Prints Markdown: for each metric the mean over seeds for SFT, control and bidpo (out/dpo), and bidpo's difference to
the control, seed by seed, in bold where the seed's paired 95 % interval excludes 0."""

import json
import sys
from pathlib import Path

ROWS = [(f"report/{d}/{m}", f"{name}, {d}") for m, name in (
    ("companion", "companion hallucination ↓"), ("chair_i", "CHAIR_i ↓"), ("chair_s", "CHAIR_s ↓"), ("recall", "recall"),
    ("f1", "finding F1"), ("laterality", "wrong side ↓")) for d in ("greedy", "t0.5", "t1.0")] + [
    ("report/greedy/exact", "exact finding sets, greedy"), ("report/greedy/distinct", "distinct reports, greedy"),
    ("report/greedy/unchanged_by_noise", "unchanged by noise ↓"),
    ("ask/accuracy", "questions right"), ("segment/dice", "Dice, all structures"), ("segment/dice_large", "Dice, large structures"),
    ("generate/cfg1/f1", "text→image finding F1, no guidance"), ("generate/cfg1.5/f1", "text→image finding F1, guidance 1.5"),
    ("generate/cfg1.5/extra", "text→image extra ↓"), ("generate/cfg1.5/missing", "text→image missing ↓"),
    ("generate/cfg1.5/frechet", "text→image Fréchet distance ↓")]


def main(paths):
    """Print the table of the eval.json files in paths."""
    seeds = [json.loads(Path(p).read_text()) for p in paths]
    show = lambda v: f"{v:.0f}" if abs(v) >= 10 else f"{v:.3f}"
    print("| metric | SFT | control | bidpo | bidpo − control, seed by seed |\n| --- | ---: | ---: | ---: | --- |")
    for metric, name in ROWS:
        means = [sum(s[m][metric]["value"] for s in seeds) / len(seeds) for m in ("sft", "control", "dpo")]
        differences = [s["dpo minus control"].get(metric) for s in seeds]
        shown = [f"**{d['value']:+.3f}**" if d["low"] * d["high"] > 0 else f"{d['value']:+.3f}" for d in differences if d]
        print(f"| {name} | {' | '.join(map(show, means))} | {' '.join(shown)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
