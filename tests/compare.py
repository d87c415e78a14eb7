"""Every objective on the same pairs in one table; and evaluations of several seeds in one table.

    python -m tests.compare                                       the whole comparison; goes on where it stopped
    python -m tests.compare --bias 0.9 --seeds 0 --recipes control bidpo      a part of it
    python -m tests.compare --table --results .github/results     only the tables and the picture, here the lab report's
    ... --bias 0 --seeds 0                                        of one unit, including recipes that it alone has
    python -m tests.compare --eval out-0 out-1 out-2              evaluations, one a seed: figures, and the habits' table
    python -m tests.compare --eval out-0/eval.json ...            the figures alone; result files do as well

A unit is one benchmark (--bias) and one seed: its own data, SFT model and pairs. Units share the image tokenizer and the
finding reader; recipes share everything else. Each unit's figures, a part of its eval.json, and the picture go to --results,
the tables to standard output. The lab report's are in .github/results. Hours on two cores; two units run side by side in two
shells with OMP_NUM_THREADS=1. Only the programs' own functions do the work."""

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch

import dpo
import sample
import sft
import vqgan
from data import PHRASES, Phantoms, names_and_sides, open_data, read_findings
from model import UserError, cli, init_run, other_flags, read_log, read_progress, run, write_text

TABLE = {"control": "--objective sft", "dpo": "--objective dpo", "bidpo": "", "mdpo": "--objective mdpo",
         "mfpo": "--objective mfpo", "napo": "--objective napo", "rndpo": "--objective rndpo"}
without = lambda *terms: " ".join(f"--{term.replace('_', '-')}-weight 0" for term in terms)
# bidpo with fewer terms, and what the papers claim. On these pairs mdpo is mfpo without its curriculum; mask-dpo is rndpo
# without its normalisation, at DPO's β.
STRICT = without("text_given", "image_given", "answer", "answer_given", "anchor") + " --image-weight 1 --text-weight 1"
CLAIMS = {"bidpo-strict": STRICT,
          "bidpo-strict-injected": STRICT + " --distort add --rejected twin",      # the true report with a finding put in
          "bidpo-injected": "--distort add --rejected twin",
          "bidpo-reading": without("image", "image_given", "answer", "answer_given"),
          "bidpo-drawing": without("text", "text_given", "answer", "answer_given"),
          "bidpo-answering": without("text", "text_given", "image", "image_given"),
          **{f"{o}-b05": f"--objective {o} --beta 0.5" for o in ("dpo", "mdpo", "napo")},
          "dpo-biased": "--objective dpo --rejected distorted habit no-question",  # napo's reports without its loss
          "napo-bce": "--objective napo --q-max 0.001",                            # q fixed at its least: −log σ
          "napo-agreeing": "--objective napo --keep-agreeing",
          "napo-bce-agreeing": "--objective napo --keep-agreeing --q-max 0.001",
          **{f"mdpo-{order}": f"--objective mdpo --curriculum {order}" for order in ("hard-first", "shuffled")},
          **{f"mdpo-own-{k}": f"--objective mdpo --rejected own --candidates 1 --distort {k}"
             for k in ("remove", "region-noise", "crop", "noise")},
          **{f"{o}-flip30": f"--objective {o} --flip-pairs 0.3" for o in ("dpo", "napo")},
          "cdpo-flip30": "--objective dpo --flip-pairs 0.3 --label-smoothing 0.3",
          **{f"rndpo-judge{p}": f"--objective rndpo --judge-noise 0.{p}" for p in (2, 4)},
          **{f"rndpo-random-judge{p}": f"--objective rndpo --mining random --judge-noise 0.{p}" for p in (0, 2, 4)},
          **{f"mask-dpo-judge{p}": f"--objective rndpo --no-normalise --beta 0.1 --judge-noise 0.{p}" for p in (0, 2, 4)}}
