"""benchmarks/gpu.py at toy size on whatever it finds here; its count of FLOPs, and its estimate of memory."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_sampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import grpo
import rewards
from batch import Rollouts
from benchmarks import gpu
from logprobs import Policy
from plumbing import memory
from plumbing.fail import fail
from plumbing.packing import packed_states

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
TOY = gpu.Config("toy", prompts=2, group_size=2, prompt_tokens=16, response_tokens=24, steps=2, repeats=1, sampler="hf")
FLAGS = "--size toy --prompts 2 --group-size 2 --prompt-tokens 16 --response-tokens 24 --steps 2 --repeats 1".split()


def run(*flags) -> None:
    """Run the command as a user does."""
    command = [sys.executable, "benchmarks/gpu.py", *FLAGS, *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def read_results(out: Path) -> tuple[dict, str]:
    """(results, table) that the command wrote."""
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(results, table) of all parts, in this process, which leaves the modules as they were."""
    out = tmp_path_factory.mktemp("gpu") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "alone", gpu.attempt)
        patch.setattr(grpo, "make_sampler", grpo.make_sampler)
        patch.setattr(grpo, "Run", grpo.Run)
        patch.setitem(rewards.REWARDS, "noise", None)
        gpu.main(replace(TOY, out=str(out)))
    return read_results(out)


# --- the command ---


def test_every_part_is_measured_or_says_why_not(measured):
    results, table = measured
    machine = results["machine"]
    assert machine["matrix_flops"] > 0
    assert machine["device"]
    assert machine["torch"] == torch.__version__
    for name in ("rollout_vllm", "push"):
        assert "vLLM is not in use" in results[name]["failed"]


def test_rates_are_those_of_the_seconds(measured):
    results, table = measured
    tokens = TOY.prompts * TOY.group_size * TOY.response_tokens
    rollout = results["rollout_hf"]
    for side in ("ours", "theirs"):
        assert rollout["tokens_per_second"][side] == pytest.approx(tokens / rollout["seconds"][side])
    update = results["update"]
    flops = sum(update["flops"].values())
    assert update["flops_per_second"] == pytest.approx(flops / update["seconds"])
    causal = 1 - update["flops"]["attention"] / 2 / flops  # the share that a causal kernel has to compute
    assert update["mfu"] > 0
    assert update["mfu_causal"] == pytest.approx(causal * update["mfu"])


def test_a_step_is_one_of_grpo_with_full_length_responses(measured):
    results, table = measured
    step = results["step"]
    assert step["tokens"] == TOY.prompts * TOY.group_size * TOY.response_tokens, "none is left out of the update"
    assert 0 < step["seconds_rollout"] < step["seconds"], "a part of the step"
    assert 0 < step["seconds_update"] < step["seconds"], "another one"
    assert step["memory"].keys() == {"start", "push", "rollout", "sleep", "update", "other"}
    for phase, peak in step["memory"].items():
        assert peak["total"] > 0.1, phase


def test_the_table_shows_all_of_it(measured):
    results, table = measured
    for text in (results["machine"]["device"], results["machine"]["transformers"], results["date"], results["command"]):
        assert text in table
    lines = table.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| |")]
    for row in rows:
        assert len(row) == 4
    for what in (
        "matrix product",
        "rollout: model.generate",
        "rollout: the Hugging Face sampler / model.generate",
        "update: forward",
        "MFU",
        "full step of grpo.py",
        "full step / ideal step",
        "peak memory of the",
        "| push",
    ):
        assert what in table
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
    results["update"]["mfu"] = 0.41
    results["update"]["seconds"] = 10.0
    results["step"] |= {"sampler": "vllm", "seconds": 22.0}
    verdicts = {}  # what -> measured, target, verdict
    for line in gpu.report(results).splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 4:
            verdicts[cells[0].split(": ")[-1]] = cells[1:]
    assert verdicts["the Hugging Face sampler / model.generate"] == ["2.9", ">= 3", "missed"]
    assert verdicts["the vLLM sampler / llm.generate with the same requests"] == ["0.95", ">= 0.95", "met"]
    assert verdicts["the same / matrix rate (MFU)"] == ["0.41", ">= 0.4", "met"]
    assert verdicts["full step / ideal step"] == ["1.1", "<= 1.15", "met"]


