"""Stage 1: its loss, its batches, and that stopping changes nothing."""

import numpy as np
import pytest
import torch

import sft
from conftest import figures_of
from data import Study, Vocabulary, collate
from model import GPT, GPTConfig, UserError, cli, per_token_logps, read_tensors

VOCAB = Vocabulary.train(["Enlarged heart. No effusion."] * 3, codebook_size=8, text_size=300)
STUDY = Study(np.arange(4), "Enlarged heart.", (("Is there an effusion?", "No."),), (("heart", np.arange(4)),), (),
              sft.TASKS)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB.size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16))


def config(**flags):
    return cli(sft.SFTConfig, sft.PRESETS, ["--preset", "tiny"] + [w for k, v in flags.items() for w in (f"--{k}", str(v))])


def test_loss_at_the_start_is_log_v(model):
    ids, labels = collate([([1, 2], [30, 31])], VOCAB.pad)
    assert sft.response_loss(model, ids, labels).item() == pytest.approx(np.log(VOCAB.size), abs=0.1)


def test_loss_counts_response_tokens_only(model):
    """Another id after the response, where labels are -100, changes nothing."""
    ids, labels = collate([([1, 2, 3], [4, 5]), ([1], [4])], VOCAB.pad)
    changed = ids.clone()
    changed[1, 2:] = 7
    torch.testing.assert_close(sft.response_loss(model, ids, labels), sft.response_loss(model, changed, labels))


def test_loss_is_the_mean_over_tokens_not_over_sequences(model):
    """Two uneven halves, weighted by their tokens, give the whole batch."""
    pairs = [([1, 2], [3, 4, 5, 6]), ([1, 2], [3])]
    whole = sft.response_loss(model, *collate(pairs, VOCAB.pad))
    halves = [sft.response_loss(model, *collate([p], VOCAB.pad)) for p in pairs]
    torch.testing.assert_close(whole, (4 * halves[0] + halves[1]) / 5)


def test_one_batch_overfits(model):
    cfg = config()
    ids, labels = sft.make_batch([STUDY], cfg, dict.fromkeys(sft.TASKS, 0.25), VOCAB, 0, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = sft.response_loss(model, ids, labels).item()
    for _ in range(50):
        optimizer.zero_grad()
        sft.response_loss(model, ids, labels).backward()
        optimizer.step()
    assert sft.response_loss(model, ids, labels).item() < 0.15 * start


def test_tasks_follow_their_shares_and_the_record():
    shares, rng = {"report": 0.6, "generate": 0.4, "ask": 0.0, "segment": 0.0}, np.random.default_rng(0)
    drawn = [sft.pick_task(STUDY, shares, rng) for _ in range(2000)]
    assert drawn.count("report") / 2000 == pytest.approx(0.6, abs=0.04) and set(drawn) == {"report", "generate"}
    only = Study(*list(vars(STUDY).values())[:5], tasks=("ask",))
    assert sft.pick_task(only, dict.fromkeys(sft.TASKS, 0.25), rng) == "ask"


def test_a_batch_is_a_function_of_seed_and_step():
    cfg, shares = config(), dict.fromkeys(sft.TASKS, 0.25)
    batch = lambda step: sft.make_batch([STUDY], cfg, shares, VOCAB, step, "cpu")[0]
    assert torch.equal(batch(3), batch(3)) and not torch.equal(batch(3)[:, :8], batch(4)[:, :8])


def test_stopped_and_resumed_equals_never_stopped(trained, tmp_path, monkeypatch):
    """The run is killed right after a saved state; --resume then writes the very same weights."""
    import shutil
    flags = ["--preset", "tiny", "--dtype", "float32", "--steps", "12", "--val-every", "6", "--records", "48"]
    for name in ("whole", "halved"):
        (tmp_path / name).mkdir()
        shutil.copytree(trained / "vqgan", tmp_path / name / "vqgan")
    sft.main([*flags, "--out", str(tmp_path / "whole")])
    save_state = sft.save_state

    def save_and_die(folder, step, *rest, **figures):
        save_state(folder, step, *rest, **figures)
        raise KeyboardInterrupt
    monkeypatch.setattr(sft, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        sft.main([*flags, "--out", str(tmp_path / "halved")])
    assert not (tmp_path / "halved/sft").exists()          # nothing half made stands where a model should
    monkeypatch.undo()
    sft.main([*flags, "--out", str(tmp_path / "halved"), "--resume"])
    whole, halved = (read_tensors(tmp_path / n / "sft/state.safetensors") for n in ("whole", "halved"))
    assert whole.keys() == halved.keys() and all(torch.equal(whole[k], halved[k]) for k in whole)
    assert figures_of(tmp_path / "whole/sft.jsonl") == figures_of(tmp_path / "halved/sft.jsonl")


def test_another_image_size_than_the_tokenizers_is_refused(trained):
    with pytest.raises(UserError, match="trained for 32 pixels"):
        sft.main(["--preset", "tiny", "--out", str(trained), "--image-size", "64"])


def test_other_data_than_the_tokenizers_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="was trained on phantoms"):
        sft.main(["--preset", "tiny", "--out", str(trained), "--data", str(tmp_path)])


def test_no_task_left_is_refused(trained, tmp_path):
    import shutil
    shutil.copytree(trained / "vqgan", tmp_path / "vqgan")
    none = [w for t in sft.TASKS for w in (f"--{t}-share", "0")]
    with pytest.raises(UserError, match="share"):
        sft.main(["--preset", "tiny", "--out", str(tmp_path), *none])


def test_logits_of_the_saved_folder_are_the_models(trained):
    """What is on disk is whole: ids of the folder's own vocabulary, finite log-probabilities."""
    model, vocab = GPT.from_pretrained(trained / "sft"), Vocabulary.load(trained / "sft")
    ids, labels = collate([(vocab.draw("Head CT."), vocab.image_response(range(16)))], vocab.pad)
    assert model.config.vocab_size == vocab.size and torch.isfinite(per_token_logps(model, ids, labels)).all()
