"""Stage 2, preference optimisation: hallucinate less, reading images and drawing them.

    python dpo.py                          # bidirectional DPO, to out/dpo; trains the stages before it if missing
    python dpo.py --objective mdpo --name mdpo          # another published objective, to out/mdpo
    python dpo.py --objective sft          # the control, out/control: same steps, same chosen sequences, plain SFT

One pair is a genuine image m with its report y_w, a distorted image m', and a rejected report y_l, as a rule
what the SFT model writes when shown m'. Of several m' (--candidates) the one is taken to which the SFT model still
gives y_w most readily: a hard pair. With the reward r(y|x) = β·(log π_θ(y|x) − log π_ref(y|x)) the terms are

    text          −log σ(r(y_w|m) − r(y_l|m))     the genuine report over the other (DPO, arXiv:2305.18290)
    image         −log σ(r(m|y_w) − r(m'|y_w))    draw the genuine image, not the distorted one
    conditional   −log σ(r(y_w|m) − r(y_w|m'))    the report belongs to its own image (CoPO, arXiv:2406.11839)
    anchor        −log σ(r(chosen) − δ)           what is chosen must not become less likely (AncPO, ibid.)
    language      (1 − σ(r(y_w|m) − r(y_l|m))^q)/q      y_l written with the image's content gone (NaPO,
                                                          arXiv:2503.17928)
    vision        the same                              y_l written without the question
    mask          −log σ(r(mask|m) − r(other mask|m))   two masks the SFT model drew, ranked by a judge

and the objectives are sums of them, each term with its weight λ:

    dpo     text
    mdpo    text + conditional + anchor
    mfpo    text + conditional + anchor, from easy pairs to hard (arXiv:2410.15334): on the same pairs, mdpo and
            a curriculum; its other half is the data, m' distorted in the key region alone
    napo    text + language + vision
    rndpo   mask + image, margins divided by the number of codes in which the two differ (arXiv:2601.23222)
    bidpo   text + image + conditional + anchor
    sft     none: the control

To every one the loop adds λ_s · NLL(chosen) + λ_r · NLL(rehearsal): plain SFT on the chosen report and image, and
on questions, masks and emptied prompts, which pairs would let fade. λ_s is 1 for the control, else 0.5. With
hard pairs bidpo's gradient is 11 to 15 times as long as the control's at first, later 4 times (grad_norm in both
logs): λ_s = λ_r = 10 about evens the two parts. bidpo follows the abstract of doi 10.1109/JBHI.2026.3707092, all of it
that is public: text and image are the abstract's, conditional and anchor ours (--conditional-weight 0 --anchor-weight
0: the strict reading). rndpo is our reading of an abstract.

A healthy log starts with every −log σ term at 0.6931 (log 2: policy == reference; bidpo's anchor at twice that,
it holds two sequences; NaPO's at 0.5) and all margins 0; then margins grow. The log-ratios of what is chosen
(drift/text_chosen, drift/image_chosen) may fall meanwhile, as the loss rewards the gap and not the level: anchor
and SFT terms hold them.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import sft as sft_stage
from data import (DISTORTIONS, INSTRUCTIONS, MAX_TEXT, add_noise, check_data, collate, data_name, distort, encode_images,
                  encode_records, lexicon, make_example, open_data, spread, statement)
from model import (Log, TuneConfig, UserError, add_lora, arg, batch_indices, begin_stage, cli, finish_stage, generate, get_lr,
                   init_run, make_optimizers, per_token_logps, pick, read_tensors, run, run_flags, save_state, save_tuned,
                   sequence_logps, set_lr, trained_parameters, weights_hash)
from sft import dice, draw_masks, load_gpt, load_vqgan, response_loss


@dataclass
class DPOConfig(TuneConfig):
    """Flags of stage 2. Where an objective has another default than the one shown, OBJECTIVE_DEFAULTS holds it."""

    objective: str = arg("bidpo", "bidpo, dpo, mdpo, mfpo, napo, rndpo; sft: the control, chosen sequences alone",
                         choices=("bidpo", "dpo", "mdpo", "mfpo", "napo", "rndpo", "sft"))
    name: str = arg("", "folder under --out for the result; empty: control for --objective sft, dpo for every other")
    steps: int = arg(300, "optimizer steps")
    batch_size: int = arg(16, "pairs a step")
    pairs: int = arg(4800, "pairs to build, from as many training records")
    distort: tuple = arg(("remove",), "kinds of distortion, drawn evenly: " + " ".join(DISTORTIONS))
    candidates: int = arg(1, "distorted images to try for a pair; the one that the SFT model notices least is taken")
    strength: int = arg(500, "noise and region-noise: DDPM step, 1 to 1000")
    rejected: tuple = arg(("distorted",), "who writes the rejected report, mixed evenly: the SFT model shown the "
                          "distorted image, its own wrong report of the genuine one (own), or no-image, no-question")
    pair_temperature: float = arg(1.0, "temperature of the SFT model's reports and masks")
    flip_pairs: float = arg(0.0, "share of pairs with chosen and rejected report and mask swapped, for every term and the NLL")
    curriculum: bool = arg(False, "easy, medium, hard thirds one after the other, by semantic entropy (mfpo: on)")
    entropy_samples: int = arg(5, "reports sampled for the semantic entropy of an image")
    proposals: int = arg(4, "rndpo: masks that the SFT model draws of one structure")
    judge: str = arg("agreement", "rndpo: ranks masks by Dice with the other proposals, or with the truth",
                     choices=("agreement", "truth"))
    judge_noise: float = arg(0.0, "rndpo: share of the judge's comparisons that come out wrong")
    mining: str = arg("top-bottom", "rndpo: best against worst proposal, or a random two",
                      choices=("top-bottom", "random"))
    normalise: bool = arg(False, "divide image and mask margins by the number of codes that differ (rndpo: on)")
    beta: float = arg(0.5, "preference strength β, per nat (dpo, mdpo, mfpo, napo: 0.1; rndpo: 5)")
    text_weight: float = arg(0.5, "λ of text (dpo, mdpo, mfpo, napo: 1)")
    image_weight: float = arg(0.1, "λ of image")
    conditional_weight: float = arg(1.0, "λ of conditional")
    anchor_weight: float = arg(0.2, "λ of anchor (mdpo, mfpo: 1)")
    anchor_delta: float = arg(0.0, "δ of mdpo, η of mfpo: reward that the anchor asks of chosen sequences")
    language_weight: float = arg(1.0, "λ of language")
    vision_weight: float = arg(1.0, "λ of vision")
    mask_weight: float = arg(1.0, "λ of mask")
    napo_alpha: float = arg(1.0, "napo: α, how steeply q falls as margins grow")
    q_min: float = arg(0.001, "napo: least q; towards 0 the term becomes DPO's")
    q_max: float = arg(1.0, "napo: greatest q; at 1 the term is the noise-robust mean absolute error")
    sft_weight: float = arg(0.5, "λ_s: mean negative log-probability of chosen sequences, per token (sft: 1)")
    rehearsal_weight: float = arg(1.0, "λ_r: the same of questions, masks and emptied prompts")
    rehearsal_size: int = arg(32, "rehearsal sequences a step")
    rehearsal_records: int = arg(4800, "training records that rehearsal draws from")
    lr: float = arg(5e-4, "peak learning rate of embeddings and norms (AdamW)")
    muon_lr: float = arg(2e-3, "peak learning rate of the matrices inside blocks (Muon)")
    log_every: int = arg(10, "steps between log lines")
    save_every: int = arg(100, "steps between saved states, for --resume")
    resume: bool = arg(False, "go on from the last saved state")


PRESETS = {"tiny": dict(steps=12, batch_size=4, pairs=32, rehearsal_size=4, proposals=3), "small": {},
           "base": dict(steps=2000, batch_size=32, pairs=40000, lr=1e-4, muon_lr=5e-4)}
PUBLISHED = dict(beta=0.1, text_weight=1.0)
# bidpo's defaults are the flags' own, found on phantoms; the others' are the papers' where they give one
OBJECTIVE_DEFAULTS = {"bidpo": {}, "dpo": PUBLISHED, "mdpo": PUBLISHED | dict(anchor_weight=1.0), "napo": PUBLISHED,
                      "mfpo": PUBLISHED | dict(anchor_weight=1.0, curriculum=True),
                      "rndpo": dict(beta=5.0, normalise=True), "sft": dict(sft_weight=1.0)}
CHOSEN = ("text_chosen", "image_chosen")      # what the NLL is taken of, for every objective and the control
REHEARSAL = {"report": 0.0, "generate": 0.25, "ask": 0.45, "segment": 0.30}


# ---------------------------------------------------------------------------------------------
# Objectives: pure functions of margins r(chosen) − r(rejected), one a comparison, and of rewards, one a
# sequence, all (B,). The result is each term's loss, (B,).
# ---------------------------------------------------------------------------------------------


def preference_loss(margin):
    """−log σ(margin) (Eq. 7, arXiv:2305.18290), computed as softplus(−margin); log 2 at margin 0."""
    return F.softplus(-margin)


def anchor_loss(reward, delta):
    """−log σ(r(chosen) − δ) (arXiv:2406.11839): keeps what is chosen from becoming less likely."""
    return F.softplus(delta - reward)


def box_cox_loss(margin, q):
    """(1 − σ(margin)^q)/q (arXiv:2503.17928): q → 0 gives −log σ(margin), q = 1 the bounded 1 − σ(margin)."""
    return -torch.expm1(q * F.logsigmoid(margin)) / q


def noise_q(mean_margin, cfg):
    """NaPO's q of a batch, from its mean margin of per-token mean log-ratios: a margin near 0 means noise, a high q."""
    return (2 * (1 - torch.sigmoid(cfg.napo_alpha * mean_margin.detach()))).clamp(cfg.q_min, cfg.q_max)


