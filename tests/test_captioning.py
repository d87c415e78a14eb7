"""The captioning comparison's runner: its table by hand, and one tiny round from start to end."""

import json

from tests import captioning


def test_table_shows_mean_and_span():
    rows = captioning.table({"before": {"bleu1": [0.5]}, "full": {"bleu1": [0.6, 0.8], "trained": [1200, 1200]}}).splitlines()
    assert rows[2] == "| BLEU-1 | 0.500 | 0.700 [0.600, 0.800] |" and rows[3] == "| trained parameters | - | 1,200 |"


def test_a_tiny_round(trained, tmp_path, capsys):
    """Every method adapts the same base; LoRA writes fewer parameters; a second call trains nothing."""
    flags = ["--base", str(trained), "--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--preset", "tiny",
             "--seeds", "0", "--steps", "2", "--records", "96", "--n", "6"]
    captioning.main(flags)
    found = json.loads((tmp_path / "captioning.json").read_text())["phantoms"]
    assert list(found) == ["before", *captioning.METHODS]
    full, thin, wide = (found[m]["trained"][0] for m in captioning.METHODS)
    assert thin < wide < full and all(found[m]["memory"][0] > 50 and found[m]["step"][0] >= 0 for m in captioning.METHODS)
    assert all({"bleu1", "rouge_l", "meteor", "cider", "f1"} <= found[m].keys() for m in found)
    made = (tmp_path / "runs/phantoms-full-0/sft/model.safetensors").stat().st_mtime_ns
    captioning.main(flags)
    assert (tmp_path / "runs/phantoms-full-0/sft/model.safetensors").stat().st_mtime_ns == made
    assert "| metric | before | full | LoRA q,v | LoRA all |" in capsys.readouterr().out
