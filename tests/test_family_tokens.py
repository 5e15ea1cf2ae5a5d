"""family/: on-policy distillation, process supervision, T1, VAPO and OREAL, in which tokens of a response differ.

By hand, by enumeration, against TRL and verl, and as scripts. How large these patches may be: test_siblings.py; which
step of a response is right: test_steps.py.
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
from test_family_rl import LOGP, OLD_LOGP, PEER_MASK, on_tokens, record_batches, run, saved, score_by_tokens
from test_siblings import double
from torch.nn.functional import logsigmoid

import data
import grpo
import plot
import ppo
import rloo
from data import load_task
from family import opd, oreal, process_grpo, t1, vapo
from logprobs import Value, load_policy, load_teacher
from rewards import score_steps

SCRIPTS = {"opd": opd, "process_grpo": process_grpo, "t1": t1, "vapo": vapo, "oreal": oreal}
MASK = torch.arange(6) < torch.tensor([[6], [2], [1], [3]])  # 4 responses, 12 tokens


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ragged(seed=0, spread=0.5):
    """log pi, log pi_old, log pi_ref, advantages of tokens, [4, 6] each; what is off MASK is noise."""
    logp = -random(4, 6, seed=seed).abs()
    old_logp = logp + spread * random(4, 6, seed=seed + 100)
    ref_logp = logp + 0.5 * random(4, 6, seed=seed + 200)
    return logp, old_logp, ref_logp, random(4, 6, seed=seed + 300)


def gradient_of(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def alone(x):
    """The sum over the processes, where there is one."""
    return x


# --- opd ---


class Tree:
    """All responses of at most 3 tokens, out of 3 of which token 0 ends a response: 15, of which 8 are cut off.

    A state is what has been written; in each of the 7 the policy has 3 logits, and the teacher others.
    """

    def __init__(self):
        self.logits = random(7, 3).requires_grad_()
        states = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
        responses = []
        for length in (1, 2, 3):
            for response in itertools.product(range(3), repeat=length):
                ends = response[-1] == 0 or length == 3
                if ends and 0 not in response[:-1]:
                    responses.append(response)
        assert len(responses) == 15
        self.pi = self.logits.log_softmax(-1)  # [7, 3]
        self.teacher = random(7, 3, seed=1).log_softmax(-1)  # [7, 3]
        self.mask = torch.zeros(15, 3, dtype=torch.bool)
        self.state = torch.zeros(15, 3, dtype=torch.long)  # before each token
        token = torch.zeros(15, 3, dtype=torch.long)
        for i, response in enumerate(responses):
            for t, one in enumerate(response):
                self.mask[i, t] = True
                self.state[i, t] = states.index(response[:t])
                token[i, t] = one
        self.logp = self.pi[self.state, token] * self.mask  # [15, 3]
        self.teacher_logp = self.teacher[self.state, token] * self.mask  # [15, 3]
        self.p = self.logp.sum(1).exp()  # [15] of whole responses
        assert self.p.sum().item() == pytest.approx(1)

    def kl_of_tokens(self):
        """sum_t E KL(pi(. | s_t) || T(. | s_t)), with the distribution of the states held fixed."""
        visits = torch.zeros(7, dtype=torch.float64)  # how likely a response comes by each state
        for i, t in self.mask.nonzero().tolist():
            visits[self.state[i, t]] += self.p[i].item()
        kl = (self.pi.exp() * (self.pi - self.teacher)).sum(-1)  # [7]
        return (visits * kl).sum()

    def kl_of_responses(self):
        return (self.p * (self.logp - self.teacher_logp).sum(1)).sum()

    def expected_gradient(self, discount, mean_over_tokens=False):
        """Of the loss of one response, over all that the policy may sample."""
        A = opd.discounted_sum((self.teacher_logp - self.logp).detach(), discount)
        expected = 0.0
        for i in range(15):
            row = slice(i, i + 1)
            logp = self.logp[row]
            loss, _ = opd.policy_loss(logp, logp.detach(), A[row], self.mask[row], 1, 0.2, 0.2, None, 0.0)
            if mean_over_tokens:
                loss = loss / self.mask[i].sum()
            expected = expected + self.p[i].item() * loss
        return gradient_of(expected, self.logits)


def cosine(a, b):
    return (a.flatten() @ b.flatten() / a.norm() / b.norm()).item()


def test_with_discount_0_the_step_of_opd_is_that_of_the_kl_at_each_state():
    tree = Tree()
    expected = gradient_of(tree.kl_of_tokens(), tree.logits)
    assert torch.allclose(tree.expected_gradient(0.0), expected, atol=1e-14)


def test_with_discount_1_it_is_that_of_the_kl_of_whole_responses():
    tree = Tree()
    expected = gradient_of(tree.kl_of_responses(), tree.logits)
    assert torch.allclose(tree.expected_gradient(1.0), expected, atol=1e-14)


def test_these_two_are_not_the_same_and_a_mean_over_tokens_is_neither():
    tree = Tree()
    of_tokens = gradient_of(tree.kl_of_tokens(), tree.logits)
    of_responses = gradient_of(tree.kl_of_responses(), tree.logits)
    assert cosine(of_tokens, of_responses) < 0.999
    assert cosine(tree.expected_gradient(0.0), of_tokens) == pytest.approx(1, abs=1e-12)
    assert cosine(tree.expected_gradient(0.0, mean_over_tokens=True), of_tokens) < 0.999
    assert cosine(tree.expected_gradient(1.0, mean_over_tokens=True), of_responses) < 0.999
    assert tree.kl_of_tokens().item() == pytest.approx(tree.kl_of_responses().item()), "though the KLs themselves are"


def test_discounted_sums_by_hand():
    x = double(1, 2, 4, -8, 16, 0).view(2, 3)
    assert opd.discounted_sum(x, 0.5).tolist() == [[1 + 1 + 1, 2 + 2, 4], [-8 + 8, 16, 0]]
    assert opd.discounted_sum(x, 1.0).tolist() == [[7, 6, 4], [8, 16, 0]]
    assert torch.equal(opd.discounted_sum(x, 0.0), x)


def test_the_loss_of_opd_is_grpo_with_a_sum_over_tokens():
    logp, old_logp, ref_logp, A = ragged(1)
    logp.requires_grad_()
    expected = 0.0
    for i, t in MASK.nonzero().tolist():
        ratio = (logp[i, t] - old_logp[i, t]).exp()
        inside = torch.minimum(ratio * A[i, t], ratio.clamp(0.7, 1.4) * A[i, t])
        gap = ref_logp[i, t] - logp[i, t]
        expected = expected - (inside - 0.3 * (gap.exp() - gap - 1)) / 7
    loss, stats = opd.policy_loss(logp, old_logp, A, MASK, 7, 0.3, 0.4, ref_logp, 0.3)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    assert torch.allclose(gradient_of(loss, logp), gradient_of(expected, logp), atol=1e-15)
    assert stats["clip_fraction"][MASK].any()


# verl 0.9.1 and TRL 1.16.0 on LOGP and OLD_LOGP of test_family_rl.py, in float64: their own functions, imported and
# run. verl: distillation_loss, verl/trainer/distillation/losses.py 230-302, with token-mean and
# DistillationLossConfig(loss_mode="k1"): advantages -(logp - teacher_logp) of tokens, without gradient (283), clamped
# to +-10 (260), in the loss of compute_policy_loss_vanilla. TRL has the same gradient as the first one in
# trl/experimental/iw_opd/iw_opd_trainer.py, 1212-1267, with iw_opd_gamma=0.
TEACHER_LOGP = -double(
    0.25, 2, 0.75, 1, 4.5,
    0.5, 1.25, 0.125, 0, 0,
    1.5, 0, 0, 0, 0,
    2, 2.5, 0.125, 0.75, 0,
    0.5, 3, 0, 0, 0,
    1.75, 0.375, 0, 0, 0,
).view(6, 5)  # fmt: skip
OPD_ON_POLICY = 0.014705882352941176
OPD_ON_POLICY_GRADIENT = on_tokens(
    -0.014705882352941, 0.029411764705882, 0, -0.058823529411765, 0.088235294117647,
    0.022058823529412, -0.014705882352941, -0.0073529411764706,
    -0.058823529411765,
    0.058823529411765, 0.0073529411764706, -0.029411764705882, -0.058823529411765,
    -0.022058823529412, 0.044117647058824,
    0.036764705882353, -0.0073529411764706,
)  # fmt: skip
# The same with OLD_LOGP: PPO's clip of 0.2 and 0.2, and verl's dual clip of 3, act on the advantages of tokens.
OPD = 0.17460973480408623
OPD_GRADIENT = on_tokens(
    0, 0, 0, -0.027786267808295, 0.078000561658143,
    0.028324090073994, -0.0089195685251858, 0,
    0,
    0, 0, -0.033327895678436, -0.066720916697426,
    -0.010419850428111, 0,
    0.077830882963701, -0.006488947813122,
)  # fmt: skip


def opd_on_the_tensors_of_verl(old_logp):
    """The loss and its gradient, as a mean over the 17 tokens instead of a sum for each of 6 responses."""
    logp = LOGP.clone().requires_grad_()
    A = opd.discounted_sum((TEACHER_LOGP - LOGP) * PEER_MASK, 0.0)
    loss, _ = opd.policy_loss(logp, old_logp, A, PEER_MASK, 6, 0.2, 0.2, None, 0.0)
    loss = loss * 6 / 17
    return loss.item(), gradient_of(loss, logp)


def test_loss_and_gradient_of_opd_are_those_of_verl_but_for_what_they_are_divided_by():
    loss, gradient = opd_on_the_tensors_of_verl(LOGP)
    assert loss == pytest.approx(OPD_ON_POLICY, rel=1e-13)
    assert torch.allclose(gradient, OPD_ON_POLICY_GRADIENT, rtol=1e-12, atol=1e-14)


def test_off_policy_they_are_but_for_the_token_that_the_dual_clip_of_verl_takes_away():
    loss, gradient = opd_on_the_tensors_of_verl(OLD_LOGP)
    ratio = math.exp(1.75)  # above 3, of a token with advantage -1
    assert loss - (ratio - 3) / 17 == pytest.approx(OPD, rel=1e-13)
    assert gradient[3, 0].item() == pytest.approx(ratio / 17)
    gradient[3, 0] = 0
    assert torch.allclose(gradient, OPD_GRADIENT, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a model that differs from the tiny one."""
    policy, tokenizer = load_policy(str(ROOT / "tiny"), torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    for p in policy.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=g)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    policy.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def refused_before_sampling(monkeypatch, capsys, script, **flags) -> str:
    """The one line that a run ends with."""
    monkeypatch.setattr(script, "make_sampler", None)  # a call would be another error
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        script.main(script.Config(**{"model": str(ROOT / "tiny")} | flags))
    said = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and said == str(error.value)
    return said


