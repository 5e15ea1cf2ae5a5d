r"""VAPO: Value-based Augmented PPO (arXiv 2504.05118). A reconstruction: there is no official code.

A response o to a question q is an episode, and each of its tokens an action; maximise, over all tokens,

    J(theta) = mean_t min[ rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t ] + mu mean_T log pi(o_t | ..)

    A_t     = delta_t + gamma lam A_t+1                           (1) the advantage, GAE, with a lam for each response:
    lam     = 1 - 1/(alpha |o|), at least 0                           the longer it is, the closer to 1
    delta_t = r_t + gamma V_t+1 - V_t                             A and V are 0 after the last token, truncated or not
    mean_t                                                        (2) the mean over all tokens of all responses
    rho_t   = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)           (3) the ratio; its clip is higher above than below
    r_t     = -beta log( pi_old(o_t | ..) / pi_ref(o_t | ..) )    (4) the KL ("k1") is in the reward, off by default; at
                                                                  the last token the reward of the response is added
    mean_t 1/2 max[ (V_t - R_t)^2, (clip(V_t, V_old - eps, V_old + eps) - R_t)^2 ]    (5) what V minimises, where R_t is
                                                                  the return with lam = 1: all the rewards to come
    mean_T                                                        (6) the mean over all tokens of the right responses

What it changes in PPO (ppo.py), for long chains of thought with a reward at the end: V first learns alone
(--value-warmup), from whole returns, so that it can predict them when the policy begins to learn. Its targets have lam
= 1, while the advantage keeps a smaller lam against noise (decoupled GAE). With a fixed lam the reward at the end would
fade over a long response: .95^1000 is 5e-23. The rest is DAPO's higher clip, imitation of right responses (6), and
fewer questions with more responses each (--group-size).
The paper has alpha = .05, for thousands of tokens. At 20 tokens that gives lam = 0, so that A_t looks no further than
the next V. The default for the tiny model is therefore 1; a very large alpha gives lam = 1. mu is the paper's .1.
Kept from ppo.py: whitening, the clip of the value loss, the networks. Whether the paper has a KL, whitening or that
clip could not be checked.

    python -m family.vapo
        On a CPU, no download: within a minute a tiny model learns to think before it answers, and is right.
    python -m family.vapo --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 \
                          --steps 200 --tokens-per-microbatch 16384 --tis 2 \
                          --alpha 0.05 --value-lr 2e-6 --value-warmup 50 --group-size 16
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch explained_variance.
        In bf16 vLLM and the trainer round differently, so vLLM does not quite sample from pi_old: hence --tis.
"""

import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

from dataclasses import dataclass
from typing import Annotated

import torch

from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_logprobs, batch_values, explained_variance, make_policy, make_value
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
    group_size: Annotated[int, AtLeast(1)] = 8  # G: responses per question; one is enough, since V is the baseline
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # divides the logits, when the policy samples and when it learns
    epochs: int = 2  # passes over each rollout
    minibatches: int = 2  # updates per pass
    lr: float = 5e-5  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.0  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    clip_low: float = 0.2  # eps below: ratios under 1 - eps are clipped
    clip_high: float = 0.28  # eps above: ratios over 1 + eps are clipped
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off
    gamma: float = 1.0  # discount per token
    alpha: float = 1.0  # alpha: lam of the advantage is 1 - 1/(alpha |o|); 0.05 in the paper, for long responses
    mu: float = 0.1  # mu: weight of the log-likelihood of right responses
    clamp_kl: bool = False  # the KL of a token is clamped at 0, which biases it upwards
    value_model: str = ""  # folder or Hub name that the value network starts from; empty: that of the policy
    value_lr: float = 1e-3  # learning rate of the value network; 1e-5 for a pretrained one
    value_clip: float = 0.2  # eps of the value loss
    value_warmup: int = 10  # first steps, in which only the value network learns


# --- advantage ---


def token_rewards(rewards, kl, mask, beta) -> torch.Tensor:
    """r_t = -beta KL_t, plus the reward of the response at its last token: [B], [B, T], [B, T] -> [B, T]."""
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # [B, T] True once per row
    return last * rewards[:, None] - beta * kl * mask  # [B, T] (4)


