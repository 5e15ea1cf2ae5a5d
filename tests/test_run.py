"""plumbing/run.py and checkpoint.py: what a run says, logs and refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_jsonl

import grpo
from plumbing import run
from plumbing.checkpoint import fingerprint, load_checkpoint, save_checkpoint

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
    shown = capsys.readouterr().err
    assert "evaluation after step 0" in shown and "evaluation after step 1, greedy" in shown


def test_maxima_and_means_keep_nan(tmp_path):
    one = run.Run(grpo.Config(out=str(tmp_path / "run"), **SMALL))
    mask = torch.ones(1, 2, dtype=torch.bool)
    for values in ([1.0, 2.0], [math.nan, 0.5], [3.0, 3.0]):
        one.collect(mask, torch.tensor(0.5), ratio_max=torch.tensor([values]), kl=torch.tensor([[1.0, 2.0]]))
    record = one.collected(updates=3)
    assert math.isnan(record["ratio_max"]) and record["kl"] == 1.5 and record["loss"] == 0.5 and record["tokens"] == 6


def test_a_checkpoint_of_other_data_or_of_another_version_is_refused(tmp_path):
    layer = torch.nn.Linear(2, 2)
    mine = fingerprint([{"question": "1+1="}])
    assert mine == fingerprint([{"question": "1+1="}]) != fingerprint([{"question": "1+2="}])
    save_checkpoint(tmp_path, 3, {"layer": layer}, mine)
    other = torch.nn.Linear(2, 2)
    assert load_checkpoint(tmp_path, {"layer": other}, mine) == 3
    assert torch.equal(other.weight, layer.weight)
    with pytest.raises(SystemExit, match="its data has changed"):
        load_checkpoint(tmp_path, {"layer": other}, fingerprint([]))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"format": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="another version"):
        load_checkpoint(tmp_path, {"layer": other}, mine)


def test_more_processes_than_held_out_questions_is_one_clear_line(tmp_path, monkeypatch):
    one = run.Run(grpo.Config(out=str(tmp_path / "run"), **SMALL))
    with pytest.raises(SystemExit, match="0 held-out questions: each of 1 processes needs one"):
        one.evaluate(0, None, [])
