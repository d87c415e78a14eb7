"""Kill the chain at random moments and let it go on: it must end as if nothing had happened, to the last bit.

    python -m tests.kill --chains 20               # about a hundred kills, half an hour

Each chain is `dpo.py --preset tiny`, its control and an evaluation; up to eight times it is killed (SIGKILL) at a moment drawn
from --seed, then goes on with --resume. Weights, states, pairs, logs and figures are compared with a chain that was left alone."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from model import read_log, read_tensors  # noqa: E402

CHAIN = (["dpo.py", "--resume"], ["dpo.py", "--objective", "sft", "--resume"], ["sample.py", "--n", "40", "--reader-steps", "20"])
TINY = ["--preset", "tiny", "--dtype", "float32"]


def differences(a, b):
    """Names of the files of two folders that differ: tensors and logs by what they say, all else by its bytes."""
    def content(path):
        if path.suffix == ".safetensors":
            return {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in read_tensors(path).items()}
        if path.suffix == ".jsonl" and path.parent.name != "pairs":
            return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(path)]
        return path.read_bytes()
    names = {p.relative_to(f) for f in (a, b) for p in f.rglob("*") if p.is_file() and p.name != ".lock"}
    return sorted(str(n) for n in names if not ((a / n).exists() and (b / n).exists() and content(a / n) == content(b / n)))


def run(command, out, limit=None):
    """Run one program; killed after `limit` seconds if it takes longer. Its exit status, None for a kill, and what it said."""
    process = subprocess.Popen([sys.executable, *command, *TINY, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        _, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None, ""
    return process.returncode, said


def what_is_open(out):
    """The stage that a kill has hit, by what is half made."""
    return ", ".join(sorted(p.name for p in out.glob("*.partial"))) or "between the stages"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, hit, bad, kills = random.Random(args.seed), Counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        began = time.time()
        for command in CHAIN:
            assert run(command, alone)[0] == 0, "the chain fails when left alone"
        whole = time.time() - began
        for number in range(args.chains):
            out = Path(folder) / str(number)
            gaps = [rng.uniform(3, whole / 2) for _ in range(rng.randint(2, 8))]          # seconds from a start to a kill
            for command in CHAIN:
                status = None
                while status is None:
                    began = time.time()
                    status, said = run(command, out, max(0.1, gaps[0]) if gaps else None)
                    if status is None:
                        gaps.pop(0)
                        kills += 1
                        hit[what_is_open(out)] += 1
                    elif gaps:
                        gaps[0] -= time.time() - began
                if status != 0:
                    bad.append(f"chain {number}: {' '.join(command)} ended with {status}: {said[-300:]}")
            if found := differences(alone, out):
                bad.append(f"chain {number} differs in {found}")
            subprocess.run(["rm", "-rf", str(out)], check=True)
            print(json.dumps({"chains": number + 1, "kills": kills, "bad": len(bad), "hit": hit}), flush=True)
    print("\n".join(bad) or f"{kills} kills, {args.chains} chains: every one ended as the undisturbed one")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
