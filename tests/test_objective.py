"""The terms of eq. 3, as pure functions: against values worked out by hand and gradients by enumeration, in float64."""

import itertools
import math

import pytest
import torch

from grpo import group_advantages, kl_k3, policy_loss


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_of(logp, old_logp, advantages, mask=None, ref_logp=None, beta=0.0, clip_low=0.2, clip_high=0.2):
    """policy_loss on a whole batch."""
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    return policy_loss(logp, old_logp, advantages, mask, len(logp), clip_low, clip_high, ref_logp, beta)


# --- advantage ---


def test_advantage_by_hand():
    # rewards 1 0 0 1: mean 1/2, unbiased variance 4 * (1/4) / 3 = 1/3
    a = group_advantages(double(1, 0, 0, 1), group_size=4)
    assert torch.allclose(a, double(1, -1, -1, 1) * 0.5 / (math.sqrt(1 / 3) + 1e-4), rtol=1e-12)
    # ddof 1, not 0: with ddof 0 these would be exactly +1 and -1
    assert not torch.allclose(a.abs(), torch.ones(4, dtype=torch.float64))
    # eps is 1e-4 and is added to the std, outside the root: where the std is as small, it halves the advantage
    a = group_advantages(double(1e-4, 0) * math.sqrt(2), 2)
    assert torch.allclose(a, double(1, -1) / math.sqrt(2) / 2, rtol=1e-12)


def test_advantages_of_a_group_sum_to_zero_and_have_unit_std():
    r = torch.rand(6 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = group_advantages(r, 8).view(6, 8)
    assert torch.allclose(a.sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(a.std(1), torch.ones(6, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.3])
def test_group_of_equal_rewards_has_exactly_zero_advantage(value):
    a = group_advantages(torch.full((8,), value), 8)
    assert torch.equal(a, torch.zeros(8)), "0.1 + 0.1 + ... must not leave a rounding error for Adam to blow up"


def test_groups_never_mix():
    first, second = double(1, 0, 0), double(5, 9, 7)
    together = group_advantages(torch.cat([first, second]), 3)
    assert torch.equal(together, torch.cat([group_advantages(first, 3), group_advantages(second, 3)]))
    changed = group_advantages(torch.cat([first, second * 100 + 3]), 3)
    assert torch.equal(together[:3], changed[:3])


# --- kl ---


def policies(seed=0, vocabulary=5):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocabulary, dtype=torch.float64, generator=g) * 1.5
    return logits[0].requires_grad_(), logits[1].log_softmax(-1)


def test_k3_has_the_exact_kl_as_its_mean_and_not_the_reversed_one():
    logits, ref = double(0.7, 0.2, 0.1).log(), double(0.05, 0.15, 0.8).log()
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    mean = (logp.exp() * kl_k3(logp, ref)).sum()
    assert mean.item() == pytest.approx(exact.item(), abs=1e-12) == pytest.approx(1.697, abs=1e-3)
    reversed_mean = (logp.exp() * kl_k3(ref, logp)).sum()  # pi/ref in place of ref/pi: 7.38, and always positive too
    assert reversed_mean.item() == pytest.approx(7.382, abs=1e-3)


def test_k3_in_the_loss_has_the_gradient_of_the_forward_kl():
    # Samples are data: only the estimator is differentiated. E[grad k3] = grad KL(ref || pi), see eq. 4's derivation.
    logits, ref = policies()
    logp = logits.log_softmax(-1)
    mean_of_samples = (logp.detach().exp() * kl_k3(logp, ref)).sum()
    (expected_gradient,) = torch.autograd.grad(mean_of_samples, logits, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)
    (backward,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits)
    assert torch.allclose(expected_gradient, forward, atol=1e-12)
    assert torch.dot(expected_gradient, backward) > 0, "a step against it must bring pi closer to ref"


def test_kl_is_zero_with_zero_gradient_where_the_policies_agree():
    logp = double(-1.0, -2.0, -0.1).requires_grad_()
    kl = kl_k3(logp, logp.detach())
    kl.sum().backward()
    zeros = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(kl.detach(), zeros) and torch.equal(logp.grad, zeros)


def test_the_loss_adds_beta_times_the_mean_kl_of_each_response():
    logp, old, ref = double(-1, -2).view(1, 2), double(-1, -2).view(1, 2), double(-0.5, -2.5).view(1, 2)
    loss, stats = loss_of(logp, old, double(0.0), ref_logp=ref, beta=0.1)
    by_hand = [math.exp(0.5) - 0.5 - 1, math.exp(-0.5) + 0.5 - 1]
    assert loss.item() == pytest.approx(0.1 * sum(by_hand) / 2)
    assert stats["kl"].flatten().tolist() == pytest.approx(by_hand)


# --- ratio and clip ---


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.95, 1.0, 1.05, 1.25, 1.35, 2.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.3, 0.28), (0.2, 0.4)])
def test_clip_table(advantage, ratio, low, high):
    """Gradient A rho grad log pi, except exactly 0 where A > 0 and rho > 1 + high, or A < 0 and rho < 1 - low."""
    logp = double(math.log(ratio)).view(1, 1).requires_grad_()
    loss, stats = loss_of(logp, torch.zeros(1, 1, dtype=torch.float64), double(advantage), clip_low=low, clip_high=high)
    loss.backward()
    is_clipped = ratio > 1 + high if advantage > 0 else ratio < 1 - low
    assert logp.grad.item() == pytest.approx(0.0 if is_clipped else -advantage * ratio)
    assert loss.item() == pytest.approx(-min(advantage * ratio, advantage * min(max(ratio, 1 - low), 1 + high)))
    assert stats["clip_fraction"].item() == float(is_clipped)
    assert stats["ratio_max"].item() == pytest.approx(ratio)
    if is_clipped:
        assert logp.grad.item() == 0.0


