"""Measure a model outside a run, or several side by side; or talk to it.

    python evaluate.py tiny runs/grpo/model                       held-out questions of the task: a table, a picture
    python evaluate.py runs/grpo/model --perturb longer           questions trained on, and each with more terms
    python evaluate.py MODEL --task qa --data original.jsonl perturbed.jsonl      the same for pairs of files
    python evaluate.py runs/grpo/model --ask "3+4+5="             a few responses, token by token

A model is a folder, an adapter or a name on the Hub. With a run's flags the numbers are those of the run's evaluation,
since both call plumbing/evaluation.py. The error is the std of the questions' own values over the root of their number.
pass@k is the unbiased estimate (rewards.py); majority@k asks whether the answer that most of k responses give is right.
Of two sets the difference is that of each question and its partner (as in MATH-Perturb, arXiv 2502.06453): who has
learned questions by heart loses, and who has learned to solve them does not.
"""

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import tyro

from data import (
    arithmetic_example,
    check_positions,
    encode_prompts,
    load_task,
    perturb,
    read_examples,
    stop_strings,
    with_system,
)
from logprobs import load_policy
from plot import bars
from plumbing.evaluation import answer, mean_and_error, show_tokens
from plumbing.fail import fail, say
from plumbing.flags import check_config
from plumbing.processes import make_accelerator
from rewards import majority_is_right, pass_at_k
from rollout import check_sampler, make_sampler
from verifiers import has_steps


@dataclass
class Config:
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tiny",)  # folders, adapters or Hub names
    task: str = "arithmetic"  # arithmetic, arithmetic_words, countdown, gsm8k, math, qa; levels as in arithmetic:3-6
    data: tuple[str, ...] = ()  # JSONL file or Hub set to be asked; a second file has the partner of each question
    perturb: Literal["", "numbers", "order", "longer"] = ""  # of a procedural task: questions trained on, and changed
    ask: str = ""  # a question of your own
    template: Literal["auto", "plain", "r1", "chat"] = "auto"  # how a question becomes a prompt
    system: str = ""  # system message before every question
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # what writes the responses
    sampler_tokens: int = 65536  # most tokens in the Hugging Face sampler's cache; memory only
    max_prompt_tokens: int = 512  # longer prompts are left out, tokens
    max_new_tokens: int = 64  # longest response, tokens
    temperature: float = 1.0  # of the samples
    eval_prompts: int = 128  # questions
    eval_samples: int = 8  # k: responses to each of them, besides the greedy one
    out: str = ""  # folder of the table, the picture and all numbers; empty: runs/evaluate-<time>


def question_sets(config: Config) -> dict[str, list[dict]]:
    """Name -> questions: one set, or two in which those at the same place are partners."""
    n = config.eval_prompts
    if config.perturb and config.data:
        fail("--perturb is for tasks made by a program; of data give two files, --data ORIGINAL PERTURBED")
    if config.ask:
        return {"asked": [asked(config.ask)]}
    if config.data:
        sets = {source: read_examples(source, config.task) for source in config.data}
        sizes = {len(examples) for examples in sets.values()}
        if len(config.data) > 2 or len(sizes) > 1:
            fail(f"--data: one source, or two with as many questions each; these have {sorted(sizes)}")
        return {name: examples[:n] for name, examples in sets.items()}
    task = load_task(config.task)
    if not config.perturb:
        return {"held out": task.test[:n]}
    if "level" not in task.train[0]:
        fail(f"--perturb: --task {config.task} is not made by a program; give two files, --data ORIGINAL PERTURBED")
    return {"trained on": task.train[:n], config.perturb: perturb(task.train, config.perturb, n)}


def asked(question: str) -> dict:
    """The example of a question of the user's own. Of a sum we know the answer."""
    if has_steps({"question": question}):
        return arithmetic_example([int(number) for number in question.removesuffix("=").split("+")], in_words=False)
    return {"question": question, "answer": "", "verifier": "text"}


