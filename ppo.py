r"""PPO: Proximal Policy Optimization (arXiv 1707.06347), with the rewards and the value network of RLHF.

A response o to a question q is an episode, and each of its tokens an action; maximise, averaged over all tokens,

    J(theta) = mean_t min[ rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ]                                      (eq. 7)

    rho_t   = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)           the ratio
    A_t     = sum_k (gamma lam)^k delta_t+k                       the advantage, GAE (arXiv 1506.02438, eq. 16), that is
            = delta_t + gamma lam A_t+1
    delta_t = r_t + gamma V_t+1 - V_t                             A and V are 0 after the last token, truncated or not
    r_t     = -beta log( pi_old(o_t | ..) / pi_ref(o_t | ..) )    the KL ("k1") is in the reward; at the last token
                                                                  the reward of the response is added

V_t = V(q, o_<t) predicts the return from token t on. It is a second network of the policy's size, with a head that
starts at zero, and minimises

    mean_t 1/2 max[ (V_t - R_t)^2, (clip(V_t, V_old - eps, V_old + eps) - R_t)^2 ],       R_t = A_t + V_old

where the old values V_old, like A and R, are those of the rollout. Then A is whitened over its tokens: mean 0, std 1.
GRPO (grpo.py) drops V, and with it gamma, lam and the value loss: the mean of the group is the baseline.
Kept from PPO: all of the above; several updates per rollout by --epochs and --minibatches, 1 as in grpo.py (the clips
act only with more). With gamma = lam = 1 (the default) A_t is the return minus V_t. Added: the gradient of each network
is clipped to norm 1. Left out: an adaptive beta, the entropy bonus, a penalty for responses without an end. PPO needs
one response per question only; --group-size stays, so that rollouts equal those of grpo.py. With a learned reward, as
in RLHF, V starts from the reward model: --rewards path/to/reward_model=1 --value-model path/to/reward_model.

    python ppo.py
        On a CPU, no download: a tiny model learns to think before it answers, and is right.
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 --value-lr 1e-5 \
                  --value-warmup 10 --steps 200 --tokens-per-microbatch 16384
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch eval_pass@1 and value_loss.
"""

from dataclasses import dataclass

import torch

from data import draw, load_prompts, stop_strings
from logprobs import batch_logprobs, batch_values, load_policy, load_value
from plumbing.flags import RunConfig, parse
from plumbing.processes import sum_gradients
from plumbing.run import Run
from rewards import parse_weights, score, total
from rollout import check_sampler, make_sampler


@dataclass
class Config(RunConfig):  # model, data, sampler, evaluation and the like: plumbing/flags.py
    rewards: tuple[str, ...] = ("accuracy=1", "format=0")  # r: named rewards of rewards.py with their weights
    steps: int = 80  # number of rollouts, each followed by epochs x minibatches updates
    prompts_per_step: int = 16  # questions q per rollout
    group_size: int = 8  # G: responses per question
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # of the policy, when it samples and when it learns
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.04  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    clip_low: float = 0.2  # eps below: ratios under 1 - eps are clipped
    clip_high: float = 0.2  # eps above: ratios over 1 + eps are clipped
    tis: float = 0.0  # truncated importance sampling: weight by pi_old/pi_sampler, capped at this (try 2); 0: off
    gamma: float = 1.0  # discount per token
    lam: float = 1.0  # lambda of GAE: 1 takes the whole return, 0 only the next reward and V
    clamp_kl: bool = False  # the KL of a token is clamped at 0, which biases it upwards
    value_model: str = ""  # folder or Hub name that the value network starts from; empty: that of the policy
    value_lr: float = 1e-3  # learning rate of the value network; 1e-5 for a pretrained one
    value_coef: float = 0.5  # weight of the value loss
    value_clip: float = 0.2  # eps of the value loss
    value_warmup: int = 0  # first steps, in which only the value network learns


# --- advantage ---


