"""Reports scored as captions; and with these scores full fine-tuning against LoRA.

    python -m tests.captions OUT                        score what `python sample.py --out OUT` wrote in COCO's format
    python -m tests.captions --base out                 adapt out/sft to phantoms of other patients, without language bias
    python -m tests.captions --base out --data DIR      ... to a folder of images and captions
    ... --small out-small                               beside them a small model, out-small/sft, all of it adapted
    python -m tests.captions --table --results .github/results        the lab report's tables, from captioning.json

The comparison is that of a captioning study (IEEE ICMI 2025, document 11141312). LoRA needs something to adapt, so
every method starts from one model trained on phantoms (--base, its image tokenizer included; the small one from --small, which
has the same image tokenizer) and sees the same images and reports for the same number of steps; questions, masks and drawings
are left out. Each run is a process of its own,
so that its peak memory can be told. Runs that are there are not repeated. The methods take turns within a seed, so that
what else the machine does hits all of them."""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import sample
import sft
from model import LINEARS, UserError, folder_hash, init_run, read_log, read_tensors, run, write_text
from tests.compare import markdown, write_results
from vqgan import VQGAN

# ---------------------------------------------------------------------------------------------
# Caption metrics
# ---------------------------------------------------------------------------------------------


def caption_words(text):
    """The words and numbers of a text, lower case, as a list; punctuation is dropped."""
    return re.findall(r"\d+\.\d+|\w+", text.lower())


def ngrams(words, n):
    """How often each run of n words occurs."""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(candidates, references, weights):
    """BLEU-1..4 of a corpus, in [0, 1], not smoothed (Papineni et al., ACL 2002).

    n lists of words each; weights (R, n) say how often each record counts, R times over. Returns (R, 4)."""
    counts = np.array([[*((ngrams(c, n) & ngrams(r, n)).total() for n in range(1, 5)),
                        *(ngrams(c, n).total() for n in range(1, 5)), len(c), len(r)]
                       for c, r in zip(candidates, references)])
    matched, total, length, wanted = np.split(weights @ counts, (4, 8, 9), axis=1)    # (R, 4), (R, 4), (R, 1), (R, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.exp(np.minimum(0, 1 - wanted / length))     # 0 of empty candidates; nan where no record counts
        return brevity * np.exp(np.log(matched / np.maximum(total, 1)).cumsum(1) / np.arange(1, 5))


def rouge_l(candidate, reference, beta=1.2):
    """ROUGE-L of two lists of words, in [0, 1] (Lin, Text Summarization Branches Out, 2004).

    The longest common subsequence as F, recall beta times as important; beta = 1.2 as in the COCO caption
    code (arXiv:1504.00325), 1 for what is often called ROUGE-L F1."""
    common = [0] * (len(reference) + 1)            # with the first j words of the reference
    for word in candidate:
        before, common = common, [0]
        for j, other in enumerate(reference):
            common.append(before[j] + 1 if word == other else max(before[j + 1], common[j]))
    if common[-1] == 0:
        return 0.0
    precision, recall = common[-1] / len(candidate), common[-1] / len(reference)
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


# NLTK's list of words that the rules would stem wrongly
IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "innings": "inning", "outings": "outing",
             "cannings": "canning", "sky": "sky", "news": "news", "inning": "inning", "outing": "outing",
             "canning": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"}
SUFFIXES = (   # step by step: the least measure of what is left, "suffix:replacement ..." (suffixes are patterns)
    (1, "alli:al"),
    (1, "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble entli:ent eli:e ousli:ous ization:ize "
        "ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble fulli:ful "
        "(?<=l)ogi:og"),
    (1, "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"),
    (2, "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: (?<=[st])ion: ou: ism: ate: iti: ous: ive: ize:"))


def sounds(word):
    """c for each consonant and v for each vowel: cvccvc of "system"; a y after a consonant is a vowel."""
    result = ""
    for letter in word:
        result += "v" if letter in "aeiou" or letter == "y" and result.endswith("c") else "c"
    return result


def measure(stem):
    """How often consonants follow vowels in what a suffix would leave: about its syllables."""
    return sounds(stem).count("vc")


def is_short(stem):
    """Whether a stem ends like "hop", which had an e if it comes from "hoping"."""
    return sounds(stem).endswith("cvc") and stem[-1] not in "wxy" or sounds(stem) == "vc"


