"""SFT: supervised fine-tuning on prompt/response pairs, the usual first stage before reinforcement learning.

Minimise the mean negative log-likelihood of the response tokens, the prompt being given:

    L(theta) = - sum_i sum_t log pi(y_it | x_i, y_i<t) / sum_i |y_i|

The prompt carries no loss; the end token does, or the model never learns to stop. Without --data the pairs are
demonstrations of very mixed quality on the arithmetic task, and with --model scratch the model is a new one: that is
how the tiny model of this repository was made. The exact command and what came out of it are in tiny/README.md.

    python sft.py --model scratch                        the tiny model, a few minutes on a CPU
    python sft.py --hidden-size 256 --layers 4           a larger one, of 2.7 M parameters: a teacher for family/opd.py
    python sft.py --model HuggingFaceTB/SmolLM2-135M --data pairs.jsonl --lr 2e-5 --steps 200
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch

from data import check_positions, draw, encode_task, read_task, stop_strings
from logprobs import Policy, batch_logprobs, make_policy
from pairs import demonstration_batch, encode_demonstrations, load_demonstrations, tokens_together
from plumbing.fail import fail
from plumbing.flags import RunConfig, parse, refuse_changed
from plumbing.processes import clip_gradients, sum_gradients
from plumbing.run import Run
from rollout import check_sampler, make_sampler
from tiny.make import demonstrations, new_model


@dataclass
class Config(RunConfig):  # template, evaluation and the like: plumbing/flags.py
    model: str = "scratch"  # Hugging Face folder or Hub name of the model to train; scratch: a new tiny one
    task: str = "arithmetic"  # what it is evaluated on
    hidden_size: int = 128  # of a new model; a multiple of 32
    layers: int = 2  # of a new model
    data: tuple[str, ...] = ()  # file or Hub set of prompt/response pairs; a second one is held out; empty: arithmetic
    sampler: Literal["auto", "hf", "vllm"] = "hf"  # what writes the responses it is evaluated on
    eval_every: int = 500  # steps between evaluations; 0: only before and after
    eval_prompts: int = 512  # held-out questions per evaluation
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    seed: int = 0  # of the new model's weights, and of the order of the pairs
    steps: int = 2000  # updates
    pairs_per_step: int = 128  # pairs in each update
    max_response_tokens: int = 512  # longest response of the data, tokens; longer ones are cut
    max_new_tokens: int = 64  # longest response in the evaluation, tokens
    temperature: float = 1.0  # of the policy, when it learns and when it is evaluated
    lr: float = 2e-3  # highest learning rate of AdamW: linear warm-up over 5 % of the steps, then a cosine to zero


# --- loss ---


def sft_loss(logp: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The mean of -log pi over the response tokens of the whole batch; logp, mask [B, T]. Micro-batches add up."""
    return -(logp * mask).sum() / num_tokens


# --- training ---


def main(config: Config) -> None:
    run = Run(config)  # the folder, the log, and the processes, if there are several
    accelerator = run.accelerator
    if check_sampler(config.sampler) == "vllm" and config.model == "scratch":
        fail("--sampler vllm loads a model from a folder: a new one needs --sampler hf")
    if config.model != "scratch":
        refuse_changed(config, ("hidden_size", "layers"), "is for a new model, --model scratch")
    if config.hidden_size % 32:
        fail(f"--hidden-size {config.hidden_size}: it must be a multiple of 32, the width of an attention head")
    task = read_task(dataclasses.replace(config, data=()))  # wrong data end the run here, before the weights are loaded
    pairs, held_out = load_demonstrations(config.data) if config.data else (demonstrations(), [])

    if config.model == "scratch":
        model, tokenizer = new_model(config.seed, config.hidden_size, config.layers)
        policy = Policy(model.to(accelerator.device), config.gradient_checkpointing, config.lora_rank)
    else:
        policy, tokenizer = make_policy(config, accelerator.device)
    parameters = policy.trained()  # all, or the adapter of --lora-rank
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup = max(1, config.steps // 20)

    def share_of_lr(done: int) -> float:
        """The fraction of the highest learning rate after `done` steps: the smaller one of warm-up and cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * done / config.steps))
        return min((done + 1) / warmup, cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr)
    if held_out:
        held_out = encode_demonstrations(held_out[: config.eval_prompts], tokenizer, config, "held-out")
    pairs = encode_demonstrations(pairs, tokenizer, config, "training")
    longest = max(tokens_together(pair, "response") for pair in pairs + held_out)
    check_positions(longest, policy.positions, "--max-response-tokens")
    _, test = encode_task(task, config, tokenizer, policy.positions)
    stop = stop_strings(tokenizer, config.template)
    sampler = make_sampler(config, policy, tokenizer, stop, accelerator.autocast, optimizer)
    # With --resume these are given the state in which they were saved.
    run.start(tokenizer, pairs, policy=policy, optimizer=optimizer, schedule=schedule)

    def evaluate(step: int) -> None:
        """Log the loss of held-out pairs, where there are some, and the model's own responses to the task."""
        if held_out:
            batch = demonstration_batch(held_out, tokenizer, accelerator.device)
            with accelerator.autocast():
                logp = batch_logprobs(policy, batch, config.temperature, config.tokens_per_microbatch)  # [B, T]
            loss = sft_loss(logp, batch.response_mask, int(batch.lengths.sum()))
            run.add_metrics(step, {"eval_loss": loss.item()})
        sampler.push(policy)
        run.evaluate(step, sampler, test)
        sampler.sleep()

    if run.first_step == 1:
        evaluate(0)
        run.end_step(0)
    else:
        sampler.sleep()

    for step in run.steps():
        # --- update ---
        chosen = draw(pairs, config.pairs_per_step, config.seed, step)
        num_tokens = sum(len(pair["response_ids"]) for pair in chosen)  # of all processes
        batch = demonstration_batch(run.share(chosen), tokenizer, accelerator.device)
        for micro in batch.microbatches(batch["row"], config.tokens_per_microbatch):
            with accelerator.autocast():
                logp, entropy = policy(micro, config.temperature)  # [b, t] each
            loss = sft_loss(logp, micro.response_mask, num_tokens)
            accelerator.backward(loss)
            run.collect(micro.response_mask, loss, entropy=entropy)
        sum_gradients(accelerator, parameters)
        grad_norm = clip_gradients(accelerator, parameters, 1.0)
        run.check_update(batch, grad_norm)  # ends the run if these are not finite
        optimizer.step()
        optimizer.zero_grad()
        run.check_weights(batch)
        lr = schedule.get_last_lr()[0]
        schedule.step()
        run.lap("seconds_update")

        # --- log, evaluate, save ---
        run.log(step, 1, grad_norm=grad_norm, lr=lr)
        if run.due(config.eval_every, step):
            evaluate(step)
        run.end_step(step)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
