r"""GRPO with process supervision, from DeepSeekMath (arXiv 2402.03300, section 4.1.3): every step has a reward.

For each question q, sample a group of G responses o_1..o_G from the policy pi_old; maximise, averaged over questions,

    J(theta) = 1/G sum_i 1/|o_i| sum_t { min[ rho_it A_it, clip(rho_it, 1 - eps, 1 + eps) A_it ] - beta D_it }   (eq. 3)

    A_it   = sum_{j: index(j) >= t} z_i^index(j)              (1) the advantage: the steps that end at token t or later
    z      = (r - mean(R)) / std(R)                               where R has the rewards r of all steps of the group
    1/|o_i| sum_t                                             (2) the mean over the tokens of a response
    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)    (3) the ratio
    D_it   = pi_ref/pi - log(pi_ref/pi) - 1                   (4) the estimate of KL(pi || pi_ref), eq. 4 ("k3")

index(j) is the last token of step j. A token is judged by its own step and by those after it, not by those before:
right steps after a wrong one are still rewarded. In grpo.py, outcome supervision, all tokens of a response share one
advantage.
The last step is the answer, which ends at the last token. If it is the only step, this is outcome supervision of the
accuracy, exactly. The advantage is a sum over the steps to come, so it is not neutral to length.
In the paper a reward model judges the steps: --judge, a model that family/prm.py has trained, whose probability that a
step is right is its reward. Without it the verifier of the arithmetic task judges: a step "5+8=13" is right, 1, if it
adds the next number of the question to the result before, else 0. --rewards is only logged.
Kept from grpo.py: everything but the advantage.

    python -m family.process_grpo
        On a CPU, no download: within a minute a tiny model learns to think before it answers, and is right.
    python -m family.prm --out runs/judge && python -m family.process_grpo --judge runs/judge/model
        The same with a learned judge. Watch step_reward, what the judge gives, beside eval_pass@1.
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
from rewards import StepRewardModel, check_steps, parse_weights, score, score_steps, weighted_sum
from rollout import check_sampler, make_sampler


@dataclass
class Config(RunConfig):  # model, data, sampler, evaluation and the like: plumbing/flags.py
    rewards: tuple[str, ...] = ("accuracy=1", "format=0")  # named rewards with weights, all of them only logged
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
    judge: str = ""  # folder of a judge of steps, by family/prm.py; empty: the verifier of the arithmetic task
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off


# --- advantage ---


def group_advantages(rewards, ends, group_size: int, eps: float = 1e-4, ddof: int = 1) -> torch.Tensor:
    """A_t = the sum of (r - mean(R)) / (std(R) + eps) of the steps that end at t or later: [B, T] -> [B, T].

    rewards [B, T]: of the steps, at their last tokens; ends [B, T]: True there; rows of a group next to each other
    R: the rewards of all n steps of a group. The std is divided by n - ddof. Equal rewards have advantage exactly 0.
    """
    shape = rewards.shape
    ends = ends.view(-1, group_size * shape[1])  # [P, G T]
    r = rewards.view_as(ends)  # [P, G T]
    highest = r.masked_fill(~ends, -torch.inf).amax(dim=1, keepdim=True)  # [P, 1]
    r = (r - highest) * ends  # changes no advantage; equal rewards become exactly 0, however their mean is rounded
    n = ends.sum(dim=1, keepdim=True)  # [P, 1] steps
    mean = r.sum(dim=1, keepdim=True) / n  # [P, 1]
    centred = (r - mean) * ends  # [P, G T]
    std = (centred.square().sum(dim=1, keepdim=True) / (n - ddof)).sqrt()  # [P, 1]
    z = (centred / (std + eps)).view(shape)  # [B, T] (1) z
    return z.flip(1).cumsum(1).flip(1)  # [B, T] (1) the sum from t on


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
    logp, old_logp, A, mask, num_responses, clip_low, clip_high,
    ref_logp, beta,
    weight=1.0,
):  # fmt: skip
    """-J(theta) of eq. 3 for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, old_logp, ref_logp [B, T]: log pi, log pi_old, log pi_ref of the sampled tokens (ref_logp None if beta is 0)
    A [B, T]: advantages; mask [B, T]: True on response tokens
    num_responses: of the whole update, over all micro-batches and processes; gives 1/G and the mean over questions
    weight [B, T]: pi_old/pi_sampler, capped (--tis); 1 without
    """
    ratio = (logp - old_logp).exp()  # [B, T] (3) rho
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
    objective = weight * torch.minimum(ratio * A, clipped * A)  # [B, T] (3)
    is_clipped = clipped * A < ratio * A  # [B, T] where the clip binds there is no gradient
    stats = {"clip_fraction": is_clipped.float(), "ratio_max": ratio}  # [B, T] each; logged: mean, maximum
    if beta:
        stats["kl"] = kl_k3(logp, ref_logp)  # [B, T] D
        objective = objective - beta * stats["kl"]  # [B, T] (4)
    per_response = (objective * mask).sum(1) / mask.sum(1)  # [B] (2) 1/|o_i| sum_t
    return -per_response.sum() / num_responses, stats  # 1/G sum_i


# --- training ---


def main(config: Config) -> None:
    run = Run(config)  # the folder, the log, and the processes, if there are several
    accelerator = run.accelerator
    weights = parse_weights(config.rewards)
    check_sampler(config.sampler)
    task = read_task(config)  # wrong data ends the run here, before the weights are loaded
    if not config.judge:
        check_steps(task.train)
    judge = StepRewardModel(config.judge) if config.judge else None

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
        step_rewards, ends = score_steps(batch, examples, tokenizer, judge)  # [B, T] each
        batch["step_reward"] = step_rewards.sum(1) / ends.sum(1)  # [B] the share of right steps, only to be logged
        batch["advantages"] = group_advantages(step_rewards, ends, config.group_size)  # [B, T]

        # --- update: mu epochs over the rollout ---
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
                if not reference and not config.shard:  # without KL, a response without advantage has no gradient
                    rows = rows[(batch["advantages"][rows] != 0).any(1)]
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
                    stats["step_reward"] = micro["step_reward"]  # [b]
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