RECIPES = TABLE | CLAIMS
# What the claims compare with each other, not with the control: their paired differences are kept too.
VERSUS = [pair.split() for pair in (
    "bidpo-strict bidpo", "bidpo-strict-injected bidpo-strict", "bidpo-injected bidpo", "bidpo-reading bidpo",
    "bidpo-drawing bidpo", "bidpo-answering bidpo", "mfpo mdpo", "mfpo mdpo-shuffled",
    "mfpo mdpo-hard-first", "napo dpo", "napo dpo-biased", "napo napo-bce", "napo-agreeing napo-bce-agreeing",
    "mdpo-own-region-noise mdpo-own-crop", "mdpo-own-crop mdpo-own-noise", "mdpo-own-region-noise mdpo-own-noise",
    "mdpo-own-remove mdpo-own-region-noise", "dpo-flip30 dpo", "napo-flip30 napo", "napo-flip30 dpo-flip30",
    "napo-flip30 cdpo-flip30", "cdpo-flip30 dpo-flip30", "rndpo mask-dpo-judge0", "rndpo-judge4 rndpo",
    "mask-dpo-judge4 mask-dpo-judge0", "rndpo-judge4 mask-dpo-judge4")]
READING = {"companion": "companion hallucination ↓", "chair_i": "CHAIR_i ↓", "chair_s": "CHAIR_s ↓", "recall": "recall",
           "f1": "finding F1", "laterality": "wrong side ↓"}
ROWS = {f"report/{d}/{m}": f"{title}, {how}" for m, title in READING.items()
        for d, how in (("greedy", "greedy"), ("t1.0", "T = 1"))} | {
    "report/greedy/exact": "exact finding sets, greedy", "report/greedy/distinct": "distinct reports, greedy",
    "ask/accuracy": "questions right", "ask/companion": "companion affirmed when asked ↓",
    "segment/dice": "Dice, all structures", "segment/dice_large": "Dice, large structures",
    "held_out/text": "held-out pairs: log-ratio of report less rejected report, nats",
    "held_out/text_given": "held-out pairs: log-ratio of report given its image less given the twin, nats",
    "generate/cfg1/f1": "text→image F1, no guidance", "generate/cfg1.5/f1": "text→image F1, guidance 1.5",
    "generate/cfg1.5/extra": "text→image extra ↓", "generate/cfg1.5/missing": "text→image missing ↓",
    "generate/cfg1.5/frechet": "text→image Fréchet distance ↓", "drift/text_chosen": "drift of log π(report), nats",
    "drift/image_chosen": "drift of log π(image), nats", "seconds": "seconds of the training loop"}
CURVE = [f"report/t0.5/{m}" for m in ("companion", "chair_i", "recall")]        # for the picture alone
TO_CONTROL = ["report/greedy/companion", "report/t1.0/companion", "report/greedy/chair_i", "report/t1.0/chair_i",
              "report/greedy/recall", "generate/cfg1/f1"]
README_ROWS = ["report/greedy/companion", "report/greedy/chair_i", "report/greedy/recall", "ask/companion", "ask/accuracy",
               "generate/cfg1.5/f1", "generate/cfg1.5/frechet", "segment/dice"]
BETWEEN = [*TO_CONTROL[:3], "report/greedy/recall", "segment/dice"]
OF_CLAIMS = [*BETWEEN[:4], "ask/companion", "ask/accuracy", "generate/cfg1/f1", "generate/cfg1.5/f1", "segment/dice"]
THERE = "companion there, and rightly stated"


def run_unit(out, shared, bias, seed, recipes, preset, compiled=False):
    """Train and evaluate the recipes of one unit; what is already there is kept. Returns its results."""
    flags = ["--out", str(out), "--preset", preset]
    data = ["--bias", str(bias), "--seed", str(seed), *["--compile"] * compiled]
    wanted = {name: [*flags, *data, *RECIPES[name].split(), "--name", name, "--resume"] for name in recipes}
    for name in [n for n in recipes if (out / n).exists()]:
        check_kept(out / name, wanted[name])
    borrow(shared / "vqgan", out / "vqgan")
    if not (out / "vqgan").exists():
        vqgan.main([*flags, "--seed", "0", "--resume"])
        borrow(out / "vqgan", shared / "vqgan")
    if not (out / "sft").exists():
        sft.main([*flags, *data, "--resume"])
    for name in recipes:
        if not (out / name).exists():
            dpo.main(wanted[name])
    borrow(shared / "reader", out / "reader")
    sample.main([*flags, "--bias", str(bias), "--seed", "7", *([] if preset == "tiny" else ["--n", "2000"])])
    borrow(out / "reader", shared / "reader")
    results = gather_results(out)
    margins = held_out_margins(cli(dpo.DPOConfig, dpo.PRESETS, [*flags, *data]), [n for n in results if n != "sft" and (out / n).is_dir()])
    return {name: found | margins.get(name, {}) for name, found in results.items()}


