"""detect(): what each launcher sets is recognised; what is wrong or contradictory names the variable."""

import json

import pytest

from m3dist.cluster.environment import Launch, LaunchError, detect
from m3dist.errors import M3Error
from m3dist.watchdog import seconds

RING = [["10.0.0.1:32323"], ["10.0.0.2:32324", "10.0.1.2:32325"]]
DEVICES = [[None, "rdma_en5"], [["rdma_en5", "rdma_en4"], None]]


@pytest.fixture
def file(tmp_path):
    """Write `content` (text, or anything as JSON) to a file; returns its path."""

    def write(content) -> str:
        path = tmp_path / "file.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_no_launcher():
    assert detect({"PATH": "/bin", "NCCL_PORT": "1"}) == Launch("single", None, 0, 1, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_ring(file, rank):
    found = detect({"MLX_RANK": str(rank), "MLX_HOSTFILE": file(RING)})
    assert found == Launch("mlx.launch", "ring", rank, 2)


def test_ring_with_one_address_a_rank(file):
    assert detect({"MLX_RANK": "1", "MLX_HOSTFILE": file(["10.0.0.1:1", "localhost:65535"])}).world == 2


@pytest.mark.parametrize("content", ["", "\n", [["127.0.0.1:32323"]]])
def test_a_ring_of_one_is_no_ring(file, content):
    """`mlx.launch -n 1` writes an empty file; over a ring of one, MLX waits for itself."""
    assert detect({"MLX_RANK": "0", "MLX_HOSTFILE": file(content)}) == Launch("mlx.launch", None, 0, 1)


def test_jaccl(file):
    environ = {"MLX_RANK": "1", "MLX_IBV_DEVICES": file(DEVICES), "MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}
    assert detect(environ) == Launch("mlx.launch", "jaccl", 1, 2)


def test_nccl():
    environ = {"MLX_RANK": "2", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345", "MLX_WORLD_SIZE": "4"}
    assert detect(environ) == Launch("mlx.launch", "nccl", 2, 4)


def test_our_own_launcher(file):
    environ = {"M3DIST_LAUNCHER": "m3dist", "M3DIST_JOB": "ab12", "M3DIST_WORLD": "2", "MLX_RANK": "1"}
    assert detect(environ | {"MLX_HOSTFILE": file(RING)}) == Launch("m3dist", "ring", 1, 2, "ab12")
    assert detect(environ | {"M3DIST_WORLD": "1", "MLX_RANK": "0"}) == Launch("m3dist", None, 0, 1, "ab12")
    with pytest.raises(LaunchError, match="M3DIST_WORLD says 3 ranks, but MLX_HOSTFILE lists 2"):
        detect(environ | {"M3DIST_WORLD": "3", "MLX_HOSTFILE": file(RING)})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1", "PMIX_NAMESPACE": "20189"},
            Launch("mpirun", "mpi", 1, 4, "20189"),
        ),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, Launch("mpirun", None, 0, 1)),
        ({"PMIX_RANK": "3"}, Launch("mpirun", "mpi", 3, None)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch("mpirun", "mpi", 1, 2)),
    ],
)
def test_mpi(environ, expected):
    assert detect(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is not set"),
        ({"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK must be a whole number"),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is 2, but with 2 ranks"),
        ({"PMI_RANK": "0", "PMI_SIZE": "0"}, "PMI_SIZE must be a whole number, 1 or more"),
        ({"MLX_RANK": "0"}, "MLX_RANK is set but none of MLX_HOSTFILE, MLX_IBV_DEVICES, MLX_WORLD_SIZE"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "/no/file"}, "MLX_HOSTFILE names '/no/file', which cannot be read"),
        ({"MLX_HOSTFILE": "/no/such/file"}, "MLX_HOSTFILE is set but MLX_RANK is not"),
        ({"MLX_WORLD_SIZE": "2"}, "MLX_WORLD_SIZE is set but MLX_RANK is not"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "a", "MLX_IBV_DEVICES": "b"}, "for the backends ring and jaccl"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "2", "NCCL_PORT": "1"}, "NCCL_HOST_IP must be"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.1"}, "NCCL_PORT is not set"),
        ({"MLX_RANK": "2", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "h", "NCCL_PORT": "1"}, "MLX_RANK is 2, but with 2"),
        (
            {"MLX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            r"OMPI_COMM_WORLD_RANK \(mpirun\) and MLX_RANK \(mlx.launch\) are both set",
        ),
    ],
)
def test_errors_name_the_variable(environ, message):
    with pytest.raises(LaunchError, match=message):
        detect(environ)


