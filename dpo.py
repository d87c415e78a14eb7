"""Stage 2, preference optimisation: hallucinate less, reading images and drawing them.

    python dpo.py                          # bidirectional DPO, to out/bidpo; trains the stages before it if missing
    python dpo.py --objective mdpo         # another published objective, to out/mdpo
    python dpo.py --objective sft          # the control, out/control: same steps, same chosen sequences, plain SFT

One pair is a genuine study, image m and report y, and its distorted twin m' with its own report y', and with the answers a
and a' of the two to a question q that tells them apart; y_l is what the SFT model writes when shown m'. The twin only ever
stands on the rejected side. With the reward r(y|x) = β·(log π_θ(y|x) − log π_ref(y|x)) the terms are −log σ of a margin, a
chosen reward less a rejected one (DPO, arXiv:2305.18290; in the right column the prompts differ, which its derivation does
not cover):

                  the response is the twin's            the condition is the twin's
    reading       text      r(y|m) − r(y_l|m)           text_given    r(y|m) − r(y|m')        (CoPO, arXiv:2406.11839)
    drawing       image     r(m|y) − r(m'|y)            image_given   r(m|y) − r(m|y')
    answering     answer    r(a|q,m) − r(a'|q,m)        answer_given  r(a|q,m) − r(a|q,m')

Of several m' (--candidates) we take the one given which the SFT model finds y likeliest: a hard pair. Further terms are

    anchor        −log σ(r(chosen) − δ)    keeps the chosen report (bidpo: image too) likely (AncPO, arXiv:2406.11839)
    language      (1 − σ(margin)^q)/q      as text, y_l written of a scrambled image; q: see noise_q (NaPO, arXiv:2503.17928)
    vision        the same                 y_l written without the question
    mask          −log σ(margin)           two masks that the SFT model drew, ranked by a judge

and the objectives are sums of them, each term with its weight λ:

    dpo     text
    mdpo    text + text_given + anchor
    mfpo    mdpo's sum, from easy pairs to hard (arXiv:2410.15334; its m', distorted in the key region: --distort region-noise)
    napo    text + language + vision
    rndpo   mask + image, margins over the codes alone in which the two differ, per code (arXiv:2601.23222)
    bidpo   the six of the table + anchor
    sft     none: the control

To every one the loop adds λ_s · NLL(chosen) + λ_r · NLL(rehearsal), per token: plain SFT on the chosen report, image and
(bidpo and the control) answer, and on questions, masks and emptied prompts, which pairs alone let fade. Of bidpo's paper, doi
10.1109/JBHI.2026.3707092, only the abstract is public: text and image follow it, the others are ours (weights of 0 for
them: the strict reading). rndpo is our reading of an abstract.

The lesson, in order: a pair, contrasts and objectives, as pure functions; building pairs; pairs as sequences, and their
log-probabilities; training. For consultation: key region, entropy, mask proposals; pairs on disk.

A healthy log starts with every −log σ term at 0.6931 (log 2: policy == reference; bidpo's anchor, a sum of two, at twice
that; language and vision at 0.5, their q being 1) and all margins 0; then margins grow. The log-ratios of what is chosen
(drift/text_chosen, drift/image_chosen) may fall meanwhile, as the loss rewards the gap and not the level: anchor
and SFT terms hold them.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

import sft as sft_stage
from data import DISTORTIONS, Phantoms, add_noise, distort, fingerprint, lexicon, open_data, statement_of
from model import (Log, TuneConfig, UserError, add_lora, arg, batch_indices, begin_stage, built_ahead, check_own, check_resume,
                   cli, config_for, finish_stage, gather, get_lr, init_run, make_optimizers, own, per_token_logps, process,
                   read_json, read_tensors, run, run_flags, save_state, save_tuned, sequence_logps, set_lr, share_out, split_batch,
                   sum_over_processes, take_step, to_device, train_mode, trained_parameters, weights_hash, write_tensors)
from sft import (INSTRUCTIONS, check_data, collate, dice, draw_masks, load_gpt, load_vqgan, make_example, open_studies, pick_task,
                 response_loss, sample_words, warn_of_other_data)
from vqgan import encode_images


@dataclass
class DPOConfig(TuneConfig):
    """Flags of stage 2. Where an objective has another default than the one shown, OBJECTIVE_DEFAULTS holds it."""

    objective: str = arg("bidpo", "bidpo, dpo, mdpo, mfpo, napo, rndpo; sft: the control, chosen sequences alone",
                         choices=("bidpo", "dpo", "mdpo", "mfpo", "napo", "rndpo", "sft"))
    name: str = arg("", "folder under --out for the result; empty: the objective's name, control for --objective sft")
    steps: int = arg(600, "optimizer steps")
    batch_size: int = arg(16, "pairs a step", most=65536)
    pairs: int = arg(4800, "pairs to build, from as many training records")
    distort: tuple = arg(("remove",), "kinds of distortion, one per record, drawn evenly from "
                         "these (one named twice comes twice as often): " + " ".join(DISTORTIONS), choices=DISTORTIONS)
    candidates: int = arg(4, "distorted images to try for a pair; the one that the SFT model notices least is taken")
    strength: int = arg(500, "noise and region-noise: DDPM step, 1 to 1000", most=1000)
    rejected: tuple = arg(("distorted",), "what the SFT model is shown when it writes the rejected report, mixed evenly: the "
                          "distorted image; the genuine one (own: its own errors); that one scrambled, the report begun "
                          "(habit); that one without the question. twin: none of its reports but the distorted image's true one",
                          choices=("distorted", "own", "habit", "no-question", "twin"))
    pair_temperature: float = arg(1.0, "temperature of the SFT model's reports and masks")
    flip_pairs: float = arg(0.0, "share of pairs whose two reports or masks are compared the wrong way round, as in noisy data "
                            "(and logged in margins and accuracies); all other terms stay as they are", most=1)
    keep_agreeing: bool = arg(False, "compare reports that state the same, too, as data that nobody has checked would")
    label_smoothing: float = arg(0.0, "dpo: share of pairs taken to be the wrong way round (conservative DPO)", most=0.5)
    curriculum: str = arg("none", "pairs in three thirds, each with its own learning-rate schedule: by semantic entropy, easy-first "
                          "or hard-first, or shuffled at random; none: all at once (mfpo: easy-first)",
                          choices=("none", "easy-first", "hard-first", "shuffled"))
    entropy_samples: int = arg(5, "reports sampled for the semantic entropy of an image")
    proposals: int = arg(4, "rndpo: masks that the SFT model draws of one structure; the judge ranks them by their "
                         "Dice with each other", least=2)
    judge_noise: float = arg(0.0, "rndpo: share of the judge's comparisons that come out wrong", most=1)
    mining: str = arg("top-bottom", "rndpo: best against worst proposal, or a random two", choices=("top-bottom", "random"))
    normalise: bool = arg(False, "take image and mask margins over the codes that differ, per code (rndpo: on)")
    beta: float = arg(0.5, "preference strength β, per nat (dpo, mdpo, mfpo, napo: 0.1; rndpo: 5)", least=1e-6)
    text_weight: float = arg(0.5, "λ of text (dpo, mdpo, mfpo: 1; napo: 0.04)")
    image_weight: float = arg(0.1, "λ of image")
    text_given_weight: float = arg(2.0, "λ of text_given (mdpo, mfpo: 1)")
    image_given_weight: float = arg(1.0, "λ of image_given")
    answer_weight: float = arg(0.1, "λ of answer")
    answer_given_weight: float = arg(1.5, "λ of answer_given")
    anchor_weight: float = arg(0.2, "λ of anchor (mdpo, mfpo: 1)")
    anchor_delta: float = arg(0.0, "δ of mdpo, η of mfpo: reward that the anchor asks of chosen sequences")
    language_weight: float = arg(0.48, "λ of language")
    vision_weight: float = arg(0.48, "λ of vision")
    mask_weight: float = arg(1.0, "λ of mask")
    language_alpha: float = arg(0.5, "napo: α of language, how steeply q falls as log-ratios per token grow")
    vision_alpha: float = arg(0.01, "napo: α of vision, the same of log-ratios of whole reports")
    q_min: float = arg(0.001, "napo: least q; towards 0 the term becomes DPO's", least=1e-6, most=1)
    q_max: float = arg(1.0, "napo: greatest q; at 1 the term is the noise-robust mean absolute error", most=1)
    sft_weight: float = arg(10.0, "λ_s: mean negative log-probability of chosen sequences, per token (sft: 1, others but bidpo 0.5)")
    rehearsal_weight: float = arg(15.0, "λ_r: the same of questions, masks and emptied prompts (all but bidpo: 1)")
    rehearsal_size: int = arg(32, "rehearsal sequences a step", most=65536)
    lr: float = arg(5e-4, "peak learning rate of embeddings and norms (AdamW)")
    muon_lr: float = arg(2e-3, "peak learning rate of the matrices inside blocks (Muon)")
    log_every: int = arg(10, "steps between log lines")
    grad_every: int = arg(50, "steps between looks at the gradient of each term, logged as grad/TERM")
    save_every: int = arg(100, "steps between saved states, for --resume")
    resume: bool = arg(False, "go on from the last saved state")


PRESETS = {"tiny": dict(steps=12, batch_size=4, pairs=32, rehearsal_size=4, proposals=3, save_every=4), "small": {},
           "quick": dict(steps=60, pairs=800, candidates=3, rehearsal_size=16),
           "base": dict(steps=2000, batch_size=32, pairs=40000, lr=1e-4, muon_lr=5e-4)}
GENTLE = dict(sft_weight=0.5, rehearsal_weight=1.0)
PUBLISHED = dict(beta=0.1, text_weight=1.0, text_given_weight=1.0, **GENTLE)
# bidpo's defaults are the flags' own, found on phantoms; the others' are the papers' where they give one
OBJECTIVE_DEFAULTS = {"bidpo": {}, "dpo": PUBLISHED, "mdpo": PUBLISHED | dict(anchor_weight=1.0),
                      "mfpo": PUBLISHED | dict(anchor_weight=1.0, curriculum="easy-first"),
                      "napo": PUBLISHED | dict(text_weight=0.04),
                      "rndpo": dict(beta=5.0, normalise=True, **GENTLE),
                      "sft": dict(sft_weight=1.0, rehearsal_weight=1.0)}


# ---- The lesson: a pair, its contrasts, and objectives as pure functions of them -----------------

@dataclass
class Pair:
    """One genuine study against its distorted twin, and what the SFT model makes of it."""

    index: int                   # the record in the training split
    name: str                    # and its name
    kind: str                    # the distortion
    codes: np.ndarray            # (N,) genuine image
    distorted: np.ndarray        # (N,) distorted image
    chosen: str                  # the genuine report (the chosen image is `codes`)
    twin_text: str = ""          # the twin's own report; where it has none, what the SFT model writes of its image
    question: str = ""           # one that the two answer differently; "" where none is known
    answers: tuple = ("", "")    # the genuine study's answer and the twin's
    reports: dict = field(default_factory=dict)     # writer -> what the SFT model wrote (WRITERS)
    entropy: float | None = None            # semantic entropy of its reports on the genuine image, in nats
    structure: str = ""          # of the proposals; "" where there are none
    proposals: np.ndarray | None = None     # (k, N) masks of the structure that the SFT model drew
    scores: np.ndarray | None = None        # (2, k) their Dice with each other, which ranks them, and with the true mask,
                                            # which shows whoever reads the file how well it does (nan: not known)
    # what one run takes of all this (set_responses)
    wording: int = 0             # which of the three ways to ask
    rejected: str = ""           # y_l: one of reports, by the writer that --rejected names
    masks: tuple = ()            # chosen and rejected codes


# sequence of a pair p: the task, what the model is shown, and the response that is scored given it. X_given, the rejected
# sequence of the contrast of that name: the chosen response X, shown the twin's side
SEQUENCES = {"text_chosen": lambda p: ("report", p.codes, p.chosen),
             "text_rejected": lambda p: ("report", p.codes, p.rejected),
             "text_language": lambda p: ("report", p.codes, p.reports["habit"]),
             "text_vision": lambda p: ("report", p.codes, p.reports["no-question"]),
             "text_given": lambda p: ("report", p.distorted, p.chosen),
             "image_chosen": lambda p: ("generate", p.chosen, p.codes),
             "image_rejected": lambda p: ("generate", p.chosen, p.distorted),
             "image_given": lambda p: ("generate", p.twin_text, p.codes),
             "answer_chosen": lambda p: ("ask", p.codes, p.answers[0]),
             "answer_rejected": lambda p: ("ask", p.codes, p.answers[1]),
             "answer_given": lambda p: ("ask", p.distorted, p.answers[0]),
             "mask_chosen": lambda p: ("segment", p.codes, p.masks[0]),
             "mask_rejected": lambda p: ("segment", p.codes, p.masks[1])}
# contrast: its chosen and its rejected sequence
CONTRASTS = {"text": ("text_chosen", "text_rejected"), "text_given": ("text_chosen", "text_given"),
             "image": ("image_chosen", "image_rejected"), "image_given": ("image_chosen", "image_given"),
             "answer": ("answer_chosen", "answer_rejected"), "answer_given": ("answer_chosen", "answer_given"),
             "language": ("text_chosen", "text_language"), "vision": ("text_chosen", "text_vision"),
             "mask": ("mask_chosen", "mask_rejected")}
# image or mask: the one it is compared with, code by code
COMPARED_WITH = {a: b for name in ("image", "mask") for a, b in (CONTRASTS[name], CONTRASTS[name][::-1])}
BOTH_WAYS = ("text", "text_given", "image", "image_given", "answer", "answer_given")
CHOSEN = ("text_chosen", "image_chosen")      # what the NLL is taken of, for every objective and the control; see chosen_of


class Sums(NamedTuple):
    """Sums over one kind of sequence, of a batch (B,) or of all pairs (n,): of log π in nats, or of log π_θ − log π_ref.

    Ω: the codes in which an image or mask differs from the one it is COMPARED_WITH; all response tokens where that one is not
    scored."""

    whole: torch.Tensor          # over the tokens of the response
    tokens: torch.Tensor         # how many these are
    omega: torch.Tensor          # over Ω alone
    omega_tokens: torch.Tensor   # |Ω|


class Contrast(NamedTuple):
    """How much a batch of pairs prefers the chosen to the rejected sequence, (B,) each."""

    margin: torch.Tensor         # r(chosen) − r(rejected), r = β·(log π_θ − log π_ref); with --normalise see make_contrast
    mean_log_ratio: torch.Tensor # log-ratio per token, chosen less rejected, for noise_q
    keep: torch.Tensor           # 1 where the two differ, so that the pair counts, else 0


def make_contrast(name, ratios, keep, cfg):
    """A Contrast from the log-ratios of its two sequences, {sequence: Sums}; keep −1 (--flip-pairs) swaps them.

    With cfg.normalise image and mask margins are sums over Ω alone, divided by |Ω|: codes outside Ω differ in
    probability too, through their prefix, and are left out (our reading of arXiv:2601.23222)."""
    chosen, rejected = (ratios[sequence] for sequence in CONTRASTS[name])
    margin = cfg.beta * (chosen.whole - rejected.whole)
    if cfg.normalise and name in ("image", "mask"):
        margin = cfg.beta * (chosen.omega - rejected.omega) / chosen.omega_tokens.clamp(min=1)
    mean_log_ratio = chosen.whole / chosen.tokens - rejected.whole / rejected.tokens
    return Contrast(keep * margin, keep * mean_log_ratio, keep.abs())


def preference_loss(contrast, smoothing=0.0):
    """−log σ(margin) (Eq. 7, arXiv:2305.18290), computed as softplus(−margin); log 2 at margin 0.

    smoothing: the share of pairs taken to be the wrong way round (conservative DPO, Eq. 3 of ericmitchell.ai/cdpo.pdf)."""
    return (1 - smoothing) * F.softplus(-contrast.margin) + smoothing * F.softplus(contrast.margin)


def anchor_loss(reward, delta):
    """−log σ(r(chosen) − δ) (arXiv:2406.11839): keeps what is chosen from becoming less likely."""
    return F.softplus(delta - reward)


def box_cox_loss(contrast, q):
    """(1 − σ(margin)^q)/q (arXiv:2503.17928): q → 0 gives −log σ(margin), q = 1 the bounded 1 − σ(margin)."""
    return -torch.expm1(q * F.logsigmoid(contrast.margin)) / q


def masked_mean(values, keep):
    """Mean over the pairs that count; 0 where none does."""
    return (values * keep).sum() / keep.sum().clamp(min=1)


def noise_q(log_ratios, keep, alpha, cfg):
    """NaPO's q, from log-ratios (B,) of chosen less rejected: near 0 or below they suggest noise, so q nears 1, a bounded
    loss. No gradient passes."""
    return (2 * (1 - torch.sigmoid(alpha * masked_mean(log_ratios, keep).detach()))).clamp(cfg.q_min, cfg.q_max)


# An objective maps contrasts {contrast: Contrast} and rewards {sequence: r, (B,)} to losses {term: (B,)}; a term has the
# name of its contrast, or is the anchor. objective_loss weighs and sums them.


def dpo_loss(contrasts, rewards, cfg):
    """Image to text alone (arXiv:2305.18290)."""
    return {"text": preference_loss(contrasts["text"], cfg.label_smoothing)}


def bidpo_loss(contrasts, rewards, cfg):
    """Both directions and answers: text and image of doi 10.1109/JBHI.2026.3707092, the other terms of our own choice."""
    return {name: preference_loss(contrasts[name]) for name in BOTH_WAYS} | {
        "anchor": sum(anchor_loss(rewards[sequence], cfg.anchor_delta) for sequence in CHOSEN)}


def mdpo_loss(contrasts, rewards, cfg):
    """DPO + CoPO + AncPO (arXiv:2406.11839). MFPO (arXiv:2410.15334) has the same sum, on other data in another order."""
    return {"text": preference_loss(contrasts["text"]), "text_given": preference_loss(contrasts["text_given"]),
            "anchor": anchor_loss(rewards["text_chosen"], cfg.anchor_delta)}


def napo_loss(contrasts, rewards, cfg):
    """DPO, and noise-robust terms for rejected reports made under language and vision bias (arXiv:2503.17928).

    q of language looks at log-ratios per token, q of vision at those of whole reports, as the paper's code does."""
    language, vision = contrasts["language"], contrasts["vision"]
    q_language = noise_q(language.mean_log_ratio, language.keep, cfg.language_alpha, cfg)
    q_vision = noise_q(vision.margin / cfg.beta, vision.keep, cfg.vision_alpha, cfg)
    return {"text": preference_loss(contrasts["text"]), "language": box_cox_loss(language, q_language),
            "vision": box_cox_loss(vision, q_vision)}


