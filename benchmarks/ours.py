"""For benchmarks/trl.py: the work that both sides do, the clock that both carry, our side of it, and its profile.

    python -P benchmarks/ours.py JOB        JOB: what trl.py asks for, as JSON

The environments of TRL have nothing of this repository's own, so what stands above "our side" imports none of it.
"""

import functools
import importlib
import json
import random
import resource
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = 8  # per step
GROUP = 8  # responses to each prompt
ROWS = PROMPTS * GROUP  # sequences per step; for DPO, pairs
TOKENS = 32  # of the longest response
LR = 1e-6
CLIP = 0.2
KL = 0.05  # weight of PPO's KL, in the rewards
DPO_BETA = 0.1
SIZES = {"small": 128, "large": 256}  # hidden sizes: 1.05 M and 4.2 M parameters
SYMBOLS = ["<pad>", "<eos>", *"0123456789+-*/="]


# --- the work ---


def spread(response: str, example: dict) -> float:
    """The reward of the cases a: no two responses have the same one, but by chance."""
    return zlib.crc32(response.encode()) / 2**32


def digit(response: str, example: dict) -> float:
    """The reward of the cases b: whether the first digit is the last one of the sum, as in 9 % of random responses."""
    for symbol in response:
        if symbol.isdigit():
            return float(symbol == example["answer"][-1])
    return 0.0


def make_work(folder: Path) -> None:
    """Models a and b of each size with their tokenizer, questions, and pairs of responses."""
    make_models(folder)
    rng = random.Random(0)
    questions = []
    for x in rng.sample(range(8100), 2048):  # 8100 sums of two numbers from 10 to 99
        a = x // 90 + 10
        b = x % 90 + 10
        questions.append({"question": f"{a}+{b}=", "answer": str(a + b)})
    pairs = []
    for question in questions:
        chosen = random_response(rng)
        rejected = random_response(rng)
        pairs.append({"prompt": question["question"], "chosen": chosen, "rejected": rejected})
    write_rows(folder, "questions", questions)
    write_rows(folder, "pairs", pairs)


def random_response(rng: random.Random) -> str:
    length = rng.randint(8, TOKENS) - 1  # the end token comes on top
    return "".join(rng.choices(SYMBOLS[2:], k=length))


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    """The first row is held out, since the scripts want something to evaluate."""
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(lines[1:]))
    (folder / f"{name}-held-out.jsonl").write_text(lines[0])


def make_models(folder: Path) -> None:
    """Random models; no response of model a ends by itself, those of model b do."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],  # so there is one token per character
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<eos>",
    )
    for size, hidden in SIZES.items():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(SYMBOLS),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            pad_token_id=0,
            eos_token_id=1,
        )
        model = Qwen2ForCausalLM(config)
        for case, never in (("b", ["<pad>"]), ("a", ["<pad>", "<eos>"])):
            forbid(model, [vocabulary[symbol] for symbol in never])
            model.save_pretrained(folder / f"{size}-{case}")
            tokenizer.save_pretrained(folder / f"{size}-{case}")


def forbid(model, tokens: list[int]) -> None:
    """Let the model never sample these tokens.

    The LM head is the embedding and has no bias. A direction that all tokens share does for one: those that point
    against it are never sampled.
    """
    weight = model.get_input_embeddings().weight.data
    weight[:, 0] = 1.0
    weight[tokens, 0] = -4.0


# --- the clock ---


class Seconds(NamedTuple):
    """What two clocks show, or have shown in a while."""

    cpu: float  # of all threads of this process
    wall: float


def now() -> Seconds:
    return Seconds(time.process_time(), time.perf_counter())


def since(start: Seconds) -> Seconds:
    end = now()
    return Seconds(end.cpu - start.cpu, end.wall - start.wall)


class Clock:
    """CPU and wall time of every step, from the end of the one before it, and of the rollout in it."""

    def __init__(self, job: dict):
        self.job = job
        self.steps = []  # for each step, its seconds and its counts
        self.last_step = job["warmup"] + job["steps"]
        self.begin_step()

    def begin_step(self) -> None:
        self.start = now()
        self.rollout = Seconds(0.0, 0.0)

    def timed(self, function, look=None):
        """The function, with its time counted as rollout; `look` is shown what it returns."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            took = since(start)
            self.rollout = Seconds(self.rollout.cpu + took.cpu, self.rollout.wall + took.wall)
            if look:
                look(result)
            return result

        return wrapped

    def step(self, **counts) -> None:
        """To be called after every step. After the last one it writes the result and ends the process."""
        took = since(self.start)
        if not self.steps:
            self.first_step_s = time.time() - self.job["started"]
        seconds = {
            "cpu": took.cpu,
            "wall": took.wall,
            "rollout_cpu": self.rollout.cpu,
            "rollout_wall": self.rollout.wall,
        }
        self.steps.append(seconds | counts)
        if len(self.steps) == self.last_step:
            self.finish(self.result(list(seconds), list(counts)))
        self.begin_step()

    def result(self, seconds: list[str], counts: list[str]) -> dict:
        """The numbers of a run, from the steps after the warm-up."""
        counted = self.steps[self.job["warmup"] :]
        result = {}
        for name in seconds:
            result[f"{name}_ms"] = 1000 * statistics.median(step[name] for step in counted)
        for name in counts:
            result[name] = statistics.fmean(step[name] for step in counted)
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # it is in KiB on Linux
        result["first_step_s"] = self.first_step_s
        result["each_cpu_ms"] = [round(1000 * step["cpu"], 1) for step in counted]
        return result

    def finish(self, result: dict) -> None:
        """Write the result and end the process: no evaluation, no checkpoint."""
        Path(self.job["result"]).write_text(json.dumps(result))
        raise SystemExit


