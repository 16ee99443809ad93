"""What doctor finds, from recorded evidence: Macs as tests/macs.py has them, hostfiles and measured links."""

import json
from dataclasses import replace

import pytest
from macs import ABOUT, GIB, MESH, RING, changed, four, mac, output, two

from m3dist.cluster.hostfile import Host, Hostfile
from m3dist.doctor.examination import Examination, Finding
from m3dist.doctor.findings import find, works
from m3dist.doctor.report import HostReport, NoAnswer
from m3dist.doctor.survey import Measured
from m3dist.doctor.topology import Link, needed_links
from m3dist.plan import make_plan
from m3dist.plan_report import inventory_of, rank_report

RING_OF_TWO = (Host("mac1", ips=("192.168.0.1",)), Host("mac2", ips=("192.168.0.2",)))
JACCL_OF_TWO = (
    Host("mac1", ips=("10.0.0.1",), rdma=(None, "rdma_en3")),
    Host("mac2", ips=("10.0.0.2",), rdma=("rdma_en4", None)),
)
MPI_HERE = ABOUT | {"mpirun": "/opt/homebrew/bin/mpirun", "no way": {}}
FAST = {"round_trip": 0.3e-3, "bandwidth": 3e9}


def examined(reports, hosts=RING_OF_TWO, backend="ring", measured=None, **others) -> Examination:
    """All links measured and fast, unless given."""
    links = needed_links(backend, hosts, reports)
    measured = [Measured(link, **FAST) for link in links] if measured is None else measured
    others = {"ours": MPI_HERE if backend == "mpi" else ABOUT, "measured": measured} | others
    return Examination(Hostfile("hosts.json", backend, {}, tuple(hosts)), backend, reports, **others)


def findings(reports, **others) -> list[Finding]:
    found = find(examined(reports, **others))
    assert all(f.remedy for f in found if f.level == "error"), "an error says what to do"
    return found


def troubles(reports, **others) -> list[tuple[str, str, str]]:
    """(check, host, level) of what is neither in order nor a note."""
    return [(f.check, f.host, f.level) for f in findings(reports, **others) if f.level in ("error", "warning")]


def only(found: list[Finding], check: str, level: str) -> Finding:
    """The one finding of that check and level."""
    [finding] = [f for f in found if (f.check, f.level) == (check, level)]
    return finding


# ---------------------------------------------------------------------------------------------------------------------
# In order


def test_two_macs_over_thunderbolt():
    found = findings(two())
    assert works(found)
    assert {f.level for f in found} == {"ok", "note"}
    assert {f.check for f in found} == {
        "ssh", "versions", "mlx", "memory", "wired limit", "clock", "addresses", "links",
    }  # fmt: skip


def test_two_macs_over_jaccl():
    assert troubles(two(), hosts=JACCL_OF_TWO, backend="jaccl") == []
    seen = [f.seen for f in findings(two(), hosts=JACCL_OF_TWO, backend="jaccl") if f.check == "rdma"]
    assert seen == [
        "rdma_en3 towards mac2 is up and has an IPv4 address",
        "rdma_en4 towards mac1 is up and has an IPv4 address",
    ]


def test_four_macs():
    hosts = [Host(f"mac{i}", ips=(f"10.0.0.{i}",), rdma=row) for i, row in enumerate(mesh_rows(), 1)]
    assert troubles(four(MESH), hosts=hosts, backend="jaccl") == []


def mesh_rows() -> list[tuple]:
    devices = [f"rdma_en{receptacle + 1}" for receptacle in (1, 2, 3)]
    return [tuple(devices[:i] + [None] + devices[i:]) for i in range(4)]


def test_what_a_token_waits_for():
    note = only(findings(two()), "links", "note")
    assert note.seen == "the 120 sums of a token of MiniMax-M3 take 36.0 ms at least over these links"


def test_what_a_token_waits_for_at_two_addresses():
    """They are used at once, and the slower one is waited for."""
    hosts = (replace(RING_OF_TWO[0], ips=("192.168.0.1", "10.0.0.1")), replace(RING_OF_TWO[1], ips=("192.168.0.2",)))
    trips = [(Link(0, 1, "192.168.0.2"), 0.3e-3), (Link(1, 0, "192.168.0.1"), 0.1e-3), (Link(1, 0, "10.0.0.1"), 0.3e-3)]
    measured = [Measured(link, trip, 3e9) for link, trip in trips]
    note = next(f for f in findings(two(), hosts=hosts, measured=measured) if (f.check, f.host) == ("links", "all"))
    assert note.seen == "the 120 sums of a token of MiniMax-M3 take 36.0 ms at least over these links"


def test_what_a_token_waits_for_with_replicated_attention():
    inventory, _ = inventory_of("MiniMaxAI/MiniMax-M3-4bit", None, None, None)
    note = only(findings(two(), plan=make_plan(inventory, 2, attention="replicated")), "links", "note")
    assert note.seen == "the 60 sums of a token of MiniMax-M3 take 18.0 ms at least over these links"


def test_findings_are_plain_values():
    assert json.dumps([vars(f) for f in findings(two())])


# ---------------------------------------------------------------------------------------------------------------------
# Hosts that do not answer


