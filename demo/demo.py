#!/usr/bin/env python3
"""Watch a microVM sleep and wake on this machine: python demo/demo.py PATH-OF-DORMOUSE [--keep]

Starts a node with a data directory of its own, builds an image from a zip with a Dockerfile and a small Python app, runs
a microVM from it, and shows that the app does not notice being asleep. Uses boto3 as any integrator would; requests go
over HTTPS with the standard library.

Owns: the node it started and everything under its data directory; at the end nothing of it is left (with --keep: all of
it is). Never touches another node or another data directory.
"""
import argparse
import contextlib
import http.client
import io
import json
import os
import shlex
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from pathlib import Path

APP = Path(__file__).resolve().parent / "app"
IMAGE, BUCKET = "hello-microvm", "demo"
PORT = 8080
# Ceilings. Software emulation on two busy cores stays far below them.
READY_WITHIN, BUILT_WITHIN, RUNNING_WITHIN, SUSPENDED_WITHIN, ENDED_WITHIN = 60, 900, 180, 60, 60
ASLEEP_SECS = 5
WARM_REQUESTS = 5
WIDTH = min(shutil.get_terminal_size((110, 24)).columns, 130)
# How often a wait shows that it goes on where no line can be overwritten (a log file, CI).
SIGN_OF_LIFE_SECS = 10


class Failed(Exception):
    """A sentence for the person who watches."""


# -- what the terminal shows ------------------------------------------------------------------------------------------


class Screen:
    """Plain lines, and on a terminal one line that is overwritten while something goes on."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.spoke = time.monotonic()

    def heading(self, text):
        self.line(f"\n{text}\n{'=' * len(text)}")

    def step(self, name, text):
        self.line(f"\n  {name:<9} {text}")

    def say(self, text):
        self.line(f"            {text}")

    def log(self, text):
        self.line(f"            | {text[:WIDTH - 14]}")

    def line(self, text):
        self.clear()
        print(text, flush=True)
        self.spoke = time.monotonic()

    def progress(self, text):
        if self.live:
            print(f"\r\033[K            {text[:WIDTH - 12]}", end="", flush=True)
        elif time.monotonic() - self.spoke > SIGN_OF_LIFE_SECS:
            self.say(text)

    def clear(self):
        if self.live:
            print("\r\033[K", end="", flush=True)


screen = Screen()


def took(seconds):
    """1.234 -> '1.23 s', 0.0123 -> '12.3 ms'."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def wait_for(what, probe, within, *, meanwhile=lambda: None, every=0.02):
    """Polls until `probe` returns something true; shows what it waits for."""
    began = time.monotonic()
    while True:
        seen = probe()
        if seen:
            screen.clear()
            return seen
        waited = time.monotonic() - began
        if waited > within:
            raise Failed(f"{what} took more than {within} s")
        meanwhile()
        screen.progress(f"{what} … {waited:.1f} s")
        time.sleep(every)


# -- the node ---------------------------------------------------------------------------------------------------------


