"""family/: the patches of grpo.py and of rloo.py, by hand, by enumeration, against TRL and verl, and as scripts.

How large they may be: test_siblings.py. The patches of dpo.py: test_family.py.
"""

import copy
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_jsonl, run_script, without_times
from test_siblings import double
from torch.nn.functional import cross_entropy

import data
import grpo
import plot
from batch import collate
from data import draw
from family import cispo, dapo, gspo, maxrl, reinforce, reinforce_pp, rft
from logprobs import batch_logprobs

SCRIPTS = {
    "reinforce": reinforce,
    "gspo": gspo,
    "maxrl": maxrl,
    "cispo": cispo,
    "reinforce_pp": reinforce_pp,
    "dapo": dapo,
    "rft": rft,
}
TOKEN_MEANS = ["maxrl", "cispo", "reinforce_pp", "dapo"]  # these divide by the tokens of the update
WITH_RATIO = [name for name in SCRIPTS if name != "rft"]
CLIPPED_TOKENS = ["maxrl", "reinforce_pp", "dapo"]  # GRPO's ratio and clip
SMALL = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 1, "eval_samples": 1, "model": str(ROOT / "tiny")}
MASK = torch.arange(6) < torch.tensor([[6], [2], [1], [3]])  # 4 responses, 12 tokens


def loss_of(
    name,
    logp,
    old_logp,
    A,
    mask=MASK,
    n=None,
    clip_low=0.2,
    clip_high=0.2,
    cap=5.0,
    ref_logp=None,
    beta=0.0,
    weight=1.0,
):
    """The loss and the stats of one of the objectives, whatever arguments it takes. n: what it divides by"""
    n = n or (mask.sum() if name in TOKEN_MEANS else len(mask))
    if name == "reinforce":
        return reinforce.policy_loss(logp, old_logp, A, mask, n, clip_low, clip_high, weight)
    if name == "rft":
        return rft.policy_loss(logp, A, mask, n, ref_logp, beta)
    if name == "cispo":
        return cispo.policy_loss(logp, old_logp, A, mask, n, cap, ref_logp, beta, weight)
    loss = SCRIPTS[name].policy_loss if name in SCRIPTS else grpo.policy_loss
    return loss(logp, old_logp, A, mask, n, clip_low, clip_high, ref_logp, beta, weight)


def gradient_of(name, logp, old_logp, A, *rest, **more):
    """Minus the gradient of the loss by the log-probs, [B, T]: what each token is weighed by."""
    logp = logp.detach().requires_grad_()
    loss, _ = loss_of(name, logp, old_logp, A, *rest, **more)
    (gradient,) = torch.autograd.grad(loss, logp)
    return -gradient


