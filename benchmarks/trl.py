"""The same work in TRL and here: milliseconds per step, peak memory and the wait for the first step.

    python benchmarks/trl.py                         everything; writes benchmarks/trl.json and benchmarks/trl.md
    python benchmarks/trl.py --case grpo-b dpo --size small --rounds 1
    python benchmarks/trl.py --table                 only the table, from benchmarks/trl.json

It makes three virtual environments (--envs, or uses those that are there): this repository with what it needs, TRL 1.16,
and TRL 1.12, the last that has PPO; torch, transformers and the rest have the same versions in all three. Each
measurement is a process of its own with one thread, ours and TRL's in turn. It needs Python 3.11+ and no GPU.

The work: a random Qwen2 model (4 layers, 4 heads, intermediate 4 x hidden, tied embeddings, 17 symbols), 8 prompts
"dd+dd=" x 8 responses per step of at most 32 tokens, temperature 1, the full softmax, then one update on the 64
sequences: AdamW, lr 1e-6 (so the work stays the same from step to step), gradient norm 1, float32.

    grpo-a, rloo-a, ppo-a   no response ends before 32 tokens, and rewards differ within every group: our worst case
    grpo-b, rloo-b, ppo-b   responses end by themselves, about half of the groups are informative: the usual case
    dpo                     64 pairs of random responses of 8 to 32 tokens, with a reference model

GRPO and RLOO have no KL; clip range 0.2. PPO has one epoch, one minibatch, a value network as large as the policy and
a KL of weight 0.05 to a reference model, which TRL cannot do without. TRL's PPO takes only models as rewards: here one
that runs the same verifier and costs nothing; and it samples 64 prompts once, not 8 prompts 8 times.
TRL runs without what costs it time and is not asked for: bf16, gradient checkpointing, logs, checkpoints, a bar. All
else is TRL's default. Ours are the scripts as they are, with their defaults; evaluation and checkpoints are not timed
on either side.
"""

import argparse
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import zlib
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
JSON, TABLE = ROOT / "benchmarks" / "trl.json", ROOT / "benchmarks" / "trl.md"
TARGETS = {  # case -> TRL's CPU time / ours, to reach
    "grpo-a": 1.25, "grpo-b": 2.0, "rloo-a": None, "rloo-b": 2.2, "ppo-a": 3.0, "ppo-b": 3.0, "dpo": 1.25
}  # fmt: skip
SIZES = {"small": 128, "large": 256}  # hidden size -> 1.05 M and 4.2 M parameters
PROMPTS, GROUP, TOKENS = 8, 8, 32  # prompts per step, responses to each, longest response
ROWS = PROMPTS * GROUP  # sequences per step; in DPO pairs
LR, CLIP, KL, DPO_BETA = 1e-6, 0.2, 0.05, 0.1  # KL: of PPO
WARMUP = 4  # first steps, not counted
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
}  # fmt: skip

# --- the work: run in our environment, used by both sides ---

SYMBOLS = ["<pad>", "<eos>", *"0123456789+-*/="]


def spread(response: str, example: dict) -> float:
    """The reward of the cases a: in practice no two responses have the same one."""
    return zlib.crc32(response.encode()) / 2**32


def digit(response: str, example: dict) -> float:
    """The reward of the cases b, right for 9 % of the random responses: the first digit is the last of the sum."""
    return float(next((c for c in response if c.isdigit()), "") == example["answer"][-1])