def test_a_teacher_with_other_tokens_is_one_clear_line(tmp_path, small, monkeypatch, capsys, tiny):
    """Two tokens of as many are the other way round: all shapes fit, and all numbers would be wrong."""
    tiny[0].model.save_pretrained(tmp_path / "other")
    tiny[1].save_pretrained(tmp_path / "other")
    words = json.loads((ROOT / "tiny" / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    one, two = list(ids)[-2:]
    ids[one], ids[two] = ids[two], ids[one]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    other = str(tmp_path / "other")
    said = refused_before_sampling(monkeypatch, capsys, opd, out=str(tmp_path / "run"), teacher=other)
    assert said == f"--teacher {other}: its tokens are not those of --model; give a model of the same family"


def test_a_teacher_that_is_not_there_is_one_clear_line(tmp_path, small, monkeypatch, capsys, tiny):
    monkeypatch.chdir(tmp_path)  # where nobody has made a teacher
    said = refused_before_sampling(monkeypatch, capsys, opd, out="run")
    assert said == (
        "--teacher runs/teacher/model: there is no such folder; python grpo.py --out runs/teacher makes one"
    )
    for name in ("teacher", "no/such-teacher"):
        said = refused_before_sampling(monkeypatch, capsys, opd, out=f"run {len(name)}", teacher=name)
        assert said.startswith(f"--teacher {name} cannot be loaded")
    (tmp_path / "runs" / "teacher" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "teacher" / "model" / "config.json").write_text("{}")
    said = refused_before_sampling(monkeypatch, capsys, opd, out="another", teacher="runs/teacher")
    assert said == "--teacher runs/teacher is the folder of a run; its model is runs/teacher/model"


def test_a_teacher_is_frozen(teacher, tiny):
    policy = load_teacher(teacher, torch.device("cpu"), tiny[1])
    assert not any(p.requires_grad for p in policy.parameters()) and not policy.training


def test_the_advantage_is_what_the_teacher_makes_of_each_token(tmp_path, small, monkeypatch, tiny, teacher):
    seen = []
    record_batches(monkeypatch, opd, seen)
    flags = {"teacher": teacher, "temperature": 0.7, "discount": 0.5}
    record = run(tmp_path, "run", opd, steps=1, **flags)[1]
    (batch,) = seen
    model = load_policy(teacher, torch.device("cpu"))[0].model
    kl = []
    for i, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()]
        gaps = []  # log teacher - log pi of each token, of models that see this response alone
        for one in (model, tiny[0].model):
            with torch.no_grad():
                log_p = (one(ids[None]).logits[0, -length - 1 : -1] / 0.7).log_softmax(-1)
            gaps.append(log_p.gather(1, ids[-length:, None])[:, 0])
        gap = gaps[0] - gaps[1]
        kl += (-gap).tolist()
        for t in range(length):
            by_hand = sum(0.5 ** (s - t) * gap[s].item() for s in range(t, length))
            assert batch["advantages"][i, t].item() == pytest.approx(by_hand, abs=1e-4)
        assert not batch["advantages"][i, length:].any()
    assert record["teacher_kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-4)
    assert record["grad_norm"] > 0.01 and batch["advantages"].abs().max() > 0.5


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_a_policy_that_is_its_own_teacher_has_nothing_to_learn(tmp_path, small, monkeypatch, tiny, discount):
    seen = []
    record_batches(monkeypatch, opd, seen)
    records = run(tmp_path, "run", opd, steps=2, teacher=str(ROOT / "tiny"), discount=discount, lr=1e-2)
    for batch, record in zip(seen, records[1:], strict=True):
        assert torch.equal(batch["advantages"], torch.zeros(batch.response_mask.shape))
        assert record["loss"] == record["grad_norm"] == record["teacher_kl"] == 0
    state = saved(tmp_path, "run")["policy"]
    assert all(torch.equal(state[name], x) for name, x in tiny[0].state_dict().items())


# --- process_grpo ---


@pytest.mark.parametrize("ddof", [0, 1])
def test_process_supervision_by_hand(ddof):
    """Two groups of two responses. The mean of the first is .6: its five steps are .4, -.6 and .4, .4, -.6 off it."""
    ends = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]]).bool()
    rewards = double(0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 3, 0, 1, 0, 0, 0).view(4, 4)
    by_hand = double(
        0.4 - 0.6, 0.4 - 0.6, -0.6, -0.6,
        0.4 + 0.4 - 0.6, 0.4 - 0.6, -0.6, 0,
        1, 1, 1, 0,
        -1, 0, 0, 0,
    ).view(4, 4)  # fmt: skip
    squares = 3 * 0.4**2 + 2 * 0.6**2
    std = double(math.sqrt(squares / (5 - ddof)), math.sqrt(2 / (2 - ddof))).repeat_interleave(2)[:, None]
    A = process_grpo.group_advantages(rewards, ends, 2, ddof=ddof)
    assert torch.allclose(A, by_hand / (std + 1e-4), rtol=1e-14, atol=1e-15)
    A = process_grpo.group_advantages(rewards, ends, 2, eps=0.5, ddof=ddof)
    assert torch.allclose(A, by_hand / (std + 0.5), rtol=1e-14, atol=1e-15)


