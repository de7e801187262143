#!/usr/bin/env python3
"""crowdnode: the Node of CloudCrowd, in one file, with the standard library alone.

CloudCrowd is a map-reduce system for expensive document work.  A central server
keeps jobs and cuts them into work units; nodes do the units.  A node checks in with
central, is handed units over HTTP, forks a worker for each, and reports each outcome.

    crowdnode.py                          a node in the foreground, log on stderr
    crowdnode.py --daemon                 in the background; from cron, once a minute
    crowdnode.py --run ACTION INPUT...    one job on this machine, nothing else needed
    crowdnode.py --check                  is all in order?
    crowdnode.py --status | --stop | --reload
    crowdnode.py --stubs DIR              what central must know of the actions

Processes:

    node             threads: routes, Timer loops, reporters, one that reads what the
                     fork server says    never forks
     - fork server   one thread, no network: forks, reaps, keeps time
        - worker     one per unit, leader of its own session: runs the action,
                     leaves its outcome on disk, exits

A fork of a threaded process can copy a lock that somebody holds, so only the fork
server forks, which never has a second thread.  It imports little, because a fork
costs what its parent's memory costs.  An outcome is on disk before it is on the wire,
and only the node is on the wire, so each of the three may be killed at any moment.

Routes:   GET /heartbeat  "buh-bump"
          POST /work      {"pid": 4711}: the unit is accepted, and will be answered for
          GET /status     what the node is doing, as JSON
          GET /metrics    the same for Prometheus
          GET /           the same for people

Signals:  TERM, INT, QUIT   refuse work, wait drain_time seconds, check out, exit;
                            a second one skips the waiting
          HUP               read the configuration and the actions again, reopen the
                            log; go on as the new version where this file has changed

Files, in state_path:
          crowdnode.pyc         this program compiled: what node and fork server run
          node.pid, node.port   who runs and where; node.pid is the lock
          node.log, node.log.N  the log of --daemon, rotated
          fork_server.out       what the actions' modules print when they load
          units/ID              a unit's record; locked as long as its worker lives
          units/ID.out          what the unit's action prints
          work/ACTION/unit_ID   its work directory

Exit status: 0 done; 1 could not start, or the job failed; 2 usage or configuration;
          3 no node runs here; 4 it runs and does not answer; 130 Ctrl-C during --run
"""

from __future__ import annotations

import os
import sys

if os.name != "posix":
    print("crowdnode needs Linux or macOS: it forks its workers.", file=sys.stderr)
    raise SystemExit(2)

import errno
import fcntl
import heapq
import io
import json
import re
import select
import signal
import time
from collections import deque

# The fork server and every worker forked from it pay for each module that stands
# above: a fork costs what its parent has in memory.  So what the command line and the
# node need besides is imported by the two functions below, into the same names.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import base64
    import bisect
    import configparser
    import contextlib
    import hashlib
    import hmac
    import html
    import http.client
    import ipaddress
    import logging
    import logging.handlers
    import mimetypes
    import queue
    import random
    import shutil
    import socket
    import struct
    import subprocess
    import tempfile
    import threading
    import urllib.error
    import urllib.parse
    import urllib.request
    from http.server import BaseHTTPRequestHandler as HandlerBase
    from http.server import ThreadingHTTPServer as ServerBase
    from typing import Any, Callable, Dict, Iterable, List, NoReturn, Tuple

    Fields = List[Tuple[str, bytes]]
    Json = Dict[str, Any]
else:
    # listen() and LocalCentral put the real bases below what stands on these.
    HandlerBase = ServerBase = object

__version__ = "1.0.0"

# The source, even where it runs compiled; now, for --daemon will change the directory.
PROGRAM = os.path.abspath((lambda: None).__code__.co_filename)
IS_COMPILED = __file__.endswith(".pyc")

# ---------------------------------------------------------------------------
# Constants and errors: what more than one part needs.
# ---------------------------------------------------------------------------

DEFAULT_PORT = 9063
HEARTBEAT = "buh-bump"  # what both sides answer to GET /heartbeat
OVERLOADED_MESSAGE = "Node Overloaded"  # the body central knows a refusal by

LOAD_DEADLINE = 60  # seconds for the fork server to load the actions
TERM_GRACE = 10  # seconds from TERM to KILL of a node
KILL_GRACE = 1  # seconds from TERM to KILL of a unit
TRANSFER_TIMEOUT = 60  # seconds without a byte

READ_SIZE = 64 * 1024  # bytes
LINE_LIMIT = 65536  # bytes of a line of a request's head
REQUEST_BUFFER = 4096  # bytes; larger ones leave holes in the heap
MEGABYTE = 1024 * 1024  # bytes
OUTPUT_TAIL = 64 * 1024  # bytes of a unit's printing that reach the log
OUTPUT_LIMIT = 16 * OUTPUT_TAIL  # bytes at which the file of it is cut back
MESSAGE_TAIL = 2000  # bytes of standard error in a failure's message

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING, EXIT_SILENT = range(5)
EXIT_INTERRUPTED = 130

PROCESSING, SPLITTING, MERGING = 1, 4, 5  # 2 and 3 say what came of a unit
NODE_SIGNALS = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
STAGES = {PROCESSING: "process", SPLITTING: "split", MERGING: "merge"}

UNIT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
ACTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,199}")  # a directory's name, too
FORK_SERVER_FLAG = "--fork-server"  # internal: this process is a fork server
ATTENDED_FLAG = "--attended"  # internal: stop when standard input ends
RESUME_FLAG = "--resume"  # internal: go on as the node that this process was


class CrowdError(Exception):
    """What a person is told in one sentence, and the exit status that goes with it."""

    status = EXIT_FAILED


class UsageError(CrowdError):
    """The command line or the configuration is wrong."""

    status = EXIT_USAGE


class BadRequest(Exception):
    """A request that is at fault itself: *status* and a sentence for its sender."""

    def __init__(self, sentence: str, status: int = 400, header: str = "") -> None:
        super().__init__(sentence)
        self.status = status
        self.header = header  # what goes with the answer, with its end of line


class NodeOverloaded(Exception):
    """This node can't take the unit now; another may, or this one later."""


class ActionFailed(Exception):
    """The unit failed for the reason given, which needs no traceback."""


def import_command_modules() -> None:
    """Import what the command line needs and a fork server does without."""
    global argparse, base64, configparser, contextlib, ipaddress, socket, urllib
    import argparse
    import base64
    import configparser
    import contextlib
    import ipaddress
    import socket
    import urllib.parse


def import_node_modules() -> None:
    """Import what only a node needs: --daemon, run each minute, does without."""
    global bisect, hashlib, hmac, html, logging, queue, random, shutil, struct
    global subprocess, tempfile, threading, urllib
    import bisect
    import hashlib
    import hmac
    import html
    import logging
    import logging.handlers
    import queue
    import random
    import shutil
    import struct
    import subprocess
    import tempfile
    import threading
    import urllib.error
    import urllib.request


# ---------------------------------------------------------------------------
# Tools: JSON, URLs of files, files, processes.  They know nothing of units or nodes.
# ---------------------------------------------------------------------------


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{number[:50]} is out of range")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def strict_json(text: str) -> Any:
    """Parse *text* as JSON proper: NaN and Infinity are none.

    Raises ValueError; a document nested too deeply for this Python is one too."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def to_json(value: Any) -> str:
    """*value* as compact JSON text, as CloudCrowd writes it: UTF-8, not escapes."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def file_url(path: str) -> str:
    """The ``file:`` URL of *path*, in the ASCII that protocol.md asks of a URL."""
    return "file://" + re.sub(
        rb"[^!$&-;=@-Z_a-z~]",
        lambda match: b"%%%02X" % ord(match[0]),
        os.fsencode(path),
    ).decode("ascii")


def percent_decoded(url: str) -> bytes:
    """*url* with each %XX turned into its byte."""
    return re.sub(
        rb"%([0-9A-Fa-f]{2})",
        lambda match: bytes([int(match[1], 16)]),
        url.encode("utf-8", "surrogateescape"),
    )


def local_path(url: str) -> str:
    """The path that a ``file:`` URL names.

    CloudCrowd writes the path as it is, others percent-encoded: the first that
    exists is meant."""
    path = re.sub(r"\Afile:(//(localhost(?=/))?)?", "", url, flags=re.IGNORECASE)
    return path if os.path.exists(path) else os.fsdecode(percent_decoded(path))


def read_file(path: str, tail: int = -1) -> bytes:
    """The bytes of the file at *path*, or its last *tail* ones.

    In half of the system calls that open() takes: after each of them a thread of the
    node has to wait for its turn again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if 0 <= tail < size:
            os.lseek(descriptor, -tail, os.SEEK_END)
            size = tail
        data = os.read(descriptor, size + 1)
        while len(data) != size:  # it grows, or is one of /proc, without a size
            piece = os.read(descriptor, READ_SIZE)
            if not piece:
                break
            data += piece
        return data
    finally:
        os.close(descriptor)


def write_file(path: str, data: bytes) -> None:
    """Put *data* into a file at *path*; who reads it finds all or nothing."""
    with open(f"{path}.part", "wb") as file:
        file.write(data)
    os.replace(f"{path}.part", path)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of *data*; os.write may stop early on a disk that fills up."""
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, memoryview(data)[written:])


def remove_file(path: str) -> None:
    """Remove the file at *path*, if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_tree(path: str) -> None:
    """Remove *path*, if it is there, and what is below it, following no link.  Raises
    OSError.

    Directories further down are moved up into *path* first: so neither their depth
    nor the length of their paths matters.  Not shutil.rmtree: importing shutil costs a
    worker more than all else it does."""
    pending = [path]
    emptied = set()
    while pending:
        try:
            os.rmdir(pending[-1])
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            os.unlink(pending[-1])
        except OSError:
            if pending[-1] in emptied:
                raise
            emptied.add(pending[-1])
            pending += empty_directory(pending[-1], path, len(emptied))
            continue
        pending.pop()


def empty_directory(directory: str, root: str, number: int) -> list[str]:
    """Remove the files in *directory*, and move the directories in it up into *root*,
    under names that *number* makes their own.  Returns where they are now."""
    os.chmod(directory, 0o700)
    found: list[str] = []
    with os.scandir(directory) as entries:
        for entry in list(entries):
            place = entry.path
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(place)
                continue
            if directory != root:
                os.chmod(place, 0o700)  # one that is moved is written to: its ".."
                place = f"{root}/.{os.getpid()}.{number}.{len(found)}"
                os.rename(entry.path, place)
            found.append(place)
    return found


def web_opener(*handlers: Any) -> urllib.request.OpenerDirector:
    """Opens URLs by way of the environment's proxies alone: macOS's own settings can't
    be read after a fork."""
    import urllib.request

    proxies = urllib.request.ProxyHandler(urllib.request.getproxies_environment())
    return urllib.request.build_opener(proxies, *handlers)


def copy_file(source: str, target: str) -> None:
    """Copy the content of *source* into a private file; see remove_tree for why not
    with shutil."""
    with open(source, "rb", 0) as reader:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for piece in iter(lambda: reader.read(MEGABYTE), b""):
                write_all(writer, piece)
        finally:
            os.close(writer)


def make_private_directory(path: str) -> None:
    """Make *path*, and what is above it, if need be; only this user may look in.

    Not os.makedirs: for what is above it goes by the umask alone.  Raises OSError."""
    if not os.path.isdir(path):
        make_private_directory(os.path.dirname(path))
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise  # it is no directory; or else somebody was quicker


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; some numbers have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def only_wake(number: int, frame: Any) -> None:
    """A handler of a signal of which the number in the wakeup descriptor is all that
    is wanted: without a handler Python would not write it there."""


def kill_group(pid: int, number: int) -> bool:
    """Signal the process group that *pid* leads; False where there is none."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        # macOS says EPERM where the group has zombies alone.
        return False
    return True


def exists(pid: int | None) -> bool:
    """Is there a process with this pid?  None, a pid that is not known: perhaps.

    A zombie is none: in a container nobody may reap it."""
    if pid is None:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    if sys.platform.startswith("linux"):
        try:
            state = read_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0]
            return state not in (b"Z", b"X")
        except (OSError, IndexError):
            pass
    return True


def kill_worker(pid: int, number: int) -> None:
    """Signal the worker *pid*, which lives, and its group.

    In its first moment it leads no group yet."""
    if not kill_group(pid, number):
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            pass


PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl.h


def load_prctl() -> Callable[..., int] | None:
    """Linux's prctl, which Python does not have; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        import ctypes

        return ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None


def children() -> list[int]:
    """The children of this process, as Linux's proc(5) tells; none elsewhere."""
    found: list[int] = []
    if not sys.platform.startswith("linux"):
        return found
    try:
        for task in os.listdir("/proc/self/task"):
            pids = read_file(f"/proc/self/task/{task}/children")
            found += [int(pid) for pid in pids.split()]
    except OSError:
        pass
    return found


def end_children(spared: Iterable[int]) -> None:
    """KILL the children of this process but those that are *spared*."""
    for pid in children():
        if pid not in spared:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass


def describe_exit(status: int) -> str:
    """How a process ended, from what subprocess calls its return code."""
    return (
        f"killed by {signal_name(-status)}" if status < 0 else f"exit status {status}"
    )


own_children: set[subprocess.Popen[bytes]] = set()  # that a thread waits for


def run_child(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int, bytes, bytes]:
    """Run a program to its end: its status, what it printed and what it said of errors.
    Raises OSError, and subprocess.TimeoutExpired where it takes longer."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    own_children.add(process)
    try:
        with process:
            try:
                output, errors = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                kill_group(process.pid, signal.SIGKILL)
                raise
    finally:
        own_children.discard(process)
    return process.returncode, output, errors


# ---------------------------------------------------------------------------
# Configuration: knows the keys, their defaults and what they may say; knows
# nothing of what is done with them.
# ---------------------------------------------------------------------------


def word_list(value: str) -> list[str]:
    """A parser of a value: names apart by commas or blanks."""
    return value.replace(",", " ").split()


def boolean(value: str) -> bool:
    """A parser of a value: yes or no, in the words of configparser."""
    states = configparser.ConfigParser.BOOLEAN_STATES
    if value.lower() not in states:
        raise ValueError("must be yes or no")
    return bool(states[value.lower()])


def whole(low: int, high: int, unit: str = "") -> Callable[[str], int]:
    """A parser of a whole number from *low* to *high*."""

    def parse(value: str) -> int:
        if re.fullmatch(r"-?[0-9]{1,12}", value) and low <= int(value) <= high:
            return int(value)
        raise ValueError(f"must be a whole number from {low} to {high}{unit}")

    return parse


def decimal(low: float, high: float, unit: str = "") -> Callable[[str], float]:
    """A parser of a number from *low* to *high*."""

    def parse(value: str) -> float:
        if (
            re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", value)
            and low <= float(value) <= high
        ):
            return float(value)
        raise ValueError(f"must be a number from {low:g} to {high:.12g}{unit}")

    return parse


def choice(*names: str) -> Callable[[str], str]:
    """A parser that takes one of *names*."""

    def parse(value: str) -> str:
        if value in names:
            return value
        raise ValueError(f"must be {' or '.join(names)}")

    return parse


def host_name(value: str) -> str:
    """A parser of what central can put between ``http://`` and ``:PORT``."""
    if re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})|\[[0-9A-Fa-f:.]+\]", value):
        return value
    raise ValueError("must be a host name or an address, without port or path")


def address(value: str) -> str:
    """A parser of an IP address to listen on."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be an IP address, 0.0.0.0 for all") from None


def networks(value: str) -> list[str]:
    """A parser of addresses and networks; gives them in their canonical form."""
    try:
        return [str(ipaddress.ip_network(word)) for word in word_list(value)]
    except ValueError as error:
        raise ValueError(
            f"must be addresses or networks such as 10.1.0.0/16: {error}"
        ) from None


def web_address(value: str) -> str:
    """A parser of central's URL."""
    try:
        parts = urllib.parse.urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        usable = usable and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", value) or parts.query:
        raise ValueError("must be a URL such as http://central.example:9173")
    if parts.username is not None:
        raise ValueError(
            "must not hold a password; use http_authentication, login and password"
        )
    return value.rstrip("/")


def ascii_text(value: str) -> str:
    """A parser of ASCII without blanks, as keys of Amazon's are."""
    if not re.fullmatch(r"[!-~]*", value):
        raise ValueError("must be without blanks, of ASCII")
    return value


def bucket_name(value: str) -> str:
    """A parser of a bucket's name, which becomes part of a host's."""
    if not re.fullmatch(r"|[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", value):
        raise ValueError("must be 3 to 63 letters, digits, dots, - and _")
    return value


def stage_names(value: str) -> list[str]:
    """A parser of an executable's stages."""
    stages = word_list(value)
    if "process" not in stages or set(stages) - set(STAGES.values()):
        raise ValueError("must be process, and may add split and merge")
    return stages


PLACE_KEYS = ("state_path", "host", "port", "bind")  # changed by a restart alone
COMMAND_LINE = "command line"  # where a value stands that is in no file
SIZE = decimal(1, 1_000_000, " (MB)")
SECONDS = decimal(0.1, 10_000_000, " (seconds)")
NICENESS = whole(0, 19)

SECRETS = ("password", "aws_secret_key")  # keys that others should not read
# The storages, and the keys that each needs.
STORAGES: dict[str, tuple[str, ...]] = {
    "filesystem": (),
    "s3": ("s3_bucket", "aws_access_key", "aws_secret_key"),
}
# What stands in a section [action NAME].
ACTION_KEYS: dict[str, Callable[[str], Any]] = {
    "stages": stage_names,
    "time_limit": SECONDS,
    "memory_limit": SIZE,
    "file_limit": SIZE,
    "nice": NICENESS,
}

# What stands in the section [node], in the order of crowdnode.conf: the default as it
# would be written there ("" for none, which is None to the program), and the parser.
NODE_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    # Central
    "central_server": ("http://localhost:9173", web_address),
    "dialect": ("auto", choice("auto", "seed", "0.5")),
    "central_timeout": ("30", SECONDS),
    "report_timeout": ("300", SECONDS),
    # This node
    "host": ("", host_name),
    "port": (str(DEFAULT_PORT), whole(0, 65535)),
    "bind": ("0.0.0.0", address),
    "tag": ("", str),
    "http_authentication": ("no", boolean),
    "login": ("", str),
    "password": ("", str),
    "allow": ("", networks),
    "max_request_size": ("64", SIZE),
    "drain_time": ("5", decimal(0, 1_000_000, " (seconds)")),
    "log_level": ("info", choice("debug", "info", "warning", "error")),
    # When work is refused
    "max_workers": ("", whole(0, 100_000)),
    "max_load": ("", decimal(0.01, 100_000)),
    "min_free_memory": ("", SIZE),
    "min_available_memory": ("", SIZE),
    # Actions
    "actions_path": ("actions", str),
    "disable_default_actions": ("no", boolean),
    "disabled_actions": ("", word_list),
    "time_limit": ("", SECONDS),
    "memory_limit": ("", SIZE),
    "file_limit": ("", SIZE),
    "nice": ("5", NICENESS),
    "work_unit_retries": ("3", whole(1, 1000)),
    # Files
    "state_path": ("~/.crowdnode", str),
    "temp_storage_path": ("", str),
    "storage": ("filesystem", choice(*STORAGES)),
    "local_storage_path": ("", str),
    "s3_bucket": ("", bucket_name),
    "aws_access_key": ("", ascii_text),
    "aws_secret_key": ("", ascii_text),
    "s3_authentication": ("no", boolean),
    "s3_region": ("us-east-1", ascii_text),
    "s3_endpoint": ("", web_address),
}


class Config:
    """The configuration, read and checked; one attribute for each key of [node]."""

    central_server: str
    dialect: str
    central_timeout: float
    report_timeout: float
    host: str
    port: int
    bind: str
    tag: str | None
    http_authentication: bool
    login: str | None
    password: str | None
    allow: list[str]
    max_request_size: float
    drain_time: float
    log_level: str
    max_workers: int
    max_load: float | None
    min_free_memory: float | None
    min_available_memory: float | None
    actions_path: str
    disable_default_actions: bool
    disabled_actions: list[str]
    time_limit: float | None  # these four are asked of limit()
    memory_limit: float | None
    file_limit: float | None
    nice: int
    work_unit_retries: int
    state_path: str
    temp_storage_path: str
    storage: str
    local_storage_path: str
    s3_bucket: str | None
    aws_access_key: str | None
    aws_secret_key: str | None
    s3_authentication: bool
    s3_region: str
    s3_endpoint: str | None
    file: str | None  # where it was read, if anywhere
    settings: list[tuple[str, str]]  # what the command line says besides
    actions: dict[str, Json]  # the sections [action NAME]
    warnings: list[str]
    units_path: str  # the directory of records, in state_path

    def __init__(self, values: Json) -> None:
        self.__dict__.update(values)

    def limit(self, action: str, key: str) -> Any:
        """time_limit, memory_limit, file_limit or nice, for *action*."""
        value = self.actions.get(action, {}).get(key)
        return getattr(self, key) if value is None else value

    def state_file(self, name: str) -> str:
        """The path of *name* in state_path."""
        return os.path.join(self.state_path, name)

    def work_directory(self, action: str, unit_id: object) -> str:
        """Where the unit does its work; *action* has been found to be a plain name."""
        return os.path.join(self.temp_storage_path, action, f"unit_{unit_id}")

    def arguments(self) -> list[str]:
        """The arguments that say on a command line where this comes from."""
        arguments = ["--config", self.file or ""]
        for key, value in self.settings:
            arguments += ["--set", f"{key}={value}"]
        return arguments

    def place(self) -> Json:
        """Where the node is: what only a restart can change."""
        return {key: getattr(self, key) for key in PLACE_KEYS}

    def keep_place(self, place: Json) -> list[str]:
        """Stay at *place*; returns warnings."""
        changed = [key for key in PLACE_KEYS if getattr(self, key) != place[key]]
        for key in changed:
            setattr(self, key, place[key])
        self.units_path = self.state_file("units")
        return [f"{key} has changed: that takes a restart" for key in changed]

    def replace(self, new: Config) -> None:
        """Say what *new* does, to all that have this: at a reload."""
        self.__dict__.update(vars(new))


def nearest(word: str, known: list[str]) -> str:
    """A remedy for the unknown *word*."""
    import difflib  # for this one sentence

    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def parse_value(where: str, parse: Callable[[str], Any], value: str) -> Any:
    """Apply *parse*; a value that does not do is a UsageError that says *where*."""
    if "\0" in value or "\n" in value:
        raise UsageError(f"{where}: must be a single line of text")
    try:
        return parse(value) if value else None
    except ValueError as error:
        raise UsageError(f"{where} = {value}: {error}") from None


def read_sections(path: str) -> configparser.RawConfigParser:
    """Read the INI file at *path*.  Raises UsageError."""
    parser = configparser.RawConfigParser(default_section="\0")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file, path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read: {error}") from None
    except configparser.DuplicateSectionError as error:
        raise UsageError(f"{path}: [{error.section}] stands there twice") from None
    except configparser.DuplicateOptionError as error:
        where = f"{path}: [{error.section}] {error.option}"
        raise UsageError(f"{where}: stands there twice; remove one") from None
    except configparser.Error as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: is no INI file (KEY = VALUE): {reason}") from None
    return parser


def find_config() -> str | None:
    """The configuration file where none is named, if there is one."""
    here = os.path.dirname(PROGRAM)
    for directory in (os.getcwd(), here):
        path = os.path.join(directory, "crowdnode.conf")
        if os.path.exists(path):
            return path
    return None


def load_config(path: str | None, settings: list[tuple[str, str]]) -> Config:
    """Read the file at *path*, if there is one; *settings* win over it.

    Raises UsageError, naming file, section, key, value and what would do."""
    given: dict[str, tuple[str, str]] = {}  # "port": ("/etc/x.conf: [node] port", "1")
    actions: dict[str, Json] = {}
    if path:
        parser = read_sections(path)
        for section in parser.sections():
            where = f"{path}: [{section}]"
            if section == "node":
                for key, value in parser.items(section):
                    given[key] = (f"{where} {key}", value)
            elif section.startswith("action ") and ACTION_NAME.fullmatch(section[7:]):
                items = parser.items(section)
                actions[section[7:]] = parse_action_section(where, items)
            else:
                known = ["node", "action NAME"]
                raise UsageError(f"{where}: unknown section: {nearest(section, known)}")
    for key, value in settings:
        given[key] = (f"{COMMAND_LINE}: {key}", value.strip())
    values: Json = {"file": path, "settings": settings, "warnings": []}
    values["actions"] = actions
    for key, (where, _) in given.items():
        if key not in NODE_KEYS:
            raise UsageError(f"{where}: unknown key: {nearest(key, list(NODE_KEYS))}")
    for key, (default, parse) in NODE_KEYS.items():
        where, value = given.get(key, ("", ""))
        values[key] = parse_value(where, parse, value or default)
    places = {key: where for key, (where, _) in given.items()}
    return complete_config(Config(values), places)


def parse_action_section(where: str, items: list[tuple[str, str]]) -> Json:
    """The values of one section [action NAME]."""
    values: Json = {}
    for key, value in items:
        if key not in ACTION_KEYS:
            known = nearest(key, list(ACTION_KEYS))
            raise UsageError(f"{where} {key}: unknown key: {known}")
        values[key] = parse_value(f"{where} {key}", ACTION_KEYS[key], value)
    return values


def complete_config(config: Config, places: dict[str, str]) -> Config:
    """Fill in what follows from the machine and from other keys; check across keys.

    places: where the keys stand that were given."""
    base = os.path.dirname(config.file or PROGRAM)

    def absolute(key: str, default: str = "") -> str:
        path: str = getattr(config, key) or default
        expanded = os.path.expanduser(path)
        if expanded.startswith("~"):
            where = places.get(key, key)
            raise UsageError(f"{where} = {path}: there is no such home directory")
        return os.path.normpath(os.path.join(base, expanded))

    config.state_path = absolute("state_path")
    config.units_path = config.state_file("units")
    config.temp_storage_path = absolute("temp_storage_path", config.state_file("work"))
    config.local_storage_path = absolute(
        "local_storage_path", config.state_file("storage")
    )
    config.actions_path = absolute("actions_path")
    config.host = config.host or socket.gethostname()
    config.allow = config.allow or []
    config.disabled_actions = config.disabled_actions or []
    if config.max_workers is None:
        config.max_workers = processors()
    check_across(config, places)
    config.warnings += config_warnings(config, places)
    return config


def check_across(config: Config, places: dict[str, str]) -> None:
    """Raise UsageError where keys do not go together."""
    if config.http_authentication and not (config.login and config.password):
        raise UsageError(
            f"{places['http_authentication']} = yes: needs login and password too"
        )
    if config.login and ":" in config.login:
        raise UsageError(
            f"{places['login']} = {config.login}: must not hold a colon, which ends "
            "the login in HTTP Basic"
        )
    for key in STORAGES[config.storage]:
        if not getattr(config, key):
            where = places["storage"]
            raise UsageError(f"{where} = {config.storage}: needs {key} too")


def config_warnings(config: Config, places: dict[str, str]) -> list[str]:
    """What works, and yet is hardly meant."""
    found = []
    for key in SECRETS:
        if not getattr(config, key):
            continue
        if places.get(key, "").startswith(COMMAND_LINE):
            found.append(
                f"the {key} is on the command line, where everybody here can read it: "
                "put it into the configuration file"
            )
        elif config.file and os.stat(config.file).st_mode & 0o044:
            found.append(
                f"{config.file} holds a {key} and others can read it: "
                f"chmod 600 {config.file}"
            )
    if "actions_path" in places and not os.path.isdir(config.actions_path):
        found.append(f"actions_path: {config.actions_path} is no directory")
    return found


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------
# Vitals: the machine's load and memory.  Reading is apart from parsing, so that
# the text of another machine can be parsed here.  None: unknown.
# ---------------------------------------------------------------------------


SCRAPE_UPTIME = re.compile(r"\d+\.\d+")
SCRAPE_LINUX_MEMORY = re.compile(r"MemFree:\s+(\d+) kB")
SCRAPE_LINUX_AVAILABLE = re.compile(r"MemAvailable:\s+(\d+) kB")
SCRAPE_MAC_MEMORY = re.compile(r"Pages free:\s+(\d+).")
SCRAPE_MAC_PAGE = re.compile(r"page size of (\d+) bytes")
SCRAPE_DEADLINE = 5  # seconds for uptime and vm_stat


def parse_load(uptime: str) -> float | None:
    """The one-minute load average in what ``uptime`` printed."""
    match = SCRAPE_UPTIME.search(uptime)
    return float(match.group()) if match else None


def parse_meminfo(meminfo: str, pattern: re.Pattern[str]) -> float | None:
    """Megabytes that *pattern* finds in /proc/meminfo's text."""
    match = pattern.search(meminfo)
    return int(match.group(1)) / 1024 if match else None


def parse_vm_stat(vm_stat: str) -> float | None:
    """Megabytes free in what macOS's ``vm_stat`` printed; pages are 4 or 16 KB."""
    page, free = SCRAPE_MAC_PAGE.search(vm_stat), SCRAPE_MAC_MEMORY.search(vm_stat)
    if not page or not free:
        return None
    return int(free.group(1)) * int(page.group(1)) / MEGABYTE


def command_output(name: str) -> str:
    """What the command prints; empty where it is missing or hangs.

    LC_ALL=C: elsewhere the first number with a point may be the clock."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        _, output, _ = run_child([name], SCRAPE_DEADLINE, environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return output.decode("utf-8", "replace")


def free_memory() -> float | None:
    """Megabytes of memory that nothing uses."""
    if sys.platform == "darwin":
        return parse_vm_stat(command_output("vm_stat"))
    return linux_memory(SCRAPE_LINUX_MEMORY)


def linux_memory(pattern: re.Pattern[str]) -> float | None:
    """Megabytes that *pattern* finds in this machine's /proc/meminfo."""
    try:
        return parse_meminfo(read_file("/proc/meminfo").decode(), pattern)
    except OSError:
        return None


