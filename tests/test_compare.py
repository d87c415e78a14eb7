"""The comparison's runner: its tables by hand, and one tiny unit from start to end and on from there."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

import dpo
from data import MODALITIES, PHRASES, Phantoms, statement_of
from model import GPT, UserError, cli, sequence_logps
from sft import Vocabulary, collate
from tests import compare
from tests.compare import ROWS, THERE

HABIT = "report/greedy/companion"


def unit(low, high, value=0.25):
    return {"sft": {HABIT: {"value": 0.5}}, "control": {HABIT: {"value": 0.45}},
            "dpo": {HABIT: {"value": value}, "seconds": {"value": 100}},
            "dpo minus control": {HABIT: {"value": (low + high) / 2, "low": low, "high": high}}}


def evaluation(recipes, metrics=ROWS):
    """Every metric of every model is 0.25."""
    models = dict.fromkeys(("sft", "control", *recipes), {m: {"value": 0.25} for m in metrics})
    return models | {f"{name} minus control": {} for name in recipes}


def test_markdown_sets_the_last_columns_to_the_left_and_leaves_out_empty_rows():
    rows = [["full", "1.0", "-", "+1 +2"], ["none", "-", "-", "- -"]]
    assert compare.markdown(["a", "b", "c", "d"], rows, n_left=1) == \
        "| a | b | c | d |\n| --- | ---: | ---: | --- |\n| full | 1.0 | - | +1 +2 |"
    assert compare.markdown(["a", "b"], []) == "| a | b |\n| --- | ---: |"


def test_results_are_written_a_line_an_entry(tmp_path):
    compare.write_results(tmp_path / "results/bias0.9-seed2.json", unit(0, 1))
    text = (tmp_path / "results/bias0.9-seed2.json").read_text()
    assert text.count("\n") == sum(map(len, unit(0, 1).values()))
    assert compare.read_results(tmp_path / "results") == {0.9: {2: unit(0, 1)}}


def test_bold_and_struck_through_need_every_seed_on_one_side():
    cell = lambda *units: compare.means_table(list(units), ["control", "dpo"]).splitlines()[2]
    title = f"| {ROWS[HABIT]} | 0.500 | 0.450 | "
    assert cell(unit(-0.3, -0.1), unit(-0.2, -0.1, 0.35)) == title + "**0.300** |"
    assert cell(unit(-0.3, -0.1), unit(-0.2, 0.1)) == title + "0.250 |"
    assert cell(unit(-0.3, -0.1), unit(0.1, 0.2)) == title + "0.250 |"
    assert cell(unit(0.1, 0.3), unit(0.1, 0.2)) == title + "~~0.250~~ |"


def test_many_recipes_have_a_row_each_with_the_same_marks():
    header, _, *rows = compare.recipes_table([unit(-0.3, -0.1), unit(-0.2, -0.1, 0.35)], ["control", "dpo", "mdpo"]).splitlines()
    assert header.startswith(f"| recipe | {ROWS[HABIT]} | ")
    assert [row[:16] for row in rows] == ["| sft | 0.500 | ", "| control | 0.45", "| dpo | **0.300*"]


def test_each_figure_has_its_decimals_and_what_was_not_measured_is_left_out():
    figures = {"report/greedy/distinct": 9.4, "generate/cfg1.5/frechet": 0.6, "drift/text_chosen": -0.26, "seconds": 100.2}
    rows = compare.means_table([{"sft": {}, "dpo": {k: {"value": v} for k, v in figures.items()}}], ["dpo"]).splitlines()[2:]
    assert rows == [f"| {ROWS[k]} | - | {shown} |" for k, shown in zip(figures, ("9", "1", "-0.3", "100"))]


def test_a_recipe_without_results_in_every_seed_is_left_out():
    lame = {k: v for k, v in unit(0, 1).items() if k != "dpo"}
    assert "dpo" not in compare.means_table([unit(0, 1), lame], ["control", "dpo"]).splitlines()[0]


def test_differences_seed_by_seed():
    rows = compare.differences_table([unit(-0.3, -0.1), unit(0.0, 0.2)], ["control", "dpo"]).splitlines()
    assert len(rows) == 3 and "| dpo − control | -0.200 [-0.300, -0.100]<br>+0.100 [+0.000, +0.200] |" in rows[2]


def test_a_difference_of_two_recipes_has_a_line_of_its_own():
    recall = {"report/greedy/recall": {"value": 0.1, "low": 0.005, "high": 0.195}}
    rows = compare.differences_table([{"mfpo minus mdpo": recall}], ["mfpo minus mdpo"], list(recall)).splitlines()
    assert rows[1:] == ["| --- | --- |", "| mfpo − mdpo | +0.100 [+0.005, +0.195] |"]


def test_the_figures_show_what_could_not_be_counted_as_a_dash():
    """One seed; the control's recall of nothing is None; the habit differs by −0.1, surely when greedy, not at T = 1."""
    found = evaluation(["bidpo"])
    found["control"] = found["control"] | {"report/greedy/recall": {"value": None}}
    found["bidpo minus control"] = {HABIT: {"value": -0.1, "low": -0.2, "high": -0.05},
                                    "report/t1.0/companion": {"value": -0.1, "low": -0.2, "high": 0.0},
                                    "report/greedy/recall": {"value": None, "low": None, "high": None}}
    rows = compare.figures_table([found]).splitlines()
    assert rows[0] == "| metric | SFT | control | bidpo | bidpo − control, by seed |"
    assert rows[1] == "| --- | ---: | ---: | ---: | --- |"
    assert rows[2:4] == [f"| {ROWS[HABIT]} | 0.250 | 0.250 | 0.250 | **-0.100** |",
                         f"| {ROWS['report/t1.0/companion']} | 0.250 | 0.250 | 0.250 | -0.100 |"]
    assert f"| {ROWS['report/greedy/recall']} | 0.250 | - | 0.250 | - |" in rows