@pytest.mark.parametrize(
    "said, remedy",
    [
        ("me@mac2: Permission denied (publickey,password).", "ssh-copy-id"),
        ("ssh: Could not resolve hostname mac2: nodename nor servname provided", "Correct the hostfile's `ssh`"),
        ("ssh: connect to host mac2 port 22: Connection refused", "Remote Login"),
        ("/usr/bin/python3: No module named m3dist", "python"),
        ("something else", "make `ssh mac2 true` work by hand"),
    ],
)
def test_a_host_that_does_not_answer_is_one_finding(said, remedy):
    first, _ = two()
    reports = [first, NoAnswer(f"ssh ended with exit code 255: {said}", said)]
    unmeasured = [Measured(Link(0, 1, "192.168.0.2"), unmeasured="a host cannot be reached")]
    found = findings(reports, measured=unmeasured)
    error = only(found, "ssh", "error")
    assert error.host == "mac2" and said in error.seen and remedy in error.remedy
    assert [f.level for f in found if f.level == "error"] == ["error"]
    assert not works(found)


def test_a_host_that_stops_answering_is_no_trouble_of_ssh():
    reports = [two()[0], NoAnswer("no answer in time", greeted=True)]
    error = only(findings(reports, measured=[]), "answer", "error")
    assert error.seen == "it began to answer, then: no answer in time" and "ssh" not in error.remedy
    assert [f.host for f in findings(reports, measured=[]) if f.check == "ssh"] == ["mac1"]


def test_nobody_answers():
    found = findings([NoAnswer("no answer within 13 s")] * 2, measured=[])
    assert [(f.check, f.level) for f in found] == [("ssh", "error")] * 2


def test_hosts_with_one_name_are_told_apart():
    hosts = [Host("127.0.0.1", ips=("127.0.0.1",), ranks=2), Host("127.0.0.1", ips=("127.0.0.1",))]
    assert examined([mac("a"), mac("a")], hosts=hosts).names == ["127.0.0.1 (rank 0)", "127.0.0.1 (rank 2)"]


# ---------------------------------------------------------------------------------------------------------------------
# Versions


def packages(**versions: str) -> dict:
    return {"packages": mac("mac").raw["packages"] | versions}


def about(**values: str | None) -> dict:
    return {"about": ABOUT | {name.replace("_", " "): value for name, value in values.items()}}


@pytest.mark.parametrize(
    "second, level, seen, remedy",
    [
        (
            about(m3dist_build="ba9876543210"),
            "error",
            "m3dist build is ba9876543210 there, 0123456789ab here",
            "install the",
        ),
        (about(mlx_version="0.33.0"), "error", "mlx version is 0.33.0 there, 0.32.4 here", "pip install mlx==0.32.4"),
        (about(mlx_version=None), "error", "mlx version is none there", "/Users/me/venv/bin/python3 -m pip install"),
        (packages(numpy="2.3.0"), "warning", "numpy 2.3.0 (elsewhere 2.4.6)", "install the versions"),
        ({"python": {"path": "p", "version": "3.14.0"}}, "warning", "Python 3.14 (elsewhere 3.12)", "install"),
    ],
)
def test_a_host_that_differs_from_most(second, level, seen, remedy):
    reports = [*two(), mac("mac3", addresses={"en0": "10.0.0.3/24"})]
    reports[2] = HostReport(reports[2].raw | second)
    hosts = [Host(f"mac{i}", ips=(f"10.0.0.{i}",)) for i in (1, 2, 3)]
    finding = only(findings(reports, hosts=hosts), "versions", level)
    assert finding.host == "mac3" and seen in finding.seen and remedy in finding.remedy


def test_hosts_that_agree_but_not_with_the_launcher():
    """It may be none of them; it refuses them all the same."""
    found = findings(two(), ours={**ABOUT, "m3dist build": "ba9876543210"})
    assert [(f.host, f.seen) for f in found if f.level == "error"] == [
        ("mac1", "m3dist build is 0123456789ab there, ba9876543210 here"),
        ("mac2", "m3dist build is 0123456789ab there, ba9876543210 here"),
    ]


def test_an_mlx_that_hangs():
    reports, ours = two(about(mlx_version="0.32.0"), about(mlx_version="0.32.0")), ABOUT | {"mlx version": "0.32.0"}
    assert troubles(reports, ours=ours) == [("versions", "mac1", "error"), ("versions", "mac2", "error")]


# ---------------------------------------------------------------------------------------------------------------------
# MLX


def test_mlx_that_does_not_start():
    first, second = two()
    second = changed(second, mlx=None)
    second.raw["outputs"]["mlx"]["error"] = "Traceback ...\nImportError: libmlx.so: cannot open shared object file\n"
    error = only(findings([first, second]), "mlx", "error")
    assert error.seen.endswith("ImportError: libmlx.so: cannot open shared object file")


def without(report: HostReport, **values) -> HostReport:
    return changed(report, mlx=json.dumps({**report.mlx, **values}))


def test_mlx_without_metal_or_without_the_backend():
    first, second = two()
    assert only(findings([first, without(second, metal=False)]), "mlx", "error").seen.startswith("MLX has no Metal")
    error = only(
        findings([first, without(second, backends=["ring"])], hosts=JACCL_OF_TWO, backend="jaccl"), "mlx", "error"
    )
    assert error.seen == "MLX has no jaccl there, only ring" and "macOS 26.2" in error.remedy