def ragged(seed=0, spread=0.1):
    """log pi, log pi_old, log pi_ref [4, 6] and advantages [4]; what is off MASK is noise."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(4, 6, dtype=torch.float64, generator=g)
    old_logp = logp + spread * torch.randn(4, 6, dtype=torch.float64, generator=g)
    ref_logp = logp + 0.5 * torch.randn(4, 6, dtype=torch.float64, generator=g)
    return logp, old_logp, ref_logp, torch.randn(4, dtype=torch.float64, generator=g)


def all_responses():
    """(logits, log-probs [9, 2]) of a policy over 3 tokens and responses of 2, of which there are 9."""
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    responses = torch.tensor(list(itertools.product(range(3), repeat=2)))  # [9, 2]
    table = logits.log_softmax(-1)
    # row 0: the first token; rows 1..3: the second token after each first one
    return logits, torch.stack([table[0, responses[:, 0]], table[1 + responses[:, 0], responses[:, 1]]], dim=1)


# --- what is alike ---


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", SCRIPTS)
def test_losses_and_gradients_of_microbatches_add_up(name, beta):
    logp, old_logp, ref_logp, A = ragged(1)
    logp.requires_grad_()
    n = 12 if name in TOKEN_MEANS else 4
    whole, _ = loss_of(name, logp, old_logp, A, n=n, ref_logp=ref_logp, beta=beta)
    (expected,) = torch.autograd.grad(whole, logp)
    losses = []
    for p in (slice(0, 1), slice(1, 4)):
        part, _ = loss_of(name, logp[p], old_logp[p], A[p], MASK[p], n=n, ref_logp=ref_logp[p], beta=beta)
        losses.append(part)
    (gradient,) = torch.autograd.grad(sum(losses), logp)
    assert sum(losses).item() == pytest.approx(whole.item(), abs=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-12) and expected.norm() > 0


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "cispo"])  # its weight has no gradient
def test_gradients_against_finite_differences(name):
    logp, old_logp, ref_logp, A = ragged(2)
    more = {"ref_logp": ref_logp, "beta": 0.3}
    assert torch.autograd.gradcheck(lambda x: loss_of(name, x, old_logp, A, **more)[0], logp.requires_grad_())


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_response_tokens_learn_and_padding_does_not_count(name):
    logp, old_logp, ref_logp, A = ragged(3, spread=0.01)
    more = {"ref_logp": ref_logp, "beta": 0.3}
    loss, _ = loss_of(name, logp, old_logp, A, **more)
    gradient = gradient_of(name, logp, old_logp, A, **more)
    assert torch.equal(gradient != 0, MASK)
    other, _ = loss_of(name, logp + 3 * ~MASK, old_logp - 2 * ~MASK, A, ref_logp=ref_logp - 5 * ~MASK, beta=0.3)
    assert other.item() == pytest.approx(loss.item(), abs=1e-12)


def test_at_the_first_update_every_objective_weighs_tokens_in_its_own_way():
    logp, _, _, A = ragged(4)
    lengths = MASK.sum(1)
    per_token = MASK * A[:, None]
    for name in SCRIPTS:
        by_hand = {
            "reinforce": per_token / 4,  # whole responses
            "gspo": per_token / lengths[:, None] / 4,  # the mean of each response
            "rft": per_token / lengths[:, None] / 4,
        }.get(name, per_token / 12)  # the mean over all tokens
        assert torch.allclose(gradient_of(name, logp, logp, A), by_hand, atol=1e-15), name


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "reinforce"])  # which has it in the reward
def test_the_kl_is_averaged_as_the_objective_is(name):
    logp, old_logp, ref_logp, A = ragged(5)
    loss, stats = loss_of(name, logp, old_logp, 0 * A, ref_logp=ref_logp, beta=0.3)
    ratio = (ref_logp - logp).exp()
    k3 = (ratio - ratio.log() - 1) * MASK
    mean = k3.sum() / 12 if name in TOKEN_MEANS else (k3.sum(1) / MASK.sum(1)).mean()
    assert loss.item() == pytest.approx(0.3 * mean.item(), abs=1e-12)
    assert torch.allclose(stats["kl"] * MASK, k3, atol=1e-12)


@pytest.mark.parametrize("name", WITH_RATIO)
def test_the_weight_of_importance_sampling_multiplies_the_objective(name):
    logp, old_logp, _, A = ragged(6)
    w = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    if name == "reinforce":  # a weight for each response
        w = w[:, :1]
    plain = gradient_of(name, logp, old_logp, A)
    expected = plain * w
    if name == "gspo":  # the mean of its tokens' weights
        expected = plain * ((w * MASK).sum(1) / MASK.sum(1))[:, None]
    assert torch.allclose(gradient_of(name, logp, old_logp, A, weight=w), expected, atol=1e-15)
    assert not torch.allclose(expected, plain, rtol=0.1)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.95, 1.0, 1.05, 1.25, 1.35, 2.0])
@pytest.mark.parametrize("name", CLIPPED_TOKENS)
def test_clip_table_of_the_token_means_that_clip_as_grpo_does(name, ratio, advantage):
    mask = torch.ones(1, 1, dtype=torch.bool)
    logp = double(math.log(ratio)).view(1, 1)
    loss, stats = loss_of(name, logp, 0 * logp, double(advantage), mask, n=7, clip_low=0.2, clip_high=0.28)
    gradient = gradient_of(name, logp, 0 * logp, double(advantage), mask, n=7, clip_low=0.2, clip_high=0.28)
    is_clipped = ratio > 1.28 if advantage > 0 else ratio < 0.8
    assert gradient.item() == pytest.approx(0.0 if is_clipped else advantage * ratio / 7)
    assert loss.item() == pytest.approx(-min(advantage * ratio, advantage * min(max(ratio, 0.8), 1.28)) / 7)
    assert stats["clip_fraction"].item() == float(is_clipped)
    assert stats["ratio_max"].item() == pytest.approx(ratio)


# --- reinforce ---


@pytest.mark.parametrize("G", [1, 2])
def test_reinforce_is_unbiased_also_with_one_response_and_without_a_baseline(G):
    """All groups of G among all 9 responses of 2 tokens, in proportion to their probability: nothing is sampled."""
    logits, logp = all_responses()
    p = logp.sum(1).exp()
    reward = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (exact,) = torch.autograd.grad((p * reward).sum(), logits, retain_graph=True)
    mask = torch.ones(G, 2, dtype=torch.bool)
    steps = []
    for constant in (0.0, 10.0):
        expected = 0.0
        for rows in itertools.product(range(9), repeat=G):
            rows = torch.tensor(rows)
            loss, _ = loss_of("reinforce", logp[rows], logp[rows].detach(), reward[rows] + constant, mask)
            expected = expected - p[rows].prod().detach() * loss
        (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
        assert torch.allclose(gradient, exact, atol=1e-12)
        one = [3] * G
        steps.append(gradient_of("reinforce", logp[one], logp[one].detach(), reward[one] + constant, mask))
    assert not torch.allclose(*steps), "a constant changes each step, though not their mean"


def test_the_ratio_of_reinforce_is_of_the_whole_response():
    logp = double(math.log(2), math.log(2), 0.0).view(1, 3)  # product 4: clipped at 1.2 if A > 0
    mask = torch.tensor([[True, True, False]])
    for advantage, value, gradient in ((1.0, -1.2, 0.0), (-1.0, 4.0, -4.0)):
        assert loss_of("reinforce", logp, 0 * logp, double(advantage), mask)[0].item() == pytest.approx(value)
        found = gradient_of("reinforce", logp, 0 * logp, double(advantage), mask)
        assert found.flatten().tolist() == pytest.approx([gradient, gradient, 0])


# --- gspo ---


def test_gspo_by_hand():
    """Mean log-ratios 0, 0.06 and 0.06: a row whose tokens cancel out, one not clipped as A < 0, and one clipped."""
    log_ratio = double(1, -1, 9, 0.03, 0.05, 0.1, 0.06, 9, 9).view(3, 3)  # 9: padding
    mask = torch.arange(3) < torch.tensor([[2], [3], [1]])
    A = double(2, -1, 1.5)
    s = math.exp(0.06)
    loss, stats = loss_of("gspo", log_ratio, 0 * log_ratio, A, mask, clip_low=0.03, clip_high=0.04)
    assert loss.item() == pytest.approx(-(2 * 1 - 1 * s + 1.5 * 1.04) / 3, abs=1e-14)
    assert stats["ratio_max"].flatten().tolist() == pytest.approx([1, s, s])
    assert stats["clip_fraction"].flatten().tolist() == [0, 0, 1]
    gradient = gradient_of("gspo", log_ratio, 0 * log_ratio, A, mask, clip_low=0.03, clip_high=0.04)
    by_hand = double(2 / 2 / 3, 2 / 2 / 3, 0, -s / 3 / 3, -s / 3 / 3, -s / 3 / 3, 0, 0, 0).view(3, 3)
    assert torch.allclose(gradient, by_hand, atol=1e-14)


def test_the_ratio_of_gspo_is_1_where_the_policies_are_the_same():
    logp, _, _, A = ragged(7)
    loss, stats = loss_of("gspo", logp, logp, A, clip_low=3e-4, clip_high=4e-4)
    assert torch.equal(stats["ratio_max"], torch.ones(4, 1, dtype=torch.float64))
    assert loss.item() == pytest.approx(-A.mean().item(), abs=1e-14)


def test_with_one_update_gspo_is_grpo_without_its_clip():
    logp, old_logp, _, A = ragged(8, spread=1.0)
    one_update = gradient_of("gspo", logp, logp, A)
    assert torch.allclose(one_update, gradient_of("grpo", logp, logp, A, clip_low=1, clip_high=1e9), atol=1e-15)
    later = gradient_of("gspo", logp, old_logp, A, clip_low=1, clip_high=1e9)
    assert not torch.allclose(later, gradient_of("grpo", logp, old_logp, A, clip_low=1, clip_high=1e9), rtol=0.1)


def test_all_tokens_of_a_response_have_the_same_weight_in_gspo():
    logp, old_logp, _, A = ragged(9, spread=1.0)
    gradient = gradient_of("gspo", logp, old_logp, A, clip_low=1, clip_high=1e9)
    for i, length in enumerate((6, 2, 1, 3)):
        s = math.prod(math.exp(x) for x in (logp - old_logp)[i, :length].tolist()) ** (1 / length)
        assert gradient[i, :length].tolist() == pytest.approx([s * A[i].item() / length / 4] * length)


@pytest.mark.parametrize(
    ("s", "advantage", "is_clipped"),
    [
        (1.045, 1.0, True),
        (1.045, -1.0, False),
        (1.035, 1.0, False),  # within 0.04 above, though not within 0.03
        (0.965, -1.0, True),  # beyond 0.03 below, though not beyond 0.04
        (0.965, 1.0, False),
        (0.975, -1.0, False),
    ],
)
def test_gspo_clips_whole_responses_on_the_side_that_would_go_on_only(s, advantage, is_clipped):
    log_ratio = math.log(s) + double(0.5, -0.5, 0.0).view(1, 3)  # one token far above, one far below, one as the mean
    mask = torch.ones(1, 3, dtype=torch.bool)
    more = {"clip_low": 0.03, "clip_high": 0.04}
    gradient = gradient_of("gspo", log_ratio, 0 * log_ratio, double(advantage), mask, **more)
    expected = [0.0] * 3 if is_clipped else [s * advantage / 3] * 3
    assert gradient.flatten().tolist() == pytest.approx(expected)
    assert loss_of("gspo", log_ratio, 0 * log_ratio, double(advantage), mask, **more)[1]["clip_fraction"] == is_clipped


# --- maxrl ---


def test_maxrl_advantage_by_hand():
    a = maxrl.group_advantages(double(1, 0, 0, 0, 1, 1, 0, 0, 3, 1, 2, 2), 4)
    by_hand = double(3, -1, -1, -1, 1, 1, -1, -1, 0.5, -0.5, 0, 0)
    assert torch.allclose(a, by_hand, rtol=1e-5) and not torch.equal(a, by_hand), "1e-6 is added to the mean"
    assert a[0].item() == pytest.approx(0.75 / (0.25 + 1e-6), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_a_group_of_equal_rewards_has_no_advantage_in_maxrl(value):
    assert torch.equal(maxrl.group_advantages(torch.full((24,), value), 12), torch.zeros(24)), (
        "however the mean is rounded"
    )


def test_maxrl_refuses_a_negative_reward(capsys):
    with pytest.raises(SystemExit) as error:
        maxrl.group_advantages(double(1, 0, 0, -1e-3), 2)
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "--rewards: MaxRL divides by the mean reward, so none may be negative; use others\n"
    )


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("G", [2, 4, 8])
def test_the_expected_step_of_maxrl_is_its_closed_form(G, p):
    """A policy that is right with probability p = sigma(theta): all numbers of right responses among G."""
    theta = double(math.log(p / (1 - p))).requires_grad_()
    right, wrong = torch.nn.functional.logsigmoid(theta), torch.nn.functional.logsigmoid(-theta)
    expected = 0.0
    for c in range(G + 1):
        logp = torch.cat([right] * c + [wrong] * (G - c))[:, None]  # [G, 1] responses of one token
        a = maxrl.group_advantages(double(*[1] * c, *[0] * (G - c)), G, eps=1e-300)
        loss, _ = loss_of("maxrl", logp, logp.detach(), a, torch.ones(G, 1, dtype=torch.bool))
        expected = expected - math.comb(G, c) * p**c * (1 - p) ** (G - c) * loss
    (gradient,) = torch.autograd.grad(expected, theta, retain_graph=True)
    grad_p = p * (1 - p)
    assert gradient.item() == pytest.approx(grad_p * (1 - (1 - p) ** (G - 1)) / p, rel=1e-12)
    series = -sum((1 - right.exp()) ** k / k for k in range(1, G))
    assert gradient.item() == pytest.approx(torch.autograd.grad(series, theta)[0].item(), rel=1e-12)


@pytest.mark.parametrize("G", [2, 3])
def test_that_holds_for_any_policy_and_not_for_the_advantage_of_grpo(G):
    """All groups among 9 responses of 2 tokens: the mean over tokens is half of that over whole responses."""
    logits, logp = all_responses()
    p_each = logp.sum(1).exp()
    reward = double(1, 0, 0, 0, 1, 0, 0, 0, 0)
    p = (p_each * reward).sum()
    (exact,) = torch.autograd.grad(p, logits, retain_graph=True)
    mask = torch.ones(G, 2, dtype=torch.bool)
    ratios = {}
    for script in (maxrl, grpo):
        expected = 0.0
        for rows in itertools.product(range(9), repeat=G):
            rows = torch.tensor(rows)
            a = script.group_advantages(reward[rows], G, eps=1e-300)
            loss, _ = loss_of("maxrl", logp[rows], logp[rows].detach(), a, mask)
            expected = expected - p_each[rows].prod().detach() * loss
        (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
        ratios[script] = (gradient / exact)[0, 0].item()
        assert torch.allclose(gradient, ratios[script] * exact, atol=1e-12)
    closed_form = (1 - (1 - p.item()) ** (G - 1)) / p.item()
    assert ratios[maxrl] == pytest.approx(closed_form / 2, rel=1e-10)
    assert ratios[grpo] != pytest.approx(closed_form / 2, rel=0.1)


# --- cispo ---


@pytest.mark.parametrize("advantage", [1.0, -2.0])
@pytest.mark.parametrize("ratio", [0.001, 0.5, 1.0, 1.3, 4.9, 5.1, 20.0])
def test_cispo_weighs_a_token_by_its_ratio_up_to_the_cap_and_never_by_0(ratio, advantage):
    mask = torch.ones(1, 1, dtype=torch.bool)
    old_logp = double(-1.5).view(1, 1)
    logp = old_logp + math.log(ratio)
    loss, stats = loss_of("cispo", logp, old_logp, double(advantage), mask, n=7)
    w = min(ratio, 5.0)
    assert loss.item() == pytest.approx(-w * advantage * logp.item() / 7)
    assert gradient_of("cispo", logp, old_logp, double(advantage), mask, n=7).item() == pytest.approx(w * advantage / 7)
    assert stats["clip_fraction"].item() == float(ratio > 5) and stats["ratio_max"].item() == pytest.approx(ratio)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.3, 1.0), (0.5, -1.0)])
def test_cispo_has_a_gradient_where_grpo_has_none(ratio, advantage):
    logp, mask = double(math.log(ratio)).view(1, 1), torch.ones(1, 1, dtype=torch.bool)
    assert gradient_of("grpo", logp, 0 * logp, double(advantage), mask).item() == 0
    assert gradient_of("cispo", logp, 0 * logp, double(advantage), mask).item() == pytest.approx(ratio * advantage)


def test_the_gradient_of_cispo_on_ragged_rows():
    logp, old_logp, _, A = ragged(10, spread=2.0)
    ratio = (logp - old_logp).exp()
    assert (ratio > 5)[MASK].any() and (ratio < 0.5)[MASK].any()
    by_hand = MASK * torch.where(ratio > 5, 5.0, ratio) * A[:, None] / 12
    assert torch.allclose(gradient_of("cispo", logp, old_logp, A), by_hand, atol=1e-15)


# --- reinforce_pp ---


def whole(x):
    """The sum over processes, where there is one."""
    return x


def test_the_baseline_of_reinforce_pp_is_the_mean_of_the_group():
    assert reinforce_pp.group_advantages(double(1, 0, 0, 1, 4, 1), 3).tolist() == pytest.approx(
        [2 / 3, -1 / 3, -1 / 3, -1, 2, -1]
    )
    assert torch.equal(reinforce_pp.group_advantages(torch.full((24,), 0.1), 12), torch.zeros(24))


def whitened_by_hand(b, lengths):
    """verl's way: b of each response at all of its tokens, [B, T], then mean and variance (ddof 1) on the mask."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values = b[:, None].expand(mask.shape)[mask]  # [N]
    return (b - values.mean()) / (values.var(correction=1) + 1e-8).sqrt()


