"""Caption metrics against the public scorers and by hand, then the runner: a folder's captions, the LoRA comparison.

caption_golden.json holds what the packages named in it give for the same words, joined by blanks: sacrebleu without
smoothing, pycocoevalcap's Bleu, Rouge and Cider, rouge_score's F1, NLTK's METEOR with no synonyms and its stems."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import sample
import sft
from model import UserError, folder_hash
from tests import captions

GOLDEN = json.loads((Path(__file__).parent / "caption_golden.json").read_text())
CANDIDATES, REFERENCES = zip(*(map(captions.caption_words, pair) for pair in GOLDEN["pairs"]))
ONCE = np.ones((1, len(CANDIDATES)))
near = lambda value: pytest.approx(value, abs=1e-6)


def words(*texts):
    return [text.split() for text in texts]


def test_bleu_is_that_of_the_public_scorers():
    """The candidates are shorter than the references together, so the brevity penalty is in it."""
    assert sum(map(len, CANDIDATES)) < sum(map(len, REFERENCES))
    ours = captions.bleu(CANDIDATES, REFERENCES, ONCE)[0]
    assert ours == near(GOLDEN["bleu_sacrebleu"]) and ours == near(GOLDEN["bleu_pycocoevalcap"])


@pytest.mark.parametrize("key, metric", [
    ("rouge_l", captions.rouge_l), ("rouge_l_beta1", lambda c, r: captions.rouge_l(c, r, beta=1)),
    ("meteor", captions.meteor)])
def test_scores_of_single_reports_are_those_of_the_public_scorers(key, metric):
    assert list(map(metric, CANDIDATES, REFERENCES)) == near(GOLDEN[key])


def test_cider_is_that_of_the_public_scorer():
    assert captions.cider(CANDIDATES, REFERENCES) == near(GOLDEN["cider"])


def test_stems_are_those_of_nltk():
    """The words reach every step and condition of the stemmer."""
    assert {word: captions.porter_stem(word) for word in GOLDEN["stems"]} == GOLDEN["stems"]


def test_words_and_numbers_without_punctuation():
    assert captions.caption_words("Size: 1.5 cm; T2/FLAIR, follow-up.") == \
        ["size", "1.5", "cm", "t2", "flair", "follow", "up"]


def test_a_copy_scores_the_most():
    """METEOR is 1 - 0.5 (1/m)³ for one run of m words; n-grams of two words end at n = 2, so CIDEr is half of 10."""
    texts = words("small left effusion and nodule", "clear lungs")
    assert captions.bleu(texts, texts, np.ones((1, 2)))[0] == near([1, 1, 1, 1])
    assert [captions.rouge_l(t, t) for t in texts] == [1, 1]
    assert [captions.meteor(t, t) for t in texts] == near([1 - 0.5 / 5 ** 3, 1 - 0.5 / 2 ** 3])
    assert captions.cider(texts, texts) == near([10, 5])


def test_an_empty_candidate_scores_nothing():
    empty, text = [], "small left effusion seen".split()
    assert captions.bleu([empty], [text], np.ones((1, 1))).tolist() == [[0, 0, 0, 0]]
    assert captions.rouge_l(empty, text) == captions.meteor(empty, text) == 0
    assert captions.cider([empty, text], [text, ["clear"]]).tolist() == [0, 0]


def test_bleu_by_hand():
    """A word counts as often as the reference has it; a short candidate loses exp(1 - r/c), a long one nothing."""
    clipped = captions.bleu(words("no no no"), words("no effusion here"), np.ones((1, 1)))[0]
    assert clipped == near([1 / 3, 0, 0, 0])
    short = captions.bleu(words("no effusion"), words("no effusion is seen"), np.ones((1, 1)))[0]
    assert short == near([math.exp(-1), math.exp(-1), 0, 0])
    long = captions.bleu(words("no effusion is seen"), words("no effusion"), np.ones((1, 1)))[0]
    assert long == near([2 / 4, math.sqrt(2 / 4 * 1 / 3), 0, 0])


def test_meteor_by_hand():
    """One stem and one word match, in two runs: precision 2/2, recall 2/3, penalty 0.5 (2/2)³."""
    assert captions.meteor(*words("effusions left", "left pleural effusion")) == near(2 / 3 / (0.9 + 0.1 * 2 / 3) * 0.5)


def test_meteor_aligns_equal_words_before_equal_stems():
    """By stems alone the two words would match in one run."""
    assert captions.meteor(*words("effusions effusion", "effusion effusions")) == near(0.5)


def test_cider_does_not_count_what_every_reference_says():
    common, rare = captions.cider(words("chest", "enlarged"), words("chest normal", "chest enlarged"))
    assert common == 0 < rare


def test_weights_count_records():
    """Weights 2, 0, 1 are the first report twice, the second not at all; no record at all is no value."""
    c, r = CANDIDATES[2:5], REFERENCES[2:5]
    by_weight = captions.bleu(c, r, np.array([[2, 0, 1], [0, 0, 0]]))
    assert by_weight[0] == near(captions.bleu([c[0], c[0], c[2]], [r[0], r[0], r[2]], np.ones((1, 3)))[0])
    assert np.isnan(by_weight[1]).all()


def test_scores_with_intervals_leave_out_records_without_text():
    """With each record once a resampled metric is its value; otherwise records count as often as drawn."""
    said, true = (list(t) for t in zip(*GOLDEN["pairs"]))
    said[3:3], true[3:3] = ["Something said.", "Something else."], ["", ""]
    bootstrap = sample.Bootstrap(len(true), 2)
    bootstrap.weights[:] = np.ones(len(true)), np.arange(len(true)) % 3
    scores = captions.score_captions(said, true, bootstrap)
    assert list(scores) == list(captions.CAPTIONS)
    drawn = bootstrap.weights[:, [bool(t) for t in true]]
    expected = np.array([*captions.bleu(CANDIDATES, REFERENCES, drawn).T,
                         *(drawn @ GOLDEN[k] / drawn.sum(1) for k in ("rouge_l", "meteor", "cider"))])
    assert np.array([metric.resampled for metric in scores.values()]) == near(expected)
    assert [metric.value for metric in scores.values()] == near(expected[:, 0])
    assert {metric.n for metric in scores.values()} == {len(GOLDEN["pairs"])}
    assert captions.score_captions([], ["", ""], bootstrap) == {}


TRUE = {0: "Chest radiograph. Small left effusion.", 2: "Head CT. Normal.", 5: "Chest radiograph. Right nodule seen."}


def write_coco(out, **models):
    """The files of sample.py in a folder: references and, of each model, its captions, here in another order."""
    (out / "eval").mkdir()
    rows = [{"id": i, "image_id": i, "caption": t} for i, t in TRUE.items()]
    (out / "references.json").write_text(json.dumps({"info": {}, "images": [], "annotations": rows}))
    for name, said in models.items():
        rows = [{"image_id": i, "caption": t} for i, t in reversed(said.items())]
        (out / f"eval/{name}.captions.json").write_text(json.dumps(rows))


def test_a_folder_is_scored_by_image(tmp_path, capsys):
    """A copy of the references scores 1 in every resample; one wrong report of three makes an interval."""
    write_coco(tmp_path, bidpo=TRUE, control=TRUE, sft=TRUE | {2: "Chest radiograph. Effusion."})
    captions.main([str(tmp_path)])
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line]
    assert lines[:2] == [["metric", "sft", "control", "bidpo"], ["---", "---:", "---:", "---:"]]
    assert [title for title, *_ in lines[2:]] == list(captions.CAPTIONS.values())
    cells = {title: cells for title, *cells in lines[2:]}
    assert cells["BLEU-1"][1:] == cells["ROUGE-L"][1:] == ["1.000 [1.000, 1.000]"] * 2
    assert cells["ROUGE-L"][0] == "0.667 [0.000, 1.000]"          # all resamples between the three wrong and the three right
    assert cells["BLEU-1"][0].startswith("0.769 [0.")             # 5 + 5 of 13 words; the lengths are equal


def test_without_captions_of_the_models_those_of_the_chosen_one_are_scored(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps([{"image_id": i, "caption": t} for i, t in TRUE.items()]))
    scores = captions.score_folder(tmp_path)
    assert list(scores) == ["captions"] and scores["captions"]["bleu4"].value == near(1)


@pytest.mark.parametrize("spoil, named", [
    (lambda out: (out / "references.json").unlink(), "references.json"),
    (lambda out: (out / "references.json").write_text('{"annotations": []}'), "references.json"),
    (lambda out: (out / "eval/control.captions.json").unlink(), "/captions.json"),
    (lambda out: (out / "eval/control.captions.json").write_text("[{"), "eval/control.captions.json"),
    (lambda out: (out / "eval/control.captions.json").write_text('[{"image_id": 0, "caption": "x"}]'),
     "eval/control.captions.json"),
])
def test_what_does_not_fit_is_named_with_the_way_out(tmp_path, spoil, named):
    write_coco(tmp_path, control=TRUE)
    spoil(tmp_path)
    with pytest.raises(UserError, match=f"{named} .*`python sample.py --out {tmp_path}`"):
        captions.score_folder(tmp_path)


def test_one_task_is_named():
    for flags in [], ["out", "--base", "out"], ["out", "--table"]:
        with pytest.raises(SystemExit, match="2"):
            captions.main(flags)


def test_table_shows_mean_and_span():
    rows = captions.table({"before": {"bleu1": [0.5]}, "full": {"bleu1": [0.6, 0.8], "trained": [1200, 1200]}})
    assert rows.splitlines() == ["| metric | before | full |", "| --- | ---: | ---: |",
                                 "| BLEU-1 | 0.500 | 0.700 [0.600, 0.800] |", "| trained parameters | - | 1,200 |"]


def test_no_results_are_named(tmp_path):
    with pytest.raises(UserError, match="captioning.json.* --base"):
        captions.main(["--table", "--results", str(tmp_path)])


def test_a_tiny_round(trained, tmp_path, capsys, monkeypatch):
    """Both ways adapt the same base; LoRA writes fewer parameters; a second call trains nothing."""
    monkeypatch.delitem(captions.METHODS, "LoRA q,v")                  # each is a process of its own, and slow to start
    flags = ["--base", str(trained), "--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--preset", "tiny",
             "--seeds", "0", "--steps", "2", "--records", "96", "--n", "6", "--small", str(tmp_path / "small")]
    sft.main(["--preset", "tiny", "--dtype", "float32", "--init", str(trained / "sft"), "--out", str(tmp_path / "small"), "--steps", "1"])
    captions.main(flags)
    found = json.loads((tmp_path / "captioning.json").read_text())["phantoms"]
    assert list(found) == ["before", "small, before", *captions.METHODS, captions.SMALL]
    for run, base in (("full", trained), ("LoRA-all", trained), ("small-full", tmp_path / "small")):
        assert json.loads((tmp_path / f"runs/phantoms-{run}-0/cost.json").read_text())["base"] == folder_hash(base / "sft")
    full, thin = (found[m]["trained"][0] for m in captions.METHODS)
    assert thin < full and all(found[m]["memory"][0] > 50 and found[m]["step"][0] >= 0 for m in captions.METHODS)
    wanted = {"bleu1", "bleu4", "rouge_l", "meteor", "cider", "f1"}
    assert all(wanted <= found[m].keys() <= captions.ROWS.keys() for m in found)
    made = (tmp_path / "runs/phantoms-full-0/sft/model.safetensors").stat().st_mtime_ns
    captions.main(flags)
    assert (tmp_path / "runs/phantoms-full-0/sft/model.safetensors").stat().st_mtime_ns == made
    assert "| metric | before | small, before | full | LoRA all | small, full |" in capsys.readouterr().out
