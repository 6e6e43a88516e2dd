"""Runs a local in-memory server of Google Cloud Storage.

The clients are the real ones: gcsfs (behind `etils.epath`), TensorStore (behind Orbax) and that of
ArrayRecord find it by environment variables. As in a real bucket, an object appears when it is
complete, and there are no folders and no appending.

Source of the interface: https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.parser
import email.policy
import hashlib
import http.server
import itertools
import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator

BUCKET = "bucket"


class Server(http.server.ThreadingHTTPServer):
    """Stores the objects of any bucket by name; `log` has (method, path) of each call."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[bytes, int, str]] = {}  # bytes, generation, time
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.log: list[tuple[str, str]] = []
        self.refuse: str | None = None  # an upload whose name ends with this breaks off half-way
        self.guard, self.numbers = threading.RLock(), itertools.count(1)

    def handle_error(self, request, client_address) -> None:
        """Ignores clients that disconnect; reports all other errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, name: str, data: bytes) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        with self.guard:
            self.objects[name] = bytes(data), next(self.numbers), now

    def names(self, prefix: str = "") -> list[str]:
        with self.guard:
            return sorted(name for name in self.objects if name.startswith(prefix))


class Handler(http.server.BaseHTTPRequestHandler):
    """Handles one call; names of objects are ``bucket/name``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        parts, query = self._parse()
        match parts:
            case ["storage", "v1", "b", bucket]:
                self._json({"kind": "storage#bucket", "name": bucket, "location": "here"})
            case ["storage", "v1", "b", bucket, "o"]:
                self._json(self._list(bucket, query))
            case ["storage", "v1" | "download", "b", bucket, "o", name] | [
                "download", "storage", "v1", "b", bucket, "o", name
            ]:
                self._get(f"{bucket}/{name}", query.get("alt") == "media" or parts[0] == "download")
            case _:
                self._fail(404)

    def do_POST(self) -> None:
        parts, query = self._parse()
        match parts:
            case ["upload", "storage", "v1", "b", bucket, "o"]:
                self._upload(bucket, query)
            case ["storage", "v1", "b", bucket, "o", name, "moveTo", "o", to]:
                with self.server.guard:
                    source = self.server.objects.pop(f"{bucket}/{name}", None)
                    if source is None:
                        return self._fail(404)
                    self.server.put(f"{bucket}/{to}", source[0])
                self._json(self._about(f"{bucket}/{to}"))
            case ["batch", "storage", "v1"]:
                self._batch()
            case _:
                self._fail(404)

    def do_DELETE(self) -> None:
        parts, _ = self._parse()
        with self.server.guard:
            gone = self.server.objects.pop(f"{parts[3]}/{parts[5]}", None)
        if gone is None:
            return self._fail(404)
        self._reply(204, b"")

    def _parse(self) -> tuple[list[str], dict[str, str]]:
        length = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(int(length)) if length else b""
        url = urllib.parse.urlsplit(self.path)
        self.server.log.append((self.command, self.path))
        parts = [urllib.parse.unquote(p) for p in url.path.strip("/").split("/")]
        return parts, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))

    def _list(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, folders = [], set()
        for full in self.server.names(f"{bucket}/{prefix}"):
            name = full.removeprefix(f"{bucket}/")
            if not query.get("startOffset", "") <= name:
                continue
            if query.get("endOffset") and name >= query["endOffset"]:
                continue
            head, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if mark:
                folders.add(prefix + head + mark)
            else:
                items.append(self._about(full))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

    def _about(self, full: str) -> dict:
        bucket, _, name = full.partition("/")
        data, generation, time = self.server.objects[full]
        return {
            "kind": "storage#object", "id": f"{full}/{generation}", "name": name,
            "bucket": bucket, "generation": str(generation), "metageneration": "1",
            "size": str(len(data)), "updated": time, "timeCreated": time,
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(), "etag": "x",
        }  # fmt: skip

    def _get(self, full: str, media: bool) -> None:
        with self.server.guard:
            stored = self.server.objects.get(full)
        if stored is None:
            return self._fail(404)
        if not media:
            return self._json(self._about(full))
        data, generation, _ = stored
        headers = {"x-goog-generation": str(generation)}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(len(data) - int(last), 0)
            end = min(int(last) + 1, len(data)) if last and first else len(data)
            if begin >= len(data):
                return self._reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            return self._reply(206, data[begin:end], headers)
        self._reply(200, data, headers)

    def _upload(self, bucket: str, query: dict[str, str]) -> None:
        match query.get("uploadType"):
            case "media":
                self._finish(f"{bucket}/{query['name']}", self.body, query)
            case "multipart":
                kind = self.headers["Content-Type"].encode()
                text = b"Content-Type: " + kind + b"\r\n\r\n" + self.body
                parser = email.parser.BytesParser(policy=email.policy.HTTP)
                about, data = parser.parsebytes(text).get_payload()
                name = json.loads(about.get_payload(decode=True))["name"]
                self._finish(f"{bucket}/{name}", data.get_payload(decode=True), query)
            case "resumable":
                name = query.get("name") or json.loads(self.body)["name"]
                number = str(next(self.server.numbers))
                self.server.uploads[number] = f"{bucket}/{name}", bytearray()
                where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
                self._reply(200, b"", {"Location": where})
            case _:  # part of a resumable upload
                full, data = self.server.uploads[query["upload_id"]]
                data += self.body
                if self.headers["Content-Range"].endswith("/*"):
                    self._reply(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
                else:
                    self._finish(full, bytes(data))

    def _finish(self, full: str, data: bytes, query: dict[str, str] | None = None) -> None:
        with self.server.guard:
            if self.server.refuse and full.endswith(self.server.refuse):
                return self._fail(403)
            wanted = (query or {}).get("ifGenerationMatch")
            if wanted is not None:
                stored = self.server.objects.get(full)
                if int(wanted) != (stored[1] if stored else 0):
                    return self._fail(412)
            self.server.put(full, data)
            self._json(self._about(full))

    def _batch(self) -> None:
        """Handles several deletions in one call."""
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"')
        lines = [x for x in self.body.decode().splitlines() if x.startswith("DELETE ")]
        out = ""
        for line in lines:
            path = urllib.parse.urlsplit(line.split()[1]).path.strip("/").split("/")
            full = "/".join(urllib.parse.unquote(p) for p in (path[3], path[5]))
            with self.server.guard:
                gone = self.server.objects.pop(full, None)
            status = "HTTP/1.1 404 Not Found" if gone is None else "HTTP/1.1 204 No Content"
            out += f"--{boundary}\r\nContent-Type: application/http\r\n\r\n{status}\r\n\r\n\r\n"
        out += f"--{boundary}--\r\n"
        kind = {"Content-Type": f'multipart/mixed; boundary="{boundary}"'}
        self._reply(200, out.encode(), kind)

    def _json(self, value: dict) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int) -> None:
        text = {"error": {"code": status, "message": f"{self.command} {self.path}"}}
        self._reply(status, json.dumps(text).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """Runs a server until the block ends."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def environment(server: Server) -> dict[str, str]:
    """Returns the environment variables that make the clients of a process use it."""
    return {"STORAGE_EMULATOR_HOST": server.url, "TENSORSTORE_GCS_HTTP_URL": server.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": server.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "EPATH_USE_TF": "false",
            "NO_GCE_CHECK": "true"}  # fmt: skip
