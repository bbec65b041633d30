"""How fast the kernel carries memory from one process to another: the yardstick of the bulk rate.

    python -m transhume.bench.loopback receive ADDRESS BYTES fresh|touched
    python -m transhume.bench.loopback send ADDRESS PORT BYTES
    python -m transhume.bench.loopback answer ADDRESS
    python -m transhume.bench.loopback ask ADDRESS PORT COUNT

The plainest way there is: one process sends a memfd with sendfile, the other receives into a mapping of a
memfd of its own. `fresh` memory must be allocated page by page as the data comes, which is what a
destination has to do; `touched` memory is there already. The receiver prints its port, then the bytes a
second from the first byte to the last.
"""

from __future__ import annotations

import mmap
import os
import socket
import statistics
import subprocess
import sys
import time

from transhume.demo.lab import LabHost
from transhume.model.errors import TranshumeError
from transhume.model.vm import PAGE_BYTES

STEP_BYTES = 1 << 20
_LIMIT_S = 60.0
_ROUND_TRIPS = 1000
_REQUEST_BYTES = 36
"""As the frame that asks for one page: a header and one run."""


def measure(sender: LabHost, receiver: LabHost, size_bytes: int, touched: bool) -> float:
    """Bytes a second from one host to another over the wire between them."""
    module = (sys.executable, "-m", "transhume.bench.loopback")
    kind = "touched" if touched else "fresh"
    receiving = receiver.start(
        *module, "receive", receiver.address, str(size_bytes), kind, stdout=subprocess.PIPE
    )
    assert receiving.stdout is not None
    port = receiving.stdout.readline().decode().strip()
    sender.run(*module, "send", receiver.address, port, str(size_bytes), timeout_s=_LIMIT_S).require_success()
    answer, _ = receiving.communicate(timeout=_LIMIT_S)
    if receiving.returncode != 0:
        raise TranshumeError(f"the raw rate from {sender.name} to {receiver.name} could not be measured")
    return float(answer)


def round_trip_us(asker: LabHost, answerer: LabHost) -> float:
    """The median time from a request for a page to its last byte, between two hosts at rest."""
    module = (sys.executable, "-m", "transhume.bench.loopback")
    answering = answerer.start(*module, "answer", answerer.address, stdout=subprocess.PIPE)
    assert answering.stdout is not None
    port = answering.stdout.readline().decode().strip()
    asked = asker.run(*module, "ask", answerer.address, port, str(_ROUND_TRIPS), timeout_s=_LIMIT_S)
    answering.communicate(timeout=_LIMIT_S)
    return float(asked.require_success().stdout)


def answer(address: str) -> None:
    """Send a page for each request until the asker leaves."""
    page = bytes(_REQUEST_BYTES + PAGE_BYTES)
    request = bytearray(_REQUEST_BYTES)
    with socket.create_server((address, 0)) as listener:
        _say(str(listener.getsockname()[1]))
        connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while connection.recv_into(request, 0, socket.MSG_WAITALL) == _REQUEST_BYTES:
            connection.sendall(page)


def ask(address: str, port: int, count: int) -> None:
    """Ask for `count` pages, one after the other, and print the median round trip."""
    page = bytearray(_REQUEST_BYTES + PAGE_BYTES)
    request = bytes(_REQUEST_BYTES)
    times_s: list[float] = []
    with socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began_s = time.perf_counter()
            connection.sendall(request)
            connection.recv_into(page, 0, socket.MSG_WAITALL)
            times_s.append(time.perf_counter() - began_s)
    _say(str(statistics.median(times_s) * 1e6))


def receive(address: str, size_bytes: int, touched: bool) -> None:
    """Receive once and print the rate."""
    memory = _mapped(size_bytes)
    if touched:
        _touch(memory)
    with socket.create_server((address, 0)) as listener:
        _say(str(listener.getsockname()[1]))
        connection, _ = listener.accept()
    with connection, memoryview(memory) as view:
        taken = connection.recv_into(view[:1])
        began_s = time.monotonic()
        while taken < size_bytes:
            received = connection.recv_into(view[taken : taken + STEP_BYTES], 0, socket.MSG_WAITALL)
            if received == 0:
                raise SystemExit(f"only {taken} of {size_bytes} bytes came")
            taken += received
        _say(str(size_bytes / (time.monotonic() - began_s)))


def send(address: str, port: int, size_bytes: int) -> None:
    """Send a memfd full of bytes once."""
    fd = os.memfd_create("transhume-bench")
    os.ftruncate(fd, size_bytes)
    with mmap.mmap(fd, size_bytes) as memory:
        _touch(memory)
    with socket.create_connection((address, port)) as connection:
        sent = 0
        while sent < size_bytes:
            sent += os.sendfile(connection.fileno(), fd, sent, min(STEP_BYTES, size_bytes - sent))


def _mapped(size_bytes: int) -> mmap.mmap:
    fd = os.memfd_create("transhume-bench")
    os.ftruncate(fd, size_bytes)
    memory = mmap.mmap(fd, size_bytes)
    os.close(fd)
    return memory


def _touch(memory: mmap.mmap) -> None:
    for start in range(0, len(memory), PAGE_BYTES):
        memory[start] = 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    """Be one end, as told."""
    if arguments[0] == "receive":
        receive(arguments[1], int(arguments[2]), arguments[3] == "touched")
    elif arguments[0] == "answer":
        answer(arguments[1])
    elif arguments[0] == "ask":
        ask(arguments[1], int(arguments[2]), int(arguments[3]))
    else:
        send(arguments[1], int(arguments[2]), int(arguments[3]))


if __name__ == "__main__":
    main(sys.argv[1:])
