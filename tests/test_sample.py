"""Metrics by hand, the finding reader, then the programs a user runs: evaluation, report, ask, segment, generate."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dpo
import sample
import sft
from data import PHRASES, Finding, Phantoms, Record, phantom_spec
from model import GPT, UserError, save_state
from tests import captions
from vqgan import VQGAN, stack, to_pixels

ROOT = Path(__file__).parents[1]
N = sample.PRESETS["tiny"]["n"]
E, NODULE, H = Finding("effusion", "left"), Finding("nodule", "right"), Finding("cardiomegaly")


def autocast():
    return torch.autocast("cpu", enabled=False)


def record(*findings):
    return Record(np.zeros((8, 8), np.uint8), "text", "name", findings, spec=phantom_spec(0, "test", 0, 0))


def scores(stated, records):
    bootstrap = sample.Bootstrap(len(records), 100)
    return {k: m.value for k, m in sample.score_findings(stated, records, bootstrap).items()}


# Figures with intervals


def test_bootstrap_interval_matches_the_normal_one():
    x = np.random.default_rng(0).random(2000)
    m = sample.summarize(sample.Bootstrap(2000, 2000)(x))
    half = 1.96 * x.std() / math.sqrt(2000)
    assert m["value"] == pytest.approx(x.mean(), abs=1e-4) and m["n"] == 2000
    assert m["high"] - m["value"] == pytest.approx(half, rel=0.1) and m["value"] - m["low"] == pytest.approx(half, rel=0.1)


def test_a_ratio_counts_the_records_that_have_a_denominator():
    """Of four records two state something, one of three things wrong; what no record has is no number."""
    bootstrap = sample.Bootstrap(4, 50)
    ratio, nothing = bootstrap([0, 1, 0, 0], [0, 2, 1, 0]), bootstrap(np.zeros(4), np.zeros(4))
    assert (ratio.value, ratio.n) == (pytest.approx(1 / 3), 2) and ratio.resampled.shape == (50,)
    _, one, other, _ = bootstrap.weights.T
    with np.errstate(invalid="ignore"):                      # no number in both where neither was drawn
        np.testing.assert_allclose(ratio.resampled, one / (2 * one + other), rtol=1e-5)
    assert math.isnan(nothing.value) and nothing.n == 0
    assert sample.summarize(nothing) == {"value": None, "low": None, "high": None, "n": 0}
    assert sample.summarize(sample.Metric(7.0, np.array([]), 4)) == {"value": 7.0, "low": None, "high": None, "n": 4}


def test_differences_are_paired():
    """Both models are resampled alike, so a constant lead has no interval; a metric of one model alone is left out."""
    bootstrap, x = sample.Bootstrap(50, 200), np.random.default_rng(0).random(50)
    distinct = lambda n: sample.Metric(n, np.zeros(0), 50)
    found = sample.difference({"f1": bootstrap(x + 0.1), "dice": bootstrap(x), "distinct": distinct(7.0)},
                              {"f1": bootstrap(x), "distinct": distinct(9.0)})
    assert found == {"f1": {"value": 0.1, "low": 0.1, "high": 0.1, "n": 50}}


def test_the_interval_of_a_difference_is_that_of_the_resamples_differences():
    a, b = sample.Metric(0.5, np.array([0.4, 0.6, 0.5]), 10), sample.Metric(0.4, np.array([0.4, 0.4, 0.4]), 10)
    assert sample.difference({"recall": a}, {"recall": b})["recall"] == {"value": 0.1, "low": 0.005, "high": 0.195, "n": 10}


def test_what_is_kept_comes_back_for_its_recipe_alone(tmp_path):
    rows = {"f1": (0.25, [0.5, math.nan], 3), "distinct": (7.0, [], 4), "recall": (math.nan, [math.nan, math.nan], 0)}
    metrics = {k: sample.Metric(value, np.array(resampled, np.float32), n) for k, (value, resampled, n) in rows.items()}
    path = tmp_path / "eval/mine.v2.safetensors"
    sample.write_kept(path, metrics, "recipe")
    for found in (sample.read_kept(path), sample.read_kept(path, "recipe")):
        assert found.keys() == metrics.keys()
        for name, m in metrics.items():
            np.testing.assert_equal((found[name].value, found[name].n), (m.value, m.n))
            np.testing.assert_array_equal(found[name].resampled, m.resampled)
    assert sample.read_kept(path, "another") is None and [p.name for p in path.parent.iterdir()] == [path.name]


# What is counted


def test_chair_recall_and_f1_by_hand():
    """Three reports: one right and one invented; nothing stated of one; the wrong side of one, and one left out."""
    s = scores([(E, NODULE), (), (Finding("effusion", "right"),)], [record(E), record(NODULE), record(E, H)])
    assert s["chair_i"] == pytest.approx(2 / 3) and s["chair_s"] == pytest.approx(2 / 3)
    assert s["recall"] == pytest.approx(1 / 4) and s["f1"] == pytest.approx(2 / 7)
    assert s["laterality"] == pytest.approx(1 / 3) and s["exact"] == 0


def test_records_that_are_left_out_count_nowhere():
    have, bootstrap = np.array([True, False]), sample.Bootstrap(2, 10)
    found = sample.score_findings([(E,), (NODULE,)], [record(E), record(E)], bootstrap, have)
    assert (found["chair_i"].value, found["recall"].value, found["exact"].value) == (0, 1, 1)
    assert {found[k].n for k in ("chair_i", "chair_s", "recall", "f1", "exact")} == {1}


def test_companion_hallucination_counts_triggers_without_their_companion():
    """Of three enlarged hearts one has its effusion; of the other two one report invents it."""
    stated, records = [(H, E), (H, E), (H,)], [record(H, E), record(H), record(H)]
    asked, told = sample.count_companions(stated, records)
    assert asked.tolist() == [0, 1, 1] and told.tolist() == [0, 1, 0]
    assert scores(stated, records)["companion"] == 0.5 and "companion" not in scores([(H, E)], [record(H, E)])
    assert sample.triggers_of(replace(record(H), spec=None)) == []


def test_an_empty_report_costs_recall_not_chair():
    s = scores([()], [record(E)])
    assert s["recall"] == 0 and math.isnan(s["chair_i"]) and s["chair_s"] == 0


def test_companions_are_asked_for_where_their_finding_is_on_neither_side(monkeypatch):
    """Of two hundred phantoms; a model that says yes to effusions alone."""
    records, put = [replace(r, questions=()) for r in Phantoms("test", 200, bias=0, size=16)], []
    bench = SimpleNamespace(records=records, codes=range(200), bootstrap=sample.Bootstrap(200, 50))
    monkeypatch.setattr(sample, "write_answers", lambda model, vocab, codes, questions: put.extend(zip(codes, questions)) or
                        ["Yes." if "effusion" in q else "No." for q in questions])
    found = sample.evaluate_answers(None, None, bench)["ask/companion"]
    names = [{f.name for f in r.findings} for r in records]
    effusions = [i for i, there in enumerate(names) if {"cardiomegaly", "effusion"} & there == {"cardiomegaly"}]
    assert [i for i, q in put if q == "Is there a pleural effusion?"] == effusions and 0 < len(effusions) < len(put)
    assert found.value == pytest.approx(len(effusions) / len(put)) and found.n == len({i for i, _ in put})
    bench.records = [replace(records[0], spec=None)]
    assert sample.evaluate_answers(None, None, bench) == {}


def test_one_question_a_record_is_right_whatever_its_case_and_full_stop(monkeypatch):
    questions = (("A?", "Yes."),), (), (("B?", "No."), ("C?", "Left.")), (("D?", "No."),)
    records = [replace(record(), questions=q) for q in questions]
    bench, put = SimpleNamespace(records=records, codes=range(4), bootstrap=sample.Bootstrap(4, 50)), []
    monkeypatch.setattr(sample, "write_answers", lambda model, vocab, codes, questions: put.extend(questions) or
                        ["yes", " No. ", "Yes."])
    found = sample.evaluate_answers(None, None, bench)["ask/accuracy"]
    assert put == ["A?", "B?", "D?"] and found.value == pytest.approx(2 / 3) and found.n == 3
    bench.records = records[1:2]
    assert sample.evaluate_answers(None, None, bench) == {}


def test_dice_is_told_of_all_of_large_and_of_each_structure(monkeypatch):
    """The heart is drawn as it is, the small nodule not at all. Not asked for: a record without masks, a mask without a pixel."""
    heart, nodule = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    heart[:5], nodule[0, 0] = True, True
    records = [replace(record(), masks=m) for m in ({"heart": heart}, {}, {"nodule": nodule, "a line": heart & False})]
    bench = SimpleNamespace(records=records, codes=range(3), bootstrap=sample.Bootstrap(3, 50), cfg=sample.SampleConfig())
    drawn = lambda model, vocab, vqgan, codes, structures: np.stack(
        [heart if s == "heart" else np.roll(nodule, 1) for s in structures])
    monkeypatch.setattr(sample, "draw_masks", drawn)
    found = sample.evaluate_masks(None, None, None, bench)
    assert {k: (m.value, m.n) for k, m in found.items()} == {
        "segment/dice": (0.5, 2), "segment/dice_large": (1, 1), "segment/dice/heart": (1, 1), "segment/dice/nodule": (0, 1)}
    bench.records = records[1:2]
    assert sample.evaluate_masks(None, None, None, bench) == {}


def test_frechet_distance_of_two_gaussians():
    """Diagonal covariances: |μ_a − μ_b|² + Σ (σ_a − σ_b)²."""
    torch.manual_seed(0)
    x = torch.randn(50_000, 2)
    a, b = x * torch.tensor([1.0, 2.0]), x * torch.tensor([3.0, 2.0]) + torch.tensor([0.0, 1.0])
    assert sample.frechet(a, b) == pytest.approx(4 + 1, rel=0.03)
    assert sample.frechet(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_a_gaussian_to_itself_turned():
    """By 45°. In two dimensions tr (Σ_a Σ_b)^½ = √(tr Σ_a Σ_b + 2·√|Σ_a|·√|Σ_b|), here √(12.5 + 2·2·2)."""
    a = 1.5 ** 0.5 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])          # Σ_a = diag(1, 4)
    b = a @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / 2 ** 0.5
    assert sample.frechet(a, b) == pytest.approx(5 + 5 - 2 * 20.5 ** 0.5, abs=1e-5)


def test_reports_are_scored_at_three_temperatures(monkeypatch):
    """Of two enlarged hearts: greedily both are stated and one effusion invented; at 0.5 one and two; at 1 only a nodule."""
    said = {0.0: ["Enlarged heart. Left effusion.", "Enlarged heart."], 0.5: ["Left effusion.", "Enlarged heart. Left effusion."],
            1.0: ["", "Right nodule."]}
    cfg = sample.SampleConfig(seed=3)
    bench = sample.Benchmark([record(H)] * 2, range(2), None, PHRASES, None, True, sample.Bootstrap(2, 50), cfg)
    monkeypatch.setattr(sample, "write_reports", lambda model, vocab, codes, temperature, seed:
                        said[temperature] if (codes, seed) == ([0, 1], 3) else None)
    found, greedy = sample.evaluate_reports(None, None, bench)
    assert not any("modality" in name for name in found)        # their own reports name none
    bench.records = [replace(record(H), text=text, modality="CT") for text in ("Head CT.", "As in the MRI.")]
    monkeypatch.setattr(sample, "write_reports", lambda *args, **options: ["CT of the head.", "A CT."])
    assert sample.evaluate_reports(None, None, bench)[0]["report/greedy/modality"][::2] == (1, 1)           # of the first alone
    figures = {"greedy": (1 / 2, 1 / 3, 1), "t0.5": (1, 2 / 3, 1 / 2), "t1.0": (0, 1, 0)}
    assert greedy == said[0.0] and {k.split("/")[1] for k in found} == figures.keys()
    for decoding, expected in figures.items():
        assert [found[f"report/{decoding}/{m}"].value for m in ("companion", "chair_i", "recall")] == pytest.approx(expected)


def test_drawings_are_read_against_their_reports_and_their_features_against_true_images(monkeypatch):
    """Of three findings one is drawn without guidance, and a false one; two with it. A record without text counts nowhere."""
    seen = {1.0: [(E, H), (), (NODULE,)], 1.5: [(E, NODULE), (), (NODULE,)]}
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [99.0, 99.0]])             # Σ = diag(2, 0) without the third
    features = {"true": points, 1.0: 2 * points + torch.tensor([0.0, 3.0]), 1.5: points + torch.tensor([0.0, 1.0])}
    records, asked = [record(E, NODULE), record(H), replace(record(E), text="")], []
    cfg = sample.SampleConfig(temperature=0.6, seed=3)
    bench = sample.Benchmark(records, range(3), "true", PHRASES, "reader", True, sample.Bootstrap(3, 50), cfg)
    monkeypatch.setattr(sample, "draw_images", lambda model, vocab, vqgan, texts, guidance, **options:
                        asked.append((texts, options)) or guidance)
    monkeypatch.setattr(sample, "see_findings", lambda reader, pixels: (seen.get(pixels), [set()] * 3, features[pixels]))
    found = {**sample.evaluate_drawings(None, None, None, bench, 1.0), **sample.evaluate_drawings(None, None, None, bench, 1.5)}
    assert {k: m.value for k, m in found.items()} == pytest.approx({
        "generate/cfg1/f1": 2 / 5, "generate/cfg1/extra": 1 / 2, "generate/cfg1/missing": 2 / 3, "generate/cfg1/frechet": 9 + 2,
        "generate/cfg1.5/f1": 4 / 5, "generate/cfg1.5/extra": 0, "generate/cfg1.5/missing": 1 / 3, "generate/cfg1.5/frechet": 1})
    assert asked == [(["text", "text", ""], dict(temperature=0.6, top_k=0, top_p=1.0, seed=3))] * 2
    bench.reader = None
    assert sample.evaluate_drawings(None, None, None, bench, 1.0) == {}


# The finding reader


def test_a_reader_learns_the_labels_of_phantoms(tmp_path, monkeypatch):
    """Once: it is read back until another recipe is asked for."""
    cfg = sample.SampleConfig(image_size=16, reader_steps=25, out=str(tmp_path))
    records, device = list(Phantoms("reader", 120, 0, 0.0, 16)), torch.device("cpu")
    load = lambda **changes: sample.load_reader({"train": records}, replace(cfg, **changes), device, autocast)
    reader = load()
    _, labels, features = sample.see_findings(reader, to_pixels(stack([r.image for r in records], 1)))
    assert np.mean([f"modality:{r.modality}" in row for r, row in zip(records, labels)]) > 0.9
    assert features.shape == (len(records), reader.last.in_features)
    trained, train = [], sample.train_reader
    monkeypatch.setattr(sample, "train_reader", lambda *a: trained.append(1) or train(*a))
    again = load()
    assert not trained and all(torch.equal(a, b) for a, b in zip(reader.state_dict().values(), again.state_dict().values()))
    load(reader_steps=1)
    monkeypatch.setattr(sample, "fingerprint", lambda records: "a finding was corrected")
    load(reader_steps=1)
    assert len(trained) == 2


def test_what_a_reader_sees_are_findings_and_labels():
    """300 images, more than it looks at in one go; a label is seen where its logit is above 0."""
    labels = ["finding:cardiomegaly:", "finding:effusion:left", "modality:MRI"]

    def reader(x):
        return torch.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0], x[:, 0, 0, 1]], 1), x.flatten(1)
    reader.labels = labels
    x = torch.ones(300, 1, 2, 2)
    x[299, 0, 0] = torch.tensor([-1.0, 0.0])
    findings, seen, features = sample.see_findings(reader, x)
    assert findings == [(H,)] * 299 + [(E,)] and seen == [{labels[0], labels[2]}] * 299 + [{labels[1]}]
    assert torch.equal(features, x.flatten(1))
    record = SimpleNamespace(findings=(H, E), modality="MRI", body_part="")
    assert sample.labels_of(record) == set(labels)


def test_the_reader_of_phantoms_sees_other_patients_without_bias(tmp_path, monkeypatch):
    """And where no record has a label there is none."""
    cfg, seen = sample.SampleConfig(out=str(tmp_path), image_size=16, records=30), []
    monkeypatch.setattr(sample, "train_reader", lambda records, *a: seen.extend(records))      # None: no labels
    load = lambda train: sample.load_reader({"train": train}, cfg, torch.device("cpu"), autocast)
    assert load(Phantoms("train", 40, 0, 0.9, 16)) is None
    assert {r.spec.split for r in seen} == {"reader"} and len(seen) == cfg.records
    expected = Phantoms("reader", cfg.records, cfg.seed, 0.0, 16)
    assert [r.findings for r in seen] == [r.findings for r in expected]
    monkeypatch.undo()
    assert load([Record(np.zeros((16, 16), np.uint8), "text", "name")]) is None and not (tmp_path / "reader").exists()


# The evaluation


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A copy of `trained` after `sample.py`; tests that write take a copy of it."""
    out = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "out")
    evaluate(out)
    return out


