"""The reference curves: every script on the default task, with the same sampling and the same number of rollouts.

    python benchmarks/curves.py clips     GSPO's clip at its default rate, two seeds each: benchmarks/clips.csv
    python benchmarks/curves.py sweep     learning rates, two seeds each: benchmarks/sweep.csv
    python benchmarks/curves.py seeds     the best learning rate of each, five other seeds: benchmarks/curves.csv
    python benchmarks/curves.py costs     seconds and memory of a step, one run at a time: benchmarks/costs.csv
    python benchmarks/curves.py draw      docs/curves.png and docs/family.png from these files, and their tables

All flags but the learning rate are the scripts' own defaults. Patches in family/ whose loss has the scale of their
base's take the base's learning rate; the others are swept too. The best learning rate is the one with the highest
held-out accuracy (eval_pass@1) after the last step, averaged over the seeds; of rates equal to two digits, the one with
the higher mean over the evaluations. If it is at the edge of those tried, the sweep tries the next one too. Tuning and
reporting use different seeds. Runs lie in runs/curves; one that is there already is not made again, so an interrupted
command goes on. dpo.py and its relatives see no rollouts but pairs of answers of the first policy, so their steps are
not those of the others. dapo.py may sample several rollouts for a step; its curves are drawn over rollouts like the
others'. G = 1 is canonical PPO, with one response to each of 128 questions; with V = 0 the value
network never learns, and the mean over the batch, which whitening subtracts, is the only baseline.
"""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plot import COLOURS  # noqa: E402
from plumbing.fail import fail  # noqa: E402

HERE = ROOT / "benchmarks"
RUNS = ROOT / "runs" / "curves"
TEACHER = RUNS / "teacher"  # of opd.py: the tiny model after grpo.py
HARD = ["--task", "arithmetic:7-8", "--max-new-tokens", "96"]  # at first 4 of 100 responses are right
COMMANDS = {  # name -> what is run
    "grpo": ["grpo.py"],
    "dr_grpo": ["dr_grpo.py"],
    "rloo": ["rloo.py"],
    "kimi_k15": ["kimi_k15.py"],
    "ppo": ["ppo.py"],
    "ppo, V = 0": ["ppo.py", "--value-lr", "0"],
    "ppo, G = 1": ["ppo.py", "--group-size", "1", "--prompts-per-step", "128"],
    "ppo, G = 1, V = 0": ["ppo.py", "--group-size", "1", "--prompts-per-step", "128", "--value-lr", "0"],
    "dpo": ["dpo.py"],
    "dpo_norm": ["family/dpo_norm.py"],
    "simpo": ["family/simpo.py"],
    "ipo": ["family/ipo.py"],
    "reinforce": ["family/reinforce.py"],
    "gspo": ["family/gspo.py"],
    "maxrl": ["family/maxrl.py"],
    "cispo": ["family/cispo.py"],
    "reinforce_pp": ["family/reinforce_pp.py"],
    "dapo": ["family/dapo.py", "--eval-every", "5"],
    "rft": ["family/rft.py"],
    "rft, offline": ["family/rft.py", "--offline"],
    "opd": ["family/opd.py", "--teacher", f"{TEACHER}/model"],
    "opd, discount 1": ["family/opd.py", "--teacher", f"{TEACHER}/model", "--discount", "1"],
    "process_grpo": ["family/process_grpo.py"],
    "t1": ["family/t1.py"],
    "vapo": ["family/vapo.py"],
    "oreal": ["family/oreal.py"],
    "grpo, 8 updates": ["grpo.py", "--minibatches", "8"],
    "gspo, 8 updates": ["family/gspo.py", "--minibatches", "8"],
    "cispo, 8 updates": ["family/cispo.py", "--minibatches", "8"],
    "dapo, 8 updates": ["family/dapo.py", "--minibatches", "8", "--eval-every", "5", "--steps", "50"],
    "grpo, hard": ["grpo.py", *HARD],
    "maxrl, hard": ["family/maxrl.py", *HARD],
    "process_grpo, hard": ["family/process_grpo.py", *HARD],
    "dapo, hard": ["family/dapo.py", *HARD, "--eval-every", "5"],
}
RATE_OF = {  # patches with the learning rate of another script: the scale of their losses is the same
    "reinforce": "rloo",
    "maxrl": "grpo",
    "reinforce_pp": "grpo",
    "dapo": "grpo",
    "rft, offline": "rft",
    "process_grpo": "grpo",
    "t1": "rloo",
    "gspo, 8 updates": "grpo, 8 updates",
    "cispo, 8 updates": "grpo, 8 updates",
    "dapo, 8 updates": "grpo, 8 updates",
    "grpo, hard": "grpo",
    "maxrl, hard": "grpo",
    "process_grpo, hard": "grpo",
    "dapo, hard": "grpo",
}
SWEPT = [name for name in COMMANDS if name not in RATE_OF]
CLIPS = ["3e-4", "1e-3", "3e-3", "1e-2", "3e-2"]  # below; above it is 4/3 of that, as in the paper
RATES = [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]  # those that a sweep may come to
FIRST = slice(1, 4)  # those it begins with
SWEEP_SEEDS = [100, 101]
SEEDS = [0, 1, 2, 3, 4]
PASSES = {  # name -> models in memory, forward and backward passes over a rollout; counted by tests/test_siblings.py
    "grpo": (2, 2, 1),
    "dr_grpo": (2, 2, 1),
    "rloo": (2, 3, 1),
    "kimi_k15": (1, 3, 2),
    "ppo": (3, 7, 4),
    "dpo": (2, 2, 1),
    "simpo": (1, 1, 1),
}
METRICS = [
    "eval_pass@1",
    "eval_accuracy",
    "reward",
    "accuracy",
    "response_length_right",
    "response_length_wrong",
    "entropy",
    "informative_groups",
    "explained_variance",
]
PROCESSES = int(os.environ.get("PROCESSES", 1))  # runs at a time, in sweep and seeds


