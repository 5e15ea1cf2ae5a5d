"""What a run saves: checkpoint.pt, from which --resume continues, and model/, which other programs load."""

from pathlib import Path

import torch

from plumbing.fail import fail

FORMAT = 2  # of checkpoint.pt; another number cannot be resumed


def save_checkpoint(folder: Path, step: int, objects: dict) -> None:
    """Write the state of these objects after a step. The old file is replaced atomically: never a half-written one."""
    state = {name: x.state_dict() for name, x in objects.items()}
    torch.save({"format": FORMAT, "step": step, **state}, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")


def load_checkpoint(folder: Path, objects: dict) -> int:
    """Give these objects their saved state; returns the step it was saved after."""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    if saved.get("format") != FORMAT:
        fail(f"--resume {folder}: another version of this code wrote its checkpoint; start a new run")
    for name, x in objects.items():
        x.load_state_dict(saved[name])
    return saved["step"]


def save_model(folder: Path, model, tokenizer) -> None:
    """Write a language model and its tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