def test_process_supervision_adds_up_the_steps_from_each_token_on():
    g = torch.Generator().manual_seed(0)
    ends = torch.rand(12, 9, generator=g) < 0.4
    ends[:, 3] = True
    rewards = random(12, 9) * ends
    A = process_grpo.group_advantages(rewards, ends, 4)
    for group in range(3):
        rows = range(4 * group, 4 * group + 4)
        pooled = torch.cat([rewards[i][ends[i]] for i in rows])
        for i in rows:
            for t in range(9):
                later = [rewards[i, j].item() for j in range(t, 9) if ends[i, j]]
                by_hand = sum((r - pooled.mean().item()) / (pooled.std().item() + 1e-4) for r in later)
                assert A[i, t].item() == pytest.approx(by_hand, abs=1e-12)


def test_process_supervision_with_the_answer_as_the_only_step_is_outcome_supervision():
    lengths = torch.tensor([5, 3, 1, 4, 2, 2, 5, 5, 1, 1, 3, 4])
    mask = torch.arange(5) < lengths[:, None]
    ends = torch.arange(5) == lengths[:, None] - 1
    outcomes = double(1, 0, 0, 0.5, 0.25, 0, 0.1, 0.1, 0.1, 1, 1, 0)  # 4 groups of 3, one of them equal
    for ddof in (0, 1):
        A = process_grpo.group_advantages(outcomes[:, None] * ends, ends, 3, ddof=ddof)
        of_responses = grpo.group_advantages(outcomes, 3, ddof=ddof)
        assert torch.allclose(A, of_responses[:, None] * mask, rtol=1e-14, atol=0)
        assert torch.equal(A[6:9], torch.zeros(3, 5, dtype=torch.float64))
    logp = random(12, 5).requires_grad_()
    arguments = [logp + random(12, 5, seed=1), mask, 12, 0.2, 0.3, logp - random(12, 5, seed=2), 0.1]
    losses = []
    for script, advantages in ((process_grpo, of_responses[:, None] * mask), (grpo, of_responses)):
        loss, _ = script.policy_loss(logp, arguments[0].detach(), advantages, *arguments[1:])
        losses.append((loss, gradient_of(loss, logp)))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_equal_rewards_have_no_advantage(value, dtype):
    ends = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1]]).bool()
    A = process_grpo.group_advantages(torch.full((3, 4), value, dtype=dtype) * ends, ends, 3)
    assert torch.equal(A, torch.zeros(3, 4, dtype=dtype))


