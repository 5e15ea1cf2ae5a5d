r"""MaxRL: Maximum Likelihood Reinforcement Learning (arXiv 2602.02710).

For each question q, sample a group of G responses o_1..o_G from the policy pi_old; maximise, over all tokens,

    J(theta) = mean_it { min[ rho_it A_it, clip(rho_it, 1 - eps, 1 + eps) A_it ] - beta D_it }

    A_it   = (r_i - mean(r_1..r_G)) / mean(r_1..r_G)          (1) the advantage; 0 if all are wrong
    mean_it                                                   (2) the mean over all tokens of all responses
    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)    (3) the ratio
    D_it   = pi_ref/pi - log(pi_ref/pi) - 1                   (4) the estimate of KL(pi || pi_ref), as in grpo.py

GRPO (grpo.py) divides by the std. Dividing by the mean instead changes the objective. Let p be the probability of a
right answer to q. Reinforcement learning maximises p; maximum likelihood would maximise

    log p = -sum_k (1 - p)^k / k,    with the gradient    sum_k (1 - p)^(k-1) grad p,    k = 1, 2, ...

With rewards of 0 and 1 the expectation of 1/G sum_i A_i grad log pi(o_i | q) is that gradient up to k = G - 1, which is
grad p times (1 - (1 - p)^(G-1)) / p. Where a group usually has a right answer this factor is nearly 1/p, as for log p;
it is at most G - 1. So a larger group changes the objective itself, not only the noise. (2) divides all responses by
one number, so each log pi(o_i | q) counts whole, as the sum over its tokens. GRPO's 1/|o_i| would break this.
A negative reward could turn the sign of A, so it is refused.
Kept from grpo.py: ratio, clip and KL; the authors train without KL (--beta 0). The mean (2) is over the tokens of the
update, not over those of each question.

    python -m family.maxrl
        On a CPU, no download: within a minute a tiny model learns to think before it answers, and is right.
    python -m family.maxrl --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 \
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
from plumbing.fail import fail
from plumbing.flags import AtLeast, RunConfig, parse
from plumbing.processes import clip_gradients, sum_gradients
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
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.04  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    clip_low: float = 0.2  # eps below: ratios under 1 - eps are clipped
    clip_high: float = 0.2  # eps above: ratios over 1 + eps are clipped
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off


# --- advantage ---


def group_advantages(rewards: torch.Tensor, group_size: int, eps: float = 1e-6) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / (mean(r) + eps) within each group: [B] -> [B], rows of a group next to each other.

    A group of equal rewards has advantage exactly 0. Ends the run (SystemExit) if a reward is negative.
    """
    if rewards.min() < 0:
        fail("--rewards: MaxRL divides by the mean reward, so none may be negative; use others", here=True)
    r = rewards.view(-1, group_size)  # [P, G]
    divisor = r.mean(dim=1, keepdim=True) + eps  # [P, 1]
    r = r - r[:, :1]  # changes no advantage; equal rewards become exactly 0, however their mean is rounded
    mean = r.mean(dim=1, keepdim=True)  # [P, 1]
    return ((r - mean) / divisor).flatten()  # [B] (1)


# --- kl ---


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """D = pi_ref/pi - log(pi_ref/pi) - 1 per token, in nats: [B, T], [B, T] -> [B, T] (eq. 4).

    Never negative, and its mean over samples of pi is KL(pi || pi_ref). Its gradient is not: the loss does not
    differentiate through the sampling. While pi is pi_old, the expected gradient of D is that of KL(pi_ref || pi).
    """
    log_ratio = ref_logp - logp  # [B, T]
    return log_ratio.exp() - log_ratio - 1  # [B, T] (4)


# --- loss ---


def policy_loss(
    logp, old_logp, advantages, mask, num_tokens, clip_low, clip_high,
    ref_logp, beta,
    weight=1.0,
):  # fmt: skip
    """-J(theta) for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, old_logp, ref_logp [B, T]: log pi, log pi_old, log pi_ref of the sampled tokens (ref_logp None if beta is 0)
    advantages [B]; mask [B, T]: True on response tokens
    num_tokens: response tokens in the whole update, over all micro-batches and processes: the mean over tokens
    weight [B, T]: pi_old/pi_sampler, capped (--tis); 1 without
    """
    A = advantages[:, None]  # [B, 1]
    ratio = (logp - old_logp).exp()  # [B, T] (3) rho
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
    objective = weight * torch.minimum(ratio * A, clipped * A)  # [B, T] (3)
    is_clipped = clipped * A < ratio * A  # [B, T] where the clip binds there is no gradient
    stats = {"clip_fraction": is_clipped.float(), "ratio_max": ratio}  # [B, T] each; logged: mean, maximum
    if beta:
        stats["kl"] = kl_k3(logp, ref_logp)  # [B, T] D
        objective = objective - beta * stats["kl"]  # [B, T] (4)
    return -(objective * mask).sum() / num_tokens, stats  # (2) mean_it


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
    run.start(tokenizer, train, policy=policy, optimizer=optimizer)  # with --resume: as saved
    sampler.push(policy)  # its present weights
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
            if updates > 1:  # with one update, the policy being trained is still pi_old
                batch["old_logp"] = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)
            if reference:
                batch["ref_logp"] = batch_logprobs(reference, batch, config.temperature, config.tokens_per_microbatch)

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index.tolist()]  # the question of each of the B responses
        scores = score(batch, examples, weights)  # reward name -> B numbers
        rewards = torch.tensor(weighted_sum(scores, weights), device=accelerator.device)  # [B]
        batch["rewards"] = rewards
        batch["advantages"] = group_advantages(rewards, config.group_size)  # [B]

        # --- update: mu epochs over the rollout ---
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
                num_tokens = accelerator.reduce(batch.lengths[rows].sum())  # of the update, all its responses
                if not reference and not config.shard:  # without KL, a response without advantage has no gradient
                    rows = rows[batch["advantages"][rows] != 0]
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature)  # [b, t] each
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()  # ratio 1, gradient not 0
                    gap = old_logp - micro.sampler_logp  # [b, t] trainer minus sampler, a matter of rounding
                    weight = gap.exp().clamp(max=config.tis) if config.tis else 1.0  # [b, t]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro.response_mask, num_tokens,
                        config.clip_low, config.clip_high,
                        micro["ref_logp"] if reference else None, config.beta,
                        weight,
                    )  # fmt: skip
                    accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                grad_norms.append(clip_gradients(accelerator, parameters, 1.0))
                run.check_update(batch, grad_norms[-1])  # ends the run if these are not finite
                optimizer.step()  # does nothing where there is no gradient: no KL and no informative group
                optimizer.zero_grad()
        run.check_weights(batch)
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
