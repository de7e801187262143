#!/usr/bin/env python3
"""Tests of crowdnode.py: real processes on loopback ports, real signals and sockets.

    python3 test_crowdnode.py                        all
    python3 test_crowdnode.py Work.test_a_unit_...   one

The tests stand under the names of the program's parts, and in their order.  Only the
text of commands that this machine has not got is made up.  After each test
nothing may be left: no process, no record, no directory.
"""

from __future__ import annotations

import atexit
import base64
import collections
import concurrent.futures
import configparser
import contextlib
import errno
import functools
import gzip
import hashlib
import http.client
import http.server
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
import unittest
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, Iterator, Optional

import crowdnode

crowdnode.import_command_modules()
crowdnode.import_node_modules()

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "crowdnode.py")
AT_ONCE = 4  # classes of tests
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
    return sum("--fork-server" in line for line in our_processes()) >= 2


def environment(**more: str) -> dict[str, str]:
    """The environment of what we start."""
    key, _, value = MARK.partition("=")
    return {**os.environ, key: value, **more}


def write_script(directory: str, name: str, text: str) -> str:
    """A program: a shell script; its path."""
    path = os.path.join(directory, name)
    with open(path, "w") as file:
        file.write(f"#!/bin/sh\n{text}\n")
    os.chmod(path, 0o755)
    return path


def run_program(*arguments: Any, **options: Any) -> Any:
    """Run the program to its end."""
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        **{
            "stdin": None if "input" in options else subprocess.DEVNULL,
            "capture_output": True,
            "text": True,
            "env": environment(),
            "timeout": DEADLINE,
            **options,
        },
    )


@contextlib.contextmanager
def web_server(answer: Callable[[Any], None]) -> Iterator[str]:
    """The URL of a web server in which *answer* answers each request, by its
    http.server.BaseHTTPRequestHandler."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


PACKED = gzip.compress(b"unpacked text")
WEB: dict[str, tuple[int, dict[str, str], bytes]] = {
    "/plain.txt?x=1": (200, {}, b"plain text"),
    "/packed.txt": (200, {"Content-Encoding": "gzip"}, PACKED),
    "/moved": (302, {"Location": "/plain.txt?x=1"}, b""),
    "/loop": (302, {"Location": "/loop"}, b""),
    "/short": (200, {"Content-Length": "100"}, b"short"),
    "/broken.gz": (200, {"Content-Encoding": "gzip"}, PACKED[:-4]),
    "/slow.txt": (200, {}, b"slow text"),
    "/odd.gz": (200, {"Content-Encoding": "gzip"}, b"not packed at all"),
}


def answer_as_the_web(handler: Any) -> None:
    """What the web has: packed, moved, missing, slow, broken, silent."""
    if handler.path == "/never":
        handler.rfile.read(1)  # until the other side has had enough
        return
    status, headers, body = WEB.get(handler.path, (404, {}, b""))
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
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def keep_compiled() -> None:
    """Compile the program once for all that we start, out of everybody's way."""
    if "PYTHONPYCACHEPREFIX" not in os.environ:
        directory = tempfile.mkdtemp(prefix="crowdnode-test-")
        atexit.register(shutil.rmtree, directory)
        os.environ["PYTHONPYCACHEPREFIX"] = directory
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-c", crowdnode.COMPILER, PROGRAM]
        subprocess.run([*command, compiled_program()], check=True)


def compiled_program() -> str:
    """Where that is."""
    return os.path.join(os.environ["PYTHONPYCACHEPREFIX"], "crowdnode.pyc")


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
        self.date = ""  # Thin, CloudCrowd's server, sends none
        self.port = 0
        self.held: socket.socket | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, again on the same port."""

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(handler) -> None:  # noqa: N805
                self.handle(handler)

            do_DELETE = do_GET = do_PUT

            def log_message(handler, *_: Any) -> None:  # noqa: N805
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 100

            def handle_error(self, *_: Any) -> None:
                pass

        if self.held:
            self.held.close()
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(
            target=self.server.serve_forever, args=[0.02], daemon=True
        ).start()

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
            if self.date:
                handler.send_header("Date", self.date)
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
        return [
            fields
            for verb, path, fields in list(self.calls)
            if verb == method and path.startswith(prefix)
        ]

    def check_ins(self) -> list[Fields]:
        return self.told("PUT", "/node/")

    def reports(self, unit_id: Any) -> list[Fields]:
        return [
            fields
            for method, path, fields in list(self.calls)
            if (method, path) == ("PUT", f"/work/{unit_id}")
        ]

    def outcome(self, unit_id: Any, seconds: float = DEADLINE) -> tuple[str, Any]:
        """Wait for a unit's report: status and output."""
        reports = wait_for(
            lambda: self.reports(unit_id), f"a report of unit {unit_id}", seconds
        )
        return reports[0]["status"], json.loads(reports[0]["output"])["output"]


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
        self.constants = {
            "MONITOR_INTERVAL": 0.1,
            # A report waits so long, and its record stays for two looks after it.
            "SUCCESS_HOLD": 0.01,
            "FAILURE_HOLD": 0.02,
            "STATUS_INTERVAL": 0.1,
            "TEMPORARY_DIRECTORIES": (),
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
        if not directory and "PYTHONPYCACHEPREFIX" in os.environ:
            # It need not compile the program as a first node would.
            os.mkdir(self.path("state"), 0o700)
            crowdnode.copy_file(compiled_program(), self.path("state", "crowdnode.pyc"))
        self.process: subprocess.Popen[bytes] | None = None
        self.program = ""  # a copy of the program, with its constants as they are

    def write_actions(self, actions: dict[str, str]) -> None:
        os.makedirs(self.path("actions"), exist_ok=True)
        for name, text in actions.items():
            path = self.path("actions", name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
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
        constants = "".join(
            f"crowdnode.{name} = {value!r}; " for name, value in self.constants.items()
        )
        program = (
            f"import sys; sys.path.insert(0, {HERE!r}); import crowdnode; {constants}"
            "sys.exit(crowdnode.main())"
        )
        start = [sys.executable, self.program]
        if not self.program:
            start = [sys.executable, "-c", program]
        return [*start, "--config", self.path("crowdnode.conf"), *arguments]

    def start(self, wait: bool = True) -> NodeProcess:
        before = self.said("has checked in with")
        with open(self.path("log"), "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(**self.env),
                cwd=self.directory,
                start_new_session=True,
            )
        if wait:
            wait_for(
                lambda: self.said("has checked in with") > before or self.ended(),
                "a start",
            )
            if self.ended():
                raise AssertionError(f"the node did not start:\n{self.log()}")
        return self

    def run(self, *arguments: str, seconds: float = DEADLINE) -> Any:
        """Another call of the program with this configuration."""
        return subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment(**self.env),
            cwd=self.directory,
            timeout=seconds,
        )

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
        with open(self.path("state", "node.port")) as file:
            return int(file.read())

    @property
    def pid(self) -> int:
        """Of the one in the foreground."""
        assert self.process
        return self.process.pid

    @property
    def daemon_pid(self) -> int:
        """Of the one in the background."""
        with open(self.path("state", "node.pid")) as file:
            return int(file.read())

    @property
    def fork_server(self) -> int:
        """Its pid."""
        return int(self.status()["fork_server"]["pid"])

    def settled(self) -> None:
        """Wait until no unit is left."""
        wait_for(lambda: not self.units(), "no record is left")

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
        if self.process:
            if not self.ended():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.stop()
            self.process.kill()
            self.process.wait()
        if os.path.exists(self.path("state", "node.pid")):  # one in the background
            self.run("--stop")
        shutil.rmtree(self.directory)


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

    def on_terminal(self, *command: str, **env: str) -> str:
        """What *command* writes to a terminal."""
        master, terminal = pty.openpty()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            env=environment(**env),
        ):
            os.close(terminal)
            return read_terminal(master)

    def daemon(self, **options: Any) -> NodeProcess:
        """A node in the background."""
        node = self.prepared(**options)
        done = node.run("--daemon")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        return node

    def job(self, *arguments: Any, path: str = "", **options: Any) -> Any:
        """Run the program in an empty environment; *path*: before the usual PATH."""
        home = options.pop("home", "") or self.directory()
        key, _, value = MARK.partition("=")
        usual = {"PATH": f"{path}/usr/bin:/bin", "HOME": home, "TMPDIR": home}
        options.setdefault("cwd", HERE)
        return run_program(*arguments, env={**usual, key: value}, **options)

    @contextlib.contextmanager
    def started_job(self, *arguments: str) -> Iterator[Any]:
        """A job of --run of which a worker runs, and its TMPDIR."""
        directory = self.directory()
        with subprocess.Popen(
            [sys.executable, PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(TMPDIR=directory),
        ) as process:
            wait_for(a_worker_runs, "a worker runs")
            yield process, directory

    def with_actions(self, **actions: str) -> list[str]:
        """The arguments to use these actions."""
        directory = self.directory()
        for name, text in actions.items():
            with open(os.path.join(directory, f"{name}.py"), "w") as file:
                file.write(text)
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
        self.addCleanup(shutil.rmtree, path, ignore_errors=True)
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
        while True:
            shown += os.read(master, 65536)
    os.close(master)
    return shown.decode()


def check_leftovers(test: unittest.TestCase, result: unittest.TestResult) -> None:
    """Whatever is left fails the test, and is ended, so that the next one is not it."""
    try:
        wait_for(lambda: not our_processes(), "no process is left", 5)
    except AssertionError:
        left = our_processes()
        for line in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        try:
            raise AssertionError(f"left running: {left}")
        except AssertionError:
            result.addFailure(test, sys.exc_info())


class SharedNode(CrowdTest):
    """Tests that one node and one central serve, and do not disturb."""

    options: dict[str, Any] = {}
    shared_central: Central
    shared: NodeProcess
    next_id = 0

    @classmethod
    def setUpClass(cls) -> None:
        cls.shared_central = Central()
        cls.shared = NodeProcess(
            cls.shared_central, **{"actions": ACTIONS, **cls.options}
        ).start()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.shared.destroy()
        cls.shared_central.close()

    def run(self, result: unittest.TestResult | None = None) -> Any:
        return unittest.TestCase.run(self, result)

    def tearDown(self) -> None:
        self.shared.settled()
        wait_for(
            lambda: not any(
                files for _, _, files in os.walk(self.shared.path("state", "work"))
            ),
            "no work directory is left",
        )

    @classmethod
    def new_id(cls) -> int:
        SharedNode.next_id += 1
        return SharedNode.next_id


# ---------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------


WRONG_FILES = [
    (
        "[node]\nport = 99999",
        "[node] port = 99999: must be a whole number from 0 to",
    ),
    ("[node]\nport = http", "[node] port = http: must be a whole number"),
    ("[node]\nprot = 1", "[node] prot: unknown key: did you mean port?"),
    ("[node]\nzzz = 1", "[node] zzz: unknown key: known are central_server"),
    ("[nod]\nport = 1", "[nod]: unknown section: did you mean node?"),
    ("[action ../x]\n", "[action ../x]: unknown section"),
    ("port = 1", "is no INI file"),
    ("[node]\nport", "is no INI file"),
    (
        "[node]\nport = 1\nport = 2",
        "[node] port: stands there twice; remove one",
    ),
    ("[node]\n[node]", "[node] stands there twice"),
    (
        "[node]\nmax_load = -1",
        "[node] max_load = -1: must be a number from 0.01",
    ),
    ("[node]\nmax_load = nan", "[node] max_load = nan: must be a number"),
    ("[node]\nmax_workers = many", "[node] max_workers = many: must be"),
    ("[node]\nhttp_authentication = si", "= si: must be yes or no"),
    ("[node]\nhttp_authentication = yes", "needs login and password too"),
    ("[node]\nlogin = a:b", "login = a:b: must not hold a colon"),
    ("[node]\ndialect = new", "dialect = new: must be auto or seed or 0.5"),
    ("[node]\nallow = 10.1.2.3/8", "allow = 10.1.2.3/8: must be addresses or"),
    ("[node]\nbind = example.org", "bind = example.org: must be an IP address"),
    ("[node]\nhost = a/b", "host = a/b: must be a host name"),
    ("[node]\ncentral_server = central:9173", "must be a URL such as http://"),
    ("[node]\ncentral_server = http://a:b@c", "must not hold a password"),
    (
        "[node]\nstorage = cloudfiles",
        "storage = cloudfiles: must be filesystem",
    ),
    ("[node]\nlog_level = loud", "log_level = loud: must be debug or info"),
    ("[node]\ntime_limit = 0", "time_limit = 0: must be a number from 0.1"),
    ("[node]\nnice = 20", "nice = 20: must be a whole number from 0 to 19"),
    ("[action x]\nstages = map", "[action x] stages = map: must be process"),
    ("[action x]\nport = 1", "[action x] port: unknown key: known are stages"),
    ("[node]\ntag = a\n  b", "[node] tag: must be a single line"),
    ("\ufeff[node]\nmax_workers = \u0663", "[node] max_workers = \u0663: must"),
    ("[node]\ncentral_server = http://[x", "must be a URL such as http://"),
    ("[node]\ns3_bucket = a/b", "s3_bucket = a/b: must be 3 to 63 letters"),
    ("[node]\naws_access_key = a b", "aws_access_key = a b: must be without blanks"),
    ("[node]\nstate_path = ~nobody-at-all/x", "there is no such home directory"),
]


class Configuration(CrowdTest):
    def test_a_wrong_file_is_named_with_section_key_value_and_remedy(self) -> None:
        path = os.path.join(self.directory(), "wrong.conf")
        for text, said in WRONG_FILES:
            with self.subTest(text):
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text)
                with self.assertRaises(crowdnode.UsageError) as caught:
                    crowdnode.load_config(path, [])
                self.assertTrue(str(caught.exception).startswith(f"{path}: "))
                self.assertIn(said, str(caught.exception))
        done = run_program("--config", path, "--check")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertEqual(done.stderr, f"crowdnode: {caught.exception}\n")

    def test_the_sample_file_has_every_key_at_its_default(self) -> None:
        sample = os.path.join(HERE, "crowdnode.conf")
        with open(sample, encoding="utf-8") as file:
            text = file.read()
        found = dict(
            re.findall(r"(?m)^#([a-z0-9_]+) = ?(.*)$", text.partition("[action ")[0])
        )
        defaults = {key: default for key, (default, _) in crowdnode.NODE_KEYS.items()}
        self.assertEqual(list(found.items()), list(defaults.items()))
        self.assertLess(set(defaults), set(crowdnode.Config.__annotations__))
        self.assertEqual(set(crowdnode.STORAGES), set(crowdnode.STORES))
        in_actions = re.findall(r"(?m)^#([a-z_]+) = ", text.partition("[action ")[2])
        self.assertEqual(set(in_actions), set(crowdnode.ACTION_KEYS))
        config = crowdnode.load_config(sample, [])
        self.assertEqual(config.port, crowdnode.DEFAULT_PORT)
        uncommented = os.path.join(self.directory(), "crowdnode.conf")
        with open(uncommented, "w", encoding="utf-8") as file:
            node = text.partition("#[action ")[0]
            file.write(re.sub(r"(?m)^#([a-z0-9_]+ =)", r"\1", node))
        again = crowdnode.load_config(uncommented, [])
        for key in crowdnode.NODE_KEYS:
            if not key.endswith("_path"):
                self.assertEqual(getattr(again, key), getattr(config, key), key)

    def test_what_is_written_is_read_again(self) -> None:
        path = os.path.join(self.directory(), "crowdnode.conf")
        with open(path, "w") as file:
            file.write("[action x]\nstages = process merge\ntime_limit = 1.5\n")
        settings = [
            ("max_load", "2.5"),
            ("allow", "10.0.0.0/8 ::1"),
            ("tag", "a # b; %c"),
        ]
        os.mkdir(os.path.join(os.path.dirname(path), "actions"))
        config = crowdnode.load_config(path, settings)
        crowdnode.write_config(config, path)
        config.settings = []  # they stand in the file now
        again = crowdnode.load_config(path, [])
        self.assertEqual(vars(again), vars(config))

    def test_relative_paths_start_at_the_configuration_file(self) -> None:
        path = os.path.join(self.directory(), "crowdnode.conf")
        with open(path, "w") as file:
            file.write("[node]\nstate_path = s\nactions_path = a\n")
        config = crowdnode.load_config(path, [])
        base = os.path.dirname(path)
        self.assertEqual(config.state_path, os.path.join(base, "s"))
        self.assertEqual(config.actions_path, os.path.join(base, "a"))
        self.assertEqual(config.temp_storage_path, os.path.join(base, "s", "work"))
        done = run_program("--check", cwd=base)
        self.assertIn(f"ok: configuration: {path}", done.stdout)


# ---------------------------------------------------------------------------
# Vitals
# ---------------------------------------------------------------------------


class Vitals(CrowdTest):
    def test_texts_of_other_machines_are_understood(self) -> None:
        intel = (
            "Mach Virtual Memory Statistics: (page size of 4096 bytes)\n"
            "Pages free:                              130000.\n"
            "Pages active:                            900000.\n"
        )
        silicon = intel.replace("4096", "16384")
        self.assertAlmostEqual(crowdnode.parse_vm_stat(intel) or 0, 507.8125)
        self.assertAlmostEqual(crowdnode.parse_vm_stat(silicon) or 0, 2031.25)
        self.assertIsNone(crowdnode.parse_vm_stat("vm_stat: not found"))
        for text, load in (
            ("13:22:56 up 12 min,  0 users,  load average: 0.52, 0.58, 0.59", 0.52),
            ("13:22  up 3 days, 2 users, load averages: 12.34 2.00 1.99", 12.34),
            ("13:22:56 up 12 min,  0 users,  load average: 0,52, 0,58, 0,59", None),
            ("", None),
        ):
            self.assertEqual(crowdnode.parse_load(text), load)
        meminfo = "MemTotal: 9 kB\nMemFree:  204800 kB\nMemAvailable:   409600 kB\n"
        free = crowdnode.parse_meminfo(meminfo, crowdnode.SCRAPE_LINUX_MEMORY)
        available = crowdnode.parse_meminfo(meminfo, crowdnode.SCRAPE_LINUX_AVAILABLE)
        self.assertEqual((free, available), (200, 400))

    def test_a_mac_scrapes_vm_stat(self) -> None:
        """With the text of one: this machine has no vm_stat."""
        directory = self.directory()
        text = "Mach Virtual Memory Statistics: (page size of 16384 bytes)"
        free = "Pages free:                       64000."
        write_script(directory, "vm_stat", f"echo '{text}'\necho '{free}'")
        program = (
            f"import sys; sys.path.insert(0, {HERE!r}); import crowdnode; "
            "crowdnode.import_command_modules(); crowdnode.import_node_modules(); "
            "sys.platform = 'darwin'; print(crowdnode.free_memory())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            env=environment(PATH=f"{directory}:/usr/bin:/bin"),
        )
        self.assertEqual(done.stdout, b"1000.0\n")

    def test_uptime_is_asked_in_the_c_locale(self) -> None:
        script = (
            '[ "$LC_ALL" = C ] && echo "13:00:00 up, load average: 0.42, 1.0, 1.0"'
            ' || echo "13.00.00 up, load average: 0,42 1,0 1,0"'
        )
        env = {**self.fake_uptime(script), "LANG": "fi_FI.UTF-8"}
        node = self.node(env=env, max_load=1)
        self.assertEqual(node.status()["load_average"], 0.42)

    def test_an_uptime_that_does_not_tell_is_said_once_and_changes_nothing(
        self,
    ) -> None:
        constants = {"SCRAPE_DEADLINE": 0.1}
        for script in ("echo 13:00 up 1 day", "sleep 50", "exit 1", "kill -9 $$"):
            with self.subTest(script):
                node = self.node(
                    env=self.fake_uptime(script), constants=constants, max_load=0.01
                )
                wait_for(
                    lambda: node.said("max_load: this machine does not tell"), "it"
                )
                wait_for(lambda: node.status()["uptime"] > 0.5, "some ticks")
                self.assertEqual(node.said("max_load: this machine does not tell"), 1)
                self.assertIsNone(node.status()["load_average"])
                self.assertEqual(node.do(unit()), ("succeeded", "x"))
        empty = self.directory()
        node = self.node(env={"PATH": empty}, max_load=0.01)
        wait_for(lambda: node.said("max_load: this machine does not tell"), "no uptime")


# ---------------------------------------------------------------------------
# Unit records
# ---------------------------------------------------------------------------


class Records(CrowdTest):
    def test_an_outcome_that_is_cut_short_does_not_count(self) -> None:
        head = b'crowdnode-unit 1 {"id": 4, "job_id": 1, "action": "echo", "stage": '
        head += b'"process", "attempts": 0, "digest": "d", "started": 1.0}\npid 9\n'
        cut = crowdnode.parse_record(head + b'succeeded 0.1 {"output":"x')
        self.assertEqual((cut.pid, cut.outcome, cut.withdrawn), (9, None, False))
        cut = crowdnode.parse_record(head + b'succeeded 0.1 {"output":"xwithdrawn\n')
        self.assertEqual((cut.pid, cut.outcome, cut.withdrawn), (9, None, True))
        for odd in (
            b'succeeded 0.1 {"output":"x\n',
            b'failed x {"output":"x"}\n',
            b"failed 0.1 {}\n",
            b"nonsense\n",
        ):
            with self.assertRaises(crowdnode.OddRecord):
                crowdnode.parse_record(head + odd)

    def test_odd_records_do_not_stop_the_start(self) -> None:
        node = self.prepared()
        units = node.path("state", "units")
        os.makedirs(units)
        head = b'crowdnode-unit 1 {"id": 4, "job_id": 1, "action": "echo", "stage": '
        head += b'"process", "attempts": 0, "digest": "d", "started": 1.0}\n'
        for name, data in (
            ("1", b""),
            ("2", head[:40]),
            ("3", head.replace(b"4", b"3")),
            ("4", head + b'pid 999999\nsucceeded 1.5 {"output":"found"}\n'),
            ("5", b"crowdnode-unit 99 of the future\n"),
            ("12", b"crowdnode-unit 2 of the future\n"),
            ("6", b"crowdnode-unit 1 [nonsense]\n"),
            ("7", os.urandom(1000) + b"\n"),
            ("10", head + b"pid 999999\n"),
            ("11", b"crowdnode-unit 1 {}\n"),
            ("8", head.replace(b"4", b"8") + b"pid 999999\nwithdrawn\n"),
            ("13", head.replace(b"process", b"dream")),
            ("14.out", b"of a unit that is not there"),
        ):
            with open(os.path.join(units, name), "wb") as file:
                file.write(data)
        os.mkdir(os.path.join(units, "9"))
        node.start()
        self.assertEqual(node.central.outcome(4), ("succeeded", "found"))
        self.assertEqual(node.central.reports(4)[0]["time"], "1.5")
        wait_for(lambda: not os.path.exists(os.path.join(units, "4")), "it is settled")
        self.assertEqual(
            sorted(node.units()),
            ["10.odd", "11.odd", "12", "13.odd", "5", "6.odd", "7.odd", "9.odd"],
        )
        for name in ("5", "12"):  # another version's, and said once
            self.assertEqual(node.said(f"units/{name} is left alone: it is of"), 1)
        reported = [path for _, path, _ in node.central.calls if "/work/" in path]
        self.assertEqual(reported, ["/work/4"])
        self.assertEqual(node.do(unit(5)), ("succeeded", "x"))
        self.assertIn("5.odd", node.units())  # out of the way of a unit of its name

    def test_a_record_that_cannot_be_removed_does_not_hold_up_a_start(self) -> None:
        node = self.prepared()
        units = node.path("state", "units")
        os.makedirs(os.path.join(units, "4.out"))
        with open(os.path.join(units, "4"), "wb") as file:
            file.write(
                b'crowdnode-unit 1 {"id": 4, "job_id": 1, "action": "echo", "stage": '
                b'"process", "attempts": 0, "digest": "d", "started": 1.0}\n'
                b'pid 999999\nsucceeded 1.5 {"output":"found"}\n'
            )
        rubbish = node.path("state", "work", "echo", "unit_9.1.rubbish")
        os.makedirs(rubbish)
        node.start()
        self.assertFalse(os.path.exists(rubbish))
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        os.rmdir(os.path.join(units, "4.out"))
        node.settled()
        self.assertEqual(len(node.central.reports(4)), 1)


