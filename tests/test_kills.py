"""A node killed in the middle of each operation that changes something comes back consistent.

Each operation is done once under a tracer that counts the steps of the node's process which outlive it (harness/kills/stepper.c:
names and contents made durable, children made or signalled, commands to a VMM), and then again and again, the node killed by
SIGKILL at another step each time and started on the same data directory. What must hold then is in harness/kills: the thing is as
before the call or as after it, the same call again does no second thing, two bystanders (one runs, one sleeps) have kept their
memory, every look at the API answers, and nothing lies in the data directory or runs that no record names.

    pytest tests/test_kills.py                 # some kills of each kind of step
    pytest tests/test_kills.py --kills=all     # every step (about half an hour)
"""
import signal
from pathlib import Path

import pytest

from harness.kills import compile_stepper, operations
from harness.kills.store import left_until_a_start, surprises
from harness.kills.world import World, every, run_killed, spread, start_killed
from harness.node import Node, binary, free_addresses, live
from harness.waiting import eventually

APPS = Path(__file__).parent / "apps"
MOST = 3
# Each kill of these is a build of a minute.
SLOW = {"CreateMicrovmImage": (2, 15), "UpdateMicrovmImage": (0, 8)}
SWEPT = [
    operations.RunMicrovm, operations.SuspendMicrovm, operations.ResumeMicrovm, operations.TerminateMicrovm, operations.TerminateSleeper,
    operations.TagResource, operations.UntagResource, operations.UpdateMicrovmImageVersion,
    operations.CreateMicrovmImageThatFails, operations.UpdateMicrovmImageThatFails, operations.DeleteMicrovmImage, operations.DeleteMicrovmImageVersion,
    operations.CreateMicrovmImage, operations.UpdateMicrovmImage,
    operations.PutObject, operations.DeleteObject, operations.CreateBucket, operations.DeleteBucket,
]


@pytest.fixture(scope="module")
def stepper(run_dir):
    return compile_stepper(run_dir)


@pytest.fixture(scope="module")
def world(run_dir, stepper):
    edge, api, admin = free_addresses(3)
    with Node(run_dir / "kills", edge=edge, api=api, admin=admin) as node:
        yield World(node, stepper, APPS)


@pytest.fixture(scope="module")
def wants_all(request):
    return request.config.getoption("--kills") == "all"


def sweep(what, once, fewest, wants_all):
    """Does it once to count its steps, and once more for each kill."""
    steps = once("count")
    assert len(steps) >= fewest, steps
    places = every(steps) if wants_all else spread(steps, MOST)
    for kill in places:
        once(f"{kill.when}-{kill.number}", kill)
    print(f"{what}: {len(steps)} steps, {len(places)} kills")


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("operation", SWEPT, ids=lambda operation: operation.__name__)
def test_a_node_killed_in_the_middle_comes_back_consistent(world, wants_all, operation):
    some, most = SLOW.get(operation.__name__, (MOST, None))
    if not some and not wants_all:
        pytest.skip("each kill is a build of its own: only with --kills=all")
    steps = world.count(operation())
    assert len(steps) >= operation.least_steps, f"the tracer has seen {len(steps)} steps only: {steps}"
    places = spread(steps, most or len(steps)) if wants_all and most else every(steps) if wants_all else spread(steps, some)
    faults, missed = [], 0
    for kill in places:
        try:
            missed += world.kill_in(operation(), kill) is None
        except AssertionError as fault:
            faults.append(str(fault))
            print(fault, flush=True)
    print(f"{operation.__name__}: {len(steps)} steps, {len(places)} kills, {missed} in runs that had fewer steps, {len(faults)} faults")
    assert not faults, f"{len(faults)} of {len(places)} kills left something behind:\n" + "\n".join(faults)


@pytest.mark.timeout(7200)
def test_a_node_killed_while_it_recovers_recovers_the_next_time(world, wants_all):
    """It had died in a launch, a suspend, a wake, a termination, a build and a deletion at once."""
    steps = world.recover_killed("recovery-count")
    assert len(steps) >= 20, steps
    faults = []
    places = spread(steps, 20 if wants_all else 2)
    for kill in places:
        try:
            world.recover_killed(f"recovery-{kill.when}-{kill.number}", kill)
        except AssertionError as fault:
            faults.append(str(fault))
            print(fault, flush=True)
    print(f"recovery: {len(steps)} steps, {len(places)} kills, {len(faults)} faults")
    assert not faults, "\n".join(faults)


