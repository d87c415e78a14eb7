"""Every objective on the same pairs, in one table.

    python -m tests.compare                                       the whole table; goes on where it stopped
    python -m tests.compare --bias 0.9 --seeds 0 --recipes control bidpo      a part of it
    python -m tests.compare --table --results .github/results     only the tables and the picture, here the README's
    ... --bias 0 --seeds 0                                        of one unit, including recipes that it alone has

A unit is one benchmark (--bias) and one seed: its own data, SFT model and pairs. Units share the image tokenizer
and the judge; recipes share everything else. Each model's test figures go to --results, the picture beside that
folder, the tables to standard output. The README's are in .github/results. Hours on two cores; two units run side by side in
two shells with OMP_NUM_THREADS=1. Only the programs' own functions do the work."""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import dpo
import sample
import sft
import vqgan
from model import UserError, cli, other_flags, read_figures, read_log, run, write_text

# Half the default length of stage 1, two thirds of stage 2's steps, pairs and rehearsal: minutes a recipe on one core.
SCALE = {"vqgan": [], "sft": ["--steps", "1300", "--val-every", "130"],
         "dpo": ["--steps", "200", "--pairs", "3200", "--rehearsal-records", "3200"],
         "sample": ["--n", "1000", "--seed", "7"]}
TABLE = {"control": "--objective sft", "dpo": "--objective dpo", "bidpo": "", "bidpo-c2": "--conditional-weight 2",
         "bidpo-t0": "--text-weight 0 --sft-weight 1",       # no preference between reports, and the control's SFT term
         "mdpo": "--objective mdpo", "mfpo": "--objective mfpo", "napo": "--objective napo", "rndpo": "--objective rndpo"}
# What the papers claim, and why the preference between reports costs (text0, add, own). On these pairs mdpo is mfpo
# without its curriculum; mask-dpo is rndpo without its normalisation, at DPO's β.
CLAIMS = {"bidpo-own": "--rejected own", "bidpo-strict": "--conditional-weight 0 --anchor-weight 0",
          "bidpo-text0": "--text-weight 0", "bidpo-t0-add": "--text-weight 0 --sft-weight 1 --distort remove remove add",
          "dpo-own": "--objective dpo --rejected own",
          **{f"{o}-flip{p}": f"--objective {o} --flip-pairs 0.{p}" for p in (10, 20, 30) for o in ("dpo", "napo")},
          **{f"rndpo-judge{p}": f"--objective rndpo --judge-noise 0.{p}" for p in (2, 4)},
          **{f"rndpo-random-judge{p}": f"--objective rndpo --mining random --judge-noise 0.{p}" for p in (0, 2, 4)},
          **{f"mask-dpo-judge{p}": f"--objective rndpo --no-normalise --beta 0.1 --judge-noise 0.{p}" for p in (0, 2, 4)},
          # each kind of distortion needs pairs of its own: half as many pairs and steps
          **{f"mdpo-{k}": f"--objective mdpo --distort {k} --steps 100 --pairs 1600"
             for k in ("remove", "region-noise", "crop", "noise")}}
RECIPES = TABLE | CLAIMS
# What the claims compare with each other, not with the control: their paired differences are kept too.
VERSUS = [("bidpo-c2", "bidpo"), ("bidpo-t0", "bidpo"), ("bidpo-text0", "bidpo"), ("bidpo-strict", "bidpo"), ("mfpo", "mdpo"),
          ("napo", "dpo"), ("mdpo-region-noise", "mdpo-crop"), ("mdpo-crop", "mdpo-noise"), ("mdpo-region-noise", "mdpo-noise"),
          ("mdpo-remove", "mdpo-region-noise"), ("dpo-flip30", "dpo"), ("napo-flip30", "napo"), ("napo-flip30", "dpo-flip30"),
          ("rndpo", "mask-dpo-judge0"), ("rndpo-judge4", "rndpo"), ("mask-dpo-judge4", "mask-dpo-judge0"),
          ("rndpo-judge4", "mask-dpo-judge4")]
BETWEEN = ("report/greedy/companion", "report/t1.0/companion", "report/greedy/chair_i", "report/greedy/recall", "segment/dice")
ROWS = {"report/greedy/companion": "companion hallucination ↓, greedy", "report/t1.0/companion": "companion hallucination ↓, T = 1",
        "report/greedy/chair_i": "CHAIR_i ↓, greedy", "report/t1.0/chair_i": "CHAIR_i ↓, T = 1",
        "report/greedy/chair_s": "CHAIR_s ↓, greedy", "report/t1.0/chair_s": "CHAIR_s ↓, T = 1",
        "report/greedy/recall": "recall, greedy", "report/t1.0/recall": "recall, T = 1",
        "report/greedy/f1": "finding F1, greedy", "report/t1.0/f1": "finding F1, T = 1",
        "report/greedy/laterality": "wrong side ↓, greedy", "report/greedy/unchanged_by_noise": "unchanged by noise ↓",
        "report/greedy/distinct": "distinct reports, greedy", "ask/accuracy": "questions right",
        "ask/companion": "companion affirmed when asked ↓",
        "segment/dice": "Dice, all structures", "segment/dice_large": "Dice, large structures",
        "generate/cfg1/f1": "text→image F1, no guidance", "generate/cfg1.5/f1": "text→image F1, guidance 1.5",
        "generate/cfg1.5/frechet": "text→image Fréchet distance ↓", "drift/text_chosen": "drift of log π(report), nats",
        "drift/image_chosen": "drift of log π(image), nats", "seconds": "seconds of the training loop"}
