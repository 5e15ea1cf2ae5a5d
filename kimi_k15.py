r"""Kimi k1.5: policy optimisation as online mirror descent, from "Scaling RL with LLMs" (arXiv 2501.12599).

Every iteration i takes the policy at its start, pi_i, as sampler and as reference. For each question x, sample a group
of G responses y_1..y_G from pi_i (the paper's k). Maximise, averaged over questions,

    E[ r ] - tau KL(pi || pi_i)                                                                              (eq. 2)

Its optimum is known up to a constant Z: it satisfies r - tau log Z = tau log(pi/pi_i) for every y, so the samples may
be off-policy. Hence a squared loss, taken on samples of pi_i while pi moves on:

    L(theta) = E[ (r - tau log Z - tau log( pi(y | x) / pi_i(y | x) ))^2 ],   y from pi_i

tau log Z = tau log E[ exp(r / tau) ] tends to the mean of r only as tau grows: for rewards 0 and 1 in equal parts it
is .50 in the limit, but .93 at tau = .1. The paper takes mean(r_1..r_G) all the same, and says that it works well. At
pi_i any such constant is a baseline, which changes no expected gradient; further on the minimum of L moves with it.
Minus the gradient of L over 2 tau is then the step

    1/G sum_j { A_j grad log pi(y_j | x) - tau/2 grad ( log( pi(y_j | x) / pi_i(y_j | x) ) )^2 }             (eq. 3)

    A_j = r_j - mean(r_1..r_G)                         (1) the advantage
    log pi(y | x) = sum_t log pi(y_t | x, y_<t)        (2) the response is one action: no 1/|o_i|
    tau/2 ( log( pi(y | x) / pi_i(y | x) ) )^2         (3) what holds pi near pi_i, in place of a clip

Several updates per iteration (--epochs, --minibatches); only from the second on is the penalty at work. tau is not in
the paper, and its scale depends on length: log(pi/pi_i) is a sum over tokens, larger for longer responses.
Kept from the paper: the optimiser starts anew in every iteration; the length reward (section 2.3.3); easy questions
first, then those that fail most (section 2.3.4). The first step of a new Adam is lr times the sign of each gradient:
the scale of the rewards and the clipping of gradients change nothing in it. Gone from grpo.py: std, ratio, clip, the
mean over tokens 1/|o_i|, the KL to the starting model. Kept from it: gradients clipped to norm 1. Left out: partial
rollouts, the learned reward models, and the two filters of section 2.1, which rate questions by a model's responses
(too easy or too hard; right by a guess).

    python kimi_k15.py
        On a CPU, no download: a tiny model learns to think before it answers, and is right.
    python kimi_k15.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 --steps 200 \
                       --tokens-per-microbatch 16384 --tau 0.01 --length-weight 0.1 --length-from 100 --tis 2
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch eval_pass@1, kl_old and response_length.
        In bf16 vLLM and the trainer round differently, so vLLM does not quite sample from pi_old: hence --tis.
"""

import math
import random
from dataclasses import dataclass
from typing import Annotated

import torch

from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_logprobs, make_policy
from plumbing.fail import fail
from plumbing.flags import AtLeast, RunConfig, parse
from plumbing.processes import clip_gradients, gather, sum_gradients
from plumbing.run import Run
from rewards import parse_weights, score, weighted_sum
from rollout import check_sampler, make_sampler


@dataclass
class Config(RunConfig):  # model, data, sampler, evaluation and the like: plumbing/flags.py
    rewards: tuple[str, ...] = ("accuracy=1", "format=0")  # r: named rewards with weights; 0: only logged
    steps: int = 80  # number of rollouts, each followed by epochs x minibatches updates
    prompts_per_step: int = 16  # questions q per rollout
    group_size: Annotated[int, AtLeast(2)] = 8  # G: responses per question; the group is the baseline
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # divides the logits, when the policy samples and when it learns
    epochs: int = 2  # passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    tau: float = 0.1  # tau: weight of the squared log-ratio of a response, a sum over its tokens
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off
    length_weight: float = 0.0  # of the length reward, which lies within -0.5 and 0.5
    length_from: int = 40  # step from which on it counts; the paper, too, begins without
    curriculum: int = 0  # steps until all questions are drawn, easy ones first; 0: all from the start
    prioritised: bool = False  # draw questions in proportion to 1 - their success rate so far


# --- questions ---


