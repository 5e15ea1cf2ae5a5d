"""The same work in TRL and here: time per step, peak memory, and the wait for the first step.

    python benchmarks/trl.py                         all of it: benchmarks/trl.json and, as a table, benchmarks/trl.md
    python benchmarks/trl.py --case grpo-b dpo --size small --rounds 1 --out some.json
    python benchmarks/trl.py --table                 only the table, from benchmarks/trl.json

It makes three virtual environments, or uses those that are in --envs: this repository's, TRL 1.16, and TRL 1.12, the
last that has PPO; torch, transformers and the like have the same versions in all three. Each run is a process of its
own with one thread, on the CPU; ours and TRL's take turns. Python 3.11 or newer, Linux.

The work: a random Qwen2 model (4 layers, 4 heads, intermediate 4 x hidden, tied embeddings, 17 symbols); in each step
8 prompts "dd+dd=" x 8 responses of at most 32 tokens at temperature 1 from the full softmax, then one update on the 64
sequences, all at once: float32, AdamW, gradients clipped to norm 1, learning rate 1e-6, so that all steps are alike.

    grpo-a, rloo-a, ppo-a    every response has 32 tokens, and rewards differ in every group: the worst case for us
    grpo-b, rloo-b, ppo-b    responses end by themselves, rewards differ in about half of the groups: the usual case
    dpo                      64 pairs of random responses of 8 to 32 tokens, and a reference model

GRPO and RLOO are without KL; the clip range is 0.2. PPO: one epoch, one minibatch, a value network as large as the
policy, and a KL of weight 0.05 to a reference model, which TRL always has. As a reward TRL's PPO takes a model: here
one that only runs the verifier. And it samples from 64 prompts once, not from 8 prompts 8 times.
A step is timed from end to end of two steps, evaluation and checkpoints left out on both sides; our scripts run as they
are, with their own defaults for what is not named here. benchmarks/ours.py and benchmarks/theirs.py have all settings.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "benchmarks" / "trl.json"
GOALS = {  # case -> CPU time of TRL / ours, to reach
    "grpo-a": 1.25, "grpo-b": 2.0, "rloo-a": None, "rloo-b": 2.2, "ppo-a": 3.0, "ppo-b": 3.0, "dpo": 1.25
}  # fmt: skip
SIZES = {"small": "1.05", "large": "4.2"}  # million parameters
WARMUP = 4  # first steps of a run, not counted
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
}  # fmt: skip

# --- environments ---


def make_environments(folder: Path, python: str) -> dict[str, str]:
    """The Python of each side; what is complete already is used as it is. `python`: ours, if given."""
    pythons = {name: str(folder / name / "bin" / "python") for name in ("ours", "trl==1.16.0", "trl==1.12.0")}
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in pythons:
        if name == "ours" and python:
            pythons[name] = python
        elif not (folder / name / "complete").exists():
            print(f"making the environment {folder / name}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder / name], check=True)
            pip = [pythons[name], "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, *(x for x in dependencies if x.startswith("torch"))], check=True)
            same = "torch transformers tokenizers accelerate datasets numpy".split()
            pins = [] if name == "ours" else [f"{x}=={y}" for x, y in versions(pythons["ours"], same).items()]
            subprocess.run([*pip, *([str(ROOT)] if name == "ours" else [name, *pins])], check=True)
            (folder / name / "complete").touch()
    return pythons


def versions(python: str, packages: list[str]) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    output = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    return dict(zip(packages, output.split(), strict=True))


# --- measuring ---


def work(python: str, **job) -> dict:
    """What a job measured, done in a process of its own."""
    script = ROOT / "benchmarks" / ("theirs.py" if job["side"].startswith("trl") else "ours.py")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job |= {"out": str(Path(folder) / "run"), "result": str(result), "started": time.time()}
        command = [python, "-P", str(script), json.dumps(job)]
        process = subprocess.run(command, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(f"{job} failed:\n{process.stderr[-3000:]}")
        return json.loads(result.read_text()) if result.exists() else {}


def measure(pythons: dict[str, str], cases: list[str], sizes: list[str], steps: int, rounds: int) -> Iterator[dict]:
    """One record for each size, case, round and side."""
    with tempfile.TemporaryDirectory() as folder:
        work(pythons["ours"], side="work", folder=folder)
        for size in sizes:
            for case in cases:
                for i in range(rounds):
                    for side in ("ours", "trl==1.12.0" if case.startswith("ppo") else "trl==1.16.0"):
                        job = {"size": size, "case": case, "round": i, "side": side}
                        r = job | work(pythons[side], folder=folder, warmup=WARMUP, steps=steps, **job)
                        print(f"{size:5} {case:6} {side:11} {r['cpu_ms']:5.0f} ms of CPU time per step,", end=" ")
                        print(f"{r['wall_ms']:5.0f} in all; {r['first_step_s']:4.1f} s to the first", flush=True)
                        yield r


def profiles(pythons: dict[str, str], cases: list[str], sizes: list[str]) -> Iterator[dict]:
    """Where our time goes, in two steps of each case."""
    with tempfile.TemporaryDirectory() as folder:
        work(pythons["ours"], side="work", folder=folder)
        for job in ({"size": size, "case": case, "side": "profile"} for size in sizes for case in cases):
            yield job | work(pythons["ours"], folder=folder, warmup=WARMUP, steps=2, **job)


# --- the table ---


def page(record: dict) -> str:
    """The Markdown page of a record: what was measured where, and two tables for each size."""
    lines = ["# The same work in TRL and here", ""]
    lines += [f"`{record['command']}`, {record['date']}, one thread of {record['cpu']}.", ""]
    for side, found in record["versions"].items():
        lines += [f"- {side}: " + ", ".join(f"{package} {version}" for package, version in found.items())]
    lines += ["", f"Median of {record['steps']} steps after {WARMUP}, then of {record['rounds']} runs of each side."]
    lines += ["A ratio is TRL / ours, in brackets its smallest and largest of the rounds; bold: the goal is reached."]
    lines += ["`benchmarks/trl.py` says in its first lines what the work is."]
    for size, millions in SIZES.items():
        measured = {case: both for case in GOALS if all(both := sides(record, size, case))}
        if not measured:
            continue
        heads = "per step|CPU ms, ours|TRL|ratio|goal|wall ms, ours|TRL|ratio"
        lines += ["", f"## {millions} M parameters", "", *head(heads)]
        lines += [f"| {case} | {' | '.join(times(*both, GOALS[case]))} |" for case, both in measured.items()]
        heads = "|rollout CPU ms, ours|TRL|update CPU ms, ours|TRL|tokens per step, ours|TRL"
        heads += "|informative groups, ours|TRL|peak MB, ours|TRL|first step after s, ours|TRL"
        lines += ["", *head(heads)]
        lines += [f"| {case} | {' | '.join(details(*both))} |" for case, both in measured.items()]
        lines += where(record, size)
    return "\n".join(lines) + "\n"


def where(record: dict, size: str) -> list[str]:
    """The part of the page on where our time goes, and how little it could be."""
    rows = [p for p in record.get("profiles", []) if p["size"] == size]
    lines = ["", "Where our time goes, ms of CPU time per step, with torch's profiler, which slows small operations."]
    lines += ["Floor: the products of matrices alone, at the rate of a large one, as if all else were free."]
    heads = "|products of matrices|attention|other tensor operations|Python|GFLOP in products|at GFLOP/s|floor, ms"
    lines += ["", *head(heads + "|TRL / floor")]
    for p in rows:
        floor = 1000 * p["gflop"] / p["gflops"]
        _, theirs = sides(record, size, p["case"])
        cells = [f"{p[name]:.0f}" for name in ("products", "attention", "other", "python")]
        cells += [f"{p['gflop']:.1f}", f"{p['gflops']:.0f}", f"{floor:.0f}", f"{middle(theirs, 'cpu_ms') / floor:.2f}"]
        lines += [f"| {p['case']} | {' | '.join(cells)} |"]
    return lines if rows else []


def summary(record: dict) -> str:
    """The table of the README: TRL's CPU time per step divided by ours."""
    lines = head("|" + "|".join(f"{millions} M parameters" for millions in SIZES.values()) + "|to reach")
    for case, goal in GOALS.items():
        cells = []
        for size in SIZES:
            ours, theirs = sides(record, size, case)
            cells.append(f"{middle(theirs, 'cpu_ms') / middle(ours, 'cpu_ms'):.2f}" if ours and theirs else "")
        lines += [f"| {case} | {' | '.join(cells)} | {f'{goal:.2f}' if goal else ''} |"]
    return "\n".join(lines) + "\n"


