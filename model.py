"""A small GPT over one joint text/image vocabulary, and the plumbing every program here shares.

    from model import GPT
    gpt = GPT.from_pretrained("out/sft")           # or any Qwen3 folder
    logits = gpt(ids)                              # (B, T) -> (B, T, V)

Part 1 is the lesson, to be read in order: exactly Qwen3's arithmetic and parameter names (arXiv:2505.09388),
so the folders written here open unchanged in `transformers`. RMSNorm before each sublayer, rotary positions
(RoPE, arXiv:2104.09864), an RMSNorm on every query and key head, grouped-query attention (arXiv:2305.13245),
SwiGLU (arXiv:2002.05202). Images and text are both just ids to it: sft.py decides which is which.
Part 2 is for consultation, part 1 calls into it (UserError, refuse, load_folder …): flags, device, processes, optimizers,
folders on disk, log; last LoRA (arXiv:2106.09685), thin matrices trained beside frozen ones, written as PEFT writes it.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partialmethod, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- Part 1, the lesson: the model ---------------------------------------------------------------

@dataclass
class GPTConfig:
    """Shape of the model under Qwen3's own field names, since config.json is read by others."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int = 2        # fewer than num_attention_heads: heads share keys and values
    head_dim: int = 64
    max_position_embeddings: int = 256  # longest sequence the model is trained for, in tokens
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True    # the output head is the embedding matrix
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    # ours; other tools carry these along unread
    image_token_start: int | None = None  # id of image code 0; ids below are text and specials
    vqgan_hash: str = ""                  # the vqgan (image tokenizer) that this model was trained with
    data: str = ""                        # what it was trained on: a folder, or "phantoms" and their bias
    tasks: str = ""                       # the tasks it was trained for, joined by blanks; "": not known
    structures: str = ""                  # the structures it was trained to draw the masks of, joined by ", "

    def __post_init__(self):
        if not self.num_key_value_heads or self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                            f"num_key_value_heads {self.num_key_value_heads}")


def rotary(positions, head_dim, theta):
    """[cos, cos] and [−sin, sin], each (B, 1, T, head_dim), of the RoPE angles at integer positions (B, T)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angle = positions[:, None, :, None].float() * frequency      # (B, 1, T, head_dim/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i+D/2}) of x (..., D) by its position's angle (Qwen3's pairs); cos and sin broadcast to x."""
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).to(x.dtype)


def causal_mask(T, device):
    """(T, T): -inf above the diagonal, 0 elsewhere."""
    return torch.full((T, T), float("-inf"), device=device).triu(1)