class SuccessRates:
    """The share of right responses to each question in the whole run; it is saved with the run."""

    def __init__(self):
        self.counts = {}  # question -> [right responses, responses]

    def record(self, examples: list[dict], accuracy: list[float]) -> None:
        """Count the responses of a step, those of all processes: so each one draws the same questions."""
        questions = [example["question"] for example in examples]
        for question, x in gather(list(zip(questions, accuracy, strict=True))):
            right, responses = self.counts.get(question, (0, 0))
            self.counts[question] = [right + (x == 1), responses + 1]

    def of(self, example: dict) -> float:
        """The success rate of a question; 0 if it was never drawn."""
        right, responses = self.counts.get(example["question"], (0, 1))
        return right / responses

    def state_dict(self) -> dict:
        return self.counts

    def load_state_dict(self, state: dict) -> None:
        self.counts = state


def check_levels(examples: list[dict], config: Config) -> None:
    """End the run if --curriculum has nothing to go by."""
    if config.curriculum and any("level" not in example for example in examples):
        fail("--curriculum needs questions with a level; drop it, or use a procedural --task")


def easy_first(examples: list[dict], n: int, step: int, steps: int) -> list[dict]:
    """The easiest questions by their level: a share step/steps of all, but at least n; from step `steps` on, all."""
    if step >= steps:
        return examples
    size = max(n, math.ceil(len(examples) * step / steps))
    return sorted(examples, key=lambda example: example["level"])[:size]


def draw_weighted(examples: list[dict], weights: list[float], n: int, seed: int, step: int) -> list[dict]:
    """`n` different examples drawn one by one, each time in proportion to the weights of those that are left.

    An example of weight 0 comes only where there are not enough others.
    """
    # Example i arrives after a time that is exponential with rate w_i; the first n to arrive are such a draw.
    rng = random.Random(f"draw weighted {seed} {step}")
    arrivals = []
    for i, weight in enumerate(weights):
        time = rng.expovariate(1.0) / weight if weight > 0 else math.inf
        arrivals.append((time, rng.random(), i))  # the second number decides between equal times
    return [examples[i] for _, _, i in sorted(arrivals)[:n]]


def draw_questions(examples: list[dict], rates: SuccessRates, config: Config, step: int) -> list[dict]:
    """The questions of a step: of the easy ones first; if prioritised, in proportion to 1 - success rate."""
    n = config.prompts_per_step
    pool = easy_first(examples, n, step, config.curriculum)
    if config.prioritised:
        return draw_weighted(pool, [1 - rates.of(example) for example in pool], n, config.seed, step)
    if len(pool) < len(examples):  # while the list grows, draw would skip some questions and repeat others
        return random.Random(f"draw uniform {config.seed} {step}").sample(pool, n)
    return draw(pool, n, config.seed, step)


# --- advantage ---


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """A_j = r_j - mean(r) within each group: [B] -> [B], rows of a group next to each other.

    The mean includes r_j itself. A group of equal rewards has advantage exactly 0.
    """
    r = rewards.view(-1, group_size)  # [P, G]
    r = r - r[:, :1]  # changes no advantage; equal rewards become exactly 0, however their mean is rounded
    mean = r.mean(dim=1, keepdim=True)  # [P, 1]
    return (r - mean).flatten()  # [B] (1)


def length_rewards(lengths: torch.Tensor, accuracy: list[float], group_size: int) -> torch.Tensor:
    """0.5 for the shortest response of its group to -0.5 for the longest, in proportion: [B], B numbers -> [B].

    A wrong response (accuracy below 1) gets at most 0. In a group of equal lengths all get 0.
    """
    low, high = lengths.view(-1, group_size).aminmax(dim=1)  # [P] each
    low = low.repeat_interleave(group_size)  # [B]
    high = high.repeat_interleave(group_size)  # [B]
    reward = torch.where(high > low, 0.5 - (lengths - low) / (high - low), 0.0)  # [B] lambda
    return torch.where(torch.tensor(accuracy, device=lengths.device) == 1, reward, reward.clamp(max=0))  # [B]


# --- kl ---


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """pi_ref/pi - log(pi_ref/pi) - 1 per token, in nats: [B, T], [B, T] -> [B, T]; here only to be logged.

    Never negative, and its mean over samples of pi is KL(pi || pi_ref). Our samples are of pi_i: that is pi here.
    """
    log_ratio = ref_logp - logp  # [B, T]
    return log_ratio.exp() - log_ratio - 1


# --- loss ---