# ---------------------------------------------------------------------------
# Unit records: the file that says a unit was accepted, by whom it is done, and what
# came of it.  Knows the file's form, and nothing of who reads it.
#
#     crowdnode-unit 1 {"id":7,...}      the node's, by the fork server, before the fork
#     pid 4711                           the fork server, after it; and the worker
#     succeeded 0.0018 {"output":42}     the worker, at its end; or "failed", and then
#                                        by the node where the worker has died
#     reported                           the node: central has taken the outcome; kept
#                                        for a few seconds, see "Late commits"
#     withdrawn                          the node: never to be reported
#
# A line counts when its newline is there.  The file is locked (flock) as long as the
# worker lives: the kernel drops the lock, whatever ends it.
# ---------------------------------------------------------------------------

RECORD_VERSION = b"1"
RECORD_KEYS = {"id", "job_id", "action", "stage", "attempts", "digest", "started"}
OUTCOME = re.compile(rb'([0-9]+\.?[0-9]*) (\{"output":.*\})')
WITHDRAWN = b"withdrawn\n"
REPORTED = b"reported\n"


class OddRecord(Exception):
    """A whole record that this program does not understand."""


class OtherVersion(OddRecord):
    """A record that another version of this program has written."""


class Outcome:
    """What came of a unit: status, seconds and JSON text as central is told them.

    kind: what it counts as; a worker that left no outcome died or timed_out."""

    def __init__(
        self, status: str, seconds: str, output: bytes, kind: str = ""
    ) -> None:
        self.status = status
        self.seconds = seconds
        self.output = output
        self.kind = kind or status

    def reason(self) -> str:
        """Why the unit failed; empty if it has not."""
        if self.status == "succeeded":
            return ""
        return str(json.loads(self.output)["output"]).strip()


class Record:
    """What a record says.

    head: what the unit is, or None where the fork server died before it had written
    that."""

    def __init__(self) -> None:
        self.head: Json | None = None
        self.pid: int | None = None
        self.outcome: Outcome | None = None
        self.withdrawn = False
        self.reported = False


def record_head(request: Json, digest: str) -> Json:
    """What a record begins with, of a unit as central wrote it: id, job_id, action,
    attempts, stage, digest, and started (seconds since 1970)."""
    head = {key: request[key] for key in ("id", "job_id", "action", "attempts")}
    head.update(stage=STAGES[request["status"]], digest=digest, started=time.time())
    return head


def first_line(head: Json) -> str:
    """The line that says so."""
    return f"crowdnode-unit {RECORD_VERSION.decode()} {json.dumps(head)}\n"


def pid_line(pid: int) -> bytes:
    """The line that says who does the unit."""
    return b"pid %d\n" % pid


def outcome_line(status: str, seconds: str, output: bytes) -> bytes:
    """The line that says what came of it; *output* is JSON text."""
    return b"%s %s %s\n" % (status.encode(), seconds.encode(), output)


def parse_record(data: bytes) -> Record:
    """Understand a record's bytes.  Raises OddRecord."""
    record = Record()
    lines = data.split(b"\n")[:-1]  # what follows the last newline does not count
    try:
        for number, line in enumerate(lines):
            word, _, rest = line.partition(b" ")
            if number == 0:
                version, _, head = rest.partition(b" ")
                if word != b"crowdnode-unit":
                    raise OddRecord("it does not begin as a record does")
                if version != RECORD_VERSION:
                    raise OtherVersion(f"it is of version {version.decode()}")
                record.head = parse_head(head)
            elif word == b"pid":
                record.pid = int(rest)
            elif word in (b"succeeded", b"failed"):
                match = OUTCOME.fullmatch(rest)
                if match:
                    record.outcome = Outcome(word.decode(), match[1].decode(), match[2])
                elif line.endswith(WITHDRAWN.strip()):  # of a worker killed in writing
                    record.withdrawn = True
                else:
                    raise OddRecord(f"line {number + 1} is cut short")
            elif line + b"\n" == WITHDRAWN:
                record.withdrawn = True
            elif line + b"\n" == REPORTED:
                record.reported = True
            else:
                raise OddRecord(f"line {number + 1} can't be understood")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OddRecord(f"it can't be understood: {error}") from None
    return record


def parse_head(text: bytes) -> Json:
    """The unit in a record's first line.  Raises OddRecord, ValueError."""
    head: Json = json.loads(text)
    if not isinstance(head, dict) or RECORD_KEYS - set(head):
        raise OddRecord("its first line lacks something")
    if head["stage"] not in STAGES.values():
        raise OddRecord("its stage is unknown")
    head["started"] = float(head["started"])
    return head


def is_locked(path: str) -> bool:
    """Does the worker of the record at *path* live?  Raises FileNotFoundError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def append_to_record(path: str, line: bytes) -> bool:
    """Add *line* to the record at *path*, if it is there: was it?  Raises OSError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return False
    try:
        write_all(descriptor, line)
    finally:
        os.close(descriptor)
    return True


def write_outcome(path: str, line: bytes) -> None:
    """Write down, for a dead worker, what is reported of it.  Raises OSError."""
    if os.path.exists(path):
        os.truncate(path, read_file(path).rfind(b"\n") + 1)
        append_to_record(path, line)


def cut_back(path: str) -> None:
    """Keep what a worker prints from filling the disk: its tail is enough."""
    try:
        if os.stat(path).st_size > OUTPUT_LIMIT:
            tail = read_file(path, OUTPUT_TAIL)
            os.truncate(path, 0)  # its writers append
            append_to_record(path, tail)
    except OSError:
        pass  # it has just ended, or the next look does it


# ---------------------------------------------------------------------------
# Asset stores: where an action's results stay.  Knows paths and URLs, nothing of
# units.  Another is a subclass with check and save, its name in STORES, and with the
# keys that it needs in STORAGES.
# ---------------------------------------------------------------------------


class AssetStore:
    """Keeps files for good, under names the caller chooses.

    Made in the fork server: what save() needs is imported there.  check() and
    warnings() are asked by the node at its start and by --check; save() by workers."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self) -> None:
        """Raise OSError, with the key to look at, where the store can't be used."""
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """What a person should know of it."""
        return []

    def save(self, local_path: str, save_path: str) -> str:
        """Keep the file at *local_path* as *save_path*; return its URL.

        Raises OSError."""
        raise NotImplementedError


TEMPORARY_DIRECTORIES = ("/tmp/", "/var/tmp/", "/private/tmp/", "/private/var/tmp/")


def temporary_warnings(key: str, path: str) -> list[str]:
    """What to say where *path* is a directory that the system empties."""
    path = os.path.realpath(path) + "/"
    if not path.startswith(TEMPORARY_DIRECTORIES):
        return []
    return [
        f"{key}: {path} is in a directory that the system empties now and then, of "
        "units and results too: choose another"
    ]


class FilesystemStore(AssetStore):
    """Keeps files below local_storage_path, a network's drive for example."""

    def check(self) -> None:
        """See AssetStore.  The directory itself is made by the first save."""
        path = self.config.local_storage_path
        while not os.path.lexists(path):
            path = os.path.dirname(path)
        if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
            wrong = f"local_storage_path: {path} is no writable directory"
            raise PermissionError(errno.EACCES, wrong)

    def warnings(self) -> list[str]:
        """See AssetStore."""
        path = self.config.local_storage_path
        found = temporary_warnings("local_storage_path", path)
        if os.path.isdir(path) and os.stat(path).st_mode & 0o022:
            found.append(
                f"local_storage_path: others can write to {path}, and could put links "
                f"there: chmod go-w {path}"
            )
        return found

    def save(self, local_path: str, save_path: str) -> str:
        """See AssetStore.  Who finds the file under its name finds all of it."""
        path = os.path.join(self.config.local_storage_path, save_path)
        make_private_directory(os.path.dirname(path))
        part = f"{path}.{os.getpid()}.part"
        try:
            copy_file(local_path, part)
            os.replace(part, path)
        finally:
            remove_file(part)
        return file_url(path)


S3_ALGORITHM = "AWS4-HMAC-SHA256"
S3_SAFE = "/-_.~"  # what a signature leaves of a path as it is
S3_LIMIT = 5 * 1024**3  # bytes of one PUT
S3_LINK_TIME = 24 * 60 * 60  # seconds
S3_WAITS = (1, 2, 4)  # seconds after failures of the other side


class S3Refused(OSError):
    """What S3 has against a request, by the name of the key to look at.

    status: of HTTP, 500 where there was no answer; code: S3's own word, or ""."""

    KEYS = {
        "InvalidAccessKeyId": "aws_access_key",
        "SignatureDoesNotMatch": "aws_secret_key",
        "NoSuchBucket": "s3_bucket",
        "InvalidBucketName": "s3_bucket",
        "AuthorizationHeaderMalformed": "s3_region",
        "PermanentRedirect": "s3_region",
        "AccessControlListNotSupported": "s3_authentication",
        "RequestTimeTooSkewed": "this machine's clock",
    }

    def __init__(
        self, config: Config, status: int, body: bytes, said: str = ""
    ) -> None:
        text = body.decode("utf-8", "replace")
        code = re.search(r"<Code>([^<]*)</Code>", text)
        message = re.search(r"<Message>([^<]*)</Message>", text)
        self.status = status
        self.code = code[1] if code else ""
        key = self.KEYS.get(self.code, "s3_endpoint" if said else "s3_bucket")
        value = getattr(config, key, None)
        if value and key != "aws_secret_key":
            key = f"{key} = {value}"
        said = said or f"S3 answered {status} {self.code}".strip()
        said += f": {message[1]}" if message else ""
        super().__init__(errno.EIO, f"{key}: {said}")


def beginning(reply: Any) -> bytes:
    """What can be read of the first bytes of a reply."""
    try:
        return bytes(reply.read(4000))
    except (OSError, http.client.HTTPException):
        return b""


class S3Store(AssetStore):
    """Keeps files in a bucket of S3, or of a server that speaks like it: for everybody
    under plain URLs, or with s3_authentication behind links that hold for a day.

    Source: "Authenticating Requests (AWS Signature Version 4)", Amazon S3 API."""

    def __init__(self, config: Config) -> None:
        """Imports what a worker needs, before it is forked."""
        super().__init__(config)
        global hashlib, hmac, http, mimetypes, urllib
        import hashlib
        import hmac
        import http.client
        import mimetypes
        import urllib.error
        import urllib.request

        bucket, endpoint = config.s3_bucket or "", config.s3_endpoint
        host = f"s3.{config.s3_region}.amazonaws.com"
        self.base, self.prefix = endpoint or f"https://{host}", f"/{bucket}"
        # A certificate of *.s3... does not hold for a name with more dots.
        if not endpoint and "." not in bucket:
            self.base, self.prefix = f"https://{bucket}.{host}", ""
        parts = urllib.parse.urlsplit(self.base)
        self.base, self.host = f"{parts.scheme}://{parts.netloc}", parts.netloc
        self.prefix = parts.path + self.prefix
        # No redirects: the signature is for this host, and no other is to see it.
        stay = type(
            "Stay",
            (urllib.request.HTTPRedirectHandler,),
            {"redirect_request": lambda *_: None},
        )
        self._opener = web_opener(stay)

    def check(self) -> None:
        """See AssetStore: lists no file, which tries bucket and keys all the same."""
        try:
            self._send("GET", self.prefix or "/", "list-type=2&max-keys=0")
        except S3Refused as error:
            if error.code != "AccessDenied":  # it may be allowed to write alone
                raise

    def save(self, local_path: str, save_path: str) -> str:
        """See AssetStore."""
        quoted = urllib.parse.quote(os.fsencode(save_path), safe=S3_SAFE)
        path = f"{self.prefix}/{quoted}"
        digest = hashlib.sha256()
        with open(local_path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > S3_LIMIT:
                wrong = f"it has {size} bytes, and S3 takes {S3_LIMIT >> 30} GB at once"
                raise OSError(errno.EFBIG, wrong)
            for piece in iter(lambda: file.read(READ_SIZE), b""):
                digest.update(piece)
            kind = mimetypes.guess_type(save_path)[0] or "application/octet-stream"
            headers = {"content-length": str(size), "content-type": kind}
            if not self.config.s3_authentication:  # without, it is private
                headers["x-amz-acl"] = "public-read"
            self._send("PUT", path, "", headers, digest.hexdigest(), file)
        if self.config.s3_authentication:
            return self.link(path)
        return self.base + path

    def link(self, path: str) -> str:
        """A URL of *path*, quoted, that anybody may get for a day."""
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        fields = {
            "X-Amz-Algorithm": S3_ALGORITHM,
            "X-Amz-Credential": self._credential(now),
            "X-Amz-Date": now,
            "X-Amz-Expires": str(S3_LINK_TIME),
            "X-Amz-SignedHeaders": "host",
        }
        query = urllib.parse.urlencode(
            fields, quote_via=urllib.parse.quote, safe="-_.~"
        )
        signed = self._signature(
            "GET", path, query, {"host": self.host}, "UNSIGNED-PAYLOAD", now
        )
        return f"{self.base}{path}?{query}&X-Amz-Signature={signed}"

    def _credential(self, now: str) -> str:
        return f"{self.config.aws_access_key}/{self._scope(now)}"

    def _scope(self, now: str) -> str:
        return f"{now[:8]}/{self.config.s3_region}/s3/aws4_request"

    def _signature(
        self, method: str, path: str, query: str, headers: Json, digest: str, now: str
    ) -> str:
        """*headers*: in small letters, sorted; path and query: quoted; query sorted."""
        lines = [method, path, query]
        lines += [f"{name}:{value}" for name, value in headers.items()]
        lines += ["", ";".join(headers), digest]
        hashed = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        text = "\n".join([S3_ALGORITHM, now, self._scope(now), hashed])
        key = f"AWS4{self.config.aws_secret_key}".encode()
        for word in [*self._scope(now).split("/"), text]:
            key = hmac.new(key, word.encode(), "sha256").digest()
        return key.hex()

    def _authorized(
        self, method: str, path: str, query: str, headers: Json, digest: str
    ) -> Json:
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        stamp = {"host": self.host, "x-amz-content-sha256": digest, "x-amz-date": now}
        headers = dict(sorted({**headers, **stamp}.items()))
        signed = self._signature(method, path, query, headers, digest, now)
        headers["authorization"] = (
            f"{S3_ALGORITHM} Credential={self._credential(now)}, "
            f"SignedHeaders={';'.join(headers)}, Signature={signed}"
        )
        return headers

    def _send(
        self,
        method: str,
        path: str,
        query: str = "",
        headers: Json | None = None,
        digest: str = "",
        body: Any = None,
    ) -> None:
        """One request; again where the fault is the other side's.  Raises OSError."""
        digest = digest or hashlib.sha256().hexdigest()
        url = f"{self.base}{path}{'?' if query else ''}{query}"
        for wait in (*S3_WAITS, None):
            if body:
                body.seek(0)
            sent = self._authorized(method, path, query, headers or {}, digest)
            request = urllib.request.Request(url, body, sent, method=method)
            try:
                self._opener.open(request, timeout=TRANSFER_TIMEOUT).close()
                return
            except urllib.error.HTTPError as error:
                with error:
                    refusal = S3Refused(self.config, error.code, beginning(error))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(getattr(error, "reason", error))
                if body and ("reset" in reason or "Broken pipe" in reason):
                    reason += ": it may have refused the file before it had all of it"
                refusal = S3Refused(self.config, 500, b"", f"{self.base}: {reason}")
            if wait is None or refusal.status < 500:
                raise refusal
            time.sleep(wait)


STORES: dict[str, type[AssetStore]] = {"filesystem": FilesystemStore, "s3": S3Store}


# ---------------------------------------------------------------------------
# Actions: what is done with an input.  Knows inputs, work directories and programs;
# nothing of processes, records or central.
# ---------------------------------------------------------------------------

URL = re.compile(r"(?:file:/|(?:https?|ftp)://)[!-~]+", re.IGNORECASE)
WEB_URL = re.compile(r"(?:https?|ftp):", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Is *text* a URL to download?  To look at its first letter first is cheaper."""
    return text[:1] in "fFhH" and URL.fullmatch(text) is not None


def safe_file_name(url: str) -> str:
    """The name under which *url* is downloaded; protocol.md, "Where files go".

    Never empty, ``.`` or ``..``, never with a slash, short enough for a file system."""
    base = re.sub(r"\?.*", "", url, flags=re.DOTALL).rstrip("/").rpartition("/")[2]
    extension = os.path.splitext(base)[1]
    name = percent_decoded(base).decode("utf-8", "replace")
    name = re.sub(r"-+", "-", re.sub(r"[^a-zA-Z0-9_\-.]", "-", name))
    if extension and name.endswith(extension):
        name = name[: -len(extension)]
    name = name.replace(".", "-")[:150] + extension[:50]
    return name if name.strip(".") else "input"


class Action:
    """What is done with an input: the base of every action.

    A subclass defines process(), and split() and merge() where its jobs have these
    stages.  Each returns what JSON can hold; split() returns a list, of which each
    element becomes an input of process(); merge() finds the list of all outputs in
    input.  An exception fails the unit, with its text as the reason.

    input           str, or what the input's JSON says where it is an object or a list
    input_path      path of the downloaded file, where the input is a URL; else None
    file_name       that file's name, without the extension; else None
    options         dict: the job's options, and job_id, work_unit_id, attempts
    work_directory  the current directory: private, and removed afterwards
    """

    _name = ""
    needs: tuple[str, ...] = ()  # programs; a built-in one is there where they are

    def __init__(
        self, input: str, options: Json, store: AssetStore, work_directory: str
    ) -> None:
        self.options = options
        self.work_directory = work_directory
        self.input_path: str | None = None
        self.file_name: str | None = None
        self.input: Any = input
        self._store = store
        self._parse_input()
        if isinstance(self.input, str) and is_url(self.input):
            name = safe_file_name(self.input)
            self.file_name = os.path.splitext(name)[0]
            self.input_path = self.download(self.input, name)

    def process(self) -> Any:
        """Turn the input into an output.  Every action defines this."""
        raise ActionFailed(f"the action {self._name} does not define process")

    def download(self, url: str, path: str) -> str:
        """Fetch *url* into the file at *path*, relative to the work directory.

        Returns the absolute path; raises ActionFailed where it can't be had."""
        path = os.path.join(self.work_directory, path)
        try:
            if WEB_URL.match(url):
                download_from_web(url, path)
            else:
                copy_regular_file(local_path(url), path)
        except (OSError, ValueError, EOFError) as error:
            raise ActionFailed(f"can't download {url}: {error}") from error
        return path

    def save(self, path: str) -> str:
        """Keep the file at *path* for good, and return the URL it is found at."""
        prefix = f"{self._name}/job_{self.options['job_id']}"
        unit = f"unit_{self.options['work_unit_id']}"
        path = os.path.join(self.work_directory, path)
        return self._store.save(path, f"{prefix}/{unit}/{os.path.basename(path)}")

    def _parse_input(self) -> None:
        if self.input[:1] in ("[", "{"):
            try:
                self.input = strict_json(self.input)
            except ValueError:
                pass  # then it is a string that begins so


def copy_regular_file(source: str, target: str) -> None:
    """Copy a file; a device or a pipe might never end.  Raises OSError."""
    if os.path.exists(source) and not os.path.isfile(source):
        raise OSError(errno.EINVAL, "is not a regular file", source)
    copy_file(source, target)


def download_from_web(url: str, path: str) -> None:
    """Write what *url* answers into *path*, unpacked if it comes with gzip.

    Raises OSError or ValueError; any status but 2xx is one."""
    import http.client
    import urllib.request  # the fork server has it by now; see ForkServer.start
    import zlib

    opener = web_opener()
    request = urllib.request.Request(url, headers={"User-Agent": "crowdnode"})
    try:
        with opener.open(request, timeout=TRANSFER_TIMEOUT) as reply:
            encoding = (reply.headers.get("Content-Encoding") or "").lower()
            unpack = zlib.decompressobj(47) if encoding in ("gzip", "deflate") else None
            length = reply.headers.get("Content-Length")
            received = 0
            with open(path, "wb", buffering=0) as file:
                for piece in iter(lambda: reply.read(MEGABYTE), b""):
                    received += len(piece)
                    plain = unpack.decompress(piece) if unpack else piece
                    write_all(file.fileno(), plain)
    except (http.client.HTTPException, zlib.error) as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
    if length is not None and received != int(length):
        raise OSError(f"only {received} of {length} bytes came")
    if unpack and not unpack.eof:
        raise OSError("the compressed file is cut short")


class ExecutableAction(Action):
    """An action in any language: a program started with the stage as its argument."""

    path = ""

    def execute(self, stage: str) -> Any:
        """Run the program; its standard output is the result.  Raises ActionFailed.

        No pipes: files can't fill up while the other side waits.  No subprocess
        module either, which would cost each worker its import."""
        request = {
            "stage": stage,
            "input": self.input,
            "input_path": self.input_path,
            "file_name": self.file_name,
            "options": self.options,
        }
        try:
            stdin, stdout = self._unnamed_file(), self._unnamed_file()
            write_all(stdin, json.dumps(request).encode())
            os.lseek(stdin, 0, os.SEEK_SET)
        except OSError as error:
            raise ActionFailed(f"can't start {self.path}: {error.strerror}") from None
        run_program([self.path, stage], [(0, stdin), (1, stdout)])
        return self._result(stdout)

    def _unnamed_file(self) -> int:
        name = os.path.join(self.work_directory, ".crowdnode")
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(name)
        return descriptor

    def _result(self, descriptor: int) -> Any:
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            with open(descriptor, "rb") as file:
                output = file.read().decode()
        except OSError as error:
            raise ActionFailed(f"can't read standard output: {error}") from None
        except UnicodeDecodeError as error:
            raise ActionFailed(f"standard output is not UTF-8: {error}") from None
        try:
            return strict_json(output)
        except ValueError:
            return output.rstrip("\n")


def run_program(
    command: list[str], descriptors: Iterable[tuple[int, int]] = ()
) -> None:
    """Run *command*, which begins with a path, and wait for its end.

    descriptors: pairs of its number there and its number here.  Raises ActionFailed,
    with the last lines that it printed."""
    errors_from = os.lseek(2, 0, os.SEEK_END)
    try:
        pid = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, ours, its) for its, ours in descriptors
            ],
            # Python ignores these, and the program should not.
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
        status = os.waitpid(pid, 0)[1]
    except OSError as error:
        hint = " (it needs a first line such as #!/bin/sh)"
        hint = hint if error.errno == errno.ENOEXEC else ""
        raise ActionFailed(
            f"can't start {command[0]}: {error.strerror}{hint}"
        ) from None
    if status:
        how = describe_end(status)
        errors = printed_since(errors_from)
        raise ActionFailed(f"{errors or os.path.basename(command[0])} ({how})")


def program_path(name: str) -> str | None:
    """Where the program *name* is, as a shell would find it; None: nowhere."""
    for directory in os.get_exec_path():
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def describe_end(wait_status: int) -> str:
    """How a process ended, from what waitpid said of it."""
    if os.WIFSIGNALED(wait_status):
        number = os.WTERMSIG(wait_status)
        hints = {
            signal.SIGKILL: "; perhaps the machine is out of memory",
            signal.SIGXFSZ: "; it wrote more than file_limit",
        }
        return f"killed by {signal_name(number)}{hints.get(number, '')}"  # type: ignore[call-overload]
    return f"exit status {os.WEXITSTATUS(wait_status)}"


def printed_since(offset: int) -> str:
    """The last lines of what this process and its children have printed since the
    file of it was *offset* bytes long.  The node may cut that file back."""
    size = os.fstat(2).st_size
    start = max(min(offset, size), size - MESSAGE_TAIL)
    return os.pread(2, MESSAGE_TAIL, start).decode("utf-8", "replace").strip()


def executable_action(name: str, path: str, stages: list[str]) -> type[Action]:
    """The class for the program at *path*."""

    def stage_method(stage: str) -> Callable[[ExecutableAction], Any]:
        return lambda action: action.execute(stage)

    members: Json = {stage: stage_method(stage) for stage in stages}
    return type(name, (ExecutableAction,), {**members, "path": path})


def stages_of(action: type[Action]) -> list[str]:
    """The stages that *action* defines, in the order of a job."""
    return [
        stage
        for stage in ("split", "process", "merge")
        if getattr(action, stage, None) not in (None, Action.process)
    ]


# ---------------------------------------------------------------------------
# Built-in actions: CloudCrowd's own.
# ---------------------------------------------------------------------------


class WordCount(Action):
    """CloudCrowd's example: the words of each input, counted as ``wc -w`` does, and
    their sum."""

    def process(self) -> int:
        """The number of words in the input's file, or in the input itself."""
        if self.input_path is None:
            return len(str(self.input).split())
        count, in_word = 0, False
        with open(self.input_path, "rb") as file:
            for piece in iter(lambda: file.read(MEGABYTE), b""):
                # A word that goes over from the piece before is counted already.
                count += len(piece.split()) - (in_word and not piece[:1].isspace())
                in_word = not piece[-1:].isspace()
        return count

    def merge(self) -> int:
        """The sum of the counts."""
        return sum(self.input)


class ProgramAction(Action):
    """A built-in action that has programs do its work."""

    def program(self, name: str, *arguments: str, options: Any = "") -> None:
        """Run a program in the work directory.  *options*, a job's, go after the first
        argument; they are split as a shell splits words, and no shell sees them.
        Raises ActionFailed."""
        import shlex

        path = program_path(name)
        if path is None:
            raise ActionFailed(f"{name} is not installed (any more)")
        try:
            words = shlex.split(options or "")
        except (ValueError, AttributeError) as error:
            raise ActionFailed(f"options {options!r}: {error}") from None
        head, *rest = arguments
        run_program([path, head, *words, *rest])

    def listed(self, key: str, *keys: str) -> list[Json]:
        """The job's option *key*: a list of objects that have *keys*, each a word,
        for names of files and programs are made of them.  Raises ActionFailed."""
        items = self.options.get(key, [])
        if not isinstance(items, list):
            raise ActionFailed(f"the option {key} is not a list")
        for item in items:
            for name in keys:
                value = item.get(name) if isinstance(item, dict) else None
                if not isinstance(value, str) or not re.fullmatch(r"[\w-]+", value):
                    raise ActionFailed(
                        f"the option {key}: each needs {', '.join(keys)}, of letters, "
                        f"digits, _ and -: {to_json(item)[:200]}"
                    )
        return items


class GraphicsMagick(ProgramAction):
    """CloudCrowd's: GraphicsMagick's commands on one image.

    Option steps: a list of objects with name, command (convert, say), options (of the
    command), extension, and, if not the image itself, input: an earlier step's name."""

    needs = ("gm",)

    def process(self) -> dict[str, str]:
        """The URLs of the steps' results, by name."""
        if not self.input_path:
            raise ActionFailed("the input is no URL of an image")
        made: dict[str | None, str] = {None: self.input_path}
        urls = {}
        for step in self.listed("steps", "name", "command", "extension"):
            origin = step.get("input")
            source = made.get(origin if origin is None else str(origin))
            if source is None:
                raise ActionFailed(
                    f"the step {step['name']}: its input {step['input']} is no earlier "
                    "step"
                )
            path = f"{self.file_name}_{step['name']}.{step['extension']}"
            path = os.path.join(self.work_directory, path)
            self.program(
                "gm", step["command"], source, path, options=step.get("options")
            )
            made[step["name"]] = path
            urls[step["name"]] = self.save(path)
        return urls


class ProcessPdfs(ProgramAction):
    """CloudCrowd's: pictures and text of each page of PDFs, in one tar archive.

    Options: batch_size, pages of a unit, 10 if not given; images, a list of objects
    with name, extension and options (of gm convert)."""

    needs = ("gm", "gs", "pdftk", "pdftotext")  # gm has gs draw PDFs

    def split(self) -> list[str]:
        """The pages, in archives of batch_size."""
        size = self.options.get("batch_size", 10)
        if not isinstance(size, int) or size < 1:
            raise ActionFailed(f"batch_size is no number from 1: {to_json(size)}")
        if not self.input_path:
            raise ActionFailed("the input is no URL of a PDF")
        self.program("pdftk", self.input_path, "burst", "output", "%05d.part")
        parts = sorted(name for name in os.listdir() if name.endswith(".part"))
        pages = [f"{self.file_name}_{part[:-5]}.pdf" for part in parts]
        for part, page in zip(parts, pages):
            # Once more: pdftk burst leaves the references of the whole in each page.
            self.program("pdftk", part, "output", f"./{page}")
            os.unlink(part)
        batches = []
        for start in range(0, len(pages), size):
            name = f"{start // size:05d}.tar"
            pack(name, pages[start : start + size])
            batches.append(self.save(name))
        return batches

    def process(self) -> str:
        """The pictures and the text of a batch, as an archive."""
        images = self.listed("images", "name", "extension")
        for image in images:
            if re.search(r"(^|_)\d{5,}(_|$)", image["name"]):
                raise ActionFailed(f"the image name {image['name']} is like a page's")
        archive = self.input_path or ""
        pages = unpack(archive)
        os.unlink(archive)
        for page in (f"./{page}" for page in pages):  # or it might be an option
            name = page[: -len(".pdf")]
            for image in images:
                picture = f"{name}_{image['name']}.{image['extension']}"
                options = image.get("options")
                self.program("gm", "convert", page, picture, options=options)
            text = f"{name}.txt"
            self.program("pdftotext", "-enc", "UTF-8", "-layout", "-q", page, text)
            os.unlink(page)
        path = f"{self.file_name}.tar"
        pack(path, sorted(os.listdir()))
        return self.save(path)

    def merge(self) -> str:
        """NAME/text/pages, NAME/text/full and NAME/images/IMAGE of each PDF."""
        for place, url in enumerate(self.input):
            archive = self.download(url, f"{place}.tar")
            unpack(archive)
            os.unlink(archive)
        for name in sorted(os.listdir()):  # in the order of pages
            pdf, number, image, extension = re.fullmatch(
                r"(.*)_(\d{5,})(?:_([\w-]+))?(\.[\w-]+)", name
            ).groups()  # type: ignore[union-attr]
            if image:
                directory = os.path.join(pdf, "images", image)
                os.makedirs(directory, exist_ok=True)
                os.rename(name, os.path.join(directory, f"{pdf}_{number}{extension}"))
                continue
            for kind in ("pages", "full"):
                os.makedirs(os.path.join(pdf, "text", kind), exist_ok=True)
            with open(os.path.join(pdf, "text", "full", f"{pdf}.txt"), "ab") as file:
                file.write(read_file(name))
            os.rename(name, os.path.join(pdf, "text", "pages", name))
        pack("processed_pdfs.tar", sorted(os.listdir()))
        return self.save("processed_pdfs.tar")


