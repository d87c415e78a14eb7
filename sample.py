"""What people look at: reports, answers, masks and images from trained models, and how good they are.

    python sample.py                                  evaluate every model in out/, print the table, write
                                                      out/eval.json, out/samples.png, out/curves.png
                                                      and, for scorers elsewhere, in COCO's format
                                                      out/references.json, out/captions.json
    python sample.py report IMAGE ...                 write a report on each image file
    python sample.py ask IMAGE "QUESTION"             answer a question about an image
    python sample.py segment IMAGE "STRUCTURE"        draw a structure's mask, to out/segment.png
    python sample.py generate "TEXT"                  draw images for a report, to out/generate.png

Reports are scored against what is known to be in the image: CHAIR (arXiv:1809.02156) is the share of stated
findings that are not there, recall the share of true ones that are stated; stating little lowers both, so read both. Companion
hallucination is language bias made countable: of the triggers that test images show without their companion,
the share for which the report states the companion. Drawn images are read by a finding reader, a small classifier
trained on true images (phantoms: of other patients); its own F1 on true images stands beside. Not for clinical use.

The lesson, in order: what is measured, and how. For consultation: the finding reader; models on disk and the
evaluation as a program; pictures; one's own images.
"""

import contextlib
import dataclasses
import json
import math
import textwrap
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tqdm import tqdm

from data import (BODY_PHRASES, COMPANIONS, MODALITIES, MODALITY_PHRASES, Finding, Phantoms, ask_whether,
                  fingerprint, lexicon, match_findings, names_and_sides, open_data, read_findings, read_image,
                  read_term)
from model import (RunConfig, UserError, arg, batch_indices, cli, get_lr, init_run, load_folder, load_weights, put_in_place, read_json,
                   read_log, read_metadata, read_progress, read_tensors, refuse, run, save_folder, set_lr, take_step, to_device,
                   weights_hash, write_tensors, write_text)
from dpo import BOTH_WAYS, read_pairs
from sft import check_data, dice, draw_images, draw_masks, load_gpt, warn_of_other_data, write_answers, write_reports
from vqgan import VQGAN, encode_images, psnr, spread_indices, stack, to_images, to_pixels


@dataclass
class SampleConfig(RunConfig):
    """Flags of sampling and evaluation."""

    words: tuple = arg((), "nothing (evaluate), or: report IMAGE..., ask IMAGE QUESTION, segment IMAGE STRUCTURE, "
                       "generate TEXT", positional=True)
    model: str = arg("", "folder under --out to sample from, or whose reports captions.json gets; empty: bidpo if it is "
                     "there, else sft")
    n: int = arg(400, "test records in the evaluation; 2000 for figures to report")
    temperature: float = arg(0.7, "of drawn images, and of `report` and `ask` when --sample is given")
    sample: bool = arg(False, "report, ask: draw at --temperature instead of taking the likeliest words")
    top_k: int = arg(0, "keep only this many likeliest tokens (0: all)", least=0)
    top_p: float = arg(1.0, "keep only the likeliest tokens that make up this probability", most=1)
    guidance: float = arg(1.5, "guidance s of drawn images: uncond + s*(cond - uncond); 1: none")
    count: int = arg(4, "images to draw for `generate`")
    reader_steps: int = arg(500, "training steps of the finding reader")
    bootstrap: int = arg(1000, "resamples behind each 95 %% interval")


PRESETS = {"tiny": dict(n=12, reader_steps=20, bootstrap=50), "quick": dict(n=500, reader_steps=200), "small": {}, "base": {}}


# ---- The lesson: figures with intervals ----------------------------------------------------------

class Metric(NamedTuple):
    """One figure over test records."""

    value: float
    resampled: np.ndarray        # (R,) the figure on each of R bootstrap resamples of the records; empty where there are none
    n: int                       # records that count


class Bootstrap:
    """Metrics of the form sum(numerator) / sum(denominator) over the same n records, with resamples for intervals.

    All models share the weights (R, n), how often each resample holds each record, so differences are paired."""

    def __init__(self, n, resamples):
        self.n, self.weights = n, np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32)

    def __call__(self, numerator, denominator=None):
        """The Metric of per-record counts, each (n,); without a denominator a mean."""
        numerator = np.asarray(numerator, np.float32)
        denominator = np.ones(self.n, np.float32) if denominator is None else np.asarray(denominator, np.float32)
        with np.errstate(invalid="ignore"):              # 0 / 0 is nan: of no record, no figure
            value, resampled = numerator.sum() / denominator.sum(), (self.weights @ numerator) / (self.weights @ denominator)
        return Metric(float(value), resampled, int((denominator > 0).sum()))


def summarize(metric):
    """A Metric as eval.json has it: value, 95 % interval and the records that count."""
    resampled = metric.resampled[~np.isnan(metric.resampled)]
    low, high = np.percentile(resampled, (2.5, 97.5)) if len(resampled) else (math.nan, math.nan)
    clean = lambda v: None if math.isnan(v) else round(float(v), 5)
    return {"value": clean(metric.value), "low": clean(low), "high": clean(high), "n": metric.n}


