"""Stage 2: the objectives' known values and gradients, pairs and what each writer is shown, the loop as a user runs it."""

import contextlib
import dataclasses
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dpo
from conftest import Blind, Means
from data import PHRASES, Finding, Phantoms, Record, read_findings
from model import GPT, GPTConfig, UserError, cli, read_log, read_tensors, sequence_logps
from sft import INSTRUCTIONS, Vocabulary, collate, encode_records
from vqgan import stack, to_pixels

VOCAB = Vocabulary.train(["Enlarged heart. No effusion. Normal."] * 3, codebook_size=8, text_size=300)
REPORTS = {"distorted": "Normal.", "own": "Enlarged heart. Left effusion.", "habit": "No effusion.",
           "no-question": "Left effusion."}
# the terms of each objective; bidpo's anchor holds two sequences
TERMS = {"dpo": ["text"], "bidpo": [*dpo.BOTH_WAYS, "anchor", "anchor"],
         "mdpo": ["text", "text_given", "anchor"], "mfpo": ["text", "text_given", "anchor"],
         "napo": ["text", "language", "vision"], "rndpo": ["mask", "image"]}


def make_pairs():
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8]], np.float32)
    masks = np.array([[1, 1, 1, 1], [1, 1, 2, 2], [5, 1, 1, 6]])
    return [dpo.Pair(0, "a", "remove", np.array([1, 2, 3, 4]), np.array([1, 2, 7, 4]), "Enlarged heart.", "Normal.", "Is it big?",
                     ("Yes.", "No."), dict(REPORTS), 0.5, "heart", masks, scores),
            dpo.Pair(1, "b", "add", np.array([0, 0, 3, 4]), np.array([5, 2, 7, 4]), "Normal.", reports=dict(REPORTS))]


def config(objective, *flags):
    return cli(dpo.DPOConfig, dpo.PRESETS, ["--preset", "tiny", "--objective", objective, *flags],
               choice=("objective", dpo.OBJECTIVE_DEFAULTS))


def sided(pairs, cfg):
    """The pairs with their sides taken, and which of them count."""
    dpo.set_responses(pairs, cfg)
    return pairs, dpo.pairs_that_count(pairs, cfg, PHRASES)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB.size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16))


# Objectives: known values


def scored(cfg, B=3, seed=None):
    """Log-ratios (0, or random) of an objective's sequences, with random counts of tokens; and keeps, all 1."""
    torch.manual_seed(seed or 0)
    ratio = lambda: (torch.zeros(B) if seed is None else torch.randn(B)).requires_grad_()
    count, ratios = lambda: torch.randint(2, 9, (B,)), {}
    for name in dpo.sequences_of(cfg):
        other = ratios.get(name.replace("rejected", "chosen"))       # two images differ in as many codes from either side
        ratios[name] = dpo.Sums(ratio(), count(), ratio(), other.omega_tokens if other else count())
    return ratios, {name: torch.ones(B) for name in (*dpo.contrasts_of(cfg), *dpo.chosen_of(cfg))}


def sums(whole, tokens=1):
    """Sums over responses that differ from each other in every token."""
    whole, tokens = torch.as_tensor(whole), torch.as_tensor(tokens).expand(len(whole))
    return dpo.Sums(whole, tokens, whole, tokens)


def contrast(margin, mean_log_ratio=0.0, keep=1.0):
    """A Contrast of pairs that all count, unless told otherwise."""
    margin = torch.as_tensor(margin)
    return dpo.Contrast(margin, *(torch.as_tensor(v).expand(margin.shape) for v in (mean_log_ratio, keep)))


LOG2 = math.log(2)
AT_0 = {"language": 0.5, "vision": 0.5}                      # NaPO's q is 2·(1 − ½) = 1, so a term is (1 − 2^−1)/1


@pytest.mark.parametrize("objective", TERMS)
def test_loss_at_step_0(objective):
    """Policy == reference: log 2 a preference and a sequence of the anchor; NaPO's terms are ½."""
    cfg = config(objective)
    loss, terms, contrasts = dpo.objective_loss(*scored(cfg), cfg)
    expected = sum(getattr(cfg, f"{name}_weight") * AT_0.get(name, LOG2) for name in TERMS[objective])
    assert loss.item() == pytest.approx(expected, rel=1e-5) and terms.keys() == set(TERMS[objective])
    assert all((c.margin == 0).all() and (c.mean_log_ratio == 0).all() for c in contrasts.values())


def plain_loss(objective, r, cfg):
    """Each objective written out with log and σ, on log-ratios {sequence: Sums}."""
    nls = lambda z: -torch.log(torch.sigmoid(z)).mean()
    difference = lambda a, b: cfg.beta * (r[a].whole - r[b].whole)
    text = lambda: cfg.text_weight * nls(difference("text_chosen", "text_rejected"))
    given = lambda: cfg.text_given_weight * nls(difference("text_chosen", "text_given"))
    anchor = lambda name: cfg.anchor_weight * nls(cfg.beta * r[name].whole - cfg.anchor_delta)
    if objective == "dpo":
        return text()
    if objective in ("mdpo", "mfpo"):
        return text() + given() + anchor("text_chosen")
    if objective == "bidpo":
        image = cfg.image_weight * nls(difference("image_chosen", "image_rejected"))
        image_given = cfg.image_given_weight * nls(difference("image_chosen", "image_given"))
        answer = cfg.answer_weight * nls(difference("answer_chosen", "answer_rejected"))
        answer_given = cfg.answer_given_weight * nls(difference("answer_chosen", "answer_given"))
        return text() + image + given() + image_given + answer + answer_given + anchor("text_chosen") + anchor("image_chosen")
    if objective == "rndpo":
        mean = lambda a, b: cfg.beta * (r[a].omega - r[b].omega) / r[a].omega_tokens
        mask, image = (nls(mean(f"{kind}_chosen", f"{kind}_rejected")) for kind in ("mask", "image"))
        return cfg.mask_weight * mask + cfg.image_weight * image
    total = text()
    for bias, weight in (("language", cfg.language_weight), ("vision", cfg.vision_weight)):
        w, l = r["text_chosen"], r[f"text_{bias}"]
        z = (cfg.language_alpha * (w.whole / w.tokens - l.whole / l.tokens) if bias == "language" else
             cfg.vision_alpha * (w.whole - l.whole))
        q = 2 * (1 - torch.sigmoid(z.mean()))
        q = q.clamp(cfg.q_min, cfg.q_max).item()
        total = total + weight * ((1 - torch.sigmoid(difference("text_chosen", f"text_{bias}")) ** q) / q).mean()
    return total


WEIGHTS = [f"--{name.replace('_', '-')}-weight" for name in (*dpo.BOTH_WAYS, "anchor", "language", "vision", "mask")]


