"""What may happen to the destination of a migration, in which state, and what may follow.

The methods are those of `destination.DestinationMachine`; what is not in the table may not happen.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from transhume.migration import events as ev
from transhume.migration.machine import Event, Rule, ignored
from transhume.model.migration import Phase


class DestinationState(StrEnum):
    """Where the destination stands."""

    CREATING = "creating"
    WAITING = "waiting"
    RECEIVING = "receiving"
    LOADING = "loading"
    COMMITTING = "committing"
    REVOKING = "revoking"
    RESUMING = "resuming"
    PAGING = "paging"
    RUNNING = "running"
    DESTROYING = "destroying"
    DONE = "done"
    ABORTED = "aborted"


D = DestinationState

PHASES: dict[DestinationState, Phase] = {
    D.CREATING: Phase.REQUESTED,
    D.WAITING: Phase.PREPARED,
    D.RECEIVING: Phase.PRECOPY,
    D.LOADING: Phase.SUSPENDED,
    D.COMMITTING: Phase.STATE_SENT,
    D.REVOKING: Phase.STATE_SENT,
    D.RESUMING: Phase.COMMITTED,
    D.PAGING: Phase.PAGING,
    D.RUNNING: Phase.RUNNING_AT_DESTINATION,
    D.DESTROYING: Phase.ABORTED,
    D.DONE: Phase.DONE,
    D.ABORTED: Phase.ABORTED,
}

_TROUBLE: dict[type[Event], Rule[StrEnum]] = {
    ev.LinkLost: Rule("_give_up_link", (D.DESTROYING,)),
    ev.PeerAborted: Rule("_peer_aborted", (D.DESTROYING,)),
    ev.CommandFailed: Rule("_give_up_command", (D.DESTROYING,)),
    ev.QemuDied: Rule("_give_up_qemu", (D.DESTROYING,)),
    ev.PeerHeard: Rule("_heard", ()),
    ev.CancelRequested: Rule("_give_up_cancel", (D.DESTROYING,)),
    ev.MigrationKnown: Rule("", ()),
}
"""Before the commit is tried, every trouble ends with nothing left here."""

TABLE: Mapping[StrEnum, Mapping[type[Event], Rule[StrEnum]]] = {
    D.CREATING: {
        # Whether this mover is the first or a successor is not known yet: a VM that is here may be the
        # one that runs, so nothing is destroyed without the register.
        ev.Listening: Rule("_listening", (D.WAITING, D.DESTROYING)),
        ev.Recovered: Rule("_recovered", (D.REVOKING,)),
        ev.CommandFailed: Rule("_begin_failed", (D.REVOKING,)),
        ev.QemuDied: Rule("_note_qemu_died", ()),
        ev.CancelRequested: Rule("_cancel_early", ()),
        ev.Tick: Rule("", ()),
    },
    D.WAITING: {
        **_TROUBLE,
        ev.SourceConnected: Rule("_source_connected", (D.RECEIVING,)),
        ev.MigrationKnown: Rule("_migration_known", (D.DESTROYING,)),
        ev.Tick: Rule("_tick_waiting", (D.DESTROYING,)),
    },
    D.RECEIVING: {
        **_TROUBLE,
        ev.PassReceived: Rule("_heard", ()),
        ev.LastPagesReceived: Rule("_last_pages", (D.LOADING,)),
        ev.StateLoaded: Rule("_loaded_early", ()),
        ev.Tick: Rule("_tick_silence", (D.DESTROYING,)),
    },
    D.LOADING: {
        **_TROUBLE,
        ev.StateReceived: Rule("_state_received", (D.COMMITTING,)),
        ev.StateLoaded: Rule("_state_loaded", (D.COMMITTING,)),
        ev.LastPagesReceived: Rule("_more_owed", ()),
        ev.AllPaged: Rule("_note_all_paged", ()),
        ev.AllPlaced: Rule("_note_all_placed", ()),
        ev.Tick: Rule("_tick_silence", (D.DESTROYING,)),
    },
    D.COMMITTING: {
        ev.SwapWon: Rule("_commit_won", (D.RESUMING, D.DONE)),
        ev.SwapLost: Rule("_commit_lost", (D.RESUMING, D.DESTROYING, D.DONE)),
        ev.SwapRefused: Rule("_commit_refused", (D.DESTROYING,)),
        ev.SwapUnknown: Rule("_swap_unknown", ()),
        # The source goes only when the register has told it that the VM is ours.
        ev.PeerFinished: Rule("_commit_won", (D.RESUMING, D.DONE)),
        ev.Tick: Rule("_tick_committing", (D.REVOKING,)),
        ev.QemuDied: Rule("_note_qemu_died", ()),
        **ignored(
            ev.PeerAborted,
            ev.CommandFailed,
            ev.PeerHeard,
            ev.CancelRequested,
            ev.MigrationKnown,
        ),
        ev.LinkLost: Rule("_note_source_lost", ()),
        ev.SourceConnected: Rule("_note_source_back", ()),
        ev.AllPaged: Rule("_note_all_paged", ()),
        ev.AllPlaced: Rule("_note_all_placed", ()),
    },
    D.REVOKING: {
        ev.SwapWon: Rule("_revoked", (D.DESTROYING,)),
        ev.SwapLost: Rule("_revoke_lost", (D.RESUMING, D.DESTROYING, D.DONE)),
        ev.SwapUnknown: Rule("_swap_unknown", ()),
        ev.SwapRefused: Rule("_swap_unknown", ()),
        ev.PeerFinished: Rule("_commit_won", (D.RESUMING, D.DONE)),
        ev.Tick: Rule("_tick_revoking", ()),
        ev.QemuDied: Rule("_note_qemu_died", ()),
        **ignored(
            ev.PeerAborted,
            ev.CommandFailed,
            ev.PeerHeard,
            ev.CancelRequested,
            ev.MigrationKnown,
        ),
        ev.LinkLost: Rule("_note_source_lost", ()),
        ev.SourceConnected: Rule("_note_source_back", ()),
        ev.AllPaged: Rule("_note_all_paged", ()),
        ev.AllPlaced: Rule("_note_all_placed", ()),
    },
    D.RESUMING: {
        ev.VmResumed: Rule("_resumed", (D.PAGING, D.RUNNING)),
        ev.AllPaged: Rule("_note_all_paged", ()),
        ev.AllPlaced: Rule("_note_all_placed", ()),
        ev.LinkLost: Rule("_note_source_lost", ()),
        ev.SourceConnected: Rule("_note_source_back", ()),
        ev.CommandFailed: Rule("_resume_failed", (D.DONE,)),
        ev.QemuDied: Rule("_vm_lost", (D.DONE,)),
        ev.Tick: Rule("_tick_resuming", ()),
        **ignored(
            ev.PeerAborted,
            ev.PeerHeard,
            ev.CancelRequested,
            ev.SwapWon,
            ev.SwapLost,
            ev.SwapUnknown,
            ev.SwapRefused,
            ev.PeerFinished,
            ev.MigrationKnown,
        ),
    },
    D.PAGING: {
        ev.AllPaged: Rule("_all_paged", (D.RUNNING,)),
        ev.AllPlaced: Rule("_all_placed", ()),
        ev.MemoryDiffers: Rule("_memory_differs", (D.DONE,)),
        ev.LinkLost: Rule("_source_lost", ()),
        ev.SourceConnected: Rule("_source_back", ()),
        ev.PeerHeard: Rule("_heard", ()),
        ev.Tick: Rule("_tick_paging", (D.RUNNING, D.DONE)),
        ev.QemuDied: Rule("_vm_lost", (D.DONE,)),
        ev.MigrationKnown: Rule("_known_while_paging", (D.RUNNING, D.DESTROYING, D.DONE)),
        ev.SafeCopyRead: Rule("_safe_copy_read", (D.DONE,)),
        ev.CommandFailed: Rule("_safe_copy_failed", (D.DONE,)),
        **ignored(
            ev.PeerAborted,
            ev.PeerFinished,
            ev.CancelRequested,
            ev.SwapWon,
            ev.SwapLost,
            ev.SwapUnknown,
            ev.SwapRefused,
        ),
    },
    D.RUNNING: {
        ev.PeerFinished: Rule("_finished", (D.DONE,)),
        ev.LinkLost: Rule("_finished_alone", (D.DONE,)),
        ev.MemoryDiffers: Rule("_memory_differs", (D.DONE,)),
        ev.Tick: Rule("_tick_running", (D.DONE,)),
        ev.QemuDied: Rule("_vm_lost", (D.DONE,)),
        ev.MigrationKnown: Rule("_known_while_running", (D.DESTROYING,)),
        ev.SourceConnected: Rule("_note_source_back", ()),
        **ignored(
            ev.PeerAborted,
            ev.PeerHeard,
            ev.CancelRequested,
            ev.CommandFailed,
            ev.AllPaged,
            ev.AllPlaced,
            ev.SafeCopyRead,
            ev.SwapWon,
            ev.SwapLost,
            ev.SwapUnknown,
            ev.SwapRefused,
        ),
    },
    D.DESTROYING: {
        ev.VmDestroyed: Rule("_destroyed", (D.ABORTED,)),
        ev.CommandFailed: Rule("_destroy_failed", (D.ABORTED,)),
        **ignored(
            ev.Tick,
            ev.LinkLost,
            ev.PeerAborted,
            ev.PeerHeard,
            ev.CancelRequested,
            ev.QemuDied,
            ev.Listening,
            ev.SourceConnected,
            ev.PassReceived,
            ev.LastPagesReceived,
            ev.StateReceived,
            ev.StateLoaded,
            ev.AllPaged,
            ev.AllPlaced,
            ev.MemoryDiffers,
            ev.SafeCopyRead,
            ev.MigrationKnown,
            ev.SwapWon,
            ev.SwapLost,
            ev.SwapUnknown,
            ev.SwapRefused,
        ),
    },
    D.DONE: {},
    D.ABORTED: {},
}
"""For each state the events that may come: who handles each, and which states may follow."""
