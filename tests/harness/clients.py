"""The clients of the endpoint that need a word of explanation: curl, and a bare TLS socket for what no client would send.

`*.localhost` is loopback by RFC 6761 and not every resolver knows it, so names are led there: by --resolve for curl, in
this process by a `getaddrinfo` that answers those names itself (see conftest.py).
"""
import http.client
import io
import json
import socket
import ssl
import subprocess
from dataclasses import dataclass, field


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict = field(default_factory=dict)
    body: bytes = b""
    version: str = ""
    closed: bool = False

    @property
    def text(self):
        return self.body.decode(errors="replace")

    def json(self):
        return json.loads(self.body)

    def __str__(self):
        return f"{self.version} {self.status} {self.text[:200]!r} {self.headers}"


def loopback_for_localhost():
    """Makes this process resolve every name under .localhost to 127.0.0.1."""
    genuine = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **named):
        name = host.decode() if isinstance(host, bytes) else host
        return genuine("127.0.0.1" if isinstance(name, str) and name.endswith(".localhost") else host, *arguments, **named)

    socket.getaddrinfo = getaddrinfo


def tls(node, alpn=None):
    """A context that trusts the node's CA and nothing else."""
    context = ssl.create_default_context(cafile=node.ca)
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


def curl(node, url, *arguments, within=120):
    """curl's answer. Redirects are not followed, certificates are checked."""
    host = url.split("/")[2]
    name, port = host.rsplit(":", 1) if ":" in host else (host, "443")
    command = [
        "curl", "--silent", "--show-error", "--include", "--no-progress-meter", "--noproxy", "*", "--max-time", str(within),
        "--cacert", str(node.ca), "--resolve", f"{name}:{port}:127.0.0.1", *map(str, arguments), url,
    ]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=within + 10)
    assert result.returncode == 0, f"curl ended with {result.returncode}: {result.stderr.decode(errors='replace')}"
    return parse_include(result.stdout)


def curl_many(node, url, count, *arguments, within=120):
    """The statuses of as many requests by one curl, one after the other over one connection if the node lets it."""
    name, port = url.split("/")[2].rsplit(":", 1)
    command = [
        "curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", str(within), "--cacert", str(node.ca),
        "--resolve", f"{name}:{port}:127.0.0.1", "--write-out", "%{stderr}%{http_code}\n", "--fail-early", *map(str, arguments), *[url] * count,
    ]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within + 10)
    assert result.returncode == 0, f"curl ended with {result.returncode}: {result.stderr}"
    return [int(line) for line in result.stderr.split()]


def parse_include(output):
    """The last header block of `curl --include` (an earlier one is a 100 or 101) and the body."""
    while True:
        head, _, rest = output.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        version, status = lines[0].split(" ")[:2]
        if status.startswith("1") and rest.startswith(b"HTTP/"):
            output = rest
            continue
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return Answer(int(status), headers, rest, version)


class Raw:
    """One TLS connection on which a test writes bytes and reads answers, HTTP/1.1 or whatever it likes."""

    def __init__(self, node, host, *, alpn=("http/1.1",), timeout=60):
        address = node.edge.rsplit(":", 1)
        plain = socket.create_connection(("127.0.0.1", int(address[1])), timeout=timeout)
        self.socket = tls(node, list(alpn)).wrap_socket(plain, server_hostname=host)

    def send(self, data):
        self.socket.sendall(data)

    def answer(self, method="GET"):
        """The next answer; status 0 if the connection was closed without one."""
        response = http.client.HTTPResponse(self.socket, method=method)
        try:
            response.begin()
            body = response.read()
        except (http.client.BadStatusLine, http.client.RemoteDisconnected, ConnectionError, ssl.SSLError):
            return Answer(0, closed=True)
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, body, "HTTP/1.1", closed=response.will_close)

    def is_closed(self):
        """Waits until the other side has closed; fails by the socket's timeout if it does not."""
        try:
            return self.socket.recv(1) == b""
        except (ConnectionError, ssl.SSLError):
            return True

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def raw_get(node, host, lines, *, path="/", authority=None):
    """One HTTP/1.1 GET with these header lines (bytes, sent as they are); the answer."""
    with Raw(node, host) as connection:
        request = io.BytesIO()
        request.write(b"GET %s HTTP/1.1\r\nHost: %s\r\n" % (path.encode(), (authority or f"{host}:{node.edge_port}").encode()))
        for line in lines:
            request.write((line if isinstance(line, bytes) else line.encode("latin-1")) + b"\r\n")
        request.write(b"\r\n")
        connection.send(request.getvalue())
        return connection.answer()