def difference(a, b):
    """{name: summary} of model a minus model b, from both's {name: Metric} on the same resamples."""
    return {k: summarize(Metric(m.value - b[k].value, m.resampled - b[k].resampled, m.n))
            for k, m in a.items() if len(m.resampled) and k in b}


# ---- The lesson: what is counted -----------------------------------------------------------------

def triggers_of(record):
    """(trigger, its companion, whether that is in the image) for each trigger in a phantom; none for files."""
    found = [(f, COMPANIONS[f.name](f)) for f in record.findings if f.name in COMPANIONS] if record.spec else []
    return [(trigger, c, names_and_sides([c]) <= names_and_sides(record.findings)) for trigger, c in found]


def count_companions(stated, records):
    """Per record, (n,) each: how many triggers are shown without their companion, how many of these companions are stated."""
    absent, invented = np.zeros((2, len(records)))
    for i, (said, record) in enumerate(zip(stated, records)):
        missing = [(c.name, c.side) for _, c, there in triggers_of(record) if not there]
        absent[i], invented[i] = len(missing), len(names_and_sides(said) & set(missing))
    return absent, invented


def score_findings(stated, records, bootstrap, have=True):
    """CHAIR, recall, F1 and their kin of stated findings (one tuple a record) against the records'.

    `have` (n,), bool, are the records that count. Returns {name: Metric}."""
    counts = [match_findings(s, r.findings) for s, r in zip(stated, records)]
    column = lambda name: np.array([c[name] for c in counts], np.float32) * have
    ones = np.ones(len(records)) * have
    result = {"chair_i": bootstrap(column("hallucinated"), column("stated")),
              "chair_s": bootstrap(column("hallucinated") > 0, ones),
              "recall": bootstrap(column("right"), column("true")),
              "f1": bootstrap(2 * column("right"), column("stated") + column("true")),
              "laterality": bootstrap(column("laterality"), column("stated")),
              "exact": bootstrap(column("exact"), ones)}
    absent, invented = count_companions(stated, records)
    if absent.any():
        result["companion"] = bootstrap(invented, absent)
    return result


def frechet(a, b):
    """Fréchet distance between Gaussians fitted to two sets of features (n, D) (arXiv:1706.08500)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (Σ_a Σ_b)^½ from the eigenvalues of the product, which are real and not negative
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


# ---- The lesson: the evaluation, one function for each way to use a model ------------------------

@dataclass
class Benchmark:
    """The test records and all that evaluating a model on them needs."""

    records: list
    codes: np.ndarray        # (n, N) of the images
    pixels: torch.Tensor     # (n, C, H, W) in [-1, 1]
    phrases: dict            # finding -> the phrases that state it
    reader: "FindingReader | None"
    known: bool              # whether findings can be counted: the records' are known, and some are named
    bootstrap: Bootstrap
    cfg: SampleConfig
    data: str = ""           # fingerprints of the splits


def make_benchmark(cfg, vqgan, device, autocast):
    """The first n test records with everything that is computed once for all models."""
    data = open_data(cfg)
    warn_of_other_data(cfg, data["train"])
    reader, phrases = load_reader(data, cfg, device, autocast), lexicon(data["train"])
    n = min(cfg.n, len(data["test"]))
    records = [data["test"][i] for i in tqdm(range(n), desc="test images", leave=False)]
    images = [r.image for r in records]
    lacking = sum(r.findings is None for r in records)
    if phrases and lacking:
        tqdm.write(f"{lacking} of {n} test records have no `findings`: CHAIR, recall and F1, which need all, are left out")
    return Benchmark(records, encode_images(images, vqgan, autocast), to_pixels(stack(images, cfg.channels)).to(device), phrases,
                     reader, bool(phrases) and not lacking, Bootstrap(n, cfg.bootstrap), cfg, "".join(map(fingerprint, data.values())))


def evaluate_reconstruction(vqgan, bench):
    """PSNR and what the finding reader still sees, for the image tokenizer."""
    x = bench.pixels
    x_rec = vqgan.decode(torch.as_tensor(bench.codes, device=x.device).long())
    result = {"reconstruction/psnr": bench.bootstrap(psnr(x, x_rec).cpu())}
    for name, pixels in (("original", x), ("reconstructed", x_rec)) if bench.reader else ():
        seen, labels, _ = see_findings(bench.reader, pixels)
        for finding in ("", *sorted(bench.phrases)) if bench.known else ():                  # "": all of them
            only = lambda row: tuple(f for f in row if finding in ("", f.name))
            records = [dataclasses.replace(r, findings=only(r.findings)) for r in bench.records]
            f1 = score_findings([only(row) for row in seen], records, bench.bootstrap)["f1"]
            result[f"reconstruction/reader_f1_{name}" + f"/{finding}" * bool(finding)] = f1
        result |= {f"reconstruction/reader_{kind}_{name}": m for kind, m in score_terms(labels, bench).items()}
    return result


def score_terms(labels, bench, have=True):
    """Whether the finding reader sees each record's modality and body part, over the records that name one."""
    result = {}
    for kind in ("modality", "body_part"):
        has = np.array([bool(getattr(r, kind)) for r in bench.records]) & have
        if has.any():
            right = np.array([f"{kind}:{getattr(r, kind)}" in row for r, row in zip(bench.records, labels)])
            result[kind] = bench.bootstrap(right & has, has)
    return result


