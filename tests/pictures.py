"""Pictures of the README and the lab report, from trained models; pytest does not collect this file.

    python -m tests.pictures OUT --to .github

    method.png      a study and its twin, the two directions, the six contrasts
    codebook.png    what each code of the image tokenizer draws, and how often the test images use it
    occlusion.png   where a finding comes from: what hiding a part of the image costs its sentence, in nats, model by model

The contact sheet and the curves are `python sample.py`'s, the comparison's picture is tests/compare.py's."""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import sample
import sft
from data import Finding, Phantoms, add_noise, distort, draw, names_and_sides
from model import RunConfig, init_run, run, sequence_logps
from vqgan import encode_images

INK, RED, BLUE, GRAY = (20, 20, 20), sample.COLOURS[1], sample.COLOURS[0], (150, 150, 150)
FONT = {size: ImageFont.load_default(size) for size in (13, 15, 18)}


class Sheet:
    """A white picture and the few strokes that it takes."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width, height), sample.PALE)
        self.pen = ImageDraw.Draw(self.image)

    def words(self, x, y, text, colour=INK, size=15, anchor="la"):
        self.pen.multiline_text((x, y), text, colour, FONT[size], anchor=anchor, spacing=4)

    def picture(self, x, y, image, size, frame=None):
        self.image.paste(Image.fromarray(image).convert("RGB").resize((size, size)), (x, y))
        if frame:
            self.pen.rectangle((x - 3, y - 3, x + size + 2, y + size + 2), outline=frame, width=3)

    def arrow(self, x0, y0, x1, y1, colour=INK):
        self.pen.line((x0, y0, x1, y1), colour, 2)
        along = np.array([x1 - x0, y1 - y0]) / np.hypot(x1 - x0, y1 - y0)
        across = along[::-1] * (-1, 1)
        tip = np.array([x1, y1])
        self.pen.polygon([tuple(tip), tuple(tip - 9 * along + 4 * across), tuple(tip - 9 * along - 4 * across)], colour)

    def box(self, x, y, text, colour=INK):
        """A box with a text; returns where it ends."""
        width = round(self.pen.textlength(text, FONT[13])) + 16
        self.pen.rectangle((x, y, x + width, y + 30), outline=colour)
        self.words(x + width // 2, y + 15, text, colour, 13, "mm")
        return x + width

    def codes(self, x, y, codes, size, across):
        """Codes as coloured squares, `across` a row; returns where they end."""
        for i, code in enumerate(codes):
            colour = tuple(int(c) for c in np.random.default_rng(int(code)).integers(70, 235, 3))
            cx, cy = x + i % across * size, y + i // across * size
            self.pen.rectangle((cx, cy, cx + size - 2, cy + size - 2), colour)
        return x + min(across, len(codes)) * size


def a_study(size):
    """A chest radiograph with an enlarged heart and an effusion, its twin without the effusion, and both reports."""
    records = Phantoms("test", 40_000, bias=0, size=size)
    for index, record in enumerate(records):
        if names_and_sides(record.findings) == {("cardiomegaly", ""), ("effusion", "left")}:
            twin = distort(records[index], records, "remove", 0, np.random.default_rng(index))
            if "Small left" in record.text and "effusion" not in twin.text and all(
                    "Enlarged heart" in text and "No " not in text for text in (record.text, twin.text)):
                return record, twin
    raise AssertionError("no such phantom")


def method(vqgan, autocast):
    """The method in one picture."""
    record, twin = a_study(vqgan.config.image_size)
    codes, twin_codes = encode_images([record.image, twin.image], vqgan, autocast)
    side = int(len(codes) ** 0.5)
    say = lambda text: text.replace(". ", ".\n")
    s = Sheet(1180, 690)
    s.words(20, 12, "1  An image becomes codes", size=18)
    s.picture(24, 48, record.image, 130)
    s.arrow(162, 113, 204, 113)
    s.codes(212, 49, codes, 16, side)
    s.words(24, 186, say(record.text), size=13)
    s.words(400, 12, "2  Codes and words are one sequence, read in two directions", size=18)
    for y, what, colour in ((56, "reading", INK), (128, "drawing", INK)):
        s.words(400, y, what, colour)
        strip = lambda x: s.codes(x, y + 31, codes[20:32], 13, 12)
        x = s.box(400, y + 22, "<bos>", GRAY)
        if what == "reading":
            x = s.box(strip(x + 8) + 8, y + 22, "Write the report.", GRAY)
            s.arrow(x + 8, y + 37, x + 44, y + 37, BLUE)
            s.box(x + 52, y + 22, record.text.split(". ", 1)[1], BLUE)
        else:
            x = s.box(x + 8, y + 22, "Draw this: " + record.text.split(". ", 1)[1], GRAY)
            s.arrow(x + 8, y + 37, x + 44, y + 37, BLUE)
            strip(x + 54)
    s.words(400, 196, "sft.py: one small GPT learns both, and questions and masks, from biased data", GRAY, 13)

    s.words(20, 276, "3  A study and its distorted twin", size=18)
    for x, name, image, text, frame in ((24, "m, y", record.image, record.text, BLUE), (204, "m', y'", twin.image, twin.text, RED)):
        s.picture(x, 312, image, 150, frame)
        s.words(x, 472, name, frame, 18)
        s.words(x, 500, say(text), size=13)
    s.words(24, 580, twin.question)
    s.words(24, 604, f"a: {twin.answers[0]}", BLUE)
    s.words(204, 604, f"a': {twin.answers[1]}", RED)
    s.words(24, 640, "The twin stands on the rejected side only.", GRAY, 13)

    s.words(400, 276, "4  Six contrasts: what is genuine must become likelier than ...", size=18)
    s.words(560, 312, "... the twin's response (y_l: SFT's report of m')", RED)
    s.words(870, 312, "... under the twin's condition", RED)
    report, other = record.text.split(". ", 1)[1], twin.text.split(". ", 1)[1]
    rows = (("reading", [("m", "y"), ("m", "y_l"), ("m'", "y")]), ("drawing", [("y", "m"), ("y", "m'"), ("y'", "m")]),
            ("answering", [("q, m", "a"), ("q, m", "a'"), ("q, m'", "a")]))
    pictures = {"m": (record.image, BLUE), "m'": (twin.image, RED)}
    texts = {"y": report, "y'": other, "y_l": other, "a": twin.answers[0], "a'": twin.answers[1]}

    def part(x, y, name):
        key = name.split(", ")[-1]
        if key in pictures:
            s.picture(x, y, pictures[key][0], 62, pictures[key][1])
        else:
            s.words(x, y - 2, textwrap.fill(texts[name], 16), RED if "'" in name or name == "y_l" else BLUE, 13)

    for i, (title, pairs) in enumerate(rows):
        y = 346 + 112 * i
        s.words(400, y + 22, title, size=18)
        for x, (condition, response) in zip((560, 870), pairs[1:]):
            part(x, y, condition)
            s.arrow(x + 100, y + 32, x + 136, y + 32)
            part(x + 146, y, response)
            s.words(x, y + 74, f"r({pairs[0][1]} | {pairs[0][0]})  over  r({response} | {condition})", GRAY, 13)
    return s.image


def codebook(vqgan, autocast, n=2000):
    """What every code stands for, the most used first: the mean of what is drawn where it stands in n test images."""
    images = [r.image for r in Phantoms("test", n, bias=0, size=vqgan.config.image_size)]
    codes = torch.tensor(encode_images(images, vqgan, autocast)).long()
    with autocast():
        pixels = torch.cat([vqgan.decode(part.to(vqgan.device)).float().cpu() for part in codes.split(64)])
    side, K = int(codes.size(1) ** 0.5), vqgan.config.codebook_size
    p = pixels.shape[-1] // side
    patches = pixels.unflatten(2, (side, p)).unflatten(4, (side, p)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)        # (n·N, C, p, p)
    count = torch.bincount(codes.flatten(), minlength=K)
    mean = torch.zeros(K, *patches.shape[1:]).index_add_(0, codes.flatten(), patches) / count.clamp(min=1)[:, None, None, None]
    share = (count / count.sum()).numpy()
    across, size = 32, 36
    s = Sheet(across * size + 8, 34 + -(-K // across) * (size + 8))
    s.words(6, 6, f"What each of the {K} codes stands for, the most used first; the bar is its share of {n} test images' codes "
                  f"(longest: {100 * share.max():.1f} %); used: {100 * (share > 0).mean():.0f} %")
    for i, code in enumerate(np.argsort(-share)):
        x, y = 6 + i % across * size, 34 + i // across * (size + 8)
        if share[code]:
            s.image.paste(sample.tile(mean[code], size - 4), (x, y))
        s.pen.rectangle((x, y + size - 3, x + round((size - 5) * share[code] / share.max()), y + size), BLUE)
    return s.image


@torch.no_grad()
def cost_of_hiding(model, vocab, codes, noise, before, sentence, autocast):
    """By how many nats log π(sentence) falls as a 2x2 window of codes is hidden, averaged over the windows that hold a code."""
    side = int(len(codes) ** 0.5)
    cells = np.arange(side * side).reshape(side, side)
    windows = [cells[i:i + 2, j:j + 2].ravel() for i in range(side - 1) for j in range(side - 1)]
    hidden = [np.where(np.isin(np.arange(side * side), w), noise, codes) for w in windows]
    response = vocab.encode_text(" " * bool(before) + sentence)
    examples = [(vocab.report_prompt(c) + vocab.encode_text(before), response) for c in (codes, *hidden)]
    with autocast():
        logps = sequence_logps(model, *sft.collate(examples, vocab.pad)).cpu().numpy()
    cost, count = np.zeros(side * side), np.zeros(side * side)
    for w, logp in zip(windows, logps[1:]):
        cost[w] += logps[0] - logp
        count[w] += 1
    return (cost / count).reshape(side, side), float(logps[0])


def occlusion(out, names, vqgan, device, autocast, n=24):
    """Rows: an enlarged heart with a small effusion, and without. Columns: the mean of n patients, then each model's mean map."""
    px, records = vqgan.config.image_size, Phantoms("test", 4000, bias=0, size=vqgan.config.image_size)
    alone = [r for r in records if {f.name for f in r.findings} == {"cardiomegaly"}][:n]
    effusion = Finding("effusion", "left", "small")
    with_it = [draw(replace(r.spec, findings=(*r.spec.findings, effusion)), px)[0] for r in alone]
    before, sentence = "Chest radiograph. Enlarged heart.", "Small left pleural effusion."
    noise, = encode_images([add_noise(np.full((px, px), 128, np.uint8), np.random.default_rng(0), 1000)], vqgan, autocast)
    s, size = Sheet(250 * (1 + len(names)), 606), 220
    s.words(10, 6, f'How likely "{sentence}" is after "{before}", and where that comes from,\n'
                   f"mean of {n} patients. Hiding what is red makes it less likely, what is blue likelier (full colour: 3 nats).")
    for y, shown, what in ((52, with_it, "heart and effusion"), (342, [r.image for r in alone], "heart alone: habit tempts")):
        mean = np.mean(shown, axis=0).astype(np.uint8)
        s.picture(10, y, mean, size)
        s.words(10, y + size + 6, what)
        for j, name in enumerate(names):
            model, vocab = sft.load_gpt(Path(out) / name, vqgan, device)
            found = [cost_of_hiding(model, vocab, c, noise, before, sentence, autocast) for c in encode_images(shown, vqgan, autocast)]
            cost, logp = np.mean([f[0] for f in found], axis=0), np.mean([f[1] for f in found])
            s.picture(250 * (1 + j) + 10, y, overlay(mean, cost / 3, size), size)
            s.words(250 * (1 + j) + 10, y + size + 6, f"{name}: {logp:.1f} nats")
    return s.image


def overlay(image, strength, size):
    """A gray image, red where strength (h, w) is above 0, blue where below, most so at 1."""
    base = np.asarray(Image.fromarray(image).convert("RGB").resize((size, size)), float)
    fine = np.asarray(Image.fromarray(strength.astype(np.float32)).resize((size, size), Image.BILINEAR))[..., None].clip(-1, 1)
    return (base + (np.where(fine > 0, np.array(RED), np.array(BLUE)) - base) * 0.75 * np.abs(fine)).clip(0, 255).astype(np.uint8)


def main():
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs, with vqgan, sft and bidpo in it")
    parser.add_argument("--to", type=Path, default=Path("."), help="folder for the pictures")
    args = parser.parse_args()
    device, autocast = init_run(RunConfig(out=str(args.out)))
    vqgan = sft.load_vqgan(RunConfig(out=str(args.out)), device)
    save = lambda image, name: image.quantize(256).save(args.to / name, optimize=True)              # a third of the bytes
    save(method(vqgan, autocast), "method.png")
    save(codebook(vqgan, autocast), "codebook.png")
    save(occlusion(args.out, ["sft", "control", "bidpo"], vqgan, device, autocast), "occlusion.png")


if __name__ == "__main__":
    run(main)
