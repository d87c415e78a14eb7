"""Stage 1, instruction tuning: one GPT learns to report, answer, segment and draw.

    python sft.py                          # writes out/sft; trains out/vqgan first if it is missing
    python sft.py --bias 0                 # phantoms without language bias
    python sft.py --init QWEN3_DIR --lora-rank 8      # teach an existing language model to see and draw

Images and text share one vocabulary, so all four tasks are the same next-token problem; only response tokens
count. A tenth of the drawing prompts are emptied: classifier-free guidance needs an unconditional model
(arXiv:2207.12598).

The lesson, in order: the joint vocabulary and the prompts of the tasks; the four ways to use a model; examples
and batches; training. For consultation: what is on disk, --init.

A healthy log: loss falls from about 7, the log of the vocabulary's size, to under 2 (image codes hold most of what
remains); val/f1, the finding F1 of greedy reports on held-out records, climbs late and then steeply. The checkpoint with
the best val/f1 is kept, as val/loss rises again much earlier (where findings are unknown: that with the lowest val/loss).
"""

import contextlib
import json
import shutil
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import vqgan as vqgan_stage
from data import Finding, fingerprint, image_source, lexicon, match_findings, open_data, printable, read_findings
from model import (GPT, GPTConfig, Log, TuneConfig, UserError, add_lora, arg, batch_indices, begin_stage, built_ahead,
                   check_own, check_resume, copy_folder, cli, config_for, finish_stage, first_alone, folder_hash, gather, generate,
                   get_lr, init_run, make_optimizers, own, process, processes, read_json, read_progress, read_tensors, refuse, run,
                   run_flags, save_state, save_tuned, sequence_logps, set_lr, take_step, to_device, train_mode, trained_parameters,
                   wait, weights_hash, write_tensors, write_text)
from vqgan import VQGAN, encode_images


@dataclass
class SFTConfig(TuneConfig):
    """Flags of stage 1."""

    init: str = arg("", "Qwen3 folder to start from (one of ours goes on with its image tokenizer); empty: random weights")
    steps: int = arg(2600, "optimizer steps")
    batch_size: int = arg(64, "sequences a step", most=65536)
    lr: float = arg(4e-3, "peak learning rate of embeddings and norms (AdamW)")
    muon_lr: float = arg(0.02, "peak learning rate of the matrices inside blocks (Muon)")
    weight_decay: float = arg(0.1, "weight decay of the matrices inside blocks")
    report_share: float = arg(0.30, "share of sequences: image -> report")
    generate_share: float = arg(0.40, "share of sequences: report -> image")
    ask_share: float = arg(0.18, "share of sequences: image and question -> answer")
    segment_share: float = arg(0.12, "share of sequences: image and structure -> mask")
    empty_share: float = arg(0.1, "share of generation prompts that are emptied, for guidance", most=1)
    val_every: int = arg(260, "steps between validations")
    val_records: int = arg(256, "held-out records in a validation")
    text_vocab: int = arg(800, "text tokens at most, the 256 bytes and 5 special ones among them", least=261)
    log_every: int = arg(20, "steps between log lines")
    resume: bool = arg(False, "go on from the last saved state")


PRESETS = {"tiny": dict(steps=40, batch_size=16, val_every=20, val_records=12), "small": {},
           "quick": dict(steps=450, batch_size=32, val_every=450, val_records=128, report_share=0.45, generate_share=0.25,
                         ask_share=0.20, segment_share=0.10),
           "base": dict(steps=40000, batch_size=128, lr=1e-3, val_every=2000, text_vocab=4000)}
SHAPES = {"tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32, num_key_value_heads=1),
          "quick": dict(hidden_size=96, intermediate_size=288, num_hidden_layers=3, head_dim=48),
          "small": {},
          "base": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
                       num_key_value_heads=4)}


# ---- The lesson: the joint vocabulary and the prompts of the four tasks --------------------------

