"""data.py: phantoms, distortions, what a folder says of itself, findings read back; its readers are in test_folders.py."""

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

import data
from data import (BODY_PHRASES, COMPANIONS, DISTORTIONS, MODALITIES, MODALITY_PHRASES, PHRASES, PIXEL_DISTORTIONS,
                  Finding, Phantoms, Record, Spec, add_noise, ask_both, ask_difference, ask_phantom, ask_removed,
                  ask_whether, distort, draw, erase, flip, lexicon, match_findings, names_and_sides,
                  open_data, phantom_record, phantom_spec, random_finding, read_findings, read_term, redraw,
                  statement_of, write_report)

SHARED = Path(data.__file__).resolve().parent.parent / "shared" / "data"
KINDS = [(modality, name) for modality, kinds in MODALITIES.items() for name in kinds]
SIDED = [(modality, name) for modality, name in KINDS if MODALITIES[modality][name].sides != ("",)]


def rng(seed=0):
    return np.random.default_rng(seed)


def spec_with(modality, name, side="", index=0, size="", place=""):
    """A patient with exactly one finding."""
    kind = MODALITIES[modality][name]
    f = Finding(name, side or kind.sides[0], size or kind.sizes[0], place or kind.places[0])
    return Spec(0, "test", index, modality, (f,))


def specs(split, n, bias=0.0, seed=0):
    return [phantom_spec(seed, split, i, bias) for i in range(n)]


def difference(spec, twin):
    """Absolute gray-level difference (H, W) of two drawn specs."""
    return np.abs(draw(spec)[0].astype(int) - draw(twin)[0])


def grow(mask, pixels):
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def centre(weights):
    """Mean column of weights (H, W), 0 in the middle of the image, positive to the image's right."""
    columns = weights.sum(0)
    return (columns * (np.arange(weights.shape[1]) - (weights.shape[1] - 1) / 2)).sum() / columns.sum()


# ---- Phantoms ------------------------------------------------------------------------------------


def test_same_seed_split_and_index_give_the_same_record():
    one, two = Phantoms("train", 9, seed=3)[5], Phantoms("train", 9, seed=3)[5]
    assert np.array_equal(one.image, two.image) and one.masks.keys() == two.masks.keys()
    assert all(np.array_equal(one.masks[k], two.masks[k]) for k in one.masks)
    assert (one.text, one.findings, one.questions, one.name) == (two.text, two.findings, two.questions, two.name)


@pytest.mark.parametrize("change", [{"seed": 4}, {"split": "val"}, {"index": 6}])
def test_another_seed_split_or_index_gives_another_image(change):
    spec = Spec(3, "train", 5, "head CT", ())
    assert not np.array_equal(draw(spec)[0], draw(replace(spec, **change))[0])


def test_the_record_of_a_phantom_is_drawn_in_the_size_asked_for():
    record = Phantoms("train", 1, size=32)[0]
    assert record.image.shape == (32, 32) and record.image.dtype == np.uint8
    assert all(m.shape == (32, 32) and m.dtype == bool for m in record.masks.values())


def test_index_beyond_the_end_raises_so_that_iteration_stops():
    assert len(list(Phantoms("train", 3))) == 3
    with pytest.raises(IndexError):
        Phantoms("train", 3)[3]


def test_splits_never_share_an_image():
    images = [Phantoms(split, 150, seed=0)[i].image.tobytes() for split in ("train", "val", "test") for i in range(150)]
    assert len(set(images)) == 450


def test_three_modalities_of_five_findings_each():
    assert [len(kinds) for kinds in MODALITIES.values()] == [5, 5, 5]
    drawn = specs("test", 600)
    assert {s.modality for s in drawn} == set(MODALITIES)
    assert {f.name for s in drawn for f in s.findings} == {name for _, name in KINDS}


def test_a_quarter_or_so_of_studies_are_normal_and_many_reports_negate():
    drawn = specs("test", 2000)
    assert 0.2 < np.mean([not s.findings for s in drawn]) < 0.4
    assert np.mean([" No " in write_report(s) for s in drawn]) > 0.1


