"""Checkpoints of models that are spread over processes: each writes its part, and any number of processes reads them.

checkpoint/ has the parts, as torch.distributed.checkpoint writes them, and rest.pt, which is the same in all processes.
"""

import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

FOLDER = "checkpoint"


def options(objects: dict) -> StateDictOptions:
    """With LoRA what is trained, since the frozen weights come from --model; else all, also an average that is not."""
    lora = any(getattr(x, "lora_rank", 0) for x in objects.values())
    return StateDictOptions(ignore_frozen_params=lora, strict=False)


def save_sharded(folder: Path, main: bool, objects: dict, rest: dict) -> None:
    """Write the state of these objects, and what is in `rest`, into checkpoint/. All processes call it together.

    main: whether this process writes what all have. A checkpoint that is there stays until the new one is whole.
    """
    new = folder / f"{FOLDER}.tmp"
    if main:
        shutil.rmtree(new, ignore_errors=True)
    torch.distributed.barrier()
    dcp.save(sharded_state(objects), checkpoint_id=new)
    if main:
        plain = {name: x.state_dict() for name, x in others(objects).items()}
        torch.save({**rest, **plain}, new / "rest.pt")
        old = folder / f"{FOLDER}.old"
        if (folder / FOLDER).exists():
            shutil.rmtree(old, ignore_errors=True)
            (folder / FOLDER).rename(old)
        new.rename(folder / FOLDER)
        shutil.rmtree(old, ignore_errors=True)
    torch.distributed.barrier()


def newest(folder: Path) -> Path:
    """The folder of the checkpoint that is whole; a run that was killed at the wrong moment has only the old one."""
    if not (folder / FOLDER).exists() and (folder / f"{FOLDER}.old").exists():
        return folder / f"{FOLDER}.old"
    return folder / FOLDER


def read_rest(folder: Path) -> dict:
    """What is the same in all processes."""
    return torch.load(newest(folder) / "rest.pt", map_location="cpu", weights_only=True)


def load_sharded(folder: Path, objects: dict) -> None:
    """Give these objects the state that they were saved with, by as many processes or by another number."""
    state = sharded_state(objects)
    dcp.load(state, checkpoint_id=newest(folder))
    set_model_state_dict(models(objects), state["models"], options=options(objects))
    set_optimizer_state_dict(models(objects), objects["optimizer"], state["optimizer"], options=options(objects))
    rest = read_rest(folder)
    for name, x in others(objects).items():
        x.load_state_dict(rest[name])


def sharded_state(objects: dict) -> dict:
    """The state of all models, and of the optimizer by the names of their weights."""
    return {
        "models": get_model_state_dict(models(objects), options=options(objects)),
        "optimizer": get_optimizer_state_dict(models(objects), objects["optimizer"], options=options(objects)),
    }


def models(objects: dict) -> torch.nn.ModuleDict:
    """Those of the objects that are models, together."""
    return torch.nn.ModuleDict({name: x for name, x in objects.items() if isinstance(x, torch.nn.Module)})


def others(objects: dict) -> dict:
    """Those that are the same in all processes: schedules, log-probs of the reference."""
    return {name: x for name, x in objects.items() if name != "optimizer" and not isinstance(x, torch.nn.Module)}
