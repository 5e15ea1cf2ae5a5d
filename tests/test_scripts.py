"""The scripts as a user runs them: they learn, repeat themselves to the bit, resume, and refuse bad input."""

import importlib
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_jsonl, run_script, without_times

import grpo
from batch import Rollouts
from data import load_task
from logprobs import Policy, load_model
from plumbing.flags import check_config, parse

SCRIPTS = ["grpo.py", "sft.py"]
SMALL = ["--prompts-per-step", "4", "--group-size", "4", "--eval-prompts", "8"]
METRICS = """step loss reward reward/accuracy reward/format reward_std accuracy response_length response_length_right
response_length_wrong truncated informative_groups kl entropy clip_fraction ratio_max grad_norm lr sampler_gap tokens
seconds_rollout seconds_update seconds""".split()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of 30 steps, long enough to learn to think."""
    out = tmp_path_factory.mktemp("learned") / "run"
    run_script("grpo.py", "--steps", 30, "--eval-every", 15, "--out", out)
    return out


def test_accuracy_rises_and_the_model_learns_to_think(learned):
    before, *_, after = [record for record in read_jsonl(learned / "metrics.jsonl") if "eval_pass@1" in record]
    assert before["step"] == 0 and after["step"] == 30
    assert after["eval_pass@1"] > before["eval_pass@1"] + 0.25
    assert after["eval_format"] > before["eval_format"] + 0.25
    assert after["eval_response_length"] > before["eval_response_length"] + 3


def test_a_run_leaves_all_it_should(learned):
    records = read_jsonl(learned / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(31))
    for record in records[1:]:
        assert set(METRICS) <= record.keys()
        assert all(math.isfinite(record[name]) for name in METRICS if record[name] is not None)
    first = records[1]
    assert first["kl"] == pytest.approx(0, abs=1e-6), "it starts at the reference"
    assert first["clip_fraction"] == 0 and first["ratio_max"] == 1, "one update: the policy is pi_old"
    assert first["sampler_gap"] < 1e-4 and first["grad_norm"] > 0.01 and abs(first["loss"]) < 1e-5
    assert first["lr"] == grpo.Config().lr and first["tokens"] == first["response_length"] * 128
    assert records[-1]["kl"] > 0.001
    config = json.loads((learned / "config.json").read_text())
    assert config["script"] == "grpo" and config["steps"] == 30 and config["group_size"] == 8
    samples = read_jsonl(learned / "samples.jsonl")
    assert {sample["step"] for sample in samples} == {1, 15, 30}
    assert {"question", "answer", "completion", "finish_reason", "reward", "advantage"} <= samples[0].keys()
    assert (learned / "curves.png").stat().st_size > 20_000


def test_the_saved_model_reloads_and_reproduces_its_accuracy(learned, tmp_path):
    last = read_jsonl(learned / "metrics.jsonl")[-1]
    run_script("grpo.py", "--model", learned / "model", "--steps", 1, "--lr", 0, "--out", tmp_path / "again")
    again = read_jsonl(tmp_path / "again" / "metrics.jsonl")[0]
    for name in ("eval_accuracy", "eval_pass@1", "eval_pass@8"):
        assert again[name] == last[name]


def test_resuming_continues_to_the_bit(tmp_path):
    flags = {"epochs": 2, "minibatches": 2, "eval_every": 2, "save_every": 3}
    whole = metrics_of(tmp_path, "whole", steps=6, **flags)
    # As if the power had failed in step 5: the checkpoint is that of step 3, later lines are there, the last one torn.
    metrics_of(tmp_path, "three", steps=3, **flags)
    metrics_of(tmp_path, "cut", steps=5, **flags)
    (tmp_path / "three" / "checkpoint.pt").replace(tmp_path / "cut" / "checkpoint.pt")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    run_script("grpo.py", "--resume", tmp_path / "cut", "--steps", 6)

    cut = without_times(read_jsonl(tmp_path / "cut" / "metrics.jsonl"))
    assert cut == whole and len(cut) == 7
    for name in ("samples.jsonl", "held_out.jsonl"):
        assert read_jsonl(tmp_path / "cut" / name) == read_jsonl(tmp_path / "whole" / name)
    one, other = (load_model(str(tmp_path / name / "model"), torch.device("cpu"))[0] for name in ("whole", "cut"))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)

    result = run_script("grpo.py", "--resume", tmp_path / "cut", "--lr", 1, check=False)
    assert result.returncode == 2 and "only --steps may change" in result.stderr.splitlines()[-1]

    checkpoint = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    del checkpoint["format"]  # as one of another version has none
    torch.save(checkpoint, tmp_path / "cut" / "checkpoint.pt")
    result = run_script("grpo.py", "--resume", tmp_path / "cut", "--steps", 7, check=False)
    assert result.returncode == 2 and "another version" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_after_the_step_and_saves(tmp_path):
    command = [sys.executable, "grpo.py", *SMALL, "--steps", "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err
    assert f"--resume {tmp_path / 'run'}" in out
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert saved == read_jsonl(metrics)[-1]["step"] >= 2
    load_model(str(tmp_path / "run" / "model"), torch.device("cpu"))


def metrics_of(tmp_path, name, **flags) -> list[dict]:
    """The metrics of a run of two steps, in this process."""
    small = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 2, "model": str(ROOT / "tiny")}
    grpo.main(grpo.Config(out=str(tmp_path / name), **small | flags))
    return without_times(read_jsonl(tmp_path / name / "metrics.jsonl"))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    run_script("grpo.py", *SMALL, "--steps", 2, "--out", tmp_path / "apart")
    apart = without_times(read_jsonl(tmp_path / "apart" / "metrics.jsonl"))
    one, other = metrics_of(tmp_path, "one"), metrics_of(tmp_path, "other", seed=1)
    assert one == apart, "in another process, with other hashes of strings"
    assert one[0] == other[0], "the held-out set and its samples belong to the task, not to the seed"
    assert one[1] != other[1]


def test_the_size_of_microbatches_changes_nothing_but_rounding(tmp_path):
    whole, split = (metrics_of(tmp_path, f"mb{n}", tokens_per_microbatch=n)[1] for n in (10**6, 1))
    for name, x in whole.items():
        assert split[name] == pytest.approx(x, rel=1e-4, abs=1e-6), name


def test_a_batch_without_an_informative_group_changes_no_weight(tmp_path):
    record = metrics_of(tmp_path, "none", beta=0.0, rewards=("accuracy=0",), lr=1.0)[-1]
    assert record["informative_groups"] == 0 and record["grad_norm"] == 0 and "kl" not in record
    before, after = (load_model(str(path), torch.device("cpu"))[0] for path in (ROOT / "tiny", tmp_path / "none/model"))
    for p, q in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q)
    state = torch.load(tmp_path / "none" / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    assert state == {}, "Adam never made a step"


@pytest.mark.parametrize(("beta", "references"), [(0.0, 0), (0.04, 1)])
def test_without_kl_no_reference_model_is_made(tmp_path, monkeypatch, beta, references):
    made = []
    reference = Policy.reference

    def make(policy):
        made.append(reference(policy))
        return made[-1]

    monkeypatch.setattr(Policy, "reference", make)
    metrics_of(tmp_path, "run", beta=beta)
    assert len(made) == references


def test_several_updates_per_rollout_move_the_ratio(tmp_path):
    record = metrics_of(tmp_path, "mu", epochs=3, minibatches=2, lr=3e-4)[1]
    assert record["ratio_max"] > 1.01 and record["sampler_gap"] < 1e-4
    assert 0 <= record["clip_fraction"] < 0.5


@pytest.mark.parametrize("script", ["grpo", "dr_grpo", "rloo", "kimi_k15", "ppo"])
def test_every_step_and_every_epoch_has_minibatches_of_its_own(tmp_path, monkeypatch, script):
    asked = []
    minibatch_rows = Rollouts.minibatch_rows

    def watched(self, *arguments):
        asked.append(arguments)
        return minibatch_rows(self, *arguments)

    monkeypatch.setattr(Rollouts, "minibatch_rows", watched)
    module = importlib.import_module(script)
    flags = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 2, "model": str(ROOT / "tiny")}
    module.main(module.Config(out=str(tmp_path / "run"), epochs=2, minibatches=2, eval_every=0, seed=3, **flags))
    assert asked == [(2, 3 * 10**6 + step, epoch) for step in (1, 2) for epoch in (0, 1)]


def test_two_processes_take_the_same_step_together(tmp_path):
    """Two processes share the work; their weights must stay equal, and the metrics must count both shares."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, grpo