def pack(path: str, names: list[str]) -> None:
    """Make an archive of files and directories, compressed though its name is .tar:
    as CloudCrowd does it."""
    import tarfile

    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(name)


def unpack(path: str) -> list[str]:
    """Write the archive's files into the current directory; returns their names.

    Nothing but files, and by their last names: it may come from anywhere."""
    import shutil
    import tarfile

    names = []
    with tarfile.open(path) as archive:
        for member in archive:
            source = archive.extractfile(member) if member.isfile() else None
            if source:
                names.append(os.path.basename(member.name))
                if os.path.exists(names[-1]):
                    raise ActionFailed(f"two inputs are named alike: {names[-1]}")
                with open(names[-1], "wb") as target:
                    shutil.copyfileobj(source, target, READ_SIZE)
    return names


BUILT_IN_ACTIONS: dict[str, type[Action]] = {
    "word_count": WordCount,
    "graphics_magick": GraphicsMagick,
    "process_pdfs": ProcessPdfs,
}


# ---------------------------------------------------------------------------
# Loading actions: finds them, and says what is wrong with those that do not load.
# ---------------------------------------------------------------------------


class ActionLoader:
    """Finds the actions of a configuration.  ``problems`` holds what a person should
    know: (log level, sentence)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.actions: dict[str, type[Action]] = {}
        self.problems: list[tuple[str, str]] = []

    def load(self) -> dict[str, type[Action]]:
        """Load every action; one that does not load is left out, and said.

        No action at all where actions_path can't be read: the built-in ones alone are
        not what was meant."""
        # A module says "from crowdnode import Action" though this runs as __main__.
        sys.modules.setdefault("crowdnode", sys.modules[__name__])
        origin: dict[str, str] = {}
        try:
            candidates = self._candidates()
        except OSError as error:
            self._error(f"actions_path: {error}")
            return {}
        for path in candidates:
            name = os.path.splitext(os.path.basename(path))[0]
            if name in origin:
                self._error(
                    f"{path} is left out: {origin[name]} has the same name; rename one"
                )
                continue
            action = self._load(name, path)
            if action:
                origin[name] = path
                self.actions[name] = action
        if not self.config.disable_default_actions:
            self.actions = {**self._built_in(), **self.actions}
        for name in self.config.disabled_actions:
            if self.actions.pop(name, None) is None and name not in BUILT_IN_ACTIONS:
                self._warn(f"disabled_actions: there is no action {name}")
        for name in set(self.config.actions) - set(self.actions):
            self._warn(f"[action {name}]: there is no action {name}")
        for name, action in self.actions.items():
            action._name = name
        return self.actions

    def _built_in(self) -> dict[str, type[Action]]:
        """Those whose programs are here; of the others it is said, if not loudly."""
        found = {}
        for name, action in BUILT_IN_ACTIONS.items():
            missing = [need for need in action.needs if not program_path(need)]
            if not missing:
                found[name] = action
            elif name not in {*self.actions, *self.config.disabled_actions}:
                names = ", ".join(missing)
                sentence = f"the action {name} is left out: not installed: {names}"
                self.problems.append(("info", sentence))
        return found

    def _error(self, sentence: str) -> None:
        self.problems.append(("error", sentence))

    def _warn(self, sentence: str) -> None:
        self.problems.append(("warning", sentence))

    def _candidates(self) -> list[str]:
        """The files in actions_path that may be actions, by name.

        Raises OSError where it can't be read."""
        directory = self.config.actions_path
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            return []  # fine: there are built-in ones
        paths = [os.path.join(directory, name) for name in names if name[0] not in "._"]
        return [path for path in paths if os.path.isfile(path) and self._is_one(path)]

    def _is_one(self, path: str) -> bool:
        if path.endswith(".py") or os.access(path, os.X_OK):
            return True
        try:
            if read_file(path)[:2] == b"#!":
                self._warn(f"{path} is left out: it is not executable (chmod +x)")
        except OSError as error:
            self._error(f"{path} is left out: {error}")
        return False

    def _load(self, name: str, path: str) -> type[Action] | None:
        if not ACTION_NAME.fullmatch(name):
            self._error(
                f"{path} is left out: its name must be letters, digits and _, "
                "and begin with a letter"
            )
            return None
        if not path.endswith(".py"):
            section = self.config.actions.get(name, {})
            stages = section.get("stages") or ["process"]
            return executable_action(name, path, stages)
        before = running_threads()
        try:
            action = self._load_module(name, path)
        except (Exception, SystemExit) as error:
            where = own_frames(error, path)
            self._error(f"{path} is left out: {type(error).__name__}: {error}{where}")
            action = None
        for thread in sorted(running_threads() - before):
            self._warn(
                f"{path} starts the thread {thread} when it is imported: it will not "
                "run in workers, and a lock it holds then is held there for ever; "
                "start it in process()"
            )
        return action

    def _load_module(self, name: str, path: str) -> type[Action]:
        import importlib.util

        module_name = f"crowdnode_action_{name}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        if self.config.actions_path not in sys.path:  # for what several actions share
            sys.path.insert(0, self.config.actions_path)
        spec.loader.exec_module(module)
        found = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, sys.modules["crowdnode"].Action)
            and value.__module__ == module_name
        ]
        if len(found) != 1:
            raise ImportError(
                f"it must define one subclass of Action, not {len(found)}"
            )
        if "process" not in stages_of(found[0]):
            raise ImportError(f"its class {found[0].__name__} must define process")
        return found[0]


def running_threads() -> set[str]:
    """The names of this process's threads but the first, where anything has imported
    threading."""
    threading = sys.modules.get("threading")
    if threading is None:
        return set()
    first = threading.main_thread()
    return {thread.name for thread in threading.enumerate() if thread is not first}


OWN_FRAMES = 10  # of a traceback, at most, in a failure's message


def own_frames(error: BaseException, path: str) -> str:
    """The traceback of *error*, for a person: what of it is in the directory of the
    action's file, *path*, from the outermost call to the innermost."""
    frames, traceback = [], error.__traceback__
    while traceback:
        code = traceback.tb_frame.f_code
        directory, name = os.path.split(code.co_filename)
        if directory == os.path.dirname(path):
            frames.append(f"{name}, line {traceback.tb_lineno}, in {code.co_name}")
        traceback = traceback.tb_next
    return f" ({'; '.join(frames[-OWN_FRAMES:])})" if frames and path else ""


# ---------------------------------------------------------------------------
# Worker: one process for one unit.  Knows the unit and its record; leaves the outcome
# there and exits.  It touches little: each page it writes to is copied.
# ---------------------------------------------------------------------------


class Limits:
    """What an action's workers may use: nice; time in seconds, None for no limit;
    memory in MB, for messages; and numbers and bytes for setrlimit."""

    def __init__(self, config: Config, action: str) -> None:
        self.nice: int = config.limit(action, "nice")
        self.time: float | None = config.limit(action, "time_limit")
        self.memory: float | None = config.limit(action, "memory_limit")
        self.resources: list[tuple[int, int]] = []
        for key, name in (
            ("memory_limit", "RLIMIT_DATA"),
            ("file_limit", "RLIMIT_FSIZE"),
        ):
            megabytes = config.limit(action, key)
            if megabytes:
                import resource  # for the workers, too

                number = getattr(resource, name)
                self.resources.append((number, int(megabytes * MEGABYTE)))


class Worker:
    """Runs one work unit, in a process of its own.

    Made before the fork.  After it each page that is written to is copied, so it writes
    to few.  record, output: descriptors; the former holds the record's lock.  deadline,
    timed_out: its parent's notes."""

    __slots__ = (
        "action", "deadline", "directory", "id", "inode", "limits", "name", "output",
        "path", "record", "start_time", "store", "timed_out", "unit",
    )  # fmt: skip

    def __init__(
        self,
        unit: Json,
        action: type[Action] | None,
        config: Config,
        store: AssetStore,
        limits: Limits,
    ) -> None:
        self.unit = unit
        self.name: str = unit["action"]
        self.action = action
        self.store = store
        self.limits = limits
        self.id: bytes = str(unit["id"]).encode()
        self.path = f"{config.units_path}/{unit['id']}"
        self.directory = config.work_directory(self.name, unit["id"])
        self.record = self.output = self.inode = -1
        self.start_time = time.monotonic_ns()
        self.deadline = 0.0
        self.timed_out = False

    def accept(self, head: str) -> None:
        """Write down that there is this unit.  Raises OSError, FileExistsError where
        there is a record of its name."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        self.record = os.open(self.path, flags | os.O_EXCL, 0o600)
        fcntl.flock(self.record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.inode = os.fstat(self.record).st_ino
        write_all(self.record, head.encode())
        self.output = os.open(f"{self.path}.out", flags | os.O_TRUNC, 0o600)

    def let_go(self) -> None:
        """Close the descriptors, which are the worker's alone from now on."""
        for descriptor in (self.record, self.output):
            if descriptor >= 0:
                os.close(descriptor)

    def run(self) -> bool:
        """Run the unit and write its outcome.  Return whether it succeeded."""
        try:
            self._settle_in()
        except OSError as error:
            reason = f"the worker can't be set up: {error}"
            self._write_outcome("failed", encoded_failure(reason))
            return False
        status, output = self.run_work_unit()
        try:
            if self.unit["options"].get("benchmark") is True:
                print(f"benchmark: {self._benchmark()}")
            if sys.stdout is not sys.__stdout__:  # that one is not buffered
                sys.stdout.flush()
        except (OSError, ValueError):
            pass  # the action has closed it
        self._write_outcome(status, output)
        return status == "succeeded"

    def _settle_in(self) -> None:
        """Become what a worker is: nice, limited, printing to its own file.

        The fork server writes the pid down, too, before it tells anybody of it; should
        it die before that, this worker can still be found and ended."""
        os.setsid()
        os.write(self.record, pid_line(os.getpid()))
        os.dup2(self.output, 1)
        os.dup2(self.output, 2)
        os.close(self.output)
        if self.limits.nice:
            os.nice(self.limits.nice)
        for number, limit in self.limits.resources:
            import resource

            # Soft, so that the outcome can be written above it.
            hard = resource.getrlimit(number)[1]
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(number, (soft, hard))

    def _benchmark(self) -> str:
        user, system, child_user, child_system, _ = os.times()
        user, system = user + child_user, system + child_system
        return f"{user:.3f} user {system:.3f} system {self.time_taken():.3f} real"

    def time_taken(self) -> float:
        """Seconds since this worker began."""
        return (time.monotonic_ns() - self.start_time) / 1e9

    def run_work_unit(self) -> tuple[str, bytes]:
        """Run the action.  Whatever it raises is a failure, and is told as one."""
        try:
            if self.action is None:
                raise ActionFailed(f"this node has no action named {self.name}")
            self._make_work_directory()
            return "succeeded", encoded_output(self._call(self.action))
        except BaseException as error:
            return "failed", encoded_failure(self._explain(error))
        finally:
            if self.action:
                self._remove_work_directory()

    def _call(self, action: type[Action]) -> Any:
        stage = STAGES[self.unit["status"]]
        if getattr(action, stage, None) is None:
            raise ActionFailed(f"the action {self.name} does not define {stage}")
        options = {
            **self.unit["options"],
            "job_id": self.unit["job_id"],
            "work_unit_id": self.unit["id"],
            "attempts": self.unit["attempts"],
        }
        task = action(self.unit["input"], options, self.store, self.directory)
        result = getattr(task, stage)()
        if stage == "split" and not isinstance(result, (list, tuple)):
            raise ActionFailed(f"split must return a list, not {type(result).__name__}")
        return result

    def _make_work_directory(self) -> None:
        path = self.directory
        try:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:  # of an earlier attempt
                remove_tree(path)
                os.mkdir(path, 0o700)
            except FileNotFoundError:
                make_private_directory(path)
            os.chdir(path)
        except OSError as error:
            raise ActionFailed(f"can't make {path}: {error.strerror}") from None

    def _remove_work_directory(self) -> None:
        try:
            os.chdir("/")
            try:
                os.rmdir(self.directory)
            except OSError:
                remove_tree(self.directory)
        except OSError as error:
            print(f"can't remove {self.directory}: {error}", file=sys.stderr)

    def _explain(self, error: BaseException) -> str:
        """One line on *error* for central; all of it goes to the log."""
        if isinstance(error, ActionFailed):
            return str(error)
        sys.excepthook(type(error), error, error.__traceback__)
        module = sys.modules.get(self.action.__module__) if self.action else None
        where = own_frames(error, getattr(module, "__file__", None) or "")
        if isinstance(error, MemoryError) and self.limits.memory:
            where += f"; memory_limit is {self.limits.memory:g} MB"
        return f"{type(error).__name__}: {error}{where}"

    def _write_outcome(self, status: str, output: bytes) -> None:
        """Write the outcome's line, or at least that it can't be written."""
        self._lift_limits()
        self._find_record()
        line = self._outcome_line(status, output)
        written = 0
        try:
            written = os.write(self.record, line)
            write_all(self.record, line[written:])
        except OSError as error:
            if written:  # in part: from there on it is of no use
                end = os.lseek(self.record, 0, os.SEEK_CUR)
                os.ftruncate(self.record, end - written)
            # This one is short: it fits into what the file occupies already.
            reason = f"the outcome can't be written: {error.strerror}"
            line = self._outcome_line("failed", encoded_failure(reason))
            write_all(self.record, line)

    def _lift_limits(self) -> None:
        for number, _ in self.limits.resources:
            import resource

            hard = resource.getrlimit(number)[1]
            resource.setrlimit(number, (hard, hard))

    def _outcome_line(self, status: str, output: bytes) -> bytes:
        microseconds = (time.monotonic_ns() - self.start_time) // 1000
        # Not as a float: to write one touches ten pages more.
        seconds, rest = divmod(microseconds, 1_000_000)
        return outcome_line(status, f"{seconds}.{rest:06d}", output)

    def _find_record(self) -> None:
        """Open the record again, should the action have closed its descriptor."""
        try:
            if os.fstat(self.record).st_ino == self.inode:
                return
        except OSError:
            pass
        self.record = os.open(self.path, os.O_WRONLY | os.O_APPEND)


NESTING_LIMIT = 99  # levels; Ruby's JSON parser takes 100, {"output": ...} is one


def is_nested_too_deeply(value: Any) -> bool:
    """Return whether *value*, which is JSON, has more levels than NESTING_LIMIT."""
    level = [value]
    for _ in range(NESTING_LIMIT + 1):
        level = [item for item in level if isinstance(item, (dict, list, tuple))]
        if not level:
            return False
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return True


def encoded_output(result: Any) -> bytes:
    """The outcome as central takes it: always an object with the key output.

    What most actions return is written without a JSONEncoder: to make one touches a
    hundred pages, a quarter of what a worker touches in all."""
    try:
        if result is None:
            return b'{"output":null}'
        if type(result) is int:
            return b'{"output":%d}' % result
        if type(result) is str:
            return b'{"output":%s}' % json.encoder.encode_basestring(result).encode()
        text = to_json({"output": result}).encode()
    except (TypeError, ValueError) as error:
        raise ActionFailed(f"the output is not JSON: {error}") from None
    except RecursionError:
        text = b""
    if not text or is_nested_too_deeply(result):
        raise ActionFailed(
            f"the output is nested more than {NESTING_LIMIT} deep, which central's "
            "Ruby can't parse"
        )
    return text


def encoded_failure(message: str) -> bytes:
    """A failure's reason as central takes it, whatever is in it."""
    return to_json({"output": message.encode("utf-8", "replace").decode()}).encode()


# ---------------------------------------------------------------------------
# Fork server: the one process that forks, with one thread and without a network.
# Knows workers by their pid; what becomes of an outcome is the node's business.
#
# Messages are lines of JSON.  From the node:
#     ["configure", configuration]               once, first
#     ["unit", first line of its record, unit]   ["kill", pid, signal]   ["try"]
# To the node:
#     ["ready", {action: stages}, problems]      once, first
#     ["started", id, pid]   ["refused", id, reason]   ["exists", id]
#     ["ended", id, wait status, timed out]      ["tried", reason or null]
# ---------------------------------------------------------------------------

LOOK_INTERVAL = 0.1  # seconds from a worker's end to a look at what it has left
ERROR_PAUSE = 0.02  # seconds, where the kernel has refused what must be done


class LineChannel:
    """Messages over the fork server's end of the socket pair, without ever waiting."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.open = True  # the node may send more
        self.messages: deque[list[Any]] = deque()  # that have come
        self.to_send = bytearray()
        self._received = bytearray()
        os.set_blocking(descriptor, False)

    def receive(self) -> None:
        """Read what there is; what is complete goes to messages."""
        try:
            data = os.read(self.descriptor, READ_SIZE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        self.open = bool(data)
        if b"\n" not in data:
            self._received += data
            return
        *lines, rest = (bytes(self._received) + data).split(b"\n")
        self._received = bytearray(rest)
        self.messages += [json.loads(line) for line in lines]

    def send(self, *message: Any) -> None:
        """Have a message sent by the next flush()."""
        self.to_send += json.dumps(message).encode() + b"\n"

    def flush(self) -> None:
        """Send what the node has room for."""
        try:
            while self.to_send:
                del self.to_send[: os.write(self.descriptor, self.to_send)]
        except BlockingIOError:
            pass
        except ConnectionError:  # the node has gone; what it should know is on disk
            self.to_send.clear()
        except OSError:  # no buffers, say: the next flush tries again
            time.sleep(ERROR_PAUSE)


class Deadlines:
    """The time limits of workers: TERM, and a little later KILL."""

    def __init__(self, workers: dict[int, Worker]) -> None:
        self.workers = workers  # the fork server's
        self._heap: list[tuple[float, int, int]] = []  # (when, pid, signal)

    def set(self, pid: int, when: float, number: int = signal.SIGTERM) -> None:
        """Have the worker *pid* ended at *when*, a monotonic time."""
        self.workers[pid].deadline = when
        heapq.heappush(self._heap, (when, pid, number))

    def next(self) -> float | None:
        """When the next is due."""
        return self._heap[0][0] if self._heap else None

    def enforce(self) -> None:
        """Signal the workers that are over their time."""
        now = time.monotonic()
        while self._heap and self._heap[0][0] <= now:
            when, pid, number = heapq.heappop(self._heap)
            if not self._holds(when, pid):
                continue
            self.workers[pid].timed_out = True
            kill_worker(pid, number)
            if number == signal.SIGTERM:
                self.set(pid, now + KILL_GRACE, signal.SIGKILL)

    def forget_ended(self) -> None:
        """Drop those of workers that have ended, once they are many: they might be due
        in days."""
        if len(self._heap) > 2 * len(self.workers) + 100:
            self._heap = [item for item in self._heap if self._holds(*item[:2])]
            heapq.heapify(self._heap)

    def _holds(self, when: float, pid: int) -> bool:
        worker = self.workers.get(pid)
        return worker is not None and worker.deadline == when  # it is not another's pid


class Leftovers:
    """What workers leave running is ended: their process groups, and daemons."""

    def __init__(self) -> None:
        self.own = children()  # processes that the actions' modules have started
        self.prctl = load_prctl()
        self.look_at: float | None = None  # when to look for daemons

    def inherit(self) -> None:
        """Have a descendant that loses its parent become this process's child, so that
        a daemon that a unit has left can be found; prctl(2), on Linux alone."""
        if self.prctl:
            self.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def after(self, pid: int) -> None:
        """The child *pid* has ended: end its group, and look for daemons soon."""
        if self.look_at is None:
            self.look_at = time.monotonic() + LOOK_INTERVAL
        kill_group(pid, signal.SIGKILL)

    def is_due(self) -> bool:
        """Is it time for end()?"""
        return self.look_at is not None and self.look_at <= time.monotonic()

    def end(self, workers: Iterable[int]) -> None:
        """End every child but *workers*; the end of one is a reason to look again."""
        end_children({*workers, *self.own})
        self.look_at = None


class OomScore:
    """Linux's measure of whom the kernel ends when memory runs out.

    A worker is born as the first of all: the fork server sets it around the fork, which
    costs a quarter of what it would cost the worker."""

    def __init__(self) -> None:
        self._descriptor, self._usual = -1, b"0"
        try:
            self._descriptor = os.open("/proc/self/oom_score_adj", os.O_RDWR)
            self._usual = os.read(self._descriptor, 100)
        except OSError:
            pass  # no Linux

    def set(self, is_worker: bool) -> None:
        """Set that of what is forked from now on."""
        if self._descriptor >= 0:
            try:
                os.pwrite(self._descriptor, b"1000" if is_worker else self._usual, 0)
            except OSError:
                pass  # it may not be lowered again, by some security module

    def close(self) -> None:
        """A worker has no use for it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


class ForkServer:
    """Forks a worker for each unit, reaps it, and ends it at its time limit.

    When the node has gone, or has closed its side, it takes no more units, stays
    until the last worker has ended, and exits."""

    def __init__(self, node: LineChannel, config: Config) -> None:
        """Loads the actions; from here on the process grows as little as it can."""
        import gc

        self.node = node
        self.config = config
        self.workers: dict[int, Worker] = {}  # by pid
        self.deadlines = Deadlines(self.workers)
        self.wake, self.wake_writer = self._trap_signals()
        loader = ActionLoader(config)
        self.actions = loader.load()
        self.limits = {name: Limits(config, name) for name in ("", *self.actions)}
        self.store = STORES[config.storage](config)
        if running_threads():
            import warnings  # what it would say has been said better, as a problem

            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")
        self.leftovers = Leftovers()
        self.leftovers.inherit()
        self.oom_score = OomScore()
        stages = {name: stages_of(action) for name, action in self.actions.items()}
        self.node.send("ready", stages, loader.problems)
        self.node.flush()
        gc.collect()
        gc.freeze()  # or the first collection in a worker would copy every page

    def _trap_signals(self) -> tuple[int, int]:
        """A pipe that is written to at each SIGCHLD."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, only_wake)
        wake, writer = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        return wake, writer

    def serve(self) -> None:
        """Run until the node has gone and the last worker has ended."""
        while self.node.open or self.workers or self.leftovers.look_at is not None:
            try:
                self.step()
            except OSError as error:  # none that is known of; all the same, go on
                print(f"a step failed: {error}; trying again", file=sys.stderr)
                time.sleep(ERROR_PAUSE)
                os.write(self.wake_writer, b"\0")  # a worker's end may be unseen

    def step(self) -> None:
        """Wait for one event and do what it asks for."""
        node = self.node.descriptor
        wanted = [self.wake, node] if self.node.open else [self.wake]
        sending = [node] if self.node.to_send else []
        readable, _, _ = select.select(wanted, sending, [], self._patience())
        if self.wake in readable:  # SIGCHLD: a child has ended
            os.read(self.wake, 4096)
            self._reap()
        self.deadlines.enforce()
        if self.leftovers.is_due():
            self._reap()
            self.leftovers.end(self.workers)
        if node in readable:  # it has sent something, or has gone
            self.node.receive()
        while self.node.messages:
            self.handle(self.node.messages.popleft())
        self.node.flush()

    def _patience(self) -> float | None:
        times = [self.deadlines.next(), self.leftovers.look_at]
        known = [moment for moment in times if moment is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    def handle(self, message: list[Any]) -> None:
        """Do what one message of the node asks for."""
        kind, *rest = message
        if kind == "unit":
            head, unit = rest
            self.start(head, unit)
        elif kind == "kill":
            pid, number = rest
            if pid in self.workers:  # or it has ended meanwhile
                kill_worker(pid, number)
        elif kind == "try":
            self.node.send("tried", self._try())

    def start(self, head: str, unit: Json) -> None:
        """Accept *unit*: write its record, fork its worker, say its pid."""
        name = unit["action"]
        action, limits = self.actions.get(name), self.limits.get(name)
        limits = limits or self.limits[""]
        worker = Worker(unit, action, self.config, self.store, limits)
        try:
            if unit["input"][:1] in "fFhH" and WEB_URL.match(unit["input"]):
                import urllib.request  # noqa: F401  once here, not in each worker
            worker.accept(head)
            pid = self._fork()
            if pid == 0:  # the child, which never comes back from here
                self._be_worker(worker)
            self.workers[pid] = worker
            if limits.time:
                self.deadlines.set(pid, time.monotonic() + limits.time)
            write_all(worker.record, pid_line(pid))
            # As send() has it, at a fraction of the cost; so too in _reap().
            self.node.to_send += b'["started","%s",%d]\n' % (worker.id, pid)
        except FileExistsError:
            self.node.send("exists", unit["id"])
        except OSError as error:
            self._refuse(worker, error)
        finally:
            worker.let_go()

    def _fork(self) -> int:
        self.oom_score.set(is_worker=True)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:
                self.oom_score.set(is_worker=False)
        return pid

    def _be_worker(self, worker: Worker) -> NoReturn:
        """The child's path: whatever happens, it ends here."""
        code = EXIT_FAILED
        try:
            signal.set_wakeup_fd(-1)
            os.close(self.node.descriptor)
            os.close(self.wake)
            os.close(self.wake_writer)
            self.oom_score.close()
            self.leftovers.inherit()
            # The node tells a quick success from a quick failure by it.
            code = EXIT_OK if worker.run() else EXIT_FAILED
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(code)

    def _refuse(self, worker: Worker, error: OSError) -> None:
        """Undo the start of a unit: its record, and its process if there is one."""
        for pid, known in list(self.workers.items()):
            if known is worker:
                kill_worker(pid, signal.SIGKILL)
                del self.workers[pid]  # its end is not to be told
        try:
            # Should it stay: it may hold the pid, and so look accepted.
            append_to_record(worker.path, WITHDRAWN)
            remove_file(worker.path)
            remove_file(f"{worker.path}.out")
        except OSError:
            pass
        reason = f"can't start a worker: {error.strerror}"
        self.node.send("refused", worker.unit["id"], reason)

    def _reap(self) -> None:
        """Say the end of every worker that has ended; end what it has left running."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            worker = self.workers.pop(pid, None)
            if worker:
                timed_out = b"true" if worker.timed_out else b"false"
                self.node.to_send += b'["ended","%s",%d,%s]\n' % (
                    worker.id, status, timed_out
                )  # fmt: skip
            self.leftovers.after(pid)
            self.deadlines.forget_ended()
            if worker and not self.workers:
                return  # to ask whether there are more would raise, mostly

    def _try(self) -> str | None:
        """Could a worker be started now?  The reason if not."""
        path = os.path.join(self.config.units_path, ".try")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                write_all(descriptor, bytes(4096))
            finally:
                os.close(descriptor)
                os.unlink(path)
            pid = os.fork()
        except OSError as error:
            return f"can't start a worker: {error.strerror}"
        if pid == 0:
            os._exit(0)
        return None


def run_fork_server(descriptor: int) -> int:
    """The fork server's main; *descriptor* is its end of the socket pair."""
    node = LineChannel(descriptor)
    while node.open and not node.messages:
        select.select([descriptor], [], [])
        node.receive()
    if not node.messages:
        return EXIT_OK
    _, configuration = node.messages.popleft()
    try:
        server = ForkServer(node, Config(configuration))
    except OSError as error:
        print(f"can't start: {error}", file=sys.stderr)
        return EXIT_FAILED
    server.serve()
    return EXIT_OK


# ---------------------------------------------------------------------------
# Central: the wire to it, in both dialects.  Knows nothing of units but what is
# reported of them.
# ---------------------------------------------------------------------------

CONNECT_DEADLINE = 10  # seconds
CHECK_OUT_TIMEOUT = 10  # seconds, so that a stop does not take long
STATUS_LIMIT = 16 * MEGABYTE  # bytes of an answer
STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([0-9]{3})(?: (.*?))?\r?\n")
FORM_SAFE = b"%% %s%s0123456789-._~" % (
    bytes(range(ord("A"), ord("Z") + 1)), bytes(range(ord("a"), ord("z") + 1))
)  # fmt: skip