def make_work(folder: Path) -> None:
    """Models a and b of each size with their tokenizer, questions, and preference pairs."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    core = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    for size, hidden in SIZES.items():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(SYMBOLS), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=None, pad_token_id=0, eos_token_id=1,
        ))  # fmt: skip
        # The head is the embedding and has no bias. One direction that all symbols share makes one: the symbols that
        # point against it are never sampled. Those are <pad> in b, and also <eos> in a.
        weight = model.get_input_embeddings().weight.data
        for case, never in (("b", [0]), ("a", [0, 1])):
            weight[:, 0] = 1.0
            weight[never, 0] = -4.0
            model.save_pretrained(folder / f"{size}-{case}")
            tokenizer.save_pretrained(folder / f"{size}-{case}")

    rng = random.Random(0)
    sums = [(x // 90 + 10, x % 90 + 10) for x in rng.sample(range(8100), 2048)]
    questions = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]

    def response():
        return "".join(rng.choices(SYMBOLS[2:], k=rng.randint(8, TOKENS) - 1))  # and the end token

    pairs = [{"prompt": x["question"], "chosen": response(), "rejected": response()} for x in questions]
    for name, rows in (("questions", questions), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
        (folder / f"{name}-held-out.jsonl").write_text(json.dumps(rows[0]) + "\n")


# --- what is measured, on both sides ---


class Clock:
    """CPU and wall time of each step, from the end of the one before, and of the rollout in it."""

    def __init__(self, job: dict):
        self.job, self.records, self.mark, self.rollout = job, [], self.now(), [0.0, 0.0]

    def now(self) -> list[float]:
        return [time.process_time(), time.perf_counter()]  # process_time: of all threads

    def timed(self, function, look=lambda result: None):
        """The function, its time counted as rollout; `look` gets what it returned."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.rollout = [r + b - a for r, a, b in zip(self.rollout, start, self.now(), strict=True)]
            look(result)
            return result

        return wrapped

    def step(self, **counts) -> None:
        """Call at the end of each step. After the last one write the result, and leave: nothing later is measured."""
        cpu, wall = (b - a for a, b in zip(self.mark, self.now(), strict=True))
        if not self.records:
            self.first = time.time() - self.job["started"]
        record = {"cpu": cpu, "wall": wall, "rollout_cpu": self.rollout[0], "rollout_wall": self.rollout[1], **counts}
        self.records.append(record)
        if len(self.records) == self.job["warmup"] + self.job["steps"]:
            counted = self.records[self.job["warmup"] :]
            result = {f"{name}_ms": 1000 * statistics.median(r[name] for r in counted) for name in list(record)[:4]}
            result |= {name: statistics.fmean(r[name] for r in counted) for name in counts}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
            result |= {"first_step_s": self.first, "peak_mb": peak}
            result["each_cpu_ms"] = [round(1000 * r["cpu"], 1) for r in counted]
            Path(self.job["result"]).write_text(json.dumps(result))
            raise SystemExit
        self.mark, self.rollout = self.now(), [0.0, 0.0]


# --- our side: the scripts themselves ---


def ours(job: dict) -> None:
    sys.path.insert(0, str(ROOT))
    import importlib

    import rewards
    import rollout
    import run

    script, _, case = job["case"].partition("-")
    module = importlib.import_module(script)
    folder, steps = Path(job["folder"]), job["warmup"] + job["steps"] + 1  # what follows the last one is never reached
    data = "pairs" if script == "dpo" else "questions"
    flags = {
        "model": str(folder / f"{job['size']}-{case or 'b'}"), "out": job["out"], "sampler": "hf", "steps": steps,
        "data": tuple(str(folder / f"{data}{x}.jsonl") for x in ("", "-held-out")), "template": "plain",
        "max_new_tokens": TOKENS, "lr": LR, "eval_every": 0, "eval_prompts": 1, "save_every": 0,
    }  # fmt: skip
    if script == "dpo":
        flags |= {"pairs_per_step": ROWS, "beta": DPO_BETA}
    else:
        rewards.REWARDS |= {"spread": spread, "digit": digit}
        flags |= {"task": "qa", "rewards": ("spread" if case == "a" else "digit",), "prompts_per_step": PROMPTS}
        flags |= {"group_size": GROUP, "clip_low": CLIP, "clip_high": CLIP, "beta": KL if script == "ppo" else 0.0}
    clock = Clock(job)
    rollout.HFSampler.generate = clock.timed(rollout.HFSampler.generate)
    log, steps = run.Run.log, run.Run.steps

    def kept_log(self, *args, **kwargs):
        log(self, *args, **kwargs)
        clock.counts = {"tokens": self.record["tokens"]}
        if script in ("grpo", "rloo"):
            clock.counts["informative"] = self.record["informative_groups"]

    def timed_steps(self):
        for step in steps(self):
            yield step
            clock.step(**clock.counts)

    run.Run.log, run.Run.steps = kept_log, timed_steps
    module.main(module.Config(**flags))


