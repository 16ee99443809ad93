"""What a host says about itself: its part of `m3dist doctor` and `m3dist hostfile`. Runs on the host. No MLX.

`python -m m3dist.doctor.probe`, started by survey.py through ssh.Remote. It interprets nothing: what its answers mean,
report.py reads. Each question has a thread, and its number stands in the answers. Questions, and what they are told:

    clock                                                clock (seconds since 1970)
    describe {model, cut, cwd, env, ips, launched_in}    report
    listen {address, secret, seconds}                    listening (a port), then measured
    connect {address, port, secret, seconds}             measured

It ends when the launcher closes the channel or has asked nothing for SILENCE seconds, and with it what it started.
"""

import getpass
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from m3dist.checkpoint import hub_id
from m3dist.cluster.agent import about, working_directory
from m3dist.cluster.channel import Channel, ChannelClosed, Message
from m3dist.cluster.environment import LaunchError
from m3dist.cluster.ssh import NOT_FROM_HERE, RUN_MODULE, channel_to_launcher
from m3dist.doctor import link
from m3dist.errors import CheckpointError
from m3dist.libmpi import mpi_library

SILENCE = 60.0  # seconds
LIMIT = 8.0  # seconds that a command may take
LONGEST = 2**20  # characters of a command's output
NOT_FOUND, TIMED_OUT = 127, 124  # as shells have it
PACKAGES = ("m3dist", "mlx", "mlx-metal", "mlx-cpu", "mlx-cuda", "mlx-cuda-12", "mlx-cuda-13", "numpy",
            "safetensors", "tokenizers", "jinja2", "huggingface_hub", "mpi4py", "mlx-lm", "transformers")  # fmt: skip
VARIABLES = ("MLX_METAL_FAST_SYNCH", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "M3DIST_STORE", "XDG_CACHE_HOME")
SYSTEM = ("/usr/sbin", "/sbin")  # where some of the commands are, which ssh does not have on PATH everywhere

# MLX can abort a process, and takes its time: it is asked in one of its own. Its MPI library is named as for a rank.
MLX = """
import json
import mlx.core as mx
available = mx.distributed.is_available
print(json.dumps({
    "version": mx.__version__,
    "device": mx.device_info(),
    "metal": mx.metal.is_available(),
    "cuda": mx.cuda.is_available(),
    "backends": [name for name in ("ring", "jaccl", "mpi", "nccl") if available(name)],
}))
"""
COMMANDS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "darwin": {
        "sw_vers": ["sw_vers"],
        "sysctl": ["sysctl", "hw.memsize", "hw.model", "machdep.cpu.brand_string", "iogpu.wired_limit_mb"],
        "vm_stat": ["vm_stat"],
        "ifconfig": ["ifconfig", "-a"],
        "hardware ports": ["networksetup", "-listallhardwareports"],
        "thunderbolt": ["system_profiler", "SPThunderboltDataType", "-json"],
        "rdma_ctl": ["rdma_ctl", "status"],
        "ibv_devices": ["ibv_devices"],
        "ibv_devinfo": ["ibv_devinfo", "-v"],
        "firewall": ["/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate"],
    },
    "linux": {
        "addresses": ["ip", "-j", "address"],
        "memory": ["cat", "/proc/meminfo"],
        "ibv_devices": ["ibv_devices"],
        "ibv_devinfo": ["ibv_devinfo", "-v"],
    },
}
ANYWHERE = {"mpirun": ["mpirun", "--version"]}

_running: set["subprocess.Popen[bytes]"] = set()


def main() -> None:
    channel, greeting = channel_to_launcher()
    try:
        channel.send({"hello": greeting["hello"]})
        while question := channel.receive(SILENCE):
            threading.Thread(target=_answer, args=(channel, question), daemon=True).start()
    except ChannelClosed:
        pass
    finally:
        for process in list(_running):
            process.kill()


def _answer(channel: Channel, question: Message) -> None:
    number = question.pop("id")
    kind, told = next(iter(question.items()))

    def tell(**answer: Any) -> None:
        with suppress(ChannelClosed):  # the launcher no longer wants to know
            channel.send({"id": number, **answer})

    try:
        if kind == "clock":
            tell(clock=time.time())
        elif kind == "describe":
            tell(report=describe(**told))
        elif kind == "listen":
            tell(measured=link.listen(**told, listening=lambda port: tell(listening=port)))
        elif kind == "connect":
            tell(measured=link.connect(**told))
    except Exception as error:  # ours: the launcher says so, instead of waiting
        tell(problem=f"{type(error).__name__}: {error}")


