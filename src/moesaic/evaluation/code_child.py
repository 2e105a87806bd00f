"""The process that runs one program within limits; `code_runner` starts it as a script, and nothing imports it.

Standard input has a JSON object `{nonce, source, verdict, cpu_seconds, memory_bytes, namespaces}`; `{nonce, error}`
goes into the pipe `verdict` once the program has run to its end, or has raised. What a model wrote may be wrong in any
way; this keeps it from doing harm by mistake, and is no sandbox against malice.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import sys
from collections.abc import Callable
from types import ModuleType

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 0x1000, 0x4000, 0x40000, -100, 0x8000, 1
MOUNT_SETATTR = 442
"""A system call's number on every processor, of `<linux/mount.h>` as the constants above; since Linux 5.12."""
MOST_PROCESSES, MOST_FILES, MOST_FILE_BYTES, MOST_WORDS = 16, 128, 16 * 2**20, 200
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.chmod": {0: 2}, "os.chown": {0: 3}, "os.link": {1: 3}, "os.mkdir": {0: 2}, "os.remove": {0: 1},
    "os.removexattr": {0: None}, "os.rename": {0: 2, 1: 3}, "os.rmdir": {0: 1}, "os.setxattr": {0: None},
    "os.symlink": {1: 2}, "os.truncate": {0: None}, "os.utime": {0: 3}, "sqlite3.connect": {0: None},
}  # fmt: skip
"""Python's audit events that change files: which arguments are the paths, and which the open folders they begin at."""
REFUSED = (
    "ctypes.dlopen", "os.exec", "os.forkpty", "os.kill", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn",
    "signal.pthread_kill", "socket.", "subprocess.", "webbrowser.",
)  # fmt: skip
"""What audit events begin with that no exercise needs: the network, other programs, signals to others."""


def limit(cpu_seconds: int, memory_bytes: int, apart: bool) -> None:
    """Set the limits of this process and of those that it starts."""
    if apart:  # elsewhere this limit counts all processes of the user
        resource.setrlimit(resource.RLIMIT_NPROC, (4 * MOST_PROCESSES,) * 2)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, MOST_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class MountAttributes(ctypes.Structure):
    """`struct mount_attr`."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user")]


def leave_system(folder: str) -> bool:
    """Leave the machine's network, and make all files but those of `folder` read-only, where the kernel lets us.

    Returns:
        Whether this process has namespaces of its own, of users, network and mounts.
    """
    if sys.platform != "linux":
        return False
    libc, path = ctypes.CDLL(None), folder.encode()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC):
        return False
    closed, opened = MountAttributes(set=READ_ONLY), MountAttributes(clear=READ_ONLY)
    size = ctypes.c_size_t(ctypes.sizeof(MountAttributes))
    if not libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) and not libc.mount(path, path, None, MS_BIND, None):
        libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(closed), size)
        libc.syscall(MOUNT_SETATTR, AT_FDCWD, path, 0, ctypes.byref(opened), size)
        os.chdir(folder)  # the mount over the folder, not what is below it
    return True


def guard(folder: str) -> Callable[[str, tuple[object, ...]], None]:
    """Make the audit hook: no network, no other program, few processes, and files change within `folder` alone."""
    real, join, decode, read, link = os.path.realpath, os.path.join, os.fsdecode, os.read, os.readlink
    inside, null = join(real(folder), ""), os.devnull
    places, filled = os.pipe()  # shared with forked processes, which a count would not be
    os.write(filled, b"." * MOST_PROCESSES)
    os.set_blocking(places, False)

    def check(path: object, start: object) -> None:
        if isinstance(path, str | bytes | os.PathLike):  # else a number: of a file that is open
            begins = "" if start in (None, -1) else link(f"/proc/self/fd/{start}")
            found = real(join(begins, decode(path)))
            if found != null and not found.startswith(inside):
                raise PermissionError(errno.EACCES, "the program may write in its own folder only", found)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            flags = arguments[2]
            if isinstance(flags, int) and flags & WRITES:
                check(arguments[0], None)
        elif event in CHANGES:
            for number, start in CHANGES[event].items():
                check(arguments[number], None if start is None else arguments[start])
        elif event == "os.fork":
            try:
                read(places, 1)
            except OSError:
                raise PermissionError(f"the program may start {MOST_PROCESSES} processes at most") from None
        elif event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused to programs that a model wrote")

    return hook


def named_only(open_: Callable[..., int]) -> Callable[..., int]:
    """Make an `os.open` that writes no file named from an open folder, which the audit hook is not told."""

    def opened(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None and flags & WRITES:
            raise PermissionError("the program may not write by dir_fd")
        return open_(path, flags, mode, dir_fd=dir_fd)

    return opened


def stay(*_: object) -> None:
    """Refuse to leave the process group, all of which is killed at the end."""
    raise PermissionError("the program may not leave its process group")


def words(error: BaseException) -> str:
    """Say what was raised, in one short line."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # an exception of the program's own may raise anything
        text = ""
    return f"{type(error).__name__}: {text}"[:MOST_WORDS].removesuffix(": ")


def main() -> None:
    """Run the program that standard input has."""
    order = json.loads(sys.stdin.buffer.read())
    nonce, verdict, write, leave, dumps = order["nonce"], order["verdict"], os.write, os._exit, json.dumps
    number, own = os.getpid, os.getpid()
    module = ModuleType("program")
    sys.modules["program"] = module
    apart = order["namespaces"] and leave_system(os.getcwd())
    limit(order["cpu_seconds"], order["memory_bytes"], apart)
    for name, guarded in {"setsid": stay, "setpgid": stay, "setpgrp": stay, "open": named_only(os.open)}.items():
        setattr(os, name, guarded)
    sys.addaudithook(guard(os.getcwd()))
    error = None
    try:
        exec(compile(order.pop("source"), "program", "exec"), module.__dict__)
    except BaseException as raised:  # sys.exit too: it ends before the tests do
        error = words(raised)
    if number() == own:  # a process that the program forked has no say
        write(verdict, dumps({"nonce": nonce, "error": error}).encode())
    leave(0)


if __name__ == "__main__":
    main()
