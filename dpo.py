"""Stage 2, bidirectional preference optimisation: hallucinate less, reading images and drawing them.

    python dpo.py                          # writes out/dpo; trains the stages before it if they are missing
    python dpo.py --objective sft          # the control, out/control: same steps, same chosen sequences, plain SFT

One pair is a genuine image m with its report y_w, a distorted image m', and the report y_l that the SFT
model writes when shown m'. With the reward r(y|x) = β·(log π_θ(y|x) − log π_ref(y|x)) the loss is

    λ_t · −log σ(r(y_w|m) − r(y_l|m))       text:        the genuine report over the other (Eq. 7, arXiv:2305.18290)
  + λ_i · −log σ(r(m|y_w) − r(m'|y_w))      image:       draw the genuine image, not the distorted one
  + λ_c · −log σ(r(y_w|m) − r(y_w|m'))      conditional: the report belongs to the image it was written for
                                                         (CoPO, arXiv:2406.11839)
  + λ_a · −log σ(r(chosen) − δ)             anchor:      chosen sequences must not become less likely (AncPO, ibid.)
  + λ_s · NLL(chosen) + λ_r · NLL(rehearsal)             plain SFT on the chosen sequences; on questions, masks
                                                         and emptied prompts, which pairs would let fade

Text and image are the two directions of the paper (doi 10.1109/JBHI.2026.3707092, of which only the abstract is public); the
conditional term is our reading of it, and --conditional-weight 0 gives the strict one.

A healthy log starts at loss_text, loss_image and loss_conditional 0.6931 (log 2: policy == reference),
loss_anchor twice that (it holds two sequences), dpo_loss their weighted sum, and all margins 0; then margins
grow. logps/chosen may fall meanwhile, as the loss rewards the gap and not the level: the anchor and SFT terms
hold it.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import sft as sft_stage
from data import (DISTORTIONS, INSTRUCTIONS, Pair, build_pairs, check_data, collate, data_name, encode_records,
                  make_example, open_data, spread)
from model import (Log, RunConfig, UserError, arg, batch_indices, begin_stage, cli, finish_stage, get_lr, init_run,
                   make_optimizers, pick, read_tensors, run, run_flags, save_state, sequence_logps, set_lr,
                   weights_hash)
from sft import load_gpt, load_vqgan, response_loss, write_reports


@dataclass
class DPOConfig(RunConfig):
    """Flags of stage 2; λ and δ are those of the loss above."""

    objective: str = arg("bidpo", "bidpo, or sft: the control, as many steps on the chosen sequences alone",
                         choices=("bidpo", "sft"))
    name: str = arg("", "folder under --out for the result; empty: dpo, or control for --objective sft")
    steps: int = arg(300, "optimizer steps")
    batch_size: int = arg(16, "pairs a step")
    pairs: int = arg(4800, "pairs to build, from as many training records")
    distort: tuple = arg(("remove",), "kinds of distortion, mixed evenly: " + " ".join(DISTORTIONS))
    strength: int = arg(500, "noise and region-noise: DDPM step, 1 to 1000")
    pair_temperature: float = arg(1.0, "temperature of the SFT model's reports on distorted images")
    beta: float = arg(0.5, "preference strength β: how far rewards follow log-ratios, per nat")
    text_weight: float = arg(0.5, "λ_t: genuine report over the report of the distorted image")
    image_weight: float = arg(0.1, "λ_i: genuine image over the distorted image")
    conditional_weight: float = arg(1.0, "λ_c: genuine report given the genuine over the distorted image")
    anchor_weight: float = arg(0.2, "λ_a: chosen rewards over --anchor-delta")
    anchor_delta: float = arg(0.0, "δ: reward that the anchor asks of chosen sequences")
    sft_weight: float = arg(0.5, "λ_s: mean negative log-probability of chosen sequences, per token (the control: 1)")
    rehearsal_weight: float = arg(1.0, "λ_r: the same of questions, masks and emptied prompts")
    rehearsal_size: int = arg(32, "rehearsal sequences a step")
    rehearsal_records: int = arg(4800, "training records that rehearsal draws from")
    lr: float = arg(5e-4, "peak learning rate of embeddings and norms (AdamW)")
    muon_lr: float = arg(2e-3, "peak learning rate of the matrices inside blocks (Muon)")
    log_every: int = arg(10, "steps between log lines")
    save_every: int = arg(100, "steps between saved states, for --resume")
    resume: bool = arg(False, "go on from the last saved state")


PRESETS = {"tiny": dict(steps=12, batch_size=4, pairs=32, rehearsal_size=4), "small": {},
           "base": dict(steps=2000, batch_size=32, pairs=40000, lr=1e-4, muon_lr=5e-4)}
REHEARSAL = {"report": 0.0, "generate": 0.25, "ask": 0.45, "segment": 0.30}


# The objective: pure functions on rewards and log-probabilities, each (B,)


def preference_loss(chosen_rewards, rejected_rewards):
    """−log σ(r_chosen − r_rejected) for each pair (Eq. 7, arXiv:2305.18290); log 2 at margin 0."""
    return F.softplus(rejected_rewards - chosen_rewards)


def anchor_loss(chosen_rewards, delta):
    """−log σ(r_chosen − δ): keeps what is chosen from becoming less likely (arXiv:2406.11839)."""
    return F.softplus(delta - chosen_rewards)


def masked_mean(values, keep):
    """Mean over the pairs that count; 0 where none does."""
    return (values * keep).sum() / keep.sum().clamp(min=1)


def bidpo_loss(rewards, keep, cfg):
    """The weighted preference and anchor terms of the file's docstring, and each term for the log.

    rewards: of the five sequences in SEQUENCES, each (B,). keep: which pairs count for text and image."""
    terms = {
        "text": masked_mean(preference_loss(rewards["text_chosen"], rewards["text_rejected"]), keep["text"]),
        "image": masked_mean(preference_loss(rewards["image_chosen"], rewards["image_rejected"]), keep["image"]),
        "conditional": masked_mean(preference_loss(rewards["text_chosen"], rewards["text_distorted"]), keep["image"]),
        "anchor": (anchor_loss(rewards["text_chosen"], cfg.anchor_delta)
                   + anchor_loss(rewards["image_chosen"], cfg.anchor_delta)).mean()}
    return sum(getattr(cfg, f"{name}_weight") * term for name, term in terms.items()), terms


# Pairs as sequences

# the chosen two first: the control and the NLL need no others
SEQUENCES = ("text_chosen", "image_chosen", "text_rejected", "image_rejected", "text_distorted")


def pair_examples(pair, vocab, wording):
    """The five (prompt, response) sequences of a pair, in the order of SEQUENCES."""
    asked, drawn = INSTRUCTIONS["report"][wording], vocab.draw(INSTRUCTIONS["generate"][wording].format(pair.chosen))
    genuine, distorted = vocab.understand(pair.codes, asked), vocab.understand(pair.distorted, asked)
    chosen, rejected = vocab.text_response(pair.chosen), vocab.text_response(pair.rejected)
    return ((genuine, chosen), (drawn, vocab.image_response(pair.codes)), (genuine, rejected),
            (drawn, vocab.image_response(pair.distorted)), (distorted, chosen))


def pair_batch(pairs, indices, vocab, seed, n_sequences, device):
    """ids and labels (n_sequences·B, T) of some pairs, one kind of sequence after the other.

    A pair's wording hangs on (seed, index) alone, so policy and reference see the same tokens."""
    rows = [pair_examples(pairs[i], vocab, int(np.random.default_rng([seed, 6, int(i)]).integers(3))) for i in indices]
    return collate([row[k] for k in range(n_sequences) for row in rows], vocab.pad, device)