# --- running ---


def run(name: str, lr: float, seed: int, *flags) -> list[dict]:
    """The metrics of a run, one record per step; the run is made if it is not there."""
    folder = RUNS / f"{re.sub('[^a-zA-Z0-9_]+', '-', ' '.join([name, *flags]))}-{lr:g}-{seed}"
    records = finished(folder)
    if records:
        return records
    command = [*COMMANDS[name], *flags, "--lr", lr, "--seed", seed, "--out", folder]
    if (folder / "checkpoint.pt").exists():
        command += ["--resume", folder]
    else:  # there may be what was interrupted before its first checkpoint
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True)
    if result.returncode:
        fail(f"{name} with --lr {lr:g} --seed {seed} failed: {result.stderr[-500:]}")
    print(f"{name}, lr {lr:g}, seed {seed}: done", flush=True)
    return finished(folder)


def make_teacher() -> None:
    """The teacher of opd.py, if it is not there."""
    if not finished(TEACHER):
        command = [sys.executable, "grpo.py", "--out", TEACHER]
        subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, check=True)


def one_thread() -> dict[str, str]:
    """The environment of a run."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finished(folder: Path) -> list[dict]:
    """The records of a run that came to its last step, or none."""
    if not (folder / "metrics.jsonl").exists():
        return []
    records = read_metrics(folder)
    config = json.loads((folder / "config.json").read_text())
    return records if records[-1]["step"] == config["steps"] else []


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_all(jobs: list[tuple]) -> list[tuple]:
    """[(job, records)] of these jobs, each (name, lr, seed) and perhaps more flags."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(zip(jobs, pool.map(run_job, jobs), strict=True))


def run_job(job: tuple) -> list[dict]:
    return run(*job)


def accuracies(records: list[dict]) -> list[float]:
    """Held-out accuracy at the evaluations of a run, without the one before training."""
    return [record["eval_pass@1"] for record in records[1:] if "eval_pass@1" in record]


