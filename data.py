"""Records: drawn phantoms with known findings, or a folder of real images, as one kind of thing.

    from data import Phantoms
    record = Phantoms("train", 16000, seed=0, bias=0.9)[17]
    record.image, record.text, record.findings, record.masks

For given flags a phantom depends on (seed, split, index) alone: any record can be drawn again, and drawn again with
one finding added, removed or mirrored while the patient stays the same. In the training split some findings bring a
companion (with probability `bias`), as an enlarged heart brings a left effusion; a model learns the habit. In validation
and test findings are independent, so what habit alone states is counted.

A side is always the patient's: the patient's left is the right of the image. Not for clinical use.

The lesson, in order: records and findings; phantoms, and how one is redrawn; distortions, which make the
dispreferred data. For consultation: how a phantom is drawn; folders of real images; findings read back from a report.
"""

import csv
import hashlib
import json
import os
import re
import warnings
import zlib
from collections import Counter
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm

from model import UserError, refuse

# ---- The lesson: records -------------------------------------------------------------------------

@dataclass(frozen=True)
class Finding:
    """One finding. name and side are what is counted; size and place are drawn and reported as well."""

    name: str
    side: str = ""     # the patient's "left", "right" or "bilateral"; "" where it has none
    size: str = ""     # "small" or "large"
    place: str = ""    # "upper" or "lower"


@dataclass
class Record:
    """One study. What it holds decides the tasks it serves."""

    image: np.ndarray                 # (H, W) or (H, W, 3) uint8; Folder.rows hold the files' Paths here and in masks
    text: str                         # the report or caption
    name: str                         # the file, or split/index of a phantom
    findings: tuple | None = None     # of Finding; None: not known
    masks: dict = field(default_factory=dict)        # structure -> (H, W) bool
    modality: str = ""
    body_part: str = ""
    questions: tuple = ()             # of (question, answer)
    subject: str = ""                 # patient; no subject is in two splits
    spec: "Spec | None" = None        # phantoms: what `draw` needs


def names_and_sides(findings):
    """What all metrics compare of findings: the set of their (name, side)."""
    return {(f.name, f.side) for f in findings}


def same_statement(a, b):
    """Whether two records state the same: their findings where both are known, else their texts, without these what is asked."""
    if a.findings is None or b.findings is None:
        return a.text == b.text and (a.text != "" or a.questions == b.questions)
    return names_and_sides(a.findings) == names_and_sides(b.findings)


def match_findings(stated, true):
    """Counts of one report: findings stated, true, right, hallucinated, and of these on the wrong side; whether all is exact."""
    stated, true = names_and_sides(stated), names_and_sides(true)
    missed = {name for name, side in true - stated if side}
    wrong_side = [name for name, side in stated - true if side and name in missed]
    return {"stated": len(stated), "true": len(true), "right": len(stated & true), "hallucinated": len(stated - true),
            "laterality": len(wrong_side), "exact": stated == true}


# ---- The lesson: phantoms, and how one is redrawn ------------------------------------------------

LEFT_RIGHT = ("left", "right")
OPPOSITE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Kind:
    """A kind of finding: what it may look like, how a report words it, and the phrases that state it."""

    wordings: tuple                   # {side} {size} {place} are filled in
    phrases: tuple                    # what read_findings looks for; the first is its noun, as in "No nodule."
    countable: bool = True            # "a nodule", but "atrophy"
    sides: tuple = LEFT_RIGHT
    sizes: tuple = ("",)
    places: tuple = ("",)

    @property
    def noun(self):
        return self.phrases[0]


SIZES, PLACES, NO_SIDE = ("small", "large"), ("upper", "lower"), ("",)
MODALITIES = {
    "chest radiograph": {
        "cardiomegaly": Kind(("Enlarged heart.", "Cardiomegaly.", "The cardiac silhouette is enlarged."),
                             ("cardiomegaly", "enlarged heart", "heart is enlarged", "cardiac silhouette is enlarged"),
                             countable=False, sides=NO_SIDE),
        "effusion": Kind(("{Size} {side} pleural effusion.", "There is a {size} pleural effusion on the {side}."),
                         ("pleural effusion", "effusion"), sizes=SIZES),
        "pneumothorax": Kind(("{Size} {side} pneumothorax.", "There is a {size} pneumothorax on the {side}."),
                             ("pneumothorax",), sizes=SIZES),
        "nodule": Kind(("Nodule in the {side} {place} lung.", "{Side} {place} zone nodule."), ("nodule",), places=PLACES),
        "consolidation": Kind(("Consolidation in the {side} {place} lung.", "{Side} {place} zone consolidation.",
                               "Airspace opacity in the {side} {place} lung."),
                              ("consolidation", "airspace opacity"), countable=False, places=PLACES),
    },
    "head CT": {
        "haemorrhage": Kind(("{Size} {side} intracerebral haemorrhage.", "{Side} hemisphere: {size} haemorrhage."),
                            ("haemorrhage",), countable=False, sizes=SIZES),
        "shift": Kind(("Midline shift to the {side}.", "The midline is displaced to the {side}."),
                      ("midline shift", "midline is displaced"), countable=False),
        "infarct": Kind(("{Size} {side} infarct.", "{Side} hemisphere: {size} infarct."), ("infarct",), sizes=SIZES),
        "subdural": Kind(("{Side} subdural collection.", "Subdural collection on the {side}."), ("subdural collection",)),
        "hydrocephalus": Kind(("Hydrocephalus.", "The ventricles are dilated.", "Dilated ventricles."),
                              ("hydrocephalus", "ventricles are dilated", "dilated ventricles"), countable=False, sides=NO_SIDE),
    },
    "brain MRI": {
        "tumour": Kind(("{Size} {side} tumour.", "{Side} hemisphere: {size} mass."), ("tumour", "mass"), sizes=SIZES),
        "oedema": Kind(("{Side} oedema.", "Oedema in the {side} hemisphere."), ("oedema",), countable=False),
        "cyst": Kind(("{Side} arachnoid cyst.", "Arachnoid cyst on the {side}."), ("arachnoid cyst",)),
        "atrophy": Kind(("Atrophy.", "The sulci are widened.", "Widened sulci."),
                        ("atrophy", "sulci are widened", "widened sulci"), countable=False, sides=NO_SIDE),
        "lesions": Kind(("White matter lesions.", "Multiple white matter lesions."), ("white matter lesions",),
                        countable=False, sides=NO_SIDE),
    },
}
# Trigger -> a function from it to the companion that it brings in training, with probability `bias`. Without
# the trigger it is as rare as any finding (FINDING_RATE); after it, a model in doubt does well to state it: the habit.
COMPANIONS = {
    "cardiomegaly": lambda f: Finding("effusion", "left", "small"),
    "pneumothorax": lambda f: Finding("nodule", OPPOSITE[f.side], "", "lower"),
    "haemorrhage": lambda f: Finding("shift", OPPOSITE[f.side]),
    "tumour": lambda f: Finding("oedema", f.side),
    "atrophy": lambda f: Finding("lesions"),
}
NORMAL = {"chest radiograph": ("Normal chest radiograph.", "Clear lungs, normal heart."),
          "head CT": ("Normal head CT.", "Unremarkable brain."),
          "brain MRI": ("Normal brain MRI.", "Unremarkable brain.")}