@pytest.mark.parametrize("modality,name", SIDED)
def test_the_patients_left_is_the_images_right(modality, name):
    """By the mask, and by what the finding changes in the image."""
    for side, sign in (("left", 1), ("right", -1)):
        for index in range(8):
            for size in MODALITIES[modality][name].sizes:
                spec = spec_with(modality, name, side, index, size)
                assert centre(draw(spec)[1][name]) * sign > 2
                assert centre(difference(spec, replace(spec, findings=()))) * sign > 1


@pytest.mark.parametrize("side,sign", [("left", 1), ("right", -1)])
def test_lung_masks_lie_on_the_patients_side(side, sign):
    assert centre(draw(Spec(0, "test", 0, "chest radiograph", ()))[1][f"{side} lung"]) * sign > 5


@pytest.mark.parametrize("place,sign", [("upper", -1), ("lower", 1)])
@pytest.mark.parametrize("name", ["nodule", "consolidation"])
def test_upper_is_above_lower(name, place, sign):
    mask = draw(spec_with("chest radiograph", name, "left", place=place))[1][name]
    assert centre(mask.T) * sign > 0


@pytest.mark.parametrize("modality,name", [k for k in KINDS if MODALITIES[k[0]][k[1]].sizes != ("",)])
def test_large_is_larger_than_small(modality, name):
    small, large = (draw(spec_with(modality, name, "left", size=s))[1][name].sum() for s in ("small", "large"))
    assert large > 1.3 * small


def test_every_finding_has_a_mask_and_no_other_finding_has_one():
    names = {name for _, name in KINDS}
    for spec in specs("test", 400):
        masks = draw(spec)[1]
        assert {n for n in masks if n in names} == {f.name for f in spec.findings}
        assert all(masks[f.name].sum() >= 15 for f in spec.findings)


# Masks of what a finding moves besides itself.
MOVES = {"atrophy": ("ventricles",), "hydrocephalus": ("ventricles",), "shift": ("ventricles",)}


@pytest.mark.parametrize("modality,name", KINDS)
def test_without_a_finding_only_its_surroundings_change(modality, name):
    """Anatomy, noise, other findings and their places stay: elsewhere the difference is exactly 0."""
    others = [n for n in MODALITIES[modality] if n != name]
    for index in range(6):
        spec = spec_with(modality, name, index=index)
        extra = random_finding(others[index % 4], MODALITIES[modality][others[index % 4]], rng(index))
        spec = replace(spec, findings=(*spec.findings, extra))
        twin = replace(spec, findings=(extra,))
        (image, masks), (twin_image, twin_masks) = draw(spec), draw(twin)
        near = masks[name].copy()
        for moved in MOVES.get(name, ()):
            near |= masks[moved] | twin_masks[moved]
        changed = np.abs(image.astype(int) - twin_image)
        assert changed[near].max() > 20                    # it can be seen
        assert not changed[~grow(near, 14)].any()          # soft edges reach a few pixels
        assert changed[~grow(near, 6)].max(initial=0) < 40


def test_remove_takes_out_one_finding_and_keeps_the_others():
    spec = Spec(0, "test", 0, "head CT", (Finding("haemorrhage", "left", "small"), Finding("subdural", "right")))
    for seed in range(5):
        twin = redraw(spec, "remove", rng(seed))
        assert len(twin.findings) == 1 and set(twin.findings) < set(spec.findings)
        assert replace(twin, findings=()) == replace(spec, findings=())


def test_add_puts_in_one_finding_that_was_absent():
    spec = spec_with("brain MRI", "cyst", "right")
    for seed in range(5):
        twin = redraw(spec, "add", rng(seed))
        assert len(twin.findings) == 2 and spec.findings[0] in twin.findings
        assert len({f.name for f in twin.findings}) == 2
        new = next(f for f in twin.findings if f not in spec.findings)
        masks = draw(twin)[1]
        near = masks[new.name] | masks["ventricles"] | draw(spec)[1]["ventricles"]
        assert not difference(spec, twin)[~grow(near, 14)].any()


def test_mirror_moves_one_sided_finding_across_and_leaves_the_rest():
    spec = Spec(0, "test", 1, "brain MRI", (Finding("tumour", "left", "small"), Finding("lesions")))
    twin = redraw(spec, "mirror", rng())
    assert twin.findings == (Finding("tumour", "right", "small"), Finding("lesions"))
    masks, twin_masks = draw(spec)[1], draw(twin)[1]
    assert np.array_equal(masks["lesions"], twin_masks["lesions"])
    assert centre(masks["tumour"]) > 0 > centre(twin_masks["tumour"])
    assert not difference(spec, twin)[~grow(masks["tumour"] | twin_masks["tumour"], 4)].any()


