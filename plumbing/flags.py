"""The command line: the flags that all scripts share, --resume, and checks of what cannot be meant."""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from plumbing.fail import fail

ROOT = Path(__file__).resolve().parent.parent  # of the scripts, beside which the tiny model is


@dataclass(frozen=True)
class AtLeast:
    """The smallest number that a field may hold, beside its type: `group_size: Annotated[int, AtLeast(2)] = 8`."""

    number: float


@dataclass
class RunConfig:
    """The flags that every script has and no equation mentions."""

    model: str = "tiny"  # Hugging Face folder or Hub name of the policy to train
    task: str = "arithmetic"  # arithmetic, arithmetic_words, countdown, gsm8k, math, qa; levels as in arithmetic:3-6
    data: tuple[str, ...] = ()  # JSONL file or Hub set of questions and answers; a second one is held out
    template: Literal["auto", "plain", "r1", "chat"] = "auto"  # how a question becomes a prompt
    system: str = ""  # system message before every question that has none; without a chat template, text before it
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # what writes the responses
    max_prompt_tokens: int = 512  # longer prompts are left out, tokens
    sampler_tokens: int = 65536  # most tokens in the Hugging Face sampler's cache, at least one group; memory only
    tokens_per_microbatch: int = 2048  # tokens in one forward and backward pass; memory only, not the result
    lora_rank: int = 0  # train a LoRA adapter of this rank, and with it a learning rate 10 times as large; 0: no LoRA
    shard: bool = False  # spread weights, gradients and Adam's state over several processes; with --sampler vllm
    gradient_checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    eval_every: int = 20  # steps between evaluations; 0: only before and after
    eval_prompts: int = 128  # held-out questions per evaluation
    eval_samples: int = 8  # k: responses to each of them, besides the greedy one
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    seed: int = 0  # random seed of prompts, samples and minibatches
    out: str = ""  # folder of the run; empty: runs/<script>-<time>
    resume: str = ""  # folder of an interrupted run to continue exactly
    track: Literal["", "wandb", "tensorboard", "trackio"] = ""  # also log to this tracker


# --- reading the command line ---


def parse(config_class):
    """The configuration from the command line; with --resume DIR, flags not given are those of the run in DIR."""
    own_flags_first(config_class)
    config = tyro.cli(config_class, description=sys.modules["__main__"].__doc__)
    if config.model == "tiny" and not Path("tiny").exists():  # started from another folder
        config = dataclasses.replace(config, model=str(ROOT / "tiny"))
    if not config.resume:
        return config
    saved = read_config(config_class, Path(config.resume))
    config = tyro.cli(config_class, default=saved)
    config = dataclasses.replace(config, out=config.resume)
    may_change = {"steps": config.steps, "out": config.out, "resume": config.resume}
    if config != dataclasses.replace(saved, **may_change):
        fail("--resume goes on as the run began; of the other flags only --steps may change")
    return config


def own_flags_first(config_class) -> None:
    """Put the script's own fields before those of RunConfig, so that --help begins with the objective's flags."""
    fields = config_class.__dataclass_fields__  # tyro lists the flags in the order of this dictionary
    own = {}
    shared = {}
    for name, field in fields.items():
        if name in RunConfig.__dataclass_fields__:
            shared[name] = field
        else:
            own[name] = field
    config_class.__dataclass_fields__ = own | shared


def read_config(config_class, folder: Path):
    """The saved configuration of the run to resume."""
    places = ("checkpoint.pt", "checkpoint/rest.pt", "checkpoint.old/rest.pt")
    if not any((folder / place).exists() for place in places):
        fail(f"--resume {folder}: no checkpoint.pt is there to go on from; start a new run")
    saved = json.loads((folder / "config.json").read_text())
    if saved.pop("script") != Path(sys.argv[0]).stem:
        fail(f"--resume {folder}: that run was made by another script")
    if saved.keys() != config_class.__dataclass_fields__.keys():
        fail(f"--resume {folder}: another version of this code made that run; start a new run")
    for name, value in saved.items():
        if isinstance(value, list):
            saved[name] = tuple(value)  # JSON has no tuples
    return config_class(**saved)


# --- checks ---


def check_config(config, processes: int) -> None:
    """End the run, before any work, at a number that cannot be meant."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            continue
        low = minimum(field, processes)
        if isinstance(value, int | float) and not value >= low:  # written so that nan fails too
            fail(f"{flag(field.name)} {value}: it must be at least {low}")
    if not hasattr(config, "lora_rank"):  # nothing is trained
        return
    if config.lora_rank and getattr(config, "value_model", ""):
        fail("--value-model: with --lora-rank the value network is an adapter in the policy's body; leave one out")
    if config.lora_rank and hasattr(config, "ema"):
        fail("--lora-rank: a moving average of the weights needs weights of its own; leave it out")
    if config.shard:
        check_shards(config, processes)
    if not hasattr(config, "minibatches"):
        return
    prompts = config.prompts_per_step
    if prompts % processes:
        fail(f"--prompts-per-step {prompts}: cannot be divided evenly among {processes} processes; change it")
    responses = prompts * config.group_size
    if responses % (processes * config.minibatches):
        fail(
            f"--minibatches {config.minibatches}: {count(prompts, 'prompt')} x {count(config.group_size, 'response')} "
            f"= {responses} cannot be divided evenly among {count(processes, 'process')} x {config.minibatches} "
            "minibatches; change --minibatches, --prompts-per-step or --group-size"
        )


def check_shards(config, processes: int) -> None:
    """End the run if its models cannot be sharded: all processes have to make the same passes through them."""
    if config.sampler != "vllm":  # auto may take the other one
        fail("--shard: the Hugging Face sampler needs the whole model in every process; give --sampler vllm")
    if config.lora_rank and (hasattr(config, "value_lr") or hasattr(config, "reward_lr")):
        fail("--shard: not together with --lora-rank where two adapters have one body, as in PPO; leave one out")
    if "RANK" not in os.environ:
        fail("--shard: start it as torchrun --nproc_per_node 4 SCRIPT.py ..., with as many processes as GPUs")
    if config.eval_prompts % processes:
        fail(f"--shard: --eval-prompts {config.eval_prompts} cannot be divided evenly among {processes} processes")
    pairs = getattr(config, "pairs_per_step", processes)
    if pairs % processes:
        fail(f"--shard: --pairs-per-step {pairs} cannot be divided evenly among {processes} processes")


def count(n: int, noun: str) -> str:
    """A number with its noun: 1 process, 2 processes, 3 prompts."""
    if n == 1:
        return f"1 {noun}"
    return f"{n} {noun}es" if noun.endswith("s") else f"{n} {noun}s"


def minimum(field: dataclasses.Field, processes: int) -> float:
    """The smallest number that a field may hold."""
    for mark in get_args(field.type):
        if isinstance(mark, AtLeast):
            return mark.number
    if field.name == "temperature":
        return 0.01
    if field.name in ("eval_prompts", "pairs_per_step"):
        return processes  # every process needs one
    if field.default == 0 or "_every" in field.name or "_warmup" in field.name:
        return 0  # 0 turns it off
    if isinstance(field.default, float):
        return 0
    return 1


def refuse_changed(config, names: tuple[str, ...], why: str) -> None:
    """End the run if one of these flags differs from its default, since it would be ignored."""
    for field in dataclasses.fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            fail(f"{flag(field.name)} {why}")


def flag(name: str) -> str:
    """The name of a field as it is on the command line."""
    return "--" + name.replace("_", "-")