@pytest.mark.parametrize("rank", ["abc", "-1", "", "1.0", "0x1", "١", "2"])
def test_bad_ranks(file, rank):
    """MLX itself takes "abc" for rank 0, and then two ranks 0 wait for each other."""
    with pytest.raises(LaunchError, match="MLX_RANK"):
        detect({"MLX_RANK": rank, "MLX_HOSTFILE": file(RING)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "must be a list with one entry a rank"),
        ({"hosts": []}, "must be a list with one entry a rank"),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}] * 2, "rank 0 must be a list.*mlx.launch --hostfile"),
        ([["10.0.0.1:1"], []], "rank 1 must be a list"),
        ([["10.0.0.1:1"], ["10.0.0.2"]], "rank 1 must be a list"),
        ([["10.0.0.1:1"], [":1"]], "rank 1 must be a list"),
        ([["10.0.0.1:1"], ["10.0.0.2:70000"]], "rank 1 must be a list"),
        ([["10.0.0.1:1"], [7]], "rank 1 must be a list"),
        ([["10.0.0.1:1"], 7], "rank 1 must be a list"),
    ],
)
def test_bad_hostfiles(file, content, message):
    with pytest.raises(LaunchError, match=message) as caught:
        detect({"MLX_RANK": "0", "MLX_HOSTFILE": file(content)})
    assert "MLX_HOSTFILE" in str(caught.value)


@pytest.mark.parametrize("content", ["{", [], [[None]] * 2, ["rdma_en5", "rdma_en5"], {"hosts": []}])
def test_bad_jaccl_devices(file, content):
    environ = {"MLX_RANK": "0", "MLX_IBV_DEVICES": file(content), "MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}
    with pytest.raises(LaunchError, match="MLX_IBV_DEVICES"):
        detect(environ)


@pytest.mark.parametrize("coordinator", [None, "10.0.0.1", ""])
def test_bad_jaccl_coordinator(file, coordinator):
    environ = {"MLX_RANK": "0", "MLX_IBV_DEVICES": file(DEVICES)}
    with pytest.raises(LaunchError, match="MLX_JACCL_COORDINATOR must be"):
        detect(environ | ({} if coordinator is None else {"MLX_JACCL_COORDINATOR": coordinator}))


@pytest.mark.parametrize("text", ["soon", "", "nan", "inf", "0", "-1", "1e10"])
def test_a_limit_that_is_no_time_to_wait(monkeypatch, text):
    monkeypatch.setenv("M3DIST_STEP_LIMIT", text)
    said = f"M3DIST_STEP_LIMIT must be a number of seconds, more than 0, at most 10000000, not '{text}'"
    with pytest.raises(M3Error, match=said):
        seconds("M3DIST_STEP_LIMIT", 120.0)
    assert seconds("M3DIST_START_LIMIT", 60.0) == 60.0


def test_a_limit_that_would_end_every_job(monkeypatch):
    monkeypatch.setenv("M3DIST_SILENCE_LIMIT", "1")
    with pytest.raises(M3Error, match="M3DIST_SILENCE_LIMIT must be a number of seconds, 5 or more, .* not '1'"):
        seconds("M3DIST_SILENCE_LIMIT", 10.0, 5.0)