class Attention(nn.Module):
    """Grouped-query attention with an RMSNorm on each query and key head."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)      # x / rms(x) · weight
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None):
        """x (B, T, hidden_size); cos, sin (1 or B, 1, T, head_dim). mask (1 or B, 1, T, T): what is added to scores, -inf where
        query t (dim 2) may not see key s (dim 3); by default it sees no later one (causal)."""
        B, T, _ = x.shape
        heads = lambda y: y.view(B, T, -1, self.head_dim)                     # (B, T, nh, D)
        normed = lambda norm, y: norm(heads(y).float()).to(y.dtype).transpose(1, 2)      # autocast: y is bfloat16
        scale = self.head_dim ** -0.5     # 1/√D of the scores; put on cos and sin, the smallest tensors
        q = rotate(normed(self.q_norm, self.q_proj(x)), cos * scale, sin * scale)        # (B, nh, T, D)
        k = rotate(normed(self.k_norm, self.k_proj(x)), cos, sin)                        # (B, nkv, T, D)
        v = heads(self.v_proj(x)).transpose(1, 2)
        if self.groups > 1:
            k, v = (y.repeat_interleave(self.groups, dim=1) for y in (k, v))  # nkv -> nh
        if x.is_cuda:
            mask = None if mask is None else mask.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=1.0)
        else:                             # written out: SDPA's backward is slow on CPUs (tests/bench.py)
            mask = causal_mask(T, x.device) if mask is None else mask
            scores = q @ k.mT + mask.to(q.dtype)                              # (B, nh, T, T)
            y = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, blocks and last norm: ids (B, T) to hidden states (B, T, hidden_size)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)                # GPT draws its numbers, or they are loaded
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids, positions=None, mask=None):
        """positions (B, T), by default 0, 1, 2, …; mask: see Attention. Both are for rows that `join` made one."""
        positions = torch.arange(ids.size(1), device=ids.device)[None] if positions is None else positions
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, cos, sin, mask)
        return self.norm(x)


class GPT(nn.Module):
    """Qwen3ForCausalLM: `gpt(ids)` maps ids (B, T) to logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False        # training: drop activations; the backward pass computes them again
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2 and not p.is_meta:   # matrices that write to the residual stream start smaller (GPT-2)
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * config.num_hidden_layers) if writes else 1))

    @property
    def device(self):
        return self.model.norm.weight.device

    def head(self, h):
        """Hidden states (..., hidden_size) to logits (..., V)."""
        table = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(h, table.weight)

    def forward(self, ids):
        return self.head(self.model(ids))

    def tables(self):
        """The layers with a row per token, by name: the embedding, and the head where it is not the same matrix."""
        names = ["model.embed_tokens"] + ([] if self.config.tie_word_embeddings else ["lm_head"])
        return {name: self.get_submodule(name) for name in names}

    def grow(self, first, size):
        """Give the tables at least `size` rows; those from `first` on start afresh, spare rows of a larger table too.

        They start at the mean of the old rows, about as likely as an average token, and a tenth of the old rows'
        spread apart, so that they can come to differ."""
        for table in self.tables().values():
            old = table.weight.detach()[:first]
            fresh = torch.randn(max(size, len(table.weight)) - first, old.size(1), device=old.device)
            table.weight = nn.Parameter(torch.cat([old, old.mean(dim=0) + 0.1 * old.std(dim=0) * fresh]))
        self.config.vocab_size = len(self.model.embed_tokens.weight)

    def config_json(self):
        """config.json: GPTConfig's fields, and what else readers of Qwen3 look for."""
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
                "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
                "torch_dtype": "float32", **dataclasses.asdict(self.config)}

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, as transformers reads them; LoRA's adapters are merged in."""
        save_folder(folder, self.config_json(), merged_state(self))

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """Read a Qwen3 folder: written here (an adapter is merged into its base), or by transformers, sharded or not.

        Raises UserError for another architecture, and for what this file lacks of Qwen3's: stretched positions, other
        activations, sliding windows."""
        if (Path(folder) / "adapter_config.json").exists():
            return load_adapter(folder).to(device)
        config, tensors = load_folder(folder, "sft.py" if Path(folder).name == "sft" else "dpo.py", ("model_type", "qwen3"))
        with refuse(f"{folder}/config.json describes no model", "bring back the one it came with"):
            rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
            known = {"rope_type": "default", "hidden_act": "silu", "use_sliding_window": False}
            given = {**config, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
            if (found := {k: given.get(k, v) for k, v in known.items()}) != known:
                raise UserError(f"{folder}/config.json says {found}, and this file implements only {known}")
            # Qwen3's own defaults for what an old config.json leaves out, which are not all ours
            config = {"rope_theta": rope.get("rope_theta", 10000.0), "head_dim": 128, "tie_word_embeddings": False, **config}
            if isinstance(config.get("eos_token_id"), list):
                config["eos_token_id"] = None                # others stop at several; ours are set in training
            config = make_config(GPTConfig, config, folder)
            if config.num_hidden_layers > len(tensors):
                raise ValueError(f"{config.num_hidden_layers} layers of {len(tensors)} tensors")
        if config.tie_word_embeddings:            # some folders store the tied head a second time
            tensors.pop("lm_head.weight", None)
        return load_weights(lambda: cls(config), tensors, folder).to(device)


MOST_LOGITS = 2 ** 25       # held at once (128 MB); of more, pieces are computed again in the backward pass


def token_logps(model, h, targets):
    """Log-probability, in nats, of targets (n,) after hidden states h (n, hidden_size): (n,) float32.

    Filled up to a multiple of 128, as a CPU makes new kernels for each new n: that took a fifth of a step."""
    n, more = len(h), -len(h) % 128
    h, targets = F.pad(h, (0, 0, 0, more)), F.pad(targets, (0, more))
    return -F.cross_entropy(model.head(h).float(), targets, reduction="none")[:n]


class MicroBatch(NamedTuple):
    """Rows that the model reads together, and the tokens of theirs that are scored; worked out on the CPU."""

    ids: torch.Tensor                  # (R, S)
    positions: torch.Tensor | None     # (R, S), of joined rows (`join`); None: 0, 1, 2, …
    branch: torch.Tensor | None        # (R, S), of joined rows; None: plain rows
    picks: torch.Tensor                # (5, n), of each token: b and t of its logps[b, t]; row and place of ids that predict it; its id


def in_eights(length):
    """The next multiple of 8: each length needs kernels of its own."""
    return -(-length // 8) * 8


def fill(rows):
    """Lists of whole numbers as one tensor, filled up with 0."""
    table = np.zeros((len(rows), in_eights(max(map(len, rows)))), np.int64)
    for i, row in enumerate(rows):
        table[i, :len(row)] = row
    return torch.from_numpy(table)


def join(families):
    """Rows that begin alike as one: what they share, then each one's own rest; a rest sees the shared part and itself.

    An image is most of a sequence, and a pair asks much of the same image: read once, it costs once (for DPO
    arXiv:2410.20305). families: lists of rows, a row a list of ids. Returns ids, positions and branch (F, S), branch being 0 in
    what is shared, else the row's number within its family, from 1; and for each row, family after family: its family (B,) and
    its tokens' places (B, T)."""
    joined, family, places = [], [], []
    for f, rows in enumerate(families):
        shared = len(os.path.commonprefix(rows))                      # of any sequences, whatever its name
        ids, positions, branch = rows[0][:shared], list(range(shared)), [0] * shared
        for number, row in enumerate(rows, 1):
            rest = row[shared:]
            family.append(f)
            places.append([*range(shared), *range(len(ids), len(ids) + len(rest))])
            ids += rest
            positions += range(shared, len(row))
            branch += [number] * len(rest)
        joined.append((ids, positions, branch))
    return *map(fill, zip(*joined)), torch.tensor(family), fill(places)


def branch_mask(branch):
    """The mask (F, 1, S, S) that Attention adds to the scores of joined rows: -inf for later tokens, and for others' rests."""
    others = (branch[:, None] != branch[:, :, None]) & (branch[:, None] != 0)      # (F, query, key): key in another's rest
    return causal_mask(branch.size(1), branch.device).masked_fill(others, float("-inf"))[:, None]


def split_batch(ids, labels, device, families=None, size=None):
    """Cut ids and labels (B, T) into the MicroBatches that per_token_logps reads one after the other, for a model on this device.

    Rows of like length go together, `size` at a time, cut to about their length: else a third would be padding. By default
    16, which fits a CPU's cache, on a GPU 64. families: lists of rows that begin alike, each row in one; each goes through as
    one (`join`) and counts as one. Here a row is named by its number."""
    size = size or (64 if torch.device(device).type == "cuda" else 16)
    lengths = (ids.size(1) - (labels.flip(1) != -100).int().argmax(dim=1)).tolist()        # up to the last response token
    families_or_rows = sorted(families or [[i] for i in range(len(ids))], key=lambda rows: sum(lengths[i] for i in rows))
    result = []
    for start in range(0, len(families_or_rows), size):
        together = families_or_rows[start:start + size]
        part = [i for rows in together for i in rows]
        end = min(in_eights(max(lengths[i] for i in part)), ids.size(1))
        labelled = labels[part, 1:end]                              # position t predicts token t + 1
        b, t = (labelled != -100).nonzero(as_tuple=True)
        if families:
            *inputs, family, places = join([[ids[i, :lengths[i]].tolist() for i in rows] for rows in together])
            predicts = family[b], places[b, t]
        else:
            inputs, predicts = (ids[part, :end], None, None), (b, t)
        result.append(MicroBatch(*inputs, torch.stack([torch.tensor(part)[b], t, *predicts, labelled[b, t]])))
    return result


def response_logps(model, ids, positions, branch, rows, places, targets):
    """Log-probabilities (n,) of targets (n,), which are predicted at these rows and places (n,) of ids (R, S)."""
    h = model.model(ids, positions, None if branch is None else branch_mask(branch))[rows, places]      # (n, hidden_size)
    most = max(1, MOST_LOGITS // model.config.vocab_size // 128) * 128
    if len(h) <= most:
        return token_logps(model, h, targets)
    return torch.cat([checkpoint(token_logps, model, *p, use_reentrant=False) for p in zip(h.split(most), targets.split(most))])


def per_token_logps(model, ids, labels, micro_batches=None):
    """Log-probability of each response token, in nats, given everything before it.

    ids (B, T); labels (B, T): the ids again inside the response, -100 elsewhere. The shift by one happens here. Returns
    (B, T-1) float32, 0 outside the response; its sum over dim 1 is the sequence log-probability. Uniform logits give -log(V)
    a token. Only response positions pass the output head: with short answers after long prompts that saves most of its cost.
    micro_batches: what split_batch made of ids and labels, if it has been called ahead."""
    logps = torch.zeros(len(ids), ids.size(1) - 1, device=model.device)
    for micro_batch in split_batch(ids.cpu(), labels.cpu(), model.device) if micro_batches is None else micro_batches:
        *inputs, picks = (x if x is None else to_device(x, model.device) for x in micro_batch)
        b, t, *scored = picks
        args = model, *inputs, *scored
        found = checkpoint(response_logps, *args, use_reentrant=False) if model.recompute else response_logps(*args)
        logps = logps.index_put((b, t), found)
    return logps


def sequence_logps(model, ids, labels):
    """log π(response | prompt) of each row, in nats: summed over its tokens, not averaged. (B,)"""
    return per_token_logps(model, ids, labels).sum(dim=1)


class CachedGPT:
    """The GPT for sampling: it keeps the keys and values of all that was read, and answers for the next token alone.

    On few rows a step takes as long as it has operations, whatever their size, so q, k and v are merged into one product,
    gate and up into another. Prompts are padded on the left, so that all rows go on at one index."""

    def __init__(self, model, prompts, rows, max_new_tokens, allowed):
        """prompts: lists of ids, to be read once each; rows: how many will go on from them (`keep`); allowed (low, high): the
        ids whose logits are computed. Under autocast to bfloat16 a CPU uses it only in products of 32 rows or more: elsewhere
        the casts cost more than they save."""
        config, device = model.config, model.device
        half = torch.is_autocast_enabled(device.type)
        product_dtype = torch.bfloat16 if half and (rows >= 32 or device.type == "cuda") else torch.float32
        dtype = torch.bfloat16 if half and device.type == "cuda" else torch.float32
        state = {k: v.to(product_dtype if "_proj" in k else dtype) for k, v in merged_state(model).items()}
        self.n_q, self.n_kv, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        # RMSNorm in four operations: √(mean x² + ε) is hypot(‖x‖, √(nε)) / √n, and the √n is in the weight
        floor = {n: torch.tensor((n * config.rms_norm_eps) ** 0.5, dtype=dtype, device=device)
                 for n in (config.hidden_size, config.head_dim)}
        self.rms_norm = lambda x, weight: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(floor[x.size(-1)]) * weight
        state |= {name: weight * weight.numel() ** 0.5 for name, weight in state.items() if "norm" in name}
        self.embedding, self.norm = state["model.embed_tokens.weight"], state["model.norm.weight"]
        head = self.embedding if config.tie_word_embeddings else state["lm_head.weight"]
        by_column = lambda W: W.t().contiguous().t()       # of that order a CPU multiplies few rows nearly twice as fast
        self.head = by_column(head[slice(*allowed)].to(product_dtype))
        self.layers = []
        for i in range(config.num_hidden_layers):
            part = lambda *names: torch.cat([state[f"model.layers.{i}.{name}.weight"] for name in names])
            matrix = lambda *names: by_column(part(*names))
            self.layers.append({
                "norm": part("input_layernorm"), "mlp_norm": part("post_attention_layernorm"),
                "qkv": matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": matrix("self_attn.o_proj"),
                "qk_norm": part(*["self_attn.q_norm"] * self.n_q, *["self_attn.k_norm"] * self.n_kv).view(-1, self.head_dim),
                "gate_up": matrix("mlp.gate_proj", "mlp.up_proj"), "down": matrix("mlp.down_proj")})

        T = max(map(len, prompts))
        self.prompts = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
        n_pad = torch.tensor([[T - len(p)] for p in prompts], device=device)
        steps, self.length = torch.arange(T + max_new_tokens, device=device), 0
        cos, sin = rotary((steps - n_pad).clamp(min=0), self.head_dim, config.rope_theta)
        self.cos, self.sin = cos.transpose(1, 2).to(dtype), sin.transpose(1, 2).to(dtype)                      # (B, S, 1, D)
        # what is added to scores: no position looks at padding; finite, as a softmax over nothing would be NaN
        self.bias = -1e30 * (steps < n_pad)[:, None, None].to(dtype)                                           # (B, 1, 1, S)
        shape = (len(prompts), self.n_kv, len(steps), self.head_dim)
        self.k, self.v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in self.layers] for _ in "kv")

    def keep(self, rows):
        """Go on with these rows, a tensor of indices, alone; one may come more than once."""
        self.cos, self.sin, self.bias = self.cos[rows], self.sin[rows], self.bias[rows]
        self.k, self.v = [k[rows] for k in self.k], [v[rows] for v in self.v]

    def __call__(self, ids):
        """Read ids (B, T) after all that was read before; logits (B, high - low) for the token that follows.
        The arithmetic of Block and Attention, with the products merged; k and v grow by T positions."""
        with torch.autocast(ids.device.type, enabled=False):          # the weights have the right type already
            B, T = ids.shape
            product = lambda x, W: F.linear(x.to(W.dtype), W).to(x.dtype)
            start, end, n_qk = self.length, self.length + T, self.n_q + self.n_kv
            x, cos, sin, bias = self.embedding[ids], self.cos[:, start:end], self.sin[:, start:end], self.bias[..., :end]
            if T > 1:
                bias = bias + torch.full((T, end), -1e30, dtype=x.dtype, device=x.device).triu(start + 1)
            for layer, k, v in zip(self.layers, self.k, self.v):
                qkv = product(self.rms_norm(x, layer["norm"]), layer["qkv"]).view(B, T, -1, self.head_dim)
                qk = rotate(self.rms_norm(qkv[:, :, :n_qk], layer["qk_norm"]), cos, sin).transpose(1, 2)
                k[:, :, start:end], v[:, :, start:end] = qk[:, self.n_q:], qkv[:, :, n_qk:].transpose(1, 2)
                y = F.scaled_dot_product_attention(qk[:, :self.n_q], k[:, :, :end], v[:, :, :end], attn_mask=bias,
                                                   enable_gqa=self.n_q > self.n_kv)     # its own scale: 1/√D
                x = x + product(y.transpose(1, 2).reshape(B, T, -1), layer["o"])
                gate, up = product(self.rms_norm(x, layer["mlp_norm"]), layer["gate_up"]).chunk(2, dim=-1)
                x = x + product(F.silu(gate) * up, layer["down"])
            self.length = end
            return product(self.rms_norm(x[:, -1], self.norm), self.head).float()


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draw one id a row from logits (B, V); temperature 0 takes the likeliest. Returns (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        drop = p.cumsum(dim=-1) - p >= top_p        # keeps the token that crosses top_p
        drop[:, 0] = False                          # and the likeliest in any case
        logits = logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    below = logits.softmax(dim=-1).cumsum(dim=-1)               # inverse transform: the id at which it passes a uniform number
    at = torch.rand(len(logits), 1, generator=generator, device=logits.device) * below[:, -1:]
    return torch.searchsorted(below, at, right=True).squeeze(1).clamp(max=logits.size(1) - 1)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, allowed, stop_id=None, temperature=1.0, top_k=0, top_p=1.0,
             guidance=1.0, unconditional=None, seed=0, batch_size=256):
    """Continue prompts of different lengths; returns one list of new ids per prompt.

    prompts: lists of ids. allowed (low, high): only ids in low..high-1 are ever drawn, which is how an
    image position holds an image code and a text position text. stop_id ends a row and is not
    returned; without it every row gets exactly max_new_tokens. guidance s with `unconditional` (one
    emptied prompt a row) draws from uncond + s·(cond − uncond) (arXiv:2207.12598). Same call, same result."""
    guided = unconditional is not None and guidance != 1
    generator = torch.Generator(model.device).manual_seed(seed)
    done = []
    for start in range(0, len(prompts), batch_size):
        rows = [tuple(p) for p in prompts[start:start + batch_size]]
        n = len(rows)
        if guided:
            rows += [tuple(p) for p in unconditional[start:start + batch_size]]
        distinct = {row: i for i, row in enumerate(dict.fromkeys(rows))}           # a prompt that rows share is read once
        decoder = CachedGPT(model, list(distinct), len(rows), max_new_tokens, allowed)
        copies = torch.tensor([distinct[row] for row in rows], device=model.device)
        logits = decoder(decoder.prompts)[copies]
        decoder.keep(copies)
        new = torch.full((n, max_new_tokens), -1, device=model.device)
        going = torch.arange(n, device=model.device)                               # the rows that have not ended
        for t in range(max_new_tokens):
            if guided:
                cond, uncond = logits.chunk(2)
                logits = uncond + guidance * (cond - uncond)
            token = sample_token(logits, temperature, top_k, top_p, generator) + allowed[0]
            new[going, t] = token
            open_rows = (new[going] != stop_id).all(dim=1).nonzero().flatten() if stop_id is not None else going
            if len(open_rows) == 0 or t + 1 == max_new_tokens:
                break
            if len(open_rows) <= 0.75 * len(going):                                # copying pays; till then ended rows go on
                decoder.keep(torch.cat([open_rows, open_rows + len(going)]) if guided else open_rows)
                going, token = going[open_rows], token[open_rows]
            logits = decoder(torch.cat([token, token])[:, None] if guided else token[:, None])
        done += [row[:row.index(stop_id)] if stop_id in row else row for row in new.tolist()]
    return done


# ---- Part 2, for consultation: errors and flags --------------------------------------------------

class UserError(Exception):
    """What a user can get wrong: one sentence with the cause and the way out; `run` prints it."""


@contextlib.contextmanager
def refuse(what, way_out):
    """Whatever goes wrong in here is the user's to mend: UserError "WHAT (cause); WAY_OUT"."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:                # what libraries raise over a damaged file cannot be listed
        raise UserError(f"{what} ({' '.join(str(error).split())[:300]}); {way_out}")


class Stopped(BaseException):
    """SIGINT or SIGTERM, with its number; like KeyboardInterrupt no Exception, so that nothing on the way swallows it."""


def stop(signum, frame):
    """A signal's handler: a loop with a Log ends its step first; elsewhere, or if asked again after 3 s, all ends at once, or as
    soon as the batch that is being built is done."""
    log = Log.running
    if log is None or log.asked and time.time() - log.asked_at > 3:
        raise Stopped(signum)
    log.asked, log.asked_at = signum, log.asked_at or time.time()


def run(main):
    """Call a program's main(). What a user can mend becomes one line on stderr and exit status 2; SIGINT and SIGTERM end
    with a line too, and with 130 and 143, as shells expect."""
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                 # a terminal that lacks a letter shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Stopped as why:
        print("\nstopped; what was being trained goes on with --resume", file=sys.stderr)
        sys.exit(128 + why.args[0])
    except UserError as error:
        fail(error)
    except OSError as error:                               # a full disk, a folder that went away
        fail(f"{error.filename or 'its output'}: {error.strerror or error}; nothing whole is lost: mend that; training goes on "
             "with --resume")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or "Connection closed by peer" in str(error):
            fail(f"another process of this run has ended ({str(error).splitlines()[0][:100]}); what it said is the cause")
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        fail("out of memory; sft.py and dpo.py need less with --recompute, which goes on with --resume too; or start over with "
             "a smaller --batch-size")
    finally:
        Log.running = None
        for signum, handler in before.items():
            signal.signal(signum, handler)


def fail(error):
    """One line on stderr, exit status 2."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    for bar in list(getattr(tqdm, "_instances", ())):       # or they would be drawn once more, below the line
        bar.close()
    time.sleep(5 if process() > 0 else 0)      # the first process has said the same by then, and torchrun has ended this one
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def arg(default, help, least=None, most=None, **options):
    """A dataclass field that `cli` turns into a flag with this line of help.

    A number lies in least..most, by default 1..10⁹ for whole numbers and 0..10³⁰ for fractions."""
    span = zip((least, most), (1, 10 ** 9) if type(default) is int else (0, 1e30))
    least, most = (usual if own is None else own for own, usual in span)
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most, **options})