class Node:
    """One `dormouse serve`, started here and ended here."""

    def __init__(self, binary, directory):
        self.binary = binary
        self.data_dir = directory / "data"
        self.log = directory / "node.log"
        self.config = directory / "dormouse.toml"
        # Port 0: the demo must not be in the way of a node that runs already.
        self.config.write_text("".join(f'[{section}]\nlisten = "127.0.0.1:0"\n' for section in ("edge", "api", "admin")))
        self.process = None

    def start(self):
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [self.binary, "serve", "--config", self.config, "--data-dir", self.data_dir],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C reaches the demo, which then ends the node in order.
            )
        wait_for("starting", self.is_ready, READY_WITHIN)

    def is_ready(self):
        if self.process.poll() is not None:
            raise Failed(f"the node ended with {self.process.returncode}. Its last words:\n{textwrap.indent(self.tail(), '    ')}")
        try:
            addresses = json.loads((self.data_dir / "node.json").read_text())
            connection = http.client.HTTPConnection(addresses["admin"], timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status != 200:
                return False
        except (OSError, ValueError, http.client.HTTPException):
            return False
        self.edge, self.api, self.admin = addresses["edge"], addresses["api"], addresses["admin"]
        return True

    def environment(self):
        """What `eval "$(dormouse env)"` puts into a shell."""
        shell = subprocess.run(
            ["bash", "-c", 'eval "$("$1" env --data-dir "$2")" && env -0', "bash", self.binary, self.data_dir],
            check=True, capture_output=True, text=True,
        )
        pairs = dict(pair.split("=", 1) for pair in shell.stdout.split("\0") if "=" in pair)
        return {name: value for name, value in pairs.items() if name.startswith("AWS_ENDPOINT_URL") or name in (
            "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION")}

    def processes(self):
        """Processes of its data directory: by command line, working directory or open file. Not the node itself."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in (os.getpid(), self.process.pid):
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                links = [os.readlink(entry / "cwd")]
                for fd in os.scandir(entry / "fd"):
                    with contextlib.suppress(OSError):
                        links.append(os.readlink(fd.path))
            except OSError:
                continue
            if command and (str(self.data_dir) in command or any(str(self.data_dir) in link for link in links)):
                found.append((int(entry.name), command))
        return found

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise Failed("the node did not stop within 60 s of SIGTERM and was killed") from None

    def tail(self, lines=15):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def clients(environment):
    """boto3 clients that were told nothing but the variables of `dormouse env`."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise Failed("boto3 is missing: run `make setup` first, then `make demo`") from None
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(environment)
    # The keys of whoever runs this belong to their own cloud.
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    settings = Config(retries={"total_max_attempts": 1})
    return boto3.client("lambda-microvms", config=settings), boto3.client("s3", config=settings)


# -- the steps --------------------------------------------------------------------------------------------------------


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("Dockerfile", "app.py"):
            archive.write(APP / name, name)
    return buffer.getvalue()


class BuildLog:
    """Shows the lines of the build log as they come."""

    def __init__(self, node):
        self.home = node.data_dir / "images"
        self.shown = {}

    def show(self):
        with contextlib.suppress(OSError):  # A build moves its directory when it is done.
            for path in sorted(self.home.rglob("*.log")):
                # The log moves with the version's directory at the end: its file stays the same one.
                about = path.stat()
                at = self.shown.get(about.st_ino, 0)
                with path.open("rb") as file:
                    file.seek(at)
                    data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                self.shown[about.st_ino] = at + len(whole)
                for line in whole.decode(errors="replace").splitlines():
                    if line.strip():
                        screen.log(line.rstrip())


def build_image(node, api, s3):
    archive = zipped()
    s3.create_bucket(Bucket=BUCKET)
    s3.put_object(Bucket=BUCKET, Key="hello.zip", Body=archive)
    screen.say(f"s3://{BUCKET}/hello.zip: Dockerfile and app.py, {len(archive)} bytes")
    image = api.create_microvm_image(
        name=IMAGE,
        codeArtifact={"uri": f"s3://{BUCKET}/hello.zip"},
        baseImageArn=f"arn:aws:lambda:{api.meta.region_name}:aws:microvm-image:al2023-1",
        buildRoleArn="arn:aws:iam::123456789012:role/MicroVMBuildRole",
        resources=[{"minimumMemoryInMiB": 512}],
    )["imageArn"]
    log = BuildLog(node)

    def built():
        state = api.get_microvm_image(imageIdentifier=image)["state"]
        return state if state != "CREATING" else None

    state = wait_for("building", built, BUILT_WITHIN, meanwhile=log.show, every=0.25)
    log.show()
    if state != "CREATED":
        builds = api.list_microvm_image_builds(imageIdentifier=image, imageVersion="1.0")["items"]
        raise Failed(f"the image was not built: {'; '.join(build.get('stateReason') or state for build in builds) or state}")
    return image


def wait_for_state(api, microvm, wanted, within):
    def there():
        view = api.get_microvm(microvmIdentifier=microvm)
        if view["state"] == "TERMINATED" != wanted:
            raise Failed(f"the microVM ended: {view.get('stateReason')}")
        return view["state"] == wanted

    wait_for(f"until it is {wanted}", there, within)


class Endpoint:
    """HTTPS to one microVM with the standard library, a new connection for each request."""

    def __init__(self, node, ran, token):
        self.port = int(node.edge.rsplit(":", 1)[1])
        self.microvm, self.name = ran["microvmId"], ran["endpoint"]
        self.token = token
        self.tls = ssl.create_default_context(cafile=node.data_dir / "ca.pem")

    def get(self):
        """(answer, seconds from the first packet of the connection to the first byte of the answer)."""
        began = time.perf_counter()
        # By address: because not every resolver knows *.localhost; the name goes into TLS and the Host header.
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=120, context=_Named(self.tls, self.name))
        try:
            connection.request("GET", "/", headers={"Host": self.name, "X-aws-proxy-auth": self.token})
            # Returns when the head of the answer is here, and that comes in one piece.
            answer = connection.getresponse()
            seconds = time.perf_counter() - began
            body = answer.read()
            if answer.status != 200:
                raise Failed(f"the endpoint answered {answer.status} {body!r} ({answer.headers.get('x-dormouse-reason', 'no reason given')})")
            return json.loads(body), seconds
        finally:
            connection.close()


