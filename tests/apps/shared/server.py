"""An HTTP server as apps in a guest need it."""
import socketserver
from http.server import ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # Fifty requests may arrive in the same instant after a wake.
    request_queue_size = 512

    def server_bind(self):
        # HTTPServer asks the resolver for its own name here, and a guest without DNS waits for the answer.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "guest", self.server_address[1]
