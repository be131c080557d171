"""What lies in a node's data directory and runs beside it, held against what its API says there is.

Knows the layout (ARCHITECTURE.md): that is the point, as what no record names is what an integrator cannot see.
"""
import base64
import os
from pathlib import Path

# What a node has at the top whatever it was asked for.
TOP = {
    "ca.pem", "credentials", "token-keys.json", ".token-keys.json.lock", "node.json", "lock", "registry.redb", "client-tokens.redb",
    "tls", "guest", "run", "microvms", "images", "logs", "s3",
}
TLS = {"ca.key", "edge.pem", "edge.key", "edge.json"}
# Of a microVM, by its state.
AWAKE = {"log", "disk", "process.json"}
ASLEEP = {"log", "disk"}


def pages(client, operation, member="items", **arguments):
    return [item for page in client.get_paginator(operation).paginate(**arguments) for item in page[member]]


def surprises(node):
    """What is there and should not be, as sentences; none if all is well."""
    client = node.client()
    vms = {vm["microvmId"]: vm["state"] for vm in pages(client, "list_microvms")}
    images = {image["name"]: image for image in pages(client, "list_microvm_images")}
    return [*_top(node), *_microvms(node, vms), *_processes(node, vms), *_images(node, client, images)]


def _names(path):
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def _top(node):
    yield from (f"{name} lies in the data directory" for name in _names(node.data_dir) if name not in TOP)
    yield from (f"tls/{name} is nothing of the node's" for name in _names(node.data_dir / "tls") if name not in TLS)
    if len(_names(node.data_dir / "guest")) > 1:
        yield f"guest/ holds {_names(node.data_dir / 'guest')}"
    yield from (f"run/{name} is nothing of the node's" for name in _names(node.data_dir / "run") if name not in ("vmm", "handover.sock"))


def _microvms(node, vms):
    for name in _names(node.data_dir / "microvms"):
        if name not in vms:
            yield f"microvms/{name} belongs to no microVM that the API lists"
            continue
        dir, state = node.data_dir / "microvms" / name, vms[name]
        allowed = {"RUNNING": AWAKE, "SUSPENDED": ASLEEP}.get(state, {"log"})
        found = _names(dir)
        generations = sorted(int(entry[4:]) for entry in found if entry.startswith("gen-"))
        yield from (f"microvms/{name}/{entry} of one that is {state}" for entry in found if entry not in allowed and not (state != "TERMINATED" and entry.startswith("gen-")))
        if state == "SUSPENDED" and not generations:
            yield f"{name} is SUSPENDED and has no snapshot"
        if len(generations) > 2:
            yield f"{name} keeps the snapshots {generations}"


def _processes(node, vms):
    """Each VMM belongs to a microVM that runs, or waits ready; each that runs has one; each directory has its process."""
    dirs, run = {}, node.data_dir / "run" / "vmm"
    for pid, command in node.processes():
        mine = [word for word in command.replace(",", " ").split() if f"dormouse:{run}/" in word]
        if not mine:
            yield f"process {pid} is left: {command}"
            continue
        dirs.setdefault(Path(mine[0].split(":", 1)[1]).name, []).append(pid)
    owned = {}
    for name in _names(run):
        if name not in dirs:
            yield f"run/vmm/{name} has no process"
        yield from (f"run/vmm/{name}/{entry} is a temporary file" for entry in _names(run / name) if entry.endswith(".tmp"))
    for vm in vms:
        record = node.data_dir / "microvms" / vm / "process.json"
        text = record.read_text() if record.is_file() else ""
        owned |= {name: vm for name in dirs if name in text}
    yield from (f"{vm} is {vms[vm]} and has the process {dirs[name]}" for name, vm in owned.items() if vms[vm] != "RUNNING")
    yield from (f"{vm} is RUNNING without a process" for vm, state in vms.items() if state == "RUNNING" and vm not in owned.values())
    yield from (f"run/vmm/{name} has the processes {pids}" for name, pids in dirs.items() if len(pids) > 1)
    ready = [name for name in dirs if name not in owned]
    yield from (f"the VMM of run/vmm/{name} has an owner that does not know it" for name in ready if (run / name / "owner.json").exists())


def _images(node, client, images):
    for name in _names(node.data_dir / "images"):
        dir = node.data_dir / "images" / name
        if name in (".work", ".trash"):
            yield from (f"images/{name}/{entry} is left" for entry in _names(dir))
            continue
        if name == ".deleted":
            yield from (f"{entry} is remembered as deleted and is there" for entry in _names(dir) if entry in images)
            continue
        if name not in images:
            yield f"images/{name} belongs to no image that the API lists"
            continue
        listed = {item["imageVersion"]: item for item in pages(client, "list_microvm_image_versions", imageIdentifier=images[name]["imageArn"])}
        for entry in _names(dir):
            if entry not in listed and entry != "image.json":
                yield f"images/{name}/{entry} belongs to no version that the API lists"
        for version, item in listed.items():
            good = item["state"] == "SUCCESSFUL"
            allowed = {"record.json", "build.log"} | ({"snapshot"} if good else set())
            yield from (f"images/{name}/{version}/{entry} of one that is {item['state']}" for entry in _names(dir / version) if entry not in allowed)
            if good and _names(dir / version / "snapshot") != ["disk", "manifest.json", "memory", "state"]:
                yield f"the snapshot of {name} {version} is {_names(dir / version / 'snapshot')}"


def left_until_a_start(node):
    """What a node may keep of things that are gone until it starts again (or, of logs, for an hour): as sentences."""
    return [*(f"{link} leads nowhere" for link in _leading_nowhere(node)), *_objects(node)]


def _leading_nowhere(node):
    links = {Path(dir) / name for dir, dirs, files in os.walk(node.data_dir / "logs") for name in dirs + files if (Path(dir) / name).is_symlink()}
    # A microVM that has never said a word has no directory of output; its own is there.
    return sorted(str(link.relative_to(node.data_dir)) for link in links if not link.exists() and not (link.parent / os.readlink(link)).parent.exists())


def _objects(node):
    s3 = node.client("s3")
    stored = {bucket["Name"]: {item["Key"] for item in s3.list_objects_v2(Bucket=bucket["Name"]).get("Contents", [])} for bucket in s3.list_buckets().get("Buckets", [])}
    for name in _names(node.data_dir / "s3"):
        path = node.data_dir / "s3" / name
        if path.is_dir():
            if name not in stored:
                yield f"s3/{name} is no bucket that the API lists"
            yield from (f"s3/{name}/{entry} is no object that the API lists" for entry in _names(path) if entry not in stored.get(name, set()))
        elif ".tmp" in name or name.endswith(".part"):
            yield f"s3/{name} is a temporary file"
        elif not any(_is_of(name, bucket, key) for bucket, keys in stored.items() for key in keys):
            yield f"s3/{name} is about no object"


def _is_of(name, bucket, key):
    text = lambda value: base64.urlsafe_b64encode(value.encode()).decode().rstrip("=")
    return name.startswith(f".bucket-{text(bucket)}.object-{text(key)}.")