@dataclass
class RunConfig:
    """Flags every program takes."""

    preset: str = arg("small", "tiny (tests, seconds), quick (a lesson, minutes), small (the reported tables; two CPU cores) "
                      "or base (one GPU, 256x256)", choices=("tiny", "quick", "small", "base"))
    data: str = arg("", "folder of images and texts (ImageFolder metadata, ROCOv2 or LLaVA); empty: drawn phantoms")
    out: str = arg("out", "folder for everything that is written")
    seed: int = arg(0, "draws data, weights, batches and samples", least=0, most=2 ** 32 - 1)
    bias: float = arg(0.9, "phantoms: probability that a training finding brings its companion (0: no language bias)",
                      most=1)
    records: int = arg(16000, "phantoms: training records")
    modalities: int = arg(3, "phantoms: kinds of image; 1: chest radiographs, 2: head CTs too, 3: brain MRIs too", most=3)
    image_size: int = arg(64, "height and width of every image, in pixels; a multiple of 8 (quick: 4, base: 16)", most=4096)
    channels: int = arg(1, "1: gray, 3: RGB", choices=(1, 3))
    device: str = arg("auto", "auto (cuda if present), cpu, cuda or cuda:1")
    dtype: str = arg("auto", "autocast: auto (bfloat16 where the hardware has it), bfloat16 or float32",
                     choices=("auto", "bfloat16", "float32"))


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class TuneConfig(RunConfig):
    """Flags of the stages that train a GPT."""

    recompute: bool = arg(False, "keep no activations but compute them again, 64 sequences (CPU: 16) at a time: a third more "
                          "time, and a batch of any size fits into memory")
    compile: bool = arg(False, "fuse the small operations of each block (torch.compile; on a CPU it needs a C++ compiler): the "
                        "first step takes half a minute, every other one a quarter less time")
    lora_rank: int = arg(0, "rank r of LoRA's adapters; 0: train every weight", least=0)
    lora_alpha: float = arg(16.0, "scales adapters' output: alpha/r")
    lora_dropout: float = arg(0.0, "share of an adapter's inputs that training drops", most=0.99)
    lora_targets: tuple = arg(("q_proj", "v_proj"), "linear layers that get an adapter, in every block: "
                              + " ".join(LINEARS), choices=LINEARS)
    lora_merge: bool = arg(False, "write the whole model, adapters merged in, instead of the adapters alone")


