"""dr_grpo.py and rloo.py: patches of grpo.py in marked places, and right. How large any patch may be."""

import ast
import collections
import copy
import difflib
import importlib
import io
import itertools
import math
import tokenize
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_sampler, read_jsonl, run_script

import dr_grpo
import grpo
import kimi_k15
import logprobs
import ppo
import rloo
from data import encode_prompts, load_task
from logprobs import token_logprobs

# script -> added plus removed lines of code against grpo.py at the most
BUDGET = {"dr_grpo": 12, "rloo": 26, "kimi_k15": 102, "ppo": 115}
# member of family/ -> the script that it is a patch of, and the same limit against that one
FAMILY = {
    "dpo_norm": ("dpo", 14),
    "ipo": ("dpo", 14),
    "simpo": ("dpo", 28),
    "reinforce": ("rloo", 14),
    "gspo": ("grpo", 14),
    "maxrl": ("grpo", 18),
    "cispo": ("grpo", 30),
    "reinforce_pp": ("grpo", 30),
    "dapo": ("grpo", 60),
    "rft": ("grpo", 44),
    "opd": ("grpo", 42),
    "process_grpo": ("grpo", 50),
    "t1": ("rloo", 45),
    "vapo": ("ppo", 40),
    "oreal": ("grpo", 100),
    "reward_model": ("dpo", 120),
    "prm": ("family/reward_model", 100),
}
JUDGES = ["reward_model", "prm"]  # members that train no policy
LIMITS = {script: ("grpo", limit) for script, limit in BUDGET.items()}
LIMITS |= {f"family/{name}": limit for name, limit in FAMILY.items()}
# What every member of family/ has after its docstring, to the byte. Its two statements are not counted.
BEGINNING = """
import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

"""
PATCHES = ["dr_grpo", "rloo"]  # these two change nothing but the objective; the others have tests of their own
OBJECTIVE = {"advantage", "kl", "loss", "log-probs", "rewards and advantages", "update"}  # sections that may differ


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def code_lines(script: str) -> list[str]:
    """The lines of a script without docstrings, comments and blank lines."""
    text = (ROOT / f"{script}.py").read_text()
    lines, docstrings = text.splitlines(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return [line for row, line in enumerate(lines, 1) if row not in docstrings and line]


def sections(script: str) -> dict[str, str]:
    """The text of a script between its `# --- name ---` markers; a name ends at a colon or at " of "."""
    text = (ROOT / f"{script}.py").read_text()
    text = text[text.index('"""', text.index('"""') + 3) :]  # the docstring is the objective's own
    parts, name = {"top": ""}, "top"
    for line in text.splitlines(keepends=True):
        if line.strip().startswith("# --- "):
            name = line.strip().strip("# -").split(":")[0].split(" of ")[0]
            assert name not in parts
            parts[name] = ""
        parts[name] += line
    return parts


def statements(script: str) -> list[str]:
    """A script in one layout, the interpreter's own, without docstrings and comments: a statement a line."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return [line for line in ast.unparse(tree).splitlines() if line]


def own_lines(script: str, lines) -> list[str]:
    """The lines of a script, without the two by which a member of family/ finds the root."""
    found = lines(script)
    if script.startswith("family/"):
        found.remove("import sys")
        found.remove(next(line for line in found if line.startswith("sys.path.insert(")))
    return found


def changed(script: str, lines) -> list[str]:
    """The lines that a script adds to the one that it is a patch of, or takes away; lines: code_lines or statements."""
    before = own_lines(LIMITS[script][0], lines)
    after = own_lines(script, lines)
    difference = difflib.unified_diff(before, after, n=0, lineterm="")
    return [line for line in difference if line[0] in "+-" and line[:3] not in ("+++", "---")]


@pytest.mark.parametrize("script", LIMITS)
@pytest.mark.parametrize("lines", [code_lines, statements])  # as written, and so that no layout makes it look smaller
def test_a_patch_is_small(script, lines):
    found = changed(script, lines)
    print(f"{script}: {len(found)} changed {lines.__name__} of at most {LIMITS[script][1]}", *found, sep="\n")
    assert 0 < len(found) <= LIMITS[script][1]


def out_and_in(script: str) -> tuple[int, int]:
    """How many lines of code a patch takes away and adds."""
    found = changed(script, code_lines)
    out = sum(line.startswith("-") for line in found)
    return out, len(found) - out


@pytest.mark.parametrize("script", [*BUDGET, *(f"family/{name}" for name in JUDGES)])
def test_the_readme_says_how_large_a_patch_is(script):
    rows = [x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith(f"| [`{script}.py`]")]
    out, added = out_and_in(script)
    words = f": [{out} lines out, {added} in](docs/diffs/{Path(LIMITS[script][0]).name}-{Path(script).name}.html)"
    assert len(rows) == 1 and words in rows[0], (words, rows)


@pytest.mark.parametrize("script", [script for script in LIMITS if Path(script).name not in JUDGES])
def test_the_table_of_objectives_says_how_large_a_patch_is(script):
    rows = [x for x in (ROOT / "docs" / "objectives.md").read_text().splitlines() if x.startswith(f"| [`{script}.py`]")]
    out, added = out_and_in(script)
    words = f"| [{out} out, {added} in](diffs/{LIMITS[script][0]}-{Path(script).name}.html) |"
    assert len(rows) == 1 and words in rows[0], (words, rows)


# --- the family ---


def test_every_file_of_the_family_has_its_limit():
    assert {path.stem for path in (ROOT / "family").glob("*.py")} == FAMILY.keys()


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_has_the_sections_of_its_base_in_their_order(name):
    base, other = sections(FAMILY[name][0]), sections(f"family/{name}")
    assert [section for section in other if section in base] == [section for section in base if section in other]


@pytest.mark.parametrize("name", FAMILY)
def test_the_two_lines_that_find_the_root_are_the_same_to_the_byte(name):
    text = (ROOT / "family" / f"{name}.py").read_text()
    assert text.split('"""\n', 2)[1].startswith(BEGINNING) and text.count("sys.") == BEGINNING.count("sys.")


# --- the siblings ---


@pytest.mark.parametrize("script", PATCHES)
def test_a_sibling_differs_only_in_the_sections_of_its_objective(script):
    base, other = sections("grpo"), sections(script)
    assert [name for name in base if name in other] == list(other), "same sections, same order"
    assert {name for name in base if base[name] != other.get(name, "")} <= OBJECTIVE
    assert {"top", "training", "rollout", "log, evaluate, save"} <= base.keys()


def test_markers_number_the_two_changes_of_dr_grpo():
    text = (ROOT / "dr_grpo.py").read_text().split('"""\n', 2)[-1]
    assert text.count("# [B] (1)") == 1 and text.count("# [B] (2)") == 1


# --- advantages ---


def test_rloo_advantage_leaves_one_out():
    r = double(1, 0, 0, 4, 2, 2)
    by_hand = [1 - 0, 0 - 0.5, 0 - 0.5, 4 - 2, 2 - 3, 2 - 3]
    assert rloo.group_advantages(r, 3).tolist() == pytest.approx(by_hand)


def test_rloo_dr_grpo_and_grpo_advantages_differ_by_factors():
    r = torch.rand(5 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = r - r.view(5, 8).mean(1).repeat_interleave(8)
    assert torch.allclose(dr_grpo.group_advantages(r, 8), centred)
    assert torch.allclose(rloo.group_advantages(r, 8), 8 / 7 * centred)
    std = r.view(5, 8).std(1).repeat_interleave(8)
    assert torch.allclose(grpo.group_advantages(r, 8), centred / (std + 1e-4))


@pytest.mark.parametrize("script", [dr_grpo, rloo])
def test_equal_rewards_give_exactly_zero(script):
    assert torch.equal(script.group_advantages(torch.full((16,), 0.1), 8), torch.zeros(16))


# --- losses ---


def dr_loss(logp, old_logp, advantages, mask, budget, n=None):
    return dr_grpo.policy_loss(logp, old_logp, advantages, mask, n or len(logp), 0.2, 0.2, None, 0.0, budget)[0]


def rloo_loss(logp, old_logp, advantages, mask, n=None):
    return rloo.policy_loss(logp, old_logp, advantages, mask, n or len(logp), 0.2, 0.2)[0]


def test_dr_grpo_weights_every_token_alike():
    # Lengths 4 and 7, advantage 2, C = 7: every token weighs 2/7, so a response twice as long weighs twice as much.
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    logp = torch.zeros(2, 7, dtype=torch.float64, requires_grad=True)
    loss = dr_loss(logp, logp.detach(), double(2, 2), mask, budget=7)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 * 4 / 7 + 2) / 2)
    assert torch.allclose(-logp.grad, mask * double(2 / 7 / 2))


