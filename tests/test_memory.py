"""Memory: log-probs of a vocabulary of 151,936, and gradient checkpointing, change no value and no gradient."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_sampler, read_jsonl, without_times
from transformers import LlamaConfig, LlamaForCausalLM

import grpo
from logprobs import load_policy

# Run in a process of its own, whose peak of resident memory is then that of one way of computing. The body of the model
# is one embedding, so that nothing but the LM head has a size.
MEASURE = """
import json, re, sys
import torch
from batch import Rollouts
from logprobs import token_logprobs
from types import SimpleNamespace

way, tokens = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
class Body(torch.nn.Embedding):
    config = SimpleNamespace(_attn_implementation="eager", get_text_config=lambda: None)  # not packed

    def forward(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=super().forward(input_ids))

body, head = Body(64, 32), torch.nn.Linear(32, 151_936, bias=False)
model = SimpleNamespace(base_model=body, get_output_embeddings=lambda: head)
ids = torch.randint(64, (8, 1 + tokens // 8))
mask = torch.ones(8, tokens // 8, dtype=torch.bool)
batch = Rollouts(ids, torch.ones_like(ids), mask, mask * 0.0, torch.arange(8), [""] * 8, ["stop"] * 8)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MiB
before = peak()
bonus = "entropy" in way  # whether the entropy is in the loss too
if "plain" in way:
    log_p = (head(body(ids[:, :-1]).last_hidden_state) / 0.7).log_softmax(-1)  # [B, T, V]
    logp = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    with torch.set_grad_enabled(bonus):
        entropy = -(log_p.exp() * log_p).sum(-1)
else:
    logp, entropy = token_logprobs(model, batch, 0.7, entropy_gradient=bonus)
weights = torch.linspace(-1, 1, logp.numel()).view_as(logp)
(logp * weights + bonus * entropy * weights.flip(1)).sum().backward()
sums = [x.double().sum().item() for x in (logp, entropy)]
norms = [x.double().norm().item() for x in (logp, entropy, body.weight.grad, head.weight.grad)]
print(json.dumps({"peak": peak() - before, "numbers": sums + norms}))
"""


def measure(way: str, tokens: int) -> dict:
    command = [sys.executable, "-c", MEASURE, way, str(tokens)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_logits():
    plain, ours, longer = measure("plain", 640), measure("ours", 640), measure("ours", 1920)
    assert ours["numbers"] == pytest.approx(plain["numbers"], rel=1e-4)
    logits = 640 * 151_936 * 4 / 2**20  # MiB, of one [B, T, V] in float32
    print(
        f"peak in MiB: plain {plain['peak']:.0f}, ours {ours['peak']:.0f}, three times the tokens {longer['peak']:.0f}"
    )
    assert plain["peak"] > 2.5 * logits
    assert ours["peak"] < 1.5 * logits, "some chunks of 128 MiB"
    assert longer["peak"] < ours["peak"] + 0.4 * logits, "plain would be 2 * 3 * logits more"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_nor_does_it_with_the_gradient_of_the_entropy():
    plain, ours, longer = measure("plain entropy", 640), measure("ours entropy", 640), measure("ours entropy", 1920)
    assert ours["numbers"] == pytest.approx(plain["numbers"], rel=1e-4)
    assert ours["numbers"] != pytest.approx(measure("ours", 640)["numbers"], rel=1e-2), "the entropy has a gradient"
    logits = 640 * 151_936 * 4 / 2**20  # MiB, of one [B, T, V] in float32
    print(
        f"peak in MiB: plain {plain['peak']:.0f}, ours {ours['peak']:.0f}, three times the tokens {longer['peak']:.0f}"
    )
    assert plain["peak"] > 4 * logits
    assert ours["peak"] < 2.5 * logits, "a few chunks of 128 MiB more"
    assert longer["peak"] < ours["peak"] + 0.5 * logits, "plain would be 2 * 5 * logits more"


def test_gradient_checkpointing_keeps_less_and_changes_nothing_else(tmp_path, tiny):
    config = LlamaConfig(
        vocab_size=len(tiny[1]), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        attention_dropout=0.5, eos_token_id=tiny[1].eos_token_id, pad_token_id=tiny[1].pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path), tiny[1].save_pretrained(tmp_path)
    found = []
    for checkpointing in (False, True):
        policy, tokenizer = load_policy(str(tmp_path), torch.device("cpu"), checkpointing)
        sampler, kept = make_sampler(policy, tokenizer, max_new_tokens=24), 0
        before = sampler.generate([[9, 10], [11]], n=4, temperature=1.0, seed=0)

        def keep(x):
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logp, _ = policy(before, 1.0)
        logp.sum().backward()
        assert torch.allclose(logp, before.sampler_logp, atol=1e-5), "no dropout"
        sampler.push(policy)
        after = sampler.generate([[9, 10], [11]], n=4, temperature=1.0, seed=0)
        assert torch.equal(before.input_ids, after.input_ids), "and the sampler has its cache"
        found.append((kept, logp.detach(), [p.grad for p in policy.parameters()]))
    assert found[1][0] < found[0][0] / 3, "of six layers, only what goes into each"
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_gradient_checkpointing_gives_the_same_run(tmp_path):
    flags = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 3, "model": str(ROOT / "tiny")}
    for checkpointing in (False, True):
        out = str(tmp_path / str(checkpointing))
        grpo.main(grpo.Config(out=out, gradient_checkpointing=checkpointing, epochs=2, **flags))
    one, other = (without_times(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("False", "True"))
    for a, b in zip(one, other, strict=True):
        known = [name for name in a if a[name] is not None]
        assert [a[name] for name in known] == pytest.approx([b[name] for name in known], rel=1e-3, abs=1e-5)
