"""One training run: its folder, its loop, what it logs and what it saves.

A run leaves in its folder: config.json; metrics.jsonl, one line per step (step 0: the evaluation before training);
samples.jsonl, training responses with rewards and advantages, where responses are sampled; held_out.jsonl, the same
held-out questions at every evaluation, each with one response token by token; curves.png; checkpoint.pt, for --resume;
model/, for others.
"""

import dataclasses
import json
import math
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

import plot
from plumbing.adapters import base_of
from plumbing.checkpoint import (
    FORMAT,
    check_checkpoint,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    save_model,
)
from plumbing.evaluation import answer
from plumbing.fail import fail
from plumbing.flags import check_config
from plumbing.processes import gather, make_accelerator, own_part
from plumbing.sharded import load_sharded, read_rest, save_sharded
from rewards import evaluation_metrics, has_answer, rollout_metrics, score

SHOWN = 8  # training responses in samples.jsonl, and held-out questions in held_out.jsonl, each time


class Run:
    """One training run of a script, in one process or in several."""

    def __init__(self, config):
        self.config = config
        self.accelerator = make_accelerator(log_with=config.track or None, project_dir=config.out or "runs")
        self.main = self.accelerator.is_main_process
        check_config(config, self.accelerator.num_processes)
        self.first_step = 1
        self.interrupted = False
        self.step = 0
        self.record = {}  # the metrics of the present step
        self.reset_totals()
        self.make_folder()

    def make_folder(self) -> None:
        """Make the folder of the run, with config.json in it; a folder that has a run already is refused."""
        script = Path(sys.modules[type(self.config).__module__].__file__).stem
        self.folder = Path(self.config.out or f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (self.folder / "metrics.jsonl").exists() and not self.config.resume:
            fail(f"--out {self.folder}: a run is there; give another --out, or --resume {self.folder}")
        fields = {"script": script, **dataclasses.asdict(self.config)}
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        settings = {name: str(value) for name, value in fields.items()}
        self.accelerator.init_trackers(self.folder.name, config=settings)

    # --- the loop ---

    def start(self, tokenizer, data: list[dict], policy, **others) -> None:
        """Save these with the run from now on; with --resume, first give them the state in which they were saved.

        data: what is trained on; a resumed run must have the same
        """
        self.tokenizer = tokenizer
        self.objects = {"policy": policy, **others}
        self.fingerprint = fingerprint(data)
        if not self.config.resume:
            return
        self.first_step = self.load() + 1
        if self.main:
            for name in ("metrics.jsonl", "samples.jsonl", "held_out.jsonl"):
                self.forget_later_lines(self.folder / name)

    def forget_later_lines(self, path: Path) -> None:
        """Drop what was logged after the checkpoint was saved, a half-written last line included."""
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < self.first_step]
        path.write_text("".join(kept))

    def steps(self):
        """The steps still to do, with a progress bar. Ctrl-C ends the loop after the present step: nothing is lost."""
        self.bar = tqdm(total=self.config.steps, initial=self.first_step - 1, disable=not self.main, unit="step")
        previous = signal.signal(signal.SIGINT, self.interrupt)  # Ctrl-C
        for step in range(self.first_step, self.config.steps + 1):
            self.step = step
            self.started = time.perf_counter()
            self.last_lap = self.started
            yield step
            self.bar.update()
            if self.interrupted:
                break
        signal.signal(signal.SIGINT, previous)
        self.bar.close()

    def interrupt(self, *_) -> None:
        """What the first Ctrl-C does; a second one stops at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.main:
            self.bar.write(f"stopping after this step (at once: Ctrl-C again); to go on: --resume {self.folder}")

    def due(self, every: int, step: int) -> bool:
        """Whether something done every `every` steps, and after the last step, is due now."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def share(self, items):
        """This process's share of a list of what all processes do together."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def seed(self, step: int) -> int:
        """A seed of its own for every process, run and step."""
        return 10**9 * self.accelerator.process_index + 10**6 * self.config.seed + step

    # --- metrics ---

    def reset_totals(self) -> None:
        self.loss = 0.0  # of all micro-batches
        self.tokens = 0  # response tokens in all micro-batches
        self.sums = {}  # metric -> its sum over tokens or over rows
        self.counts = {}  # metric -> over how many
        self.maxima = {}  # metric -> its maximum
        self.seconds = {}  # part of the step -> how long it took

    def lap(self, name: str) -> None:
        """Log the seconds since the step began, or since the last lap, under this name."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last_lap
        self.last_lap = now

    def collect(self, mask: torch.Tensor, loss: torch.Tensor, **metrics: torch.Tensor) -> None:
        """Add a micro-batch: its share of the loss, and what to average (*_max: of what to take the maximum).

        [B, T] are averaged over the tokens on the mask, [B, 1] over the responses (or pairs).
        """
        self.loss += loss.detach()
        self.tokens += mask.sum()
        for name, x in metrics.items():
            values = x.detach()[mask] if x.shape == mask.shape else x.detach().flatten()  # [N]
            if name.endswith("_max"):
                largest = values.max()
                self.maxima[name] = torch.maximum(self.maxima.get(name, largest), largest)  # nan stays nan
            else:
                self.sums[name] = self.sums.get(name, 0.0) + values.sum()
                self.counts[name] = self.counts.get(name, 0) + len(values)

    def log(self, step: int, updates: int, batch=None, scores: dict[str, list] | None = None, **metrics) -> None:
        """Assemble the metrics of a step over all processes: of its rollouts, of what was collected, and these.

        updates: how many there were, each with a loss; batch, scores: the rollouts, if any, and their named rewards
        """
        self.record = {"step": step} | self.collected(updates)
        if batch is not None:
            self.record |= rollout_metrics(
                gather(batch["rewards"].tolist()),
                {name: gather(values) for name, values in scores.items()},
                gather(batch.lengths.tolist()),
                gather(batch.finish_reasons),
                self.config.group_size,
                unchecked=gather(scores.unchecked),
            )
        self.record |= metrics | self.seconds
        self.record["seconds"] = time.perf_counter() - self.started
        self.reset_totals()
        self.show_progress()

    def collected(self, updates: int) -> dict:
        """The metrics of all micro-batches of a step, in all processes."""
        mine = {"loss": float(self.loss), "tokens": int(self.tokens), "counts": self.counts, "sums": {}, "maxima": {}}
        for name, x in self.sums.items():
            mine["sums"][name] = float(x)
        for name, x in self.maxima.items():
            mine["maxima"][name] = float(x)
        sums = defaultdict(float)
        counts = defaultdict(int)
        maxima = defaultdict(list)
        record = {"loss": 0.0, "tokens": 0}
        for part in gather([mine]):  # one per process
            record["loss"] += part["loss"] / updates
            record["tokens"] += part["tokens"]
            for name, x in part["sums"].items():
                sums[name] += x
                counts[name] += part["counts"][name]
            for name, x in part["maxima"].items():
                maxima[name].append(x)
        found = {name: x / counts[name] for name, x in sums.items()}
        for name, values in maxima.items():
            found[name] = float(np.max(values))  # nan stays nan
        return record | {name: found[name] for name in sorted(found)}

    # --- what is not finite ---

    def check_update(self, batch, *grad_norms: float) -> None:
        """End the run, before the weights change, if the loss so far or a norm of gradients is not finite."""
        found = {"loss": float(self.loss)}
        for i, norm in enumerate(grad_norms):
            found[f"gradient norm {i + 1}" if i else "gradient norm"] = norm
        for name, x in found.items():
            bad = [value for value in gather([x]) if not math.isfinite(value)]  # in any process
            if bad:
                self.stop(batch, f"the {name} is {bad[0]}")

    def check_weights(self, batch) -> None:
        """End the run, before anything is saved or given to the sampler, if a weight is not finite."""
        for name, module in self.objects.items():
            if isinstance(module, torch.nn.Module):
                finite = torch.stack([own_part(p).isfinite().all() for p in module.parameters()])
                if not all(gather([bool(finite.all())])):  # of any process
                    self.stop(batch, f"weights of the {name} are not finite")

    def stop(self, batch, reason: str) -> NoReturn:
        """Write the responses of the step to not_finite.jsonl and end the run: nothing of this step is saved."""
        for i, text in enumerate(batch.texts):
            record = {"step": self.step, "response": text, "finish_reason": batch.finish_reasons[i]}
            for name, x in batch.tensors.items():
                if x.dim() == 1:  # one number of each response, such as its reward
                    record[name] = x[i].item()
            if self.main:
                self.append("not_finite.jsonl", record)
        self.bar.close()  # so that the message has a line of its own
        fail(
            f"step {self.step}: {reason}; nothing of this step is saved, and its responses are in "
            f"{self.folder / 'not_finite.jsonl'}; a lower --lr is the usual remedy"
        )

    def give_up(self, step: int, reason: str) -> NoReturn:
        """End the run before this step changes anything; all that the steps before it did is saved.

        All processes call it together.
        """
        if step > self.first_step:
            self.save(step - 1)
        self.accelerator.wait_for_everyone()  # the first process to end would end the others
        self.bar.close()  # so that the message has a line of its own
        fail(f"step {step}: {reason}")

    def show_progress(self) -> None:
        """A few metrics beside the progress bar."""
        shown = []
        for name in ("reward", "accuracy", "response_length", "margin", "grad_norm", "loss"):  # the loss says least
            if name in self.record:
                shown.append(f"{name} {self.record[name]:.3g}")
        rate = self.record["tokens"] / self.record["seconds"]
        self.bar.set_postfix_str(f"{', '.join(shown)}, {rate:.0f} tokens/s")

    def add_metrics(self, step: int, metrics: dict) -> None:
        """Add these to the metrics of a step."""
        self.record = {"step": step} | self.record | metrics

    # --- evaluation and samples ---

    def evaluate(self, step: int, sampler, examples: list[dict], rewards=(), **per_token) -> None:
        """Add held-out metrics: greedy accuracy, and pass@1 and pass@k from k samples at the training temperature.

        rewards: more named rewards of the samples, besides accuracy and format: in the metrics and in held_out.jsonl
        per_token: more numbers in it, each by a function of a batch that returns [B, T]
        """
        if len(examples) < self.accelerator.num_processes:
            fail(f"{len(examples)} held-out questions: each of {self.accelerator.num_processes} processes needs one")
        shown = self.share(range(min(SHOWN, len(examples))))  # which questions for held_out.jsonl this process has
        examples = self.share(examples)
        prompts = [example["prompt_ids"] for example in examples]
        k = self.config.eval_samples
        if self.main and step == 0:
            announce_cost(self.objects["policy"].model, prompts, k + 1, self.config.max_new_tokens)
        title = f"evaluation after step {step}" if self.main else ""
        found = answer(sampler, examples, k, self.config.temperature, rewards, title)
        sampled, scores = found.sampled, found.scores
        metrics = evaluation_metrics(
            gather(found.greedy_scores["accuracy"]),
            {name: gather(values) for name, values in scores.items()},
            gather(sampled.lengths.tolist()),
            k,
            unchecked=gather(scores.unchecked),
        )
        self.add_metrics(step, metrics)
        rows = [i * k for i in range(len(shown))] or [0]  # one response to each of the first questions
        batch = sampled.select(torch.tensor(rows, device=sampled.input_ids.device))
        numbers = {}
        with torch.no_grad(), self.accelerator.autocast():
            for name, function in per_token.items():
                numbers[name] = function(batch)  # [b, T]
        records = []
        for i, number in enumerate(shown):
            records.append((number, self.token_by_token(step, batch, i, examples[i], rewards, numbers)))
        records = gather(records)
        if not self.main:
            return
        for _, record in sorted(records, key=lambda pair: pair[0]):  # in the order of the questions
            self.append("held_out.jsonl", record)
        words = {"eval_accuracy": "greedy", "eval_pass@1": "one sample", f"eval_pass@{k}": f"any of {k}"}
        shown = []
        for name, x in self.record.items():
            if name.startswith("eval_"):
                shown.append(f"{words.get(name, name.removeprefix('eval_'))} {x:.2f}")
        sample = f"one of the samples: {examples[0]['question']!r} -> {sampled.texts[0]!r}"
        tqdm.write(f"held out, after step {step}: {', '.join(shown)}\n    {sample}")

    def token_by_token(self, step: int, batch, i: int, example: dict, rewards, numbers: dict) -> dict:
        """The line of held_out.jsonl for response i: text, tokens, numbers per token, rewards, finish reason.

        numbers: name -> [b, T], a number of each token
        """
        row = batch.select(torch.tensor([i], device=batch.input_ids.device))
        ids = row.response_ids[0].tolist()
        record = {
            "step": step,
            "question": example["question"],
            "answer": example["answer"],
            "response": row.texts[0],
            "finish_reason": row.finish_reasons[0],
            "token_ids": ids,
            "tokens": [self.tokenizer.decode([token]) for token in ids],
            "logp": row.sampler_logp[0].tolist(),  # of the distribution that was sampled
        }
        for name, x in numbers.items():
            record[name] = x[i, : len(ids)].tolist()
        for name, values in score(row, [example], ["format", *rewards]).items():
            record[f"reward/{name}"] = values[0]
        return record

    def samples(self, step: int, batch, examples: list[dict], scores: dict[str, list], **per_response) -> None:
        """Append the first responses of a training batch to samples.jsonl, with their rewards and these numbers.

        Says so if not one response of the first step has an answer: then there is nothing to learn from.
        """
        answered = [has_answer(text, example) for text, example in zip(batch.texts, examples, strict=True)]
        answered = gather(answered)
        if not self.main:
            return
        if step == 1 and not any(answered):
            self.bar.write(
                f"step 1: none of {len(answered)} responses has a final answer, so all are wrong. Read samples.jsonl: "
                "are they cut (--max-new-tokens), has the prompt the model's form (--template), is an answer asked for?"
            )
        for i in range(min(SHOWN, len(batch.texts))):
            record = {
                "step": step,
                "question": examples[i]["question"],
                "answer": examples[i]["answer"],
                "completion": batch.texts[i],
                "finish_reason": batch.finish_reasons[i],
                "reward": batch["rewards"][i].item(),
            }
            for name, x in per_response.items():
                record[name] = x[i].tolist()
            for name, values in scores.items():
                record[f"reward/{name}"] = values[i]
            self.append("samples.jsonl", record)

    def append(self, name: str, record: dict) -> None:
        """Add a line to a file of the run."""
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record) + "\n")

    # --- saving ---

    def end_step(self, step: int) -> None:
        """Write the step's line of metrics; if due, save the model, and the state of everything for --resume."""
        known = {name: x for name, x in self.record.items() if x is not None}
        for name, x in known.items():
            if (name == "loss" or name.startswith("eval")) and not math.isfinite(x):
                fail(f"step {step}: {name} is {x}; nothing of this step is saved; a lower --lr is the usual remedy")
        self.accelerator.log(known, step=step)
        if self.main:
            self.append("metrics.jsonl", self.record)
        self.interrupted = any(gather([self.interrupted]))  # so that all processes end after the same step
        if step > 0 and (self.interrupted or self.due(self.config.save_every, step)):
            self.save(step)
        self.record = {}

    def save(self, step: int) -> None:
        """Write the checkpoint, the model and the curves."""
        policy = self.objects["policy"]
        if self.config.shard:
            about = {"format": FORMAT, "step": step, "data": self.fingerprint}
            save_sharded(self.folder, self.main, self.objects, about)
        elif self.main:
            processes = self.accelerator.num_processes
            save_checkpoint(self.folder, step, self.objects, self.fingerprint, processes)
        if self.main or self.config.shard:  # shards are gathered by all processes
            save_model(self.folder, policy, self.tokenizer, base_of(self.config.model), self.main)
        if self.main:
            plot.save([self.folder], self.folder / "curves.png")

    def load(self) -> int:
        """Give all objects the state of the checkpoint; returns the step after which it was saved."""
        if not self.config.shard:
            processes = self.accelerator.num_processes
            return load_checkpoint(self.folder, self.objects, self.fingerprint, processes)
        saved = read_rest(self.folder)
        check_checkpoint(self.folder, saved, self.fingerprint)
        load_sharded(self.folder, self.objects)
        return saved["step"]

    def finish(self) -> None:
        """Say where everything is."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.main:
            print(f"model, metrics and curves are in {self.folder}", flush=True)
        if self.accelerator.num_processes > 1:  # alone, the process group may be vLLM's, which ends it itself
            self.accelerator.wait_for_everyone()
            torch.distributed.destroy_process_group()


def announce_cost(model, prompts: list[list[int]], responses: int, max_new_tokens: int) -> None:
    """Say before the first evaluation of a large model on a CPU how much work it is."""
    parameters = sum(p.numel() for p in model.parameters())
    if model.device.type != "cpu" or parameters < 50e6:
        return
    tokens = len(prompts) * responses * max_new_tokens + sum(len(prompt) for prompt in prompts) * 2
    seconds = 2 * parameters * tokens / matrix_rate()  # a product and a sum for each parameter and token
    cost = f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"
    print(
        f"evaluation: {len(prompts)} questions x {responses} responses of at most {max_new_tokens} tokens with "
        f"{parameters / 1e6:.0f} M parameters on a CPU take {cost} or more if all are that long; "
        "--eval-prompts, --eval-samples and --max-new-tokens make it less"
    )


def matrix_rate() -> float:
    """Operations per second of this CPU in products of matrices."""
    n = 1024
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    torch.mm(a, a)  # warm-up
    start = time.perf_counter()
    torch.mm(a, a)
    return 2 * n**3 / (time.perf_counter() - start)
