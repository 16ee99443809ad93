"""The table of known causes, against what was really said: recorded on Linux by us, or quoted from where `origin` says.

"as FILE writes it" is a message put together from the sources that print it; we could not have it happen here. Where an
issue quotes only MLX's words, Python's name of the error was put before them: ValueError for C++'s invalid_argument.
"""

import itertools
import re
import time
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist.cluster.causes import NEARLY_ALL, TABLE, TAIL, recognise

GIB = 2**30


class Sample(NamedTuple):
    cause: str
    origin: str
    text: str
    status: int | None = None
    peak: int | None = None  # bytes
    memory: int | None = None  # bytes

    def recognised(self, text: str | None = None, status: int | None = None) -> str | None:
        """The name of the cause that is seen in it, or in `text` instead of its own."""
        cause = recognise(
            self.text if text is None else text,
            self.status if status is None else status,
            peak_bytes=self.peak,
            memory_bytes=self.memory,
        )
        return cause and cause.name


SSH = [
    Sample(
        "ssh-key-changed",
        "recorded, OpenSSH 9.2",
        "@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r\n"
        "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\r\n"
        "@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r\n"
        "IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!\r\n"
        "Host key for [127.0.0.1]:22471 has changed and you have requested strict checking.\r\n"
        "Host key verification failed.\r\n",
        255,
    ),
    Sample(
        "ssh-key-unknown",
        "recorded, OpenSSH 9.2, StrictHostKeyChecking=yes",
        "No ED25519 host key is known for [127.0.0.1]:22471 and you have requested strict checking.\r\n"
        "Host key verification failed.\r\n",
        255,
    ),
    Sample("ssh-key-unknown", "recorded, OpenSSH 9.2, BatchMode", "Host key verification failed.\r\n", 255),
    Sample(
        "ssh-too-many-keys",
        "recorded, OpenSSH 9.2",
        "Received disconnect from 127.0.0.1 port 22471:2: Too many authentication failures\r\n"
        "Disconnected from 127.0.0.1 port 22471\r\n",
        255,
    ),
    Sample(
        "ssh-key-readable",
        "recorded, OpenSSH 9.2",
        "@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @\r\n"
        "Permissions 0644 for '/root/.ssh/id_ed25519' are too open.\r\n"
        "root@127.0.0.1: Permission denied (publickey,keyboard-interactive).\r\n",
        255,
    ),
    Sample(
        "ssh-config-wrong",
        "recorded, OpenSSH 9.2",
        "/root/.ssh/config: line 1: Bad configuration option: foo\r\n"
        "/root/.ssh/config: terminating, 1 bad configuration options\r\n",
        255,
    ),
    Sample(
        "ssh-config-wrong", "as OpenSSH readconf.c writes it", "Bad owner or permissions on /home/me/.ssh/config\r\n"
    ),
    Sample(
        "ssh-denied",
        "recorded, OpenSSH 9.2",
        "root@127.0.0.1: Permission denied (publickey,keyboard-interactive).\r\n",
        255,
    ),
    Sample("ssh-refused", "recorded", "ssh: connect to host 127.0.0.1 port 1: Connection refused\r\n", 255),
    Sample(
        "ssh-timeout",
        "WeChatRedEnvelop #18, on a Mac",
        "ssh: connect to host 10.26.162.117 port 22: Operation timed out\r\n",
    ),
    Sample(
        "ssh-timeout",
        "recorded, a port that says nothing",
        "Connection timed out during banner exchange\r\nConnection to 127.0.0.1 port 22474 timed out\r\n",
        255,
    ),
    Sample(
        "ssh-no-route",
        "freeman.vc, local network privacy in another terminal than Terminal",
        "ssh: connect to host 192.168.1.60 port 22: No route to host\r\n",
    ),
    Sample(
        "ssh-name-unknown",
        "recorded",
        "ssh: Could not resolve hostname no-such-host.invalid: Name or service not known\r\n",
        255,
    ),
    Sample(
        "ssh-hung-up",
        "recorded, a port that hangs up",
        "kex_exchange_identification: read: Connection reset by peer\r\nConnection reset by 127.0.0.1 port 22472\r\n",
        255,
    ),
    Sample("ssh-lost", "recorded, sshd killed", "Connection to 127.0.0.1 closed by remote host.\r\n", 255),
]