def held_out_margins(cfg, names, n=400):
    """How far each model of cfg.out prefers, more than SFT, what stage 2 taught to prefer, on pairs from validation phantoms:
    {name: {"held_out/CONTRAST": {"value": mean log-ratio in nats, without β}}}, CONTRAST text or text_given (claim 3)."""
    device, autocast = init_run(cfg)
    model, vocab, vqgan = dpo.load_sft(cfg, device)
    val, sequences = open_data(cfg)["val"], ("text_chosen", "text_rejected", "text_given")
    records = [val[i] for i in range(min(n, len(val)))]
    n = len(records)
    cfg = dataclasses.replace(cfg, pairs=n, candidates=1)
    pairs = dpo.build_pairs(records, sft.encode_records(records, range(n), vqgan, cfg.seed, autocast), cfg, vqgan, None, autocast)
    with autocast():
        for pair, text in zip(pairs, dpo.sample_reports(pairs, "distorted", model, vocab, cfg, cfg.seed)):
            pair.reports["distorted"] = text
    dpo.set_responses(pairs, cfg)
    score = lambda model: dpo.sum_reference_logps(model, pairs, sequences, vocab, cfg, autocast)
    reference, every, found = score(model), torch.arange(len(pairs)), {}
    keep = {k: torch.tensor(v) != 0 for k, v in dpo.pairs_that_count(pairs, cfg, PHRASES).items()}
    for name in names:
        ratios = dpo.log_ratios(score(sft.load_gpt(Path(cfg.out) / name, vqgan, device)[0]), reference, every)
        margins = {c: ratios["text_chosen"].whole - ratios[dpo.CONTRASTS[c][1]].whole for c in ("text", "text_given")}
        found[name] = {f"held_out/{c}": {"value": round(m[keep[c]].mean().item(), 3)} for c, m in margins.items()}
    return found


def check_kept(folder, wanted):
    """Raise UserError if a recipe's folder was made with other flags than wanted: its figures are not the recipe's."""
    if not (folder / "state.safetensors").exists():
        raise UserError(f"{folder} holds no state.safetensors that tells its flags; move it away or name another --out")
    cfg = cli(dpo.DPOConfig, dpo.PRESETS, wanted, None, ("objective", dpo.OBJECTIVE_DEFAULTS))
    progress = read_progress(folder)
    if other := other_flags(progress, cfg) + ["--steps"] * (progress.get("step") != cfg.steps):
        raise UserError(f"{folder} was made with other values of {', '.join(other)}; move it away or name another --out")


def borrow(source, target):
    """Copy a folder that units share, unless it is there or there is none."""
    if source.exists() and not target.exists():
        new = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.copytree(source, new)
        os.replace(new, target)


def gather_results(out):
    """What the tables show of a unit's eval.json, in its format; drift, seconds and the differences of VERSUS besides."""
    written = json.loads((out / "eval.json").read_text())
    results = {n: {k: found[k] for k in (*ROWS, *CURVE) if k in found} for n, found in written.items() if n != "vqgan"}
    for name in [n for n in results if n != "sft" and " minus " not in n]:
        rows = read_log(out / f"{name}.jsonl")[-5:]             # drift: over the last log lines, as one batch is noisy
        drift = {k: round(float(np.mean([r[k] for r in rows])), 3) for k in rows[-1] if k.startswith("drift/")}
        results[name] |= {k: {"value": v} for k, v in (drift | {"seconds": rows[-1]["seconds"]}).items()}
    for a, b in [pair for pair in VERSUS if results.keys() >= set(pair)]:
        found = sample.difference(*(sample.read_kept(out / "eval" / f"{n}.safetensors") for n in (a, b)))
        results[f"{a} minus {b}"] = {k: found[k] for k in ROWS if k in found}
    return results


