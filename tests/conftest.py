"""What the tests share: the repository root on sys.path, one thread, toy image tokenizers, one tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from model import GPT, GPTConfig  # noqa: E402


class Means:
    """A tokenizer of images: the mean of each 8x8 patch in 33 steps."""

    def encode(self, x):
        return ((F.avg_pool2d(x.mean(1, keepdim=True), 8).flatten(1) + 1) * 16).round().long()


class Blind:
    """A tokenizer that gives every image the same codes."""

    def encode(self, x):
        return torch.zeros(len(x), 4, dtype=torch.long)


def figures_of(log):
    """The rows of a JSONL log without the times, which no two runs share."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log.read_text().splitlines()]


@pytest.fixture
def tiny():
    """A config with everything unequal that may be: 4 heads share 2 keys, sizes all differ."""
    return GPTConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=8)


@pytest.fixture
def gpt(tiny):
    """A tiny GPT with weights so large that attention is sharp and the logits are far apart."""
    torch.manual_seed(0)
    model = GPT(tiny).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.0 if p.dim() == 2 else 1.0, std=0.5)
    return model


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An out/ folder with every stage of `--preset tiny`: dpo.py trains what is missing, then the control."""
    import dpo
    out = tmp_path_factory.mktemp("trained") / "out"
    dpo.main(["--preset", "tiny", "--out", str(out), "--dtype", "float32"])
    dpo.main(["--preset", "tiny", "--out", str(out), "--dtype", "float32", "--objective", "sft"])
    return out
