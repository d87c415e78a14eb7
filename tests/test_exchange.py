"""In and out: Qwen3 folders of others, LoRA's adapters, and what transformers and PEFT make of ours."""

import json
import shutil
from dataclasses import replace
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
from conftest import figures_of
from model import (GPT, Adapter, GPTConfig, LoRALinear, UserError, add_lora, folder_hash, generate, make_optimizers,
                   merged_state, read_tensors, save_tuned)
from sft import Vocabulary, extend_vocabulary, load_gpt
from vqgan import VQGAN

TINY = ["--preset", "tiny", "--dtype", "float32"]
SHORT = [*TINY, *"--records 32 --batch-size 8 --val-records 4".split()]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def lora(rank=2, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj"), merge=False):
    return SimpleNamespace(lora_rank=rank, lora_alpha=alpha, lora_dropout=dropout, lora_targets=targets, lora_merge=merge)


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
    """A random Qwen3 folder of other hands: two shards, grouped queries, rope_theta where version 5 of the format has it. 259
    tokens and 262 rows (untied: 459, more than our tokens need)."""
    folder = tmp_path / "qwen3"
    folder.mkdir()
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=262 if request.param == "tied" else 459, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=16, rope_theta=5000.0,
                          tie_word_embeddings=request.param == "tied"))
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


# ---- In ------------------------------------------------------------------------------------------