# ---------------------------------------------------------------------------------------------------------------------
# Memory and disk, against a plan


@pytest.fixture(scope="module")
def four_bits():
    """M3 in 4 bits over two ranks: 111.7 GiB each."""
    return make_plan(inventory_of("MiniMaxAI/MiniMax-M3-4bit", None, None, None)[0], 2)


def macs_with(memory: int, available: float, **others) -> list[HostReport]:
    return two(
        {"memory": memory, "available": available, **others}, {"memory": memory, "available": available, **others}
    )


def test_room_enough(four_bits):
    assert troubles(macs_with(256, 240.0), plan=four_bits, context=32768) == []


def test_too_little_memory(four_bits):
    error = next(f for f in findings(macs_with(96, 90.0), plan=four_bits) if f.level == "error")
    assert error.check == "memory" and error.seen == "weights and activations need 115.7 GiB, it has 96.0 GiB"


def test_memory_that_others_hold(four_bits):
    reports = macs_with(256, 100.0)
    warning = next(f for f in findings(reports, plan=four_bits) if f.check == "memory")
    assert warning.level == "warning" and "100.0 GiB of 256.0 GiB available" in warning.seen


def test_the_hostfile_s_memory(four_bits):
    """GB as Apple sells them, and as `plan --machines` takes them: 111.7 GiB and a reserve of 10 fit into 122 GB."""
    hosts = (replace(RING_OF_TWO[0], memory_gb=121.0), replace(RING_OF_TWO[1], memory_gb=122.0))
    error = only(findings(macs_with(256, 240.0), hosts=hosts, plan=four_bits), "memory", "error")
    assert error.host == "mac1"
    assert error.seen == "weights need 111.7 GiB, the hostfile's memory_gb allows 121 GB less 10 reserved"


def test_what_the_plan_says_of_a_machine_doctor_says_too(four_bits):
    for memory in (121.0, 122.0):
        plans = rank_report(four_bits, 0, memory, None).problem
        hosts = (replace(RING_OF_TWO[0], memory_gb=memory), RING_OF_TWO[1])
        assert works(findings(macs_with(256, 240.0), hosts=hosts, plan=four_bits)) == (plans is None)


@pytest.mark.parametrize("backend, cuda", [("nccl", None), ("ring", True)])
def test_memory_of_nvidia_gpus(four_bits, backend, cuda):
    """It is not the host's, which says nothing: neither that it is too little nor that it is enough."""
    for gib in (8, 512):
        meminfo = f"MemTotal: {gib * 2**20} kB\nMemAvailable: {gib * 2**20} kB\n"
        hosts = [changed(report, memory=meminfo) for report in macs_with(1, 1.0, platform="linux")]
        reports = [without(report, backends=["ring", "nccl"], cuda=bool(cuda)) for report in hosts]
        found = [f for f in findings(reports, plan=four_bits, backend=backend) if f.check == "memory"]
        assert [f.level for f in found] == ["note", "note"]
        assert found[0].seen == "weights need 111.7 GiB: the memory of its GPU is not compared"


def test_entries_of_one_machine_share_its_memory(four_bits):
    hosts = [Host("127.0.0.1", ips=("127.0.0.1",)), Host("127.0.0.1", ips=("127.0.0.1",))]
    report = mac("mac1", memory=192, available=190.0, addresses={"lo0": "127.0.0.1/8"})
    assert ("memory", "127.0.0.1 (rank 0)", "error") in troubles([report, report], hosts=hosts, plan=four_bits)


def test_the_wired_limit(four_bits):
    reports = macs_with(128, 125.0)
    warnings = [f for f in findings(reports, plan=four_bits) if f.check == "wired limit"]
    assert [f.level for f in warnings] == ["warning", "warning"]
    assert (
        "macOS lets the GPU keep 96.0 GiB" in warnings[0].seen
        and "sudo sysctl iogpu.wired_limit_mb=" in warnings[0].remedy
    )


def model(path: str, held: float, free: float, problem: str | None = None) -> dict:
    found = {"path": path, "hub": path.startswith(HUB), "bytes": int(held * GIB), "free": int(free * GIB)}
    return {"model": found | {"problem": problem}}


HUB = "/Users/me/.cache/huggingface/hub/models--MiniMaxAI--MiniMax-M3-4bit"
STORE = "/Users/me/.cache/m3dist/store"


def keeping(report: HostReport, free: float, *entries: dict) -> HostReport:
    """With what kept.py says of the store there."""
    return changed(report, store=json.dumps({"root": STORE, "free": int(free * GIB), "entries": entries}))


def entry(rank: int, day: int = 1, gib: float = 111.7, problem: str | None = None, plan: str = "p") -> dict:
    created = f"2026-01-{day:02}T00:00:00.000000+00:00"
    facts = {"rank": rank, "created": created, "revision": "r", "plan": plan}
    return facts | {"bytes": int(gib * GIB), "problem": problem}


