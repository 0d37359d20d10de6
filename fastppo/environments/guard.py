"""Runs one piece of Python code in a process of its own, with limits; a program for `PythonRunner`, not a module.

    python -I -S guard.py '{"isolation": ..., ...}' < code

The guard starts the code as another user or inside new namespaces, ends it and everything it has started when its time
is up, and says on the descriptor `status` how it ended. Standard library only: it starts in a few milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from typing import Any

# From the kernel's headers.
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
BIND, RECURSIVE, PRIVATE, NO_SUID, NO_DEVICES = 4096, 16384, 1 << 18, 2, 4
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
READ_ONLY_NO_SUID = (ctypes.c_uint64 * 4)(1 | 2, 0, 0, 0)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
# What a Python needs of the machine besides its own folder.
PATHS = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")

Settings = dict[str, Any]
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library; raise OSError if it fails."""
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2) with Python strings."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    call("mount", *encoded[:3], ctypes.c_ulong(flags), encoded[3])


def unshare() -> None:
    """Enter new namespaces: own processes, mounts and network. Anybody but root needs a user namespace for that."""
    user, group = os.geteuid(), os.getegid()
    flags = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    call("unshare", flags if user == 0 else flags | NEW_USER)
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build_root(settings: Settings) -> None:
    """Make the folder a root with Python in it, read-only, and an empty /tmp of limited size; move there."""
    root = settings["folder"]
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for path in (*PATHS, settings["prefix"]):
        target = root + path
        if not os.path.exists(path) or os.path.lexists(target):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target) if os.path.isdir(path) else open(target, "w").close()
        mount(path, target, None, BIND | RECURSIVE)
    os.mkdir(root + "/tmp")
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(root), AT_RECURSIVE, READ_ONLY_NO_SUID, 32)
    mount("tmpfs", root + "/tmp", "tmpfs", NO_SUID | NO_DEVICES, f"size={settings['disk']},nr_inodes=1000,mode=777")
    os.chroot(root)
    os.chdir("/tmp")


def limit(settings: Settings) -> None:
    """Set the limits of this process and of those that it will start."""
    limits = {
        resource.RLIMIT_CPU: int(settings["timeout"]) + 1,
        resource.RLIMIT_FSIZE: settings["file_size"],
        resource.RLIMIT_NOFILE: settings["files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: settings["memory"],
        resource.RLIMIT_NPROC: settings["processes"] + (others() if settings["isolation"] == "none" else 0),
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def others() -> int:
    """Count the threads of this user, which count against the limit of processes where nothing separates them."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue  # it has ended
    return count


def run_code(settings: Settings) -> None:
    """Become the code: drop what it must not have, and start Python anew. Never returns."""
    try:
        os.setsid()
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        limit(settings)
        if settings["user"]:
            os.setgroups([])
            os.setgid(settings["user"])
            os.setuid(settings["user"])
        if sys.platform == "linux":
            call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        python = settings["python"]
        os.execve(python, [python, "-I", "-S", "-B", "-X", "utf8", "main.py"], {})
    except BaseException as error:
        os.write(2, f"the code was not started: {error}\n".encode())
    os._exit(127)


def start(settings: Settings, code: bytes) -> int:
    """Start the code where it is to run; return its process, in new namespaces the first one there."""
    is_apart = settings["isolation"] == "namespaces"
    if is_apart:
        unshare()
    process = os.fork()
    if process:
        return process
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if is_apart:
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            build_root(settings)
        else:
            os.chdir(settings["folder"])
        with open("main.py", "wb") as file:
            file.write(code)
        os.chmod("main.py", 0o644)
        inner = os.fork() if is_apart else 0
        if not inner:
            run_code(settings)
        # The first process of its namespace: when it ends, the kernel ends all others there.
        reaped, result = os.wait()
        while reaped != inner:
            reaped, result = os.wait()
        os._exit(exit_code(result))
    except BaseException as error:
        os.write(settings["status"], json.dumps({"error": str(error)}).encode())
    os._exit(127)


def exit_code(result: int) -> int:
    """Return the exit code of a wait status as a shell gives it."""
    code = os.waitstatus_to_exitcode(result)
    return code if code >= 0 else 128 - code


def descendants() -> list[int]:
    """Return the processes that this one has started and those that these have, daemons included."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rsplit(b")", 1)[1].split()[1])
            except OSError:
                continue  # it has ended
    found: list[int] = []
    front = {os.getpid()}
    while front:
        front = {process for process, parent in parents.items() if parent in front}
        found += front
    return found


def end_all(process: int) -> None:
    """Kill everything that was started, until nothing is left of it; each reappears here when its parent has gone."""
    for kill, target in ((os.kill, process), (os.killpg, process)):
        try:
            kill(target, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    for _ in range(200):
        left = descendants()
        for child in left:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        time.sleep(0.002)


def main() -> None:
    """Run the code and report."""
    settings = json.loads(sys.argv[1])
    os.set_inheritable(settings["status"], False)
    code = sys.stdin.buffer.read()
    report: Settings = {"ended": "timeout"}
    process = 0

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        if sys.platform == "linux":
            call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.setitimer(signal.ITIMER_REAL, settings["timeout"])
        process = start(settings, code)
        while True:
            reaped, result = os.wait()
            if reaped == process:
                report = {"ended": "exit", "code": exit_code(result)}
                break
    except TimeoutError:
        pass
    except OSError as error:
        report = {"error": str(error)}
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if process:
        end_all(process)
    os.write(settings["status"], json.dumps(report).encode())


if __name__ == "__main__":
    main()
