"""Shared by the tests: the tiny model, batches of its rollouts, and how to run a script as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny():
    """(policy, tokenizer) of the shipped tiny model. Tests that change its weights take a copy."""
    from logprobs import load_policy

    return load_policy(str(ROOT / "tiny"), torch.device("cpu"))


@pytest.fixture
def sampler(tiny):
    return make_sampler(*tiny)


def make_sampler(policy, tokenizer, stop=(), **flags):
    """The Hugging Face sampler as a script makes it, with the stop strings given."""
    import grpo
    from rollout import HFSampler

    ends = {tokenizer.eos_token_id}
    return HFSampler(grpo.Config(**flags), policy, tokenizer, ends, list(stop), Accelerator(cpu=True).autocast)


def run_script(script: str, *flags, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user does."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in records]
