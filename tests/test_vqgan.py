"""vqgan.py: the quantizer and its losses by hand, pixels and codes, then the tokenizer as an encoder and as a program."""

import contextlib
import math
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import vqgan as program
from conftest import figures_of
from data import Phantoms, Record
from model import UserError, cli, read_tensors, save_state
from vqgan import (VQGAN, PatchDiscriminator, VQGANConfig, VQGANTrainConfig, VectorQuantizer, adaptive_weight,
                   codebook_figures, d_hinge_loss, encode_images, generator_losses, image_stack, psnr, reconstruction_loss, spread_indices,
                   stack, to_images, to_pixels)

AXES = torch.cat([torch.eye(3), -torch.eye(3)])       # six codes in three dimensions, far apart


def axis_quantizer():
    quantizer = VectorQuantizer(6, 3)
    quantizer.codebook.data = AXES.clone()
    return quantizer


def as_map(vectors):
    """Vectors (h·w, D) of a square grid to z (1, D, h, w)."""
    side = math.isqrt(len(vectors))
    return vectors.T.reshape(1, -1, side, side).clone().requires_grad_()


def small_vqgan(size=16, channels=1):
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(size, channels, widths=(16, 24), codebook_size=32, code_dim=4)).eval()


# ---- The quantizer -------------------------------------------------------------------------------


def test_codebook_rows_are_their_own_codes():
    """At any length: only the angle counts. The four codes come back in raster order, the losses 0."""
    z = as_map(AXES[[4, 0, 5, 2]] * torch.tensor([1.0, 0.1, 7.0, 2.0])[:, None])
    z_q, codes, codebook_loss, commitment_loss = axis_quantizer()(z)
    assert codes.tolist() == [[4, 0, 5, 2]]
    assert_close(z_q, as_map(AXES[[4, 0, 5, 2]]), check_stride=False)
    assert codebook_loss == commitment_loss == 0


def test_lookup_gives_the_rows_of_the_codes():
    quantizer = VectorQuantizer(32, 4)
    z_q, codes, *_ = quantizer(torch.randn(2, 4, 3, 5))
    assert_close(quantizer.lookup(codes, 3), z_q, check_stride=False)


def test_gradient_passes_straight_through_to_the_unit_sphere():
    """dL/dz = (g − (g·u) u) / |z| with u = z/|z| and g = dL/dz_q: z_q's gradient reaches u unchanged, and
    z through the normalisation alone. None reaches the codebook."""
    torch.manual_seed(0)
    quantizer, z, g = axis_quantizer(), torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 3, 2, 2)
    quantizer(z)[0].backward(g)
    u, length = F.normalize(z.detach(), dim=1), z.detach().norm(dim=1, keepdim=True)
    assert_close(z.grad, (g - (g * u).sum(1, keepdim=True) * u) / length)
    assert quantizer.codebook.grad is None


def test_codebook_loss_moves_the_codebook_only():
    """With u at angle θ to row r, mean((r − u)²) has the gradient −2/N (u − (u·r) r) on the row."""
    quantizer, u = axis_quantizer(), torch.tensor([[0.8, 0.6, 0.0]])
    z = as_map(5 * u)
    quantizer(z)[2].backward()
    assert z.grad is None
    expected = torch.zeros(6, 3)
    expected[0] = torch.tensor([0.0, -2 / 3 * 0.6, 0.0])
    assert_close(quantizer.codebook.grad, expected)


def test_commitment_loss_moves_the_encoder_only():
    """The same on z: −2/N (r − (r·u) u) / |z|, of the same length sin θ before the division."""
    quantizer, u = axis_quantizer(), torch.tensor([[0.8, 0.6, 0.0]])
    z = as_map(5 * u)
    quantizer(z)[3].backward()
    assert quantizer.codebook.grad is None
    assert_close(z.grad.flatten(), -2 / 3 * torch.tensor([1 - 0.64, -0.48, 0.0]) / 5)


def test_codes_are_the_same_under_autocast():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(512, 8), torch.randn(4, 8, 16, 16)
    expected = quantizer(z)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z)[1], expected)


