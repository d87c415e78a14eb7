"""What people look at: reports, answers, masks and images from trained models, and how good they are.

    python sample.py                                  evaluate every model in out/, print the table, write
                                                      out/eval.json, out/samples.png, out/curves.png
                                                      and, for scorers elsewhere, in COCO's format
                                                      out/references.json, out/captions.json
    python sample.py report IMAGE ...                 write a report on each image file
    python sample.py ask IMAGE "QUESTION"             answer a question about an image
    python sample.py segment IMAGE "STRUCTURE"        draw a structure's mask, to out/segment.png
    python sample.py generate "TEXT"                  draw images for a report, to out/generate.png

Reports are scored against what is known to be in the image: CHAIR (arXiv:1809.02156) counts findings
stated that are not there, recall findings that are there and stated; neither means much alone. Companion
hallucination is language bias made countable: of the triggers that test images show without their companion,
the share for which the report states the companion. Drawn images are read by a judge, a small classifier
trained on true images (phantoms: of other patients); its own F1 on true images stands beside. Not for clinical use.
"""

import dataclasses
import functools
import json
import math
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from data import (BODY_PHRASES, COMPANIONS, INSTRUCTIONS, MAX_TEXT, MODALITIES, MODALITY_PHRASES, BadRow, Finding,
                  Phantoms, add_noise, ask_whether, check_data, encode_images, image_source, key, lexicon, match_findings,
                  open_data, read_findings, read_image, read_term, stack, statement, to_images, to_pixels)
from model import (RunConfig, UserError, arg, batch_indices, cli, generate, get_lr, init_run, load_folder,
                   load_weights, read_log, run, save_folder, set_lr, weights_hash, write_text)
from dpo import read_pairs
from sft import dice, draw_masks, load_gpt, write_reports
from vqgan import VQGAN, psnr


@dataclass
class SampleConfig(RunConfig):
    """Flags of sampling and evaluation."""

    words: tuple = arg((), "nothing (evaluate), or: report IMAGE..., ask IMAGE QUESTION, segment IMAGE STRUCTURE, "
                       "generate TEXT", positional=True)
    model: str = arg("", "folder under --out to sample from, or whose reports captions.json gets; empty: dpo if it is "
                     "there, else sft")
    n: int = arg(400, "test records in the evaluation; 2000 for figures to report")
    temperature: float = arg(0.7, "of drawn images, and of `report` and `ask` when --sample is given")
    sample: bool = arg(False, "report, ask: draw at --temperature instead of taking the likeliest words")
    top_k: int = arg(0, "keep only this many likeliest tokens (0: all)")
    top_p: float = arg(1.0, "keep only the likeliest tokens that make up this probability")
    guidance: float = arg(1.5, "guidance s of drawn images: uncond + s*(cond - uncond); 1: none")
    count: int = arg(4, "images to draw for `generate`")
    judge_steps: int = arg(500, "training steps of the judge")
    bootstrap: int = arg(1000, "resamples behind each 95 %% interval")


PRESETS = {"tiny": dict(n=12, judge_steps=20, bootstrap=50), "small": {}, "base": {}}


# ---------------------------------------------------------------------------------------------
# Models on disk
# ---------------------------------------------------------------------------------------------


def load_tokenizer(cfg, device):
    """The VQGAN of cfg.out; its size and channels become cfg's."""
    vqgan = VQGAN.from_pretrained(Path(cfg.out) / "vqgan", device)
    cfg.image_size, cfg.channels = vqgan.config.image_size, vqgan.config.channels
    return vqgan


def find_models(out):
    """Names of the GPT folders in out: sft and control first, then the others."""
    names = [p.parent.name for p in Path(out).glob("*/tokenizer.json") if not p.parent.name.endswith((".partial", ".old"))]
    if not names:
        raise UserError(f"{out} holds no trained model; run `python dpo.py` first (it trains every stage), or name --out")
    return sorted(names, key=lambda n: (["sft", "control"].index(n) if n in ("sft", "control") else 2, n))


def choose_model(cfg, names):
    """The one of names that --model asks for; unasked, dpo if it is there, else the first."""
    name = cfg.model or ("dpo" if "dpo" in names else names[0])
    if name not in names:
        raise UserError(f"--model {name}: {cfg.out} holds {', '.join(names)}")
    return name


def draw_images(model, vocab, vqgan, texts, cfg, guidance):
    """Images (n, C, H, W) drawn for reports, each from exactly h·w image codes."""
    n_codes = vqgan.config.grid ** 2
    rows = generate(model, [vocab.draw(INSTRUCTIONS["generate"][0].format(t)) for t in texts], n_codes, vocab.image_range,
                    temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, guidance=guidance,
                    unconditional=[vocab.draw("")] * len(texts), seed=cfg.seed)
    return vqgan.decode(torch.tensor([vocab.ids_to_codes(r) for r in rows], device=model.device))


def answer(model, vocab, codes, questions, temperature=0.0, seed=0, **options):
    """Answers to one question about each image."""
    rows = generate(model, [vocab.understand(c, q) for c, q in zip(codes, questions)], MAX_TEXT, vocab.text_range,
                    vocab.eos, temperature, seed=seed, **options)
    return [vocab.decode_text(r) for r in rows]


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


class Ratios:
    """Metrics of the form sum(numerator) / sum(denominator) over the same n records, with intervals.

    All metrics share their bootstrap resamples, so differences between models are paired."""

    def __init__(self, n, resamples):
        self.n, self.weights = n, np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32)

    def __call__(self, numerator, denominator=None):
        """A ratio of per-record counts, each (n,): (value, resampled values, records that count)."""
        numerator = np.asarray(numerator, np.float32)
        denominator = np.ones(self.n, np.float32) if denominator is None else np.asarray(denominator, np.float32)
        ratio = lambda a, b: np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)
        return (float(ratio(np.atleast_1d(numerator.sum()), np.atleast_1d(denominator.sum()))[0]),
                ratio(self.weights @ numerator, self.weights @ denominator), int((denominator > 0).sum()))


