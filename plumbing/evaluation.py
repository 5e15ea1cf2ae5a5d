"""Questions answered by a model, once greedily and k times at a temperature: what a run evaluates, and evaluate.py."""

from dataclasses import dataclass
from statistics import fmean, stdev

from batch import Rollouts
from rewards import Scores, score


@dataclass
class Answers:
    """Responses to P questions: one greedy one to each, and k sampled ones, which stand next to each other."""

    greedy: Rollouts  # P rows
    sampled: Rollouts  # P * k rows
    greedy_scores: Scores  # reward name -> P numbers
    scores: Scores  # reward name -> P * k numbers


def answer(sampler, examples: list[dict], k: int, temperature: float, rewards=(), show: str = "") -> Answers:
    """The same answers whoever asks: all random numbers come from seed 0.

    rewards: named rewards of the samples, besides accuracy and format; show: the title of the progress bars, or none
    """
    prompts = [example["prompt_ids"] for example in examples]
    greedy = sampler.generate(prompts, n=1, temperature=0.0, seed=0, show=f"{show}, greedy" if show else "")
    sampled = sampler.generate(prompts, n=k, temperature=temperature, seed=0, show=show)
    examples_of_samples = [example for example in examples for _ in range(k)]
    return Answers(
        greedy=greedy,
        sampled=sampled,
        greedy_scores=score(greedy, examples, []),
        scores=score(sampled, examples_of_samples, ["format", *rewards]),
    )


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean over the questions, and its standard error."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def show_tokens(batch, example: dict, tokenizer) -> None:
    """Print responses, each with its rewards and the log-prob of every token."""
    for i, text in enumerate(batch.texts):
        row = batch.select(batch["row"][i : i + 1])
        scores = score(row, [example], ["format"])
        rewards = [f"{name} {values[0]:g}" for name, values in scores.items() if example["answer"] or name == "format"]
        ids = row.response_ids[0].tolist()
        tokens = [f"{tokenizer.decode([t])!r} {x:.2f}" for t, x in zip(ids, row.sampler_logp[0].tolist(), strict=True)]
        print(f"\n{text}\n    {', '.join(rewards)}, {len(ids)} tokens, log-prob {row.sampler_logp.sum():.2f}")
        print("    " + " | ".join(tokens))
