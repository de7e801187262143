#!/usr/bin/env python3
"""Tests of crowdnode.py: real processes on loopback ports, real signals and sockets.

    python3 test_crowdnode.py                        all
    python3 test_crowdnode.py Work.test_a_unit_...   one

The tests stand under the names of the program's parts, and in their order.  Only the
text of commands that this machine has not got is made up.  After each test
nothing may be left: no process, no record, no directory.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import http.client
import http.server
import io
import json
import os
import plistlib
import pty
import random
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import unittest
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request
import zlib
from typing import Any, Callable, Dict, Iterator, NoReturn, Optional

import crowdnode

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "crowdnode.py")
AT_ONCE = 6  # classes of tests
DEADLINE = 20.0  # seconds that any wait may take; a busy machine needs some
MARK = f"CROWDNODE_TEST={os.getpid()}"  # in the environment of all that we start

Fields = Dict[str, str]
Answer = Callable[[str, str, Fields], Optional[int]]

# ---------------------------------------------------------------------------
# Helpers: waiting, a central that records, a node in a directory of its own.
# ---------------------------------------------------------------------------


def wait_for(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Wait until *condition* gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.01)


HAS_PROC = os.path.isdir("/proc/self")


def stat_of(pid: Any) -> tuple[str, int]:
    """State and parent of a process, as Linux tells.  Raises OSError."""
    with open(f"/proc/{pid}/stat") as file:
        state, parent = file.read().rpartition(")")[2].split()[:2]
    return state, int(parent)


def all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def alive(pid: int) -> bool:
    """Does the process live?  A zombie does not.  Not by the program's own means."""
    try:
        os.kill(pid, 0)
        return not HAS_PROC or stat_of(pid)[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def our_processes() -> list[str]:
    """What we started and is still there, zombies included."""
    found = []
    for pid in all_processes() if HAS_PROC else []:
        with contextlib.suppress(OSError):
            state, parent = stat_of(pid)
            with open(f"/proc/{pid}/environ", "rb") as file:
                is_ours = MARK.encode() in file.read().split(b"\0")
            is_zombie = state == "Z" and parent == os.getpid()
            if pid != os.getpid() and (is_ours or is_zombie):
                with open(f"/proc/{pid}/cmdline") as file:
                    found.append(f"{pid} {state} {file.read()!r}")
    return found


def has_zombie(parent: int) -> bool:
    """Has that process a child that has ended and that it has not waited for?"""
    for pid in all_processes() if HAS_PROC else []:
        with contextlib.suppress(OSError):
            if stat_of(pid) == ("Z", parent):
                return True
    return False


def a_worker_runs() -> bool:
    """A worker is a fork of the fork server, and looks like it."""
    return sum("import json, socket" in line for line in our_processes()) >= 2


def environment(**more: str) -> dict[str, str]:
    """The environment of what we start."""
    key, _, value = MARK.partition("=")
    return {**os.environ, key: value, **more}


def write_file(path: Any, data: str | bytes) -> None:
    with open(path, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())


def write_script(directory: str, name: str, text: str) -> str:
    """A program: a shell script; its path."""
    path = os.path.join(directory, name)
    write_file(path, f"#!/bin/sh\n{text}\n")
    os.chmod(path, 0o755)
    return path


def program(**constants: Any) -> list[str]:
    """The command that runs the program, with these constants other than usual."""
    code = f"import sys; sys.path.insert(0, {HERE!r}); import crowdnode; "
    for name, value in constants.items():
        code += f"crowdnode.{name} = {value!r}; "
    return [sys.executable, "-c", f"{code}sys.exit(crowdnode.main())"]


def run(command: list[Any], **options: Any) -> Any:
    """Run a command to its end."""
    usual: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    usual["timeout"] = DEADLINE
    if "input" not in options:
        usual["stdin"] = subprocess.DEVNULL
    return subprocess.run(command, **{**usual, "env": environment(), **options})


@contextlib.contextmanager
def started(command: list[Any], **options: Any) -> Iterator[Any]:
    """A process; killed at the end, so that no test that fails waits for it."""
    with subprocess.Popen(command, **{"env": environment(), **options}) as process:
        try:
            yield process
        finally:
            process.kill()


def run_program(*arguments: Any, **options: Any) -> Any:
    return run([*program(), *arguments], **options)


def serve(answer: Callable[[Any], None], port: int = 0) -> Any:
    """Start a web server in which *answer* answers each request, by its
    http.server.BaseHTTPRequestHandler."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 100

        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    return server


@contextlib.contextmanager
def web_server(answer: Callable[[Any], None]) -> Iterator[str]:
    """The URL of such a server, meanwhile."""
    with serve(answer) as server:
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


PACKED = gzip.compress(b"unpacked text")
BARE = zlib.compress(b"unpacked text")[2:-4]  # deflate without zlib's head and end
CHUNKED = {"Transfer-Encoding": "chunked", "Content-Length": "99"}
WEB: dict[str, tuple[int, dict[str, str], bytes]] = {
    "/plain.txt?x=1": (200, {}, b"plain text"),
    "/packed.txt": (200, {"Content-Encoding": "gzip"}, PACKED),
    "/moved": (302, {"Location": "/plain.txt?x=1"}, b""),
    "/moved-308": (308, {"Location": "/plain.txt?x=1"}, b""),
    "/loop": (302, {"Location": "/loop"}, b""),
    "/short": (200, {"Content-Length": "100"}, b"short"),
    "/broken.gz": (200, {"Content-Encoding": "gzip"}, PACKED[:-4]),
    "/slow.txt": (200, {}, b"slow text"),
    "/odd.gz": (200, {"Content-Encoding": "gzip"}, b"not packed at all"),
    "/members": (200, {"Content-Encoding": "gzip"}, PACKED + PACKED),
    "/x-gzip": (200, {"Content-Encoding": "x-gzip"}, PACKED),
    "/both": (200, {"Content-Encoding": "gzip, identity"}, PACKED),
    "/empty": (200, {"Content-Encoding": "gzip"}, b""),
    "/twice": (200, {"Content-Encoding": "gzip, gzip"}, gzip.compress(PACKED)),
    "/to-secret": (302, {"Location": "/secret"}, b""),
    "/deflate": (200, {"Content-Encoding": "deflate"}, zlib.compress(b"unpacked text")),
    "/bare": (200, {"Content-Encoding": "deflate"}, BARE),
    "/bare-cut": (200, {"Content-Encoding": "deflate"}, BARE[:-4]),
    "/brotli": (200, {"Content-Encoding": "br"}, b"?"),
    "/chunked": (200, CHUNKED, b"3\r\nun\x20\r\n6\r\npacked\r\n0\r\n\r\n"),
    "/early": (200, {}, b"after 103"),
    "/secret": (200, {}, b"for me"),
}


def answer_as_the_web(handler: Any) -> None:
    """What the web has: packed, moved, missing, slow, broken, silent, secret."""
    if handler.path == "/never":
        handler.rfile.read(1)  # until the other side has had enough
        return
    status, headers, body = WEB.get(handler.path, (404, {}, b""))
    if handler.path == "/early":
        handler.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    given = handler.headers.get("Authorization", "").partition(" ")[2]
    if handler.path == "/secret" and base64.b64decode(given) != b"me:p@ss":
        status = 401
    handler.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(key, value)
    handler.end_headers()
    size = 3 if handler.path == "/slow.txt" else max(1, len(body))
    for start in range(0, len(body), size):
        handler.wfile.write(body[start : start + size])
        select.select([], [], [], 0.1 if size == 3 else 0)


@contextlib.contextmanager
def no_room(pid: int) -> Iterator[None]:
    """Meanwhile that process can't write to files, as if the disk were full."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def without_room(size: int, **env: str) -> dict[str, Any]:
    """Options to start a process for which a disk is full after *size* bytes a file."""
    limit = (resource.RLIMIT_FSIZE, (size, size))
    # Before Python ignores SIGXFSZ, it compiles modules, and would write them.
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    setrlimit = resource.setrlimit
    return {"env": environment(**env), "preexec_fn": lambda: setrlimit(*limit)}


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Meanwhile that process does nothing.  It may be killed."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def modes_of(place: str) -> dict[str, int]:
    """The permissions of a directory and all in it, by path; files may vanish."""
    found = {}
    for root, _, files in os.walk(place):
        for path in (root, *(os.path.join(root, name) for name in files)):
            with contextlib.suppress(FileNotFoundError):
                found[path] = stat.S_IMODE(os.stat(path).st_mode)
    return found


def remove_tree(path: str) -> None:
    """Remove a directory, however deep, with whatever permissions below it."""
    for command in (["chmod", "-R", "u+rwx", path], ["rm", "-rf", path]):
        subprocess.run(command, stderr=subprocess.DEVNULL)


class Central:
    """A central server that writes down what it is told.

    calls: (method, path, fields), of all but GET /status.  answer: may give the status
    of a call, or hang; None: as CloudCrowd would.  seed: it is an old release."""

    def __init__(self, seed: bool = False, login: str = "") -> None:
        self.seed = seed
        self.login = login
        self.calls: list[tuple[str, str, Fields]] = []
        self.looks: list[int] = []  # for each GET /status how many calls came before
        self.answer: Answer = lambda method, path, fields: None
        self.heartbeat = b"buh-bump"
        # The pids that GET /status lists for the node, and for another one.
        self.listed: Callable[[], list[int]] = list
        self.listed_elsewhere: Callable[[], list[int]] = list
        self.port = 0
        self.held: socket.socket | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, again on the same port."""
        if self.held:
            self.held.close()
        self.server = serve(self.handle, self.port)
        self.port = self.server.server_address[1]

    def stop(self) -> None:
        """Be away: connections are refused, by nobody else who might get the port."""
        self.server.shutdown()
        self.server.server_close()
        self.held = socket.socket()
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.held.bind(("127.0.0.1", self.port))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        if self.held:
            self.held.close()

    def handle(self, handler: Any) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length).decode()
        fields = dict(urllib.parse.parse_qsl(body, keep_blank_values=True))
        if handler.path == "/status":
            self.looks.append(len(self.calls))
        else:
            self.calls.append((handler.command, handler.path, fields))
        status = self.answer(handler.command, handler.path, fields)
        if status is None:
            status = self.usual_answer(handler, fields)
        if status:
            text = self.heartbeat if handler.command == "GET" else b""
            if (handler.path, status) == ("/status", 200):
                text = self.status_text()
            handler.send_response_only(status)
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text)
        else:  # a reset
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()

    def usual_answer(self, handler: Any, fields: Fields) -> int:
        if self.login:
            right = base64.b64encode(self.login.encode()).decode()
            if handler.headers.get("Authorization") != f"Basic {right}":
                return 401
        if handler.command == "GET":
            return 200
        if handler.command == "PUT" and handler.path.startswith("/node/"):
            newer = ":" in handler.path
            if newer == self.seed or (not newer and "port" not in fields):
                return 500
            if fields.get("busy") not in ("true", "false"):
                return 500
        return 204

    def status_text(self) -> bytes:
        """GET /status, as CloudCrowd 0.7 has it."""
        paths = [path for verb, path, _ in list(self.calls) if verb == "PUT"]
        hosts = [path[len("/node/") :] for path in paths if path.startswith("/node/")]
        workers = [("other.example:9063", self.listed_elsewhere())]
        workers += [(host, self.listed()) for host in hosts[-1:]]
        nodes = [
            {"host": host, "tag": None, "workers": pids, "status": "available"}
            for host, pids in workers
        ]
        document = {"nodes": nodes, "job_count": 1, "work_unit_count": 1}
        return json.dumps(document).encode()

    def fail(self, wrong: int, prefix: str, method: str = "PUT") -> None:
        """From now on answer such calls with the status *wrong*."""
        self.answer = lambda verb, path, _: (
            wrong if verb == method and path.startswith(prefix) else None
        )

    def recover(self) -> None:
        """Answer as CloudCrowd would."""
        self.answer = lambda method, path, fields: None

    def told(self, method: str, prefix: str) -> list[Fields]:
        """The fields of all calls of that kind."""
        calls = [call for call in list(self.calls) if call[0] == method]
        return [fields for _, path, fields in calls if path.startswith(prefix)]

    def check_ins(self) -> list[Fields]:
        return self.told("PUT", "/node/")

    def reports(self, unit_id: Any) -> list[Fields]:
        place = ("PUT", f"/work/{unit_id}")
        return [call[2] for call in list(self.calls) if call[:2] == place]

    def outcome(self, unit_id: Any) -> tuple[str, Any]:
        """Wait for a unit's report: status and output."""
        report = wait_for(lambda: self.reports(unit_id), f"a report of {unit_id}")[0]
        return report["status"], json.loads(report["output"])["output"]


class NodeProcess:
    """A node in the foreground, with a state directory of its own.

    constants: what of crowdnode's constants is other than usual, intervals above all.
    settings: the configuration."""

    def __init__(
        self,
        central: Central,
        actions: dict[str, str] | None = None,
        constants: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        directory: str = "",
        **settings: Any,
    ) -> None:
        self.directory = directory or tempfile.mkdtemp(prefix="crowdnode-test-")
        self.central = central
        self.env = env or {}
        self.constants: dict[str, Any] = {
            "MONITOR_INTERVAL": 0.1,
            # A report waits so long, and its record stays for two looks after it.
            "SUCCESS_HOLD": 0.01,
            "FAILURE_HOLD": 0.02,
            "STATUS_INTERVAL": 0.1,
        }
        self.constants.update(constants or {})
        self.settings = {
            "central_server": central.url,
            "dialect": "0.5",
            "host": "127.0.0.1",
            "port": 0,
            "bind": "127.0.0.1",
            "max_workers": 50,
            "disabled_actions": "graphics_magick process_pdfs",  # whatever is installed
            "state_path": "state",
            "drain_time": 0,
            **settings,
        }
        self.write_actions(actions or {})
        self.write_config()
        self.process: subprocess.Popen[bytes] | None = None
        self.program = ""  # a copy of the program, with its constants as they are
        self.python = sys.executable

    def write_actions(self, actions: dict[str, str]) -> None:
        os.makedirs(self.path("actions"), exist_ok=True)
        for name, text in actions.items():
            path = self.path("actions", name)
            write_file(path, text)
            if not name.endswith(".py"):
                os.chmod(path, 0o755)

    def write_config(self, **settings: Any) -> None:
        self.settings.update(settings)
        sections = {key: value for key, value in self.settings.items() if " " in key}
        with open(self.path("crowdnode.conf"), "w", encoding="utf-8") as file:
            print("[node]", file=file)
            for key, value in self.settings.items():
                if key not in sections:
                    print(f"{key} = {value}", file=file)
            for key, text in sections.items():
                print(f"[{key}]\n{text}", file=file)

    def path(self, *names: str) -> str:
        return os.path.join(self.directory, *names)

    def command(self, *arguments: str) -> list[str]:
        start = [self.program] if self.program else program(**self.constants)[1:]
        config = ["--config", self.path("crowdnode.conf")]
        return [self.python, *start, *config, *arguments]

    def start(self, wait: bool = True) -> NodeProcess:
        line = "has checked in with"
        before, env = self.said(line), environment(**self.env)
        options: Any = {"cwd": self.directory, "env": env, "start_new_session": True}
        with open(self.path("log"), "ab") as log:
            options.update(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self.process = subprocess.Popen(self.command(), **options)
        if wait:
            wait_for(lambda: self.said(line) > before or self.ended(), "a start")
            if self.ended():
                raise AssertionError(f"the node did not start:\n{self.log()}")
        return self

    def run(self, *arguments: str, seconds: float = DEADLINE) -> Any:
        """Another call of the program with this configuration."""
        options: Any = {"env": environment(**self.env), "cwd": self.directory}
        return run(self.command(*arguments), timeout=seconds, **options)

    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def log(self) -> str:
        text = ""
        for path in (self.path("log"), self.path("state", "node.log")):
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    text += file.read()
        return text

    def said(self, text: str) -> int:
        """How many lines of the log hold *text*."""
        return sum(text in line for line in self.log().splitlines())

    @property
    def port(self) -> int:
        return int(self.lock_file()["port"])

    def lock_file(self) -> dict[str, Any]:
        """What node.pid says: the pid, and a JSON object."""
        with open(self.path("state", "node.pid")) as file:
            pid, _, text = file.read().partition("\n")
        return {**json.loads(text or "{}"), "pid": int(pid)}

    @property
    def pid(self) -> int:
        """Of the one in the foreground."""
        assert self.process
        return self.process.pid

    @property
    def daemon_pid(self) -> int:
        """Of the one in the background."""
        return int(self.lock_file()["pid"])

    @property
    def fork_server(self) -> int:
        """Its pid."""
        return int(
            wait_for(lambda: self.status()["fork_server"]["pid"], "a fork server")
        )

    def go_on(self, seconds: float) -> None:
        """Wait until the node has run so much longer."""
        until = self.status()["uptime_seconds"] + seconds
        wait_for(lambda: self.status()["uptime_seconds"] > until, "time goes on")

    def settled(self) -> None:
        """Wait until no unit is left."""
        wait_for(lambda: not self.units(), "no record is left")

    def work_directories(self) -> list[str]:
        """The work directories of units, and those that wait for their removal."""
        names = (("*", "unit_*"), (".trash", "*"))
        places = [self.path("state", "work", *words) for words in names]
        return [path for place in places for path in glob.glob(place)]

    def send(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send raw bytes; the answer's status, headers and body."""
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE) as connection:
            connection.sendall(data)
            return read_answer(connection)

    def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        return self.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    def post(self, unit: Any) -> tuple[int, dict[str, str], bytes]:
        return self.send(work_request(unit))

    def take(self, unit: Any) -> int:
        """Have the node take *unit*; the worker's pid."""
        status, _, body = self.post(unit)
        if status != 200:
            raise AssertionError(f"{status} {body!r}\n{self.log()}")
        return int(json.loads(body)["pid"])

    def do(self, unit: Any) -> tuple[str, Any]:
        """Have the node do *unit*; status and output of its report."""
        self.take(unit)
        return self.central.outcome(unit["id"])

    def waiter(self, id: Any = 1, **more: Any) -> dict[str, Any]:
        """A unit that lasts until let_go()."""
        return unit(id, "waiter", self.path("go"), **more)

    def let_go(self, id: Any = 1) -> tuple[str, Any]:
        """Let the units of waiter() end; the outcome of one."""
        open(self.path("go"), "w").close()
        return self.central.outcome(id)

    def put_off(self, id: Any) -> None:
        """Have the node do a unit, the report of which central does not take."""
        self.central.fail(500, f"/work/{id}")
        self.take(unit(id))
        wait_for(lambda: self.central.reports(id), "a report that is put off")

    def status(self) -> dict[str, Any]:
        status, _, body = self.get("/status")
        assert status == 200, (status, body)
        document: dict[str, Any] = json.loads(body)
        return document

    def units(self) -> list[str]:
        return os.listdir(self.path("state", "units"))

    def record(self, unit_id: Any) -> bytes:
        return crowdnode.read_file(self.path("state", "units", str(unit_id)))

    def wait(self) -> int:
        """Wait until it has ended: its exit status."""
        assert self.process
        return self.process.wait(DEADLINE)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the node alone, as the OOM killer would."""
        os.kill(self.pid, number)
        self.wait()

    def stop(self) -> None:
        """Stop it in good order; records of units may not be left."""
        if self.process and not self.ended():
            self.process.send_signal(signal.SIGCONT)
            self.kill(signal.SIGTERM)

    def destroy(self) -> None:
        """Leave nothing, whatever the test has done."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # check_leftovers kills it
            if self.process:
                self.stop()
            if os.path.exists(self.path("state", "node.pid")):  # one in the background
                self.run("--stop")
        if self.process:
            self.process.kill()
            self.process.wait()
        remove_tree(self.directory)


def unit(
    id: Any = 1, action: str = "echo", input: str = "x", **more: Any
) -> dict[str, Any]:
    """A work unit as central writes it."""
    return {
        "id": id,
        "job_id": 1,
        "input": input,
        "attempts": 0,
        "action": action,
        "options": {},
        "status": crowdnode.PROCESSING,
        **more,
    }


def work_request(unit: Any, header: str = "") -> bytes:
    """POST /work in the bytes of rest-client; wire/new-work-process.request."""
    text = unit if isinstance(unit, str) else json.dumps(unit, separators=(",", ":"))
    body = urllib.parse.urlencode({"work_unit": text}).encode()
    return (
        "POST /work HTTP/1.1\r\n"
        "Accept: */*\r\n"
        "User-Agent: rest-client/2.1.0 (linux-gnu x86_64) ruby/3.1.2p20\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n"
        "Accept-Encoding: gzip;q=1.0,deflate;q=0.6,identity;q=0.3\r\n"
        f"Host: node1.example:9063\r\n{header}\r\n"
    ).encode() + body


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read until the end of the connection."""
    data = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, body


ECHO = """
import os, sys, time
from crowdnode import Action

class Echo(Action):
    def process(self):
        return self.input
"""


def echo(code: str) -> str:
    """The module of ECHO with other code in process()."""
    return ECHO.replace("return self.input", code)


SLEEPER = """
import time
from crowdnode import Action

class Sleeper(Action):
    def process(self):
        time.sleep(float(self.input))
        return "slept"
"""

WAITER = """
import os, time
from crowdnode import Action

class Waiter(Action):
    def process(self):
        while not os.path.exists(self.input):
            time.sleep(0.01)
        return "seen"
"""

BROKEN = """
from crowdnode import Action

class Broken(Action):
    def process(self):
        raise ValueError("it broke")
"""

PIECES = """
from crowdnode import Action

class Pieces(Action):
    def split(self):
        return self.input.split()

    def process(self):
        return len(self.input)

    def merge(self):
        return self.input
"""

ACTIONS = {
    "echo.py": ECHO,
    "sleeper.py": SLEEPER,
    "waiter.py": WAITER,
    "broken.py": BROKEN,
    "pieces.py": PIECES,
}


class CrowdTest(unittest.TestCase):
    """A test, after which nothing may be left."""

    maxDiff = None

    def central(self, **options: Any) -> Central:
        central = Central(**options)
        self.addCleanup(central.close)
        return central

    def node(self, central: Central | None = None, **options: Any) -> NodeProcess:
        """A node that runs and has checked in."""
        return self.prepared(central, **options).start()

    def prepared(self, central: Central | None = None, **options: Any) -> NodeProcess:
        """A node that has not been started."""
        options.setdefault("actions", ACTIONS)
        node = NodeProcess(central or self.central(), **options)
        self.addCleanup(node.destroy)
        return node

    def succeeds(self, done: Any, output: str = "") -> None:
        """Check that a command succeeded, and printed *output* alone."""
        found = (done.returncode, done.stdout, done.stderr)
        self.assertEqual(found, (0, output, ""))

    def fails(self, done: Any, sentence: str, status: int = 1) -> Any:
        """Check that a command failed, and printed this sentence and no traceback."""
        self.assertEqual((done.returncode, done.stdout), (status, ""), done.stderr)
        self.assertIn(sentence, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done

    def on_terminal(self, *command: str, **env: str) -> str:
        """What *command* writes to a terminal."""
        master, terminal = pty.openpty()
        options: Any = {"stdin": subprocess.DEVNULL, "env": environment(**env)}
        with started([*command], stdout=terminal, stderr=terminal, **options):
            os.close(terminal)
            return read_terminal(master)

    def daemon(self, **options: Any) -> NodeProcess:
        """A node in the background."""
        node = self.prepared(**options)
        self.succeeds(node.run("--daemon"))
        return node

    def job(self, *arguments: Any, path: str = "", **options: Any) -> Any:
        """Run the program in an empty environment; *path*: before the usual PATH."""
        home = options.pop("home", "") or self.directory()
        env = {"PATH": f"{path}/usr/bin:/bin", "HOME": home, "TMPDIR": home}
        kept = ("CROWDNODE_TEST", "PYTHONPYCACHEPREFIX")
        env.update({key: text for key, text in environment().items() if key in kept})
        options.setdefault("cwd", HERE)
        return run_program(*arguments, env=env, **options)

    def main(self, *arguments: str) -> Any:
        """The same in this process, of a command that starts no other."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(HERE)
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                status: Any = crowdnode.main(list(arguments))
            except SystemExit as error:
                status = error.code
        texts = (out.getvalue(), errors.getvalue())
        return subprocess.CompletedProcess(arguments, status, *texts)

    @contextlib.contextmanager
    def started_job(self, *arguments: str) -> Iterator[Any]:
        """A job of --run of which a worker runs, and its TMPDIR."""
        directory, command = self.directory(), [sys.executable, PROGRAM, *arguments]
        options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options["env"] = environment(TMPDIR=directory)
        with started(command, **options) as process:
            wait_for(a_worker_runs, "a worker runs")
            yield process, directory

    def with_actions(self, **actions: str) -> list[str]:
        """The arguments to use these actions."""
        directory = self.directory()
        for name, text in actions.items():
            write_file(os.path.join(directory, f"{name}.py"), text)
        return ["--set", f"actions_path={directory}"]

    def programs(self, **texts: str) -> str:
        """A directory with programs, shell scripts, for PATH; last: the last argument
        of each."""
        directory = self.directory()
        for name, text in texts.items():
            write_script(directory, name, f"for last do :; done\n{text}")
        return f"{directory}:"

    def fake_uptime(self, script: str) -> dict[str, str]:
        """An environment in which ``uptime`` is this shell script."""
        directory = self.directory()
        write_script(directory, "uptime", script)
        return {"PATH": f"{directory}:{os.environ['PATH']}", "D": directory}

    def directory(self) -> str:
        path = tempfile.mkdtemp(prefix="crowdnode-test-")
        self.addCleanup(remove_tree, path)
        return path

    def run(self, result: unittest.TestResult | None = None) -> Any:
        outcome = super().run(result)
        if result is not None:
            check_leftovers(self, result)
        return outcome


def read_terminal(master: int) -> str:
    """All that is written to the other side, until it closes."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO: it has closed
        while select.select([master], [], [], DEADLINE)[0]:
            shown += os.read(master, 65536)
    os.close(master)
    return shown.decode()


def check_leftovers(test: unittest.TestCase, result: unittest.TestResult) -> None:
    """Whatever is left fails the test, and is ended, so that the next one is not it."""
    try:
        wait_for(lambda: not our_processes(), "no process is left")
    except AssertionError:
        left = our_processes()
        for line in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        try:
            raise AssertionError(f"left running: {left}")
        except AssertionError:
            result.addFailure(test, sys.exc_info())


def idle_node() -> Any:
    """A node in this process that does nothing by itself."""
    mock = unittest.mock.Mock()
    return crowdnode.Node(crowdnode.load_config("", []), 9063, mock, mock, mock, False)


class SharedNode(CrowdTest):
    """Tests that one node and one central serve, and do not disturb."""

    options: dict[str, Any] = {}
    shared_central: Central
    shared: NodeProcess
    next_id = 0

    @classmethod
    def setUpClass(cls) -> None:
        cls.addClassCleanup(wait_for, lambda: not our_processes(), "no process is left")
        cls.shared_central = Central(seed=cls.options.get("dialect") == "seed")
        cls.addClassCleanup(cls.shared_central.close)
        options = {"actions": ACTIONS, **cls.options}
        cls.shared = NodeProcess(cls.shared_central, **options)
        cls.addClassCleanup(cls.shared.destroy)
        cls.shared.start()

    def run(self, result: unittest.TestResult | None = None) -> Any:
        return unittest.TestCase.run(self, result)

    def tearDown(self) -> None:
        self.shared.settled()
        wait_for(lambda: not self.shared.work_directories(), "no directory is left")

    @classmethod
    def new_id(cls) -> int:
        SharedNode.next_id += 1
        return SharedNode.next_id


# ---------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------

# Lines of [node], each with what is said of it.
WRONG_VALUES = """
port = 99999: must be a whole number from 0 to
max_load = -1: must be a number from 0.01
http_authentication = si: must be yes or no
http_authentication = yes: needs login and password too
login = a:b: must not hold a colon
dialect = new: must be auto or seed or 0.5
allow = 10.1.2.3/8: must be addresses or
bind = example.org: must be an IP address
host = a/b: must be a host name
central_server = central:9173: must be a URL such as http://
central_server = http://a:b@c: must not hold a password
storage = cloudfiles: must be filesystem
storage = s3: needs s3_bucket too
time_limit = 0: must be a number from 0.1
time_limit = 10x: must be a number from 0.1
memory_limit = 5m: must be a number from 1 to 1000000 MB, such as 500M or 2G
s3_bucket = a/b: must be 3 to 63 letters
aws_access_key = a b: must be ASCII without blanks
state_path = ~nobody-at-all/x: there is no such home directory
"""
WRONG_FILES = [
    ("[node]\n" + line.partition(": ")[0], f"[node] {line}")
    for line in WRONG_VALUES.strip().splitlines()
] + [
    ("[node]\nprot = 1", "[node] prot: unknown key: did you mean port?"),
    ("[node]\nzzz = 1", "[node] zzz: unknown key: known are central_server"),
    ("[nod]\nport = 1", "[nod]: unknown section: did you mean node?"),
    ("[action ../x]\n", "[action ../x]: unknown section"),
    ("port = 1", "not an INI file"),
    ("[node]\nport = 1\nport = 2", "[node] port: appears twice"),
    ("[node]\n[node]", "[node] appears twice"),
    ("[action x]\nstages = map", "[action x] stages = map: must be process"),
    ("[action x]\nport = 1", "[action x] port: unknown key: known are stages"),
    ("[node]\ntag = a\n  b", "[node] tag: must be a single line"),
    ("\ufeff[node]\nmax_workers = \u0663", "[node] max_workers = \u0663: must"),
]


class Configuration(CrowdTest):
    def test_an_error_names_file_section_key_value_and_remedy(self) -> None:
        path = os.path.join(self.directory(), "wrong.conf")
        for text, message in WRONG_FILES:
            with self.subTest(text):
                write_file(path, text)
                with self.assertRaises(crowdnode.UsageError) as caught:
                    crowdnode.load_config(path, [])
                self.assertIn(f"{path}: {message}", str(caught.exception))
        done = run_program("--config", path, "--check")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertEqual(done.stderr, f"crowdnode: {caught.exception}\n")

    def test_the_sample_file_has_every_key_at_its_default(self) -> None:
        sample = os.path.join(HERE, "crowdnode.conf")
        with open(sample, encoding="utf-8") as file:
            text, _, actions = file.read().partition("#[action ")
        found = re.findall(r"(?m)^#([a-z0-9_]+) = ?(.*)$", text)
        defaults = [(key, value) for key, (value, _) in crowdnode.NODE_KEYS.items()]
        self.assertEqual(found, defaults)
        self.assertEqual(set(crowdnode.STORAGES), set(crowdnode.STORES))
        in_actions = set(re.findall(r"(?m)^#([a-z_]+) = ", actions))
        self.assertEqual(in_actions, set(crowdnode.ACTION_KEYS))
        self.assertEqual(crowdnode.load_config(sample, []).port, crowdnode.DEFAULT_PORT)

    def test_paths_start_at_the_file_and_times_and_sizes_have_units(self) -> None:
        base = self.directory()
        path = os.path.join(base, "crowdnode.conf")
        with open(path, "w") as file:
            file.write("[node]\nstate_path = s\nactions_path = a\n")
            file.write("[action x]\nstages = process merge\ntime_limit = 1.5m\n")
        os.mkdir(os.path.join(base, "a"))
        settings = [("drain_time", "2h"), ("memory_limit", "2G"), ("file_limit", "1.5")]
        settings += [("time_limit", "1d"), ("min_free_memory", "500M")]
        config = crowdnode.load_config(path, settings)
        keys = ("drain_time", "memory_limit", "file_limit", "time_limit")
        values = [getattr(config, key) for key in (*keys, "min_free_memory")]
        self.assertEqual(values, [7200, 2048, 1.5, 86400, 500])
        self.assertEqual(config.limit("x", "time_limit"), 90)
        self.assertEqual(config.actions_path, os.path.join(base, "a"))
        self.assertEqual(config.temp_storage_path, os.path.join(base, "s", "work"))
        done = run_program("--check", cwd=base)
        self.assertIn(f"ok: configuration: {path}", done.stdout)


# ---------------------------------------------------------------------------
# Unit records
# ---------------------------------------------------------------------------


def record_text(id: Any, *lines: str, **more: Any) -> bytes:
    """A unit's record with these lines after its head."""
    head = {"id": id, "job_id": 1, "action": "echo", "stage": "process", "attempts": 0}
    head.update({"digest": "d", "started": 1.0, **more})
    return "\n".join([f"crowdnode-unit 1 {json.dumps(head)}", *lines, ""]).encode()


class Records(CrowdTest):
    def test_only_whole_and_valid_lines_count(self) -> None:
        good = 'succeeded 0.1 {"output":"x"}'
        for line, status, withdrawn in (
            (good, "succeeded", False),
            (f"nonsense\npid x y\n{good}", "succeeded", False),
            ('succeeded 0.1 {"output":"xwithdrawn', None, True),
            ('succeeded 0.1 {"output":"x', None, False),
            ('succeeded 0.1 {"output":x}', None, False),
            ('succeeded 0.1 {"output":NaN}', None, False),
            ('succeeded 0.1 {"output":1,"more":2}', None, False),
            ('failed x {"output":"x"}', None, False),
            ("failed 0.1 {}", None, False),
        ):
            record = crowdnode.Record(record_text(4, "pid 9 1.5", line))
            self.assertEqual((record.pid, record.started), (9, 1.5), line)
            outcome = record.outcome and record.outcome.status
            self.assertEqual((outcome, record.withdrawn), (status, withdrawn), line)
        cut = crowdnode.Record(record_text(4, "pid 9 1.5", good)[:-1])
        self.assertEqual((cut.pid, cut.outcome), (9, None))

    def test_odd_records_and_directories_do_not_stop_the_start(self) -> None:
        """What can't be used is moved aside; a unit that was not answered, or is of an
        earlier boot and has no outcome, is dropped."""
        node = self.prepared()
        units, stale = node.path("state", "units"), node.path("state/work/echo/unit_9")
        os.makedirs(os.path.join(units, "4.out"))  # can't be removed as a file
        os.makedirs(os.path.join(stale, "deep"))
        os.chmod(os.path.join(stale, "deep"), 0)
        pid, found = "pid 999999 1.0", 'succeeded 1.5 {"output":"found"}'
        for name, data in (
            ("2", record_text(2)[:40]),
            ("3", record_text(3)),
            ("4", record_text(4, pid, found)),
            ("6", b"crowdnode-unit 1 [nonsense]\n"),
            ("7", b"crowdnode-unit 99 \xff of the future\n"),
            ("8", record_text(8, pid, "withdrawn")),
            ("10", record_text(4, pid)),
            ("11", b"crowdnode-unit 1 {}\n"),
            ("12", record_text(12, pid, boot_id="another")),
            ("13", record_text(13, stage="dream")),
            ("14.out", b"of a unit that is not there"),
            ("15", record_text(15, pid, found, boot_id="another")),
        ):
            write_file(os.path.join(units, name), data)
        os.mkdir(os.path.join(units, "9"))
        node.start()
        for name in ("4", "15"):
            self.assertEqual(node.central.outcome(name), ("succeeded", "found"))
            self.assertEqual(node.central.reports(name)[0]["time"], "1.5")
        os.rmdir(os.path.join(units, "4.out"))
        odd = [f"{number}.odd" for number in (10, 11, 13, 6, 7, 9)]
        wait_for(lambda: sorted(node.units()) == odd, "the rest is settled")
        wait_for(lambda: not node.work_directories(), "no work directory is left")
        reported = [path for _, path, _ in node.central.calls if "/work/" in path]
        self.assertEqual(sorted(reported), ["/work/15", "/work/4"])


# ---------------------------------------------------------------------------
# Asset stores
# ---------------------------------------------------------------------------

# An action that executes the Python code in its option ``code``.
CODE = """
import contextlib, errno, os, shutil, signal, sys, threading, time
from crowdnode import Action

def leave_a_daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 100)
            time.sleep(600)
        os._exit(0)
    os.wait()

def fork_without_end():
    worker, tokens = os.getpid(), os.open("tokens", os.O_RDWR | os.O_CREAT)
    os.pwrite(tokens, bytes(200), 0)
    while os.read(tokens, 1):
        if os.fork() == 0:
            os.setsid()
    if os.getpid() != worker:
        time.sleep(600)

class Coded(Action):
    def process(self):
        scope = {**globals(), "self": self, "result": None}
        exec(self.options["code"], scope)
        return scope["result"]
"""


def coded(id: Any, code: str, input: str = "x", **options: Any) -> dict[str, Any]:
    """A unit of which the action ``coded`` executes *code*."""
    return unit(id, "coded", input, options={"code": code, **options})


class Bucket(CrowdTest):
    def setUp(self) -> None:
        self.calls: list[tuple[str, str, Any, bytes]] = []
        self.answers: list[tuple[int, str]] = []  # its first answers
        server = web_server(self.answer)
        self.url = server.__enter__()
        self.addCleanup(server.__exit__, None, None, None)

    def answer(self, handler: Any) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.calls.append((handler.command, handler.path, handler.headers, body))
        status, code = self.answers.pop(0) if self.answers else (200, "")
        text = f"<Error><Code>{code}</Code></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def settings(self, **more: str) -> dict[str, Any]:
        keys = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
        settings = dict(zip(("aws_access_key", "aws_secret_key"), keys))
        settings.update(storage="s3", s3_bucket="the-bucket", s3_endpoint=self.url)
        return {**settings, **more}

    def store(self, **more: str) -> Any:
        config = crowdnode.load_config("", list(self.settings(**more).items()))
        return crowdnode.S3Store(config)

    def test_files_are_public_or_behind_links_and_errors_are_retried(self) -> None:
        calls = self.calls
        options = {"actions": {"coded.py": CODE}, "constants": {"S3_WAITS": (0,)}}
        node = self.node(None, **options, **self.settings())
        self.assertEqual(calls[0][:2], ("GET", "/the-bucket?list-type=2&max-keys=0"))
        save = "open('a +b%.txt', 'w').write('saved'); result = self.save('a +b%.txt')"
        status, saved = node.do(coded(1, save))
        path = "/the-bucket/coded/job_1/unit_1/a%20%2Bb%25.txt"
        self.assertEqual((status, saved), ("succeeded", self.url + path))
        method, where, headers, body = calls[-1]
        self.assertEqual((method, where, body), ("PUT", path, b"saved"))
        self.assertEqual(headers["x-amz-acl"], "public-read")
        self.answers = [(503, "SlowDown")]
        self.assertEqual(node.do(coded(2, save))[0], "succeeded")
        self.answers = [(403, "SignatureDoesNotMatch")]
        status, output = node.do(coded(3, save))
        self.assertEqual(status, "failed")
        self.assertIn("aws_secret_key: S3 answered 403 SignatureDoesNotMatch", output)
        self.assertNotIn("wJalr", output + node.log())
        node.write_config(s3_authentication="yes")
        self.answers = [(403, "InvalidAccessKeyId")]
        os.kill(node.pid, signal.SIGHUP)
        wait_for(lambda: node.said("error: storage = s3: can't be used"), "a reload")
        status, saved = node.do(coded(4, save))
        self.assertNotIn("x-amz-acl", calls[-1][2])
        for field in ("Expires=86400", "SignedHeaders=host", r"Signature=\w{64}$"):
            self.assertRegex(saved, rf"\.txt\?.*X-Amz-{field}")

    def test_signatures_are_those_of_amazons_examples(self) -> None:
        store = self.store(s3_endpoint="")
        self.assertEqual(store.base, "https://the-bucket.s3.us-east-1.amazonaws.com")
        now, host = "20130524T000000Z", "examplebucket.s3.amazonaws.com"
        empty, sign = hashlib.sha256().hexdigest(), store._signature
        headers = {"host": host, "x-amz-content-sha256": empty, "x-amz-date": now}
        found = sign("GET", "/", "max-keys=2&prefix=J", headers, empty, now)
        wanted = "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        self.assertEqual(found, wanted)
        query = (
            "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F"
            "20130524%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=20130524T000000Z"
            "&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
        )
        payload = {"host": host}, "UNSIGNED-PAYLOAD", now
        wanted = "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
        self.assertEqual(sign("GET", "/test.txt", query, *payload), wanted)

    def test_the_schemes_own_port_is_neither_sent_nor_signed(self) -> None:
        """The server of the tests is a proxy here, to which the endpoint is a name."""
        store = self.store(s3_endpoint="https://s3.example:443")
        self.assertEqual(store.base, "https://s3.example")
        path = os.path.join(self.directory(), "file")
        open(path, "w").close()
        proxy = {"http_proxy": self.url, "no_proxy": ""}
        with unittest.mock.patch.dict(os.environ, proxy):
            store = self.store(s3_endpoint="http://s3.example:80")
            self.assertEqual(store.save(path, "x"), "http://s3.example/the-bucket/x")
        ((_, url, headers, _),) = self.calls
        self.assertEqual(url, "http://s3.example/the-bucket/x")
        self.assertEqual(headers["host"], "s3.example")
        names, signature = re.findall(r"=([^=,]+)(?:,|$)", headers["authorization"])[1:]
        signed = {name: headers[name] for name in names.split(";")}
        digest, now = signed["x-amz-content-sha256"], signed["x-amz-date"]
        again = store._signature("PUT", "/the-bucket/x", "", signed, digest, now)
        self.assertEqual(signature, again)

    def test_an_error_names_the_key_to_look_at(self) -> None:
        hasty = {"S3_WAITS": (0,)}
        for code, message in (
            ("NoSuchBucket", "s3_bucket = the-bucket: S3 answered 404 NoSuchBucket"),
            ("InvalidAccessKeyId", "aws_access_key = AKIAIOSFODNN7EXAMPLE: "),
        ):
            self.answers = [(404, code)]
            self.fails(self.prepared(constants=hasty, **self.settings()).run(), message)
        self.answers = [(301, "PermanentRedirect")]
        done = self.prepared(**self.settings()).run("--check")
        self.assertIn("s3_region = us-east-1: S3 answered 301", done.stdout)
        away = self.settings(s3_endpoint="http://127.0.0.1:1")
        done = self.prepared(constants=hasty, **away).run("--check")
        self.assertIn("s3_endpoint = http://127.0.0.1:1: ", done.stdout)
        self.assertNotIn("Traceback", done.stderr)
        path = os.path.join(self.directory(), "large")
        with open(path, "wb") as file:
            file.truncate(crowdnode.S3_LIMIT + 1)
        with self.assertRaisesRegex(OSError, "S3 takes 5 GB at once"):
            self.store().save(path, "x")


# ---------------------------------------------------------------------------
# Actions
# ---------------------------------------------------------------------------

SHELL = """#!/bin/sh
# An action in shell: the stage is the argument, JSON comes on standard input.
case "$(cat)" in
*'"fail"'*) echo "first line" >&2; echo "it broke" >&2; exit 3 ;;
*'"text"'*) echo "plain text"; echo "of two lines" ;;
*'"bytes"'*) printf '\\377' ;;
*'"die"'*) kill -9 $$ ;;
*) printf '["%s"' "$1"; printf ', "%s"' "$(pwd)" "$CROWDNODE_STAGE" \\
    "$CROWDNODE_INPUT" "$CROWDNODE_INPUT_PATH" "$CROWDNODE_FILE_NAME"; echo "]"
esac
"""
FETCH = """
name = os.path.basename(self.input_path)
result = [name, self.file_name, open(name, "rb").read().decode()]
"""
FILE_NAMES = """
a.txt=a.txt a/b/=b =h.example .hidden=-hidden x%2Fy.txt=x-y.txt a.tar.gz=a-tar.gz
a--b___c.txt=a-b___c.txt a.txt#frag=a-txt-frag.txt#frag %3F.txt=-.txt a%2Etxt=a-txt
a.txt?x=1?y=2=a.txt %2E%2E=-- ..=--
"""


SPAWNING = """
import multiprocessing
from crowdnode import Action

def double(number):
    return 2 * number

class Spawning(Action):
    def process(self):
        with multiprocessing.get_context(self.input).Pool(1) as pool:
            return pool.map(double, [1, 2])
"""


class CodeNode(SharedNode):
    """A node that has the action ``coded``, and odd ones."""

    options = {
        "actions": {
            **ACTIONS,
            "coded.py": CODE,
            "shell.sh": SHELL,
            "email.py": ECHO,
            "spawning.py": SPAWNING,
        },
        "action coded": "nice = 7",
        "action sleeper": "time_limit = 1",
        "action shell": "stages = split process merge",
        "local_storage_path": "storage",
        "dialect": "seed",
        "max_request_size": 1,
    }

    def do(self, *code: str, **options: Any) -> tuple[str, Any]:
        """The outcome of a unit that executes some code."""
        return self.shared.do(coded(self.new_id(), *code, **options))

    def outcome(self, action: str, input: str = "x", **more: Any) -> tuple[str, Any]:
        """The outcome of another unit."""
        return self.shared.do(unit(self.new_id(), action, input, **more))

    def failed(self, outcome: tuple[str, Any], reason: str) -> None:
        """Check the reason of a failure."""
        self.assertIn(reason, outcome[1])
        self.assertEqual(outcome[0], "failed")


class Actions(CodeNode):
    def test_an_action_knows_its_input_and_options(self) -> None:
        code = "result = [self.input, self.input_path, self.file_name, self.options]"
        status, known = self.do(code, k=[1])
        ids = {"job_id": 1, "work_unit_id": self.next_id, "attempts": 0}
        options = {"k": [1], "code": code, **ids}
        self.assertEqual((status, known), ("succeeded", ["x", None, None, options]))

    def test_inputs_are_parsed_where_they_are_json_objects_or_lists(self) -> None:
        for text, wanted in (
            ("[1.0,1e3]\n", [1.0, 1000.0]),
            ('{"json_class":"String"}', {"json_class": "String"}),
            *((text, text) for text in ("[1,2", " [1]", "null", "[NaN]", "[1e999]")),
            *((text, text) for text in ("na\u00efve \u2603", "mailto:x", "12:30", "")),
            ("[" * 5000, "[" * 5000),
            ("http://x/na\u00efve", "http://x/na\u00efve"),
            ("file:///srv/a b.txt", "file:///srv/a b.txt"),
        ):
            self.assertEqual(self.outcome("echo", text), ("succeeded", wanted))

    def test_a_file_is_copied_under_a_safe_name(self) -> None:
        for name, saved in (("a b.txt", "a-b.txt"), ("x.tar.gz", "x-tar.gz")):
            path = self.shared.path(name)
            write_file(path, name)
            outcome = self.do(FETCH, crowdnode.file_url(path))
            stem = saved.rpartition(".")[0]
            self.assertEqual(outcome, ("succeeded", [saved, stem, name]))
        for url in ("file:///no/such/file", "file:///dev/zero", "file:///"):
            self.failed(self.do(FETCH, url), f"can't download {url}: ")

    def test_file_names_are_those_of_the_real_action(self) -> None:
        for pair in FILE_NAMES.split():
            url, _, name = pair.rpartition("=")
            found = crowdnode.safe_file_name(f"http://h.example/{url}")
            self.assertEqual(found, name, url)
        long = "http://h/" + "x" * 5000 + "." + "y" * 5000
        for url in ("http://", "http://?x", long, "?", "/", "."):
            name = crowdnode.safe_file_name(url)
            self.assertTrue(0 < len(name) < 255 and "/" not in name, name)
            self.assertNotIn(name, (".", ".."))

    def test_a_download_is_unpacked_and_fails_when_it_is_cut_short(self) -> None:
        with web_server(answer_as_the_web) as base:
            for path, wanted in (
                ("/plain.txt?x=1", ["plain.txt", "plain", "plain text"]),
                ("/packed.txt", ["packed.txt", "packed", "unpacked text"]),
                ("/moved", ["moved", "moved", "plain text"]),
                ("/moved-308", ["moved-308", "moved-308", "plain text"]),
                ("/slow.txt", ["slow.txt", "slow", "slow text"]),
                ("/members", ["members", "members", 2 * "unpacked text"]),
                ("/x-gzip", ["x-gzip", "x-gzip", "unpacked text"]),
                ("/both", ["both", "both", "unpacked text"]),
                ("/empty", ["empty", "empty", ""]),
                ("/deflate", ["deflate", "deflate", "unpacked text"]),
                ("/bare", ["bare", "bare", "unpacked text"]),
                ("/chunked", ["chunked", "chunked", "un packed"]),
                ("/early", ["early", "early", "after 103"]),
            ):
                outcome = self.do(FETCH, base + path)
                self.assertEqual(outcome, ("succeeded", wanted))
            for path, reason in (
                ("/missing", "HTTP Error 404"),
                ("/short", "it is cut short: 95 bytes are missing"),
                ("/broken.gz", "Compressed file ended before the end-of-stream"),
                ("/bare-cut", "the compressed file is cut short"),
                ("/odd.gz", "Not a gzipped file"),
                ("/brotli", "it is sent with Content-Encoding: br"),
                ("/twice", "it is sent with Content-Encoding: gzip, gzip"),
                ("/loop", "HTTP Error 302"),
            ):
                outcome = self.do(FETCH, base + path)
                self.failed(outcome, f"can't download {base}{path}: {reason}")
            own = base.replace("//", "//me:p%40ss@")
            wanted = ["secret", "secret", "for me"]
            self.assertEqual(self.do(FETCH, f"{own}/secret"), ("succeeded", wanted))
            wanted = ["to-secret", "to-secret", "for me"]
            self.assertEqual(self.do(FETCH, f"{own}/to-secret"), ("succeeded", wanted))
            outcome = self.do(FETCH, f"{own}/missing?token=p%40ss")
            self.failed(outcome, f"can't download {base}/missing: HTTP Error 404")
            self.outcome("echo", "s3://bucket/doc.pdf?key=p%40ss")
            self.assertNotIn("p%40ss", self.shared.log() + str(self.shared.status()))
            outcome = self.outcome("sleeper", f"{base}/never")
            self.assertEqual(outcome, ("failed", "time_limit of 1 s exceeded"))

    def test_an_output_is_what_json_has_and_central_takes(self) -> None:
        several = [1, -2.5, 1e300, True, None, "\u2603", "\0"]
        wanted = {"a": several, "b": {}, "c": []}
        self.assertEqual(self.do(f"result = {wanted!r}"), ("succeeded", wanted))
        for code, reason in (
            ("{1}", "the output is not JSON: Object of type set"),
            ("float('nan')", "the output is not JSON: Out of range"),
            ("b'x'", "the output is not JSON: Object of type bytes"),
            (r"'\ud800'", "the output is not JSON: 'utf-8' codec can't encode"),
            ("[]; result.append(result)", "the output is not JSON: Circular"),
            ("'x' * 2**21", "the output has 2.0 MB; max_request_size is 1 MB"),
        ):
            self.failed(self.do(f"result = {code}"), reason)

    def test_save_keeps_a_file_and_returns_its_url(self) -> None:
        save = "open('a b', 'w').write('saved'); result = self.save('a b')"
        status, url = self.do(save)
        path = self.shared.path("storage", "coded", "job_1", f"unit_{self.next_id}")
        self.assertEqual((status, url), ("succeeded", f"file://{path}/a%20b"))
        self.assertEqual(crowdnode.read_file(crowdnode.local_path(url)), b"saved")

    def test_an_action_with_the_name_of_a_module_of_pythons_hides_nothing(self) -> None:
        with web_server(answer_as_the_web) as base:  # "urllib.request" needs "email"
            outcome = self.do(FETCH, f"{base}/packed.txt")
        wanted = ["packed.txt", "packed", "unpacked text"]
        self.assertEqual(outcome, ("succeeded", wanted))
        self.assertEqual(self.outcome("email"), ("succeeded", "x"))

    def test_processes_that_an_action_spawns_find_its_functions(self) -> None:
        for method in ("spawn", "forkserver"):
            outcome = self.outcome("spawning", method)
            self.assertEqual(outcome, ("succeeded", [2, 4]))

    def test_a_program_gets_its_input_as_json_and_in_the_environment(self) -> None:
        path = self.shared.path("page one.txt")
        open(path, "w").close()
        url = crowdnode.file_url(path)
        for input, *wanted in (
            ("x", "x", "", ""),
            ("[1, 2]", "[1,2]", "", ""),
            (url, url, "PLACE/page-one.txt", "page-one"),
            ("x" * 150_000, "", "", ""),  # more than execve can pass
        ):
            for stage, name in crowdnode.STAGES.items():
                with self.subTest(input[:80], stage=name):
                    status, found = self.outcome("shell", input, status=stage)
                    place = self.shared.path(f"state/work/shell/unit_{self.next_id}")
                    self.assertEqual(found[:3], [name, place, name])
                    found = [item.replace(place, "PLACE") for item in found[3:]]
                    self.assertEqual((status, found), ("succeeded", wanted))

    def test_what_a_program_prints_is_its_result_or_why_it_failed(self) -> None:
        text = "plain text\nof two lines"
        self.assertEqual(self.outcome("shell", "text"), ("succeeded", text))
        for outcome, reason in (
            (self.outcome("shell", "text", status=4), "split must return a list, not"),
            (self.outcome("shell", "fail"), "first line\nit broke (exit status 3)"),
            (self.outcome("shell", "die"), "shell.sh (killed by SIGKILL; perhaps the"),
            (self.outcome("shell", "bytes"), "standard output is not UTF-8"),
        ):
            self.failed(outcome, reason)


THREAD = "import threading, time\n"
THREAD += "threading.Thread(target=time.sleep, args=[99], daemon=True).start()\n"
IDLE = "from crowdnode import Action\nclass Idle(Action): pass\n"
NONE = "it must define one subclass of Action; it defines"
LEFT_OUT = {  # actions, each with the reason
    "syntax.py": ("def x(:", "SyntaxError: "),
    "missing.py": ("import nosuch", "ModuleNotFoundError: No module named 'nosuch"),
    "none.py": ("x = 1", NONE),
    "two.py": (ECHO + "class Other(Action):\n    def process(self): pass\n", NONE),
    "idle.py": (IDLE, "its class Idle must define process"),
    "leaves.py": ("exit(3)", "SystemExit: 3 (leaves.py, line 1, in <module>)"),
    "twice.sh": ("#!/bin/sh\necho from shell", ""),
    "bad-name.py": (ECHO, "its name must be letters"),
    "given.py": (ECHO.replace("(self)", "(self, input)"),
                 "process(self, input) must be process(self): the"),
    "selfless.py": (ECHO.replace("(self)", "()"),
                    "process() must be process(self)"),
    "bare.sh": ("echo no first line", "it needs a first line such as #!/bin/sh"),
    "lost.sh": ("#!/no/such/program -x\n", "its interpreter /no/such/program does not"),
    "windows.sh": ("#!/bin/sh\r\necho\r\n",
                   "its first line, '/bin/sh\\r', ends as Windows writes it: sed -i"),
}  # fmt: skip


class Loading(CrowdTest):
    def test_what_does_not_load_is_left_out_and_the_node_starts(self) -> None:
        actions = {name: text for name, (text, _) in LEFT_OUT.items()}
        actions["twice.py"] = f"print('loading'){ECHO}"
        actions["_helper.py"] = "raise RuntimeError('helpers are not loaded')"
        actions["threaded.py"] = f"{THREAD}{ECHO}"
        wrapped = ECHO.replace("    def", "    @same\n    def")
        actions["wrapped.py"] = f"def same(f): return lambda *a: f(*a)\n{wrapped}"
        static = ECHO.replace(
            "    def process(self", "    @staticmethod\n    def process("
        )
        actions["static.py"] = static
        actions["tab.sh"] = "#!/bin/sh\t-e\necho tab"
        node = self.node(actions=actions)
        names = ["static", "tab", "threaded", "twice", "word_count", "wrapped"]
        self.assertEqual(node.status()["actions"], names)
        for name, (_, reason) in LEFT_OUT.items():
            line = f"error: {node.path('actions', name)} is left out: {reason}"
            self.assertEqual(node.said(line), 1, line)
        self.assertEqual(node.said(" fork server output: loading"), 1)
        self.assertEqual(node.do(unit(action="threaded")), ("succeeded", "x"))
        self.assertNotIn("DeprecationWarning", node.log())
        node.write_actions({"forgotten.sh": "#!/bin/sh\n"})
        os.chmod(node.path("actions", "forgotten.sh"), 0o600)
        node.run("--reload")
        hint = "forgotten.sh is left out: not executable (chmod +x)"
        wait_for(lambda: node.said(hint), "a hint")

    def test_actions_can_be_disabled_replaced_and_share_a_helper(self) -> None:
        replaced = ECHO.replace("self.input", "answer")
        helped = {"word_count.py": f"from _helper import answer\n{replaced}"}
        options: dict[str, Any] = {"action absent": "nice = 1"}
        options["disabled_actions"] = "broken, nosuch, graphics_magick, process_pdfs"
        options["actions"] = {**ACTIONS, "_helper.py": "answer = 42", **helped}
        node = self.node(**options)
        actions = ["echo", "pieces", "sleeper", "waiter", "word_count"]
        self.assertEqual(node.status()["actions"], actions)
        self.assertEqual(node.do(unit(action="word_count")), ("succeeded", 42))
        replaces = "word_count.py replaces the built-in action word_count"
        self.assertEqual(node.said(replaces), 1)
        self.assertEqual(node.said("disabled_actions: there is no action nosuch"), 1)
        self.assertEqual(node.said("[action absent]: there is no action absent"), 1)
        self.assertIn("no action named broken", node.do(unit(2, "broken"))[1])
        node = self.node(disable_default_actions="yes")
        self.assertNotIn("word_count", node.status()["actions"])

    def test_modules_that_do_not_load_in_time_end_the_start(self) -> None:
        slow = f"import time; time.sleep(60)\n{ECHO}"
        options = {"actions": {"slow.py": slow}, "constants": {"LOAD_DEADLINE": 0.5}}
        sentence = "the actions did not load within 0.5 s"
        self.fails(self.prepared(None, **options).run(), sentence)

    def test_signals_that_a_module_or_the_parent_blocks_are_noticed(self) -> None:
        """Without the monitor, which would notice the workers' ends as well."""
        rude = f"""
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
signal.set_wakeup_fd(-1)
{ECHO}"""
        options = {"constants": {"MONITOR_INTERVAL": 600}, "dialect": "seed"}
        for text, blocked in ((rude, []), (ECHO, [signal.SIGCHLD, signal.SIGTERM])):
            options["actions"] = {"echo.py": text}
            node = self.prepared(self.central(seed=True), **options)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
            self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            node.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.assertEqual(node.do(unit()), ("succeeded", "x"))
            node.stop()


# ---------------------------------------------------------------------------
# CloudCrowd's own actions
# ---------------------------------------------------------------------------


class BuiltIn(CrowdTest):
    """CloudCrowd's own, with shell scripts in the place of their programs."""

    def setUp(self) -> None:
        self.programs_path = self.programs(
            pdftk='case $2 in burst) for n in 1 2 3; do echo "page $n" > 0000$n.part; '
            'done;; *) cp "$1" "$last";; esac',
            gm='printf "%s\\n" "$@" > "$last"',
            pdftotext='while [ "$2" != "$last" ]; do shift; done; cp "$1" "$last"',
            gs="true",
        )

    def built_in(self, action: str, *inputs: Any, **options: Any) -> Any:
        """Run a job of *action*; its one output."""
        settings = f"--set local_storage_path={self.directory()}".split()
        settings += ["--set", "work_unit_retries=1", "--options", json.dumps(options)]
        job = [*settings, "--run", action, *inputs]
        done = self.job(*job, path=self.programs_path)
        self.assertEqual(done.returncode, 0, done.stderr)
        (output,) = json.loads(done.stdout)
        return output

    def test_graphics_magick_does_steps_and_no_shell_sees_options(self) -> None:
        steps = [
            {"name": "a", "command": "convert", "extension": "gif",
             "options": "-size '10 x' ; $(id)"},
            {"name": "b", "command": "convert", "extension": "png", "input": "a"},
        ]  # fmt: skip
        urls = self.built_in("graphics_magick", "LICENSE", steps=steps)
        texts = [crowdnode.read_file(crowdnode.local_path(urls[name])) for name in "ab"]
        first, second = (text.decode().split("\n") for text in texts)
        self.assertEqual(first[:5], ["convert", "-size", "10 x", ";", "$(id)"])
        self.assertEqual(os.path.basename(first[5]), "LICENSE")
        names = [os.path.basename(path) for path in second[1:3]]
        self.assertEqual(names, ["LICENSE_a.gif", "LICENSE_b.png"])

    def test_process_pdfs_splits_into_batches_and_merges_to_one_archive(self) -> None:
        images = [{"name": "small", "extension": "gif"}]
        url = self.built_in("process_pdfs", "LICENSE", batch_size=2, images=images)
        with tarfile.open(crowdnode.local_path(url)) as archive:
            files = [item.name for item in archive if item.isfile()]
            full = archive.extractfile("LICENSE/text/full/LICENSE.txt")
            assert full
            self.assertEqual(full.read(), b"page 1\npage 2\npage 3\n")
        pages = [f"LICENSE/text/pages/LICENSE_0000{n}.txt" for n in (1, 2, 3)]
        small = [f"LICENSE/images/small/LICENSE_0000{n}.gif" for n in (1, 2, 3)]
        wanted = [*small, "LICENSE/text/full/LICENSE.txt", *pages]
        self.assertEqual(sorted(files), wanted)

    def test_pdfs_of_the_same_name_stay_apart_and_keep_their_names(self) -> None:
        names = ["d1/r.pdf", "d2/R.pdf", "a b.pdf", "a-b.pdf", "\xe9.pdf", "\u4e2d.pdf"]
        place, paths = self.directory(), []
        for name in names:
            paths.append(os.path.join(place, name))
            os.makedirs(os.path.dirname(paths[-1]), exist_ok=True)
            shutil.copyfile(os.path.join(HERE, "LICENSE"), paths[-1])
        url = self.built_in("process_pdfs", *paths, paths[0], batch_size=2)
        with tarfile.open(crowdnode.local_path(url)) as archive:
            files = [item.name for item in archive if "/full/" in item.name]
        names = ["r", "R-2", "a-b", "a-b-2", "\xe9", "\u4e2d", "r-3"]
        wanted = [f"{name}/text/full/{name}.txt" for name in names]
        self.assertEqual(sorted(files), sorted(wanted))

    def test_a_wrong_job_fails_with_a_sentence(self) -> None:
        def steps(**more: Any) -> dict[str, Any]:
            step = {"name": "a", "command": "convert", "extension": "gif", **more}
            return {"steps": [step]}

        env = {"PATH": self.programs_path + os.environ["PATH"]}
        node = self.node(env=env, disabled_actions="")
        image = {"name": "10000", "extension": "gif"}
        url = crowdnode.file_url(os.path.join(HERE, "LICENSE"))
        rows: list[tuple[str, str, int, Any]] = [
            ("is not an earlier step", "graphics_magick", 1, steps(input=["c"])),
            ("of letters, digits,", "graphics_magick", 1, steps(extension="../x")),
            ("No closing quotation", "graphics_magick", 1, steps(options="'")),
            ("10000 looks like a page's", "process_pdfs", 1, {"images": [image]}),
            ("must be 1 or more, not 0", "process_pdfs", 4, {"batch_size": 0}),
        ]
        for id, (message, action, stage, options) in enumerate(rows):
            wrong = unit(id, action, url, options=options, status=stage)
            status, output = node.do(wrong)
            self.assertEqual(status, "failed")
            self.assertIn(message, output)


# ---------------------------------------------------------------------------
# Worker
# ---------------------------------------------------------------------------

PRINT = """
for number in range(40000): print(f"line {number}")
print("\u2603")
print("an error", file=sys.stderr, flush=True)
os.system("echo from a child")
"""


class Workers(CodeNode):
    def test_a_worker_has_its_session_niceness_and_empty_work_directory(self) -> None:
        path = self.shared.path("state", "work", "coded")
        left = os.path.join(self.directory(), "left")
        os.makedirs(os.path.join(left, "behind"))
        os.makedirs(path, exist_ok=True)
        os.rename(left, os.path.join(path, f"unit_{self.next_id + 1}"))
        status, found = self.do(
            "result = [os.getsid(0) == os.getpid(), os.getppid(), os.nice(0),\n"
            "    os.getcwd(), os.stat('.').st_mode & 0o777, os.listdir('.')]\n"
            "os.makedirs('deep/er'); open('deep/file', 'w').close()\n"
            "os.chmod('deep', 0)"
        )
        self.assertEqual(found[:3], [True, self.shared.fork_server, os.nice(0) + 7])
        here = os.path.join(path, f"unit_{self.next_id}")
        self.assertEqual((status, found[3:]), ("succeeded", [here, 0o700, []]))
        wait_for(lambda: not self.shared.work_directories(), "it is removed")
        self.do("for _ in range(1500): os.mkdir('dddd'); os.chdir('dddd')")
        wait_for(lambda: not self.shared.work_directories(), "it is removed")

    def test_the_log_has_the_end_of_what_is_printed_and_nothing_forged(self) -> None:
        id = self.new_id()
        pid = self.shared.take(coded(id, PRINT, benchmark=True))
        self.shared_central.outcome(id)
        for text in ("line 39999", "\u2603", "an error", "from a child"):
            self.assertIn(f" worker[{pid}] output: {text}\n", self.shared.log())
        self.assertTrue(self.shared.said(f"worker[{pid}] output: benchmark: 0."))
        self.assertNotIn("output: line 1000\n", self.shared.log())
        self.do("raise ValueError('one\\n2026-01-01 00:00:00 node[1] info: \\x1b[2J')")
        wait_for(lambda: self.shared.said("ValueError: one"), "the log has it")
        self.assertIn("\n    2026-01-01 00:00:00 node[1] info: ?[2J", self.shared.log())
        self.assertIn("output: Traceback", self.shared.log())

    def test_a_failure_says_what_and_where(self) -> None:
        wanted = "ValueError: it broke (broken.py, line 6, in process)"
        for outcome, reason in (
            (self.do("os._exit(3)"), "the worker died: exit status 3"),
            (self.do("sys.exit('enough')"), "SystemExit: enough (coded.py, line "),
            (self.outcome("broken"), wanted),
            (self.outcome("echo", status=4), "the action echo does not define split"),
            (self.outcome("sleeper", "60"), "time_limit of 1 s exceeded"),
        ):
            self.failed(outcome, reason)
        for action in ("nosuch", "../../etc", "a/b", "", "a" * 300):
            wanted = f"this node has no action named {action}"
            self.assertEqual(self.outcome(action), ("failed", wanted))
        self.shared.settled()
        self.assertEqual(len(self.shared_central.reports(self.next_id)), 1)

    def test_the_death_of_a_worker_is_reported_with_its_last_words(self) -> None:
        id = self.new_id()
        code = "print('almost done', flush=True); time.sleep(60)"
        pid = self.shared.take(coded(id, code))
        printed = self.shared.path("state", "units", f"{id}.out")
        wait_for(lambda: os.stat(printed).st_size, "it has printed")
        os.kill(pid, signal.SIGKILL)
        status, output = self.shared_central.outcome(id)
        wanted = "^the worker died: killed by SIGKILL.*; its last words: almost done$"
        self.assertRegex(output, wanted)
        self.assertEqual(status, "failed")


# ---------------------------------------------------------------------------
# Fork server
# ---------------------------------------------------------------------------

CODED = ("coded.py", "timed.py", "limited.py")  # with different limits
IGNORE_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
FORGE = """
record = f"../../../units/{self.options['work_unit_id']}"
line = b'succeeded 0.1 {"output":x}\\n'
"""
FORGE_BY_PATH = f"{FORGE}open(record, 'ab').write(line)\n"
FORGE_BY_DESCRIPTOR = f"""{FORGE}
for number in range(50):
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(number), os.stat(record)):
            os.write(number, line)
"""


class Misbehaviour(SharedNode):
    """Actions that do what they should not."""

    options = {
        "actions": {"echo.py": ECHO, **dict.fromkeys(CODED, CODE)},
        "action timed": "time_limit = 0.2",
        "action limited": "file_limit = 5\nmemory_limit = 200",
        "local_storage_path": "storage",
        "dialect": "seed",
    }

    def misbehave(self, *deeds: tuple[str, str, Any], action: str = "coded") -> None:
        """Have each code executed, which ends with this status and output; what it has
        left must be gone then, and the next unit must succeed."""
        node = self.shared
        for code, status, output in deeds:
            with self.subTest(code):
                id = self.new_id()
                found = node.do(unit(id, action, options={"code": code}))
                wait_for(lambda: len(our_processes()) == 2, "node and fork server")
                node.settled()
                self.assertIn(str(output), str(found[1]))
                self.assertEqual(found[0], status)
                wait_for(lambda: not node.work_directories(), "its files are removed")
                self.assertEqual(node.do(unit(self.new_id())), ("succeeded", "x"))
                self.assertEqual(len(self.shared_central.reports(id)), 1)

    def test_processes_that_are_left_are_ended_even_daemons(self) -> None:
        killed = "the worker died: killed by "
        children = "for _ in range(10): os.fork() or time.sleep(600)"
        thread = "threading.Thread(target=time.sleep, args=[600]).start()"
        self.misbehave(
            (children, "succeeded", None),
            ("leave_a_daemon()", "succeeded", None),
            ("leave_a_daemon(); os.abort()", "failed", f"{killed}SIGABRT"),
            (thread, "succeeded", None),
            ("os.killpg(0, signal.SIGKILL)", "failed", f"{killed}SIGKILL"),
            ("if os.fork() == 0: raise ValueError", "succeeded", None),
            ("fork_without_end()", "succeeded", None),
        )

    def test_nothing_keeps_a_unit_from_its_end_at_the_time_limit(self) -> None:
        block = "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))\n"
        exceeded = "time_limit of 0.2 s exceeded"
        self.misbehave(
            (f"{block}time.sleep(600)", "failed", exceeded),
            (f"leave_a_daemon(); {IGNORE_TERM}", "failed", exceeded),
            action="timed",
        )

    def test_what_is_written_and_kept_is_limited(self) -> None:
        limited = "memory_limit is 200 MB"
        self.misbehave(
            ("open('x', 'wb').write(bytes(2**23))", "failed", "File too large"),
            ("held = [bytearray(2**24) for _ in range(99)]", "failed", limited),
            ("result = 'x' * 100_000_000", "failed", limited),
            action="limited",
        )

    def test_descriptors_files_and_modes_are_an_actions_own_affair(self) -> None:
        open_files = "files = [open(f'file{number}', 'w') for number in range(50)]"
        print_much = "for _ in range(100): os.write(1, b'much ' * 200_000)"
        delete = "shutil.rmtree(os.path.dirname(self.work_directory))"
        save = "os.umask(0); open('file', 'w').write('x'); self.save('file')"
        self.misbehave(
            ("os.closerange(0, 1000)", "succeeded", None),
            ("sys.stdout.close()", "succeeded", None),
            (f"os.closerange(0, 1000); {open_files}", "succeeded", None),
            (print_much, "succeeded", None),
            ("result = 'x' * 30_000_000", "succeeded", "x" * 30_000_000),
            (delete, "succeeded", None),
            (save, "succeeded", None),
        )
        modes = modes_of(self.shared.path("storage"))
        self.assertIn("file", map(os.path.basename, modes))
        for path, mode in modes.items():
            self.assertEqual(mode & 0o077, 0, path)

    def test_what_is_not_json_does_not_get_from_a_record_to_central(self) -> None:
        died = "the worker died: exit status 3"
        self.misbehave(
            (f"{FORGE_BY_PATH}result = 'real'", "succeeded", "real"),
            (f"{FORGE_BY_PATH}os._exit(3)", "failed", died),
            (f"{FORGE_BY_DESCRIPTOR}os._exit(3)", "failed", died),
        )


# What Python loads first in the node, its fork server and workers.  It has one call of
# the system fail, once, where the program makes it: CALL PLACE CALLER ERRNO, in a file
# that all of them map.  Or, with "trace" there, it writes down the places.
SITECUSTOMIZE = """
import builtins, fcntl, mmap, os, socket, sys, threading

path, write = os.environ["CROWDNODE_FAULTS"], os.write
armed = mmap.mmap(os.open(path, os.O_RDWR), 512)
seen = os.open(path + ".seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def wrap(module, name):
    real = getattr(module, name)

    def call(*args, **options):
        frame = sys._getframe(1)
        if armed[0] and frame.f_code.co_filename.endswith("crowdnode.py"):
            frames = (frame, frame.f_back)
            lines = [f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in frames]
            wanted, _, number = armed[:].rstrip(bytes(1)).decode().rpartition(" ")
            place = " ".join([name, *lines])
            if number == "trace":
                write(seen, place.encode() + b"\\n")
            elif wanted == place:
                armed[0] = 0
                if name == "start":
                    raise RuntimeError("can't start new thread")
                raise OSError(int(number), os.strerror(int(number)))
        return real(*args, **options)

    setattr(module, name, call)

for name in '''
    chdir chmod dup2 fork ftruncate listdir mkdir open pipe posix_spawn pwrite read
    rename replace rmdir scandir setsid truncate unlink waitpid write
'''.split():
    wrap(os, name)
wrap(builtins, "open")
wrap(fcntl, "flock")
wrap(socket, "socketpair")
wrap(threading.Thread, "start")
"""
FAULTS = ("ENOSPC", "EMFILE", "EAGAIN", "EACCES", "EIO", "EINTR")


class SystemCalls(CrowdTest):
    """Every call of the system that can fail, once at each of its places: whatever
    happens, the unit is reported, once, and nothing is left."""

    def setUp(self) -> None:
        directory = self.directory()
        write_file(os.path.join(directory, "sitecustomize.py"), SITECUSTOMIZE)
        self.faults = os.path.join(directory, "faults")
        write_file(self.faults, bytes(512))
        waits = {"RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": 0.1, "START_DEADLINE": 2}
        self.subject = self.node(
            self.central(seed=True),
            actions={**ACTIONS, "coded.py": CODE, "shell.sh": "#!/bin/sh\necho $1\n"},
            constants={"MONITOR_INTERVAL": 0.02, **waits},
            dialect="seed",
            # Without uptime in the PATH, since 50 of it a second cost much time.
            env={"PYTHONPATH": directory, "CROWDNODE_FAULTS": self.faults, "PATH": ""},
        )
        self.last_id, self.pid = 0, ""

    def arm(self, text: str) -> None:
        """Have this happen next; nothing, if it is empty."""
        with open(self.faults, "r+b", 0) as file:
            file.write(text.encode().ljust(512, b"\0"))

    def offer(self, *values: Any, **more: Any) -> None:
        """Offer a unit as central would, until it is accepted."""

        def post() -> bool:
            status, _, body = self.subject.post(offered)
            self.pid = str(json.loads(body)["pid"]) if status == 200 else ""
            return status == 200

        offered = unit(self.last_id, *values, **more)
        wait_for(post, "it is accepted")

    def plain(self) -> None:
        self.offer("echo")

    def superseded(self) -> None:
        self.offer("sleeper", "60")
        self.offer("echo", attempts=1)

    def orphaned(self) -> None:
        go, old = self.subject.path(f"go{self.last_id}"), self.subject.fork_server
        self.offer("waiter", go)
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: self.subject.fork_server != old, "another")
        open(go, "w").close()
        outcome = self.subject.central.outcome(self.last_id)
        self.assertEqual(outcome, ("succeeded", "seen"))

    def play(self, scenario: Callable[[], None]) -> None:
        """Have a unit done, and see that it is reported."""
        node = self.subject
        self.last_id += 1
        scenario()
        node.central.outcome(self.last_id)
        node.settled()
        wait_for(lambda: not node.work_directories(), "no work directory is left")
        pids = [row["pid"] for row in node.central.reports(self.last_id)]
        if scenario == self.superseded:  # the first attempt may have failed before that
            self.assertEqual(len(pids), len(set(pids)))
            pids = pids[-1:]
        self.assertEqual(pids, [self.pid])

    def places(self, scenario: Callable[[], None]) -> set[str]:
        """Where the program calls the system, in this scenario."""
        self.arm(" trace")
        self.play(scenario)
        self.arm("")
        with open(f"{self.faults}.seen", "r+") as file:
            found = set(file.read().splitlines())
            file.truncate(0)
        return found

    def fail_each(self, scenario: Callable[[], None], ways: int = 4) -> None:
        """Have each call of this scenario fail, in so many ways; the calls that a plain
        unit takes too have their own test."""
        places = self.places(scenario)
        if scenario != self.plain:
            places -= self.places(self.plain)
        self.assertGreater(len(places), 2)
        for number, place in enumerate(sorted(places)):
            for way in range(ways):
                fault = FAULTS[(number + way) % len(FAULTS)]
                with self.subTest(f"{place}: {fault}"):
                    self.arm(f"{place} {getattr(errno, fault)}")
                    self.play(scenario)
                self.arm("")
        self.assertFalse(self.subject.said("no action named"))
        self.assertNotIn("\nTraceback", self.subject.log())
        if scenario != self.orphaned:
            self.assertEqual(self.subject.status()["fork_server"]["restarts"], 0)

    def test_a_plain_unit(self) -> None:
        self.fail_each(self.plain)

    def test_an_executable_action(self) -> None:
        self.fail_each(lambda: self.offer("shell"))

    def test_a_worker_that_dies(self) -> None:
        code = "open('left', 'w').close(); os.kill(os.getpid(), 9)"
        self.fail_each(lambda: self.offer("coded", options={"code": code}))

    def test_a_unit_that_supersedes_another(self) -> None:
        self.fail_each(self.superseded)

    def test_a_unit_whose_fork_server_is_replaced(self) -> None:
        self.fail_each(self.orphaned, 1)


# ---------------------------------------------------------------------------
# Central server
# ---------------------------------------------------------------------------


FAST = {"RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": 0.2}  # seconds between two reports
LOGIN = {"http_authentication": "yes", "login": "ali ce", "password": "s3cr:et"}
PAIR = "ali ce:s3cr:et"
BASIC = "Basic YWxpIGNlOnMzY3I6ZXQ="  # of PAIR
AUTHORIZATION = f"Authorization: {BASIC}\r\n"


class Client(CrowdTest):
    def test_forms_are_what_the_standard_library_reads(self) -> None:
        for value in (b"", b"a b+c&d=e%20", bytes(range(256)), "\u20ac\n".encode()):
            form = crowdnode.form_encoded([("name", value), ("x", b"y")]).decode()
            read = urllib.parse.parse_qsl(form, True, encoding="latin-1")
            self.assertEqual(read, [("name", value.decode("latin-1")), ("x", "y")])

    def test_an_answer_that_is_not_http_is_an_error_that_names_it(self) -> None:
        for answer, named in ((b"", "closed connection"), (b"SSH-2.0\r\n", "SSH")):
            wrong = self.assertRaisesRegex(crowdnode.CentralError, named)
            with web_server(lambda handler: handler.wfile.write(answer)) as url, wrong:
                config = crowdnode.load_config("", [])
                crowdnode.CentralServer(config, url, 9063).heartbeat()

    def test_each_dialect_is_found_from_either_kind_of_central(self) -> None:
        limited = {"tag": "red", "max_workers": "50"}
        for seed, options in ((True, {"max_workers": 0}), (False, limited)):
            with self.subTest(seed=seed):
                central = self.central(seed=seed)
                node = self.node(central, dialect="auto", actions={}, **options)
                port = str(node.port)
                paths = ["/node/127.0.0.1", f"/node/127.0.0.1:{port}"][: 2 - seed]
                tried = [path for method, path, _ in central.calls if method == "PUT"]
                self.assertEqual(tried, paths)
                fields = {"port": port} if seed else limited
                fields = {**fields, "busy": "false", "enabled_actions": "word_count"}
                self.assertEqual(central.check_ins()[-1], fields)
                dialect = node.status()["central"]["dialect"]
                self.assertEqual(dialect, "seed" if seed else "0.5")
                node.stop()
                self.assertEqual(central.calls[-1][:2], ("DELETE", paths[-1]))
                other, before = "0.5" if seed else "seed", len(central.calls)
                done = self.prepared(central, dialect=other).run()
                self.assertEqual(done.returncode, 1, "a pinned one is the only one")
                methods = [method for method, *_ in central.calls[before:]]
                self.assertEqual(methods, ["DELETE", "PUT"])

    def test_both_sides_use_the_password_and_a_wrong_one_is_named(self) -> None:
        central = self.central(login=PAIR)
        done = self.prepared(central, **{**LOGIN, "password": "guess"}).run()
        self.assertRegex(done.stderr, "401.*: check login and password in ")
        self.assertNotIn("guess", done.stderr)
        done = self.prepared(central).run()
        self.assertIn("check http_authentication, login and password in", done.stderr)
        node = self.node(central, **LOGIN)
        self.assertEqual(node.run("--status").returncode, 0)
        self.assertEqual(node.send(work_request(unit(), AUTHORIZATION))[0], 200)
        self.assertEqual(central.outcome(1), ("succeeded", "x"))
        node.settled()
        self.assertGreater(len(central.looks), 1)
        self.assertFalse(node.said("can't look for lost reports"))


# ---------------------------------------------------------------------------
# What the node stands on
# ---------------------------------------------------------------------------


class Machine(CrowdTest):
    def test_the_machines_own_name_is_checked_like_a_given_one(self) -> None:
        for name in ("my host", "M\xdcLLER-PC", ""):
            with unittest.mock.patch("socket.gethostname", lambda name=name: name):
                wrong = "host: this machine"
                with self.assertRaisesRegex(crowdnode.UsageError, wrong):
                    crowdnode.load_config(None, [])
                config = crowdnode.load_config(None, [("host", "10.0.0.1")])
                self.assertEqual(config.host, "10.0.0.1")

    def test_a_host_name_that_central_can_not_dial_is_warned_of(self) -> None:
        alone = "is a loopback address, but central is elsewhere"
        warnings = [("127.0.0.1", alone), ("a..b", "does not resolve here")]
        for host, warning in (*warnings, ("192.0.2.2", "")):
            settings = [("central_server", "http://192.0.2.1"), ("host", host)]
            found = crowdnode.host_warnings(crowdnode.load_config("", settings))
            self.assertEqual(
                [warning in text for text in found], [True][: len(warning)]
            )

    def test_a_path_that_cannot_be_used_is_named_with_its_key(self) -> None:
        node = self.prepared()
        for line in (
            "state_path", "temp_storage_path", "local_storage_path",
            "state_path --status", "state_path --daemon",
        ):  # fmt: skip
            key, *command = line.split()
            done = node.run("--set", f"{key}=/dev/null/x", *command)
            self.assertEqual(done.returncode, 1, line)
            self.assertRegex(done.stderr, f"{key}.*/dev/null")
            self.assertNotIn("Traceback", done.stderr)

    def test_a_directory_that_others_can_write_to_is_refused(self) -> None:
        node = self.prepared(temp_storage_path="below/work")
        for key, name, mode in (
            ("state_path", "state", 0o770),
            ("temp_storage_path", "below", 0o770),
            ("temp_storage_path", "below/work", 0o1777),
        ):
            path = node.path(name)
            os.makedirs(path, exist_ok=True)
            os.chmod(path, mode)
            self.fails(node.run("--daemon"), f"{key}: others can write to {path}, ")
            os.chmod(path, 0o700)
        os.chmod(node.path("state"), 0o755)  # others may look, but are warned of
        os.chmod(node.path("below"), 0o1777)  # sticky, as /tmp is
        node.start()
        self.assertEqual(node.said("state_path: others can look into"), 1)
        os.chmod(node.path("state"), 0o777)
        os.kill(node.pid, signal.SIGHUP)
        sentence = "not reloaded, everything stays as it was: state_path: others can"
        wait_for(lambda: node.said(sentence), "a reload refuses what a start refuses")
        self.assertEqual(node.do(unit()), ("succeeded", "x"))

    def assert_refused(self, node: NodeProcess, reason: str) -> None:
        status, _, body = node.post(unit(99))
        self.assertEqual((status, body), (503, b"Node Overloaded"))
        self.assertEqual(node.status()["reason"], reason)
        self.assertEqual(node.said(f"refusing work: {reason}"), 1)

    def test_max_load_refuses_and_its_end_is_checked_in(self) -> None:
        calm = 'test -e "$D/calm" && load=0.10'
        env = self.fake_uptime(f'{calm}; echo "load average: ${{load-7.50}}, 0.1"')
        node = self.node(env=env, max_load=2.5)
        check_ins = node.central.check_ins
        self.assertEqual(check_ins()[0]["busy"], "true")
        self.assert_refused(node, "the load average is 7.50, max_load is 2.5")
        page = node.get("/")[2].decode()
        self.assertIn("the load average is 7.50, max_load is 2.5", page)
        self.assertIn("refusing", page)
        open(os.path.join(env["D"], "calm"), "w").close()
        wait_for(lambda: len(check_ins()) == 2, "a check-in at its end")
        self.assertEqual(check_ins()[1]["busy"], "false")

    def test_little_memory_refuses_and_its_end_is_checked_in(self) -> None:
        if not HAS_PROC:
            self.skipTest("needs /proc/meminfo")
        keys = ("min_free_memory", "min_available_memory")
        node = self.node(None, **dict.fromkeys(keys, 999999))
        for key in keys:
            reason = node.status()["reason"]
            self.assertRegex(reason, rf"\d MB of memory are \w+, {key} is 999999")
        self.assertEqual(node.post(unit(99))[0], 503)
        node.write_config(**dict.fromkeys(keys, 1))
        node.run("--reload")
        check_ins = node.central.check_ins
        wait_for(lambda: check_ins()[-1]["busy"] == "false", "a check-in at its end")

    def test_max_workers_refuses_and_room_is_checked_in(self) -> None:
        node = self.node(max_workers=2)
        central = node.central
        pids = [node.take(unit(id, "sleeper", "30")) for id in (1, 2)]
        self.assert_refused(node, "2 units are running, max_workers is 2")
        self.assertEqual(node.take(unit(1, "sleeper", "30")), pids[0])
        self.assertEqual(len(central.check_ins()), 1)
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: len(central.check_ins()) == 2, "a check-in when there is room")
        self.assertEqual(node.do(unit(3)), ("succeeded", "x"))
        self.assertEqual(node.status()["counts"]["refused"], 1)

    def test_a_timer_that_is_hurried_steps_each_time_and_stays_one_timer(self) -> None:
        stepped = threading.Event()
        timer = crowdnode.PeriodicTimer(stepped.set, 60)
        before = threading.active_count()
        timer.start()
        for _ in range(1000):
            stepped.clear()
            timer.soon()
            self.assertTrue(stepped.wait(DEADLINE))
        wait_for(lambda: threading.active_count() == before + 1, "one thread is left")
        timer.stop()
        wait_for(lambda: threading.active_count() == before, "none is left")

    def test_the_log_is_rotated_and_all_files_are_private(self) -> None:
        node = self.daemon(constants={"LOG_SIZE": 2000, "LOGS_KEPT": 2})
        for id in range(25):
            node.do(unit(id))
        self.assertRegex(
            node.log(),
            rf"(?m)^[-0-9]{{10}} [:0-9]{{8}} node\[{node.daemon_pid}\] info: "
            r"unit 24 \(echo, process, job 1, x\): started as process \d+$",
        )
        logs = sorted(name for name in os.listdir(node.path("state")) if "log" in name)
        self.assertEqual(logs, ["node.log", "node.log.1", "node.log.2"])
        node.take(node.waiter("here"))  # its files, too
        modes = modes_of(node.path("state"))
        names = ("node.log.2", "node.pid", "units/here", "units/here.out", "work")
        self.assertLessEqual({node.path("state", name) for name in names}, set(modes))
        for path, mode in modes.items():
            self.assertEqual(mode, 0o700 if os.path.isdir(path) else 0o600, path)
        self.assertEqual(node.let_go("here"), ("succeeded", "seen"))

    def test_a_log_that_cannot_be_rotated_goes_on_and_says_so(self) -> None:
        node = self.prepared(constants={"LOG_SIZE": 2000, "LOGS_KEPT": 1})
        os.makedirs(node.path("state", "node.log.1", "in the way"), 0o700)
        self.assertEqual(node.run("--daemon").returncode, 0)
        for id in range(25):
            node.do(unit(id))
        self.assertTrue(0 < node.said("error: can't rotate") < 4)
        self.assertEqual(node.said("unit 24 (echo, process, job 1, x): started"), 1)

    def test_a_lock_file_that_is_deleted_is_made_anew(self) -> None:
        node = self.daemon()
        pid, path = node.daemon_pid, node.path("state", "node.pid")
        os.unlink(path)
        wait_for(lambda: os.path.exists(path), "another lock file")
        wait_for(lambda: node.run("--status").returncode == 0, "its node")
        self.assertEqual(node.daemon_pid, pid)
        self.assertEqual(node.said("was deleted under this node; recreated"), 1)

    def test_processors_are_those_of_affinity_and_quota(self) -> None:
        root, own = self.directory(), os.path.join(self.directory(), "cgroup")
        count = crowdnode.processors(root, own)
        self.assertEqual(count, len(os.sched_getaffinity(0)))
        for groups, path, name, text, wanted in (
            ("0::/a/b\n", "a", "cpu.max", "50000 100000", 1),
            ("0::/a/b\n", "a/b", "cpu.max", "max 100000", 1),
            ("0::/\n", "", "cpu.max", "9900000 100000", count),
            ("3:cpu,cpuacct:/c\n", "cpu,cpuacct/c", "cpu.cfs_quota_us", "-1", count),
            ("3:cpu,cpuacct:/c\n", "cpu,cpuacct", "cpu.cfs_quota_us", "100000", 1),
        ):
            os.makedirs(place := os.path.join(root, path), exist_ok=True)
            for file, content in (
                (own, groups), (f"{place}/{name}", text),
                (f"{place}/cpu.cfs_period_us", "100000"),
            ):  # fmt: skip
                with open(file, "w") as target:
                    target.write(content)
            self.assertEqual(crowdnode.processors(root, own), wanted, (path, text))

    def test_texts_of_other_machines_are_parsed(self) -> None:
        vm_stat = "(page size of {} bytes)\nPages free:   130000.\nPages active: 9.\n"
        for size, free in ((4096, 532_480_000), (16384, 2_129_920_000), ("odd", None)):
            self.assertEqual(crowdnode.parse_vm_stat(vm_stat.format(size)), free)
        for text, load in (
            ("13:22:56 up 12 min,  0 users,  load average: 0.52, 0.58, 0.59", 0.52),
            ("13:22  up 3 days, 2 users, load averages: 12.34 2.00 1.99", 12.34),
            ("13:22:56 up 12 min,  0 users,  load average: 0,52, 0,58, 0,59", None),
        ):
            self.assertEqual(crowdnode.parse_load(text), load)
        meminfo = "MemTotal: 9 kB\nMemFree:  204800 kB\nMemAvailable:   409600 kB\n"
        free = crowdnode.parse_meminfo(meminfo, crowdnode.SCRAPE_LINUX_MEMORY)
        available = crowdnode.parse_meminfo(meminfo, crowdnode.SCRAPE_LINUX_AVAILABLE)
        self.assertEqual((free, available), (200 << 20, 400 << 20))
        # A script stands in for vm_stat, which this machine lacks.
        text = r"(page size of 16384 bytes)\nPages free: 64000."
        path = self.programs(vm_stat=f"printf '{text}'") + os.environ["PATH"]
        darwin = unittest.mock.patch.object(sys, "platform", "darwin")
        with unittest.mock.patch.dict(os.environ, PATH=path), darwin:
            free = crowdnode.read_memory(crowdnode.SCRAPE_LINUX_MEMORY)
        self.assertEqual(free, 1000 << 20)

    def test_uptime_runs_in_the_c_locale_or_the_kernel_is_asked(self) -> None:
        script = '[ "$LC_ALL" = C ] && echo "13:00 0.42, 1.0" || echo "13.00 0,42 1,0"'
        mock = unittest.mock
        for text in (script, "echo 13:00 up 1 day", "sleep 50", "exec nosuch"):
            env = {**self.fake_uptime(text), "LANG": "fi_FI.UTF-8"}
            deadline = 0.1 if text == "sleep 50" else DEADLINE
            fake = mock.patch.multiple(crowdnode, SCRAPE_DEADLINE=deadline)
            with self.subTest(text), fake, mock.patch.dict(os.environ, env):
                node = idle_node()
                with mock.patch.object(crowdnode.log, "warning") as warning:
                    for _ in range(2):
                        node.read_machine()
                said = [call[0] for call in warning.call_args_list]
                sentence = "uptime does not tell the load average: asking the kernel"
                self.assertEqual(said, [("%s", sentence)] * (text != script))
                load = node.load_average
                self.assertTrue(load == 0.42 if text == script else load >= 0, load)