def disks(plan, path: str, held: float, free: float, *entries: list[dict], **others) -> list[Finding]:
    """What two Macs with so much of the whole checkpoint, and these entries, say about their disks."""
    reports = macs_with(256, 240.0, **model(path, held, free))
    reports = [keeping(report, free, *own) for report, own in zip(reports, entries or ([], []))]
    found = findings(reports, plan=plan, model="MiniMaxAI/MiniMax-M3-4bit", **others)
    return [f for f in found if f.check == "disk"]


@pytest.mark.parametrize(
    "path, held, free, level, remedy",
    [
        (f"{HUB}/snapshots/1", 224, 10, "ok", ""),
        (HUB, 0, 112, "warning", "m3dist fetch MiniMaxAI/MiniMax-M3-4bit --hostfile hosts.json"),
        (HUB, 0, 111, "error", "make room, or set M3DIST_STORE"),
        ("/Volumes/models/m3", 0, 300, "error", "every host must have it at that path"),
        ("/Volumes/models/m3", 224, 300, "ok", ""),
    ],
)
def test_disk(four_bits, path, held, free, level, remedy):
    """A rank has to fetch its slice alone."""
    found = disks(four_bits, path, held, free)
    assert [f.level for f in found] == [level, level] and remedy in found[0].remedy
    if level == "warning":
        assert [f.seen for f in found] == [f"111.7 GiB of rank {rank} are missing in {STORE}" for rank in (0, 1)]


def test_what_the_stores_keep(four_bits):
    """Whole slices of one revision and format, the newest that any host has."""
    found = disks(four_bits, HUB, 0, 1, [entry(0)], [entry(1)])
    assert [(f.level, f.seen) for f in found] == [("ok", f"111.7 GiB of rank {n} in {STORE}") for n in (0, 1)]
    found = disks(four_bits, HUB, 0, 300, [entry(0)], [entry(1, plan="another")])
    assert [f.level for f in found].count("ok") == 1
    found = disks(
        four_bits, HUB, 0, 300, [entry(0), entry(0, 2, plan="q")], [entry(1), entry(0, 3, plan="not its rank's")]
    )
    assert [(f.host, f.level) for f in found] == [("mac1", "ok"), ("mac2", "warning")]
    found = disks(four_bits, HUB, 0, 1, [entry(0)], [entry(1, problem="model.safetensors is missing")])
    assert (found[1].level, found[1].seen) == ("warning", "model.safetensors is missing")


def test_a_fetch_is_of_the_cut_that_was_asked_for(four_bits):
    cut = {"weights": [3.0, 1.0], "experts": "whole", "attention": "heads"}
    found = disks(None, HUB, 0, 300, cut=cut)
    command = "m3dist fetch MiniMaxAI/MiniMax-M3-4bit --hostfile hosts.json --weights 3,1 --experts whole"
    assert found[0].level == "warning" and found[0].remedy == f"fetch them first: {command}"


def test_a_store_that_cannot_be_looked_into(four_bits):
    reports = macs_with(256, 240.0, **model(HUB, 0, 300))
    broken = {"status": 1, "out": "", "error": "Traceback ...\nm3dist.errors.StoreError: /store: Permission denied\n"}
    for report in reports:
        report.raw["outputs"]["store"] = broken
    warning = next(f for f in findings(reports, plan=four_bits, model="MiniMaxAI/M3") if f.check == "disk")
    assert (warning.level, "Permission denied" in warning.seen) == ("warning", True)


def test_memory_is_what_the_stores_keep_for_the_ranks():
    """Not what the checkpoint would take in the format that it has at the hub."""
    bf16 = make_plan(inventory_of("MiniMaxAI/MiniMax-M3", None, None, None)[0], 2)
    nothing = [keeping(report, 900) for report in macs_with(192, 180.0, **model(HUB, 0, 900))]
    assert ("memory", "mac1", "error") in troubles(nothing, plan=bf16)
    slices = [keeping(report, 1, entry(rank)) for rank, report in enumerate(nothing)]
    assert troubles(slices, plan=bf16) == []


def test_a_model_that_the_host_s_user_may_not_read(four_bits):
    problem = "/Users/anna/M3: Permission denied"
    reports = two(second=model("/Users/anna/M3", 0, 300, problem))
    error = only(findings(reports, plan=four_bits, model="/Users/anna/M3"), "disk", "error")
    assert (error.host, error.seen) == ("mac2", problem) and "let me read it there" in error.remedy


def test_a_working_directory_that_is_missing():
    problem = "cwd /nowhere is no directory here; correct `cwd` in the hostfile"
    reports = two({"directory": {"path": "/Users/me", "problem": problem}})
    assert only(findings(reports), "disk", "error").seen == problem


# ---------------------------------------------------------------------------------------------------------------------
# Addresses


def where(addresses: dict, **others) -> dict:
    return {"addresses": addresses, **others}


def gone(report: HostReport, ip: str) -> HostReport:
    """With the answer of a host that does not have `ip`."""
    return HostReport({**report.raw, "addresses": {**report.raw["addresses"], ip: "EADDRNOTAVAIL"}}, report.skew)


def test_an_address_that_is_gone():
    reports = two(second=where({"en0": "10.0.0.2/24", "en4": "192.168.7.2/30"}))
    error = only(findings([reports[0], gone(reports[1], "192.168.0.2")]), "addresses", "error")
    assert error.host == "mac2"
    assert error.seen == "192.168.0.2 is no address of this host. It has 10.0.0.2 (en0), 192.168.7.2 (en4)"


