"""benchmarks/trl.py without TRL: our side, the work that both sides get, and the table."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_sampler

import rewards
import rollout
import run
from benchmarks import ours, trl
from rollout import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    ours.make_work(path)
    return path


@pytest.fixture
def put_back(monkeypatch):
    """What our side changes in the scripts' modules is as before after the test."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    monkeypatch.setattr(rollout.HFSampler, "generate", rollout.HFSampler.generate)
    for name in ("log", "steps"):
        monkeypatch.setattr(run.Run, name, getattr(run.Run, name))
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("case", trl.GOALS)
def test_our_side_of_every_case_gives_sane_numbers(case, folder, tmp_path, put_back):
    job = {
        "case": case,
        "size": "small",
        "side": "ours",
        "folder": str(folder),
        "warmup": 0,
        "steps": 2,
        "started": 0.0,
    }
    with pytest.raises(SystemExit):
        ours.main(job | {"out": str(tmp_path / "run"), "result": str(tmp_path / "result.json")})
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["cpu_ms"] < 60e3 and 0 < result["wall_ms"]
    assert len(result["each_cpu_ms"]) == 2
    assert result["peak_mb"] > 100
    if case == "dpo":
        assert result["rollout_cpu_ms"] == 0
        assert 8 * 128 < result["tokens"] < 32 * 128
    else:
        assert 0 < result["rollout_cpu_ms"] < result["cpu_ms"]
        assert result["tokens"] == 64 * 32 if case.endswith("a") else 64 < result["tokens"] < 64 * 32
    assert not (tmp_path / "run" / "checkpoint.pt").exists(), "no checkpoint is made, and so none is timed"
    if case in ("grpo-a", "rloo-a"):
        assert result["informative"] == 1


def test_only_model_b_ends_by_itself_and_none_writes_padding(folder):
    for size, millions in (("small", 1.05), ("large", 4.2)):
        for case, ends in (("a", False), ("b", True)):
            policy, tokenizer = load_model(str(folder / f"{size}-{case}"), torch.device("cpu"))
            assert policy.num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)
            assert len(tokenizer) == 17
            sampler = make_sampler(policy, tokenizer, max_new_tokens=32)
            batch = sampler.generate([tokenizer.encode("12+34=")], n=64, temperature=1.0, seed=0)
            assert ("stop" in batch.finish_reasons) == ends
            assert not (batch.input_ids[:, 6:][batch.response_mask] == tokenizer.pad_token_id).any()


def test_rewards():
    assert ours.digit("+=73", {"answer": "117"}) == 1
    assert ours.digit("17", {"answer": "117"}) == ours.digit("+", {"answer": "117"}) == 0
    assert len({ours.spread(str(i), {}) for i in range(1000)}) == 1000


def test_table_of_a_record():
    def one(side, number, ms):
        place = {"case": "grpo-b", "size": "small", "round": number, "side": side}
        times = {f"{name}_ms": ms for name in ("cpu", "wall")} | {"rollout_cpu_ms": ms / 4, "informative": 0.5}
        return place | times | {"tokens": 900, "peak_mb": 500, "first_step_s": 5.55}

    record = {"command": "c", "date": "d", "cpu": "p", "steps": 3, "rounds": 3, "results": [], "versions": {}}
    for side, milliseconds in (("ours", [100, 80, 120]), ("trl", [210, 200, 190])):
        record["results"] += [one(side, i, ms) for i, ms in enumerate(milliseconds)]
    page = trl.page(record)
    assert "| grpo-b | 100 | 200 | **2.00** (1.58 to 2.50) | 2.00 | 100 | 200 | 2.00 (1.58 to 2.50) |" in page
    assert "| grpo-b | 25 | 50 | 75 | 150 | 900 | 900 | 0.50 | 0.50 | 500 | 500 | 5.5 | 5.5 |" in page
    assert "4.2 M" not in page, "nothing was measured there"
    parts = {"products": 50, "attention": 10, "other": 30, "python": 20, "gflop": 4, "gflops": 100}
    record["profiles"] = [{"case": "grpo-b", "size": "small", "side": "profile"} | parts]
    assert "| grpo-b | 50 | 10 | 30 | 20 | 4.0 | 100 | 40 | 5.00 |" in trl.page(record)
    assert "| grpo-b | 2.00 |  | 2.00 |" in trl.summary(record)


def test_profile_counts_every_product_of_matrices(folder, tmp_path, put_back):
    job = {"case": "grpo-a", "size": "small", "side": "profile", "folder": str(folder), "warmup": 1, "steps": 1}
    with pytest.raises(SystemExit):
        ours.main(job | {"out": str(tmp_path / "run"), "result": str(tmp_path / "result.json")})
    found = json.loads((tmp_path / "result.json").read_text())
    weights = 4 * (4 * 128**2 + 3 * 128 * 512) + 17 * 128  # of the layers and of the LM head
    decode, update = 8 * 5 + 64 * 31 + 8, 8 * 6 + 64 * 31  # tokens; once forward; and backward twice
    assert found["gflop"] == pytest.approx(2e-9 * weights * (decode + 3 * update), rel=0.02)
    assert min(found.values()) > 0 and found["products"] > found["attention"]


def test_committed_table_is_that_of_the_committed_record():
    record = json.loads(trl.JSON.read_text())
    assert trl.JSON.with_suffix(".md").read_text() == trl.page(record)
    assert {r["case"] for r in record["results"]} == {p["case"] for p in record["profiles"]} == set(trl.GOALS)
    assert trl.summary(record) in (ROOT / "README.md").read_text()
    assert str(Path.home()) not in trl.JSON.read_text() and str(ROOT) not in trl.JSON.read_text()
