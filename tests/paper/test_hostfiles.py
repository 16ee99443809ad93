"""Hostfiles: the samples, every format and field, and what is said of those that are wrong."""

import ipaddress
import json
from pathlib import Path

import mlx._distributed_utils.common as mlx_launch
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m3dist.cluster import hostfile
from m3dist.cluster.hostfile import Host, Hostfile, HostfileError, local_hostfile, read_hostfile

FOLDER = Path(__file__).parents[2] / "hostfiles"
SAMPLES = sorted(path for path in FOLDER.iterdir() if path.name != "README.md")


@pytest.fixture
def read(tmp_path):
    """Reads a hostfile of this text or these bytes."""

    def read(content: str | bytes) -> Hostfile:
        path = tmp_path / "hosts"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_hostfile(str(path))

    return read


@pytest.fixture
def wrong(read, tmp_path):
    """What is said of a hostfile of this text, after its folder."""

    def wrong(content: str | bytes) -> str:
        with pytest.raises(HostfileError) as caught:
            read(content)
        return str(caught.value).removeprefix(f"{tmp_path}/")

    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# The samples


@pytest.fixture(params=SAMPLES, ids=lambda path: path.name)
def sample(request) -> Path:
    return request.param


def test_there_are_samples():
    assert [path.name for path in SAMPLES] == [
        "four-macs-jaccl.json",
        "four-macs-thunderbolt-ring.json",
        "one-machine.json",
        "two-different-macs.yaml",
        "two-macs-ethernet.json",
        "two-macs-jaccl.json",
        "two-macs-mpi.txt",
        "two-macs-thunderbolt-ring.json",
    ]


def test_a_sample_is_what_its_name_says(sample):
    found = read_hostfile(str(sample))
    assert found.world == (4 if sample.name.startswith("four") else 2)
    assert found.backend in sample.stem or found.backend == "ring"
    assert [host.local for host in found.hosts].count(True) == {"one-machine": 2, "two-different-macs": 1}.get(
        sample.stem, 0
    )


@pytest.mark.parametrize("path", [path for path in SAMPLES if path.suffix == ".json"], ids=lambda path: path.name)
def test_mlx_launch_reads_the_same(path):
    theirs, ours = mlx_launch.Hostfile.from_file(path), read_hostfile(str(path))
    assert (theirs.backend, theirs.envs) == (ours.backend, [])
    assert [(h.ssh_hostname, h.ips, h.rdma) for h in theirs.hosts] == [
        (h.ssh, list(h.ips), list(h.rdma)) for h in ours.hosts
    ]


def test_a_cable_of_the_thunderbolt_ring_joins_a_host_and_the_one_before():
    """Every /30 network holds two addresses, and no two hosts of the four are on one."""
    hosts = read_hostfile(str(FOLDER / "four-macs-thunderbolt-ring.json")).hosts
    cables = {ipaddress.ip_network(f"{host.ips[0]}/30", strict=False) for host in hosts}
    assert len(cables) == 4
    assert all(ipaddress.ip_address(host.ips[0]) in set(cable.hosts()) for host in hosts for cable in cables
               if ipaddress.ip_address(host.ips[0]) in cable)  # fmt: skip


def test_the_jaccl_mesh_uses_each_device_of_a_host_once():
    for host in read_hostfile(str(FOLDER / "four-macs-jaccl.json")).hosts:
        assert len(set(host.rdma)) == 4


def test_the_yaml_sample_shows_every_field():
    shown = set().union(*(host.lines for host in read_hostfile(str(FOLDER / "two-different-macs.yaml")).hosts))
    assert shown - {""} == set(hostfile._FIELDS) - {"rdma"}


def test_the_readme_names_every_sample_and_field():
    readme = (FOLDER / "README.md").read_text()
    for name in (*(path.name for path in SAMPLES), "backend", "envs", "hosts", *hostfile._FIELDS, *hostfile.BACKENDS):
        assert f"`{name}`" in readme


