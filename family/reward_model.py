r"""A reward model: the Bradley-Terry model of preferences (InstructGPT, arXiv 2203.02155).

For a question x, answers y_1..y_K stand in the order of preference, the best first; for K = 2 they are a pair, chosen
and rejected. sigma(z) = 1/(1 + exp(-z)). Maximise, averaged over questions,

    J(theta) = 1/C(K,2) sum_{i < j} { log sigma( R(x, y_i) - R(x, y_j) ) - c (R(x, y_i) + R(x, y_j))^2 }    (2) eq. 1

    R(x, y) = the scalar head on the state of the last token of y           (1) the reward

Answer i is preferred to j with probability sigma(R_i - R_j). Only differences count: R + f(x), any f, fits as well. For
group baselines that is fine, since what a group has in common falls out; PPO, without such a baseline, would see it,
and so would a fixed penalty beside it. c (--centre; arXiv 2312.09244, eq. 2) draws the rewards of a pair to a sum of 0.
All answers to a question are in one step, with 1/C(K,2): pairs of their own would let the model learn each answer K - 1
times over, by heart.
R reads the last token, found by each response's own length. eval_calibration is the expected calibration error of
sigma(|margin|), the model's confidence in its order, against how often that is right; calibration.png shows it in bins.
Kept from dpo.py: pairs, their sources, the loop. Without --data the pairs are the model's own responses, ordered by
named rewards that we know, --gold; a share of them the wrong way round, --flip, since people's labels are noisy. What
it leaves in model/ is a reward for --rewards PATH=1, and the beginning of V for ppo.py --value-model PATH.
Left out: the learning rate's decay; a second epoch overfits, so choose --steps for about one.

    python -m family.reward_model
        On a CPU, no download: a tiny model's responses in pairs, by whether they are right and have the right format.
    python -m family.reward_model --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --lr 1e-5 \
                                  --max-new-tokens 512
        Your own, one {"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., "ranked": [best, ..., worst]}
        per line, or a set on the Hub.
"""

import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

import json
from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn.functional import logsigmoid

from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_scores, load_policy, load_scorer
from pairs import encode_ranked, judge_order, ranked_batch, read_ranked, sample_ranked
from plumbing.fail import fail
from plumbing.flags import AtLeast, RunConfig, parse, refuse_changed
from plumbing.processes import clip_gradients, gather, sum_gradients
from plumbing.run import Run
from rewards import parse_weights
from rollout import check_sampler, make_sampler


@dataclass
class Config(RunConfig):  # model, data, sampler, evaluation and the like: plumbing/flags.py
    task: str = "arithmetic"  # without --data: pairs are of the model's responses to its questions
    data: tuple[str, ...] = ()  # JSONL file or Hub set of pairs; a second one is held out; empty: the model's own
    eval_prompts: int = 128  # held-out questions or pairs per evaluation
    seed: int = 0  # of the model's own responses, and of the order of the pairs
    gold: tuple[str, ...] = ("accuracy=1", "format=0.5")  # named rewards that order the model's own responses
    flip: float = 0.0  # share of the model's own pairs that are labelled the wrong way round
    centre: float = 0.01  # c: draws the rewards of a pair to a sum of 0
    pair_prompts: int = 1024  # questions to sample responses to, which make the pairs
    group_size: Annotated[int, AtLeast(2)] = 8  # G: responses to each of them
    steps: int = 80  # updates
    pairs_per_step: int = 64  # pairs in each update
    max_new_tokens: int = 64  # longest response |y|, tokens; longer ones of --data are cut
    temperature: float = 1.0  # divides the logits when the model samples
    lr: float = 3e-4  # learning rate of AdamW; 1e-5 for a pretrained model


# --- loss ---


def pair_loss(scores, num_questions, centre):
    """-J(theta) for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    scores [N, K]: of the K answers to N questions, the best one first; centre: c
    num_questions: those of the whole update, in all its micro-batches and processes
    """
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)  # [C] each: all pairs i < j
    R = torch.stack([scores[:, better], scores[:, worse]], dim=2).flatten()  # [2NC] (1) chosen, rejected, ...
    margin = R[0::2] - R[1::2]  # [NC] chosen - rejected
    objective = logsigmoid(margin) - centre * (R[0::2] + R[1::2]).square()  # [NC] (2)
    return -objective.sum() / (len(better) * num_questions), pair_stats(R)  # 1/C sum


def pair_stats(R) -> dict[str, torch.Tensor]:
    """What to log of N pairs, [N, 1] each, from the rewards [2N]."""
    stats = {
        "margin": R[0::2] - R[1::2],
        "pair_accuracy": (R[0::2] > R[1::2]).float(),
        "reward_chosen": R[0::2],
        "reward_rejected": R[1::2],
    }
    return {name: x.detach()[:, None] for name, x in stats.items()}


