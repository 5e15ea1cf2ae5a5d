"""What every script needs and no equation mentions: the command line, the run folder, metrics, samples, checkpoints.

A run leaves in its folder: config.json; metrics.jsonl, one line per step (step 0: the evaluation before training);
samples.jsonl, completions with rewards and advantages; curves.png; checkpoint.pt, for --resume; model/, for others.
"""

import dataclasses
import json
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import tyro
from accelerate.utils import gather_object
from tqdm import tqdm

import plot
from rewards import evaluation_metrics, rollout_metrics, score


def parse(config_class):
    """The configuration from the command line; with --resume DIR, flags not given are those of the run in DIR."""
    config = tyro.cli(config_class, description=sys.modules["__main__"].__doc__)
    if not config.resume:
        return config
    folder = Path(config.resume)
    if not (folder / "checkpoint.pt").exists():
        raise SystemExit(f"--resume {folder}: no checkpoint.pt is there to go on from; start a new run")
    saved = json.loads((folder / "config.json").read_text())
    if saved.pop("script") != Path(sys.argv[0]).stem:
        raise SystemExit(f"--resume {folder}: that run was made by another script")
    saved = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    config = dataclasses.replace(tyro.cli(config_class, default=saved), out=config.resume)
    if config != dataclasses.replace(saved, steps=config.steps, out=config.out, resume=config.resume):
        raise SystemExit("--resume goes on as the run began; of the other flags only --steps may change")
    return config


def check(config, processes: int) -> None:
    """Refuse, before any work, numbers that cannot be meant."""
    least = {"group_size": 2, "temperature": 0.01, "eval_prompts": processes, "pairs_per_step": processes}
    for field in dataclasses.fields(config):
        value, may_be_0 = getattr(config, field.name), field.default == 0 or "_every" in field.name
        low = least.get(field.name, 0 if isinstance(value, float) or may_be_0 else 1)
        if isinstance(value, int | float) and value < low:
            raise SystemExit(f"--{field.name.replace('_', '-')} {value}: it must be at least {low}")
    if hasattr(config, "minibatches"):
        responses = config.prompts_per_step * config.group_size
        if config.prompts_per_step % processes or responses % (processes * config.minibatches):
            raise SystemExit("--prompts-per-step: give every process and every minibatch the same number of responses")


def sum_gradients(accelerator, parameters) -> None:
    """Add up the gradients of all processes: each one's loss is its share of the whole batch's."""
    has_gradient = torch.tensor(float(any(p.grad is not None for p in parameters)), device=accelerator.device)
    if accelerator.reduce(has_gradient, "sum") > 0:  # else no process has anything to learn from
        for p in parameters:
            p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")


