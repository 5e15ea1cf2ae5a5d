"""What a run saves: checkpoint.pt, from which --resume continues, and model/, which other programs load."""

import hashlib
import json
from pathlib import Path

import torch

from plumbing.fail import fail

FORMAT = 2  # of checkpoint.pt; another number cannot be resumed


def fingerprint(data: list[dict]) -> str:
    """A short text that is another one for other data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def save_checkpoint(folder: Path, step: int, objects: dict, data: str) -> None:
    """Write the state of these objects after a step. The old file is replaced atomically: never a half-written one.

    data: the fingerprint of the data
    """
    state = {name: x.state_dict() for name, x in objects.items()}
    torch.save({"format": FORMAT, "step": step, "data": data, **state}, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")


def load_checkpoint(folder: Path, objects: dict, data: str) -> int:
    """Give these objects their saved state; returns the step it was saved after. data: the fingerprint of the data"""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    if saved.get("format") != FORMAT:
        fail(f"--resume {folder}: another version of this code wrote its checkpoint; start a new run")
    if saved["data"] != data:
        fail(f"--resume {folder}: its data has changed since the run began; put it back, or start a new run")
    for name, x in objects.items():
        x.load_state_dict(saved[name])
    return saved["step"]


def save_model(folder: Path, model, tokenizer) -> None:
    """Write a language model and its tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