TASKS = ("report", "generate", "ask", "segment")
INSTRUCTIONS = {"report": ("Write the report.", "Describe this image.", "What does this image show?"),
                "generate": ("Draw this: {}", "Generate an image: {}", "Image of: {}"),
                "segment": ("Segment the {}.", "Outline the {}.", "Where is the {}?")}
SPECIALS = ("<eos>", "</image>", "<image>", "<bos>", "<pad>")       # eos, eoi, boi, bos, pad below; <eos> first: see text_range
image_tokens = lambda n: [f"<img_{i}>" for i in range(n)]
MAX_TEXT = 128         # tokens of a response or prompt in words; longer ones are cut
MAX_LETTERS = 64 * MAX_TEXT                                         # a text's letters beyond these are ignored


class Vocabulary:
    """One id space: text (byte-level BPE, or a tokenizer learned elsewhere), the five SPECIALS, one id an image code.

    text_range and image_range are the ids from which a response in words and one in codes are sampled: text and <eos>,
    which is why <eos> comes first among SPECIALS; image codes alone, since an image ends where it is full."""

    def __init__(self, tokenizer, codebook_size):
        self.tokenizer, self.codebook_size = tokenizer, codebook_size
        # a caption that says "<image>" means those letters, never the special token
        tokenizer.encode_special_tokens = True
        self.eos, self.eoi, self.boi, self.bos, self.pad = (tokenizer.token_to_id(s) for s in SPECIALS)
        self.image_start = tokenizer.token_to_id("<img_0>")
        self.size = self.image_start + codebook_size
        self.text_range, self.image_range = (0, self.eos + 1), (self.image_start, self.size)
        self.has_cut = False

    def config(self):
        """The fields of the model's config.json that depend on this vocabulary."""
        return {"pad_token_id": self.pad, "bos_token_id": self.bos, "eos_token_id": self.eos, "image_token_start": self.image_start}

    @classmethod
    def train(cls, texts, codebook_size, text_size=800):
        """Learn up to text_size tokens of text, SPECIALS among them, from an iterable of strings; add one an image code."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator((text[:MAX_LETTERS] for text in texts), trainers.BpeTrainer(
            vocab_size=text_size - len(SPECIALS), show_progress=False, min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
        return cls.append(tokenizer, codebook_size)

    @classmethod
    def append(cls, tokenizer, codebook_size):
        """A tokenizer of text, with our specials and the image codes after its own tokens."""
        tokenizer.add_special_tokens([*SPECIALS, *image_tokens(codebook_size)])
        return cls(tokenizer, codebook_size)

    def encode_text(self, text):
        """Text to ids, at most MAX_TEXT of them; says once when it cuts."""
        ids = self.tokenizer.encode(printable(text[:MAX_LETTERS]), add_special_tokens=False).ids
        if len(ids) > MAX_TEXT and not self.has_cut:
            self.has_cut = True
            tqdm.write(f"a text of {len(ids)} tokens or more was cut to {MAX_TEXT}, and so will be others: {text[:60]!r}…")
        return ids[:MAX_TEXT]

    def decode_text(self, ids):
        """Ids to text, specials and image codes left out."""
        return self.tokenizer.decode([i for i in ids if i < self.eos]).strip()

    def codes_to_ids(self, codes):
        """Image codes to ids."""
        return [int(c) + self.image_start for c in codes]

    def report_prompt(self, codes, wording=0):
        """The image and one of three ways to ask for a report."""
        return self.ask_prompt(codes, INSTRUCTIONS["report"][wording])

    def ask_prompt(self, codes, question):
        """<bos> <image> codes </image> question."""
        return [self.bos, self.boi, *self.codes_to_ids(codes), self.eoi, *self.encode_text(question)]

    def segment_prompt(self, codes, structure, wording=0):
        """The image, the structure's name, then the mask's <image>."""
        return [*self.ask_prompt(codes, INSTRUCTIONS["segment"][wording].format(structure)), self.boi]

    def generate_prompt(self, text, wording=0):
        """<bos> instruction and text <image>; for text None <bos> <image>, guidance's unconditional prompt."""
        words = "" if text is None else INSTRUCTIONS["generate"][wording].format(text)
        return [self.bos, *self.encode_text(words), self.boi]

    def text_response(self, text):
        """A response in words: its tokens and <eos>."""
        return [*self.encode_text(text), self.eos]

    def image_response(self, codes):
        """A response in codes, and the </image> after them, which is learned and never sampled."""
        return [*self.codes_to_ids(codes), self.eoi]

    @first_alone
    def save(self, folder):
        """Write tokenizer.json and the few names that transformers' AutoTokenizer asks for."""
        write_text(Path(folder) / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        write_text(Path(folder) / "tokenizer_config.json", json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
            "pad_token": "<pad>", "clean_up_tokenization_spaces": False}, indent=2) + "\n")

    @classmethod
    def load(cls, folder):
        """Read what save wrote. Raises UserError."""
        tokenizer = read_tokenizer(folder)
        if None in map(tokenizer.token_to_id, (*SPECIALS, "<img_0>")):
            raise UserError(f"{folder}/tokenizer.json lacks our special tokens or the image's; name a folder that `python sft.py` wrote")
        return cls(tokenizer, tokenizer.get_vocab_size() - tokenizer.token_to_id("<img_0>"))


