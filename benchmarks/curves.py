"""The reference curves: every script on the default task, with the same sampling and the same number of rollouts.

    python benchmarks/curves.py sweep     learning rates, two seeds each: benchmarks/sweep.csv
    python benchmarks/curves.py seeds     the best learning rate of each, five other seeds: benchmarks/curves.csv
    python benchmarks/curves.py costs     seconds and memory of a step, one run at a time: benchmarks/costs.csv
    python benchmarks/curves.py draw      docs/curves.png from these files, and their tables

All flags but the learning rate are the scripts' own defaults. The best learning rate is the one with the highest
held-out accuracy (eval_pass@1) after the last step, averaged over the seeds; of rates equal to two digits, the one with
the higher mean over the evaluations. If it is at the edge of those tried, the sweep tries the next one too. Tuning and
reporting use different seeds. Runs lie in runs/curves; one that is there already is not made again, so an interrupted
command goes on. dpo.py sees no rollouts but pairs of answers of the first policy, so its steps are not those of the
others.
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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
    "dpo": ["dpo.py"],
}
RATES = [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]  # those that a sweep may come to
FIRST = slice(1, 4)  # those it begins with
SWEEP_SEEDS, SEEDS = [100, 101], [0, 1, 2, 3, 4]
PASSES = {  # name -> models in memory, forward and backward passes over a rollout; counted by tests/test_siblings.py
    "grpo": (2, 2, 1),
    "dr_grpo": (2, 2, 1),
    "rloo": (2, 3, 1),
    "kimi_k15": (1, 3, 2),
    "ppo": (3, 5, 2),
    "ppo, 4 updates per rollout": (3, 7, 4),
    "dpo": (2, 2, 1),
}
METRICS = """eval_pass@1 reward accuracy response_length_right response_length_wrong entropy
seconds seconds_rollout seconds_update""".split()
PROCESSES = int(os.environ.get("PROCESSES", 1))  # runs at a time; more than one blurs the seconds, and only those


# --- running ---


def run(name: str, lr: float, seed: int) -> list[dict]:
    """The metrics of a run, one record per step; the run is made if it is not there."""
    folder = RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-{lr:g}-{seed}"
    if not (records := finished(folder)):
        command = [*COMMANDS[name], "--lr", lr, "--seed", seed, "--out", folder]
        if (folder / "checkpoint.pt").exists():
            command += ["--resume", folder]
        else:  # there may be what was interrupted before its first checkpoint
            shutil.rmtree(folder, ignore_errors=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, command)]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{name} with --lr {lr:g} --seed {seed} failed: {result.stderr[-500:]}")
        print(f"{name}, lr {lr:g}, seed {seed}: done", flush=True)
        records = finished(folder)
    return records


def finished(folder: Path) -> list[dict]:
    """The records of a run that came to its last step, or none."""
    if not (folder / "metrics.jsonl").exists():
        return []
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return records if records[-1]["step"] == json.loads((folder / "config.json").read_text())["steps"] else []


def run_all(jobs: list[tuple]) -> list[tuple]:
    """[(name, lr, seed, records)] of these (name, lr, seed)."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        return [(*job, records) for job, records in zip(jobs, pool.map(lambda job: run(*job), jobs), strict=True)]


def accuracies(records: list[dict]) -> list[float]:
    """Held-out accuracy at the evaluations of a run, without the one before training."""
    return [record["eval_pass@1"] for record in records[1:] if "eval_pass@1" in record]


def sweep() -> None:
    """Try learning rates until the best one of each script has a worse one on either side; write sweep.csv."""
    rates = {name: set(RATES[FIRST]) for name in COMMANDS}
    while True:
        results = run_all([(n, lr, seed) for n in COMMANDS for lr in sorted(rates[n]) for seed in SWEEP_SEEDS])
        found = [(n, f"{lr:g}", seed, accuracies(records)) for n, lr, seed, records in results]
        rows = [(*run, f"{x[-1]:.4f}", f"{np.mean(x):.4f}") for *run, x in found]
        write("sweep.csv", ("script", "lr", "seed", "final", "mean"), rows)
        best = {name: RATES.index(best_rate(name)) for name in COMMANDS}
        more = {name: rates[name] | set(RATES[max(0, i - 1) : i + 2]) for name, i in best.items()}
        if more == rates:
            return
        rates = more


