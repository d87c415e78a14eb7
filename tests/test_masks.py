"""The experiment with few masks: its folder, its flags, its table."""

import numpy as np
import pytest

import dpo
from data import Phantoms, names_and_sides, read_folder
from model import cli
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
def test_every_recipe_has_the_mask_term_alone(name):
    flags = ["--image-weight", "0", "--sft-weight", "0", *masks.RECIPES[name].format(matched=0.5).split()]
    cfg = cli(dpo.DPOConfig, dpo.PRESETS, flags, None, ("objective", dpo.OBJECTIVE_DEFAULTS))
    terms = {} if cfg.objective == "sft" else {"mask": cfg.mask_weight, "image": cfg.image_weight}
    assert terms in ({}, {"mask": 1.0, "image": 0}) and cfg.sft_weight == 0 and cfg.rehearsal_weight == 1
    assert cfg.normalise == name.startswith("rndpo")


def test_the_table_by_hand():
    d = lambda value, low, high: {"value": value, "low": low, "high": high}
    units = {s: {name: {"dice": {"25": 0.7 + s / 10, "150": 0.6}, "to_start": d(-0.1, -0.2, -0.05), "to_control": d(0.1, -0.1, 0.2)}
                 for name in masks.RECIPES} for s in (0, 1)}
    lines = masks.table(units).splitlines()
    assert len(lines) == 2 + len(masks.RECIPES)
    assert lines[2] == "| control | 0.750 | 0.600 | 0.150 | **-0.100** **-0.100** | - |"
    assert lines[3].endswith("| 0.750 | 0.600 | 0.150 | **-0.100** **-0.100** | +0.100 +0.100 |")
