"""Speed and memory, by hand: `python -m tests.bench`. pytest does not collect this file.

Two ways of doing one thing are timed in turn, A B A B, and compared as a ratio: a busy machine slows both."""

import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Phantoms  # noqa: E402
from model import GPT, GPTConfig, generate, make_optimizers, per_token_logps  # noqa: E402
from vqgan import VQGAN, VQGANConfig, stack, to_pixels  # noqa: E402


def ratio(title, a, b, rounds=4):
    """Print the median seconds of a and of b, run in turn, and how many times faster b is."""
    times = {a: [], b: []}
    for _ in range(rounds):
        for f in (a, b):
            start = time.perf_counter()
            f()
            times[f].append(time.perf_counter() - start)
    slow, fast = (sorted(t)[len(t) // 2] for t in times.values())
    print(f"{title:<52}{slow:8.3f} s {fast:8.3f} s   x{slow / fast:.2f}")


def per_second(title, f, n):
    """Print how many of n things f makes in a second."""
    start = time.perf_counter()
    f()
    print(f"{title:<52}{n / (time.perf_counter() - start):8.0f} a second")


def main():
    """All of it; about half a minute."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1300))
    ids = torch.randint(0, 1300, (64, 128))
    labels = ids.masked_fill(torch.arange(128) < 70, -100)

    def step(bf16, whole_head=False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if whole_head:
                loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            else:
                loss = -per_token_logps(model, ids, labels).mean()
        loss.backward()

    step(True)
    ratio("training step 64x128: float32, bfloat16", lambda: step(False), lambda: step(True))
    ratio("  output head everywhere, at response positions", lambda: step(True, whole_head=True), lambda: step(True))
    optimizers = make_optimizers(model, 1e-3, 1e-3, 0.0)
    ratio("  forward and backward, Muon and AdamW", lambda: step(True), lambda: [o.step() for o in optimizers])

    q, k, v = (torch.randn(64, 2, 128, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(128, 128, dtype=torch.bool).tril()
    written = lambda: ((q @ k.transpose(-1, -2) / 8).masked_fill(~mask, float("-inf")).softmax(-1) @ v).sum().backward()
    library = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    written(), library()
    ratio("attention and its backward: SDPA, written out", library, written)

    prompts = [list(range(70))] * 64

    def without_cache():
        rows = torch.tensor(prompts)
        with torch.no_grad():
            for _ in range(32):
                rows = torch.cat([rows, model(rows)[:, -1:].argmax(-1)], dim=1)

    ratio("64 prompts of 70, 32 new tokens: no cache, cache", without_cache,
          lambda: generate(model, prompts, 32, (0, 1300), temperature=0), rounds=2)

    records = Phantoms("bench", 500)
    per_second("phantoms drawn", lambda: [records[i] for i in range(500)], 500)
    x = to_pixels(stack([records[i].image for i in range(256)], 1))
    vqgan = VQGAN(VQGANConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        per_second("images encoded", lambda: vqgan.encode(x), 256)
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GB")


if __name__ == "__main__":
    main()