def rndpo_loss(contrasts, rewards, cfg):
    """DPO between masks, and between images, with margins over Ω, per code (our reading of arXiv:2601.23222)."""
    return {"mask": preference_loss(contrasts["mask"]), "image": preference_loss(contrasts["image"])}


# objective: its function and the contrasts it needs
OBJECTIVES = {"dpo": (dpo_loss, ("text",)), "bidpo": (bidpo_loss, BOTH_WAYS),
              "mdpo": (mdpo_loss, ("text", "text_given")), "mfpo": (mdpo_loss, ("text", "text_given")),
              "napo": (napo_loss, ("text", "language", "vision")), "rndpo": (rndpo_loss, ("mask", "image")),
              "sft": (lambda contrasts, rewards, cfg: {}, ())}            # the control: no preference


def contrasts_of(cfg):
    """The names of the contrasts that the objective needs."""
    return OBJECTIVES[cfg.objective][1]


def chosen_of(cfg):
    """The names of the chosen sequences that the NLL is taken of."""
    return CHOSEN + (("answer_chosen",) if cfg.objective in ("bidpo", "sft") else ())


def sequences_of(cfg):
    """The names of the sequences that the objective scores, the chosen ones first."""
    return tuple(dict.fromkeys(chosen_of(cfg) + sum((CONTRASTS[name] for name in contrasts_of(cfg)), ())))