def test_ratio_is_per_token_and_not_of_the_whole_response():
    # Ratios 2 and 1/2: their product is 1, so a ratio of the whole response would not be clipped and give 1.
    logp = double(math.log(2), math.log(0.5)).view(1, 2)
    loss, _ = loss_of(logp, torch.zeros_like(logp), double(1.0))
    assert loss.item() == pytest.approx(-(1.2 + 0.5) / 2)


def test_ratio_is_the_exponential_of_a_difference_and_not_a_quotient_of_logs():
    loss, _ = loss_of(double(-1.0).view(1, 1), double(-1.1).view(1, 1), double(1.0))
    assert loss.item() == pytest.approx(-math.exp(0.1))


def test_first_update_is_the_plain_policy_gradient_though_the_loss_is_about_zero():
    g = torch.Generator().manual_seed(1)
    logp = (-torch.rand(8, 5, dtype=torch.float64, generator=g)).requires_grad_()
    a = group_advantages(torch.rand(8, dtype=torch.float64, generator=g), 4)
    loss, stats = loss_of(logp, logp.detach(), a)
    loss.backward()
    assert abs(loss.item()) < 1e-12, "the value says nothing: advantages of a group sum to zero"
    assert torch.allclose(logp.grad, -(a / 5 / 8)[:, None].expand(8, 5)) and logp.grad.norm() > 0
    assert stats["clip_fraction"].sum() == 0 and torch.equal(stats["ratio_max"].detach(), torch.ones_like(logp))


# --- aggregation ---


def test_each_response_counts_the_same_whatever_its_length():
    # Lengths 4 and 7, advantage 2: the per-token weight is 2/4 and 2/7 before the mean over the two responses.
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    logp = torch.zeros(2, 7, dtype=torch.float64, requires_grad=True)
    loss, _ = loss_of(logp, logp.detach(), double(2, 2), mask)
    loss.backward()
    assert loss.item() == pytest.approx(-2.0)
    assert torch.allclose(-logp.grad[0, :4], double(*[2 / 4 / 2] * 4))
    assert torch.allclose(-logp.grad[1], double(*[2 / 7 / 2] * 7))
    assert torch.equal(logp.grad[0, 4:], torch.zeros(3, dtype=torch.float64)), "padding has no gradient"


def test_losses_and_gradients_of_microbatches_add_up():
    g = torch.Generator().manual_seed(2)
    logp = (-torch.rand(8, 6, dtype=torch.float64, generator=g)).requires_grad_()
    old = logp.detach() + 0.3 * torch.randn(8, 6, dtype=torch.float64, generator=g)
    ref = logp.detach() + 0.3 * torch.randn(8, 6, dtype=torch.float64, generator=g)
    a = torch.randn(8, dtype=torch.float64, generator=g)
    mask = torch.arange(6) < torch.randint(1, 7, (8, 1), generator=g)
    whole, _ = policy_loss(logp, old, a, mask, 8, 0.2, 0.2, ref, 0.04)
    (expected,) = torch.autograd.grad(whole, logp)
    for size in (1, 2, 3, 4):
        parts = [slice(i, i + size) for i in range(0, 8, size)]
        losses = [policy_loss(logp[p], old[p], a[p], mask[p], 8, 0.2, 0.2, ref[p], 0.04)[0] for p in parts]
        (gradient,) = torch.autograd.grad(sum(losses), logp)
        assert sum(losses).item() == pytest.approx(whole.item(), abs=1e-12)
        assert torch.allclose(gradient, expected, atol=1e-12)


def test_gradient_of_the_loss_against_finite_differences():
    g = torch.Generator().manual_seed(3)
    logp = (-torch.rand(4, 5, dtype=torch.float64, generator=g)).requires_grad_()
    old, ref = (logp.detach() + 0.2 * torch.randn(4, 5, dtype=torch.float64, generator=g) for _ in range(2))
    a = torch.randn(4, dtype=torch.float64, generator=g)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, a, mask, 4, 0.2, 0.28, ref, 0.3)[0], logp)


# --- the exact policy gradient, by enumeration ---


def test_expected_gradient_is_the_exact_policy_gradient():
    """A policy over 3 tokens and responses of 2, so 9 responses and 81 groups of 2: nothing is sampled.

    With G = 2 and rewards in {0, 1}, (r - mean) / std is +-1/sqrt(2) where the two differ and 0 where they do not,
    and then E[gradient of J_GRPO] = grad E[R] / (sqrt(2) |o|), exactly.
    """
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    responses = torch.tensor(list(itertools.product(range(3), repeat=2)))  # [9, 2]
    table = logits.log_softmax(-1)
    # row 0: the first token; rows 1..3: the second token after each first one
    logp = torch.stack([table[0, responses[:, 0]], table[1 + responses[:, 0], responses[:, 1]]], dim=1)  # [9, 2]
    p = logp.sum(1).exp()  # [9]
    assert p.sum().item() == pytest.approx(1.0)
    reward = ((responses.sum(1) % 3) == 1).double()  # [9]
    (exact,) = torch.autograd.grad((p * reward).sum(), logits, retain_graph=True)

    expected = 0.0
    for i, j in itertools.product(range(9), repeat=2):
        group = logp[[i, j]]
        a = group_advantages(reward[[i, j]], 2) * (1 + 1e-4 * math.sqrt(2))  # without the eps
        loss, _ = loss_of(group, group.detach(), a)
        expected = expected + (p[i] * p[j]).detach() * -loss
    (gradient,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(gradient, exact / (math.sqrt(2) * 2), atol=1e-12)