def best_rate(name: str) -> float:
    """The learning rate with the highest final accuracy; of those equal to two digits, the one that learns fastest."""
    found = {}
    for row in read("sweep.csv"):
        if row["script"] == name:
            found.setdefault(float(row["lr"]), []).append([float(row["final"]), float(row["mean"])])

    def quality(lr: float) -> tuple:
        final, mean = np.mean(found[lr], axis=0)
        return round(final, 2), mean

    return max(found, key=quality)


def seeds() -> None:
    """Five seeds of each script at its best learning rate; write curves.csv."""
    results = run_all([(name, best_rate(name), seed) for name in COMMANDS for seed in SEEDS])
    rows = [
        (name, f"{lr:g}", seed, record["step"], *(format_number(record.get(metric)) for metric in METRICS))
        for name, lr, seed, records in results
        for record in records
    ]
    write("curves.csv", ("script", "lr", "seed", "step", *METRICS), rows)


def costs() -> None:
    """Seconds of a step of the tiny model, and peak memory of a process with a larger one; write costs.csv."""
    large = RUNS / "random-model"
    with ProcessPoolExecutor(1) as pool:  # what this process itself has in memory, its children would begin with
        pool.submit(random_model, large).result()
    rows = []
    for name, command in COMMANDS.items():
        small = measure(name, [*command, "--steps", "12"])
        sizes = ["--data", large / "pairs.jsonl"] if name == "dpo" else ["--prompts-per-step", "8"]
        big = measure(name, [*command, *sizes, "--steps", "3", "--model", large])
        rows.append((name, f"{small[0]:.2f}", f"{small[1]:.0f}", f"{big[0]:.1f}", f"{big[1]:.0f}"))
    write("costs.csv", ("script", "seconds", "peak_mb", "seconds_large", "peak_mb_large"), rows)


def random_model(folder: Path) -> None:
    """A model of 34 M parameters with weights of no use, at which memory does not look, and pairs for dpo.py."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    pairs = [{"prompt": f"{i}+{i}=", "chosen": "1+1=2," * 10, "rejected": "1+1=3," * 10} for i in range(100)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def measure(name: str, command: list) -> tuple[float, float]:
    """Median seconds of a step after the first two, and peak resident memory of the process in MB."""
    folder = RUNS / "costs"
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--eval-prompts", "4", "--eval-every", "0", "--save-every", "0", "--out", folder]
    process = subprocess.Popen(
        [sys.executable, *map(str, command + flags)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(record["seconds"] for record in records[2:]), usage.ru_maxrss / 1024


def format_number(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"


def write(name: str, header: tuple, rows: list[tuple]) -> None:
    with open(HERE / name, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def read(name: str) -> list[dict]:
    with open(HERE / name, newline="") as file:
        return list(csv.DictReader(file))


# --- drawing ---

PANELS = [  # title, y axis, metric, scripts that are left out
    ("Held-out accuracy, one sample", "share", "eval_pass@1", ["dpo"]),
    ("Length of right responses", "tokens", "response_length_right", ["dpo"]),
    ("Length of wrong responses", "tokens", "response_length_wrong", ["dpo"]),
    ("Entropy of the policy", "nats per token", "entropy", ["dpo"]),
    ("Seconds per step", "seconds", "seconds", ["dpo"]),
    ("DPO: held-out accuracy, one sample", "share", "eval_pass@1", [name for name in COMMANDS if name != "dpo"]),
]


def curve(rows: list[dict], name: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and values [seeds, S] of a script, where all its seeds have a value; a running mean of 5 if dense."""
    values = {}
    for row in rows:
        if row["script"] == name and row[metric]:
            values.setdefault(int(row["step"]), []).append(float(row[metric]))
    steps = sorted(step for step, found in values.items() if len(found) == len(SEEDS))
    y = np.array([values[step] for step in steps]).T  # [seeds, S]
    if len(steps) > 20:
        y = np.array([[seed[max(0, i - 2) : i + 3].mean() for i in range(len(steps))] for seed in y])
    return np.array(steps), y