# ---- The lesson: four ways to use a model --------------------------------------------------------

# Images come as codes, n rows of N = grid² each; options are those of model.py's generate.


def sample_words(model, vocab, prompts, temperature=0.0, seed=0, **options):
    """Continue prompts in words: n lists of ids to n strings."""
    rows = generate(model, prompts, MAX_TEXT, vocab.text_range, vocab.eos, temperature, seed=seed, **options)
    return [vocab.decode_text(row) for row in rows]


def sample_codes(model, vocab, prompts, n_codes, temperature=0.0, seed=0, **options):
    """Continue prompts in codes: n lists of ids to image codes (n, n_codes), long."""
    rows = generate(model, prompts, n_codes, vocab.image_range, temperature=temperature, seed=seed, **options)
    return torch.tensor(rows, device=model.device) - vocab.image_start


def write_reports(model, vocab, codes, **options):
    """Image -> report: n strings."""
    return sample_words(model, vocab, [vocab.report_prompt(c) for c in codes], **options)


def write_answers(model, vocab, codes, questions, **options):
    """Image and question -> answer, one question an image: n strings."""
    return sample_words(model, vocab, [vocab.ask_prompt(c, q) for c, q in zip(codes, questions)], **options)


def draw_masks(model, vocab, vqgan, codes, structures, **options):
    """Image and structure -> mask, one structure an image: masks (n, H, W), bool."""
    prompts = [vocab.segment_prompt(c, s) for c, s in zip(codes, structures)]
    drawn = sample_codes(model, vocab, prompts, vqgan.config.grid ** 2, **options)
    return (vqgan.decode(drawn).mean(dim=1) > 0).cpu().numpy()


def draw_images(model, vocab, vqgan, texts, guidance=1.0, **options):
    """Report -> image: n strings to images (n, C, H, W) in [-1, 1], each from exactly N codes."""
    prompts = [vocab.generate_prompt(t) for t in texts]
    return vqgan.decode(sample_codes(model, vocab, prompts, vqgan.config.grid ** 2, guidance=guidance,
                                     unconditional=[vocab.generate_prompt(None)] * len(texts), **options))


def dice(a, b):
    """2·|a ∩ b| / (|a| + |b|) of two boolean masks; 1 if both are empty."""
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else 2 * float((a & b).sum()) / float(total)


# ---- The lesson: examples and batches ------------------------------------------------------------

MASKS_EACH = 2


@dataclass
class Study:
    """A record as tokens: what training needs of it once its pixels are gone."""

    codes: np.ndarray                # (N,) image codes
    text: str
    questions: tuple                 # of (question, answer)
    masks: tuple                     # of (structure, codes (N,)), at most MASKS_EACH
    findings: tuple | None

    @property
    def tasks(self):
        """The tasks it serves."""
        has = {"report": self.text, "generate": self.text, "ask": self.questions, "segment": self.masks}
        return tuple(t for t in TASKS if has[t])