def test_addresses_that_have_changed_places():
    reports = two(where({"en3": "192.168.0.2/30"}), where({"en4": "192.168.0.1/30"}))
    reports = [gone(reports[0], "192.168.0.1"), gone(reports[1], "192.168.0.2")]
    found = [f.seen for f in findings(reports) if f.check == "addresses"]
    assert found[0].startswith("192.168.0.1 is no address of this host; it is mac2's.")
    assert found[1].startswith("192.168.0.2 is no address of this host; it is mac1's.")


def test_an_address_that_is_not_needed():
    """jaccl's ranks meet on the first host's."""
    reports = two()
    reports[1] = gone(reports[1], "10.0.0.9")
    hosts = (JACCL_OF_TWO[0], replace(JACCL_OF_TWO[1], ips=("10.0.0.9",)))
    assert troubles(reports, hosts=hosts, backend="jaccl") == [("addresses", "mac2", "warning")]


def test_an_address_of_two_hosts():
    reports = two(second=where({"en4": "192.168.0.1/30"}))
    hosts = (RING_OF_TWO[0], Host("mac2", ips=("192.168.0.1",)))
    error = only(findings(reports, hosts=hosts), "addresses", "error")
    assert (error.host, error.seen) == ("mac2", "192.168.0.1 is an address of mac1 too")


def test_one_machine_under_two_names():
    report = two()[0]
    hosts = (RING_OF_TWO[0], Host("mac1.home", ips=("192.168.0.1",)))
    assert only(findings([report, report], hosts=hosts), "addresses", "error").seen == "is the same machine as mac1"


def test_wifi_and_self_assigned_addresses():
    reports = [mac(f"mac{i}", addresses={"en1": f"10.0.0.{i}/24"}) for i in (1, 2)]
    hosts = [Host(f"mac{i}", ips=(f"10.0.0.{i}",)) for i in (1, 2)]
    assert troubles(reports, hosts=hosts) == [("addresses", "mac1", "warning"), ("addresses", "mac2", "warning")]
    reports = two(where({"en3": "169.254.1.1/16"}), where({"en4": "169.254.2.2/16"}))
    hosts = [Host("mac1", ips=("169.254.1.1",)), Host("mac2", ips=("169.254.2.2",))]
    notes = [f for f in findings(reports, hosts=hosts) if f.check == "addresses"]
    assert [f.level for f in notes] == ["note", "note"] and "self-assigned" in notes[0].seen


def test_where_jaccl_s_ranks_only_meet_may_be_slow():
    reports = two(*({"addresses": {"en1": f"10.0.0.{i}/24", f"en{2 + i}": f"192.168.0.{i}/30"}} for i in (1, 2)))
    measured = [Measured(Link(1, 0, "10.0.0.1"), round_trip=9e-3, bandwidth=20e6)]
    assert troubles(reports, hosts=JACCL_OF_TWO, backend="jaccl", measured=measured) == []


# ---------------------------------------------------------------------------------------------------------------------
# Cables


def ring_of_four(*order: int, **others) -> dict:
    """four(RING) in a hostfile of that order. Around, its cables join 1, 3, 2 and 4: each has its address on the cable
    to the one before it."""
    ips, reports = {1: "192.168.0.5", 2: "192.168.0.13", 3: "192.168.0.2", 4: "192.168.0.10"}, four(RING, **others)
    hosts = [Host(f"mac{number}", ips=(ips[number],)) for number in order]
    return {"reports": [reports[number - 1] for number in order], "hosts": hosts}


def test_a_ring_of_four():
    assert troubles(**ring_of_four(1, 3, 2, 4)) == []


def test_cables_that_lead_elsewhere():
    """As after a restart or a re-cabling: the addresses are there, but face other Macs."""
    found = [f for f in findings(**ring_of_four(1, 2, 3, 4), measured=[]) if f.check == "cables"]
    assert [(f.level, f.seen) for f in found] == [
        ("error", "192.168.0.13 is on en3, whose cable leads to mac3, not to mac1"),
        ("error", "192.168.0.2 is on en2, whose cable leads to mac1, not to mac2"),
        ("error", "192.168.0.10 is on en2, whose cable leads to mac2, not to mac3"),
    ]


def test_an_entry_a_rank():
    """As mlx.launch has it: two ranks a Mac, each an entry. A cable leads to the Mac, whichever entry is meant."""
    hosts = [host for host in RING_OF_TWO for _ in range(2)]
    reports = [report for report in two() for _ in range(2)]
    assert troubles(reports, hosts=hosts) == []
    apart = [mac(f"mac{i}", addresses={"en0": f"10.0.0.{i}/24"}) for i in (1, 1, 2, 2)]
    over_ethernet = [Host(f"mac{i}", ips=(f"10.0.0.{i}",)) for i in (1, 1, 2, 2)]
    assert troubles(apart, hosts=over_ethernet) == []
    notes = [f.seen for f in findings(reports, hosts=over_ethernet) if f.check == "cables"]
    assert notes == [
        "a Thunderbolt cable leads to mac1 (rank 1), but 10.0.0.2 is on en0",
        "a Thunderbolt cable leads to mac2 (rank 3), but 10.0.0.1 is on en0",
    ]


