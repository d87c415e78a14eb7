"""README.md and the lab report keep their word: commands, flags, names, links and blocks of Python hold, tables are the
result files'. Commands are parsed with the programs' own flags; only those for a folder of images are run. And what the
files import."""

import argparse
import ast
import gzip
import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

import data
import dpo
import model
import sample
import sft
import vqgan
from data import Finding, Phantoms
from tests import bench, captions, compare, masks

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / ".github/results/README.md"]
README, REPORT = (path.read_text() for path in DOCUMENTS)
BOTH = pytest.mark.parametrize("text", [README, REPORT], ids=["README", "lab report"])
MODULES = {"model.py": model, "data.py": data, "vqgan.py": vqgan, "sft.py": sft, "dpo.py": dpo, "sample.py": sample}
PROGRAMS = ("vqgan.py", "sft.py", "dpo.py", "sample.py")
RUNNERS = {"tests.compare": compare, "tests.captions": captions, "tests.masks": masks}


def fenced(text, language):
    """The blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text):
    """A text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def inline(text):
    """What stands between backticks in prose, in one line each; not what pip is told."""
    found = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]
    return [code for code in found if "pip install" not in code]


def commands_of(block):
    """The commands of a block of sh, each a list of words, without comments; seed S is 0."""
    commands = [[]]
    for line in block.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        for word in [*lexer, "&&"]:
            if word == "&&":
                commands.append([])
            else:
                commands[-1].append("0" if word == "S" else word)
    return [words for words in commands if words]


def fenced_commands(text):
    return [words for block in fenced(text, "sh") for words in commands_of(block)]


@pytest.fixture(scope="module")
def parsers():
    """{program or runner: the parser of its flags}."""
    class Made(Exception):
        pass

    def stop(parser, *args):
        raise Made(parser)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop)
        for name, module in ({name: MODULES[name] for name in PROGRAMS} | RUNNERS).items():
            with pytest.raises(Made) as made:
                module.main([])
            found[name] = made.value.args[0]
            found[name].allow_abbrev = False                 # a page writes flags out
    return found


def accepts(parser, words):
    """Whether a parser takes the words; `--help` is taken too."""
    try:
        parser.parse_args(words)
    except SystemExit as stop:
        return stop.code == 0
    return True


def check_command(words, parsers, open_end=False):
    """Fail unless a command is one of ours whose flags exist with values in range, or prepares for one.

    With an open end its last flag may still lack its value."""
    program, *rest = itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)         # OMP_NUM_THREADS=1
    if program in ("mkdir", "cp") or program.endswith("pip"):
        return
    assert program in ("python", "python3", ".venv/bin/python") and rest, words
    name, *argv = rest[1:] if rest[0] == "-m" else rest
    if name == "tests.pretend_gpu":                          # which runs the program that is named next
        name, argv = f"{argv[0]}.py", argv[1:]
    if name == "pytest":
        assert all((ROOT / word).exists() for word in argv if not word.startswith("-")), words
    elif name in ("tests.fuzz", "tests.kill", "tests.pictures"):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists()
    elif name == "tests.bench":
        assert {*argv} <= {*bench.WORK, "growth"}, words
    elif name != "venv":
        assert accepts(parsers[name], argv) or open_end and accepts(parsers[name], [*argv, "x"]), words


# The words


@BOTH
def test_every_block_says_its_language(text):
    """Else no test would look into it."""
    fences = re.findall(r"^```(.*)$", text, re.M)
    assert len(fences) % 2 == 0 and set(fences[::2]) <= {"sh", "python", "json", "text", "diff"} and set(fences[1::2]) == {""}


def test_the_readme_is_short():
    assert README.count("\n") <= 260 and len(README.encode()) <= 18_000


def test_every_name_in_the_readme_exists():
    """`file.py:name`, and in a row of a table that begins with a `file.py` each bare name is the file's."""
    named = [code.split(":") for code in inline(README) if re.fullmatch(r"\w+\.py:\w+", code)]
    assert len(named) >= 10
    for file, name in named:
        assert hasattr(MODULES[file], name), f"{file}:{name}"
    rows = re.findall(r"^\| `(\w+\.py)` (\|.*)$", README, re.M)
    assert [file for file, _ in rows] == list(MODULES)
    for file, row in rows:
        for name in re.findall(r"`(\w+)(?:\(\))?`", row):
            assert hasattr(MODULES[file], name), f"{file}: {name}"


