"""Every operation of the API that changes something, as a sweep of kills needs it.

Each says how its stage is set (`arrange`), what the call is (`call`), when its effect has ended (`done`), what must be true after
a crash anywhere in it (`judge`: as before the call or as after it, and the same call again gives what the contract says and no
second thing), and how its traces are removed (`clear`).
"""
import contextlib
import itertools
import uuid

from botocore.exceptions import ClientError

from .. import images
from ..microvm import PATIENT, Microvm
from ..waiting import StopWaiting, eventually
from .store import pages

SETTLED_WITHIN = 120
HOOKS = {
    "port": 8080,
    "microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 60, "validate": "ENABLED", "validateTimeoutInSeconds": 60},
    "microvmHooks": {
        "run": "ENABLED", "runTimeoutInSeconds": 20, "resume": "ENABLED", "resumeTimeoutInSeconds": 20,
        "suspend": "ENABLED", "suspendTimeoutInSeconds": 20, "terminate": "ENABLED", "terminateTimeoutInSeconds": 20,
    },
}


def as_it_was(vm, served):
    """The app of a microVM goes on where it was: one request later, in the same process, and with every sleep that it was told of
    told to be over."""
    seen = vm.count()
    assert (seen["pid"], seen["count"]) == (1, served + 1), f"{vm.id} had served {served} and says {seen}"
    # After a crash /resume may come twice, or although /suspend did not get through; an app is never left in a sleep that is over.
    told = [hook for hook in seen["hooks"] if hook not in ("ready", "run")]
    assert all(after == "resume" for hook, after in zip(told, [*told[1:], None]) if hook == "suspend"), f"{vm.id} was told {seen['hooks']}"
    return seen["count"]


def settled(vm, *states):
    """Its state, once it is one that lasts."""
    def there():
        try:
            state = vm.state
        except ClientError as error:
            raise StopWaiting(f"{vm.id}: {error}") from error
        return state if state in ("RUNNING", "SUSPENDED", "TERMINATED") else None

    state = eventually(f"{vm.id} to be {' or '.join(states)}", there, within=SETTLED_WITHIN)
    assert state in states, f"{vm.id} should be {' or '.join(states)} and is {vm.view()}"
    return state


class Operation:
    """`world` has the node, the shared image and its ARN; what one case needs is in `self.x` from `arrange` on."""

    # The steps of the operations under test that a run is expected to have at least, so that a blind tracer is seen.
    least_steps = 3
    # Whether the call of this case has been answered; or with what.
    answered = False

    @property
    def name(self):
        return type(self).__name__

    def arrange(self, world):
        pass

    def call(self, world):
        self.ask(world)
        self.answered = True

    def done(self, world):
        return self.answered

    def ended(self, world, vm):
        with contextlib.suppress(ClientError):
            vm.terminate()

    def runs(self, world, arn):
        """The image is whole."""
        vm = Microvm.run(world.node, arn)
        assert vm.count()["count"] == 1
        vm.terminate()


class RunMicrovm(Operation):
    least_steps = 20
    answered = None

    def arrange(self, world):
        self.token = str(uuid.uuid4())
        self.before = {vm["microvmId"] for vm in pages(world.node.client(), "list_microvms")}

    def ask(self, world):
        return world.node.client().run_microvm(
            imageIdentifier=world.image, clientToken=self.token, runHookPayload=self.token, idlePolicy=PATIENT,
        )

    def call(self, world):
        self.answered = self.ask(world)["microvmId"]

    def done(self, world):
        return world.state_of(self.answered) == "RUNNING"

    def judge(self, world):
        again = self.ask(world)
        self.vm = Microvm(world.node, again)
        assert self.answered in (None, again["microvmId"]), f"the call was answered {self.answered} and then {again['microvmId']}"
        new = {vm["microvmId"] for vm in pages(world.node.client(), "list_microvms")} - self.before
        assert new == {again["microvmId"]}, f"one call has made {new}"
        if settled(self.vm, "RUNNING", "TERMINATED") == "TERMINATED":
            assert "restarted before it ran" in self.vm.view()["stateReason"], self.vm.view()
        else:
            seen = self.vm.count()
            told = {"microvmId": self.vm.id, "runHookPayload": self.token}
            assert (seen["pid"], seen["count"], seen["run"]) == (1, 1, [told]), seen
        assert self.ask(world)["microvmId"] == self.vm.id

    def clear(self, world):
        self.ended(world, self.vm)


