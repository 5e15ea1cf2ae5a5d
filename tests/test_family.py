"""family/: patches of dpo.py, by hand, against TRL, and as scripts. How large they may be: test_siblings.py."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_jsonl, run_script, without_times
from test_dpo import MASK, numbers, ragged, run, saved, sums
from test_siblings import double

import dpo
from family import dpo_norm, ipo, simpo
from logprobs import Policy

SCRIPTS = {"dpo": dpo, "dpo_norm": dpo_norm, "ipo": ipo, "simpo": simpo}
FAMILY = ["dpo_norm", "ipo", "simpo"]
BETA = {"dpo": 0.5, "dpo_norm": 5.0, "ipo": 0.1, "simpo": 2.0}
FLAGS = ["--pair-prompts", 16, "--eval-prompts", 8, "--pairs-per-step", 6]  # a small run


def loss_of(name, logp, ref_logp, mask, num_pairs, beta=None, gamma=1.0, s=0.0):
    """The loss and the stats of one of the objectives, whatever arguments it takes."""
    beta = beta or BETA[name]
    if name == "simpo":
        return simpo.pair_loss(logp, mask, num_pairs, beta, gamma, s)
    return SCRIPTS[name].pair_loss(logp, ref_logp, mask, num_pairs, beta, s)


# --- the objectives by hand ---


def pair_by_hand():
    """2 chosen tokens of log-ratio 1 and 3 (log pi -1, -2), 1 rejected token of log-ratio -1 (log pi -4)."""
    mask = torch.tensor([[True, True], [True, False]])
    return double(-1, -2, -4, 99).view(2, 2), double(-2, -5, -3, -99).view(2, 2), mask


def minus_log_sigma(z):
    return math.log1p(math.exp(-z))


MARGINS = {  # name -> rewards of the chosen and the rejected response of that pair
    "dpo": (0.5 * 4, 0.5 * -1),
    "dpo_norm": (5 * 4 / 2, 5 * -1),
    "ipo": (4 / 2, -1),
    "simpo": (2 * -3 / 2, 2 * -4),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_rewards_by_hand(name):
    _, stats = loss_of(name, *pair_by_hand(), 1)
    chosen, rejected = MARGINS[name]
    assert stats["reward_chosen"].item() == pytest.approx(chosen)
    assert stats["reward_rejected"].item() == pytest.approx(rejected)
    assert stats["margin"].item() == pytest.approx(chosen - rejected), "without gamma, and without the target"
    assert stats["logp_chosen"].item() == -3 and stats["logp_rejected"].item() == -4
    assert stats["length_chosen"].item() == 2 and stats["length_rejected"].item() == 1
    assert stats["pair_accuracy"].item() == 1


@pytest.mark.parametrize(
    ("name", "more", "loss"),
    [
        ("dpo", {}, minus_log_sigma(2.5)),
        ("dpo_norm", {}, minus_log_sigma(15)),
        ("dpo_norm", {"beta": 0.5}, minus_log_sigma(1.5)),
        ("ipo", {}, (3 - 5) ** 2),
        ("ipo", {"beta": 0.25}, (3 - 2) ** 2),
        ("simpo", {}, minus_log_sigma(5 - 1)),
        ("simpo", {"beta": 4.0, "gamma": 2.0}, minus_log_sigma(10 - 2)),
        ("simpo", {"gamma": 0.0}, minus_log_sigma(5)),
    ],
)
def test_losses_by_hand(name, more, loss):
    assert loss_of(name, *pair_by_hand(), 1, **more)[0].item() == pytest.approx(loss, abs=1e-12)
    assert loss_of(name, *pair_by_hand(), 4, **more)[0].item() == pytest.approx(loss / 4, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "more", "right", "wrong"),
    [
        ("dpo", {}, minus_log_sigma(2.5), minus_log_sigma(-2.5)),
        ("dpo_norm", {"beta": 0.5}, minus_log_sigma(1.5), minus_log_sigma(-1.5)),
        ("ipo", {"beta": 0.25}, (3 - 2) ** 2, (-3 - 2) ** 2),
        ("simpo", {}, minus_log_sigma(5 - 1), minus_log_sigma(-5 - 1)),  # either order has to win by gamma
    ],
)
def test_label_smoothing_weighs_the_loss_of_both_orders(name, more, right, wrong):
    loss, stats = loss_of(name, *pair_by_hand(), 1, s=0.2, **more)
    assert loss.item() == pytest.approx(0.8 * right + 0.2 * wrong, abs=1e-12)
    chosen_first, _ = loss_of(name, *pair_by_hand(), 1, **more)
    logp, ref_logp, mask = (x[[1, 0]] for x in pair_by_hand())
    rejected_first, _ = loss_of(name, logp, ref_logp, mask, 1, **more)
    assert loss.item() == pytest.approx(0.8 * chosen_first.item() + 0.2 * rejected_first.item(), abs=1e-12)


# TRL 1.16.0 on the tensors below, in float64: its own lines, taken from its source and run on these tensors.
# sigmoid: line 1388 of trl/trainer/dpo_trainer.py; ipo: 1398-1404; sigmoid_norm: 1505-1509; each with 1302, 1312, 1347
# to 1354 and 1523. simpo: cpo_loss in trl/experimental/cpo/cpo_trainer.py, alpha 0, with get_batch_logps, 787-788, and
# cpo_alpha 0. cDPO: the sigmoid of cpo_loss on log-ratios, as sigmoid in dpo_trainer.py has no label smoothing.
TRL_LOGP = -double(0.5, 1.25, 0.75, 2, 3, 0.125, 9, 9, 0.25, 9, 9, 9, 1.5, 0.5, 1, 9).view(4, 4)
TRL_REF_LOGP = -double(0.75, 1.5, 0.5, 2.5, 2, 0.25, 9, 9, 0.75, 9, 9, 9, 1, 0.75, 0.5, 9).view(4, 4)
TRL_MASK = torch.arange(4) < torch.tensor([[4], [2], [1], [3]])
TRL = [  # name and flags -> loss, and its gradient by the log-prob of a token in each row
    (
        "dpo",
        {"beta": 0.1},
        0.6238966858943571,
        [-0.022973208036310533, 0.022973208036310533, -0.02343953133131219, 0.02343953133131219],
    ),
    (
        "dpo",
        {"beta": 0.5},
        0.3979713552077228,
        [-0.07683950421631597, 0.07683950421631597, -0.08716128383348644, 0.08716128383348644],
    ),
    ("dpo", {"beta": 0.3, "s": 0.2}, 0.5872189424912952, None),
    (
        "dpo_norm",
        {"beta": 5.0},
        0.03312227180075643,
        [-0.026304829947261778, 0.052609659894523556, -0.05744342477506403, 0.019147808258354677],
    ),
    ("ipo", {"beta": 0.1}, 18.6015625, [-1.09375, 2.1875, -4.25, 1.4166666666666667]),
    ("ipo", {"beta": 0.5}, 0.1015625, [-0.09375, 0.1875, -0.25, 0.08333333333333333]),
    (
        "simpo",
        {"beta": 2.0, "gamma": 1.0},
        0.6158380097486379,
        [-0.13280234334343904, 0.2656046866868781, -0.37754066879814546, 0.1258468895993818],
    ),
    (
        "simpo",
        {"beta": 2.5, "gamma": 0.5},
        0.33255986066114573,
        [-0.11117965422300949, 0.22235930844601898, -0.25226652782547354, 0.08408884260849118],
    ),
    (
        "simpo",
        {"beta": 2.0, "gamma": 0.0, "s": 0.2},
        0.5124289294939042,
        [-0.023553743040747185, 0.04710748608149437, 0.01757447619364369, -0.005858158731214563],
    ),
]


@pytest.mark.parametrize(("name", "more", "expected", "gradient"), TRL)
def test_loss_and_gradient_are_those_of_trl(name, more, expected, gradient):
    logp = TRL_LOGP.clone().requires_grad_()
    loss, _ = loss_of(name, logp, TRL_REF_LOGP, TRL_MASK, 2, **more)
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    if gradient:
        loss.backward()
        assert torch.allclose(logp.grad, double(*gradient)[:, None] * TRL_MASK, rtol=1e-12, atol=1e-15)


# --- what is alike, and what is not ---


@pytest.mark.parametrize("s", [0.0, 0.2])
@pytest.mark.parametrize("name", SCRIPTS)
def test_gradients_against_finite_differences(name, s):
    logp, ref_logp = ragged(1)
    assert torch.autograd.gradcheck(lambda x: loss_of(name, x, ref_logp, MASK, 3, s=s)[0], logp)


@pytest.mark.parametrize("name", SCRIPTS)
def test_losses_of_microbatches_add_up(name):
    logp, ref_logp = ragged(1)
    whole = loss_of(name, logp, ref_logp, MASK, 3, s=0.2)[0]
    shares = [loss_of(name, logp[p], ref_logp[p], MASK[p], 3, s=0.2)[0] for p in (slice(0, 4), slice(4, 6))]
    assert sum(shares).item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_response_tokens_learn_and_nothing_else(name):
    logp, ref_logp = ragged(1)
    (gradient,) = torch.autograd.grad(loss_of(name, logp, ref_logp, MASK, 3)[0], logp)
    assert torch.equal(gradient != 0, MASK)


@pytest.mark.parametrize(("name", "factor"), [("dpo", 2), ("dpo_norm", 1), ("ipo", 1), ("simpo", 1)])
def test_only_in_dpo_a_response_twice_as_long_has_twice_the_reward(name, factor):
    logp, ref_logp = torch.full((2, 8), -1.0), torch.full((2, 8), -1.5)
    rewards = []
    for length in (4, 8):
        mask = torch.arange(8) < torch.tensor([[length], [2]])
        rewards.append(loss_of(name, logp, ref_logp, mask, 1)[1]["reward_chosen"].item())
    assert rewards[1] == pytest.approx(factor * rewards[0])


@pytest.mark.parametrize(("s", "end"), [(0.0, 1.25), (0.2, 0.75)])
def test_ipo_ends_where_the_mean_log_ratios_differ_by_its_target(s, end):
    """tau 0.4: at 1/(2 tau) = 1.25, and with smoothed labels at (1 - 2s)/(2 tau), the gradient is 0."""
    mask = torch.tensor([[True, True], [True, False]])
    for difference, sign in ((end, 0), (end - 0.5, -1), (end + 0.5, 1)):
        logp = double(difference, difference, 0, 0).view(2, 2).requires_grad_()
        loss = loss_of("ipo", logp, torch.zeros(2, 2, dtype=torch.float64), mask, 1, beta=0.4, s=s)[0]
        loss.backward()
        assert logp.grad[0].tolist() == pytest.approx([sign * 0.5] * 2, abs=1e-12), "2 (difference - end) / |y|"
        assert logp.grad[1].tolist() == pytest.approx([-sign, 0], abs=1e-12)


def test_the_gradient_of_dpo_has_no_end_and_that_of_ipo_turns():
    mask, zero = torch.ones(2, 1, dtype=torch.bool), double(0, 0)[:, None]
    signs = {}
    for name in ("dpo", "dpo_norm", "ipo"):
        logp = double(30, 0)[:, None].requires_grad_()
        loss_of(name, logp, zero, mask, 1, beta=0.5)[0].backward()
        signs[name] = logp.grad[0].sign().item()
    assert signs == {"dpo": -1, "dpo_norm": -1, "ipo": 1}


# --- the scripts ---


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_microbatch_size_gives_the_same_run(tmp_path, name):
    records = [run(tmp_path, str(b), SCRIPTS[name], tokens_per_microbatch=b)[1:] for b in (1, 10**6)]
    for one, other in zip(*records, strict=True):
        for metric in without_times([one])[0].keys() - {"pair_accuracy"}:  # at first ties, which rounding breaks
            assert one[metric] == pytest.approx(other[metric], rel=1e-3, abs=1e-5), metric


@pytest.mark.parametrize(("name", "loss"), [("dpo", math.log(2)), ("dpo_norm", math.log(2)), ("ipo", 1)])
def test_the_first_loss_is_that_of_the_reference(tmp_path, name, loss):
    """ipo: tau 0.5 for the model's own pairs, so the difference 0 is 1 off the target."""
    first, step = run(tmp_path, "run", SCRIPTS[name], steps=1)
    assert first["eval_loss"] == pytest.approx(loss, abs=1e-6) and first["eval_margin"] == 0
    assert step["loss"] == pytest.approx(loss, abs=1e-5)


