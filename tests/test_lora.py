"""--lora-rank: what is trained, what is frozen, what is saved, and that two adapters in one model do not mix."""

import copy
import json
import os

import pytest
import torch
from conftest import ROOT, make_sampler, read_jsonl, run_script, without_times
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from logprobs import Policy, Value, load_policy
from plumbing.checkpoint import save_model

CPU = torch.device("cpu")
SHORT = ["--eval-every", 0, "--eval-prompts", 8, "--eval-samples", 2, "--prompts-per-step", 4, "--max-new-tokens", 32]


def disturb(weights, scale: float = 0.1) -> None:
    """Change these parameters, so that an adapter does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in weights:
            p += scale * torch.randn(p.shape, generator=generator)


@pytest.fixture
def policy():
    return load_policy(str(ROOT / "tiny"), CPU, lora_rank=4)[0]


def log_probs(policy, batch) -> torch.Tensor:
    with torch.no_grad():
        return policy(batch, 1.0)[0]


def difference(policy, batch, expected) -> float:
    """The mean difference of log-probs, in nats per token."""
    return (log_probs(policy, batch) - expected)[batch.response_mask].abs().mean().item()


# --- what is trained ---


def test_gradients_reach_the_adapter_only(policy, batch):
    disturb(policy.trained())
    logp, _ = policy(batch, 1.0)
    logp.sum().backward()
    trained = {id(p) for p in policy.trained()}
    assert len(trained) == 2 * 7 * 2, "A and B of seven matrices in two layers"
    for p in policy.parameters():
        assert (p.grad is not None) == (id(p) in trained)
        assert p.grad is None or p.grad.abs().max() > 0
    assert sum(p.numel() for p in policy.trained()) < 0.1 * policy.model.num_parameters()


def test_the_reference_is_the_model_at_the_start_to_the_bit(policy, tiny, batch):
    start = log_probs(tiny[0], batch)
    assert torch.equal(log_probs(policy, batch), start), "an adapter changes nothing at first"
    reference = policy.reference()
    disturb(policy.trained())
    assert (log_probs(policy, batch) - start)[batch.response_mask].abs().max() > 0.1
    assert torch.equal(reference(batch, 1.0)[0], start)
    assert (log_probs(policy, batch) - start)[batch.response_mask].abs().max() > 0.1, "and the policy has it again"
    assert reference.policy is policy, "no second copy"


def test_the_same_adapter_in_every_process():
    a, b = (load_policy(str(ROOT / "tiny"), CPU, lora_rank=4)[0] for _ in range(2))
    for x, y in zip(a.trained(), b.trained(), strict=True):
        assert torch.equal(x, y)


# --- merged ---


def qwen2(tied: bool):
    """Biases, heads that share keys."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=106,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


MODELS = {
    "tiny": lambda: AutoModelForCausalLM.from_pretrained(ROOT / "tiny"),
    "tied qwen2": lambda: qwen2(True),
    "untied qwen2": lambda: qwen2(False),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=106, n_embd=64, n_layer=2, n_head=4)),  # transposed matrices
}


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name, batch, tiny, tmp_path):
    torch.manual_seed(0)
    plain = MODELS[name]()
    keys = list(plain.state_dict())
    policy = Policy(plain, lora_rank=4)
    disturb(policy.trained(), 0.03)
    expected = log_probs(policy, batch)

    weights = dict(policy.weights())
    assert list(weights) == keys, "vLLM gets the names it knows"
    exactly = copy.deepcopy(policy).double()
    plain = MODELS[name]().double()
    plain.load_state_dict(dict(exactly.weights()))
    with torch.no_grad():
        ours, theirs = (p(batch, 1.0, torch.float64)[0] for p in (exactly, Policy(plain)))
    assert (ours - theirs).abs().max() < 1e-12
    save_model(tmp_path, policy, tiny[1], base=str(ROOT / "tiny"))
    merged, _ = load_policy(str(tmp_path / "model"), CPU)
    assert difference(merged, batch, expected) < 1e-5
    assert "lora" not in " ".join(merged.model.state_dict())


def test_peft_and_the_model_flag_read_the_adapter(policy, batch, tiny, tmp_path):
    disturb(policy.trained(), 0.03)
    expected = log_probs(policy, batch)
    save_model(tmp_path, policy, tiny[1], base=str(ROOT / "tiny"))
    base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    theirs = Policy(PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload())
    assert difference(theirs, batch, expected) < 1e-5
    ours, _ = load_policy(str(tmp_path / "adapter"), CPU)
    assert difference(ours, batch, expected) < 1e-5
    assert all(p.requires_grad for p in ours.trained()), "all of it can be trained"
    again, _ = load_policy(str(tmp_path / "adapter"), CPU, lora_rank=2)  # a new adapter on top of it
    assert difference(again, batch, expected) < 1e-5


# --- two adapters in one model ---


def test_the_value_network_and_the_policy_do_not_mix(batch):
    """Gradients are those of two networks apart, also where layers are computed again in the backward pass."""
    for checkpointing in (False, True):
        policy = load_policy(str(ROOT / "tiny"), CPU, checkpointing, lora_rank=4)[0]
        value = Value(policy.model.base_model, None, checkpointing, lora_rank=4)
        apart = load_policy(str(ROOT / "tiny"), CPU, checkpointing, lora_rank=4)[0]
        other = Value(load_policy(str(ROOT / "tiny"), CPU)[0].model.base_model, None, checkpointing, lora_rank=4)
        disturb([*policy.trained(), *value.trained()])
        for ours, theirs in ((policy, apart), (value, other)):
            with torch.no_grad():
                for x, y in zip(ours.trained(), theirs.trained(), strict=True):
                    y.copy_(x)
        value(batch).sum().backward()  # as ppo.py: forward and backward of one, then of the other
        policy(batch, 1.0)[0].sum().backward()
        other(batch).sum().backward()
        apart(batch, 1.0)[0].sum().backward()
        for x, y in zip([*policy.trained(), *value.trained()], [*apart.trained(), *other.trained()], strict=True):
            assert y.grad.abs().max() > 0
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