def test_renew_moves_exactly_the_idle_codes_onto_the_batch():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(8, 3), torch.randn(2, 3, 4, 4)
    before = quantizer.codebook.detach().clone()
    quantizer.idle = torch.tensor([0.0, 5, 4, 9, 0, 1, 5, 4])
    assert quantizer.renew(z, patience=5) == 3
    idle = torch.tensor([False, True, False, True, False, False, True, False])
    assert torch.equal(quantizer.codebook[~idle], before[~idle])
    vectors = F.normalize(z, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    nearest, which = (quantizer.codebook.detach()[idle] @ vectors.T).max(dim=1)
    assert_close(nearest, torch.ones(3))
    assert len(which.unique()) == 3
    assert quantizer.idle.tolist() == [0, 0, 4, 0, 0, 1, 0, 4]


def test_renew_takes_the_vector_that_no_code_is_near():
    quantizer = axis_quantizer()
    quantizer.idle[5] = 1
    z = as_map(torch.stack([AXES[0], AXES[1], 3 * torch.tensor([0.6, 0.0, -0.8]), AXES[2]]))
    torch.manual_seed(0)
    quantizer.renew(z.detach(), patience=1)
    assert_close(quantizer.codebook[5].detach(), torch.tensor([0.6, 0.0, -0.8]))


def test_renew_with_fewer_vectors_than_idle_codes():
    quantizer = axis_quantizer()
    quantizer.idle[:] = 1
    assert quantizer.renew(as_map(torch.tensor([[0.6, 0.8, 0.0]])).detach(), patience=1) == 1
    assert quantizer.idle.sum() == 5


def test_codebook_figures_by_hand():
    """Codes 0 and 1 share all the use; rows 0 and 3 are 5 degrees apart, the others 90 or more."""
    model = VQGAN(VQGANConfig(16, 1, widths=(16, 24), codebook_size=4, code_dim=2))
    angle = torch.tensor([0.0, 90, 180, 5]).deg2rad()
    model.quantizer.codebook.data = 3 * torch.stack([angle.cos(), angle.sin()], dim=1)
    figures = codebook_figures(model, torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]))
    assert_close({k: v.item() for k, v in figures.items()},
                 {"codebook/usage": 0.5, "codebook/near_duplicates": 0.5, "codebook/perplexity": 2.0})


# ---- Losses and figures --------------------------------------------------------------------------


def test_hinge_loss_by_hand():
    """Real logits 2 and 0.5 cost 0 and 0.5; reconstructed ones −2 and 0.5 cost 0 and 1.5."""
    assert_close(d_hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])), torch.tensor(0.5))


def test_adaptive_weight_by_hand():
    """x_rec = w·h: rec_loss (x_rec − 1)² has gradient 2 (x_rec − 1) h, g_loss −x_rec / 4 has −h / 4."""
    w, h = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    x_rec = w @ h                                                                  # 11
    weight = adaptive_weight((x_rec - 1).square(), -x_rec / 4, w)
    assert_close(weight, torch.tensor(80.0), rtol=1e-4, atol=0)
    assert not weight.requires_grad
    assert adaptive_weight((x_rec - 1).square(), 0 * x_rec, w) == 1e4              # bounded


def test_reconstruction_loss_by_hand():
    """One pixel of 16 is off by 1: L1 and squared error 1/16, and 1/256 of the pooled image."""
    x, x_rec = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    x_rec[0, 0, 1, 2] = 1
    cfg = VQGANTrainConfig(l1_weight=16, l2_weight=32, pooled_weight=256)
    assert_close(reconstruction_loss(x, x_rec, cfg), torch.tensor(1.0 + 2 + 1))


def test_the_generators_losses_move_the_reconstruction_only():
    """A discriminator of one layer, the image itself, and its mean for a logit: x is 1 and 1, x_rec 3 and 1.5."""
    disc = lambda x: (x.mean(), [x])
    x, x_rec = torch.ones(2, requires_grad=True), torch.tensor([3.0, 1.5], requires_grad=True)
    g_loss, matching = generator_losses(disc, x, x_rec)
    (g_loss + matching).backward()
    assert_close(g_loss.detach(), torch.tensor(-2.25))
    assert_close(matching.detach(), torch.tensor(1.25))
    assert x.grad is None and x_rec.grad is not None


def test_discriminator_judges_patches():
    logits, features = PatchDiscriminator(3)(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 1, 8, 8)
    assert [f.shape[2] for f in features] == [16, 8]


def test_psnr_by_hand():
    """Off by 0.2 in a range of 2: 10 log10(4 / 0.04) = 20 dB; per image, and finite where equal."""
    x = torch.zeros(2, 1, 4, 4)
    x_rec = x.clone()
    x_rec[0] += 0.2
    assert_close(psnr(x, x_rec)[0], torch.tensor(20.0))
    assert psnr(x, x_rec)[1].isfinite()


