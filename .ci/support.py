"""What several programs of this directory need: venvs, what a process holds, and a
central server that submits units as fast as a node accepts them.  Linux alone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from typing import Any, Callable, cast

sys.dont_write_bytecode = True
CI = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(CI)
sys.path.insert(0, ROOT)

import crowdnode  # noqa: E402  both are in the directory above this one
import test_crowdnode as helpers  # noqa: E402

PATIENCE = 120  # seconds for a unit
SAMPLES = 30  # of what a process holds
POSTS_AT_ONCE = 4  # as a central of a few threads posts
NO_CONTENT = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
NO_WORKERS = b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"nodes": []}'
LENGTH = re.compile(rb"(?i)\ncontent-length: *(\d+)")
PORT = re.compile(rb"PUT /node/(?:\S+:(\d+) |.*\bport=(\d+))", re.DOTALL)


def run_in_venv(name: str, base: str = sys.executable) -> None:
    """Continue as the same program on the Python of .ci/NAME-venv, which is made by
    *base* and has what .ci/NAME-requirements.txt lists."""
    venv = os.path.join(CI, f"{name}-venv")
    python, wanted = f"{venv}/bin/python", f"{CI}/{name}-requirements.txt"
    if sys.prefix != venv:
        if not os.path.exists(python):
            subprocess.run([base, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
        os.execv(python, [python, os.path.abspath(sys.argv[0]), *sys.argv[1:]])


def resources(status: dict[str, Any]) -> dict[str, int]:
    """Return the kB, threads and descriptors of a node and its fork server.

    Of a second's samples the least threads and descriptors, without a connection that
    comes and goes; and the most memory, while no worker shares the fork server's."""
    pids = {"node": status["pid"], "fork server": status["fork_server"]["pid"]}
    samples: dict[str, list[int]] = defaultdict(list)
    for _ in range(SAMPLES):
        for who, pid in pids.items():
            memory = crowdnode.read_file(f"/proc/{pid}/smaps_rollup").decode()
            for kind, size in re.findall(r"(?m)^(Rss|Pss_Anon): +(\d+)", memory):
                samples[f"{who}, {kind} kB"].append(int(size))
            for kind, place in ("threads", "task"), ("descriptors", "fd"):
                held = os.listdir(f"/proc/{pid}/{place}")
                samples[f"{who}, {kind}"].append(len(held))
        time.sleep(1 / SAMPLES)
    return {
        key: max(values) if key.endswith("kB") else min(values)
        for key, values in samples.items()
    }


def grown(before: dict[str, int], after: dict[str, int], spare_kb: int) -> list[str]:
    """Return which resources are more than before, memory by more than 5 % and that."""
    return [
        f"{key}: {was} before, {after[key]} after"
        for key, was in before.items()
        if after[key] > (was * 1.05 + spare_kb if key.endswith("kB") else was)
    ]


def log_faults(log: str) -> list[str]:
    """Return the errors and tracebacks of a node's log, but for what actions print."""
    records = re.split(r"(?m)^(?=\d{4}-\d\d-\d\d )", log)
    faults = [one for one in records if re.search(r" error: |\nTraceback", one)]
    return [one for one in faults if " output: " not in one.partition("\n")[0]]


class System:
    """What accepts units and lets its submitter learn their outcomes.

    A subclass defines start(), which may return before it is ready; stop();
    submit(action, input), whose defaults are a no-op; and step(seconds), which waits up
    to that time for outcomes and passes their keys to finish().

    begun: when each outstanding unit was submitted.  outcomes: seconds until an outcome
    was known.  roots: its top processes."""

    def __init__(self) -> None:
        self.begun: dict[Any, float] = {}
        self.outcomes: list[float] = []
        self.roots: list[int] = []

    def finish(self, key: Any) -> None:
        """Note that the outcome of the unit *key* is known."""
        self.outcomes.append(time.perf_counter() - self.begun.pop(key))

    def run(self, units: int, outstanding: int) -> None:
        """Run that many no-op units to their end."""
        for _ in range(units):
            self.drain(outstanding - 1)
            self.submit()
        self.drain()

    def drain(self, left: int = 0) -> None:
        """Wait until no more than *left* units are outstanding."""
        while len(self.begun) > left:
            self.step()