def evaluate_reports(model, vocab, bench):
    """Image -> report, greedy and sampled: ({name: Metric}, the greedy reports). "distinct": how many different reports.

    Modality and body part: of records whose own report names them."""
    result, greedy = {}, []
    if not any(r.text for r in bench.records):
        return result, greedy
    for decoding, temperature in (("greedy", 0.0), ("t0.5", 0.5), ("t1.0", 1.0)):
        texts = write_reports(model, vocab, list(bench.codes), temperature=temperature, seed=bench.cfg.seed)
        greedy = greedy or texts                             # those of the first decoding
        stated = [read_findings(t, bench.phrases) for t in texts]
        scores = score_findings(stated, bench.records, bench.bootstrap) if bench.known else {}
        for kind, terms in (("modality", MODALITY_PHRASES), ("body_part", BODY_PHRASES)):
            true = [t if (t := read_term(getattr(r, kind), terms)) == read_term(r.text, terms) else "" for r in bench.records]
            if any(true):
                scores[kind] = bench.bootstrap([bool(t) and read_term(s, terms) == t for s, t in zip(texts, true)],
                                               [bool(t) for t in true])
        scores["distinct"] = Metric(float(len(set(texts))), np.array([]), len(texts))
        result |= {f"report/{decoding}/{k}": m for k, m in scores.items()}
    return result, greedy


def evaluate_drawings(model, vocab, vqgan, bench, guidance):
    """Report -> image, read by the finding reader: extra is CHAIR_i, missing 1 − recall; cfg1.5: guidance of 1.5."""
    have, cfg = np.array([bool(r.text) for r in bench.records]), bench.cfg
    if not have.any() or bench.reader is None:
        return {}
    drawn = draw_images(model, vocab, vqgan, [r.text for r in bench.records], guidance, **decoding_of(cfg, cfg.temperature))
    findings, labels, features = see_findings(bench.reader, drawn)
    result = score_terms(labels, bench, have)
    if bench.known:
        scores = score_findings(findings, bench.records, bench.bootstrap, have)
        recall = scores["recall"]
        result |= {"f1": scores["f1"], "extra": scores["chair_i"],
                   "missing": Metric(1 - recall.value, 1 - recall.resampled, recall.n)}
    if have.sum() > 1:
        real = see_findings(bench.reader, bench.pixels)[2]
        result["frechet"] = Metric(frechet(features[have], real[have]), np.array([]), int(have.sum()))
    return {f"generate/cfg{guidance:g}/{k}": m for k, m in result.items()}


def decoding_of(cfg, temperature):
    """The flags of sampling as options of generate."""
    return dict(temperature=temperature, top_k=cfg.top_k, top_p=cfg.top_p, seed=cfg.seed)


def evaluate_answers(model, vocab, bench):
    """The share of right answers to one question a record; and the habit: of the triggers whose companion's finding is on
    neither side (the question names no side), the share for which, say, "Is there a pleural effusion?" is affirmed."""
    own = [(i, *r.questions[i % len(r.questions)]) for i, r in enumerate(bench.records) if r.questions]
    habit = [(i, ask_whether(MODALITIES[r.spec.modality][c.name], 0), "Yes.") for i, r in enumerate(bench.records)
             for _, c, _ in triggers_of(r) if c.name not in {f.name for f in r.findings}]
    bare, result = lambda answer: answer.lower().strip(" ."), {}
    for name, cases in (("ask/accuracy", own), ("ask/companion", habit)):
        said = write_answers(model, vocab, [bench.codes[i] for i, _, _ in cases], [question for _, question, _ in cases])
        asked, agreed = np.zeros((2, len(bench.records)))
        for (i, _, answer), text in zip(cases, said):
            asked[i] += 1
            agreed[i] += bare(text) == bare(answer)
        if cases:
            result[name] = bench.bootstrap(agreed, asked)
    return result


def evaluate_masks(model, vocab, vqgan, bench):
    """One structure a record, drawn from those with a pixel at this --image-size: Dice over all records, over those whose structure
    is large (5 % of the image or more), and of each structure."""
    rng = np.random.default_rng([bench.cfg.seed, 9])
    seen = [sorted(name for name, mask in r.masks.items() if mask.any()) for r in bench.records]
    names = np.array([str(rng.choice(s)) if s else "" for s in seen])
    have = np.flatnonzero(names)
    if not len(have):
        return {}
    drawn = draw_masks(model, vocab, vqgan, [bench.codes[i] for i in have], names[have].tolist())
    value, area = np.zeros((2, len(names)))
    for i, mask in zip(have, drawn):
        true = bench.records[i].masks[names[i]]
        value[i], area[i] = dice(mask, true), true.mean()
    groups = {"": names != "", "_large": area >= 0.05, **{f"/{s}": names == s for s in np.unique(names[have])}}
    return {f"segment/dice{end}": bench.bootstrap(value * group, group) for end, group in groups.items()}


# ---- For consultation: the finding reader --------------------------------------------------------