def test_rloo_on_policy_is_the_plain_policy_gradient_of_whole_responses():
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    logp = torch.zeros(2, 7, dtype=torch.float64, requires_grad=True)
    rloo_loss(logp, logp.detach(), double(2, -1), mask).backward()
    assert torch.allclose(-logp.grad, mask * double(2, -1)[:, None] / 2)


def test_rloo_ratio_is_of_the_whole_response():
    logp = double(math.log(2), math.log(0.5), 5.0).view(1, 3)  # ratios 2 and 1/2, their product 1; then padding
    mask = torch.tensor([[True, True, False]])
    assert rloo_loss(logp, torch.zeros_like(logp), double(1.0), mask).item() == pytest.approx(-1.0)
    logp = double(math.log(2), math.log(2), 0.0).view(1, 3).requires_grad_()  # product 4: clipped at 1.2 if A > 0
    for advantage, value, gradient in ((1.0, -1.2, 0.0), (-1.0, 4.0, 4.0)):
        loss = rloo_loss(logp, torch.zeros(1, 3, dtype=torch.float64), double(advantage), mask)
        (g,) = torch.autograd.grad(loss, logp)
        assert loss.item() == pytest.approx(value) and g.flatten().tolist() == pytest.approx([gradient, gradient, 0])


@pytest.mark.parametrize("loss", [lambda *args: dr_loss(*args, budget=6), rloo_loss])
def test_gradients_against_finite_differences_and_in_parts(loss):
    g = torch.Generator().manual_seed(3)
    logp = (-torch.rand(4, 5, dtype=torch.float64, generator=g)).requires_grad_()
    old = logp.detach() + 0.05 * torch.randn(4, 5, dtype=torch.float64, generator=g)
    a = torch.randn(4, dtype=torch.float64, generator=g)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    assert torch.autograd.gradcheck(lambda x: loss(x, old, a, mask), logp)
    whole = loss(logp, old, a, mask)
    parts = [slice(0, 1), slice(1, 4)]
    shares = [loss(logp[p], old[p], a[p], mask[p]) * len(a[p]) / 4 for p in parts]
    assert sum(shares).item() == pytest.approx(whole.item(), abs=1e-12)