@torch.no_grad()
def reference_logps(model, pairs, vocab, cfg, device, autocast):
    """log π_ref of every pair's five sequences: {name: (n,)}, computed once before the loop."""
    chunks = []
    for start in tqdm(range(0, len(pairs), cfg.batch_size), desc="reference", unit="batch", leave=False):
        indices = range(start, min(start + cfg.batch_size, len(pairs)))
        ids, labels = pair_batch(pairs, indices, vocab, cfg.seed, len(SEQUENCES), device)
        with autocast():
            chunks.append(sequence_logps(model, ids, labels).view(len(SEQUENCES), -1))
    return dict(zip(SEQUENCES, torch.cat(chunks, dim=1)))


def load_sft(cfg, device):
    """The SFT model, its vocabulary and the image tokenizer of cfg.out, trained first if missing."""
    folder, tokenizer = Path(cfg.out) / "sft", Path(cfg.out) / "vqgan"
    if folder.exists() and not tokenizer.exists():
        raise UserError(f"{folder} is there, the image tokenizer it was trained with, {tokenizer}, is not: bring it "
                        "back, or remove both to train them again")
    if not folder.exists():
        tqdm.write(f"{folder} is missing: instruction tuning first")
        sft_stage.train(pick(sft_stage.SFTConfig, cfg, **sft_stage.PRESETS[cfg.preset], resume=cfg.resume))
    vqgan = load_vqgan(cfg, device)
    model, vocab = load_gpt(folder, vqgan, device)
    check_data(model.config.data, cfg, folder)
    return model, vocab, vqgan