REWARDS_OF_GROUPS = double(1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0)  # 4 groups of 3, two of them equal


@pytest.mark.parametrize("lengths", [[1] * 12, [2, 9, 5, 4, 4, 6, 1, 3, 8, 2, 7, 7]])
def test_whitening_counts_a_response_as_often_as_it_is_told(lengths):
    b = reinforce_pp.group_advantages(REWARDS_OF_GROUPS, 3)
    a = reinforce_pp.whiten(b, torch.tensor(lengths), whole)
    assert torch.allclose(a, whitened_by_hand(b, lengths), rtol=1e-12)
    values = a.repeat_interleave(torch.tensor(lengths))
    assert values.mean().item() == pytest.approx(0, abs=1e-12)
    assert values.std(correction=1).item() == pytest.approx(1, abs=1e-6)


def test_only_whitening_over_responses_leaves_equal_rewards_without_an_advantage():
    b = reinforce_pp.group_advantages(REWARDS_OF_GROUPS, 3)
    a = reinforce_pp.whiten(b, torch.ones(12, dtype=torch.long), whole)
    assert a[3:9].abs().max() < 1e-12 and a[:3].abs().min() > 0.1
    long_wrong = torch.tensor([1, 20, 20, 5, 5, 5, 5, 5, 5, 1, 1, 20])
    a = reinforce_pp.whiten(b, long_wrong, whole)
    assert torch.allclose(a[3:9], a[3:4].expand(6)) and a[3] > 0.3, "all right and all wrong alike"


