"""Stage 2: the objectives' known values and gradients, pairs and what each writer is shown, the loop as a user runs it."""

import contextlib
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import dpo
from conftest import Blind, Means
from data import PHRASES, Finding, Phantoms, Record, Vocabulary, stack, statement, to_pixels
from model import GPT, GPTConfig, UserError, cli, read_tensors, sequence_logps

VOCAB = Vocabulary.train(["Enlarged heart. No effusion. Normal."] * 3, codebook_size=8, text_size=300)
REPORTS = {"distorted": "Normal.", "own": "Enlarged heart. Left effusion.", "no-image": "No effusion.",
           "no-question": "Left effusion."}
OBJECTIVES = [name for name in dpo.OBJECTIVES if name != "sft"]


def make_pairs():
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8]], np.float32)
    masks = np.array([[1, 1, 1, 1], [1, 1, 2, 2], [5, 1, 1, 6]])
    return [dpo.Pair(0, "a", "remove", np.array([1, 2, 3, 4]), np.array([1, 2, 7, 4]), "Enlarged heart.", dict(REPORTS), 0.5,
                     "heart", masks, scores),
            dpo.Pair(1, "b", "add", np.array([0, 0, 3, 4]), np.array([5, 2, 7, 4]), "Normal.", dict(REPORTS))]


def config(objective, *flags):
    return cli(dpo.DPOConfig, dpo.PRESETS, ["--preset", "tiny", "--objective", objective, *flags],
               choice=("objective", dpo.OBJECTIVE_DEFAULTS))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB.size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16))


# Objectives: known values


def scored(objective, B=3, seed=None):
    """Log-ratios (0, or random), token counts and keeps of an objective's sequences."""
    torch.manual_seed(seed or 0)
    names = [*dpo.sequences_of(objective)]
    names += [f"{n}/Ω" for n in names if n.startswith(("image", "mask"))]
    ratios = {n: torch.zeros(B) if seed is None else torch.randn(B) for n in names}
    sizes = {n: torch.randint(2, 9, (B,)) for n in names}
    for chosen, rejected in dpo.COMPARISONS.values():        # two images differ in as many codes from either side
        if f"{chosen}/Ω" in sizes:
            sizes[f"{rejected}/Ω"] = sizes[f"{chosen}/Ω"]
    keep = {n: torch.ones(B) for n in dpo.OBJECTIVES[objective][1]}
    return {k: v.requires_grad_() for k, v in ratios.items()}, sizes, keep


LOG2 = math.log(2)
STEP_0 = {"dpo": LOG2, "bidpo": (0.5 + 0.1 + 1 + 2 * 0.2) * LOG2, "mdpo": 3 * LOG2, "mfpo": 3 * LOG2,
          "napo": LOG2 + 2 * 0.5, "rndpo": (1 + 0.1) * LOG2}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_at_step_0(objective):
    """Policy == reference: log 2 a preference; NaPO's q is 2·(1 − ½) = 1 there, so (1 − 2^−1)/1 a term."""
    loss, _, margins = dpo.objective_loss(*scored(objective), config(objective))
    assert loss.item() == pytest.approx(STEP_0[objective], rel=1e-5)
    assert all((m == 0).all() for name, m in margins.items() if not name.endswith("/q"))


def plain_loss(objective, r, n, cfg):
    """Each objective written out with log and σ, on log-ratios r and token counts n."""
    nls = lambda z: -torch.log(torch.sigmoid(z)).mean()
    b, diff = cfg.beta, lambda a, c, end="": r[f"{a}_chosen{end}"] - r[f"{c}{end}"]
    text, cond = b * diff("text", "text_rejected"), b * diff("text", "text_distorted") if "text_distorted" in r else None
    if objective == "dpo":
        return nls(text)
    if objective in ("mdpo", "mfpo"):
        return nls(text) + nls(cond) + nls(b * r["text_chosen"])
    if objective == "bidpo":
        return (0.5 * nls(text) + 0.1 * nls(b * diff("image", "image_rejected")) + nls(cond)
                + 0.2 * (nls(b * r["text_chosen"]) + nls(b * r["image_chosen"])))
    if objective == "rndpo":
        rn = lambda kind: nls(b * diff(kind, f"{kind}_rejected", "/Ω") / n[f"{kind}_chosen/Ω"])
        return rn("mask") + 0.1 * rn("image")
    total = nls(text)
    for bias in ("language", "vision"):
        w, l = r["text_chosen"], r[f"text_{bias}"]
        q = (2 * (1 - torch.sigmoid((w / n["text_chosen"] - l / n[f"text_{bias}"]).mean()))).clamp(0.001, 1).item()
        total = total + ((1 - torch.sigmoid(b * (w - l)) ** q) / q).mean()
    return total


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_value_and_gradient_are_those_of_the_plain_formula(objective):
    cfg = config(objective)
    ratios, sizes, keep = scored(objective, B=5, seed=1)
    if objective == "rndpo":
        del ratios["text_chosen"]
    else:
        ratios = {k: v for k, v in ratios.items() if "/Ω" not in k}
    loss, _, _ = dpo.objective_loss({"text_chosen": torch.zeros(5), **ratios}, sizes, keep, cfg)
    expected = plain_loss(objective, {"text_chosen": torch.zeros(5), "text_rejected": torch.zeros(5), **ratios}, sizes, cfg)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    used = list(ratios.values())
    for ours, plain in zip(*(torch.autograd.grad(v, used, allow_unused=True) for v in (loss, expected))):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_gradient_at_the_start_is_minus_beta_over_2b():
    logps = torch.zeros(4, requires_grad=True)
    dpo.preference_loss(0.2 * logps).mean().backward()
    torch.testing.assert_close(logps.grad, torch.full((4,), -0.2 / (2 * 4)))