# ---------------------------------------------------------------------------
# Asset stores
# ---------------------------------------------------------------------------


class Bucket(CrowdTest):
    """What actions save, in S3: a server of the tests that takes it."""

    def setUp(self) -> None:
        self.calls: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers: list[tuple[int, str]] = []  # what it says first
        server = web_server(self.answer)
        self.url = server.__enter__()
        self.addCleanup(server.__exit__, None, None, None)

    def answer(self, handler: Any) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in handler.headers.items()}
        self.calls.append((handler.command, handler.path, headers, body))
        status, code = self.answers.pop(0) if self.answers else (200, "")
        text = f"<Error><Code>{code}</Code></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def settings(self, url: str, **more: str) -> dict[str, Any]:
        return {
            "storage": "s3",
            "s3_bucket": "the-bucket",
            "aws_access_key": "AKIAIOSFODNN7EXAMPLE",
            "aws_secret_key": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "s3_endpoint": url,
            **more,
        }

    def test_a_file_is_public_or_behind_a_link_and_faults_are_tried_again(self) -> None:
        url, calls = self.url, self.calls
        saver = MIXED.replace("a result.txt", "a +result%.txt")
        node = self.node(
            actions={"mixed.py": saver}, constants={"S3_WAITS": (0,)},
            **self.settings(url),
        )  # fmt: skip
        self.assertEqual(calls[0][:2], ("GET", "/the-bucket?list-type=2&max-keys=0"))
        status, saved = node.do(unit(1, "mixed", options={"do": "saved"}))
        path = "/the-bucket/mixed/job_1/unit_1/a%20%2Bresult%25.txt"
        self.assertEqual((status, saved), ("succeeded", url + path))
        method, where, headers, body = calls[-1]
        self.assertEqual((method, where, body), ("PUT", path, b"saved"))
        self.assertEqual(headers["x-amz-acl"], "public-read")
        self.assertIn("SignedHeaders=content-length;content-type;host;x-amz-acl;x-amz-content-sha256"
                      ";x-amz-date, Signature=", headers["authorization"])  # fmt: skip
        self.answers = [(503, "SlowDown")]
        self.assertEqual(
            node.do(unit(2, "mixed", options={"do": "saved"}))[0], "succeeded"
        )
        self.answers = [(403, "SignatureDoesNotMatch")]
        status, output = node.do(unit(3, "mixed", options={"do": "saved"}))
        self.assertEqual(status, "failed")
        self.assertIn("aws_secret_key: S3 answered 403 SignatureDoesNotMatch", output)
        self.assertNotIn("wJalr", output + node.log())
        node.write_config(s3_authentication="yes")
        self.answers = [(403, "InvalidAccessKeyId")]
        os.kill(node.pid, signal.SIGHUP)
        wait_for(lambda: node.said("error: storage = s3: can't be used"), "a reload")
        status, saved = node.do(unit(4, "mixed", options={"do": "saved"}))
        self.assertNotIn("x-amz-acl", calls[-1][2])
        for field in ("Expires=86400", "SignedHeaders=host", r"Signature=\w{64}$"):
            self.assertRegex(saved, rf"\.txt\?.*X-Amz-{field}")

    def test_signatures_are_those_of_amazons_examples(self) -> None:
        config = crowdnode.load_config("", list(self.settings("").items()))
        store = crowdnode.S3Store(config)
        now, host = "20130524T000000Z", "examplebucket.s3.amazonaws.com"
        empty = hashlib.sha256().hexdigest()
        headers = {"host": host, "x-amz-content-sha256": empty, "x-amz-date": now}
        self.assertEqual(
            store._signature("GET", "/", "max-keys=2&prefix=J", headers, empty, now),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        )
        query = (
            "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F"
            "20130524%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=20130524T000000Z"
            "&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
        )
        self.assertEqual(
            store._signature(
                "GET", "/test.txt", query, {"host": host}, "UNSIGNED-PAYLOAD", now
            ),
            "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404",
        )
        self.assertEqual(
            store.base + store.prefix, "https://the-bucket.s3.us-east-1.amazonaws.com"
        )

    def test_a_wrong_key_or_bucket_is_said_at_the_start_by_its_name(self) -> None:
        url = self.url
        hasty = {"S3_WAITS": (0,)}
        for code, message in (
            ("NoSuchBucket", "s3_bucket = the-bucket: S3 answered 404 NoSuchBucket"),
            ("InvalidAccessKeyId", "aws_access_key = AKIAIOSFODNN7EXAMPLE: "),
        ):
            self.answers = [(404, code)]
            node = self.prepared(constants=hasty, **self.settings(url))
            done = node.run()
            self.assertEqual(done.returncode, 1)
            self.assertIn(message, done.stderr)
        away = self.settings("http://127.0.0.1:1")
        done = self.prepared(constants=hasty, **away).run("--check")
        self.assertIn("s3_endpoint = http://127.0.0.1:1: ", done.stdout)
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def talk() -> None:
                for _ in hasty["S3_WAITS"] + (0,):
                    with listener.accept()[0] as connection:
                        connection.recv(10000)
                        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

            thread = threading.Thread(target=talk, daemon=True)
            thread.start()
            odd = self.settings(f"http://127.0.0.1:{listener.getsockname()[1]}")
            done = self.prepared(constants=hasty, **odd).run("--check")
            thread.join(DEADLINE)
        self.assertIn("SSH-2.0", done.stdout)
        self.assertNotIn("Traceback", done.stderr)
        self.answers = [(301, "PermanentRedirect")]
        done = self.prepared(**self.settings(url)).run("--check")
        self.assertIn("s3_region = us-east-1: S3 answered 301", done.stdout)
        done = self.prepared(**self.settings(url, s3_bucket="")).run()
        self.assertEqual(done.returncode, 2)
        self.assertIn("storage = s3: needs s3_bucket too", done.stderr)

    def test_more_than_a_put_can_hold_is_said(self) -> None:
        path = os.path.join(self.directory(), "large")
        with open(path, "wb") as file:
            file.truncate(crowdnode.S3_LIMIT + 1)
        config = crowdnode.load_config("", list(self.settings(self.url).items()))
        with self.assertRaisesRegex(OSError, "S3 takes 5 GB at once"):
            crowdnode.S3Store(config).save(path, "x")
        self.assertEqual(self.calls, [])


# ---------------------------------------------------------------------------
# Actions
# ---------------------------------------------------------------------------

MIXED = """
import os, sys, time
from crowdnode import Action

class Mixed(Action):
    def process(self):
        return getattr(self, self.options["do"])()

    def directory(self):
        here = os.getcwd()
        open("scratch", "w").write("x")
        os.makedirs("deep/er")
        os.chmod("deep/er", 0o500)
        mode = os.stat(here).st_mode & 0o777
        return [here, self.work_directory, mode, os.listdir(".")]

    def known(self):
        return [self.input, self.input_path, self.file_name, self.options]

    def fetched(self):
        with open(self.input_path, "rb") as file:
            text = file.read().decode()
        return [os.path.basename(self.input_path), self.file_name, text]

    def saved(self):
        with open("a result.txt", "w") as file:
            file.write("saved")
        return self.save("a result.txt")

    def everything(self):
        several = [1, -2.5, 1e300, True, None, "\u2603", "\\u0000"]
        return {"a": several, "b": {}, "c": ()}

    def a_set(self):
        return {1}

    def not_a_number(self):
        return float("nan")

    def bytes(self):
        return b"x"

    def surrogate(self):
        return "\\ud800"

    def circle(self):
        self.options["self"] = self.options
        return self.options

    def prints(self):
        print("to standard output \u2603")
        print("to standard error", file=sys.stderr)
        os.system("echo from a child")

    def prints_much(self):
        for number in range(40000):
            print(f"line {number}")

    def leaves(self):
        os._exit(3)

    def exits(self):
        sys.exit("enough")

    def is_nice(self):
        return os.nice(0)

    def goes_deep(self):
        for number in range(1500):
            os.mkdir("dddd")
            os.chdir("dddd")

    def forges(self):
        raise ValueError("one\\n2026-01-01 00:00:00 node[1] info: two\\x1b[2J")

    def sleeps_with_files(self):
        for number in range(20):
            open(f"file {number}", "w").close()
        os.mkdir("locked")
        os.chmod("locked", 0)
        time.sleep(60)
"""

SHELL = """#!/bin/sh
# An action in shell: the stage is the argument, JSON comes on standard input.
case "$(cat)" in
*fail*) echo "first line" >&2; echo "it broke" >&2; exit 3 ;;
*text*) echo "plain text"; echo "of two lines" ;;
*json*) printf '{"stage": "%s", "pwd": "%s"}' "$1" "$(pwd)" ;;
*bytes*) printf '\\377' ;;
*die*) kill -9 $$ ;;
*) echo '["one", "two"]' ;;
esac
"""

TALKER = SLEEPER.replace(
    "time.sleep(float(self.input))", "print('almost done', flush=True); time.sleep(60)"
)

MIXED_NODE: dict[str, Any] = {
    "actions": {
        **ACTIONS,
        "mixed.py": MIXED,
        "shell.sh": SHELL,
        "bare": "echo x",
        "talker.py": TALKER,
    },
    "action mixed": "nice = 7",
    "action sleeper": "time_limit = 1",
    "action echo": "time_limit = 60",
    "action shell": "stages = split process merge",
    "local_storage_path": "storage",
}


class MixedNode(SharedNode):
    """A node that has the action ``mixed``."""

    options = MIXED_NODE

    def do(self, what: str, **more: Any) -> tuple[str, Any]:
        """What the action ``mixed`` makes of a unit."""
        more.setdefault("options", {})["do"] = what
        return self.shared.do(unit(self.new_id(), "mixed", **more))


class Actions(MixedNode):
    """What actions know, return and save."""

    def test_an_action_knows_its_input_and_options(self) -> None:
        status, (text, path, name, options) = self.do("known", options={"k": [1]})
        self.assertEqual((status, text, path, name), ("succeeded", "x", None, None))
        ids = {"job_id": 1, "work_unit_id": self.next_id, "attempts": 0}
        self.assertEqual(options, {"k": [1], "do": "known", **ids})

    def test_inputs_are_parsed_where_they_are_json_objects_or_lists(self) -> None:
        for text, wanted in (
            ("[1,2]", [1, 2]),
            ("[1,2", "[1,2"),
            (" [1]", " [1]"),
            ("null", "null"),
            ("[NaN]", "[NaN]"),
            ("{}", {}),
            ("[1]\n", [1]),
            ("[1.0,1e3]", [1.0, 1000.0]),
            ('{"json_class":"String"}', {"json_class": "String"}),
            ("na\u00efve \u2603", "na\u00efve \u2603"),
            ("a:b", "a:b"),
            ("mailto:x", "mailto:x"),
            ("12:30", "12:30"),
            ("http://x/na\u00efve", "http://x/na\u00efve"),
            ("file:///srv/a b.txt", "file:///srv/a b.txt"),
            ("", ""),
        ):
            with self.subTest(text):
                outcome = self.shared.do(unit(self.new_id(), input=text))
                self.assertEqual(outcome, ("succeeded", wanted))

    def test_a_file_is_copied_under_a_safe_name(self) -> None:
        for name, saved in (("a b.txt", "a-b.txt"), ("x.tar.gz", "x-tar.gz")):
            path = self.shared.path(name)
            with open(path, "w") as file:
                file.write(name)
            outcome = self.do("fetched", input=crowdnode.file_url(path))
            stem = saved.rpartition(".")[0]
            self.assertEqual(outcome, ("succeeded", [saved, stem, name]))

    def test_file_names_are_those_of_the_real_action(self) -> None:
        for url, name in (
            ("http://h.example/a.txt", "a.txt"),
            ("http://h.example/a/b/", "b"),
            ("http://h.example", "h.example"),
            ("http://h.example/.hidden", "-hidden"),
            ("http://h.example/x%2Fy.txt", "x-y.txt"),
            ("http://h.example/a--b___c.txt", "a-b___c.txt"),
            ("http://h.example/a.tar.gz", "a-tar.gz"),
            ("http://h.example/a.txt#frag", "a-txt-frag.txt#frag"),
            ("file:///srv/a b.txt", "a-b.txt"),
            ("http://h.example/%3F.txt", "-.txt"),
            ("http://h.example/a%2Etxt", "a-txt"),
            ("http://h.example/a.txt?x=1?y=2", "a.txt"),
            ("http://h.example/%2E%2E", "--"),
            ("http://h.example/..", "--"),
            ("http://?x", "http-"),
        ):
            self.assertEqual(crowdnode.safe_file_name(url), name, url)
        for url in (
            "http://",
            "http://h/" + "x" * 5000 + "." + "y" * 5000,
            "?",
            "/",
            ".",
        ):
            name = crowdnode.safe_file_name(url)
            self.assertTrue(0 < len(name) < 255 and "/" not in name, name)
            self.assertNotIn(name, (".", ".."))

    def test_a_file_that_is_not_there_or_is_none_fails_the_unit(self) -> None:
        for url in ("file:///no/such/file", "file:///dev/zero", "file:///"):
            with self.subTest(url):
                status, output = self.do("fetched", input=url)
                self.assertEqual(status, "failed")
                self.assertIn(f"can't download {url}: ", output)

    def test_a_download_follows_and_unpacks_and_fails_when_it_is_cut_short(
        self,
    ) -> None:
        with web_server(answer_as_the_web) as base:
            for path, wanted in (
                ("/plain.txt?x=1", ["plain.txt", "plain", "plain text"]),
                ("/packed.txt", ["packed.txt", "packed", "unpacked text"]),
                ("/moved", ["moved", "moved", "plain text"]),
                ("/slow.txt", ["slow.txt", "slow", "slow text"]),
            ):
                with self.subTest(path):
                    outcome = self.do("fetched", input=base + path)
                    self.assertEqual(outcome, ("succeeded", wanted))
            for path, message in (
                ("/missing", "404"),
                ("/short", "only 5 of 100 bytes came"),
                ("/broken.gz", "cut short"),
                ("/odd.gz", "error"),
                ("/loop", "redirect"),
            ):
                with self.subTest(path):
                    status, output = self.do("fetched", input=base + path)
                    self.assertEqual(status, "failed")
                    self.assertIn(f"can't download {base}{path}: ", output)
                    self.assertIn(message, output)
            began = time.monotonic()
            never = unit(self.new_id(), "sleeper", f"{base}/never")
            status, output = self.shared.do(never)
            self.assertEqual(
                (status, output[:22]), ("failed", "time_limit of 1 s exce")
            )
            self.assertLess(time.monotonic() - began, 5)

    def test_everything_that_json_has_is_an_output(self) -> None:
        wanted = {"a": [1, -2.5, 1e300, True, None, "\u2603", "\0"], "b": {}, "c": []}
        self.assertEqual(self.do("everything"), ("succeeded", wanted))

    def test_what_json_lacks_is_a_failure_that_says_so(self) -> None:
        for what, reason in (
            ("a_set", "set is not JSON serializable"),
            ("not_a_number", "not JSON compliant"),
            ("bytes", "bytes is not JSON serializable"),
            ("surrogate", "surrogates not allowed"),
            ("circle", "Circular reference"),
        ):
            with self.subTest(what):
                status, output = self.do(what)
                self.assertEqual(status, "failed")
                self.assertIn("the output is not JSON: ", output)
                self.assertIn(reason, output)

    def test_save_keeps_a_file_and_gives_its_url(self) -> None:
        status, url = self.do("saved")
        path = self.shared.path("storage", "mixed", "job_1", f"unit_{self.next_id}")
        wanted = f"file://{path}/a%20result.txt"
        self.assertEqual((status, url), ("succeeded", wanted))
        with open(crowdnode.local_path(url)) as file:
            self.assertEqual(file.read(), "saved")

    def test_a_split_must_return_a_list(self) -> None:
        for text, status in (("text", "failed"), ("something", "succeeded")):
            outcome = self.shared.do(unit(self.new_id(), "shell", text, status=4))
            self.assertEqual(outcome[0], status)

    def test_a_program_in_any_language_is_an_action(self) -> None:
        for text, stage, wanted in (
            ("plain text", 1, "plain text\nof two lines"),
            ("something", 4, ["one", "two"]),
            ("something", 5, ["one", "two"]),
        ):
            with self.subTest(text=text, stage=stage):
                outcome = self.shared.do(
                    unit(self.new_id(), "shell", text, status=stage)
                )
                self.assertEqual(outcome, ("succeeded", wanted))
        status, output = self.shared.do(unit(self.new_id(), "shell", "json"))
        self.assertEqual(output["stage"], "process")
        self.assertIn(f"/work/shell/unit_{self.next_id}", output["pwd"])

    def test_a_program_that_fails_is_reported_with_what_it_said(self) -> None:
        for text, reason in (
            ("fail", "first line\nit broke (exit status 3)"),
            ("die", "shell.sh (killed by SIGKILL"),
            ("bytes", "standard output is not UTF-8"),
        ):
            with self.subTest(text):
                status, output = self.shared.do(unit(self.new_id(), "shell", text))
                self.assertEqual(status, "failed")
                self.assertIn(reason, output)

    def test_a_program_without_its_first_line_says_what_it_needs(self) -> None:
        status, output = self.shared.do(unit(self.new_id(), "bare"))
        self.assertEqual(status, "failed")
        self.assertIn("needs a first line such as #!/bin/sh", output)


# ---------------------------------------------------------------------------
# Built-in actions
# ---------------------------------------------------------------------------


class BuiltIn(CrowdTest):
    """CloudCrowd's own, with shell scripts in the place of their programs."""

    def pdf_programs(self) -> str:
        return self.programs(
            pdftk='case $2 in burst) for n in 1 2 3; do echo "page $n" > 0000$n.part; '
            'done;; *) cp "$1" "$last";; esac',
            gm='shift; cp "$1" "$last"',
            pdftotext='while [ "$2" != "$last" ]; do shift; done; cp "$1" "$last"',
            gs="true",
        )

    def test_graphics_magick_does_steps_and_no_shell_sees_options(self) -> None:
        path = self.programs(gm='printf \'%s\\n\' "$@" > "$last"')
        steps = [
            {"name": "a", "command": "convert", "extension": "gif",
             "options": "-size '10 x' ; $(id)"},
            {"name": "b", "command": "convert", "extension": "png", "input": "a"},
        ]  # fmt: skip
        store = f"local_storage_path={self.directory()}"
        job = ["--set", store, "--run", "graphics_magick", "LICENSE", "--options"]
        done = self.job(*job, json.dumps({"steps": steps}), path=path)
        self.assertEqual(done.returncode, 0, done.stderr)
        ((urls),) = json.loads(done.stdout)
        words = (
            crowdnode.read_file(crowdnode.local_path(urls["a"])).decode().split("\n")
        )
        self.assertEqual(words[:5], ["convert", "-size", "10 x", ";", "$(id)"])
        self.assertEqual(os.path.basename(words[5]), "LICENSE")
        words = (
            crowdnode.read_file(crowdnode.local_path(urls["b"])).decode().split("\n")
        )
        self.assertEqual(list(map(os.path.basename, words[1:3])),
                         ["LICENSE_a.gif", "LICENSE_b.png"])  # fmt: skip

    def test_what_graphics_magick_can_not_do_is_said(self) -> None:
        path = self.programs(gm="true")
        step = {"name": "a", "command": "convert", "extension": "gif"}
        store = f"local_storage_path={self.directory()}"
        job = ["--set", store, "--set", "work_unit_retries=1", "--run"]
        job += ["graphics_magick", "LICENSE", "--options"]
        for options, message in (
            ({"steps": [{**step, "input": "c"}]}, "its input c is no earlier step"),
            ({"steps": [{**step, "input": ["c"]}]}, "its input ['c'] is no earlier"),
            ({"steps": [{**step, "extension": "../x"}]}, "of letters, digits, _ and -"),
            ({"steps": [{**step, "options": "'"}]}, "No closing quotation"),
            ({"steps": {}}, "the option steps is not a list"),
        ):
            with self.subTest(options):
                done = self.job(*job, json.dumps(options), path=path)
                self.assertEqual(done.returncode, 1)
                self.assertIn(message, done.stderr)
        if not crowdnode.program_path("gm"):
            done = self.job(*job, "{}")
            self.assertIn("no such action", done.stderr)

    def test_process_pdfs_splits_into_batches_and_merges_to_one_archive(self) -> None:
        path = self.pdf_programs()
        images = [{"name": "small", "extension": "gif"}]
        done = self.job(
            "--set", f"local_storage_path={self.directory()}", "--run", "process_pdfs",
            "LICENSE", "--options", json.dumps({"batch_size": 2, "images": images}),
            path=path,
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)
        (url,) = json.loads(done.stdout)
        with tarfile.open(crowdnode.local_path(url)) as archive:
            files = [item.name for item in archive if item.isfile()]
            full = archive.extractfile("LICENSE/text/full/LICENSE.txt")
            assert full
            self.assertEqual(full.read(), b"page 1\npage 2\npage 3\n")
        pages = [f"LICENSE/text/pages/LICENSE_0000{n}.txt" for n in (1, 2, 3)]
        small = [f"LICENSE/images/small/LICENSE_0000{n}.gif" for n in (1, 2, 3)]
        wanted = [*small, "LICENSE/text/full/LICENSE.txt", *pages]
        self.assertEqual(sorted(files), wanted)

    def test_what_process_pdfs_can_not_do_is_said(self) -> None:
        path = self.pdf_programs()
        alike = os.path.join(self.directory(), "LICENSE")
        shutil.copyfile(os.path.join(HERE, "LICENSE"), alike)
        job = ["--set", f"local_storage_path={self.directory()}"]
        job += ["--set", "work_unit_retries=1", "--run", "process_pdfs"]
        page = json.dumps({"images": [{"name": "10000", "extension": "gif"}]})
        for arguments, message in (
            (["LICENSE", alike], "two inputs are named alike: LICENSE_00001.txt"),
            (["LICENSE", "--options", page], "the image name 10000 is like a page's"),
            (["LICENSE", "--options", '{"batch_size": 0}'], "is no number from 1: 0"),
            (["--strings", "x"], "the input is no URL of a PDF"),
        ):
            with self.subTest(arguments):
                done = self.job(*job, *arguments, path=path)
                self.assertEqual((done.returncode, done.stdout), (1, "[]\n"))
                self.assertIn(message, done.stderr)


# ---------------------------------------------------------------------------
# Loading actions
# ---------------------------------------------------------------------------


