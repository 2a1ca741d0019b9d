"""Several processes that train one model: who they are, what each takes, and what they tell one another.

    torchrun --standalone --nproc-per-node 8 $(which wkv) train ...

Every process reads the same global batch and takes its part of it. Losses and gradients are divided by the
number of targets of the whole batch before they are summed, so the result does not depend on how many
processes there are, nor on how the targets are spread. Models know nothing of any of this.

    replicate   every process has all weights, and a share of the rows
    shard       besides, weights, gradients and optimizer are divided among the processes (FSDP2): a block's
                weights are put together when it is computed, and let go of afterwards
    context     every process has all weights, and a share of each row's tokens (context_parallel.py)

Numbers and texts travel between CPUs over gloo; tensors on a GPU over NCCL.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import errors
from ..errors import ConfigError, Error
from ..models import RWKV
from ..state import State
from .config import TrainConfig
from .data.batches import Batch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# How long a process waits for the others: longer than rank 0 may take to write a checkpoint.
TIMEOUT = timedelta(minutes=30)

_BUCKET = 2**24  # numbers that are summed in one message

# What gloo says when the other end is gone; NCCL's errors have a type of their own.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")


def own_device(name: str) -> str:
    """What "cuda" stands for in this process: under torchrun, each has a GPU of its own."""
    if name == "cuda" and dist.is_available() and dist.is_torchelastic_launched():
        return f"cuda:{dist.get_node_local_rank()}"
    return name


def join(device: torch.device, *, divides: Literal["rows", "tokens"] = "rows") -> Group:
    """The processes that torchrun started, this one among them; without torchrun, this one alone.

    device   where the model of this process is
    divides  what each process gets of a batch: some rows, or some tokens of every row

    A group that the program has made with torch.distributed.init_process_group is used as it is.
    """
    if not (dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())):
        return Group(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)
    return Group(device, dist.get_rank(), dist.get_world_size(), divides)


class Group:
    """The processes of a run. One alone sends nothing, and each method is then what it would be without it.

    All processes must call the same methods in the same order.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        divides: Literal["rows", "tokens"] = "rows",
    ) -> None:
        self.device, self.rank, self.size, self.divides = device, rank, size, divides

    @property
    def is_writer(self) -> bool:
        """Whether this process has the run's folder, and tells the callbacks."""
        return self.rank == 0

    # What each takes

    def check(self, batch_size: int, context: int) -> None:
        """ConfigError for batches that cannot be divided among so many."""
        if self.divides == "rows" and batch_size % self.size:
            raise ConfigError(
                f"batch_size is {batch_size}, of {self.size} processes", "a multiple of their number"
            )
        if self.divides == "tokens" and context < self.size:
            raise ConfigError(f"context is {context}, of {self.size} processes", "a token for each")

    def part(self, batch: Batch) -> Batch:
        """This process's part of a batch."""
        B, T = batch.tokens.shape
        mine = (self._mine(B), slice(T)) if self.divides == "rows" else (slice(B), self._mine(T))
        starts = None if batch.starts is None else batch.starts[mine]
        return batch._replace(tokens=batch.tokens[mine], targets=batch.targets[mine], starts=starts)

    def state_of_part(self, state: State) -> State:
        """What belongs to this process's part of the next batch, of the state before all its rows."""
        return state if self.divides == "tokens" else state[self._mine(state.batch_size)]

    def state_after(self, state: State) -> State:
        """The same of the state after the batch at hand, out of the states after everybody's part of it."""
        if self.divides == "tokens" and self.size > 1:  # the last process has read the rows to their ends
            state = state.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
            for tensor in state.tensors().values():
                dist.broadcast(tensor, self.size - 1)
        return state

    def collect_state(self, state: State) -> dict[str, Tensor]:
        """The tensors of the state of all rows, for rank 0; nothing for the others."""
        whole = {}
        for name, mine in state.tensors().items():
            if self.divides == "rows" and self.size > 1:
                mine = mine.contiguous()
                parts = [torch.empty_like(mine) for _ in range(self.size)]
                dist.all_gather(parts, mine)
                mine = torch.cat(parts)
            if self.is_writer:
                whole[name] = mine
        return whole

    def _mine(self, n: int) -> slice:
        """All parts together are all n, in order."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    # Numbers and decisions

    def sum(self, value: float) -> float:
        """The sum over all processes: the same number, to the last bit, for each."""
        return value if self.size == 1 else float(self._of_all(value).sum())

    def first(self, value: float) -> float:
        """What rank 0 has."""
        return value if self.size == 1 else float(self._of_all(value)[0])

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set anywhere."""
        if self.size == 1:
            return list(flags)
        anywhere = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return anywhere.bool().tolist()

    def on_writer(self, action: Callable[[], Any]) -> Any:
        """Let rank 0 do something; everybody gets the result (plain data), or the Error that it raised."""
        if self.size == 1:
            return action()
        error, answer = None, {}
        if self.is_writer:
            try:
                answer = {"result": action()}
            except Error as caught:
                error = caught
                answer = {"error": [type(error).__name__, error.got, error.expected, error.advice]}
        answer = json.loads(self._from_writer(json.dumps(answer).encode()))
        if error is not None:
            raise error
        if "error" in answer:
            kind, *texts = answer["error"]
            raise getattr(errors, kind, Error)(*texts)
        return answer["result"]

    def _of_all(self, value: float) -> Tensor:
        """(size,) float64."""
        mine = torch.tensor([value], dtype=torch.float64)
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine)
        return torch.cat(everyones)

    def _from_writer(self, content: bytes) -> bytes:
        size = torch.tensor(len(content))
        dist.broadcast(size, 0)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_writer:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return data.numpy().tobytes()

    # Tensors

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Let every process have the sum of all gradients; those of sharded weights are summed already."""
        weights = [weight for weight in weights if weight.requires_grad and not is_sharded(weight)]
        if self.size == 1 or not weights:
            return
        # Rows without a fresh start give no gradient to what is learnt of one.
        used = self.any([weight.grad is not None for weight in weights])
        bucket: list[Tensor] = []
        for weight, is_used in zip(weights, used, strict=True):
            if is_used:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                bucket.append(weight.grad)
            if sum(map(Tensor.numel, bucket)) >= _BUCKET:
                _sum(bucket)
                bucket = []
        _sum(bucket)

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors by name for rank 0, on its CPU where they were sharded; nothing for the others."""
        whole = {}
        for name, tensor in tensors:
            if is_sharded(tensor):
                full = tensor.full_tensor()
                tensor = full.cpu() if self.is_writer else full
            if self.is_writer:
                whole[name] = tensor
        return whole

    def spread(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that rank 0 has, one after another, for everybody; of the others they are ignored."""
        if self.size == 1:
            yield from tensors.items()
            return
        described = self.on_writer(
            lambda: [
                (name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in tensors.items()
            ]
        )
        for name, dtype, shape in described:
            if self.is_writer:
                whole = tensors[name].detach().to(self.device).contiguous()
            else:
                whole = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            dist.broadcast(whole, 0)
            yield name, whole

    # The end of a process

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Where another process is gone, say so instead of what the network said."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (
                isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)
            ):
                raise
            raise Error(
                f"process {self.rank} of {self.size} cannot go on: another one has ended or does not answer",
                "all of them, to the end",
                "the message of the one that ended first; then the same command, which goes on from the last "
                "checkpoint",
            ) from error


# The sharding plan


def prepare(model: RWKV, group: Group, config: TrainConfig) -> None:
    """Give every process the weights of rank 0 and, if wanted, let each keep only its part of them.

    Where config.parallel is "shard", all parameters become DTensors: a unit for each block, and one for the
    embedding, the last norm and the head together, which stays whole from forward to backward. With
    config.shard_over below the number of processes there are several copies (hybrid sharding), and between
    them only the sums of sharded gradients travel. One process alone shards nothing.

    ConfigError for what cannot be sharded, or not over so many processes.
    """
    if group.size == 1:
        return
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, whole in group.spread(weights):
            weights[name].copy_(whole)
    if config.parallel != "shard":
        return
    if getattr(model.config, "time_state", False):
        raise ConfigError("a learned initial state is not sharded", "parallel = 'replicate'")
    if config.compile:
        raise ConfigError("compile together with parallel = 'shard'", "one of the two")
    over = config.shard_over or group.size
    if group.size % over:
        raise ConfigError(f"shard_over is {over}, of {group.size} processes", "a divisor of their number")

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if over == group.size:
        mesh = init_device_mesh(group.device.type, (over,), mesh_dim_names=("shard",))
    else:
        shape = (group.size // over, over)
        mesh = init_device_mesh(group.device.type, shape, mesh_dim_names=("copies", "shard"))
    # It warns of views among a block's results, as the newest token's vector is: of changing them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # FSDP2 divides rows, also where columns would be faster
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums, not means: see the top of this file
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def settle(model: nn.Module) -> None:
    """Let go of the whole weights that a forward without a backward has left behind."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor: told without importing them, which takes a second."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy `whole`, or what this process holds of it, into `tensor`."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        # Everybody has `whole`: nothing needs to be sent.
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all gradients together, sharded or not."""
    total = nn.utils.get_total_norm(gradients)
    return float(total.full_tensor() if is_sharded(total) else total)


def _sum(gradients: Sequence[Tensor]) -> None:
    """Sum over all processes, in place and in one message. They have one dtype."""
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))