def token_rewards(rewards, kl, mask, beta) -> torch.Tensor:
    """r_t = -beta KL_t, plus the reward of the response at its last token: [B], [B, T], [B, T] -> [B, T]."""
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # [B, T] True once per row
    return last * rewards[:, None] - beta * kl * mask  # [B, T]


def gae(rewards, values, mask, gamma, lam) -> torch.Tensor:
    """A_t = delta_t + gamma lam A_t+1: [B, T] rewards, values, mask -> [B, T]; after the end all is 0."""
    V = torch.nn.functional.pad(values.masked_fill(~mask, 0), (0, 1))  # [B, T + 1] 0 after the last token
    delta = (rewards + gamma * V[:, 1:] - V[:, :-1]).masked_fill(~mask, 0)  # [B, T]
    A = torch.zeros_like(V)  # [B, T + 1]
    for t in reversed(range(delta.shape[1])):
        A[:, t] = delta[:, t] + gamma * lam * A[:, t + 1]
    return A[:, :-1]  # [B, T]


def whiten(x, mask, all_sum) -> torch.Tensor:
    """(x - mean) / (std + 1e-4) over the tokens on the mask: [B, T] -> [B, T], 0 off the mask.

    The std is the unbiased one (ddof 1). all_sum adds up a number over the processes.
    """
    n = all_sum(mask.sum())  # tokens
    mean = all_sum((x * mask).sum()) / n
    centred = (x - mean) * mask  # [B, T] mean 0
    variance = all_sum(centred.square().sum()) / (n - 1)
    return centred / (variance.sqrt() + 1e-4)  # [B, T] std 1


# --- kl ---


def kl_k1(logp: torch.Tensor, ref_logp: torch.Tensor, clamp: bool) -> torch.Tensor:
    """log(pi / pi_ref) per token, in nats: [B, T], [B, T] -> [B, T]. Its mean over samples of pi is KL(pi || pi_ref).

    Clamped at zero its mean is larger than that, by the mean of what is cut off.
    """
    log_ratio = logp - ref_logp  # [B, T]
    return log_ratio.clamp(min=0) if clamp else log_ratio


# --- loss ---


def policy_loss(
    logp, old_logp, A, mask, num_tokens, clip_low, clip_high,
    weight=1.0,
):  # fmt: skip
    """-J(theta) of eq. 7 for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, old_logp [B, T]: log pi and log pi_old of the sampled tokens
    A [B, T]: advantages; mask [B, T]: True on response tokens
    num_tokens: response tokens in the whole update, over all micro-batches and processes: the mean over tokens
    weight: of the importance sampling, [B, T]; 1 if the sampler's distribution is pi_old
    """
    ratio = (logp - old_logp).exp()  # [B, T] rho
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
    objective = weight * torch.minimum(ratio * A, clipped * A)  # [B, T]
    is_clipped = clipped * A < ratio * A  # [B, T] where the clip binds there is no gradient
    stats = {"clip_fraction": is_clipped.float(), "ratio_max": ratio}  # per token; logged as mean and maximum
    return -(objective * mask).sum() / num_tokens, stats  # mean_t


def value_loss(values, old_values, returns, mask, num_tokens, clip):
    """The loss of V for a micro-batch -> (loss, stats): values, old_values, returns and mask are [B, T] each."""
    clipped = values.clamp(old_values - clip, old_values + clip)  # [B, T]
    error = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())  # [B, T] the worse one
    return (error * mask).sum() / num_tokens, {"value_loss": error}  # mean_t


# --- training ---