@pytest.mark.parametrize("objective", TERMS)
@pytest.mark.parametrize("other", [False, True], ids=["defaults", "other weights"])
def test_value_and_gradient_are_those_of_the_plain_formula(objective, other):
    """By the objective's own weights, and by others that all differ."""
    others = [word for i, flag in enumerate(WEIGHTS) for word in (flag, str(2 + i))]
    cfg = config(objective, *others, "--anchor-delta", "0.3", "--language-alpha", "2", "--vision-alpha", "0.3") if other else config(objective)
    ratios, keep = scored(cfg, B=5, seed=1)
    loss, expected = dpo.objective_loss(ratios, keep, cfg)[0], plain_loss(objective, ratios, cfg)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    used = [v for r in ratios.values() for v in (r.whole, r.omega)]
    for ours, plain in zip(*(torch.autograd.grad(v, used, allow_unused=True) for v in (loss, expected))):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_gradient_at_the_start_is_minus_beta_over_2b():
    logps = torch.zeros(4, requires_grad=True)
    dpo.preference_loss(contrast(0.2 * logps)).mean().backward()
    torch.testing.assert_close(logps.grad, torch.full((4,), -0.2 / (2 * 4)))


def test_label_smoothing_takes_a_share_of_the_pairs_for_swapped():
    """(1 − ε)·(−log σ(z)) + ε·(−log σ(−z)), of dpo alone."""
    nls = lambda z: math.log(1 + math.exp(-z))
    assert dpo.preference_loss(contrast([1.5]), 0.2).item() == pytest.approx(0.8 * nls(1.5) + 0.2 * nls(-1.5), rel=1e-6)
    ratios, keep = {"text_chosen": sums([2.0]), "text_rejected": sums([-1.0])}, {"text": torch.ones(1)}
    loss = dpo.objective_loss(ratios, keep, config("dpo", "--beta", "1", "--label-smoothing", "0.2"))[0]
    assert loss.item() == pytest.approx(0.8 * nls(3) + 0.2 * nls(-3), rel=1e-6)