class _Named:
    """An SSL context that asks for, and checks, a name other than the address that is connected to."""

    def __init__(self, context, endpoint):
        self.context, self.name = context, endpoint.split(":")[0]

    def wrap_socket(self, sock, server_hostname=None):
        return self.context.wrap_socket(sock, server_hostname=self.name)

    def __getattr__(self, name):
        return getattr(self.context, name)


def story(node, api, s3):
    """The whole of it; returns the endpoint, the two answers, the time between them and the latencies."""
    began = time.perf_counter()
    screen.step("image", "a Dockerfile and a Python http.server, built, booted once and snapshotted while it listens")
    image = build_image(node, api, s3)
    screen.say(f"built in {took(time.perf_counter() - began)}: {image}")

    screen.step("launch", "run-microvm: a clone of that snapshot, with an idle policy")
    began = time.perf_counter()
    ran = api.run_microvm(
        imageIdentifier=image,
        executionRoleArn="arn:aws:iam::123456789012:role/MicroVMExecutionRole",
        idlePolicy={"maxIdleDurationSeconds": 300, "suspendedDurationSeconds": 600, "autoResumeEnabled": True},
    )
    asked = time.perf_counter() - began
    microvm = ran["microvmId"]
    wait_for_state(api, microvm, "RUNNING", RUNNING_WITHIN)
    launch = time.perf_counter() - began
    screen.say(f"{microvm}")
    screen.say(f"https://{ran['endpoint']}")
    screen.say(f"the call answered in {took(asked)}, RUNNING after {took(launch)}")

    screen.step("token", "create-microvm-auth-token: this microVM, port 8080, 15 minutes")
    token = api.create_microvm_auth_token(microvmIdentifier=microvm, expirationInMinutes=15, allowedPorts=[{"port": PORT}])["authToken"]["X-aws-proxy-auth"]
    screen.say(f"{token[:48]}… ({len(token)} characters)")

    screen.step("call", f"GET / over HTTPS, {1 + WARM_REQUESTS} times, each on a new connection")
    endpoint = Endpoint(node, ran, token)
    before, first = endpoint.get()
    warm = []
    for _ in range(WARM_REQUESTS):
        before, seconds = endpoint.get()
        warm.append(seconds)
    at = time.monotonic()
    screen.say(json.dumps(before))
    screen.say(f"first answer after {took(first)}, then {took(min(warm))} to {took(max(warm))}")

    screen.step("suspend", "suspend-microvm: memory and disk to stable storage, no process left")
    began = time.perf_counter()
    api.suspend_microvm(microvmIdentifier=microvm)
    wait_for_state(api, microvm, "SUSPENDED", SUSPENDED_WITHIN)
    suspend = time.perf_counter() - began
    left = [pid for pid, command in node.processes() if microvm in command]
    if left:
        raise Failed(f"SUSPENDED, and there are still processes of it: {left}")
    screen.say(f"SUSPENDED after {took(suspend)}; nothing of it runs any more")
    asleep = time.monotonic()
    wait_for("asleep", lambda: time.monotonic() - asleep >= ASLEEP_SECS, ASLEEP_SECS + 1)

    screen.step("wake", "the same GET / again; the request waits until the microVM is awake")
    after, wake = endpoint.get()
    slept = time.monotonic() - at
    screen.say(json.dumps(after))
    screen.say(f"first byte after {took(wake)}")
    return endpoint, before, after, slept, {
        "launch (run-microvm until RUNNING)": launch,
        f"warm request (median of {WARM_REQUESTS})": statistics.median(warm),
        "suspend (suspend-microvm until SUSPENDED)": suspend,
        "wake to first byte": wake,
    }