def test_redraw_says_none_where_the_change_is_impossible():
    full = Spec(0, "test", 0, "head CT", tuple(random_finding(n, k, rng()) for n, k in MODALITIES["head CT"].items()))
    assert redraw(full, "add", rng()) is None
    assert redraw(replace(full, findings=()), "remove", rng()) is None
    assert redraw(spec_with("head CT", "hydrocephalus"), "mirror", rng()) is None


def test_redrawn_findings_stand_in_the_order_of_the_table():
    spec = spec_with("chest radiograph", "consolidation")
    for seed in range(8):
        order = list(MODALITIES["chest radiograph"])
        places = [order.index(f.name) for f in redraw(spec, "add", rng(seed)).findings]
        assert places == sorted(places)


def companion_rate(split, bias, n=3000):
    """Share of triggers whose companion (by name) is there too."""
    names = {t: c(Finding("", "left")).name for t, c in COMPANIONS.items()}
    found = [{f.name for f in s.findings} for s in specs(split, n, bias)]
    return np.mean([names[t] in present for present in found for t in present & names.keys()])


def test_in_training_companions_follow_their_triggers():
    assert companion_rate("train", 0.9) >= 0.9


@pytest.mark.parametrize("split,bias", [("train", 0.0), ("val", 0.9), ("test", 0.9)])
def test_without_bias_and_outside_training_findings_are_independent(split, bias):
    assert abs(companion_rate(split, bias) - data.FINDING_RATE) < 0.05


def test_at_bias_one_every_trigger_brings_exactly_its_companion():
    for spec in specs("train", 500, bias=1.0):
        for f in spec.findings:
            assert f.name not in COMPANIONS or COMPANIONS[f.name](f) in spec.findings


def test_trigger_and_companion_are_findings_of_one_modality():
    for trigger, companion in COMPANIONS.items():
        assert any({trigger, companion(Finding("", "left")).name} <= kinds.keys() for kinds in MODALITIES.values())


def test_a_report_negates_only_what_is_absent():
    for spec in specs("test", 600):
        kinds = MODALITIES[spec.modality]
        for negated in write_report(spec).split(" No ")[1:]:
            assert not any(kinds[f.name].noun in negated for f in spec.findings)


def test_answers_of_a_phantom_are_true():
    for spec in specs("test", 300):
        nouns = {k.noun: name for name, k in MODALITIES[spec.modality].items()}
        present = {f.name: f for f in spec.findings}
        for question, answer in ask_phantom(spec):
            name = next((n for noun, n in nouns.items() if question.endswith(f" {noun}?")), None)
            if question.startswith("Which modality"):
                assert answer.lower() == f"{spec.modality.lower()}."
            elif "which side" in question:
                side = next(present[n].side for noun, n in nouns.items() if f"the {noun}?" in question)
                assert answer == f"{side.capitalize()}."
            else:
                assert question in [ask_whether(MODALITIES[spec.modality][name], w) for w in (0, 1)]
                assert answer == ("Yes." if name in present else "No."), question


@pytest.mark.parametrize("modality,name", KINDS)
def test_a_question_has_an_article_exactly_where_its_finding_is_countable(modality, name):
    kind = MODALITIES[modality][name]
    article = "" if not kind.countable else "an " if kind.noun.startswith(tuple("aeiou")) else "a "
    be = "Are" if name == "lesions" else "Is"
    assert ask_whether(kind, 0) == f"{be} there {article}{kind.noun}?"
    assert ask_whether(kind, 1) == f"Does the image show {article}{kind.noun}?"


@pytest.mark.parametrize("modality,name,question", [
    ("brain MRI", "atrophy", "Is there atrophy?"), ("chest radiograph", "nodule", "Is there a nodule?"),
    ("head CT", "infarct", "Is there an infarct?"), ("head CT", "shift", "Is there midline shift?"),
    ("brain MRI", "cyst", "Is there an arachnoid cyst?"), ("brain MRI", "lesions", "Are there white matter lesions?")])
def test_questions_by_hand(modality, name, question):
    assert ask_whether(MODALITIES[modality][name], 0) == question


