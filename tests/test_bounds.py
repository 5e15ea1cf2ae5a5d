"""The memory of a run with a real model is bounded by its flags, where a model is at hand (TEST_MODEL)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MODEL = os.environ.get("TEST_MODEL", "")
GSM8K = os.environ.get("TEST_GSM8K", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(MODEL, "config.json").exists(), reason="TEST_MODEL names no model folder"),
    pytest.mark.skipif(not Path(GSM8K).is_file(), reason="TEST_GSM8K names no file"),
]


def peak_gb(out: Path, *flags) -> float:
    """Peak memory of an evaluation and a step of grpo.py, in a process of its own."""
    command = [sys.executable, "grpo.py", "--model", MODEL, "--task", "gsm8k", "--data", GSM8K, "--out", out]
    command += ["--steps", 1, "--max-new-tokens", 32, "--prompts-per-step", 2, "--group-size", 4, "--lr", 1e-6, *flags]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss / 2**20


def test_an_evaluation_and_a_step_stay_within_the_bound(tmp_path):
    """Weights, gradients, Adam and the reference of SmolLM2-135M take 2.7 GB, the libraries some .5.

    A token of the cache takes 46 kB, half of it again as room: 4,096 take .3 GB. 16 x 8 responses of some 150 tokens
    with their prompts would take 1.3 GB at once.
    """
    evaluation = ["--eval-prompts", 16, "--eval-samples", 8]
    bounded = peak_gb(tmp_path / "bounded", *evaluation, "--sampler-tokens", 4096, "--tokens-per-microbatch", 1024)
    print(f"peak {bounded:.1f} GB")
    assert bounded < 4.0