@BOTH
def test_every_file_of_python_that_is_named_exists(text):
    for path in re.findall(r"`((?:\w+/)*\w+\.py)\b", prose(text)):
        assert (ROOT / path).exists(), path


def anchors_of(path):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*DOCUMENTS, *sorted(ROOT.glob(".github/*.md"))], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    """To a file, seen from the page, and where it names one to a heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page.read_text())):
        path, _, anchor = "".join(link).partition("#")
        if not path.startswith(("http:", "https:")):
            target = page.parent / path if path else page
            assert target.exists() and (not anchor or anchor in anchors_of(target)), link


# The commands


@BOTH
def test_every_command_parses(text, parsers):
    """Also those in prose, which may leave the values of their last flag open."""
    fences = fenced_commands(text)
    for words in fences:
        check_command(words, parsers)
    for words in [shlex.split(c) for c in inline(text) if re.match(r"(\.venv/bin/)?python3? ", c)]:
        check_command(words, parsers, open_end=True)
    if text is README:
        assert {"dpo.py", "sample.py"} <= {words[1] for words in fences}


def test_a_wrong_command_is_noticed(parsers):
    """By this file itself: an unknown program, flag or file, a value out of range."""
    for line in ("python dpo.py --stpes 3", "python dpo.py --objective ppo", "python sample.py --n 0", "python tpo.py",
                 "make", "python -m tests.compare --seed 0", "python -m tests.captions", "python -m pytest tests/no.py"):
        words, = commands_of(line)
        with pytest.raises((AssertionError, KeyError)):
            check_command(words, parsers)
    assert commands_of('a "b # c" && d --e S # f\ng') == [["a", "b # c"], ["d", "--e", "0"], ["g"]]


@BOTH
def test_every_flag_named_in_prose_exists(text, parsers):
    """And takes the values that stand behind it, unless these are to be filled in (X, N)."""
    known = {"--help", "--nproc-per-node", "--to"}.union(*(re.findall(r"--[a-z][\w-]*", parser.format_usage()) for parser in parsers.values()))
    assert {"--resume", "--text-given-weight", "--recipes", "--base"} <= known
    for code in inline(text):
        named = re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        assert set(named) <= known, code
        words = shlex.split(code) if code.startswith("--") else []
        if len(words) > len(named) and not any(re.fullmatch("[A-Z_]+", word) for word in words):
            assert any(accepts(parser, words) for parser in parsers.values()), code
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"`[^`]+`", "", prose(text)))) <= known


def test_the_test_command_is_the_one_that_ci_runs():
    """.ci/run takes the first line of the README that looks like it; the install and run lines stand before it."""
    line, = re.findall(r"^python3 -m venv .*pytest.*$", README, re.M)
    assert commands_of(line)[-1][:3] == [".venv/bin/python", "-m", "pytest"]
    assert "README.md" in (ROOT / ".ci/run").read_text()
    assert re.search(r"^python3 -m venv ", README, re.M).start() < README.index(line)
    for version in re.findall(r"torch==[\d.]+", README):
        assert version in (ROOT / "requirements.txt").read_text().split()


@pytest.mark.parametrize("program", [*PROGRAMS, *RUNNERS])
def test_help_exits_0_and_shows_the_flags(program, parsers, capsys):
    assert accepts(parsers[program], ["--help"])
    shown = capsys.readouterr().out
    assert "--out" in shown and (program == "tests.masks" or re.search(r"--preset.*\n +tiny", shown))


def test_the_commands_for_ones_own_images_run(tmp_path, monkeypatch):
    """On twelve phantoms as a folder, at tiny size, with few steps and short texts: training, evaluation, each question."""
    own = [words[1:] for words in fenced_commands(README) if "out-mine" in words]
    assert [words[1] for words in own if words[0] == "sample.py"] == ["--data", "report", "ask", "segment", "generate"]
    write_toy_folder(tmp_path / "DIR")
    Image.fromarray(Phantoms("val", 1)[0].image).save(tmp_path / "IMAGE.png")
    monkeypatch.chdir(tmp_path)
    for name in PROGRAMS:
        steps = "reader_steps" if name == "sample.py" else "steps"
        monkeypatch.setitem(MODULES[name].PRESETS, "tiny", MODULES[name].PRESETS["tiny"] | {steps: 2})
    monkeypatch.setattr(sft, "MAX_TEXT", 20)
    for name, *words in own:
        MODULES[name].main([*words, "--preset", "tiny"])
    written = {path.name for path in (tmp_path / "out-mine").iterdir()}
    assert written >= {"vqgan", "sft", "bidpo", "control", "pairs", "eval.json", "segment.png", "generate.png"}


def write_toy_folder(folder):
    """Twelve phantoms as an ImageFolder with metadata.jsonl."""
    (folder / "train").mkdir(parents=True)
    with open(folder / "train/metadata.jsonl", "w") as f:
        for i, record in enumerate(Phantoms("train", 12)):
            Image.fromarray(record.image).save(folder / f"train/{i}.png")
            f.write(json.dumps({"file_name": f"{i}.png", "text": record.text, "modality": record.modality}) + "\n")


# The blocks of Python and JSON


def test_the_blocks_of_python_compile_and_their_imports_exist():
    blocks = fenced(README, "python")
    assert len(blocks) >= 2 and "transformers" in blocks[0] and any("peft" in block for block in blocks)
    for block in blocks + fenced(REPORT, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.py" in MODULES:
                for name in node.names:
                    assert hasattr(MODULES[f"{node.module}.py"], name.name), name.name
            elif isinstance(node, ast.Import):
                assert all(importlib.import_module(name.name) for name in node.names)


def test_the_blocks_of_python_run_and_ask_as_a_model_was_taught(trained, monkeypatch):
    """With stand-ins for transformers and PEFT (the real ones: test_exchange.py): the prompt is sft.py's, id by id."""
    others = {name: MagicMock() for name in ("transformers", "peft")}
    for name, module in others.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(trained.parent)
    for block in fenced(README, "python"):
        exec(block, {})
    prompt = others["transformers"].AutoTokenizer.from_pretrained.return_value.call_args.args[0]
    ids = Tokenizer.from_file("out/bidpo/tokenizer.json").encode(prompt, add_special_tokens=False).ids
    vocab, encoder = sft.Vocabulary.load("out/bidpo"), vqgan.VQGAN.from_pretrained("out/vqgan")
    image = Phantoms("test", 1, bias=0, size=encoder.config.image_size)[0].image
    codes = encoder.encode(vqgan.to_pixels(vqgan.stack([image], 1)))[0].tolist()
    assert ids == vocab.report_prompt(codes)