def test_anchor_by_hand():
    assert dpo.anchor_loss(torch.tensor(2.0), 0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_box_cox_runs_from_dpo_to_mae():
    """q → 0 is −log σ; q = 1 is 1 − σ; at margin 0 it is (1 − 2^−q)/q."""
    margin = torch.tensor([-30.0, -2.0, 0.0, 3.0])
    torch.testing.assert_close(dpo.box_cox_loss(margin, 1e-6), dpo.preference_loss(margin), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dpo.box_cox_loss(margin, 1.0), 1 - torch.sigmoid(margin))
    for q in (0.1, 0.5, 0.9):
        assert dpo.box_cox_loss(torch.tensor(0.0), q).item() == pytest.approx((1 - 2 ** -q) / q, rel=1e-5)


def test_q_rises_where_margins_are_near_zero_and_carries_no_gradient():
    cfg = config("napo", "--napo-alpha", "2", "--q-max", "0.8")
    mean = torch.tensor(0.3, requires_grad=True)
    assert dpo.noise_q(mean, cfg).item() == pytest.approx(2 * (1 - 1 / (1 + math.exp(-2 * 0.3))))
    assert dpo.noise_q(torch.tensor(-1.0), cfg).item() == pytest.approx(0.8)
    assert dpo.noise_q(torch.tensor(50.0), cfg).item() == pytest.approx(0.001)
    assert not dpo.noise_q(mean, cfg).requires_grad


def test_q_looks_at_the_pairs_that_count_only():
    ratios, sizes, keep = scored("napo", B=2)
    ratios["text_language"] = torch.tensor([0.0, -16.0])
    sizes["text_language"] = torch.tensor([2, 2])
    keep["language"] = torch.tensor([0.0, 1.0])
    q = dpo.make_margins(ratios, sizes, keep, config("napo"))["language/q"].item()
    assert q == pytest.approx(max(0.001, 2 * (1 - 1 / (1 + math.exp(-8)))))


def test_each_term_has_its_own_margin_and_weight():
    cfg = config("bidpo", "--beta", "1", "--text-weight", "1", "--image-weight", "10", "--conditional-weight", "100",
                 "--anchor-weight", "0")
    ratios = {k: torch.tensor([v]) for k, v in dict(text_chosen=1.0, text_rejected=0.0, image_chosen=2.0, image_rejected=0.0,
                                                    text_distorted=-2.0).items()}
    keep = {k: torch.ones(1) for k in ("text", "image", "conditional")}
    loss, _, _ = dpo.objective_loss(ratios, dict.fromkeys(ratios, torch.tensor([1])), keep, cfg)
    softplus = lambda z: math.log(1 + math.exp(z))
    assert loss.item() == pytest.approx(softplus(-1) + 10 * softplus(-2) + 100 * softplus(-3), rel=1e-5)


def test_pairs_that_do_not_count_are_left_out_of_the_mean():
    values = torch.tensor([1.0, 100.0, 3.0])
    assert dpo.masked_mean(values, torch.tensor([1.0, 0.0, 1.0])) == 2.0
    assert dpo.masked_mean(values, torch.zeros(3)) == 0.0
    cfg = config("dpo")
    ratios, sizes, keep = scored("dpo", B=2, seed=1)
    last = lambda values: {k: v[1:] for k, v in values.items()}
    both, _, _ = dpo.objective_loss(ratios, sizes, {"text": torch.tensor([0.0, 1.0])}, cfg)
    torch.testing.assert_close(both, dpo.objective_loss(last(ratios), last(sizes), last(keep), cfg)[0])


def test_objective_defaults_come_between_preset_and_flags():
    assert (config("bidpo").beta, config("dpo").beta, config("dpo", "--beta", "2").beta) == (0.5, 0.1, 2.0)
    assert config("mfpo").curriculum and not config("mfpo", "--no-curriculum").curriculum
    assert config("sft").sft_weight == 1.0 and config("rndpo").normalise


# Scores


def test_score_sums_responses_and_the_codes_that_differ(model):
    """By hand from the logits: pair a's images differ in the third of four codes."""
    names = dpo.sequences_of("rndpo")
    pairs = make_pairs()
    dpo.choose_rejected(pairs, config("rndpo"), PHRASES)
    ids, labels = dpo.pair_batch(pairs, [0, 1], names, VOCAB, "cpu")
    sums, sizes = dpo.score(model, ids, labels, names)
    for name in names:
        torch.testing.assert_close(sums[name], sequence_logps(model, ids, labels).view(len(names), 2)[names.index(name)])
    row = names.index("image_chosen") * 2
    start = (labels[row] != -100).nonzero()[0, 0]
    logps = model(ids[row:row + 1])[0].log_softmax(-1)
    third = logps[start + 1, ids[row, start + 2]]
    torch.testing.assert_close(sums["image_chosen/Ω"][0], third)
    assert sizes["image_chosen/Ω"].tolist() == [1, 3] and sizes["image_chosen"].tolist() == [5, 5]     # 4 codes, </image>
    # masks: 1 1 1 1 over 5 1 1 6; the pair without masks compares its image with itself
    assert sizes["mask_chosen/Ω"].tolist() == [2, 0]


def test_the_normalised_margin_by_hand():
    ratios, sizes, keep = scored("rndpo", B=1, seed=2)
    sizes["mask_chosen/Ω"] = torch.tensor([4])
    m = dpo.make_margins(ratios, sizes, keep, config("rndpo", "--beta", "3"))
    torch.testing.assert_close(m["mask"], 3 * (ratios["mask_chosen/Ω"] - ratios["mask_rejected/Ω"]) / 4)
    m = dpo.make_margins(ratios, sizes, keep, config("rndpo", "--beta", "3", "--no-normalise"))
    torch.testing.assert_close(m["mask"], 3 * (ratios["mask_chosen"] - ratios["mask_rejected"]))


def test_what_each_sequence_holds():
    """Text terms are scored on the genuine image, the conditional one on the distorted; images on the report."""
    pair = make_pairs()[0]
    pair.rejected, pair.masks = "Normal.", (pair.proposals[0], pair.proposals[2])
    names = ("text_chosen", "image_chosen", "text_rejected", "image_rejected", "text_distorted", "text_language", "text_vision",
             "mask_chosen", "mask_rejected")
    made = dict(zip(names, dpo.pair_examples(pair, names, VOCAB)))
    genuine, twisted = VOCAB.image(pair.codes), VOCAB.image(pair.distorted)
    for name in ("text_chosen", "text_rejected", "text_language", "text_vision"):
        assert made[name][0] == made["text_chosen"][0] and made[name][0][1:7] == genuine
    assert made["text_distorted"][0][1:7] == twisted and made["text_distorted"][1] == made["text_chosen"][1]
    said = lambda name: VOCAB.decode_text(made[name][1][:-1])
    assert [said(n) for n in ("text_chosen", "text_rejected", "text_language", "text_vision")] == [
        "Enlarged heart.", "Normal.", "No effusion.", "Left effusion."]
    assert made["image_chosen"][0] == made["image_rejected"][0]
    assert VOCAB.decode_text(made["image_chosen"][0]) == "Draw this: Enlarged heart."
    assert made["image_chosen"][1] == genuine[1:] and made["image_rejected"][1] == twisted[1:]
    assert made["mask_chosen"][0] == VOCAB.segment(pair.codes, "heart") == made["mask_rejected"][0]
    assert made["mask_rejected"][1] == VOCAB.image_response([5, 1, 1, 6])


@pytest.mark.parametrize("objective", dpo.OBJECTIVES)
def test_every_objective_trains_on_the_controls_chosen_sequences(objective):
    assert dpo.sequences_of(objective)[:2] == dpo.CHOSEN == dpo.sequences_of("sft")
    pairs = make_pairs()
    dpo.choose_rejected(pairs, config(objective), PHRASES)
    names = dpo.sequences_of(objective)
    whole, _ = dpo.pair_batch(pairs, [0, 1], names, VOCAB, "cpu")
    control, _ = dpo.pair_batch(pairs, [0, 1], dpo.CHOSEN, VOCAB, "cpu")
    assert whole.size(0) == 2 * len(names) and torch.equal(whole[:4, :control.size(1)], control)


def test_log_ratios_are_zero_at_step_0(model):
    """The reference's numbers, made before the loop in order, are the policy's in any batch."""
    cfg, names, pairs = config("bidpo"), dpo.sequences_of("bidpo"), make_pairs()
    dpo.choose_rejected(pairs, cfg, PHRASES)
    reference = dpo.reference_logps(model, pairs, names, VOCAB, cfg, "cpu", torch.no_grad)
    logps, _ = dpo.score(model, *dpo.pair_batch(pairs, [1, 0], names, VOCAB, "cpu"), names)
    for k, v in logps.items():
        torch.testing.assert_close(v, reference[k][[1, 0]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_margins_grow_on_one_batch_in_every_comparison(model, objective):
    cfg, names, pairs = config(objective), dpo.sequences_of(objective), make_pairs()
    keep = {k: torch.tensor(v).float() for k, v in dpo.choose_rejected(pairs, cfg, PHRASES).items()}
    reference = dpo.reference_logps(model, pairs, names, VOCAB, cfg, "cpu", torch.no_grad)
    batch = dpo.pair_batch(pairs, [0, 1], names, VOCAB, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        logps, sizes = dpo.score(model, *batch, names)
        ratios = {k: v - reference[k] for k, v in logps.items()}
        loss, _, margins = dpo.objective_loss(ratios, sizes, keep, cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name in dpo.OBJECTIVES[objective][1]:
        assert dpo.masked_mean(margins[name], keep[name]) > 0.01, name
    assert not any(v.requires_grad for v in reference.values())


# Pairs


def pairs_of(records, n=12, kinds=("noise", "mirror", "add"), seed=0, vqgan=None, candidates=1):
    cfg = dpo.DPOConfig(pairs=n, distort=kinds, seed=seed, candidates=candidates)
    return dpo.build_pairs(records, cfg, vqgan or Means(), None, "cpu", contextlib.nullcontext)


def as_tuples(pairs):
    return [(p.name, p.kind, p.codes.tolist(), p.distorted.tolist(), p.chosen) for p in pairs]


def test_same_seed_same_pairs_and_another_seed_others():
    records = Phantoms("train", 40)
    one, two, three = (as_tuples(pairs_of(records, seed=s)) for s in (0, 0, 1))
    assert one == two and one != three
    assert {p[0] for p in one} != {p[0] for p in three}        # the records drawn depend on the seed too


def test_another_seed_distorts_the_same_record_otherwise():
    records = Phantoms("train", 6)
    one, two = ({p.name: p.distorted.tolist() for p in pairs_of(records, seed=s, kinds=("noise",))} for s in (0, 1))
    assert one.keys() == two.keys() and all(one[name] != two[name] for name in one)


def test_a_pair_holds_the_genuine_and_the_distorted_codes():
    records = Phantoms("train", 20)
    pairs = pairs_of(records, n=8, kinds=("invert",))
    assert len(pairs) == 8
    for pair in pairs:
        record = records[int(pair.name.split("/")[1])]
        encode = lambda image: Means().encode(to_pixels(stack([image], 1)))[0].numpy()
        assert np.array_equal(pair.codes, encode(record.image)) and pair.chosen == record.text
        assert np.array_equal(pair.distorted, encode(255 - record.image)) and pair.kind == "invert"


def test_pairs_of_equal_codes_are_dropped_until_none_is_left():
    with pytest.raises(UserError, match="dropped 9 whose codes the distortion left as they were"):
        pairs_of([Phantoms("train", 9)[i] for i in range(9)], n=9, vqgan=Blind())


def test_records_without_text_make_no_pairs(capsys):
    records = [replace(Phantoms("train", 9)[i], text="" if i % 2 else "Nodule.") for i in range(9)]
    assert len(pairs_of(records, n=9, kinds=("invert",))) == 5 and "4 without text" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 without text"):
        pairs_of([Record(np.zeros((64, 64), np.uint8), "", "x")] * 2, n=2)


def test_n_bounds_the_pairs_and_records_are_used_once():
    pairs = pairs_of(Phantoms("train", 300, size=16), n=1000, kinds=("invert",))
    assert len(pairs) == len({p.name for p in pairs}) == 300
    assert len(pairs_of(Phantoms("train", 300, size=16), n=7, kinds=("invert",))) == 7


def test_candidates_are_different_distortions_of_one_record_the_first_as_without_them():
    records = Phantoms("train", 60)
    one, many = (pairs_of(records, n=60, kinds=("remove",), candidates=c) for c in (1, 5))
    found = {p.index: [q for q in many if q.index == p.index] for p in one}
    assert as_tuples([pairs[0] for pairs in found.values()]) == as_tuples(one)
    for index, pairs in found.items():
        expected = 5 if not records[index].findings else len(records[index].findings)      # a normal one takes additions
        assert 1 <= len(pairs) <= expected and len({q.distorted.tobytes() for q in pairs}) == len(pairs)
    assert {len(pairs) for pairs in found.values()} >= {1, 2, 3}


def test_of_a_records_pairs_the_one_noticed_least_is_taken():
    first, second = make_pairs()
    pairs = [first, replace(first, kind="mirror"), second, replace(first, kind="other")]
    assert [p.kind for p in dpo.least_noticed(pairs, torch.tensor([-3.0, -1.0, -9.0, -2.0]))] == ["mirror", "add"]


def test_candidates_leave_one_pair_a_record_by_its_report_on_the_distorted_image(trained, tmp_path, monkeypatch):
    """All candidates are asked with one wording: else the wording decides, and not the image."""
    flags, asked, real = copy_stages(trained, tmp_path / "out", "vqgan", "sft"), [], dpo.reference_logps
    spy = lambda model, pairs, names, *more: asked.append((names, {p.wording for p in pairs})) or real(model, pairs, names, *more)
    monkeypatch.setattr(dpo, "reference_logps", spy)
    dpo.main([*flags, "--steps", "1", "--objective", "dpo", "--candidates", "3"])
    assert asked == [(("text_distorted",), {0}), (dpo.sequences_of("dpo"), {0, 1, 2})]
    hard, plain = ([json.loads(line) for line in (out / "pairs/pairs.jsonl").read_text().splitlines()]
                   for out in (tmp_path / "out", trained))
    indices = [p["index"] for p in hard]
    assert len(indices) == len(set(indices)) and {p["index"] for p in plain} <= set(indices) and hard != plain


def test_a_statement_is_about_findings_not_about_words():
    assert statement("Left effusion. No nodule.", PHRASES) == statement("THERE IS A LEFT EFFUSION.", PHRASES)
    assert statement("Left effusion.", PHRASES) != statement("Right effusion.", PHRASES)
    # nothing known of findings: modality and body part; nothing of these either: the words
    assert statement("A chest CT.", {}) == statement("CT of the chest", {}) != statement("MRI of the chest", {})
    assert statement("One.", {}) != statement("Two.", {})


def test_which_reports_count_as_rejected():
    """pair b's own report is normal: only a rejected report that states a finding differs from it."""
    for flags, counts in (([], [True, False]), (["--rejected", "own"], [True, True]),
                          (["--rejected", "distorted", "own"], [True, True])):
        pairs = make_pairs()
        assert dpo.choose_rejected(pairs, config("dpo", *flags), PHRASES)["text"].tolist() == counts
    assert [p.rejected for p in pairs] == ["Normal.", "Enlarged heart. Left effusion."]       # evenly mixed
    keep = dpo.choose_rejected(make_pairs(), config("napo"), PHRASES)
    assert keep["language"].tolist() == [True, False] and keep["vision"].tolist() == [True, True]


def test_masks_without_difference_are_dropped_and_none_left_is_refused():
    pairs = make_pairs()
    assert dpo.choose_rejected(pairs, config("rndpo"), PHRASES)["mask"].tolist() == [True, False]
    pairs[0].proposals[:] = 1
    with pytest.raises(UserError, match="of 2, chosen and rejected differ in: mask 0, image 2"):
        dpo.choose_rejected(pairs, config("rndpo"), PHRASES)
    for p in pairs:
        p.chosen = p.reports["distorted"] = "Normal."
    with pytest.raises(UserError, match="--objective dpo finds no usable preference pair: of 2, .* differ in: text 0"):
        dpo.choose_rejected(pairs, config("dpo"), PHRASES)


def test_a_flipped_pair_has_chosen_and_rejected_swapped():
    plain, flipped, half = make_pairs(), make_pairs(), [p for _ in range(500) for p in make_pairs()]
    for pairs, share in ((plain, "0"), (flipped, "1"), (half, "0.3")):
        dpo.choose_rejected(pairs, config("rndpo", "--flip-pairs", share), PHRASES)
    for one, two in zip(plain, flipped):
        assert (one.chosen, one.rejected) == (two.rejected, two.chosen)
        assert all((a == b).all() for a, b in zip(one.masks, two.masks[::-1]))
    assert np.mean([p.chosen == "Normal." for p in half[::2]]) == pytest.approx(0.3, abs=0.05)


def test_the_judge_ranks_and_errs():
    rng, scores = np.random.default_rng(0), np.array([0.1, 0.9, 0.5, 0.3])
    assert dpo.mine(scores, "top-bottom", 0.0, rng) == (1, 0)
    assert dpo.mine(scores, "top-bottom", 1.0, rng) == (0, 1)
    random = [dpo.mine(scores, "random", 0.0, rng) for _ in range(80)]
    assert all(scores[a] > scores[b] for a, b in random) and len(set(random)) == 6
    # one comparison is wrong as often as the judge is; the whole ranking less often
    share = lambda mining: np.mean([scores[a] < scores[b] for a, b in (dpo.mine(scores, mining, 0.3, rng) for _ in range(2000))])
    assert share("random") == pytest.approx(0.3, abs=0.04) and share("top-bottom") < 0.22


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_judge_without_opinion_draws_lots(k):
    """Equal scores favour no proposal, and no pair is lost to a cycle of a noisy judge's comparisons."""
    rng = np.random.default_rng(0)
    drawn = [dpo.mine(np.full(k, 0.5), "top-bottom", noise, rng) for noise in (0.0, 0.4) for _ in range(1000)]
    assert all(a != b for a, b in drawn)
    assert np.bincount([a for a, _ in drawn]) / len(drawn) == pytest.approx(np.full(k, 1 / k), abs=0.05)


def test_proposals_are_scored_by_each_other_and_by_the_truth(monkeypatch):
    """Two of three drawn masks are the same and wrong, one is the truth: agreement and truth rank them differently."""
    truth, wrong = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    truth[:4], wrong[4:] = True, True
    records = [replace(Phantoms("train", 1)[0], masks={}), replace(Phantoms("train", 1)[0], masks={"heart": truth})]
    drawn, codes = np.stack([wrong, truth, wrong]), np.arange(12).reshape(3, 4)
    monkeypatch.setattr(dpo, "draw_masks", lambda *a: (drawn, codes))
    pairs = make_pairs()
    for p in pairs:
        p.structure, p.proposals = "", None
    dpo.add_proposals(pairs, records, None, VOCAB, None, config("rndpo"))
    assert pairs[0].structure == "" and pairs[0].proposals is None and pairs[1].structure == "heart"
    np.testing.assert_allclose(pairs[1].scores, [[0.5, 0, 0.5], [0, 1, 0]])
    assert np.array_equal(pairs[1].proposals, codes)


def test_agreement_and_truth_may_name_different_masks():
    for judge, best, worst in (("agreement", 0, 2), ("truth", 2, 0)):
        pairs = make_pairs()
        dpo.choose_rejected(pairs, config("rndpo", "--judge", judge), PHRASES)
        assert pairs[0].masks[0].tolist() == pairs[0].proposals[best].tolist()
        assert pairs[0].masks[1].tolist() == pairs[0].proposals[worst].tolist()


def test_semantic_entropy_by_hand(monkeypatch):
    """Four samples: two state one thing, in two wordings, two another: log 2; all alike: 0."""
    texts = iter((["Left effusion.", "Normal."], ["There is a left effusion.", "Normal."], ["Normal.", "normal."],
                  ["Clear.", "Normal."]))
    monkeypatch.setattr(dpo, "sample_reports", lambda *a: next(texts))
    pairs = make_pairs()
    dpo.add_entropy(pairs, None, VOCAB, config("mfpo", "--entropy-samples", "4"), PHRASES)
    assert pairs[0].entropy == pytest.approx(math.log(2)) and pairs[1].entropy == 0


def test_the_curriculum_goes_from_easy_to_hard():
    pairs = [replace(make_pairs()[0], entropy=float(e)) for e in (5, 1, 4, 2, 3, 0)]
    cfg = config("dpo", "--curriculum", "--steps", "9", "--batch-size", "2")
    seen = [sorted(pairs[i].entropy for i in dpo.pick_pairs(pairs, cfg, step)) for step in range(9)]
    assert seen == [[0, 1]] * 3 + [[2, 3]] * 3 + [[4, 5]] * 3
    plain = config("dpo", "--batch-size", "3")
    assert sorted(np.concatenate([dpo.pick_pairs(pairs, plain, step) for step in (0, 1)])) == list(range(6))


def test_each_writer_sees_what_it_should():
    pair = make_pairs()[0]
    seen = {w: prompt(pair, VOCAB, "Describe.") for w, prompt in dpo.WRITERS.items()}
    assert seen["own"] == VOCAB.understand(pair.codes, "Describe.")
    assert seen["distorted"] == VOCAB.understand(pair.distorted, "Describe.")
    assert seen["no-image"] == VOCAB.understand(dpo.shuffled(pair), "Describe.") != seen["own"]
    assert sorted(dpo.shuffled(pair)) == sorted(pair.codes)
    assert seen["no-question"] == [VOCAB.bos, *VOCAB.image(pair.codes)]


def test_the_key_region_is_what_the_report_hangs_on(monkeypatch, model):
    """Hiding block 5 costs 3 nats and block 6 two, others one: the region is blocks 5 and 6; nothing costs: none."""
    costs = torch.tensor([0.0] + [1.0] * 16)
    costs[6], costs[7] = 3.0, 2.0
    record = Record(np.full((64, 64), 200, np.uint8), "Enlarged heart.", "x", (Finding("cardiomegaly"),))
    ask = lambda: dpo.key_region(record, model, VOCAB, Small(), 1, "cpu", contextlib.nullcontext)
    monkeypatch.setattr(dpo, "sequence_logps", lambda *a: -costs)
    expected = np.zeros((64, 64), bool)
    expected[16:32, 16:48] = True
    assert np.array_equal(ask(), expected)
    monkeypatch.setattr(dpo, "sequence_logps", lambda *a: costs)
    assert ask() is None


class Small(Means):
    """Means in 8 codes, which the vocabulary of these tests has."""

    def encode(self, x):
        return super().encode(x) // 5


# The program


def test_the_log_starts_at_log_2_with_margins_0(trained):
    first = json.loads((trained / "dpo.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    for term in ("text", "image", "conditional"):
        assert first[f"loss_{term}"] == pytest.approx(math.log(2), abs=1e-4)
        assert first[f"rewards_{term}/margins"] == pytest.approx(0, abs=1e-4)
    assert first["drift/text_chosen"] == pytest.approx(0, abs=1e-4)


def test_the_control_logs_no_preferences(trained):
    last = json.loads((trained / "control.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 11 and not any(k.startswith(("loss_", "rewards_")) for k in last) and last["nll_loss"] > 0


def copy_stages(trained, out, *stages):
    out.mkdir(parents=True)
    for stage in stages:
        shutil.copytree(trained / stage, out / stage)
    return ["--preset", "tiny", "--dtype", "float32", "--out", str(out)]


def test_every_objective_runs_on_the_same_pairs(trained, tmp_path, capsys):
    """What an objective needs is added to out/pairs; what is there stays as it was."""
    flags = copy_stages(trained, tmp_path / "out", "vqgan", "sft", "pairs")
    before = [json.loads(line) for line in (tmp_path / "out/pairs/pairs.jsonl").read_text().splitlines()]
    for objective in ("dpo", "mdpo", "mfpo", "napo", "rndpo"):
        dpo.main([*flags, "--steps", "2", "--objective", objective, "--name", objective])
        first = json.loads((tmp_path / f"out/{objective}.jsonl").read_text().splitlines()[0])
        terms = {k[5:] for k in first if k.startswith("loss_")}
        assert terms == {"dpo": {"text"}, "mdpo": {"text", "conditional", "anchor"}, "mfpo": {"text", "conditional", "anchor"},
                         "napo": {"text", "language", "vision"}, "rndpo": {"mask", "image"}}[objective]
    after = [json.loads(line) for line in (tmp_path / "out/pairs/pairs.jsonl").read_text().splitlines()]
    assert [r["reports"]["distorted"] for r in after] == [r["reports"]["distorted"] for r in before]
    assert all({"distorted", "no-image", "no-question"} == r["reports"].keys() and r["entropy"] >= 0 for r in after)
    assert len(dpo.read_pairs(tmp_path / "out/pairs")[0].proposals) == 3
    capsys.readouterr()
    dpo.main([*flags, "--steps", "2", "--objective", "rndpo", "--name", "again"])
    assert "mask proposals" not in capsys.readouterr().err
    one, two = (read_tensors(tmp_path / f"out/{n}/model.safetensors") for n in ("rndpo", "again"))
    assert all(torch.equal(one[k], two[k]) for k in one)          # read back, the pairs are the same


def test_pairs_are_built_once_for_one_recipe(trained):
    """dpo and its control share out/pairs; its texts can be read."""
    rows = [json.loads(line) for line in (trained / "pairs/pairs.jsonl").read_text().splitlines()]
    codes = read_tensors(trained / "pairs/codes.safetensors")
    assert len(rows) == len(codes["genuine"]) and all(r["chosen"] and r["reports"].keys() == {"distorted"} for r in rows)
    assert (codes["genuine"] != codes["distorted"]).any(1).all()


def test_another_recipe_builds_other_pairs(trained, tmp_path):
    flags = copy_stages(trained, tmp_path / "out", "vqgan", "sft", "pairs")
    kinds = lambda: {json.loads(line)["kind"] for line in (tmp_path / "out/pairs/pairs.jsonl").read_text().splitlines()}
    assert "noise" not in kinds()
    dpo.main([*flags, "--steps", "1", "--objective", "dpo", "--distort", "noise"])
    assert kinds() == {"noise"}


def test_pairs_come_back_as_they_were_written(tmp_path):
    """Also reports of scrambled words, with the line separators of Unicode in them, and pairs with and without masks."""
    pairs = make_pairs()
    pairs[1].reports["own"] = "a\u2028b\x85c\x1cd\r\ne"
    (tmp_path / "out").mkdir()
    cfg = dpo.DPOConfig(out=str(tmp_path / "out"))
    dpo.write_pairs(cfg, pairs, {})
    for one, two in zip(pairs, dpo.read_pairs(tmp_path / "out/pairs"), strict=True):
        assert (one.index, one.name, one.kind, one.chosen, one.reports, one.entropy, one.structure) == (
            two.index, two.name, two.kind, two.chosen, two.reports, two.entropy, two.structure)
        for name in ("codes", "distorted", "proposals", "scores"):
            a, b = getattr(one, name), getattr(two, name)
            assert (a is None and b is None) or np.array_equal(a, b)


def test_pairs_that_cannot_be_read_are_named(trained, tmp_path):
    flags = copy_stages(trained, tmp_path / "out", "vqgan", "sft", "pairs")
    (tmp_path / "out/pairs/pairs.jsonl").write_text('{"name": "x"}\n')
    with pytest.raises(UserError, match="pairs cannot be read"):
        dpo.main(flags)


def test_resume_knows_the_model_it_started_from(trained, tmp_path):
    flags = copy_stages(trained, tmp_path / "out", "vqgan", "sft", "pairs", "dpo")
    model = GPT.from_pretrained(tmp_path / "out/sft")
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    model.save_pretrained(tmp_path / "out/sft")
    with pytest.raises(UserError, match="was started from another .*sft"):
        dpo.main([*flags, "--resume"])


def test_stopped_and_resumed_equals_never_stopped(trained, tmp_path, monkeypatch):
    whole, halved = (copy_stages(trained, tmp_path / n, "vqgan", "sft", "pairs") for n in ("whole", "halved"))
    steps = ["--steps", "8", "--save-every", "4"]
    dpo.main([*whole, *steps])
    save_state = dpo.save_state

    def save_and_die(*args, **kwargs):
        save_state(*args, **kwargs)
        raise KeyboardInterrupt
    monkeypatch.setattr(dpo, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        dpo.main([*halved, *steps])
    monkeypatch.undo()
    dpo.main([*halved, *steps, "--resume"])
    whole, halved = (read_tensors(tmp_path / n / "dpo/model.safetensors") for n in ("whole", "halved"))
    assert all(torch.equal(whole[k], halved[k]) for k in whole)


@pytest.mark.parametrize("flags, message", [
    (["--distort", "melt"], "--distort melt is unknown; there are: noise"),
    (["--rejected", "nobody"], "--rejected nobody is unknown; there are: distorted"),
    (["--strength", "2000"], "from 1 to 1000"),
    (["--flip-pairs", "1.5"], "--flip-pairs 1.5 is a share"),
    (["--objective", "napo", "--q-min", "0"], "--q-min 0.0 and --q-max 1.0 must lie"),
    (["--objective", "rndpo", "--proposals", "1"], "leaves nothing to compare"),
    (["--name", "sft"], "is taken"),
    (["--name", "control"], "goes with --objective sft"),
    (["--name", "../up"], "no plain name"),
    (["--bias", "0.5"], "was trained on phantoms --bias 0.9"),
])
def test_bad_flags_are_refused_in_one_sentence(trained, flags, message):
    with pytest.raises(UserError, match=message):
        dpo.main(["--preset", "tiny", "--out", str(trained), *flags])


def test_an_unknown_objective_is_named_with_those_that_exist(capsys):
    with pytest.raises(SystemExit) as stop:
        dpo.main(["--objective", "ppo"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and all(o in error for o in dpo.OBJECTIVES)


def test_rndpo_without_masks_is_refused(trained, tmp_path, monkeypatch):
    flags = copy_stages(trained, tmp_path / "out", "vqgan", "sft", "pairs")
    record = Phantoms.__getitem__
    monkeypatch.setattr(Phantoms, "__getitem__", lambda self, i: replace(record(self, i), masks={}))
    with pytest.raises(UserError, match="rndpo compares masks, and no training record has any"):
        dpo.main([*flags, "--objective", "rndpo"])


def test_models_of_two_tokenizers_do_not_mix(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    path = tmp_path / "out/sft/config.json"
    path.write_text(path.read_text().replace('"vqgan_hash": "', '"vqgan_hash": "0'))
    with pytest.raises(UserError, match="another image tokenizer"):
        dpo.main(["--preset", "tiny", "--out", str(tmp_path / "out")])
