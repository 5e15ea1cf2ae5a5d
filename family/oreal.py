r"""OREAL: Outcome REwArd-based reinforcement Learning (arXiv 2502.06781).

For each question q, sample a group of G responses o_1..o_G. Of each group with right and wrong ones take one right o+
and one wrong o-; maximise, over all tokens of these,

    J(theta) = mean_{o+} w+_t A log pi(o_t | ..) + eta mean_{o-} w-_t A log pi(o_t | ..) - beta mean D_t   (eq. 11)

    A    = r - mean of the other r of its group               (1) the advantage, above 0 for o+ and below for o-:
                                                                  clone right responses, push wrong ones away.
                                                                  r is the accuracy, 1 or 0; --rewards is only logged
    mean                                                      (2) over the tokens of all o+, of all o-, of both
    w+_t = max(2 sigma(m_t) - 1, 0)                           (3) the importance of a token, from 0 to 1     (eq. 10)
    w-_t = max(1 - 2 sigma(m_t), 0)
    m_t  = 1/t sum_{s <= t} w(q, o_<=s)
    D_t  = pi_ref/pi - log(pi_ref/pi) - 1                     (4) the estimate of KL(pi || pi_ref), as in grpo.py
    - [ r log sigma(m_|o|) + (1 - r) log(1 - sigma(m_|o|)) ]  (5) what the token reward model w minimises

w is a second network, a token-level reward model: a copy of the policy with a head that starts at zero. It reads each
token after it was written. Its mean over a response learns to predict whether the response is right (5), so w learns
which tokens make it so. sigma(m_t) is the prediction after t tokens; where it is below 1/2, a token of a right response
teaches nothing. At first it is 1/2 everywhere and all weights are 0, so in the first --reward-warmup steps w learns
alone.
Why these terms: for large n, the best of n samples is a sample of pi given that it is right, so right responses are
imitated as they are. For wrong ones the gradient of best-of-n has an extra factor of 1 - p, where p is the share of
right responses. RLOO's A puts a factor on both terms, 1 - p on right ones and -p on wrong ones (times G/(G-1)), as in
the authors' code; the paper has 1 and 1 - p. The code also has m_t, the mean so far, where eq. 10 has w_t alone. Its KL
is to the starting model, as here; the paper's is to pi_old.
Kept from grpo.py: sampling and KL. There is no ratio and no clip. Left out: a language model as a second verifier, more
questions on weak skills, repeats of questions by difficulty.

    python -m family.oreal
        On a CPU, no download: within two minutes a tiny model learns to think before it answers, and is right.
    python -m family.oreal --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 5e-7 \
                           --reward-lr 2e-6 --group-size 16 --steps 200 --tokens-per-microbatch 16384
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch reward_model_accuracy and eval_pass@1.
"""

import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

from dataclasses import dataclass
from typing import Annotated

import torch

from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_logprobs, make_policy, make_value
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
    group_size: Annotated[int, AtLeast(2)] = 8  # G: responses per question; the group is the baseline
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # divides the logits, when the policy samples and when it learns
    epochs: int = 1  # mu: passes over each rollout
    minibatches: int = 1  # updates per pass
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    beta: float = 0.01  # beta: weight of the KL to the starting model, per nat; 0 loads no reference model
    eta: float = 0.5  # eta: weight of wrong responses
    reward_lr: float = 1e-3  # learning rate of the token reward model; 2e-6 for a pretrained one
    reward_warmup: int = 10  # first steps, in which only the token reward model learns


# --- advantage ---


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """A_i = r_i - mean of the other r_j within each group: [B] -> [B], rows of a group next to each other.

    A group of equal rewards has advantage exactly 0.
    """
    r = rewards.view(-1, group_size)  # [P, G]
    r = r - r[:, :1]  # changes no advantage; equal rewards become exactly 0, however their mean is rounded
    mean = r.mean(dim=1, keepdim=True)  # [P, 1]
    others = (group_size * mean - r) / (group_size - 1)  # [P, G] the mean of the others: leave one out
    return (r - others).flatten()  # [B] (1)


def one_of_each(right: torch.Tensor, group_size: int) -> torch.Tensor:
    """The first right and the first wrong response of each group that has both: [B] of 1 and 0 -> [B] True there."""
    r = right.view(-1, group_size)  # [P, G]
    first_right = (r == 1) & (r.cumsum(1) == 1)  # [P, G]
    first_wrong = (r == 0) & ((1 - r).cumsum(1) == 1)  # [P, G]
    has_both = (0 < r.sum(1)) & (r.sum(1) < group_size)  # [P]
    return ((first_right | first_wrong) & has_both[:, None]).flatten()