@pytest.fixture
def evaluated_copy(evaluated, tmp_path):
    return shutil.copytree(evaluated, tmp_path / "out")


def evaluate(out, *flags):
    """Run `sample.py --preset tiny`; returns what eval.json holds then."""
    sample.main(["--preset", "tiny", "--dtype", "float32", "--out", str(out), *flags])
    return read_json(out / "eval.json")


def read_json(path):
    return json.loads(path.read_text())


def test_evaluation_has_every_model_and_metric(evaluated):
    found = read_json(evaluated / "eval.json")
    assert list(found) == ["vqgan", "sft", "control", "bidpo", "bidpo minus control"]
    for metric in ("report/greedy/chair_i", "report/t0.5/recall", "report/t1.0/f1", "report/greedy/companion",
                   "report/greedy/modality", "ask/accuracy", "ask/companion", "segment/dice", "segment/dice_large",
                   "generate/cfg1/f1", "generate/cfg1.5/missing", "generate/cfg1.5/modality"):
        for name in ("sft", "control", "bidpo", "bidpo minus control"):
            assert {"value", "low", "high", "n"} == set(found[name][metric]), metric
    assert found["bidpo"]["report/greedy/distinct"]["n"] == N and "generate/cfg1.5/frechet" in found["sft"]
    assert {"reconstruction/psnr", "reconstruction/reader_f1_original", "reconstruction/reader_f1_reconstructed/effusion",
            "reconstruction/reader_modality_original"} <= found["vqgan"].keys()
    for name in ("samples.png", "curves.png"):
        with Image.open(evaluated / name) as image:
            assert min(image.size) > 200 and len(image.getcolors(1 << 24)) > 20      # something is drawn


