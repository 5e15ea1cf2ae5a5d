r"""A process reward model: it judges every step of a response (Let's Verify Step by Step, arXiv 2305.20050).

For a question x, a response y has steps, of which step j ends at token t_j; the answer is the last step. sigma(z) is
1/(1 + exp(-z)), the probability that a step is right. Maximise, averaged over all steps,

    J(theta) = mean_j [ y_j log sigma(s_j) + (1 - y_j) log(1 - sigma(s_j)) ]                              (2)

    s_j = the scalar head on the state of token t_j                                                       (1)

where y_j is the label of step j, from 0 to 1. What it means depends on where it comes from:

    --labels verifier     whether the step itself is right: of the arithmetic task each sum, "3+5=8"
    --labels mc           of --continuations responses sampled on from the end of the step, the share that end right
                          (Math-Shepherd, arXiv 2312.08935): not whether the step is right, but what it is worth to this
                          model. After a wrong step that the model usually repairs it is high; after a right one on a
                          path where it usually fails it is low.

Steps end at a comma in sums, else at the end of a line, in the thinking; they are found in the text and carried to the
tokens. The whole response is read at once, and each step at its last token: one pass judges all of them.
Kept from reward_model.py: the model, the loop. What it leaves in model/ judges the steps in python -m
family.process_grpo --judge PATH. metrics.jsonl has accuracy and calibration of the first step, the second, ...

    python -m family.prm
        On a CPU, no download: the steps of a tiny model's responses, judged by the verifier; or by --labels mc.
    python -m family.prm --model HuggingFaceTB/SmolLM2-135M-Instruct --data steps.jsonl --lr 1e-5 --max-new-tokens 512
        Your own, one {"prompt": ..., "steps": ["...", ...], "labels": [1, 0, ...]} per line, or a set on the Hub.
"""

import sys

sys.path.insert(1, sys.path[0].removesuffix("family"))  # the root, for `python family/NAME.py`

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from data import draw, encode_task, read_task, stop_strings
from logprobs import batch_scores, load_policy, load_scorer
from plumbing.fail import fail
from plumbing.flags import AtLeast, RunConfig, parse, refuse_changed
from plumbing.processes import clip_gradients, gather, sum_gradients
from plumbing.run import Run
from plumbing.steps import encode_steps, judge_steps_of, read_steps, sample_steps, step_batch
from rewards import check_steps
from rollout import check_sampler, make_sampler


@dataclass
class Config(RunConfig):  # model, data, sampler, evaluation and the like: plumbing/flags.py
    task: str = "arithmetic"  # without --data: the model's responses to its questions
    data: tuple[str, ...] = ()  # JSONL file or Hub set of steps; a second one is held out; empty: the model's own
    eval_prompts: int = 128  # held-out questions, or responses of --data, per evaluation
    seed: int = 0  # of the model's own responses, and of the order of the pairs
    labels: Literal["verifier", "mc"] = "verifier"  # y: by the verifier of the task, or by continuations of each step
    continuations: int = 8  # of each step, for --labels mc
    pair_prompts: int = 512  # questions to sample responses to
    group_size: Annotated[int, AtLeast(1)] = 2  # G: responses to each of them
    steps: int = 80  # updates
    pairs_per_step: int = 64  # responses in each update
    max_new_tokens: int = 64  # longest response |y|, tokens; longer ones of --data are cut
    temperature: float = 1.0  # divides the logits when the model samples
    lr: float = 3e-4  # learning rate of AdamW; 1e-5 for a pretrained model


# --- loss ---


def step_loss(scores, labels, ends, num_steps):
    """-J(theta) for a micro-batch -> (loss, stats). Losses of micro-batches add up to that of the update.

    scores, labels [B, T]: s and y at the ends of steps; ends [B, T]: True there
    num_steps: those of the whole update, in all its micro-batches and processes
    """
    error = binary_cross_entropy_with_logits(scores, labels, reduction="none")  # [B, T] (2)
    hits = ((scores > 0) == (labels >= 0.5))[ends]  # [S] of the S steps
    stats = {"step_accuracy": hits.float()[:, None], "label": labels[ends][:, None]}  # [S, 1] each
    return (error * ends).sum() / num_steps, stats  # mean_j