def verdict(before, after, slept, latencies):
    """The two answers side by side; True if everything that was promised holds."""
    grown = after["uptime_seconds"] - before["uptime_seconds"]
    # The two clocks are read at slightly different moments, and a loaded host may hold up either.
    includes_sleep = ASLEEP_SECS <= grown + 0.5 and abs(grown - slept) < 3
    facts = {
        "message": (after["message"] == before["message"], ""),
        "pid": (before["pid"] == after["pid"] == 1, "the same process, pid 1"),
        "requests_served": (after["requests_served"] == before["requests_served"] + 1, "the counter goes on"),
        "uptime_seconds": (includes_sleep, f"+{grown:.2f} s, the sleep included ({slept:.2f} s on this host's clock)"),
    }
    screen.heading("Before and after")
    screen.line(f"\n  {'':<16} {'before':<27} {'after':<27}")
    for name, (holds, words) in facts.items():
        screen.line(f"  {name:<16} {before[name]!s:<27} {after[name]!s:<27}")
        if words:
            screen.line(f"  {'':<16} {'ok:' if holds else 'NOT SO:'} {words}")
    screen.line("")
    for name, seconds in latencies.items():
        screen.line(f"  {name:<44} {took(seconds):>9}")
    return all(holds for holds, _ in facts.values())