@pytest.mark.timeout(3600)
def test_an_orderly_stop_may_be_cut_anywhere(world, wants_all):
    node = world.node

    def stop(name, kill=None):
        with world.traced(f"stop-{name}", kill) as tracer:
            node.process.send_signal(signal.SIGTERM)
            code = node.process.wait(60)
            steps = tracer.let_go()
        assert code == (-9 if kill and len(steps) == kill.number else 0), f"stopping, killed {kill}, ended with {code}:\n{node.log_tail()}"
        node.start()
        kept = left_until_a_start(node)
        assert not kept, f"left after a stop killed {kill}: {'; '.join(kept)}"
        world.check()
        return steps

    # It writes down where its microVMs are, and ends what waited ready.
    sweep("stop", stop, 4, wants_all)


@pytest.mark.timeout(3600)
def test_the_first_start_of_all_may_be_cut_anywhere(run_dir, stepper, wants_all):
    def begin(name, kill=None):
        node = Node(run_dir / f"first-{name}")
        live.append(node)
        steps = start_killed(node, stepper, node.directory / "start.steps", kill)
        if not node.runs:
            assert node.process.wait() == -9, f"the node ended by itself:\n{node.log_tail()}"
            node.start()
        kept = [*surprises(node), *left_until_a_start(node)]
        node.close()
        assert not kept, f"a first start killed {kill and kill.when} {steps[-1]} leaves: {'; '.join(kept)}"
        return steps

    sweep("first start", begin, 20, wants_all)


def test_a_rotation_of_the_key_of_tokens_may_be_cut_anywhere(world, wants_all):
    node, vm = world.node, world.running
    command = [binary(), "rotate-token-key", "--config", node.config, "--data-dir", node.data_dir]

    def rotate(name, kill=None):
        token, serving = vm.token(), node.process
        try:
            return run_killed(node, command, world.stepper, node.directory / f"rotate-{name}.steps", kill)
        finally:
            node.process, rotation = serving, node.process
            assert rotation.wait(30) == (-9 if kill else 0)
            for one in (token, vm.token()):
                answer = vm.curl("--header", f"X-aws-proxy-auth: {one}")
                assert answer.status == 200, f"a rotation killed {kill}: {answer}"
                world.served[vm.id] += 1

    def cut(name, kill=None):
        steps = rotate(name, kill)
        if kill:
            # What the ring's file says is what the next start reads, and the next rotation writes.
            rotate("again")
            node.kill()
            node.start()
            world.check()
        return steps

    sweep("rotate-token-key", cut, 4, wants_all)


def test_tokens_are_made_without_a_step(world):
    """There is nothing to be killed in; that the tracer is not blind is seen by a step that follows."""
    with world.traced("tokens") as tracer:
        client = world.node.client()
        world.running.token()
        world.node.minted.extend(client.create_microvm_shell_auth_token(microvmIdentifier=world.running.id, expirationInMinutes=5)["authToken"].values())
        client.tag_resource(Resource=world.image, Tags={"a": "b"})
        client.untag_resource(Resource=world.image, TagKeys=["a"])
        steps = tracer.let_go()
    assert {step.on.split("/images/")[-1].split("/")[0] for step in steps} == {"kills"}, steps


def test_all_that_was_made_can_be_deleted_and_nothing_is_left(world):
    """The last one: nobody stands by any more."""
    node = world.node
    node.terminate_all()
    node.kill()
    # From now on what has ended is forgotten at once.
    node.config.write_text(node.config.read_text().replace("[lifecycle]\n", "[lifecycle]\nkeep_terminated_secs = 0\n"))
    node.start()
    client = node.client()
    for image in client.list_microvm_images()["items"]:
        client.delete_microvm_image(imageIdentifier=image["imageArn"])
    s3 = node.client("s3")
    for bucket in s3.list_buckets()["Buckets"]:
        for item in s3.list_objects_v2(Bucket=bucket["Name"]).get("Contents", []):
            s3.delete_object(Bucket=bucket["Name"], Key=item["Key"])
        s3.delete_bucket(Bucket=bucket["Name"])
    eventually("the images to be gone", lambda: not client.list_microvm_images()["items"], within=60)
    eventually("the trash to be empty", world.trash_is_empty, within=60)
    node.stop()
    node.start()
    assert not node.client().list_microvms()["items"]
    left = lambda: [str(path.relative_to(node.data_dir)) for name in ("microvms", "logs", "s3", "images", "run/vmm") for path in (node.data_dir / name).rglob("*") if ".deleted" not in path.parts and path.name != ".trash"]
    eventually("nothing to be left", lambda: not left(), within=10)
    assert not [*surprises(node), *left_until_a_start(node)], left()