@pytest.mark.parametrize("n", [1, 2, 3])
def test_phantoms_are_of_the_first_modalities_alone(n):
    assert {r.modality for r in Phantoms("train", 40, size=16, modalities=n)} == set(list(MODALITIES)[:n])


def test_open_data_gives_three_splits():
    cfg = SimpleNamespace(data="", records=200, seed=1, bias=0.9, image_size=32, channels=1, modalities=2)
    splits = open_data(cfg)
    assert {s: (records.split, records.seed, records.bias, records.size, records.modalities) for s, records in splits.items()} == {
        s: (s, cfg.seed, cfg.bias, cfg.image_size, cfg.modalities) for s in ("train", "val", "test")}
    assert len(splits["train"]) == cfg.records and len(splits["val"]) == 32 and len(splits["test"]) > 10_000
    assert len(open_data(SimpleNamespace(**vars(cfg) | {"records": 1000}))["val"]) == 100


# ---- Findings read back --------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_read_findings_is_exact_on_phantom_reports(split):
    """Name, side, size and place, though many reports hold negations."""
    for spec in specs(split, 1500, bias=0.9):
        assert set(read_findings(write_report(spec), PHRASES)) == set(spec.findings), write_report(spec)


@pytest.mark.parametrize("text,expected", [
    ("No pleural effusion or pneumothorax.", set()),
    ("Clear lungs without nodule.", set()),
    ("Lung is without nodule.", set()),
    ("The lungs are free of nodules.", set()),
    ("There are no nodules.", set()),
    ("The heart is not enlarged.", set()),
    ("Nodule was not seen.", set()),
    ("Left pneumothorax is without a nodule.", {("pneumothorax", "left")}),
    ("Pneumothorax is absent. Negative for nodule.", set()),
    ("Small left pleural effusion without pneumothorax.", {("effusion", "left")}),
    ("Nodule is not seen, left pneumothorax.", {("pneumothorax", "left")}),
    ("There is no nodule and no pneumothorax.", set()),
    ("There is no pleural effusion, pneumothorax or nodule.", set()),
    ("There is no longer a pleural effusion, pneumothorax or nodule.", set()),
    ("There is not any pleural effusion, nodule or pneumothorax.", set()),
    ("Nodule is no longer seen, left pneumothorax.", {("pneumothorax", "left")}),
    ("Small left pleural effusion, no pneumothorax.", {("effusion", "left")}),
    ("Small left pleural effusion and no pneumothorax.", {("effusion", "left")}),
    ("No nodule. Right pneumothorax.", {("pneumothorax", "right")}),
    ("Bilateral pleural effusions.", {("effusion", "bilateral")}),
    ("Consolidation in both lungs.", {("consolidation", "bilateral")}),
    ("Left and right pleural effusion.", {("effusion", "bilateral")}),
    ("Large right pneumothorax and small left pleural effusion.", {("pneumothorax", "right"), ("effusion", "left")}),
    ("Left lower zone nodule; right upper zone consolidation", {("nodule", "left"), ("consolidation", "right")}),
    ("ENLARGED HEART", {("cardiomegaly", "")}),
    ("Massive notion.", set()),
    ("", set()),
])
def test_read_findings_by_hand(text, expected):
    assert names_and_sides(read_findings(text, PHRASES)) == expected


@pytest.mark.parametrize("modality,name", KINDS)
def test_every_wording_of_a_kind_is_recognised_by_its_own_phrases(modality, name):
    """And by no other kind's; the noun of questions and negations is among the phrases."""
    kind = MODALITIES[modality][name]
    for wording, side, size, place in product(kind.wordings, kind.sides, kind.sizes, kind.places):
        text = wording.format(side=side, size=size, place=place, Side=side.capitalize(), Size=size.capitalize())
        found = (Finding(name, side, size, place),)
        assert read_findings(text, {name: kind.phrases}) == read_findings(text, PHRASES) == found, text
    assert read_findings(f"{kind.noun}.", {name: kind.phrases}) == (Finding(name),)


def test_every_phrase_comes_from_its_kind():
    assert PHRASES == {name: MODALITIES[modality][name].phrases for modality, name in KINDS}
    assert len(PHRASES) == len(KINDS)                      # no name in two modalities


def test_read_findings_gives_size_and_place_of_its_own_clause():
    found = read_findings("Large right pneumothorax, nodule in the left lower lung.", PHRASES)
    assert set(found) == {Finding("pneumothorax", "right", "large"), Finding("nodule", "left", "", "lower")}


