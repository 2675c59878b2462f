"""The endpoints of the loopback Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from support.hub_store import Commit, File, HubError, Repo, card_faults

if TYPE_CHECKING:
    from support.hub_server import Hub

_ID, _REV = r"(?P<repo_id>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)"
_MODEL = f"/api/models/{_ID}"
_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", "/api/whoami-v2", "whoami"),
    ("GET", "/api/models", "models"),
    ("GET", f"{_MODEL}/revision/{_REV}", "info"),
    ("GET", f"{_MODEL}/tree/{_REV}", "tree"),
    ("GET", f"{_MODEL}/refs", "refs"),
    ("POST", f"{_MODEL}/branch/{_REV}", "branch"),
    ("POST", f"{_MODEL}/preupload/{_REV}", "preupload"),
    ("POST", f"{_MODEL}/commit/{_REV}", "commit"),
    ("GET", _MODEL, "info"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs-objects/(?P<sha256>[0-9a-f]{64})", "store"),
    ("POST", f"/lfs-verify/{_ID}", "verify"),
    ("GET", f"/{_ID}/resolve/{_REV}/(?P<path>.+)", "resolve"),
]
_LFS_TYPE = {"Content-Type": "application/vnd.git-lfs+json"}


class Api:
    """The endpoints, for one request."""

    def __init__(self, hub: Hub, headers: Any, query: dict[str, list[str]], body: bytes) -> None:
        self.hub, self.query, self.raw = hub, query, body
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        self.token = token if scheme == "Bearer" else ""

    def call(self, method: str, path: str) -> tuple[int, Any, dict[str, str]]:
        for verb, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and (verb == method or (verb, method) == ("GET", "HEAD")):
                result = getattr(self, name)(
                    **{k: unquote(v) for k, v in found.groupdict().items()}
                )
                return result if isinstance(result, tuple) else (200, result, {})
        raise HubError(404, f"no such endpoint: {method} {path}")

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    def authorize(self, code: str = "") -> None:
        """Let only accepted tokens write."""
        if not self.token:
            raise HubError(401, "Invalid username or password.", code)
        if self.token not in self.hub.tokens:
            raise HubError(403, "You don't have the rights to write here")

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """Return a repository that the caller may see; others look missing."""
        found = self.hub.repos.get(repo_id)
        if found is None or (found.private and self.token not in self.hub.tokens):
            status = 404 if self.token else 401
            message = "Repository not found" if self.token else "Invalid username or password."
            raise HubError(status, message, "RepoNotFound")
        if write:
            # On https the client takes any 401 of a repository for a missing one; on http it
            # goes by the code.
            self.authorize("RepoNotFound")
        return found

    def create(self) -> Any:
        self.authorize()
        body = self.body
        repo_id = f"{body.get('organization') or self.hub.user}/{body['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.hub.repos[repo_id] = Repo(repo_id, private)
        return {"url": url, "name": repo_id, "id": hashlib.sha1(url.encode()).hexdigest()[:24]}

    def delete(self) -> Any:
        repo_id = f"{self.body.get('organization') or self.hub.user}/{self.body['name']}"
        self.repo(repo_id, write=True)
        del self.hub.repos[repo_id]
        return {}

    def validate(self) -> Any:
        errors, warnings = card_faults(self.body["content"])
        listed = {"errors": errors, "warnings": warnings}
        found = {name: [{"message": text} for text in texts] for name, texts in listed.items()}
        return (400, found | {"error": "\n".join(errors)}, {}) if errors else found

    def whoami(self) -> Any:
        if self.token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        access = {"displayName": "test", "role": "write"}
        auth = {"type": "access_token", "accessToken": access}
        name = self.hub.user
        return {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": auth}

    def models(self) -> Any:
        seen = [
            r for r in self.hub.repos.values() if not r.private or self.token in self.hub.tokens
        ]
        return [repo.info(repo.at("main")) for repo in seen]

    def info(self, repo_id: str, revision: str = "main") -> Any:
        repo = self.repo(repo_id)
        return repo.info(repo.at(revision))

    def tree(self, repo_id: str, revision: str) -> Any:
        files = self.repo(repo_id).at(revision).files
        return [files[path].item(path) for path in sorted(files)]

    def refs(self, repo_id: str) -> Any:
        found: dict[str, list[Any]] = {"branches": [], "converts": [], "tags": []}
        if "include_prs" in self.query:
            found["pullRequests"] = []
        for name, commit in self.repo(repo_id).heads.items():
            pull = name.startswith("refs/pr/")
            ref = name if pull else f"refs/heads/{name}"
            entry = {"name": name, "ref": ref, "targetCommit": commit.oid}
            if not pull or "pullRequests" in found:
                found["pullRequests" if pull else "branches"].append(entry)
        return found

    def branch(self, repo_id: str, revision: str) -> Any:
        repo = self.repo(repo_id, write=True)
        if revision.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {revision}")
        if revision in repo.heads:
            raise HubError(409, f"Reference already exists: refs/heads/{revision}")
        start = self.body.get("startingPoint") if self.raw else None
        repo.heads[revision] = repo.at(start or "main")
        return {}

    def preupload(self, repo_id: str, revision: str) -> Any:
        commit = self.repo(repo_id, write=True).at(revision)
        files = [self._mode(commit, asked) for asked in self.body["files"]]
        return {"files": files, "commitOid": commit.oid}

    def _mode(self, commit: Commit, asked: dict[str, Any]) -> dict[str, Any]:
        path = asked["path"]
        mode = "lfs" if self.hub.is_lfs(path, asked["size"]) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        return answer | ({"oid": commit.files[path].etag} if path in commit.files else {})

    def commit(self, repo_id: str, revision: str) -> Any:
        repo = self.repo(repo_id, write=True)
        lines = [json.loads(line) for line in self.raw.splitlines() if line.strip()]
        header = lines[0]["value"]
        if revision not in repo.heads:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repo.heads[revision]
        if header.get("parentCommit") not in (None, head.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self._apply(line["key"], line["value"], files)
        pull = {}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.heads)
            revision = f"refs/pr/{number}"
            repo.heads[revision] = head
            url = f"{self.hub.url}/{repo_id}/discussions/{number}"
            pull = {"pullRequestUrl": url, "pullRequestNum": number}
        oid = repo.add(revision, header["summary"], files).oid
        answer = {"success": True, "commitOid": oid, "hookOutput": ""}
        return answer | {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"} | pull

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(self.hub.lfs[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [p for p in files if p == path or (key[7:] == "Folder" and p.startswith(folder))]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"unknown key of a commit: {key}")

    def batch(self, repo_id: str) -> Any:
        self.repo(repo_id, write=True)
        objects = []
        for wanted in self.body["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs-objects/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/lfs-verify/{repo_id}", "header": {}}
                answer |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, _LFS_TYPE

    def store(self, sha256: str) -> Any:
        if hashlib.sha256(self.raw).hexdigest() != sha256:
            raise HubError(400, "the content's sha256 is another")
        self.hub.lfs[sha256] = self.raw
        return 200, b"", {}

    def verify(self, repo_id: str) -> Any:
        self.repo(repo_id, write=True)
        if len(self.hub.lfs.get(self.body["oid"], b"")) != self.body["size"]:
            raise HubError(404, "no such object")
        return {}

    def resolve(self, repo_id: str, revision: str, path: str) -> Any:
        repo = self.repo(repo_id)
        if repo.granted is not None and self.token not in repo.granted:
            status, who = (403, "you are not in the authorized list") if self.token else (401, "")
            raise HubError(status, f"Access to model {repo_id} is restricted. {who}", "GatedRepo")
        commit = repo.at(revision)
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers["X-Linked-Etag"] = f'"{file.sha256}"'
            headers["X-Linked-Size"] = str(len(file.data))
        return 200, file.data, headers | {"Content-Type": "application/octet-stream"}