def test_evaluation_is_repeatable(evaluated, evaluated_copy):
    """Also with a finding reader that is trained anew."""
    for folder in ("eval", "reader"):
        shutil.rmtree(evaluated_copy / folder)
    assert evaluate(evaluated_copy) == read_json(evaluated / "eval.json")


def test_only_what_is_new_is_evaluated(evaluated_copy, monkeypatch):
    """The same command measures nothing again and says the same; another model is measured alone, another flag all."""
    before, measured, answers = read_json(evaluated_copy / "eval.json"), [], sample.evaluate_answers
    monkeypatch.setattr(sample, "evaluate_answers", lambda *a: measured.append(1) or answers(*a))
    assert evaluate(evaluated_copy) == before and not measured
    shutil.copytree(evaluated_copy / "sft", evaluated_copy / "mine")
    found = evaluate(evaluated_copy, "--model", "mine")
    assert len(measured) == 1 and found["mine"] == before["sft"] and "mine minus control" in found
    assert "generate/cfg2/f1" in evaluate(evaluated_copy, "--guidance", "2")["mine"] and len(measured) == 1 + 4


def test_models_of_another_sft_model_are_named(evaluated_copy, capsys):
    """Those that stage 2 began from it, and no other."""
    evaluate(evaluated_copy)
    assert "trained from another" not in capsys.readouterr().out
    shutil.copytree(evaluated_copy / "sft", evaluated_copy / "older")
    model = GPT.from_pretrained(evaluated_copy / "sft")
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    model.save_pretrained(evaluated_copy / "sft")
    evaluate(evaluated_copy)
    said = [line.split(" was trained from another ")[0] for line in capsys.readouterr().out.splitlines() if "from another" in line]
    assert said == [str(evaluated_copy / name) for name in ("control", "bidpo")]


