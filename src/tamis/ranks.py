"""What a rank has of the model and of the work, where there are several: with FSDP2 a shard of every parameter."""

from collections.abc import Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

Item = TypeVar("Item")


class BrokenForwardError(RuntimeError):
    """A forward of all ranks has broken off on this one, so that the others cannot end theirs: the run is over.

    They are told by the end of this process, as soon as their backend or the launcher notices it.
    """

    def __init__(self, error: Exception):
        super().__init__(
            f"rank {PartialState().process_index}: a forward of all ranks broke off ({type(error).__name__}: {error}). "
            "Go on from the last checkpoint with `resume_from_checkpoint='last'`; if memory has run out, lower "
            "`generation_batch_size`"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward is one of all ranks, as they have the parameters together (FSDP2)."""
    return isinstance(model, FSDPModule)


def share(items: Sequence[Item], rank: int, num_ranks: int) -> list[Item]:
    """What one rank takes of work that is shared out: as many items on each, the last one on several if need be.

    A rank without work would leave the others waiting for it, where every forward is one of all ranks.
    """
    num_each = -(-len(items) // num_ranks)
    return [items[min(k * num_ranks + rank, len(items) - 1)] for k in range(num_each)]


def agreed(failure: str) -> str:
    """The failure of this rank, or else that of another one, which is named; empty if there is none on any.

    Called on all ranks, so that none waits for one that has failed.
    """
    state = PartialState()
    if state.num_processes == 1:
        return failure
    failures = gather_object([failure])
    return failure or next((f"rank {rank}: {other}" for rank, other in enumerate(failures) if other), "")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters; of a sharded model the shards, not what a forward has gathered and may have left there."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else the next forward would not see what is written to a shard
    return dict(model.named_parameters())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `named_parameters` that are trained."""
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}


def local(parameter: Tensor) -> Tensor:
    """What this rank has of a parameter; what is written to it is written to the parameter."""
    tensor = parameter.data
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(parameter: Tensor) -> Tensor:
    """A parameter of which each rank may have a shard; called on all of them."""
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part_of(value: Tensor, parameter: Tensor) -> Tensor:
    """What this rank has of a whole value, where it has a shard of the parameter; a copy."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    placed = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return placed.to_local().to("cpu", copy=True)