MPI = [
    Sample(
        "mpi-daemon-missing",
        "recorded, Open MPI 4.1.4",
        "bash: line 1: orted: command not found\n"
        "--------------------------------------------------------------------------\n"
        "ORTE was unable to reliably start one or more daemons.\n"
        "This usually is caused by:\n",
        127,
    ),
    Sample("mpi-daemon-missing", "zsh's words for it, as in ohmyzsh #8773", "zsh:1: command not found: prted\n", 127),
    Sample(
        "mpi-root",
        "recorded, Open MPI 4.1.4",
        "--------------------------------------------------------------------------\n"
        "mpirun has detected an attempt to run as root.\n",
        1,
    ),
    Sample(
        "mpi-option",
        "recorded, Open MPI 4.1.4",
        "mpirun: Error: unknown option \"--output\"\nType 'mpirun --help' for usage.\n",
        1,
    ),
    Sample(
        "mpi-option",
        "easybuild-easyconfigs #24363, Open MPI 5.0.3",
        "--------------------------------------------------------------------------\n"
        "An unrecognized option was included on the mpirun command line:\n\n  Option: -e\n",
    ),
    Sample(
        "mpi-slots",
        "recorded, Open MPI 4.1.4",
        "There are not enough slots available in the system to satisfy the 64\n"
        "slots that were requested by the application:\n",
        1,
    ),
    Sample(
        "mpi-program-missing",
        "recorded, Open MPI 4.1.4",
        "mpirun was unable to find the specified executable file, and therefore\n"
        "did not launch the job.  This error was first reported for process\n"
        "rank 0; it may have occurred for other processes as well.\n",
        134,
    ),
    Sample(
        "mpi-versions",
        "as Open MPI help-oob-tcp.txt writes it",
        "Open MPI detected a mismatch in versions between two processes.  This\n"
        'typically means that you executed "mpirun" (or "mpiexec") from one\n',
    ),
    Sample(
        "mpi-unreachable",
        "recorded, Open MPI 4.1.4, --mca btl self",
        "At least one pair of MPI processes are unable to reach each other for\n"
        "MPI communications.  This means that no Open MPI device has indicated\n"
        "  Process 1 ([[23947,1],0]) is on host: vm\n"
        "  BTLs attempted: self\n",
    ),
    Sample(
        "mpi-unreachable",
        "recorded, Open MPI 4.1.4, --mca btl self",
        "MPI_INIT has failed because at least one MPI process is unreachable\n"
        "from another.  This *usually* means that an underlying communication\nplugin -- such as a BTL or an MTL\n",
    ),
    Sample(
        "mpi-connect",
        "jbornschein/mpi4py-examples #11",
        "WARNING: Open MPI failed to TCP connect to a peer MPI process.  This\nshould not happen.\n\n"
        "Your Open MPI job may now fail.\n\n  Local host: pi02\n  PID:        24783\n"
        "  Message:    connect() to 169.254.140.13:1026 failed\n"
        "  Error:      Resource temporarily unavailable (11)\n",
    ),
    Sample(
        "mpi-daemon-lost",
        "Open MPI #11830",
        "ORTE has lost communication with a remote daemon.\n\n"
        "  HNP daemon   : [[32679,0],0] on node ip-172-31-45-184\n",
    ),
    Sample("mpi-daemon-lost", "recorded, Open MPI 4.1.4", "ORTE was unable to reliably start one or more daemons.\n"),
    Sample(
        "mpi-init",
        "Open MPI #12273, version 5.0.1 on macOS",
        "It looks like MPI_INIT failed for some reason; your parallel process is\n"
        "likely to abort.  There are many reasons that a parallel process can\n"
        '  PML add procs failed\n  --> Returned "Not found" (-13) instead of "Success" (0)\n',
    ),
    Sample("mpi-library", "recorded, mlx 0.32.4", "RuntimeError: Cannot initialize MPI\n", 1),
    Sample(
        "mpi-other",
        "as mlx mpi.cpp writes it",
        "[mpi] MPI found but it does not appear to be Open MPI.MLX requires Open MPI but this is MPICH Version: 4.2\n",
    ),
    Sample(
        "mpi-alone",
        "recorded, mlx 0.32.4",
        "RuntimeError: [mpi] The world has a single process. Launch with mpirun to initialize the mpi backend.\n",
        1,
    ),
]

