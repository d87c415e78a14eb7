"""Stage 2: the objective's known values, what a pair becomes, and that policy and reference start equal."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

import dpo
from data import Pair, Vocabulary
from model import GPT, GPTConfig, UserError, cli, read_tensors, sequence_logps

VOCAB = Vocabulary.train(["Enlarged heart. No effusion. Normal."] * 3, codebook_size=8, text_size=300)
PAIRS = [Pair("a", "remove", np.array([1, 2, 3, 4]), np.array([1, 2, 7, 4]), "Enlarged heart.", "Normal.", True, True),
         Pair("b", "add", np.array([0, 0, 3, 4]), np.array([5, 2, 7, 4]), "Normal.", "Normal.", False, True)]


def config(*flags):
    return cli(dpo.DPOConfig, dpo.PRESETS, ["--preset", "tiny", *flags])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB.size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16))


def test_loss_is_log_2_where_policy_is_reference():
    zero = torch.zeros(3)
    torch.testing.assert_close(dpo.preference_loss(zero, zero), torch.full((3,), math.log(2)))


def test_loss_is_softplus_of_minus_the_margin():
    margin = torch.tensor([-2.0, 0.5, 3.0])
    torch.testing.assert_close(dpo.preference_loss(margin + 1, torch.ones(3)), torch.log(1 + torch.exp(-margin)))


def test_gradient_at_the_start_is_minus_beta_over_2b_a_chosen_logp():
    beta, logps = 0.2, torch.zeros(4, requires_grad=True)
    dpo.preference_loss(beta * logps, torch.zeros(4)).mean().backward()
    torch.testing.assert_close(logps.grad, torch.full((4,), -beta / (2 * 4)))


def test_anchor_by_hand():
    assert dpo.anchor_loss(torch.tensor(2.0), 0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_pairs_that_do_not_count_are_left_out_of_the_mean():
    values = torch.tensor([1.0, 100.0, 3.0])
    assert dpo.masked_mean(values, torch.tensor([1.0, 0.0, 1.0])) == 2.0
    assert dpo.masked_mean(values, torch.zeros(3)) == 0.0


def rewards(**given):
    return {k: torch.tensor(given.get(k, [0.0, 0.0])) for k in dpo.SEQUENCES}


def keep(text=(1.0, 1.0), image=(1.0, 1.0)):
    return {"text": torch.tensor(text), "image": torch.tensor(image)}


def test_with_only_the_text_weight_left_it_is_plain_dpo():
    cfg = config("--text-weight", "1", "--image-weight", "0", "--conditional-weight", "0", "--anchor-weight", "0")
    loss, _ = dpo.bidpo_loss(rewards(text_chosen=[1.0, 2.0], image_rejected=[9.0, 9.0]), keep(), cfg)
    expected = torch.log(1 + torch.exp(torch.tensor([-1.0, -2.0]))).mean()
    torch.testing.assert_close(loss, expected)


def test_each_term_has_its_own_margin_and_weight():
    cfg = config("--text-weight", "1", "--image-weight", "10", "--conditional-weight", "100", "--anchor-weight", "0")
    r = rewards(text_chosen=[1.0], text_rejected=[0.0], image_chosen=[2.0], image_rejected=[0.0], text_distorted=[-2.0])
    loss, _ = dpo.bidpo_loss(r, keep((1.0,), (1.0,)), cfg)
    softplus = lambda z: math.log(1 + math.exp(z))
    assert loss.item() == pytest.approx(softplus(-1) + 10 * softplus(-2) + 100 * softplus(-3), rel=1e-5)


def test_a_report_that_does_not_differ_gives_no_text_loss():
    cfg = config()
    r = rewards(text_chosen=[0.0, 0.0], text_rejected=[5.0, 99.0])
    assert dpo.bidpo_loss(r, keep(text=(1.0, 0.0)), cfg)[1]["text"].item() == pytest.approx(5.0067, abs=1e-3)


def test_a_pair_becomes_five_sequences():
    """Text terms are scored on the genuine image, the conditional one on the distorted; images on the report."""
    chosen, drawn, rejected, drawn_wrong, distorted = dpo.pair_examples(PAIRS[0], VOCAB, 0)
    genuine, twisted = VOCAB.image(PAIRS[0].codes), VOCAB.image(PAIRS[0].distorted)
    assert chosen[0] == rejected[0] and chosen[0][1:7] == genuine and distorted[0][1:7] == twisted
    assert chosen[1] == distorted[1] == VOCAB.text_response("Enlarged heart.") != rejected[1]
    assert drawn[0] == drawn_wrong[0] and VOCAB.decode_text(drawn[0]) == "Draw this: Enlarged heart."
    assert drawn[1] == genuine[1:] and drawn_wrong[1] == twisted[1:]


def test_the_control_trains_on_the_same_chosen_sequences():
    whole, _ = dpo.pair_batch(PAIRS, [0, 1], VOCAB, 0, 5, "cpu")
    control, _ = dpo.pair_batch(PAIRS, [0, 1], VOCAB, 0, 2, "cpu")
    T = control.size(1)
    assert torch.equal(whole[:4, :T], control)


def test_rewards_are_zero_at_step_0(model):
    """The reference's numbers, made before the loop in order, are the policy's in any batch."""
    cfg = config()
    reference = dpo.reference_logps(model, PAIRS, VOCAB, cfg, "cpu", torch.no_grad)
    ids, labels = dpo.pair_batch(PAIRS, [1, 0], VOCAB, cfg.seed, 5, "cpu")
    policy = sequence_logps(model, ids, labels).view(5, 2)
    for k, name in enumerate(dpo.SEQUENCES):
        torch.testing.assert_close(policy[k], reference[name][[1, 0]], atol=1e-4, rtol=0)


def test_margins_grow_on_one_batch_in_every_direction(model):
    cfg = config("--anchor-weight", "0")
    reference = dpo.reference_logps(model, PAIRS, VOCAB, cfg, "cpu", torch.no_grad)
    ids, labels = dpo.pair_batch(PAIRS, [0, 1], VOCAB, cfg.seed, 5, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        logps = dict(zip(dpo.SEQUENCES, sequence_logps(model, ids, labels).view(5, 2)))
        r = {k: cfg.beta * (logps[k] - reference[k]) for k in dpo.SEQUENCES}
        optimizer.zero_grad()
        dpo.bidpo_loss(r, keep(text=(1.0, 0.0)), cfg)[0].backward()
        optimizer.step()
    assert r["text_chosen"][0] > r["text_rejected"][0]
    assert (r["image_chosen"] > r["image_rejected"]).all() and (r["text_chosen"] > r["text_distorted"]).all()
    assert not any(v.requires_grad for v in reference.values())


def test_the_log_starts_at_log_2_with_margins_0(trained):
    first = json.loads((trained / "dpo.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    for term in ("text", "image", "conditional"):
        assert first[f"loss_{term}"] == pytest.approx(math.log(2), abs=1e-4)
    for direction in ("i2t", "t2i", "cond"):
        assert first[f"rewards_{direction}/margins"] == pytest.approx(0, abs=1e-4)


def test_the_control_logs_no_preferences(trained):
    last = json.loads((trained / "control.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 11 and "dpo_loss" not in last and last["nll_loss"] > 0


def test_pairs_are_built_once_for_one_recipe(trained, capsys):
    """dpo and its control share out/pairs; its texts can be read."""
    rows = [json.loads(line) for line in (trained / "pairs/pairs.jsonl").read_text().splitlines()]
    codes = read_tensors(trained / "pairs/codes.safetensors")
    assert len(rows) == len(codes["genuine"]) and all(r["chosen"] for r in rows)
    assert all(r["image_differs"] == bool((g != d).any()) for r, g, d in zip(rows, codes["genuine"], codes["distorted"]))


def test_stopped_and_resumed_equals_never_stopped(trained, tmp_path, monkeypatch):
    for name in ("whole", "halved"):
        (tmp_path / name).mkdir()
        for stage in ("vqgan", "sft", "pairs"):
            shutil.copytree(trained / stage, tmp_path / name / stage)
    flags = ["--preset", "tiny", "--dtype", "float32", "--steps", "8", "--save-every", "4"]
    dpo.main([*flags, "--out", str(tmp_path / "whole")])
    save_state = dpo.save_state

    def save_and_die(*args, **kwargs):
        save_state(*args, **kwargs)
        raise KeyboardInterrupt
    monkeypatch.setattr(dpo, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        dpo.main([*flags, "--out", str(tmp_path / "halved")])
    monkeypatch.undo()
    dpo.main([*flags, "--out", str(tmp_path / "halved"), "--resume"])
    whole, halved = (read_tensors(tmp_path / n / "dpo/model.safetensors") for n in ("whole", "halved"))
    assert all(torch.equal(whole[k], halved[k]) for k in whole)


@pytest.mark.parametrize("flags, message", [
    (["--distort", "melt"], "--distort melt is unknown; there are: noise"),
    (["--strength", "2000"], "from 1 to 1000"),
    (["--name", "sft"], "is taken"),
    (["--name", "../up"], "no plain name"),
    (["--bias", "0.5"], "was trained on phantoms --bias 0.9"),
])
def test_bad_flags_are_refused_in_one_sentence(trained, flags, message):
    with pytest.raises(UserError, match=message):
        dpo.main(["--preset", "tiny", "--out", str(trained), *flags])


def test_models_of_two_tokenizers_do_not_mix(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    path = tmp_path / "out/sft/config.json"
    path.write_text(path.read_text().replace('"vqgan_hash": "', '"vqgan_hash": "0'))
    with pytest.raises(UserError, match="another image tokenizer"):
        dpo.main(["--preset", "tiny", "--out", str(tmp_path / "out")])
