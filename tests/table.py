"""The README's first table from several evaluations, one a seed: `python -m tests.table EVAL.json ...`

Prints Markdown: for each metric the mean over seeds for SFT, control and the two recipes, and each recipe's difference
to the control, seed by seed, in bold where the seed's paired 95 % interval excludes 0."""

import json
import sys
from pathlib import Path

RECIPES = {"bidpo": "dpo", "bidpo-c2": "bidpo-c2"}           # title: folder under --out
ROWS = [(f"report/{d}/{m}", f"{name}, {title}") for m, name in (
    ("companion", "companion hallucination ↓"), ("chair_i", "CHAIR_i ↓"), ("chair_s", "CHAIR_s ↓"), ("recall", "recall"),
    ("f1", "finding F1"), ("laterality", "wrong side ↓")) for d, title in (("greedy", "greedy"), ("t1.0", "T = 1"))] + [
    ("report/greedy/exact", "exact finding sets, greedy"), ("report/greedy/distinct", "distinct reports, greedy"),
    ("report/greedy/unchanged_by_noise", "unchanged by noise ↓"),
    ("ask/accuracy", "questions right"), ("segment/dice", "Dice, all structures"), ("segment/dice_large", "Dice, large structures"),
    ("generate/cfg1/f1", "text→image finding F1, no guidance"), ("generate/cfg1.5/f1", "text→image finding F1, guidance 1.5"),
    ("generate/cfg1.5/extra", "text→image extra ↓"), ("generate/cfg1.5/missing", "text→image missing ↓"),
    ("generate/cfg1.5/frechet", "text→image Fréchet distance ↓")]


def table(seeds):
    """Markdown of the contents of eval.json files, one a seed."""
    show = lambda v: f"{v:.0f}" if abs(v) >= 10 else f"{v:.3f}"
    differ = lambda d: "" if d is None else f"**{d['value']:+.3f}**" if d["low"] * d["high"] > 0 else f"{d['value']:+.3f}"
    recipes = {r: folder for r, folder in RECIPES.items() if all(folder in s for s in seeds)}
    titles = ["SFT", "control", *recipes, *(f"{r} − control, by seed" for r in recipes)]
    lines = ["| metric | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (2 + len(recipes)) + " --- |" * len(recipes)]
    for metric, name in ROWS:
        cells = [show(sum(s[m][metric]["value"] for s in seeds) / len(seeds)) for m in ("sft", "control", *recipes.values())]
        cells += [" ".join(differ(s[f"{r} minus control"].get(metric)) for s in seeds).strip() for r in recipes.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(table([json.loads(Path(p).read_text()) for p in sys.argv[1:]]))