def test_a_model_of_other_steps_than_the_controls_is_named(monkeypatch, capsys):
    flags = {"objective": "", "batch_size": 16, "pairs": 9, "seed": 0}
    progress = {name: {"step": 600, "flags": flags} for name in ("control", "bidpo")}
    progress |= {"short": {"step": 60, "flags": flags | {"seed": 1}}, "foreign": None}
    monkeypatch.setattr(sample, "read_progress", lambda folder: progress[folder.name])
    sample.warn_of_unlike(Path("out"), dict.fromkeys(progress))
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("out/short and out/control were trained with different --steps, --seed")


def test_what_cannot_be_counted_and_what_may_have_been_seen_is_told(tmp_path, monkeypatch, capsys):
    """One test record has no findings; --data is another than out/sft was trained on, which is no matter of phantoms."""
    for name, found in {"load_reader": None, "encode_images": np.zeros((2, 4))}.items():
        monkeypatch.setattr(sample, name, lambda *a, found=found: found)
    records = [record(H), replace(record(), findings=None)]
    monkeypatch.setattr(sample, "open_data", lambda cfg: {"train": records, "test": records})
    save_state(tmp_path / "sft", 1, [], [], origin={"--data or data.py": "others"})
    made = []
    for data in ("", "d"):
        cfg = sample.SampleConfig(out=str(tmp_path), data=data, n=2)
        made.append(sample.make_benchmark(cfg, None, torch.device("cpu"), autocast))
        said = capsys.readouterr().out
        assert "1 of 2 test records have no `findings`" in said and ("may have been trained on" in said) == bool(data)
    assert not made[0].known


