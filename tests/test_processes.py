"""Several processes: the whole chain under torchrun ends as it does in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import figures_of
from model import read_tensors


def torchrun(n, *command):
    """A command in n processes of one thread each."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *map(str, command)]
    return subprocess.run(run, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=170)


def test_two_processes_learn_what_one_does(trained, tmp_path):
    """Every stage and the pairs; sums of floats in another order are all that may differ."""
    done = torchrun(2, "dpo.py", "--preset", "tiny", "--dtype", "float32", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote") == 3                                      # one process speaks
    assert (tmp_path / "pairs" / "pairs.jsonl").read_text() == (trained / "pairs" / "pairs.jsonl").read_text()
    for stage in ("vqgan", "sft", "bidpo"):
        one, two = (read_tensors(out / stage / "model.safetensors") for out in (trained, tmp_path))
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
        for a, b in zip(*(figures_of(out / f"{stage}.jsonl") for out in (trained, tmp_path)), strict=True):
            loose = {k: row.pop("d_weight", 0.0) for row, k in ((a, "one"), (b, "two"))}         # a ratio of small gradients
            assert b == pytest.approx(a, abs=1e-4, rel=1e-4), (stage, a["step"])
            assert loose["two"] == pytest.approx(loose["one"], rel=0.01)


def test_a_batch_that_cannot_be_shared_is_one_sentence(tmp_path):
    done = torchrun(2, "sft.py", "--preset", "tiny", "--batch-size", "3", "--out", tmp_path)
    ours = done.stderr.split("ChildFailedError")[0]                             # torchrun adds a table of its own
    assert done.returncode != 0 and ours.count("error: --batch-size 3") == 1 and "Stopped" not in done.stderr
