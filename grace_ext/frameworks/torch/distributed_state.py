"""`DistributedState`: the state of compression for torch.distributed.checkpoint (DCP).

DCP assumes that a plain tensor is the same on all ranks: it writes the tensor of one rank, and all ranks load that one. Residuals differ
by rank, so here they are DTensors of shape [ranks, elements], of which every rank holds one row. State that all ranks share is a plain
tensor.

`dcp.load` calls `state_dict()` and reads into its tensors. So keys and sizes must be those of the checkpoint, even before the first step,
and whatever a policy has chosen since. They follow from the parameters alone: every array that a parameter's state can ever have is there,
at its largest size (Choices.lengths). A description, a JSON text, says how many elements are in use; the others are zero.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...checkpoints.resize import kinds, resized, told
from ...communicators.reduce_scatter import shards
from ...driver.choices import Choices
from ...driver.driver import Driver
from ...errors import GraceError, ParameterError, UnsupportedError, few
from ...parts.tensor import StepInfo, TensorSpec
from .ops import describe
from .transports import DistTransport, SingleTransport

LOG = logging.getLogger("grace_ext")
#: DCP compares keys and sizes before `load_state_dict` is called, and its error names the first key that does not fit. So the first keys
#: say what must be equal, and what to do.
DESCRIPTION = "state of {}"
RANKS = "ranks (if another number of ranks saved this checkpoint, pass that number to DistributedState as ranks=)"
NODE = "node"  # tells the nodes apart with 'hierarchical'
DCP = "torch.distributed.checkpoint"
LOST = (
    "%s: torch.distributed.checkpoint saves and loads this optimizer without the memory of compression, which differs by rank. Make "
    "memory = hvd.DistributedState(optimizer) first, and pass {'grace_ext': memory, ...} to dcp.save and dcp.load; or call grace_ext.save "
    "and grace_ext.load as well"
)

_kept: WeakSet[Driver] = WeakSet()  # the drivers whose state a DistributedState keeps
_warned: WeakSet[Driver] = WeakSet()


class _Array(NamedTuple):
    """An array of the layout: its largest number of elements on a rank, the elements of its parameter, and its kind (resize.kinds)."""

    elements: int
    whole: int
    kind: str

    @property
    def same(self) -> bool:
        """Whether all ranks have the same array."""
        return self.kind in ("shared", "derived")

    def used(self, elements: int, ranks: int, rank: int) -> int:
        """Returns the elements in use on this rank. elements: those that the description has."""
        return len(range(elements)[shards(elements, ranks)[rank]]) if self.kind == "sharded" else elements


class _ForLoading:
    """Stands where `dcp.load` puts the description of another number of ranks. `dcp.save` cannot write it."""

    def __reduce__(self) -> NoReturn:
        raise GraceError("DistributedState(..., ranks=n) loads a checkpoint of n other ranks; to save, make one without ranks=")


class DistributedState:
    """Gives the state of compression to torch.distributed.checkpoint, so that every rank gets its own back:

        memory = hvd.DistributedState(optimizer)
        dcp.save({"grace_ext": memory, **others}, checkpoint_id=folder)
        dcp.load({"grace_ext": memory, **others}, checkpoint_id=folder)

    kept: a DistributedOptimizer, or the state of `ddp_comm_hook`.
    ranks: how many ranks saved the checkpoint, to load one of another number of ranks. Each rank then reads the state of all of them, and
      gets what `grace_ext.load(..., resize='mean')` would give it. Saving with another number of ranks raises an error.

    Every rank calls `dcp.save` or `dcp.load`, between two steps; a rank outside the optimizer's process set saves and loads nothing. The
    state is a copy, so `dcp.async_save` may write it while training continues. Before the first step, zeros are saved. On the same number
    of ranks training resumes bit for bit.
    Raises UnsupportedError for LocalSGD, and for an exchange over Horovod. If the checkpoint has another spec, other parameters or another
    number of ranks, `dcp.load` raises its CheckpointException on all ranks, and nothing has changed.
    """

    def __init__(self, kept: Any, ranks: int | None = None):
        if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
            raise ParameterError(f"ranks must be the number of ranks that saved the checkpoint, at least 1, got {ranks!r}")
        exchange = getattr(kept, "_exchange", None)
        parameters = getattr(kept, "_parameters", None) if exchange is None else exchange.parameters
        if parameters is None or not hasattr(kept, "_drivers"):
            raise UnsupportedError(
                f"DistributedState takes a DistributedOptimizer or the state of ddp_comm_hook, got {type(kept).__name__}. (With LocalSGD "
                f"each rank has its own model and momenta, which {DCP} would lose, too: use grace_ext.save, and save every rank's model)"
            )
        self._of, self._parameters, self._ranks = kept, parameters, ranks
        _kept.update(kept._drivers())

    # --- the Stateful protocol --------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Returns the description, this rank's arrays as [ranks, elements] DTensors, and those that all ranks share as plain tensors. For
        another number of ranks it returns zeros, which `dcp.load` replaces."""
        driver = self._driver()
        if driver is None:
            return {}
        saved, ranks = driver.state_dict(), self._ranks or driver.transport.size
        here, layout = ranks == driver.transport.size, self._layout(driver, ranks)
        ops: Any = driver.ops
        state = {key: ops.as_torch(array) for key, array in saved.pop("state").items()}
        odd = [key for key, array in state.items() if key not in layout or array.dtype != torch.float32]
        if odd:
            raise GraceError(f"{odd[0]!r} is not a float32 array of one of the parameters; use grace_ext.save")
        node, _ = saved.pop("node", None), saved.pop("rank")
        saved["elements"] = {key: layout[key].whole if layout[key].kind == "sharded" else len(array) for key, array in state.items()}

        def placed(row: torch.Tensor) -> torch.Tensor:
            return self._spread(driver, row) if here else torch.zeros(ranks, len(row), dtype=row.dtype)

        made: dict[str, Any] = {DESCRIPTION.format(driver.grace): json.dumps(saved) if here else _ForLoading(), RANKS: torch.zeros(ranks)}
        if node is not None:
            made[NODE] = placed(torch.tensor(list(node.encode()), dtype=torch.uint8))
        for key, array in layout.items():
            row = torch.zeros(array.elements, device=self._device)
            if key in state:
                row[: len(state[key])] = state[key]
            made[key] = row if array.same else placed(row)
        return made

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the result of `state_dict` after `dcp.load` has read into it. Raises GraceError, on all ranks alike, if it does not fit."""
        driver, saveable = self._driver(), self._of._saveable()
        if driver is None:
            if saveable.ranks:  # one rank without simulate=True: the log tells that the memory is lost
                saveable.write([{}])
            return
        about = state_dict.get(DESCRIPTION.format(driver.grace))
        if not isinstance(about, str):
            raise GraceError(f"this state was not read by {DCP}; pass the DistributedState itself to dcp.load")
        about = json.loads(about)
        elements, size, rank = about.pop("elements"), about["size"], driver.transport.rank
        layout = self._layout(driver, size)
        unknown = [key for key in elements if key not in layout]
        if unknown:
            raise GraceError(f"the checkpoint has state that no parameter here has: {few(unknown)}; load it into the model that saved it")
        states: list[dict[str, Any]] = []
        for one in [rank] if size == driver.transport.size else range(size):
            state = {}
            for key, count in elements.items():
                row = state_dict[key] if layout[key].same else _row(state_dict[key], one)
                state[key] = row[: layout[key].used(count, size, one)].cpu().numpy()
            node = {"node": bytes(_row(state_dict[NODE], one).tolist()).decode()} if NODE in state_dict else {}
            states.append({**about, **node, "rank": one, "state": state})
        if size != driver.transport.size:
            after = resized(states, driver.transport.size, "mean")
            sentence = told(states, after, "mean")
            if rank == 0:
                LOG.warning(sentence)
            states = [after[rank]]
        saveable.write(states)

    # --- layout -----------------------------------------------------------------------------------------------------
    def _driver(self) -> Driver | None:
        """Returns the driver; None if this rank exchanges nothing."""
        self._of._saveable()  # the hook of DDP makes its driver at first use
        drivers: list[Driver] = self._of._drivers()
        if drivers and not isinstance(drivers[0].transport, (DistTransport, SingleTransport)):
            raise UnsupportedError(f"this exchange runs over Horovod, and {DCP} needs torch.distributed; use grace_ext.save")
        return drivers[0] if drivers else None

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _layout(self, driver: Driver, ranks: int) -> dict[str, _Array]:
        """Returns, by 'key/parameter', every array that the state can have among this many ranks."""
        trained = {name: TensorSpec(name, *describe(p)) for name, p in self._parameters.items() if p.requires_grad}
        specs = {**trained, **driver.specs}
        choices, kind_of = Choices(driver.grace, specs.values()), kinds(driver.grace)
        info = StepInfo(0, ranks - 1, ranks, ranks, driver.grace.seed)  # the last rank's shard is the longest
        found = {}
        for name, spec in specs.items():
            for key, lengths in choices.lengths(driver.ops, spec, info).items() if spec.size else ():
                found[f"{key}/{name}"] = _Array(max(lengths), spec.size, kind_of.get(key, "own"))
        return found

    def _spread(self, driver: Driver, row: torch.Tensor) -> torch.Tensor:
        """Returns the tensor of all ranks' rows."""
        if isinstance(driver.transport, SingleTransport):
            return row[None]
        assert isinstance(driver.transport, DistTransport)
        group: Any = driver.transport._group or dist.group.WORLD
        mesh = DeviceMesh.from_group(group, row.device.type)
        shape = torch.Size((driver.transport.size, len(row)))
        return DTensor.from_local(row[None], mesh, [Shard(0)], run_check=False, shape=shape, stride=(len(row), 1))


