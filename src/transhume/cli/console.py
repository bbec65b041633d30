"""A person at a guest's serial console: the terminal in raw mode, every key to the guest but Ctrl-]."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import threading
import tty
from collections.abc import AsyncIterator, Iterator

import typer

from transhume.api.client import FarmClient

LEAVE = b"\x1d"
"""Ctrl-], as in telnet."""


async def talk(client: FarmClient, vm: str) -> None:
    """Until the person leaves, the input ends, or the guest's QEMU does."""
    terminal = sys.stdin.isatty()
    if terminal:
        typer.echo(f"the console of VM {vm}; Ctrl-] leaves it", err=True)
    with _raw(terminal):
        async for data in client.console(vm, _keys(terminal)):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    if terminal:
        typer.echo(f"\nleft the console of VM {vm}", err=True)


async def _keys(terminal: bool) -> AsyncIterator[bytes]:
    """What is typed. A thread reads, because not everything that may be stdin can be polled."""
    loop = asyncio.get_running_loop()
    typed: asyncio.Queue[bytes] = asyncio.Queue()

    def read() -> None:
        data = b"?"
        while data:
            data = os.read(0, 1024)
            with contextlib.suppress(RuntimeError):
                # RuntimeError: the loop has ended while this waited for a key.
                loop.call_soon_threadsafe(typed.put_nowait, data)

    threading.Thread(target=read, name="keys", daemon=True).start()
    while data := await typed.get():
        before, leave, _ = data.partition(LEAVE) if terminal else (data, b"", b"")
        if before:
            yield before
        if leave:
            return


@contextlib.contextmanager
def _raw(terminal: bool) -> Iterator[None]:
    if not terminal:
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