PYTHON = [
    Sample(
        "developer-tools-missing",
        "dwyl/dev-setup #51",
        "xcrun: error: invalid active developer path (/Library/Developer/CommandLineTools), missing xcrun at: "
        "/Library/Developer/CommandLineTools/usr/bin/xcrun\n",
        1,
    ),
    Sample("directory-missing", "recorded, bash", "bash: line 1: cd: /no/such/dir: No such file or directory\n", 1),
    Sample(
        "directory-missing",
        "zsh's words, in many logs on GitHub",
        "zsh:cd:1: no such file or directory: /Users/me/m3\n",
        1,
    ),
    Sample("directory-missing", "recorded, dash", "dash: 1: cd: can't cd to /no/such/dir\n", 2),
    Sample("wrong-architecture", "recorded, dash", "/bin/sh: 1: exec: /opt/python3: Exec format error\n", 126),
    Sample("wrong-architecture", "recorded, Python", "OSError: [Errno 8] Exec format error: '/opt/python3'\n", 1),
    Sample(
        "wrong-architecture",
        "mlx #621",
        "ImportError: dlopen(/Library/Frameworks/Python.framework/Versions/3.11/lib/python3.11/site-packages/mlx/"
        "core.cpython-311-darwin.so, 0x0002): tried: '/Library/Frameworks/Python.framework/Versions/3.11/lib/python3.11"
        "/site-packages/mlx/core.cpython-311-darwin.so' (mach-o file, but is an incompatible architecture (have "
        "'arm64', need 'x86_64'))\n",
        1,
    ),
    Sample("python-not-found", "recorded, dash", "/bin/sh: 1: exec: /no/such/interpreter: not found\n", 127),
    Sample("python-not-found", "recorded, bash", "bash: line 1: exec: no-such-python3: not found\n", 127),
    Sample("python-not-found", "recorded, bash", "bash: line 1: no-such-python3: command not found\n", 127),
    Sample("python-not-found", "recorded, bash", "bash: line 1: /no/such/python3: No such file or directory\n", 127),
    Sample("python-not-found", "recorded, dash", "dash: 1: no-such-python3: not found\n", 127),
    Sample("python-not-found", "zsh's words, as in ohmyzsh #8773", "zsh:1: command not found: python3\n", 127),
    Sample(
        "python-not-found",
        "zsh's words, as in Phosphene #28",
        "zsh:1: no such file or directory: ./env/bin/python\n",
        127,
    ),
    Sample(
        "python-not-found", "fish's words, in many configurations on GitHub", "fish: Unknown command: python\n", 127
    ),
    Sample(
        "not-executable",
        "recorded, bash",
        "bash: line 1: /home/me/venv: Permission denied\n"
        "bash: line 1: exec: /home/me/venv: cannot execute: Permission denied\n",
        126,
    ),
    Sample("not-executable", "recorded, dash", "/bin/sh: 1: exec: /home/me/venv: Permission denied\n", 126),
    Sample(
        "python-too-old",
        "invisible_playwright_mcp #7, Python 3.9",
        "TypeError: unsupported operand type(s) for |: 'type' and 'NoneType'\n",
        1,
    ),
    Sample("m3dist-differs", "recorded", "/usr/bin/python3: No module named m3dist.cluster.agent\n", 1),
    Sample(
        "m3dist-differs",
        "recorded",
        "/usr/bin/python3: Error while finding module specification for 'm3dist.cluster.agent' (ModuleNotFoundError: "
        "No module named 'm3dist.cluster')\n",
        1,
    ),
    Sample(
        "m3dist-missing",
        "recorded",
        "/usr/bin/python3: Error while finding module specification for 'm3dist.cluster.agent' (ModuleNotFoundError: "
        "No module named 'm3dist')\n",
        1,
    ),
    Sample("m3dist-missing", "recorded", "ModuleNotFoundError: No module named 'm3dist'\n", 1),
    Sample("m3dist-missing", "recorded", "/usr/bin/python3: No module named m3dist\n", 1),
    Sample("mlx-missing", "recorded", "ModuleNotFoundError: No module named 'mlx'\n", 1),
    Sample(
        "mlx-backend-missing",
        "mlx #2390",
        "    from mlx.core import __version__\n"
        "ImportError: libmlx.so: cannot open shared object file: No such file or directory\n",
        1,
    ),
    Sample(
        "macos-too-old",
        "mlx-examples #288",
        "ImportError: dlopen(/PATH/lib/python3.11/site-packages/mlx/core.cpython-311-darwin.so, 0x0002): Symbol not "
        "found: _cblas_sgemm$NEWLAPACK\n"
        "  Referenced from: <8AC9CE5F-E0BC-32A1-A743-E6729024D190> /PATH/lib/python3.11/site-packages/mlx/lib/"
        "libmlx.dylib (built for macOS 13.3 which is newer than running OS)\n",
        1,
    ),
    Sample(
        "macos-too-old",
        "mlxstudio #104",
        "RuntimeError: Failed to load the default metallib. This library is using language version 4.0 which is not "
        "supported on this OS. library not found library not found library not found\n",
    ),
    Sample(
        "mlx-mixed",
        "mlx #2402",
        "ImportError: dlopen(/Users/michael/venv2/lib/python3.13/site-packages/mlx/core.cpython-313-darwin.so, "
        "0x0002): Library not loaded: @rpath/libmlx.dylib\n"
        "  Referenced from: <4A900F73-B9D2-3E99-A6C1-329FD9D9503C> /Users/michael/venv2/lib/python3.13/site-packages/"
        "mlx/core.cpython-313-darwin.so\n",
        1,
    ),
    Sample(
        "mlx-mixed",
        "LTX-2-MLX #16, a libmlx of Homebrew's beside mlx 0.30.0",
        "ImportError: dlopen(/Users/jsissom/LTX-2-MLX/.venv/lib/python3.14/site-packages/mlx/core.cpython-314-darwin.so"
        ", 0x0002): Symbol not found: __ZN3mlx4core10dequantizeERKNS0_5arrayES3_RKNSt3__18optionalIS1_EE\n"
        "  Expected in:     <D5FA71F7-4EE9-3667-B998-CCBB49306A1A> /opt/homebrew/Cellar/mlx/0.31.1/lib/libmlx.dylib\n",
    ),
    Sample(
        "mlx-mixed",
        "mlx's words in flux.swift.cli #4",
        "RuntimeError: Failed to load the default metallib. library not found library not found library not found\n",
        1,
    ),
    Sample(
        "glibc-too-old",
        "coremltools #1549, the same words of the loader",
        "ImportError: /lib64/libstdc++.so.6: version `GLIBCXX_3.4.20' not found (required by /opt/_internal/"
        "cpython-3.9.13/lib/python3.9/site-packages/coremltools/libmodelpackage.so)\n",
        1,
    ),
]

