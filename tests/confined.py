"""Run a module as `python -m` would, in a process that the kernel ends with SIGSYS when it opens an Internet socket.

    python confined.py MODULE [ARGUMENT …]

It needs no privilege, and sees what native code does in threads of its own, which Python's audit hooks do not. The filter is
seccomp's (https://docs.kernel.org/userspace-api/seccomp_filter.html), in classic BPF.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import runpy
import socket
import struct
import sys

# Of linux/prctl.h, linux/seccomp.h and linux/filter.h.
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
ALLOW, KILL = 0x7FFF0000, 0x80000000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
# Where struct seccomp_data has the system call's number, and the lower half of its first argument.
NUMBER, FIRST = 0, 16
SOCKET = {"x86_64": 41, "aarch64": 198}


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid_internet() -> None:
    """Let this process open sockets of this machine only; raises OSError where the kernel has no filters."""
    # Code, how many instructions to skip if equal and if not, operand.
    instructions = (
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 4, SOCKET[platform.machine()]),
        (LOAD, 0, 0, FIRST),
        (EQUAL, 1, 0, socket.AF_INET),
        (EQUAL, 0, 1, socket.AF_INET6),
        (RETURN, 0, 0, KILL),
        (RETURN, 0, 0, ALLOW),
    )
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    program = Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    for option, first, second in ((PR_SET_NO_NEW_PRIVS, 1, None), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(option, ctypes.c_ulong(first), second, ctypes.c_ulong(0), ctypes.c_ulong(0)):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    forbid_internet()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