SHARED_PRESETS = {"tiny": dict(records=96, image_size=32), "quick": dict(records=3000, image_size=24, modalities=1), "small": {},
                  "base": dict(records=100_000, image_size=256)}


def cli(Config, presets, argv=None, doc=None, choice=None):
    """Parse flags into a Config (a dataclass of `arg` fields): defaults, then preset, then flags given.

    presets maps a preset's name to its values; choice (a flag, {its value: defaults of other flags}) comes
    between preset and flags given. Unknown flags exit with status 2, as argparse does."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help explains every flag\n")
    for f in dataclasses.fields(Config):
        flag, options = "--" + f.name.replace("_", "-"), dict(f.metadata)
        least, most = options.pop("least"), options.pop("most")
        if options.pop("positional", False):
            parser.add_argument(f.name, nargs="*", help=options["help"])
            continue
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif f.type is tuple:
            options |= dict(nargs="+", type=type(f.default[0]), metavar=f.name.upper())
        elif f.type is not str:
            options["type"] = number_between(f.type, least, most)
        default = " ".join(map(str, f.default)) if f.type is tuple else f.default or repr(f.default)
        options["help"] += f" (default: {default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_intermixed_args(argv))                 # flags may stand between words
    preset = given.get("preset", "small")
    flag, defaults = choice or ("preset", {})
    chosen = given.get(flag, getattr(Config, flag))
    return Config(**{**SHARED_PRESETS[preset], **presets[preset], **defaults.get(chosen, {}), **given})


def number_between(kind, least, most):
    """A parser of numbers for argparse, which names the flag before what is said here."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:                     # nan is refused too: it compares false
            raise argparse.ArgumentTypeError(f"{text} is no number from {least} to {most}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def config_for(Config, cfg, **changes):
    """A Config for the stage before, with RunConfig's fields of cfg; `changes` override them."""
    shared = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(RunConfig)}
    return Config(**{**shared, **changes})


