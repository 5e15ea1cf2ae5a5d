"""For benchmarks/trl.py: the work that both sides do, the clock that both carry, our side of it, and its profile.

python -P benchmarks/ours.py JOB        JOB: what trl.py asks for, as JSON
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

PROMPTS, GROUP, TOKENS = 8, 8, 32  # prompts per step, responses to each, longest response
ROWS = PROMPTS * GROUP  # sequences per step; for DPO, pairs
LR, CLIP, KL, DPO_BETA = 1e-6, 0.2, 0.05, 0.1  # KL: the weight of PPO's, in the rewards
SIZES = {"small": 128, "large": 256}  # hidden sizes: 1.05 M and 4.2 M parameters

# --- the work ---

SYMBOLS = ["<pad>", "<eos>", *"0123456789+-*/="]


def spread(response: str, example: dict) -> float:
    """The reward of the cases a: no two responses have the same one, but by chance."""
    return zlib.crc32(response.encode()) / 2**32


def digit(response: str, example: dict) -> float:
    """The reward of the cases b: is the first digit the last one of the sum? It is in 9 % of random responses."""
    return float(next((c for c in response if c.isdigit()), "") == example["answer"][-1])


def make_work(folder: Path) -> None:
    """Models a and b of each size with their tokenizer, questions, and pairs of responses."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<eos>"}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], **special)  # without merges: one token per character
    for size, hidden in SIZES.items():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(SYMBOLS), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=None, pad_token_id=0, eos_token_id=1,
        ))  # fmt: skip
        # The LM head is the embedding and has no bias. A direction that all symbols share does for one: symbols that
        # point against it are never sampled. Those are <pad>, and in a also <eos>, so that no response ends by itself.
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
        return "".join(rng.choices(SYMBOLS[2:], k=rng.randint(8, TOKENS) - 1))  # the end token comes on top

    pairs = [{"prompt": x["question"], "chosen": response(), "rejected": response()} for x in questions]
    for name, rows in (("questions", questions), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
        (folder / f"{name}-held-out.jsonl").write_text(json.dumps(rows[0]) + "\n")


# --- the clock ---


class Clock:
    """CPU and wall time of every step, from the end of the one before it, and of the rollout in it."""

    def __init__(self, job: dict):
        self.job, self.steps, self.mark, self.rollout = job, [], self.now(), [0.0, 0.0]

    def now(self) -> list[float]:
        return [time.process_time(), time.perf_counter()]  # process_time: of all threads

    def timed(self, function, look=None):
        """The function, with its time counted as rollout; `look` is shown what it returns."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.rollout = [x + b - a for x, a, b in zip(self.rollout, start, self.now(), strict=True)]
            if look:
                look(result)
            return result

        return wrapped

    def step(self, **counts) -> None:
        """To be called after every step. After the last one it writes the result and ends the process."""
        cpu, wall = (b - a for a, b in zip(self.mark, self.now(), strict=True))
        if not self.steps:
            self.first = time.time() - self.job["started"]
        self.steps.append({"cpu": cpu, "wall": wall, "rollout_cpu": self.rollout[0], "rollout_wall": self.rollout[1]})
        self.steps[-1] |= counts
        if len(self.steps) == self.job["warmup"] + self.job["steps"]:
            counted = self.steps[self.job["warmup"] :]
            result = {f"{x}_ms": 1000 * statistics.median(s[x] for s in counted) for x in counted[0] if x not in counts}
            result |= {x: statistics.fmean(s[x] for s in counted) for x in counts}
            result |= {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}  # KiB on Linux
            result |= {"first_step_s": self.first, "each_cpu_ms": [round(1000 * s["cpu"], 1) for s in counted]}
            Path(self.job["result"]).write_text(json.dumps(result))
            raise SystemExit
        self.mark, self.rollout = self.now(), [0.0, 0.0]


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
            self.mark = self.now()
        if len(self.steps) == self.job["warmup"] + self.job["steps"]:
            cpu = self.now()[0] - self.mark[0]
            self.profiler.stop()
            Path(self.job["result"]).write_text(json.dumps(self.shares(cpu)))
            raise SystemExit

    def shares(self, cpu: float) -> dict:
        """ms of a step by kind, GFLOP of its products of matrices, GFLOP/s that this core reaches in such products."""
        parts, flops, steps = {"products": 0.0, "attention": 0.0, "other": 0.0}, 0, self.job["steps"]
        for event in self.profiler.key_averages():
            product = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
            flops += event.flops if product else 0
            kind = "attention" if "scaled_dot_product" in event.key else "products" if product else "other"
            parts[kind] += event.self_cpu_time_total / 1000 / steps
        parts["python"] = 1000 * cpu / steps - sum(parts.values())
        return parts | {"gflop": flops / 1e9 / steps, "gflops": self.rate()}

    def rate(self) -> float:
        import torch

        width, rates = SIZES[self.job["size"]], []
        a, b = torch.randn(1024, width), torch.randn(width, 4 * width)  # as in the layers, for half of a rollout
        for _ in range(50):
            start = time.process_time()
            torch.mm(a, b)
            rates.append(2 * 1024 * width * 4 * width / 1e9 / (time.process_time() - start))
        return max(rates)


# --- our side: the scripts as they are, with the flags of this work ---


def main(job: dict) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import rewards
    import rollout
    import run

    script, _, case = job["case"].partition("-")
    module = importlib.import_module(script)
    folder, data = Path(job["folder"]), "pairs" if script == "dpo" else "questions"
    flags = {
        "model": str(folder / f"{job['size']}-{case or 'b'}"), "out": job["out"], "template": "plain", "sampler": "hf",
        "data": (str(folder / f"{data}.jsonl"), str(folder / f"{data}-held-out.jsonl")), "lr": LR,
        "max_new_tokens": TOKENS, "tokens_per_microbatch": 8192,  # all at once, as TRL
        "eval_every": 0, "eval_prompts": 1, "save_every": 0,
        "steps": job["warmup"] + job["steps"] + 1,  # the last one, which evaluates and saves, is not reached
    }  # fmt: skip
    if script == "dpo":
        flags |= {"pairs_per_step": ROWS, "beta": DPO_BETA}
    else:
        rewards.REWARDS |= {"spread": spread, "digit": digit}
        flags |= {"task": "qa", "rewards": ("spread" if case == "a" else "digit",), "prompts_per_step": PROMPTS}
        flags |= {"group_size": GROUP, "clip_low": CLIP, "clip_high": CLIP, "beta": KL if script == "ppo" else 0.0}
    clock = (Profile if job["side"] == "profile" else Clock)(job)
    counts, log, steps = {}, run.Run.log, run.Run.steps

    def log_and_look(self, *args, **kwargs):
        log(self, *args, **kwargs)
        counts["tokens"] = self.record["tokens"]
        if script in ("grpo", "rloo"):
            counts["informative"] = self.record["informative_groups"]

    def timed_steps(self):
        for step in steps(self):
            yield step
            clock.step(**counts)

    rollout.HFSampler.generate = clock.timed(rollout.HFSampler.generate)
    run.Run.log, run.Run.steps = log_and_look, timed_steps
    module.main(module.Config(**flags))


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    make_work(Path(job["folder"])) if job["side"] == "work" else main(job)