class Loading(CrowdTest):
    def test_what_does_not_load_is_left_out_and_said_and_the_node_starts(self) -> None:
        node = self.node(
            actions={
                **ACTIONS,
                "syntax.py": "def x(:",
                "missing.py": "import nosuchmodule",
                "none.py": "x = 1",
                "two.py": ECHO + "class Other(Action):\n    def process(self): pass\n",
                "idle.py": "from crowdnode import Action\nclass Idle(Action): pass\n",
                "leaves.py": "import sys; sys.exit(3)",
                "twice.py": ECHO,
                "twice.sh": "#!/bin/sh\necho from shell",
                "bad-name.py": ECHO,
                "_helper.py": "raise RuntimeError('helpers are not loaded')",
            },
        )
        with open(node.path("actions", "forgotten.sh"), "w") as file:
            file.write("#!/bin/sh\n")
        actions = node.status()["actions"]
        self.assertEqual(
            actions, sorted(["twice", "word_count", *(name[:-3] for name in ACTIONS)])
        )
        for said in (
            "syntax.py is left out: SyntaxError: ",
            "missing.py is left out: ModuleNotFoundError: No module named 'nosuch",
            "none.py is left out: ImportError: it must define one subclass of Action",
            "two.py is left out: ImportError: it must define one subclass of Action",
            "idle.py is left out: ImportError: its class Idle must define process",
            "leaves.py is left out: SystemExit: 3 (leaves.py, line 1, in <module>)",
            "twice.sh is left out: ",
            "bad-name.py is left out: its name must be letters",
        ):
            self.assertEqual(
                node.said(f"error: {node.path('actions')}/{said}"), 1, said
            )
        node.run("--reload")
        wait_for(
            lambda: node.said("forgotten.sh is left out: it is not exec"), "a hint"
        )

    def test_a_thread_that_is_started_by_an_import_is_warned_of_by_name(self) -> None:
        threaded = (
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=[99], name='ticker', daemon=True)"
            ".start()\n"
        )
        quiet = f"import threading\n{ECHO}"
        node = self.node(actions={"quiet.py": quiet, "threaded.py": threaded + ECHO})
        self.assertEqual(
            node.said("threaded.py starts the thread ticker when it is"), 1
        )
        self.assertEqual(node.said("when it is imported"), 1)
        self.assertEqual(node.do(unit(action="threaded")), ("succeeded", "x"))
        self.assertNotIn("DeprecationWarning", node.log())

    def test_actions_can_be_disabled_replaced_and_share_a_helper(self) -> None:
        shared = "from crowdnode import Action\nfrom _helper import answer\n"
        replaced = "class W(Action):\n    def process(self): return answer\n"
        absent: dict[str, Any] = {"action absent": "nice = 1"}
        node = self.node(
            actions={
                **ACTIONS,
                "_helper.py": "answer = 42",
                "word_count.py": shared + replaced,
            },
            disabled_actions="broken, nosuch, graphics_magick, process_pdfs",
            **absent,
        )
        actions = ["echo", "pieces", "sleeper", "waiter", "word_count"]
        self.assertEqual(node.status()["actions"], actions)
        self.assertEqual(node.do(unit(action="word_count")), ("succeeded", 42))
        self.assertEqual(node.said("disabled_actions: there is no action nosuch"), 1)
        self.assertEqual(node.said("[action absent]: there is no action absent"), 1)
        self.assertIn("no action named broken", node.do(unit(2, "broken"))[1])
        node = self.node(disable_default_actions="yes")
        self.assertNotIn("word_count", node.status()["actions"])

    def test_modules_that_do_not_load_in_time_end_the_start(self) -> None:
        slow = "import time; time.sleep(60)\n"
        node = self.prepared(
            actions={"slow.py": slow + ECHO}, constants={"LOAD_DEADLINE": 0.5}
        )
        done = node.run()
        self.assertEqual(done.returncode, 1)
        self.assertIn("the actions did not load within 0.5 s", done.stderr)

    def test_what_a_module_prints_when_it_loads_is_in_the_log(self) -> None:
        node = self.node(actions={"echo.py": "print('loading')" + ECHO})
        self.assertEqual(node.said(" fork server output: loading"), 1)


# ---------------------------------------------------------------------------
# Worker
# ---------------------------------------------------------------------------


class Workers(MixedNode):
    """What surrounds an action while it runs, and how its end is told."""

    def test_a_worker_leads_its_own_session_and_is_no_child_of_the_node(self) -> None:
        id = self.new_id()
        pid = self.shared.take(unit(id, "sleeper", "0.3"))
        wait_for(lambda: os.getsid(pid) == pid, "a session of its own")
        fork_server = self.shared.fork_server
        parent = subprocess.check_output(["ps", "-o", "ppid=", "-p", str(pid)])
        self.assertEqual(int(parent), fork_server)
        self.assertNotEqual(fork_server, self.shared.pid)
        self.shared_central.outcome(id)

    def test_a_worker_is_as_nice_as_configured(self) -> None:
        self.assertEqual(self.do("is_nice"), ("succeeded", os.nice(0) + 7))

    def test_the_work_directory_is_current_private_and_gone_afterwards(self) -> None:
        status, (here, work_directory, mode, files) = self.do("directory")
        self.assertEqual((status, here), ("succeeded", work_directory))
        self.assertEqual((mode, sorted(files)), (0o700, ["deep", "scratch"]))
        self.assertEqual(
            here, self.shared.path("state", "work", "mixed", f"unit_{self.next_id}")
        )
        self.assertFalse(os.path.exists(here))

    def test_directories_of_any_depth_are_removed_and_the_report_comes_once(
        self,
    ) -> None:
        self.assertEqual(self.do("goes_deep"), ("succeeded", None))
        work = self.shared.path("state", "work", "mixed")
        wait_for(lambda: not os.listdir(work), "all of it is gone")
        self.shared.settled()
        outcome = self.shared.do(unit(self.new_id(), "a" * 300))
        self.assertEqual(outcome[0], "failed")
        self.shared.settled()
        self.assertEqual(len(self.shared_central.reports(self.next_id)), 1)

    def test_what_a_killed_worker_leaves_in_its_work_directory_is_removed(self) -> None:
        id = self.new_id()
        pid = self.shared.take(unit(id, "mixed", options={"do": "sleeps_with_files"}))
        work = self.shared.path("state", "work", "mixed")
        locked = os.path.join(work, f"unit_{id}", "locked")
        wait_for(lambda: os.path.exists(locked), "the files are there")
        os.kill(pid, signal.SIGKILL)
        self.shared_central.outcome(id)
        wait_for(lambda: not os.listdir(work), "all of it is gone")

    def test_what_an_action_prints_is_in_the_log_with_its_pid(self) -> None:
        id = self.new_id()
        pid = self.shared.take(unit(id, "mixed", options={"do": "prints"}))
        self.shared_central.outcome(id)
        for text in ("to standard output \u2603", "to standard error", "from a child"):
            self.assertIn(f" worker[{pid}] output: {text}\n", self.shared.log())

    def test_of_much_that_is_printed_the_log_has_the_end(self) -> None:
        self.do("prints_much")
        self.assertTrue(self.shared.said("output: line 39999"))
        self.assertNotIn("output: line 1000\n", self.shared.log())

    def test_a_message_cannot_forge_lines_of_the_log(self) -> None:
        self.do("forges")
        wait_for(lambda: self.shared.said("ValueError: one"), "the log has it")
        self.assertIn(
            "\n    2026-01-01 00:00:00 node[1] info: two?[2J", self.shared.log()
        )

    def test_an_action_that_this_node_lacks_is_accepted_and_reported_failed(
        self,
    ) -> None:
        for action in ("nosuch", "../../etc", "a/b", ""):
            with self.subTest(action):
                status, output = self.shared.do(unit(self.new_id(), action))
                self.assertEqual(status, "failed")
                self.assertIn(f"this node has no action named {action}", output)

    def test_a_stage_that_the_action_lacks_is_reported_failed(self) -> None:
        id = self.new_id()
        outcome = self.shared.do(unit(id, status=crowdnode.SPLITTING))
        self.assertEqual(outcome, ("failed", "the action echo does not define split"))

    def test_a_failure_says_what_and_where_and_the_log_has_the_traceback(self) -> None:
        id = self.new_id()
        outcome = self.shared.do(unit(id, "broken"))
        self.assertEqual(
            outcome, ("failed", "ValueError: it broke (broken.py, line 6, in process)")
        )
        self.assertIn("output: Traceback", self.shared.log())

    def test_an_action_that_ends_its_process_is_reported(self) -> None:
        for what, reason in (
            ("leaves", "the worker died: exit status 3"),
            ("exits", "SystemExit: enough (mixed.py, line "),
        ):
            with self.subTest(what):
                status, output = self.do(what)
                self.assertEqual(status, "failed")
                self.assertIn(reason, output)

    def test_a_worker_that_is_killed_is_reported_with_the_signal_and_its_words(
        self,
    ) -> None:
        id = self.new_id()
        pid = self.shared.take(unit(id, "talker"))
        printed = self.shared.path("state", "units", f"{id}.out")
        wait_for(lambda: os.stat(printed).st_size, "it has said something")
        os.kill(pid, signal.SIGKILL)
        status, output = self.shared_central.outcome(id)
        self.assertEqual(status, "failed")
        self.assertIn("the worker died: killed by SIGKILL", output)
        self.assertIn("; its last words: almost done", output)

    def test_a_time_limit_ends_a_unit_and_is_named(self) -> None:
        outcome = self.shared.do(unit(self.new_id(), "sleeper", "60"))
        self.assertEqual(outcome, ("failed", "time_limit of 1 s exceeded"))

    def test_the_time_limits_of_many_that_have_ended_are_forgotten(self) -> None:
        for number in range(120):
            self.shared.take(unit(f"many-{number}"))
        outcome = self.shared.do(unit(self.new_id(), "sleeper", "60"))
        self.assertEqual(outcome, ("failed", "time_limit of 1 s exceeded"))

    def test_a_work_directory_that_an_earlier_attempt_left_is_emptied(self) -> None:
        id = self.new_id()
        left = self.shared.path("state", "work", "mixed", f"unit_{id}")
        os.makedirs(os.path.join(left, "deep"))
        outcome = self.shared.do(unit(id, "mixed", options={"do": "directory"}))
        self.assertEqual(sorted(outcome[1][3]), ["deep", "scratch"])
        self.assertEqual(os.listdir(os.path.dirname(left)), [])

    def test_benchmark_in_the_options_logs_the_time_it_took(self) -> None:
        self.shared.do(unit(self.new_id(), options={"benchmark": True}))
        wait_for(
            lambda: self.shared.said("output: benchmark: "), "the benchmark's line"
        )


# ---------------------------------------------------------------------------
# Fork server
# ---------------------------------------------------------------------------

ROGUE = """
import os, shutil, signal, sys, threading, time
from crowdnode import Action

def daemonise():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for descriptor in range(100):
                try:
                    os.close(descriptor)
                except OSError:
                    pass
            time.sleep(600)
        os._exit(0)
    os.wait()

class Rogue(Action):
    def process(self):
        return getattr(self, self.input)()

    def ignore_term(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    def block_signals(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        time.sleep(600)

    def leave_children(self):
        for _ in range(10):
            if os.fork() == 0:
                time.sleep(600)

    def leave_a_daemon(self):
        daemonise()

    def leave_a_daemon_and_die(self):
        daemonise()
        os.abort()

    def leave_a_daemon_that_must_be_killed(self):
        daemonise()
        self.ignore_term()

    def print_much(self):
        for _ in range(100):
            os.write(1, b"much " * 200_000)
        return "printed"

    def close_all_descriptors(self):
        os.closerange(0, 1000)
        return "closed"

    def close_standard_output(self):
        sys.stdout.close()
        return "closed"

    def write_over_all_descriptors(self):
        os.closerange(0, 1000)
        files = [open(f"file{number}", "w") for number in range(50)]
        return "written"

    def kill_their_group(self):
        os.killpg(0, signal.SIGKILL)

    def abort(self):
        os.abort()

    def delete_their_directory(self):
        shutil.rmtree(os.path.dirname(self.work_directory))
        return "deleted"

    def change_the_umask(self):
        os.umask(0)
        with open("file", "w") as file:
            file.write("x")
        self.save("file")

    def leave_a_thread(self):
        threading.Thread(target=time.sleep, args=[600]).start()
        return "left"

    def return_30_megabytes(self):
        return "x" * 30_000_000

    def return_100_megabytes(self):
        return "x" * 100_000_000

    def fill_the_disk(self):
        with open("large", "wb") as file:
            while True:
                file.write(bytes(1024 * 1024))

    def fill_the_memory(self):
        held = []
        while True:
            held.append(bytearray(16 * 1024 * 1024))

    def bomb(self):
        "Fork without end, each time into a session of its own; 200 times in all."
        tokens = os.open("tokens", os.O_RDWR | os.O_CREAT)
        os.write(tokens, bytes(200))
        os.lseek(tokens, 0, os.SEEK_SET)
        worker = os.getpid()
        while os.read(tokens, 1):
            if os.fork() == 0:
                os.setsid()
        if os.getpid() != worker:
            time.sleep(600)
        return "bombed"
"""


class Misbehaviour(CrowdTest):
    """Actions that do what they should not."""

    def misbehave(self, node: NodeProcess, deed: str) -> tuple[str, Any]:
        """Have it done; the outcome.  What it has left must be gone then."""
        number = len(node.central.calls)
        outcome = node.do(unit(number, "rogue", deed))
        wait_for(lambda: len(our_processes()) == 2, "node and fork server are left")
        node.settled()
        place = node.path("state", "work", "rogue", f"unit_{number}")
        self.assertFalse(os.path.exists(place))
        self.assertEqual(node.do(unit(f"well-{number}")), ("succeeded", "x"))
        self.assertEqual(len(node.central.reports(number)), 1)
        return outcome

    def check_deeds(self, deeds: list[tuple[str, str, Any]], **settings: Any) -> None:
        """Each deed with the status and output that are to be reported."""
        node = self.node(actions={**ACTIONS, "rogue.py": ROGUE}, **settings)
        for deed, status, output in deeds:
            with self.subTest(deed):
                found = self.misbehave(node, deed)
                self.assertEqual(found[0], status, found)
                if status == "failed":
                    self.assertIn(output, found[1])
                else:
                    self.assertEqual(found[1], output)

    def test_processes_that_are_left_are_ended_even_daemons(self) -> None:
        killed = "the worker died: killed by "
        self.check_deeds(
            [
                ("leave_children", "succeeded", None),
                ("leave_a_daemon", "succeeded", None),
                ("leave_a_daemon_and_die", "failed", f"{killed}SIGABRT"),
                ("leave_a_thread", "succeeded", "left"),
                ("kill_their_group", "failed", f"{killed}SIGKILL"),
                ("abort", "failed", f"{killed}SIGABRT"),
                ("bomb", "succeeded", "bombed"),
            ]
        )

    def test_nothing_keeps_a_unit_from_its_end_at_the_time_limit(self) -> None:
        exceeded = "time_limit of 0.2 s exceeded"
        self.check_deeds(
            [
                ("ignore_term", "failed", exceeded),
                ("block_signals", "failed", exceeded),
                ("leave_a_daemon_that_must_be_killed", "failed", exceeded),
            ],
            **{"action rogue": "time_limit = 0.2"},
        )

    def test_what_is_written_and_kept_is_limited(self) -> None:
        self.check_deeds(
            [
                ("fill_the_disk", "failed", "File too large"),
                ("fill_the_memory", "failed", "memory_limit is 200 MB"),
                ("return_100_megabytes", "failed", "memory_limit is 200 MB"),
            ],
            **{"action rogue": "file_limit = 5\nmemory_limit = 200"},
        )

    def test_large_outputs_are_borne(self) -> None:
        self.check_deeds(
            [
                ("print_much", "succeeded", "printed"),
                ("return_30_megabytes", "succeeded", "x" * 30_000_000),
            ]
        )

    def test_descriptors_files_and_modes_are_their_own_affair(self) -> None:
        store = os.path.join(self.directory(), "storage")
        self.check_deeds(
            [
                ("close_all_descriptors", "succeeded", "closed"),
                ("close_standard_output", "succeeded", "closed"),
                ("write_over_all_descriptors", "succeeded", "written"),
                ("delete_their_directory", "succeeded", "deleted"),
                ("change_the_umask", "succeeded", None),
            ],
            local_storage_path=store,
        )
        for path, _, files in os.walk(store):
            for name in ("", *files):
                mode = os.stat(os.path.join(path, name)).st_mode
                self.assertEqual(mode & 0o077, 0, (path, name))


# What Python loads first in the node, its fork server and workers.  It has one call of
# the system fail, once, where the program makes it: CALL PLACE CALLER ERRNO, in a file
# that all of them map.  Or, told "trace", it writes down the places.
SITECUSTOMIZE = """
import builtins, fcntl, mmap, os, socket, sys, threading

path = os.environ["CROWDNODE_FAULTS"]
with open(path, "r+b") as file:
    armed = mmap.mmap(file.fileno(), 512)
seen = os.open(path + ".seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def wrap(module, name):
    real = getattr(module, name)

    def call(*args, **options):
        frame = sys._getframe(1)
        if armed[0] and frame.f_code.co_filename.endswith("crowdnode.py"):
            site = " ".join((name, *(
                f"{code.f_code.co_name}:{code.f_lineno}"
                for code in (frame, frame.f_back)
            )))
            wanted = armed[:].rstrip(bytes(1)).decode()
            if wanted == "trace":
                write(seen, site.encode() + b"\\n")
            elif wanted.rpartition(" ")[0] == site:
                armed[0] = 0
                if name == "start":
                    raise RuntimeError("can't start new thread")
                number = int(wanted.rpartition(" ")[2])
                raise OSError(number, os.strerror(number))
        return real(*args, **options)

    setattr(module, name, call)

write = os.write
for name in '''
    chdir chmod dup2 fork ftruncate kill killpg listdir mkdir open pipe posix_spawn
    pwrite read rename replace rmdir scandir setsid truncate unlink waitpid write
'''.split():
    wrap(os, name)
wrap(builtins, "open")
wrap(fcntl, "flock")
wrap(socket, "socketpair")
wrap(threading.Thread, "start")
"""
FAULTS = ("ENOSPC", "EMFILE", "EAGAIN", "EACCES", "EIO", "EINTR")


class FaultyNode(CrowdTest):
    """A node of which any call of the system can be made to fail."""

    SUICIDE = ECHO.replace(
        "return self.input", "open('left', 'w').close(); os.kill(os.getpid(), 9)"
    )

    def setUp(self) -> None:
        directory = self.directory()
        with open(os.path.join(directory, "sitecustomize.py"), "w") as file:
            file.write(SITECUSTOMIZE)
        self.faults = os.path.join(directory, "faults")
        with open(self.faults, "wb") as file:
            file.write(bytes(512))
        self.subject = self.node(
            actions={
                **ACTIONS,
                "suicide.py": self.SUICIDE.replace("Echo", "Suicide"),
                "shell.sh": "#!/bin/sh\necho $1\n",
            },
            constants={
                "MONITOR_INTERVAL": 0.02,
                "STATUS_INTERVAL": 0,
                "RETRY_WAIT": 0.1,
                "RETRY_WAIT_LIMIT": 0.1,
                "START_DEADLINE": 2,
            },
            env={"PYTHONPATH": directory, "CROWDNODE_FAULTS": self.faults},
        )
        self.last_id = 0

    def arm(self, text: str) -> None:
        """Have this happen next; nothing, if it is empty."""
        with open(self.faults, "r+b", 0) as file:
            file.write(text.encode().ljust(512, b"\0"))

    def offer(self, offered: Any) -> None:
        """Offer a unit as central would, until it is taken."""
        wait_for(lambda: self.is_taken(offered), "it is taken", 10)

    def is_taken(self, offered: Any) -> bool:
        status, _, body = self.subject.post(offered)
        if status == 503:
            self.assertEqual(body, b"Node Overloaded")
        else:
            self.assertEqual(status, 200, body)
        return status == 200

    def plain(self, number: int) -> None:
        self.offer(unit(number, "echo"))

    def executable(self, number: int) -> None:
        self.offer(unit(number, "shell"))

    def killed(self, number: int) -> None:
        self.offer(unit(number, "suicide"))

    def superseded(self, number: int) -> None:
        self.offer(unit(number, "sleeper", "60"))
        self.offer(unit(number, "echo", attempts=1))

    def orphaned(self, number: int) -> None:
        go = self.subject.path(f"go{number}")
        self.offer(unit(number, "waiter", go))
        old = self.subject.fork_server
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: self.subject.fork_server != old, "another")
        open(go, "w").close()

    def work_directories(self) -> list[str]:
        work = self.subject.path("state", "work")
        return [
            name
            for action in os.listdir(work)
            for name in os.listdir(os.path.join(work, action))
        ]

    def play(self, scenario: Callable[[int], None]) -> None:
        """Have a unit done, and see that it is answered for."""
        self.last_id += 1
        scenario(self.last_id)
        self.subject.central.outcome(self.last_id, 10)
        wait_for(lambda: not self.subject.units(), "no record is left", 10)
        wait_for(lambda: not self.work_directories(), "no work directory is left", 10)
        self.assertEqual(len(self.subject.central.reports(self.last_id)), 1)

    def places(self, scenario: Callable[[int], None]) -> list[str]:
        """Where the program calls the system, in this scenario."""
        self.arm("trace")
        self.play(scenario)
        self.arm("")
        with open(f"{self.faults}.seen", "r+") as file:
            found = sorted(set(file.read().splitlines()))
            file.truncate(0)
        return found

    def fail_at(self, place: str, fault: str, scenario: Callable[[int], None]) -> None:
        with self.subTest(f"{scenario.__name__}: {place}: {fault}"):
            self.arm(f"{place} {getattr(errno, fault)}")
            self.play(scenario)
        self.arm("")

    def fail_each(self, scenario: Callable[[int], None], *faults: str) -> None:
        """Have each call of this scenario fail in each of these ways; those that a
        plain unit takes too have their own tests."""
        places = set(self.places(scenario))
        if scenario != self.plain:
            places -= set(self.places(self.plain))
        self.assertGreater(len(places), 2)
        for place in sorted(places):
            for fault in faults:
                self.fail_at(place, fault, scenario)
        self.assertNotIn("Traceback", self.subject.log())
        self.assertEqual(self.subject.status()["fork_server"]["restarts"], 0)


class SystemCalls(FaultyNode):
    """Every call of the system that can fail, once at each of its places."""

    def test_where_there_is_no_room_every_unit_is_answered_for(self) -> None:
        self.fail_each(self.plain, "ENOSPC", "EMFILE")

    def test_where_it_is_denied_every_unit_is_answered_for(self) -> None:
        self.fail_each(self.plain, "EACCES", "EIO")

    def test_where_it_might_work_later_every_unit_is_answered_for(self) -> None:
        self.fail_each(self.plain, "EAGAIN", "EINTR")


class MoreSystemCalls(FaultyNode):
    """The same, for what is not a plain unit."""

    def test_a_program_is_answered_for(self) -> None:
        self.fail_each(self.executable, *FAULTS)

    def test_where_there_is_no_room_a_worker_that_dies_is_answered_for(self) -> None:
        self.fail_each(self.killed, "ENOSPC", "EMFILE", "EAGAIN")

    def test_where_it_is_denied_a_worker_that_dies_is_answered_for(self) -> None:
        self.fail_each(self.killed, "EACCES", "EIO", "EINTR")

    def test_a_unit_in_the_place_of_another_is_answered_for(self) -> None:
        self.fail_each(self.superseded, *FAULTS)

    def fail_while_replaced(self, part: int) -> None:
        """Every third place, in one of the ways."""
        for number, place in list(enumerate(self.places(self.orphaned)))[part::3]:
            self.fail_at(place, FAULTS[number % len(FAULTS)], self.orphaned)
        self.assertFalse(self.subject.said("no action named"))
        self.assertNotIn("Traceback", self.subject.log())

    def test_while_a_fork_server_is_replaced_a_unit_is_answered_for(self) -> None:
        self.fail_while_replaced(0)

    def test_while_one_is_replaced_a_unit_is_answered_for_at_other_places(self) -> None:
        self.fail_while_replaced(1)

    def test_while_one_is_replaced_a_unit_is_answered_for_at_the_rest(self) -> None:
        self.fail_while_replaced(2)


# ---------------------------------------------------------------------------
# Central
# ---------------------------------------------------------------------------