def test_the_benchmark_knows_the_data_it_was_made_of(tmp_path, monkeypatch):
    cfg = sample.SampleConfig(out=str(tmp_path), image_size=16, records=40, n=2)
    for name, found in {"load_reader": None, "encode_images": np.zeros((2, 4))}.items():
        monkeypatch.setattr(sample, name, lambda *a, found=found: found)
    made = [sample.make_benchmark(replace(cfg, bias=bias), None, torch.device("cpu"), autocast).data for bias in (0.9, 0.9, 0.5)]
    assert made[0] == made[1] != made[2]


def records_with_texts(*texts):
    return [SimpleNamespace(text=t, name=f"{i}.png") for i, t in enumerate(texts)]


def test_the_references_are_coco_annotations():
    assert sample.coco_references(records_with_texts("One.", "", "Three.")) == {
        "info": {}, "licenses": [], "type": "captions",
        "images": [{"id": 0, "file_name": "0.png"}, {"id": 2, "file_name": "2.png"}],
        "annotations": [{"id": 0, "image_id": 0, "caption": "One."}, {"id": 2, "image_id": 2, "caption": "Three."}]}


def test_greedy_reports_are_kept_beside_the_figures(tmp_path, monkeypatch):
    """In the order of the references; the model is evaluated again only when they are missing or the data are others."""
    records, said = records_with_texts("One.", "", "Three."), ["A.", "B.", "C."]
    bench = SimpleNamespace(cfg=sample.SampleConfig(out=str(tmp_path)), records=records, data="", reader=None)
    measured, weights = [], torch.nn.Linear(1, 1)
    monkeypatch.setattr(sample, "evaluate_reports",
                        lambda *a: measured.append(1) or ({"x": sample.Metric(1.0, np.ones(2), 3)}, said))
    for name in ("answers", "masks", "drawings"):
        monkeypatch.setattr(sample, f"evaluate_{name}", lambda *a: {})
    once = lambda: sample.evaluate_model("v1.5", weights, None, weights, bench)
    kept = tmp_path / "eval/v1.5.captions.json"
    first, again = once(), once()
    assert len(measured) == 1 and str(first) == str(again)
    assert read_json(kept) == [{"image_id": 0, "caption": "A."}, {"image_id": 2, "caption": "C."}]
    kept.unlink()
    once()
    assert len(measured) == 2 and kept.exists()
    bench.data = "a report was corrected"
    once()
    assert len(measured) == 3


