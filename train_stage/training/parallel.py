"""Parallel training: DDP or FSDP2 around the loss, and unsharded tensors for checkpoints."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ...shared.errors import DataError
from ...shared.runtime.distributed import World


def wrap_parallel(module: nn.Module, layers: nn.ModuleList, strategy: str, world: World, device: str) -> nn.Module:
    """Wraps `module` so that its gradients become means over all processes.

    "ddp" replicates the parameters; "fsdp" shards those of each of the `layers`, and all others together, in place
    (torch.distributed.fsdp.fully_shard).
    """
    if world.size == 1:
        return module
    if strategy == "ddp":
        return DistributedDataParallel(module, device_ids=[torch.cuda.current_device()] if device == "cuda" else None)
    mesh = init_device_mesh(device, (world.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def gradient_sync(module: nn.Module, now: bool) -> AbstractContextManager[None]:
    """A context for forward and backward; unless `now`, DDP accumulates gradients locally.

    FSDP reduces them every time, since unsharded gradients may not fit into memory.
    """
    return nullcontext() if now or not isinstance(module, DistributedDataParallel) else module.no_sync()


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor. Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refuse_other_tensors(
    path: str, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor], slots: bool = False
) -> None:
    """Raises DataError unless `tensors` have the names and shapes of `names`, with `slots` as "PARAMETER/SLOT"."""
    for name, tensor in tensors.items():
        owner, _, slot = name.rpartition("/") if slots else (name, "", "")
        expected = names.get(owner)
        shape = () if slot == "step" else None if expected is None else tuple(expected.shape)
        if expected is None or tuple(tensor.shape) != shape:
            raise DataError(f"{path} has {name[:200]!r} of shape {tuple(tensor.shape)}, which is not of this model.")
    missing = [] if slots else sorted(names.keys() - tensors.keys())
    if missing:
        raise DataError(f"{path} lacks {missing[0][:200]!r}, which the model has.")


def fill(target: Tensor, values: Tensor) -> None:
    """Copies unsharded `values` into a tensor that may be sharded; each process copies its own shard."""
    if isinstance(target, DTensor):
        values = distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(values)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as "PARAMETER/SLOT" -> tensor."""
    return {
        f"{name}/{slot}": tensor
        for name, parameter in model.named_parameters()
        for slot, tensor in optimizer.state[parameter].items()
    }


def fill_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores unsharded tensors, named as by `optimizer_tensors`, into an optimizer before its first step."""
    parameters = dict(model.named_parameters())
    for slot_name, values in tensors.items():
        name, _, slot = slot_name.rpartition("/")
        parameter = parameters[name]
        if slot == "step":  # one number, beside the weights because AdamW is fused
            optimizer.state[parameter][slot] = values.to(parameter.device)
        else:
            optimizer.state[parameter][slot] = torch.empty_like(parameter, requires_grad=False)
            fill(optimizer.state[parameter][slot], values)