def test_parts_measured_one_by_one_add_up_and_a_failure_stops_no_other(tmp_path, monkeypatch):
    out = tmp_path / "toy"
    monkeypatch.setattr(gpu, "alone", gpu.attempt)
    gpu.main(replace(TOY, out=str(out), parts=("machine",)))
    run("--out", out, "--parts", "push", "--sampler", "hf")
    results, table = read_results(out)
    assert results["machine"]["matrix_flops"] > 0
    assert "failed" in results["push"]
    assert "| push | not measured: vLLM is not in use" in table


def test_a_part_that_is_killed_is_reported():
    assert "ended from outside" in gpu.alone(killed, TOY, "")["failed"]


def test_a_part_that_fails_gives_its_reason():
    assert gpu.attempt(broken, TOY, "") == {"failed": "ValueError: of a reason"}
    assert gpu.attempt(refusing, TOY, "") == {"failed": "use something else"}


def killed(config, folder):
    os._exit(9)


def broken(config, folder):
    raise ValueError("of a reason\nand a second line")


def refusing(config, folder):
    fail("use something else")


def test_an_unknown_part_is_a_line():
    with pytest.raises(SystemExit, match="--parts pusch: choose from machine"):
        gpu.main(replace(TOY, parts=("machine", "pusch")))


def test_no_token_ends_a_response(tiny):
    policy, tokenizer = tiny
    prompts = [tokenizer.encode("1+2+3=")] * 8
    assert make_sampler(policy, tokenizer).generate(prompts, 1, 1.0, 0).lengths.min() < 64
    batch = gpu.full_length(make_sampler(policy, tokenizer)).generate(prompts, 1, 1.0, 0)
    assert batch.lengths.tolist() == [64] * 8
    assert (batch.input_ids == tokenizer.eos_token_id).any(), "here tokens would have ended it"


# --- FLOPs ---


def batch_of(input_ids: torch.Tensor, prompt_tokens: int) -> Rollouts:
    """A batch without padding, one response to each prompt."""
    B, width = input_ids.shape
    mask = torch.ones(B, width - prompt_tokens, dtype=torch.bool)
    return Rollouts(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        response_mask=mask,
        sampler_logp=mask.float(),
        prompt_index=torch.arange(B),
        texts=[""] * B,
        finish_reasons=["length"] * B,
    )