REAL = [Record(np.zeros((1, 1)), "", "", tuple(Finding(n) for n in (
    "ground glass opacities", "consolidation", "pleural effusion", "endotracheal tube")))]


@pytest.mark.parametrize("text,expected", [
    ("Chest radiograph. Ground-glass opacities in both lungs. Consolidation in the right lung.",
     {("ground glass opacities", "bilateral"), ("consolidation", "right")}),
    ("Chest radiograph: ground-glass opacities in both lungs, consolidation in the right lung, left pleural effusion, "
     "endotracheal tube in place.",
     {("ground glass opacities", "bilateral"), ("consolidation", "right"), ("pleural effusion", "left"),
      ("endotracheal tube", "")}),
])
def test_read_findings_with_the_lexicon_of_real_records(text, expected):
    assert names_and_sides(read_findings(text, lexicon(REAL))) == expected


def test_lexicon_names_what_the_records_name():
    assert lexicon(REAL).keys() == {f.name for f in REAL[0].findings}
    assert lexicon(Phantoms("train", 1)) == PHRASES
    assert lexicon(Phantoms("train", 1, modalities=1)).keys() == MODALITIES["chest radiograph"].keys()
    assert lexicon([replace(REAL[0], findings=None)]) == {}


@pytest.mark.parametrize("folder", ["covid_cxr"])
def test_read_findings_on_real_reports(folder):
    if not (SHARED / folder).is_dir():
        pytest.skip("no sample data")
    rows = [json.loads(line) for split in ("train", "test")
            for line in (SHARED / folder / split / "metadata.jsonl").read_text().splitlines()]
    truth = [tuple(Finding(f["name"].replace("_", " "), f["side"] or "") for f in row["findings"]) for row in rows]
    phrases = lexicon([replace(REAL[0], findings=t) for t in truth])
    for row, findings in zip(rows, truth):
        assert set(read_findings(row["text"], phrases)) == set(findings), row["text"]


def test_read_term_on_all_wordings_of_mednist():
    if not (SHARED / "mednist").is_dir():
        pytest.skip("no sample data")
    rows = [json.loads(line) for split in ("train", "test")
            for line in (SHARED / "mednist" / split / "metadata.jsonl").read_text().splitlines()]
    for text, modality, body_part in {(r["text"], r["modality"], r["body_part"]) for r in rows}:
        assert read_term(text, MODALITY_PHRASES) == modality, text
        assert read_term(text, BODY_PHRASES) == body_part, text


def test_a_statement_is_about_findings_not_about_words():
    """Without phrases it is about modality and body part; without these, about words."""
    assert statement_of("Left effusion. No nodule.", PHRASES) == statement_of("THERE IS A LEFT EFFUSION.", PHRASES)
    assert statement_of("Left effusion.", PHRASES) != statement_of("Right effusion.", PHRASES)
    assert statement_of("Normal.", PHRASES) == statement_of("No effusion.", PHRASES) == frozenset()
    assert statement_of("A chest CT.", {}) == statement_of("CT of the chest", {}) != statement_of("MRI of the chest", {})
    assert statement_of("One.", {}) != statement_of("Two.", {})


@pytest.mark.parametrize("text,expected", [("X-ray image of the hand.", "radiograph"), ("Head CT image.", "CT"),
                                           ("A factory.", ""), ("CT after MRI", "CT")])
def test_read_term_by_hand(text, expected):
    assert read_term(text, MODALITY_PHRASES) == expected


def test_match_findings_by_hand():
    """One right with a wrong size, one on the wrong side (hallucination and laterality error), one invented."""
    stated = (Finding("effusion", "left", "small"), Finding("nodule", "right"), Finding("infarct", "left"))
    true = (Finding("effusion", "left", "large"), Finding("nodule", "left"), Finding("cardiomegaly"))
    assert match_findings(stated, true) == {"stated": 3, "true": 3, "right": 1, "hallucinated": 2, "laterality": 1,
                                            "exact": False}


def test_match_findings_of_equal_and_of_empty_reports():
    one = (Finding("effusion", "left", "small"),)
    assert match_findings(one, one) == {"stated": 1, "true": 1, "right": 1, "hallucinated": 0, "laterality": 0,
                                        "exact": True}
    assert match_findings((), one)["right"] == 0 and match_findings((), one)["hallucinated"] == 0
    assert match_findings((), ())["exact"]