def encode_records(records, span, vqgan, seed, autocast, title="encoding"):
    """The Studies of records[i], i in span: images and up to MASKS_EACH randomly chosen masks through the image tokenizer."""
    studies = []
    for part in tqdm([span[i:i + 256] for i in range(0, len(span), 256)], desc=title, unit="batch", leave=False):
        batch = [records[i] for i in part]
        images, structures = [r.image for r in batch], []
        for i, record in zip(part, batch):
            structures.append(np.random.default_rng([seed, 2, i]).permutation(sorted(record.masks))[:MASKS_EACH].tolist())
            images += [record.masks[name] * np.uint8(255) for name in structures[-1]]
        codes = encode_images(images, vqgan, autocast)
        mask_codes = iter(codes[len(batch):])
        for record, image_codes, names in zip(batch, codes, structures):
            studies.append(Study(image_codes, record.text, record.questions, tuple(zip(names, mask_codes)), record.findings))
    return studies


def make_example(study, task, vocab, rng, empty_share=0.0):
    """(prompt ids, response ids) of one task on one study, wordings drawn from rng."""
    wording = rng.integers(3)
    if task == "report":
        return vocab.report_prompt(study.codes, wording), vocab.text_response(study.text)
    if task == "generate":
        emptied = rng.random() < empty_share
        return vocab.generate_prompt(None if emptied else study.text, wording), vocab.image_response(study.codes)
    if task == "ask":
        question, answer = study.questions[rng.integers(len(study.questions))]
        return vocab.ask_prompt(study.codes, question), vocab.text_response(answer)
    structure, mask = study.masks[rng.integers(len(study.masks))]
    return vocab.segment_prompt(study.codes, structure, wording), vocab.image_response(mask)


def collate(examples, pad):
    """(prompt, response) pairs to ids and labels, each (B, T): labels are -100 outside the response.

    With pad 0, ([1, 7], [9, 4]) and ([1], [5]) give ids [[1, 7, 9, 4], [1, 5, 0, 0]] and labels
    [[-100, -100, 9, 4], [-100, 5, -100, -100]]."""
    ids = [torch.tensor([*prompt, *response]) for prompt, response in examples]
    labels = [torch.tensor([-100] * len(prompt) + [*response]) for prompt, response in examples]
    return (pad_sequence(ids, batch_first=True, padding_value=pad),
            pad_sequence(labels, batch_first=True, padding_value=-100))


def pick_task(study, shares, rng):
    """One of the tasks that a study serves, by their shares."""
    p = np.array([shares[t] if t in study.tasks else 0.0 for t in TASKS])
    return TASKS[rng.choice(len(TASKS), p=p / p.sum())]


def shares_of(cfg):
    """{task: share of the sequences}."""
    return {task: getattr(cfg, f"{task}_share") for task in TASKS}


def make_batch(studies, cfg, vocab, step):
    """The batch of a step: ids and labels (B, T), drawn from (seed, step) alone, so a resumed run sees the same.

    With several processes B is this one's slice."""
    rng = np.random.default_rng([cfg.seed, 3, step])
    chosen = [studies[i] for i in batch_indices(len(studies), cfg.batch_size, step, cfg.seed)]
    examples = [make_example(s, pick_task(s, shares_of(cfg), rng), vocab, rng, cfg.empty_share) for s in chosen]
    return collate(own(examples), vocab.pad)


# ---- The lesson: training ------------------------------------------------------------------------

def response_loss(model, ids, labels):
    """Mean negative log-probability of the response tokens, in nats a token; with several processes of all their rows."""
    counted = to_device((labels[:, 1:] != -100).sum(dim=1), model.device)
    return -gather(sequence_logps(model, ids, labels)).sum() / gather(counted).sum()