def sides(record: dict, size: str, case: str) -> tuple[list[dict], list[dict]]:
    """What was measured here, and in TRL."""
    runs = [r for r in record["results"] if (r["size"], r["case"]) == (size, case)]
    return [r for r in runs if r["side"] == "ours"], [r for r in runs if r["side"] != "ours"]


def head(names: str) -> list[str]:
    return [f"| {names.replace('|', ' | ')} |", "|---" * (names.count("|") + 1) + "|"]


def times(ours: list[dict], theirs: list[dict], goal: float | None) -> list[str]:
    cells = []
    for name in ("cpu_ms", "wall_ms"):
        a, b = middle(ours, name), middle(theirs, name)
        ratios = [y[name] / x[name] for x, y in zip(ours, theirs, strict=False)]  # rounds that both have done
        bold = "**" if name == "cpu_ms" and goal and b / a >= goal else ""
        cells += [f"{a:.0f}", f"{b:.0f}", f"{bold}{b / a:.2f}{bold} ({min(ratios):.2f} to {max(ratios):.2f})"]
        if name == "cpu_ms":
            cells.append(f"{goal:.2f}" if goal else "")
    return cells


def details(*sides: list[dict]) -> list[str]:
    rollouts, totals = ([middle(side, name) for side in sides] for name in ("rollout_cpu_ms", "cpu_ms"))
    cells = [f"{x:.0f}" if x else "" for x in rollouts]
    cells += [f"{y - x:.0f}" for x, y in zip(rollouts, totals, strict=True)]
    for name, digits in (("tokens", 0), ("informative", 2), ("peak_mb", 0), ("first_step_s", 1)):
        cells += [f"{middle(side, name):.{digits}f}" if name in side[0] else "" for side in sides]
    return cells