# --- training ---


def main(config: Config) -> None:
    check_flags(config)
    run = Run(config)  # the folder, the log, and the processes, if there are several
    accelerator = run.accelerator
    check_sampler(config.sampler)
    weights = parse_weights(config.gold)
    if config.data:  # wrong data ends the run here, before the weights are loaded
        train, held_out = read_ranked(config.data)
    else:
        task = read_task(config)

    model, tokenizer = load_scorer(config.model, accelerator.device, config.gradient_checkpointing)
    parameters = model.trained()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if not config.data:
        policy, _ = load_policy(config.model, accelerator.device)
        questions, test = encode_task(task, config, tokenizer, policy.positions)
        stop = stop_strings(tokenizer, config.template)
        sampler = make_sampler(config, policy, tokenizer, stop, accelerator.autocast, optimizer)
        if config.resume:  # sampled again, they might differ
            train, held_out = json.loads((run.folder / "pairs.json").read_text())
        else:
            sampler.push(policy)
            questions = draw(questions, min(config.pair_prompts, len(questions)), config.seed, step=1)
            train = gather(sample_ranked(config, sampler, run.share(questions), weights, run.seed(0)))
            held_out = gather(sample_ranked(config, sampler, run.share(test), weights, run.seed(0)))
        sampler.sleep()
        del policy, sampler
    train, held_out = encode_ranked(train, held_out, config, tokenizer, model.positions)
    check_pairs(train, held_out, config)
    if accelerator.is_main_process:
        show_pairs(train, held_out, config, tokenizer)
        if not config.resume:
            (run.folder / "pairs.json").write_text(json.dumps([train, held_out]))
    run.start(tokenizer, train, policy=model, optimizer=optimizer)  # with --resume: as saved
    K = len(train[0]["ranked_ids"])  # answers to a question
    held_out_batch = ranked_batch(held_out, tokenizer, accelerator.device)

    def evaluate(step: int) -> None:
        """Log held-out questions: loss, order, and calibration, which calibration.png shows."""
        with accelerator.autocast():
            scores = batch_scores(model, held_out_batch, config.tokens_per_microbatch).view(-1, K)  # [N, K]
        loss, stats = pair_loss(scores, len(held_out), config.centre)
        run.add_metrics(step, {"eval_loss": loss.item()})
        run.add_metrics(step, {f"eval_{name}": x.mean().item() for name, x in stats.items()})
        run.add_metrics(step, judge_order(scores, held_out, run.folder / "calibration.png"))

    if run.first_step == 1:
        evaluate(0)
        run.end_step(0)

    for step in run.steps():
        # --- pairs, in place of a rollout ---
        pairs = run.share(draw(train, config.pairs_per_step, config.seed, step))  # this process's share
        batch = ranked_batch(pairs, tokenizer, accelerator.device)

        # --- update ---
        for micro in batch.microbatches(batch["row"], config.tokens_per_microbatch, together=K):
            with accelerator.autocast():
                scores = model(micro).view(-1, K)  # [n, K]
            loss, stats = pair_loss(scores, config.pairs_per_step, config.centre)
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
        names = ("task", "template", "system", "sampler", "gold", "flip", "pair_prompts", "group_size")
        refuse_changed(config, names, "is for pairs of the model's own responses; drop it, or drop --data")
    if not config.flip < 0.5:
        fail(f"--flip {config.flip}: below 0.5, or the labels mean their opposite")
    refuse_changed(config, ("lora_rank", "shard"), "is not for reward models, whose weights are all trained here")


def check_pairs(train: list[dict], held_out: list[dict], config: Config) -> None:
    """End the run if there is nothing to learn from, or nothing to evaluate on."""
    if train and held_out:
        return
    found = f"{len(train)} pairs to learn from, {len(held_out)} held out"
    if config.data:
        fail(f"{found}: --data needs pairs of different responses, to two different prompts or more")
    fail(f"{found}: each takes two responses with different rewards (--gold); try another --task, or more questions")


def show_pairs(train: list[dict], held_out: list[dict], config: Config, tokenizer) -> None:
    """Print what a run is about to learn from."""
    times = config.steps * config.pairs_per_step / len(train)
    print(f"{len(train)} pairs to learn from, {times:.1f} times each; {len(held_out)} held out; the first one:")
    print(tokenizer.decode(train[0]["prompt_ids"]))
    for answer in train[0]["ranked"]:
        print(f"  {answer}")


if __name__ == "__main__":
    main(parse(Config))
