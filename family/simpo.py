r"""SimPO: Simple Preference Optimization (arXiv 2405.14734): dpo.py without the reference, with a margin to win by.

For a question x, y_w is the chosen response and y_l the rejected one. Maximise, averaged over pairs,

    J(theta) = log sigma( R(x, y_w) - R(x, y_l) - gamma )             (2) eq. 6

    R(x, y) = beta/|y| log pi(y | x)                                  (1) eq. 4

The reward is what the model itself ranks responses by when it writes them, its mean log-prob, so no second model is in
memory. Nothing holds pi near the model it began as, but the learning rate and few steps. gamma is the target reward
margin. The paper's runs have beta 2 to 10, gamma/beta 0.1 to 0.8, and learning rates of 3e-7 to 1e-6.
Everything else is kept from dpo.py, cDPO's --label-smoothing too: either order has to win by gamma, while in TRL
the reversed one may lose by gamma.

    python -m family.simpo
        On a CPU, no download: of a tiny model's responses a verifier makes pairs, and the model learns to think.
    python -m family.simpo --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --lr 1e-6 \
                           --max-new-tokens 512
        Your own pairs, one {"prompt": ..., "chosen": ..., "rejected": ...} per line, or a set on the Hub.
"""

import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch.nn.functional import logsigmoid

from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_logprobs, make_policy
from pairs import encode_pairs, pair_batch, read_pairs, sample_pairs
from plumbing.fail import fail
from plumbing.flags import AtLeast, RunConfig, parse, refuse_changed
from plumbing.processes import clip_gradients, gather, sum_gradients
from plumbing.run import Run
from rollout import check_sampler, make_sampler


@dataclass
class Config(RunConfig):  # model, data, sampler, evaluation and the like: plumbing/flags.py
    task: str = "arithmetic"  # without --data: pairs and evaluation are of the model's responses to its questions
    data: tuple[str, ...] = ()  # JSONL file or Hub set of pairs; a second one is held out; empty: the model's own
    eval_prompts: int = 128  # held-out questions or pairs per evaluation
    seed: int = 0  # of the model's own responses, and of the order of the pairs
    pairs: Literal["verified", "long2short"] = "verified"  # how the model's own responses make pairs
    pair_prompts: int = 1024  # questions to sample responses to, which make the pairs
    group_size: Annotated[int, AtLeast(2)] = 8  # G: responses to each of them
    steps: int = 80  # updates
    pairs_per_step: int = 64  # pairs in each update
    max_new_tokens: int = 64  # longest response |y|, tokens; longer ones of --data are cut
    temperature: float = 1.0  # divides the logits, when the policy samples and when it learns
    lr: float = 5e-5  # learning rate of AdamW; 5e-7 to 5e-6 for a pretrained model
    beta: Annotated[float, AtLeast(1e-3)] = 2.0  # beta: reward per nat and token
    gamma: float = 1.0  # gamma: the reward margin by which the chosen response is to win
    label_smoothing: float = 0.0  # share of pairs that may be labelled the wrong way round


# --- pairs ---


def verified_pairs(right: list[bool], lengths: list[int]) -> list[tuple[int, int]]:
    """(chosen, rejected) of G responses to a question: the first right one and the first wrong one, if there are both.

    right: whether each of the G responses is; lengths: in tokens, not used here.
    """
    if all(right) or not any(right):
        return []
    return [(right.index(True), right.index(False))]


def long2short_pairs(right: list[bool], lengths: list[int]) -> list[tuple[int, int]]:
    """(chosen, rejected) of G responses to a question: the shortest right one, and each wrong one that is longer or
    right one that is at least 1.5 times as long. Arguments as in verified_pairs.
    """
    right_ones = [g for g in range(len(right)) if right[g]]
    if not right_ones:
        return []
    chosen = min(right_ones, key=lambda g: lengths[g])
    pairs = []
    for g in range(len(right)):
        if right[g]:
            shortest_rejected = 1.5 * lengths[chosen]
        else:
            shortest_rejected = lengths[chosen] + 1
        if lengths[g] >= shortest_rejected:
            pairs.append((chosen, g))
    return pairs


# --- loss ---


def pair_loss(logp, mask, num_pairs, beta, gamma, label_smoothing=0.0):
    """-J(theta) for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    logp [2N, T]: log pi of the tokens of N pairs, rows chosen, rejected, chosen, rejected, ...
    mask [2N, T]: True on response tokens; num_pairs: those of the whole update, in all its micro-batches and processes
    beta: reward per nat of the mean token; gamma: the margin to win by, in units of the reward
    label_smoothing: the probability that chosen and rejected are exchanged, below 0.5
    """
    R = beta * (logp * mask).sum(1) / mask.sum(1)  # [2N] (1) reward
    margin = R[0::2] - R[1::2]  # [N] chosen - rejected
    right = logsigmoid(margin - gamma)  # [N]
    wrong = logsigmoid(-margin - gamma)  # [N] if the label is the wrong way round
    objective = (1 - label_smoothing) * right + label_smoothing * wrong  # [N] (2)
    return -objective.sum() / num_pairs, pair_stats(R, logp, mask)


def pair_stats(R, logp, mask) -> dict[str, torch.Tensor]:
    """What to log of N pairs, [N, 1] each, from the rewards [2N], log pi [2N, T] and mask [2N, T]."""
    logp = (logp * mask).sum(1)  # [2N] of the whole response
    length = mask.sum(1).float()  # [2N]
    stats = {
        "margin": R[0::2] - R[1::2],
        "pair_accuracy": (R[0::2] > R[1::2]).float(),
        "reward_chosen": R[0::2],
        "reward_rejected": R[1::2],
        "logp_chosen": logp[0::2],
        "logp_rejected": logp[1::2],
        "length_chosen": length[0::2],
        "length_rejected": length[1::2],
    }
    return {name: x.detach()[:, None] for name, x in stats.items()}


