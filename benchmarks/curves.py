"""The reference curves: every RL script on the default task, with the same sampling and the same number of rollouts.

    python benchmarks/curves.py sweep     learning rates, two seeds each: benchmarks/sweep.csv
    python benchmarks/curves.py seeds     the best learning rate of each, five other seeds: benchmarks/curves.csv
    python benchmarks/curves.py draw      docs/curves.png and docs/sweep.png from these files, and the tables

All flags but the learning rate are the scripts' own defaults. The best learning rate is the one with the highest
held-out accuracy, averaged over the evaluations in training (so that learning fast counts) and over the seeds; if it
is at the edge of those tried, the sweep tries the next one too. Runs lie in runs/curves; one that is there already is
not made again, so an interrupted command goes on. Tuning and reporting use different seeds.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plot import COLOURS  # noqa: E402

HERE, RUNS = ROOT / "benchmarks", ROOT / "runs" / "curves"
COMMANDS = {  # name -> what is run
    "grpo": ["grpo.py"],
    "dr_grpo": ["dr_grpo.py"],
    "rloo": ["rloo.py"],
    "kimi_k15": ["kimi_k15.py"],
    "ppo": ["ppo.py"],
    "ppo, 4 updates per rollout": ["ppo.py", "--epochs", "2", "--minibatches", "2"],
}
RATES = [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]  # those that a sweep may come to
FIRST = slice(1, 6)  # those it begins with
SWEEP_SEEDS, SEEDS = [100, 101], [0, 1, 2, 3, 4]
METRICS = """eval_pass@1 reward accuracy response_length_right response_length_wrong entropy
seconds seconds_rollout seconds_update""".split()
PROCESSES = int(os.environ.get("PROCESSES", 1))  # runs at a time; more than one blurs the seconds, and only those


# --- running ---


def run(name: str, lr: float, seed: int) -> list[dict]:
    """The metrics of a run, one record per step; the run is made if it is not there."""
    folder = RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-{lr:g}-{seed}"
    if not (folder / "model").exists():
        command = [sys.executable, *COMMANDS[name], "--lr", lr, "--seed", seed, "--out", folder]
        resume = ["--resume", folder] if (folder / "checkpoint.pt").exists() else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [str(x) for x in command + resume], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if result.returncode:
            raise SystemExit(f"{name} with --lr {lr:g} --seed {seed} failed: {result.stderr[-500:]}")
        print(f"{name}, lr {lr:g}, seed {seed}: done", flush=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_all(jobs: list[tuple]) -> list[tuple]:
    """[(name, lr, seed, records)] of these (name, lr, seed)."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        return [(*job, records) for job, records in zip(jobs, pool.map(lambda job: run(*job), jobs), strict=True)]


def speed_of_learning(records: list[dict]) -> float:
    """Held-out accuracy, averaged over the evaluations of a run without the one before training."""
    return float(np.mean([record["eval_pass@1"] for record in records[1:] if "eval_pass@1" in record]))


def sweep() -> None:
    """Try learning rates until the best one of each script has a worse one on either side; write sweep.csv."""
    rates = {name: set(RATES[FIRST]) for name in COMMANDS}
    while True:
        results = run_all([(n, lr, seed) for n in COMMANDS for lr in sorted(rates[n]) for seed in SWEEP_SEEDS])
        rows = [(n, f"{lr:g}", seed, f"{speed_of_learning(records):.4f}") for n, lr, seed, records in results]
        write("sweep.csv", ("script", "lr", "seed", "mean_eval_pass@1"), rows)
        more = {name: {RATES[i + d] for d in (-1, 1) for i in [RATES.index(best_rate(name))]} for name in COMMANDS}
        if all(more[name] <= rates[name] for name in COMMANDS):
            return
        rates = {name: rates[name] | more[name] for name in COMMANDS}


def best_rate(name: str) -> float:
    """The learning rate with the highest mean in sweep.csv."""
    found = {}
    for row in read("sweep.csv"):
        if row["script"] == name:
            found.setdefault(float(row["lr"]), []).append(float(row["mean_eval_pass@1"]))
    return max(found, key=lambda lr: np.mean(found[lr]))


def seeds() -> None:
    """Five seeds of each script at its best learning rate; write curves.csv."""
    results = run_all([(name, best_rate(name), seed) for name in COMMANDS for seed in SEEDS])
    rows = [
        (name, f"{lr:g}", seed, record["step"], *(format_number(record.get(metric)) for metric in METRICS))
        for name, lr, seed, records in results
        for record in records
    ]
    write("curves.csv", ("script", "lr", "seed", "step", *METRICS), rows)


def format_number(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"


def write(name: str, header: tuple, rows: list[tuple]) -> None:
    with open(HERE / name, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def read(name: str) -> list[dict]:
    with open(HERE / name, newline="") as file:
        return list(csv.DictReader(file))
