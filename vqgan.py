"""The image tokenizer: a VQ-GAN (arXiv:2012.09841) that turns an image into h·w codes and back.

    python vqgan.py                        # trains on drawn phantoms, writes out/vqgan
    python vqgan.py --data DIR             # ... on a folder of images

    from vqgan import VQGAN
    vqgan = VQGAN.from_pretrained("out/vqgan")
    codes = vqgan.encode(x)                # x (B, C, H, W) in [-1, 1] -> (B, h·w)
    x_rec = vqgan.decode(codes)

Three choices differ from the paper, each so that it trains from nothing in minutes:
- the codebook's vectors lie on the unit sphere in few dimensions (ViT-VQGAN, arXiv:2110.04627), and those that fall
  out of use are moved onto encoder outputs of the batch, so the whole codebook stays in use;
- LPIPS needs downloaded weights. Its place is taken by squared errors, of pixels and of 4x4-pooled images,
  which hold small bright findings that plain L1 gives up, and, once the discriminator plays, by feature
  matching on its layers (arXiv:1711.11585);
- commitment weight 0.1, not 0.25: on flat images the larger one pulls codes together.

All of this file is the lesson: blocks, quantizer, discriminator, losses, images to codes and back, training.
A healthy log: psnr over 25 and codebook/usage near 1 within a few hundred steps. Measure a vqgan by
whether findings survive it (`python sample.py` counts that), not by PSNR.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import fingerprint, image_source, open_data
from model import (Log, RunConfig, UserError, arg, batch_indices, begin_stage, check_resume, cli, finish_stage, gather, get_lr,
                   init_run, load_folder, load_weights, make_config, own, processes, run, run_flags, save_folder, save_state, set_lr,
                   sum_over_processes, take_step, to_device)


@dataclass
class VQGANConfig:
    """Shape of a vqgan; the image is divided by f = 2^len(widths) in height and width."""

    image_size: int = 64
    channels: int = 1
    widths: tuple = (32, 64, 128)    # channels after each halving
    codebook_size: int = 512
    code_dim: int = 8
    data: str = ""                   # what it was trained on: a folder, or "phantoms"

    def __post_init__(self):
        self.widths = tuple(self.widths)     # JSON gives a list
        if not (self.grid >= 1 and self.image_size <= 4096 and self.channels in (1, 3) and self.codebook_size < 2 ** 15):
            raise UserError("image_size is under 2^len(widths) or over 4096, channels is not 1 or 3, or codebook_size over 32767")

    @property
    def grid(self):
        """Codes along one side of an image."""
        return self.image_size // 2 ** len(self.widths)


@dataclass
class VQGANTrainConfig(RunConfig):
    """Flags of the vqgan's training."""

    steps: int = arg(1200, "optimizer steps")
    batch_size: int = arg(32, "images a step", most=65536)
    lr: float = arg(1.2e-3, "peak learning rate (AdamW)")
    images: int = arg(8000, "training images held in memory, masks drawn as images among them")
    mask_share: float = arg(0.12, "share of those that are masks, so that `segment` can draw them", most=1)
    codebook_size: int = arg(512, "number of codes", most=2 ** 15 - 1)
    code_dim: int = arg(8, "dimensions of a code on the unit sphere")
    beta: float = arg(0.1, "weight of the commitment loss, which moves the encoder")
    l1_weight: float = arg(0.3, "weight of the absolute error")
    l2_weight: float = arg(4.0, "weight of the squared error")
    pooled_weight: float = arg(10.0, "weight of the squared error of 4x4-pooled images")
    disc_start: int = arg(1000, "step at which the adversary joins; reconstructions first", least=0)
    disc_weight: float = arg(0.1, "factor on the adaptive weight of the adversarial loss; 0: no adversary")
    feature_weight: float = arg(0.2, "weight of feature matching, from disc_start on")
    renew_every: int = arg(20, "steps between looks for unused codes")
    save_every: int = arg(200, "steps between saved states, for --resume")
    log_every: int = arg(50, "steps between log lines, each with figures of 256 held-out images")
    resume: bool = arg(False, "go on from the last saved state")