# ---------------------------------------------------------------------------
# The node
# ---------------------------------------------------------------------------


class Expression(str):
    """A constant of the program that is given as Python's text."""

    __repr__ = str.__str__


class ForkServers(CrowdTest):
    def test_a_child_that_a_thread_waits_for_is_not_taken_for_a_stray(self) -> None:
        node = idle_node()
        silent = ["sh", "-c", "exec >&- 2>&-; sleep 0.3; exit 7"]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(crowdnode.run_command, silent, DEADLINE)
            wait_for(lambda: crowdnode.own_children, "it runs")
            while not waiting.done():
                node.end_strays()
        self.assertEqual(waiting.result(), (7, b"", b""))

    def test_a_dead_fork_server_is_replaced_and_its_workers_go_on(self) -> None:
        """And their time limits hold, and their deaths are noticed."""
        node = self.node(None, **{"action sleeper": "time_limit = 2"})
        central, old = node.central, node.fork_server
        going_on = node.waiter()
        pid = node.take(going_on)
        node.take(unit(2, "sleeper", "60"))
        killed = node.take(unit(3, "sleeper", "60"))
        os.kill(old, signal.SIGKILL)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: node.fork_server != old, "another")
        wait_for(lambda: len(central.check_ins()) == 2, "a check-in")
        self.assertEqual(node.take(going_on), pid, "the node has that one")
        self.assertEqual(node.do(unit(4)), ("succeeded", "x"))
        sentence = "the worker died while no fork server watched it"
        self.assertEqual(central.outcome(3), ("failed", sentence))
        self.assertEqual(central.outcome(2), ("failed", "time_limit of 2 s exceeded"))
        self.assertEqual(node.let_go(), ("succeeded", "seen"))
        self.assertEqual(central.reports(1)[0]["pid"], str(pid))
        self.assertEqual(node.status()["fork_server"]["restarts"], 1)

    def test_an_action_that_loaded_before_is_waited_for_or_reloaded(self) -> None:
        for wait, reload in ((0.1, False), (60, True)):
            with self.subTest(reload=reload):
                constants = {"RETRY_WAIT": wait, "RETRY_WAIT_LIMIT": wait}
                node = self.node(constants=constants)
                path = node.path("actions", "echo.py")
                os.rename(path, node.path("hidden"))
                os.kill(node.fork_server, signal.SIGKILL)
                wait_for(lambda: node.said("no fork server: echo did not"), "a try")
                self.assertEqual(node.post(unit())[0], 503)
                os.rename(node.path("hidden"), path)
                if reload:
                    node.run("--reload")
                wait_for(lambda: node.status()["state"] == "accepting", "another")
                self.assertEqual(node.do(unit()), ("succeeded", "x"))

    def test_a_record_in_a_units_place_is_moved_aside_first(self) -> None:
        node = self.node(constants={"MONITOR_INTERVAL": 1})
        record = b"crowdnode-unit 2 new\n"
        write_file(node.path("state", "units", "5"), record)
        wait_for(lambda: node.post(unit(5))[0] == 200, "it is accepted")
        self.assertEqual(node.central.outcome(5), ("succeeded", "x"))
        self.assertEqual(node.record("5.odd"), record)

    def test_a_stopped_fork_server_is_refused_for_and_replaced(self) -> None:
        node = self.node(constants={"START_DEADLINE": 0.3, "SEND_DEADLINE": 1})
        for id, size in ((1, 1), (2, 2_000_000)):  # the second can't even be sent
            with self.subTest(size):
                fork_server, why = node.fork_server, "refusing work: the fork server"
                before = node.said(why)
                with stopped(fork_server):
                    self.assertEqual(node.post(unit(id, input="x" * size))[0], 503)
                    wait_for(lambda: node.said(why) > before, "why")
                    wait_for(lambda: node.fork_server != fork_server, "another")
                wait_for(lambda: node.status()["state"] == "accepting", "it works")
                self.assertEqual(node.do(unit(id)), ("succeeded", "x"))
                self.assertEqual(node.central.check_ins()[-1]["busy"], "false")

    def test_a_full_disk_is_a_refusal_that_ends(self) -> None:
        node = self.node()
        units = node.path("state", "units")
        command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", units]
        if os.getuid() or subprocess.call(command, stderr=subprocess.DEVNULL):
            self.skipTest("can't mount a small disk")
        self.addCleanup(subprocess.call, ["umount", "-l", units])
        filler = os.path.join(units, ".filler")
        with open(filler, "wb", 0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        self.assertEqual(node.post(unit(1))[0], 503)
        self.assertIn("No space left on device", node.status()["reason"])
        os.unlink(filler)
        wait_for(lambda: node.status()["state"] == "accepting", "it is over")
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        self.assertEqual(node.central.check_ins()[-1]["busy"], "false")
        node.settled()

    def test_a_death_that_the_fork_server_has_missed_is_noticed(self) -> None:
        node = self.node()
        central = node.central
        central.fail(500, "/work/1")
        pid, fork_server = node.take(unit(1, "sleeper", "60")), node.fork_server
        node.do(unit(2))  # so the fork server has done with unit 1's start
        with stopped(fork_server):  # it notices late
            os.kill(pid, signal.SIGKILL)
            self.assertEqual(central.outcome(1)[0], "failed")
        self.assertEqual(node.do(unit(3)), ("succeeded", "x"))
        self.assertEqual(len(central.reports(1)), 1)

    def test_a_worker_without_open_files_is_not_taken_for_dead(self) -> None:
        node = self.node(actions={"coded.py": CODE})
        go, closed = node.path("go"), node.path("closed")
        code = (
            f"os.closerange(3, 1000); open({closed!r}, 'w').close()\n"
            f"while not os.path.exists({go!r}): time.sleep(0.01)\n"
            "result = 'seen'"
        )
        node.take(coded(1, code))
        wait_for(lambda: os.path.exists(closed), "its record is not locked any more")
        fork_server = node.fork_server
        node.kill()
        os.kill(fork_server, signal.SIGKILL)
        node.start()
        node.go_on(0.5)
        self.assertEqual(node.central.reports(1), [])
        open(go, "w").close()
        self.assertEqual(node.central.outcome(1), ("succeeded", "seen"))

    def test_a_child_with_the_lock_of_a_dead_orphan_keeps_nothing_alive(self) -> None:
        forks = echo("os.fork(); time.sleep(60)")
        node = self.node(actions={"forks.py": forks.replace("Echo", "Forks")})
        pid = node.take(unit(1, "forks"))
        wait_for(lambda: len(our_processes()) == 4, "the child is there")
        old = node.fork_server
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: node.fork_server != old, "another is there")
        with open(node.path("state", "units", "1"), "ab") as file:
            file.write(b"nonsense\n")
        os.kill(pid, signal.SIGKILL)
        self.assertEqual(node.central.outcome(1)[0], "failed")
        wait_for(lambda: len(our_processes()) == 2, "the child is gone")

    def test_after_a_kill_of_the_node_the_next_one_settles_everything(self) -> None:
        node = self.node(None, **{"action waiter": "time_limit = 600"})
        central, fork_server = node.central, node.fork_server
        node.write_config(port=node.port)
        going_on = node.waiter()
        running = node.take(going_on)
        central.stop()
        node.take(unit(2))
        wait_for(lambda: len(node.status()["waiting"]), "unit 2 waits")
        node.kill()
        self.assertTrue(alive(fork_server))
        central.start()
        # The wall clock has been set forward by decades, which must end no unit.
        node.constants["time.time"] = Expression("lambda: 4e9")
        node.start()
        self.assertEqual(central.outcome(2), ("succeeded", "x"))
        self.assertEqual(node.take(going_on), running, "the node has that one")
        self.assertEqual(node.let_go(), ("succeeded", "seen"))
        wait_for(lambda: not alive(fork_server), "it ends with its last worker")
        self.assertEqual(len(central.told("DELETE", "/node")), 1, "at the first start")
        self.assertEqual([len(central.reports(id)) for id in (1, 2)], [1, 1])
        node.settled()

    def test_after_the_death_of_all_processes_the_check_out_answers(self) -> None:
        node = self.node(port=free_port())
        central, fork_server = node.central, node.fork_server
        workers = [node.take(unit(id, "sleeper", "60")) for id in range(3)]
        theirs = re.sub(rb'"central": "[^"]*"', b'"central": "http://127.0.0.1:1"',
                        node.record(0).replace(b'"id": 0', b'"id": 8'))  # fmt: skip
        central.fail(500, "/work/7")
        node.take(unit(7))
        wait_for(lambda: central.reports(7), "an outcome that waits")
        for pid in (node.pid, fork_server, *workers):
            os.kill(pid, signal.SIGKILL)
        node.wait()
        path = node.path("state", "units", "8")
        with open(path, "wb") as file:
            file.write(theirs)
        central.answer = lambda *call: None
        node.start()
        calls = [call[:2] for call in central.calls if call[1] != "/work/7"]
        name = f"/node/127.0.0.1:{node.port}"
        self.assertEqual(calls[-2:], [("DELETE", name), ("PUT", name)])
        self.assertEqual([central.reports(id) for id in range(3)], [[], [], []])
        self.assertEqual(central.outcome(7), ("succeeded", "x"))
        self.assertIn(b"\nfailed ", node.record(8), "it is for another central")
        node.stop()
        os.unlink(path)

    def test_another_process_with_a_workers_pid_is_never_signalled(self) -> None:
        """After a restart of the machine or container, or in a shared directory."""
        node = self.node()
        node.write_config(port=node.port, **{"action sleeper": "time_limit = 0.1"})
        worker, fork_server = node.take(unit(1, "sleeper", "60")), node.fork_server
        for pid in (node.pid, fork_server, worker):
            os.kill(pid, signal.SIGKILL)
        node.wait()
        other = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
        self.addCleanup(other.communicate)
        start = crowdnode.start_of_process(other.pid) or 0
        pid_line = b"pid %d %.2f" % (other.pid, start)
        record = re.sub(rb"pid \d+ .*", pid_line, node.record(1))
        os.unlink(node.path("state", "units", "1"))
        locks = contextlib.ExitStack()
        for id, pattern, text in (
            (1, rb"pid \d+ .*", b"pid %d 1.0" % other.pid),
            (2, rb'"boot_id": "[^"]*"', b'"boot_id": "another"'),
            (3, rb'"namespace": "[^"]*"', b'"namespace": "another"'),
            (4, rb'"boot_id": "[^"]*"', b'"boot_id": "another"'),
        ):
            for kind in ("overdue", "withdrawn"):
                name, end = f"{kind}{id}", b"withdrawn\n" * (kind == "withdrawn")
                changed = re.sub(rb'"id": 1', b'"id": "%s"' % name.encode(), record)
                file = open(node.path("state", "units", name), "wb", 0)  # noqa: SIM115
                file.write(re.sub(pattern, text, changed) + end)
                locks.enter_context(file)
                if id != 4:
                    fcntl.flock(file, fcntl.LOCK_EX)  # as a child of the worker might
        node.start()
        node.go_on(0.4)
        self.assertIsNone(other.poll())
        self.assertEqual(node.said("unit overdue4: dropped: all workers have died"), 1)
        locks.close()
        node.settled()
        self.assertIsNone(other.poll())
        self.assertEqual(node.central.reports("overdue4"), [])
        self.assertEqual(len(node.central.reports("overdue1")), 1)


