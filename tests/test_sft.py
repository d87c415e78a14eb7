"""sft.py: vocabulary and prompts, the four ways to use a model, examples and batches, the loss, and the program."""

import contextlib
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import sft
from conftest import Means, figures_of
from data import PHRASES, Finding, Phantoms, Record, names_and_sides, phantom_spec, write_report
from model import (GPT, SHARED_PRESETS, GPTConfig, UserError, cli, per_token_logps, read_tensors, save_state,
                   sequence_logps, take_step)
from sft import (INSTRUCTIONS, MASKS_EACH, MAX_TEXT, TASKS, Study, Vocabulary, check_data, collate, data_name, dice,
                 encode_records, extend_vocabulary, load_gpt, make_batch, make_example, response_loss)
from vqgan import VQGAN, stack, to_pixels

K = 16                                                     # image codes
REPORTS = [write_report(phantom_spec(0, "train", i, 0.9)) for i in range(60)]
VOCAB = Vocabulary.train([*sft.all_texts(()), *REPORTS], K, text_size=400)
STUDY = Study(np.arange(9), "Chest radiograph. Enlarged heart.", (("Is there a nodule?", "No."),),
              (("heart", np.arange(9)[::-1]),), (Finding("cardiomegaly"),))
SHARES = dict.fromkeys(TASKS, 0.25)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB.size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16))


def config(**flags):
    return cli(sft.SFTConfig, sft.PRESETS, ["--preset", "tiny"] + [w for k, v in flags.items() for w in (f"--{k}", str(v))])


# ---- Vocabulary and prompts, with a tokenizer learnt here and with one of other hands ------------