CURVE = [f"report/t0.5/{m}" for m in ("companion", "chair_i", "recall")]        # for the picture alone


def run_unit(out, shared, bias, seed, recipes, preset):
    """Train and evaluate the recipes of one unit; what is already there is kept. Returns its results."""
    flags = ["--out", str(out), "--preset", preset]
    data = ["--bias", str(bias), "--seed", str(seed)]
    scale = SCALE if preset == "small" else dict.fromkeys(SCALE, [])
    wanted = {name: [*flags, *data, *scale["dpo"], *RECIPES[name].split(), "--name", name, "--resume"] for name in recipes}
    for name in [n for n in recipes if (out / n).exists()]:
        check_kept(out / name, wanted[name])
    borrow(shared / "vqgan", out / "vqgan")
    if not (out / "vqgan").exists():
        vqgan.main([*flags, "--seed", "0", *scale["vqgan"], "--resume"])
        borrow(out / "vqgan", shared / "vqgan")
    if not (out / "sft").exists():
        sft.main([*flags, *data, *scale["sft"], "--resume"])
    for name in recipes:
        if not (out / name).exists():
            dpo.main(wanted[name])
    borrow(shared / "judge", out / "judge")
    sample.main([*flags, "--bias", str(bias), *scale["sample"]])
    borrow(out / "judge", shared / "judge")
    return collect(out)


