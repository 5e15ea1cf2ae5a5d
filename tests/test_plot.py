"""plot.py: which runs become one curve, what stands on the page, and what bad input says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from matplotlib.image import imread

import plot


def make_run(folder: Path, steps: int = 4, metrics: dict | None = None, **config) -> Path:
    """A run with a reward of `seed` + step and evaluations at steps 0, 2, 4, ..."""
    config = {"script": "grpo", "seed": 0, "out": str(folder), "resume": None, "track": "none", "lr": 0.1} | config
    records = []
    for step in range(steps + 1):
        record = {"step": step}
        if step > 0:
            record |= {"reward": config["seed"] + step, "seconds": 3.0} | (metrics or {})
        if step % 2 == 0:
            record |= {"eval_accuracy": 0.3, "eval_pass@1": 0.2 + step / 10, "eval_pass@8": 0.9}
        records.append(record)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def panels(page) -> dict:
    return {ax.get_title(): ax for ax in page.axes}


def legend(page) -> list[str]:
    return [text.get_text() for text in page.legends[0].get_texts()]


def bold(ax) -> list:
    return [line for line in ax.lines if line.get_linewidth() > 2]


def test_the_picture_is_written_and_not_blank(tmp_path):
    plot.draw([make_run(tmp_path / "a")], out=tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")[..., :3]
    blue = np.abs(pixels - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02
    assert blue.sum() > 500  # the curves, not only axes and text
    assert (tmp_path / "curves.png").stat().st_size < 400_000


def test_drawing_does_not_touch_pyplot(tmp_path):
    make_run(tmp_path / "a")
    code = "import sys, plot; plot.figure([plot.Path(sys.argv[1])]); print('matplotlib.pyplot' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, cwd=Path(plot.__file__).parent, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_importing_does_not_import_matplotlib():
    code = "import sys, plot; print('matplotlib' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(plot.__file__).parent, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_one_run_shows_every_evaluation_unsmoothed_and_only_panels_with_data(tmp_path):
    page = plot.figure([make_run(tmp_path / "a")])
    assert list(panels(page)) == ["Held-out accuracy", "Reward in training", "Time per step, total"]
    lines = panels(page)["Held-out accuracy"].lines
    assert [(line.get_label(), line.get_linestyle()) for line in lines] == [
        ("one sample", "-"), ("any of 8", "--"), ("greedy", ":")
    ]  # fmt: skip
    assert list(lines[0].get_xdata()) == [0, 2, 4]
    assert list(lines[0].get_ydata()) == pytest.approx([0.2, 0.4, 0.6])


def test_training_metrics_of_one_run_are_smoothed_over_the_raw_line(tmp_path):
    run = make_run(tmp_path / "a", steps=60)  # a window of 2 steps on each side
    raw, mean = panels(plot.figure([run]))["Reward in training"].lines
    assert list(raw.get_ydata()) == list(range(1, 61))
    assert mean.get_ydata()[0] == 2 and mean.get_ydata()[30] == 31  # at the edge the mean of 1, 2, 3


@pytest.mark.parametrize(
    ("count", "band", "low"), [(3, "min to max", 1.0), (5, "mean ± 1 std", 3 - np.std(range(5), ddof=1))]
)
def test_seeds_of_one_curve_become_mean_and_band(tmp_path, count, band, low):
    page = plot.figure([make_run(tmp_path / str(seed), seed=seed, track=f"{seed}") for seed in range(count)])
    assert legend(page) == [f"grpo ({count} seeds, band: {band})"]
    ax = panels(page)["Reward in training"]
    assert list(bold(ax)[0].get_ydata()) == pytest.approx([(count - 1) / 2 + step for step in range(1, 5)])
    vertices = ax.collections[0].get_paths()[0].vertices
    assert vertices[vertices[:, 0] == 1][:, 1].min() == pytest.approx(low)


def test_a_curve_ends_where_its_shortest_seed_ends(tmp_path):
    runs = [make_run(tmp_path / "a", steps=6), make_run(tmp_path / "b", steps=3, seed=1)]
    line = bold(panels(plot.figure(runs))["Reward in training"])[0]
    assert list(line.get_xdata()) == [1, 2, 3]


def test_labels_name_only_settings_that_differ(tmp_path):
    runs = [make_run(tmp_path / "a", beta=0.1), make_run(tmp_path / "b", lr=0.5, beta=0.1, seed=7)]
    assert list(plot.curves(runs)) == ["grpo lr=0.1", "grpo lr=0.5"]


def test_settings_of_one_script_only_are_not_named(tmp_path):
    runs = [make_run(tmp_path / "a", clip=0.2), make_run(tmp_path / "b", script="rloo")]
    assert list(plot.curves(runs)) == ["grpo", "rloo"]


def test_a_setting_that_an_older_run_lacks_still_separates(tmp_path):
    runs = [make_run(tmp_path / "a", clip=0.2), make_run(tmp_path / "b")]
    assert list(plot.curves(runs)) == ["grpo clip=0.2", "grpo"]


def test_several_curves_are_compared_by_one_line_each(tmp_path):
    page = plot.figure([make_run(tmp_path / "a"), make_run(tmp_path / "b", script="rloo")])
    lines = panels(page)["Held-out accuracy, one sample"].lines
    assert len(lines) == 2 and {line.get_linestyle() for line in lines} == {"-"}
    handles = page.legends[0].legend_handles
    assert [handle.get_color() for handle in handles] == [line.get_color() for line in lines]
    assert lines[0].get_color() != lines[1].get_color()


def test_a_run_given_twice_is_one_seed(tmp_path):
    run = make_run(tmp_path / "a")
    assert [len(seeds) for seeds in plot.curves([run, run]).values()] == [1]


def test_nulls_nans_and_texts_are_left_out(tmp_path):
    run = make_run(tmp_path / "a", metrics={"response_length_right": None, "kl": float("nan"), "note": "x"})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "response_length_right": 7.0, "reward": null}\n')
    _, metrics = plot.read_run(run)
    assert metrics["response_length_right"] == {5: 7.0}
    assert 5 not in metrics["reward"] and not {"kl", "note"} & set(metrics)
    assert "KL to the reference model" not in panels(plot.figure([run]))


def test_metrics_without_a_panel_get_their_own_up_to_nine(tmp_path):
    run = make_run(tmp_path / "a", script="dpo", metrics={f"margin{i}": 1.0 for i in range(20)})
    titles = list(panels(plot.figure([run])))
    assert titles[3:] == [f"margin{i}" for i in range(6)]


def test_a_half_written_last_line_is_ignored(tmp_path):
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert list(plot.read_run(run)[1]["reward"]) == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ['{"step": 2, "rew', "3", '{"reward": 1.0}', ""])
def test_a_broken_line_is_named(tmp_path, line):
    path = make_run(tmp_path / "a") / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(SystemExit, match=r"metrics\.jsonl:3: "):
        plot.read_run(path.parent)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    run = make_run(tmp_path / "a")
    (run / name).unlink()
    with pytest.raises(SystemExit, match=rf"not a run.*No such file.*{name}"):
        plot.figure([run])


@pytest.mark.parametrize("text", ["[1]", '{"script"'])
def test_a_broken_configuration_is_refused(tmp_path, text):
    run = make_run(tmp_path / "a")
    (run / "config.json").write_text(text)
    with pytest.raises(SystemExit, match="not a run"):
        plot.figure([run])


@pytest.mark.parametrize("text", ["", '{"step": 0}\n', '{"ste'])
def test_empty_metrics_are_refused(tmp_path, text):
    run = make_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="no metrics"):
        plot.draw([run], out=tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("name", ["curves", "curves.txt", "missing/curves.png"])
def test_a_bad_out_is_refused_before_the_runs_are_read(tmp_path, name):
    with pytest.raises(SystemExit, match="--out"):
        plot.draw([tmp_path / "no run"], out=tmp_path / name)


def test_the_command_line(tmp_path):
    script = [sys.executable, plot.__file__]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: python plot.py runs/a")
    make_run(tmp_path / "a")
    subprocess.run([*script, "a", "--out", "b.png"], cwd=tmp_path, check=True)
    assert imread(tmp_path / "b.png").size
    assert (tmp_path / "b.png").exists()


def test_more_steps_or_other_intervals_make_no_other_curve(tmp_path):
    runs = [make_run(tmp_path / "a", eval_every=2, save_every=1), make_run(tmp_path / "b", steps=6, seed=1)]
    assert list(plot.curves(runs)) == ["grpo"]


def test_all_curves_are_smoothed_alike(tmp_path):
    runs = [make_run(tmp_path / "a", steps=60), make_run(tmp_path / "b", steps=20, script="rloo")]
    short = bold(panels(plot.figure(runs))["Reward in training"])[1]
    assert short.get_ydata()[0] == 2, "the mean of 1, 2, 3, as in the longer run"


def test_metrics_names_what_is_drawn(tmp_path):
    run = make_run(tmp_path / "a")
    assert list(panels(plot.figure([run], ["reward", "eval_pass@1"]))) == ["reward", "eval_pass@1"]
    with pytest.raises(SystemExit, match="--metrics rewards: no run has it; there are eval_accuracy"):
        plot.draw([run], ("rewards",), tmp_path / "curves.png")


@pytest.mark.parametrize("metrics", [["reward,eval_pass@1"], ["reward", "eval_pass@1"], ["reward,", "eval_pass@1"]])
def test_metrics_stand_apart_by_commas_or_spaces(tmp_path, monkeypatch, metrics):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda folders, out, wanted: drawn.append((folders, wanted)))
    run = make_run(tmp_path / "a")
    tyro.cli(plot.draw, args=[str(run), "--metrics", *metrics, "--out", str(tmp_path / "b.png")])
    assert drawn == [([run], ["reward", "eval_pass@1"])]


def test_where_the_curves_end_is_printed(tmp_path, capsys):
    plot.draw([make_run(tmp_path / str(seed), seed=seed) for seed in (0, 2)], ("reward",), tmp_path / "curves.png")
    assert capsys.readouterr().out == "grpo (2 seeds): reward 5 ± 1.4 at step 4\n"


def test_a_held_out_reward_has_its_panel_whatever_else_there_is(tmp_path):
    metrics = {"eval_reward/waits": 0.5} | {f"more{i}": 1.0 for i in range(20)}
    run = make_run(tmp_path / "a", metrics=metrics)
    found = panels(plot.figure([run]))
    assert list(found)[:2] == ["waits (held out)", "Held-out accuracy"] and len(found) == 9
    assert found["waits (held out)"].get_ylabel() == "mean reward"
    assert list(panels(plot.figure([run], ["eval_reward/waits"]))) == ["waits (held out)"]
