"""kimi_k15.py: the published surrogate, its length reward, and how its questions are chosen."""

import difflib
import itertools
import math
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT, read_jsonl, run_script, without_times
from test_siblings import OBJECTIVE, double, sections

import kimi_k15
from data import draw, load_task
from kimi_k15 import (
    Config,
    SuccessRates,
    draw_questions,
    draw_weighted,
    easy_first,
    group_advantages,
    length_rewards,
    policy_loss,
)
from plumbing.run import Run

FLAGS = {"beta", "clip_low", "clip_high", "tau", "length_weight", "length_from", "curriculum", "prioritised"}
SMALL = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "model": str(ROOT / "tiny")}


def loss_of(logp, old_logp, advantages, mask, tau=0.7, n=None):
    return policy_loss(logp, old_logp, advantages, mask, n or len(logp), tau)[0]


def ragged(seed=0):
    """Two groups of 4: log-probs with gradient, those of pi_i, rewards, mask; what is off the mask is noise."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[6], [2], [1], [4], [3], [5], [6], [2]])
    logp = -torch.rand(8, 6, dtype=torch.float64, generator=g)
    old_logp = logp + 0.3 * torch.randn(8, 6, dtype=torch.float64, generator=g)
    return logp.requires_grad_(), old_logp, torch.rand(8, dtype=torch.float64, generator=g), mask


# --- the script is a patch ---


def test_it_differs_only_in_the_objective_and_in_the_lines_that_flags_and_questions_need():
    base, other = sections("grpo"), sections("kimi_k15")
    assert list(base) == [name for name in other if name != "questions"], "same sections, same order"
    assert {name for name in base if base[name] != other[name]} <= OBJECTIVE | {"top", "training", "rollout"}

    def changed(name):
        lines = difflib.ndiff(base[name].splitlines(), other[name].splitlines())
        return [line[2:].strip() for line in lines if line[0] in "+-"]

    top = [line for line in changed("top") if not line.startswith(("import ", "from "))]
    assert {line.split(":")[0] for line in top} == FLAGS | {"epochs"}
    training = [re.split(r" = |\(", line)[0] for line in changed("training")]
    assert sorted(training) == ["check_levels", "rates", "reference", "run.start", "run.start"]
    rollout = [line for line in changed("rollout") if not line.startswith("# ---")]  # pi_old is named pi_i
    assert [line.split("(")[0] for line in rollout] == ["questions = run.share"] * 2
    assert "draw(" in rollout[0] and "draw_questions(" in rollout[1]


# --- the surrogate ---


@pytest.mark.parametrize("tau", [0.05, 0.7, 3.0])
def test_gradient_is_that_of_the_squared_loss_that_solves_eq_2(tau):
    """-(1 / (2 tau)) grad L, with mean(r) in the place of tau log Z; L is written out here response by response."""
    logp, old_logp, r, mask = ragged()
    L = 0.0
    for j in range(8):
        mean = r[:4].mean() if j < 4 else r[4:].mean()
        log_ratio = sum(logp[j, t] - old_logp[j, t] for t in range(6) if mask[j, t])
        L = L + (r[j] - mean - tau * log_ratio) ** 2 / 8
    (of_L,) = torch.autograd.grad(L, logp)
    (ours,) = torch.autograd.grad(loss_of(logp, old_logp, group_advantages(r, 4), mask, tau), logp)
    assert torch.allclose(ours, of_L / (2 * tau), rtol=1e-10, atol=1e-14)  # a descent on both
    loss = loss_of(logp, old_logp, group_advantages(r, 4), mask, tau)
    constant = group_advantages(r, 4).square().mean() / (2 * tau)
    assert loss.item() == pytest.approx((L / (2 * tau) - constant).item(), abs=1e-12)


def test_gradient_is_that_of_eq_3_as_published():
    logp, old_logp, r, mask = ragged(1)
    lp, lp_i, tau = (logp * mask).sum(1), (old_logp * mask).sum(1), 0.7
    a = r - r.view(2, 4).mean(1).repeat_interleave(4)
    (step,) = torch.autograd.grad((a * lp - tau / 2 * (lp - lp_i) ** 2).mean(), logp)
    (ours,) = torch.autograd.grad(loss_of(logp, old_logp, group_advantages(r, 4), mask, tau), logp)
    assert torch.allclose(-ours, step, rtol=1e-10, atol=1e-14)


def test_values_by_hand():
    # log-ratios 0.5 - 0.2 = 0.3 and 0.4; A 0.5 and -0.5; tau 2: -[0.15 - 0.09] / 2 and -[-0.2 - 0.16] / 2.
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logp = double(0.5, -0.2, 9.0, 0.4, 9.0, 9.0).view(2, 3).requires_grad_()
    old = torch.zeros(2, 3, dtype=torch.float64)
    loss, stats = policy_loss(logp, old, double(0.5, -0.5), mask, 2, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(-0.03 + 0.18)
    # d/dlogp: -(A - tau x) / 2 on every token of the response.
    by_hand = [[0.05, 0.05, 0.0], [0.65, 0.0, 0.0]]
    assert torch.allclose(logp.grad, torch.tensor(by_hand, dtype=torch.float64))
    assert stats["log_ratio_squared"].flatten().tolist() == pytest.approx([0.09, 0.16])
    assert stats["ratio_max"].flatten().tolist() == pytest.approx([math.exp(0.3), math.exp(0.4)])
    assert stats["kl_old"].shape == logp.shape and (stats["kl_old"] >= 0).all()


def test_the_squared_log_ratio_is_logged_as_a_mean_over_responses(tmp_path):
    run = Run(Config(out=str(tmp_path / "run"), **SMALL))
    mask = torch.tensor([[True, False, False], [True, True, True]])
    logp = double(1.0, 9.0, 9.0, 0.5, 0.5, 1.0).view(2, 3)  # log-ratios 1 and 2, of one token and of three
    loss, stats = policy_loss(logp, torch.zeros_like(logp), double(0, 0), mask, 2, 1.0)
    run.collect(mask, loss, **stats)
    record = run.collected(updates=1)
    assert record["log_ratio_squared"] == pytest.approx((1 + 4) / 2)  # over tokens it would be (1 + 3 * 4) / 4
    assert record["ratio_max"] == pytest.approx(math.exp(2)) and record["loss"] == pytest.approx((1 + 4) / 2 / 2)


def test_a_response_that_is_twice_as_long_weighs_twice_as_much():
    mask = torch.arange(6) < torch.tensor([[3], [6]])
    logp = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    loss_of(logp, logp.detach(), double(1, 1), mask).backward()
    assert logp.grad.sum(1).tolist() == pytest.approx([-1.5, -3.0])


def test_at_the_start_of_an_iteration_it_is_the_policy_gradient_with_the_mean_as_baseline():
    logp, _, r, mask = ragged(2)
    a = r - r.view(2, 4).mean(1).repeat_interleave(4)
    (policy_gradient,) = torch.autograd.grad((a * (logp * mask).sum(1)).mean(), logp)
    for tau in (0.0, 1.0, 100.0):
        (ours,) = torch.autograd.grad(loss_of(logp, logp.detach(), group_advantages(r, 4), mask, tau), logp)
        assert torch.allclose(-ours, policy_gradient, atol=1e-14)


def test_a_response_without_advantage_is_pulled_back_to_pi_i():
    logp = double(0.5, 0.5).view(1, 2).requires_grad_()
    loss_of(logp, torch.zeros(1, 2, dtype=torch.float64), double(0.0), torch.ones(1, 2, dtype=torch.bool)).backward()
    assert logp.grad.flatten().tolist() == pytest.approx([0.7, 0.7])  # tau times the log-ratio, 1


def test_gradients_against_finite_differences_and_in_parts():
    logp, old_logp, r, mask = ragged(3)
    a = group_advantages(r, 4)
    assert torch.autograd.gradcheck(lambda x: loss_of(x, old_logp, a, mask), logp)
    parts = [slice(0, 1), slice(1, 6), slice(6, 8)]
    shares = [loss_of(logp[p], old_logp[p], a[p], mask[p], n=8) for p in parts]
    assert sum(shares).item() == pytest.approx(loss_of(logp, old_logp, a, mask).item(), abs=1e-12)


def test_the_minimum_is_the_policy_of_the_closed_form():
    """With tau log Z exact instead of the mean, the loss is least, over all policies, at pi_i exp(r / tau) / Z."""
    g, tau = torch.Generator().manual_seed(4), 0.5
    log_pi_i, r = torch.randn(5, dtype=torch.float64, generator=g).log_softmax(0), double(1, 0, 0.3, 1, 0)
    log_z = torch.logsumexp(log_pi_i + r / tau, 0)
    best = log_pi_i + r / tau - log_z
    assert best.exp().sum().item() == pytest.approx(1.0)
    logp, mask = best[:, None].clone().requires_grad_(), torch.ones(5, 1, dtype=torch.bool)
    loss_of(logp, log_pi_i[:, None], r - tau * log_z, mask, tau).backward()
    assert torch.allclose(logp.grad, torch.zeros(5, 1, dtype=torch.float64), atol=1e-12)


def test_kl_old_is_the_divergence_of_pi_i_from_pi():
    """Its mean over samples of pi_i, here over all outcomes, is KL(pi_i || pi) exactly."""
    g = torch.Generator().manual_seed(5)
    log_pi_i, log_pi = torch.randn(2, 7, dtype=torch.float64, generator=g).log_softmax(1)
    mask = torch.ones(7, 1, dtype=torch.bool)
    stats = policy_loss(log_pi[:, None], log_pi_i[:, None], torch.zeros(7), mask, 7, 1.0)[1]
    mean = (log_pi_i.exp() * stats["kl_old"][:, 0]).sum()
    assert mean.item() == pytest.approx((log_pi_i.exp() * (log_pi_i - log_pi)).sum().item())


def test_advantage_is_reward_minus_the_mean_that_includes_it():
    assert group_advantages(double(1, 0, 0, 0, 2, 4), 3).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, -2, 0, 2])
    assert torch.equal(group_advantages(torch.full((16,), 0.1), 8), torch.zeros(16))


# --- the length reward ---


def test_length_reward_of_right_and_wrong_answers():
    lengths = torch.tensor([10, 20, 30, 10, 20, 30])
    accuracy = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]  # right: 0.5 to -0.5; wrong: never above 0
    assert length_rewards(lengths, accuracy, 6).tolist() == pytest.approx([0.5, 0, -0.5, 0, 0, -0.5])


def test_length_reward_of_equal_lengths_is_exactly_zero():
    assert torch.equal(length_rewards(torch.full((4,), 17), [1.0, 0.0, 1.0, 0.0], 4), torch.zeros(4))


def test_length_reward_compares_within_a_prompt_only():
    first, second = torch.tensor([5, 10, 15, 6]), torch.tensor([100, 200, 100, 300])
    accuracy = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    together = length_rewards(torch.cat([first, second]), accuracy, 4)
    apart = [length_rewards(first, accuracy[:4], 4), length_rewards(second, accuracy[4:], 4)]
    assert torch.equal(together, torch.cat(apart))
    assert together.tolist() == pytest.approx([0.5, 0, -0.5, 0, 0, 0, 0.5, -0.5])


def test_an_answer_that_is_partly_right_is_wrong():
    assert length_rewards(torch.tensor([1, 2]), [0.9, 0.9], 2).tolist() == [0, -0.5]


# --- the curriculum ---


def test_the_curriculum_widens_from_easy_to_all():
    train = load_task("arithmetic").train
    pools = [easy_first(train, 16, step, 20) for step in range(1, 25)]
    levels = [max(e["level"] for e in pool) for pool in pools]
    assert levels[0] == 3 and levels[19] == 6 and levels == sorted(levels)
    assert [len(pool) for pool in pools[:19]] == [math.ceil(len(train) * step / 20) for step in range(1, 20)]
    for pool in pools[:19]:  # nothing is left out that is easier than what is in
        questions, hardest = {e["question"] for e in pool}, max(e["level"] for e in pool)
        assert all(e["question"] in questions for e in train if e["level"] < hardest)
    assert all(pool is train for pool in pools[19:])
    assert easy_first(train, 16, 1, 0) is train, "the default: no curriculum"


def test_the_curriculum_leaves_enough_questions_for_a_step():
    examples = [{"question": str(i), "level": 9 - i} for i in range(10)]
    pool = easy_first(examples, 4, 1, 100)
    assert [e["level"] for e in pool] == [0, 1, 2, 3]
    chosen = draw_questions(examples, SuccessRates(), Config(curriculum=100, prompts_per_step=4), 1)
    assert sorted(e["level"] for e in chosen) == [0, 1, 2, 3]


def test_the_curriculum_refuses_questions_without_a_level():
    with pytest.raises(SystemExit, match="--curriculum"):
        kimi_k15.check_levels([{"question": "a"}], Config(curriculum=2))
    kimi_k15.check_levels([{"question": "a"}], Config())


# --- prioritised sampling ---


def prioritised(n: int) -> Config:
    """The configuration of a run with n questions per step, prioritised."""
    return Config(prioritised=True, prompts_per_step=n)


def rates_of(success: list[float], answers: int = 10) -> tuple[list[dict], SuccessRates]:
    """Questions, and the rates of a run in which each of them was answered right so often; None: it was never drawn."""
    examples, rates = [{"question": f"q{i}"} for i in range(len(success))], SuccessRates()
    for example, s in zip(examples, success, strict=True):
        if s is not None:
            right = round(s * answers)
            rates.record([example] * answers, [1.0] * right + [0.0] * (answers - right))
    return examples, rates


def test_a_question_that_was_never_drawn_has_the_success_rate_0():
    examples, rates = rates_of([0.0, 0.2, 1.0, None])
    assert [rates.of(example) for example in examples] == [0.0, 0.2, 1.0, 0.0]


def test_prioritised_frequencies_are_as_1_minus_the_success_rate():
    examples, rates = rates_of([0.0, 0.2, 0.5, 0.9, 1.0, None])
    draws = 6000
    seen = Counter(draw_questions(examples, rates, prioritised(1), step)[0]["question"] for step in range(1, draws + 1))
    weights = [1.0, 0.8, 0.5, 0.1, 0.0, 1.0]  # the last one was never seen
    assert seen["q4"] == 0, "what is always right is not drawn"
    expected = [draws * w / sum(weights) for w in weights]
    chi_square = sum((seen[f"q{i}"] - e) ** 2 / e for i, e in enumerate(expected) if e)
    assert chi_square < 18.5  # 4 degrees of freedom: above that once in a thousand


def test_without_replacement_the_second_draw_is_as_the_weights_that_are_left():
    weights, draws = [3.0, 2.0, 1.0], 6000
    seen = Counter(tuple(draw_weighted([0, 1, 2], weights, 2, 0, step)) for step in range(draws))
    assert len(seen) == 6
    chi_square = 0.0
    for i, j in itertools.permutations(range(3), 2):
        expected = draws * weights[i] / 6 * weights[j] / (6 - weights[i])
        chi_square += (seen[i, j] - expected) ** 2 / expected
    assert chi_square < 20.5  # 5 degrees of freedom


def test_a_step_never_lacks_questions_and_has_none_twice():
    examples, rates = rates_of([1.0, 1.0, 0.4, 1.0, 1.0])
    for step in range(1, 50):
        chosen = [e["question"] for e in draw_questions(examples, rates, prioritised(3), step)]
        assert len(set(chosen)) == 3 and chosen[0] == "q2"
    filled = Counter(
        e["question"] for step in range(1, 200) for e in draw_questions(examples, rates, prioritised(3), step)
    )
    assert set(filled) == {f"q{i}" for i in range(5)}, "those that fill up are random ones"


def test_uniform_sampling_is_draw():
    examples = [{"question": str(i)} for i in range(50)]
    for step in range(1, 10):
        assert draw_questions(examples, SuccessRates(), Config(seed=3, prompts_per_step=8), step) == draw(
            examples, 8, 3, step
        )


def test_the_success_rates_survive_saving(tmp_path):
    examples, rates = rates_of([0.1, 0.7, 1.0, None, 0.3])
    torch.save(rates.state_dict(), tmp_path / "state.pt")
    other = SuccessRates()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for x in (rates, other):
        x.record(examples[:1] * 2, [1.0, 0.5])  # half right is not right
    assert rates.counts == other.counts and other.counts["q0"] == [2, 12]
    for step in range(1, 30):
        assert draw_questions(examples, rates, prioritised(2), step) == draw_questions(
            examples, other, prioritised(2), step
        )


# --- the script ---


def records_of(out, **flags):
    kimi_k15.main(kimi_k15.Config(out=str(out), **(SMALL | flags)))
    return read_jsonl(out / "metrics.jsonl")


def test_any_microbatch_size_gives_the_same_run(tmp_path):
    one, other = (
        records_of(tmp_path / str(budget), steps=1, epochs=3, tokens_per_microbatch=budget)[1] for budget in (1, 10**6)
    )
    for name in ("loss", "grad_norm", "kl_old", "log_ratio_squared", "entropy", "ratio_max", "reward"):
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    assert one["log_ratio_squared"] > 0 and one["ratio_max"] != 1


def test_the_optimiser_starts_anew_in_every_iteration(tmp_path):
    flags = {"epochs": 2, "minibatches": 2}
    records_of(tmp_path / "run", steps=3, **flags)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    counts = {int(x["step"]) for x in saved["optimizer"]["state"].values()}
    assert counts == {4}, "the 2 x 2 updates of the last iteration, not the 12 of the run"


def test_with_one_update_tau_changes_nothing(tmp_path):
    runs = [records_of(tmp_path / str(tau), steps=2, epochs=1, tau=tau) for tau in (0.0, 50.0)]
    assert without_times(runs[0]) == without_times(runs[1]) and runs[0][1]["log_ratio_squared"] == 0


def test_the_more_tau_the_nearer_it_stays(tmp_path):
    # The same first update; the later ones go on (tau 0) or go back (tau 1000).
    free, bound = (records_of(tmp_path / str(t), steps=1, epochs=6, tau=t)[1] for t in (0.0, 1000.0))
    assert bound["log_ratio_squared"] < free["log_ratio_squared"] / 2
    assert bound["kl_old"] < free["kl_old"]


def test_the_length_reward_counts_from_its_step_on(tmp_path):
    plain = records_of(tmp_path / "plain", steps=3)
    flags = {"length_weight": 0.5, "length_from": 3}
    later = records_of(tmp_path / "later", steps=3, **flags)
    assert without_times(plain[:3]) == without_times(later[:3])
    assert plain[3]["accuracy"] == later[3]["accuracy"] and plain[3]["reward"] != later[3]["reward"]
    assert not any("reward/length" in record for record in plain + later[:3]) and later[3]["reward/length"] != 0
    for sample in read_jsonl(tmp_path / "later" / "samples.jsonl"):
        if sample["step"] == 3:
            extra = sample["reward"] - sample["reward/accuracy"]
            assert -0.25 <= extra <= 0.25 * sample["reward/accuracy"] + 1e-6


@pytest.mark.parametrize(("curriculum", "prioritised"), [(3, True), (6, False)])
def test_resuming_continues_to_the_bit_with_the_success_rates(tmp_path, curriculum, prioritised):
    flags = {"curriculum": curriculum, "prioritised": prioritised, "length_weight": 0.1, "length_from": 2}
    flags |= {"eval_every": 0}
    whole = records_of(tmp_path / "whole", steps=4, **flags)
    records_of(tmp_path / "cut", steps=2, **flags)
    run_script("kimi_k15.py", "--resume", tmp_path / "cut", "--steps", 4)
    cut = read_jsonl(tmp_path / "cut" / "metrics.jsonl")
    without_eval = [
        [{k: v for k, v in record.items() if not k.startswith("eval")} for record in without_times(run)]
        for run in (whole, cut)
    ]
    assert without_eval[0] == without_eval[1]
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut")
    ]  # step, policy, optimizer, rates
    assert states[0]["rates"] == states[1]["rates"]
    assert sum(answers for _, answers in states[0]["rates"].values()) == 4 * 16
    for name, x in states[0]["policy"].items():
        assert torch.equal(x, states[1]["policy"][name])


@pytest.mark.slow
def test_accuracy_rises(tmp_path):
    run_script("kimi_k15.py", "--steps", 25, "--eval-every", 0, "--out", tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["eval_pass@1"] > records[0]["eval_pass@1"] + 0.2
    assert records[-1]["eval_format"] > records[0]["eval_format"] + 0.2
