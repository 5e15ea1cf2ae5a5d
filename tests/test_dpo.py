"""dpo.py: three objectives against values worked out by hand, how responses make pairs, and the script."""

import copy
import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_jsonl, run_script, without_times
from test_siblings import double, sections
from torch.nn.functional import logsigmoid

import dpo
from data import draw, load_task
from dpo import dpo_loss, dpo_norm_loss, long2short_pairs, simpo_loss, verified_pairs
from logprobs import Policy, load_policy
from pairs import load_pairs, pair_batch
from rollout import HFSampler

OBJECTIVES = {"dpo": dpo_loss, "dpo_norm": dpo_norm_loss, "simpo": simpo_loss}
MASK = torch.arange(6) < torch.tensor([[6], [2], [1], [4], [3], [5]])  # three pairs of ragged rows
SMALL = {"pairs_per_step": 6, "eval_prompts": 8, "steps": 2, "model": str(ROOT / "tiny")}


def ragged(seed=0):
    """Log-probs with gradient and those of the reference, for three pairs; what is off the mask is noise."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(6, 6, dtype=torch.float64, generator=g)
    ref_logp = logp + 0.5 * torch.randn(6, 6, dtype=torch.float64, generator=g)
    return logp.requires_grad_(), ref_logp


def run(tmp_path, name, **flags):
    if "data" not in flags:
        flags = {"pair_prompts": 16} | flags
    dpo.main(dpo.Config(out=str(tmp_path / name), **SMALL | flags))
    return read_jsonl(tmp_path / name / "metrics.jsonl")


def sums(path, n):
    """A file of n pairs: a right and a wrong answer to i+1=."""
    rows = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": "0"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_in_two_processes(*flags):
    """Under accelerate launch without a GPU it would be one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, str(ROOT / "dpo.py"), *map(str, flags)], cwd=ROOT, check=True, capture_output=True)


def test_its_sections_are_those_of_grpo_where_there_is_a_counterpart():
    base, other = sections("grpo"), sections("dpo")
    shared = [name for name in other if name in base]
    assert shared == ["top", "loss", "training", "log-probs", "update", "log, evaluate, save"]
    assert [name for name in base if name in other] == shared, "in the same order"
    lines = {line.split("  #")[0] for line in base["training"].splitlines()}
    same = [line for line in other["training"].splitlines() if line.split("  #")[0] in lines]
    assert len(same) >= 18, "the set-up is the same where it can be"
    steps = [
        "sum_gradients(accelerator, parameters)",
        "accelerator.clip_grad_norm_(parameters, 1.0)",
        "optimizer.step()",
    ]
    assert all(step in base["update"] and step in other["update"] for step in steps)


# --- the objectives ---


