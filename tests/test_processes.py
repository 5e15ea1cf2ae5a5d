"""Several processes on a CPU (gloo): sums, shards, checkpoints, and what happens when one of them dies."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_jsonl, torchrun, without_times

from batch import split
from plumbing import processes
from plumbing.sharded import newest


def run_program(n: int, tmp_path, text: str, *arguments, check: bool = True) -> str:
    """Run this text as a program in n processes; what they print."""
    path = tmp_path / f"program{len(list(tmp_path.glob('program*')))}.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{text}")
    return torchrun(n, path, *arguments, check=check).stdout


# What the programs below share: fixed responses, of which each process has its share, and the losses of two scripts.
FIXED = """
import copy, os
import torch
from accelerate import Accelerator
import grpo, ppo
from batch import collate
from logprobs import Value, load_policy
from plumbing.processes import clip_gradients, gather, shard, sum_gradients, whole

accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
CPU = torch.device("cpu")


def fixed_batch(tokenizer):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 100, (5 + i % 3,), generator=generator).tolist() for i in range(12)]
    responses = [torch.randint(4, 100, (3 + 2 * i % 17,), generator=generator).tolist() for i in range(12)]
    batch = collate(prompts, responses, [[0.0] * len(x) for x in responses], ["stop"] * 12, tokenizer, CPU)
    batch["advantages"] = torch.randn(12, generator=generator)
    batch["old_logp"] = -3 + 0.1 * torch.randn(batch.response_mask.shape, generator=generator)
    batch["returns"] = torch.randn(batch.response_mask.shape, generator=generator)
    batch["values"] = torch.zeros(batch.response_mask.shape)
    return batch


def backward(batch, rows, policy, value=None):
    "The gradients of these rows' share of the losses of grpo.py and ppo.py."
    num_tokens = int(batch.lengths.sum())
    for micro in batch.microbatches(rows, 40):
        if value is not None:
            V = value(micro)
            loss, _ = ppo.value_loss(V, micro["values"], micro["returns"], micro.response_mask, num_tokens, 0.2)
            loss.backward()
        logp, _ = policy(micro, 1.0)
        loss, _ = grpo.policy_loss(
            logp, micro["old_logp"], micro["advantages"], micro.response_mask, 12, 0.2, 0.2, None, 0.0
        )
        loss.backward()


def largest_difference(ours, theirs):
    worst = 0.0
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            worst = max(worst, (whole(p.grad) - q.grad).abs().max().item())
    return worst
"""

GRADIENTS = (
    FIXED
    + """
sharded, lora = bool(int(sys.argv[1])), int(sys.argv[2])
policy, tokenizer = load_policy("tiny", CPU, False, lora)
batch = fixed_batch(tokenizer)
everything = torch.arange(12)
if lora:
    with torch.no_grad():
        for p in policy.trained():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
one = copy.deepcopy(policy)
value = None if lora else Value(load_policy("tiny", CPU)[0].model.base_model)
other = copy.deepcopy(value)
backward(batch, everything, one, other)
for model in (policy, value):
    if sharded and model is not None:
        shard(model)
share = everything[rank::world] if sys.argv[3] == "even" else everything[: 2 + rank] + 2 * rank
if sys.argv[3] != "even":  # of these rows only, of which the last process has more
    one.zero_grad(), other and other.zero_grad()
    backward(batch, torch.arange(5), one, other)
backward(batch, share, policy, value)
models = [(policy, one)] + ([(value, other)] if value else [])
for ours, theirs in models:
    sum_gradients(accelerator, ours.trained())
    found = largest_difference(ours.trained(), theirs.trained())
    if rank == 0:
        print("difference", found)
    norm = clip_gradients(accelerator, ours.trained(), 0.1)
    right = torch.nn.utils.clip_grad_norm_(theirs.trained(), 0.1).item()
    assert abs(norm - right) < 1e-4 * right, (norm, right)
    assert largest_difference(ours.trained(), theirs.trained()) < 1e-5
weights = dict(one.weights())
for name, x in policy.weights():
    assert torch.equal(x, weights[name]), name