def write_results(path, results):
    """Write a result file, its folder with it; a line an entry, so that changes can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, separators=(",", ":")).replace("},", "},\n") + "\n")


def read_results(folder):
    """{bias: {seed: results}} of every unit's file in the folder."""
    found = {}
    for path in sorted(folder.glob("bias*-seed*.json")):
        bias, seed = path.stem[4:].split("-seed")
        found.setdefault(float(bias), {})[int(seed)] = json.loads(path.read_text())
    return found


def read_written(folder, name):
    """The content of a JSON file that sample.py writes to a folder."""
    try:
        return json.loads((folder / name).read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder / name} is not there or no JSON; run `python sample.py --out {folder}` first")


def read_evaluation(path):
    """The content of an eval.json, named itself or by its folder, or of a result file."""
    found = read_written(path, "eval.json") if path.is_dir() else read_written(path.parent, path.name)
    if not {"sft", "control"} <= found.keys():
        raise UserError(f"{path} lacks the figures of sft or control; train them there (`python dpo.py --objective sft`) "
                        "and run `python sample.py` again")
    return found


def markdown(header, rows, n_left=0):
    """Markdown of a table from lists of strings: the first and the n_left last columns to the left, the others right.

    Rows of nothing but dashes are left out."""
    n_right = len(header) - 1 - n_left
    shown = [row for row in rows if any(cell.strip("- ") for cell in row[1:])]
    lines = [" | ".join(cells) for cells in (header, ["---"] + ["---:"] * n_right + ["---"] * n_left, *shown)]
    return "\n".join(f"| {line} |" for line in lines)


def entries_of(units, name, metric):
    """Each seed's entry of one metric of a model or difference; None where it has none or nothing could be counted."""
    found = [u.get(name, {}).get(metric) for u in units]
    return [entry if entry and entry["value"] is not None else None for entry in found]


def is_sure(difference):
    """Whether the 95 % interval of a difference excludes 0; False of one that was not measured."""
    return difference is not None and difference["low"] is not None and difference["low"] * difference["high"] > 0


def mean_cell(units, name, metric, marked=False):
    """The mean over seeds as text, "-" where one has no value; marked as `means_table` says."""
    found = entries_of(units, name, metric)
    if None in found or not found:
        return "-"
    whole = metric.endswith(("distinct", "frechet")) or metric == "seconds"
    text = f"{np.mean([e['value'] for e in found]):.{0 if whole else 1 if metric.startswith('drift/') else 3}f}"
    falls = {d["value"] < 0 if is_sure(d) else None for d in entries_of(units, f"{name} minus control", metric)}
    mark = "" if not marked or len(falls) > 1 or None in falls else "**" if falls == {"↓" in ROWS[metric]} else "~~"
    return mark + text + mark


def means_table(units, names):
    """Markdown of one benchmark: a metric a row, a recipe a column, the mean over seeds.

    Where the paired 95 % interval of the difference to the control excludes 0, on one side, in every seed: bold if
    the recipe is better, struck through if it is worse (↓ marks metrics that should fall)."""
    names = [n for n in ("sft", *names) if all(n in u for u in units)]
    rows = [[title, *(mean_cell(units, n, metric, marked=True) for n in names)] for metric, title in ROWS.items()]
    return markdown(["metric", *names], rows)


def recipes_table(units, names):
    """Markdown of one benchmark for many recipes: a recipe a row, a few metrics, the mean over seeds; marks as in means_table."""
    names = [n for n in ("sft", *names) if all(n in u for u in units)]
    rows = [[n, *(mean_cell(units, n, metric, marked=True) for metric in OF_CLAIMS)] for n in names]
    return markdown(["recipe", *(ROWS[metric] for metric in OF_CLAIMS)], rows)