from accelerate import Accelerator
from plumbing.processes import sum_gradients
rank, p, q = int(os.environ["RANK"]), torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
p.grad = None if rank else torch.ones(2)
sum_gradients(Accelerator(cpu=True), [p])
assert torch.equal(p.grad, torch.ones(2)), "a process without informative groups joins in with zeros"
q.grad = torch.full((2,), rank + 1.0)
sum_gradients(Accelerator(cpu=True), [q])
assert torch.equal(q.grad, torch.full((2,), 3.0)), "the sum, not the mean"
loaded, load = [], grpo.make_policy
grpo.make_policy = lambda *args: loaded.append(load(*args)) or loaded[-1]
grpo.main(grpo.Config(prompts_per_step=4, group_size=4, eval_prompts=8, steps=3, out={str(tmp_path / "run")!r}))
torch.save(loaded[0][0].model.state_dict(), {str(tmp_path)!r} + "/rank" + os.environ["RANK"])
"""
    (tmp_path / "two.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "two.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all(record["tokens"] == pytest.approx(record["response_length"] * 16) for record in records[1:])
    held_out = read_jsonl(tmp_path / "run" / "held_out.jsonl")
    questions = [example["question"] for example in load_task("arithmetic").test[:8]]
    assert [record["question"] for record in held_out] == 2 * questions, "of both processes, in order"
    one, other = (torch.load(tmp_path / f"rank{i}") for i in (0, 1))
    before = load_model(str(ROOT / "tiny"), "cpu")[0]
    for name, p in before.state_dict().items():
        assert torch.equal(one[name], other[name]) and not torch.equal(one[name], p)


def test_sft_learns_from_demonstrations_and_from_a_file(tmp_path):
    flags = ["--pairs-per-step", 16, "--eval-prompts", 4, "--eval-every", 0]
    run_script("sft.py", *flags, "--steps", 12, "--out", tmp_path / "whole")
    records = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert records[1]["loss"] == pytest.approx(math.log(106), abs=0.3), "a new model knows nothing"
    assert records[12]["loss"] < records[1]["loss"] - 0.5
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{i}+1=", "response": f"{i + 1}"}) + "\n" for i in range(40)))
    run_script("sft.py", *flags, "--model", "tiny", "--data", pairs, "--steps", 2, "--out", tmp_path / "pairs")
    records = read_jsonl(tmp_path / "pairs" / "metrics.jsonl")
    assert len(records) == 3
    assert records[2]["eval_loss"] < records[0]["eval_loss"], "of the pairs that are held out"


def test_metrics_can_also_go_to_a_tracker(tmp_path):
    metrics_of(tmp_path, "run", track="tensorboard")
    events = (tmp_path / "run").rglob("events.*")  # the configuration has a file of its own
    assert any(b"eval_pass@1" in path.read_bytes() for path in events)


@pytest.mark.parametrize("script", [*SCRIPTS, "plot.py"])
def test_help_reads_like_documentation(script):
    text = run_script(script, "--help").stdout
    flags = [line for line in text.splitlines() if line.strip().startswith(("│ --", "--"))]
    assert len(flags) >= {"grpo.py": 25, "sft.py": 17, "plot.py": 1}[script]
    if script == "grpo.py":
        wanted = """--model --task --data --template --sampler --steps --prompts-per-step --group-size --max-new-tokens
        --temperature --epochs --minibatches --tokens-per-microbatch --lr --beta --clip-low --clip-high --rewards
        --eval-every --save-every --seed --out --resume --track""".split()
        assert all(flag in text for flag in wanted)
        assert "arXiv 2402.03300" in text and "number of rollouts" in text
        names = [word for line in flags for word in line.split() if word.startswith("--")]
        assert max(map(names.index, ("--beta", "--lr"))) < min(map(names.index, ("--model", "--out"))), "own ones first"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rewards", "acuracy"], "acuracy"),
        (["--task", "chess"], "chess"),
        (["--group-size", "1"], "--group-size 1"),
        (["--temperature", "0"], "--temperature 0"),
        (
            ["--minibatches", "3"],
            "--minibatches 3: 16 prompts x 8 responses = 128 cannot be divided evenly among 1 process x 3 minibatches; "
            "change --minibatches, --prompts-per-step or --group-size",
        ),
        (["--model", "no/such/model"], "--model no/such/model"),
        (["--resume", "no/such/run"], "--resume no/such/run"),
        (["--template", "chat"], "chat template"),
        (["--task", "gsm8k"], "--data"),
        (["--task", "qa", "--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["grpo.py", *flags, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as error:
        grpo.main(parse(grpo.Config))
    assert words in str(error.value) and "\n" not in str(error.value) and error.value.code == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        ({"prompts_per_step": 3}, 2, "--prompts-per-step 3: cannot be divided evenly among 2 processes; change it"),
        (
            {"prompts_per_step": 2, "group_size": 3, "minibatches": 2},
            2,
            "--minibatches 2: 2 prompts x 3 responses = 6 cannot be divided evenly among 2 processes x 2 minibatches; "
            "change --minibatches, --prompts-per-step or --group-size",
        ),
        ({"prompts_per_step": 1, "minibatches": 8}, 1, ""),
    ],
)
def test_rollouts_are_divided_evenly(flags, processes, message):
    if not message:
        check_config(grpo.Config(**flags), processes)
        return
    with pytest.raises(SystemExit) as error:
        check_config(grpo.Config(**flags), processes)
    assert str(error.value) == message


def test_a_run_is_never_overwritten(learned):
    before = (learned / "metrics.jsonl").read_bytes()
    result = run_script("grpo.py", "--out", learned, check=False)
    assert result.returncode != 0 and "--resume" in result.stderr.splitlines()[-1]
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert (learned / "metrics.jsonl").read_bytes() == before
