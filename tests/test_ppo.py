"""ppo.py: its equations against values worked out by hand, and the script."""

import copy
import math

import pytest
import torch
from conftest import ROOT, make_sampler, read_jsonl, run_script
from test_siblings import OBJECTIVE, double, sections
from transformers import AutoConfig, AutoModelForTokenClassification

import ppo
from data import collate, encode_prompts, load_task

MASK = torch.arange(7) < torch.tensor([[7], [4], [1]])  # ragged rows
SMALL = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 1, "model": str(ROOT / "tiny")}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(tmp_path, name, **flags):
    ppo.main(ppo.Config(out=str(tmp_path / name), **SMALL | flags))
    return read_jsonl(tmp_path / name / "metrics.jsonl")


def saved(tmp_path, name):
    return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_values_are_those_of_the_value_network(tiny, family):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(family, num_attention_heads=4, num_labels=1, pad_token_id=0, **shape)
    torch.manual_seed(0)
    value = AutoModelForTokenClassification.from_config(config).eval()
    responses = [[7, 8, 9], [3], [4, 4], [9, 9, 9, 9]]
    batch = collate([[5, 6], [2]], responses, [[0.0] * len(r) for r in responses], [""] * 4, tiny[1], "cpu")
    values = ppo.token_values(value, batch)
    assert values.shape == (4, 4) and values.requires_grad and not values[~batch.response_mask].any()
    for i, response in enumerate(responses):
        ids = torch.tensor([[[5, 6], [2]][i // 2] + response])
        expected = value(ids).logits[0, :, 0]
        assert torch.allclose(values[i, : len(response)], expected[-len(response) - 1 : -1], atol=1e-5)


def test_it_differs_only_in_the_objective_and_in_the_set_up_of_the_value_network():
    base, other = sections("grpo"), sections("ppo")
    assert list(base) == list(other)
    assert {name for name in base if base[name] != other[name]} <= OBJECTIVE | {"top", "training"}
    top = other["top"].replace("make_sampler, response_states,", "make_sampler,")  # of which V is a function
    gone = set(base["top"].splitlines()) - set(top.splitlines())
    assert not gone, "in the configuration, only added lines"


# --- rewards, GAE, whitening ---


def test_the_reward_is_at_the_last_real_token():
    r = ppo.token_rewards(double(1, 2, 3), torch.zeros(3, 7, dtype=torch.float64), MASK, 0.1)
    expected = torch.zeros(3, 7, dtype=torch.float64)
    expected[0, 6], expected[1, 3], expected[2, 0] = 1, 2, 3
    assert torch.equal(r, expected)
    kl = random(3, 7)
    assert torch.allclose(ppo.token_rewards(double(1, 2, 3), kl, MASK, 0.1), expected - 0.1 * kl * MASK)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.0), (0.9, 0.8), (1.0, 0.95), (0.5, 1.0)])