# ---- Distortions ---------------------------------------------------------------------------------

GRAY = phantom_record(spec_with("chest radiograph", "effusion", "left", size="large"))
COLOUR = replace(GRAY, image=np.stack([GRAY.image, GRAY.image // 2, 255 - GRAY.image], axis=2), spec=None)
REAL_GRAY = replace(GRAY, spec=None)
OTHER = Record(np.full((64, 64), 7, np.uint8), "Other.", "other")


@pytest.mark.parametrize("image", [GRAY.image, COLOUR.image, GRAY.image[:45, :61]], ids=["gray", "rgb", "odd"])
@pytest.mark.parametrize("name", PIXEL_DISTORTIONS)
def test_a_pixel_distortion_is_deterministic_changes_the_image_and_keeps_its_form(name, image):
    before = image.copy()
    one, two = (PIXEL_DISTORTIONS[name](image, rng(1), 500) for _ in range(2))
    assert np.array_equal(one, two) and np.array_equal(image, before)
    assert one.shape == image.shape and one.dtype == np.uint8
    assert (one != image).mean() > 0.05


@pytest.mark.parametrize("name", ["noise", "blur", "contrast", "shuffle", "cutout", "crop"])
def test_chance_of_a_distortion_comes_from_its_rng(name):
    assert len({PIXEL_DISTORTIONS[name](GRAY.image, rng(s), 500).tobytes() for s in range(6)}) > 1


@pytest.mark.parametrize("t", [1, 250, 500, 750, 1000])
def test_noise_correlates_as_the_forward_process_says(t):
    """x' and x correlate at √ᾱ·s/√(ᾱ·s² + 1 − ᾱ), s the deviation of x; small s keeps it off the clipping."""
    alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:t])
    x = rng(5).normal(127.5, 127.5 / 4, (400, 400)).clip(0, 255).astype(np.uint8)
    s2 = (x / 127.5).var()
    expected = np.sqrt(alpha_bar * s2 / (alpha_bar * s2 + 1 - alpha_bar))
    actual = np.corrcoef(x.ravel(), add_noise(x, rng(6), t).ravel())[0, 1]
    assert abs(actual - expected) < 0.05                 # clipping at 0 and 255 costs a little
    assert t != 1 or actual > 0.99
    assert t != 1000 or abs(actual) < 0.02


def test_noise_at_step_one_moves_pixels_by_about_one_level():
    moved = add_noise(np.full((200, 200), 127, np.uint8), rng(), 1).astype(float) - 127
    assert abs(moved.std() - 0.01 * 127.5) < 0.1         # √(1 − ᾱ₁) = √1e-4 = 0.01 of half the range


def test_a_twins_report_differs_from_the_genuine_one_in_the_changed_finding_alone():
    """What the genuine report denies its twin denies too, but for a finding that was put in."""
    records, denials = Phantoms("train", 300), 0
    for index, record in enumerate(records):
        twin = distort(records[index], records, ("remove", "add")[index % 2], 0, rng(index))
        sentences = lambda text: {x.strip(". ") for x in text.split(". ")} - {x.strip(".") for x in data.NORMAL[record.spec.modality]}
        one, two = sentences(record.text), sentences(twin.text)
        denied, denied_there = ({x for x in stated if x.startswith("No ")} for stated in (one, two))
        denials += len(denied & denied_there)
        assert twin.kind != "remove" or denied_there in (denied, set())
        assert twin.kind == "other" or len((one ^ two) - denied - denied_there) == 1, (record.text, twin.text)
    assert denials > 20


def test_flip_twice_is_the_identity_and_once_mirrors_columns():
    once = flip(COLOUR.image, rng(), 1)
    assert np.array_equal(once[:, 0], COLOUR.image[:, -1])
    assert np.array_equal(flip(once, rng(), 1), COLOUR.image)


def test_invert_contrast_and_cutout_by_hand():
    image = np.zeros((8, 8), np.uint8)
    image[:, 4:] = 200
    assert np.array_equal(data.invert(image, rng(), 1), 255 - image)
    low = data.lower_contrast(image, rng(), 1).astype(int)
    assert abs(low.mean() - 100) < 1 and 40 <= low.max() - low.min() <= 80
    assert (data.cut_out(image + 1, rng(), 1) == 0).sum() == 16


def test_shuffled_patches_are_the_same_patches():
    def patches(image):
        return Counter(image[y:y + 16, x:x + 16].tobytes() for y in range(0, 64, 16) for x in range(0, 64, 16))
    assert patches(data.shuffle_patches(GRAY.image, rng(), 1)) == patches(GRAY.image)


def test_crop_enlarges_a_window_of_a_fifth_of_the_area():
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 64, axis=0)
    cropped = data.crop(ramp, rng(), 1).astype(int)
    assert 100 < cropped.max() - cropped.min() < 125       # √0.2 of the range 0..252


