r"""REINFORCE: the policy gradient (Williams 1992, doi 10.1007/BF00992696), here without a baseline.

The whole response is one action. For each question x, sample G responses y_1..y_G, and step along

    1/G sum_i A_i grad log pi(y_i | x)

    A_i = R_i                                                     (1) the advantage: no baseline, the reward itself
    log pi(y | x) = sum_t log pi(y_t | x, y_<t)                   (2) the response is one action: no 1/|o_i|
    rho_i = pi(y_i | x) / pi_old(y_i | x)                         (3) the ratio, 1 with one update per rollout
    R_i = r_i - beta log( pi(y_i | x) / pi_ref(y_i | x) )         (4) the KL ("k1") of the response is in the reward

In expectation that step is the gradient of E[R], as it is for RLOO (rloo.py). RLOO subtracts the mean reward of the
other responses, which leaves the expectation alone and takes out noise. Here a response with R_i = 0 teaches nothing,
whatever the others got; and adding a constant to all rewards changes every step, though not its expectation.
No group is needed: --group-size 1 --prompts-per-step 128 samples one response to each of 128 questions.
Kept from rloo.py: everything but the baseline. The KL in the reward and the clipped ratio are RLOO's, not Williams'.

    python -m family.reinforce
        On a CPU, no download: within a minute a tiny model learns to think before it answers, and is right.
    python -m family.reinforce --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 \
                               --steps 200 --tokens-per-microbatch 16384 --tis 2
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch reward and eval_pass@1.
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
    group_size: Annotated[int, AtLeast(1)] = 8  # G: responses per question; one is enough
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # divides the logits, when the policy samples and when it learns
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.04  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    clip_low: float = 0.2  # eps below: ratios under 1 - eps are clipped
    clip_high: float = 0.2  # eps above: ratios over 1 + eps are clipped
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off


# --- loss ---


def policy_loss(
    logp, old_logp, advantages, mask, num_responses, clip_low, clip_high,
    weight=1.0,
):  # fmt: skip
    """A loss whose gradient is minus that step -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, old_logp [B, T]: log pi and log pi_old of the sampled tokens
    advantages [B]; mask [B, T]: True on response tokens
    num_responses: of the whole update, over all micro-batches and processes; gives 1/G and the mean over questions
    weight: of the importance sampling, [B, 1] per response; 1 if the sampler's distribution is pi_old
    """
    A = advantages[:, None]  # [B, 1]
    ratio = ((logp - old_logp) * mask).sum(dim=1, keepdim=True).exp()  # [B, 1] (3) of the whole response
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, 1]
    objective = weight * torch.minimum(ratio * A, clipped * A)  # [B, 1] (3)
    is_clipped = clipped * A < ratio * A  # [B, 1] where the clip binds there is no gradient
    stats = {"clip_fraction": is_clipped.float(), "ratio_max": ratio}  # per response; logged as mean and maximum
    per_response = objective.squeeze(1)  # [B] (2) one action
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
        batch["advantages"] = rewards  # [B] (1) no baseline

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
                    weight = gap.sum(1, keepdim=True).exp().clamp(max=config.tis) if config.tis else 1.0  # [b, 1]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro.response_mask, responses_per_update,
                        config.clip_low, config.clip_high,
                        weight,
                    )  # fmt: skip
                    stats |= {"kl": micro["old_logp"] - micro["ref_logp"]} if reference else {}  # only to be logged
                    accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                grad_norms.append(clip_gradients(accelerator, parameters, 1.0))
                run.check_update(batch, grad_norms[-1])  # ends the run if these are not finite
                optimizer.step()  # does nothing where there is no gradient: no KL, and all rewards are 0
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