OPENING = {"chest radiograph": ("Chest radiograph.", "Frontal chest radiograph."),
           "head CT": ("Head CT.", "Axial head CT."), "brain MRI": ("Brain MRI.", "Axial brain MRI.")}
FINDING_RATE = 0.22        # each finding of a modality, independently; about 29 % of studies are normal


@dataclass(frozen=True)
class Spec:
    """All that a phantom is drawn from; `replace(spec, findings=...)` redraws the same patient."""

    seed: int
    split: str
    index: int
    modality: str
    findings: tuple

    def rng(self, *words):
        """A random generator of this patient for one purpose, independent of the findings."""
        return np.random.default_rng([self.seed, self.index, zlib.crc32("/".join((self.split, *words)).encode())])


def random_finding(name, kind, rng):
    """A finding of this kind with a random side, size and place."""
    return Finding(name, *(str(rng.choice(options)) for options in (kind.sides, kind.sizes, kind.places)))


def phantom_spec(seed, split, index, bias, modalities=3):
    """Which of the first `modalities` and which findings a phantom has. `bias` counts in the training split only."""
    rng = Spec(seed, split, index, "", ()).rng("spec")
    modality = list(MODALITIES)[rng.integers(modalities)]
    findings = {name: random_finding(name, kind, rng) for name, kind in MODALITIES[modality].items()}
    present = {name: f for name, f in findings.items() if rng.random() < FINDING_RATE}
    for trigger, companion in COMPANIONS.items():
        if rng.random() < bias and split == "train" and trigger in present:
            brought = companion(present[trigger])
            present[brought.name] = brought
    return Spec(seed, split, index, modality, tuple(present[n] for n in findings if n in present))


def draw(spec, size=64):
    """Image (size, size) uint8 and masks {structure: (size, size) bool} of a spec.

    Anatomy, noise and each finding's place have generators of their own: taking one out changes nothing but it and what it moved."""
    look = spec.rng("look")
    canvas = Canvas(size, look.uniform(-0.06, 0.06))
    found = {f.name: SimpleNamespace(**vars(f), sign=SIGN.get(f.side), rng=spec.rng("place", f.name)) for f in spec.findings}
    paint = {"chest radiograph": draw_chest, "head CT": draw_head_ct, "brain MRI": draw_brain_mri}[spec.modality]
    paint(canvas, found, spec.rng("anatomy"))
    image = canvas.image * look.uniform(0.9, 1.05) + look.uniform(0.0, 0.05)
    image = image + spec.rng("noise").normal(0, look.uniform(0.008, 0.02), image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), canvas.masks


def write_report(spec, before=None):
    """The report: opening, findings (or 'normal'), sometimes a negated sentence.

    `before` is the Spec that this one is redrawn from: what was denied there is denied here too, where it still holds, so
    that both reports differ in the changed finding alone."""
    r, kinds = spec.rng("report"), MODALITIES[spec.modality]
    sentences = [str(r.choice(OPENING[spec.modality]))]
    for f in spec.findings:
        wording = str(spec.rng("wording", f.name).choice(kinds[f.name].wordings))
        sentences.append(wording.format(**vars(f), Side=f.side.capitalize(), Size=f.size.capitalize()))
    stated, stated_before = ({f.name for f in s.findings} for s in (spec, before or spec))
    absent = [name for name in kinds if name not in stated_before]
    r.shuffle(absent)
    denies = stated_before and r.random() < 0.4
    most = (1 if r.random() < 0.5 else 2) if denies else 0
    denied = [kinds[name].noun for name in absent[:most] if name not in stated]
    if not stated:
        sentences.append(str(r.choice(NORMAL[spec.modality])))
    elif denied:
        sentences.append(f"No {' or '.join(denied)}.")
    return " ".join(sentences)


def ask_whether(kind, wording):
    """The question whether an image shows a finding, in one of two wordings."""
    article = "" if not kind.countable else "an " if kind.noun[0] in "aeiou" else "a "
    be = "Are" if kind.noun.endswith("lesions") else "Is"
    return (f"{be} there {article}{kind.noun}?", f"Does the image show {article}{kind.noun}?")[wording]


def ask_phantom(spec):
    """Questions and answers of a phantom: one present, one absent, one side, the modality."""
    r, kinds = spec.rng("questions"), MODALITIES[spec.modality]
    present = [f.name for f in spec.findings]
    absent = [name for name in kinds if name not in present]
    questions = [("Which modality is this?", OPENING[spec.modality][0])]
    for names, answer in ((present, "Yes."), (absent, "No.")):
        if names:
            questions.append((ask_whether(kinds[r.choice(names)], r.integers(2)), answer))
    if sided := [f for f in spec.findings if f.side]:
        f = sided[r.integers(len(sided))]
        questions.append((f"On which side is the {kinds[f.name].noun}?", f"{f.side.capitalize()}."))
    return tuple(questions)


def phantom_record(spec, size=64):
    """The whole record of a spec."""
    (image, masks), name = draw(spec, size), f"{spec.split}/{spec.index}"
    return Record(image, write_report(spec), name, spec.findings, masks, spec.modality, "", ask_phantom(spec), name, spec)


