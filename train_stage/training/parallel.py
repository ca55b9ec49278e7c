"""How the model of a run is spread over its processes: whole in one, DDP, or FSDP2; and gathered again."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed import DistBackendError, DistError
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ...shared.errors import DataError
from ...shared.runtime.distributed import World


def wrap_parallel(module: nn.Module, layers: nn.ModuleList, strategy: str, world: World, device: str) -> nn.Module:
    """What to call instead of `module` so that its gradients become means over all processes.

    "ddp" keeps all parameters in every process; "fsdp" shards those of each of the `layers`, and all others together,
    in place (torch.distributed.fsdp.fully_shard).
    """
    if world.size == 1:
        return module
    if strategy == "ddp":
        return DistributedDataParallel(module, device_ids=[torch.cuda.current_device()] if device == "cuda" else None)
    mesh = torch.distributed.init_device_mesh(device, (world.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def gradient_sync(module: nn.Module, now: bool) -> AbstractContextManager:
    """A context for forward and backward; unless `now`, DDP keeps a process's gradients for a later exchange.

    FSDP exchanges them every time, since whole gradients may not fit.
    """
    return nullcontext() if now or not isinstance(module, DistributedDataParallel) else module.no_sync()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, values: Tensor) -> None:
    """Writes whole `values` into a tensor that may be sharded, each process its own part."""
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
    """Puts whole tensors, as `optimizer_tensors` names them, into an optimizer that has not made a step yet."""
    parameters = dict(model.named_parameters())
    for slot_name, values in tensors.items():
        name, _, slot = slot_name.rpartition("/")
        parameter = parameters[name]
        if slot == "step":  # one number, beside the weights because AdamW is fused
            optimizer.state[parameter][slot] = values.to(parameter.device)
        else:
            optimizer.state[parameter][slot] = torch.empty_like(parameter, requires_grad=False)
            fill(optimizer.state[parameter][slot], values)


@contextmanager
def peers_explained(world: World) -> Iterator[None]:
    """DataError instead of a library's traceback where another process ended and this one cannot go on."""
    try:
        yield
    except (DistBackendError, DistError) as error:
        raise _peer_gone(world) from error
    except RuntimeError as error:
        if world.size > 1 and any(word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL")):
            raise _peer_gone(world) from error
        raise


def _peer_gone(world: World) -> DataError:
    return DataError(
        f"Process {world.rank} of {world.size} cannot go on, since another one ended; its message says why. Give the "
        "same command to go on from the last checkpoint (torchrun --max-restarts does so by itself)."
    )
