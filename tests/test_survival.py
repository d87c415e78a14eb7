"""What a run survives: signals, a second run in its folder, a full disk, damage. Kills in numbers: tests/kill.py."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dpo
import sft
import vqgan
from conftest import figures_of
from fuzz import GOOD, run_case
from kill import differences
from model import Log, Stopped, UserError, read_log, read_progress, stop

ROOT = Path(__file__).parents[1]
TINY = ["--preset", "tiny", "--dtype", "float32"]


def start(program, out, *flags, **options):
    """A program of `--preset tiny` as a process of its own, with one thread."""
    return subprocess.Popen([sys.executable, program, *TINY, "--out", str(out), *flags],
                            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def goes_on_as_if_nothing_had_happened(out, trained):
    vqgan.main([*TINY, "--out", str(out), "--resume"])
    return not differences(trained / "vqgan", out / "vqgan") and \
        figures_of(out / "vqgan.jsonl") == figures_of(trained / "vqgan.jsonl")


def test_one_run_in_a_folder_and_a_signal_ends_it_well(trained, tmp_path):
    """SIGTERM ends the step, saves and says how to go on; a second run meanwhile is told who is at work."""
    first = start("vqgan.py", tmp_path)
    wait_for(lambda: read_log(tmp_path / "vqgan.partial.jsonl"), first)
    first.send_signal(signal.SIGSTOP)
    second = start("vqgan.py", tmp_path)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2 and f"process {first.pid}" in said and said.count("\n") == 1
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 143 and "--resume" in said and "Traceback" not in said
    assert 0 < read_progress(tmp_path / "vqgan.partial")["step"] < 40
    assert goes_on_as_if_nothing_had_happened(tmp_path, trained)


def test_a_run_does_not_go_on_with_other_data(trained, monkeypatch):
    """Edited texts would bring another vocabulary under the weights of sft.py."""
    for module, name in ((vqgan, "vqgan"), (sft, "sft"), (dpo, "bidpo")):
        monkeypatch.setattr(module, "fingerprint", lambda records: "edited")
        with pytest.raises(UserError, match=f"--resume: {trained}/{name} was started from another --data or data.py; leave"):
            module.main([*TINY, "--out", str(trained), "--resume"])


def test_a_run_that_is_stopped_leaves_the_finished_one_its_log(out, monkeypatch):
    log, partial = out / "vqgan.jsonl", out / "vqgan.partial.jsonl"
    before = log.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(vqgan, "get_lr", lambda step, *rest, **options: 1e-3 / (3 - step))
        vqgan.main([*TINY, "--out", str(out), "--log-every", "1"])
    assert log.read_bytes() == before and len(read_log(partial)) == 3
    vqgan.main([*TINY, "--out", str(out), "--steps", "42", "--log-every", "1", "--resume"])                 # of the finished run
    assert log.read_bytes().startswith(before) and len(read_log(log)) == len(before.splitlines()) + 2 and not partial.exists()


@pytest.mark.parametrize("program, name", [(vqgan, "vqgan"), (sft, "sft"), (dpo, "bidpo")], ids=["vqgan", "sft", "bidpo"])
def test_what_has_diverged_never_becomes_a_model(out, program, name):
    """--resume runs the bad steps again, as they were not saved."""
    flags = ["--steps", "3", "--lr", "1e30", *["--muon-lr", "1e30"] * (program is not vqgan)]
    shutil.rmtree(out / name)
    for resume in ([], ["--resume"]):
        with pytest.raises(UserError, match=f"{name} diverged: its last step had no finite gradient"):
            program.main([*TINY, "--out", str(out), *flags, *resume])
    assert not (out / name).exists()


def test_a_signal_does_not_save_what_has_diverged(out, monkeypatch):
    """As the last step's gradient is not finite, there is no last step to go on from."""
    shutil.rmtree(out / "sft")
    monkeypatch.setattr(Log, "count", lambda self, step, norm, count=Log.count: (
        os.kill(os.getpid(), signal.SIGINT) if step == 1 else None, count(self, step, norm)))
    monkeypatch.setattr(sft, "take_step", lambda *args, **options: float("nan"))
    before = signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(Stopped):
            sft.main([*TINY, "--out", str(out), "--steps", "2"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (out / "sft.partial/state.safetensors").exists()


def test_what_must_be_refused_is_refused_before_anything_is_trained(out):
    """Other flags than the run's that goes on, and files of other hands in a folder to be replaced."""
    (out / "bidpo/notes.md").write_text("mine")
    shutil.rmtree(out / "sft")
    with pytest.raises(UserError, match="bidpo is to be replaced, and holds notes.md"):
        dpo.main([*TINY, "--out", str(out)])
    (out / "bidpo/notes.md").unlink()
    with pytest.raises(UserError, match="other values of --beta"):
        dpo.main([*TINY, "--out", str(out), "--beta", "0.3", "--resume"])
    with pytest.raises(UserError, match=r"control has 12 steps behind it, --steps 3 is less; go on with `python dpo.py --resume` and as"):
        dpo.main([*TINY, "--out", str(out), "--objective", "sft", "--steps", "3", "--resume"])
    shutil.rmtree(out / "vqgan")
    shutil.copytree(out / "control", out / "sft.partial")                 # of other flags, whatever they are
    with pytest.raises(UserError, match="--resume: .*sft.partial was started with other values"):
        sft.main([*TINY, "--out", str(out), "--resume"])
    assert not (out / "sft").exists() and not (out / "vqgan").exists()


def test_a_file_of_other_hands_in_out_pairs_stays(out):
    """Where reports are added to the pairs that are there."""
    (out / "pairs/notes.md").write_text("mine")
    with pytest.raises(UserError, match="pairs is to be replaced, and holds notes.md"):
        dpo.main([*TINY, "--out", str(out), "--objective", "napo"])
    assert (out / "pairs/notes.md").exists()


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(trained, tmp_path):
    """Files may not grow over 300 kB: the first state does not fit."""
    full = start("vqgan.py", tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    _, said = full.communicate(timeout=60)
    last = said.splitlines()[-1]
    assert full.returncode == 2 and "Traceback" not in said and last.startswith("error: ") and "state.safetensors" in last
    assert goes_on_as_if_nothing_had_happened(tmp_path, trained)


@pytest.mark.parametrize("kind, cases", [("images", 60), ("metadata", 30), ("checkpoints", 20), ("states", 20), ("commands", 30)])
def test_some_of_the_cases_of_the_fuzzer(trained, kind, cases):
    """The first of the thousands that `python -m tests.fuzz` tries."""
    ends = [run_case(kind, seed, trained) for seed in range(cases)]
    assert set(ends) <= set(GOOD)
