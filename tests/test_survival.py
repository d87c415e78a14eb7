"""What a run survives: signals, a second run in its folder, a full disk, damage. Kills in numbers: tests/kill.py."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import figures_of
from kill import differences
from model import read_log

ROOT = Path(__file__).parents[1]


def start(program, out, *flags, **options):
    """A program of `--preset tiny` as a process of its own, with one thread."""
    return subprocess.Popen([sys.executable, program, "--preset", "tiny", "--dtype", "float32", "--out", str(out), *flags],
                            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def begun(log):
    """Whether a loop has written to its log."""
    return bool(read_log(log))


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(trained, tmp_path, signum, status):
    first = start("vqgan.py", tmp_path)
    wait_for(lambda: begun(tmp_path / "vqgan.jsonl"), first)
    first.send_signal(signum)
    _, said = first.communicate(timeout=60)
    assert first.returncode == status and "--resume" in said and "Traceback" not in said
    assert (tmp_path / "vqgan.partial" / "state.safetensors").exists()
    second = start("vqgan.py", tmp_path, "--resume")
    assert second.communicate(timeout=60) and second.returncode == 0
    assert not differences(trained / "vqgan", tmp_path / "vqgan")
    assert figures_of(tmp_path / "vqgan.jsonl") == figures_of(trained / "vqgan.jsonl")


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    first = start("vqgan.py", tmp_path)
    wait_for(lambda: begun(tmp_path / "vqgan.jsonl"), first)
    first.send_signal(signal.SIGSTOP)
    second = start("vqgan.py", tmp_path)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2 and f"process {first.pid}" in said and said.count("\n") == 1
    first.kill()                                                        # a lock does not outlive its process
    first.communicate()
    third = start("vqgan.py", tmp_path, "--steps", "1")
    assert third.communicate(timeout=60) and third.returncode == 0


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(trained, tmp_path):
    """Files may not grow over 300 kB: the first state does not fit."""
    full = start("vqgan.py", tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    _, said = full.communicate(timeout=60)
    last = said.splitlines()[-1]
    assert full.returncode == 2 and "Traceback" not in said and last.startswith("error: ") and "state.safetensors" in last
    again = start("vqgan.py", tmp_path, "--resume")
    assert again.communicate(timeout=60) and again.returncode == 0
    assert not differences(trained / "vqgan", tmp_path / "vqgan")
