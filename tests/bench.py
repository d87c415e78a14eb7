"""Speed and memory, by hand: `python -m tests.bench [WHAT ...] [--repeats 5] [--json FILE]`. pytest does not collect this file.

Each row does one kind of work at the shapes of `small`, in float32 and, where the hardware has it, in bfloat16; on the GPU
where there is one. `growth` shows time and memory against length and vocabulary. Where a peer is installed (`pip install transformers trl datasets
vector-quantize-pytorch`; none is needed) it does the same work in the same process, the two in turn, A B A B, and the
ratio of their medians is printed: a busy machine slows both. Each case of `growth` runs in a process of its own, for its memory."""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Phantoms  # noqa: E402
from dpo import DPOConfig, log_ratios, objective_loss, sum_logps  # noqa: E402
from model import (GPT, GPTConfig, UserError, generate, init_run, make_optimizers, per_token_logps, split_batch,  # noqa: E402
                   take_step, train_mode)
from sft import SFTConfig, Study, Vocabulary, collate, encode_records, make_batch  # noqa: E402
from vqgan import VQGAN, VectorQuantizer, VQGANConfig  # noqa: E402

SHAPE = {}                       # of the GPT, as --shape says
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"small": {}, "100M": dict(hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
                                    num_key_value_heads=4),
          "400M": dict(hidden_size=1280, intermediate_size=3840, num_hidden_layers=20, num_attention_heads=20,
                       num_key_value_heads=5)}


def have(package):
    """Whether a peer is installed."""
    return importlib.util.find_spec(package) is not None


def seconds(work, repeats):
    """{name: median seconds} of several functions, run in turn after a first round that does not count."""
    times = {name: [] for name in work}
    for i in range(repeats + 1):
        for name, f in work.items():
            start = time.perf_counter()
            f()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(t[1:])[(len(t) - 1) // 2] for name, t in times.items()}


def gpt_of():
    """A GPT of --shape, and transformers' Qwen3 with the same weights, or None where it is not installed."""
    torch.manual_seed(0)
    gpt, peer = GPT(GPTConfig(1317, pad_token_id=804, eos_token_id=800, **SHAPE)).to(DEVICE), None
    if have("transformers"):
        from transformers import AutoModelForCausalLM
        folder = tempfile.mkdtemp()                 # stays: TRL reads its reference from there
        gpt.save_pretrained(folder)
        peer = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    return gpt, peer


def a_batch(n=64):
    """ids and labels (n, T) of the four tasks in `small`'s shares, as stage 1 sees them, from phantoms and random codes."""
    records, rng = Phantoms("bench", n), np.random.default_rng(0)
    vocab = Vocabulary.train([r.text for r in records] * 9, 512)
    studies = [Study(rng.integers(512, size=64), r.text, r.questions, (("heart", rng.integers(512, size=64)),), None)
               for r in records]
    return make_batch(studies, SFTConfig(batch_size=n), vocab, 0)


def a_batch_of_pairs(n=16):
    """ids and labels (2, n, T): n images, each with its report and with another's."""
    records, rng = Phantoms("bench", n + 1), np.random.default_rng(0)
    vocab = Vocabulary.train([r.text for r in records] * 9, 512)
    codes = rng.integers(512, size=(n, 64))
    examples = [(vocab.report_prompt(codes[i]), vocab.text_response(records[i + k].text)) for k in (0, 1) for i in range(n)]
    ids, labels = collate(examples, vocab.pad)
    return ids.unflatten(0, (2, n)), labels.unflatten(0, (2, n))


# Each function below returns {name: (function, how many things it makes)}; ours first, the peer's after it.


def both(step_of, gpt, n):
    """A step of ours, plain and with --compile where there is a compiler."""
    compiled = copy.deepcopy(gpt)
    work = {"ours": (step_of(gpt), n)}
    try:
        train_mode(compiled, SFTConfig(compile=True))
        work["--compile"] = step_of(compiled), n
    except UserError as why:
        print(why)
    return work


def stage1(autocast):
    """One step of instruction tuning, 64 sequences, also with --compile; transformers: the same padded batch, the whole head,
    AdamW."""
    gpt, peer = gpt_of()
    ids, labels = a_batch()
    ids, tokens = ids.clamp(max=1316), int((labels != -100).sum())
    real = int(sum((row != -100).nonzero().max() + 1 for row in labels))                  # tokens that are no padding

    def step_of(model):
        optimizers = make_optimizers(model, 1e-3, 1e-3, 0.1, autocast)

        def step():
            with autocast():
                loss = -per_token_logps(model, ids, labels).sum() / tokens
            take_step(loss, model.parameters(), optimizers, clip=1.0)
        return step

    work = both(step_of, gpt, real)
    if peer:
        optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3)
        their_ids, their_labels = ids.to(DEVICE), labels.to(DEVICE)

        def theirs():
            with autocast():
                loss = peer(their_ids, attention_mask=torch.ones_like(their_ids), labels=their_labels).loss
            take_step(loss, peer.parameters(), [optimizer], clip=1.0)

        work["transformers"] = (theirs, real)
    return work


