"""A few steps on a real pretrained chat model and real questions, where they are at hand.

TEST_MODEL: a Hugging Face folder such as SmolLM2-135M-Instruct's, whose padding token is its end token.
TEST_GSM8K: a JSONL file of GSM8K's questions and answers.
TEST_PAIRS: a JSONL file of preference pairs, with system prompts, such as those of Orca.
"""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import make_sampler, read_jsonl, run_script

from data import encode_prompts, load_task, resolve_template
from logprobs import load_policy

MODEL, GSM8K, PAIRS = (os.environ.get(name, "") for name in ("TEST_MODEL", "TEST_GSM8K", "TEST_PAIRS"))
needs_model = pytest.mark.skipif(not Path(MODEL, "config.json").exists(), reason="TEST_MODEL names no model folder")
needs_data = pytest.mark.skipif(not Path(GSM8K).is_file(), reason="TEST_GSM8K names no file")
needs_pairs = pytest.mark.skipif(not Path(PAIRS).is_file(), reason="TEST_PAIRS names no file")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@needs_data
def test_gsm8k_as_it_is():
    task = load_task("gsm8k", (GSM8K,))
    assert len(task.train) + len(task.test) == 7473 and len(task.test) == 512
    assert all(example["verifier"] == "number" for example in task.train)
    natalia = next(e for e in task.train + task.test if e["question"].startswith("Natalia sold clips to 48"))
    assert natalia["answer"] == "72"


@needs_model
def test_padding_token_is_the_end_token_and_the_logprobs_are_right():
    policy, tokenizer = load_policy(MODEL, torch.device("cpu"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and resolve_template(tokenizer, "auto") == "chat"
    examples = encode_prompts(load_task("arithmetic_words").test[:3], tokenizer, "chat", 512)
    sampler = make_sampler(policy, tokenizer, max_new_tokens=24)
    batch = sampler.generate([e["prompt_ids"] for e in examples], n=2, temperature=0.8, seed=0)
    with torch.no_grad():
        logp, _ = policy(batch, 0.8)
    assert (logp - batch.sampler_logp).abs().max() < 1e-3


@needs_model
@needs_data
@pytest.mark.parametrize("sampler", ["hf", pytest.param("vllm", marks=needs_vllm)])
def test_a_few_steps_on_gsm8k(tmp_path, sampler):
    out = tmp_path / "run"
    flags = ["--model", MODEL, "--task", "gsm8k", "--data", GSM8K, "--sampler", sampler, "--lr", 1e-6, "--steps", 2]
    flags += ["--prompts-per-step", 2, "--group-size", 4, "--max-new-tokens", 48, "--eval-prompts", 2, "--out", out]
    # the reward has to differ within a group for a gradient: few responses of 48 tokens are right, so reward a format
    result = run_script("grpo.py", *flags, "--rewards", "accuracy=1", "format=0.1")
    assert "<|im_start|>user" in result.stdout, "the chat template is shown"
    records = read_jsonl(out / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records[1:]:
        assert 1 <= record["response_length"] <= 48 and 0 <= record["truncated"] <= 1
        assert 0.05 < record["entropy"] < 5 and record["sampler_gap"] < 1e-3
        assert math.isfinite(record["loss"]) and record["grad_norm"] >= 0
    assert records[1]["kl"] == pytest.approx(0, abs=1e-5) and records[1]["ratio_max"] == 1
    assert (out / "model" / "model.safetensors").exists()


@needs_model
@needs_pairs
def test_dpo_on_real_pairs(tmp_path):
    out = tmp_path / "run"
    flags = ["--model", MODEL, "--data", PAIRS, "--lr", 1e-5, "--beta", 0.1, "--steps", 3, "--pairs-per-step", 4]
    flags += ["--max-prompt-tokens", 128, "--max-new-tokens", 48, "--eval-prompts", 6, "--out", out]
    result = run_script("dpo.py", *flags)
    assert "<|im_start|>system" in result.stdout and "chosen:" in result.stdout and "left out" in result.stdout
    first, *steps, last = read_jsonl(out / "metrics.jsonl")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "at first the policy is its own reference"
    assert first["eval_margin"] == 0 and last["eval_margin"] > 0 and last["eval_loss"] < math.log(2)
    assert last["eval_logp_chosen"] < -10 and 1 < last["eval_length_chosen"] <= 48
    assert (out / "model" / "model.safetensors").exists()