def readme_table(found):
    """Markdown: a few rows of both benchmarks, SFT, control and bidpo; marks as in means_table."""
    seeds = [list(found.get(bias, {}).values()) for bias in (0.9, 0.0)]
    rows = [[ROWS[metric], *(mean_cell(units, name, metric, marked=True) for units in seeds for name in ("sft", "control", "bidpo"))]
            for metric in README_ROWS]
    return markdown(["metric", "SFT", "control", "bidpo", "no bias: SFT", "control", "bidpo"], rows)


def differences_table(units, names, metrics=TO_CONTROL):
    """Markdown: the difference of each recipe to the control, seed by seed, with its paired 95 % interval.

    A name "a minus b" stands for the difference between these two."""
    show = lambda d: f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" if d else "-"
    pairs = [n if " minus " in n else f"{n} minus control" for n in names]
    rows = [[pair.replace(" minus ", " − "), *("<br>".join(map(show, entries_of(units, pair, m))) for m in metrics)]
            for pair in pairs if all(pair in u for u in units)]
    return markdown(["difference", *(ROWS[m] for m in metrics)], rows, n_left=len(metrics))


def compared_models(evaluations):
    """The models whose figures are shown: SFT, control and what all evaluations compare with it, the default first."""
    recipes = [name for name in evaluations[0] if all(f"{name} minus control" in e for e in evaluations)]
    return ["sft", "control", *sorted(recipes, key=lambda name: name != "bidpo")]


def figures_table(evaluations):
    """Markdown of evaluations, one a seed: means over seeds, then each recipe's difference to the control, seed by seed, in
    bold where the seed's paired 95 % interval excludes 0."""
    bold = lambda d: "**" if is_sure(d) else ""
    show = lambda d: f"{bold(d)}{d['value']:+.3f}{bold(d)}" if d else "-"
    names = compared_models(evaluations)
    rows = [[title, *(mean_cell(evaluations, n, metric) for n in names),
             *(" ".join(map(show, entries_of(evaluations, f"{n} minus control", metric))) for n in names[2:])]
            for metric, title in ROWS.items()]
    titles = [f"{n} − control, by seed" for n in names[2:]]
    return markdown(["metric", "SFT", *names[1:], *titles], rows, n_left=len(titles))


def cases_by_habit(records):
    """{habit: [(index of the record, companion), ...]}, a trigger each; apart where the finding is there on another side."""
    cases = {}
    for i, record in enumerate(records):
        for trigger, companion, there in sample.triggers_of(record):
            elsewhere = companion.name in {f.name for f in record.findings}
            habit = f"{trigger.name} → {companion.name}" + ", shown on the wrong side" * elsewhere
            cases.setdefault(THERE if there else habit, []).append((i, companion))
    return cases


def habits_table(folders, seed=7):
    """Markdown: for how many of the triggers without their companion the greedy report states it, all seeds together; last,
    those with their companion. The folders were evaluated on the test phantoms of `sample.py --seed`."""
    names = compared_models([read_evaluation(folder) for folder in folders])
    read = lambda folder, name: [names_and_sides(read_findings(said["caption"], PHRASES))
                                 for said in read_written(folder, f"eval/{name}.captions.json")]
    stated = {name: [read(folder, name) for folder in folders] for name in names}
    records = list(Phantoms("test", len(stated["sft"][0]), bias=0, seed=seed))
    for folder in folders:
        if [r["caption"] for r in read_written(folder, "references.json")["annotations"]] != [r.text for r in records]:
            raise UserError(f"{folder} was not evaluated on the {len(records)} test phantoms of `sample.py --seed {seed}`; "
                            f"name {folder / 'eval.json'} to see its figures alone")
    cases = cases_by_habit(records)
    count = lambda name, habit: sum(names_and_sides([companion]) <= reports[i]
                                    for reports in stated[name] for i, companion in cases[habit])
    order = sorted(cases.keys() - {THERE}, key=lambda habit: (-count("sft", habit), habit))
    cases["all"] = [case for habit in order for case in cases[habit]]
    share = lambda k, n: f"{k} ({k / n:.2f})" if n else "-"
    rows = [[habit, str(n := len(folders) * len(cases[habit])), *(share(count(name, habit), n) for name in names)]
            for habit in (*order, "all", *({THERE} & cases.keys()))]
    return markdown(["habit", "cases", "SFT", *names[1:]], rows)


