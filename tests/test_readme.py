"""The README keeps its word: its flags exist, its commands run, its files are there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import dpo
import sample
import sft
import vqgan
from data import Phantoms
from tests import captioning, compare, table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = {"vqgan.py": vqgan, "sft.py": sft, "dpo.py": dpo, "sample.py": sample}
# a command as a list of words, without "python"
COMMANDS = [shlex.split(c) for c in re.findall(r"(?<=python )(\w+\.py[^&`\n]*)", README)]


def test_the_readme_shows_commands_of_the_programs():
    assert {c[0] for c in COMMANDS} >= {"sft.py", "dpo.py", "sample.py"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_exits_0_and_says_the_defaults(program, capsys):
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program].main(["--help"])
    assert stop.value.code == 0 and "(default: small)" in capsys.readouterr().out


def test_a_wrong_flag_is_one_line_on_stderr_and_status_2():
    done = subprocess.run([sys.executable, ROOT / "dpo.py", "--stpes", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1


def test_every_flag_named_in_the_readme_exists():
    """Also in prose: a word like --image-size belongs to one of the programs, or to the comparison."""
    runners = "".join((ROOT / "tests" / f).read_text() for f in ("compare.py", "captioning.py"))
    known = {"--help", *re.findall(r'add_argument\("(--[a-z]+)"', runners)}
    for module in PROGRAMS.values():
        Config = next(v for n, v in vars(module).items() if n.endswith("Config") and hasattr(v, "records")
                      and v.__module__ == module.__name__)
        known |= {"--" + f.replace("_", "-") for f in Config.__dataclass_fields__}
    named = {f for c in COMMANDS for f in c if f.startswith("--")} | set(re.findall(r"`(--[a-z-]+)", README))
    assert named <= known, named - known


def test_every_file_named_in_the_readme_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", README):
        assert (ROOT / "".join(path)).exists(), path


def test_the_tables_are_those_that_the_runners_make():
    """The full tables are what the runners print from the result files; small tables and prose are not checked."""
    results = ROOT / ".github" / "results"
    found = compare.read_results(results)
    assert {bias: sorted(seeds) for bias, seeds in found.items()} == {0.9: [0, 1, 2], 0.0: [0, 1, 2]}
    for seeds in found.values():
        assert compare.table(list(seeds.values()), compare.TABLE) in README
    assert compare.differences(list(found[0.9].values()), compare.TABLE) in README
    for name in ("seed", "hard-seed", "hard-bias0-seed"):
        assert table.table([json.loads((results / f"{name}{s}.json").read_text()) for s in (0, 1, 2)]) in README
    for found in json.loads((results / "captioning.json").read_text()).values():
        assert captioning.table(found) in README


def test_the_folder_commands_run_on_a_toy_folder(tmp_path, monkeypatch):
    """`dpo.py --data`, then `sample.py --data` and each question to one's own image, at tiny size."""
    write_toy_folder(tmp_path / "DIR")
    Image.fromarray(Phantoms("val", 1)[0].image).save(tmp_path / "IMAGE.png")
    monkeypatch.chdir(tmp_path)
    own = [c for c in COMMANDS if "out-mine" in c]
    assert len(own) >= 6
    for name, *words in own:
        PROGRAMS[name].main([*words, "--preset", "tiny"])
    assert (tmp_path / "out-mine/eval.json").exists() and (tmp_path / "out-mine/samples.png").exists()


def write_toy_folder(folder):
    """Twelve phantoms as an ImageFolder with metadata.jsonl."""
    (folder / "train").mkdir(parents=True)
    with open(folder / "train/metadata.jsonl", "w") as f:
        for i, record in enumerate(Phantoms("train", 12)[j] for j in range(12)):
            Image.fromarray(record.image).save(folder / f"train/{i}.png")
            f.write(json.dumps({"file_name": f"{i}.png", "text": record.text, "modality": record.modality}) + "\n")