def dpo_loss(margins, rewards, cfg):
    """Image to text alone (arXiv:2305.18290)."""
    return {"text": preference_loss(margins["text"])}


def bidpo_loss(margins, rewards, cfg):
    """Both directions (doi 10.1109/JBHI.2026.3707092), with a conditional and an anchor term of our own choice."""
    return {"text": preference_loss(margins["text"]), "image": preference_loss(margins["image"]),
            "conditional": preference_loss(margins["conditional"]),
            "anchor": sum(anchor_loss(rewards[k], cfg.anchor_delta) for k in CHOSEN)}


def mdpo_loss(margins, rewards, cfg):
    """DPO + CoPO + AncPO (arXiv:2406.11839)."""
    return {"text": preference_loss(margins["text"]), "conditional": preference_loss(margins["conditional"]),
            "anchor": anchor_loss(rewards["text_chosen"], cfg.anchor_delta)}


def mfpo_loss(margins, rewards, cfg):
    """L_text + L_image + L_margin (arXiv:2410.15334): mdpo's sum, on other data and in another order."""
    return mdpo_loss(margins, rewards, cfg)


def napo_loss(margins, rewards, cfg):
    """DPO, and noise-robust terms for rejected reports made under language and vision bias (arXiv:2503.17928)."""
    return {"text": preference_loss(margins["text"])} | {
        bias: box_cox_loss(margins[bias], margins[f"{bias}/q"]) for bias in ("language", "vision")}