LOCKS = {}                    # path -> the open file; the system lets go of it when the process ends, however it ends


def lock(out):
    """Keep other runs out of this folder while this one lasts. Raises UserError, naming who is in it."""
    try:
        import fcntl
    except ImportError:       # Windows
        return
    path = (Path(out) / ".lock").resolve()
    if path not in LOCKS and process() == 0:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"--out {out} is in use by process {file.read().strip() or '?'}: wait for it, or name another --out")
        except OSError:       # a network disk without locks
            return
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        LOCKS[path] = file


def init_run(cfg):
    """Seed everything; return (device, autocast), autocast() being a context for forward passes."""
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with refuse(f"--device {cfg.device} cannot be used here", "try --device cpu"):
        if "TORCHELASTIC_RUN_ID" in os.environ:            # torchrun started this process
            device = join_processes(cfg, device)
        device = torch.device(device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    torch.manual_seed(cfg.seed)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")    # a CPU's kernels, one a shape: else a gigabyte of them
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        torch.cpu.get_capabilities().get("avx512_bf16", False)
    bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and native
    torch.backends.cudnn.allow_tf32 = bf16                 # else a GPU rounds float32 in convolutions
    torch.backends.cuda.enable_cudnn_sdp(False)            # it plans for each new shape, and lengths change at every step
    with refuse(f"--out {cfg.out} cannot be written", "name a folder of your own"):
        if not cfg.out or cfg.data and Path(cfg.out).resolve() == Path(cfg.data).resolve():
            raise UserError(f"--out {cfg.out!r} is {'the folder of --data' if cfg.out else 'empty'}: name a folder of its own")
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        if hasattr(cfg, "resume") and signal.getsignal(signal.SIGTERM) is stop:      # it trains, and `run` has started it
            lock(cfg.out)
    return device, lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def to_device(x, device):
    """A tensor on a device; to a GPU by pinned memory: the CPU goes on at once, else it would wait for all that the GPU still has
    to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


# ---- Several processes ---------------------------------------------------------------------------

# `torchrun --nproc-per-node 4 dpo.py`, on one machine or several. Each process takes its slice of every batch; `gather` makes
# the whole batch's figures of it, so that each computes the same loss, and `take_step` adds up the gradients. The first
# process alone writes.


def process():
    """The number of this process, 0 where there is but one."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(cfg, device):
    """Meet the other processes of torchrun, once; returns this one's device. Raises UserError where work cannot be shared."""
    if not hasattr(cfg, "resume"):
        raise UserError("only training is shared among processes; start this program without torchrun")
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"        # each has a GPU of its own
    if not dist.is_initialized():
        backend, gpu = ("cpu:gloo,cuda:nccl", torch.device(device)) if device.startswith("cuda") else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(days=1), device_id=gpu)
        if process() > 0:                                  # only the first one speaks
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    for field in ("batch_size", "rehearsal_size"):
        if getattr(cfg, field, 0) % processes():
            raise UserError(f"--{field.replace('_', '-')} {getattr(cfg, field)} is no multiple of the {processes()} processes")
    return device


def first_alone(function):
    """The same function, which does nothing in all processes but the first."""
    @wraps(function)
    def call(*args, **options):
        if process() == 0:
            function(*args, **options)
    return call


def wait():
    """Wait until all processes have come this far: what the first one has written is read next."""
    if processes() > 1:
        dist.barrier()


def own(rows):
    """This process's slice of a batch."""
    n = len(rows) // processes()
    return rows[process() * n:(process() + 1) * n]


def gather(x):
    """The rows (B, ...) of all processes' slices. Gradients reach a process's own rows alone: their sum over the processes is
    the gradient of a loss that is computed of all rows."""
    if processes() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[process()] = x
    return torch.cat(parts)


def sum_over_processes(tensors):
    """Add up tensors over all processes, in place and in one message."""
    if processes() > 1:
        whole = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(whole)
        for x, part in zip(tensors, whole.split([x.numel() for x in tensors])):
            x.copy_(part.view_as(x))


def largest_of_processes(number):
    """The largest of the processes' whole numbers; a GPU has no part in it."""
    return int(gather(torch.tensor([number])).max())


def share_out(function, items, title):
    """[function(item) of all items], each process doing a part of them; with a bar of this title.

    What they did goes from process to process of this run, and never to or from a file."""
    done = [function(item) for item in tqdm(items[process()::processes()], desc=title, unit="batch", leave=False)]
    parts = [done] * processes()
    if processes() > 1:
        dist.all_gather_object(parts, done)
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]


# ---- Optimizers, learning rate, batches ----------------------------------------------------------

def orthogonalize(M, dtype=torch.float32):
    """Matrices M (n, r, c) with every singular value moved near 1 (0.7 to 1.2): roughly U Vᵀ of each M = U S Vᵀ.

    Five Newton–Schulz iterations X ← aX + (bA + cA²)X with A = XXᵀ (Keller Jordan, 2024): matrix products alone, in dtype."""
    X = (M.mT if M.size(1) > M.size(2) else M).to(dtype)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return (X.mT if M.size(1) > M.size(2) else X).to(M.dtype)


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalized momentum of each matrix's gradient (Keller Jordan, 2024).

    The arithmetic is torch.optim.Muon's; matrices of one shape are orthogonalized as one stack, ten times faster here, and in
    dtype, which there is bfloat16."""

    def __init__(self, params, lr, weight_decay, dtype=torch.float32):
        same_shape = {}
        for p in params:
            same_shape.setdefault(p.shape, []).append(p)
        super().__init__([{"params": group} for group in same_shape.values()], dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """One step of every matrix, all of which must have a gradient."""
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grads = torch.stack([p.grad for p in params])                        # (n, r, c)
            momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(grads))
            momentum.lerp_(grads, 0.05)
            update = orthogonalize(grads.lerp(momentum, 0.95), self.dtype)       # Nesterov's look ahead
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, list(update * (lr * max(1, update.size(1) / update.size(2)) ** 0.5)))


def make_optimizers(model, lr, muon_lr, weight_decay, autocast=contextlib.nullcontext):
    """Muon, in autocast's dtype, for matrices inside blocks, AdamW for the rest.

    Muon makes each matrix's update orthogonal, which suits few steps at a high learning rate. LoRA's thin matrices
    are AdamW's, as in its paper."""
    inner, outer = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (inner if p.dim() == 2 and ".layers." in name and ".lora_" not in name else outer).append(p)
    with autocast():
        dtype = torch.bfloat16 if torch.is_autocast_enabled(model.device.type) else torch.float32
    muon = [Muon(inner, muon_lr, weight_decay, dtype)] if inner else []
    return [*muon, torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=outer[0].is_cuda)]


