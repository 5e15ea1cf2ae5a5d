"""benchmarks/curves.py and growth.py: how a learning rate is chosen, and that the README says what was measured."""

import csv
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from conftest import ROOT

from benchmarks import curves, growth

# --- curves.py ---


def test_the_tables_of_the_readme_are_those_of_the_measurements():
    text = (ROOT / "docs" / "curves.md").read_text()
    missing = [line for line in curves.tables().splitlines() if line and line not in text]
    assert not missing, "python benchmarks/curves.py draw"
    rows = curves.accuracy_table()[:7]  # the README has the first five methods
    assert rows[-1].startswith("| ppo |") and "\n".join(rows) + "\n\n" in (ROOT / "README.md").read_text()


def test_the_table_of_objectives_has_the_accuracy_that_was_measured():
    text = (ROOT / "docs" / "objectives.md").read_text().splitlines()
    for line in curves.accuracy_table()[2:]:
        name, *_, last = [cell.strip() for cell in line.strip("|").split("|")]
        rows = [row for row in text if row.startswith((f"| [`{name}.py`]", f"| [`family/{name}.py`]"))]
        assert all(row.endswith(f"| {last} |") for row in rows), name
    assert sum(row.startswith("| [`") and "±" in row for row in text) == 21


def test_all_seeds_of_all_scripts_are_there():
    assert not set(curves.SEEDS) & set(curves.SWEEP_SEEDS)
    with open(ROOT / "benchmarks" / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    for name in curves.COMMANDS:
        found = [row for row in rows if row["script"] == name]
        assert {int(row["seed"]) for row in found} == set(curves.SEEDS)
        assert {float(row["lr"]) for row in found} == {curves.best_rate(name)}
        if name in curves.drawn_densely():
            assert len(found) == 5 * 81
        else:
            assert len(found) >= 5 * 5
        if name not in curves.PAIRS and name in curves.drawn_densely():
            lengths = [float(row["response_length_right"]) for row in found if row["response_length_right"]]
            assert 5 < np.mean(lengths) < 64


def test_a_sweep_ends_when_the_best_rate_has_worse_neighbours(monkeypatch, tmp_path):
    monkeypatch.setattr(curves, "HERE", tmp_path)
    monkeypatch.setattr(curves, "make_teacher", lambda: None)
    best = {name: i % len(curves.RATES) for i, name in enumerate(curves.SWEPT)}  # scripts with different best rates
    tried = set()

    def run(name, lr, seed):
        tried.add((name, lr))
        quality = 1 - abs(curves.RATES.index(lr) - best[name]) / 10
        return [{"step": 0, "eval_pass@1": 0.2}, {"step": 20, "eval_pass@1": 0.3}, {"step": 80, "eval_pass@1": quality}]

    monkeypatch.setattr(curves, "run", run)
    curves.sweep()
    for name, i in best.items():
        assert curves.best_rate(name) == curves.RATES[i]
        for lr in curves.RATES[max(0, i - 1) : i + 2]:
            assert (name, lr) in tried


def test_a_patch_takes_the_rate_of_the_script_whose_loss_has_its_scale():
    assert curves.RATE_OF and not set(curves.RATE_OF) & set(curves.SWEPT)
    for name, other in curves.RATE_OF.items():
        assert curves.best_rate(name) == curves.best_rate(other)


def test_a_curve_is_drawn_over_rollouts_whatever_the_steps():
    rows = []
    for seed, rounds in ((0, 1), (1, 3)):  # rollouts in each of 90 steps
        for step in range(91):
            x = rounds * step
            row = {"script": "dapo", "seed": seed, "rollouts": x, "eval_pass@1": "", "entropy": str(x) if step else ""}
            if step % 5 == 0:
                row["eval_pass@1"] = str(x / 100)
            rows.append(row)
    x, y = curves.curve(rows, "dapo", "eval_pass@1")
    assert x.tolist() == [0, 20, 40, 60, 80] and np.allclose(y, [x / 100, x / 100])
    x, y = curves.curve(rows, "dapo", "entropy")
    assert x.tolist() == list(range(3, 81)), "where all seeds have values"
    assert np.allclose(y[:, 2:-2], x[2:-2])


def test_of_equal_final_accuracies_the_faster_one_is_best(monkeypatch, tmp_path):
    monkeypatch.setattr(curves, "HERE", tmp_path)
    rows = [
        ("grpo", 1e-4, 100, 0.941, 0.8),
        ("grpo", 2e-4, 100, 0.938, 0.9),
        ("grpo", 4e-4, 100, 0.8, 0.95),
    ]
    curves.write("sweep.csv", ("script", "lr", "seed", "final", "mean"), rows)
    assert curves.best_rate("grpo") == 2e-4


def test_an_interrupted_run_is_not_taken_for_a_finished_one(tmp_path):
    assert curves.finished(tmp_path / "nothing") == []
    (tmp_path / "config.json").write_text('{"steps": 2}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert curves.finished(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 2}\n')
    assert len(curves.finished(tmp_path)) == 2


# --- growth.py ---


def test_time_and_memory_grew_no_faster_than_in_proportion():
    """Of the committed measurements: time without attention, and memory; 15 % are left to noise."""
    for name, found in growth.read().items():
        x = found["parameters"] if name == "hidden_size" else found[name]
        assert len(x) >= 4, name
        for y in (found["seconds"] * (1 - found["attention"]), found["mb"]):
            assert (y[1:] / y[:-1] <= 1.15 * x[1:] / x[:-1]).all(), f"{name}, from one point to the next"
            assert y[-1] / y[0] <= 1.15 * x[-1] / x[0], f"{name}, from the first point to the last"


def test_growth_measures_full_length_responses_and_the_share_of_attention():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(growth.measure, group_size=2, response_tokens=16, hidden_size=64).result()
    assert found["tokens"] == 4 * 2 * 16
    assert found["parameters"] > 64 * 64
    assert found["seconds"] > 0
    assert found["mb"] > 0
    assert 0 < found["attention"] < 1
