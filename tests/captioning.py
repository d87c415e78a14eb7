"""Full fine-tuning against LoRA, as a captioning study compared them (IEEE ICMI 2025, document 11141312).

    python -m tests.captioning --base out                       adapt out/sft to phantoms of other patients, without language bias
    python -m tests.captioning --base out --data DIR            ... to a folder of images and captions
    python -m tests.captioning --table --results .github/results         the README's tables, from captioning.json

LoRA needs something to adapt, so every method starts from one model trained on phantoms (--base, its image tokenizer
included) and sees the same images and reports for the same number of steps; questions, masks and drawings are left
out. Each run is a process of its own, so that its peak memory can be told. Runs that are there are not repeated.
The methods take turns within a seed, so that what else the machine does hits all of them."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import sample
import sft
from model import UserError, folder_hash, init_run, read_log, read_tensors, run, write_text
from tests.compare import write_results

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {"full": ["--lr", "2e-3", "--muon-lr", "1e-2"], "LoRA q,v": ["--lora-rank", "8", "--lr", "4e-3"],
           "LoRA all": ["--lora-rank", "8", "--lr", "4e-3", "--lora-targets", *LINEARS]}
REPORTS = ["--report-share", "1", "--generate-share", "0", "--ask-share", "0", "--segment-share", "0", "--batch-size", "32"]
ROWS = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "meteor": "METEOR", "cider": "CIDEr",
        "f1": "finding F1", "chair_i": "CHAIR_i ↓", "modality": "modality right", "body_part": "body part right",
        "trained": "trained parameters", "memory": "peak memory of the process, MB", "step": "seconds a step"}


def adapt(folder, flags):
    """Run sft.py in a process of its own; what it cost: {trained, memory, step}."""
    process = subprocess.Popen([sys.executable, sft.__file__, "--out", folder, *flags], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{folder}: sft.py stopped with status {os.waitstatus_to_exitcode(status)}, its message stands above")
    written = next(f for n in ("adapter_model", "model") if (f := folder / "sft" / f"{n}.safetensors").exists())
    row = read_log(folder / "sft.jsonl")[-2]                 # the last one comes after the validation
    return {"trained": sum(t.numel() for t in read_tensors(written).values()), "memory": usage.ru_maxrss / 1024,
            "step": row["seconds"] / (row["step"] + 1)}


def measure(folder, bench, vqgan, device, autocast):
    """What the model of a folder writes of the test images, greedily: {metric: value}."""
    model, vocab = sft.load_gpt(folder, vqgan, device)
    with autocast():
        found = sample.evaluate_reports(model, vocab, bench)[0]
    return {k: found[f"report/greedy/{k}"][0] for k in ROWS if f"report/greedy/{k}" in found}


def name_of(cfg):
    """The folder's name, or "phantoms"."""
    return Path(cfg.data).resolve().name if cfg.data else "phantoms"


def compare(cfg):
    """{method: {metric: [value, one a seed]}} on one data set; "before" is the base as it was."""
    bench_cfg = sample.SampleConfig(data=cfg.data, out=str(cfg.base), seed=7, bias=0.0, n=cfg.n, records=cfg.records,
                                    judge_steps=1)         # a judge of drawings, which there are none of
    device, autocast = init_run(bench_cfg)
    vqgan = sample.load_tokenizer(bench_cfg, device)
    shape = ["--image-size", bench_cfg.image_size, "--channels", bench_cfg.channels]
    costs, base = {}, folder_hash(cfg.base / "sft")
    for seed in cfg.seeds:        # all training first: a process starts with the peak memory of the one that calls it
        for method, own in METHODS.items():
            folder = cfg.out / f"{name_of(cfg)} {method} {seed}".replace(" ", "-")
            flags = ["--init", cfg.base / "sft", "--preset", cfg.preset, "--data", cfg.data, "--bias", 0, *shape, *REPORTS, *own,
                     "--records", cfg.records, "--steps", cfg.steps, "--val-every", cfg.steps,
                     "--seed", 100 + seed]                 # phantoms are drawn from the seed: other patients than the base's
            path, recipe = folder / "cost.json", {"base": base, "flags": list(map(str, flags))}
            kept = json.loads(path.read_text()) if path.exists() else {}
            if any(kept.get(k) != v for k, v in recipe.items()):
                kept = adapt(folder, recipe["flags"]) | recipe
                write_text(path, json.dumps(kept) + "\n")
            costs[folder] = method, kept
    bench = sample.make_benchmark(dataclasses.replace(bench_cfg, out=str(cfg.out)), vqgan, device, autocast)
    results = {"before": {k: [v] for k, v in measure(cfg.base / "sft", bench, vqgan, device, autocast).items()}}
    for folder, (method, cost) in costs.items():
        for metric, value in (cost | measure(folder / "sft", bench, vqgan, device, autocast)).items():
            if metric in ROWS:
                results.setdefault(method, {}).setdefault(metric, []).append(round(value, 5))
    return results


def table(results):
    """Markdown: a metric a row, a method a column; the mean over seeds and, in brackets, the least and the greatest."""
    lines = ["| metric | " + " | ".join(results) + " |", "| --- |" + " ---: |" * len(results)]
    for metric, title in ROWS.items():
        show = lambda v: f"{v:,.0f}" if metric in ("trained", "memory") else f"{v:.3f}"
        cells = []
        for values in (found.get(metric) for found in results.values()):
            span = f" [{show(min(values))}, {show(max(values))}]" if values and len(set(values)) > 1 else ""
            cells.append(show(np.mean(values)) + span if values else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("out"), help="folder whose vqgan and sft are adapted (default: out)")
    parser.add_argument("--data", default="", help="folder of images and captions; empty: phantoms of other patients")
    parser.add_argument("--out", type=Path, default=Path("out-captioning"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of captioning.json (default: --out)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default: 200)")
    parser.add_argument("--records", type=int, default=4000, help="phantoms: training records (default: 4000)")
    parser.add_argument("--n", type=int, default=600, help="test records (default: 600)")
    parser.add_argument("--preset", default="small", choices=("tiny", "small"), help="tiny: seconds, for tests")
    parser.add_argument("--table", action="store_true", help="train nothing, show what the results hold")
    cfg = parser.parse_args(argv)
    path = (cfg.results or cfg.out) / "captioning.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not cfg.table:
        results[name_of(cfg)] = compare(cfg)
        write_results(path, results)
    if not results:
        raise UserError(f"{path} holds no result yet; run `python -m tests.captioning` without --table first, or name --results")
    for name, found in results.items():
        print(f"\n{name}\n\n{table(found)}")


if __name__ == "__main__":
    run(main)
