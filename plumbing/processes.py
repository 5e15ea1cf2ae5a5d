"""Several processes, each with its share of a batch: what they add up, put together, and spread over themselves."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

in_step = False  # whether all processes have to make the same passes through the models, because these are sharded


def make_accelerator(**more) -> Accelerator:
    """What knows the device, the precision and the other processes; weights are float32, arithmetic on a GPU bf16."""
    cuda = torch.cuda.is_available()
    return Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no", **more)


# --- shards ---


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Spread a model over the processes, layer by layer (FSDP2); returns it.

    A process then has a part of every weight, and so of its gradient and of Adam's state. A layer is gathered when it
    is computed. Gradients of all processes are added up on the way back. Its parameters are new objects.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    global in_step
    in_step = True
    for layer in layers(model):
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum, not the mean
            module.set_force_sum_reduction_for_comms(True)  # gloo, on a CPU, has no other
    return model


def layers(model) -> list[torch.nn.Module]:
    """The layers of a transformer: what its outermost lists of modules hold."""
    found = []
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            found += child
        else:
            found += layers(child)
    return found


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process may have a part only. All processes have to ask for it together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has."""
    return x.to_local() if isinstance(x, DTensor) else x


def most(n: int) -> int:
    """How many passes through the models this process has to make: the most that one needs, if they are sharded."""
    return max(gather([n])) if in_step else n


# --- sums ---


def sum_gradients(accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes: each one's loss is its share of the whole batch's."""
    if in_step:  # done by the backward pass
        return
    has_gradient = any(p.grad is not None for p in parameters)
    processes_with_gradient = accelerator.reduce(torch.tensor(float(has_gradient), device=accelerator.device), "sum")
    if processes_with_gradient == 0:  # nobody has anything to learn from
        return
    for p in parameters:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = accelerator.reduce(gradient, "sum")


def clip_gradients(accelerator, parameters: list[torch.nn.Parameter], limit: float) -> float:
    """Shorten the gradient of all these parameters together to norm `limit`; returns the norm it had."""
    return whole(accelerator.clip_grad_norm_(parameters, limit)).item()


def gather(values: list) -> list:
    """The values of all processes, one process after the other."""
    return gather_object(values)