class Client(CrowdTest):
    """What central is told, and what its answers mean."""

    def reporter(self, url: str) -> Callable[[], bool]:
        """Reports something to the central at *url*."""
        config = crowdnode.load_config("", [("central_server", url)])
        outcome = crowdnode.Outcome("succeeded", "0.1", b'{"output":1}')
        return lambda: crowdnode.Central(config, 9063).report("1", 2, outcome)

    def test_forms_are_encoded_as_the_standard_library_does(self) -> None:
        for value in (b"", b"a b+c&d=e%20", bytes(range(256)), "\u20ac\n".encode()):
            self.assertEqual(
                crowdnode.form_encoded([("name", value), ("x", b"y")]).decode(),
                urllib.parse.urlencode([("name", value), ("x", b"y")]),
            )

    def test_an_interim_answer_is_no_answer(self) -> None:
        interim = (
            b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"
        )
        with web_server(lambda handler: handler.wfile.write(interim)) as url:
            self.assertTrue(self.reporter(url)())

    def test_what_never_connected_was_not_received(self) -> None:
        with socket.socket() as full, contextlib.ExitStack() as stack:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for _ in range(3):  # nobody accepts, so the next to come must wait
                other = stack.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(full.getsockname())
            url = f"http://127.0.0.1:{full.getsockname()[1]}"
            hasty = unittest.mock.patch.object(crowdnode, "CONNECT_DEADLINE", 0.1)
            with hasty, self.assertRaises(crowdnode.CentralError) as caught:
                self.reporter(url)()
            self.assertTrue(caught.exception.unreached, str(caught.exception))

    def test_what_is_no_http_is_said(self) -> None:
        for answer, said in ((b"", "closed the connection"), (b"SSH-2.0\r\n", "SSH")):
            wrong = self.assertRaisesRegex(crowdnode.CentralError, said)
            with web_server(lambda handler: handler.wfile.write(answer)) as url, wrong:
                self.reporter(url)()

    def test_each_dialect_is_found_from_either_kind_of_central(self) -> None:
        for seed, paths in (
            (True, ["/node/node1.example"]),
            (False, ["/node/node1.example", "/node/node1.example:{port}"]),
        ):
            with self.subTest(seed=seed):
                central = self.central(seed=seed)
                node = self.node(
                    central, dialect="auto", host="node1.example", tag="red"
                )
                port = node.port
                calls = [path for method, path, _ in central.calls if method == "PUT"]
                self.assertEqual(calls, [path.format(port=port) for path in paths])
                names = "broken,echo,pieces,sleeper,waiter,word_count"
                wanted = {
                    "busy": "false",
                    "max_workers": "50",
                    "enabled_actions": names,
                }
                wanted.update({"port": str(port)} if seed else {"tag": "red"})
                self.assertEqual(central.check_ins()[-1], wanted)
                self.assertEqual(
                    node.status()["central"]["dialect"], "seed" if seed else "0.5"
                )
                node.stop()
                self.assertEqual(central.calls[-1][:2], ("DELETE", calls[-1]))

    def test_a_pinned_dialect_is_the_only_one_that_is_spoken(self) -> None:
        for dialect, other in (("seed", False), ("0.5", True)):
            with self.subTest(dialect):
                central = self.central(seed=other)
                node = self.prepared(central, dialect=dialect).start(wait=False)
                wait_for(node.ended, "the start fails")
                self.assertEqual(len(central.check_ins()), 1)

    def test_a_limit_or_tag_that_there_is_not_is_left_out(self) -> None:
        central = self.central()
        self.node(central, max_workers=0)
        self.assertEqual(set(central.check_ins()[0]), {"busy", "enabled_actions"})

    def test_a_wrong_password_is_said_as_such_with_the_keys_names(self) -> None:
        central = self.central(login="ali ce:s3cr:et")
        wrong = {"http_authentication": "yes", "login": "ali ce", "password": "guess"}
        done = self.prepared(central, **wrong).run()
        self.assertEqual(done.returncode, 1)
        self.assertIn("401", done.stderr)
        self.assertIn("check login and password in", done.stderr)
        done = self.prepared(central).run()
        self.assertIn("check http_authentication, login and password in", done.stderr)
        self.assertNotIn("guess", done.stderr)

    def test_both_sides_use_the_password(self) -> None:
        central = self.central(login="ali ce:s3cr:et")
        secret = {
            "http_authentication": "yes",
            "login": "ali ce",
            "password": "s3cr:et",
        }
        node = self.node(central, **secret)
        right = "Authorization: Basic YWxpIGNlOnMzY3I6ZXQ=\r\n"
        self.assertEqual(node.post(unit())[0], 401)
        self.assertEqual(node.run("--status").returncode, 0)
        self.assertEqual(node.send(work_request(unit(), right))[0], 200)
        self.assertEqual(central.outcome(1), ("succeeded", "x"))
        node.stop()
        self.assertEqual(central.calls[-1][0], "DELETE")


# ---------------------------------------------------------------------------
# Surroundings
# ---------------------------------------------------------------------------


class Surroundings(CrowdTest):
    def test_a_host_name_that_central_can_not_dial_is_warned_of(self) -> None:
        settings = [("central_server", "http://192.0.2.1"), ("host", "127.0.0.1")]
        config = crowdnode.load_config("", settings)
        ((level, sentence),) = crowdnode.host_problems(config)
        self.assertEqual(level, "warning")
        self.assertIn("is this machine alone (127.0.0.1), but central is", sentence)
        config.host = "192.0.2.2"
        self.assertEqual(crowdnode.host_problems(config), [])
        config.host = "a..b"
        self.assertIn("does not resolve here", crowdnode.host_problems(config)[0][1])

    def test_a_clock_that_stands_before_the_program_is_warned_of(self) -> None:
        path = os.path.join(self.directory(), "program")
        with open(path, "w"):
            os.utime(path, (time.time() + 3600,) * 2)
        config = crowdnode.load_config("", [("state_path", self.directory())])
        with unittest.mock.patch.object(crowdnode, "PROGRAM", path):
            warnings = crowdnode.state_warnings(config)
        self.assertIn(f"clock: it stands before the day {path} was written", warnings)

    def test_a_directory_that_cannot_be_used_is_named_with_its_key(self) -> None:
        node = self.prepared()
        for key in ("state_path", "temp_storage_path", "local_storage_path"):
            with self.subTest(key):
                done = node.run("--set", f"{key}=/dev/null/x")
                self.assertEqual(done.returncode, 1)
                self.assertIn("/dev/null", done.stderr)
                self.assertIn(key.replace("local_storage_path", "storage"), done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_a_state_path_that_is_a_file_is_said_without_a_traceback(self) -> None:
        node = self.prepared()
        shutil.rmtree(node.path("state"))
        with open(node.path("state"), "w"):
            pass
        for command in ("--status", "--stop", "--reload", "--daemon"):
            done = node.run(command)
            self.assertEqual(done.returncode, 1)
            self.assertIn("state_path: can't use", done.stderr)
            self.assertNotIn("Traceback", done.stderr)

    def test_a_directory_that_others_can_write_to_is_refused(self) -> None:
        node = self.prepared(temp_storage_path="work")
        os.mkdir(node.path("work"))
        for key, path, mode in (
            ("temp_storage_path", node.path("work"), 0o1777),
            ("state_path", node.path("state"), 0o770),
        ):
            os.chmod(path, mode)
            done = node.run("--daemon")
            self.assertEqual(done.returncode, 1)
            self.assertIn(f"{key}: others can write to {path}: chmod 700", done.stderr)
            os.chmod(path, 0o700)
        self.assertEqual(node.run("--daemon").returncode, 0)

    def test_a_state_directory_that_others_can_look_into_is_warned_of(self) -> None:
        node = self.prepared()
        os.chmod(node.path("state"), 0o755)
        node.start()
        self.assertEqual(node.said("state_path: others can look into"), 1)

    def test_a_reload_refuses_directories_that_a_start_would_refuse(self) -> None:
        node = self.daemon()
        os.mkdir(node.path("shared"))
        os.chmod(node.path("shared"), 0o777)
        node.write_config(temp_storage_path="shared")
        os.kill(node.daemon_pid, signal.SIGHUP)
        wait_for(lambda: node.said("not reloaded, all stays as it was: "), "it is said")
        self.assertEqual(node.said("temp_storage_path: others can write to"), 1)
        self.assertEqual(node.do(unit()), ("succeeded", "x"))
        self.assertEqual(os.listdir(node.path("shared")), [])


# ---------------------------------------------------------------------------
# The node's tools
# ---------------------------------------------------------------------------


class Tools(CrowdTest):
    """When work is refused; the loops; the log."""

    def assert_refused(self, node: NodeProcess, reason: str) -> None:
        status, _, body = node.post(unit(99))
        self.assertEqual((status, body), (503, b"Node Overloaded"))
        document = node.status()
        self.assertTrue(document["overloaded"])
        self.assertIn(reason, document["reason"])
        self.assertEqual(node.said(f"work is refused: {document['reason']}"), 1)

    def test_max_load_refuses_and_its_end_is_checked_in(self) -> None:
        env = self.fake_uptime('cat "$D/load"')
        load = os.path.join(env["D"], "load")

        def set_load(value: str) -> None:
            with open(load + ".part", "w") as file:
                file.write(
                    f" 13:00:00 up 1 day,  1 user,  load average: {value}, 0.1, 0.1"
                )
            os.replace(load + ".part", load)

        set_load("7.50")
        central = self.central()
        node = self.node(
            central, env=env, max_load=2.5, constants={"REMINDER_INTERVAL": 0.3}
        )
        self.assertEqual(central.check_ins()[0]["busy"], "true")
        self.assert_refused(node, "7.50 load average, max_load is 2.5")
        wait_for(lambda: node.said("work is still refused: 7.50") >= 2, "reminders")
        self.assertEqual(node.status()["load_average"], 7.5)
        set_load("0.10")
        wait_for(lambda: len(central.check_ins()) == 2, "a check-in at its end")
        self.assertEqual(central.check_ins()[1]["busy"], "false")
        self.assertEqual(node.said("over: 7.50 load average"), 1)
        self.assertEqual(node.do(unit()), ("succeeded", "x"))

    def test_little_memory_refuses_and_its_end_is_checked_in(self) -> None:
        if not os.path.exists("/proc/meminfo"):
            self.skipTest("needs /proc/meminfo")
        for key in ("min_free_memory", "min_available_memory"):
            with self.subTest(key):
                central = self.central()
                node = self.node(central, **{key: 999999})
                self.assert_refused(node, f"MB of memory, {key} is 999999")
                node.write_config(**{key: 1})
                self.assertEqual(node.run("--reload").returncode, 0)
                wait_for(lambda: node.said("work is taken again"), "it ends")
                wait_for(
                    lambda: central.check_ins()[-1]["busy"] == "false", "a check-in"
                )

    def test_max_workers_refuses_and_room_is_checked_in(self) -> None:
        central = self.central()
        node = self.node(central, max_workers=2)
        pids = [node.take(unit(id, "sleeper", "30")) for id in (1, 2)]
        self.assert_refused(node, "2 units are running, max_workers is 2")
        self.assertEqual(
            node.take(unit(1, "sleeper", "30")), pids[0], "it has that one"
        )
        self.assertEqual(len(central.check_ins()), 1)
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: len(central.check_ins()) == 2, "a check-in when there is room")
        self.assertEqual(node.do(unit(3)), ("succeeded", "x"))
        self.assertEqual(node.status()["counts"]["refused"], 1)

    def test_a_loop_that_is_hurried_stays_one_loop(self) -> None:
        steps: list[int] = []
        loop = crowdnode.Repeater(lambda: steps.append(1), 60)
        timers = threading.active_count()
        loop.start()
        for _ in range(2000):
            loop.soon()
        wait_for(lambda: steps, "a step")
        wait_for(lambda: threading.active_count() == timers + 1, "one timer is left")
        loop.stop()
        wait_for(lambda: threading.active_count() == timers, "none is left")

    def test_log_lines_look_as_they_should(self) -> None:
        node = self.daemon()
        pid = node.take(unit(7))
        node.central.outcome(7)
        wait_for(lambda: node.said("succeeded after"), "the log has it")
        self.assertRegex(
            node.log(),
            rf"(?m)^[-0-9]{{10}} [:0-9]{{8}} node\[{node.daemon_pid}\] info: "
            rf"unit 7 \(echo, process\) started as worker {pid}$",
        )

    def test_files_are_private_and_the_log_is_rotated(self) -> None:
        constants = {"LOG_SIZE": 2000, "LOGS_KEPT": 2}
        node = self.daemon(constants=constants)
        for id in range(30):
            node.do(unit(id, "sleeper", "0"))
        worker = node.take(unit(99, "sleeper", "60"))
        wait_for(
            lambda: os.path.exists(node.path("state", "work", "sleeper", "unit_99")),
            "it",
        )
        logs = sorted(name for name in os.listdir(node.path("state")) if "log" in name)
        self.assertEqual(logs, ["node.log", "node.log.1", "node.log.2"])
        for root, directories, files in os.walk(node.path("state")):
            for names, wanted in ((directories, 0o700), (files, 0o600)):
                for name in names:
                    mode = os.stat(os.path.join(root, name)).st_mode
                    self.assertEqual(stat.S_IMODE(mode), wanted, name)
        self.assertEqual(stat.S_IMODE(os.stat(node.path("state")).st_mode), 0o700)
        os.kill(worker, signal.SIGKILL)
        node.central.outcome(99)


# ---------------------------------------------------------------------------
# The node's fork servers
# ---------------------------------------------------------------------------