# --- TRL's side: its trainers, as its documentation calls them ---


def theirs(job: dict) -> None:
    import trl  # the installed one: this file runs with -P
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    script, _, case = job["case"].partition("-")
    folder, steps = Path(job["folder"]), job["warmup"] + job["steps"]
    path = str(folder / f"{job['size']}-{case or 'b'}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    file = folder / ("pairs.jsonl" if script == "dpo" else "questions.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    reward = spread if case == "a" else digit
    clock, counts = Clock(job), {}

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if script in ("grpo", "rloo"):
                counts["informative"] = 1 - trainer._metrics["train"]["frac_reward_zero_std"][-1]
            clock.step(**counts)

    flags = {
        "output_dir": job["out"], "use_cpu": True, "max_steps": steps, "per_device_train_batch_size": ROWS,
        "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "bf16": False,
        "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
    }  # fmt: skip
    start = {"processing_class": tokenizer, "callbacks": [EndOfStep()]}

    if script in ("grpo", "rloo"):
        Config, Trainer = (trl.GRPOConfig, trl.GRPOTrainer) if script == "grpo" else (trl.RLOOConfig, trl.RLOOTrainer)
        flags |= {"num_generations": GROUP, "max_completion_length": TOKENS, "temperature": 1.0, "top_p": 1.0}
        flags |= {"top_k": 0, "beta": 0.0, "epsilon": CLIP, "num_iterations": 1}
        flags |= {"loss_type": "grpo"} if script == "grpo" else {}

        def rewarded(completions, answer, **kwargs):
            return [reward(text, {"answer": a}) for text, a in zip(completions, answer, strict=True)]

        dataset = Dataset.from_list([{"prompt": row["question"], "answer": row["answer"]} for row in rows])
        trainer = Trainer(path, reward_funcs=rewarded, args=Config(**flags), train_dataset=dataset, **start)
        look = lambda result: counts.update(tokens=sum(map(len, result[1])))  # noqa: E731
        trainer._generate = clock.timed(trainer._generate, look)

    elif script == "dpo":
        args = trl.DPOConfig(beta=DPO_BETA, **flags)
        trainer = trl.DPOTrainer(path, args=args, train_dataset=Dataset.from_list(rows), **start)
        compute = trainer.compute_loss

        def counted(model, inputs, *args, **kwargs):
            counts["tokens"] = int(inputs["completion_mask"].sum())
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = counted

    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        class Verifier(torch.nn.Module):
            """A "reward model" that reads the text and knows the answer."""

            base_model_prefix = "read"

            def read(self, input_ids, attention_mask, **kwargs):
                texts = tokenizer.batch_decode(input_ids * attention_mask, skip_special_tokens=True)
                pairs = [(text[6:], {"answer": str(int(text[:2]) + int(text[3:5]))}) for text in texts]
                rewards = torch.tensor([reward(*pair) for pair in pairs])
                return SimpleNamespace(hidden_states=[rewards[:, None, None].expand(*input_ids.shape, 1)])

            def score(self, hidden):
                return hidden

        flags.pop("max_steps")
        flags |= {"total_episodes": steps * ROWS, "num_ppo_epochs": 1, "num_mini_batches": 1, "temperature": 1.0}
        flags |= {"response_length": TOKENS, "stop_token": "eos", "num_sample_generations": 0, "kl_coef": KL}
        flags |= {"local_rollout_forward_batch_size": ROWS, "cliprange": CLIP}
        trainer = PPOTrainer(
            PPOConfig(**flags), model=AutoModelForCausalLM.from_pretrained(path), ref_model=None,
            reward_model=Verifier(),
            value_model=AutoModelForSequenceClassification.from_pretrained(path, num_labels=1),
            train_dataset=Dataset.from_list([{"input_ids": tokenizer.encode(row["question"])} for row in rows]),
            **start,
        )  # fmt: skip

        def look(result):
            ends = (result[0][:, 6:] == tokenizer.eos_token_id).long()  # [B, T]
            counts["tokens"] = int((ends.cumsum(1) - ends == 0).sum())

        ppo_trainer.batch_generation = clock.timed(ppo_trainer.batch_generation, look)

    trainer.train()


# --- environments ---


def make_environments(folder: Path, given: str) -> dict[str, str]:
    """The Python of each side; environments that are there already are used as they are."""
    pins = "torch transformers tokenizers accelerate datasets numpy".split()
    torch = next(
        x for x in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if "torch" in x
    )
    pythons = {"ours": given or str(folder / "ours" / "bin" / "python")}
    pythons |= {f"trl {version}": str(folder / f"trl-{version}" / "bin" / "python") for version in ("1.16.0", "1.12.0")}
    for name, python in pythons.items():
        if not Path(python).exists():
            print(f"making the environment {name} in {Path(python).parent.parent}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", Path(python).parent.parent], check=True)
            pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, torch], check=True)
            if name == "ours":
                subprocess.run([*pip, str(ROOT)], check=True)
            else:  # the same versions of everything else
                same = [f"{package}=={version}" for package, version in versions(pythons["ours"], pins).items()]
                subprocess.run([*pip, name.replace(" ", "=="), *same], check=True)
    return pythons