class FindingReader(nn.Module):
    """Image (B, C, H, W) to one logit a label: each finding with its side, each modality and body part."""

    def __init__(self, channels, labels):
        super().__init__()
        self.labels = labels
        block = lambda i, o: [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU(),
                              nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
        self.body = nn.Sequential(*block(channels, 32), *block(32, 64), *block(64, 64),
                                  nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64 * 8 * 8, 64), nn.ReLU())
        self.last = nn.Linear(64, len(labels))

    def forward(self, x):
        features = self.body(x)
        return self.last(features), features


def labels_of(record):
    """What a finding reader can learn of a record: finding/side, modality and body part, as strings."""
    labels = {f"finding:{f.name}:{f.side}" for f in record.findings or ()}
    return labels | {f"{k}:{getattr(record, k)}" for k in ("modality", "body_part") if getattr(record, k)}


def train_reader(records, folder, recipe, cfg, device, autocast):
    """Train a finding reader on true images and write it to folder; nothing where no record has a label."""
    labels = sorted(set().union(*(labels_of(r) for r in records)))
    if not labels:
        return
    images = stack([r.image for r in records], cfg.channels)
    targets = torch.tensor([[float(label in labels_of(r)) for label in labels] for r in records])
    torch.manual_seed(cfg.seed)
    reader = FindingReader(cfg.channels, labels).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.05)
    rng = np.random.default_rng(cfg.seed)
    for step in tqdm(range(cfg.reader_steps), desc="finding reader", unit="step", leave=False):
        set_lr([optimizer], get_lr(step, cfg.reader_steps, warmup=20))
        i = batch_indices(len(images), 64, step, cfg.seed)
        x = to_pixels(to_device(images[i], device))
        # soft and noisy images too: reconstructions and drawings are, and what they show still counts
        soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = torch.lerp(x, soft, float(rng.uniform(0, 1.2))) + float(rng.uniform(0, 0.15)) * torch.randn_like(x)
        with autocast():
            loss = F.binary_cross_entropy_with_logits(reader(x)[0].float(), to_device(targets[i], device))
        take_step(loss, reader.parameters(), [optimizer])
    save_folder(folder, {"kind": "reader", "labels": labels, **recipe}, reader.state_dict())


def read_reader(folder, recipe, device):
    """The finding reader of a folder; None if it is missing, damaged or of other flags."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        config, tensors = load_folder(folder, "sample.py", ("kind", "reader"))
        if recipe.items() <= config.items():
            labels = list(map(str, config["labels"]))
            return load_weights(lambda: FindingReader(config["channels"], labels), tensors, folder).to(device)


def load_reader(data, cfg, device, autocast):
    """The finding reader of cfg.out, trained first where there is none of this recipe; None without labels."""
    folder, train = Path(cfg.out) / "reader", data["train"]
    if isinstance(train, Phantoms):          # other patients than the models', and no bias
        train = Phantoms("reader", min(12000, cfg.records), cfg.seed, 0.0, cfg.image_size, cfg.modalities)
    recipe = {"data": fingerprint(train), "channels": cfg.channels, "image_size": cfg.image_size, "seed": cfg.seed,
              "steps": cfg.reader_steps}
    if reader := read_reader(folder, recipe, device):
        return reader
    records = [train[int(i)] for i in tqdm(spread_indices(len(train), 12000), desc="the reader's images", leave=False)]
    train_reader(records, folder, recipe, cfg, device, autocast)
    return read_reader(folder, recipe, device)


@torch.no_grad()
def see_findings(reader, x):
    """What the finding reader sees in images (n, C, H, W): findings a tuple each, all labels a set each, features."""
    logits, features = (torch.cat(t).float() for t in zip(*(reader(b) for b in x.split(256))))
    labels = [{label for label, on in zip(reader.labels, row) if on} for row in (logits > 0).tolist()]
    findings = [tuple(Finding(*n[8:].rsplit(":", 1)) for n in sorted(row) if n.startswith("finding:")) for row in labels]
    return findings, labels, features


# ---- For consultation: models on disk, and the evaluation as a program ---------------------------

def load_vqgan_of(cfg, device):
    """The image tokenizer of cfg.out; its size and channels become cfg's."""
    vqgan = VQGAN.from_pretrained(Path(cfg.out) / "vqgan", device)
    cfg.image_size, cfg.channels = vqgan.config.image_size, vqgan.config.channels
    return vqgan


def find_models(out):
    """Names of the GPT folders in out: sft and control first, then the others."""
    names = [p.parent.name for p in Path(out).glob("[!.]*/tokenizer.json") if p.parent.suffix != ".partial"]
    if not names:
        raise UserError(f"--out {out} holds no trained model; run `python dpo.py` first (it trains every stage), or name --out")
    return sorted(names, key=lambda n: (n != "sft", n != "control", n))


