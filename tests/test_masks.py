"""The experiment with few masks: its folder, its flags, its table."""

import numpy as np
import pytest

import dpo
from data import Phantoms, names_and_sides, read_folder
from tests import masks


def test_the_folder_holds_the_phantoms_and_masks_of_the_first_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "LABELLED", 2)
    masks.write_folder(tmp_path / "few", 3, 32, (("train", 4), ("validation", 2), ("test", 2)))
    splits = read_folder(tmp_path / "few", 32, 1)
    train, drawn = list(splits["train"]), list(Phantoms("train", 4, 3, 0.9, 32, 1))
    assert [bool(r.masks) for r in train] == [True, True, False, False] and all(r.masks for s in ("val", "test") for r in splits[s])
    for record, phantom in zip(train, drawn):
        assert np.array_equal(record.image, phantom.image) and record.text == phantom.text
        assert names_and_sides(record.findings) == names_and_sides(phantom.findings)
        assert all(np.array_equal(record.masks[name.replace("_", " ")], phantom.masks[name]) for name in record.masks)


@pytest.mark.parametrize("name", masks.RECIPES)
def test_every_recipe_has_the_mask_term_alone_or_sft_on_masks(name):
    cfg = masks.config_of(["--image-weight", "0", *masks.RECIPES[name].format(matched=0.5).split()])
    loss = name.split(",")[0]
    assert cfg.objective == ("rndpo" if loss in ("rndpo", "dpo") else "sft") and cfg.rehearsal_weight == 1
    assert (cfg.mask_weight, cfg.image_weight, cfg.sft_weight) == (1, 0, loss == "sft")
    assert loss in ("control", "labelled") or f"{loss}, {cfg.mining}, judge {cfg.judge_noise:g}" == name
    assert cfg.normalise == (loss == "rndpo") and cfg.beta == (0.5 if loss == "dpo" else 5 if loss == "rndpo" else cfg.beta)


def test_a_run_learns_from_the_masks_that_the_judge_ranks_first(tmp_path, monkeypatch):
    flags = ["--preset", "tiny", "--out", str(tmp_path), "--steps", "2", "--save-every", "1", "--objective"]
    trained, sequences_of = [], dpo.sequences_of
    monkeypatch.setattr(dpo, "sequences_of", lambda cfg: trained.append(sequences_of(cfg)) or trained[-1])
    measured = [masks.train_measured([*flags, *recipe.split(), "--name", name], lambda model: sum(p.sum().item() for p in model.parameters()))
                for name, recipe in (("a", "rndpo --image-weight 0 --sft-weight 0"), ("b", "sft --sft-weight 1"))]
    assert [list(found) for found in measured] == [[1, 2], [1, 2]]
    assert trained[1] == ("mask_chosen",) and "text_chosen" not in trained[0]
    assert dpo.CHOSEN == ("text_chosen", "image_chosen")                           # as before
    cfg = masks.config_of([*flags, "rndpo"])
    pairs = dpo.read_pairs(tmp_path / "pairs", 2 ** 15)
    dpo.set_responses(pairs, cfg)
    omega = [int((p.masks[0] != p.masks[1]).sum()) for p in pairs]
    assert masks.mean_omega(cfg) == pytest.approx(sum(omega) / sum(n > 0 for n in omega))


def test_rehearsal_of_masks_alone_is_of_the_labelled(tmp_path, monkeypatch):
    seen, rehearsal_batch = [], dpo.rehearsal_batch
    monkeypatch.setattr(dpo, "rehearsal_batch", lambda studies, *rest: seen.append(studies) or rehearsal_batch(studies, *rest))
    monkeypatch.setattr(masks, "LABELLED", 5)
    masks.write_folder(tmp_path / "few", 3, 32, (("train", 40), ("validation", 4), ("test", 4)))
    flags = ["--preset", "tiny", "--data", str(tmp_path / "few"), "--out", str(tmp_path / "out"), "--steps", "2", "--distort", "other",
             *masks.RECIPES["labelled"].split(), "--name", "a"]
    masks.train_measured(flags, lambda model: 0, masks.MASKS_ALONE)
    assert {len(studies) for studies in seen} == {5} and dpo.REHEARSAL["ask"] > 0


def test_the_table_by_hand():
    d = lambda value, low, high: {"value": value, "low": low, "high": high}
    units = {s: {name: {"dice": {"25": 0.7 + s / 10, "150": 0.6}, "to_start": d(-0.1, -0.2, -0.05), "to_control": d(0.1, -0.1, 0.2),
                        "to_rndpo": d(0.2, 0.1, 0.3)} for name in masks.RECIPES} for s in (0, 1)}
    lines = masks.table(units).splitlines()
    assert len(lines) == 2 + len(masks.RECIPES)
    assert lines[2] == "| control | 0.750 | 0.600 | 0.150 | **-0.100** **-0.100** | - | - |"
    assert lines[3].endswith("| 0.750 | 0.600 | 0.150 | **-0.100** **-0.100** | +0.100 +0.100 | - |") and lines[3].startswith("| labelled")
    assert lines[5].endswith("| +0.100 +0.100 | **+0.200** **+0.200** |") and lines[5].startswith("| dpo")