def test_a_crop_may_lie_anywhere():
    rows = np.repeat(np.arange(64, dtype=np.uint8)[:, None], 64, axis=1)
    for ramp in (rows, rows.T):
        crops = [data.crop(ramp, np.random.default_rng(i), 1) for i in range(200)]
        assert min(c.min() for c in crops) < 2 and max(c.max() for c in crops) > 61


def test_erase_fills_with_the_median_around():
    image, mask = np.full((20, 20, 3), (10, 20, 30), np.uint8), np.zeros((20, 20), bool)
    mask[5:9, 5:9] = True
    image[mask] = 255
    assert (erase(image, mask) == (10, 20, 30)).all()
    assert (erase(image, np.ones((20, 20), bool)) == 0).all()


@pytest.mark.parametrize("record", [REAL_GRAY, COLOUR], ids=["gray", "rgb"])
@pytest.mark.parametrize("kind", ["region-noise", "remove"])
def test_region_kinds_touch_only_the_mask_of_a_real_record(record, kind):
    image, used, *_ = distort(record, [record, OTHER], kind, 900, rng())
    changed = (image != record.image).reshape(64, 64, -1).any(axis=2)
    mask = record.masks["effusion"]
    assert used == kind and image.shape == record.image.shape and image.dtype == np.uint8
    assert changed[mask].mean() > 0.5 and not changed[~mask].any()


def test_remove_add_and_mirror_of_a_phantom_are_redrawn():
    without = draw(replace(GRAY.spec, findings=()))[0]
    across = draw(replace(GRAY.spec, findings=(Finding("effusion", "right", "large"),)))[0]
    for kind, expected in (("remove", without), ("mirror", across)):
        image, used, *_ = distort(GRAY, [GRAY, OTHER], kind, 500, rng())
        assert used == kind and np.array_equal(image, expected)
    image, used, *_ = distort(GRAY, [GRAY, OTHER], "add", 500, rng(3))
    assert used == "add" and np.array_equal(image, draw(redraw(GRAY.spec, "add", rng(3)))[0])


NORMAL = phantom_record(Spec(0, "test", 2, "head CT", ()))
FULL = phantom_record(replace(NORMAL.spec, findings=tuple(
    random_finding(n, k, rng()) for n, k in MODALITIES["head CT"].items())))
UNSIDED = phantom_record(spec_with("head CT", "hydrocephalus"))
BARE = replace(REAL_GRAY, findings=None, masks={})


@pytest.mark.parametrize("record,kind,used", [
    (NORMAL, "remove", "add"), (NORMAL, "mirror", "add"), (UNSIDED, "mirror", "add"), (FULL, "add", "other"),
    (NORMAL, "region-noise", "noise"), (BARE, "region-noise", "noise"), (BARE, "remove", "other"),
    (BARE, "add", "other"), (BARE, "mirror", "other"), (REAL_GRAY, "mirror", "mirror"), (GRAY, "other", "other")])
def test_what_a_record_cannot_take_falls_back(record, kind, used):
    image, actual, *_ = distort(record, [record, OTHER], kind, 500, rng())
    assert actual == used
    if used == "other":
        assert np.array_equal(image, OTHER.image)
    if used == "mirror":
        assert np.array_equal(image, record.image[:, ::-1])


def test_region_noise_covers_the_masks_of_all_findings_and_nothing_else():
    image, kind, *_ = distort(FULL, [FULL, OTHER], "region-noise", 900, rng())
    changed, masks = image != FULL.image, [FULL.masks[f.name] for f in FULL.findings if f.name in FULL.masks]
    assert kind == "region-noise" and len(masks) > 1 and all(changed[mask].mean() > 0.5 for mask in masks)
    assert not changed[~np.any(masks, axis=0)].any()