def test_a_run_with_process_supervision_scores_the_steps(tmp_path, small, monkeypatch, tiny):
    seen = []
    record_batches(monkeypatch, process_grpo, seen)
    records = run(tmp_path, "run", process_grpo, steps=2)
    task = {example["question"]: example for example in load_task("arithmetic").train}
    assert len(seen) == 2
    for batch, record in zip(seen, records[1:], strict=True):
        prompts = [ids[mask.bool()] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        lengths = batch.lengths.tolist()
        questions = [tiny[1].decode(ids[:-n]) for ids, n in zip(prompts, lengths, strict=True)]
        step_rewards, ends = score_steps(batch, [task[question] for question in questions], tiny[1])
        expected = process_grpo.group_advantages(step_rewards, ends, 4)
        assert torch.equal(batch["advantages"], expected) and expected.any()
        assert not torch.equal(expected, expected[:, :1] * batch.response_mask), "tokens of a response differ"
        last = torch.arange(len(ends)), batch.lengths - 1
        assert ends[last].all(), "no token comes after the last end"
        assert torch.equal(step_rewards[last], batch["rewards"]), "the answer is a step"
        share = step_rewards.sum(1) / ends.sum(1)
        assert record["step_reward"] == pytest.approx(share.mean().item(), abs=1e-6) and 0 < record["step_reward"] < 1
        assert record["grad_norm"] > 0


def test_without_kl_a_response_stays_in_as_long_as_one_of_its_tokens_has_an_advantage(tmp_path, small, monkeypatch):
    """Steps that cancel out leave the first tokens at 0, and the whole response has to go through the model."""
    policy_loss = process_grpo.policy_loss
    rows = []

    def last_token_of_two(rewards, ends, group_size):
        A = torch.zeros_like(rewards)
        A[[2, 5], ends[[2, 5]].long().cumsum(1).argmax(1)] = 1.0  # at the last end
        return A

    def watched(logp, old_logp, A, *rest):
        rows.append(A.sum(1).tolist())
        return policy_loss(logp, old_logp, A, *rest)

    monkeypatch.setattr(process_grpo, "group_advantages", last_token_of_two)
    monkeypatch.setattr(process_grpo, "policy_loss", watched)
    record = run(tmp_path, "run", process_grpo, steps=1, beta=0.0)[1]
    assert sum(rows, []) == [1.0, 1.0] and record["grad_norm"] > 0


def test_a_task_without_a_judge_of_steps_is_refused_before_the_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(process_grpo, "make_policy", None)
    said = refused_before_sampling(monkeypatch, capsys, process_grpo, out=str(tmp_path / "run"), task="countdown")
    assert said.startswith("no judge of steps for questions like ") and said.endswith("; give --task arithmetic")


# --- t1 ---


def test_the_loss_of_t1_is_that_of_rloo_and_the_mean_entropy_of_responses():
    logp, old_logp, _, _ = ragged(2, spread=0.1)
    entropy = random(4, 6, seed=3).abs().requires_grad_()
    A = double(1, -2, 0, 0.5)
    loss, stats = t1.policy_loss(logp, old_logp, A, MASK, 4, 0.2, 0.2, entropy, 0.3)
    base, base_stats = rloo.policy_loss(logp, old_logp, A, MASK, 4, 0.2, 0.2)
    bonus = 0.0
    for i, length in enumerate((6, 2, 1, 3)):
        bonus += sum(entropy[i, :length].tolist()) / length / 4
    assert loss.item() == pytest.approx(base.item() - 0.3 * bonus, abs=1e-14)
    assert torch.equal(stats["ratio_max"], base_stats["ratio_max"])
    by_hand = -0.3 * MASK / double(6, 2, 1, 3)[:, None] / 4
    assert torch.allclose(gradient_of(loss, entropy), by_hand, atol=1e-16), "also where the advantage is 0"


def test_without_its_bonus_t1_has_the_loss_of_rloo():
    logp, old_logp, _, _ = ragged(3)
    logp.requires_grad_()
    A, weight = double(1, -2, 0.25, 0.5), double(1, 0.5, 2, 0.75)[:, None]
    arguments = [logp, old_logp, A, MASK, 4, 0.2, 0.3]
    loss, _ = t1.policy_loss(*arguments, random(4, 6), 0.0, weight)
    base, _ = rloo.policy_loss(*arguments, weight)
    assert torch.equal(loss, base) and torch.equal(gradient_of(loss, logp), gradient_of(base, logp))


# verl 0.9.1 and TRL 1.16.0: what an entropy bonus of coefficient 0.5 adds to the loss. verl: entropy_coeff=0.5,
# verl/workers/utils/losses.py 123-128, with "seq-mean-token-mean"; with "token-mean" it is that of TRL, whose
# entropy_coef=0.5 is in grpo_trainer.py 3199-3211.
ENTROPY = double(
    1, 0.5, 2, 0.25, 0.75,
    1.5, 0.125, 1, 9, 9,
    0.5, 9, 9, 9, 9,
    2, 1, 0.25, 0.5, 9,
    0.75, 1.25, 9, 9, 9,
    0.125, 1, 9, 9, 9,
).view(6, 5)  # fmt: skip


def test_the_entropy_bonus_is_that_of_verl_averaged_over_responses():
    loss, _ = t1.policy_loss(LOGP, LOGP, torch.zeros(6), PEER_MASK, 6, 0.2, 0.2, ENTROPY, 0.5)
    assert loss.item() == pytest.approx(-0.39791666666667, rel=1e-13)
    assert -0.5 * ENTROPY[PEER_MASK].mean().item() == pytest.approx(-0.42647058823529), "and of TRL, over all tokens"


def test_a_moving_average_by_hand():
    average, policy = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    average.weight.data, average.bias.data = torch.tensor([[1.0, -2.0]]), torch.tensor([8.0])
    policy.weight.data, policy.bias.data = torch.tensor([[3.0, 2.0]]), torch.tensor([0.0])
    t1.move_average(average, policy, 0.75)
    assert average.weight.tolist() == [[1.5, -1.0]] and average.bias.tolist() == [6.0]
    t1.move_average(average, policy, 0.75)
    assert average.weight.tolist() == [[1.875, -0.25]] and average.bias.tolist() == [4.5]
    assert policy.weight.tolist() == [[3.0, 2.0]] and policy.bias.tolist() == [0.0]


def test_what_a_group_has_in_common_falls_out_of_the_advantage():
    """So the mean KL of the group does, and to subtract that of the others is a larger beta."""
    r, kl = random(6 * 4).abs(), random(6 * 4, seed=1)
    G, beta = 4, 0.3
    mean = kl.view(6, G).mean(1).repeat_interleave(G)
    others = (G * mean - kl) / (G - 1)
    plain = t1.group_advantages(r - beta * kl, G)
    assert torch.allclose(t1.group_advantages(r - beta * (kl - mean), G), plain, atol=1e-15)
    less_others = t1.group_advantages(r - beta * (kl - others), G)
    assert torch.allclose(less_others, t1.group_advantages(r - beta * G / (G - 1) * kl, G), atol=1e-15)
    assert (less_others - plain).abs().max() > 0.01


def test_t1_without_what_it_adds_is_rloo_and_its_reference_follows(tmp_path, small):
    """ema 1: the reference stays, to the bit as in RLOO; ema 0: it is the policy as it was before the step."""
    flags = {"steps": 3, "lr": 1e-3, "beta": 0.1, "rewards": ("accuracy=1", "format=0")}
    base = without_times(run(tmp_path, "rloo", rloo, **flags))
    others = {}
    for ema in (1.0, 0.9, 0.0):
        records = run(tmp_path, f"t1 {ema}", t1, alpha=0.0, temperature=1.0, ema=ema, **flags)
        others[ema] = without_times(records)
        assert others[ema][:2] == base[:2], "up to the first step"
    assert others[1.0] == base and base[2]["kl"] != 0
    assert others[0.0][2]["kl"] == others[0.0][3]["kl"] == 0
    assert others[0.9][2]["kl"] not in (0, base[2]["kl"])


def test_the_reference_of_t1_is_the_average_of_all_policies(tmp_path, small, tiny):
    states = []
    for steps in (1, 2):
        run(tmp_path, str(steps), t1, steps=steps, ema=0.75, lr=1e-3)
        states.append(saved(tmp_path, str(steps)))
    for name, first in tiny[0].state_dict().items():
        one, two = (state["policy"][name] for state in states)
        after_1 = 0.75 * first + 0.25 * one
        after_2 = 0.75 * after_1 + 0.25 * two
        assert torch.allclose(states[0]["reference"][name], after_1, atol=1e-7)
        assert torch.allclose(states[1]["reference"][name], after_2, atol=1e-7)
        assert (one != two).any() and (one != first).any()


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_responses_without_an_advantage_still_have_the_entropy_bonus(tmp_path, small, monkeypatch, alpha):
    score = t1.score

    def all_alike(batch, examples, names):
        scores = score(batch, examples, names)
        for name in scores:
            scores[name] = [0.0] * len(batch.texts)
        return scores

    monkeypatch.setattr(t1, "score", all_alike)
    record = run(tmp_path, "run", t1, steps=1, alpha=alpha)[1]
    assert record["informative_groups"] == 0
    assert (record["grad_norm"] > 1e-3) == (alpha > 0)
    assert record["tokens"] == record["response_length"] * 16, "none of the 16 is left out"


def test_the_entropy_bonus_raises_the_entropy(tmp_path, small):
    flags = {"steps": 3, "lr": 1e-3, "rewards": ("accuracy=0",)}
    without, bonus = (run(tmp_path, str(alpha), t1, alpha=alpha, **flags) for alpha in (0.0, 1.0))
    assert bonus[1]["entropy"] == pytest.approx(without[1]["entropy"], rel=1e-5)
    assert bonus[3]["entropy"] > without[3]["entropy"] + 0.1


def test_an_adapter_has_no_average_and_no_kl_no_reference(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(t1, "make_policy", None)
    said = refused_before_sampling(monkeypatch, capsys, t1, out=str(tmp_path / "run"), lora_rank=4)
    assert said == "--lora-rank: a moving average of the weights needs weights of its own; leave it out"
    said = refused_before_sampling(monkeypatch, capsys, t1, out=str(tmp_path / "run"), beta=0.0)
    assert said == "--beta 0.0: it must be at least 1e-09"


# --- vapo ---


def test_lam_grows_with_the_length_of_a_response():
    lengths = torch.tensor([1, 10, 20, 30, 64, 100, 1000, 10000])
    found = vapo.adaptive_lam(lengths, 0.05).tolist()
    assert found == pytest.approx([0, 0, 0, 1 / 3, 0.6875, 0.8, 0.98, 0.998], abs=1e-6)
    assert vapo.adaptive_lam(torch.tensor([1, 2, 4]), 1.0).tolist() == [0, 0.5, 0.75]
    for alpha in (1e30, math.inf):
        assert vapo.adaptive_lam(lengths, alpha).tolist() == [1.0] * 8
    assert vapo.adaptive_lam(lengths, 0.0).tolist() == [0.0] * 8


def test_gae_with_a_lam_for_each_response_is_that_of_each_by_itself():
    r, V = random(4, 6) * MASK, random(4, 6, seed=1)
    lam = double(0.5, 0.9, 0.0, 1.0)
    together = vapo.gae(r, V, MASK, 0.9, lam)
    for i in range(4):
        row = slice(i, i + 1)
        assert torch.allclose(together[row], ppo.gae(r[row], V[row], MASK[row], 0.9, lam[i].item()), atol=1e-15)
    assert not torch.allclose(together, ppo.gae(r, V, MASK, 0.9, 0.5), atol=0.01)


# verl 0.9.1: compute_gae_advantage_return, core_algos.py 215-263, gamma 1, lam 0.95: before masked_whiten of line 262
# and after (variance over 5 tokens with n - 1, plus 1e-8).
GAE_MASK = torch.arange(4) < torch.tensor([[3], [2]])
GAE_REWARDS = double(-0.125, 0.25, 1, 9, -0.5, 0.5, 9, 9).view(2, 4)
GAE_VALUES = double(0.5, -0.25, 0.75, 9, 0.25, -0.5, 9, 9).view(2, 4)
GAE_RAW = double(0.538125, 1.4875, 0.25, -0.3, 1)  # on the 5 tokens
GAE_WHITENED = double(-0.083057690298307, 1.3003264277185, -0.50289974323164, -1.3043335969872, 0.58996460279872)


def test_gae_and_whitening_are_those_of_verl():
    A = vapo.gae(GAE_REWARDS, GAE_VALUES, GAE_MASK, 1.0, double(0.95, 0.95))
    assert torch.allclose(A[GAE_MASK], GAE_RAW, rtol=1e-14)
    assert torch.allclose(vapo.whiten(A, GAE_MASK, alone)[GAE_MASK], GAE_WHITENED, atol=1e-7), "whose eps is others'"


def test_the_likelihood_of_right_responses_by_hand():
    """Two right responses, of 6 tokens and of 1: the mean over these 7 tokens, and nothing of the wrong ones."""
    logp, old_logp, _, A = ragged(4)
    logp.requires_grad_()
    right = double(1, 0, 1, 0)
    arguments = [logp, old_logp, A, MASK, 12, 0.2, 0.28]
    loss, _ = vapo.policy_loss(*arguments, right, 7, 0.5)
    without, _ = ppo.policy_loss(*arguments)
    likelihood = (sum(logp[0].tolist()) + logp[2, 0].item()) / 7
    assert (loss - without).item() == pytest.approx(-0.5 * likelihood, abs=1e-14)
    by_hand = -0.5 / 7 * (MASK * right[:, None])
    assert torch.allclose(gradient_of(loss - without, logp), by_hand, atol=1e-15)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = [x[rows] for x in (logp, old_logp, A, MASK)]
        parts.append(vapo.policy_loss(*part, 12, 0.2, 0.28, right[rows], 7, 0.5)[0])
    assert sum(parts).item() == pytest.approx(loss.item(), abs=1e-14)


def test_without_a_right_response_there_is_no_likelihood():
    logp, old_logp, _, A = ragged(5)
    arguments = [logp.requires_grad_(), old_logp, A, MASK, 12, 0.2, 0.28]
    loss, _ = vapo.policy_loss(*arguments, double(0, 0, 0, 0), 1, 0.5)
    base, _ = ppo.policy_loss(*arguments)
    assert torch.equal(loss, base) and loss.isfinite()
    assert torch.equal(gradient_of(loss, logp), gradient_of(base, logp))


def test_without_mu_the_loss_of_vapo_is_that_of_ppo():
    logp, old_logp, _, A = ragged(6)
    weight = random(4, 6, seed=9).abs()
    arguments = [logp.requires_grad_(), old_logp, A, MASK, 12, 0.2, 0.2]
    loss, stats = vapo.policy_loss(*arguments, double(1, 0, 1, 0), 7, 0.0, weight)
    base, base_stats = ppo.policy_loss(*arguments, weight)
    assert torch.equal(loss, base) and torch.equal(gradient_of(loss, logp), gradient_of(base, logp))
    assert stats.keys() == base_stats.keys() and all(torch.equal(stats[name], base_stats[name]) for name in stats)


def test_with_lam_1_and_without_what_it_adds_vapo_is_ppo(tmp_path, small, monkeypatch):
    for script in (ppo, vapo):
        score_by_tokens(monkeypatch, script)
    flags = {"steps": 2, "beta": 0.04, "clip_high": 0.2, "value_warmup": 0, "max_new_tokens": 24, "lr": 1e-3}
    base = run(tmp_path, "ppo", ppo, lam=1.0, **flags)
    other = run(tmp_path, "vapo", vapo, alpha=1e30, mu=0.0, **flags)
    # In step 2 V is not 0, and PPO has its returns as A + V, which rounds otherwise than the rewards to come.
    rounded = {"value_loss", "value_clip_fraction", "value_grad_norm"}
    assert without_times(other)[:2] == without_times(base)[:2]
    one, two = (without_times(records)[2] for records in (base, other))
    assert one["explained_variance"] != 0 and one["clip_fraction"] > 0 and one["kl"] != 0
    for name, x in one.items():
        assert two[name] == (pytest.approx(x, rel=1e-4) if name in rounded else x), name


def test_v_learns_the_rewards_to_come_and_the_advantage_has_a_lam_of_its_own(tmp_path, small, monkeypatch):
    seen = []
    record_batches(monkeypatch, vapo, seen)
    score_by_tokens(monkeypatch, vapo)
    flags = {"steps": 2, "alpha": 0.2, "gamma": 0.9, "value_warmup": 0, "value_lr": 1e-2}
    run(tmp_path, "run", vapo, **flags)
    assert not seen[0]["values"].any() and seen[1]["values"][seen[1].response_mask].all()
    for batch in seen:
        mask = batch.response_mask
        by_hand = torch.zeros(mask.shape)
        advantages = torch.zeros(mask.shape)
        for i, length in enumerate(batch.lengths.tolist()):
            for t in range(length):
                by_hand[i, t] = 0.9 ** (length - 1 - t) * batch["rewards"][i]
            r = torch.zeros(1, length)
            r[0, -1] = batch["rewards"][i]
            lam = max(0.0, 1 - 1 / (0.2 * length))
            values = batch["values"][i : i + 1, :length]
            advantages[i, :length] = ppo.gae(r, values, torch.ones(1, length, dtype=torch.bool), 0.9, lam)[0]
        assert 0 < batch["rewards"].sum() < 16
        assert torch.allclose(batch["returns"], by_hand, atol=1e-6), "whatever V is"
        assert torch.allclose(batch["advantages"], ppo.whiten(advantages, mask, alone), atol=1e-5)


def test_in_the_warmup_of_vapo_v_learns_and_the_policy_does_not(tmp_path, small, monkeypatch, tiny):
    score_by_tokens(monkeypatch, vapo)
    record = run(tmp_path, "run", vapo, steps=1, value_warmup=1, mu=1.0)[1]
    state = saved(tmp_path, "run")
    assert all(torch.equal(state["policy"][name], x) for name, x in tiny[0].state_dict().items())
    assert state["value"]["head.weight"].any() and record["grad_norm"] == 0


def test_vapo_imitates_right_responses_and_where_there_are_none_nothing_breaks(tmp_path, small, monkeypatch):
    """One update, at which all advantages are 0, so that the likelihood alone has a gradient."""
    score, whiten = vapo.score, vapo.whiten
    right = []

    def given(batch, examples, names):
        scores = score(batch, examples, names)
        scores["accuracy"] = right
        return scores

    monkeypatch.setattr(vapo, "score", given)
    monkeypatch.setattr(vapo, "whiten", lambda x, mask, all_sum: 0 * whiten(x, mask, all_sum))
    seen = []
    record_batches(monkeypatch, vapo, seen)
    flags = {"steps": 1, "epochs": 1, "minibatches": 1, "value_warmup": 0, "mu": 0.3}
    right[:] = [0.0] * 16
    none = run(tmp_path, "none", vapo, **flags)[1]
    assert none["loss"] == 0 and none["grad_norm"] == 0 and none["accuracy"] == 0
    right[:] = [1.0, 0.0, 0.0, 1.0] * 4
    half = run(tmp_path, "half", vapo, **flags)[1]
    batch = seen[-1]
    tokens = batch.response_mask & (torch.tensor(right) == 1)[:, None]
    assert half["loss"] == pytest.approx(-0.3 * batch.sampler_logp[tokens].mean().item(), rel=1e-4)
    assert half["grad_norm"] > 0.01


# --- oreal ---


def test_one_right_and_one_wrong_response_of_each_mixed_group():
    right = double(0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0)
    found = oreal.one_of_each(right, 4)
    assert found.nonzero()[:, 0].tolist() == [0, 2, 4, 6, 16, 17]
    assert found.dtype == torch.bool
    assert not oreal.one_of_each(torch.ones(6), 3).any() and not oreal.one_of_each(torch.zeros(6), 3).any()
    assert oreal.one_of_each(double(1, 0), 2).tolist() == [True, True]


def test_token_weights_by_hand():
    """Rewards of tokens whose means so far are 1, 0, 2 and -1, -1, -3."""
    w = double(1, -1, 6, 9, -1, -1, -7, 9).view(2, 4)
    mask = torch.arange(4) < torch.tensor([[3], [3]])

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    surely = [2 * sigma(1) - 1, 0, 2 * sigma(2) - 1]
    surely_wrong = [1 - 2 * sigma(-1), 1 - 2 * sigma(-1), 1 - 2 * sigma(-3)]
    weights = oreal.token_weights(w, mask, double(1, 0))
    assert weights[0, :3].tolist() == pytest.approx(surely) and weights[1, :3].tolist() == pytest.approx(surely_wrong)
    weights = oreal.token_weights(w, mask, double(0, 1))
    assert not weights[:, :3].any(), "what the token reward model is wrong about teaches nothing"
    most = oreal.token_weights(100 * random(5, 9), torch.ones(5, 9).bool(), torch.ones(5))
    assert most.min() == 0 and 0.99 < most.max() <= 1


def test_token_weights_look_back_only():
    w = random(4, 6)
    right = double(1, 0, 1, 0)
    before = oreal.token_weights(w, MASK, right)
    assert before[MASK].any()
    changes = 0
    for t in range(6):
        other = w.clone()
        other[:, t] += 5 * (2 * right - 1)
        after = oreal.token_weights(other, MASK, right)
        assert torch.equal(after[:, :t], before[:, :t])
        later = (after != before)[:, t:] & MASK[:, t:]
        changes += later.sum().item()
        assert later[MASK[:, t], 0].all(), "the token itself counts"
    assert changes == 6 * 7 // 2 + 3 + 1 + 6, "and so do all after it, in rows of 6, 2, 1 and 3 tokens"


def test_the_advantage_of_oreal_leaves_one_out():
    """1 - p for right responses and -p for wrong ones, p being the share of right ones among the others."""
    found = oreal.group_advantages(double(1, 0, 0, 1, 0, 0, 0, 0), 4).tolist()
    assert found == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0])


