"""A Hugging Face Hub on this machine: the REST protocol that huggingface_hub speaks, in memory, with faults on demand.

Repositories, commits, branches, tags, LFS uploads with their sha256 checked, resolve with redirects, ETags and ranges.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # tests shorten time.sleep for the client
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret_of_the_tests"
REPO = r"(?P<repo>[^/]+/[^/]+)"


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """Happens to requests whose 'METHOD /path' matches, `times` times (None: always)."""

    pattern: str
    kind: object  # a status code, 'drop', 'lose', 'truncate', 'flip' or 'slow'
    times: int | None = 1


@dataclass
class Repository:
    private: bool = False
    commits: dict = field(default_factory=dict)  # oid -> {path: bytes}
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    lfs: set = field(default_factory=set)  # paths kept in LFS

    def resolve(self, revision):
        oid = self.tags.get(revision) or self.branches.get(revision) or revision
        return oid if oid in self.commits else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hung up is no news: faults make them do so."""


class Hub:
    """Serves at `url` once started; `repos` is what it holds, `requests` what it was asked."""

    def __init__(self):
        self.lock = threading.RLock()
        self.reset()
        handler = type("Handler", (_Handler,), {"hub": self})
        # Large files lie on another host, as on the real Hub: clients read a redirect's headers and follow it later.
        self.servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def reset(self):
        self.repos: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    def start(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def fail(self, pattern, kind, times=1):
        self.faults.append(Fault(pattern, kind, times))

    def put(self, repo_id, files, tag=None):
        """Publish files directly, as somebody else would have."""
        repo = self.repos.setdefault(repo_id, Repository())
        oid = hashlib.sha1(json.dumps(sorted(files)).encode() + b"".join(files[k] for k in sorted(files))).hexdigest()
        repo.commits[oid] = dict(files)
        repo.branches["main"] = oid
        repo.lfs |= {name for name in files if name.endswith((".safetensors", ".bin"))}
        self.blobs.update({hashlib.sha256(files[name]).hexdigest(): files[name] for name in repo.lfs & files.keys()})
        if tag:
            repo.tags[tag] = oid
        return oid

    def fault_for(self, request):
        with self.lock:
            for fault in self.faults:
                if re.search(fault.pattern, request) and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault.kind
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait for an acknowledgement
    hub: Hub

    def log_message(self, *_):
        pass

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        self.damage = self.hub.fault_for(request)
        if isinstance(self.damage, int):
            return self._error(self.damage, "a fault of the test")
        if self.damage == "drop":
            self.close_connection = True
            self.connection.close()
            return None
        for pattern, name in _ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                with self.hub.lock:
                    return getattr(self, name)(body, **match.groupdict())
        return self._error(404, "no such page")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve

    # --- answers

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status, message, code=None):
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status, body, headers, length=None):
        if self.damage == "lose":  # it was done, and nobody hears of it
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.damage == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if self.damage == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            self.connection.close()
        elif self.damage == "slow":
            for start in range(0, len(body), max(1, len(body) // 10)):
                self.wfile.write(body[start : start + max(1, len(body) // 10)])
                self.wfile.flush()
                sleep(0.05)
        else:
            self.wfile.write(body)

    def _allowed(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._error(401, "Invalid username or password.")
        return False

    def _repo(self, repo):
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._error(404 if self.headers.get("Authorization") else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    # --- pages

    def create(self, body):
        if not self._allowed():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if name in self.hub.repos:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        first = hashlib.sha1(name.encode()).hexdigest()
        self.hub.repos[name] = Repository(private, {first: {}}, {"main": first})
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def whoami(self, body):
        if self._allowed():
            self._json({"name": "tester", "type": "user", "orgs": []})

    def validate_yaml(self, body):
        card = json.loads(body)["content"]
        missing = [] if card.startswith("---\n") else [{"message": "the card has no metadata"}]
        self._json({"errors": missing, "warnings": []}, 400 if missing else 200)

    def info(self, body, repo, revision="main"):
        found = self._repo(repo)
        if found is None:
            return
        oid = found.resolve(revision)
        if oid is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": path, **self._facts(found, path, data)} for path, data in found.commits[oid].items()]
        self._json(
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "sha": oid,
                "private": found.private,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    def _facts(self, repo, path, data):
        facts = {"size": len(data), "blobId": git_sha1(data)}
        if path in repo.lfs:
            facts["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return facts

    def tree(self, body, repo, revision):
        found = self._repo(repo)
        if found is None:
            return
        oid = found.resolve(revision)
        if oid is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        entries = []
        for path, data in found.commits[oid].items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
            if path in found.lfs:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def refs(self, body, repo):
        found = self._repo(repo)
        if found is not None:
            listed = lambda refs, kind: [  # noqa: E731
                {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in refs.items()
            ]
            self._json(
                {"branches": listed(found.branches, "heads"), "tags": listed(found.tags, "tags"), "converts": []}
            )

    def preupload(self, body, repo, revision):
        found = self._repo(repo)
        if found is None or not self._allowed():
            return
        files = found.commits[found.resolve(revision)]
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            large = path.endswith((".safetensors", ".bin", ".png"))
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in files:
                data = files[path]
                answer["oid"] = hashlib.sha256(data).hexdigest() if path in found.lfs else git_sha1(data)
            answers.append(answer)
        self._json({"files": answers})

    def batch(self, body, repo):
        if not self._allowed():
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/upload/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify/{asked['oid']}"},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "sha256 mismatch")
        self.hub.blobs[oid] = body
        self._json({})

    def verify(self, body, oid):
        self._json({}) if oid in self.hub.blobs else self._error(404, "no such object")

    def commit(self, body, repo, revision):
        found = self._repo(repo)
        if found is None or not self._allowed():
            return
        files = dict(found.commits[found.resolve(revision)])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                found.lfs.discard(value["path"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._error(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
                found.lfs.add(value["path"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = hashlib.sha1(body + str(len(found.commits)).encode()).hexdigest()
        found.commits[oid] = files
        found.branches[revision] = oid
        self._json(
            {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "hookOutput": "", "success": True}
        )

    def tag(self, body, repo, revision):
        found = self._repo(repo)
        if found is None or not self._allowed():
            return
        name = json.loads(body)["tag"]
        if name in found.tags:
            return self._error(409, "Tag reference exists already")
        found.tags[name] = found.resolve(revision)
        self._json({})

    def branch(self, body, repo, name):
        found = self._repo(repo)
        if found is None or not self._allowed():
            return
        if name in found.branches:
            return self._error(409, "Reference already exists")
        found.branches[name] = found.branches["main"]
        self._json({})

    def resolve(self, body, repo, revision, path):
        found = self._repo(repo)
        if found is None:
            return
        oid = found.resolve(revision)
        if oid is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        if path not in found.commits[oid]:
            return self._error(404, "Entry not found", "EntryNotFound")
        data = found.commits[oid][path]
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if path in found.lfs:
            digest = hashlib.sha256(data).hexdigest()
            self.hub.blobs[digest] = data
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            return self._send(302, b"", {**headers, "Location": f"{self.hub.cdn_url}/cdn/{digest}"})
        self._ranged(data, {**headers, "ETag": f'"{git_sha1(data)}"'})

    def cdn(self, body, oid):
        self._ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data, headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self._send(200, data, headers)
        first = int(asked[1])
        last = min(int(asked[2]) if asked[2] else len(data) - 1, len(data) - 1)
        if first >= len(data):
            return self._send(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        self._send(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


_ROUTES = [
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (r"GET /api/whoami-v2", "whoami"),
    (rf"GET /api/models/{REPO}/revision/(?P<revision>[^/]+)", "info"),
    (rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
    (rf"GET /api/models/{REPO}/refs", "refs"),
    (rf"GET /api/models/{REPO}", "info"),
    (rf"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /upload/(?P<oid>[0-9a-f]+)", "upload"),
    (r"POST /verify/(?P<oid>[0-9a-f]+)", "verify"),
    (rf"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"POST /api/models/{REPO}/tag/(?P<revision>[^/]+)", "tag"),
    (rf"POST /api/models/{REPO}/branch/(?P<name>[^/]+)", "branch"),
    (r"(?:GET|HEAD) /cdn/(?P<oid>[0-9a-f]+)", "cdn"),
    (rf"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