def sampling(n):
    """n images of 64 codes after prompts of about 30 tokens, temperature 1."""
    def work_of(autocast):
        gpt, peer = gpt_of()
        prompts = [list(range(5 + i % 7, 30 + i % 11)) for i in range(n)]

        def ours():
            with autocast():
                generate(gpt.eval(), prompts, 64, (805, 1317))

        work = {"ours": (ours, n)}
        if peer:
            T = max(map(len, prompts))
            ids = torch.tensor([[804] * (T - len(p)) + p for p in prompts], device=DEVICE)

            def theirs():
                with autocast():
                    peer.eval().generate(ids, attention_mask=(ids != 804).long(), max_new_tokens=64, min_new_tokens=64,
                                         do_sample=True, top_k=0)

            work["transformers"] = (theirs, n)
        return work
    return work_of


def stage2(autocast, once=True):
    """One step of DPO on 16 pairs of reports, the reference computed before (once) or at each step, also with --compile; TRL
    does it each step."""
    gpt, _ = gpt_of()
    cfg = DPOConfig(objective="dpo")
    sequences, (ids, labels) = ("text_chosen", "text_rejected"), a_batch_of_pairs()
    families = [[i, 16 + i] for i in range(16)]                     # both reports of an image, which is read once
    parts = split_batch(ids.flatten(0, 1), labels.flatten(0, 1), DEVICE, families)
    keep, every = {"text": torch.ones(16, device=DEVICE)}, torch.arange(16, device=DEVICE)
    with torch.no_grad():
        reference = sum_logps(gpt, ids, labels, parts, sequences)

    def step_of(model):
        optimizers = make_optimizers(model, 1e-4, 1e-4, 0.0, autocast)

        def step():
            with autocast():
                if not once:
                    with torch.no_grad():
                        sum_logps(model, ids, labels, parts, sequences)
                policy = sum_logps(model, ids, labels, parts, sequences)
            take_step(objective_loss(log_ratios(policy, reference, every), keep, cfg)[0], model.parameters(), optimizers, clip=1.0)
        return step

    with autocast():
        bf16 = torch.is_autocast_enabled(DEVICE)
    return both(step_of, gpt, 16) | trl_step(ids, labels, bf16)