def written_out(logp, A, taken, right, eta, ref_logp, beta, weight):
    """Minus eq. 11, token by token; taken: the tokens of the responses that were taken."""
    sums = {1: 0.0, 0: 0.0}
    counts = {1: 0, 0: 0}
    kl = 0.0
    for i, t in taken.nonzero().tolist():
        kind = int(right[i])
        sums[kind] = sums[kind] + weight[i, t] * A[i] * logp[i, t]
        counts[kind] += 1
        gap = ref_logp[i, t] - logp[i, t]
        kl = kl + gap.exp() - gap - 1
    return -sums[1] / counts[1] - eta * sums[0] / counts[0] + beta * kl / (counts[0] + counts[1]), counts


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_of_oreal_against_its_equation(beta):
    logp, _, ref_logp, _ = ragged(7)
    logp.requires_grad_()
    A, right = double(0.5, -0.5, 0.75, -0.25), double(1, 0, 1, 0)
    weight = random(4, 6, seed=8).sigmoid()
    taken = MASK & torch.tensor([True, True, True, False])[:, None]
    expected, counts = written_out(logp, A, taken, right, 0.7, ref_logp, beta, weight)
    assert counts == {1: 7, 0: 2}
    given = ref_logp if beta else None
    loss, stats = oreal.policy_loss(logp, A, taken, 7, 2, 0.7, given, beta, weight)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    gradient = gradient_of(loss, logp)
    assert torch.allclose(gradient, gradient_of(expected, logp), atol=1e-15)
    assert torch.equal(gradient != 0, taken) and ("kl" in stats) == (beta > 0)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        ref = ref_logp[rows] if beta else None
        parts.append(oreal.policy_loss(logp[rows], A[rows], taken[rows], 7, 2, 0.7, ref, beta, weight[rows])[0])
    assert sum(parts).item() == pytest.approx(loss.item(), abs=1e-14)
    step = -gradient_of(oreal.policy_loss(logp, A, taken, 7, 2, 0.7, None, 0.0, weight)[0], logp)
    assert torch.equal(step.sign(), A.sign()[:, None] * taken), "right responses are cloned, wrong ones pushed away"