accelerator.wait_for_everyone()
if rank == 0:
    print("done", flush=True)
torch.distributed.destroy_process_group()
"""
)


def differences(printed: str) -> list[float]:
    return [float(line.split()[1]) for line in printed.splitlines() if line.startswith("difference")]


@pytest.mark.parametrize("lora, sharded", [(0, 0), (0, 1), (4, 1), pytest.param(4, 0, marks=pytest.mark.slow)])
def test_gradients_of_two_processes_are_those_of_one(sharded, lora, tmp_path):
    """Policy and value network, each process with micro-batches of its own; the full norm is clipped."""
    printed = run_program(2, tmp_path, GRADIENTS, sharded, lora, "even")
    found = differences(printed)
    assert len(found) == (1 if lora else 2)
    assert max(found) < 1e-5


@pytest.mark.slow
def test_gradients_of_uneven_shares_without_shards(tmp_path):
    printed = run_program(2, tmp_path, GRADIENTS, 0, 0, "uneven")
    assert max(differences(printed)) < 1e-5


def test_parts_are_halved_until_there_are_enough():
    assert split([[1, 2, 3], [4]], 2) == [[1, 2, 3], [4]]
    assert split([[1, 2, 3], [4]], 4) == [[1], [2], [3], [4]]
    parts = split([list(range(10))], 3)
    assert len(parts) == 3 and sorted(sum(parts, [])) == list(range(10))


def test_layers_are_those_of_the_outermost_lists(tiny):
    assert processes.layers(tiny[0]) == list(tiny[0].model.model.layers)


# --- checkpoints of shards ---

TRAIN = (
    FIXED
    + """
from pathlib import Path
from plumbing.checkpoint import save_model
from plumbing.sharded import load_sharded, read_rest, save_sharded
folder, first, last, lora = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sharded = world > 1 or first > 0
policy, tokenizer = load_policy("tiny", CPU, False, lora)
value = None if lora else Value(load_policy("tiny", CPU)[0].model.base_model)
average = None if lora else load_policy("tiny", CPU)[0].requires_grad_(False)  # as the reference of family/t1.py
batch = fixed_batch(tokenizer)
for model in (policy, value, average):
    if sharded and model is not None:
        shard(model)
optimizer = torch.optim.AdamW(policy.trained(), lr=1e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0, fused=True)
objects = {"policy": policy, "optimizer": optimizer}
if value is not None:
    optimizer.add_param_group({"params": value.trained(), "lr": 1e-2})
    objects |= {"value": value, "average": average}
if first:
    assert read_rest(folder)["step"] == first
    load_sharded(folder, objects)