def trl_step(ids, labels, bf16):
    """TRL's DPOTrainer on the same sequences, its default (reference at each step) and with a precomputed reference."""
    if not (have("trl") and have("datasets")):
        return {}
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig as TRLConfig, DPOTrainer
    vocabulary = {f"t{i}": i for i in range(1317)}
    words = Tokenizer(models.WordLevel(vocabulary, "t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t804", eos_token="t800")
    text = lambda row: " ".join(f"t{i}" for i in row)
    rows = []
    for i in range(16):
        start = int((labels[0, i] != -100).nonzero()[0])
        ends = [int((labels[s, i] != -100).nonzero()[-1]) + 1 for s in (0, 1)]
        rows.append({"prompt": text(ids[0, i, :start].tolist()) + " ", "chosen": text(ids[0, i, start:ends[0]].tolist()),
                     "rejected": text(ids[1, i, start:max(start + 1, ends[1])].tolist())})
    work = {}
    for name, ahead in (("TRL default", False), ("TRL precomputed", True)):
        folder = tempfile.mkdtemp()
        peer = gpt_of()[1]
        config = TRLConfig(folder, per_device_train_batch_size=16, max_steps=1, report_to=[], bf16=bf16, logging_steps=1000,
                           save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
                           precompute_ref_log_probs=ahead, use_cpu=DEVICE == "cpu", max_length=256)
        trainer = DPOTrainer(peer, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.create_optimizer()

        def step(trainer=trainer, batch=batch):
            trainer.model.train()
            trainer.optimizer.zero_grad()
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()

        work[name] = (step, 16)
    return work


def quantizer(autocast):
    """Nearest codes of 256 images of 8x8 vectors, forward and backward."""
    ours = VectorQuantizer(512, 8).to(DEVICE)
    z = torch.randn(256, 8, 8, 8, device=DEVICE, requires_grad=True)

    def step():
        z_q, _, codebook_loss, commitment_loss = ours(z)
        (z_q.sum() + codebook_loss + commitment_loss).backward()

    work = {"ours": (step, 256)}
    if have("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize
        theirs = VectorQuantize(dim=8, codebook_size=512, use_cosine_sim=True, accept_image_fmap=True).to(DEVICE)

        def their_step():
            z_q, _, loss = theirs(z)
            (z_q.sum() + loss.sum()).backward()

        work["vector-quantize-pytorch"] = (their_step, 256)
    return work


def tokenizer_step(autocast):
    """Reconstruction of 32 images, forward and backward: most of a step of vqgan.py."""
    vqgan = VQGAN(VQGANConfig()).to(DEVICE, memory_format=torch.channels_last)
    x = torch.rand(32, 1, 64, 64, device=DEVICE).to(memory_format=torch.channels_last)

    def step():
        with autocast():
            x_rec, _, codebook_loss, commitment_loss, _ = vqgan(x)
            loss = F.mse_loss(x_rec.float(), x) + codebook_loss + commitment_loss
        loss.backward()

    return {"ours": (step, 32)}


def drawing(autocast):
    """Phantoms drawn, with masks, report and questions."""
    records = Phantoms("bench", 200)
    return {"ours": (lambda: list(records), 200)}


def encoding(autocast):
    """Records to Studies: each image and up to two masks through the tokenizer."""
    vqgan, records = VQGAN(VQGANConfig()).to(DEVICE).eval(), list(Phantoms("bench", 128))
    return {"ours": (lambda: encode_records(records, range(128), vqgan, 0, autocast), 128)}


def reports(autocast):
    """64 reports after an image each, at most 40 tokens."""
    gpt, _ = gpt_of()
    prompts = [list(range(805, 869)) + [3, 4, 5] for _ in range(64)]
    prompts = [[*p, i] for i, p in enumerate(prompts)]
    return {"ours": (lambda: generate(gpt.eval(), prompts, 40, (0, 801), 800), 64)}


def loading(autocast):
    """A saved GPT read from disk."""
    folder = tempfile.mkdtemp()
    gpt_of()[0].save_pretrained(folder)
    return {"ours": (lambda: GPT.from_pretrained(folder), 1)}


def muon(autocast):
    """One step of Muon over the 28 matrices of `small`; the peer is torch.optim.Muon."""
    gpt, _ = gpt_of()
    inner = [p for name, p in gpt.named_parameters() if p.dim() == 2 and ".layers." in name]
    for p in inner:
        p.grad = torch.randn_like(p)
    ours, theirs = make_optimizers(gpt, 1e-3, 1e-3, 0.1, autocast)[0], torch.optim.Muon(inner, 1e-3)
    return {"ours": (ours.step, 1), "torch.optim.Muon": (theirs.step, 1)}


def growth(length, vocab_size, rows=4):
    """Seconds of one forward and backward pass over `rows` images of `length` codes, half of them response."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size)).to(DEVICE)
    ids = torch.randint(vocab_size, (rows, length), device=DEVICE)
    labels = ids.masked_fill(torch.arange(length, device=DEVICE) < length // 2, -100)
    start = time.perf_counter()
    per_token_logps(gpt, ids, labels).sum().backward()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


WORK = {"stage1": (stage1, "tokens"), "sampling-1": (sampling(1), "images"), "sampling-16": (sampling(16), "images"),
        "sampling-64": (sampling(64), "images"), "stage2-once": (stage2, "pairs"),
        "stage2-each-step": (lambda autocast: stage2(autocast, once=False), "pairs"), "quantizer": (quantizer, "images"),
        "muon": (muon, "steps"), "tokenizer": (tokenizer_step, "images"), "drawing": (drawing, "phantoms"),
        "encoding": (encoding, "studies"), "reports": (reports, "reports"), "loading": (loading, "models")}


def run_growth():
    """How time and memory grow: each case in a process of its own, so that peak memory is its own."""
    for length, vocab_size in ((64, 1000), (256, 1000), (1024, 1000), (4096, 1000), (256, 20_000), (256, 150_000)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            took, peak = pool.apply(growth, (length, vocab_size))
        print(f"4 rows of {length:5d} tokens, vocabulary {vocab_size:7d}: {took:7.2f} s, peak {peak:5.2f} GB", flush=True)


def main():
    """The rows named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join([*WORK, "growth"]))
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of the GPT: the preset small, or about so many parameters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    SHAPE.update(SHAPES[args.shape])
    rows = []
    for name in args.what or WORK:
        if name == "growth":
            run_growth()
            continue
        for dtype in ("float32", "bfloat16"):
            _, autocast = init_run(DPOConfig(dtype=dtype, out=tempfile.mkdtemp()))
            native = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)
            if dtype == "bfloat16" and not native:
                continue
            make, unit = WORK[name]
            work = make(autocast)
            median = seconds({k: f for k, (f, _) in work.items()}, args.repeats)
            rate = {k: work[k][1] / t for k, t in median.items()}
            rows.append({"work": name, "dtype": dtype, "unit": unit, "per_second": rate})
            ratios = "".join(f"   {k} {r:,.1f}: x{rate['ours'] / r:.2f}" for k, r in rate.items() if k != "ours")
            print(f"{name:<17} {dtype:<9} {rate['ours']:>10,.1f} {unit} a second{ratios}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"peak memory of this process {peak:.2f} GB")
    if args.json:
        versions = {p: importlib.import_module(p).__version__ for p in ("transformers", "trl") if have(p)}
        Path(args.json).write_text(json.dumps({"shape": args.shape, "threads": torch.get_num_threads(), "torch": torch.__version__, "device": DEVICE,
                                               "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