def objective_loss(ratios, keep, cfg):
    """The objective's weighted sum, its {term: loss} and {contrast: Contrast}, from log-ratios {sequence: Sums}.

    A term is the mean over the pairs that count, keep {contrast: (B,) of pairs_that_count}; the anchor's over those with a
    report."""
    contrasts = {name: make_contrast(name, ratios, keep[name], cfg) for name in contrasts_of(cfg)}
    losses = OBJECTIVES[cfg.objective][0](contrasts, {k: cfg.beta * v.whole for k, v in ratios.items()}, cfg)
    terms = {k: masked_mean(loss, contrasts[k].keep if k in contrasts else keep["text_chosen"]) for k, loss in losses.items()}
    return sum(getattr(cfg, f"{name}_weight") * term for name, term in terms.items()), terms, contrasts


# ---- The lesson: pairs, built once, in out/pairs, for every objective ----------------------------

# load_or_build_pairs* calls build_pairs, least_noticed, add_questions*, add_missing* (reports, masks); then train calls
# set_responses, pairs_that_count. *: below, for consultation


def scrambled(pair):
    """The genuine image's codes in random order: its gray values and nothing of its findings."""
    return np.random.default_rng(pair.index).permutation(pair.codes)


def beginning(report):
    """A report's first two sentences: of a phantom's the opening and the first finding."""
    sentences = report.split(". ")
    return ". ".join(sentences[:2]) + "." * (len(sentences) > 2)