def test_shards_and_either_place_of_rope_theta(qwen3):
    assert_close(GPT.from_pretrained(qwen3.folder)(IDS), qwen3.model(IDS))
    config = json.loads((qwen3.folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (qwen3.folder / "config.json").write_text(json.dumps(config))
    assert_close(GPT.from_pretrained(qwen3.folder)(IDS), qwen3.model(IDS))


def test_growing_changes_no_old_logit_and_new_tokens_start_as_average_ones(qwen3):
    model = GPT.from_pretrained(qwen3.folder)
    old = {k: t.weight.clone() for k, t in model.tables().items()}
    model.grow(259, 500)
    assert_close(model(IDS)[..., :259], qwen3.model(IDS)[..., :259])
    assert len(old) == (1 if model.config.tie_word_embeddings else 2)
    for name, table in model.tables().items():
        new, mean, spread = table.weight[259:], old[name][:259].mean(dim=0), old[name][:259].std(dim=0)
        assert table.weight.shape == (500, 32) and len(new.unique(dim=0)) == 241
        assert ((new - mean).abs() < 0.5 * spread).all() and 0.08 < ((new - mean) / spread).std() < 0.12
    assert model.config.vocab_size == 500


def test_a_foreign_tokenizer_keeps_its_ids(qwen3):
    vocab, text = extend_vocabulary(qwen3.folder, 16), "Left pleural effusion <image>."
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
def begun(trained, tmp_path):
    """A new --out with the trained image tokenizer in it alone."""
    shutil.copytree(trained / "vqgan", tmp_path / "begun" / "vqgan")
    return tmp_path / "begun"


@pytest.mark.parametrize("qwen3, extra", [
    ("tied", []), ("untied", ["--lora-rank", "2"]), ("tied", ["--lora-rank", "2", "--lora-merge"])],
    indirect=["qwen3"], ids=["full", "lora", "merged"])
def test_a_foreign_model_learns_to_see_and_draw(qwen3, begun, extra):
    """All three stages from a Qwen3 folder; with LoRA its own rows and matrices stay as they were."""
    sft.main([*SHORT, "--out", str(begun), "--init", str(qwen3.folder), "--steps", "16", "--val-every", "16", *extra])
    written = {p.name for p in (begun / "sft").iterdir()}
    assert ("adapter_model.safetensors" in written) == ("--lora-rank" in extra and "--lora-merge" not in extra)
    assert ("model.safetensors" in written) != ("adapter_model.safetensors" in written)
    vqgan = VQGAN.from_pretrained(begun / "vqgan")
    model, vocab = load_gpt(begun / "sft", vqgan, "cpu")
    rows = figures_of(begun / "sft.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] < 8
    assert vocab.size == 264 + vqgan.config.codebook_size
    assert model.config.vocab_size == max(vocab.size, qwen3.model.config.vocab_size) == len(model.model.embed_tokens.weight)
    changed = {k for k, v in GPT.from_pretrained(qwen3.folder).state_dict().items()
               if not torch.equal(v[:259], model.state_dict()[k][:259])}
    if extra:
        assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qv"}
        assert not torch.equal(model.model.embed_tokens.weight[259], model.model.embed_tokens.weight[260])
    else:
        assert len(changed) == len(model.state_dict())
    dpo.main([*TINY, "--out", str(begun), "--records", "32", "--pairs", "8", "--steps", "2", *extra])
    sample.main([*TINY, "--out", str(begun), "--count", "1", "generate", "Left effusion."])
    assert (begun / "generate.png").exists()


def test_ours_goes_on_with_its_own_tokenizer_and_vocabulary(trained, tmp_path):
    """--init out/sft brings the image tokenizer beside it; at learning rate 0 nothing changes, other data or not."""
    new = tmp_path / "new"
    sft.main([*SHORT, "--out", str(new), "--init", str(trained / "sft"), "--steps", "2", "--lr", "0", "--muon-lr", "0",
              "--bias", "0"])
    ids = torch.tensor([[1, 5, 300]])
    assert_close(GPT.from_pretrained(new / "sft")(ids), GPT.from_pretrained(trained / "sft")(ids))
    assert (new / "sft/tokenizer.json").read_bytes() == (trained / "sft/tokenizer.json").read_bytes()
    assert GPT.from_pretrained(new / "sft").config.data != GPT.from_pretrained(trained / "sft").config.data


def test_a_run_never_starts_from_what_it_writes_over(out):
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for init in (out / "sft", out.parent / "elsewhere/../out/sft", out / "bidpo"):     # the last may be an adapter over sft
        with pytest.raises(UserError, match=f"--init {init} .*--out {out}"):
            sft.main([*TINY, "--out", str(out), "--init", str(init), "--lora-rank", "2"])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def spoil(change):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    return apply


@pytest.mark.parametrize("qwen3", ["tied"], indirect=True)
@pytest.mark.parametrize("damage, named", [
    (spoil({"model_type": "llama"}), "qwen3/config.json .*llama"),
    (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "qwen3 .*model-00002-of-00002.safetensors"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "qwen3 "),
    (spoil({"intermediate_size": 40}), "qwen3: "),
    (spoil({"num_hidden_layers": 3}), "qwen3: "),
    (lambda f: write_tokenizer(f, [f"<extra_{i}>" for i in range(4)]), "qwen3/tokenizer.json .*263 .*262 "),
    (lambda f: write_tokenizer(f, ["<image>"]), "qwen3/tokenizer.json .*<image>"),
    (lambda f: write_tokenizer(f, ["<img_0>"]), "qwen3/tokenizer.json .*<img_0>"),
    (lambda f: write_tokenizer(f, last=300), "qwen3/tokenizer.json .*259 .*300"),
    (lambda f: Tokenizer(models.BPE()).save(str(f / "tokenizer.json")), "qwen3/tokenizer.json .* 0 tokens"),
    (spoil({"head_dim": None}), "qwen3/config.json "),
    (spoil({"rope_parameters": {"type": "yarn"}}), "qwen3/config.json .*yarn"),
    (lambda f: (f / "tokenizer.json").unlink(), "qwen3/tokenizer.json "),
    (lambda f: shutil.rmtree(f), "qwen3 "),
], ids=["llama", "shard", "index", "width", "depth", "too many ids", "our names", "our codes", "gaps", "empty", "null", "yarn", "no tokenizer",
        "no folder"])
def test_folders_that_cannot_start_a_run_are_refused(qwen3, begun, damage, named):
    damage(qwen3.folder)
    with pytest.raises(UserError, match=named):
        sft.main([*TINY, "--out", str(begun), "--init", str(qwen3.folder), "--steps", "1"])
    assert [p.name for p in begun.iterdir()] == ["vqgan"]


@pytest.mark.parametrize("qwen3", ["tied"], indirect=True)
def test_a_shard_never_leaves_its_folder(qwen3, tmp_path):
    index = qwen3.folder / "model.safetensors.index.json"
    (qwen3.folder / "model-00001-of-00002.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(UserError, match="qwen3 "):
        GPT.from_pretrained(qwen3.folder)


@pytest.mark.parametrize("qwen3", ["untied"], indirect=True)
def test_adapting_stops_and_goes_on_over_the_same_base_alone(qwen3, begun, tmp_path, monkeypatch):
    flags = [*SHORT, "--init", str(qwen3.folder), "--lora-rank", "2", "--lora-dropout", "0.2", "--steps", "4",
             "--val-every", "2", "--log-every", "1", "--out"]
    shutil.copytree(begun, tmp_path / "broken")
    sft.main([*flags, str(begun)])
    real = sft.get_lr
    with monkeypatch.context() as patch:
        patch.setattr(sft, "get_lr", lambda step, *rest, **options: real(step, *rest, **options) / (step != 3))
        with pytest.raises(ZeroDivisionError):
            sft.main([*flags, str(tmp_path / "broken")])
    saved = {p.name: p.read_bytes() for p in qwen3.folder.iterdir()}
    GPT(qwen3.model.config).save_pretrained(qwen3.folder)               # another model in the base's place
    (qwen3.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="--resume: .*broken/sft.partial was started from another --init"):
        sft.main([*flags, str(tmp_path / "broken"), "--resume"])
    (qwen3.folder / "model.safetensors").unlink()
    for name, data in saved.items():
        (qwen3.folder / name).write_bytes(data)
    sft.main([*flags, str(tmp_path / "broken"), "--resume"])
    assert len(figures_of(begun / "sft.jsonl")) == 4
    assert figures_of(begun / "sft.jsonl") == figures_of(tmp_path / "broken/sft.jsonl")
    a, b = (read_tensors(f / "sft/adapter_model.safetensors") for f in (begun, tmp_path / "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- LoRA ----------------------------------------------------------------------------------------


def adapt(model, base="base", first_new=None, **options):
    """Give the model adapters that do something; returns what add_lora does, and the flags."""
    cfg = lora(**options)
    adapter = add_lora(model, cfg, base, first_new)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    return adapter, cfg


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
    adapt(gpt, targets=("q_proj", "o_proj", "down_proj"))
    plain = GPT(tiny).eval()
    plain.load_state_dict(merged_state(gpt))
    assert_close(plain(IDS), gpt(IDS), atol=1e-5, rtol=1e-5)


def test_dropout_is_for_training_alone(gpt):
    adapt(gpt, dropout=0.5)
    gpt.eval()
    assert torch.equal(gpt(IDS), gpt(IDS))
    gpt.train()
    assert not torch.equal(gpt(IDS), gpt(IDS))


def test_new_rows_learn_and_old_ones_stay(gpt):
    adapt(gpt, first_new=15)
    gpt(IDS).square().mean().backward()
    grad = gpt.model.embed_tokens.weight.grad
    assert (grad[:15] == 0).all() and (grad[15:] != 0).any(dim=1).all()


def test_add_lora_says_what_its_adapters_belong_to(gpt, tmp_path, monkeypatch):
    gpt.save_pretrained(tmp_path / "base")
    before = set(vars(gpt))
    monkeypatch.chdir(tmp_path)
    adapter, _ = adapt(gpt, "base", first_new=15)
    assert adapter == Adapter(str(tmp_path.resolve() / "base"), folder_hash(tmp_path / "base"), 15)
    assert set(vars(gpt)) == before                        # the model itself says nothing of it


@pytest.mark.parametrize("merge, with_adapter, file", [
    (False, True, "adapter_model.safetensors"), (True, True, "model.safetensors"), (False, False, "model.safetensors")])
def test_what_is_written_of_a_tuned_model(gpt, tmp_path, merge, with_adapter, file):
    """Adapters alone, unless they are to be merged or there are none; it comes back as the same model."""
    gpt.save_pretrained(tmp_path / "base")
    adapter, cfg = adapt(gpt, tmp_path / "base", merge=merge) if with_adapter else (None, lora(merge=merge))
    save_tuned(tmp_path / "tuned", gpt, cfg, adapter)
    names = {p.name for p in (tmp_path / "tuned").iterdir()}
    assert names == {"config.json", file, *["adapter_config.json"] * file.startswith("adapter")}
    assert_close(GPT.from_pretrained(tmp_path / "tuned")(IDS), gpt(IDS), atol=1e-5, rtol=1e-5)


def test_lora_without_a_model_to_adapt_is_refused(begun):
    with pytest.raises(UserError, match="--lora-rank .*--init"):
        sft.main([*TINY, "--out", str(begun), "--lora-rank", "2"])


def test_an_adapter_comes_back_and_knows_its_base(gpt, tmp_path):
    gpt.save_pretrained(tmp_path / "first" / "base")
    adapter, cfg = adapt(gpt, tmp_path / "first" / "base", targets=("q_proj", "up_proj"))
    save_tuned(tmp_path / "first" / "adapter", gpt, cfg, adapter)
    save_tuned(tmp_path / "first" / "other", gpt, cfg, replace(adapter, hash="0" * 12))
    shutil.move(tmp_path / "first", tmp_path / "elsewhere")              # base and adapter were moved together
    again = GPT.from_pretrained(tmp_path / "elsewhere" / "adapter")
    assert_close(again(IDS), gpt(IDS), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="elsewhere/other .*first/base"):
        GPT.from_pretrained(tmp_path / "elsewhere" / "other")
    shutil.copytree(tmp_path / "elsewhere/adapter", tmp_path / "alone/base")     # its base's name, and no base beside it
    with pytest.raises(UserError, match="alone/base .*first/base"):
        GPT.from_pretrained(tmp_path / "alone/base")
    torch.nn.init.ones_(again.model.norm.weight)
    again.save_pretrained(tmp_path / "elsewhere" / "base")
    with pytest.raises(UserError, match="elsewhere/adapter .*first/base"):
        GPT.from_pretrained(tmp_path / "elsewhere" / "adapter")
    (tmp_path / "elsewhere/adapter/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="elsewhere/adapter "):
        GPT.from_pretrained(tmp_path / "elsewhere" / "adapter")


def test_stage_two_with_lora_stops_and_goes_on(trained, tmp_path, monkeypatch):
    """Adapters alone are saved, the SFT model under them is untouched, and a stopped run ends as an unbroken one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*TINY, "--lora-rank", "2", "--lora-dropout", "0.2", "--save-every", "2", "--steps", "4", "--log-every", "1",
             "--out"]
    for out in (whole, broken):
        shutil.copytree(trained, out, ignore=shutil.ignore_patterns("bidpo*", "control*"))
    dpo.main([*flags, str(whole)])

    class Stop(Exception):
        pass

    real = dpo.rehearsal_batch

    def stop(studies, cfg, vocab, step):
        if step == 3:
            raise Stop
        return real(studies, cfg, vocab, step)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(dpo, "rehearsal_batch", stop)
        dpo.main([*flags, str(broken)])
    assert not (broken / "bidpo").exists()
    dpo.main([*flags, str(broken), "--resume"])
    assert figures_of(whole / "bidpo.jsonl") == figures_of(broken / "bidpo.jsonl")
    a, b = (read_tensors(out / "bidpo/adapter_model.safetensors") for out in (whole, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not (whole / "bidpo/model.safetensors").exists() and folder_hash(whole / "sft") == folder_hash(trained / "sft")
    size = lambda out: (out / "bidpo/state.safetensors").stat().st_size
    assert size(whole) < 0.7 * size(trained)               # what is frozen is not saved again


# ---- Out -----------------------------------------------------------------------------------------


def prompts_of(vocab, codes):
    """One prompt of each task."""
    return {"report": vocab.report_prompt(codes),
            "ask": vocab.ask_prompt(codes, "Is the heart large?"), "segment": vocab.segment_prompt(codes, "left lung"),
            "generate": vocab.generate_prompt("Left effusion.")}


@pytest.mark.parametrize("name", ["sft", "bidpo"])
def test_tokenizer_json_gives_anyone_our_prompts(trained, name):
    """What the next test asks of transformers, where that is not installed: it reads the same file."""
    vocab, theirs = Vocabulary.load(trained / name), Tokenizer.from_file(str(trained / name / "tokenizer.json"))
    for task, ids in prompts_of(vocab, list(range(16))).items():
        text = vocab.tokenizer.decode(ids, skip_special_tokens=False)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, task
    names = json.loads((trained / name / "tokenizer_config.json").read_text())
    assert [theirs.token_to_id(names[f"{n}_token"]) for n in ("bos", "eos", "pad")] == [vocab.bos, vocab.eos, vocab.pad]


@pytest.mark.parametrize("name", ["sft", "bidpo"])
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


def test_peft_reads_our_adapters(qwen3, begun):
    """Also where the vocabulary grew, once the base has as many rows."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sft.main([*SHORT, "--out", str(begun), "--init", str(qwen3.folder), "--steps", "20", "--lora-rank", "2"])
    base = transformers.AutoModelForCausalLM.from_pretrained(qwen3.folder)
    base.resize_token_embeddings(GPT.from_pretrained(begun / "sft").config.vocab_size, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, begun / "sft").eval()
    ids = torch.tensor([[262, 261, 270, 280, 260, 65, 66, 257, 259]])
    assert_close(theirs(ids).logits, GPT.from_pretrained(begun / "sft")(ids), atol=1e-4, rtol=0)


def test_adapter_files_have_pefts_names(qwen3, begun):
    """The names that PEFT 0.21 writes for the same adapters and new rows."""
    sft.main([*SHORT, "--out", str(begun), "--init", str(qwen3.folder), "--steps", "1", "--lora-rank", "2"])
    with safe_open(begun / "sft/adapter_model.safetensors", "pt") as f:
        names = set(f.keys())
    tables = ["model.embed_tokens"] + ["lm_head"] * (not qwen3.model.config.tie_word_embeddings)
    matrices = [f"layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"]
    assert names == {*(f"base_model.model.model.{m}" for m in matrices),
                     *(f"base_model.model.{t}.token_adapter.trainable_tokens_delta" for t in tables)}
    config = json.loads((begun / "sft/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (2, 16.0)
    assert set(config["trainable_token_indices"]) == {t.split(".")[-1] for t in tables}