class CentralError(Exception):
    """A call that central did not take.  status: its answer's, or None where there
    was none; unreached: there was no connection, so nothing was received."""

    def __init__(
        self, message: str, status: int | None = None, unreached: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.unreached = unreached


class NotConnected(OSError):
    """The connection could not be made."""


class Central:
    """The calls of a node to the central server.  Each raises CentralError."""

    def __init__(self, config: Config, port: int) -> None:
        self.config = config
        self.port = port
        self.found: str | None = None  # the dialect of the last check-in
        self.checked_in: float | None = None  # monotonic
        self.answered: float | None = None  # monotonic: when it last took a call
        self.error: str | None = None  # of the last call that failed, until one works
        # Without a proxy of the environment: central is a neighbour.
        no_proxy = urllib.request.ProxyHandler({})
        self._opener = urllib.request.build_opener(no_proxy, status_reader())

    def forget(self) -> None:
        """What is known of it; it is another one now."""
        self.found = self.checked_in = self.answered = self.error = None

    @property
    def dialect(self) -> str | None:
        """What is spoken, as far as it is known."""
        return self.found if self.config.dialect == "auto" else self.config.dialect

    def check_in(self, busy: bool, actions: list[str]) -> None:
        """Say that this node is here, and whether it takes work.

        The wrong dialect is answered with 500 and nothing is recorded, so the other
        is tried then; an old central may say 500 for other reasons too, so neither is
        ever ruled out.  Source: protocol.md, "Node to central"."""
        for dialect in self._dialects():
            try:
                self._call(
                    "PUT",
                    self._node_path(dialect),
                    self._check_in_fields(dialect, busy, actions),
                    self.config.central_timeout,
                )
            except CentralError as error:
                failure = error
                if error.status != 500:
                    break
            else:
                self.found = dialect
                self.checked_in = time.monotonic()
                return
        raise failure

    def check_out(self) -> None:
        """Have central release this node's units to others."""
        dialects = [self.dialect] if self.dialect else self._dialects()
        for dialect in dialects:  # an unknown node is no error
            self._call("DELETE", self._node_path(dialect), None, CHECK_OUT_TIMEOUT)

    def report(self, name: str, pid: int | None, outcome: Outcome) -> bool:
        """Report what came of the unit *name*, which the worker *pid* did; False where
        central does not know that unit.

        Source of the fields and their order: wire/new-report-*.request."""
        fields = [
            ("pid", b"%d" % (pid or 0)),
            ("id", name.encode()),
            ("time", outcome.seconds.encode()),
            ("status", outcome.status.encode()),
            ("output", outcome.output),
        ]
        try:
            self._call("PUT", f"/work/{name}", fields, self.config.report_timeout)
        except CentralError as error:
            if error.status != 404:
                raise
            self._answered()
            return False
        return True

    def running_pids(self) -> set[int]:
        """Return the pids that central believes to be running on this node.

        Source: protocol.md, "it records the pid"."""
        body, _ = self._call("GET", "/status", None, self.config.central_timeout)
        name = f"{self.config.host}:{self.port}"
        try:
            nodes = json.loads(body)["nodes"]
            return {
                int(pid)
                for node in nodes
                if node["host"] == name
                for pid in node["workers"]
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CentralError(f"GET /status: not understood: {error!r}") from None

    def heartbeat(self) -> tuple[bytes, str | None]:
        """Ask whether central is there: the beginning of what it says, and its time,
        as a header Date has it, if it tells."""
        return self._call("GET", "/heartbeat", None, self.config.central_timeout)

    def _dialects(self) -> list[str]:
        if self.config.dialect != "auto":
            return [self.config.dialect]
        return ["0.5", "seed"] if self.dialect == "0.5" else ["seed", "0.5"]

    def _node_path(self, dialect: str) -> str:
        port = "" if dialect == "seed" else f":{self.port}"
        return f"/node/{self.config.host}{port}"

    def _check_in_fields(self, dialect: str, busy: bool, actions: list[str]) -> Fields:
        """Never the newer form with a port: an old central takes it for a second node.

        A tag or a limit that there is not is left out; see protocol.md."""
        fields = [("port", b"%d" % self.port)] if dialect == "seed" else []
        fields.append(("busy", b"true" if busy else b"false"))
        if dialect != "seed" and self.config.tag:
            fields.append(("tag", self.config.tag.encode()))
        if self.config.max_workers:
            fields.append(("max_workers", b"%d" % self.config.max_workers))
        fields.append(("enabled_actions", ",".join(actions).encode()))
        return fields

    def _call(
        self, method: str, path: str, fields: Fields | None, timeout: float
    ) -> tuple[bytes, str | None]:
        data = form_encoded(fields) if fields else None
        url = self.config.central_server + path
        headers = {"User-Agent": f"crowdnode/{__version__}"}
        if self.config.http_authentication:
            headers["Authorization"] = basic_credentials(self.config)
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=timeout) as reply:
                # The status says all: a 2xx was taken, whatever becomes of its body.
                body = reply.read(STATUS_LIMIT) if method == "GET" else b""
                date = reply.headers["Date"]
        except Exception as error:
            failure = self._failure(error)
            self.error = str(failure)
            raise failure from None
        self._answered()
        return body, date

    def _answered(self) -> None:
        self.answered = time.monotonic()
        self.error = None

    def _failure(self, error: Exception) -> CentralError:
        """What *error* means, in words for a person."""
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            sentence = f"it answered {error.code} {error.reason}"
            if error.code == 401:
                keys = (
                    "login and password"
                    if self.config.login
                    else ("http_authentication, login and password")
                )
                sentence += (
                    f": check {keys} in {self.config.file or 'the configuration'}"
                )
            return CentralError(sentence, status=error.code)
        if isinstance(error, urllib.error.URLError):
            reason = error.reason
            never = (NotConnected, ConnectionRefusedError, socket.gaierror)
            return CentralError(str(reason), unreached=isinstance(reason, never))
        return CentralError(f"{type(error).__name__}: {error}")


def send_at_once(connection: Any, request: urllib.request.Request) -> None:
    """Connect an http.client.HTTPConnection and send *request*.  Raises URLError."""
    lines = [f"{request.get_method()} {request.selector} HTTP/1.1"]
    for name, value in [*request.header_items(), ("Connection", "close")]:
        lines.append(f"{name.title()}: {value}")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    data: bytes = request.data or b""  # type: ignore[assignment]
    is_small = len(data) < READ_SIZE
    patience, connection.timeout = connection.timeout, CONNECT_DEADLINE
    try:
        connection.connect()
        connection.sock.settimeout(patience)
    except OSError as error:
        raise urllib.error.URLError(NotConnected(*error.args)) from None
    try:
        connection.sock.sendall(head + data if is_small else head)
        if not is_small:
            connection.sock.sendall(data)
    except OSError as error:
        connection.close()
        raise urllib.error.URLError(error) from None


def read_status(reply: Any) -> None:
    """Read the first line of an http.client.HTTPResponse, and pass over answers in the
    interim (1xx).  Raises URLError."""
    line = reply.fp.readline(LINE_LIMIT)
    match = STATUS_LINE.fullmatch(line)
    while match and match[1].startswith(b"1"):
        while line.strip():
            line = reply.fp.readline(LINE_LIMIT)
        line = reply.fp.readline(LINE_LIMIT)
        match = STATUS_LINE.fullmatch(line)
    if not match:
        said = (
            f"does not speak HTTP: {line[:50]!r}" if line else "closed the connection"
        )
        raise urllib.error.URLError(f"it {said}")
    reply.code = reply.status = int(match[1])
    reply.reason = (match[2] or b"").decode("latin-1")


def status_reader() -> urllib.request.BaseHandler:
    """What has urllib.request send a request at once, and read of a 2xx only that it
    is one.

    To have http.client send head and body apart, and the email package parse headers
    that nobody reads, takes half of the time of a report."""
    from http import client

    class Reply(client.HTTPResponse):
        is_wanted = False  # somebody reads more of it than the status

        def begin(self) -> None:
            if self.is_wanted:
                super().begin()
                self.msg = self.reason  # type: ignore[assignment]
                return
            read_status(self)
            is_success = 200 <= self.status < 300
            self.headers = client.HTTPMessage()
            if not is_success:
                self.headers = client.parse_headers(self.fp)
            self.msg = self.reason  # type: ignore[assignment]  # as urllib has it
            self.version, self.length, self.chunked = 11, 0, False
            self.will_close = True

    class Reader(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> client.HTTPResponse:
            connection = client.HTTPConnection(request.host, timeout=request.timeout)
            send_at_once(connection, request)
            reply = Reply(connection.sock, method=request.get_method())
            connection.close()  # the reply has a file of its socket
            reply.is_wanted = request.get_method() == "GET"
            try:
                reply.begin()
            except BaseException:
                reply.close()
                raise
            return reply

    return Reader()


def form_encoded(fields: Fields) -> bytes:
    """*fields* as application/x-www-form-urlencoded.

    What urllib.parse.urlencode gives; that needs 10 bytes of memory for each, and
    seconds, where an output has 100 MB."""
    return b"&".join(
        name.encode() + b"=" + form_quoted(value) for name, value in fields
    )


def form_quoted(value: bytes) -> bytes:
    """*value* as it stands in a form."""
    value = value.replace(b"%", b"%25")
    for code in set(value.translate(None, FORM_SAFE)):
        value = value.replace(bytes([code]), b"%%%02X" % code)
    return value.replace(b" ", b"+")


def basic_credentials(config: Config) -> str:
    """The value of the Authorization header for *config*'s login and password."""
    pair = f"{config.login}:{config.password}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


# ---------------------------------------------------------------------------
# Surroundings: what a start insists on and --check looks at.  Directories, storage, and
# the name that central is told.
# ---------------------------------------------------------------------------

CLOCK_TOLERANCE = 60  # seconds that this machine's clock may be off central's


def prepare_directories(config: Config) -> None:
    """Make what the node writes to.  Raises CrowdError, naming the key."""
    for key, path in (
        ("state_path", config.state_path),
        ("state_path", config.units_path),
        ("temp_storage_path", config.temp_storage_path),
    ):
        try:
            make_private_directory(path)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "not writable")
            state = os.stat(path)
        except OSError as error:
            raise CrowdError(f"{key}: can't use {path}: {error.strerror}") from None
        # Whoever can write here could plant a link, and have units write elsewhere.
        if state.st_mode & 0o022 or state.st_uid not in (0, os.geteuid()):
            raise CrowdError(
                f"{key}: others can write to {path}: chmod 700 {path}, or choose "
                "another that is this user's alone"
            )


def check_storage(config: Config) -> None:
    """Raise CrowdError where what actions save can't be kept."""
    try:
        STORES[config.storage](config).check()
    except OSError as error:
        sentence = f"storage = {config.storage}: can't be used: {error.strerror}"
        raise CrowdError(sentence) from None


def state_warnings(config: Config) -> list[str]:
    """What a person should know of the files that the node uses."""
    found = list(config.warnings)
    if os.stat(config.state_path).st_mode & 0o077:
        path = config.state_path
        found.append(f"state_path: others can look into {path}: chmod 700 {path}")
    with contextlib.suppress(OSError):  # it may just be replaced
        if os.stat(PROGRAM).st_mtime > time.time() + CLOCK_TOLERANCE:
            found.append(f"clock: it stands before the day {PROGRAM} was written")
    for key in ("state_path", "temp_storage_path"):
        found += temporary_warnings(key, getattr(config, key))
    return found + STORES[config.storage](config).warnings()


def host_problems(config: Config) -> list[tuple[str, str]]:
    """What is wrong with the name that this node tells central to dial."""
    local = urllib.parse.urlsplit(config.central_server).hostname or ""
    try:
        found = socket.getaddrinfo(config.host.strip("[]"), None)
        central = {info[4][0] for info in socket.getaddrinfo(local, None)}
    except (OSError, UnicodeError) as error:
        sentence = (
            f"host = {config.host}, or central's, does not resolve here ({error}); "
            "where central can't resolve it either, no node gets work: set host, or "
            "add it to DNS or /etc/hosts"
        )
        return [("warning", sentence)]
    addresses = {str(info[4][0]).partition("%")[0] for info in found}
    if is_loopback(addresses) and not is_loopback({str(item) for item in central}):
        sentence = (
            f"host = {config.host} is this machine alone ({', '.join(addresses)}), but "
            f"central is elsewhere ({local}): set host to a name that central can dial"
        )
        return [("warning", sentence)]
    return []


def is_loopback(addresses: set[str]) -> bool:
    """Are all of *addresses* this machine's own?"""
    return all(
        ipaddress.ip_address(item.partition("%")[0]).is_loopback for item in addresses
    )


# ---------------------------------------------------------------------------
# The node's tools: the log, threads, loops that no fault ends, signals, and the reasons
# to refuse work.  They know nothing of units.
# ---------------------------------------------------------------------------

RETRY_WAIT = 5  # seconds, doubled at each failure up to
RETRY_WAIT_LIMIT = 60  # seconds
REMINDER_INTERVAL = 60  # seconds between two log lines about the same overload

LOG_SIZE, LOGS_KEPT = 10 * MEGABYTE, 5
log: logging.Logger  # set_up_log() makes it


def make_printable(record: logging.LogRecord) -> bool:
    """A filter of the log: nobody's text may look like lines of ours, or like more
    than text to a terminal."""
    text = record.getMessage().encode("utf-8", "backslashreplace").decode()
    if not text.isprintable():
        text = text.replace("\n", "\n    ")
        text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text)
    record.msg = text
    record.args = None
    return True


def set_up_log(path: str | None, level: str) -> None:
    """Log to the file at *path*, or to standard error.  Raises OSError."""
    global log

    class LogFile(logging.handlers.RotatingFileHandler):
        """Asks the kernel for its size: the base's way takes as long as all else."""

        def shouldRollover(self, record: logging.LogRecord) -> bool:
            if self.stream is None:
                self.stream = self._open()
            return os.fstat(self.stream.fileno()).st_size >= self.maxBytes

    handler: logging.Handler = logging.StreamHandler()
    if path:
        handler = LogFile(
            path, maxBytes=LOG_SIZE, backupCount=LOGS_KEPT, encoding="utf-8"
        )
    handler.setFormatter(
        logging.Formatter(
            "%(asctime)s %(name)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"
        )
    )
    for name in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logging.addLevelName(getattr(logging, name), name.lower())
    logging.raiseExceptions = False  # a full disk is no reason to print tracebacks
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    log = logging.Logger(f"node[{os.getpid()}]", level.upper())
    log.addHandler(handler)
    log.addFilter(make_printable)


def log_problems(problems: list[tuple[str, str]]) -> None:
    """Log sentences, each with its level."""
    for level, sentence in problems:
        log.log(getattr(logging, level.upper()), "%s", sentence)


def log_output(who: str, data: bytes) -> None:
    """Copy what a process has printed to the log, line by line, under its name."""
    for line in data.decode("utf-8", "replace").splitlines():
        record = {"name": who, "levelno": logging.INFO, "levelname": "output"}
        log.handle(logging.makeLogRecord({**record, "msg": line}))


def start_thread(
    target: Callable[..., Any], *arguments: Any, name: str | None = None
) -> threading.Thread:
    """Start a thread that does not keep the process alive.

    Raises OSError where the kernel has none to give."""
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    return started_thread(thread)


def started_thread(thread: threading.Thread) -> threading.Thread:
    """See start_thread."""
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None
    return thread


class Repeater:
    """Does *step* every *interval* seconds, each time on a new threading.Timer.

    step may return other seconds to wait.  No fault in it ends the loop."""

    def __init__(self, step: Callable[[], float | None], interval: float) -> None:
        self.step = step
        self.interval = interval
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._turn = 0  # of the last timer: a cancelled one may run all the same
        self._running = self._again = self._stopped = False

    def start(self) -> None:
        """Begin; the first step comes after one interval."""
        with self._lock:
            self._arm(0 if self._again else self.interval)

    def soon(self) -> None:
        """Do the next step now, or again when the one under way is done."""
        with self._lock:
            if self._running or not self._timer:
                self._again = True
            elif not self._stopped:
                with contextlib.suppress(OSError):  # no thread: then in its time
                    self._arm(0)

    def stop(self) -> None:
        """Do no further step."""
        with self._lock:
            self._stopped = True
            if self._timer:
                self._timer.cancel()

    def _arm(self, delay: float) -> None:
        """Raises OSError, and changes nothing, where no thread is to be had."""
        timer = threading.Timer(delay, self._run, [self._turn + 1])
        timer.daemon = True
        started_thread(timer)
        self._turn += 1
        if self._timer:
            self._timer.cancel()
        self._timer = timer

    def _run(self, turn: int) -> None:
        with self._lock:
            if self._running or turn != self._turn:
                return
            self._running = True
        armed = False
        while not armed:
            self._again = False
            delay = None
            try:
                if not self._stopped:
                    delay = self.step()
            except OSError as error:  # no descriptor to be had, a disk that fails
                log.warning("a step failed: %s", error)
            except Exception:
                log.exception("a step failed; the next comes in %g s", self.interval)
            finally:
                delay = self.interval if delay is None else delay
                armed = self._rearm(delay)
            if not armed:
                time.sleep(max(delay, 1))

    def _rearm(self, delay: float) -> bool:
        """False where no thread is to be had: then the one that is here goes on."""
        with self._lock:
            try:
                if not self._stopped:
                    self._arm(0 if self._again else delay)
            except OSError:
                return False
            self._running = False
            return True


class Backoff:
    """Seconds to wait after each failure in turn: more and more, never in step with
    other nodes."""

    def __init__(self) -> None:
        self.wait = 0.0

    def failed(self, least: float = 0) -> float:
        """Seconds until the next try, *least* or more of them."""
        longer = max(least, self.wait * 2 or RETRY_WAIT)
        self.wait = min(longer, RETRY_WAIT_LIMIT)
        return self.wait * random.uniform(0.8, 1.2)


class Overload:
    """Why this node refuses work; calls over() when the last reason has gone."""

    def __init__(self) -> None:
        self.over: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._reasons = {"starting": "the node is starting"}  # by kind
        self._since = time.monotonic()
        self._reminded = 0.0

    def __bool__(self) -> bool:
        return bool(self._reasons)

    @property
    def reason(self) -> str | None:
        """All reasons in one line; None where work is taken."""
        return "; ".join(list(self._reasons.values())) or None

    @property
    def seconds(self) -> float | None:
        """How long work has been refused; None where it is taken."""
        return time.monotonic() - self._since if self else None

    def has(self, kind: str) -> bool:
        """Does the reason *kind* hold?"""
        return kind in self._reasons

    def begin(self, kind: str, reason: str) -> None:
        """Refuse work for *reason*; said once for each kind."""
        with self._lock:
            new = kind not in self._reasons
            if not self._reasons:
                self._since = time.monotonic()
            self._reasons[kind] = reason
            if new:
                self._reminded = time.monotonic()
        if new:
            log.warning("work is refused: %s", reason)

    def end(self, kind: str) -> None:
        """The reason *kind* holds no more."""
        with self._lock:
            reason = self._reasons.pop(kind, None)
            is_over = reason is not None and not self._reasons
        if reason is not None:
            now = "work is taken again" if is_over else f"still refused: {self.reason}"
            log.info("over: %s; %s", reason, now)
        if is_over:
            self.over()

    def remind(self) -> None:
        """Say it once a minute while it lasts."""
        now = time.monotonic()
        if self and now - self._reminded >= REMINDER_INTERVAL:
            self._reminded = now
            log.warning("work is still refused: %s", self.reason)


class Vitals:
    """The machine's load average, and MB of its memory, held against the limits.

    None: unknown, as to begin with."""

    def __init__(self, config: Config, overload: Overload) -> None:
        self.config = config
        self.overload = overload
        self.load_average: float | None = None
        self.free_memory: float | None = None
        self.available_memory: float | None = None
        self._said: set[str] = set()  # keys for which there is no value here

    def look(self) -> None:
        """Read them anew; work is refused as long as a limit is passed."""
        self.load_average = parse_load(command_output("uptime"))
        self.free_memory = free_memory()
        self.available_memory = linux_memory(SCRAPE_LINUX_AVAILABLE)
        for key, now, direction, what in (
            ("max_load", self.load_average, 1, "load average"),
            ("min_free_memory", self.free_memory, -1, "MB of memory"),
            ("min_available_memory", self.available_memory, -1, "MB of memory"),
        ):
            limit: float | None = getattr(self.config, key)
            if now is None and limit:  # as long as that, all stays as it was
                self._say_unknown(key)
            elif now is not None and limit and (now - limit) * direction > 0:
                self.overload.begin(key, f"{now:.2f} {what}, {key} is {limit:g}")
            else:
                self.overload.end(key)

    def _say_unknown(self, key: str) -> None:
        if key not in self._said:
            self._said.add(key)
            log.warning("%s: this machine does not tell; it does nothing", key)


class Signals:
    """The signals that this process gets, one after the other.

    Python writes their numbers into a pipe, in whichever thread the kernel has picked;
    the handlers proper may wait until the main thread, which sleeps, happens to
    wake."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def trap(self, stop: Callable[[int, Any], None]) -> None:
        """Begin; the signals that stop a node call *stop* besides."""
        signal.set_wakeup_fd(self._writer)
        signal.signal(signal.SIGHUP, only_wake)
        for number in NODE_SIGNALS - {signal.SIGHUP}:
            signal.signal(number, stop)

    def next(self, seconds: float | None = None) -> int | None:
        """Wait for a signal; None where none comes in time."""
        if select.select([self._reader], [], [], seconds)[0]:
            return os.read(self._reader, 1)[0]
        return None

    def feign(self, number: int) -> None:
        """As if the signal had come."""
        os.write(self._writer, bytes([number]))


# ---------------------------------------------------------------------------
# The node's fork servers: how one is started, spoken to and replaced.  What it says of
# units is for the next part.
# ---------------------------------------------------------------------------

SEND_DEADLINE = 10  # seconds for the fork server to read a message
PROBE_DEADLINE = 30  # seconds for the fork server to answer a probe
RELOAD_PATIENCE = 60  # seconds for actions to load again after a fork server's death


def source_identity() -> bytes:
    """What changes when this program's file is replaced: a hash, as a .pyc has it.
    Empty while there is none."""
    import importlib.util

    try:
        return importlib.util.source_hash(read_file(PROGRAM))
    except OSError:
        return b""


COMPILER = """
import py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
py_compile.compile(*sys.argv[1:], doraise=True, invalidation_mode=mode)
"""


def compiled(config: Config) -> str:
    """The path of this program compiled, or of its source where that can't be had.

    Compiling these lines leaves 10 MB behind in the process that does it, and every
    fork would copy their page tables: so it is done in a process of its own."""
    import importlib.util

    path = config.state_file("crowdnode.pyc")
    # What a .pyc begins with: Python's version, the kind of what follows, a hash.
    head = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + source_identity()
    try:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if file.read(len(head)) == head:
                return path
        command = [sys.executable, "-c", COMPILER, PROGRAM, path]
        status, _, errors = run_child(command, LOAD_DEADLINE)
        if status == 0:
            return path
        problem = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    log.warning("can't write %s: %s", path, problem)
    return PROGRAM


class Program:
    """What this node runs and its fork servers are to run, and whether its file has
    been replaced meanwhile."""

    def __init__(self, path: str) -> None:
        self.path = path  # compiled, or PROGRAM itself
        self._identity = source_identity()
        if IS_COMPILED:
            self._identity = read_file(__file__)[8:16]

    def is_replaced(self) -> bool:
        """Is in this program's file what this process does not run?"""
        return source_identity() not in (self._identity, b"")

    def is_outdated(self, config: Config) -> bool:
        """Has this program's file been replaced, by one that works here?"""
        if not self.is_replaced():
            return False
        problem = ""
        command = [sys.executable, PROGRAM, *config.arguments(), "--status"]
        try:
            status, _, errors = run_child(command, LOAD_DEADLINE)
            if status not in (EXIT_OK, EXIT_NOT_RUNNING, EXIT_SILENT):
                problem = errors.decode("utf-8", "replace").strip()
                problem = problem or describe_exit(status)
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem:
            log.error("%s has been replaced by one that does not work here, so this "
                      "node goes on as it was: %s", PROGRAM, problem)  # fmt: skip
        return not problem


class ForkServerLink:
    """The node's end of the socket pair to one fork server.

    *receive* gets this link and each message, on a thread of its own; after the last
    one it gets ``["gone", how]``."""

    def __init__(
        self,
        program: str,
        config: Config,
        receive: Callable[[ForkServerLink, list[Any]], None],
    ) -> None:
        self.program = program
        self.receive = receive
        self.ready = threading.Event()  # the actions are loaded, or it has gone
        self.actions: dict[str, list[str]] = {}
        self.problems: list[tuple[str, str]] = []
        self.probed: float | None = None  # when an unanswered probe was sent
        self.gone: str | None = None  # how it ended
        self.replaced = False
        self.output = config.state_file("fork_server.out")
        self._send_lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        # A fork server that does not read must not block a sender, who may hold a lock.
        deadline = struct.pack("ll", SEND_DEADLINE, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, deadline)
        try:
            self._process = self._start(theirs)
        finally:
            theirs.close()
        self.pid = self._process.pid
        try:
            self._reader = start_thread(self._read, name="link")
        except OSError:
            self._process.kill()
            self._process.wait()
            raise
        self.send("configure", vars(config))

    def send(self, *message: Any) -> bool:
        """Send one message; False where the fork server has gone."""
        return self.send_line(json.dumps(message).encode() + b"\n")

    def send_line(self, line: bytes) -> bool:
        """See send."""
        with self._send_lock:
            try:
                self._socket.sendall(line)
            except BlockingIOError:  # half a message is sent: it is of no use any more
                log.error("the fork server has not read for %d s", SEND_DEADLINE)
                self.kill()
            except OSError:
                return False
            return True

    def finish(self) -> None:
        """Let it finish its workers; it gets no more units."""
        with self._send_lock, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End it at once.  Its workers go on."""
        self._process.kill()

    def wait(self, seconds: float) -> None:
        """Wait until it has gone, and end it if it does not go."""
        self._reader.join(seconds)
        if self._reader.is_alive():
            self.kill()

    def log_output(self) -> None:
        """Move what it has printed to the log."""
        with contextlib.suppress(OSError):
            log_output("fork server", read_file(self.output, OUTPUT_TAIL))
            os.truncate(self.output, 0)

    def _start(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-u", self.program]
        command += [FORK_SERVER_FLAG, str(theirs.fileno())]
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC
        output = os.open(self.output, flags, 0o600)
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the node alone
                cwd="/",
            )
        finally:
            os.close(output)

    def _read(self) -> None:
        received = b""
        while True:
            try:
                data = self._socket.recv(REQUEST_BUFFER)
            except OSError:
                data = b""
            if not data:
                break
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                try:
                    self._handle(message)
                except Exception:
                    log.exception("a message of the fork server: %s", message)
        status = self._process.wait()
        self._socket.close()
        self.log_output()
        self.gone = describe_exit(status)
        try:
            self.receive(self, ["gone", self.gone])
        finally:
            self.ready.set()

    def _handle(self, message: list[Any]) -> None:
        if message[0] == "ready":
            self.actions = message[1]
            self.problems = [(level, sentence) for level, sentence in message[2]]
            self.ready.set()
        else:
            self.receive(self, message)


class ForkServers:
    """The fork server that takes units, its successors, and those that only finish.

    receive: gets each message of each, with its link, on that link's thread; outdated:
    is called where one has to be started and the program's file has been replaced."""

    def __init__(
        self,
        program: Program,
        config: Config,
        overload: Overload,
        receive: Callable[[ForkServerLink, list[Any]], None],
        outdated: Callable[[], None],
    ) -> None:
        self.program = program
        self.config = config
        self.overload = overload
        self.receive = receive
        self.outdated = outdated
        self.link: ForkServerLink | None = None  # of the one that takes units
        self.restarts = 0
        self.stopping = False  # so that none is replaced
        self._lock = threading.Lock()
        self._all: set[ForkServerLink] = set()
        self._strays: set[int] = set()

    @property
    def actions(self) -> list[str]:
        """The names of the actions that this node does."""
        return sorted(self.link.actions) if self.link else []

    def does(self, action: str) -> bool:
        """Is it one of these?"""
        return self.link is not None and action in self.link.actions

    def start(self, config: Config) -> ForkServerLink:
        """Start one and wait until it has loaded the actions.  Raises CrowdError."""
        if self.program.path == PROGRAM and self.program.is_replaced():
            raise CrowdError(f"{PROGRAM} is not what this node runs any more")
        link = ForkServerLink(self.program.path, config, self._received)
        self._all.add(link)
        in_time = link.ready.wait(LOAD_DEADLINE)
        link.log_output()
        log_problems(link.problems)
        if link.actions:
            return link
        link.kill()
        if link.gone:
            raise CrowdError(f"the fork server died while it loaded: {link.gone}")
        if not in_time:
            raise CrowdError(f"the actions did not load within {LOAD_DEADLINE} s")
        reasons = "".join(f"\n{sentence}" for _, sentence in link.problems)
        raise CrowdError(
            f"there is no action in {config.actions_path}, and none built in "
            f"is enabled: nothing to do{reasons}"
        )

    def use(self, link: ForkServerLink) -> None:
        """From now on *link* takes the units; the one before it finishes."""
        with self._lock:
            old, self.link = self.link, link
        if old:
            old.finish()
        self.overload.end("fork server")  # whoever replaces the old one may sleep
        self._look_to(link)

    def stop(self) -> None:
        """Replace none any more; what there is ends with its last worker."""
        self.stopping = True
        if self.link:
            self.link.finish()

    def wait(self, seconds: float) -> None:
        """Wait until the fork server has gone, and end it if it does not go."""
        if self.link:
            self.link.wait(seconds)

    def probe(self) -> None:
        """While a start has failed: is it over?  One that is silent is replaced."""
        link, now = self.link, time.monotonic()
        if link is None or not self.overload.has("start"):
            return
        if link.probed is None:
            link.probed = now
            link.send("try")
        elif now - link.probed > PROBE_DEADLINE:
            log.error("the fork server has not answered for %d s", PROBE_DEADLINE)
            link.kill()  # what replaces it is probed in its turn

    def bury_strays(self) -> None:
        """Reap children that nobody waits for: those from before an upgrade, and all
        orphans where the node is a container's first process.  Seen twice, so that
        it is none that somebody has just started."""
        known = [link.pid for link in list(self._all)]
        known += [child.pid for child in list(own_children)]
        strays = set(children()).difference(known)
        for pid in strays & self._strays:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._strays = strays

    def _received(self, link: ForkServerLink, message: list[Any]) -> None:
        if message[0] == "tried":
            link.probed = None
            if message[1] is None:
                self.overload.end("start")
            else:
                self.overload.begin("start", message[1])
        elif message[0] == "gone":
            self._all.discard(link)
            is_lost = self._lose(link)
            self.receive(link, message)
            if is_lost:
                self._replace(link)
        else:
            self.receive(link, message)

    def _lose(self, link: ForkServerLink) -> bool:
        """*link* has gone: was it ours, and is it for the caller to replace it?"""
        with self._lock:
            ours = link is self.link and not link.replaced and not self.stopping
            link.replaced = link.replaced or ours
        if ours:
            log.error("the fork server has gone (%s); starting another", link.gone)
            self.overload.begin("fork server", "the fork server is starting")
        return ours

    def _look_to(self, link: ForkServerLink) -> None:
        """Replace *link* if it had gone before it was ours."""
        if link.gone and self._lose(link):
            self._replace(link)

    def _replace(self, link: ForkServerLink) -> None:
        """Start another fork server instead of *link*; workers do not notice."""
        backoff = Backoff()
        give_up = time.monotonic() + RELOAD_PATIENCE
        while not self.stopping and self.link is link:
            if self.program.is_replaced():
                self.outdated()
            self.restarts += 1
            try:
                fresh = self._start_like(link, time.monotonic() < give_up)
            except (CrowdError, OSError) as error:
                wait = backoff.failed()
                log.error("no fork server: %s; again in %.0f s", error, wait)
                time.sleep(wait)
                continue
            with self._lock:  # a reload may have been quicker
                is_wanted = self.link is link
                self.link = fresh if is_wanted else self.link
            if not is_wanted:
                fresh.finish()
        if self.link and not self.stopping:
            self.overload.end("fork server")
            self._look_to(self.link)

    def _start_like(self, link: ForkServerLink, patient: bool) -> ForkServerLink:
        """Start one.  An action that *link* had loaded is given some time to load
        again: whatever ended that one may keep the next from reading it."""
        fresh = self.start(self.config)
        lost = set(link.actions) - set(fresh.actions)
        if lost and patient:
            fresh.kill()
            raise CrowdError(f"{', '.join(sorted(lost))} did not load")
        return fresh


