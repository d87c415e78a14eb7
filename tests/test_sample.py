"""Metrics by hand, then the programs a user runs: evaluation, report, ask, segment, generate."""

import json
import math
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

import sample
from data import PHRASES, Finding, Phantoms, Record, Vocabulary, phantom_spec
from model import GPT, UserError
from vqgan import VQGAN

ROOT = Path(__file__).parents[1]
E, N, H = Finding("effusion", "left"), Finding("nodule", "right"), Finding("cardiomegaly")


def record(*findings):
    return Record(np.zeros((8, 8), np.uint8), "text", "name", findings, spec=phantom_spec(0, "test", 0, 0))


def scores(stated, records):
    ratios = sample.Ratios(len(records), 100)
    return {k: v[0] for k, v in sample.score_findings(stated, records, ratios)[0].items()}


def test_chair_recall_and_f1_by_hand():
    """Three reports: one right and one invented; nothing stated of one; the wrong side of one."""
    s = scores([(E, N), (), (Finding("effusion", "right"),)], [record(E), record(N), record(E)])
    assert s["chair_i"] == pytest.approx(2 / 3) and s["chair_s"] == pytest.approx(2 / 3)
    assert s["recall"] == pytest.approx(1 / 3) and s["f1"] == pytest.approx(2 / 6)
    assert s["laterality"] == pytest.approx(1 / 3) and s["exact"] == 0


def test_companion_hallucination_counts_triggers_without_their_companion():
    """Of three enlarged hearts one has its effusion; of the other two one report invents it."""
    asked, told = sample.companions([(H, E), (H, E), (H,)], [record(H, E), record(H), record(H)])
    assert asked.tolist() == [0, 1, 1] and told.tolist() == [0, 1, 0]


def test_an_empty_report_costs_recall_not_chair():
    s = scores([()], [record(E)])
    assert s["recall"] == 0 and math.isnan(s["chair_i"]) and s["chair_s"] == 0


def test_companions_are_asked_for_where_their_finding_is_on_neither_side(monkeypatch):
    """Of two hundred phantoms; a model that says yes to effusions alone."""
    records, put = list(Phantoms("test", 200, bias=0)), []
    bench = SimpleNamespace(records=records, codes=range(200), ratios=sample.Ratios(200, 50))
    monkeypatch.setattr(sample, "answer", lambda model, vocab, codes, questions: put.extend(zip(codes, questions)) or
                        ["Yes." if "effusion" in q else "No." for q in questions])
    found = sample.evaluate_companions(None, None, bench)["ask/companion"]
    effusions = [i for i, r in enumerate(records) if {"cardiomegaly", "effusion"} & {f.name for f in r.findings} == {"cardiomegaly"}]
    assert [i for i, q in put if q == "Is there a pleural effusion?"] == effusions and 0 < len(effusions) < len(put)
    assert found[0] == pytest.approx(len(effusions) / len(put)) and found[2] == len({i for i, _ in put})
    bench.records = [replace(records[0], spec=None)]
    assert sample.evaluate_companions(None, None, bench) == {}


def test_bootstrap_interval_matches_the_normal_one():
    x = np.random.default_rng(0).random(2000)
    m = sample.summarize(sample.Ratios(2000, 2000)(x))
    half = 1.96 * x.std() / math.sqrt(2000)
    assert m["value"] == pytest.approx(x.mean(), abs=1e-4) and m["n"] == 2000
    assert m["high"] - m["value"] == pytest.approx(half, rel=0.1) and m["value"] - m["low"] == pytest.approx(half, rel=0.1)


def test_differences_are_paired():
    """Both models are resampled alike, so a constant lead has no interval; a metric of one model alone is left out."""
    ratios, x = sample.Ratios(50, 200), np.random.default_rng(0).random(50)
    found = sample.difference({"f1": ratios(x + 0.1), "dice": ratios(x), "distinct": (7.0, np.zeros(0), 50)},
                              {"f1": ratios(x), "distinct": (9.0, np.zeros(0), 50)})
    assert found == {"f1": {"value": 0.1, "low": 0.1, "high": 0.1, "n": 50}}


