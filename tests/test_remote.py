"""Remote checkpoints: copies that are whole or absent, retry, errors that say what to do.

What is not verified here is a real cloud. `gs://` runs blobfile's own code over real HTTP, against
a small server below that answers like Google's storage as far as blobfile asks; its log-in is not
tried. `az://` differs inside blobfile only and is not tried at all, but for what its errors are
turned into. The rest uses a local folder in the place of the remote one, which blobfile serves
through the same calls.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import blobfile
import pytest
import urllib3

from dbae import UserError
from dbae.remote import TRIES, Mirror, Remote, blobfile_context, fetch, is_remote

WEIGHTS = "ema_0.9999_010000.pt"
SUMS = "checkpoint_010000.sha256"


class Faulty:
    """blobfile, but for a fault in each call of `copy`, `stat`, … as long as there is one."""

    def __init__(self, faults: list[Any]) -> None:
        self.faults = faults
        self.calls: list[str] = []
        self.real = blobfile_context()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            fault = self.faults.pop(0) if self.faults else None
            if isinstance(fault, Exception):
                raise fault
            result = getattr(self.real, name)(*args, **kwargs)
            if fault == "truncate":
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            return result

        return call


def failure(kind: type[blobfile.RequestFailure], status: int) -> blobfile.RequestFailure:
    return kind(f"unexpected status {status}", "<Request>", status, None, None)


@pytest.fixture
def waits() -> list[float]:
    """The waits between tries, in seconds, in the place of waiting."""
    return []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one complete checkpoint, of the shape of files only."""
    folder = tmp_path / "a run, à côté"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(os.urandom(5000))
    (folder / SUMS).write_text(f"{'0' * 64}  {WEIGHTS}\n")
    (folder / "config.json").write_text('{"model": {}}')
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DBAE_CACHE", str(folder))
    return folder


@pytest.mark.parametrize(
    "path, expected",
    [
        ("gs://bucket/run/ema.pt", True),
        ("az://account/container/ema.pt", True),
        ("https://account.blob.core.windows.net/container/ema.pt", True),
        ("runs/ema.pt", False),
        ("/runs/a:b//c.pt", False),
        ("C:\\runs\\ema.pt", False),
        ("", False),
    ],
)
def test_urls_are_told_from_local_paths(path: str, expected: bool) -> None:
    assert is_remote(path) is expected


# Fetching ---------------------------------------------------------------------------------


def test_a_checkpoint_comes_with_its_configuration_and_checksums(run: Path, cache: Path) -> None:
    path = fetch(str(run / WEIGHTS))
    assert path.is_relative_to(cache) and path.name == WEIGHTS
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == {
        p.name: p.read_bytes() for p in run.iterdir()
    }


def test_an_unchanged_file_is_copied_once_and_a_changed_one_again(run: Path, cache: Path) -> None:
    context = Faulty([])
    first = fetch(str(run / WEIGHTS), remote=Remote(context))
    assert context.calls.count("copy") == 3
    assert fetch(str(run / WEIGHTS), remote=Remote(context)) == first
    assert context.calls.count("copy") == 3
    changed = os.urandom(5000)
    (run / WEIGHTS).write_bytes(changed)
    os.utime(run / WEIGHTS, (1, 1))
    again = fetch(str(run / WEIGHTS), remote=Remote(context))
    assert again != first and again.read_bytes() == changed


def test_a_damaged_copy_in_the_cache_is_replaced(run: Path, cache: Path) -> None:
    path = fetch(str(run / WEIGHTS))
    os.truncate(path, 10)
    assert fetch(str(run / WEIGHTS)).read_bytes() == (run / WEIGHTS).read_bytes()


def test_a_released_file_needs_nothing_beside_it(tmp_path: Path) -> None:
    lone = tmp_path / "elsewhere" / "released.pt"
    lone.parent.mkdir()
    lone.write_bytes(b"weights")
    path = fetch(str(lone), tmp_path / "new")
    assert path == tmp_path / "new" / "released.pt"
    assert [p.name for p in path.parent.iterdir()] == ["released.pt"]