def _row(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Returns this rank's row. Of a DTensor every rank holds only its own."""
    return rows.to_local()[0] if isinstance(rows, DTensor) else rows[rank]


# --- what is given to DCP without DistributedState ----------------------------------------------------------------------
def called_by_dcp() -> str | None:
    """Returns the user's file and line if this call comes from a function of torch.distributed.checkpoint, else None."""
    inside, where = False, ""
    for frame, line in traceback.walk_stack(None):
        name = frame.f_globals.get("__name__", "")
        if name.startswith(DCP):
            inside, where = True, ""  # it may be called from further inside, too
        elif inside and not where and not name.startswith("torch."):
            where = f"{frame.f_code.co_filename}:{line}"
    return where if inside else None


def left_out(optimizer: Any) -> bool:
    """Whether DCP reads this optimizer's state, so that its memory must be left out: DCP would give one rank's to all. Rank 0 warns once if
    there is no DistributedState of the optimizer."""
    where, driver = called_by_dcp(), optimizer._drivers()[0]
    if where is not None and driver not in _kept and driver not in _warned:
        _warned.add(driver)
        # Not by a warning: if warnings are errors, rank 0 alone would raise, and the others would wait for it.
        if driver.transport.rank == 0:
            LOG.warning(LOST, where)
    return where is not None


def refuse_dcp(what: str, instead: str) -> None:
    """Raises UnsupportedError if DCP reads the state of `what`, which it would lose."""
    where = called_by_dcp()
    if where is not None:
        raise UnsupportedError(f"{where}: {DCP} writes one rank's arrays for all, and {what} differs by rank; {instead}")
