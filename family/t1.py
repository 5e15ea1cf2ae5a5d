r"""T1: RLOO with exploration (arXiv 2501.11651). A reconstruction from summaries: alpha and a are not known.

The whole response is one action. For each question x, sample G responses y_1..y_G at a temperature of 1.2, and step
along

    1/G sum_i { A_i grad log pi(y_i | x) + alpha 1/|y_i| sum_t grad H_it }

    A_i = R_i - 1/(G-1) sum_{j != i} R_j                          (1) the advantage: the others are the baseline
    log pi(y | x) = sum_t log pi(y_t | x, y_<t)                   (2) the response is one action: no 1/|o_i|
    rho_i = pi(y_i | x) / pi_old(y_i | x)                         (3) the ratio, 1 with one update per rollout
    R_i = r_i - beta log( pi(y_i | x) / pi_ref(y_i | x) )         (4) the KL ("k1") of the response is in the reward
    H_it = -sum_v pi(v | x, y_i<t) log pi(v | x, y_i<t)           (5) the entropy of the policy at a token
    theta_ref <- a theta_ref + (1 - a) theta    after each step   (6) the reference's weights: a moving average (EMA)

What it adds to RLOO (rloo.py) keeps the policy exploring: a high temperature, an entropy bonus (5), and a reference (6)
that follows, so that the KL brakes the change of the last steps and not the distance from the start. A response with a
bad pattern (cut off, repeating itself, mixing languages: the reward bad_pattern in rewards.py) has 1 subtracted from
its reward; a summary of the paper says that it gets -1 instead.
Summaries say that the paper subtracts from each KL the mean of the others. Under (1) that only makes beta G/(G-1) times
as large, so there is no code for it. (The mean of the whole group would cancel.)
Known: G = 64, beta = 2e-4, the temperature, a learning rate of 1.5e-6. Not known: alpha, a, and how entropies are
averaged. Here it is over the tokens of each response, then over responses.
Evaluation samples at 1.2 as well, so eval_pass@1 is not comparable with the other scripts'; eval_accuracy, greedy, is.

    python -m family.t1
        On a CPU, no download: within a minute a tiny model learns to think before it answers, and is right.
    python -m family.t1 --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 \
                        --steps 200 --tokens-per-microbatch 16384 --tis 2
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch eval_pass@1 and informative_groups.
        In bf16 vLLM and the trainer round differently, so vLLM does not quite sample from pi_old: hence --tis.
"""

import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

from dataclasses import dataclass
from typing import Annotated

import torch

from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_logprobs, make_policy
from plumbing.flags import AtLeast, RunConfig, parse
from plumbing.processes import clip_gradients, sum_gradients
from plumbing.run import Run
from rewards import parse_weights, score, weighted_sum
from rollout import check_sampler, make_sampler


@dataclass
class Config(RunConfig):  # model, data, sampler, evaluation and the like: plumbing/flags.py
    rewards: tuple[str, ...] = ("accuracy=1", "format=0", "bad_pattern=-1")  # r: named rewards with weights
    steps: int = 80  # number of rollouts, each followed by epochs x minibatches updates
    prompts_per_step: int = 16  # questions q per rollout
    group_size: Annotated[int, AtLeast(2)] = 8  # G: responses per question; the group is the baseline
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.2  # divides the logits, when the policy samples and when it learns
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: Annotated[float, AtLeast(1e-9)] = 2e-4  # beta: weight of the KL to the moving average, per nat
    ema: float = 0.9  # a: how much of the reference stays in each step
    alpha: float = 0.001  # alpha: weight of the entropy bonus, per nat
    clip_low: float = 0.2  # eps below: ratios under 1 - eps are clipped
    clip_high: float = 0.2  # eps above: ratios over 1 + eps are clipped
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off


# --- advantage ---


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """A_i = r_i - mean of the other r_j within each group: [B] -> [B], rows of a group next to each other.

    A group of equal rewards has advantage exactly 0.
    """
    r = rewards.view(-1, group_size)  # [P, G]
    r = r - r[:, :1]  # changes no advantage; equal rewards become exactly 0, however their mean is rounded
    mean = r.mean(dim=1, keepdim=True)  # [P, 1]
    others = (group_size * mean - r) / (group_size - 1)  # [P, G] the mean of the others: leave one out
    return (r - others).flatten()  # [B] (1)


# --- reference ---


@torch.no_grad()
def move_average(average, policy, ema: float) -> None:
    """average <- ema average + (1 - ema) policy, weight by weight."""
    for old, new in zip(average.parameters(), policy.parameters(), strict=True):
        old.lerp_(new, 1 - ema)  # (6)


# --- loss ---


