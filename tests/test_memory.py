"""Log-probs of a vocabulary of 151,936: the same values and gradients as the plain way, without its memory."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

# Run in a process of its own, whose peak of resident memory is then that of one way of computing. The body of the model
# is one embedding, so that nothing but the LM head has a size.
MEASURE = """
import json, resource, sys
import torch
from rollout import Rollouts, token_logprobs
from types import SimpleNamespace

way, tokens = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
body, head = torch.nn.Embedding(64, 32), torch.nn.Linear(32, 151_936, bias=False)
state = lambda input_ids, **_: SimpleNamespace(last_hidden_state=body(input_ids))
model = SimpleNamespace(base_model=state, get_output_embeddings=lambda: head)
ids = torch.randint(64, (8, 1 + tokens // 8))
mask = torch.ones(8, tokens // 8, dtype=torch.bool)
batch = Rollouts(ids, torch.ones_like(ids), mask, mask * 0.0, torch.arange(8), [""] * 8, ["stop"] * 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if way == "plain":
    log_p = (head(body(ids[:, :-1])) / 0.7).log_softmax(-1)  # [B, T, V]
    logp = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
else:
    logp, entropy = token_logprobs(model, batch, 0.7)
(logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
sums = [x.double().sum().item() for x in (logp, entropy)]
norms = [x.double().norm().item() for x in (logp, entropy, body.weight.grad, head.weight.grad)]
print(json.dumps({"peak": peak, "numbers": sums + norms}))
"""


def measure(way: str, tokens: int) -> dict:
    command = [sys.executable, "-c", MEASURE, way, str(tokens)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


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