@torch.no_grad()
def validate(model, studies, tasks, vocab, phrases):
    """Held-out studies: the loss of each task, their plain mean and, where findings are known, F1 of greedy reports."""
    model.eval()                      # LoRA's dropout is for training
    result, rng = {}, np.random.default_rng(0)
    for task in tasks:
        examples = [make_example(s, task, vocab, rng) for s in studies if task in s.tasks]
        if examples:
            result[f"val/loss_{task}"] = response_loss(model, *collate(examples, vocab.pad)).item()
    result["val/loss"] = sum(result.values()) / len(result)
    known = [s for s in studies if s.findings is not None and "report" in s.tasks and "report" in tasks]
    if known and phrases:
        texts = write_reports(model, vocab, [s.codes for s in known])
        counts = [match_findings(read_findings(t, phrases), s.findings) for t, s in zip(texts, known)]
        right, stated, true = (sum(c[k] for c in counts) for k in ("right", "stated", "true"))
        result["val/f1"] = 2 * right / max(1, stated + true)
        result["val/distinct_reports"] = len(set(texts))
    model.train()
    return result


def train(cfg):
    """Instruction-tune a GPT and write out/sft."""
    device, autocast = init_run(cfg)
    if cfg.lora_rank and not cfg.init:
        raise UserError("--lora-rank adapts a model that can do something already: name one with --init")
    if cfg.init and not (Path(cfg.init).resolve() / "config.json").is_file():
        raise UserError(f"--init {cfg.init} holds no model (config.json): name the folder of one")
    check_resume(cfg, "sft")                                 # fail before the slow part, not at begin_stage
    vqgan = load_vqgan(cfg, device, cfg.init)
    if not cfg.init and vqgan.config.data != image_source(cfg):
        raise UserError(f"{cfg.out}/vqgan was trained on {vqgan.config.data}, not on {image_source(cfg)}: "
                        "name another --out, or remove the folder to train it again")
    loaded = load_init(cfg, vqgan, device) if cfg.init else None       # what it refuses it refuses before the encoding
    data = open_data(cfg)
    origin = {"image tokenizer": weights_hash(vqgan), "--data or data.py": fingerprint(data["train"])}
    origin |= {"--init": folder_hash(cfg.init)} if cfg.init else {}
    check_resume(cfg, "sft", origin)
    studies = open_studies(cfg, data["train"], vqgan, autocast)
    model, vocab, adapter = loaded or new_model(cfg, vqgan, studies, device)
    tasks = [t for t, share in shares_of(cfg).items() if share > 0]
    studies = studies.serving(tasks)
    val = encode_records(data["val"], range(min(cfg.val_records, len(data["val"]))), vqgan, cfg.seed, autocast)
    if not len(studies) or not any(t in tasks for s in val for t in s.tasks):
        raise UserError("no training record, or no validation record, serves a task whose share is above 0; raise "
                        "--report-share or another")
    taught = [t for t in tasks if len(studies.serving([t]))]
    describe(model, vocab, vqgan, cfg, taught, getattr(data["train"], "rows", val))    # phantoms have no rows: held-out ones stand in

    phrases, trained = lexicon(data["train"]), trained_parameters(model)
    optimizers = make_optimizers(model, cfg.lr, cfg.muon_lr, cfg.weight_decay, autocast)
    train_mode(model, cfg)
    folder, progress = begin_stage(cfg, "sft", [trained], optimizers)
    start, best_score = progress.get("step", 0), progress.get("best_score", -float("inf"))
    log = Log(f"{folder}.jsonl", "sft", cfg.steps, start)
    for step, (ids, labels) in built_ahead(lambda step: make_batch(studies, cfg, vocab, step), start, cfg.steps):
        set_lr(optimizers, get_lr(step, cfg.steps, warmup=40))
        torch.manual_seed(cfg.seed + step)                   # LoRA's dropout: a resumed run draws alike
        with autocast():
            loss = response_loss(model, ids, labels)
        grad_norm = take_step(loss, trained, optimizers, clip=1.0)
        log.count(step, grad_norm)

        if (step + 1) % cfg.val_every == 0 or step + 1 == cfg.steps:
            with autocast():
                held_out = validate(model, val, tasks, vocab, phrases)
            log(step, ("loss", "val/loss", "val/f1"), loss=loss, grad_norm=grad_norm, **held_out)
            if (score := held_out.get("val/f1", -held_out["val/loss"])) >= best_score:
                best_score = score                           # the folder keeps the best model, its state is the last
                save_tuned(folder, model, cfg, adapter)
            log.warn(len(val) > 1 and held_out.get("val/distinct_reports") == 1, "every report is the same; it may yet learn to look")
        elif step % cfg.log_every == 0:
            log(step, ("loss",), loss=loss, grad_norm=grad_norm, lr=optimizers[-1].param_groups[0]["lr"])
        if log.is_due(step, cfg.val_every):
            save_state(folder, step + 1, [trained], optimizers, best_score=best_score, flags=run_flags(cfg), origin=origin)
        if log.stopping:
            log.close()                                      # raises Stopped
    log.close()
    vocab.save(folder)
    finish_stage(cfg, "sft")
    tqdm.write(f"wrote {cfg.out}/sft (best validation score {best_score:.3f})")


