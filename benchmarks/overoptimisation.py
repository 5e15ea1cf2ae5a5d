"""Over-optimisation: what a learned reward says of the policy that is trained on it, and what the true reward says.

    python benchmarks/overoptimisation.py run      five seeds each: benchmarks/overoptimisation.csv
    python benchmarks/overoptimisation.py draw     docs/overoptimisation.png from it, and its table

family/reward_model.py learns from 256 pairs of the tiny model's own responses, ordered by a gold reward that we know,
accuracy + format / 2, of which a share is labelled the wrong way round. Then rloo.py trains the tiny model on that
reward alone. Proxy is the learned reward, less its mean before training; gold is the true one. The horizontal axis is
the root of the KL of a response to the starting model, as in Gao, Schulman and Hilton (arXiv 2210.10760). The KL has
next to no weight, so that it holds nothing back: it is there to be measured.
"""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.curves import (  # noqa: E402
    PROCESSES,
    finished,
    format_number,
    head,
    one_thread,
    read,
    table_row,
    write,
)
from plot import COLOURS  # noqa: E402
from plumbing.fail import fail  # noqa: E402

RUNS = ROOT / "runs" / "overoptimisation"
FLIPS = [0.0, 0.25, 0.4]  # share of pairs that are labelled the wrong way round
SEEDS = [0, 1, 2, 3, 4]
PAIRS = 256
COLUMNS = ("flip", "seed", "step", "root_kl", "proxy", "gold", "accuracy", "length")


def run(job: tuple[float, int]) -> list[tuple]:
    """The rows of one seed with one share of wrong labels; what is there already is not made again."""
    flip, seed = job
    judge = RUNS / f"judge-{flip:g}-{seed}"
    make(judge, "family/reward_model.py", "--flip", flip, "--pair-prompts", PAIRS, "--seed", seed)
    policy = RUNS / f"rloo-{flip:g}-{seed}"
    reward = f"runs/overoptimisation/{judge.name}/model"
    rewards = ["--rewards", f"{reward}=1", "accuracy=0", "format=0"]
    make(policy, "rloo.py", *rewards, "--beta", "1e-6", "--steps", "160", "--seed", seed)
    rows = []
    first = None  # the proxy at first
    for record in finished(policy)[1:]:
        root_kl = max(0.0, record["kl"] * record["response_length"]) ** 0.5 if "kl" in record else None
        proxy = record[f"reward/{reward}"]
        first = proxy if first is None else first
        gold = record["reward/accuracy"] + record["reward/format"] / 2
        numbers = [root_kl, proxy - first, gold, record["accuracy"], record["response_length"]]
        rows.append((f"{flip:g}", seed, record["step"], *map(format_number, numbers)))
    return rows


def make(folder: Path, script: str, *flags) -> None:
    """Run a script, unless it has run."""
    if finished(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, script, *map(str, flags), "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True)
    if done.returncode:
        fail(f"{folder.name} failed: {done.stderr[-500:]}")
    print(f"{folder.name}: done", flush=True)


def run_all() -> None:
    """Make all runs, and write the file."""
    jobs = [(flip, seed) for flip in FLIPS for seed in SEEDS]
    with ThreadPoolExecutor(PROCESSES) as pool:
        rows = [row for of_job in pool.map(run, jobs) for row in of_job]
    write("overoptimisation.csv", COLUMNS, rows)


def curve(flip: float, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Roots of the KL [S] and values [seeds, S], means over 10 steps."""
    rows = [row for row in read("overoptimisation.csv") if float(row["flip"]) == flip]
    x = []
    y = []
    for seed in SEEDS:
        of_seed = [row for row in rows if int(row["seed"]) == seed and row["root_kl"]]
        x.append([float(row["root_kl"]) for row in of_seed])
        y.append([float(row[column]) for row in of_seed])
    steps = min(map(len, x)) // 10 * 10
    x = np.array([values[:steps] for values in x]).reshape(len(SEEDS), -1, 10).mean(2)
    y = np.array([values[:steps] for values in y]).reshape(len(SEEDS), -1, 10).mean(2)
    return x.mean(0), y


def draw() -> None:
    """Write the picture and print the table."""
    page = Figure(figsize=(13, 4.6), layout="constrained")
    for place, (column, title) in enumerate((("proxy", "Learned reward (proxy)"), ("gold", "True reward (gold)")), 1):
        ax = page.add_subplot(1, 2, place)
        for flip, colour in zip(FLIPS, COLOURS, strict=False):
            x, y = curve(flip, column)
            mean = y.mean(0)
            std = y.std(0, ddof=1)
            ax.plot(x, mean, color=colour, linewidth=2.5, marker="o", label=f"{flip:.0%} of the labels wrong")
            ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
        ax.set_title(title, fontsize=15)
        ax.set_xlabel("root of the KL of a response, nats", fontsize=13)
        ax.grid(alpha=0.3)
    page.axes[0].legend(fontsize=12)
    page.savefig(ROOT / "docs" / "overoptimisation.png", dpi=75)
    print("\n".join(table()))


def table() -> list[str]:
    """Gold and proxy at the first and the last ten steps, and the best gold of any ten."""
    lines = head("wrong labels", "gold, steps 1-10", "best ten steps", "last ten steps", "proxy, last ten steps")
    for flip in FLIPS:
        _, gold = curve(flip, "gold")
        _, proxy = curve(flip, "proxy")
        best = gold.mean(0).argmax()
        cells = [
            f"{x.mean():.2f} ± {x.std(ddof=1):.2f}" for x in (gold[:, 0], gold[:, best], gold[:, -1], proxy[:, -1])
        ]
        lines.append(table_row(f"{flip:.0%}", *cells))
    return lines


if __name__ == "__main__":
    commands = {"run": run_all, "draw": draw}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        fail("usage: python benchmarks/overoptimisation.py run|draw")
    commands[sys.argv[1]]()