def rndpo_loss(margins, rewards, cfg):
    """DPO between masks, and between images, with margins divided by |Ω| (our reading of arXiv:2601.23222)."""
    return {"mask": preference_loss(margins["mask"]), "image": preference_loss(margins["image"])}


# objective: its function and the comparisons whose margins it needs
OBJECTIVES = {"dpo": (dpo_loss, ("text",)), "bidpo": (bidpo_loss, ("text", "image", "conditional")),
              "mdpo": (mdpo_loss, ("text", "conditional")), "mfpo": (mfpo_loss, ("text", "conditional")),
              "napo": (napo_loss, ("text", "language", "vision")), "rndpo": (rndpo_loss, ("mask", "image")),
              "sft": (lambda margins, rewards, cfg: {}, ())}
# comparison: its chosen and its rejected sequence
COMPARISONS = {"text": ("text_chosen", "text_rejected"), "image": ("image_chosen", "image_rejected"),
               "conditional": ("text_chosen", "text_distorted"), "language": ("text_chosen", "text_language"),
               "vision": ("text_chosen", "text_vision"), "mask": ("mask_chosen", "mask_rejected")}
BIASED = {"language": "no-image", "vision": "no-question"}      # comparison: who writes its rejected report


def sequences_of(objective):
    """The sequences that an objective scores, CHOSEN first."""
    return tuple(dict.fromkeys(CHOSEN + sum((COMPARISONS[c] for c in OBJECTIVES[objective][1]), ())))


def masked_mean(values, keep):
    """Mean over the pairs that count; 0 where none does."""
    return (values * keep).sum() / keep.sum().clamp(min=1)


def make_margins(ratios, sizes, keep, cfg):
    """Margins (B,) of the objective's comparisons from log-ratios log π_θ − log π_ref of its sequences.

    "NAME/q" is NaPO's q, from margins of per-token means (without β) over the pairs that count. With cfg.normalise
    image and mask margins are sums over Ω, the codes in which the two differ, divided by |Ω|: codes outside Ω
    differ in probability too, through their prefix, and are left out."""
    margins = {}
    for name in OBJECTIVES[cfg.objective][1]:
        chosen, rejected = COMPARISONS[name]
        suffix = "/Ω" if cfg.normalise and name in ("image", "mask") else ""
        margins[name] = cfg.beta * (ratios[chosen + suffix] - ratios[rejected + suffix])
        if suffix:
            margins[name] = margins[name] / sizes[chosen + suffix].clamp(min=1)
        if name in BIASED:
            per_token = ratios[chosen] / sizes[chosen] - ratios[rejected] / sizes[rejected]
            margins[f"{name}/q"] = noise_q(masked_mean(per_token, keep[name]), cfg)
    return margins


def objective_loss(ratios, sizes, keep, cfg):
    """The objective's weighted sum, each term's mean over the pairs that count (keep, 0 or 1), and the margins."""
    margins = make_margins(ratios, sizes, keep, cfg)
    rewards = {k: cfg.beta * v for k, v in ratios.items()}
    terms = {name: masked_mean(loss, keep.get(name, torch.ones_like(loss)))
             for name, loss in OBJECTIVES[cfg.objective][0](margins, rewards, cfg).items()}
    return sum(getattr(cfg, f"{name}_weight") * term for name, term in terms.items()), terms, margins


# ---------------------------------------------------------------------------------------------
# Pairs: built once, in out/pairs, for every objective
# ---------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """One genuine study against its distorted twin, and what the SFT model makes of it."""

    index: int                   # the record in the training split
    name: str                    # and its name
    kind: str                    # the distortion
    codes: np.ndarray            # (N,) genuine image
    distorted: np.ndarray        # (N,) distorted image
    chosen: str                  # the genuine report
    reports: dict = field(default_factory=dict)     # writer -> what the SFT model wrote (WRITERS)
    entropy: float | None = None            # semantic entropy of its reports on the genuine image, in nats
    structure: str = ""          # of the proposals; "" where the record has no masks
    proposals: np.ndarray | None = None     # (k, N) masks of the structure that the SFT model drew
    scores: np.ndarray | None = None        # (2, k) their Dice with each other, and with the true mask
    # what one run takes of all this
    wording: int = 0             # which of the three ways to ask; choose_rejected draws it
    rejected: str = ""
    masks: tuple = ()            # chosen and rejected codes


