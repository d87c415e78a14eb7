"""Caption metrics against the public scorers and by hand, then the files that other scorers read.

caption_golden.json holds what the packages named in it give for the same words, joined by blanks: sacrebleu without
smoothing, pycocoevalcap's Bleu, Rouge and Cider, rouge_score's F1, NLTK's METEOR with no synonyms and its stems."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from model import UserError

GOLDEN = json.loads((Path(__file__).parent / "caption_golden.json").read_text())
CANDIDATES, REFERENCES = zip(*(map(sample.caption_words, pair) for pair in GOLDEN["pairs"]))
ONCE = np.ones((1, len(CANDIDATES)))
near = lambda value: pytest.approx(value, abs=1e-6)


def words(*texts):
    return [text.split() for text in texts]


def test_bleu_is_that_of_the_public_scorers():
    """The candidates are shorter than the references together, so the brevity penalty is in it."""
    assert sum(map(len, CANDIDATES)) < sum(map(len, REFERENCES))
    ours = sample.bleu(CANDIDATES, REFERENCES, ONCE)[0]
    assert ours == near(GOLDEN["bleu_sacrebleu"]) and ours == near(GOLDEN["bleu_pycocoevalcap"])


@pytest.mark.parametrize("key, metric", [
    ("rouge_l", sample.rouge_l), ("rouge_l_beta1", lambda c, r: sample.rouge_l(c, r, beta=1)), ("meteor", sample.meteor)])
def test_scores_of_single_reports_are_those_of_the_public_scorers(key, metric):
    assert list(map(metric, CANDIDATES, REFERENCES)) == near(GOLDEN[key])


def test_cider_is_that_of_the_public_scorer():
    assert sample.cider(CANDIDATES, REFERENCES) == near(GOLDEN["cider"])


def test_stems_are_those_of_nltk():
    """The words reach every step and condition of the stemmer."""
    assert {word: sample.porter_stem(word) for word in GOLDEN["stems"]} == GOLDEN["stems"]


def test_words_and_numbers_without_punctuation():
    assert sample.caption_words("Size: 1.5 cm; T2/FLAIR, follow-up.") == ["size", "1.5", "cm", "t2", "flair", "follow", "up"]


def test_a_copy_scores_the_most():
    """METEOR is 1 - 0.5 (1/m)³ for one run of m words; n-grams of two words end at n = 2, so CIDEr is half of 10."""
    texts = words("small left effusion and nodule", "clear lungs")
    assert sample.bleu(texts, texts, np.ones((1, 2)))[0] == near([1, 1, 1, 1])
    assert [sample.rouge_l(t, t) for t in texts] == [1, 1]
    assert [sample.meteor(t, t) for t in texts] == near([1 - 0.5 / 5 ** 3, 1 - 0.5 / 2 ** 3])
    assert sample.cider(texts, texts) == near([10, 5])


def test_an_empty_candidate_scores_nothing():
    empty, text = [], "small left effusion seen".split()
    assert sample.bleu([empty], [text], np.ones((1, 1))).tolist() == [[0, 0, 0, 0]]
    assert sample.rouge_l(empty, text) == sample.meteor(empty, text) == 0
    assert sample.cider([empty, text], [text, ["clear"]]).tolist() == [0, 0]


def test_bleu_by_hand():
    """A word counts as often as the reference has it; a short candidate loses exp(1 - r/c), a long one nothing."""
    clipped = sample.bleu(words("no no no"), words("no effusion here"), np.ones((1, 1)))[0]
    assert clipped == near([1 / 3, 0, 0, 0])
    short = sample.bleu(words("no effusion"), words("no effusion is seen"), np.ones((1, 1)))[0]
    assert short == near([math.exp(-1), math.exp(-1), 0, 0])
    long = sample.bleu(words("no effusion is seen"), words("no effusion"), np.ones((1, 1)))[0]
    assert long == near([2 / 4, math.sqrt(2 / 4 * 1 / 3), 0, 0])


def test_meteor_by_hand():
    """One stem and one word match, in two runs: precision 2/2, recall 2/3, penalty 0.5 (2/2)³."""
    assert sample.meteor(*words("effusions left", "left pleural effusion")) == near(2 / 3 / (0.9 + 0.1 * 2 / 3) * 0.5)


def test_meteor_aligns_equal_words_before_equal_stems():
    """By stems alone the two words would match in one run."""
    assert sample.meteor(*words("effusions effusion", "effusion effusions")) == near(0.5)


def test_cider_does_not_count_what_every_reference_says():
    common, rare = sample.cider(words("chest", "enlarged"), words("chest normal", "chest enlarged"))
    assert common == 0 < rare


def test_weights_count_records():
    """Weights 2, 0, 1 are the first report twice, the second not at all; no record at all is no value."""
    c, r = CANDIDATES[2:5], REFERENCES[2:5]
    by_weight = sample.bleu(c, r, np.array([[2, 0, 1], [0, 0, 0]]))
    assert by_weight[0] == near(sample.bleu([c[0], c[0], c[2]], [r[0], r[0], r[2]], np.ones((1, 3)))[0])
    assert np.isnan(by_weight[1]).all()


def records_and_reports():
    """The golden pairs as records and reports, and between them two records without text."""
    said, true = (list(t) for t in zip(*GOLDEN["pairs"]))
    said[3:3], true[3:3] = ["Something said.", "Something else."], ["", ""]
    return [SimpleNamespace(text=t, name=f"{i}.png") for i, t in enumerate(true)], said


def test_scores_with_intervals_leave_out_records_without_text():
    """With each record once a resampled metric is its value; otherwise records count as often as drawn."""
    records, said = records_and_reports()
    ratios = sample.Ratios(len(records), 2)
    ratios.weights[:] = np.ones(len(records)), np.arange(len(records)) % 3
    scores = sample.score_captions(said, records, ratios)
    assert list(scores) == ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor", "cider"]
    drawn = ratios.weights[:, [bool(r.text) for r in records]]
    expected = np.array([*sample.bleu(CANDIDATES, REFERENCES, drawn).T,
                         *(drawn @ GOLDEN[k] / drawn.sum(1) for k in ("rouge_l", "meteor", "cider"))])
    assert np.array([resampled for _, resampled, _ in scores.values()]) == near(expected)
    assert [value for value, _, _ in scores.values()] == near(expected[:, 0])
    assert {n for *_, n in scores.values()} == {len(GOLDEN["pairs"])}


def test_the_references_are_coco_annotations():
    records = [SimpleNamespace(text=t, name=n) for t, n in (("One.", "a.png"), ("", "b.png"), ("Three.", "c.png"))]
    assert sample.coco_references(records) == {
        "info": {}, "licenses": [], "type": "captions",
        "images": [{"id": 0, "file_name": "a.png"}, {"id": 2, "file_name": "c.png"}],
        "annotations": [{"id": 0, "image_id": 0, "caption": "One."}, {"id": 2, "image_id": 2, "caption": "Three."}]}


def test_greedy_reports_are_kept_beside_the_figures(tmp_path, monkeypatch):
    """In the order of the references; the model is evaluated again only when they are missing."""
    records, said = records_and_reports()
    bench = SimpleNamespace(cfg=sample.SampleConfig(out=str(tmp_path)), records=records, codes=np.zeros(1), judge=None)
    measured, weights = [], torch.nn.Linear(1, 1)
    monkeypatch.setattr(sample, "evaluate_reports", lambda *a: measured.append(1) or ({"x": (1.0, np.ones(2), 3)}, said))
    for name in ("answers", "companions", "masks", "drawings"):
        monkeypatch.setattr(sample, f"evaluate_{name}", lambda *a: {})
    autocast = lambda: torch.autocast("cpu", enabled=False)
    evaluate = lambda: sample.evaluate_model("v1.5", weights, None, weights, bench, autocast)
    kept = tmp_path / "eval/v1.5.captions.json"
    first, again = evaluate(), evaluate()
    assert len(measured) == 1 and str(first) == str(again)
    captions = json.loads(kept.read_text())
    assert [c["image_id"] for c in captions] == [a["image_id"] for a in sample.coco_references(records)["annotations"]]
    assert captions == [{"image_id": i, "caption": said[i]} for i in range(len(said)) if i not in (3, 4)]
    kept.unlink()
    evaluate()
    assert len(measured) == 2 and json.loads(kept.read_text()) == captions


def test_the_model_asked_for_or_dpo_or_the_first():
    chosen = lambda names, model="": sample.choose_model(sample.SampleConfig(model=model), names)
    assert chosen(["sft", "control", "dpo"]) == "dpo" and chosen(["sft", "control"]) == "sft"
    assert chosen(["sft", "control", "dpo"], "control") == "control"
    with pytest.raises(UserError, match="--model mine: out holds sft, dpo"):
        chosen(["sft", "dpo"], "mine")


def test_the_evaluation_writes_what_other_scorers_read(trained, capsys):
    """The reports of the chosen model, one for each reference."""
    for flags, name in (["--model", "sft"], "sft"), ([], "dpo"):
        sample.main(["--preset", "tiny", "--out", str(trained), *flags])
        assert f"captions.json (greedy reports of {name})" in capsys.readouterr().out
        captions, references = (json.loads((trained / f"{f}.json").read_text()) for f in ("captions", "references"))
        assert captions == json.loads((trained / f"eval/{name}.captions.json").read_text())
        assert [c["image_id"] for c in captions] == [r["id"] for r in references["images"]] == list(range(12))
        assert references["images"][5]["file_name"] == "test/5" and references["annotations"][5]["image_id"] == 5
    scores = json.loads((trained / "eval.json").read_text())
    assert scores["dpo"]["report/greedy/distinct"]["value"] == len({c["caption"] for c in captions})
    metrics = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor", "cider")
    assert {f"report/greedy/{m}" for m in metrics} <= scores["dpo"].keys()
    assert scores["dpo"]["report/greedy/bleu4"]["n"] == 12 and "report/t0.5/bleu4" not in scores["dpo"]