def test_whitening_leaves_a_batch_of_equal_rewards_at_exactly_0():
    b = reinforce_pp.group_advantages(torch.full((12,), 0.1), 6)
    for count in (torch.ones(12, dtype=torch.long), torch.arange(1, 13)):
        assert torch.equal(reinforce_pp.whiten(b, count, whole), torch.zeros(12))


def test_the_eps_of_whitening_is_added_to_the_variance():
    b = double(1e-4, -1e-4) / math.sqrt(2)  # variance 1e-8, as large as eps
    a = reinforce_pp.whiten(b, torch.ones(2, dtype=torch.long), whole)
    assert torch.allclose(a, b / math.sqrt(2e-8), rtol=1e-12)


def test_two_processes_whiten_as_one_does():
    b = reinforce_pp.group_advantages(REWARDS_OF_GROUPS, 3)
    count = torch.tensor([2, 9, 5, 4, 4, 6, 1, 3, 8, 2, 7, 7])
    totals = []  # of the whole batch, in the order in which they are asked for
    expected = reinforce_pp.whiten(b, count, lambda x: totals.append(x) or x)
    shares = []
    for half in (slice(0, 6), slice(6, 12)):
        mine, given = [], iter(totals)
        part = reinforce_pp.whiten(
            b[half], count[half], lambda x, mine=mine, given=given: mine.append(x) or next(given)
        )
        assert torch.equal(part, expected[half])
        shares.append(mine)
    assert len(totals) > 1
    for total, one, other in zip(totals, *shares, strict=True):
        assert (one + other).item() == pytest.approx(total.item(), abs=1e-12)


# --- dapo ---


def test_overlong_punishment_by_hand():
    lengths = torch.tensor([1, 16384, 18432, 20480, 20481])
    assert dapo.overlong_punishment(lengths, 20480, 4096).tolist() == [0, 0, -0.5, -1, -1]
    assert dapo.overlong_punishment(torch.tensor([51, 58, 64]), 64, 12.8).tolist() == pytest.approx([0, -0.53125, -1])


def test_mixed_groups_by_hand():
    accuracy = double(1, 0, 1, 1, 0, 0, 0, 1)
    assert dapo.mixed_groups(accuracy, 2).tolist() == [0, 1, 6, 7]
    assert dapo.mixed_groups(accuracy, 4).tolist() == list(range(8))
    assert dapo.mixed_groups(double(1, 1, 1, 0, 0, 0), 3).tolist() == []


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_loss_of_dapo_is_that_of_grpo_for_equal_lengths_only(beta):
    logp, old_logp, ref_logp, A = ragged(11, spread=0.5)
    more = {"ref_logp": ref_logp, "beta": beta}
    equal = torch.arange(6).expand(4, 6) < 5
    losses, gradients = {}, {}
    for name in ("dapo", "grpo"):
        for mask in (equal, MASK):
            losses[name, mask] = loss_of(name, logp, old_logp, A, mask, **more)[0].item()
            gradients[name, mask] = gradient_of(name, logp, old_logp, A, mask, **more)
    assert losses["dapo", equal] == pytest.approx(losses["grpo", equal], abs=1e-14)
    assert torch.allclose(gradients["dapo", equal], gradients["grpo", equal], atol=1e-15)
    assert losses["dapo", MASK] != pytest.approx(losses["grpo", MASK], rel=0.01)
    assert not torch.allclose(gradients["dapo", MASK], gradients["grpo", MASK], rtol=0.01)


@pytest.mark.parametrize(("ratio", "gradient"), [(1.25, 1.25), (1.3, 0.0)])
def test_clip_higher_lets_a_token_become_likelier_than_grpo_does(ratio, gradient):
    low, high = dapo.Config.clip_low, dapo.Config.clip_high
    logp, mask = double(math.log(ratio)).view(1, 1), torch.ones(1, 1, dtype=torch.bool)
    found = gradient_of("dapo", logp, 0 * logp, double(1), mask, clip_low=low, clip_high=high)
    assert found.item() == pytest.approx(gradient)
    low, high = grpo.Config.clip_low, grpo.Config.clip_high
    assert gradient_of("grpo", logp, 0 * logp, double(1), mask, clip_low=low, clip_high=high).item() == 0


class Rounds:
    """Stands for run and sampler of sample_mixed; question i is [i + 1], and its responses are "i 0", "i 1", ..."""

    def __init__(self, tokenizer, **flags):
        self.config = dapo.Config(**{"prompts_per_step": 4, "group_size": 2, "max_rounds": 3} | flags)
        self.tokenizer = tokenizer
        self.asked = []  # the questions of each round
        self.seeds = []

    def share(self, items):
        return items

    def seed(self, step):
        return 100 + step

    def give_up(self, step, reason):
        raise SystemExit(f"step {step}: {reason}")

    def generate(self, prompts, n, temperature, seed):
        assert n == 2 and temperature == self.config.temperature
        self.asked.append([prompt[0] - 1 for prompt in prompts])
        self.seeds.append(seed)
        responses = [[2, 3 + prompt[0], 1][-length:] for prompt in prompts for length in (3, 2)]
        logps = [[0.0] * len(response) for response in responses]
        batch = collate(prompts, responses, logps, ["stop"] * len(responses), self.tokenizer, "cpu")
        batch.texts = [f"{prompt[0] - 1} {i}" for prompt in prompts for i in range(n)]
        return batch

    def sample(self, monkeypatch, right, train, step=1):
        """What sample_mixed gives, where response "i j" is right if j < right(i)."""

        def score(batch, examples, names):
            assert list(names) == [], "no named reward but the accuracy"
            accuracy = []
            for text, example in zip(batch.texts, examples, strict=True):
                i, j = text.split()
                assert example["number"] == int(i)
                accuracy.append(float(int(j) < right(int(i))))
            return {"accuracy": accuracy}

        monkeypatch.setattr(dapo, "score", score)
        return dapo.sample_mixed(self, self, train, step)


@pytest.fixture
def questions():
    return [{"prompt_ids": [i + 1], "number": i} for i in range(40)]