def warn_of_unlike(out, loaded):
    """Name the models of stage 2 that cannot be compared: their SFT model is not the one now in out/sft, or their data, steps,
    batch size, pairs or seed are not the control's."""
    conditions = lambda p: {"--steps": p["step"], **p.get("origin", {}), "--batch-size": p["flags"]["batch_size"],
                            "--pairs": p["flags"]["pairs"], "--seed": p["flags"]["seed"]}
    now, tuned = weights_hash(loaded["sft"][0]) if "sft" in loaded else "", {}
    for name in loaded:
        with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):   # one without its state says nothing
            if "objective" in (progress := read_progress(out / name))["flags"]:
                tuned[name] = progress
    for name, progress in tuned.items():
        own, its = (conditions(p) for p in (progress, tuned.get("control", progress)))
        if now and own.get("SFT model", now) != now:
            tqdm.write(f"{out / name} was trained from another {out / 'sft'} than is there now: train it again to compare them")
        if other := [what for what in own if its.get(what, own[what]) != own[what]]:
            tqdm.write(f"{out / name} and {out / 'control'} were trained with different {', '.join(other)}: their "
                       "difference has more than one cause")


def choose_model(cfg, names):
    """The one of names that --model asks for; unasked, bidpo if it is there, else the first."""
    name = cfg.model or ("bidpo" if "bidpo" in names else names[0])
    if name not in names:
        raise UserError(f"--model {name}: {cfg.out} holds {', '.join(names)}")
    return name


def coco_references(records):
    """The records' texts as caption annotations in COCO's format; records without text are left out."""
    have = [(i, r) for i, r in enumerate(records) if r.text]
    return {"info": {}, "licenses": [], "type": "captions", "images": [{"id": i, "file_name": r.name} for i, r in have],
            "annotations": [{"id": i, "image_id": i, "caption": r.text} for i, r in have]}


def write_kept(path, metrics, recipe):
    """Write {name: Metric} and the recipe that made them (a string), whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    values = json.dumps({k: [m.value, m.n] for k, m in metrics.items()})
    write_tensors(path, {k: torch.from_numpy(m.resampled) for k, m in metrics.items()}, {"recipe": recipe, "values": values})


def read_kept(path, recipe=None):
    """What write_kept wrote; None if there is nothing, another recipe made it or it is damaged."""
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        metadata, tensors = read_metadata(path), read_tensors(path)
        if recipe in (None, metadata["recipe"]):
            return {k: Metric(value, tensors[k].numpy(), n) for k, (value, n) in json.loads(metadata["values"]).items()}


def evaluate_model(name, model, vocab, vqgan, bench):
    """Every metric of one model, {name: Metric}; these and its greedy reports are kept in out/eval.

    A model is evaluated again only after a change: of weights, data, finding reader, flags or code."""
    cfg, path = bench.cfg, Path(bench.cfg.out) / "eval" / f"{name}.safetensors"
    flags = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("words", "model", "out", "device", "count")}
    code = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    recipe = json.dumps({"models": [weights_hash(m) for m in (model, vqgan, bench.reader) if m is not None],
                         "splits": bench.data, "code": zlib.crc32(code), **flags})
    captions = path.with_suffix(".captions.json")
    if (kept := read_kept(path, recipe)) and read_json(captions) is not None:
        return kept
    reports, texts = evaluate_reports(model, vocab, bench)
    result = {**reports, **evaluate_answers(model, vocab, bench), **evaluate_masks(model, vocab, vqgan, bench)}
    for guidance in (1.0, cfg.guidance):
        result |= evaluate_drawings(model, vocab, vqgan, bench, guidance)
    result = dict(sorted(result.items()))
    write_kept(path, result, recipe)
    said = [{"image_id": i, "caption": t} for i, (t, r) in enumerate(zip(texts, bench.records)) if r.text]
    write_text(captions, json.dumps(said) + "\n")
    return result


def evaluate(cfg):
    """Evaluate every model in cfg.out; write eval.json, captions and references, pictures; print the table."""
    out, names = Path(cfg.out), find_models(cfg.out)
    chosen = choose_model(cfg, names)
    device, autocast = init_run(cfg)
    vqgan = load_vqgan_of(cfg, device)
    loaded = {name: load_gpt(out / name, vqgan, device) for name in names}
    for name, (model, _) in loaded.items():
        check_data(model.config.data, cfg, out / name)
    warn_of_unlike(out, loaded)
    bench = make_benchmark(cfg, vqgan, device, autocast)
    with autocast():
        results = {"vqgan": evaluate_reconstruction(vqgan, bench)}
        for name, (model, vocab) in tqdm(loaded.items(), desc="evaluating", unit="model", leave=False):
            results[name] = evaluate_model(name, model, vocab, vqgan, bench)
    written = {name: {k: summarize(m) for k, m in result.items()} for name, result in results.items()}
    for name in [n for n in names if "control" in names and n not in ("sft", "control")]:
        written[f"{name} minus control"] = difference(results[name], results["control"])
    write_text(out / "eval.json", json.dumps(written, indent=1) + "\n")
    write_text(out / "references.json", json.dumps(coco_references(bench.records)) + "\n")
    write_text(out / "captions.json", (out / "eval" / f"{chosen}.captions.json").read_text())
    sheets = [contact_sheet(loaded, vqgan, bench, autocast)]
    if "sft" in loaded:
        sheets += pair_sheet(loaded["sft"][0], vqgan, bench)
    write_picture(in_columns(sheets, 1), out / "samples.png")
    preferred = names[-1] if chosen in ("sft", "control") else chosen           # these two have no preference curves
    write_picture(curves(out, preferred), out / "curves.png")
    print_table(written, names, bench)
    print(f"wrote {cfg.out}/eval.json, {cfg.out}/samples.png, {cfg.out}/curves.png; for other scorers "
          f"{cfg.out}/references.json and {cfg.out}/captions.json (greedy reports of {chosen})")


def print_table(written, names, bench):
    """One line a metric, one column a model, the differences to the control last. 95 % intervals in brackets: of the
    differences where there are any, else of the models (eval.json has all); * where a difference's excludes 0."""
    differences = [n for n in written if n.endswith(" minus control")]

    def show(m, name=""):
        if m is None or m["value"] is None:
            return "-"
        text = f"{m['value']:.3f}"
        if m["low"] is not None and (name in differences or not differences):
            text += f" [{m['low']:.3f}, {m['high']:.3f}]" + "*" * (name in differences and m["low"] * m["high"] > 0)
        return text

    print(f"\nimage tokenizer, n = {len(bench.records)}")
    width = max(map(len, written["vqgan"]), default=0) + 2
    print("".join(f"  {k:<{width}}{show(m)}\n" for k, m in written["vqgan"].items()))
    widths = {name: max(len(name), 8 if differences and name in names else 24) for name in (*names, *differences)}
    print("  ".join([f"{'metric':<28}", *(f"{name:<{w}}" for name, w in widths.items())]).rstrip())
    for metric in dict.fromkeys(k for name in names for k in written[name]):
        cells = [f"{show(written[name].get(metric), name):<{w}}" for name, w in widths.items()]
        print("  ".join([f"{metric:<28}", *cells]).rstrip())
    print(f"\nn = {len(bench.records)} test records; chair, companion, laterality, extra, missing, frechet: lower is better\n"
          "[95 % bootstrap interval; differences are paired]; * where a difference's excludes 0, for better or worse. Not for "
          "clinical use.")


