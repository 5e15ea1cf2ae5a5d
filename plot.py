"""Draw the metrics of runs over each other, and print where they end.

python plot.py runs/a runs/b --metrics eval_pass@1,reward --out curves.png
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tyro

from plumbing.fail import fail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Panel(NamedTuple):
    """Several curves are compared by the first of its metrics that they have."""

    title: str
    unit: str  # of the y axis
    legends: dict[str, str]  # metric -> its name in the legend


PANELS = [
    Panel("Held-out accuracy", "share",
          {"eval_pass@1": "one sample", "eval_pass@8": "any of 8", "eval_accuracy": "greedy"}),
    Panel("Reward in training", "mean reward", {"reward": "reward"}),
    Panel("Response length", "tokens",
          {"response_length": "all answers", "response_length_right": "right", "response_length_wrong": "wrong"}),
    Panel("Thinking in the right format", "share of responses", {"reward/format": "format"}),
    Panel("KL to the reference model", "nats per token", {"kl": "KL"}),
    Panel("Entropy of the policy", "nats per token", {"entropy": "entropy"}),
    Panel("Pairs in the right order", "share", {"eval_pair_accuracy": "held out"}),
    Panel("Pairs: held-out implicit rewards", "reward",
          {"eval_margin": "margin", "eval_reward_chosen": "chosen", "eval_reward_rejected": "rejected"}),
    Panel("Pairs: loss", "nats", {"eval_loss": "held out"}),
    Panel("Pairs: length", "tokens", {"eval_length_chosen": "chosen", "eval_length_rejected": "rejected"}),
    Panel("Pairs: held-out log-probs", "nats", {"eval_logp_chosen": "chosen", "eval_logp_rejected": "rejected"}),
    Panel("Training batch", "share", {"informative_groups": "informative groups", "truncated": "truncated"}),
    Panel("Gradient norm", "norm", {"grad_norm": "norm"}),
    Panel("Time per step", "seconds",
          {"seconds": "total", "seconds_rollout": "rollout", "seconds_update": "update"}),
]  # fmt: skip
WITHOUT_PANEL = ["eval_format", "eval_response_length"]
MOST_PANELS = 9  # more on a page is illegible
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe-Ito: colour-blind safe
STYLES = ["-", "--", ":"]
SEEDS_FOR_STD = 5  # of fewer seeds the band shows the range
NO_LABEL = {
    "script",
    "seed",
    "out",
    "resume",
    "track",
    "steps",
    "eval_every",
    "save_every",
}  # these tell no curves apart


def read_run(folder: Path) -> tuple[dict, dict]:
    """The configuration of a run and its metrics[name][step]; null, NaN and infinity count as missing."""
    try:
        config = {"script": "run", **json.loads((folder / "config.json").read_text())}
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except (OSError, ValueError, TypeError) as error:
        fail(f"{folder}: not a run with config.json and metrics.jsonl ({error})")
    metrics: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, TypeError, AttributeError, KeyError):
            if number == len(lines):
                break  # the run was stopped while it wrote this line
            fail(f"{folder}/metrics.jsonl:{number}: not a JSON object with a step")
        for name, value in record.items():
            if isinstance(value, int | float) and np.isfinite(value):
                metrics.setdefault(name, {})
                metrics[name][step] = value
    if not metrics:
        fail(f"{folder}/metrics.jsonl: no metrics in it")
    return config, metrics


def differing_settings(configs: list[dict]) -> set[str]:
    """What tells curves apart, save for settings that other scripts do not have."""
    differing = set()
    for a in configs:
        for b in configs:
            for key in a:
                if key not in b and a["script"] != b["script"]:
                    continue
                if a[key] != b.get(key):
                    differing.add(key)
    return differing - NO_LABEL


def curves(folders: list[Path]) -> dict[str, list[dict]]:
    """Label -> the metrics of its seeds. A label names the script and the settings that differ."""
    configs = []
    all_metrics = []
    for folder in dict.fromkeys(folders):  # a run given twice is one seed
        config, metrics = read_run(folder)
        configs.append(config)
        all_metrics.append(metrics)
    differing = differing_settings(configs)
    found: dict[str, list[dict]] = {}
    for config, metrics in zip(configs, all_metrics, strict=True):
        label = config["script"]
        for key, value in config.items():
            if key in differing:
                label += f" {key}={value}"
        found.setdefault(label, [])
        found[label].append(metrics)
    return found


def values_of(seeds: list[dict], name: str) -> tuple[list[int], np.ndarray]:
    """The S steps at which all seeds of a curve have a metric, and its values there, [seeds, S].

    A mean over fewer seeds would jump.
    """
    shared = set(seeds[0].get(name, {}))
    for metrics in seeds[1:]:
        shared &= set(metrics.get(name, {}))
    steps = sorted(shared)
    return steps, np.array([[metrics[name][step] for step in steps] for metrics in seeds])


def draw_line(ax: "Axes", seeds: list[dict], name: str, label: str, colour: str, style: str, neighbours: int) -> None:
    """The mean of several seeds and their band; or each step of one run, thin, under the running mean, bold."""
    steps, values = values_of(seeds, name)
    line = values.mean(0)
    is_evaluation = name.startswith("eval_")  # a mean over many problems already, so not smoothed
    if len(seeds) > 1:
        low, high = band(values)
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    elif not is_evaluation:
        ax.plot(steps, line, color=colour, alpha=0.35, linewidth=0.8)
        line = running_mean(line, neighbours)
    marker = ""
    if is_evaluation or len(steps) == 1:
        marker = "o"
    ax.plot(steps, line, style, color=colour, linewidth=2.5, marker=marker, label=label)


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its lower and its upper edge, for values of shape [seeds, steps]."""
    if len(values) < SEEDS_FOR_STD:
        return values.min(0), values.max(0)
    mean = values.mean(0)
    std = values.std(0, ddof=1)
    return mean - std, mean + std