def test_sampling_goes_on_until_there_are_enough_mixed_groups(tiny, monkeypatch, questions):
    rounds = Rounds(tiny[1])
    batch, kept, number = rounds.sample(monkeypatch, lambda i: 1 if i % 2 else (i // 2 % 2) * 2, questions)
    mixed = [i for asked in rounds.asked for i in asked if i % 2]
    assert len(mixed[:4]) == 4 and number == len(rounds.asked) > 1
    assert sum(i % 2 for asked in rounds.asked[:-1] for i in asked) < 4, "not one round more than it takes"
    assert batch.texts == [f"{i} {j}" for i in mixed[:4] for j in range(2)], "groups whole, in order, cut to 4"
    assert batch.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and batch["row"].tolist() == list(range(8))
    assert [kept[i]["number"] for i in range(4)] == mixed[:4]
    prompts = batch.input_ids[:, : batch.prompt_width][batch.attention_mask[:, : batch.prompt_width].bool()]
    assert prompts.tolist() == [i + 1 for i in mixed[:4] for _ in range(2)]


def test_every_round_has_its_own_questions_and_random_numbers(tiny, monkeypatch, questions):
    seeds = []
    for step in (1, 2):
        rounds = Rounds(tiny[1])
        with pytest.raises(SystemExit):
            rounds.sample(monkeypatch, lambda i: 0, questions, step)
        seeds += rounds.seeds
        numbers = range(3 * (step - 1) + 1, 3 * step + 1)
        assert rounds.asked == [[q["number"] for q in draw(questions, 4, 0, number)] for number in numbers]
        assert len({i for asked in rounds.asked for i in asked}) == 12
    assert len(set(seeds)) == 6


@pytest.mark.parametrize("right", [0, 2])
def test_sampling_gives_up_and_says_what_it_found(tiny, monkeypatch, questions, right):
    rounds = Rounds(tiny[1])
    known = {q["number"] for q in draw(questions, 4, 0, 1)[:1]}  # the first question alone is mixed
    with pytest.raises(SystemExit) as error:
        rounds.sample(monkeypatch, lambda i: 1 if i in known else right, questions)
    assert str(error.value) == (
        f"step 1: in 3 rounds 1 of 4 groups have right and wrong responses (accuracy {right / 2:.2f}). "
        "Too hard or too easy by now: give another --task"
    )
    assert len(rounds.asked) == 3


def test_all_processes_give_up_if_one_of_them_has_too_few_groups(tiny, monkeypatch, questions):
    asked = []
    monkeypatch.setattr(dapo, "gather", lambda values: asked.append(values) or [*values, 3])
    with pytest.raises(SystemExit):
        Rounds(tiny[1]).sample(monkeypatch, lambda i: 1, questions)
    assert asked == [[4]], "this one has enough"


def test_without_dynamic_sampling_all_groups_of_one_round_are_taken(tiny, monkeypatch, questions):
    rounds = Rounds(tiny[1], dynamic_sampling=False)
    batch, kept, number = rounds.sample(monkeypatch, lambda i: 0, questions)
    assert number == 1 and [q["number"] for q in kept] == rounds.asked[0] and len(batch.texts) == 8


# --- rft ---


def test_the_loss_of_rft_is_that_of_supervised_learning_on_what_was_accepted():
    g = torch.Generator().manual_seed(12)
    logits = torch.randn(4, 6, 7, dtype=torch.float64, generator=g).requires_grad_()
    targets = torch.randint(7, (4, 6), generator=g)
    logp = logits.log_softmax(-1).gather(-1, targets[:, :, None]).squeeze(-1)
    loss, _ = loss_of("rft", logp, None, double(1, 0, 1, 1))
    lengths = MASK.sum(1).tolist()
    accepted = [cross_entropy(logits[i, : lengths[i]], targets[i, : lengths[i]]) for i in (0, 2, 3)]
    expected = sum(accepted) / 4
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.allclose(found, torch.autograd.grad(expected, logits)[0], atol=1e-15)
    assert torch.equal(found[1], torch.zeros(6, 7, dtype=torch.float64)), "nothing of the one that was refused"


def test_online_rft_is_reinforce_but_for_the_length_of_a_response():
    logp, _, _, _ = ragged(13)
    reward = double(1, 0, 1, 1)
    rft_gradient = gradient_of("rft", logp, None, reward)
    assert torch.allclose(rft_gradient, gradient_of("reinforce", logp, logp, reward / MASK.sum(1)), atol=1e-15)
    assert not torch.allclose(rft_gradient, gradient_of("reinforce", logp, logp, reward))


# --- TRL and verl ---

# What TRL 1.16.0 and verl 0.9.1 make of these tensors in float64: their own functions, imported and run. A value and
# its gradient by LOGP, to 14 digits. TRL: the trainer's own _compute_loss, with beta 0 and one micro-batch. verl: the
# function with its own ActorConfig; with a bool mask, as there, its 1e-8 added to a row's length vanishes.
# grpo_trainer.py is trl/trainer/grpo_trainer.py; core_algos.py is verl/trainer/ppo/core_algos.py.
LENGTHS = [5, 3, 1, 4, 2, 2]  # 17 tokens: verl's 17 / (17 - 1), which is in float32, is exact
PEER_MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]  # what is outside of it, 9 and 3 below, must not count
LOGP = -double(
    0.5, 1.5, 0.75, 2, 3,
    0.125, 1.5, 0.25, 9, 9,
    2.5, 9, 9, 9, 9,
    1, 2.375, 0.625, 1.75, 9,
    0.875, 2.25, 9, 9, 9,
    1.125, 0.5, 9, 9, 9,
).view(6, 5)  # fmt: skip
LOG_RATIO = double(
    2, -1.25, 0.125, -0.75, -0.123291015625,
    0.25, -0.5, 0.2490234375, 3, 3,
    0.21875, 3, 3, 3, 3,
    1.75, -2, 0.125, 0.1259765625, 3,
    -0.75, -0.25, 3, 3, 3,
    0.75, -0.125, 3, 3, 3,
).view(6, 5)  # fmt: skip
OLD_LOGP = LOGP - LOG_RATIO  # exactly: all numbers are multiples of 2^-12
ADVANTAGES = double(1.5, -1, 0.5, -0.75, 0.25, -2)  # given, for the losses: of all tokens of a response
REWARDS_2 = double(1, 0, 0.5, 0.25, 0, 0)  # 3 groups of 2
REWARDS_3 = double(1, 0, 0, 0.5, 0.25, 0)  # 2 groups of 3


def on_tokens(*values):
    """[B, T] with the 17 values on the tokens, row after row, and 0 elsewhere."""
    return torch.zeros(6, 5, dtype=torch.float64).masked_scatter(PEER_MASK, double(*values))


# TRL: importance_sampling_level="sequence", loss_type="grpo", epsilon=3e-4, epsilon_high=4e-4: _compute_loss in
# grpo_trainer.py, 3087-3088, 3095, 3113-3120, 3154. verl: compute_policy_loss_gspo, core_algos.py 1545-1619, with
# clip_ratio_low=3e-4, clip_ratio_high=4e-4 and "seq-mean-token-mean" (agg_loss, 1195-1202). Both.
# Rows: inside (above 3e-4, below 4e-4), clipped below, clipped above, inside, below and above with no clip.
GSPO = 0.38853559371673896
GSPO_GRADIENT = PEER_MASK * double(
    -0.05001709276471, 0, 0, 0.03125763032593, -0.01263605541068, 0.22780632352897,
)[:, None]  # fmt: skip

# TRL: loss_type="cispo", epsilon_high=5.0: grpo_trainer.py 3110-3111, 3170-3173; the cap is epsilon_high itself.
# verl: compute_policy_loss_cispo, core_algos.py 2047-2105, with clip_ratio_low=1.0, clip_ratio_high=4.0 (the cap is
# 1 + 4, line 2079) and "token-mean" (1170-1175). Both.
CISPO = 0.006701939325266709
CISPO_GRADIENT = on_tokens(
    -0.44117647058824, -0.025279835017076, -0.099983687035308, -0.041679401712442, -0.078000561658143,
    0.075530906863985, 0.035678274100743, 0.075457182216972,
    -0.036603532581356,
    0.22058823529412, 0.0059706742604388, 0.049991843517654, 0.05004068752307,
    -0.0069465669520737, -0.011452952692227,
    0.24905882548384, 0.10382316500995,
)  # fmt: skip

# TRL: loss_type="dapo", epsilon=0.2, epsilon_high=0.28: grpo_trainer.py 3113-3120, 3170-3173. verl:
# compute_policy_loss_vanilla, core_algos.py 1285-1376, with clip_ratio_low=0.2, clip_ratio_high=0.28, "token-mean",
# and clip_ratio_c=1e9, so that its dual clip does not act. Both.
DAPO = 0.5272473674965168
DAPO_GRADIENT = on_tokens(
    0, -0.025279835017076, -0.099983687035308, -0.041679401712442, -0.078000561658143,
    0.075530906863985, 0, 0.075457182216972,
    -0.036603532581356,
    0.25387952982378, 0, 0.049991843517654, 0.05004068752307,
    -0.0069465669520737, -0.011452952692227,
    0.24905882548384, 0.10382316500995,
)  # fmt: skip

# verl as above with its default clip_ratio_c=3.0 (verl/workers/config/actor.py, 163; core_algos.py 1323-1361): of
# the tokens with a negative advantage the one with ratio e^1.75 > 3 has the loss 3 |A| and no gradient.
DAPO_DUAL_CLIP = 0.4057207788492052
DAPO_DUAL_CLIP_GRADIENT = DAPO_GRADIENT.clone()
DAPO_DUAL_CLIP_GRADIENT[3, 0] = 0


@pytest.mark.parametrize(
    ("name", "more", "loss", "gradient"),
    [
        ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}, GSPO, GSPO_GRADIENT),
        ("cispo", {"cap": 5.0}, CISPO, CISPO_GRADIENT),
        ("dapo", {"clip_low": 0.2, "clip_high": 0.28}, DAPO, DAPO_GRADIENT),
    ],
)
def test_loss_and_gradient_are_those_of_trl_and_verl(name, more, loss, gradient):
    found, _ = loss_of(name, LOGP, OLD_LOGP, ADVANTAGES, PEER_MASK, **more)
    assert found.item() == pytest.approx(loss, rel=1e-13)
    minus = gradient_of(name, LOGP, OLD_LOGP, ADVANTAGES, PEER_MASK, **more)
    assert torch.allclose(-minus, gradient, rtol=1e-12, atol=1e-15)