def test_the_readme_shows_what_is_really_said(wrong):
    said = wrong("backend: ring\nhosts:\n- ssh: mac1\n  ips: [10.0.0.1]\n- ssh: mac2\n  ips: [10.0.0.2]\n  port: ssh\n")
    assert f"    {said.replace('hosts line', 'hosts.yaml line')}\n" in (FOLDER / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What is read


FULL = """
# a comment
backend: ring
envs: [HF_HOME=/big disk/hf, EMPTY=, "EQUALS=a=b"]
hosts:
  - ssh: mac1.local
    ips: [10.0.0.1, 10.0.1.1]
  - ssh: anna@mac2.local
    ips:
      - 10.0.0.2
    port: 2222
    python: "~/it's mine/bin/python; rm -rf /"
    cwd: /Volumes/Büro "A" 🙂
    env:
      NAME: "yes"
      LINES: "one\\ntwo"
    memory_gb: 191.5
    ranks: 3
"""


def test_yaml(read):
    found = read(FULL)
    assert (found.backend, found.world) == ("ring", 4)
    assert found.env == {"HF_HOME": "/big disk/hf", "EMPTY": "", "EQUALS": "a=b"}
    assert found.hosts[0] == Host("mac1.local", ips=("10.0.0.1", "10.0.1.1"))
    assert found.hosts[1] == Host(
        "mac2.local",
        ips=("10.0.0.2",),
        user="anna",
        port=2222,
        python="~/it's mine/bin/python; rm -rf /",
        cwd='/Volumes/Büro "A" 🙂',
        env={"NAME": "yes", "LINES": "one\ntwo"},
        memory_gb=191.5,
        ranks=3,
    )


@pytest.mark.parametrize("indent", [None, 1, "\t"])
@pytest.mark.parametrize("ascii", [True, False])
def test_json_with_m3dists_own_fields(read, indent, ascii):
    host = {"ssh": "mac1", "ips": ["10.0.0.1"], "cwd": "/🙂\t\\n", "env": {"A": "1"}, "memory_gb": 64, "ranks": 2}
    found = read(json.dumps({"backend": "ring", "hosts": [host]}, indent=indent, ensure_ascii=ascii))
    assert found.hosts == (Host("mac1", ("10.0.0.1",), cwd="/🙂\t\\n", env={"A": "1"}, memory_gb=64.0, ranks=2),)


def test_windows_line_ends_and_byte_order_mark(read):
    assert read(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode()) == read(FULL)
    assert read("mac1:2\r\nmac2\r\n").world == 3


def test_hosts_alone(read):
    found = read('[{"ssh": "mac1"}, {"ssh": "mac1"}]')
    assert (found.backend, found.env, [host.ssh for host in found.hosts]) == (None, {}, ["mac1", "mac1"])


def test_ethernet_hostfile_of_mlx_distributed_config(read):
    """Its prepare_ethernet_hostfile names no backend."""
    theirs = mlx_launch.Hostfile([mlx_launch.Host(0, "mac1", ["10.0.0.1"], [])]).to_json()
    assert read(json.dumps(theirs, indent=4)).backend is None


name = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
mlx_host = st.fixed_dictionaries(
    {"ssh": name},
    optional={
        "ips": st.lists(st.integers(1, 250).map("10.0.0.{}".format), min_size=1, max_size=3),
        "rdma": st.lists(st.none() | name | st.lists(name, min_size=1, max_size=3), max_size=4),
    },
)
setting = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
mlx_hostfile = st.fixed_dictionaries(
    {"hosts": st.lists(mlx_host, min_size=1, max_size=16)},
    optional={
        "envs": st.dictionaries(st.sampled_from(["A", "b_1", "_"]), setting).map(
            lambda env: [f"{name}={value}" for name, value in env.items()]
        )
    },
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A file that many examples of one test may write in turn."""
    return tmp_path_factory.mktemp("scratch") / "hosts"


@given(content=mlx_hostfile, indent=st.sampled_from([None, 4, "\t"]), ascii=st.booleans())
def test_every_json_hostfile_of_mlx_launch_reads_the_same(scratch, content, indent, ascii):
    scratch.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    theirs, ours = mlx_launch.Hostfile.from_file(scratch), read_hostfile(str(scratch))
    assert [f"{name}={value}" for name, value in ours.env.items()] == theirs.envs
    for mine, host in zip(ours.hosts, theirs.hosts, strict=True):
        assert mine.ssh == host.ssh_hostname
        assert list(mine.ips) == host.ips
        assert json.loads(json.dumps(mine.rdma)) == host.rdma


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("mac1", Host("mac1")),
        ("mac1 slots=4", Host("mac1", ranks=4)),
        ("  mac1\tslots = 4 max_slots = 8  # the big one", Host("mac1", ranks=4)),
        ("mac1 max-slots=2", Host("mac1", ranks=2)),
        ("192.168.1.11:16", Host("192.168.1.11", ranks=16)),
        ("anna@mac1.local:2", Host("mac1.local", user="anna", ranks=2)),
        ("localhost slots=2", Host("localhost", ranks=2)),
        ("mac1:2 max_slots=2", Host("mac1", ranks=2)),
    ],
)
def test_mpi(read, line, host):
    found = read(f"# hosts\n\n{line}\n")
    assert (found.backend, found.env, found.hosts) == ("mpi", {}, (host,))


def test_mpi_lines_of_one_host_add_up(read):
    assert read("mac1\nmac2 slots=2\nmac1\n").world == 4


def test_local_hostfile():
    found = local_hostfile(4, "ring")
    assert (found.world, found.backend, found.hosts[0].local) == (4, "ring", True)
    assert found.hosts[0].ips == ("127.0.0.1",)
    with pytest.raises(HostfileError, match=r"^-n 2: hosts\[0\].ranks must be 1: jaccl has one rank a host, not 2$"):
        local_hostfile(2, "jaccl")
    with pytest.raises(HostfileError, match=r"^-n 17: hosts\[0\].ranks makes 17 in all; at most 16 can share a model$"):
        local_hostfile(17, "ring")


def test_only_these_two_names_are_this_machine():
    names = ("127.0.0.1", "localhost", "127.0.0.2", "Localhost", "localhost.local")
    assert [name for name in names if Host(name).local] == ["127.0.0.1", "localhost"]


def test_a_backend_from_elsewhere_is_checked_too(read):
    found = read("hosts:\n- ssh: mac1\n- ssh: mac2\n  ips: [10.0.0.2]\n")
    assert found.with_backend("mpi").backend == "mpi"
    with pytest.raises(HostfileError, match=r"line 2: hosts\[0\].ips is missing: the ring needs .* of mac1$"):
        found.with_backend("ring")
    with pytest.raises(HostfileError, match=r"line 2: hosts\[0\].ips is missing: nccl needs .* rank 0$"):
        found.with_backend("nccl")
    with pytest.raises(HostfileError, match='^backend must be one of ring, jaccl, jaccl-ring, mpi, nccl, not "any"$'):
        found.with_backend("any")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def host(field: str) -> str:
    """A hostfile whose second host has `field` in line 4."""
    return f"hosts:\n- ssh: mac1\n- ssh: mac2\n  {field}\n"


NO_TEXT = "which without quotes is no text"
PORT = "port must be a whole number from 1 to 65535"
USER = "user must be a user's name, without spaces, / and @, that does not begin with -"
MEMORY = "memory_gb must be a number of GB, more than 0 and at most 1000000, such as 512 or 191.5"
PYTHON = "python must be an absolute path, a path that begins with ~/, or a command such as python3"
ADDRESS = "must be an IPv4 address of this host in numbers, such as 192.168.1.11"
DEVICE = 'must be a device such as "rdma_en2", a list of devices, or null'
USERS = "M3DIST_START_LIMIT, M3DIST_STEP_LIMIT, M3DIST_LOAD_LIMIT, M3DIST_WIRED_LIMIT_MB, M3DIST_STORE"
FIELDS = "ssh, ips, rdma, user, port, python, cwd, env, memory_gb, ranks"
OWN = "has 127.0.0.1, which is each machine's own; give the address where others reach this one"
NO_SSH = "is for ssh, and localhost means this machine, without ssh; leave it out, or name the host"
MEET = "is missing: nccl needs an IPv4 address where the others reach rank 0"
VARIABLE = "must set a variable named with letters, digits and _"
NEITHER = "is neither JSON nor YAML:"
TOP = "backend, envs, hosts"
IN_ALL = "in all; at most 16 can share a model"
SLOTS = "slots must be a whole number from 1 to 16"
READ_AS_MPI = " (read as an MPI hostfile: it does not begin as JSON or YAML do)"
BACKENDS = "ring, jaccl, jaccl-ring, mpi, nccl"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("port: ssh", f'{PORT}, not "ssh"'),
        ("port: 0", f"{PORT}, not 0"),
        ("port: 65536", f"{PORT}, not 65536"),
        ("port: 022", f"{PORT}, written 22, not 022"),
        ('port: "22"', f'{PORT}, written 22, not "22"'),
        ("port: 22.0", f"{PORT}, not 22.0"),
        ("port: 1e3", f"{PORT}, not 1e3"),
        ("port: 0x16", f"{PORT}, not 0x16"),
        ("port: 1_000", f"{PORT}, not 1_000"),
        ("port: -22", f"{PORT}, not -22"),
        ("port: ٢٢", f'{PORT}, not "\\u0662\\u0662"'),
        ("port:", f"{PORT}, not empty"),
        ("port: null", f"{PORT}, not null"),
        ("port: true", f"{PORT}, not true"),
        ("port: [22]", f"{PORT}, not a list"),
        (f"port: {10**400}", f"{PORT}, not {'1' + 59 * '0'}"),
        ("ranks: 17", "ranks must be a whole number from 1 to 16, not 17"),
        ("ranks: 0", "ranks must be a whole number from 1 to 16, not 0"),
        ("user: yes", f"{USER}, not yes, {NO_TEXT}"),
        ("user: 1e3", f"{USER}, not 1e3, {NO_TEXT}"),
        ("user: 0o17", f"{USER}, not 0o17, {NO_TEXT}"),
        ("user: 2026-01-01", f"{USER}, not 2026-01-01, {NO_TEXT}"),
        ("user: null", f"{USER}, not null, {NO_TEXT}"),
        ("user: ~", f"{USER}, not ~, {NO_TEXT}"),
        ("user:", f"{USER}, not empty"),
        ('user: ""', f'{USER}, not ""'),
        ("user: -oProxyCommand=x", f'{USER}, not "-oProxyCommand=x"'),
        ('user: "a b"', f'{USER}, not "a b"'),
        ('user: "a\\u202Eb"', f'{USER}, not "a\\u202eb"'),
        ("user: {a: b}", f"{USER}, not a mapping"),
        ("memory_gb: 1e3", f"{MEMORY}, not 1e3"),
        ("memory_gb: .inf", f"{MEMORY}, not .inf"),
        ("memory_gb: 0.0", f"{MEMORY}, not 0.0"),
        ('memory_gb: "64"', f'{MEMORY}, not "64"'),
        ("python: ./python", f'{PYTHON}, not "./python"'),
        ("python: -c", f'{PYTHON}, not "-c"'),
        ('python: "/a\\nb"', 'python must be a path, in one line, not "/a\\nb"'),
        ('cwd: ""', 'cwd must be a path, in one line, not ""'),
        ('cwd: "a\\0b"', 'cwd must be a path, not "a\\u0000b"'),
        ('cwd: "\\ud83d"', 'cwd must be a path, not "\\ud83d"'),
        ("ips: 10.0.0.2", 'ips must be a list of IPv4 addresses, not "10.0.0.2"'),
        ("ips: [mac2]", f'ips[0] {ADDRESS}, not "mac2"'),
        ("ips: [10.0.0.1, fe80::1]", f'ips[1] {ADDRESS}, not "fe80::1"'),
        ("ips: [0.0.0.0]", f'ips[0] {ADDRESS}, not "0.0.0.0"'),
        ("ips: [10.0]", f"ips[0] {ADDRESS}, not 10.0, {NO_TEXT}"),
        ("ips: [127.0.0.1]", f"ips {OWN}"),
        ("rdma: [rdma en2]", f'rdma[0] {DEVICE}, not "rdma en2"'),
        ("rdma: [[]]", f'rdma[0] {DEVICE}, not a list'),
        ("rdma: [[null]]", f'rdma[0][0] must be a device such as "rdma_en2", not null, {NO_TEXT}'),
        ("env: [A=b]", "env must be a mapping, NAME: value, not a list"),
        ("env: {A: 1}", f"env.A must be text, not 1, {NO_TEXT}"),
        ("env: {A: b, A: c}", "env.A is given twice, first in line 4; one must go"),
        ("env: {A-B: c}", f'env."A-B" {VARIABLE}, not "A-B"'),
        ("env: {yes: c}", f"a name in hosts[1].env must be text, not yes, {NO_TEXT}"),
        ("env: {[a]: c}", "a name in hosts[1].env must be text, not a list"),
        ("env: {MLX_RANK: x}", "env.MLX_RANK must not set MLX_RANK: the launcher does"),
        ("env: {PMI_SIZE: x}", "env.PMI_SIZE must not set PMI_SIZE: the launcher does"),
        ("env: {M3DIST_JOB: x}", f"env.M3DIST_JOB must not set M3DIST_JOB; of these variables, only {USERS}"),
        ("prot: 22", f"prot is unknown (did you mean port?); the fields of a host are {FIELDS}"),
        ("<<: 22", f"a name in hosts[1] must be text, not <<, {NO_TEXT}"),
        ("ssh: mac3", "ssh is given twice, first in line 3; one must go"),
    ],
)  # fmt: skip
def test_a_wrong_field(wrong, field, said):
    place = "" if said.startswith("a name in") else "hosts[1]."
    assert wrong(host(field)) == f"hosts line 4: {place}{said}"


def test_allowed_variables(read):
    env = "{M3DIST_STEP_LIMIT: '60', M3DIST_START_LIMIT: '9', M3DIST_WIRED_LIMIT_MB: '0', MLX_METAL_FAST_SYNCH: '1'}"
    assert len(read(host(f"env: {env}")).hosts[1].env) == 4


SSH = "a name that ssh knows, such as mac1.local or me@mac1.local"


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=x", "a@-b", "-a@b", "mac 1", "", "a\tb", "a\x07b", "@a", "a@", "a@b@c", "ssh://a@b:2"]
)
def test_a_name_that_is_none(wrong, name):
    said = wrong(json.dumps([{"ssh": name}]))
    assert said == f"hosts line 1: hosts[0].ssh must be {SSH}, not {json.dumps(name)}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": is empty; it must list hosts (hostfiles/README.md)"),
        ("# nothing\n\n", ": is empty; it must list hosts (hostfiles/README.md)"),
        (b"\x7fELF\x02\xff", " line 1: is not text in UTF-8"),
        (b"mac1\n\xe9\n", " line 2: is not text in UTF-8"),
        (b"mac1\n\0\n", " line 2: is not text"),
        (b" " * (1 << 16) + b"a", ": is larger than 65536 bytes; that is no hostfile"),
        ("hosts: a\x07", " line 1: holds control characters; it must be text"),
        ('{"hosts": [}', f" line 1: {NEITHER} expected the node content, but found '}}'"),
        ('{"hosts":\n [{"ssh": "a"}]', f" line 2: {NEITHER} expected ',' or '}}', but got '<stream end>'"),
        ('hosts:\n- ["\\U00110000"]', f" line 2: {NEITHER} chr() arg not in range(0x110000)"),
        ("hosts:\n  " + "[" * 50000, " line 2: is nested too deeply for a hostfile"),
        ("hosts: &a []\nenvs: []", f" line 1: {NEITHER} anchors (&) and aliases (*) are not allowed here"),
        ("hosts: []\nenvs: *a", f" line 2: {NEITHER} anchors (&) and aliases (*) are not allowed here"),
        ("hosts: !!set {}", f" line 1: {NEITHER} tags (!) are not allowed here"),
        ("--- a\n--- b", f" line 2: {NEITHER} but found another document"),
        ("[]", " line 1: hosts must list at least one host"),
        ("{}", " line 1: hosts is missing: the list of hosts"),
        ('"mac1"', f' line 1: must be a hostfile, with the fields {TOP}, not "mac1"'),
        ("- mac1", f' line 1: hosts[0] must be a host, with the fields {FIELDS}, not "mac1"'),
        ("- ips: []", " line 1: hosts[0] needs ssh: the name that ssh knows, or 127.0.0.1 for this machine"),
        ("host:\n- ssh: a", f" line 2: host is unknown (did you mean hosts?); the fields of a hostfile are {TOP}"),
        ("backend: rign\nhosts: [{ssh: a}]", f' line 1: backend must be one of {BACKENDS}, not "rign"'),
        ("envs: {A: b}\nhosts: [{ssh: a}]", ' line 1: envs must be a list of "NAME=value", not a mapping'),
        ("envs: [A]\nhosts: [{ssh: a}]", ' line 1: envs[0] must be "NAME=value", not "A"'),
        ("envs:\n- A=1\n- A=2\nhosts: [{ssh: a}]", " line 3: envs[1] sets A for the second time; one must go"),
        ("envs: [MLX_HOSTFILE=/x]\nhosts: [{ssh: a}]", " line 1: envs[0] must not set MLX_HOSTFILE: the launcher does"),
        ("envs: [A B=1]\nhosts: [{ssh: a}]", f' line 1: envs[0] {VARIABLE}, not "A B"'),
        ("- {ssh: a@b, user: c}", ' line 1: hosts[0].user must be left out where ssh is "a@b", which names one'),
        ("- {ssh: localhost, port: 22}", f" line 1: hosts[0].port {NO_SSH}"),
        ("- {ssh: a, ranks: 9}\n- {ssh: b, ranks: 8}\n- {ssh: c}", f" line 2: hosts[1].ranks makes 17 {IN_ALL}"),
        ("- {ssh: a, ranks: 16}\n-\n  ssh: b", f" line 3: hosts[1].ranks makes 17 {IN_ALL}"),
        ("a:9\n\nb slots=9\nc", f" line 3: hosts[1].ranks makes 18 {IN_ALL}"),
        ("backend:ring\nhosts:\n- ssh: a", f' line 1: {SLOTS}, not "ring"{READ_AS_MPI}'),
        ("- {ssh: 127.0.0.1, ips: [127.0.0.1]}\n- {ssh: b}", f" line 1: hosts[0].ips {OWN}"),
        ("backend: nccl\nhosts: [{ssh: a}]", f" line 2: hosts[0].ips {MEET}"),
    ],
)  # fmt: skip
def test_a_wrong_file(wrong, content, said):
    assert wrong(content) == f"hosts{said}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mac1 slots=0", f'{SLOTS}, not "0"{READ_AS_MPI}'),
        ("mac1 slots=", f'{SLOTS}, not ""{READ_AS_MPI}'),
        ("mac1:", None),  # YAML's
        ("a mac1:17", f'"mac1:17" is unknown; allowed are slots=N and max_slots=N{READ_AS_MPI}'),
        ("mac1:many", f'{SLOTS}, not "many"{READ_AS_MPI}'),
        ("mac1:2 slots=2", "slots is given twice; one must go"),
        ("mac1 slots=4 max_slots=2", "max_slots must be at least slots, 4, not 2"),
        ("mac1 slot=4", f'"slot=4" is unknown; allowed are slots=N and max_slots=N{READ_AS_MPI}'),
        ("^mac1", f'must begin with host, user@host or host:slots, not "^mac1"{READ_AS_MPI}'),
        ("+n0", f'must begin with host, user@host or host:slots, not "+n0"{READ_AS_MPI}'),
        ("-oProxyCommand=x", f'must begin with host, user@host or host:slots, not "-oProxyCommand=x"{READ_AS_MPI}'),
        ("a@b@c", f'must begin with host, user@host or host:slots, not "a@b@c"{READ_AS_MPI}'),
        ("mac\x07", f'must begin with host, user@host or host:slots, not "mac\\u0007"{READ_AS_MPI}'),
    ],
)
def test_a_wrong_mpi_line(wrong, line, said):
    if said is None:
        assert "is unknown" in wrong(line)
    else:
        assert wrong(f"mac0\n{line}") == f"hosts line 2: {said}"


@pytest.mark.parametrize(
    ("backend", "rdma", "said"),
    [
        ("jaccl", [[None, "a"], ["b"]], "[1].rdma must have 2 entries for jaccl, one towards each host, not 1"),
        ("jaccl", [["a", "a"], ["b", None]], "[0].rdma[0] must be null: a host has no device towards itself"),
        ("jaccl", [[None, None], ["b", None]], "[0].rdma[1] must be a device of mac0 towards mac1, not null"),
        (
            "jaccl",
            [[None, "a", "b"], ["a", None, None], ["a", "b", None]],
            "[1].rdma[2] must be a device of mac1 towards mac2, not null",
        ),
        (
            "jaccl-ring",
            [[None, "a", None], ["a", None, "b"], ["a", "b", None]],
            "[0].rdma[2] must be a device of mac0 towards mac2, not null",
        ),
        (
            "jaccl-ring",
            [[None, "a", None, ["b", "c"]], ["a", None, "b", None], [None, "b", None, "a"], ["a", None, "b", None]],
            None,
        ),
    ],
)
def test_rdma(read, wrong, backend, rdma, said):
    hosts = [{"ssh": f"mac{i}", "ips": [f"10.0.0.{i + 1}"], "rdma": row} for i, row in enumerate(rdma)]
    content = json.dumps({"backend": backend, "hosts": hosts})
    if said is None:
        assert read(content).hosts[0].rdma == (None, "a", None, ("b", "c"))
    else:
        assert wrong(content) == f"hosts line 1: hosts{said}"


def test_a_file_that_cannot_be_read(tmp_path):
    for path, why in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no", "No such file or directory"),
        ("a\0b", "embedded null byte"),
    ):
        with pytest.raises(HostfileError, match=f"cannot be read: {why}$"):
            read_hostfile(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Whatever the file holds


fields = st.sampled_from(["backend", "envs", "hosts", *hostfile._FIELDS, "slots", "max_slots", "<<", "MLX_RANK"])
words = st.sampled_from("ring jaccl mac1 127.0.0.1 10.0.0.1 A=b -x ~ null yes 022 1e3 0x1 2026-01-01 = 1:30".split())
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | words
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields | st.text(max_size=4), inner, max_size=5),
    max_leaves=12,
)
hostfiles = st.fixed_dictionaries(
    {"hosts": st.lists(st.dictionaries(fields, trees, max_size=4).map(lambda d: {"ssh": "mac1"} | d), max_size=3)},
    optional={"backend": words, "envs": trees},
)
marks = st.sampled_from(
    [*"-:?[]{},&*!|>%@`'\"#\n\t \\=~\r\0é\u2028\ufeff", "- ", ": ", "\n  ", "\\u", "\\U", "%YAML ", "---\n"]
)
texts = st.lists(fields | words | marks | st.characters(), max_size=40).map("".join)


@settings(deadline=None)
@given(content=st.one_of(hostfiles.map(json.dumps), trees.map(json.dumps), texts, st.binary(max_size=60)))
@example(content="[" * 3000)
@example(content='{"hosts": ' * 3000)
@example(content="%YAML " + "9" * 5000 + ".1\n---\n")
@example(content='"\\UFFFFFFFF"')
@example(content="hosts: [{ssh: a, memory_gb: " + "9" * 5000 + "}]")
@example(content="- ssh: " + "a" * 60000)
@example(content="? " * 3000)
def test_any_content_is_a_hostfile_or_a_hostfile_error(scratch, content):
    scratch.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        found = read_hostfile(str(scratch))
    except HostfileError as error:
        assert str(error).startswith(f"{scratch}") and len(str(error)) < 1000
        return
    assert 1 <= found.world <= 16
    for each in found.hosts:
        assert each.ssh.isprintable() and not each.ssh.startswith("-") and not (each.user or "").startswith("-")
        assert all(ipaddress.IPv4Address(ip) for ip in each.ips)
        assert all("\0" not in text for text in (*each.env, *each.env.values(), each.cwd or "", each.python or ""))