def write_results(path, results):
    """Write a result file, its folder with it; a line an entry, so that changes can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, separators=(",", ":")).replace("},", "},\n") + "\n")


def check_kept(folder, wanted):
    """Raise UserError if a recipe's folder was made with other flags than wanted: its figures are not the recipe's."""
    if not (folder / "state.safetensors").exists():
        raise UserError(f"{folder} holds no state.safetensors that tells its flags; move it away or name another --out")
    cfg = cli(dpo.DPOConfig, dpo.PRESETS, wanted, None, ("objective", dpo.OBJECTIVE_DEFAULTS))
    figures = read_figures(folder)
    if other := other_flags(figures, cfg) + ["--steps"] * (figures.get("step") != cfg.steps):
        raise UserError(f"{folder} was made with other values of {', '.join(other)}; move it away or name another --out")


def borrow(source, target):
    """Copy a folder that units share, unless it is there or there is none."""
    if source.exists() and not target.exists():
        new = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.copytree(source, new)
        os.replace(new, target)


def collect(out):
    """{model: {metric: [value, its difference to the control, low, high]}} of a unit, only what the tables show."""
    written, results = json.loads((out / "eval.json").read_text()), {}
    for name in [n for n in written if n != "vqgan" and not n.endswith(" minus control")]:
        difference = written.get(f"{name} minus control", {})
        results[name] = {k: [written[name][k]["value"], *(difference.get(k, {}).get(e) for e in ("value", "low", "high"))]
                         for k in (*ROWS, *CURVE) if k in written[name]}
        rows = read_log(out / f"{name}.jsonl")[-5:]
        if name != "sft":                          # drift: over the last log lines, as one batch is noisy
            drift = {k: round(float(np.mean([r[k] for r in rows])), 3) for k in rows[-1] if k.startswith("drift/")}
            results[name] |= {k: [v, None, None, None] for k, v in (drift | {"seconds": rows[-1]["seconds"]}).items()}
    for a, b in VERSUS:
        if a in results and b in results:
            found = sample.difference(*(sample.read_kept(out / "eval" / f"{n}.safetensors") for n in (a, b)))
            results[f"{a} minus {b}"] = {k: [None, *(found[k][e] for e in ("value", "low", "high"))] for k in ROWS if k in found}
    return results


def read_results(folder):
    """{bias: {seed: results}} of every file in the folder."""
    found = {}
    for path in sorted(folder.glob("bias*-seed*.json")):
        bias, seed = path.stem[4:].split("-seed")
        found.setdefault(float(bias), {})[int(seed)] = json.loads(path.read_text())
    return found


def table(units, names):
    """Markdown of one benchmark: a metric a row, a recipe a column, the mean over seeds.

    Where the paired 95 % interval of the difference to the control excludes 0, on one side, in every seed: bold if
    the recipe is better, struck through if it is worse (↓ marks metrics that should fall)."""
    names = [n for n in ("sft", *names) if all(n in u for u in units)]
    lines = ["| metric | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for metric, title in ROWS.items():
        cells = []
        for name in names:
            found = [u[name].get(metric) for u in units]
            if None in found or None in [f[0] for f in found]:
                cells.append("-")
                continue
            mean = np.mean([f[0] for f in found])
            whole = metric.endswith(("distinct", "frechet")) or metric == "seconds"
            text = f"{mean:.0f}" if whole else f"{mean:.1f}" if "drift" in metric else f"{mean:.3f}"
            sure = all(f[2] is not None and f[2] * f[3] > 0 for f in found) and len({f[1] > 0 for f in found}) == 1
            better = sure and (found[0][1] < 0) == ("↓" in title)
            cells.append(text if not sure else f"**{text}**" if better else f"~~{text}~~")
        if set(cells) != {"-"}:
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(units, names, metrics=("report/greedy/companion", "report/t1.0/companion", "report/greedy/chair_i",
                                       "report/t1.0/chair_i", "report/greedy/recall", "generate/cfg1/f1")):
    """Markdown: the difference of each recipe to the control, seed by seed, with its paired 95 % interval.

    A name "a minus b" stands for the difference between these two."""
    lines = ["| difference | " + " | ".join(ROWS[m] for m in metrics) + " |", "| --- |" + " --- |" * len(metrics)]
    show = lambda f: f"{f[1]:+.3f} [{f[2]:+.3f}, {f[3]:+.3f}]" if f and f[1] is not None else "-"
    for name in [n for n in names if n not in ("sft", "control") and all(n in u for u in units)]:
        title = name.replace(" minus ", " − ") if " minus " in name else f"{name} − control"
        lines.append(f"| {title} | " + " | ".join("<br>".join(show(u[name].get(m)) for u in units) for m in metrics) + " |")
    return "\n".join(lines)


def picture(found, names):
    """Hallucination against recall over temperature (greedy, 0.5, 1), one line a recipe, one panel a metric."""
    panels, units = [], [u for seeds in found.values() for u in seeds.values()]
    names = sorted(("sft", *names), key=lambda n: sum(n not in u for u in units))      # what is in all panels: one colour
    for bias, seeds in sorted(found.items(), reverse=True):
        for metric in ("companion", "chair_i"):
            series = {}
            for name in [n for n in names if all(n in u for u in seeds.values())]:
                known = lambda v: math.nan if v is None else v
                points = [[np.mean([known(u[name][f"report/{d}/{m}"][0]) for u in seeds.values()])
                           for m in ("recall", metric)] for d in ("greedy", "t0.5", "t1.0")]
                if np.isfinite(points).all():
                    series[name] = [tuple(map(float, p)) for p in points]
            if series:
                panels.append(sample.plot(f"{metric} over recall, bias {bias:g};", series, 560, 300))
    sheet = Image.new("RGB", (1120, 300 * max(1, (len(panels) + 1) // 2)), sample.PALE)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (560 * (i % 2), 300 * (i // 2)))
    return sheet


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out-compare"), help="folder of the runs (default: out-compare)")
    parser.add_argument("--results", type=Path, help="folder of the result files (default: results, in --out)")
    parser.add_argument("--bias", type=float, nargs="+", default=[0.9, 0.0], help="benchmarks (default: 0.9 0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--recipes", nargs="+", default=list(TABLE), choices=RECIPES, metavar="NAME",
                        help="recipes; by default " + " ".join(TABLE) + "; to test the papers' claims " + " ".join(CLAIMS))
    parser.add_argument("--preset", default="small", choices=("tiny", "small"), help="tiny: seconds, for tests")
    parser.add_argument("--table", action="store_true", help="train nothing, show what the results hold")
    cfg = parser.parse_args(argv)
    cfg.results = cfg.results or cfg.out / "results"
    for seed in [] if cfg.table else cfg.seeds:
        for bias in cfg.bias:
            unit = f"bias{bias:g}-seed{seed}"
            results = run_unit(cfg.out / unit, cfg.out / "shared", bias, seed, cfg.recipes, cfg.preset)
            path = cfg.results / f"{unit}.json"
            write_results(path, (json.loads(path.read_text()) if path.exists() else {}) | results)
    everything = read_results(cfg.results)
    found = {b: {s: everything[b][s] for s in cfg.seeds if s in everything[b]} for b in cfg.bias
             if any(s in everything.get(b, {}) for s in cfg.seeds)}
    if not found:
        raise UserError(f"{cfg.results} holds no result yet; run `python -m tests.compare` without --table first, or name "
                        "--results")
    for bias, seeds in sorted(found.items(), reverse=True):
        units = list(seeds.values())
        print(f"\n--bias {bias:g}, seeds {' '.join(map(str, seeds))}\n\n{table(units, TABLE)}\n\n{differences(units, TABLE)}")
        if any(all(n in u for u in units) for n in CLAIMS):
            print(f"\n{table(units, RECIPES)}")
        if between := [n for n in (f"{a} minus {b}" for a, b in VERSUS) if all(n in u for u in units)]:
            print(f"\n{differences(units, between, BETWEEN)}")
    picture(everything, TABLE).save(cfg.results.parent / "compare.png")


if __name__ == "__main__":
    run(main)
