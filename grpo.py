"""GRPO: Group Relative Policy Optimization, from DeepSeekMath (arXiv 2402.03300).

For each question q, sample a group of G responses o_1..o_G from the policy pi_old and maximise (eq. 3)

    J(theta) = 1/G sum_i 1/|o_i| sum_t { min[ rho_it A_it, clip(rho_it, 1-eps, 1+eps) A_it ] - beta D_it }

    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)        the ratio
    A_it   = (r_i - mean(r_1..r_G)) / std(r_1..r_G)               the advantage, the same for every token of o_i
    D_it   = pi_ref/pi - log(pi_ref/pi) - 1                       the estimator of KL(pi || pi_ref), eq. 4 ("k3")

No value network: the other responses of the group are the baseline (outcome supervision, section 4.1.2).
Kept from the paper: the 1/|o_i| mean per response, the std, the KL in the loss. Separate clip ranges below and above
are an addition (equal by default). Left out: process supervision, and the outer iterations of Algorithm 1 that
renew the reference and the reward model; the reward here is a verifier, which needs no training.

    python grpo.py                                  a tiny model learns to think before it answers: a minute on a CPU
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 --steps 200
                                                    the same on grade-school maths, with vLLM, on one CUDA GPU
"""

from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator

from data import draw, load_prompts
from rewards import parse_weights, score, total
from rollout import batch_logprobs, check_sampler, load_model, make_sampler, token_logprobs
from run import Run, parse, sum_gradients


@dataclass
class Config:
    model: str = "tiny"  # Hugging Face folder or Hub name of the policy to train
    task: str = "arithmetic"  # arithmetic, countdown, gsm8k, math, qa; levels as in arithmetic:3-6
    data: tuple[str, ...] = ()  # JSONL file or Hub set of questions and answers; a second one is held out
    template: Literal["auto", "plain", "r1", "chat"] = "auto"  # how a question becomes a prompt
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # what writes the responses
    rewards: tuple[str, ...] = ("accuracy=1", "format=0")  # r: named rewards of rewards.py with their weights
    steps: int = 60  # number of rollouts, each followed by epochs x minibatches updates
    prompts_per_step: int = 16  # questions q per rollout
    group_size: int = 8  # G: responses per question
    max_prompt_tokens: int = 512  # longer prompts are left out, tokens
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # of the policy, when it samples and when it learns
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    tokens_per_microbatch: int = 2048  # tokens in one forward and backward pass; memory only, not the result
    lr: float = 2e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.04  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    clip_low: float = 0.2  # eps below: ratios under 1 - eps are clipped
    clip_high: float = 0.2  # eps above: ratios over 1 + eps are clipped
    eval_every: int = 20  # steps between evaluations; 0: only before and after
    eval_prompts: int = 128  # held-out questions per evaluation
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    seed: int = 0  # of prompts, samples and minibatches
    out: str = ""  # folder of the run; empty: runs/<script>-<time>
    resume: str = ""  # folder of an interrupted run to continue exactly
    track: Literal["", "wandb", "tensorboard", "trackio"] = ""  # also log there


# --- advantage ---