class Crowdnode(System):
    """A node as users run it, without a limit on its units, and its central server,
    which posts units from a few threads and takes reports on the caller's.

    port: of the node, when it has checked in.  reports: how often each unit was
    reported.  gate: the file for whose lock units of the action "hold" wait."""

    def __init__(self, actions: dict[str, str], **settings: Any) -> None:
        super().__init__()
        self.port = 0
        self.reports: Counter[int] = Counter()
        self.next = 1_000_000
        self.pool = concurrent.futures.ThreadPoolExecutor(POSTS_AT_ONCE)
        self.refused: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        # The connection arrives together with its request, so nothing waits for it.
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        central = cast(helpers.Central, self)  # the node needs its URL alone
        self.node = helpers.NodeProcess(central, actions, max_workers=0, **settings)
        self.node.program = helpers.PROGRAM
        self.gate = open(self.node.path("gate"), "w")  # noqa: SIM115

    def start(self) -> None:
        self.port = 0
        self.node.start(wait=False)
        self.roots = [self.node.pid]
        deadline = time.monotonic() + PATIENCE
        while not self.port:  # what is on disk is reported first
            self.step()
            assert time.monotonic() < deadline, f"no check-in within {PATIENCE} s"

    def stop(self) -> None:
        self.begun.clear()
        self.gate.close()
        self.while_serving(self.node.destroy)

    def while_serving(self, call: Callable[[], Any]) -> None:
        """Answer the node's calls to central while *call* runs."""
        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():
            self.step(0.02)

    def submit(self, action: str = "no_op", input: str = "x") -> None:
        unit = helpers.unit(self.next, action, input)
        self.begun[self.next] = time.perf_counter()
        self.last = self.pool.submit(self._post, self.next, helpers.work_request(unit))
        self.next += 1

    def _post(self, key: int, request: bytes) -> None:
        self.begun[key] = time.perf_counter()
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as connection:
            connection.sendall(request)
            status, _, body = helpers.read_answer(connection)
        if status != 200:
            self.refused.append(f"unit {key} was refused: {status} {body!r}")

    def step(self, seconds: float = 1.0) -> None:
        """Answer a call.  Raise RuntimeError for a unit that is refused or fails, or
        has no outcome."""
        if self.refused:
            raise RuntimeError(self.refused.pop())
        if self.begun and time.perf_counter() - min(self.begun.values()) > PATIENCE:
            raise RuntimeError(f"not within {PATIENCE} s: {list(self.begun)[:10]}")
        self.listener.settimeout(seconds)
        with contextlib.suppress(socket.timeout):
            connection, _ = self.listener.accept()
            with connection:
                request = read_request(connection)
                is_look = request.startswith(b"GET /status ")
                connection.sendall(NO_WORKERS if is_look else NO_CONTENT)
            self._note(request)

    def _note(self, request: bytes) -> None:
        """Read a call of the node to central."""
        if port := PORT.match(request):
            self.port = int(port[1] or port[2])
        elif request.startswith(b"PUT /work/"):
            if b"status=succeeded" not in request:
                raise RuntimeError(f"a unit failed: {request[:500]!r}")
            key = int(request[10:17])
            self.reports[key] += 1
            if key in self.begun:
                self.finish(key)

    def hold(self, count: int) -> None:
        """Run *count* units of the action "hold" until release."""
        fcntl.flock(self.gate, fcntl.LOCK_EX)
        for _ in range(count):
            self.submit("hold", self.gate.name)
        while not self.last.done():
            self.step(0.1)

    def release(self) -> None:
        """Run the held units to their end."""
        fcntl.flock(self.gate, fcntl.LOCK_UN)
        self.drain()


def read_request(connection: socket.socket) -> bytes:
    """Return one request, head and body."""
    with connection.makefile("rb") as file:
        head = file.readline()
        while (line := file.readline()).strip():
            head += line
        length = LENGTH.search(head)
        return head + b"\r\n" + file.read(int(length[1]) if length else 0)