def test_the_evaluation_writes_what_other_scorers_read(evaluated_copy):
    """The reports of the chosen model, one for each reference; tests.captions is such a scorer."""
    out = evaluated_copy
    for flags, name in (["--model", "sft"], "sft"), ([], "bidpo"):
        evaluate(out, *flags)
        said, references = (read_json(out / f"{f}.json") for f in ("captions", "references"))
        assert said == read_json(out / f"eval/{name}.captions.json")
        assert [c["image_id"] for c in said] == [r["id"] for r in references["images"]] == list(range(N))
        assert references["images"][5]["file_name"] == "test/5" and references["annotations"][5]["image_id"] == 5
    evaluated = read_json(out / "eval.json")["bidpo"]
    assert evaluated["report/greedy/distinct"]["value"] == len({c["caption"] for c in said})
    found = captions.score_folder(out)
    assert list(found) == ["sft", "control", "bidpo"] and {m.n for m in found["bidpo"].values()} == {N}


def test_the_model_asked_for_or_bidpo_or_the_first():
    chosen = lambda names, model="": sample.choose_model(sample.SampleConfig(model=model), names)
    assert chosen(["sft", "control", "bidpo"]) == "bidpo" and chosen(["sft", "control"]) == "sft"
    assert chosen(["sft", "control", "bidpo"], "control") == "control"
    with pytest.raises(UserError, match="--model mine: .*sft, bidpo"):
        chosen(["sft", "bidpo"], "mine")


def test_models_are_found_sft_and_control_first_and_no_unfinished_one(tmp_path):
    for name in ("a", "sft", "control", "b.partial", ".c.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").touch()
    (tmp_path / "vqgan").mkdir()
    assert sample.find_models(tmp_path) == ["sft", "control", "a"]


# Pictures