def test_the_figures_show_the_recipes_that_all_seeds_have_the_default_first():
    """A metric that no evaluation has, as drawing of files without findings, has no row."""
    one, two = evaluation(["another", "bidpo"], list(ROWS)[:-1]), evaluation(["bidpo"])
    header, _, *rows = compare.figures_table([one, one]).splitlines()
    assert header.startswith("| metric | SFT | control | bidpo | another | bidpo − control")
    assert [row.split(" | ")[0] for row in rows] == [f"| {title}" for title in list(ROWS.values())[:-1]]
    header, _, *rows = compare.figures_table([one, two]).splitlines()
    assert header == "| metric | SFT | control | bidpo | bidpo − control, by seed |" and len(rows) == len(ROWS) - 1


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder of sample.py with 200 phantoms; SFT states the left effusion in every report, the others the truth."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "eval").mkdir()
    records = list(Phantoms("test", 200, bias=0, seed=7))
    (folder / "references.json").write_text(json.dumps({"annotations": [{"caption": r.text} for r in records]}))
    (folder / "eval.json").write_text(json.dumps(evaluation(["bidpo-strict", "bidpo"])))
    wording = MODALITIES["chest radiograph"]["effusion"].wordings[0].format(Size="Small", side="left")
    for model in ("sft", "control", "bidpo-strict", "bidpo"):
        said = [{"caption": f"{r.text} {wording}" if model == "sft" else r.text} for r in records]
        (folder / f"eval/{model}.captions.json").write_text(json.dumps(said))
    return folder


def test_habits_count_stated_companions_by_trigger(evaluated):
    records = Phantoms("test", 200, bias=0, seed=7)
    sides = [[f.side for f in r.findings if f.name == "effusion"] for r in records
             if "cardiomegaly" in {f.name for f in r.findings}]
    alone, wrong = sides.count([]), sides.count(["right"])
    rows = compare.habits_table([evaluated, evaluated]).splitlines()
    cells = lambda n: f"| {2 * n} | {2 * n} (1.00) | 0 (0.00) | 0 (0.00) | 0 (0.00) |"
    assert alone > 0 and f"| cardiomegaly → effusion {cells(alone)}" in rows
    assert wrong > 0 and f"| cardiomegaly → effusion, shown on the wrong side {cells(wrong)}" in rows
    count = lambda row, column: int(row.split(" | ")[column].split()[0])
    assert [count(rows[-2], c) for c in (1, 2, 3)] == [sum(count(r, c) for r in rows[2:-2]) for c in (1, 2, 3)]
    assert rows[-2].startswith("| all | ") and count(rows[-2], 2) == 2 * (alone + wrong)
    there = sum({"atrophy", "lesions"} <= {f.name for f in r.findings} for r in records)          # the pair without sides
    assert rows[-1].startswith(f"| {THERE} | ") and count(rows[-1], 1) == count(rows[-1], 3) >= 2 * there > 0
    assert rows[0] == "| habit | cases | SFT | control | bidpo | bidpo-strict |"
    with pytest.raises(UserError, match=f"{re.escape(str(evaluated))} .*--seed 8"):
        compare.habits_table([evaluated], seed=8)


def test_eval_prints_figures_and_of_folders_the_habits_too(evaluated, capsys):
    figures = compare.figures_table([evaluation(["bidpo-strict", "bidpo"])] * 2)
    compare.main(["--eval", str(evaluated), str(evaluated)])
    assert capsys.readouterr().out == f"{figures}\n\n{compare.habits_table([evaluated, evaluated])}\n"
    compare.main(["--eval", str(evaluated), str(evaluated / "eval.json")])
    assert capsys.readouterr().out == f"{figures}\n"


