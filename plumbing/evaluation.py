"""Questions answered by a model, once greedily and k times at a temperature: what a run evaluates, and evaluate.py."""

from dataclasses import dataclass

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