def test_curves_show_stage_2_under_its_name(trained, tmp_path):
    for name, log in (("vqgan", "vqgan"), ("sft", "sft"), ("strict", "bidpo")):
        shutil.copy(trained / f"{log}.jsonl", tmp_path / f"{name}.jsonl")
    whole, without = sample.curves(tmp_path, "strict"), sample.curves(tmp_path, "sft")
    assert whole.height == 2 * without.height > 0 and whole.height == sample.curves(trained, "bidpo").height
    with (tmp_path / "sft.jsonl").open("a") as log:                     # steps that were skipped, as their gradient was not finite
        log.write('{"step": 41, "loss": Infinity, "val/loss": NaN}\n')
    assert np.array_equal(np.array(sample.curves(tmp_path, "sft")), np.array(without))
    sample.plot("constant", "step", {"a": [(0, 3e9), (1, 3e9)]})


def test_the_table_shows_the_intervals_of_differences_where_there_are_any(capsys):
    m = lambda value, low, high: {"value": value, "low": low, "high": high}
    written = {"vqgan": {}, "sft": {"a": m(0.5, 0.4, 0.6), "b": m(7.0, None, None)}}
    show = lambda written: [line.split() for line in (sample.print_table(written, [n for n in written if n in ("sft", "dpo")],
                                                      SimpleNamespace(records=[])), capsys.readouterr().out)[1].splitlines()]
    assert [["a", "0.500", "[0.400,", "0.600]"], ["b", "7.000"]] == [row for row in show(written) if row[:1] in (["a"], ["b"])]
    written |= {"dpo": {"a": m(0.3, 0.2, 0.4)}, "dpo minus control": {"a": m(-0.2, -0.3, -0.1)}}
    lines = show(written)
    assert ["a", "0.500", "0.300", "-0.200", "[-0.300,", "-0.100]*"] in lines and ["b", "7.000", "-", "-"] in lines
    written["dpo minus control"]["a"]["high"] = 0.1
    assert ["a", "0.500", "0.300", "-0.200", "[-0.300,", "0.100]"] in show(written)


def test_ticks_are_round_numbers_inside_the_range():
    assert np.allclose(sample.ticks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert np.allclose(sample.ticks(-73, 12), [-60, -40, -20, 0])
    assert np.allclose(sample.ticks(0.0213, 0.0871), [0.04, 0.06, 0.08])
    assert len(sample.ticks(3, 3 + 1e-9)) > 1


def test_few_points_are_drawn_as_they_are_and_many_smoothed():
    assert sample.smoothed([(0, 1.0), (5, 3.0)]) == [(0, 1.0), (5, 3.0)]
    many = [(x, float(x % 2)) for x in range(20)]                     # 0, 1, 0, 1 …: a mean of two
    assert sample.smoothed(many)[0] == (0, 0.0) and {y for _, y in sample.smoothed(many)[1:]} == {0.5}


def test_the_sheet_of_pairs_shows_those_of_this_sft_model(trained):
    model, vqgan = GPT.from_pretrained(trained / "sft"), VQGAN.from_pretrained(trained / "vqgan")
    bench = SimpleNamespace(cfg=sample.SampleConfig(out=str(trained)), pixels=torch.zeros(1), phrases=PHRASES)
    sheet, = sample.pair_sheet(model, vqgan, bench)
    assert sheet.width == 3 * sample.COLUMN and sheet.height > 26 + 2 * sample.TILE          # a study, its twin, a rejected report
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    assert sample.pair_sheet(model, vqgan, bench) == []
    bench.cfg.out = str(trained / "nothing is here")
    assert sample.pair_sheet(model, vqgan, bench) == []


def test_what_is_not_there_is_red_and_what_is_missed_is_named():
    """A sentence that states nothing is not red; where nothing is known of the image no sentence is, and none is missed."""
    red, orange = sample.COLOURS[1], sample.COLOURS[4]
    lines = lambda text, true: sample.coloured_lines(text, true, PHRASES)
    true = {("cardiomegaly", "")}
    assert lines("Enlarged heart. Left effusion.", true) == [("Enlarged heart.", sample.INK), ("Left effusion.", red)]
    assert lines("No effusion.", true | {("effusion", "left")}) == [
        ("No effusion.", sample.INK), ("missed: cardiomegaly", orange), ("missed: left effusion", orange)]
    assert lines("Left effusion.", None) == [("Left effusion.", sample.INK)] and lines("", true) == []


def test_a_sheet_has_its_texts_below_its_images():
    black = sample.Column("a", -torch.ones(1, 1, 8, 8), ["Left effusion."], [set()])
    pixels = np.array(sample.lay_out([black, black._replace(pixels=None)], PHRASES))
    assert (pixels[30:26 + sample.TILE, 10:4 + sample.TILE] == 0).all()
    red = (pixels == sample.COLOURS[1]).all(-1)
    ys, xs = np.nonzero(red)
    left = xs < sample.COLUMN
    assert ys[left].min() >= 26 + sample.TILE and 26 <= ys[~left].min() < 26 + sample.LINE and left.any() and not left.all()


# One's own images


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(Phantoms("test", 1)[0].image).save(path)
    return path


def test_report_ask_segment_generate(out, image_file, capsys):
    """Each says on one line what it wrote, of several images with their names."""
    for words in (["report", image_file, image_file], ["ask", image_file, "On which side is the unicorn?"],
                  ["segment", image_file, "left lung"], ["generate", "Head CT.", "--count", "2"]):
        sample.main([*map(str, words), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"{image_file}: ") for line in lines] == [True, True, False, False, False]
    assert lines[0] == lines[1] and str(out / "segment.png") in lines[3] and str(out / "generate.png") in lines[4]
    assert Image.open(out / "generate.png").size == Image.open(out / "segment.png").size == (512, 256)


@pytest.mark.parametrize("words, named", [
    (["paint", "x"], "paint"), (["ask", "x.png"], "ask"), (["segment", "x.png", "a", "b"], "segment"),
    (["report"], "report"), (["report", "nowhere.png"], "nowhere.png"), (["segment", "x.png", " "], "segment"),
    (["generate", ""], "generate"), (["generate", "x", "--device", "meta"], "--device meta")])
def test_wrong_words_get_one_sentence(out, words, named):
    with pytest.raises(UserError, match=named):
        sample.main([*words, "--out", str(out)])


def test_a_picture_that_cannot_be_written_leaves_the_one_before(out, image_file, monkeypatch):
    sample.main(["segment", str(image_file), "left_lung", "--out", str(out)])
    before = (out / "segment.png").read_bytes()

    def fill_the_disk(self, path, *rest):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Image.Image, "save", fill_the_disk)
        sample.main(["segment", str(image_file), "heart", "--out", str(out)])
    assert (out / "segment.png").read_bytes() == before
    sample.main(["segment", str(image_file), "left lung", "--out", str(out)])               # `_` reads as a blank
    assert (out / "segment.png").read_bytes() == before