PRESETS = {"tiny": dict(steps=40, batch_size=16, images=96, codebook_size=64, disc_start=30, renew_every=5, save_every=10),
           "quick": dict(steps=400, images=3000, codebook_size=256, disc_start=350, lr=2e-3, log_every=100),
           "small": {}, "base": dict(steps=20000, codebook_size=1024, images=60000, disc_start=8000, lr=4e-4)}
WIDTHS = {"tiny": (16, 32, 32), "quick": (24, 64), "small": (32, 64, 128), "base": (128, 256, 256, 512)}


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), same width."""

    def __init__(self, width):
        super().__init__()
        half = lambda: [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.body = nn.Sequential(*half(), *half())

    def forward(self, x):
        return x + self.body(x)


class Encoder(nn.Module):
    """(B, C, H, W) to z (B, code_dim, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths, layers = (config.channels, *config.widths), []
        for i, o in zip(widths, widths[1:]):
            layers += [nn.Conv2d(i, o, 4, stride=2, padding=1), ResBlock(o)]
        self.body = nn.Sequential(*layers, ResBlock(widths[-1]), nn.GroupNorm(8, widths[-1]), nn.SiLU(),
                                  nn.Conv2d(widths[-1], config.code_dim, 1))

    def forward(self, x):
        return self.body(x)


class Decoder(nn.Module):
    """z_q (B, code_dim, h, w) to (B, C, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths = config.widths[::-1]
        layers = [nn.Conv2d(config.code_dim, widths[0], 3, padding=1), ResBlock(widths[0])]
        for i, o in zip(widths, (*widths[1:], widths[-1] // 2)):
            layers += [ResBlock(i), nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 3, padding=1)]
        self.body = nn.Sequential(*layers, nn.SiLU())
        self.last = nn.Conv2d(widths[-1] // 2, config.channels, 3, padding=1)

    def forward(self, z_q):
        return self.last(self.body(z_q))


class VectorQuantizer(nn.Module):
    """The nearest codebook row, by angle, for every vector of z."""

    def __init__(self, codebook_size, code_dim):
        super().__init__()
        codebook = torch.empty(codebook_size, code_dim)
        if not codebook.is_meta:                                # see load_weights
            codebook = F.normalize(codebook.normal_(), dim=1)
        self.codebook = nn.Parameter(codebook)
        # steps since each code was last used; part of the state, so that a resumed run renews alike
        self.register_buffer("idle", torch.zeros(codebook_size))

    def rows(self):
        """The codebook's rows on the unit sphere, (K, D)."""
        return F.normalize(self.codebook.float(), dim=1)

    def forward(self, z):
        """z (B, D, h, w) to (z_q with straight-through gradient, codes (B, h·w), the two losses)."""
        with torch.autocast(z.device.type, enabled=False):       # half precision picks other codes
            z = F.normalize(z.float(), dim=1).permute(0, 2, 3, 1)         # (B, h, w, D)
            rows = self.rows()
            codes = (z @ rows.T).argmax(dim=-1)                           # largest cosine (B, h, w)
            z_q = rows[codes]                                             # (B, h, w, D)
        codebook_loss = F.mse_loss(z_q, z.detach())              # moves the codebook, weight 1
        commitment_loss = F.mse_loss(z, z_q.detach())            # moves the encoder, weight beta
        z_q = z + (z_q - z).detach()                             # straight-through; after the losses
        return z_q.permute(0, 3, 1, 2), codes.flatten(1), codebook_loss, commitment_loss

    def lookup(self, codes, h):
        """codes (B, h·w) to z_q (B, D, h, w)."""
        return self.rows()[codes].unflatten(1, (h, -1)).permute(0, 3, 1, 2)

    def count(self, codes):
        """Note which codes a batch used."""
        self.idle += 1
        self.idle.index_fill_(0, codes.flatten(), 0)

    @torch.no_grad()
    def renew(self, z, patience):
        """Move every code unused for `patience` steps onto a random vector of z; returns how many."""
        dead = (self.idle >= patience).nonzero().flatten()
        z = F.normalize(z.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)          # (N, D)
        # far-off ones likelier, as in k-means++: 1 − cos is half the squared distance on the sphere
        far = (1 - (z @ self.rows().T).amax(dim=1)).clamp(min=1e-6)
        n = min(len(dead), len(z))
        if n:
            self.codebook[dead[:n]] = z[torch.multinomial(far, n)]
            self.idle[dead[:n]] = 0
        return n


class VQGAN(nn.Module):
    """Encoder, quantizer and decoder. Images are (B, C, H, W) in [-1, 1]; any square size divisible by f."""

    def __init__(self, config):
        super().__init__()
        if config.image_size % 2 ** len(config.widths):
            raise UserError(f"--image-size {config.image_size} is no multiple of {2 ** len(config.widths)}, "
                            "the factor by which this preset shrinks an image")
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = VectorQuantizer(config.codebook_size, config.code_dim)

    @property
    def device(self):
        return self.quantizer.codebook.device

    def forward(self, x):
        """x to (x_rec, codes, codebook_loss, commitment_loss, z)."""
        z = self.encoder(x)
        z_q, codes, codebook_loss, commitment_loss = self.quantizer(z)
        return self.decoder(z_q), codes, codebook_loss, commitment_loss, z

    @property
    def at_once(self):
        """How many images pass together: 2²⁰ pixels of them, 256 at most; the layers in between hold many times that."""
        return max(1, min(256, 2 ** 20 // self.config.image_size ** 2))

    @torch.no_grad()
    def encode(self, x):
        """Images (B, C, H, W) in [-1, 1] to codes (B, h·w), long, in raster order."""
        return torch.cat([self.quantizer(self.encoder(b))[1] for b in x.split(self.at_once)])

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, h·w) of square images to images (B, C, H, W) in [-1, 1]."""
        h = math.isqrt(codes.size(1))
        assert h * h == codes.size(1), "only square images: codes do not say their shape"
        return torch.cat([self.decoder(self.quantizer.lookup(b, h)).float() for b in codes.split(self.at_once)]).clamp(-1, 1)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors."""
        save_folder(folder, {"kind": "vqgan", **dataclasses.asdict(self.config)}, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """Read what save_pretrained wrote."""
        config, tensors = load_folder(folder, "vqgan.py", ("kind", "vqgan"))
        config = make_config(VQGANConfig, config, folder)
        return load_weights(lambda: cls(config), tensors, folder).to(device, memory_format=torch.channels_last)


class PatchDiscriminator(nn.Module):
    """Real or reconstructed, patch by patch: (B, C, H, W) to logits (B, 1, h, w) and inner features."""

    def __init__(self, channels, width=32):
        super().__init__()
        block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        self.blocks = nn.ModuleList([block(channels, width), block(width, 2 * width)])
        self.last = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x):
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return self.last(x), features


def d_hinge_loss(real, fake):
    """Hinge loss of the discriminator: real logits over 1, fake ones under −1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(rec_loss, g_loss, last):
    """λ = ‖∇ rec_loss‖ / (‖∇ g_loss‖ + 1e-6) at the decoder's last weight (Eq. 7, arXiv:2012.09841)."""
    rec, = torch.autograd.grad(rec_loss, last, retain_graph=True)
    adv, = torch.autograd.grad(g_loss, last, retain_graph=True)
    sum_over_processes([rec, adv])
    return (rec.norm() / (adv.norm() + 1e-6)).clamp(0, 1e4).detach()


def reconstruction_loss(x, x_rec, cfg):
    """L1 and squared error per pixel, and squared error after 4x4 pooling."""
    pooled = F.mse_loss(F.avg_pool2d(x_rec, 4), F.avg_pool2d(x, 4))
    return cfg.l1_weight * F.l1_loss(x_rec, x) + cfg.l2_weight * F.mse_loss(x_rec, x) + cfg.pooled_weight * pooled


def generator_losses(disc, x, x_rec):
    """What the discriminator asks of x_rec: to pass for real, and feature matching, L1 between its layers on x_rec and on x
    (arXiv:1711.11585)."""
    (fake, features_rec), (_, features) = disc(x_rec), disc(x)
    matching = sum(F.l1_loss(a, b.detach()) for a, b in zip(features_rec, features)) / len(features)
    return -fake.float().mean(), matching


def psnr(x, x_rec):
    """Peak signal to noise ratio in dB of images in [-1, 1]: the peak is 2. (B,)"""
    return 10 * torch.log10(4 / (x - x_rec).square().flatten(1).mean(dim=1).clamp(min=1e-10))


def codebook_figures(vqgan, codes):
    """Share of codes in use, exp(entropy) of use, and the share with another code within 8 degrees."""
    K = vqgan.config.codebook_size
    p = torch.bincount(codes.flatten(), minlength=K) / codes.numel()
    rows = vqgan.quantizer.rows()
    with torch.autocast(rows.device.type, enabled=False):                # bfloat16 is too coarse for so small an angle
        nearest = (rows @ rows.T - 2 * torch.eye(K, device=rows.device)).amax(dim=1)
    return {"codebook/usage": (p > 0).float().mean(), "codebook/near_duplicates": (nearest > 0.99).float().mean(),
            "codebook/perplexity": torch.exp(-(p * p.clamp(min=1e-12).log()).sum())}


@torch.no_grad()
def validate(vqgan, x):
    """Figures of held-out images (B, C, H, W)."""
    codes = vqgan.encode(x)
    return {"val/psnr": psnr(x, vqgan.decode(codes)).mean(), **codebook_figures(vqgan, codes)}


def to_pixels(images):
    """(n, C, H, W) uint8 tensor to float32 in [-1, 1]. `to_images` is its inverse."""
    return images.float() / 127.5 - 1


def to_images(x):
    """(n, C, H, W) in [-1, 1] to uint8."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def stack(images, channels):
    """A list of (H, W) or (H, W, 3) uint8 arrays as one uint8 tensor (n, C, H, W)."""
    rows = [np.asarray(i) if i.ndim == 3 else np.repeat(i[..., None], channels, axis=2) for i in images]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def encode_images(images, vqgan, autocast):
    """A list of (H, W) or (H, W, 3) uint8 arrays to their codes (n, h·w), an int16 array."""
    with autocast():
        return vqgan.encode(to_pixels(stack(images, vqgan.config.channels)).to(vqgan.device)).cpu().numpy().astype(np.int16)


def spread_indices(total, n):
    """min(n, total) indices, evenly spread over range(total): a folder may be sorted by modality."""
    return np.linspace(0, total, min(n, total), endpoint=False).astype(int)


def image_stack(records, n, mask_share, channels, seed):
    """Up to n images, spread over the records, as uint8 (n, C, H, W); a share of them masks, white on black."""
    rng = np.random.default_rng([seed, 1])
    images = []
    for i in spread_indices(len(records), n):
        record = records[int(i)]
        if record.masks and rng.random() < mask_share:
            images.append(record.masks[sorted(record.masks)[rng.integers(len(record.masks))]] * np.uint8(255))
        else:
            images.append(record.image)
    return stack(images, channels)


def train(cfg):
    """Train the tokenizer and write out/vqgan."""
    device, autocast = init_run(cfg)
    check_resume(cfg, "vqgan")                               # fail before the slow part, not at begin_stage
    data = open_data(cfg)
    origin = {"--data or data.py": fingerprint(data["train"])}
    config = VQGANConfig(cfg.image_size, cfg.channels, WIDTHS[cfg.preset], cfg.codebook_size, cfg.code_dim, image_source(cfg))
    vqgan = VQGAN(config).to(device, memory_format=torch.channels_last)
    disc = PatchDiscriminator(cfg.channels).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vqgan.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    d_optimizer = torch.optim.AdamW(disc.parameters(), lr=0.2 * cfg.lr, betas=(0.5, 0.9), weight_decay=0.0)
    folder, progress = begin_stage(cfg, "vqgan", [vqgan, disc], [optimizer, d_optimizer], origin)
    start = progress.get("step", 0)
    images = image_stack(data["train"], cfg.images, cfg.mask_share, cfg.channels, cfg.seed)
    val = to_pixels(image_stack(data["val"], 256, cfg.mask_share, cfg.channels, cfg.seed)).to(device)
    log = Log(f"{folder}.jsonl", "vqgan", cfg.steps, start)
    for step in range(start, cfg.steps):
        set_lr([optimizer, d_optimizer], get_lr(step, cfg.steps, warmup=40))
        x = to_device(images[own(batch_indices(len(images), cfg.batch_size, step, cfg.seed))], device)    # bytes, a quarter of floats
        x = to_pixels(x).contiguous(memory_format=torch.channels_last)
        adversary = step >= cfg.disc_start and cfg.disc_weight > 0

        with autocast():
            x_rec, codes, codebook_loss, commitment_loss, z = vqgan(x)
            rec_loss = reconstruction_loss(x, x_rec.float(), cfg)
            g_loss = matching = d_weight = d_loss = torch.zeros((), device=device)
            if adversary:
                g_loss, matching = generator_losses(disc, x, x_rec)
                d_weight = cfg.disc_weight * adaptive_weight(rec_loss, g_loss, vqgan.decoder.last.weight)
            loss = rec_loss + codebook_loss + cfg.beta * commitment_loss + d_weight * g_loss + cfg.feature_weight * matching
        # over processes gradients are summed, these losses are means; clipped, as one bad step can collapse the codes
        grad_norm = take_step(loss / processes(), vqgan.parameters(), [optimizer], clip=1.0)
        log.count(step, grad_norm)

        if adversary:
            with autocast():
                d_loss = d_hinge_loss(disc(x)[0].float(), disc(x_rec.detach())[0].float())
            take_step(d_loss / processes(), disc.parameters(), [d_optimizer])

        vqgan.quantizer.count(gather(codes))
        if step % cfg.renew_every == 0 and step < 0.7 * cfg.steps:       # the rest settles
            torch.manual_seed(cfg.seed + step)                          # a resumed run draws alike
            vqgan.quantizer.renew(gather(z.detach()), cfg.renew_every)

        if step % cfg.log_every == 0 or step == cfg.steps - 1:
            with autocast():
                held_out = validate(vqgan, val)
            figures = dict(loss=loss, rec_loss=rec_loss, codebook_loss=codebook_loss, commitment_loss=commitment_loss, d_loss=d_loss,
                           g_loss=g_loss, feature_loss=matching, d_weight=d_weight, psnr=psnr(x, x_rec.float()).mean())
            means = gather(torch.stack(list(figures.values())).detach()[None]).mean(dim=0)       # over all processes
            log(step, ("loss", "psnr", "val/psnr"), **dict(zip(figures, means)), lr=optimizer.param_groups[0]["lr"], **held_out)
            log.warn(step > 200 and held_out["codebook/usage"] < 0.1, "over nine tenths of the codes are unused; lower --lr")
        if log.is_due(step, cfg.save_every):
            save_state(folder, step + 1, [vqgan, disc], [optimizer, d_optimizer], flags=run_flags(cfg), origin=origin)
        if log.stopping:
            log.close()                                      # raises Stopped
    log.close()
    vqgan.save_pretrained(folder)
    finish_stage(cfg, "vqgan")
    tqdm.write(f"wrote {cfg.out}/vqgan")


def main(argv=None):
    """Command line."""
    train(cli(VQGANTrainConfig, PRESETS, argv, __doc__))


if __name__ == "__main__":
    run(main)