def replace_suffix(word, least, rules):
    """Apply the first rule whose suffix the word has, if what is left has at least this measure."""
    for suffix, new in (rule.split(":") for rule in rules.split()):
        if found := re.search(suffix + "$", word):
            stem = word[:found.start()]
            return stem + new if measure(stem) >= least else word
    return word


@functools.cache
def porter_stem(word):
    """What is left of a lower-case word without its endings (Porter, Program 14(3), 1980, as NLTK varies it)."""
    if len(word) <= 2 or word in IRREGULAR:
        return IRREGULAR.get(word, word)
    word = replace_suffix(word, 0, "(?<=^.)ies:ie sses:ss ies:i ss:ss s:")
    if word.endswith(("ied", "eed")):
        word = replace_suffix(replace_suffix(word, 0, "(?<=^.)ied:ie ied:i"), 1, "eed:ee")
    elif (bare := re.sub("(ed|ing)$", "", word)) != word and "v" in sounds(bare):
        word = bare
        if word.endswith(("at", "bl", "iz")) or measure(word) == 1 and is_short(word):
            word += "e"
        elif sounds(word).endswith("c") and word[-1] == word[-2:-1] and word[-1] not in "lsz":
            word = word[:-1]
    if word.endswith("y") and len(word) > 2 and sounds(word)[-2] == "c":
        word = word[:-1] + "i"
    for least, rules in SUFFIXES:
        word = replace_suffix(word, least, rules)
    word = replace_suffix(word, 1 + is_short(word[:-1]), "e:")
    return replace_suffix(word, 2, "(?<=l)l:")


def meteor(candidate, reference):
    """METEOR of two lists of words, in [0, 1), with alpha 0.9, beta 3, gamma 0.5 (Banerjee & Lavie, ACL 2005; NLTK).

    Equal words are aligned, then equal Porter stems. WordNet's synonyms are left out, and so are the paraphrases and
    function-word weights of METEOR 1.5, whose figures are others."""
    aligned = {}                                   # position in the candidate -> in the reference
    for form in (str, porter_stem):
        free = {}
        for j in sorted(set(range(len(reference))) - set(aligned.values())):
            free.setdefault(form(reference[j]), []).append(j)
        for i in reversed(range(len(candidate))):
            if i not in aligned and free.get(form(candidate[i])):
                aligned[i] = free[form(candidate[i])].pop()
    if not aligned:
        return 0.0
    chunks = sum(aligned.get(i - 1) != j - 1 for i, j in aligned.items())
    precision, recall = len(aligned) / len(candidate), len(aligned) / len(reference)
    return precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 * (chunks / len(aligned)) ** 3)


def cider(candidates, references, sigma=6.0):
    """CIDEr of each of n lists of words, in [0, 10], as the COCO caption code has it: CIDEr-D (arXiv:1411.5726).

    Cosines of clipped n-gram counts, n = 1..4, weighted by how rare the n-gram is among the references; sigma
    says how many words more or fewer are forgiven. Returns (n,)."""
    scores = np.zeros(len(candidates))
    for n in range(1, 5):
        seen = Counter(gram for r in references for gram in ngrams(r, n))            # in how many references
        weigh = lambda words: {gram: count * math.log(len(references) / max(1, seen[gram]))
                               for gram, count in ngrams(words, n).items()}
        for i, (c, r) in enumerate(zip(candidates, references)):
            a, b = weigh(c), weigh(r)
            norm = math.hypot(*a.values()) * math.hypot(*b.values())
            if norm > 0:
                cosine = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / norm
                scores[i] += 10 / 4 * cosine * math.exp(-(len(c) - len(r)) ** 2 / (2 * sigma ** 2))
    return scores


def score_captions(texts, references, bootstrap):
    """{metric: Metric} of n texts, each against its reference; where that is empty the text is left out.

    BLEU is the corpus's, the others are means; CIDEr's n-grams are as rare in a resample as in the whole."""
    have = np.array([bool(r) for r in references])
    pairs = [(caption_words(t), caption_words(r)) for t, r in zip(texts, references) if r]
    if not pairs:
        return {}
    whole = bleu(*zip(*pairs), np.vstack([np.ones(len(pairs)), bootstrap.weights[:, have]]))
    result = {f"bleu{n + 1}": sample.Metric(float(whole[0, n]), whole[1:, n], len(pairs)) for n in range(4)}
    for name, scores in (("rouge_l", [rouge_l(*pair) for pair in pairs]), ("meteor", [meteor(*pair) for pair in pairs]),
                         ("cider", cider(*zip(*pairs)))):
        column = np.zeros(len(references))
        column[have] = scores
        result[name] = bootstrap(column, have)
    return result