def test_gae_against_the_double_sum(gamma, lam):
    r, V = random(3, 7) * MASK, random(3, 7, seed=1)
    A = ppo.gae(r, V, MASK, gamma, lam)
    for i, length in enumerate(MASK.sum(1).tolist()):
        v = [*V[i, :length].tolist(), 0.0]
        delta = [r[i, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(7):
            by_hand = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert A[i, t].item() == pytest.approx(by_hand, abs=1e-12)
            if lam == 0 and t < length:
                assert A[i, t].item() == delta[t]
            if lam == 1 and t < length:
                returns = sum(gamma ** (k - t) * r[i, k].item() for k in range(t, length))
                assert A[i, t].item() == pytest.approx(returns - v[t], abs=1e-12)


def test_with_gamma_and_lam_1_the_advantage_is_exactly_return_minus_value():
    g = torch.Generator().manual_seed(0)  # multiples of 1/8: nothing is rounded
    r, V = (torch.randint(-8, 8, (3, 7), generator=g) / 8 * MASK for _ in range(2))
    returns = r.flip(1).cumsum(1).flip(1)
    assert torch.equal(ppo.gae(r, V, MASK, 1.0, 1.0), (returns - V) * MASK)


@pytest.mark.parametrize("garbage", [1e9, math.inf, math.nan])
def test_nothing_beyond_the_end_leaks(garbage):
    r, V = random(3, 7) * MASK, random(3, 7, seed=1)
    clean = ppo.gae(r, V, MASK, 0.9, 0.8)
    assert torch.equal(ppo.gae(r, V.masked_fill(~MASK, garbage), MASK, 0.9, 0.8), clean)
    assert torch.equal(ppo.gae(r.masked_fill(~MASK, garbage), V, MASK, 0.9, 0.8), clean)
    assert not clean[~MASK].any()
    for i, length in enumerate(MASK.sum(1).tolist()):  # and a row alone, without padding, has the same advantages
        row = slice(i, i + 1), slice(0, length)
        assert torch.allclose(ppo.gae(r[row], V[row], MASK[row], 0.9, 0.8), clean[row])


def test_whitening_is_over_the_tokens_of_all_processes():
    x = random(3, 7) * 3 + 5
    white = ppo.whiten(x, MASK, lambda total: total)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].std(correction=1).item() == pytest.approx(1, rel=1e-4) and not white[~MASK].any()
    garbage = x.masked_fill(~MASK, 1e6)
    assert torch.equal(ppo.whiten(garbage, MASK, lambda total: total), white)
    # Two processes with equal halves: the sums of all are twice those of one.
    both = ppo.whiten(torch.cat([x, x]), torch.cat([MASK, MASK]), lambda total: total)
    assert torch.allclose(ppo.whiten(x, MASK, lambda total: 2 * total), both[:3], atol=1e-12)
    assert torch.equal(ppo.whiten(torch.ones(3, 7), MASK, lambda total: total), torch.zeros(3, 7))


# --- kl ---


def test_k1_is_unbiased_and_clamped_it_is_too_large():
    p, ref = double(0.7, 0.2, 0.1), double(0.05, 0.15, 0.8)
    exact = (p * (p / ref).log()).sum().item()
    assert (p * ppo.kl_k1(p.log(), ref.log(), False)).sum().item() == pytest.approx(exact)
    for seed in range(20):
        logp, ref = random(2, 5, seed=seed).log_softmax(-1)
        exact = (logp.exp() * (logp - ref)).sum()
        clamped = (logp.exp() * ppo.kl_k1(logp, ref, True)).sum()
        cut_off = (logp.exp() * (ref - logp).clamp(min=0)).sum()
        assert clamped > exact and clamped.item() == pytest.approx((exact + cut_off).item())


# --- losses ---


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.95, 1.0, 1.05, 1.25, 2.0])
def test_clip_table(advantage, ratio):
    logp = double(math.log(ratio)).view(1, 1).requires_grad_()
    A, mask = double(advantage).view(1, 1), torch.ones(1, 1, dtype=torch.bool)
    loss, stats = ppo.policy_loss(logp, torch.zeros(1, 1, dtype=torch.float64), A, mask, 1, 0.2, 0.2)
    loss.backward()
    is_clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert stats["clip_fraction"].item() == is_clipped
    assert logp.grad.item() == 0 if is_clipped else logp.grad.item() == pytest.approx(-advantage * ratio)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # inside the range: the plain squared error
        (0.5, 0.0, 1.0, 0.32, 0.0),  # outside and closer to the target: the clipped error is the larger; no gradient
        (-0.5, 0.0, 1.0, 1.125, -1.5),  # outside and farther: the plain error is the larger, and pulls back
        (0.5, 0.0, -1.0, 1.125, 1.5),
        (-0.5, 0.0, -1.0, 0.32, 0.0),
    ],
)
def test_value_clip_takes_the_worse_error(value, old, target, loss, gradient):
    v, old, target = (double(x).view(1, 1) for x in (value, old, target))
    v.requires_grad_()
    result, stats = ppo.value_loss(v, old, target, torch.ones(1, 1, dtype=torch.bool), 1, 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss) == stats["value_loss"].item()
    assert v.grad.item() == pytest.approx(gradient)


def test_gradients_against_finite_differences_and_in_parts():
    logp, old, A = random(3, 7).requires_grad_(), random(3, 7) + 0.05 * random(3, 7, seed=1), random(3, 7, seed=2)
    v, old_v, returns = random(3, 7, seed=3).requires_grad_(), random(3, 7, seed=4), random(3, 7, seed=5)
    n = MASK.sum()

    def losses(logp, v, rows):
        policy = ppo.policy_loss(logp[rows], old[rows], A[rows], MASK[rows], n, 0.2, 0.2)[0]
        return policy, ppo.value_loss(v[rows], old_v[rows], returns[rows], MASK[rows], n, 0.2)[0]

    assert torch.autograd.gradcheck(lambda x, y: losses(x, y, slice(None)), (logp, v))
    parts = zip(losses(logp, v, slice(0, 1)), losses(logp, v, slice(1, 3)), strict=True)
    for (one, other), whole in zip(parts, losses(logp, v, slice(None)), strict=True):
        assert (one + other).item() == pytest.approx(whole.item(), abs=1e-12)
    on_policy = logp.detach().requires_grad_()
    ppo.policy_loss(on_policy, logp.detach(), A, MASK, n, 0.2, 0.2)[0].backward()
    assert torch.allclose(on_policy.grad, -A * MASK / n), "every token of the update weighs the same"


# --- the value network ---