def policy_loss(
    logp, old_logp, advantages, mask, num_responses, clip_low, clip_high,
    entropy, alpha,
    weight=1.0,
):  # fmt: skip
    """A loss whose gradient is minus that step -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, old_logp [B, T]: log pi and log pi_old of the sampled tokens
    advantages [B]; mask [B, T]: True on response tokens
    num_responses: of the whole update, over all micro-batches and processes; gives 1/G and the mean over questions
    entropy [B, T]: H, with gradient; alpha: weight of the bonus
    weight: of the importance sampling, [B, 1] per response; 1 if the sampler's distribution is pi_old
    """
    A = advantages[:, None]  # [B, 1]
    ratio = ((logp - old_logp) * mask).sum(dim=1, keepdim=True).exp()  # [B, 1] (3) of the whole response
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, 1]
    objective = weight * torch.minimum(ratio * A, clipped * A)  # [B, 1] (3)
    is_clipped = clipped * A < ratio * A  # [B, 1] where the clip binds there is no gradient
    stats = {"clip_fraction": is_clipped.float(), "ratio_max": ratio}  # per response; logged as mean and maximum
    bonus = (entropy * mask).sum(1) / mask.sum(1)  # [B] (5) 1/|y_i| sum_t
    per_response = objective.squeeze(1) + alpha * bonus  # [B] (2) one action
    return -per_response.sum() / num_responses, stats  # 1/G sum_i


# --- training ---


def main(config: Config) -> None:
    run = Run(config)  # the folder, the log, and the processes, if there are several
    accelerator = run.accelerator
    weights = parse_weights(config.rewards)
    check_sampler(config.sampler)
    task = read_task(config)  # wrong data ends the run here, before the weights are loaded

    policy, tokenizer = make_policy(config, accelerator.device)
    reference = policy.reference() if config.beta else None
    parameters = policy.trained()  # all, or the adapter of --lora-rank
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    train, test = encode_task(task, config, tokenizer, policy.positions)
    stop = stop_strings(tokenizer, config.template)
    sampler = make_sampler(config, policy, tokenizer, stop, accelerator.autocast, optimizer)
    run.start(tokenizer, train, policy=policy, optimizer=optimizer, reference=reference)  # with --resume: as saved
    sampler.push(policy)  # its present weights
    responses_per_update = config.prompts_per_step * config.group_size // config.minibatches
    updates = config.epochs * config.minibatches
    if run.first_step == 1:
        run.evaluate(0, sampler, test, weights)
        run.end_step(0)

    for step in run.steps():
        # --- rollout: G responses to each question, from pi_old ---
        questions = run.share(draw(train, config.prompts_per_step, config.seed, step))  # this process's share
        seed = run.seed(step)  # every step has its own random numbers
        prompts = [question["prompt_ids"] for question in questions]
        batch = sampler.generate(prompts, config.group_size, config.temperature, seed)
        sampler.sleep()  # vLLM leaves the GPU's memory to the update
        run.lap("seconds_rollout")

        # --- log-probs of pi_old and of the reference, by the trainer: the sampler's own differ by rounding ---
        with accelerator.autocast():
            if updates > 1 or reference:  # with one update, the policy being trained is still pi_old
                batch["old_logp"] = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)
            if reference:
                batch["ref_logp"] = batch_logprobs(reference, batch, config.temperature, config.tokens_per_microbatch)

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index.tolist()]  # the question of each of the B responses
        scores = score(batch, examples, weights)  # reward name -> B numbers
        rewards = torch.tensor(weighted_sum(scores, weights), device=accelerator.device)  # [B]
        batch["rewards"] = rewards
        # [B] (4) R_i = r_i - beta k1, the KL of the whole response
        rewards = rewards - config.beta * (batch["old_logp"] - batch["ref_logp"]).sum(1) if reference else rewards
        batch["advantages"] = group_advantages(rewards, config.group_size)  # [B]

        # --- update: mu epochs over the rollout ---
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature, entropy_gradient=True)  # [b, t] each
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()  # ratio 1, gradient not 0
                    gap = old_logp - micro.sampler_logp  # [b, t] trainer minus sampler, a matter of rounding
                    weight = gap.sum(1, keepdim=True).exp().clamp(max=config.tis) if config.tis else 1.0  # [b, 1]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro.response_mask, responses_per_update,
                        config.clip_low, config.clip_high,
                        entropy, config.alpha,
                        weight,
                    )  # fmt: skip
                    stats |= {"kl": micro["old_logp"] - micro["ref_logp"]} if reference else {}  # only to be logged
                    accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                grad_norms.append(clip_gradients(accelerator, parameters, 1.0))
                run.check_update(batch, grad_norms[-1])  # ends the run if these are not finite
                optimizer.step()  # does nothing where there is no gradient: no KL and no informative group
                optimizer.zero_grad()
        run.check_weights(batch)
        move_average(reference, policy, config.ema)
        sampler.push(policy)  # pi_old <- pi
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