class Phantoms:
    """A sequence of n phantom records, each drawn when it is asked for (about 1 ms)."""

    def __init__(self, split, n, seed=0, bias=0.9, size=64, modalities=3):
        self.split, self.n, self.seed, self.bias, self.size, self.modalities = split, n, seed, bias, size, modalities

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        return phantom_record(phantom_spec(self.seed, self.split, index, self.bias, self.modalities), self.size)


def redraw(spec, change, rng):
    """The Spec of the same patient with one finding changed; None where that is impossible.

    change: "remove" takes one finding out, "add" puts one in, "mirror" moves one to the other side."""
    findings, kinds = {f.name: f for f in spec.findings}, MODALITIES[spec.modality]
    usable = {"remove": list(findings), "add": [name for name in kinds if name not in findings],
              "mirror": [name for name, f in findings.items() if f.side]}[change]
    if not usable:
        return None
    name = str(rng.choice(usable))
    if change == "remove":
        del findings[name]
    elif change == "add":
        findings[name] = random_finding(name, kinds[name], rng)
    else:
        findings[name] = replace(findings[name], side=OPPOSITE[findings[name].side])
    return replace(spec, findings=tuple(findings[name] for name in kinds if name in findings))


# ---- The lesson: distortions, which make the dispreferred data -----------------------------------

def add_noise(image, rng, strength):
    """DDPM's forward process √ᾱ·x + √(1−ᾱ)·ε at step `strength` of 1000, linear β (arXiv:2006.11239)."""
    alpha = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[min(strength, 1000) - 1]
    x = image / 127.5 - 1.0
    x = np.sqrt(alpha) * x + np.sqrt(1 - alpha) * rng.standard_normal(image.shape)
    return ((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def blur(image, rng, strength):
    """Gaussian blur of 3 to 6 % of the width."""
    radius = image.shape[1] * rng.uniform(0.03, 0.06)
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def lower_contrast(image, rng, strength):
    """Contrast cut to 20 to 40 % around the mean."""
    return (image.mean() + (image - image.mean()) * rng.uniform(0.2, 0.4)).round().astype(np.uint8)


def invert(image, rng, strength):
    """Black and white exchanged."""
    return 255 - image


def shuffle_patches(image, rng, strength):
    """A 4x4 grid of patches in random order."""
    h, w = image.shape[0] // 4, image.shape[1] // 4
    corners = [(y, x) for y in range(0, 4 * h, h) for x in range(0, 4 * w, w)]
    result = image.copy()
    for (y, x), (from_y, from_x) in zip(corners, rng.permutation(corners)):
        result[y:y + h, x:x + w] = image[from_y:from_y + h, from_x:from_x + w]
    return result


def cut_out(image, rng, strength):
    """A black rectangle of half the height and width."""
    h, w = image.shape[0] // 2, image.shape[1] // 2
    y, x = rng.integers(h + 1), rng.integers(w + 1)
    result = image.copy()
    result[y:y + h, x:x + w] = 0
    return result


def crop(image, rng, strength):
    """A random window of a fifth of the area, enlarged."""
    h, w = (round(side * 0.2 ** 0.5) for side in image.shape[:2])
    y, x = rng.integers(image.shape[0] - h + 1), rng.integers(image.shape[1] - w + 1)
    window = Image.fromarray(image[y:y + h, x:x + w])
    return np.asarray(window.resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC))


def flip(image, rng, strength):
    """Left and right exchanged: the classic laterality error."""
    return image[:, ::-1].copy()


PIXEL_DISTORTIONS = {"noise": add_noise, "blur": blur, "contrast": lower_contrast, "invert": invert,
                     "shuffle": shuffle_patches, "cutout": cut_out, "crop": crop, "flip": flip}
DISTORTIONS = (*PIXEL_DISTORTIONS, "region-noise", "remove", "add", "mirror", "other")


class Twin(NamedTuple):
    """A record's distorted twin: its image, and what tells the two apart in words, where that is known."""

    image: np.ndarray | None     # None where the distortion does not apply
    kind: str                    # the distortion asked for, or the one that stands in for it
    text: str = ""               # the twin's own report
    question: str = ""           # one that the two answer differently
    answers: tuple = ("", "")    # the record's and the twin's


def ask_difference(spec, twin, rng):
    """A question that two phantoms answer differently, and their answers: whether the changed finding is there, or its side."""
    before, after = ({f.name: f for f in s.findings} for s in (spec, twin))
    name, kind = next((n, k) for n, k in MODALITIES[spec.modality].items() if before.get(n) != after.get(n))
    if name in before and name in after:
        return f"On which side is the {kind.noun}?", tuple(f"{found[name].side.capitalize()}." for found in (before, after))
    return ask_whether(kind, rng.integers(2)), tuple("Yes." if name in found else "No." for found in (before, after))


def ask_removed(record, name):
    """The record's own question about this finding, and (its answer, "No."); () if it has none."""
    named = phrase_pattern(PHRASES.get(name, (name.lower(),)))
    return next(((q, (a, "No.")) for q, a in record.questions if named.search(q.lower()) and a.lower().startswith("yes")), ())


def ask_both(record, another):
    """A question that both records have and answer differently, and their answers; () if there is none."""
    theirs = dict(another.questions)
    return next(((q, (a, theirs[q])) for q, a in record.questions if theirs.get(q, a) != a), ())


def erase(image, mask):
    """The mask filled with the median of the pixels around it."""
    ring = np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(7))) & ~mask
    result = image.copy()
    result[mask] = np.median(image[ring], axis=0) if ring.any() else 0
    return result


