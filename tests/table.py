"""The README's first two tables, as Markdown, from several evaluations, one a seed.

    python -m tests.table out-0/eval.json out-1/eval.json out-2/eval.json      figures
    python -m tests.table out-0 out-1 out-2                                    what is left of each habit

Figures: for each metric the mean over seeds for SFT, control and the two recipes, and each recipe's difference to the
control, seed by seed, in bold where the seed's paired 95 % interval excludes 0. Habits: the share of triggers without
their companion whose greedy report states it, all seeds together, for test phantoms of `sample.py --seed 7`."""

import json
import sys
from collections import Counter
from pathlib import Path

from data import COMPANIONS, Phantoms, key, lexicon, read_findings

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
    show = lambda v: "-" if v is None else f"{v:.0f}" if abs(v) >= 10 else f"{v:.3f}"
    mean = lambda values: None if None in values else sum(values) / len(values)          # None: nothing to count
    bold = lambda d: "**" if d["low"] * d["high"] > 0 else ""
    differ = lambda d: "" if d is None or d["value"] is None else f"{bold(d)}{d['value']:+.3f}{bold(d)}"
    recipes = {r: folder for r, folder in RECIPES.items() if all(folder in s for s in seeds)}
    titles = ["SFT", "control", *recipes, *(f"{r} − control, by seed" for r in recipes)]
    lines = ["| metric | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (2 + len(recipes)) + " --- |" * len(recipes)]
    for metric, name in ROWS:
        cells = [show(mean([s[m][metric]["value"] for s in seeds])) for m in ("sft", "control", *recipes.values())]
        cells += [" ".join(differ(s[f"{r} minus control"].get(metric)) for s in seeds).strip() for r in recipes.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def habits(folders, seed=7):
    """Markdown: stated companions by trigger, apart from those whose finding is there on the other side."""
    models, asked, told = ["sft", "control", *RECIPES.values()], Counter(), Counter()
    for folder in folders:
        for model in models:
            captions = json.loads((Path(folder) / "eval" / f"{model}.captions.json").read_text())
            records = Phantoms("test", len(captions), bias=0, seed=seed)
            phrases = lexicon(records)
            for record, caption in zip(records, captions):
                said = {key(f) for f in read_findings(caption["caption"], phrases)}
                true, names = {key(f) for f in record.findings}, {f.name for f in record.findings}
                for f in [f for f in record.findings if f.name in COMPANIONS]:
                    companion = COMPANIONS[f.name](f)
                    if key(companion) not in true:
                        elsewhere = companion.name in names
                        group = "any, companion elsewhere" if elsewhere else f"{f.name} → {companion.name}"
                        asked[model, group] += 1
                        told[model, group] += key(companion) in said
    lines = ["| habit | cases | " + " | ".join(["SFT", "control", *RECIPES]) + " |", "| --- |" + " ---: |" * (1 + len(models))]
    for group in sorted({g for _, g in asked}, key=lambda g: -told["sft", g]):
        shares = [f"{told[m, group] / asked[m, group]:.2f}" for m in models]
        lines.append(f"| {group} | {asked['sft', group]} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    paths = list(map(Path, sys.argv[1:]))
    print(habits(paths) if paths[0].is_dir() else table([json.loads(p.read_text()) for p in paths]))