def test_before_the_token_reward_model_has_learned_the_policy_has_the_kl_alone():
    logp, _, ref_logp, _ = ragged(9)
    logp.requires_grad_()
    weight = oreal.token_weights(torch.zeros(4, 6, dtype=torch.float64), MASK, double(1, 0, 1, 0))
    assert torch.equal(weight, torch.zeros(4, 6, dtype=torch.float64))
    loss, _ = oreal.policy_loss(logp, double(1, -1, 1, -1), MASK, 7, 5, 0.5, ref_logp, 0.3, weight)
    kl = oreal.kl_k3(logp, ref_logp)[MASK].mean()
    assert loss.item() == pytest.approx(0.3 * kl.item(), abs=1e-14)
    assert torch.allclose(gradient_of(loss, logp), gradient_of(0.3 * kl, logp), atol=1e-15)
    loss, _ = oreal.policy_loss(logp, double(1, -1, 1, -1), MASK, 7, 5, 0.5, None, 0.0, weight)
    assert loss.item() == 0 and not gradient_of(loss, logp).any()


def test_the_token_reward_model_learns_from_the_mean_of_a_response():
    w = double(1, 2, 99, -0.5, 99, 99, 99, 99, 99).view(3, 3).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    right = double(1, 0, 1)
    loss, stats = oreal.reward_loss(w, right, mask, 2)
    by_hand = -logsigmoid(double(1.5)) - logsigmoid(double(0.5))  # sigma(-x) = 1 - sigma(x)
    assert loss.item() == pytest.approx(by_hand.item() / 2, abs=1e-15)
    assert stats["reward_model_accuracy"].tolist() == [1, 1], "the last response does not count"
    p = 1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(0.5))
    gradient = double((p[0] - 1) / 2 / 2, (p[0] - 1) / 2 / 2, 0, p[1] / 2, 0, 0, 0, 0, 0).view(3, 3)
    assert torch.allclose(gradient_of(loss, w), gradient, atol=1e-15)
    wrong, stats = oreal.reward_loss(w, 1 - right, mask, 2)
    assert wrong.item() == pytest.approx(-(logsigmoid(double(-1.5)) + logsigmoid(double(-0.5))).item() / 2, abs=1e-15)
    assert stats["reward_model_accuracy"].tolist() == [0, 0]
    nothing, stats = oreal.reward_loss(w, right, torch.zeros(3, 3).bool(), 1)
    assert nothing.item() == 0 and not gradient_of(nothing, w).any() and not stats


