"""Stage 1, instruction tuning: one GPT learns to report, answer, segment and draw.

    python sft.py                          # writes out/sft; trains out/vqgan first if it is missing
    python sft.py --bias 0                 # phantoms without language bias
    python sft.py --init QWEN3_DIR --lora-rank 8      # teach an existing language model to see and draw

All four tasks are the same next-token problem; only response tokens count. A tenth of the generation
prompts are emptied, so that guidance has an unconditional model to lean on (arXiv:2207.12598).

A healthy log: loss falls from about log(V) = 7.2 to under 2 (image codes hold most of what remains);
val/f1, the finding F1 of greedy reports on held-out records, climbs late and then steeply. The checkpoint
with the best val/f1 is kept, not the one with the lowest val/loss, which turns much earlier.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import vqgan as tokenizer_stage
from data import (INSTRUCTIONS, MAX_TEXT, Vocabulary, all_texts, collate, data_name, encode_records, image_source, lexicon,
                  make_example, match_findings, open_data, read_findings)
from model import (GPT, GPTConfig, Log, TuneConfig, UserError, add_lora, arg, batch_indices, begin_stage, cli, finish_stage,
                   folder_hash, generate, get_lr, init_run, make_optimizers, per_token_logps, pick, run, run_flags, save_state,
                   save_tuned, sequence_logps, set_lr, trained_parameters, weights_hash)
from vqgan import VQGAN


@dataclass
class SFTConfig(TuneConfig):
    """Flags of stage 1."""

    init: str = arg("", "Qwen3 folder to start from (one of ours goes on with its image tokenizer); empty: random weights")
    steps: int = arg(2600, "optimizer steps")
    batch_size: int = arg(64, "sequences a step")
    lr: float = arg(4e-3, "peak learning rate of embeddings and norms (AdamW)")
    muon_lr: float = arg(0.02, "peak learning rate of the matrices inside blocks (Muon)")
    weight_decay: float = arg(0.1, "weight decay of the matrices inside blocks")
    report_share: float = arg(0.30, "share of sequences: image -> report")
    generate_share: float = arg(0.40, "share of sequences: report -> image")
    ask_share: float = arg(0.18, "share of sequences: image and question -> answer")
    segment_share: float = arg(0.12, "share of sequences: image and structure -> mask")
    empty_share: float = arg(0.1, "share of generation prompts that are emptied, for guidance")
    val_every: int = arg(260, "steps between validations")
    val_records: int = arg(256, "held-out records in a validation")
    text_vocab: int = arg(800, "text tokens, the 256 bytes among them")
    log_every: int = arg(20, "steps between log lines")
    resume: bool = arg(False, "go on from the last saved state")


PRESETS = {"tiny": dict(steps=40, batch_size=16, val_every=20, val_records=12), "small": {},
           "base": dict(steps=40000, batch_size=128, lr=1e-3, val_every=2000, text_vocab=4000)}
SHAPES = {"tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32, num_key_value_heads=1),
          "small": {},
          "base": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
                       num_key_value_heads=4)}
TASKS = ("report", "generate", "ask", "segment")


def load_vqgan(cfg, device, init=""):
    """The image tokenizer of cfg.out; if it is missing, the one beside the folder `init`, else trained first."""
    folder = Path(cfg.out) / "vqgan"
    if init and not folder.exists() and (Path(init).parent / "vqgan").exists():
        shutil.copytree(Path(init).parent / "vqgan", Path(cfg.out) / "vqgan.partial", dirs_exist_ok=True)
        finish_stage(cfg, "vqgan")
    if not folder.exists():
        tqdm.write(f"{folder} is missing: training the image tokenizer first")
        tokenizer_stage.train(pick(tokenizer_stage.VQGANTrainConfig, cfg, **tokenizer_stage.PRESETS[cfg.preset],
                                   resume=cfg.resume))
    vqgan = VQGAN.from_pretrained(folder, device)
    if (vqgan.config.image_size, vqgan.config.channels) != (cfg.image_size, cfg.channels):
        raise UserError(f"{folder} was trained for {vqgan.config.image_size} pixels and {vqgan.config.channels} "
                        f"channel(s), not {cfg.image_size} and {cfg.channels}: use its flags, or another --out")
    return vqgan


def load_gpt(folder, vqgan, device):
    """A GPT folder and its vocabulary. Raises UserError if it was trained with another image tokenizer."""
    model, vocab = GPT.from_pretrained(folder, device), Vocabulary.load(folder)
    check_tokenizer(model, vqgan, folder)
    return model, vocab


def check_tokenizer(model, vqgan, folder):
    """Raise UserError if the model in `folder` was trained with another image tokenizer."""
    if model.config.vqgan_hash != weights_hash(vqgan):
        raise UserError(f"{folder} was trained with another image tokenizer than the one in --out; "
                        "train it again, or bring back the tokenizer")


def load_init(cfg, vqgan, device):
    """Model and vocabulary of --init: ours as they are, any other Qwen3's with our tokens appended.

    With --lora-rank, adapters are added to the model. Raises UserError where tokenizer and model, or model and image
    tokenizer, do not fit."""
    if Path(cfg.out).resolve() in Path(cfg.init).resolve().parents:
        raise UserError(f"--init {cfg.init} lies in --out {cfg.out}, where this run would write over it or over its base: "
                        "name another --out")
    model, first_new = GPT.from_pretrained(cfg.init, device), None
    if model.config.image_token_start is not None:
        check_tokenizer(model, vqgan, cfg.init)
        vocab = Vocabulary.load(cfg.init)
    else:
        vocab = Vocabulary.extend(cfg.init, vqgan.config.codebook_size)
        first_new = vocab.eos                                # the first token that extend() appends
        if first_new > model.config.vocab_size:
            raise UserError(f"{cfg.init}/tokenizer.json has {first_new} tokens, the embedding only "
                            f"{model.config.vocab_size} rows: the two do not belong together")
        model.grow(first_new, vocab.size)
    if cfg.lora_rank:
        add_lora(model, cfg, cfg.init, first_new)
    return model, vocab


def make_model(cfg, vqgan, records, device):
    """The GPT to train and its vocabulary: --init's, or random weights and a vocabulary of the records' texts."""
    torch.manual_seed(cfg.seed)
    if cfg.init:
        model, vocab = load_init(cfg, vqgan, device)
    else:
        vocab = Vocabulary.train(all_texts(records), vqgan.config.codebook_size, cfg.text_vocab)
        model = GPT(GPTConfig(vocab.size, **SHAPES[cfg.preset])).to(device)
    # the longest prompt with its response: two images, an instruction and a text
    longest = 2 * vqgan.config.grid ** 2 + 2 * MAX_TEXT
    vars(model.config).update(
        max_position_embeddings=max(longest, model.config.max_position_embeddings), pad_token_id=vocab.pad,
        bos_token_id=vocab.bos, eos_token_id=vocab.eos, image_token_start=vocab.image_start,
        vqgan_hash=weights_hash(vqgan), data=data_name(cfg))
    return model.train(), vocab


def pick_task(study, shares, rng):
    """One of the tasks that a study serves, by their shares."""
    p = np.array([shares[t] if t in study.tasks else 0.0 for t in TASKS])
    return TASKS[rng.choice(len(TASKS), p=p / p.sum())]


def make_batch(studies, cfg, shares, vocab, step, device):
    """The batch of a step: ids and labels (B, T), drawn from (seed, step) alone, so a resumed run sees the same."""
    rng = np.random.default_rng([cfg.seed, 3, step])
    chosen = [studies[i] for i in batch_indices(len(studies), cfg.batch_size, step, cfg.seed)]
    examples = [make_example(s, pick_task(s, shares, rng), vocab, rng, cfg.empty_share) for s in chosen]
    return collate(examples, vocab.pad, device)


def response_loss(model, ids, labels):
    """Mean negative log-probability of the response tokens, in nats a token."""
    return -per_token_logps(model, ids, labels).sum() / (labels[:, 1:] != -100).sum()


@torch.no_grad()
def validate(model, studies, vocab, phrases):
    """Loss of each task and, where findings are known, F1 of greedy reports on held-out studies."""
    model.eval()                      # LoRA's dropout is for training
    figures, rng = {}, np.random.default_rng(0)
    for task in TASKS:
        examples = [make_example(s, task, vocab, rng) for s in studies if task in s.tasks]
        if examples:
            nats = tokens = 0
            for i in range(0, len(examples), 64):
                ids, labels = collate(examples[i:i + 64], vocab.pad, model.device)
                nats -= sequence_logps(model, ids, labels).sum().item()
                tokens += (labels != -100).sum().item()
            figures[f"val/loss_{task}"] = nats / tokens
    figures["val/loss"] = sum(figures.values()) / len(figures)
    known = [s for s in studies if s.findings is not None and "report" in s.tasks]
    if known and phrases:
        texts = write_reports(model, [s.codes for s in known], vocab)
        counts = [match_findings(read_findings(t, phrases), s.findings) for t, s in zip(texts, known)]
        right, stated, true = (sum(c[k] for c in counts) for k in ("right", "stated", "true"))
        figures["val/f1"] = 2 * right / max(1, stated + true)
    model.train()
    return figures


def write_reports(model, codes, vocab, temperature=0.0, seed=0, instruction=INSTRUCTIONS["report"][0], **options):
    """The model's reports on images given as codes: n rows of (N,) to n strings."""
    prompts = [vocab.understand(c, instruction) for c in codes]
    rows = generate(model, prompts, MAX_TEXT, vocab.text_range, vocab.eos, temperature, seed=seed, **options)
    return [vocab.decode_text(r) for r in rows]


