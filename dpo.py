r"""DPO: Direct Preference Optimization (arXiv 2305.18290), and two objectives that change its reward.

For a question x, y_w is the chosen response and y_l the rejected one; nothing is sampled while the policy learns.
pi_ref is the model before training, sigma(z) = 1/(1 + exp(-z)). Maximise, averaged over pairs,

    J(theta) = log sigma( R(x, y_w) - R(x, y_l) )                                                       (eq. 7)

    R(x, y) = beta log( pi(y | x) / pi_ref(y | x) )                       the implicit reward: eq. 5 without log Z(x)

If y_w is preferred with probability sigma(r(x, y_w) - r(x, y_l)) (Bradley-Terry, eq. 1), J with r for R trains a reward
model. The policy best for r - beta KL(pi || pi_ref) is pi_ref exp(r/beta) / Z(x) (eq. 4); solved for r, that is
R + beta log Z(x) (eq. 5), and Z(x), the same for both responses, cancels. So the pairs train the policy itself, as its
own reward model, and it may go the further from pi_ref the smaller beta is:

    grad J = beta sigma( R(x, y_l) - R(x, y_w) ) { grad log pi(y_w | x) - grad log pi(y_l | x) }

which weighs a pair by how wrong its rewards are. Only the difference counts: log pi(y_w | x) may fall, and often does,
as long as log pi(y_l | x) falls more. log pi(y | x) is a sum over tokens, so long responses count more; hence

    dpo_norm  R(x, y) = beta/|y| log( pi(y | x) / pi_ref(y | x) )     length-normalised DPO, Tulu 3 (arXiv 2411.15124)
    simpo     R(x, y) = beta/|y| log pi(y | x)                        SimPO (arXiv 2405.14734, eq. 4), no reference;
              J(theta) = log sigma( R(x, y_w) - R(x, y_l) - gamma )   gamma: the target reward margin (eq. 6)

Kept from grpo.py: token log-probs, the reference, gradients clipped to norm 1. Gone: the sampler in the loop,
advantages, ratio, clip. Without --data the pairs are the model's own answers: of G to a question, the first right one
against the first wrong one; or Kimi's long2short (arXiv 2501.12599, section 2.4), for a model that is right but too
long. Left out: label smoothing, warm-up and decay of the learning rate, and fine-tuning on the chosen responses first,
as the paper does where another model wrote them (sft.py).

    python dpo.py
        On a CPU, no download: a tiny model answers, a verifier makes pairs, and the model learns to think.
    python dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --lr 5e-6 --max-new-tokens 512
        Your own pairs, one {"prompt": ..., "chosen": ..., "rejected": ...} per line, or a set on the Hub.
"""

import json
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from torch.nn.functional import logsigmoid

from data import RESPONSES, collate, draw, load_pairs, load_prompts, sample_pairs
from rollout import batch_logprobs, check_sampler, load_model, make_sampler, token_logprobs
from run import Run, parse, sum_gradients


@dataclass
class Config:
    model: str = "tiny"  # Hugging Face folder or Hub name of the policy to train
    task: str = "arithmetic"  # without --data: its questions, answered by the model, make the pairs and the evaluation
    data: tuple[str, ...] = ()  # JSONL file or Hub set of pairs; a second one is held out; empty: the model's own
    template: Literal["auto", "plain", "r1", "chat"] = "auto"  # how a question becomes a prompt
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # what writes the responses
    objective: Literal["dpo", "dpo_norm", "simpo"] = "dpo"  # which R and J
    pairs: Literal["verified", "long2short"] = "verified"  # how the model's own answers make pairs
    pair_prompts: int = 1024  # questions answered to make pairs
    group_size: int = 8  # G: answers to each of them
    steps: int = 80  # updates
    pairs_per_step: int = 64  # pairs in each update
    max_prompt_tokens: int = 512  # longer prompts are left out, tokens
    max_new_tokens: int = 64  # longest response |y|, tokens; longer ones of --data are cut
    temperature: float = 1.0  # of the policy, when it samples and when it learns
    tokens_per_microbatch: int = 2048  # tokens in one forward and backward pass; memory only, not the result
    gradient_checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    lr: float = 5e-5  # learning rate of AdamW; 5e-7 to 5e-6 for a pretrained model
    beta: float = 0.0  # beta; 0: 0.5 for dpo, 5 for dpo_norm, 2 for simpo, as it means another thing in each
    gamma: float = 1.0  # gamma of simpo, in units of its reward
    eval_every: int = 20  # steps between evaluations; 0: only before and after
    eval_prompts: int = 128  # held-out questions or pairs per evaluation
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    seed: int = 0  # of the model's own answers, and of the order of the pairs
    out: str = ""  # folder of the run; empty: runs/<script>-<time>
    resume: str = ""  # folder of an interrupted run to continue exactly
    track: Literal["", "wandb", "tensorboard", "trackio"] = ""  # also log there