# What the SFT model is shown when it writes a rejected report, what it is asked, and how the report already begins. Without
# the image it can only follow the habits of language, without the question only what it likes to say of images (NaPO's two
# biases). "Without the image": the image scrambled (given none at all, which it has never met, the model writes gibberish),
# and the report forced past its first finding, as the request alone suggests none.
REQUEST = INSTRUCTIONS["report"][0]
WRITERS = {"distorted": lambda p: (p.distorted, REQUEST, ""),
           "own": lambda p: (p.codes, REQUEST, ""),
           "habit": lambda p: (scrambled(p), REQUEST, beginning(p.chosen)),
           "no-question": lambda p: (p.codes, "", "")}


def twins_of(record, index, records, cfg, region):
    """The different ones among cfg.candidates twins of record `index`, of one kind, drawn from (seed, index): a list of Twin."""
    rng, twins = np.random.default_rng([cfg.seed, 5, index]), {}        # 5: apart from the other draws
    kind = cfg.distort[rng.integers(len(cfg.distort))]      # one a record, else least_noticed would favour one
    once = region and cache(lambda: region(record))         # it takes some twenty passes of the model
    for _ in range(cfg.candidates):
        twin = distort(record, records, kind, cfg.strength, rng, once)
        if twin.image is not None:
            twins.setdefault(twin.image.tobytes(), twin)
    return list(twins.values())


def build_pairs(records, studies, cfg, vqgan, region, autocast):
    """Pairs from cfg.pairs records; no reports yet. studies: the records' Studies; region(record): the mask that `distort`
    asks for.

    A record makes as many as it has different distorted images. A pair whose two images have the same codes is
    dropped. Raises UserError if none is left."""
    def draft(batch):                            # of some records: their pairs, and why others make none
        drafts, dropped = [], Counter()          # (index, record, twin)
        for index in map(int, batch):
            record = records[index]
            twins = twins_of(record, index, records, cfg, region)
            drafts += [(index, record, twin) for twin in twins]
            if not twins:
                dropped["which no distortion fits"] += 1
        distorted = encode_images([twin.image for _, _, twin in drafts], vqgan, autocast) if drafts else ()
        pairs = [Pair(index, record.name, twin.kind, studies[index].codes, codes, record.text, twin.text, twin.question,
                      twin.answers) for (index, record, twin), codes in zip(drafts, distorted)]
        differing = [p for p in pairs if (p.codes != p.distorted).any()]
        dropped["whose codes the distortion left as they were"] = len(pairs) - len(differing)
        return differing, dropped

    order = np.random.default_rng([cfg.seed, 4]).permutation(len(records))[:cfg.pairs]
    batches = [order[i:i + 256] for i in range(0, len(order), 256)]
    parts, causes = zip(*share_out(draft, batches, "building pairs"))
    pairs, dropped = sum(parts, []), sum(causes, Counter())            # adding Counters drops causes of count 0
    counts = ", ".join(f"{c} {why}" for why, c in dropped.items())
    if not pairs:
        raise UserError(f"no usable preference pair: dropped {counts}; try another --distort")
    tqdm.write(count_kinds(pairs) + (f"; dropped {counts}" if counts else ""))
    return pairs


def count_kinds(pairs):
    """"12 pairs (9 remove, 3 add)": what there is, for the screen."""
    used = ", ".join(f"{c} {k}" for k, c in Counter(p.kind for p in pairs).most_common())
    return f"{len(pairs)} pairs ({used})"


def least_noticed(pairs, logps):
    """Of each record's pairs the one with the greatest log π(y|m'): a hard negative (our choice, after arXiv:2010.04592).

    There the SFT model still finds y likely of m', from habit or because the change is hard to see. logps: (n,)."""
    best = {}
    for pair, logp in zip(pairs, logps.tolist()):
        if pair.index not in best or logp > best[pair.index][0]:
            best[pair.index] = logp, pair
    return [pair for _, pair in best.values()]


def sample_reports(pairs, writer, model, vocab, cfg, seed):
    """What the SFT model writes, sampled, when it is shown what WRITERS says of each pair: a list of strings."""
    def sample(start):
        shown = [WRITERS[writer](p) for p in pairs[start:start + 256]]
        prompts = [vocab.ask_prompt(codes, question) + vocab.encode_text(begun) for codes, question, begun in shown]
        said = sample_words(model, vocab, prompts, cfg.pair_temperature, seed + start)
        return [f"{begun} {text}".strip() for (_, _, begun), text in zip(shown, said)]
    return sum(share_out(sample, range(0, len(pairs), 256), f"reports, {writer}"), [])


def set_responses(pairs, cfg):
    """Set what this run takes of each pair: its wording, its rejected report and, for rndpo, two masks."""
    for i, pair in enumerate(pairs):
        pair.wording = int(np.random.default_rng([cfg.seed, 6, i]).integers(3))
        pair.twin_text = pair.twin_text or pair.reports["distorted"]
        pair.rejected = {**pair.reports, "twin": pair.twin_text}[cfg.rejected[i % len(cfg.rejected)]]
        pair.masks = (pair.codes, pair.codes)       # placeholder without masks: equal, so pairs_that_count drops it
        if pair.structure:
            rng = np.random.default_rng([cfg.seed, 11, i])
            pair.masks = tuple(pair.proposals[k] for k in rank_proposals(pair.scores[0], cfg.mining, cfg.judge_noise, rng))