def test_the_row_with_everything_in_it_is_read_whole(tmp_path):
    block, = fenced(README, "json")
    row, shape = json.loads(block), (32, 32)
    (tmp_path / "train/masks").mkdir(parents=True)
    for path in row["masks"].values():
        Image.fromarray(np.full(shape, 255, np.uint8)).save(tmp_path / "train" / path)
    with open(tmp_path / "train/metadata.jsonl", "w") as f:
        for patient in "abc":
            Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f"train/{patient}.png")
            f.write(json.dumps(row | {"file_name": f"{patient}.png", "patient_id": patient}) + "\n")
    record, = data.read_folder(str(tmp_path), 32, 1)["train"]
    assert (record.text, record.modality, record.body_part) == (row["text"], row["modality"], row["body_part"])
    assert record.findings == tuple(Finding(f["name"], f["side"]) for f in row["findings"])
    assert record.questions == tuple((q["question"], q["answer"]) for q in row["questions"])
    assert record.masks.keys() == row["masks"].keys() and all(m.all() for m in record.masks.values())
    assert record.subject == record.name[0]


# Published data sets


DATA_SETS = (ROOT / ".github/datasets.md").read_text()


def write_download(folder):
    """The downloads that .github/datasets.md names, each with two images of a training, one of a validation and one of a test split."""
    def put(name, content):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jpg"):
            Image.fromarray(np.full((20, 24), content, np.uint8)).save(path)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress("\n".join(",".join(row) for row in content).encode()))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))

    parts = (("train", "a"), ("train", "b"), ("validate", "c"), ("test", "d"))
    put("VQA-RAD/VQA_RAD Dataset Public.json", [
        {"image_name": f"{x}.jpg", "phrase_type": "test_para" if part == "test" else "freeform", "question": f"{k} {x}?", "answer": k}
        for part, x in parts for k in (1, 2)])
    for part in ("train", "validate", "test"):
        put(f"Slake1.0/{part}.json", [
            {"img_name": f"xmlab{x}/source.jpg", "q_lang": lang, "modality": "MRI", "location": "Brain", "question": f"{k} {x}?",
             "answer": str(k)} for p, x in parts if p == part for lang in ("en", "zh") for k in (1, 2)])
    put("iu_xray/annotation.json", {part.replace("validate", "val"): [
        {"report": f"Report of {x}.", "image_path": [f"{x}/0.jpg", f"{x}/1.jpg"]} for p, x in parts if p == part]
        for part in ("train", "validate", "test")})
    lists = [("d" + x, "1234" + str(i), "5" + str(i), part) for i, (part, x) in enumerate(parts)]
    put("mimic-cxr-jpg/mimic-cxr-2.0.0-split.csv.gz", [("dicom_id", "subject_id", "study_id", "split"),
                                                      *lists, ("side", "12340", "50", "train")])
    put("mimic-cxr-jpg/mimic-cxr-2.0.0-metadata.csv.gz", [("dicom_id", "ViewPosition"), *((d, "PA") for d, *_ in lists), ("side", "LATERAL")])
    for dicom, subject, study, _ in lists:
        put(f"mimic-cxr-jpg/files/p12/p{subject}/s{study}/{dicom}.jpg", 9)
        put(f"mimic-cxr-reports/files/p12/p{subject}/s{study}.txt",
            f"FINAL REPORT\n EXAMINATION: CHEST\n\n FINDINGS:\n\n Report\n of {dicom[1]}.\n\n IMPRESSION:  None.\n")
    for _, x in parts:
        for name in (f"VQA-RAD/VQA_RAD Image Folder/{x}.jpg", f"Slake1.0/imgs/xmlab{x}/source.jpg", *(f"iu_xray/images/{x}/{k}.jpg" for k in "01")):
            put(name, 9)