def group_advantages(rewards: torch.Tensor, group_size: int, eps: float = 1e-4) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group: [B] -> [B], rows of a group next to each other.

    The std is the unbiased one (ddof 1, divided by G - 1). A group of equal rewards has advantage exactly 0.
    """
    r = rewards.view(-1, group_size)  # [P, G]
    r = r - r[:, :1]  # changes no advantage, and makes equal rewards exactly 0, whatever the rounding of their mean
    mean, std = r.mean(dim=1, keepdim=True), r.std(dim=1, keepdim=True, correction=1)  # [P, 1]
    return ((r - mean) / (std + eps)).flatten()  # [B]


# --- kl ---


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """D = pi_ref/pi - log(pi_ref/pi) - 1 per token, in nats: [B, T], [B, T] -> [B, T] (eq. 4).

    Never negative, and its mean over samples of pi is KL(pi || pi_ref).
    """
    log_ratio = ref_logp - logp  # [B, T]
    return log_ratio.exp() - log_ratio - 1


# --- loss ---


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, num_responses, beta, clip_low, clip_high):
    """-J(theta) of eq. 3 for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the batch.

    logp, old_logp, ref_logp [B, T]: log pi, log pi_old, log pi_ref of the sampled tokens (ref_logp None if beta is 0)
    advantages [B]; mask [B, T]: True on response tokens; num_responses: responses in the whole batch
    """
    A = advantages[:, None]  # [B, 1]
    ratio = (logp - old_logp).exp()  # [B, T] rho
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
    objective = torch.minimum(ratio * A, clipped * A)  # [B, T]
    stats = {"clip_fraction": (clipped * A < ratio * A).float(), "ratio_max": ratio}
    if beta:
        kl = kl_k3(logp, ref_logp)  # [B, T]
        objective = objective - beta * kl
        stats["kl"] = kl
    per_response = (objective * mask).sum(1) / mask.sum(1)  # [B] 1/|o_i| sum_t
    return -per_response.sum() / num_responses, stats


# --- training ---


def main(config: Config) -> None:
    cuda = torch.cuda.is_available()
    precision, tracker = "bf16" if cuda else "no", config.track or None
    accelerator = Accelerator(cpu=not cuda, mixed_precision=precision, log_with=tracker, project_dir="runs")
    run = Run(config, accelerator)
    weights, _ = parse_weights(config.rewards), check_sampler(config.sampler)  # wrong flags end here, not in an hour

    policy, tokenizer = load_model(config.model, accelerator.device)
    reference = load_model(config.model, accelerator.device)[0] if config.beta else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    train, test = load_prompts(config, tokenizer)
    sampler = make_sampler(config, policy, tokenizer, accelerator)
    run.restore(policy=policy, optimizer=optimizer)
    sampler.push(policy)
    responses_per_update = config.prompts_per_step * config.group_size // config.minibatches
    updates = config.epochs * config.minibatches
    if run.first_step == 1:
        run.evaluate(0, sampler, test)
        run.end_step(0, tokenizer, policy=policy, optimizer=optimizer)

    for step in run.steps():
        # --- rollout: G responses to each question from pi_old ---
        questions = draw(train, config.prompts_per_step, config.seed, step)
        questions = questions[accelerator.process_index :: accelerator.num_processes]  # this process's share
        seed = 10**9 * accelerator.process_index + 10**6 * config.seed + step  # every step has its own random numbers
        batch = sampler.generate([q["prompt_ids"] for q in questions], config.group_size, config.temperature, seed)
        sampler.sleep()
        run.lap("seconds_rollout")

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index]  # the question of each of the B responses
        scores = score(batch.texts, examples, weights)  # name -> B numbers
        batch["rewards"] = torch.tensor(total(scores, weights), device=accelerator.device)  # [B]
        batch["advantages"] = group_advantages(batch["rewards"], config.group_size)  # [B]
        with accelerator.autocast():
            if updates > 1:  # with one update the policy still is pi_old
                batch["old_logp"] = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)
            if reference:
                batch["ref_logp"] = batch_logprobs(reference, batch, config.temperature, config.tokens_per_microbatch)

        # --- update ---
        for epoch in range(config.epochs):
            for rows in batch.minibatches(config.minibatches, seed + epoch):
                if not reference:
                    rows = rows[batch["advantages"][rows] != 0]  # the others have no gradient
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = token_logprobs(policy, micro, config.temperature)  # [b, t]
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()
                    ref_logp = micro["ref_logp"] if reference else None
                    loss, stats = grpo_loss(
                        logp, old_logp, ref_logp, micro["advantages"], micro.response_mask,
                        responses_per_update, config.beta, config.clip_low, config.clip_high,
                    )  # fmt: skip
                    accelerator.backward(loss)
                    gap = (old_logp - micro.sampler_logp).abs()
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap, **stats)
                sum_gradients(accelerator, policy)
                grad_norm = accelerator.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()  # does nothing where no group was informative: there is no gradient at all
                optimizer.zero_grad()
        sampler.push(policy)
        run.lap("seconds_update")

        # --- log, evaluate, save ---
        run.log(step, updates, batch, scores, grad_norm=grad_norm.item(), lr=config.lr)
        if run.due(config.eval_every, step):
            run.samples(step, batch, examples, scores)
            run.evaluate(step, sampler, test)
        run.end_step(step, tokenizer, policy=policy, optimizer=optimizer)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
