"""A host of the test bed: the first process of its own PID, network, mount, IPC and UTS namespaces.

network.py starts this under unshare(1), reads a line with our process ID as the machine knows it, gives us the network
device eth0, and sends a line of JSON that says what to be (`main`). We answer with sshd's process ID once it listens,
and live until standard input ends, be it that network.py closes it or dies. The kernel then ends every process of the
host, and its network and file systems, all of them in memory, go with the last one.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

MS_BIND, MS_REC = 4096, 16384  # <sys/mount.h>
OWN = {"/run": "0755", "/tmp": "1777", "/dev/shm": "1777", "/home": "0755", "/root": "0700", "/var/log": "0755"}
libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()):
        error = ctypes.get_errno()
        raise OSError(error, f"mount {source} on {target}: {os.strerror(error)}")


def show(source: int, path: str) -> None:
    """Make the directory that the descriptor `source` stands for appear as `path` too."""
    os.makedirs(path, exist_ok=True)
    mount(f"/proc/self/fd/{source}", path, flags=MS_BIND | MS_REC)


def file_systems(closed: list[str], keep: list[str]) -> None:
    """Our own /etc, homes and temporary files, and the directories `keep` where they are on the machine.

    closed: directories above those that only their owner may enter; they are laid out anew, with only `keep` in them.
    """
    sources = {path: os.open(path, os.O_PATH) for path in keep}
    hidden = {path: mode for path, mode in OWN.items() if os.path.isdir(path)} | dict.fromkeys(closed, "0755")
    for path in sorted(hidden, key=len):
        os.makedirs(path, exist_ok=True)  # it may lie in one that is hidden already
        mount("tmpfs", path, "tmpfs", options=f"mode={hidden[path]}")
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    for path, source in sources.items():
        if any(Path(path).is_relative_to(above) for above in hidden):
            show(source, path)
    subprocess.run(["cp", "-a", "/etc", "/run/etc"], check=True)
    mount("/run/etc", "/etc", flags=MS_BIND)


def move(source: int, old: str, new: str) -> None:
    """Let the directory `old`, which the descriptor `source` stands for, appear as `new` and nowhere else."""
    if new != old:
        show(source, new)
        if os.path.isdir(old):
            mount("tmpfs", old, "tmpfs")


def account(user: str, shell: str) -> None:
    """A real account, in our own /etc and /home. Without a password, but not locked: sshd refuses those that are."""
    if user == "root":
        command = ["usermod", "--shell", shell, "root"]
    else:
        command = ["useradd", "--create-home", "--no-log-init", "--password", "*", "--shell", shell, user]
    subprocess.run(command, check=True, stdout=sys.stderr)


def write(files: dict[str, tuple[int, str]], user: str) -> None:
    """The files, by path: permissions and text. What lies in the user's home is the user's."""
    home = Path(os.path.expanduser(f"~{user}"))
    for name, (mode, text) in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        path.write_text(text)
        path.chmod(mode)
        for made in (path, *path.parents):
            if made.is_relative_to(home):
                shutil.chown(made, user, user)


def start_sshd(port: int) -> int:
    """The process ID of a daemon that listens. The log is /var/log/sshd.log."""
    os.makedirs("/run/sshd", mode=0o755)
    sshd = shutil.which("sshd")
    assert sshd, "no sshd on PATH"
    daemon = subprocess.Popen([sshd, "-D", "-E", "/var/log/sshd.log"], stdin=subprocess.DEVNULL)
    while daemon.poll() is None:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return daemon.pid
        time.sleep(0.005)
    raise RuntimeError("sshd does not start: " + Path("/var/log/sshd.log").read_text())


def reap(*_: object) -> None:
    """What the first process of a system owes the children of processes that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main() -> None:
    print(os.readlink("/proc/self"), flush=True)  # /proc is still the machine's
    wanted = json.loads(sys.stdin.readline())
    socket.sethostname(wanted["name"])
    subprocess.run(["ip", "-batch", "-"], input="\n".join(wanted["ip"]), text=True, check=True)
    repository = os.open(wanted["repository"][0], os.O_PATH)
    file_systems(wanted["closed"], wanted["keep"])
    account(wanted["user"], wanted["shell"])
    move(repository, *wanted["repository"])
    write(wanted["files"], wanted["user"])
    for path, target in wanted["links"].items():
        os.symlink(target, path)
    sshd = start_sshd(wanted["port"]) if wanted["port"] else 0
    signal.signal(signal.SIGCHLD, reap)
    print(sshd, flush=True)
    sys.stdin.read()


main()