GPU = [
    Sample(
        "metal-missing",
        "as mlx metal/device.cpp writes it",
        "RuntimeError: [metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, "
        "or virtualized macOS sessions where the GPU is not accessible.\n",
        1,
    ),
    Sample(
        "metal-fast-synch",
        "as rank.py and watchdog.py write it",
        "m3dist: rank 1 on mac2.local: MLX_METAL_FAST_SYNCH=1 can lock this Mac's GPU until it is restarted (mlx "
        "issues #3142 and #3830); unset it, also in the hostfile's envs\n"
        "m3dist: rank 1 of 2: nothing finished for 120 s in decode step 7; a peer stalled or is gone\n",
        76,
    ),
    Sample(
        "metal-timeout",
        "omlx #2029",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
        "failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).\n",
        134,
    ),
    Sample(
        "metal-interactivity",
        "LTX-2-MLX #5",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
        "failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)\n",
        134,
    ),
    Sample(
        "metal-out-of-memory",
        "mlx #479",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
        "failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)\n",
        134,
    ),
    Sample(
        "metal-after-error",
        "cubist38/mlx-openai-server #169",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
        "failed: Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)\n"
        "./start_minimax.sh: line 1: 19516 Abort trap: 6           mlx-openai-server launch\n",
        134,
    ),
    Sample(
        "metal-array-too-large",
        "lmstudio-bug-tracker #2240",
        "RuntimeError: [metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum "
        "allowed buffer size of 30150672384 bytes.\n",
        1,
    ),
    Sample(
        "metal-too-many-arrays",
        "mlx-lm #1644",
        "RuntimeError: [metal::malloc] Resource limit (499000) exceeded.\n",
        1,
    ),
]

JACCL = [
    Sample(
        "jaccl-crash",
        "mlx #4192, its report of the crash",
        "EXC_BAD_ACCESS  SIGSEGV  KERN_INVALID_ADDRESS at 0x0000000104ac4008\n"
        "libthunderboltrdma.dylib  tbt_post_recv\n"
        "jaccl::Connection::post_recv(jaccl::SharedBuffer const&, unsigned long long)\n",
        139,
    ),
    Sample(
        "jaccl-no-devices",
        "as mlx rdma.cpp writes it",
        "m3dist: rank 0: backend jaccl did not start: [jaccl] Could not find device rdma_en2 (0 available)\n",
        75,
    ),
    Sample(
        "jaccl-device-gone",
        "as mlx rdma.cpp writes it",
        "RuntimeError: [jaccl] Could not find device rdma_en2 (3 available)\n",
        1,
    ),
    Sample(
        "jaccl-no-address",
        "mlx #4191",
        "RuntimeError: [jaccl] No IPv4-mapped GID for this device. Thunderbolt RDMA ports only publish one once the "
        "interface has an IPv4 address; assign a link-local address to it, for example: ifconfig <interface> inet "
        "169.254.0.1 netmask 255.255.0.0 alias\n",
        1,
    ),
    Sample("jaccl-bridge", "mlx #3467", "ValueError: [jaccl] Changing queue pair to RTR failed with errno 22\n", 1),
    Sample(
        "jaccl-busy",
        "the errno of mlx #3207, as rdma.cpp writes it",
        "ValueError: [jaccl] Changing queue pair to RTR failed with errno 16\n",
        1,
    ),
    Sample(
        "jaccl-timeout",
        "the errno of mlx #3468, as rdma.cpp writes it",
        "ValueError: [jaccl] Changing queue pair to RTR failed with errno 60\n",
        1,
    ),
    Sample("jaccl-stale", "exo #1973", "ValueError: [jaccl] Changing queue pair to RTR failed with errno 96\n", 1),
    Sample(
        "jaccl-no-connection",
        "as mlx rdma.cpp writes it",
        "ValueError: [jaccl] Changing queue pair to RTR failed with errno 2\n",
        1,
    ),
    Sample(
        "jaccl-no-connection",
        "as mlx rdma.cpp writes it",
        "ValueError: [jaccl] Changing queue pair to INIT failed with errno 22\n",
        1,
    ),
    Sample(
        "jaccl-no-protection-domain",
        "exo #2111",
        "RuntimeError: [jaccl] Couldn't allocate protection domain\n",
        1,
    ),
    Sample(
        "jaccl-too-many-regions",
        "as mlx rdma.cpp writes it",
        "RuntimeError: [jaccl] Register memory region failed\n",
        1,
    ),
    Sample(
        "jaccl-too-many-pairs",
        "mlx #4209",
        "RuntimeError: [jaccl] Creating the queue pair failed with errno 16. Thunderbolt RDMA devices\n"
        "support a limited number of queue pairs per device and fail here once they are\nexhausted.\n",
        1,
    ),
    Sample("jaccl-transfer", "mlx-lm #1737", "ValueError: [jaccl] Recv failed with error code -12\n", 1),
    Sample("jaccl-peer-lost", "exo #2111", "RuntimeError: [jaccl] Recv failed with errno=2\n", 1),
    Sample(
        "jaccl-peer-lost",
        "the errno of exo #1847, as tcp.cpp writes it",
        "RuntimeError: [jaccl] Recv failed with errno=60\n",
        1,
    ),
    Sample(
        "jaccl-wiring",
        "as mlx jaccl.cpp writes it",
        "RuntimeError: [jaccl] The configuration should define a valid mesh or a valid ring.\n",
        1,
    ),
    Sample(
        "jaccl-wiring",
        "as mlx mesh.cpp writes it",
        "RuntimeError: [jaccl] The JACCL mesh supports up to 8 peers but 9 were provided.\n",
        1,
    ),
    Sample("jaccl-not-built", "recorded", "RuntimeError: Cannot initialize jaccl distributed backend.\n", 1),
]