# ---------------------------------------------------------------------------
# The node's units: what each one's state is, and what comes next.  The directory of
# records is the truth, and this is a cache of it.
#
# A unit is "starting" (its record is being written and its worker forked), "running",
# and "ended".  Then, as soon as central knows its pid, its outcome is reported, again
# and again until central has it, and the unit is forgotten.  One that is withdrawn is
# never reported, and is forgotten when its worker has ended.
# ---------------------------------------------------------------------------

RECENT = 20  # units that ended, on the page
OUTCOMES = ("succeeded", "failed", "died", "timed_out")
COUNTS = ("accepted", "refused", *OUTCOMES, "reported")
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)  # seconds


class Unit:
    """A unit that this node has, from its arrival until central knows its outcome.

    head: what its record begins with."""

    def __init__(self, head: Json, config: Config) -> None:
        self.id = head["id"]
        self.job_id = head["job_id"]
        self.action: str = head["action"]
        self.stage: str = head["stage"]
        self.digest: str = head["digest"]  # of its content
        self.name = str(self.id)
        self.record = f"{config.units_path}/{self.name}"  # paths
        self.printed = f"{self.record}.out"
        self.directory = config.work_directory(self.action, self.name)
        self.started = time.monotonic()
        self.state = "starting"
        self.pid: int | None = None
        self.link: ForkServerLink | None = None  # None: its fork server has gone
        self.answered = threading.Event()  # the fork server has, or has gone
        self.refusal: str | None = None
        self.replies_due = 0  # requests that wait to be told the pid
        self.replied = False  # central has been told the pid
        self.replied_at = self.started  # when, monotonic
        self.withdrawn = False  # or reported: not to be reported (again)
        self.marked = False  # its record says so
        self.took = 0.0  # seconds, of a worker that has ended
        self.wait_status: int | None = None  # None where nobody could wait for it
        self.timed_out = False
        self.queued = False  # the reporters have it
        self.told = False  # its outcome is in the counts and the log
        self.refusals = 0  # reports answered with 500 while central took others
        self.taken_before = 0  # reports of other units, at the last of these
        self.backoff = Backoff()  # between its reports

    def __str__(self) -> str:
        return f"unit {self.id} ({self.action[:200]}, {self.stage})"

    def seconds(self) -> float:
        """How long it has been here."""
        return time.monotonic() - self.started

    def status(self) -> Json:
        """What GET /status says of it while it runs."""
        keys = ("id", "job_id", "action", "stage", "pid")
        fields = {key: getattr(self, key) for key in keys}
        fields["action"] = self.action[:200]  # it may be of any length
        return {**fields, "seconds": round(self.seconds(), 3)}


class Histogram:
    """How long units took: how many up to each of BUCKETS, and the seconds in all."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count a unit that took *seconds*."""
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class Tally:
    """What has come of this node's units so far."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self.durations: dict[tuple[str, str], Histogram] = {}  # by action and stage
        self.recent: deque[Json] = deque(maxlen=RECENT)  # what ended last
        self._lock = threading.Lock()

    def count(self, kind: str) -> None:
        """Count one more of *kind*."""
        with self._lock:
            self.counts[kind] += 1

    def ended(self) -> int:
        """How many units have ended."""
        return sum(self.counts[kind] for kind in OUTCOMES)

    def note(self, unit: Unit, outcome: Outcome, action: str) -> None:
        """Count an outcome, under the name of its *action*, and remember it."""
        with self._lock:
            self.counts[outcome.kind] += 1
            key = action, unit.stage
            self.durations.setdefault(key, Histogram()).add(float(outcome.seconds))
            self.recent.appendleft(
                {
                    **unit.status(),
                    "seconds": float(outcome.seconds),
                    "how": outcome.kind,
                    "reason": outcome.reason().partition("\n")[0][:MESSAGE_TAIL],
                    "at": time.time(),
                }
            )


RUBBISH = ".rubbish"  # how the name of a directory ends that is being removed
unswept: set[str] = set()  # such directories that the monitor is to try (again)


def put_away(directory: str) -> None:
    """Remove a work directory.  What a killed worker has left in it may take long to
    remove, so that is renamed, and removed by a thread of its own.  Raises OSError."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError:
        rubbish = f"{directory}.{time.monotonic_ns()}{RUBBISH}"
        try:
            os.rename(directory, rubbish)
        except FileNotFoundError:
            return
        try:
            start_thread(sweep, rubbish)
        except OSError:
            unswept.add(rubbish)


def sweep(rubbish: str) -> None:
    """Remove a directory that nobody needs."""
    try:
        remove_tree(rubbish)
        unswept.discard(rubbish)
    except OSError as error:
        if rubbish not in unswept:
            log.warning("can't remove %s: %s; trying again", rubbish, error)
            unswept.add(rubbish)


