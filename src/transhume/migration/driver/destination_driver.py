"""Carries out the destination machine's commands: makes the VM, receives it, and lets it run or removes it.

Threads: the event loop runs the machine and talks to QEMU; a thread for each connection receives what the
source sends, pages straight into guest RAM.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Mapping

from transhume.memory import runs as page_runs
from transhume.memory.digest import digest
from transhume.memory.pagemap import Scanner
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.memory.userfaultfd import Userfaultfd, find_existing
from transhume.migration import events as ev
from transhume.migration import wire
from transhume.migration.destination import DestinationMachine
from transhume.migration.destination_table import DestinationState
from transhume.migration.driver.attach import attach_userfaultfd
from transhume.migration.driver.control import ControlServer
from transhume.migration.driver.handshake import Identity, accept
from transhume.migration.driver.job import MoverJob
from transhume.migration.driver.journal import Journal
from transhume.migration.driver.listener import Listener
from transhume.migration.driver.loop import Driver, Handler, end
from transhume.migration.driver.owed_file import Listening, OwedFile
from transhume.migration.machine import Command, Event
from transhume.migration.register import Register
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.native_relay import NativeRelay
from transhume.migration.transfer.pager import Pager
from transhume.migration.transfer.receiver import PageReceiver
from transhume.migration.transfer.restoring import restore
from transhume.migration.transfer.safe_copy import discard, safe_copy_path
from transhume.migration.transfer.verification import SentDigests, send_digests
from transhume.model.errors import (
    HostLost,
    KernelError,
    PeerProtocolError,
    Refused,
    TranshumeError,
    VmmError,
)
from transhume.model.migration import Engine, MigrationReport, Outcome, Rest
from transhume.model.orders import MigrationUpdate, Prepared
from transhume.trust.credentials import Credentials
from transhume.vmm.device_state import IncomingState, prepare_load
from transhume.vmm.epoch import note_epoch
from transhume.vmm.launch import launch
from transhume.vmm.log import last_words
from transhume.vmm.monitor import Monitor
from transhume.vmm.native import NativeIncoming
from transhume.vmm.niceness import put_this_thread_first
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import QemuProcess, find_running

KEY_BYTES = 32
TAKE_OVER_RETRY_S = 1.0
DESTROY_RETRY_S = 1.0
DESTROY_ATTEMPTS = 30


class DestinationDriver(Driver[DestinationState]):
    """The destination's mover."""

    lasting = frozenset(
        {
            ev.SwapToSource,
            ev.SwapToDestination,
            ev.ResumeVm,
            ev.TellPeerCommitted,
            ev.TellPeerRunning,
            ev.TellPeerPaged,
            ev.DestroyVm,
            ev.TellPeerFailed,
        }
    )

    def __init__(
        self,
        job: MoverJob,
        paths: VmPaths,
        journal: Journal,
        register: Register,
        control: ControlServer,
        address: str,
        vm_user: str,
        credentials: Credentials,
        other_addresses: tuple[str, ...] = (),
    ) -> None:
        self._predecessor_state = journal.last_state()
        self._owed_file = OwedFile(journal.folder)
        self._owed: list[Runs] = self._owed_file.read() or []
        owed_pages = sum(page_runs.page_count(runs) for runs in self._owed)
        machine = DestinationMachine(job.migration, time.monotonic(), owed_pages)
        super().__init__(job, machine, journal, register, control)
        self._destination = machine
        self._paths = paths
        self._addresses = (address, *other_addresses)
        self._vm_user = vm_user
        self._credentials = credentials
        self._options = job.migration.options
        self._key = secrets.token_bytes(KEY_BYTES)
        self._process: QemuProcess | None = None
        self._monitor: Monitor | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._listener: Listener | None = None
        self._ram: GuestRam | None = None
        self._native_relay: NativeRelay | None = None
        self._threads: list[threading.Thread] = []
        self._incoming: IncomingState | None = None
        self._native: NativeIncoming | None = None
        self._state_chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._state_length_bytes = 0
        self._state_fingerprint = hashlib.sha256()
        self._state_ended_s = 0.0
        self._loading: asyncio.Task[None] | None = None
        self._heard_bytes = 0
        self._beat_s = 0.0
        self._closing = False
        self._uffd: Userfaultfd | None = None
        self._pager: Pager | None = None
        self._pager_thread: threading.Thread | None = None
        self._fault_channel: FrameChannel | None = None
        self._state_may_load = asyncio.Event()
        self._hashing: asyncio.Future[SentDigests] | None = None
        self._compared: asyncio.Future[wire.Compared] | None = None

    # --- the frame's questions -------------------------------------------------------------------

    def handlers(self) -> Mapping[type[Command], Handler]:
        return {
            ev.AskController: self.ask_controller,
            ev.SwapToDestination: self.swap_to_destination,
            ev.SwapToSource: self.swap_to_source,
            ev.ResumeVm: self._resume_vm,
            ev.TellPeerCommitted: self._tell_peer_committed,
            ev.TellPeerRunning: self._tell_peer_running,
            ev.VerifyPages: self._verify_pages,
            ev.TellPeerPaged: self._tell_peer_paged,
            ev.ReadSafeCopy: self._read_safe_copy,
            ev.DestroyVm: self._destroy_vm,
            ev.TellPeerFailed: self._tell_peer_failed,
        }

    @property
    def past_point_of_no_return(self) -> bool:
        return self._destination.state in (
            DestinationState.RESUMING,
            DestinationState.PAGING,
            DestinationState.RUNNING,
            DestinationState.DONE,
        )

    async def begin(self) -> Event | None:
        """Make the VM and open the port (steps 2 to 4); a successor only looks what is there."""
        if self._predecessor_state is not None:
            await self._attach_vm()
            await self._insist_on_paging()
            return ev.Recovered(state_may_be_sent=True)
        launched = await launch(self.job.spec, self._paths, vm_user=self._vm_user, incoming=True)
        await launched.monitor.close()  # that socket is the daemon's
        self._watch_process(launched.process)
        self._monitor = await Monitor.connect(self._paths.mover_qmp_socket)
        self._ram = GuestRam.of_process(launched.process.pid)
        await asyncio.to_thread(self._ram.punch_all)  # whatever QEMU wrote at its start is not the guest's
        if self._options.engine is Engine.TRANSHUME:
            await prepare_load(self._monitor)
            if self._options.may_page:
                self._uffd = await attach_userfaultfd(self._monitor, launched.process.pid)
            self._incoming = await IncomingState.begin(self._monitor)
            self._loading = asyncio.create_task(self._load_state(), name="load")
        self.warm_up_register()
        self._listen()
        return ev.Listening()

    def update(self) -> MigrationUpdate:
        """An outcome is reported from here only when the source cannot report it."""
        machine = self._destination
        outcome = Outcome.RUNNING
        if machine.finished and (machine.state is DestinationState.DONE or machine.source_never_came):
            outcome = machine.outcome
        return MigrationUpdate(
            migration=self.migration.id,
            host=self.migration.destination,
            phase=machine.phase,
            outcome=outcome,
            runs_at=machine.runs_at,
            error_code=machine.error_code,
            error=machine.error,
            report=self._report(),
        )

    def _report(self) -> MigrationReport | None:
        """What paging was like, once the last page is here: the source frees its memory on this word too."""
        if self._pager is None or self._pager.missing.left_pages:
            return None
        known = {"complete": True, "to_compare": self._needs_comparison}
        return MigrationReport(paging=self._pager.report().model_copy(update=known))

    @property
    def _needs_comparison(self) -> bool:
        """Whether the source is needed although no page is missing. From any thread."""
        machine = self._destination
        past = machine.state in (DestinationState.RUNNING, DestinationState.DONE) and not machine.error_code
        return self._options.verify and not past

    def stop_work(self) -> None:
        self._closing = True
        if self._listener is not None:
            self._listener.close()

    async def tick(self, now_s: float) -> None:
        """Hear the source in its bytes, and let it hear us."""
        channel = self._channel
        if channel is None:
            return
        if channel.arrived_bytes != self._heard_bytes:
            self._heard_bytes = channel.arrived_bytes
            self.post(ev.PeerHeard())
        if now_s - self._beat_s >= min(1.0, self._options.peer_silence_limit_s / 4):
            self._beat_s = now_s
            await asyncio.to_thread(self._send_if_open, wire.Pong(token=0))

    async def close(self) -> None:
        self._closing = True
        if self._listener is not None:
            self._listener.close()
            await self._listener.closed()
        for task in (self._loading, self._watcher):
            await end(task)
        if self._pager is not None:
            self._pager.stop()
        channels = (self._channel, self._fault_channel)
        for channel in channels:
            if channel is not None:
                channel.shutdown()
        if self._hashing is not None:
            await asyncio.gather(self._hashing, return_exceptions=True)
        for thread in (*self._threads, *([self._pager_thread] if self._pager_thread else [])):
            await asyncio.to_thread(thread.join)
        for channel in channels:
            if channel is not None:
                channel.close()
        if self._uffd is not None:
            self._uffd.close()
        if self._incoming is not None:
            self._incoming.close()
        if self._native_relay is not None:
            await asyncio.to_thread(self._native_relay.close)
        if self._native is not None:
            self._native.close()
        if self._ram is not None:
            self._ram.close()
        if self._monitor is not None:
            await self._monitor.close()
        if self._process is not None:
            self._process.close()

    # --- making the VM ---------------------------------------------------------------------------

    async def _attach_vm(self) -> None:
        process = find_running(self._paths)
        if process is None:
            return  # DestroyVm and ResumeVm find that out by themselves
        self._watch_process(process)

    def _watch_process(self, process: QemuProcess) -> None:
        self._process = process
        self._watcher = asyncio.create_task(self._watch(process), name="watch QEMU")

    async def _watch(self, process: QemuProcess) -> None:
        await process.wait()
        words = last_words(self._paths)
        self.post(ev.QemuDied(f"its process ended; its last words: {words}"))

    async def _qemu(self) -> Monitor:
        if self._monitor is None:
            if self._process is None:
                raise VmmError(f"QEMU of VM {self.migration.vm} does not run")
            self._monitor = await Monitor.connect(self._paths.mover_qmp_socket)
        return self._monitor

    def _listen(self) -> None:
        port = self._open_port(0)
        self._owed_file.write_listening(Listening(port, self._key, self._addresses))
        address, *others = self._addresses
        self.control.prepared(
            Prepared(address=address, port=port, key=self._key.hex(), other_addresses=tuple(others))
        )

    def _open_port(self, wanted: int) -> int:
        """Listen at a port (0: any). Raises `HostLost` when that cannot be."""
        listener = Listener(self._addresses, self._take_connection, self._log)
        port = listener.open(wanted)
        self._listener = listener
        return port

    def _take_connection(self, sock: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(sock,), name="receiver", daemon=True)
        self._threads.append(thread)
        thread.start()

    # --- receiving -------------------------------------------------------------------------------

    def _identity(self) -> Identity:
        assert self._ram is not None
        return Identity(
            migration=self.migration.id,
            source=self.migration.source,
            destination=self.migration.destination,
            key=self._key,
            ram_blocks=self._ram.ram_blocks,
            silence_limit_s=self._options.peer_silence_limit_s,
        )

    def _serve(self, sock: socket.socket) -> None:
        """One connection's thread. A stranger loses the connection and disturbs nothing."""
        try:
            channel, role = accept(sock, self._identity(), self._credentials)
        except (HostLost, PeerProtocolError, Refused) as error:
            self._log(f"a connection was refused: {error.message}")
            return
        if role is wire.Role.NATIVE:
            self._native_relay = NativeRelay(channel)
            asyncio.run_coroutine_threadsafe(self._begin_native(self._native_relay), self._loop)
            return
        if role is wire.Role.FAULT:
            self._take_fault_channel(channel)
            return
        if self._channel is not None and self._pager is None:
            self._log("a second main connection was refused")
            channel.close()
            return
        if self._channel is not None and self._pager is not None:
            self._leave_connections(self._pager)
        self._channel = channel
        self.post_from_thread(ev.SourceConnected())
        try:
            if self._pager is not None:
                self._name_missing(channel, self._pager)
            self._receive(channel)
        except (HostLost, PeerProtocolError, KernelError, VmmError) as error:
            if self._channel is channel:
                self._lose_link(error)
        except Exception as error:  # noqa: BLE001 - nobody else reads this connection: the source must come again
            self._log_mistake("the receiver")
            if self._channel is channel:
                self._lose_link(PeerProtocolError(f"the receiver came to grief: {error!r}"))

    def _leave_connections(self, pager: Pager) -> None:
        """The source has noticed before us that they broke. The pager hears it first: were its connection to
        end under it, it would end the new ones.
        """
        pager.lose_link()
        for channel in (self._channel, self._fault_channel):
            if channel is not None:
                channel.shutdown("the source came again")

    def _take_fault_channel(self, channel: FrameChannel) -> None:
        before, self._fault_channel = self._fault_channel, channel
        if before is not None:
            before.shutdown("the source came again")
        if self._pager is not None:
            self._pager.attach(channel)

    def _lose_link(self, error: TranshumeError) -> None:
        """From any thread: one broken connection ends both, so that the source makes both anew."""
        if self._pager is not None:
            self._pager.lose_link()
            for channel in (self._channel, self._fault_channel):
                if channel is not None:
                    channel.shutdown(error.message)
        self.post_from_thread(ev.LinkLost(error.code, error.message))
        self._loop.call_soon_threadsafe(self._lose_comparison, error)

    def _name_missing(self, channel: FrameChannel, pager: Pager) -> None:
        """The source has come again: tell it what is still missing here."""
        assert self._ram is not None
        count = 0
        for index in range(len(self._ram.blocks)):
            missing = pager.missing.missing(index)
            count += page_runs.page_count(missing)
            for batch in page_runs.batches(missing, 1 << 62, wire.MAX_RUNS):
                with channel.frame():
                    channel.write(wire.encode_table(wire.FrameType.MISSING, index, batch, channel.version))
        channel.send(wire.MissingEnd(pages=count, to_compare=self._needs_comparison))

    def _receive(self, channel: FrameChannel) -> None:
        assert self._ram is not None
        receiver = PageReceiver(channel, self._ram)
        receiver.pager = self._pager
        while True:
            item = receiver.receive()
            if isinstance(item, bytes):
                self._take_state(item)
            else:
                self._take_message(channel, receiver, item)

    def _take_state(self, chunk: bytes) -> None:
        self._state_length_bytes += len(chunk)
        if self._state_length_bytes > wire.MAX_STATE_BYTES:
            raise PeerProtocolError("the device state is over the limit")
        self._state_fingerprint.update(chunk)
        self._loop.call_soon_threadsafe(self._state_chunks.put_nowait, chunk)

    def _take_message(self, channel: FrameChannel, receiver: PageReceiver, message: wire.Message) -> None:
        if isinstance(message, wire.PassEnd):
            _check_counts(receiver, message.pages, message.zero_pages)
            channel.send(wire.PassAck(iteration=message.iteration))
            self.post_from_thread(ev.PassReceived(message.iteration))
        elif isinstance(message, wire.LastPagesEnd):
            _check_counts(receiver, message.pages, message.zero_pages)
            self._verify(channel, message)
            self.post_from_thread(ev.LastPagesReceived(self._note_owed(receiver)))
        elif isinstance(message, wire.StateEnd):
            self._end_state(receiver, message)
        elif isinstance(message, wire.Ping):
            channel.send(wire.Pong(token=message.token))
        elif isinstance(message, wire.Abort):
            self.post_from_thread(ev.PeerAborted(message.reason))
        elif isinstance(message, wire.Finished):
            self.post_from_thread(ev.PeerFinished())
        elif isinstance(message, wire.Compared):
            self._loop.call_soon_threadsafe(self._take_comparison, message)
        else:
            raise PeerProtocolError(f"{channel.peer} sent {message.frame_type.name} out of turn.")

    def _verify(self, channel: FrameChannel, message: wire.LastPagesEnd) -> None:
        """Compare our RAM with the source's digests, if it sent any."""
        assert self._ram is not None
        began_s = time.monotonic()
        if message.digests:
            ours = tuple(digest(block) for block in self._ram.blocks)
            if ours != message.digests:
                raise PeerProtocolError(
                    "the RAM at the destination differs from the source's: nothing was switched over"
                )
            channel.send(wire.PagesVerified(verify_ms=(time.monotonic() - began_s) * 1000))

    def _note_owed(self, receiver: PageReceiver) -> int:
        """All pages are here or named. With pages owed, QEMU must not see the state before the pager is
        armed: to load it may touch them, and more may still be named.
        """
        owed = receiver.take_owed()
        count = sum(page_runs.page_count(runs) for runs in owed)
        if count and self._options.may_page:
            self._owed = [page_runs.union(*pair) for pair in zip(self._owed or owed, owed, strict=True)]
        elif count:
            raise PeerProtocolError("the source owes pages, which was not agreed on")
        if not self._owed:
            self._loop.call_soon_threadsafe(self._state_may_load.set)
        return count

    def _end_state(self, receiver: PageReceiver, message: wire.StateEnd) -> None:
        if (
            message.length_bytes != self._state_length_bytes
            or message.sha256 != self._state_fingerprint.hexdigest()
        ):
            raise PeerProtocolError("the device state did not arrive whole: length or hash differ")
        self._state_ended_s = time.monotonic()
        if self._owed:
            self._owed_file.write(self._owed)
            pager = self._make_pager()
            pager.arm(self._owed)
            receiver.pager = pager
            self._start_pager(pager)
            self._loop.call_soon_threadsafe(self._state_may_load.set)
        self.post_from_thread(ev.StateReceived())
        self._loop.call_soon_threadsafe(self._state_chunks.put_nowait, None)

    async def _load_state(self) -> None:
        """Feed QEMU while the state arrives, and tell when it has taken all."""
        incoming = self._incoming
        assert incoming is not None
        await self._state_may_load.wait()
        try:
            while (chunk := await self._state_chunks.get()) is not None:
                await incoming.feed(chunk)
            await incoming.finish()
        except TranshumeError as error:
            self.post(ev.CommandFailed("LoadState", error.code, error.message))
            return
        await self._say_loaded()

    # --- pages owed after the resume -------------------------------------------------------------

    def _make_pager(self) -> Pager:
        assert self._uffd is not None
        assert self._ram is not None
        return Pager(
            self._uffd,
            self._ram,
            on_all_placed=lambda: self.post_from_thread(self._when_placed()),
            on_link_lost=self._lose_link,
            on_demand=self._options.rest is not Rest.BACKGROUND,
            tracks_writes=self._options.verify,
        )

    def _when_placed(self) -> Event:
        """A predecessor that was past the comparison may have ended the account of writes: no second one."""
        compared = self._predecessor_state == DestinationState.RUNNING
        return ev.AllPlaced() if self._options.verify and not compared else ev.AllPaged()

    def _start_pager(self, pager: Pager) -> None:
        if self._fault_channel is not None:
            pager.attach(self._fault_channel)
        self._pager = pager
        self._pager_thread = threading.Thread(
            target=self._serve_faults, args=(pager,), name="pager", daemon=True
        )
        self._pager_thread.start()

    def _serve_faults(self, pager: Pager) -> None:
        put_this_thread_first()
        try:
            pager.serve_faults()
        except TranshumeError as error:
            self._log(f"faults are not served any more: {error.message}")

    async def _insist_on_paging(self) -> None:
        """A successor: nobody else will serve the faults of a VM that lacks pages."""
        while self._owed and self._process is not None:
            try:
                await self._take_over_paging(self._process.pid)
            except (TranshumeError, OSError) as error:
                self._log(f"the pages owed cannot be paged in yet: {error}")
                await asyncio.sleep(TAKE_OVER_RETRY_S)
                if find_running(self._paths) is None:
                    return
                continue
            return

    async def _take_over_paging(self, pid: int) -> None:
        listening = self._owed_file.read_listening()
        if listening is None:
            raise VmmError("where the predecessor listened is not known")
        if self._ram is None:
            self._ram = GuestRam.of_process(pid)
        if self._uffd is None:
            self._uffd = find_existing(pid)
        if self._uffd is None:
            raise VmmError(f"QEMU of VM {self.migration.vm} has lost its userfaultfd")
        pager = self._make_pager()
        await asyncio.to_thread(pager.recover, self._owed)
        self._key, self._addresses = listening.key, listening.addresses or self._addresses
        self._open_port(listening.port)
        if pager.missing.left_pages == 0:
            self._loop.call_soon(lambda: self.post(self._when_placed()))
        self._start_pager(pager)  # who touches what was never owed waits for an answer, too

    async def _verify_pages(self, _: ev.VerifyPages) -> Event | None:
        """Let the source compare what the guest has not written. Without an answer nothing was verified."""
        pager, channel = self._pager, self._channel
        assert pager is not None
        assert channel is not None
        self._compared = compared = self._loop.create_future()
        self._hashing = self._loop.run_in_executor(None, self._send_digests, channel)
        try:
            sent = await asyncio.shield(self._hashing)
            answer = await compared
        except (HostLost, PeerProtocolError) as error:
            self._log(f"the memory is not verified yet: {error.message}")
            return None
        except KernelError as error:
            self._log(f"the memory cannot be verified: {error.message}")
            return ev.AllPaged()
        if answer.difference:
            await self._end_paging(pager)
            return ev.MemoryDiffers(answer.difference)
        if answer.pages == sent.pages:
            pager.note_verified(sent.pages, sent.written_pages)
        else:
            self._log(f"the memory is not verified: {answer.pages} of {sent.pages} pages were compared")
        return ev.AllPaged()

    def _send_digests(self, channel: FrameChannel) -> SentDigests:
        assert self._process is not None
        assert self._ram is not None
        scanner = Scanner(self._process.pid)
        try:
            return send_digests(channel, self._ram, scanner)
        finally:
            scanner.close()

    def _take_comparison(self, message: wire.Compared) -> None:
        if self._compared is not None and not self._compared.done():
            self._compared.set_result(message)

    def _lose_comparison(self, error: TranshumeError) -> None:
        if self._compared is not None and not self._compared.done():
            self._compared.set_exception(HostLost(error.message))
            self._compared.exception()  # whoever waits hears it; nobody waiting is no mistake

    async def _end_paging(self, pager: Pager) -> None:
        """From here on the kernel answers first touches by itself, and keeps no account of writes."""
        pager.stop()
        if self._pager_thread is not None:
            await asyncio.to_thread(self._pager_thread.join)
        await asyncio.to_thread(pager.disarm)

    async def _tell_peer_paged(self, _: ev.TellPeerPaged) -> None:
        pager = self._pager
        assert pager is not None
        await self._end_paging(pager)
        path = safe_copy_path(self.migration)
        if path is not None:
            await asyncio.to_thread(discard, path)  # a source that never comes back cannot do it
        await asyncio.to_thread(self._send_if_open, wire.Paged(paging=pager.report()))

    async def _read_safe_copy(self, _: ev.ReadSafeCopy) -> Event:
        pager, path = self._pager, safe_copy_path(self.migration)
        if pager is None or path is None:
            raise VmmError("there is no safe copy to go on from")
        self._log(f"the source is lost: {pager.missing.left_pages} pages are looked for in {path}")
        await asyncio.to_thread(restore, pager, path, self.migration.id)
        self._log(f"{pager.missing.left_pages} pages are missing after that")
        return ev.SafeCopyRead(pager.missing.left_pages)

    async def _begin_native(self, relay: NativeRelay) -> None:
        try:
            self._native = await NativeIncoming.begin(await self._qemu(), relay.qemu_end)
            relay.release()
            await self._native.finish()
        except TranshumeError as error:
            self.post(ev.CommandFailed("LoadState", error.code, error.message))
            return
        await self._say_loaded()

    async def _say_loaded(self) -> None:
        self.post(ev.StateLoaded())
        since_s = self._state_ended_s or time.monotonic()
        load_ms = max(0.0, time.monotonic() - since_s) * 1000
        await asyncio.to_thread(self._send_if_open, wire.StateLoaded(load_ms=load_ms))

    # --- the machine's commands ------------------------------------------------------------------

    async def _resume_vm(self, _: ev.ResumeVm) -> Event:
        monitor = await self._qemu()
        # A successor may find that its predecessor resumed it; otherwise every round trip is downtime.
        if self._predecessor_state is None or await monitor.status() != "running":
            await monitor.cont()
        self._note_epoch()
        return ev.VmResumed()

    def _note_epoch(self) -> None:
        """Keep what was won with the VM, beside everything else: the guest runs and nobody waits for it.

        If it fails, the controller's answer to the next heartbeat is kept instead.
        """
        noting = asyncio.create_task(self._write_epoch(), name="note the epoch")
        self._work.add(noting)
        noting.add_done_callback(self._work.discard)

    async def _write_epoch(self) -> None:
        try:
            await asyncio.to_thread(note_epoch, self._paths, self.migration.epoch + 1)
        except OSError as error:
            self._log(f"the epoch cannot be kept: {error.strerror}")

    async def _tell_peer_committed(self, _: ev.TellPeerCommitted) -> None:
        commit_ms = self._destination.commit_s * 1000
        message = wire.Committed(epoch=self.migration.epoch + 1, commit_ms=commit_ms)
        await asyncio.to_thread(self._send_if_open, message)

    async def _tell_peer_running(self, command: ev.TellPeerRunning) -> None:
        await asyncio.to_thread(self._send_if_open, wire.Running(resume_ms=command.resume_s * 1000))

    async def _tell_peer_failed(self, command: ev.TellPeerFailed) -> None:
        message = wire.Failed(code=command.code, message=command.message, definitive=True)
        await asyncio.to_thread(self._send_if_open, message)

    async def _destroy_vm(self, _: ev.DestroyVm) -> Event:
        """Leave nothing behind, also on a host that has no memory even for this, for a while."""
        await end(self._watcher)
        for attempts_left in reversed(range(DESTROY_ATTEMPTS)):
            try:
                await self._remove_vm()
                break
            except OSError as error:
                if not attempts_left:
                    raise
                self._log(f"the VM cannot be removed yet: {error}")
                await asyncio.sleep(DESTROY_RETRY_S)
        return ev.VmDestroyed()

    async def _remove_vm(self) -> None:
        """End QEMU and remove the VM's folder, what is left of both. Raises `OSError`."""
        process = self._process or find_running(self._paths)
        if process is not None:
            await process.kill()
        if self._paths.directory.exists():
            shutil.rmtree(self._paths.directory)


def _check_counts(receiver: PageReceiver, pages: int, zero_pages: int) -> None:
    """A count that differs means pages that were lost or made up on the way."""
    counted = receiver.take_counts()
    if counted != (pages, zero_pages):
        raise PeerProtocolError(
            f"{counted[0]} pages and {counted[1]} zero pages arrived where the source counted "
            f"{pages} and {zero_pages}"
        )
