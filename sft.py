"""SFT: supervised fine-tuning on prompt/response pairs, where every recipe of reasoning RL begins.

Minimise the mean negative log-likelihood of the response tokens, the prompt being given:

    L(theta) = - sum_i sum_t log pi(y_it | x_i, y_i<t) / sum_i |y_i|

The prompt carries no loss; the end token does, or the model never learns to stop. Without --data the pairs are
demonstrations of very mixed quality on the arithmetic task, and with --model scratch the model is a new one: that is
how the tiny model of this repository was made. The exact command and what came out of it are in tiny/README.md.

    python sft.py --model scratch                        the tiny model, a few minutes on a CPU
    python sft.py --model HuggingFaceTB/SmolLM2-135M --data pairs.jsonl --lr 2e-5 --steps 200
"""

import dataclasses
import math
import string
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import collate, demonstrations, draw, encode_pairs, load_prompts, read_jsonl
from rollout import check_sampler, load_model, make_sampler, token_logprobs
from run import Run, parse, sum_gradients


@dataclass
class Config:
    model: str = "scratch"  # Hugging Face folder or Hub name of the model to train; scratch: a new tiny one
    task: str = "arithmetic"  # what it is evaluated on
    data: str = ""  # JSONL file of prompt/response pairs, taken as they are; empty: demonstrations
    template: Literal["auto", "plain", "r1", "chat"] = "auto"  # how a question of the task becomes a prompt
    sampler: Literal["auto", "hf", "vllm"] = "hf"  # what writes the responses it is evaluated on
    steps: int = 2000  # updates
    pairs_per_step: int = 128  # pairs in each update
    max_prompt_tokens: int = 512  # longer prompts are left out of the evaluation, tokens
    max_new_tokens: int = 64  # longest response in the evaluation, tokens
    temperature: float = 1.0  # of the policy, when it learns and when it is evaluated
    tokens_per_microbatch: int = 2048  # tokens in one forward and backward pass; memory only, not the result
    gradient_checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    lr: float = 2e-3  # highest learning rate of AdamW: linear warm-up over 5 % of the steps, then a cosine to zero
    eval_every: int = 500  # steps between evaluations; 0: only before and after
    eval_prompts: int = 512  # held-out questions per evaluation
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    seed: int = 0  # of the new model's weights, and of the order of the pairs
    out: str = ""  # folder of the run; empty: runs/<script>-<time>
    resume: str = ""  # folder of an interrupted run to continue exactly
    track: Literal["", "wandb", "tensorboard", "trackio"] = ""  # also log there


# --- a new tiny model ---


def new_model(seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama of 0.34 M parameters and a tokenizer of single characters, where each of the four tags is one token."""
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokens = ["<pad>", "<eos>", "<unk>", *tags, "\n", *sorted(string.printable[:95])]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    return model.eval(), tokenizer


# --- loss ---


def sft_loss(logp: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The mean of -log pi over the response tokens of the whole batch; logp, mask [B, T]. Micro-batches add up."""
    return -(logp * mask).sum() / num_tokens


# --- training ---


def main(config: Config) -> None:
    cuda = torch.cuda.is_available()  # weights are in float32, arithmetic on a GPU in bf16
    tracking = {"log_with": config.track or None, "project_dir": config.out or "runs"}
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no", **tracking)
    run = Run(config, accelerator)
    if check_sampler(config.sampler) == "vllm" and config.model == "scratch":
        raise SystemExit("--sampler vllm loads a model from a folder: a new one needs --sampler hf")
    if config.model == "scratch":
        policy, tokenizer = new_model(config.seed)
        policy.to(accelerator.device)
    else:
        policy, tokenizer = load_model(config.model, accelerator.device, config.gradient_checkpointing)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup = max(1, config.steps // 20)
    shape = lambda done: min((done + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done / config.steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    state = {"policy": policy, "optimizer": optimizer, "schedule": schedule}  # all that a run needs to go on later
    pairs = read_jsonl(config.data, ("prompt", "response")) if config.data else demonstrations()
    pairs = encode_pairs(pairs, tokenizer)
    _, test = load_prompts(dataclasses.replace(config, data=()), tokenizer)
    sampler = make_sampler(config, policy, tokenizer, accelerator)
    if config.resume:
        run.restore(**state)
    sampler.push(policy)
    if run.first_step == 1:
        run.evaluate(0, sampler, test)
        run.end_step(0, tokenizer, **state)
    sampler.sleep()

    for step in run.steps():
        # --- update ---
        chosen = draw(pairs, config.pairs_per_step, config.seed, step)
        num_tokens = sum(len(pair["response_ids"]) for pair in chosen)
        chosen = chosen[accelerator.process_index :: accelerator.num_processes]  # this process's share
        prompts, responses = [pair["prompt_ids"] for pair in chosen], [pair["response_ids"] for pair in chosen]
        zeros = [[0.0] * len(response) for response in responses]  # nobody sampled these
        batch = collate(prompts, responses, zeros, ["stop"] * len(responses), tokenizer, policy.device)
        for micro in batch.microbatches(batch["row"], config.tokens_per_microbatch):
            with accelerator.autocast():
                logp, entropy = token_logprobs(policy, micro, config.temperature)  # [b, t]
            loss = sft_loss(logp, micro.response_mask, num_tokens)
            accelerator.backward(loss)
            run.collect(micro.response_mask, loss, entropy=entropy)
        sum_gradients(accelerator, parameters)
        grad_norm = accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        run.lap("seconds_update")

        # --- log, evaluate, save ---
        run.log(step, 1, grad_norm=grad_norm.item(), lr=lr)
        if run.due(config.eval_every, step):
            sampler.push(policy)
            run.evaluate(step, sampler, test)
            sampler.sleep()
        run.end_step(step, tokenizer, **state)
    run.finish()


if __name__ == "__main__":
    main(parse(Config))