def pairs_that_count(pairs, cfg, phrases):
    """Which pairs count, {contrast: (n,)}: 1 where two reports state different findings (--keep-agreeing: differ in a word), two
    masks differ in a code, there is a report (image, text_given) or a question (answers), else 0; −1 where --flip-pairs
    compares its two reports or masks the wrong way round. And which have the chosen sequences, {sequence: (n,)}.

    Raises UserError for a contrast without any such pair: of answers where no pair has a report, of all else where one has."""
    differs = lambda p, text: bool(p.chosen) and (text != p.chosen if cfg.keep_agreeing else
                                                  statement_of(text, phrases) != statement_of(p.chosen, phrases))
    has_report, has_question = (lambda p: bool(p.chosen)), (lambda p: bool(p.question))
    counts = {"text_chosen": has_report, "image_chosen": has_report, "answer_chosen": has_question,
              "mask_chosen": lambda p: bool(p.structure),                      # asked for by tests/masks.py alone
              "image": has_report, "text_given": has_report,                   # build_pairs has seen to the codes
              "mask": lambda p: (p.masks[0] != p.masks[1]).any(),              # |Ω| = 0 carries no signal
              "text": lambda p: differs(p, p.rejected), "image_given": lambda p: differs(p, p.twin_text),
              "answer": has_question, "answer_given": has_question,
              "language": lambda p: differs(p, p.reports["habit"]), "vision": lambda p: differs(p, p.reports["no-question"])}
    count = lambda names: {name: np.array([counts[name](p) for p in pairs], int) for name in names}
    keep = count(contrasts_of(cfg))
    flipped = np.random.default_rng([cfg.seed, 12]).random(len(pairs)) < cfg.flip_pairs
    shown = ", ".join(f"{name} {int(v.sum())}" for name, v in keep.items())
    any_report = any(map(has_report, pairs))
    needed = [v.any() for name, v in keep.items() if name.startswith("answer") != any_report]
    if keep and not (needed and all(needed)):
        if any_report:
            way_out = ("try another --rejected or --distort, a --pair-temperature above 0, or --keep-agreeing"
                       + ", or name `findings` in the metadata" * (not phrases))
        else:
            way_out = "none has a report: take --objective bidpo or sft"
        raise UserError(f"--objective {cfg.objective} finds no usable preference pair: of {len(pairs)}, chosen and rejected "
                        f"differ in: {shown}; {way_out}")
    if keep:
        tqdm.write(f"of {len(pairs)} pairs chosen and rejected differ in: {shown}")
    return count(chosen_of(cfg)) | {name: np.where(flipped & (name in ("text", "language", "vision", "mask")), -v, v)
                                    for name, v in keep.items()}


# ---- The lesson: pairs as sequences, and their log-probabilities ---------------------------------

def pair_example(pair, sequence, vocab):
    """(prompt ids, response ids) of one of the SEQUENCES of a pair."""
    task, shown, response = SEQUENCES[sequence](pair)
    if task == "report":
        return vocab.report_prompt(shown, pair.wording), vocab.text_response(response)
    if task == "generate":
        return vocab.generate_prompt(shown, pair.wording), vocab.image_response(response)
    if task == "ask":
        return vocab.ask_prompt(shown, pair.question), vocab.text_response(response)
    return vocab.segment_prompt(shown, pair.structure, pair.wording), vocab.image_response(response)


def families_of(pairs, indices, sequences):
    """Which of the S·B rows of a batch, numbered sequence by sequence, show the same image or report: lists of their numbers."""
    families = {}
    for row, (sequence, i) in enumerate(product(sequences, indices)):
        shown = SEQUENCES[sequence](pairs[i])[1]
        families.setdefault((i, id(shown)), []).append(row)                     # id: one object, as arrays have no hash
    return list(families.values())


def pair_batch(pairs, indices, sequences, vocab, device):
    """ids and labels (S, B, T) of S kinds of sequences of B pairs, all of them, whether a contrast counts them or not; and
    the MicroBatches of these S·B rows for a model on this device."""
    examples = [pair_example(pairs[i], sequence, vocab) for sequence, i in product(sequences, indices)]
    ids, labels = collate(examples, vocab.pad)
    micro_batches = split_batch(ids, labels, device, families_of(pairs, indices, sequences))
    return *(x.unflatten(0, (len(sequences), -1)) for x in (ids, labels)), micro_batches


def sum_logps(model, ids, labels, micro_batches, sequences):
    """log π of a batch that pair_batch made: {sequence: Sums}."""
    logps = per_token_logps(model, ids.flatten(0, 1), labels.flatten(0, 1), micro_batches)
    logps = logps.unflatten(0, ids.shape[:2])                                                         # (S, B, T-1)
    ids, counted = ids[..., 1:], labels[..., 1:] != -100
    omega = counted.clone()
    for i, sequence in enumerate(sequences):
        if (other := COMPARED_WITH.get(sequence)) in sequences:
            omega[i] &= ids[i] != ids[sequences.index(other)]                 # their prompts are equal: codes align
    counted, omega = (to_device(x, model.device) for x in (counted, omega))
    sums = logps.sum(-1), counted.sum(-1), (logps * omega).sum(-1), omega.sum(-1)                     # each (S, B)
    return {sequence: Sums(*rows) for sequence, *rows in zip(sequences, *sums)}


@torch.no_grad()
def sum_reference_logps(model, pairs, sequences, vocab, cfg, autocast):
    """log π_ref of every pair, {sequence: Sums of (n,)}; once, before the loop."""
    def score(start):
        indices = range(start, min(start + cfg.batch_size, len(pairs)))
        with autocast():
            sums = sum_logps(model, *pair_batch(pairs, indices, sequences, vocab, model.device), sequences)
        return torch.stack([torch.stack(sums[s]) for s in sequences]).cpu()                           # (S, 4, B)
    table = torch.cat(share_out(score, range(0, len(pairs), cfg.batch_size), "reference"), dim=-1).to(model.device)   # (S, 4, n)
    return {s: Sums(*rows) for s, rows in zip(sequences, table)}


def log_ratios(policy_sums, reference_sums, indices):
    """log π_θ − log π_ref of a batch, {sequence: Sums}: the policy's Sums are of the batch, the reference's of all pairs."""
    return {name: sums._replace(whole=sums.whole - reference_sums[name].whole[indices],
                                omega=sums.omega - reference_sums[name].omega[indices])
            for name, sums in policy_sums.items()}


# ---- The lesson: training ------------------------------------------------------------------------