class OfOne(Operation):
    """An operation on a microVM that runs."""

    least_steps = 10
    asleep = False

    def arrange(self, world):
        self.vm = Microvm.run(world.node, world.image)
        self.served = self.vm.count()["count"]
        if self.asleep:
            self.vm.suspend()

    def done(self, world):
        return self.vm.state == self.after

    def clear(self, world):
        self.ended(world, self.vm)


class SuspendMicrovm(OfOne):
    after = "SUSPENDED"

    def ask(self, world):
        world.node.client().suspend_microvm(microvmIdentifier=self.vm.id)

    def judge(self, world):
        settled(self.vm, "RUNNING", "SUSPENDED")
        assert self.vm.view().get("stateReason") is None, self.vm.view()
        self.served = as_it_was(self.vm, self.served)
        self.ask(world)
        settled(self.vm, "SUSPENDED")
        self.vm.reaches("SUSPENDED", within=60)
        self.served = as_it_was(self.vm, self.served)


class ResumeMicrovm(OfOne):
    asleep = True
    after = "RUNNING"

    def ask(self, world):
        world.node.client().resume_microvm(microvmIdentifier=self.vm.id)

    def judge(self, world):
        settled(self.vm, "RUNNING", "SUSPENDED")
        self.ask(world)
        self.vm.reaches("RUNNING", within=60)
        self.served = as_it_was(self.vm, self.served)
        self.vm.suspend()
        self.served = as_it_was(self.vm, self.served)


class TerminateMicrovm(OfOne):
    after = "TERMINATED"

    def ask(self, world):
        world.node.client().terminate_microvm(microvmIdentifier=self.vm.id)

    def judge(self, world):
        was = "SUSPENDED" if self.asleep else "RUNNING"
        state = settled(self.vm, *(("TERMINATED",) if self.answered else (was, "TERMINATED")))
        if state != "TERMINATED":
            self.served = as_it_was(self.vm, self.served)
        self.ask(world)
        self.vm.reaches("TERMINATED", within=60)
        assert self.vm.view()["stateReason"] == "Success.", self.vm.view()


class TerminateSleeper(TerminateMicrovm):
    least_steps = 5
    asleep = True


class TagResource(Operation):
    least_steps = 4
    tags = {"kept": "yes", "changed": "new"}

    def arrange(self, world):
        world.node.client().tag_resource(Resource=world.image, Tags={"kept": "yes", "changed": "old"})

    def ask(self, world):
        world.node.client().tag_resource(Resource=world.image, Tags={"changed": "new"})

    def judge(self, world):
        told = lambda: world.node.client().list_tags(Resource=world.image)["Tags"]
        assert told() in ([self.tags] if self.answered else [{"kept": "yes", "changed": "old"}, self.tags]), told()
        self.ask(world)
        assert told() == self.tags

    def clear(self, world):
        world.node.client().untag_resource(Resource=world.image, TagKeys=["kept", "changed"])


class UntagResource(TagResource):
    tags = {"kept": "yes"}

    def ask(self, world):
        world.node.client().untag_resource(Resource=world.image, TagKeys=["changed"])


class UpdateMicrovmImageVersion(Operation):
    least_steps = 4

    def ask(self, world, status="INACTIVE"):
        world.node.client().update_microvm_image_version(imageIdentifier=world.image, imageVersion="1.0", status=status)

    def judge(self, world):
        told = lambda: world.node.client().get_microvm_image_version(imageIdentifier=world.image, imageVersion="1.0")["status"]
        assert told() in (["INACTIVE"] if self.answered else ["ACTIVE", "INACTIVE"]), told()
        self.ask(world)
        assert told() == "INACTIVE"

    def clear(self, world):
        self.ask(world, "ACTIVE")


