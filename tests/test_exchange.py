"""In and out: Qwen3 folders of others, LoRA's adapters, and what transformers and PEFT make of ours."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close

import dpo
import sample
import sft
from data import INSTRUCTIONS, Vocabulary
from model import (GPT, GPTConfig, LoRALinear, UserError, add_lora, generate, make_optimizers, merged_state, read_tensors,
                   save_adapter)
from sft import load_gpt
from tests.conftest import figures_of
from vqgan import VQGAN

TINY = ["--preset", "tiny", "--dtype", "float32"]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def lora(rank=2, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj")):
    return SimpleNamespace(lora_rank=rank, lora_alpha=alpha, lora_dropout=dropout, lora_targets=targets)


def write_tokenizer(folder, extra=(), last=257):
    """A byte-level tokenizer of 256 bytes and two merges, as somebody else might have left it: padded, cut."""
    ids = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "le"])} | {"ef": last}
    tokenizer = Tokenizer(models.BPE(ids, [("l", "e"), ("e", "f")]))
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(3)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *extra])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(params=["tied", "untied"])
def qwen3(request, tmp_path):
    """A random Qwen3 folder of other hands: two shards, grouped queries, three spare rows, rope_theta where version 5
    of the format has it. 259 tokens, 262 rows."""
    folder = tmp_path / "qwen3"
    folder.mkdir()
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=262, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=16, rope_theta=5000.0, tie_word_embeddings=request.param == "tied"))
    ours = ("rope_theta", "image_token_start", "vqgan_hash", "data")
    config = {k: v for k, v in model.config_json().items() if k not in ours}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (folder / "config.json").write_text(json.dumps(config))
    tensors, where = model.state_dict(), {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({k: tensors[k] for k in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    write_tokenizer(folder)
    return SimpleNamespace(folder=folder, model=model.eval())


# ---------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------


def test_shards_and_either_place_of_rope_theta(qwen3):
    assert_close(GPT.from_pretrained(qwen3.folder)(IDS), qwen3.model(IDS))
    config = json.loads((qwen3.folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (qwen3.folder / "config.json").write_text(json.dumps(config))
    assert_close(GPT.from_pretrained(qwen3.folder)(IDS), qwen3.model(IDS))


def test_growing_changes_no_old_logit_and_new_tokens_start_as_average_ones(qwen3):
    model = GPT.from_pretrained(qwen3.folder)
    old = {k: t.weight.clone() for k, t in model.tables().items()}
    model.grow(259, 300)
    assert_close(model(IDS)[..., :259], qwen3.model(IDS)[..., :259])
    assert len(old) == (1 if model.config.tie_word_embeddings else 2)
    for name, table in model.tables().items():
        new, mean, spread = table.weight[259:], old[name][:259].mean(dim=0), old[name][:259].std(dim=0)
        assert table.weight.shape == (300, 32) and len(new.unique(dim=0)) == 41
        assert ((new - mean).abs() < 0.5 * spread).all() and 0.08 < ((new - mean) / spread).std() < 0.12
    assert model.config.vocab_size == 300


def test_a_foreign_tokenizer_keeps_its_ids(qwen3):
    vocab, text = Vocabulary.extend(qwen3.folder, 16), "Left pleural effusion <image>."
    plain = Tokenizer.from_file(str(qwen3.folder / "tokenizer.json"))
    plain.no_padding(), plain.no_truncation()
    assert vocab.encode_text("Left effusion.") == plain.encode("Left effusion.").ids and 256 in vocab.encode_text("left")
    assert vocab.decode_text([*vocab.encode_text(text), vocab.eos, vocab.image_start]) == text
    assert (vocab.eos, vocab.eoi, vocab.boi, vocab.bos, vocab.pad) == (259, 260, 261, 262, 263)
    assert vocab.text_range == (0, 260) and vocab.image_range == (264, 280) and vocab.size == 280
    vocab.save(qwen3.folder)
    again = Vocabulary.load(qwen3.folder)
    assert (again.text_range, again.image_range) == (vocab.text_range, vocab.image_range)


@pytest.fixture
def out(trained, tmp_path):
    """A new --out with the trained image tokenizer in it."""
    (tmp_path / "out").mkdir()
    shutil.copytree(trained / "vqgan", tmp_path / "out" / "vqgan")
    return tmp_path / "out"


@pytest.mark.parametrize("qwen3, extra", [("tied", []), ("untied", ["--lora-rank", "2"]), ("tied", ["--lora-rank", "2", "--lora-merge"])],
                         indirect=["qwen3"], ids=["full", "lora", "merged"])
def test_a_foreign_model_learns_to_see_and_draw(qwen3, out, extra, capsys):
    """All three stages from a Qwen3 folder; with LoRA its own rows and matrices stay as they were."""
    sft.main([*TINY, "--out", str(out), "--init", str(qwen3.folder), "--steps", "30", *extra])
    written = {p.name for p in (out / "sft").iterdir()}
    assert ("adapter_model.safetensors" in written) == ("--lora-rank" in extra and "--lora-merge" not in extra)
    assert ("model.safetensors" in written) != ("adapter_model.safetensors" in written)
    model, vocab = load_gpt(out / "sft", VQGAN.from_pretrained(out / "vqgan"), "cpu")
    rows = figures_of(out / "sft.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] < 8 and vocab.size == model.config.vocab_size == 264 + 64
    changed = {k for k, v in GPT.from_pretrained(qwen3.folder).state_dict().items()
               if not torch.equal(v[:259], model.state_dict()[k][:259])}
    if extra:
        assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qv"}
        assert not torch.equal(model.model.embed_tokens.weight[259], model.model.embed_tokens.weight[260])
    else:
        assert len(changed) == len(model.state_dict())
    dpo.main([*TINY, "--out", str(out), "--steps", "2", *extra])
    sample.main([*TINY, "--out", str(out), "--n", "4", "--judge-steps", "2", "generate", "Left effusion."])
    assert (out / "generate.png").exists()


def test_ours_goes_on_with_its_own_tokenizer_and_vocabulary(trained, tmp_path):
    """--init out/sft brings the image tokenizer beside it; at learning rate 0 nothing changes, other data or not."""
    new = tmp_path / "new"
    sft.main([*TINY, "--out", str(new), "--init", str(trained / "sft"), "--steps", "2", "--lr", "0", "--muon-lr", "0",
              "--bias", "0"])
    ids = torch.tensor([[1, 5, 300]])
    assert_close(GPT.from_pretrained(new / "sft")(ids), GPT.from_pretrained(trained / "sft")(ids))
    assert (new / "sft/tokenizer.json").read_bytes() == (trained / "sft/tokenizer.json").read_bytes()
    assert GPT.from_pretrained(new / "sft").config.data != GPT.from_pretrained(trained / "sft").config.data


def test_a_run_never_starts_from_what_it_writes_over(trained):
    before = (trained / "sft/model.safetensors").read_bytes()
    for name in ("control/../sft", "dpo"):         # the second may be an adapter over the first
        with pytest.raises(UserError, match="would write over"):
            sft.main([*TINY, "--out", str(trained), "--init", str(trained / name), "--lora-rank", "2"])
    assert (trained / "sft/model.safetensors").read_bytes() == before


def spoil(change):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    return apply


@pytest.mark.parametrize("qwen3", ["tied"], indirect=True)
@pytest.mark.parametrize("damage, says", [
    (spoil({"model_type": "llama"}), "model_type 'llama', and only 'qwen3' is read here"),
    (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors.*bring back what is missing"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "not a whole model folder"),
    (spoil({"intermediate_size": 40}), "do not belong together"),
    (spoil({"num_hidden_layers": 3}), "do not belong together"),
    (lambda f: write_tokenizer(f, [f"<extra_{i}>" for i in range(4)]), "263 tokens, the embedding only 262 rows"),
    (lambda f: write_tokenizer(f, ["<image>"]), "uses <image> for itself"),
    (lambda f: write_tokenizer(f, last=300), "numbers its 259 tokens up to 300"),
    (spoil({"head_dim": None}), "describes no model"),
    (spoil({"rope_parameters": {"type": "yarn"}}), "'rope_type': 'yarn'"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
    (lambda f: shutil.rmtree(f), "does not exist"),
], ids=["llama", "shard", "index", "width", "depth", "too many ids", "our names", "gaps", "null", "yarn", "no tokenizer",
        "no folder"])
def test_folders_that_cannot_start_a_run_are_refused(qwen3, out, damage, says):
    damage(qwen3.folder)
    with pytest.raises(UserError, match=says):
        sft.main([*TINY, "--out", str(out), "--init", str(qwen3.folder), "--steps", "1"])


@pytest.mark.parametrize("qwen3", ["tied"], indirect=True)
def test_a_shard_never_leaves_its_folder(qwen3, tmp_path):
    index = qwen3.folder / "model.safetensors.index.json"
    (qwen3.folder / "model-00001-of-00002.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(UserError, match="not a whole model folder"):
        GPT.from_pretrained(qwen3.folder)


@pytest.mark.parametrize("qwen3", ["untied"], indirect=True)
def test_adapting_stops_and_goes_on_over_the_same_base_alone(qwen3, out, tmp_path, monkeypatch):
    flags = [*TINY, "--init", str(qwen3.folder), "--lora-rank", "2", "--lora-dropout", "0.2", "--steps", "8", "--val-every", "4",
             "--log-every", "1", "--out"]
    shutil.copytree(out, tmp_path / "broken")
    sft.main([*flags, str(out)])
    real = sft.get_lr
    with monkeypatch.context() as patch:
        patch.setattr(sft, "get_lr", lambda step, *rest, **options: real(step, *rest, **options) / (step != 6))
        with pytest.raises(ZeroDivisionError):
            sft.main([*flags, str(tmp_path / "broken")])
    saved = {p.name: p.read_bytes() for p in qwen3.folder.iterdir()}
    GPT(qwen3.model.config).save_pretrained(qwen3.folder)               # another model in the base's place
    (qwen3.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="was started from another"):
        sft.main([*flags, str(tmp_path / "broken"), "--resume"])
    (qwen3.folder / "model.safetensors").unlink()
    for name, data in saved.items():
        (qwen3.folder / name).write_bytes(data)
    sft.main([*flags, str(tmp_path / "broken"), "--resume"])
    assert len(figures_of(out / "sft.jsonl")) == 8
    tail = lambda folder: [r["loss"] for r in figures_of(folder / "sft.jsonl")[4:]]
    assert tail(out) == tail(tmp_path / "broken")
    a, b = (read_tensors(f / "sft/adapter_model.safetensors") for f in (out, tmp_path / "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------


def adapted(model, **options):
    """The model with adapters that do something."""
    cfg = lora(**options)
    add_lora(model, cfg, "base")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    return cfg


def test_adapters_start_as_nothing_and_train_alone(gpt):
    before, frozen = gpt(IDS), {k: v.clone() for k, v in gpt.state_dict().items()}
    add_lora(gpt, lora(), "base")
    assert torch.equal(gpt(IDS), before)
    trained = {k for k, p in gpt.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"}
    optimizer, = make_optimizers(gpt, 0.1, 0.1, 0.1)            # AdamW alone: thin matrices are none of Muon's
    gpt(IDS).square().mean().backward()
    optimizer.step()
    assert not torch.equal(gpt(IDS), before)
    after = {k.replace(".linear", ""): v for k, v in gpt.state_dict().items() if ".lora_" not in k}
    assert all(torch.equal(after[k], v) for k, v in frozen.items())


def test_the_adapter_is_w_plus_alpha_over_r_times_b_a():
    linear = torch.nn.Linear(3, 2, bias=False)
    layer, x = LoRALinear(linear, rank=2, alpha=6.0, dropout=0.0), torch.randn(4, 3)
    torch.nn.init.normal_(layer.lora_B.weight)
    assert_close(layer(x), x @ (linear.weight + 3 * layer.lora_B.weight @ layer.lora_A.weight).T)


def test_merged_equals_unmerged(gpt, tiny):
    adapted(gpt, targets=("q_proj", "o_proj", "down_proj"))
    plain = GPT(tiny).eval()
    plain.load_state_dict(merged_state(gpt))
    assert_close(plain(IDS), gpt(IDS), atol=1e-5, rtol=1e-5)


def test_dropout_is_for_training_alone(gpt):
    adapted(gpt, dropout=0.5)
    gpt.eval()
    assert torch.equal(gpt(IDS), gpt(IDS))
    gpt.train()
    assert not torch.equal(gpt(IDS), gpt(IDS))


@pytest.mark.parametrize("options, says", [
    (dict(targets=("q_proj", "c_attn")), "c_attn: there is no such layer; there are: q_proj, k_proj, v_proj, o_proj, gate_proj"),
    (dict(dropout=1.0), "lora-dropout 1.0 leaves nothing")])
def test_impossible_adapters_are_refused(gpt, options, says):
    with pytest.raises(UserError, match=says):
        add_lora(gpt, lora(**options), "base")


def test_lora_without_a_model_to_adapt_is_refused(out):
    with pytest.raises(UserError, match="name one with --init"):
        sft.main([*TINY, "--out", str(out), "--lora-rank", "2"])


def test_an_adapter_comes_back_and_knows_its_base(gpt, tmp_path):
    gpt.save_pretrained(tmp_path / "first" / "base")
    cfg = lora(targets=("q_proj", "up_proj"))
    add_lora(gpt, cfg, tmp_path / "first" / "base")
    for p in (p for p in gpt.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.5)
    save_adapter(tmp_path / "first" / "adapter", gpt, cfg)
    shutil.move(tmp_path / "first", tmp_path / "elsewhere")              # base and adapter were moved together
    again = GPT.from_pretrained(tmp_path / "elsewhere" / "adapter")
    assert_close(again(IDS), gpt(IDS), atol=1e-5, rtol=1e-5)
    shutil.copytree(tmp_path / "elsewhere/adapter", tmp_path / "alone/base")     # its base's name, and no base beside it
    with pytest.raises(UserError, match="first/base, which is gone or another model now"):
        GPT.from_pretrained(tmp_path / "alone/base")
    torch.nn.init.ones_(again.model.norm.weight)
    again.save_pretrained(tmp_path / "elsewhere" / "base")
    with pytest.raises(UserError, match="gone or another model now"):
        GPT.from_pretrained(tmp_path / "elsewhere" / "adapter")
    (tmp_path / "elsewhere/adapter/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds no adapter that was written here"):
        GPT.from_pretrained(tmp_path / "elsewhere" / "adapter")


def test_stage_two_with_lora_stops_and_goes_on(trained, tmp_path, monkeypatch):
    """Adapters alone are saved, the SFT model under them is untouched, and a stopped run ends as an unbroken one."""
    flags = [*TINY, "--lora-rank", "2", "--lora-dropout", "0.2", "--save-every", "4", "--steps", "8", "--log-every", "1", "--out"]
    for name in ("whole", "broken"):
        shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("dpo*", "control*"))
    dpo.main([*flags, str(tmp_path / "whole")])

    class Stop(Exception):
        pass

    real = dpo.make_rehearsal

    def stop(studies, cfg, vocab, step, device):
        if step == 6:
            raise Stop
        return real(studies, cfg, vocab, step, device)
    monkeypatch.setattr(dpo, "make_rehearsal", stop)
    with pytest.raises(Stop):
        dpo.main([*flags, str(tmp_path / "broken")])
    monkeypatch.setattr(dpo, "make_rehearsal", real)
    dpo.main([*flags, str(tmp_path / "broken"), "--resume"])
    whole, broken = (tmp_path / n / "dpo" for n in ("whole", "broken"))
    assert figures_of(whole.parent / "dpo.jsonl") == figures_of(broken.parent / "dpo.jsonl")
    a, b = (read_tensors(f / "adapter_model.safetensors") for f in (whole, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not (whole / "model.safetensors").exists()
    state = (whole / "state.safetensors").stat().st_size
    assert state < 0.7 * (trained / "dpo/state.safetensors").stat().st_size        # what is frozen is not saved again


# ---------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------


def prompts_of(vocab, codes):
    """One prompt of each task."""
    return {"report": vocab.understand(codes, INSTRUCTIONS["report"][0]), "ask": vocab.understand(codes, "Is the heart large?"),
            "segment": vocab.segment(codes, "left lung"), "generate": vocab.draw("Draw this: Left effusion.")}


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_transformers_reads_our_folders(trained, name):
    """Equal ids for a prompt that is text to anyone, equal logits, the same greedy words."""
    transformers = pytest.importorskip("transformers")
    ours, vocab = load_gpt(trained / name, VQGAN.from_pretrained(trained / "vqgan"), "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / name)
    for task, ids in prompts_of(vocab, list(range(16))).items():
        text = vocab.tokenizer.decode(ids, skip_special_tokens=False)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, task
        given = torch.tensor([ids])
        assert_close(theirs(given).logits, ours(given), atol=1e-4, rtol=0)
        greedy = theirs.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False,
                                 eos_token_id=vocab.eos, pad_token_id=vocab.pad)[0, len(ids):].tolist()
        greedy = greedy[:greedy.index(vocab.eos)] if vocab.eos in greedy else greedy
        assert generate(ours, [ids], 24, (0, vocab.size), vocab.eos, temperature=0) == [greedy], task


def test_peft_reads_our_adapters(qwen3, out):
    """Also where the vocabulary grew, once the base has as many rows."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sft.main([*TINY, "--out", str(out), "--init", str(qwen3.folder), "--steps", "20", "--lora-rank", "2"])
    base = transformers.AutoModelForCausalLM.from_pretrained(qwen3.folder)
    base.resize_token_embeddings(GPT.from_pretrained(out / "sft").config.vocab_size, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, out / "sft").eval()
    ids = torch.tensor([[262, 261, 270, 280, 260, 65, 66, 257, 259]])
    assert_close(theirs(ids).logits, GPT.from_pretrained(out / "sft")(ids), atol=1e-4, rtol=0)


def test_adapter_files_have_pefts_names(qwen3, out):
    """The names that PEFT 0.21 writes for the same adapters and new rows."""
    sft.main([*TINY, "--out", str(out), "--init", str(qwen3.folder), "--steps", "1", "--lora-rank", "2"])
    with safe_open(out / "sft/adapter_model.safetensors", "pt") as f:
        names = set(f.keys())
    tables = ["model.embed_tokens"] + ["lm_head"] * (not qwen3.model.config.tie_word_embeddings)
    assert names == {f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"} \
        | {f"base_model.model.{t}.token_adapter.trainable_tokens_delta" for t in tables}
    config = json.loads((out / "sft/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (2, 16.0)
    assert set(config["trainable_token_indices"]) == {t.split(".")[-1] for t in tables}