def test_simpo_has_no_reference(tmp_path, monkeypatch):
    def reference(policy):
        raise AssertionError("a second model")

    made, init = [], Policy.__init__
    monkeypatch.setattr(Policy, "reference", reference)
    monkeypatch.setattr(Policy, "__init__", lambda self, *rest: made.append(self) or init(self, *rest))
    run(tmp_path, "run", simpo, steps=1)
    assert len(made) == 1 and saved(tmp_path, "run").keys() == {
        "format",
        "step",
        "data",
        "processes",
        "policy",
        "optimizer",
    }


def test_beta_and_gamma_of_simpo_arrive(tmp_path, monkeypatch):
    seen, loss = set(), simpo.pair_loss
    monkeypatch.setattr(simpo, "pair_loss", lambda *rest: seen.add(rest[3:]) or loss(*rest))
    run(tmp_path, "run", simpo, steps=1, beta=3.0, gamma=0.5, label_smoothing=0.1)
    assert seen == {(3.0, 0.5, 0.1)}, "in the steps and in the evaluations"


@pytest.mark.parametrize(("name", "beta"), [("dpo_norm", 5.0), ("simpo", 2.0)])
@pytest.mark.parametrize("data", [True, False])
def test_beta_of_a_mean_over_tokens_is_the_same_for_all_pairs(tmp_path, monkeypatch, name, beta, data):
    script, seen = SCRIPTS[name], set()
    loss = script.pair_loss
    monkeypatch.setattr(script, "pair_loss", lambda *rest: seen.add(rest[-2 - (name == "simpo")]) or loss(*rest))
    flags = {"data": (sums(tmp_path / "a.jsonl", 20),)} if data else {}
    run(tmp_path, "run", script, steps=1, eval_samples=1, **flags)
    assert seen == {beta}