def running_mean(values: np.ndarray, neighbours: int) -> list[float]:
    """Each value's mean with so many neighbours on each side."""
    means = []
    for i in range(len(values)):
        start = max(0, i - neighbours)
        means.append(values[start : i + neighbours + 1].mean())
    return means


def smoothing(found: dict[str, list[dict]]) -> int:
    """How many neighbours a running mean has on each side, the same for all curves: a thirtieth of the longest run."""
    lengths = [len(values) for seeds in found.values() for metrics in seeds for values in metrics.values()]
    return max(lengths) // 30


def choose_panels(names: list[str], wanted: list[str]) -> list[Panel]:
    """A panel for each wanted metric.

    Without any: those of the held-out rewards, those of PANELS that have data, and one for each metric in none of them.
    """
    if wanted:
        missing = [name for name in wanted if name not in names]
        if missing:
            fail(f"--metrics {missing[0]}: no run has it; there are {', '.join(sorted(names))}")
        return [panel_of(name) for name in wanted]
    rewards = [name for name in names if name.startswith("eval_reward/")]  # named on the command line, so wanted
    panels = [panel_of(name) for name in rewards]
    known = {*WITHOUT_PANEL, *rewards}
    for panel in PANELS:
        known.update(panel.legends)
        if any(name in names for name in panel.legends):
            panels.append(panel)
    for name in names:
        if name not in known:
            panels.append(panel_of(name))
    return panels[:MOST_PANELS]


def panel_of(metric: str) -> Panel:
    """A panel of this metric alone."""
    if metric.startswith("eval_reward/"):
        name = metric.removeprefix("eval_reward/")
        return Panel(f"{name} (held out)", "mean reward", {metric: name})
    return Panel(metric, "value", {metric: metric})