def clean_up(node, api):
    """Ends the microVMs, then the node, then checks. Returns what is wrong, if anything."""
    wrong = []
    if api is not None and node.process.poll() is None:
        try:
            live = lambda: [vm["microvmId"] for vm in api.list_microvms(maxResults=50)["items"] if vm["state"] != "TERMINATED"]
            for microvm in live():
                api.terminate_microvm(microvmIdentifier=microvm)
            wait_for("terminating", lambda: not live(), ENDED_WITHIN)
        except Exception as error:  # Whatever it is, the node must still be stopped.
            wrong.append(f"the microVM could not be terminated: {error}")
    try:
        node.stop()
    except Failed as error:
        wrong.append(str(error))
    left = node.processes()
    for pid, command in left:
        wrong.append(f"process {pid} was left and has been killed: {command[:120]}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return wrong


def program_names(binary):
    """How the reader calls dormouse, the aws command and this demo from where they are, ready for a shell."""
    near = os.path.relpath(binary)
    beside = Path(sys.executable).with_name("aws")
    names = (str(binary) if near.startswith("..") else near), (str(beside) if beside.exists() else "aws"), sys.executable
    return [shlex.quote(name) for name in names]


def farewell(binary):
    """How to go on from here with a node of one's own."""
    dormouse, aws, python = program_names(binary)
    image = f"arn:aws:lambda:us-east-1:000000000000:microvm-image:{IMAGE}"
    screen.heading("Your turn")
    screen.line("\n  Nothing of the demo is left. To keep a node, leave this one running in a terminal:\n")
    screen.line(f"    {dormouse} serve\n")
    screen.line("  and talk to it in another one:\n")
    for step in (
        f'eval "$({dormouse} env)"',
        "(cd demo/app && zip -q /tmp/hello.zip Dockerfile app.py)",
        f"{aws} s3 mb s3://mine && {aws} s3 cp /tmp/hello.zip s3://mine/",
        f"{aws} lambda-microvms create-microvm-image --name {IMAGE} --code-artifact uri=s3://mine/hello.zip \\\n"
        "        --base-image-arn arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1 \\\n"
        "        --build-role-arn arn:aws:iam::123456789012:role/build",
        f"{aws} lambda-microvms get-microvm-image --image-identifier {image}    # until CREATED",
        f"{aws} lambda-microvms run-microvm --image-identifier {image} \\\n"
        '        --idle-policy \'{"maxIdleDurationSeconds":60,"suspendedDurationSeconds":600,"autoResumeEnabled":true}\'',
        f"{aws} lambda-microvms create-microvm-auth-token --microvm-identifier MICROVM-ID --expiration-in-minutes 15 \\\n"
        "        --allowed-ports '[{\"port\":8080}]'",
        'curl --cacert "$DORMOUSE_CA_BUNDLE" -H "X-aws-proxy-auth: TOKEN" https://ENDPOINT/',
    ):
        screen.line(f"    {step}")
    screen.line(f"\n  Or have the demo leave its node and its microVM: {python} demo/demo.py {dormouse} --keep")


def leave(binary, node, endpoint):
    """How to go on with what the demo has left."""
    dormouse, aws, _ = program_names(binary)
    screen.heading("Your turn: the node and its microVM are still running")
    screen.line("")
    for step in (
        f'eval "$({dormouse} env --data-dir {shlex.quote(str(node.data_dir))})"',
        f"{aws} lambda-microvms suspend-microvm --microvm-identifier {endpoint.microvm}",
        f"{aws} lambda-microvms get-microvm --microvm-identifier {endpoint.microvm}",
        f'TOKEN=$({aws} lambda-microvms create-microvm-auth-token --microvm-identifier {endpoint.microvm} \\\n'
        "        --expiration-in-minutes 60 --allowed-ports '[{\"port\":8080}]' --query 'authToken.*|[0]' --output text)",
        f'curl --cacert "$DORMOUSE_CA_BUNDLE" -H "X-aws-proxy-auth: $TOKEN" https://{endpoint.name}/',
    ):
        screen.line(f"    {step}")
    screen.line("\n  When you have seen enough:\n")
    screen.line(f"    {aws} lambda-microvms terminate-microvm --microvm-identifier {endpoint.microvm}")
    screen.line(f"    kill {node.process.pid} && rm -r {shlex.quote(str(node.data_dir.parent))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("binary", type=Path, help="the dormouse binary")
    parser.add_argument("--keep", action="store_true", help="leave the node running and tell how to go on with it")
    arguments = parser.parse_args()
    binary = arguments.binary.resolve()
    if not binary.is_file():
        parser.error(f"there is no {binary}; build it with: make build")

    directory = Path(tempfile.mkdtemp(prefix="dormouse-demo-")).resolve()
    node, api, endpoint, held, problem = None, None, None, False, None
    screen.heading("Dormouse: a microVM that sleeps when nobody talks to it, and remembers everything")
    try:
        screen.step("node", f"dormouse serve, with a data directory of its own in {directory}")
        node = Node(binary, directory)
        began = time.perf_counter()
        node.start()
        screen.say(f"ready in {took(time.perf_counter() - began)}: edge {node.edge}, API {node.api}, metrics {node.admin}")
        api, s3 = clients(node.environment())
        endpoint, *seen = story(node, api, s3)
        held = verdict(*seen)
        if not held:
            problem = "not everything that was promised holds; see NOT SO above"
    except Failed as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        screen.clear()
        keep = arguments.keep and held
        wrong = []
        if node is not None and node.process is not None and not keep:
            wrong = clean_up(node, api)
        if problem:
            screen.line(f"\nThe demo failed: {problem}")
            if node is not None and node.log.exists():
                screen.line(f"\nThe node's last words ({node.log}):\n{textwrap.indent(node.tail(), '    ')}")
        for fault in wrong:
            screen.line(f"\nClean-up: {fault}")
        if not problem and not keep:
            shutil.rmtree(directory, ignore_errors=True)
    if problem or wrong:
        return 1
    leave(binary, node, endpoint) if keep else farewell(binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