# ---- For consultation: pictures ------------------------------------------------------------------

INK, GRID, PALE = (20, 20, 20), (222, 222, 222), (255, 255, 255)
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (140, 86, 75), (227, 119, 194),
           (127, 127, 127), (188, 189, 34), (23, 190, 207))


def write_picture(image, path):
    """A PIL image as PNG beside path, then renamed, as write_text does."""
    image.save(new := Path(f"{path}.new"), "PNG")
    put_in_place(new, path)


def tile(pixels, size):
    """One image (C, H, W) in [-1, 1] as a square PIL image."""
    return Image.fromarray(to_images(pixels).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()).resize((size, size))


def worth_showing(bench, model, vocab):
    """Four records to show: up to three on which the model states an absent companion, one per trigger, those with fewest
    findings first; then those with most findings."""
    records = bench.records
    fullest = sorted(range(len(records)), key=lambda i: -len(records[i].findings or ()))
    cases = [(i, trigger, c) for i in fullest[::-1] for trigger, c, there in triggers_of(records[i]) if not there][:100]
    said, fooled = write_reports(model, vocab, [bench.codes[i] for i, _, _ in cases]), {}
    for (i, trigger, c), text in zip(cases, said):
        if (c.name, c.side) in names_and_sides(read_findings(text, bench.phrases)):
            fooled.setdefault(trigger.name, i)
    return list(dict.fromkeys([*list(fooled.values())[:3], *fullest]))[:4]


TILE, COLUMN, LINE = 168, 236, 16            # pixels: an image, the column it stands in, a line of text


class Column(NamedTuple):
    """One column of a sheet: a title, and for each row an image, a text and what the text may state."""

    title: str
    pixels: torch.Tensor | None          # (n, C, H, W) in [-1, 1]
    texts: list                          # n strings
    true: list                           # n sets of (name, side), or None where that is not known


def coloured_lines(text, true, phrases):
    """A text as lines (words, colour). Red: sentences that state what is not true; orange, last: true findings it misses."""
    if not text:
        return []
    lines = []
    for sentence in text.replace(". ", ".\n").split("\n"):
        wrong = true is not None and not names_and_sides(read_findings(sentence, phrases)) <= true
        lines += [(line, COLOURS[1] if wrong else INK) for line in textwrap.wrap(sentence, 33)]
    missed = sorted((true or set()) - names_and_sides(read_findings(text, phrases)))
    return lines + [(line, COLOURS[4]) for name, side in missed
                    for line in textwrap.wrap("missed: " + f"{side} {name}".strip(), 33)]


def lay_out(columns, phrases):
    """A sheet of columns: in each row the images, the texts below."""
    n, font, title = max(len(c.texts) for c in columns), ImageFont.load_default(13), ImageFont.load_default(15)
    cells = [[coloured_lines(text, true, phrases) for text, true in zip(c.texts, c.true)] for c in columns]
    heights = [TILE + 14 + LINE * max(len(column[i]) for column in cells) for i in range(n)]
    sheet = Image.new("RGB", (COLUMN * len(columns), 26 + sum(heights)), PALE)
    pen = ImageDraw.Draw(sheet)
    for x, column, lines in zip(range(4, sheet.width, COLUMN), columns, cells):
        pen.text((x, 5), column.title, INK, title)
        for i, y in enumerate(np.cumsum([26, *heights[:-1]]).tolist()):
            if column.pixels is not None:
                sheet.paste(tile(column.pixels[i], TILE), (x, y))
                y += TILE + 3
            for k, (words, colour) in enumerate(lines[i]):
                pen.text((x, y + LINE * k), words, colour, font)
    return sheet


