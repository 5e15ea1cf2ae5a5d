"""Several processes, each with its share of a batch: what is added up and what is put together."""

import torch
from accelerate.utils import gather_object


def sum_gradients(accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes: each one's loss is its share of the whole batch's."""
    has_gradient = any(p.grad is not None for p in parameters)
    processes_with_gradient = accelerator.reduce(torch.tensor(float(has_gradient), device=accelerator.device), "sum")
    if processes_with_gradient == 0:  # nobody has anything to learn from
        return
    for p in parameters:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = accelerator.reduce(gradient, "sum")


def gather(values: list) -> list:
    """The values of all processes, one process after the other."""
    return gather_object(values)