class Work(SharedNode):
    def test_a_unit_is_answered_with_a_pid_and_reported_as_on_the_wire(self) -> None:
        id = self.new_id()
        status, headers, body = self.shared.post(unit(id))
        self.assertEqual((status, headers["Content-Type"]), (200, "application/json"))
        self.assertRegex(body.decode(), r'^\{"pid":\d+\}$')
        self.assertEqual(self.shared_central.outcome(id), ("succeeded", "x"))
        (report,) = self.shared_central.reports(id)
        self.assertEqual(list(report), ["pid", "id", "time", "status", "output"])
        self.assertEqual(report["output"], '{"output":"x"}')
        self.assertEqual(report["pid"], str(json.loads(body)["pid"]))
        self.assertGreater(float(report["time"]), 0)

    def test_an_id_may_be_a_word_and_an_input_large(self) -> None:
        word = f"unit-{self.new_id()}_A"
        sparse = {"id": word, "action": "echo", "input": "[1,2]", "status": 1}
        self.assertEqual(self.shared.do(sparse), ("succeeded", [1, 2]))
        text = "é\u2603<&+ " * 100000
        outcome = self.shared.do(unit(self.new_id(), input=text))
        self.assertEqual(outcome, ("succeeded", text))

    def test_status_shows_what_the_node_does(self) -> None:
        id = self.new_id()
        pid = self.shared.take(unit(id, "sleeper", "0.5"))
        status = self.shared.status()
        keys = """
            version host port pid started_at uptime_seconds state reason central actions
            max_workers load_average free_memory_bytes available_memory_bytes
            fork_server running waiting failed recent counts history
        """
        self.assertEqual(list(status), keys.split())
        (running,) = [item for item in status["running"] if item["id"] == id]
        self.assertLess(running.pop("seconds"), 5)
        time_form = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
        self.assertRegex(running.pop("started_at"), time_form)
        wanted = {"job_id": 1, "action": "sleeper", "stage": "process", "pid": pid}
        self.assertEqual(running, {"id": id, "input": "0.5", **wanted})
        counts = "accepted refused succeeded failed died timed_out reported"
        self.assertEqual(" ".join(status["counts"]), counts)
        central = status["central"]
        self.assertEqual(central["url"], self.shared_central.url)
        self.assertRegex(central["last_check_in_at"], time_form)
        self.shared_central.outcome(id)
        self.shared.do(unit(self.new_id(), "broken", "http://a:b@h.invalid/x.pdf?k=s"))
        failed = wait_for(lambda: self.shared.status()["failed"], "it is counted")[0]
        self.assertEqual((failed["input"], failed["outcome"]), ("x.pdf", "failed"))
        self.assertRegex(failed["ended_at"], time_form)

    def test_text_that_is_not_unicode_does_not_keep_lines_from_the_log(self) -> None:
        id = self.new_id()
        self.assertEqual(self.shared.do(unit(id, "\ud800" + "x" * 500))[0], "failed")
        wait_for(lambda: self.shared.said(f"unit {id} (\\ud800xxx"), "its lines")


