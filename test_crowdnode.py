#!/usr/bin/env python3
"""Tests of crowdnode.py: real processes on loopback ports, real signals and sockets.

    python3 test_crowdnode.py                        all
    python3 test_crowdnode.py Work.test_a_unit_...   one

Only the text of commands that this machine has not got is made up.  After each test
nothing may be left: no process, no record, no directory.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import http.server
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import crowdnode

crowdnode.import_command_modules()
crowdnode.import_node_modules()

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "crowdnode.py")
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


def alive(pid: int) -> bool:
    """Does the process live?  A zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return False
    except ProcessLookupError:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def our_processes() -> List[str]:
    """What we started and is still there, zombies included."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        try:
            if not name.isdigit() or int(name) == os.getpid():
                continue
            with open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
            with open(f"/proc/{name}/environ", "rb") as file:
                marked = MARK.encode() in file.read().split(b"\0")
            if marked or (int(parent) == os.getpid() and state == "Z"):
                with open(f"/proc/{name}/cmdline") as file:
                    found.append(f"{name} {state} {file.read()!r}")
        except (OSError, ValueError):
            continue
    return found


def environment(**more: str) -> Dict[str, str]:
    """The environment of what we start."""
    key, _, value = MARK.partition("=")
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", key: value, **more}


class Central:
    """A central server that writes down what it is told.

    calls: (method, path, fields).  answer: may give the status of a call, or hang;
    None: as CloudCrowd would.  seed: it is an old release."""

    def __init__(self, seed: bool = False, login: str = "") -> None:
        self.seed = seed
        self.login = login
        self.calls: List[Tuple[str, str, Fields]] = []
        self.answer: Answer = lambda method, path, fields: None
        self.port = 0
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

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(
            target=self.server.serve_forever, args=[0.02], daemon=True
        ).start()

    def stop(self) -> None:
        """Be away: connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler: Any) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length).decode()
        fields = dict(urllib.parse.parse_qsl(body, keep_blank_values=True))
        self.calls.append((handler.command, handler.path, fields))
        status = self.answer(handler.command, handler.path, fields)
        if status is None:
            status = self.usual_answer(handler, fields)
        if status:
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
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

    def told(self, method: str, prefix: str) -> List[Fields]:
        """The fields of all calls of that kind."""
        return [
            fields
            for verb, path, fields in list(self.calls)
            if verb == method and path.startswith(prefix)
        ]

    def check_ins(self) -> List[Fields]:
        return self.told("PUT", "/node/")

    def reports(self, unit_id: Any) -> List[Fields]:
        return [
            fields
            for method, path, fields in list(self.calls)
            if (method, path) == ("PUT", f"/work/{unit_id}")
        ]

    def outcome(self, unit_id: Any, seconds: float = DEADLINE) -> Tuple[str, Any]:
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
        actions: Optional[Dict[str, str]] = None,
        constants: Optional[Dict[str, Any]] = None,
        env: Optional[Dict[str, str]] = None,
        directory: str = "",
        **settings: Any,
    ) -> None:
        self.directory = directory or tempfile.mkdtemp(prefix="crowdnode-test-")
        self.central = central
        self.env = env or {}
        self.constants = {"MONITOR_INTERVAL": 0.1, **(constants or {})}
        self.settings = {
            "central_server": central.url,
            "dialect": "0.5",
            "host": "127.0.0.1",
            "port": 0,
            "bind": "127.0.0.1",
            "max_workers": 50,
            "state_path": "state",
            "drain_time": 0,
            **settings,
        }
        self.write_actions(actions or {})
        self.write_config()
        self.process: Optional[subprocess.Popen[bytes]] = None

    def write_actions(self, actions: Dict[str, str]) -> None:
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

    def command(self, *arguments: str) -> List[str]:
        constants = "".join(
            f"crowdnode.{name} = {value!r}; " for name, value in self.constants.items()
        )
        program = (
            f"import sys; sys.path.insert(0, {HERE!r}); import crowdnode; {constants}"
            "sys.exit(crowdnode.main())"
        )
        config = self.path("crowdnode.conf")
        return [sys.executable, "-c", program, "--config", config, *arguments]

    def start(self, wait: bool = True) -> NodeProcess:
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
            wait_for(lambda: self.said("has checked in with") or self.ended(), "a start")
            if self.ended():
                raise AssertionError(f"the node did not start:\n{self.log()}")
        return self

    def run(self, *arguments: str, seconds: float = DEADLINE) -> Any:
        """Another call of the program with this configuration."""
        return subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
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
        assert self.process
        return self.process.pid

    def send(self, data: bytes) -> Tuple[int, Dict[str, str], bytes]:
        """Send raw bytes; the answer's status, headers and body."""
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE) as connection:
            connection.sendall(data)
            return read_answer(connection)

    def get(self, path: str) -> Tuple[int, Dict[str, str], bytes]:
        return self.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    def post(self, unit: Any) -> Tuple[int, Dict[str, str], bytes]:
        return self.send(work_request(unit))

    def take(self, unit: Any) -> int:
        """Have the node take *unit*; the worker's pid."""
        status, _, body = self.post(unit)
        if status != 200:
            raise AssertionError(f"{status} {body!r}\n{self.log()}")
        return int(json.loads(body)["pid"])

    def do(self, unit: Any) -> Tuple[str, Any]:
        """Have the node do *unit*; status and output of its report."""
        self.take(unit)
        return self.central.outcome(unit["id"])

    def status(self) -> Dict[str, Any]:
        status, _, body = self.get("/status")
        assert status == 200, (status, body)
        document: Dict[str, Any] = json.loads(body)
        return document

    def units(self) -> List[str]:
        return os.listdir(self.path("state", "units"))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the node alone, as the OOM killer would."""
        assert self.process
        self.process.send_signal(number)
        self.process.wait(DEADLINE)

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
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self.run("--stop")
        shutil.rmtree(self.directory)


def unit(id: Any = 1, action: str = "echo", input: str = "x", **more: Any) -> Dict[str, Any]:
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


def read_answer(connection: socket.socket) -> Tuple[int, Dict[str, str], bytes]:
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
    "broken.py": BROKEN,
    "pieces.py": PIECES,
}


class CrowdTest(unittest.TestCase):
    """A test, after which nothing may be left."""

    maxDiff = None

    def central(self, **options: Any) -> Central:
        central = Central(**options)
        self.addCleanup(central.stop)
        return central

    def node(self, central: Optional[Central] = None, **options: Any) -> NodeProcess:
        """A node that runs and has checked in."""
        return self.prepared(central, **options).start()

    def prepared(self, central: Optional[Central] = None, **options: Any) -> NodeProcess:
        """A node that has not been started."""
        options.setdefault("actions", ACTIONS)
        node = NodeProcess(central or self.central(), **options)
        self.addCleanup(node.destroy)
        return node

    def directory(self) -> str:
        path = tempfile.mkdtemp(prefix="crowdnode-test-")
        self.addCleanup(shutil.rmtree, path, ignore_errors=True)
        return path

    def run(self, result: Optional[unittest.TestResult] = None) -> Any:
        outcome = super().run(result)
        if result is not None:
            check_leftovers(self, result)
        return outcome


def check_leftovers(test: unittest.TestCase, result: unittest.TestResult) -> None:
    """Whatever is left fails the test, and is ended, so that the next one is not it."""
    try:
        wait_for(lambda: not our_processes(), "no process is left", 5)
    except AssertionError as error:
        left = our_processes()
        for line in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        failure = AssertionError(f"{error}: {left}")
        result.addFailure(test, (AssertionError, failure, None))


class SharedNode(CrowdTest):
    """Tests that one node and one central serve, and do not disturb."""

    options: Dict[str, Any] = {}
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
        cls.shared_central.stop()

    def run(self, result: Optional[unittest.TestResult] = None) -> Any:
        return unittest.TestCase.run(self, result)

    def tearDown(self) -> None:
        wait_for(lambda: not self.shared.units(), "no record is left")
        wait_for(
            lambda: not any(files for _, _, files in os.walk(self.shared.path("state", "work"))),
            "no work directory is left",
        )

    @classmethod
    def new_id(cls) -> int:
        SharedNode.next_id += 1
        return SharedNode.next_id
