"""Every stage on a pretend GPU (pretend_gpu.py): the CPU's figures, no tensor left behind, and one wait a step."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo
import sft
import vqgan
from conftest import figures_of

pytestmark = pytest.mark.skipif(not shutil.which("g++") or torch.version.cuda is not None, reason="a pretend GPU needs g++ and "
                                "a PyTorch for CPUs")
FLAGS = ["--preset", "tiny", "--dtype", "float32", "--log-every", "99"]
STAGES = {"vqgan": (vqgan, *FLAGS, "--disc-start", "2", "--renew-every", "99", "--steps"), "sft": (sft, *FLAGS, "--steps"),
          "bidpo": (dpo, *FLAGS, "--grad-every", "99", "--steps")}
RUNS = {f"{name}{longer}": (*stage, steps) for name, stage in STAGES.items() for longer, steps in (("", "4"), (" longer", "8"))}


def on_gpu(*commands, first="0"):
    """Run programs one after the other in a process that has a pretend GPU; returns the finished process."""
    calls = [f"gpu.main(*{[*map(str, command), '--device', 'cuda']})" for command in commands]
    return subprocess.run([sys.executable, "-c", "; ".join(["import tests.pretend_gpu as gpu", first, *calls])],
                          cwd=Path(__file__).parents[1], capture_output=True, text=True)


@pytest.fixture(scope="module")
def gpu(trained, tmp_path_factory):
    """A folder of folders, one a run, each begun from what the CPU left of the stages before; and {run: its waits}."""
    out = tmp_path_factory.mktemp("gpu")
    for name in RUNS:
        shutil.copytree(trained, out / name, ignore=shutil.ignore_patterns(f"{name.split()[0]}*"))
    use = [("sample", "generate", "No effusion.", "--guidance", "2", "--out", out / "bidpo"),       # in bfloat16, as a GPU
           ("sample", "report", out / "bidpo/generate.png", "--temperature", "1", "--out", out / "bidpo")]       # takes by itself
    ran = on_gpu(*[(run[0].__name__, *run[1:], "--out", out / name) for name, run in RUNS.items()], *use)
    assert ran.returncode == 0, ran.stderr[-3000:]
    waits = [dict(json.loads(line)) for line in ran.stdout.splitlines() if line.startswith('[["')]
    assert len(waits) == len(RUNS) + len(use)
    return out, dict(zip(RUNS, waits))


@pytest.mark.parametrize("stage", STAGES)
def test_the_figures_are_the_cpus(gpu, trained, tmp_path, stage):
    """In float32, to the digits that attention leaves, which is written in two ways."""
    program, *flags = RUNS[stage]
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns(f"{stage}*"))
    program.main([*flags, "--out", str(tmp_path / "out")])
    rows, others = (figures_of(out / f"{stage}.jsonl") for out in (gpu[0] / stage, tmp_path / "out"))
    assert len(rows) == len(others) == 2
    for row, other in zip(rows, others):
        assert row == pytest.approx(other, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_for_its_gradients_norm_alone(gpu, stage):
    """The image tokenizer has two, the adversary's too. Beside steps: saved states, reports of validation."""
    few, more = gpu[1][stage], gpu[1][f"{stage} longer"]
    grown = {why: more.get(why, 0) - few.get(why, 0) for why in more | few}
    assert {why: n for why, n in grown.items() if n and why.split()[-1] not in ("write_tensors", "generate")} == \
        {"_local_scalar_dense model.py take_step": 8 if stage == "vqgan" else 4}


def test_it_refuses_what_a_gpu_refuses(out):
    """Else the tests above would show nothing: images that stay on the CPU end the run."""
    ran = on_gpu(("vqgan", *FLAGS, "--out", out), first="import vqgan; vqgan.to_device = lambda x, device: x")
    assert "RuntimeError: " in ran.stderr and "tensors on cuda:0 and on the CPU" in ran.stderr
