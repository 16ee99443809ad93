"""Known causes of failing starts and jobs, told by what a failing rank, ssh or mpirun said, and how it ended. No MLX.

A table, and a pure function over it. `source` says where others met the cause, or whose text it is: "mlx #3207" is an
issue or pull request of that project on GitHub, "mlx ring.cpp" a file of its sources. What concerns Macs, RDMA and
Metal we know from these alone.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

TAIL = 1 << 16  # characters at the end of the text that are looked at
# Of the machine's memory: a process that had so much and was killed was killed for it. macOS gives the GPU two thirds
# to three quarters (metal.py), and what a rank's files and the other processes need is not in its peak.
NEARLY_ALL = 2 / 3

# How a line begins that says why a process failed: Python's name of the error, our own words, what C++ says of an
# exception that nobody caught (libc++, libstdc++). A traceback's source lines are indented, and a model's answer that
# speaks of an error begins otherwise. _RAISED: what follows is the message, _SAYS: it holds what follows.
_ERROR = r"[\w.]*(?:Error|Exception): "
_RAISED = rf"^(?:{_ERROR}|m3dist: .*?(?:: |\()|libc\+\+abi: .*?: |  what\(\):  )"
_SAYS = rf"^(?:{_ERROR}|m3dist: |libc\+\+abi: |  what\(\):  ).*"
_SHELL = r"^-?(?:/\S+/)?(?:ba|da|z|k|fi|tc|c)?sh: ?(?:line \d+: |\d+: )?"  # "bash: line 1: ", "/bin/sh: 1: ", "zsh:1: "
_NO_MODULE = r"^(?:/[^:\n]*: Error while finding module .{0,200}\()?ModuleNotFoundError: No module named "
_SSH_CONNECT = r"^ssh: connect to host \S+ port \d+: "
_CONNECT = r"\[(?:ring|jaccl)\] Couldn't connect "
_RTR = r"\[jaccl\] Changing queue pair to RTR failed with errno "
_METAL = r"\[METAL\] Command buffer execution failed: .{0,200}:kIOGPUCommandBufferCallbackError"
_CRASHED = (135, 138, 139)  # SIGBUS is 7 on Linux and 10 on macOS; SIGSEGV


@dataclass(frozen=True)
class Cause:
    """What is known: `what` it is and what to do (`remedy`), a sentence each; `name` never changes."""

    name: str
    what: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Row:
    """A cause and its signs, which must all be there: each pattern in the text, the status among `statuses` (if any are
    given), and, with `memory_full`, nearly all of the machine's memory in use."""

    cause: Cause
    said: tuple[re.Pattern[str], ...]
    statuses: frozenset[int]
    memory_full: bool

    def matches(self, text: str, status: int | None, memory_full: bool) -> bool:
        if self.statuses and status not in self.statuses:
            return False
        if self.memory_full and not memory_full:
            return False
        return all(pattern.search(text) for pattern in self.said)


def recognise(
    text: str, status: int | None = None, *, peak_bytes: int | None = None, memory_bytes: int | None = None
) -> Cause | None:
    """The known cause of a failure, or None.

    `text` is the end of what the failing rank, or ssh or mpirun, wrote; `status` its exit status, 128 + S for signal S;
    `peak_bytes` the most memory it had, and `memory_bytes` what its machine has, or its part of that where several
    ranks share one.
    """
    memory_full = bool(peak_bytes and memory_bytes and peak_bytes >= NEARLY_ALL * memory_bytes)
    text = text[-TAIL:].replace("\r\n", "\n")  # as ssh ends its lines
    return next((row.cause for row in TABLE if row.matches(text, status, memory_full)), None)


def _either(*patterns: str) -> str:
    return "|".join(patterns)


def _row(
    name: str,
    *said: str,
    what: str,
    remedy: str,
    source: str,
    statuses: Collection[int] = (),
    memory_full: bool = False,
) -> Row:
    patterns = tuple(re.compile(pattern, re.MULTILINE) for pattern in said)
    return Row(Cause(name, what, remedy, source), patterns, frozenset(statuses), memory_full)


# ---------------------------------------------------------------------------------------------------------------------
# ssh

