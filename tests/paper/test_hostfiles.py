"""Every sample hostfile is what mlx.launch reads, and right for its backend."""

import ipaddress
from pathlib import Path

import pytest
from mlx._distributed_utils.common import Hostfile

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "hostfiles").glob("*.json"))


@pytest.fixture(params=SAMPLES, ids=lambda path: path.stem)
def sample(request) -> Hostfile:
    return Hostfile.from_file(str(request.param))


def test_there_are_samples():
    assert [path.stem for path in SAMPLES] == ["one-machine", "two-macs-ethernet", "two-macs-thunderbolt"]


def test_backend_is_named(sample):
    assert sample.backend in ("ring", "jaccl", "jaccl-ring")


def test_every_rank_has_numeric_addresses(sample):
    assert len(sample.hosts) > 1
    for host in sample.hosts:
        assert host.ips
        assert all(ipaddress.ip_address(ip).version == 4 for ip in host.ips)


def test_rdma_has_a_device_for_every_other_rank(sample):
    for rank, host in enumerate(sample.hosts):
        if sample.backend == "ring":
            assert not host.rdma
        else:
            assert len(host.rdma) == len(sample.hosts)
            assert [device is None for device in host.rdma] == [other == rank for other in range(len(sample.hosts))]


def test_the_readme_names_every_sample_and_field():
    readme = (ROOT / "hostfiles" / "README.md").read_text()
    for name in (*(path.name for path in SAMPLES), "backend", "envs", "hosts", "ssh", "ips", "rdma"):
        assert f"`{name}`" in readme