@contextlib.contextmanager
def request_under_way(node: NodeProcess, unit: Any) -> Iterator[socket.socket]:
    """A connection whose POST /work the node has read, and has not answered yet."""
    query = urllib.parse.urlencode({"work_unit": json.dumps(unit)})
    head = f"POST /work?{query} HTTP/1.1\r\nContent-Length: 0\r\n"
    with socket.create_connection(("127.0.0.1", node.port), DEADLINE) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        node.get("/heartbeat")  # another request, meanwhile
        yield connection


class Reports(CrowdTest):
    def test_another_attempt_ends_one_that_is_still_being_started(self) -> None:
        node = self.node()
        pool, first = concurrent.futures.ThreadPoolExecutor(1), unit(1, "sleeper", "30")
        with pool, stopped(node.fork_server), request_under_way(node, first) as other:
            second = pool.submit(node.post, unit(1))
            self.assertEqual(read_answer(other)[0], 503)
        if second.result()[0] != 200:  # the first has made this node busy for a tick
            wait_for(lambda: node.post(unit(1))[0] == 200, "it is accepted")
        self.assertEqual(node.central.outcome(1), ("succeeded", "x"))
        self.assertEqual(node.status()["counts"]["accepted"], 1)

    def test_another_attempt_supersedes_one_that_runs_or_is_reported(self) -> None:
        node = self.node()
        central = node.central
        first, third = node.take(unit(1, "sleeper", "30")), []

        def answer(method: str, path: str, fields: Fields) -> None:
            if fields.get("status") == "failed":
                # Up to CloudCrowd 0.6 the next may come before the report is answered.
                third.append(node.take(unit(1)))

        central.answer = answer
        second = node.take(unit(1, "broken"))
        wait_for(lambda: len(central.reports(1)) == 2, "both are reported")
        wait_for(lambda: third, "the reply has been read")
        self.assertFalse(alive(first))
        reports = [(int(row["pid"]), row["status"]) for row in central.reports(1)]
        self.assertEqual(reports, [(second, "failed"), (*third, "succeeded")])

    def test_each_attempt_of_a_unit_that_is_too_large_is_reported(self) -> None:
        node = self.node(max_request_size=1)
        large, attempts, pids = unit(1, input="x" * 1100000), [1], []

        def answer(method: str, path: str, fields: Fields) -> None:
            if path == "/work/1" and attempts:  # the next comes before the answer
                pids.append(node.take({**large, "attempts": attempts.pop()}))

        node.central.answer = answer
        pids.append(node.take(large))
        wait_for(lambda: len(node.central.reports(1)) == 2, "both are reported")
        wait_for(lambda: len(pids) == 2, "the reply has been read")
        self.assertEqual({int(row["pid"]) for row in node.central.reports(1)}, {*pids})

    def test_a_late_report_of_one_attempt_leaves_the_next_alone(self) -> None:
        node = self.node(constants=FAST)
        central = node.central
        node.put_off(1)
        central.fail(500, "/work/")
        pid = node.take(node.waiter(attempts=1))
        node.take(unit(2))
        wait_for(lambda: len(central.reports(2)) == 3, "later ones are tried again")
        self.assertNotIn(b"failed", node.record(1))
        self.assertEqual(len(central.reports(1)), 1)
        central.recover()
        node.let_go()
        wait_for(lambda: len(central.reports(1)) == 2, "the second attempt's")
        self.assertEqual(central.reports(1)[1]["output"], '{"output":"seen"}')
        self.assertEqual(central.reports(1)[1]["pid"], str(pid))

    def test_a_lost_reply_withdraws_the_unit(self) -> None:
        node = self.node()
        lost = unit(1, "sleeper", "20")
        with stopped(node.fork_server), request_under_way(node, lost) as connection:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        wait_for(lambda: node.said("the reply could not be written"), "a withdrawal")
        node.settled()
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"), "it is offered again")
        self.assertEqual(len(node.central.reports(1)), 1)

    def test_an_outcome_goes_to_the_central_that_sent_its_unit(self) -> None:
        first, second = self.central(), self.central()
        node = self.node(first, constants=FAST)
        first.fail(0, "/work/")  # a reset
        node.take(unit(1))
        wait_for(lambda: len(first.reports(1)) > 1, "reports that are put off")
        second.answer = lambda method, path, fields: 404  # as any web server would
        node.write_config(central_server=second.url)
        self.assertEqual(node.run("--reload").returncode, 0)
        wait_for(lambda: second.check_ins(), "a check-in")
        node.take(unit(2))
        # A 404 counts only from a central that has taken a check-in.
        wait_for(lambda: len(second.reports(2)) > 2, "it is kept and reported again")
        self.assertEqual(node.said("central does not know it"), 0)
        first.fail(404, "/work/1")
        wait_for(lambda: node.said("central does not know it"), "unit 1 is discarded")
        wait_for(lambda: first.told("DELETE", "/node/"), "a check-out there")
        second.recover()
        wait_for(lambda: node.status()["counts"]["reported"] == 1, "unit 2 is reported")
        self.assertEqual((first.reports(2), second.reports(1)), ([], []))
        self.assertEqual(second.reports(2)[0], second.reports(2)[-1])
        node.settled()

    def test_outcomes_wait_on_disk_while_central_is_away(self) -> None:
        node = self.node(constants={"RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": 30})
        central = node.central
        node.put_off("had")
        central.stop()
        for id in range(20):
            node.take(unit(id))
        wait_for(lambda: len(node.status()["waiting"]) == 21, "all wait")
        wait_for(lambda: len(our_processes()) == 2, "no process waits")
        central.start()
        for id in range(20):  # the first success queues those that wait
            central.outcome(id)
            self.assertEqual(len(central.reports(id)), 1)
        self.assertEqual(len(central.reports("had")), 1, "central had that one")

    def test_a_death_that_cannot_be_written_down_is_reported_late(self) -> None:
        if not hasattr(resource, "prlimit"):
            self.skipTest("needs prlimit")
        # The first can be written down after a while, the second can't.
        for limit, sentence in ((60, "killed by SIGKILL"), (0.2, "no fork server")):
            with self.subTest(limit):
                constants = {"RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": limit}
                node = self.node(constants=constants)
                pid = node.take(unit(1, "sleeper", "60"))
                with no_room(node.pid):
                    os.kill(pid, signal.SIGKILL)
                    wait_for(lambda: len(node.status()["waiting"]), "its end is known")
                    wait_for(lambda: limit == 60 or node.central.reports(1), "a report")
                    node.go_on(0.5)
                    self.assertEqual(len(node.central.reports(1)), int(limit < 1))
                self.assertIn(sentence, node.central.outcome(1)[1])
                node.settled()
                self.assertEqual(len(node.central.reports(1)), 1)

    def test_an_output_that_is_nested_too_deeply_fails_its_unit(self) -> None:
        for start, inner, end in ("[", "", "]"), ('{"a":', "1", "}"), ("[1,", "1", "]"):
            output = start * 99 + inner + end * 99
            encoded = json.loads(crowdnode.encode_output(json.loads(output)))
            self.assertEqual(encoded, {"output": json.loads(output)})
            with self.assertRaisesRegex(crowdnode.ActionFailed, "more than 99 deep"):
                crowdnode.encode_output(json.loads(f"{start}{output}{end}"))

    def test_a_report_that_is_too_much_for_central_is_given_up(self) -> None:
        central = self.central()
        central.answer = lambda method, path, fields: (
            500 if path == "/work/1" and fields["status"] == "succeeded" else None
        )
        constants = {"RETRY_WAIT": 0.05, "RETRY_WAIT_LIMIT": 0.05}
        node = self.node(central, constants=constants)
        reports = functools.partial(central.reports, 1)
        node.take(unit(1, "echo", "\u20ac" * 5000))
        wait_for(lambda: len(reports()) > 3, "no other report has been taken")
        self.assertEqual({report["status"] for report in reports()}, {"succeeded"})
        for id in range(2, 1000):
            node.do(unit(id))
            if reports()[-1]["status"] == "failed":
                break
        node.settled()
        output = reports()[0]["output"]
        message = json.loads(reports()[-1]["output"])["output"]
        self.assertIn("RACK_QUERY_PARSER_BYTESIZE_LIMIT", message)
        self.assertIn(f"has {len(urllib.parse.quote_plus(output))} bytes", message)
        self.assertEqual(reports().count(reports()[-1]), 1)
        node.stop()
        del central.calls[:]
        node.constants["CHECK_IN_INTERVAL"] = 0.05
        node.start().take(unit(1))  # alone, while central takes check-ins
        wait_for(lambda: reports() and reports()[-1]["status"] == "failed", "no more")

    def test_a_node_without_memory_refuses_and_checks_in(self) -> None:
        fault = Expression("lambda self: (_ for _ in ()).throw(MemoryError)")
        node = self.node(constants={"NodeHandler.read_body": fault})
        status, _, body = node.post(unit())
        self.assertEqual((status, body), (503, b"Node Overloaded"))
        wait_for(lambda: len(node.central.check_ins()) > 1, "another check-in")
        self.assertEqual(node.said("Traceback"), 0)