def sweep_all(temp_storage_path: str) -> None:
    """Remove what an earlier node had put away and did not get round to."""
    with os.scandir(temp_storage_path) as entries:
        found = [
            entry.path
            for entry in entries
            if ACTION_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    for path in found:
        for name in os.listdir(path):
            if name.endswith(RUBBISH):
                sweep(os.path.join(path, name))


class Reported:
    """A quick unit whose outcome central has taken, and may have lost since."""

    __slots__ = ("name", "pid", "taken_at", "unlisted")

    def __init__(self, name: str, pid: int | None) -> None:
        self.name = name
        self.pid = pid
        self.taken_at = time.monotonic()
        self.unlisted = 0  # looks in a row at which central did not list its pid


class Units:
    """The units that this node has, by name, and what becomes of each.

    report: has one reported.  While somebody holds ``changed``, no unit changes its
    state; it is notified when one has."""

    def __init__(
        self,
        config: Config,
        overload: Overload,
        tally: Tally,
        report: Callable[[Unit], None],
    ) -> None:
        self.config = config
        self.overload = overload
        self.tally = tally
        self.report = report
        self.by_name: dict[str, Unit] = {}
        self.reported: dict[str, Reported] = {}  # see "Late commits"
        self.active: dict[Unit, None] = {}  # those that have not ended, in order
        self.changed = threading.Condition(threading.RLock())

    def running(self) -> list[Unit]:
        """The units whose workers live, the oldest first."""
        with self.changed:
            return [unit for unit in self.active if unit.state == "running"]

    def waiting(self) -> list[Unit]:
        """The units that have ended and wait for central to take their outcome."""
        with self.changed:
            units = list(self.by_name.values())
        return [unit for unit in units if unit.state == "ended" and not unit.withdrawn]

    def add(self, unit: Unit) -> None:
        """Have *unit* here."""
        self.by_name[unit.name] = unit
        self.active[unit] = None

    def forget(self, unit: Unit) -> None:
        """Have it no more."""
        self.by_name.pop(unit.name, None)
        self._make_room(unit)

    def _make_room(self, unit: Unit) -> None:
        self.active.pop(unit, None)
        self.changed.notify_all()
        self.look_for_room()

    def look_for_room(self) -> None:
        """End the refusal for max_workers, if there is room."""
        limit = self.config.max_workers
        if not limit or len(self.active) < limit:
            self.overload.end("max_workers")

    # What the fork server says.

    def receive(self, link: ForkServerLink, message: list[Any]) -> None:
        """One message of a fork server, on its link's thread."""
        kind, *rest = message
        if kind == "gone":
            self._orphan(link)
            return
        with self.changed:
            unit = self.by_name.get(str(rest[0]))
            if unit and unit.link is not link:
                unit = None
            if kind == "started":
                self._started(link, unit, rest[1])
            elif unit and kind == "ended":
                unit.wait_status, unit.timed_out = rest[1], rest[2]
                self.end(unit)
            elif unit and kind == "exists":
                self.refuse(unit, "exists")
            elif unit and kind == "refused":
                self.refuse(unit, rest[1])
                self.overload.begin("start", rest[1])

    def _started(self, link: ForkServerLink, unit: Unit | None, pid: int) -> None:
        if unit is None:
            link.send("kill", pid, signal.SIGKILL)
            return
        unit.pid, unit.state = pid, "running"
        if unit.withdrawn:
            self.withdraw(unit)
            return
        self.tally.count("accepted")
        unit.answered.set()

    def refuse(self, unit: Unit, reason: str) -> None:
        """No worker could be forked; "exists": there is a record of that name."""
        with self.changed:
            self.forget(unit)
            unit.refusal = unit.refusal or reason
            unit.answered.set()

    def _orphan(self, link: ForkServerLink) -> None:
        """The fork server has gone.  Its workers go on; what was starting is refused,
        and should its worker have been forked all the same, that is ended."""
        with self.changed:
            for unit in self.by_name.values():
                if unit.link is not link:
                    continue
                unit.link = None
                if unit.state == "starting":
                    self.give_up(unit, "the fork server has gone")

    # What becomes of a unit.

    def replied(self, unit: Unit, written: bool) -> None:
        """The reply with the pid has been written, or could not be.

        If not, central believes that it was never taken: so it is not."""
        with self.changed:
            unit.replies_due -= 1
            self.changed.notify_all()
            if written:
                unit.replied, unit.replied_at = True, time.monotonic()
            if unit.replied:
                self._queue(unit)
            elif not unit.replies_due:
                log.warning("%s: the reply could not be written; withdrawn", unit)
                self.withdraw(unit)

    def end(self, unit: Unit) -> None:
        """The worker has ended: report the outcome once central knows the pid."""
        with self.changed:
            unit.state, unit.took = "ended", unit.seconds()
            self._make_room(unit)
            if unit.withdrawn:
                self.remove(unit)
            elif unit.replied:
                self._queue(unit)

    def _queue(self, unit: Unit) -> None:
        if unit.state == "ended" and not unit.withdrawn and not unit.queued:
            unit.queued = True
            self.report(unit)

    def withdraw(self, unit: Unit) -> None:
        """End *unit* without a report: central has let go of it."""
        with self.changed:
            log.info("%s, worker %s: withdrawn", unit, unit.pid)
            if unit.pid is None:
                self.give_up(unit, "central has let go of it")
                return
            self.mark_withdrawn(unit)
            if unit.state == "ended":
                self.remove(unit)
            else:
                self.signal(unit, signal.SIGKILL)

    def give_up(self, unit: Unit, reason: str) -> None:
        """Refuse a unit that is starting; its worker, should there be one after all, is
        ended as soon as it is known."""
        unit.withdrawn = True
        with contextlib.suppress(OSError, OddRecord):
            head = parse_record(read_file(unit.record)).head
            if head and head["digest"] == unit.digest:  # it is not another's
                self.mark_withdrawn(unit)
        unit.refusal = unit.refusal or reason
        unit.answered.set()

    def keep_reported(self, unit: Unit) -> None:
        """Forget *unit*, but keep its record: its report may have to be sent again."""
        if self.by_name.get(unit.name) is not unit:
            return
        try:
            if ACTION_NAME.fullmatch(unit.action):
                put_away(unit.directory)
            remove_file(unit.printed)
            append_to_record(unit.record, REPORTED)
        except OSError as error:
            log.warning("%s: can't mark its record: %s", unit, error)
            self.remove(unit)
        else:
            self.reported[unit.name] = Reported(unit.name, unit.pid)
            self.forget(unit)

    def drop_reported(self, name: str) -> None:
        """Remove the record of a unit whose report need not be sent again."""
        with self.changed:
            if self.reported.pop(name, None):
                with contextlib.suppress(OSError):
                    remove_file(f"{self.config.units_path}/{name}")

    def mark_withdrawn(self, unit: Unit) -> None:
        """Never report it; nor is the next node to."""
        unit.withdrawn = True
        try:
            unit.marked = unit.marked or append_to_record(unit.record, WITHDRAWN)
        except OSError as error:
            log.warning("%s: can't mark its record: %s", unit, error)

    def signal(self, unit: Unit, number: int) -> None:
        """Signal the worker of *unit* and its group, if it lives."""
        if unit.link and unit.link.send("kill", unit.pid, number):
            return  # it knows best whether the worker lives
        if unit.pid is not None:
            with contextlib.suppress(OSError):
                if is_locked(unit.record):
                    kill_worker(unit.pid, number)

    def remove(self, unit: Unit) -> None:
        """Forget *unit*: its work directory, what it printed, its record."""
        if self.by_name.get(unit.name) is not unit:
            return  # superseded, and the files of that name are another's
        try:
            if ACTION_NAME.fullmatch(unit.action):
                put_away(unit.directory)
            remove_file(unit.printed)
            remove_file(unit.record)
        except OSError as error:
            log.warning("%s: can't remove its files: %s; trying again", unit, error)
            self.mark_withdrawn(unit)  # for the next node
        else:
            self.forget(unit)


# ---------------------------------------------------------------------------
# Work on units: takes them in, looks after those that nobody else watches, and reports
# those that have ended.
# ---------------------------------------------------------------------------

START_DEADLINE = 5  # seconds for the fork server to answer for a unit
REPLY_DEADLINE = 5  # seconds for a reply to be written before its unit is reported
REPORTERS = 4  # threads: central gets this many reports at once, at most
SUCCESS_HOLD, FAILURE_HOLD = 0.1, 0.5  # seconds after the reply; a second failed costs
HOLD_LIMIT = 2  # seconds
HOLD_MEMORY = 600  # seconds without a find until reports are held less long again
QUICK = 10  # seconds from the reply to the report of a unit that is watched
STATUS_INTERVAL = 5  # seconds between looks at central's /status
STUCK_AFTER = 2  # seconds after its report that a pid still listed is stuck
REFUSALS = 3  # answers of 500, while others are taken, until a report is given up
UNWATCHED = "the worker died while nobody watched it"


def parse_unit(text: str) -> Json:
    """A unit as it came in the field work_unit.  Raises BadRequest."""
    try:
        unit = strict_json(text)
    except ValueError as error:
        raise BadRequest(f"work_unit is not JSON: {error}") from None
    if not isinstance(unit, dict):
        raise BadRequest("work_unit is not a JSON object")
    for key, default in (("job_id", 0), ("attempts", 0), ("options", {})):
        if unit.get(key) is None:
            unit[key] = default
    for key in ("id", "job_id"):
        value = unit.get(key)
        plain = isinstance(value, (int, str)) and not isinstance(value, bool)
        if not plain or not UNIT_ID.fullmatch(str(value)):
            raise BadRequest(
                f"the unit's {key} is no whole number and not 1 to 64 of A-Za-z0-9_-"
            )
    if isinstance(unit.get("status"), bool) or unit.get("status") not in list(STAGES):
        raise BadRequest("the unit's status is unknown: 1 process, 4 split, 5 merge")
    for key, kind, name in (
        ("input", str, "a string"),
        ("action", str, "a string"),
        ("options", dict, "an object"),
        ("attempts", int, "a number"),
    ):
        if not isinstance(unit.get(key), kind):
            raise BadRequest(f"the unit's {key} is not {name}")
    return unit


class Watch:
    """Looks after what no fork server of ours watches: records that memory does not
    know, and workers of earlier nodes and fork servers."""

    def __init__(self, config: Config, units: Units) -> None:
        self.config = config
        self.units = units
        self._foreign: set[str] = set()  # records of other versions, which were said

    def look(self) -> None:
        """Look at every record, and at every unit that needs it."""
        units = self.units
        for name in os.listdir(self.config.units_path):
            known = name in units.by_name or name in units.reported
            if not known and UNIT_ID.fullmatch(name):
                self.adopt(name)
        for unit in units.running():
            cut_back(unit.printed)
        with units.changed:
            for unit in list(units.by_name.values()):
                if unit.state == "ended" and unit.withdrawn:
                    units.remove(unit)  # which has failed before
                elif unit.state != "ended" and unit.link is None:
                    self._look_after(unit)
                elif unit.state == "running" and unit.withdrawn:
                    units.signal(unit, signal.SIGKILL)  # should the first be lost

    def tidy(self) -> None:
        """At a start: remove what was printed by units of which there is no record."""
        names = set(os.listdir(self.config.units_path))
        for name in names:
            if name.endswith(".out") and name[: -len(".out")] not in names:
                with contextlib.suppress(OSError):
                    remove_file(f"{self.config.units_path}/{name}")

    def adopt(self, name: str, wanted: bool = False) -> None:
        """Take over the record *name*, which an earlier node or fork server left.

        *wanted*: a unit of that name has come, and has to wait for it."""
        path = f"{self.config.units_path}/{name}"
        with self.units.changed:
            if name in self.units.by_name or name in self.units.reported:
                return
            try:
                locked = is_locked(path)
                record = parse_record(read_file(path))
                if record.head and str(record.head["id"]) != name:
                    raise OddRecord("it is another unit's")
                if record.head is None and not locked:
                    remove_file(path)  # nobody was ever told that it was accepted
            except FileNotFoundError:
                return
            except OtherVersion as error:
                if wanted and not locked:
                    self._move_aside(path, error)
                elif name not in self._foreign:
                    self._foreign.add(name)
                    log.warning("the record %s is left alone: %s", path, error)
                return
            except (IsADirectoryError, PermissionError, OddRecord) as error:
                self._move_aside(path, error)
                return
            except OSError as error:
                log.warning("%s: can't be read: %s; trying again", path, error)
                return
            if record.reported and not record.withdrawn:
                self.units.reported[name] = Reported(name, record.pid)
            elif record.head:
                self._take_over(record, record.head, locked)

    def _take_over(self, record: Record, head: Json, locked: bool) -> None:
        unit = Unit(head, self.config)
        unit.pid, unit.state = record.pid, "running"
        unit.started -= max(0.0, time.time() - head["started"])
        # As far as anybody can know; by now, so its report is held as any other.
        unit.replied, unit.replied_at = True, time.monotonic()
        # Without a pid nobody was told that it was accepted.
        unit.withdrawn = record.withdrawn or record.pid is None
        unit.answered.set()
        self.units.add(unit)
        how = "still running" if locked else "over"
        log.info("%s of an earlier process is %s", unit, how)
        self._judge(unit, locked, record)

    def _move_aside(self, path: str, error: Exception) -> None:
        log.error("the record %s can't be used: %s; moved to %s.odd", path, error, path)
        with contextlib.suppress(OSError):
            os.replace(path, path + ".odd")

    def _look_after(self, unit: Unit) -> None:
        record = Record()
        record.pid = unit.pid
        try:
            locked = is_locked(unit.record)
            with contextlib.suppress(OddRecord):  # it has been spoilt since
                record = parse_record(read_file(unit.record))
        except FileNotFoundError:
            self.units.forget(unit)
        except OSError as error:
            log.warning("%s: its record can't be read: %s", unit, error)
        else:
            self._judge(unit, locked, record)

    def _judge(self, unit: Unit, locked: bool, record: Record) -> None:
        """Settle an orphan that has ended; keep its time while it has not."""
        unit.pid = record.pid
        # A child that a worker has forked may hold the lock of a dead one.
        if not locked or record.outcome or not exists(record.pid):
            self._end_group(unit)
            self.units.end(unit)
            return
        limit = self.config.limit(unit.action, "time_limit")
        if limit and unit.seconds() > limit:
            unit.timed_out = True
        if (unit.withdrawn or unit.timed_out) and unit.pid is not None:
            kill_worker(unit.pid, signal.SIGKILL)

    def _end_group(self, unit: Unit) -> None:
        """End what a dead worker has left running.

        Its group outlives it under its pid; but after a restart of the machine, or
        where a process with that pid lives, the number is somebody else's."""
        booted = time.time() - time.monotonic()
        pid = unit.pid
        with contextlib.suppress(OSError):
            if pid and os.stat(unit.record).st_mtime > booted and not exists(pid):
                kill_group(pid, signal.SIGKILL)

    def end_all(self, released: bool) -> None:
        """End every worker: TERM, and soon KILL.  Where central has not *released*
        their units, they are reported as failed, by this node or the next."""
        units = self.units
        with units.changed:
            for unit in list(units.by_name.values()) if released else ():
                units.mark_withdrawn(unit)
                if unit.state == "ended":
                    units.remove(unit)
        for number, patience in ((signal.SIGTERM, KILL_GRACE), (signal.SIGKILL, 2)):
            for unit in units.running():
                how = signal_name(number)
                log.info("%s, worker %s: ended by %s", unit, unit.pid, how)
                units.signal(unit, number)
            deadline = time.monotonic() + patience
            while units.running() and time.monotonic() < deadline:
                with units.changed:
                    units.changed.wait(0.05)
                    for unit in units.running():
                        if unit.link is None:
                            self._look_after(unit)


class Intake:
    """Takes units in, for the routes."""

    def __init__(self, units: Units, servers: ForkServers, watch: Watch) -> None:
        self.config = units.config
        self.overload = units.overload
        self.units = units
        self.servers = servers
        self.watch = watch

    def take(self, request: Json) -> Unit:
        """Have a unit done, as central wrote it.  Returns it with its pid; the caller
        owes Units.replied().  Raises NodeOverloaded."""
        line = json.dumps(request, sort_keys=True)
        digest = hashlib.blake2b(line.encode(), digest_size=16).hexdigest()
        head = record_head(request, digest)
        name = str(request["id"])
        deadline = time.monotonic() + START_DEADLINE
        while True:
            unit, is_new = self._enter(name, head, deadline)
            if is_new:
                self._send(unit, json.dumps(first_line(head)), line)
            patience = deadline - time.monotonic()
            if not unit.answered.wait(max(patience, START_DEADLINE / 5)):
                self._give_up(unit)
            if unit.refusal is None:
                if is_new:
                    log.info("%s started as worker %d", unit, unit.pid)
                return unit
            if unit.refusal != "exists":
                raise NodeOverloaded(unit.refusal)
            if time.monotonic() > deadline:
                raise NodeOverloaded(f"the record of unit {name} can't be settled")
            # Memory did not know it: answer from the record.
            self.watch.adopt(name, wanted=True)
            if name not in self.units.by_name:
                time.sleep(0.05)  # whoever writes it is about to end

    def _enter(self, name: str, head: Json, deadline: float) -> tuple[Unit, bool]:
        """The unit of this *name*, known or new.  An older one with other content is
        superseded: central sends other content only once it has let go of that one."""
        units = self.units
        with units.changed:
            units.drop_reported(name)  # central has given it out again
            while name in units.by_name:
                known = units.by_name[name]
                if known.digest == head["digest"] and not known.withdrawn:
                    known.replies_due += 1
                    return known, False
                if not known.withdrawn:
                    units.withdraw(known)
                patience = max(0.0, deadline - time.monotonic())
                if name in units.by_name and not units.changed.wait(patience):
                    raise NodeOverloaded(f"{known} is still being ended")
            self._require_room()
            unit = Unit(head, self.config)
            unit.link = self.servers.link
            unit.replies_due = 1
            units.add(unit)
            return unit, True

    def _require_room(self) -> None:
        limit, running = self.config.max_workers, len(self.units.active)
        if limit and running >= limit:
            reason = f"{running} units are running, max_workers is {limit}"
            self.overload.begin("max_workers", reason)
        if self.overload:
            raise NodeOverloaded(self.overload.reason)

    def _send(self, unit: Unit, head: str, line: str) -> None:
        link = unit.link
        if link and not link.send_line(f'["unit", {head}, {line}]\n'.encode()):
            gone = ["refused", unit.name, "the fork server has gone"]
            self.units.receive(link, gone)

    def _give_up(self, unit: Unit) -> None:
        """The fork server has not answered in time: refuse the unit, and let the
        monitor find out what is the matter."""
        with self.units.changed:
            if unit.answered.is_set():
                return
            reason = f"the fork server has not answered for {START_DEADLINE} s"
            self.units.give_up(unit, reason)
        self.overload.begin("start", reason)


class Reporter:
    """Has outcomes delivered to central by a few threads, for as long as it takes."""

    def __init__(self) -> None:
        self.central_is_away = False
        self._changed = threading.Condition()
        self._ready: deque[Unit] = deque()
        # A heap: (when, tie, unit, central could not be reached).
        self._later: list[tuple[float, int, Unit, bool]] = []
        self._count = 0
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def start(self, deliver: Callable[[Unit], bool]) -> None:
        """Begin.  *deliver* raises CentralError where central has not taken it; it says
        whether central was asked at all."""
        self._stopped = False
        self._threads = [
            start_thread(self._run, deliver, name=f"reporter {number}")
            for number in range(1, REPORTERS + 1)
        ]

    def put(self, unit: Unit) -> None:
        """Have *unit* reported."""
        with self._changed:
            self._ready.append(unit)
            self._changed.notify()

    def stop(self, seconds: float) -> None:
        """Begin no report any more; wait for those under way, for a while."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, deliver: Callable[[Unit], bool]) -> None:
        for unit in iter(self._next, None):
            try:
                if deliver(unit) and self.central_is_away:
                    self._central_is_back()
            except CentralError as error:
                # It may have been taken, and a second report is not free.
                wait = unit.backoff.failed(0 if error.unreached else RETRY_WAIT_LIMIT)
                log.warning(
                    "%s: central has not confirmed the report: %s; again in %.0f s",
                    unit, error, wait,
                )  # fmt: skip
                self._put_off(unit, wait, error.unreached)
            except OSError as error:
                wait = unit.backoff.failed()
                log.warning("%s: its record can't be read or written: %s; again in "
                            "%.0f s", unit, error, wait)  # fmt: skip
                self._put_off(unit, wait)
            except Exception:
                log.exception("%s: can't be reported; again in a minute", unit)
                self._put_off(unit, RETRY_WAIT_LIMIT)

    def _next(self) -> Unit | None:
        """The next to report, when it is due; None: no more."""
        with self._changed:
            while not self._stopped:
                patience = None
                if self._later:
                    patience = self._later[0][0] - time.monotonic()
                if patience is not None and patience <= 0:
                    return heapq.heappop(self._later)[2]
                if self._ready:
                    return self._ready.popleft()
                self._changed.wait(patience)
            return None

    def _put_off(self, unit: Unit, seconds: float, unreached: bool = False) -> None:
        with self._changed:
            self.central_is_away = self.central_is_away or unreached
            self._count += 1
            due = time.monotonic() + seconds
            heapq.heappush(self._later, (due, self._count, unit, unreached))
            self._changed.notify()

    def _central_is_back(self) -> None:
        """For one, so for all that found nobody there."""
        with self._changed:
            self.central_is_away = False
            later = [item for item in self._later if not item[3]]
            self._ready.extend(item[2] for item in sorted(self._later) if item[3])
            heapq.heapify(later)
            self._later = later
            self._changed.notify_all()


class ReportHold:
    """Holds the reports of quick units until central has surely recorded their pids.

    CloudCrowd 0.7 records a pid after it has read the reply, in its dispatcher's
    thread, and overwrites what a report has done meanwhile.  As that thread goes on to
    the next unit only then, the next POST /work is a proof; otherwise time has to do.
    What was taken for all that too early LateCommits finds.  Source: protocol.md, "it
    records the pid"."""

    def __init__(self, central: Central, report: Callable[[Unit], None]) -> None:
        self.central = central
        self.report = report
        self.write_down: Callable[[Unit], None] = lambda unit: None
        self.factor = 1.0  # of the times, doubled when they were too short
        self._found_at = 0.0
        self._changed = threading.Condition()
        self._successes: list[tuple[float, int, Unit]] = []  # heaps: (when, tie, unit)
        self._failures: list[tuple[float, int, Unit]] = []
        self._count = 0
        self._wakes_at = 0.0  # when the thread looks next

    def is_needed(self) -> bool:
        """Return whether central may commit late: an old one does not."""
        return self.central.dialect != "seed"

    def is_watched(self, unit: Unit) -> bool:
        """Return whether the report of *unit* came so soon that it may be lost."""
        quick = time.monotonic() - unit.replied_at < QUICK
        return quick and self.is_needed()

    def put(self, unit: Unit) -> None:
        """Have *unit* reported when its time has come."""
        is_success = unit.wait_status == 0
        least = SUCCESS_HOLD if is_success else FAILURE_HOLD
        due = unit.replied_at + min(least * self.factor, max(least, HOLD_LIMIT))
        if due <= time.monotonic() or not self.is_needed():
            self.report(unit)
            return
        if not is_success:
            self.write_down(unit)
        with self._changed:
            self._count += 1
            heap = self._successes if is_success else self._failures
            heapq.heappush(heap, (due, self._count, unit))
            if due < self._wakes_at:
                self._changed.notify()

    def dispatched(self) -> None:
        """Report the successes that are held: central has sent another unit."""
        with self._changed:
            ready, self._successes = self._successes, []
        for _, _, unit in ready:
            self.report(unit)

    def run(self) -> None:
        """Report what has been held long enough, for ever (a thread)."""
        while True:
            with self._changed:
                now = time.monotonic()
                ready = []
                for heap in (self._successes, self._failures):
                    while heap and heap[0][0] <= now:
                        ready.append(heapq.heappop(heap)[2])
                if not ready:
                    heaps = (self._successes, self._failures)
                    times = [heap[0][0] for heap in heaps if heap]
                    self._wakes_at = min(times, default=float("inf"))
                    self._changed.wait(min(times) - now if times else None)
                    self._wakes_at = 0.0
            for unit in ready:
                self.report(unit)

    def found(self) -> None:
        """Hold reports longer: one came too early."""
        self._found_at = time.monotonic()
        self.factor = min(2 * self.factor, HOLD_LIMIT / SUCCESS_HOLD)

    def relax(self, now: float) -> None:
        """Hold reports less long, when none has come too early for HOLD_MEMORY."""
        if self.factor > 1 and now - self._found_at > HOLD_MEMORY:
            self._found_at = now
            self.factor = max(1.0, self.factor / 2)


class Delivery:
    """Tells central what came of units that have ended."""

    def __init__(
        self,
        units: Units,
        servers: ForkServers,
        central: Central,
        tally: Tally,
        hold: ReportHold,
    ) -> None:
        self.config = units.config
        self.units = units
        self.servers = servers
        self.central = central
        self.tally = tally
        self.hold = hold

    def deliver(self, unit: Unit) -> bool:
        """Report *unit* and forget it; False where there was no need to ask central.
        Raises CentralError, or OSError where its outcome can't be read or written down
        now: to be tried again."""
        if unit.withdrawn:
            return False
        written = self._written_outcome(unit)
        with self.units.changed:
            # Replies under way still name the pid, and may fail.
            self.units.changed.wait_for(lambda: not unit.replies_due, REPLY_DEADLINE)
            # As long as the lock is held no other unit gets this one's name and record.
            if unit.withdrawn:
                return False
            outcome = written or self._death(unit)
        if not unit.told:
            self._tell(unit, outcome)
            unit.told = True
        try:
            known = self.central.report(unit.name, unit.pid, outcome)
        except CentralError as error:
            if error.status != 500 or not self._is_too_much(unit):
                raise
            self._give_up(unit, outcome)
            return self.deliver(unit)
        if known:
            self.tally.count("reported")
        else:
            log.warning("%s: central does not know it (any more); discarded", unit)
        with self.units.changed:
            unit.withdrawn = True  # even if its record can't be removed now
            if known and self.hold.is_watched(unit):
                self.units.keep_reported(unit)
            else:
                self.units.remove(unit)
        return True

    def _is_too_much(self, unit: Unit) -> bool:
        """Return whether central has answered 500 to *unit* REFUSALS times, and has
        taken reports of others meanwhile."""
        taken = self.tally.counts["reported"]
        if unit.refusals == 0 or taken != unit.taken_before:
            unit.refusals, unit.taken_before = unit.refusals + 1, taken
        return unit.refusals == REFUSALS

    def _give_up(self, unit: Unit, outcome: Outcome) -> None:
        """Have *unit* fail, because central can't take its outcome.

        Source: protocol.md: Rack refuses a form of more than 4 MB with a 500."""
        size = len(form_quoted(outcome.output))
        reason = (
            f"central refuses the report, whose form has {size} bytes, with 500. Rack "
            "takes 4194304: return less, or set RACK_QUERY_PARSER_BYTESIZE_LIMIT in "
            "central's environment"
        )
        unit.refusals += 1
        log.error("%s: %s", unit, reason)
        line = outcome_line("failed", outcome.seconds, encoded_failure(reason))
        append_to_record(unit.record, line)

    def write_down(self, unit: Unit) -> None:
        """Write down what ended a worker, while that is known."""
        with contextlib.suppress(OSError):  # then when it is reported
            if self._written_outcome(unit) is None:
                self._death(unit)

    def _written_outcome(self, unit: Unit) -> Outcome | None:
        try:
            return parse_record(read_file(unit.record)).outcome
        except (FileNotFoundError, OddRecord) as error:
            log.warning("%s: its record can't be read: %s", unit, error)
            return None

    def _death(self, unit: Unit) -> Outcome:
        """What can be said of a worker that has left no outcome.

        Written down before it is told: should it have to be told again, by another
        node perhaps, it is told in the same words.  If that can't be done, it is put
        off, but not for ever."""
        kind = "timed_out" if unit.timed_out else "died"
        seconds, words = f"{unit.took:.6f}", self._last_words(unit)
        output = encoded_failure(self._cause(unit) + words)
        try:
            write_outcome(unit.record, outcome_line("failed", seconds, output))
        except OSError as error:
            if unit.backoff.wait < RETRY_WAIT_LIMIT:
                raise
            log.warning("%s: can't write down its end: %s", unit, error)
            # The next node will know no more than this, and is to say the same.
            unit.wait_status, unit.timed_out = None, False
            output = encoded_failure(UNWATCHED + words)
        return Outcome("failed", seconds, output, kind)

    def _cause(self, unit: Unit) -> str:
        """What ended a worker that has left no outcome."""
        limit = self.config.limit(unit.action, "time_limit")
        if unit.timed_out and limit:
            return f"time_limit of {limit:g} s exceeded"
        if unit.timed_out:
            return "time_limit exceeded"
        if unit.wait_status is None:
            return UNWATCHED
        return f"the worker died: {describe_end(unit.wait_status)}"

    def _last_words(self, unit: Unit) -> str:
        with contextlib.suppress(OSError):
            printed = read_file(unit.printed, MESSAGE_TAIL)
            words = printed.decode("utf-8", "replace").strip()
            return f"; its last words: {words}" if words else ""
        return ""

    def _tell(self, unit: Unit, outcome: Outcome) -> None:
        """The counts and the log of it, and what the worker has printed."""
        # Not by any name that comes: each makes a series that Prometheus keeps.
        action = unit.action if self.servers.does(unit.action) else "unknown"
        self.tally.note(unit, outcome, action)
        with contextlib.suppress(OSError):
            if os.stat(unit.printed).st_size:
                printed = read_file(unit.printed, OUTPUT_TAIL)
                log_output(f"worker[{unit.pid}]", printed)
        reason = outcome.reason()
        why = f": {reason}"[:MESSAGE_TAIL] if reason else ""
        verb = outcome.kind.replace("_", " ")
        seconds = float(outcome.seconds)
        log.info("%s, worker %s, %s after %.3f s%s", unit, unit.pid, verb, seconds, why)


class LateCommits:
    """Finds reports that central has taken and lost again, and sends them once more."""

    def __init__(self, units: Units, central: Central, hold: ReportHold) -> None:
        self.units = units
        self.central = central
        self.hold = hold
        self._looked_at = 0.0  # monotonic
        self._thread: threading.Thread | None = None

    def look_soon(self) -> None:
        """Look, on a thread of its own, if there is something to look for."""
        now = time.monotonic()
        self.hold.relax(now)
        if not self.units.reported or now - self._looked_at < STATUS_INTERVAL:
            return
        if self._thread is None or not self._thread.is_alive():
            self._looked_at = now
            self._thread = start_thread(self._look, name="late commits")

    def _look(self) -> None:
        try:
            self.look()
        except CentralError as error:
            log.warning("central's /status: %s; trying again", error)
        except Exception:
            log.exception("the look at central's /status failed; trying again")

    def look(self) -> None:
        """Compare what central believes to be running with what it was told.

        Raises CentralError."""
        units = self.units
        if not self.hold.is_needed():
            for name in list(units.reported):
                units.drop_reported(name)
            return
        with units.changed:
            entries = list(units.reported.values())
        listed = self.central.running_pids()
        with units.changed:
            running = {unit.pid for unit in units.by_name.values()}
        for entry in entries:
            if entry.pid not in listed or entry.pid in running:
                entry.unlisted += 1
                if entry.unlisted == 2:
                    units.drop_reported(entry.name)
                continue
            entry.unlisted = 0
            if time.monotonic() - entry.taken_at > STUCK_AFTER:
                self._report_again(entry)

    def _report_again(self, entry: Reported) -> None:
        with self.units.changed:
            if self.units.reported.get(entry.name) is not entry:
                return
            path = f"{self.units.config.units_path}/{entry.name}"
        try:
            outcome = parse_record(read_file(path)).outcome
            if outcome is None:
                raise OddRecord("there is no outcome in it")
            self.central.report(entry.name, entry.pid, outcome)
        except (CentralError, OSError, OddRecord) as error:
            log.warning("unit %s: can't be reported again: %s", entry.name, error)
            return
        entry.taken_at = time.monotonic()
        self.hold.found()
        log.warning(
            "unit %s: central still listed its process %s after it had taken the "
            "report; reported again",
            entry.name, entry.pid,
        )  # fmt: skip


# ---------------------------------------------------------------------------
# What the node shows: metrics and the page, drawn from the status document.  Knows
# nothing of threads or HTTP.
# ---------------------------------------------------------------------------

MINUTE = 60  # seconds


class History:
    """The last hour, a minute each: load average, MB of free memory, units ended."""

    def __init__(self) -> None:
        self.minutes: deque[tuple[float | None, float | None, float]]
        self.minutes = deque(maxlen=60)
        self._began, self._ended = time.monotonic(), 0

    def note(self, load: float | None, memory: float | None, ended: int) -> None:
        """One tick of the monitor; *ended*: units that have ended so far."""
        minutes = (time.monotonic() - self._began) / MINUTE
        if minutes >= 1:
            self.minutes.append((load, memory, (ended - self._ended) / minutes))
            self._began, self._ended = time.monotonic(), ended


def single_values(status: Json) -> list[tuple[str, str, str, float | None]]:
    """Name, kind, help and value of the metrics that are one number each."""
    central, counts, megabyte = status["central"], status["counts"], MEGABYTE
    free = status["free_memory"]
    return [
        ("uptime_seconds", "gauge", "Since the node's start.", status["uptime"]),
        ("overloaded", "gauge", "1 where work is refused.", int(status["overloaded"])),
        ("load_average", "gauge", "Of one minute.", status["load_average"]),
        ("free_memory_bytes", "gauge", "Memory that nothing uses.",
         free and free * megabyte),
        ("max_workers", "gauge", "Units at once; 0: no limit.", status["max_workers"]),
        ("units_running", "gauge", "Units that run.", len(status["running"])),
        ("units_unreported", "gauge", "Units whose outcome central has not taken.",
         status["unreported"]),
        ("central_failing", "gauge", "1 where the last call to central failed.",
         int(central["error"] is not None)),
        ("check_in_age_seconds", "gauge", "Since the last check-in.",
         central["checked_in_ago"]),
        ("fork_server_restarts_total", "counter", "Fork servers that were replaced.",
         status["fork_server"]["restarts"]),
        ("units_accepted_total", "counter", "Units taken.", counts["accepted"]),
        ("units_refused_total", "counter", "Units refused.", counts["refused"]),
        ("units_reported_total", "counter", "Outcomes that central has taken.",
         counts["reported"]),
    ]  # fmt: skip


def metrics_text(status: Json, durations: dict[tuple[str, str], Histogram]) -> str:
    """The status document as Prometheus has it, text format 0.0.4.

    Source of the form and of the names' endings: prometheus.io/docs/instrumenting."""
    lines = metric("info", "gauge", "The node, in its labels.")
    lines.append(sample("info", 1, version=status["version"], host=status["host"]))
    for name, kind, text, value in single_values(status):
        if value is not None:  # unknown: no sample says so best
            lines += [*metric(name, kind, text), sample(name, value)]
    lines += metric("units_total", "counter", "Units that ended, by outcome.")
    lines += [
        sample("units_total", status["counts"][kind], outcome=kind) for kind in OUTCOMES
    ]
    lines += metric("unit_seconds", "histogram", "How long units took.")
    for (action, stage), histogram in sorted(durations.items()):
        total = 0
        for bound, count in zip([*BUCKETS, "+Inf"], histogram.counts):
            total += count
            name, le = "unit_seconds_bucket", str(bound)
            lines.append(sample(name, total, action=action, stage=stage, le=le))
        for name, value in (("sum", histogram.sum), ("count", total)):
            name = f"unit_seconds_{name}"
            lines.append(sample(name, value, action=action, stage=stage))
    return "\n".join(lines) + "\n"


def metric(name: str, kind: str, text: str) -> list[str]:
    """The lines before the samples of a metric."""
    return [f"# HELP crowdnode_{name} {text}", f"# TYPE crowdnode_{name} {kind}"]


def sample(name: str, value: float, **labels: str) -> str:
    """The line of one value."""
    escaped = (
        (key, text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for key, text in labels.items()
    )
    inside = ",".join(f'{key}="{text}"' for key, text in escaped)
    return f"crowdnode_{name}{f'{{{inside}}}' if inside else ''} {value}"


PAGE_STYLE = """
:root { color-scheme: light dark; --dim: #6a737d; --bad: #b3261e; --line: #8884 }
@media (prefers-color-scheme: dark) { :root { --dim: #9aa4ae; --bad: #ff8a80 } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: auto;
  padding: 1rem }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem }
small, th, .none { color: var(--dim); font-weight: normal }
.bad { color: var(--bad) } .stale main { opacity: .5 }
section { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap }
td:nth-child(2), td:last-child { white-space: normal; overflow-wrap: anywhere;
  min-width: 6rem }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: .15rem .8rem; margin: 1rem 0 }
dt { color: var(--dim) } dd { margin: 0; overflow-wrap: anywhere }
meter { width: 6rem } figure { margin: 0 0 .8rem } figcaption { color: var(--dim) }
svg { width: 100%; height: 4.5rem; background: var(--line); display: block }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5 }
svg line { stroke: var(--bad); stroke-dasharray: 4 }
polyline, svg line { vector-effect: non-scaling-stroke }
"""
PAGE_SCRIPT = """
setInterval(async () => {
  try {
    const place = location.origin + location.pathname;  // without a password
    const answer = await fetch(place, { cache: "no-store" });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!answer.ok) throw answer.status;
    document.querySelector("main").replaceWith(page.querySelector("main"));
    document.body.className = "";
  } catch { document.body.className = "stale"; }
}, 5000);
"""


def page_policy() -> str:
    """The header that lets a browser do no more than the page needs."""

    def digest(text: str) -> str:
        hashed = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(hashed).decode()}'"

    return (
        "Content-Security-Policy: default-src 'none'; img-src data:; connect-src "
        f"'self'; style-src {digest(PAGE_STYLE)}; script-src {digest(PAGE_SCRIPT)}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
        "Cache-Control: no-store\r\n"
    )


def draw_page(status: Json, details: Json) -> str:
    """GET /: one document that says everything without JavaScript."""
    name = html.escape(f"{status['host']}:{status['port']}")
    tag = f" <small>{html.escape(details['tag'])}</small>" if details["tag"] else ""
    about = f"crowdnode {status['version']}, up {ago(status['uptime'])}, process "
    body = [
        f"<h1>{name}{tag}</h1><small>{about}{status['pid']}</small>",
        draw_facts(status, details),
        draw_units("Running", status["running"], details["time_limits"]),
        draw_units(
            f"Waiting for central ({status['unreported']})", details["waiting"], {}
        ),
        draw_history(details),
        draw_recent(details["recent"]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{name}</title><link rel="icon" href="data:,">'
        '<noscript><meta http-equiv="refresh" content="10"></noscript>'
        f"<style>{PAGE_STYLE}</style></head>\n<body><main>{''.join(body)}</main>"
        f"<script>{PAGE_SCRIPT}</script></body></html>\n"
    )


def ago(seconds: float | None) -> str:
    """A length of time, for people."""
    if seconds is None:
        return "never"
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def draw_facts(status: Json, details: Json) -> str:
    """The list at the top: central, work, load, memory, counts."""
    central, counts = status["central"], status["counts"]
    answered = details["answered_ago"]
    when = f"answered {ago(answered)} ago" if answered is not None else "never answered"
    work = "taken"
    if status["overloaded"]:
        work = f"refused for {ago(details['refused_for'] or 0)}: {status['reason']}"
    rows = (
        ("Work", work, status["overloaded"]),
        ("Central", f"{central['url']}, {when}", False),
        ("", central["error"], True),
        ("Load", measured(status["load_average"], "", "max", details["max_load"]),
         False),
        ("Free memory", measured(
            status["free_memory"], " MB", "min", details["min_free_memory"]), False),
        ("Available", measured(
            details["available_memory"], " MB", "min",
            details["min_available_memory"]), False),
        ("Workers", f"{len(status['running'])} of at most "
         f"{status['max_workers'] or 'any number'}", False),
        ("Units", ", ".join(f"{count} {kind.replace('_', ' ')}"
                            for kind, count in counts.items()), False),
        ("Actions", ", ".join(status["actions"]), False),
    )  # fmt: skip
    return "<dl>{}</dl>".format(
        "".join(
            f"<dt>{title}</dt><dd{' class=bad' if is_bad else ''}>"
            f"{html.escape(str(text))}</dd>"
            for title, text, is_bad in rows
            if text
        )
    )


def measured(now: float | None, unit: str, word: str, limit: float | None) -> str:
    """A value, and its limit where there is one."""
    text = "unknown" if now is None else f"{now:.2f}" if not unit else f"{now:.0f}"
    return text + unit * (now is not None) + (f", {word} {limit:g}" if limit else "")


def draw_table(title: str, heads: str, rows: list[list[str]]) -> str:
    """A table; *heads*: apart by blanks; each cell is HTML."""
    if not rows:
        return f"<h2>{title}</h2><p class=none>none</p>"
    head = "".join(f"<th>{word}</th>" for word in heads.split())
    lines = "".join(
        "<tr>{}</tr>".format("".join(f"<td>{cell}</td>" for cell in row))
        for row in rows
    )
    return f"<h2>{title}</h2><section><table><tr>{head}</tr>{lines}</table></section>"


def unit_cells(unit: Json) -> list[str]:
    """What each table of units begins with."""
    return [html.escape(str(unit[key])) for key in ("id", "action", "stage", "pid")]


def draw_units(title: str, units: list[Json], limits: dict[str, float | None]) -> str:
    """Units that run or wait, with a bar against their time limits."""
    rows = []
    for unit in units:
        limit, seconds = limits.get(unit["action"]), unit["seconds"]
        bar = f'<meter max="{limit:g}" value="{seconds:g}"></meter>' if limit else ""
        rows.append([*unit_cells(unit), ago(seconds), bar])
    return draw_table(title, "unit action stage pid since limit", rows)


def draw_recent(units: list[Json]) -> str:
    """What ended last, the latest first."""
    rows = []
    for unit in units:
        how = unit["how"].replace("_", " ")
        how = html.escape(f"{how}: {unit['reason']}" if unit["reason"] else how)
        if unit["how"] != "succeeded":
            how = f"<span class=bad>{how}</span>"
        at = time.strftime("%H:%M:%S", time.localtime(unit["at"]))
        rows.append([*unit_cells(unit)[:3], at, ago(unit["seconds"]), how])
    return draw_table("Ended last", "unit action stage at took how", rows)


def draw_history(details: Json) -> str:
    """The last hour as plots."""
    plots = "".join(
        draw_plot(title, [minute[column] for minute in details["history"]], limit)
        for column, (title, limit) in enumerate(
            (
                ("load average", details["max_load"]),
                ("free memory, MB", details["min_free_memory"]),
                ("units a minute", None),
            )
        )
    )
    return f"<h2>The last hour</h2>{plots}"


def brief(value: float) -> str:
    """A number without more digits than anybody reads."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw_plot(title: str, values: list[float | None], limit: float | None) -> str:
    """One plot of an hour, a minute a point, the latest on the right."""
    known = [value for value in values if value is not None]
    if not known:
        return f"<figure><figcaption>{title}: nothing yet</figcaption></figure>"
    top = max(*known, limit or 0, 1e-9) * 1.05
    start = 60 - len(values)
    points = " ".join(
        f"{start + place},{100 - 100 * value / top:.1f}"
        for place, value in enumerate(values)
        if value is not None
    )
    height = 100 - 100 * (limit or 0) / top
    line = (
        f'<line x1="0" x2="59" y1="{height:.1f}" y2="{height:.1f}"/>' if limit else ""
    )
    now, low, high = map(brief, (known[-1], min(known), max(known)))
    caption = f"{title}: {now} now, {low} to {high}"
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<svg viewBox="0 0 59 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{caption}">{line}<polyline points="{points}"/></svg></figure>'
    )


# ---------------------------------------------------------------------------
# The node: puts its parts together, and has the loops tell central of it and look at
# the machine.
# ---------------------------------------------------------------------------

CHECK_IN_INTERVAL = 300  # seconds
MONITOR_INTERVAL = 3  # seconds


class Registration:
    """Has central know this node, and whether it takes work.

    unclean: the last node here did not check out."""

    def __init__(
        self,
        central: Central,
        overload: Overload,
        units: Units,
        servers: ForkServers,
        unclean: bool,
    ) -> None:
        self.central = central
        self.overload = overload
        self.units = units
        self.servers = servers
        self.unclean = unclean
        self.loop = Repeater(self.check_in_periodically, CHECK_IN_INTERVAL)
        self._backoff = Backoff()

    def check_in(self) -> None:
        """Tell central that this node is here.  Raises CrowdError.

        Central never expires the units of a node that just checks in again, so after
        an unclean end it is made to let go of them: as soon as this node has none."""
        try:
            if self.owes_check_out():
                log.info("the last node here did not check out; doing so")
                self.central.check_out()
                self.unclean = False
                for name in list(self.units.reported):  # it has let go of these, too
                    self.units.drop_reported(name)
            self.central.check_in(bool(self.overload), self.servers.actions)
        except CentralError as error:
            raise CrowdError(
                "Failed to connect to the central server "
                f"({self.central.config.central_server}). {error}"
            ) from None

    def owes_check_out(self) -> bool:
        """Is it time to check out for the last node?"""
        return self.unclean and not self.units.by_name

    def check_in_periodically(self) -> float:
        """One step of the loop: check in; soon again if that failed, for ever."""
        try:
            self.check_in()
        except CrowdError as error:
            log.warning("%s", error)
            return self._backoff.failed()
        self._backoff = Backoff()
        return CHECK_IN_INTERVAL

    def check_out(self) -> bool:
        """Have central give this node's units to others; False where it could not."""
        try:
            self.central.check_out()
        except CentralError as error:
            log.warning("can't check out: %s; the next node here will do it", error)
            return False
        return True


class Node:
    """What a node consists of; each of its parts knows those that stand above it here.

    program: what its fork servers run; outdated: is called where that has been
    replaced."""

    def __init__(
        self,
        config: Config,
        port: int,
        program: Program,
        unclean: bool,
        outdated: Callable[[], None],
    ) -> None:
        self.config = config
        self.port = port
        self.began = time.monotonic()
        self.central = Central(config, port)
        self.overload = Overload()
        self.vitals = Vitals(config, self.overload)
        self.history = History()
        self.servers = ForkServers(
            program, config, self.overload, self.receive, outdated
        )
        self.tally = Tally()
        self.reporter = Reporter()
        self.hold = ReportHold(self.central, self.reporter.put)
        self.units = Units(config, self.overload, self.tally, self.hold.put)
        self.watch = Watch(config, self.units)
        self.intake = Intake(self.units, self.servers, self.watch)
        self.delivery = Delivery(
            self.units, self.servers, self.central, self.tally, self.hold
        )
        self.hold.write_down = self.delivery.write_down
        self.late_commits = LateCommits(self.units, self.central, self.hold)
        self.registration = Registration(
            self.central, self.overload, self.units, self.servers, unclean
        )
        self.monitor_loop = Repeater(self.monitor_system, MONITOR_INTERVAL)

    def receive(self, link: ForkServerLink, message: list[Any]) -> None:
        """One message of a fork server, on its link's thread."""
        self.units.receive(link, message)
        if message[0] == "gone":
            self.monitor_loop.soon()  # it looks after the orphans

    def refused(self, reason: str) -> None:
        """A unit was refused, so central takes this node for busy until it checks in:
        there must be a reason that ends."""
        if not self.overload:
            self.overload.begin("unit", reason)

    def monitor_system(self) -> None:
        """One step of the loop: load, memory, workers, records, fork server."""
        self.overload.end("unit")
        self.servers.bury_strays()
        for rubbish in list(unswept):
            sweep(rubbish)
        self.units.look_for_room()
        self.vitals.look()
        self.history.note(
            self.vitals.load_average, self.vitals.free_memory, self.tally.ended()
        )
        self.servers.probe()
        self.watch.look()
        self.late_commits.look_soon()
        if self.registration.owes_check_out():
            self.registration.loop.soon()
        self.overload.remind()

    def status(self) -> Json:
        """What GET /status answers: seconds, MB, null where unknown."""
        central, vitals, link = self.central, self.vitals, self.servers.link
        ago = central.checked_in
        return {
            "version": __version__,
            "host": self.config.host,
            "port": self.port,
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self.began, 3),
            "central": {
                "url": self.config.central_server,
                "dialect": central.dialect,
                "checked_in_ago": ago and round(time.monotonic() - ago, 3),
                "error": central.error,
            },
            "actions": self.servers.actions,
            "max_workers": self.config.max_workers,
            "overloaded": bool(self.overload),
            "reason": self.overload.reason,
            "load_average": vitals.load_average,
            "free_memory": vitals.free_memory and round(vitals.free_memory, 1),
            "fork_server": {
                "pid": link.pid if link else None,
                "restarts": self.servers.restarts,
            },
            "running": [unit.status() for unit in self.units.running()],
            "unreported": len(self.units.waiting()),
            "counts": dict(self.tally.counts),
        }

    def details(self) -> Json:
        """What GET / shows besides the status: seconds, MB, null where unknown."""
        config, answered = self.config, self.central.answered
        limits = {
            name: config.limit(name, "time_limit") for name in self.servers.actions
        }
        return {
            "tag": config.tag,
            "answered_ago": answered and time.monotonic() - answered,
            "refused_for": self.overload.seconds,
            "max_load": config.max_load,
            "min_free_memory": config.min_free_memory,
            "available_memory": self.vitals.available_memory,
            "min_available_memory": config.min_available_memory,
            "time_limits": limits,
            "recent": list(self.tally.recent),
            "waiting": [unit.status() for unit in self.units.waiting()[:RECENT]],
            "history": list(self.history.minutes),
        }


# ---------------------------------------------------------------------------
# The node's routes: HTTP.  What a route is about it asks the node.
# ---------------------------------------------------------------------------

REQUEST_DEADLINE = 20  # seconds for a whole request, however it drips
LINGER = 2  # seconds for a refused sender to notice
HEADER_LIMIT = 100
MAX_CONNECTIONS = 512
IDLE_THREADS = 4  # of the routes, kept for the next requests
REALM = "CloudCrowd"
HTTP_PHRASES = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
    404: "Not Found", 408: "Request Timeout", 411: "Length Required",
    413: "Payload Too Large", 414: "URI Too Long", 500: "Internal Server Error",
    503: "Service Unavailable",
}  # fmt: skip
FORM_TYPE = "application/x-www-form-urlencoded"
# What a POST may stand for.
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "LINK", "UNLINK")


class DeadlineReader(io.RawIOBase):
    """Reads from a socket until a deadline, however little each time."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection = connection
        self.deadline = time.monotonic() + seconds
        self.is_first = True  # then the socket's time limit is right as it is

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase.  Raises BadRequest (408) after the deadline."""
        try:
            if not self.is_first:
                left = self.deadline - time.monotonic()
                if left <= 0:
                    raise socket.timeout
                self.connection.settimeout(left)
            self.is_first = False
            return self.connection.recv_into(buffer)
        except socket.timeout:
            raise BadRequest("The request was too slow.", 408) from None


class NodeServer(ServerBase):
    """Listens for central; one thread for each connection, one request on each.  The
    threads stay: to start one costs as much as to answer a request.

    At MAX_CONNECTIONS unfinished requests the one that has kept us waiting longest is
    closed, so that central still gets in.

    On the thread of serve_forever run get_request and process_request; on one of the
    routes a handler's setup, handle and finish, and then shutdown_request."""

    request_queue_size = 512

    node: Node
    patience: float  # seconds for a whole request

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of our name, which can take minutes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.take_address()

    def take_address(self) -> None:
        """The socket is bound: begin with no connection."""
        self.unread: dict[Any, None] = {}  # connections, in order of arrival
        self.unread_lock = threading.Lock()
        self.open = 0  # connections
        self.accepted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.threads = 0
        self.idle = 0  # threads that wait, less connections that do
        self.server_address = self.socket.getsockname()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; without a descriptor to be had, make one free."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._close_oldest()
                time.sleep(0.05)  # accept fails again until a thread has let go
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """See socketserver.ThreadingMixIn."""
        with self.unread_lock:
            self.open += 1
            self.unread[request] = None
            full = len(self.unread) > MAX_CONNECTIONS
            self.accepted.put((request, client_address))
            self.idle -= 1
            is_short = self.idle < 0
        if full:
            self._close_oldest()
        if is_short:
            self._add_thread()

    def _add_thread(self) -> None:
        try:
            start_thread(self._serve, name="routes")
            with self.unread_lock:
                self.idle += 1
                self.threads += 1
        except OSError:  # then those that there are must do, or this one
            self.node.overload.begin("start", "can't start a thread")
            if self.threads == 0:
                self.patience = 1
                self._serve_one()
                self.patience = REQUEST_DEADLINE
                self.idle += 1

    def _serve(self) -> None:
        """A thread of the routes."""
        while True:
            self._serve_one()
            with self.unread_lock:
                if self.idle >= IDLE_THREADS:
                    self.threads -= 1
                    return
                self.idle += 1

    def _serve_one(self) -> None:
        request, client_address = self.accepted.get()
        self.process_request_thread(request, client_address)

    def request_is_read(self, request: Any) -> None:
        """The sender has kept nobody waiting."""
        with self.unread_lock:
            self.unread.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        """See socketserver.BaseServer."""
        self.request_is_read(request)
        self.close_request(request)  # the base would say first that nothing follows
        with self.unread_lock:
            self.open -= 1

    def finish(self, seconds: float) -> None:
        """Accept no more, wait for a while for the requests under way.  What comes
        waits in the listener for whoever has it next."""
        deadline = time.monotonic() + seconds
        self.shutdown()
        while self.open and time.monotonic() < deadline:
            time.sleep(0.01)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """See socketserver.BaseServer: no fault of one request ends the server."""
        log.exception("a request of %s failed", client_address)

    def _close_oldest(self) -> None:
        with self.unread_lock, contextlib.suppress(StopIteration, OSError):
            oldest = next(iter(self.unread))
            self.unread.pop(oldest)
            oldest.shutdown(socket.SHUT_RDWR)