def test_devices_of_an_entry_a_rank():
    (first, second), (one, other) = JACCL_OF_TWO, ("rdma_en3", "rdma_en4")
    hosts = [replace(first, rdma=(None, None, one, one))] * 2 + [replace(second, rdma=(other, other, None, None))] * 2
    reports = [report for report in two() for _ in range(2)]
    assert troubles(reports, hosts=hosts, backend="jaccl") == []


def test_no_cable():
    reports = two({"cables": {}}, {"cables": {}})
    error = next(f for f in findings(reports, measured=failed("ETIMEDOUT")) if f.check == "cables")
    assert (error.level, error.seen) == ("error", "no Mac is at the cable of en4, which has 192.168.0.2")


def test_a_link_that_works_outweighs_what_its_cable_looks_like():
    """Macs may see each other through something that does not tell of them, or through a bridge."""
    hidden = two({"cables": {}}, {"cables": {}})
    assert troubles(hidden) == [("cables", "mac2", "warning"), ("cables", "mac1", "warning")]
    assert {level for _, _, level in troubles(**ring_of_four(1, 2, 3, 4))} == {"warning"}


def test_a_cable_that_is_not_used():
    hosts = [Host("mac1", ips=("10.0.0.1",)), Host("mac2", ips=("10.0.0.2",))]
    note = next(f for f in findings(two(), hosts=hosts) if f.check == "cables")
    assert (note.level, note.seen) == ("note", "a Thunderbolt cable leads to mac1, but 10.0.0.2 is on en0")


def test_another_network():
    reports = [mac("mac1", addresses={"en0": "10.0.0.1/24"}), mac("mac2", addresses={"en0": "10.9.0.2/24"})]
    hosts = [Host("mac1", ips=("10.0.0.1",)), Host("mac2", ips=("10.9.0.2",))]
    warning = next(f for f in findings(reports, hosts=hosts) if f.check == "cables")
    assert warning.level == "warning" and "goes through a router" in warning.seen


def test_a_slow_cable():
    reports = two({"cable_speed": 40}, {"cable_speed": 40})
    assert troubles(reports) == [("cables", "mac1 -> mac2", "warning")]


def test_bridges_around_a_circle():
    assert troubles(**ring_of_four(1, 3, 2, 4, bridge=["en2", "en3"])) == [("cables", "all", "warning")]


# ---------------------------------------------------------------------------------------------------------------------
# Links


def failed(problem: str, **others) -> list[Measured]:
    return [Measured(Link(0, 1, "192.168.0.2"), problem=problem, **others), Measured(Link(1, 0, "192.168.0.1"), **FAST)]


@pytest.mark.parametrize("local", [True, False])
def test_local_network_privacy(local):
    """mlx #3755: TCP fails with errno 65, although ssh and ping work."""
    hosts = (replace(RING_OF_TWO[0], ssh="127.0.0.1"), RING_OF_TWO[1]) if local else RING_OF_TWO
    error = only(findings(two(), hosts=hosts, measured=failed("EHOSTUNREACH")), "links", "error")
    assert error.seen == "connecting to 192.168.0.2 fails: EHOSTUNREACH, although ssh works"
    assert "Privacy & Security > Local Network" in error.remedy and "TN3179" in error.remedy
    assert ("the program in which you started m3dist" in error.remedy) == local


def test_the_firewall_of_the_one_who_listens():
    found = findings(two(second={"firewall": 1}), measured=failed("ETIMEDOUT"))
    error = only(found, "links", "error")
    assert error.seen == "connecting to 192.168.0.2 fails: ETIMEDOUT; the firewall of mac2 is on"
    assert "let Python receive connections" in error.remedy
    assert [f.level for f in found if f.check == "firewall"] == ["note"]


@pytest.mark.parametrize(
    "problem, remedy",
    [
        ("ETIMEDOUT", "is the link up?"),
        ("ECONNREFUSED", "another machine has that address"),
        ("another program answers at this address", "another machine has that address"),
        ("ENETUNREACH", "cable, interface, netmask"),
    ],
)
def test_a_link_that_fails(problem, remedy):
    error = only(findings(two(), measured=failed(problem)), "links", "error")
    assert error.host == "mac1 -> mac2" and problem in error.seen and remedy in error.remedy


def test_an_address_of_our_own_choice_may_be_wrong():
    """Nothing in an MPI hostfile says which address is meant."""
    hosts = [Host("mac1"), Host("mac2")]
    found = findings(with_open_mpi(two()), hosts=hosts, backend="mpi", measured=failed("ETIMEDOUT"))
    assert [f.level for f in found if f.check == "links"] == ["warning", "ok"]


def test_links_that_were_not_measured():
    warning = only(findings(two(), measured=failed(None, unmeasured="no time was left")), "links", "warning")
    assert warning.seen == "192.168.0.2 was not measured: no time was left"


@pytest.mark.parametrize(
    "trip, bandwidth, seen",
    [
        (0.3e-3, 0.12e9, "a Thunderbolt cable does 1 GB/s and more"),
        (9e-3, 3e9, "every token waits for many of them"),
    ],
)
def test_slow_links(trip, bandwidth, seen):
    slow = Measured(Link(0, 1, "192.168.0.2"), round_trip=trip, bandwidth=bandwidth)
    warning = only(findings(two(), measured=[slow]), "links", "warning")
    assert seen in warning.seen


