"""The right to write an index on a server, which one run at a time has."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from absl import logging

from vop_jax.errors import UserError
from vop_jax.search.collection.schema import Collections

KEY = "writer"
RENEWAL = 3.0  # seconds between renewals
PATIENCE = 5 * RENEWAL  # a run that has not renewed its lease for so long was killed


class Lease:
    """The right of a run; a thread renews it.

    Only changes of the lease count, never the clock of another machine.
    """

    def __init__(self, collections: Collections):
        self._collections, self.owner = collections, secrets.token_hex(8)
        self._count, self._ended, self._lost = 0, threading.Event(), ""
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> None:
        """Takes the lease, once the run that had it has ended.

        Raises:
            UserError: another run has it.
        """
        before, waited = self._collections.read(KEY), 0.0
        if before:
            logging.info(
                "%s: another run may be writing it; waits %.0f seconds for a sign of it",
                *(self._collections.uri, PATIENCE),
            )
        while before and waited < PATIENCE:
            time.sleep(RENEWAL / 3)
            waited += RENEWAL / 3
            now = self._collections.read(KEY)
            if now and now != before:
                raise self._refusal(now)
            before = now
        self._write()
        time.sleep(RENEWAL / 3)  # two runs may have waited for the same one
        if json.loads(now := self._collections.read(KEY))["owner"] != self.owner:
            raise self._refusal(now)
        self._thread.start()

    def _refusal(self, lease: str) -> UserError:
        where = json.loads(lease)["where"]
        return UserError(
            f"store {self._collections.uri}: another run is writing it ({where}); wait for its end"
        )

    def _write(self) -> None:
        self._count += 1
        where = f"process {os.getpid()} of {socket.gethostname()}"
        text = json.dumps({"owner": self.owner, "count": self._count, "where": where})
        self._collections.write(KEY, text)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL):
            try:
                now = self._collections.read(KEY)
                if not now or json.loads(now)["owner"] != self.owner:
                    self._lost = now
                    return
                self._write()
            except UserError:  # the server is down, which the run finds out itself
                continue

    def check(self) -> None:
        """Raises UserError if another run has taken the lease, as after a long pause."""
        if self._lost:
            raise self._refusal(self._lost)

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(UserError):
            if not self._lost:
                self._collections.write(KEY, "")


def check_owner(collections: Collections, owner: str) -> None:
    """For a worker of a run: raises UserError if the run has lost its lease."""
    now = collections.read(KEY)
    if not now or json.loads(now)["owner"] != owner:
        raise UserError(f"store {collections.uri}: the run of this worker has ended")


@contextlib.contextmanager
def held(collections: Collections) -> Iterator[Lease]:
    """Holds the lease of an index; see `Lease.take`."""
    lease = Lease(collections)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()