TCP = [
    Sample("port-taken", "recorded", "RuntimeError: [ring] Couldn't bind socket (error: 98)\n", 1),
    Sample(
        "port-taken",
        "as mlx utils.cpp writes it on macOS",
        "m3dist: rank 1: backend ring did not start: [ring] Couldn't bind socket (error: 48)\n",
        75,
    ),
    Sample("address-not-local", "recorded", "RuntimeError: [ring] Couldn't bind socket (error: 99)\n", 1),
    Sample(
        "local-network-privacy",
        "the errno of mlx #3755, as utils.cpp writes it",
        "RuntimeError: [ring] Couldn't connect (error: 65)\n",
        1,
    ),
    Sample("connect-timeout", "mlx #3755", "RuntimeError: [jaccl] Couldn't connect (error: 60)\n", 1),
    Sample("connect-refused", "recorded", "RuntimeError: [ring] Couldn't connect (error: 111)\n", 1),
    Sample(
        "connect-no-route",
        "as mlx utils.cpp writes it",
        "m3dist: rank 0: backend ring did not start: [ring] Couldn't connect (error: 113)\n",
        75,
    ),
    Sample("address-unreadable", "recorded", "RuntimeError: Can't parse address no-such-host.invalid:1\n", 1),
    Sample("address-unreadable", "recorded, without a port", "RuntimeError: Can't parse address 127.0.0.1\n", 1),
    Sample(
        "rendezvous-crash",
        "recorded, kill -SEGV while the ring waits",
        "Fatal Python error: Segmentation fault\n\n"
        "Current thread 0x00007ff11f44eb80 (most recent call first):\n"
        '  File "/opt/m3dist/comm.py", line 98 in wait_for_every_rank_to_join\n'
        '  File "/opt/m3dist/comm.py", line 81 in connect\n',
        139,
    ),
    Sample(
        "rendezvous-timeout",
        "recorded",
        "Timeout (0:00:01)!\n"
        "Thread 0x00007fb7140b3b80 (most recent call first):\n"
        '  File "/opt/m3dist/comm.py", line 98 in wait_for_every_rank_to_join\n'
        '  File "/opt/m3dist/comm.py", line 81 in connect\n',
        1,
    ),
]

CUDA = [
    Sample(
        "cuda-out-of-memory",
        "as mlx cuda/allocator.cpp and cuda/utils.cpp write it",
        "RuntimeError: cudaMallocAsync(&data, size, stream) failed: out of memory\n",
        1,
    ),
    Sample(
        "cuda-out-of-memory",
        "as mlx nccl.cpp writes it",
        "CUDA error /project/mlx/distributed/nccl/nccl.cpp:280 'out of memory'\n",
        1,
    ),
    Sample(
        "cuda-driver",
        "nunif #702",
        "RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version\n",
        1,
    ),
    Sample(
        "nccl-port",
        "as mlx nccl.cpp writes it",
        "m3dist: rank 0: backend nccl did not start: [nccl] bind() failed: Address already in use\n",
        75,
    ),
    Sample(
        "nccl-rendezvous",
        "as mlx nccl.cpp writes it",
        "RuntimeError: [Rank 1] connect() failed after 300000 milliseconds and 600 retries: Connection refused\n",
        1,
    ),
    Sample(
        "nccl-error",
        "as mlx nccl.cpp and NCCL init.cc write it",
        "NCCL error /project/mlx/distributed/nccl/nccl.cpp:287 'unhandled system error (run with NCCL_DEBUG=INFO for "
        "details)'\n",
        1,
    ),
]

