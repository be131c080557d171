"""One `dormouse serve` with a data directory of its own, and everything an operator can learn of it from outside.

Owns: the process it started (by pid), its log file. Never reads the node's registry, and never kills what it did not find
under its own data directory.
"""
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import boto3
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from prometheus_client.parser import text_string_to_metric_families

from .leaks import Tokens
from .waiting import StopWaiting, eventually

READY_WITHIN = 60
STOPPED_WITHIN = 60
ANY = "127.0.0.1:0"
# Larger files of a data directory are disks and memory of guests; those that tokens could get into are not.
LARGEST_SEARCHED = 16 << 20
# What the tests look at most.
WAKES = "idle_wakes_total"
OPEN_STREAMS = "edge_open_streams"


def binary():
    """The node under test: $DORMOUSE_BIN."""
    path = os.environ.get("DORMOUSE_BIN")
    if not path or not Path(path).is_file():
        raise RuntimeError(f"DORMOUSE_BIN must name the dormouse binary; it is {path!r}. Run the tests with: make test-system")
    return Path(path).resolve()


def free_addresses(count):
    """Addresses that were free a moment ago, for a node that must come back on the same ports."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


# Started and not closed yet; a failed test shows their logs.
live = []


class Node:
    """Start it with `with Node(dir) as node:`; leaving the block ends its microVMs and checks that nothing is left."""

    # As loud as an operator can make it, so that the search for leaked tokens in the log has something to search.
    def __init__(self, directory, *, edge=ANY, api=ANY, admin=ANY, edge_settings="", api_settings="", log='filter = "debug"\n', more=""):
        self.directory = Path(directory).resolve()
        self.data_dir = self.directory / "data"
        self.config = self.directory / "dormouse.toml"
        self.log = self.directory / "node.log"
        self.minted = []
        self.process = None
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'[edge]\nlisten = "{edge}"\n{edge_settings}\n'
            f'[api]\nlisten = "{api}"\n{api_settings}\n'
            f'[admin]\nlisten = "{admin}"\n'
            # AWS takes nothing under a minute; a test that waits a minute is not run.
            "[lifecycle]\nleast_idle_secs = 1\n"
            f"[log]\n{log}{more}"
        )

    # -- the process --------------------------------------------------------------------------------------------

    def start(self):
        if self not in live:
            live.append(self)
        self.process = self.spawn()
        return self.wait_until_ready()

    def spawn(self, *arguments, config=None):
        """Another `dormouse serve` on the same data directory, its words in the same log."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [binary(), "serve", "--config", config or self.config, "--data-dir", self.data_dir, *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                # Its own group: Ctrl-C at the tests reaches the tests, which then end the node in order.
                start_new_session=True,
            )

    def wait_until_ready(self):
        self._environment, self._clients = None, {}
        eventually(f"the node to be ready (its log is {self.log})", self._is_ready, within=READY_WITHIN)
        return self

    def _is_ready(self):
        if self.process.poll() is not None:
            raise StopWaiting(f"the node ended with {self.process.returncode} while starting:\n{self.log_tail()}")
        addresses = json.loads((self.data_dir / "node.json").read_text())
        # A node.json of an earlier run is there until the new one is written.
        if addresses["pid"] != self.process.pid:
            return False
        self.edge, self.api, self.admin = (addresses[name] for name in ("edge", "api", "admin"))
        return self.admin_get("/readyz")[0] == 200

    def stop(self):
        """SIGTERM, as an operator would; returns the exit code."""
        return self._end(signal.SIGTERM)

    def kill(self):
        """SIGKILL, as a crash would."""
        return self._end(signal.SIGKILL)

    def _end(self, how):
        self.process.send_signal(how)
        return self.process.wait(STOPPED_WITHIN)

    @property
    def runs(self):
        return self.process is not None and self.process.poll() is None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends all microVMs and the node, then fails if a process of the data directory is left, or any part of a token in the
        log, the metrics, an app's log or another file of the node."""
        if not self.runs:
            self.start()
        tokens = Tokens(self.minted)
        # While the microVMs have their logs; what is being written meanwhile may be gone when it is looked at.
        leaked = tokens.found_in(self.admin_get("/metrics")[1].encode()) + tokens.found_under(self.data_dir, largest=LARGEST_SEARCHED)
        self.terminate_all()
        code = self.stop()
        live.remove(self)
        left = self.processes()
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert code == 0, f"the node ended with {code} after SIGTERM:\n{self.log_tail()}"
        assert not left, f"{len(left)} process(es) of {self.data_dir} were left after the node stopped: {left}"
        leaked += tokens.found_in(self.log.read_bytes())
        assert not leaked, f"parts of tokens stand in {len(leaked)} place(s):\n" + "\n".join(leaked[:20])

    def terminate_all(self):
        client = self.client()
        live = lambda: [vm for page in client.get_paginator("list_microvms").paginate() for vm in page["items"] if vm["state"] != "TERMINATED"]
        for vm in live():
            client.terminate_microvm(microvmIdentifier=vm["microvmId"])
        eventually("every microVM to be TERMINATED", lambda: not live(), within=60)

    def processes(self, of=None):
        """(pid, command line) of every process that has the data directory (or the microVM `of`) in its command line,
        its working directory or an open file; never the node itself."""
        wanted = str(of or self.data_dir)
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in (os.getpid(), self.process.pid if self.process else 0):
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if not command:
                    continue  # A zombie or a kernel thread.
                links = [os.readlink(entry / "cwd")]
                for fd in os.scandir(entry / "fd"):
                    with contextlib.suppress(OSError):
                        links.append(os.readlink(fd.path))
            except OSError:
                continue
            # A shell or an editor may stand in the directory; what runs guests or builds names it or holds its files.
            if wanted in command or any(wanted in link for link in links):
                found.append((int(entry.name), command[:300]))
        return found

    def log_tail(self, lines=40):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else "(no log)"

    # -- what an integrator has ---------------------------------------------------------------------------------

    @property
    def environment(self):
        """The variables that `eval "$(dormouse env)"` sets, as a shell sees them."""
        if self._environment is None:
            text = self.shell("env -0", check=True).stdout
            pairs = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
            self._environment = {name: value for name, value in pairs.items() if name.startswith(("AWS_", "DORMOUSE_"))}
        return self._environment

    def shell(self, script, *, check=False, within=60, **variables):
        """Runs bash with `eval "$(dormouse env)"` before the script; `aws` is the one of the tests' venv."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        clean |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # No file of the person who runs the tests may change what the aws command does.
            "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_PAGER": "",
        } | variables
        result = subprocess.run(
            ["bash", "-c", f'set -euo pipefail; eval "$("$1" env --data-dir "$2")"; {script}', "bash", str(binary()), str(self.data_dir)],
            env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within,
        )
        if check:
            assert result.returncode == 0, f"`{script}` ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def aws(self, *arguments, within=60):
        """The aws command with nothing but `dormouse env`; its JSON answer."""
        answer = self.shell("aws --output json " + " ".join(shlex.quote(str(part)) for part in arguments), check=True, within=within)
        return json.loads(answer.stdout) if answer.stdout.strip() else {}

    def client(self, service="lambda-microvms", **config):
        """A boto3 client that was told nothing but the variables of `dormouse env`."""
        key = (service, *sorted(config.items()))
        if key not in self._clients:
            self._clients[key] = self.fresh_client(service, **config)
        return self._clients[key]

    def fresh_client(self, service="lambda-microvms", *, key=None, **config):
        """The same, shared with nobody; `key`: an access key id and its secret instead of the node's first."""
        # No second attempts: a client that tries again would hide what the node answered first.
        settings = Config(**{"retries": {"total_max_attempts": 1}, "max_pool_connections": 64} | config)
        saved = dict(os.environ)
        try:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                del os.environ[name]
            os.environ.update(self.environment)
            return boto3.session.Session(*key or ()).client(service, config=settings)
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def signed(self, path, *, service="lambda", **parameters):
        """A GET of the node's own API, signed as AWS's operations are (not at all, without a service); an open answer."""
        url = f"http://{self.api}{path}" + (f"?{urllib.parse.urlencode(parameters)}" if parameters else "")
        request = AWSRequest("GET", url)
        if service:
            credentials = boto3.session.Session(self.environment["AWS_ACCESS_KEY_ID"], self.environment["AWS_SECRET_ACCESS_KEY"]).get_credentials()
            SigV4Auth(credentials, service, self.environment["AWS_REGION"]).add_auth(request)
        return urllib.request.urlopen(urllib.request.Request(url, headers=dict(request.headers)), timeout=120)

    # -- what an operator has -----------------------------------------------------------------------------------

    def admin_get(self, path):
        """(status, text) of a path of the admin listener."""
        try:
            with urllib.request.urlopen(f"http://{self.admin}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self):
        """All samples, as a Prometheus server reads them."""
        status, text = self.admin_get("/metrics")
        assert status == 200, f"/metrics answered {status}: {text[:200]}"
        return Metrics(text)

    def wakes(self):
        """Wakes so far, whatever became of them."""
        return self.metrics().total(WAKES)

    def open_streams(self):
        """Requests and tunnels under way."""
        return self.metrics().total(OPEN_STREAMS)

    @property
    def ca(self):
        return self.data_dir / "ca.pem"

    @property
    def edge_port(self):
        return int(self.edge.rsplit(":", 1)[1])

    def resident_mib(self):
        """Memory of the node's own process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) // 1024


class Metrics:
    """One reading of /metrics."""

    def __init__(self, text):
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def total(self, name, **labels):
        """The sum of all samples of that name whose labels hold `labels`; 0 if there is none yet."""
        return sum(sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items())

    def names(self):
        return {sample.name for sample in self.samples}
