"""An app whose memory tells whether it is still the same: it counts the requests that it has served and remembers the hooks that
it was called by, with what /run has told it."""
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

seen = {"count": 0, "hooks": [], "run": []}


class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        seen["count"] += 1
        self.answer(seen | {"pid": os.getpid()})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        hook = self.path.rsplit("/", 1)[-1]
        seen["hooks"].append(hook)
        if hook == "run":
            seen["run"].append(json.loads(body))
        self.answer({})


ThreadingHTTPServer(("", 8080), App).serve_forever()
