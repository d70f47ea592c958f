"""Detects whether all processes of a run are alive, by connections that the system closes when a process ends.

A killed process no longer takes part in collective operations. With gloo, the others get an error that does not name
it; with NCCL, they wait for half an hour. So each process holds a connection to the first one, and a thread waits until
it closes. Nothing is sent while all is well, and no timeout decides: a process that is busy or suspended counts as
alive.
"""

import hmac
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch.distributed
from lightning.fabric import Fabric

from latentgnn.errors import UserError

# Timeouts in seconds: for connecting; until a machine that no longer answers counts as gone; and for a process to end
# with its own error before it is killed because it waits for one that is gone.
_CONNECT, _SILENCE, _GRACE = 60, 30, 15
_RANK = struct.Struct("!i")
_DONE = -1


class ProcessGone(UserError):
    """Another process of the run ended in the middle of it."""


class Lifeline:
    """This process's connections, as a context manager; if the block ends without `done`, the other processes end too.

    Args:
        fabric: a launched Fabric.
        kept: returns what the run has saved so far.
    """

    def __init__(self, fabric: Fabric, kept: Callable[[], str]) -> None:
        self._world, self._rank, self._kept = fabric.world_size, fabric.global_rank, kept
        self._gone: int | None = None
        self._noticed, self._left = threading.Event(), threading.Event()
        self._peers: Mapping[int, socket.socket] = {}
        self._hosts = [""] * self._world
        if self._world > 1:
            torch.distributed.all_gather_object(self._hosts, socket.gethostname())
            self._peers = _accept_all(fabric) if self._rank == 0 else {0: _connect(fabric)}
            threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def done(self) -> None:
        """Tell the others that this process is done, so that its end is not taken for a failure."""
        self._send(_DONE)

    def __enter__(self) -> "Lifeline":
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for peer in self._peers.values():
            with suppress(OSError):
                # The connection is closed only after the other side has left too. Otherwise, data that it still sends
                # would reset the connection, and what this side has sent would be lost.
                peer.shutdown(socket.SHUT_WR)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn the error of a collective operation into one that names the process that is gone.

        Raises:
            ProcessGone: instead of such an error; other errors are passed on.
        """
        try:
            yield
        except RuntimeError as error:
            # The error may arrive before the connection is seen to close.
            if self._peers and self._noticed.wait(timeout=5):
                raise ProcessGone(self._message()) from error
            raise

    def _message(self) -> str:
        return (
            f"process {self._gone} of {self._world} (counted from 0), on {self._hosts[self._gone or 0]}, is gone: it "
            f"was killed, or ended with an error of its own, and process {self._rank} ends with it; {self._kept()}"
        )

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = self._peers[key.data]
                    message = _receive(peer, _RANK.size)
                    selector.unregister(peer)
                    gone = _RANK.unpack(message)[0] if len(message) == _RANK.size else key.data
                    if gone != _DONE:
                        self._note(gone)
        for peer in self._peers.values():
            peer.close()

    def _note(self, gone: int) -> None:
        if self._noticed.is_set() or self._left.is_set():
            return
        self._gone = gone
        self._noticed.set()
        # The first process is connected to all and passes the message on.
        self._send(gone)
        if not self._left.wait(timeout=_GRACE):
            # The main thread is in an operation that cannot be interrupted.
            print(f"latentgnn: {self._message()}", file=sys.stderr, flush=True)
            os._exit(1)

    def _send(self, message: int) -> None:
        for peer in self._peers.values():
            # Processes that have left already need not know.
            with suppress(OSError):
                peer.sendall(_RANK.pack(message))


def _accept_all(fabric: Fabric) -> dict[int, socket.socket]:
    """In the first process: a connection to each of the others."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    key = secrets.token_bytes(32)
    peers: dict[int, socket.socket] = {}
    with socket.create_server(
        ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=fabric.world_size
    ) as server:
        server.settimeout(_CONNECT)
        fabric.broadcast((server.getsockname()[1], key))
        while len(peers) < fabric.world_size - 1:
            try:
                peer, _ = server.accept()
            except TimeoutError:
                absent = sorted(set(range(1, fabric.world_size)) - peers.keys())
                raise UserError(
                    f"processes {absent} of {fabric.world_size} have not connected within {_CONNECT} seconds"
                ) from None
            peer.settimeout(_CONNECT)
            message = _receive(peer, len(key) + _RANK.size)
            if not hmac.compare_digest(message[: len(key)], key):
                # Some other program, such as a port scanner.
                peer.close()
                continue
            peers[_RANK.unpack(message[len(key) :])[0]] = _kept_alive(peer)
    return peers


def _connect(fabric: Fabric) -> socket.socket:
    """In any other process: its connection to the first one."""
    port, key = fabric.broadcast((0, b""))
    # The host that torch's own connections used.
    address = os.environ["MASTER_ADDR"]
    try:
        peer = socket.create_connection((address, port), timeout=_CONNECT)
        peer.sendall(key + _RANK.pack(fabric.global_rank))
    except OSError as error:
        raise UserError(
            f"process {fabric.global_rank} cannot reach the first one at {address}, port {port}: {error}"
        ) from error
    return _kept_alive(peer)


def _kept_alive(peer: socket.socket) -> socket.socket:
    """Let the system check periodically whether the other machine still answers."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _SILENCE // 2), ("TCP_KEEPINTVL", _SILENCE // 6), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _receive(peer: socket.socket, size: int) -> bytes:
    """Receive this many bytes, or fewer if the connection ended."""
    received = b""
    # A reset or silent connection counts as closed.
    with suppress(OSError):
        while len(received) < size and (part := peer.recv(size - len(received))):
            received += part
    return received