# ---- For consultation: Studies on disk -----------------------------------------------------------

STUDIES_EACH = 4096                  # in one file


class Studies:
    """The training records as Studies, a sequence on disk: each is read when it is asked for, so memory does not grow."""

    def __init__(self, folder):
        paths = sorted(Path(folder).glob("*.safetensors"))
        self.tasks = np.concatenate([read_tensors(path)["tasks"] for path in paths])    # (n, 4) bool, in the order of TASKS
        self.files = [safe_open(path, "np") for path in paths]
        self.indices = np.arange(len(self.tasks))

    def serving(self, tasks):
        """Those of them that serve at least one of the tasks."""
        studies = copy(self)
        studies.indices = self.indices[self.tasks[self.indices][:, [TASKS.index(t) for t in tasks]].any(axis=1)]
        return studies

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        k, i = divmod(int(self.indices[index]), STUDIES_EACH)
        codes, masks, ends, rows = (self.files[k].get_slice(name) for name in ("codes", "masks", "ends", "rows"))
        row = json.loads(bytes(rows[slice(*ends[i:i + 2])]))
        findings = row["findings"] and tuple(Finding(*f) for f in row["findings"])
        return Study(codes[i], row["text"], tuple(map(tuple, row["questions"])), tuple(zip(row["structures"], masks[i])), findings)


def write_studies(path, studies):
    """One file of Studies: codes and masks as arrays, all else as JSON, row after row."""
    rows = [json.dumps({"text": s.text, "questions": s.questions, "structures": [name for name, _ in s.masks],
                        "findings": s.findings and [(f.name, f.side) for f in s.findings]}).encode() for s in studies]
    masks = np.zeros((len(studies), MASKS_EACH, len(studies[0].codes)), np.int16)
    for row, study in zip(masks, studies):
        for i, (_, codes) in enumerate(study.masks):
            row[i] = codes
    write_tensors(path, {k: torch.from_numpy(v) for k, v in {
        "codes": np.stack([s.codes for s in studies]), "masks": masks,
        "tasks": np.array([[t in s.tasks for t in TASKS] for s in studies]),
        "ends": np.cumsum([0, *map(len, rows)]), "rows": np.frombuffer(b"".join(rows), np.uint8).copy()}.items()}, {})