for step in range(first, last):
    backward(batch, torch.arange(12)[rank::world], policy, value)
    for model in [policy] + [value] * (value is not None):
        sum_gradients(accelerator, model.trained())
        clip_gradients(accelerator, model.trained(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if average is not None:
        with torch.no_grad():
            for old, new in zip(average.parameters(), policy.parameters(), strict=True):
                old.lerp_(new, 0.5)
if sharded:
    save_sharded(folder, rank == 0, objects, {"step": last})
save_model(folder, policy, tokenizer, "tiny", rank == 0)
if value is not None:
    head = whole(value.head.weight.detach())
    of_average = whole(average.model.get_input_embeddings().weight)
    if rank == 0:
        torch.save({"head": head, "average": of_average}, folder / "others.pt")
accelerator.wait_for_everyone()
if rank == 0:
    print("done", flush=True)
if world > 1:
    torch.distributed.destroy_process_group()
"""
)


def weights_of(folder) -> dict:
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    if (folder / "others.pt").exists():
        weights |= torch.load(folder / "others.pt")
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 4])
def test_a_checkpoint_of_shards_goes_on_in_any_number_of_processes(lora, tmp_path):
    """Policy, value network, optimizer: three updates in one process, or two in two and one in one to three."""
    (tmp_path / "one").mkdir()
    run_program(1, tmp_path, TRAIN, tmp_path / "one", 0, 3, lora)
    right = weights_of(tmp_path / "one")
    for n in (1, 2, 3):
        folder = tmp_path / f"{n}"
        folder.mkdir()
        run_program(2, tmp_path, TRAIN, folder, 0, 2, lora)
        assert newest(folder).name == "checkpoint" and not (folder / "checkpoint.tmp").exists()
        run_program(n, tmp_path, TRAIN, folder, 2, 3, lora)
        found = weights_of(folder)
        assert found.keys() == right.keys()
        for name, x in right.items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=1e-5, msg=f"{name} in {n} processes")


def test_a_run_killed_while_it_renames_has_its_old_checkpoint(tmp_path):
    (tmp_path / "checkpoint.old").mkdir()
    (tmp_path / "checkpoint.tmp").mkdir()
    assert newest(tmp_path).name == "checkpoint.old"


# --- whole scripts ---

SMALL = ["--eval-every", 0, "--eval-prompts", 8, "--eval-samples", 2, "--max-new-tokens", 32]
ROLLOUTS = ["--prompts-per-step", 4, "--group-size", 4, *SMALL]
PAIRS = ["--pairs-per-step", 8, "--pair-prompts", 32, *SMALL]
SCRIPTS = {
    "grpo.py": ROLLOUTS,
    "dr_grpo.py": ROLLOUTS,
    "rloo.py": ROLLOUTS,
    "ppo.py": ROLLOUTS,
    "kimi_k15.py": ROLLOUTS,
    "dpo.py": PAIRS,
    "sft.py": ["--pairs-per-step", 8, *SMALL],
}


def slow_but(quick, names):
    """All of these as parameters, those that are not quick marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("script", slow_but(("grpo.py",), SCRIPTS))
def test_every_script_in_two_processes_goes_on_to_the_bit(script, tmp_path):
    flags = SCRIPTS[script]
    if script != "grpo.py":  # sft.py's schedule depends on --steps
        torchrun(2, script, *flags, "--steps", 2, "--out", tmp_path / "run")
        records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
        assert [record["step"] for record in records] == [0, 1, 2]
        assert records[-1]["grad_norm"] > 0 and (tmp_path / "run" / "model" / "model.safetensors").exists()
        return
    torchrun(2, script, *flags, "--steps", 3, "--out", tmp_path / "whole")
    torchrun(2, script, *flags, "--steps", 1, "--out", tmp_path / "parts")
    refused = torchrun(3, script, "--resume", tmp_path / "parts", check=False).stderr
    assert "cannot be divided evenly among 3 processes" in refused
    alone = subprocess.run(
        [sys.executable, script, "--resume", tmp_path / "parts"], cwd=ROOT, capture_output=True, text=True
    )
    assert alone.returncode == 2 and "it ran in 2 processes, and goes on in as many only" in alone.stderr
    torchrun(2, script, "--resume", tmp_path / "parts", "--steps", 3)
    whole, parts = (without_times(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    assert parts[2:] == whole[2:]
    name = "model/model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "grpo.py", *ROLLOUTS, "--steps", 100000, "--out", tmp_path / "run"]
    run = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.time() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.time() < deadline and run.poll() is None
            time.sleep(0.2)
        found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
        workers = [int(pid) for pid in found if b"grpo.py" in open(f"/proc/{pid}/cmdline", "rb").read()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert run.wait(timeout=60) != 0
        assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    finally:
        run.kill()


def test_what_cannot_be_sharded_is_refused_in_one_line(tmp_path):
    for script, flags, words in [
        ("grpo.py", [], "--shard: the Hugging Face sampler needs the whole model"),  # auto would take it here
        ("grpo.py", ["--sampler", "hf"], "--shard: the Hugging Face sampler needs the whole model"),
        ("grpo.py", ["--sampler", "vllm"], "--shard: start it as torchrun"),
        ("ppo.py", ["--sampler", "vllm", "--lora-rank", 4], "--shard: not together with --lora-rank where"),
    ]:
        result = subprocess.run(
            [sys.executable, script, "--shard", *map(str, flags), "--out", tmp_path / "run"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith(words)