class CreateMicrovmImage(Operation):
    """A build that goes to its end."""

    least_steps = 40
    artifact = "good"
    ends = ("CREATED", "CREATE_FAILED")
    numbers = itertools.count(1)

    def arrange(self, world):
        self.image_name, self.token = f"made-{next(self.numbers)}", str(uuid.uuid4())

    def request(self, world):
        return world.build_request(self.artifact) | {"clientToken": self.token}

    def ask(self, world):
        return world.node.client().create_microvm_image(name=self.image_name, **self.request(world))

    def call(self, world):
        self.answered = self.ask(world)

    @property
    def versions(self):
        return [["1.0"]]

    def listed(self, world, arn):
        return [item["imageVersion"] for item in pages(world.node.client(), "list_microvm_image_versions", imageIdentifier=arn)]

    def done(self, world):
        return world.image_state(self.answered["imageArn"]) in self.ends

    def judge(self, world):
        again = self.ask(world)
        self.arn = again["imageArn"]
        if self.answered:
            same = ("imageArn", "imageVersion", "createdAt")
            assert [again[member] for member in same] == [self.answered[member] for member in same], f"{self.answered} and then {again}"
        assert self.listed(world, self.arn) in self.versions, f"one call has made {self.listed(world, self.arn)}"
        state = eventually(f"{self.image_name} to be built or not", lambda: (seen := world.image_state(self.arn)) in self.ends and seen, within=images.BUILT_WITHIN)
        builds = world.node.client().list_microvm_image_builds(imageIdentifier=self.arn, imageVersion=again["imageVersion"])["items"]
        self.judge_build(world, state, builds[0])
        assert self.ask(world)["imageVersion"] == again["imageVersion"]

    def judge_build(self, world, state, build):
        if state == self.ends[0]:
            self.runs(world, self.arn)
        else:
            assert build["stateReason"].startswith("INTERNAL_PLATFORM_ERROR: the node stopped"), build

    def clear(self, world):
        world.delete_image(self.image_name)


class CreateMicrovmImageThatFails(CreateMicrovmImage):
    """A build that ends at its first step: the records of it, without its minutes."""

    least_steps = 12
    artifact = "bad"
    ends = ("CREATE_FAILED",)

    def judge_build(self, world, state, build):
        assert "Dockerfile" in build["stateReason"] or "the node stopped" in build["stateReason"], build


class UpdateMicrovmImage(CreateMicrovmImage):
    ends = ("UPDATED", "UPDATE_FAILED")

    def arrange(self, world):
        super().arrange(world)
        self.arn = world.plant(self.image_name)

    def ask(self, world):
        return world.node.client().update_microvm_image(imageIdentifier=self.arn, **self.request(world))

    @property
    def versions(self):
        # A number may be wasted.
        return [["2.0", "1.0"], ["3.0", "1.0"]]


class UpdateMicrovmImageThatFails(UpdateMicrovmImage):
    least_steps = 12
    artifact = "bad"
    ends = ("UPDATE_FAILED",)
    judge_build = CreateMicrovmImageThatFails.judge_build


class DeleteMicrovmImage(Operation):
    least_steps = 12
    numbers = itertools.count(1)

    def arrange(self, world):
        self.image_name = f"planted-{next(self.numbers)}"
        self.arn = world.plant(self.image_name)

    def ask(self, world):
        return world.node.client().delete_microvm_image(imageIdentifier=self.arn)["state"]

    def done(self, world):
        return world.image_state(self.arn) is None and world.trash_is_empty()

    def judge(self, world):
        if self.answered:
            eventually(f"{self.image_name} to be gone", lambda: world.image_state(self.arn) is None, within=30)
        elif world.image_state(self.arn) is not None:
            self.runs(world, self.arn)
        assert self.ask(world) in ("DELETING", "DELETED")
        eventually(f"{self.image_name} to be gone", lambda: world.image_state(self.arn) is None, within=30)
        assert self.ask(world) == "DELETED"

    def clear(self, world):
        world.delete_image(self.image_name)


