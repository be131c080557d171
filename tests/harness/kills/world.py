"""One node with what nobody touches: a microVM that runs, one that sleeps, the image of both. Every kill must leave them be."""
import concurrent.futures
import contextlib
import json
import os
import shutil
import subprocess

from botocore.exceptions import BotoCoreError, ClientError

from .. import images
from ..microvm import Microvm
from ..node import binary
from ..waiting import eventually
from . import Kill, Tracer, operations
from .operations import HOOKS, as_it_was
from .store import left_until_a_start, pages, surprises

DIED_WITHIN = 420


class World:
    """Makes the bystanders; `kill_in` is a case."""

    def __init__(self, node, stepper, apps):
        self.node, self.stepper = node, stepper
        self.image = images.build(node, "kills", images.zip_of(apps / "kills"), hooks=HOOKS)
        images.upload(node, "good", images.zip_of(apps / "kills"))
        images.upload(node, "bad", images.zip_of(**{"no-dockerfile-here": b""}))
        ingress = [f"arn:aws:lambda:{node.client().meta.region_name}:aws:network-connector:aws-network-connector:{name}" for name in ("HTTP_INGRESS", "SHELL_INGRESS")]
        self.running, self.asleep = (Microvm.run(node, self.image, ingressNetworkConnectors=ingress) for _ in range(2))
        self.served = {vm.id: vm.count()["count"] for vm in (self.running, self.asleep)}
        self.asleep.suspend()

    # -- what operations ask of it ------------------------------------------------------------------------------

    def state_of(self, vm):
        return self.node.client().get_microvm(microvmIdentifier=vm)["state"]

    def image_state(self, arn):
        """None if there is no such image."""
        try:
            return self.node.client().get_microvm_image(imageIdentifier=arn)["state"]
        except ClientError as error:
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return None
            raise

    def trash_is_empty(self):
        trash = self.node.data_dir / "images" / ".trash"
        return not trash.is_dir() or not any(trash.iterdir())

    def build_request(self, artifact):
        return {
            "codeArtifact": {"uri": f"s3://{images.BUCKET}/{artifact}.zip"}, "buildRoleArn": images.ROLE, "hooks": HOOKS,
            "baseImageArn": images.base_image_arn(self.node.client().meta.region_name),
            "resources": [{"minimumMemoryInMiB": images.MEMORY_MIB}],
        }

    def plant(self, name):
        """An image as if it had been built, in a moment: the files of the shared one by another name, while the node is down."""
        self.node.kill()
        mine, planted = (self.node.data_dir / "images" / one for one in ("kills", name))
        shutil.copytree(mine, planted, copy_function=os.link)
        for path in (planted / "image.json", planted / "1.0" / "record.json"):
            record = json.loads(path.read_text()) | {"name": name}
            if "tags" in record:
                record["tags"] = {}
            path.unlink()
            path.write_text(json.dumps(record))
        self.node.start()
        arn = self.image.removesuffix("kills") + name
        assert self.image_state(arn) == "CREATED", self.image_state(arn)
        return arn

    def delete_image(self, name):
        arn = self.image.removesuffix("kills") + name
        if self.image_state(arn) is not None:
            self.node.client().delete_microvm_image(imageIdentifier=arn)
            eventually(f"{name} to be gone", lambda: self.image_state(arn) is None, within=60)

    def ruin(self):
        """The node dies in the middle of everything at once; the operations that it was in."""
        wrecks = [operations.DeleteMicrovmImage(), operations.SuspendMicrovm(), operations.ResumeMicrovm(),
                  operations.TerminateMicrovm(), operations.RunMicrovm(), operations.CreateMicrovmImage()]
        for wreck in wrecks:
            wreck.arrange(self)
        build = wrecks.pop()
        build.call(self)
        log = self.node.data_dir / "images" / build.image_name / "1.0" / "build.log"
        eventually("the build to be under way", lambda: "The archive was unpacked" in log.read_text(), within=60)
        # Some two thirds of what these do.
        with self.traced("ruin", Kill("before", 60)) as tracer, concurrent.futures.ThreadPoolExecutor() as pool:
            calls = [pool.submit(wreck.call, self) for wreck in wrecks]
            for call in calls:
                with contextlib.suppress(BotoCoreError, ClientError):
                    call.result()
            eventually("the node to be dead", lambda: not self.node.runs, within=DIED_WITHIN)
            tracer.let_go()
        return [*wrecks, build]

    def recover_killed(self, name, kill=None):
        """A node that has died in the middle of everything is killed again while it starts, and then left to. Returns the steps."""
        wrecks = self.ruin()
        steps = start_killed(self.node, self.stepper, self.node.directory / f"{name}.steps", kill)
        try:
            if not self.node.runs:
                assert self.node.process.wait() == -9, f"the node ended by itself:\n{self.node.log_tail()}"
                self.node.start()
            kept = left_until_a_start(self.node)
            assert not kept, f"left after a start: {'; '.join(kept)}"
            for wreck in wrecks:
                wreck.judge(self)
                wreck.clear(self)
            self.check()
        except BaseException as error:
            raise AssertionError(f"a start killed {kill and kill.when} {steps[-1] if steps else None}: {error}") from error
        return steps

    # -- a case -------------------------------------------------------------------------------------------------

    def count(self, operation):
        """The operation without a kill; its steps."""
        operation.arrange(self)
        with self.traced(f"{operation.name}-count") as tracer:
            operation.call(self)
            eventually(f"{operation.name} to be done", lambda: operation.done(self), within=DIED_WITHIN)
            steps = tracer.let_go()
        operation.judge(self)
        operation.clear(self)
        self.check()
        return steps

    def kill_in(self, operation, kill):
        """The operation with a kill, and everything that must hold after it. Returns the step, `None` if this run had fewer."""
        operation.arrange(self)
        with self.traced(f"{operation.name}-{kill.when}-{kill.number}", kill) as tracer:
            # It may be killed before, in or after the answer.
            with contextlib.suppress(BotoCoreError, ClientError):
                operation.call(self)
            ended = lambda: not self.node.runs or operation.done(self)
            eventually(f"{operation.name} to be killed {kill}, or to be done", ended, within=DIED_WITHIN)
            steps = tracer.let_go()
        reached = len(steps) == kill.number
        step = steps[-1] if steps else None
        try:
            if self.node.runs:
                assert not reached or kill.when == "after", f"the node outlived {kill}"
                self.node.kill()
            assert self.node.process.wait(30) == -9, f"the node ended by itself:\n{self.node.log_tail()}"
            self.node.start()
            kept = left_until_a_start(self.node)
            assert not kept, f"left after a start: {'; '.join(kept)}"
            operation.judge(self)
            operation.clear(self)
            self.check()
        except BaseException as error:
            raise AssertionError(f"{operation.name} killed {kill.when} {step}: {error}") from error
        return step if reached else None

    @contextlib.contextmanager
    def traced(self, name, kill=None):
        yield Tracer(self.stepper, self.node.process.pid, self.node.data_dir, self.node.directory / f"{name}.steps", kill)

    def check(self):
        """Nothing else has changed: every look answers, the bystanders are who they were, nothing lies about."""
        client = self.node.client()
        for item in pages(client, "list_microvms"):
            client.get_microvm(microvmIdentifier=item["microvmId"])
        for image in pages(client, "list_microvm_images"):
            arn = image["imageArn"]
            client.get_microvm_image(imageIdentifier=arn)
            client.list_tags(Resource=arn)
            for version in pages(client, "list_microvm_image_versions", imageIdentifier=arn):
                client.get_microvm_image_version(imageIdentifier=arn, imageVersion=version["imageVersion"])
                for build in pages(client, "list_microvm_image_builds", imageIdentifier=arn, imageVersion=version["imageVersion"]):
                    client.get_microvm_image_build(imageIdentifier=arn, imageVersion=version["imageVersion"], buildId=build["buildId"])
        client.list_managed_microvm_images()
        assert [self.running.state, self.asleep.state] == ["RUNNING", "SUSPENDED"]
        for vm in (self.running, self.asleep):
            self.served[vm.id] = as_it_was(vm, self.served[vm.id])
        self.asleep.suspend()
        # What goes on in the background (a trash that is emptied, a VMM that is made ready) comes to an end.
        left = []
        def tidy():
            left[:] = surprises(self.node)
            return not left
        try:
            eventually("nothing to lie about", tidy, within=20, every=0.2)
        except AssertionError as late:
            raise AssertionError(f"left: {'; '.join(left)}") from late