# --- training ---


def main(config: Config) -> None:
    check_flags(config)
    run = Run(config)  # the folder, the log, and the processes, if there are several
    accelerator = run.accelerator
    check_sampler(config.sampler)
    if config.data:  # wrong data ends the run here, before the weights are loaded
        train, held_out = read_steps(config.data)
    else:
        task = read_task(config)
        if config.labels == "verifier":
            check_steps(task.train)

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
            train = gather(sample_steps(config, sampler, tokenizer, run.share(questions), run.seed(0)))
            held_out = gather(sample_steps(config, sampler, tokenizer, run.share(test), run.seed(0)))
        sampler.sleep()
        del policy, sampler
    train, held_out = encode_steps(train, held_out, config, tokenizer)
    check_pairs(train, held_out, config)
    if accelerator.is_main_process:
        show_pairs(train, held_out, config, tokenizer)
        if not config.resume:
            (run.folder / "pairs.json").write_text(json.dumps([train, held_out]))
    run.start(tokenizer, train, policy=model, optimizer=optimizer)  # with --resume: as saved
    held_out_batch = step_batch(held_out, tokenizer, accelerator.device)
    held_out_ends = held_out_batch["ends"]  # [B, T]

    def evaluate(step: int) -> None:
        """Log held-out steps: loss, accuracy, and calibration, which calibration.png shows."""
        with accelerator.autocast():
            scores = batch_scores(model, held_out_batch, config.tokens_per_microbatch, each=True)  # [B, T]
        loss, stats = step_loss(scores, held_out_batch["labels"], held_out_ends, held_out_ends.sum())
        run.add_metrics(step, {"eval_loss": loss.item()})
        run.add_metrics(step, {f"eval_{name}": x.mean().item() for name, x in stats.items()})
        run.add_metrics(step, judge_steps_of(scores, held_out_batch, run.folder / "calibration.png"))

    if run.first_step == 1:
        evaluate(0)
        run.end_step(0)

    for step in run.steps():
        # --- pairs, in place of a rollout ---
        pairs = run.share(draw(train, config.pairs_per_step, config.seed, step))  # this process's share
        batch = step_batch(pairs, tokenizer, accelerator.device)
        num_steps = accelerator.reduce(batch["ends"].sum())  # of the update

        # --- update ---
        for micro in batch.microbatches(batch["row"], config.tokens_per_microbatch):
            with accelerator.autocast():
                scores = model(micro, each=True)  # [b, t] (1)
            loss, stats = step_loss(scores, micro["labels"], micro["ends"], num_steps)
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
        names = ("task", "template", "system", "sampler", "labels", "continuations", "pair_prompts", "group_size")
        refuse_changed(config, names, "is for the model's own responses; drop it, or drop --data")
    refuse_changed(config, ("lora_rank", "shard"), "is not for reward models, whose weights are all trained here")


def check_pairs(train: list[dict], held_out: list[dict], config: Config) -> None:
    """End the run if there is nothing to learn from, or nothing to evaluate on."""
    if train and held_out:
        return
    found = f"{len(train)} responses to learn from, {len(held_out)} held out"
    fail(f"{found}: there must be responses to two different prompts or more, with steps in --max-new-tokens tokens")


def show_pairs(train: list[dict], held_out: list[dict], config: Config, tokenizer) -> None:
    """Print what a run is about to learn from."""
    times = config.steps * config.pairs_per_step / len(train)
    print(f"{len(train)} responses to learn from, {times:.1f} times each; {len(held_out)} held out; the first one:")
    print(tokenizer.decode(train[0]["prompt_ids"]))
    start = 0
    for end, label in zip(train[0]["ends"], train[0]["labels"], strict=False):
        print(f"  {label:.2f} {train[0]['response'][start:end]!r}")
        start = end


if __name__ == "__main__":
    main(parse(Config))
