"""Several processes: the whole chain under torchrun ends as it does in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from conftest import figures_of
from dpo import DPOConfig
from model import UserError, read_tensors
from sample import SampleConfig
from sft import SFTConfig


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


@pytest.mark.parametrize("config, named", [(SFTConfig(batch_size=3), "--batch-size 3"), (DPOConfig(rehearsal_size=7), "--rehearsal-size 7"),
                                           (SampleConfig(), "without torchrun")])
def test_work_that_cannot_be_shared_is_refused(monkeypatch, config, named):
    monkeypatch.setattr(model.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(model, "processes", lambda: 2)
    with pytest.raises(UserError, match=named):
        model.join_processes(config, "cpu")