def test_a_structure_that_was_never_learnt_is_told(out, image_file, capsys):
    for structure, told in (("left lung", False), ("left kidney", True)):
        sample.main(["segment", str(image_file), structure, "--out", str(out)])
        said = capsys.readouterr().out
        assert ("no masks of 'left kidney', only of " in said and "left lung" in said) == told


def test_a_task_that_was_never_learnt_is_told(trained, tmp_path, image_file, capsys):
    """A model of reports alone knows it; stage 2 and LoRA hand it on. One that goes on from a model knows its tasks too."""
    flags = ["--preset", "tiny", "--steps", "1", "--out", str(tmp_path / "out")]
    shutil.copytree(trained / "vqgan", tmp_path / "out/vqgan")
    sft.main([*flags, "--generate-share", "0", "--ask-share", "0", "--segment-share", "0"])
    dpo.main([*flags, "--objective", "sft", "--lora-rank", "1", "--name", "adapters"])
    for name in ("sft", "adapters"):
        for words, told in ((["report"], False), (["ask", "What?"], True), (["segment", "heart"], True)):
            sample.main([words[0], str(image_file), *words[1:], "--model", name, "--out", str(tmp_path / "out")])
            assert (f"{name} has learnt no {words[0]!r}, only report" in capsys.readouterr().out) == told
    sft.main([*flags[:-1], str(tmp_path / "next"), "--init", str(tmp_path / "out/sft"), "--report-share", "0"])
    assert json.loads((tmp_path / "next/sft/config.json").read_text())["tasks"] == "report generate ask segment"


def test_an_image_that_cannot_be_read_is_named(out, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(UserError, match="notes.png"):
        sample.main(["report", str(tmp_path / "notes.png"), "--out", str(out)])


def test_before_any_training_it_says_what_to_run(tmp_path):
    """As a user runs it, in a process of its own."""
    command = [sys.executable, ROOT / "sample.py", "--out", tmp_path / "new"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1
    assert str(tmp_path / "new") in done.stderr and "--out" in done.stderr


def test_evaluating_on_other_data_is_refused(out):
    with pytest.raises(UserError, match=re.escape(str(out / "sft")) + ".*--bias 0.9"):
        evaluate(out, "--bias", "0.1")
    assert not (out / "eval").exists()