# --- learning rates, and a clip ---


def clips() -> None:
    """GSPO with clips of several sizes; write clips.csv."""
    jobs = []
    for clip in CLIPS:
        for seed in SWEEP_SEEDS:
            jobs.append(("gspo", 1e-4, seed, "--clip-low", clip, "--clip-high", f"{float(clip) * 4 / 3:g}"))
    rows = []
    for (_, _, seed, _, clip, *_), records in run_all(jobs):
        clipped = np.mean([record.get("clip_fraction", 0) for record in records[1:]])
        found = accuracies(records)
        rows.append((clip, seed, f"{found[0]:.4f}", f"{found[-1]:.4f}", f"{clipped:.4f}"))
    write("clips.csv", ("clip_low", "seed", "after_20", "final", "clip_fraction"), rows)


def sweep() -> None:
    """Try learning rates until the best one of each script has a worse one on either side; write sweep.csv."""
    make_teacher()
    rates = {name: set(RATES[FIRST]) for name in SWEPT}
    while True:
        try_rates(rates)
        more = {}
        for name in SWEPT:
            best = RATES.index(best_rate(name))
            neighbours = RATES[max(0, best - 1) : best + 2]
            more[name] = rates[name] | set(neighbours)
        if more == rates:
            return
        rates = more


def try_rates(rates: dict[str, set[float]]) -> None:
    """Make the runs of these learning rates, and write sweep.csv."""
    jobs = []
    for name in SWEPT:
        for lr in sorted(rates[name]):
            for seed in SWEEP_SEEDS:
                jobs.append((name, lr, seed))
    rows = []
    for (name, lr, seed), records in run_all(jobs):
        found = accuracies(records)
        rows.append((name, f"{lr:g}", seed, f"{found[-1]:.4f}", f"{np.mean(found):.4f}"))
    write("sweep.csv", ("script", "lr", "seed", "final", "mean"), rows)


def best_rate(name: str) -> float:
    """The learning rate with the highest final accuracy; of those equal to two digits, the one that learns fastest."""
    name = RATE_OF.get(name, name)
    found = {}  # learning rate -> final and mean accuracy of each seed
    for row in read("sweep.csv"):
        if row["script"] == name:
            found.setdefault(float(row["lr"]), []).append([float(row["final"]), float(row["mean"])])

    def quality(lr: float) -> tuple:
        final, mean = np.mean(found[lr], axis=0)
        return round(final, 2), mean

    return max(found, key=quality)


def seeds() -> None:
    """Five seeds of each script at its best learning rate; write curves.csv."""
    make_teacher()
    jobs = []
    for name in COMMANDS:
        for seed in SEEDS:
            jobs.append((name, best_rate(name), seed))
    rows = []
    for (name, lr, seed), records in run_all(jobs):
        rollouts = 0  # of 128 responses, so far
        for record in records:
            rollouts += record.get("rounds", int(record["step"] > 0))
            if name not in drawn_densely() and "eval_pass@1" not in record:
                continue
            cells = [format_number(record.get(metric)) for metric in METRICS]
            rows.append((name, f"{lr:g}", seed, record["step"], rollouts, *cells))
    write("curves.csv", ("script", "lr", "seed", "step", "rollouts", *METRICS), rows)


def drawn_densely() -> set[str]:
    """The scripts of which every step is drawn, and not the evaluations alone."""
    return {name for panel in PANELS for name in panel.names}


