"""dpo.py: its objective against values worked out by hand, how responses make pairs, its reference, and the script.

What it has in common with its patches, numbers of TRL among it, is in test_family.py.
"""

import copy
import importlib
import itertools
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_jsonl, run_script, without_times
from test_siblings import double, sections
from torch.nn.functional import logsigmoid

import dpo
from data import draw, load_task
from dpo import long2short_pairs, pair_loss, verified_pairs
from logprobs import Policy, load_policy
from pairs import encode_pairs, pair_batch, read_pairs
from rollout import HFSampler

MASK = torch.arange(6) < torch.tensor([[6], [2], [1], [4], [3], [5]])  # three pairs of ragged rows
SMALL = {"pairs_per_step": 6, "eval_prompts": 8, "steps": 2, "model": str(ROOT / "tiny")}


def ragged(seed=0):
    """Log-probs with gradient and those of the reference, for three pairs; what is off the mask is noise."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(6, 6, dtype=torch.float64, generator=g)
    ref_logp = logp + 0.5 * torch.randn(6, 6, dtype=torch.float64, generator=g)
    return logp.requires_grad_(), ref_logp


def run(tmp_path, name, script=dpo, **flags):
    """The metrics of a small run of dpo.py or of a patch of it."""
    if "data" not in flags:
        flags = {"pair_prompts": 16} | flags
    script.main(script.Config(out=str(tmp_path / name), **SMALL | flags))
    return read_jsonl(tmp_path / name / "metrics.jsonl")


def sums(path, n, times=1):
    """A file of n pairs, a right and a wrong answer to i+1=, each so many times."""
    rows = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": "0"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * times))
    return str(path)


def saved(tmp_path, name):
    return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)


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
    assert len(same) >= 17, "the set-up is the same where it can be"
    steps = [
        "sum_gradients(accelerator, parameters)",
        "clip_gradients(accelerator, parameters, 1.0)",
        "optimizer.step()",
    ]
    assert all(step in base["update"] and step in other["update"] for step in steps)


# --- the objective ---


def test_at_the_reference_the_loss_is_log_2_with_the_gradient_by_hand():
    logp, _ = ragged()
    loss, stats = pair_loss(logp, logp.detach(), MASK, 3, beta=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    sign = double(-1, 1, -1, 1, -1, 1)[:, None]  # the chosen response rises, the rejected one falls
    assert torch.allclose(logp.grad, sign * 0.3 / 2 / 3 * MASK)
    assert torch.equal(stats["margin"], torch.zeros(3, 1, dtype=torch.float64))


def test_a_pair_is_weighed_by_how_wrong_its_rewards_are():
    logp, ref_logp = ragged()
    loss, stats = pair_loss(logp, ref_logp, MASK, 3, beta=0.3)
    loss.backward()
    R = 0.3 * ((logp - ref_logp).detach() * MASK).sum(1)
    for i in range(3):
        weight = 0.3 / (1 + math.exp(R[2 * i] - R[2 * i + 1]))  # beta sigma(R_l - R_w)
        assert torch.allclose(logp.grad[2 * i], -weight / 3 * MASK[2 * i].double())
        assert torch.allclose(logp.grad[2 * i + 1], weight / 3 * MASK[2 * i + 1].double())
        assert stats["reward_chosen"][i].item() == pytest.approx(R[2 * i].item())


def test_label_smoothing_weighs_both_orders():
    """One pair with R = 2 and -0.5: the loss is 0.8 log(1 + exp(-2.5)) + 0.2 log(1 + exp(2.5)), by hand 0.5788897."""
    mask, zero = torch.ones(2, 1, dtype=torch.bool), double(0, 0)[:, None]
    loss, stats = pair_loss(double(4, -1)[:, None], zero, mask, 1, beta=0.5, label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.8 * math.log1p(math.exp(-2.5)) + 0.2 * math.log1p(math.exp(2.5)), abs=1e-12)
    assert loss.item() == pytest.approx(0.5788897, abs=1e-7)
    assert stats["margin"].item() == 2.5, "the margin is logged as it is"


def test_smoothed_labels_give_the_margin_an_end():
    """The loss is least where sigma(margin) is the share of right labels, 1 - s."""
    mask, zero = torch.ones(2, 1, dtype=torch.bool), double(0, 0)[:, None]
    for logit, sign in ((math.log(0.8 / 0.2), 0), (1.0, -1), (2.0, 1)):
        logp = double(logit / 0.5, 0)[:, None].requires_grad_()
        pair_loss(logp, zero, mask, 1, beta=0.5, label_smoothing=0.2)[0].backward()
        assert logp.grad[0].item() == pytest.approx(0, abs=1e-12) if sign == 0 else sign * logp.grad[0] > 0


def test_the_best_policy_for_preferences_is_that_of_the_reward_behind_them():
    """Bradley-Terry preferences of a reward r: eq. 7 is stationary at pi proportional to pi_ref exp(r / beta)."""
    g = torch.Generator().manual_seed(0)
    r, ref = torch.randn(5, dtype=torch.float64, generator=g), torch.randn(5, dtype=torch.float64, generator=g)
    ref, mask = ref.log_softmax(0), torch.ones(2, 1, dtype=torch.bool)

    def gradient(logits):
        logp, loss = logits.log_softmax(0), 0.0  # five responses of one token
        for i, j in itertools.permutations(range(5), 2):
            prefers = torch.sigmoid(r[i] - r[j])
            loss = loss + prefers * pair_loss(logp[[i, j], None], ref[[i, j], None], mask, 1, beta=0.7)[0]
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


@pytest.fixture
def reference_rows(monkeypatch):
    """The responses that go through a reference policy."""
    rows, make = [], Policy.reference

    def make_watched(policy):
        reference = make(policy)
        reference.register_forward_pre_hook(lambda module, arguments: rows.extend(arguments[0].texts))
        return reference

    monkeypatch.setattr(Policy, "reference", make_watched)
    return rows


@pytest.mark.parametrize("times", [1, 2])
def test_in_two_epochs_the_reference_sees_each_pair_once(tmp_path, reference_rows, times):
    """20 pairs, of which 2 are held out; twice in the file they still are 20."""
    data = sums(tmp_path / "a.jsonl", 20, times)
    records = run(tmp_path, "run", data=(data,), pairs_per_step=6, steps=6 * times, eval_every=2)
    assert len(records) == 1 + 6 * times
    assert len(reference_rows) == 2 * 20 and len(saved(tmp_path, "run")["reference"]) == 20


def test_what_the_reference_kept_is_not_computed_again_after_resume(tmp_path, reference_rows):
    flags = {"data": (sums(tmp_path / "a.jsonl", 20),), "pairs_per_step": 9}
    run(tmp_path, "run", steps=2, **flags)
    assert len(reference_rows) == 2 * 20
    run(tmp_path, "run", steps=4, resume=str(tmp_path / "run"), **flags)
    assert len(reference_rows) == 2 * 20


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


@pytest.mark.parametrize(
    ("flags", "beta"), [({"data": True}, 0.1), ({}, 0.5), ({"data": True, "beta": 0.3}, 0.3), ({"beta": 0.3}, 0.3)]
)
@pytest.mark.parametrize("script", ["dpo", "family.ipo"])
def test_beta_is_smaller_for_pairs_that_are_read(tmp_path, monkeypatch, script, flags, beta):
    module, seen = importlib.import_module(script), set()
    loss = module.pair_loss
    monkeypatch.setattr(module, "pair_loss", lambda *rest: seen.add(rest[4]) or loss(*rest))
    if "data" in flags:
        flags = flags | {"data": (sums(tmp_path / "a.jsonl", 20),)}
    run(tmp_path, "run", module, steps=1, eval_samples=1, **flags)
    assert seen == {beta}, "in the steps and in the evaluations"


def test_the_held_out_metrics_are_those_of_the_saved_model(tmp_path):
    flags = {"beta": 0.3, "temperature": 0.7, "pairs_per_step": 18, "data": (sums(tmp_path / "a.jsonl", 20),)}
    records = run(tmp_path, "run", steps=3, **flags)
    assert "eval_accuracy" not in records[-1] and len(records) == 4
    config = dpo.Config(**SMALL | flags)
    policy, tokenizer = load_policy(str(tmp_path / "run" / "model"), torch.device("cpu"))
    reference, _ = load_policy(str(ROOT / "tiny"), torch.device("cpu"))
    pairs = encode_pairs(*read_pairs(config.data), config, tokenizer, None)
    train, held_out = (pair_batch(x, tokenizer, torch.device("cpu")) for x in pairs)
    with torch.no_grad():
        at_first = reference(train, 0.7)[0].sum(1)
        a, b = (model(held_out, 0.7)[0].sum(1) for model in (policy, reference))
    assert records[1]["loss"] == pytest.approx(math.log(2), abs=1e-5), "policy and reference at one temperature"
    assert records[1]["logp_chosen"] == pytest.approx(at_first[0::2].mean().item(), rel=1e-4)
    R = 0.3 * (a - b)
    assert records[-1]["eval_margin"] == pytest.approx((R[0::2] - R[1::2]).mean().item(), abs=1e-5)
    assert records[-1]["eval_loss"] == pytest.approx(-logsigmoid(R[0::2] - R[1::2]).mean().item(), abs=1e-5)


def test_label_smoothing_arrives(tmp_path, monkeypatch):
    seen = set()
    monkeypatch.setattr(dpo, "pair_loss", lambda *rest: seen.add(rest[5]) or pair_loss(*rest))
    run(tmp_path, "run", label_smoothing=0.2, steps=1)
    assert seen == {0.2}


def test_the_rule_for_pairs_arrives(tmp_path):
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
    one, two = (saved(tmp_path, name)["reference"] for name in ("one", "two"))
    assert len(one) == 4 + 10 and two.keys() == one.keys(), "the first process saves those of both"
    for ids, rows in one.items():
        for row, other in zip(rows, two[ids], strict=True):
            assert other == pytest.approx(row, abs=1e-5)


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


def numbers(kept: dict) -> dict:
    """What the reference kept, as lists."""
    return {ids: [row.tolist() for row in rows] for ids, rows in kept.items()}


@pytest.mark.parametrize("kind", ["own pairs", "read pairs"])
def test_resuming_continues_to_the_bit(tmp_path, kind):
    flags = {"data": (sums(tmp_path / "a.jsonl", 40),)} if kind == "read pairs" else {}
    whole = run(tmp_path, "whole", steps=4, eval_every=2, **flags)
    run(tmp_path, "part", steps=2, **flags)
    resumed = run(tmp_path, "part", steps=4, eval_every=2, resume=str(tmp_path / "part"), **flags)
    assert without_times(resumed) == without_times(whole)
    one, other = saved(tmp_path, "whole"), saved(tmp_path, "part")
    assert all(torch.equal(one["policy"][name], other["policy"][name]) for name in one["policy"])
    assert numbers(one["reference"]) == numbers(other["reference"]) and len(one["reference"]) > 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"data": ("a.jsonl",), "task": "countdown"}, "--task is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "sampler": "hf"}, "--sampler is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "pairs": "long2short"}, "--pairs is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "pair_prompts": 16}, "--pair-prompts is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "group_size": 4}, "--group-size is for pairs of the model's own responses"),
        ({"label_smoothing": 0.5}, "--label-smoothing 0.5: below 0.5, or the labels mean their opposite"),
        ({"label_smoothing": math.nan}, "--label-smoothing nan: below 0.5"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_one_clear_line(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit, match=words) as error:
        dpo.main(dpo.Config(out=str(tmp_path / "run"), **flags))
    assert error.value.code == 2 and capsys.readouterr().err == f"{error.value}\n"
    assert str(error.value).count("\n") == 0 and not (tmp_path / "run").exists()


def test_no_pairs_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="0 pairs to learn from, 0 held out"):
        run(tmp_path, "run", max_new_tokens=2)  # too short for any answer


def test_a_run_that_breaks_names_the_step_and_saves_nothing_of_it(tmp_path):
    """A learning rate of 1e30: after step 1 the weights are finite still, and the next gradient is not."""
    flags = ["--lr", "1e30", "--steps", 3, "--pair-prompts", 16, "--eval-prompts", 8, "--pairs-per-step", 6]
    result = run_script("dpo.py", *flags, "--save-every", 1, "--out", tmp_path / "run", check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search("step 2: the (loss|gradient norm) is (nan|inf); nothing of this step is saved", result.stderr)
    lines = read_jsonl(tmp_path / "run" / "not_finite.jsonl")
    assert len(lines) == 2 * 6 and {line["step"] for line in lines} == {2} and all("response" in line for line in lines)
    assert [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    checkpoint = saved(tmp_path, "run")
    model, _ = load_policy(str(tmp_path / "run" / "model"), torch.device("cpu"))
    assert checkpoint["step"] == 1
    assert all(x.isfinite().all() for x in [*checkpoint["policy"].values(), *model.state_dict().values()])


def assert_nothing_is_saved(tmp_path, error, words):
    """The run ended at step 1 with these words in one line, and left no weights."""
    assert error.value.code == 2 and words in str(error.value) and "\n" not in str(error.value)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "not_finite.jsonl" in left and not left & {"checkpoint.pt", "checkpoint.tmp", "model", "curves.png"}
    assert [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(tmp_path, monkeypatch):
    updates = []

    def loss_of_step(logp, *rest):
        loss, stats = pair_loss(logp, *rest)
        return loss * (math.nan if logp.requires_grad else 1), stats  # not in the evaluation before

    monkeypatch.setattr(dpo, "pair_loss", loss_of_step)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: updates.append(1))
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "run", save_every=1)
    assert_nothing_is_saved(tmp_path, error, "step 1: the loss is nan")
    assert not updates


def test_weights_that_are_not_finite_end_the_run_before_they_are_saved(tmp_path, monkeypatch):
    def step(optimizer):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][-1].view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "run", save_every=1, steps=1)
    assert_nothing_is_saved(tmp_path, error, "step 1: weights of the policy are not finite")


@pytest.mark.slow
def test_margin_and_accuracy_rise_on_held_out_pairs(tmp_path):
    run_script("dpo.py", "--steps", 20, "--eval-every", 0, "--out", tmp_path / "run")
    first, *_, last = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert first["eval_margin"] == 0 and last["eval_margin"] > 0.3
    assert first["eval_pair_accuracy"] == 0 and last["eval_pair_accuracy"] > 0.8, "at first all rewards are 0: ties"
    assert last["eval_loss"] < first["eval_loss"] - 0.15
    assert last["eval_reward_chosen"] > last["eval_reward_rejected"]
    assert last["eval_logp_rejected"] < first["eval_logp_rejected"]
    assert last["eval_pass@1"] > first["eval_pass@1"] + 0.1, "and the questions themselves are answered better"