MACHINE = [
    Sample(
        "experts-on-cpu",
        "recorded, mlx 0.32.4",
        "RuntimeError: [GatherMM::eval] Currently only supports float32.\n",
        1,
    ),
    Sample(
        "hub-gated",
        "as checkpoint.py writes it",
        "m3dist: rank 0: MiniMaxAI/MiniMax-M3 is gated: accept its terms on huggingface.co, then `hf auth login`\n",
        2,
    ),
    Sample(
        "hub-gated",
        "PuLID #97",
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1-66f4b037-1bf3d7d219afbc904ee05694"
        ")\n\nCannot access gated repo for url https://huggingface.co/black-forest-labs/FLUX.1-dev/resolve/main/"
        "ae.safetensors.\n",
        1,
    ),
    Sample(
        "hub-not-found",
        "as checkpoint.py writes it",
        "m3dist: rank 0: no-such/model is no directory here and not on Hugging Face; if it is private, `hf auth login` "
        "first\n",
        2,
    ),
    Sample(
        "hub-not-found",
        "as huggingface_hub _http.py writes it",
        "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: abc)\n\n"
        "Repository Not Found for url: https://huggingface.co/api/models/no-such/model/revision/main.\n"
        "Please make sure you specified the correct `repo_id` and `repo_type`.\n",
        1,
    ),
    Sample(
        "hub-offline",
        "recorded",
        "m3dist: rank 0: MiniMaxAI/MiniMax-M3 is no directory here and not in the local cache, and Hugging Face cannot "
        "be reached (or HF_HUB_OFFLINE is set)\n",
        2,
    ),
    Sample(
        "hub-offline",
        "recorded, huggingface_hub 2.4",
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the "
        "specified revision on the local disk and outgoing traffic has been disabled.\n",
        1,
    ),
    Sample(
        "hub-forbidden",
        "as huggingface_hub _http.py and checkpoint.py write it",
        "m3dist: rank 0: MiniMaxAI/MiniMax-M3 could not be fetched from Hugging Face: (Request ID: abc)\n\n"
        "403 Forbidden: None.\nCannot access content at: https://huggingface.co/api/models/MiniMaxAI/MiniMax-M3.\n"
        "Make sure your token has the correct permissions.\n",
        2,
    ),
    Sample(
        "hub-busy",
        "as huggingface_hub _http.py and checkpoint.py write it",
        "m3dist: rank 0: MiniMaxAI/MiniMax-M3 could not be fetched from Hugging Face: (Request ID: abc)\n\n"
        "429 Too Many Requests for url: https://huggingface.co/api/models/MiniMaxAI/MiniMax-M3.\n",
        2,
    ),
    Sample("disk-full", "recorded", "OSError: [Errno 28] No space left on device\n", 1),
    Sample("too-many-files", "recorded", "OSError: [Errno 24] Too many open files: '/dev/null'\n", 1),
    Sample(
        "macos-file-privacy",
        "jamf-upload #73, over ssh",
        "PermissionError: [Errno 1] Operation not permitted: '/Volumes/jamf/Packages/ApE-3.1.2.pkg'\n",
        1,
    ),
    Sample("out-of-memory", "recorded", "MemoryError\n", 1),
    Sample("out-of-memory", "recorded", "OSError: [Errno 12] Cannot allocate memory\n", 1),
    Sample(
        "out-of-memory",
        "as mlx metal/allocator.cpp writes it",
        "RuntimeError: [malloc] Unable to allocate 134217728 bytes.\n",
        1,
    ),
]