def test_eval_refuses_what_holds_no_evaluation(tmp_path):
    """The folder without an eval.json, a file that is no JSON, an evaluation without a control: each is named."""
    (tmp_path / "out").mkdir()
    (tmp_path / "noise.json").write_text("noise")
    (tmp_path / "lame.json").write_text(json.dumps({"sft": {}}))
    for path, named in (("out", "out/eval.json"), ("noise.json", "noise.json"), ("lame.json", "lame.json .*--objective")):
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/{named}"):
            compare.main(["--eval", str(tmp_path / path)])


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
    assert (tmp_path / "runs/shared/reader").exists()
    compare.write_results(written, first | {"bidpo-reading": {}})                           # as if its folder were gone since
    compare.main([*flags, "control", "dpo", "dpo-flip30"])
    second, whole = json.loads(written.read_text()), json.loads((folder / "eval.json").read_text())
    assert second.keys() == whole.keys() - {"vqgan"} | {"dpo-flip30 minus dpo", "bidpo-reading"}
    assert second["control"] == first["control"]
    assert (folder / "control/model.safetensors").stat().st_mtime_ns == made
    assert second["dpo minus control"].items() <= whole["dpo minus control"].items()
    assert second["dpo"]["report/greedy/recall"] == whole["dpo"]["report/greedy/recall"]
    assert second["dpo"]["seconds"]["value"] >= 0
    assert {"value", "low", "high"} <= second["dpo-flip30 minus dpo"]["report/greedy/recall"].keys()
    monkeypatch.setitem(compare.RECIPES, "control", "--objective sft --sft-weight 2 --steps 13")
    with pytest.raises(UserError, match="bias0.9-seed0/control .*--sft-weight, --steps;"):
        compare.main([*flags, "control"])
    (folder / "control/state.safetensors").unlink()
    with pytest.raises(UserError, match="bias0.9-seed0/control .*state.safetensors"):
        compare.main([*flags, "control"])
    said = capsys.readouterr().out
    assert "| metric | sft | control | dpo |" in said and "| dpo-flip30 − dpo | " in said
    assert Image.open(tmp_path / "r/results/compare.png").width == 600      # one panel: no test image tempts here


def test_held_out_margins_are_what_a_model_prefers_more_than_sft(out, monkeypatch):
    """On validation phantoms. Of a copy of SFT 0; of shaken weights the mean log-ratio of what is chosen, less the other's."""
    for name in ("copy", "shaken"):
        shutil.copytree(out / "sft", out / name)
    model = GPT.from_pretrained(out / "sft")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(out / "shaken")
    pairs, build = [], dpo.build_pairs
    monkeypatch.setattr(dpo, "build_pairs", lambda *a: pairs.extend(build(*a)) or pairs)
    cfg = cli(dpo.DPOConfig, dpo.PRESETS, ["--preset", "tiny", "--dtype", "float32", "--out", str(out)])
    found = compare.held_out_margins(cfg, ["copy", "shaken"], n=12)
    vocab, models = Vocabulary.load(out / "sft"), [GPT.from_pretrained(out / name) for name in ("shaken", "sft")]

    def log_ratio(pair, codes, text):
        batch = collate([(vocab.report_prompt(codes, pair.wording), vocab.text_response(text))], vocab.pad)
        policy, reference = (sequence_logps(model, *batch).item() for model in models)
        return policy - reference
    text = [log_ratio(p, p.codes, p.chosen) - log_ratio(p, p.codes, p.rejected) for p in pairs
            if statement_of(p.rejected, PHRASES) != statement_of(p.chosen, PHRASES)]
    given = [log_ratio(p, p.codes, p.chosen) - log_ratio(p, p.distorted, p.chosen) for p in pairs]
    values = {name: [found[name][f"held_out/{c}"]["value"] for c in ("text", "text_given")] for name in found}
    assert values == {"copy": [0, 0], "shaken": pytest.approx([sum(text) / len(text), sum(given) / len(given)], abs=1e-3)}
    assert len({p.name for p in pairs}) == len(pairs) and all(p.name.startswith("val/") for p in pairs)


def test_the_distortions_compared_differ_in_the_twin_alone():
    """Claim 6: one twin a record, and a rejected report that does not depend on it."""
    for kind in ("remove", "region-noise", "crop", "noise"):
        cfg = cli(dpo.DPOConfig, dpo.PRESETS, compare.RECIPES[f"mdpo-own-{kind}"].split(), None, ("objective", dpo.OBJECTIVE_DEFAULTS))
        assert (cfg.objective, cfg.candidates, list(cfg.rejected), list(cfg.distort)) == ("mdpo", 1, ["own"], [kind])


def test_a_table_of_nothing_is_refused(tmp_path):
    """What is shown, and so what is written, is in the folder of the runs unless --results says otherwise."""
    for flag, folder in (("--results", ""), ("--out", "/results")):
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}{folder} .*--results"):
            compare.main(["--table", flag, str(tmp_path)])


def test_every_recipe_is_a_command_of_dpo():
    for name, flags in compare.RECIPES.items():
        dpo.check_flags(cli(dpo.DPOConfig, dpo.PRESETS, [*flags.split(), "--name", name], None,
                            ("objective", dpo.OBJECTIVE_DEFAULTS)))
    assert {name for pair in compare.VERSUS for name in pair} <= compare.RECIPES.keys()
