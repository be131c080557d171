"""What the RUN steps of a Dockerfile can reach: the internet, and nothing of the node, its host or its neighbours.

The node of these tests is told nothing about the network of builds; the image's connector is all that differs.
"""
import os
import socket

import pytest

from harness import images
from harness.microvm import Microvm
from harness.node import Node

BASE = "FROM public.ecr.aws/lambda/microvms:al2023-minimal\n"
# Says of each address whether a connection could be made: as any program does it, and past the routes, bound to the card itself.
PROBE = '''
import socket, sys
print("capabilities", [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")][0])
for at in sys.argv[1:]:
    for card in [b"", b"tap0"]:
        host, port = at.rsplit(":", 1)
        with socket.socket() as client:
            client.settimeout(5)
            try:
                if card:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, card)
                client.connect((host, int(port)))
                print(at, card.decode() or "plain", "open")
            except OSError as error:
                print(at, card.decode() or "plain", "closed", error)
'''
# CAP_NET_ADMIN and CAP_NET_RAW, by which a process could make itself other routes or packets.
NET_ADMIN, NET_RAW = 1 << 12, 1 << 13
NO_EGRESS = "arn:aws:lambda:{}:aws:network-connector:aws-network-connector:NO_EGRESS"


def log_of(node, name, steps, **request):
    """Runs these steps and one more that fails, so that no guest is booted; the build's log."""
    dockerfile = BASE + "COPY probe.py /\n" + "".join(f"RUN {step}\n" for step in [*steps, "exit 7"])
    archive = images.zip_of(**{"Dockerfile": dockerfile, "probe.py": PROBE})
    with pytest.raises(images.BuildFailed, match="exit status 7"):
        images.build(node, name, archive, **request)
    return (node.data_dir / "images" / name / "1.0" / "build.log").read_text().splitlines()


def host_address():
    """The address by which this host is known outside, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        try:
            client.connect(("198.51.100.1", 9))
        except OSError:
            return []
        return [client.getsockname()[0]]


def test_a_run_step_reaches_the_internet_and_nothing_of_the_node(node):
    ports = [address.rsplit(":", 1)[1] for address in (node.api, node.admin, node.edge)]
    # 10.0.2.2 and .3 are how slirp4netns is asked for the host.
    at = [f"{host}:{port}" for host in ["127.0.0.1", "10.0.2.2", "10.0.2.3", *host_address()] for port in ports] + ["169.254.169.254:80", "10.0.0.1:80", "192.168.0.1:80"]
    log = log_of(node, "curious", [f"python3 /probe.py {' '.join(at)}", "apt-get update", "ls /sys/class/net"])
    said = [line for line in log if line.split()[0] in at and line.split()[1] in ("plain", "tap0")]
    assert len(said) == 2 * len(at), log
    assert [line for line in said if line.split()[2] != "closed"] == []
    capabilities = int(next(line.split()[1] for line in log if line.startswith("capabilities ")), 16)
    assert capabilities & (NET_ADMIN | NET_RAW) == 0, hex(capabilities)
    # Names and the internet are there: the mirror's lists were fetched.
    assert any(line.startswith("Fetched ") for line in log) and not any(line.startswith(("Err:", "W: ")) for line in log), log
    assert "eth0" not in log


def test_an_image_with_no_egress_is_built_without_a_network(node):
    connectors = [NO_EGRESS.format(node.client().meta.region_name)]
    log = log_of(node, "shy", ["python3 /probe.py 127.0.0.1:80", "ls /sys/class/net"], egressNetworkConnectors=connectors)
    assert log[log.index(next(line for line in log if "ls /sys/class/net" in line)) + 1] == "lo"


@pytest.mark.parametrize("network, word", [("host", "open"), ("none", "closed")])
def test_what_the_operator_says_of_the_network_is_done(run_dir, network, word):
    """`host` is the host's, admin listener and all, by which the tests above are known to be able to fail; `none` is none."""
    with Node(run_dir / f"network-{network}", more=f'[build]\nnetwork = "{network}"\n') as node:
        log = log_of(node, "curious", [f"python3 /probe.py {node.admin}"])
        assert any(line.startswith(f"{node.admin} plain {word}") for line in log), log


GUEST = images.answering('''
import json, os


def answer(_path):
    total = int(open("/proc/meminfo").readline().split()[1]) // 1024
    disk = os.statvfs("/")
    return json.dumps({"processors": os.cpu_count(), "memory_mib": total, "disk_gib": disk.f_blocks * disk.f_frsize / (1 << 30)}).encode()
''')


def check_size(node, memory_mib, processors, seen_mib, disk_gib):
    """Of an image of this size: what a guest shows of it, before and after a sleep; returns the bytes of its memory snapshot."""
    files = {"Dockerfile": BASE + "COPY app.py /\nEXPOSE 8080\nCMD [\"python3\", \"/app.py\"]\n", "app.py": GUEST}
    image = images.build(node, f"sized-{memory_mib}", images.zip_of(**files), memory_mib=memory_mib)
    vm = Microvm.run(node, image)

    def sees():
        with vm.http() as client:
            return client.get("/").json()

    before = sees()
    # The kernel keeps some for itself: its own image, and the list of pages (1/64). So does the file system: its tables (1/64).
    assert before["processors"] == processors, before
    assert 0.9 * seen_mib < before["memory_mib"] <= seen_mib and 0.95 * disk_gib < before["disk_gib"] <= disk_gib, before
    vm.suspend()
    assert sees() == before
    vm.terminate()
    builds = node.client().list_microvm_image_builds(imageIdentifier=image, imageVersion="1.0")["items"]
    build = node.client().get_microvm_image_build(imageIdentifier=image, imageVersion="1.0", buildId=builds[0]["buildId"])
    return build["snapshotBuild"]["memorySnapshotSizeInBytes"]


@pytest.mark.parametrize("seen, times", [("peak", 4), ("baseline", 1)])
def test_a_guest_sees_as_much_of_its_size_as_the_operator_says(run_dir, seen, times):
    """aws-behaviour §5.2: four times the memory and the processors of the baseline, here 1024 MiB and half a processor, and no more
    processors than the host has. What a guest does not touch is in no snapshot."""
    with Node(run_dir / f"seen-{seen}", more=f'[guest]\nsize_seen = "{seen}"\n') as node:
        processors = min(2, os.cpu_count()) if seen == "peak" else 1
        assert check_size(node, 1024, processors, 1024 * times, 8) < 512 << 20


def test_the_largest_size_runs_on_a_host_with_less_memory_than_it_shows(node):
    """8192 MiB, which shows 32 GiB: a guest takes of its host what it touches. That is 1 GiB or so here, which the host must have."""
    about = dict(line.split(":") for line in open("/proc/meminfo"))
    free_mib = int(about["MemAvailable"].split()[0]) >> 10
    assert free_mib > 4096, f"this host has {free_mib} MiB of memory free; a microVM of the largest size cannot be shown with less than 4096"
    # Its kernel's list of pages alone is 512 MiB.
    assert check_size(node, 8192, min(16, os.cpu_count()), 32768, 32) < 1 << 30