def shuffled(pair):
    """The genuine image's codes in random order: its gray values and nothing of its findings."""
    return np.random.default_rng(pair.index).permutation(pair.codes)


# Writer: its prompt. Without the image the model can only follow the habits of language, without the question only
# what it likes to say of images (NaPO's two biases). "No image" is one that shows nothing: a model that has never
# met a prompt without any image answers it with scrambled words, which teach nothing.
WRITERS = {"distorted": lambda p, vocab, asked: vocab.understand(p.distorted, asked),
           "own": lambda p, vocab, asked: vocab.understand(p.codes, asked),
           "no-image": lambda p, vocab, asked: vocab.understand(shuffled(p), asked),
           "no-question": lambda p, vocab, asked: vocab.understand(p.codes, "")}


@torch.no_grad()
def key_region(record, model, vocab, vqgan, channels, device, autocast):
    """Where the report comes from: a mask (H, W), for records whose findings have none. Our choice:

    the image is cut into 4x4 blocks, the codes of one after the other replaced by those of noise; the
    region is the blocks that cost log π(report) at least half of what the costliest does. None if none costs."""
    drowned = add_noise(record.image, np.random.default_rng(0), 1000)
    codes, noise = encode_images([record.image, drowned], vqgan, channels, device, autocast)
    side, (h, w) = int(len(codes) ** 0.5), record.image.shape[:2]
    blocks = lambda h, w: (np.arange(h)[:, None] * 4 // h) * 4 + np.arange(w) * 4 // w        # (h, w) of 0..15
    hidden = [np.where(blocks(side, side).ravel() == b, noise, codes) for b in range(16)]
    asked, said = INSTRUCTIONS["report"][0], vocab.text_response(record.text)
    with autocast():
        logps = sequence_logps(model, *collate([(vocab.understand(c, asked), said) for c in (codes, *hidden)],
                                               vocab.pad, device))
    cost = (logps[0] - logps[1:]).cpu().numpy()
    return np.isin(blocks(h, w), np.flatnonzero(cost >= cost.max() / 2)) if cost.max() > 0 else None


def count_kinds(pairs):
    """"12 pairs (9 remove, 3 add)": what there is, for the screen."""
    used = ", ".join(f"{c} {k}" for k, c in Counter(p.kind for p in pairs).most_common())
    return f"{len(pairs)} pairs ({used})"


def build_pairs(records, cfg, vqgan, region, device, autocast):
    """Pairs from cfg.pairs records, those that have a text, drawn from (seed, index); no reports yet.

    A record makes as many as it has different ones among cfg.candidates distorted images. A pair whose two images
    have the same codes is dropped. Raises UserError if none is left."""
    order = np.random.default_rng([cfg.seed, 4]).permutation(len(records))[:cfg.pairs]
    pairs, dropped = [], Counter()
    bar = tqdm(total=len(order), desc="building pairs", unit="record", leave=False)
    for start in range(0, len(order), 256):
        batch, genuine, distorted = [], [], []
        for index in map(int, order[start:start + 256]):
            rng, record = np.random.default_rng([cfg.seed, 5, index]), records[index]
            if not record.text:
                dropped["without text"] += 1
                continue
            tried = {}                                        # distorted image, as bytes: the image and its kind
            for _ in range(cfg.candidates):
                kind = cfg.distort[rng.integers(len(cfg.distort))]
                image, kind = distort(records, index, kind, cfg.strength, rng, region)
                if image is not None:
                    tried.setdefault(image.tobytes(), (image, kind))
            if not tried:
                dropped["which no distortion fits"] += 1
                continue
            genuine.append(record.image)
            for image, kind in tried.values():
                batch.append((index, record, kind, len(genuine) - 1))
                distorted.append(image)
        codes = encode_images(genuine + distorted, vqgan, cfg.channels, device, autocast) if batch else []
        for (index, record, kind, at), twin in zip(batch, codes[len(genuine):]):
            own = codes[at]
            if (own == twin).all():
                dropped["whose codes the distortion left as they were"] += 1
            else:
                pairs.append(Pair(index, record.name, kind, own, twin, record.text))
        bar.update(min(256, len(order) - start))
    bar.close()
    counts = ", ".join(f"{c} {why}" for why, c in dropped.items())
    if not pairs:
        raise UserError(f"no usable preference pair: dropped {counts or 'nothing, there are no records'}; try another "
                        "--distort")
    tqdm.write(count_kinds(pairs) + (f"; dropped {counts}" if counts else ""))
    return pairs


def least_noticed(pairs, logps):
    """Of a record's pairs the one with the greatest log π(y_w|m'), where the SFT model hardly notices the distortion.

    There it follows habit (what the report states is gone, and it still seems to fit), or the change is hard to see.
    Our choice, after the hard negatives of contrastive learning (arXiv:2010.04592). logps: (n,)."""
    best = {}
    for pair, logp in zip(pairs, logps.tolist()):
        if pair.index not in best or logp > best[pair.index][0]:
            best[pair.index] = logp, pair
    return [pair for _, pair in best.values()]


def sample_reports(pairs, writer, model, vocab, cfg, seed):
    """What the SFT model writes, sampled from one of WRITERS' prompts for each pair: a list of strings."""
    texts = []
    for start in tqdm(range(0, len(pairs), 256), desc=f"reports, {writer}", unit="batch", leave=False):
        prompts = [WRITERS[writer](p, vocab, INSTRUCTIONS["report"][0]) for p in pairs[start:start + 256]]
        rows = generate(model, prompts, MAX_TEXT, vocab.text_range, vocab.eos, cfg.pair_temperature, seed=seed + start)
        texts += [vocab.decode_text(row) for row in rows]
    return texts


def add_entropy(pairs, model, vocab, cfg, phrases):
    """Semantic entropy −Σ p log p over distinct statements among m sampled reports (arXiv:2410.15334)."""
    m = cfg.entropy_samples
    samples = [sample_reports(pairs, "own", model, vocab, cfg, cfg.seed + 1_000_003 * (j + 1)) for j in range(m)]
    for pair, texts in zip(pairs, zip(*samples)):
        p = np.array(list(Counter(statement(t, phrases) for t in texts).values())) / m
        pair.entropy = float((p * np.log(1 / p)).sum())


def add_proposals(pairs, records, model, vocab, vqgan, cfg):
    """For each pair whose record has masks: k masks of one structure that the SFT model draws, and their scores."""
    k = cfg.proposals
    for start in tqdm(range(0, len(pairs), 64), desc="mask proposals", unit="batch", leave=False):
        batch = [(p, records[p.index].masks) for p in pairs[start:start + 64]]
        batch = [(p, masks) for p, masks in batch if masks]
        if not batch:
            continue
        for pair, masks in batch:
            pair.structure = str(np.random.default_rng([cfg.seed, 10, pair.index]).choice(sorted(masks)))
        drawn, codes = draw_masks(model, vocab, [p.codes for p, _ in batch for _ in range(k)],
                                  [p.structure for p, _ in batch for _ in range(k)], vqgan, cfg.pair_temperature,
                                  cfg.seed + start)
        for (pair, masks), own, proposals in zip(batch, np.split(drawn, len(batch)), np.split(codes, len(batch))):
            pair.proposals = proposals
            agreement = [np.mean([dice(own[a], own[b]) for b in range(k) if b != a]) for a in range(k)]
            pair.scores = np.array([agreement, [dice(a, masks[pair.structure]) for a in own]], np.float32)


def mine(scores, mining, noise, rng):
    """(chosen, rejected): two of the k proposals, by the comparisons of a judge who errs with probability `noise`.

    top-bottom: most against fewest wins among all comparisons; random: any two, compared once. Equal scores
    and equal numbers of wins are decided by lot."""
    scores = scores + rng.uniform(0, 1e-6, len(scores))
    players = rng.permutation(len(scores))[:2 if mining == "random" else None]
    wins = dict.fromkeys(players.tolist(), 0)
    for i, j in combinations(wins, 2):
        errs = rng.random() < noise
        wins[i if (scores[i] > scores[j]) != errs else j] += 1
    ranked = sorted(wins, key=wins.get)          # stable, and the players stand in random order
    return ranked[-1], ranked[0]


def choose_rejected(pairs, cfg, phrases):
    """Set each pair's wording, rejected report and masks as cfg wants them; which pairs count: {comparison: (n,) bool}.

    Raises UserError where a comparison of the objective has no pair whose two sides differ."""
    keep = {name: np.ones(len(pairs), bool) for name in OBJECTIVES[cfg.objective][1]}
    flipped = np.random.default_rng([cfg.seed, 12]).random(len(pairs)) < cfg.flip_pairs
    for i, pair in enumerate(pairs):
        pair.wording = int(np.random.default_rng([cfg.seed, 6, i]).integers(3))
        pair.rejected = pair.reports[cfg.rejected[i % len(cfg.rejected)]]
        if "mask" in keep:
            pair.masks = (pair.codes, pair.codes)              # a placeholder that `keep` leaves out
            if pair.structure:
                best, worst = mine(pair.scores[["agreement", "truth"].index(cfg.judge)], cfg.mining, cfg.judge_noise,
                                   np.random.default_rng([cfg.seed, 11, i]))
                pair.masks = (pair.proposals[best], pair.proposals[worst])
            keep["mask"][i] = (pair.masks[0] != pair.masks[1]).any()        # |Ω| = 0 carries no signal
        if flipped[i]:              # as in noisy data: NLL, anchor and drawing prompts follow the swapped labels
            pair.chosen, pair.rejected, pair.masks = pair.rejected, pair.chosen, pair.masks[::-1]
        for name, text in {"text": pair.rejected, **{b: pair.reports.get(w) for b, w in BIASED.items()}}.items():
            if name in keep:
                keep[name][i] = statement(text, phrases) != statement(pair.chosen, phrases)
    counts = ", ".join(f"{name} {int(v.sum())}" for name, v in keep.items())
    if not all(v.any() for v in keep.values()):
        raise UserError(f"--objective {cfg.objective} finds no usable preference pair: of {len(pairs)}, chosen and rejected "
                        f"differ in: {counts}; try another --rejected or --distort, or a --pair-temperature above 0")
    if keep:
        tqdm.write(f"of {len(pairs)} pairs chosen and rejected differ in: {counts}")
    return keep


def read_pairs(folder):
    """The Pairs of out/pairs. Raises UserError if they cannot be read."""
    try:
        codes = read_tensors(folder / "codes.safetensors")
        with open(folder / "pairs.jsonl", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]           # not splitlines(), which cuts at U+2028 and its like too
        pairs = [Pair(codes=c.numpy(), distorted=d.numpy(), **row)
                 for c, d, row in zip(codes["genuine"], codes["distorted"], rows, strict=True)]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} cannot be read ({str(error)[:120]}); remove it, and `python dpo.py` builds it again")
    with_masks = [p for p in pairs if p.structure]
    for pair, proposals, scores in zip(with_masks, codes.get("proposals", ()), codes.get("scores", ())):
        pair.proposals, pair.scores = proposals.numpy(), scores.numpy()
    return pairs


