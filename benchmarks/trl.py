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
sys.path.insert(0, str(ROOT))
from plumbing.fail import fail  # noqa: E402

JSON = ROOT / "benchmarks" / "trl.json"
GOALS = {  # case -> CPU time of TRL / ours, to reach
    "grpo-a": 1.25,
    "grpo-b": 2.0,
    "rloo-a": None,
    "rloo-b": 2.2,
    "ppo-a": 3.0,
    "ppo-b": 3.0,
    "dpo": 1.25,
}
SIZES = {"small": "1.05", "large": "4.2"}  # million parameters
SIDES = ["ours", "trl==1.16.0", "trl==1.12.0"]  # each has an environment of this name
WARMUP = 4  # first steps of a run, not counted
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


# --- environments ---


def make_environments(folder: Path, ours: str) -> dict[str, str]:
    """The Python of each side; what is complete already is used as it is. `ours`: the Python of our side, if given."""
    pythons = {}
    for side in SIDES:
        if side == "ours" and ours:
            pythons[side] = ours
            continue
        pythons[side] = str(folder / side / "bin" / "python")
        if not (folder / side / "complete").exists():
            make_environment(folder, side, pythons)
    return pythons


def make_environment(folder: Path, side: str, pythons: dict[str, str]) -> None:
    """Install one side. TRL gets the versions that ours, which comes first, has of the packages that both need."""
    print(f"making the environment {folder / side}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder / side], check=True)
    pip = [pythons[side], "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = [dependency for dependency in dependencies if dependency.startswith("torch")]
    subprocess.run([*pip, *torch], check=True)
    if side == "ours":
        subprocess.run([*pip, str(ROOT)], check=True)
    else:
        same = versions(pythons["ours"], ["torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy"])
        pins = [f"{package}=={version}" for package, version in same.items()]
        subprocess.run([*pip, side, *pins], check=True)
    (folder / side / "complete").touch()


def versions(python: str, packages: list[str]) -> dict[str, str]:
    """The versions of these packages that a Python has."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    output = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    return dict(zip(packages, output.split(), strict=True))


# --- measuring ---


def measure(pythons: dict[str, str], cases: list[str], sizes: list[str], steps: int, rounds: int) -> Iterator[dict]:
    """One record for each size, case, round and side."""
    with tempfile.TemporaryDirectory() as folder:
        work(pythons["ours"], side="work", folder=folder)
        for job in jobs(cases, sizes, rounds):
            python = pythons[job["side"]]
            record = job | work(python, folder=folder, warmup=WARMUP, steps=steps, **job)
            print(
                f"{job['size']:5} {job['case']:6} {job['side']:11} {record['cpu_ms']:5.0f} ms of CPU time per step, "
                f"{record['wall_ms']:5.0f} in all; {record['first_step_s']:4.1f} s to the first",
                flush=True,
            )
            yield record


def jobs(cases: list[str], sizes: list[str], rounds: int) -> Iterator[dict]:
    """What is measured, in this order: our side and TRL's take turns."""
    for size in sizes:
        for case in cases:
            theirs = "trl==1.12.0" if case.startswith("ppo") else "trl==1.16.0"
            for number in range(rounds):
                for side in ("ours", theirs):
                    yield {"size": size, "case": case, "round": number, "side": side}


def profiles(pythons: dict[str, str], cases: list[str], sizes: list[str]) -> Iterator[dict]:
    """Where our time goes, in two steps of each case."""
    with tempfile.TemporaryDirectory() as folder:
        work(pythons["ours"], side="work", folder=folder)
        for size in sizes:
            for case in cases:
                job = {"size": size, "case": case, "side": "profile"}
                yield job | work(pythons["ours"], folder=folder, warmup=WARMUP, steps=2, **job)


def work(python: str, **job) -> dict:
    """What a job measured, done in a process of its own."""
    script = "theirs.py" if job["side"].startswith("trl") else "ours.py"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job["out"] = str(Path(folder) / "run")
        job["result"] = str(result)
        job["started"] = time.time()
        command = [python, "-P", str(ROOT / "benchmarks" / script), json.dumps(job)]
        process = subprocess.run(command, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        if process.returncode:
            fail(f"{job} failed:\n{process.stderr[-3000:]}")
        return json.loads(result.read_text()) if result.exists() else {}


# --- the table ---


def page(record: dict) -> str:
    """The Markdown page of a record: what was measured where, and two tables for each size."""
    lines = ["# The same work in TRL and here", ""]
    lines.append(f"`{record['command']}`, {record['date']}, one thread of {record['cpu']}.")
    lines.append("")
    for side, found in record["versions"].items():
        packages = [f"{package} {version}" for package, version in found.items()]
        lines.append(f"- {side}: {', '.join(packages)}")
    lines.append("")
    lines.append(f"Median of {record['steps']} steps after {WARMUP}, then of {record['rounds']} runs of each side.")
    lines.append(
        "A ratio is TRL / ours, in brackets its smallest and largest of the rounds; bold: the goal is reached."
    )
    lines.append("`benchmarks/trl.py` says in its first lines what the work is.")
    for size in SIZES:
        measured = [case for case in GOALS if all(sides(record, size, case))]  # on both sides
        if measured:
            lines += comparison(record, size, measured)
            lines += where(record, size)
    return "\n".join(lines) + "\n"


def comparison(record: dict, size: str, cases: list[str]) -> list[str]:
    """The part of the page on both sides: time with its ratios, and details."""
    lines = ["", f"## {SIZES[size]} M parameters", ""]
    lines += head("per step|CPU ms, ours|TRL|ratio|goal|wall ms, ours|TRL|ratio")
    for case in cases:
        ours, theirs = sides(record, size, case)
        lines.append(table_row(case, *times(ours, theirs, GOALS[case])))
    lines.append("")
    lines += head(
        "|rollout CPU ms, ours|TRL|update CPU ms, ours|TRL|tokens per step, ours|TRL"
        "|informative groups, ours|TRL|peak MB, ours|TRL|first step after s, ours|TRL"
    )
    for case in cases:
        ours, theirs = sides(record, size, case)
        lines.append(table_row(case, *details(ours, theirs)))
    return lines


def where(record: dict, size: str) -> list[str]:
    """The part of the page on where our time goes, and how little it could be."""
    found = [profile for profile in record.get("profiles", []) if profile["size"] == size]
    if not found:
        return []
    lines = ["", "Where our time goes, ms of CPU time per step, with torch's profiler, which slows small operations."]
    lines.append("Floor: the products of matrices alone, at the rate of a large one, as if all else were free.")
    lines.append("")
    lines += head(
        "|products of matrices|attention|other tensor operations|Python|GFLOP in products|at GFLOP/s|floor, ms"
        "|TRL / floor"
    )
    for profile in found:
        case = profile["case"]
        floor = 1000 * profile["gflop"] / profile["gflops"]
        _, theirs = sides(record, size, case)
        cells = [f"{profile[name]:.0f}" for name in ("products", "attention", "other", "python")]
        cells.append(f"{profile['gflop']:.1f}")
        cells.append(f"{profile['gflops']:.0f}")
        cells.append(f"{floor:.0f}")
        cells.append(f"{middle(theirs, 'cpu_ms') / floor:.2f}")
        lines.append(table_row(case, *cells))
    return lines


def summary(record: dict) -> str:
    """The table of the README: TRL's CPU time per step divided by ours."""
    columns = [f"{millions} M parameters" for millions in SIZES.values()]
    lines = head("|".join(["", *columns, "to reach"]))
    for case, goal in GOALS.items():
        cells = []
        for size in SIZES:
            ours, theirs = sides(record, size, case)
            if ours and theirs:
                cells.append(f"{middle(theirs, 'cpu_ms') / middle(ours, 'cpu_ms'):.2f}")
            else:
                cells.append("")
        lines.append(table_row(case, *cells, goal_cell(goal)))
    return "\n".join(lines) + "\n"


def sides(record: dict, size: str, case: str) -> tuple[list[dict], list[dict]]:
    """What was measured here, and in TRL."""
    runs = [run for run in record["results"] if run["size"] == size and run["case"] == case]
    ours = [run for run in runs if run["side"] == "ours"]
    theirs = [run for run in runs if run["side"] != "ours"]
    return ours, theirs


def times(ours: list[dict], theirs: list[dict], goal: float | None) -> list[str]:
    """The cells on CPU and wall time."""
    return [
        f"{middle(ours, 'cpu_ms'):.0f}",
        f"{middle(theirs, 'cpu_ms'):.0f}",
        ratio_cell(ours, theirs, "cpu_ms", goal),
        goal_cell(goal),
        f"{middle(ours, 'wall_ms'):.0f}",
        f"{middle(theirs, 'wall_ms'):.0f}",
        ratio_cell(ours, theirs, "wall_ms", None),
    ]


def ratio_cell(ours: list[dict], theirs: list[dict], name: str, goal: float | None) -> str:
    """TRL / ours, bold if the goal is reached, and its range over the rounds that both have done."""
    ratio = middle(theirs, name) / middle(ours, name)
    of_rounds = [y[name] / x[name] for x, y in zip(ours, theirs, strict=False)]
    bold = "**" if goal and ratio >= goal else ""
    return f"{bold}{ratio:.2f}{bold} ({min(of_rounds):.2f} to {max(of_rounds):.2f})"


def goal_cell(goal: float | None) -> str:
    return f"{goal:.2f}" if goal else ""


def details(ours: list[dict], theirs: list[dict]) -> list[str]:
    """The cells on rollout and update, tokens, groups, memory and the first step; empty where a case has no such."""
    cells = []
    for side in (ours, theirs):
        rollout = middle(side, "rollout_cpu_ms")
        cells.append(f"{rollout:.0f}" if rollout else "")
    for side in (ours, theirs):
        update = middle(side, "cpu_ms") - middle(side, "rollout_cpu_ms")
        cells.append(f"{update:.0f}")
    for name, digits in (("tokens", 0), ("informative", 2), ("peak_mb", 0), ("first_step_s", 1)):
        for side in (ours, theirs):
            cells.append(f"{middle(side, name):.{digits}f}" if name in side[0] else "")
    return cells


def middle(records: list[dict], name: str) -> float:
    return statistics.median(record[name] for record in records)


def head(names: str) -> list[str]:
    """The two lines above the rows of a table; | stands between the names."""
    columns = names.split("|")
    return [table_row(*columns), "|---" * len(columns) + "|"]


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


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
        measure_all(flags)
    table = flags.out.with_suffix(".md")
    table.write_text(page(json.loads(flags.out.read_text())))
    print(table.read_text())


def measure_all(flags: argparse.Namespace) -> None:
    """Write the record. It is written anew after each run: --table shows what there is."""
    pythons = make_environments(flags.envs.resolve(), flags.ours_python)
    packages = ["torch", "transformers", "accelerate"]
    record = {
        "command": f"python benchmarks/trl.py --steps {flags.steps} --rounds {flags.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "versions": {side: versions(python, packages) for side, python in pythons.items()},
        "steps": flags.steps,
        "rounds": flags.rounds,
        "results": [],
        "profiles": [],
    }
    for result in measure(pythons, flags.case, flags.size, flags.steps, flags.rounds):
        record["results"].append(result)
        flags.out.write_text(json.dumps(record, indent=1) + "\n")
    record["profiles"] = list(profiles(pythons, flags.case, flags.size))
    flags.out.write_text(json.dumps(record, indent=1) + "\n")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return "a CPU"


if __name__ == "__main__":
    main()
