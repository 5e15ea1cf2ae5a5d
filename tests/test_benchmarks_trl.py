"""benchmarks/trl.py without TRL: our side, the work that both sides get, the clock and the table."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_sampler

import rewards
from benchmarks import ours, trl
from logprobs import load_policy
from plumbing.run import Run
from rollout import HFSampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    ours.make_work(path)
    return path


@pytest.fixture
def put_back(monkeypatch):
    """What our side changes in the scripts' modules is as before after the test."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    monkeypatch.setattr(HFSampler, "generate", HFSampler.generate)
    monkeypatch.setattr(Run, "log", Run.log)
    monkeypatch.setattr(Run, "steps", Run.steps)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def measure(tmp_path: Path, **job) -> dict:
    """What a job of our side measures, in this process."""
    job |= {"out": str(tmp_path / "run"), "result": str(tmp_path / "result.json"), "started": 0.0}
    with pytest.raises(SystemExit):  # is how it ends
        ours.main(job)
    return json.loads((tmp_path / "result.json").read_text())


# --- our side ---


@pytest.mark.parametrize("case", trl.GOALS)
def test_our_side_of_every_case_gives_sane_numbers(case, folder, tmp_path, put_back):
    result = measure(tmp_path, case=case, size="small", side="ours", folder=str(folder), warmup=0, steps=2)
    assert result["cpu_ms"] > 0
    assert result["wall_ms"] > 0
    assert len(result["each_cpu_ms"]) == 2
    assert result["peak_mb"] > 100
    if case == "dpo":
        assert result["rollout_cpu_ms"] == 0
        assert 8 * 128 < result["tokens"] < 32 * 128
    else:
        assert 0 < result["rollout_cpu_ms"] < result["cpu_ms"], "a part of the step"
    if case in ("grpo-a", "rloo-a", "ppo-a"):
        assert result["tokens"] == 64 * 32
    if case in ("grpo-b", "rloo-b", "ppo-b"):
        assert 64 < result["tokens"] < 64 * 32
    if case in ("grpo-a", "rloo-a"):
        assert result["informative"] == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists(), "no checkpoint is made, and so none is timed"


def test_profile_counts_every_product_of_matrices(folder, tmp_path, put_back):
    found = measure(tmp_path, case="grpo-a", size="small", side="profile", folder=str(folder), warmup=1, steps=1)
    weights = 4 * (4 * 128**2 + 3 * 128 * 512) + 17 * 128  # of the layers and of the LM head
    decode = 8 * 5 + 64 * 31 + 8  # tokens, once forward
    update = 8 * 6 + 64 * 31  # tokens, once forward and twice backward
    assert found["gflop"] == pytest.approx(2e-9 * weights * (decode + 3 * update), rel=0.02)
    assert found.keys() == {"products", "attention", "other", "python", "gflop", "gflops"}
    for name in ("products", "attention", "other", "gflops"):  # python, a difference of two clocks, may be negative
        assert found[name] > 0, name


def test_operations_count_as_what_they_are():
    for name in ("aten::mm", "aten::addmm", "aten::bmm"):
        assert ours.kind_of(name) == "products"
    for name in ("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention_for_cpu_backward"):
        assert ours.kind_of(name) == "attention"
    for name in ("aten::matmul", "aten::mul", "aten::_log_softmax"):  # matmul is itself in no time: it calls mm
        assert ours.kind_of(name) == "other"