def write_pairs(cfg, pairs, recipe):
    """out/pairs: config.json, codes.safetensors, and pairs.jsonl for people to read."""
    new = Path(cfg.out) / "pairs.partial"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    tensors = {"genuine": [p.codes for p in pairs], "distorted": [p.distorted for p in pairs]}
    if with_masks := [p for p in pairs if p.structure]:
        tensors |= {"proposals": [p.proposals for p in with_masks], "scores": [p.scores for p in with_masks]}
    save_file({k: torch.tensor(np.stack(v)) for k, v in tensors.items()}, new / "codes.safetensors")
    with open(new / "pairs.jsonl", "w", encoding="utf-8") as f:
        for p in pairs:
            row = {k: getattr(p, k) for k in ("index", "name", "kind", "structure", "entropy", "chosen", "reports")}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    (new / "config.json").write_text(json.dumps(recipe, indent=2) + "\n")
    finish_stage(cfg, "pairs")


def load_or_build_pairs(cfg, data, vqgan, model, vocab, device, autocast):
    """The pairs of this recipe, from out/pairs if it was made by the same one; what is missing there is added."""
    folder, phrases = Path(cfg.out) / "pairs", lexicon(data["train"])
    flags = ("seed", "records", "pairs", "candidates", "strength", "pair_temperature", "entropy_samples", "proposals")
    recipe = {k: getattr(cfg, k) for k in flags}
    recipe |= {"data": data_name(cfg), "distort": list(cfg.distort), "sft": weights_hash(model)}
    found = (folder / "config.json").exists() and json.loads((folder / "config.json").read_text()) == recipe
    changed = not found
    if found:
        pairs = read_pairs(folder)
        tqdm.write(f"{len(pairs)} pairs from {folder}")
    else:
        region = lambda record: key_region(record, model, vocab, vqgan, cfg.channels, device, autocast)
        pairs = build_pairs(data["train"], cfg, vqgan, region, device, autocast)
        if cfg.candidates > 1:                         # all in wording 0, until choose_rejected draws it
            logps = reference_logps(model, pairs, ("text_distorted",), vocab, cfg, device, autocast)
            pairs = least_noticed(pairs, logps["text_distorted"])
            tqdm.write(f"of these kept, the least noticed of each record: {count_kinds(pairs)}")
    compared = OBJECTIVES[cfg.objective][1]
    writers = {*cfg.rejected, "distorted", *(w for b, w in BIASED.items() if b in compared)} - pairs[0].reports.keys()
    with autocast():
        for writer in sorted(writers):
            for pair, text in zip(pairs, sample_reports(pairs, writer, model, vocab, cfg, cfg.seed)):
                pair.reports[writer] = text
            changed = True
        if cfg.curriculum and pairs[0].entropy is None:
            add_entropy(pairs, model, vocab, cfg, phrases)
            changed = True
        if "mask" in compared and not any(p.structure for p in pairs):
            add_proposals(pairs, data["train"], model, vocab, vqgan, cfg)
            changed = True
            if not any(p.structure for p in pairs):
                raise UserError(f"--objective {cfg.objective} compares masks, and no training record has any: add "
                                "`masks` to the metadata, or take another objective")
    if changed:
        write_pairs(cfg, pairs, recipe)
    return pairs


