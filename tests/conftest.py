"""What the tests share: the repository root on sys.path, one thread, toy image tokenizers, tiny models and folders."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

import dpo  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


class Means:
    """A tokenizer of images: the mean of each 8x8 patch in 33 steps."""

    config, device = SimpleNamespace(channels=1), torch.device("cpu")

    def encode(self, x):
        return ((F.avg_pool2d(x.mean(1, keepdim=True), 8).flatten(1) + 1) * 16).round().long()


class Blind:
    """A tokenizer that gives every image the same codes."""

    config, device = SimpleNamespace(channels=1), torch.device("cpu")

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


def contents(folder):
    """{path: (size, time of the last change)} of all that a folder holds; of folders the name alone."""
    stat = lambda path: (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
    return {str(path.relative_to(folder)): stat(path) for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An out/ folder with every stage of `--preset tiny` and the control. No test may write to it: see `out`."""
    out = tmp_path_factory.mktemp("trained") / "out"
    for objective in ("bidpo", "sft"):               # the first trains the stages that are missing
        dpo.main(["--preset", "tiny", "--out", str(out), "--dtype", "float32", "--objective", objective])
    before = contents(out)
    yield out
    assert contents(out) == before, "a test wrote to the shared folder; it must take the fixture `out`"


@pytest.fixture
def out(trained, tmp_path):
    """A copy of `trained` for a test that writes."""
    return shutil.copytree(trained, tmp_path / "out")