def test_the_dual_clip_of_verl_which_is_left_out_takes_one_token_of_these_away():
    more = {"clip_low": 0.2, "clip_high": 0.28}
    ratio = math.exp(1.75)
    loss, _ = loss_of("dapo", LOGP, OLD_LOGP, ADVANTAGES, PEER_MASK, **more)
    assert loss.item() - 0.75 * (ratio - 3) / 17 == pytest.approx(DAPO_DUAL_CLIP, rel=1e-13)
    left_out = -gradient_of("dapo", LOGP, OLD_LOGP, ADVANTAGES, PEER_MASK, **more) - DAPO_DUAL_CLIP_GRADIENT
    assert left_out[3, 0].item() == pytest.approx(0.75 * ratio / 17)
    assert (left_out.abs() > 1e-13).sum() == 1


# Advantages of verl, of all tokens of a response: rewards at its last token, index the group; for REWARDS_2, REWARDS_3.
# compute_reinforce_plus_plus_baseline_outcome_advantage, core_algos.py 533-584: r - mean of the group, then
# masked_whiten over tokens (verl/utils/torch_functional.py, 311-346): variance with n - 1 tokens, plus 1e-8. In the
# first, two rewards of 0 and 0 have an advantage that is not 0.
REINFORCE_PP_ADVANTAGES = (
    double(1.2925286059507, -1.4976918767366, 0.246195924943, -0.45135919572883, -0.10258163539292, -0.10258163539292),
    double(1.2710229208468, -1.1750966626697, -1.1750966626697, 0.25180642771493, -0.35972346816418, -0.97125336404329),
)  # fmt: skip
# compute_grpo_outcome_advantage, core_algos.py 267-331: (r - mean) / (std + 1e-6), std with G - 1.
GRPO_ADVANTAGES = (
    double(0.70710578118796, -0.70710578118796, 0.70710278120917, -0.70710278120917, 0, 0),
    double(1.1546985383827, -0.57734926919136, -0.57734926919136, 0.999996000016, 0, -0.999996000016),
)  # fmt: skip
# The overlong reward for responses of 10 to 20 tokens, max_resp_len=20, overlong_buffer_cfg.len=5, penalty_factor=1:
# DAPORewardManager.__call__ in verl/workers/reward_manager/dapo.py, 121-127, in float32 there. TRL has the same in
# get_soft_overlong_punishment(20, 5), trl/rewards/other_rewards.py, 83-138. At 21 tokens verl gives -1.2, TRL -1.
OVERLONG = double(0, 0, 0, 0, 0, 0, -0.2, -0.4, -0.6, -0.8, -1)


@pytest.mark.parametrize(("rewards", "G", "which"), [(REWARDS_2, 2, 0), (REWARDS_3, 3, 1)])
def test_advantages_are_those_of_verl(rewards, G, which):
    b = reinforce_pp.group_advantages(rewards, G)
    over_tokens = reinforce_pp.whiten(b, torch.tensor(LENGTHS), whole)
    assert torch.allclose(over_tokens, REINFORCE_PP_ADVANTAGES[which], rtol=1e-12)
    for script in (gspo, cispo, dapo):
        assert torch.allclose(script.group_advantages(rewards, G, eps=1e-6), GRPO_ADVANTAGES[which], rtol=1e-12)


def test_the_overlong_punishment_is_that_of_trl_and_verl():
    found = dapo.overlong_punishment(torch.arange(10, 21), 20, 5)
    assert torch.allclose(found.double(), OVERLONG, atol=1e-7)


# --- the scripts ---


@pytest.fixture
def small(monkeypatch):
    """Fewer questions and no curves, which take most of the time of so small a run."""
    monkeypatch.setattr(data, "TRAIN_SIZE", 256)
    monkeypatch.setattr(plot, "save", lambda folders, path: None)


def run(tmp_path, name, script, **flags):
    """The metrics of a small run of a script."""
    script.main(script.Config(out=str(tmp_path / name), **SMALL | flags))
    return read_jsonl(tmp_path / name / "metrics.jsonl")


