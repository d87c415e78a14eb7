"""Masks learned from few: the model draws more itself, a judge that errs ranks them, and RN-DPO or plain DPO prefers.

    python -m tests.masks --out out-masks                             three seeds, half an hour on two cores; skips seeds that are done
    python -m tests.masks --table --results .github/results           the lab report's table, from masks.json

This is the setting of RN-DPO (arXiv:2601.23222) at `--preset quick`: of 3,000 training phantoms 200 have masks, for
instruction tuning and rehearsal alike; proposals are drawn of 800. All runs but "labelled" have the same rehearsal (of its
2,400 sequences some 50 are masks of the labelled few), the preferences the mask term beside it. Three controls: that rehearsal alone
("control"); in its place masks of the labelled few alone, plain SFT ("labelled"); beside it plain SFT on the proposals that the
judge ranks first ("sft"). Margins of plain DPO are sums over all codes; its β is RN-DPO's divided by the mean number of codes in
which the pairs' masks differ: about equal strength. Dice is measured every 25 steps, on test phantoms of seed 7."""

import argparse
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

import dpo
import sample
import sft
from data import Phantoms, open_data
from model import cli, init_run, run
from tests.compare import is_sure, markdown, write_results
from vqgan import encode_images

LABELLED, STEPS, EVERY, BETA = 200, 150, 25, 5.0
SFT_FLAGS = "--report-share 0.3 --generate-share 0.1 --ask-share 0.1 --segment-share 0.5"      # else 200 masks are hardly learnt
MASKS_ALONE = dict.fromkeys(dpo.REHEARSAL, 0.0) | {"segment": 1.0}
RECIPES = dict.fromkeys(("control", "labelled"), "--objective sft --sft-weight 0") | {
    f"{loss}, {mining}, judge {noise:g}": f"--mining {mining} --judge-noise {noise} {flags}"
    for mining in ("top-bottom", "random") for noise in (0.0, 0.2, 0.4)
    for loss, flags in (("rndpo", f"--objective rndpo --sft-weight 0 --beta {BETA}"),
                        ("dpo", "--objective rndpo --sft-weight 0 --no-normalise --beta {matched}"),
                        ("sft", "--objective sft --sft-weight 1")) if (loss, mining) != ("sft", "random")}


def write_folder(folder, seed, size, sizes=(("train", 3000), ("validation", 300), ("test", 1000))):
    """Chest phantoms as a folder of images, in which only the first LABELLED of the training split have masks."""
    for split, n in sizes:
        (folder / split).mkdir(parents=True)
        rows = []
        bias, drawn_by = (0.9, seed) if split == "train" else (0, 7 if split == "test" else seed)
        for i, r in enumerate(Phantoms({"validation": "val"}.get(split, split), n, drawn_by, bias, size, modalities=1)):
            masks = {name: f"{i}-{name.replace(' ', '_')}.png" for name in (r.masks if split != "train" or i < LABELLED else ())}
            Image.fromarray(r.image).save(folder / split / f"{i}.png")
            for name, file in masks.items():
                Image.fromarray(r.masks[name] * np.uint8(255)).save(folder / split / file)
            rows.append({"file_name": f"{i}.png", "text": r.text, "modality": r.modality, "patient_id": r.subject, "masks": masks,
                         "findings": [{"name": f.name, "side": f.side} for f in r.findings],
                         "questions": [{"question": q, "answer": a} for q, a in r.questions]})
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def dice_of(cfg):
    """A function that measures a run's weights: parameters of the GPT -> Dice of one structure of each test record, (n,)."""
    device, autocast = init_run(cfg)
    gpt, vocab, tokenizer = dpo.load_sft(cfg, device)
    records = list(open_data(cfg)["test"])
    codes, rng = encode_images([r.image for r in records], tokenizer, autocast), np.random.default_rng(9)
    asked = [str(rng.choice(sorted(r.masks))) for r in records]

    def measure(parameters=None):
        for ours, theirs in zip(gpt.parameters(), parameters or ()):
            ours.data.copy_(theirs.data)
        with autocast():
            drawn = sft.draw_masks(gpt.eval(), vocab, tokenizer, codes, asked)
        return np.array([sft.dice(mask, r.masks[name]) for mask, r, name in zip(drawn, records, asked)])
    return measure


def train_measured(flags, measure, rehearsal=dpo.REHEARSAL):
    """Run dpo.py, its plain SFT on chosen masks, not reports and images; {step: Dice (n,)} at every saved state."""
    found, save_state, chosen = {}, dpo.save_state, ("mask_chosen",)

    def save_and_measure(folder, step, models, *args, **progress):
        save_state(folder, step, models, *args, **progress)
        found[step] = measure(models[0])

    with patch.multiple(dpo, save_state=save_and_measure, CHOSEN=chosen, chosen_of=lambda cfg: chosen, REHEARSAL=rehearsal):
        dpo.main(flags)
    return found