class LateCentral(Central):
    """A central that commits late, as CloudCrowd 0.7 does.

    Its dispatcher posts a unit, reads the reply, and commits the pid a while later,
    over whatever a report has changed meanwhile; then it posts the next unit.  Other
    threads take the reports.  retries: how often a unit is tried."""

    DELAYS = (0.002, 0.01, 0.07, 0.3)  # seconds from the reply to the commit
    WEIGHTS = (75, 20, 4, 1)

    def __init__(self, actions: list[str], retries: int) -> None:
        row = {"status": "processing", "attempts": 0, "pid": None}
        self.rows: list[dict[str, Any]] = [
            {"id": id, "action": action, **row} for id, action in enumerate(actions)
        ]
        self.retries = retries
        self.random = random.Random(12)
        self.node = ""  # HOST:PORT, while it accepts work
        self.room = 0
        self.changed = threading.Condition()
        super().__init__()
        self.listed = self.pids
        threading.Thread(target=self.dispatch, daemon=True).start()

    def pids(self) -> list[int]:
        """The pids of all rows: they use up the node's max_workers."""
        return [row["pid"] for row in self.rows if row["pid"] is not None]

    def next_row(self) -> dict[str, Any] | None:
        """The first row that is available, if the node can take it."""
        for row in self.rows:
            is_available = row["status"] == "processing" and row["pid"] is None
            if is_available and self.node and len(self.pids()) < self.room:
                return row
        return None

    def dispatch(self) -> None:
        while True:
            with self.changed:
                row = self.changed.wait_for(self.next_row)
                assert row
                believed = dict(row)
                host, _, port = self.node.rpartition(":")
            body = unit(row["id"], row["action"], attempts=row["attempts"])
            with socket.create_connection((host, int(port)), DEADLINE) as connection:
                connection.sendall(work_request(body))
                status, _, reply = read_answer(connection)
            if status == 200:
                time.sleep(self.random.choices(self.DELAYS, self.WEIGHTS)[0])
            with self.changed:
                if status == 200:
                    row.update(believed, pid=int(json.loads(reply)["pid"]))
                else:
                    self.node = ""  # it is busy until it checks in again

    def usual_answer(self, handler: Any, fields: Fields) -> int:
        status = super().usual_answer(handler, fields)
        _, kind, name = handler.path.split("/", 2) if status == 204 else ("", "", "")
        with self.changed:
            if kind == "node":
                is_there = handler.command == "PUT" and fields["busy"] == "false"
                self.node = name if is_there else ""
                self.room = int(fields.get("max_workers", 0))
            elif kind == "work":  # a report is not idempotent: see protocol.md
                row = self.rows[int(name)]
                row.update(attempts=row["attempts"] + 1, pid=None)
                if fields["status"] == "succeeded" or row["attempts"] >= self.retries:
                    row["status"] = fields["status"]
            self.changed.notify_all()
        return status


LONG = {"SUCCESS_HOLD": 60, "FAILURE_HOLD": 60, "HOLD_LIMIT": 60}
HASTY = {**FAST, "STUCK_AFTER": 0.05}  # a pid that is still listed is stuck soon


def stuck(central: Central, *ids: int, until: int = 2) -> list[int]:
    """The pids of those units that were reported, but fewer than *until* times."""
    reports = [central.reports(id) for id in ids]
    return [int(found[0]["pid"]) for found in reports if 0 < len(found) < until]


class Holds(CrowdTest):
    """Reports that central might not, or did not, take in."""

    def test_every_unit_ends_and_none_stays_listed(self) -> None:
        central = LateCentral(["echo", "broken"] * 40, retries=2)
        self.addCleanup(central.close)
        constants = {"SUCCESS_HOLD": 0.03, "FAILURE_HOLD": 0.1, "HOLD_LIMIT": 0.2}
        # The interval is longer than a commit may be late.
        constants.update(STATUS_INTERVAL=0.4, STUCK_AFTER=0.15)
        self.node(central, max_workers=30, constants=constants)

        def results() -> dict[Any, int]:
            with central.changed:
                rows = [tuple(row.values())[1:] for row in central.rows]
            return dict(collections.Counter(rows))

        good, bad = ("echo", "succeeded", 1, None), ("broken", "failed", 2, None)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: results() == {good: 40, bad: 40}, "all units end")
        self.assertEqual(results(), {good: 40, bad: 40})

    def test_a_pid_that_is_still_listed_is_reported_again(self) -> None:
        """And the hold doubles."""
        node = self.node(constants={**HASTY, "FAILURE_HOLD": 0.25})
        central = node.central
        running = node.take(unit(2, "waiter", node.path("stay")))
        others = [*range(10**7, 10**7 + 50), running]
        central.listed = lambda: others + stuck(central, 1)
        node.take(unit(1))
        wait_for(lambda: len(central.reports(1)) == 2, "it is reported again")
        self.assertEqual(central.reports(1)[0], central.reports(1)[1])
        wait_for(lambda: set(node.units()) == {"2", "2.out"}, "its record is removed")
        self.assertEqual(len(central.reports(1)), 2)
        self.assertEqual(central.reports(2), [], "that one is running")
        sent = time.monotonic()
        node.do(unit(3, "broken"))
        self.assertGreaterEqual(time.monotonic() - sent, 0.5)
        open(node.path("stay"), "w").close()
        central.outcome(2)

    def test_a_record_is_dropped_when_two_looks_in_a_row_did_not_list_it(self) -> None:
        node = self.node(constants=HASTY)
        central = node.central
        central.listed_elsewhere = lambda: stuck(central, 1, 2)  # at another node
        for id, listed_at in ((1, 3), (2, 2)):
            looks: list[int] = []  # after its report

            def listed() -> list[int]:
                looks.extend(stuck(central, id))
                return stuck(central, id) if len(looks) == listed_at else []

            central.listed = listed
            node.do(unit(id))
            node.settled()
            self.assertEqual(len(central.reports(id)), id)

    def test_a_kill_forgets_no_report_and_a_check_out_all(self) -> None:
        node = self.node(constants={**HASTY, "STATUS_INTERVAL": 600})
        central = node.central
        node.write_config(port=node.port)

        def kill_after(*units: dict[str, Any]) -> None:
            for item in units:
                node.do(item)
                wait_for(lambda: b"\nreported" in node.record(item["id"]), "a record")
            node.kill()

        kill_after(unit(4))
        wait_for(lambda: not our_processes(), "no worker lives")
        node.start()
        self.assertEqual(node.units(), [])
        node.take(node.waiter())
        kill_after(unit(2), unit(3, "broken"))
        central.listed = lambda: stuck(central, 2, 3, 4)
        node.constants["STATUS_INTERVAL"] = 0.1
        node.start()
        for id in (2, 3):
            wait_for(lambda: len(central.reports(id)) == 2, "it is reported again")
            self.assertEqual(central.reports(id)[0], central.reports(id)[1])
        node.let_go()
        node.settled()
        self.assertEqual([len(central.reports(id)) for id in (2, 3, 4)], [2, 2, 1])
        self.assertEqual(len(central.told("DELETE", "/node")), 2, "once a worker lived")

    def test_a_status_that_hangs_blocks_nothing_else(self) -> None:
        node = self.node(constants=HASTY)
        central, go_on = node.central, threading.Event()
        self.addCleanup(go_on.set)
        central.listed = lambda: [int(go_on.wait(60))]
        node.do(unit(1))
        wait_for(lambda: central.looks, "a look")
        looked, touched = time.time(), node.path("state", "node.pid")
        wait_for(lambda: os.stat(touched).st_mtime > looked + 0.3, "several ticks")
        self.assertEqual(node.do(unit(2)), ("succeeded", "x"))
        self.assertEqual(len(central.looks), 1, "one at a time")
        node.stop()
        self.assertEqual(central.calls[-1][0], "DELETE")

    def test_a_status_or_second_report_that_fails_is_logged_and_repeated(self) -> None:
        central = self.central()
        wrong = [b"<html>", b"[]", b'{"nodes": 1}']
        right = central.status_text
        answers = [500, 0]

        def answer(method: str, path: str, _: Fields) -> int | None:
            if path == "/status" and answers:
                return answers.pop()
            return 500 if path == "/work/1" and len(central.reports(1)) == 2 else None

        central.answer = answer
        central.status_text = (  # type: ignore[method-assign]
            lambda: wrong.pop() if wrong else right()
        )
        central.listed = lambda: [*stuck(central, 1, until=3), *stuck(central, 2)]
        node = self.node(central, constants=HASTY)
        for id in (1, 2):
            node.take(unit(id))
        for id, reports in ((1, 3), (2, 2)):
            wait_for(lambda: len(central.reports(id)) == reports, "another report")
        self.assertEqual(node.said("can't look for lost reports"), 5)
        self.assertEqual(node.said("can't be reported again"), 1)
        self.assertFalse(node.said("Traceback"))

    def test_a_success_is_held_until_the_next_unit_arrives(self) -> None:
        node = self.node(constants=LONG)
        central = node.central

        def waiting() -> list[int]:
            return [item["id"] for item in node.status()["waiting"]]

        for id, action, held in (
            (1, "echo", [1]),
            (2, "broken", [2]),
            (3, "echo", [2, 3]),
        ):
            node.take(unit(id, action))
            wait_for(lambda: waiting() == held, "it is held, and no other")
        node.take(unit(4))
        self.assertEqual(central.outcome(3), ("succeeded", "x"))
        self.assertEqual(len(central.reports(1)), 1)
        self.assertEqual(central.reports(2), [], "no unit releases a failure")

    def test_a_report_is_held_for_a_time_that_starts_with_the_reply(self) -> None:
        times: dict[Any, float] = {}

        def note_time(method: str, path: str, _: Fields) -> None:
            times.setdefault(path, time.monotonic())

        node = self.node(constants={"SUCCESS_HOLD": 2, "FAILURE_HOLD": 0.7})
        node.central.answer = note_time
        for id, action in enumerate(("sleeper", "broken", "echo")):
            times[id] = time.monotonic()
            node.take(unit(id, action, "2.1"))
        for id, earliest in enumerate((2.1, 0.7, 2)):
            node.central.outcome(id)
            self.assertGreaterEqual(times[f"/work/{id}"] - times[id], earliest)
        # Not 2.1 + 2 for the first: it ran longer than its hold.
        self.assertLess(times["/work/0"] - times[0], 4.1)

    def test_a_death_is_on_disk_before_its_report_is_held(self) -> None:
        for end in (NodeProcess.kill, NodeProcess.stop):
            with self.subTest(end.__name__):
                node = self.node(constants=LONG)
                central = node.central
                os.kill(node.take(unit(1, "sleeper", "60")), signal.SIGABRT)
                wait_for(lambda: len(node.status()["waiting"]) == 1, "it is held")
                central.fail(500, "/node/", "DELETE")  # so that a stop releases nothing
                end(node)
                central.recover()
                node.constants.update(FAILURE_HOLD=0.01)
                node.start()
                self.assertIn("killed by SIGABRT", central.outcome(1)[1])

    def test_the_dialect_seed_has_no_hold_and_no_look_at_the_status(self) -> None:
        central = self.central(seed=True)
        node = self.node(central, dialect="seed", constants=LONG)
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        self.assertEqual(node.do(unit(2, "broken"))[0], "failed")
        node.settled()
        self.assertEqual(central.looks, [])

    def test_the_hold_doubles_up_to_its_limit_and_halves_again(self) -> None:
        hold = crowdnode.ReportHold(unittest.mock.Mock())
        for _ in range(20):
            before = hold.factor
            hold.found()
            self.assertLessEqual(hold.factor, 2 * before)
        most, memory = crowdnode.HOLD_LIMIT / crowdnode.SUCCESS_HOLD, 600
        self.assertEqual((hold.factor, crowdnode.HOLD_MEMORY), (most, memory))
        now = time.monotonic()
        for later, halvings in ((540, 0), (601, 1), (660, 1), (1202, 2)):
            hold.relax(now + later)
            self.assertEqual(hold.factor, most / 2**halvings)


# ---------------------------------------------------------------------------
# What the node shows
# ---------------------------------------------------------------------------


