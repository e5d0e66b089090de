"""Several processes as one run: torchrun's world, gradients averaged (DDP) or weights sharded (FSDP2)"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from hartist.errors import UserError

Value = TypeVar("Value")
Strategy = Literal["ddp", "fsdp"]

PATIENCE = timedelta(hours=12)
"""How long ranks wait for one that encodes a dataset. Of a rank that dies torchrun tells them at once."""


@dataclass(frozen=True)
class World:
    """The processes of this run. All methods are collective: every rank calls them, in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this rank writes logs, pictures and models."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Figures averaged over ranks; all ranks must have the same names."""
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        total = self.sum(torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device))
        return dict(zip(names, (total / self.size).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def broadcast(self, value: Value) -> Value:
        """The main rank's value, on all."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """The main rank's tensor, in place on all."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value by rank, on all ranks."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, items: list[Value]) -> list[Value]:
        """This rank's items, an equal run of them. Raises UserError if they can't be shared out equally."""
        if len(items) % self.size:
            raise UserError(
                f"{len(items)} micro-batches can't be shared by {self.size} processes equally; "
                "choose --batch-size and --micro-batch accordingly"
            )
        each = len(items) // self.size
        return items[self.rank * each : (self.rank + 1) * each]


@contextlib.contextmanager
def join_world(device: str = "cpu") -> Iterator[World]:
    """The world that torchrun describes in the environment, or a single process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=torch.device(device))
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    store, rank, size = next(rendezvous("env://"))
    # Workers that torchrun starts again find what those before them left in its store, and would wait for the dead.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()


class _Loss(nn.Module):
    """A part's loss as the forward pass of its network, which is where DDP and FSDP2 hook in."""

    def __init__(self, network: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, *arguments: Any) -> Any:
        return self.loss(*arguments)


class Parallel:
    """A network's loss, computed by all ranks together, with gradients averaged over them."""

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[..., Any],
        world: World,
        strategy: Strategy,
        *,
        units: list[nn.Module],
        bf16: bool,
    ) -> None:
        """`units` are the modules that FSDP2 gathers one at a time (the transformer's blocks)."""
        self.network, self.sharded = network, world.size > 1 and strategy == "fsdp"
        self.skeleton = copy.deepcopy(network).to("meta") if self.sharded else None
        self.loss: nn.Module = _Loss(network, loss)
        if self.sharded:
            _shard(self.loss, units, world, bf16)
        elif world.size > 1:
            # Steps differ in which weights they use (coarse steps leave the residual MLP alone).
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                self.loss = nn.parallel.DistributedDataParallel(
                    self.loss, broadcast_buffers=False, find_unused_parameters=True
                )

    def __call__(self, *arguments: Any) -> Any:
        return self.loss(*arguments)

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients of all but the last part of a step stay on their rank."""
        if self.sharded:
            self.loss.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif isinstance(self.loss, nn.parallel.DistributedDataParallel) and not last:
            with self.loss.no_sync():
                yield
        else:
            yield

    def whole(self) -> nn.Module:
        """The network with its present weights on this rank: itself, or gathered where it is sharded (collective)."""
        if self.skeleton is None:
            return self.network
        tensors = {name: gathered(tensor) for name, tensor in self.network.state_dict().items()}
        self.skeleton.load_state_dict(tensors, assign=True)
        return self.skeleton.requires_grad_(False).eval()


def _shard(loss: nn.Module, units: list[nn.Module], world: World, bf16: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing here works in place on outputs
    # Blocks are gathered in the type they compute in; what autocast keeps in float32 (head, losses, sums of a block's
    # parts) stays so, hence inputs are left as they are.
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=half if bf16 and world.device.type == "cuda" else MixedPrecisionPolicy())
    fully_shard(loss, mesh=mesh)


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, where ranks hold shards of it (collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
