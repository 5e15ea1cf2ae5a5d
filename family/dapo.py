r"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476).

For each question q, sample a group of G responses o_1..o_G from the policy pi_old, until there are enough groups with
right and with wrong responses (5); maximise, over all tokens,

    J(theta) = mean_it { min[ rho_it A_it, clip(rho_it, 1 - eps_low, 1 + eps_high) A_it ] - beta D_it }    (eq. 8)

    A_it   = (R_i - mean(R_1..R_G)) / std(R_1..R_G)           (1) the advantage: GRPO's                    (eq. 9)
    mean_it                                                   (2) the mean over all tokens of all responses
    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)    (3) the ratio; its clip is higher above than below
    D_it   = pi_ref/pi - log(pi_ref/pi) - 1                   (4) the estimate of KL(pi || pi_ref), as in grpo.py
    0 < number of right responses in a group < G              (5) dynamic sampling                         (eq. 11)
    R_i    = r_i + w min(0, max(-1, (L_max - L_cache - |o_i|) / L_cache))   (6) soft overlong punishment    (eq. 13)

What it changes in GRPO (grpo.py), and why: eps_high above eps_low lets an unlikely token become likelier, which keeps
entropy up. A group that is all right or all wrong has no gradient, so it is replaced: every step learns from the same
number of groups. With the mean over all tokens, a token of a long response counts as much as any other. A response
within L_cache tokens of the limit L_max = --max-new-tokens loses reward, more the longer it is. There is no KL, since
the policy is meant to move far from its start.
With one update per rollout no ratio is ever clipped, so clip-higher needs several, as the paper's 16 (--minibatches
16). Every further round of sampling costs as much as the first. If --max-rounds rounds do not give enough groups, the
run ends and says so.
The paper's rewards are -1 and 1, and its w is 1. Here they are 0 and 1, and w is 1/2: the same advantages.
The paper's (2) is the mean over the tokens of one question's group, averaged over questions; here, as in TRL and verl,
it is the mean over the tokens of the update.
With --overlong-filter truncated responses are left out of the loss. In the paper this is a step on the way to (6); the
authors' own recipe has it off. Left out: warm-up of the learning rate, weight decay 0.1 and the dual clip of their
code.
Kept from grpo.py: everything else. accuracy, reward and lengths in the log are those of the groups that were kept.

    python -m family.dapo
        On a CPU, no download: within a minute a tiny model learns to think before it answers, and is right.
    python -m family.dapo --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 \
                          --steps 200 --tokens-per-microbatch 16384 --tis 2 --minibatches 16
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch rounds and eval_pass@1.
        In bf16 vLLM and the trainer round differently, so vLLM does not quite sample from pi_old: hence --tis.