@pytest.fixture(scope="module", params=["learned", "foreign"])
def vocab(request, tmp_path_factory):
    """Text and K image codes; the foreign tokenizer has bytes, one merge and a special token of its own."""
    if request.param == "learned":
        return VOCAB
    folder = tmp_path_factory.mktemp("foreign")
    ids = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "le"])}
    tokenizer = Tokenizer(models.BPE(ids, [("l", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return extend_vocabulary(folder, K)


def test_ids_are_text_then_specials_then_image_codes(vocab):
    """One layout, whoever learnt the text; a response in words and one in pixels are each drawn from one range."""
    tokens = [vocab.tokenizer.id_to_token(i) for i in range(vocab.size)]
    specials = ["<eos>", "</image>", "<image>", "<bos>", "<pad>"]
    assert tokens[-K - 5:] == [*specials, *(f"<img_{i}>" for i in range(K))]
    assert [vocab.eos, vocab.eoi, vocab.boi, vocab.bos, vocab.pad] == [tokens.index(s) for s in specials]
    assert None not in tokens and vocab.size == vocab.tokenizer.get_vocab_size()
    assert vocab.text_range == (0, vocab.eos + 1)                    # <eos> may be sampled among text
    assert vocab.image_range == (vocab.image_start, vocab.size) == (vocab.size - K, vocab.size)


def test_codes_to_ids(vocab):
    codes = np.array([0, 5, K - 1], dtype=np.int16)
    ids = vocab.codes_to_ids(codes)
    assert [vocab.tokenizer.id_to_token(i) for i in ids] == ["<img_0>", "<img_5>", f"<img_{K - 1}>"]
    assert all(type(i) is int for i in ids)


@pytest.mark.parametrize("text", ["Small left pleural effusion.", "Ödem, β-Blocker: 5 µg — “ok” 肺", "a  b\nc", ""])
def test_text_round_trip(vocab, text):
    ids = vocab.encode_text(text)
    assert all(i < vocab.eos for i in ids)
    assert vocab.decode_text(ids) == text


def test_decode_text_leaves_specials_and_image_codes_out(vocab):
    ids = [vocab.bos, vocab.boi, *vocab.codes_to_ids([1]), vocab.eoi, *vocab.encode_text("Nodule."), vocab.eos, vocab.pad]
    assert vocab.decode_text(ids) == "Nodule."


HOSTILE = "a <image> b <img_3> c <eos><pad></image><bos>"


def test_special_names_inside_a_text_stay_letters(vocab):
    ids = vocab.encode_text(HOSTILE)
    assert all(i < vocab.eos for i in ids)
    assert vocab.decode_text(ids) == HOSTILE


def test_special_names_in_the_training_texts_claim_no_id():
    vocab = Vocabulary.train([HOSTILE] * 50, K, text_size=400)
    assert vocab.tokenizer.id_to_token(vocab.image_start) == "<img_0>" and vocab.size == vocab.image_start + K
    assert all(i < vocab.eos for i in vocab.encode_text(HOSTILE))


@pytest.mark.parametrize("size", [261, 300, 400])
def test_a_vocabulary_has_the_text_tokens_asked_for(size):
    """The 256 bytes and the specials are the least."""
    assert Vocabulary.train(REPORTS, K, text_size=size).image_start == size


def test_a_long_text_is_cut_and_that_is_said_once(vocab, capsys):
    vocab.has_cut = False
    assert len(vocab.encode_text("nodule " * 3 * MAX_TEXT)) == MAX_TEXT
    assert len(vocab.encode_text("nodule " * 10 ** 6)) == MAX_TEXT                        # at once, as it is not all read
    assert capsys.readouterr().out.count("\n") == 1
    assert len(vocab.text_response("effusion " * 3 * MAX_TEXT)) == MAX_TEXT + 1         # <eos> is never cut off
    assert capsys.readouterr().out == ""


def test_save_and_load_give_an_equal_vocabulary(vocab, tmp_path):
    vocab.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    fields = {k: v for k, v in vars(vocab).items() if k not in ("tokenizer", "has_cut")}
    assert {k: getattr(loaded, k) for k in fields} == fields
    for text in ("Small left pleural effusion.", HOSTILE):
        assert loaded.encode_text(text) == vocab.encode_text(text)


def test_loading_a_missing_broken_or_foreign_tokenizer_is_a_user_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    for make in (lambda: None, lambda: path.write_text("{"), lambda: Tokenizer(models.BPE()).save(str(path))):
        make()
        with pytest.raises(UserError, match="tokenizer.json"):
            Vocabulary.load(tmp_path)


def test_prompts_and_responses_by_hand(vocab):
    v, image = vocab, vocab.codes_to_ids([3, 1])
    assert v.ask_prompt([3, 1], "Why?") == [v.bos, v.boi, *image, v.eoi, *v.encode_text("Why?")]
    assert v.generate_prompt(None) == [v.bos, v.boi]
    for wording, words in enumerate(INSTRUCTIONS["report"]):
        assert v.report_prompt([3, 1], wording) == v.ask_prompt([3, 1], words)
    for wording, words in enumerate(INSTRUCTIONS["generate"]):
        for text in ("Left.", ""):                   # an empty report is a report, not the absence of one
            assert v.generate_prompt(text, wording) == [v.bos, *v.encode_text(words.format(text)), v.boi]
    for wording, words in enumerate(INSTRUCTIONS["segment"]):
        assert v.segment_prompt([3, 1], "heart", wording) == [*v.ask_prompt([3, 1], words.format("heart")), v.boi]
    assert v.segment_prompt([3, 1], "heart") == v.segment_prompt([3, 1], "heart", 0)
    assert v.text_response("Left.") == [*v.encode_text("Left."), v.eos]
    assert v.image_response([3, 1]) == [*image, v.eoi]


def test_all_texts_holds_whatever_a_model_will_read():
    study = Study(np.zeros(4), "T.", (("Q?", "A."),), (("heart", 0), ("left lung", 0)), None)
    texts = list(sft.all_texts([study]))
    assert texts[-5:] == ["T.", "Q?", "A.", "heart", "left lung"]
    assert set(texts[:-5]) == {words for wordings in INSTRUCTIONS.values() for words in wordings}


# ---- The four ways to use a model ----------------------------------------------------------------

CODES = [np.array([0, 1, 2, 3]), np.array([3, 2, 1, 0])]
# what stands for the image tokenizer: an image of 2x2 pixels, white where the code is above 7
PLAIN = SimpleNamespace(config=SimpleNamespace(grid=2), decode=lambda codes: (codes > 7).float().view(-1, 1, 2, 2) * 2 - 1)


@pytest.fixture
def asked(monkeypatch):
    """`generate` is replaced: it keeps what it was asked, and answers the n-th prompt with the n-th of `answers`."""
    asked = SimpleNamespace(model=SimpleNamespace(device="cpu"), answers=[])
    names = ("model", "prompts", "max_new_tokens", "allowed", "stop_id", "temperature")

    def generate(*values, **options):
        vars(asked).update({"stop_id": None, **dict(zip(names, values)), **options})
        return asked.answers
    monkeypatch.setattr(sft, "generate", generate)
    return asked


def test_reports_are_words_after_the_first_instruction(asked):
    asked.answers = [VOCAB.encode_text("Left nodule."), []]
    assert sft.write_reports(asked.model, VOCAB, CODES, temperature=0.5, seed=3, top_k=2) == ["Left nodule.", ""]
    assert asked.prompts == [VOCAB.report_prompt(c) for c in CODES]
    assert (asked.allowed, asked.stop_id, asked.max_new_tokens) == (VOCAB.text_range, VOCAB.eos, MAX_TEXT)
    assert (asked.temperature, asked.seed, asked.top_k) == (0.5, 3, 2)
    sft.write_reports(asked.model, VOCAB, CODES)
    assert (asked.temperature, asked.seed) == (0, 0)                     # the likeliest words, unless told otherwise


def test_each_image_has_its_own_question(asked):
    asked.answers = [VOCAB.encode_text("No."), VOCAB.encode_text("Left.")]
    assert sft.write_answers(asked.model, VOCAB, CODES, ["Is there a nodule?", "Where?"]) == ["No.", "Left."]
    assert asked.prompts == [VOCAB.ask_prompt(c, q) for c, q in zip(CODES, ("Is there a nodule?", "Where?"))]


def test_a_mask_is_exactly_the_codes_of_an_image_and_white_where_it_is(asked):
    drawn = [[8, 0, 0, 9], [0, 15, 0, 0]]
    asked.answers = [VOCAB.codes_to_ids(row) for row in drawn]
    masks = sft.draw_masks(asked.model, VOCAB, PLAIN, CODES, ["heart", "left lung"], temperature=1.0, seed=4)
    assert asked.prompts == [VOCAB.segment_prompt(c, s) for c, s in zip(CODES, ("heart", "left lung"))]
    assert (asked.allowed, asked.stop_id, asked.max_new_tokens) == (VOCAB.image_range, None, 4)
    assert (asked.temperature, asked.seed) == (1.0, 4)
    assert masks.tolist() == [[[True, False], [False, True]], [[False, True], [False, False]]] and masks.dtype == bool


def test_an_image_is_drawn_away_from_the_emptied_prompt(asked):
    asked.answers = [VOCAB.codes_to_ids(row) for row in ([8, 0, 0, 9], [0, 15, 0, 0])]
    images = sft.draw_images(asked.model, VOCAB, PLAIN, ["Left nodule.", "Normal."], guidance=3.0, temperature=0.5)
    assert asked.prompts == [VOCAB.generate_prompt(t) for t in ("Left nodule.", "Normal.")]
    assert asked.unconditional == [VOCAB.generate_prompt(None)] * 2 and asked.guidance == 3.0 and asked.temperature == 0.5
    assert (asked.allowed, asked.max_new_tokens) == (VOCAB.image_range, 4)
    assert images.shape == (2, 1, 2, 2) and images[0, 0].tolist() == [[1, -1], [-1, 1]]


def test_dice_by_hand():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[0], b[0, :2], b[1, :2] = True, True, True
    assert dice(a, b) == 0.5 and dice(a, a) == 1 and dice(a, ~a) == 0 and dice(a & False, b & False) == 1


# ---- Examples and batches ------------------------------------------------------------------------


def test_encode_records_pairs_masks_with_their_own_codes():
    records = [Phantoms("train", 20)[i] for i in range(20)]
    studies = encode_records(records, range(20), Means(), 0, contextlib.nullcontext)
    for record, study in zip(records, studies, strict=True):
        code = lambda image: Means().encode(to_pixels(stack([image], 1)))[0].numpy()
        assert np.array_equal(study.codes, code(record.image))
        assert len({name for name, _ in study.masks}) == min(MASKS_EACH, len(record.masks))
        for structure, codes in study.masks:
            assert np.array_equal(codes, code(record.masks[structure] * np.uint8(255)))


def test_a_study_serves_only_the_tasks_that_it_has_data_for():
    plain = Record(np.zeros((16, 16), np.uint8), "Words.", "a")
    asked = Record(np.zeros((16, 16), np.uint8), "", "b", questions=(("Q?", "A."),))
    first, second = encode_records([plain, asked], range(2), Means(), 0, contextlib.nullcontext)
    assert first.tasks == ("report", "generate") and second.tasks == ("ask",)


def open_phantoms(out, monkeypatch, n=20, seed=0, encode=encode_records):
    """The Studies of n phantoms in out/studies, eight in a file."""
    monkeypatch.setattr(sft, "STUDIES_EACH", 8)
    monkeypatch.setattr(sft, "weights_hash", lambda model: type(model).__name__)
    monkeypatch.setattr(sft, "encode_records", encode)
    return sft.open_studies(sft.SFTConfig(out=str(out), seed=seed), Phantoms("train", n, seed), Means(), contextlib.nullcontext)


def test_studies_on_disk_are_those_that_were_encoded(tmp_path, monkeypatch):
    stored = open_phantoms(tmp_path, monkeypatch)
    assert len(list((tmp_path / "studies").glob("*.safetensors"))) == 3 and len(stored) == 20
    for a, b in zip(stored, encode_records(Phantoms("train", 20), range(20), Means(), 0, contextlib.nullcontext), strict=True):
        assert (a.text, a.questions, a.tasks) == (b.text, b.questions, b.tasks)
        assert np.array_equal(a.codes, b.codes) and names_and_sides(a.findings) == names_and_sides(b.findings)
        assert [(n, c.tolist()) for n, c in a.masks] == [(n, c.tolist()) for n, c in b.masks]


def test_studies_are_encoded_once_and_anew_for_other_records(tmp_path, monkeypatch):
    first = [s.text for s in open_phantoms(tmp_path, monkeypatch)]
    assert [s.text for s in open_phantoms(tmp_path, monkeypatch, encode=None)] == first
    assert [s.text for s in open_phantoms(tmp_path, monkeypatch, seed=1)] != first


def test_encoding_goes_on_after_a_kill(tmp_path, monkeypatch):
    def killed(records, span, *rest):
        if span.start:
            raise KeyboardInterrupt
        return encode_records(records, span, *rest)
    with pytest.raises(KeyboardInterrupt):
        open_phantoms(tmp_path, monkeypatch, encode=killed)
    spans = []
    whole = open_phantoms(tmp_path, monkeypatch, encode=lambda r, span, *x: spans.append(span) or encode_records(r, span, *x))
    assert spans == [range(8, 16), range(16, 20)]
    assert [s.text for s in whole] == [r.text for r in Phantoms("train", 20)] and not (tmp_path / "studies.partial").exists()


def test_serving_leaves_out_what_has_no_data_for_the_tasks(tmp_path):
    plain, asked = (replace(STUDY, text=t, questions=q, masks=()) for t, q in (("Words.", ()), ("", (("Q?", "A."),))))
    sft.write_studies(tmp_path / "0.safetensors", [plain, asked, STUDY])
    studies = sft.Studies(tmp_path)
    texts = lambda *tasks: [s.text for s in studies.serving(tasks)]
    assert texts("segment") == [STUDY.text] and texts("ask", "segment") == ["", STUDY.text]
    assert [s.text for s in studies.serving(("report",)).serving(("ask",))] == [STUDY.text] and texts() == []


def test_make_example_report():
    prompt, response = make_example(STUDY, "report", VOCAB, rng())
    assert prompt in [VOCAB.report_prompt(range(9), wording) for wording in range(3)]
    assert response == VOCAB.text_response(STUDY.text)


def test_make_example_generate():
    prompt, response = make_example(STUDY, "generate", VOCAB, rng())
    assert prompt in [VOCAB.generate_prompt(STUDY.text, wording) for wording in range(3)]
    assert response == VOCAB.image_response(range(9))


def test_make_example_ask():
    assert make_example(STUDY, "ask", VOCAB, rng()) == (VOCAB.ask_prompt(range(9), "Is there a nodule?"),
                                                        VOCAB.text_response("No."))


def test_make_example_segment():
    prompt, response = make_example(STUDY, "segment", VOCAB, rng())
    assert prompt in [VOCAB.segment_prompt(range(9), "heart", w) for w in range(3)]
    assert response == VOCAB.image_response(range(8, -1, -1))


def test_emptied_generation_prompts_are_the_unconditional_prompt():
    for seed in range(5):
        assert make_example(STUDY, "generate", VOCAB, rng(seed), empty_share=1.0)[0] == VOCAB.generate_prompt(None)
        assert make_example(STUDY, "report", VOCAB, rng(seed), empty_share=1.0)[0] != VOCAB.generate_prompt(None)


@pytest.mark.parametrize("task", ["report", "generate", "segment"])
def test_every_wording_is_used(task):
    said = {VOCAB.decode_text(make_example(STUDY, task, VOCAB, rng(s))[0]) for s in range(40)}
    assert said == {words.format({"generate": STUDY.text, "segment": "heart"}.get(task)) for words in INSTRUCTIONS[task]}


def test_collate_by_hand():
    ids, labels = collate([([1, 7, 8], [9, 4]), ([1], [5, 6, 7, 4])], pad=0)
    assert ids.tolist() == [[1, 7, 8, 9, 4], [1, 5, 6, 7, 4]]
    assert labels.tolist() == [[-100, -100, -100, 9, 4], [-100, 5, 6, 7, 4]]
    ids, labels = collate([([1], [4]), ([1, 2], [3, 4])], pad=0)
    assert ids[0].tolist() == [1, 4, 0, 0] and labels[0].tolist() == [-100, 4, -100, -100]


def test_labels_are_exactly_the_response_and_the_rest_is_padding():
    examples = [make_example(STUDY, task, VOCAB, rng()) for task in TASKS]
    ids, labels = collate(examples, VOCAB.pad)
    assert VOCAB.pad != VOCAB.eos
    for row, (prompt, response) in enumerate(examples):
        assert labels[row][labels[row] != -100].tolist() == response
        assert ids[row, :len(prompt) + len(response)].tolist() == prompt + response
        assert (ids[row, len(prompt) + len(response):] == VOCAB.pad).all()


def test_a_report_of_any_length_fits_a_row():
    """Of a text far too long MAX_TEXT tokens are left, and <eos>."""
    VOCAB.has_cut = True                                   # it has said so before
    long = Study(np.arange(9), "Haemorrhage. " * 500, (), (), None)
    ids, labels = collate([make_example(s, "report", VOCAB, rng()) for s in (long, STUDY)], VOCAB.pad)
    assert (labels[0] != -100).sum() == MAX_TEXT + 1 and labels[0, -1] == VOCAB.eos and ids.shape == labels.shape


def test_tasks_follow_their_shares_and_the_record():
    shares, chance = {"report": 0.6, "generate": 0.4, "ask": 0.0, "segment": 0.0}, rng()
    drawn = [sft.pick_task(STUDY, shares, chance) for _ in range(2000)]
    assert drawn.count("report") / 2000 == pytest.approx(0.6, abs=0.04) and set(drawn) == {"report", "generate"}
    only = replace(STUDY, text="", masks=())
    assert sft.pick_task(only, SHARES, chance) == "ask"


def test_a_batch_is_a_function_of_seed_and_step():
    cfg = config()
    batch = lambda step: make_batch([STUDY], cfg, VOCAB, step)[0]
    assert len(batch(3)) == cfg.batch_size
    assert torch.equal(batch(3), batch(3)) and not torch.equal(batch(3)[:, :8], batch(4)[:, :8])


# ---- Training ------------------------------------------------------------------------------------


def test_loss_at_the_start_is_log_v(model):
    ids, labels = collate([([1, 2], [30, 31])], VOCAB.pad)
    assert response_loss(model, ids, labels).item() == pytest.approx(np.log(VOCAB.size), abs=0.1)


def test_loss_counts_response_tokens_only(model):
    """Another id after the response, where labels are -100, changes nothing."""
    ids, labels = collate([([1, 2, 3], [4, 5]), ([1], [4])], VOCAB.pad)
    changed = ids.clone()
    changed[1, 2:] = 7
    torch.testing.assert_close(response_loss(model, ids, labels), response_loss(model, changed, labels))


def test_loss_is_the_mean_over_tokens_not_over_sequences(model):
    """Two uneven halves, weighted by their tokens, give the whole batch."""
    pairs = [([1, 2], [3, 4, 5, 6]), ([1, 2], [3])]
    whole = response_loss(model, *collate(pairs, VOCAB.pad))
    halves = [response_loss(model, *collate([p], VOCAB.pad)) for p in pairs]
    torch.testing.assert_close(whole, (4 * halves[0] + halves[1]) / 5)


def test_one_batch_overfits(model):
    ids, labels = make_batch([STUDY], config(), VOCAB, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = response_loss(model, ids, labels).item()
    for _ in range(50):
        take_step(response_loss(model, ids, labels), model.parameters(), [optimizer])
    assert response_loss(model, ids, labels).item() < 0.15 * start


def test_validation_by_hand(model, monkeypatch):
    """Loss per token of each task that a study serves, and F1 of greedy reports where findings are known."""
    unknown = Study(np.arange(9), "Normal chest radiograph.", (), (), None)
    monkeypatch.setattr(sft, "write_reports", lambda model, vocab, codes: ["Enlarged heart. Left nodule."] * len(codes))
    found = sft.validate(model, [STUDY, unknown], sft.TASKS, VOCAB, PHRASES)
    draw, reports = rng(0), []
    for study in (STUDY, unknown):
        reports.append(make_example(study, "report", VOCAB, draw))
    ids, labels = collate(reports, VOCAB.pad)
    with torch.no_grad():
        nats = -sequence_logps(model, ids, labels).sum() / (labels != -100).sum()
    assert found["val/loss_report"] == pytest.approx(nats.item(), rel=1e-5)
    losses = [found[f"val/loss_{task}"] for task in TASKS]
    assert found["val/loss"] == pytest.approx(np.mean(losses)) and len(set(losses)) == len(TASKS)
    assert found["val/f1"] == pytest.approx(2 * 1 / (2 + 1))              # one right of two stated, of one true
    assert model.training and "val/f1" not in sft.validate(model, [unknown], sft.TASKS, VOCAB, PHRASES)
    assert set(sft.validate(model, [STUDY], ["ask"], VOCAB, PHRASES)) == {"val/loss_ask", "val/loss"}    # what is not trained is left out


# ---- The program ---------------------------------------------------------------------------------

# eight steps of eight sequences, two validations
SHORT = "--preset tiny --dtype float32 --steps 8 --batch-size 8 --val-every 4 --val-records 4 --records 32".split()


@pytest.fixture
def begin(trained, tmp_path):
    """Makes a new --out with the trained image tokenizer in it alone."""
    def begin(name="out"):
        shutil.copytree(trained / "vqgan", tmp_path / name / "vqgan")
        return tmp_path / name
    return begin


def test_a_model_goes_with_the_data_it_was_trained_on_alone(tmp_path):
    phantoms, folder = (SimpleNamespace(data=data, bias=0.9, modalities=3) for data in ("", str(tmp_path)))
    chests = SimpleNamespace(data="", bias=0.9, modalities=1)
    assert data_name(phantoms) == "phantoms --bias 0.9"                       # what older folders say
    for cfg in (phantoms, folder, chests):
        check_data(data_name(cfg), cfg, "out/sft")
    with pytest.raises(UserError, match="^out/sft .*--bias 0.9"):
        check_data(data_name(phantoms), SimpleNamespace(data="", bias=0.5, modalities=3), "out/sft")
    with pytest.raises(UserError, match="say --modalities 1 --bias 0.9, or"):
        check_data(data_name(chests), phantoms, "out/sft")
    with pytest.raises(UserError, match="--bias 0.9"):
        check_data(data_name(phantoms), folder, "out/sft")
    with pytest.raises(UserError, match=f"--data {tmp_path}"):
        check_data(data_name(folder), phantoms, "out/sft")
    with pytest.raises(UserError, match=r"say --data /gone \(moved\? put it back there\), or"):
        check_data("/gone", phantoms, "out/sft")


def test_an_init_that_is_no_model_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=f"--init {tmp_path} holds no model"):
        sft.main([*SHORT, "--init", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out/vqgan").exists()


def test_a_damaged_init_is_named(out, tmp_path):
    path = out / "sft/model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{out}/sft is no whole model folder"):
        sft.main([*SHORT, "--init", str(out / "sft"), "--out", str(tmp_path / "other")])


def test_half_a_letter_is_read_as_a_question_mark():
    """As a shell passes what is not UTF-8."""
    vocab = Vocabulary.train(["Caf? Normal."] * 3, codebook_size=8, text_size=300)
    assert vocab.encode_text("caf\udce9") == vocab.encode_text("caf?")


def test_resume_knows_the_image_tokenizer_it_started_from(begin):
    out = begin("other")
    sft.main([*SHORT, "--out", str(out)])
    vqgan = VQGAN.from_pretrained(out / "vqgan")
    with torch.no_grad():
        vqgan.quantizer.codebook.add_(0.1)
    vqgan.save_pretrained(out / "vqgan")
    with pytest.raises(UserError, match=f"--resume: {out}/sft was started from another image tokenizer; leave"):
        sft.main([*SHORT, "--out", str(out), "--resume"])


def test_stopped_and_resumed_equals_never_stopped(begin, monkeypatch):
    """The run is killed right after a saved state; --resume then writes the very same weights."""
    whole, halved = begin("whole"), begin("halved")
    sft.main([*SHORT, "--out", str(whole)])

    def save_and_die(*args, **progress):
        save_state(*args, **progress)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "save_state", save_and_die)
        sft.main([*SHORT, "--out", str(halved)])
    assert not (halved / "sft").exists()                   # nothing half made stands where a model should
    sft.main([*SHORT, "--out", str(halved), "--resume"])
    for file in ("state.safetensors", "model.safetensors"):
        a, b = (read_tensors(out / "sft" / file) for out in (whole, halved))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert figures_of(whole / "sft.jsonl") == figures_of(halved / "sft.jsonl")


@pytest.mark.parametrize("scores, kept_is_last", [((0.5, 0.4), False), ((0.5, 0.5), True), ((0.4, 0.5), True)])
def test_the_folder_keeps_the_best_model_and_the_last_state(begin, monkeypatch, scores, kept_is_last):
    score = iter(scores)
    monkeypatch.setattr(sft, "validate", lambda *args: {"val/loss": 1.0, "val/f1": next(score)})
    out = begin()
    sft.main([*SHORT, "--steps", "2", "--val-every", "1", "--out", str(out)])
    kept = read_tensors(out / "sft/model.safetensors")["model.embed_tokens.weight"]
    last = read_tensors(out / "sft/state.safetensors")["model.0.0"]
    assert torch.equal(kept, last) == kept_is_last


def test_another_image_size_than_the_tokenizers_is_refused(begin):
    with pytest.raises(UserError, match=f"--image-size {SHARED_PRESETS['tiny']['image_size']}"):
        sft.main([*SHORT, "--out", str(begin()), "--image-size", "64"])


def test_other_data_than_the_tokenizers_is_refused(begin, tmp_path):
    with pytest.raises(UserError, match=f"out/vqgan .*{tmp_path}"):
        sft.main([*SHORT, "--out", str(begin()), "--data", str(tmp_path)])


def test_no_task_left_is_refused(begin):
    none = [w for t in TASKS for w in (f"--{t}-share", "0")]
    with pytest.raises(UserError, match="-share"):
        sft.main([*SHORT, "--out", str(begin()), *none])


def test_a_tokenizer_of_another_model_is_refused(trained, tmp_path):
    """With other specials, or with fewer tokens before them: the ids would mean other things, and no error would follow."""
    vqgan, folder = VQGAN.from_pretrained(trained / "vqgan"), shutil.copytree(trained / "sft", tmp_path / "sft")
    path = folder / "tokenizer.json"
    load_gpt(folder, vqgan, "cpu")
    other = Vocabulary.train(["Clear lungs. Normal heart."] * 3, vqgan.config.codebook_size, text_size=300)
    path.write_text(other.tokenizer.to_str())
    with pytest.raises(UserError, match=f"{path} is not the one"):
        load_gpt(folder, vqgan, "cpu")
    path.write_text(other.tokenizer.to_str().replace("<eos>", "<end>"))
    with pytest.raises(UserError, match=str(path)):
        load_gpt(folder, vqgan, "cpu")


def test_the_saved_folder_is_whole(trained):
    """Ids of the folder's own vocabulary, finite log-probabilities."""
    model, vocab = GPT.from_pretrained(trained / "sft"), Vocabulary.load(trained / "sft")
    ids, labels = collate([(vocab.generate_prompt("Head CT."), vocab.image_response(range(16)))], vocab.pad)
    assert model.config.vocab_size == vocab.size and torch.isfinite(per_token_logps(model, ids, labels)).all()
    assert (model.config.image_token_start, model.config.eos_token_id, model.config.pad_token_id) == \
        (vocab.image_start, vocab.eos, vocab.pad)