ENDINGS = [
    Sample("out-of-memory-killed", "recorded: status 137", "", 137, 15 * GIB, 16 * GIB),
    Sample("killed", "recorded: status 137", "Killed\n", 137, 2 * GIB, 16 * GIB),
    Sample(
        "native-crash",
        "recorded, PYTHONFAULTHANDLER=1",
        "Fatal Python error: Segmentation fault\n\nCurrent thread 0x00007f81bfbc7b80 (most recent call first):\n"
        '  File "<string>", line 1 in <module>\n',
        139,
    ),
    Sample("native-crash", "recorded: SIGBUS on Linux", "Fatal Python error: Bus error\n\n", 135),
    Sample("native-crash", "SIGBUS is 10 on macOS", "Fatal Python error: Bus error\n\n", 138),
    Sample("illegal-instruction", "recorded: status 132", "", 132),
    Sample("cpu-time-limit", "SIGXCPU is 24 on Linux and macOS", "", 152),
    Sample("hangup", "SIGHUP is 1", "", 129),
    Sample(
        "stopped",
        "as judge.py writes it",
        "rank 1 on mac2 finished nothing for 12 s; its process is stopped (SIGSTOP)",
        76,
    ),
    Sample("command-not-executable", "recorded: dash", "/bin/sh: 1: ./bench.py: Permission denied\n", 126),
    Sample("command-not-found", "recorded: dash", "/bin/sh: 1: my-bench: not found\n", 127),
    Sample(
        "peer-lost",
        "recorded",
        "[ring] Socket 4 was closed by the peer\n"
        "[ring] Too many send/recv errors. Failing pending tasks...\n"
        "RuntimeError: [ring] connection to a peer was lost\n",
        1,
    ),
    Sample(
        "peer-lost",
        "as rank.py writes it",
        "m3dist: rank 0 of 2: another rank is gone ([ring] connection to a peer was lost)\n",
        75,
    ),
    Sample(
        "peer-lost",
        "as mlx nccl.cpp and NCCL init.cc write it",
        "NCCL error /project/nccl.cpp:340 'remote process exited or there was a network error'\n",
        1,
    ),
    Sample(
        "peer-lost",
        "as Open MPI help-mpi-btl-tcp.txt writes it",
        "An MPI communication peer process has unexpectedly disconnected.  This\n"
        "usually indicates a failure in the peer process (e.g., a crash or\n"
        "otherwise exiting without calling MPI_FINALIZE first).\n",
    ),
]

SAMPLES = [*SSH, *MPI, *PYTHON, *GPU, *JACCL, *TCP, *CUDA, *MACHINE, *ENDINGS]
TRACEBACK = (
    "Traceback (most recent call last):\n"
    '  File "/opt/m3dist/engine.py", line 41, in step\n'
    '    raise RuntimeError("[ring] connection to a peer was lost")  # ssh: connect to host: Connection refused\n'
)


def name(value: object) -> str | None:
    return value.cause if isinstance(value, Sample) else None


@pytest.mark.parametrize("sample", SAMPLES, ids=name)
def test_samples(sample):
    """And so no row stands before another that it hides."""
    assert sample.recognised() == sample.cause


def test_every_row_has_a_sample():
    assert [row.cause.name for row in TABLE] == list(dict.fromkeys(sample.cause for sample in SAMPLES))


SAID = [sample for sample in SAMPLES if not next(row for row in TABLE if row.cause.name == sample.cause).statuses]


@pytest.mark.parametrize("sample", SAID, ids=name)
def test_what_was_said_is_enough(sample):
    """Whatever the status, and whatever stands around it."""
    before = "loading m3: 100%\n" + TRACEBACK
    after = (
        "\nm3dist: rank 0 of 2: the last words\n/usr/lib/python3.12/tracker.py:254: UserWarning: leaked semaphores\n"
    )
    for status in (None, 1, 134):
        assert sample.recognised(before + sample.text + after, status) == sample.cause


@pytest.mark.parametrize("sample", SAID, ids=name)
@pytest.mark.parametrize("prefix", ["> ", "    ", "You may see: "])
def test_what_is_only_quoted_is_not_a_cause(sample, prefix):
    """In a model's answer, say."""
    text = "".join(prefix + line for line in sample.text.splitlines(keepends=True))
    assert recognise(text, 1) is None


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", None),
        ("", 0),
        ("", 1),
        ("", 2),
        ("", 134),  # SIGABRT: whoever aborted says why
        ("", 143),  # SIGTERM: the launcher's own way to end a rank
        (TRACEBACK + "ValueError: head counts [8, 4] are not all divisible by 3 ranks\n", 1),
        ("KeyError: 'MLX_RANK'\n", 1),
        ("ssh says Connection refused when sshd does not run.\n", 1),
        ("curl: (7) Failed to connect to 10.0.0.2 port 8080: Connection refused\n", 7),
        ("ConnectionRefusedError: [Errno 111] Connection refused\n", 1),
        ("sh: 1: nvidia-smi: not found\nm3dist: rank 0: no GPU\n", 1),  # a library's own attempt
        ("ModuleNotFoundError: No module named 'mlx_lm'\n", 1),
        ("ModuleNotFoundError: No module named 'm3distribution'\n", 1),
        ("TypeError: unsupported operand type(s) for +: 'int' and 'str'\n", 1),
        ("PermissionError: [Errno 1] Operation not permitted: '/proc/1/mem'\n", 1),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'python3'\n", 1),
        ("socket.gaierror: [Errno 8] nodename nor servname provided, or not known\n", 1),  # 8 is ENOEXEC elsewhere
        ("[jaccl] Connection attempt 1 waiting 1000 ms\n", 1),
        ("[ring] Rank 1 accepting\n", 1),
        ("RuntimeError: [ring] Couldn't connect (error: 22)\n", 1),
        ("RuntimeError: [METAL] Command buffer execution failed: Internal Error (0000000e:Internal Error).\n", 1),
        ("m3dist: rank 1 on mac2: MLX_METAL_FAST_SYNCH=1 can lock this Mac's GPU until it is restarted\n", 1),
        ("m3dist: rank 1 of 2: nothing finished for 120 s in decode step 7; a peer stalled or is gone\n", 76),
        ('Timeout (0:00:10)!\nThread 0x00007fb7140b3b80 (most recent call first):\n  File "a.py", line 1 in f\n', 1),
        ("403 Forbidden: blocked by the proxy\n", 1),
        ("m3dist: rank 0: config.json: num_hidden_layers: must be a whole number\n", 2),
        ("Warning: Permanently added '10.0.0.2' (ED25519) to the list of known hosts.\r\n", 255),
    ],
)
def test_near_misses(text, status):
    assert recognise(text, status) is None