def start_killed(node, stepper, log, kill=None):
    """Starts the node with its very first step under the tracer. Returns the steps; the node is ready, or has been killed."""
    command = [binary(), "serve", "--config", node.config, "--data-dir", node.data_dir]
    steps = run_killed(node, command, stepper, log, kill, lambda: node._is_ready())
    if node.runs:
        node.wait_until_ready()
    return steps


def run_killed(node, command, stepper, log, kill, done=lambda: False):
    """A program with the tracer at it from its first step until it ends or `done`. It is the node's process from now on."""
    with node.log.open("ab") as words:
        node.process = subprocess.Popen(
            # Waits for the tracer, then becomes the program.
            ["sh", "-c", 'read _; exec "$@" </dev/null', "sh", *command], stdin=subprocess.PIPE, stdout=words, stderr=words, start_new_session=True,
        )
    tracer = Tracer(stepper, node.process.pid, node.data_dir, log, kill)
    with node.process.stdin as go:
        go.write(b"\n")
    eventually(f"{command[1]} to be done, or to be killed {kill}", lambda: not node.runs or done(), within=120)
    return tracer.let_go()


def spread(steps, most):
    """Of all the places where a node can be killed, some of every kind: before each first step of its kind, as far as `most` goes,
    and after the last one."""
    firsts, seen = [], set()
    for step in steps:
        if step.kind not in seen:
            seen.add(step.kind)
            firsts.append(step)
    left = max(most - 1, 1)
    picked = firsts if len(firsts) <= left else [firsts[(2 * index + 1) * len(firsts) // (2 * left)] for index in range(left)]
    return [Kill("before", step.number) for step in picked] + [Kill("after", steps[-1].number)]


def every(steps):
    return [Kill("before", step.number) for step in steps] + [Kill("after", steps[-1].number)]
