"""Folder readers of data.py: three layouts made here, then hostile rows, then the sample data where it is present.

What is said of a row that is skipped is held to its file, its number and its name, not to its words."""

import csv
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import BadRow, Finding, Record, fill_splits, fingerprint, names_and_sides, read_folder, read_image, read_mask
from model import UserError

SHARED = Path(data.__file__).resolve().parent.parent / "shared" / "data"


def picture(path, value=None, size=(40, 40), mode="L", **options):
    """An image file: of one gray value, or of noise that the file's name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 256, size[::-1], dtype=np.uint8)
    image = Image.fromarray(noise) if value is None else Image.new("L", size, value)
    image.convert(mode).save(path, **options)
    return path


def image_folder(root, rows, split="train", good=5):
    """ImageFolder with metadata.jsonl: `good` ordinary rows with images i0.png …, then `rows` (dicts or raw lines)."""
    folder = root / split
    ordinary = [{"file_name": picture(folder / f"i{i}.png").name, "text": f"Good {i}."} for i in range(good)]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in [*ordinary, *rows]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def rows_of(splits):
    """All records of all splits by text."""
    return {r.text: r for records in splits.values() for r in records}


def rows_of_names(splits):
    """All records of all splits as a list."""
    return [r for records in splits.values() for r in records]


def messages(capsys):
    """Lines printed, without progress bars and sizes of splits: one a skipped row, then the counts."""
    return [line for line in capsys.readouterr().out.splitlines() if "skipped" in line and " train, " not in line]


def check_subjects(splits):
    """No split is empty, and no subject is in two."""
    subjects = [{r.subject for r in splits[s]} for s in ("train", "val", "test")]
    assert all(subjects) and sum(map(len, subjects)) == len(set.union(*subjects))


# ---- ImageFolder ---------------------------------------------------------------------------------


def test_imagefolder_jsonl(tmp_path):
    picture(tmp_path / "train" / "a.png", 90)
    image_folder(tmp_path, [{"file_name": "a.png", "text": " One\n two. ", "modality": "CT", "body_part": "head",
                             "patient_id": 7, "questions": [{"question": "Q?", "answer": "A."}]}])
    record = rows_of(read_folder(tmp_path, 32, 1))["One two."]
    assert record.image.shape == (32, 32) and record.image.dtype == np.uint8 and (record.image == 90).all()
    assert (record.name, record.modality, record.body_part, record.subject) == ("a.png", "CT", "head", "7")
    assert record.questions == (("Q?", "A."),) and record.findings is None and record.masks == {}


def test_imagefolder_csv_with_quotes_and_findings_in_a_cell(tmp_path):
    for i in range(4):
        picture(tmp_path / "train" / f"{i}.png")
    with open(tmp_path / "train" / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "findings"])
        writer.writerow(["0.png", 'Says "yes",\nthen more.', '[{"name": "pleural_effusion", "side": "left"}]'])
        writer.writerows([f"{i}.png", f"Text {i}.", ""] for i in (1, 2, 3))
    record = rows_of(read_folder(tmp_path, 32, 1))['Says "yes", then more.']
    assert record.findings == (Finding("pleural effusion", "left"),)


def test_masks_and_findings(tmp_path):
    picture(tmp_path / "train" / "m" / "left.png", 255, (20, 40))
    picture(tmp_path / "train" / "a.png", 10, (20, 40))
    image_folder(tmp_path, [{"file_name": "a.png", "text": "Found.", "masks": {"left_lung": "m/left.png"},
                             "findings": [{"name": "pleural_effusion", "side": "left"}, {"name": "tubing", "side": None}]}])
    record = rows_of(read_folder(tmp_path, 40, 1))["Found."]
    assert record.findings == (Finding("pleural effusion", "left"), Finding("tubing"))
    expected = np.zeros((40, 40), bool)
    expected[:, 10:30] = True                                # padded like the image
    assert np.array_equal(record.masks["left lung"], expected)
    assert np.array_equal(record.image == 10, expected)


@pytest.mark.parametrize("top", [1, 38, 255])
@pytest.mark.parametrize("shape", [(20, 40), (41, 81)])
def test_a_mask_is_what_is_brighter_than_half_of_its_brightest(tmp_path, top, shape):
    """Masks of 0 and 1 too; and of another size in the image's shape, to a pixel."""
    picture(tmp_path / "train/a.png", 10, (20, 40))
    half = np.zeros(shape[::-1], np.uint8)
    half[:shape[1] // 2] = top
    half[-shape[1] // 4:] = top // 3                         # darker than half of the brightest
    for name, values in (("half", half), ("none", half * 0)):
        Image.fromarray(values).save(tmp_path / f"train/{name}.png")
    image_folder(tmp_path, [{"file_name": "a.png", "text": "Found.", "masks": {"half": "half.png", "none": "none.png"}}])
    masks = rows_of(read_folder(tmp_path, 40, 1))["Found."].masks
    assert masks["half"][:20, 10:30].all() and not masks["half"][21:].any() and not masks["none"].any()


def test_a_map_of_several_labels_is_no_mask(tmp_path):
    """0, 1 and 2, as tools for labelling write them: the brightest alone would count."""
    Image.fromarray(np.arange(3, dtype=np.uint8).repeat(300).reshape(30, 30)).save(tmp_path / "m.png")
    with pytest.raises(BadRow, match="mask m.png: the labels of several structures"):
        read_mask(tmp_path / "m.png", 32, Image.new("L", (30, 30)))


def test_a_mask_of_the_size_its_image_had_before_it_was_scaled_down_fits(tmp_path):
    """64x78 is what becomes of 2048x2500: to a pixel of the image, not of the mask."""
    mask = picture(tmp_path / "m.png", 255, (2048, 2500))
    assert read_mask(mask, 32, Image.new("L", (64, 78))).any()


@pytest.mark.parametrize("size,why", [((40, 20), "40x20 pixels, in another shape than its image's 20x40"),
                                      ((20, 43), "20x43 pixels, in another shape"), ((9, 18), "9x18 pixels; the shorter side")])
def test_a_mask_that_does_not_fit_its_image_is_named(tmp_path, capsys, size, why):
    picture(tmp_path / "train/a.png", 10, (20, 40))
    picture(tmp_path / "train/m.png", 255, size)
    image_folder(tmp_path, [{"file_name": "a.png", "text": "Found.", "masks": {"heart": "m.png"}}])
    assert "Found." not in rows_of(read_folder(tmp_path, 40, 1))
    assert f"row 6 (a.png): mask m.png: {why}" in messages(capsys)[0]


def test_a_csv_without_its_columns_is_named(tmp_path):
    """As a spreadsheet writes it with semicolons, or in UTF-16."""
    picture(tmp_path / "train/0.png")
    for encoding, line in (("utf-8", "file_name;text"), ("utf-16", "file_name,text")):
        (tmp_path / "train/metadata.csv").write_text(f"{line}\n0.png;T.\n", encoding=encoding)
        with pytest.raises(UserError, match="metadata.csv has no column file_name .*commas.*UTF-8"):
            read_folder.__wrapped__(tmp_path, 32, 1)


def test_letters_that_are_not_utf_8_are_told(tmp_path, capsys):
    file = image_folder(tmp_path, [{"file_name": "i0.png", "text": "Ödem links."}]) / "train" / "metadata.jsonl"
    file.write_bytes(file.read_bytes().replace(b"\\u00d6", "Ö".encode("cp1252")))
    assert "\ufffddem links." in rows_of(read_folder(tmp_path, 16, 1))
    assert "6 read, 0 skipped; 1 texts hold letters that are not UTF-8" in messages(capsys)[-1]


def test_the_same_rows_in_two_forms_are_read_once(tmp_path, capsys):
    folder = image_folder(tmp_path, [])
    (folder / "train/metadata.csv").write_text("file_name,text\ni0.png,Good 0.\n")
    splits, said = read_folder(folder, 32, 1), capsys.readouterr().out
    assert len(rows_of_names(splits)) == 5 and f"{folder}: 3 train, 1 val, 1 test" in said and "metadata.csv is passed over" in said


def test_values_below_0_are_refused_and_not_shown_black(tmp_path):
    """Hounsfield units, say."""
    (tmp_path / "train").mkdir()
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.linspace(-1000, 500, 1600).reshape(40, 40).astype(dtype)).save(tmp_path / "train/a.tiff")
        with pytest.raises(BadRow, match="values below 0"):
            read_image(tmp_path / "train/a.tiff", 32, 1)


def test_a_patient_without_a_name_is_nobody(tmp_path):
    """NaN, as pandas writes what is missing; 7.0, " 7 " and 7 are one patient."""
    ids = ["7", "7.0", '" 7 "', '"1.2.0"', "NaN"]
    rows = [f'{{"file_name": "i{i}.png", "text": "T.", "patient_id": NaN, "subject_id": {ids[i]}}}' for i in range(5)]
    splits = read_folder(image_folder(tmp_path, rows), 32, 1)
    assert {r.subject for r in rows_of_names(splits) if r.text == "T."} == {"7", "1.2.0", "i4.png"}


def test_questions_and_answers_may_be_numbers_and_odd_ones_are_told(tmp_path, capsys):
    data.say_once.cache_clear()
    answers = {"How many?": 2, "None?": 0, "Any?": False, "Why?": "", "Where?": ["left"], "When?": float("nan"), "Who?": None}
    rows = [{"file_name": "i0.png", "text": "One.", "questions": [{"question": q, "answer": a} for q, a in answers.items()]},
            {"file_name": "i1.png", "text": "Two.", "questions": [{"q": "Q?", "a": "A."}, {"question": "Which?", "answer": "A."}]}]
    records = rows_of(read_folder(image_folder(tmp_path, rows[:1]), 32, 1))
    assert records["One."].questions == (("How many?", "2"), ("None?", "0"), ("Any?", "False"))
    assert "left out" not in capsys.readouterr().out
    read_folder.cache_clear()
    assert rows_of(read_folder(image_folder(tmp_path, rows), 32, 1))["Two."].questions == (("Which?", "A."),)
    assert 'what in `questions` is no {"question", "answer"} is left out' in capsys.readouterr().out
    rows[1]["questions"] = {"question": "Q?", "answer": "A."}
    read_folder.cache_clear()
    assert rows_of(read_folder(image_folder(tmp_path, rows), 32, 1))["Two."].questions == ()


def test_an_empty_list_of_findings_is_known_to_be_none(tmp_path):
    rows = [{"file_name": "i0.png", "text": "N.", "findings": []},
            {"file_name": "i0.png", "text": "M.", "findings": [{"name": "No_Finding"}, {"name": "nodule"}]}]
    records = rows_of(read_folder(image_folder(tmp_path, rows), 32, 1))
    assert records["N."].findings == () and records["Good 0."].findings is None and records["M."].findings == (Finding("nodule"),)


def test_a_row_with_questions_needs_no_text(tmp_path):
    row = {"file_name": "i0.png", "questions": [{"question": "Q?", "answer": "A."}]}
    assert rows_of(read_folder(image_folder(tmp_path, [row]), 32, 1))[""].questions == (("Q?", "A."),)


def test_three_channels(tmp_path):
    Image.new("RGB", (40, 40), (200, 100, 50)).save(picture(tmp_path / "train" / "c.png"))
    image_folder(tmp_path, [{"file_name": "c.png", "text": "Colour."}])
    records = rows_of(read_folder(tmp_path, 32, 3))
    assert records["Colour."].image.shape == (32, 32, 3) and (records["Colour."].image[5, 5] == (200, 100, 50)).all()
    assert records["Good 0."].image.shape == (32, 32, 3)


def test_patient_0_is_a_patient_like_others(tmp_path):
    for i in range(20):
        picture(tmp_path / "train" / f"i{i}.png", 10 + i)
    rows = [{"file_name": f"i{i}.png", "text": "T.", "patient_id": i // 4} for i in range(20)]
    splits = read_folder(image_folder(tmp_path, rows, good=0), 32, 1)
    check_subjects(splits)
    assert sum(r.subject == "0" for s in splits.values() for r in s) == 4


@pytest.mark.parametrize("name,split", [("val", "val"), ("validation", "val"), ("validate", "val"), ("dev", "val"), ("Test", "test")])
def test_folder_names_are_splits(tmp_path, name, split):
    image_folder(tmp_path, [])
    picture(tmp_path / name / "x.png")
    image_folder(tmp_path, [{"file_name": "x.png", "text": "Held out."}], name, good=0)
    assert [r.text for r in read_folder(tmp_path, 32, 1)[split]] == ["Held out."]


# ---- ROCOv2 --------------------------------------------------------------------------------------


def test_rocov2(tmp_path):
    for name, ids in (("train", ("a", "b", "c", "d")), ("valid", ("e",)), ("test", ("f",))):
        with open(tmp_path / f"{name}_captions.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["ID", "Caption"])
            for i in ids:
                picture(tmp_path / name / f"{i}.{'png' if i == 'b' else 'jpg'}")
                writer.writerow([i, f'The "{i}", with\na naïve break.'])
    (tmp_path / "train_credits.csv").write_text("ID,Licence\na,free\n")
    splits = read_folder(tmp_path, 32, 1)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [4, 1, 1]
    assert [r.name for r in splits["train"]] == ["a.jpg", "b.png", "c.jpg", "d.jpg"]
    assert splits["train"][0].text == 'The "a", with a naïve break.'


def test_rocov2_names_the_id_whose_image_is_missing(tmp_path, capsys):
    for i in "abc":
        picture(tmp_path / "train" / f"{i}.jpg")
    (tmp_path / "train_captions.csv").write_text("ID,Caption\na,A.\nb,B.\nc,C.\ngone,G.\n../../x,X.\n")
    read_folder(tmp_path, 32, 1)
    one, two, _ = messages(capsys)
    assert "train_captions.csv row 5 (gone.jpg)" in one and "row 6 (../../x.jpg)" in two


@pytest.mark.parametrize("name", ["a" * 5000, "nul\0byte", ""])
def test_rocov2_odd_ids_are_skipped(tmp_path, capsys, name):
    for i in "abc":
        picture(tmp_path / "train" / f"{i}.jpg")
    (tmp_path / "train_captions.csv").write_text(f"ID,Caption\na,A.\nb,B.\nc,C.\n{name},X.\n")
    assert sum(map(len, read_folder(tmp_path, 32, 1).values())) == 3
    assert "3 read, 1 skipped" in messages(capsys)[-1]


# ---- LLaVA ---------------------------------------------------------------------------------------


def say(*values):
    """A conversation whose turns alternate between human and gpt."""
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def llava_folder(root, items, good=4):
    ordinary = [{"id": f"g{i}", "image": picture(root / "images" / f"g{i}.jpg").name,
                 "conversations": say("<image>\nDescribe this image.", f"Good {i}.")} for i in range(good)]
    (root / "instructions.json").write_text(json.dumps([*ordinary, *items]))
    return root


def test_llava_dialog_generate_report_and_question(tmp_path):
    for name in ("dialog", "make", "report", "ask"):
        picture(tmp_path / "images" / f"{name}.jpg")
    llava_folder(tmp_path, [
        {"image": "dialog.jpg", "conversations": say("<image>\nIs there a nodule?", "Yes.", "On which side?", "Left.")},
        {"image": "make.jpg", "conversations": say("Generate an image: Chest CT: normal.", "<image>")},
        {"image": "report.jpg", "conversations": say("Write the report.\n<image>", "All clear.")},
        {"image": "images/ask.jpg", "conversations": say("Which part?\n<image>", "The hand.", "Is a side in the report?", "No.",
                                                         "Please give a detailed description of the image.", "A hand.")}])
    records = {r.name: r for r in rows_of_names(read_folder(tmp_path, 32, 1))}
    assert records["dialog.jpg"].questions == (("Is there a nodule?", "Yes."),
                                               ("Is there a nodule? Yes. On which side?", "Left."))
    assert records["make.jpg"].text == "Chest CT: normal." and records["make.jpg"].questions == ()
    assert records["report.jpg"].text == "All clear."
    assert records["ask.jpg"].text == "A hand."
    assert records["ask.jpg"].questions == (("Which part?", "The hand."), ("Which part? The hand. Is a side in the report?", "No."))


@pytest.mark.parametrize("ask, asks_for_text", [
    ("Describe this image.", True), ("Write the report.", True), ("Can you describe it?", True), ("Give a short summary.", True),
    ("Is this a chest radiograph? Describe the findings.", True), ("Have a look at it and describe it.", True),
    ("Are you able to describe this image?", True), ("Write captions for the image.", True), ("Summarise the findings.", True),
    ("Is a device mentioned in the report?", False), ("Does it have a caption?", False), ("Which part?", False)])
def test_what_a_llava_turn_asks_for(ask, asks_for_text):
    row = data.turns(say(ask, "A hand.", "How would you describe its size?", "Large."))
    if asks_for_text:            # a second description is a question, not another report
        assert row["text"] == "A hand." and [q["answer"] for q in row["questions"]] == ["Large."]
    else:
        assert row["questions"][0] == {"question": ask, "answer": "A hand."}


def test_llava_items_of_one_image_stay_in_one_split(tmp_path):
    """The image is the subject, however its path is written: of a picture used twice neither item tells of the other's split."""
    items = [{"image": f"images/g{i}.jpg", "conversations": say("<image>\nWhich part?", f"Part {i}.")} for i in range(4)]
    splits = read_folder(llava_folder(tmp_path, items), 32, 1)
    names = [{r.name for r in splits[s]} for s in ("train", "val", "test")]
    assert sum(map(len, splits.values())) == 8 and sum(map(len, names)) == 4


@pytest.mark.parametrize("item", [
    {"image": "g0.jpg"}, {"image": "g0.jpg", "conversations": None}, {"image": "g0.jpg", "conversations": "hello"},
    {"image": "g0.jpg", "conversations": 3}, {"image": "g0.jpg", "conversations": {"from": "human"}},
    {"image": "g0.jpg", "conversations": []}, {"image": "g0.jpg", "conversations": [1, 2]},
    {"image": "g0.jpg", "conversations": say("Describe.")},
    {"image": "g0.jpg", "conversations": [{"from": "human"}, {"from": "gpt"}]},
    {"image": "g0.jpg", "conversations": say("Which part?", None)},
    {"image": "g0.jpg", "conversations": say("Which part?", ["The hand."])},
    {"image": "g0.jpg", "conversations": say("<image>", "")},
    {"image": None, "conversations": say("Which part?", "The hand.")},
    {"image": ["g0.jpg"], "conversations": say("Which part?", "The hand.")},
    {"conversations": say("Which part?", "The hand.")}, "text", None, 5, []])
def test_llava_odd_items_are_skipped_with_a_message(tmp_path, capsys, item):
    splits = read_folder(llava_folder(tmp_path, [item]), 32, 1)
    said = messages(capsys)
    assert sum(map(len, splits.values())) == 4
    assert "instructions.json row 5" in said[0] and "4 read, 1 skipped" in said[-1]


@pytest.mark.parametrize("conversations", [
    [{"from": "system", "value": "You are kind."}, *say("Which part?", "The hand.")],
    [{"from": "gpt", "value": "Hello."}, *say("Which part?", "The hand.")],
    say("Which part?", "The hand.", "And then?")])
def test_llava_an_answer_never_becomes_a_question(tmp_path, conversations):
    """With an odd number of turns the item is skipped, or its one real pair is kept."""
    folder = llava_folder(tmp_path, [{"image": "g0.jpg", "conversations": conversations}])
    assert {r.questions for r in rows_of_names(read_folder(folder, 32, 1))} <= {(), (("Which part?", "The hand."),)}


def test_a_json_file_that_is_not_json_is_a_user_error(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "x.json").write_text("[{")
    with pytest.raises(UserError, match="x.json"):
        read_folder(tmp_path, 32, 1)


# ---- Splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [("train",), ("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_no_subject_is_in_two_splits(tmp_path, given):
    """Patients A to T, and three of them in every split given."""
    for split in given:
        for subject in "ABCDEFGHIJKLMNOPQRST"[:20 if split == "train" else 3]:
            picture(tmp_path / split / f"{split}{subject}.png")
        rows = [{"file_name": p.name, "text": "T.", "patient_id": p.stem[-1]} for p in sorted((tmp_path / split).iterdir())]
        image_folder(tmp_path, rows, split, good=0)
    splits = read_folder(tmp_path, 32, 1)
    check_subjects(splits)


def records_of(subjects):
    return [Record(np.zeros((4, 4), np.uint8), "T.", subject, subject=subject) for subject in subjects]


@pytest.mark.parametrize("seen", ["test", "val"])
def test_a_missing_split_is_not_filled_with_subjects_of_the_other(seen):
    """Most training patients are in the given split too: the missing one must come from the rest."""
    splits = {"train": records_of("ABCDEFGHIJ"), "val": [], "test": []} | {seen: records_of("ABCDEFG")}
    check_subjects(fill_splits(splits, "folder"))


def test_no_training_row_left_is_a_user_error():
    with pytest.raises(UserError, match="--data folder"):
        fill_splits({"train": records_of("A"), "val": records_of("B"), "test": records_of("A")}, "folder")


def test_a_split_that_is_filled_is_the_same_every_time(tmp_path):
    first = read_folder(image_folder(tmp_path / "a", [], good=9), 32, 1)
    second = read_folder(image_folder(tmp_path / "b", [], good=9), 32, 1)
    assert [[r.name for r in first[s]] for s in first] == [[r.name for r in second[s]] for s in second]
    assert [len(first[s]) for s in ("train", "val", "test")] == [7, 1, 1]


@pytest.mark.parametrize("good", [1, 2])
def test_too_few_subjects_is_a_user_error(tmp_path, good):
    with pytest.raises(UserError, match=f"--data {tmp_path}: 1 "):    # of two, one is left for the second split
        read_folder(image_folder(tmp_path, [], good=good), 32, 1)


def test_a_photograph_that_says_it_lies_on_its_side_is_turned(tmp_path):
    """EXIF's orientation 6: the first row of the file is the right edge of the picture."""
    pixels = np.zeros((40, 40), np.uint8)
    pixels[:20] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    image = read_image(tmp_path / "x.png", 40, 1)
    assert image[:, 20:].min() == 200 and image[:, :20].max() == 0


def test_of_several_frames_the_first_is_taken_and_said_once(tmp_path, capsys):
    data.say_once.cache_clear()
    frames = [Image.new("L", (20, 20), value) for value in (50, 200)]
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert abs(int(read_image(tmp_path / name, 20, 1).mean()) - 50) < 3
    assert capsys.readouterr().out.count("frames") == 1


@pytest.mark.parametrize("field", ["findings", "masks", "questions"])
def test_json_nested_without_end_is_a_bad_row(tmp_path, capsys, field):
    row = {"file_name": "i0.png", "text": "T.", field: "[" * 100_000}
    assert len(rows_of_names(read_folder(image_folder(tmp_path, [row]), 32, 1))) == 5 + (field == "questions")
    assert len(messages(capsys)) == 1 + (field != "questions")          # no questions are no reason to skip a record


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["x.json", "train_captions.csv", "metadata.csv"])
def test_what_is_named_like_metadata_and_is_no_file_is_passed_over(tmp_path, make, name):
    make(tmp_path / name)
    with pytest.raises(UserError, match="no known layout"):
        read_folder(tmp_path, 32, 1)


def test_many_bad_rows_are_named_up_to_a_number_and_then_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "MOST_NAMED", 7)
    read_folder(image_folder(tmp_path, [{"file_name": "gone.png", "text": "T."}] * 30), 32, 1)
    said = messages(capsys)
    assert sum("gone.png" in line for line in said) == 7 and "30 skipped" in said[-1]


def test_pixels_are_read_when_asked_for_and_a_change_is_told(tmp_path):
    folder = image_folder(tmp_path, [], good=9)
    records = read_folder(folder, 32, 1)["train"]
    first, before = records[0].image, fingerprint(records)
    assert all(isinstance(r.image, Path) for r in records.rows) and fingerprint(records) == before
    Image.fromarray(255 - first).save(records.rows[0].image)
    assert np.array_equal(records[0].image, 255 - first) and fingerprint(records) != before
    records.rows[0].image.write_bytes(b"")
    with pytest.raises(UserError, match=f"{records.rows[0].name}.*empty"):
        records[0]


# ---- Folders that cannot be used -----------------------------------------------------------------


def test_a_missing_and_an_empty_folder_are_user_errors(tmp_path):
    for folder in (tmp_path / "gone", tmp_path):
        with pytest.raises(UserError, match=f"--data {folder}"):
            read_folder(folder, 32, 1)


def test_no_usable_row_is_a_user_error_that_counts_the_causes(tmp_path):
    rows = [{"file_name": "a.png", "text": "T."}, {"file_name": "b.png", "text": "T."}, {"file_name": "i.png", "text": ""}]
    with pytest.raises(UserError, match=rf"--data {tmp_path}: .*\(2 .*; 1 "):
        read_folder(image_folder(tmp_path, rows, good=0), 32, 1)


# ---- Hostile rows: each is skipped with one message, and reading goes on -------------------------

SKIPPED = {
    "a number for a name": {"file_name": 7, "text": "T."}, "no name": {"text": "T."},
    "null for a name": {"file_name": None, "text": "T."}, "a list for a name": {"file_name": ["i0.png"], "text": "T."},
    "an empty name": {"file_name": "", "text": "T."}, "the folder": {"file_name": ".", "text": "T."},
    "a missing file": {"file_name": "gone.png", "text": "T."}, "upwards": {"file_name": "../outside.png", "text": "T."},
    "down and up": {"file_name": "x/../../outside.png", "text": "T."},
    "a drive": {"file_name": "C:\\x.png", "text": "T."}, "a share": {"file_name": "\\\\host\\x.png", "text": "T."},
    "a null byte": {"file_name": "a\0b.png", "text": "T."}, "a long name": {"file_name": "a" * 5000 + ".png", "text": "T."},
    "half a character": {"file_name": "\ud800.png", "text": "T."},
    "a number for a text": {"file_name": "i0.png", "text": 5}, "a list for a text": {"file_name": "i0.png", "text": ["T."]},
    "an object for a text": {"file_name": "i0.png", "text": {"en": "T."}}, "blanks": {"file_name": "i0.png", "text": " \n"},
    "null for a text": {"file_name": "i0.png", "text": None}, "odd questions": {"file_name": "i0.png", "questions": 5},
    "a number for a mask": {"file_name": "i0.png", "text": "T.", "masks": {"a": 3}},
    "a mask outside": {"file_name": "i0.png", "text": "T.", "masks": {"a": "../outside.png"}},
    "a list": "[1, 2]", "a number": "5", "a string": '"text"', "null": "null", "half a row": '{"file_name": "i0.png", "te',
    "nested deeply": "[" * 100_000,
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_hostile_row_is_skipped_with_one_message(tmp_path, capsys, name):
    picture(tmp_path / "outside.png")
    image_folder(tmp_path, [SKIPPED[name], {"file_name": "i0.png", "text": "Last."}])
    splits = read_folder(tmp_path, 32, 1)
    said = messages(capsys)
    assert "Last." in rows_of(splits) and sum(map(len, splits.values())) == 6
    assert len(said) == 2 and "metadata.jsonl row 6" in said[0] and "6 read, 1 skipped" in said[1]


@pytest.mark.parametrize("odd", [
    {"masks": ["i1.png"]}, {"masks": "i1.png"}, {"findings": 3}, {"findings": ["effusion"]}, {"findings": [{"name": 4}]},
    {"findings": [{"name": ""}]}, {"findings": [{"name": "effusion", "side": ["left"]}]}, {"patient_id": ["p"]},
    {"patient_id": "\ud800"},
    {"modality": 3}, {"questions": [1, {"question": 2, "answer": 3}]},
    {"questions": [{"question": "Half \ud800?", "answer": "A."}]}, {"text": "A lone \ud800 surrogate."}])
def test_an_odd_field_gives_a_sound_record_or_a_skipped_row(tmp_path, odd):
    """Findings that cannot be read must not turn into "known to have none"; all must be countable and printable."""
    image_folder(tmp_path, [{"file_name": "i0.png", "text": "Odd.", **odd}])
    for record in rows_of_names(read_folder(tmp_path, 32, 1)):
        assert record.findings is None or names_and_sides(record.findings) == {("effusion", "")}
        assert all(isinstance(v, str) for v in (record.subject, record.modality, record.text))
        "".join([record.text, *sum(record.questions, ())]).encode()


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path, capsys):
    """U+2028 and U+0085 are legal inside a JSON string; only a newline ends a line of JSON lines."""
    image_folder(tmp_path, ['{"file_name": "i0.png", "text": "One\u2028two\u0085three."}'])
    assert "One two three." in rows_of(read_folder(tmp_path, 32, 1))
    assert messages(capsys)[0].count("0 skipped") == 1


def test_a_huge_csv_field_is_no_traceback(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    rows = "".join(f"{i}.png,Text {i}.\n" for i in range(4))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows + "0.png," + "a" * 200_000 + "\n")
    assert sum(map(len, read_folder(tmp_path, 32, 1).values())) in (4, 5)


@pytest.mark.parametrize("name, header", (("metadata.csv", "file_name,text"), ("metadata.csv", "file_name,text,"),
                                          ("train_captions.csv", "ID,Caption")))
def test_a_csv_row_with_more_cells_than_columns_is_named(tmp_path, capsys, name, header):
    """Its text would be cut at a comma. A comma at the end is no such thing, in a row or in the line of names."""
    for i in range(6):
        picture(tmp_path / ("train" if name != "metadata.csv" else "") / f"{i}.png")
    end = ".png" if name == "metadata.csv" else ""
    cells = ("Yes, left nodule.", '"Yes, left."', "Two.,", "Three., ", "Four.")
    (tmp_path / name).write_text("\n".join([header, *(f"{i}{end},{cell}" for i, cell in enumerate(cells)), f"5{end}"]))
    assert set(rows_of(read_folder(tmp_path, 32, 1))) == {"Yes, left.", "Two.", "Three.", "Four."}
    said = messages(capsys)
    assert "row 2" in said[0] and "more cells than columns" in said[0] and "the text is empty" in said[1] and "4 read, 2 skipped" in " ".join(said)


def test_the_index_that_pandas_writes_is_no_cell_too_many(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text(",file_name,text\n" + "".join(f"{i},{i}.png,Text {i}.\n" for i in range(4)))
    assert sum(map(len, read_folder(tmp_path, 32, 1).values())) == 4


def test_an_absolute_path_is_refused_also_where_it_exists(tmp_path, capsys):
    """A drive and a share are absolute too, whatever this machine's own paths look like."""
    picture(tmp_path / "train" / "C:x.png")
    paths = (str(picture(tmp_path / "train" / "real.png")), "C:x.png", "\\\\host\\x.png")
    splits = read_folder(image_folder(tmp_path, [{"file_name": p, "text": "T."} for p in paths]), 32, 1)
    assert "T." not in rows_of(splits)
    for path, line in zip(paths, messages(capsys)):
        assert f"({path})" in line


def test_a_symlink_out_of_the_folder_is_refused(tmp_path, capsys):
    picture(tmp_path / "outside.png")
    image_folder(tmp_path, [{"file_name": "link.png", "text": "T."}])
    (tmp_path / "train" / "link.png").symlink_to(tmp_path / "outside.png")
    assert "T." not in rows_of(read_folder(tmp_path, 32, 1))
    assert "row 6 (link.png)" in messages(capsys)[0]


def test_a_symlink_loop_is_skipped(tmp_path, capsys):
    image_folder(tmp_path, [{"file_name": "loop.png", "text": "T."}])
    (tmp_path / "train" / "loop.png").symlink_to("loop.png")
    assert "T." not in rows_of(read_folder(tmp_path, 32, 1))
    assert "row 6 (loop.png)" in messages(capsys)[0]


def test_the_last_line_counts_by_cause(tmp_path, capsys):
    """Rows whose causes differ in a file's name alone are counted together, the most frequent cause first."""
    rows = [{"file_name": "gone1.png", "text": "T."}, {"file_name": "gone2.png", "text": "T."},
            {"file_name": "i0.png", "text": ""}, {"file_name": "i0.png", "text": ""}, {"file_name": "i0.png", "text": ""}]
    read_folder(image_folder(tmp_path, rows), 32, 1)
    assert re.search(r"\b5 read, 5 skipped \(3 [a-z ]+; 2 [a-z …]+\)$", messages(capsys)[-1])


# ---- Images --------------------------------------------------------------------------------------


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) \
        + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_a_bomb_is_refused_from_its_header(tmp_path, monkeypatch, side):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadRow):
        read_image(tmp_path / "bomb.png", 32, 1)


def test_a_long_thin_image_takes_no_huge_square(tmp_path, monkeypatch):
    """16 x 20000 pixels are few, but the square around them would be 400 million."""
    picture(tmp_path / "thin.png", 50, (16, 20_000))
    new = Image.new

    def guarded(mode, size, *rest):
        assert size[0] * size[1] <= data.MAX_PIXELS, f"asks for {size}"
        return new(mode, size, *rest)

    monkeypatch.setattr(Image, "new", guarded)
    try:
        assert read_image(tmp_path / "thin.png", 32, 1).shape == (32, 32)
    except BadRow:
        pass


@pytest.mark.parametrize("size", [(1, 1), (15, 40), (40, 15)])
def test_an_image_too_small_is_refused_with_its_size(tmp_path, size):
    with pytest.raises(BadRow, match=f"{size[0]}x{size[1]}"):
        read_image(picture(tmp_path / "small.png", 5, size), 32, 1)


@pytest.mark.parametrize("name,content", [("empty.png", b""), ("text.png", b"plain text"), ("cut.png", None)])
def test_a_file_that_is_no_image_is_refused_in_words(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(picture(tmp_path / "whole.png").read_bytes()[:700] if content is None else content)
    with pytest.raises(BadRow):
        read_image(path, 32, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "CMYK", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_gives_the_same_gray(tmp_path, mode, channels):
    """Gray 128 in whatever mode (0/255 in mode 1, a 16-bit scale in I;16 and I)."""
    path = tmp_path / f"x.{'png' if mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16') else 'tiff'}"
    if mode in ("I;16", "I"):
        Image.fromarray(np.full((32, 32), 128 * 257 + 100, np.uint16 if mode == "I;16" else np.int32)).save(path)
    else:
        Image.new("L", (32, 32), 128 if mode != "1" else 255).convert(mode).save(path)
    image = read_image(path, 32, channels)
    assert image.shape == ((32, 32) if channels == 1 else (32, 32, 3)) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - (255 if mode == "1" else 128)).max() <= 1


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_float_image_with_an_odd_pixel_keeps_the_others(tmp_path, odd):
    values = np.linspace(0, 1000, 1600, dtype=np.float32).reshape(40, 40)
    Image.fromarray(values).save(tmp_path / "whole.tiff")
    values[3, 3] = odd
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    whole, odd = (read_image(tmp_path / f"{name}.tiff", 40, 1).astype(int) for name in ("whole", "odd"))
    assert odd[3, 3] == 0 and np.abs(np.delete(whole - odd, 3 * 40 + 3)).max() <= 1 and whole.max() > 50


def test_an_image_is_padded_to_a_square_with_black(tmp_path):
    image = read_image(picture(tmp_path / "wide.png", 200, (64, 32)), 64, 1)
    assert (image[16:48] == 200).all() and (image[:16] == 0).all() and (image[48:] == 0).all()


# ---- The sample data, where it is present --------------------------------------------------------


def sample(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {SHARED / name}")
    return SHARED / name


@pytest.mark.parametrize("name,rows,test_rows", [("mednist", 4200, 600), ("covid_cxr", 44, 10),
                                                 ("rocov2_layout", 80, 20), ("llava_layout", 60, None)])
def test_real_sets_are_read_whole(name, rows, test_rows, capsys):
    splits = read_folder(sample(name), 32, 1)
    assert sum(map(len, splits.values())) == rows
    assert test_rows is None or len(splits["test"]) == test_rows
    check_subjects(splits)


def test_covid_masks_fit_their_images_and_sides():
    for record in rows_of_names(read_folder(sample("covid_cxr"), 32, 1)):
        assert record.findings and all(m.shape == (32, 32) for m in record.masks.values())
        if {"left lung", "right lung"} <= record.masks.keys():
            left, right = (np.nonzero(record.masks[f"{s} lung"])[1].mean() for s in ("left", "right"))
            assert left > right                              # the patient's left is the image's right


def test_llava_sample_gives_texts_and_questions():
    records = rows_of_names(read_folder(sample("llava_layout"), 32, 1))
    assert sum(bool(r.text) for r in records) == 12 + 12
    assert sum(len(r.questions) for r in records) == 30 + 6 * 2
    assert not any("<image>" in r.text + str(r.questions) for r in records)
    assert not any(r.text.lower().startswith("generate") for r in records)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A copy of broken/ (read_folder remembers paths) whose absolute path names a real image."""
    root = tmp_path_factory.mktemp("data") / "broken"
    shutil.copytree(sample("broken"), root)
    path = root / "train" / "metadata.jsonl"
    path.write_text(path.read_text().replace("/data/outside.jpeg", str(root / "train" / "images" / "good_last.jpeg")))
    return root


def test_broken_is_read_as_expected(broken, capsys):
    splits = read_folder(broken, 64, 1)
    assert {r.name for r in rows_of_names(splits)} == {f"images/{n}" for n in (
        "good_first.jpeg", "long_text.jpeg", "gray16.png", "palette_alpha.png", "rgba.png", "cmyk.jpeg", "good_last.jpeg")}
    said = messages(capsys)
    assert len(said) == 11 and "7 read, 10 skipped" in said[-1]
    for line, (number, name) in zip(said, [
            (2, "truncated.jpeg"), (3, "zero_bytes.png"), (4, "text_file.png"), (5, "missing.png"), (6, "../outside.jpeg"),
            (7, "good_last.jpeg"), (8, "empty_text.jpeg"), (9, "metadata.jsonl"), (11, "one_pixel.png"), (16, "bomb.png")]):
        assert f"row {number}" in line and name in line, line


@pytest.mark.parametrize("name,mean", [("gray16.png", 72), ("palette_alpha.png", 43), ("rgba.png", 24), ("cmyk.jpeg", 17)])
def test_odd_modes_of_broken_have_the_expected_means(name, mean):
    path = sample("broken") / "train" / "images" / name
    with Image.open(path) as image:
        size = max(image.size)
    assert abs(read_image(path, size, 1).mean() - mean) <= 1
    assert abs(read_image(path, size, 3).mean() - mean) <= 1