def versions(python: str, packages: list[str]) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version as v; print(*[v(p) for p in sys.argv[1:]])"
    output = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    return dict(zip(packages, output.split(), strict=True))


# --- measuring ---


def work(python: str, **job) -> dict:
    """Do a job in a process of its own; what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        job |= {"out": f"{folder}/run", "result": f"{folder}/result.json", "started": time.time()}
        command = [python, "-P", __file__, "--work", json.dumps(job)]
        log = subprocess.run(command, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        if log.returncode:
            raise SystemExit(f"{job} failed:\n{log.stderr[-3000:]}")
        result = Path(job["result"])
        return json.loads(result.read_text()) if result.exists() else {}


def measure(pythons: dict[str, str], cases: list[str], sizes: list[str], steps: int, rounds: int) -> list[dict]:
    """One record per case, size, round and side, ours and TRL's in turn."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        work(pythons["ours"], side="make", folder=folder)
        for size in sizes:
            for case in cases:
                for number in range(rounds):
                    for side in ("ours", "trl 1.12.0" if case.startswith("ppo") else "trl 1.16.0"):
                        place = {"case": case, "size": size, "round": number, "side": side}
                        results.append(place | work(pythons[side], folder=folder, warmup=WARMUP, steps=steps, **place))
                        r = results[-1]
                        print(
                            f"{size:5} {case:6} {side:10} CPU {r['cpu_ms']:6.0f} ms, wall {r['wall_ms']:6.0f} ms, "
                            f"first step after {r['first_step_s']:4.1f} s", flush=True,
                        )  # fmt: skip
    return results


# --- the table ---


