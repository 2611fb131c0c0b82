"""
The router of requests to replicas, which Ray makes in each handle.

Ray copies this module by value to wherever there is a handle: nothing is kept in its
globals.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from ray.serve.request_router import RequestRouter

from whispercache.planning.routing import (
    CALL_S,
    RELUCTANCE,
    Replica,
    order,
    pooled,
)

if TYPE_CHECKING:
    from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

# Seconds between two looks at what replicas have in memory. Ray's control loop, which
# takes them, turns each 0.1 s.
STATS_S = 0.2

# For as long a model is taken to be where it was just sent: until the replica says so.
_TRUST_S = 10 * STATS_S

# Seconds in which a replica says that it has a request; after more, others come first.
_ACCEPTS_S = 5.0

# For as long they do. Then Ray knows if the replica is dead, or it is tried again.
_SHUNNED_S = 60.0


class ModelRouter(RequestRouter):
    """
    Sends a request where it will begin soonest, by `whispercache.planning.routing`.

    One that does not take what is sent to it comes last, and so does one that a request
    calls *lost*.

    Replicas tell their capacity and the bytes of all models once
    (``record_replica_metadata``), and what is in memory each `STATS_S`
    (``record_routing_stats``).
    """

    def initialize_state(self, *, reluctance: float = RELUCTANCE) -> None:
        """
        Begins with no memory of its own; *reluctance* is the rule's.
        """
        self._reluctance = reluctance
        # Until when a model is taken to be on a replica, since it was sent there.
        self._sent: dict[tuple[ReplicaID, str], float] = {}
        # The requests of this router that a replica has, with their models.
        self._ongoing: dict[ReplicaID, dict[str, str]] = {}
        # By request: the replica that should have it, and has not said so, and since
        # when.
        self._unheard: dict[str, tuple[ReplicaID, float]] = {}
        # By request: the replica that it is about to be sent to, its model, and until
        # when that counts. Of two at once, the second one's choice knows of the first.
        self._coming: dict[str, tuple[ReplicaID, str, float]] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """
        Returns the replicas for a request, the best first.
        """
        if pending_request is None:
            return [candidate_replicas]
        # Otherwise replicas that are all full would be asked again without a pause.
        pending_request.routing_context.should_backoff = True
        now_s = time.monotonic()
        lost = pending_request.kwargs.get("lost")
        for each in candidate_replicas:
            if each.replica_id.unique_id == lost:
                self._unheard[lost] = each.replica_id, now_s - _ACCEPTS_S
        metadata = pending_request.metadata
        model = metadata.multiplexed_model_id
        # Its own last choice is no queue before it.
        self._coming.pop(metadata.internal_request_id, None)
        silent = self._silent(now_s)
        ranks = [
            [each for each in rank if each.replica_id not in silent]
            for rank in self._ranks(candidate_replicas, model, now_s)
        ]
        last = [[each] for each in candidate_replicas if each.replica_id in silent]
        ranks = [*filter(None, ranks), *last]
        if ranks and model:
            # Before the replica says so, which may take it a while: for the next one.
            best = ranks[0][0].replica_id
            self._expect(best, model)
            self._unheard.setdefault(metadata.internal_request_id, (best, now_s))
            coming = best, model, now_s + _ACCEPTS_S
            self._coming[metadata.internal_request_id] = coming
        return ranks

    def _ranks(
        self, candidate_replicas: list[RunningReplica], model: str, now_s: float
    ) -> list[list[RunningReplica]]:
        if not model:  # a question that any can answer
            return [candidate_replicas]
        self._sent = {key: at_s for key, at_s in self._sent.items() if at_s > now_s}
        self._coming = {key: it for key, it in self._coming.items() if it[2] > now_s}
        found = {each.replica_id.unique_id: each for each in candidate_replicas}
        known = [self._known(each) for each in candidate_replicas]
        ordered = order(model, pooled(known), self._reluctance)
        # Ranks of one: within a rank, Ray takes the shortest queue.
        return [[found[each.name]] for each in ordered]

    def _silent(self, now_s: float) -> set[ReplicaID]:
        """
        Returns the replicas that have not said for long that they have a request.
        """
        self._unheard = {
            request_id: (replica_id, since_s)
            for request_id, (replica_id, since_s) in self._unheard.items()
            if now_s < since_s + _SHUNNED_S
        }
        return {
            replica_id
            for replica_id, since_s in self._unheard.values()
            if now_s >= since_s + _ACCEPTS_S
        }

    def _expect(self, replica_id: ReplicaID, model: str) -> None:
        self._sent[replica_id, model] = time.monotonic() + _TRUST_S

    def _known(self, replica: RunningReplica) -> Replica:
        """
        Returns what is known of a replica: what it told, and what was sent to it since.
        """
        told: dict[str, Any] = replica.routing_stats
        fixed: dict[str, Any] = replica.replica_metadata
        resident: dict[str, tuple[str, int]] = told.get("resident", {})
        places = {name: device for name, (device, _) in resident.items()}
        sizes = {name: n_bytes for name, (_, n_bytes) in resident.items()}
        capacity: dict[str, int] = fixed.get("capacity", {})
        rid = replica.replica_id
        queued = Counter(self._ongoing.get(rid, {}).values())
        queued.update(name for to, name, _ in self._coming.values() if to == rid)
        coming = {name for to, name in self._sent if to == rid}
        if capacity:
            # On the largest; which one it was, the replica will say.
            device = max(capacity, key=capacity.__getitem__)
            # One with requests is there or comes, however long ago they were sent.
            for name in (coming | set(queued)) - {""}:
                places.setdefault(name, device)
        # Ray's own count knows of others' requests, but is forgotten in a while.
        all_queued = self.replica_queue_len_cache.get(rid) or 0
        queued[""] += max(0, all_queued - queued.total())
        return Replica(
            rid.unique_id,
            capacity,
            resident=places,
            pinned=frozenset(told.get("pinned", ())),
            sizes={**fixed.get("sizes", {}), **sizes},
            load_s=told.get("load_s", {}),
            calls_s=told.get("calls_s", {}),
            call_s=told.get("call_s", CALL_S),
            parallel=fixed.get("parallel", 1),
            queued=queued,
        )

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: object,  # noqa: ARG002 - Ray's signature
    ) -> None:
        """
        Notes that a replica has accepted a request.
        """
        metadata = pending_request.metadata
        model = metadata.multiplexed_model_id
        self._coming.pop(metadata.internal_request_id, None)
        self._unheard.pop(metadata.internal_request_id, None)
        self._unheard = {
            request_id: unheard
            for request_id, unheard in self._unheard.items()
            if unheard[0] != replica_id
        }
        ongoing = self._ongoing.setdefault(replica_id, {})
        ongoing[metadata.internal_request_id] = model
        if model:
            self._expect(replica_id, model)

    def on_request_completed(
        self, replica_id: ReplicaID, internal_request_id: str
    ) -> None:
        """
        Notes that a request is over, or was never accepted.
        """
        self._coming.pop(internal_request_id, None)
        unheard = self._unheard.get(internal_request_id)
        if unheard is not None and time.monotonic() < unheard[1] + _ACCEPTS_S:
            # Its client has left. Later on, it waited in vain.
            del self._unheard[internal_request_id]
        ongoing = self._ongoing.get(replica_id, {})
        ongoing.pop(internal_request_id, None)
        if not ongoing:
            self._ongoing.pop(replica_id, None)