def middle(records: list[dict], name: str) -> float:
    return statistics.median(r[name] for r in records)


# --- the command ---


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=20, help="steps of a run that count")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "one-file-rl", help="the environments")
    parser.add_argument("--ours-python", default="", help="a Python that has what the repository needs already")
    parser.add_argument("--out", type=Path, default=JSON, help="the record; the table stands beside it as .md")
    parser.add_argument("--table", action="store_true", help="measure nothing: the table of --out again")
    flags = parser.parse_args()
    if not flags.table:
        pythons = make_environments(flags.envs.resolve(), flags.ours_python)
        packages = ["torch", "transformers", "accelerate"]
        found = {side: versions(python, packages) for side, python in pythons.items()}
        cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        record = {
            "command": f"python benchmarks/trl.py --steps {flags.steps} --rounds {flags.rounds}",
            "date": time.strftime("%Y-%m-%d"), "cpu": cpu[0].partition(": ")[2] if cpu else "a CPU",
            "versions": found, "steps": flags.steps, "rounds": flags.rounds, "results": [], "profiles": [],
        }  # fmt: skip
        for result in measure(pythons, flags.case, flags.size, flags.steps, flags.rounds):
            record["results"].append(result)
            flags.out.write_text(json.dumps(record, indent=1) + "\n")  # each time: --table shows what there is
        record["profiles"] = list(profiles(pythons, flags.case, flags.size))
        flags.out.write_text(json.dumps(record, indent=1) + "\n")
    table = flags.out.with_suffix(".md")
    table.write_text(page(json.loads(flags.out.read_text())))
    print(table.read_text())


if __name__ == "__main__":
    main()
