"""plumbing/run.py and checkpoint.py: what a run says, logs and refuses."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_jsonl

import grpo
import ppo
from logprobs import load_policy
from plumbing import run
from plumbing.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from rollout import HFSampler

SMALL = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 1, "model": str(ROOT / "tiny")}


def model_of(parameters: int):
    """Something that has so many parameters, and no memory."""
    weight = torch.empty(parameters, device="meta")
    return SimpleNamespace(parameters=lambda: [weight], device=torch.device("cpu"))


def test_a_large_model_on_a_cpu_says_what_an_evaluation_costs(capsys, monkeypatch):
    monkeypatch.setattr(run, "matrix_rate", lambda: 1e9)
    run.announce_cost(model_of(10**8), [[1] * 10] * 4, responses=3, max_new_tokens=100)
    said = capsys.readouterr().out
    assert "4 questions x 3 responses of at most 100 tokens with 100 M parameters" in said
    tokens = 4 * 3 * 100 + 2 * 4 * 10  # two prompts of each question: for the greedy response and for the samples
    assert f"take {2e8 * tokens / 1e9 / 60:.0f} minutes or more" in said and "--eval-samples" in said
    run.announce_cost(model_of(10**6), [[1] * 10] * 4, responses=3, max_new_tokens=100)
    assert capsys.readouterr().out == "", "nothing of a small one"
    assert run.matrix_rate() > 0


def test_eval_samples_is_the_number_of_samples(tmp_path):
    grpo.main(grpo.Config(out=str(tmp_path / "run"), eval_samples=2, **SMALL))
    before = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert "eval_pass@2" in before and "eval_pass@8" not in before


def test_every_evaluation_shows_a_bar(tmp_path, capsys):
    grpo.main(grpo.Config(out=str(tmp_path / "run"), **SMALL))
    said, shown = capsys.readouterr()
    assert "evaluation after step 0" in shown and "evaluation after step 1, greedy" in shown
    number = r"[01]\.\d\d"
    assert re.search(
        rf"held out, after step 0: greedy {number}, one sample {number}, any of 8 {number}, format {number}, .*\n"
        r"    one of the samples: '3\+8\+3\+2=' -> '",
        said,
    )


def test_maxima_and_means_keep_nan(tmp_path):
    one = run.Run(grpo.Config(out=str(tmp_path / "run"), **SMALL))
    mask = torch.ones(1, 2, dtype=torch.bool)
    for values in ([1.0, 2.0], [math.nan, 0.5], [3.0, 3.0]):
        one.collect(mask, torch.tensor(0.5), ratio_max=torch.tensor([values]), kl=torch.tensor([[1.0, 2.0]]))
    record = one.collected(updates=3)
    assert math.isnan(record["ratio_max"]) and record["kl"] == 1.5 and record["loss"] == 0.5 and record["tokens"] == 6


# --- what is not finite ---


def refusal(script, **flags) -> str:
    """What a run says in one line when it refuses."""
    with pytest.raises(SystemExit) as error:
        script.main(script.Config(**SMALL | flags))
    assert error.value.code == 2 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("script", "good"), [(grpo, 1), (ppo, 0)])
def test_a_step_too_large_ends_the_run_and_leaves_the_last_good_checkpoint(tmp_path, script, good):
    """The first update of such a size is finite. GRPO makes no other in step 1, PPO makes four."""
    out = tmp_path / "run"
    said = refusal(script, out=str(out), lr=1e30, steps=4, save_every=1, eval_every=0)
    assert said.startswith(f"step {good + 1}: the gradient norm is nan; nothing of this step is saved")
    assert str(out / "not_finite.jsonl") in said and said.endswith("a lower --lr is the usual remedy")
    lines = read_jsonl(out / "not_finite.jsonl")
    assert [line["step"] for line in lines] == [good + 1] * 16
    assert all(isinstance(line["response"], str) and "rewards" in line for line in lines)
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == list(range(good + 1))
    assert (out / "checkpoint.pt").exists() == (out / "model").exists() == bool(good)
    if good:
        saved = torch.load(out / "checkpoint.pt", weights_only=True)
        assert saved["step"] == good and all(x.isfinite().all() for x in saved["policy"].values())
        load_policy(str(out / "model"), torch.device("cpu"))


def watch_policy(monkeypatch, script) -> tuple[list, list]:
    """The policies that a script loads from now on, and one item for each push to the sampler."""
    policies, pushes = [], []
    load = script.make_policy
    push = HFSampler.push

    def load_watched(*arguments):
        policy, tokenizer = load(*arguments)
        policies.append(policy)
        return policy, tokenizer

    monkeypatch.setattr(script, "make_policy", load_watched)
    monkeypatch.setattr(HFSampler, "push", lambda self, policy: pushes.append(1) or push(self, policy))
    return policies, pushes


def test_a_weight_that_is_nan_stops_the_run_before_it_is_pushed_or_saved(tmp_path, monkeypatch):
    (_, pushes), step = watch_policy(monkeypatch, grpo), torch.optim.AdamW.step
    steps = []

    def broken(self, *arguments):
        step(self, *arguments)
        steps.append(1)
        if len(steps) == 2:
            self.param_groups[0]["params"][3].data.view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    out = tmp_path / "run"
    said = refusal(grpo, out=str(out), steps=3, save_every=1)
    assert said.startswith("step 2: weights of the policy are not finite")
    assert len(pushes) == 2, "before the first step and after it"
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 1 and all(x.isfinite().all() for x in saved["policy"].values())
    assert len(read_jsonl(out / "not_finite.jsonl")) == 16


@pytest.mark.parametrize("script", [grpo, ppo])
def test_a_loss_that_is_nan_stops_the_run_before_a_weight_changes(tmp_path, monkeypatch, script):
    (policies, pushes), policy_loss = watch_policy(monkeypatch, script), script.policy_loss

    def broken(*arguments):
        loss, stats = policy_loss(*arguments)
        return loss * math.nan, stats

    monkeypatch.setattr(script, "policy_loss", broken)
    said = refusal(script, out=str(tmp_path / "run"))
    assert said.startswith("step 1: the loss is nan") and len(pushes) == 1
    before, _ = load_policy(str(ROOT / "tiny"), torch.device("cpu"))
    for p, q in zip(before.parameters(), policies[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_value_network_that_is_not_finite_is_named(tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def broken(self, *arguments):
        step(self, *arguments)
        self.param_groups[1]["params"][-1].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    said = refusal(ppo, out=str(tmp_path / "run"), epochs=1, minibatches=1)
    assert said.startswith("step 1: weights of the value are not finite")


# --- checkpoints and processes ---


def test_a_checkpoint_of_other_data_or_of_another_version_is_refused(tmp_path):
    layer = torch.nn.Linear(2, 2)
    mine = fingerprint([{"question": "1+1="}])
    assert mine == fingerprint([{"question": "1+1="}]) != fingerprint([{"question": "1+2="}])
    save_checkpoint(tmp_path, 3, {"layer": layer}, mine, 1)
    other = torch.nn.Linear(2, 2)
    assert load_checkpoint(tmp_path, {"layer": other}, mine, 1) == 3
    assert torch.equal(other.weight, layer.weight)
    with pytest.raises(SystemExit, match="its data has changed"):
        load_checkpoint(tmp_path, {"layer": other}, fingerprint([]), 1)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"format": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="another version"):
        load_checkpoint(tmp_path, {"layer": other}, mine, 1)


def test_more_processes_than_held_out_questions_is_one_clear_line(tmp_path, monkeypatch):
    one = run.Run(grpo.Config(out=str(tmp_path / "run"), **SMALL))
    with pytest.raises(SystemExit, match="0 held-out questions: each of 1 processes needs one"):
        one.evaluate(0, None, [])
