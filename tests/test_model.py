"""model.py against answers from elsewhere: transformers' Qwen3, closed forms, the slow path."""

import copy
import dataclasses
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.testing import assert_close

import dpo
import model
import sample
import sft
import vqgan
from model import (GPT, SHARED_PRESETS, CachedGPT, GPTConfig, Log, RunConfig, TuneConfig, UserError, arg, batch_indices,
                   begin_stage, cli, config_for, finish_stage, folder_hash, generate, get_lr, init_run, load_state,
                   make_optimizers, other_flags, per_token_logps, read_log, read_progress, read_tensors, run, run_flags,
                   sample_token, save_state, sequence_logps, set_lr, take_step, train_mode, weights_hash)

GOLDEN = json.loads((Path(__file__).parent / "qwen3_golden.json").read_text())
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]


# ---- The network ---------------------------------------------------------------------------------


def fill(model):
    """Weights from a formula, so that the golden file need not hold them."""
    with torch.no_grad():
        for n, (_, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(0.37 * torch.arange(p.numel()).double() ** 2 + n).view(p.shape)
            p.copy_(wave if p.dim() == 2 else 1 + 0.3 * wave)
    return model.eval()


def golden_gpt(head):
    return fill(GPT(GPTConfig(tie_word_embeddings=head == "tied", **GOLDEN["config"])))


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_logits_are_qwen3s(head):
    """qwen3_golden.json was made once by transformers (version inside), for tied = True and False:

        qwen = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=tied, **config)).eval()
        logits = fill(qwen)(ids).logits"""
    assert_close(golden_gpt(head)(torch.tensor(GOLDEN["ids"])), torch.tensor(GOLDEN[head]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_folder_has_qwen3s_names_and_gives_its_logits(head, tmp_path):
    """What the next test asks of transformers, where that is not installed."""
    golden_gpt(head).save_pretrained(tmp_path)
    attention = [f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    block = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    assert read_tensors(tmp_path / "model.safetensors").keys() == {
        *(f"model.layers.{i}.{n}.weight" for i in range(GOLDEN["config"]["num_hidden_layers"]) for n in block),
        "model.embed_tokens.weight", "model.norm.weight", *["lm_head.weight"] * (head == "untied")}
    config = json.loads((tmp_path / "config.json").read_text())
    known = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": head == "tied",
             **GOLDEN["config"]}
    assert {k: config[k] for k in known} == known
    logits = GPT.from_pretrained(tmp_path)(torch.tensor(GOLDEN["ids"]))
    assert_close(logits, torch.tensor(GOLDEN[head]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_folders_pass_to_transformers_and_back(head, tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt, ids = golden_gpt(head), torch.tensor(GOLDEN["ids"])
    gpt.save_pretrained(tmp_path / "ours")
    qwen = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_close(qwen(ids).logits, gpt(ids), atol=1e-4, rtol=0)
    qwen.save_pretrained(tmp_path / "theirs")
    assert_close(GPT.from_pretrained(tmp_path / "theirs")(ids), gpt(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[1] * 7, [3, 3, 1]])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_the_decoder_answers_as_the_model_does_piece_by_piece(head, chunks):
    gpt, ids = golden_gpt(head), torch.tensor(GOLDEN["ids"])[:, :7]
    expected, seen = gpt(ids)[..., 3:17], 0
    decoder = CachedGPT(gpt, ids[:, :chunks[0]].tolist(), 2, 7 - chunks[0], (3, 17))
    assert torch.equal(decoder.prompts, ids[:, :chunks[0]])
    for part in ids.split(chunks, dim=1):
        logits, seen = decoder(part), seen + part.size(1)
        assert_close(logits, expected[:, seen - 1], atol=1e-4, rtol=0)       # logits of up to 7, as to transformers above


def test_padding_on_the_left_changes_no_logit_of_the_decoder(gpt):
    short, long = IDS[0, :5].tolist(), IDS[1].tolist()
    decoder = CachedGPT(gpt, [short, long], 2, 1, (0, 20))
    for more in (0, 1):
        logits = decoder(torch.tensor([[3], [4]]) if more else decoder.prompts)
        assert_close(logits[0], gpt(torch.tensor([short + [3] * more]))[0, -1], atol=1e-5, rtol=0)
        assert_close(logits[1], gpt(torch.tensor([long + [4] * more]))[0, -1], atol=1e-5, rtol=0)


def test_on_a_cpu_the_decoder_takes_bfloat16_for_the_products_of_many_rows_alone(gpt):
    """Few rows: to the last bit as without autocast; many: nearly. Only --dtype bfloat16 asks for it."""
    exact, expected = CachedGPT(gpt, PROMPTS, 64, 1, (0, 20)), gpt(torch.tensor([PROMPTS[1]]))[0, -1]
    exact = exact(exact.prompts)
    assert_close(exact[1], expected, atol=1e-5, rtol=0)
    for rows in (31, 32):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoder = CachedGPT(gpt, PROMPTS, rows, 1, (0, 20))
            logits = decoder(decoder.prompts)
        assert torch.equal(logits, exact) == (rows < 32) and logits.dtype == torch.float32
        assert_close(logits, exact, atol=0.02 * exact.abs().max().item(), rtol=0)
        assert decoder.embedding.dtype == decoder.k[0].dtype == torch.float32


def test_the_decoder_goes_on_with_the_rows_it_keeps(gpt):
    decoder = CachedGPT(gpt, PROMPTS, 3, 2, (0, 20))
    decoder(decoder.prompts)
    decoder.keep(torch.tensor([2, 0, 2]))
    logits = decoder(torch.tensor([[5], [6], [7]]))
    for row, prompt, token in zip(logits, (PROMPTS[2], PROMPTS[0], PROMPTS[2]), (5, 6, 7)):
        assert_close(row, gpt(torch.tensor([[*prompt, token]]))[0, -1], atol=1e-5, rtol=0)


def test_prompts_that_rows_share_are_read_once(gpt, monkeypatch):
    read = []
    monkeypatch.setattr(model.CachedGPT, "__call__", lambda self, ids, call=CachedGPT.__call__: (read.append(ids.shape), call(self, ids))[1])
    rows = generate(gpt, [PROMPTS[0]] * 3 + [PROMPTS[1]], 4, (0, 20), temperature=2.0)
    assert read[0] == (2, max(map(len, PROMPTS[:2]))) and set(read[1:]) == {(4, 1)}
    assert len(set(map(tuple, rows))) == 4               # and go on differently


def test_later_id_never_changes_earlier_logit(gpt):
    changed = IDS.clone()
    changed[:, 5] += 1
    assert torch.equal(gpt(changed)[:, :5], gpt(IDS)[:, :5])
    assert not torch.equal(gpt(changed)[:, 5:], gpt(IDS)[:, 5:])


def test_loss_at_init_is_near_log_v(tiny):
    torch.manual_seed(0)
    ids = torch.randint(20, (16, 32))
    loss = F.cross_entropy(GPT(tiny)(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - math.log(20)) < 0.1


def test_residual_matrices_start_smaller(tiny):
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(tiny, hidden_size=64, num_hidden_layers=8)).model.layers[0]
    assert_close(model.mlp.up_proj.weight.std().item(), 0.02, rtol=0.1, atol=0)
    assert_close(model.mlp.down_proj.weight.std().item(), 0.02 / 4, rtol=0.1, atol=0)


def test_config_refuses_heads_that_do_not_divide():
    with pytest.raises(UserError, match="num_attention_heads 4 .*num_key_value_heads 3"):
        GPTConfig(vocab_size=8, num_attention_heads=4, num_key_value_heads=3)


# ---- Log-probabilities ---------------------------------------------------------------------------


def response_labels():
    """Row 0 answers with its last three ids, row 1 with ids 2 to 4; the rest of row 1 is padding."""
    labels = torch.full_like(IDS, -100)
    labels[0, 5:], labels[1, 2:5] = IDS[0, 5:], IDS[1, 2:5]
    return labels


def test_per_token_logps_equal_log_softmax_by_hand(gpt):
    logps, expected = gpt(IDS).log_softmax(-1), torch.zeros(2, 7)
    for row, places in ((0, (5, 6, 7)), (1, (2, 3, 4))):
        for t in places:
            expected[row, t - 1] = logps[row, t - 1, IDS[row, t]]       # position t-1 predicts id t
    assert_close(per_token_logps(gpt, IDS, response_labels()), expected, atol=1e-5, rtol=1e-5)


def test_per_token_logps_zero_outside_response(gpt):
    outside = response_labels()[:, 1:] == -100
    assert (per_token_logps(gpt, IDS, response_labels())[outside] == 0).all()


def test_uniform_logits_give_minus_n_log_v(gpt):
    """Summed over the response, not averaged, and without the id at position 0, which nothing predicts."""
    torch.nn.init.zeros_(gpt.model.embed_tokens.weight)
    assert_close(sequence_logps(gpt, IDS, response_labels()), torch.full((2,), -3 * math.log(20)))
    assert_close(sequence_logps(gpt, IDS, IDS), torch.full((2,), -7 * math.log(20)))


# ---- Sampling ------------------------------------------------------------------------------------


def naive_greedy(gpt, prompt, n, low, high, unconditional=None, guidance=1.0):
    """Likeliest continuation without cache, padding or batch; unconditional is an emptied prompt."""
    new = []
    for _ in range(n):
        logits = gpt(torch.tensor([prompt + new]))[0, -1]
        if unconditional:
            uncond = gpt(torch.tensor([unconditional + new]))[0, -1]
            logits = uncond + guidance * (logits - uncond)
        new.append(low + logits[low:high].argmax().item())
    return new


@pytest.mark.parametrize("batch_size", [256, 2])
def test_greedy_equals_naive_loop(gpt, batch_size):
    expected = [naive_greedy(gpt, p, 6, 4, 18) for p in PROMPTS]
    for _ in range(2):
        assert generate(gpt, PROMPTS, 6, (4, 18), temperature=0, batch_size=batch_size) == expected


def test_same_seed_same_sample(gpt):
    draw = lambda seed: generate(gpt, PROMPTS, 8, (0, 20), temperature=2.0, seed=seed)
    assert draw(1) == draw(1) != draw(2)


def test_only_allowed_ids_are_drawn(gpt):
    ids = generate(gpt, PROMPTS * 20, 8, (5, 9), temperature=5.0)
    assert {i for row in ids for i in row} == {5, 6, 7, 8}
    assert {len(row) for row in ids} == {8}


def test_stop_id_ends_its_row_only_and_is_not_returned(gpt):
    rows = [naive_greedy(gpt, p, 6, 0, 20) for p in PROMPTS]
    stop = rows[0][2]
    expected = [row[:row.index(stop)] if stop in row else row for row in rows]
    assert len({len(row) for row in expected}) > 1       # or the test is vacuous
    assert generate(gpt, PROMPTS, 6, (0, 20), stop_id=stop, temperature=0) == expected


def test_guidance_one_is_no_guidance(gpt):
    guided = generate(gpt, PROMPTS, 6, (0, 20), guidance=1.0, unconditional=[[0], [0], [0]])
    assert guided == generate(gpt, PROMPTS, 6, (0, 20))


@pytest.mark.parametrize("batch_size", [256, 2])
def test_guidance_by_hand(gpt, batch_size):
    """uncond + s·(cond − uncond); the emptied prompts differ from row to row, and may be the longer ones."""
    empty = [[0], [2, 3], [9, 8, 7, 6]]
    expected = [naive_greedy(gpt, p, 6, 4, 18, u, 3.0) for p, u in zip(PROMPTS, empty)]
    assert expected != [naive_greedy(gpt, p, 6, 4, 18) for p in PROMPTS]
    assert generate(gpt, PROMPTS, 6, (4, 18), temperature=0, guidance=3.0, unconditional=empty,
                    batch_size=batch_size) == expected


@pytest.mark.parametrize("options", [dict(), dict(guidance=3.0, unconditional=[[1], [2, 3]] * 8)])
def test_rows_that_ended_are_left_out_and_change_nothing(gpt, options, monkeypatch):
    """Sixteen likeliest continuations, ended at ids of their own; the steps are of ever fewer rows."""
    prompts, widths = [[i % 20, (3 * i) % 20] for i in range(16)], []
    whole = generate(gpt, prompts, 8, (0, 20), temperature=0, **options)
    stop = max(range(20), key=lambda i: sum(i in row[2:5] for row in whole))
    monkeypatch.setattr(model.CachedGPT, "keep", lambda self, rows, keep=CachedGPT.keep: (widths.append(len(rows)), keep(self, rows)))
    rows = generate(gpt, prompts, 8, (0, 20), stop, temperature=0, **options)
    assert rows == [row[:row.index(stop)] if stop in row else row for row in whole]
    assert len(widths) > 1 and widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("narrow", [dict(top_k=1), dict(top_p=1e-6)])
def test_narrowest_sampling_is_greedy(gpt, narrow):
    greedy = generate(gpt, PROMPTS, 6, (0, 20), temperature=0)
    assert generate(gpt, PROMPTS, 6, (0, 20), temperature=3.0, **narrow) == greedy


@pytest.mark.parametrize("options, expected", [
    (dict(), [0.1, 0.4, 0.2, 0.3]),
    (dict(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),      # squares, normalised
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_k=9), [0.1, 0.4, 0.2, 0.3]),                           # more than there are: all
    (dict(top_p=0.6), [0, 4 / 7, 0, 3 / 7]),                         # 0.4 alone falls short of 0.6
])
def test_sample_frequencies_match_softmax(options, expected):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(20000, 4)
    options = dict(temperature=1.0, top_k=0, top_p=1.0) | options
    ids = sample_token(logits, **options, generator=torch.Generator().manual_seed(0))
    assert_close(ids.bincount(minlength=4) / 20000, torch.tensor(expected), atol=0.012, rtol=0)


# ---- Flags and errors ----------------------------------------------------------------------------


@dataclass
class Flags(RunConfig):
    on: bool = arg(True, "a switch")
    off: bool = arg(False, "another")
    sizes: tuple = arg((1, 2), "whole numbers")
    rate: float = arg(0.5, "a share")


PRESETS = {"tiny": dict(rate=0.1), "small": {}, "base": dict(rate=0.9)}


def test_booleans_go_both_ways():
    cfg = cli(Flags, PRESETS, ["--no-on", "--off"])
    assert (cfg.on, cfg.off) == (False, True)
    cfg = cli(Flags, PRESETS, ["--on", "--no-off"])
    assert (cfg.on, cfg.off) == (True, False)


def test_flags_have_the_type_of_their_default():
    cfg = cli(Flags, PRESETS, ["--sizes", "3", "4", "5", "--rate", "1", "--image-size", "48"])
    assert (list(cfg.sizes), cfg.rate, type(cfg.rate), cfg.image_size) == ([3, 4, 5], 1.0, float, 48)


def test_defaults_then_preset_then_flags():
    assert cli(Flags, PRESETS, []) == Flags()
    assert (cli(Flags, PRESETS, ["--preset", "tiny"]).rate, Flags().rate) == (0.1, 0.5)
    assert cli(Flags, PRESETS, ["--preset", "tiny"]).records == SHARED_PRESETS["tiny"]["records"]
    assert cli(Flags, PRESETS, ["--rate", "0.7", "--preset", "tiny", "--records", "5"]).rate == 0.7
    assert cli(Flags, PRESETS, ["--preset", "tiny", "--records", "5"]).records == 5


@pytest.mark.parametrize("argv", [["--nonsense", "1"], ["--preset", "huge"], ["--rate", "fast"], ["--channels", "2"]])
def test_wrong_flags_exit_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli(Flags, PRESETS, argv)
    assert exit.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_exits_with_status_0_and_names_each_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        cli(Flags, PRESETS, ["--help"], "what this does")
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert "what this does" in text and "--no-off" in text and "(default: 1 2)" in text


# How each program parses its flags: Config, presets, and what else cli is told.
PROGRAMS = {"vqgan": (vqgan.VQGANTrainConfig, vqgan.PRESETS), "sft": (sft.SFTConfig, sft.PRESETS),
            "dpo": (dpo.DPOConfig, dpo.PRESETS, ("objective", dpo.OBJECTIVE_DEFAULTS)),
            "sample": (sample.SampleConfig, sample.PRESETS)}


def parse(program, *argv):
    Config, presets, *choice = PROGRAMS[program]
    return cli(Config, presets, argv, None, *choice)


def flag_of(name):
    return "--" + name.replace("_", "-")


def check_refused(capsys, program, flag, value):
    """Exit status 2, and one line on stderr that names the flag."""
    with pytest.raises(SystemExit) as exit:
        parse(program, f"{flag}={value}")
    out, error = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert error.startswith("error: ") and flag in error and error.count("\n") == 1, error


def fields_where(keep):
    return [pytest.param(program, f, id=f"{program} {flag_of(f.name)}") for program, (Config, *_) in PROGRAMS.items()
            for f in dataclasses.fields(Config) if keep(f)]


@pytest.mark.parametrize("program, field", fields_where(lambda f: f.type in (int, float) and "choices" not in f.metadata))
def test_a_number_lies_in_its_range(program, field, capsys):
    """Whole numbers in 1..10⁹ and fractions in 0..10³⁰, unless the field says otherwise."""
    flag, least, most = flag_of(field.name), field.metadata["least"], field.metadata["most"]
    step = 1 if field.type is int else 1e-7
    for good in (least, most):
        assert getattr(parse(program, flag, str(good)), field.name) == good
    bad = [least - step, most + step * max(1, most), *["0.5"] * (field.type is int)]
    for value in [*bad, "1e300", "inf", "-inf", "nan", "much", ""]:
        check_refused(capsys, program, flag, value)


@pytest.mark.parametrize("program, field", fields_where(lambda f: "choices" in f.metadata))
def test_a_choice_is_one_of_those_that_exist(program, field, capsys):
    flag, tuples = flag_of(field.name), field.type is tuple
    for good in field.metadata["choices"]:
        given = getattr(parse(program, flag, str(good)), field.name)
        assert given == ([good] if tuples else good)
    for value in ("nonsense", "", *["2"] * (field.type is int)):
        check_refused(capsys, program, flag, value)


@pytest.mark.parametrize("program, flag, good, bad", [
    ("sft", "--seed", "0", "-1"), ("sft", "--seed", "4294967295", "4294967296"), ("dpo", "--beta", "1e-6", "0"), ("sft", "--bias", "1", "1.01"), ("sft", "--records", "1", "0"),
    ("sft", "--channels", "3", "2"), ("sft", "--preset", "base", "huge"), ("sft", "--dtype", "float32", "float16"),
    ("sft", "--lora-rank", "0", "-1"), ("sft", "--lora-dropout", "0.99", "1"), ("sft", "--lr", "0", "-0.001"),
    ("sft", "--lora-targets", "up_proj", "c_attn"), ("sft", "--empty-share", "1", "1.01"),
    ("sft", "--text-vocab", "261", "260"), ("vqgan", "--mask-share", "1", "1.01"), ("vqgan", "--disc-start", "0", "-1"),
    ("dpo", "--objective", "rndpo", "orpo"), ("dpo", "--distort", "add", "twist"),
    ("dpo", "--strength", "1000", "1001"), ("dpo", "--rejected", "own", "judge"),
    ("dpo", "--flip-pairs", "1", "1.01"), ("dpo", "--proposals", "2", "1"), ("dpo", "--judge-noise", "1", "1.01"),
    ("dpo", "--mining", "random", "best"), ("dpo", "--q-min", "1e-6", "0"), ("dpo", "--q-max", "1", "1.01"),
    ("sample", "--n", "1", "0"), ("sample", "--top-k", "0", "-1"), ("sample", "--top-p", "1", "1.01")])
def test_limits_by_hand(program, flag, good, bad, capsys):
    """The limits that hold, whatever the fields say of themselves."""
    parse(program, flag, good)
    check_refused(capsys, program, flag, bad)


@pytest.mark.parametrize("program", PROGRAMS)
def test_defaults_and_presets_lie_within_what_flags_may_be(program):
    Config, presets, *choice = PROGRAMS[program]
    words = lambda v: [str(x) for x in v] if isinstance(v, tuple) else [str(v)]
    argv = lambda values: [w for k, v in values.items() for w in ([flag_of(k)] if v is True else [flag_of(k), *words(v)])]
    defaults = {f.name: f.default for f in dataclasses.fields(Config) if f.type is not bool and f.name != "words"}
    as_lists = lambda cfg: {k: list(v) if isinstance(v, tuple) else v for k, v in vars(cfg).items()}
    assert as_lists(parse(program, *argv(defaults))) == as_lists(Config())
    for name, values in presets.items():
        assert parse(program, "--preset", name, *argv(SHARED_PRESETS[name] | values)) == parse(program, "--preset", name)
    for flag, cases in choice:
        for value, values in cases.items():
            assert parse(program, flag_of(flag), value, *argv(values)) == parse(program, flag_of(flag), value)


def test_the_stage_before_gets_the_shared_flags():
    cfg = config_for(RunConfig, Flags(seed=3, image_size=48, rate=0.2), records=7)
    assert cfg == RunConfig(seed=3, image_size=48, records=7)


def test_user_error_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("cause; way out")
    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 2
    assert capsys.readouterr() == ("", "error: cause; way out\n")


def test_other_errors_keep_their_traceback():
    def main():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        run(main)


@pytest.mark.parametrize("name, value", [("device", "abacus"), ("out", "/dev/null/x")])
def test_init_run_refuses_what_it_cannot_use(name, value, tmp_path):
    with pytest.raises(UserError, match=f"--{name} {value}"):
        init_run(RunConfig(**{"out": str(tmp_path), "device": "cpu", name: value}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_run_seeds_and_sets_precision(dtype, tmp_path):
    device, autocast = init_run(RunConfig(out=str(tmp_path / "a" / "b"), seed=5, device="cpu", dtype=dtype))
    drawn = torch.randn(3)
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is getattr(torch, dtype)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.randn(3)) and device.type == "cpu"
    assert torch.backends.cudnn.allow_tf32 == (dtype == "bfloat16") and not torch.backends.cuda.cudnn_sdp_enabled()
    assert list((tmp_path / "a" / "b").iterdir()) == []


# ---- Folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_comes_back_equal(tiny, tied, tmp_path):
    other = {f.name: {float: 0.25, str: "abc"}.get(f.type, 8) for f in dataclasses.fields(tiny)}
    config = GPTConfig(**other | dict(tie_word_embeddings=tied))         # no field at its default
    saved = GPT(config)
    saved.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == config
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), saved.state_dict().values()))


def test_weights_hash_names_the_weights(tiny, gpt):
    other = GPT(tiny)
    other.load_state_dict(gpt.state_dict())
    assert weights_hash(other) == weights_hash(gpt)
    other.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    assert weights_hash(other) != weights_hash(gpt)


def test_folder_hash_names_the_weights_on_disk(gpt, tmp_path):
    for name in ("a", "b"):
        gpt.save_pretrained(tmp_path / name)
    (tmp_path / "b/state.safetensors").write_bytes(b"what a continuation needs is no weight of the model")
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")
    gpt.model.norm.weight.data[0] += 1e-3
    gpt.save_pretrained(tmp_path / "b")
    assert folder_hash(tmp_path / "a") != folder_hash(tmp_path / "b")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_from_config(folder, key):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


@pytest.mark.parametrize("damage, named", [
    (lambda f: f.rename(f.with_name("elsewhere")), "/gpt "),
    (lambda f: truncate(f / "model.safetensors"), "/gpt "),
    (lambda f: truncate(f / "config.json"), "/gpt "),
    (lambda f: (f / "model.safetensors").unlink(), "/gpt .*model.safetensors"),
    (lambda f: (f / "config.json").unlink(), "/gpt .*config.json"),
    (lambda f: change_config(f, model_type="llama"), "/gpt/config.json .*llama"),
    (lambda f: change_config(f, hidden_size=32), "/gpt: "),
    (lambda f: change_config(f, num_hidden_layers=3), "/gpt: "),
    (lambda f: change_config(f, rope_scaling={"rope_type": "yarn"}), "/gpt/config.json .*yarn"),
    (lambda f: change_config(f, hidden_act="gelu"), "/gpt/config.json .*gelu"),
    (lambda f: change_config(f, use_sliding_window=True), "/gpt/config.json .*use_sliding_window"),
    (lambda f: change_config(f, vocab_size=None), "/gpt/config.json "),
    (lambda f: drop_from_config(f, "vocab_size"), "/gpt/config.json .*vocab_size"),
], ids=["missing", "truncated", "half a config", "no weights", "no config", "other kind", "other size", "more layers",
        "yarn", "gelu", "windows", "null for a size", "no size"])
def test_a_folder_that_is_damaged_or_of_other_arithmetic_is_refused(gpt, tmp_path, damage, named):
    gpt.save_pretrained(tmp_path / "gpt")
    damage(tmp_path / "gpt")
    with pytest.raises(UserError, match=named):
        GPT.from_pretrained(tmp_path / "gpt")


# ---- Steps: learning rate, batches, states, stages, log ------------------------------------------


def test_get_lr_at_its_corners():
    share = lambda step: get_lr(step, steps=110, warmup=10, floor=0.1)
    assert share(0) == 0.1 and share(9) == share(10) == 1.0
    assert_close(share(60), 0.55)                       # half way down the cosine
    assert_close(share(110), 0.1)
    assert get_lr(0, 1, 0) == 1.0                       # no warmup, nothing to divide by
    assert [get_lr(step, 10, 40) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]      # a short run warms up a fifth of it


def test_set_lr_scales_the_peak_not_the_last_rate():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    set_lr([optimizer], 0.5)
    set_lr([optimizer], 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_each_epoch_is_another_permutation():
    """10 examples in batches of 4: batch 2 crosses from the first epoch into the second."""
    seen = np.concatenate([batch_indices(10, 4, step, seed=0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    assert len(batch_indices(3, 8, 0, seed=0)) == 8                             # more than one epoch in a batch


def test_batch_is_a_function_of_step_and_seed():
    later = batch_indices(50, 8, 7, seed=1)
    for step in range(7):
        batch_indices(50, 8, step, seed=1)
    assert np.array_equal(batch_indices(50, 8, 7, seed=1), later)
    assert not np.array_equal(batch_indices(50, 8, 7, seed=2), later)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (2, 16, 4)])
def test_orthogonalize_moves_singular_values_and_keeps_directions(shape):
    """The iterations act on singular values alone: s <- 3.4445 s - 4.775 s^3 + 2.0315 s^5, five times, from s / |M|."""
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    s = S / S.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert_close(model.orthogonalize(M), U @ torch.diag_embed(s) @ Vh, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_muon_steps_as_torch_does(monkeypatch, dtype, near):
    """torch.optim.Muon rounds to bfloat16 on its way, here only where ours does, too."""
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    torch.manual_seed(0)
    shapes = [(16, 16), (32, 16), (16, 16), (16, 48), (32, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    optimizers = model.Muon(ours, 0.1, 0.2, dtype), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2)
    for _ in range(3):
        before = [p.detach().clone() for p in theirs]
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
        for a, b, old in zip(ours, theirs, before):
            assert (a - b).norm() < near * (b - old).norm()


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_how_many_rows_go_together_changes_no_log_probability(gpt, rows):
    ids = torch.randint(20, (7, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for i, end in enumerate((11, 4, 7, 7, 2, 9, 5)):
        labels[i, :i % 3], labels[i, end:] = -100, -100
    expected = torch.log_softmax(gpt(ids)[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2) * (labels[:, 1:] != -100)
    assert_close(per_token_logps(gpt, ids, labels, model.split_batch(ids, labels, "cpu", size=rows)), expected, atol=1e-5, rtol=1e-5)


ALIKE = [[[7, 8, 9, 1, 2], [7, 8, 9, 1, 3, 4], [7, 8, 9, 5]], [[3, 4]], [[6, 5, 4], [6, 5, 4]], [[1, 2], [3, 4, 5]]]


def test_rows_that_begin_alike_are_joined():
    """What they share once, then the rests, each at its own positions and seeing itself and what is shared."""
    ids, positions, branch, family, places = model.join(ALIKE)
    mask = model.branch_mask(branch)
    joined = [[7, 8, 9, 1, 2, 1, 3, 4, 5], [3, 4], [6, 5, 4], [1, 2, 3, 4, 5]]
    assert ids.tolist() == [row + [0] * (16 - len(row)) for row in joined]
    assert family.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    rows = [row for rows in ALIKE for row in rows]
    for row, f, place in zip(rows, family.tolist(), places.tolist()):
        at = place[:len(row)]
        assert ids[f, at].tolist() == row and positions[f, at].tolist() == list(range(len(row)))
        for t, p in enumerate(at):
            assert (mask[f, 0, p] == 0).nonzero().flatten().tolist() == at[:t + 1]


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_reading_rows_as_families_changes_no_log_probability_and_no_gradient(gpt, rows):
    """Of responses that begin inside or after what is shared, and of numbers of rows in another order than the families'."""
    flat = [row + [0] * (8 - len(row)) for family in ALIKE for row in family]
    ids, labels = torch.tensor(flat), torch.tensor(flat)
    for i, row in enumerate(row for family in ALIKE for row in family):
        labels[i, :min(2, len(row) - 1) if i else 4], labels[i, len(row):] = -100, -100
    order = torch.tensor([5, 0, 7, 3, 2, 6, 1, 4])
    at = order.argsort().tolist()
    families = [[at[0], at[1], at[2]], [at[3]], [at[4], at[5]], [at[6], at[7]]]
    found, grads = [], []
    for kind in (None, families):
        gpt.zero_grad()
        parts = model.split_batch(ids[order], labels[order], "cpu", kind, rows)
        found.append(per_token_logps(gpt, ids[order], labels[order], parts))
        (found[-1] * torch.arange(1.0, 8)).sum().backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert_close(*found, atol=1e-5, rtol=1e-5)
    for alone, joined in zip(*grads):
        assert_close(alone, joined, atol=1e-4, rtol=1e-4)


def test_a_large_vocabulary_passes_the_head_in_pieces(gpt, monkeypatch):
    """Same log-probabilities, same gradients, never more than so many logits at once."""
    ids = IDS.repeat(99, 1)
    parts = model.split_batch(ids, ids, "cpu", size=999)
    whole = per_token_logps(gpt, ids, ids, parts)
    whole.sum().backward()
    grads, sizes = [p.grad.clone() for p in gpt.parameters()], []
    gpt.zero_grad()
    monkeypatch.setattr(model, "MOST_LOGITS", 20 * 300)
    monkeypatch.setattr(gpt, "head", lambda h, head=gpt.head: (sizes.append(len(h)), head(h))[1])
    pieces = per_token_logps(gpt, ids, ids, parts)
    pieces.sum().backward()
    assert_close(pieces, whole)
    assert set(sizes) == {128, 256}                      # 256 at a time, the rest filled up
    for p, grad in zip(gpt.parameters(), grads):
        assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


def test_recomputing_gives_the_same_gradients_and_keeps_no_activations(gpt):
    kept, gradients = [], []
    for gpt.recompute in (False, True):
        gpt.zero_grad()
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add((x.data_ptr(), x.numel())) or x, lambda x: x):
            loss = per_token_logps(gpt, IDS, IDS).sum()
        loss.backward()
        kept.append(sum(n for _, n in saved))
        gradients.append([p.grad.clone() for p in gpt.parameters()])
    assert kept[1] < kept[0] / 10
    for plain, again in zip(*gradients):
        assert_close(again, plain)


def test_train_mode_compiles_the_blocks_or_says_why_not(gpt, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: compiled.append((self, dynamic)))
    monkeypatch.setattr(torch, "compile", lambda f: f)
    train_mode(gpt.eval(), TuneConfig())
    assert gpt.training and not gpt.recompute and not compiled
    train_mode(gpt, TuneConfig(compile=True, recompute=True))
    assert gpt.recompute and compiled == [(block, True) for block in gpt.model.layers]
    assert not torch._functorch.config.donated_buffer              # or dpo.py could not go back through a graph twice

    def fails(f):
        raise RuntimeError("no working C++ compiler found")
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match="--compile .*no working C"):
        train_mode(gpt, TuneConfig(compile=True))


def loss_at(gpt, step):
    return -per_token_logps(gpt, IDS + step, IDS + step).mean()


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_a_step_is_zero_grad_backward_clip_and_step(gpt, clip):
    """Three in a row: what one leaves behind must not reach the next."""
    other = copy.deepcopy(gpt)
    ours, theirs = (make_optimizers(m, 0.02, 0.02, 0.1) for m in (gpt, other))
    for step in range(3):
        norm = take_step(loss_at(gpt, step), gpt.parameters(), ours, clip)
        for optimizer in theirs:
            optimizer.zero_grad()
        loss_at(other, step).backward()
        expected = torch.cat([p.grad.flatten() for p in other.parameters()]).norm()
        torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        for optimizer in theirs:
            optimizer.step()
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        assert (norm > clip) == (clip < 1)                 # or the case is vacuous
        assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), other.parameters()))


def test_a_step_by_hand():
    """Gradient (3, 4) of length 5: cut to length 1 it is (0.6, 0.8); old gradients count for nothing."""
    at = torch.zeros(2, requires_grad=True)
    at.grad = torch.full((2,), 100.0)
    optimizer, slope = torch.optim.SGD([at], lr=1.0), torch.tensor([3.0, 4.0])
    for moved in (-0.6, -1.2):
        assert take_step(at @ slope, [at], [optimizer], clip=1.0) == 5
        assert_close(at.detach()[0], torch.tensor(moved))
    assert take_step(at @ slope, [at], [optimizer]) == 5                   # without clip
    assert_close(at.detach(), torch.tensor([-4.2, -5.6]))


def take_steps(gpt, optimizers, steps):
    for step in steps:
        set_lr(optimizers, get_lr(step, 8, 2))
        take_step(loss_at(gpt, step), gpt.parameters(), optimizers)


def test_reading_models_does_not_import_torchs_compiler(trained):
    """Two seconds of every `sample.py report`; some operations on the meta device, where models are made to be read, ask for it."""
    code = ("import sys, model, vqgan; model.GPT.from_pretrained('sft'); vqgan.VQGAN.from_pretrained('vqgan'); "
            "sys.exit('torch._dynamo' in sys.modules)")
    environment = {**os.environ, "PYTHONPATH": str(Path(model.__file__).parent)}
    assert subprocess.run([sys.executable, "-c", code], cwd=trained, env=environment).returncode == 0


def test_resumed_state_continues_bit_identically(tiny, gpt, tmp_path):
    optimizers = make_optimizers(gpt, 0.02, 0.02, 0.1)
    take_steps(gpt, optimizers, range(4))
    save_state(tmp_path, 4, [gpt], optimizers, best=0.25)
    take_steps(gpt, optimizers, range(4, 8))

    resumed = GPT(tiny)
    optimizers = make_optimizers(resumed, 0.02, 0.02, 0.1)
    assert load_state(tmp_path, [resumed], optimizers) == {"step": 4, "best": 0.25}
    take_steps(resumed, optimizers, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), gpt.parameters()))


def test_progress_is_read_without_the_tensors(gpt, tmp_path):
    save_state(tmp_path, 4, [gpt], [], best=0.25, flags={"steps": 8})
    assert read_progress(tmp_path) == {"step": 4, "best": 0.25, "flags": {"steps": 8}}


def test_other_flags_are_those_that_a_continuation_must_share():
    cfg = Flags(seed=3, out="a", sizes=(1, 2))
    progress = json.loads(json.dumps({"flags": run_flags(cfg)}))
    assert other_flags(progress, Flags(seed=3, out="b", device="cpu")) == []
    assert other_flags(progress, Flags(seed=4, image_size=32, sizes=(2,))) == ["--seed", "--image-size", "--sizes"]
    assert other_flags({}, cfg) == []


def test_every_parameter_has_one_optimizer(gpt):
    """Muon takes the matrices inside blocks; embedding, norms and head are AdamW's."""
    muon, adamw = make_optimizers(gpt, 0.1, 0.2, 0.0)
    sets = [{id(p) for group in o.param_groups for p in group["params"]} for o in (muon, adamw)]
    assert sets[0] | sets[1] == {id(p) for p in gpt.parameters()} and not sets[0] & sets[1]
    assert sets[0] == {id(p) for p in gpt.model.layers.parameters() if p.dim() == 2}


def test_muon_multiplies_in_autocasts_dtype(gpt):
    half = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    assert [make_optimizers(gpt, 0.1, 0.1, 0.0, *a)[0].dtype for a in ((), (half,))] == [torch.float32, torch.bfloat16]


def test_state_of_another_model_raises_user_error(tiny, gpt, tmp_path):
    save_state(tmp_path, 1, [gpt], [])
    with pytest.raises(UserError, match="state.safetensors"):
        load_state(tmp_path, [GPT(dataclasses.replace(tiny, hidden_size=32))], [])
    truncate(tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="state.safetensors"):
        load_state(tmp_path, [gpt], [])


def stage_config(tmp_path, resume):
    cfg = RunConfig(out=str(tmp_path))
    cfg.resume, cfg.steps = resume, 10
    return cfg


@pytest.mark.parametrize("left, resume, step", [
    ((), False, None), (("x.partial",), True, 3), (("x",), True, 3), (("x", "x.partial"), True, 4),
    (("x", "x.partial"), False, None)])
def test_stage_begins_where_it_should(gpt, tmp_path, left, resume, step):
    """x is a finished run (saved at step 3), x.partial an unfinished one, which a resumed run prefers."""
    for i, name in enumerate(left):
        save_state(tmp_path / name, 3 + i, [gpt], [])
    folder, progress = begin_stage(stage_config(tmp_path, resume), "x", [gpt], [])
    assert folder == tmp_path / "x.partial" and progress.get("step") == step
    assert folder.exists() == resume         # a finished run is gone on with as a copy; starting over puts an unfinished one aside
    assert (tmp_path / ".x.unfinished/state.safetensors").exists() == ("x.partial" in left and not resume)


def test_the_first_unfinished_run_is_kept_until_one_is_done(gpt, tmp_path):
    """With its log: whoever forgets --resume, and stops the new run as well, still has it."""
    for step in (2000, 1):
        save_state(tmp_path / "x.partial", step, [gpt], [])
        (tmp_path / "x.partial.jsonl").write_text(f'{{"step": {step}}}\n')
        begin_stage(stage_config(tmp_path, False), "x", [gpt], [])
    kept = tmp_path / ".x.unfinished"
    assert read_progress(kept)["step"] == 2000 and read_log(kept / "log.jsonl") == [{"step": 2000}]


@pytest.mark.parametrize("make", [lambda path: (path.mkdir(), (path / "patient.dcm").write_text("mine")),
                                  lambda path: (path / "sub.json").mkdir(parents=True),
                                  lambda path: path.symlink_to(path.parent), lambda path: path.write_text("mine")],
                         ids=["a foreign file", "a folder", "a link", "a file"])
@pytest.mark.parametrize("name", ["x", "x.partial"])
def test_what_is_not_a_stages_own_is_never_replaced(gpt, tmp_path, make, name):
    make(tmp_path / name)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"{tmp_path / name} is .*move it away"):
        begin_stage(stage_config(tmp_path, False), "x", [gpt], [])
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_folder_of_ones_own_is_named(tmp_path):
    (link := tmp_path / "link").symlink_to(tmp_path)
    for out, data, why in (("", "", "empty"), (str(tmp_path), str(link), "the folder of --data")):
        with pytest.raises(UserError, match=f"--out '.*' is {why}"):
            model.init_run(RunConfig(out=out, data=data))
    (loop := tmp_path / "loop").symlink_to(loop)
    with pytest.raises(UserError, match=f"--out {loop} cannot be written"):
        model.init_run(RunConfig(out=str(loop), data=str(tmp_path)))


def test_the_same_data_in_other_words_are_the_same_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_flags(RunConfig(data="d")) == run_flags(RunConfig(data="./d/")) == run_flags(RunConfig(data=str(tmp_path / "d")))
    assert run_flags(RunConfig())["data"] == ""


def test_flags_may_stand_between_words():
    for argv in (["--n", "3", "report", "a.png"], ["report", "--n", "3", "a.png"], ["report", "a.png", "--n", "3"]):
        cfg = cli(sample.SampleConfig, sample.PRESETS, argv)
        assert (list(cfg.words), cfg.n) == (["report", "a.png"], 3)


def test_a_terminal_that_lacks_a_letter_shows_its_number(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
        run(lambda: print("é \ufffd", file=getattr(sys, stream), flush=True))
        assert getattr(sys, stream).buffer.getvalue() == b"\xe9 \\ufffd\n"


def test_weights_that_are_no_numbers_are_refused(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    state = read_tensors(tmp_path / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * float("nan")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{tmp_path}: .*model.norm.weight holds what is no number"):
        GPT.from_pretrained(tmp_path)


def test_resume_of_nothing_starts_at_0(gpt, tmp_path):
    """`dpo.py --resume` after a kill in the stage before must not fail once that stage is done."""
    assert begin_stage(stage_config(tmp_path, True), "x", [gpt], []) == (tmp_path / "x.partial", {})


def test_resuming_with_other_flags_is_refused(gpt, tmp_path):
    cfg = stage_config(tmp_path, True)
    save_state(tmp_path / "x.partial", 3, [gpt], [], flags=run_flags(cfg))
    begin_stage(cfg, "x", [gpt], [])
    cfg.image_size = 128
    with pytest.raises(UserError, match="--resume: .*x.partial .*--image-size"):
        begin_stage(cfg, "x", [gpt], [])


@pytest.mark.parametrize("older", [True, False])
def test_finished_stage_replaces_an_old_folder_whole(tmp_path, older):
    for name in ("x", ".x.old", ".x.unfinished") if older else ():
        (tmp_path / name).mkdir()
        (tmp_path / name / "left over").touch()
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "new").touch()
    finish_stage(RunConfig(out=str(tmp_path)), "x")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["x", "x/new"]


def log_steps(path, steps, start=0):
    log = Log(path, "x", 10, start)
    for step in steps:
        log(step, loss=torch.tensor(step / 3))
    log.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_drops_lines_from_the_resumed_step_on(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = log_steps(path, range(5))
    assert [(row["step"], row["loss"]) for row in rows] == [(s, round(s / 3, 6)) for s in range(5)]
    assert [line["step"] for line in log_steps(path, [3, 7], start=3)] == [0, 1, 2, 3, 7]
    assert [line["step"] for line in log_steps(path, [0])] == [0]               # a new run, a new log


def test_seconds_go_on_from_where_they_were_logged_last(tmp_path, monkeypatch):
    clock = iter((100.0, 103.0, 500.0, 502.5))
    monkeypatch.setattr("model.time.time", lambda: next(clock))
    log_steps(tmp_path / "log.jsonl", [0])
    rows = log_steps(tmp_path / "log.jsonl", [1], start=1)
    assert [row["seconds"] for row in rows] == [3.0, 5.5]


def test_resuming_with_fewer_steps_than_are_done_is_refused(tmp_path):
    net, cfg = torch.nn.Linear(2, 2), stage_config(tmp_path, True)
    save_state(tmp_path / "x.partial", cfg.steps + 1, [net], [])
    with pytest.raises(UserError, match=f"--resume: .*x.partial has {cfg.steps + 1} .*--steps {cfg.steps}"):
        begin_stage(cfg, "x", [net], [])
    assert read_progress(tmp_path / "x.partial")["step"] == cfg.steps + 1


def test_a_tied_head_stored_twice_is_no_obstacle(gpt, tmp_path):
    gpt.save_pretrained(tmp_path / "m")
    tensors = gpt.state_dict() | {"lm_head.weight": gpt.model.embed_tokens.weight.clone()}
    save_file(tensors, tmp_path / "m/model.safetensors")
    ids = torch.arange(5)[None]
    assert torch.equal(GPT.from_pretrained(tmp_path / "m")(ids), gpt(ids))


def test_a_half_written_log_line_does_not_stop_a_resume(tmp_path):
    odd = ['{"step": 1, "loss": "x"}', '{"step": null}', '{"step": 1, "loss": 1' + 400 * "0" + "}", "[1]", '{"step": 1, "lo']
    (tmp_path / "x.jsonl").write_text("\n".join(['{"step": 0, "loss": 1.0}', *odd]))
    Log(tmp_path / "x.jsonl", "x", 4, start=2).close()
    assert (tmp_path / "x.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'


def test_a_signal_after_the_last_step_stops_the_run_too(tmp_path):
    """`stop` finds the Log that is at work; without one it ends all at once."""
    log = Log(tmp_path / "x.jsonl", "x", 1)
    log.count(0, 1.0)
    model.stop(signal.SIGTERM, None)
    assert not log.stopping                              # the step was counted before
    with pytest.raises(model.Stopped) as stopped:
        log.close()
    assert stopped.value.args == (signal.SIGTERM,) and Log.running is None
    with pytest.raises(model.Stopped):
        model.stop(signal.SIGINT, None)


def test_signals_in_a_step_that_never_ends(tmp_path, monkeypatch):
    """The first waits for its end, as do others of the next 3 s; a later one stops at once, however many came between."""
    log, clock = Log(tmp_path / "x.jsonl", "x", 1), [100.0]
    monkeypatch.setattr(model.time, "time", lambda: clock[0])
    for clock[0] in (100.0, 102.0):
        model.stop(signal.SIGINT, None)
    clock[0] = 104.0
    with pytest.raises(model.Stopped):
        model.stop(signal.SIGINT, None)
    with pytest.raises(model.Stopped):
        log.close()


def test_a_copied_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    synced, sync = [], model.sync
    monkeypatch.setattr(model, "sync", lambda path: (synced.append((path.name, (tmp_path / "b").exists())), sync(path)))
    model.copy_folder(tmp_path / "a", tmp_path / "b")
    assert synced == [("x", False), (".b.copy", False), (tmp_path.name, True)] and (tmp_path / "b" / "x").read_text() == "1"


def test_a_step_without_a_finite_gradient_changes_nothing_and_five_in_a_row_stop_the_run(gpt, tmp_path):
    before, log = copy.deepcopy(gpt.state_dict()), Log(tmp_path / "x.partial.jsonl", "x", 9)
    optimizers = make_optimizers(gpt, 0.02, 0.02, 0.1)
    for step in range(4):
        log.count(step, take_step(loss_at(gpt, 0) * float("inf"), gpt.parameters(), optimizers))
    assert all(torch.equal(v, before[k]) for k, v in gpt.state_dict().items())
    log.count(4, take_step(loss_at(gpt, 0), gpt.parameters(), optimizers))                        # one good step between
    assert not torch.equal(gpt.model.norm.weight, before["model.norm.weight"])
    log(4, loss=1.0)
    for step in range(5, 9):
        log.count(step, float("nan"))
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(UserError, match=r"steps 5 to 9.*x\.partial"):
        log.count(9, float("inf"))
    with pytest.raises(UserError, match="diverged: its last step"):               # a short run does not come to five
        log.close()
    assert read_log(tmp_path / "x.partial.jsonl")[0]["skipped"] == 4


def test_a_warning_is_given_once(tmp_path, capsys):
    log = Log(tmp_path / "x.jsonl", "x", 9)
    for sign in (False, True, True):
        log.warn(sign, "trouble")
    log.close()
    assert capsys.readouterr().out.count("x: trouble") == 1


@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.98])
def test_one_flipped_bit_shows(gpt, tmp_path, where):
    """Wherever it is: in the header of the file or among its numbers."""
    save_state(tmp_path, 4, [gpt], [], best=0.25)
    path = tmp_path / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="state.safetensors"):
        load_state(tmp_path, [gpt], [])


@pytest.mark.parametrize("field, value", [
    ("num_hidden_layers", 10 ** 9), ("hidden_size", 10 ** 8), ("head_dim", 2 ** 30), ("vocab_size", -5), ("num_key_value_heads", 0),
    ("rms_norm_eps", "small"), ("intermediate_size", 1.5), ("rope_theta", None), ("tie_word_embeddings", 1)])
def test_absurd_numbers_in_a_config_are_refused_without_memory(gpt, tmp_path, field, value):
    gpt.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=str(tmp_path)):
        GPT.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000                # kB