def saved(tmp_path, name):
    return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)


def record_batches(monkeypatch, script, seen):
    """Append every batch that a script scores, to look at what it has added when the run is over."""
    score = script.score

    def record(batch, examples, names):
        seen.append(batch)
        return score(batch, examples, names)

    monkeypatch.setattr(script, "score", record)


def score_by_tokens(monkeypatch, script):
    """Make every response right whose token ids add up to a multiple of 3."""
    score = script.score

    def by_tokens(batch, examples, names):
        scores = score(batch, examples, names)
        total = (batch.response_ids * batch.response_mask).sum(1)
        scores["accuracy"] = (total % 3 == 0).double().tolist()
        return scores

    monkeypatch.setattr(script, "score", by_tokens)


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_microbatch_size_gives_the_same_run(tmp_path, small, name):
    one, other = (
        run(tmp_path, str(b), SCRIPTS[name], steps=1, epochs=2, tokens_per_microbatch=b)[1] for b in (1, 10**6)
    )
    assert one["grad_norm"] > 0
    for metric in without_times([one])[0].keys():
        assert one[metric] == pytest.approx(other[metric], rel=1e-3, abs=1e-6), metric


@pytest.mark.parametrize("name", TOKEN_MEANS)
def test_the_mean_is_over_all_tokens_of_the_update_those_without_an_advantage_too(tmp_path, small, monkeypatch, name):
    script, seen, divisors = SCRIPTS[name], [], []
    loss = script.policy_loss

    def watched(logp, old_logp, advantages, mask, n, *rest):
        divisors.append((int(n), int(mask.sum())))
        return loss(logp, old_logp, advantages, mask, n, *rest)

    monkeypatch.setattr(script, "policy_loss", watched)
    record_batches(monkeypatch, script, seen)
    flags = {"prompts_per_step": 8, "group_size": 2, "steps": 1, "seed": 2, "beta": 0.0, "minibatches": 2}
    if name == "dapo":
        flags |= {"dynamic_sampling": False, "overlong_weight": 0.0}
    run(tmp_path, "run", script, tokens_per_microbatch=10**6, **flags)
    batch = seen[-1]
    assert (batch["advantages"] == 0).any(), "a group is all right or all wrong"
    updates = batch.minibatch_rows(2, 10**6 * 2 + 1, 0)
    expected = []
    for rows in updates:
        with_advantage = rows[batch["advantages"][rows] != 0]
        expected.append((int(batch.lengths[rows].sum()), int(batch.lengths[with_advantage].sum())))
    assert divisors == expected and any(n > own for n, own in expected)


def test_reinforce_runs_with_one_response_per_question_and_its_kl_lowers_the_reward(tmp_path, small, monkeypatch):
    seen = []
    answers = iter([-1.0, -1.5])  # log pi_old, then log pi_ref, of every token: k1 is 0.5

    def logprobs(policy, batch, temperature, budget):
        seen.append(batch)
        return next(answers) * batch.response_mask

    monkeypatch.setattr(reinforce, "batch_logprobs", logprobs)
    flags = {"group_size": 1, "prompts_per_step": 16, "steps": 1, "beta": 0.1}
    record = run(tmp_path, "run", reinforce, **flags)[1]
    batch = seen[0]
    assert len(batch.texts) == 16 and 0 < batch["rewards"].sum() < 16
    assert torch.allclose(batch["advantages"], batch["rewards"] - 0.1 * 0.5 * batch.lengths)
    assert record["kl"] == pytest.approx(0.5) and record["grad_norm"] > 0 and record["informative_groups"] is None


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("reinforce", "rft")])
def test_what_needs_a_group_refuses_a_single_response(tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        SCRIPTS[name].main(SCRIPTS[name].Config(out=str(tmp_path / "run"), group_size=1))
    assert capsys.readouterr().err == "--group-size 1: it must be at least 2\n"


def test_a_negative_reward_ends_a_run_of_maxrl(tmp_path, small, capsys):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "run", maxrl, steps=1, rewards=("accuracy=-1",))
    assert error.value.code == 2 and "MaxRL divides by the mean reward" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("whiten_tokens", [False, True])
def test_whiten_tokens_counts_tokens(tmp_path, small, monkeypatch, whiten_tokens):
    seen = []
    record_batches(monkeypatch, reinforce_pp, seen)
    run(tmp_path, "run", reinforce_pp, steps=1, whiten_tokens=whiten_tokens)
    (batch,) = seen
    b = reinforce_pp.group_advantages(batch["rewards"].double(), 4)
    lengths = batch.lengths.tolist()
    expected = whitened_by_hand(b, lengths if whiten_tokens else [1] * 16)
    assert torch.allclose(batch["advantages"].double(), expected, atol=1e-5)
    assert not torch.allclose(expected, whitened_by_hand(b, [1] * 16 if whiten_tokens else lengths), atol=1e-2)


def test_dapo_switched_off_is_grpo_where_all_responses_are_as_long(tmp_path, small, monkeypatch):
    records = {}
    off = {"dynamic_sampling": False, "max_rounds": 1, "overlong_weight": 0.0, "clip_high": 0.2, "beta": 0.04}
    for script, flags in ((grpo, {}), (dapo, off)):
        score_by_tokens(monkeypatch, script)
        records[script] = run(tmp_path, script.__name__, script, steps=2, epochs=2, max_new_tokens=3, lr=1e-3, **flags)
    one, other = (without_times(records[script]) for script in (grpo, dapo))
    assert one[2]["truncated"] == 1 and one[2]["response_length"] == 3 and one[2]["informative_groups"] > 0
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine.pop("step") == theirs.pop("step") and theirs.pop("rounds") == 1
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("overlong_filter", [False, True])
def test_dapo_shapes_the_reward_and_leaves_out_cut_responses_if_told_to(tmp_path, small, monkeypatch, overlong_filter):
    seen = []
    record_batches(monkeypatch, dapo, seen)
    flags = {"max_new_tokens": 24, "overlong_filter": overlong_filter, "overlong_weight": 0.3}
    record = run(tmp_path, "run", dapo, steps=1, **flags)[1]
    batch = seen[-1]
    cut = torch.tensor([reason == "length" for reason in batch.finish_reasons])
    assert 0 < cut.sum() < 16
    shaped = []
    for reward, length in zip(batch["rewards"].tolist(), batch.lengths.tolist(), strict=True):
        over = max(0, length - (24 - 0.2 * 24)) / (0.2 * 24)
        shaped.append(reward - 0.3 * over)
    advantages = grpo.group_advantages(torch.tensor(shaped), 4)
    assert torch.allclose(batch["advantages"], advantages, atol=1e-4)
    assert not torch.allclose(advantages, grpo.group_advantages(batch["rewards"], 4), atol=1e-2)
    right = batch["rewards"].view(4, 4).sum(1)
    assert ((0 < right) & (right < 4)).all(), "the reward that is logged is the accuracy"
    counted = batch.lengths * ~cut if overlong_filter else batch.lengths
    assert torch.equal(batch["in_loss"].sum(1), counted)
    expected = -(batch["advantages"] * counted).sum() / counted.sum()  # the ratio is 1
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_if_all_responses_are_cut_and_left_out_nothing_is_learned(tmp_path, small, monkeypatch, tiny):
    score_by_tokens(monkeypatch, dapo)
    record = run(tmp_path, "run", dapo, steps=1, max_new_tokens=3, overlong_filter=True)[1]
    assert record["truncated"] == 1 and record["informative_groups"] == 1
    assert record["loss"] == 0 and record["grad_norm"] == 0
    state = saved(tmp_path, "run")["policy"]
    for name, x in tiny[0].state_dict().items():
        assert torch.equal(state[name], x), name