def contact_sheet(loaded, vqgan, bench, autocast):
    """Test images with their true reports, and of each model what it draws for that report and what it reports of the image."""
    with autocast():
        shown = worth_showing(bench, *next(iter(loaded.values())))
    records, codes = [bench.records[i] for i in shown], bench.codes[shown]
    decoded = vqgan.decode(torch.as_tensor(codes, device=bench.pixels.device).long())
    texts, nothing = [r.text for r in records], [""] * len(records)
    true = [None if r.findings is None else names_and_sides(r.findings) for r in records]
    columns = [Column("image, true report", bench.pixels[shown], texts, true), Column("from its codes", decoded, nothing, true)]
    with autocast():
        for name, (model, vocab) in loaded.items():
            drawn = draw_images(model, vocab, vqgan, texts, bench.cfg.guidance, **decoding_of(bench.cfg, bench.cfg.temperature))
            columns.append(Column(f"{name}: draws, reports", drawn, write_reports(model, vocab, list(codes)), true))
    return lay_out(columns, bench.phrases)


def pair_sheet(model, vqgan, bench):
    """Two pairs of out/pairs: the genuine study, its twin, and what the SFT model wrote; [] if none are this model's."""
    folder = Path(bench.cfg.out) / "pairs"
    recipe = read_json(folder / "config.json")
    is_of_model = isinstance(recipe, dict) and recipe.get("sft") == weights_hash(model)
    pairs = (read_pairs(folder, vqgan.config.codebook_size) or [])[:2] if is_of_model else []
    if not pairs:
        return []
    decode = lambda codes: vqgan.decode(torch.as_tensor(np.stack(codes), device=bench.pixels.device).long())
    ask = lambda texts, k: [f"{text} {p.question} {p.answers[k]}".strip() for text, p in zip(texts, pairs)]
    chosen, twin, unknown = [p.chosen for p in pairs], [p.twin_text for p in pairs], [None] * len(pairs)
    true = [names_and_sides(read_findings(text, bench.phrases)) for text in chosen]
    shown = {"distorted": "the twin", "own": "the image", "habit": "it scrambled", "no-question": "no question"}
    columns = [Column("genuine study of a pair", decode([p.codes for p in pairs]), ask(chosen, 0), unknown),
               Column("its twin", decode([p.distorted for p in pairs]), ask(twin, 1), unknown),
               *(Column(f"sft, shown {shown[w]}:", None, [p.reports[w] for p in pairs], true) for w in pairs[0].reports)]
    return [lay_out(columns, bench.phrases)]


def in_columns(pictures, columns=2):
    """PIL images as one, row after row, each row as high as its first."""
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    heights = [row[0].height for row in rows]
    sheet = Image.new("RGB", (max((sum(p.width for p in row) for row in rows), default=1), max(1, sum(heights))), PALE)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (sum(p.width for p in row[:j]), sum(heights[:i])))
    return sheet


# stage ("": stage 2, under whatever name), what a panel shows with its unit, and the logged figures
PANELS = (("vqgan", "reconstruction, PSNR in dB", ("psnr", "val/psnr")),
          ("vqgan", "share of the codebook", ("codebook/usage", "codebook/near_duplicates")),
          ("sft", "loss, nats a token", ("loss", "val/loss")), ("sft", "findings in validation reports, F1", ("val/f1",)),
          ("", "preference losses, nats", tuple(f"loss_{name}" for name in BOTH_WAYS)),
          ("", "margins, chosen less rejected reward", tuple(f"rewards_{name}/margins" for name in BOTH_WAYS)),
          ("", "log-probability of a report, nats", ("logps_text/chosen", "logps_text/rejected")),
          ("", "log-probability of an image, nats", ("logps_image/chosen", "logps_image/rejected")))


def curves(out, model):
    """The logs of vqgan, SFT and one model's stage 2 as a sheet of line plots."""
    panels = []
    for stage, title, names in PANELS:
        rows = read_log(Path(out) / f"{stage or model}.jsonl")
        points = {n: [(r["step"], r[n]) for r in rows if n in r and math.isfinite(r[n])] for n in names}
        if series := {n: p for n, p in points.items() if len(p) > 1}:
            panels.append(plot(f"{stage or model}: {title}", "step", series))
    return in_columns(panels)


def ticks(low, high):
    """Five or so round numbers from low to high."""
    rough = (high - low) / 5
    step = 10 ** math.floor(math.log10(rough))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def smoothed(points):
    """A running mean over a twentieth of the points; under 20 stay as they are."""
    ys, n = np.array([y for _, y in points], float), len(points) // 20
    return [(x, ys[max(0, i - n):i + 1].mean()) for i, (x, _) in enumerate(points)]