# ---------------------------------------------------------------------------------------------
# The captions of a folder
# ---------------------------------------------------------------------------------------------


CAPTIONS = {"bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L",
            "meteor": "METEOR", "cider": "CIDEr"}
RESAMPLES = 1000


def read_captions(path, out):
    """{image_id: caption} of a file in COCO's format, annotations or results."""
    try:
        found = json.loads(path.read_text())
        captions = {row["image_id"]: row["caption"] for row in (found["annotations"] if isinstance(found, dict) else found)}
    except (OSError, ValueError, KeyError, TypeError):
        captions = {}
    if not captions:
        raise UserError(f"{path} is missing or holds no captions; run `python sample.py --out {out}` first, on data with "
                        "reports")
    return captions


def score_folder(out):
    """{model: {metric: Metric}} of the captions that sample.py wrote, all models on the same resamples."""
    path, end = out / "references.json", ".captions.json"
    references = read_captions(path, out)
    files = {f.name.removesuffix(end): f for f in (out / "eval").glob(f"*{end}")} or {"captions": out / "captions.json"}
    bootstrap, scores = sample.Bootstrap(len(references), RESAMPLES), {}
    for name in sorted(files, key=lambda n: ({"sft": 0, "control": 1}.get(n, 2), n)):
        captions = read_captions(files[name], out)
        if captions.keys() != references.keys():
            raise UserError(f"{files[name]} tells of other images than {path}; run `python sample.py --out {out}` first, or "
                            "remove the file if its model is gone")
        scores[name] = score_captions([captions[i] for i in references], list(references.values()), bootstrap)
    return scores


def score_table(scores):
    """Markdown: a metric a row, a model a column; the value and, in brackets, its 95 % bootstrap interval."""
    show = lambda m: f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"
    return markdown(["metric", *scores], [[title, *(show(sample.summarize(found[metric])) for found in scores.values())]
                                          for metric, title in CAPTIONS.items()])


# ---------------------------------------------------------------------------------------------
# Full fine-tuning against LoRA
# ---------------------------------------------------------------------------------------------


METHODS = {"full": ["--lr", "2e-3", "--muon-lr", "1e-2"], "LoRA q,v": ["--lora-rank", "8", "--lr", "4e-3"],
           "LoRA all": ["--lora-rank", "8", "--lr", "4e-3", "--lora-targets", *LINEARS]}
SMALL = "small, full"
REPORTS = ["--report-share", "1", "--generate-share", "0", "--ask-share", "0", "--segment-share", "0",
           "--batch-size", "32"]
ROWS = {k: v for k, v in CAPTIONS.items() if k not in ("bleu2", "bleu3")} | {
    "f1": "finding F1", "chair_i": "CHAIR_i ↓", "modality": "modality right", "body_part": "body part right",
    "trained": "trained parameters", "memory": "peak memory of the process, MB", "step": "seconds a step"}


def adapt(folder, flags):
    """Run sft.py in a process of its own; what it cost: {trained, memory, step}."""
    process = subprocess.Popen([sys.executable, sft.__file__, "--out", folder, *flags], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{folder}: sft.py stopped with status {os.waitstatus_to_exitcode(status)}, its message stands "
                        "above")
    written = next(f for n in ("adapter_model", "model") if (f := folder / "sft" / f"{n}.safetensors").exists())
    row = read_log(folder / "sft.jsonl")[-2]                 # the last one comes after the validation
    return {"trained": sum(t.numel() for t in read_tensors(written).values()), "memory": usage.ru_maxrss / 1024,
            "step": row["seconds"] / (row["step"] + 1)}


def adapt_all(cfg, shape):
    """Train every method with every seed, unless it is there already: {folder: (method, what it cost)}."""
    costs, methods = {}, METHODS | ({SMALL: METHODS["full"]} if cfg.small else {})
    for seed in cfg.seeds:
        for method, own in methods.items():
            base = (cfg.small if method == SMALL else cfg.base) / "sft"
            folder = cfg.out / f"{name_of(cfg)} {method} {seed}".replace(", ", "-").replace(" ", "-")
            flags = ["--init", base, "--preset", cfg.preset, "--data", cfg.data, "--bias", 0, *shape,
                     *REPORTS, *own, "--records", cfg.records, "--steps", cfg.steps, "--val-every", cfg.steps,
                     "--seed", 100 + seed]                 # phantoms are drawn from the seed: other patients than the base's
            path, recipe = folder / "cost.json", {"base": folder_hash(base), "flags": list(map(str, flags))}
            kept = json.loads(path.read_text()) if path.exists() else {}
            if any(kept.get(k) != v for k, v in recipe.items()):
                kept = adapt(folder, recipe["flags"]) | recipe
                write_text(path, json.dumps(kept) + "\n")
            costs[folder] = method, kept
    return costs