def describe(
    model: str | None,
    cut: Mapping[str, Any],
    cwd: str | None,
    env: Mapping[str, str],
    ips: Sequence[str],
    launched_in: str,
) -> dict[str, Any]:
    """All that doctor and hostfile want to know; what cannot be found out is told as that. Plain values only.

    `cut`: what kept.describe is to be told besides the model.
    """
    environ, directory, problem = os.environ | dict(env), os.path.expanduser("~"), None
    try:
        directory = working_directory({"cwd": cwd, "launched_in": launched_in}) or directory
    except LaunchError as error:
        problem = str(error)
    commands = {**COMMANDS.get(sys.platform, {}), **ANYWHERE}
    found = None if model is None else find_model(model, directory, environ)
    asked: dict[str, Sequence[str]] = {"mlx": ["-c", NOT_FROM_HERE + MLX]}
    if found and found["hub"]:
        asked["store"] = ["-c", RUN_MODULE, "m3dist.doctor.kept", json.dumps({"model": model, **cut})]
    with ThreadPoolExecutor(len(commands) + len(asked)) as pool:
        as_ranks = {"MLX_MPI_LIBNAME": mpi_library(), **environ}
        answers = {name: pool.submit(run, [sys.executable, *words], as_ranks) for name, words in asked.items()}
        outputs = dict(zip(commands, pool.map(run, commands.values())))
        outputs |= {name: answer.result() for name, answer in answers.items()}
    return {
        "platform": sys.platform,
        "system": f"{platform.system()} {platform.release()}",
        "hostname": socket.gethostname(),
        "user": _user(),
        "python": {"path": sys.executable, "version": platform.python_version()},
        "packages": {name: _version(name) for name in PACKAGES},
        "about": about(),
        "environ": {name: environ[name] for name in VARIABLES if name in environ},
        "directory": {"path": directory, "problem": problem},
        "model": found,
        "addresses": {ip: why_not_ours(ip) for ip in ips},
        "network": network(Path("/sys/class/net")),
        "outputs": outputs,
    }


def run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a command says: {"status", "out", "error"}, with the shells' own statuses where it said nothing.

    `environ` is the command's, where it is not ours.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM])
    program = shutil.which(command[0], path=path)
    if program is None:
        return {"status": NOT_FOUND, "out": "", "error": "not found"}
    pipe = subprocess.PIPE
    try:
        words, nothing = [program, *command[1:]], subprocess.DEVNULL
        process = subprocess.Popen(words, env=environ, stdin=nothing, stdout=pipe, stderr=pipe)
    except OSError as error:
        return {"status": NOT_FOUND, "out": "", "error": str(error)}
    _running.add(process)
    try:
        streams = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"status": TIMED_OUT, "out": "", "error": f"no answer within {LIMIT:g} s"}
    finally:
        _running.discard(process)
    out, err = (stream.decode(errors="replace")[:LONGEST] for stream in streams)
    return {"status": process.returncode, "out": out, "error": err}


def find_model(model: str, directory: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Where the whole checkpoint is or would be, how many bytes of weights are there, and how many are free there.

    "path" is None for a model that is part of the package; "hub" says that the path is in the hub's cache; "problem" is
    why one cannot look there, else None.
    """
    if model == "tiny":
        return {"path": None, "hub": False, "bytes": 0, "free": 0, "problem": None}
    # os.path says no where pathlib raises: a name too long, a directory that is not ours to look into
    path = Path(directory, os.path.expanduser(model))
    snapshot = None if os.path.isdir(path) else hub_snapshot(model, environ)
    path = snapshot or path
    existing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
    free = shutil.disk_usage(existing).free
    found = {"path": str(path), "hub": snapshot is not None, "bytes": 0, "free": free, "problem": None}
    try:
        found["bytes"] = sum(_size(file) for file in path.iterdir() if re.fullmatch(r"[^.].*\.safetensors", file.name))
    except (FileNotFoundError, NotADirectoryError):
        pass  # no byte is there
    except OSError as error:
        found["problem"] = f"{error.filename}: {error.strerror}"
    return found


def hub_snapshot(model: str, environ: Mapping[str, str]) -> Path | None:
    """Where the hub's cache has a hub id, or would have it; None for what is none."""
    try:
        repo, revision = hub_id(model)
    except CheckpointError:
        return None
    path = hub_cache(environ) / f"models--{repo.replace('/', '--')}"
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return path / "snapshots" / revision
    with suppress(OSError):
        return path / "snapshots" / (path / "refs" / (revision or "main")).read_text().strip()
    return path


def _size(file: Path) -> int:
    """Bytes; none of a link to nothing, as a download that was broken off leaves them."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads (its documentation: environment variables)."""
    cache = environ.get("XDG_CACHE_HOME", "~/.cache")
    home = environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    return Path(os.path.expanduser(environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))))


def why_not_ours(ip: str) -> str | None:
    """None for an address of this host; else why nothing can listen there."""
    with socket.socket() as here:
        try:
            here.bind((ip, 0))
        except OSError as error:
            return link.reason(error)
    return None


def network(folder: Path) -> dict[str, Any]:
    """What Linux knows of each interface beside its addresses: Mbit/s or None, and whether it is Wi-Fi."""
    found = {}
    for device in sorted(folder.glob("*")):
        speed = None
        with suppress(OSError, ValueError):  # a virtual one has none, or -1
            speed = int((device / "speed").read_text())
        found[device.name] = {"speed": speed if speed and speed > 0 else None, "wifi": (device / "wireless").exists()}
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


if __name__ == "__main__":
    main()