def table(record: dict) -> str:
    """The Markdown page of a record: what was measured where, and two tables for each size."""
    lines = ["# The same work in TRL and here", ""]
    lines += [f"`{record['command']}`, {record['date']}, one thread of {record['cpu']}.", ""]
    for side, found in record["versions"].items():
        lines.append(f"- {side}: " + ", ".join(f"{package} {version}" for package, version in found.items()))
    lines += [
        "",
        f"Median of {record['steps']} steps after {WARMUP}, and of {record['rounds']} runs of each side, in turn.",
    ]
    lines += [
        "A ratio is TRL / ours, in brackets the smallest and the largest of the rounds; bold: it reaches the goal."
    ]
    lines += ["The first lines of `benchmarks/trl.py` say what the work is."]
    for size, parameters in (("small", "1.05"), ("large", "4.2")):
        found = {case: [] for case in TARGETS}  # case -> the records of our runs, those of TRL's
        for case in found:
            runs = [r for r in record["results"] if (r["case"], r["size"]) == (case, size)]
            found[case] = [[r for r in runs if (r["side"] == "ours") == mine] for mine in (True, False)]
        found = {case: sides for case, sides in found.items() if all(sides)}
        if found:
            lines += ["", f"## {parameters} M parameters", ""]
            lines += [
                "| per step | CPU ms, ours | TRL | ratio | goal | wall ms, ours | TRL | ratio |",
                "|---" * 8 + "|",
            ]
            lines += [f"| {case} | {' | '.join(times(case, *sides))} |" for case, sides in found.items()]
            heads = [
                "rollout CPU ms",
                "update CPU ms",
                "tokens per step",
                "informative groups",
                "peak MB",
                "first step, s",
            ]
            lines += ["", f"| | {' | '.join(f'{head}, ours | TRL' for head in heads)} |", "|---" * 13 + "|"]
            lines += [f"| {case} | {' | '.join(details(case, *sides))} |" for case, sides in found.items()]
    return "\n".join(lines) + "\n"


def times(case: str, ours: list[dict], theirs: list[dict]) -> list[str]:
    cells, goal = [], TARGETS[case]
    for name in ("cpu_ms", "wall_ms"):
        a, b = middle(ours, name), middle(theirs, name)
        ratios = [y[name] / x[name] for x, y in zip(ours, theirs, strict=True)]
        bold = "**" if name == "cpu_ms" and goal and b / a >= goal else ""
        cells += [f"{a:.0f}", f"{b:.0f}", f"{bold}{b / a:.2f}{bold} ({min(ratios):.2f} to {max(ratios):.2f})"]
        cells += [f"{goal:.2f}" if goal else ""] if name == "cpu_ms" else []
    return cells


def details(case: str, *sides: list[dict]) -> list[str]:
    rollout, total = ([middle(side, name) for side in sides] for name in ("rollout_cpu_ms", "cpu_ms"))
    cells = [f"{x:.0f}" if case != "dpo" else "" for x in rollout]
    cells += [f"{y - x:.0f}" for x, y in zip(rollout, total, strict=True)]
    for name, digits in (("tokens", 0), ("informative", 2), ("peak_mb", 0), ("first_step_s", 1)):
        cells += [f"{middle(side, name):.{digits}f}" if name in side[0] else "" for side in sides]
    return cells


def middle(records: list[dict], name: str) -> float:
    return statistics.median(r[name] for r in records)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=20, help="steps of each run that count")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "one-file-rl", help="environments")
    parser.add_argument("--ours-python", default="", help="a Python that has what the repository needs")
    parser.add_argument("--out", type=Path, default=JSON, help="the record; the table lies beside it, as .md")
    parser.add_argument("--table", action="store_true", help="only write the table of --out again")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # what a process of its own does
    flags = parser.parse_args()
    if flags.work:
        job = json.loads(flags.work)
        side = {"make": lambda job: make_work(Path(job["folder"])), "ours": ours}.get(job["side"], theirs)
        return side(job)
    if not flags.table:
        pythons = make_environments(flags.envs, flags.ours_python)
        shown = "torch transformers accelerate".split()
        record = {
            "command": f"python benchmarks/trl.py --steps {flags.steps} --rounds {flags.rounds}",
            "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "steps": flags.steps, "rounds": flags.rounds,
            "versions": {
                side: versions(python, ([] if side == "ours" else ["trl"]) + shown) for side, python in pythons.items()
            },
            "results": measure(pythons, flags.case, flags.size, flags.steps, flags.rounds),
        }  # fmt: skip
        flags.out.write_text(json.dumps(record, indent=1) + "\n")
    flags.out.with_suffix(".md").write_text(table(json.loads(flags.out.read_text())))
    print(f"wrote {flags.out} and {flags.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