def picture(found, names):
    """Hallucination against recall over temperature (greedy, 0.5, 1), one line a recipe, one panel a metric."""
    panels, units = [], [u for seeds in found.values() for u in seeds.values()]
    names = sorted(("sft", *names), key=lambda n: sum(n not in u for u in units))      # what is in all panels: one colour
    for bias, seeds in sorted(found.items(), reverse=True):
        for metric, title in (("companion", "companion hallucination"), ("chair_i", "CHAIR_i")):
            series = {}
            for name in [n for n in names if all(n in u for u in seeds.values())]:
                points = np.array([[[u[name][f"report/{d}/{m}"]["value"] for u in seeds.values()]
                                    for m in ("recall", metric)] for d in ("greedy", "t0.5", "t1.0")], float).mean(2)
                if np.isfinite(points).all():
                    series[name] = points.tolist()
            if series:
                panels.append(sample.plot(f"{title}, bias {bias:g}", "recall: greedy (right), T = 0.5, T = 1", series, marked=True))
    return sample.in_columns(panels)


def print_evaluations(paths):
    """The figures of evaluations, one a seed; if all are named by their folders, the habits below."""
    print(figures_table([read_evaluation(path) for path in paths]))
    if all(path.is_dir() for path in paths):
        print(f"\n{habits_table(paths)}")


def print_units(found):
    """The README's table, and those of every benchmark in {bias: {seed: results}}."""
    print(readme_table(found))
    for bias, seeds in sorted(found.items(), reverse=True):
        units = list(seeds.values())
        print(f"\n--bias {bias:g}, seeds {' '.join(map(str, seeds))}")
        print(f"\n{means_table(units, TABLE)}\n\n{differences_table(units, TABLE)}")
        if any(all(n in u for u in units) for n in CLAIMS):
            print(f"\n{recipes_table(units, RECIPES)}")
        if between := [n for n in (f"{a} minus {b}" for a, b in VERSUS) if all(n in u for u in units)]:
            print(f"\n{differences_table(units, between, BETWEEN)}")


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out-compare"), help="folder of the runs (default: out-compare)")
    parser.add_argument("--results", type=Path, help="folder of the result files (default: results, in --out)")
    parser.add_argument("--bias", type=float, nargs="+", default=[0.9, 0.0], help="benchmarks (default: 0.9 0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--recipes", nargs="+", default=list(TABLE), choices=RECIPES, metavar="NAME",
                        help="recipes; by default " + " ".join(TABLE) + "; to test the papers' claims " + " ".join(CLAIMS))
    parser.add_argument("--preset", default="small", choices=("tiny", "quick", "small"),
                        help="tiny: seconds, for tests; quick: about a minute a recipe (default: small)")
    parser.add_argument("--compile", action="store_true", help="compile the GPT's blocks, as sft.py and dpo.py do")
    parser.add_argument("--table", action="store_true", help="train nothing, show what the results hold")
    parser.add_argument("--eval", type=Path, nargs="+", metavar="PATH",
                        help="train nothing, show evaluations, one a seed: folders of sample.py, eval.json or result files")
    cfg = parser.parse_args(argv)
    if cfg.eval:
        return print_evaluations(cfg.eval)
    cfg.results = cfg.results or cfg.out / "results"
    for seed in [] if cfg.table else cfg.seeds:
        for bias in cfg.bias:
            unit = f"bias{bias:g}-seed{seed}"
            results = run_unit(cfg.out / unit, cfg.out / "shared", bias, seed, cfg.recipes, cfg.preset, cfg.compile)
            path = cfg.results / f"{unit}.json"
            write_results(path, (json.loads(path.read_text()) if path.exists() else {}) | results)
    everything = read_results(cfg.results)
    found = {b: {s: everything[b][s] for s in cfg.seeds if s in everything[b]} for b in cfg.bias
             if any(s in everything.get(b, {}) for s in cfg.seeds)}
    if not found:
        raise UserError(f"{cfg.results} holds no such result yet; run this without --table first, or name other --results")
    print_units(found)
    picture(everything, TABLE).save(cfg.results / "compare.png")


if __name__ == "__main__":
    run(main)