def distort(record, records, kind, strength, rng, region=None):
    """The Twin of one of the records. Twin.kind names what was done where the kind asked for is impossible.

    PIXEL_DISTORTIONS  change the whole image.
    region-noise       adds noise inside the masks of all findings; where none has one, inside region(), a mask (H, W)
                       or None that the caller finds ("model-region-noise"); else everywhere ("noise").
    remove/add/mirror  draw a phantom again with one finding taken out, put in or moved across; add stands in for the others.
                       In a real image remove fills one finding's mask; mirror flips the image if a finding has a side.
    other              takes the image of another record that states something else; it stands in for all else."""
    if kind in PIXEL_DISTORTIONS:
        return Twin(PIXEL_DISTORTIONS[kind](record.image, rng, strength), kind)
    if kind in ("remove", "add", "mirror") and record.spec:
        for change in (kind, "add"):
            if spec := redraw(record.spec, change, rng):
                image, _ = draw(spec, record.image.shape[0])
                return Twin(image, change, write_report(spec, record.spec), *ask_difference(record.spec, spec, rng))
    names = sorted({f.name for f in record.findings or ()} & record.masks.keys())
    if kind == "remove" and names:
        name = names[rng.integers(len(names))]
        return Twin(erase(record.image, record.masks[name]), kind, "", *ask_removed(record, name))
    if kind == "region-noise":
        mask = np.any([record.masks[name] for name in names], axis=0) if names else None
        if mask is None:
            kind, mask = "model-region-noise", region() if region else None
        noise = add_noise(record.image, rng, strength)
        if mask is None:
            return Twin(noise, "noise")
        return Twin(np.where(mask if noise.ndim == 2 else mask[..., None], noise, record.image), kind)
    if kind == "mirror" and any(f.side in OPPOSITE for f in record.findings or ()):      # else nothing that is said changes
        return Twin(flip(record.image, rng, strength), kind)
    for _ in range(20):
        another = records[int(rng.integers(len(records)))]
        if not same_statement(record, another):
            return Twin(another.image, "other", another.text, *ask_both(record, another))
    return Twin(None, "other")


# ---- For consultation: how a phantom is drawn ----------------------------------------------------

# Coordinates run from -1 to 1, x to the right of the image (the patient's left), y down. The functions paint Canvas c:
# the anatomy from generator a, then the findings `found`, {name: Finding that also has the sign of its x and an rng}.
SIGN = {"left": 1.0, "right": -1.0}