@pytest.mark.parametrize("name", FAMILY)
def test_half_of_the_labels_wrong_is_one_clear_line(tmp_path, name):
    result = run_script(f"family/{name}.py", "--label-smoothing", 0.5, "--out", tmp_path / "run", check=False)
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stderr == "--label-smoothing 0.5: below 0.5, or the labels mean their opposite\n"


@pytest.mark.parametrize("name", FAMILY)
def test_from_another_folder_a_member_finds_the_root_and_the_tiny_model(tmp_path, name):
    command = [sys.executable, str(ROOT / "family" / f"{name}.py"), "--steps", "1", *map(str, FLAGS)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{name}-") and (folder / "model" / "config.json").exists()


def test_a_member_runs_as_a_module_from_the_root(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "family.simpo", "--steps", "1", *map(str, FLAGS), "--out", str(tmp_path / "run")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


@pytest.mark.parametrize("name", FAMILY)
def test_resuming_continues_to_the_bit(tmp_path, name):
    flags = {"data": (sums(tmp_path / "a.jsonl", 40),)}
    whole = run(tmp_path, "whole", SCRIPTS[name], steps=4, eval_every=2, **flags)
    run(tmp_path, "part", SCRIPTS[name], steps=2, **flags)
    resumed = run(tmp_path, "part", SCRIPTS[name], steps=4, eval_every=2, resume=str(tmp_path / "part"), **flags)
    assert without_times(resumed) == without_times(whole)
    one, other = saved(tmp_path, "whole"), saved(tmp_path, "part")
    assert all(torch.equal(one["policy"][x], other["policy"][x]) for x in one["policy"])
    assert numbers(one.get("reference", {})) == numbers(other.get("reference", {}))


def test_resume_takes_the_flags_of_a_run_of_the_same_member(tmp_path):
    run_script("family/simpo.py", "--steps", 1, *FLAGS, "--gamma", 0.5, "--out", tmp_path / "run")
    refused = run_script("dpo.py", "--resume", tmp_path / "run", "--steps", 2, check=False)
    assert refused.returncode == 2 and "that run was made by another script" in refused.stderr
    run_script("family/simpo.py", "--resume", tmp_path / "run", "--steps", 2)
    assert [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("name", FAMILY)
def test_the_margin_rises_on_held_out_pairs(tmp_path, name):
    sizes = {"pair_prompts": 128, "pairs_per_step": 32, "eval_prompts": 32, "eval_samples": 1}
    first, *_, last = run(tmp_path, "run", SCRIPTS[name], steps=20, eval_every=0, **sizes)
    assert last["eval_margin"] > first["eval_margin"] + 0.1 and last["eval_loss"] < first["eval_loss"]
    assert last["eval_pair_accuracy"] > 0.7