class ForkServers(CrowdTest):
    def test_a_child_that_somebody_waits_for_is_not_taken_for_a_stray(self) -> None:
        config = crowdnode.load_config("", [])
        servers = crowdnode.ForkServers(
            crowdnode.Program(PROGRAM),
            config,
            crowdnode.Overload(),
            lambda link, message: None,
            lambda: None,
        )
        silent = ["sh", "-c", "exec >&- 2>&-; sleep 0.3; exit 7"]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(crowdnode.run_child, silent, DEADLINE)
            while not waiting.done():
                servers.bury_strays()
        self.assertEqual(waiting.result(), (7, b"", b""))

    def test_a_dead_fork_server_is_replaced_and_its_workers_go_on(self) -> None:
        central = self.central()
        node = self.node(central)
        pid = node.take(unit(1, "sleeper", "1"))
        old = node.fork_server
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: node.fork_server != old, "another")
        wait_for(lambda: not node.status()["overloaded"], "it takes work")
        wait_for(lambda: len(central.check_ins()) == 2, "a check-in")
        self.assertEqual(node.take(unit(1, "sleeper", "1")), pid, "it has that one")
        self.assertEqual(node.do(unit(2)), ("succeeded", "x"))
        self.assertEqual(central.outcome(1), ("succeeded", "slept"))
        self.assertEqual(central.reports(1)[0]["pid"], str(pid))
        self.assertEqual(node.status()["fork_server"]["restarts"], 1)

    def test_an_action_that_loaded_before_is_waited_for(self) -> None:
        node = self.node(constants={"RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": 0.1})
        path = node.path("actions", "echo.py")
        os.rename(path, node.path("hidden"))
        os.kill(node.fork_server, signal.SIGKILL)
        wait_for(lambda: node.said("echo did not load"), "a try")
        self.assertEqual(node.post(unit(1, "echo"))[0], 503)
        os.rename(node.path("hidden"), path)
        wait_for(lambda: not node.status()["overloaded"], "another fork server")
        self.assertEqual(node.do(unit(1, "echo")), ("succeeded", "x"))

    def test_a_reload_ends_the_wait_for_another_fork_server(self) -> None:
        node = self.node()
        path = node.path("actions", "echo.py")
        os.rename(path, node.path("hidden"))
        os.kill(node.fork_server, signal.SIGKILL)
        wait_for(lambda: node.said("no fork server: echo did not load"), "a try")
        os.rename(node.path("hidden"), path)
        node.run("--reload")
        wait_for(lambda: node.said("reloaded"), "a reload")
        self.assertEqual(node.do(unit(1, "echo")), ("succeeded", "x"))

    def test_a_record_of_another_version_is_left_alone_whatever_comes(self) -> None:
        node = self.node(constants={"START_DEADLINE": 0.3})
        path, record = node.path("state", "units", "5"), b"crowdnode-unit 2 new\n"
        os.kill(node.fork_server, signal.SIGSTOP)
        with open(path, "wb") as file:
            file.write(record)
        self.assertEqual(node.post(unit(5))[0], 503)
        self.assertEqual(crowdnode.read_file(path), record)
        os.kill(node.fork_server, signal.SIGCONT)
        wait_for(lambda: not node.status()["overloaded"], "it answers again")
        os.unlink(path)

    def test_a_stopped_fork_server_is_refused_for_and_replaced(self) -> None:
        constants = {"START_DEADLINE": 0.3, "PROBE_DEADLINE": 0.5, "SEND_DEADLINE": 1}
        for size in (1, 2000000):  # the second can't even be sent
            with self.subTest(size):
                central = self.central()
                node = self.node(central, constants=constants)
                fork_server = node.fork_server
                os.kill(fork_server, signal.SIGSTOP)
                status, _, body = node.post(unit(1, input="x" * size))
                self.assertEqual((status, body), (503, b"Node Overloaded"))
                wait_for(lambda: node.said("work is refused: the fork server"), "why")
                wait_for(lambda: not node.status()["overloaded"], "another works")
                self.assertNotEqual(node.fork_server, fork_server)
                self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
                self.assertEqual(central.check_ins()[-1]["busy"], "false")
                self.assertGreater(len(central.check_ins()), 1)

    def test_a_worker_that_starts_too_late_is_ended(self) -> None:
        node = self.node(constants={"START_DEADLINE": 0.3})
        os.kill(node.fork_server, signal.SIGSTOP)
        self.assertEqual(node.post(unit(1, "sleeper", "60"))[0], 503)
        os.kill(node.fork_server, signal.SIGCONT)
        wait_for(lambda: not node.status()["overloaded"], "it answers again")
        node.settled()
        wait_for(lambda: len(our_processes()) == 2, "no worker is left")
        self.assertEqual(node.central.reports(1), [])
        self.assertEqual(node.status()["counts"]["accepted"], 0)
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))

    def test_the_fork_server_outlives_the_node_until_its_last_worker_has_ended(
        self,
    ) -> None:
        node = self.node()
        fork_server = node.fork_server
        pid = node.take(unit(1, "sleeper", "0.5"))
        node.kill()
        self.assertTrue(alive(fork_server) and alive(pid))
        wait_for(lambda: not alive(fork_server), "it ends")
        self.assertFalse(alive(pid))
        node.start()
        self.assertEqual(node.central.outcome(1), ("succeeded", "slept"))

    def test_a_full_disk_is_a_refusal_that_ends(self) -> None:
        central = self.central()
        node = self.node(central)
        units = node.path("state", "units")
        if os.getuid() == 0:
            size = "size=64k,mode=0700"
            command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", units]
            if subprocess.call(command, stderr=subprocess.DEVNULL):
                self.skipTest("can't mount a small disk")
            self.addCleanup(subprocess.call, ["umount", "-l", units])
            filler = os.path.join(units, ".filler")
            with open(filler, "wb", 0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            path, repair = filler, crowdnode.remove_file
            reason = "No space left on device"
        else:
            os.chmod(units, 0o500)
            path, repair = units, functools.partial(os.chmod, mode=0o700)
            reason = "Permission denied"
        status, _, body = node.post(unit(1))
        self.assertEqual((status, body), (503, b"Node Overloaded"))
        self.assertIn(f"can't start a worker: {reason}", node.status()["reason"])
        repair(path)
        wait_for(lambda: len(central.check_ins()) == 2, "a check-in when it is over")
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        node.settled()


# ---------------------------------------------------------------------------
# The node's units
# ---------------------------------------------------------------------------


class Work(SharedNode):
    """What becomes of a unit that is taken."""

    def test_a_unit_is_answered_with_a_pid_and_reported_with_the_fields_of_the_wire(
        self,
    ) -> None:
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

    def test_the_same_unit_again_is_answered_with_the_same_pid(self) -> None:
        id = self.new_id()
        pids = {self.shared.take(unit(id, "sleeper", "0.3")) for _ in range(3)}
        self.assertEqual(len(pids), 1)
        self.assertEqual(self.shared_central.outcome(id), ("succeeded", "slept"))
        self.assertEqual(len(self.shared_central.reports(id)), 1)

    def test_ids_may_be_words_and_units_may_lack_what_has_a_default(self) -> None:
        word = f"unit-{self.new_id()}_A"
        sparse = {"id": word, "action": "echo", "input": "[1,2]", "status": 1}
        self.assertEqual(self.shared.do(sparse), ("succeeded", [1, 2]))

    def test_a_large_unit_with_a_large_output_comes_through(self) -> None:
        text = "é\u2603<&+ " * 100000
        outcome = self.shared.do(unit(self.new_id(), input=text))
        self.assertEqual(outcome, ("succeeded", text))

    def test_status_tells_what_the_node_does(self) -> None:
        id = self.new_id()
        pid = self.shared.take(unit(id, "sleeper", "0.5"))
        status = self.shared.status()
        keys = """
            version host port pid uptime central actions max_workers overloaded reason
            load_average free_memory fork_server running unreported counts
        """
        self.assertEqual(list(status), keys.split())
        (running,) = [item for item in status["running"] if item["id"] == id]
        self.assertEqual(running.pop("pid"), pid)
        self.assertLess(running.pop("seconds"), 5)
        wanted = {"id": id, "job_id": 1, "action": "sleeper", "stage": "process"}
        self.assertEqual(running, wanted)
        self.assertEqual(list(status["counts"]), list(crowdnode.COUNTS))
        self.assertIn("echo", status["actions"])
        self.assertEqual(status["central"]["url"], self.shared_central.url)
        self.assertIsNone(status["central"]["error"])
        self.shared_central.outcome(id)

    def test_what_is_no_text_does_not_keep_lines_from_the_log(self) -> None:
        odd = unit(self.new_id(), "\ud800" + "x" * 500)
        status, _ = self.shared.do(odd)
        self.assertEqual(status, "failed")
        wait_for(lambda: self.shared.said(f"unit {odd['id']} (\\ud800xxx"), "its lines")


# ---------------------------------------------------------------------------
# Work on units
# ---------------------------------------------------------------------------


class Attempts(CrowdTest):
    """Units of one name."""

    def test_another_attempt_ends_the_worker_of_the_last(self) -> None:
        central = self.central()
        node = self.node(central)
        first = node.take(unit(1, "sleeper", "30"))
        node.take(unit(1, "sleeper", "0", attempts=1))
        self.assertEqual(central.outcome(1), ("succeeded", "slept"))
        self.assertFalse(alive(first))
        self.assertEqual(len(central.reports(1)), 1)

    def test_the_next_attempt_is_taken_while_the_last_ones_report_is_answered(
        self,
    ) -> None:
        """Up to 0.6 central hands the unit out again before it answers the report."""
        central = self.central()
        node = self.node(central)
        second: list[int] = []

        def answer(method: str, path: str, fields: Fields) -> int | None:
            if path == "/work/1" and not second:
                second.append(node.take(unit(1, attempts=1)))
            return None

        central.answer = answer
        node.take(unit(1, "broken"))
        wait_for(lambda: len(central.reports(1)) == 2, "both attempts are reported")
        reports = central.reports(1)
        self.assertEqual(
            [report["status"] for report in reports], ["failed", "succeeded"]
        )
        self.assertEqual(reports[1]["pid"], str(second[0]))

    def test_a_late_report_of_one_attempt_leaves_the_next_alone(self) -> None:
        central = self.central()
        constants = {"RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": 0.3}
        node = self.node(central, constants=constants)
        central.fail(500, "/work/")
        node.take(unit(1))
        wait_for(lambda: central.reports(1), "a report that is put off")
        go = node.path("go")
        pid = node.take(unit(1, "waiter", go, attempts=1))
        node.take(unit(2))
        wait_for(lambda: len(central.reports(2)) == 3, "later ones are tried again")
        self.assertNotIn(b"failed", node.record(1))
        self.assertEqual(node.said("unit 1 (echo, process): its record"), 0)
        self.assertEqual(len(central.reports(1)), 1)
        central.recover()
        open(go, "w").close()
        wait_for(lambda: len(central.reports(1)) == 2, "the second attempt's")
        self.assertEqual(central.reports(1)[1]["output"], '{"output":"seen"}')
        self.assertEqual(central.reports(1)[1]["pid"], str(pid))

    def test_a_unit_that_is_withdrawn_while_it_starts_is_answered_and_forgotten(
        self,
    ) -> None:
        config = crowdnode.load_config("", [("state_path", self.directory())])
        os.mkdir(config.units_path)
        reports: list[crowdnode.Unit] = []
        crowdnode.set_up_log(os.devnull, "info")
        overload, tally = crowdnode.Overload(), crowdnode.Tally()
        units = crowdnode.Units(config, overload, tally, reports.append)
        head = crowdnode.record_head(unit(1), "digest")
        entry = crowdnode.Unit(head, config)
        entry.replies_due = 1
        units.add(entry)
        units.withdraw(entry)
        self.assertTrue(entry.answered.is_set(), "nobody waits for it")
        self.assertIsNotNone(entry.refusal)
        units.end(entry)
        units.replied(entry, True)
        self.assertEqual((units.by_name, reports), ({}, []))


class Reports(CrowdTest):
    def test_a_report_waits_for_the_reply_and_a_lost_reply_withdraws_the_unit(
        self,
    ) -> None:
        central = self.central()
        node = self.node(central)
        fork_server = node.fork_server
        os.kill(fork_server, signal.SIGSTOP)
        connection = socket.create_connection(("127.0.0.1", node.port))
        connection.sendall(work_request(unit(1, "sleeper", "20")))
        linger = struct.pack("ii", 1, 0)
        # Read: else a reset would take it back.  Later ones are read after it.
        wait_for(lambda: node.status()["pid"], "it is read")
        time.sleep(0.2)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
        os.kill(fork_server, signal.SIGCONT)
        wait_for(lambda: node.said("the reply could not be written"), "a withdrawal")
        node.settled()
        self.assertEqual(central.reports(1), [])
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"), "it is offered again")
        self.assertFalse(node.said("Traceback"))

    def test_reports_go_on_until_central_takes_them(self) -> None:
        central = self.central()
        node = self.node(
            central, constants={"RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": 0.2}
        )
        statuses = iter([500, 0, 503, 204])
        central.answer = lambda method, path, _: (
            next(statuses) if path.startswith("/work/") else None
        )
        node.take(unit())
        wait_for(lambda: node.status()["counts"]["reported"] == 1, "it is taken")
        self.assertEqual(len(central.reports(1)), 4)
        self.assertEqual(len({report["time"] for report in central.reports(1)}), 1)
        node.settled()

    def test_a_report_that_central_had_is_not_hurried_by_others(self) -> None:
        central = self.central()
        node = self.node(central, constants={"RETRY_WAIT": 0.1})
        central.fail(500, "/work/1")
        node.take(unit(1))
        wait_for(lambda: central.reports(1), "a report that is put off")
        for number in range(2, 12):
            self.assertEqual(node.do(unit(f"other-{number}")), ("succeeded", "x"))
        self.assertEqual(len(central.reports(1)), 1)

    def test_a_unit_that_central_does_not_know_is_discarded(self) -> None:
        central = self.central()
        node = self.node(central)
        central.fail(404, "/work/1")
        node.take(unit())
        wait_for(lambda: node.said("central does not know it"), "the log says so")
        self.assertIsNone(node.status()["central"]["error"], "it has answered")
        node.settled()
        self.assertEqual(len(central.reports(1)), 1)

    def test_outcomes_wait_on_disk_while_central_is_away(self) -> None:
        central = self.central()
        node = self.node(central, constants={"RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": 30})
        central.stop()
        for id in range(20):
            node.take(unit(id))
        wait_for(lambda: node.status()["unreported"] == 20, "all wait")
        wait_for(lambda: len(our_processes()) == 2, "what waits is no process")
        central.start()
        for id in range(20):  # the first success wakes those that wait
            central.outcome(id, 5)
            self.assertEqual(len(central.reports(id)), 1)

    def test_a_death_that_is_reported_again_is_reported_the_same(self) -> None:
        central = self.central()
        node = self.node(central)
        central.fail(500, "/work/1")
        pid = node.take(unit(1, "sleeper", "60"))
        os.kill(pid, signal.SIGABRT)
        self.assertIn("killed by SIGABRT", central.outcome(1)[1])
        node.kill()
        central.recover()
        node.start()
        first, second = central.reports(1)
        self.assertEqual(first, second)

    def test_a_death_that_cannot_be_written_down_is_not_reported_yet(self) -> None:
        if not hasattr(resource, "prlimit"):
            self.skipTest("needs prlimit")
        node = self.node(constants={"RETRY_WAIT": 0.1})
        pid = node.take(unit(1, "sleeper", "60"))
        with no_room(node.pid):
            os.kill(pid, signal.SIGKILL)
            known = wait_for(lambda: node.status()["unreported"], "its end is known")
            self.assertEqual(known, 1)
            since = node.status()["uptime"]
            wait_for(lambda: node.status()["uptime"] > since + 0.5, "several tries")
            self.assertEqual(node.central.reports(1), [])
        self.assertIn("killed by SIGKILL", node.central.outcome(1)[1])
        node.settled()
        self.assertEqual(len(node.central.reports(1)), 1)

    def test_a_death_is_told_in_the_same_words_for_ever(self) -> None:
        if not hasattr(resource, "prlimit"):
            self.skipTest("needs prlimit")
        constants = {"RETRY_WAIT": 0.05, "RETRY_WAIT_LIMIT": 0.1}
        node = self.node(constants=constants)
        node.central.fail(500, "/work/1")
        pid = node.take(unit(1, "sleeper", "60"))
        with no_room(node.pid):
            os.kill(pid, signal.SIGKILL)
            node.central.outcome(1)  # it was given up to write its end down
        wait_for(lambda: b"failed" in node.record(1), "it can be written down")
        told = len(node.central.reports(1))
        wait_for(lambda: len(node.central.reports(1)) > told + 1, "more reports")
        node.central.recover()
        node.settled()
        outputs = {fields["output"] for fields in node.central.reports(1)}
        words = '{"output":"the worker died while nobody watched it"}'
        self.assertEqual(outputs, {words})


MOODY = """
from crowdnode import Action

class Moody(Action):
    def process(self):
        if self.input.startswith("bad"):
            raise ValueError(self.input)
        return self.input
"""


class LateCentral(Central):
    """A central that commits late, as CloudCrowd 0.7 does.

    Its dispatcher posts a unit, reads the reply, and commits the pid a while later,
    over whatever a report has changed meanwhile; then it posts the next unit.  Other
    threads take the reports.  retries: how often a unit is tried."""

    DELAYS: tuple[float, ...] = (
        0.005,
        0.02,
        0.15,
        1.2,
    )  # seconds from the reply to the commit
    WEIGHTS: tuple[float, ...] = (75, 22, 2.5, 0.5)

    def __init__(self, inputs: list[str], action: str, retries: int = 1) -> None:
        self.rows: list[dict[str, Any]] = [
            {"input": text, "status": "processing", "attempts": 0, "pid": None}
            for text in inputs
        ]
        self.action = action
        self.retries = retries
        self.random = random.Random(12)
        self.node = ""  # HOST:PORT, when it has checked in
        self.busy = False
        self.room = 0
        self.posted: int | None = None  # the row that the dispatcher has not committed
        self.changed = threading.Condition()
        self.closed = threading.Event()
        super().__init__()
        self.listed = self.pids
        self.dispatcher = threading.Thread(target=self.dispatch, daemon=True)
        self.dispatcher.start()

    def close(self) -> None:
        self.closed.set()
        with self.changed:
            self.changed.notify_all()
        self.dispatcher.join(DEADLINE)
        super().close()

    def pids(self) -> list[int]:
        """The pids of all rows that bear one: they use up the node's max_workers."""
        return [row["pid"] for row in self.rows if row["pid"] is not None]

    def state(self) -> dict[str, int]:
        """How many rows have each status, bear a pid, and are being dispatched."""
        with self.changed:
            counts = collections.Counter(row["status"] for row in self.rows)
            counts["with a pid"] = len(self.pids())
            counts["dispatched"] = int(self.posted is not None)
        return {key: count for key, count in counts.items() if count}

    def next_row(self) -> int | None:
        """The first row that is available, if the node can take it."""
        if not self.node or self.busy or len(self.pids()) >= self.room:
            return None
        for number, row in enumerate(self.rows):
            if row["status"] == "processing" and row["pid"] is None:
                return number
        return None

    def dispatch(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(
                    lambda: self.closed.is_set() or self.next_row() is not None
                )
                self.posted = self.next_row()
                if self.closed.is_set() or self.posted is None:
                    return
                row = self.rows[self.posted]
                believed = dict(row)
                node = self.node
            pid = self.post(node, self.posted, believed)
            if pid is not None:
                self.closed.wait(self.random.choices(self.DELAYS, self.WEIGHTS)[0])
            with self.changed:
                if pid is not None:
                    row.update(believed, pid=pid)
                self.posted = None

    def post(self, node: str, number: int, row: dict[str, Any]) -> int | None:
        """Post a row to the node; the pid in its reply, None if it has not taken it."""
        host, _, port = node.rpartition(":")
        body = unit(number, self.action, row["input"], attempts=row["attempts"])
        try:
            with socket.create_connection((host, int(port)), DEADLINE) as connection:
                connection.sendall(work_request(body))
                status, _, reply = read_answer(connection)
        except (OSError, IndexError):
            self.remove_node()
            return None
        if status != 200:
            self.busy = True  # until it checks in again
            return None
        return int(json.loads(reply)["pid"])

    def remove_node(self) -> None:
        """Release the units of the node."""
        with self.changed:
            self.node = ""
            for row in self.rows:
                row["pid"] = None

    def usual_answer(self, handler: Any, fields: Fields) -> int:
        status = super().usual_answer(handler, fields)
        _, kind, name = handler.path.split("/", 2) if status == 204 else ("", "", "")
        with self.changed:
            if (handler.command, kind) == ("PUT", "node"):
                self.node, self.busy = name, fields["busy"] == "true"
                self.room = int(fields["max_workers"])
            elif (handler.command, kind) == ("DELETE", "node"):
                self.remove_node()
            elif kind == "work" and int(name) >= len(self.rows):
                status = 404
            elif kind == "work":
                self.take_report(self.rows[int(name)], fields["status"])
            self.changed.notify_all()
        return status

    def take_report(self, row: dict[str, Any], status: str) -> None:
        """Reports are not idempotent: see protocol.md."""
        row.update(attempts=row["attempts"] + 1, pid=None)
        if status == "succeeded" or row["attempts"] >= self.retries:
            row["status"] = status


# A pid that is still listed is stuck soon.
HASTY = {"STUCK_AFTER": 0.05, "RETRY_WAIT": 0.1, "RETRY_WAIT_LIMIT": 0.2}


def stuck(central: Central, *ids: int, until: int = 2) -> list[int]:
    """The pids of those units that were reported, but fewer than *until* times."""
    reports = [central.reports(id) for id in ids]
    return [int(found[0]["pid"]) for found in reports if 0 < len(found) < until]


class LateCommits(CrowdTest):
    """A central that records a pid only after it has taken the unit's report."""

    def looks_since_report(self, central: Central, unit_id: Any) -> int:
        """How many GET /status came after the first report of that unit."""
        paths = [path for _, path, _ in list(central.calls)]
        report = f"/work/{unit_id}"
        if report not in paths:
            return 0
        return sum(look > paths.index(report) for look in list(central.looks))

    def test_every_unit_ends_and_none_stays_listed(self) -> None:
        inputs = [f"{'bad' if id % 2 else 'good'} {id}" for id in range(200)]
        central = LateCentral(inputs, "moody")
        self.addCleanup(central.close)
        self.node(
            central,
            actions={"moody.py": MOODY},
            max_workers=30,
            constants={
                "SUCCESS_HOLD": 0.1,
                "FAILURE_HOLD": 0.5,
                "HOLD_LIMIT": 0.6,
                "STATUS_INTERVAL": 1.25,  # longer than a commit may be late
                "STUCK_AFTER": 0.4,
            },
        )
        wanted = {"succeeded": 100, "failed": 100}
        with contextlib.suppress(AssertionError):
            wait_for(lambda: central.state() == wanted, "all units end")
        self.assertEqual(central.state(), wanted)
        wrong = [
            row
            for row in central.rows
            if row["attempts"] != 1
            or row["input"].startswith("bad") != (row["status"] == "failed")
        ]
        self.assertEqual(wrong, [])

    def test_a_unit_that_is_retried_ends_whatever_is_committed_late(self) -> None:
        central = LateCentral(["bad"] * 2, "moody", retries=3)
        central.DELAYS, central.WEIGHTS = (0.02, 0.1), (1, 1)
        self.addCleanup(central.close)
        self.node(central, actions={"moody.py": MOODY}, constants=HASTY)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: central.state() == {"failed": 2}, "all units end")
        self.assertEqual(central.state(), {"failed": 2})
        self.assertEqual([row["attempts"] for row in central.rows], [3] * 2)

    def test_the_status_is_requested_with_the_credentials(self) -> None:
        central = self.central(login="ali ce:s3cr:et")
        node = self.node(
            central,
            http_authentication="yes",
            login="ali ce",
            password="s3cr:et",
            constants=HASTY,
        )
        right = "Authorization: Basic YWxpIGNlOnMzY3I6ZXQ=\r\n"
        # More than a hundred bytes of pids, and the right one last.
        others = list(range(10**7, 10**7 + 50))
        central.listed = lambda: others + stuck(central, 1)
        self.assertEqual(node.send(work_request(unit(), right))[0], 200)
        wait_for(lambda: len(central.reports(1)) > 1, "it is reported again")

    def test_a_pid_that_is_still_listed_is_reported_again(self) -> None:
        node = self.node(constants=HASTY)
        central = node.central
        running = node.take(unit(2, "waiter", node.path("stay")))
        central.listed = lambda: [running, *stuck(central, 1)]
        node.take(unit(1))
        wait_for(lambda: len(central.reports(1)) == 2, "it is reported again")
        self.assertEqual(central.reports(1)[0], central.reports(1)[1])
        wait_for(lambda: node.units() == ["2", "2.out"], "its record is removed")
        self.assertEqual(len(central.reports(1)), 2)
        self.assertEqual(central.reports(2), [], "that one is running")
        with open(node.path("stay"), "w"):
            pass
        central.outcome(2)

    def test_a_pid_has_to_be_unlisted_twice_in_a_row(self) -> None:
        node = self.node(constants=HASTY)
        central = node.central
        # A commit that comes between the first look and the second.
        central.listed = lambda: (
            stuck(central, 1) if self.looks_since_report(central, 1) == 2 else []
        )
        node.take(unit(1))
        wait_for(lambda: len(central.reports(1)) == 2, "it is reported again")
        node.settled()
        self.assertEqual(len(central.reports(1)), 2)

    def test_a_pid_that_is_not_listed_is_forgotten(self) -> None:
        node = self.node(constants=HASTY)
        central = node.central
        central.listed_elsewhere = lambda: stuck(central, 1)  # at another node
        central.listed = lambda: (
            stuck(central, 1) if self.looks_since_report(central, 1) > 2 else []
        )
        node.do(unit(1))
        node.settled()
        node.do(unit(2))
        wait_for(lambda: self.looks_since_report(central, 2) > 1, "more looks")
        node.settled()
        self.assertEqual(len(central.reports(1)), 1)

    def test_a_kill_of_the_node_forgets_no_report(self) -> None:
        node = self.node(constants={**HASTY, "STATUS_INTERVAL": 600})
        central = node.central
        node.take(unit(1, "waiter", node.path("go")))
        for id, action in ((2, "echo"), (3, "broken")):
            node.do(unit(id, action))
            wait_for(lambda: b"\nreported" in node.record(id), "it is on disk")
        looks = len(central.looks)
        node.kill()
        central.listed = lambda: stuck(central, 2, 3)
        node.constants.update(HASTY)
        node.start()
        for id in (2, 3):
            wait_for(lambda: len(central.reports(id)) == 2, "it is reported again")
            self.assertEqual(central.reports(id)[0], central.reports(id)[1])
        self.assertEqual(central.told("DELETE", "/node"), [], "a worker lives")
        with open(node.path("go"), "w"):
            pass
        self.assertEqual(central.outcome(1), ("succeeded", "seen"))
        node.settled()
        self.assertGreater(len(central.looks), looks)
        self.assertEqual([len(central.reports(id)) for id in (2, 3)], [2, 2])

    def test_a_check_out_ends_the_watch(self) -> None:
        node = self.node(constants={**HASTY, "STATUS_INTERVAL": 600})
        central = node.central
        for id, end in ((1, node.kill), (2, node.stop)):
            node.do(unit(id))
            wait_for(lambda: b"\nreported" in node.record(id), "it is on disk")
            end()
            if id == 1:
                wait_for(lambda: not our_processes(), "no worker lives")
                node.start()
            self.assertEqual(len(central.told("DELETE", "/node")), id)
            self.assertEqual(node.units(), [])
            self.assertEqual(len(central.reports(id)), 1)

    def test_a_status_that_hangs_blocks_nothing_else(self) -> None:
        central = self.central()
        go_on = threading.Event()
        self.addCleanup(go_on.set)

        def answer(method: str, path: str, _: Fields) -> None:
            if path == "/status":
                go_on.wait(60)

        central.answer = answer
        env = self.fake_uptime('echo "load average: $(cat "$D/load"), 0.1, 0.1"')

        def set_load(value: str) -> None:
            with open(os.path.join(env["D"], "load"), "w") as file:
                file.write(value)

        set_load("0.10")
        node = self.node(central, env=env, max_load=2.5, constants=HASTY)
        node.do(unit(1))
        wait_for(lambda: central.looks, "a look")
        for load, busy in (("7.50", True), ("0.20", False)):
            set_load(load)
            wait_for(lambda: node.status()["load_average"] == float(load), "a tick")
            wait_for(lambda: node.status()["overloaded"] is busy, "the overload")
        wait_for(lambda: central.check_ins()[-1]["busy"] == "false", "a check-in")
        self.assertEqual(node.do(unit(2)), ("succeeded", "x"))
        self.assertEqual(len(central.looks), 1, "one at a time")
        started = time.monotonic()
        node.stop()
        self.assertLess(time.monotonic() - started, 5)
        self.assertEqual(central.calls[-1][0], "DELETE")

    def test_a_status_that_is_wrong_is_logged_and_requested_again(self) -> None:
        central = self.central()
        wrong: list[Any] = [500, 0, b"<html>", b"[]", b'{"nodes": [{"host": 1}]}']
        right = central.status_text

        def answer(method: str, path: str, _: Fields) -> int | None:
            if path != "/status" or not wrong:
                return None
            return wrong.pop(0) if isinstance(wrong[0], int) else None

        def status_text() -> bytes:
            return wrong.pop(0) if wrong else right()

        central.answer, central.status_text = answer, status_text  # type: ignore
        central.listed = lambda: stuck(central, 1)
        node = self.node(central, constants=HASTY)
        node.take(unit(1))
        wait_for(lambda: len(central.reports(1)) == 2, "it is reported again")
        self.assertEqual(wrong, [])
        self.assertTrue(node.said("/status"))
        self.assertFalse(node.said("Traceback"))

    def test_a_second_report_that_fails_does_not_keep_others_back(self) -> None:
        central = self.central()
        ids = (1, 2, 3)
        refused: list[int] = []
        freed: set[int] = set()

        def answer(method: str, path: str, _: Fields) -> int | None:
            for id in ids:
                if path == f"/work/{id}" and len(central.reports(id)) > 1:
                    refused.extend([] if refused else [id])
                    if refused == [id] and len(freed) < 2:
                        return 500
                    freed.add(id)
            return None

        central.answer = answer
        central.listed = lambda: stuck(
            central, *(id for id in ids if id not in freed), until=1000
        )
        node = self.node(central, constants=HASTY)
        for id in ids:
            node.take(unit(id))
        wait_for(lambda: len(freed) == 3, "all are reported again")
        node.settled()
        for id in ids:
            if refused == [id]:
                self.assertGreaterEqual(len(central.reports(id)), 3)
            else:
                self.assertEqual(len(central.reports(id)), 2)


class Holds(CrowdTest):
    """How long a report waits for central to have recorded the pid."""

    def test_a_success_is_held_until_the_next_unit_arrives(self) -> None:
        constants = {"SUCCESS_HOLD": 60, "FAILURE_HOLD": 60, "HOLD_LIMIT": 60}
        node = self.node(constants=constants)
        central = node.central
        node.take(unit(1))
        wait_for(lambda: node.status()["unreported"] == 1, "it is held")
        node.take(unit(2, "broken"))
        self.assertEqual(central.outcome(1), ("succeeded", "x"))
        wait_for(lambda: node.status()["unreported"] == 1, "the failure is held")
        node.take(unit(3))
        wait_for(lambda: node.status()["unreported"] == 2, "both are held")
        node.take(unit(4))
        self.assertEqual(central.outcome(3), ("succeeded", "x"))
        self.assertEqual(central.reports(2), [], "no unit releases a failure")

    def test_a_report_is_held_for_a_time_that_starts_with_the_reply(self) -> None:
        times: dict[str, float] = {}
        central = self.central()

        def note_time(method: str, path: str, _: Fields) -> None:
            times.setdefault(path, time.monotonic())

        central.answer = note_time
        constants = {"SUCCESS_HOLD": 0.6, "FAILURE_HOLD": 0.9}
        node = self.node(central, constants=constants)
        units = (
            (1, "sleeper", 0.9, 1.4),  # not 1.5: it runs longer than its hold
            (2, "broken", 0.9, DEADLINE),
            (3, "echo", 0.6, DEADLINE),
        )
        for id, action, *_ in units:
            times[action] = time.monotonic()
            node.take(unit(id, action, "0.9"))
        for id, action, earliest, latest in units:
            with self.subTest(action):
                central.outcome(id)
                took = wait_for(lambda: times.get(f"/work/{id}"), "it") - times[action]
                self.assertTrue(earliest <= took <= latest, took)

    def test_a_death_is_on_disk_before_its_report_is_held(self) -> None:
        for name, end in (("kill", NodeProcess.kill), ("stop", NodeProcess.stop)):
            with self.subTest(name):
                central = self.central()
                node = self.node(
                    central, constants={"FAILURE_HOLD": 60, "HOLD_LIMIT": 60}
                )
                pid = node.take(unit(1, "sleeper", "60"))
                os.kill(pid, signal.SIGABRT)
                wait_for(lambda: node.status()["unreported"] == 1, "it is held")
                central.fail(500, "/node/", "DELETE")  # so that a stop releases nothing
                end(node)
                central.recover()
                node.constants.update(FAILURE_HOLD=0.01)
                node.start()
                self.assertIn("killed by SIGABRT", central.outcome(1)[1])

    def test_the_dialect_seed_has_no_hold_and_no_look_at_the_status(self) -> None:
        constants = {"SUCCESS_HOLD": 60, "FAILURE_HOLD": 60, "HOLD_LIMIT": 60}
        central = self.central(seed=True)
        node = self.node(central, dialect="seed", constants=constants)
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        self.assertEqual(node.do(unit(2, "broken"))[0], "failed")
        node.settled()
        self.assertEqual(central.looks, [])

    def test_the_hold_doubles_up_to_its_limit_and_halves_again(self) -> None:
        # A test of the class alone, whose names are the program's own affair.
        hold = crowdnode.ReportHold(unittest.mock.Mock(), unittest.mock.Mock())
        self.assertEqual(hold.factor, 1)
        hold.found()
        self.assertEqual(hold.factor, 2)
        for _ in range(20):
            hold.found()
        most = crowdnode.HOLD_LIMIT / crowdnode.SUCCESS_HOLD
        self.assertTrue(2 < hold.factor <= most, hold.factor)
        highest, now = hold.factor, time.monotonic()
        hold.relax(now + crowdnode.HOLD_MEMORY - 60)
        self.assertEqual(hold.factor, highest)
        now += crowdnode.HOLD_MEMORY + 1
        hold.relax(now)
        self.assertEqual(hold.factor, highest / 2)
        hold.relax(now + 60)
        self.assertEqual(hold.factor, highest / 2, "once in that time")
        for _ in range(20):
            now += crowdnode.HOLD_MEMORY + 1
            hold.relax(now)
        self.assertEqual(hold.factor, 1)

    def test_a_found_pid_doubles_the_hold(self) -> None:
        constants = {**HASTY, "FAILURE_HOLD": 0.25}
        node = self.node(constants=constants)
        central = node.central
        central.listed = lambda: stuck(central, 1)
        node.take(unit(1))
        wait_for(lambda: len(central.reports(1)) == 2, "it is reported again")
        node.settled()
        sent = time.monotonic()
        node.do(unit(2, "broken"))
        self.assertGreaterEqual(time.monotonic() - sent, 0.5)


class Refused(CrowdTest):
    """Outcomes that central cannot take."""

    def test_an_output_that_is_nested_too_deeply_fails_its_unit(self) -> None:
        node = self.node(constants=HASTY)
        failure = (
            "failed",
            "the output is nested more than 99 deep, which central's Ruby can't parse",
        )
        for id, text in enumerate(
            ("[" * 99 + "]" * 99, '[{"a":' * 49 + "[]" + "}]" * 49)
        ):
            self.assertEqual(
                node.do(unit(id, "echo", text)), ("succeeded", json.loads(text))
            )
        for id, text in enumerate(
            (
                "[" * 100 + "]" * 100,
                '{"a":' * 100 + "1" + "}" * 100,
                "[1, " + "[" * 99 + "]" * 99 + ", [2]]",
            ),
            10,
        ):
            status, message = node.do(unit(id, "echo", text))
            self.assertEqual((status, message[: len(failure[1])]), failure)
        for id, text in enumerate(
            ('\\"[' * 200, str([[]] * 200), "x" + "[{" * 200), 20
        ):
            self.assertEqual(node.do(unit(id, "echo", text))[0], "succeeded", text)

    def test_a_report_that_is_too_much_for_central_is_given_up(self) -> None:
        central = self.central()

        def answer(method: str, path: str, fields: Fields) -> int | None:
            too_much = path == "/work/1" and fields["status"] == "succeeded"
            return 500 if too_much else None

        central.answer = answer
        constants = {"RETRY_WAIT": 0.05, "RETRY_WAIT_LIMIT": 0.1}
        node = self.node(central, constants=constants)
        text = "\u20ac" * 5000
        node.take(unit(1, "echo", text))
        wait_for(lambda: len(central.reports(1)) > 5, "no other report has been taken")
        self.assertNotIn("failed", [report["status"] for report in central.reports(1)])
        others = iter(range(2, 1000))
        wait_for(
            lambda: (
                central.reports(1)[-1]["status"] == "failed"
                or not node.do(unit(next(others)))
            ),
            "it is given up",
        )
        first, last = central.reports(1)[0], central.reports(1)[-1]
        self.assertEqual(json.loads(first["output"]), {"output": text})
        message = json.loads(last["output"])["output"]
        self.assertIn("RACK_QUERY_PARSER_BYTESIZE_LIMIT", message)
        sizes = [int(number) for number in re.findall(r"\d+", message.replace(",", ""))]
        form = len(urllib.parse.urlencode(first))
        output = len(urllib.parse.quote_plus(first["output"]))
        self.assertTrue(any(output <= size <= form for size in sizes), message)
        self.assertEqual({**first, **last}, last, "the same fields")
        node.settled()
        self.assertEqual(central.reports(1)[-1], last)
        self.assertEqual(central.reports(1).count(last), 1)


class Orphans(CrowdTest):
    """Workers whose fork server, or node, has gone."""

    def test_an_orphan_keeps_its_time_limit_and_its_death_is_noticed(self) -> None:
        central = self.central()
        limit = {"action sleeper": "time_limit = 1"}
        node = self.node(central, **limit)
        node.take(unit(1, "sleeper", "60"))
        killed = node.take(unit(2, "sleeper", "60"))
        os.kill(node.fork_server, signal.SIGKILL)
        os.kill(killed, signal.SIGKILL)
        self.assertEqual(central.outcome(1), ("failed", "time_limit of 1 s exceeded"))
        outcome = central.outcome(2)
        self.assertEqual(outcome, ("failed", "the worker died while nobody watched it"))

    def test_an_orphan_whose_record_is_spoilt_ends_all_the_same(self) -> None:
        node = self.node()
        pid = node.take(unit(1, "sleeper", "60"))
        os.kill(node.fork_server, signal.SIGKILL)
        wait_for(lambda: node.said("work is taken again") == 2, "another is there")
        with open(node.path("state", "units", "1"), "ab") as file:
            file.write(b"nonsense\n")
        os.kill(pid, signal.SIGKILL)
        self.assertEqual(node.central.outcome(1)[0], "failed")
        node.settled()

    def test_a_child_that_holds_the_lock_of_a_dead_orphan_does_not_keep_it_alive(
        self,
    ) -> None:
        forks = ECHO.replace("return self.input", "os.fork(); time.sleep(60)")
        central = self.central()
        node = self.node(central, actions={"forks.py": forks.replace("Echo", "Forks")})
        pid = node.take(unit(1, "forks"))
        wait_for(lambda: len(our_processes()) == 4, "the child is there")
        os.kill(node.fork_server, signal.SIGKILL)
        wait_for(lambda: not node.status()["overloaded"], "another is there")
        os.kill(pid, signal.SIGKILL)
        self.assertEqual(central.outcome(1)[0], "failed")
        wait_for(lambda: len(our_processes()) == 2, "the child is gone")

    def test_after_a_kill_of_the_node_the_next_one_settles_everything(self) -> None:
        central = self.central()
        node = self.node(central)
        running = node.take(unit(1, "sleeper", "2"))
        killed = node.take(unit(2, "sleeper", "60"))
        node.take(unit(3, "sleeper", "0.1"))
        central.stop()
        wait_for(
            lambda: node.said("unit 3 (sleeper, process): central has not"), "3 waits"
        )
        node.kill()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: not alive(killed), "it is dead")
        central.start()
        node.start()
        self.assertEqual(central.outcome(3), ("succeeded", "slept"))
        self.assertEqual(central.outcome(2)[0], "failed")
        self.assertEqual(node.take(unit(1, "sleeper", "2")), running, "it has that one")
        self.assertEqual(central.outcome(1), ("succeeded", "slept"))
        self.assertEqual(central.told("DELETE", "/node"), [], "a worker lived")
        self.assertEqual([len(central.reports(id)) for id in (1, 2, 3)], [1, 1, 1])
        node.settled()


