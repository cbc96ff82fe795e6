"""A server that answers as Google Cloud Storage's XML API does to what obstore asks: conditions are on an object's generation,
which listings do not name to obstore."""

import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


class GoogleStore(ThreadingHTTPServer):
    """On a free port, from when it is made to `shutdown`. objects: (bytes, generation, time of its last write) by key."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Request)
        self.objects: dict[str, tuple[bytes, int, float]] = {}
        self.generation, self.lost_answers = 1, 0  # of how many puts to come the answer is lost, though they are carried out
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def account(self) -> str:
        """What GOOGLE_SERVICE_ACCOUNT_KEY is to hold."""
        unused = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        return json.dumps({"gcs_base_url": f"http://127.0.0.1:{self.server_port}", "disable_oauth": True, **unused})


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GoogleStore

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def key(self):
        return unquote(urlparse(self.path).path.split("/", 2)[2]) if self.path.count("/") > 1 else ""

    def do_PUT(self):
        server, data = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        asked, there = self.headers.get("x-goog-if-generation-match"), server.objects.get(self.key, (b"", 0, 0.0))[1]
        if asked is not None and int(asked) != there:
            return self.answer(412)
        server.generation += 1
        server.objects[self.key] = data, server.generation, time.time()
        if server.lost_answers:
            server.lost_answers -= 1
            return self.answer(500)
        return self.answer(200, ETag=f'"{server.generation}"', x_goog_generation=server.generation)

    def do_GET(self):
        if not self.key:
            prefix = parse_qs(urlparse(self.path).query).get("prefix", [""])[0]
            return self.answer(200, self.listing(prefix), Content_Type="application/xml")
        if self.key not in self.server.objects:
            return self.answer(404)
        data, generation, written = self.server.objects[self.key]
        headers = {"ETag": f'"{generation}"', "x_goog_generation": generation}
        return self.answer(200, data, Last_Modified=formatdate(written, usegmt=True), **headers)

    do_HEAD = do_GET

    def do_DELETE(self):
        self.answer(204 if self.server.objects.pop(self.key, None) else 404)

    def listing(self, prefix) -> bytes:
        entries = "".join(
            f"<Contents><Key>{key}</Key><Generation>{generation}</Generation><ETag>&quot;{generation}&quot;</ETag>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(written))}</LastModified>"
            f"<Size>{len(data)}</Size></Contents>"
            for key, (data, generation, written) in sorted(self.server.objects.items())
            if key.startswith(prefix)
        )
        return f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>'.encode()
