"""One microVM as its owner has it: an id, a hostname, tokens. Everything goes through boto3 and the public endpoint."""
import httpx

from . import clients
from .waiting import NeverHappened, StopWaiting, eventually

RUNNING_WITHIN = 120
SUSPENDED_WITHIN = 60
ENDED_WITHIN = 60
ALL_PORTS = "all ports"
# Far away, so that no test but the one about it meets the idle clock.
PATIENT = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


class Microvm:
    """Use `Microvm.run(...)`; the node ends all its microVMs at the end of the tests."""

    def __init__(self, node, answer):
        self.node = node
        self.id = answer["microvmId"]
        self.endpoint = answer["endpoint"]

    @classmethod
    def run(cls, node, image, *, idle=PATIENT, wait=True, **request):
        client = node.client(parameter_validation=False)  # boto3 itself refuses idle times under AWS's minute.
        if idle:
            request["idlePolicy"] = idle
        vm = cls(node, client.run_microvm(imageIdentifier=image, **request))
        return vm.reaches("RUNNING", within=RUNNING_WITHIN) if wait else vm

    # -- the control API ----------------------------------------------------------------------------------------

    def view(self):
        return self.node.client().get_microvm(microvmIdentifier=self.id)

    @property
    def state(self):
        return self.view()["state"]

    def reaches(self, state, *, within):
        """Waits for a state; a microVM that has ended reaches no other."""
        def there():
            view = self.view()
            if view["state"] == "TERMINATED" != state:
                raise StopWaiting(f"{self.id} should become {state} and is TERMINATED: {view.get('stateReason')}")
            return view["state"] == state

        try:
            eventually(f"{self.id} to be {state}", there, within=within)
        except NeverHappened as late:
            raise NeverHappened(f"{late}. It is {self.view()}") from late
        return self

    def suspend(self):
        """Asks for it and waits for it: returns when it is SUSPENDED."""
        self.node.client().suspend_microvm(microvmIdentifier=self.id)
        return self.reaches("SUSPENDED", within=SUSPENDED_WITHIN)

    def resume(self):
        self.node.client().resume_microvm(microvmIdentifier=self.id)
        return self.reaches("RUNNING", within=RUNNING_WITHIN)

    def terminate(self):
        self.node.client().terminate_microvm(microvmIdentifier=self.id)
        return self.reaches("TERMINATED", within=ENDED_WITHIN)

    def token(self, *ports, minutes=15):
        """A token for these ports: a number, a pair (an inclusive range), or ALL_PORTS. 8080 if none is named."""
        return self.mint(*ports, minutes=minutes)["X-aws-proxy-auth"]

    def mint(self, *ports, minutes=15):
        def allowed(port):
            if port == ALL_PORTS:
                return {"allPorts": {}}
            if isinstance(port, tuple):
                return {"range": {"startPort": port[0], "endPort": port[1]}}
            return {"port": port}

        answer = self.node.client().create_microvm_auth_token(
            microvmIdentifier=self.id, expirationInMinutes=minutes, allowedPorts=[allowed(port) for port in ports or (8080,)],
        )
        self.node.minted.extend(answer["authToken"].values())
        return answer["authToken"]

    # -- the endpoint -------------------------------------------------------------------------------------------

    @property
    def host(self):
        """The hostname without its port."""
        return self.endpoint.split(":")[0]

    @property
    def url(self):
        return f"https://{self.endpoint}"

    def http(self, *ports, http2=False, token=None, **headers):
        """An httpx client whose every request carries a token for `ports`."""
        return httpx.Client(
            base_url=self.url, http1=not http2, http2=http2, verify=clients.tls(self.node), timeout=120, trust_env=False,
            headers={"X-aws-proxy-auth": token or self.token(*ports)} | headers,
        )

    def count(self):
        """One GET of the counter, over a connection of its own; its JSON."""
        with self.http() as client:
            answer = client.get("/")
        assert answer.status_code == 200, f"{self.id} answered {answer.status_code} {answer.text!r} ({dict(answer.headers)})"
        return answer.json()

    def curl(self, *arguments, path="/"):
        return clients.curl(self.node, f"{self.url}{path}", *arguments)

    def processes(self):
        return self.node.processes(of=self.id)
