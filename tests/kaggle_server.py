"""A small server on 127.0.0.1 with the part of Kaggle's API that a download needs.

Kaggle's client has fixed addresses only. Its own setting for developers, KAGGLE_API_ENVIRONMENT=LOCALHOST,
sends requests to http://localhost. With this server as the HTTP proxy they arrive here, on any free port, and
the client stays unpatched. So do requests to http://storage.localhost, the storage that the API redirects to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

USER, KEY = "ada", "planted-secret-key-1889"
BASIC = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
SIGNATURE = "planted-signature-1889"
OWNER, SLUG = "a-lab", "smears"


@dataclass
class Seen:
    """One request; `call` is the method of the API, or ``link`` or ``bytes`` at the storage."""

    host: str
    call: str
    authorization: str | None
    range: str | None
    body: dict[str, Any] | None


@dataclass
class KaggleServer:
    """Serves `versions` (number -> zip) of one data set in a `with` block; the attributes set what fails."""

    versions: dict[int, bytes]
    public: bool = True
    accepts: str = f"Basic {BASIC}"
    statuses: list[int] = field(default_factory=list)  # of the next API calls
    storage: str = "storage.localhost"  # host of the archive
    storage_statuses: list[int] = field(default_factory=list)  # of the next requests to it, 0: as usual
    drop_after: int | None = None  # bytes of the archive before a connection is cut
    drops: int = 10**9  # number of connections that are cut
    ranges: bool = True
    checksum: bool = True
    lengths: bool = True
    redirects: bool = True
    stall: bool = False  # hold the connection open instead of cutting it
    seen: list[Seen] = field(default_factory=list)
    halfway: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> KaggleServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send Kaggle's client to this server."""
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "http_proxy": f"http://127.0.0.1:{self._server.server_port}",
        }

    @property
    def downloads(self) -> list[Seen]:
        """The requests for bytes of the archive."""
        return [seen for seen in self.seen if seen.host == "storage.localhost" and seen.call == "bytes"]

    def wait(self) -> None:
        """Hold a stalled connection until the server stops."""
        self._released.wait(30)


def _handler(kaggle: KaggleServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: a second one would take 40 ms

        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def do_POST(self) -> None:
            url = urlsplit(self.path)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            call = url.path.rsplit("/", 1)[-1]
            sent = self.headers["Authorization"]
            kaggle.seen.append(Seen(url.hostname or "", call, sent, None, body))
            status = kaggle.statuses.pop(0) if kaggle.statuses else 0
            if not status and sent != kaggle.accepts and not (kaggle.public and sent is None):
                status = 401
            asked = (body.get("ownerSlug"), body.get("datasetSlug"))
            version = body.get("datasetVersionNumber")
            if not status and (asked != (OWNER, SLUG) or version not in kaggle.versions):
                status = 404
            if status:  # the message contains the key, as that of a careless server might
                self._json(status, {"code": status, "message": f"no, {sent}"}, {})
            elif not kaggle.redirects:
                self._archive(kaggle.versions[version])
            else:
                where = f"http://{kaggle.storage}/{version}.zip?X-Goog-Signature={SIGNATURE}"
                self._json(302, {}, {"Location": where})

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            # the first request only finds the archive; the client then asks for a range of its bytes
            call = "bytes" if self.headers["Range"] or not kaggle.ranges else "link"
            seen = Seen(url.hostname or "", call, self.headers["Authorization"], self.headers["Range"], None)
            kaggle.seen.append(seen)
            status = kaggle.storage_statuses.pop(0) if kaggle.storage_statuses else 0
            if status or url.query != f"X-Goog-Signature={SIGNATURE}":
                self._json(status or 403, {}, {})
            else:
                self._archive(kaggle.versions[int(url.path[1:-4])], call == "bytes")

        def _json(self, status: int, content: dict[str, Any], headers: dict[str, str]) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _archive(self, whole: bytes, may_drop: bool = True) -> None:
            first = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "") if kaggle.ranges else None
            start = int(first[1]) if first else 0
            part = whole[start:]
            self.send_response(206 if first else 200)
            self.send_header("Content-Type", "application/zip")
            self.send_header("Accept-Ranges", "bytes" if kaggle.ranges else "none")
            self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
            if first:
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            if kaggle.checksum:
                md5 = base64.b64encode(hashlib.md5(whole, usedforsecurity=False).digest()).decode()
                self.send_header("X-Goog-Hash", f"crc32c=AAAAAA==,md5={md5}")
            if kaggle.lengths:
                self.send_header("Content-Length", str(len(part)))
            self.send_header("Connection", "close")
            self.close_connection = True
            self.end_headers()
            cut = may_drop and kaggle.drop_after is not None and kaggle.drops > 0
            if cut:
                kaggle.drops -= 1
                part = part[: kaggle.drop_after]
            try:
                self.wfile.write(part)
                self.wfile.flush()
                if cut and kaggle.stall:
                    kaggle.halfway.set()
                    kaggle.wait()
            except (BrokenPipeError, ConnectionResetError):
                return  # the client closes the first answer when it has its head

    return Handler
