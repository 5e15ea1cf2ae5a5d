r"""RFT: rejection-sampling fine-tuning (arXiv 2308.01825), as DeepSeekMath sets it beside GRPO (arXiv 2402.03300, 5.2).

For each question q, sample G responses o_1..o_G and imitate those that are right; maximise, averaged over questions,

    J(theta) = 1/G sum_i 1/|o_i| sum_t { A_i log pi(o_it | q, o_i<t) - beta D_it }                         (A.1.2)

    A_i  = 1 if the response is accepted, else 0              (1) the advantage: no baseline, nothing negative
    1/|o_i| sum_t                                             (2) the mean over the tokens of a response
    D_it = pi_ref/pi - log(pi_ref/pi) - 1                     (4) the estimate of KL(pi || pi_ref), off by default

Online RFT samples from the present policy. With rewards of 0 and 1 it is the policy gradient without a baseline
(reinforce.py), but for 1/|o_i|: imitating one's own right answers is reinforcement learning. A wrong answer teaches
nothing. --offline samples from the first policy throughout. That is the RFT of the first paper: supervised learning
from a fixed distribution. DeepSeekMath finds the two alike at first, and online RFT better later. A response is
accepted if its reward is at least --accept.
There is no ratio (3), no clip and no importance weight: it is a supervised loss, whoever wrote the response.
Kept from grpo.py: sampling, rewards, the loop and, with --beta, the KL. Left out: the first paper keeps, of all right
responses to a question, those with distinct equations, and trains a fresh model on them in one go.

    python -m family.rft
        On a CPU, no download: within a minute a tiny model learns to think before it answers, and is right.
    python -m family.rft --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 \
                         --steps 200 --tokens-per-microbatch 16384
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch reward and eval_pass@1.
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
    group_size: Annotated[int, AtLeast(1)] = 8  # G: responses per question
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # divides the logits, when the policy samples and when it learns
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.0  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    accept: float = 1.0  # responses with at least this reward are imitated
    offline: bool = False  # sample from the policy before training, instead of the present one


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
    logp, advantages, mask, num_responses,
    ref_logp, beta,
):  # fmt: skip
    """-J(theta) for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, ref_logp [B, T]: log pi, log pi_ref of the sampled tokens (ref_logp None if beta is 0)
    advantages [B]; mask [B, T]: True on response tokens
    num_responses: of the whole update, over all micro-batches and processes; gives 1/G and the mean over questions
    """
    A = advantages[:, None]  # [B, 1]
    objective = A * logp  # [B, T]
    stats = {}
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

    policy, tokenizer = make_policy(config, accelerator.device)
    reference = policy.reference() if config.beta else None
    first = (reference or policy.reference()) if config.offline else policy  # what is sampled from
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
        # --- rollout: G responses to each question ---
        if config.offline:  # since the last update the sampler has the present policy, for the evaluation
            sampler.push(first)
        questions = run.share(draw(train, config.prompts_per_step, config.seed, step))  # this process's share
        seed = run.seed(step)  # every step has its own random numbers
        prompts = [question["prompt_ids"] for question in questions]
        batch = sampler.generate(prompts, config.group_size, config.temperature, seed)
        sampler.sleep()  # vLLM leaves the GPU's memory to the update
        run.lap("seconds_rollout")

        # --- log-probs of the reference ---
        with accelerator.autocast():
            if reference:
                batch["ref_logp"] = batch_logprobs(reference, batch, config.temperature, config.tokens_per_microbatch)

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index.tolist()]  # the question of each of the B responses
        scores = score(batch, examples, weights)  # reward name -> B numbers
        rewards = torch.tensor(weighted_sum(scores, weights), device=accelerator.device)  # [B]
        batch["rewards"] = rewards
        batch["advantages"] = (rewards >= config.accept).float()  # [B] (1) 1 if accepted

        # --- update: mu epochs over the rollout ---
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
                if not reference and not config.shard:  # without KL, a response without advantage has no gradient
                    rows = rows[batch["advantages"][rows] != 0]
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature)  # [b, t] each
                    gap = logp.detach() - micro.sampler_logp  # [b, t] the policy minus what wrote the response
                    loss, stats = policy_loss(
                        logp, micro["advantages"], micro.response_mask, responses_per_update,
                        micro["ref_logp"] if reference else None, config.beta,
                    )  # fmt: skip
                    accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                grad_norms.append(clip_gradients(accelerator, parameters, 1.0))
                run.check_update(batch, grad_norms[-1])  # ends the run if these are not finite
                optimizer.step()  # does nothing where there is no gradient: no response was accepted
                optimizer.zero_grad()
        run.check_weights(batch)
        sampler.push(policy)  # to be evaluated, and sampled from
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