def test_rloo_is_unbiased_and_dr_grpo_too_up_to_its_factor():
    """All groups of 2 among all 9 responses of 2 tokens, in proportion to their probability: nothing is sampled."""
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    responses = torch.tensor(list(itertools.product(range(3), repeat=2)))  # [9, 2]
    table = logits.log_softmax(-1)
    logp = torch.stack([table[0, responses[:, 0]], table[1 + responses[:, 0], responses[:, 1]]], dim=1)  # [9, 2]
    p = logp.sum(1).exp()
    reward = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (exact,) = torch.autograd.grad((p * reward).sum(), logits, retain_graph=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    for script, loss, factor in ((rloo, rloo_loss, 1.0), (dr_grpo, lambda *args: dr_loss(*args, budget=5), 1 / 2 / 5)):
        expected = 0.0
        for i, j in itertools.product(range(9), repeat=2):
            a, group = script.group_advantages(reward[[i, j]], 2), logp[[i, j]]
            expected = expected - (p[i] * p[j]).detach() * loss(group, group.detach(), a, mask)
        (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
        assert torch.allclose(gradient, exact * factor, atol=1e-12)


def test_on_the_tiny_model_rloo_and_dr_grpo_have_the_same_direction(tiny):
    model = copy.deepcopy(tiny[0].model).double()
    prompts = [e["prompt_ids"] for e in encode_prompts(load_task("arithmetic").train[:4], tiny[1], "plain", 64)]
    batch = make_sampler(*tiny).generate(prompts, n=8, temperature=1.0, seed=0)
    reward = torch.randint(0, 2, (32,), generator=torch.Generator().manual_seed(0)).double()

    def gradient(script, loss):
        model.zero_grad()
        logp, _ = token_logprobs(model, batch, 1.0)
        loss(logp, logp.detach(), script.group_advantages(reward, 8), batch.response_mask).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    a, b = gradient(rloo, rloo_loss), gradient(dr_grpo, lambda *args: dr_loss(*args, budget=64))
    assert (a - b * 64 * 8 / 7).norm() < 1e-6 * a.norm() and a.norm() > 0


def test_where_the_objectives_agree_and_where_they_do_not(tiny):
    """On-policy and without KL, on real gradients: Dr. GRPO, RLOO and Kimi point where REINFORCE with a baseline does.

    GRPO (1/|o|, std) and PPO (whitening; here V = 0) point elsewhere: every algorithm is its own.
    """
    model = copy.deepcopy(tiny[0].model).double()
    prompts = [e["prompt_ids"] for e in encode_prompts(load_task("arithmetic").train[:4], tiny[1], "plain", 64)]
    batch = make_sampler(*tiny).generate(prompts, n=8, temperature=1.0, seed=1)
    reward = double(*([1, 0, 0, 0, 0, 0, 0, 0] + [1, 1, 1, 1, 0, 0, 0, 0] + [1] * 7 + [0] + [0] * 8))
    mask, n = batch.response_mask, 32

    def gradient(loss):
        model.zero_grad()
        ids, attention = batch.input_ids, batch.attention_mask
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=attention, position_ids=positions).logits  # [B, L + T, V]
        logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -mask.shape[1] :]
        loss(torch.where(mask, logp, 0)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    baseline = reward.view(4, 8).mean(1).repeat_interleave(8)
    whitened = ppo.whiten(
        ppo.gae(ppo.token_rewards(reward, 0 * mask, mask, 0.0), 0.0 * mask, mask, 1, 1), mask, lambda x: x
    )
    gradients = {
        "reinforce": gradient(lambda logp: -((reward - baseline)[:, None] * logp).sum() / n),
        "dr_grpo": gradient(lambda x: dr_loss(x, x.detach(), dr_grpo.group_advantages(reward, 8), mask, budget=64)),
        "rloo": gradient(lambda x: rloo_loss(x, x.detach(), rloo.group_advantages(reward, 8), mask)),
        "kimi": gradient(
            lambda x: kimi_k15.policy_loss(x, x.detach(), kimi_k15.group_advantages(reward, 8), mask, n, 0.1)[0]
        ),
        "grpo": gradient(
            lambda x: grpo.policy_loss(x, x.detach(), grpo.group_advantages(reward, 8), mask, n, 0.2, 0.2, None, 0.0)[0]
        ),
        "ppo": gradient(lambda x: ppo.policy_loss(x, x.detach(), whitened, mask, mask.sum(), 0.2, 0.2)[0]),
    }
    factor = {"reinforce": 1, "dr_grpo": 1 / 64, "rloo": 8 / 7, "kimi": 1}
    for name, expected in factor.items():
        assert (gradients[name] - expected * gradients["reinforce"]).norm() < 1e-6 * gradients[name].norm(), name
    for one, other in itertools.combinations(("grpo", "ppo", "reinforce"), 2):
        assert torch.cosine_similarity(gradients[one], gradients[other], dim=0) < 0.97, (one, other)


# --- the scripts ---


def test_the_kl_of_rloo_lowers_the_reward_by_its_sum_over_tokens(tmp_path, monkeypatch):
    seen, advantages = [], rloo.group_advantages
    answers = iter([-1.0, -1.5])  # log pi_old, then log pi_ref, of every token: k1 is 0.5

    def logprobs(policy, batch, temperature, budget):
        seen.append(batch)
        return next(answers) * batch.response_mask

    def record(rewards, group_size):
        seen.append(rewards)
        return advantages(rewards, group_size)

    monkeypatch.setattr(rloo, "batch_logprobs", logprobs)
    monkeypatch.setattr(rloo, "group_advantages", record)
    flags = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 1, "model": str(ROOT / "tiny")}
    rloo.main(rloo.Config(out=str(tmp_path / "run"), beta=0.1, **flags))
    batch, _, rewards = seen
    assert torch.allclose(rewards, batch["rewards"] - 0.1 * 0.5 * batch.lengths)
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]["kl"] == pytest.approx(0.5)