class Shown(CrowdTest):
    def test_the_page_shows_all_and_runs_nothing_that_a_unit_brings(self) -> None:
        node = self.node(None, tag="the <tag>", **{"action sleeper": "time_limit = 60"})
        central = node.central
        node.take(unit(1, "sleeper", "60"))
        node.do(unit(2, "broken"))
        node.do(unit(3, "<script>alert(1)</script>"))
        central.answer = lambda method, path, _: (
            500 if path in ("/work/4", "/status") else None
        )
        node.take(unit(4))
        wait_for(lambda: central.reports(4), "a report that is put off")
        wait_for(lambda: node.status()["central"]["error"], "what central answered")
        _, headers, body = node.get("/")
        page = body.decode()
        for text in (
            f"<h1>127.0.0.1:{node.port}</h1>",
            "the &lt;tag&gt;",
            f"<title>central away · 127.0.0.1:{node.port}</title>",
            "Central is away: it answered 500",
            'max="60"',
            "ValueError: it broke (broken.py, line 6, in process)",
            "no action named &lt;script&gt;alert(1)",
            "<b>1/50</b>Running",
            "<b>2</b>Failed",
            "<b>1</b>Waiting for central",
        ):
            self.assertIn(text, page)
        self.assertNotIn("<script>alert", page)
        self.assertEqual(re.findall(r"(?:src|href)=\W*http", page), [])
        policy = headers["Content-Security-Policy"]
        self.assertIn("default-src 'none'", policy)
        for tag in ("style", "script"):
            (text,) = re.findall(f"(?s)<{tag}>(.*)</{tag}>", page)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertIn(f"{tag}-src 'sha256-{digest}'", policy)

    def test_the_last_hour_is_kept_a_minute_each(self) -> None:
        counters = crowdnode.Counters()
        for minute in range(70):
            counters.add_minute(1.0, None)
            self.assertEqual(len(counters.history), min(60, minute))
            counters._minute_began -= 60
            counters.outcomes["echo", "succeeded"] = 10 * minute + 10
        last = counters.history[-1]
        self.assertEqual((last["load_average"], last["free_memory_bytes"]), (1.0, None))
        self.assertEqual(round(last["units_per_minute"]), 10)
        times = [crowdnode.duration(n) for n in (0.04, 9.94, 119, 150, 7200, 200_000)]
        words = ["0.04 s", "9.9 s", "119 s", "2.5 min", "2 h", "2.3 d"]
        self.assertEqual(times, words)

    def test_metrics_say_what_the_status_says(self) -> None:
        node = self.node()
        for id, action in enumerate(("echo", "echo", "echo", "broken", 'odd"\n')):
            node.do(unit(id, action))
        node.settled()
        _, headers, body = node.get("/metrics")
        self.assertIn("text/plain; version=0.0.4", headers["Content-Type"])
        lines = body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")
        counts = {
            'units_total{action="echo",outcome="succeeded"}': 3,
            'units_total{action="echo",outcome="died"}': 0,
            'units_total{action="broken",outcome="failed"}': 1,
            'units_total{action="unknown",outcome="failed"}': 1,
            "max_workers": 50,
            "accepting": 1,
            "central_up": 1,
            'unit_duration_seconds_count{action="echo",stage="process"}': 3,
            'unit_duration_seconds_bucket{action="echo",stage="process",le="+Inf"}': 3,
            'unit_duration_seconds_count{action="unknown",stage="process"}': 1,
        }
        wanted = {f"crowdnode_{name}": str(value) for name, value in counts.items()}
        self.assertEqual({**values, **wanted}, values)
        suffix = r"(_bucket|_sum|_count)?(\{.*)?$"
        families = {re.sub(suffix, "", name) for name in values}
        typed = [line.split()[2] for line in lines if line.startswith("# TYPE ")]
        self.assertEqual(sorted(families), sorted(typed))
        readme = crowdnode.read_file(os.path.join(HERE, "README.md")).decode()
        for name in re.findall(r"crowdnode_[a-z]\w+", readme):
            self.assertIn(name, families)
        text = crowdnode.metrics_text({**node.status(), "host": '"\\\n'}, {}, {})
        self.assertIn(r'host="\"\\\n"} 1', text)


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"


def raw(line: bytes, rest: bytes = b"") -> bytes:
    """A request with that first line."""
    return line + b" HTTP/1.1\r\n" + rest + b"\r\n"


def post(body: bytes, path: bytes = b"/work", header: bytes = FORM) -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return raw(b"POST " + path, header + length) + body


BAD_UNITS: dict[str, list[Any]] = {
    "id": [None, "../x", "a\0", "x" * 65, 1.5, True],
    "job_id": ["../1"],
    "status": [2, "1", True],
    "input": [3],
    "action": [3],
    "options": [[]],
}
BAD_REQUESTS: list[tuple[bytes, int, str]] = [
    *(
        (work_request({**unit(), key: value}), 400, f"the unit's {key} is ")
        for key, values in BAD_UNITS.items()
        for value in values
    ),
    (post(b"x=1"), 400, "no field work_unit"),
    (post(b"work_unit=%7Bnot+json"), 400, "not JSON"),
    (post(b"work_unit=null"), 400, "not a JSON object"),
    (post(b"work_unit=%FF"), 400, "not UTF-8"),
    (post(b"&".join([b"x=1"] * 1001)), 400, "The form can't be read"),
    (work_request("[" * 10000 + "]" * 10000), 400, "not JSON"),
    (work_request(json.dumps(unit(options={"n": float("nan")}))), 400, "NaN"),
    (work_request('{"id": 1e999}'), 400, "1e999 is out of range"),
    (work_request(unit(), "Origin: http://x\r\n"), 403, "A web page"),
    (work_request(unit(), "Sec-Fetch-Site: same-origin\r\n"), 403, "A web page"),
    (b"HELLO\r\n\r\n", 400, "is not METHOD PATH HTTP"),
    (raw(b"GET /", b"no colon\r\n"), 400, "A header is not NAME: VALUE"),
    (raw(b"GET /", (b"a: %s\r\n" % (b"x" * 60000)) * 99), 431, "exceeds 65536 bytes"),
    (raw(b"GET /" + b"x" * 70000), 414, "exceeds 65536 bytes"),
    (raw(b"POST /work"), 411, "Content-Length"),
    (raw(b"POST /work", b"Transfer-Encoding: chunked\r\n"), 411, "Content-Length"),
    (raw(b"POST /work", b"Content-Length: -1\r\n"), 400, "Content-Length"),
    (post(b"x" * 1100000), 413, "over max_request_size, 1 MB"),
    (post(b"work_unit=" + b"x" * 1100000), 413, "over max_request_size, 1 MB"),
    (raw(b"GET http://[x/"), 400, "can't be read"),
    (raw(b"GET /nowhere"), 404, "Not Found"),
    *((raw(verb + b" /work"), 405, "POST") for verb in (b"GET", b"DELETE", b"OPTIONS")),
    (post(b"_method=NONSENSE", b"/heartbeat"), 405, "/heartbeat accepts only GET, "),
    (post(b"_method=GET&work_unit=%7B%7D"), 405, "/work accepts only POST"),
]
HEARTBEATS = [
    raw(b"GET /heartbeat"),
    raw(b"GET /heartbeat?x=1"),
    b"GET /heartbeat HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    raw(b"GET http://node1.example:9063/heartbeat"),
    b"\r\n" + raw(b"GET /heartbeat"),
    post(b"_method=GET", b"/heartbeat"),
    post(b"", b"/heartbeat", b"X-HTTP-Method-Override: get\r\n"),
]


class Routes(SharedNode):
    options = {"max_request_size": 1}

    def test_bad_requests_get_a_status_and_a_sentence(self) -> None:
        for request, status, sentence in BAD_REQUESTS:
            with self.subTest(request[:200]):
                answer = self.shared.send(request)
                self.assertEqual(answer[0], status, answer)
                self.assertIn(sentence, answer[2].decode())
        self.assertNotIn("Traceback", self.shared.log())

    def test_the_odd_requests_of_the_wire_are_answered_as_there(self) -> None:
        for request in HEARTBEATS:
            with self.subTest(request):
                self.assertEqual(self.shared.send(request)[::2], (200, b"buh-bump"))
        self.assertEqual(self.shared.send(raw(b"HEAD /nowhere"))[::2], (404, b""))
        headers = self.shared.send(raw(b"PUT /status"))[1]
        self.assertEqual(headers["Allow"], "GET, HEAD")
        status, headers, body = self.shared.send(raw(b"HEAD /heartbeat"))
        self.assertEqual((status, headers["Content-Length"], body), (200, "8", b""))

    def test_a_request_that_ends_early_is_a_bad_request(self) -> None:
        body = b"POST /work HTTP/1.1\r\nContent-Length: 10\r\n\r\nwork"
        for request, what in (
            (body, b"body"), (b"GET / HTTP/1.1\r\n", b"head"), (b"\r\n", b"head"),
        ):  # fmt: skip
            address = ("127.0.0.1", self.shared.port)
            with socket.create_connection(address, DEADLINE) as connection:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                answer = read_answer(connection)[::2]
            sentence = b"The %s has ended too early." % what
            self.assertEqual(answer, (400, sentence), request)

    def test_a_unit_that_is_too_large_is_accepted_and_reported_failed(self) -> None:
        outcome = self.shared.do(unit(self.new_id(), input="x" * 1100000))
        reason = "The request is over max_request_size, 1 MB."
        self.assertEqual(outcome, ("failed", reason))


class Connections(CrowdTest):
    def test_credentials_are_answered_as_on_the_wire(self) -> None:
        node = self.node(self.central(login=PAIR), **LOGIN)
        bodies = {200: b"buh-bump", 400: b"Bad Request", 404: b"Not Found"}
        bodies[401] = b"Authorization Required"
        for path, header, status in (
            ("/heartbeat", "", 401),
            ("/heartbeat", "Basic YWxpIGNlOndyb25n", 401),
            ("/heartbeat", "Basic YWxpIGNl", 401),
            ("/heartbeat", BASIC, 200),
            ("/heartbeat", BASIC.replace("B", "b", 1), 200),
            ("/heartbeat", "Digest username=x", 400),
            ("/heartbeat", "Basic", 400),
            ("/heartbeat", "Basic ?!", 400),
            ("/nowhere", BASIC, 404),
        ):
            with self.subTest(path=path, header=header):
                line = f"Authorization: {header}\r\n" if header else ""
                answer = node.send(f"GET {path} HTTP/1.1\r\n{line}\r\n".encode())
                self.assertEqual(answer[::2], (status, bodies[status]))
                realm = 'Basic realm="CloudCrowd"' if status == 401 else None
                self.assertEqual(answer[1].get("WWW-Authenticate"), realm)

    def test_a_node_may_listen_on_ipv6(self) -> None:
        if not os.path.exists("/proc/net/if_inet6"):
            self.skipTest("needs IPv6")
        self.assertEqual(self.node(bind="::1").run("--status").returncode, 0)

    def test_an_address_that_allow_leaves_out_is_answered_unread(self) -> None:
        node = self.node(allow="192.0.2.7, 127.0.0.0/8")
        self.assertEqual(node.get("/heartbeat")[0], 200)
        node.write_config(allow="192.0.2.0/24")
        node.run("--reload")
        wait_for(lambda: node.said("reloaded"), "a reload")
        sentence = b"127.0.0.1 is not in this node's allow."
        self.assertEqual(node.send(b"")[::2], (403, sentence))
        self.assertEqual(node.run("--status").returncode, 4)

    def test_a_request_has_a_deadline_however_it_drips(self) -> None:
        node = self.node(constants={"REQUEST_DEADLINE": 0.5})
        with socket.create_connection(("127.0.0.1", node.port)) as connection:
            connection.sendall(b"POST /work HTTP/1.1\r\nContent-Le")
            began = time.monotonic()
            while not select.select([connection], [], [], 0.05)[0]:
                connection.sendall(b"n")
                self.assertLess(time.monotonic() - began, DEADLINE)
            status, _, body = read_answer(connection)
        self.assertEqual((status, body), (408, b"The request was too slow."))

    def test_central_gets_in_past_a_crowd_of_silent_connections(self) -> None:
        node = self.node(constants={"MAX_CONNECTIONS": 10})
        with contextlib.ExitStack() as stack:
            address = ("127.0.0.1", node.port)
            crowd = [socket.create_connection(address) for _ in range(30)]
            silent = [stack.enter_context(connection) for connection in crowd]
            self.assertEqual(node.do(unit()), ("succeeded", "x"))
            self.assertEqual(read_answer(silent[0])[0], 408)

    def test_a_thousand_connections_at_once_wait_for_a_busy_node(self) -> None:
        path = "/proc/sys/net/core/somaxconn"
        if not os.path.exists(path) or int(crowdnode.read_file(path)) < 1000:
            self.skipTest("needs a kernel with as long a queue")
        node = self.node()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        crowdnode.raise_descriptor_limit()
        with contextlib.ExitStack() as stack, stopped(node.pid):
            for _ in range(1000):  # one that finds no place is silent for 1 s
                connection = socket.create_connection(("127.0.0.1", node.port), 0.9)
                stack.enter_context(connection)

    def test_a_large_form_of_percent_escapes_takes_little_memory(self) -> None:
        def peak() -> int:
            with open(f"/proc/{node.pid}/status") as file:
                return int(re.findall(r"VmHWM:\s+(\d+) kB", file.read())[0]) // 1024

        if not HAS_PROC:
            self.skipTest("needs /proc")
        node = self.node()
        before = peak()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(node.send, post(b"work_unit=" + b"%78" * 7_000_000))
            while not answer.done():
                began = time.monotonic()
                self.assertEqual(node.get("/heartbeat")[2], b"buh-bump")
                self.assertLess(time.monotonic() - began, 3)
        self.assertEqual(answer.result()[0], 400)
        self.assertLess(peak() - before, 400)


# ---------------------------------------------------------------------------
# A central server for one job
# ---------------------------------------------------------------------------


class Run(CrowdTest):
    """Jobs of --run."""

    def test_one_file_in_an_empty_environment_is_enough(self) -> None:
        home, license, odd = self.directory(), f"{HERE}/LICENSE", "é %25?x=1#.txt"
        shutil.copy(license, os.path.join(home, odd))
        program = [sys.executable, shutil.copy(PROGRAM, home), "--run", "word_count"]
        before, words = os.listdir(home), len(crowdnode.read_file(license).split())
        env = {MARK.partition("=")[0]: str(os.getpid()), "HOME": home, "TMPDIR": home}
        job = [*program, odd, crowdnode.file_url(license)]
        done = run(job, cwd=home, env=env)
        self.assertEqual((done.returncode, json.loads(done.stdout)), (0, [2 * words]))
        self.assertEqual(os.listdir(home), before, "files are left")

    def test_outputs_come_in_the_order_of_inputs_with_a_bar_that_fits(self) -> None:
        path = os.path.join(self.directory(), "outputs")
        options = self.with_actions(slow=echo("time.sleep(0.02); return self.input"))
        strings = [f"string {number}" for number in range(100)]
        job = [*options, "--output", path, "--strings", "--run", "slow", *strings]
        running = r"\[#+ *\] \d+ of 100 done, 0 failed, \d+ running"
        shorter = r"\d+ of 100 done, 0 failed, \d+ running"
        for columns, words in (
            (200, rf"{running}, [\d.]+/s, .* left"), (60, shorter), (30, "of 100 done"),
        ):  # fmt: skip
            script = f'stty cols {columns} <&2; exec "$@" >/dev/null'
            shown = self.on_terminal("sh", "-c", script, "sh", *program(), *job)
            self.assertEqual(json.loads(crowdnode.read_file(path)), strings)
            self.assertRegex(shown, rf"\r.*{words}")
            self.assertIn("100 of 100 done", shown)
            bars = re.findall(r"\r\x1b\[K([^\r\n]*)(?=\r(?!\n))", shown)
            self.assertLess(max(map(len, bars)), columns)

    def test_an_input_that_fails_is_named_after_its_attempts(self) -> None:
        process = "print('attempt', self.options['attempts']); return int(self.input)"
        options = self.with_actions(odd=echo(process))
        for settings, attempts in (([], 3), (["--set", "work_unit_retries=1"], 1)):
            done = self.job(*options, *settings, "--strings", "--run", "odd", *"1x2")
            self.assertEqual((done.returncode, done.stdout), (1, "[1, null, 2]\n"))
            tries = "3 tries" if attempts == 3 else "1 try"
            reason = "x: ValueError: invalid literal for int() with base 10: 'x'"
            place = f"{reason} ({tries})\n    odd.py, line 7, in process\n"
            self.assertEqual(done.stderr.count(place), 1, done.stderr)
            self.assertNotIn("Traceback", done.stderr)
            for name, times in (("1", 1), ("x", attempts), ("2", 1)):
                self.assertEqual(done.stderr.count(f"{name}: attempt "), times)

    def test_a_job_goes_through_split_process_and_merge(self) -> None:
        options = self.with_actions(pieces=PIECES)
        job = [*options, "--strings", "--run", "pieces", "a bb ccc", "dddd eeeee"]
        done = self.job(*job)
        self.assertEqual(json.loads(done.stdout), [[1, 2, 3, 4, 5]], done.stderr)

    def test_options_and_inputs_may_stand_in_any_order(self) -> None:
        action = ECHO.replace("self.input", "[self.input, self.options['k']]")
        job = self.with_actions(echo=action)
        job += ["--set", "local_storage_path=/dev/null/x"]  # is not used
        job += ["a", "--strings", "--options", '{"k": "é"}', "--run", "echo", "-", "b"]
        done = self.job(*job, "--quiet", "--", "-x", input="one\ntwo words\n")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        wanted = [[text, "é"] for text in ("a", "one", "two words", "b", "-x")]
        self.assertEqual(json.loads(done.stdout), wanted)

    def test_an_input_that_cannot_be_sent_fails_alone(self) -> None:
        options = self.with_actions(echo=ECHO)
        options += ["--set", "max_request_size=1", "--strings", "--run", "echo"]
        done = self.job(*options, b"caf\xff", "-", "good", input="x" * 1100000)
        self.assertEqual((done.returncode, done.stdout), (1, '[null, null, "good"]\n'))
        self.assertIn("the output is not JSON: ", done.stderr)
        self.assertIn("The request is over max_request_size, 1 MB.", done.stderr)

    def test_json_lines_come_as_inputs_end_and_a_split_is_one_input(self) -> None:
        action = SLEEPER.replace("float(self.input)", "self.input == 'slow' and 60")
        options = [*self.with_actions(sleeper=action), "--json-lines", "--strings"]
        job: Any = [*options, "--run", "sleeper", "slow", "quick"]
        with self.started_job(*job) as (job, _):
            self.assertTrue(select.select([job.stdout], [], [], DEADLINE)[0])
            line = job.stdout.readline()
            job.send_signal(signal.SIGINT)
            self.assertEqual(job.communicate(timeout=DEADLINE)[0], b"")
        self.assertEqual(json.loads(line), {"input": "quick", "output": "slept"})
        options = [*self.with_actions(pieces=PIECES), "--json-lines", "--strings"]
        done = self.job(*options, "--quiet", "--run", "pieces", "a bb", "ccc")
        found = {line["input"]: line["output"] for line in map(json.loads,
                 done.stdout.splitlines())}  # fmt: skip
        self.assertEqual(found, {"a bb": [1, 2], "ccc": [3], None: [1, 2, 3]})

    def test_what_is_odd_about_a_job_is_said(self) -> None:
        slow = echo("print('half', end='')")
        slow += "\ntime.sleep(1.2)\n"
        options = self.with_actions(slow=slow, other="import nosuch", bad="import no")
        done = self.job(*options, "--strings", "--run", "slow", "x")
        self.assertEqual((done.returncode, done.stdout), (0, "[null]\n"))
        self.assertRegex(done.stderr, r"slow\.py takes [1-9]")
        for sentence in ("x: half\n", "nothing for 1 of 1 unit"):
            self.assertIn(sentence, done.stderr)
        path = write_script(options[1].partition("=")[2], "dos.sh", "")
        write_file(path, "#!/bin/sh\r\n")
        for name, reason in (("bad", "ModuleNotFoundError: No mod"), ("dos", "its fi")):
            done = self.job(*options, "--strings", "--run", name, "x")
            self.assertEqual(done.returncode, 2)
            self.assertRegex(done.stderr, rf"{name}\.\w+ is left out: {reason}")
            self.assertNotIn("nosuch", done.stderr)
        merge = PIECES.replace("return self.input\n\n", "").rstrip() + "[0] / 0\n"
        failing = merge.replace("        return len(self.input)", "        return 1")
        options = self.with_actions(pieces=failing)
        done = self.job(*options, "--strings", "--run", "pieces", "a b")
        self.assertIn("merge: ZeroDivisionError: division by zero (3 ", done.stderr)
        self.assertIn("2 of 2 done, 1 failed", done.stderr)
        gone = os.path.join(self.directory(), "gone.txt")
        job = [*self.with_actions(echo=ECHO), "--run", "echo"]
        done = self.job(*job, crowdnode.file_url(gone))
        line = f"file://{gone}: can't download it: No such file or directory (3 tries)"
        self.assertIn(line, done.stderr.splitlines())

    def test_what_an_action_prints_is_shown_and_its_failure_once(self) -> None:
        body = """print("working...", end="", flush=True)
        try:
            1 / 0
        except ZeroDivisionError:
            traceback.print_exc()
        print("important", flush=True)
        return sub.deep.fail()"""
        own = f"{echo(body)}\nimport traceback, sub.deep\n"
        options = self.with_actions(own=own)
        os.mkdir(place := os.path.join(options[1].partition("=")[2], "sub"))
        fail = "def fail():\n    raise ValueError('line 1\\nline 2')\n"
        write_file(os.path.join(place, "deep.py"), fail)
        options += ["--set", "work_unit_retries=1", "--strings"]
        done = self.job(*options, "--run", "own", "x://a b@c")
        shown = done.stderr.splitlines()
        for line in ("working...Traceback (most recent call last):", "important"):
            self.assertIn(f"x://a b@c: {line}", shown)
        number = shown.index("x://a b@c: ValueError: line 1 line 2 (1 try)")
        self.assertEqual(shown[number + 2], "    sub/deep.py, line 2, in fail")
        self.assertEqual(done.stderr.count("Traceback"), 1)

    def test_names_need_not_be_ascii_or_utf8(self) -> None:
        place = os.path.join(os.fsencode(self.directory()), b"h\xf6me\nx")
        os.mkdir(place)
        shutil.copy(os.fsencode(PROGRAM), place)
        for name, text in (
            (b"caf\xe9.txt", "1"), (b"a b.txt", "1 2"), (b"a%20b.txt", "1 2 3"),
        ):  # fmt: skip
            write_file(os.path.join(place, name), text)
        os.mkdir(os.path.join(place, b"actions"))
        arrow = echo("print('\\u2192', self.input)")
        write_file(os.path.join(place, b"actions", b"arrow.py"), arrow)
        key, _, value = MARK.partition("=")
        env: dict[Any, Any] = {key: value, "HOME": place, "TMPDIR": place}
        env.update({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "iso-8859-1"})
        command: list[Any] = [sys.executable, os.path.join(place, b"crowdnode.py")]
        command.append("--run")
        names = b"\xef\xbb\xbfa b.txt\r\n\r\ncaf\xe9.txt\n"
        for job, data, wanted in (
            (["word_count", "-"], names, b"[3]\n"),
            (["word_count", "a%20b.txt"], b"", b"[3]\n"),
            (["arrow", "--strings", "-"], b"\xe9\n", b"[null]\n"),
        ):
            options = {"input": data, "cwd": place, "env": env, "text": False}
            done = run([*command, *job], **options)
            self.assertEqual(done.stdout, wanted, done.stderr)

    def test_a_unit_whose_answer_is_lost_is_sent_again(self) -> None:
        posts: list[int] = []

        def answer(handler: Any) -> None:  # the first time none
            posts.append(int(handler.headers["Content-Length"]))
            if len(posts) > 1:
                handler.send_response(200)
                handler.end_headers()

        ended = unittest.mock.Mock()
        central = crowdnode.LocalCentral(crowdnode.load_config("", []), ended)
        self.addCleanup(central.server_close)
        self.addCleanup(central.shutdown)
        with web_server(answer) as url:
            port = {"port": url.rpartition(":")[2]}
            central.answer("PUT", "/node/127.0.0.1", port)
            central.start("echo", ["process"], ["x"], {})
            wait_for(lambda: len(posts) == 2, "it is sent again")
            outcome = {"status": "succeeded", "output": '{"output": 5}'}
            self.assertEqual(central.answer("PUT", "/work/1", outcome), 204)
        self.assertEqual(central.outputs(), [5])
        ended.assert_called_once()

    def test_jobs_at_the_same_time_save_to_different_places(self) -> None:
        process = "open('f', 'w').write(self.input); return self.save('f')"
        options = self.with_actions(saver=echo(process))
        options += ["--set", f"local_storage_path={self.directory()}", "--strings"]
        options += ["--run", "saver"]
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(self.job, *options, input) for input in "123"]
            urls = {json.loads(job.result().stdout)[0] for job in jobs}
        self.assertEqual(len(urls), 3)
        config, ids = crowdnode.load_config("", []), set()
        with unittest.mock.patch("time.time_ns", return_value=time.time_ns()):
            for _ in range(9):
                central = crowdnode.LocalCentral(config, print)
                central.shutdown()
                central.server_close()
                ids.add(central.job["job_id"])
        self.assertEqual(len(ids), 9)
        self.assertLess(max(ids), 2**53)  # as a double holds it