def format_number(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"


# --- costs ---


def costs() -> None:
    """Seconds of a step of the tiny model, and peak memory of a process with a larger one; write costs.csv."""
    large = RUNS / "random-model"
    with ProcessPoolExecutor(1) as pool:  # what this process itself has in memory, its children would begin with
        pool.submit(random_model, large).result()
    rows = []
    for name in PASSES:
        command = COMMANDS[name]
        seconds, mb = measure(name, [*command, "--steps", "12"])
        size = ["--data", large / "pairs.jsonl"] if name in ("dpo", "simpo") else ["--prompts-per-step", "8"]
        seconds_large, mb_large = measure(name, [*command, *size, "--steps", "3", "--model", large])
        rows.append((name, f"{seconds:.2f}", f"{mb:.0f}", f"{seconds_large:.1f}", f"{mb_large:.0f}"))
    write("costs.csv", ("script", "seconds", "peak_mb", "seconds_large", "peak_mb_large"), rows)


def random_model(folder: Path) -> None:
    """A model of 34 M parameters with weights of no use, at which memory does not look, and pairs for dpo.py."""
    from transformers import AutoTokenizer

    from benchmarks.llama import save_random_llama

    save_random_llama(
        folder,
        AutoTokenizer.from_pretrained(ROOT / "tiny"),
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        bos_token_id=None,
    )
    lines = []
    for i in range(100):
        pair = {"prompt": f"{i}+{i}=", "chosen": "1+1=2," * 10, "rejected": "1+1=3," * 10}
        lines.append(json.dumps(pair) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))