_SSH = (
    _row(
        "ssh-key-changed",
        r"^@ +WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! +@",
        what="The host answers with another key than the one this machine remembers of it.",
        remedy="If it was reinstalled or got another's address: `ssh-keygen -R HOST`, then `ssh HOST` once by hand.",
        source="OpenSSH sshconnect.c",
    ),
    _row(
        "ssh-key-unknown",
        r"^(?:No \S+ host key is known for |Host key verification failed\.)",
        what="This machine has never met the host, and ssh cannot ask whether its key is right.",
        remedy="`ssh HOST` once by hand, as the user and with the name and port of the hostfile, and accept the key.",
        source="OpenSSH sshconnect.c",
    ),
    _row(
        "ssh-too-many-keys",
        r"^Received disconnect from \S+ port \d+:\d+: Too many authentication failures",
        what="ssh offered so many keys that the host hung up before the right one.",
        remedy="In ~/.ssh/config, under `Host HOST`: `IdentitiesOnly yes` and `IdentityFile` with the right key.",
        source="OpenSSH auth.c",
    ),
    _row(
        "ssh-key-readable",
        r"^@ +WARNING: UNPROTECTED PRIVATE KEY FILE! +@",
        what="ssh ignores the private key because others may read its file.",
        remedy="`chmod 600` the file that the warning names.",
        source="OpenSSH authfile.c",
    ),
    _row(
        "ssh-config-wrong",
        r"^/[^:\n]*: line \d+: Bad configuration option: |^Bad owner or permissions on ",
        what="ssh does not accept its own configuration file.",
        remedy="Correct the line of ~/.ssh/config that it names, or `chmod 600 ~/.ssh/config`.",
        source="OpenSSH readconf.c",
    ),
    _row(
        "ssh-denied",
        r"^[^\s@]+@\S+: Permission denied \([\w,-]+\)\.",
        what="The host does not let this user in without a password.",
        remedy="`ssh-copy-id USER@HOST`; the hostfile's `user` says who, if not your own name.",
        source="OpenSSH sshconnect2.c",
    ),
    _row(
        "ssh-refused",
        _SSH_CONNECT + "Connection refused",
        what="The host is up, but nothing answers at its ssh port.",
        remedy="On a Mac turn on System Settings > General > Sharing > Remote Login, on Linux start sshd; the "
        "hostfile's `port` if it is not 22.",
        source="OpenSSH sshconnect.c",
    ),
    _row(
        "ssh-timeout",
        _SSH_CONNECT + r"(?:Connection|Operation) timed out|^Connection timed out during banner exchange",
        what="The host does not answer: off, asleep, behind a firewall, or the address is another machine's now.",
        remedy="Wake it (`caffeinate -s` or `sudo pmset -a sleep 0` keeps a Mac awake) and check the hostfile's `ssh`.",
        source="OpenSSH sshconnect.c",
    ),
    _row(
        "ssh-no-route",
        _SSH_CONNECT + "(?:No route to host|Host is down|Network is unreachable)",
        what="This machine finds no way to the host: it is off, or on another network; or macOS keeps your terminal "
        "program from the local network.",
        remedy="`ping HOST`; if that works, allow the terminal in System Settings > Privacy & Security > Local "
        "Network, or use Terminal.",
        source="Apple TN3179",
    ),
    _row(
        "ssh-name-unknown",
        r"^ssh: Could not resolve hostname ",
        what="This machine does not know the host's name.",
        remedy="Correct the hostfile's `ssh`: a name of ~/.ssh/config, a Mac's NAME.local, or an address.",
        source="OpenSSH ssh.c",
    ),
    _row(
        "ssh-hung-up",
        r"^(?:kex|ssh)_exchange_identification: |^Connection (?:closed|reset) by \S+ port \d+",
        what="Something at the ssh port hung up before the login: sshd that refuses this machine or has too many "
        "logins at once, or another program.",
        remedy="`ssh HOST true` by hand; check the hostfile's `port`, and AllowUsers and MaxStartups in the host's "
        "sshd_config.",
        source="OpenSSH kex.c",
    ),
    _row(
        "ssh-lost",
        r"^(?:client_loop: send disconnect: |Connection to \S+ closed by remote host\.|Timeout, server \S+ not resp)",
        what="The ssh connection to the host broke off: it went down or to sleep, restarted, or its link is gone.",
        remedy="`ssh HOST uptime` says whether it restarted, `m3dist doctor --hostfile H` whether its link is back.",
        source="OpenSSH clientloop.c",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# mpirun

_MPI = (
    _row(
        "mpi-daemon-missing",
        _either(
            _SHELL + r"(?:\S*/)?(?:orted|prted): (?:command not found|not found|No such file)",
            _SHELL + r"(?:command not found|no such file or directory): (?:\S*/)?(?:orted|prted)\b",
        ),
        what="mpirun's helper is not on the other host's PATH, as it is for a command over ssh.",
        remedy="Install the same Open MPI in the same place everywhere, and start mpirun by its full path, or with "
        "`--prefix DIR`.",
        source="Open MPI help-errmgr-base.txt",
    ),
    _row(
        "mpi-root",
        r"^(?:mpirun|mpiexec|orterun|prterun) has detected an attempt to run as root\.",
        what="mpirun refuses to run as root.",
        remedy="Start it as another user, or add `--allow-run-as-root`.",
        source="Open MPI orted_submit.c",
    ),
    _row(
        "mpi-option",
        _either(
            r'^(?:mpirun|mpiexec|orterun): Error: unknown option "',
            r"^An unrecognized option was included on the (?:mpirun|mpiexec|prterun) command line:",
        ),
        what="This mpirun does not know an option: Open MPI 4 and 5 have different ones.",
        remedy="`mpirun --version` and `mpirun --help`; `--output` is of version 5, `--tag-output` of version 4.",
        source="Open MPI #12216",
    ),
    _row(
        "mpi-slots",
        r"^There are not enough slots available in the system to satisfy the \d+",
        what="mpirun was asked for more ranks than its hosts have slots.",
        remedy="`slots=N` after each host of the MPI hostfile, `--host HOST:N`, or `--oversubscribe` (version 5: "
        "`--map-by :OVERSUBSCRIBE`).",
        source="Open MPI help-orte-rmaps-base.txt",
    ),
    _row(
        "mpi-program-missing",
        r"^(?:mpirun|mpiexec|orterun|prterun) was unable to find the specified executable file",
        what="mpirun did not find the program on a host.",
        remedy="Write the full path of Python, the same on every host.",
        source="Open MPI help-orterun.txt",
    ),
    _row(
        "mpi-versions",
        r"^Open MPI detected a mismatch in versions between two processes\.",
        what="The hosts have different versions of Open MPI.",
        remedy="Install the same one on all, and start mpirun by its full path; `mpirun --version` on each host.",
        source="Open MPI help-oob-tcp.txt",
    ),
    _row(
        "mpi-unreachable",
        _either(
            r"^At least one pair of MPI processes are unable to reach each other",
            r"^MPI_INIT has failed because at least one MPI process is unreachable",
        ),
        what="Open MPI found no network that two of its ranks share.",
        remedy="Name it: `--mca btl tcp,self --mca btl_tcp_if_include 192.168.1.0/24` with the hosts' own network.",
        source="Open MPI help-mca-bml-r2.txt",
    ),
    _row(
        "mpi-connect",
        r"^WARNING: Open MPI failed to TCP connect to a peer MPI process\.",
        what="Open MPI tried an address of a peer that does not answer, often a link-local or virtual interface's.",
        remedy="`--mca btl_tcp_if_include 192.168.1.0/24` with the network that all hosts share, and let its ports "
        "through the firewall.",
        source="jbornschein/mpi4py-examples #11",
    ),
    _row(
        "mpi-daemon-lost",
        r"^\S+ (?:was unable to reliably start one or more daemons|has lost communication with a remote daemon)\.",
        what="mpirun could not start its helper on another host, or lost it.",
        remedy="`ssh HOST true` must work without a question from where mpirun starts, and HOST must reach this "
        "machine in turn.",
        source="Open MPI #11830",
    ),
    _row(
        "mpi-init",
        r"^It looks like \w+(?:\(\))? failed for some reason",
        what="Open MPI could not start inside a rank.",
        remedy="Try `mpirun -n 2 PYTHON -c 'from mpi4py import MPI'`; on a Mac, where version 5 fails so, try 4.1.",
        source="Open MPI #12273, #13129",
    ),
    _row(
        "mpi-library",
        _RAISED + r"Cannot initialize MPI$",
        what="MLX found no Open MPI library.",
        remedy="Install Open MPI on the host, or set MLX_MPI_LIBNAME to the path of its libmpi in the hostfile's "
        "`env`.",
        source="mlx mpi.cpp",
    ),
    _row(
        "mpi-other",
        r"^\[mpi\] MPI found but it does not appear to be Open MPI\.",
        what="The MPI library of the host is not Open MPI, the only one that MLX can use.",
        remedy="Install Open MPI, and set MLX_MPI_LIBNAME to the path of its libmpi in the hostfile's `env`.",
        source="mlx mpi.cpp",
    ),
    _row(
        "mpi-alone",
        _RAISED + r"\[mpi\] The world has a single process\.",
        what="The rank's Open MPI is not that of mpirun, or mpirun did not start it: it sees no other ranks.",
        remedy="Start mpirun by the full path of the Open MPI whose libmpi MLX_MPI_LIBNAME names.",
        source="mlx #4210",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# Python and its packages

_PYTHON = (
    _row(
        "developer-tools-missing",
        r"^xcrun: error: invalid active developer path",
        what="/usr/bin/python3 is only a placeholder on this Mac until Apple's command line tools are there.",
        remedy="Install another Python and name it by its full path in the hostfile's `python`, or `xcode-select "
        "--install`.",
        source="dwyl/dev-setup #51",
    ),
    _row(
        "directory-missing",
        _either(_SHELL + r"cd: ", r"^zsh:cd:\d+: "),
        what="The directory to start in does not exist on the host.",
        remedy="Set the hostfile's `cwd` to one that does.",
        source="sh, bash, zsh",
    ),
    _row(
        "wrong-architecture",
        _either(
            _SHELL + r".*(?:Exec format error|bad CPU type in executable)",
            _SAYS + r"\[Errno \d+\] (?:Exec format error|Bad CPU type in executable)",
            r"^ImportError: .*incompatible architecture \(have '\w+', need '\w+'\)",
        ),
        what="Python or MLX is built for another processor: on a Mac, an Intel Python under Rosetta.",
        remedy="Install an arm64 Python and name it in the hostfile's `python`; `python -c 'import platform; "
        "print(platform.machine())'` must print arm64.",
        source="mlx #621",
    ),
    _row(
        "python-not-found",
        # Of what a launcher execs, or what Python may be called: libraries have shells try programs that are not there.
        _either(
            _SHELL + r"exec: .*(?:not found|No such file or directory)$",
            _SHELL + r"[^:\n]*py[^:\n]*: (?:command not found|not found|No such file or directory)$",
            _SHELL + r"(?:command not found|no such file or directory|Unknown command): \S*py",
        ),
        what="Python is not where it was looked for; a command over ssh has a shorter PATH than a terminal, on a Mac "
        "without Homebrew's.",
        remedy="Give the host's Python by its full path in the hostfile's `python`, such as ~/venv/bin/python.",
        source="ohmyzsh #8773",
    ),
    _row(
        "not-executable",
        _SHELL + r"exec: .*(?:Permission denied|cannot execute)",
        what="The host may not run the file that the hostfile names as Python.",
        remedy="Name the interpreter itself in the hostfile's `python`, such as ~/venv/bin/python, and `chmod +x` it.",
        source="sh, bash",
    ),
    _row(
        "python-too-old",
        r"^TypeError: unsupported operand type\(s\) for \|: 'type' and ",
        what="The host's Python is too old: m3dist needs 3.10, macOS comes with 3.9.",
        remedy="Install a newer one and m3dist for it, and name it in the hostfile's `python`.",
        source="miniflux/python-client #32",
    ),
    _row(
        "m3dist-differs",
        _either(r"^/[^:\n]*: No module named m3dist\.", _NO_MODULE + r"'m3dist\."),
        what="The host has another version of m3dist, without the part that was asked for.",
        remedy="Install the same m3dist there as here: `PYTHON -m pip install --upgrade m3dist` on HOST.",
        source="CPython runpy.py",
    ),
    _row(
        "m3dist-missing",
        _either(r"^/[^:\n]*: No module named m3dist$", _NO_MODULE + r"'m3dist'"),
        what="The host's Python has no m3dist.",
        remedy="`PYTHON -m pip install m3dist` on HOST, or name the Python that has it in the hostfile's `python`.",
        source="CPython runpy.py",
    ),
    _row(
        "mlx-missing",
        _NO_MODULE + r"'mlx(?:\.core)?'",
        what="The host's Python has no MLX, or half of it.",
        remedy="`PYTHON -m pip install --force-reinstall mlx` on HOST, on Linux 'mlx[cpu]' or 'mlx[cuda13]'.",
        source="exo #2156",
    ),
    _row(
        "mlx-backend-missing",
        r"^ImportError: libmlx\.so: cannot open shared object file",
        what="On Linux, MLX was installed without the part that computes.",
        remedy="`PYTHON -m pip install 'mlx[cpu]'`, or 'mlx[cuda13]' with an NVIDIA GPU, on HOST.",
        source="mlx #2500",
    ),
    _row(
        "macos-too-old",
        _either(
            r"^  Referenced from: .*\(built for macOS [\d.]+ which is newer than running OS\)$",
            _RAISED + r"Failed to load the default metallib\. This library is using (?:language version|a deployment)",
        ),
        what="MLX is built for a newer macOS than this Mac's.",
        remedy="Update macOS, or `PYTHON -m pip install --force-reinstall --no-cache-dir mlx mlx-metal` on this Mac.",
        source="omlx #125, mlx-examples #288",
    ),
    _row(
        "mlx-mixed",
        _either(
            r"^ImportError: dlopen\(.*(?:Library not loaded: @rpath/libmlx\.dylib|Symbol not found: __ZN3mlx)",
            _RAISED + r"Failed to load the default metallib\. [Ll]ibrary not found",
        ),
        what="Parts of MLX are missing or of different versions (mlx and mlx-metal, or another libmlx on the path).",
        remedy="`PYTHON -m pip install --force-reinstall --no-cache-dir mlx mlx-metal`, and unset DYLD_LIBRARY_PATH.",
        source="mlx #2402",
    ),
    _row(
        "glibc-too-old",
        r"^(?:ImportError|OSError): .*version `GLIBC(?:XX)?_[\d.]+' not found",
        what="This Linux is older than the one that MLX's package was built for.",
        remedy="Use a Linux with glibc 2.35 or newer (`ldd --version`), or build MLX on this one.",
        source="mlx #2954",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# The GPU of a Mac

_GPU = (
    _row(
        "metal-missing",
        _RAISED + r"\[metal::load_device\] No Metal device available\.",
        what="macOS shows this process no GPU: a virtual machine, a sandbox, or a session that has none.",
        remedy="Run it on the Mac itself, from ssh, Terminal or a LaunchAgent of a user who is logged in.",
        source="mlx #3428",
    ),
    _row(
        "metal-fast-synch",
        r"^m3dist: .*MLX_METAL_FAST_SYNCH=\S+ can lock this Mac's GPU",
        r"(?:nothing finished|finished nothing) for \d+ s",
        what="Probably the GPU waits for ever for a signal from the CPU that it missed (fence_wait), as it can with "
        "MLX_METAL_FAST_SYNCH.",
        remedy="Restart that Mac, which frees its GPU, and take MLX_METAL_FAST_SYNCH out of the hostfile's `envs`.",
        source="mlx #3142, #3830",
    ),
    _row(
        "metal-timeout",
        _RAISED + _METAL + r"(?:Timeout|Hang)\b",
        what="The GPU worked, or waited for another rank, longer on one command buffer than macOS allows, about 5 s.",
        remedy="A smaller --prefill-chunk, and MLX_MAX_OPS_PER_BUFFER=100 in the hostfile's `envs`; if another rank "
        "was late, its own output says why.",
        source="mlx #3267, exo #1429",
    ),
    _row(
        "metal-interactivity",
        _RAISED + _METAL + r"ImpactingInteractivity",
        what="macOS stopped the GPU's work because it held up the screen.",
        remedy="A smaller --prefill-chunk, and MLX_MAX_OPS_PER_BUFFER=100 in the hostfile's `envs`; or no display on "
        "that Mac.",
        source="omlx #1387",
    ),
    _row(
        "metal-out-of-memory",
        _RAISED + _METAL + r"OutOfMemory",
        what="The GPU needs more memory than macOS lets it have.",
        remedy="`sudo sysctl iogpu.wired_limit_mb=MB` raises that until the next restart; else a smaller "
        "--prefill-chunk or share (--weights), a shorter context, or another Mac.",
        source="mlx #479",
    ),
    _row(
        "metal-after-error",
        _RAISED + _METAL + r"(?:InnocentVictim|SubmissionsIgnored)",
        what="macOS reset the GPU because of an error before, perhaps of another process.",
        remedy="End what else uses that Mac's GPU, and start again; restart the Mac if it comes back.",
        source="cubist38/mlx-openai-server #169",
    ),
    _row(
        "metal-array-too-large",
        _RAISED + r"\[metal::malloc\] Attempting to allocate \d+ bytes which is greater than",
        what="One array would be larger than this GPU allows, though there may be memory enough.",
        remedy="A smaller --prefill-chunk.",
        source="exo #1048",
    ),
    _row(
        "metal-too-many-arrays",
        _RAISED + r"\[metal::malloc\] Resource limit \(\d+\) exceeded",
        what="The process holds more arrays than Metal can count, however small.",
        remedy="Start again, with a shorter context or smaller batches; it should not happen in m3dist: please report "
        "it with the context's length.",
        source="mlx-lm #831",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# jaccl: RDMA over Thunderbolt

_JACCL = (
    _row(
        "jaccl-crash",
        r"\btbt_post_(?:send|recv)\b|\blibthunderboltrdma\b",
        statuses=_CRASHED,
        what="Apple's RDMA library crashed, as it does when a Thunderbolt cable is pulled or its link drops.",
        remedy="Plug the cable in again; `ibv_devinfo` must show PORT_ACTIVE on both Macs; else restart them, or use "
        "`backend: ring`.",
        source="mlx #4192, #4319",
    ),
    _row(
        "jaccl-no-devices",
        _RAISED + r"\[jaccl\] Could not find device \S+ \(0 available\)",
        what="This Mac has no RDMA devices: RDMA is off, or its Thunderbolt or macOS is too old.",
        remedy="`rdma_ctl enable` once from Recovery (Thunderbolt 5 and macOS 26.2 or newer), or use `backend: ring`.",
        source="mlx #3777",
    ),
    _row(
        "jaccl-device-gone",
        _RAISED + r"\[jaccl\] Could not (?:find|open) device ",
        what="The hostfile's `rdma` names a device that this Mac does not have now; they change when it restarts.",
        remedy="`ibv_devices` on that Mac, and a new hostfile: `m3dist hostfile --hosts ... --backend jaccl`.",
        source="mlx #3207",
    ),
    _row(
        "jaccl-no-address",
        _RAISED + r"\[jaccl\] No IPv4-mapped GID for this device",
        what="The Thunderbolt port has no IPv4 address, and RDMA needs one on each.",
        remedy="`sudo ifconfig enN inet 169.254.0.1 netmask 255.255.0.0 alias`, another last number on each Mac; lost "
        "at its restart.",
        source="mlx #4191",
    ),
    _row(
        "jaccl-bridge",
        _RAISED + _RTR + r"22\b",
        what="RDMA refused the connection (EINVAL): the port belongs to the Thunderbolt bridge, or it or its peer has "
        "no IPv4 address.",
        remedy="On both Macs `sudo ifconfig bridge0 deletem enN`, or remove the bridge in System Settings > Network, "
        "and give enN an IPv4 address.",
        source="mlx #3207, #3467, #3389",
    ),
    _row(
        "jaccl-busy",
        _RAISED + _RTR + r"16\b",
        what="A crashed run still holds this Mac's RDMA (EBUSY).",
        remedy="Restart that Mac.",
        source="mlx #3207",
    ),
    _row(
        "jaccl-timeout",
        _RAISED + _RTR + r"60\b",
        what="The peer's RDMA port does not answer: no link, or addresses or devices have changed since the hostfile "
        "was written.",
        remedy="`ibv_devinfo` must show PORT_ACTIVE on both Macs; write a new hostfile, and restart both if that does "
        "not help.",
        source="mlx #3468, exo #1847",
    ),
    _row(
        "jaccl-stale",
        _RAISED + _RTR + r"96\b",
        what="RDMA on this Mac no longer works: after idling, a pulled cable, or many runs.",
        remedy="Pull the cable and plug it in again; restart both Macs if that does not help.",
        source="exo #1973, #1712",
    ),
    _row(
        "jaccl-no-connection",
        _RAISED + r"\[jaccl\] Changing queue pair to (?:INIT|RTR|RTS) failed with errno ",
        what="RDMA refused a connection, for a reason we have not seen.",
        remedy="`m3dist doctor --hostfile H` checks bridge, addresses and ports; restart both Macs if it finds "
        "nothing.",
        source="mlx rdma.cpp",
    ),
    _row(
        "jaccl-no-protection-domain",
        _RAISED + r"\[jaccl\] Couldn't allocate protection domain",
        what="The RDMA port is down, or runs before have used up what macOS has of them.",
        remedy="`ibv_devinfo` must show PORT_ACTIVE; if it does, restart that Mac.",
        source="mlx #3207",
    ),
    _row(
        "jaccl-too-many-regions",
        _RAISED + r"\[jaccl\] Register memory region failed",
        what="macOS registers about 100 pieces of memory an RDMA device, too few for this many ranks on one.",
        remedy="End other programs that use RDMA, use `backend: jaccl-ring`, or fewer ranks.",
        source="mlx #3162",
    ),
    _row(
        "jaccl-too-many-pairs",
        _RAISED + r"\[jaccl\] Creating the queue pair failed",
        what="macOS has about 10 connections an RDMA device, and they are taken.",
        remedy="End other programs that use RDMA, or restart that Mac.",
        source="mlx #4209",
    ),
    _row(
        "jaccl-transfer",
        _RAISED + r"\[jaccl\] (?:Send|Recv) failed with error code ",
        what="An RDMA transfer could not begin: the link went down, or the ranks sent in a different order.",
        remedy="`ibv_devinfo` must show PORT_ACTIVE on both Macs; if it does, please report it with every rank's "
        "output.",
        source="mlx-lm #1737",
    ),
    _row(
        "jaccl-peer-lost",
        _RAISED + r"\[jaccl\] (?:Send|Recv) failed with errno=",
        what="Another rank ended, or lost the network, while jaccl was starting (the errno means nothing).",
        remedy="The other ranks' output says why; otherwise as when ranks cannot connect: `m3dist doctor --hostfile "
        "H`.",
        source="exo #1847, #2111",
    ),
    _row(
        "jaccl-wiring",
        _RAISED + r"\[jaccl\] (?:The (?:devices do not form|configuration should define|JACCL mesh supports)|Up to \d)",
        what="The hostfile's `rdma` is neither a mesh (each Mac cabled to each, at most 8) nor a ring.",
        remedy="`m3dist hostfile --hosts ... --backend jaccl` writes it from the cables it finds, or use `backend: "
        "jaccl-ring`.",
        source="mlx jaccl.cpp",
    ),
    _row(
        "jaccl-not-built",
        _RAISED + r"Cannot initialize jaccl distributed backend\.",
        what="This MLX has no jaccl: Linux, or a Mac with macOS before 26.2.",
        remedy="Use `backend: ring`.",
        source="mlx no_jaccl.cpp",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# TCP: the ring, and how jaccl's ranks meet

_TCP = (
    _row(
        "port-taken",
        _RAISED + r"\[(?:ring|jaccl)\] Couldn't bind socket \(error: (?:48|98)\)",
        what="Another program on the host, or another job, has the port.",
        remedy="`lsof -nP -iTCP:PORT` there says which; m3dist launch finds free ports, mlx.launch takes "
        "--starting-port.",
        source="mlx ring.cpp",
    ),
    _row(
        "address-not-local",
        _RAISED + r"\[(?:ring|jaccl)\] Couldn't bind socket \(error: (?:49|99)\)",
        what="The hostfile's `ips` has an address that the host does not have; Thunderbolt's change when a Mac "
        "restarts.",
        remedy="`ifconfig` on that host, and correct its `ips`; `m3dist hostfile --hosts ...` writes them anew.",
        source="mlx #3207",
    ),
    _row(
        "local-network-privacy",
        _RAISED + _CONNECT + r"\(error: 65\)",
        what="macOS found no route: the peer is off or unplugged; or, if `ping` and `ssh` work, it keeps this process "
        "from the local network (tmux, a LaunchAgent, another terminal program).",
        remedy="On that Mac start it from Terminal or ssh, outside tmux, or allow its program in System Settings > "
        "Privacy & Security > Local Network.",
        source="mlx #3755, Apple TN3179",
    ),
    _row(
        "connect-timeout",
        _RAISED + _CONNECT + r"\(error: (?:60|110)\)",
        what="The peer's address does not answer: a firewall, a link that is down, another machine's address; on a Mac "
        "perhaps local network privacy.",
        remedy="`ping` and `nc -vz IP PORT` from that host, with the peer's `ips`; if both work on a Mac, start it "
        "from Terminal or ssh.",
        source="mlx #3755",
    ),
    _row(
        "connect-refused",
        _RAISED + _CONNECT + r"\(error: (?:61|111)\)",
        what="The peer was not listening: its rank had ended or not begun, or `ips` holds another address of it than "
        "the one it listens on.",
        remedy="Its rank's own output says why it was not there; else give each host one address that all reach.",
        source="exo #2309",
    ),
    _row(
        "connect-no-route",
        _RAISED + _CONNECT + r"\(error: (?:51|64|101|113)\)",
        what="The host has no way to the peer's address: the link is down, or the address is of another network.",
        remedy="`ping` from that host with the peer's `ips`; correct them so that neighbours share a network.",
        source="mlx utils.cpp",
    ),
    _row(
        "address-unreadable",
        _RAISED + r"Can't parse address \S+",
        what='An address of the ring is not "ip:port", or a name that the host does not know.',
        remedy="The hostfile's `ips` must be addresses in numbers, such as 192.168.1.11.",
        source="mlx utils.cpp",
    ),
    _row(
        "rendezvous-crash",
        r'^Current thread 0x[0-9a-f]+.*:\n  File ".*", line \d+ in wait_for_every_rank_to_join$',
        statuses=_CRASHED,
        what="MLX crashed while the ranks were meeting; jaccl does without working RDMA devices.",
        remedy="`ibv_devices` and `ibv_devinfo` on that Mac must list the hostfile's `rdma` as PORT_ACTIVE; else use "
        "`backend: ring`.",
        source="mlx #3777, #4485",
    ),
    _row(
        "rendezvous-timeout",
        r"^Timeout \(\d+:\d\d:\d\d(?:\.\d+)?\)!$",
        r'^  File ".*", line \d+ in wait_for_every_rank_to_join$',
        what="The rank waited in vain for the others: one never started, or cannot reach it.",
        remedy="The others' output says which; `m3dist doctor --hostfile H` tries the links, "
        "M3DIST_START_LIMIT=SECONDS waits longer.",
        source="m3dist comm.py",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# CUDA and NCCL

_CUDA = (
    _row(
        "cuda-out-of-memory",
        _either(_RAISED + r"cu\w+\(.{0,200}\) failed: out of memory", r"^CUDA error .*'out of memory'"),
        what="The GPU's memory is full.",
        remedy="A smaller --prefill-chunk or share (--weights), a shorter context, fewer bits, or more GPUs; "
        "`nvidia-smi` shows who else uses it.",
        source="mlx cuda/allocator.cpp",
    ),
    _row(
        "cuda-driver",
        _SAYS + r"(?:CUDA driver version is insufficient for CUDA runtime version|no CUDA-capable device is detected)",
        what="The NVIDIA driver is missing, sees no GPU, or is older than MLX's CUDA.",
        remedy="`nvidia-smi` must list the GPU; update the driver, or install the 'mlx[cuda12]' that it can run.",
        source="nunif #702",
    ),
    _row(
        "nccl-port",
        _RAISED + r"\[nccl\] (?:bind|listen)\(\) failed: ",
        what="Rank 0 cannot listen where the ranks meet: the port is taken, or the address is not this host's.",
        remedy="End the other job, and check the first host's `ips`.",
        source="mlx nccl.cpp",
    ),
    _row(
        "nccl-rendezvous",
        _RAISED + r"\[Rank \d+\] connect\(\) failed after \d+ milliseconds",
        what="A rank did not reach rank 0, where they meet.",
        remedy="Rank 0's own output says whether it started; else `nc -vz IP PORT` with the first host's `ips`.",
        source="mlx nccl.cpp",
    ),
    _row(
        "nccl-error",
        r"^NCCL error \S+:\d+ '(?!remote process exited)",
        what="NCCL could not set up or use the connection between GPUs.",
        remedy="NCCL_DEBUG=WARN in the hostfile's `envs` says what; NCCL_SOCKET_IFNAME=NAME chooses the network.",
        source="NCCL #1657",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# The hub, memory, files

_MACHINE = (
    _row(
        "experts-on-cpu",
        _RAISED + r"\[GatherMM::eval\] Currently only supports float32",
        what="MLX's CPU backend multiplies unquantised experts in float32 only.",
        remedy="Leave --dtype out, or use a quantised checkpoint.",
        source="mlx masked_mm.cpp",
    ),
    _row(
        "hub-gated",
        _either(r"^m3dist: .*\bis gated: accept its terms", r"^Cannot access gated repo for url "),
        what="The model's owner asks for consent, and this host has not shown that it was given.",
        remedy="Accept the terms on huggingface.co, then `hf auth login` on that host: a token here does not reach it.",
        source="huggingface_hub _http.py",
    ),
    _row(
        "hub-not-found",
        _either(r"^m3dist: .*\bis no directory here and not on Hugging Face", r"^Repository Not Found for url: "),
        what="There is no such directory on the host, and no such model on Hugging Face, or a private one.",
        remedy="Correct --model, which is read on every host; for a private model `hf auth login` on that host.",
        source="huggingface_hub _http.py",
    ),
    _row(
        "hub-offline",
        _either(
            r"^m3dist: .*\band Hugging Face cannot be reached",
            r"^[\w.]*(?:LocalEntryNotFoundError|OfflineModeIsEnabled): ",
        ),
        what="The model is not on the host, and the host cannot reach Hugging Face, or was told not to.",
        remedy="Copy the model there, or set HF_HOME in the hostfile's `envs` to where it is; unset HF_HUB_OFFLINE.",
        source="huggingface_hub _snapshot_download.py",
    ),
    _row(
        "hub-forbidden",
        r"^(?:m3dist: .*: )?403 Forbidden: ",
        r"^Cannot access content at: ",
        what="The host's Hugging Face token may not read this model.",
        remedy="`hf auth login` on that host, with a token that has read permission.",
        source="huggingface_hub _http.py",
    ),
    _row(
        "hub-busy",
        r"^(?:m3dist: .*: )?429 Too Many Requests",
        what="Hugging Face takes no more requests from this address for now.",
        remedy="Wait some minutes and start again: what was fetched is kept.",
        source="huggingface_hub _http.py",
    ),
    _row(
        "disk-full",
        _SAYS + r"(?:No space left on device|Disk quota exceeded)",
        what="The host's disk, or your part of it, is full.",
        remedy="`df -h` there; `hf cache rm MODEL`, or HF_HOME=DIR in the hostfile's `env` for another disk.",
        source="errno(3)",
    ),
    _row(
        "too-many-files",
        _SAYS + r"Too many open files",
        what="The process may not open more files or sockets; a LaunchAgent on a Mac may have 256.",
        remedy="`ulimit -n 4096` before the start, or SoftResourceLimits in the LaunchAgent's plist.",
        source="t3code #11055",
    ),
    _row(
        "macos-file-privacy",
        _SAYS + r"\[Errno 1\] Operation not permitted: ['\"]/(?:Users|Volumes)/",
        what="macOS keeps processes started over ssh or by launchd from Desktop, Documents, Downloads and other disks.",
        remedy="Keep the model elsewhere, such as ~/models; or System Settings > General > Sharing > Remote Login > "
        "Allow full disk access for remote users.",
        source="jamf-upload #73",
    ),
    _row(
        "out-of-memory",
        _either(
            r"^MemoryError\b",
            _SAYS + r"(?:\[malloc\] Unable to allocate \d+ bytes|MemoryError|std::bad_alloc|Cannot allocate memory)",
        ),
        what="The host has no memory left for this rank.",
        remedy="`m3dist plan --model MODEL --machines GB,GB` shows what fits; `m3dist generate --weights W,W,...` "
        "gives a rank less.",
        source="mlx #63, #2869",
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# How it ended, where nothing was said; and what others' ends look like

_ENDINGS = (
    _row(
        "out-of-memory-killed",
        statuses=(137,),
        memory_full=True,
        what="The system killed the rank, which had nearly all of the machine's memory.",
        remedy="`m3dist plan --model MODEL --machines GB,GB` shows what fits: more machines, fewer bits, a shorter "
        "context, or a smaller share by --weights.",
        source="omlx #702, omlx #2184",
    ),
    _row(
        "killed",
        statuses=(137,),
        what="The rank was killed (SIGKILL): by a person, a job scheduler, or the system for want of memory.",
        remedy="On Linux `dmesg | grep -i 'killed process'`, on a Mac `log show --last 10m --predicate 'eventMessage "
        'contains "jetsam"\'` says whether it was memory.',
        source="mattmireles/gemma-tuner-multimodal #19",
    ),
    _row(
        "native-crash",
        statuses=_CRASHED,
        what="The rank crashed in native code (SIGSEGV or SIGBUS); over jaccl that is what a lost Thunderbolt link "
        "looks like.",
        remedy="Check the cables and `ibv_devinfo` if over jaccl; try `backend: ring`; if it crashes there too, please "
        "report it with the lines above.",
        source="mlx #4192, #4319",
    ),
    _row(
        "illegal-instruction",
        statuses=(132,),
        what="MLX or NumPy uses instructions that this processor, or the emulator or virtual machine, does not have.",
        remedy="On a Mac use an arm64 Python; on an older PC build MLX from source on it.",
        source="tensorflow #17411",
    ),
    _row(
        "cpu-time-limit",
        statuses=(152,),
        what="The rank used up the CPU time it is allowed (SIGXCPU).",
        remedy="`ulimit -t unlimited` before the start, or ask for more from your job scheduler.",
        source="signal(7)",
    ),
    _row(
        "hangup",
        statuses=(129,),
        what="The terminal or ssh session that it was started from was closed (SIGHUP).",
        remedy="Start it with nohup, or as a service.",
        source="signal(7)",
    ),
    _row(
        "stopped",
        r"^rank \d+.* finished nothing for \d+ s; its process is stopped\b",
        what="The rank's process was stopped: Ctrl-Z, `kill -STOP`, a debugger, or an app that pauses others.",
        remedy="Find who stops it; `kill -CONT PID` has a stopped process go on.",
        source="m3dist judge.py",
    ),
    _row(
        "command-not-executable",
        statuses=(126,),
        what="The command was found on the host but could not be run.",
        remedy="Write `-- python FILE.py` rather than FILE.py, or `chmod +x` it.",
        source="POSIX sh",
    ),
    _row(
        "command-not-found",
        statuses=(127,),
        what="The command, or one that it runs, was not found on the host.",
        remedy="Write `-- python FILE.py` rather than FILE.py, and programs by their full path; the hostfile's "
        "`python` names Python.",
        source="POSIX sh",
    ),
    _row(
        "peer-lost",
        _either(
            _RAISED + r"\[ring\] connection to a peer was lost",
            r"^NCCL error \S+:\d+ 'remote process exited",
            r"^An MPI communication peer process has unexpectedly disconnected\.",
        ),
        what="The rank lost another one, whose process ended or whose host or link went away.",
        remedy="The other ranks' own output says why; if they say nothing either, `m3dist doctor --hostfile H` tries "
        "the links.",
        source="mlx #4060",
    ),
)

# The first that matches wins: what is particular before what is general, what went wrong before what follows from it.
TABLE = (*_SSH, *_MPI, *_PYTHON, *_GPU, *_JACCL, *_TCP, *_CUDA, *_MACHINE, *_ENDINGS)