def test_both_get_a_gradient_from_one_backward_pass(policy, batch):
    """peft freezes the adapter that is not in use, and what it had computed would get no gradient."""
    value = Value(policy.model.base_model, lora_rank=4)
    disturb([*policy.trained(), *value.trained()])
    logp, _ = policy(batch, 1.0)
    V = value(batch)
    (logp.sum() + V.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [*policy.trained(), *value.trained()])


def test_the_sampler_and_vllm_get_the_policy_after_the_value_network_had_its_turn(policy, batch, tiny, prompts):
    disturb(policy.trained(), 0.02)
    sampler = make_sampler(policy, tiny[1])
    expected = sampler.generate(prompts, n=2, temperature=1.0, seed=0)
    weights = {name: x.clone() for name, x in policy.weights()}
    value = Value(policy.model.base_model, lora_rank=4)
    disturb(value.trained())
    value(batch)
    policy.reference()(batch, 1.0)
    again = sampler.generate(prompts, n=2, temperature=1.0, seed=0)
    assert again.texts == expected.texts and torch.equal(again.sampler_logp, expected.sampler_logp)
    for name, x in policy.weights():
        assert torch.equal(x, weights[name])


def test_a_value_model_beside_an_adapter_is_refused(tmp_path):
    out = tmp_path / "run"
    result = run_script("ppo.py", "--lora-rank", 4, "--value-model", "tiny", "--out", out, check=False)
    assert result.returncode == 2 and "--value-model: with --lora-rank" in result.stderr.splitlines()[-1]


# --- runs ---


SLOW = [pytest.param(script, marks=pytest.mark.slow) for script in ("ppo.py", "dpo.py")]


@pytest.mark.parametrize("script", ["grpo.py", *SLOW])
def test_a_run_can_be_resumed_to_the_bit_and_saves_the_adapter_alone(script, tmp_path):
    short = SHORT if script != "dpo.py" else ["--pair-prompts", 32, "--pairs-per-step", 8, *SHORT[:6]]
    flags = [*short, "--lora-rank", 4, "--lr", 1e-3]
    run_script(script, *flags, "--steps", 4, "--out", tmp_path / "whole")
    run_script(script, *flags, "--steps", 2, "--out", tmp_path / "parts")
    run_script(script, "--resume", tmp_path / "parts", "--steps", 4)
    whole, parts = (without_times(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    assert [record for record in parts if record["step"] > 2] == whole[3:]
    for folder in ("model", "adapter"):
        for file in (tmp_path / "whole" / folder).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "parts" / folder / file.name).read_bytes()
    saved = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert all("lora" in name for name in saved["policy"]["trained"])
    if script == "grpo.py":
        assert whole[1]["kl"] == 0, "the policy begins as its reference"
        assert whole[2]["kl"] > 0
        trained = sum(x.numel() for x in saved["policy"]["trained"].values())
        assert (tmp_path / "whole" / "checkpoint.pt").stat().st_size < 3 * 4 * trained + 100_000


def test_a_resumed_run_whose_model_has_changed_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    model.save_pretrained(tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).write_bytes((ROOT / "tiny" / file).read_bytes())
    flags = [*SHORT, "--lora-rank", 2, "--model", tmp_path / "base", "--steps", 1, "--out", tmp_path / "run"]
    run_script("grpo.py", *flags)
    disturb(model.parameters(), 0.01)
    model.save_pretrained(tmp_path / "base")
    result = run_script("grpo.py", "--resume", tmp_path / "run", "--steps", 2, check=False)
    assert result.returncode == 2 and "--model have changed since" in result.stderr.splitlines()[-1]


def test_frozen_weights_stay_what_they_were(tmp_path):
    run_script("grpo.py", *SHORT, "--lora-rank", 4, "--lr", 1e-2, "--steps", 2, "--out", tmp_path / "run")
    before = AutoModelForCausalLM.from_pretrained(ROOT / "tiny").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert len(changed) == 14 and all("proj" in name for name in changed)


@pytest.mark.slow
def test_the_tiny_model_learns_by_an_adapter(tmp_path):
    flags = ["--lora-rank", 16, "--lr", 1e-3, "--steps", 25, "--eval-every", 0, "--eval-prompts", 64]
    run_script("grpo.py", *flags, "--out", tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["eval_pass@1"] > records[0]["eval_pass@1"] + 0.2


@pytest.mark.slow
@pytest.mark.skipif("TEST_MODEL" not in os.environ, reason="TEST_MODEL names no model")
def test_a_pretrained_model_learns_by_an_adapter(tmp_path):
    flags = ["--model", os.environ["TEST_MODEL"], "--task", "arithmetic_words:2", "--template", "plain", "--beta", 0]
    flags += ["--lora-rank", 16, "--lr", 2e-4, "--steps", 8, "--prompts-per-step", 8, "--max-new-tokens", 24]
    flags += ["--eval-every", 0, "--eval-prompts", 24, "--eval-samples", 2]
    run_script("grpo.py", *flags, "--out", tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    print(json.dumps([records[0]["eval_pass@1"], records[-1]["eval_pass@1"]]))
    assert records[-1]["eval_pass@1"] > records[0]["eval_pass@1"] + 0.3