def measure(name: str, command: list) -> tuple[float, float]:
    """Median seconds of a step after the first two, and peak resident memory of the process in MB."""
    folder = RUNS / "costs"
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--eval-prompts", "4", "--eval-every", "0", "--save-every", "0", "--out", folder]
    process = subprocess.Popen(
        [sys.executable, *map(str, command + flags)],
        cwd=ROOT,
        env=one_thread(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        fail(f"{name} failed")
    seconds = [record["seconds"] for record in read_metrics(folder)[2:]]
    return statistics.median(seconds), usage.ru_maxrss / 1024


# --- files ---


def write(name: str, header: tuple, rows: list[tuple]) -> None:
    with open(HERE / name, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read(name: str) -> list[dict]:
    with open(HERE / name, newline="") as file:
        return list(csv.DictReader(file))


# --- drawing ---

METHODS = ["grpo", "dr_grpo", "rloo", "kimi_k15", "ppo"]
PAIRS = ["dpo", "dpo_norm", "simpo", "ipo"]


class Panel(NamedTuple):
    """One picture of the page; names: of COMMANDS."""

    title: str
    unit: str
    metric: str
    names: list[str]


PANELS = [
    Panel("Held-out accuracy, one sample", "share", "eval_pass@1", METHODS),
    Panel("Length of right responses", "tokens", "response_length_right", METHODS),
    Panel("Length of wrong responses", "tokens", "response_length_wrong", METHODS),
    Panel("Entropy of the policy", "nats per token", "entropy", METHODS),
    Panel("Groups with right and wrong responses", "share", "informative_groups", METHODS),
    Panel(
        "With and without V: held-out accuracy", "share", "eval_pass@1", [name for name in COMMANDS if "ppo" in name]
    ),
    Panel("What V explains of the returns", "share of variance", "explained_variance", ["ppo", "ppo, G = 1"]),
    Panel("Pairs: held-out accuracy", "share", "eval_pass@1", PAIRS),
]


class Small(NamedTuple):
    """A small picture of docs/family.png: a method, perhaps its variants, over the script that it is a patch of."""

    base: str
    names: list[str]
    top: float = 1.0  # of the vertical axis


SMALL = [
    Small("grpo", ["dr_grpo"]),
    Small("grpo", ["rloo"]),
    Small("grpo", ["kimi_k15"]),
    Small("grpo", ["ppo"]),
    Small("rloo", ["reinforce"]),
    Small("rloo", ["t1"]),
    Small("ppo", ["vapo"]),
    Small("grpo", ["gspo"]),
    Small("grpo", ["maxrl"]),
    Small("grpo", ["cispo"]),
    Small("grpo", ["reinforce_pp"]),
    Small("grpo", ["dapo"]),
    Small("grpo", ["process_grpo"]),
    Small("grpo", ["oreal"]),
    Small("grpo", ["rft", "rft, offline"]),
    Small("grpo", ["opd", "opd, discount 1"]),
    Small("dpo", ["dpo_norm"]),
    Small("dpo", ["simpo"]),
    Small("dpo", ["ipo"]),
    Small("grpo, 8 updates", ["gspo, 8 updates", "cispo, 8 updates", "dapo, 8 updates"]),
    Small("grpo, hard", ["maxrl, hard", "process_grpo, hard", "dapo, hard"], top=0.25),
]


def curve(rows: list[dict], name: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts [S] and values [seeds, S] of a script, on straight lines between those measured; dense ones smoothed."""
    runs = {}  # seed -> rollouts and values
    for row in rows:
        if row["script"] == name and row[metric]:
            runs.setdefault(row["seed"], []).append((int(row["rollouts"]), float(row[metric])))
    if metric.startswith("eval"):
        x = np.array([0, 20, 40, 60, 80])
    else:
        first = max(found[0][0] for found in runs.values())
        last = min(found[-1][0] for found in runs.values())
        x = np.arange(first, min(last, 80) + 1)
    y = []
    for found in runs.values():
        values = np.interp(x, *zip(*found, strict=True))
        y.append(values if metric.startswith("eval") else running_mean(values))
    return x, np.array(y)


def running_mean(y: np.ndarray) -> list[float]:
    """The mean of each value and its two neighbours on either side."""
    return [y[max(0, i - 2) : i + 3].mean() for i in range(len(y))]


def draw() -> None:
    """Write docs/curves.png and print the tables."""
    rows = read("curves.csv")
    page = Figure(figsize=(20, 9.6), layout="constrained")
    for place, panel in enumerate(PANELS, 1):
        ax = page.add_subplot(2, 4, place)
        for name in panel.names:
            draw_curve(ax, rows, name, panel)
        updates = "updates, of 64 pairs each" if panel.names == PAIRS else "rollouts, of 128 responses each"
        ax.set_title(panel.title, fontsize=16)
        ax.set_xlabel(updates, fontsize=14)
        ax.set_ylabel(panel.unit, fontsize=14)
        ax.tick_params(labelsize=13)
        ax.grid(alpha=0.3)
        if panel.unit == "share":
            ax.set_ylim(0, 1)
        elif panel.unit == "tokens":
            ax.set_ylim(bottom=0)
        if panel.names != METHODS:
            ax.legend(fontsize=13, loc="lower right")
    lines, labels = page.axes[0].get_legend_handles_labels()
    page.legend(lines, labels, loc="outside upper center", ncols=5, fontsize=15, frameon=False)
    page.savefig(ROOT / "docs" / "curves.png", dpi=75)
    draw_family(rows)
    print(tables())


def draw_family(rows: list[dict]) -> None:
    """Write docs/family.png: the accuracy of every method over that of its base, which is grey."""
    page = Figure(figsize=(21, 10), layout="constrained")
    for place, small in enumerate(SMALL, 1):
        ax = page.add_subplot(3, 7, place)
        band(ax, rows, small.base, "#777777", f"{small.base} (base)")
        for name, colour in zip(small.names, COLOURS, strict=False):
            band(ax, rows, name, colour, name)
        ax.set_ylim(0, small.top)
        ax.set_xticks([0, 20, 40, 60, 80])
        ax.tick_params(labelsize=12, labelleft=place % 7 == 1 or small.top < 1)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=12, loc="lower right" if small.top == 1 else "upper left", handlelength=1)
    page.supxlabel("rollouts, of 128 responses each (dpo and its patches: updates, of 64 pairs each)", fontsize=15)
    page.supylabel("held-out accuracy, one sample", fontsize=15)
    page.savefig(ROOT / "docs" / "family.png", dpi=75)


def band(ax, rows: list[dict], name: str, colour: str, label: str) -> None:
    """The mean of the accuracy over the seeds, and a band of one std on either side."""
    x, y = curve(rows, name, "eval_pass@1")
    mean = y.mean(0)
    std = y.std(0, ddof=1)
    ax.plot(x, mean, color=colour, linewidth=2.5, marker="o", markersize=4, label=label)
    ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)


def draw_curve(ax, rows: list[dict], name: str, panel: Panel) -> None:
    """The mean over the seeds and a band of one std on either side."""
    steps, y = curve(rows, name, panel.metric)
    mean = y.mean(0)
    std = y.std(0, ddof=1)
    colour = COLOURS[list(COMMANDS).index(name) % len(COLOURS)]
    marker = "o" if panel.metric.startswith("eval") else ""
    label = f"{name}, lr {best_rate(name):g}"
    ax.plot(steps, mean, color=colour, linewidth=2.5, marker=marker, label=label)
    ax.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)


# --- tables ---


def tables() -> str:
    """The tables of docs/curves.md, from the CSV files."""
    return "\n".join([*clips_table(), "", *sweep_table(), "", *accuracy_table(), "", *cost_table()])


def clips_table() -> list[str]:
    """GSPO's accuracy, and the share of responses that were clipped, with each clip: means of the seeds."""
    found = {}  # clip -> after 20 rollouts, at the end, share that was clipped; of each seed
    for row in read("clips.csv"):
        numbers = [float(row[name]) for name in ("after_20", "final", "clip_fraction")]
        found.setdefault(row["clip_low"], []).append(numbers)
    lines = head("clip below", "above", "after 20", "after 80", "clipped responses")
    for clip, numbers in found.items():
        means = [f"{x:.2f}" for x in np.mean(numbers, axis=0)]
        lines.append(table_row(clip, f"{float(clip) * 4 / 3:.2g}", *means))
    return lines


def sweep_table() -> list[str]:
    """Accuracy at the end, of each script and learning rate."""
    found = {}  # script, learning rate -> the accuracy of each seed
    for row in read("sweep.csv"):
        found.setdefault((row["script"], float(row["lr"])), []).append(float(row["final"]))
    tried = sorted({lr for _, lr in found})
    lines = head("", *(f"{lr:g}" for lr in tried))
    for name in SWEPT:
        cells = [f"{np.mean(found[name, lr]):.2f}" if (name, lr) in found else "" for lr in tried]
        lines.append(table_row(name, *cells))
    return lines


def accuracy_table() -> list[str]:
    """Accuracy of each script at its best learning rate, at every evaluation: mean and std of the seeds."""
    rows = read("curves.csv")
    lines = head("", "lr", "after 20", "after 40", "after 60", "after 80")
    for name in COMMANDS:
        _, y = curve(rows, name, "eval_pass@1")  # [seeds, 5], the first before training
        cells = [f"{x.mean():.2f} ± {x.std(ddof=1):.2f}" for x in y.T[1:]]
        lines.append(table_row(name, f"{best_rate(name):g}", *cells))
    return lines


def cost_table() -> list[str]:
    """Passes, seconds and memory of each script."""
    lines = head(
        "",
        "models",
        "forward passes",
        "backward passes",
        "seconds per step",
        "MB at the peak",
        "MB, 34 M parameters",
    )
    for row in read("costs.csv"):
        name = row["script"]
        script, *flags = COMMANDS[name]
        command = " ".join([f"`{script}`", *flags])
        lines.append(table_row(command, *PASSES[name], row["seconds"], row["peak_mb"], row["peak_mb_large"]))
    return lines


def head(*names: str) -> list[str]:
    """The two lines above the rows of a table."""
    return [table_row(*names), "|---" * len(names) + "|"]


def table_row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    commands = {"clips": clips, "sweep": sweep, "seeds": seeds, "costs": costs, "draw": draw}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        fail("usage: python benchmarks/curves.py clips|sweep|seeds|costs|draw")
    commands[sys.argv[1]]()