def test_a_folder_of_ones_own_gets_what_is_remote_now(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / WEIGHTS).write_bytes(bytes(5000))
    assert fetch(str(run / WEIGHTS), mine).read_bytes() == (run / WEIGHTS).read_bytes()


def test_a_cache_that_cannot_be_written_is_named(
    run: Path, cache: Path, waits: list[float]
) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(UserError, match=r"cannot write to .*cache.*; set DBAE_CACHE"):
        fetch(str(run / WEIGHTS), remote=Remote(sleep=waits.append))
    assert waits == []


# Mirroring --------------------------------------------------------------------------------


def test_a_mirror_brings_a_run_to_a_fresh_machine(run: Path, tmp_path: Path) -> None:
    url, fresh = str(tmp_path / "bucket" / "runs" / "1"), tmp_path / "fresh"
    fresh.mkdir()
    assert Mirror(url, fresh).names() == []
    Mirror(url + "/", run).upload(["config.json", WEIGHTS, SUMS])
    (tmp_path / "bucket" / "runs" / "1" / "samples").mkdir()
    mirror = Mirror(url, fresh)
    assert mirror.names() == sorted([SUMS, "config.json", WEIGHTS])
    mirror.download(mirror.names())
    for name in mirror.names():
        assert (fresh / name).read_bytes() == (run / name).read_bytes()
    mirror.delete([SUMS, "absent.pt", WEIGHTS])
    assert mirror.names() == ["config.json"]


def test_what_declares_a_checkpoint_complete_never_comes_before_it(
    run: Path, tmp_path: Path
) -> None:
    url = str(tmp_path / "bucket")
    faults = [None, None, failure(blobfile.RequestFailure, 403)]  # copy, stat; copy
    with pytest.raises(UserError, match="status 403"):
        Mirror(url, run, Remote(Faulty(faults))).upload(["config.json", WEIGHTS, SUMS])
    assert Mirror(url, run).names() == ["config.json"]