def evaluate(model: str, config: Config, sets: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Name of a set -> for each of its questions the numbers of this model."""
    accelerator = make_accelerator()
    policy, tokenizer = load_policy(model, accelerator.device)
    config.model = model
    sampler = make_sampler(config, policy, tokenizer, stop_strings(tokenizer, config.template), accelerator.autocast)
    sampler.push(policy)
    found = {}
    for name, examples in sets.items():
        examples = with_system(examples, config.system)
        size = len(examples)
        examples = encode_prompts(examples, tokenizer, config.template, config.max_prompt_tokens, name)
        if len(sets) > 1 and len(examples) < size:
            fail("a prompt is longer than --max-prompt-tokens, and its partner would be alone; raise it")
        longest = max(len(example["prompt_ids"]) for example in examples)
        check_positions(longest + config.max_new_tokens, policy.positions, "--max-new-tokens")
        answers = answer(sampler, examples, config.eval_samples, config.temperature, show=f"{model}, {name}")
        if config.ask:
            show_tokens(answers.sampled, examples[0], tokenizer)
        found[name] = [numbers(answers, i, example, config.eval_samples) for i, example in enumerate(examples)]
    return found


def numbers(answers, i: int, example: dict, k: int) -> dict:
    """What the table has of question i."""
    rows = slice(i * k, (i + 1) * k)  # its samples
    right = answers.scores["accuracy"][rows]
    correct = round(sum(right))
    return {
        "question": example["question"],
        "level": example.get("level"),
        "greedy": answers.greedy_scores["accuracy"][i],
        "pass@1": pass_at_k(k, correct, 1),
        f"pass@{k}": pass_at_k(k, correct, k),
        f"majority@{k}": float(majority_is_right(answers.sampled.texts[rows], right, example)),
        "format": fmean(answers.scores["format"][rows]),
        "length": fmean(answers.sampled.lengths[rows].tolist()),
        "unchecked": fmean(answers.scores.unchecked[rows]),  # counted as wrong, though nobody knows
        "truncated": answers.sampled.finish_reasons[rows].count("length") / k,
    }


def rows_of(found: dict[str, list[dict]]) -> dict[str, dict]:
    """Name of a row -> metric -> (mean, error): each set, its levels, and the difference of two sets."""
    rows = {}
    for name, questions in found.items():
        metrics = [metric for metric in questions[0] if metric not in ("question", "level")]
        rows[name] = {m: mean_and_error([question[m] for question in questions]) for m in metrics}
        for level in sorted({question["level"] for question in questions} - {None}):
            of_level = [question for question in questions if question["level"] == level]
            rows[f"{name}, {level} numbers"] = {m: mean_and_error([q[m] for q in of_level]) for m in metrics}
    if len(found) == 2:
        pairs = list(zip(*found.values(), strict=True))
        rows["difference"] = {m: mean_and_error([second[m] - first[m] for first, second in pairs]) for m in metrics}
    return rows


def main(config: Config) -> None:
    check_config(config, processes=1)
    check_sampler(config.sampler)
    sets = question_sets(config)
    if len(config.models) == 1 or config.ask:
        results = [evaluate(model, config, sets) for model in config.models]
    else:  # each in a process of its own, whose memory is free afterwards
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            results = [pool.submit(evaluate, model, config, sets).result() for model in config.models]
    if config.ask:
        return
    tables = {model: rows_of(found) for model, found in zip(config.models, results, strict=True)}
    metrics = list(next(iter(tables[config.models[0]].values())))
    lines = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for model, rows in tables.items():
        for name, row in rows.items():
            cells = [f"{row[m][0]:.3g} ± {row[m][1]:.2g}" for m in metrics]
            lines.append(f"| {model}: {name} | " + " | ".join(cells) + " |")
    folder = Path(config.out or f"runs/evaluate-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    (folder / "questions.json").write_text(json.dumps(dict(zip(config.models, results, strict=True)), indent=1) + "\n")
    bars(tables, [m for m in metrics if m not in ("length", "unchecked", "truncated")], folder / "bars.png")
    print("\n".join(lines))
    say(f"table, picture and the numbers of each question are in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
