"""Case 42: a snapshot that is not what was written is refused before any guest code runs, with a reason, at once."""
import os
import shutil

import pytest

from harness.waiting import eventually

WITHIN = 30


def newest_generation(vm):
    home = vm.node.data_dir / "microvms" / vm.id
    generations = sorted(home.glob("gen-*"), key=lambda path: int(path.name.removeprefix("gen-")))
    assert generations, f"a suspended microVM has a snapshot under {home}; there is {sorted(path.name for path in home.iterdir())}"
    return generations[-1]


def parts(snapshot):
    return sorted(path for path in snapshot.rglob("*") if path.is_file())


def flip_a_bit(path):
    """In the first bytes that hold data: snapshots are sparse, and a hole has nothing to damage."""
    with path.open("r+b") as file:
        start = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        at = (start + end) // 2
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), at)
        os.fsync(file.fileno())


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def remove(path):
    path.unlink()


@pytest.fixture
def asleep(run, kitchen_image):
    vm = run(kitchen_image)
    with vm.http() as client:
        client.put("/note?name=dream", content="of electric sheep")
    vm.token_before = vm.token()
    return vm.suspend()


def is_refused(vm):
    """The request is answered in time, nothing runs, and the operator can read why."""
    answer = vm.curl("--header", f"X-aws-proxy-auth: {vm.token_before}", "--max-time", WITHIN)
    assert answer.status == 502, f"a damaged snapshot must not be run: {answer}"
    assert answer.headers.get("x-dormouse-reason") in ("wake-failed", "terminated"), str(answer)
    # The request is answered before the last of the microVM has been cleared away.
    view = eventually("the microVM to be SUSPENDED or TERMINATED", lambda: (view := vm.view())["state"] in ("SUSPENDED", "TERMINATED") and view, within=30)
    log = vm.node.log.read_text(errors="replace")
    said = [line for line in log.splitlines() if vm.id in line and "snapshot" in line and ("cannot be used" in line or "damaged" in line)]
    assert said or view.get("stateReason"), f"neither the API nor the log says why {vm.id} was refused"
    assert not vm.processes(), f"something of it runs: {vm.processes()}"
    return view["state"]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, remove], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("what", ["manifest", "largest part", "every other part"])
def test_a_damaged_snapshot_is_refused_and_a_mended_one_is_good_again(asleep, tmp_path, what, damage):
    snapshot = newest_generation(asleep)
    files = parts(snapshot)
    manifest = [path for path in files if path.name == "manifest.json"]
    assert manifest, f"no manifest.json among {files}"
    others = sorted((path for path in files if path not in manifest and path.stat().st_blocks), key=lambda path: path.stat().st_blocks)
    assert others, f"nothing but a manifest in {snapshot}"
    chosen = {"manifest": manifest, "largest part": others[-1:], "every other part": others[:-1] or others}[what]
    whole = {path: tmp_path / f"{number}" for number, path in enumerate(chosen)}
    for path, copy in whole.items():
        shutil.copy2(path, copy)
        damage(path)

    state = is_refused(asleep)

    if state == "SUSPENDED":  # The snapshot is kept: somebody may have a copy of what is missing.
        for path, copy in whole.items():
            shutil.copy2(copy, path)
        with asleep.http() as client:
            answer = client.get("/note?name=dream")
        assert answer.status_code == 200, f"mended, and still refused: {answer.status_code} {dict(answer.headers)}"
        assert answer.json() == {"note": "of electric sheep"}


def test_the_snapshot_of_another_microvm_is_refused(run, kitchen_image, asleep):
    """Never another tenant's memory, even if every checksum in it is right."""
    neighbour = run(kitchen_image).suspend()
    mine, theirs = newest_generation(asleep), newest_generation(neighbour)
    shutil.rmtree(mine)
    subject = shutil.copytree(theirs, mine)
    assert subject.exists()
    is_refused(asleep)


def test_the_node_is_well_after_all_that(kitchen):
    assert kitchen.count()["pid"] == 1
