"""Expert shelves: an actor per node that keeps experts in that node's part of Ray's object store, for other nodes.

Ray's side of the REMOTE tier, with every `.remote` of it: starting, ending, finding and asking shelves. What a shelf
keeps is decided in cluster/placement/shelf_plan.py; who takes from it is actors/experts/memory/shelves.py.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.experts.memory.shelves import RemoteReadError, ShelfFacts, form_digest
from actors.ray_shells.named_actors import ActorKind, DetachedActors
from cluster.application import ApplicationId
from cluster.config.load import MoesaicConfig
from cluster.config.sizes import parse_cache_size
from cluster.deployed_spec import DeployedSpec
from cluster.errors import MoesaicError
from cluster.logs import configure_logging, log_event
from cluster.model.info import read_model_info
from cluster.node_memory.leases import MemoryLease
from cluster.placement.shelf_plan import choose_shelf_nodes, shelf_room, shelf_share
from cluster.stats.activation_counts import Counts
from cluster.stats.open_store import open_store

if TYPE_CHECKING:
    from actors.weights.slots import SlotForm

_LOG = logging.getLogger(__name__)
_CALL_TIMEOUT_S = 5.0
_LISTING_TIMEOUT_S = 30.0  # tens of thousands of references
_THREADS = 4


class ExpertShelfActor:
    """Ray actor that reads its share of the experts from its copy of the checkpoint, in the form arenas hold them."""

    def __init__(self, spec: DeployedSpec, shelf: int, num_shelves: int) -> None:
        configure_logging()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._spec, self._config = spec, spec.config
        self._place = (shelf, num_shelves)
        self._info = read_model_info(self._config.model)  # who takes from it compares
        self._shelf_id = secrets.token_hex(6)
        self._node_id: str = ray.get_runtime_context().get_node_id()
        self._held: list[tuple[int, ray.ObjectRef]] = []  # grows only
        self._form: str | None = None
        self._problem: str | None = None
        self._lease = MemoryLease(f"shelf {self._shelf_id}", is_shared=True)  # as long as this process lives
        self._lease.settle()
        self._thread = threading.Thread(target=self._fill, name="fill", daemon=True)
        self._thread.start()

    def facts(self) -> ShelfFacts:
        """What this shelf says of itself."""
        is_complete = not self._thread.is_alive()  # first: what is held afterwards is all there will be
        return ShelfFacts(
            shelf_id=self._shelf_id,
            node_id=self._node_id,
            fingerprint=self._info.fingerprint,
            form=self._form,
            num_held=len(self._held),
            is_complete=is_complete,
            problem=self._problem,
        )

    def listing(self, shelf_id: str, since: int) -> list[tuple[int, ray.ObjectRef]] | None:
        """What was taken in after the first `since` experts; None if the caller means a shelf that is gone."""
        return self._held[since:] if shelf_id == self._shelf_id else None

    def stop(self) -> None:
        """There is nothing to put in order: what it holds goes with it."""

    def _fill(self) -> None:
        try:
            self._take_in()
        except MoesaicError as error:
            self._problem = f"expert shelf on node {self._node_id}: {error.message}"
        except Exception as error:  # noqa: BLE001 - transformers and Ray raise anything; status has to name it
            log_event(_LOG, logging.ERROR, "filling the expert shelf failed", error=error)
            self._problem = f"expert shelf on node {self._node_id} holds {len(self._held)} experts, then: {error!r}"

    def _take_in(self) -> None:
        from actors.experts.memory.arena import RamArena
        from actors.experts.memory.disk import DiskLink
        from actors.model.checkpoint import load_model
        from actors.weights.formats.base import TORCH_DTYPES
        from actors.weights.reader import ExpertReader
        from actors.weights.slots import SlotForm

        loaded = load_model(self._info, self._config.model.dtype, dense=False)
        layout = loaded.layout
        stored = TORCH_DTYPES[layout.stored_dtype]
        form = SlotForm(layout, stored if stored.itemsize <= loaded.dtype.itemsize else loaded.dtype)
        shelf, num_shelves = self._place
        experts = shelf_share(
            layout.layers,
            layout.num_experts,
            shelf=shelf,
            num_shelves=num_shelves,
            capacity=self._capacity(form),
            counts=self._counts(),
        )
        self._form = form_digest(form)
        self._lease.book("experts.remote_tier", len(experts) * form.slot_bytes)
        arena = RamArena(1, form.slot_bytes)
        files = {part.file for expert in layout.experts.values() for part in expert.parts}
        reader = ExpertReader(files, direct_io=self._config.experts.direct_io == "auto")
        with contextlib.closing(DiskLink(reader, form, arena)) as disk:
            for expert in experts:
                index = form.grid.flat(expert)
                for chunk in range(disk.num_chunks(index)):
                    disk.copy_chunk(index, chunk, 0)
                self._held.append((index, ray.put(np.frombuffer(arena.view(0), dtype=np.uint8))))

    def _capacity(self, form: SlotForm) -> int:
        """Experts to keep: what is configured, or what this node's object store takes without going to disk."""
        asked = parse_cache_size(self._config.experts.remote_tier, total_bytes=form.model_bytes)
        dealt = -(-form.grid.size // self._place[1])  # the other shelves keep the others
        wanted = min(asked, dealt * form.slot_bytes)
        own = [node["Resources"] for node in ray.nodes() if node["NodeID"] == self._node_id]
        room = shelf_room(wanted, int(own[0].get("object_store_memory", 0)) if own else 0)
        if room < wanted:
            self._problem = (
                f"expert shelf on node {self._node_id}: experts.remote_tier asks for {wanted} bytes, Ray's object "
                f"store there takes {room}; start that node with a larger --object-store-memory"
            )
        return room // form.slot_bytes

    def _counts(self) -> Counts:
        """Activations since ever; nothing when the store is away: any order will do."""
        with contextlib.suppress(ConnectionError):
            return open_store(self._spec.redis_url, self._spec.application).activations(self._info.fingerprint)
        return {}


def start_shelves(spec: DeployedSpec) -> tuple[str, ...]:
    """Start the configured shelves, each in the place of one of another deployment; end all others; at once.

    Returns:
        Ids of the nodes that have one.
    """
    config = spec.config
    wanted = parse_cache_size(config.experts.remote_tier, total_bytes=2**40) > 0
    nodes = _shelf_nodes(config) if wanted else ()
    shelves = expert_shelves(spec.application)
    digests = {
        node: spec.digest("experts", store=True, place=f"shelf {number} of {len(nodes)}")
        for number, node in enumerate(nodes)
    }
    shelves.keep_only(digests)
    for number, node in enumerate(nodes):
        shelves.start(
            ExpertShelfActor,
            node,
            digests[node],
            spec,
            number,
            len(nodes),
            max_concurrency=_THREADS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
    return nodes


def expert_shelves(application: ApplicationId) -> DetachedActors:
    """The shelves of an application; their keys are the ids of their nodes."""
    return DetachedActors(application, ActorKind.SHELF)


class RayShelves:
    """The shelves of a cluster, as ShelfLink asks them; from plain threads, never from an event loop.

    Nothing is asked of Ray once this process has left it: Ray would start a cluster of its own to answer.
    """

    def __init__(self, application: ApplicationId) -> None:
        self._shelves = expert_shelves(application)

    def facts(self) -> Sequence[ShelfFacts]:
        if not ray.is_initialized():
            return ()
        try:
            calls: list[ray.ObjectRef] = [actor.facts.remote() for _, actor in self._shelves.find_all()]
            ready = ray.wait(calls, num_returns=len(calls), timeout=_CALL_TIMEOUT_S)[0] if calls else []
        except RayError:
            return ()
        answers: list[ShelfFacts] = []
        for call in ready:
            with contextlib.suppress(RayError):  # its node is gone
                answers.append(ray.get(call))
        return answers

    def listing(self, shelf: ShelfFacts, since: int) -> Sequence[tuple[int, object]]:
        try:
            actor: Any = self._shelves.find(shelf.node_id)
            answer: Any = ray.get(actor.listing.remote(shelf.shelf_id, since), timeout=_LISTING_TIMEOUT_S)
        except (ValueError, RayError) as error:
            raise RemoteReadError(f"expert shelf on node {shelf.node_id}: {type(error).__name__}") from error
        return answer or ()

    def fetch(self, handle: object, timeout_s: float) -> np.ndarray:
        assert isinstance(handle, ray.ObjectRef)
        if not ray.is_initialized():
            raise RemoteReadError("this process has left the Ray cluster")
        try:
            return ray.get(handle, timeout=timeout_s)
        except RayError as error:
            raise RemoteReadError(
                f"an expert in another node's memory did not come ({type(error).__name__}; deadline {timeout_s:g} s)"
            ) from error


def _shelf_nodes(config: MoesaicConfig) -> tuple[str, ...]:
    computing = [config.ray.worker_resources]
    if config.experts.hosts:
        computing.append(config.ray.host_resources)
    return choose_shelf_nodes({node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}, computing)