def token_weights(w: torch.Tensor, mask: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The importance of each token, 0 to 1: [B, T] token rewards, [B, T] mask, [B] 1 or 0 -> [B, T] (eq. 10)."""
    m = (w * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)  # [B, T] the mean of the tokens so far
    sure = 2 * m.sigmoid() - 1  # [B, T] -1: surely wrong, 1: surely right
    return torch.where(right[:, None] == 1, sure, -sure).clamp(min=0)  # [B, T] (3)


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
    logp, advantages, mask, num_right, num_wrong, eta,
    ref_logp, beta,
    weight,
):  # fmt: skip
    """-J(theta) of eq. 11 for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, ref_logp [B, T]: log pi, log pi_ref of the sampled tokens (ref_logp None if beta is 0)
    advantages [B]: above 0 for right responses; mask [B, T]: True on the tokens of the responses that were taken
    num_right, num_wrong: such tokens of right and of wrong ones, in the whole update, over all processes
    weight [B, T]: w+ and w-
    """
    A = advantages[:, None]  # [B, 1]
    objective = weight * A * logp * mask  # [B, T] (3)
    cloned = (objective * (A > 0)).sum() / num_right  # (2)
    pushed = (objective * (A < 0)).sum() / num_wrong  # (2)
    loss = -cloned - eta * pushed
    stats = {"token_weight": weight}  # [B, T]
    if beta:
        stats["kl"] = kl_k3(logp, ref_logp)  # [B, T] D
        loss = loss + beta * (stats["kl"] * mask).sum() / (num_right + num_wrong)  # (4)
    return loss, stats


def reward_loss(w, right, mask, num_responses):
    """The loss of w for a micro-batch -> (loss, stats). w [B, T]: token rewards; right [B]: 1 or 0; mask [B, T].

    Rows with nothing on the mask do not count.
    """
    used = mask.any(1)  # [B]
    mean = (w * mask).sum(1) / mask.sum(1).clamp(min=1)  # [B] m of the whole response
    error = torch.nn.functional.binary_cross_entropy_with_logits(mean, right, reduction="none")  # [B] (5)
    told = ((mean > 0) == (right == 1))[used]  # of the responses that were taken: does w tell right from wrong?
    stats = {"reward_model_accuracy": told.float()} if len(told) else {}  # with --shard there may be none
    return (error * used).sum() / num_responses, stats


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
    judge = make_value(config, policy, tokenizer)  # w, the token reward model
    judge_parameters = judge.trained()
    optimizer.add_param_group({"params": judge_parameters, "lr": config.reward_lr})
    train, test = encode_task(task, config, tokenizer, policy.positions)
    stop = stop_strings(tokenizer, config.template)
    sampler = make_sampler(config, policy, tokenizer, stop, accelerator.autocast, optimizer)
    run.start(tokenizer, train, policy=policy, judge=judge, optimizer=optimizer)  # with --resume: as saved
    sampler.push(policy)  # its present weights
    updates = config.epochs * config.minibatches
    if run.first_step == 1:
        run.evaluate(0, sampler, test, weights)
        run.end_step(0)

    for step in run.steps():
        # --- rollout: G responses to each question ---
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
        batch["right"] = torch.tensor(scores["accuracy"], device=accelerator.device)  # [B] 1 or 0
        batch["advantages"] = group_advantages(batch["right"], config.group_size)  # [B]
        taken = one_of_each(batch["right"], config.group_size)  # [B]
        batch["in_loss"] = batch.response_mask & taken[:, None]  # [B, T]

        # --- update: mu epochs over the rollout ---
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed, epoch):
                num_taken = accelerator.reduce(taken[rows].sum()).clamp(min=1)  # responses of the update
                tokens = batch["in_loss"][rows].sum(1)  # of each response
                num_right = accelerator.reduce((tokens * batch["right"][rows]).sum()).clamp(min=1)
                num_wrong = accelerator.reduce((tokens * (1 - batch["right"][rows])).sum()).clamp(min=1)
                if not config.shard:  # the others have no gradient
                    rows = rows[taken[rows]]
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        w = judge(micro, after=True)  # [b, t]
                    loss_w, stats_w = reward_loss(w, micro["right"], micro["in_loss"], num_taken)
                    accelerator.backward(loss_w)  # frees the graph of w before that of the policy is built
                    with accelerator.autocast():
                        logp, entropy = policy(micro, config.temperature)  # [b, t] each
                    gap = logp.detach() - micro.sampler_logp  # [b, t] trainer minus sampler, a matter of rounding
                    loss, stats = policy_loss(
                        logp, micro["advantages"], micro["in_loss"], num_right, num_wrong, config.eta,
                        micro["ref_logp"] if reference else None, config.beta,
                        token_weights(w.detach(), micro.response_mask, micro["right"]),
                    )  # fmt: skip
                    stats |= stats_w
                    if step > config.reward_warmup:  # at first only the token reward model learns
                        accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                sum_gradients(accelerator, judge_parameters)
                grad_norms.append(clip_gradients(accelerator, parameters, 1.0))
                judge_norm = clip_gradients(accelerator, judge_parameters, 1.0)
                run.check_update(batch, grad_norms[-1], judge_norm)  # ends the run if these are not finite
                optimizer.step()  # does nothing where there is no gradient: to the policy, in the warm-up of w
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