# ---------------------------------------------------------------------------------------------
# Pairs as sequences
# ---------------------------------------------------------------------------------------------


def pair_examples(pair, names, vocab):
    """The named (prompt, response) sequences of a pair."""
    asked = INSTRUCTIONS["report"][pair.wording]
    genuine = vocab.understand(pair.codes, asked)
    drawn = vocab.draw(INSTRUCTIONS["generate"][pair.wording].format(pair.chosen))
    outlined = vocab.segment(pair.codes, pair.structure, pair.wording)
    text, image = vocab.text_response, vocab.image_response
    made = {"text_chosen": lambda: (genuine, text(pair.chosen)),
            "text_rejected": lambda: (genuine, text(pair.rejected)),
            "text_language": lambda: (genuine, text(pair.reports["no-image"])),
            "text_vision": lambda: (genuine, text(pair.reports["no-question"])),
            "text_distorted": lambda: (vocab.understand(pair.distorted, asked), text(pair.chosen)),
            "image_chosen": lambda: (drawn, image(pair.codes)),
            "image_rejected": lambda: (drawn, image(pair.distorted)),
            "mask_chosen": lambda: (outlined, image(pair.masks[0])),
            "mask_rejected": lambda: (outlined, image(pair.masks[1]))}
    return [made[name]() for name in names]