def ignore_children_and_leave_descriptors() -> None:
    """In a child: be a parent that is careless about signals, descriptors, places."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    signal.pthread_sigmask(signal.SIG_BLOCK, crowdnode.NODE_SIGNALS)
    for _ in range(1100):
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    os.chdir(place := tempfile.mkdtemp())
    os.rmdir(place)


class RunEnds(CrowdTest):
    """How a job of --run starts under any parent, and how it ends."""

    def check(self, program: str, env: dict[str, str], prepare: Any = None) -> None:
        key, _, value = MARK.partition("=")
        options: dict[str, Any] = {"env": {**env, key: value}, "close_fds": False}
        options.update(executable=sys.executable, preexec_fn=prepare, stdin=None)
        path = os.path.join(HERE, "LICENSE")
        words = f"[{len(crowdnode.read_file(path).split())}]\n"
        done = run([program, PROGRAM, "--run", "word_count", path], **options)
        self.assertEqual((done.returncode, done.stdout), (0, words), done.stderr)
        node = self.prepared()
        node.program = PROGRAM  # 3.13.0 can't import socket with -c in no directory
        done = run([program, *node.command("--daemon")[1:]], **options)
        self.assertEqual(done.returncode, 0, done.stderr + node.log())
        self.assertEqual(node.do(unit()), ("succeeded", "x"))
        if HAS_PROC:
            self.assertLess(len(os.listdir(f"/proc/{node.daemon_pid}/fd")), 40)

    def test_signals_descriptors_and_a_directory_that_is_gone(self) -> None:
        careless = ignore_children_and_leave_descriptors
        self.check(sys.executable, dict(os.environ), careless)

    def test_an_empty_environment_a_bare_name_and_closed_descriptors(self) -> None:
        self.check("python3", {}, lambda: os.closerange(0, 1))
        job = [sys.executable, PROGRAM, "--run", "word_count", "-"]
        done = run(job, preexec_fn=lambda: os.close(0))
        self.assertIn("needs at least one INPUT", done.stderr)

    def test_a_python_without_ctypes(self) -> None:
        place = self.directory()
        write_file(os.path.join(place, "ctypes.py"), "raise ImportError('not built')")
        self.check(sys.executable, {"PYTHONPATH": place})

    def sleeping(self, *inputs: str, more: str = "") -> Any:
        """A job whose action sleeps, after it has executed *more*."""
        action = SLEEPER.replace("time.sleep(", f"{more}\n        time.sleep(")
        options = self.with_actions(sleeper=action)
        return self.started_job(*options, "--strings", "--run", "sleeper", *inputs)

    def test_ctrl_c_ends_everything_within_two_seconds(self) -> None:
        ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
        began = time.monotonic()
        run_program("--version")
        most = 2 + time.monotonic() - began  # a start takes long on a busy machine
        for more in ("", ignore):
            with self.subTest(more), self.sleeping("60", more=more) as (job, directory):
                began = time.monotonic()
                for _ in range(3):  # people press it more than once
                    job.send_signal(signal.SIGINT)
                self.assertEqual(job.wait(DEADLINE), 130)
                self.assertLess(time.monotonic() - began, most)
                self.assertEqual((our_processes(), os.listdir(directory)), ([], []))

    def test_what_keeps_a_job_from_going_on_is_said_after_two_seconds(self) -> None:
        command = [sys.executable, PROGRAM, "--run", "word_count", "LICENSE"]
        options = without_room(400, TMPDIR=self.directory())
        with started(command, stderr=subprocess.PIPE, cwd=HERE, **options) as job:
            lines = iter(job.stderr.readline, b"")
            self.assertTrue(any(b"File too large" in line for line in lines))
            job.send_signal(signal.SIGINT)
            self.assertEqual(job.wait(DEADLINE), 130)

    def test_a_node_that_dies_is_started_again(self) -> None:
        go = os.path.join(self.directory(), "go")
        more = f"import os\n        while not os.path.exists({go!r}): time.sleep(0.01)"
        with self.sleeping(*["0"] * 4, more=more) as (job, _):
            nodes = [line for line in our_processes() if "--attended" in line]
            os.kill(int(nodes[0].split()[0]), signal.SIGKILL)
            write_file(go, "")
            output, errors = job.communicate(timeout=DEADLINE)
        self.assertEqual(json.loads(output), ["slept"] * 4, errors.decode())

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_job_without_standard_error_goes_on(self) -> None:
        job = [sys.executable, PROGRAM, "--run", "word_count", "LICENSE"]
        with open("/dev/full", "w") as full:
            env = environment(TMPDIR=self.directory())
            done = run(job, stderr=full, env=env, cwd=HERE)
        self.assertEqual((done.returncode, done.stdout[:1]), (0, "["))

    def test_ctrl_c_at_the_beginning_leaves_nothing(self) -> None:
        home, null = self.directory(), subprocess.DEVNULL
        command = [sys.executable, PROGRAM, "--run", "word_count", "LICENSE"]
        options: Any = {"stdout": null, "stderr": null, "cwd": HERE}
        for _ in range(4):
            with started(command, env=environment(TMPDIR=home), **options) as job:
                while not os.listdir(home) and job.poll() is None:
                    pass
                job.send_signal(signal.SIGINT)
                self.assertEqual(job.wait(DEADLINE), 130)
            self.assertEqual(os.listdir(home), [])

    def test_names_are_shown_as_one_line(self) -> None:
        name = "two\nlines\033[31m" + 500 * "x"
        options = self.with_actions(broken=BROKEN)
        done = self.job(*options, "--strings", "--run", "broken", name)
        self.assertRegex(done.stderr, r"(?m)^two lines\?\[31mx{200,300}\.\.\.: Value")

    def test_nobody_else_can_hand_in_results(self) -> None:
        with self.sleeping("60") as (job, directory):
            (path,) = glob.glob(f"{directory}/*/node.pid")
            text = crowdnode.read_file(path).partition(b"\n")[2]
            central = json.loads(text)["checked_in"]["url"]
            url, outcome = f"{central}/work/1", b"status=succeeded"
            request = urllib.request.Request(url, outcome, method="PUT")
            with self.assertRaisesRegex(urllib.error.HTTPError, "401"):
                urllib.request.urlopen(request, timeout=DEADLINE)
            job.kill()  # and its node ends with it
        wait_for(lambda: not our_processes(), "nothing is left")

    def test_outputs_go_to_a_file_or_device_or_are_not_lost(self) -> None:
        job, place = ["--run", "word_count", "LICENSE", "--output"], self.directory()
        result, link = os.path.join(place, "result"), os.path.join(place, "link")
        os.close(os.open(result, os.O_CREAT, 0o600))
        os.symlink(result, link)
        for path, wanted, sentence in (
            (link, (0, ""), ""),
            (place, (2, ""), "is not the path of a file"),
            (f"{place}/no/such", (2, ""), "is not a writable directory"),
            ("", (2, ""), "is not the path of a file"),
            ("/dev/stdout", (0, "["), ""),
            ("/dev/full", (1, "["), "No space left on device; wrote the outputs"),
        ):
            if path != "/dev/full" or os.path.exists(path):
                done = self.job(*job, path)
                self.assertEqual((done.returncode, done.stdout[:1]), wanted)
                self.assertIn(sentence, done.stderr)
        self.assertEqual(len(json.loads(crowdnode.read_file(result))), 1)
        self.assertEqual(stat.S_IMODE(os.lstat(result).st_mode), 0o600)

    def test_fail_fast_stops_where_an_input_has_failed(self) -> None:
        options = self.with_actions(broken=BROKEN)
        options += ["--set", "work_unit_retries=3", "--set", "max_workers=1"]
        options += ["--fail-fast", "--strings", "--run", "broken"]
        done = self.job(*options, *map(str, range(200)))
        self.fails(done, "0: ValueError: it broke")
        self.assertNotIn("\n20: ", done.stderr)


# ---------------------------------------------------------------------------
# Daemon
# ---------------------------------------------------------------------------


class Daemon(CrowdTest):
    def test_a_node_that_started_on_a_full_disk_is_found(self) -> None:
        node = self.prepared(port=free_port(), constants={"MONITOR_INTERVAL": 60})
        options = without_room(0)
        done = run(node.command("--daemon"), stderr=subprocess.DEVNULL, **options)
        self.assertEqual(done.returncode, 0)
        self.assertEqual(crowdnode.read_file(node.path("state", "node.pid")), b"")
        self.succeeds(node.run("--daemon"))
        document = json.loads(node.run("--status", "--json").stdout)
        self.assertIn(": this node runs", node.run("--check").stdout)
        self.assertIn("process 0 is not the node", node.run("--stop").stderr)
        os.kill(document["pid"], signal.SIGTERM)
        wait_for(lambda: not our_processes(), "its end")

    def test_another_program_on_the_port_can_not_hold_a_command_up(self) -> None:
        is_over = threading.Event()
        self.addCleanup(is_over.set)

        def answer_without_end(handler: Any) -> None:
            handler.send_response_only(200)
            handler.end_headers()
            while not is_over.wait(0.1):
                handler.wfile.write(b": still here\n")

        with web_server(answer_without_end) as url:
            node = self.prepared(port=int(url.rpartition(":")[2]))
            done = node.run("--daemon")
            self.assertIn("another program has it: choose another", done.stderr)
            self.assertEqual(node.run("--status").returncode, 3)

    def test_a_node_that_is_not_ready_for_long_gives_up(self) -> None:
        hangs = Expression("lambda self: crowdnode.time.sleep(60)")
        constants = {"READY_PATIENCE": 0.1, "RETRY_WAIT": 0.1}
        node = self.prepared(constants=constants, central_timeout=0.2)
        with unittest.mock.patch.dict(node.constants, {"Node.adopt_records": hangs}):
            done = node.run("--daemon")
        self.assertEqual(done.returncode, 1)
        self.assertIn("the node died; see ", done.stderr)
        self.assertRegex(node.log(), r"Timeout \(0:00:00.5.*\)!(?s:.*)in start\b")
        node.constants["READY_PATIENCE"] = 5
        node.start()
        fork_server = node.fork_server
        shutil.rmtree(node.path("actions"))
        node.write_config()
        os.mkdir(node.path("actions"), 0o700)
        bad = "import os, time; time.sleep(0.2); os._exit(1)"
        write_file(node.path("actions", "bad.py"), bad)
        os.kill(fork_server, signal.SIGKILL)
        self.assertEqual(node.wait(), 1)
        self.assertEqual(node.said("Timeout (0:00:05)!"), 1)

    def test_eight_starts_at_once_start_one_which_is_replaced_when_silent(self) -> None:
        node = self.prepared()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for done in pool.map(node.run, ["--daemon"] * 8):
                self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))
        self.assertEqual(len(node.central.check_ins()), 1)
        pid = node.daemon_pid
        self.assertNotEqual(os.getsid(pid), os.getsid(0))
        self.succeeds(node.run("--daemon"))
        self.fails(node.run(), f"a node runs here already, as process {pid}")
        node.constants.update(WEDGED_AFTER=0.5, HEARTBEAT_DEADLINE=0.2, TERM_GRACE=0.3)
        with stopped(pid):
            done = node.run("--daemon")
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertIn(f"(process {pid}) has not answered for 0.5 s", done.stderr)
        self.assertFalse(alive(pid))
        self.assertEqual(node.do(unit()), ("succeeded", "x"))

    def test_no_process_but_the_node_is_ever_signalled(self) -> None:
        node = self.prepared(constants={"WEDGED_AFTER": 0, "HEARTBEAT_DEADLINE": 0.1})
        stranger = subprocess.Popen(["sleep", "60"], env=environment())
        self.addCleanup(stranger.wait)
        self.addCleanup(stranger.kill)
        os.mkdir(node.path("state"), 0o700)
        path = node.path("state", "node.pid")
        here = {**crowdnode.THIS_MACHINE, "started": 1.0}
        away = {**here, "host": "A", "boot_id": "B"}
        commands, now = ["--stop", "--reload", "--daemon"], time.time()
        for machine, locked, touched, count, status, said in (
            (away, True, now, 3, 1, "a node runs on host A"),
            (away, False, now, 3, 1, "a node runs on host A"),
            (here, True, now, 3, 1, f"process {stranger.pid} is not the node"),
            (here, False, now, 2, 3, "no node runs here"),
            (away, False, 1e9, 2, 3, "no node runs here"),
        ):
            with open(path, "w") as file:
                file.write(f"{stranger.pid}\n{json.dumps(machine)}\n")
                file.flush()
                os.utime(path, (touched, touched))
                if locked:
                    fcntl.flock(file, fcntl.LOCK_EX)
                for command in commands[:count]:
                    with self.subTest(command, locked=locked, host=machine["host"]):
                        done = node.run(command)
                        self.assertIn(said, done.stderr)
                        self.assertEqual(done.returncode, status)
                        self.assertIsNone(stranger.poll(), "it was signalled")
        self.assertEqual(node.run("--daemon").returncode, 0)
        self.assertIsNone(stranger.poll())

    def test_descriptors_may_be_closed_but_must_not_be_few(self) -> None:
        node = self.prepared()
        for script, status, said in (
            ("ulimit -n 9", 1, "Too many open files"),
            ("exec <&- >&- 2>&-", 0, ""),
        ):
            shell = ["sh", "-c", f'{script}; exec "$@"', "sh"]
            done = run([*shell, *node.command("--daemon")])
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertIn(said, done.stderr)
            self.assertNotIn("Traceback", done.stderr + node.log())
        self.assertEqual(node.do(unit()), ("succeeded", "x"))


def free_port() -> int:
    """A port that is free, and that the kernel gives to no other test meanwhile."""
    while True:
        port = random.randrange(15_000, 32_000)  # below Linux's and macOS's own choice
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def add_slow_action(node: NodeProcess) -> str:
    """Add an action that makes a file when it begins to load, and goes on when that has
    been removed; return the file's path."""
    path = node.path("loading")
    loop = f"while os.path.exists({path!r}): time.sleep(0.01)"
    node.write_actions({"slow.py": f"{ECHO}\nopen({path!r}, 'w').close()\n{loop}\n"})
    return path


class Starts(CrowdTest):
    def test_what_prevents_a_start_is_said_in_one_sentence(self) -> None:
        central, other = self.central(), self.node()
        central.stop()
        work = other.path("state", "work")
        # As a thread has it that comes late: what was ended has gone.
        ends = Expression("lambda self: (self._process.kill(), self._reader.join())")
        late = {"ForkServerProcess.kill": ends}
        for options, sentence in (
            ({}, f"crowdnode: Failed to connect to the central server ({central.url})"),
            ({"actions": {}, "disable_default_actions": "yes"}, "no action: there is"),
            ({"port": other.port}, f"can't listen on 127.0.0.1 port {other.port}: "),
            ({"temp_storage_path": work}, f"another node uses {work}"),
            ({"state_path": "open/to/all"}, "others can write to "),
            ({"temp_storage_path": "open/to/all"}, "others can write to "),
        ):
            node = self.prepared(central, constants=late, **options)
            os.mkdir(node.path("open"))
            os.chmod(node.path("open"), 0o777)
            for command in ([], ["--daemon"]):
                with self.subTest(options, command=command):
                    self.fails(node.run(*command), sentence)

    def test_a_start_that_waits_for_central_can_be_stopped(self) -> None:
        central, over = self.central(), threading.Event()
        self.addCleanup(over.set)
        central.answer = lambda method, path, _: 204 if over.wait(DEADLINE) else None
        node = self.prepared(central).start(wait=False)
        wait_for(lambda: central.calls, "it waits for an answer")
        node.kill(signal.SIGINT)
        self.assertFalse(over.is_set())
        self.assertEqual([call[0] for call in central.calls], ["DELETE"])
        self.assertTrue(node.said("stopped by SIGINT while starting"))
        self.assertNotIn("Traceback", node.log())

    def test_units_may_come_before_the_check_in_is_answered(self) -> None:
        central, over = self.central(), threading.Event()
        pids: list[int] = []
        self.addCleanup(over.set)
        node = self.prepared(central, drain_time=30)

        def answer(method: str, path: str, fields: Fields) -> int | None:
            is_check_in = method == "PUT" and path.startswith("/node/")
            if is_check_in and not pids:
                pids.extend([node.take(unit(7)), node.take(unit(8, "sleeper", "60"))])
                over.wait(DEADLINE)
            return None

        central.answer = answer
        node.start(wait=False)
        self.assertEqual(central.outcome(7), ("succeeded", "x"))
        wait_for(lambda: pids, "both are taken")
        self.assertEqual(central.reports(7)[0]["pid"], str(pids[0]))
        os.kill(node.pid, signal.SIGTERM)
        wait_for(lambda: node.said("stopping; units running: 1"), "it drains")
        node.kill(signal.SIGTERM)
        self.assertFalse(alive(pids[1]))
        self.assertEqual(central.calls[-1][0], "DELETE")
        self.assertEqual((central.reports(8), node.units()), ([], []))

    def test_a_start_reports_what_is_on_disk_and_checks_out_and_in(self) -> None:
        central = self.central()
        node = self.node(central, port=free_port())
        central.stop()
        node.take(unit(1))
        wait_for(lambda: b"succeeded" in node.record(1), "an outcome")
        node.kill()
        stale = node.path("state", "work", "echo", "unit_99", "sub")
        os.makedirs(stale)
        central.start()
        name = f"/node/127.0.0.1:{node.port}"
        del central.calls[:]
        node.start()
        calls = [("PUT", "/work/1"), ("DELETE", name), ("PUT", name)]
        self.assertEqual([call[:2] for call in central.calls], calls)
        wait_for(lambda: not os.path.exists(os.path.dirname(stale)), "it is removed")
        node.stop()
        del central.calls[:]
        node.start()
        self.assertEqual([call[:2] for call in central.calls], calls[1:])

    def test_a_worker_goes_on_while_nodes_start_and_stop(self) -> None:
        node = self.node(port=free_port())
        long = node.waiter()
        pid = node.take(long)
        node.kill()
        loading = add_slow_action(node)
        del node.central.calls[:]
        node.start(wait=False)
        wait_for(lambda: os.path.exists(loading), "the actions load")
        self.assertEqual(node.get("/heartbeat")[0], 200)
        self.assertEqual(node.post(unit(2))[0], 503)
        node.kill(signal.SIGTERM)
        self.assertEqual(node.central.calls, [])
        os.unlink(node.path("actions", "slow.py"))
        os.unlink(loading)
        node.start()
        self.assertEqual(node.take(long), pid)
        self.assertEqual(node.let_go(), ("succeeded", "seen"))
        self.assertEqual(node.central.told("DELETE", "/node/"), [], "nothing was lost")
        self.assertEqual(len(node.central.reports(1)), 1)

    def test_a_node_with_another_name_or_central_checks_the_old_one_out(self) -> None:
        for key in ("port", "host", "central_server"):
            with self.subTest(key):
                old, new = self.central(), self.central()
                settings = {"host": "localhost", "central_server": new.url}
                node = self.node(old, port=free_port())
                name = f"/node/127.0.0.1:{node.port}"
                pid = node.take(unit(1, "sleeper", "60"))
                node.kill()
                del old.calls[:]
                node.write_config(**{key: settings.get(key, free_port())})
                node.start()
                wait_for(lambda: not alive(pid), "its unit has been released")
                calls = [call[:2] for call in old.calls + new.calls]
                path = f"/node/{node.settings['host']}:{node.port}"
                self.assertEqual(calls, [("DELETE", name), ("PUT", path)])

    def test_a_name_is_checked_out_whose_check_in_was_not_answered(self) -> None:
        for dialect in ("0.5", "auto"):
            with self.subTest(dialect):
                central, is_over = self.central(), threading.Event()
                self.addCleanup(is_over.set)
                central.answer = lambda method, *_, over=is_over: (
                    204 if method == "DELETE" else over.wait(DEADLINE) and None
                )
                settings = {"dialect": dialect, "central_timeout": 0.3}
                node = self.prepared(central, port=(old := free_port()), **settings)
                self.fails(node.run(), "timed out")
                is_over.set()
                central.recover()
                del central.calls[:]
                node.write_config(port=free_port(), central_timeout=60)
                node.start()
                calls = [call[:2] for call in central.calls]
                self.assertIn(("DELETE", f"/node/127.0.0.1:{old}"), calls)
                self.assertEqual(calls[-1][0], "PUT")

    def test_a_stop_waits_for_units_and_a_second_signal_does_not(self) -> None:
        central = self.central()
        node = self.node(central, drain_time=30)
        node.take(node.waiter())
        os.kill(node.pid, signal.SIGTERM)
        wait_for(lambda: node.said("units running: 1"), "it waits")
        for _ in range(2):  # the log is rotated, which does not hurry it
            os.kill(node.pid, signal.SIGHUP)
        self.assertEqual(node.post(unit(3))[0], 503)
        self.assertEqual(node.let_go(), ("succeeded", "seen"))
        self.assertEqual(node.wait(), 0)
        self.assertEqual(central.calls[-1][0], "DELETE")
        node.start()
        pid = node.take(unit(2, "sleeper", "60"))
        os.kill(node.pid, signal.SIGTERM)
        wait_for(lambda: node.said("units running: 1") == 2, "it waits again")
        node.kill(signal.SIGINT)
        self.assertFalse(alive(pid))
        self.assertEqual(central.calls[-1][0], "DELETE")
        self.assertEqual((central.reports(2), node.units()), ([], []), "it is released")

    def test_an_earlier_central_that_is_gone_does_not_stop_a_start(self) -> None:
        old, new = self.central(), self.central()
        self.addCleanup(old.stop)
        node = self.node(old, port=free_port(), constants=FAST)
        node.put_off(2)
        node.kill()
        old.stop()
        node.write_config(central_server=new.url)
        node.central = new
        node.start()
        self.assertEqual(node.said(f"at {old.url}: "), 1)
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        del old.calls[:]
        old.recover()
        old.start()
        self.assertEqual(old.outcome(2), ("succeeded", "x"))

    @unittest.skipUnless(HAS_PROC, "only Linux has subreapers")
    def test_children_from_before_the_program_are_left_alone(self) -> None:
        node = self.prepared()
        script = 'sleep 60 & echo $! > child; exec "$@"'
        command = ["sh", "-c", script, "sh", *node.command()]
        node.command = lambda *_: command  # type: ignore[method-assign]
        node.start()
        with open(node.path("child")) as file:
            child = int(file.read())
        self.addCleanup(wait_for, lambda: not alive(child), "it is gone")
        self.addCleanup(os.kill, child, signal.SIGKILL)
        node.go_on(1)
        node.stop()
        self.assertTrue(alive(child))

    def test_the_next_node_makes_a_check_out_that_failed(self) -> None:
        central = self.central()
        node = self.node(central, port=free_port())
        node.take(unit(1, "sleeper", "60"))
        central.stop()
        node.stop()
        central.start()
        central.fail(500, "/node/", "DELETE")
        self.assertEqual(node.start(wait=False).wait(), 1)
        central.recover()
        node.start()
        calls = [(method, path[:6]) for method, path, _ in central.calls]
        out = ("DELETE", "/node/")
        self.assertEqual(calls[2:], [out, out, ("PUT", "/node/")])
        self.assertEqual(central.reports(1), [], "it was not the unit that failed")
        node.put_off(2)
        node.stop()
        central.recover()
        del central.calls[:]
        node.start()
        self.assertEqual((central.reports(2), node.units()), ([], []), "it is released")

    @unittest.skipUnless(HAS_PROC, "only Linux has subreapers")
    def test_a_daemon_of_a_unit_ends_although_its_fork_server_has_died(self) -> None:
        action = """
        import subprocess
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        os.symlink(str(child.pid), self.input)
        while os.path.lexists(self.input):
            time.sleep(0.01)
"""
        text = ECHO.replace("process(self):\n", f"process(self):{action}")
        node = self.node(actions={"leaver.py": text})
        link = node.path("pid")
        node.take(unit(1, "leaver", link))
        wait_for(lambda: os.path.lexists(link), "it has started a daemon")
        pid = int(os.readlink(link))
        os.kill(node.fork_server, signal.SIGKILL)
        wait_for(lambda: node.said("the fork server died"), "its death is noticed")
        os.unlink(link)
        self.assertEqual(node.central.outcome(1)[0], "succeeded")
        wait_for(lambda: not alive(pid), "the daemon has been ended")

    def test_what_a_shell_left_before_it_became_the_node_lives_on(self) -> None:
        node = self.prepared()
        path, go = node.path("pid"), node.path("go")
        wait = f"until [ -e {go} ]; do sleep 0.02; done"
        later = f"(setsid sleep 60 & echo $! >{path}.new; mv {path}.new {path})"
        command = ["sh", "-c", f'({wait}; {later}) & exec "$@"', "sh", *node.command()]
        node.command = lambda *_: command  # type: ignore[method-assign]
        node.start()
        open(go, "w").close()
        wait_for(lambda: os.path.exists(path), "its process")
        pid, lock = int(crowdnode.read_file(path)), node.path("state", "node.pid")
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        for _ in range(4):  # ticks of the monitor
            before = os.stat(lock).st_mtime_ns
            wait_for(lambda: os.stat(lock).st_mtime_ns != before, "a tick")
        self.assertTrue(alive(pid))

    def test_a_stop_that_hangs_is_ended(self) -> None:
        node = self.node(constants={"STOP_PATIENCE": 1})
        is_over = threading.Event()
        self.addCleanup(is_over.set)
        node.central.answer = lambda *call: is_over.wait(DEADLINE) and None
        os.kill(node.pid, signal.SIGTERM)
        self.assertEqual(node.wait(), 1)
        self.assertRegex(node.log(), r"Timeout \(0:00:01\)!(?s:.*) in check_out\n")

    def test_a_loop_that_dies_ends_the_node(self) -> None:
        fault = Expression("lambda *_: (_ for _ in ()).throw(GeneratorExit)")
        node = self.node(constants={"Node.report": fault})
        node.take(unit())
        self.assertEqual(node.wait(), 0)
        self.assertEqual(node.said("a thread died: GeneratorExit(); stopping"), 1)