def load_or_build_pairs(cfg, data, vqgan, model, vocab, device, autocast):
    """The preference pairs of this recipe: from out/pairs if it was made by the same one, else built."""
    folder = Path(cfg.out) / "pairs"
    recipe = {k: getattr(cfg, k) for k in ("seed", "records", "pairs", "strength", "pair_temperature")}
    recipe |= {"data": data_name(cfg), "distort": list(cfg.distort), "sft": weights_hash(model)}
    if (folder / "config.json").exists() and json.loads((folder / "config.json").read_text()) == recipe:
        codes = read_tensors(folder / "codes.safetensors")
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
        tqdm.write(f"{len(rows)} pairs from {folder}")
        return [Pair(codes=c.numpy(), distorted=d.numpy(), **row)
                for c, d, row in zip(codes["genuine"], codes["distorted"], rows)]
    write = lambda codes, seed: write_reports(model, codes, vocab, cfg.pair_temperature, seed)
    pairs = build_pairs(data["train"], cfg.pairs, cfg.distort, cfg.strength, cfg.seed, vqgan, cfg.channels, write,
                        device, autocast)
    new = folder.with_name("pairs.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    save_file({"genuine": torch.tensor(np.stack([p.codes for p in pairs])),
               "distorted": torch.tensor(np.stack([p.distorted for p in pairs]))}, new / "codes.safetensors")
    with open(new / "pairs.jsonl", "w", encoding="utf-8") as f:
        for pair in pairs:
            row = {k: v for k, v in dataclasses.asdict(pair).items() if k not in ("codes", "distorted")}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    (new / "config.json").write_text(json.dumps(recipe, indent=2) + "\n")
    finish_stage(cfg, "pairs")
    return pairs


def make_rehearsal(studies, cfg, vocab, step, device):
    """A batch of questions, masks and emptied prompts from the training studies."""
    rng = np.random.default_rng([cfg.seed, 7, step])
    studies = [studies[i] for i in batch_indices(len(studies), cfg.rehearsal_size, step, cfg.seed)]
    examples = [make_example(s, sft_stage.pick_task(s, REHEARSAL, rng), vocab, rng, empty_share=1.0) for s in studies]
    return collate(examples, vocab.pad, device)


# direction: chosen, rejected, and whether the pair's texts or its images must differ
DIRECTIONS = {"i2t": ("text_chosen", "text_rejected", "text"), "t2i": ("image_chosen", "image_rejected", "image"),
              "cond": ("text_chosen", "text_distorted", "image")}


def direction_metrics(rewards, logps, keep):
    """TRL's log names for each direction: rewards_i2t/margins, logps_t2i/chosen, …"""
    result = {}
    for name, (chosen, rejected, side) in DIRECTIONS.items():
        margins = rewards[chosen] - rewards[rejected]
        values = {f"rewards_{name}/chosen": rewards[chosen], f"rewards_{name}/rejected": rewards[rejected],
                  f"rewards_{name}/margins": margins, f"rewards_{name}/accuracies": (margins > 0).float(),
                  f"logps_{name}/chosen": logps[chosen], f"logps_{name}/rejected": logps[rejected]}
        result |= {k: masked_mean(v.detach(), keep[side]) for k, v in values.items()}
    return result


