"""Draw the metrics of runs over each other: `python plot.py runs/a runs/b --out curves.png`."""

import json
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure  # not pyplot, which would change the plotting state of a notebook

PANELS = [  # title, y axis, metric -> legend; several curves are compared by the first metric only
    ("Held-out accuracy", "share", {"eval_pass@1": "one try", "eval_pass@8": "any of 8", "eval_accuracy": "greedy"}),
    ("Reward in training", "mean reward", {"reward": "reward"}),
    ("Response length", "tokens",
     {"response_length": "all answers", "response_length_right": "right", "response_length_wrong": "wrong"}),
    ("Thinking in the right format", "share of responses", {"reward/format": "format"}),
    ("KL to the reference model", "nats per token", {"kl": "KL"}),
    ("Entropy of the policy", "nats per token", {"entropy": "entropy"}),
    ("Pairs in the right order", "share", {"eval_pair_accuracy": "held out"}),
    ("Pairs: held-out implicit rewards", "reward",
     {"eval_margin": "margin", "eval_reward_chosen": "chosen", "eval_reward_rejected": "rejected"}),
    ("Pairs: loss", "nats", {"eval_loss": "held out"}),
    ("Pairs: length", "tokens", {"eval_length_chosen": "chosen", "eval_length_rejected": "rejected"}),
    ("Pairs: held-out log-probs", "nats", {"eval_logp_chosen": "chosen", "eval_logp_rejected": "rejected"}),
    ("Training batch", "share", {"informative_groups": "informative groups", "truncated": "truncated"}),
    ("Gradient norm", "norm", {"grad_norm": "norm"}),
    ("Time per step", "seconds", {"seconds": "total", "seconds_rollout": "rollout", "seconds_update": "update"}),
]  # fmt: skip
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe-Ito: colour-blind safe
STYLES = ["-", "--", ":"]


def read_run(folder: Path) -> tuple[dict, dict]:
    """The configuration of a run and its metrics[name][step]; null, NaN and infinity count as missing."""
    try:
        config = {"script": "run", **json.loads((folder / "config.json").read_text())}
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{folder}: not a run with config.json and metrics.jsonl ({error})") from None
    metrics: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, TypeError, AttributeError, KeyError):
            if number == len(lines):
                break  # the run was stopped while it wrote this line
            raise SystemExit(f"{folder}/metrics.jsonl:{number}: not a JSON object with a step") from None
        for name, value in record.items():
            if isinstance(value, int | float) and np.isfinite(value):
                metrics.setdefault(name, {})[step] = value
    if not metrics:
        raise SystemExit(f"{folder}/metrics.jsonl: no metrics in it")
    return config, metrics


def curves(folders: list[Path]) -> dict[str, list[dict]]:
    """Label -> seeds. A label names the script and what differs, save for settings that other scripts do not have."""
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    pairs = [(a, b) for a, _ in runs for b, _ in runs]
    differing = {k for a, b in pairs for k in a if a[k] != b.get(k) and (k in b or a["script"] == b["script"])}
    differing -= {"script", "seed", "out", "resume", "track"}
    found: dict[str, list[dict]] = {}
    for config, metrics in runs:
        label = " ".join([config["script"], *(f"{k}={v}" for k, v in config.items() if k in differing)])
        found.setdefault(label, []).append(metrics)
    return found


def draw_line(ax, seeds: list[dict], name: str, label: str, colour: str, style: str) -> None:
    """The mean of several seeds and their band; or each step of one run, thin, under the running mean, bold."""
    steps = sorted(set.intersection(*(set(metrics.get(name, {})) for metrics in seeds)))  # a mean over fewer would jump
    values = np.array([[metrics[name][step] for step in steps] for metrics in seeds])  # [seeds, steps]
    line, marker = values.mean(0), "o" if name.startswith("eval_") or len(steps) == 1 else ""
    if len(seeds) > 1:
        std = values.std(0, ddof=1)
        low, high = (line - std, line + std) if len(seeds) >= 5 else (values.min(0), values.max(0))
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    elif not name.startswith("eval_"):  # an evaluation is a mean over many problems already
        ax.plot(steps, line, color=colour, alpha=0.35, linewidth=0.8)
        k = len(line) // 30
        line = [line[max(0, i - k) : i + k + 1].mean() for i in range(len(line))]
    ax.plot(steps, line, style, color=colour, linewidth=2.5, marker=marker, label=label)


def figure(folders: list[Path]) -> Figure:
    """The runs in these folders on one page, to show in a notebook or to save."""
    found = curves(folders)
    names = dict.fromkeys(name for seeds in found.values() for metrics in seeds for name in metrics)
    known = {"eval_format", "eval_response_length", *(name for panel in PANELS for name in panel[2])}
    others = [(name, "value", {name: name}) for name in names if name not in known]
    panels = [panel for panel in PANELS + others if any(name in names for name in panel[2])][:9]  # more is illegible
    rows, columns = (len(panels) + 2) // 3, min(3, len(panels))
    page = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.3 * len(found) + 0.2), layout="constrained")
    for place, (title, unit, legends) in enumerate(panels, 1):
        ax = page.add_subplot(rows, columns, place)
        shown = [name for name in legends if name in names][: None if len(found) == 1 else 1]
        for i, seeds in enumerate(found.values()):
            for j, name in enumerate(shown):
                draw_line(ax, seeds, name, legends[name], COLOURS[(i + j) % 7], STYLES[(i // 7 + j) % 3])
        if len(shown) > 1:  # above the panel, where it hides no data
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=12, frameon=False, columnspacing=1)
        elif len(legends) > 1:
            title += f", {legends[shown[0]]}"
        ax.set_title(title, fontsize=15, pad=28 if len(shown) > 1 else 8)
        ax.set_xlabel("step", fontsize=13)
        ax.set_ylabel(unit, fontsize=13)
        ax.tick_params(labelsize=12)
        ax.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
        if unit.startswith("share"):
            ax.set_ylim(-0.03, 1.03)
    heads = []
    for label, seeds in found.items():
        band = "mean ± 1 std" if len(seeds) >= 5 else "min to max"
        heads.append(label + (f" ({len(seeds)} seeds, band: {band})" if len(seeds) > 1 else " (bold: running mean)"))
    lines = page.axes[0].get_legend_handles_labels()[0][: len(heads)]
    page.legend(lines, heads, loc="outside upper center", fontsize=14, frameon=False)
    return page


def draw(folders: tyro.conf.Positional[list[Path]], out: Path = Path("curves.png")) -> None:
    """Draw runs over each other; those that differ only in seed, out, resume or track become a mean and a band.

    Args:
        folders: Folders of runs, such as runs/grpo runs/rloo. A single run is drawn in more detail.
        out: The picture to write; its ending gives the format: .png, .pdf or .svg.
    """
    if not folders:
        raise SystemExit("usage: python plot.py runs/a [runs/b ...] [--out curves.png]")
    if out.suffix not in (".png", ".pdf", ".svg") or not out.parent.is_dir():
        raise SystemExit(f"--out {out}: must end in .png, .pdf or .svg and lie in a folder that exists")
    figure(folders).savefig(out, dpi=90)


if __name__ == "__main__":
    tyro.cli(draw)