# ---------------------------------------------------------------------------
# What the node shows
# ---------------------------------------------------------------------------


class Shown(CrowdTest):
    """The page, the metrics, the status."""

    def test_the_page_says_all_and_runs_nothing_that_a_unit_brings(self) -> None:
        central = self.central()
        node = self.node(
            central, tag="the <tag>", **{"action sleeper": "time_limit = 60"}
        )
        node.take(unit(1, "sleeper", "60"))
        node.do(unit(2, "broken"))
        node.do(unit(3, "<script>alert(1)</script>"))
        central.fail(500, "/work/4")
        node.take(unit(4))
        wait_for(lambda: central.reports(4), "a report")
        page = wait_for(
            lambda: (lambda text: text if "it answered 500" in text else "")(
                node.get("/")[2].decode()
            ),
            "what central answered",
        )
        for text in (
            f"<h1>127.0.0.1:{node.port} <small>the &lt;tag&gt;</small></h1>",
            f"{central.url}, answered ",
            '<meter max="60" value="',
            "ValueError: it broke (broken.py, line 6, in process)",
            "no action named &lt;script&gt;alert(1)",
            "Waiting for central (1)",
            "<dt>Work</dt><dd>taken</dd>",
        ):
            self.assertIn(text, page)
        self.assertNotIn("<script>alert", page)
        self.assertEqual(re.findall(r"(?:src|href)=\W*http", page), [])

    def test_the_page_lets_a_browser_run_and_draw_what_is_its_own_alone(self) -> None:
        node = self.node()
        status, headers, body = node.get("/")
        self.assertEqual((status, headers["Content-Type"][:9]), (200, "text/html"))
        policy = headers["Content-Security-Policy"]
        self.assertIn("default-src 'none'", policy)
        for tag in ("style", "script"):
            (text,) = re.findall(f"(?s)<{tag}>(.*)</{tag}>", body.decode())
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertIn(f"{tag}-src 'sha256-{digest}'", policy)

    def test_the_page_says_why_and_since_when_work_is_refused(self) -> None:
        node = self.node(max_load=0.01)
        page = node.get("/")[2].decode()
        self.assertRegex(
            page, r"refused for [\d.]+ s: .* load average, max_load is 0.01"
        )
        self.assertRegex(page, r"<dt>Load</dt><dd>[\d.]+, max 0.01")

    def test_the_last_hour_is_kept_a_minute_each(self) -> None:
        history = crowdnode.History()
        for minute in range(70):
            history.note(1.0, None, 10 * minute)
            self.assertEqual(len(history.minutes), min(60, minute))
            history._began -= 60
        load, memory, units = history.minutes[-1]
        self.assertEqual((load, memory, round(units)), (1.0, None, 10))
        plot = crowdnode.draw_plot("load", [1.0, None, 3.0], 2.0)
        self.assertIn("load: 3 now, 1 to 3", plot)
        self.assertIn('points="57,68.3 59,4.8"', plot)
        self.assertIn("nothing yet", crowdnode.draw_plot("load", [None], None))

    def test_times_are_rounded_as_people_do(self) -> None:
        for seconds, words in (
            (None, "never"), (0.04, "0.0 s"), (9.94, "9.9 s"), (119, "119 s"),
            (150, "2 min"), (7200, "2 h"), (200_000, "2 d"),
        ):  # fmt: skip
            self.assertEqual(crowdnode.ago(seconds), words)

    def test_metrics_say_what_the_status_says(self) -> None:
        node = self.node()
        for number in range(3):
            node.do(unit(number + 1))
        node.do(unit(4, "broken"))
        node.do(unit(5, 'odd"\n'))
        status, headers, body = node.get("/metrics")
        self.assertEqual((status, headers["Content-Type"][:25]),
                         (200, "text/plain; version=0.0.4"))  # fmt: skip
        lines = body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")
        counts = node.status()["counts"]
        for name, value in (
            ("units_accepted_total", counts["accepted"]),
            ('units_total{outcome="succeeded"}', 3),
            ('units_total{outcome="failed"}', 2),
            ("overloaded", 0),
            ("max_workers", 50),
            ('unit_seconds_count{action="echo",stage="process"}', 3),
            ('unit_seconds_bucket{action="echo",stage="process",le="+Inf"}', 3),
            ('unit_seconds_count{action="unknown",stage="process"}', 1),
        ):
            self.assertEqual(values[f"crowdnode_{name}"], str(value), name)
        for name in values:
            family = re.sub(r"(_bucket|_sum|_count)?(\{.*)?$", "", name)
            self.assertTrue(
                any(line.startswith(f"# TYPE {family} ") for line in lines), name
            )
        self.assertEqual(
            crowdnode.sample("x", 1, a='"\\\n'), r'crowdnode_x{a="\"\\\n"} 1'
        )


# ---------------------------------------------------------------------------
# The node's routes
# ---------------------------------------------------------------------------


FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"


def raw(line: bytes, rest: bytes = b"") -> bytes:
    """A request of that first line."""
    return line + b" HTTP/1.1\r\n" + rest + b"\r\n"


def post(body: bytes, path: bytes = b"/work", header: bytes = FORM) -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return raw(b"POST " + path, header + length) + body


def bad(**more: Any) -> bytes:
    return work_request({**unit(), **more})