def draw_panel(ax: "Axes", panel: Panel, found: dict[str, list[dict]], names: list[str], neighbours: int) -> None:
    """One panel with all curves: of a single one all metrics of the panel, of several one metric."""
    shown = [name for name in panel.legends if name in names]
    if len(found) > 1:
        shown = shown[:1]
    for i, seeds in enumerate(found.values()):
        for j, name in enumerate(shown):
            colour = COLOURS[(i + j) % len(COLOURS)]
            style = STYLES[(i // len(COLOURS) + j) % len(STYLES)]
            draw_line(ax, seeds, name, panel.legends[name], colour, style, neighbours)
    title = panel.title
    pad = 8
    if len(shown) > 1:
        pad = 28  # the legend stands above the panel, where it hides no data
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=12, frameon=False, columnspacing=1)
    elif len(panel.legends) > 1:
        title += f", {panel.legends[shown[0]]}"
    ax.set_title(title, fontsize=15, pad=pad)
    ax.set_xlabel("step", fontsize=13)
    ax.set_ylabel(panel.unit, fontsize=13)
    ax.tick_params(labelsize=12)
    ax.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    if panel.unit.startswith("share"):
        ax.set_ylim(-0.03, 1.03)


def heading(label: str, seeds: list[dict]) -> str:
    """What the legend of the page says of a curve."""
    if len(seeds) == 1:
        return f"{label} (bold: running mean)"
    if len(seeds) < SEEDS_FOR_STD:
        return f"{label} ({len(seeds)} seeds, band: min to max)"
    return f"{label} ({len(seeds)} seeds, band: mean ± 1 std)"


def figure(folders: list[Path], wanted: list[str] | None = None) -> "Figure":
    """The runs in these folders on one page, to show in a notebook or to save.

    wanted: the metrics to draw, a panel each; without it a choice of all there are
    """
    from matplotlib.figure import Figure  # not pyplot, which would change the plotting state of a notebook

    found = curves(folders)
    names = []  # of all metrics
    for seeds in found.values():
        for metrics in seeds:
            names += [name for name in metrics if name not in names]
    panels = choose_panels(names, wanted or [])
    neighbours = smoothing(found)
    rows = (len(panels) + 2) // 3
    columns = min(3, len(panels))
    width = 4.6 * columns
    height = 3.2 * rows + 0.3 * len(found) + 0.2
    page = Figure(figsize=(width, height), layout="constrained")
    for place, panel in enumerate(panels, 1):
        ax = page.add_subplot(rows, columns, place)
        draw_panel(ax, panel, found, names, neighbours)
    headings = [heading(label, seeds) for label, seeds in found.items()]
    lines, _ = page.axes[0].get_legend_handles_labels()  # with several curves one line each, else one per metric
    page.legend(lines[: len(headings)], headings, loc="outside upper center", fontsize=14, frameon=False)
    return page


def final_values(folders: list[Path], wanted: list[str]) -> list[str]:
    """A line for each curve: what its metrics end at, the mean of the seeds and their std if there are several."""
    lines = []
    for label, seeds in curves(folders).items():
        parts = []
        for name in wanted or ["eval_pass@1", "eval_accuracy", "reward", "response_length"]:
            steps, values = values_of(seeds, name)
            if not steps:
                continue
            final = values[:, -1]
            spread = f" ± {final.std(ddof=1):.2g}" if len(seeds) > 1 else ""
            parts.append(f"{name} {final.mean():.3g}{spread} at step {steps[-1]}")
        seeds_in_words = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        lines.append(f"{label} ({seeds_in_words}): {', '.join(parts)}")
    return lines


def save(folders: list[Path], out: Path, wanted: list[str] | None = None) -> None:
    """Write the page of these runs."""
    figure(folders, wanted).savefig(out, dpi=90)


def reliability(bins: list[list[tuple]], out: Path, of: str = "confidence in the order of a pair") -> None:
    """Write a reliability diagram: for each bin of (confidence, right), the share that is right against the confidence.

    A dot is as large as its bin; below the diagonal the model is too sure. of: what the confidence is
    """
    from matplotlib.figure import Figure

    held = [values for values in bins if values]
    confidence = [float(np.mean([c for c, _ in values])) for values in held]
    right = [float(np.mean([r for _, r in values])) for values in held]
    size = [20 + 400 * len(values) / sum(map(len, held)) for values in held]
    page = Figure(figsize=(5, 5), layout="constrained")
    ax = page.add_subplot()
    low = 0.5 if min(confidence) >= 0.5 else 0.0
    ax.plot([low, 1], [low, 1], color="#777777", linestyle="--", label="calibrated")
    ax.plot(confidence, right, color=COLOURS[0])
    ax.scatter(confidence, right, size, color=COLOURS[0], label="held out")
    ax.set(xlabel=of, ylabel="share that is right", ylim=(0, 1.02))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    page.savefig(out, dpi=90)


def bars(tables: dict[str, dict[str, dict]], metrics: list[str], out: Path) -> None:
    """Write a picture of models side by side: a panel for each row of their tables, a bar with its error per metric.

    tables: model -> name of a row -> metric -> (mean, standard error)
    """
    from matplotlib.figure import Figure

    rows = list(next(iter(tables.values())))
    across = min(3, len(rows))
    down = -(-len(rows) // across)
    page = Figure(figsize=(5.5 * across, 3.6 * down + 0.6), layout="constrained")
    width = 0.8 / len(tables)
    for place, row in enumerate(rows, 1):
        ax = page.add_subplot(down, across, place)
        for i, (model, table) in enumerate(tables.items()):
            means = [table[row][metric][0] for metric in metrics]
            errors = [table[row][metric][1] for metric in metrics]
            x = np.arange(len(metrics)) + (i - (len(tables) - 1) / 2) * width
            ax.bar(x, means, width, yerr=errors, capsize=3, color=COLOURS[i % len(COLOURS)], label=model)
        ax.set_title(row)
        ax.set_xticks(range(len(metrics)), metrics, rotation=20)
        ax.set_ylim(top=1.02)
        ax.grid(alpha=0.3, axis="y")
    handles, labels = page.axes[0].get_legend_handles_labels()
    page.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    page.savefig(out, dpi=90)


def draw(
    folders: tyro.conf.Positional[list[Path]], metrics: tuple[str, ...] = (), out: Path = Path("curves.png")
) -> None:
    """Draw runs over each other; those that differ only in seed, out, resume or track become a mean and a band.

    Args:
        folders: Folders of runs, such as runs/grpo runs/rloo. A single run is drawn in more detail.
        metrics: Names of metrics.jsonl, with spaces or commas between them, to draw these only.
        out: The picture to write; its ending gives the format: .png, .pdf or .svg.
    """
    if not folders:
        fail("usage: python plot.py runs/a [runs/b ...] [--metrics a b] [--out curves.png]")
    if out.suffix not in (".png", ".pdf", ".svg") or not out.parent.is_dir():
        fail(f"--out {out}: must end in .png, .pdf or .svg and lie in a folder that exists")
    wanted = [name for name in ",".join(metrics).split(",") if name]
    save(folders, out, wanted)
    print("\n".join(final_values(folders, wanted)))


if __name__ == "__main__":
    tyro.cli(draw)
