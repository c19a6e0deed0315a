"""One driver for each run: a lease object, taken and renewed by compare-and-swap.

A lease has a generation that grows by one whenever it is taken; what drivers write carries it, and
readers ignore what an older generation wrote. The compare-and-swap decides who holds it, no clock:
a holder that cannot renew, since the store is away, goes on until it can ask; then either its
renewal wins or another holder is there. A clock, that of the one who waits, only says when a lease
may be asked for: after its time to live without a renewal, while the store answered.

Source of the scheme: C. Gray and D. Cheriton, "Leases", SOSP 1989; fencing by generation: M.
Kleppmann, "How to do distributed locking", 2016.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import tenacity

from cluster.process import ProcessIdentity, identify
from cluster.storage import PreconditionFailed, StorageError, Store, read_whole
from jobs.errors import ClusterError, Problem
from jobs.record import DAMAGED_RECORD_HINT, Lease

_RENEWALS_PER_TTL = 3
_LOOKS_PER_TTL = 20
_LONGEST_LOOK_SECONDS = 5.0
_TAKE_ATTEMPTS = 5
_WRITE_ATTEMPTS = 3

logger = logging.getLogger(__name__)


def acquire(
    store: Store,
    key: str,
    *,
    ttl_seconds: float,
    wait: bool | Callable[[Lease], None] = False,
) -> Held:
    """The lease at `key`, held and renewed in the background until it is released or lost.

    A lease that was released, or whose holder is a process of this machine that has ended, is
    taken at once. Another one is taken only if `wait` is given and nobody renews it for its time
    to live, by this machine's clock; a callback as `wait` is told once of the lease that is
    watched. Raises ClusterError where somebody else holds it.
    """
    retrying = tenacity.Retrying(
        # Another one was faster: what it wrote decides what comes next.
        retry=tenacity.retry_if_exception_type(PreconditionFailed),
        stop=tenacity.stop_after_attempt(_TAKE_ATTEMPTS),
        reraise=True,
    )
    return retrying(_take, store, key, ttl_seconds=ttl_seconds, wait=wait)


def _take(
    store: Store, key: str, *, ttl_seconds: float, wait: bool | Callable[[Lease], None]
) -> Held:
    found = read_lease(store, key)
    if found is not None and not _is_free(found.lease):
        if not wait:
            raise _held_by(found.lease, store, key)
        if callable(wait):
            wait(found.lease)
        found = _watch(store, key, found)
    me = identify()
    lease = Lease(
        generation=found.lease.generation + 1 if found else 1,
        holder=uuid.uuid4().hex,
        host=me.host,
        boot=me.boot,
        pid=me.pid,
        started=me.started,
        renewals=0,
        ttl_seconds=ttl_seconds,
        taken_at=time.time(),
        renewed_at=time.time(),
    )
    if found is None:
        etag = store.write_if_absent(key, lease.to_bytes())
    else:
        etag = store.write_if_match(key, lease.to_bytes(), etag=found.etag)
    return Held(store, key, lease=lease, etag=etag)


@dataclass(frozen=True)
class Found:
    """A lease as it was read, with the ETag it had or had just before."""

    lease: Lease
    etag: str


def read_lease(store: Store, key: str) -> Found | None:
    """The lease at `key`, whoever holds it; None where none was ever taken.

    Raises DamagedObject where it cannot be told who holds it.
    """
    head = store.head(key)
    if head is None:
        return None
    # If it is replaced in between, the ETag is the older one: a write by it fails.
    lease = read_whole(store, key, Lease.model_validate_json, hint=DAMAGED_RECORD_HINT)
    return Found(lease, head.etag)


def _is_free(lease: Lease) -> bool:
    holder = ProcessIdentity(host=lease.host, boot=lease.boot, pid=lease.pid, started=lease.started)
    return lease.released or holder.has_ended is True


def _watch(store: Store, key: str, found: Found) -> Found:
    """The lease once it is free or its time has passed without a renewal.

    Time in which the store does not answer is not counted: the holder cannot renew in it. Raises
    ClusterError as soon as the lease is renewed: its holder lives.
    """
    ttl = found.lease.ttl_seconds
    seen_at = _now()
    while _now() - seen_at < ttl:
        time.sleep(min(ttl / _LOOKS_PER_TTL, _LONGEST_LOOK_SECONDS))
        asked_at = _now()
        latest = read_lease(store, key)
        seen_at += _now() - asked_at
        if latest is None:
            raise PreconditionFailed(key)
        if _is_free(latest.lease):
            return latest
        if latest.etag != found.etag:
            raise _held_by(latest.lease, store, key)
    return found


def _held_by(lease: Lease, store: Store, key: str) -> ClusterError:
    folder = key.rpartition("/")[0] or store.uri
    return ClusterError(
        Problem(
            f"{folder} is driven by {lease.driver}",
            f"stop that one first: shoal stop {folder} --wait (if its machine is gone, its lease "
            f"ends {lease.ttl_seconds:.0f} s after its last sign; if it hangs, end it on "
            f"{lease.host}: kill -9 {lease.pid})",
        )
    )


class Held:
    """A lease that this process holds; a context manager that releases it.

    `lost` is set when another holder is found: the driver must stop then. A store that is away
    does not set it; `confirm` tells for sure.
    """

    def __init__(self, store: Store, key: str, *, lease: Lease, etag: str) -> None:
        self.lost = threading.Event()
        self._lock = threading.Lock()
        self._loss = ""
        self._store = store
        self._key = key
        self._lease = lease
        self._etag = etag
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="shoal-lease", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> int:
        """Grows by one whenever the lease is taken; belongs into all that the driver writes."""
        return self._lease.generation

    def confirm(self) -> None:
        """Renews the lease now, before what only its holder may do.

        Raises ClusterError where it is lost, StorageError where the store cannot tell.
        """
        if not self.lost.is_set():
            with contextlib.suppress(PreconditionFailed):  # told as `loss`
                self._write(released=False)
        if self.lost.is_set():
            raise ClusterError(Problem(self.loss, "look who drives the run: shoal status"))

    @property
    def loss(self) -> str:
        """How the lease was lost, and to whom; empty while it is held."""
        return self._loss

    def release(self) -> None:
        """Give the lease back, so that the next driver need not wait; does nothing once lost."""
        self._ended.set()
        self._thread.join()
        if self.lost.is_set():
            return
        try:
            with contextlib.suppress(PreconditionFailed):  # told as `loss`
                self._write(released=True)
        except StorageError as error:
            # What the run has done stands; the next driver waits for the lease to run out.
            logger.warning("the lease %s could not be given back: %s", self._key, error)

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _renew(self) -> None:
        while not self._ended.wait(self._lease.ttl_seconds / _RENEWALS_PER_TTL):
            try:
                self._write(released=False)
            except PreconditionFailed:
                self._ended.set()
            except StorageError as error:
                # Whether it is lost is known when the store is back: the next turn asks again.
                logger.warning("the lease %s could not be renewed: %s", self._key, error)

    def _lose(self, how: str) -> None:
        self._loss = f"the lease {self._store.uri}/{self._key} was lost{how}"
        logger.error("%s", self._loss)
        self.lost.set()

    def _write(self, *, released: bool) -> None:
        """Renews, or gives back. Raises PreconditionFailed once the lease is lost."""
        with self._lock:
            for _ in range(_WRITE_ATTEMPTS):
                if self.lost.is_set():
                    raise PreconditionFailed(self._key)
                try:
                    return self._replace(released=released)
                except PreconditionFailed:
                    self._adopt_own()
        raise StorageError(f"{self._store.uri} refuses to replace {self._key} as it is")

    def _adopt_own(self) -> None:
        """Takes what is there for this holder's if it is: an earlier renewal was done, and its
        answer lost. Else the lease is lost: raises PreconditionFailed."""
        found = read_lease(self._store, self._key)
        if found is None:
            self._lose(": it was deleted")
            raise PreconditionFailed(self._key)
        if found.lease.holder != self._lease.holder:
            self._lose(f" to {found.lease.driver}")
            raise PreconditionFailed(self._key)
        self._etag, self._lease = found.etag, found.lease

    def _replace(self, *, released: bool) -> None:
        lease = self._lease.model_copy(
            update={
                "renewals": self._lease.renewals + 1,
                "renewed_at": time.time(),
                "released": released,
            }
        )
        self._etag = self._store.write_if_match(self._key, lease.to_bytes(), etag=self._etag)
        self._lease = lease


def _now() -> float:
    """Seconds of a clock that is never set, and that counts while the machine sleeps if it can."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