def open_studies(cfg, records, vqgan, autocast):
    """The Studies of the training records in out/studies, encoded first where they are not there.

    What a kill left is gone on with; those of other records or another image tokenizer are made anew."""
    recipe = {"records": fingerprint(records), "vqgan": weights_hash(vqgan), "seed": cfg.seed, "dtype": cfg.dtype}
    folder, partial = Path(cfg.out) / "studies", Path(cfg.out) / "studies.partial"
    try:
        studies = Studies(folder) if read_json(folder / "config.json") == recipe else ()
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        tqdm.write(f"{folder} is damaged ({error}) and is made anew")
        studies = ()
    if len(studies) != len(records):
        check_own(cfg.out, "studies")
        if process() == 0 and read_json(partial / "config.json") != recipe:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_text(partial / "config.json", json.dumps(recipe) + "\n")
        wait()
        for start in range(0, len(records), STUDIES_EACH)[process()::processes()]:
            path, span = partial / f"{start:09}.safetensors", range(start, min(start + STUDIES_EACH, len(records)))
            if not path.exists():
                title = f"encoding records, {start:,} of {len(records):,}"
                write_studies(path, encode_records(records, span, vqgan, cfg.seed, autocast, title))
        wait()
        finish_stage(cfg, "studies")
        studies = Studies(folder)
    return studies


# ---- For consultation: loading what is on disk, and --init ---------------------------------------

def load_vqgan(cfg, device, init=""):
    """The image tokenizer of cfg.out; if it is missing, the one beside the folder `init`, else trained first.

    Raises UserError if it does not fit the flags."""
    folder = Path(cfg.out) / "vqgan"
    from_init = init and not folder.exists() and (Path(init).parent / "vqgan").exists()
    wait()                                                   # all processes have seen the same
    if from_init:
        first_alone(copy_folder)(Path(init).parent / "vqgan", folder)
        wait()
    if not folder.exists():
        tqdm.write(f"{folder} is missing: training the image tokenizer first")
        vqgan_stage.train(config_for(vqgan_stage.VQGANTrainConfig, cfg, **vqgan_stage.PRESETS[cfg.preset], resume=cfg.resume))
    vqgan = VQGAN.from_pretrained(folder, device)
    if (vqgan.config.image_size, vqgan.config.channels) != (cfg.image_size, cfg.channels):
        raise UserError(f"{folder} was trained for --image-size {vqgan.config.image_size} and --channels "
                        f"{vqgan.config.channels}, not {cfg.image_size} and {cfg.channels}: use these, or its --preset, or another --out")
    return vqgan


def data_name(cfg):
    """What a model trained with these flags was trained on, as its config.json says it."""
    return image_source(cfg) if cfg.data else f"{image_source(cfg)} --bias {cfg.bias:g}"


def check_data(trained_on, cfg, folder):
    """Raise UserError if the model in `folder` was trained on other data than cfg names."""
    if trained_on != data_name(cfg):
        flags = f"--data {trained_on}" + " (moved? put it back there)" * (not Path(trained_on).exists())
        if trained_on.startswith("phantoms"):
            flags = trained_on.removeprefix("phantoms ") + " and no --data" * bool(cfg.data)
        raise UserError(f"{folder} was trained on {trained_on}, not on {data_name(cfg)}: say {flags}, or name another --out")


def warn_of_other_data(cfg, records):
    """Say that --data is no longer what out/sft was trained on: its patients may be split otherwise now."""
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):     # a folder without its state says nothing
        if cfg.data and read_progress(Path(cfg.out) / "sft")["origin"]["--data or data.py"] != fingerprint(records):
            tqdm.write(f"{cfg.data} (or data.py) is not as it was when {cfg.out}/sft was trained: what is held out now may have been "
                       "trained on; train anew to be sure")


def load_gpt(folder, vqgan, device, model=None):
    """Model and vocabulary of a GPT folder; `model`: where it is read already.

    Raises UserError if it was trained with another image tokenizer, or with another tokenizer.json."""
    model, vocab = model or GPT.from_pretrained(folder, device), Vocabulary.load(folder)
    if model.config.vqgan_hash != weights_hash(vqgan):
        raise UserError(f"{folder} was trained with another image tokenizer than the one in --out; "
                        "train it again, or bring back that image tokenizer")
    if any(vars(model.config)[k] != v for k, v in vocab.config().items()) or vocab.size - vocab.image_start != vqgan.config.codebook_size:
        raise UserError(f"{folder}/tokenizer.json is not the one that its config.json was written with; bring it back")
    return model, vocab