def test_flops_are_those_of_a_hand_count_and_of_the_operations():
    c = LlamaConfig(
        vocab_size=103,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation="eager",  # shows all its products, but does not pack
    )
    B = 2
    L = 5
    T = 20
    flops = gpu.model_flops(c, [L] * B, [T] * B)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96  # q, k and v, o, gate and up and down
    assert flops["layers"] == 6 * 3 * layer * B * (L + T)
    assert flops["head"] == 6 * 103 * 64 * B * T
    assert flops["attention"] == 3 * 3 * B * (2 + 2) * 64 * (L + T) ** 2  # scores, and the values that they mix
    twice = gpu.model_flops(c, [L] * B, [T] * 2 * B)  # two responses to each prompt
    assert twice["layers"] == 6 * 3 * layer * B * (L + 2 * T)
    assert twice["head"] == 2 * flops["head"]
    assert twice["attention"] == 2 * flops["attention"]

    policy = Policy(AutoModelForCausalLM.from_config(c))
    batch = batch_of(torch.randint(3, 103, (B, L + T)), prompt_tokens=L)
    with FlopCounterMode(display=False) as counter:
        logp, _ = policy(batch, 1.0)
        logp.sum().backward()
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
small(torch.ones(1, 8)).sum().backward()
torch.optim.AdamW(small.parameters(), fused=True).step()
before = psutil.Process().memory_info().rss
peaks = gpu.Memory()
model = AutoModelForCausalLM.from_config(c)
update(model, torch.optim.AdamW(model.parameters(), fused=True))
peaks.mark("update")
print((peaks.phases["update"]["total"] * gpu.GB - before) / model.num_parameters())
"""


@pytest.mark.skipif(gpu.CUDA, reason="it measures the memory of a process on a CPU")
def test_an_update_takes_as_many_bytes_per_parameter_as_the_formula_says():
    """60 M parameters and 8 tokens: next to nothing but weights, gradients and Adam. Within 10 %."""
    output = subprocess.run([sys.executable, "-c", UPDATE], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = sum(memory.PER_WEIGHT[name] for name in ("weights", "adam", "gradients"))
    assert float(output) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("layers", [2, 4])
def test_layers_keep_as_many_bytes_for_the_backward_pass_as_the_formula_says(layers):
    c = LlamaConfig(
        vocab_size=103,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    policy = Policy(AutoModelForCausalLM.from_config(c))
    weights = set()  # the shapes of the weights and of their transposes
    for p in policy.parameters():
        weights.add(tuple(p.shape))
        weights.add(tuple(p.shape[::-1]))
    kept = {}  # place in memory -> a tensor that is there

    def keep(tensor):
        if tuple(tensor.shape) not in weights:  # weights, and their copies in bf16, are no activations
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = batch_of(torch.randint(103, (2, 84)), prompt_tokens=20)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        packed_states(policy.model.base_model, batch)
    tokens = 2 * 83  # the last token of a response needs no state
    bytes_per_token = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens
    last_norm = 2 * 4 * c.hidden_size
    assert bytes_per_token - last_norm == pytest.approx(memory.activation_bytes(c), rel=0.025)
    assert memory.activation_bytes(c, checkpointing=True) < memory.activation_bytes(c)


def test_the_committed_page_is_fresh():
    page = (ROOT / "docs" / "memory.md").read_text()
    assert page == gpu.memory_page(), "python benchmarks/gpu.py --memory-table > docs/memory.md"


def test_the_tables_of_sizes_and_gpus():
    better = ["update", "rollout, update", "rollout", "checkpointing", "fits"]
    for sampler in ("hf", "vllm"):
        for method, flags in gpu.METHODS.items():
            rows = gpu.memory_table(sampler, method, flags).splitlines()[2:]
            assert len(rows) == 4 * (len(gpu.WAYS) if sampler == "vllm" else 2)
            for row in rows:
                size, way, *cells = row.strip("| ").split(" | ")
                fits = [better.index(cell) >= 3 for cell in cells]
                assert fits == sorted(fits), "what fits in a GPU fits in a larger one"
                if size == "135m" and way == "one process" and method != "ppo.py":
                    assert all(fits)
                if size == "7b" and "shard" not in way:
                    assert any(fits) == ("lora" in way)


def test_what_a_reference_a_value_network_an_adapter_and_shards_change_in_the_estimate():
    c = gpu.model_config("0.5b")
    P = 494_032_768
    plain = memory.phases(c, "hf", False)
    assert memory.phases(c, "hf", True)["update"] - plain["update"] == pytest.approx(4 * P, rel=1e-3)
    assert memory.phases(c, "hf", False, value=True)["update"] - plain["update"] == pytest.approx(16 * P, rel=1e-3)
    adapter = memory.adapter_parameters(c, 32)
    lora = memory.phases(c, "hf", True, lora_rank=32)
    assert lora["update"] - plain["update"] == pytest.approx(2 * P + 16 * adapter - 18 * P, rel=1e-3)
    half = memory.phases(c, "hf", False, shards=2)
    gathered = 4 * (2 * memory.widths(c)[2] + c.vocab_size * c.hidden_size)
    assert half["update"] - plain["update"] == pytest.approx(gathered - 8 * P, rel=1e-3)
    vllm = memory.phases(c, "vllm", False)
    assert vllm["update"] == plain["update"] + 2 * memory.GB


# --- vLLM ---


@needs_vllm
@pytest.mark.slow
def test_rollout_and_push_with_vllm(tmp_path):
    out = tmp_path / "toy"
    run("--out", out, "--parts", "rollout_vllm", "push", "--sampler", "vllm")
    results, table = read_results(out)
    assert "failed" not in results["rollout_vllm"], results["rollout_vllm"]
    assert results["rollout_vllm"]["seconds"].keys() == {"ours", "theirs", "plain"}
    assert "failed" not in results["push"], results["push"]
    assert results["push"].keys() == {"sleep", "wake", "unchecked", "checked"}
    for name in ("unchecked", "checked"):
        assert results["push"][name] > 0
    assert "the vLLM sampler / llm.generate" in table
    assert "push of the weights, without its check" in table