def score_model(folder, bench, vqgan, device, autocast):
    """What the model of a folder writes of the test images, greedily: {metric: value}."""
    model, vocab = sft.load_gpt(folder, vqgan, device)
    with autocast():
        found, texts = sample.evaluate_reports(model, vocab, bench)
    found = {k.removeprefix("report/greedy/"): metric for k, metric in found.items()}
    found |= score_captions(texts, [r.text for r in bench.records], bench.bootstrap)
    return {k: found[k].value for k in ROWS if k in found}


def name_of(cfg):
    """The folder's name, or "phantoms"."""
    return Path(cfg.data).resolve().name if cfg.data else "phantoms"


def compare(cfg):
    """{method: {metric: [value, one a seed]}} on one data set; "before" is the base as it was."""
    bench_cfg = sample.SampleConfig(data=cfg.data, out=str(cfg.out), seed=7, bias=0.0, n=cfg.n, records=cfg.records,
                                    reader_steps=1)        # a reader of drawings, which there are none of
    device, autocast = init_run(bench_cfg)
    vqgan = VQGAN.from_pretrained(cfg.base / "vqgan", device)
    bench_cfg.image_size, bench_cfg.channels = vqgan.config.image_size, vqgan.config.channels
    # all training first: a child's peak memory starts at its parent's
    costs = adapt_all(cfg, ["--image-size", bench_cfg.image_size, "--channels", bench_cfg.channels])
    bench = sample.make_benchmark(bench_cfg, vqgan, device, autocast)
    before = {"before": cfg.base} | ({"small, before": cfg.small} if cfg.small else {})
    results = {name: {k: [v] for k, v in score_model(base / "sft", bench, vqgan, device, autocast).items()}
               for name, base in before.items()}
    for folder, (method, cost) in costs.items():
        for metric, value in (cost | score_model(folder / "sft", bench, vqgan, device, autocast)).items():
            if metric in ROWS:
                results.setdefault(method, {}).setdefault(metric, []).append(round(value, 5))
    return results


def table(results):
    """Markdown: a metric a row, a method a column; the mean over seeds and, in brackets, the least and the greatest."""
    rows = []
    for metric, title in ROWS.items():
        show = lambda v: f"{v:,.0f}" if metric in ("trained", "memory") else f"{v:.3f}"
        rows.append([title])
        for values in (found.get(metric) for found in results.values()):
            span = f" [{show(min(values))}, {show(max(values))}]" if values and len(set(values)) > 1 else ""
            rows[-1].append(show(np.mean(values)) + span if values else "-")
    return markdown(["metric", *results], rows)


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("folder", metavar="OUT", type=Path, nargs="?", help="folder whose captions are scored")
    task.add_argument("--base", type=Path, help="folder whose vqgan and sft are adapted")
    task.add_argument("--table", action="store_true", help="train nothing, show what the results hold")
    parser.add_argument("--small", type=Path, help="folder of a smaller sft with the image tokenizer of --base, to be adapted as a whole")
    parser.add_argument("--data", default="", help="folder of images and captions; empty: phantoms of other patients")
    parser.add_argument("--out", type=Path, default=Path("out-captioning"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of captioning.json (default: --out)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default: 200)")
    parser.add_argument("--records", type=int, default=4000, help="phantoms: training records (default: 4000)")
    parser.add_argument("--n", type=int, default=600, help="test records (default: 600)")
    parser.add_argument("--preset", default="small", choices=("tiny", "small"), help="tiny: seconds, for tests")
    cfg = parser.parse_args(argv)
    if cfg.folder:
        return print(score_table(score_folder(cfg.folder)))
    path = (cfg.results or cfg.out) / "captioning.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if cfg.base:
        results[name_of(cfg)] = compare(cfg)
        write_results(path, results)
    if not results:
        raise UserError(f"{path} holds no result yet; run `python -m tests.captions --base OUT` first, or name --results")
    for name, found in results.items():
        print(f"\n{name}\n\n{table(found)}")


if __name__ == "__main__":
    run(main)