def summarize(result):
    """A metric as eval.json has it: value, 95 % interval and the records that count."""
    value, resampled, n = result
    resampled = resampled[~np.isnan(resampled)]
    low, high = np.percentile(resampled, (2.5, 97.5)) if len(resampled) else (math.nan, math.nan)
    clean = lambda v: None if math.isnan(v) else round(float(v), 5)
    return {"value": clean(value), "low": clean(low), "high": clean(high), "n": n}


def difference(a, b):
    """{metric: summary} of model a minus model b, from what `ratios` gives of both on the same resamples."""
    return {k: summarize((v[0] - b[k][0], v[1] - b[k][1], v[2])) for k, v in a.items() if len(v[1]) and k in b}


def score_findings(stated, records, ratios, have=True):
    """CHAIR, recall, F1 and their kin of stated findings (one tuple a record) against the records'.

    `have` (n,) leaves records out. Returns ({metric: what `ratios` gives}, the counts of each record)."""
    counts = [match_findings(s, r.findings) for s, r in zip(stated, records)]
    column = lambda name: np.array([c[name] for c in counts], np.float32) * have
    result = {"chair_i": ratios(column("hallucinated"), column("stated")),
              "chair_s": ratios(column("hallucinated") > 0, np.ones(len(records)) * have),
              "recall": ratios(column("right"), column("true")),
              "f1": ratios(2 * column("right"), column("stated") + column("true")),
              "laterality": ratios(column("laterality"), column("stated")),
              "exact": ratios(column("exact"), np.ones(len(records)) * have)}
    asked, told = companions(stated, records)
    if asked.any():
        result["companion"] = ratios(told, asked)
    return result, counts


def triggers_of(record):
    """(trigger, its companion, whether that is in the image) for each trigger in a phantom; none for files."""
    if not record.spec:
        return []
    true = {key(f) for f in record.findings}
    found = [(f, COMPANIONS[f.name](f)) for f in record.findings if f.name in COMPANIONS]
    return [(trigger, companion, key(companion) in true) for trigger, companion in found]


def companions(stated, records):
    """Per record: triggers shown without their companion, and how many of these companions are stated."""
    asked, told = np.zeros(len(records)), np.zeros(len(records))
    for i, (said, record) in enumerate(zip(stated, records)):
        said, absent = {key(f) for f in said}, [c for _, c, there in triggers_of(record) if not there]
        asked[i], told[i] = len(absent), sum(key(companion) in said for companion in absent)
    return asked, told