def test_gigabit_ethernet_is_no_trouble():
    hosts = [Host("mac1", ips=("10.0.0.1",)), Host("mac2", ips=("10.0.0.2",))]
    measured = [Measured(link, 0.4e-3, 117e6) for link in needed_links("ring", hosts, two())]
    assert troubles(two(), hosts=hosts, measured=measured) == []


# ---------------------------------------------------------------------------------------------------------------------
# RDMA


def rdma_error(reports, hosts=JACCL_OF_TWO) -> Finding:
    return next(f for f in findings(reports, hosts=hosts, backend="jaccl") if f.check == "rdma" and f.level == "error")


@pytest.mark.parametrize(
    "first, seen, remedy",
    [
        ({"macos": "26.1"}, "macOS 26.1 has no RDMA over Thunderbolt", "update to macOS 26.2"),
        # omlx #3037, mlx #3777: enabled, no devices, and Recovery cannot help.
        ({"port_speed": 40, "cable_speed": 40, "devices": []}, "ports are Thunderbolt 4 or older (40 Gb/s)", "ring"),
        ({"rdma_ctl": "disabled", "devices": []}, "`rdma_ctl status` says disabled", "Recovery"),
        ({"devices": []}, "`rdma_ctl status` says enabled, `ibv_devices` lists no device", "Recovery"),
        # mlx #3207: names change with restarts.
        ({"devices": ["rdma_en5"]}, "rdma_en3 towards mac2 does not exist; there are rdma_en5", "m3dist hostfile"),
        ({"down": ["rdma_en3"]}, "rdma_en3 towards mac2 is down", "take the cable out and in again"),
        ({"down": ["rdma_en3"], "peers_offer_rdma": False}, "rdma_en3 towards mac2 is down", "offers no RDMA"),
        ({"cables": {}}, "rdma_en3 towards mac2 is down", "no Mac is at the other end"),
        # mlx #3467, #4191: errno 22.
        ({"addresses": {"en0": "10.0.0.1/24"}}, "rdma_en3 towards mac2 has no IPv4 address", "ifconfig en3 inet 169"),
        (
            {"addresses": {"en0": "10.0.0.1/24", "bridge0": "10.9.0.1/24"}, "bridge": ["en2", "en3"]},
            "the Thunderbolt Bridge bridge0 holds its port",
            "ifconfig bridge0 deletem en3; sudo ifconfig en3 inet",
        ),
    ],
)  # fmt: skip
def test_rdma(first, seen, remedy):
    error = rdma_error(two(first))
    assert error.host == "mac1" and seen in error.seen and remedy in error.remedy


def test_a_slow_cable_in_every_port_makes_no_thunderbolt_4():
    reports = two({"receptacles": 2, "cable_speed": 40, "cables": {1: ("mac3", 1), 2: ("mac2", 3)}})
    assert ("rdma", "mac1", "error") not in troubles(reports, hosts=JACCL_OF_TWO, backend="jaccl")


def test_thunderbolt_4_is_never_sent_to_recovery():
    found = findings(two({"port_speed": 40, "cable_speed": 40, "devices": []}), hosts=JACCL_OF_TWO, backend="jaccl")
    assert not any("Recovery" in f.remedy for f in found)


def test_a_bridge_beside_an_address_works():
    """Reported of three Macs with bridge0 in place and addresses on the ports."""
    found = findings(two({"bridge": ["en2", "en3"]}), hosts=JACCL_OF_TWO, backend="jaccl")
    assert only(found, "rdma", "note").seen.endswith("holds its port") and works(found)


def test_devices_at_the_wrong_cables():
    rows = mesh_rows()
    rows[0] = (None, "rdma_en3", "rdma_en2", "rdma_en4")
    hosts = [Host(f"mac{i}", ips=(f"10.0.0.{i}",), rdma=row) for i, row in enumerate(rows, 1)]
    assert rdma_error(four(MESH), hosts).seen == "the cable at rdma_en3 leads to mac3, not towards mac2"


def test_several_cables_between_two():
    cables = {1: ("mac2", 1), 2: ("mac2", 2)}, {1: ("mac1", 1), 2: ("mac1", 2)}
    given = ({"en0": f"10.0.0.{i}/24", "en2": f"192.168.0.{i}/30", "en3": f"192.168.0.{4 + i}/30"} for i in (1, 2))
    reports = [mac(f"mac{i}", row, own) for i, row, own in zip((1, 2), cables, given)]
    pair = ("rdma_en2", "rdma_en3")
    hosts = [Host("mac1", ips=("10.0.0.1",), rdma=(None, pair)), Host("mac2", ips=("10.0.0.2",), rdma=(pair, None))]
    assert troubles(reports, hosts=hosts, backend="jaccl-ring") == []


def silent(report: HostReport, *commands: str) -> HostReport:
    """Where those commands take too long."""
    report = changed(report)
    report.raw["outputs"].update({name: {"status": 124, "out": "", "error": "no answer"} for name in commands})
    return report