class RequestHandler(HandlerBase):
    """One request, the only one of its connection: read within a deadline, and
    answered so that the answer arrives.  A subclass says what it is."""

    protocol_version = "HTTP/1.1"
    server: NodeServer

    def setup(self) -> None:
        """See socketserver.StreamRequestHandler."""
        self.connection = self.request
        self.connection.settimeout(self.server.patience)
        self.command = self.path = ""
        self.given: dict[str, list[str]] = {}  # the headers, by name in small letters
        self.is_read = False
        reader = DeadlineReader(self.connection, self.server.patience)
        self.rfile = io.BufferedReader(reader, REQUEST_BUFFER)

    def handle(self) -> None:
        """Answer, and see to it that the sender gets to read the answer."""
        try:
            try:
                if self.read_head():
                    self.answer()
                else:
                    self.is_read = True
            except BadRequest as error:
                self.reply(error.status, str(error), header=error.header)
            except OSError:
                raise
            except Exception:
                log.exception("%s %s failed", self.command, self.path[:200])
                self.reply(500, "This is our fault, and in our log.")
            if not self.is_read:
                self._linger()
        except OSError as error:
            log.debug("%s has gone: %s", self.client_address[0], error)

    def finish(self) -> None:
        """See socketserver.StreamRequestHandler."""
        self.rfile.close()

    def answer(self) -> None:
        """Answer the request whose head has been read.  May raise BadRequest."""
        raise NotImplementedError

    def read_head(self) -> bool:
        """Read the head; False where nobody asks.  Raises BadRequest.

        Not parse_request of http.server, which has the email package parse the
        headers: that takes a third of the time of a whole request."""
        line = self.rfile.readline(LINE_LIMIT + 1)
        if line in (b"\r\n", b"\n"):  # RFC 9112, section 2.2
            line = self.rfile.readline(LINE_LIMIT + 1)
        if not line:
            return False  # connected and closed, as port scanners do
        if len(line) > LINE_LIMIT:
            raise BadRequest("The request's first line is too long.", 414)
        words = line.decode("latin-1").split()
        if len(words) != 3 or not re.fullmatch(r"HTTP/1\.[0-9]", words[2]):
            raise BadRequest("The request's first line is not METHOD PATH HTTP/1.1.")
        self.command, self.path, version = words
        for _ in range(HEADER_LIMIT + 1):
            line = self.rfile.readline(LINE_LIMIT + 1)
            if line in (b"\r\n", b"\n"):
                break
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or not line.endswith(b"\n") or name != name.strip():
                raise BadRequest("A header is not NAME: VALUE.")
            self.given.setdefault(name.lower(), []).append(value.strip())
        else:
            raise BadRequest(f"There are more than {HEADER_LIMIT} headers.")
        if self.header("expect").lower() == "100-continue" and version != "HTTP/1.0":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def header(self, name: str, default: str = "") -> str:
        """The value of a header, the first if it is there more than once."""
        return self.given.get(name, [default])[0]

    def read_body(self, limit: float) -> bytes | None:
        """Read the body, of *limit* MB at most; None where there is none, or none
        whose length is said.  Raises BadRequest.

        Before anything is answered: central would lose an answer that is sent over
        unread bytes, and would drop this node for it."""
        lengths = set(self.given.get("content-length", []))
        is_chunked = "transfer-encoding" in self.given
        if is_chunked or not lengths:
            self.is_read = not is_chunked and self.command != "POST"
            self.server.request_is_read(self.request)
            return None
        length = lengths.pop()
        if lengths or not re.fullmatch(r"[0-9]{1,18}", length):
            raise BadRequest("The Content-Length is no single number.")
        if int(length) > limit * MEGABYTE:
            sentence = f"The request is over max_request_size, {limit:g} MB."
            raise BadRequest(sentence, 413)
        body = self.rfile.read(int(length))
        self.is_read = True
        self.server.request_is_read(self.request)
        if len(body) < int(length):
            raise BadRequest(f"The body ended after {len(body)} of {length} bytes.")
        return body

    def reply(
        self,
        status: int,
        body: str,
        kind: str = "text/plain;charset=utf-8",
        header: str = "",
    ) -> None:
        """Send the whole answer at once.  Raises OSError where the peer has gone."""
        data = body.encode("utf-8", "replace")
        head = (
            f"HTTP/1.1 {status} {HTTP_PHRASES[status]}\r\n"
            f"{header}Content-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
            "Connection: close\r\nServer: crowdnode\r\n\r\n"
        ).encode("latin-1")
        self.connection.sendall(head if self.command == "HEAD" else head + data)

    def _linger(self) -> None:
        """Read on for a while after an answer to what was not read: closed with
        unread bytes, the connection would be reset and the answer lost."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + REQUEST_DEADLINE
        self.connection.settimeout(LINGER)
        while time.monotonic() < deadline and self.connection.recv(READ_SIZE):
            pass


class NodeHandler(RequestHandler):
    """The routes.  Answers are those of CloudCrowd's node, except that a bad request
    gets a status and a sentence where that one said 500."""

    def answer(self) -> None:
        """See RequestHandler."""
        self._require_allowed()
        self._require_login()
        node = self.server.node
        path, fields = self._read_fields()
        route = (self._method(fields), path)
        if route == ("GET", "/heartbeat"):
            self.reply(200, HEARTBEAT)
        elif route == ("POST", "/work"):
            self._work(fields)
        elif route == ("GET", "/status"):
            self.reply(200, json.dumps(node.status()), "application/json")
        elif route == ("GET", "/metrics"):
            metrics = metrics_text(node.status(), node.tally.durations)
            self.reply(200, metrics, "text/plain; version=0.0.4; charset=utf-8")
        elif route == ("GET", "/"):
            page = draw_page(node.status(), node.details())
            self.reply(200, page, "text/html; charset=utf-8", page_policy())
        else:
            raise BadRequest("Not Found", 404)

    def _require_allowed(self) -> None:
        """Raise BadRequest where ``allow`` leaves the client out."""
        allow = self.server.node.config.allow
        if not allow:
            return
        client = ipaddress.ip_address(self.client_address[0].partition("%")[0])
        client = getattr(client, "ipv4_mapped", None) or client
        if not any(client in ipaddress.ip_network(network) for network in allow):
            raise BadRequest(f"{client} is not in this node's allow.", 403)

    def _require_login(self) -> None:
        """Raise BadRequest where the credentials are wrong.  As Rack's Basic
        authentication has it, a scheme other than Basic and what does not decode is
        400, not 401."""
        config = self.server.node.config
        if not config.http_authentication:
            return
        challenge = f'WWW-Authenticate: Basic realm="{REALM}"\r\n'
        refusal = BadRequest("Authorization Required", 401, challenge)
        if "authorization" not in self.given:
            raise refusal
        scheme, _, credentials = self.header("authorization").partition(" ")
        try:
            pair = base64.b64decode(credentials.strip(), validate=True)
        except ValueError:
            pair = b""
        if scheme.lower() != "basic" or not pair:
            raise BadRequest("Bad Request")
        if not hmac.compare_digest(pair, f"{config.login}:{config.password}".encode()):
            raise refusal

    def _read_fields(self) -> tuple[str, dict[str, str]]:
        """The path, and the fields of the query and of the form."""
        try:
            path, _, query = self.path.partition("?")
            if "://" in path:
                path = str(urllib.parse.urlsplit(path).path)
            fields = form_fields(query)
            body = self.read_body(self.server.node.config.max_request_size)
            if body is None and self.command == "POST" and path == "/work":
                raise BadRequest("A Content-Length is needed.", 411)
            kind = self.header("content-type").partition(";")[0].strip().lower()
            if kind in ("", FORM_TYPE) and self.command == "POST":
                fields.update(form_fields((body or b"").decode()))
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise BadRequest(f"The form is not UTF-8: {error}.") from None
        except ValueError as error:
            raise BadRequest(f"The form can't be read: {error}.") from None
        return path, fields

    def _method(self, fields: dict[str, str]) -> str:
        """The method that is meant: protocol.md, "The unit", has Rack's override."""
        if self.command != "POST":
            return "GET" if self.command == "HEAD" else self.command
        override = self.header("x-http-method-override")
        override = fields.get("_method", override).upper()
        return override if override in METHODS else "POST"

    def _work(self, fields: dict[str, str]) -> None:
        node = self.server.node
        node.hold.dispatched()
        if "work_unit" not in fields:
            raise BadRequest("There is no field work_unit in the form.")
        request = parse_unit(fields["work_unit"])
        try:
            unit = node.intake.take(request)
        except NodeOverloaded as error:
            node.tally.count("refused")
            try:
                self.reply(503, OVERLOADED_MESSAGE)
            finally:  # central takes this node for busy from here on
                node.refused(str(error))
            return
        written = False
        try:
            self.reply(200, f'{{"pid":{unit.pid}}}', "application/json")
            written = True
        finally:
            node.units.replied(unit, written)


def form_fields(form: str) -> dict[str, str]:
    """The fields of a form or a query; the last of a name counts, as in Rack.

    Raises ValueError, UnicodeDecodeError among them."""
    pairs = urllib.parse.parse_qsl(
        form, keep_blank_values=True, errors="strict", max_num_fields=1000
    )
    return dict(pairs)


def listen(config: Config, listener: int | None) -> NodeServer:
    """Bind the node's port and listen; or go on with the *listener* (a descriptor) of
    the node that this process was.  Raises CrowdError."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    handler = type("Handler", (NodeHandler, BaseHTTPRequestHandler), {})
    server = type("Server", (NodeServer, ThreadingHTTPServer), {})
    bind, port = config.bind, config.port
    if ":" in bind:
        server.address_family = socket.AF_INET6  # type: ignore[attr-defined]
    try:
        result: NodeServer = server((bind, port), handler, listener is None)
    except OSError as error:
        hint = "; another program has it: choose another with --port"
        hint = hint if error.errno == errno.EADDRINUSE else ""
        raise CrowdError(
            f"can't listen on {bind} port {port}: {error.strerror}{hint}"
        ) from None
    if listener is not None:
        result.socket.close()
        os.set_inheritable(listener, False)
        result.socket = socket.socket(fileno=listener)
        result.take_address()
    result.patience = REQUEST_DEADLINE
    return result


# ---------------------------------------------------------------------------
# The node's life: start, reload, upgrade, stop.
#
# An upgrade: run() finds the program outdated and hands over; live() has go_on_as()
# replace what this process runs, with the lock and the listener open; there main()
# comes to resume_node(), and listen() goes on with that listener.
# ---------------------------------------------------------------------------

RECOVERY_DEADLINE = 60  # seconds at the start for reporting what is on disk
HAND_OVER_DEADLINE = 10  # seconds for requests and reports before an upgrade


def is_in_order(load: Callable[[], Config]) -> bool:
    """Would another version find its directories as they must be?"""
    try:
        prepare_directories(load())
    except CrowdError:
        return False
    return True


def try_storage(config: Config) -> None:
    """Log what is wrong with it.  Not before a reload: one that is silent takes minutes
    to try."""
    try:
        check_storage(config)
    except CrowdError as error:
        log.error("%s", error)


class Lifetime:
    """A node's life in this process.

    load: reads the configuration anew, for SIGHUP; path: of what its fork servers run;
    unclean: the last node here did not check out; listener: a descriptor, of the node
    that this process was before an upgrade.  run() is the whole of it."""

    server: NodeServer  # from run() on
    node: Node

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        path: str,
        unclean: bool,
        listener: int | None,
    ) -> None:
        self.config = config
        self.load = load
        self.unclean = unclean
        self.listener = listener
        self.is_upgrade = listener is not None
        # Clean: central has nothing of ours, so there is no need to check out.
        self.clean = not unclean and not self.is_upgrade
        self.signals = Signals()
        self.program = Program(path)

    def run(self, started: Callable[[], None]) -> bool:
        """Start, call *started*, work until a signal comes, and stop; False.  Or, where
        this program has been replaced, True: its next version is to go on.

        Raises CrowdError where it can't start."""
        self.server = listen(self.config, self.listener)
        port = int(self.server.server_address[1])
        node = Node(
            self.config, port, self.program, self.unclean,
            lambda: self.signals.feign(signal.SIGHUP),
        )  # fmt: skip
        self.node = self.server.node = node
        try:
            self.signals.trap(self._stop_starting)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, NODE_SIGNALS)
            self.start()
        except KeyboardInterrupt as error:
            self.give_up_starting()
            raise CrowdError(f"stopped by {error} while starting") from None
        except BaseException:
            node.servers.stop()
            raise
        log.info(
            "crowdnode %s, %s port %d, has checked in with %s; actions: %s",
            __version__, self.config.host, node.port, self.config.central_server,
            ", ".join(node.servers.actions),
        )  # fmt: skip
        started()
        with contextlib.suppress(OSError):
            # One host name that central can't resolve stops the whole crowd.
            start_thread(lambda: log_problems(host_problems(self.config)))
        while self.signals.next() == signal.SIGHUP:
            if not self.program.is_outdated(self.config) or not is_in_order(self.load):
                self.reload()  # which says what is not
            elif self.hand_over():
                return True
            else:
                break
        self.shut_down()
        return False

    def start(self) -> None:
        """Listen first, for an old central hands out work before it has answered the
        check-in, which comes last.

        A node that goes on after an upgrade lets its requests wait until it can take
        them, and does not end because central is away."""
        node = self.node
        write_file(self.config.state_file("node.port"), b"%d\n" % node.port)
        node.reporter.start(node.delivery.deliver)
        start_thread(node.hold.run, name="hold")
        if not self.is_upgrade:
            start_thread(self.server.serve_forever)
        node.servers.use(node.servers.start(self.config))
        self.recover()
        node.vitals.look()
        node.overload.end("starting")
        node.overload.over = node.registration.loop.soon
        self.clean = False
        if self.is_upgrade:
            start_thread(self.server.serve_forever)
        try:
            node.registration.check_in()
        except CrowdError as error:
            if not self.is_upgrade:
                raise
            log.warning("%s", error)
            node.registration.loop.soon()
        node.registration.loop.start()
        node.monitor_loop.start()
        self.signals.trap(only_wake)

    def recover(self) -> None:
        """Settle what an earlier node has left.

        Reported first is what is on disk, for a minute at most."""
        node = self.node
        sweep_all(self.config.temp_storage_path)
        node.watch.tidy()
        node.watch.look()
        deadline = time.monotonic() + RECOVERY_DEADLINE
        while not self.is_upgrade and node.units.waiting():
            if node.reporter.central_is_away or time.monotonic() > deadline:
                break
            # Not at each report: waiting() walks over all units.
            time.sleep(0.05)

    def _stop_starting(self, number: int, frame: Any) -> None:
        """The start may wait for minutes: for modules that load, for central."""
        raise KeyboardInterrupt(signal_name(number))

    def give_up_starting(self) -> None:
        """A signal came: where this process has taken units, it is a stop like any
        other.  Those that an earlier one has left go on, for the next."""
        self.signals.trap(only_wake)
        self.signals.next(0)
        node = self.node
        if self.is_upgrade:
            with contextlib.suppress(OSError):
                node.watch.look()  # they were this process's before
        if self.is_upgrade or any(unit.link for unit in node.units.active):
            self.shut_down()
        else:
            node.servers.stop()

    def reload(self) -> None:
        """Open the log again; read the configuration, and start a fork server with the
        actions as they are now; if all that has worked, put both in place of the old.
        Nothing that runs notices: the old fork server ends with its last worker."""
        node = self.node
        for handler in log.handlers:
            handler.close()  # it opens its file again with the next line
        try:
            config = self.load()
            config.warnings += config.keep_place(self.config.place())
            prepare_directories(config)
            warnings = state_warnings(config)
            link = node.servers.start(config)
        except (CrowdError, OSError) as error:
            log.error("not reloaded, all stays as it was: %s", error)
            return
        log_problems([("warning", warning) for warning in warnings])
        if config.central_server != self.config.central_server:
            node.central.forget()
            for name in list(node.units.reported):  # the other one knows nothing of it
                node.units.drop_reported(name)
        self.config.replace(config)
        node.servers.use(link)
        log.setLevel(config.log_level.upper())
        log.info("reloaded; actions: %s", ", ".join(node.servers.actions))
        node.registration.loop.soon()
        with contextlib.suppress(OSError):
            start_thread(try_storage, self.config)

    def hand_over(self) -> bool:
        """Finish what is under way, for the next version to go on in this process:
        same pid, same lock, same listener.  Workers do not notice.

        False where a signal to stop has come meanwhile."""
        node = self.node
        log.info("%s has been replaced: going on as what it is now", PROGRAM)
        node.servers.stopping = True  # another would be of the next version
        self.program.path = compiled(self.config)
        node.monitor_loop.stop()
        node.registration.loop.stop()
        self.server.finish(HAND_OVER_DEADLINE)
        node.reporter.stop(HAND_OVER_DEADLINE)
        number: int | None = signal.SIGHUP
        while number == signal.SIGHUP:
            number = self.signals.next(0)
        if number is None:
            return True
        node.reporter.start(node.delivery.deliver)
        return False

    def shut_down(self) -> None:
        """Refuse new work, wait drain_time for what runs, check out, end the rest."""
        node = self.node
        node.servers.stopping = True
        node.overload.begin("stopping", "the node is stopping")
        log.info("stopping; %d units are running", len(node.units.active))
        node.monitor_loop.stop()
        node.registration.loop.stop()
        deadline = time.monotonic() + self.config.drain_time
        while node.units.by_name and time.monotonic() < deadline:
            if self.signals.next(0.05) not in (None, signal.SIGHUP):
                break  # a second signal
        self.clean = node.registration.check_out()
        if self.clean:
            for name in list(node.units.reported):
                node.units.drop_reported(name)
        node.watch.end_all(released=self.clean)
        node.servers.stop()
        node.servers.wait(KILL_GRACE)
        for process in list(own_children):
            kill_group(process.pid, signal.SIGKILL)
        log.info("stopped")


# ---------------------------------------------------------------------------
# Local central: what --run puts in front of one real node.  Same check-in, dispatch,
# report, stages and retries as CloudCrowd's, for one job.
# ---------------------------------------------------------------------------


class Task:
    """A work unit, as central sees it.  place: where its output belongs."""

    def __init__(
        self, id: int, place: tuple[int, ...], status: int, input: str
    ) -> None:
        self.id = id
        self.place = place
        self.status = status
        self.input = input
        self.attempts = 0
        self.output: Any = None
        self.reason: str | None = None  # why it failed for good


class LocalCentral:
    """Central for one job and one node.

    config: the node's, for both have the same credentials; action, stages, options: the
    job's."""

    def __init__(
        self, config: Config, action: str, stages: list[str], options: Json
    ) -> None:
        self.config = config
        self.action = action
        self.stages = stages
        self.options = options
        self.job_id = int(time.time() * 1000)  # names what the job's units save
        self.changed = threading.Condition()
        self.finished = threading.Event()
        self.pending: deque[Task] = deque()
        self.sent: dict[int, Task] = {}  # by id
        self.done: list[Task] = []
        self.failures: list[Task] = []
        self.merged: Task | None = None
        self.total = 0
        self.node: str | None = None  # HOST:PORT
        self.known = False  # it has checked in at least once
        self.busy = False
        self.room = 0
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(self) -> int:
        """Listen on a free loopback port and begin to dispatch; returns the port."""
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        handler = type("Handler", (CentralHandler, BaseHTTPRequestHandler), {})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.central = self  # type: ignore[attr-defined]
        for target in (server.serve_forever, self._dispatch):
            start_thread(target)
        return int(server.server_address[1])

    def add_inputs(self, inputs: list[str]) -> None:
        """Begin the job."""
        with self.changed:
            status = SPLITTING if "split" in self.stages else PROCESSING
            for number, input in enumerate(inputs):
                self._add((number,), status, input)
            self._advance()

    def outputs(self) -> list[Any]:
        """What the job put out, in the order of its inputs."""
        if self.merged:
            return [self.merged.output] if self.merged.reason is None else []
        tasks = sorted(self.done + self.failures, key=lambda task: task.place)
        if "merge" in self.stages:
            return []  # it did not get so far
        return [task.output for task in tasks]

    def request(self, method: str, path: str, fields: dict[str, str]) -> int:
        """Answer one of the node's calls: the status."""
        kind, _, name = path.strip("/").partition("/")
        if kind == "node" and method == "PUT":
            return self._check_in(name, fields)
        if kind == "node" and method == "DELETE":
            with self.changed:
                self._release()
            return 204
        if kind == "work" and method == "PUT" and name.isdigit():
            return self._report(int(name), fields)
        return 404

    def _check_in(self, name: str, fields: dict[str, str]) -> int:
        if "port" not in fields or not fields.get("enabled_actions"):
            return 500  # the other dialect
        with self.changed:
            self.node, self.known = f"{name}:{fields['port']}", True
            self.busy = fields.get("busy") == "true"
            self.room = int(fields.get("max_workers") or 0)
            self.changed.notify_all()
        return 204

    def _release(self) -> None:
        """The node has gone: its units are for whoever checks in next."""
        self.node = None
        self.pending.extendleft(self.sent.values())
        self.sent.clear()

    def _report(self, id: int, fields: dict[str, str]) -> int:
        with self.changed:
            task = self.sent.pop(id, None)
            if task is None:
                return 404
            output = json.loads(fields["output"])["output"]
            if fields["status"] == "succeeded":
                self._succeed(task, output)
            else:
                self._fail(task, str(output))
            self._advance()
            self.changed.notify_all()
        return 204

    def _succeed(self, task: Task, output: Any) -> None:
        task.output = output
        if task.status == SPLITTING:
            for number, input in enumerate(flattened(output)):
                input = input if isinstance(input, str) else to_json(input)
                self._add((*task.place, number), PROCESSING, input)
        elif task.status == PROCESSING:
            self.done.append(task)

    def _fail(self, task: Task, reason: str) -> None:
        task.attempts += 1
        if task.attempts < self.config.work_unit_retries:
            self.pending.append(task)
        else:
            self._give_up(task, reason)

    def _give_up(self, task: Task, reason: str) -> None:
        task.reason = reason
        self.failures.append(task)
        self._advance()

    def _add(self, place: tuple[int, ...], status: int, input: str) -> Task:
        self.total += 1
        task = Task(self.total, place, status, input)
        self.pending.append(task)
        return task

    def _advance(self) -> None:
        """When a stage is over, go to the next, or finish."""
        if self.pending or self.sent:
            return
        if "merge" in self.stages and not self.failures and self.merged is None:
            ordered = sorted(self.done, key=lambda task: task.place)
            outputs = to_json([task.output for task in ordered])
            self.merged = self._add((0,), MERGING, outputs)
        else:
            self.finished.set()

    def _dispatch(self) -> None:
        while not self.finished.is_set():
            with self.changed:
                ready = self.node and not self.busy and self.pending
                if not ready or (self.room and len(self.sent) >= self.room):
                    if not self.changed.wait(1):
                        self.busy = False  # try it again, as CloudCrowd does
                    continue
                task, node = self.pending.popleft(), self.node
                self.sent[task.id] = task
            status, reason = self._post(node, task)
            if status == 200:
                continue
            with self.changed:
                is_ours = self.sent.pop(task.id, None) is not None
                if is_ours and status in (400, 413):  # it will never take that one
                    self._give_up(task, reason)
                elif is_ours:
                    self.pending.appendleft(task)
                self.busy = status == 503
                if status not in (400, 413, 503):
                    self._release()  # until it checks in again

    def _post(self, node: str | None, task: Task) -> tuple[int, str]:
        from http.client import HTTPException

        unit = {
            "id": task.id,
            "job_id": self.job_id,
            "input": task.input,
            "attempts": task.attempts,
            "action": self.action,
            "options": self.options,
            "status": task.status,
        }
        data = form_encoded([("work_unit", json.dumps(unit).encode())])
        headers = {"Authorization": basic_credentials(self.config)}
        request = urllib.request.Request(f"http://{node}/work", data, headers)
        try:
            with self._opener.open(request, timeout=30) as reply:
                return int(reply.status), ""
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode("utf-8", "replace")
        except (OSError, ValueError, HTTPException) as error:
            return 0, str(error)


def flattened(value: Any) -> list[Any]:
    """A split's output as CloudCrowd takes it: nested lists are one list."""
    if not isinstance(value, list):
        return [value]
    return [item for element in value for item in flattened(element)]


class CentralHandler(HandlerBase):
    """Hands the node's calls to the LocalCentral."""

    def do_PUT(self) -> None:
        """Check-in or report."""
        central: LocalCentral = self.server.central  # type: ignore[attr-defined]
        if self.headers.get("Authorization") != basic_credentials(central.config):
            self.send_error(401)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fields = form_fields(body.decode())
        self.send_response(central.request(self.command, self.path, fields))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_DELETE = do_PUT

    def log_message(self, format: str, *args: Any) -> None:
        """No access log."""