def train_mode(model, cfg):
    """Set a GPT to training, as the flags of TuneConfig ask. Raises UserError where nothing can be compiled."""
    model.train()
    model.recompute = cfg.recompute
    if cfg.compile:
        from torch._functorch import config as functorch
        functorch.donated_buffer = False                          # dpo.py's gradient_norms goes back through a graph twice
        with refuse("--compile does not work here", "leave it out"):      # a compiler, its headers or Triton may be missing
            torch.compile(torch.exp)(torch.zeros(1, device=model.device))
        for block in model.model.layers:
            block.compile(dynamic=True)                           # one piece of code for sequences of every length


def take_step(loss, parameters, optimizers, clip=math.inf):
    """One step of the optimizers down the loss's gradient, cut to a norm of `clip`; returns its norm before that, a float.

    With several processes the gradient is the sum of theirs. Where it is not finite no step is taken."""
    parameters = list(parameters)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    sum_over_processes([p.grad for p in parameters if p.grad is not None])
    grad_norm = nn.utils.clip_grad_norm_(parameters, clip).item()
    if math.isfinite(grad_norm):
        for optimizer in optimizers:
            optimizer.step()
    return grad_norm


def get_lr(step, steps, warmup, floor=0.05):
    """Share of the peak learning rate at a step: linear warmup (at most a fifth of all), then a cosine down to `floor`."""
    warmup = min(warmup, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizers, share):
    """Set every optimizer to `share` of the learning rate it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("peak_lr", group["lr"])


def batch_indices(n, batch_size, step, seed):
    """The indices of one batch: each epoch is its own permutation of range(n), drawn from (seed, epoch).

    A pure function of the step, so a resumed run sees what an unbroken one would have seen."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    order = {e: np.random.default_rng([seed, int(e)]).permutation(n) for e in np.unique(positions // n)}
    return np.array([order[p // n][p % n] for p in positions])


def built_ahead(build, start, steps):
    """(step, build(step)) for each step of a loop; the next is built in a thread, while this one is trained on."""
    with ThreadPoolExecutor(1) as pool:                     # which waits for what is being built, if the loop ends early
        coming = None
        for step in range(start, steps):
            batch = coming.result() if coming else build(step)
            coming = pool.submit(build, step + 1) if step + 1 < steps else None
            yield step, batch


# ---- Folders of models on disk -------------------------------------------------------------------

@first_alone
def save_folder(folder, config, tensors, name="model.safetensors", **metadata):
    """Write config.json and the tensors into folder, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / name, tensors, {"format": "pt", **metadata})
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def load_folder(folder, writer, expect):
    """config (dict) and tensors (one file or shards) of a model folder; expect (key, value) must stand in its config."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; run `python {writer}` first, or name its --out")
    with refuse(f"{folder} is no whole model folder", f"bring back what it lacks or, if trained here, train it anew: `python {writer}`"):
        config = json.loads((folder / "config.json").read_text())
        if (found := config.get(expect[0])) != expect[1]:
            raise UserError(f"{folder}/config.json says {expect[0]} {found!r}, and only {expect[1]!r} is read here: "
                            f"name a folder of that kind, as `python {writer}` writes them")
        shards = {"model.safetensors"}
        if (folder / "model.safetensors.index.json").exists():
            shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
        tensors = {}
        for shard in sorted(shards):
            tensors |= read_tensors(folder / Path(shard).name)        # a name alone: no path leaves the folder
    return config, tensors


def make_config(Config, values, folder):
    """A config dataclass from the JSON of a folder; keys that others wrote are passed over. Raises UserError."""
    fields = {f.name: f.type for f in dataclasses.fields(Config)}
    try:
        if odd := [k for k, v in values.items() if k in fields and not fits(v, fields[k])]:
            raise ValueError(f"{odd[0]} is {str(values[odd[0]])[:40]!r}")
        return Config(**{k: v for k, v in values.items() if k in fields})
    except (TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{folder}/config.json is not whole ({error}); bring back the one it came with")


def fits(value, kind):
    """Whether a value out of JSON can be that of a config's field: of its type, finite and of a size that a model may have."""
    if kind is tuple:
        return isinstance(value, list | tuple) and len(value) <= 16 and all(fits(v, int) and v > 0 for v in value)
    kind = int | float if kind is float else kind
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (not is_number or 0 <= value < 2 ** 31) and (kind is bool or not isinstance(value, bool))


def load_weights(make, tensors, folder):
    """make()'s model with copies of these tensors; a mismatch of names or sizes is the user's to mend.

    Copied, as tensors that were read are mapped to a file; made on the meta device, where a config.json costs no memory.
    (Nor may it draw normal numbers there: torch would import its compiler for them, two seconds of every start.)"""
    with refuse(f"{folder}: weights and config.json do not belong together", "bring back those that do"):
        with torch.device("meta"):
            model = make()
        tensors = {k: v.to(torch.float32 if v.is_floating_point() else v.dtype, copy=True) for k, v in tensors.items()}
        if odd := [k for k, v in tensors.items() if not v.isfinite().all()]:
            raise ValueError(f"{odd[0]} holds what is no number")
        model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def read_tensors(path):
    """All tensors of a safetensors file, as a dict. Raises ValueError where they are not those that write_tensors wrote."""
    with safe_open(path, "pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    digest = metadata.pop("digest", None)                # other hands write none
    if digest and digest != digest_of(tensors, metadata):
        raise ValueError("it is damaged")
    return tensors


def write_tensors(path, tensors, metadata):
    """Write a safetensors file beside path, then rename: a reader sees the old file or the new one. Raises OSError."""
    new = Path(f"{path}.new")
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        save_file(tensors, new, metadata={**metadata, "digest": digest_of(tensors, metadata)})
    except SafetensorError as error:
        raise OSError(0, str(error), str(path))
    put_in_place(new, path)


def digest_of(tensors, metadata):
    """Twelve hex digits of all that a safetensors file holds: one flipped bit shows."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update((tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes())
    return digest.hexdigest()[:12]


def read_metadata(path):
    """What write_tensors was told beside the tensors."""
    with safe_open(path, "pt") as f:
        return f.metadata()


def write_text(path, text):
    """Write text beside path, then rename: a reader sees the old file or the new one."""
    new = Path(f"{path}.new")
    new.write_text(text, encoding="utf-8")
    put_in_place(new, path)


def put_in_place(new, path):
    """Rename a file or a flat folder: what it holds is on the disk before that, the new name after."""
    for part in (*new.glob("*"), new):
        sync(part)
    os.replace(new, path)
    sync(Path(path).parent)


def sync(path):
    """Wait until the disk has this file, or the names in this folder: a power cut leaves nothing half."""
    with contextlib.suppress(OSError):          # some network disks and Windows cannot do it for folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(path):
    """What a JSON file holds; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def weights_hash(model):
    """Twelve hex digits that name a set of weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:12]


def folder_hash(folder):
    """Twelve hex digits that name a folder's weights: adapters or shards too."""
    digests = [digest_of(read_tensors(path), {}) for path in sorted(Path(folder).glob("*model*.safetensors"))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


# ---- States, stages and logs: what lets a killed run go on ---------------------------------------

def run_flags(cfg):
    """The flags that a continuation must share with the run it continues, as JSON gives them back."""
    free = ("out", "device", "resume", "steps", "log_every", "grad_every", "save_every", "name", "recompute", "compile")
    flags = dataclasses.asdict(cfg) | {"data": cfg.data and str(Path(cfg.data).resolve())}
    return json.loads(json.dumps({k: v for k, v in flags.items() if k not in free}))


def trained_parameters(model):
    """What training changes, as a module of its own for save_state: with LoRA a small part of the model."""
    return nn.ParameterList(p for p in model.parameters() if p.requires_grad)


@first_alone
def save_state(folder, step, models, optimizers, **progress):
    """Everything a continuation needs, in folder/state.safetensors: weights, optimizers, step, and what else is said."""
    tensors = {f"model.{i}.{k}": v for i, m in enumerate(models) for k, v in m.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": torch.as_tensor(v) for k, v in state.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensors(Path(folder) / "state.safetensors", tensors, {"progress": json.dumps({"step": step, **progress})})


def read_progress(folder):
    """What save_state was told beside the tensors: step, flags and so on."""
    return json.loads(read_metadata(Path(folder) / "state.safetensors")["progress"])


def other_flags(progress, cfg):
    """The flags, as one types them, that had other values in a run whose progress is saved."""
    flags = run_flags(cfg)
    return [f"--{k.replace('_', '-')}" for k, v in progress.get("flags", {}).items() if flags.get(k) != v]


def load_state(folder, models, optimizers):
    """Restore what save_state wrote; returns its progress, the step among it, as a dict."""
    path = Path(folder) / "state.safetensors"
    with refuse(f"{path} does not fit this run", "use the flags it was started with, or start over without --resume"):
        tensors, progress = read_tensors(path), read_progress(folder)
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for i, model in enumerate(models):
            model.load_state_dict(part(f"model.{i}."))
    for i, optimizer in enumerate(optimizers):
        state = {}
        for key, value in part(f"optimizer.{i}.").items():
            number, name = key.split(".")
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return progress


def check_resume(cfg, name, origin=()):
    """The folder whose saved state --resume goes on from, or None. Raises UserError if it is damaged, if other flags, another
    origin {what it was started from: hash} or more than --steps made it; and, with or without --resume, if check_own does."""
    check_own(cfg.out, name)
    final, partial = Path(cfg.out) / name, Path(cfg.out) / f"{name}.partial"
    source = next((f for f in (partial, final) if (f / "state.safetensors").exists()), None)
    if not (cfg.resume and source):
        return None
    with refuse(f"{source}/state.safetensors is damaged", "leave out --resume, which starts over"):
        progress = read_progress(source)
        other, step = other_flags(progress, cfg), progress["step"]
    program = f"{name}.py" if name in ("vqgan", "sft") else "dpo.py"
    if other:
        raise UserError(f"--resume: {source} was started with other values of {', '.join(other)}; go on with `python {program} "
                        "--resume` and those, or leave out --resume")
    if others := [what for what in origin if progress.get("origin", {}).get(what, origin[what]) != origin[what]]:
        raise UserError(f"--resume: {source} was started from another {' and '.join(others)}; leave out --resume")
    if step > cfg.steps:
        raise UserError(f"--resume: {source} has {step} steps behind it, --steps {cfg.steps} is less; go on with `python {program} "
                        "--resume` and as many steps or more, or leave out --resume")
    return source


@first_alone
def check_own(out, name):
    """Raise UserError where a stage would replace what is not its own: a link, or a folder with what no stage writes."""
    for folder in (Path(out) / name, Path(out) / f"{name}.partial"):
        if folder.is_symlink() or folder.is_file():
            raise UserError(f"{folder} is a link or a file, to be replaced by a folder: move it away, or name another --out or --name")
        for path in folder.iterdir() if folder.exists() else ():
            if path.is_dir() or path.suffix not in (".safetensors", ".json", ".jsonl", ".new") and path.name[0] != ".":
                raise UserError(f"{folder} is to be replaced, and holds {path.name}, which was not written here: move it away, or "
                                "name another --out or --name")


def copy_folder(source, target):
    """Copy a folder; the copy is there whole or not at all."""
    shutil.rmtree(new := Path(target).with_name(f".{Path(target).name}.copy"), ignore_errors=True)
    shutil.copytree(source, new)
    shutil.rmtree(target, ignore_errors=True)
    put_in_place(new, target)


def log_of(folder):
    """The log of a stage's folder, beside it."""
    return Path(f"{folder}.jsonl")


def begin_stage(cfg, name, models, optimizers, origin=()):
    """Where a stage writes and where it starts: (unfinished folder, progress of the state resumed or {}).

    A stage works in out/NAME.partial, with its log beside it, and renames both when they are whole (`finish_stage`). origin:
    see check_resume."""
    final, partial = Path(cfg.out) / name, Path(cfg.out) / f"{name}.partial"
    for parameter in [p for model in models for p in model.parameters()] if processes() > 1 else ():
        dist.broadcast(parameter.data, 0)                  # all begin with the first process's weights
    if source := check_resume(cfg, name, origin):
        progress = load_state(source, models, optimizers)
        wait()
        if source == final:
            first_alone(copy_folder)(final, partial)
        if process() == 0 and log_of(final).exists() and (source == final or not log_of(partial).exists()):
            shutil.copy(log_of(final), log_of(partial))
        return partial, progress
    if cfg.resume:
        tqdm.write(f"{final}: no saved step to resume from, starting at 0")
    elif process() == 0 and (partial / "state.safetensors").exists():
        kept = partial.with_name(f".{name}.unfinished")
        if not kept.exists():                                # else the older one stays: it was likely the longer at work
            if log_of(partial).exists():
                os.replace(log_of(partial), partial / "log.jsonl")
            os.replace(partial, kept)
        tqdm.write(f"starting over; until this run is done the first unfinished one lies in {kept} (to go on with it rename it {partial}, "
                   f"its log.jsonl {log_of(partial)}, and say --resume)")
    first_alone(shutil.rmtree)(partial, ignore_errors=True)
    return partial, {}


def read_log(path):
    """The rows of a JSONL log, dicts of numbers. Left out: lines that are no such row, as a kill may leave the last, and rows with a
    finite number over 1e300, too large for a plot's scale."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
            row = json.loads(line)
            if "step" in row and all(isinstance(v, int | float) and not 1e300 < abs(v) < math.inf for v in row.values()):
                rows.append(row)
    return rows


def finish_stage(cfg, name):
    """Rename out/NAME.partial and its log to out/NAME; an older out/NAME, and an unfinished run put aside, go only then."""
    final, partial, old = (Path(cfg.out) / folder for folder in (name, f"{name}.partial", f".{name}.old"))
    if process() == 0:
        for path in partial.iterdir():
            if path.name.startswith(".tmp") or path.suffix == ".new":      # of a kill while writing; .tmp… are safetensors' own
                path.unlink()
            else:
                sync(path)                     # the slow part, before the older folder goes
        if log_of(partial).exists():
            put_in_place(log_of(partial), log_of(final))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        put_in_place(partial, final)
        for gone in (old, final.with_name(f".{name}.unfinished")):
            shutil.rmtree(gone, ignore_errors=True)
    wait()


class Log:
    """A tqdm bar on screen and one JSON line a logged step in a file: `log(step, loss=…)`. It also watches over the loop:
    SIGINT and SIGTERM wait for the end of a step, steps without a finite gradient are counted.

    "seconds" counts from the loop's start, a resumed run's from where it was logged last."""

    running = None                                         # the Log of the loop that is at work

    def __init__(self, path, title, steps, start=0):
        """Lines of an earlier run from step `start` on are dropped, the rest kept."""
        self.path, self.title, self.warned = Path(path), title, set()
        self.skipped = self.in_a_row = 0                   # steps without a finite gradient
        self.asked = self.asked_at = self.stopping = 0     # the signal, when it came, and the signal once all processes know
        kept = [row for row in read_log(self.path) if row["step"] < start]
        first_alone(write_text)(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.began = time.time() - (kept[-1].get("seconds", 0.0) if kept else 0.0)
        self.bar = tqdm(total=steps, initial=start, desc=title, unit="step", dynamic_ncols=True)
        Log.running = self

    def __call__(self, step, show=(), **metrics):
        """Write all metrics; show the named ones on the bar."""
        metrics = {k: round(v.item() if isinstance(v, torch.Tensor) else float(v), 6) for k, v in metrics.items()}
        if self.skipped:
            metrics["skipped"] = self.skipped
        if process() == 0:
            with self.path.open("a") as f:
                f.write(json.dumps({"step": step, **metrics, "seconds": round(time.time() - self.began, 1)}) + "\n")
        self.bar.set_postfix({k: f"{metrics[k]:.4g}" for k in show if k in metrics}, refresh=False)

    def count(self, step, grad_norm):
        """At each step's end: count it if take_step left it out, and see whether a signal has come, to whatever process.

        Raises UserError at the fifth step in a row without a finite gradient."""
        self.bar.update()
        self.stopping = largest_of_processes(self.asked)
        self.in_a_row = 0 if math.isfinite(grad_norm) else self.in_a_row + 1
        self.skipped += self.in_a_row > 0
        if self.in_a_row == 5:
            saved = self.path.with_suffix("")              # the log is FOLDER.jsonl
            raise UserError(f"{self.title} diverged: no finite gradient in steps {step - 4} to {step}; start over with lower learning "
                            "rates" + f" (what was good last lies in {saved})" * saved.exists())

    def is_due(self, step, every):
        """Whether the state is saved after this step: after each `every` steps, the last, and for a signal; not if it has diverged."""
        return ((step + 1) % every == 0 or step + 1 == self.bar.total or bool(self.stopping)) and not self.in_a_row

    def warn(self, sign, sentence):
        """Say once that a figure looks like trouble."""
        if sign and sentence not in self.warned:
            self.warned.add(sentence)
            tqdm.write(f"{self.title}: {sentence}")

    def close(self):
        """End the watch over a loop. Raises Stopped for a signal that came after the last step was counted, too."""
        self.bar.close()
        Log.running = None
        if asked := largest_of_processes(self.asked):
            raise Stopped(asked)
        if self.in_a_row:
            raise UserError(f"{self.title} diverged: its last step had no finite gradient; start over with lower learning rates")


# ---- LoRA ----------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """W x + α/r · B A x (arXiv:2106.09685): W (out, in) is frozen, A (r, in) and B (out, r) are trained.

    B starts at 0, so that at first nothing changes."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, nn.Dropout(dropout)
        device = linear.weight.device
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.linear(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))


@dataclass
class Adapter:
    """What a model's adapters belong to: the folder of the base model, the hash of its weights, and the first row of
    its tables that nobody has taught yet (None: all are taught)."""

    folder: str
    hash: str
    first_new: int | None


def add_lora(model, cfg, base, first_new=None):
    """Freeze a GPT read from the folder `base`, and put adapters on the linear layers that cfg.lora_targets names.

    Rows of embedding and head from id first_new on are trained too: nobody has taught them anything yet. (The whole
    table is the parameter; gradients of old rows are set to 0.) Returns the Adapter that save_tuned asks for."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if name in cfg.lora_targets:
                    setattr(parent, name, LoRALinear(child, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout))
    if first_new is not None:
        old = torch.arange(first_new, device=model.device)
        for table in model.tables().values():
            table.weight.requires_grad_(True).register_hook(lambda grad: grad.index_fill(0, old, 0.0))
    return Adapter(str(Path(base).resolve()), folder_hash(base), first_new)


def merged_state(model):
    """The state_dict of a plain GPT: every adapter is multiplied out and added to its matrix."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            W, A, B = (state.pop(f"{name}.{part}.weight") for part in ("linear", "lora_A", "lora_B"))
            state[f"{name}.weight"] = W + module.scale * B @ A
    return state


@first_alone
def save_tuned(folder, model, cfg, adapter=None):
    """Write a fine-tuned GPT: the whole model, or, with adapters and without --lora-merge, only what add_lora lets train, in
    PEFT's format and names, beside the whole model's config.json."""
    if not adapter or cfg.lora_merge:
        return model.save_pretrained(folder)
    state = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    new, first = {}, adapter.first_new
    if first is not None:
        for name, table in model.tables().items():
            state[f"{name}.token_adapter.trainable_tokens_delta"] = table.weight[first:]  # PEFT's name; it holds whole rows
            new[name.split(".")[-1]] = list(range(first, len(table.weight)))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.folder,
              "r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "lora_dropout": cfg.lora_dropout, "bias": "none",
              "target_modules": list(cfg.lora_targets), "trainable_token_indices": new or None, "inference_mode": True}
    save_folder(folder, model.config_json(), {f"base_model.model.{k}": v for k, v in state.items()},
                "adapter_model.safetensors", base=adapter.hash)
    write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def load_adapter(folder):
    """The GPT of a folder of adapters that save_tuned wrote: its base, with new rows appended and adapters merged in.

    The base is looked for where it was, then beside the adapter. Raises UserError if it is gone or another one now."""
    folder = Path(folder)
    with refuse(f"{folder} holds no adapter that was written here", "train it again"):
        config, whole = (json.loads((folder / f).read_text()) for f in ("adapter_config.json", "config.json"))
        weights = folder / "adapter_model.safetensors"
        tensors = {k.removeprefix("base_model.model."): v for k, v in read_tensors(weights).items()}
        base_hash = read_metadata(weights)["base"]
        base, scale = Path(config["base_model_name_or_path"]), config["lora_alpha"] / config["r"]
        whole = make_config(GPTConfig, whole, folder)
    for place in (base, folder.parent / base.name):          # the two may have been moved together
        with contextlib.suppress(OSError, ValueError, SafetensorError):
            if folder_hash(place) == base_hash:
                break
    else:
        raise UserError(f"{folder} was trained over {base}, which is gone or another model now: bring that back, or train "
                        "the adapter again")
    state = GPT.from_pretrained(place).state_dict()
    with refuse(f"{folder}: adapters and base do not belong together", "train it again"):
        for name, tensor in tensors.items():
            if name.endswith(".lora_A.weight"):
                state[name.replace(".lora_A", "")] += scale * tensors[name.replace(".lora_A", ".lora_B")] @ tensor
            elif name.endswith(".token_adapter.trainable_tokens_delta"):
                table = name.replace("token_adapter.trainable_tokens_delta", "weight")
                state[table] = torch.cat([state[table][:whole.vocab_size - len(tensor)], tensor])
    return load_weights(lambda: GPT(whole), state, folder)