def test_anchor_by_hand():
    assert dpo.anchor_loss(torch.tensor(2.0), 0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_box_cox_runs_from_dpo_to_mae():
    """q → 0 is −log σ; q = 1 is 1 − σ; at margin 0 it is (1 − 2^−q)/q."""
    c = contrast([-30.0, -2.0, 0.0, 3.0])
    torch.testing.assert_close(dpo.box_cox_loss(c, 1e-6), dpo.preference_loss(c), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dpo.box_cox_loss(c, 1.0), 1 - torch.sigmoid(c.margin))
    for q in (0.1, 0.5, 0.9):
        assert dpo.box_cox_loss(contrast([0.0]), q).item() == pytest.approx((1 - 2 ** -q) / q, rel=1e-5)


def test_q_rises_where_log_ratios_are_near_zero_and_carries_no_gradient():
    cfg, one = config("napo", "--q-max", "0.8"), torch.ones(1)
    mean = torch.tensor([0.3], requires_grad=True)
    q = lambda log_ratio: dpo.noise_q(torch.as_tensor([log_ratio]), one, 2.0, cfg).item()
    assert q(0.3) == pytest.approx(2 * (1 - 1 / (1 + math.exp(-2 * 0.3))))
    assert q(-1.0) == pytest.approx(cfg.q_max) and q(50.0) == pytest.approx(cfg.q_min)
    assert not dpo.noise_q(mean, one, 2.0, cfg).requires_grad


def test_q_looks_at_the_pairs_that_count_only():
    values, keep = torch.tensor([5.0, 8.0]), torch.tensor([0.0, 1.0])
    assert dpo.noise_q(values, keep, 0.1, config("napo")).item() == pytest.approx(2 * (1 - 1 / (1 + math.exp(-0.8))))


def test_napos_two_alphas_look_at_tokens_and_at_whole_reports(monkeypatch):
    """Without β: the chosen one gains nothing, the rejected one of two tokens loses 16 nats, so 8 a token."""
    asked = []
    monkeypatch.setattr(dpo, "noise_q", lambda values, keep, alpha, cfg: asked.append((values.tolist(), alpha)) or 0.5)
    ratios = {"text_chosen": sums([0.0]), **{f"text_{k}": sums([-16.0], tokens=2) for k in ("rejected", "language", "vision")}}
    dpo.objective_loss(ratios, dict.fromkeys(("text", "language", "vision"), torch.ones(1)), config("napo"))
    assert asked == [([8.0], 0.5), ([16.0], 0.01)]


def test_each_term_has_its_own_margin_and_weight():
    weights = [w for i, name in enumerate(dpo.BOTH_WAYS) for w in (f"--{name.replace('_', '-')}-weight", str(10 ** i))]
    cfg = config("bidpo", "--beta", "1", "--anchor-weight", "0", *weights)
    ratios = {k: sums([v]) for k, v in dict(text_chosen=0.5, text_rejected=-0.5, text_given=-1.5, image_chosen=2.0, image_rejected=-1.0,
                                            image_given=-2.0, answer_chosen=5.0, answer_rejected=0.0, answer_given=-1.0).items()}
    loss, _, _ = dpo.objective_loss(ratios, dict.fromkeys((*dpo.BOTH_WAYS, "text_chosen"), torch.ones(1)), cfg)
    softplus = lambda z: math.log(1 + math.exp(z))
    assert loss.item() == pytest.approx(sum(10 ** i * softplus(-margin) for i, margin in enumerate(range(1, 7))), rel=1e-5)


def test_pairs_that_do_not_count_are_left_out_of_the_mean():
    values = torch.tensor([1.0, 100.0, 3.0])
    assert dpo.masked_mean(values, torch.tensor([1.0, 0.0, 1.0])) == 2.0
    assert dpo.masked_mean(values, torch.zeros(3)) == 0.0
    cfg = config("dpo")
    ratios, keep = scored(cfg, B=2, seed=1)
    both, _, _ = dpo.objective_loss(ratios, {"text": torch.tensor([0.0, 1.0])}, cfg)
    last = {name: dpo.Sums(*(v[1:] for v in r)) for name, r in ratios.items()}
    torch.testing.assert_close(both, dpo.objective_loss(last, {"text": torch.ones(1)}, cfg)[0])


def test_objective_defaults_come_between_preset_and_flags():
    own, published = dpo.DPOConfig.beta, dpo.OBJECTIVE_DEFAULTS["dpo"]["beta"]
    assert (config("bidpo").beta, config("dpo").beta, config("dpo", "--beta", "2").beta) == (own, published, 2.0)
    assert own != published
    assert config("mfpo").curriculum == "easy-first" and config("mdpo").curriculum == "none"
    assert config("rndpo").normalise and not config("bidpo").normalise
    assert dpo.OBJECTIVES.keys() == dpo.OBJECTIVE_DEFAULTS.keys() == {*TERMS, "sft"}


# Scores


def test_score_sums_responses_and_the_codes_that_differ(model):
    """By hand from the logits: pair a's images differ in the third of four codes."""
    names = dpo.sequences_of(config("rndpo"))
    pairs, _ = sided(make_pairs(), config("rndpo"))
    ids, labels, parts = dpo.pair_batch(pairs, [0, 1], names, VOCAB, "cpu")
    assert ids.shape[:2] == labels.shape[:2] == (len(names), 2)
    found = dpo.sum_logps(model, ids, labels, parts, names)
    for i, name in enumerate(names):
        torch.testing.assert_close(found[name].whole, sequence_logps(model, ids[i], labels[i]))
    row = names.index("image_chosen")
    start = (labels[row, 0] != -100).nonzero()[0, 0]
    logps = model(ids[row, :1])[0].log_softmax(-1)
    torch.testing.assert_close(found["image_chosen"].omega[0], logps[start + 1, ids[row, 0, start + 2]])
    image, mask, text = (found[f"{k}_chosen"] for k in ("image", "mask", "text"))
    assert image.omega_tokens.tolist() == [1, 3] and image.tokens.tolist() == [5, 5]           # 4 codes, </image>
    # masks: 1 1 1 1 over 5 1 1 6; the pair without masks compares its image with itself
    assert mask.omega_tokens.tolist() == [2, 0]
    # what is compared with nothing code by code: all its tokens
    alone = dpo.sum_logps(model, ids[row:row + 1], labels[row:row + 1], None, ("image_chosen",))["image_chosen"]
    for whole in (text, alone):
        assert torch.equal(whole.omega, whole.whole) and torch.equal(whole.omega_tokens, whole.tokens)


def test_the_normalised_margin_by_hand():
    cfg = config("rndpo", "--beta", "3")
    ratios, keep = scored(cfg, B=1, seed=2)
    chosen, rejected = ratios["mask_chosen"], ratios["mask_rejected"]._replace(omega_tokens=torch.tensor([1]))
    ratios = {"mask_chosen": chosen._replace(omega_tokens=torch.tensor([4])), "mask_rejected": rejected}
    margin = lambda cfg: dpo.make_contrast("mask", ratios, keep["mask"], cfg).margin
    torch.testing.assert_close(margin(cfg), 3 * (chosen.omega - rejected.omega) / 4)
    torch.testing.assert_close(margin(replace(cfg, normalise=False)), 3 * (chosen.whole - rejected.whole))
    # two texts are not compared token by token
    texts = {"text_chosen": chosen, "text_rejected": rejected}
    text = dpo.make_contrast("text", texts, keep["mask"], cfg)
    torch.testing.assert_close(text.margin, 3 * (chosen.whole - rejected.whole))
    torch.testing.assert_close(text.mean_log_ratio, chosen.whole / chosen.tokens - rejected.whole / rejected.tokens)


@pytest.mark.parametrize("wording", range(3))
def test_what_each_sequence_holds(wording):
    """The response is the twin's, or the condition is; all else is the genuine study's."""
    pair = make_pairs()[0]
    pair.rejected, pair.masks, pair.wording = "Normal.", (pair.proposals[0], pair.proposals[2]), wording
    pair.twin_text, pair.question, pair.answers = "Effusion.", "Is it large?", ("Yes.", "No.")
    made = {name: dpo.pair_example(pair, name, VOCAB) for name in dpo.SEQUENCES}
    on_genuine, on_distorted = (VOCAB.ask_prompt(c, INSTRUCTIONS["report"][wording]) for c in (pair.codes, pair.distorted))
    draw = [VOCAB.bos, *VOCAB.encode_text(INSTRUCTIONS["generate"][wording].format(pair.chosen)), VOCAB.boi]
    draw_twin = [VOCAB.bos, *VOCAB.encode_text(INSTRUCTIONS["generate"][wording].format("Effusion.")), VOCAB.boi]
    ask, ask_twin = (VOCAB.ask_prompt(c, "Is it large?") for c in (pair.codes, pair.distorted))
    segment = VOCAB.segment_prompt(pair.codes, "heart", wording)
    words, codes = VOCAB.text_response, VOCAB.image_response
    assert made == {"text_chosen": (on_genuine, words("Enlarged heart.")), "text_rejected": (on_genuine, words("Normal.")),
                    "text_language": (on_genuine, words(REPORTS["habit"])),
                    "text_vision": (on_genuine, words(REPORTS["no-question"])),
                    "text_given": (on_distorted, words("Enlarged heart.")),
                    "image_chosen": (draw, codes(pair.codes)), "image_rejected": (draw, codes(pair.distorted)),
                    "image_given": (draw_twin, codes(pair.codes)), "answer_chosen": (ask, words("Yes.")),
                    "answer_rejected": (ask, words("No.")), "answer_given": (ask_twin, words("Yes.")),
                    "mask_chosen": (segment, codes([1, 1, 1, 1])), "mask_rejected": (segment, codes([5, 1, 1, 6]))}
    assert on_genuine != on_distorted and codes(pair.codes) != codes(pair.distorted)


@pytest.mark.parametrize("objective", dpo.OBJECTIVES)
def test_every_objective_trains_on_the_controls_chosen_sequences(objective):
    cfg = config(objective)
    names = dpo.sequences_of(cfg)
    assert names[:2] == dpo.CHOSEN == dpo.sequences_of(config("sft"))[:2] and set(dpo.chosen_of(cfg)) <= set(dpo.chosen_of(config("sft")))
    pairs, _ = sided(make_pairs(), cfg)
    whole, *_ = dpo.pair_batch(pairs, [0, 1], names, VOCAB, "cpu")
    control, *_ = dpo.pair_batch(pairs, [0, 1], dpo.CHOSEN, VOCAB, "cpu")
    assert whole.shape[:2] == (len(names), 2) and torch.equal(whole[:2, :, :control.size(2)], control)


def test_sequences_that_show_the_same_image_or_report_are_a_family():
    """Of each pair: the genuine image, the twin's, the report of both, that of the twin. Numbered sequence by sequence."""
    pairs, names = sided(make_pairs(), config("bidpo"))[0], dpo.sequences_of(config("bidpo"))
    for pair in pairs:
        pair.twin_text = "Of the twin."
    families = dpo.families_of(pairs, [0, 1], names)
    together = [{"text_chosen", "text_rejected", "answer_chosen", "answer_rejected"}, {"text_given", "answer_given"},
                {"image_chosen", "image_rejected"}, {"image_given"}]
    found = {(frozenset(names[i // 2] for i in family), *{i % 2 for i in family}) for family in families}
    assert found == {(frozenset(t), pair) for t in together for pair in (0, 1)} and len(families) == 8


def test_log_ratios_are_zero_at_step_0(model):
    """The reference's numbers, made before the loop in order, are the policy's in any batch."""
    cfg = config("rndpo", "--batch-size", "1")
    (pairs, _), names = sided(make_pairs(), cfg), dpo.sequences_of(cfg)
    reference = dpo.sum_reference_logps(model, pairs, names, VOCAB, cfg, contextlib.nullcontext)
    assert not any(r.whole.requires_grad for r in reference.values())
    policy = dpo.sum_logps(model, *dpo.pair_batch(pairs, [1, 0], names, VOCAB, "cpu"), names)
    for name, ratio in dpo.log_ratios(policy, reference, torch.tensor([1, 0])).items():
        for v in (ratio.whole, ratio.omega):
            torch.testing.assert_close(v, torch.zeros(2), atol=1e-4, rtol=0)
        assert ratio.tokens is policy[name].tokens and (policy[name].whole < -1).all()


@pytest.mark.parametrize("objective", TERMS)
def test_margins_grow_on_one_batch_in_every_contrast(model, objective):
    cfg = config(objective)
    (pairs, keep), names = sided(make_pairs(), cfg), dpo.sequences_of(cfg)
    keep = {k: torch.tensor(v).float() for k, v in keep.items()}
    reference = dpo.sum_reference_logps(model, pairs, names, VOCAB, cfg, contextlib.nullcontext)
    batch = dpo.pair_batch(pairs, [0, 1], names, VOCAB, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        ratios = dpo.log_ratios(dpo.sum_logps(model, *batch, names), reference, torch.arange(2))
        loss, _, contrasts = dpo.objective_loss(ratios, keep, cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, c in contrasts.items():
        assert dpo.masked_mean(c.margin, keep[name]) > 0.01, name


def test_the_nll_counts_of_each_pair_what_it_has():
    policy = {"text_chosen": sums([-4.0, -6.0], tokens=5), "image_chosen": sums([-8.0, -2.0], tokens=4),
              "answer_chosen": sums([-1.0, -99.0], tokens=2)}
    keep = {"text_chosen": torch.ones(2), "image_chosen": torch.ones(2), "answer_chosen": torch.tensor([1.0, 0.0])}
    assert dpo.chosen_nll(policy, keep, config("bidpo")).item() == pytest.approx(21 / 20)      # 20 nats and 1 over 18 + 2 tokens
    assert dpo.chosen_nll(policy, keep, config("dpo")).item() == pytest.approx(20 / 18)
    keep |= dict.fromkeys(dpo.CHOSEN, torch.tensor([0.0, 1.0]))
    assert dpo.chosen_nll(policy, keep, config("bidpo")).item() == pytest.approx((6 + 2 + 1) / (5 + 4 + 2))
    assert dpo.chosen_nll(policy, dict.fromkeys(dpo.CHOSEN, torch.zeros(2)), config("dpo")).item() == 0


def test_the_anchor_counts_pairs_with_a_report_alone():
    cfg = config("mdpo", "--beta", "1", "--text-weight", "0", "--text-given-weight", "0")
    ratios = dict.fromkeys(("text_chosen", "text_rejected", "text_given"), sums([-1.0, -50.0]))
    keep = dict.fromkeys(("text", "text_given"), torch.ones(2)) | {"text_chosen": torch.tensor([1.0, 0.0])}
    assert dpo.objective_loss(ratios, keep, cfg)[0].item() == pytest.approx(math.log(1 + math.e))


def test_gradient_norms_are_those_of_each_weighted_term():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    unused = torch.nn.Parameter(torch.ones(1))
    losses = {"text": 2 * w.sum(), "sft": w.square().sum() / 2}
    norms = dpo.gradient_norms(losses, [w, unused], config("bidpo", "--text-weight", "3", "--sft-weight", "1"))
    assert norms["grad/text"].item() == pytest.approx(3 * 8 ** 0.5) and norms["grad/sft"].item() == pytest.approx(5.0)
    sum(losses.values()).backward()                             # the graph is still there
    assert w.grad.tolist() == [5.0, 6.0]


def test_the_log_tells_of_each_contrast_by_trls_names():
    cfg, policy = config("dpo", "--beta", "0.5"), {"text_chosen": sums([-7.0, 0.0]), "text_rejected": sums([-9.0, 0.0])}
    ratios = {"text_chosen": sums([3.0, 99.0]), "text_rejected": sums([1.0, -99.0])}
    found = dpo.contrast_metrics(ratios, policy, {"text": contrast([1.0, -1.0], keep=torch.tensor([1.0, 0.0]))}, cfg)
    assert {k: v.item() for k, v in found.items()} == {
        "rewards_text/chosen": 1.5, "rewards_text/rejected": 0.5, "rewards_text/margins": 1.0,
        "rewards_text/accuracies": 1.0, "logps_text/chosen": -7.0, "logps_text/rejected": -9.0}


# Pairs


def pairs_of(records, n=12, kinds=("noise", "mirror", "add"), seed=0, vqgan=None, candidates=1):
    cfg = dpo.DPOConfig(pairs=n, distort=kinds, seed=seed, candidates=candidates)
    vqgan = vqgan or Means()
    studies = encode_records(records, range(len(records)), vqgan, 0, contextlib.nullcontext)
    return dpo.build_pairs(records, studies, cfg, vqgan, None, contextlib.nullcontext)


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
        record = records[pair.index]
        encode = lambda image: Means().encode(to_pixels(stack([image], 1)))[0].numpy()
        assert np.array_equal(pair.codes, encode(record.image)) and (pair.name, pair.chosen) == (record.name, record.text)
        assert np.array_equal(pair.distorted, encode(255 - record.image)) and pair.kind == "invert"


def test_pairs_of_equal_codes_are_dropped_until_none_is_left():
    with pytest.raises(UserError, match=r"\b9\b.*--distort"):
        pairs_of([Phantoms("train", 9)[i] for i in range(9)], n=9, vqgan=Blind())


def test_records_that_no_distortion_fits_make_no_pairs(capsys):
    records = [Record(np.full((64, 64), 128, np.uint8), "Nodule.", str(i)) for i in range(3)]
    with pytest.raises(UserError, match=r"\b3\b.*--distort"):
        pairs_of(records, n=3, kinds=("invert",))                             # gray alone: inverted it is the same


def test_a_pair_of_phantoms_knows_the_twins_report_and_a_question_that_the_two_answer_differently():
    records = Phantoms("train", 20)
    for pair in pairs_of(records, n=20, kinds=("remove",)):
        named = {f.name for f in records[pair.index].findings}
        stated = {f.name for f in read_findings(pair.twin_text, PHRASES)}
        changed, = named ^ stated
        asked, = read_findings(pair.question.lower().replace("?", ""), PHRASES)
        assert asked.name == changed and pair.answers == (("Yes.", "No.") if changed in named else ("No.", "Yes."))


def test_other_pairs_take_a_question_of_the_record_that_the_model_answers_otherwise(monkeypatch):
    """What the SFT model says of the twin is the rejected answer, unless it says the same of the genuine image or is right."""
    pairs = [replace(make_pairs()[1], index=i) for i in range(4)] + make_pairs()[:1]
    studies = [SimpleNamespace(questions=(("Q?", "Yes."),)) if i < 3 else SimpleNamespace(questions=()) for i in range(5)]
    said = iter((["Yes.", "No.", "No."], ["Left.", "No.", "Yes."]))               # of the genuine images, of their twins
    monkeypatch.setattr(dpo, "sample_words", lambda model, vocab, prompts, *rest: next(said))
    dpo.add_questions(pairs, studies, None, VOCAB, contextlib.nullcontext)
    assert [(p.question, p.answers) for p in pairs] == [
        ("Q?", ("Yes.", "Left.")), ("", ("", "")), ("", ("", "")), ("", ("", "")), ("Is it big?", ("Yes.", "No."))]


def test_n_bounds_the_pairs_and_records_are_used_once():
    """Across the boundary of a batch of encodings too."""
    records = Phantoms("train", 300, size=16)
    pairs = pairs_of(records, n=1000, kinds=("invert",))
    assert len(pairs) == len({p.name for p in pairs}) == 300
    assert len(pairs_of(records, n=7, kinds=("invert",))) == 7


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


def test_a_hard_pair_is_the_one_given_whose_image_sft_finds_the_report_likeliest(tmp_path, monkeypatch, model):
    """Of four candidates neither the first nor the last."""
    one, other = make_pairs()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)                   # sharp attention: the image matters
    pairs = [*(replace(one, distorted=np.roll(one.distorted, k)) for k in range(4)), other]
    monkeypatch.setattr(dpo, "build_pairs", lambda *a: pairs)
    cfg, studies = config("dpo", "--out", str(tmp_path)), [SimpleNamespace(questions=())] * 2
    kept = dpo.load_or_build_pairs(cfg, [], studies, PHRASES, None, model, VOCAB, contextlib.nullcontext)
    examples = [(VOCAB.report_prompt(p.distorted), VOCAB.text_response(p.chosen)) for p in pairs[:4]]
    best = sequence_logps(model, *collate(examples, VOCAB.pad)).argmax()
    assert len(kept) == 2 and kept[0] is pairs[best] and kept[1] is other and 0 < best < 3


def test_which_reports_count_as_rejected():
    """pair b's own report is normal: only a rejected report that states a finding differs from it."""
    for flags, counts in (([], [True, False]), (["--rejected", "own"], [True, True]),
                          (["--rejected", "distorted", "own"], [True, True])):
        pairs, keep = sided(make_pairs(), config("dpo", *flags))
        assert keep["text"].tolist() == counts
    assert [p.rejected for p in pairs] == [REPORTS["distorted"], REPORTS["own"]]              # evenly mixed
    _, keep = sided(make_pairs(), config("napo"))
    assert keep["language"].tolist() == [True, False] and keep["vision"].tolist() == [True, True]
    _, keep = sided(make_pairs(), config("mdpo"))
    assert keep["text_given"].tolist() == [True, True] and keep.keys() == {"text", "text_given", *dpo.CHOSEN}
    assert sided(make_pairs(), config("sft"))[1].keys() == {*dpo.CHOSEN, "answer_chosen"}


def test_a_pair_counts_with_what_it_has():
    """pair a has report and question, b no question; c has a question alone."""
    a, b = make_pairs()
    keep = {k: v.tolist() for k, v in sided([a, b, replace(a, chosen="")], config("bidpo"))[1].items()}
    reports, questions = [1, 1, 0], [1, 0, 1]
    assert keep == {**dict.fromkeys(("text", "image_given"), [1, 0, 0]), **dict.fromkeys(("text_given", "image", *dpo.CHOSEN), reports),
                    **dict.fromkeys(("answer", "answer_given", "answer_chosen"), questions)}
    only_asked = sided([replace(a, chosen="")], config("bidpo"))[1]
    assert {k for k, v in only_asked.items() if v.any()} == {"answer", "answer_given", "answer_chosen"}
    for pairs, objective in (([replace(a, chosen="")], "dpo"), ([replace(b, chosen="")], "bidpo")):
        with pytest.raises(UserError, match=f"--objective {objective} finds no usable preference pair"):
            sided(pairs, config(objective))


def test_the_rejected_report_is_what_rejected_names():
    """In turn; the twin's own, or what the SFT model wrote of it where that has none."""
    pairs = [dpo.Pair(i, "", "", np.zeros(4), np.ones(4), "Y.", twin, reports={"distorted": "D.", "own": "O."})
             for i, twin in enumerate(["T.", ""])]
    for flags, expected in ((["distorted"], ["D.", "D."]), (["own", "distorted"], ["O.", "D."]), (["twin"], ["T.", "D."])):
        dpo.set_responses(pairs, config("dpo", "--rejected", *flags))
        assert [p.rejected for p in pairs] == expected


def test_wordings_differ_between_pairs_and_are_drawn_from_the_seed():
    def wordings(*flags):
        pairs = [p for _ in range(20) for p in make_pairs()]
        dpo.set_responses(pairs, config(*flags))
        return [p.wording for p in pairs]
    one = wordings("dpo", "--seed", "1")
    assert one == wordings("bidpo", "--seed", "1") != wordings("dpo", "--seed", "2")
    assert all(one.count(w) > 5 for w in range(3))


def test_masks_without_difference_do_not_count_and_none_left_is_refused():
    pairs, keep = sided(make_pairs(), config("rndpo"))
    assert keep["mask"].tolist() == [True, False]
    pairs[0].proposals[:] = 1
    with pytest.raises(UserError, match=r"--objective rndpo.*\bmask 0\b"):
        sided(pairs, config("rndpo"))
    for p in pairs:
        p.chosen = p.reports["distorted"] = "Normal."
    with pytest.raises(UserError, match=r"--objective dpo.*\btext 0\b"):
        sided(pairs, config("dpo"))


def test_masks_are_ranked_by_their_agreement_not_by_the_truth():
    """Agreement puts the first proposal of three above the last, the true mask the last above the first."""
    pairs, _ = sided(make_pairs(), config("rndpo"))
    assert [m.tolist() for m in pairs[0].masks] == [pairs[0].proposals[0].tolist(), pairs[0].proposals[2].tolist()]
    assert all((m == pairs[1].codes).all() for m in pairs[1].masks)


def test_pairs_that_agree_are_kept_when_asked():
    """Same finding in other words: no preference, unless one wants the noise; the same words never."""
    pairs = make_pairs()[:1] * 2
    pairs = [dataclasses.replace(p, chosen="Enlarged heart.", reports={"distorted": said})
             for p, said in zip(pairs, ("Cardiomegaly.", "Enlarged heart."))] + make_pairs()
    assert sided(pairs, config("dpo"))[1]["text"][:2].tolist() == [0, 0]
    assert sided(pairs, config("dpo", "--keep-agreeing"))[1]["text"][:2].tolist() == [1, 0]


def test_flipped_pairs_are_compared_the_wrong_way_round_and_else_stay():
    """Reports and masks; what is compared given another condition is not touched, nor what the NLL is taken of."""
    for objective, turned in (("mdpo", {"text"}), ("napo", {"text", "language", "vision"}), ("rndpo", {"mask"})):
        plain_pairs, plain = sided(make_pairs(), config(objective))
        pairs, flipped = sided(make_pairs(), config(objective, "--flip-pairs", "1"))
        assert {k for k in plain if (flipped[k] == -plain[k]).all()} == turned
        assert all((flipped[k] == plain[k]).all() for k in plain.keys() - turned)
        assert [(p.chosen, p.rejected) for p in pairs] == [(p.chosen, p.rejected) for p in plain_pairs]
    _, some = sided([p for _ in range(500) for p in make_pairs()], config("mdpo", "--flip-pairs", "0.3"))
    assert np.mean(some["text"][some["text"] != 0] < 0) == pytest.approx(0.3, abs=0.05)


def test_a_flipped_pair_pays_for_the_opposite_margin():
    cfg = config("dpo", "--beta", "1")
    ratios = {"text_chosen": sums([2.0]), "text_rejected": sums([-1.0])}
    loss, _, contrasts = dpo.objective_loss(ratios, {"text": torch.tensor([-1.0])}, cfg)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(3)), rel=1e-6)
    assert contrasts["text"].margin.item() == -3 and contrasts["text"].keep.item() == 1


def test_the_judge_ranks_and_errs():
    rng, scores = np.random.default_rng(0), np.array([0.1, 0.9, 0.5, 0.3])
    rank = lambda mining, noise: dpo.rank_proposals(scores, mining, noise, rng)
    assert rank("top-bottom", 0.0) == (1, 0) and rank("top-bottom", 1.0) == (0, 1)
    random = [rank("random", 0.0) for _ in range(80)]
    assert all(scores[a] > scores[b] for a, b in random) and len(set(random)) == 6
    # one comparison is wrong as often as the judge is; the whole ranking less often
    share = lambda mining: np.mean([scores[a] < scores[b] for a, b in (rank(mining, 0.3) for _ in range(2000))])
    assert share("random") == pytest.approx(0.3, abs=0.04) and share("top-bottom") < 0.22


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_judge_without_opinion_draws_lots(k):
    """Equal scores favour no proposal, and no pair is lost to a cycle of a noisy judge's comparisons."""
    rng = np.random.default_rng(0)
    drawn = [dpo.rank_proposals(np.full(k, 0.5), "top-bottom", noise, rng) for noise in (0.0, 0.4) for _ in range(1000)]
    assert all(a != b for a, b in drawn)
    assert np.bincount([a for a, _ in drawn]) / len(drawn) == pytest.approx(np.full(k, 1 / k), abs=0.05)


def without_masks(pairs):
    return [replace(p, structure="", proposals=None, scores=None) for p in pairs]


def test_proposals_are_scored_by_each_other_and_by_the_truth(monkeypatch):
    """Two of three drawn masks are the same and wrong, one is the truth: agreement and truth rank them differently."""
    truth, wrong = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    truth[:4], wrong[4:] = True, True
    records = [replace(Phantoms("train", 1)[0], masks={}), replace(Phantoms("train", 1)[0], masks={"heart": truth}, modality="MRI")]
    drawn, codes, asked = np.stack([wrong, truth, wrong]), np.arange(12).reshape(3, 4), []
    monkeypatch.setattr(dpo, "draw_masks", lambda model, vocab, vqgan, codes, structures, **options: asked.append(
        (np.stack(codes).tolist(), structures, options["temperature"])) or drawn)
    monkeypatch.setattr(dpo, "encode_images", lambda images, *a: codes if np.array_equal(images, drawn * np.uint8(255)) else None)
    pairs, cfg = without_masks(make_pairs()), config("rndpo")
    dpo.add_proposals(pairs, records, None, VOCAB, None, cfg, None)
    assert pairs[0].structure == "" and pairs[0].proposals is None and pairs[1].structure == "heart"
    np.testing.assert_allclose(pairs[1].scores, [[0.5, 0, 0.5], [0, 1, 0]])
    assert np.array_equal(pairs[1].proposals, codes)
    assert asked == [([pairs[1].codes.tolist()] * cfg.proposals, ["heart"] * cfg.proposals, cfg.pair_temperature)]


def test_images_without_masks_are_asked_for_what_all_others_of_their_kind_show(monkeypatch):
    """Both records with masks have a heart, one alone an effusion; no truth to be scored by."""
    record, truth = Phantoms("train", 1)[0], np.ones((8, 8), bool)
    records = [replace(record, masks={}), *(replace(record, masks=dict.fromkeys(names, truth)) for names in (("heart", "effusion"), ("heart",))),
               replace(record, masks={"ventricles": truth}, modality="head CT")]
    monkeypatch.setattr(dpo, "draw_masks", lambda model, vocab, vqgan, codes, *a, **options: np.ones((len(codes), 8, 8), bool))
    monkeypatch.setattr(dpo, "encode_images", lambda images, *a: np.arange(4 * len(images)).reshape(-1, 4))
    pairs = without_masks(make_pairs())[:1]
    dpo.add_proposals(pairs, records, None, VOCAB, None, config("rndpo"), None)
    assert pairs[0].structure == "heart" and pairs[0].scores[0].tolist() == [1, 1, 1] and np.isnan(pairs[0].scores[1]).all()


def test_semantic_entropy_by_hand(monkeypatch):
    """Four samples: two state one thing, in two wordings, two another: log 2; all alike: 0."""
    texts = iter((["Left effusion.", "Normal."], ["There is a left effusion.", "Normal."], ["Normal.", "normal."],
                  ["Clear.", "Normal."]))
    monkeypatch.setattr(dpo, "sample_reports", lambda *a: next(texts))
    pairs = make_pairs()
    dpo.add_entropy(pairs, None, VOCAB, config("mfpo", "--entropy-samples", "4"), PHRASES)
    assert pairs[0].entropy == pytest.approx(math.log(2)) and pairs[1].entropy == 0


@pytest.mark.parametrize("objective, flags, added", [
    ("bidpo", [], set()), ("sft", [], set()), ("dpo", ["--rejected", "own"], {"own"}), ("dpo", ["--rejected", "twin"], set()),
    ("napo", [], {"habit", "no-question"}), ("mfpo", [], {"entropy"}), ("rndpo", [], {"masks"})])
def test_what_the_objective_needs_is_added_and_nothing_else(monkeypatch, objective, flags, added):
    done = set()
    monkeypatch.setattr(dpo, "sample_reports", lambda pairs, writer, *a: done.add(writer) or ["New."] * len(pairs))
    monkeypatch.setattr(dpo, "add_entropy", lambda *a: done.add("entropy"))
    monkeypatch.setattr(dpo, "add_proposals", lambda pairs, *a: done.add("masks") or setattr(pairs[0], "structure", "heart"))
    pairs = [replace(p, reports={"distorted": "Normal."}, entropy=None) for p in without_masks(make_pairs())]
    add = lambda: dpo.add_missing(pairs, config(objective, *flags), [], PHRASES, None, VOCAB, None, None)
    assert add() == bool(added) and done == added
    assert all(p.reports == {"distorted": "Normal."} | dict.fromkeys(added - {"entropy", "masks"}, "New.") for p in pairs)
    for p in pairs:
        p.entropy = 0.5                                      # as add_entropy would have
    done.clear()
    assert not add() and not done


def test_masks_that_no_record_has_are_asked_for():
    records = [replace(Phantoms("train", 2)[i], masks={}) for i in range(2)]
    with pytest.raises(UserError, match="--objective rndpo"):
        dpo.add_missing(without_masks(make_pairs()), config("rndpo"), records, PHRASES, None, VOCAB, None, None)


def test_the_curriculum_takes_one_third_after_the_other():
    pairs = [replace(make_pairs()[0], entropy=float(e)) for e in (5, 1, 4, 2, 3, 0)]

    def seen(order):
        cfg = config("dpo", "--curriculum", order, "--steps", "9", "--batch-size", "2")
        return [sorted(pairs[i].entropy for i in dpo.pick_pairs(pairs, cfg, step)) for step in range(9)]
    assert seen("easy-first") == [[0, 1]] * 3 + [[2, 3]] * 3 + [[4, 5]] * 3
    assert seen("hard-first") == seen("easy-first")[::-1]
    assert seen("shuffled")[::3] not in (seen("easy-first")[::3], seen("hard-first")[::3])
    assert sorted(sum(seen("shuffled")[::3], [])) == list(range(6))
    two = [dpo.pick_pairs(pairs[:2], config("mfpo", "--steps", "6", "--batch-size", "1"), step)[0] for step in range(6)]
    assert two == [1, 1, 0, 0, 1, 1]                                    # fewer than three pairs come again, in this order
    plain = config("dpo", "--batch-size", "3")
    assert sorted(np.concatenate([dpo.pick_pairs(pairs, plain, step) for step in (0, 1)])) == list(range(6))


def test_each_third_of_a_curriculum_has_a_schedule_of_its_own():
    cfg = config("mfpo", "--steps", "10")
    assert [dpo.schedule(cfg, step) for step in range(10)] == [*zip(range(4), [4] * 4), *zip(range(3), [3] * 3),
                                                               *zip(range(3), [3] * 3)]
    thirds = [3 * step // 10 for step in range(10)]                     # as pick_pairs has them
    assert thirds == [0] * 4 + [1] * 3 + [2] * 3
    assert dpo.schedule(config("mdpo", "--steps", "10"), 7) == (7, 10)


def test_data_that_only_ask_teach_answers_alone(out, monkeypatch):
    """Reports and images neither gain nor are rehearsed as chosen; the objectives that compare reports refuse."""
    records = [replace(r, text="", spec=None) for r in Phantoms("train", 40, size=32)]
    monkeypatch.setattr(dpo, "open_data", lambda cfg: {"train": records})
    run(out, "--name", "asked", "--log-every", "1")
    pairs, log = rows_of(out), read_log(out / "asked.jsonl")
    assert pairs and all(not p["chosen"] and p["question"] and p["answers"][0] != p["answers"][1] for p in pairs)
    for row in log:
        assert row["loss_answer"] > 0 and row["loss_text"] == row["loss_image"] == row["loss_anchor"] == 0
        assert row["drift/text_chosen"] == row["drift/image_chosen"] == 0           # nothing of theirs was chosen
    assert log[-1]["rewards_answer_given/margins"] > 0
    run(out, "--objective", "sft")
    with pytest.raises(UserError, match="--objective mdpo finds no usable .*none has a report"):
        run(out, "--objective", "mdpo")


def test_the_loop_follows_the_curriculum(out, monkeypatch):
    """In each third of the steps the pairs of one entropy, and a learning rate that starts anew."""
    rows, seen, batch = rows_of(out), [], dpo.pair_batch
    (out / "pairs/pairs.jsonl").write_text("".join(json.dumps(row | {"entropy": i % 3}) + "\n" for i, row in enumerate(rows)))
    monkeypatch.setattr(dpo, "pair_batch", lambda pairs, indices, *rest:
                        seen.append({pairs[i].entropy for i in indices}) or batch(pairs, indices, *rest))
    run(out, "--objective", "mfpo", "--steps", "6", "--log-every", "1")
    assert seen[-6:] == [{0}, {0}, {1}, {1}, {2}, {2}]
    lrs = [row["lr"] for row in read_log(out / "mfpo.jsonl")]
    assert lrs == lrs[:2] * 3 and lrs[0] > lrs[1]


def test_each_writer_sees_what_it_should(monkeypatch):
    pair, said = make_pairs()[0], []
    monkeypatch.setattr(dpo, "sample_words", lambda model, vocab, prompts, *a: said.append(prompts) or ["And so on."] * len(prompts))
    written = {w: dpo.sample_reports([pair], w, None, VOCAB, config("napo"), 0) for w in dpo.WRITERS}
    seen = {w: prompts[0] for w, (prompts,) in zip(dpo.WRITERS, zip(said))}
    ask = lambda codes, words=INSTRUCTIONS["report"][0]: VOCAB.ask_prompt(codes, words)
    begun = dpo.beginning(pair.chosen)
    assert seen == {"own": ask(pair.codes), "distorted": ask(pair.distorted), "no-question": ask(pair.codes, ""),
                    "habit": ask(dpo.scrambled(pair)) + VOCAB.encode_text(begun)}
    assert written == {w: [f"{begun} And so on." if w == "habit" else "And so on."] for w in dpo.WRITERS}
    assert sorted(dpo.scrambled(pair)) == sorted(pair.codes) and seen["habit"] != seen["own"]


def test_a_report_begins_with_its_opening_and_its_first_finding():
    assert dpo.beginning("Chest radiograph. Cardiomegaly. Small left effusion. No nodule.") == "Chest radiograph. Cardiomegaly."
    for short in ("Head CT. Unremarkable brain.", "Atrophy.", ""):
        assert dpo.beginning(short) == short


def test_the_key_region_is_what_the_report_hangs_on(monkeypatch, model):
    """Hiding block 5 costs 3 nats and block 6 two, others one: the region is blocks 5 and 6; nothing costs: none."""
    costs = torch.tensor([0.0] + [1.0] * 16)
    costs[6], costs[7] = 3.0, 2.0
    record = Record(np.full((64, 64), 200, np.uint8), "Enlarged heart.", "x", (Finding("cardiomegaly"),))
    ask = lambda: dpo.key_region(record, model, VOCAB, Small(), contextlib.nullcontext)
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


# Pairs on disk


def test_pairs_come_back_as_they_were_written(tmp_path):
    """Also reports of scrambled words, with the line separators of Unicode in them, and pairs with and without masks."""
    pairs = make_pairs()
    pairs[1].reports["own"] = "a\u2028b\x85c\x1cd\r\ne"
    dpo.write_pairs(dpo.DPOConfig(out=str(tmp_path)), pairs, {})
    for one, two in zip(pairs, dpo.read_pairs(tmp_path / "pairs", 99), strict=True):
        assert (one.index, one.name, one.kind, one.chosen, one.reports, one.entropy, one.structure) == (
            two.index, two.name, two.kind, two.chosen, two.reports, two.entropy, two.structure)
        for name in ("codes", "distorted", "proposals", "scores"):
            a, b = getattr(one, name), getattr(two, name)
            assert (a is None and b is None) or np.array_equal(a, b)


@pytest.mark.parametrize("file, content", [
    ("pairs.jsonl", b'{"name": "x"}\n'), ("pairs.jsonl", b""), ("pairs.jsonl", b"[]\n[]\n"), ("config.json", b"{"),
    ("pairs.jsonl", b"\xff\n\xff\n"), ("codes.safetensors", b"x"), ("codes.safetensors", None)])
def test_damaged_pairs_are_built_anew(out, capsys, file, content):
    before = rows_of(out)
    (out / "pairs" / file).unlink()
    if content is not None:
        (out / "pairs" / file).write_bytes(content)
    run(out, "--steps", "1")
    assert str(out / "pairs") in capsys.readouterr().out and rows_of(out) == before


def test_codes_out_of_range_are_damage(tmp_path, capsys):
    dpo.write_pairs(dpo.DPOConfig(out=str(tmp_path)), make_pairs(), {})
    most = max(max(p.codes.max(), p.distorted.max()) for p in make_pairs())
    assert dpo.read_pairs(tmp_path / "pairs", most + 1) and dpo.read_pairs(tmp_path / "pairs", most) is None
    assert str(tmp_path / "pairs") in capsys.readouterr().out


# The program


def run(out, *flags):
    dpo.main(["--preset", "tiny", "--dtype", "float32", "--out", str(out), *flags])


def rows_of(out):
    """The lines of out/pairs/pairs.jsonl."""
    return [json.loads(line) for line in (out / "pairs/pairs.jsonl").read_text().splitlines()]


def test_the_log_starts_at_log_2_with_margins_0(trained):
    first = read_log(trained / "bidpo.jsonl")[0]
    assert first["step"] == 0 and first["loss_anchor"] == pytest.approx(2 * LOG2, abs=1e-4)
    for name in dpo.contrasts_of(config("bidpo")):
        assert first[f"loss_{name}"] == pytest.approx(LOG2, abs=1e-4)
        assert first[f"rewards_{name}/margins"] == pytest.approx(0, abs=1e-4)
    assert first["drift/text_chosen"] == pytest.approx(0, abs=1e-4)


def test_the_loss_is_the_objective_and_the_two_sft_terms(trained):
    """As the log has them, weighed as the flags say, in the first step and in the last."""
    for name, objective in (("bidpo", "bidpo"), ("control", "sft")):
        cfg, rows = config(objective), read_log(trained / f"{name}.jsonl")
        assert [rows[0]["step"], rows[-1]["step"]] == [0, cfg.steps - 1]
        for row in rows:
            terms = {k.removeprefix("loss_"): v for k, v in row.items() if k.startswith("loss_")}
            assert terms.keys() == set(TERMS.get(objective, ()))
            expected = sum(getattr(cfg, f"{term}_weight") * v for term, v in terms.items()) \
                + cfg.sft_weight * row["nll_loss"] + cfg.rehearsal_weight * row["rehearsal_loss"]
            assert row["loss"] == pytest.approx(expected, abs=1e-4) and row["nll_loss"] > 0


def test_the_control_logs_no_preferences(trained):
    assert not any(k.startswith(("loss_", "rewards_", "logps_")) for row in read_log(trained / "control.jsonl") for k in row)


def test_every_objective_runs_on_the_same_pairs(out, capsys):
    """To the folder of its name. What it needs is added to out/pairs; what is there stays as it was."""
    before = rows_of(out)
    for objective in ("dpo", "mdpo", "mfpo", "napo", "rndpo"):
        run(out, "--steps", "2", "--objective", objective)
        terms = {k[5:] for k in read_log(out / f"{objective}.jsonl")[0] if k.startswith("loss_")}
        assert terms == set(TERMS[objective]) and (out / objective / "model.safetensors").exists()
    after = rows_of(out)
    assert [r["reports"]["distorted"] for r in after] == [r["reports"]["distorted"] for r in before]
    assert all({"distorted", "habit", "no-question"} == r["reports"].keys() and r["entropy"] >= 0 for r in after)
    assert len(dpo.read_pairs(out / "pairs", 64)[0].proposals) == config("rndpo").proposals
    made = (out / "pairs/pairs.jsonl").stat().st_mtime_ns
    run(out, "--steps", "2", "--objective", "rndpo", "--name", "again")
    assert (out / "pairs/pairs.jsonl").stat().st_mtime_ns == made
    one, two = (read_tensors(out / f"{n}/model.safetensors") for n in ("rndpo", "again"))
    assert all(torch.equal(one[k], two[k]) for k in one)          # read back, the pairs are the same


def test_pairs_are_built_once_for_one_recipe(trained):
    """bidpo and its control share out/pairs; its texts can be read."""
    rows, codes = rows_of(trained), read_tensors(trained / "pairs/codes.safetensors")
    assert len(rows) == len(codes["genuine"]) and all(r["chosen"] and r["reports"].keys() == {"distorted"} for r in rows)
    assert (codes["genuine"] != codes["distorted"]).any(1).all()


def test_another_recipe_builds_other_pairs(out):
    assert "noise" not in {r["kind"] for r in rows_of(out)}
    run(out, "--steps", "1", "--objective", "dpo", "--distort", "noise")
    assert {r["kind"] for r in rows_of(out)} == {"noise"}


def test_candidates_leave_one_pair_a_record_by_its_report_on_the_distorted_image(out, monkeypatch):
    """All candidates are asked with one wording: else the wording decides, and not the image."""
    plain, asked, real = rows_of(out), [], dpo.sum_reference_logps
    spy = lambda model, pairs, *more: asked.append((more[0], {p.wording for p in pairs})) or real(model, pairs, *more)
    monkeypatch.setattr(dpo, "sum_reference_logps", spy)
    run(out, "--steps", "1", "--objective", "dpo", "--candidates", "3")
    assert asked == [(("text_given",), {0}), (dpo.sequences_of(config("dpo")), {0, 1, 2})]
    hard = rows_of(out)
    indices = [p["index"] for p in hard]
    assert len(indices) == len(set(indices)) and {p["index"] for p in plain} <= set(indices) and hard != plain


def test_resume_knows_the_model_it_started_from(out):
    model = GPT.from_pretrained(out / "sft")
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    model.save_pretrained(out / "sft")
    there = lambda: {path: path.read_bytes() for name in ("bidpo", "pairs") for path in (out / name).iterdir()}
    before = there()
    with pytest.raises(UserError, match="--resume: .*bidpo was started from another SFT model"):
        run(out, "--resume")
    assert there() == before                                # pairs too: it is refused before they are built anew


def test_stopped_and_resumed_equals_never_stopped(out, monkeypatch):
    steps = ["--steps", "4", "--save-every", "2"]
    run(out, *steps, "--name", "whole")
    save_state = dpo.save_state

    def save_and_die(*args, **kwargs):
        save_state(*args, **kwargs)
        raise KeyboardInterrupt
    monkeypatch.setattr(dpo, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(out, *steps, "--name", "halved")
    monkeypatch.undo()
    assert not (out / "halved").exists()
    run(out, *steps, "--name", "halved", "--resume")
    whole, halved = (read_tensors(out / f"{n}/model.safetensors") for n in ("whole", "halved"))
    assert all(torch.equal(whole[k], halved[k]) for k in whole)
    assert [r["step"] for r in read_log(out / "halved.jsonl")] == [r["step"] for r in read_log(out / "whole.jsonl")]


@pytest.mark.parametrize("objective, flags, name", [
    ("bidpo", [], "bidpo"), ("napo", [], "napo"), ("sft", [], "control"), ("sft", ["--name", "more"], "more"),
    ("dpo", ["--name", "mine"], "mine")])
def test_a_model_is_written_to_the_folder_of_its_objective_or_name(objective, flags, name):
    assert dpo.check_flags(config(objective, *flags)) == name


@pytest.mark.parametrize("flags, named", [
    (["--q-min", "0.5", "--q-max", "0.4"], "--q-min 0.5.*--q-max 0.4"),
    (["--name", "control"], "--name control.*--objective sft"), *((["--name", name], f"--name {re.escape(name)}")
      for name in ("vqgan", "sft", "pairs", "reader", "eval", "..", "../up", "a/b", "a.partial", ".lock"))])
def test_flags_that_do_not_go_together_are_refused(flags, named):
    with pytest.raises(UserError, match=named):
        dpo.check_flags(config("napo", *flags))


def test_another_bias_than_the_models_is_refused(out):
    with pytest.raises(UserError, match=re.escape(str(out / "sft")) + ".*--bias"):
        run(out, "--bias", "0.5")


def test_models_of_two_tokenizers_do_not_mix(out):
    path = out / "sft/config.json"
    path.write_text(path.read_text().replace('"vqgan_hash": "', '"vqgan_hash": "0'))
    with pytest.raises(UserError, match=re.escape(str(out / "sft"))):
        run(out)