def test_dynamic_sampling_looks_at_the_accuracy_and_not_at_the_reward(tmp_path, small, monkeypatch):
    """The reward is the form alone; the first groups of mixed accuracy are not the first ones of mixed form."""
    score, seen = dapo.score, []

    def record(batch, examples, names):
        seen.append((batch.texts, score(batch, examples, ["format"])))
        return score(batch, examples, names)

    monkeypatch.setattr(dapo, "score", record)
    metrics = run(tmp_path, "run", dapo, steps=1, prompts_per_step=8, rewards=("format=1",), overlong_weight=0.0)[1]
    *sampled, (kept, _) = seen
    assert len(sampled) == metrics["rounds"] > 1
    mixed = {"accuracy": [], "format": []}
    for texts, scores in sampled:
        for name in mixed:
            for i in range(0, 32, 4):
                if len(set(scores[name][i : i + 4])) == 2:
                    mixed[name] += texts[i : i + 4]
    assert kept == mixed["accuracy"][:32] and kept != mixed["format"][:32]


def test_when_dapo_gives_up_what_it_had_is_saved_and_a_resumed_run_goes_on_to_the_bit(
    tmp_path, small, monkeypatch, capsys
):
    flags = {"steps": 3, "max_rounds": 5, "lr": 1e-3}
    expected = run(tmp_path, "whole", dapo, **flags)
    assert max(record["rounds"] for record in expected[1:]) > 1
    score, sample = dapo.score, dapo.sample_mixed
    steps = []

    def all_right(batch, examples, names):
        scores = score(batch, examples, names)
        if steps[-1] == 3:
            scores["accuracy"] = [1.0] * len(batch.texts)
        return scores

    monkeypatch.setattr(dapo, "score", all_right)
    monkeypatch.setattr(dapo, "sample_mixed", lambda *rest: steps.append(rest[-1]) or sample(*rest))
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "part", dapo, **flags)
    assert error.value.code == 2
    assert capsys.readouterr().err.rstrip().rpartition("\n")[2] == (
        "step 3: in 5 rounds 0 of 4 groups have right and wrong responses (accuracy 1.00). "
        "Too hard or too easy by now: give another --task"
    )
    assert saved(tmp_path, "part")["step"] == 2
    assert [record["step"] for record in read_jsonl(tmp_path / "part" / "metrics.jsonl")] == [0, 1, 2]
    monkeypatch.setattr(dapo, "score", score)
    resumed = run(tmp_path, "part", dapo, resume=str(tmp_path / "part"), **flags)
    assert without_times(resumed) == without_times(expected)
    one, other = saved(tmp_path, "whole")["policy"], saved(tmp_path, "part")["policy"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_when_dapo_gives_up_at_its_first_step_there_is_nothing_to_save(tmp_path, small, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "run", dapo, steps=1, max_new_tokens=3, max_rounds=2)
    assert "step 1: in 2 rounds 0 of 4 groups" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# --- whom rft samples from ---


@pytest.mark.parametrize(("offline", "lora_rank"), [(True, 0), (True, 4), (False, 0)])
def test_offline_rft_samples_from_the_first_policy_and_evaluates_the_present_one(
    tmp_path, small, monkeypatch, tiny, offline, lora_rank
):
    make, seen, gaps = rft.make_sampler, [], {1: [], 4: []}  # by the number of responses to a question

    def make_watched(config, policy, *rest):
        sampler = make(config, policy, *rest)
        generate = sampler.generate

        def watched(prompts, n, *rest, **named):
            batch = generate(prompts, n, *rest, **named)
            found = []
            for one in (tiny[0], copy.deepcopy(policy)):  # the first policy, and the one that is being trained
                logp = batch_logprobs(one, batch, 1.0, 10**6)
                found.append((logp - batch.sampler_logp).abs().max().item())
            gaps[n].append(found)
            return batch

        sampler.generate = watched
        return sampler

    monkeypatch.setattr(rft, "make_sampler", make_watched)
    record_batches(monkeypatch, rft, seen)
    flags = {
        "lr": 5e-3,
        "beta": 0.01,
        "offline": offline,
        "lora_rank": lora_rank,
        "rewards": ("accuracy=1", "format=0.5"),
    }
    records = run(tmp_path, "run", rft, steps=2, **flags)
    same, other = 1e-4, 0.1
    (first, present), (first_later, present_later) = gaps[4]
    assert first < same and present < same
    assert (first_later < same < other < present_later) if offline else (present_later < same < other < first_later)
    for first, present in gaps[1][:2]:  # before training, greedy and sampled
        assert first < same and present < same
    for first, present in gaps[1][2:]:  # and after it
        assert present < same < other < first
    assert len(gaps[1]) == 4
    assert records[1]["sampler_gap"] < same
    assert records[2]["sampler_gap"] > 0.01 if offline else records[2]["sampler_gap"] < same
    for batch in seen:
        assert batch["advantages"].tolist() == [float(r >= 1) for r in batch["rewards"].tolist()]
    assert {0, 1} == {a for batch in seen for a in batch["advantages"].tolist()}


def test_resuming_offline_rft_continues_to_the_bit(tmp_path, small):
    flags = {"offline": True, "lr": 1e-3}
    expected = run(tmp_path, "whole", rft, steps=3, eval_every=2, **flags)
    run(tmp_path, "part", rft, steps=2, eval_every=2, **flags)
    resumed = run(tmp_path, "part", rft, steps=3, eval_every=2, resume=str(tmp_path / "part"), **flags)
    assert without_times(resumed) == without_times(expected)
    one, other = saved(tmp_path, "whole")["policy"], saved(tmp_path, "part")["policy"]
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- from the command line ---

FLAGS = ["--prompts-per-step", 4, "--group-size", 4, "--eval-prompts", 1, "--eval-samples", 1]


def test_a_member_starts_as_a_module_from_the_root():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "family.dapo", "--group-size", "1"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "--group-size 1: it must be at least 2\n"


def test_from_another_folder_a_member_finds_the_root_and_the_tiny_model(tmp_path):
    command = [sys.executable, str(ROOT / "family" / "rft.py"), "--steps", "1", *map(str, FLAGS), "--offline"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("rft-") and (folder / "model" / "config.json").exists()
    assert json.loads((folder / "config.json").read_text())["offline"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_accuracy_rises(tmp_path, name):
    run_script(f"family/{name}.py", "--steps", 25, "--eval-every", 0, "--out", tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["eval_pass@1"] > records[0]["eval_pass@1"] + 0.2
    assert records[-1]["eval_format"] > records[0]["eval_format"] + 0.2
