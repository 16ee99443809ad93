"""What each backend of mx.distributed wants in a rank's environment, from the hosts and their free ports. No MLX.

The variables and files are those of mlx.launch (mlx/_distributed_utils/launch.py); environment.py reads them back.
"""

import json
from collections.abc import Mapping, Sequence

from m3dist.cluster.hostfile import Host

Ports = Mapping[int, Sequence[Sequence[int]]]  # host -> for each of its entries in `addresses`, a port for each address


def addresses(backend: str, hosts: Sequence[Host]) -> dict[int, list[list[str]]]:
    """The addresses for which ports must be found: host -> for each of its ranks, those it listens on.

    For jaccl and nccl one on the first host, where the others meet."""
    world = sum(host.ranks for host in hosts)
    if world == 1 or backend == "mpi":
        return {}
    if backend == "ring":
        return {number: [list(host.ips)] * host.ranks for number, host in enumerate(hosts)}
    return {0: [[hosts[0].ips[0]]]}


def shared_variables(world: int, job: str) -> dict[str, str]:
    """For every rank of job `job`."""
    return {"M3DIST_LAUNCHER": "m3dist", "M3DIST_JOB": job, "M3DIST_WORLD": str(world)}


def variables(backend: str, hosts: Sequence[Host], ports: Ports) -> list[tuple[dict[str, str], dict[str, str]]]:
    """For each rank its own variables, and variables that name a file, with the file's content."""
    places = [(number, index) for number, host in enumerate(hosts) for index in range(host.ranks)]
    world = len(places)
    ranks = [{"MLX_RANK": str(rank)} for rank in range(world)]
    if world == 1 or backend == "mpi":
        return [({} if backend == "mpi" else env, {}) for env in ranks]
    if backend == "ring":
        rows = [
            [f"{ip}:{port}" for ip, port in zip(hosts[number].ips, ports[number][index])] for number, index in places
        ]
        return [(env, {"MLX_HOSTFILE": json.dumps(rows)}) for env in ranks]
    meet, port = hosts[0].ips[0], ports[0][0][0]
    if backend == "nccl":
        common = {"NCCL_HOST_IP": meet, "NCCL_PORT": str(port), "MLX_WORLD_SIZE": str(world)}
        return [(env | common | {"CUDA_VISIBLE_DEVICES": str(i)}, {}) for env, (_, i) in zip(ranks, places)]
    common = {"MLX_JACCL_COORDINATOR": f"{meet}:{port}"}
    if backend == "jaccl-ring":
        common["MLX_JACCL_RING"] = "1"
    return [(env | common, {"MLX_IBV_DEVICES": json.dumps([host.rdma for host in hosts])}) for env in ranks]