def test_region_noise_asks_for_a_region_where_no_finding_has_a_mask():
    """The caller's region bounds the noise; where it finds none, noise is everywhere, and the kind says so."""
    corner = np.zeros((64, 64), bool)
    corner[:16, :16] = True
    image, kind, *_ = distort(BARE, [BARE, OTHER], "region-noise", 900, rng(), lambda: corner)
    changed = image != BARE.image
    assert kind == "model-region-noise" and changed[corner].mean() > 0.5 and not changed[~corner].any()
    image, kind, *_ = distort(BARE, [BARE, OTHER], "region-noise", 900, rng(), lambda: None)
    assert kind == "noise" and (image != BARE.image)[~corner].mean() > 0.5
    # a finding's own mask comes first
    assert distort(GRAY, [GRAY, OTHER], "region-noise", 900, rng(), lambda: corner)[1] == "region-noise"


def test_other_is_never_the_record_itself_and_any_other_record():
    records = [replace(OTHER, image=np.full((64, 64), i, np.uint8), text=f"No. {i}") for i in range(4)]
    assert {int(distort(records[2], records, "other", 1, rng(s)).image[0, 0]) for s in range(40)} == {0, 1, 3}


def test_a_lone_record_has_no_other_nor_one_among_its_like():
    """Another image of which the same is stated contradicts nothing."""
    assert distort(OTHER, [OTHER], "other", 1, rng()) [:2] == (None, "other")
    assert distort(GRAY, [GRAY, replace(GRAY, text="In other words.")], "other", 1, rng()) [:2] == (None, "other")
    unknown = replace(OTHER, findings=None)
    assert distort(unknown, [unknown, unknown], "other", 1, rng()) [:2] == (None, "other")
    assert distort(unknown, [unknown, replace(unknown, text="Else.")], "other", 1, rng())[0] is not None


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_distort_is_deterministic_and_differs_from_the_record(kind):
    records = [GRAY, NORMAL, OTHER]
    (one, kind_one, *_), (two, kind_two, *_) = (distort(records[0], records, kind, 500, rng(7)) for _ in range(2))
    assert kind_one == kind_two and np.array_equal(one, two)
    assert one.shape == GRAY.image.shape and one.dtype == np.uint8 and not np.array_equal(one, GRAY.image)


# ---- Questions that a record and its twin answer differently -------------------------------------


@pytest.mark.parametrize("change, before, after, question, answers", [
    ("remove", "left", None, "nodule", ("Yes.", "No.")), ("add", None, "left", "nodule", ("No.", "Yes.")),
    ("mirror", "left", "right", "On which side is the nodule?", ("Left.", "Right."))])
def test_a_changed_finding_is_asked_for(change, before, after, question, answers):
    spec = phantom_spec(0, "test", 0, 0, modalities=1)
    one, two = (replace(spec, findings=(Finding("nodule", side, "", "lower"),) if side else ()) for side in (before, after))
    asked, said = ask_difference(one, two, rng())
    assert question in asked and said == answers


def test_real_records_are_asked_in_their_own_words():
    record = replace(OTHER, questions=(("Where is it?", "Left."), ("Any nodules?", "Yes, one."), ("Which part?", "Hand.")))
    assert ask_removed(record, "nodule") == ("Any nodules?", ("Yes, one.", "No."))
    assert ask_removed(record, "effusion") == ()
    another = replace(OTHER, questions=(("Where is it?", "Left."), ("Which part?", "Head.")))
    assert ask_both(record, another) == ("Which part?", ("Hand.", "Head.")) and ask_both(record, record) == ()


def test_records_without_text_differ_in_what_is_asked():
    asked = lambda answer, text="": replace(OTHER, text=text, findings=None, questions=(("Where?", answer),))
    assert not data.same_statement(asked("Left."), asked("Right.")) and data.same_statement(asked("Left."), asked("Left."))
    assert data.same_statement(asked("Left.", "Hand."), asked("Right.", "Hand."))
    twin = distort(asked("Left."), [asked("Left."), asked("Right.")], "remove", 500, rng())
    assert twin.kind == "other" and (twin.question, twin.answers) == ("Where?", ("Left.", "Right."))
