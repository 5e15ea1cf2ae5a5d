r"""On-policy distillation: a teacher judges every token that the policy samples (GKD, arXiv 2306.13649).

For each question q, sample G responses o_1..o_G from the policy pi_old; maximise, averaged over questions,

    J(theta) = 1/G sum_i sum_t { min[ rho_it A_it, clip(rho_it, 1 - eps, 1 + eps) A_it ] - beta D_it }

    A_it   = sum_{s >= t} d^(s-t) log( T(o_is | ..) / pi_old(o_is | ..) )   (1) the advantage: how much likelier the
                                                                            teacher T finds this token than the policy
                                                                            does; with d > 0 also the later tokens
    sum_t                                                     (2) the sum over the tokens of a response, no 1/|o_i|
    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)    (3) the ratio
    D_it   = pi_ref/pi - log(pi_ref/pi) - 1                   (4) of the KL to the starting model, off by default

It is GRPO (grpo.py) with another advantage: no reward, no group, a number for each token. With one update per rollout

    --discount 0    the expected step is minus the gradient of sum_t E KL( pi(. | s_t) || T(. | s_t) ), where the
                    distribution of the states s_t = (q, o_<t) is held fixed: T judges each token by itself
    --discount 1    it is minus the gradient of KL( pi(o | q) || T(o | q) ) of whole responses: a token is also
                    judged by where it leads, which is much noisier

Either KL takes the policy's own samples, so the policy learns to leave out what the teacher would not say
(mode-seeking). Fine-tuning on the teacher's samples (sft.py) learns to cover all that the teacher says. A mean over
tokens (1/|o_i|) would break both identities, hence the sum (2). No baseline is subtracted. Teacher and policy must have
the same tokens. With --shard the teacher is not sharded: each process holds it whole.
Kept from grpo.py: ratio, clip and, with --beta, the KL to the starting model. Left out: the other divergences of GKD
and its mixture with given answers; rewards beside the teacher; a KL over the whole vocabulary or its top k. (That one
is differentiated directly. It does not depend on the sampled token, so as an advantage its expected gradient would be
0.) accuracy and reward are only logged.

    python grpo.py --out runs/teacher && python -m family.opd
        On a CPU, no download: grpo.py trains a tiny model, and a fresh one learns from it within a minute.
    python sft.py --hidden-size 256 --layers 4 --out runs/large && python grpo.py --model runs/large/model \
                  --out runs/large_teacher && python -m family.opd --teacher runs/large_teacher/model
        The same from a larger teacher, of 2.7 M parameters.
    python -m family.opd --model Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct --task gsm8k \
                         --max-new-tokens 512 --lr 1e-6 --steps 200 --tokens-per-microbatch 16384 --tis 2
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch teacher_kl and eval_pass@1.
        In bf16 vLLM and the trainer round differently, so vLLM does not quite sample from pi_old: hence --tis.
"""

import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

from dataclasses import dataclass
from typing import Annotated

import torch

from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_logprobs, load_teacher, make_policy
from plumbing.flags import AtLeast, RunConfig, parse
from plumbing.processes import clip_gradients, sum_gradients
from plumbing.run import Run
from rewards import parse_weights, score, weighted_sum
from rollout import check_sampler, make_sampler


@dataclass
class Config(RunConfig):  # model, data, sampler, evaluation and the like: plumbing/flags.py
    rewards: tuple[str, ...] = ("accuracy=1", "format=0")  # named rewards with weights, all of them only logged
    steps: int = 80  # number of rollouts, each followed by epochs x minibatches updates
    prompts_per_step: int = 16  # questions q per rollout
    group_size: Annotated[int, AtLeast(1)] = 8  # G: responses per question
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # divides the logits, when the policy samples and when it learns
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.0  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    teacher: str = "runs/teacher/model"  # T: folder or Hub name of a model with the policy's tokens
    discount: float = 0.0  # d: 0 judges each token by itself, 1 by all that follows
    clip_low: float = 0.2  # eps below: ratios under 1 - eps are clipped
    clip_high: float = 0.2  # eps above: ratios over 1 + eps are clipped
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off


# --- advantage ---


def discounted_sum(x: torch.Tensor, discount: float) -> torch.Tensor:
    """A_t = x_t + discount A_t+1: [B, T] -> [B, T]; x is 0 after the end of a response."""
    A = x.clone()  # [B, T]
    for t in reversed(range(A.shape[1] - 1)):
        A[:, t] += discount * A[:, t + 1]  # [B] (1)
    return A


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
    """-J(theta) for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

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
    per_response = (objective * mask).sum(1)  # [B] (2) sum_t
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
    teacher = load_teacher(config.teacher, accelerator.device, tokenizer)
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

        # --- log-probs of pi_old and of the teacher, by the trainer: the sampler's own differ by rounding ---
        with accelerator.autocast():
            batch["old_logp"] = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)
            teacher_logp = batch_logprobs(teacher, batch, config.temperature, config.tokens_per_microbatch)
            if reference:
                batch["ref_logp"] = batch_logprobs(reference, batch, config.temperature, config.tokens_per_microbatch)

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index.tolist()]  # the question of each of the B responses
        scores = score(batch, examples, weights)  # reward name -> B numbers
        rewards = torch.tensor(weighted_sum(scores, weights), device=accelerator.device)  # [B]
        batch["rewards"] = rewards
        batch["teacher_kl"] = batch["old_logp"] - teacher_logp  # [B, T] its mean: KL(pi || T) per token, to be logged
        batch["advantages"] = discounted_sum(teacher_logp - batch["old_logp"], config.discount)  # [B, T] (1)

        # --- update: mu epochs over the rollout ---
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
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
                    stats["teacher_kl"] = micro["teacher_kl"]  # [b, t]
                    accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                grad_norms.append(clip_gradients(accelerator, parameters, 1.0))
                run.check_update(batch, grad_norms[-1])  # ends the run if these are not finite
                optimizer.step()
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