@pytest.mark.parametrize("commands", [["thunderbolt"], ["ibv_devinfo"], ["thunderbolt", "ibv_devices", "ibv_devinfo"]])
def test_devices_that_could_not_be_read(commands):
    """Neither in order nor an error: nothing is known."""
    first, second = two()
    found = findings([silent(first, *commands), second], hosts=JACCL_OF_TWO, backend="jaccl")
    warning = only(found, "rdma", "warning")
    assert works(found) and warning.host == "mac1"
    assert warning.seen == f"cables and devices could not be read: no answer in time ({', '.join(commands)})"


@pytest.mark.parametrize(
    "devices, level, seen",
    [
        (["rdma_en3"], "ok", "rdma_en3 towards mac2 exists"),
        (["mlx5_0"], "error", "rdma_en3 towards mac2 does not exist; there are mlx5_0: names change with restarts"),
        ([], "error", "rdma_en3 towards mac2 does not exist; there is none"),
        (None, "warning", "its RDMA devices could not be read: `ibv_devices` says not found"),
    ],
)
def test_devices_of_a_host_that_is_no_mac(devices, level, seen):
    report = two({"devices": devices, "platform": "linux", "system": "Linux 6.1"})[0]
    report = changed(report, ibv_devices=None, ibv_devinfo=None) if devices is None else report
    found = findings([report, two()[1]], hosts=JACCL_OF_TWO, backend="jaccl")
    assert [(f.level, f.seen) for f in found if f.check == "rdma" and f.host == "mac1"] == [(level, seen)]


def test_frames_differ_before_26_3():
    reports = two({"macos": "26.2"})
    assert ("rdma", "all", "warning") in troubles(reports, hosts=JACCL_OF_TWO, backend="jaccl")


def test_jaccl_joins_eight():
    reports = [mac(f"mac{i}", addresses={"en0": f"10.0.0.{i}/24"}) for i in range(1, 10)]
    hosts = [Host(f"mac{i}", ips=(f"10.0.0.{i}",), rdma=(None,) * 9) for i in range(1, 10)]
    found = findings(reports, hosts=hosts, backend="jaccl")
    assert only(found, "rdma", "error").seen == "jaccl joins 8 Macs at most, not 9"


# ---------------------------------------------------------------------------------------------------------------------
# MPI, settings, clocks, kinds


def with_open_mpi(reports: list[HostReport], *versions: str) -> list[HostReport]:
    versions = versions or ("5.0.8",) * len(reports)
    return [
        without(changed(report, mpirun=f"mpirun (Open MPI) {version}\n"), backends=["ring", "mpi"])
        for report, version in zip(reports, versions)
    ]


def test_open_mpi():
    hosts = [Host("mac1"), Host("mac2")]
    assert troubles(with_open_mpi(two()), hosts=hosts, backend="mpi") == []
    error = only(findings(with_open_mpi(two(), "5.0.8", "4.1.4"), hosts=hosts, backend="mpi"), "mpi", "error")
    assert error.seen == "Open MPI 4.1.4, elsewhere 5.0.8"
    reports = [with_open_mpi(two())[0], without(two()[1], backends=["mpi"])]
    error = only(findings(reports, hosts=hosts, backend="mpi"), "mpi", "error")
    assert error.seen == "no Open MPI there: `mpirun --version` says not found"


def test_mpirun_starts_on_the_launcher():
    """Which may be no host of the file, and must reach each by an address."""
    hosts, ours = [Host("mac1"), Host("mac2")], MPI_HERE | {"mpirun": None}
    error = only(findings(with_open_mpi(two()), hosts=hosts, backend="mpi", ours=ours), "mpi", "error")
    assert error.host == "launcher" and "no mpirun is on PATH here" in error.seen
    ours = MPI_HERE | {"no way": {"mac2": "no way to mac2: Name or service not known"}}
    error = only(findings(with_open_mpi(two()), hosts=hosts, backend="mpi", ours=ours), "mpi", "error")
    assert error.seen == "mac2: no way to mac2: Name or service not known" and "`ips`" in error.remedy


def test_mpi_is_measured_where_both_have_an_address():
    assert needed_links("mpi", [Host("mac1"), Host("mac2")], two()) == [Link(0, 1, "192.168.0.2")]


def test_fast_synch():
    warning = only(findings(two({"environ": {"MLX_METAL_FAST_SYNCH": "1"}})), "settings", "warning")
    assert warning.host == "mac1" and "unset it" in warning.remedy


@pytest.mark.parametrize("skew, level", [(0.4, "ok"), (-30.0, "note"), (3600.0, "warning")])
def test_clocks(skew, level):
    [finding] = [f for f in findings(two(second={"skew": skew})) if f.check == "clock" and f.host == "mac2"]
    assert finding.level == level


def test_different_macs():
    found = findings(two({"chip": "Apple M4 Max", "macos": "26.5"}))
    assert [f.seen for f in found if f.check == "alike"] == [
        "chips differ: 1 x Apple M4 Max, 1 x Apple M3 Ultra",
        "macOS versions differ: 1 x macOS 26.5, 1 x macOS 26.4.1",
    ]


def test_memory_that_cannot_be_read():
    first, second = two()
    assert only(findings([first, changed(second, vm_stat=None)]), "memory", "note").host == "mac2"
    assert output(None)["status"] == 127