@pytest.mark.parametrize("name", ["../stolen.pt", "/etc/stolen.pt", "..", "a/b.pt", ""])
def test_a_name_from_elsewhere_leads_out_of_no_folder(name: str, run: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "deep" / "fresh"
    fresh.mkdir(parents=True)
    (tmp_path / "stolen.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="no plain file name"):
        Mirror(str(run), fresh).download([name])
    with pytest.raises(UserError, match="no plain file name"):
        Mirror(str(run), fresh).delete([name])
    assert (tmp_path / "stolen.pt").exists() and not list(fresh.iterdir())


# Faults -----------------------------------------------------------------------------------

PASSING = [
    failure(blobfile.RequestFailure, 0),
    failure(blobfile.RequestFailure, 429),
    failure(blobfile.RequestFailure, 503),
    failure(blobfile.ConcurrentWriteFailure, 400),
    failure(blobfile.RestartableStreamingWriteFailure, 410),
    failure(blobfile.DeadlineExceeded, 200),
    failure(blobfile.VersionMismatch, 412),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError(),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    OSError(errno.EHOSTUNREACH, "No route to host"),
]
OPERATIONS: dict[str, Callable[[Mirror], Any]] = {
    "upload": lambda mirror: mirror.upload([WEIGHTS]),
    "download": lambda mirror: mirror.download([WEIGHTS]),
    "delete": lambda mirror: mirror.delete([WEIGHTS]),
    "list": lambda mirror: mirror.names(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_six_times_with_growing_waits(
    error: Exception, operation: str, run: Path, tmp_path: Path, waits: list[float]
) -> None:
    remote = tmp_path / "bucket"
    remote.mkdir()
    (remote / WEIGHTS).write_bytes(b"remote")
    work = OPERATIONS[operation]
    # The last of six tries gets through; each try of the five others meets a fault at its start.
    work(Mirror(str(remote), run, Remote(Faulty([error] * (TRIES - 1)), waits.append)))
    assert len(waits) == TRIES - 1 == 5
    assert all(later > earlier for earlier, later in itertools.pairwise(waits))
    assert 1 <= waits[0] < 2 and 30 < waits[-1] <= 60
    waits.clear()
    with pytest.raises(UserError) as told:
        work(Mirror(str(remote), run, Remote(Faulty([error] * TRIES), waits.append)))
    message = str(told.value)
    assert message.startswith(f"cannot {operation} ") and str(remote) in message
    assert "6 tries failed, run the same command again later" in message
    assert "\n" not in message and len(waits) == TRIES - 1


@pytest.mark.parametrize("before", [0, 1, 2], ids=["find", "stat", "copy"])
def test_a_connection_lost_within_a_download_is_no_failure_to_write(
    before: int, run: Path, tmp_path: Path, waits: list[float]
) -> None:
    lost = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    faults = [*[None] * before, lost]
    path = fetch(str(run / WEIGHTS), tmp_path / "mine", Remote(Faulty(faults), waits.append))
    assert path.read_bytes() == (run / WEIGHTS).read_bytes() and len(waits) == 1


LASTING = [
    (FileNotFoundError("No such file or bucket: 'gs://bucket/x'"), "gs", "container exists"),
    (PermissionError(errno.EACCES, "Permission denied"), "gs", "Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device"), "gs", "No space left"),
    (failure(blobfile.RequestFailure, 400), "gs", "status 400; check the path"),
    (failure(blobfile.RequestFailure, 401), "gs", "gcloud auth application-default login"),
    (failure(blobfile.RequestFailure, 403), "az", "AZURE_STORAGE_KEY"),
    (failure(blobfile.RequestFailure, 600), "az", "container exists"),
    (blobfile.Error("Credentials not recognized"), "gs", "GOOGLE_APPLICATION_CREDENTIALS"),
    (blobfile.Error("Could not find any credentials\n    No Azure"), "az", "`az login`"),
    (blobfile.Error("Invalid path: 'az://x'"), "az", "az://ACCOUNT/CONTAINER"),
]


@pytest.mark.parametrize("error, scheme, advice", LASTING, ids=repr)
def test_what_will_not_pass_is_told_at_once_with_what_to_do(
    error: Exception, scheme: str, advice: str, run: Path, waits: list[float]
) -> None:
    url = f"{scheme}://bucket/container/runs"
    with pytest.raises(UserError) as told:
        Mirror(url, run, Remote(Faulty([error]), waits.append)).upload([WEIGHTS])
    message = str(told.value)
    assert f"{url}/{WEIGHTS}" in message and advice in message and "\n" not in message
    assert waits == []


@pytest.mark.parametrize("url", ["s3://bucket/ema_000001.pt", "https://example.com/ema_000001.pt"])
def test_a_storage_that_blobfile_does_not_know_is_told_at_once(
    url: str, tmp_path: Path, waits: list[float]
) -> None:
    with pytest.raises(UserError, match=r"Unrecognized path.*gs://BUCKET") as told:
        fetch(url, tmp_path, Remote(sleep=waits.append))
    assert str(told.value).startswith(f"cannot read {url}: ") and waits == []


@pytest.mark.parametrize("name", ["absent.pt", "absent/ema_000001.pt", ""])
def test_an_absent_file_is_told_at_once(
    name: str, run: Path, cache: Path, waits: list[float]
) -> None:
    with pytest.raises(UserError, match=r"cannot read .*: there is no such file; check the path"):
        fetch(f"{run}/{name}", remote=Remote(sleep=waits.append))
    assert waits == [] and not cache.exists()


def test_a_truncated_upload_is_noticed_and_repeated(
    run: Path, tmp_path: Path, waits: list[float]
) -> None:
    url = tmp_path / "bucket"
    Mirror(str(url), run, Remote(Faulty(["truncate"]), waits.append)).upload([WEIGHTS])
    assert (url / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes() and len(waits) == 1
    always = ["truncate", None] * TRIES
    with pytest.raises(UserError, match=r"cannot upload .*: 5000 bytes here, 2500 there; 6 tries"):
        Mirror(str(url), run, Remote(Faulty(always), waits.append)).upload([WEIGHTS, SUMS])
    assert not (url / SUMS).exists()


def test_a_truncated_download_never_gets_the_files_name(
    run: Path, tmp_path: Path, waits: list[float]
) -> None:
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / WEIGHTS).write_bytes(b"what was there")
    always = [None, "truncate"] * TRIES
    with pytest.raises(UserError, match=r"cannot download .*: 2500 bytes here, 5000 there"):
        Mirror(str(run), fresh, Remote(Faulty(always), waits.append)).download([WEIGHTS])
    assert [p.read_bytes() for p in fresh.iterdir()] == [b"what was there"]
    Mirror(str(run), fresh, Remote(Faulty(always[:2]), waits.append)).download([WEIGHTS])
    assert (fresh / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()


def test_a_folder_that_vanished_here_is_told_at_once(run: Path, waits: list[float]) -> None:
    with pytest.raises(UserError, match=r"cannot write .*gone.*No such file"):
        remote = Remote(sleep=waits.append)
        Mirror(str(run), run / "gone", remote).download([WEIGHTS])
    assert waits == []


def test_blobfile_is_imported_for_remote_files_only_and_missing_credentials_are_told() -> None:
    code = (
        "import sys, dbae.remote as r; print('blobfile' in sys.modules)\n"
        "try: r.fetch('gs://bucket/ema_000001.pt')\n"
        "except r.UserError as error: print(error)"
    )
    environment = {**os.environ, "GOOGLE_APPLICATION_CREDENTIALS": "/absent/key.json"}
    environment.pop("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    imported, message = done.stdout.splitlines()
    assert imported == "False"
    assert message.startswith("cannot read gs://bucket/ema_000001.pt: credentials not found")
    assert "gcloud auth application-default login" in message


# Over HTTP --------------------------------------------------------------------------------

GOOGLE = "https://storage.googleapis.com"


class Storage(ThreadingHTTPServer):
    """One bucket, `bucket`, in memory. `faults`: for a request like "PUT", what befalls it next."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.faults: dict[str, list[Any]] = {}
        self.requests: list[str] = []
        self.pool = urllib3.PoolManager()

    def request(self, method: str, url: str, **kwargs: Any) -> Any:
        """The pool's part that blobfile uses, with our address in the place of Google's."""
        assert url.startswith(GOOGLE)
        return self.pool.request(method, self.address + url.removeprefix(GOOGLE), **kwargs)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def metadata(self, name: str) -> dict[str, Any]:
        content = self.objects[name]
        digest = hashlib.md5(content).digest()
        moment = "2026-01-01T00:00:00.000000+0000"
        return {
            "name": name,
            "size": str(len(content)),
            "md5Hash": base64.b64encode(digest).decode(),
            "generation": digest.hex(),
            "updated": moment,
            "timeCreated": moment,
        }


class Answer(BaseHTTPRequestHandler):
    """Google's JSON API for storage, as far as blobfile uses it."""

    server: Storage
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        self.fault = None
        super().handle_one_request()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        elif self.fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.wfile.write(body)

    def begin(self, kind: str) -> tuple[str, dict[str, str], bytes] | None:
        """The object's name, the query and the body; None where a fault was the answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(kind)
        waiting = self.server.faults.get(kind)
        self.fault = waiting.pop(0) if waiting else None
        if self.fault == "drop":
            self.close_connection = True
            return None
        if isinstance(self.fault, int):
            self.answer(self.fault)
            return None
        path, _, query = self.path.partition("?")
        match = re.fullmatch(r"(?:/upload)?/storage/v1/b/bucket/o(?:/([^/]+))?", path)
        if match is None:
            self.answer(404)
            return None
        name = urllib.parse.unquote(match.group(1) or "")
        return name, dict(urllib.parse.parse_qsl(query)), body

    def do_GET(self) -> None:
        media = "alt=media" in self.path
        if (begun := self.begin("READ" if media else "GET")) is None:
            return
        name, query, _ = begun
        objects = self.server.objects
        if not name:
            start = query["prefix"]
            found = [self.server.metadata(n) for n in objects if n.startswith(start)]
            self.answer(200, json.dumps({"items": found} if found else {}).encode())
        elif name not in objects:
            self.answer(404)
        elif media:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.answer(206, objects[name][first : last + 1])
        else:
            self.answer(200, json.dumps(self.server.metadata(name)).encode())

    def do_POST(self) -> None:
        if (begun := self.begin("POST")) is None:
            return
        name = json.loads(begun[2])["name"]
        self.server.uploads[name] = bytearray()
        place = f"{GOOGLE}/upload/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}"
        self.answer(200, Location=place)

    def do_PUT(self) -> None:
        if (begun := self.begin("PUT")) is None:
            return
        name, _, body = begun
        extent, _, total = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
        upload = self.server.uploads[name]
        if extent != "*":
            start = int(extent.split("-")[0])
            upload[start:] = body
        if total == "*":
            return self.answer(308)
        assert len(upload) == int(total)
        self.server.objects[name] = bytes(upload)
        self.answer(200)

    def do_DELETE(self) -> None:
        if begun := self.begin("DELETE"):
            self.answer(204 if self.server.objects.pop(begun[0], None) is not None else 404)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")
    with Storage() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote_to(storage: Storage, waits: list[float]) -> Remote:
    context = blobfile_context(get_http_pool=lambda: storage, google_write_chunk_size=2**18)
    return Remote(context, waits.append)


def test_a_run_goes_to_google_storage_and_back_through_a_bad_network(
    storage: Storage, run: Path, tmp_path: Path, waits: list[float]
) -> None:
    (run / WEIGHTS).write_bytes(os.urandom(700_000))  # three pieces
    (run / "empty.csv").touch()
    names = ["config.json", "empty.csv", WEIGHTS, SUMS]
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    storage.faults = {
        "POST": ["drop", 503, 503, 503],
        "PUT": [502, "drop", None, 410],
        "GET": [500, "cut", "drop", 429],
        "READ": ["flip", "cut", "drop", 503],
        "DELETE": ["drop", 500],
    }
    url = "gs://bucket/rüns/my run"
    Mirror(url + "/", run, remote_to(storage, waits)).upload(names)
    assert set(storage.objects) == {f"rüns/my run/{name}" for name in names}
    mirror = Mirror(url, fresh, remote_to(storage, waits))
    assert mirror.names() == sorted(names)
    mirror.download(names)
    assert all((fresh / name).read_bytes() == (run / name).read_bytes() for name in names)
    mirror.delete([SUMS, "absent.pt"])
    assert mirror.names() == ["config.json", WEIGHTS, "empty.csv"]
    assert not any(storage.faults.values())
    # blobfile gives up on three faults in a row and knows of no flipped bit: then it is our turn.
    assert len(waits) == 4


def test_a_checkpoint_is_fetched_from_google_storage_once(
    storage: Storage, run: Path, cache: Path, waits: list[float]
) -> None:
    Mirror("gs://bucket/run", run, remote_to(storage, waits)).upload([WEIGHTS, SUMS])
    paths = [fetch(f"gs://bucket/run/{WEIGHTS}", remote=remote_to(storage, waits)) for _ in "12"]
    assert paths[0] == paths[1] and paths[0].read_bytes() == (run / WEIGHTS).read_bytes()
    assert {p.name for p in paths[0].parent.iterdir()} == {WEIGHTS, SUMS}
    assert storage.requests.count("READ") == 2


def test_google_storage_without_access_is_told_at_once(
    storage: Storage, run: Path, waits: list[float]
) -> None:
    for status in (401, 403):
        storage.faults = {"POST": [status]}
        with pytest.raises(UserError, match=f"cannot upload .*status {status}.*gcloud auth"):
            Mirror("gs://bucket/run", run, remote_to(storage, waits)).upload([WEIGHTS])
    with pytest.raises(UserError, match=r"No such file or bucket.*container exists"):
        Mirror("gs://misspelt/run", run, remote_to(storage, waits)).upload([WEIGHTS])
    assert waits == []


def test_a_service_that_is_down_ends_in_one_line_without_chatter(
    storage: Storage, run: Path, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()
    storage.server_address = closed
    with pytest.raises(UserError, match=r"cannot list gs://bucket/run: .*6 tries") as told:
        Mirror("gs://bucket/run", run, remote_to(storage, waits)).names()
    assert "\n" not in str(told.value) and len(waits) == TRIES - 1
    assert capfd.readouterr() == ("", "")