def test_dpo_at_the_reference_is_log_2_with_the_gradient_by_hand():
    logp, _ = ragged()
    loss, stats = dpo_loss(logp, logp.detach(), MASK, 3, beta=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    sign = double(-1, 1, -1, 1, -1, 1)[:, None]  # the chosen response rises, the rejected one falls
    assert torch.allclose(logp.grad, sign * 0.3 / 2 / 3 * MASK)
    assert torch.equal(stats["margin"], torch.zeros(3, 1, dtype=torch.float64))


def test_dpo_weighs_a_pair_by_how_wrong_its_rewards_are():
    logp, ref_logp = ragged()
    loss, stats = dpo_loss(logp, ref_logp, MASK, 3, beta=0.3)
    loss.backward()
    R = 0.3 * ((logp - ref_logp).detach() * MASK).sum(1)
    for i in range(3):
        weight = 0.3 / (1 + math.exp(R[2 * i] - R[2 * i + 1]))  # beta sigma(R_l - R_w)
        assert torch.allclose(logp.grad[2 * i], -weight / 3 * MASK[2 * i].double())
        assert torch.allclose(logp.grad[2 * i + 1], weight / 3 * MASK[2 * i + 1].double())
        assert stats["reward_chosen"][i].item() == pytest.approx(R[2 * i].item())


def test_values_by_hand():
    # One pair: 2 chosen tokens of log-ratio 1 and 3 (log pi -1, -2), 1 rejected token of log-ratio -1 (log pi -4).
    mask = torch.tensor([[True, True], [True, False]])
    logp, ref_logp = double(-1, -2, -4, 99).view(2, 2), double(-2, -5, -3, -99).view(2, 2)
    by_hand = {
        dpo_loss: 0.5 * 4 - 0.5 * -1,
        dpo_norm_loss: 5 * (4 / 2) - 5 * -1,
        simpo_loss: 2 * (-3 / 2) - 2 * -4 - 1,
    }
    for objective, logit in by_hand.items():
        loss, stats = objective(logp, ref_logp, mask, 1)
        assert loss.item() == pytest.approx(math.log(1 + math.exp(-logit)), abs=1e-12)
        assert stats["logp_chosen"].item() == -3 and stats["logp_rejected"].item() == -4
        assert stats["length_chosen"].item() == 2 and stats["length_rejected"].item() == 1
        assert stats["pair_accuracy"].item() == 1
    assert simpo_loss(logp, None, mask, 1, beta=4, gamma=2)[0].item() == pytest.approx(math.log(1 + math.exp(-8)))
    assert simpo_loss(logp, None, mask, 1)[1]["margin"].item() == 5, "the margin is logged without gamma"


@pytest.mark.parametrize(("objective", "factor"), [(dpo_loss, 2), (dpo_norm_loss, 1), (simpo_loss, 1)])
def test_only_in_dpo_a_response_twice_as_long_has_twice_the_reward(objective, factor):
    logp, ref_logp = torch.full((2, 8), -1.0), torch.full((2, 8), -1.5)
    rewards = []
    for length in (4, 8):
        mask = torch.arange(8) < torch.tensor([[length], [2]])
        rewards.append(objective(logp, ref_logp, mask, 1)[1]["reward_chosen"].item())
    assert rewards[1] == pytest.approx(factor * rewards[0])


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_gradients_against_finite_differences_and_in_parts(objective):
    logp, ref_logp = ragged(1)
    loss = lambda x: objective(x, ref_logp, MASK, 3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, logp)
    parts = [slice(0, 4), slice(4, 6)]
    shares = [objective(logp[p], ref_logp[p], MASK[p], 3)[0] for p in parts]
    assert sum(shares).item() == pytest.approx(loss(logp).item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss(logp), logp)
    assert torch.equal(gradient != 0, MASK), "all response tokens, and nothing else"


def test_the_best_policy_for_preferences_is_that_of_the_reward_behind_them():
    """Bradley-Terry preferences of a reward r: eq. 7 is stationary at pi proportional to pi_ref exp(r / beta)."""
    g = torch.Generator().manual_seed(0)
    r, ref = torch.randn(5, dtype=torch.float64, generator=g), torch.randn(5, dtype=torch.float64, generator=g)
    ref, mask = ref.log_softmax(0), torch.ones(2, 1, dtype=torch.bool)

    def gradient(logits):
        logp, loss = logits.log_softmax(0), 0.0  # five responses of one token
        for i, j in itertools.permutations(range(5), 2):
            prefers = torch.sigmoid(r[i] - r[j])
            loss = loss + prefers * dpo_loss(logp[[i, j], None], ref[[i, j], None], mask, 1, beta=0.7)[0]
        return torch.autograd.grad(loss, logits)[0]

    assert gradient((ref + r / 0.7).requires_grad_()).abs().max() < 1e-12
    assert gradient(ref.clone().requires_grad_()).abs().max() > 0.1
    assert gradient((ref - r / 0.7).requires_grad_()).abs().max() > 0.1


# --- the reference ---


def test_the_reference_is_the_policy_before_training_and_stays_so(tiny, batch):
    policy = Policy(copy.deepcopy(tiny[0].model))
    reference = policy.reference()
    assert isinstance(reference, Policy) and not reference.model.training
    assert all(p.requires_grad for p in policy.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}
    logp, _ = policy(batch, 0.7)
    at_first, _ = reference(batch, 0.7)
    assert torch.equal(at_first, logp) and logp.requires_grad and not at_first.requires_grad

    weights = {name: x.clone() for name, x in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    logp.sum().backward()
    optimizer.step()
    moved, _ = policy(batch, 0.7)
    later, _ = reference(batch, 0.7)
    assert not torch.allclose(moved, logp, atol=1e-2) and torch.equal(later, at_first)
    assert reference.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in reference.state_dict().items())
    assert torch.equal(policy.reference()(batch, 0.7)[0], moved), "asked for later, it is the later policy"


# --- pairs ---


def rows(choose, right, lengths):
    return choose([x == 1 for x in right], lengths)


def test_verified_pairs_are_the_first_right_and_the_first_wrong_answer():
    assert rows(verified_pairs, [0, 0, 1, 1], [1, 2, 3, 4]) == [(2, 0)]
    assert rows(verified_pairs, [1, 0, 1, 0], [1, 2, 3, 4]) == [(0, 1)]
    assert rows(verified_pairs, [1, 1], [1, 2]) == rows(verified_pairs, [0, 0], [1, 2]) == []


def test_long2short_pairs():
    # The shortest right answer has 10 tokens: rejected are longer wrong ones, and right ones of at least 15.
    assert rows(long2short_pairs, [1, 1, 1, 1, 0, 0, 0], [20, 10, 14, 15, 9, 10, 11]) == [(1, 0), (1, 3), (1, 6)]
    assert rows(long2short_pairs, [0, 0], [5, 9]) == [] and rows(long2short_pairs, [1, 1], [8, 11]) == []
    assert rows(long2short_pairs, [1, 1], [30, 12]) == [(1, 0)]


# --- the script ---


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_microbatch_size_gives_the_same_run(tmp_path, objective):
    records = [run(tmp_path, str(b), objective=objective, tokens_per_microbatch=b)[1:] for b in (1, 10**6)]
    for one, other in zip(*records, strict=True):
        for name in without_times([one])[0].keys() - {"pair_accuracy"}:  # at first ties, which rounding breaks
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert records[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-6) or objective == "simpo"


@pytest.mark.parametrize(("objective", "models"), [("dpo", 2), ("dpo_norm", 2), ("simpo", 1)])
def test_simpo_loads_no_reference_model(tmp_path, monkeypatch, objective, models):
    made, init = [], Policy.__init__
    monkeypatch.setattr(Policy, "__init__", lambda self, *rest: made.append(self) or init(self, *rest))
    run(tmp_path, "run", objective=objective, steps=1)
    assert len(made) == models


@pytest.mark.parametrize(("objective", "beta"), [("dpo", 0.5), ("dpo_norm", 5.0), ("simpo", 2.0)])
def test_beta_0_is_the_objectives_own(tmp_path, objective, beta):
    first, second = (run(tmp_path, str(b), objective=objective, beta=b) for b in (0.0, beta))
    assert without_times(first) == without_times(second)


def test_the_held_out_metrics_are_those_of_the_saved_model(tmp_path):
    flags = {"beta": 0.3, "temperature": 0.7, "pairs_per_step": 18, "data": (sums(tmp_path / "a.jsonl", 20),)}
    records = run(tmp_path, "run", steps=3, **flags)
    assert "eval_accuracy" not in records[-1] and len(records) == 4
    config = dpo.Config(**SMALL | flags)
    policy, tokenizer = load_policy(str(tmp_path / "run" / "model"), torch.device("cpu"))
    reference, _ = load_policy(str(ROOT / "tiny"), torch.device("cpu"))
    train, held_out = (pair_batch(x, tokenizer, torch.device("cpu")) for x in load_pairs(config, tokenizer, None))
    with torch.no_grad():
        at_first = reference(train, 0.7)[0].sum(1)
        a, b = (model(held_out, 0.7)[0].sum(1) for model in (policy, reference))
    assert records[1]["loss"] == pytest.approx(math.log(2), abs=1e-5), "policy and reference at one temperature"
    assert records[1]["logp_chosen"] == pytest.approx(at_first[0::2].mean().item(), rel=1e-4)
    R = 0.3 * (a - b)
    assert records[-1]["eval_margin"] == pytest.approx((R[0::2] - R[1::2]).mean().item(), abs=1e-5)
    assert records[-1]["eval_loss"] == pytest.approx(-logsigmoid(R[0::2] - R[1::2]).mean().item(), abs=1e-5)


def test_gamma_and_the_rule_for_pairs_arrive(tmp_path):
    losses = [run(tmp_path, str(g), objective="simpo", gamma=g, steps=1)[0]["eval_loss"] for g in (0.0, 2.0)]
    assert losses[1] > losses[0]
    run(tmp_path, "short", pairs="long2short", steps=1)
    pairs = [pair for part in json.loads((tmp_path / "short" / "pairs.json").read_text()) for pair in part]
    assert pairs and all(len(pair["chosen_ids"]) < len(pair["rejected_ids"]) for pair in pairs)


def test_the_loop_sees_other_pairs_in_every_step_and_evaluates_the_present_policy(tmp_path, monkeypatch):
    steps, pushes, questions = [], [], []
    draw, sample, push = dpo.draw, dpo.sample_pairs, HFSampler.push
    monkeypatch.setattr(dpo, "draw", lambda x, n, seed, step: steps.append(step) or draw(x, n, seed, step))
    monkeypatch.setattr(dpo, "sample_pairs", lambda c, s, q, *rest: questions.append(q) or sample(c, s, q, *rest))
    monkeypatch.setattr(HFSampler, "push", lambda self, policy: pushes.append(1) or push(self, policy))
    run(tmp_path, "run", steps=3, eval_every=2)
    assert steps == [1, 1, 2, 3], "once for the questions, then for every step"
    assert len(pushes) == 1 + 3, "to make the pairs, and for the evaluations after 0, 2 and 3 steps"
    task = load_task("arithmetic")
    train, test = ({example["question"] for example in part} for part in (task.train, task.test[:8]))
    assert {q["question"] for q in questions[0]} <= train and {q["question"] for q in questions[1]} == test
    held_out = read_jsonl(tmp_path / "run" / "held_out.jsonl")
    assert [(line["step"], line["question"]) for line in held_out] == [
        (step, example["question"]) for step in (0, 2, 3) for example in task.test[:8]
    ]
    assert {name for name in held_out[0] if "/" in name} == {"reward/accuracy", "reward/format"}


def test_two_processes_take_the_step_of_one(tmp_path):
    flags = ["--data", sums(tmp_path / "a.jsonl", 40), "--steps", 2, "--pairs-per-step", 5, "--eval-prompts", 4]
    run_script("dpo.py", *flags, "--out", tmp_path / "one")
    run_in_two_processes(*flags, "--out", tmp_path / "two")
    for one, two in zip(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")), strict=True):
        for name in without_times([one])[0].keys() - {"pair_accuracy"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


def test_two_processes_put_their_own_pairs_together(tmp_path):
    run_in_two_processes("--pair-prompts", 64, "--eval-prompts", 32, "--steps", 1, "--out", tmp_path / "run")
    task = load_task("arithmetic")
    asked = draw(task.train, 64, 0, step=1), task.test[:32]
    made = json.loads((tmp_path / "run" / "pairs.json").read_text())
    for questions, pairs in zip(asked, made, strict=True):
        shares = [{example["question"] for example in questions[process::2]} for process in (0, 1)]
        prompts = [pair["prompt"] for pair in pairs]
        assert len(set(prompts)) == len(prompts) and set(prompts) <= shares[0] | shares[1]
        assert all(len(share & set(prompts)) > len(share) / 2 for share in shares), "the share of each process"
    held_out = made[1]
    first, last = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    mean = sum(len(pair["chosen_ids"]) for pair in held_out) / len(held_out)
    assert first["eval_length_chosen"] == pytest.approx(mean), "and each process has all of them"
    assert last["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_resuming_continues_to_the_bit(tmp_path):
    whole = run(tmp_path, "whole", steps=4, eval_every=2)
    run(tmp_path, "part", steps=2)
    resumed = run(tmp_path, "part", steps=4, eval_every=2, resume=str(tmp_path / "part"))
    assert without_times(resumed) == without_times(whole)
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "part")]
    assert all(torch.equal(saved[0]["policy"][k], saved[1]["policy"][k]) for k in saved[0]["policy"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"data": ("a.jsonl",), "task": "countdown"}, "--task is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "sampler": "hf"}, "--sampler is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "pairs": "long2short"}, "--pairs is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "pair_prompts": 16}, "--pair-prompts is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "group_size": 4}, "--group-size is for pairs of the model's own responses"),
        ({"gamma": 2.0}, "--gamma is for --objective simpo"),
        ({"gamma": 2.0, "objective": "dpo_norm"}, "--gamma is for --objective simpo"),
    ],
)
def test_a_flag_that_would_be_ignored_is_one_clear_line(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit, match=words) as error:
        dpo.main(dpo.Config(out=str(tmp_path / "run"), **flags))
    assert error.value.code == 2 and capsys.readouterr().err == f"{error.value}\n"
    assert str(error.value).count("\n") == 0 and not (tmp_path / "run").exists()


def test_no_pairs_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="0 pairs to learn from, 0 held out"):
        run(tmp_path, "run", max_new_tokens=2)  # too short for any answer


def test_margin_and_accuracy_rise_on_held_out_pairs(tmp_path):
    run_script("dpo.py", "--steps", 20, "--eval-every", 0, "--out", tmp_path / "run")
    first, *_, last = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert first["eval_margin"] == 0 and last["eval_margin"] > 0.3
    assert first["eval_pair_accuracy"] == 0 and last["eval_pair_accuracy"] > 0.8, "at first all rewards are 0: ties"
    assert last["eval_loss"] < first["eval_loss"] - 0.15
    assert last["eval_reward_chosen"] > last["eval_reward_rejected"]
    assert last["eval_logp_rejected"] < first["eval_logp_rejected"]
    assert last["eval_pass@1"] > first["eval_pass@1"] + 0.1, "and the questions themselves are answered better"