@pytest.fixture
def judge(tiny):
    """A token reward model in float64 with a head that is not 0."""
    body = copy.deepcopy(tiny[0].model).double().base_model
    value = Value(body).double()
    value.head.weight.data = random(*value.head.weight.shape)
    value.head.bias.data.fill_(0.3)
    return value


@pytest.mark.parametrize("packs", [True, False])
def test_the_judgement_after_a_token_is_the_head_on_its_own_state(judge, batch, packs):
    judge.body.packs = packs
    with torch.no_grad():
        w = judge(batch, dtype=torch.float64, after=True)
    assert w.shape == batch.response_mask.shape and not w[~batch.response_mask].any()
    assert batch.lengths.unique().numel() > 2 and batch.prompt_lengths.unique().numel() > 1
    for i, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()]  # this response without padding
        with torch.no_grad():
            states = judge.body(ids[None]).last_hidden_state[0]
            by_hand = judge.head(states)[-length:, 0]
        assert torch.allclose(w[i, :length], by_hand, atol=1e-12)


@pytest.mark.parametrize("packs", [True, False])
def test_the_judgement_knows_the_token_and_nothing_later(judge, batch, packs):
    judge.body.packs = packs
    t = 3
    other = copy.copy(batch)
    other.input_ids = batch.input_ids.clone()
    other.input_ids[:, batch.prompt_width + t] += 1
    there = batch.lengths > t
    assert there.any()
    with torch.no_grad():
        one, two = (judge(x, dtype=torch.float64, after=True) for x in (batch, other))
        value = judge(batch, dtype=torch.float64)
        value_of_other = judge(other, dtype=torch.float64)
    assert torch.equal(one[:, :t], two[:, :t])
    assert ((one - two)[there, t].abs() > 1e-6).all()
    assert torch.equal(value[:, : t + 1], value_of_other[:, : t + 1]), "a value does not"
    not_first = batch.response_mask[:, 1:]
    assert torch.allclose(value[:, 1:][not_first], one[:, :-1][not_first], atol=1e-12), "it comes one token earlier"


def test_the_judgement_has_a_gradient_in_the_body_and_the_head(judge, batch):
    w = judge(batch.select(torch.arange(8)), dtype=torch.float64, after=True)
    w.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in judge.head.parameters())
    assert all(p.grad is not None and p.grad.any() for p in judge.body.parameters())


def test_in_the_warmup_of_oreal_the_judge_learns_and_the_policy_does_not(tmp_path, small, monkeypatch, tiny):
    score_by_tokens(monkeypatch, oreal)
    flags = {"reward_warmup": 2, "epochs": 2, "lr": 1e-3}
    records = run(tmp_path, "warm", oreal, steps=2, **flags)
    state, before = saved(tmp_path, "warm"), tiny[0].state_dict()
    assert all(torch.equal(before[name], x) for name, x in state["policy"].items())
    assert state["judge"]["head.weight"].any() and state["judge"]["head.bias"].any()
    assert len(state["optimizer"]["state"]) == len(state["optimizer"]["param_groups"][1]["params"])
    assert records[1]["grad_norm"] == records[2]["grad_norm"] == 0
    assert records[2]["token_weight"] > 0, "though there would be something to learn"
    records = run(tmp_path, "after", oreal, steps=3, **flags)
    assert any(not torch.equal(before[name], x) for name, x in saved(tmp_path, "after")["policy"].items())
    assert records[3]["grad_norm"] > 0


def test_the_first_judgement_is_one_half(tmp_path, small, monkeypatch):
    score_by_tokens(monkeypatch, oreal)
    record = run(tmp_path, "run", oreal, steps=1, reward_warmup=0)[1]
    assert record["token_weight"] == 0 and record["loss"] == pytest.approx(0, abs=1e-7) and record["kl"] == 0


def test_oreal_learns_from_two_responses_of_each_mixed_group(tmp_path, small, monkeypatch):
    score_by_tokens(monkeypatch, oreal)
    seen, rows = [], []
    record_batches(monkeypatch, oreal, seen)
    policy_loss = oreal.policy_loss

    def watched(logp, advantages, mask, num_right, num_wrong, *rest):
        rows.append((advantages.tolist(), mask.sum(1).tolist(), int(num_right), int(num_wrong)))
        return policy_loss(logp, advantages, mask, num_right, num_wrong, *rest)

    monkeypatch.setattr(oreal, "policy_loss", watched)
    run(tmp_path, "run", oreal, steps=1, rewards=("accuracy=1", "format=5"))
    (batch,) = seen
    assert len(rows) == 1
    advantages, tokens, num_right, num_wrong = rows[0]
    groups = batch["right"].view(4, 4).sum(1)
    mixed = ((0 < groups) & (groups < 4)).sum().item()
    assert mixed > 1 and len(advantages) == 2 * mixed and sum(a > 0 for a in advantages) == mixed
    assert num_right == sum(n for a, n in zip(advantages, tokens, strict=True) if a > 0)
    assert num_wrong == sum(n for a, n in zip(advantages, tokens, strict=True) if a < 0)
    assert torch.equal(batch["advantages"], rloo.group_advantages(batch["right"], 4)), "of the accuracy alone"