def read_tokenizer(folder):
    """A folder's tokenizer.json. Raises UserError."""
    path = Path(folder) / "tokenizer.json"
    with refuse(f"{path} cannot be read", "bring back the one it came with"):
        return Tokenizer.from_file(str(path))


def extend_vocabulary(folder, codebook_size):
    """The Vocabulary of a model folder of other hands: its tokenizer, then our specials and the image codes.

    Raises UserError if one of our specials is already among its tokens, or if their ids have gaps."""
    tokenizer = read_tokenizer(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    size, last = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values(), default=0)
    if last != size - 1:
        raise UserError(f"{folder}/tokenizer.json numbers its {size} tokens up to {last}; only ids without gaps are read here")
    if taken := [s for s in (*SPECIALS, *image_tokens(codebook_size)) if tokenizer.token_to_id(s) is not None]:
        raise UserError(f"{folder}/tokenizer.json uses {' '.join(taken[:5])} for itself, which are our names; rename them")
    return Vocabulary.append(tokenizer, codebook_size)


def load_init(cfg, vqgan, device):
    """Model, vocabulary and Adapter or None of --init: ours as they are, any other Qwen3's with our tokens appended.

    Raises UserError where tokenizer and model, or model and image tokenizer, do not fit."""
    if Path(cfg.out).resolve() in Path(cfg.init).resolve().parents:
        raise UserError(f"--init {cfg.init} lies in --out {cfg.out}, where this run would write over it or over its base: "
                        "name another --out")
    torch.manual_seed(cfg.seed)
    model, first_new = GPT.from_pretrained(cfg.init, device), None
    if model.config.image_token_start is not None:
        model, vocab = load_gpt(cfg.init, vqgan, device, model)
    else:
        vocab = extend_vocabulary(cfg.init, vqgan.config.codebook_size)
        first_new = vocab.eos                                # the first token that is not the folder's own
        if first_new > model.config.vocab_size:
            raise UserError(f"{cfg.init}/tokenizer.json has {first_new} tokens, the embedding only "
                            f"{model.config.vocab_size} rows: the two do not belong together")
        model.grow(first_new, vocab.size)
    return model, vocab, add_lora(model, cfg, cfg.init, first_new) if cfg.lora_rank else None


def all_texts(studies):
    """Every string of a sequence of Studies, for training the vocabulary."""
    yield from (w for words in INSTRUCTIONS.values() for w in words * 50)
    for study in studies:
        yield study.text
        for question_and_answer in study.questions:
            yield from question_and_answer
        yield from (structure for structure, _ in study.masks)


def new_model(cfg, vqgan, studies, device):
    """A GPT of random weights, its Vocabulary, of the Studies' words, and no Adapter."""
    torch.manual_seed(cfg.seed)
    vocab = Vocabulary.train(all_texts(studies), vqgan.config.codebook_size, cfg.text_vocab)
    return GPT(GPTConfig(vocab.size, **SHAPES[cfg.preset])).to(device), vocab, None


def describe(model, vocab, vqgan, cfg, tasks, records):
    """Write into the model's config what it is made for: its special tokens, longest sequence, image tokenizer, data, tasks, and
    the structures whose masks the records or Studies have."""
    structures = {name for r in records for name in dict(r.masks)} | {*filter(None, model.config.structures.split(", "))}
    tasks = [t for t in TASKS if t in tasks or t in model.config.tasks.split()]       # those of --init, too
    longest = 2 * vqgan.config.grid ** 2 + 2 * MAX_TEXT      # no task needs more
    vars(model.config).update(
        **vocab.config(), max_position_embeddings=max(longest, model.config.max_position_embeddings),
        vqgan_hash=weights_hash(vqgan), data=data_name(cfg), tasks=" ".join(tasks), structures=", ".join(sorted(structures)))


def main(argv=None):
    """Command line."""
    train(cli(SFTConfig, PRESETS, argv, __doc__))


if __name__ == "__main__":
    run(main)
