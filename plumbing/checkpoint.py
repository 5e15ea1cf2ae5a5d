"""What a run saves: checkpoint.pt, from which --resume continues, and model/, which other programs load."""

import hashlib
import json
from pathlib import Path

import torch

from plumbing.adapters import frozen_weights, save_adapter
from plumbing.fail import fail
from plumbing.processes import whole

FORMAT = 3  # of checkpoint.pt; another number cannot be resumed


def fingerprint(data: list[dict]) -> str:
    """A short text that is another one for other data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def save_checkpoint(folder: Path, step: int, objects: dict, data: str, processes: int) -> None:
    """Write the state of these objects after a step. The old file is replaced atomically: never a half-written one.

    data: the fingerprint of the data
    """
    state = {name: state_of(x) for name, x in objects.items()}
    about = {"format": FORMAT, "step": step, "data": data, "processes": processes}
    torch.save({**about, **state}, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")


def load_checkpoint(folder: Path, objects: dict, data: str, processes: int) -> int:
    """Give these objects their saved state; returns the step it was saved after. data: the fingerprint of the data"""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    check_checkpoint(folder, saved, data)
    if saved["processes"] != processes:
        fail(
            f"--resume {folder}: it ran in {saved['processes']} processes, and goes on in as many only, not in "
            f"{processes}: torchrun --nproc_per_node {saved['processes']} ..."
        )
    for name, x in objects.items():
        if getattr(x, "lora_rank", 0):
            load_trained(folder, x, saved[name])
        else:
            x.load_state_dict(saved[name])
    return saved["step"]


def check_checkpoint(folder: Path, saved: dict, data: str) -> None:
    """Refuse a checkpoint of another version of this code, or of other data."""
    if saved.get("format") != FORMAT:
        fail(f"--resume {folder}: another version of this code wrote its checkpoint; start a new run")
    if saved["data"] != data:
        fail(f"--resume {folder}: its data has changed since the run began; put it back, or start a new run")


def state_of(x) -> dict:
    """What a checkpoint has of an object: its state; with LoRA what is trained, and a mark of what is frozen."""
    if not getattr(x, "lora_rank", 0):
        return x.state_dict()
    trained = set(x.trained())
    state = {name: p for name, p in x.named_parameters() if p in trained}
    return {"trained": state, "frozen": frozen_sum(x)}


def load_trained(folder: Path, x, state: dict) -> None:
    """Give an object with LoRA what was trained. What is frozen came from --model, and must be what it was."""
    if frozen_sum(x) != state["frozen"]:
        fail(f"--resume {folder}: the weights of its --model have changed since; put them back, or start a new run")
    x.load_state_dict(state["trained"], strict=False)


def frozen_sum(x) -> float:
    """A number that is another one for other frozen weights."""
    return sum(whole(p.double().abs().sum()).item() for p in frozen_weights(x).values() if not p.requires_grad)


def save_model(folder: Path, policy, tokenizer, base: str = "", main: bool = True) -> None:
    """Write a policy's language model and its tokenizer as a Hugging Face folder; with LoRA the adapter as well.

    base: the name or folder of the model that the adapter is for
    main: whether this process writes; the others only give their shards
    """
    weights = {}
    for name, x in policy.weights():
        if main:
            weights[name] = x.cpu()
    if main:
        policy.model.save_pretrained(folder / "model", state_dict=weights)
        tokenizer.save_pretrained(folder / "model")
    if policy.lora_rank:
        save_adapter(folder / "adapter", policy.model, policy.lora_rank, base, main)
