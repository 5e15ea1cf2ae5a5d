"""benchmarks/gpu.py at toy size on whatever it finds here; its count of FLOPs, and its estimate of memory."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_sampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import grpo
import rewards
from benchmarks import gpu
from data import Rollouts
from rollout import packed_states, token_logprobs

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
TOY = gpu.Config("toy", prompts=2, group_size=2, prompt_tokens=16, response_tokens=24, steps=2, repeats=1, sampler="hf")
FLAGS = "--size toy --prompts 2 --group-size 2 --prompt-tokens 16 --response-tokens 24 --steps 2 --repeats 1".split()


def run(*flags) -> subprocess.CompletedProcess:
    """Run the command as a user does."""
    command = [sys.executable, "benchmarks/gpu.py", *FLAGS, *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(results, table) of all parts, in this process, which leaves the modules as they were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "alone", gpu.attempt)
        for module, name in ((grpo, "make_sampler"), (grpo, "Run")):
            patch.setattr(module, name, getattr(module, name))
        patch.setattr(rewards, "REWARDS", rewards.REWARDS)
        patch.setitem(rewards.REWARDS, "noise", None)
        out = tmp_path_factory.mktemp("gpu") / "toy"
        gpu.main(replace(TOY, out=str(out)))
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


# --- the command ---


def test_every_part_is_measured_or_says_why_not(measured):
    results, table = measured
    tokens = TOY.prompts * TOY.group_size * TOY.response_tokens
    assert results["machine"]["matrix_flops"] > 1e8 and results["machine"]["device"] and results["machine"]["torch"]
    for side in ("ours", "theirs"):
        seconds = results["rollout_hf"]["seconds"][side]
        assert results["rollout_hf"]["tokens_per_second"][side] == pytest.approx(tokens / seconds)
    assert 0 < results["update"]["mfu_causal"] < results["update"]["mfu"] < 2
    step = results["step"]
    assert step["tokens"] == tokens, "every response has its full length, and none is left out of the update"
    assert 0 < step["seconds_rollout"] < step["seconds"] and 0 < step["seconds_update"] < step["seconds"]
    assert set(step["memory"]) == {"start", "push", "rollout", "sleep", "update", "other"}
    assert all(peak["total"] > 0.1 for peak in step["memory"].values())
    for name in ("rollout_vllm", "push"):
        assert results[name] == {"failed": gpu.attempt(gpu.PARTS[name], TOY, "")["failed"]}
        assert "vLLM is not in use" in results[name]["failed"]


def test_the_table_shows_all_of_it(measured):
    results, table = measured
    lines = table.splitlines()
    assert results["machine"]["device"] in table and results["machine"]["transformers"] in table
    assert results["date"] in table and results["command"] in table
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| |")]
    assert {len(row) for row in rows} == {4}
    for what in (
        "matrix product", "rollout: model.generate", "rollout: the Hugging Face sampler / model.generate",
        "update: forward", "MFU", "full step of grpo.py", "full step / ideal step", "peak memory of the", "| push",
    ):  # fmt: skip
        assert any(what in line for line in lines), what
    if not gpu.CUDA:
        assert {row[2] for row in rows if "not judged" in row[3]} == {">= 3", "<= 1.15"}


def test_targets_are_judged_on_a_gpu(measured):
    results = json.loads(json.dumps(measured[0]))
    results["machine"]["cuda"] = True
    results["config"] |= {"size": "1.5b", "response_tokens": 1024}
    for peak in results["step"]["memory"].values():
        peak["torch"] = 1.0
    results["rollout_hf"]["tokens_per_second"] = {"ours": 290.0, "theirs": 100.0}
    results["rollout_vllm"] = {"tokens_per_second": {"ours": 95.0, "theirs": 100.0, "plain": 120.0}}
    results["rollout_vllm"]["seconds"] = {"ours": 10.0, "theirs": 9.0, "plain": 8.0}
    results["push"] = {"sleep": 0.5, "wake": 0.5, "unchecked": 1.0, "checked": 2.0}
    results["update"]["mfu"], results["update"]["seconds"] = 0.41, 10.0
    results["step"] |= {"sampler": "vllm", "seconds": 22.0}
    rows = [line.strip("| ").split(" | ") for line in gpu.report(results).splitlines()]
    verdicts = {row[0].split(": ")[-1]: row[1:] for row in rows if len(row) == 4}
    assert verdicts["the Hugging Face sampler / model.generate"] == ["2.9", ">= 3", "missed"]
    assert verdicts["the vLLM sampler / llm.generate with the same requests"] == ["0.95", ">= 0.95", "met"]
    assert verdicts["the same / matrix rate (MFU)"] == ["0.41", ">= 0.4", "met"]
    assert verdicts["full step / ideal step"] == ["1.1", "<= 1.15", "met"]


def test_parts_measured_one_by_one_add_up_and_a_failure_stops_no_other(tmp_path, monkeypatch):
    out = tmp_path / "toy"
    monkeypatch.setattr(gpu, "alone", gpu.attempt)
    gpu.main(replace(TOY, out=str(out), parts=("machine",)))
    run("--out", out, "--parts", "push", "--sampler", "hf")
    results = json.loads(out.with_suffix(".json").read_text())
    assert results["machine"]["matrix_flops"] > 1e8 and "failed" in results["push"]
    assert "| push | not measured: vLLM is not in use" in out.with_suffix(".md").read_text()


def test_a_part_that_is_killed_is_reported():
    assert "ended from outside" in gpu.alone(killed, TOY, "")["failed"]
    assert gpu.attempt(broken, TOY, "") == {"failed": "ValueError: of a reason"}


def killed(config, folder):
    os._exit(9)


def broken(config, folder):
    raise ValueError("of a reason\nand a second line")


def test_no_token_ends_a_response(tiny):
    policy, tokenizer = tiny
    prompts = [tokenizer.encode("1+2+3=")] * 8
    assert make_sampler(policy, tokenizer).generate(prompts, 1, 1.0, 0).lengths.min() < 64
    batch = gpu.full_length(make_sampler(policy, tokenizer)).generate(prompts, 1, 1.0, 0)
    assert batch.lengths.tolist() == [64] * 8
    assert (batch.input_ids == tokenizer.eos_token_id).any(), "here tokens would have ended it"


# --- FLOPs ---


def test_flops_are_those_of_a_hand_count_and_of_the_operations():
    c = LlamaConfig(
        vocab_size=103, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    B, L, T = 2, 5, 20
    flops = gpu.model_flops(c, [L] * B, [T] * B)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96  # q, k and v, o, gate and up and down
    assert flops["layers"] == 6 * 3 * layer * B * (L + T)
    assert flops["head"] == 6 * 103 * 64 * B * T
    assert flops["attention"] == 3 * 3 * B * (2 + 2) * 64 * (L + T) ** 2  # scores, and the values that they mix
    twice = gpu.model_flops(c, [L] * B, [T] * 2 * B)  # two responses to each prompt
    assert twice["layers"] == 6 * 3 * layer * B * (L + 2 * T)
    assert (twice["head"], twice["attention"]) == (2 * flops["head"], 2 * flops["attention"])

    model = AutoModelForCausalLM.from_config(c)
    ids, mask = torch.randint(3, 103, (B, L + T)), torch.ones(B, T, dtype=torch.bool)
    texts = [""] * B
    batch = Rollouts(ids, torch.ones_like(ids), mask, mask.float(), torch.arange(B), texts, texts)
    model.base_model.packs = False  # this attention shows all its products, but does not pack
    with FlopCounterMode(display=False) as counter:
        token_logprobs(model, batch, 1.0)[0].sum().backward()
    assert counter.get_total_flops() == pytest.approx(sum(flops.values()), rel=0.02)


# --- memory ---


@pytest.mark.parametrize(
    "size, parameters", [("135m", 134_515_008), ("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("7b", 7_615_616_512)]
)
def test_sizes_are_those_of_the_models(size, parameters):
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(gpu.model_config(size)).num_parameters() == parameters


UPDATE = """
import psutil, torch
from benchmarks import gpu
from transformers import AutoModelForCausalLM, LlamaConfig
c = LlamaConfig(vocab_size=2000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12)
def update(model, optimizer):
    model(torch.ones(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
small = torch.nn.Linear(8, 8)  # what torch itself takes when it first computes
small(torch.ones(1, 8)).sum().backward(), torch.optim.AdamW(small.parameters(), fused=True).step()
before, memory = psutil.Process().memory_info().rss, gpu.Memory()
model = AutoModelForCausalLM.from_config(c)
update(model, torch.optim.AdamW(model.parameters(), fused=True))
memory.mark("update")
print((memory.phases["update"]["total"] * gpu.GB - before) / model.num_parameters())
"""


@pytest.mark.skipif(gpu.CUDA, reason="it measures the memory of a process on a CPU")
def test_an_update_takes_as_many_bytes_per_parameter_as_the_formula_says():
    """60 M parameters and 8 tokens: next to nothing but weights, gradients and Adam. Within 10 %."""
    output = subprocess.run([sys.executable, "-c", UPDATE], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert float(output) == pytest.approx(sum(gpu.BYTES[name] for name in ("weights", "adam", "gradients")), rel=0.1)


@pytest.mark.parametrize("layers", [2, 4])
def test_layers_keep_as_many_bytes_for_the_backward_pass_as_the_formula_says(layers):
    c = LlamaConfig(
        vocab_size=103, hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model, kept = AutoModelForCausalLM.from_config(c), {}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}

    def keep(tensor):
        if tuple(tensor.shape) not in shapes:  # weights, and their copies in bf16, are no activations
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, texts = torch.randint(103, (2, 84)), [""] * 2
    mask = torch.ones_like(ids)
    batch = Rollouts(ids, mask, mask[:, 20:].bool(), mask[:, 20:], torch.arange(2), texts, texts)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        packed_states(model.base_model, batch)
    bytes_per_token = sum(x.untyped_storage().nbytes() for x in kept.values()) / (2 * 83)  # the last one needs no state
    last_norm = 2 * 4 * c.hidden_size
    assert bytes_per_token - last_norm == pytest.approx(gpu.activation_bytes(c), rel=0.025)
    assert gpu.activation_bytes(c, checkpointing=True) < gpu.activation_bytes(c)


def test_the_committed_page_is_fresh():
    page = (ROOT / "docs" / "memory.md").read_text()
    assert page == gpu.memory_page(), "python benchmarks/gpu.py --memory-table > docs/memory.md"


def test_the_table_of_sizes_and_gpus():
    rows = [line.strip("| ").split(" | ") for line in gpu.memory_table("hf").splitlines() if " | " in line][1:]
    fits = {tuple(row[:3]): row[4:] for row in rows}
    assert len(fits) == 16 and all(len(row) == 4 for row in fits.values())
    assert fits["135m", "0", "no"] == ["fits"] * 4 and "fits" not in fits["7b", "0", "no"]
    for row in fits.values():
        assert row == sorted(row, key=lambda cell: cell == "fits"), "what fits in a GPU fits in a larger one"
    more, less = (gpu.memory_gb(gpu.model_config("0.5b"), beta, "hf") for beta in (0.04, 0.0))
    assert more["update"] - less["update"] == pytest.approx(4 * 494_032_768 / gpu.GB, rel=1e-3)
    vllm = gpu.memory_gb(gpu.model_config("0.5b"), 0.0, "vllm", gpu_gb=80)
    assert 40 < vllm["rollout"] < 50 and vllm["update"] == pytest.approx(less["update"] + 2)


# --- vLLM ---


@needs_vllm
def test_rollout_and_push_with_vllm(tmp_path):
    out = tmp_path / "toy"
    run("--out", out, "--parts", "rollout_vllm", "push", "--sampler", "vllm")
    results, table = json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()
    assert set(results["rollout_vllm"]["seconds"]) == {"ours", "theirs", "plain"}, results["rollout_vllm"]
    assert set(results["push"]) == {"sleep", "wake", "unchecked", "checked"}, results["push"]
    assert results["push"]["checked"] > results["push"]["unchecked"] > 0
    assert "the vLLM sampler / llm.generate" in table and "push of the weights, without its check" in table