def test_clock_tells_the_rollout_from_the_step_and_leaves_out_the_warm_up(tmp_path, monkeypatch):
    clocks = {"cpu": 0.0, "wall": 0.0}  # seconds

    def work(seconds):  # half of the time another process has the core
        clocks["cpu"] += seconds
        clocks["wall"] += 2 * seconds
        return seconds

    monkeypatch.setattr(ours, "now", lambda: ours.Seconds(**clocks))
    clock = ours.Clock({"warmup": 1, "steps": 3, "started": 0.0, "result": str(tmp_path / "result.json")})
    seen = []
    rollout = clock.timed(work, look=seen.append)
    with pytest.raises(SystemExit):
        for seconds in (100.0, 1.0, 2.0, 9.0):
            rollout(seconds)
            rollout(seconds)
            work(seconds)
            clock.step(tokens=10 * seconds)
    assert seen == [100.0, 100.0, 1.0, 1.0, 2.0, 2.0, 9.0, 9.0]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["each_cpu_ms"] == [3000, 6000, 27000]
    assert (result["cpu_ms"], result["wall_ms"]) == (6000, 12000)
    assert (result["rollout_cpu_ms"], result["rollout_wall_ms"]) == (4000, 8000)
    assert result["tokens"] == 40


# --- the work ---


@pytest.mark.parametrize("size, millions", [("small", 1.05), ("large", 4.2)])
@pytest.mark.parametrize("case, ends", [("a", False), ("b", True)])
def test_only_model_b_ends_by_itself_and_none_writes_padding(folder, size, millions, case, ends):
    policy, tokenizer = load_policy(str(folder / f"{size}-{case}"), torch.device("cpu"))
    assert policy.model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)
    assert len(tokenizer) == 17
    sampler = make_sampler(policy, tokenizer, max_new_tokens=32)
    batch = sampler.generate([tokenizer.encode("12+34=")], n=64, temperature=1.0, seed=0)
    assert ("stop" in batch.finish_reasons) == ends
    assert not (batch.response_ids[batch.response_mask] == tokenizer.pad_token_id).any()


def test_rewards():
    assert ours.digit("+=73", {"answer": "117"}) == 1
    assert ours.digit("17", {"answer": "117"}) == 0
    assert ours.digit("+", {"answer": "117"}) == 0
    assert len({ours.spread(str(i), {}) for i in range(1000)}) == 1000


# --- the table ---


def one_run(side: str, number: int, ms: float) -> dict:
    """A run of grpo-b as in a record."""
    return {
        "case": "grpo-b",
        "size": "small",
        "round": number,
        "side": side,
        "cpu_ms": ms,
        "wall_ms": ms,
        "rollout_cpu_ms": ms / 4,
        "informative": 0.5,
        "tokens": 900,
        "peak_mb": 500,
        "first_step_s": 5.55,
    }


def test_table_of_a_record():
    record = {"command": "c", "date": "d", "cpu": "p", "steps": 3, "rounds": 3, "results": [], "versions": {}}
    for side, milliseconds in (("ours", [100, 80, 120]), ("trl", [210, 200, 190])):
        for number, ms in enumerate(milliseconds):
            record["results"].append(one_run(side, number, ms))
    page = trl.page(record)
    assert "| grpo-b | 100 | 200 | **2.00** (1.58 to 2.50) | 2.00 | 100 | 200 | 2.00 (1.58 to 2.50) |" in page
    assert "| grpo-b | 25 | 50 | 75 | 150 | 900 | 900 | 0.50 | 0.50 | 500 | 500 | 5.5 | 5.5 |" in page
    assert "4.2 M" not in page, "nothing was measured there"
    parts = {"products": 50, "attention": 10, "other": 30, "python": 20, "gflop": 4, "gflops": 100}
    record["profiles"] = [{"case": "grpo-b", "size": "small", "side": "profile"} | parts]
    assert "| grpo-b | 50 | 10 | 30 | 20 | 4.0 | 100 | 40 | 5.00 |" in trl.page(record)
    assert "| grpo-b | 2.00 |  | 2.00 |" in trl.summary(record)


def test_committed_table_is_that_of_the_committed_record():
    record = json.loads(trl.JSON.read_text())
    assert trl.JSON.with_suffix(".md").read_text() == trl.page(record)
    assert {result["case"] for result in record["results"]} == set(trl.GOALS)
    assert {profile["case"] for profile in record["profiles"]} == set(trl.GOALS)
    assert trl.summary(record) in (ROOT / "docs" / "speed.md").read_text()
    for folder in (Path.home(), ROOT):
        assert str(folder) not in trl.JSON.read_text()