def test_values_start_at_zero_and_do_not_see_the_token_they_come_before(tiny):
    value = ppo.load_value(str(ROOT / "tiny"), torch.device("cpu"))
    assert not value.training and all(p.dtype == torch.float32 for p in value.parameters())
    prompts = [e["prompt_ids"] for e in encode_prompts(load_task("arithmetic").train[:3], tiny[1], "plain", 64)]
    batch = make_sampler(*tiny).generate(prompts, n=2, temperature=1.0, seed=0)
    assert not ppo.token_values(value, batch).any()
    torch.nn.init.normal_(value.score.weight, generator=torch.Generator().manual_seed(0))
    V, t = ppo.token_values(value, batch), 3
    assert V.shape == batch.response_mask.shape and V[batch.response_mask].all() and not V[~batch.response_mask].any()
    changed = copy.copy(batch)
    changed.input_ids = batch.input_ids.clone()
    changed.input_ids[:, -V.shape[1] + t] = 5
    W = ppo.token_values(value, changed)
    assert torch.equal(W[:, : t + 1], V[:, : t + 1]) and not torch.equal(W[:, t + 1], V[:, t + 1])
    alone = ppo.token_values(value, batch.select(torch.tensor([4])))  # other padding, left and right
    assert torch.allclose(alone, V[4:5, : alone.shape[1]], atol=1e-5)


def test_a_head_that_the_folder_has_is_kept(tmp_path):
    value = ppo.load_value(str(ROOT / "tiny"), torch.device("cpu"))
    torch.nn.init.ones_(value.score.weight)
    value.save_pretrained(tmp_path)
    assert ppo.load_value(str(tmp_path), torch.device("cpu")).score.weight.eq(1).all()


def test_every_parameter_is_in_exactly_one_group(tmp_path, monkeypatch):
    made, models = [], []
    adam, load_value, load_model = torch.optim.AdamW, ppo.load_value, ppo.load_model
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(adam(*a, **k)) or made[-1])
    monkeypatch.setattr(ppo, "load_value", lambda *a: models.append(load_value(*a)) or models[-1])
    monkeypatch.setattr(ppo, "load_model", lambda *a: (lambda x: models.append(x[0]) or x)(load_model(*a)))
    run(tmp_path, "run", beta=0.0, lr=1e-4, value_lr=2e-3)
    (optimizer,) = made
    policy, value = models
    for group, model, lr in zip(optimizer.param_groups, (policy, value), (1e-4, 2e-3), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()] and group["lr"] == lr
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(set(everything)) == len(everything) and all(p.requires_grad for p in policy.parameters())


# --- the script ---


@pytest.mark.parametrize("flags", [{"epochs": 2}, {"beta": 0.0}, {"epochs": 2, "minibatches": 2, "lam": 0.9}])
def test_any_microbatch_size_gives_the_same_run(tmp_path, flags):
    one, other = (run(tmp_path, str(n), tokens_per_microbatch=n, **flags)[1] for n in (1, 10**6))
    names = {"loss", "value_loss", "grad_norm", "kl", "entropy", "clip_fraction", "ratio_max", "reward"} & one.keys()
    assert len(names) >= 7
    for name in names:
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


def test_in_the_value_warmup_no_weight_of_the_policy_changes(tmp_path):
    run(tmp_path, "warm", steps=2, epochs=2, value_warmup=2)
    state, before = saved(tmp_path, "warm"), ppo.load_model(str(ROOT / "tiny"), torch.device("cpu"))[0].state_dict()
    assert all(torch.equal(before[name], x) for name, x in state["policy"].items())
    assert state["value"]["score.weight"].any()
    assert len(state["optimizer"]["state"]) == len(state["optimizer"]["param_groups"][1]["params"])
    run(tmp_path, "after", steps=3, epochs=2, value_warmup=2)
    assert any(not torch.equal(before[name], x) for name, x in saved(tmp_path, "after")["policy"].items())


def test_resuming_continues_to_the_bit(tmp_path):
    flags = {"epochs": 2, "minibatches": 2, "value_warmup": 1}
    run(tmp_path, "whole", steps=4, **flags)
    run(tmp_path, "cut", steps=2, **flags)
    run(tmp_path, "cut", steps=4, resume=str(tmp_path / "cut"), **flags)
    whole, cut = saved(tmp_path, "whole"), saved(tmp_path, "cut")
    for name in ("policy", "value"):
        assert all(torch.equal(x, cut[name][key]) for key, x in whole[name].items())


def test_the_clamped_kl_is_only_in_the_reward(tmp_path):
    plain, clamped = (run(tmp_path, str(x), steps=2, beta=1.0, lr=1e-3, clamp_kl=x)[2] for x in (False, True))
    assert plain["kl"] == clamped["kl"] and plain["value_loss"] != clamped["value_loss"]


def test_accuracy_rises(tmp_path):
    run_script("ppo.py", "--steps", 25, "--eval-every", 0, "--out", tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    print([record["eval_pass@1"] for record in records if "eval_pass@1" in record])
    assert records[-1]["eval_pass@1"] > records[0]["eval_pass@1"] + 0.2
    assert records[-1]["eval_format"] > records[0]["eval_format"] + 0.2
    assert sum(r["value_loss"] for r in records[-5:]) < sum(r["value_loss"] for r in records[1:6])