@pytest.mark.parametrize("script", PATCHES)
def test_any_microbatch_size_gives_the_same_run(tmp_path, monkeypatch, script):
    module = importlib.import_module(script)
    flags = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 1, "model": str(ROOT / "tiny")}
    for budget in (1, 10**6):
        module.main(module.Config(out=str(tmp_path / str(budget)), tokens_per_microbatch=budget, epochs=2, **flags))
    one, other = (read_jsonl(tmp_path / str(budget) / "metrics.jsonl")[1] for budget in (1, 10**6))
    for name in ("loss", "grad_norm", "kl", "entropy", "ratio_max", "reward"):
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("script", PATCHES)
def test_accuracy_rises(tmp_path, script):
    run_script(f"{script}.py", "--steps", 25, "--eval-every", 0, "--out", tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["eval_pass@1"] > records[0]["eval_pass@1"] + 0.2
    assert records[-1]["eval_format"] > records[0]["eval_format"] + 0.2


@pytest.mark.parametrize("script", ["grpo", "dr_grpo", "rloo", "kimi_k15", "ppo"])
def test_tis_weighs_by_how_far_the_sampler_is_off(tmp_path, monkeypatch, script):
    """The weight is 1 where sampler and trainer agree, pi_old/pi_sampler where they do not, and at most the cap."""
    module, flags = importlib.import_module(script), {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8}
    flags |= {"steps": 1, "model": str(ROOT / "tiny"), "epochs": 1, "eval_every": 0} | (
        {} if script == "kimi_k15" else {"beta": 0.0}
    )
    make, shift = module.make_sampler, 0.0

    def make_shifted(*arguments):
        sampler = make(*arguments)
        generate = sampler.generate

        def generate_shifted(*arguments, **named):
            batch = generate(*arguments, **named)
            batch.sampler_logp += shift * batch.response_mask
            return batch

        sampler.generate = generate_shifted
        return sampler

    def grad_norm(name, tis):
        module.main(module.Config(out=str(tmp_path / name), tis=tis, **flags))
        return read_jsonl(tmp_path / name / "metrics.jsonl")[1]["grad_norm"]

    monkeypatch.setattr(module, "make_sampler", make_shifted)
    plain = grad_norm("plain", 0.0)
    assert plain > 0 and grad_norm("agree", 2.0) == pytest.approx(plain, rel=1e-4)
    shift = -5.0  # the sampler's probabilities are too small: every weight is at the cap
    assert grad_norm("capped", 2.0) == pytest.approx(2 * plain, rel=1e-4)
    assert grad_norm("off", 0.0) == pytest.approx(plain, rel=1e-6)
    if script in ("grpo", "dr_grpo", "ppo"):  # a weight per token; rloo and kimi have one per response, a product
        shift = 0.1
        assert grad_norm("weighed", 2.0) == pytest.approx(math.exp(-0.1) * plain, rel=1e-4)


COSTS = {  # script -> passes over a rollout (DPO: over its pairs): forward without and with gradient, and backward
    "grpo": {"policy": (0, 1, 1), "reference": (1, 0, 0)},
    "dr_grpo": {"policy": (0, 1, 1), "reference": (1, 0, 0)},
    "rloo": {"policy": (1, 1, 1), "reference": (1, 0, 0)},
    "kimi_k15": {"policy": (1, 2, 2)},
    "ppo": {"policy": (1, 2, 2), "reference": (1, 0, 0), "value": (1, 2, 2)},
    "dpo": {"policy": (0, 1, 1), "reference": (1, 0, 0)},  # the reference once per pair in all: while pairs are new
    "family/dpo_norm": {"policy": (0, 1, 1), "reference": (1, 0, 0)},
    "family/ipo": {"policy": (0, 1, 1), "reference": (1, 0, 0)},
    "family/simpo": {"policy": (0, 1, 1)},
    "family/reinforce": {"policy": (1, 1, 1), "reference": (1, 0, 0)},
    "family/gspo": {"policy": (1, 1, 1)},
    "family/maxrl": {"policy": (0, 1, 1), "reference": (1, 0, 0)},
    "family/cispo": {"policy": (0, 1, 1)},
    "family/reinforce_pp": {"policy": (0, 1, 1), "reference": (1, 0, 0)},
    "family/dapo": {"policy": (0, 1, 1)},
    "family/rft": {"policy": (0, 1, 1)},
    "family/opd": {"policy": (1, 1, 1), "teacher": (1, 0, 0)},
    "family/process_grpo": {"policy": (0, 1, 1), "reference": (1, 0, 0)},
    "family/t1": {"policy": (1, 1, 1), "reference": (1, 0, 0)},
    "family/vapo": {"policy": (1, 2, 2), "value": (1, 2, 2)},
    "family/oreal": {"policy": (0, 1, 1), "reference": (1, 0, 0), "judge": (0, 1, 1)},
}
IN_CURVES = ["grpo", "dr_grpo", "rloo", "kimi_k15", "ppo", "dpo", "family/simpo"]  # in the table of docs/curves.md


def family_slow(scripts: list[str], but: tuple[str, ...] = ()) -> list:
    """These scripts as parameters of a test; the members of the family are slow, but for these."""
    marked = []
    for script in scripts:
        slow = script.startswith("family") and script not in but
        marked.append(pytest.param(script, marks=pytest.mark.slow) if slow else script)
    return marked


@pytest.mark.parametrize("script", family_slow(list(COSTS), but=("family/gspo", "family/opd", "family/oreal")))
def test_models_and_passes_are_those_of_the_tables(tmp_path, monkeypatch, script):
    module = importlib.import_module(script.replace("/", "."))
    models = {}
    passes = collections.defaultdict(lambda: [0, 0, 0])

    def watch(role, network):
        """Count what goes through a Policy or a Value: every forward of the update must."""

        def forward(module, arguments, output):
            passes[role][int(torch.is_grad_enabled())] += 1

        def backward(parameter):
            passes[role][2] += 1

        models[role] = network
        body = network.body if role in ("value", "judge") else network.model.base_model
        network.register_forward_hook(forward)
        norm = next(parameter for name, parameter in body.named_parameters() if name == "norm.weight")
        if norm.requires_grad:
            norm.register_post_accumulate_grad_hook(backward)
        return network

    load_policy = module.make_policy
    make_reference = logprobs.Policy.reference

    def load(*arguments):
        policy, tokenizer = load_policy(*arguments)
        return watch("policy", policy), tokenizer

    monkeypatch.setattr(module, "make_policy", load)
    monkeypatch.setattr(logprobs.Policy, "reference", lambda policy: watch("reference", make_reference(policy)))
    expected = COSTS[script]
    second = "judge" if "judge" in expected else "value"  # the role of the second network that is trained
    if second in expected:
        load_value = module.make_value
        monkeypatch.setattr(module, "make_value", lambda *arguments: watch(second, load_value(*arguments)))
    flags = {"eval_prompts": 8, "steps": 2, "model": str(ROOT / "tiny"), "tokens_per_microbatch": 10**6}
    fields = module.Config.__dataclass_fields__
    of_pairs = "pairs_per_step" in fields
    flags |= {"pair_prompts": 16} if of_pairs else {"prompts_per_step": 4, "group_size": 4}
    flags |= {name: 0 for name in ("value_warmup", "reward_warmup") if name in fields}
    if "teacher" in expected:
        load_teacher = module.load_teacher
        monkeypatch.setattr(module, "load_teacher", lambda *arguments: watch("teacher", load_teacher(*arguments)))
        flags |= {"teacher": str(ROOT / "tiny")}
    module.main(module.Config(out=str(tmp_path / "run"), eval_every=0, **flags))
    passes["policy"][0] -= 1  # the sampler has compared its cache with the policy
    if of_pairs:  # before and after, the held-out pairs
        passes["policy"][0] -= 2
    if of_pairs and "reference" in expected:  # held-out pairs once; of 16 pairs at most once too: all are drawn at once
        assert passes["reference"] == [1 + 1, 0, 0], "the second step has no new pair, and no pass"
    if "value" in expected:  # the values of the responses in held_out.jsonl, before and after
        passes["value"][0] -= 2
    parts = {"family/gspo": 4, "ppo": 2, "family/vapo": 2}.get(script, 1)  # minibatches; each has its own passes
    found = {role: [n, m / parts, k / parts] for role, (n, m, k) in passes.items()}
    assert found == {role: [2 * n for n in counts] for role, counts in expected.items()}, "in two steps"
    assert models.keys() == expected.keys()
    n, m, k = [sum(counts[i] for counts in expected.values()) for i in range(3)]
    if script in IN_CURVES:
        row = f"| `{script}.py` | {len(models)} | {n + m} | {k} |"
        assert row in (ROOT / "docs" / "curves.md").read_text(), row
    rows = [x for x in (ROOT / "docs" / "objectives.md").read_text().splitlines() if x.startswith(f"| [`{script}.py`]")]
    assert f"| {n}, {m}, {k} |" in rows[0]
    networks = rows[0].split(" | ")[6]
    assert networks == (", ".join(role for role in expected if role != "policy") or "none")