def test_the_interval_of_a_difference_is_that_of_the_resamples_differences():
    a, b = (0.5, np.array([0.4, 0.6, 0.5]), 10), (0.4, np.array([0.4, 0.4, 0.4]), 10)
    assert sample.difference({"recall": a}, {"recall": b})["recall"] == {"value": 0.1, "low": 0.005, "high": 0.195, "n": 10}


def test_dice_by_hand():
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert sample.dice(a, b) == 0.5 and sample.dice(a, a) == 1 and sample.dice(a & False, b & False) == 1


def test_ssim_of_an_image_with_itself_and_with_another_brightness():
    """For two flat images only the luminance term is left: (2ab + c1) / (a² + b² + c1)."""
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    torch.testing.assert_close(sample.ssim(x, x), torch.ones(2))
    a, b, c1 = 0.5, 0.25, (0.01 * 2) ** 2
    flat = sample.ssim(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b))
    assert flat.item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-4)


def test_frechet_distance_of_two_gaussians():
    """Diagonal covariances: |μ_a − μ_b|² + Σ (σ_a − σ_b)²."""
    torch.manual_seed(0)
    x = torch.randn(50_000, 2)
    a, b = x * torch.tensor([1.0, 2.0]), x * torch.tensor([3.0, 2.0]) + torch.tensor([0.0, 1.0])
    assert sample.frechet(a, b) == pytest.approx(4 + 1, rel=0.03)
    assert sample.frechet(a, a) == pytest.approx(0, abs=1e-5)


def test_a_judge_learns_the_labels_of_phantoms(tmp_path):
    cfg = sample.SampleConfig(image_size=32, judge_steps=60, out=str(tmp_path))
    records = list(Phantoms("judge", 200, 0, 0.0, 32))
    autocast = lambda: torch.autocast("cpu", enabled=False)
    sample.train_judge(records, tmp_path / "judge", cfg, torch.device("cpu"), autocast)
    judge = sample.load_judge({"train": records}, cfg, torch.device("cpu"), autocast)
    x = sample.to_pixels(sample.stack([r.image for r in records], 1))
    _, labels, features = sample.judge_images(judge, x, autocast)
    right = np.mean([f"modality:{r.modality}" in row for r, row in zip(records, labels)])
    assert right > 0.9 and features.shape == (200, 64)


def test_a_drawn_image_is_exactly_its_codes_and_text_holds_none(trained):
    """Even a model that knows nothing draws h·w codes in range, and writes words only."""
    model, vocab, vqgan = GPT.from_pretrained(trained / "sft"), Vocabulary.load(trained / "sft"), \
        VQGAN.from_pretrained(trained / "vqgan")
    cfg = sample.SampleConfig(temperature=2.0)
    drawn = sample.draw_images(model, vocab, vqgan, ["Head CT.", "A much longer text about a brain."], cfg, 2.0)
    assert drawn.shape == (2, 1, 32, 32)
    rows = sample.generate(model, [vocab.draw("x")], 16, vocab.image_range, temperature=2.0)
    assert len(rows[0]) == 16 and all(0 <= c < 64 for c in vocab.ids_to_codes(rows[0]))
    words = sample.generate(model, [vocab.understand(range(16), "Write.")], 20, vocab.text_range, vocab.eos, 2.0)
    assert all(i < vocab.eos for i in words[0])


@pytest.fixture(scope="module")
def evaluated(trained):
    sample.main(["--preset", "tiny", "--out", str(trained)])
    return json.loads((trained / "eval.json").read_text())


def test_evaluation_has_every_model_and_metric(evaluated, trained):
    assert list(evaluated) == ["vqgan", "sft", "control", "dpo", "dpo minus control"]
    for metric in ("report/greedy/chair_i", "report/t0.5/recall", "report/t1.0/f1", "report/greedy/companion",
                   "report/greedy/unchanged_by_noise", "ask/accuracy", "ask/companion", "segment/dice", "generate/cfg1.5/f1"):
        assert {"value", "low", "high", "n"} == set(evaluated["dpo"][metric]), metric
    for name in ("samples.png", "curves.png"):
        with Image.open(trained / name) as image:
            assert min(image.size) > 200 and len(image.getcolors(1 << 24)) > 20      # something is drawn