@pytest.mark.parametrize("title,target", [("VQA-RAD", "vqa-rad"), ("SLAKE", "slake"), ("IU X-Ray", "iu-x-ray"), ("MIMIC-CXR", "mimic-cxr")])
def test_a_published_data_set_becomes_a_folder(title, target, tmp_path, monkeypatch):
    block, = fenced(DATA_SETS.split(f"\n## {title}\n")[1].split("\n## ")[0], "python")
    write_download(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    splits = {split: list(records) for split, records in data.read_folder(str(tmp_path / target), 16, 1).items()}
    if title == "VQA-RAD":                                   # it has no validation split: a tenth of training is one
        found = sorted(r.name for r in splits["train"] + splits["val"]), [r.name for r in splits["test"]]
        assert found == (["a.jpg", "b.jpg", "c.jpg"], ["d.jpg"])
    else:
        assert {split: len(records) for split, records in splits.items()} == {"train": 2, "val": 1, "test": 1}
    last, = splits["test"]
    assert last.image.max() == 9
    if title in ("VQA-RAD", "SLAKE"):
        assert last.text == "" and last.questions == (("1 d?", "1"), ("2 d?", "2"))
    else:
        assert last.text == "Report of d." and last.questions == ()


# Changes


def apply(diff, folder):
    """Apply a unified diff by its lines, wherever they stand: each hunk must fit exactly one place."""
    name = re.search(r"^\+\+\+ b/(.+)$", diff, re.M)[1]
    text = (folder / name).read_text()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        before, after = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] in (" ", sign)) for sign in "-+")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (folder / name).write_text(text)


USES_THEM = """
import data, dpo
image, masks = data.draw(data.Spec(0, "test", 0, "chest radiograph", (data.Finding("pacemaker", "left"),)), 32)
without, _ = data.draw(data.Spec(0, "test", 0, "chest radiograph", ()), 32)
assert (image.astype(int) - without)[masks["pacemaker"]].mean() > 50
assert data.read_findings("Left pacemaker. Normal.", data.PHRASES) == (data.Finding("pacemaker", "left"),)
assert all({f.name for f in record.findings} >= {"cardiomegaly"} for record in data.Phantoms("train", 300, bias=1, modalities=1)
           if "pacemaker" in {f.name for f in record.findings})
dpo.main(["--preset", "tiny", "--dtype", "float32", "--objective", "ipo", "--distort", "salt", "--steps", "3", "--log-every", "1"])
"""


def test_the_diffs_apply_and_run(trained, tmp_path):
    """Each of at most ten lines; the objective learns, on pairs of the distortion, from phantoms with the finding."""
    diffs = fenced((ROOT / ".github/change.md").read_text(), "diff")
    assert len(diffs) == 3 and all(len(re.findall(r"^[+-](?![+-])", diff, re.M)) <= 10 for diff in diffs)
    for name in MODULES:
        shutil.copy(ROOT / name, tmp_path)
    for diff in diffs:
        apply(diff, tmp_path)
    shutil.copytree(trained, tmp_path / "out")
    subprocess.run([sys.executable, "-c", USES_THEM], cwd=tmp_path, check=True, timeout=120)
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs/pairs.jsonl").read_text().splitlines()]
    assert pairs and {p["kind"] for p in pairs} == {"salt"}
    first, *_, last = model.read_log(tmp_path / "out/ipo.jsonl")
    assert first["loss_text"] == pytest.approx(0.25, abs=1e-3) and last["loss_text"] < first["loss_text"]


