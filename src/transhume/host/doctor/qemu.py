"""QEMU: is it there, new enough, and does it start in its sandbox as the user of the VMs?"""

from __future__ import annotations

from dataclasses import dataclass

from transhume.model.errors import Refused, VmmError
from transhume.model.finding import Finding, error, ok
from transhume.vmm.bare_qemu import bare_qemu
from transhume.vmm.command_line import DEFAULT_BINARY, SANDBOX
from transhume.vmm.rights import user_rights

OLDEST = (7, 2)
START_LIMIT_S = 10.0


@dataclass(frozen=True)
class QemuState:
    """`version` is empty when QEMU does not start at all; `failure` says why. `user_failure`: there is no
    such user. `sandbox_failure`: it starts, but not in the sandbox as that user.
    """

    vm_user: str
    version: str = ""
    has_q35: bool = False
    failure: str = ""
    user_failure: str = ""
    sandbox_failure: str = ""

    @property
    def sound(self) -> bool:
        """Whether it is worth while to ask QEMU more."""
        return bool(self.version) and self.has_q35 and not self.user_failure


async def gather(vm_user: str, binary: str = DEFAULT_BINARY) -> QemuState:
    """Start QEMU without a machine, once as it is and once as VMs have it."""
    user_failure = ""
    try:
        user_rights(vm_user)
    except Refused as refusal:
        user_failure = refusal.message
    try:
        async with bare_qemu(binary, deadline_s=START_LIMIT_S) as qmp:
            version = qmp.version
            machines = await qmp.execute("query-machines")
    except VmmError as failure:
        return QemuState(vm_user, failure=failure.message, user_failure=user_failure)
    has_q35 = any(machine.get("alias") == "q35" for machine in machines)
    sandbox_failure = ""
    if not user_failure:
        try:
            async with bare_qemu(
                binary, ("-sandbox", SANDBOX), user=vm_user, deadline_s=START_LIMIT_S
            ) as qmp:
                await qmp.execute("query-status")
        except VmmError as failure:
            sandbox_failure = failure.message
    return QemuState(vm_user, version, has_q35, "", user_failure, sandbox_failure)


def judge(state: QemuState) -> list[Finding]:
    findings = []
    if state.user_failure:
        findings.append(
            error(
                "vm-user",
                f"there is no user {state.vm_user} for QEMU to run as",
                f"useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {state.vm_user}",
            )
        )
    if not state.version:
        mend = "install QEMU for x86 systems (Debian: apt install qemu-system-x86)"
        return [error("qemu", f"QEMU does not start: {state.failure}", mend), *findings]
    numbers = tuple(int(number) for number in state.version.split(".")[:2])
    if numbers < OLDEST:
        findings.append(
            error(
                "qemu", f"QEMU is {state.version}, and 7.2 is the oldest that will do", "install a newer QEMU"
            )
        )
    if not state.has_q35:
        findings.append(
            error("qemu", f"this QEMU ({state.version}) has no q35 machine", "install QEMU for x86 systems")
        )
    if state.sandbox_failure:
        findings.append(
            error(
                "sandbox",
                f"QEMU does not start in its sandbox as {state.vm_user}: {state.sandbox_failure}",
                "install a QEMU that was built with seccomp, and let that user read and execute it",
            )
        )
    if not findings:
        findings.append(ok("qemu", f"QEMU {state.version} starts in its sandbox as {state.vm_user}"))
    return findings