def test_little_memory_is_not_a_lack_of_memory():
    def killed(peak: int | None, memory: int | None) -> str | None:
        return Sample("", "", "", 137, peak, memory).recognised()

    assert killed(int(NEARLY_ALL * 96 * GIB) + 1, 96 * GIB) == "out-of-memory-killed"
    assert killed(int(NEARLY_ALL * 96 * GIB) - 1, 96 * GIB) == "killed"
    for unknown in ((None, 96 * GIB), (96 * GIB, None), (None, None), (96 * GIB, 0)):
        assert killed(*unknown) == "killed"
    assert recognise("", 1, peak_bytes=96 * GIB, memory_bytes=96 * GIB) is None


def test_the_cause_wins_over_what_follows_from_it():
    """A rank's last lines often hold both: why it failed, and that others were then gone; or the signal it died of."""
    lost = "RuntimeError: [ring] connection to a peer was lost\n"
    full = "OSError: [Errno 28] No space left on device\n"
    for text in (lost + full, full + lost):
        assert recognise(text, 1).name == "disk-full"
    assert recognise(lost, 137).name == "killed"
    assert recognise(full, 137).name == "disk-full"
    assert recognise("m3dist: rank 1: rank 0 failed: " + full, 75).name == "disk-full"


def test_only_the_end_is_read():
    assert recognise("MemoryError\n" + "x" * TAIL, 1) is None
    assert recognise("x" * TAIL + "\nMemoryError\n", 1).name == "out-of-memory"


@pytest.mark.parametrize("cause", [row.cause for row in TABLE], ids=lambda cause: cause.name)
def test_words(cause):
    """A name to rely on, two sentences on a line each, where it is from; and fields that hostfiles have."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", cause.name)
    for sentence in (cause.what, cause.remedy):
        assert re.fullmatch(r"\S[^\n]*[^\s.]\.", sentence)
    assert cause.source and "://" not in cause.source
    fields = re.findall(r"(?:hostfile|host)'s `(\w+)`", cause.what + cause.remedy)
    assert set(fields) <= {"ssh", "ips", "rdma", "user", "port", "python", "cwd", "env", "memory_gb", "ranks", "envs"}


def test_no_remedy_is_a_field_that_changes_nothing():
    """`m3dist doctor` compares `memory_gb` with the plan; a rank's share follows from --weights."""
    assert not [row.cause.name for row in TABLE if "memory_gb" in row.cause.remedy]


def test_names_are_different():
    names = [row.cause.name for row in TABLE]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever was printed, the answer comes at once

SECONDS = 1.0  # of this process's time for a text of 100 kB; measured: at most 0.12, for 100,000 empty lines
PIECES = sorted(
    {piece for sample in SAMPLES for piece in re.split(r"(?<=[ :(\n])", sample.text) if piece}
    | {"m3dist: ", ": ", "\n", "a", "(", "sh: ", "/", "@", "cuda(", ") ", "No module named 'm3dist", "libc++abi: "}
)


def timed(text: str) -> None:
    start = time.process_time()
    recognise(text, 1)
    assert time.process_time() - start < SECONDS


@given(st.text(max_size=300), st.integers(1, 100_000))
@settings(max_examples=30, deadline=None)
def test_any_text(text, times):
    timed((text * times)[:100_000])


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_text_made_of_what_is_looked_for(pieces, one_line):
    text = "".join(pieces)
    text = text.replace("\n", " ") if one_line else text
    timed((text * 100_000)[:100_000])


@pytest.mark.parametrize("start", ["m3dist: ", "RuntimeError: ", "libc++abi: ", "bash: line 1: exec: ", "me@host"])
def test_long_lines(start):
    """Where a pattern could try many ways to read one line."""
    for middle in ("a: ", "(", "cuda(", "[ring] ", "[METAL] Command buffer execution failed: ", "/", "py", ".Error: "):
        timed(start + (middle * 100_000)[:100_000])
    pairs = itertools.permutations(("a: ", "cuMalloc(", "No module named 'm3dist", ": "), 2)
    for one, other in pairs:
        timed(start + ((one + other) * 50_000)[:100_000])
