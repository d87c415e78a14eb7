"""The comparison's runner: its table by hand, and one tiny unit from start to end and on from there."""

import json
import shutil

import pytest
from PIL import Image

from model import UserError
from data import Phantoms
from tests import captioning, compare, table


def unit(low, high, value=0.25):
    cell = [value, (low + high) / 2, low, high]
    return {"sft": {"report/greedy/companion": [0.5, None, None, None]},
            "control": {"report/greedy/companion": [0.45, None, None, None]},
            "dpo": {"report/greedy/companion": cell, "seconds": [100, None, None, None]}}


def test_bold_and_struck_through_need_every_seed_on_one_side():
    cell = lambda *units: compare.table(list(units), ["control", "dpo"]).splitlines()[2]
    title = "| companion hallucination ↓, greedy | 0.500 | 0.450 | "
    assert cell(unit(-0.3, -0.1), unit(-0.2, -0.1, 0.35)) == title + "**0.300** |"
    assert cell(unit(-0.3, -0.1), unit(-0.2, 0.1)) == title + "0.250 |"
    assert cell(unit(-0.3, -0.1), unit(0.1, 0.2)) == title + "0.250 |"
    assert cell(unit(0.1, 0.3), unit(0.1, 0.2)) == title + "~~0.250~~ |"


def test_a_recipe_without_results_in_every_seed_is_left_out():
    lame = {k: v for k, v in unit(0, 1).items() if k != "dpo"}
    assert "dpo" not in compare.table([unit(0, 1), lame], ["control", "dpo"]).splitlines()[0]


def test_differences_seed_by_seed():
    rows = compare.differences([unit(-0.3, -0.1), unit(0.0, 0.2)], ["control", "dpo"]).splitlines()
    assert len(rows) == 3 and "| dpo − control | -0.200 [-0.300, -0.100]<br>+0.100 [+0.000, +0.200] |" in rows[2]


def test_a_difference_of_two_recipes_has_a_line_of_its_own():
    rows = compare.differences([{"mfpo minus mdpo": {"report/greedy/recall": [None, 0.1, 0.005, 0.195]}}], ["mfpo minus mdpo"],
                               ["report/greedy/recall"]).splitlines()
    assert rows[2] == "| mfpo − mdpo | +0.100 [+0.005, +0.195] |"


def test_the_first_table_shows_what_could_not_be_counted_as_a_dash():
    """One seed, no bidpo-c2; recall of nothing is None, every other value 0.25, every difference surely −0.1."""
    model = {m: {"value": 0.25} for m in table.ROWS} | {"report/greedy/recall": {"value": None}}
    difference = {m: {"value": -0.1, "low": -0.2, "high": -0.05} for m in list(table.ROWS)[:3]}
    difference["report/greedy/recall"] = {"value": None, "low": None, "high": None}
    rows = table.table([{"sft": model, "control": model, "dpo": model, "dpo minus control": difference}]).splitlines()
    assert rows[0] == "| metric | SFT | control | bidpo | bidpo − control, by seed |"
    assert "| companion hallucination ↓, greedy | 0.250 | 0.250 | 0.250 | **-0.100** |" in rows
    assert "| recall, greedy | - | - | - | - |" in rows
    with pytest.raises(SystemExit, match="every evaluation needs a control"):
        table.table([{"sft": model, "dpo": model}])


def test_the_first_table_shows_the_recipes_that_all_seeds_have():
    """A metric that an evaluation lacks, as drawing does of files without findings, is a dash."""
    model, more = {m: {"value": 0.25} for m in list(table.ROWS)[:-1]}, {"bidpo-c2 minus control": {}, "dpo minus control": {}}
    one = dict.fromkeys(("sft", "control", "bidpo-c2", "dpo"), model) | more
    two = {k: v for k, v in one.items() if "c2" not in k}
    assert table.table([one, one]).splitlines()[0].startswith("| metric | SFT | control | bidpo | bidpo-c2 | bidpo − control")
    assert table.table([one]).splitlines()[-1] == "| text→image Fréchet distance ↓ | - | - | - | - | - | - |"
    assert table.table([one, two]).splitlines()[0] == "| metric | SFT | control | bidpo | bidpo − control, by seed |"