class Run:
    """One training run: its folder, its loop counter, what it logs and what it saves."""

    def __init__(self, config, accelerator):
        self.config, self.accelerator, self.main = config, accelerator, accelerator.is_main_process
        check(config, accelerator.num_processes)
        script = Path(sys.modules[type(config).__module__].__file__).stem
        self.folder = Path(config.out or f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (self.folder / "metrics.jsonl").exists() and not config.resume:
            raise SystemExit(f"--out {self.folder}: a run is there; give another --out, or --resume {self.folder}")
        self.first_step, self.interrupted, self.record, self.totals = 1, False, {}, defaultdict(float)
        fields = {"script": script, **dataclasses.asdict(config)}
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        accelerator.init_trackers(self.folder.name, config={name: str(value) for name, value in fields.items()})

    # --- the loop ---

    def steps(self):
        """The steps still to do, with a progress bar. Ctrl-C ends the loop after the present step: nothing is lost."""
        self.bar = tqdm(total=self.config.steps, initial=self.first_step - 1, disable=not self.main, unit="step")
        previous = signal.signal(signal.SIGINT, self._interrupt)  # Ctrl-C
        for step in range(self.first_step, self.config.steps + 1):
            self.started = self.last_lap = time.perf_counter()
            yield step
            self.bar.update()
            if any(gather_object([self.interrupted])):
                break
        signal.signal(signal.SIGINT, previous)
        self.bar.close()

    def _interrupt(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        if self.main:
            self.bar.write(f"stopping after this step (at once: Ctrl-C again); to go on: --resume {self.folder}")

    def due(self, every: int, step: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is due after this step."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def lap(self, name: str) -> None:
        """Log the seconds since the step began, or since the last lap, under this name."""
        now = time.perf_counter()
        self.totals[name], self.last_lap = now - self.last_lap, now

    # --- metrics ---

    def collect(self, mask: torch.Tensor, loss: torch.Tensor, **per_token: torch.Tensor) -> None:
        """Add a micro-batch: its share of the loss, and [B, T] or [B, 1] tensors to average (*_max: the maximum)."""
        self.totals["loss"] += loss.detach()
        self.totals["tokens"] += mask.sum()
        for name, x in per_token.items():
            so_far, x = self.totals[name], x.detach().expand_as(mask)[mask]
            self.totals[name] = max(so_far, x.max()) if name.endswith("_max") else so_far + x.sum()

    def log(self, step: int, updates: int, batch=None, scores: dict[str, list] | None = None, **metrics) -> None:
        """Make the metrics of a step, over all processes: of its rollouts, of what was collected, and these."""
        totals, self.totals = self.totals, defaultdict(float)
        seconds = {name: totals.pop(name) for name in list(totals) if name.startswith("seconds")}
        parts = gather_object([{name: float(x) for name, x in totals.items()}])  # one per process
        loss, tokens = (sum(part.get(name, 0.0) for part in parts) for name in ("loss", "tokens"))
        record = {"step": step, "loss": loss / updates, "tokens": int(tokens)}
        for name in sorted({name for part in parts for name in part} - record.keys()):
            values = [part[name] for part in parts if name in part]
            record[name] = max(values) if name.endswith("_max") else sum(values) / tokens
        if batch is not None:
            lists = batch["rewards"].tolist(), batch.lengths.tolist(), batch.finish_reasons
            rewards, lengths, reasons = (gather_object(x) for x in lists)
            scores = {name: gather_object(x) for name, x in scores.items()}
            record |= rollout_metrics(rewards, scores, lengths, reasons, self.config.group_size)
        self.record = record = record | metrics | seconds | {"seconds": time.perf_counter() - self.started}
        shown = [f"{n} {record[n]:.3g}" for n in "loss reward accuracy response_length margin".split() if n in record]
        self.bar.set_postfix_str(f"{', '.join(shown)}, {record['tokens'] / record['seconds']:.0f} tokens/s")

    def evaluate(self, step: int, sampler, examples: list[dict], k: int = 8) -> None:
        """Add held-out metrics: greedy accuracy, and pass@1 and pass@k from k samples at the training temperature."""
        share = examples[self.accelerator.process_index :: self.accelerator.num_processes]
        prompts, repeated = [example["prompt_ids"] for example in share], [e for e in share for _ in range(k)]
        greedy = sampler.generate(prompts, n=1, temperature=0.0, seed=0)
        sampled = sampler.generate(prompts, n=k, temperature=self.config.temperature, seed=0)
        greedy_right = gather_object(score(greedy.texts, share, [])["accuracy"])
        scores = score(sampled.texts, repeated, ["format"])
        scores, lengths = {n: gather_object(x) for n, x in scores.items()}, gather_object(sampled.lengths.tolist())
        self.record = {"step": step} | self.record | evaluation_metrics(greedy_right, scores, lengths, k)
        if self.main:
            shown = ", ".join(f"{name[5:]} {x:.2f}" for name, x in self.record.items() if name.startswith("eval_"))
            tqdm.write(f"held out, after step {step}: {shown}\n    {share[0]['question']!r} -> {sampled.texts[0]!r}")

    def samples(self, step: int, batch, examples: list[dict], scores: dict[str, list], count: int = 8) -> None:
        """Append the first completions of a training batch with their rewards and advantages to samples.jsonl."""
        for i in range(min(count, len(batch.texts)) if self.main else 0):
            record = {"step": step} | {key: examples[i][key] for key in ("question", "answer")}
            record |= {"completion": batch.texts[i], "finish_reason": batch.finish_reasons[i]}
            record |= {"reward": batch["rewards"][i].item(), "advantage": batch["advantages"][i].tolist()}
            self._append("samples.jsonl", record | {f"reward/{name}": x[i] for name, x in scores.items()})

    def _append(self, name: str, record: dict) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record) + "\n")

    # --- saving ---

    def end_step(self, step: int, tokenizer, policy, **others) -> None:
        """Write the step's line of metrics; if due, save the model, and the state of everything for --resume."""
        self.accelerator.log({n: x for n, x in self.record.items() if x is not None}, step=step)
        if self.main:
            self._append("metrics.jsonl", self.record)
            if step > 0 and (self.interrupted or self.due(self.config.save_every, step)):
                state = {name: x.state_dict() for name, x in {"policy": policy, **others}.items()}
                torch.save({"step": step, **state}, self.folder / "checkpoint.tmp")
                (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")  # never a half-written one
                policy.save_pretrained(self.folder / "model")
                tokenizer.save_pretrained(self.folder / "model")
                plot.draw([self.folder], self.folder / "curves.png")
        self.record = {}

    def restore(self, **objects) -> None:
        """With --resume: load the state of these objects, and forget what was logged after it was saved."""
        saved = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        for name, x in objects.items():
            x.load_state_dict(saved[name])
        self.first_step = saved["step"] + 1
        for path in self.folder.glob("*s.jsonl") if self.main else ():  # metrics and samples
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < self.first_step]
            path.write_text("".join(kept))

    def finish(self) -> None:
        """Say where everything is."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.num_processes > 1:  # alone, the process group may be vLLM's, which ends it itself
            torch.distributed.destroy_process_group()
        if self.main:
            print(f"model, metrics, samples and curves are in {self.folder}")