@torch.no_grad()
def draw_masks(model, vocab, codes, structures, vqgan, temperature=0.0, seed=0):
    """The model's masks of one structure in each image: n rows of (N,) to (n, H, W) bool and their codes (n, N)."""
    rows = generate(model, [vocab.segment(c, s) for c, s in zip(codes, structures)], len(codes[0]), vocab.image_range,
                    temperature=temperature, seed=seed)
    drawn = torch.tensor([vocab.ids_to_codes(r) for r in rows], device=model.device)
    return (vqgan.decode(drawn).mean(dim=1) > 0).cpu().numpy(), drawn.cpu().numpy().astype(np.int16)


def dice(a, b):
    """2·|a ∩ b| / (|a| + |b|) of two boolean masks; 1 if both are empty."""
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else 2 * float((a & b).sum()) / float(total)


def train(cfg):
    """Instruction-tune a GPT and write out/sft."""
    device, autocast = init_run(cfg)
    shares = {task: getattr(cfg, f"{task}_share") for task in TASKS}
    if cfg.lora_rank and not cfg.init:
        raise UserError("--lora-rank adapts a model that can do something already: name one with --init")
    vqgan = load_vqgan(cfg, device, cfg.init)
    if not cfg.init and vqgan.config.data != image_source(cfg):
        raise UserError(f"{cfg.out}/vqgan was trained on {vqgan.config.data}, not on {image_source(cfg)}: "
                        "name another --out, or remove the folder to train it again")
    data = open_data(cfg)
    model, vocab = make_model(cfg, vqgan, data["train"], device)
    studies = encode_records(data["train"], vqgan, cfg.channels, cfg.seed, device, autocast, "encoding records")
    studies = [s for s in studies if any(shares[t] > 0 for t in s.tasks)]
    val = encode_records([data["val"][i] for i in range(min(cfg.val_records, len(data["val"])))],
                         vqgan, cfg.channels, cfg.seed, device, autocast, "encoding validation")
    if not studies:
        raise UserError("no training record serves a task whose share is above 0; raise --report-share or another")

    phrases, trained = lexicon(data["train"]), trained_parameters(model)
    optimizers = make_optimizers(model, cfg.lr, cfg.muon_lr, cfg.weight_decay)
    folder, figures = begin_stage(cfg, "sft", [trained], optimizers)
    base_hash = folder_hash(cfg.init) if cfg.init else ""
    if figures.get("base", base_hash) != base_hash:
        raise UserError(f"--resume: {folder} was started from another {cfg.init}; leave out --resume")
    start, best_score = figures.get("step", 0), figures.get("best_score", -float("inf"))
    log = Log(f"{cfg.out}/sft.jsonl", "sft", cfg.steps, start)
    for step in range(start, cfg.steps):
        set_lr(optimizers, get_lr(step, cfg.steps, warmup=40))
        torch.manual_seed(cfg.seed + step)                   # LoRA's dropout: a resumed run draws alike
        ids, labels = make_batch(studies, cfg, shares, vocab, step, device)
        with autocast():
            loss = response_loss(model, ids, labels)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()

        log.bar.update()
        if (step + 1) % cfg.val_every == 0 or step + 1 == cfg.steps:
            with autocast():
                held_out = validate(model, val, vocab, phrases)
            score = held_out.get("val/f1", -held_out["val/loss"])
            log(step, ("loss", "val/loss", "val/f1"), loss=loss.detach(), grad_norm=grad_norm, **held_out)
            if score >= best_score:                          # the folder keeps the best model, its state is the last
                best_score = score
                save_tuned(folder, model, cfg)
            save_state(folder, step + 1, [trained], optimizers, best_score=best_score, flags=run_flags(cfg), base=base_hash)
        elif step % cfg.log_every == 0:
            log(step, ("loss",), loss=loss.detach(), grad_norm=grad_norm, lr=optimizers[-1].param_groups[0]["lr"])
    log.close()
    vocab.save(folder)
    finish_stage(cfg, "sft")
    tqdm.write(f"wrote {cfg.out}/sft (best validation score {best_score:.3f})")


def main(argv=None):
    """Command line."""
    train(cli(SFTConfig, PRESETS, argv, __doc__))


if __name__ == "__main__":
    run(main)