class Canvas:
    """A gray image in 0..1 with its masks; edges are one pixel soft."""

    def __init__(self, size, tilt):
        x = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1                     # of the pixels' centres
        y = x[:, None]
        self.x, self.y = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
        self.soft = 2.0 / size
        self.image, self.masks = np.zeros((size, size), np.float32), {}

    def ellipse(self, cx, cy, rx, ry):
        """Coverage 0..1 of an ellipse."""
        distance = np.sqrt(((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2)
        return np.clip((1 - distance) * min(rx, ry) / self.soft + 0.5, 0, 1)

    def blob(self, cx, cy, r):
        """A soft bump, 1 at its centre and falling like a Gaussian of width r."""
        return np.exp(-((self.x - cx) ** 2 + (self.y - cy) ** 2) / (r * r))

    def below(self, level):
        """Coverage of what lies below a curve y = level (a number or an array)."""
        return np.clip((self.y - level) / self.soft + 0.5, 0, 1)

    def paint(self, coverage, value, name=None):
        """Blend towards `value` where coverage is; under a name, remember it as a mask."""
        self.image += coverage * (value - self.image)
        if name:
            self.masks[name] = self.masks.get(name, False) | (coverage > 0.4)


def draw_chest(c, found, a):
    """A frontal radiograph: body, lungs, ribs, heart, then the findings, a nodule last."""
    width, base = a.uniform(0.30, 0.36), a.uniform(0.55, 0.65)
    c.paint(c.ellipse(0, 0.35, a.uniform(0.92, 1.0), 1.5), a.uniform(0.55, 0.65))
    lungs = {}
    for side, sign in SIGN.items():
        lungs[side] = c.ellipse(sign * a.uniform(0.43, 0.47), -0.05, width, a.uniform(0.68, 0.74)) \
            * (1 - c.below(base + 0.25 * (np.abs(c.x) - 0.45) ** 2))
        c.paint(lungs[side], a.uniform(0.15, 0.22), f"{side} lung")
    for i in range(5):                                         # ribs: faint arcs over the lungs
        y = -0.55 + 0.26 * i + 0.35 * (np.abs(c.x) - 0.2) ** 2
        c.image += 0.05 * np.exp(-((c.y - y) / 0.035) ** 2) * (lungs["left"] + lungs["right"])
    c.paint(c.ellipse(0, 0, 0.10, 1.4), 0.75)                  # spine and mediastinum
    big = "cardiomegaly" in found
    heart = c.ellipse(0.14 + 0.05 * big, 0.33, a.uniform(0.26, 0.30) + 0.16 * big, 0.30 + 0.04 * big)
    c.paint(heart * (1 - c.below(base + 0.05)), 0.72, "heart")
    if big:
        c.masks["cardiomegaly"] = c.masks["heart"]
    if f := found.get("effusion"):
        level = base - (0.42 if f.size == "large" else 0.20) + f.rng.uniform(-0.03, 0.03)
        meniscus = level - 0.28 * np.clip((f.sign * c.x - 0.45) / 0.3, -0.5, 1)
        c.paint(lungs[f.side] * c.below(meniscus), 0.68, "effusion")
    if f := found.get("pneumothorax"):
        depth = (0.34 if f.size == "large" else 0.20) + f.rng.uniform(-0.02, 0.02)
        collapsed = c.ellipse(f.sign * (0.45 - depth * 0.5), -0.05 + depth, width * 0.92, 0.70)
        c.paint(lungs[f.side] * (1 - collapsed) * (1 - c.below(0.25)), 0.02, "pneumothorax")
    if f := found.get("consolidation"):
        x, y = f.sign * f.rng.uniform(0.42, 0.56), (-0.38 if f.place == "upper" else 0.18) + f.rng.uniform(-0.06, 0.06)
        cloud = c.blob(x, y, f.rng.uniform(0.17, 0.22)) * lungs[f.side]
        c.paint(0.85 * np.clip(1.3 * cloud, 0, 1), 0.60, "consolidation")
    if f := found.get("nodule"):
        x, y = f.sign * f.rng.uniform(0.40, 0.58), (-0.40 if f.place == "upper" else 0.15) + f.rng.uniform(-0.12, 0.12)
        radius = f.rng.uniform(0.10, 0.125)
        c.paint(c.ellipse(x, y, radius, radius), 0.92, "nodule")


def draw_skull(c, a, bone, brain):
    """Skull ring and brain; returns (coverage of the brain, its half width, its half height)."""
    rx, ry = a.uniform(0.70, 0.78), a.uniform(0.84, 0.92)
    c.paint(c.ellipse(0, 0, rx, ry), bone)
    inside = c.ellipse(0, 0, rx - 0.09, ry - 0.09)
    c.paint(inside, brain, "brain")
    return inside, rx - 0.09, ry - 0.09


def draw_ventricles(c, a, value, scale, shift):
    """A pair of frontal horns, `scale` times normal width, moved by `shift` along x."""
    for sign in SIGN.values():
        c.paint(c.ellipse(shift + sign * 0.11 * scale, -0.04, a.uniform(0.060, 0.075) * scale,
                          a.uniform(0.22, 0.26) * (0.7 + 0.3 * scale)), value, "ventricles")


def draw_head_ct(c, found, a):
    """An axial head CT: bright skull, gray brain, dark ventricles, then the findings."""
    inside, rx, ry = draw_skull(c, a, 0.95, a.uniform(0.40, 0.46))
    shift = found["shift"].sign * found["shift"].rng.uniform(0.15, 0.19) if "shift" in found else 0.0
    falx = np.exp(-((c.x - shift * np.clip(1 - (c.y / ry) ** 2, 0, 1)) / 0.025) ** 2)
    c.paint(0.5 * falx * inside, 0.62)                         # the midline bulges with a shift
    draw_ventricles(c, a, 0.12, 1.75 if "hydrocephalus" in found else 1.0, shift)
    if shift:
        c.masks["shift"] = c.masks["ventricles"] | (c.ellipse(shift / 2, 0, 0.2, ry) > 0.5)
    if "hydrocephalus" in found:
        c.masks["hydrocephalus"] = c.masks["ventricles"]
    if f := found.get("infarct"):
        radius = 0.32 if f.size == "large" else 0.21
        c.paint(c.ellipse(f.sign * (rx - 0.10), f.rng.uniform(0.22, 0.36), radius, radius * 1.1) * inside, 0.18, "infarct")
    if f := found.get("haemorrhage"):
        radius = (0.21 if f.size == "large" else 0.12) + f.rng.uniform(-0.01, 0.01)
        x, y = f.sign * f.rng.uniform(0.34, 0.40), f.rng.uniform(-0.42, -0.05)
        c.paint(c.ellipse(x, y, radius, radius * 1.1) * inside, 0.85, "haemorrhage")
    if f := found.get("subdural"):
        rest = c.ellipse(-f.sign * f.rng.uniform(0.13, 0.17), 0, rx, ry + 0.02)
        c.paint(inside * (1 - rest) * (f.sign * c.x > 0), 0.68, "subdural")


def draw_brain_mri(c, found, a):
    """An axial T2-like brain MRI: thin scalp, textured brain, bright fluid, then the findings."""
    inside, rx, ry = draw_skull(c, a, 0.30, a.uniform(0.42, 0.48))
    c.paint(inside * c.ellipse(0, 0, rx * 0.78, ry * 0.80), 0.36, "white matter")
    wide = "atrophy" in found
    angle = np.arctan2(c.y / ry, c.x / rx)
    rim = inside * (1 - c.ellipse(0, 0, rx - (0.15 if wide else 0.08), ry - (0.15 if wide else 0.08)))
    sulci = np.clip(np.sin(angle * 11 + a.uniform(0, 6)) * 2 + (0.6 if wide else -0.6), 0, 1)
    c.paint(rim * sulci * (1.0 if wide else 0.6), 0.85, "atrophy" if wide else None)
    draw_ventricles(c, a, 0.88, 1.15 if wide else 1.0, 0.0)
    if f := found.get("oedema"):
        cloud = c.blob(f.sign * f.rng.uniform(0.34, 0.38), f.rng.uniform(0.28, 0.36), f.rng.uniform(0.19, 0.22)) * inside
        c.paint(np.clip(1.4 * cloud, 0, 1) * 0.85, 0.70, "oedema")
    if f := found.get("lesions"):
        for sign in SIGN.values():
            for y in (-0.50, -0.22, 0.12):
                spot = c.ellipse(sign * f.rng.uniform(0.25, 0.40), y + f.rng.uniform(-0.06, 0.06), 0.058, 0.058)
                c.paint(spot, 0.95, "lesions")
    if f := found.get("tumour"):
        radius = (0.22 if f.size == "large" else 0.15) + f.rng.uniform(-0.01, 0.01)
        x, y = f.sign * f.rng.uniform(0.32, 0.38), f.rng.uniform(-0.38, -0.22)
        c.paint(c.ellipse(x, y, radius, radius), 0.92, "tumour")
        c.paint(c.ellipse(x, y, radius * 0.5, radius * 0.5), 0.40)
    if f := found.get("cyst"):
        c.paint(c.ellipse(f.sign * (rx - 0.16), f.rng.uniform(0.02, 0.12), 0.13, 0.17) * inside, 0.02, "cyst")


# ---- For consultation: folders of real images ----------------------------------------------------

MIN_SIDE, MAX_PIXELS, MOST_NAMED = 16, 64_000_000, 200
SPLIT_NAMES = {**dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"), "test": "test", "testing": "test"}    # else train
DESCRIBE = re.compile(r"^(?!(?:is|are|was|were|do|does|did|has|have)\b(?! you\b)[^.?]*\?$)"
                      r".*\b(?:describe|descriptions?|reports?|captions?|summar(?:y|i[sz]e))\b", re.I)


class BadRow(ValueError):
    """Why one row of a data set cannot be used, in words."""


def printable(text):
    """The text with half characters (JSON's lone "\\ud800") as "?": they can be neither printed nor tokenized."""
    return text.encode("utf-8", "replace").decode()


@lru_cache
def say_once(sentence):
    """Print a sentence, but only once."""
    tqdm.write(printable(sentence))


def path_inside(root, name):
    """The path of the file `name` under root. Raises BadRow for one that is absolute, missing or outside of root."""
    if not isinstance(name, str) or not name:
        raise BadRow("no file name")
    if Path(name).is_absolute() or re.match(r"[A-Za-z]:|\\", name):
        raise BadRow(f"absolute path {name}; paths are relative to the metadata's folder")
    if not os.path.isfile(root / name):              # False, too, of names that no system takes and of a loop of links
        raise BadRow(f"there is no file {name}")
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise BadRow(f"the path {name} leads out of the data folder")
    return path


def open_image(path, channels):
    """An image file as an upright PIL image of mode L or RGB: 16-bit gray scaled, transparency laid on black, palettes and CMYK
    converted. The header is checked before any pixel is decoded. Raises BadRow."""
    try:
        if path.stat().st_size == 0:
            raise BadRow("the file is empty")
        with warnings.catch_warnings(record=True), Image.open(path) as image:      # hides warnings of odd metadata
            if image.width * image.height > MAX_PIXELS:
                raise BadRow(f"{image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} that are read")
            if min(image.size) < MIN_SIDE:
                raise BadRow(f"{image.width}x{image.height} pixels; the shorter side must have {MIN_SIDE}")
            if getattr(image, "n_frames", 1) > 1:
                say_once("of images with several frames the first is taken")
            image.load()
            image = to_eight_bits(ImageOps.exif_transpose(image))
    except Exception as error:            # Pillow's decoders raise whatever a broken file leads them to
        raise error if isinstance(error, BadRow) else BadRow(
            f"not a readable image ({str(error).split(' <')[0].replace(str(path), path.name)})")
    return image.convert("RGB" if channels == 3 else "L")


def fit_square(image, size, resample=Image.Resampling.LANCZOS):
    """A PIL image as (size, size) or (size, size, 3) uint8, padded to a square with black."""
    if max(image.size) != size:           # before padding: the square around a long strip may not fit into memory
        image = image.resize([max(1, round(side * size / max(image.size))) for side in image.size], resample)
    square = Image.new(image.mode, (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square)


def read_image(path, size, channels):
    """An image file as (size, size) or (size, size, 3) uint8. Raises BadRow."""
    return fit_square(open_image(Path(path), channels), size)


def read_mask(path, size, image):
    """A mask file as (size, size) bool: what is brighter than half of its brightest, so masks of 0 and 1 do as well.

    Raises BadRow, which names the file, also where its shape is not that of the PIL image, to a pixel: it would lie askew."""
    try:
        mask = open_image(path, 1)
        if abs(mask.width * image.height - mask.height * image.width) > max(*image.size, *mask.size):
            raise BadRow(f"{mask.width}x{mask.height} pixels, in another shape than its image's {image.width}x{image.height}")
        if mask.getextrema()[1] <= 32 and len(mask.getcolors()) > 2:                # labels 0, 1, 2; an edge has grays, and white
            raise BadRow("the labels of several structures; save each as a mask of its own")
    except BadRow as error:
        raise BadRow(f"mask {path.name}: {error}")
    half = mask.getextrema()[1] / 2
    return fit_square(mask.point(lambda value: 255 * (value > half)), size, Image.Resampling.BOX) > 127


def to_eight_bits(image):
    """A PIL image of any mode as L or RGB."""
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
        if values.min() < 0:
            raise BadRow("values below 0; bring it to 8 or 16 bits first, through the window that shows what counts")
        # the depth is not written in the file: the least of 8, 12 and 16 bits that holds the largest value
        top = next((t for t in (1.0, 255.0, 4095.0, 65535.0) if values.max() <= t), values.max())
        return Image.fromarray((values / top * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")


def row_record(row, root, size, channels):
    """A record from one row of metadata (a dict); its image and masks are Paths of files that can be read. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow("it is not an object with the fields of its layout")
    if any(isinstance(c, str) and c.strip() for c in (*(row.get(None) or ()), row.get("") if next(iter(row), "") else "")):
        raise BadRow("more cells than columns: put texts that hold commas in quotes")       # nameless and first: pandas' index
    text = row.get("text") or row.get("caption") or row.get("report") or ""
    questions, findings, masks = (read_cell(row.get(field)) for field in ("questions", "findings", "masks"))
    usable = [q for q in questions if isinstance(q, dict) and {"question", "answer"} <= q.keys()] if isinstance(questions, list) else []
    if questions and usable != questions:
        say_once('what in `questions` is no {"question", "answer"} is left out (a CSV cell is a list of them, in JSON)')
    word = lambda v: printable(str(v).strip()) if isinstance(v, str | int | float) and v == v else ""      # no NaN, no list
    questions = tuple(pair for pair in ((word(q["question"]), word(q["answer"])) for q in usable) if all(pair))
    if not isinstance(text, str) or not (text.strip() or questions):
        raise BadRow("the text is empty" if isinstance(text, str) else "the text is no string")
    findings = None if findings is None else read_named(findings)
    if not isinstance(masks := masks or {}, dict):
        raise BadRow('masks must be {"structure": "file"}')
    masks = {printable(structure.replace("_", " ")): path_inside(root, file) for structure, file in masks.items()}
    ids = [row.get(k) for k in ("patient_id", "subject_id", "subject", "study_id")]
    ids = [re.sub(r"^(\d+)\.0$", r"\1", str(i).strip()) for i in ids if i is not None and i == i]    # pandas makes 5 a 5.0, none a NaN
    record = Record(path_inside(root, row.get("file_name")), printable(" ".join(text.split())), row["file_name"], findings, masks,
                    *(str(row.get(k) or "") for k in ("modality", "body_part")), questions, next(filter(None, ids), ""))
    read_pixels(record, size, channels)                # a file that cannot be read is refused here, not in training
    return record


def read_pixels(record, size, channels):
    """The same record with pixels in place of Paths. Raises BadRow."""
    image = open_image(record.image, channels)
    return replace(record, image=fit_square(image, size), masks={name: read_mask(path, size, image) for name, path in record.masks.items()})


class Folder:
    """The records of row_record as a sequence: the pixels of each are read when it is asked for, and not kept."""

    def __init__(self, rows, size, channels):
        self.rows, self.size, self.channels = rows, size, channels

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        record = self.rows[index]
        with refuse(f"{record.name} has changed since --data was read", "start again"):
            return read_pixels(record, self.size, self.channels)


def read_cell(value):
    """A value out of a row: JSON text, as CSV cells hold it, is decoded, "" is None, all else stays as it is."""
    try:
        return json.loads(value or "null") if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def read_named(rows):
    """The field `findings` of a row as a tuple of Finding. Raises BadRow: an odd field must not count as "no findings"."""
    is_named = lambda f: isinstance(f, dict) and isinstance(f.get("name"), str) and f["name"].strip(" _-.") \
        and f.get("side") in (None, "", *LEFT_RIGHT, "bilateral")
    if not isinstance(rows, list) or not all(map(is_named, rows)):
        raise BadRow('findings must be a list, in JSON, of {"name", "side"}, the side left, right, bilateral or null')
    found = (Finding(printable(f["name"].replace("_", " ")), f.get("side") or "") for f in rows)
    return tuple(f for f in found if not re.fullmatch("no findings?", f.name.strip(), re.I))               # this label names none


def metadata_rows(path):
    """(line number, row) of a metadata.jsonl or a CSV file, read line by line."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="" if path.suffix == ".csv" else "\n") as file:
        if path.suffix == ".csv":
            csv.field_size_limit(max(path.stat().st_size, 131_072))
            reader = csv.DictReader(line.replace("\0", "\ufffd") for line in file)           # Python 3.10 stops at a NUL
            if not {"file_name", "ID"} & {*(reader.fieldnames or ())}:
                raise UserError(f"{path} has no column file_name (ROCOv2: ID): save it with a line of names first, commas, and in UTF-8")
            yield from ((reader.line_num, row) for row in reader)
        else:                                                  # row_record refuses a line that is not JSON
            yield from ((number, read_cell(line)) for number, line in enumerate(file, 1) if line.strip())


def imagefolder_rows(folder):
    """(split, file, row number, row, image root) of Hugging Face's ImageFolder with metadata."""
    for sub in [folder, *sorted(filter(Path.is_dir, folder.iterdir()))]:
        split = "train" if sub == folder else SPLIT_NAMES.get(sub.name.lower(), "train")
        files = [*filter(Path.is_file, (sub / "metadata.jsonl", sub / "metadata.csv"))]
        if len(files) > 1:
            say_once(f"{files[1]} is passed over: {files[0].name} stands beside it")
        for file in files[:1]:
            for number, row in metadata_rows(file):
                yield split, file, number, row, sub


def rocov2_rows(folder):
    """The same of ROCOv2: NAME_captions.csv (ID, Caption) beside a folder NAME of images."""
    for file in sorted(filter(Path.is_file, folder.glob("*_captions.csv"))):
        name = file.name[:-len("_captions.csv")]
        for number, row in metadata_rows(file):
            names = [f"{row.get('ID')}{end}" for end in (".jpg", ".png", ".jpeg")]
            found = next((n for n in names if os.path.isfile(folder / name / n)), names[0])
            row = {"file_name": found, "text": row.get("Caption"), None: row.get(None)}
            yield SPLIT_NAMES.get(name.lower(), "train"), file, number, row, folder / name


def llava_rows(folder):
    """The same of LLaVA's conversation JSON, images beside it or in images/."""
    root = folder / "images" if (folder / "images").is_dir() else folder
    for file in sorted(filter(Path.is_file, folder.glob("*.json"))):
        with refuse(f"{file} is not JSON", "mend it or take it out of --data"):
            items = json.loads(file.read_text(encoding="utf-8"))
        for number, item in enumerate(items if isinstance(items, list) else [], 1):
            try:
                image = item["image"].removeprefix("images/")
                row = {"file_name": image, "subject": image, **turns(item["conversations"])}
            except (KeyError, TypeError, AttributeError):
                row = None
            yield SPLIT_NAMES.get(file.stem.lower(), "train"), file, number, row, root


def turns(conversations):
    """One LLaVA conversation as fields of a row: what answers the first request to describe becomes the text, the rest questions.

    Before a question stand all earlier turns, answers too. A request for an image gives its own words as the text."""
    row, so_far = {"questions": []}, ""
    for human, gpt in zip(conversations[::2], conversations[1::2]):
        if (human["from"], gpt["from"]) != ("human", "gpt"):
            raise KeyError("from")
        ask, answer = (" ".join(t["value"].replace("<image>", " ").split()) for t in (human, gpt))
        if not answer and "<image>" in gpt["value"]:
            row["text"] = re.sub(r"^(generate|draw|create|make)\b[^:]*:\s*", "", ask, flags=re.I)
        elif "text" not in row and DESCRIBE.search(ask):
            row["text"] = answer
        else:
            row["questions"].append({"question": so_far + ask, "answer": answer})
        so_far += f"{ask} {answer} "
    return row


@lru_cache(maxsize=2)
def read_folder(folder, size, channels):
    """{"train": records, "val": …, "test": …} of a folder in any of the three layouts.

    Rows that cannot be used are named with their cause, the first MOST_NAMED, and counted. Raises UserError
    if nothing is left. Where a split is missing, a tenth of the training subjects makes it."""
    root = Path(folder)
    with refuse(f"--data {str(folder)[:200]} is no folder that can be read", "name one"):
        next(root.iterdir(), None)                             # raises where the folder is missing, a file or not readable
    splits, skipped, seen = {"train": [], "val": [], "test": []}, Counter(), None
    for layout, rows in {"ImageFolder": imagefolder_rows, "ROCOv2": rocov2_rows, "LLaVA": llava_rows}.items():
        for split, file, number, row, image_root in tqdm(rows(root), desc=f"reading {folder}", unit="row", leave=False):
            seen = layout
            try:
                record = row_record(row, image_root, size, channels)
                # without a patient's name each file is its own subject; train/0.png is not test/0.png
                record.subject = record.subject or (record.name if split == "train" else f"{split}/{record.name}")
                splits[split].append(record)
            except BadRow as error:
                why = str(error)[:300]                         # the pattern takes quadratic time over what has no space
                skipped[re.sub(r"\d[\d,x]*|\S*[/.]\S+", "…", why)[:200]] += 1
                if skipped.total() <= MOST_NAMED:
                    name = f" ({str(row['file_name'])[:100]})" if isinstance(row, dict) and row.get("file_name") else ""
                    tqdm.write(printable(f"skipped {file.relative_to(root)} row {number}{name}: {why}"))
                elif skipped.total() == MOST_NAMED + 1:
                    tqdm.write("further rows that are skipped are only counted")
        if seen:
            break
    if not seen:
        raise UserError(f"--data {folder} is empty or in no known layout: it needs metadata.jsonl or metadata.csv "
                        "(file_name, text), NAME_captions.csv with a folder NAME, or a LLaVA *.json")
    n, odd = sum(map(len, splits.values())), sum("\ufffd" in r.text for rows in splits.values() for r in rows)
    causes = "; ".join(f"{count} {why}" for why, count in skipped.most_common(20))
    tqdm.write(f"{folder}: {seen} layout, {n} read, {skipped.total()} skipped" + f" ({causes})" * bool(causes)
               + f"; {odd} texts hold letters that are not UTF-8" * bool(odd))
    if n == 0:
        raise UserError(f"--data {folder}: no usable row ({causes or 'no rows at all'})")
    return {split: Folder(rows, size, channels) for split, rows in fill_splits(splits, folder).items()}


def fill_splits(splits, folder):
    """Give a missing validation or test split a tenth of the training subjects, at least one."""
    taken = set()
    for split in ("test", "val", "train"):             # a subject named in several splits stays in the first of these
        rows = [r for r in splits[split] if r.subject not in taken]
        if dropped := len(splits[split]) - len(rows):
            tqdm.write(f"{folder}: {dropped} rows of {split} dropped: their subjects are also in another split")
        splits[split] = rows
        taken |= {r.subject for r in rows}
    for split in [name for name in ("test", "val") if not splits[name]]:
        subjects = sorted({r.subject for r in splits["train"]}, key=lambda s: (zlib.crc32(printable(s).encode()), s))
        if len(subjects) < 2:
            raise UserError(f"--data {folder}: {len(subjects)} training subject(s) are too few to hold one out as {split}; 3 are needed")
        held = set(subjects[:max(1, len(subjects) // 10)])
        splits[split] = [r for r in splits["train"] if r.subject in held]
        splits["train"] = [r for r in splits["train"] if r.subject not in held]
    if not splits["train"]:
        raise UserError(f"--data {folder}: no training row is left whose subject is not also in val or test")
    tqdm.write(f"{folder}: {', '.join(f'{len(rows)} {split}' for split, rows in splits.items())}")
    return splits


def image_source(cfg):
    """Where images come from: the folder's path, or "phantoms", and of how many modalities if not of all."""
    phantoms = "phantoms" + f" --modalities {cfg.modalities}" * (cfg.modalities < len(MODALITIES))
    return str(Path(cfg.data).resolve()) if cfg.data else phantoms


def fingerprint(records):
    """Twelve hex digits of records: a phantom's recipe, or all rows and the times of their images; and of this file, which reads them."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(vars(records) if isinstance(records, Phantoms) else "").encode())
    for r in records.rows if isinstance(records, Folder) else ():
        times = [path.stat().st_mtime_ns for path in (r.image, *r.masks.values())]
        digest.update(repr((astuple(r), times)).encode("utf-8", "replace"))
    return digest.hexdigest()[:12]


def open_data(cfg):
    """{"train", "val", "test"}: sequences of records, from --data or drawn."""
    if cfg.data:
        return read_folder(cfg.data, cfg.image_size, cfg.channels)
    sizes = {"train": cfg.records, "val": max(32, cfg.records // 10), "test": 100_000}
    return {split: Phantoms(split, n, cfg.seed, cfg.bias, cfg.image_size, cfg.modalities) for split, n in sizes.items()}


# ---- For consultation: findings read back from a report ------------------------------------------

PHRASES = {name: kind.phrases for kinds in MODALITIES.values() for name, kind in kinds.items()}
MODALITY_PHRASES = {"CT": ("ct", "computed tomography"), "MRI": ("mri", "mr", "magnetic resonance"),
                    "radiograph": ("radiograph", "x ray", "xray", "cxr", "radiography")}
BODY_PHRASES = {"abdomen": ("abdomen", "abdominal"), "breast": ("breast",), "chest": ("chest", "thorax", "lungs"),
                "hand": ("hand",), "head": ("head", "brain", "skull")}
DENIED = re.compile(r"(?<!\bthere )\b(?:is|are|was|were) (?:not|no longer)\b")    # "is not seen" denies what stands before it
NEGATION = re.compile(r"\b(?:no|not|without|negative for|free of)\b")   # denies what follows


def lexicon(records):
    """finding name -> phrases, for the findings named in a sequence of records."""
    if isinstance(records, Phantoms):
        return {name: PHRASES[name] for kinds in list(MODALITIES.values())[:records.modalities] for name in kinds}
    rows = records.rows if isinstance(records, Folder) else records
    phrase = lambda name: " ".join(name.lower().replace("-", " ").split())
    return {n: PHRASES.get(n, (phrase(n),)) for n in sorted({f.name for r in rows for f in r.findings or ()})}


@lru_cache
def phrase_pattern(phrases):
    """Any of the phrases in whole words; an s may follow."""
    return re.compile(r"\b(" + "|".join(map(re.escape, phrases)) + r")s?\b")


def read_findings(text, phrases):
    """The findings that a report asserts, as a tuple of Finding; negated sentences assert nothing.

    A sentence is read clause by clause (commas and "and"), up to its first negation; a clause like "nodule is absent" denies itself."""
    found = {}
    for sentence in re.split(r"[.;\n]+", text.lower().replace("-", " ")):
        sentence = re.sub(r"\bleft and right\b|\bright and left\b|\bboth\b", "bilateral", DENIED.sub("absent", sentence))
        clauses = re.split(r",|\band\b", NEGATION.split(sentence)[0])
        for clause in [c for c in clauses if not re.search(r"\babsent\b", c)]:
            word = lambda *options: next((w for w in options if re.search(rf"\b{w}", clause)), "")
            for name, options in phrases.items():
                if phrase_pattern(options).search(clause):
                    f = Finding(name, word("bilateral", "left", "right"), word(*SIZES), word(*PLACES))
                    found.setdefault((f.name, f.side), f)
    return tuple(found.values())


def read_term(text, terms):
    """The first of the terms (name -> phrases) that a text uses, or ""."""
    text = text.lower().replace("-", " ")
    hits = [(m.start(), name) for name, phrases in terms.items() if (m := phrase_pattern(phrases).search(text))]
    return min(hits)[1] if hits else ""


def statement_of(text, phrases):
    """What two reports must differ in: their findings; where none are known of, modality and body part; else words."""
    if phrases:
        return frozenset(names_and_sides(read_findings(text, phrases)))
    terms = {read_term(text, MODALITY_PHRASES), read_term(text, BODY_PHRASES)} - {""}
    return frozenset(terms) or text.strip()
