"""An app that writes down all that reaches it, in order, and answers its lifecycle hooks as it is told.

What it has seen is in its memory: after a wake that failed, it has never happened. Rules that must outlive that are in terms of
the clock. READY and VALIDATE in its environment are the statuses of the build's hooks, one after the other.
"""
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler

import websocket
from server import Server

HOOKS = "/aws/lambda-microvms/runtime/v1/"
# What has reached the app, in order.
events = []
# The answers that are left for a hook, the last one for ever.
answers = {hook: [int(status) for status in os.environ.get(hook.upper(), "200").split(",")] for hook in ("ready", "validate")}
# A hook that answers a status until a point in time.
until = {}
lock = threading.Lock()


def note(what, **more):
    with lock:
        events.append({"what": what, "at": time.time(), **more})


def deafen():
    """Nobody listens for hooks any more."""
    hooks.shutdown()
    hooks.server_close()


class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        print(f"{self.command} {self.path} {args[1] if len(args) > 1 else ''}", flush=True)

    def answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()

    def do_GET(self):
        if self.path == "/ws":
            return self.websocket()
        if self.path == "/events":
            return self.answer(events)
        note("request", path=self.path)
        self.answer({"served": True})

    def do_POST(self):
        rule = json.loads(self.body())
        if rule.get("deaf") == "now":
            deafen()
        if rule.get("deaf") == "asleep":
            until["deaf"] = True
        until.update(rule.get("until", {}))
        answers.update(rule.get("answers", {}))
        self.answer({"done": True})

    def websocket(self):
        websocket.accept(self)
        try:
            while True:
                _, opcode, payload = websocket.read_frame(self.rfile)
                if opcode != websocket.TEXT:
                    return
                note("message", text=payload.decode())
                websocket.write_frame(self.wfile, websocket.TEXT, payload)
        except OSError:
            pass


class Hooks(App):
    def do_POST(self):
        hook = self.path.removeprefix(HOOKS)
        body = self.body()
        note(hook, path=self.path, headers=dict(self.headers), body=body, connection=self.client_address[1], version=self.request_version)
        status = self.status(hook, body)
        if hook == "suspend" and until.get("deaf"):
            deafen()
        note(f"{hook} answered", status=status)
        self.answer({}, status=status)

    def status(self, hook, body):
        if hook == "run":
            told = json.loads(json.loads(body)["runHookPayload"] or "{}")
            time.sleep(told.get("seconds", 0))
            return told.get("status", 200)
        status, end = until.get(hook, (200, 0))
        if time.time() < end:
            return status
        left = answers.get(hook, [200])
        return left.pop(0) if len(left) > 1 else left[0]


# Not the address of a wildcard: the hooks come from inside.
hooks = Server(("127.0.0.1", 9000), Hooks)
threading.Thread(target=hooks.serve_forever, daemon=True).start()
Server(("0.0.0.0", 8080), App).serve_forever()