def config_of(flags):
    """The DPOConfig that dpo.py makes of these flags."""
    return cli(dpo.DPOConfig, dpo.PRESETS, flags, None, ("objective", dpo.OBJECTIVE_DEFAULTS))


def mean_omega(cfg):
    """In how many codes the two masks of a recipe's pairs differ, on average, where they do."""
    pairs = dpo.read_pairs(Path(cfg.out) / "pairs", 2 ** 15)
    dpo.set_responses(pairs, cfg)
    differing = [(p.masks[0] != p.masks[1]).sum() for p in pairs]
    return float(np.mean([n for n in differing if n]))


def run_seed(out, seed):
    """Train and measure every recipe of one seed: {recipe: {"dice": {step: mean}, "to_start" and others: differences}}."""
    data, size = out / f"phantoms{seed}", cli(dpo.DPOConfig, dpo.PRESETS, ["--preset", "quick"]).image_size
    if not data.exists():
        write_folder(out / f"phantoms{seed}.partial", seed, size)
        (out / f"phantoms{seed}.partial").rename(data)
    flags = ["--preset", "quick", "--seed", str(seed), "--data", str(data), "--out", str(out / f"seed{seed}")]
    if not (out / f"seed{seed}" / "sft").exists():
        sft.main([*flags, *SFT_FLAGS.split(), "--resume"])
    flags += ["--steps", str(STEPS), "--save-every", str(EVERY), "--distort", "other", "--candidates", "1", "--image-weight", "0"]
    measure = dice_of(config_of(flags))
    dice, bootstrap = {"sft": {0: measure()}}, sample.Bootstrap(1000, 1000)
    results = {"sft": {"dice": {"0": round(float(dice["sft"][0].mean()), 4)}}}
    for number, (name, recipe) in enumerate(RECIPES.items()):
        results[name] = {}
        if "{matched}" in recipe:
            results[name]["omega"] = omega = mean_omega(config_of([*flags, *recipe.format(matched=BETA).split()]))
            recipe = recipe.format(matched=round(BETA / omega, 3))
        dice[name] = found = train_measured([*flags, *recipe.split(), "--name", f"recipe{number}" if number else "control"], measure,
                                            MASKS_ALONE if name == "labelled" else dpo.REHEARSAL)
        last = bootstrap(found[STEPS])
        against = lambda other: sample.difference({"dice": last}, {"dice": bootstrap(other)})["dice"]
        results[name] |= {"dice": {str(s): round(float(d.mean()), 4) for s, d in found.items()},
                          "to_start": against(dice["sft"][0]), "to_control": against(dice["control"][STEPS])}
        if (same := f"rndpo, {name.partition(', ')[2]}") in RECIPES:        # of the same mining and judge
            results[name]["to_rndpo"] = against(dice[same][STEPS])
    return results


def table(found):
    """Markdown: a recipe a row, means over the seeds; differences by seed, bold where the 95 % interval excludes 0."""
    curve = lambda name, pick: np.mean([pick(list(u[name]["dice"].values())) for u in found.values()])
    bold = lambda d: "**" if is_sure(d) else ""
    show = lambda name, key: " ".join(f"{bold(d)}{d['value']:+.3f}{bold(d)}" for d in (u[name][key] for u in found.values()))
    rows = [[name, *(f"{curve(name, pick):.3f}" for pick in (max, lambda d: d[-1], lambda d: max(d) - d[-1])), show(name, "to_start"),
             show(name, "to_control") if name != "control" else "-",
             show(name, "to_rndpo") if name.startswith(("dpo", "sft")) else "-"] for name in RECIPES]
    return markdown(["recipe", "best", "last", "best − last", "last − SFT model, by seed", "last − control, by seed",
                     "last − rndpo's, by seed"], rows, n_left=3)


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out-masks"), help="folder of the runs (default: out-masks)")
    parser.add_argument("--results", type=Path, help="folder of masks.json (default: --out)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--table", action="store_true", help="train nothing, show what the results hold")
    cfg = parser.parse_args(argv)
    path = (cfg.results or cfg.out) / "masks.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for seed in [] if cfg.table else cfg.seeds:
        if str(seed) not in found:
            found[str(seed)] = run_seed(cfg.out, seed)
            write_results(path, found)
    print(table(found))
    omega = [u[name]["omega"] for u in found.values() for name in RECIPES if "omega" in u[name]]
    starts = [u["sft"]["dice"]["0"] for u in found.values()]
    print(f"\nSFT model {np.mean(starts):.3f} ({' '.join(f'{d:.3f}' for d in starts)}); codes that differ in a pair of masks: "
          + f"{min(omega):.1f} to {max(omega):.1f}")


if __name__ == "__main__":
    run(main)