# --- training ---


def main(config: Config) -> None:
    check_flags(config)
    run = Run(config)  # the folder, the log, and the processes, if there are several
    accelerator = run.accelerator
    check_sampler(config.sampler)
    if config.data:  # wrong data ends the run here, before the weights are loaded
        train, held_out = read_pairs(config.data)
    else:
        task = read_task(config)

    policy, tokenizer = make_policy(config, accelerator.device)
    parameters = policy.trained()  # all, or the adapter of --lora-rank
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    test = []
    sampler = None
    if config.data:
        train, held_out = encode_pairs(train, held_out, config, tokenizer, policy.positions)
    else:
        questions, test = encode_task(task, config, tokenizer, policy.positions)
        stop = stop_strings(tokenizer, config.template)
        sampler = make_sampler(config, policy, tokenizer, stop, accelerator.autocast, optimizer)
        if config.resume:  # sampled again, they might differ
            train, held_out = json.loads((run.folder / "pairs.json").read_text())
        else:
            sampler.push(policy)
            questions = draw(questions, min(config.pair_prompts, len(questions)), config.seed, step=1)
            make_pairs = {"verified": verified_pairs, "long2short": long2short_pairs}[config.pairs]
            train = gather(sample_pairs(config, sampler, run.share(questions), make_pairs, run.seed(0)))
            held_out = gather(sample_pairs(config, sampler, run.share(test), make_pairs, run.seed(0)))
        sampler.sleep()
    check_pairs(train, held_out, config)
    if accelerator.is_main_process:
        show_pairs(train, held_out, config, tokenizer)
        if not config.resume:
            (run.folder / "pairs.json").write_text(json.dumps([train, held_out]))
    run.start(tokenizer, train, policy=policy, optimizer=optimizer)  # with --resume: as saved
    held_out_batch = pair_batch(held_out, tokenizer, accelerator.device)

    def evaluate(step: int) -> None:
        """Log held-out pairs and, where the pairs are the model's own, held-out questions."""
        with accelerator.autocast():
            logp = batch_logprobs(policy, held_out_batch, config.temperature, config.tokens_per_microbatch)
        mask = held_out_batch.response_mask
        loss, stats = pair_loss(logp, mask, len(held_out), config.beta, config.gamma, config.label_smoothing)
        run.add_metrics(step, {"eval_loss": loss.item()})
        run.add_metrics(step, {f"eval_{name}": x.mean().item() for name, x in stats.items()})
        if sampler:
            sampler.push(policy)
            run.evaluate(step, sampler, test)
            sampler.sleep()

    if run.first_step == 1:
        evaluate(0)
        run.end_step(0)

    for step in run.steps():
        # --- pairs, in place of a rollout ---
        pairs = run.share(draw(train, config.pairs_per_step, config.seed, step))  # this process's share
        batch = pair_batch(pairs, tokenizer, accelerator.device)

        # --- update ---
        for micro in batch.microbatches(batch["row"], config.tokens_per_microbatch, together=2):
            with accelerator.autocast():
                logp, _ = policy(micro, config.temperature)  # [2n, t]
            loss, stats = pair_loss(
                logp, micro.response_mask, config.pairs_per_step, config.beta, config.gamma, config.label_smoothing
            )
            accelerator.backward(loss)
            run.collect(micro.response_mask, loss, **stats)
        sum_gradients(accelerator, parameters)
        grad_norm = clip_gradients(accelerator, parameters, 1.0)
        run.check_update(batch, grad_norm)  # ends the run if these are not finite
        optimizer.step()
        optimizer.zero_grad()
        run.check_weights(batch)
        run.lap("seconds_update")  # all since the step began

        # --- log, evaluate, save ---
        run.log(step, 1, grad_norm=grad_norm, lr=config.lr)
        if run.due(config.eval_every, step):
            evaluate(step)
        run.end_step(step)
    run.finish()


def check_flags(config: Config) -> None:
    """End the run at flags that would be ignored."""
    if config.data:
        names = ("task", "sampler", "pairs", "pair_prompts", "group_size")
        refuse_changed(config, names, "is for pairs of the model's own responses; drop it, or drop --data")
    if not config.label_smoothing < 0.5:
        fail(f"--label-smoothing {config.label_smoothing}: below 0.5, or the labels mean their opposite")


def check_pairs(train: list[dict], held_out: list[dict], config: Config) -> None:
    """End the run if there is nothing to learn from, or nothing to evaluate on."""
    if train and held_out:
        return
    found = f"{len(train)} pairs to learn from, {len(held_out)} held out"
    if config.data:
        fail(f"{found}: --data needs pairs of different responses, to two different prompts or more")
    fail(
        f"{found}: each takes a right response and a wrong (long2short: or longer) one; try another --task, or more "
        "questions"
    )


def show_pairs(train: list[dict], held_out: list[dict], config: Config, tokenizer) -> None:
    """Print what a run is about to learn from."""
    times = config.steps * config.pairs_per_step / len(train)
    print(f"{len(train)} pairs to learn from, {times:.1f} times each; {len(held_out)} held out; the first one:")
    print(tokenizer.decode(train[0]["prompt_ids"]))
    print(f"  chosen: {train[0]['chosen']}")
    print(f"  rejected: {train[0]['rejected']}")


if __name__ == "__main__":
    main(parse(Config))