# --- pairs ---


def verified_pairs(right: list[bool], lengths: list[int]) -> list[tuple[int, int]]:
    """(chosen, rejected) of G answers to one question: the first right one and the first wrong one, if there are both.

    right: whether each of the G answers is; lengths: in tokens, not used here.
    """
    return [(right.index(True), right.index(False))] if any(right) and not all(right) else []


def long2short_pairs(right: list[bool], lengths: list[int]) -> list[tuple[int, int]]:
    """(chosen, rejected) of G answers to one question: the shortest right one, and each longer wrong one or right one
    that is at least 1.5 times as long. Arguments as in verified_pairs.
    """
    chosen = min((g for g in range(len(right)) if right[g]), key=lambda g: lengths[g], default=None)
    if chosen is None:
        return []
    shortest = lengths[chosen]
    return [(chosen, g) for g in range(len(right)) if lengths[g] >= (1.5 * shortest if right[g] else shortest + 1)]


def pair_batch(pairs: list[dict], tokenizer, device):
    """Rollouts of N pairs: row 2i is the chosen response of pair i, row 2i + 1 the rejected one."""
    responses = [pair[f"{name}_ids"] for pair in pairs for name in RESPONSES]
    zeros = [[0.0] * len(response) for response in responses]  # what sampled them does not matter
    return collate([p["prompt_ids"] for p in pairs], responses, zeros, ["stop"] * len(responses), tokenizer, device)


# --- loss ---


def dpo_loss(logp, ref_logp, mask, num_pairs, beta=0.5):
    """-J(theta) of eq. 7 for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp, ref_logp [2N, T]: log pi, log pi_ref of the tokens of N pairs, rows chosen, rejected, chosen, rejected, ...
    mask [2N, T]: True on response tokens; num_pairs: those of the whole update, in all its micro-batches and processes
    beta: reward per nat; the smaller, the further pi may go from pi_ref (the paper: 0.1, for summaries 0.5)
    """
    R = beta * ((logp - ref_logp) * mask).sum(1)  # [2N] implicit reward
    margin = R[0::2] - R[1::2]  # [N] chosen - rejected
    return -logsigmoid(margin).sum() / num_pairs, pair_stats(R, logp, mask)


def dpo_norm_loss(logp, ref_logp, mask, num_pairs, beta=5.0):
    """-J(theta) with the mean, not the sum over tokens, so that long responses do not count more -> (loss, stats).

    Arguments as in dpo_loss; beta: larger, as a mean of log-ratios is smaller than their sum (Tulu 3: 5).
    """
    R = beta * ((logp - ref_logp) * mask).sum(1) / mask.sum(1)  # [2N] implicit reward, 1/|y|
    margin = R[0::2] - R[1::2]  # [N] chosen - rejected
    return -logsigmoid(margin).sum() / num_pairs, pair_stats(R, logp, mask)


def simpo_loss(logp, ref_logp, mask, num_pairs, beta=2.0, gamma=1.0):
    """-J(theta) of SimPO: the mean log-prob is the reward, and the chosen one has to win by gamma -> (loss, stats).

    Arguments as in dpo_loss, but ref_logp may be None: it is not used. The paper's runs: beta 2 to 10, and
    gamma/beta 0.1 to 0.8.
    """
    R = beta * (logp * mask).sum(1) / mask.sum(1)  # [2N] reward, 1/|y|
    margin = R[0::2] - R[1::2]  # [N] chosen - rejected
    return -logsigmoid(margin - gamma).sum() / num_pairs, pair_stats(R, logp, mask)


def pair_stats(R, logp, mask) -> dict[str, torch.Tensor]:
    """What to log of N pairs, [N, 1] each, from the rewards [2N], log pi [2N, T] and mask [2N, T]."""
    stats = {"margin": R[0::2] - R[1::2], "pair_accuracy": (R[0::2] > R[1::2]).float()}
    for name, x in (("reward", R), ("logp", (logp * mask).sum(1)), ("length", mask.sum(1).float())):
        stats |= {f"{name}_chosen": x[0::2], f"{name}_rejected": x[1::2]}
    return {name: x.detach()[:, None] for name, x in stats.items()}


# --- training ---