BAD_REQUESTS: list[tuple[bytes, int, str]] = [
    (post(b""), 400, "no field work_unit"),
    (post(b"x=1"), 400, "no field work_unit"),
    (post(b"work_unit=%7Bnot+json"), 400, "not JSON"),
    (post(b"work_unit=null"), 400, "not a JSON object"),
    (post(b"work_unit=%5B1%5D"), 400, "not a JSON object"),
    (post(b"work_unit=%FF"), 400, "not UTF-8"),
    (post(b"work_unit=\xff"), 400, "not UTF-8"),
    (post(b"&".join([b"x=1"] * 1001)), 400, "The form can't be read"),
    (work_request("[" * 10000 + "]" * 10000), 400, "not JSON"),
    (work_request(json.dumps(unit(options={"n": float("nan")}))), 400, "NaN"),
    (work_request('{"id": 1e999}'), 400, "1e999 is out of range"),
    (bad(id=None), 400, "the unit's id"),
    (bad(id="../x"), 400, "the unit's id"),
    (bad(id="a\0"), 400, "the unit's id"),
    (bad(id="x" * 65), 400, "the unit's id"),
    (bad(id=1.5), 400, "the unit's id"),
    (bad(id=True), 400, "the unit's id"),
    (bad(job_id="../1"), 400, "the unit's job_id"),
    (bad(status=2), 400, "status is unknown"),
    (bad(status="1"), 400, "status is unknown"),
    (bad(status=True), 400, "status is unknown"),
    (bad(input=3), 400, "input is not a string"),
    (bad(action=3), 400, "action is not a string"),
    (bad(options=[]), 400, "options is not an object"),
    (b"HELLO\r\n\r\n", 400, "is not METHOD PATH HTTP"),
    (raw(b"GET /", b"no colon\r\n"), 400, "A header is not NAME: VALUE"),
    (raw(b"GET /", b"a: b\r\n" * 101), 400, "There are more than 100 headers"),
    (raw(b"POST /work"), 411, "Content-Length"),
    (raw(b"POST /work", b"Transfer-Encoding: chunked\r\n"), 411, "Content-Length"),
    (raw(b"POST /work", b"Content-Length: 99999999999\r\n"), 413, "64 MB"),
    (raw(b"POST /work", b"Content-Length: -1\r\n"), 400, "Content-Length"),
    (raw(b"GET /" + b"x" * 70000), 414, "too long"),
    (raw(b"GET /nowhere"), 404, "Not Found"),
    (raw(b"GET /heartbeat/"), 404, "Not Found"),
    (raw(b"GET /work"), 404, "Not Found"),
    (raw(b"DELETE /work"), 404, "Not Found"),
    (raw(b"OPTIONS /work"), 404, "Not Found"),
    (post(b"", b"/heartbeat"), 404, "Not Found"),
    (raw(b"GET http://[x/"), 400, "can't be read"),
]
ODD_REQUESTS: list[tuple[bytes, int, bytes]] = [
    (raw(b"GET /heartbeat"), 200, b"buh-bump"),
    (raw(b"GET /heartbeat?x=1", b"Host: x\r\n"), 200, b"buh-bump"),
    (b"GET /heartbeat HTTP/1.0\r\n\r\n", 200, b"buh-bump"),
    (b"GET /heartbeat HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200, b"buh-bump"),
    (raw(b"GET /heartbeat", b"Connection: close\r\n"), 200, b"buh-bump"),
    (raw(b"GET http://node1.example:9063/heartbeat"), 200, b"buh-bump"),
    (b"\r\n" + raw(b"GET /heartbeat"), 200, b"buh-bump"),
    (raw(b"HEAD /heartbeat"), 200, b""),
    (raw(b"HEAD /nowhere"), 404, b""),
]


class Routes(SharedNode):
    """What is answered to a request."""

    def test_bad_requests_get_a_status_and_a_sentence(self) -> None:
        for request, status, sentence in BAD_REQUESTS:
            with self.subTest(request[:200]):
                answer = self.shared.send(request)
                self.assertEqual(answer[0], status, answer)
                self.assertIn(sentence, answer[2].decode())
                self.assertNotIn(b"Traceback", answer[2])
        self.assertEqual(self.shared.get("/heartbeat")[2], b"buh-bump")
        self.assertNotIn(
            "Traceback", self.shared.log().replace("output: Traceback", "")
        )

    def test_the_odd_requests_of_the_wire_are_answered_as_there(self) -> None:
        for request, status, body in ODD_REQUESTS:
            with self.subTest(request):
                answer = self.shared.send(request)
                self.assertEqual((answer[0], answer[2]), (status, body))
        _, headers, _ = self.shared.send(b"HEAD /heartbeat HTTP/1.1\r\n\r\n")
        self.assertEqual(headers["Content-Length"], "8")

    def test_a_body_that_ends_early_is_a_bad_request(self) -> None:
        with socket.create_connection(("127.0.0.1", self.shared.port)) as connection:
            connection.sendall(b"POST /work HTTP/1.1\r\nContent-Length: 10\r\n\r\nwork")
            connection.shutdown(socket.SHUT_WR)
            status, _, body = read_answer(connection)
        self.assertEqual((status, body), (400, b"The body ended after 4 of 10 bytes."))

    def test_a_post_with_a_method_override_counts_as_that_method(self) -> None:
        form = b"Content-Type: application/x-www-form-urlencoded\r\n"
        head = b"POST %s HTTP/1.1\r\n" + form + b"%sContent-Length: %d\r\n\r\n%s"
        get = b"_method=GET"
        for path, header, body, status in (
            (b"/heartbeat", b"", get, 200),
            (b"/heartbeat", b"X-HTTP-Method-Override: get\r\n", b"", 200),
            (b"/heartbeat", b"", b"_method=NONSENSE", 404),
            (b"/work", b"", get + b"&work_unit=%7B%7D", 404),
        ):
            with self.subTest(path=path, header=header, body=body):
                request = head % (path, header, len(body), body)
                self.assertEqual(self.shared.send(request)[0], status)

    def test_the_unit_may_stand_in_the_query_and_may_come_in_two_pieces(self) -> None:
        id = self.new_id()
        query = urllib.parse.urlencode({"work_unit": json.dumps(unit(id))})
        request = f"POST /work?{query} HTTP/1.1\r\nContent-Length: 0\r\n\r\n"
        self.assertEqual(self.shared.send(request.encode())[0], 200)
        self.shared_central.outcome(id)
        id = self.new_id()
        head, _, body = work_request(unit(id)).partition(b"\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.shared.port)) as connection:
            connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
            self.assertEqual(connection.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(body)
            self.assertEqual(read_answer(connection)[0], 200)
        self.shared_central.outcome(id)


class Connections(CrowdTest):
    """Who may connect, and for how long."""

    def test_credentials_are_answered_as_on_the_wire(self) -> None:
        secret = {
            "http_authentication": "yes",
            "login": "ali ce",
            "password": "s3cr:et",
        }
        node = self.node(self.central(login="ali ce:s3cr:et"), **secret)
        required = b"Authorization Required"
        for path, header, status, body in (
            ("/heartbeat", "", 401, required),
            ("/nowhere", "", 401, required),
            ("/heartbeat", "Basic YWxpIGNlOndyb25n", 401, required),
            ("/heartbeat", "Basic YWxpIGNl", 401, required),
            ("/heartbeat", "Basic YWxpIGNlOnMzY3I6ZXQ=", 200, b"buh-bump"),
            ("/heartbeat", "basic YWxpIGNlOnMzY3I6ZXQ=", 200, b"buh-bump"),
            ("/heartbeat", "Digest username=x", 400, b"Bad Request"),
            ("/heartbeat", "Basic", 400, b"Bad Request"),
            ("/heartbeat", "Basic ?!", 400, b"Bad Request"),
            ("/nowhere", "Basic YWxpIGNlOnMzY3I6ZXQ=", 404, b"Not Found"),
        ):
            with self.subTest(path=path, header=header):
                line = f"Authorization: {header}\r\n" if header else ""
                request = f"GET {path} HTTP/1.1\r\n{line}\r\n".encode()
                answer = node.send(request)
                self.assertEqual((answer[0], answer[2]), (status, body))
                if status == 401:
                    realm = answer[1]["WWW-Authenticate"]
                    self.assertEqual(realm, 'Basic realm="CloudCrowd"')
        head = node.send(b"HEAD /heartbeat HTTP/1.1\r\n\r\n")
        self.assertEqual(
            (head[0], head[1]["Content-Length"], head[2]), (401, "22", b"")
        )

    def test_a_node_may_listen_on_ipv6(self) -> None:
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                self.skipTest("needs IPv6")
        node = self.node(bind="::1")
        self.assertEqual(node.run("--status").returncode, 0)

    def test_addresses_and_networks_in_allow_may_connect(self) -> None:
        node = self.node(allow="192.0.2.7, 127.0.0.0/8")
        self.assertEqual(node.get("/heartbeat")[0], 200)

    def test_an_answer_over_an_unread_body_is_not_lost(self) -> None:
        node = self.node(allow="192.0.2.0/24")
        big = b"POST /work HTTP/1.1\r\nContent-Length: 8000000\r\n\r\n" + b"x" * 8000000
        status, _, body = node.send(big)
        self.assertEqual(
            (status, body), (403, b"127.0.0.1 is not in this node's allow.")
        )
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
        address = ("127.0.0.1", node.port)
        with contextlib.ExitStack() as stack:
            silent = [
                stack.enter_context(socket.create_connection(address))
                for _ in range(30)
            ]
            self.assertEqual(node.do(unit()), ("succeeded", "x"))
            self.assertEqual(
                silent[0].recv(1), b"", "the first to come is closed first"
            )


# ---------------------------------------------------------------------------
# The node's life
# ---------------------------------------------------------------------------


class Starts(CrowdTest):
    def test_a_first_check_in_that_fails_ends_the_start(self) -> None:
        central = self.central()
        central.stop()
        node = self.prepared(central)
        done = node.run()
        central.start()
        self.assertEqual(done.returncode, 1)
        self.assertIn(
            f"crowdnode: Failed to connect to the central server ({central.url}). ",
            done.stderr,
        )
        self.assertIn("Connection refused", done.stderr)
        self.assertNotIn("Traceback", done.stderr)

    def test_later_failures_never_end_the_node_and_are_tried_again_soon(self) -> None:
        central = self.central()
        constants = {"CHECK_IN_INTERVAL": 0.2, "RETRY_WAIT": 0.1}
        node = self.node(central, constants=constants)
        central.stop()
        wait_for(lambda: node.said("Failed to connect to the central") >= 3, "failures")
        self.assertFalse(node.ended())
        count = len(central.check_ins())
        central.start()
        wait_for(lambda: len(central.check_ins()) > count, "a check-in")

    def test_a_start_that_waits_for_central_can_be_stopped(self) -> None:
        central = self.central()
        over = threading.Event()
        self.addCleanup(over.set)
        central.answer = lambda method, path, _: 204 if over.wait(DEADLINE) else None
        node = self.prepared(central).start(wait=False)
        wait_for(central.check_ins, "it waits for an answer")
        os.kill(node.pid, signal.SIGINT)
        self.assertEqual(node.wait(), 1)
        self.assertFalse(over.is_set())
        said = "crowdnode: stopped by SIGINT while starting"
        self.assertEqual(node.said(said), 1)
        self.assertNotIn("Traceback", node.log())
        over.set()
        central.recover()
        del central.calls[:]
        node.start()
        methods = [method for method, _, _ in central.calls]
        self.assertEqual(methods, ["DELETE", "PUT"], "central may have taken it")

    def test_central_may_hand_out_work_before_it_answers_a_check_in(self) -> None:
        central = self.central()
        node = self.prepared(central)
        pids: list[int] = []

        def answer(method: str, path: str, fields: Fields) -> int | None:
            if path.startswith("/node/") and not pids and method == "PUT":
                pids.append(node.take(unit(7)))
            return None

        central.answer = answer
        node.start()
        self.assertEqual(central.outcome(7), ("succeeded", "x"))
        self.assertEqual(central.reports(7)[0]["pid"], str(pids[0]))

    def test_a_stop_before_that_answer_ends_what_was_taken(self) -> None:
        central = self.central()
        node = self.prepared(central, drain_time=30)
        pids: list[int] = []
        over = threading.Event()
        self.addCleanup(over.set)

        def answer(method: str, path: str, fields: Fields) -> int | None:
            if method == "PUT" and not pids:
                pids.append(node.take(unit(7, "sleeper", "60")))
                over.wait(DEADLINE)
            return None

        central.answer = answer
        node.start(wait=False)
        wait_for(lambda: pids, "a worker runs")
        os.kill(node.pid, signal.SIGTERM)
        wait_for(lambda: node.said("1 units are running"), "it waits for the unit")
        os.kill(node.pid, signal.SIGTERM)
        self.assertEqual(node.wait(), 1)
        self.assertFalse(alive(pids[0]))
        self.assertEqual(central.calls[-1][0], "DELETE")
        self.assertEqual(central.reports(7), [], "central has given it to another")
        self.assertEqual(node.units(), [])

    def test_a_stop_of_a_start_leaves_what_an_earlier_node_has_left(self) -> None:
        central = self.central()
        node = self.node(central)
        pid = node.take(unit(1, "sleeper", "60"))
        node.kill()
        over = threading.Event()
        self.addCleanup(over.set)
        central.answer = lambda method, path, _: 204 if over.wait(DEADLINE) else None
        before = len(central.calls)
        node.start(wait=False)
        wait_for(lambda: len(central.calls) > before, "it waits for an answer")
        os.kill(node.pid, signal.SIGTERM)
        self.assertEqual(node.wait(), 1)
        self.assertTrue(alive(pid))
        over.set()
        central.recover()
        node.start()
        self.assertEqual(node.take(unit(1, "sleeper", "60")), pid, "it goes on")
        self.assertEqual(central.reports(1), [])

    def test_a_start_after_an_unclean_end_checks_out_before_it_checks_in(self) -> None:
        central = self.central()
        node = self.node(central)
        node.take(unit(1, "sleeper", "60"))
        node.kill()
        for line in our_processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)
        wait_for(lambda: not our_processes(), "all are dead")
        del central.calls[:]
        node.start()
        methods = [(method, path[:6]) for method, path, _ in central.calls]
        wanted = [("PUT", "/work/"), ("DELETE", "/node/"), ("PUT", "/node/")]
        self.assertEqual(methods, wanted)
        node.stop()
        del central.calls[:]
        node.start()
        self.assertEqual([call[0] for call in central.calls], ["PUT"], "it was clean")

    def test_an_action_less_node_does_not_start(self) -> None:
        node = self.prepared(actions={}, disable_default_actions="yes")
        done = node.run()
        self.assertEqual(done.returncode, 1)
        self.assertIn("there is no action in", done.stderr)


class Stops(CrowdTest):
    def test_a_stop_waits_for_units_and_a_second_signal_does_not(self) -> None:
        central = self.central()
        node = self.node(central, drain_time=30)
        node.take(unit(1, "sleeper", "0.5"))
        os.kill(node.pid, signal.SIGTERM)
        self.assertEqual(central.outcome(1), ("succeeded", "slept"))
        self.assertEqual(node.wait(), 0)
        self.assertEqual(central.calls[-1][0], "DELETE")
        node.start()
        pid = node.take(unit(2, "sleeper", "60"))
        os.kill(node.pid, signal.SIGTERM)
        wait_for(lambda: node.said("1 units are running") == 2, "it waits again")
        self.assertEqual(node.post(unit(3))[0], 503)
        os.kill(node.pid, signal.SIGINT)
        self.assertEqual(node.wait(), 0)
        self.assertFalse(alive(pid))
        self.assertEqual(central.calls[-1][0], "DELETE")
        self.assertEqual(central.reports(2), [], "central has given it to another")
        self.assertEqual(node.units(), [])

    def test_a_stop_is_not_hurried_by_whoever_rotates_the_log(self) -> None:
        node = self.node(drain_time=30)
        go = node.path("go")
        node.take(unit(1, "waiter", go))
        os.kill(node.pid, signal.SIGTERM)
        wait_for(lambda: node.said("1 units are running"), "it waits")
        os.kill(node.pid, signal.SIGHUP)
        os.kill(node.pid, signal.SIGHUP)
        self.assertEqual(node.post(unit(2))[0], 503)
        open(go, "w").close()
        self.assertEqual(node.central.outcome(1), ("succeeded", "seen"))
        self.assertEqual(node.wait(), 0)

    def test_a_check_out_that_fails_is_owed_until_it_succeeds(self) -> None:
        central = self.central()
        node = self.node(central)
        node.take(unit(1, "sleeper", "60"))
        central.stop()
        node.stop()
        self.assertEqual(node.said("can't check out"), 1)
        central.start()
        del central.calls[:]
        central.fail(500, "/node/", "DELETE")
        node.start(wait=False)
        wait_for(node.ended, "a start that fails")
        self.assertEqual(central.check_ins(), [])
        # Central has not let go of the unit, so it was told.
        status, output = central.outcome(1)
        self.assertEqual(status, "failed")
        self.assertIn("killed by SIGTERM", output)
        central.recover()
        node.start()
        calls = [call[0] for call in central.calls if "/node/" in call[1]]
        self.assertEqual(calls[-2:], ["DELETE", "PUT"])
        self.assertEqual(len(central.reports(1)), 1)


class Reloads(CrowdTest):
    def test_a_reload_is_noticed_by_nothing_that_runs(self) -> None:
        central = self.central()
        node = self.daemon(central=central)
        pid = node.take(unit(1, "sleeper", "1.5"))
        log = node.path("state", "node.log")
        os.rename(log, log + ".moved")
        node.write_actions({"fresh.py": ECHO})
        node.write_config(max_workers=7)
        self.assertEqual(node.run("--reload").returncode, 0)
        wait_for(lambda: len(central.check_ins()) == 2, "a check-in")
        fields = central.check_ins()[1]
        self.assertIn("fresh", fields["enabled_actions"])
        self.assertEqual(fields["max_workers"], "7")
        self.assertEqual(node.do(unit(2, "fresh")), ("succeeded", "x"))
        self.assertEqual(node.take(unit(1, "sleeper", "1.5")), pid)
        self.assertTrue(node.said("reloaded; actions: "), "the log was opened again")
        self.assertEqual(central.outcome(1), ("succeeded", "slept"))
        self.assertEqual(central.reports(1)[0]["pid"], str(pid))
        wait_for(lambda: len(our_processes()) == 2, "the old fork server has gone")

    def test_a_reload_may_name_another_central(self) -> None:
        node, other = self.daemon(), self.central()
        node.write_config(central_server=other.url)
        node.run("--reload")
        wait_for(other.check_ins, "a check-in there")
        self.assertEqual(node.status()["central"]["url"], other.url)
        node.take(unit(1))
        self.assertEqual(other.outcome(1), ("succeeded", "x"))

    def test_a_dialect_that_was_found_is_kept(self) -> None:
        central = self.central(seed=True)
        node = self.daemon(central=central, dialect="auto")
        node.run("--reload")
        wait_for(lambda: len(central.check_ins()) == 2, "a check-in")
        self.assertEqual(node.status()["central"]["dialect"], "seed")

    def test_units_from_before_a_reload_can_still_be_ended(self) -> None:
        node = self.daemon()
        first, second = (node.take(unit(id, "sleeper", "60")) for id in (1, 2))
        node.run("--reload")
        wait_for(lambda: node.said("reloaded"), "the reload")
        began = time.monotonic()
        node.take(unit(1, "sleeper", "60", attempts=1))
        self.assertLess(time.monotonic() - began, 4)
        self.assertFalse(alive(first))
        self.assertEqual(node.run("--stop").returncode, 0)
        wait_for(lambda: not alive(second), "the other is ended too", 1)
        self.assertEqual(node.units(), [])

    def test_a_reload_that_raises_max_workers_makes_room(self) -> None:
        central = self.central()
        node = self.daemon(central=central, max_workers=1)
        node.take(unit(1, "sleeper", "60"))
        self.assertEqual(node.post(unit(2))[0], 503)
        node.write_config(max_workers=2)
        node.run("--reload")
        wait_for(lambda: not node.status()["overloaded"], "there is room")
        self.assertEqual(node.do(unit(2)), ("succeeded", "x"))

    def test_a_reload_of_nonsense_changes_nothing(self) -> None:
        node = self.daemon()
        node.write_config(max_load="much")
        done = node.run("--reload")
        self.assertEqual(done.returncode, 2)
        self.assertIn("[node] max_load = much: must be a number", done.stderr)
        os.kill(node.daemon_pid, signal.SIGHUP)
        wait_for(lambda: node.said("not reloaded, all stays as it was: "), "it is said")
        self.assertEqual(node.said("[node] max_load = much: must be a number"), 1)
        self.assertEqual(node.do(unit()), ("succeeded", "x"))
        node.write_config(max_load="")

    def test_a_reload_leaves_the_node_where_it_is(self) -> None:
        node = self.daemon()
        node.write_config(state_path="elsewhere", port=1)
        os.kill(node.daemon_pid, signal.SIGHUP)
        wait_for(lambda: node.said("reloaded; actions: "), "the reload")
        for key in ("state_path", "port"):
            self.assertEqual(node.said(f"{key} has changed: that takes a restart"), 1)
        self.assertEqual(node.do(unit()), ("succeeded", "x"))
        wait_for(lambda: not node.units(), "its record was here and is gone")
        node.write_config(state_path="state", port=0)


class Upgrade(CrowdTest):
    """The program's file is replaced while a node runs."""

    def installed(self, daemon: bool = True, **options: Any) -> NodeProcess:
        """A node that runs from a copy of the program, as on a user's machine."""
        node = self.prepared(**options)
        node.program = "crowdnode.py"  # as a user in its directory would say
        os.unlink(node.path("state", "crowdnode.pyc"))
        self.install(node, "1.0.0")
        if daemon:
            node.write_config(port=self.free_port())
            self.assertEqual(node.run("--daemon").returncode, 0)
        return node

    def free_port(self) -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    def install(self, node: NodeProcess, version: str, more: str = "") -> None:
        """Put a version of the program in the place of the one that is there."""
        with open(PROGRAM, encoding="utf-8") as file:
            text = file.read()
        for old, new in (
            ('__version__ = "1.0.0"', f'__version__ = "{version}"'),
            ("MONITOR_INTERVAL = 3 ", "MONITOR_INTERVAL = 0.1 "),
            ("RETRY_WAIT = 5 ", "RETRY_WAIT = 0.2 "),
            ("STATUS_INTERVAL = 5 ", "STATUS_INTERVAL = 0.1 "),
            ('if __name__ == "__main__":', f'{more}\nif __name__ == "__main__":'),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        with open(node.path("new"), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(node.path("new"), node.path(node.program))

    def upgraded(self, node: NodeProcess, version: str) -> None:
        """Wait until the node is of that *version*."""
        wait_for(
            lambda: node.said(f"crowdnode {version}, 127.0.0.1 port"), "an upgrade"
        )
        self.assertEqual(node.status()["version"], version)

    def test_a_stop_and_a_start_settle_what_the_old_version_has_left(self) -> None:
        node = self.installed(drain_time=0)
        node.take(unit(1, "sleeper", "60"))
        node.central.stop()  # so that an outcome is left on disk
        node.take(unit(2, "echo", "kept"))
        wait_for(lambda: b"succeeded" in node.record(2), "an outcome")
        self.install(node, "1.0.1")
        self.assertEqual(node.run("--stop").returncode, 0)
        node.central.start()
        self.assertEqual(node.run("--daemon").returncode, 0)
        self.upgraded(node, "1.0.1")
        self.assertEqual(node.central.outcome(2), ("succeeded", "kept"))
        # Central could not be told to let go of it.
        self.assertIn("killed by SIGTERM", node.central.outcome(1)[1])
        node.settled()

    def test_a_kill_and_a_start_take_over_what_runs(self) -> None:
        node = self.installed()
        long = unit(1, "waiter", node.path("go"))
        pid = node.take(long)
        self.install(node, "1.0.1")
        os.kill(node.status()["pid"], signal.SIGKILL)
        self.assertEqual(node.run("--daemon").returncode, 0)
        self.upgraded(node, "1.0.1")
        self.assertEqual(node.take(long), pid)
        open(long["input"], "w").close()
        self.assertEqual(node.central.outcome(1), ("succeeded", "seen"))
        self.assertEqual(len(node.central.reports(1)), 1)

    def test_a_reload_goes_on_as_the_new_version_in_the_same_process(self) -> None:
        for daemon in (True, False):
            with self.subTest(daemon=daemon):
                node = self.installed(daemon, drain_time=5)
                if not daemon:
                    node.start()
                before, old = node.status(), node.fork_server
                long = unit(1, "waiter", node.path("go"))
                pid = node.take(long)
                self.install(node, "1.0.1")
                self.assertEqual(node.run("--reload").returncode, 0)
                # Nobody is turned away in the meantime.
                self.assertEqual(node.do(unit(2)), ("succeeded", "x"))
                self.upgraded(node, "1.0.1")
                after = node.status()
                for key in ("pid", "port"):
                    self.assertEqual(after[key], before[key], key)
                self.assertNotEqual(after["fork_server"]["pid"], old)
                self.assertEqual(node.take(long), pid)
                open(long["input"], "w").close()
                self.assertEqual(node.central.outcome(1), ("succeeded", "seen"))
                self.assertEqual(node.central.told("DELETE", "/node/"), [])
                wait_for(lambda: not has_zombie(before["pid"]), "no zombie")
                self.assertEqual(node.run("--stop").returncode, 0)
                self.assertEqual(len(node.central.reports(1)), 1)

    def test_a_dead_fork_server_is_replaced_by_an_upgrade(self) -> None:
        node = self.installed()
        pid = node.status()["pid"]
        self.install(node, "1.0.1")
        os.kill(node.fork_server, signal.SIGKILL)
        self.upgraded(node, "1.0.1")
        self.assertEqual(node.status()["pid"], pid)
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))

    def test_a_stop_in_the_middle_of_an_upgrade_is_a_stop_like_any_other(self) -> None:
        node = self.installed(drain_time=30)
        pid, go = node.status()["pid"], node.path("go")
        node.take(unit(1, "waiter", go))
        self.install(node, "1.0.1")
        address = ("127.0.0.1", node.port)
        with socket.create_connection(address) as half, contextlib.ExitStack() as stack:
            half.sendall(b"GET")  # a request that the upgrade waits for
            node.status()  # came later, so that one is accepted too
            os.kill(pid, signal.SIGHUP)
            wait_for(lambda: node.said("going on as what it is now"), "an upgrade")

            def waits() -> bool:
                late = stack.enter_context(socket.create_connection(address))
                late.sendall(b"GET /heartbeat HTTP/1.1\r\n\r\n")
                return not select.select([late], [], [], 0.3)[0]

            wait_for(waits, "a request that has to wait")
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: node.said("stopping; 1 units are running"), "a stop")
        open(go, "w").close()
        self.assertEqual(node.central.outcome(1), ("succeeded", "seen"))
        wait_for(lambda: not alive(pid), "an end")
        self.assertEqual(node.central.calls[-1][0], "DELETE")
        self.assertEqual(node.said("crowdnode 1.0.1, 127.0.0.1 port"), 0)

    def test_a_stop_while_the_new_version_starts_is_a_stop_like_any_other(self) -> None:
        node = self.installed()
        pid = node.status()["pid"]
        worker = node.take(unit(1, "sleeper", "60"))
        self.install(node, "1.0.1", "time.sleep(0.5)")
        os.kill(pid, signal.SIGHUP)
        if HAS_PROC:
            resumed = crowdnode.read_file(f"/proc/{pid}/cmdline")
            wait_for(
                lambda: crowdnode.read_file(f"/proc/{pid}/cmdline") != resumed,
                "the new version",
            )
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not alive(pid), "a stop")
        self.assertFalse(alive(worker))
        self.assertEqual(node.central.calls[-1][0], "DELETE")
        self.assertEqual(node.units(), [])

    def test_an_upgrade_that_can_not_be_compiled_goes_on_from_its_source(self) -> None:
        node = self.installed()
        os.unlink(node.path("state", "crowdnode.pyc"))
        os.mkdir(node.path("state", "crowdnode.pyc"))
        self.install(node, "1.0.1")
        node.run("--reload")
        self.upgraded(node, "1.0.1")
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))

    def test_a_directory_that_would_stop_the_new_version_keeps_the_old(self) -> None:
        node = self.installed()
        os.chmod(node.path("state"), 0o770)
        self.install(node, "1.0.1")
        node.run("--reload")
        wait_for(
            lambda: node.said("not reloaded, all stays as it was: state_path"), "it"
        )
        self.assertEqual(node.status()["version"], "1.0.0")
        os.chmod(node.path("state"), 0o700)
        node.run("--reload")
        self.upgraded(node, "1.0.1")

    def test_what_the_command_line_says_holds_after_an_upgrade(self) -> None:
        node = self.installed(daemon=False)
        node.write_config(port=self.free_port())
        done = node.run("--daemon", "--set", "max_workers=3")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.install(node, "1.0.1")
        node.run("--reload")
        self.upgraded(node, "1.0.1")
        self.assertEqual(node.status()["max_workers"], 3)

    def test_an_upgrade_survives_that_central_is_away(self) -> None:
        node = self.installed()
        node.central.stop()
        self.install(node, "1.0.1")
        node.run("--reload")
        wait_for(lambda: node.said("Failed to connect"), "a check-in that fails")
        wait_for(lambda: node.status()["version"] == "1.0.1", "an upgrade")
        node.central.start()
        wait_for(lambda: len(node.central.check_ins()) == 2, "another check-in")

    def test_a_new_version_that_does_not_work_is_refused_and_the_old_goes_on(
        self,
    ) -> None:
        node = self.installed()
        self.addCleanup(self.install, node, "1.0.0")  # which can stop it
        before = node.status()
        for more, problem in (
            ("raise RuntimeError('half a copy')", "RuntimeError: half a copy"),
            ("def broken(:", "SyntaxError"),
            ('del NODE_KEYS["drain_time"]', "unknown key"),
        ):
            with self.subTest(problem):
                reloads = node.said("reloaded; actions")
                self.install(node, "1.0.1", more)
                os.kill(before["pid"], signal.SIGHUP)
                wait_for(lambda: node.said("reloaded; actions") > reloads, "a reload")
                self.assertIn(problem, node.log())
                self.assertEqual(node.said("that does not work here"), reloads + 1)
        after = node.status()
        self.assertEqual((after["version"], after["pid"]), ("1.0.0", before["pid"]))
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))
        os.kill(node.fork_server, signal.SIGKILL)  # the next is of the old too
        wait_for(lambda: node.status()["fork_server"]["restarts"], "another one")
        wait_for(lambda: not node.status()["overloaded"], "work is taken again")
        self.assertEqual(node.do(unit(2)), ("succeeded", "x"))
        self.assertEqual(node.status()["version"], "1.0.0")

    def test_an_old_node_never_starts_a_fork_server_of_another_version(self) -> None:
        node = self.installed(daemon=False)
        os.mkdir(node.path("state", "crowdnode.pyc"))  # so that it can't be kept
        node.start()
        self.assertTrue(node.said("can't write"))
        self.addCleanup(self.install, node, "1.0.0")
        self.install(node, "1.0.1", "raise RuntimeError")
        os.kill(node.fork_server, signal.SIGKILL)
        wait_for(lambda: node.said("not what this node runs any more"), "a refusal")
        self.assertEqual(node.post(unit(1))[0], 503)
        self.install(node, "1.0.2")
        self.upgraded(node, "1.0.2")
        self.assertEqual(node.do(unit(1)), ("succeeded", "x"))


# ---------------------------------------------------------------------------
# Local central
# ---------------------------------------------------------------------------


class Run(CrowdTest):
    """Jobs of --run."""

    def test_word_count_in_an_empty_environment_says_what_wc_says(self) -> None:
        home = self.directory()
        done = self.job("--run", "word_count", "README.md", "LICENSE", home=home)
        with open(os.path.join(HERE, "README.md"), "rb") as readme:
            words = len(readme.read().split())
        with open(os.path.join(HERE, "LICENSE"), "rb") as text:
            words += len(text.read().split())
        self.assertEqual((done.returncode, json.loads(done.stdout)), (0, [words]))
        self.assertEqual(os.listdir(home), [], "files are left")

    def test_one_file_in_an_empty_directory_is_enough(self) -> None:
        directory = self.directory()
        program = shutil.copy(PROGRAM, directory)
        license = crowdnode.file_url(os.path.join(HERE, "LICENSE"))
        done = subprocess.run(
            [sys.executable, program, "--run", "word_count", license],
            cwd=directory,
            capture_output=True,
            env=environment(HOME=directory, TMPDIR=directory),
        )
        words = len(crowdnode.read_file(os.path.join(HERE, "LICENSE")).split())
        self.assertEqual((done.returncode, json.loads(done.stdout)), (0, [words]))

    def test_outputs_come_in_the_order_of_500_inputs_with_a_bar_on_a_terminal(
        self,
    ) -> None:
        options = self.with_actions(echo=ECHO)
        path = os.path.join(self.directory(), "outputs")
        strings = [f"string {number}" for number in range(500)]
        job = [*options, "--output", path, "--strings", "--run", "echo", *strings]
        shown = self.on_terminal(sys.executable, PROGRAM, *job)
        with open(path) as file:
            self.assertEqual(json.load(file), strings)
        self.assertRegex(
            shown,
            r"\r.*\[#+ *\] \d+ of 500 done, 0 failed, \d+ running, [\d.]+/s, .* left",
        )
        self.assertIn("500 of 500 done, 0 failed", shown)

    def test_a_failing_input_is_named_after_three_attempts_and_the_rest_is_done(
        self,
    ) -> None:
        options = self.with_actions(
            odd=BROKEN.replace(
                'raise ValueError("it broke")',
                "print('attempt', self.options['attempts'])\n"
                "        if self.input == 'bad': raise ValueError('it broke')\n"
                "        return self.input",
            )
        )
        done = self.job(*options, "--strings", "--run", "odd", "good", "bad", "fine")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(json.loads(done.stdout), ["good", None, "fine"])
        self.assertIn("bad: ValueError: it broke (odd.py, line", done.stderr)
        self.assertIn("Traceback", done.stderr)
        for attempt in range(3):
            self.assertIn(f"output: attempt {attempt}", done.stderr)
        self.assertNotIn("output: attempt 3", done.stderr)

    def test_work_unit_retries_says_how_often_a_unit_is_tried(self) -> None:
        options = self.with_actions(
            broken=BROKEN.replace("raise", "print('once'); raise")
        )
        options += ["--set", "work_unit_retries=1"]
        done = self.job(*options, "--strings", "--run", "broken", "x")
        self.assertEqual((done.returncode, done.stderr.count("output: once")), (1, 1))

    def test_a_job_goes_through_split_process_and_merge(self) -> None:
        options = self.with_actions(pieces=PIECES)
        inputs = ["a bb ccc", "dddd eeeee"]
        done = self.job(*options, "--strings", "--run", "pieces", *inputs)
        self.assertEqual(json.loads(done.stdout), [[1, 2, 3, 4, 5]], done.stderr)

    def test_options_reach_the_action_and_inputs_come_from_standard_input(self) -> None:
        options = self.with_actions(
            echo=ECHO.replace("self.input", "[self.input, self.options['k']]")
        )
        done = self.job(
            *options, "--options", '{"k": "é"}', "--quiet", "--strings",
            "--run", "echo", "-", input="one\ntwo words\n",
        )  # fmt: skip
        self.assertEqual(json.loads(done.stdout), [["one", "é"], ["two words", "é"]])
        self.assertEqual(done.stderr, "")

    def test_file_names_of_all_kinds_are_inputs(self) -> None:
        directory = self.directory()
        names = ["a b.txt", "naïve.txt", "100%25.txt", "q?x=1.txt", "#.txt"]
        for name in names:
            with open(os.path.join(directory, name), "w") as file:
                file.write("two words")
        done = self.job("--run", "word_count", *names, cwd=directory)
        self.assertEqual(json.loads(done.stdout), [2 * len(names)], done.stderr)

    def test_text_that_is_no_unicode_fails_its_input_and_nothing_else(self) -> None:
        options = self.with_actions(echo=ECHO)
        options += ["--strings", "--run", "echo", b"caf\xff", "good"]  # type: ignore
        done = self.job(*options)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(json.loads(done.stdout), [None, "good"])
        self.assertIn("the output is not JSON: ", done.stderr)

    def test_an_input_over_max_request_size_fails_and_says_so(self) -> None:
        options = self.with_actions(echo=ECHO)
        options += ["--set", "max_request_size=1", "--strings", "--run", "echo", "-"]
        done = self.job(*options, input="x" * 1100000 + "\ngood\n")
        self.assertEqual((done.returncode, done.stdout), (1, '[null, "good"]\n'))
        self.assertIn("The request is over max_request_size, 1 MB.", done.stderr)

    def test_a_home_that_cannot_be_written_is_no_obstacle(self) -> None:
        done = self.job(
            "--set", "local_storage_path=/dev/null/x", "--run", "word_count", "LICENSE"
        )
        self.assertEqual(done.returncode, 0, done.stderr)