def main(config: Config) -> None:
    run = Run(config)  # the folder, the log, and the processes, if there are several
    accelerator = run.accelerator
    weights = parse_weights(config.rewards)
    check_sampler(config.sampler)  # wrong flags end the run here, not in an hour

    policy, tokenizer = load_policy(config.model, accelerator.device, config.gradient_checkpointing)
    reference = policy.reference() if config.beta else None
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    value = load_value(config.value_model or config.model, accelerator.device, tokenizer)
    value_parameters = list(value.parameters())
    optimizer.add_param_group({"params": value_parameters, "lr": config.value_lr})
    train, test = load_prompts(config, tokenizer, policy.positions)
    stop = stop_strings(tokenizer, config.template)
    sampler = make_sampler(config, policy, tokenizer, stop, accelerator.autocast)
    run.start(tokenizer, train, policy=policy, value=value, optimizer=optimizer)  # with --resume: as saved
    sampler.push(policy)
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
        sampler.sleep()
        run.lap("seconds_rollout")

        # --- log-probs of pi_old and of the reference, by the trainer: the sampler's own differ by rounding ---
        with accelerator.autocast():
            if updates > 1 or reference:  # with one update and no KL, the policy being trained is still pi_old
                batch["old_logp"] = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)
            if reference:
                batch["ref_logp"] = batch_logprobs(reference, batch, config.temperature, config.tokens_per_microbatch)
            batch["values"] = batch_values(value, batch, config.tokens_per_microbatch)  # [B, T] V_old

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index.tolist()]  # the question of each of the B responses
        scores = score(batch.texts, examples, weights)  # reward name -> B numbers
        rewards = torch.tensor(total(scores, weights), device=accelerator.device)  # [B]
        batch["rewards"] = rewards
        mask = batch.response_mask  # [B, T]
        kl = torch.zeros_like(batch.sampler_logp)  # [B, T]
        if reference:
            kl = kl_k1(batch["old_logp"], batch["ref_logp"], config.clamp_kl)
        r = token_rewards(rewards, kl, mask, config.beta)  # [B, T]
        A = gae(r, batch["values"], mask, config.gamma, config.lam)  # [B, T]
        batch["returns"] = A + batch["values"]  # [B, T] R, what V learns
        batch["advantages"] = whiten(A, mask, accelerator.reduce)  # [B, T]

        # --- update: mu epochs over the rollout ---
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed + epoch):
                num_tokens = accelerator.reduce(batch.lengths[rows].sum())  # of the update
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature)  # [b, t] each
                        values = value(micro)  # [b, t] V
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()
                    gap = old_logp - micro.sampler_logp  # [b, t] trainer minus sampler, a matter of rounding
                    weight = gap.exp().clamp(max=config.tis) if config.tis else 1.0  # [b, t]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro.response_mask, num_tokens,
                        config.clip_low, config.clip_high,
                        weight,
                    )  # fmt: skip
                    loss_v, stats_v = value_loss(
                        values, micro["values"], micro["returns"], micro.response_mask, num_tokens, config.value_clip
                    )
                    loss = loss if step > config.value_warmup else 0.0  # at first only V learns
                    loss = config.value_coef * loss_v + loss
                    stats |= stats_v
                    if reference:  # only to be logged
                        stats["kl"] = micro["old_logp"] - micro["ref_logp"]
                    accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                sum_gradients(accelerator, value_parameters)
                accelerator.clip_grad_norm_(value_parameters, 1.0)  # apart: V's errors do not shorten the policy's step
                grad_norms.append(accelerator.clip_grad_norm_(parameters, 1.0).item())
                optimizer.step()  # does nothing where there is no gradient: to the policy, in the warm-up of V
                optimizer.zero_grad()
        sampler.push(policy)  # pi_old <- pi
        run.lap("seconds_update")  # all since the rollout

        # --- log, evaluate, save ---
        run.log(step, updates, batch, scores, grad_norm=torch.tensor(grad_norms).mean().item(), lr=config.lr)
        if step == 1 or run.due(config.eval_every, step):
            run.samples(step, batch, examples, scores, advantage=batch["advantages"])
        if run.due(config.eval_every, step):
            run.evaluate(step, sampler, test, weights, values=value)
        run.end_step(step)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