class Progress:
    """What a person is told of a job on standard error.

    quiet: of nothing but failures; log_path: of the node's log."""

    def __init__(
        self, central: LocalCentral, inputs: list[str], quiet: bool, log_path: str
    ) -> None:
        self.central = central
        self.inputs = inputs
        self.quiet = quiet
        self.log_path = log_path
        self._began = time.monotonic()
        self._told = 0  # failures

    def show(self) -> None:
        """Failures that are new, and on a terminal a bar."""
        self._show_failures()
        central, running = self.central, len(self.central.sent)
        done = central.total - len(central.pending) - running
        if not sys.stderr.isatty() or self.quiet:
            return
        bar = "#" * (20 * done // max(1, central.total))
        rate = done / max(0.001, time.monotonic() - self._began)
        left = f", {ago((central.total - done) / rate)} left" if rate else ""
        counts = f"{self._counts(done)}, {running} running, {rate:.1f}/s{left}"
        sys.stderr.write(f"\r\033[K[{bar:<20}] {counts}")
        sys.stderr.flush()

    def finish(self) -> None:
        """What is new, what the workers printed if any input failed, and the counts."""
        self._show_failures()
        central = self.central
        if central.failures:  # tracebacks above all: who tries an action out wants them
            for line in self.log_tail().splitlines():
                if " output: " in line:
                    self.say(line)
        self.say(self._counts(central.total - len(central.pending) - len(central.sent)))

    def say(self, sentence: str) -> None:
        """Print it, in the place of the bar."""
        if not self.quiet:
            self._print(sentence)

    def log_tail(self) -> str:
        """The end of the node's log."""
        with contextlib.suppress(OSError):
            return read_file(self.log_path, OUTPUT_TAIL).decode("utf-8", "replace")
        return ""

    def _show_failures(self) -> None:
        central = self.central
        for task in central.failures[self._told :]:
            merge = task is central.merged
            name = "merge" if merge else self.inputs[task.place[0]]
            self._print(f"{name}: {task.reason}")
            self._told += 1

    def _counts(self, done: int) -> str:
        failed = len(self.central.failures)
        return f"{done} of {self.central.total} done, {failed} failed"

    def _print(self, sentence: str) -> None:
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{clear}{sentence}", file=sys.stderr)


class LocalRun:
    """One job on this machine: a LocalCentral, a real node, its workers."""

    def __init__(
        self,
        config: Config,
        action: str,
        options: Json,
        inputs: list[str],
        arguments: argparse.Namespace,
    ) -> None:
        loader = ActionLoader(config)
        actions = loader.load()
        if action not in actions:
            problems = "".join(f"\n{sentence}" for _, sentence in loader.problems)
            remedy = nearest(action, sorted(actions)) if actions else "there is none"
            raise UsageError(f"--run {action}: no such action: {remedy}{problems}")
        self.fail_fast: bool = arguments.fail_fast
        self.output: str | None = arguments.output
        if self.output is not None:
            check_output(self.output)
        self.inputs = inputs
        self.directory = tempfile.mkdtemp(prefix="crowdnode-")
        self.config = self._node_config(config)
        stages = stages_of(actions[action])
        self.central = LocalCentral(self.config, action, stages, options)
        self.progress = Progress(
            self.central, inputs, arguments.quiet, self._path("log")
        )
        self.node: subprocess.Popen[bytes] | None = None
        self.interrupted = False  # or done: no signal counts any more

    def run(self) -> int:
        """Do the job; print its outputs.  Returns the exit status."""
        for number in NODE_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                signal.signal(number, self._interrupt)
        try:
            self.config.central_server = f"http://127.0.0.1:{self.central.start()}"
            write_config(self.config, self._path("crowdnode.conf"))
            self.central.add_inputs(self.inputs)
            self._wait()
        except KeyboardInterrupt:
            self.progress.say("interrupted")
            return EXIT_INTERRUPTED
        finally:
            try:
                self._clean_up()
            except KeyboardInterrupt:  # there is no second one
                self._clean_up()
        if not self.fail_fast or not self.central.failures:
            self._deliver(self.central.outputs())
        return EXIT_FAILED if self.central.failures else EXIT_OK

    def _interrupt(self, number: int, frame: Any) -> None:
        """The first signal ends the job; people press Ctrl-C more than once."""
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt

    def _deliver(self, outputs: list[Any]) -> None:
        if self.output is None:
            is_utf8 = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")
            print(json.dumps(outputs, ensure_ascii=not is_utf8))
            return
        data = json.dumps(outputs, ensure_ascii=False).encode() + b"\n"
        for number in NODE_SIGNALS:  # who reads a pipe may never come
            if signal.getsignal(number) == self._interrupt:
                signal.signal(number, signal.SIG_DFL)
        try:
            with open(self.output, "wb") as file:
                file.write(data)
        except OSError as error:
            print(json.dumps(outputs))  # perhaps of hours: rather here than nowhere
            raise CrowdError(
                f"--output {self.output}: {error.strerror}; so the outputs are on "
                "standard output"
            ) from None

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _node_config(self, config: Config) -> Config:
        """The user's configuration, on loopback, in a directory of its own, and with
        a password, so that nobody else on this machine can hand it work."""
        return Config(
            {
                **vars(config),
                "host": "127.0.0.1",
                "bind": "127.0.0.1",
                "port": 0,
                "dialect": "seed",  # this central commits before it answers
                "tag": None,
                "allow": [],
                "http_authentication": True,
                "login": "run",
                "password": os.urandom(16).hex(),
                "state_path": self.directory,
                "temp_storage_path": self._path("work"),
                "max_workers": config.max_workers or processors(),
                "drain_time": 0.0,
                # Who asks for a job wants it now.
                "max_load": None,
                "min_free_memory": None,
                "min_available_memory": None,
            }
        )

    def _start_node(self) -> None:
        command = [sys.executable, PROGRAM, ATTENDED_FLAG]
        with open(self._path("log"), "ab") as output:
            self.node = subprocess.Popen(
                [*command, "--config", self._path("crowdnode.conf")],
                stdin=subprocess.PIPE,  # its end of file tells the node to stop
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C comes to us, and we stop it
            )

    def _wait(self) -> None:
        starts = 0
        while not self.central.finished.wait(0.05 if starts else 0):
            self.progress.show()
            if self.fail_fast and self.central.failures:
                break
            if self.node is None or self.node.poll() is not None:
                status = self.node.returncode if self.node else 0
                if starts == 5 or (status > 0 and not self.central.known):
                    said = self.progress.log_tail()
                    raise CrowdError(f"the node does not run:\n{said}")
                self._start_node()
                starts += 1
        self.progress.finish()

    def _clean_up(self) -> None:
        """Nothing is left: no process, no file, however impatient a person is."""
        self.interrupted = True
        if self.node:
            self.node.terminate()
            try:
                self.node.wait(TERM_GRACE)
            except subprocess.TimeoutExpired:
                self.node.kill()
                self.node.wait()
            if self.node.stdin:
                self.node.stdin.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def write_config(config: Config, path: str) -> None:
    """Write *config* so that load_config() reads the same from it."""

    def written(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list):
            return " ".join(value)
        return f"{value:f}" if isinstance(value, float) else str(value)

    lines = ["[node]"]
    lines += [f"{key} = {written(getattr(config, key))}" for key in NODE_KEYS]
    for name, values in config.actions.items():
        lines.append(f"[action {name}]")
        lines += [f"{key} = {written(value)}" for key, value in values.items()]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def check_output(path: str) -> None:
    """Refuse a FILE that can't be written before any work is done for it."""
    place = path if os.path.exists(path) else os.path.dirname(os.path.realpath(path))
    if not path:
        raise UsageError("--output: FILE is empty")
    if os.path.isdir(path):
        raise UsageError(f"--output {path}: is a directory")
    if not os.path.exists(place):
        raise UsageError(f"--output {path}: there is no directory {place}")
    if not os.access(place, os.W_OK):
        raise UsageError(f"--output {path}: {place} is not writable")


def input_of(argument: str) -> str:
    """What central is given for an INPUT that is a file or a URL."""
    if is_url(argument):
        return argument
    path = os.path.abspath(argument)
    if not argument:
        raise UsageError("an INPUT is empty; for plain strings there is --strings")
    if os.path.isfile(path):
        return file_url(path)
    kind = "a directory" if os.path.isdir(path) else "no file and no URL"
    raise UsageError(f"{argument}: is {kind}; for plain strings there is --strings")


# ---------------------------------------------------------------------------
# Daemon: the lock, the pid file, the log, the background.  Knows processes on this
# machine; what a node does is the node's business.
# ---------------------------------------------------------------------------


WEDGED_AFTER = 30  # seconds without a heartbeat until --daemon replaces a node
HEARTBEAT_DEADLINE = 2  # seconds


class NodeLock:
    """node.pid: locked as long as the node lives, whatever ends it; it holds its pid.

    A file that is there and not locked says that the last node did not check out."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.state_file("node.pid")
        self.unclean = False
        self.descriptor = -1

    def acquire(self, patience: float) -> bool:
        """Take the lock; False where a node has it.  Raises CrowdError.

        It may take some patience (seconds): holder() takes it too, for a moment."""
        os.umask(0o077)  # from here on all that is made is this user's alone
        try:
            return self._acquire(time.monotonic() + patience)
        except OSError as error:
            raise self._unusable(error) from None

    def _acquire(self, deadline: float) -> bool:
        make_private_directory(self.config.state_path)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Who released it may have removed the file that we opened.
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    return False
                time.sleep(0.02)
            except FileNotFoundError:
                pass
            os.close(descriptor)
        self.descriptor = descriptor
        self.unclean = os.fstat(descriptor).st_size > 0
        self.write_pid()
        return True

    def resume(self, descriptor: int, unclean: bool) -> None:
        """Go on with the lock that this process has had before an exec."""
        self.descriptor = descriptor
        self.unclean = unclean

    def write_pid(self) -> None:
        """Say that this process is the node; --daemon forks in between."""
        pid = b"%d\n" % os.getpid()
        os.pwrite(self.descriptor, pid, 0)
        os.ftruncate(self.descriptor, len(pid))

    def release(self, clean: bool) -> None:
        """Let another node run here; *clean*: it need not check out first."""
        remove_file(self.config.state_file("node.port"))
        if clean:
            remove_file(self.path)
        os.close(self.descriptor)

    def holder(self) -> int | None:
        """The pid of the node that has the lock; None where none has."""
        try:
            if is_locked(self.path):
                return int(read_file(self.path) or 0) or None
        except (FileNotFoundError, ValueError):
            pass
        except OSError as error:
            raise self._unusable(error) from None
        return None

    def _unusable(self, error: OSError) -> CrowdError:
        path = self.config.state_path
        return CrowdError(f"state_path: can't use {path}: {error.strerror}")


def allow_descriptors() -> None:
    """Raise the soft limit of open files, which macOS sets to 256."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class NotRunning(CrowdError):
    """There is no node to talk to."""

    status = EXIT_NOT_RUNNING


def pid_of_node(config: Config) -> int:
    """The pid of the node that runs here.  Raises NotRunning."""
    pid = NodeLock(config).holder()
    if pid is None:
        raise NotRunning("no node runs here")
    return pid


class Launch:
    """How the node is started, and what it keeps over an exec: descriptors.

    daemon, attended: which of them it is, if any.  waiting: the pipe on which --daemon
    waits to be told; listener: an earlier version's, after an upgrade."""

    def __init__(
        self,
        daemon: bool = False,
        attended: bool = False,
        waiting: int | None = None,
        listener: int | None = None,
    ) -> None:
        self.daemon = daemon
        self.attended = attended
        self.waiting = waiting
        self.listener = listener

    def tell(self, status: int, sentence: str = "") -> None:
        """Say how the start went, once, to whoever waits for it."""
        if self.waiting is not None:
            with contextlib.suppress(OSError):  # nobody waits any more
                os.write(self.waiting, f"{status} {sentence}".encode())
            os.close(self.waiting)
            self.waiting = None


def be_node(lock: NodeLock, load: Callable[[], Config], launch: Launch) -> int:
    """Be the node, with *lock* held, until a signal stops it.  Raises CrowdError,
    unless somebody else waits to be told."""
    try:
        run_node(lock, load, launch)
        return EXIT_OK
    except CrowdError as error:
        if launch.waiting is None:
            raise
        launch.tell(error.status, str(error))
        return error.status


def run_node(lock: NodeLock, load: Callable[[], Config], launch: Launch) -> None:
    """See be_node."""
    config = lock.config
    life = None
    try:
        import_node_modules()
        prepare_directories(config)
        # A job of --run may well save nothing; and what ran before an upgrade goes on.
        if not launch.attended and launch.listener is None:
            check_storage(config)
        log_path = config.state_file("node.log") if launch.daemon else None
        set_up_log(log_path, config.log_level)
        lock.write_pid()
        program = compiled(config)
        if program != PROGRAM and not IS_COMPILED and __name__ == "__main__":
            go_on_as(program, lock, launch)
        allow_descriptors()
        log_problems([("warning", warning) for warning in state_warnings(config)])
        life = Lifetime(config, load, program, lock.unclean, launch.listener)
        if launch.attended:
            start_thread(stop_at_end_of_input, life.signals)
        live(life, lock, launch)
    except (OSError, ImportError) as error:  # the latter without descriptors
        raise CrowdError(f"can't start: {error}") from None
    finally:
        is_new = launch.listener is None  # else central has units of ours
        lock.release(life.clean if life else is_new and not lock.unclean)


def live(life: Lifetime, lock: NodeLock, launch: Launch) -> None:
    """Run a node, and what comes after an upgrade; log what ends it."""
    try:
        if life.run(lambda: launch.tell(EXIT_OK)):
            launch.listener = life.server.fileno()
            go_on_as(life.program.path, lock, launch)
    except CrowdError as error:
        log.error("%s", error)
        raise
    except OSError as error:
        log.error("can't go on: %s", error)
        raise
    except Exception:
        log.exception("the node has died of a fault of its own")
        raise


ARENAS, ARENAS_BEFORE = "MALLOC_ARENA_MAX", "CROWDNODE_ARENA_MAX"


def go_on_as(program: str, lock: NodeLock, launch: Launch) -> None:
    """Go on as *program* in this process, with the same descriptors and at the same
    place, whatever the configuration says by now.  Raises OSError.

    Compiled, for the compiler's memory is not given back.  With one arena, for glibc
    would have one for each thread, and they would keep what large units leave in them
    (mallopt(3)).  Signals wait until the new program is ready for them."""
    kept = (lock.descriptor, launch.waiting, launch.listener)
    for descriptor in kept:
        if descriptor is not None:
            os.set_inheritable(descriptor, True)
    arguments = lock.config.arguments()
    arguments += ["--daemon"] if launch.daemon else []
    arguments += [ATTENDED_FLAG] if launch.attended else []
    resume = [*kept, lock.unclean, lock.config.place()]
    arguments += [RESUME_FLAG, json.dumps(resume)]
    environment = {ARENAS: "1", **os.environ, ARENAS_BEFORE: os.environ.get(ARENAS, "")}
    signal.pthread_sigmask(signal.SIG_BLOCK, NODE_SIGNALS)
    os.execve(sys.executable, [sys.executable, program, *arguments], environment)


def resume_node(
    config: Config, load: Callable[[], Config], arguments: argparse.Namespace
) -> int:
    """Go on as the node that this process was before go_on_as()."""
    locked, waiting, listener, unclean, place = json.loads(arguments.resume)
    for descriptor in (locked, waiting, listener):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    if not os.environ.pop(ARENAS_BEFORE, ""):
        os.environ.pop(ARENAS, None)  # it is not for actions
    config.warnings += config.keep_place(place)
    lock = NodeLock(config)
    lock.resume(locked, unclean)
    launch = Launch(arguments.daemon, arguments.attended, waiting, listener)
    return be_node(lock, load, launch)


def stop_at_end_of_input(signals: Signals) -> None:
    """Stop when whoever started the node has gone, and his end of the pipe with him."""
    while os.read(0, READ_SIZE):
        pass
    signals.feign(signal.SIGTERM)


def run_in_foreground(
    config: Config, load: Callable[[], Config], attended: bool
) -> int:
    """A node in the foreground, its log on standard error."""
    lock = NodeLock(config)
    if not lock.acquire(0.3):
        raise CrowdError(
            f"a node runs here already, as process {lock.holder()} "
            f"(state_path {config.state_path})"
        )
    return be_node(lock, load, Launch(attended=attended))


def run_in_background(config: Config, load: Callable[[], Config]) -> int:
    """--daemon: see to it that a node runs here.  Raises CrowdError."""
    os.closerange(3, 256)  # what cron or a shell has left open
    lock = NodeLock(config)
    give_up = time.monotonic() + WEDGED_AFTER
    while not lock.acquire(0):
        if ask(config, "/heartbeat"):
            return EXIT_OK
        if time.monotonic() > give_up:
            replace_node(lock)
            give_up = time.monotonic() + WEDGED_AFTER
        time.sleep(0.1)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        os.waitpid(pid, 0)
        return report_start(reader, config)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(EXIT_OK)
    return be_daemon(lock, load, writer)


def be_daemon(lock: NodeLock, load: Callable[[], Config], writer: int) -> int:
    """The background process: says on *writer* how the start went."""
    launch = Launch(daemon=True, waiting=writer)
    try:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
    except OSError as error:
        launch.tell(EXIT_FAILED, f"can't start: {error}")
        return EXIT_FAILED
    return be_node(lock, load, launch)


def report_start(reader: int, config: Config) -> int:
    """Wait until the background process has started, or says why it has not."""
    with open(reader, "rb") as pipe:
        status, _, message = pipe.read().decode().partition(" ")
    if not status:
        raise CrowdError(f"the node died; see {config.state_file('node.log')}")
    if message:
        print(f"crowdnode: {message}", file=sys.stderr)
    return int(status)


def replace_node(lock: NodeLock) -> None:
    """End a node that holds the lock and does not answer."""
    pid = lock.holder()
    if pid is None:
        return
    print(
        f"crowdnode: the node (process {pid}) has not answered for {WEDGED_AFTER} s; "
        "replacing it",
        file=sys.stderr,
    )
    end_node(lock, pid, TERM_GRACE)


def send_signal(pid: int, number: int) -> None:
    """Signal a node, if it is still there.  Raises CrowdError."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise CrowdError(f"the node, process {pid}, is another user's") from None


def end_node(lock: NodeLock, pid: int, patience: float) -> None:
    """TERM, KILL after *patience* seconds; returns when the lock is free."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        send_signal(pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if lock.holder() != pid:
                return
            time.sleep(0.02)
    raise CrowdError(f"process {pid} does not end")


def ask(config: Config, path: str) -> tuple[int, str] | None:
    """GET *path* from the node that runs here: status and body; None: no answer.

    Over a bare socket: http.client would cost --daemon, each minute, its import."""
    try:
        port = int(read_file(config.state_file("node.port")))
    except (OSError, ValueError):
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.bind, config.bind)
    request = f"GET {path} HTTP/1.0\r\nHost: {config.host}\r\n"
    if config.http_authentication:
        request += f"Authorization: {basic_credentials(config)}\r\n"
    try:
        with socket.create_connection((host, port), HEARTBEAT_DEADLINE) as connection:
            connection.sendall(f"{request}\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(READ_SIZE), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()
    except (OSError, ValueError, IndexError):
        return None


# ---------------------------------------------------------------------------
# Command line: what each command does, and what may be said with it.
# ---------------------------------------------------------------------------


def stop_node(config: Config) -> int:
    """--stop: have the node check out and end, and wait until it is gone."""
    patience = config.drain_time + CHECK_OUT_TIMEOUT + TERM_GRACE
    end_node(NodeLock(config), pid_of_node(config), patience)
    return EXIT_OK


def reload_node(config: Config) -> int:
    """--reload: have the node read everything anew; the log says how that went."""
    send_signal(pid_of_node(config), signal.SIGHUP)
    return EXIT_OK


def show_status(config: Config, as_json: bool) -> int:
    """--status: print what the node says that it does."""
    pid = pid_of_node(config)
    answer = ask(config, "/status")
    if answer is None or answer[0] != 200:
        how = {None: "does not answer", 403: "answers 403: allow leaves 127.0.0.1 out"}
        status = answer[0] if answer else None
        sentence = how.get(status, f"answers {status}")
        print(f"crowdnode: the node (process {pid}) {sentence}", file=sys.stderr)
        return EXIT_SILENT
    if as_json:
        print(answer[1])
    else:
        print_status(json.loads(answer[1]))
    return EXIT_OK


RED, GREEN, YELLOW, PLAIN = "\033[31m", "\033[32m", "\033[33m", "\033[0m"


def print_status(status: Json) -> None:
    """The status document, for people: in colour on a terminal that wants it."""
    central, counts = status["central"], status["counts"]
    checked_in = central["checked_in_ago"]
    memory = status["free_memory"]
    units = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in counts.items())
    rows = [
        ("node", f"{status['host']}:{status['port']}, process {status['pid']}, version "
         f"{status['version']}, up {ago(status['uptime'])}", ""),
        ("central", f"{central['url']}, checked in {ago(checked_in)}"
         + (" ago" if checked_in is not None else ""), ""),
        ("", central["error"], RED),
        ("work", f"refused: {status['reason']}" if status["overloaded"] else "taken",
         RED if status["overloaded"] else GREEN),
        ("load", measured(status["load_average"], "", "", None), ""),
        ("memory", f"{measured(memory, ' MB', '', None)} free", ""),
        ("actions", ", ".join(status["actions"]), ""),
        ("units", units, ""),
        ("unreported", str(status["unreported"]), YELLOW * bool(status["unreported"])),
        ("running", f"{len(status['running'])} of at most "
         f"{status['max_workers'] or 'any number'}", ""),
    ]  # fmt: skip
    for unit in status["running"]:
        of = f"unit {unit['id']:<8} {unit['action']:<16} {unit['stage']:<8}"
        rows.append(
            ("", f"{of} process {unit['pid'] or '':<8} {ago(unit['seconds'])}", "")
        )
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for name, value, colour in rows:
        if value and colour and in_colour:
            value = f"{colour}{value}{PLAIN}"
        if value:
            print(f"{name:<11}{value}")


# Classes of Ruby's core and library, and of what central loads.  An action of such a
# name breaks every action: "superclass mismatch".  Source: central.md.
RUBY_CLASSES = """
    action active_record active_support array base64 basic_object benchmark binding
    class cloud_crowd comparable complex data date date_time delegator digest dir
    encoding enumerable enumerator erb errno error etc event_machine exception
    false_class fiber file file_utils find float gc hash integer io job json kernel
    logger marshal match_data math method module monitor mutex net nil_class node
    numeric object object_space open_struct open_uri pathname proc process psych
    queue rack ractor random range rational regexp rest_client secure_random server
    set signal sinatra singleton socket string string_io struct symbol tempfile thin
    thread time timeout true_class unbound_method uri work_unit worker yaml zlib
""".split()  # noqa: SIM905


def ruby_problem(name: str) -> str | None:
    """Return why central can't have an action of this *name*, or None."""
    if name.lower() in RUBY_CLASSES:
        return (
            f"{camelized(name)} is a class of Ruby's own or of central's, which makes "
            "central fail every job: rename the action"
        )
    return None


def camelized(name: str) -> str:
    """Return the Ruby class name for *name*, as CloudCrowd's Inflector has it."""
    return re.sub(r"(?:^|_)(.)", lambda match: match[1].upper(), name)


STUB_MARK = "# Written by crowdnode.py --stubs"
STUB = """{mark}: central asks this class for the action's stages.
class {name} < CloudCrowd::Action
{methods}
end
"""


def write_stubs(config: Config, directory: str) -> int:
    """--stubs: the Ruby class of each action, for central's actions directory.

    What stands there and is not from here is left alone.  Raises CrowdError."""
    if not directory:
        raise UsageError("--stubs: DIR is empty")
    loader = ActionLoader(config)
    actions = loader.load()
    for level, sentence in loader.problems:
        print(f"{level}: {sentence}", file=sys.stderr)
    status = EXIT_OK
    try:
        os.makedirs(directory, exist_ok=True)
        for name, action in sorted(actions.items()):
            problem = ruby_problem(name)
            if problem:
                print(f"{name}: {problem}", file=sys.stderr)
                status = EXIT_FAILED
                continue
            path = os.path.join(directory, f"{name}.rb")
            stub = ruby_stub(name, stages_of(action)).encode()
            old = read_file(path) if os.path.exists(path) else stub
            if old != stub and not old.startswith(STUB_MARK.encode()):
                # crowd install has put CloudCrowd's own there.
                if BUILT_IN_ACTIONS.get(name) is not action:
                    print(f"{path}: is not of --stubs; left alone", file=sys.stderr)
                    status = EXIT_FAILED
                continue
            write_file(path, stub)
            print(path)
    except OSError as error:
        where = error.filename or directory
        raise CrowdError(f"--stubs: can't write {where}: {error.strerror}") from None
    return status


def ruby_stub(name: str, stages: list[str]) -> str:
    """The class that CloudCrowd's Inflector.camelize looks for, with empty stages."""
    methods = "".join(f"  def {stage}\n  end\n" for stage in stages)
    return STUB.format(
        mark=STUB_MARK, name=camelized(name), methods=methods.rstrip("\n")
    )


def check(config: Config) -> int:
    """--check: a line each for what is in order and what is not."""
    lines = [("ok", f"configuration: {config.file or 'no file, all defaults'}")]
    loader = ActionLoader(config)
    names = sorted(loader.load())
    actions = ", ".join(names)
    lines += loader.problems
    problems = {name: ruby_problem(name) for name in names}
    lines += [
        ("error", f"action {name}: {problem}")
        for name, problem in problems.items()
        if problem
    ]
    lines.append(("ok", f"actions: {actions}") if actions else ("error", "no action"))
    try:
        prepare_directories(config)
        check_storage(config)
        lines.append(("ok", f"directories: {config.state_path}"))
        lines += [("warning", warning) for warning in state_warnings(config)]
    except CrowdError as error:
        lines.append(("error", str(error)))
    lines += host_problems(config) or [("ok", f"host: {config.host} resolves")]
    lines += check_central(config)
    for level, sentence in lines:
        print(f"{'ok' if level == 'info' else level}: {sentence}")
    return EXIT_FAILED if "error" in dict(lines) else EXIT_OK


def check_central(config: Config) -> list[tuple[str, str]]:
    """Is what answers as central one, and are the clocks right?"""
    name = f"central: {config.central_server}"
    now = time.time()
    try:
        body, date = Central(config, config.port).heartbeat()
    except CentralError as error:
        return [("error", f"{name}: {error}")]
    if body.strip() != HEARTBEAT.encode():
        sentence = (
            f"{name} answers, but is no CloudCrowd: its heartbeat is not {HEARTBEAT}: "
            "check central_server, and what stands before it"
        )
        return [("error", sentence)]
    found = [("ok", f"{name} answers")]
    # Thin, for one, tells no time.
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        from email.utils import parsedate_to_datetime

        off = now - parsedate_to_datetime(date or "").timestamp()
        if abs(off) > CLOCK_TOLERANCE:
            sentence = f"clock: {off:+.0f} s off central's: set one of them right"
            found.append(("warning", sentence))
    return found


def run_job(config: Config, arguments: argparse.Namespace) -> int:
    """--run: do a job here, and print its outputs."""
    inputs = arguments.inputs
    if "-" in inputs:
        lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        place = inputs.index("-")
        inputs[place : place + 1] = lines
    if not inputs:
        raise UsageError("--run: needs at least one INPUT")
    try:
        options = strict_json(arguments.options or "{}")
    except ValueError as error:
        raise UsageError(
            f"--options {arguments.options}: is not JSON: {error}"
        ) from None
    if not isinstance(options, dict):
        raise UsageError(f"--options {arguments.options}: must be a JSON object")
    given = inputs if arguments.strings else [input_of(item) for item in inputs]
    return LocalRun(config, arguments.run, options, given, arguments).run()


COMMANDS = (
    ("--daemon", "see to it that a node runs here, in the background"),
    ("--check", "is all in order?"),
    ("--status", "what does the node do?"),
    ("--stop", "stop the node and wait until it is gone"),
    ("--reload", "have the node read configuration and actions anew"),
)
# Options with the command that each goes with, "" for all; and what each takes, "" for
# nothing.
OPTIONS = (
    ("--config", "", "FILE", "default: crowdnode.conf here, else beside this file"),
    ("--port", "", "N", "the same as --set port=N"),
    ("--options", "run", "JSON", "the options of the job"),
    ("--output", "run", "FILE", "where the outputs go instead of standard output"),
    ("--strings", "run", "", "inputs are strings"),
    ("--quiet", "run", "", "no progress"),
    ("--keep-going", "run", "", "go on where an input has failed (the default)"),
    ("--fail-fast", "run", "", "stop where an input has failed"),
    ("--json", "status", "", "the document"),
)

HELP_EPILOG = """\
configuration:
  Its keys and their defaults stand in crowdnode.conf. Each may be given as
  --set KEY=VALUE, too. A node whose central is on this machine needs none.

files, in state_path (~/.crowdnode):
  node.log, node.log.1 ...  the log of --daemon
  node.pid, node.port       who runs, and where
  units/, work/, storage/   records, work directories, what actions save

exit status:
  0  done                                 2  usage or configuration
  1  could not start, or the job failed   3  no node runs here
  130  Ctrl-C during --run                4  it runs, and does not answer

examples:
  crowdnode.py --run word_count *.txt
  find . -name '*.pdf' | crowdnode.py --run process_pdfs - --output result.json
  crowdnode.py --config /etc/crowdnode.conf --check

in a crontab:
  * * * * * /usr/bin/python3 /opt/crowdnode/crowdnode.py --daemon
"""


def command_line_parser() -> argparse.ArgumentParser:
    """What the command line may hold; this program's flags for itself are hidden."""
    parser = argparse.ArgumentParser(
        prog="crowdnode.py",
        usage="%(prog)s [COMMAND] [OPTION]... [INPUT]...",
        description="A node of CloudCrowd. Without a command: in the foreground, with\n"
        "its log on standard error, until TERM or Ctrl-C.",
        epilog=HELP_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    commands = parser.add_argument_group("commands")
    command = commands.add_mutually_exclusive_group()
    for name, does in COMMANDS:
        command.add_argument(name, action="store_true", help=does)
    command.add_argument("--run", metavar="ACTION", help="do one job on this machine")
    command.add_argument(
        "--stubs", metavar="DIR", help="write what central must know of the actions"
    )
    version = f"crowdnode {__version__}"
    command.add_argument(
        "--version", action="version", version=version, help="say which this is"
    )
    command.add_argument("--help", "-h", action="help", help="show this")
    command.add_argument(ATTENDED_FLAG, action="store_true", help=argparse.SUPPRESS)
    add_options(parser.add_argument_group("options"))
    return parser


def add_options(options: Any) -> None:
    """Add what goes with a command; *options*: a group of argparse."""
    options.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="with --run: a file, a URL, with --strings any string; - is the lines of "
        "standard input",
    )
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="wins over FILE"
    )
    for name, command, takes, does in OPTIONS:
        does = f"with --{command}: {does}" if command else does
        if takes:
            options.add_argument(name, metavar=takes, help=does)
        else:
            options.add_argument(name, action="store_true", help=does)
    options.add_argument(RESUME_FLAG, help=argparse.SUPPRESS)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; argparse ends the process with 2 where it is wrong."""
    parser = command_line_parser()
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_intermixed_args(argv[:end])
    arguments.inputs += argv[end + 1 :]
    for option, command, _, _ in OPTIONS:
        value = getattr(arguments, option[2:].replace("-", "_"))
        if command and value not in (None, False) and not getattr(arguments, command):
            parser.error(f"{option} goes with --{command}")
    if arguments.keep_going and arguments.fail_fast:
        parser.error("--fail-fast is the opposite of --keep-going")
    if arguments.inputs and not arguments.run:
        parser.error(f"unrecognized arguments: {' '.join(arguments.inputs)}")
    return arguments


def parse_settings(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """What --set and --port say, in pairs.  Raises UsageError."""
    settings = []
    for setting in arguments.set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: must be KEY=VALUE")
        settings.append((key.strip(), value))
    if arguments.port is not None:
        settings.append(("port", arguments.port))
    return settings


def run_command(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for.  Raises CrowdError."""
    path = find_config()
    if arguments.config is not None:  # empty: none
        path = os.path.abspath(arguments.config) if arguments.config else None
    settings = parse_settings(arguments)

    def load() -> Config:
        return load_config(path, settings)

    config = load()
    if arguments.resume:
        return resume_node(config, load, arguments)
    if arguments.daemon:
        return run_in_background(config, load)
    if arguments.stop:
        return stop_node(config)
    if arguments.reload:
        return reload_node(config)
    if arguments.status:
        return show_status(config, arguments.json)
    import_node_modules()  # --daemon, each minute, does without
    if arguments.check:
        return check(config)
    if arguments.stubs is not None:
        return write_stubs(config, arguments.stubs)
    if arguments.run is not None:
        return run_job(config, arguments)
    return run_in_foreground(config, load, arguments.attended)


def open_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, what is opened first would get its number."""
    descriptor = 0
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """The command line.  Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        open_standard_descriptors()
        if words[:1] == [FORK_SERVER_FLAG]:
            return run_fork_server(int(words[1]))
        import_command_modules()
        status = run_command(parse_arguments(words))
        sys.stdout.flush()
        return status
    except CrowdError as error:
        print(f"crowdnode: {error}", file=sys.stderr)
        return error.status
    except OSError as error:  # standard output: a full disk, a reader that has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno != errno.EPIPE:
            print(f"crowdnode: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