def main(config: Config) -> None:
    cuda = torch.cuda.is_available()  # weights are in float32, arithmetic on a GPU in bf16
    tracking = {"log_with": config.track or None, "project_dir": config.out or "runs"}
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no", **tracking)
    run = Run(config, accelerator)
    losses = {"dpo": dpo_loss, "dpo_norm": dpo_norm_loss, "simpo": partial(simpo_loss, gamma=config.gamma)}
    objective = partial(losses[config.objective], **({"beta": config.beta} if config.beta else {}))  # 0: its default
    check_sampler(config.sampler)  # wrong flags end the run here and not in an hour

    policy, tokenizer = load_model(config.model, accelerator.device, config.gradient_checkpointing)
    reference = load_model(config.model, accelerator.device)[0] if config.objective != "simpo" else None
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = {"policy": policy, "optimizer": optimizer}  # all that a run needs to go on later
    test, sampler = [], None
    if config.data:
        train, held_out = load_pairs(config, tokenizer)
    else:
        questions, test = load_prompts(config, tokenizer)
        sampler = make_sampler(config, policy, tokenizer, accelerator)
        if config.resume:  # sampled again, they might differ
            train, held_out = json.loads((run.folder / "pairs.json").read_text())
        else:
            sampler.push(policy)
            questions = draw(questions, min(config.pair_prompts, len(questions)), config.seed, step=1)
            share = slice(accelerator.process_index, None, accelerator.num_processes)  # this process's questions
            seed = 10**9 * accelerator.process_index + 10**6 * config.seed
            choose = {"verified": verified_pairs, "long2short": long2short_pairs}[config.pairs]
            train, held_out = (sample_pairs(config, sampler, part[share], choose, seed) for part in (questions, test))
            sampler.sleep()
    if not train or not held_out:
        told = f"{len(train)} pairs to learn from, {len(held_out)} held out: each takes a right answer and a wrong"
        raise SystemExit(told + " (long2short: or longer) one; try another --task, or more questions")
    if accelerator.is_main_process:
        (run.folder / "pairs.json").write_text(json.dumps([train, held_out]))
        often = config.steps * config.pairs_per_step / len(train)
        print(f"{len(train)} pairs to learn from, {often:.1f} times each; {len(held_out)} held out; the first one:")
        print(tokenizer.decode(train[0]["prompt_ids"]), *(f"  {x}: {train[0][x]}" for x in RESPONSES), sep="\n")
    held_out = pair_batch(held_out, tokenizer, accelerator.device)
    with accelerator.autocast():
        if reference:
            held_out["ref_logp"] = batch_logprobs(reference, held_out, config.temperature, config.tokens_per_microbatch)
    if config.resume:
        run.restore(**state)

    def evaluate(step: int) -> None:
        """Log held-out pairs and, where the pairs are the model's own, held-out questions."""
        with accelerator.autocast():
            logp = batch_logprobs(policy, held_out, config.temperature, config.tokens_per_microbatch)
        ref_logp, mask = held_out["ref_logp"] if reference else None, held_out.response_mask
        loss, stats = objective(logp, ref_logp, mask, len(mask) // 2)
        record = {"loss": loss} | {name: x.mean() for name, x in stats.items()}
        run.record = {"step": step} | run.record | {f"eval_{name}": x.item() for name, x in record.items()}
        if sampler:
            sampler.push(policy)
            run.evaluate(step, sampler, test)
            sampler.sleep()

    if run.first_step == 1:
        evaluate(0)
        run.end_step(0, tokenizer, **state)

    for step in run.steps():
        # --- pairs, in place of a rollout ---
        pairs = draw(train, config.pairs_per_step, config.seed, step)
        pairs = pairs[accelerator.process_index :: accelerator.num_processes]  # this process's share
        batch = pair_batch(pairs, tokenizer, accelerator.device)

        # --- log-probs of the reference ---
        with accelerator.autocast():
            if reference:
                batch["ref_logp"] = batch_logprobs(reference, batch, config.temperature, config.tokens_per_microbatch)

        # --- update ---
        for micro in batch.microbatches(batch["row"], config.tokens_per_microbatch, together=2):
            with accelerator.autocast():
                logp, _ = token_logprobs(policy, micro, config.temperature)  # [2n, t]
            loss, stats = objective(
                logp, micro["ref_logp"] if reference else None, micro.response_mask, config.pairs_per_step
            )
            accelerator.backward(loss)
            run.collect(torch.ones_like(stats["margin"], dtype=torch.bool), loss, **stats)  # means over pairs
        sum_gradients(accelerator, parameters)
        grad_norm = accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.lap("seconds_update")  # all since the step began

        # --- log, evaluate, save ---
        tokens = accelerator.reduce(batch.lengths.sum()).item()
        run.log(step, 1, tokens=tokens, grad_norm=grad_norm.item(), lr=config.lr)
        if run.due(config.eval_every, step):
            evaluate(step)
        run.end_step(step, tokenizer, **state)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
