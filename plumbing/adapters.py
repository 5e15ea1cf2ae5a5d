"""LoRA (arXiv 2106.09685), by the library peft: small trained adapters in a model whose own weights are frozen.

An adapter adds alpha / rank * B A to the matrix of every linear layer but the LM head. Several adapters may be in one
model; whoever computes with it says first which one counts (use). A model without adapters is left as it is by all
functions here.
"""

import json
from pathlib import Path

import torch

from plumbing.fail import fail
from plumbing.processes import whole

POLICY = "policy"  # the adapter of the policy
VALUE = "value"  # that of PPO's value network, in the same model


def add_adapter(model, name: str, rank: int) -> None:
    """Give a model an adapter of this rank, with alpha = 2 rank, and freeze all else. At first it changes nothing.

    The model may be the body of one that has an adapter already: then the new one is in the same layers.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same in all processes
        inject_adapter_in_model(lora_config(model, rank), model, name)
    for x in adapter_weights(model, name).values():
        x.data = x.data.float()  # peft takes the type of the frozen weights, in which small updates would be lost


def lora_config(model, rank: int):
    """What peft is told about an adapter."""
    from peft import LoraConfig

    adapted = {path.rpartition(".")[2] for path in adapted_layers(model)}
    targets = sorted(adapted) or "all-linear"
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", target_modules=targets)


def adapted_layers(model) -> dict:
    """Path in the model -> layer with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_weights(model, name: str) -> dict[str, torch.nn.Parameter]:
    """Name in the model -> weight of this adapter."""
    return {path: p for path, p in model.named_parameters() if ".lora_" in path and f".{name}." in path}


def frozen_weights(model) -> dict[str, torch.nn.Parameter]:
    """Name in the model -> weight that belongs to no adapter."""
    return {path: p for path, p in model.named_parameters() if ".lora_" not in path}


def use(model, name: str | None) -> None:
    """From now on the model computes with this adapter alone; None: with none."""
    for layer in adapted_layers(model).values():
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)
    # peft freezes the others now. A backward pass through what they have computed would then leave them without a
    # gradient, and say nothing.
    for path, p in model.named_parameters():
        if ".lora_" in path:
            p.requires_grad_(True)


def merged_weights(model, name: str | None = POLICY):
    """Yield (name, tensor) of the weights as a model without adapters or shards has them, one tensor at a time.

    name: of the adapter that is added to them; None: of none
    All processes have to take all of them, if the model is sharded.
    """
    layers = adapted_layers(model)
    for key, x in model.state_dict().items():
        x = whole(x)
        path, inside, rest = key.partition(".base_layer.")
        if not inside:
            if ".lora_" not in key:
                yield key, x
        elif rest == "weight" and name:
            delta = whole(layers[path].get_delta_weight(name))
            yield f"{path}.{rest}", (x.to(delta.dtype) + delta).to(x.dtype)
        else:  # a bias, or without the adapter
            yield f"{path}.{rest}", x


def save_adapter(folder: Path, model, rank: int, base: str, main: bool = True) -> None:
    """Write the policy's adapter as peft does, for a model with the name or folder `base`; main: as in save_model."""
    from safetensors.torch import save_file

    state = {}
    for path, x in adapter_weights(model, POLICY).items():
        state["base_model.model." + path.replace(f".{POLICY}.", ".")] = whole(x.detach()).cpu().contiguous()
    if not main:
        return
    folder.mkdir(exist_ok=True)
    config = lora_config(model, rank)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    config.save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")


def is_adapter(path: str) -> bool:
    """Whether this is the folder of an adapter and not of a model."""
    return (Path(path) / "adapter_config.json").exists() and not (Path(path) / "config.json").exists()


def base_of(path: str) -> str:
    """The model that an adapter's folder is for; any other path as it is."""
    if not is_adapter(path):
        return path
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    if not config.get("base_model_name_or_path"):
        fail(
            f"--model {path}: its adapter_config.json names no model that the adapter is for (base_model_name_or_path)"
        )
    return config["base_model_name_or_path"]


def merge_folder(model, path: str):
    """The model with the adapter of this folder as a part of its weights."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, path).merge_and_unload()
    return merged.requires_grad_(True)  # peft has frozen it
