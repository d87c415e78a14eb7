"""The README's first tables, as Markdown, from several evaluations, one a seed.

    python -m tests.table out-0/eval.json out-1/eval.json out-2/eval.json      figures
    python -m tests.table out-0 out-1 out-2                                    what is left of each habit

Figures: for each metric the mean over seeds for SFT, control and every recipe, and each recipe's difference to the
control, seed by seed, in bold where the seed's paired 95 % interval excludes 0. Habits: how many of the triggers
without their companion the greedy report states it for, all seeds together, on the test phantoms of `sample.py --seed 7`; last,
those with their companion. A folder `dpo` is taken for the default objective's, bidpo."""

import json
import sys
from pathlib import Path

from data import PHRASES, Phantoms, key, read_findings
from sample import triggers_of
from tests import compare

MORE = {"report/t1.0/laterality": "wrong side ↓, T = 1", "report/greedy/exact": "exact finding sets, greedy",
        "generate/cfg1.5/extra": "text→image extra ↓", "generate/cfg1.5/missing": "text→image missing ↓"}
READING = [f"report/{d}/{m}" for m in ("companion", "chair_i", "chair_s", "recall", "f1", "laterality") for d in ("greedy", "t1.0")]
ROWS = {k: (compare.ROWS | MORE)[k] for k in (
    *READING, *(f"report/greedy/{m}" for m in ("exact", "distinct", "unchanged_by_noise")), "ask/accuracy", "ask/companion",
    "segment/dice", "segment/dice_large", "generate/cfg1/f1", *(f"generate/cfg1.5/{m}" for m in ("f1", "extra", "missing", "frechet")))}
THERE = "companion there, and rightly stated"


def title_of(model):
    """What the README calls a folder under --out."""
    return {"sft": "SFT", "dpo": "bidpo"}.get(model, model)


def models_of(evaluations):
    """SFT, control and what all of the eval.json compare with it, the default first."""
    if not all("control" in e for e in evaluations):
        sys.exit("every evaluation needs a control: run `python dpo.py --objective sft` and `python sample.py` there first")
    recipes = [name for name in evaluations[0] if all(f"{name} minus control" in e for e in evaluations)]
    return ["sft", "control", *sorted(recipes, key=lambda name: name != "dpo")]


def table(seeds):
    """Markdown of the contents of eval.json files, one a seed."""
    show = lambda v: "-" if v is None else f"{v:.0f}" if abs(v) >= 10 else f"{v:.3f}"
    mean = lambda values: None if None in values else sum(values) / len(values)          # None: nothing to count
    bold = lambda d: "**" if d["low"] * d["high"] > 0 else ""
    differ = lambda d: "-" if d is None or d["value"] is None else f"{bold(d)}{d['value']:+.3f}{bold(d)}"
    models = models_of(seeds)
    recipes = models[2:]
    titles = [*map(title_of, models), *(f"{title_of(r)} − control, by seed" for r in recipes)]
    lines = ["| metric | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (2 + len(recipes)) + " --- |" * len(recipes)]
    for metric, name in ROWS.items():
        cells = [show(mean([s[m].get(metric, {}).get("value") for s in seeds])) for m in models]
        cells += [" ".join(differ(s[f"{r} minus control"].get(metric)) for s in seeds) for r in recipes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def habits(folders, seed=7):
    """Markdown: how often absent companions are stated, by trigger; apart where the finding is there, on another side."""
    read = lambda folder, model: json.loads((folder / f"eval/{model}.captions.json").read_text())
    models = models_of([json.loads((f / "eval.json").read_text()) for f in folders])
    records = list(Phantoms("test", len(read(folders[0], "sft")), bias=0, seed=seed))
    for folder in folders:
        true = json.loads((folder / "references.json").read_text())["annotations"]
        if [r["caption"] for r in true] != [r.text for r in records]:
            sys.exit(f"{folder} was not evaluated on the {len(records)} test phantoms of `sample.py --seed {seed}`")
    cases = {}                                                # habit: (record, key of the companion) of each case
    for i, record in enumerate(records):
        for trigger, companion, there in triggers_of(record):
            elsewhere = companion.name in {f.name for f in record.findings}
            habit = THERE if there else f"{trigger.name} → {companion.name}" + (", shown on the wrong side" if elsewhere else "")
            cases.setdefault(habit, []).append((i, key(companion)))
    said = {m: [[{key(f) for f in read_findings(c["caption"], PHRASES)} for c in read(folder, m)] for folder in folders]
            for m in models}
    told = {habit: [sum(companion in reports[i] for reports in said[m] for i, companion in found) for m in models]
            for habit, found in cases.items()}
    order = sorted(cases.keys() - {THERE}, key=lambda habit: (-told[habit][0], habit))
    cases["all"] = [case for habit in order for case in cases[habit]]
    told["all"] = [sum(told[habit][j] for habit in order) for j in range(len(models))]
    lines = ["| habit | cases | " + " | ".join(map(title_of, models)) + " |", "| --- |" + " ---: |" * (1 + len(models))]
    for habit in (*order, "all", *({THERE} & cases.keys())):
        n = len(folders) * len(cases[habit])
        shares = [f"{k} ({k / n:.2f})" if n else "-" for k in told[habit]]
        lines.append(f"| {habit} | {n} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    paths = list(map(Path, sys.argv[1:]))
    for path in paths:
        if not (path / "eval.json" if path.is_dir() else path).exists():
            sys.exit(f"{path} is not there: run `python sample.py --out {path.parent if path.suffix else path}` first")
    print(habits(paths) if paths[0].is_dir() else table([json.loads(p.read_text()) for p in paths]))