def test_habits_count_stated_companions_by_trigger(tmp_path):
    """Two hundred phantoms; SFT states the effusion in every report, the others the truth."""
    records = Phantoms("test", 200, bias=0, seed=7)
    (tmp_path / "eval").mkdir()
    (tmp_path / "references.json").write_text(json.dumps({"annotations": [{"caption": r.text} for r in records]}))
    models = ("sft", "control", "bidpo-c2", "dpo")
    (tmp_path / "eval.json").write_text(json.dumps(dict.fromkeys((*models, "dpo minus control", "bidpo-c2 minus control"), {})))
    for model in models:
        said = " Small left pleural effusion." if model == "sft" else ""
        (tmp_path / f"eval/{model}.captions.json").write_text(json.dumps([{"caption": r.text + said} for r in records]))
    sides = [[f.side for f in r.findings if f.name == "effusion"] for r in records
             if "cardiomegaly" in {f.name for f in r.findings}]
    alone, wrong = sides.count([]), sides.count(["right"])
    rows = table.habits([tmp_path]).splitlines()
    assert alone > 0 and f"| cardiomegaly → effusion | {alone} | {alone} (1.00) | 0 (0.00) | 0 (0.00) | 0 (0.00) |" in rows
    title = "cardiomegaly → effusion, shown on the wrong side"
    assert wrong > 0 and f"| {title} | {wrong} | {wrong} (1.00) | 0 (0.00) | 0 (0.00) | 0 (0.00) |" in rows
    count = lambda row, column: int(row.split(" | ")[column].split()[0])
    assert [count(rows[-2], c) for c in (1, 2, 3)] == [sum(count(r, c) for r in rows[2:-2]) for c in (1, 2, 3)]
    assert rows[-2].startswith("| all | ") and count(rows[-2], 2) == alone + wrong
    there = sum({"atrophy", "lesions"} <= {f.name for f in r.findings} for r in records)          # the pair without sides
    assert rows[-1].startswith(f"| {table.THERE} | ") and count(rows[-1], 1) == count(rows[-1], 3) >= there > 0
    assert rows[0] == "| habit | cases | SFT | control | bidpo | bidpo-c2 |"
    with pytest.raises(SystemExit, match="was not evaluated on the 200 test phantoms of `sample.py --seed 8`"):
        table.habits([tmp_path], seed=8)


def test_a_tiny_unit_runs_shows_its_table_and_goes_on(trained, tmp_path, capsys, monkeypatch):
    """The second call trains only what is new and keeps what the first one measured; a recipe that changed is refused."""
    folder = tmp_path / "runs" / "bias0.9-seed0"
    folder.mkdir(parents=True)
    for stage in ("vqgan", "sft", "pairs"):
        shutil.copytree(trained / stage, folder / stage)
    flags = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "r/results"), "--preset", "tiny", "--bias", "0.9",
             "--seeds", "0", "--recipes"]
    compare.main([*flags, "control"])
    written = tmp_path / "r/results/bias0.9-seed0.json"
    first, made = json.loads(written.read_text()), (folder / "control/model.safetensors").stat().st_mtime_ns
    compare.main([*flags, "control", "dpo", "dpo-flip30"])
    second = json.loads(written.read_text())
    assert second.keys() == {"sft", "control", "dpo", "dpo-flip30", "dpo-flip30 minus dpo"} and second["control"] == first["control"]
    assert (folder / "control/model.safetensors").stat().st_mtime_ns == made
    assert len(second["dpo"]["report/greedy/recall"]) == 4 and second["dpo"]["seconds"][0] >= 0
    assert second["dpo-flip30 minus dpo"]["report/greedy/recall"][0] is None           # a difference has no value of its own
    monkeypatch.setitem(compare.RECIPES, "control", "--objective sft --sft-weight 2 --steps 13")
    with pytest.raises(UserError, match="control was made with other values of --sft-weight, --steps; move it away"):
        compare.main([*flags, "control"])
    (folder / "control/state.safetensors").unlink()
    with pytest.raises(UserError, match="control holds no state.safetensors that tells its flags"):
        compare.main([*flags, "control"])
    said = capsys.readouterr().out
    assert "| metric | sft | control | dpo |" in said and "| dpo-flip30 − dpo | " in said
    assert Image.open(tmp_path / "r/compare.png").width == 1120


def test_a_table_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no result yet"):
        compare.main(["--table", "--results", str(tmp_path)])


def test_figures_go_beside_the_runs_and_not_among_the_measured_ones(tmp_path):
    """What is shown, and so what is written, is in the folder of the runs unless --results says otherwise."""
    for runner, folder in ((compare, "results"), (captioning, "captioning.json")):
        with pytest.raises(UserError, match=f"runs/{folder} holds no result yet; .* without --table first, or name --results"):
            runner.main(["--table", "--out", str(tmp_path / "runs")])


def test_every_recipe_is_a_command_of_dpo():
    import dpo
    from model import cli
    for flags in compare.RECIPES.values():
        dpo.check_flags(cli(dpo.DPOConfig, dpo.PRESETS, flags.split(), None, ("objective", dpo.OBJECTIVE_DEFAULTS)))