def pair_batch(pairs, indices, names, vocab, device):
    """ids and labels (len(names)·B, T) of some pairs, one kind of sequence after the other."""
    rows = [pair_examples(pairs[i], names, vocab) for i in indices]
    return collate([row[k] for k in range(len(names)) for row in rows], vocab.pad, device)


def score(model, ids, labels, names):
    """log π and number of tokens of each named sequence: two dicts of (B,).

    Where a batch holds two images or masks to compare, "NAME/Ω" is the sum over the codes in which they differ."""
    logps = per_token_logps(model, ids, labels)
    T = logps.size(1)
    logps, counted = logps.view(len(names), -1, T), (labels[:, 1:] != -100).view(len(names), -1, T)
    ids = ids[:, 1:].reshape(logps.shape)
    sums, sizes = dict(zip(names, logps.sum(-1))), dict(zip(names, counted.sum(-1)))
    for chosen, rejected in (COMPARISONS["image"], COMPARISONS["mask"]):
        if rejected in names:
            a, b = names.index(chosen), names.index(rejected)
            differ = counted[a] & (ids[a] != ids[b])
            for name, i in ((chosen, a), (rejected, b)):
                sums[f"{name}/Ω"], sizes[f"{name}/Ω"] = (logps[i] * differ).sum(-1), differ.sum(-1)
    return sums, sizes


@torch.no_grad()
def reference_logps(model, pairs, names, vocab, cfg, device, autocast):
    """log π_ref of the named sequences of every pair, as `score` gives them, (n,) each; once, before the loop."""
    chunks = []
    for start in tqdm(range(0, len(pairs), cfg.batch_size), desc="reference", unit="batch", leave=False):
        indices = range(start, min(start + cfg.batch_size, len(pairs)))
        with autocast():
            chunks.append(score(model, *pair_batch(pairs, indices, names, vocab, device), names)[0])
    return {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]}


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


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


def make_rehearsal(studies, cfg, vocab, step, device):
    """A batch of questions, masks and emptied prompts from the training studies."""
    rng = np.random.default_rng([cfg.seed, 7, step])
    studies = [studies[i] for i in batch_indices(len(studies), cfg.rehearsal_size, step, cfg.seed)]
    examples = [make_example(s, sft_stage.pick_task(s, REHEARSAL, rng), vocab, rng, empty_share=1.0) for s in studies]
    return collate(examples, vocab.pad, device)


def pick_pairs(pairs, cfg, step):
    """Indices of a step's pairs; with --curriculum from the third of the pairs, easy to hard, whose turn it is."""
    pool = np.arange(len(pairs))
    if cfg.curriculum:
        easy_first = np.argsort([p.entropy for p in pairs], kind="stable")
        thirds = np.array_split(easy_first, min(3, len(pairs)))
        pool = thirds[len(thirds) * step // cfg.steps]
    return pool[batch_indices(len(pool), cfg.batch_size, step, cfg.seed)]


def comparison_metrics(ratios, logps, margins, keep, cfg):
    """TRL's log names for each comparison: rewards_text/margins, logps_image/chosen, …

    Rewards are those of whole sequences, also where a margin is one a code of Ω (cfg.normalise)."""
    result = {}
    for name in OBJECTIVES[cfg.objective][1]:
        chosen, rejected = COMPARISONS[name]
        values = {f"rewards_{name}/chosen": cfg.beta * ratios[chosen],
                  f"rewards_{name}/rejected": cfg.beta * ratios[rejected],
                  f"rewards_{name}/margins": margins[name], f"rewards_{name}/accuracies": (margins[name] > 0).float(),
                  f"logps_{name}/chosen": logps[chosen], f"logps_{name}/rejected": logps[rejected]}
        result |= {k: masked_mean(v.detach(), keep[name]) for k, v in values.items()}
    return result


def check_flags(cfg):
    """Raise UserError for a flag whose value makes no sense."""
    for flag, known in (("distort", DISTORTIONS), ("rejected", WRITERS)):
        if unknown := [k for k in getattr(cfg, flag) if k not in known]:
            raise UserError(f"--{flag} {' '.join(unknown)} is unknown; there are: {', '.join(known)}")
    if not 1 <= cfg.strength <= 1000:
        raise UserError(f"--strength {cfg.strength} is a DDPM step: name a number from 1 to 1000")
    for flag in ("flip_pairs", "judge_noise"):
        if not 0 <= getattr(cfg, flag) <= 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)} is a share: name a number from 0 to 1")
    if not 0 < cfg.q_min <= cfg.q_max <= 1:
        raise UserError(f"--q-min {cfg.q_min} and --q-max {cfg.q_max} must lie in this order above 0 and up to 1")
    if cfg.objective == "rndpo" and cfg.proposals < 2:
        raise UserError("--proposals 1 leaves nothing to compare: name 2 or more")
    if cfg.name == "control" and cfg.objective != "sft":
        raise UserError("--name control is what others are compared with: it goes with --objective sft; name another")
    if cfg.name in ("vqgan", "sft", "pairs", "judge", "eval", "..") or Path(cfg.name).name != cfg.name \
            or Path(cfg.name).suffix:
        raise UserError(f"--name {cfg.name} is taken by another stage or is no plain name; name another")


