"""Whose rights QEMU has."""

from __future__ import annotations

import grp
import pwd

from transhume.model.errors import Refused


def user_rights(vm_user: str) -> tuple[int, int, list[int]]:
    """User, group and further groups that QEMU gets: `kvm`, where that group exists, and nothing else."""
    try:
        entry = pwd.getpwnam(vm_user)
    except KeyError:
        raise Refused(f"there is no user {vm_user} for QEMU to run as: run the set-up again") from None
    try:
        further = [grp.getgrnam("kvm").gr_gid]
    except KeyError:
        further = []
    return entry.pw_uid, entry.pw_gid, further
