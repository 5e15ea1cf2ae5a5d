"""Token log-probs: those that a model gives each response alone, with the same gradient, however they are computed."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

import logprobs
from grpo import group_advantages, policy_loss
from logprobs import batch_logprobs, token_logprobs


def naive(model, batch, temperature, dtype=torch.float32):
    """Log-probs and entropies one response at a time, without padding, from the model's own logits."""
    logps, entropies = [], []
    left = batch.input_ids.shape[1] - batch.response_mask.shape[1]
    for i, length in enumerate(batch.lengths.tolist()):
        real = batch.attention_mask[i].bool()
        ids = batch.input_ids[i][real]
        start = int(batch.attention_mask[i, :left].sum())
        table = (model(ids[None]).logits[0].to(dtype) / temperature).log_softmax(-1)[start - 1 : -1]
        logps.append(table.gather(1, ids[start:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
        assert len(logps[-1]) == length
    return logps, entropies


@pytest.mark.parametrize("logits_at_once", [2**25, 40 * 106, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_the_plain_ones(tiny, batch, monkeypatch, logits_at_once, temperature):
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", {"cpu": logits_at_once})
    batch = batch.select(torch.arange(10))
    policy = copy.deepcopy(tiny[0])
    weights = torch.rand(batch.response_mask.shape)
    logp, entropy = policy(batch, temperature)
    assert logp.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    assert not logp[~batch.response_mask].any() and not entropy[~batch.response_mask].any()
    (logp * weights).sum().backward()

    plain = copy.deepcopy(tiny[0].model)
    logps, entropies = naive(plain, batch, temperature)
    for i, length in enumerate(batch.lengths.tolist()):
        assert torch.allclose(logp[i, :length], logps[i], atol=2e-5)
        assert torch.allclose(entropy[i, :length], entropies[i], atol=2e-5)
    sum((x * weights[i, : len(x)]).sum() for i, x in enumerate(logps)).backward()
    for (name, p), q in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5, rtol=1e-3), name


@pytest.mark.parametrize("logits_at_once", [2**25, 40 * 106, 1])
def test_the_entropy_may_have_a_gradient_and_it_is_the_plain_one(tiny, batch, monkeypatch, logits_at_once):
    """With several chunks of logits these are computed again in the backward pass, and the gradient is the same."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", {"cpu": logits_at_once})
    batch = batch.select(torch.arange(10))
    policy = copy.deepcopy(tiny[0]).double()
    g = torch.Generator().manual_seed(0)
    of_entropy, of_logp = torch.randn(2, *batch.response_mask.shape, dtype=torch.float64, generator=g)  # weights
    logp, entropy = policy(batch, 1.2, dtype=torch.float64, entropy_gradient=True)
    logp_alone, entropy_alone = policy(batch, 1.2, dtype=torch.float64)
    assert torch.equal(logp, logp_alone) and torch.equal(entropy, entropy_alone)
    assert entropy.requires_grad and not entropy_alone.requires_grad
    assert not entropy[~batch.response_mask].any()

    plain = copy.deepcopy(tiny[0].model).double()
    logps, entropies = naive(plain, batch, 1.2, torch.float64)
    names = [name for name, _ in plain.named_parameters()]
    ours, theirs = list(policy.model.parameters()), list(plain.parameters())
    for weight, weight_of_logp in ((of_entropy, 0 * of_logp), (of_entropy, of_logp), (0 * of_entropy, of_logp)):
        loss = (entropy * weight + logp * weight_of_logp).sum()
        expected = 0.0
        for i, length in enumerate(batch.lengths.tolist()):
            assert torch.allclose(entropy[i, :length], entropies[i], atol=1e-12)
            expected = expected + (entropies[i] * weight[i, :length] + logps[i] * weight_of_logp[i, :length]).sum()
        found = torch.autograd.grad(loss, ours, retain_graph=True)
        plain_ones = torch.autograd.grad(expected, theirs, retain_graph=True)
        for name, x, y in zip(names, found, plain_ones, strict=True):
            assert (x - y).norm() < 1e-6 * y.norm(), name  # the model's norms round to float32
    only_logp = torch.autograd.grad((logp_alone * of_logp).sum(), ours)
    for name, x, y in zip(names, only_logp, found, strict=True):
        assert (x - y).norm() < 1e-6 * y.norm(), name


def test_the_gradient_of_the_entropy_by_its_formula():
    """dH / dlogit_v = -p_v (log p_v + H) / temperature."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, generator=g).requires_grad_()
    targets = torch.zeros(5, dtype=torch.long)
    _, entropy = logprobs.head_logprobs(torch.nn.Identity(), logits, targets, 1.2, torch.float64, True)
    entropy.sum().backward()
    log_p = (logits.detach() / 1.2).log_softmax(-1)
    H = -(log_p.exp() * log_p).sum(-1)
    assert torch.allclose(entropy, H, atol=1e-14)
    assert torch.allclose(logits.grad, -log_p.exp() * (log_p + H[:, None]) / 1.2, atol=1e-14)


def test_batch_logprobs_do_not_depend_on_the_microbatches(tiny, batch):
    whole, _ = tiny[0](batch, 1.0)
    for budget in (1, 100):
        assert torch.allclose(batch_logprobs(tiny[0], batch, 1.0, budget), whole, atol=2e-5)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tiny, tmp_path, monkeypatch):
    tiny[0].model.save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    forward = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(SystemExit, match="after the LM head"):
        logprobs.load_model(str(tmp_path), torch.device("cpu"))


def gradients(model, batch, budget, beta, rows=None):
    """Gradient of policy_loss on a batch in micro-batches, and the loss, as the script takes them."""
    model.zero_grad()
    rows = torch.arange(len(batch.texts)) if rows is None else rows
    total = 0.0
    for micro in batch.microbatches(rows, budget):
        logp, _ = token_logprobs(model, micro, 1.0)
        ref = micro["ref_logp"] if beta else None
        args = logp, micro["old_logp"], micro["advantages"], micro.response_mask, len(batch.texts)
        loss, _ = policy_loss(*args, 0.2, 0.2, ref, beta)
        loss.backward()
        total += loss.item()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), total


@pytest.fixture
def trainable(tiny, batch):
    """A copy of the tiny model in float64, and the batch with all that the loss needs; some groups are all equal."""
    model = copy.deepcopy(tiny[0].model).double()
    g = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (len(batch.texts),), generator=g).float()
    rewards[:8] = 1.0
    batch["advantages"] = group_advantages(rewards, 4)
    with torch.no_grad():
        logp, _ = token_logprobs(model, batch, 1.0)
    batch["old_logp"] = logp + 0.1 * torch.randn(logp.shape, generator=g)
    batch["ref_logp"] = logp + 0.1 * torch.randn(logp.shape, generator=g)
    return model, batch


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_any_microbatch_size_gives_the_same_gradient(trainable, beta):
    model, batch = trainable
    expected, loss = gradients(model, batch, 10**6, beta)
    for budget in (1, 64, 300):
        gradient, other = gradients(model, batch, budget, beta)
        assert (gradient - expected).norm() < 1e-6 * expected.norm()
        assert other == pytest.approx(loss, abs=1e-6)


def test_without_kl_rows_of_zero_advantage_may_stay_out(trainable):
    model, batch = trainable
    expected, loss = gradients(model, batch, 10**6, 0.0)
    rows = (batch["advantages"] != 0).nonzero()[:, 0]
    assert 0 < len(rows) <= len(batch.texts) - 8
    gradient, other = gradients(model, batch, 300, 0.0, rows)
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


def test_a_model_that_is_not_there_is_one_clear_line():
    with pytest.raises(SystemExit, match="--model no/such-model"):
        logprobs.load_model("no/such-model", torch.device("cpu"))