def train(cfg):
    """Optimise the SFT model on preference pairs (or on their chosen sequences) and write out/NAME."""
    check_flags(cfg)
    name = cfg.name or ("control" if cfg.objective == "sft" else "dpo")
    device, autocast = init_run(cfg)
    model, vocab, vqgan = load_sft(cfg, device)
    data = open_data(cfg)
    pairs = load_or_build_pairs(cfg, data, vqgan, model, vocab, device, autocast)
    keep_all = {k: torch.tensor(v, device=device).float()
                for k, v in choose_rejected(pairs, cfg, lexicon(data["train"])).items()}
    studies = encode_records([data["train"][int(i)] for i in spread(len(data["train"]), cfg.rehearsal_records)],
                             vqgan, cfg.channels, cfg.seed, device, autocast, "encoding rehearsal")
    studies = [s for s in studies if any(REHEARSAL[t] > 0 for t in s.tasks)]
    names = sequences_of(cfg.objective)
    # all that is needed of the reference, so no second model: from here on this one is the policy
    reference, sft_hash = reference_logps(model, pairs, names, vocab, cfg, device, autocast), weights_hash(model)
    if cfg.lora_rank:
        add_lora(model, cfg, Path(cfg.out) / "sft")
    model.train()
    trained = trained_parameters(model)
    optimizers = make_optimizers(model, cfg.lr, cfg.muon_lr, weight_decay=0.0)
    folder, figures = begin_stage(cfg, name, [trained], optimizers)
    if figures.get("sft", sft_hash) != sft_hash:
        raise UserError(f"--resume: {folder} was started from another {cfg.out}/sft; leave out --resume")
    start = figures.get("step", 0)
    log = Log(f"{cfg.out}/{name}.jsonl", name, cfg.steps, start)
    for step in range(start, cfg.steps):
        set_lr(optimizers, get_lr(step, cfg.steps, warmup=20))
        torch.manual_seed(cfg.seed + step)                   # LoRA's dropout: a resumed run draws alike
        indices = pick_pairs(pairs, cfg, step)
        at = torch.as_tensor(indices, device=device)
        with autocast():
            logps, sizes = score(model, *pair_batch(pairs, indices, names, vocab, device), names)
            rehearsal = response_loss(model, *make_rehearsal(studies, cfg, vocab, step, device))
        ratios = {k: v - reference[k][at] for k, v in logps.items()}
        keep = {k: v[at] for k, v in keep_all.items()}
        preference, terms, margins = objective_loss(ratios, sizes, keep, cfg)
        nll = -sum(logps[k].sum() for k in CHOSEN) / sum(sizes[k].sum() for k in CHOSEN)
        loss = preference + cfg.sft_weight * nll + cfg.rehearsal_weight * rehearsal
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            logged = {"nll_loss": nll, "rehearsal_loss": rehearsal, **{f"loss_{k}": v for k, v in terms.items()},
                      **{f"drift/{k}": ratios[k].mean() for k in CHOSEN},
                      **comparison_metrics(ratios, logps, margins, keep, cfg)}
            log(step, ("loss", *(f"rewards_{k}/margins" for k in keep)), loss=loss.detach(), grad_norm=grad_norm,
                lr=optimizers[-1].param_groups[0]["lr"], **{k: v.detach() for k, v in logged.items()})
        log.bar.update()
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            save_state(folder, step + 1, [trained], optimizers, flags=run_flags(cfg), sft=sft_hash)
    log.close()
    save_state(folder, cfg.steps, [trained], optimizers, flags=run_flags(cfg), sft=sft_hash)
    save_tuned(folder, model, cfg)
    vocab.save(folder)
    finish_stage(cfg, name)
    tqdm.write(f"wrote {cfg.out}/{name}")


def main(argv=None):
    """Command line."""
    train(cli(DPOConfig, PRESETS, argv, __doc__, ("objective", OBJECTIVE_DEFAULTS)))


if __name__ == "__main__":
    run(main)