def gae(rewards, values, mask, gamma, lam) -> torch.Tensor:
    """A_t = delta_t + gamma lam A_t+1: [B, T] rewards, values, mask -> [B, T]; after the end all is 0."""
    V = torch.nn.functional.pad(values.masked_fill(~mask, 0), (0, 1))  # [B, T + 1] 0 after the last token
    delta = (rewards + gamma * V[:, 1:] - V[:, :-1]).masked_fill(~mask, 0)  # [B, T] (1) delta
    A = torch.zeros_like(V)  # [B, T + 1]
    for t in reversed(range(delta.shape[1])):
        A[:, t] = delta[:, t] + gamma * lam * A[:, t + 1]  # [B] (1)
    return A[:, :-1]  # [B, T]


def adaptive_lam(lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """lam = 1 - 1/(alpha |o|), at least 0: [B] lengths -> [B]."""
    return (1 - 1 / (alpha * lengths)).clamp(min=0)  # [B] (1)


def whiten(x, mask, all_sum, eps=0.05, ddof=1) -> torch.Tensor:
    """(x - mean) / max(std, eps) over the tokens on the mask: [B, T] -> [B, T], 0 off the mask.

    eps: where all rewards are equal, A is the noise of V alone; a smaller std than this is not stretched to 1
    ddof: the std of n tokens is divided by n - ddof; a single token is 0
    all_sum adds up a number over the processes.
    """
    n = all_sum(mask.sum())  # tokens
    mean = all_sum((x * mask).sum()) / n
    centred = (x - mean) * mask  # [B, T] mean 0
    variance = all_sum(centred.square().sum()) / (n - ddof).clamp(min=1)
    return centred / variance.sqrt().clamp(min=eps)  # [B, T] (1) std 1


# --- kl ---


def kl_k1(logp: torch.Tensor, ref_logp: torch.Tensor, clamp: bool) -> torch.Tensor:
    """log(pi / pi_ref) per token, in nats: [B, T], [B, T] -> [B, T]. Its mean over samples of pi is KL(pi || pi_ref).

    Clamped at zero its mean is larger than that, by the mean of what is cut off.
    """
    log_ratio = logp - ref_logp  # [B, T]
    return log_ratio.clamp(min=0) if clamp else log_ratio  # [B, T] (4)


# --- loss ---


def policy_loss(
    logp, old_logp, A, mask, num_tokens, clip_low, clip_high,
    right, num_right, mu,
    weight=1.0,
):  # fmt: skip
    """-J(theta) for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, old_logp [B, T]: log pi and log pi_old of the sampled tokens
    A [B, T]: advantages; mask [B, T]: True on response tokens
    num_tokens: response tokens in the whole update, over all micro-batches and processes: the mean over tokens
    right [B]: 1 for right responses, else 0; num_right: their tokens in the whole update; mu: weight of (6)
    weight [B, T]: pi_old/pi_sampler, capped (--tis); 1 without
    """
    ratio = (logp - old_logp).exp()  # [B, T] (3) rho
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
    objective = weight * torch.minimum(ratio * A, clipped * A)  # [B, T] (3)
    is_clipped = clipped * A < ratio * A  # [B, T] where the clip binds there is no gradient
    approx_kl = ratio - 1 - (logp - old_logp)  # [B, T] of KL(pi_old || pi), as kl_k3 of grpo.py
    stats = {"clip_fraction": is_clipped.float(), "ratio_max": ratio, "approx_kl": approx_kl}  # per token
    likelihood = (logp * mask * right[:, None]).sum() / num_right  # (6) mean_T
    return -(objective * mask).sum() / num_tokens - mu * likelihood, stats  # (2) mean_t


def value_loss(values, old_values, returns, mask, num_tokens, clip):
    """The loss of V for a micro-batch -> (loss, stats): values, old_values, returns and mask are [B, T] each."""
    clipped = values.clamp(old_values - clip, old_values + clip)  # [B, T]
    squared = (values - returns).square()  # [B, T]
    clipped_squared = (clipped - returns).square()  # [B, T]
    error = 0.5 * torch.maximum(squared, clipped_squared)  # [B, T] (5) the worse one
    is_clipped = clipped_squared > squared  # [B, T] there V has no gradient
    stats = {"value_loss": error, "value_clip_fraction": is_clipped.float()}
    return (error * mask).sum() / num_tokens, stats  # mean_t


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
    value = make_value(config, policy, tokenizer)
    value_parameters = value.trained()
    optimizer.add_param_group({"params": value_parameters, "lr": config.value_lr})
    train, test = encode_task(task, config, tokenizer, policy.positions)
    stop = stop_strings(tokenizer, config.template)
    sampler = make_sampler(config, policy, tokenizer, stop, accelerator.autocast, optimizer)
    run.start(tokenizer, train, policy=policy, value=value, optimizer=optimizer)  # with --resume: as saved
    sampler.push(policy)  # its present weights
    updates = config.epochs * config.minibatches
    if run.first_step == 1:
        run.evaluate(0, sampler, test, weights, values=value)
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
            if updates > 1 or reference:  # with one update and no KL, the policy being trained is still pi_old
                batch["old_logp"] = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)
            if reference:
                batch["ref_logp"] = batch_logprobs(reference, batch, config.temperature, config.tokens_per_microbatch)
            batch["values"] = batch_values(value, batch, config.tokens_per_microbatch)  # [B, T] (5) V_old

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index.tolist()]  # the question of each of the B responses
        scores = score(batch, examples, weights)  # reward name -> B numbers
        rewards = torch.tensor(weighted_sum(scores, weights), device=accelerator.device)  # [B]
        batch["rewards"] = rewards
        mask = batch.response_mask  # [B, T]
        kl = torch.zeros_like(batch.sampler_logp)  # [B, T]
        if reference:
            kl = kl_k1(batch["old_logp"], batch["ref_logp"], config.clamp_kl)
        r = token_rewards(rewards, kl, mask, config.beta)  # [B, T]
        lam = adaptive_lam(batch.lengths, config.alpha)  # [B]
        A = gae(r, batch["values"], mask, config.gamma, lam)  # [B, T]
        batch["advantages"] = whiten(A, mask, accelerator.reduce)  # [B, T]
        reward_to_go = gae(r, torch.zeros_like(r), mask, config.gamma, lam=1.0)  # [B, T] unlike R, without any V in it
        batch["returns"] = reward_to_go  # [B, T] (5) R, what V learns
        batch["right"] = torch.tensor(scores["accuracy"], device=accelerator.device)  # [B]
        explained = explained_variance(batch["values"], reward_to_go, mask, accelerator.reduce)

        # --- update: several epochs over the rollout ---
        grad_norms = []
        value_grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
                num_tokens = accelerator.reduce(batch.lengths[rows].sum())  # of the update
                num_right = accelerator.reduce((batch.lengths * batch["right"])[rows].sum()).clamp(min=1)
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        values = value(micro)  # [b, t] V
                    loss_v, stats_v = value_loss(
                        values, micro["values"], micro["returns"], micro.response_mask, num_tokens, config.value_clip
                    )
                    accelerator.backward(loss_v)  # frees the graph of V before that of the policy is built
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature)  # [b, t] each
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()  # ratio 1, gradient not 0
                    gap = old_logp - micro.sampler_logp  # [b, t] trainer minus sampler, a matter of rounding
                    weight = gap.exp().clamp(max=config.tis) if config.tis else 1.0  # [b, t]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro.response_mask, num_tokens,
                        config.clip_low, config.clip_high,
                        micro["right"], num_right, config.mu,
                        weight,
                    )  # fmt: skip
                    stats |= stats_v
                    if reference:  # only to be logged
                        stats["kl"] = micro["old_logp"] - micro["ref_logp"]
                    if step > config.value_warmup:  # at first only V learns
                        accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                sum_gradients(accelerator, value_parameters)
                # Clipped separately: V's errors do not shorten the policy's step.
                value_grad_norms.append(clip_gradients(accelerator, value_parameters, 1.0))
                grad_norms.append(clip_gradients(accelerator, parameters, 1.0))
                run.check_update(batch, grad_norms[-1], value_grad_norms[-1])  # ends the run if these are not finite
                optimizer.step()  # does nothing where there is no gradient: to the policy, in the warm-up of V
                optimizer.zero_grad()
        run.check_weights(batch)
        sampler.push(policy)  # pi_old <- pi
        run.lap("seconds_update")  # all since the rollout

        # --- log, evaluate, save ---
        run.log(step, updates, batch, scores, grad_norm=torch.tensor(grad_norms).mean().item(), lr=config.lr)
        value_grad_norm = torch.tensor(value_grad_norms).mean().item()
        run.add_metrics(step, {"explained_variance": explained, "value_grad_norm": value_grad_norm})
        if step == 1 or run.due(config.eval_every, step):
            run.samples(step, batch, examples, scores, advantage=batch["advantages"])
        if run.due(config.eval_every, step):
            run.evaluate(step, sampler, test, weights, values=value)
        run.end_step(step)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