def check_flags(cfg):
    """Raise UserError for a flag whose value makes no sense."""
    if unknown := [k for k in cfg.distort if k not in DISTORTIONS]:
        raise UserError(f"--distort {' '.join(unknown)} is unknown; there are: {', '.join(DISTORTIONS)}")
    if not 1 <= cfg.strength <= 1000:
        raise UserError(f"--strength {cfg.strength} is a DDPM step: name a number from 1 to 1000")
    if cfg.name in ("vqgan", "sft", "pairs", "judge", "..") or Path(cfg.name).name != cfg.name or Path(cfg.name).suffix:
        raise UserError(f"--name {cfg.name} is taken by another stage or is no plain name; name another")


def train(cfg):
    """Optimise the SFT model on preference pairs (or on their chosen sequences) and write out/NAME."""
    check_flags(cfg)
    name = cfg.name or ("control" if cfg.objective == "sft" else "dpo")
    device, autocast = init_run(cfg)
    model, vocab, vqgan = load_sft(cfg, device)
    data = open_data(cfg)
    pairs = load_or_build_pairs(cfg, data, vqgan, model, vocab, device, autocast)
    studies = encode_records([data["train"][int(i)] for i in spread(len(data["train"]), cfg.rehearsal_records)],
                             vqgan, cfg.channels, cfg.seed, device, autocast, "encoding rehearsal")
    studies = [s for s in studies if any(REHEARSAL[t] > 0 for t in s.tasks)]
    preferring = cfg.objective == "bidpo"
    n_sequences = len(SEQUENCES) if preferring else 2            # the control needs the chosen two only
    # all that is needed of the reference: from here on the model is the policy
    reference_of = reference_logps(model, pairs, vocab, cfg, device, autocast) if preferring else None
    keep_of = {"text": torch.tensor([p.text_differs for p in pairs], device=device).float(),
               "image": torch.tensor([p.image_differs for p in pairs], device=device).float()}

    policy = model
    optimizers = make_optimizers(policy, cfg.lr, cfg.muon_lr, weight_decay=0.0)
    folder, figures = begin_stage(cfg, name, [policy], optimizers)
    start = figures.get("step", 0)
    log = Log(f"{cfg.out}/{name}.jsonl", name, cfg.steps, start)
    for step in range(start, cfg.steps):
        set_lr(optimizers, get_lr(step, cfg.steps, warmup=20))
        indices = batch_indices(len(pairs), cfg.batch_size, step, cfg.seed)
        ids, labels = pair_batch(pairs, indices, vocab, cfg.seed, n_sequences, device)
        with autocast():
            logps = dict(zip(SEQUENCES, sequence_logps(policy, ids, labels).view(n_sequences, -1)))
            rehearsal = response_loss(policy, *make_rehearsal(studies, cfg, vocab, step, device))
        n_chosen = (labels[:2 * len(indices), 1:] != -100).sum()
        nll = -(logps["text_chosen"] + logps["image_chosen"]).sum() / n_chosen
        loss = (cfg.sft_weight if preferring else 1.0) * nll + cfg.rehearsal_weight * rehearsal
        logged = {"nll_loss": nll, "rehearsal_loss": rehearsal, "logps_i2t/chosen": logps["text_chosen"].mean(),
                  "logps_t2i/chosen": logps["image_chosen"].mean()}
        if preferring:
            at = torch.as_tensor(indices, device=device)
            rewards = {k: cfg.beta * (logps[k] - reference_of[k][at]) for k in SEQUENCES}
            keep = {k: v[at] for k, v in keep_of.items()}
            preference, terms = bidpo_loss(rewards, keep, cfg)
            loss = loss + preference
            logged |= {"dpo_loss": preference, **{f"loss_{k}": v for k, v in terms.items()}}
            logged |= direction_metrics(rewards, logps, keep)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            log(step, ("loss", "rewards_i2t/margins", "rewards_t2i/margins", "rewards_cond/margins"),
                loss=loss.detach(), grad_norm=grad_norm, lr=optimizers[1].param_groups[0]["lr"],
                **{k: v.detach() for k, v in logged.items()})
        log.bar.update()
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            save_state(folder, step + 1, [policy], optimizers, flags=run_flags(cfg))
    log.close()
    save_state(folder, cfg.steps, [policy], optimizers, flags=run_flags(cfg))
    policy.save_pretrained(folder)
    vocab.save(folder)
    finish_stage(cfg, name)
    tqdm.write(f"wrote {cfg.out}/{name}")


def main(argv=None):
    """Command line."""
    train(cli(DPOConfig, PRESETS, argv, __doc__))


if __name__ == "__main__":
    run(main)