REHEARSAL = {"report": 0.0, "generate": 0.25, "ask": 0.45, "segment": 0.30}     # shares; generate from an emptied prompt


def rehearsal_batch(studies, cfg, vocab, step):
    """ids and labels of questions, masks and emptied prompts from the training studies."""
    rng = np.random.default_rng([cfg.seed, 7, step])
    studies = [studies[i] for i in batch_indices(len(studies), cfg.rehearsal_size, step, cfg.seed)]
    examples = [make_example(s, pick_task(s, REHEARSAL, rng), vocab, rng, empty_share=1.0) for s in studies]
    return collate(own(examples), vocab.pad)


def pick_pairs(pairs, cfg, step):
    """Indices of a step's pairs; with --curriculum from the third of the pairs whose turn it is."""
    pool = np.arange(len(pairs))
    if cfg.curriculum != "none":
        order = np.random.default_rng([cfg.seed, 13]).permutation(len(pairs))
        if cfg.curriculum != "shuffled":
            order = np.argsort([p.entropy for p in pairs], kind="stable")[::-1 if cfg.curriculum == "hard-first" else 1]
        thirds = np.array_split(np.resize(order, max(3, len(order))), 3)       # one or two pairs are repeated
        pool = thirds[3 * step // cfg.steps]
    return pool[batch_indices(len(pool), cfg.batch_size, step, cfg.seed)]


def step_batches(pairs, studies, sequences, cfg, vocab, step, device):
    """What a step reads: the indices of its pairs, and of this process's slice their pair_batch and its rehearsal_batch."""
    indices = pick_pairs(pairs, cfg, step)
    batch = pair_batch(pairs, own(indices), sequences, vocab, device)
    return torch.from_numpy(indices), batch, rehearsal_batch(studies, cfg, vocab, step)


def schedule(cfg, step):
    """(step, steps) of the learning rate's schedule: those of the run; with --curriculum those of the third."""
    if cfg.curriculum == "none":
        return step, cfg.steps
    third = 3 * step // cfg.steps
    start, end = ((cfg.steps * t + 2) // 3 for t in (third, third + 1))      # rounded up
    return step - start, end - start


def chosen_nll(policy_sums, keep, cfg):
    """Mean negative log-probability of the chosen sequences' tokens, in nats; keep {sequence: (B,)}: 1 where a pair has it."""
    chosen = [(policy_sums[name], keep[name]) for name in chosen_of(cfg)]
    nats, tokens = (sum((getattr(sums, what) * w).sum() for sums, w in chosen) for what in ("whole", "tokens"))
    return -nats / tokens.clamp(min=1)


def gradient_norms(losses, parameters, cfg):
    """Norm of the gradient of each loss times its weight, {"grad/NAME": norm}: who pulls how hard."""
    norms = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, materialize_grads=True)
        sum_over_processes(grads)
        norms[f"grad/{name}"] = getattr(cfg, f"{name}_weight") * torch.nn.utils.get_total_norm(grads)
    return norms


def contrast_metrics(ratios, policy_sums, contrasts, cfg):
    """TRL's log names for each contrast: rewards_text/margins, logps_image/chosen, …

    Rewards are those of whole sequences, also where a margin is one a code of Ω (cfg.normalise)."""
    result = {}
    for name, contrast in contrasts.items():
        chosen, rejected = CONTRASTS[name]
        values = {f"rewards_{name}/chosen": cfg.beta * ratios[chosen].whole,
                  f"rewards_{name}/rejected": cfg.beta * ratios[rejected].whole,
                  f"rewards_{name}/margins": contrast.margin, f"rewards_{name}/accuracies": (contrast.margin > 0).float(),
                  f"logps_{name}/chosen": policy_sums[chosen].whole, f"logps_{name}/rejected": policy_sums[rejected].whole}
        result |= {k: masked_mean(v, contrast.keep) for k, v in values.items()}
    return result


def train(cfg):
    """Optimise the SFT model on preference pairs (or on their chosen sequences) and write out/NAME."""
    name = check_flags(cfg)
    device, autocast = init_run(cfg)
    check_resume(cfg, name)                                  # fail before the slow part, not at begin_stage
    model, vocab, vqgan = load_sft(cfg, device)
    data = open_data(cfg)
    warn_of_other_data(cfg, data["train"])
    origin = {"SFT model": weights_hash(model), "--data or data.py": fingerprint(data["train"])}
    check_resume(cfg, name, origin)
    phrases, sequences = lexicon(data["train"]), sequences_of(cfg)
    studies = open_studies(cfg, data["train"], vqgan, autocast)
    pairs = load_or_build_pairs(cfg, data["train"], studies, phrases, vqgan, model, vocab, autocast)
    set_responses(pairs, cfg)
    keep = {k: torch.tensor(v, device=device).float() for k, v in pairs_that_count(pairs, cfg, phrases).items()}
    studies = studies.serving([task for task, share in REHEARSAL.items() if share > 0])
    # all that is needed of the reference, so no second model: from here on this one is the policy
    reference_sums = sum_reference_logps(model, pairs, sequences, vocab, cfg, autocast)
    torch.manual_seed(cfg.seed)                              # whatever has been trained before in this process
    adapter = add_lora(model, cfg, Path(cfg.out) / "sft") if cfg.lora_rank else None
    train_mode(model, cfg)
    trained = trained_parameters(model)
    optimizers = make_optimizers(model, cfg.lr, cfg.muon_lr, 0.0, autocast)
    folder, progress = begin_stage(cfg, name, [trained], optimizers)
    start = progress.get("step", 0)
    log = Log(f"{folder}.jsonl", name, cfg.steps, start)
    build = lambda step: step_batches(pairs, studies, sequences, cfg, vocab, step, device)
    for step, (indices, batch, rehearsed) in built_ahead(build, start, cfg.steps):
        set_lr(optimizers, get_lr(*schedule(cfg, step), warmup=20))
        torch.manual_seed(cfg.seed + step)                   # LoRA's dropout: a resumed run draws alike
        indices = to_device(indices, device)
        with autocast():
            policy_sums = sum_logps(model, *batch, sequences)
            rehearsal = response_loss(model, *rehearsed)
        policy_sums = {k: Sums(*gather(torch.stack(sums, dim=1)).unbind(1)) for k, sums in policy_sums.items()}
        ratios = log_ratios(policy_sums, reference_sums, indices)
        counted = {k: v[indices] for k, v in keep.items()}
        preference, terms, contrasts = objective_loss(ratios, counted, cfg)
        nll = chosen_nll(policy_sums, counted, cfg)
        loss = preference + cfg.sft_weight * nll + cfg.rehearsal_weight * rehearsal
        norms = gradient_norms({**terms, "sft": nll, "rehearsal": rehearsal}, trained, cfg) if step % cfg.grad_every == 0 else {}
        grad_norm = take_step(loss, trained, optimizers, clip=1.0)
        log.count(step, grad_norm)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps or norms:
            log(step, ("loss", *(f"rewards_{k}/margins" for k in contrasts)), loss=loss, grad_norm=grad_norm,
                lr=optimizers[-1].param_groups[0]["lr"], nll_loss=nll, rehearsal_loss=rehearsal,
                **{f"loss_{k}": v for k, v in terms.items()}, **norms, **contrast_metrics(ratios, policy_sums, contrasts, cfg),
                **{f"drift/{k}": masked_mean(ratios[k].whole, counted[k]) for k in CHOSEN})
            log.warn(any(masked_mean(c.margin.abs(), c.keep) > 30 for c in contrasts.values()),
                     "margins are over 30: the model is far from its reference; lower --beta or the learning rates")
        if log.is_due(step, cfg.save_every):
            save_state(folder, step + 1, [trained], optimizers, flags=run_flags(cfg), origin=origin)
        if log.stopping:
            log.close()                                      # raises Stopped
    log.close()
    save_tuned(folder, model, cfg, adapter)
    vocab.save(folder)
    finish_stage(cfg, name)
    tqdm.write(f"wrote {cfg.out}/{name}")


# ---- For consultation: what some objectives and distortions ask of the SFT model -----------------

@torch.no_grad()
def key_region(record, model, vocab, vqgan, autocast):
    """Where the report comes from: a mask (H, W), for records whose findings have none. Our choice:

    the image is cut into 16 blocks, the codes of one after the other replaced by those of noise; the
    region is the blocks that cost log π(report) at least half of what the costliest does. None if none costs."""
    drowned = add_noise(record.image, np.random.default_rng(0), 1000)
    codes, noise = encode_images([record.image, drowned], vqgan, autocast)
    side, (h, w) = int(len(codes) ** 0.5), record.image.shape[:2]
    blocks = lambda h, w: (np.arange(h)[:, None] * 4 // h) * 4 + np.arange(w) * 4 // w        # (h, w) of 0..15
    hidden = [np.where(blocks(side, side).ravel() == b, noise, codes) for b in range(16)]
    response = vocab.text_response(record.text)
    examples = [(vocab.report_prompt(c), response) for c in (codes, *hidden)]
    with autocast():
        logps = sequence_logps(model, *collate(examples, vocab.pad))
    cost = (logps[0] - logps[1:]).cpu().numpy()
    return np.isin(blocks(h, w), np.flatnonzero(cost >= cost.max() / 2)) if cost.max() > 0 else None


def add_questions(pairs, studies, model, vocab, autocast):
    """For pairs without one, a question of the record's own to which the SFT model answers otherwise when shown the twin."""
    asked = [(pair, *questions[pair.index % len(questions)]) for pair in pairs           # (pair, question, true answer)
             if not pair.question and (questions := studies[pair.index].questions)]
    with autocast():
        genuine = sample_words(model, vocab, [vocab.ask_prompt(pair.codes, question) for pair, question, _ in asked])
        twin = sample_words(model, vocab, [vocab.ask_prompt(pair.distorted, question) for pair, question, _ in asked])
    for (pair, question, answer), said, said_of_twin in zip(asked, genuine, twin):
        if said_of_twin not in (said, answer):
            pair.question, pair.answers = question, (answer, said_of_twin)


def add_entropy(pairs, model, vocab, cfg, phrases):
    """Semantic entropy −Σ p log p over distinct statements among m sampled reports (arXiv:2410.15334)."""
    m = cfg.entropy_samples
    samples = [sample_reports(pairs, "own", model, vocab, cfg, cfg.seed + 1_000_003 * (j + 1)) for j in range(m)]
    for pair, texts in zip(pairs, zip(*samples)):
        p = np.array(list(Counter(statement_of(t, phrases) for t in texts).values())) / m
        pair.entropy = float((p * np.log(1 / p)).sum())


def common_structures(records):
    """{modality: structures that all its records with masks have}: what may be asked of an image without any."""
    common = {}
    for r in () if isinstance(records, Phantoms) else getattr(records, "rows", records):           # all phantoms have masks
        if r.masks:
            common[r.modality] = common.get(r.modality, r.masks.keys()) & r.masks.keys()
    return common


def add_proposals(pairs, records, model, vocab, vqgan, cfg, autocast):
    """For each pair: k masks of one structure that the SFT model draws, and their scores.

    The structure is one of the record's masks; if it has none, one that all of its modality with masks have. The codes
    are those of the masks themselves, as two of the codes drawn may look the same."""
    k, common = cfg.proposals, common_structures(records)
    for start in tqdm(range(0, len(pairs), 64), desc="mask proposals", unit="batch", leave=False):
        batch = []                                            # (pair, true mask or None)
        for pair in pairs[start:start + 64]:
            record = records[pair.index]
            if names := sorted(record.masks or common.get(record.modality, ())):
                pair.structure = str(np.random.default_rng([cfg.seed, 10, pair.index]).choice(names))
                batch.append((pair, record.masks.get(pair.structure)))
        if not batch:
            continue
        drawn = draw_masks(model, vocab, vqgan, [p.codes for p, _ in batch for _ in range(k)],
                           [p.structure for p, _ in batch for _ in range(k)], temperature=cfg.pair_temperature,
                           seed=cfg.seed + start)
        codes = encode_images(list(drawn * np.uint8(255)), vqgan, autocast)
        for (pair, true), proposed, pair.proposals in zip(batch, np.split(drawn, len(batch)), np.split(codes, len(batch))):
            agreement = [np.mean([dice(proposed[a], proposed[b]) for b in range(k) if b != a]) for a in range(k)]
            truth = [np.nan if true is None else dice(mask, true) for mask in proposed]
            pair.scores = np.array([agreement, truth], np.float32)


def rank_proposals(scores, mining, noise, rng):
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


# ---- For consultation: pairs and models on disk, flags -------------------------------------------

def read_pairs(folder, codebook_size):
    """The Pairs of out/pairs; None if they are damaged."""
    try:
        codes = {k: v.numpy() for k, v in read_tensors(folder / "codes.safetensors").items()}
        with open(folder / "pairs.jsonl", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]           # not splitlines(), which cuts at U+2028 and its like too
        if any(k != "scores" and not ((v >= 0) & (v < codebook_size)).all() for k, v in codes.items()):
            raise ValueError("codes that the image tokenizer has not")
        if not all("question" in row and len(row["answers"]) == 2 for row in rows):
            raise ValueError("no questions")
        pairs = [Pair(codes=c, distorted=d, **row) for c, d, row in zip(codes["genuine"], codes["distorted"], rows, strict=True)]
        if not all(isinstance(text, str) for p in pairs
                   for text in (p.chosen, p.structure, p.twin_text, p.question, *p.answers, *p.reports.values())):
            raise ValueError("reports that are no text")
        with_masks = [p for p in pairs if p.structure]
        for pair, proposals, scores in zip(with_masks, codes.get("proposals", ()), codes.get("scores", ()), strict=True):
            pair.proposals, pair.scores = proposals, scores
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        tqdm.write(f"{folder} is damaged ({str(error)[:120]}); `python dpo.py` builds it anew")
        return None
    return pairs


def write_pairs(cfg, pairs, recipe):
    """out/pairs: config.json, codes.safetensors, and pairs.jsonl for people to read."""
    if process() > 0:
        return finish_stage(cfg, "pairs")
    new = Path(cfg.out) / "pairs.partial"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    tensors = {"genuine": [p.codes for p in pairs], "distorted": [p.distorted for p in pairs]}
    if with_masks := [p for p in pairs if p.structure]:
        tensors |= {"proposals": [p.proposals for p in with_masks], "scores": [p.scores for p in with_masks]}
    write_tensors(new / "codes.safetensors", {k: torch.tensor(np.stack(v)) for k, v in tensors.items()}, {})
    with open(new / "pairs.jsonl", "w", encoding="utf-8") as f:
        for p in pairs:
            row = {k: getattr(p, k) for k in ("index", "name", "kind", "structure", "entropy", "chosen", "twin_text", "question",
                                              "answers", "reports")}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    (new / "config.json").write_text(json.dumps(recipe, indent=2) + "\n")
    finish_stage(cfg, "pairs")


def add_missing(pairs, cfg, records, phrases, model, vocab, vqgan, autocast):
    """Add to pairs what the objective needs and they lack: reports, entropy, masks; whether anything was added.

    Raises UserError where masks are needed and no record has any."""
    writers = {*cfg.rejected, "distorted", *(("habit", "no-question") if cfg.objective == "napo" else ())}
    for writer in sorted(missing := writers - {"twin"} - pairs[0].reports.keys()):
        for pair, text in zip(pairs, sample_reports(pairs, writer, model, vocab, cfg, cfg.seed)):
            pair.reports[writer] = text
    if needs_entropy := cfg.curriculum in ("easy-first", "hard-first") and pairs[0].entropy is None:
        add_entropy(pairs, model, vocab, cfg, phrases)
    if needs_masks := "mask" in contrasts_of(cfg) and not any(p.structure for p in pairs):
        add_proposals(pairs, records, model, vocab, vqgan, cfg, autocast)
        if not any(p.structure for p in pairs):
            raise UserError(f"--objective {cfg.objective} compares masks, and no training record has any: add "
                            "`masks` to the metadata, or take another objective")
    return bool(missing) or needs_entropy or needs_masks


def load_or_build_pairs(cfg, records, studies, phrases, vqgan, model, vocab, autocast):
    """The pairs of this recipe, from out/pairs if it was made by the same one; what is missing there is added."""
    folder = Path(cfg.out) / "pairs"
    flags = ("seed", "records", "pairs", "distort", "candidates", "strength", "pair_temperature", "entropy_samples", "proposals")
    recipe = {k: run_flags(cfg)[k] for k in flags} | {"data": fingerprint(records), "sft": weights_hash(model)}
    check_own(cfg.out, "pairs")
    made = read_json(folder / "config.json") == recipe
    if found := made and read_pairs(folder, vqgan.config.codebook_size):
        pairs = found
        tqdm.write(f"{count_kinds(pairs)} from {folder}")
    else:
        if folder.exists() and not made:
            tqdm.write(f"{folder} was made with other flags, other data or another SFT model: building it anew; what was trained on the "
                       "old pairs stays as it is")
        pairs = build_pairs(records, studies, cfg, vqgan, lambda r: key_region(r, model, vocab, vqgan, autocast), autocast)
        if cfg.candidates > 1:                              # all in wording 0, until set_responses draws it
            logps = sum_reference_logps(model, pairs, ("text_given",), vocab, cfg, autocast)["text_given"]
            pairs = least_noticed(pairs, logps.whole)
            tqdm.write(f"of these kept, the least noticed of each record: {count_kinds(pairs)}")
        add_questions(pairs, studies, model, vocab, autocast)
        if lacking := sum(not (p.chosen or p.question) for p in pairs):
            pairs = [p for p in pairs if p.chosen or p.question]
            tqdm.write(f"{lacking} pairs dropped: no report, and no question that the SFT model answers otherwise of the twin")
        if not pairs:
            raise UserError("no usable preference pair: none has a report or a question that tells it from its twin; try another --distort")
    with autocast():
        added = add_missing(pairs, cfg, records, phrases, model, vocab, vqgan, autocast)
    if added or not found:
        write_pairs(cfg, pairs, recipe)
    return pairs


def load_sft(cfg, device):
    """The SFT model, its vocabulary and the image tokenizer of cfg.out, trained first if missing."""
    folder, vqgan_folder = Path(cfg.out) / "sft", Path(cfg.out) / "vqgan"
    if folder.exists() and not vqgan_folder.exists():
        raise UserError(f"{folder} is there, the image tokenizer it was trained with, {vqgan_folder}, is not: bring it "
                        "back, or remove both to train them again")
    if not folder.exists():
        tqdm.write(f"{folder} is missing: instruction tuning first")
        sft_stage.train(config_for(sft_stage.SFTConfig, cfg, **sft_stage.PRESETS[cfg.preset], resume=cfg.resume,
                                   recompute=cfg.recompute, compile=cfg.compile))
    vqgan = load_vqgan(cfg, device)
    model, vocab = load_gpt(folder, vqgan, device)
    check_data(model.config.data, cfg, folder)
    return model, vocab, vqgan


def check_flags(cfg):
    """The name of the folder to write; raises UserError for flags that do not go together."""
    name = cfg.name or ("control" if cfg.objective == "sft" else cfg.objective)
    if cfg.q_min > cfg.q_max:
        raise UserError(f"--q-min {cfg.q_min} is more than --q-max {cfg.q_max}: name them in this order")
    if name == "control" and cfg.objective != "sft":
        raise UserError("--name control is what others are compared with: it goes with --objective sft; name another")
    taken = name in ("vqgan", "sft", "studies", "pairs", "reader", "eval")
    if taken or name.startswith(".") or Path(name).name != name or Path(name).suffix:
        raise UserError(f"--name {name} is taken by another stage or is no plain name; name another")
    return name


def main(argv=None):
    """Command line."""
    train(cli(DPOConfig, PRESETS, argv, __doc__, ("objective", OBJECTIVE_DEFAULTS)))


if __name__ == "__main__":
    run(main)
