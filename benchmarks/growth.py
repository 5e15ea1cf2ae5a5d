"""How the time and the memory of a step of grpo.py grow with the group, the response and the model.

    python benchmarks/growth.py           benchmarks/growth.csv and docs/growth.png, about ten minutes on a CPU
    python benchmarks/growth.py draw      only the picture, from the CSV

Every point is a process of its own with one thread: grpo.py on a model of random weights, without KL, with a reward
that leaves no response without advantage, and no token that ends a response, so that all have the full length. Memory
is the peak of the process minus what it has before the model is there. Attention looks at all tokens before each one,
so it grows with the square of the length; its share is that of its operations in one more step, under torch's profiler.
"""

import csv
import multiprocessing
import random
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.fail import fail  # noqa: E402

CSV = ROOT / "benchmarks" / "growth.csv"
FIXED = {"group_size": 8, "response_tokens": 64, "hidden_size": 128}
POINTS = {  # what grows, and its values; the rest is as in FIXED
    "group_size": (8, 16, 32, 64),
    "response_tokens": (64, 128, 256, 512, 1024),
    "hidden_size": (64, 128, 256, 512),
}
PROMPTS = 4  # per step
STEPS = 4  # of which the first one is not counted; one more is profiled


# --- measuring ---


def measure(group_size: int, response_tokens: int, hidden_size: int) -> dict:
    """Seconds of the fastest step, the share of attention, and MB, of one point; to be called in a new process."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoTokenizer

    import grpo
    from benchmarks.llama import save_random_llama
    from rewards import REWARDS

    torch.set_num_threads(1)
    profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    make_sampler = grpo.make_sampler
    seconds = []  # of each step
    peak = []  # MB, one number

    def make_endless_sampler(*arguments):
        sampler = make_sampler(*arguments)
        sampler.ends = set()
        return sampler

    class ObservedRun(grpo.Run):
        def log(self, *arguments, **metrics):
            super().log(*arguments, **metrics)
            seconds.append(self.record["seconds"])
            if len(seconds) == STEPS:
                peak.append(peak_memory())
                profiler.start()
            if len(seconds) == STEPS + 1:
                profiler.stop()

    grpo.make_sampler = make_endless_sampler
    grpo.Run = ObservedRun
    REWARDS["noise"] = noise
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
        before = peak_memory()
        parameters = save_random_llama(
            f"{folder}/model",
            tokenizer,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        config = grpo.Config(
            model=f"{folder}/model",
            out=f"{folder}/run",
            rewards=("noise=1",),
            beta=0.0,
            steps=STEPS + 1,
            eval_every=0,
            eval_prompts=1,
            save_every=0,
            prompts_per_step=PROMPTS,
            group_size=group_size,
            max_new_tokens=response_tokens,
        )
        grpo.main(config)
    return {
        "parameters": parameters,
        "tokens": PROMPTS * group_size * response_tokens,
        "seconds": min(seconds[1:STEPS]),
        "attention": attention_share(profiler),
        "mb": peak[0] - before,
    }


def noise(response: str, example: dict) -> float:
    return random.random()


def attention_share(profiler) -> float:
    """The share of the profiled time that is spent in attention."""
    attention = 0.0
    total = 0.0
    for event in profiler.key_averages():
        total += event.self_cpu_time_total
        if "scaled_dot_product" in event.key:
            attention += event.self_cpu_time_total
    return attention / total


def peak_memory() -> float:
    """MB of this process at its peak; ru_maxrss would begin with the peak of the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_all() -> None:
    """Measure every point and write growth.csv."""
    rows = []
    for name, values in POINTS.items():
        for value in values:
            point = FIXED | {name: value}
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, **point).result()
            for metric, digits in (("seconds", 3), ("attention", 3), ("mb", 0)):
                found[metric] = f"{found[metric]:.{digits}f}"
            rows.append({"grows": name, **point, **found})
            print(rows[-1], flush=True)
    with open(CSV, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read() -> dict[str, dict[str, np.ndarray]]:
    """What grows -> column -> its values."""
    with open(CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in POINTS:
        found[name] = {}
        for column in ("group_size", "response_tokens", "parameters", "seconds", "attention", "mb"):
            values = [float(row[column]) for row in rows if row["grows"] == name]
            found[name][column] = np.array(values)
    return found


# --- drawing ---

TITLES = {"group_size": "Group size", "response_tokens": "Response length, tokens", "hidden_size": "Parameters"}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def draw() -> None:
    """Write docs/growth.png: seconds and memory, each beside a line that grows in proportion from the first point."""
    page = Figure(figsize=(13, 7.2), layout="constrained")
    for column, (name, found) in enumerate(read().items()):
        x = found["parameters"] if name == "hidden_size" else found[name]
        for row, metric in enumerate(("seconds", "mb")):
            ax = page.add_subplot(2, 3, 3 * row + column + 1)
            draw_growth(ax, x, found, metric)
            ax.set_xlabel(TITLES[name], fontsize=14)
            labels = [f"{v / 1e6:.2g} M" if name == "hidden_size" else f"{v:g}" for v in x]
            ax.set_xticks(x, labels, minor=False)
            ax.minorticks_off()
            low, high = ax.get_ylim()
            ticks = [tick for tick in TICKS if low < tick < high]
            ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.tick_params(labelsize=13)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=13, frameon=False, loc="upper left")
    page.savefig(ROOT / "docs" / "growth.png", dpi=80)


def draw_growth(ax, x: np.ndarray, found: dict[str, np.ndarray], metric: str) -> None:
    """The curves of one panel."""
    y = found[metric]
    label = "measured"
    if metric == "seconds":
        ax.plot(x, y, "o:", color="#E69F00", linewidth=2, label="with attention")
        y = y * (1 - found["attention"])
        label = "without attention"
    ax.plot(x, y, "o-", color="#0072B2", linewidth=2.5, label=label)
    ax.plot(x, y[0] * x / x[0], "--", color="#555555", linewidth=1.5, label="in proportion")
    ax.set(xscale="log", yscale="log")
    ax.set_ylabel("seconds per step" if metric == "seconds" else "MB at the peak", fontsize=14)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["draw"]):
        fail(__doc__)
    if not sys.argv[1:]:
        measure_all()
    draw()