# ---- Pixels and codes ----------------------------------------------------------------------------

COLOUR = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)


def test_pixels_to_tensor_and_back_is_exact():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert to_pixels(images).min() == -1 and to_pixels(images).max() == 1
    assert torch.equal(to_images(to_pixels(images)), images)


def test_what_is_beyond_the_range_of_pixels_is_cut():
    assert to_images(torch.tensor([-1.5, -1, 0.0039, 1, 1.5])).tolist() == [0, 0, 128, 255, 255]


def test_stack_keeps_channel_order_and_repeats_gray():
    x = stack([COLOUR, COLOUR[..., 0]], 3)
    assert x.shape == (2, 3, 16, 16) and x.dtype == torch.uint8
    assert np.array_equal(x[0, 2], COLOUR[..., 2]) and np.array_equal(x[1, 2], COLOUR[..., 0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_image_stack_holds_the_share_of_masks_asked_for(share):
    records = Phantoms("train", 120, size=16)
    is_mask = [set(x.unique().tolist()) <= {0, 255} for x in image_stack(records, 120, share, 1, seed=0)]
    assert np.mean(is_mask) == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)


def test_spread_indices_by_hand():
    assert spread_indices(10, 4).tolist() == [0, 2, 5, 7]
    assert spread_indices(3, 9).tolist() == [0, 1, 2]


def test_image_stack_spreads_over_the_records_and_repeats_gray():
    records = [Record(np.full((16, 16), i, np.uint8), "", "") for i in range(10)]
    x = image_stack(records, 4, 1.0, 3, seed=0)             # without masks all are images, whatever the share
    assert x.shape == (4, 3, 16, 16) and x[:, 2, 0, 0].tolist() == [0, 2, 5, 7]
    assert len(image_stack(records, 99, 0.0, 1, seed=0)) == 10


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_encoded_with_the_tokenizers_own_channels(channels):
    model, images = small_vqgan(channels=channels), [COLOUR[..., 0], COLOUR[..., 1]] + [COLOUR] * (channels == 3)
    codes = encode_images(images, model, contextlib.nullcontext)
    assert codes.dtype == np.int16 and codes.shape == (len(images), 16)
    assert np.array_equal(codes, model.encode(to_pixels(stack(images, channels))))


def test_images_are_encoded_inside_autocast():
    inside = []
    watched = SimpleNamespace(config=SimpleNamespace(channels=1), device="cpu",
                              encode=lambda x: inside.append(torch.is_autocast_enabled("cpu")) or torch.zeros(1, 4))
    encode_images([COLOUR[..., 0]], watched, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert inside == [True]


# ---- The tokenizer -------------------------------------------------------------------------------


def test_the_device_is_that_of_the_weights():
    assert (small_vqgan().device.type, small_vqgan().to("meta").device.type) == ("cpu", "meta")


def test_decoded_codes_equal_the_forward_pass(monkeypatch):
    """Two at once also split 5 images unevenly; decode clips to [-1, 1], forward does not."""
    model = small_vqgan()
    model.decoder.last.weight.data *= 20            # so that there is something to clip
    x = torch.rand(5, 1, 16, 16) * 2 - 1
    x_rec, codes, *_ = model(x)
    assert x_rec.abs().max() > 1
    assert model.at_once == 256 and small_vqgan(256).at_once == 16
    monkeypatch.setattr(VQGAN, "at_once", 2)
    assert torch.equal(model.encode(x), codes)
    assert_close(model.decode(codes), x_rec.clamp(-1, 1).detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 24])
def test_shapes_of_gray_and_rgb(size, channels):
    model = small_vqgan(size, channels)
    codes = model.encode(torch.zeros(2, channels, size, size))
    assert codes.shape == (2, model.config.grid ** 2) == (2, (size // 4) ** 2) and codes.dtype == torch.long
    assert model.decode(codes).shape == (2, channels, size, size)


def test_indivisible_size_raises_user_error():
    with pytest.raises(UserError, match="--image-size 30"):
        small_vqgan(size=30)


def test_saved_tokenizer_comes_back_equal(tmp_path):
    saved = small_vqgan(channels=3)
    saved.save_pretrained(tmp_path)
    loaded = VQGAN.from_pretrained(tmp_path)
    assert loaded.config == saved.config
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in loaded.state_dict().items())


# ---- The program ---------------------------------------------------------------------------------


def flags(out, **changes):
    options = dict(preset="tiny", records=24, images=24, batch_size=4, dtype="float32", device="cpu", out=out) | changes
    return [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]


def config(out, **changes):
    """The same as a config."""
    return cli(VQGANTrainConfig, program.PRESETS, flags(out, **changes))


def weights_after(out, resume=False, **changes):
    """Weights that the program writes."""
    program.main(flags(out, **changes) + ["--resume"] * resume)
    return VQGAN.from_pretrained(out / "vqgan").state_dict()


def log_of(out):
    return figures_of(out / "vqgan.jsonl")


def test_beta_weighs_the_commitment_term(tmp_path):
    """One step on the two quantizer losses alone, beta 0: the codebook moves, the encoder does not."""
    after = weights_after(tmp_path, steps=1, beta=0, l1_weight=0, l2_weight=0, pooled_weight=0)
    cfg = config(tmp_path)
    torch.manual_seed(cfg.seed)
    before = VQGAN(VQGANConfig(cfg.image_size, cfg.channels, program.WIDTHS[cfg.preset], cfg.codebook_size,
                               cfg.code_dim)).state_dict()
    moved = {k.split(".")[0] for k in after if not k.endswith("idle") and not torch.equal(after[k], before[k])}
    assert moved == {"quantizer"}


def test_overfits_one_image(tmp_path):
    weights_after(tmp_path, steps=40, records=1, images=1)
    first, last = log_of(tmp_path)
    assert last["rec_loss"] < 0.15 * first["rec_loss"]


class Stopped(Exception):
    pass


def test_a_refused_command_leaves_an_unfinished_run(tmp_path):
    (tmp_path / "vqgan.partial").mkdir()
    save_state(tmp_path / "vqgan.partial", 1, [], [])
    with pytest.raises(UserError, match="--data"):
        program.main([*flags(tmp_path), "--data", str(tmp_path / "nothing")])
    assert (tmp_path / "vqgan.partial/state.safetensors").exists()


def test_stopped_and_resumed_equals_straight_through(tmp_path, monkeypatch):
    """Across the adversary's start, code renewal and the log; the stop comes right after step 4's state."""
    options = dict(steps=8, disc_start=2, renew_every=2, save_every=4, log_every=1)
    straight = weights_after(tmp_path / "a", **options)

    def save_and_stop(*args, **progress):
        save_state(*args, **progress)
        raise Stopped
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(program, "save_state", save_and_stop)
        weights_after(tmp_path / "b", **options)
    assert not (tmp_path / "b" / "vqgan").exists()
    torch.randn(7)                                    # another process would be elsewhere in its chance
    resumed = weights_after(tmp_path / "b", resume=True, **options)
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)
    assert log_of(tmp_path / "b") == log_of(tmp_path / "a")
    assert log_of(tmp_path / "a")[-1]["d_loss"] > 0


def test_adversary_joins_at_its_step(tmp_path):
    weights_after(tmp_path, steps=3, disc_start=1, log_every=1)
    assert [line["d_loss"] > 0 and line["d_weight"] > 0 for line in log_of(tmp_path)] == [False, True, True]


def test_discriminator_learns_from_its_start_on(tmp_path):
    discs = []
    for steps in (1, 2, 3):
        weights_after(tmp_path, steps=steps, disc_start=2)
        discs.append(read_tensors(tmp_path / "vqgan" / "state.safetensors")["model.1.last.weight"])
    assert torch.equal(discs[0], discs[1]) and not torch.equal(discs[1], discs[2])


def test_idle_counts_the_steps_since_a_code_was_used(tmp_path):
    """After 3 steps of as many places as codes: some were used in the last, some never."""
    cfg = config(tmp_path, steps=3)
    assert cfg.batch_size * VQGANConfig(cfg.image_size, widths=program.WIDTHS[cfg.preset]).grid ** 2 == cfg.codebook_size
    idle = weights_after(tmp_path, steps=cfg.steps)["quantizer.idle"]
    assert idle.min() == 0 and idle.max() == cfg.steps


def test_wrong_size_ends_the_program_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vqgan.py", *flags(tmp_path, image_size=30)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(program.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: --image-size 30") and error.count("\n") == 1


def test_help_exits_with_status_0(capsys):
    with pytest.raises(SystemExit) as exit:
        program.main(["--help"])
    assert exit.value.code == 0 and "--disc-start" in capsys.readouterr().out