class Reloads(CrowdTest):
    def test_a_reload_disturbs_nothing_that_runs(self) -> None:
        central = self.central()
        node = self.daemon(central=central, dialect="auto")  # found at the second try
        long = node.waiter()
        pid = node.take(long)
        log = node.path("state", "node.log")
        os.rename(log, log + ".moved")
        node.write_actions({"fresh.py": ECHO})
        node.write_config(max_workers=7)
        self.assertEqual(node.run("--reload").returncode, 0)
        wait_for(lambda: len(central.check_ins()) == 3, "one more check-in")
        fields = central.check_ins()[-1]
        self.assertIn("fresh", fields["enabled_actions"])
        self.assertEqual(fields["max_workers"], "7")
        self.assertEqual(node.do(unit(2, "fresh")), ("succeeded", "x"))
        self.assertEqual(node.take(long), pid)
        self.assertTrue(node.said("reloaded; changed"), "the log was opened again")
        self.assertEqual(node.let_go(), ("succeeded", "seen"))
        self.assertEqual(central.reports(1)[0]["pid"], str(pid))
        wait_for(lambda: len(our_processes()) == 2, "the old fork server has gone")

    def test_a_reload_changes_everything_that_is_valid_or_nothing(self) -> None:
        node, other = self.daemon(), self.central()
        self.addCleanup(node.write_config, state_path="state", port=0)
        wrong = "[node] max_load = much: must be a number"
        node.write_config(max_load="much")
        self.fails(node.run("--reload"), wrong)
        os.kill(node.daemon_pid, signal.SIGHUP)
        wait_for(lambda: node.said(wrong) == 2, "it is refused")
        os.chmod(node.path("state"), 0o770)
        node.write_config(max_load="", central_server=other.url)
        os.kill(node.daemon_pid, signal.SIGHUP)
        wait_for(lambda: node.said("not reloaded, everything stays") == 3, "it again")
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        os.chmod(node.path("state"), 0o700)
        node.write_config(state_path="elsewhere", port=1)
        os.kill(node.daemon_pid, signal.SIGHUP)
        wait_for(other.check_ins, "a check-in there")
        for key in ("state_path", "port"):
            self.assertEqual(node.said(f"{key} has changed; restart the node"), 1)
        node.take(unit(2))
        self.assertEqual(other.outcome(2), ("succeeded", "x"))

    def test_units_from_before_a_reload_can_be_ended_after_it(self) -> None:
        node = self.daemon(max_workers=2)
        first, second = (node.take(unit(id, "sleeper", "60")) for id in (1, 2))
        self.assertEqual(node.post(unit(3))[0], 503)
        node.write_config(max_workers=3)
        node.run("--reload")
        wait_for(lambda: node.status()["state"] == "accepting", "there is room")
        self.assertEqual(node.do(unit(3)), ("succeeded", "x"))
        node.take(unit(1, "sleeper", "60", attempts=1))
        self.assertFalse(alive(first))
        self.assertEqual(node.run("--stop").returncode, 0)
        wait_for(lambda: not alive(second), "the other is ended too")
        self.assertEqual(node.units(), [])

    def test_a_stop_during_a_slow_reload_is_obeyed_at_once(self) -> None:
        node = self.node()
        loading = add_slow_action(node)
        os.kill(node.pid, signal.SIGHUP)
        wait_for(lambda: os.path.exists(loading), "the actions load")
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        node.kill(signal.SIGTERM)
        self.assertEqual(node.central.calls[-1][0], "DELETE")

    def installed(self) -> NodeProcess:
        """A node that runs from a copy of the program, as on a user's machine."""
        node = self.prepared()
        node.program = "crowdnode.py"  # as a user in its directory would say
        self.install(node, "1.0")
        return node

    def install(self, node: NodeProcess, version: str) -> None:
        """Put a version of the program in the place of the one that is there."""
        end = '\nif __name__ == "__main__":'
        intervals = "MONITOR_INTERVAL = STATUS_INTERVAL = RETRY_WAIT = 0.1"
        more = f"\n{intervals}\n__version__ = {version!r}\n{end}"
        with open(PROGRAM, encoding="utf-8") as file:
            self.write(node, file.read().replace(end, more))

    def write(self, node: NodeProcess, text: str) -> None:
        write_file(node.path("new"), text)
        os.replace(node.path("new"), node.path(node.program))

    def upgraded(self, node: NodeProcess, version: str) -> None:
        """Wait until the node is of that *version*."""
        line = f"crowdnode {version}, 127.0.0.1 port"
        wait_for(lambda: node.said(line), f"version {version}")
        self.assertEqual(node.status()["version"], version)

    def test_a_node_goes_on_as_the_new_version_in_the_same_process(self) -> None:
        node = self.installed()
        self.assertEqual(node.run("--daemon", "--set", "max_workers=3").returncode, 0)
        before, old = node.status(), node.fork_server
        long = node.waiter()
        pid = node.take(long)
        del node.central.calls[:]
        with socket.create_connection(("127.0.0.1", node.port)) as half:
            half.sendall(b"GET /heartbeat ")
            node.status()  # came later, so the other has been accepted
            self.install(node, "1.1")
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                reload = pool.submit(node.run, "--reload")
                wait_for(lambda: node.said("going on as the new version"), "an upgrade")
                half.sendall(b"HTTP/1.1\r\n\r\n")
                self.assertEqual(read_answer(half)[0], 200)
            self.assertEqual(reload.result().returncode, 0)
            self.assertRegex(reload.result().stdout, r"^going on as version 1\.1; act")
        self.upgraded(node, "1.1")
        after = node.status()
        kept = [after[key] for key in ("pid", "port", "max_workers")]
        self.assertEqual(kept, [before["pid"], before["port"], 3])
        self.assertNotEqual(after["fork_server"]["pid"], old)
        self.assertEqual(node.take(long), pid)
        self.assertEqual(node.let_go(), ("succeeded", "seen"))
        self.assertEqual(node.central.told("DELETE", "/node/"), [])
        wait_for(lambda: not has_zombie(before["pid"]), "no zombie")
        node.run("--stop")
        self.assertEqual(len(node.central.reports(1)), 1)

    def test_a_new_version_is_refused_while_settings_have_moved(self) -> None:
        node, second = self.installed(), self.central()
        self.assertEqual(node.run("--daemon").returncode, 0)
        self.install(node, "1.1")
        for key, value in (("host", "localhost"), ("central_server", second.url)):
            before = node.settings[key]
            node.write_config(**{key: value})
            sentence = f"replaced, and {key} changed: restart the node"
            self.fails(node.run("--reload"), sentence)
            node.write_config(**{key: before})
        self.assertEqual(node.status()["version"], "1.0")
        self.assertEqual(node.run("--reload").returncode, 0)
        self.upgraded(node, "1.1")

    def test_a_new_version_answers_and_stops_while_its_actions_load(self) -> None:
        node = self.installed().start()
        worker = node.take(unit(1, "sleeper", "60"))
        loading = add_slow_action(node)
        self.install(node, "1.1")
        os.kill(node.pid, signal.SIGHUP)
        wait_for(lambda: os.path.exists(loading), "the actions load")
        self.assertEqual(node.get("/heartbeat")[::2], (200, b"buh-bump"))
        self.assertEqual(node.post(unit(2))[0], 503)
        node.kill(signal.SIGTERM)
        self.assertFalse(alive(worker))
        self.assertEqual(node.central.calls[-1][0], "DELETE")
        self.assertEqual(node.units(), [])

    def test_a_new_version_that_does_not_work_is_refused(self) -> None:
        node = self.installed().start()
        source = crowdnode.read_file(node.path(node.program)).decode()
        half, end, rest = source.partition('\nif __name__ == "__main__":')
        for text, problem in (
            ("", "--version printed b''"),
            (half, "--version printed b''"),
            (f"{source}def broken(:", "SyntaxError"),
            (f"{half}\nraise RuntimeError('half a copy')", "RuntimeError: half a copy"),
            (f'{half}\ndel NODE_KEYS["drain_time"]{end}{rest}', "unknown key"),
        ):
            with self.subTest(problem):
                self.write(node, text)
                write_file(node.path("works"), source)
                node.program = "works"
                done = node.run("--reload")
                node.program = "crowdnode.py"
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, r"not reloaded.*does not work here: ")
                self.assertIn(problem, done.stderr)
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        os.kill(node.fork_server, signal.SIGKILL)  # the next has the old source, too
        wait_for(lambda: node.post(unit(2))[0] == 200, "another fork server")
        self.assertEqual(node.central.outcome(2), ("succeeded", "x"))

    def test_another_python_in_the_place_of_the_old_one_is_no_obstacle(self) -> None:
        pattern = os.path.expanduser("~/.pyenv/versions/3.1*/bin/python3")
        others = set(glob.glob(pattern)) - {os.path.realpath(sys.executable)}
        if not others:
            self.skipTest("there is no other Python on this machine")
        node = self.prepared()
        node.python = node.path("python")
        os.symlink(sys.executable, node.python)
        node.start()
        os.unlink(node.python)
        os.symlink(max(others), node.python)
        os.kill(node.fork_server, signal.SIGKILL)
        wait_for(lambda: node.post(unit(1))[0] == 200, "another fork server")
        self.assertEqual(node.central.outcome(1), ("succeeded", "x"))

    def test_a_start_and_an_upgrade_need_no_room_on_the_disk(self) -> None:
        node = self.installed()
        os.mkdir(state := node.path("state"))
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", state]
        if not HAS_PROC or subprocess.run(mount, capture_output=True).returncode:
            self.skipTest("mounting takes Linux and root")
        self.addCleanup(subprocess.run, ["umount", "-l", state], check=True)
        node.start()
        node.central.stop()
        node.take(unit(1))
        wait_for(lambda: b"succeeded" in node.record(1), "an outcome")
        node.kill()
        fill = ["sh", "-c", f"cat /dev/zero >>{state}/filler 2>&-"]
        subprocess.run(fill)
        node.central.start()
        node.start()
        self.assertEqual(node.central.outcome(1), ("succeeded", "x"))
        node.settled()  # which makes a little room
        subprocess.run(fill)
        self.assertEqual(node.post(unit(2))[0], 503)
        node.central.stop()  # an upgrade and a node that runs do not need it either
        self.install(node, "1.1")
        os.kill(node.pid, signal.SIGHUP)
        self.upgraded(node, "1.1")
        wait_for(lambda: node.said("Failed to connect to") >= 3, "it tries again")
        count = len(node.central.check_ins())
        node.central.start()
        wait_for(lambda: len(node.central.check_ins()) > count, "a check-in")
        self.assertEqual(node.post(unit(2))[0], 503)
        os.unlink(f"{state}/filler")
        wait_for(lambda: node.status()["state"] == "accepting", "there is room")
        self.assertEqual(node.do(unit(2)), ("succeeded", "x"))
        node.stop()


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------


class CommandLine(CrowdTest):
    def test_status_is_for_people_and_for_programs_and_stop_waits(self) -> None:
        node = self.prepared()
        shown = self.on_terminal(*node.command("--daemon"))
        page = f"page: http://127.0.0.1:{node.port}/\r\n"
        self.assertEqual(shown, f"{page}log:  {node.path('state', 'node.log')}\r\n")
        pid, worker = node.daemon_pid, node.take(unit(7, "sleeper", "60"))
        done = node.run("--status", "--json")
        self.assertEqual(json.loads(done.stdout)["port"], node.port)
        done = node.run("--status")
        self.assertEqual((done.returncode, done.stdout.count("\033")), (0, 0))
        unit_line = "unit 7 (sleeper, process, job 1, 60): "
        for text in ("127.0.0.1:", "last check-in ", unit_line, "1 accepted"):
            self.assertIn(text, done.stdout)
        shown = self.on_terminal(*node.command("--status"))
        self.assertRegex(shown, r"State +\x1b\[32maccepting\x1b\[0m")
        shown = self.on_terminal(*node.command("--status"), NO_COLOR="1")
        self.assertNotIn("\033", shown)
        node.constants["HEARTBEAT_DEADLINE"] = 0.2
        with stopped(pid):
            done = node.run("--status")
        self.assertEqual(done.returncode, 4)
        self.assertIn("does not answer", done.stderr)
        self.succeeds(node.run("--stop"))
        wait_for(lambda: not alive(pid) and not alive(worker), "both are gone")
        left = sorted(os.listdir(node.path("state")))
        self.assertEqual(left, ["fork_server.out", "node.log", "units", "work"])

    def test_a_fault_in_the_configuration_hides_no_node_that_runs(self) -> None:
        node = self.daemon()
        for fault in ("max_laod = 1", "port = no", "typo", "[nod]", "tag = 1\ntag = 2"):
            node.write_config()
            with open(node.path("crowdnode.conf"), "a") as file:
                file.write(f"{fault}\n")
            self.assertEqual(node.run("--status").returncode, 0, fault)
            self.assertEqual(node.run("--check").returncode, 2, fault)
        for more in (["--config", "/no/such.conf"], ["--set", "stat_path=/x"]):
            self.assertEqual(node.run("--stop", *more).returncode, 2, more)
        self.fails(node.run("--reload"), "not reloaded, everything stays as it was: ")
        self.assertEqual(node.run("--stop").returncode, 0)
        node.write_config()

    def test_reload_says_what_it_took_over(self) -> None:
        node = self.daemon()
        node.write_config(max_load=99, port=1)
        done = node.run("--reload")
        node.write_config(port=0)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        actions = "broken, echo, pieces, sleeper, waiter, word_count"
        said = f"reloaded; changed keys: max_load; actions: {actions}\n"
        said += "port has changed; restart the node to use it\n"
        self.assertEqual(done.stdout, said)
        node.write_actions({"bad.py": "x("})
        self.assertIn("bad.py is left out: SyntaxError", node.run("--reload").stdout)
        os.rename(node.path("actions"), node.path("away"))
        done = node.run("--reload", "--set", "disable_default_actions=yes")
        self.assertEqual((done.returncode, done.stderr), (0, ""))  # word_count is left
        self.assertIn("actions: word_count\n", done.stdout)

    def test_a_node_that_is_not_ours_is_named(self) -> None:
        other = self.daemon()
        node = self.prepared(port=other.port)
        sentence = f"a node with another state_path answers on port {other.port}"
        for command, status in (("--status", 3), ("--stop", 3), ("--daemon", 1)):
            done = self.fails(node.run(command), sentence, status)
            self.assertEqual(len(done.stderr.splitlines()), 1)

    def test_a_link_to_the_program_finds_what_lies_beside_the_real_one(self) -> None:
        real, link = self.directory(), os.path.join(self.directory(), "crowdnode")
        os.symlink(shutil.copy(PROGRAM, real), link)
        path = os.path.join(real, "crowdnode.conf")
        shutil.copy(os.path.join(HERE, "crowdnode.conf"), path)
        os.mkdir(os.path.join(real, "actions"))
        write_file(os.path.join(real, "actions", "echo.py"), ECHO)
        command, env = [sys.executable, link, "--check"], environment(HOME=real)
        shown = run(command, cwd="/", env=env).stdout
        self.assertIn(f"ok: configuration: {path}\n", shown)
        self.assertRegex(shown, r"ok: actions: echo,")
        if os.geteuid() == 0:  # another user's file does not count
            place = self.directory()
            with open(os.path.join(place, "crowdnode.conf"), "w") as file:
                os.chown(file.fileno(), 12345, -1)
            shown = run(command, cwd=place, env=env).stdout
            self.assertIn(f"ok: configuration: {path}\n", shown)

    def test_the_file_can_be_imported_without_side_effects(self) -> None:
        code = "import crowdnode, threading as t; "
        code += "print(crowdnode.Action, t.active_count())"
        done = run([sys.executable, "-c", code], cwd=HERE)
        self.assertEqual(done.stdout, "<class 'crowdnode.Action'> 1\n", done.stderr)

    def test_check_says_what_is_in_order_and_what_is_not(self) -> None:
        central = self.central()
        node = self.prepared(central)
        node.program = shutil.copy(PROGRAM, node.directory)
        os.chmod(node.program, 0o644)  # whatever the umask of the checkout was
        done = node.run("--check")
        node.program = ""
        levels = {line.partition(":")[0] for line in done.stdout.splitlines()}
        self.assertEqual((done.returncode, levels), (0, {"ok"}), done.stdout)
        program = write_script(node.directory, "gs", "true")
        uptime = f"exec {shutil.which('uptime')}"  # there may be a gs beside it
        node.env["PATH"] = self.programs(uptime=uptime).rstrip(":")
        node.constants["MORE_PATHS"] = (node.directory,)
        node.write_config(disabled_actions="graphics_magick", bind="0.0.0.0")
        node.write_actions({"slow.py": f"{ECHO}time.sleep(1.1)\n"})
        os.chmod(node.path("actions", "slow.py"), 0o666)
        os.symlink("/no/such", node.path("actions", "dangling.py"))
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen()
            node.write_config(port=taken.getsockname()[1])
            done = node.run("--check", "--set", "host=127.0.0.1")
        for text in (
            "skipped: the action process_pdfs is left out; not installed: ",
            f"warning: {program} is not found by the PATH: put {node.directory} into",
            f"warning: others can write to {node.path('actions', 'slow.py')}, and so",
            "warning: bind = 0.0.0.0: anybody who can connect can send units",
            "Address already in use; another program has it: choose another",
        ):
            self.assertIn(text, done.stdout)
        self.assertRegex(done.stdout, r"slow\.py takes [1-9]")
        self.assertEqual(done.returncode, 1)
        os.unlink(node.path("actions", "slow.py"))
        node.write_config(disabled_actions="graphics_magick process_pdfs", port=0)
        node.write_config(bind="127.0.0.1")
        node.write_config(host="no-such-host.invalid", aws_secret_key="x", login="y")
        node.write_actions({"syntax.py": "def"})
        os.chmod(node.path("crowdnode.conf"), 0o644)
        os.mkdir(node.path("state", "storage"))
        os.chmod(node.path("state", "storage"), 0o777)
        shown = node.run("--check", "--set", "password=z").stdout
        central.heartbeat = b"<h1>It works!</h1>"
        shown += node.run("--check").stdout
        central.stop()
        done = node.run("--check")
        self.assertEqual(done.returncode, 1)
        for text in (
            "warning: host = no-such-host.invalid",
            "others can read it: chmod 600",
            "warning: the password is on the command line",
            "warning: local_storage_path: others can write to",
            "syntax.py is left out",
            "answers, but is not CloudCrowd",
            f"error: central: {central.url}: ",
        ):
            self.assertIn(text, shown + done.stdout)

    def test_stubs_are_the_classes_that_central_needs(self) -> None:
        both = BROKEN + "    def split(self): return []\n"
        options = self.with_actions(my_pdfs=both, date=ECHO)
        options += ["--set", "disabled_actions=graphics_magick process_pdfs"]
        place = os.path.join(self.directory(), "actions")
        stub, own = f"{place}/my_pdfs.rb", f"{place}/word_count.rb"
        for _ in range(2):  # its own files are replaced
            done = self.job(*options, "--stubs", place)
            self.assertEqual((done.returncode, done.stdout.split()), (1, [stub, own]))
            self.assertRegex(done.stderr, "(?m)^date: .* is a class of Ruby's own")
        broken = self.with_actions(bad="x =")  # what does not load is left out, too
        done = self.job(*broken, "--stubs", self.directory())
        self.assertEqual(done.returncode, 1, done.stderr)
        text = crowdnode.read_file(stub).decode().partition("\n")[2]
        stages = "  def split\n  end\n  def process\n  end\n"
        self.assertEqual(text, f"class MyPdfs < CloudCrowd::Action\n{stages}end\n")
        done = self.job(*options, "--check")
        self.assertIn("error: action date", done.stdout)
        for path in (stub, own):  # crowd install has put the latter there
            write_file(path, "class Other\nend\n")
        done = self.job(*options, "--stubs", place)
        self.assertIn("my_pdfs.rb: not written by --stubs; left alone", done.stderr)
        self.assertNotIn("word_count", done.stderr)
        for path in (stub, own):
            self.assertEqual(crowdnode.read_file(path), b"class Other\nend\n")

    def test_help_names_every_command_and_option_within_80_columns(self) -> None:
        version, done = run_program("--version").stdout, run_program("--help")
        self.assertEqual(version, f"crowdnode {crowdnode.__version__}\n")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertLessEqual(max(map(len, done.stdout.splitlines())), 80)
        for name, *_ in (*crowdnode.COMMANDS, *crowdnode.OPTIONS):
            self.assertIn(f"  {name} ", done.stdout)

    def test_a_wrong_command_line_is_answered_with_its_remedy(self) -> None:
        binary = os.path.join(self.directory(), "binary.conf")
        write_file(binary, b"\xff\xfe")
        run = ["--run", "word_count"]
        for arguments, said in (
            (["--config", "/no/such.conf"], "/no/such.conf: can't be read: "),
            (["--config", binary], "binary.conf: can't be read: "),
            (["--set", "port"], "--set port: must be KEY=VALUE"),
            (["--port", "x"], "command line: port = x: must be a whole number"),
            (["--set", "max_laod=1"], "max_laod: unknown key: did you mean max_load?"),
            (["--daemon", "--stop"], "not allowed with argument"),
            (["--json"], "--json goes with --status"),
            (["--options", "", "--status"], "--options goes with --run"),
            (["README.md"], "unrecognized arguments: README.md"),
            (["status"], "did you mean --status?"),
            (["start"], "did you mean --daemon?"),
            (["run", "word_count", "x"], "did you mean --run?"),
            (["--run", "word_cuont", "README.md"], "did you mean word_count?"),
            (run, "needs at least one INPUT"),
            ([*run, ""], "an INPUT is empty"),
            ([*run, "nosuch.txt"], "nosuch.txt: no such file, and not a URL; use"),
            ([*run, "/"], "/: is a directory"),
            (["--options", "[1]", *run, "LICENSE"], "must be a JSON object"),
            (["--options", "{", *run, "LICENSE"], "--options {: is not JSON"),
            (["--stubs", ""], "--stubs: DIR is empty"),
        ):
            with self.subTest(arguments):
                self.fails(self.main(*arguments), said, 2)

    def test_output_that_cannot_be_written_costs_no_traceback(self) -> None:
        for command, said in (
            ("--check | true", ""),
            ("--stubs /dev/null/x", "--stubs: can't write /dev/null/x"),
            ("--version >/dev/full", ""),
            ("--strings --run word_count x >/dev/full", "No space left on device"),
        ):
            if "full" not in command or os.path.exists("/dev/full"):
                shell = ["sh", "-c", f"{sys.executable} {PROGRAM} {command}"]
                env = environment(HOME=self.directory())
                done = run(shell, env=env)
                self.assertNotIn("Traceback", done.stderr)
                self.assertIn(said, done.stderr)


# ---------------------------------------------------------------------------
# README, and other platforms
# ---------------------------------------------------------------------------


class Readme(CrowdTest):
    text = crowdnode.read_file(os.path.join(HERE, "README.md")).decode()

    def test_the_examples_of_the_readme_work(self) -> None:
        options, examples = self.with_actions(), []
        for block in re.findall(r"(?m)(?:^    .*\n|^\n)+", self.text):
            match = re.search(r"# actions/((\w+)\.\w+)", block)
            if match:
                lines = [line[4:] for line in block.strip("\n").splitlines()]
                path = os.path.join(options[1].partition("=")[2], match[1])
                write_file(path, "\n".join(lines).partition("python3 crowdnode.py")[0])
                os.chmod(path, 0o755)
                examples.append(match[2])
        license = crowdnode.read_file(f"{HERE}/LICENSE").decode()
        lines = license.splitlines(keepends=True)
        wanted = {"longest_line": max(map(len, lines)), "lines": len(lines)}
        self.assertEqual(examples, list(wanted))
        for name, value in wanted.items():
            done = self.job(*options, "--run", name, "LICENSE")
            self.assertEqual((done.returncode, done.stdout), (0, f"[{value}]\n"), done)

    def test_the_service_files_of_the_readme_are_well_formed(self) -> None:
        (plist,) = re.findall(r"(?s)    (<\?xml.*?</plist>)", self.text)
        service = plistlib.loads(re.sub("(?m)^    ", "", plist).encode())
        self.assertEqual(service["ProgramArguments"][1], "/opt/crowdnode/crowdnode.py")
        self.assertTrue(service["KeepAlive"] and service["AbandonProcessGroup"])
        (unit,) = re.findall(r"(?s)    (\[Unit\].*?multi-user.target)", self.text)
        self.assertIn("KillMode=process\n", unit)
        path = os.path.join(self.directory(), "crowdnode.service")
        write_file(path, re.sub("(?m)^    ", "", unit) + "\n")
        if shutil.which("systemd-analyze") and os.path.exists("/usr/bin/python3"):
            done = run(["systemd-analyze", "verify", path])
            self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_the_standard_library_and_a_mac_are_enough(self) -> None:
        pattern = r"(?m)^ *(?:import|from(?=.* import )) (\w+)"
        modules = set(re.findall(pattern, crowdnode.read_file(PROGRAM).decode()))
        standard = getattr(sys, "stdlib_module_names", modules)
        self.assertLessEqual(modules, {*standard, "crowdnode"})
        mock, moment = unittest.mock.patch.object, "Thu Jan  1 18:00:00 1970"
        with mock(sys, "platform", "darwin"):
            with mock(os, "listdir", side_effect=AssertionError("not on a Mac")):
                self.assertEqual(crowdnode.child_pids(), set())
            wanted = time.mktime(time.strptime(moment))
            for line, start in (f"S    {moment}", wanted), (f"Z    {moment}", None):
                with mock(crowdnode, "run_command", lambda *_: (0, line.encode(), b"")):
                    self.assertEqual(crowdnode.start_of_process(1), start)

    def test_windows_is_refused_in_one_sentence(self) -> None:
        program = f"import os, sys; sys.path.insert(0, {HERE!r}); os.name = 'nt'; "
        command = [sys.executable, "-c", program + "import crowdnode"]
        done = run(command)
        sentence = "crowdnode needs Linux or macOS: it forks its workers.\n"
        self.assertEqual((done.returncode, done.stdout, done.stderr), (2, "", sentence))


# ---------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------


def run_named(names: list[str]) -> int:
    """Run the tests of these names, in this process."""
    result = unittest.main(exit=False, argv=[sys.argv[0], *names]).result
    failed = len({str(test) for test, _ in result.failures + result.errors})
    skipped = len(result.skipped)
    passed = max(0, result.testsRun - failed - skipped)
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 0 if result.wasSuccessful() and result.testsRun else 1


def run_class(cls: type, output: Any) -> NoReturn:
    """Run a class of tests in this process, a child, and exit; print to *output*."""
    global MARK
    MARK = f"CROWDNODE_TEST={os.getpid()}"
    status = 1
    try:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        status = run_named([cls.__name__])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run_all() -> int:
    """Run every test, some classes at once, since they wait most of the time."""
    long = "SystemCalls Reloads Holds RunEnds Starts Machine ForkServers".split()  # noqa: SIM905
    names = unittest.defaultTestLoader.getTestCaseNames
    found = [value for value in globals().values() if isinstance(value, type)]
    classes = [cls for cls in found if issubclass(cls, CrowdTest) and names(cls)]
    # Those that take long come first, from the end.
    classes.sort(key=lambda cls: (cls.__name__ in long, len(names(cls))))
    running: dict[int, Any] = {}  # the outputs, by pid
    total = [0, 0, 0]
    while classes or running:
        while classes and len(running) < AT_ONCE:
            cls, output = classes.pop(), tempfile.TemporaryFile()  # noqa: SIM115
            pid = os.fork()  # this process has one thread, and has imported it all
            if pid == 0:
                run_class(cls, output)
            running[pid] = output
        pid, status = os.wait()
        with running.pop(pid) as file:
            file.seek(0)
            text = file.read().decode("utf-8", "replace").rstrip()
        print(text, flush=True)
        counts = re.findall(r"(\d+) (?:passed|failed|skipped)", text)[-3:] or [0, 1, 0]
        total = [sum(map(int, pair)) for pair in zip(total, counts)]
        total[1] += int(status != 0 and counts[1] == "0")
    print("{} passed, {} failed, {} skipped".format(*total))
    return 0 if total[0] and not total[1] else 1


def main() -> int:
    """Run the tests that the command line names, all by default."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    with tempfile.TemporaryDirectory(prefix="crowdnode-test-") as cache:
        # All that we start is compiled once, and leaves nothing beside the program.
        os.environ.setdefault("PYTHONPYCACHEPREFIX", cache)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        return run_named(sys.argv[1:]) if sys.argv[1:] else run_all()


if __name__ == "__main__":
    sys.exit(main())