def plot(title, x_label, series, marked=False):
    """A plot with axes and a legend: series maps a name to points (x, y).

    Lines of many points are smoothed, over pale ones as logged; when `marked`, no pale ones but a mark on each point."""
    image, small = Image.new("RGB", (600, 340), PALE), ImageFont.load_default(12)
    pen, left, right, bottom = ImageDraw.Draw(image), 58, 584, 300
    pen.text((left, 6), title, INK, ImageFont.load_default(15))
    x, y = left, 30
    for name, colour in zip(series, COLOURS):                                    # the legend, in as many rows as it takes
        if x + 18 + pen.textlength(name, small) > right + 6:
            x, y = left, y + 16
        pen.rectangle((x, y + 4, x + 11, y + 9), colour)
        pen.text((x + 16, y), name, INK, small)
        x += 30 + pen.textlength(name, small)
    top = y + 24
    xs, ys = zip(*(p for points in series.values() for p in points))
    above = lambda values: max(max(values), min(values) + 1e-9 * max(1, abs(min(values))))
    x0, x1, y0, y1 = min(xs), above(xs), min(ys), above(ys)
    dx, dy = (0.04 * (x1 - x0), 0.04 * (y1 - y0)) if marked else (0, 0.02 * (y1 - y0))
    x0, x1, y0, y1 = x0 - dx, x1 + dx, y0 - dy, y1 + dy
    at = lambda p: (left + (p[0] - x0) / (x1 - x0) * (right - left), bottom - (p[1] - y0) / (y1 - y0) * (bottom - top))
    for v in ticks(y0, y1):
        pen.line([at((x0, v)), at((x1, v))], GRID)
        pen.text((left - 6, at((x0, v))[1]), f"{v:.4g}", INK, small, anchor="rm")
    for v in ticks(x0, x1):
        pen.line([(at((v, y0))[0], bottom), (at((v, y0))[0], bottom + 4)], INK)
        pen.text((at((v, y0))[0], bottom + 6), f"{v:.4g}", INK, small, anchor="mt")
    pen.line([(left, top), (left, bottom), (right, bottom)], INK)
    pen.text((right, bottom + 36), x_label, INK, small, anchor="rb")
    for points, colour in zip(series.values(), COLOURS):
        if not marked:
            pen.line([at(p) for p in points], tuple((c + 2 * 255) // 3 for c in colour), 1)
        pen.line([at(p) for p in smoothed(points)], colour, 2)
        for cx, cy in [at(p) for p in points] if marked else ():
            pen.ellipse((cx - 4, cy - 4, cx + 4, cy + 4), colour)
    return image


# ---- For consultation: one's own images ----------------------------------------------------------

def answer_user(cfg):
    """The subcommands: report, ask, segment, generate."""
    command, *words = cfg.words
    needs = {"report": "IMAGE ...", "ask": 'IMAGE "QUESTION"', "segment": 'IMAGE "STRUCTURE"', "generate": '"TEXT"'}
    if command not in needs:
        raise UserError(f"{command!r} is no command; there are: {', '.join(needs)}, or none for the evaluation")
    if not "".join(words).strip() or command in ("ask", "segment") and (len(words) != 2 or not words[1].strip()):
        raise UserError(f"usage: python sample.py {command} {needs[command]}")
    name = choose_model(cfg, find_models(cfg.out))
    device, autocast = init_run(cfg)
    vqgan = load_vqgan_of(cfg, device)
    model, vocab = load_gpt(Path(cfg.out) / name, vqgan, device)
    if model.config.tasks and command not in model.config.tasks.split():
        tqdm.write(f"{name} has learnt no {command!r}, only {model.config.tasks}: what follows means nothing")
    options = decoding_of(cfg, cfg.temperature if cfg.sample or command == "generate" else 0.0)
    files = {"report": words, "generate": []}.get(command, words[:1])
    images, said, tiles = [], [], []
    for file in files:
        with refuse(f"{file} cannot be used", "name another"):
            images.append(read_image(file, cfg.image_size, cfg.channels))
    codes = list(encode_images(images, vqgan, autocast)) if images else []
    with autocast():
        if command == "generate":
            drawn = draw_images(model, vocab, vqgan, [" ".join(words)] * cfg.count, cfg.guidance, **options)
            tiles = [tile(x, 256) for x in drawn]
        elif command == "segment":
            structure, known = words[1].replace("_", " "), model.config.structures
            if known and structure not in known.split(", "):
                tqdm.write(f"{name} has learnt no masks of {structure!r}, only of {known}")
            mask = draw_masks(model, vocab, vqgan, codes, [structure])[0]
            tiles = [Image.fromarray(pixels).convert("RGB").resize((256, 256)) for pixels in (images[0], mask)]
        elif command == "report":
            said = write_reports(model, vocab, codes, **options)
        else:
            said = write_answers(model, vocab, codes, words[1:], **options)
    for file, text in zip(files, said):
        print(f"{file}: {text}" if len(files) > 1 else text)
    if tiles:
        write_picture(in_columns(tiles, len(tiles)), path := Path(cfg.out) / f"{command}.png")
        print(f"wrote {path}")


def main(argv=None):
    """Command line."""
    cfg = cli(SampleConfig, PRESETS, argv, __doc__)
    answer_user(cfg) if cfg.words else evaluate(cfg)


if __name__ == "__main__":
    run(main)