# The imports


PACKAGES = {"torch", "numpy", "PIL", "tqdm", "safetensors", "tokenizers", "pytest"}
PEERS = {"bench.py": {"datasets", "transformers", "trl", "vector_quantize_pytorch"}, "test_exchange.py": {"peft", "transformers"},
         "test_model.py": {"transformers"}}


def imports_of(path):
    """The first names of all that a file of Python imports, wherever in it, or skips a test without."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [node.args[0].value for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip"]
    return {name.split(".")[0] for name in names}


def test_nothing_is_imported_but_the_packages_and_in_a_few_tests_peers():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    known = sys.stdlib_module_names | PACKAGES | {path.stem for path in paths} | {"tests"}
    for path in paths:
        assert imports_of(path) <= known | PEERS.get(path.name, set()), path.name


def test_each_of_the_six_files_imports_only_those_before_it():
    files = [name.removesuffix(".py") for name in MODULES]
    assert {path.name for path in ROOT.glob("*.py")} == MODULES.keys()
    for i, name in enumerate(files):
        assert imports_of(ROOT / f"{name}.py") & {*files, "tests"} <= {*files[:i]}, name


# The figures


RESULTS = ROOT / ".github/results"


def evaluations(name):
    """The result files of three seeds."""
    return [compare.read_evaluation(RESULTS / f"{name}{seed}.json") for seed in (0, 1, 2)]


def test_the_tables_of_the_lab_report_are_those_that_the_runners_make():
    """The full tables; small tables and figures in prose are not checked."""
    found = [*compare.read_results(RESULTS).values(), *compare.read_results(RESULTS / "steps300").values()]
    assert len(found) == 4
    for seeds in found:
        units = list(seeds.values())
        assert compare.means_table(units, compare.TABLE) in REPORT and compare.differences_table(units, compare.TABLE) in REPORT
    for name in ("quick-seed", "f9378c7/bias0.9-seed", "f9378c7/bias0-seed"):
        assert compare.figures_table(evaluations(name)) in REPORT
    for folder in ("claims", "claim1", "claim6"):
        assert compare.recipes_table(list(compare.read_results(RESULTS / folder)[0.9].values()), compare.RECIPES) in REPORT
    assert masks.table(json.loads((RESULTS / "masks.json").read_text())) in REPORT
    for figures in json.loads((RESULTS / "captioning.json").read_text()).values():
        assert captions.table(figures) in REPORT


def test_the_table_of_the_readme_is_the_runners():
    assert compare.readme_table(compare.read_results(RESULTS)) in README


def test_exercise_five_shows_its_result_files():
    """Means over the seeds; the habit's by seed as well."""
    answer = (ROOT / ".github/exercises.md").read_text()
    found = [json.loads((RESULTS / f"exercise5/seed{seed}.json").read_text()) for seed in (0, 1, 2)]
    for metric in ("report/greedy/companion", "report/greedy/chair_i", "report/greedy/recall", "ask/companion", "segment/dice"):
        values = [[u[name][metric]["value"] for u in found] for name in ("control", "bidpo", "region", "outside")]
        seeds = [f" ({' '.join(f'{v:.2f}' for v in row)})" * (metric == "report/greedy/companion") for row in values]
        assert "| " + " | ".join(f"{np.mean(row):.3f}{by}" for row, by in zip(values, seeds)) + " |" in answer, metric


def test_what_the_readme_shows_of_the_screen_is_what_seed_0_of_quick_printed(capsys):
    """A few rows of the table, column by column."""
    block, = [b for b in fenced(README, "text") if b.startswith("metric")]
    cells = lambda text: [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    (_, *names), *rows = cells(block)
    seed0 = compare.read_evaluation(RESULTS / "quick-seed0.json")
    models = [name for name in names if " minus " not in name]
    sample.print_table({"vqgan": {}} | {name: seed0[name] for name in names}, models, SimpleNamespace(records=[]))
    printed = cells(capsys.readouterr().out)
    assert len(rows) > 2 and ["metric", *names] in printed and all(row in printed for row in rows)
