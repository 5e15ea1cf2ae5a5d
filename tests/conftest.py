"""Shared by the tests: the tiny model, batches of its rollouts, and how to run a script as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    """Hide the GPU, if there is one, unless the tests that are marked gpu are asked for, one after the other."""
    config.on_gpu = config.getoption("markexpr") == "gpu"
    if not config.on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything has looked for a GPU
    elif config.getoption("numprocesses"):
        raise pytest.UsageError("tests on a GPU need it for themselves: pytest -n 0 -m gpu")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not config.on_gpu:
            item.add_marker(pytest.mark.skip(reason="`pytest -n 0 -m gpu` runs it"))


@pytest.fixture(scope="session")
def tiny():
    """(policy, tokenizer) of the shipped tiny model. Tests that change its weights take a copy."""
    from logprobs import load_policy

    return load_policy(str(ROOT / "tiny"), torch.device("cpu"))


@pytest.fixture
def sampler(tiny):
    return make_sampler(*tiny)


@pytest.fixture(scope="session")
def prompts(tiny):
    """Prompts of unequal lengths: sums of 3 to 6 numbers."""
    from data import encode_prompts, load_task

    examples = encode_prompts(load_task("arithmetic").test[:12], tiny[1], "plain", 64)
    prompts = [example["prompt_ids"] for example in examples]
    assert len(set(map(len, prompts))) > 1
    return prompts


@pytest.fixture
def batch(tiny, prompts):
    """Four responses to each of these prompts."""
    return make_sampler(*tiny).generate(prompts, n=4, temperature=0.8, seed=1)


def make_sampler(policy, tokenizer, stop=(), **flags):
    """The Hugging Face sampler as a script makes it, with the stop strings given."""
    import grpo
    from rollout import HFSampler

    ends = {tokenizer.eos_token_id}
    return HFSampler(grpo.Config(**flags), policy, tokenizer, ends, list(stop), Accelerator(cpu=True).autocast)


def assert_end_tokens_are_trained(batch, tokenizer) -> list[int]:
    """The end token is the last one on the mask of every response that ended; returns the rows of these responses."""
    ended = [i for i, reason in enumerate(batch.finish_reasons) if reason == "stop"]
    assert len(ended) > 10
    for i in ended:
        last = int(batch.lengths[i]) - 1
        assert batch.response_ids[i, last] == tokenizer.eos_token_id and batch.response_mask[i, last]
        assert not batch.response_mask[i, last + 1 :].any()
    return ended


def run_script(script: str, *flags, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user does."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def torchrun(n: int, *command, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script in n processes. At its end it prints "done", or where its results are.

    Under load gloo, the library by which processes talk on a CPU, sometimes aborts a process that is about to exit,
    because a thread of its own still runs. All is done by then.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    result = subprocess.run([*launch, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=500)
    at_exit = "terminate called without an active exception" in result.stderr
    is_done = "done" in result.stdout or "model, metrics and curves are in" in result.stdout
    assert not check or result.returncode == 0 or (at_exit and is_done), result.stderr[-4000:]
    return result


def outputs_with_other_hashes(program: str) -> list[str]:
    """What a program prints in two processes that differ in the hashes of their strings."""
    outputs = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        outputs.append(done.stdout)
    return outputs


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in records]


def answers(texts: list[str]):
    """What `score` reads of a batch, for responses that no sampler wrote."""
    return SimpleNamespace(
        texts=texts,
        response_ids=torch.tensor([[i, 0] for i in range(len(texts))]),
        lengths=torch.ones(len(texts), dtype=torch.long),
        finish_reasons=["stop"] * len(texts),
    )


def load_pairs(config, tokenizer, positions=None):
    """The pairs of --data as dpo.py has them."""
    from pairs import encode_pairs, read_pairs

    return encode_pairs(*read_pairs(config.data), config, tokenizer, positions)