def test_curves_show_stage_2_under_its_name(trained, tmp_path):
    for name, log in (("vqgan", "vqgan"), ("sft", "sft"), ("strict", "dpo")):
        shutil.copy(trained / f"{log}.jsonl", tmp_path / f"{name}.jsonl")
    whole, without = sample.curves(tmp_path, "strict"), sample.curves(tmp_path, "sft")
    assert whole.height == 2 * without.height > 0 and whole.height == sample.curves(trained, "dpo").height


def test_evaluation_is_repeatable(evaluated, trained):
    shutil.rmtree(trained / "eval")
    sample.main(["--preset", "tiny", "--out", str(trained)])
    assert json.loads((trained / "eval.json").read_text()) == evaluated


def test_only_what_is_new_is_evaluated(evaluated, trained, monkeypatch):
    """The same command measures nothing again and says the same; another flag measures all."""
    measured, write = [], sample.evaluate_answers
    monkeypatch.setattr(sample, "evaluate_answers", lambda *a: measured.append(1) or write(*a))
    sample.main(["--preset", "tiny", "--out", str(trained)])
    assert not measured and json.loads((trained / "eval.json").read_text()) == evaluated
    sample.main(["--preset", "tiny", "--out", str(trained), "--n", "6"])
    assert len(measured) == 3
    sample.main(["--preset", "tiny", "--out", str(trained)])


def test_the_sheet_of_pairs_shows_those_of_this_sft_model(trained):
    model, vqgan = GPT.from_pretrained(trained / "sft"), VQGAN.from_pretrained(trained / "vqgan")
    bench = SimpleNamespace(cfg=sample.SampleConfig(out=str(trained)), pixels=torch.zeros(1), phrases=PHRASES)
    sheet, = sample.pair_sheet(model, vqgan, bench)
    assert sheet.size == (2 * 128 + 8 + 2 * 270, 24 + 6 * 136)            # two images, the true and the rejected report
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    assert sample.pair_sheet(model, vqgan, bench) == []


def command(*words, code=0):
    """Run sample.py as a user would; returns its stdout and stderr."""
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(Phantoms("test", 1)[0].image).save(path)
    return path


def test_report_ask_segment_generate(trained, image_file):
    """One process for each would be slow: the last runs as a user runs it, the others in here."""
    for words in (["report", str(image_file)], ["ask", str(image_file), "On which side is the unicorn?"],
                  ["segment", str(image_file), "left lung"]):
        sample.main([*words, "--out", str(trained)])
    command("generate", "Head CT.", "--out", trained, "--count", "2")
    assert Image.open(trained / "generate.png").size == (512, 256)
    assert Image.open(trained / "segment.png").size == (512, 256)


@pytest.mark.parametrize("words, message", [
    (["paint", "x"], "is no command"),
    (["ask", "x.png"], "usage: python sample.py ask"),
    (["report", "nowhere.png"], "no such file"),
])
def test_wrong_words_get_one_sentence(trained, words, message):
    with pytest.raises(UserError, match=message):
        sample.main([*words, "--out", str(trained)])


def test_an_image_that_cannot_be_read_is_named(trained, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(UserError, match="notes.png: not a readable image"):
        sample.main(["report", str(tmp_path / "notes.png"), "--out", str(trained)])


def test_before_any_training_it_says_what_to_run(tmp_path):
    _, err = command("--out", tmp_path / "new", code=2)
    assert err.startswith("error:") and "python dpo.py" in err and err.count("\n") == 1


def test_evaluating_on_other_data_is_refused(trained):
    with pytest.raises(UserError, match="was trained on phantoms --bias 0.9"):
        sample.main(["--preset", "tiny", "--out", str(trained), "--bias", "0.1"])