class Profile(Clock):
    """Instead of a clock: where the CPU time of the counted steps goes, and what their products of matrices cost."""

    def __init__(self, job: dict):
        from torch.profiler import ProfilerActivity, profile

        super().__init__(job)
        self.profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)

    def step(self, **counts) -> None:
        self.steps.append(counts)
        if len(self.steps) == self.job["warmup"]:
            self.profiler.start()
            self.start = now()
        if len(self.steps) == self.last_step:
            took = since(self.start)
            self.profiler.stop()
            self.finish(self.shares(took.cpu))

    def shares(self, cpu: float) -> dict:
        """ms of a step by kind, GFLOP of its products of matrices, GFLOP/s that this core reaches in such products.

        cpu: seconds of CPU time of all counted steps. What the profiler finds in no operation is called Python. The
        profiler's own clock is the wall's, so this remainder is too small where other processes had the core for a
        while, and may even be negative; it is given as it comes out, since it shows that the machine was not free.
        """
        steps = self.job["steps"]
        ms = {"products": 0.0, "attention": 0.0, "other": 0.0}
        flops = 0
        for event in self.profiler.key_averages():
            kind = kind_of(event.key)
            ms[kind] += event.self_cpu_time_total / 1000 / steps
            if kind == "products":
                flops += event.flops
        ms["python"] = 1000 * cpu / steps - sum(ms.values())
        return ms | {"gflop": flops / 1e9 / steps, "gflops": matrix_rate(SIZES[self.job["size"]])}


def kind_of(operation: str) -> str:
    """Where an operation counts, by its name in the profile."""
    if "scaled_dot_product" in operation:
        return "attention"
    if operation in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "products"
    return "other"


def matrix_rate(width: int) -> float:
    """The highest GFLOP/s of a product as in the layers of a model, for half of the tokens of a rollout."""
    import torch

    a = torch.randn(1024, width)
    b = torch.randn(width, 4 * width)
    flops = 2 * 1024 * width * 4 * width
    rates = []
    for _ in range(50):
        start = now()
        torch.mm(a, b)
        rates.append(flops / 1e9 / since(start).cpu)
    return max(rates)


# --- our side: the scripts as they are, with the flags of this work ---


def main(job: dict) -> None:
    """Run the script of a job under the clock."""
    sys.path.insert(0, str(ROOT))
    import rewards
    from plumbing.run import Run
    from rollout import HFSampler

    rewards.REWARDS["spread"] = spread
    rewards.REWARDS["digit"] = digit
    script, case = script_and_case(job)
    module = importlib.import_module(script)
    clock = Profile(job) if job["side"] == "profile" else Clock(job)
    counts = {}
    log = Run.log
    steps = Run.steps

    def log_and_look(self, *args, **kwargs):
        log(self, *args, **kwargs)
        counts["tokens"] = self.record["tokens"]
        if script in ("grpo", "rloo"):
            counts["informative"] = self.record["informative_groups"]

    def timed_steps(self):
        for step in steps(self):
            yield step
            clock.step(**counts)

    HFSampler.generate = clock.timed(HFSampler.generate)
    Run.log = log_and_look
    Run.steps = timed_steps
    module.main(module.Config(**script_flags(job)))


def script_and_case(job: dict) -> tuple[str, str]:
    """("grpo", "a") of "grpo-a"; dpo has one case only, with model b."""
    script, _, case = job["case"].partition("-")
    return script, case or "b"


def script_flags(job: dict) -> dict:
    """The flags of the script of a job."""
    script, case = script_and_case(job)
    folder = Path(job["folder"])
    data = "pairs" if script == "dpo" else "questions"
    flags = {
        "model": str(folder / f"{job['size']}-{case}"),
        "data": (str(folder / f"{data}.jsonl"), str(folder / f"{data}-held-out.jsonl")),
        "out": job["out"],
        "template": "plain",
        "max_new_tokens": TOKENS,
        "tokens_per_microbatch": 8192,  # all at once, as TRL
        "lr": LR,
        "steps": job["warmup"] + job["steps"] + 1,  # the last one, which evaluates and saves, is not reached
        "eval_every": 0,
        "eval_prompts": 1,
        "save_every": 0,
    }
    if script == "dpo":
        return flags | {"pairs_per_step": ROWS, "beta": DPO_BETA}
    return flags | {
        "task": "qa",
        "sampler": "hf",
        "rewards": ("spread" if case == "a" else "digit",),
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "clip_low": CLIP,
        "clip_high": CLIP,
        "beta": KL if script == "ppo" else 0.0,
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if job["side"] == "work":
        make_work(Path(job["folder"]))
    else:
        main(job)