class RunEnds(CrowdTest):
    """How a job of --run ends, and where its outputs go."""

    def test_ctrl_c_ends_everything_within_two_seconds(self) -> None:
        stubborn = SLEEPER.replace(
            "time.sleep(",
            "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "        time.sleep(",
        )
        options = self.with_actions(sleeper=SLEEPER, stubborn=stubborn)
        for action in ("sleeper", "stubborn"):
            with self.subTest(action), self.started_job(
                *options, "--strings", "--run", action, "60"
            ) as (process, directory):
                began = time.monotonic()
                for _ in range(3):  # people press it more than once
                    process.send_signal(signal.SIGINT)
                self.assertEqual(process.wait(DEADLINE), 130)
                self.assertLess(time.monotonic() - began, 2)
                self.assertEqual(our_processes(), [])
                self.assertEqual(os.listdir(directory), [])

    def test_a_node_that_dies_in_the_middle_is_started_again(self) -> None:
        options = self.with_actions(sleeper=SLEEPER)
        job = [*options, "--strings", "--run", "sleeper", *["0.3"] * 4]
        with self.started_job(*job) as (process, _):
            nodes = [line for line in our_processes() if "--attended" in line]
            os.kill(int(nodes[0].split()[0]), signal.SIGKILL)
            output, errors = process.communicate(timeout=DEADLINE)
        self.assertEqual(json.loads(output), ["slept"] * 4, errors.decode())

    def test_nobody_else_can_hand_in_results(self) -> None:
        options = self.with_actions(sleeper=SLEEPER)
        job = [*options, "--strings", "--run", "sleeper", "60"]
        with self.started_job(*job) as (process, directory):
            (name,) = os.listdir(directory)
            config = crowdnode.load_config(f"{directory}/{name}/crowdnode.conf", [])
            url = f"{config.central_server}/work/1"
            request = urllib.request.Request(url, b"status=succeeded", method="PUT")
            with self.assertRaisesRegex(urllib.error.HTTPError, "401"):
                urllib.request.urlopen(request, timeout=DEADLINE)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(DEADLINE), 130)

    def test_a_node_whose_run_was_killed_ends_too(self) -> None:
        options = self.with_actions(sleeper=SLEEPER)
        job = [*options, "--strings", "--run", "sleeper", "60"]
        with self.started_job(*job) as (process, _):
            process.kill()
        wait_for(lambda: not our_processes(), "nothing is left")

    def test_outputs_go_to_a_file_which_keeps_its_mode_and_its_links(self) -> None:
        directory = self.directory()
        path, link = os.path.join(directory, "result"), os.path.join(directory, "link")
        for place, input, wanted in ((path, "a b", 2), (link, "a b c", 3)):
            job = ["--output", place, "--strings", "--run", "word_count", input]
            done = self.job(*job)
            self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
            with open(path) as file:
                self.assertEqual(json.load(file), [wanted])
            if place == path:
                os.chmod(path, 0o600)
                os.symlink(path, link)
        self.assertEqual(stat.S_IMODE(os.lstat(path).st_mode), 0o600)

    def test_an_output_that_is_no_file_is_refused_before_the_work(self) -> None:
        directory = self.directory()
        for place, message in (
            (directory, "is a directory"),
            (f"{directory}/no/such", "there is no directory"),
            ("", "FILE is empty"),
        ):
            done = self.job("--output", place, "--run", "word_count", "LICENSE")
            self.assertEqual(done.returncode, 2)
            self.assertIn(message, done.stderr)

    def test_an_output_may_be_a_device_and_a_full_one_loses_nothing(self) -> None:
        job = ["--run", "word_count", "LICENSE", "--output"]
        done = self.job(*job, "/dev/stdout")
        self.assertEqual((done.returncode, len(json.loads(done.stdout))), (0, 1))
        if os.path.exists("/dev/full"):
            done = self.job(*job, "/dev/full")
            self.assertEqual((done.returncode, len(json.loads(done.stdout))), (1, 1))
            self.assertIn("No space left on device; so the outputs are", done.stderr)

    def test_fail_fast_stops_where_an_input_has_failed(self) -> None:
        options = self.with_actions(broken=BROKEN)
        options += ["--set", "work_unit_retries=1", "--set", "max_workers=1"]
        many = ["--strings", "--run", "broken", *map(str, range(200))]
        done = self.job("--fail-fast", *options, *many)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("0: ValueError: it broke", done.stderr)
        self.assertNotIn("\n199: ", done.stderr)
        done = self.job("--keep-going", *options, *many[:5])
        self.assertEqual((done.returncode, done.stdout), (1, "[null, null]\n"))


# ---------------------------------------------------------------------------
# Daemon
# ---------------------------------------------------------------------------


class Daemon(CrowdTest):
    def test_it_starts_once_and_is_silent_and_quick_when_it_runs(self) -> None:
        node = self.daemon()
        pid = node.daemon_pid
        self.assertEqual(len(node.central.check_ins()), 1, "it has checked in by then")
        self.assertNotEqual(os.getsid(pid), os.getsid(0))
        began = time.monotonic()
        done = node.run("--daemon")
        self.assertLess(time.monotonic() - began, 1)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertEqual(node.daemon_pid, pid)
        self.assertEqual(node.do(unit()), ("succeeded", "x"))
        self.assertEqual(node.run().returncode, 1)
        self.assertIn(f"a node runs here already, as process {pid}", node.run().stderr)

    def test_eight_at_once_start_one(self) -> None:
        node = self.prepared()
        starts = [
            subprocess.Popen(
                node.command("--daemon"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
            for _ in range(8)
        ]
        for start in starts:
            self.assertEqual(start.communicate(timeout=DEADLINE), (b"", None))
            self.assertEqual(start.returncode, 0)
        self.assertEqual(len(node.central.check_ins()), 1)
        self.assertEqual(node.said("has checked in with"), 1)

    def test_an_error_of_the_start_reaches_the_terminal_and_the_status(self) -> None:
        central = self.central()
        central.stop()
        node = self.prepared(central)
        done = node.run("--daemon")
        self.assertEqual(done.returncode, 1)
        self.assertIn("crowdnode: Failed to connect to the central", done.stderr)
        central.start()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = taken.getsockname()[1]
            done = node.run("--daemon", "--port", str(port))
        self.assertEqual(done.returncode, 1)
        self.assertIn(f"can't listen on 127.0.0.1 port {port}", done.stderr)
        self.assertIn("choose another with --port", done.stderr)
        self.assertEqual(node.run("--status").returncode, 3)

    def test_lock_and_pid_file_survive_a_kill_and_a_reboot(self) -> None:
        node = self.daemon()
        old = node.daemon_pid
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: not alive(old), "it is dead")
        stranger = subprocess.Popen(["sleep", "60"], env=environment())
        self.addCleanup(stranger.wait)
        self.addCleanup(stranger.kill)
        with open(node.path("state", "node.pid"), "w") as file:
            file.write(f"{stranger.pid}\n")  # as after a reboot
        self.assertEqual(node.run("--status").returncode, 3)
        self.assertEqual(node.run("--stop").returncode, 3)
        self.assertEqual(node.run("--reload").returncode, 3)
        self.assertEqual(node.run("--daemon").returncode, 0)
        self.assertNotEqual(node.daemon_pid, stranger.pid)
        self.assertIsNone(stranger.poll())

    def test_closed_standard_descriptors_are_no_obstacle(self) -> None:
        node = self.prepared()
        script = 'exec "$@" <&- >&- 2>&-'
        done = subprocess.run(
            ["sh", "-c", script, "sh", *node.command("--daemon")], env=environment()
        )
        self.assertEqual(done.returncode, 0)
        self.assertEqual(node.do(unit()), ("succeeded", "x"))

    def test_a_start_without_descriptors_is_said_in_a_line(self) -> None:
        node = self.prepared()
        command = 'ulimit -n 9; exec "$@"'
        done = subprocess.run(
            ["sh", "-c", command, "sh", *node.command("--daemon")],
            capture_output=True,
            text=True,
            env=environment(),
            stdin=subprocess.DEVNULL,
        )
        self.assertEqual(done.returncode, 1)
        self.assertIn("Too many open files", done.stderr)
        self.assertNotIn("Traceback", done.stderr + node.log())

    def test_a_wedged_node_is_replaced(self) -> None:
        constants = {"WEDGED_AFTER": 0.5, "HEARTBEAT_DEADLINE": 0.2, "TERM_GRACE": 0.3}
        node = self.daemon(constants=constants)
        old = node.daemon_pid
        os.kill(old, signal.SIGSTOP)
        done = node.run("--daemon")
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertIn(f"(process {old}) has not answered for 0.5 s", done.stderr)
        self.assertNotEqual(node.daemon_pid, old)
        self.assertFalse(alive(old))
        self.assertEqual(node.do(unit()), ("succeeded", "x"))


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------


class CommandLine(CrowdTest):
    def test_stop_waits_until_the_node_is_gone(self) -> None:
        node = self.daemon()
        pid = node.daemon_pid
        worker = node.take(unit(1, "sleeper", "60"))
        done = node.run("--stop")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        wait_for(lambda: not alive(pid) and not alive(worker), "both are gone", 1)
        self.assertEqual(node.central.calls[-1][0], "DELETE")
        left = sorted(os.listdir(node.path("state")))
        self.assertEqual(
            left, ["crowdnode.pyc", "fork_server.out", "node.log", "units", "work"]
        )
        done = node.run("--stop")
        self.assertEqual(
            (done.returncode, done.stderr), (3, "crowdnode: no node runs here\n")
        )

    def test_status_is_for_people_and_for_programs(self) -> None:
        node = self.daemon()
        node.take(unit(7, "sleeper", "60"))
        done = node.run("--status", "--json")
        self.assertEqual(
            (done.returncode, json.loads(done.stdout)["port"]), (0, node.port)
        )
        done = node.run("--status")
        self.assertEqual(done.returncode, 0)
        self.assertNotIn("\033", done.stdout)
        shown = self.on_terminal(*node.command("--status"))
        self.assertIn("work       \033[32mtaken\033[0m", shown)
        shown = self.on_terminal(*node.command("--status"), NO_COLOR="1")
        self.assertNotIn("\033", shown)
        for text in (
            "127.0.0.1:",
            "checked in ",
            "unit 7        sleeper          process",
            "1 accepted",
        ):
            self.assertIn(text, done.stdout)
        pid = node.daemon_pid
        os.kill(pid, signal.SIGSTOP)
        done = node.run("--status")
        os.kill(pid, signal.SIGCONT)
        self.assertEqual(done.returncode, 4)
        self.assertIn("does not answer", done.stderr)

    def test_check_says_what_is_in_order_and_what_is_not(self) -> None:
        central = self.central()
        node = self.prepared(central)
        done = node.run("--check")
        self.assertEqual(done.returncode, 0, done.stdout)
        levels = {line.partition(":")[0] for line in done.stdout.splitlines()}
        self.assertEqual(levels, {"ok"}, done.stdout)
        central.date = "Thu, 01 Jan 2015 00:00:00 GMT"
        self.assertRegex(node.run("--check").stdout, r"warning: clock: \+\d+ s off")
        central.heartbeat = b"<h1>It works!</h1>"
        done = node.run("--check")
        self.assertEqual(done.returncode, 1)
        self.assertIn("answers, but is no CloudCrowd", done.stdout)
        node.write_config(host="no-such-host.invalid", password="x", login="y")
        node.write_actions({"syntax.py": "def"})
        os.chmod(node.path("crowdnode.conf"), 0o644)
        os.mkdir(node.path("state", "storage"))
        os.chmod(node.path("state", "storage"), 0o777)
        central.stop()
        node.constants["TEMPORARY_DIRECTORIES"] = (f"{node.directory}/",)
        done = node.run("--check")
        self.assertIn("warning: temp_storage_path: ", done.stdout)
        node.constants["TEMPORARY_DIRECTORIES"] = ()
        done = node.run("--check", "--set", "password=z")
        self.assertIn("warning: the password is on the command line", done.stdout)
        done = node.run("--check")
        central.start()
        self.assertEqual(done.returncode, 1)
        for text in (
            "warning: host = no-such-host.invalid",
            "others can read it: chmod 600",
            "warning: local_storage_path: others can write to",
            "syntax.py is left out",
            f"error: central: {central.url}: ",
        ):
            self.assertIn(text, done.stdout)

    def test_stubs_are_the_classes_that_central_needs(self) -> None:
        both = BROKEN + "    def split(self): return []\n"
        options = self.with_actions(my_pdfs=both)
        place = os.path.join(self.directory(), "actions")
        for _ in range(2):  # again over its own is fine
            done = self.job(*options, "--stubs", place)
            self.assertEqual(done.returncode, 0, done.stderr)
        with open(os.path.join(place, "my_pdfs.rb")) as file:
            text = file.read()
        self.assertIn("class MyPdfs < CloudCrowd::Action\n  def split\n  end\n", text)
        self.assertIn("  def process\n  end\n", text)
        self.assertNotIn("merge", text)
        self.assertIn(os.path.join(place, "word_count.rb"), done.stdout.split())
        for name, status, said in (
            ("word_count", 0, ""),  # of crowd install
            ("my_pdfs", 1, "my_pdfs.rb: is not of --stubs; left alone"),
        ):
            path = os.path.join(place, f"{name}.rb")
            with open(path, "w") as file:
                file.write("class Other\nend\n")
            done = self.job(*options, "--stubs", place)
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertIn(said, done.stderr)
            self.assertNotIn("word_count", done.stderr)
            with open(path) as file:
                self.assertEqual(file.read(), "class Other\nend\n")
        for place, status, said in (
            ("", 2, "--stubs: DIR is empty"),
            ("/dev/null/x", 1, "--stubs: can't write /dev/null/x"),
        ):
            done = self.job("--stubs", place)
            self.assertEqual(done.returncode, status)
            self.assertIn(said, done.stderr)

    def test_an_action_with_the_name_of_a_ruby_class_is_rejected(self) -> None:
        names = ("date", "digest", "work_unit")
        node = self.prepared(actions={f"{name}.py": ECHO for name in names})
        directory = os.path.join(self.directory(), "actions")
        stubs = node.run("--stubs", directory)
        check = node.run("--check")
        self.assertEqual((stubs.returncode, check.returncode), (1, 1))
        written = os.listdir(directory) if os.path.exists(directory) else []
        for name in names:
            self.assertNotIn(f"{name}.rb", written)
            self.assertRegex(
                stubs.stderr, rf"(?m)^(.*\W)?{name}: .*is a class of Ruby's own"
            )
            self.assertRegex(check.stdout, rf"(?m)^error: action {name}\b")
        self.assertNotIn("error: action word_count", check.stdout)

    def test_help_names_every_command_and_option_within_80_columns(self) -> None:
        done = run_program("--version")
        self.assertEqual(done.stdout, f"crowdnode {crowdnode.__version__}\n")
        done = run_program("--help")
        self.assertLessEqual(max(map(len, done.stdout.splitlines())), 80)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for name, *_ in (*crowdnode.COMMANDS, *crowdnode.OPTIONS):
            self.assertIn(f"  {name} ", done.stdout)

    def test_options_and_inputs_may_stand_in_any_order(self) -> None:
        options = self.with_actions(echo=ECHO)
        for arguments, wanted in (
            (["--run", "echo", "--strings", "x", "--quiet", "y"], ["x", "y"]),
            (["--strings", "a", "--run", "echo", "-", "b"], ["a", "line", "b"]),
            (["--strings", "--run", "echo", "--", "-x"], ["-x"]),
        ):
            with self.subTest(arguments):
                done = self.job(*options, *arguments, input="line\n")
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(json.loads(done.stdout), wanted)

    def test_a_wrong_command_line_is_said_with_its_remedy(self) -> None:
        binary = os.path.join(self.directory(), "binary.conf")
        with open(binary, "wb") as file:
            file.write(b"\xff\xfe")
        run = ["--run", "word_count"]
        for arguments, said in (
            (["--config", "/no/such.conf"], "/no/such.conf: can't be read: "),
            (["--config", binary], "binary.conf: can't be read: "),
            (["--config", "/"], "can't be read: "),
            (["--set", "port"], "--set port: must be KEY=VALUE"),
            (["--set", "port=x"], "command line: port = x: must be a whole number"),
            (["--port", "x"], "command line: port = x: must be a whole number"),
            (["--set", "max_laod=1"], "max_laod: unknown key: did you mean max_load?"),
            (["--nonsense"], "unrecognized arguments: --nonsense"),
            (["--daemon", "--stop"], "not allowed with argument"),
            (["--json"], "--json goes with --status"),
            (["--strings", "--daemon"], "--strings goes with --run"),
            (["--options", "", "--status"], "--options goes with --run"),
            (["--fail-fast"], "--fail-fast goes with --run"),
            ([*run, "--fail-fast", "--keep-going", "x"], "--fail-fast is the opposite"),
            (["README.md"], "unrecognized arguments: README.md"),
            (["--run", "word_cuont", "README.md"], "did you mean word_count?"),
            (run, "needs at least one INPUT"),
            ([*run, ""], "an INPUT is empty"),
            ([*run, "nosuch.txt"], "nosuch.txt: is no file and no URL"),
            ([*run, "/"], "/: is a directory"),
            (["--options", "[1]", *run, "LICENSE"], "must be a JSON object"),
            (["--options", "{", *run, "LICENSE"], "--options {: is not JSON"),
        ):
            with self.subTest(arguments):
                done = self.job(*arguments)
                self.assertEqual((done.returncode, done.stdout), (2, ""), done)
                self.assertIn(said, done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_output_that_cannot_be_written_is_said_without_a_traceback(self) -> None:
        run = f"exec {sys.executable} {PROGRAM}"
        full = "No space left on device"
        for command, said in (
            (f"{run} --check | true", ""),
            *((f"{run} --version >/dev/full", ""),) * os.path.exists("/dev/full"),
            *((f"{run} --strings --run word_count x >/dev/full", full),)
            * os.path.exists("/dev/full"),
        ):
            with self.subTest(command):
                done = subprocess.run(
                    ["sh", "-c", command],
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment(HOME=self.directory()),
                )
                self.assertNotIn("Traceback", done.stderr)
                self.assertIn(said, done.stderr)


# ---------------------------------------------------------------------------
# README, and other platforms
# ---------------------------------------------------------------------------


class Readme(CrowdTest):
    def test_the_examples_of_the_readme_work(self) -> None:
        directory = self.directory()
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            blocks = re.findall(r"(?m)(?:^    .*\n|^\n)+", file.read())
        examples = []
        for block in blocks:
            match = re.search(r"# actions/((\w+)\.\w+)", block)
            if match:
                lines = [line[4:] for line in block.strip("\n").splitlines()]
                path = os.path.join(directory, match.group(1))
                with open(path, "w") as file:
                    file.write("\n".join(lines).partition("python3 crowdnode.py")[0])
                os.chmod(path, 0o755)
                examples.append(match.group(2))
        self.assertEqual(examples, ["longest_line", "lines"])
        with open(os.path.join(HERE, "LICENSE")) as file:
            text = file.read().splitlines(keepends=True)
        wanted = [max(map(len, text)), len(text)]
        for name, value in zip(examples, wanted):
            done = self.job(
                "--set", f"actions_path={directory}", "--run", name, "LICENSE"
            )
            self.assertEqual((done.returncode, done.stdout), (0, f"[{value}]\n"), done)

    def test_the_service_files_of_the_readme_are_well_formed(self) -> None:
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            text = file.read()
        (plist,) = re.findall(r"(?s)    (<\?xml.*?</plist>)", text)
        service = plistlib.loads(re.sub("(?m)^    ", "", plist).encode())
        self.assertEqual(service["ProgramArguments"][1], "/opt/crowdnode/crowdnode.py")
        self.assertTrue(service["KeepAlive"] and service["AbandonProcessGroup"])
        (unit,) = re.findall(r"(?s)    (\[Unit\].*?multi-user.target)", text)
        path = os.path.join(self.directory(), "crowdnode.service")
        with open(path, "w") as file:
            file.write(re.sub("(?m)^    ", "", unit) + "\n")
        parser = configparser.RawConfigParser(strict=True)
        parser.read(path)
        self.assertEqual(parser["Service"]["KillMode"], "process")
        if shutil.which("systemd-analyze") and os.path.exists("/usr/bin/python3"):
            command = ["systemd-analyze", "verify", path]
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""))


STANDARD = """
    __future__ argparse base64 bisect collections configparser contextlib ctypes difflib
    email errno fcntl gc hashlib heapq hmac html http importlib io ipaddress json
    logging mimetypes os py_compile queue random re resource select shlex shutil signal
    socket struct subprocess sys tarfile tempfile threading time typing urllib warnings
    zlib
""".split()  # noqa: SIM905


class Portability(CrowdTest):
    def test_nothing_of_linux_alone_stands_in_the_way_of_a_mac(self) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            source = file.read()
        with unittest.mock.patch.object(sys, "platform", "darwin"):
            self.assertIsNone(crowdnode.load_prctl())
            with unittest.mock.patch(
                "os.listdir", side_effect=AssertionError("on a Mac")
            ):
                self.assertEqual(crowdnode.children(), [])
        modules = set(re.findall(r"(?m)^ *(?:import|from) (\w+)", source))
        self.assertLessEqual(modules, set(STANDARD))

    def test_windows_is_told_in_one_sentence(self) -> None:
        program = f"import os, sys; sys.path.insert(0, {HERE!r}); os.name = 'nt'; "
        done = subprocess.run(
            [sys.executable, "-c", program + "import crowdnode"],
            capture_output=True,
            env=environment(),
        )
        sentence = b"crowdnode needs Linux or macOS: it forks its workers.\n"
        self.assertEqual((done.returncode, done.stdout), (2, b""))
        self.assertEqual(done.stderr, sentence)


# ---------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------


class Result(unittest.TextTestResult):
    """Knows how long each test took."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seconds: dict[str, float] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        self.began = time.monotonic()
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self.seconds[test.id()] = time.monotonic() - self.began


def run_named(names: list[str]) -> int:
    """Run the tests of these names, in this process."""
    runner = unittest.TextTestRunner(resultclass=Result)
    arguments = [sys.argv[0], *names]
    result = unittest.main(testRunner=runner, exit=False, argv=arguments).result
    assert isinstance(result, Result)
    slowest = sorted(result.seconds.items(), key=lambda item: -item[1])[:5]
    for name, seconds in slowest:
        print(f"{seconds:6.2f} s  {name}")
    bad = {str(test) for test, _ in result.failures + result.errors}
    failed, skipped = len(bad), len(result.skipped)
    passed = max(0, result.testsRun - failed - skipped)
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 0 if result.wasSuccessful() and result.testsRun else 1


def run_class(name: str) -> tuple[str, list[int]]:
    """Run a class of tests in a process of its own: what it printed, and the counts."""
    command = [sys.executable, os.path.abspath(__file__), name]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = run.stdout.decode("utf-8", "replace").rstrip()
    found = re.findall(r"(\d+) (?:passed|failed|skipped)", text)[-3:]
    counts = [int(count) for count in found] or [0, 1, 0]
    counts[1] = counts[1] or int(run.returncode != 0)
    return text, counts


def run_all() -> int:
    """Run every test, some classes at once, since they wait most of the time."""
    loader = unittest.defaultTestLoader
    classes = [
        value
        for value in globals().values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
    ]
    classes.sort(key=lambda cls: -len(loader.getTestCaseNames(cls)))
    long = (
        SystemCalls,
        MoreSystemCalls,
        LateCommits,
        Upgrade,
        CommandLine,
        RunEnds,
        BuiltIn,
    )
    classes.sort(key=lambda cls: cls not in long)  # these first
    names = [cls.__name__ for cls in classes if loader.getTestCaseNames(cls)]
    total = [0, 0, 0]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for text, counts in pool.map(run_class, names):
            print(text, flush=True)
            total = [sum(pair) for pair in zip(total, counts)]
    print("{} passed, {} failed, {} skipped".format(*total))
    return 0 if total[0] and not total[1] else 1


def main() -> int:
    """Run the tests that the command line names, all by default."""
    keep_compiled()
    return run_named(sys.argv[1:]) if sys.argv[1:] else run_all()


if __name__ == "__main__":
    sys.exit(main())
