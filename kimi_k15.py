r"""Kimi k1.5: policy optimisation as online mirror descent, from "Scaling RL with LLMs" (arXiv 2501.12599).

Every iteration i takes the policy at its start, pi_i, as sampler and as reference. For each question x, sample a group
of G responses y_1..y_G from pi_i (the paper's k). Maximise, averaged over questions,

    E[ r ] - tau KL(pi || pi_i)                                                                                    (2)

Its optimum is known up to a constant Z: it satisfies r - tau log Z = tau log(pi/pi_i) for every response, whoever
wrote it. Hence a squared loss, which may be taken on samples of pi_i while pi moves on:

    L(theta) = E[ (r - tau log Z - tau log( pi(y | x) / pi_i(y | x) ))^2 ],   y from pi_i

With mean(r_1..r_G) for tau log Z, minus its gradient over 2 tau is the step

    1/G sum_j { A_j grad log pi(y_j | x) - tau/2 grad ( log( pi(y_j | x) / pi_i(y_j | x) ) )^2 }                   (3)

    A_j = r_j - mean(r_1..r_G),     log pi(y | x) = sum_t log pi(y_t | x, y_<t): the response is one action

Several updates per iteration (--epochs, --minibatches); only from the second on is the penalty at work. tau is not in
the paper, and its scale depends on length: log(pi/pi_i) is a sum over tokens, larger for longer responses.
Kept from the paper: the optimiser starts anew in every iteration; the length reward; easy questions first, then those
that fail most (section 2.3.3). Gone from grpo.py: std, ratio, clip, the mean over tokens 1/|o_i|, the KL to the
starting model. Kept from it: gradients clipped to norm 1. Left out: partial rollouts, and the learned reward models.

    python kimi_k15.py
        On a CPU, no download: a tiny model learns to think before it answers, and is right.
    python kimi_k15.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-new-tokens 512 --lr 1e-6 --steps 200 \
                       --tokens-per-microbatch 16384 --tau 0.01 --length-weight 0.1 --length-from 100
        On a CUDA GPU, with vLLM if it is installed: grade-school maths. Watch eval_pass@1, kl_old and response_length.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator

from data import ChoosingDraw, load_prompts
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
    steps: int = 80  # number of rollouts, each followed by epochs x minibatches updates
    prompts_per_step: int = 16  # questions q per rollout
    group_size: int = 8  # G: responses per question
    max_prompt_tokens: int = 512  # longer prompts are left out, tokens
    max_new_tokens: int = 64  # longest response |o|, tokens
    temperature: float = 1.0  # of the policy, when it samples and when it learns
    epochs: int = 2  # passes over each rollout
    minibatches: int = 1  # updates per pass
    tokens_per_microbatch: int = 2048  # tokens in one forward and backward pass; memory only, not the result
    gradient_checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    lr: float = 1e-4  # learning rate of AdamW; 1e-6 to 1e-5 for a pretrained model
    tau: float = 0.1  # tau: weight of the squared log-ratio of a response, a sum over its tokens
    tis: float = 0.0  # weigh by pi_old/pi_sampler, at most this (2), where the two differ by rounding; 0: do not
    length_weight: float = 0.0  # of the length reward, which lies within -0.5 and 0.5
    length_from: int = 40  # step from which on it counts; the paper, too, begins without
    curriculum: int = 0  # steps until all questions are drawn, easy ones first; 0: all from the start
    prioritised: bool = False  # draw questions in proportion to 1 - their success rate so far
    eval_every: int = 20  # steps between evaluations; 0: only before and after
    eval_prompts: int = 128  # held-out questions per evaluation
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    seed: int = 0  # of prompts, samples and minibatches
    out: str = ""  # folder of the run; empty: runs/<script>-<time>
    resume: str = ""  # folder of an interrupted run to continue exactly
    track: Literal["", "wandb", "tensorboard", "trackio"] = ""  # also log there


# --- advantage ---


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """A_j = r_j - mean(r) within each group: [B] -> [B], rows of a group next to each other.

    The mean includes r_j itself. A group of equal rewards has advantage exactly 0.
    """
    r = rewards.view(-1, group_size)  # [P, G]
    r = r - r[:, :1]  # changes no advantage, and makes equal rewards exactly 0, whatever the rounding of their mean
    return (r - r.mean(dim=1, keepdim=True)).flatten()  # [B]


def length_rewards(lengths: torch.Tensor, accuracy: list[float], group_size: int) -> torch.Tensor:
    """0.5 for the shortest response of its group to -0.5 for the longest, in proportion: [B], B numbers -> [B].

    A wrong response (accuracy below 1) gets at most 0. In a group of equal lengths all get 0.
    """
    low, high = (x.repeat_interleave(group_size) for x in lengths.view(-1, group_size).aminmax(dim=1))  # [B] each
    reward = torch.where(high > low, 0.5 - (lengths - low) / (high - low), 0.0)  # [B] lambda
    return torch.where(torch.tensor(accuracy, device=lengths.device) == 1, reward, reward.clamp(max=0))  # [B]


# --- kl ---


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """pi_ref/pi - log(pi_ref/pi) - 1 per token, in nats: [B, T], [B, T] -> [B, T]; here only to be logged.

    Never negative, and its mean over samples of pi is KL(pi || pi_ref). Our samples are of pi_i: that is pi here.
    """
    log_ratio = ref_logp - logp  # [B, T]
    return log_ratio.exp() - log_ratio - 1


# --- loss ---


def policy_loss(
    logp, old_logp, advantages, mask, num_responses, tau,
    weight=1.0,
):  # fmt: skip
    """A loss whose gradient is minus (3) -> (loss, stats). Losses of micro-batches add up to that of the update.

    It is L / (2 tau) but for a term without theta: (A - tau x)^2 / (2 tau) = A^2 / (2 tau) - (A x - tau/2 x^2).

    logp, old_logp [B, T]: log pi and log pi_i of the sampled tokens
    advantages [B]; mask [B, T]: True on response tokens
    num_responses: those of the whole update, in all its micro-batches and processes: 1/G, and the mean over questions
    weight: of the importance sampling, [B, 1] per response; 1 if the sampler's distribution is pi_i
    """
    A = advantages[:, None]  # [B, 1]
    log_ratio = ((logp - old_logp) * mask).sum(dim=1, keepdim=True)  # [B, 1] x, of the whole response
    per_response = weight * (A * log_ratio - tau / 2 * log_ratio**2)  # [B, 1] grad of A x: A grad log pi
    stats = {"log_ratio_squared": log_ratio**2, "ratio_max": log_ratio.exp(), "kl_old": kl_k3(old_logp, logp)}
    return -per_response.sum() / num_responses, stats  # 1/G sum_i


# --- training ---


def main(config: Config) -> None:
    cuda = torch.cuda.is_available()  # weights are in float32, arithmetic on a GPU in bf16
    tracking = {"log_with": config.track or None, "project_dir": config.out or "runs"}
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no", **tracking)
    run = Run(config, accelerator)
    weights = parse_weights(config.rewards)
    check_sampler(config.sampler)  # wrong flags end the run here and not in an hour

    policy, tokenizer = load_model(config.model, accelerator.device, config.gradient_checkpointing)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = {"policy": policy, "optimizer": optimizer}  # all that a run needs to go on later
    state["draw"] = draw = ChoosingDraw(config.curriculum, config.prioritised)  # knows the success rates
    train, test = load_prompts(config, tokenizer)
    sampler = make_sampler(config, policy, tokenizer, accelerator)
    if config.resume:
        run.restore(**state)
    sampler.push(policy)
    responses_per_update = config.prompts_per_step * config.group_size // config.minibatches
    updates = config.epochs * config.minibatches
    if run.first_step == 1:
        run.evaluate(0, sampler, test)
        run.end_step(0, tokenizer, **state)

    for step in run.steps():
        # --- rollout: G responses to each question, from pi_i ---
        questions = draw(train, config.prompts_per_step, config.seed, step)
        questions = questions[accelerator.process_index :: accelerator.num_processes]  # this process's share
        seed = 10**9 * accelerator.process_index + 10**6 * config.seed + step  # every step has its own random numbers
        batch = sampler.generate([q["prompt_ids"] for q in questions], config.group_size, config.temperature, seed)
        sampler.sleep()
        run.lap("seconds_rollout")

        # --- log-probs of pi_i, by the trainer: the sampler's own differ by rounding ---
        with accelerator.autocast():
            if updates > 1:  # with one update, the policy that learns still is pi_i
                batch["old_logp"] = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)

        # --- rewards and advantages ---
        examples = [questions[i] for i in batch.prompt_index]  # the question of each of the B responses
        scores = score(batch.texts, examples, weights)  # reward name -> B numbers
        rewards = batch["rewards"] = torch.tensor(total(scores, weights), device=accelerator.device)  # [B]
        draw.record(examples, scores["accuracy"])
        if step >= config.length_from:  # in place: the reward that is logged
            rewards += config.length_weight * length_rewards(batch.lengths, scores["accuracy"], config.group_size)
        batch["advantages"] = group_advantages(rewards, config.group_size)  # [B]

        # --- update: some epochs over the rollout ---
        optimizer.state.clear()  # another pi_i is another problem: no momentum from the last one
        grad_norms = []
        for epoch in range(config.epochs):
            for rows in batch.minibatch_rows(config.minibatches, seed + epoch):
                for micro in batch.microbatches(rows, config.tokens_per_microbatch):
                    with accelerator.autocast():
                        logp, entropy = token_logprobs(policy, micro, config.temperature)  # [b, t]
                    old_logp = micro["old_logp"] if updates > 1 else logp.detach()
                    gap = old_logp - micro.sampler_logp  # [b, t] what rounding does
                    weight = gap.sum(1, keepdim=True).exp().clamp(max=config.tis) if config.tis else 1.0  # [b, 1]
                    loss, stats = policy_loss(
                        logp, old_logp, micro["advantages"], micro.response_mask, responses_per_update,
                        config.tau,
                        weight,
                    )  # fmt: skip
                    accelerator.backward(loss)
                    run.collect(micro.response_mask, loss, entropy=entropy, sampler_gap=gap.abs(), **stats)
                sum_gradients(accelerator, parameters)
                grad_norms.append(accelerator.clip_grad_norm_(parameters, 1.0))
                optimizer.step()  # does nothing where there is no gradient: pi is pi_i and no informative group
                optimizer.zero_grad()
        sampler.push(policy)  # pi_i <- pi
        run.lap("seconds_update")  # all since the rollout

        # --- log, evaluate, save ---
        run.log(step, updates, batch, scores, grad_norm=torch.stack(grad_norms).mean().item(), lr=config.lr)
        if step == 1 or run.due(config.eval_every, step):
            run.samples(step, batch, examples, scores)
        if run.due(config.eval_every, step):
            run.evaluate(step, sampler, test)
        run.end_step(step, tokenizer, **state)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