def policy_loss(
    logp, old_logp, advantages, mask, num_responses, tau,
    weight=1.0,
):  # fmt: skip
    """A loss whose gradient is minus eq. 3 -> (loss, stats). Losses of micro-batches add up to that of the update.

    It is L / (2 tau) but for a term without theta: (A - tau x)^2 / (2 tau) = A^2 / (2 tau) - (A x - tau/2 x^2).

    logp, old_logp [B, T]: log pi and log pi_i of the sampled tokens
    advantages [B]; mask [B, T]: True on response tokens
    num_responses: of the whole update, over all micro-batches and processes; gives 1/G and the mean over questions
    weight: of the importance sampling, [B, 1] per response; 1 if the sampler's distribution is pi_i
    """
    A = advantages[:, None]  # [B, 1]
    log_ratio = ((logp - old_logp) * mask).sum(dim=1, keepdim=True)  # [B, 1] (2) x, of the whole response
    per_response = weight * (A * log_ratio - tau / 2 * log_ratio**2)  # [B, 1] (3) grad of A x: A grad log pi
    kl_old = kl_k3(logp=old_logp, ref_logp=logp)  # [B, T] of KL(pi_i || pi)
    stats = {"log_ratio_squared": log_ratio**2, "ratio_max": log_ratio.exp(), "kl_old": kl_old}
    return -per_response.sum() / num_responses, stats  # 1/G sum_i


# --- training ---


def main(config: Config) -> None:
    run = Run(config)  # the folder, the log, and the processes, if there are several
    accelerator = run.accelerator
    weights = parse_weights(config.rewards)
    check_sampler(config.sampler)
    task = read_task(config)  # wrong data ends the run here, before the weights are loaded
    check_levels(task.train, config)

    policy, tokenizer = make_policy(config, accelerator.device)
    parameters = policy.trained()  # all, or the adapter of --lora-rank
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rates = SuccessRates()
    train, test = encode_task(task, config, tokenizer, policy.positions)
    stop = stop_strings(tokenizer, config.template)
    sampler = make_sampler(config, policy, tokenizer, stop, accelerator.autocast, optimizer)
    run.start(tokenizer, train, policy=policy, optimizer=optimizer, rates=rates)  # with --resume: as saved
    sampler.push(policy)  # its present weights
    responses_per_update = config.prompts_per_step * config.group_size // config.minibatches
    updates = config.epochs * config.minibatches
    if run.first_step == 1:
        run.evaluate(0, sampler, test, weights)
        run.end_step(0)

    for step in run.steps():
        # --- rollout: G responses to each question, from pi_i ---
        questions = run.share(draw_questions(train, rates, config, step))  # this process's share
        seed = run.seed(step)  # every step has its own random numbers
        prompts = [question["prompt_ids"] for question in questions]
        batch = sampler.generate(prompts, config.group_size, config.temperature, seed)
        sampler.sleep()  # vLLM leaves the GPU's memory to the update
        run.lap("seconds_rollout")

        # --- log-probs of pi_i, by the trainer: the sampler's own differ by rounding ---
        with accelerator.autocast():
            if updates > 1:  # with one update, the policy being trained is still pi_i
                batch["old_logp"] = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index.tolist()]  # the question of each of the B responses
        scores = score(batch, examples, weights)  # reward name -> B numbers
        rewards = torch.tensor(weighted_sum(scores, weights), device=accelerator.device)  # [B]
        if config.length_weight and step >= config.length_from:
            shorter = length_rewards(batch.lengths, scores["accuracy"], config.group_size)  # [B]
            rewards = rewards + config.length_weight * shorter  # [B]
            scores["length"] = shorter.tolist()  # logged as reward/length
        batch["rewards"] = rewards
        rates.record(examples, scores["accuracy"])
        batch["advantages"] = group_advantages(rewards, config.group_size)  # [B]

        # --- update: some epochs over the rollout ---
        optimizer.state.clear()  # another pi_i is another problem: no momentum from the last one
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature)  # [b, t] each
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()  # ratio 1, gradient not 0
                    gap = old_logp - micro.sampler_logp  # [b, t] trainer minus sampler, a matter of rounding
                    weight = gap.sum(1, keepdim=True).exp().clamp(max=config.tis) if config.tis else 1.0  # [b, 1]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro.response_mask, responses_per_update,
                        config.tau,
                        weight,
                    )  # fmt: skip
                    accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                grad_norms.append(clip_gradients(accelerator, parameters, 1.0))
                run.check_update(batch, grad_norms[-1])  # ends the run if these are not finite
                optimizer.step()  # does nothing where there is no gradient: pi is pi_i and no informative group
                optimizer.zero_grad()
        run.check_weights(batch)
        sampler.push(policy)  # pi_i <- pi
        run.lap("seconds_update")  # all since the rollout

        # --- log, evaluate, save ---
        run.log(step, updates, batch, scores, grad_norm=torch.tensor(grad_norms).mean().item(), lr=config.lr)
        if step == 1 or run.due(config.eval_every, step):
            run.samples(step, batch, examples, scores, advantage=batch["advantages"])
        if run.due(config.eval_every, step):
            run.evaluate(step, sampler, test, weights)
        run.end_step(step)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
