r"""GSPO: Group Sequence Policy Optimization (arXiv 2507.18071).

For each question x, sample a group of G responses y_1..y_G from the policy pi_old; maximise, averaged over questions,

    J(theta) = 1/G sum_i min[ s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i ]                          (eq. 5)

    A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)              (1) the advantage: GRPO's                    (eq. 6)
    s_i = ( pi(y_i | x) / pi_old(y_i | x) )^(1/|y_i|)         (2) the geometric mean of the tokens' ratios,
        = exp( 1/|y_i| sum_t log rho_it )                     (3) one ratio for the whole response         (eq. 7)
    - beta 1/|y_i| sum_t D_it, beta 0 by default              (4) the KL to pi_ref, as in grpo.py

    grad J = 1/G sum_i s_i A_i 1/|y_i| sum_t grad log pi(y_it | x, y_i<t)       where the clip does not bind

The reward is that of a whole response, so the ratio is too. GRPO (grpo.py) has a ratio for each token: an importance
weight from a single sample, which is mostly noise. s_i moves far less than a token's ratio, hence the paper's clip of
3e-4 below and 4e-4 above. That is for learning rates of 1e-6. At the tiny model's 1e-4 it clips a third of all
responses, so the defaults here are wider, from a sweep (docs/curves.md). All tokens of a response are clipped together
or not at all.
Until the first update of a rollout the ratio is 1, so with one update per rollout the step is GRPO's. Hence four
minibatches per rollout, as in the paper. The 1/|y_i| of GRPO stays. With --tis a response is weighted by the mean of
its tokens' weights.
Kept from grpo.py: everything but the ratio. Without KL, as in the paper; --beta adds that of grpo.py.

    python -m family.gspo
        On a CPU, no download: within a minute a tiny model learns to think before it answers, and is right.
    python -m family.gspo --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 \
                          --steps 200 --tokens-per-microbatch 16384 --tis 2 \
                          --clip-low 3e-4 --clip-high 4e-4
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch clip_fraction and eval_pass@1.
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
    rewards: tuple[str, ...] = ("accuracy=1", "format=0")  # r: named rewards with weights; 0: only logged
    steps: int = 80  # number of rollouts, each followed by epochs x minibatches updates
    prompts_per_step: int = 16  # questions q per rollout
    group_size: Annotated[int, AtLeast(2)] = 8  # G: responses per question; the group is the baseline
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # divides the logits, when the policy samples and when it learns
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 4  # updates per pass; with a single one the ratio is 1
    lr: float = 5e-5  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.0  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    clip_low: float = 0.01  # eps below: ratios under 1 - eps are clipped; 3e-4 for a pretrained model
    clip_high: float = 0.013  # eps above: ratios over 1 + eps are clipped; 4e-4 for a pretrained model
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off


# --- advantage ---


def group_advantages(rewards: torch.Tensor, group_size: int, eps: float = 1e-4, ddof: int = 1) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group: [B] -> [B], rows of a group next to each other.

    The std is divided by G - ddof: 1 is the unbiased one. A group of equal rewards has advantage exactly 0.
    """
    r = rewards.view(-1, group_size)  # [P, G]
    r = r - r[:, :1]  # changes no advantage; equal rewards become exactly 0, however their mean is rounded
    mean = r.mean(dim=1, keepdim=True)  # [P, 1]
    std = r.std(dim=1, keepdim=True, correction=ddof)  # [P, 1]
    return ((r - mean) / (std + eps)).flatten()  # [B] (1)


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
    logp, old_logp, advantages, mask, num_responses, clip_low, clip_high,
    ref_logp, beta,
    weight=1.0,
):  # fmt: skip
    """-J(theta) of eq. 5 for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, old_logp, ref_logp [B, T]: log pi, log pi_old, log pi_ref of the sampled tokens (ref_logp None if beta is 0)
    advantages [B]; mask [B, T]: True on response tokens
    num_responses: of the whole update, over all micro-batches and processes; gives 1/G and the mean over questions
    weight [B, T]: pi_old/pi_sampler, capped (--tis); 1 without
    """
    A = advantages[:, None]  # [B, 1]
    log_ratio = ((logp - old_logp) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)  # [B, 1] (2) 1/|y_i|
    ratio = log_ratio.exp()  # [B, 1] (3) s, of the whole response
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, 1]
    objective = weight * torch.minimum(ratio * A, clipped * A)  # [B, 1] (3)
    is_clipped = clipped * A < ratio * A  # [B, 1] where the clip binds there is no gradient
    stats = {"clip_fraction": is_clipped.float(), "ratio_max": ratio}  # [B, 1] each; logged: mean, maximum
    if beta:
        stats["kl"] = kl_k3(logp, ref_logp)  # [B, T] D
        objective = objective - beta * stats["kl"]  # [B, T] (4)
    per_response = (objective * mask).sum(1) / mask.sum(1)  # [B] the mean over tokens of weight and KL
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
    run.start(tokenizer, train, policy=policy, optimizer=optimizer)  # with --resume: as saved
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
                if not reference and not config.shard:  # without KL, a response without advantage has no gradient
                    rows = rows[batch["advantages"][rows] != 0]
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature)  # [b, t] each
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()  # ratio 1, gradient not 0
                    gap = old_logp - micro.sampler_logp  # [b, t] trainer minus sampler, a matter of rounding
                    weight = gap.exp().clamp(max=config.tis) if config.tis else 1.0  # [b, t]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro.response_mask, responses_per_update,
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