"""

import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

from dataclasses import dataclass
from typing import Annotated

import torch

from batch import Rollouts, join
from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_logprobs, make_policy
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
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.0  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    clip_low: float = 0.2  # eps below: ratios under 1 - eps are clipped
    clip_high: float = 0.28  # eps above: ratios over 1 + eps are clipped
    dynamic_sampling: bool = True  # sample until a step has enough groups with right and wrong responses
    max_rounds: int = 10  # most rounds of sampling in a step; without enough such groups by then the run ends
    overlong_weight: float = 0.5  # w: weight of the soft overlong punishment; 0: none
    overlong_share: Annotated[float, AtLeast(0.01)] = 0.2  # L_cache: the punished end, as a share of --max-new-tokens
    overlong_filter: bool = False  # take truncated responses out of the loss
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off


# --- dynamic sampling ---


def mixed_groups(accuracy: torch.Tensor, group_size: int) -> torch.Tensor:
    """The rows of the groups with right and with wrong responses: [B] of 1 and 0, groups together -> row numbers."""
    right = accuracy.view(-1, group_size).sum(1)  # [P]
    mixed = (0 < right) & (right < group_size)  # [P] (5)
    return mixed.repeat_interleave(group_size).nonzero().flatten()


def sample_mixed(run: Run, sampler, train: list[dict], step: int) -> tuple[Rollouts, list[dict], int]:
    """(rollouts, the question of each of their P prompts, rounds of sampling), with mixed groups only.

    A step may draw questions up to --max-rounds times. Draws it does not need are skipped, so that a resumed run draws
    the same questions as one that was never stopped; in exchange an epoch does not show every question once.
    """
    config = run.config
    wanted = len(run.share(range(config.prompts_per_step)))  # groups of this process
    kept = []
    questions = []
    rounds = 0
    while len(questions) < wanted and rounds < config.max_rounds:
        rounds += 1
        number = config.max_rounds * (step - 1) + rounds  # every round has its own questions and random numbers
        drawn = run.share(draw(train, config.prompts_per_step, config.seed, number))
        prompts = [question["prompt_ids"] for question in drawn]
        batch = sampler.generate(prompts, config.group_size, config.temperature, run.seed(number))
        examples = [drawn[i] for i in batch.prompt_index.tolist()]
        accuracy = torch.tensor(score(batch, examples, [])["accuracy"])  # [B] of the answer alone, not the reward
        rows = mixed_groups(accuracy, config.group_size) if config.dynamic_sampling else batch["row"]
        if len(rows):
            kept.append(batch.select(rows.to(batch.input_ids.device)))
            questions += [examples[i] for i in rows.tolist()[:: config.group_size]]
    fewest = min(gather([len(questions)]))  # of all processes
    if fewest < wanted:
        found = f"{fewest} of {wanted} groups have right and wrong responses (accuracy {accuracy.mean():.2f})"
        run.give_up(step, f"in {config.max_rounds} rounds {found}. Too hard or too easy by now: give another --task")
    batch = join(kept)
    return batch.select(batch["row"][: wanted * config.group_size]), questions[:wanted], rounds


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


# --- rewards ---


def overlong_punishment(lengths: torch.Tensor, limit: int, cache: float) -> torch.Tensor:
    """0 up to limit - cache tokens, from there on falling to -1 at the limit: [B] lengths -> [B] (eq. 13)."""
    return ((limit - cache - lengths) / cache).clamp(min=-1, max=0)  # [B] (6)


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
    """-J(theta) of eq. 8 for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, old_logp, ref_logp [B, T]: log pi, log pi_old, log pi_ref of the sampled tokens (ref_logp None if beta is 0)
    advantages [B]; mask [B, T]: True on response tokens
    num_tokens: on the mask in the whole update, over all micro-batches and processes: the mean over tokens
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
        seed = run.seed(step)  # every step has its own random numbers
        batch, questions, rounds = sample_mixed(run, sampler, train, step)
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
        cache = config.overlong_share * config.max_new_tokens  # L_cache
        rewards = rewards + config.overlong_weight * overlong_punishment(batch.lengths, config.max_new_tokens, cache)
        cut = torch.tensor([reason == "length" for reason in batch.finish_reasons], device=accelerator.device)  # [B]
        batch["in_loss"] = batch.response_mask & ~(cut & config.overlong_filter)[:, None]  # [B, T]
        batch["advantages"] = group_advantages(rewards, config.group_size)  # [B]

        # --- update: mu epochs over the rollout ---
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
                num_tokens = accelerator.reduce(batch["in_loss"][rows].sum())  # of the update, all its responses
                if not reference and not config.shard:  # without KL, a response without advantage has no gradient
                    rows = rows[batch["advantages"][rows] != 0]
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature)  # [b, t] each
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()  # ratio 1, gradient not 0
                    gap = old_logp - micro.sampler_logp  # [b, t] trainer minus sampler, a matter of rounding
                    weight = gap.exp().clamp(max=config.tis) if config.tis else 1.0  # [b, t]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro["in_loss"], num_tokens.clamp(min=1),
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
        run.add_metrics(step, {"rounds": rounds})
        if step == 1 or run.due(config.eval_every, step):
            run.samples(step, batch, examples, scores, advantage=batch["advantages"])
        if run.due(config.eval_every, step):
            run.evaluate(step, sampler, test, weights)
        run.end_step(step)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
