"""Feed broken files and commands to everything that reads: each case ends in success or in one sentence.

    python -m tests.fuzz                           # 1,000 cases of each kind (100 of leftovers), some minutes
    python -m tests.fuzz images states --cases 5000 --seed 1

A case may raise what its reader is allowed to (BadRow of an image, UserError of all else) and nothing more; none may take longer
than 20 seconds or another 500 MB. What ended badly is written to --keep, with its traceback, to be looked at."""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import dpo  # noqa: E402
import sample  # noqa: E402
import sft  # noqa: E402
import vqgan  # noqa: E402
from data import BadRow, read_folder, read_image, read_mask  # noqa: E402
from model import UserError, cli, load_state, read_log  # noqa: E402

# ---- Breaking bytes, values and flags ------------------------------------------------------------

NUMBERS = (0, -1, 1, 3, 7, 10 ** 6, 10 ** 9, 2 ** 31, 2 ** 63, 10 ** 40, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"))
TEXTS = ("", " ", "\0", "\ud800", "../x", "/etc/passwd", "x" * 5000, "é\u2028\x85", "<img_0>", "C:\\x", "{}", "{size}", "-", "--x")


def deep(n):
    """n lists in one another, as JSON text: no parser likes them."""
    return "[" * n + "]" * n


def odd_value(rng, depth=0):
    """A value that does not belong there."""
    kind = rng.randrange(7 if depth < 2 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice((None, True, False, [], {}))
    if kind == 5:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(("name", "side", "question", "answer", "from", "value", "x")): odd_value(rng, depth + 1) for _ in range(2)}


def break_bytes(data, rng):
    """Bytes with some flipped, cut off, doubled, put in or set to the same."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data = data[:max(at, 1)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            data[at:at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
        else:
            data[at:at] = data[at:at + rng.randrange(1, 64)]
        data = data or bytearray(b"\0")
    return bytes(data)


def broken_states(data, n, seed):
    """n times a file's bytes, cut off or with one bit flipped at a random place."""
    rng = random.Random(seed)
    for i in range(n):
        at, copy = rng.randrange(len(data)), bytearray(data)
        copy[at] ^= 1 << rng.randrange(8)
        yield bytes(copy) if i % 2 else data[:at]


def break_json(value, rng):
    """A JSON value with one place in it made odd, removed or doubled under another name; or its text broken."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value, key = dict(value), rng.choice(list(value))
        if isinstance(value[key], dict | list) and rng.random() < 0.6:
            value[key] = break_json(value[key], rng)
        elif rng.random() < 0.15:
            del value[key]
        else:
            value[key] = odd_value(rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.9:
        value, i = list(value), rng.randrange(len(value))
        value[i] = break_json(value[i], rng)
        return value
    return odd_value(rng)


def break_json_file(path, rng):
    """Break a JSON file, as bytes or as a value."""
    if rng.random() < 0.3:
        path.write_bytes(rng.choice((break_bytes(path.read_bytes(), rng), deep(10 ** 5).encode(), b"\xff\xfe{", b"")))
    else:
        path.write_text(json.dumps(break_json(json.loads(path.read_text()), rng)), errors="replace")


# ---- Kinds of cases: each breaks something in a folder and returns what must survive it ----------


def images(rng, folder, base):
    """An image file of any format Pillow writes, broken."""
    kind = rng.choice(("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "ICO", "TGA", "JPEG2000"))
    mode = rng.choice(("L", "RGB", "RGBA", "P", "CMYK", "I;16", "1", "LA"))
    image, data = Image.fromarray(np.random.default_rng(rng.randrange(99)).integers(0, 255, (24, 20), np.uint8)), io.BytesIO()
    options = {"save_all": True, "append_images": [image]} if kind in ("GIF", "TIFF", "WEBP") and rng.random() < 0.3 else {}
    try:
        image.convert(mode).save(data, kind, **options)
    except (OSError, ValueError, KeyError):
        image.save(data := io.BytesIO(), "PNG")
    path = folder / "x.png"
    path.write_bytes(break_bytes(data.getvalue(), rng))
    return lambda: read_mask(path, 32, image) if rng.random() < 0.3 else read_image(path, 32, rng.choice((1, 3)))


ROW = {"file_name": "i.png", "text": "Enlarged heart.", "findings": [{"name": "nodule", "side": "left"}], "masks": {"heart": "m.png"},
       "questions": [{"question": "Is it?", "answer": "Yes."}], "patient_id": "p", "modality": "CT", "body_part": "head"}
TALK = {"id": "a", "image": "i.png", "conversations": [{"from": "human", "value": "<image>\nDescribe it."},
                                                       {"from": "gpt", "value": "A nodule."}]}


def metadata(rng, folder, base):
    """A folder in one of the layouts, with some rows broken, as values or as text."""
    for name in ("i.png", "m.png"):
        Image.new("L", (20, 20), 99).save(folder / name)
    layout, rows = rng.choice(("jsonl", "csv", "llava", "roco")), [ROW | {"patient_id": str(i)} for i in range(4)]
    rows = [break_json(row, rng) if rng.random() < 0.7 else row for row in rows]
    rows += [ROW | {"patient_id": f"whole {i}"} for i in range(4)]
    if layout == "jsonl":
        lines = [json.dumps(row) for row in rows] + rng.choice(([], [deep(10 ** 5)], ["\0"], ['{"text":' * 5000]))
        (folder / "metadata.jsonl").write_text("\n".join(lines), errors="replace")
    elif layout == "csv":
        cell = lambda v: '"' + (v if isinstance(v, str) else json.dumps(v)).replace('"', '""') + '"'
        rows = [row for row in rows if isinstance(row, dict)] + [ROW | {rng.choice(list(ROW)): deep(10 ** 5)}]
        lines = [",".join(ROW)] + [",".join(cell(row.get(k, "")) for k in ROW) for row in rows]
        (folder / "metadata.csv").write_text("\n".join(lines), errors="replace")
    elif layout == "llava":
        (folder / "train.json").write_text(rng.choice((json.dumps([break_json(TALK, rng) for _ in range(4)] + [TALK | {"image": f"{i}.png"} for i in "iiim"]), deep(10 ** 5),
                                                       json.dumps(break_json([TALK] * 4, rng)))), errors="replace")
    else:
        (folder / "train").mkdir()
        shutil.copy(folder / "i.png", folder / "train" / "a.png")
        lines = ["ID,Caption"] + [f"{rng.choice(('a', 'b', '../i', *TEXTS))},{rng.choice(('words', *TEXTS))}" for _ in range(5)]
        (folder / "train_captions.csv").write_text("\n".join(lines), errors="replace")
    name = {"jsonl": "metadata.jsonl", "csv": "metadata.csv", "llava": "train.json", "roco": "train_captions.csv"}[layout]
    trick = rng.random()
    if trick < 0.2:
        (folder / name).write_bytes(break_bytes((folder / name).read_bytes(), rng))
    elif trick < 0.25:
        (folder / name).unlink()
        rng.choice((os.mkfifo, os.mkdir))(folder / name)
    data = folder if rng.random() < 0.95 else rng.choice((folder / ("x" * 3000), folder / "i.png"))
    return lambda: [[(r.image, r.masks) for r in records] for records in read_folder(str(data), 32, rng.choice((1, 3))).values()]


def checkpoints(rng, folder, base):
    """A copy of a tiny model folder with one file broken: image tokenizer, GPT or adapter."""
    name = rng.choice([n for n in ("vqgan", "sft", "lora") if (base / n).exists()])
    for needed in {name, "sft", "vqgan"}:
        shutil.copytree(base / needed, folder / needed, ignore=shutil.ignore_patterns("state.safetensors"))
    path = rng.choice(sorted(p for p in (folder / name).iterdir() if p.suffix in (".json", ".safetensors")))
    if path.suffix == ".json":
        break_json_file(path, rng)
    else:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    x = torch.zeros(1, 1, 32, 32)

    def use():
        tokenizer = vqgan.VQGAN.from_pretrained(folder / "vqgan")
        if name == "vqgan":
            return tokenizer.decode(tokenizer.encode(x)) if tokenizer.config.image_size == 32 else None
        model, vocab = sft.load_gpt(folder / name, tokenizer, "cpu")
        return model(torch.tensor([vocab.report_prompt([0, 1])]))
    return use


def states(rng, folder, base):
    """A state cut off or with one bit flipped."""
    state = (base / "bidpo" / "state.safetensors").read_bytes()
    *_, broken = broken_states(state, rng.choice((1, 2)), rng.randrange(10 ** 9))
    (folder / "state.safetensors").write_bytes(broken)

    def must_refuse():
        load_state(folder, [], [])
        raise AssertionError("a damaged state was taken")
    return must_refuse


def leftovers(rng, folder, base):
    """What lies in out/ from earlier runs, with one file broken: each is made anew, or refused in one sentence."""
    out = folder / "out"
    shutil.copytree(base, out)
    path = rng.choice(sorted(p for p in out.rglob("*") if p.is_file() and p.parent.name in ("pairs", "studies", "eval", "reader", "out")
                             and p.suffix in (".json", ".jsonl", ".safetensors")))
    if path.suffix == ".json":
        break_json_file(path, rng)
    elif path.suffix == ".jsonl" and rng.random() < 0.6:
        lines = path.read_text().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(break_json(json.loads(lines[i]), rng))
        path.write_text("\n".join(lines) + "\n", errors="replace")
    else:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    if path.parent.name in ("pairs", "studies"):
        return lambda: dpo.main([*TINY, "--out", str(out), "--steps", "1", "--name", "again"])
    if path.parent.name in ("eval", "reader"):
        return lambda: sample.main([*TINY, "--out", str(out), *EVALUATION])
    return lambda: (read_log(path), sample.curves(out, "bidpo"))


def commands(rng, folder, base):
    """A command line with odd flags; those that parse and only then could go wrong are run for a step."""
    program, Config, presets, choice = rng.choice((
        (vqgan, vqgan.VQGANTrainConfig, vqgan.PRESETS, None), (sft, sft.SFTConfig, sft.PRESETS, None),
        (dpo, dpo.DPOConfig, dpo.PRESETS, ("objective", dpo.OBJECTIVE_DEFAULTS)), (sample, sample.SampleConfig, sample.PRESETS, None)))
    names = [f for f in Config.__dataclass_fields__ if f not in ("out", "data", "init", "device", "words")]
    argv = []
    for name in rng.sample(names, rng.randrange(1, 4)):
        value = rng.choice((*map(str, NUMBERS), *TEXTS, "all", "train"))
        argv += [f"--{name.replace('_', '-')}", *([value] if rng.random() < 0.9 else [])]
    argv += rng.choice(([], [], ["--out", str(folder / "y")], ["--out", "/proc/x"], ["--out", "x\0y"], ["--data", "\0"], ["--init", "/"]))
    return lambda: cli(Config, presets, argv, program.__doc__, *([choice] if choice else []))


KINDS = {"images": images, "metadata": metadata, "checkpoints": checkpoints, "states": states, "leftovers": leftovers,
         "commands": commands}
TINY = ["--preset", "tiny", "--dtype", "float32"]
EVALUATION = ["--n", "8", "--reader-steps", "2"]


# ---- Running them --------------------------------------------------------------------------------


def too_long(signum, frame):
    raise TimeoutError("longer than 20 seconds")


GOOD = ("read", "BadRow", "UserError", "exit 2")


def run_case(kind, seed, base):
    """How one case ends: one of GOOD, or in words or a traceback what went wrong."""
    rng, before = random.Random(f"{kind} {seed}"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        use = KINDS[kind](rng, Path(folder), base)
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(20)
        try:
            use()
            end = "read"
        except (BadRow, UserError) as why:
            end = type(why).__name__ if str(why) and "\n" not in str(why) else f"a sentence of several lines: {why}"
        except SystemExit as why:
            end = "exit 2" if why.code == 2 else f"exit {why.code}"
        except BaseException:
            end = traceback.format_exc()
        finally:
            signal.alarm(0)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return end if taken < 500_000 else f"took {taken / 1000:.0f} MB more"


def make_base(folder):
    """out/ of a tiny chain with an adapter and an evaluation: what checkpoints, states and leftovers are broken copies of."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        dpo.main([*TINY, "--out", str(folder)])
        dpo.main([*TINY, "--out", str(folder), "--steps", "1", "--name", "lora", "--lora-rank", "2"])
        sample.main([*TINY, "--out", str(folder), *EVALUATION])
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="some of: " + " ".join(KINDS) + "; none: all")
    parser.add_argument("--cases", type=int, default=1000, help="of each kind; leftovers, which run whole programs, a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="file for the bad ends; empty: print them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "out")
        for kind in args.kinds or KINDS:
            ends = Counter()
            for seed in range(args.seed, args.seed + (args.cases if kind != "leftovers" else args.cases // 10)):
                end = run_case(kind, seed, base)
                ends[end if end in GOOD else "bad"] += 1
                if end not in GOOD:
                    bad.append(f"---- {kind} {seed}\n{end}")
            print(kind, dict(ends), flush=True)
    text = "\n".join(bad) or "none ended badly"
    Path(args.keep).write_text(text) if args.keep else print(text)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