def draw() -> None:
    """Write docs/curves.png and print the tables."""
    rows = read("curves.csv")
    page = Figure(figsize=(15, 9.6), layout="constrained")
    for place, (title, unit, metric, left_out) in enumerate(PANELS, 1):
        ax = page.add_subplot(2, 3, place)
        for i, name in enumerate(COMMANDS):
            if name in left_out:
                continue
            steps, y = curve(rows, name, metric)
            mean, std = y.mean(0), y.std(0, ddof=1)
            marker = "o" if metric.startswith("eval") else ""
            ax.plot(steps, mean, color=COLOURS[i], linewidth=2.5, marker=marker, label=name)
            ax.fill_between(steps, mean - std, mean + std, color=COLOURS[i], alpha=0.18, linewidth=0)
        ax.set_title(title, fontsize=16)
        ax.set_xlabel(
            "updates, of 64 pairs each" if "grpo" in left_out else "rollouts, of 128 responses each", fontsize=14
        )
        ax.set_ylabel(unit, fontsize=14)
        ax.tick_params(labelsize=13)
        ax.grid(alpha=0.3)
        if unit == "share":
            ax.set_ylim(0, 1)
        elif metric != "entropy":
            ax.set_ylim(bottom=0)
    handles = dict(zip(COMMANDS, page.axes[0].get_lines() + page.axes[-1].get_lines(), strict=True))
    page.legend(
        handles.values(), [f"{name}, lr {best_rate(name):g}" for name in handles], loc="outside upper center", ncols=4,
        fontsize=15, frameon=False,
    )  # fmt: skip
    page.savefig(ROOT / "docs" / "curves.png", dpi=75)
    print(tables())


def tables() -> str:
    """The tables of the README, from the CSV files."""
    tried, found = sorted({float(row["lr"]) for row in read("sweep.csv")}), {}
    for row in read("sweep.csv"):
        found.setdefault((row["script"], float(row["lr"])), []).append(float(row["final"]))
    lines = [table_row("", *(f"{lr:g}" for lr in tried)), "|---" * (len(tried) + 1) + "|"]
    for name in COMMANDS:
        cells = [f"{np.mean(found[name, lr]):.2f}" if (name, lr) in found else "" for lr in tried]
        lines.append(table_row(name, *cells))
    lines += ["", table_row("", "lr", *(f"after {step}" for step in (20, 40, 60, 80))), "|---" * 6 + "|"]
    for name in COMMANDS:
        _, y = curve(read("curves.csv"), name, "eval_pass@1")  # [seeds, 5], the first before training
        cells = [f"{x.mean():.2f} ± {x.std(ddof=1):.2f}" for x in y.T[1:]]
        lines.append(table_row(name, f"{best_rate(name):g}", *cells))
    header = "models", "forward passes", "backward passes", "seconds per step", "MB at the peak", "MB, 34 M parameters"
    lines += ["", table_row("", *header), "|---" * 7 + "|"]
    for row in read("costs.csv"):
        script, *flags = COMMANDS[row["script"]]
        seconds, memory = row["seconds"], (row["peak_mb"], row["peak_mb_large"])
        lines.append(table_row(" ".join([f"`{script}`", *flags]), *PASSES[row["script"]], seconds, *memory))
    return "\n".join(lines)


def table_row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    commands = {"sweep": sweep, "seeds": seeds, "costs": costs, "draw": draw}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    commands[sys.argv[1]]()