def ssim(a, b):
    """Structural similarity of image pairs (n, C, H, W) in [-1, 1], 11x11 Gaussian window. (n,)"""
    t = torch.arange(11, device=a.device) - 5.0
    g = torch.exp(-t ** 2 / (2 * 1.5 ** 2))
    window = ((g / g.sum())[:, None] * (g / g.sum())[None]).expand(a.size(1), 1, 11, 11)
    mean = lambda x: F.conv2d(x, window, groups=x.size(1))
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a ** 2, mean(b * b) - mu_b ** 2, mean(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return (((2 * mu_a * mu_b + c1) * (2 * cov + c2)) /
            ((mu_a ** 2 + mu_b ** 2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


def frechet(a, b):
    """Fréchet distance between Gaussians fitted to two sets of features (n, D) (arXiv:1706.08500)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (Σ_a Σ_b)^½ from the eigenvalues of the product, which are real and not negative
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


# ---------------------------------------------------------------------------------------------
# Caption metrics
# ---------------------------------------------------------------------------------------------


def caption_words(text):
    """The words and numbers of a text, lower case, as a list; punctuation is dropped."""
    return re.findall(r"\d+\.\d+|\w+", text.lower())


def ngrams(words, n):
    """How often each run of n words occurs."""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(candidates, references, weights):
    """BLEU-1..4 of a corpus, in [0, 1], not smoothed (Papineni et al., ACL 2002).

    n lists of words each; weights (R, n) say how often each record counts, R times over. Returns (R, 4)."""
    counts = np.array([[*((ngrams(c, n) & ngrams(r, n)).total() for n in range(1, 5)),
                        *(ngrams(c, n).total() for n in range(1, 5)), len(c), len(r)]
                       for c, r in zip(candidates, references)])
    matched, total, length, wanted = np.split(weights @ counts, (4, 8, 9), axis=1)    # (R, 4), (R, 4), (R, 1), (R, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.exp(np.minimum(0, 1 - wanted / length))     # 0 of empty candidates; nan where no record counts
        return brevity * np.exp(np.log(matched / np.maximum(total, 1)).cumsum(1) / np.arange(1, 5))


def rouge_l(candidate, reference, beta=1.2):
    """ROUGE-L of two lists of words, in [0, 1] (Lin, Text Summarization Branches Out, 2004).

    The longest common subsequence as F, recall beta times as important; beta = 1.2 as in the COCO caption
    code (arXiv:1504.00325), 1 for what is often called ROUGE-L F1."""
    common = [0] * (len(reference) + 1)            # with the first j words of the reference
    for word in candidate:
        before, common = common, [0]
        for j, other in enumerate(reference):
            common.append(before[j] + 1 if word == other else max(before[j + 1], common[j]))
    if common[-1] == 0:
        return 0.0
    precision, recall = common[-1] / len(candidate), common[-1] / len(reference)
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


# NLTK's list of words that the rules would stem wrongly
IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "innings": "inning", "outings": "outing",
             "cannings": "canning", "sky": "sky", "news": "news", "inning": "inning", "outing": "outing",
             "canning": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"}
SUFFIXES = (   # step by step: the least measure of what is left, "suffix:replacement ..." (suffixes are patterns)
    (1, "alli:al"),
    (1, "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble entli:ent eli:e ousli:ous ization:ize "
        "ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble fulli:ful "
        "(?<=l)ogi:og"),
    (1, "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"),
    (2, "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: (?<=[st])ion: ou: ism: ate: iti: ous: ive: ize:"))


def sounds(word):
    """c for each consonant and v for each vowel: cvccvc of "system"; a y after a consonant is a vowel."""
    result = ""
    for letter in word:
        result += "v" if letter in "aeiou" or letter == "y" and result.endswith("c") else "c"
    return result


def measure(stem):
    """How often consonants follow vowels in what a suffix would leave: about its syllables."""
    return sounds(stem).count("vc")


def is_short(stem):
    """Whether a stem ends like "hop", which had an e if it comes from "hoping"."""
    return sounds(stem).endswith("cvc") and stem[-1] not in "wxy" or sounds(stem) == "vc"


def replace_suffix(word, least, rules):
    """Apply the first rule whose suffix the word has, if what is left has at least this measure."""
    for suffix, new in (rule.split(":") for rule in rules.split()):
        if found := re.search(suffix + "$", word):
            stem = word[:found.start()]
            return stem + new if measure(stem) >= least else word
    return word


@functools.cache
def porter_stem(word):
    """What is left of a lower-case word without its endings (Porter, Program 14(3), 1980, as NLTK varies it)."""
    if len(word) <= 2 or word in IRREGULAR:
        return IRREGULAR.get(word, word)
    word = replace_suffix(word, 0, "(?<=^.)ies:ie sses:ss ies:i ss:ss s:")
    if word.endswith(("ied", "eed")):
        word = replace_suffix(replace_suffix(word, 0, "(?<=^.)ied:ie ied:i"), 1, "eed:ee")
    elif (bare := re.sub("(ed|ing)$", "", word)) != word and "v" in sounds(bare):
        word = bare
        if word.endswith(("at", "bl", "iz")) or measure(word) == 1 and is_short(word):
            word += "e"
        elif sounds(word).endswith("c") and word[-1] == word[-2:-1] and word[-1] not in "lsz":
            word = word[:-1]
    if word.endswith("y") and len(word) > 2 and sounds(word)[-2] == "c":
        word = word[:-1] + "i"
    for least, rules in SUFFIXES:
        word = replace_suffix(word, least, rules)
    word = replace_suffix(word, 1 + is_short(word[:-1]), "e:")
    return replace_suffix(word, 2, "(?<=l)l:")


def meteor(candidate, reference):
    """METEOR of two lists of words, in [0, 1), with alpha 0.9, beta 3, gamma 0.5 (Banerjee & Lavie, ACL 2005; NLTK).

    Equal words are aligned, then equal Porter stems. WordNet's synonyms are left out, and so are the paraphrases and
    function-word weights of METEOR 1.5, whose figures are others."""
    aligned = {}                                   # position in the candidate -> in the reference
    for form in (str, porter_stem):
        free = {}
        for j in sorted(set(range(len(reference))) - set(aligned.values())):
            free.setdefault(form(reference[j]), []).append(j)
        for i in reversed(range(len(candidate))):
            if i not in aligned and free.get(form(candidate[i])):
                aligned[i] = free[form(candidate[i])].pop()
    if not aligned:
        return 0.0
    chunks = sum(aligned.get(i - 1) != j - 1 for i, j in aligned.items())
    precision, recall = len(aligned) / len(candidate), len(aligned) / len(reference)
    return precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 * (chunks / len(aligned)) ** 3)


def cider(candidates, references, sigma=6.0):
    """CIDEr of each of n lists of words, in [0, 10], as the COCO caption code has it: CIDEr-D (arXiv:1411.5726).

    Cosines of clipped n-gram counts, n = 1..4, weighted by how rare the n-gram is among the references; sigma
    says how many words more or fewer are forgiven. Returns (n,)."""
    scores = np.zeros(len(candidates))
    for n in range(1, 5):
        seen = Counter(gram for r in references for gram in ngrams(r, n))            # in how many references
        weigh = lambda words: {gram: count * math.log(len(references) / max(1, seen[gram]))
                               for gram, count in ngrams(words, n).items()}
        for i, (c, r) in enumerate(zip(candidates, references)):
            a, b = weigh(c), weigh(r)
            norm = math.hypot(*a.values()) * math.hypot(*b.values())
            if norm > 0:
                cosine = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / norm
                scores[i] += 10 / 4 * cosine * math.exp(-(len(c) - len(r)) ** 2 / (2 * sigma ** 2))
    return scores


def score_captions(texts, records, ratios):
    """{metric: what `ratios` gives} of texts against the records' own; records without text are left out.

    BLEU is the corpus's, the others are means; CIDEr's n-grams are as rare in a resample as in the whole."""
    have = np.array([bool(r.text) for r in records])
    pairs = [(caption_words(t), caption_words(r.text)) for t, r in zip(texts, records) if r.text]
    whole = bleu(*zip(*pairs), np.vstack([np.ones(len(pairs)), ratios.weights[:, have]]))
    result = {f"bleu{n + 1}": (float(whole[0, n]), whole[1:, n], len(pairs)) for n in range(4)}
    for name, scores in (("rouge_l", [rouge_l(*pair) for pair in pairs]), ("meteor", [meteor(*pair) for pair in pairs]),
                         ("cider", cider(*zip(*pairs)))):
        column = np.zeros(len(records))
        column[have] = scores
        result[name] = ratios(column, have)
    return result


def coco_references(records):
    """The records' texts as caption annotations in COCO's format; records without text are left out."""
    have = [(i, r) for i, r in enumerate(records) if r.text]
    return {"info": {}, "licenses": [], "type": "captions", "images": [{"id": i, "file_name": r.name} for i, r in have],
            "annotations": [{"id": i, "image_id": i, "caption": r.text} for i, r in have]}


# ---------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Image (B, C, H, W) to one logit a label: each finding with its side, each modality and body part."""

    def __init__(self, channels, n_labels, width=32):
        super().__init__()
        block = lambda i, o: [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU(),
                              nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
        self.body = nn.Sequential(*block(channels, width), *block(width, 2 * width), *block(2 * width, 2 * width),
                                  nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(128 * width, 64), nn.ReLU())
        self.last = nn.Linear(64, n_labels)

    def forward(self, x):
        features = self.body(x)
        return self.last(features), features


def labels_of(record):
    """What a judge can learn of a record: finding/side, modality and body part, as strings."""
    labels = {f"finding:{f.name}:{f.side}" for f in record.findings or ()}
    return labels | {f"{k}:{getattr(record, k)}" for k in ("modality", "body_part") if getattr(record, k)}


def judge_recipe(cfg):
    """The flags that make a judge; another recipe trains another."""
    return {"data": image_source(cfg), "channels": cfg.channels, "image_size": cfg.image_size, "seed": cfg.seed,
            "records": cfg.records, "steps": cfg.judge_steps}


def train_judge(records, folder, cfg, device, autocast):
    """Train a judge on true images with known labels and write it to folder; False if there are no labels."""
    names = sorted(set().union(*(labels_of(r) for r in records)))
    if not names:
        return False
    images = stack([r.image for r in records], cfg.channels)
    targets = torch.tensor([[float(n in labels_of(r)) for n in names] for r in records])
    torch.manual_seed(cfg.seed)
    judge = Judge(cfg.channels, len(names)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    rng = np.random.default_rng(cfg.seed)
    for step in tqdm(range(cfg.judge_steps), desc="judge", unit="step", leave=False):
        set_lr([optimizer], get_lr(step, cfg.judge_steps, warmup=20))
        i = batch_indices(len(images), 64, step, cfg.seed)
        x = to_pixels(images[i]).to(device)
        # soft and noisy images too: reconstructions and drawings are, and what they show still counts
        soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = torch.lerp(x, soft, float(rng.uniform(0, 1.2))) + float(rng.uniform(0, 0.15)) * torch.randn_like(x)
        with autocast():
            loss = F.binary_cross_entropy_with_logits(judge(x)[0].float(), targets[i].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    save_folder(folder, {"kind": "judge", "labels": names, **judge_recipe(cfg)}, judge.state_dict())
    return True


def load_judge(data, cfg, device, autocast):
    """The judge of cfg.out, trained first if it is missing or of another recipe: (model, labels) or None."""
    folder = Path(cfg.out) / "judge"
    config = load_folder(folder, "sample.py", ("kind", "judge"))[0] if folder.exists() else {}
    if not judge_recipe(cfg).items() <= config.items():
        train = data["train"]
        if isinstance(train, Phantoms):      # other patients than the models', and no bias
            train = Phantoms("judge", min(12000, cfg.records), cfg.seed, 0.0, cfg.image_size)
        records = [train[i] for i in tqdm(range(len(train)), desc="judge's images", leave=False)]
        if not train_judge(records, folder, cfg, device, autocast):
            return None
    config, tensors = load_folder(folder, "sample.py", ("kind", "judge"))
    judge = Judge(config["channels"], len(config["labels"])).to(device)
    return load_weights(judge, tensors, folder), config["labels"]


@torch.no_grad()
def judge_images(judge, x, autocast):
    """What the judge sees in images (n, C, H, W): findings a tuple each, all labels a set each, features."""
    model, names = judge
    with autocast():
        logits, features = (torch.cat(t).float() for t in zip(*(model(b) for b in x.split(256))))
    labels = [{n for n, on in zip(names, row) if on} for row in (logits > 0).tolist()]
    findings = [tuple(Finding(*n[8:].rsplit(":", 1)) for n in sorted(row) if n.startswith("finding:")) for row in labels]
    return findings, labels, features


# ---------------------------------------------------------------------------------------------
# The evaluation
# ---------------------------------------------------------------------------------------------


@dataclass
class Benchmark:
    """The test records and all that evaluating a model on them needs."""

    records: list
    codes: np.ndarray        # (n, N) of the images
    noise_codes: np.ndarray  # (n, N) of the images drowned in noise
    pixels: torch.Tensor     # (n, C, H, W) in [-1, 1]
    phrases: dict
    judge: tuple | None
    known: bool              # whether the records' findings are known
    ratios: Ratios
    cfg: SampleConfig


def make_benchmark(cfg, vqgan, device, autocast):
    """The first n test records with everything that is computed once for all models."""
    data = open_data(cfg)
    judge = load_judge(data, cfg, device, autocast)
    n = min(cfg.n, len(data["test"]))
    records = [data["test"][i] for i in tqdm(range(n), desc="test images", leave=False)]
    images = [r.image for r in records]
    noise = [add_noise(image, np.random.default_rng([cfg.seed, 8, i]), 1000) for i, image in enumerate(images)]
    return Benchmark(records, encode_images(images, vqgan, cfg.channels, device, autocast),
                     encode_images(noise, vqgan, cfg.channels, device, autocast),
                     to_pixels(stack(images, cfg.channels)).to(device), lexicon(data["train"]), judge,
                     all(r.findings is not None for r in records), Ratios(n, cfg.bootstrap), cfg)


def evaluate_reconstruction(vqgan, bench, autocast):
    """PSNR, SSIM and what the judge still sees, for the image tokenizer."""
    ratios, x = bench.ratios, bench.pixels
    with autocast():
        x_rec = vqgan.decode(torch.as_tensor(bench.codes, device=x.device).long())
    result = {"reconstruction/psnr": ratios(psnr(x, x_rec).cpu()), "reconstruction/ssim": ratios(ssim(x, x_rec).cpu())}
    if bench.judge is None:
        return result
    for name, pixels in (("original", x), ("reconstructed", x_rec)):
        findings, labels, _ = judge_images(bench.judge, pixels, autocast)
        if bench.known and bench.phrases:
            scores, _ = score_findings(findings, bench.records, ratios)
            result[f"reconstruction/judge_f1_{name}"] = scores["f1"]
            for label in sorted(bench.phrases):
                of = lambda rows: [{key(f) for f in row if f.name == label} for row in rows]
                said, true = of(findings), of(r.findings for r in bench.records)
                result[f"reconstruction/judge_f1_{name}/{label}"] = ratios(
                    [2 * len(a & b) for a, b in zip(said, true)], [len(a) + len(b) for a, b in zip(said, true)])
        result |= {f"reconstruction/judge_{kind}_{name}": v for kind, v in judged_terms(labels, bench).items()}
    return result


def judged_terms(labels, bench, have=True):
    """Whether the judge sees each record's modality and body part, over the records that name one."""
    result = {}
    for kind in ("modality", "body_part"):
        has = np.array([bool(getattr(r, kind)) for r in bench.records]) & have
        if has.any():
            right = np.array([f"{kind}:{getattr(r, kind)}" in row for r, row in zip(bench.records, labels)])
            result[kind] = bench.ratios(right & has, has)
    return result


def evaluate_reports(model, vocab, bench):
    """Image -> report, greedy and sampled; greedy also on images replaced by noise. Returns metrics, greedy reports."""
    result, ratios = {}, bench.ratios
    if not any(r.text for r in bench.records):
        return result, []
    for decoding, temperature in (("greedy", 0.0), ("t0.5", 0.5), ("t1.0", 1.0)):
        texts = write_reports(model, list(bench.codes), vocab, temperature, seed=bench.cfg.seed)
        scores = {}
        if bench.known and bench.phrases:
            stated = [read_findings(t, bench.phrases) for t in texts]
            scores, counts = score_findings(stated, bench.records, ratios)
            scores["details"] = ratios([c["details"] for c in counts], [c["right"] for c in counts])
        for kind, terms in (("modality", MODALITY_PHRASES), ("body_part", BODY_PHRASES)):
            true = [read_term(getattr(r, kind), terms) for r in bench.records]
            if any(true):
                scores[kind] = ratios([bool(t) and read_term(s, terms) == t for s, t in zip(texts, true)],
                                      [bool(t) for t in true])
        if decoding == "greedy":
            greedy = texts
            scores |= score_captions(texts, bench.records, ratios)
            # wordings aside; a report that states nothing of an image and nothing of noise tells nothing
            blind = write_reports(model, list(bench.noise_codes), vocab)
            said = [(statement(a, bench.phrases), statement(b, bench.phrases)) for a, b in zip(texts, blind)]
            scores["unchanged_by_noise"] = ratios([bool(a) and a == b for a, b in said], [bool(a) for a, _ in said])
        distinct = float(len(set(texts)))
        scores["distinct"] = (distinct, np.array([]), len(texts))
        result |= {f"report/{decoding}/{k}": v for k, v in scores.items()}
    return result, greedy


def evaluate_drawings(model, vocab, vqgan, bench, autocast, guidance):
    """Report -> image, read by the judge."""
    have = np.array([bool(r.text) for r in bench.records])
    if not have.any() or bench.judge is None:
        return {}
    drawn = draw_images(model, vocab, vqgan, [r.text for r in bench.records], bench.cfg, guidance)
    findings, labels, features = judge_images(bench.judge, drawn, autocast)
    result = judged_terms(labels, bench, have)
    if bench.known and bench.phrases:
        scores, _ = score_findings(findings, bench.records, bench.ratios, have)
        recall, resampled, n = scores["recall"]
        result |= {"f1": scores["f1"], "extra": scores["chair_i"], "missing": (1 - recall, 1 - resampled, n)}
    if have.sum() > 1:
        real = judge_images(bench.judge, bench.pixels, autocast)[2]
        result["frechet"] = (frechet(features[have], real[have]), np.array([]), int(have.sum()))
    return {f"generate/cfg{guidance:g}/{k}": v for k, v in result.items()}


def plain(answer):
    """An answer without case and full stop, as answers are compared."""
    return answer.lower().strip(" .")


def evaluate_answers(model, vocab, bench):
    """One question a record; the share of right answers."""
    asked = [r.questions[i % len(r.questions)] if r.questions else ("", "") for i, r in enumerate(bench.records)]
    if not any(q for q, _ in asked):
        return {}
    said = answer(model, vocab, list(bench.codes), [q for q, _ in asked])
    return {"ask/accuracy": bench.ratios([bool(q) and plain(s) == plain(a) for s, (q, a) in zip(said, asked)],
                                         [bool(q) for q, _ in asked])}


def evaluate_companions(model, vocab, bench):
    """The habit, asked for: of the triggers whose companion's finding is there on neither side (`companions` counts
    the wrong side as absent), the share for which "Is there a pleural effusion?" is answered with yes."""
    cases = [(i, ask_whether(MODALITIES[r.spec.modality][c.name], 0)) for i, r in enumerate(bench.records)
             for _, c, _ in triggers_of(r) if c.name not in {f.name for f in r.findings}]
    if not cases:
        return {}
    said = answer(model, vocab, [bench.codes[i] for i, _ in cases], [q for _, q in cases])
    asked, yes = np.zeros(len(bench.records)), np.zeros(len(bench.records))
    for (i, _), text in zip(cases, said):
        asked[i] += 1
        yes[i] += plain(text) == "yes"
    return {"ask/companion": bench.ratios(yes, asked)}


def evaluate_masks(model, vocab, vqgan, bench):
    """One structure a record: Dice over all, over the large ones (5 % of the image or more) and of each."""
    rng = np.random.default_rng([bench.cfg.seed, 9])
    chosen = [str(rng.choice(sorted(r.masks))) if r.masks else "" for r in bench.records]
    have = [i for i, c in enumerate(chosen) if c]
    if not have:
        return {}
    drawn, _ = draw_masks(model, vocab, [bench.codes[i] for i in have], [chosen[i] for i in have], vqgan)
    value, area = np.zeros(len(chosen)), np.zeros(len(chosen))
    for i, mask in zip(have, drawn):
        true = bench.records[i].masks[chosen[i]]
        value[i], area[i] = dice(mask, true), true.mean()
    result, names = {}, np.array(chosen)
    groups = {"": names != "", "_large": (names != "") & (area >= 0.05)}
    for end, group in {**groups, **{f"/{s}": names == s for s in sorted(set(chosen) - {""})}}.items():
        result[f"segment/dice{end}"] = bench.ratios(value * group, group)
    return result


def read_kept(path, recipe=None):
    """The metrics that `evaluate_model` kept in a file, as `ratios` gives them; None if another recipe made them."""
    with safe_open(path, "np") as f:
        if recipe not in (None, f.metadata()):
            return None
        kept = {k: f.get_tensor(k) for k in sorted(f.keys())}
    return {k: (float(v[0]), v[2:], int(v[1])) for k, v in kept.items()}


def evaluate_model(name, model, vocab, vqgan, bench, autocast):
    """Every metric of one model, as `ratios` gives them; kept in out/eval, so that only what is new is evaluated:

    another model, test set, judge or flag, or other code in sample.py or data.py. Its greedy reports lie beside."""
    cfg, path = bench.cfg, Path(bench.cfg.out) / "eval" / f"{name}.safetensors"
    flags = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("words", "model", "out", "device", "count")}
    code = b"".join(Path(__file__).with_name(f).read_bytes() for f in ("sample.py", "data.py"))
    recipe = {"recipe": json.dumps({"models": [weights_hash(m) for m in (model, vqgan, *(bench.judge or ())[:1])],
                                    "test": zlib.crc32(bench.codes.tobytes()), "code": zlib.crc32(code), **flags})}
    captions = path.with_suffix(".captions.json")
    if path.exists() and captions.exists() and (kept := read_kept(path, recipe)):
        return kept
    with autocast():
        reports, texts = evaluate_reports(model, vocab, bench)
        result = {**reports, **evaluate_answers(model, vocab, bench), **evaluate_companions(model, vocab, bench),
                  **evaluate_masks(model, vocab, vqgan, bench),
                  **evaluate_drawings(model, vocab, vqgan, bench, autocast, 1.0),
                  **evaluate_drawings(model, vocab, vqgan, bench, autocast, cfg.guidance)}
    path.parent.mkdir(exist_ok=True)
    said = [{"image_id": i, "caption": t} for i, (t, r) in enumerate(zip(texts, bench.records)) if r.text]
    write_text(captions, json.dumps(said) + "\n")
    new = path.with_suffix(".new")
    save_file({k: np.array([v[0], v[2], *v[1]]) for k, v in result.items()}, new, metadata=recipe)
    os.replace(new, path)
    return dict(sorted(result.items()))


def evaluate(cfg):
    """Evaluate every model in cfg.out; write eval.json, captions and references, pictures; print the table."""
    names = find_models(cfg.out)
    chosen = choose_model(cfg, names)
    device, autocast = init_run(cfg)
    vqgan = load_tokenizer(cfg, device)
    loaded = {name: load_gpt(Path(cfg.out) / name, vqgan, device) for name in names}
    for name, (model, _) in loaded.items():
        check_data(model.config.data, cfg, Path(cfg.out) / name)
    bench = make_benchmark(cfg, vqgan, device, autocast)
    results = {"vqgan": evaluate_reconstruction(vqgan, bench, autocast)}
    for name, (model, vocab) in tqdm(loaded.items(), desc="evaluating", unit="model", leave=False):
        results[name] = evaluate_model(name, model, vocab, vqgan, bench, autocast)
    written = {name: {k: summarize(v) for k, v in result.items()} for name, result in results.items()}
    for name in names:
        if "control" in results and name not in ("sft", "control"):
            written[f"{name} minus control"] = difference(results[name], results["control"])
    write_text(Path(cfg.out) / "eval.json", json.dumps(written, indent=1) + "\n")
    write_text(Path(cfg.out) / "references.json", json.dumps(coco_references(bench.records)) + "\n")
    write_text(Path(cfg.out) / "captions.json", (Path(cfg.out) / "eval" / f"{chosen}.captions.json").read_text())
    sheets = [contact_sheet(loaded, vqgan, bench, autocast)]
    if "sft" in loaded and (Path(cfg.out) / "pairs").exists():
        sheets += pair_sheet(loaded["sft"][0], vqgan, bench)
    below(sheets).save(Path(cfg.out) / "samples.png")
    preferred = names[-1] if chosen in ("sft", "control") else chosen           # these two have no preference curves
    curves(cfg.out, preferred).save(Path(cfg.out) / "curves.png")
    print_table(written, names, bench)
    print(f"wrote {cfg.out}/eval.json, {cfg.out}/samples.png, {cfg.out}/curves.png; for other scorers "
          f"{cfg.out}/references.json and {cfg.out}/captions.json (greedy reports of {chosen})")


def print_table(written, names, bench):
    """One line a metric, one column a model; 95 % intervals in brackets; the difference to the control last."""
    show = lambda m: "-" if m is None or m["value"] is None else f"{m['value']:.3f}" if m["low"] is None \
        else f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"
    print(f"\nimage tokenizer, n = {len(bench.records)}")
    print("".join(f"  {k:<46}{show(m)}\n" for k, m in written["vqgan"].items()))
    columns = names + [n for n in written if n.endswith(" minus control")]
    print("  ".join([f"{'metric':<34}", *(f"{c:<24}" for c in columns)]))
    for metric in dict.fromkeys(k for name in names for k in written[name]):
        print("  ".join([f"{metric:<34}", *(f"{show(written[c].get(metric)):<24}" for c in columns)]).rstrip())
    print(f"\nn = {len(bench.records)} test records; chair, companion, laterality, extra, missing, unchanged_by_noise: "
          "lower is better\n[95 % bootstrap interval; differences are paired]. Not for clinical use.")


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

INK, GRID, PALE = (20, 20, 20), (222, 222, 222), (255, 255, 255)
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (140, 86, 75), (227, 119, 194),
           (127, 127, 127), (188, 189, 34), (23, 190, 207))


def wrap(text, width):
    """Lines of at most `width` letters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def tile(pixels, size):
    """One image (C, H, W) in [-1, 1] as a square PIL image."""
    array = to_images(pixels[None])[0].permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB").resize((size, size))


def worth_showing(bench, n):
    """n records to show: first those that tempt to state a companion, then those with several findings."""
    tempting = companions([()] * len(bench.records), bench.records)[0]
    order = sorted(range(len(bench.records)), key=lambda i: -len(bench.records[i].findings or ()))
    first = [i for i in order if tempting[i]][:n - n // 3]
    return (first + [i for i in order if i not in first])[:n]


def write_coloured(pen, font, at, text, true, phrases):
    """Write a report from `at` down; red: sentences that state findings other than `true`, a set of keys or None."""
    x, y = at
    lines = [(line, sentence) for sentence in text.replace(". ", ".\n").split("\n") for line in wrap(sentence, 42)]
    for line, sentence in lines[:9]:
        wrong = true is not None and any(key(f) not in true for f in read_findings(sentence, phrases))
        pen.text((x, y), line, COLOURS[1] if wrong else INK, font)
        y += 14


def lay_out(images, texts, true, phrases, size=128, width=270):
    """A sheet of titled columns: images {title: (n, C, H, W)}, then texts {title: n strings}; true as write_coloured."""
    left, n = size * len(images) + 8, len(true)
    sheet = Image.new("RGB", (left + width * len(texts), 24 + n * (size + 8)), PALE)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for j, (title, column) in enumerate(images.items()):
        pen.text((j * size + 4, 5), title, INK, font)
        for i in range(n):
            sheet.paste(tile(column[i], size - 4), (j * size + 2, 24 + i * (size + 8)))
    for j, (title, column) in enumerate(texts.items()):
        pen.text((left + j * width, 5), title, INK, font)
        for i in range(n):
            write_coloured(pen, font, (left + j * width, 24 + i * (size + 8)), column[i], true[i], phrases)
    return sheet


def contact_sheet(loaded, vqgan, bench, autocast, rows=6):
    """Test images, their reconstruction, what each model draws for the true report and reports of the image.

    Sentences that state a finding the image does not show are red."""
    shown = worth_showing(bench, min(rows, len(bench.records)))
    records, codes = [bench.records[i] for i in shown], bench.codes[shown]
    own = torch.as_tensor(codes, device=bench.pixels.device).long()
    images = {"image": bench.pixels[shown], "from its codes": vqgan.decode(own)}
    texts = {"true report": [r.text for r in records]}
    with autocast():
        for name, (model, vocab) in loaded.items():
            images[f"drawn: {name}"] = draw_images(model, vocab, vqgan, texts["true report"], bench.cfg, bench.cfg.guidance)
            texts[f"report: {name}"] = write_reports(model, list(codes), vocab)
    true = [None if r.findings is None else {key(f) for f in r.findings} for r in records]
    return lay_out(images, texts, true, bench.phrases)


def pair_sheet(model, vqgan, bench, rows=6):
    """Pairs of out/pairs: genuine and distorted image, true report and what the SFT model wrote; [] if of another one.

    Sentences that state a finding which the true report does not are red."""
    folder = Path(bench.cfg.out) / "pairs"
    if json.loads((folder / "config.json").read_text()).get("sft") != weights_hash(model):
        return []
    pairs = read_pairs(folder)[:rows]
    decode = lambda codes: vqgan.decode(torch.as_tensor(np.stack(codes), device=bench.pixels.device).long())
    images = {"genuine": decode([p.codes for p in pairs]), "distorted": decode([p.distorted for p in pairs])}
    shown = {"distorted": "the distorted image", "own": "the genuine image", "no-image": "no image", "no-question": "no question"}
    texts = {"chosen: true report": [p.chosen for p in pairs]} | {
        f"SFT's report, shown {shown[w]}": [p.reports[w] for p in pairs] for w in pairs[0].reports}
    return [lay_out(images, texts, [{key(f) for f in read_findings(p.chosen, bench.phrases)} for p in pairs], bench.phrases)]


def below(sheets):
    """PIL images below each other in one."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PALE)
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(s.height for s in sheets[:i])))
    return whole


PANELS = (("vqgan", ("psnr", "val/psnr")), ("vqgan", ("codebook/usage", "codebook/near_duplicates")),
          ("sft", ("loss", "val/loss")), ("sft", ("val/f1",)),
          # stage 2, under whatever name
          ("", ("loss_text", "loss_image", "loss_conditional")),
          ("", ("rewards_text/margins", "rewards_image/margins", "rewards_conditional/margins")),
          ("", ("logps_text/chosen", "logps_text/rejected")), ("", ("logps_image/chosen", "logps_image/rejected")))


def curves(out, model, width=470, height=240):
    """The logs of tokenizer, SFT and one model's stage 2 (PANELS' "") as a sheet of small line plots."""
    panels = []
    for stage, names in PANELS:
        stage = stage or model
        rows = read_log(Path(out) / f"{stage}.jsonl")
        series = {n: [(r["step"], r[n]) for r in rows if n in r] for n in names}
        if any(series.values()):
            panels.append(plot(f"{stage}: step", {k: v for k, v in series.items() if v}, width, height))
    sheet = Image.new("RGB", (2 * width, max(1, math.ceil(len(panels) / 2)) * height), PALE)
    for i, panel in enumerate(panels):
        sheet.paste(panel, ((i % 2) * width, i // 2 * height))
    return sheet


def plot(title, series, width, height):
    """One line plot: series maps a name to points (x, y)."""
    image, font = Image.new("RGB", (width, height), PALE), ImageFont.load_default(11)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = 56, 24, width - 12, height - 22
    xs, ys = zip(*(p for points in series.values() for p in points))
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1e-9), min(ys), max(max(ys), min(ys) + 1e-9)
    at = lambda p: (left + (p[0] - x0) / (x1 - x0) * (right - left), bottom - (p[1] - y0) / (y1 - y0) * (bottom - top))
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        pen.line([at((x0, y)), at((x1, y))], GRID)
        pen.text((4, at((x0, y))[1] - 6), f"{y:.4g}", INK, font)
    pen.text((left, bottom + 5), f"{title} {x0:.4g} to {x1:.4g}", INK, font)
    x = left
    for (name, points), colour in zip(series.items(), COLOURS):
        pen.line([at(p) for p in points] * (1 if len(points) > 1 else 2), colour, 2)
        pen.text((x, 6), name, colour, font)
        x += pen.textlength(name, font) + 14
    return image


# ---------------------------------------------------------------------------------------------
# One's own images
# ---------------------------------------------------------------------------------------------


def read_user_image(path, cfg):
    """An image file named on the command line, as the tokenizer takes it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        return read_image(Path(path), cfg.image_size, cfg.channels)
    except BadRow as why:
        raise UserError(f"{path}: {why}")


def answer_user(cfg):
    """The subcommands: report, ask, segment, generate."""
    command, *words = cfg.words
    needs = {"report": "IMAGE ...", "ask": 'IMAGE "QUESTION"', "segment": 'IMAGE "STRUCTURE"', "generate": '"TEXT"'}
    if command not in needs:
        raise UserError(f"{command!r} is no command; there are: {', '.join(needs)}, or none for the evaluation")
    if not words or command in ("ask", "segment") and len(words) != 2:
        raise UserError(f"usage: python sample.py {command} {needs[command]}")
    names = find_models(cfg.out)
    name = choose_model(cfg, names)
    device, autocast = init_run(cfg)
    vqgan = load_tokenizer(cfg, device)
    model, vocab = load_gpt(Path(cfg.out) / name, vqgan, device)
    how = dict(temperature=cfg.temperature if cfg.sample else 0.0, seed=cfg.seed, top_k=cfg.top_k, top_p=cfg.top_p)
    with autocast():
        if command == "generate":
            drawn = draw_images(model, vocab, vqgan, [" ".join(words)] * cfg.count, cfg, cfg.guidance)
            tiles = [tile(x, 256) for x in drawn]
            return save_row(tiles, Path(cfg.out) / "generate.png")
        files = words if command == "report" else words[:1]
        images = [read_user_image(f, cfg) for f in files]
        codes = list(encode_images(images, vqgan, cfg.channels, device, autocast))
        if command == "segment":
            mask = draw_masks(model, vocab, codes, words[1:], vqgan)[0][0]
            genuine = Image.fromarray(images[0]).convert("RGB").resize((256, 256))
            return save_row([genuine, Image.fromarray(mask).convert("RGB").resize((256, 256))],
                            Path(cfg.out) / "segment.png")
        said = write_reports(model, codes, vocab, **how) if command == "report" else \
            answer(model, vocab, codes, words[1:], **how)
    for file, text in zip(files, said):
        print(f"{file}: {text}" if len(files) > 1 else text)


def save_row(tiles, path):
    """PIL images side by side in one file."""
    sheet = Image.new("RGB", (sum(t.width for t in tiles), tiles[0].height))
    for i, t in enumerate(tiles):
        sheet.paste(t, (i * t.width, 0))
    sheet.save(path)
    print(f"wrote {path}")


def main(argv=None):
    """Command line."""
    cfg = cli(SampleConfig, PRESETS, argv, __doc__)
    answer_user(cfg) if cfg.words else evaluate(cfg)


if __name__ == "__main__":
    run(main)