def test_the_weights_of_tokens_are_of_judgements_that_know_the_token(tmp_path, small, monkeypatch, with_heads):
    score_by_tokens(monkeypatch, oreal)
    seen, weights = [], []
    record_batches(monkeypatch, oreal, seen)
    policy_loss = oreal.policy_loss
    monkeypatch.setattr(oreal, "policy_loss", lambda *rest: weights.append(rest[-1]) or policy_loss(*rest))
    record = run(tmp_path, "run", oreal, steps=1, reward_warmup=0, reward_lr=0.0, lr=0.0)[1]
    (batch,) = seen
    (judge,) = with_heads  # which has not changed
    taken = batch.select(batch["in_loss"].any(1).nonzero()[:, 0])
    with torch.no_grad():
        w = judge(taken, after=True)
    expected = oreal.token_weights(w, taken.response_mask, taken["right"])
    assert torch.allclose(weights[0], expected, atol=1e-5)
    assert record["token_weight"] == pytest.approx(expected[taken.response_mask].mean().item(), rel=1e-4) and w.any()
    told = (w.sum(1) > 0) == (taken["right"] == 1)
    assert record["reward_model_accuracy"] == pytest.approx(told.float().mean().item())


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_without_a_mixed_group_oreal_learns_nothing(tmp_path, small, monkeypatch, tiny, right):
    score = oreal.score

    def all_alike(batch, examples, names):
        scores = score(batch, examples, names)
        scores["accuracy"] = [right] * len(batch.texts)
        return scores

    monkeypatch.setattr(oreal, "score", all_alike)
    record = run(tmp_path, "run", oreal, steps=1, reward_warmup=0)[1]
    assert record["loss"] == record["grad_norm"] == 0
    state = saved(tmp_path, "run")
    assert all(torch.equal(state["policy"][name], x) for name, x in tiny[0].state_dict().items())
    assert not state["judge"]["head.weight"].any()


# --- the scripts ---

RUNS = {  # flags with which each of them learns something in its first steps
    "opd": {},
    "process_grpo": {},
    "t1": {"alpha": 0.1},
    "vapo": {"value_warmup": 1},
    "oreal": {"reward_warmup": 1, "reward_lr": 1e-2},
}


@pytest.fixture
def small(monkeypatch):
    """Fewer questions and no curves, which take most of the time of so small a run."""
    monkeypatch.setattr(data, "TRAIN_SIZE", 256)
    monkeypatch.setattr(plot, "save", lambda folders, path: None)


@pytest.fixture
def with_heads(monkeypatch):
    """The second networks of VAPO and OREAL with a head that is not 0; returns those that are made.

    From 0, the first gradients of a head may be 0 but for rounding, which Adam would make large.
    """
    make_value = oreal.make_value
    made = []

    def with_a_head(*arguments):
        value = make_value(*arguments)
        torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
        made.append(value)
        return value

    for script in (vapo, oreal):
        monkeypatch.setattr(script, "make_value", with_a_head)
    return made


@pytest.fixture
def flags_of(monkeypatch, teacher):
    """The flags of a run of a member, whose responses are right by their token ids."""

    def flags(name):
        score_by_tokens(monkeypatch, SCRIPTS[name])
        return RUNS[name] | ({"teacher": teacher} if name == "opd" else {})

    return flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_microbatch_size_gives_the_same_run(tmp_path, small, with_heads, flags_of, name):
    flags = flags_of(name) | {"epochs": 2, "lr": 1e-5}
    if name == "vapo":
        flags |= {"value_warmup": 0, "value_lr": 1e-5}
    if name == "oreal":
        flags |= {"reward_warmup": 0, "reward_lr": 1e-5}
    one, other = (
        run(tmp_path, str(b), SCRIPTS[name], steps=1, tokens_per_microbatch=b, **flags)[1] for b in (1, 10**6)
    )
    assert one["grad_norm"] > 0
    for metric in without_times([one])[0].keys():
        assert one[metric] == pytest.approx(other[metric], rel=1e-3, abs=1e-6), metric


@pytest.mark.parametrize("name", SCRIPTS)
def test_resuming_continues_to_the_bit(tmp_path, small, flags_of, name):
    flags = flags_of(name) | {"epochs": 2, "lr": 1e-3, "eval_every": 2}
    script = SCRIPTS[name]
    expected = run(tmp_path, "whole", script, steps=3, **flags)
    run(tmp_path, "part", script, steps=2, **flags)
    resumed = run(tmp_path, "part", script, steps=3, resume=str(tmp_path / "part"), **flags)
    assert without_times(resumed) == without_times(expected) and expected[3]["grad_norm"] > 0
    one, other = saved(tmp_path, "whole"), saved(tmp_path, "part")
    networks = {"policy", *{"t1": ["reference"], "vapo": ["value"], "oreal": ["judge"]}.get(name, [])}
    assert networks == {key for key in one if key in ("policy", "reference", "value", "judge", "teacher")}
    for network in networks:
        assert all(torch.equal(x, other[network][key]) for key, x in one[network].items()), network


# --- from the command line ---


def test_a_member_starts_as_a_module_from_the_root(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "family.process_grpo", "--task", "countdown", "--out", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = result.stderr.splitlines()
    assert result.returncode == 2 and len(said) == 1 and said[0].startswith("no judge of steps for questions like ")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("process_grpo", 25), ("t1", 25), ("vapo", 25), ("oreal", 40)])
def test_accuracy_rises(tmp_path, name, steps):
    run_script(f"family/{name}.py", "--steps", steps, "--eval-every", 0, "--out", tmp_path / "run")
    assert_it_has_learned(tmp_path / "run")


@pytest.mark.slow
def test_accuracy_rises_to_that_of_the_teacher(tmp_path):
    run_script("grpo.py", "--steps", 60, "--eval-every", 0, "--out", tmp_path / "teacher")
    teacher = ["--teacher", tmp_path / "teacher" / "model"]
    run_script("family/opd.py", *teacher, "--steps", 25, "--eval-every", 0, "--out", tmp_path / "run")
    records = assert_it_has_learned(tmp_path / "run")
    assert records[-1]["teacher_kl"] < 0.5 * records[1]["teacher_kl"]


def assert_it_has_learned(folder):
    """pass@1 and format rise, of held-out questions, and are printed."""
    records = read_jsonl(folder / "metrics.jsonl")
    for name in ("eval_pass@1", "eval_accuracy", "eval_format"):
        print(name, [record[name] for record in records if name in record])
    assert records[-1]["eval_pass@1"] > records[0]["eval_pass@1"] + 0.2
    assert records[-1]["eval_format"] > records[0]["eval_format"] + 0.2
    return records