class DeleteMicrovmImageVersion(DeleteMicrovmImage):
    def arrange(self, world):
        super().arrange(world)
        world.node.client().update_microvm_image(imageIdentifier=self.arn, **world.build_request("bad"))
        eventually("the second version", lambda: world.image_state(self.arn) == "UPDATE_FAILED", within=60)

    def ask(self, world):
        return world.node.client().delete_microvm_image_version(imageIdentifier=self.arn, imageVersion="1.0")["state"]

    def there(self, world):
        return [item["imageVersion"] for item in pages(world.node.client(), "list_microvm_image_versions", imageIdentifier=self.arn)]

    def done(self, world):
        return self.there(world) == ["2.0"] and world.trash_is_empty()

    def judge(self, world):
        gone = lambda: self.there(world) == ["2.0"]
        if self.answered:
            eventually("the version to be gone", gone, within=30)
        elif not gone():
            assert self.there(world) == ["2.0", "1.0"]
            self.runs(world, self.arn)
        assert self.ask(world) in ("DELETING", "DELETED")
        eventually("the version to be gone", gone, within=30)
        assert self.ask(world) == "DELETED"


class PutObject(Operation):
    """Code is uploaded over what was there."""

    least_steps = 4
    key, old, new = "code.zip", b"old" * 1000, b"new" * 2000

    def arrange(self, world):
        world.node.client("s3").put_object(Bucket=images.BUCKET, Key=self.key, Body=self.old)

    def ask(self, world):
        world.node.client("s3").put_object(Bucket=images.BUCKET, Key=self.key, Body=self.new)

    def content(self, world):
        try:
            return world.node.client("s3").get_object(Bucket=images.BUCKET, Key=self.key)["Body"].read()
        except ClientError as error:
            assert error.response["Error"]["Code"] == "NoSuchKey", error
            return None

    def judge(self, world):
        content = self.content(world)
        assert content in ([self.new] if self.answered else [self.old, self.new]), f"{content and content[:40]!r}, and the call was {'' if self.answered else 'not '}answered"
        self.ask(world)
        assert self.content(world) == self.new

    def clear(self, world):
        world.node.client("s3").delete_object(Bucket=images.BUCKET, Key=self.key)


class DeleteObject(PutObject):
    least_steps = 1
    new = None

    def ask(self, world):
        world.node.client("s3").delete_object(Bucket=images.BUCKET, Key=self.key)


class CreateBucket(Operation):
    least_steps = 1
    numbers = itertools.count(1)

    def arrange(self, world):
        self.bucket = f"bucket-{next(self.numbers)}"

    def ask(self, world):
        world.node.client("s3").create_bucket(Bucket=self.bucket)

    def there(self, world):
        return self.bucket in [bucket["Name"] for bucket in world.node.client("s3").list_buckets()["Buckets"]]

    def judge(self, world):
        if self.answered:
            assert self.there(world)
        try:
            self.ask(world)
        except ClientError as error:
            assert error.response["Error"]["Code"] in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"), error
        assert self.there(world)
        world.node.client("s3").put_object(Bucket=self.bucket, Key="a", Body=b"a")
        world.node.client("s3").delete_object(Bucket=self.bucket, Key="a")

    def clear(self, world):
        world.node.client("s3").delete_bucket(Bucket=self.bucket)


class DeleteBucket(CreateBucket):
    def arrange(self, world):
        super().arrange(world)
        world.node.client("s3").create_bucket(Bucket=self.bucket)

    def ask(self, world):
        world.node.client("s3").delete_bucket(Bucket=self.bucket)

    def judge(self, world):
        if self.answered:
            assert not self.there(world)
        if self.there(world):
            self.ask(world)
        assert not self.there(world)

    def clear(self, world):
        assert not self.there(world)
