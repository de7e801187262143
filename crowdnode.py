#!/usr/bin/env python3
"""crowdnode: the Node of CloudCrowd, in one file, with the standard library alone.

CloudCrowd is a map-reduce system for expensive document work.  A central server cuts
jobs into work units.  A node checks in with central, is handed units over HTTP, forks a
worker for each, and reports each outcome.

    crowdnode.py                          a node in the foreground, log on stderr
    crowdnode.py --daemon                 in the background; from cron, once a minute
    crowdnode.py --run ACTION INPUT...    one job on this machine, nothing else needed
    crowdnode.py --check                  preflight checks
    crowdnode.py --status | --stop | --reload
    crowdnode.py --stubs DIR              the Ruby classes that central needs

Processes:

    node             threads: routes, Timer loops, reporters     never calls os.fork
     - fork server   one thread, no network: forks, reaps, keeps time
        - worker     one per unit, leader of its own session: runs the action,
                     leaves its outcome on disk, exits

A fork of a process with threads can copy a lock in its locked state, so only the fork
server forks, with one thread.  The cost of a fork grows with the parent's memory, so
the fork server executes only the first half of this file.  An outcome is on disk before
it is on the wire, and only the node uses the network: each process may be killed at any
moment.

Node.accept takes a unit, Node.settle handles the end of its worker, Node.report_units
reports its outcome.  After a crash, Node.adopt_records continues from the records.

Routes:   GET /heartbeat     "buh-bump"
          POST /work         {"pid": 4711}: the unit is accepted, and will be reported
          GET /status        what the node is doing, as JSON; /metrics for Prometheus,
                             and / for people

Signals:  TERM, INT, QUIT    refuse work, wait up to drain_time, check out, exit; a
                             second one skips the waiting
          HUP                read the configuration and the actions again, reopen the
                             log; where this file has changed, go on as the new version

Files, in state_path:
          node.pid              the lock file: process, port, name checked in with
          node.log, node.log.N  the log of --daemon, rotated
          fork_server.out       what the actions' modules print when they load
          units/ID              a unit's record; locked while its worker lives
          units/ID.out          what the unit's action prints
          work/ACTION/unit_ID   its work directory

Exit status: 0 done; 1 could not start, or the job failed; 2 usage or configuration;
          3 no node runs here; 4 it runs but does not answer; 130 Ctrl-C during --run
"""

from __future__ import annotations

import os
import sys

if os.name != "posix":
    print("crowdnode needs Linux or macOS: it forks its workers.", file=sys.stderr)
    raise SystemExit(2)

import contextlib
import errno
import fcntl
import json
import re
import selectors
import signal
import socket
import time
import types

# Set by LAUNCH in the fork server, which executes only the first half of this file.
FORK_SERVER = bool(globals().get("FORK_SERVER"))
if not FORK_SERVER:  # each import makes the fork server larger, and so each fork slower
    import _thread
    import argparse
    import base64
    import binascii
    import bisect
    import calendar
    import concurrent.futures
    import configparser
    import faulthandler
    import hashlib
    import hmac
    import html
    import http.client
    import http.server
    import ipaddress
    import logging
    import logging.handlers
    import math
    import mimetypes
    import queue
    import random
    import shutil
    import struct
    import subprocess
    import tempfile
    import textwrap
    import threading
    import urllib.error
    import urllib.parse
    import urllib.request
    from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterable, List, NoReturn, Tuple

    Fields = List[Tuple[str, bytes]]
    Json = Dict[str, Any]
    Kind = Tuple[str, Callable[[str], Any]]  # of a configuration's value

__version__ = "2.0.0"

PROGRAM = os.path.realpath(__file__)  # absolute: --daemon changes the directory
PYTHON = sys.executable or "/proc/self/exe"  # empty for a bare "python3" without PATH
# ---------------------------------------------------------------------------
# Constants and errors that more than one part needs.
# ---------------------------------------------------------------------------

DEFAULT_PORT = 9063
HEARTBEAT = "buh-bump"  # what both sides answer to GET /heartbeat

LOAD_DEADLINE = 60  # seconds for the fork server to load the actions
TERM_GRACE = 10  # seconds from TERM to KILL of a node
KILL_GRACE = 1  # seconds from TERM to KILL of a unit
TRANSFER_TIMEOUT = 60  # seconds without a byte

READ_SIZE = 64 * 1024  # bytes
MEGABYTE, GIGABYTE = 1024**2, 1024**3  # bytes
OUTPUT_TAIL = 64 * 1024  # bytes of a unit's printing that reach the log
OUTPUT_LIMIT = 16 * OUTPUT_TAIL  # bytes at which its file is cut back
MESSAGE_TAIL = 2000  # bytes of standard error in a failure's message
FAILURE_LIMIT = 100_000  # characters of a failure's message; central takes some 4 MB
NESTING_LIMIT = 99  # levels of an output; Ruby's JSON takes 100, {"output": ...} is one

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING, EXIT_SILENT = range(5)
EXIT_INTERRUPTED = 130
RED, GREEN, YELLOW, PLAIN = "\033[31m", "\033[32m", "\033[33m", "\033[0m"

PROCESSING, SPLITTING, MERGING = 1, 4, 5  # a unit's status; 2 and 3 are outcomes
STAGES = {PROCESSING: "process", SPLITTING: "split", MERGING: "merge"}
NODE_SIGNALS = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}

UNIT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
ACTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,199}")  # it names a directory, too

ATTENDED_FLAG = "--attended"  # internal: stop when standard input ends
INHERIT_FLAG = "--inherit"  # internal: the descriptors of lock and listener


class CrowdError(Exception):
    """An error whose message the user sees; *status* is the exit status."""

    status = EXIT_FAILED


class UsageError(CrowdError):
    """The command line or the configuration is wrong."""

    status = EXIT_USAGE


class NotRunning(CrowdError):
    """There is no node to talk to."""

    status = EXIT_NOT_RUNNING


class NodeOverloaded(Exception):
    """The node rejects the unit for now; central sends it again."""


class ActionFailed(Exception):
    """The unit failed for the reason given, which needs no traceback."""


# ---------------------------------------------------------------------------
# Helpers: JSON, URLs, files, processes and their identity.
# ---------------------------------------------------------------------------


def finite(text: str) -> float:
    """Parse a number of JSON; refuse infinity, NaN and what exceeds a float."""
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError(f"{text[:50]} is out of range")
    return value


DECODER = json.JSONDecoder(parse_constant=finite, parse_float=finite)
URL = re.compile(r"(?:file:/|(?:https?|ftp)://)[!-~]+", re.IGNORECASE)
WEB_URL = re.compile(r"(?:https?|ftp):", re.IGNORECASE)


def strict_json(text: str) -> Any:
    """Parse *text* as JSON, without NaN and Infinity.  Raises ValueError."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def to_json(value: Any) -> str:
    """Return *value* as compact JSON text, not escaped, as CloudCrowd writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def is_url(text: str) -> bool:
    """Return whether *text* is a URL to download (protocol.md, "The unit")."""
    return URL.fullmatch(text) is not None


def without_password(url: str) -> str:
    """Return *url* without the user and the password in it."""
    return re.sub(r"\A([a-z]+://)[^/?#]*@", r"\1", url, flags=re.IGNORECASE)


def without_secrets(url: str) -> str:
    """Return *url* for people: without a password and without a query."""
    return without_password(url).partition("?")[0]


def file_url(path: str) -> str:
    """Return the ``file:`` URL of *path*, in ASCII."""
    data, unsafe = os.fsencode(path), rb"[^!$&-;=@-Z_a-z~]"
    quoted = re.sub(unsafe, lambda found: b"%%%02X" % ord(found[0]), data)
    return f"file://{quoted.decode()}"


def percent_decoded(url: str) -> bytes:
    """Return the bytes of *url* with each %XX decoded."""
    data = url.encode("utf-8", "surrogateescape")
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda found: bytes([int(found[1], 16)]), data)


def local_path(url: str) -> str:
    """Return the path that a ``file:`` URL names: the decoded one, unless only the
    literal one exists, for CloudCrowd does not encode."""
    path = re.sub(r"\Afile:(//(localhost(?=/))?)?", "", url, flags=re.IGNORECASE)
    decoded = os.fsdecode(percent_decoded(path))
    return path if os.path.exists(path) and not os.path.exists(decoded) else decoded


def read_file(path: str, tail: int = -1) -> bytes:
    """Return the content of the file at *path*, or its last *tail* bytes."""
    with open(path, "rb", 0) as file:
        if 0 <= tail < os.fstat(file.fileno()).st_size:
            file.seek(-tail, os.SEEK_END)
        return file.read()


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of *data*; os.write may stop early on a disk that fills up."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def base_name(url: str) -> str:
    """Return the last part of the path of *url*, decoded."""
    name = without_secrets(url).rstrip("/").rpartition("/")[2]
    return percent_decoded(name).decode("utf-8", "replace")


def is_readable(descriptor: int, seconds: float | None) -> bool:
    """Wait until there is something to read; return False after *seconds*."""
    with selectors.PollSelector() as selector:  # epoll takes one more descriptor
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def remove_file(path: str) -> None:
    """Remove the file at *path*, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def copy_file(source: str, target: str) -> None:
    """Copy *source* into a private file.  (To import shutil costs a worker 5 ms.)"""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(source, "rb", 0) as reader, open(descriptor, "wb", 0) as writer:
        for piece in iter(lambda: reader.read(MEGABYTE), b""):
            write_all(writer.fileno(), piece)


def make_private_directory(path: str) -> None:
    """Make *path* and its missing parents, all with mode 0700.  Raises OSError."""
    if not os.path.isdir(path):
        make_private_directory(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(path, 0o700)


def signal_name(number: int) -> str:
    """Return ``SIGKILL`` for 9; real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def wake_up(number: int, frame: Any) -> None:
    """Do nothing: a signal with a handler is written to the wakeup descriptor."""


def kill_group(pid: int, number: int) -> None:
    """Signal the process group that *pid* leads, or *pid* where it leads none yet; only
    for a child that has not been reaped, or after is_same_process()."""
    for kill in (os.killpg, os.kill):
        # macOS: PermissionError where the group has only zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, number)
            return


PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl.h
M_ARENA_MAX = -8  # of glibc's malloc.h

own_children: set[int] = set()  # pids of children that end_strays() must not reap


def call_c(name: str, *arguments: int) -> None:
    """Call a function of the C library that Python lacks; do nothing without it."""
    with contextlib.suppress(ImportError, AttributeError):
        import ctypes

        getattr(ctypes.pythonapi, name)(*arguments)


def become_subreaper() -> None:
    """Become the parent of descendants that lose theirs (Linux alone)."""
    call_c("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def child_pids() -> set[int]:
    """Return this process's children (Linux's proc(5)); the empty set elsewhere."""
    found: set[int] = set()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            for task in os.listdir("/proc/self/task"):
                pids = read_file(f"/proc/self/task/{task}/children").split()
                found.update(map(int, pids))
    return found


# In the environment of all that a node has started, and of nothing else that becomes
# its child, such as what a shell started that then executed this program.
NODE_VARIABLE = "CROWDNODE_NODE"


def is_descendant(pid: int) -> bool:
    """Return whether this node has started the process *pid*, or one of its ancestors,
    and its environment still says so (Linux's proc(5))."""
    mark = f"{NODE_VARIABLE}={os.getpid()}".encode()
    with contextlib.suppress(OSError):
        return mark in read_file(f"/proc/{pid}/environ").split(b"\0")
    return False


def run_command(
    command: list[str], seconds: float, env: dict[str, str] | None = None
) -> tuple[int, bytes, bytes]:
    """Run a program; return its exit status, standard output and standard error.

    Raises OSError, which TimeoutError is: the program is killed after *seconds*."""
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, env=env, stdin=null, stdout=pipe, stderr=pipe, start_new_session=True
    ) as child:
        own_children.add(child.pid)
        try:
            output, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            kill_group(child.pid, signal.SIGKILL)
            raise TimeoutError(str(error)) from None
        finally:
            own_children.discard(child.pid)
    return child.returncode, output, errors


def iso_time(moment: float | None) -> str | None:
    """Return a time.time() as ISO 8601 in UTC."""
    form = "%Y-%m-%dT%H:%M:%SZ"
    return None if moment is None else time.strftime(form, time.gmtime(moment))


def boot_clock() -> float:
    """Return seconds since the boot (Linux) or since 1970 (macOS): process times."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_REALTIME))


def this_machine() -> Json:
    """Return host name, boot id and pid namespace: together these make a pid unique."""
    boot_id = namespace = ""
    with contextlib.suppress(OSError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "kern.bootsessionuuid"]
            boot_id = run_command(command, 5)[1].decode()
        else:
            boot_id = read_file("/proc/sys/kernel/random/boot_id").decode().strip()
            namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot_id": boot_id, "namespace": namespace}


# Computed by the node, which hands it to its fork servers.
THIS_MACHINE: Json = {} if FORK_SERVER else this_machine()
# Seconds; macOS's ps prints whole ones.
START_TOLERANCE = 2.0 if sys.platform == "darwin" else 0.5


def start_of_process(pid: int) -> float | None:
    """Return when the process *pid* began, by boot_clock(); None where it has ended, as
    a zombie has.  Raises OSError where it can't be read now."""
    try:
        if sys.platform == "darwin":
            command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
            words = run_command(command, 5, {**os.environ, "LC_ALL": "C"})[1].split()
            text = b" ".join(words[1:]).decode()
            began = time.mktime(time.strptime(text, "%a %b %d %H:%M:%S %Y"))
        else:
            words = read_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()
            began = int(words[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
        return None if words[0][:1] in b"ZX" else began
    except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
        return None


def is_same_process(pid: int | None, started: float, machine: Json) -> bool:
    """Return whether *pid* is still the process that began at *started* on *machine*:
    after a restart, or on a machine that shares the directory, it may be another one.

    Call it before each signal to a process that is not our child.  Raises OSError."""
    keys = ("boot_id", "namespace")
    if not pid or any(machine.get(key) != THIS_MACHINE[key] for key in keys):
        return False
    actual = start_of_process(pid)
    return actual is not None and abs(actual - started) < START_TOLERANCE


# ---------------------------------------------------------------------------
# Configuration: the keys, their defaults, and what their values must be.
# ---------------------------------------------------------------------------


def number(
    low: float, high: float, what: str = "", kind: type[float] = float, units: str = ""
) -> Kind:
    """Return the kind of numbers from *low* to *high*, of the type *kind*; *units*:
    letters of UNITS that may follow the number."""

    def convert(value: str) -> float:
        has_unit = value[-1:] in tuple(units)
        result = kind(value[:-1]) * UNITS[value[-1]] if has_unit else kind(value)
        if not value.isascii() or not low <= result <= high:
            raise ValueError
        return result

    name = "a whole number" if kind is int else "a number"
    return f"{name} from {low:g} to {high:.12g}{what}", convert


def matching(pattern: str, sentence: str = "") -> Kind:
    """Return the kind of texts that match *pattern*, which *sentence* describes."""

    def convert(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return sentence or pattern.replace("|", " or "), convert


def word_list(value: str) -> list[str]:
    """Return the words that commas or blanks separate."""
    return value.replace(",", " ").split()


def web_address(value: str) -> str:
    """Return the URL of a server without a slash at its end."""
    parts = urllib.parse.urlsplit(value)
    has_form = re.fullmatch(r"(?i)https?://[!->@-~]+", value)  # without a query
    if not has_form or not parts.hostname or parts.port == 0:
        raise ValueError
    return value.rstrip("/")


def stage_names(value: str) -> list[str]:
    """Return the stages of an executable action."""
    stages = word_list(value)
    if "process" not in stages or set(stages) - set(STAGES.values()):
        raise ValueError
    return stages


# A kind is what a value must be, in words, and the function that converts its text, or
# raises ValueError or KeyError.
TEXT: Kind = ("text", str)
WORDS: Kind = ("words", word_list)
BOOLEAN: Kind = (
    "yes or no",
    lambda value: configparser.ConfigParser.BOOLEAN_STATES[value.lower()],
)
UNITS = {"m": 60, "h": 3600, "d": 86400, "M": 1, "G": 1024}  # seconds, MB
SIZE = number(1, 1_000_000, " MB, such as 500M or 2G", units="MG")
IN_SECONDS = " seconds, such as 90, 10m, 2h or 1d"
SECONDS = number(0.1, 2_000_000, IN_SECONDS, units="mhd")  # poll: 2**31 milliseconds
ASCII = matching(r"[!-~]*", "ASCII without blanks")
HOST = matching(
    r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})|\[[0-9A-Fa-f:.]+\]",
    "a host name or an address, without port or path",
)
WEB_ADDRESS: Kind = ("a URL such as http://central.example:9173", web_address)
ADDRESS: Kind = (
    "an IP address, 0.0.0.0 for all",
    lambda value: str(ipaddress.ip_address(value)),
)
NETWORKS: Kind = (
    "addresses or networks such as 10.1.0.0/16, without host bits",
    lambda value: [str(ipaddress.ip_network(word)) for word in word_list(value)],
)
BUCKET = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]",
    "3 to 63 letters, digits, dots, - and _",
)
# The asset stores, and the keys that each needs.
STORAGES: dict[str, tuple[str, ...]] = {
    "filesystem": (),
    "s3": ("s3_bucket", "aws_access_key", "aws_secret_key"),
}
# The keys of [node], in the order of crowdnode.conf: the default as it would be written
# there ("" for none, which is None to the program), and the kind.
NODE_KEYS: dict[str, tuple[str, Kind]] = {
    "central_server": ("http://localhost:9173", WEB_ADDRESS),
    "dialect": ("auto", matching(r"auto|seed|0\.5", "auto or seed or 0.5")),
    "central_timeout": ("30", SECONDS),
    "report_timeout": ("300", SECONDS),
    "host": ("", HOST),
    "port": (str(DEFAULT_PORT), number(0, 65535, kind=int)),
    "bind": ("0.0.0.0", ADDRESS),
    "tag": ("", TEXT),
    "http_authentication": ("no", BOOLEAN),
    "login": ("", TEXT),
    "password": ("", TEXT),
    "allow": ("", NETWORKS),
    "max_request_size": ("64", SIZE),
    "drain_time": ("30", number(0, 1_000_000, IN_SECONDS, units="mhd")),
    "log_level": ("info", matching("debug|info|warning|error")),
    "max_workers": ("", number(0, 100_000, kind=int)),
    "max_load": ("", number(0.01, 100_000)),
    "min_free_memory": ("", SIZE),
    "min_available_memory": ("", SIZE),
    "actions_path": ("actions", TEXT),
    "disable_default_actions": ("no", BOOLEAN),
    "disabled_actions": ("", WORDS),
    "time_limit": ("", SECONDS),
    "memory_limit": ("", SIZE),
    "file_limit": ("", SIZE),
    "nice": ("5", number(0, 19, kind=int)),
    "work_unit_retries": ("3", number(1, 1000, kind=int)),
    "state_path": ("~/.crowdnode", TEXT),
    "temp_storage_path": ("", TEXT),
    "storage": ("filesystem", matching("|".join(STORAGES))),
    "local_storage_path": ("", TEXT),
    "s3_bucket": ("", BUCKET),
    "aws_access_key": ("", ASCII),
    "aws_secret_key": ("", ASCII),
    "s3_authentication": ("no", BOOLEAN),
    "s3_region": ("us-east-1", ASCII),
    "s3_endpoint": ("", WEB_ADDRESS),
}
LIMITS = ("time_limit", "memory_limit", "file_limit", "nice")  # see Config.limit
# The keys of a section [action NAME].
ACTION_KEYS: dict[str, tuple[str, Kind]] = {
    "stages": ("", ("process, and may add split and merge", stage_names)),
    **{name: ("", NODE_KEYS[name][1]) for name in LIMITS},
}
SECRETS = ("password", "aws_secret_key")  # keys that others should not read
# The keys by which --stop, --status and --reload find a node that runs.
KEYS_OF_COMMANDS = (
    "state_path", "bind", "http_authentication", "login", "password", "drain_time",
)  # fmt: skip
FIXED_KEYS = ("state_path", "temp_storage_path", "host", "port", "bind")  # at a reload
COMMAND_LINE = "command line:"  # in the place of FILE: [SECTION]


class Config(types.SimpleNamespace):
    """The configuration: an attribute for each key of NODE_KEYS, *file* (its path, or
    None), *settings* (pairs from the command line), *actions* (the sections [action
    NAME]), *warnings* about what is valid, but probably not intended, and *is_job*: it
    is that of a job of --run."""

    def limit(self, action: str, name: str) -> Any:
        """Return time_limit, memory_limit, file_limit or nice of *action*."""
        value = self.actions.get(action, {}).get(name)
        return getattr(self, name) if value is None else value

    def state_file(self, name: str) -> str:
        """Return the path of *name* in state_path."""
        return os.path.join(self.state_path, name)

    @property
    def units_path(self) -> str:
        """The directory of unit records."""
        return self.state_file("units")

    def arguments(self) -> list[str]:
        """Return the command line's options for this configuration."""
        options = [f"--set={name}={value}" for name, value in self.settings]
        return ["--config", self.file or "", *options]

    def keep_fixed_keys(self, old: Config) -> None:
        """Copy FIXED_KEYS from *old*, and warn about those that differ."""
        for name in FIXED_KEYS:
            if getattr(self, name) != getattr(old, name):
                setattr(self, name, getattr(old, name))
                self.warnings.append(f"{name} has changed; restart the node to use it")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint: the known word nearest to *word*, or all of them."""
    import difflib  # for this one sentence

    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def parse_value(where: str, name: str, value: str, keys: Json) -> Any:
    """Return the *value* of *name*, one of *keys*, at *where*.  Raises UsageError."""
    if name not in keys:
        raise UsageError(f"{where} {name}: unknown key: {nearest(name, keys)}")
    if "\0" in value or "\n" in value:
        raise UsageError(f"{where} {name}: must be a single line of text")
    default, (sentence, convert) = keys[name]
    try:
        return convert(value or default) if value or default else None
    except (ValueError, KeyError):
        raise UsageError(f"{where} {name} = {value}: must be {sentence}") from None


def new_parser(strict: bool) -> configparser.RawConfigParser:
    """Return a parser of INI files that leaves names as they are."""
    parser = configparser.RawConfigParser(default_section="\0", strict=strict)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    return parser


def read_sections(path: str | None) -> dict[str, dict[str, str]]:
    """Return the sections of the INI file at *path*, if any.  Raises UsageError."""
    parser = new_parser(strict=True)
    try:
        if path:
            with open(path, encoding="utf-8-sig") as file:
                parser.read_file(file, path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read: {error}") from None
    except configparser.DuplicateSectionError as error:
        raise UsageError(f"{path}: [{error.section}] appears twice") from None
    except configparser.DuplicateOptionError as error:
        where = f"{path}: [{error.section}] {error.option}"
        raise UsageError(f"{where}: appears twice; remove one") from None
    except configparser.Error as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not an INI file (KEY = VALUE): {reason}") from None
    return {name: dict(parser.items(name)) for name in parser.sections()}


def load_config(
    path: str | None,
    settings: list[tuple[str, str]],
    sections: dict[str, dict[str, str]] | None = None,
) -> Config:
    """Read the file at *path*, if there is one; *settings* override it.

    *sections*: what to use of the file instead of all.  Raises UsageError, naming file,
    section, key, value and the remedy."""
    given = {name: ("", default) for name, (default, _) in NODE_KEYS.items()}
    actions: dict[str, Json] = {}
    for section, pairs in (sections or read_sections(path)).items():
        where, items = f"{path}: [{section}]", pairs.items()
        if section == "node":
            given.update({name: (where, value) for name, value in items})
        elif section.startswith("action ") and ACTION_NAME.fullmatch(section[7:]):
            actions[section[7:]] = {
                name: parse_value(where, name, text, ACTION_KEYS)
                for name, text in items
            }
        else:
            known = nearest(section, ["node", "action NAME"])
            raise UsageError(f"{where}: unknown section: {known}")
    given.update({name: (COMMAND_LINE, value.strip()) for name, value in settings})
    config = Config(file=path, settings=settings, actions=actions, is_job=False)
    for name, (where, value) in given.items():
        setattr(config, name, parse_value(where, name, value, NODE_KEYS))
    config.warnings = []
    complete_config(config, given)
    return config


def find_config_of_node(path: str | None, settings: list[tuple[str, str]]) -> Config:
    """Load the configuration as far as a node that runs is found by it: faults in other
    keys do not matter.  Raises UsageError."""
    try:
        return load_config(path, settings)
    except UsageError:
        parser = new_parser(strict=False)
        with contextlib.suppress(OSError, configparser.Error), open(
            path or os.devnull, encoding="utf-8-sig", errors="replace"
        ) as file:
            parser.read_file(file)
        if not parser.has_section("node"):
            raise
        pairs = dict(parser.items("node")).items()
        for keys in (KEYS_OF_COMMANDS, KEYS_OF_COMMANDS[:1]):
            with contextlib.suppress(UsageError):
                node = {name: value for name, value in pairs if name in keys}
                return load_config(path, settings, {"node": node})
        raise


def complete_config(config: Config, given: dict[str, tuple[str, str]]) -> None:
    """Derive defaults from the machine and from other keys, and check combinations.

    *given*: the place of each key ("" for a default), and its text."""

    def refuse(name: str, sentence: str) -> None:
        where, text = given[name]
        shown = f"{name} = {text}" if text else name
        raise UsageError(f"{where} {shown}: {sentence}".lstrip())

    base = os.path.dirname(config.file or PROGRAM)
    in_state_path = {"temp_storage_path": "work", "local_storage_path": "storage"}
    for name in ("state_path", *in_state_path, "actions_path"):
        path = getattr(config, name) or config.state_file(in_state_path[name])
        path = os.path.expanduser(path)
        if path.startswith("~"):
            refuse(name, f"there is no such home directory: set HOME, or {name}")
        setattr(config, name, os.path.normpath(os.path.join(base, path)))
    config.host = config.host or socket.gethostname()
    try:
        HOST[1](config.host)
    except ValueError:
        wrong = f'this machine\'s name, "{config.host}", is not one that central can'
        refuse("host", f"{wrong} dial: set host to one, or to an address")
    config.disabled_actions = config.disabled_actions or []
    if config.max_workers is None:
        config.max_workers = processors()
    keys_for = {"central_server": "login and password", "s3_endpoint": "aws_secret_key"}
    for name, keys in keys_for.items():
        if "@" in (getattr(config, name) or ""):
            refuse(name, f"must not hold a password; use {keys}")
    if config.http_authentication and not (config.login and config.password):
        refuse("http_authentication", "needs login and password too")
    if not f"{config.login}{config.password}".isascii():
        danger = "central compares characters outside ASCII differently"
        config.warnings.append(f"login, password: {danger}: use only ASCII")
    if ":" in (config.login or ""):
        refuse("login", "must not hold a colon, which ends the login in HTTP Basic")
    for name in STORAGES[config.storage]:
        if not getattr(config, name):
            refuse("storage", f"needs {name} too")
    for name in SECRETS:
        where, text = given[name]
        if text and where == COMMAND_LINE:
            danger = f"the {name} is on the command line, where any user can read it"
            config.warnings.append(f"{danger}: put it into the configuration file")
        elif text and os.stat(config.file).st_mode & 0o044:
            danger = f"{config.file} holds a {name} and others can read it"
            config.warnings.append(f"{danger}: chmod 600 {config.file}")
    if given["actions_path"][0] and not os.path.isdir(config.actions_path):
        path = config.actions_path
        config.warnings.append(f"actions_path: {path} is not a directory")


def processors(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Return how many processors this process may use: by its affinity, and by the
    quota of its control groups, rounded up (Linux's cgroups(7), both versions)."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    count: float = len(affinity(0)) if affinity else os.cpu_count() or 1
    groups = []
    with contextlib.suppress(OSError):
        groups = os.fsdecode(read_file(own)).splitlines()
    for kinds, path in (line.split(":", 2)[1:] for line in groups):
        place = f"{root}/{kinds}{path}".rstrip("/") if kinds else f"{root}{path}"
        while place.startswith(root):
            with contextlib.suppress(OSError, ValueError):
                if kinds:
                    quota = read_file(f"{place}/cpu.cfs_quota_us").split()
                    quota += read_file(f"{place}/cpu.cfs_period_us").split()
                else:
                    quota = read_file(f"{place}/cpu.max").split()
                if int(quota[0]) > 0:  # not "max", and not version 1's -1
                    count = min(count, int(quota[0]) / int(quota[1]))
            place = os.path.dirname(place)
    return max(1, -int(-count // 1))


# ---------------------------------------------------------------------------
# Unit records: the file that says that a unit was accepted, and its outcome.
#
#     crowdnode-unit 1 {"id":7,...}      the fork server, before the fork
#     pid 4711 8123.45                   fork server and worker: pid, start (boot_clock)
#     succeeded 0.0018 {"output":42}     the worker, or "failed"; the node, where the
#                                        worker has left no outcome
#     reported                           the node: central has taken the outcome; the
#                                        record stays for some seconds (see ReportHold)
#     withdrawn                          the node: must not be reported
#
# A line counts when its newline is there; other lines are ignored.  The worker holds a
# lock (flock) on the file, which the kernel releases however the worker ends.
# ---------------------------------------------------------------------------

RECORD_MAGIC = "crowdnode-unit 1 "
RECORD_KEYS = {"id", "job_id", "action", "stage", "digest"}
OUTCOME_LINE = re.compile(rb"(succeeded|failed) ([0-9]+\.?[0-9]*) (\{.*\})")
REPORTED, WITHDRAWN_LINE = b"reported", b"withdrawn"


class OddRecord(Exception):
    """The file is not a unit record of this program."""


class Outcome:
    """A unit's outcome as central gets it: *status* (succeeded or failed), *seconds*,
    and *output*, the JSON text of an object with the key ``output``."""

    def __init__(self, status: str, seconds: str, output: bytes) -> None:
        self.status, self.seconds, self.output = status, seconds, output

    def line(self) -> bytes:
        """Return the outcome as a line of a record."""
        return f"{self.status} {self.seconds} ".encode() + self.output

    def reason(self) -> str:
        """Return why the unit failed; empty where it succeeded."""
        is_success = self.status == "succeeded"
        return "" if is_success else str(json.loads(self.output)["output"]).strip()


def failure(message: str) -> bytes:
    """Return the output of a failure with this message, in UTF-8 whatever it holds."""
    message = message[:FAILURE_LIMIT]
    return to_json({"output": message.encode("utf-8", "replace").decode()}).encode()


class Record:
    """The parsed content of a record.

    head: the unit, None in a file without a whole line; started: of the process pid, by
    boot_clock()."""

    def __init__(self, data: bytes = b"") -> None:
        """Parse *data*.  Raises OddRecord."""
        self.head: Json | None = None
        self.pid: int | None = None
        self.started = 0.0
        self.outcome: Outcome | None = None
        lines = data.split(b"\n")[:-1]  # what follows the last newline does not count
        if lines:
            magic, _, text = lines[0].partition(b"{")
            try:
                head = json.loads(b"{" + text)
                is_ours = set(head) >= RECORD_KEYS and head["stage"] in STAGES.values()
            except (ValueError, RecursionError):
                is_ours = False
            if magic != RECORD_MAGIC.encode() or not is_ours:
                raise OddRecord("its first line is not that of a unit record")
            self.head = head
        for line in lines[1:]:
            words, match = line.split(b" "), OUTCOME_LINE.fullmatch(line)
            with contextlib.suppress(ValueError, IndexError):
                if words[0] == b"pid":
                    self.pid, self.started = int(words[1]), float(words[2])
                elif match and set(strict_json(match[3].decode())) == {"output"}:
                    status, seconds = match[1].decode(), match[2].decode()
                    self.outcome = Outcome(status, seconds, match[3])
        self.reported = REPORTED in lines
        # The line may begin with the remains of one that a killed worker was writing.
        self.withdrawn = any(line.endswith(WITHDRAWN_LINE) for line in lines)


def record_head(request: Json, central: str) -> Json:
    """Return the head of the record of a unit that *central* (a URL) has sent."""
    text = json.dumps(request, sort_keys=True)
    label = request["input"]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/\S+\Z", label):  # a file's name
        label = base_name(label)
    return {
        **{key: request[key] for key in ("id", "job_id", "action", "attempts")},
        "stage": STAGES[request["status"]],
        "label": label[:80],  # the input, for people
        "digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "central": central,
        "started": boot_clock(),
        **THIS_MACHINE,
    }


def is_locked(path: str) -> bool:
    """Return whether a process has locked the file at *path*.  Raises OSError."""
    with open(path, "rb", 0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def worker_lives(record: Record, locked: bool) -> bool:
    """Return whether the worker of *record*, which is *locked* or not, lives.

    A child that a worker has forked may hold the lock of a dead one, and a worker may
    have closed its own: so the process itself counts, where it can be seen.  Raises
    OSError."""
    head = record.head or {}
    is_here = all(head.get(k) == THIS_MACHINE[k] for k in ("boot_id", "namespace"))
    if not is_here or not record.pid or not record.started:
        return locked
    return is_same_process(record.pid, record.started, head)


def append_line(path: str, line: bytes) -> None:
    """Append *line* to the record at *path*.  Raises OSError.

    The newline before ends a line that is incomplete; empty lines are ignored."""
    with open(os.open(path, os.O_WRONLY | os.O_APPEND), "ab", 0) as file:
        write_all(file.fileno(), b"\n" + line + b"\n")


# ---------------------------------------------------------------------------
# Asset stores: where the files that actions save are kept.  Another store is a subclass
# with check and save, its name in STORES, and the keys that it needs in STORAGES.
# ---------------------------------------------------------------------------


class AssetStore:
    """Stores files under given names.  Workers call save(), the node and --check the
    others.  The fork server creates it, to have its imports done before the forks."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self) -> None:
        """Raise OSError, naming the key to look at, unless the store can be used."""
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """Return what a person should know about the store."""
        return []

    def save(self, local_path: str, save_path: str) -> str:
        """Store *local_path* as *save_path*, atomically, and return its URL."""
        raise NotImplementedError


class FilesystemStore(AssetStore):
    """Keeps files below local_storage_path, for example on a network drive."""

    def check(self) -> None:
        """Raise OSError where the first save could not make the directory."""
        path = self.config.local_storage_path
        while not os.path.lexists(path):
            path = os.path.dirname(path)
        if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
            wrong = f"local_storage_path: {path} is not a writable directory"
            raise PermissionError(errno.EACCES, wrong)

    def warnings(self) -> list[str]:
        path = self.config.local_storage_path
        found = []
        if os.path.isdir(path) and os.stat(path).st_mode & 0o022:
            danger = f"others can write to {path}, and could put links there"
            found.append(f"local_storage_path: {danger}: chmod go-w {path}")
        return found

    def save(self, local_path: str, save_path: str) -> str:
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
S3_LIMIT = 5 * 1024**3  # bytes of one PUT
S3_LINK_TIME = 24 * 60 * 60  # seconds
S3_TIME = "%Y%m%dT%H%M%SZ"
S3_WAITS = (1, 2, 4)  # seconds before a request is sent again after a server's error
S3_KEYS = {  # the key to look at, by S3's error code
    "InvalidAccessKeyId": "aws_access_key",
    "SignatureDoesNotMatch": "aws_secret_key",
    "NoSuchBucket": "s3_bucket",
    "InvalidBucketName": "s3_bucket",
    "AuthorizationHeaderMalformed": "s3_region",
    "PermanentRedirect": "s3_region",
    "AccessControlListNotSupported": "s3_authentication",
    "RequestTimeTooSkewed": "this machine's clock",
}


class S3Store(AssetStore):
    """Keeps files in a bucket of S3 or of a compatible server: public under plain URLs,
    or with s3_authentication private, behind links that are valid for a day.

    Source: "Authenticating Requests (AWS Signature Version 4)", Amazon S3 API."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        global hashlib, hmac, http, mimetypes, urllib  # imported once, before the forks
        import hashlib
        import hmac
        import http.client
        import mimetypes
        import urllib.error
        import urllib.parse
        import urllib.request

        host = f"s3.{config.s3_region}.amazonaws.com"
        base, prefix = config.s3_endpoint or f"https://{host}", f"/{config.s3_bucket}"
        # A certificate of *.s3... is not valid for a bucket's name with dots.
        if not config.s3_endpoint and "." not in config.s3_bucket:
            base, prefix = f"https://{config.s3_bucket}.{host}", ""
        parts = urllib.parse.urlsplit(base)
        # The header Host, which is signed, lacks the scheme's own port.
        port = {"http": ":80", "https": ":443"}[parts.scheme]
        self.host = re.sub(f"{port}$", "", parts.netloc)
        self.base, self.prefix = f"{parts.scheme}://{self.host}", parts.path + prefix
        # No redirects: the signature is valid for this host alone.
        members = {"redirect_request": lambda *_: None}
        handler = type("NoRedirects", (urllib.request.HTTPRedirectHandler,), members)
        self.opener = web_opener(handler)

    def check(self) -> None:
        """Raise OSError unless the bucket can be listed, or the keys may only write."""
        headers = {"x-amz-content-sha256": hashlib.sha256().hexdigest()}
        try:
            self._send("GET", self.prefix or "/", "list-type=2&max-keys=0", headers)
        except OSError as error:
            if "AccessDenied" not in str(error):
                raise

    def save(self, local_path: str, save_path: str) -> str:
        quoted = urllib.parse.quote(os.fsencode(save_path), safe="/-_.~")
        path = f"{self.prefix}/{quoted}"
        kind = mimetypes.guess_type(save_path)[0] or "application/octet-stream"
        digest = hashlib.sha256()
        with open(local_path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > S3_LIMIT:
                wrong = f"it has {size} bytes, and S3 takes {S3_LIMIT >> 30} GB at once"
                raise OSError(errno.EFBIG, wrong)
            for piece in iter(lambda: file.read(READ_SIZE), b""):
                digest.update(piece)
            headers = {"content-length": str(size), "content-type": kind}
            headers["x-amz-content-sha256"] = digest.hexdigest()
            if not self.config.s3_authentication:  # the default is private
                headers["x-amz-acl"] = "public-read"
            self._send("PUT", path, "", headers, file)
        return self.link(path) if self.config.s3_authentication else self.base + path

    def link(self, path: str) -> str:
        """Return a URL at which anybody can get *path*, which is quoted, for a day."""
        now = time.strftime(S3_TIME, time.gmtime())
        credential = f"{self.config.aws_access_key}/{self._scope(now)}"
        query = (
            f"X-Amz-Algorithm={S3_ALGORITHM}"
            f"&X-Amz-Credential={urllib.parse.quote(credential, safe='-_.~')}"
            f"&X-Amz-Date={now}&X-Amz-Expires={S3_LINK_TIME}&X-Amz-SignedHeaders=host"
        )
        headers = {"host": self.host}
        signed = self._signature("GET", path, query, headers, "UNSIGNED-PAYLOAD", now)
        return f"{self.base}{path}?{query}&X-Amz-Signature={signed}"

    def _scope(self, now: str) -> str:
        return f"{now[:8]}/{self.config.s3_region}/s3/aws4_request"

    def _signature(
        self, method: str, path: str, query: str, headers: Json, digest: str, now: str
    ) -> str:
        """Sign a request; *headers*: lower case, sorted; *path*, *query*: quoted, the
        latter sorted."""
        lines = [method, path, query]
        lines += [f"{name}:{value}" for name, value in headers.items()]
        lines += ["", ";".join(headers), digest]
        hashed = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        text = "\n".join([S3_ALGORITHM, now, self._scope(now), hashed])
        secret = f"AWS4{self.config.aws_secret_key}".encode()
        for word in [*self._scope(now).split("/"), text]:
            secret = hmac.new(secret, word.encode(), "sha256").digest()
        return secret.hex()

    def _send(
        self, method: str, path: str, query: str, headers: Json, body: Any = None
    ) -> None:
        """Send one request, again after a server's error.  Raises OSError."""
        digest = headers["x-amz-content-sha256"]
        url = f"{self.base}{path}{'?' if query else ''}{query}"
        for wait in (*S3_WAITS, None):
            now = time.strftime(S3_TIME, time.gmtime())
            headers = {**headers, "host": self.host, "x-amz-date": now}
            signed = dict(sorted(headers.items()))
            signature = self._signature(method, path, query, signed, digest, now)
            credential = f"{self.config.aws_access_key}/{self._scope(now)}"
            signed["authorization"] = (
                f"{S3_ALGORITHM} Credential={credential}, "
                f"SignedHeaders={';'.join(signed)}, Signature={signature}"
            )
            request = urllib.request.Request(url, body, signed, method=method)
            try:
                if body:
                    body.seek(0)
                self.opener.open(request, timeout=TRANSFER_TIMEOUT).close()
                return
            except urllib.error.HTTPError as error:
                status, refusal = error.code, self._refusal(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                status, reason = 500, str(getattr(error, "reason", error))
                if body and ("reset" in reason or "Broken pipe" in reason):
                    reason += ": it may have refused the file before it had all of it"
                refusal = OSError(errno.EIO, f"s3_endpoint = {self.base}: {reason}")
            if wait is None or status < 500:
                raise refusal
            time.sleep(wait)

    def _refusal(self, error: urllib.error.HTTPError) -> OSError:
        """Return the error for an answer of S3, with the name of the key to look at."""
        text = ""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            text = error.read(4000).decode("utf-8", "replace")
        fields = dict(re.findall(r"<(Code|Message)>([^<]*)</", text))
        code, message = fields.get("Code", ""), fields.get("Message", "")
        name = S3_KEYS.get(code, "s3_bucket")
        if name not in SECRETS and name in NODE_KEYS:
            name = f"{name} = {getattr(self.config, name)}"
        answer = f"S3 answered {error.code} {code}: {message}".rstrip(": ")
        return OSError(errno.EIO, f"{name}: {answer}")


def web_opener(*handlers: Any) -> urllib.request.OpenerDirector:
    """Return an opener of URLs that uses the proxies of the environment.  (urllib also
    asks macOS for its settings, which crashes after a fork.)"""
    import http.client
    import urllib.request

    class FinalResponse(http.client.HTTPResponse):
        """Passes over 103 and its like; http.client passes over 100 alone."""

        def _read_status(self) -> tuple[str, int, str]:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            return version, 100 if 101 < status < 200 else status, reason

    http.client.HTTPConnection.response_class = FinalResponse
    proxies = urllib.request.ProxyHandler(urllib.request.getproxies_environment())
    return urllib.request.build_opener(proxies, *handlers)


STORES: dict[str, type[AssetStore]] = {"filesystem": FilesystemStore, "s3": S3Store}
# ---------------------------------------------------------------------------
# Actions: what is done with an input; where they come from.
# ---------------------------------------------------------------------------


def safe_file_name(url: str) -> str:
    """Return the name under which *url* is downloaded (protocol.md, "Where files go").

    It is never empty, ``.`` or ``..``, holds no slash, and fits a file system."""
    base = re.sub(r"\?.*", "", url, flags=re.DOTALL).rstrip("/").rpartition("/")[2]
    extension = os.path.splitext(base)[1]
    name = percent_decoded(base).decode("utf-8", "replace")
    name = re.sub(r"-+", "-", re.sub(r"[^a-zA-Z0-9_\-.]", "-", name))
    if extension and name.endswith(extension):
        name = name[: -len(extension)]
    name = name.replace(".", "-")[:150] + extension[:50]
    return name if name.strip(".") else "input"


class Action:
    """The base class of actions.

    A subclass defines process(), and split() and merge() where its jobs have these
    stages.  Each returns what JSON can hold; split() a list, whose elements become
    inputs of process(); merge() finds the list of all outputs in input.  An exception
    fails the unit, with its text as the reason.

    input           str, or the parsed JSON where the input is an object or a list
    input_path      path of the downloaded file, where the input is a URL; else None
    file_name       that file's name, without the extension; else None
    options         dict: the job's options, and job_id, work_unit_id, attempts
    work_directory  the current directory: private, and removed afterwards
    """

    _name = ""
    needs: tuple[str, ...] = ()  # programs; a built-in action is enabled where they are

    def __init__(
        self, input: str, options: Json, store: AssetStore, work_directory: str
    ) -> None:
        self.options = options
        self.work_directory = work_directory
        self.input_path: str | None = None
        self.file_name: str | None = None
        self.input: Any = input
        self._store = store
        if input[:1] in ("[", "{"):
            with contextlib.suppress(ValueError):  # then it is just a string
                self.input = strict_json(input)
        elif is_url(input):
            name = safe_file_name(input)
            self.file_name = os.path.splitext(name)[0]
            self.input_path = self.download(input, name)

    def download(self, url: str, path: str) -> str:
        """Download *url* to *path*, relative to the work directory.

        Returns the absolute path; raises ActionFailed."""
        path = os.path.join(self.work_directory, path)
        try:
            if WEB_URL.match(url):
                download_from_web(url, path)
            else:
                source = local_path(url)
                if os.path.exists(source) and not os.path.isfile(source):
                    raise OSError(errno.EINVAL, "is not a regular file", source)
                copy_file(source, path)
        except (OSError, ValueError, EOFError) as error:
            cause = error if hasattr(error, "code") else getattr(error, "reason", error)
            reason = getattr(cause, "strerror", None) or cause
            what = without_secrets(url)
            raise ActionFailed(f"can't download {what}: {reason}") from error
        return path

    def save(self, path: str) -> str:
        """Store the file at *path* for good, and return its URL.  Raises OSError."""
        job, unit = self.options["job_id"], self.options["work_unit_id"]
        path = os.path.join(self.work_directory, path)
        name = f"{self._name}/job_{job}/unit_{unit}/{os.path.basename(path)}"
        return self._store.save(path, name)


def download_from_web(url: str, path: str) -> None:
    """Write what *url* answers to *path*, decompressed if it is sent compressed.

    Raises OSError, EOFError or ValueError, also for any status but 2xx."""
    import gzip
    import http.client
    import urllib.request  # the fork server has imported it; see ForkServer.start
    import zlib

    class Redirects(urllib.request.HTTPRedirectHandler):
        """Follows 308 too, which Python does from 3.11 on."""

        def http_error_308(
            self, request: Any, reply: Any, code: int, message: str, headers: Any
        ) -> Any:
            return self.http_error_302(request, reply, 307, message, headers)

    handlers: list[Any] = [Redirects]
    user = re.match(r"https?://([^/?#@]*)@", url, re.IGNORECASE)
    if user:
        url = without_password(url)
        passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
        name, _, word = os.fsdecode(percent_decoded(user[1])).partition(":")
        server = re.sub(r"\A([^/]*//[^/?#]*).*", r"\1/", url, flags=re.DOTALL)
        passwords.add_password(None, server, name, word, is_authenticated=True)
        handlers.append(urllib.request.HTTPBasicAuthHandler(passwords))
    request = urllib.request.Request(url, headers={"User-Agent": "crowdnode"})
    try:
        with web_opener(*handlers).open(request, timeout=TRANSFER_TIMEOUT) as reply:
            header = ", ".join(reply.headers.get_all("Content-Encoding") or [])
            words = [word for word in word_list(header.lower()) if word != "identity"]
            encoding = ", ".join(words)
            source: Any = reply
            if encoding in ("gzip", "x-gzip"):
                source = gzip.GzipFile(fileobj=reply)
            elif encoding not in ("", "deflate"):
                raise OSError(f"it is sent with Content-Encoding: {header}")
            pieces = iter(lambda: source.read(MEGABYTE), b"")
            with open(path, "wb") as file:
                for piece in inflated(pieces) if encoding == "deflate" else pieces:
                    file.write(piece)
                size = file.tell()
    except (http.client.HTTPException, zlib.error) as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
    # http.client counts down, unless the body comes in chunks; ftp does not count.
    missing = getattr(reply, "length", None)
    if not hasattr(reply, "length"):
        missing = int(reply.headers["Content-Length"] or size) - size
    if missing:
        raise OSError(f"it is cut short: {missing} bytes are missing")


def inflated(pieces: Iterable[bytes]) -> Iterable[bytes]:
    """Yield what *pieces* of Content-Encoding deflate hold: zlib's format or, as some
    servers send it, a bare stream.  Raises EOFError, zlib.error."""
    import zlib

    stream: Any = None
    for piece in pieces:
        if stream is None:
            is_bare = int.from_bytes(piece[:2], "big") % 31 or piece[0] & 15 != 8
            stream = zlib.decompressobj(-15 if is_bare else 15)
        yield stream.decompress(piece)
    if stream and not stream.eof:
        raise EOFError("the compressed file is cut short")


ENVIRONMENT_LIMIT = 100_000  # bytes of a variable; Linux's execve takes 128 KB


class ExecutableAction(Action):
    """An action in any language: a program, started with the stage as its argument.

    It gets JSON on standard input, and the same in its environment; what it prints on
    standard output, JSON or plain text, is the result."""

    path = ""

    def execute(self, stage: str) -> Any:
        """Run the program and return its result.  Raises ActionFailed.

        Files instead of pipes: they never fill up, and need no threads."""
        names = ("input", "input_path", "file_name", "options")
        request = {"stage": stage, **{name: getattr(self, name) for name in names}}
        environment = dict(os.environ)
        for name in ("stage", *names[:3]):
            value = "" if request[name] is None else request[name]
            text = value if isinstance(value, str) else to_json(value)
            if "\0" not in text and len(os.fsencode(text)) < ENVIRONMENT_LIMIT:
                environment[f"CROWDNODE_{name.upper()}"] = text
        try:
            stdin, stdout = self._unnamed_file(), self._unnamed_file()
            stdin.write(json.dumps(request).encode())
            stdin.seek(0)
        except OSError as error:
            raise ActionFailed(f"can't start {self.path}: {error.strerror}") from None
        files = [(0, stdin.fileno()), (1, stdout.fileno())]
        run_program([self.path, stage], files, environment)
        stdout.seek(0)
        try:
            output = stdout.read().decode()
        except (OSError, UnicodeDecodeError) as error:
            what = "is not UTF-8" if isinstance(error, ValueError) else "can't be read"
            raise ActionFailed(f"standard output {what}: {error}") from None
        try:
            return strict_json(output)
        except ValueError:
            return output.rstrip("\n")

    def _unnamed_file(self) -> Any:
        path = os.path.join(self.work_directory, ".crowdnode")
        file = open(path, "x+b")  # noqa: SIM115
        os.unlink(path)
        return file


def run_program(
    command: list[str],
    descriptors: Iterable[tuple[int, int]] = (),
    environment: dict[str, str] | None = None,
) -> None:
    """Run *command*, which begins with a path, and wait for its end.

    *descriptors*: pairs of its descriptor and ours.  Raises ActionFailed, with the last
    lines that it printed.  Not by subprocess, whose import costs a worker 5 ms."""
    printed = os.lseek(2, 0, os.SEEK_END)
    actions = [(os.POSIX_SPAWN_DUP2, ours, its) for its, ours in descriptors]
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python; a program should not
    more: Json = {"file_actions": actions, "setsigdef": ignored}
    try:
        pid = os.posix_spawn(command[0], command, environment or os.environ, **more)
        status = os.waitpid(pid, 0)[1]
    except OSError as error:
        reason = interpreter_problem(command[0]) or error.strerror
        raise ActionFailed(f"can't start {command[0]}: {reason}") from None
    if status:
        size = os.fstat(2).st_size  # the file may have been cut back
        start = max(min(printed, size), size - MESSAGE_TAIL)
        errors = os.pread(2, MESSAGE_TAIL, start).decode("utf-8", "replace").strip()
        name = os.path.basename(command[0])
        raise ActionFailed(f"{errors or name} ({describe_exit(status)})")


def interpreter_problem(path: str) -> str | None:
    """Return why the kernel would not start the program at *path*, or None where it
    would or the file can't be read.  (The kernel says "No such file or directory",
    though the file is there.)"""
    line = b"\0"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        line = file.readline(256)
    words = os.fsdecode(line[2:]).split()
    if not line.startswith(b"#!") or not words:
        is_text = b"\0" not in line  # machine code has zeros at once
        return "it needs a first line such as #!/bin/sh" if is_text else None
    if line.endswith(b"\r\n"):
        shown, remedy = repr(os.fsdecode(line[2:-1])), f"sed -i 's/\\r$//' {path}"
        return f"its first line, {shown}, ends as Windows writes it: {remedy}"
    by_name = os.path.basename(words[0]) == "env" and len(words) == 2
    if by_name and not program_path(words[1]):
        return f"its interpreter {words[1]} is not found in PATH"
    is_there = os.path.exists(words[0])
    return None if is_there else f"its interpreter {words[0]} does not exist"


# Where programs are that the short PATH of cron and launchd lacks.
MORE_PATHS = ("/usr/local/bin", "/opt/homebrew/bin", "/opt/local/bin", "/snap/bin")


def program_path(name: str, *more: str) -> str | None:
    """Return the path of the program *name*, as a shell finds it, or None; *more*:
    directories where to look last."""
    for directory in (*os.get_exec_path(), *more):
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


EXIT_HINTS = {
    "SIGKILL": "; perhaps the machine is out of memory",
    "SIGXFSZ": "; it wrote more than file_limit",
}


def describe_exit(wait_status: int) -> str:
    """Return how a process ended, from the status of waitpid."""
    if not os.WIFSIGNALED(wait_status):
        return f"exit status {os.WEXITSTATUS(wait_status)}"
    name = signal_name(os.WTERMSIG(wait_status))
    return f"killed by {name}{EXIT_HINTS.get(name, '')}"


def executable_action(name: str, path: str, stages: list[str]) -> type[Action]:
    """Return a subclass of ExecutableAction for the program at *path*."""
    members: Json = {"path": path}
    for stage in stages:
        members[stage] = lambda action, stage=stage: action.execute(stage)
    return type(name, (ExecutableAction,), members)


def stages_of(action: type[Action]) -> list[str]:
    """Return the stages that *action* defines, in the order of a job."""
    stages = ("split", "process", "merge")
    return [stage for stage in stages if getattr(action, stage, None)]


SLOW_LOAD = 1  # seconds


class ActionLoader:
    """Finds and loads the actions of a configuration.

    problems: (log level or "skipped", sentence) for each that is left out, or odd."""

    def __init__(self, config: Config, built_in: dict[str, type[Action]]) -> None:
        self.config = config
        self.built_in = built_in
        self.problems: list[tuple[str, str]] = []

    def load(self) -> dict[str, type[Action]]:
        """Return all actions that load, by name.

        Returns none where actions_path can't be read: a node with the built-in actions
        alone is not what was configured."""
        config = self.config
        # A module says "from crowdnode import Action", though this may be __main__.
        sys.modules.setdefault("crowdnode", sys.modules[__name__])
        # At the end: an action email.py must not hide Python's module.  A child that
        # multiprocessing spawns finds both modules by sys.path.
        sys.path += [config.actions_path, os.path.dirname(PROGRAM)]
        actions: dict[str, type[Action]] = {}
        origin: dict[str, str] = {}
        try:
            paths = self._candidates()
        except OSError as error:
            self._add("error", f"actions_path: {error}")
            return {}
        for path in paths:
            name = os.path.splitext(os.path.basename(path))[0]
            try:
                if name in origin:
                    raise ActionFailed(f"{origin[name]} has the same name; rename one")
                began = time.monotonic()
                actions[name], origin[name] = self._load(name, path), path
                if time.monotonic() - began > SLOW_LOAD:
                    seconds = f"{time.monotonic() - began:.1f} s"
                    self._add("info", f"{path} takes {seconds} to load")
            except ActionFailed as error:
                self._add("error", f"{path} is left out: {error}")
            except (Exception, SystemExit) as error:
                reason = f"{type(error).__name__}: {error}{frames_in(error, path)}"
                self._add("error", f"{path} is left out: {reason}")
        built_in = {} if config.disable_default_actions else self.built_in
        for name, action in built_in.items():
            missing = [need for need in action.needs if not program_path(need)]
            if name in config.disabled_actions:
                continue
            if name in actions:
                self._add("info", f"{origin[name]} replaces the built-in action {name}")
            elif missing:
                sentence = f"the action {name} is left out; not installed"
                self._add("skipped", f"{sentence}: {', '.join(missing)}")
                for path in filter(
                    None, (program_path(n, *MORE_PATHS) for n in missing)
                ):
                    remedy = f"put {os.path.dirname(path)} into PATH"
                    self._add("warning", f"{path} is not found by the PATH: {remedy}")
            else:
                actions[name] = action
        for name in config.disabled_actions:
            if actions.pop(name, None) is None and name not in self.built_in:
                self._add("warning", f"disabled_actions: there is no action {name}")
        for name, keys in config.actions.items():
            if name not in actions:
                self._add("warning", f"[action {name}]: there is no action {name}")
            elif "stages" in keys and not issubclass(actions[name], ExecutableAction):
                wrong = "has no effect: the methods of a Python action are its stages"
                self._add("warning", f"[action {name}] stages: {wrong}")
        for name, action in actions.items():
            action._name = name
        return actions

    def _add(self, level: str, sentence: str) -> None:
        self.problems.append((level, sentence))

    def _candidates(self) -> list[str]:
        """Return the files in actions_path that may be actions.  Raises OSError."""
        directory, found = self.config.actions_path, []
        for name in sorted(os.listdir(directory)) if os.path.exists(directory) else ():
            path = os.path.join(directory, name)
            if name[0] in "._":
                continue
            if not os.path.exists(path):
                sentence = f"{path} is left out: a link to a file that is not there"
                self._add("warning", sentence)
            if not os.path.isfile(path):
                continue
            if name.endswith(".py") or os.access(path, os.X_OK):
                found.append(path)
                continue
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if file.read(2) == b"#!":
                    sentence = f"{path} is left out: not executable (chmod +x)"
                    self._add("warning", sentence)
        return found

    def _load(self, name: str, path: str) -> type[Action]:
        """Load an action.  It may raise anything."""
        if not ACTION_NAME.fullmatch(name):
            wanted = "letters, digits and _, and begin with a letter"
            raise ActionFailed(f"its name must be {wanted}")
        if not path.endswith(".py"):
            problem = interpreter_problem(path)
            if problem:
                raise ActionFailed(problem)
            stages = self.config.actions.get(name, {}).get("stages")
            return executable_action(name, path, stages or ["process"])
        import importlib.util

        module_name = name  # by which a child that is spawned can import it
        with contextlib.suppress(ValueError):
            known = importlib.util.find_spec(name)
            if known and known.origin != path:  # a module of Python's
                module_name = f"crowdnode_action_{name}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader  # it ends in .py
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        base, values = sys.modules["crowdnode"].Action, vars(module).values()
        found = [v for v in values if isinstance(v, type) and issubclass(v, base)]
        found = [action for action in found if action.__module__ == module_name]
        if len(found) != 1:
            number = len(found)
            wrong = f"it must define one subclass of Action; it defines {number}"
            raise ActionFailed(wrong)
        action, stages = found[0], stages_of(found[0])
        if "process" not in stages:
            raise ActionFailed(f"its class {action.__name__} must define process")
        for stage in stages:
            owner = next(base for base in action.__mro__ if stage in vars(base))
            method = vars(owner)[stage]
            if not isinstance(method, types.FunctionType):
                continue
            code, takes_any = method.__code__, method.__code__.co_flags & 4  # *args
            needed = code.co_argcount - len(method.__defaults__ or ())
            if needed != 1 and not takes_any:
                names = ", ".join(code.co_varnames[: code.co_argcount])
                wrong = f"{stage}({names}) must be {stage}(self)"
                raise ActionFailed(f"{wrong}: the input is self.input")
        return action


FRAMES_SHOWN = 10  # of a traceback, in a failure's message


def frames_in(error: BaseException, path: str) -> str:
    """Return the frames of *error*, outermost first, below the directory of *path*."""
    frames, traceback, directory = [], error.__traceback__, os.path.dirname(path) + "/"
    while traceback:
        code = traceback.tb_frame.f_code
        if path and code.co_filename.startswith(directory):
            name = code.co_filename[len(directory) :]
            frames.append(f"{name}, line {traceback.tb_lineno}, in {code.co_name}")
        traceback = traceback.tb_next
    return f" ({'; '.join(frames[-FRAMES_SHOWN:])})" if frames else ""


# ---------------------------------------------------------------------------
# CloudCrowd's own actions.
# ---------------------------------------------------------------------------


class WordCount(Action):
    """Count the words of each input as ``wc -w`` does, and add the counts up."""

    def process(self) -> int:
        """Return the number of words in the input's file, or in the input itself."""
        if self.input_path is None:
            return len(str(self.input).split())
        count, in_word = 0, False
        with open(self.input_path, "rb") as file:
            for piece in iter(lambda: file.read(MEGABYTE), b""):
                # A word that began in the piece before has been counted.
                count += len(piece.split()) - (in_word and not piece[:1].isspace())
                in_word = not piece[-1:].isspace()
        return count

    def merge(self) -> int:
        """Return the sum of the counts."""
        return sum(self.input)


WORD = re.compile(r"[\w-]+")


class ProgramAction(Action):
    """The base of the built-in actions that run programs."""

    def program(self, name: str, *arguments: str, options: Any = "") -> None:
        """Run a program, with *options* (split as a shell does, without a shell) after
        the first argument.  Raises ActionFailed."""
        import shlex

        path = program_path(name)
        if path is None:
            raise ActionFailed(f"{name} is not installed")
        try:
            words = shlex.split(options or "")
        except (ValueError, AttributeError) as error:
            raise ActionFailed(f"options {options!r}: {error}") from None
        run_program([path, arguments[0], *words, *arguments[1:]])

    def listed(self, key: str, *keys: str) -> list[Json]:
        """Return the job's option *key*: a list of objects with *keys*, whose values
        are words, since they become parts of files' names.  Raises ActionFailed."""
        items = self.options.get(key, [])
        if not isinstance(items, list):
            raise ActionFailed(f"the option {key} is not a list")
        for item in items:
            fields = item if isinstance(item, dict) else {}
            values = [fields.get(name) for name in keys]
            if not all(isinstance(v, str) and WORD.fullmatch(v) for v in values):
                needed = f"{', '.join(keys)}, of letters, digits, _ and -"
                found = to_json(item)[:200]
                raise ActionFailed(f"the option {key}: each needs {needed}: {found}")
        return items


class GraphicsMagick(ProgramAction):
    """Apply GraphicsMagick's commands to an image.

    Option steps: a list of objects with name, command (such as convert), its options,
    extension, and input: the name of an earlier step, instead of the image."""

    needs = ("gm",)

    def process(self) -> dict[str, str]:
        """Return the URLs of the steps' results, by name."""
        if not self.input_path:
            raise ActionFailed("the input is not the URL of an image")
        made: dict[str | None, str] = {None: self.input_path}
        urls = {}
        for step in self.listed("steps", "name", "command", "extension"):
            name, origin = step["name"], step.get("input")
            source = made.get(origin if origin is None else str(origin))
            if source is None:
                wrong = f"its input {origin} is not an earlier step"
                raise ActionFailed(f"the step {name}: {wrong}")
            file = f"{self.file_name}_{name}.{step['extension']}"
            path = made[name] = os.path.join(self.work_directory, file)
            options = step.get("options")
            self.program("gm", step["command"], source, path, options=options)
            urls[name] = self.save(path)
        return urls


class ProcessPdfs(ProgramAction):
    """Extract images and text of each page of PDFs into one tar archive.

    Options: batch_size, the pages of a unit (10); images, a list of objects with name,
    extension and options (of gm convert)."""

    needs = ("gm", "gs", "pdftk", "pdftotext")  # gm calls gs

    def split(self) -> list[str]:
        """Return the URLs of archives of batch_size pages.

        A page is named UNIT.PDF_NUMBER.pdf: two PDFs may have the same name."""
        size = self.options.get("batch_size", 10)
        if not isinstance(size, int) or size < 1:
            raise ActionFailed(f"batch_size must be 1 or more, not {to_json(size)}")
        if not self.input_path:
            raise ActionFailed("the input is not the URL of a PDF")
        self.program("pdftk", self.input_path, "burst", "output", "%05d.part")
        name = os.path.splitext(os.path.basename(base_name(self.input)))[0]
        name = re.sub(r"[^\w-]+", "-", name).encode()[:150].decode("utf-8", "ignore")
        name = f"{self.options['work_unit_id']}.{name}"
        pages = []
        for part in sorted(name for name in os.listdir() if name.endswith(".part")):
            pages.append(f"{name}_{part[:-5]}.pdf")
            # Again: pdftk burst leaves the whole PDF's references in each page.
            self.program("pdftk", part, "output", f"./{pages[-1]}")
            os.unlink(part)
        batches = [pages[start : start + size] for start in range(0, len(pages), size)]
        return [self._pack(f"{n:05d}.tar", batch) for n, batch in enumerate(batches)]

    def process(self) -> str:
        """Return the URL of an archive of a batch's images and text."""
        images = self.listed("images", "name", "extension")
        for image in images:
            if re.search(r"(^|_)\d{5,}(_|$)", image["name"]):
                wrong = f"the image name {image['name']} looks like a page's"
                raise ActionFailed(wrong)
        for page in unpack(self.input_path or ""):
            page = f"./{page}"  # else a name may look like an option
            name = page[: -len(".pdf")]
            for image in images:
                picture = f"{name}_{image['name']}.{image['extension']}"
                wanted = image.get("options")
                self.program("gm", "convert", page, picture, options=wanted)
            options = ("-enc", "UTF-8", "-layout", "-q")
            self.program("pdftotext", *options, page, f"{name}.txt")
            os.unlink(page)
        return self._pack("pages.tar", sorted(os.listdir()))

    def merge(self) -> str:
        """Return the URL of an archive with NAME/text/pages, NAME/text/full and
        NAME/images/IMAGE for each PDF."""
        files: list[str] = []
        for place, url in enumerate(self.input):
            files += sorted(unpack(self.download(url, f"{place}.tar")))
        pdfs: dict[str, str] = {}  # by the beginnings of pages' names
        for file in files:  # in the order of inputs, and of pages
            unit, pdf, number, image, extension = re.fullmatch(
                r"([\w-]+)\.(.*)_(\d{5,})(?:_([\w-]+))?(\.[\w-]+)", file
            ).groups()  # type: ignore[union-attr]
            name, count, taken = pdf, 1, {text.casefold() for text in pdfs.values()}
            while unit not in pdfs and name.casefold() in taken:
                count += 1
                name = f"{pdf}-{count}"
            name = pdfs.setdefault(unit, name)
            if image:
                os.renames(file, f"{name}/images/{image}/{name}_{number}{extension}")
                continue
            os.makedirs(f"{name}/text/full", exist_ok=True)
            with open(f"{name}/text/full/{name}.txt", "ab") as full:
                full.write(read_file(file))
            os.renames(file, f"{name}/text/pages/{name}_{number}{extension}")
        return self._pack("processed_pdfs.tar", sorted(pdfs.values()))

    def _pack(self, path: str, names: list[str]) -> str:
        """Save an archive of *names*, compressed although it is called .tar, as
        CloudCrowd does; return its URL."""
        import tarfile

        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                archive.add(name)
        return self.save(path)


def unpack(path: str) -> list[str]:
    """Extract an archive's files here, and remove it; return their names.

    It may come from anywhere: only regular files, by their base names."""
    import shutil
    import tarfile

    names = []
    with tarfile.open(path) as archive:
        for member in archive:
            source = archive.extractfile(member) if member.isfile() else None
            if source:
                name = os.path.basename(member.name)
                if os.path.exists(name):
                    raise ActionFailed(f"two inputs have the same name: {name}")
                with open(name, "wb") as target:
                    shutil.copyfileobj(source, target, READ_SIZE)
                names.append(name)
    os.unlink(path)
    return names


BUILT_IN_ACTIONS: dict[str, type[Action]] = {
    "word_count": WordCount,
    "graphics_magick": GraphicsMagick,
    "process_pdfs": ProcessPdfs,
}
# ---------------------------------------------------------------------------
# Worker: one process for one unit.  It leaves the outcome in the record and exits.
# ---------------------------------------------------------------------------

TRASH = ".trash"  # in temp_storage_path: directories that the node removes
TOO_LARGE = "crowdnode_too_large"  # a unit's key: it was over max_request_size


class WorkerSettings:
    """What the workers of one action share; *action* is None where there is none.

    nice, time, memory: niceness, seconds and MB (None: no limit)."""

    def __init__(
        self, name: str, action: type[Action] | None, config: Config, store: AssetStore
    ) -> None:
        self.action = action
        self.config = config
        self.store = store
        self.nice: int = config.limit(name, "nice")
        self.time: float | None = config.limit(name, "time_limit")
        self.memory: float | None = config.limit(name, "memory_limit")
        self.limits: list[tuple[int, int]] = []  # resource and bytes, for setrlimit
        file_limit = config.limit(name, "file_limit")
        if self.memory or file_limit:
            import resource  # for the workers, too

            data, size = resource.RLIMIT_DATA, resource.RLIMIT_FSIZE
            pairs = ((data, self.memory), (size, file_limit))
            self.limits = [(name, int(mb * MEGABYTE)) for name, mb in pairs if mb]

    def set_limits(self, lift: bool = False) -> None:
        """Restrict this process by soft limits, or *lift* them to write the outcome."""
        for number, limit in self.limits:
            import resource

            hard = resource.getrlimit(number)[1]
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(number, (hard if lift else soft, hard))


class Worker:
    """Runs one work unit, in a process of its own.

    Created before the fork.  Between fork and action it makes few Python calls: each
    object that it touches copies a page of memory.

    record, output: descriptors; the record's holds its lock."""

    def __init__(self, unit: Json, settings: WorkerSettings, path: str) -> None:
        self.unit = unit
        self.settings = settings
        place = settings.config.temp_storage_path
        self.directory = f"{place}/{unit['action']}/unit_{unit['id']}"
        self.path = path  # of the record
        self.record = self.output = -1
        self.began = time.monotonic()
        self.started = ""  # by boot_clock(), just before the fork
        self.timed_out = False  # for the fork server

    def create_record(self, head: str) -> None:
        """Create and lock the record; *head* is JSON text.  Raises OSError."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        self.record = os.open(self.path, flags | os.O_EXCL, 0o600)
        fcntl.flock(self.record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.state = os.fstat(self.record)  # to know it again
        write_all(self.record, f"{RECORD_MAGIC}{head}\n".encode())
        self.output = os.open(f"{self.path}.out", flags | os.O_TRUNC, 0o600)

    def write_pid(self, pid: int) -> None:
        """Write the worker's identity to the record.

        Fork server and worker both do: either may be killed before the other has."""
        write_all(self.record, f"pid {pid} {self.started}\n".encode())

    def run(self) -> bool:
        """Run the unit and write its outcome; return whether it succeeded."""
        try:
            os.setsid()
            self.write_pid(os.getpid())
            os.dup2(self.output, 1)
            os.dup2(self.output, 2)
            os.close(self.output)
            os.nice(self.settings.nice)
            self.settings.set_limits()
        except OSError as error:
            reason = f"the worker can't be set up: {error}"
            self._write_outcome("failed", failure(reason))
            return False
        with contextlib.suppress(OSError):  # the first to go when memory runs out
            score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(score, b"1000")
            os.close(score)
        become_subreaper()
        status, pid = "succeeded", os.getpid()
        try:
            output = self._run_action()
        except BaseException as error:
            status, output = "failed", failure(self._explain(error))
        if os.getpid() != pid:  # a child that the action has forked
            os._exit(EXIT_FAILED)
        if self.settings.action:  # else its name may not be a plain one
            with contextlib.suppress(OSError):  # the node removes what is not empty
                os.chdir("/")
                os.rmdir(self.directory)
        with contextlib.suppress(OSError, ValueError):  # the action has closed it
            if self.unit["options"].get("benchmark") is True:
                user, system, child_user, child_system, _ = os.times()
                real = time.monotonic() - self.began
                user, system = user + child_user, system + child_system
                print(f"benchmark: {user:.3f} user {system:.3f} system {real:.3f} real")
            sys.stdout.flush()
        self._write_outcome(status, output)
        return status == "succeeded"

    def _run_action(self) -> bytes:
        """Return the action's output, as JSON.  What it raises fails the unit."""
        unit, settings = self.unit, self.settings
        action, stage = settings.action, STAGES[unit["status"]]
        if TOO_LARGE in unit:
            raise ActionFailed(unit[TOO_LARGE])
        if action is None:
            raise ActionFailed(f"this node has no action named {unit['action']}")
        if getattr(action, stage, None) is None:
            raise ActionFailed(f"the action {unit['action']} does not define {stage}")
        options = {**unit["options"], "work_unit_id": unit["id"]}
        options.update(job_id=unit["job_id"], attempts=unit["attempts"])
        self._enter(self.directory)
        task = action(unit["input"], options, settings.store, self.directory)
        result = getattr(task, stage)()
        if stage == "split" and not isinstance(result, (list, tuple)):
            raise ActionFailed(f"split must return a list, not {type(result).__name__}")
        output, limit = encode_output(result), settings.config.max_request_size
        if len(output) > limit * MEGABYTE:
            sizes = f"{len(output) / MEGABYTE:.1f} MB; max_request_size is {limit:g} MB"
            raise ActionFailed(f"the output has {sizes}")
        return output

    def _enter(self, directory: str) -> None:
        """Make the work directory, and go there.  Raises ActionFailed."""
        try:
            try:
                os.mkdir(directory, 0o700)
            except FileExistsError:  # from an earlier attempt
                discard_directory(self.settings.config, directory)
                os.mkdir(directory, 0o700)
            except FileNotFoundError:
                make_private_directory(directory)
            os.chdir(directory)
        except OSError as error:
            raise ActionFailed(f"can't make {directory}: {error.strerror}") from None

    def _explain(self, error: BaseException) -> str:
        """Return *error* in a line for central; the traceback goes to the log."""
        if isinstance(error, ActionFailed):
            return str(error)
        traceback = error.__traceback__
        while traceback and traceback.tb_frame.f_code.co_filename == PROGRAM:
            traceback = traceback.tb_next  # skip the frames of this program
        if not self.settings.config.is_job:  # --run shows the frames below
            shown = error.with_traceback(traceback)
            sys.excepthook(type(error), shown, traceback)
        module = sys.modules.get(getattr(self.settings.action, "__module__", ""))
        where = frames_in(error, getattr(module, "__file__", None) or "")
        if isinstance(error, MemoryError) and self.settings.memory:
            where += f"; memory_limit is {self.settings.memory:g} MB"
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        return f"{text}{where}"

    def _write_outcome(self, status: str, output: bytes) -> None:
        """Append the outcome to the record, or at least that it can't be written."""
        self.settings.set_limits(lift=True)
        self._find_record()
        outcome = Outcome(status, f"{time.monotonic() - self.began:.6f}", output)
        end = os.lseek(self.record, 0, os.SEEK_END)
        try:
            write_all(self.record, outcome.line() + b"\n")
        except OSError as error:
            os.ftruncate(self.record, end)  # a short line fits into the file's block
            outcome.status = "failed"
            outcome.output = failure(f"the outcome can't be written: {error.strerror}")
            write_all(self.record, outcome.line() + b"\n")

    def _find_record(self) -> None:
        """Reopen the record if the action has closed its descriptor.

        Raises OSError if the file of that name belongs to a later attempt."""
        for is_closed in (False, True):
            with contextlib.suppress(OSError):
                if is_closed:
                    self.record = os.open(self.path, os.O_RDWR | os.O_APPEND)
                if os.path.samestat(os.fstat(self.record), self.state):
                    return
        raise OSError(errno.ESTALE, "the record is another's", self.path)


def discard_directory(config: Config, path: str) -> None:
    """Move a directory to TRASH; the monitor removes it, which may take long."""
    trash = os.path.join(config.temp_storage_path, TRASH)
    make_private_directory(trash)
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)  # to move a directory takes the right to write to it
    os.rename(path, os.path.join(trash, f"{os.getpid()}.{time.monotonic_ns()}"))


def is_nested_deeper(value: Any, limit: int) -> bool:
    """Return whether *value*, which is JSON, has more levels than *limit*."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    children = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(is_nested_deeper(child, limit - 1) for child in children)


def encode_output(result: Any) -> bytes:
    """Return *result* as central takes it: an object with the key ``output``.

    Raises ActionFailed.  A JSONEncoder costs a worker a hundred pages, a quarter of all
    that it touches; most outputs need none."""
    try:
        if result is None:
            return b'{"output":null}'
        if type(result) is int:
            return b'{"output":%d}' % result
        if type(result) is str:
            return b'{"output":%s}' % json.encoder.encode_basestring(result).encode()
        output = to_json({"output": result}).encode()
    except (TypeError, ValueError) as error:
        raise ActionFailed(f"the output is not JSON: {error}") from None
    except RecursionError:
        output = b""
    if not output or is_nested_deeper(result, NESTING_LIMIT):
        reason = f"the output is nested more than {NESTING_LIMIT} deep"
        raise ActionFailed(f"{reason}, which central's Ruby can't parse")
    return output


# ---------------------------------------------------------------------------
# Fork server: the one process that forks, with one thread and without a network.
#
# Messages are lines of JSON.  From the node:
#     ["unit", head of its record (JSON), unit]  ["kill", pid, signal]
# To the node:
#     ["ready", {action: stages}, problems]      once, first
#     ["started", id, pid, start by boot_clock]  ["rejected", id, reason]
#     ["ended", id, wait status, timed out]
#
# Memory that the fork server writes between two forks is copied for the worker, so a
# short path here also keeps workers small.
# ---------------------------------------------------------------------------

LOOK_INTERVAL = 0.1  # seconds between looks at what workers have left running
ERROR_PAUSE = 0.02  # seconds, after an error of the kernel
ORPHANS = 0  # in the place of a pid: the next look


class ForkServer:
    """Forks a worker for each unit, reaps it, and ends it at its time limit.

    When the node has gone, or has closed its side, it takes no more units, stays until
    the last worker has ended, and exits."""

    def __init__(self, channel: socket.socket, configuration: Json) -> None:
        """Load the actions.  Signals come last: modules may have changed them."""
        import gc
        import select

        self.channel = channel
        config = Config(**configuration["config"])
        THIS_MACHINE.update(configuration["machine"])
        self.units_path = config.units_path
        self.node_is_there = True
        self.received = bytearray()
        self.parse = json.JSONDecoder().raw_decode
        self.workers: dict[int, Worker] = {}  # by pid
        self.deadlines: dict[int, float] = {}  # by pid, or ORPHANS; monotonic
        loader = ActionLoader(config, BUILT_IN_ACTIONS)
        actions = loader.load()
        store = STORES[config.storage](config)
        self.no_action = WorkerSettings("", None, config, store)
        self.settings = {
            name: WorkerSettings(name, action, config, store)
            for name, action in actions.items()
        }
        become_subreaper()
        self.own_children = child_pids()  # processes that modules have started
        self.wake, self.wake_writer = os.pipe()
        self.descriptors = (self.wake, self.wake_writer, channel.fileno())
        self.poll = select.poll()
        for descriptor in (self.wake, channel.fileno()):
            self.poll.register(descriptor, select.POLLIN)
        self._trap_signals()
        stages = {name: stages_of(action) for name, action in actions.items()}
        for stream in (sys.stdout, sys.stderr):  # whatever the locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
        self.send(json.dumps(["ready", stages, loader.problems]))
        gc.collect()
        gc.freeze()  # else the first collection in a worker copies every page

    def _trap_signals(self) -> None:
        """Have each SIGCHLD write to the pipe, whatever modules or parents have set."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, wake_up)
        for descriptor in (self.wake, self.wake_writer):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self.wake_writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def send(self, message: str) -> None:
        """Send a message; a node that has died needs none: the next reads records."""
        with contextlib.suppress(ConnectionError):
            self.channel.sendall(message.encode() + b"\n")

    def serve(self) -> None:
        """Run until the node has gone and the last worker has ended."""
        while self.node_is_there or self.workers or self.deadlines:
            try:
                self.step()
            except Exception as error:  # unexpected; go on all the same
                print(f"a step failed: {error}; trying again", file=sys.stderr)
                time.sleep(ERROR_PAUSE)
                self.reap()

    def step(self) -> None:
        """Wait for an event or a deadline, and handle it."""
        deadlines, patience = self.deadlines, None
        if deadlines:
            seconds = min(deadlines.values()) - time.monotonic()
            patience = max(0.0, seconds * 1000)
        for descriptor, _ in self.poll.poll(patience):
            if descriptor == self.wake:
                os.read(self.wake, 512)
                self.reap()
            else:
                self._receive()
        now = time.monotonic()
        for pid in [pid for pid, moment in deadlines.items() if moment <= now]:
            if pid == ORPHANS:
                self.end_orphans()
                continue
            worker = self.workers[pid]
            kill_group(pid, signal.SIGKILL if worker.timed_out else signal.SIGTERM)
            worker.timed_out = True
            deadlines[pid] = now + KILL_GRACE

    def _receive(self) -> None:
        """Read from the node, and handle the messages that are complete."""
        try:
            data = self.channel.recv(READ_SIZE)
        except ConnectionError:
            data = b""
        if not data:
            self.node_is_there = False
            self.poll.unregister(self.channel)
        self.received += data
        if b"\n" not in data:
            return
        *lines, self.received = self.received.split(b"\n")
        for line in lines:
            kind, *rest = self.parse(line.decode())[0]
            if kind == "unit":
                self.start(*rest)
            elif kind == "kill" and rest[0] in self.workers:
                kill_group(*rest)

    def start(self, head: str, unit: Json) -> None:
        """Write the unit's record, fork its worker, send its pid.

        Whatever goes wrong rejects this unit alone."""
        settings = self.settings.get(unit["action"], self.no_action)
        worker = Worker(unit, settings, f"{self.units_path}/{unit['id']}")
        pid = 0
        try:
            if WEB_URL.match(unit["input"]):
                import urllib.request  # noqa: F401  once here, not in each worker
            worker.create_record(head)
            worker.started = f"{boot_clock():.2f}"
            pid = os.fork()
            if pid == 0:
                self._be_worker(worker)  # never returns
            self.workers[pid] = worker
            if settings.time:
                self.deadlines[pid] = time.monotonic() + settings.time
            worker.write_pid(pid)
            self.send(f'["started", "{unit["id"]}", {pid}, {worker.started}]')
        except Exception as error:
            reason = "an earlier record of it is in the way"
            if not isinstance(error, FileExistsError):
                self._undo(worker, pid)
                words = f"{type(error).__name__}: {error}"
                words = getattr(error, "strerror", None) or words
                reason = f"can't start a worker: {words}"
            self.send(json.dumps(["rejected", unit["id"], reason]))
        finally:
            for descriptor in (worker.record, worker.output):  # the worker has its own
                if descriptor >= 0:
                    os.close(descriptor)

    def _be_worker(self, worker: Worker) -> NoReturn:
        """Run *worker* in the child process, and exit."""
        code = EXIT_FAILED
        try:
            signal.set_wakeup_fd(-1)
            for descriptor in self.descriptors:
                os.close(descriptor)
            if worker.run():  # the status tells the node whether it failed (ReportHold)
                code = EXIT_OK
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(code)

    def _undo(self, worker: Worker, pid: int) -> None:
        """Undo the start of a unit, as far as it went."""
        if pid:
            kill_group(pid, signal.SIGKILL)
            self.workers.pop(pid, None)  # its end must not be reported
            self.deadlines.pop(pid, None)
        try:
            remove_file(worker.path)
            remove_file(f"{worker.path}.out")
        except OSError:  # it may hold a pid, and so look accepted
            with contextlib.suppress(OSError):
                append_line(worker.path, WITHDRAWN_LINE)

    def reap(self) -> None:
        """Report the end of every worker that has ended; end its process group.

        The group is signalled before its leader is reaped: until then no other process
        can have the number.  (macOS has had no waitid before Python 3.13.)"""
        has_waitid, status = hasattr(os, "waitid"), 0
        with contextlib.suppress(ChildProcessError):
            while True:
                if has_waitid:
                    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
                    ended = os.waitid(os.P_ALL, 0, flags)
                    pid = ended.si_pid if ended else 0
                else:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid in self.workers:
                    kill_group(pid, signal.SIGKILL)
                if has_waitid:
                    status = os.waitpid(pid, 0)[1]
                self.deadlines.pop(pid, None)
                self.deadlines.setdefault(ORPHANS, time.monotonic() + LOOK_INTERVAL)
                worker = self.workers.pop(pid, None)
                if worker:
                    id, late = worker.unit["id"], str(worker.timed_out).lower()
                    self.send(f'["ended", "{id}", {status}, {late}]')

    def end_orphans(self) -> None:
        """Kill daemons that ended units have left running."""
        del self.deadlines[ORPHANS]
        for pid in child_pids().difference(self.workers, self.own_children):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------------------
# The end of what the fork server executes.
# ---------------------------------------------------------------------------
# ---------------------------------------------------------------------------
# Central server: the node's calls to it, in both dialects.
# ---------------------------------------------------------------------------

CHECK_OUT_TIMEOUT = 10  # seconds, so that a stop does not take long
STATUS_LIMIT = 16 * MEGABYTE  # bytes of an answer
FORM_SAFE = b"% ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"


class CentralError(Exception):
    """A request to central that failed.

    status: of its answer, None without one; unreached: there was no connection."""

    def __init__(
        self, message: str, status: int | None = None, unreached: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.unreached = status, unreached


class CentralServer:
    """The central server at *url*.  Each call raises CentralError."""

    def __init__(self, config: Config, url: str, port: int) -> None:
        self.config = config
        self.url = url
        self.port = port
        self.found_dialect: str | None = None  # the dialect of the last check-in
        self.may_know = False  # this node: it was sent a check-in, answered or not
        self.is_confirmed = False  # it has taken a check-in or check-out from here
        self.checked_in_at: float | None = None  # by time.time()
        self.error: str | None = None  # of the last call, if that failed
        no_proxy = urllib.request.ProxyHandler({})  # central is a neighbour
        self.opener = urllib.request.build_opener(no_proxy)

    @property
    def dialect(self) -> str | None:
        """The dialect that central speaks, None where it is not known yet."""
        pinned = self.config.dialect
        return self.found_dialect if pinned == "auto" else pinned

    @property
    def commits_late(self) -> bool:
        """Whether central may record a pid after it has taken the unit's report."""
        return self.dialect != "seed"

    def name(self, dialect: str) -> str:
        """Return the name under which this node checks in."""
        host: str = self.config.host
        return host if dialect == "seed" else f"{host}:{self.port}"

    def names(self) -> list[str]:
        """Return the names under which it may check in."""
        dialects = [self.dialect] if self.dialect else ["seed", "0.5"]
        return [self.name(dialect) for dialect in dialects]

    def check_in(self, busy: bool, actions: list[str]) -> None:
        """Tell central where this node is, and whether it takes work.

        The wrong dialect is answered with 500, so the other one is tried then.  An old
        central may also answer 500 for other reasons, so neither is ever ruled out.
        Source: protocol.md, "Node to central"."""
        config, dialects = self.config, ["seed", "0.5"]
        self.may_know = True
        if config.dialect != "auto":
            dialects = [config.dialect]
        elif self.dialect == "0.5":
            dialects.reverse()
        for dialect in dialects:
            fields = [("port", b"%d" % self.port)] if dialect == "seed" else []
            fields.append(("busy", b"true" if busy else b"false"))
            if dialect != "seed" and config.tag:
                fields.append(("tag", config.tag.encode()))
            if config.max_workers:
                fields.append(("max_workers", b"%d" % config.max_workers))
            fields.append(("enabled_actions", ",".join(actions).encode()))
            path = f"/node/{self.name(dialect)}"
            try:
                self._call("PUT", path, fields, config.central_timeout)
            except CentralError as error:
                if error.status != 500 or dialect == dialects[-1]:
                    raise
            else:
                self.found_dialect, self.is_confirmed = dialect, True
                self.checked_in_at = time.time()
                return

    def check_out(self, names: Iterable[str] = ()) -> None:
        """Have central release the units of this node, or of one with these *names*."""
        for name in names or self.names():  # one that central does not know is fine
            self._call("DELETE", f"/node/{name}", None, CHECK_OUT_TIMEOUT)
        self.is_confirmed = True

    def report(self, unit_id: str, pid: int | None, outcome: Outcome) -> bool:
        """Report a unit's outcome; return False where central does not know the unit.

        Source of the fields and their order: wire/new-report-*.request."""
        fields = [
            ("pid", b"%d" % (pid or 0)),
            ("id", unit_id.encode()),
            ("time", outcome.seconds.encode()),
            ("status", outcome.status.encode()),
            ("output", outcome.output),
        ]
        try:
            self._call("PUT", f"/work/{unit_id}", fields, self.config.report_timeout)
        except CentralError as error:
            if error.status != 404 or not self.is_confirmed:  # it may be another server
                raise
            self.error = None
            return False
        return True

    def running_pids(self) -> set[int]:
        """Return the pids that central believes to be running on this node.

        Source: protocol.md, "0.7 records the pid"."""
        body = self._call("GET", "/status", None, self.config.central_timeout)
        name = self.name("0.5")
        try:
            nodes = [node for node in json.loads(body)["nodes"] if node["host"] == name]
            return {int(pid) for node in nodes for pid in node["workers"]}
        except (ValueError, KeyError, TypeError) as error:
            wrong = f"GET /status: its answer is not CloudCrowd's: {error!r}"
            raise CentralError(wrong) from None

    def heartbeat(self) -> bytes:
        """Return the beginning of central's heartbeat."""
        return self._call("GET", "/heartbeat", None, self.config.central_timeout)

    def _call(
        self, method: str, path: str, fields: Fields | None, timeout: float
    ) -> bytes:
        """Make one request; return the body of a GET."""
        config, data = self.config, form_encoded(fields) if fields else None
        headers = {"User-Agent": f"crowdnode/{__version__}"}
        if config.http_authentication:
            headers["Authorization"] = basic_credentials(config)
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with self.opener.open(request, timeout=timeout) as reply:
                # A 2xx says it all, whatever becomes of the body.
                self.error = None
                return reply.read(STATUS_LIMIT) if method == "GET" else b""
        except urllib.error.HTTPError as error:
            error.close()
            sentence = f"it answered {error.code} {error.reason}"
            if error.code == 401:
                names = "" if config.login else "http_authentication, "
                place = config.file or "the configuration"
                sentence += f": check {names}login and password in {place}"
            failed = CentralError(sentence, error.code)
        except urllib.error.URLError as error:
            reason = error.reason
            refused = isinstance(reason, (ConnectionRefusedError, socket.gaierror))
            sentence = getattr(reason, "strerror", None) or str(reason)
            failed = CentralError(sentence, unreached=refused)
        except Exception as error:
            failed = CentralError(f"{type(error).__name__}: {error}")
        self.error = str(failed)
        raise failed


def form_encoded(fields: Fields) -> bytes:
    """Return *fields* as urllib.parse.urlencode does, in a tenth of the memory."""
    return b"&".join(name.encode() + b"=" + quoted(value) for name, value in fields)


def quoted(value: bytes) -> bytes:
    """Return *value* percent-encoded, as in a form."""
    value = value.replace(b"%", b"%25")
    for code in set(value.translate(None, FORM_SAFE)):
        value = value.replace(bytes([code]), b"%%%02X" % code)
    return value.replace(b" ", b"+")


def basic_credentials(config: Config) -> str:
    """Return the value of the header Authorization."""
    pair = f"{config.login}:{config.password}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


# ---------------------------------------------------------------------------
# What the node stands on: load and memory, preflight checks, the log, the lock file,
# threads and timers.
# ---------------------------------------------------------------------------

SCRAPE_UPTIME = re.compile(r"\d+\.\d+")
SCRAPE_LINUX_MEMORY = re.compile(r"MemFree:\s+(\d+) kB")
SCRAPE_LINUX_AVAILABLE = re.compile(r"MemAvailable:\s+(\d+) kB")
SCRAPE_MAC_MEMORY = re.compile(r"Pages free:\s+(\d+).")
SCRAPE_MAC_PAGE = re.compile(r"page size of (\d+) bytes")
SCRAPE_DEADLINE = 5  # seconds for uptime and vm_stat
RETRY_WAIT, RETRY_WAIT_LIMIT = 5, 60  # seconds; doubled at each failure
OTHER_MACHINE_AGE = 60  # seconds since node.pid was touched
LOG_SIZE, LOGS_KEPT = 10 * MEGABYTE, 5


def parse_load(uptime: str) -> float | None:
    """Return the one-minute load average in the output of ``uptime``."""
    match = SCRAPE_UPTIME.search(uptime)
    return float(match.group()) if match else None


def parse_meminfo(meminfo: str, pattern: re.Pattern[str]) -> int | None:
    """Return the bytes that *pattern* finds in the text of /proc/meminfo."""
    match = pattern.search(meminfo)
    return int(match[1]) * 1024 if match else None


def parse_vm_stat(vm_stat: str) -> int | None:
    """Return the free bytes in the output of macOS's ``vm_stat``."""
    page, free = SCRAPE_MAC_PAGE.search(vm_stat), SCRAPE_MAC_MEMORY.search(vm_stat)
    return int(free[1]) * int(page[1]) if page and free else None


def command_output(name: str) -> str:
    """Return what the command prints; empty where it is missing or hangs.

    LC_ALL=C: in another locale the first number with a point may be the clock."""
    try:
        output = run_command([name], SCRAPE_DEADLINE, {**os.environ, "LC_ALL": "C"})[1]
    except OSError:
        return ""
    return output.decode("utf-8", "replace")


def read_memory(pattern: re.Pattern[str]) -> int | None:
    """Return bytes of memory: on Linux what *pattern* finds, on macOS the free."""
    if sys.platform == "darwin":
        is_free = pattern is SCRAPE_LINUX_MEMORY
        return parse_vm_stat(command_output("vm_stat")) if is_free else None
    with contextlib.suppress(OSError):
        return parse_meminfo(read_file("/proc/meminfo").decode(), pattern)
    return None


def find_insecure(path: str) -> str | None:
    """Return what of *path* and the directories above it others can write to, if any.

    Above it, a sticky directory such as /tmp is fine."""
    place, sticky = os.path.realpath(path), 0
    while True:
        state = os.stat(place)
        is_writable = state.st_mode & 0o022 and not state.st_mode & sticky
        if is_writable or state.st_uid not in (0, os.geteuid()):
            return place
        if place == "/":
            return None
        place, sticky = os.path.dirname(place), 0o1000


def prepare_directories(config: Config) -> None:
    """Make the directories that the node writes to.  Raises CrowdError."""
    work = config.temp_storage_path
    for name, path in (("state_path", config.units_path), ("temp_storage_path", work)):
        try:
            make_private_directory(path)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "not writable")
            insecure = find_insecure(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                continue  # a full disk keeps no node from starting
            raise CrowdError(f"{name}: can't use {path}: {error.strerror}") from None
        if insecure:
            danger = f"others can write to {insecure}, and change what units write"
            remedy = "choose or make a directory that only this user can write to"
            raise CrowdError(f"{name}: {danger}: {remedy}")


def check_storage(config: Config) -> None:
    """Raise CrowdError unless what actions save can be kept."""
    try:
        STORES[config.storage](config).check()
    except OSError as error:
        wrong = f"can't be used: {error.strerror or error}"
        raise CrowdError(f"storage = {config.storage}: {wrong}") from None


def preflight_warnings(config: Config) -> list[str]:
    """Return warnings about the configuration and its files."""
    found, path = list(config.warnings), config.state_path
    with contextlib.suppress(OSError):
        if os.stat(path).st_mode & 0o077:
            found.append(f"state_path: others can look into {path}: chmod 700 {path}")
    return found + STORES[config.storage](config).warnings()


def host_warnings(config: Config) -> list[str]:
    """Return why central may not be able to dial the name that this node gives it.

    One name that central can't resolve stops the whole crowd (protocol.md)."""

    def is_loopback(host: str) -> bool:
        infos = socket.getaddrinfo(host, None)
        addresses = {str(info[4][0]).partition("%")[0] for info in infos}
        return all(ipaddress.ip_address(item).is_loopback for item in addresses)

    central = urllib.parse.urlsplit(config.central_server).hostname or ""
    try:
        is_local = is_loopback(config.host.strip("[]"))
    except (OSError, UnicodeError) as error:
        wrong = f"does not resolve here: {getattr(error, 'strerror', None) or error}"
        danger = "where central can't resolve it either, no node gets work"
        remedy = "set host, or add it to DNS or /etc/hosts"
        return [f"host = {config.host} {wrong}; {danger}: {remedy}"]
    with contextlib.suppress(OSError, UnicodeError):  # check_central() says so
        if is_local and not is_loopback(central):
            wrong = f"is a loopback address, but central is elsewhere ({central})"
            remedy = "set host to a name that central can dial"
            return [f"host = {config.host} {wrong}: {remedy}"]
    return []


log = logging.Logger("node")


def make_printable(record: logging.LogRecord) -> bool:
    """Escape control characters and indent further lines: a filter of the log."""
    text = record.getMessage().encode("utf-8", "backslashreplace").decode()
    if not text.isprintable():
        text = text.replace("\n", "\n    ")
        text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text)
    record.msg, record.args = text, None
    return True


class LogFile(logging.handlers.RotatingFileHandler):
    """A log file that asks the kernel for its size, which is twice as fast, and goes on
    in the same file where it can't be rotated."""

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """Return whether the file is full."""
        self.stream = self.stream or self._open()
        return os.fstat(self.stream.fileno()).st_size >= self.maxBytes

    def doRollover(self) -> None:
        """Begin a new file; if that fails, say so and try again at twice the size."""
        try:
            super().doRollover()
        except OSError as error:
            self.maxBytes *= 2
            log.error("can't rotate %s: %s", self.baseFilename, error)


def set_up_log(path: str | None, level: str) -> None:
    """Log to the file at *path*, or to standard error."""
    handler: logging.Handler = logging.StreamHandler()
    if path:  # opened with the first line: a full disk keeps no node from starting
        handler = LogFile(path, "a", LOG_SIZE, LOGS_KEPT, encoding="utf-8", delay=True)
    line = "%(asctime)s %(name)s %(levelname)s: %(message)s"
    handler.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S"))
    for name in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logging.addLevelName(getattr(logging, name), name.lower())
    logging.raiseExceptions = False  # a full disk is no reason for tracebacks
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    log.name = f"node[{os.getpid()}]"
    log.setLevel(level.upper())
    log.handlers, log.filters = [handler], [make_printable]


def log_problems(problems: Iterable[tuple[str, str]]) -> None:
    """Log sentences, each with its level."""
    for level, sentence in problems:
        log.log(getattr(logging, level.upper(), logging.INFO), "%s", sentence)


def log_output(source: str, data: bytes) -> None:
    """Log what a process has printed, line by line, under the name *source*."""
    for line in data.decode("utf-8", "replace").splitlines():
        fields = {"name": source, "levelno": logging.INFO, "levelname": "output"}
        log.handle(logging.makeLogRecord({**fields, "msg": line}))


def lock_file(path: str) -> int | None:
    """Return a locked descriptor of *path*, None if it is taken.  Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may have removed the file that we have opened.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    os.close(descriptor)
    return None


class NodeLock:
    """The lock file node.pid.  The kernel releases the lock when the node ends.

    Its first line is the node's pid, its second a JSON object: the identity of the
    process, its port, and the name under which it has checked in.  *earlier* is what
    an earlier node has left there."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.state_file("node.pid")
        self.descriptor = -1
        self._write_lock = threading.Lock()
        self.earlier: Json = {}
        self.content: Json = {}

    def acquire(self, patience: float = 0.0) -> bool:
        """Take the lock; return False where a node has it.  Raises CrowdError.

        *patience*: seconds; holder() takes the lock for a moment, too."""
        os.umask(0o077)  # from here on, all files are this user's alone
        deadline = time.monotonic() + patience
        try:
            make_private_directory(self.config.state_path)
            self.refuse_other_machine()
            while (descriptor := lock_file(self.path)) is None:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.02)
        except OSError as error:
            raise self._unusable(error) from None
        self.descriptor, self.earlier = descriptor, self.read()
        self.write(checked_in=self.earlier.get("checked_in"))
        return True

    def inherit(self, descriptor: int) -> None:
        """Go on with the lock that this process had as another version."""
        os.umask(0o077)
        os.set_inheritable(descriptor, False)
        self.descriptor = descriptor
        self.content = self.earlier = self.read()

    def lock_work(self) -> None:
        """Lock temp_storage_path as well.  Raises CrowdError where it is in use."""
        place = self.config.temp_storage_path
        try:
            if lock_file(os.path.join(place, ".lock")) is None:
                raise CrowdError(f"temp_storage_path: another node uses {place}")
        except OSError as error:  # a full disk keeps no node from starting
            log.warning("can't lock temp_storage_path: %s", error)

    def refuse_other_machine(self) -> None:
        """Raise CrowdError where a node of another machine lives in state_path.

        It touches the file; a network's file system may not pass on locks."""
        with contextlib.suppress(FileNotFoundError):
            age, content = time.time() - os.stat(self.path).st_mtime, self.read()
            here, keys = THIS_MACHINE, ("host", "boot_id")
            is_other = all(content.get(key, here[key]) != here[key] for key in keys)
            if is_other and age < OTHER_MACHINE_AGE:
                raise CrowdError(
                    f"a node runs on host {content['host']} with this state_path, "
                    f"{self.config.state_path}: each node needs its own"
                )

    def write(self, **changes: Any) -> None:
        """Write who the node is, and *changes*.  A full disk is a warning."""
        with self._write_lock:
            self.content = {**self.content, **THIS_MACHINE, **changes}
            with contextlib.suppress(OSError):
                self.content["started"] = start_of_process(os.getpid())
            try:
                data = f"{os.getpid()}\n{json.dumps(self.content)}\n".encode()
                # One write in place: a reader finds all of it, and it needs no room on
                # a full disk, since the file has its block.
                data = data.ljust(os.fstat(self.descriptor).st_size)
                os.pwrite(self.descriptor, data, 0)
            except OSError as error:
                log.warning("can't write %s: %s", self.path, error)

    def touch(self) -> bool:
        """Update the file's time, which other machines check; recreate a deleted file.
        Returns False if another node has done so."""
        with self._write_lock, contextlib.suppress(OSError):
            path, own = self.path, os.fstat(self.descriptor)
            same = os.path.exists(path) and os.path.samestat(os.stat(path), own)
            if not same:
                descriptor = lock_file(self.path)
                if descriptor is None:
                    return False
                log.warning("%s was deleted under this node; recreated", self.path)
                os.close(self.descriptor)
                self.descriptor = descriptor
        self.write()
        with contextlib.suppress(OSError):
            os.utime(self.descriptor)
        return True

    def read(self) -> Json:
        """Return the file's content, with the key pid; empty where there is none."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid, _, text = read_file(self.path).partition(b"\n")
            return {**(json.loads(text) if text else {}), "pid": int(pid)}
        return {}

    def holder(self) -> Json | None:
        """Return the content if a node has the lock, else None.  Raises CrowdError."""
        try:
            self.refuse_other_machine()
            # Empty, if the disk was full when the node started.
            return {"pid": 0, **self.read()} if is_locked(self.path) else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from None

    def release(self, forget: bool) -> None:
        """Let another node run here; *forget*: central knows nothing of this one."""
        if forget:
            remove_file(self.path)
        os.close(self.descriptor)

    def _unusable(self, error: OSError) -> CrowdError:
        path = self.config.state_path
        return CrowdError(f"state_path: can't use {path}: {error.strerror}")


def start_thread(target: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """Start a daemon thread.  Raises RuntimeError where the kernel has none to give."""
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


class PeriodicTimer(threading.Timer):
    """A timer that calls *step* every *interval* seconds, until stop().

    step may return other seconds to wait.  No exception ends the loop."""

    def __init__(self, step: Callable[[], float | None], interval: float) -> None:
        super().__init__(interval, step)
        self.step = step
        self.daemon = True
        self.woken = threading.Event()
        self.due_at: float | None = None  # by time.time(), for people

    def soon(self) -> None:
        """Call step now, or once more when the step under way has ended."""
        if self.is_alive():
            self.woken.set()

    def stop(self) -> None:
        """Stop the loop."""
        self.cancel()
        self.woken.set()

    def run(self) -> None:
        """Call step after one interval, and so on, until stop()."""
        delay = self.interval
        while True:
            self.due_at = time.time() + delay
            self.woken.wait(delay)
            self.woken.clear()
            if self.finished.is_set():
                return
            delay = self.interval
            try:
                delay = self.step() or self.interval
            except (OSError, MemoryError) as error:  # such as no descriptors
                reason = str(error) or "there is no memory"
                log.warning("a periodic step failed: %s; trying again", reason)
            except Exception:
                log.exception("a periodic step failed; trying again")


class Backoff:
    """Seconds to wait after each failure in a row: doubled, with jitter."""

    def __init__(self) -> None:
        self.wait = 0.0

    def next(self, least: float = 0) -> float:
        """Return the seconds until the next try, at least *least*."""
        self.wait = min(max(least, self.wait * 2 or RETRY_WAIT), RETRY_WAIT_LIMIT)
        return self.wait * random.uniform(0.8, 1.2)


def remove_tree(path: str) -> None:
    """Remove a directory, also one without permissions or of any depth."""
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError):
        with contextlib.suppress(OSError):
            run_command(["chmod", "-R", "u+rwx", path], TRANSFER_TIMEOUT)
            run_command(["rm", "-rf", path], TRANSFER_TIMEOUT)


# ---------------------------------------------------------------------------
# The node: accepts units from central, has them run, reports each outcome.
# ---------------------------------------------------------------------------

CHECK_IN_INTERVAL = 300  # seconds
MONITOR_INTERVAL = 3  # seconds
START_DEADLINE = 5  # seconds for the fork server to start a unit
SEND_DEADLINE = 10  # seconds for the fork server to read a message
RELOAD_PATIENCE = 60  # seconds for actions to load again after a fork server's death
READY_PATIENCE = 300  # seconds of a start, or without a fork server, until it gives up
STOP_PATIENCE = 30  # seconds that a stop may take, beyond drain_time
RECOVERY_DEADLINE = 60  # seconds at the start for reporting what is on disk
HAND_OVER_DEADLINE = 10  # seconds for requests and reports before an upgrade
REPORTERS = 4  # threads: central gets this many reports at once, at most
REFUSALS = 3  # answers of 500, while others are taken, until a report is given up

SUCCESS_HOLD, FAILURE_HOLD = 0.1, 0.5  # seconds after the reply
HOLD_LIMIT = 2  # seconds
HOLD_TICK = 0.05  # seconds between looks at what is held
HOLD_MEMORY = 600  # seconds without a find until reports are held less long again
QUICK = 10  # seconds from the reply to the report of a unit that is watched
STATUS_INTERVAL = 5  # seconds between looks at central's /status
STUCK_AFTER = 2  # seconds after its report that a pid still listed is stuck

STARTING, RUNNING, ENDED, WITHDRAWN = "starting", "running", "ended", "withdrawn"
OUTCOMES = ("succeeded", "failed", "died", "timed_out")
FAILED_SHOWN, RECENT_SHOWN = 20, 10  # units, in GET /status
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)  # seconds
DIED_UNWATCHED = "the worker died while no fork server watched it"

# What the fork server's Python is started with.  CPython keeps the syntax tree of a
# script in memory (10 MB for this one), but not that of a module.
LAUNCH = """
import json, socket, sys, types
sys.path[:] = [path for path in sys.path if path]  # without '', the work directory
channel = socket.socket(fileno=int(sys.argv[1]))
channel.set_inheritable(False)
with channel.makefile("rb") as file:
    source = file.read(int(file.readline()))
    configuration = json.loads(file.readline())
module = types.ModuleType("crowdnode")
module.FORK_SERVER, module.__file__ = True, sys.argv[2]
sys.modules["crowdnode"] = module
exec(compile(source, sys.argv[2], "exec"), module.__dict__)
del source
module.call_c("malloc_trim", 0)
module.ForkServer(channel, configuration).serve()
"""
END_OF_FORK_SERVER = b"\n# The end of what the fork server executes.\n"


class Unit:
    """A unit that this node has accepted, until central has taken its outcome.

    STARTING until the fork server reports its pid, RUNNING until the worker ends, ENDED
    until central has taken the outcome; WITHDRAWN: never reported."""

    def __init__(
        self, head: Json, config: Config, fork_server: ForkServerProcess | None
    ) -> None:
        self.head = head  # of its record
        self.id = str(head["id"])
        self.action: str = head["action"]
        self.path = f"{config.units_path}/{self.id}"  # of its record
        self.fork_server = fork_server  # None: an orphan, of an earlier process
        self.state = STARTING
        self.pid: concurrent.futures.Future[int] = concurrent.futures.Future()
        self.process_started = 0.0  # of an orphan, by boot_clock()
        self.began = time.monotonic()
        self.started_at = time.time()
        self.seconds: float | None = None  # that it took, once it has ended
        self.wait_status: int | None = None  # None where the node could not see it
        self.timed_out = False
        self.replies_due = 0  # requests whose reply with the pid is not written yet
        self.replied_at: float | None = None  # monotonic; when central was told it
        self.kind = ""  # of its outcome: one of OUTCOMES
        self.reason = ""  # why it failed
        self.is_logged = False
        # When to report again (monotonic); 0: queued, held or being reported; None: not
        # ended, or central has not been told its pid.
        self.due: float | None = None
        self.backoff = Backoff()
        self.refusals = 0  # reports answered with 500, while others were taken
        self.taken_before: Any = None  # what central had taken at the last refusal

    def __str__(self) -> str:
        label, stage = self.head.get("label") or "-", self.head["stage"]
        job = f"job {self.head['job_id']}"
        return f"unit {self.id} ({self.action[:200]}, {stage}, {job}, {label})"

    @property
    def worker(self) -> int:
        """The worker's pid; 0 where it is not known."""
        is_known = self.pid.done() and not self.pid.exception()
        return self.pid.result() if is_known else 0

    def age(self) -> float:
        """Return the seconds since it came, or that it took."""
        return time.monotonic() - self.began if self.seconds is None else self.seconds

    def status(self) -> Json:
        """Return what GET /status says of it."""
        keys = ("id", "job_id", "action", "stage")
        fields = {key: self.head[key] for key in keys}
        fields.update(action=self.action[:200], input=self.head.get("label", ""))
        fields.update(pid=self.worker or None, started_at=iso_time(self.started_at))
        fields["seconds"] = round(self.age(), 3)
        if self.seconds is not None:
            fields.update(outcome=self.kind or None, reason=self.reason or None)
            fields["ended_at"] = iso_time(self.started_at + self.seconds)
        return fields


class Reported:
    """A quick unit whose outcome central has taken, and may have lost since."""

    def __init__(self, path: str, pid: int | None, central: str | None) -> None:
        self.path = path  # of its record
        self.pid = pid
        self.central = central
        self.taken_at = time.monotonic()
        self.unlisted = 0  # looks in a row at which central did not list its pid


class ForkServerProcess:
    """A fork server, as the node sees it.

    *receive* gets this object and each message, on a thread of its own; after the last
    one it gets ``["gone"]``."""

    def __init__(
        self,
        config: Config,
        source: bytes,
        receive: Callable[[ForkServerProcess, list[Any]], None],
    ) -> None:
        """Start the process.  Raises OSError, RuntimeError."""
        self.receive = receive
        self.ready = threading.Event()  # its actions are loaded, or it has gone
        self.actions: dict[str, list[str]] = {}  # stages by name
        self.problems: list[tuple[str, str]] = []
        self.gone: str | None = None  # how it ended
        self.output = config.state_file("fork_server.out")
        self._send_lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        # A fork server that does not read must not block the node for long.
        deadline = struct.pack("ll", SEND_DEADLINE, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, deadline)
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC
            output = os.open(self.output, flags, 0o600)
        except OSError:  # a full disk keeps no node from starting
            output = os.open(os.devnull, os.O_WRONLY)
        with theirs, open(output, "wb") as file:
            self._process = subprocess.Popen(
                [PYTHON, "-u", "-c", LAUNCH, str(theirs.fileno()), PROGRAM],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, NODE_VARIABLE: str(os.getpid())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the node alone
                cwd="/",
            )
        self.pid = self._process.pid
        own_children.add(self.pid)
        try:
            self._reader = start_thread(self._read)
        except RuntimeError:
            self.kill()
            self._process.wait()
            own_children.discard(self.pid)
            self._socket.close()
            raise
        half = source.partition(END_OF_FORK_SERVER)[0]
        configuration = json.dumps({"config": vars(config), "machine": THIS_MACHINE})
        self.send(b"%d\n%s%s\n" % (len(half), half, configuration.encode()))

    def kill_worker(self, pid: int, number: int) -> bool:
        """Have it signal a worker's group; return False where it has gone."""
        return self.send(b'["kill", %d, %d]\n' % (pid, number))

    def send(self, data: bytes) -> bool:
        """Send a message, a line; return False where the fork server has gone."""
        with self._send_lock:
            try:
                self._socket.sendall(data)
                return True
            except BlockingIOError:  # half a message was sent, so it is of no use now
                log.error("the fork server has not read for %d s", SEND_DEADLINE)
                self.kill()
            except OSError:
                pass
            return False

    def finish(self) -> None:
        """Send no more units: it ends with its last worker."""
        with self._send_lock, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End it at once.  Its workers go on."""
        self._process.kill()

    def wait(self, seconds: float) -> None:
        """Wait for its end, and kill it after *seconds*."""
        self._reader.join(seconds)
        if self._reader.is_alive():
            self.kill()

    def log_output(self) -> None:
        """Move what it has printed to the log."""
        with contextlib.suppress(OSError):
            log_output("fork server", read_file(self.output, OUTPUT_TAIL))
            os.truncate(self.output, 0)

    def _read(self) -> None:
        with self._socket.makefile("rb") as file, contextlib.suppress(OSError):
            for line in file:
                try:
                    message = json.loads(line)
                    if message[0] == "ready":
                        self.actions, self.problems = message[1:]
                        self.ready.set()
                    else:
                        self.receive(self, message)
                except Exception:
                    log.exception("a message of the fork server: %r", line[:200])
        code = self._process.wait()
        own_children.discard(self.pid)
        self._socket.close()
        self.log_output()
        self.gone = f"killed by {signal_name(-code)}" if code < 0 else f"status {code}"
        try:
            self.receive(self, ["gone"])
        finally:
            self.ready.set()


class Overload:
    """The reasons to refuse work, by kind; calls *over* when the last one ends."""

    def __init__(self, over: Callable[[], None]) -> None:
        self.over = over
        self.reasons = {"starting": "the node is starting"}
        self.since = time.time()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.reasons)

    @property
    def reason(self) -> str | None:
        """All reasons in one line; None while work is accepted."""
        return "; ".join(list(self.reasons.values())) or None

    @property
    def state(self) -> str:
        """The node's state in one word, for people."""
        kinds = set(self.reasons)
        if kinds <= {"max_workers"}:
            return "full" if kinds else "accepting"
        return "stopping" if "stopping" in kinds else "refusing"

    def update(self, kind: str, reason: str | None) -> None:
        """Refuse work for *reason*; None: there is no reason of this *kind* now."""
        with self._lock:
            if not self.reasons:
                self.since = time.time()
            was_known = self.reasons.pop(kind, None) is not None
            if reason:
                self.reasons[kind] = reason
        is_usual = kind in ("max_workers", "stopping")
        if reason and not was_known:
            level = logging.INFO if is_usual else logging.WARNING
            log.log(level, "refusing work: %s", reason)
        elif was_known and not reason and not self.reasons:
            log.info("accepting work")
            self.over()


class Counters:
    """Counters and recent history of this node's units, guarded by Node.changed; an
    outcome counts when central has taken it, so that no two nodes count it."""

    def __init__(self) -> None:
        self.accepted = self.refused = self.reported = 0
        self.outcomes: dict[tuple[str, str], int] = {}  # by action and outcome
        # (action, stage): units up to each of BUCKETS and over, and seconds in all.
        self.durations: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        self.failed: deque[Json] = deque(maxlen=FAILED_SHOWN)
        self.recent: deque[Json] = deque(maxlen=RECENT_SHOWN)
        self.history: deque[Json] = deque(maxlen=60)  # a minute each
        self._minute_began, self._ended_before = time.monotonic(), 0

    def counts(self) -> dict[str, int]:
        """Return the counters of GET /status."""
        ended = dict.fromkeys(OUTCOMES, 0)
        for (_, outcome), count in self.outcomes.items():
            ended[outcome] += count
        first = {"accepted": self.accepted, "refused": self.refused}
        return {**first, **ended, "reported": self.reported}

    def add_outcome(self, unit: Unit, seconds: float, action: str) -> None:
        """Count an outcome under the name *action*, and remember it."""
        outcome, stage = (action, unit.kind), (action, unit.head["stage"])
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        empty = [0] * (len(BUCKETS) + 1)
        buckets, total = self.durations.setdefault(stage, (empty, [0.0]))
        buckets[bisect.bisect_left(BUCKETS, seconds)] += 1
        total[0] += seconds
        shown = unit.status()
        self.recent.appendleft(shown)
        if unit.kind != "succeeded":
            self.failed.appendleft(shown)

    def add_minute(self, load: float | None, free_memory: int | None) -> None:
        """Add an entry to the history if a minute has passed since the last one."""
        minutes = (time.monotonic() - self._minute_began) / 60
        if minutes >= 1:
            ended = sum(self.outcomes.values())
            rate = round((ended - self._ended_before) / minutes, 2)
            minute: Json = {"at": iso_time(time.time()), "load_average": load}
            minute.update(free_memory_bytes=free_memory, units_per_minute=rate)
            self.history.append(minute)
            self._minute_began, self._ended_before = time.monotonic(), ended


class ReportHold:
    """Holds reports of quick units until central has surely recorded their pids.

    CloudCrowd 0.7 records a pid after it has read the reply, in its dispatcher's
    thread, and overwrites what a report has done meanwhile.  That thread goes on to the
    next unit only then, so the next POST /work is a proof; otherwise time has to do.
    Node.check_reports finds what was reported too early all the same.
    Source: protocol.md, "0.7 records the pid"."""

    def __init__(self, release: Callable[[Unit], None]) -> None:
        self.release = release
        self.factor = 1.0  # of the times; doubled when they were too short
        self._found_at = 0.0
        self._held: list[tuple[float, bool, Unit]] = []  # (due, is a success, unit)
        self._lock = threading.Lock()
        self.timer = PeriodicTimer(self.tick, MONITOR_INTERVAL)

    def put(self, unit: Unit) -> None:
        """Release *unit* when its time has come."""
        is_success = unit.wait_status == 0
        hold = SUCCESS_HOLD if is_success else FAILURE_HOLD
        due = (unit.replied_at or 0.0) + min(hold * self.factor, HOLD_LIMIT)
        if due <= time.monotonic():
            return self.release(unit)
        with self._lock:
            self._held.append((due, is_success, unit))
            is_first = len(self._held) == 1
        if is_first:
            self.timer.soon()
        return None

    def dispatched(self) -> None:
        """Release the successes: central has sent another unit."""
        self._release_if(lambda due, is_success: is_success)

    def tick(self) -> float | None:
        """Release what has been held long enough; look again soon if there is more."""
        now = time.monotonic()
        self._release_if(lambda due, is_success: due <= now)
        return HOLD_TICK if self._held else None

    def _release_if(self, is_ready: Callable[[float, bool], bool]) -> None:
        with self._lock:
            ready = [item for item in self._held if is_ready(*item[:2])]
            if ready:
                self._held = [item for item in self._held if not is_ready(*item[:2])]
        for _, _, unit in ready:
            self.release(unit)

    def found(self) -> None:
        """Hold reports longer: one came too early."""
        self._found_at = time.monotonic()
        self.factor = min(2 * self.factor, HOLD_LIMIT / SUCCESS_HOLD)

    def relax(self, now: float) -> None:
        """Hold reports less long, when none came too early for HOLD_MEMORY."""
        if self.factor > 1 and now - self._found_at > HOLD_MEMORY:
            self._found_at = now
            self.factor = max(1.0, self.factor / 2)


class Node:
    """A node: accepts units from central, has them run, reports each outcome.

    *lock*: its lock file; *load*: reads the configuration anew; *inherited*: this
    process was a node of another version of this program before.  ``changed`` guards
    the units and their states."""

    def __init__(
        self,
        config: Config,
        port: int,
        lock: NodeLock,
        load: Callable[[], Config],
        finish_requests: Callable[[float], None],
        inherited: bool,
    ) -> None:
        self.config = config
        self.port = port
        self.lock = lock
        self.load = load
        self.finish_requests = finish_requests
        self.inherited = inherited

        self.source = read_file(PROGRAM)  # what the fork servers run, whatever comes
        own_version = rb"(?m)^__version__ = .%s." % re.escape(__version__).encode()
        if not re.search(own_version, self.source):
            raise CrowdError(f"{PROGRAM} has been replaced while it started")
        self.began = time.monotonic()
        self.started_at = time.time()
        self.central = CentralServer(config, config.central_server, port)
        self.centrals = {self.central.url: self.central}
        self.changed = threading.Condition(threading.RLock())
        self.units: dict[str, Unit] = {}
        self.active: dict[Unit, None] = {}  # those whose workers live, in order
        self.reported: dict[str, Reported] = {}  # see check_reports()
        self.unreached: set[Unit] = set()  # whose last report central has not received
        self.fork_server: ForkServerProcess | None = None
        self.restarts = 0  # of fork servers
        self.to_report: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self.reporters: list[threading.Thread] = []
        self.hold = ReportHold(self.to_report.put)
        self.counters = Counters()
        self.check_in_timer = PeriodicTimer(
            self.check_in_periodically, CHECK_IN_INTERVAL
        )
        self.monitor_timer = PeriodicTimer(self.monitor_system, MONITOR_INTERVAL)
        self.timers = [
            self.check_in_timer,
            self.monitor_timer,
            PeriodicTimer(self.remove_stale_directories, MONITOR_INTERVAL),  # slow
            PeriodicTimer(self.check_reports, STATUS_INTERVAL),
        ]
        self.overload = Overload(self.check_in_timer.soon)
        self.check_in_backoff = Backoff()
        self.load_average: float | None = None
        self.free_memory: int | None = None  # bytes
        self.available_memory: int | None = None  # bytes
        self.error: Exception | None = None  # that ended the start
        self.may_be_known = inherited  # to central
        self.has_survivors = True  # no check-out follows, which would release units
        self.is_stopping = self.is_checked_out = self.is_replaced = False
        self.reload_lock = threading.Lock()  # held while a fork server is exchanged
        self.unlocked: set[str] = set()  # units whose workers had gone at the last tick
        self.strays: set[int] = set()  # unknown children at the last tick
        self.warned: set[str] = set()  # of what is logged only once
        self.signal_reader, self.signal_writer = os.pipe()

    # ---- life, in the seed's order ------------------------------------------

    def run(self, started: Callable[[], None]) -> bool:
        """Start, call *started*, and work until a signal comes; return whether a new
        version of this program is to go on in this process.

        The main thread only waits for signals, so they are heard at any time.  Raises
        what keeps the node from starting."""
        self.trap_signals()
        start_thread(self.start_in_background, started)
        while True:
            number = self.next_signal()
            if number == signal.SIGHUP:
                try:
                    start_thread(self.reload)
                except RuntimeError as error:
                    log.error("not reloaded, everything stays as it was: %s", error)
            elif number:
                break
            elif self.error:
                raise self.error
            elif self.is_replaced:
                signal.pthread_sigmask(signal.SIG_BLOCK, NODE_SIGNALS)  # until it runs
                number = self.next_signal(0)
                while number in (0, signal.SIGHUP):
                    number = self.next_signal(0)
                if number is None:
                    return True
                break
        self.is_stopping = True
        if self.may_be_known:
            self.shut_down()
        for _ in range(3):  # a fork server that loads; what units have left behind
            for pid in own_children.union(filter(is_descendant, child_pids())):
                kill_group(pid, signal.SIGKILL)
            time.sleep(0.01)  # what these have left becomes our child
        if not self.may_be_known:
            raise CrowdError(f"stopped by {signal_name(number)} while starting")
        return False

    def start_in_background(self, started: Callable[[], None]) -> None:
        """Start; pass what goes wrong to the main thread."""
        try:
            with self.reload_lock:  # a reload waits for the end of the start
                self.start()
            started()
        except Exception as error:
            self.error = error
            self.wake(0)

    def thread_died(self, arguments: Any) -> None:
        """Stop the node: a loop has ended that must not (threading.excepthook)."""
        self.wake(signal.SIGTERM)
        log.error("a thread died: %r; stopping", arguments.exc_value)

    def start(self) -> None:
        """Load the actions, report what an earlier node left, check in.

        The routes answer 503 meanwhile.  Central may send units before it answers the
        check-in, which therefore comes last.  A process that became another version has
        lost nothing, so it has nothing to release.  Raises CrowdError."""
        self.start_reporters()
        self.hold.timer.start()
        fork_server = self.start_fork_server(self.config)
        self.use_fork_server(fork_server)
        if self.config.is_job:  # --run waits for them on standard output
            loaded = [fork_server.actions, fork_server.problems]
            print(json.dumps(loaded), flush=True)
        self.has_survivors = self.inherited or self.has_living_worker()
        self.adopt_records()
        self.read_machine()
        if not self.inherited:
            self.release_earlier_units()
        self.has_survivors = True
        if self.is_stopping:
            raise CrowdError("stopped by a signal while starting")
        self.may_be_known, self.is_checked_out = True, False
        self.overload.reasons.pop("starting", None)
        try:
            self.check_in()
        except CentralError as error:
            if not self.inherited:
                raise self.not_connected(error) from None
            log.warning("%s", self.not_connected(error))
        for timer in self.timers:
            timer.start()
        if not self.central.checked_in_at:
            self.check_in_timer.soon()
        has = "has checked in" if self.central.checked_in_at else "has yet to check in"
        actions = ", ".join(self.actions)
        log.info(
            "crowdnode %s, %s port %d, %s with %s; actions: %s", __version__,
            self.config.host, self.port, has, self.central.url, actions,
        )  # fmt: skip
        if self.inherited:
            said = f"going on as version {__version__}; actions: {actions}"
            self.note_reload(True, said)
        if not self.is_stopping and not fork_server.gone:
            faulthandler.cancel_dump_traceback_later()  # see run_node()

    def release_earlier_units(self) -> None:
        """Have central release what only central remembers of earlier nodes here.

        What is on disk is reported first.  While an earlier node's worker lives nothing
        was lost, since records survive whatever ends a node.  A node that checked in
        under another name or elsewhere is checked out in any case, and its units are
        others' then.  Raises CrowdError."""
        earlier: Json = self.lock.earlier.get("checked_in") or {}
        url, names = earlier.get("url") or "", earlier.get("names") or []
        own = {self.central.name("seed"), self.central.name("0.5")}
        is_other = url != self.central.url or bool(set(names) - own)
        is_renamed = bool(earlier) and is_other
        if self.active and not is_renamed:
            return
        deadline = time.monotonic() + RECOVERY_DEADLINE
        while any(unit.due == 0 for unit in self.waiting()) and not self.is_stopping:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        try:
            if is_renamed:
                try:
                    self.central_at(url).check_out(names)
                    self.withdraw_all(url)
                    known = " and ".join(names)
                    log.info("checked out %s, an earlier node here, at %s", known, url)
                except CentralError as error:
                    if url == self.central.url:
                        raise
                    log.warning("can't check out an earlier node at %s: %s", url, error)
            if not self.active:
                self.check_out()
        except CentralError as error:
            raise self.not_connected(error) from None
        for unit in list(self.active):
            if unit.state == WITHDRAWN:
                self.signal(unit, signal.SIGKILL)

    def check_in(self) -> None:
        """Note the name in node.pid, for central may know it from a check-in that it
        does not answer, and check in.  Raises CentralError."""
        note = {"url": self.central.url, "names": self.central.names()}
        self.lock.write(checked_in=note)
        self.central.check_in(bool(self.overload), self.actions)

    def check_in_periodically(self) -> float:
        """Check in; return the seconds until the next time: soon if this one failed."""
        try:
            self.check_in()
        except CentralError as error:
            log.warning("%s", self.not_connected(error))
            return self.check_in_backoff.next()
        self.check_in_backoff = Backoff()
        return CHECK_IN_INTERVAL

    def check_out(self) -> None:
        """Check out, and withdraw all units of this central.  Raises CentralError."""
        self.central.check_out()
        self.is_checked_out = True
        self.withdraw_all(self.central.url)

    def not_connected(self, error: CentralError) -> CrowdError:
        """Return *error* in a sentence, which begins as the seed's."""
        url = self.config.central_server
        return CrowdError(f"Failed to connect to the central server ({url}). {error}")

    def monitor_system(self) -> None:
        """Look at the machine, the records and the fork server: a tick of the loop.

        What an error further down must not keep from happening comes first."""
        if not self.lock.touch():
            log.error("another node has taken over %s: stopping", self.lock.path)
            self.wake(signal.SIGTERM)
        now, waiting = time.monotonic(), self.waiting()
        self.requeue(unit for unit in waiting if unit.due and unit.due <= now)
        self.hold.relax(now)
        self.read_machine()
        self.counters.add_minute(self.load_average, self.free_memory)
        self.overload.update("disk", self.disk_problem())
        self.overload.update("start", None)
        self.adopt_records()
        self.end_strays()
        self.make_room()
        self.leave_former_centrals()

    def read_machine(self) -> None:
        """Read load average and memory; refuse work while a limit is exceeded."""
        self.load_average = parse_load(command_output("uptime"))
        if self.load_average is None:
            self.warn_once("uptime does not tell the load average: asking the kernel")
            with contextlib.suppress(OSError):
                self.load_average = os.getloadavg()[0]
        self.free_memory = read_memory(SCRAPE_LINUX_MEMORY)
        self.available_memory = read_memory(SCRAPE_LINUX_AVAILABLE)
        for name, value, what, is_low in (
            ("max_load", self.load_average, "the load average is {:.2f}", False),
            ("min_free_memory", self.free_memory, "{:.0f} MB of memory are free", True),
            ("min_available_memory", self.available_memory,
             "{:.0f} MB of memory are available", True),
        ):  # fmt: skip
            limit: float | None = getattr(self.config, name)
            if value is None and limit:
                self.warn_once(f"{name}: this machine has no value for it; ignored")
            reason = None
            if value is not None and limit:
                shown = value / MEGABYTE if is_low else value
                if shown < limit if is_low else shown > limit:
                    reason = f"{what.format(shown)}, {name} is {limit:g}"
            self.overload.update(name, reason)

    def warn_once(self, sentence: str) -> None:
        """Log a warning, once."""
        if sentence not in self.warned:
            self.warned.add(sentence)
            log.warning("%s", sentence)

    def disk_problem(self) -> str | None:
        """Return why no record could be written now, or None."""
        path = f"{self.config.units_path}/.try"
        try:
            with open(path, "wb", 0) as file:
                try:
                    write_all(file.fileno(), bytes(4096))
                finally:
                    os.unlink(path)
        except OSError as error:
            return f"can't write to {self.config.units_path}: {error.strerror}"
        return None

    def trap_signals(self) -> None:
        """Have Python write each signal's number to a pipe, to wake the main thread.

        A parent may have blocked signals, or ignored SIGCHLD."""
        os.set_blocking(self.signal_writer, False)
        signal.set_wakeup_fd(self.signal_writer)
        for number in NODE_SIGNALS:
            signal.signal(number, wake_up)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        threading.excepthook = self.thread_died

    def next_signal(self, seconds: float | None = None) -> int | None:
        """Wait for a signal; return its number, 0 for wake(0), None after *seconds*."""
        if is_readable(self.signal_reader, seconds):
            return os.read(self.signal_reader, 1)[0]
        return None

    def wake(self, number: int) -> None:
        """Wake the main thread, as if the signal had come."""
        os.write(self.signal_writer, bytes([number]))

    def shut_down(self) -> None:
        """Refuse work, wait drain_time for what runs, check out, end the rest.

        A second signal skips the waiting.  A stop that hangs is ended, see run_node();
        the next node here does the rest."""
        patience = self.config.drain_time + STOP_PATIENCE
        faulthandler.dump_traceback_later(patience, exit=True)
        self.overload.update("stopping", "the node is stopping")
        with contextlib.suppress(OSError):
            self.adopt_records()  # an upgraded node may not have adopted them yet
        log.info("stopping; units running: %d", len(self.active))
        self.check_in_timer.stop()
        self.start_reporters()  # an upgrade may have stopped them
        deadline = time.monotonic() + self.config.drain_time
        while self.units and time.monotonic() < deadline:
            if self.next_signal(0.05) not in (None, 0, signal.SIGHUP):
                break
        for timer in self.timers:
            timer.stop()
        try:
            self.check_out()
        except CentralError as error:
            log.warning("can't check out: %s; the next node here will do it", error)
            with self.changed:
                for unit in self.active:  # that check-out releases them, too
                    self.mark_withdrawn(unit)
        for number, patience in ((signal.SIGTERM, KILL_GRACE), (signal.SIGKILL, 2)):
            with self.changed:
                for unit in self.active:
                    log.info("%s: ended by %s", unit, signal_name(number))
                    self.signal(unit, number)
            deadline = time.monotonic() + patience
            while self.active and time.monotonic() < deadline:
                with self.changed:
                    self.changed.wait(0.05)
                    self.judge_orphans()
        if self.fork_server:
            self.fork_server.finish()
            self.fork_server.wait(KILL_GRACE)
        log.info("stopped")

    # ---- reload and upgrade -------------------------------------------------

    def reload(self) -> None:
        """Reopen the log; read the configuration; start a fork server with the actions
        as they are now; if all that works, use both.

        Workers are not disturbed: the old fork server ends with its last one.  Where
        this program's file has changed, the new version goes on instead."""
        with self.reload_lock:
            for handler in log.handlers:
                handler.close()  # it opens its file again with the next line
            try:
                config = self.load()
                before, after = vars(self.config), vars(config)
                keys = (*FIXED_KEYS, "central_server")
                moved = [key for key in keys if after[key] != before[key]]
                for central in self.centrals.values():
                    if central is not self.central and central.may_know:
                        moved.append("central_server")  # at an earlier reload
                config.keep_fixed_keys(self.config)
                prepare_directories(config)
                if self.has_new_version(config):
                    if moved:  # the new version would not know of the former values
                        what = f"{PROGRAM} has been replaced, and {', '.join(moved)}"
                        raise CrowdError(f"{what} changed: restart the node")
                    return self.hand_over()
                warnings = preflight_warnings(config)
                self.use_fork_server(self.start_fork_server(config))
            except (CrowdError, OSError, RuntimeError) as error:
                said = f"not reloaded, everything stays as it was: {error}"
                log.error("%s", said)
                return self.note_reload(False, said)
            old, new = vars(self.config), vars(config)
            changed = [name for name in NODE_KEYS if new[name] != old[name]]
            old.update(new)  # all parts have this object
            log_problems(("warning", warning) for warning in warnings)
            self.central = self.central_at(config.central_server)
            log.setLevel(config.log_level.upper())
            said = f"reloaded; changed keys: {', '.join(changed) or 'none'}; "
            said += f"actions: {', '.join(self.actions)}"
            log.info("%s", said)
            problems = self.fork_server.problems if self.fork_server else []
            wrong = [text for level, text in problems if level in ("error", "warning")]
            self.note_reload(True, "\n".join([said, *config.warnings, *wrong]))
            self.check_in_timer.soon()
        try:
            check_storage(config)
        except CrowdError as error:
            log.error("%s", error)
        return None

    def note_reload(self, is_done: bool, said: str) -> None:
        """Write down what came of a reload, for --reload, which waits for it."""
        number = self.lock.content.get("reload", {}).get("number", 0) + 1
        note = {"number": number, "is_done": is_done, "said": said}
        self.lock.write(reload=note)

    def has_new_version(self, config: Config) -> bool:
        """Return whether this program's file has been replaced.  Raises CrowdError
        where what replaces it does not work here."""
        try:
            if read_file(PROGRAM) == self.source:
                return False
        except OSError:
            return False  # it is just being replaced
        for arguments, pattern in (
            # An empty file exits with 0, and so does one without its last lines.
            (["--version"], rb"crowdnode \d[\w.]*\n"),
            ([*config.arguments(), "--status", INHERIT_FLAG, "-1", "-1"], rb"(?s).*"),
        ):
            command = [PYTHON, PROGRAM, *arguments]
            status, output, errors = run_command(command, LOAD_DEADLINE)
            is_right = status in (EXIT_OK, EXIT_NOT_RUNNING, EXIT_SILENT)
            if not is_right or not re.fullmatch(pattern, output):
                said = errors.decode("utf-8", "replace").strip()
                said = said or f"{arguments[0]} printed {output[:80]!r}"
                wrong = "has been replaced by a version that does not work here"
                raise CrowdError(f"{PROGRAM} {wrong}: {said}")
        return True

    def hand_over(self) -> None:
        """Finish the requests and reports under way; then the main thread executes the
        new version in this process, with the same pid, lock and listener."""
        log.info("%s has been replaced: going on as the new version", PROGRAM)
        for timer in self.timers:
            timer.stop()
        self.finish_requests(HAND_OVER_DEADLINE)
        for _ in self.reporters:
            self.to_report.put(None)
        deadline = time.monotonic() + HAND_OVER_DEADLINE
        for thread in self.reporters:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.is_replaced = True
        self.wake(0)

    # ---- fork servers -------------------------------------------------------

    @property
    def actions(self) -> list[str]:
        """The names of the actions that this node has."""
        return sorted(self.fork_server.actions) if self.fork_server else []

    def start_fork_server(self, config: Config) -> ForkServerProcess:
        """Start a fork server, and wait until it has loaded the actions.

        Raises CrowdError, OSError, RuntimeError."""
        fork_server = ForkServerProcess(config, self.source, self.receive)
        in_time = fork_server.ready.wait(LOAD_DEADLINE)
        fork_server.log_output()
        log_problems(fork_server.problems)
        if fork_server.actions and not self.is_stopping:
            return fork_server
        gone = fork_server.gone
        fork_server.kill()
        if gone:
            raise CrowdError(f"the fork server died while loading: {gone}")
        if not in_time:
            raise CrowdError(f"the actions did not load within {LOAD_DEADLINE} s")
        reasons = "".join(f"\n{sentence}" for _, sentence in fork_server.problems)
        where = f"{config.actions_path}, and none built in is enabled"
        raise CrowdError(f"no action: there is none in {where}{reasons}")

    def use_fork_server(self, fork_server: ForkServerProcess) -> None:
        """Give units to *fork_server*; the one before finishes.  Raises CrowdError."""
        if fork_server.gone:
            raise CrowdError(f"the fork server has died: {fork_server.gone}")
        old, self.fork_server = self.fork_server, fork_server
        if old:
            old.finish()
            if not self.is_stopping:
                faulthandler.cancel_dump_traceback_later()
        self.overload.update("fork server", None)
        if fork_server.gone:  # meanwhile; then receive() has taken it for an old one
            with contextlib.suppress(RuntimeError):
                start_thread(self.receive, fork_server, ["gone"])

    def receive(self, fork_server: ForkServerProcess, message: list[Any]) -> None:
        """Handle a message of a fork server (on its reader's thread)."""
        kind, *rest = message
        if kind == "gone":
            return self.fork_server_gone(fork_server)
        with self.changed:
            unit = self.units.get(str(rest[0]))
            if unit and unit.fork_server is not fork_server:
                unit = None
            if kind == "started":
                pid, process_started = rest[1:]
                if unit is None or unit.state == WITHDRAWN:
                    fork_server.kill_worker(pid, signal.SIGKILL)
                    return None
                unit.state, unit.process_started = RUNNING, process_started
                self.counters.accepted += 1
                unit.pid.set_result(pid)
            elif unit in self.active and kind == "ended":
                self.settle(unit, *rest[1:])
            elif unit in self.active and kind == "rejected":
                self.reject(unit, rest[1])
                self.monitor_timer.soon()  # it adopts a record that is in the way
        return None

    def fork_server_gone(self, gone: ForkServerProcess) -> None:
        """Replace the fork server; its workers go on, what was starting is refused."""
        is_current = gone is self.fork_server and not self.is_stopping
        if is_current:
            log.error("the fork server died (%s); starting another", gone.gone)
            self.overload.update("fork server", "the fork server is starting")
            faulthandler.dump_traceback_later(READY_PATIENCE, exit=True)
        with self.changed:
            for unit in list(self.units.values()):
                if unit.fork_server is gone:
                    unit.fork_server = None
                    if unit.state == STARTING:
                        self.withdraw(unit, "the fork server has gone")
        self.monitor_timer.soon()  # it looks after the orphans
        backoff, give_up = Backoff(), time.monotonic() + RELOAD_PATIENCE
        while is_current:
            with self.reload_lock:
                if self.fork_server is not gone or self.is_stopping:
                    return None
                try:
                    fork_server = self.start_fork_server(self.config)
                    # What ended the old one may keep this one from reading files.
                    lost = set(gone.actions) - set(fork_server.actions)
                    if lost and time.monotonic() < give_up:
                        fork_server.kill()
                        raise CrowdError(f"{', '.join(sorted(lost))} did not load")
                    self.restarts += 1
                    return self.use_fork_server(fork_server)
                except (CrowdError, OSError, RuntimeError) as error:
                    wait = backoff.next()
                    log.error("no fork server: %s; again in %.0f s", error, wait)
            time.sleep(wait)
        return None

    def end_strays(self) -> None:
        """Kill and reap unknown children that were there at the last tick, too: workers
        of a dead fork server, what these have left running (see become_subreaper), and
        the fork server of the version before an upgrade."""
        orphans = {unit.worker for unit in list(self.active)}
        strays = child_pids() - own_children
        for pid in strays & self.strays:
            with contextlib.suppress(OSError):
                if pid not in orphans and is_descendant(pid):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        self.strays = strays

    # ---- a unit's way -------------------------------------------------------

    def accept(self, request: Json) -> Unit:
        """Return the unit for *request*, which central has sent, with its pid known.

        The caller owes a call of replied().  Raises NodeOverloaded."""
        self.hold.dispatched()
        head = record_head(request, self.central.url)
        message = json.dumps(["unit", json.dumps(head), request]).encode() + b"\n"
        unit, is_new = self.find_or_add(head)
        fork_server = unit.fork_server
        if is_new and fork_server and not fork_server.send(message):
            self.reject(unit, "the fork server has gone")
        try:
            pid = unit.pid.result(START_DEADLINE)
        except concurrent.futures.TimeoutError:
            with self.changed:
                if not unit.pid.done():
                    reason = f"the fork server has not answered for {START_DEADLINE} s"
                    self.withdraw(unit, reason)
                    if fork_server:
                        fork_server.kill()  # its workers go on
            pid = unit.pid.result()
        if is_new:
            log.info("%s: started as process %d", unit, pid)
        return unit

    def find_or_add(self, head: Json) -> tuple[Unit, bool]:
        """Return the unit for *head*, and whether it was added.

        The same id and content is the same unit.  Other content supersedes it: central
        sends that only once it has released the first.  Raises NodeOverloaded."""
        name, deadline = str(head["id"]), time.monotonic() + START_DEADLINE
        with self.changed:
            self.drop_reported(name)  # central has given it out again
            while name in self.units:
                unit = self.units[name]
                if unit.head["digest"] == head["digest"] and unit.state != WITHDRAWN:
                    unit.replies_due += 1
                    return unit, False
                self.withdraw(unit, "central has sent it anew")
                patience = deadline - time.monotonic()
                if name in self.units and not self.changed.wait(max(0.0, patience)):
                    raise NodeOverloaded(f"{unit} is still being ended")
            limit, running = self.config.max_workers, len(self.active)
            if limit and running >= limit:
                reason = f"{running} units are running, max_workers is {limit}"
                self.overload.update("max_workers", reason)
            if self.overload:
                raise NodeOverloaded(self.overload.reason)
            unit = Unit(head, self.config, self.fork_server)
            unit.replies_due = 1
            self.units[name] = unit
            self.active[unit] = None
            return unit, True

    def refused(self, reason: str) -> None:
        """Count a refusal; have a check-in follow, for central takes us for busy."""
        with self.changed:
            self.counters.refused += 1
        if not self.overload:
            self.overload.update("start", reason)

    def reject(self, unit: Unit, reason: str) -> None:
        """Remove a unit whose worker could not be started; its request is refused."""
        with self.changed:
            self.forget(unit)
            if not unit.pid.done():
                unit.pid.set_exception(NodeOverloaded(reason))

    def replied(self, unit: Unit, written: bool) -> None:
        """Note that the reply that names the pid has been written, or could not be.

        If not, central believes that the unit was not accepted, so it is withdrawn."""
        with self.changed:
            unit.replies_due -= 1
            if written:
                unit.replied_at = time.monotonic()
            if unit.replied_at is not None:
                self.queue_report(unit)
            elif not unit.replies_due:
                self.withdraw(unit, "the reply could not be written")

    def settle(
        self, unit: Unit, wait_status: int | None = None, timed_out: bool = False
    ) -> None:
        """Handle the end of the worker of *unit*, and queue the report.

        The one place where a unit ends: after a normal end, a crash of the worker, the
        fork server or the node, and for records of an earlier process."""
        with self.changed:
            unit.seconds = unit.age()
            unit.wait_status = wait_status
            unit.kind = "succeeded" if wait_status == 0 else ""
            unit.timed_out = unit.timed_out or timed_out
            self.active.pop(unit, None)
            self.changed.notify_all()
            if unit.state == WITHDRAWN:
                self.remove(unit)
            else:
                unit.state = ENDED
                if wait_status != 0:
                    with contextlib.suppress(OSError):  # report() tries again
                        self.outcome_of(unit)
                self.queue_report(unit)
            self.make_room()

    def make_room(self) -> None:
        """End the refusal for max_workers, if there is room."""
        limit = self.config.max_workers
        if not limit or len(self.active) < limit:
            self.overload.update("max_workers", None)

    def outcome_of(self, unit: Unit) -> Outcome | None:
        """Return the outcome in the unit's record; None where the record is another's.

        What ended a worker that left none is written down before it is reported, so
        that a second report, even by the next node, says the same.  Raises OSError."""
        record = self.read_record(unit)
        if record.head and record.head["digest"] != unit.head["digest"]:
            return None
        if record.outcome:
            unit.kind = unit.kind or record.outcome.status
            return record.outcome
        with self.changed:
            if unit.state != ENDED:
                return None
            unit.kind = "timed_out" if unit.timed_out else "died"
            last_words = ""
            with contextlib.suppress(OSError):
                printed = read_file(f"{unit.path}.out", MESSAGE_TAIL)
                words = printed.decode("utf-8", "replace").strip()
                last_words = f"; its last words: {words}" if words else ""
            limit = self.config.limit(unit.action, "time_limit")
            cause = DIED_UNWATCHED
            if unit.timed_out:
                cause = f"time_limit{f' of {limit:g} s' if limit else ''} exceeded"
            elif unit.wait_status is not None:
                cause = f"the worker died: {describe_exit(unit.wait_status)}"
            output = failure(cause + last_words)
            outcome = Outcome("failed", f"{unit.age():.6f}", output)
            try:
                append_line(unit.path, outcome.line())
            except FileNotFoundError:
                pass
            except OSError as error:
                if unit.backoff.wait < RETRY_WAIT_LIMIT:
                    raise
                # For a minute now: report what the next node would derive.
                log.warning("%s: can't write its outcome: %s", unit, error)
                unit.wait_status, unit.timed_out = None, False
                outcome.output = failure(DIED_UNWATCHED + last_words)
            return outcome

    def read_record(self, unit: Unit) -> Record:
        """Return the record of *unit*, an empty one if it is gone.  Raises OSError."""
        try:
            return Record(read_file(unit.path))
        except (FileNotFoundError, OddRecord) as error:
            if unit.state != WITHDRAWN:
                log.warning("%s: its record can't be read: %s", unit, error)
            return Record()

    def withdraw(self, unit: Unit, reason: str) -> None:
        """End *unit* without a report: central has released it, or not got its pid."""
        with self.changed:
            if unit.state == WITHDRAWN:
                return
            was = unit.state
            log.info("%s: withdrawn: %s", unit, reason)
            self.mark_withdrawn(unit)
            if not unit.pid.done():
                unit.pid.set_exception(NodeOverloaded(reason))
            if was == ENDED:
                self.remove(unit)
            elif was == RUNNING:
                self.signal(unit, signal.SIGKILL)

    def withdraw_all(self, url: str) -> None:
        """Withdraw the units of the central at *url*, which has released them."""
        with self.changed:
            for name, entry in list(self.reported.items()):
                if entry.central in (None, url):
                    self.drop_reported(name)
            for unit in list(self.units.values()):
                if unit.head.get("central") not in (None, url):
                    continue
                if unit.state != WITHDRAWN:
                    self.mark_withdrawn(unit)
                if unit not in self.active:
                    self.remove(unit)

    def mark_withdrawn(self, unit: Unit) -> None:
        """Keep this node and the next one from reporting *unit*."""
        unit.state = WITHDRAWN
        try:
            head = self.read_record(unit).head
            if head and head["digest"] == unit.head["digest"]:
                append_line(unit.path, WITHDRAWN_LINE)
        except OSError as error:
            log.warning("%s: can't mark its record: %s", unit, error)

    def signal(self, unit: Unit, number: int) -> None:
        """Signal the worker of *unit* and its group, if it lives."""
        pid = unit.worker
        if unit.fork_server and unit.fork_server.kill_worker(pid, number):
            return  # its parent knows best whether it lives
        with contextlib.suppress(OSError):
            if is_same_process(pid, unit.process_started, unit.head):
                kill_group(pid, number)

    def remove(self, unit: Unit) -> None:
        """Remove the files of *unit*, and forget it; if that fails, try again later."""
        if self.units.get(unit.id) is not unit:
            return  # superseded: the files of that name are another's
        try:
            remove_file(f"{unit.path}.out")
            remove_file(unit.path)
        except OSError as error:
            log.warning("%s: can't remove its files: %s; trying again", unit, error)
            self.mark_withdrawn(unit)
        else:
            self.forget(unit)

    def forget(self, unit: Unit) -> None:
        """Remove *unit* from the node's tables."""
        with self.changed:
            if self.units.get(unit.id) is unit:
                del self.units[unit.id]
            self.active.pop(unit, None)
            self.changed.notify_all()
            self.make_room()

    # ---- reports ------------------------------------------------------------

    def central_at(self, url: str | None) -> CentralServer:
        """Return the central server at *url*, which is None in an old record."""
        url = url or self.central.url
        if url not in self.centrals:
            self.centrals[url] = CentralServer(self.config, url, self.port)
        return self.centrals[url]

    def leave_former_centrals(self) -> None:
        """Check out of a central that a reload replaced, once its units are reported.

        It may have sent units meanwhile, which were taken for the present one's."""
        for url, central in list(self.centrals.items()):
            if central is self.central or not central.may_know:
                continue
            with self.changed:
                heads = [unit.head for unit in self.units.values()]
            if any(head.get("central") == url for head in heads):
                continue
            del self.centrals[url]
            try:
                central.check_out()
                log.info("checked out at %s", url)
            except CentralError as error:
                log.warning("can't check out at %s: %s", url, error)

    def waiting(self) -> list[Unit]:
        """Return the units that have ended and whose outcome central has not taken."""
        with self.changed:
            return [unit for unit in self.units.values() if unit.state == ENDED]

    def queue_report(self, unit: Unit) -> None:
        """Queue the report if the unit has ended and the reply with its pid is sent."""
        is_told = unit.replied_at is not None and not unit.replies_due
        if unit.state == ENDED and is_told and unit.due is None:
            unit.due = 0.0
            if self.central_at(unit.head.get("central")).commits_late:
                self.hold.put(unit)
            else:
                self.to_report.put(unit)

    def start_reporters(self) -> None:
        """Start the threads that report."""
        self.reporters = [start_thread(self.report_units) for _ in range(REPORTERS)]

    def report_units(self) -> None:
        """Report outcomes to central, until None comes (one of the reporters)."""
        for unit in iter(self.to_report.get, None):
            try:
                self.report(unit)
            except Exception as error:
                self.postpone_report(unit, error)

    def postpone_report(self, unit: Unit, error: Exception) -> None:
        """Have *unit* reported again later; *error*: why it is not reported now."""
        is_unreached = isinstance(error, CentralError) and error.unreached
        is_local = is_unreached or isinstance(error, (OSError, MemoryError))
        # Else central may have taken it, and a second report is not free.
        wait = unit.backoff.next(0 if is_local else RETRY_WAIT_LIMIT)
        with self.changed:
            unit.due = time.monotonic() + wait
            if is_unreached:
                self.unreached.add(unit)
        is_known = is_local or isinstance(error, CentralError)
        log.warning(
            "%s: not reported: %s; again in %.0f s", unit, error, wait,
            exc_info=None if is_known else error,
        )  # fmt: skip

    def report(self, unit: Unit) -> None:
        """Report the outcome of *unit*.  Raises CentralError, and OSError where the
        outcome can't be read or written down now."""
        is_here = unit.state == ENDED and self.units.get(unit.id) is unit
        outcome = self.outcome_of(unit) if is_here else None
        if outcome is None:  # withdrawn, or its record is another's
            if is_here and unit.state == ENDED:
                self.forget(unit)
            return None
        if not unit.is_logged:
            self.log_outcome(unit, outcome)
            unit.is_logged = True
        central = self.central_at(unit.head.get("central"))
        try:
            is_known = central.report(unit.id, unit.worker, outcome)
        except CentralError as error:
            is_refused = error.status == 500 and outcome.status == "succeeded"
            if not is_refused or not self.is_too_much(unit):
                raise
            self.give_up(unit, outcome)
            return self.report(unit)
        if not is_known:
            log.warning("%s: central does not know it any more; discarded", unit)
        # Unknown names count as one: each is a series that Prometheus keeps.
        action = unit.action if unit.action in self.actions else "unknown"
        with self.changed:
            self.counters.reported += is_known
            self.counters.add_outcome(unit, float(outcome.seconds), action)
            if self.units.get(unit.id) is unit and unit.state == ENDED:
                is_quick = time.monotonic() - (unit.replied_at or 0.0) < QUICK
                if is_known and is_quick and central.commits_late:
                    self.keep_reported(unit)
                else:
                    self.remove(unit)
            ready, self.unreached = self.unreached, set()  # central is back
            self.requeue(ready)
        return None

    def is_too_much(self, unit: Unit) -> bool:
        """Return whether central refuses *unit* with 500 again and again, while it
        takes other reports, or check-ins."""
        taken = (self.counters.reported, self.central.checked_in_at)
        if taken != unit.taken_before:
            unit.refusals, unit.taken_before = unit.refusals + 1, taken
        return unit.refusals >= REFUSALS

    def give_up(self, unit: Unit, outcome: Outcome) -> None:
        """Have *unit* fail, because central can't take its outcome.

        Source: protocol.md: Rack refuses a form of more than 4 MB with a 500."""
        size = len(quoted(outcome.output))
        reason = (
            f"central refuses the report, whose form has {size} bytes, with 500. Rack "
            "takes 4194304: return less, or set RACK_QUERY_PARSER_BYTESIZE_LIMIT in "
            "central's environment"
        )
        log.error("%s: %s", unit, reason)
        line = Outcome("failed", outcome.seconds, failure(reason)).line()
        append_line(unit.path, line)
        unit.kind, unit.reason = "failed", reason

    def log_outcome(self, unit: Unit, outcome: Outcome) -> None:
        """Log an outcome, and what the worker has printed."""
        with contextlib.suppress(OSError):
            if os.stat(f"{unit.path}.out").st_size:
                printed = read_file(f"{unit.path}.out", OUTPUT_TAIL)
                log_output(f"worker[{unit.worker}]", printed)
        reason = outcome.reason()[:MESSAGE_TAIL]
        unit.reason = reason.partition("\n")[0]
        why = f": {reason}" if reason else ""
        verb, seconds = unit.kind.replace("_", " "), float(outcome.seconds)
        log.info("%s: %s after %.2f s%s", unit, verb, seconds, why)

    def requeue(self, units: Iterable[Unit]) -> None:
        """Queue the reports of *units* again, unless they are queued."""
        with self.changed:
            for unit in units:
                if unit.state == ENDED and unit.due:
                    unit.due = 0.0
                    self.to_report.put(unit)

    def keep_reported(self, unit: Unit) -> None:
        """Forget *unit*, but keep its record: it may have to be reported again."""
        try:
            remove_file(f"{unit.path}.out")
            append_line(unit.path, REPORTED)
        except OSError as error:
            log.warning("%s: can't mark its record: %s", unit, error)
            self.remove(unit)
        else:
            central = unit.head.get("central")
            self.reported[unit.id] = Reported(unit.path, unit.worker, central)
            self.forget(unit)

    def drop_reported(self, name: str) -> None:
        """Remove the record of a unit that need not be reported again."""
        with self.changed, contextlib.suppress(KeyError, OSError):
            remove_file(self.reported.pop(name).path)

    def check_reports(self) -> None:
        """Find reports that central has taken and lost again; send them once more.

        A pid that central lists, though it does not run and its report was taken a
        while ago, is stuck (protocol.md, "0.7 records the pid").  A record is dropped
        when two looks in a row did not list it."""
        with self.changed:
            entries, central = list(self.reported.items()), self.central
        if not entries:
            return
        try:
            listed = central.running_pids() if central.commits_late else set()
        except CentralError as error:
            self.warn_once(f"can't look for lost reports: {error}; trying again")
            for name, entry in entries:
                if time.monotonic() - entry.taken_at > HOLD_MEMORY:
                    self.drop_reported(name)
            return
        with self.changed:
            here = {unit.worker for unit in self.units.values()}
        for name, entry in entries:
            is_elsewhere = entry.central not in (None, central.url)
            if is_elsewhere or entry.pid not in listed or entry.pid in here:
                entry.unlisted += 1
                if entry.unlisted == 2:
                    self.drop_reported(name)
                continue
            entry.unlisted = 0
            if time.monotonic() - entry.taken_at > STUCK_AFTER:
                self.report_again(name, entry)

    def report_again(self, name: str, entry: Reported) -> None:
        """Report a unit once more whose report central has lost."""
        try:
            outcome = Record(read_file(entry.path)).outcome
            if outcome is None or self.reported.get(name) is not entry:
                return None
            if not self.central.report(name, entry.pid, outcome):
                return self.drop_reported(name)
        except (CentralError, OSError, OddRecord) as error:
            return log.warning("unit %s: can't be reported again: %s", name, error)
        entry.taken_at = time.monotonic()
        self.hold.found()
        return log.warning(
            "unit %s: central still lists its process %s although it has taken the "
            "report; reported again",
            name, entry.pid,
        )  # fmt: skip

    # ---- records of earlier processes, orphans, leftover files --------------

    def adopt_records(self) -> None:
        """Adopt unknown records, and check the worker of each running unit.

        A worker that has gone although its fork server has not said so is settled at
        the second tick that finds its record without a lock."""
        names = set(os.listdir(self.config.units_path))
        is_starting = "starting" in self.overload.reasons
        for name in names:
            is_known = name in self.units or name in self.reported
            if not is_known and UNIT_ID.fullmatch(name):
                self.adopt(name)
            elif is_starting and name[-4:] == ".out" and name[:-4] not in names:
                remove_file(f"{self.config.units_path}/{name}")
        with self.changed:
            unlocked = set()
            for unit in list(self.units.values()):
                if unit.state == WITHDRAWN and unit not in self.active:
                    self.remove(unit)  # which has failed before
                if unit not in self.active:
                    continue
                with contextlib.suppress(OSError):
                    self.cut_back(f"{unit.path}.out")
                    if unit.fork_server and unit.worker and not is_locked(unit.path):
                        unlocked.add(unit.id)
                        is_gone = start_of_process(unit.worker) is None
                        if unit.id in self.unlocked and is_gone:
                            self.settle(unit)
            self.unlocked = unlocked
            self.judge_orphans()

    def cut_back(self, path: str) -> None:
        """Cut the file of what a worker prints back to its tail.  Raises OSError."""
        if os.stat(path).st_size > OUTPUT_LIMIT:
            tail = read_file(path, OUTPUT_TAIL)
            os.truncate(path, 0)  # its writers append
            with open(path, "ab", 0) as file:
                file.write(tail)

    def has_living_worker(self) -> bool:
        """Return whether a worker lives that an earlier node has left."""
        for name in filter(UNIT_ID.fullmatch, os.listdir(self.config.units_path)):
            path = f"{self.config.units_path}/{name}"
            try:
                if worker_lives(Record(read_file(path)), is_locked(path)):
                    return True
            except OddRecord:
                pass
            except OSError:  # it can't be looked at now
                return True
        return False

    def adopt(self, name: str) -> None:
        """Adopt the unit of the record *name*, which an earlier process has left."""
        path = f"{self.config.units_path}/{name}"
        with self.changed:
            try:
                locked = is_locked(path)
                record = Record(read_file(path))
                if record.head and str(record.head["id"]) != name:
                    raise OddRecord("it is another unit's")
                is_over = not record.outcome and not worker_lives(record, locked)
            except FileNotFoundError:
                return None
            except (IsADirectoryError, PermissionError, OddRecord) as error:
                log.error("%s can't be used: %s; moved to %s.odd", path, error, name)
                with contextlib.suppress(OSError):
                    os.replace(path, f"{path}.odd")
                return None
            except OSError as error:
                return log.warning("%s: can't be read: %s; trying again", path, error)
            head, boot_id = record.head, THIS_MACHINE["boot_id"]
            if name in self.units or name in self.reported or (locked and not head):
                return None  # it has just come, or is being written
            is_released = head and head.get("boot_id", boot_id) != boot_id
            if head and not self.has_survivors:
                url = head.get("central") or self.central.url
                is_released = is_released or url == self.central.url
            if not head or (is_over and is_released):
                # Either no reply named its pid; or the check-out will release it, for
                # all workers died.  After a reboot its report may have been taken.
                why = "all workers have died" if head else "its pid was never sent"
                log.warning("unit %s: dropped: %s", name, why)
                remove_file(f"{path}.out")
                return remove_file(path)
            if record.reported and not record.withdrawn:
                self.reported[name] = Reported(path, record.pid, head.get("central"))
                return None
            unit = Unit(head, self.config, None)
            unit.process_started = record.started
            is_told = record.pid is not None and not record.withdrawn
            unit.state = RUNNING if is_told else WITHDRAWN  # its pid was never sent
            unit.pid.set_result(record.pid or 0)
            if head.get("boot_id") == boot_id:
                age = max(0.0, boot_clock() - float(head["started"]))
                unit.began -= age
                unit.started_at -= age
            unit.replied_at = time.monotonic()  # before the node died, so not later
            self.units[name] = unit
            self.active[unit] = None
            log.info("adopted %s from the previous node", unit)
            return self.judge_orphan(unit)

    def judge_orphans(self) -> None:
        """Look at every unit that no fork server watches."""
        for unit in list(self.active):
            if unit.fork_server is None:
                self.judge_orphan(unit)

    def judge_orphan(self, unit: Unit) -> None:
        """Settle an orphan that has ended; kill one that is withdrawn or too late."""
        try:
            locked = os.path.exists(unit.path) and is_locked(unit.path)
            record = self.read_record(unit)
            if record.pid and not unit.worker:  # written since
                unit.pid = concurrent.futures.Future()
                unit.pid.set_result(record.pid)
                unit.process_started = record.started
            if record.head:
                lives = worker_lives(record, locked)
            else:  # the file is gone
                lives = is_same_process(unit.worker, unit.process_started, unit.head)
        except OSError as error:
            return log.warning("%s: its worker can't be looked at: %s", unit, error)
        if record.outcome or not lives:
            return self.settle(unit)
        limit = self.config.limit(unit.action, "time_limit")
        unit.timed_out = unit.timed_out or bool(limit and unit.age() > limit)
        if unit.state == WITHDRAWN or unit.timed_out:
            self.signal(unit, signal.SIGKILL)
        return None

    def remove_stale_directories(self) -> None:
        """Remove the work directories of units that this node does not have."""
        root = self.config.temp_storage_path
        for action in filter(ACTION_NAME.fullmatch, os.listdir(root)):
            with self.changed, contextlib.suppress(OSError):  # and go on with others
                for name in os.listdir(f"{root}/{action}"):
                    if name[:5] == "unit_" and name[5:] not in self.units:
                        discard_directory(self.config, f"{root}/{action}/{name}")
        trash = f"{root}/{TRASH}"
        for name in os.listdir(trash) if os.path.isdir(trash) else ():
            remove_tree(f"{trash}/{name}")

    # ---- what the routes show -----------------------------------------------

    def status(self) -> Json:
        """Return the document of GET /status (interface.md); null where unknown."""
        central, fork_server, counters = self.central, self.fork_server, self.counters
        fork_server_pid = (
            fork_server.pid if fork_server and not fork_server.gone else None
        )
        with self.changed:
            running = [unit.status() for unit in self.active if unit.state == RUNNING]
            counts, failed = counters.counts(), list(counters.failed)
        return {
            "version": __version__,
            "host": self.config.host,
            "port": self.port,
            "pid": os.getpid(),
            "started_at": iso_time(self.started_at),
            "uptime_seconds": round(time.monotonic() - self.began, 3),
            "state": self.overload.state,
            "reason": self.overload.reason,
            "central": {
                "url": central.url,
                "dialect": central.dialect,
                "last_check_in_at": iso_time(central.checked_in_at),
                "next_try_at": iso_time(self.check_in_timer.due_at),
                "error": central.error,
            },
            "actions": self.actions,
            "max_workers": self.config.max_workers,
            "load_average": self.load_average,
            "free_memory_bytes": self.free_memory,
            "available_memory_bytes": self.available_memory,
            "fork_server": {
                "pid": fork_server_pid,
                "restarts": self.restarts,
            },
            "running": running,
            "waiting": [unit.status() for unit in self.waiting()],
            "failed": failed,
            "recent": list(counters.recent),
            "counts": counts,
            "history": list(counters.history),
        }

    def details(self) -> Json:
        """Return what only the page shows; null where unknown."""
        config = self.config
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = config.min_free_memory
        return {
            "tag": config.tag,
            "total_memory_bytes": memory,
            "refusing_since": iso_time(self.overload.since) if self.overload else None,
            "max_load": config.max_load,
            "min_free_memory_bytes": free and int(free * MEGABYTE),
            "time_limits": {n: config.limit(n, "time_limit") for n in self.actions},
        }


# ---------------------------------------------------------------------------
# What the node shows: metrics, the page and --status, made from the status document.
# ---------------------------------------------------------------------------

SHOWN, LISTED = 20, 5  # units in a table of the page, under a name of --status
TEXT_LIMIT = 300  # characters of a text that comes from a unit


def metrics_text(
    status: Json,
    outcomes: dict[tuple[str, str], int],
    durations: dict[tuple[str, str], tuple[list[int], list[float]]],
) -> str:
    """Return the status document in Prometheus's text format 0.0.4.

    Source of the format and the naming: prometheus.io/docs/instrumenting."""
    central, at = status["central"], status["central"]["last_check_in_at"]
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    host = status["host"].translate(escapes)
    # Zeros from the start: Prometheus sees no increase in a sample's first value.
    totals = {(action, kind): 0 for action in status["actions"] for kind in OUTCOMES}
    ended: dict[str, float] = {}  # values of samples, by suffix and labels
    buckets: dict[str, float] = {}
    for (action, kind), count in sorted({**totals, **outcomes}.items()):
        ended[f'{{action="{action.translate(escapes)}",outcome="{kind}"}}'] = count
    for (action, stage), (units, seconds) in sorted(durations.items()):
        labels, total = f'action="{action.translate(escapes)}",stage="{stage}"', 0
        for bound, count in zip([*BUCKETS, "+Inf"], units):
            total += count
            buckets[f'_bucket{{{labels},le="{bound}"}}'] = total
        buckets[f"_sum{{{labels}}}"] = seconds[0]
        buckets[f"_count{{{labels}}}"] = total
    lines = []
    for name, value, text in (
        ("info", {f'{{version="{status["version"]}",host="{host}"}}': 1},
         "Version and host name of the node."),
        ("start_time_seconds", epoch(status["started_at"]), "Unix time of the start."),
        ("last_check_in_timestamp_seconds", at and epoch(at),
         "Unix time of the last check-in."),
        ("central_up", int(bool(at) and central["error"] is None),
         "1 if the last call to central succeeded, else 0."),
        ("accepting", int(status["state"] in ("accepting", "full")),
         "0 while the node is overloaded or shuts down, else 1."),
        ("load_average", status["load_average"], "Load average of one minute."),
        ("free_memory_bytes", status["free_memory_bytes"], "Free memory."),
        ("available_memory_bytes", status["available_memory_bytes"],
         "Memory that programs can still get, caches included."),
        ("max_workers", status["max_workers"], "Units at once; 0: no limit."),
        ("units_running", len(status["running"]), "Units running."),
        ("units_waiting", len(status["waiting"]), "Units waiting for their report."),
        ("fork_server_restarts_total", status["fork_server"]["restarts"],
         "Times that the fork server was replaced."),
        ("units_total", ended, "Units whose outcome central has taken."),
        ("unit_duration_seconds", buckets, "Time that units took."),
    ):  # fmt: skip
        if value is None:  # unknown: no sample says so best
            continue
        kind = "counter" if name.endswith("_total") else "gauge"
        kind = "histogram" if value is buckets else kind
        lines.append(f"# HELP crowdnode_{name} {text}\n# TYPE crowdnode_{name} {kind}")
        samples = value.items() if isinstance(value, dict) else [("", value)]
        lines += [f"crowdnode_{name}{suffix} {number}" for suffix, number in samples]
    return "\n".join(lines) + "\n"


def epoch(moment: str) -> int:
    """Return the Unix time of *moment*, which is in ISO 8601 and in UTC."""
    return calendar.timegm(tuple(map(int, re.findall(r"\d+", moment)[:6])))


def clock(moment: str) -> str:
    """Return *moment* in local time, with its date unless that is today."""
    then, today = time.localtime(epoch(moment)), time.localtime()[:3]
    return time.strftime("%H:%M:%S" if then[:3] == today else "%d %b %H:%M", then)


def duration(seconds: float) -> str:
    """Return a length of time for people."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{round(seconds / size, 1):g} {name}"
    return f"{round(seconds, 0 if seconds >= 10 else 1 if seconds >= 1 else 2):g} s"


def memory(size: float | None, total: float | None = None) -> str:
    """Return an amount of memory for people, and what it is a part of."""
    of = f" of {total / GIGABYTE:.1f}" if total else ""
    return "unknown" if size is None else f"{size / GIGABYTE:.1f}{of} GB"


def one_line(value: Any, limit: int = TEXT_LIMIT) -> str:
    """Return *value* as a line without control characters, cut if it is long."""
    text = "" if value is None else " ".join(str(value).split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def facts(status: Json, details: Json) -> list[tuple[str, str, str]]:
    """Return name, text and mood ("good", "warn", "bad" or "") of each fact to list.

    The state comes first, then, without a name, what needs attention."""
    central, state, load = status["central"], status["state"], status["load_average"]
    at, total = central["last_check_in_at"], details.get("total_memory_bytes")
    rows = [("State", state, {"accepting": "good", "refusing": "warn"}.get(state, ""))]
    ago = f"{duration(max(time.time() - epoch(at), 0))} ago" if at else "never"
    if central["error"]:
        if state != "stopping":
            rows = [("State", "central away", "bad")]
        text = f"Central is away: {one_line(central['error'])}; last check-in {ago}"
        if central["next_try_at"]:
            text += f"; next try at {clock(central['next_try_at'])}"
        rows.append(("", text, "bad"))
    if state in ("refusing", "stopping"):
        since, reason = details.get("refusing_since"), one_line(status["reason"])
        text = state.capitalize() + (f" since {clock(since)}" if since else "")
        rows.append(("", f"{text}: {reason}" if reason else text, "warn"))
    up = f"process {status['pid']}, up {duration(status['uptime_seconds'])}"
    counts = [f"{n:,} {kind.replace('_', ' ')}" for kind, n in status["counts"].items()]
    texts = {
        "Node": f"crowdnode {status['version']}, {up}",
        "Central": f"{one_line(central['url'])}, last check-in {ago}",
        "Load average": "unknown" if load is None else f"{load:.2f}",
        "Free memory": memory(status["free_memory_bytes"], total),
        "Available memory": memory(status["available_memory_bytes"], total),
        "Units": ", ".join(counts),
        "Actions": ", ".join(map(one_line, status["actions"])) or "none",
    }
    return rows + [(name, text, "") for name, text in texts.items()]


def status_text(status: Json, in_colour: bool) -> str:
    """Return the text of --status, in 80 columns."""
    colours = {"good": GREEN, "warn": YELLOW, "bad": RED} if in_colour else {}
    address = one_line(f"{status['host']}:{status['port']}")
    rows = [("Address", address, ""), *facts(status, {})]
    for key in ("running", "waiting", "failed"):
        for index, unit in enumerate(status[key][:LISTED]):
            name = "" if index else f"{key.capitalize()} ({len(status[key])})"
            of = (unit["action"], unit["stage"], f"job {unit['job_id']}", unit["input"])
            text = f"unit {unit['id']} ({', '.join(map(str, filter(None, of)))}): "
            if unit.get("ended_at"):
                kind = unit["outcome"].replace("_", " ")
                text = f"{clock(unit['ended_at'])} {text}{kind}"
                text += f": {unit['reason']}" if unit["reason"] else ""
            else:
                text += f"{duration(unit['seconds'])}, process {unit['pid']}"
            rows.append((name, one_line(text), ""))
    lines = []
    for name, text, mood in rows:
        for line in textwrap.wrap(text, 62, break_on_hyphens=False):
            line = f"{colours[mood]}{line}{PLAIN}" if mood in colours else line
            lines.append(f"{name:<17} {line}\n")
            name = ""
    return "".join(lines)


PAGE_STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --text: #1f2328;
  --dim: #59636e; --line: #dde2e7; --good: #1a7f37; --warn: #8a5a00; --bad: #c21f2b }
@media (prefers-color-scheme: dark) { :root { --page: #0f1419; --card: #1a2028;
  --text: #e4e9ee; --dim: #9ba6b2; --line: #303944; --good: #4cc26a; --warn: #e0a93b;
  --bad: #ff8a80 } } * { box-sizing: border-box; margin: 0 }
body { font: 14px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  color: var(--text); background: var(--page); max-width: 78rem; margin: auto;
  padding: 1rem; overflow-wrap: anywhere } a { color: inherit }
.good { --mood: var(--good) } .warn { --mood: var(--warn) } .bad { --mood: var(--bad) }
header, small, th, dt, li, figure, .zero b { color: var(--dim); font-weight: normal }
header { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: center }
header p { width: 100% } h1 { font-size: 1.5rem; color: var(--text) }
h2 { font-size: 1rem; margin: 1.2rem 0 .3rem } small { font-size: inherit }
i, #bar { font: inherit; font-weight: 600; padding: .1rem .7rem; border-radius: 1rem;
  color: var(--card); background: var(--mood, var(--dim)) } #bar:empty { display: none }
#bar { position: sticky; top: .4rem; z-index: 1; margin-bottom: .8rem }
#bar:not(:empty) + main { opacity: .5 } .note { border-left: 4px solid var(--mood) }
li, figure, section, .note { padding: .5rem .8rem; border-radius: .4rem;
  background: var(--card) } ul, .plots, .note { margin: .8rem 0 }
ul, .plots { display: grid; grid-template-columns: repeat(5, 1fr); gap: .8rem;
  padding: 0; list-style: none } .plots { grid-template-columns: repeat(3, 1fr) }
b { color: var(--mood, var(--text)) } li b { display: block; font-size: 1.6rem }
figure b { float: right } figcaption { font-size: 13px }
svg { width: calc(100% - 3.4rem); height: 4.8rem; margin: .4rem 0 1.2rem 3.4rem;
  display: block; overflow: visible; fill: none; stroke: var(--line) }
path { stroke: #3b82d6; stroke-width: 1.5; stroke-linecap: round;
  stroke-linejoin: round; vector-effect: non-scaling-stroke } .dot { stroke-width: 6 }
text { fill: var(--dim); stroke: none; font-size: 12px } .end { text-anchor: end }
line { stroke: var(--warn); stroke-dasharray: 4 } line + text { fill: var(--warn);
  stroke: var(--card); stroke-width: 3px; paint-order: stroke }
table { border-collapse: collapse; width: 100%; table-layout: fixed; text-align: left }
th, td { vertical-align: top; padding: .3rem .7rem .3rem 0; width: 8.5% }
td { border-top: 1px solid var(--line) } th:first-child { width: 5.3rem }
:is(th, td):is(:nth-child(3), :nth-child(4), :nth-child(6)) { text-align: right }
th:nth-child(2) { width: 18% } th:nth-child(5) { width: 23% } meter { width: 3.5rem }
th:last-child { width: auto } dl { display: grid; grid-template-columns: 9rem 1fr }
@media (max-width: 40rem) { main, tr { display: flex; flex-flow: wrap; gap: 0 .7rem }
  main { flex-flow: column } .plots { order: 1; grid-template-columns: 1fr }
  ul { grid-template-columns: 1fr 1fr } li:first-child { grid-column: span 2 }
  table, tbody { display: block } tr + tr + tr { border-top: 1px solid var(--line) }
  td { border: 0; padding: 0; width: auto; order: 2 } td:nth-child(-n+2) { order: 0 }
  tr { padding: .4rem 0 } td:nth-child(5) { order: 1; width: 100%; font-weight: 600 }
  td:nth-child(3)::before { content: "job " } tr:first-child { display: none }
  td:nth-child(4)::before { content: "unit " } .reason td:last-child { width: 100% } }
"""
PAGE_SCRIPT = """
const find = (selector, page = document) => page.querySelector(selector);
setInterval(async () => {
  if (!getSelection().isCollapsed) return;  // a text is about to be copied
  try {
    const options = { cache: "no-store", signal: AbortSignal.timeout?.(4000) };
    const answer = await fetch(location.origin + location.pathname, options);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!answer.ok) throw answer.status;
    find("main").replaceWith(find("main", page));
    find("#bar").textContent = "";
    document.title = page.title;
  } catch {
    find("#bar").textContent = "no answer since " + find("main").dataset.at;
    document.title = document.title.replace(/^[^·]*/, "no answer ");
  }
}, 5000);
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{word} · {name}</title><link rel="icon" href="data:,">
<noscript><meta http-equiv="refresh" content="10"></noscript>
<style>{style}</style></head><body><p id="bar" class="bad" role="alert"></p>
<main data-at="{now}"><header><h1>{name}</h1><i class="{mood}">{word}</i> {tag}
<p>{about} · central {central} · <a href="status">/status</a> ·
<a href="metrics">/metrics</a></p></header>{notes}<ul>{tiles}</ul>
<div class="plots">{plots}</div>{tables}
<h2>Node</h2><section><dl>{facts}</dl></section></main>
<script>{script}</script></body></html>
"""


def page_policy() -> str:
    """Return the headers that let a browser do no more than the page needs."""
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (PAGE_STYLE, PAGE_SCRIPT)
    )
    return (
        "Content-Security-Policy: default-src 'none'; img-src data:; connect-src "
        f"'self'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
        "Cache-Control: no-store\r\n"
    )


def render_page(status: Json, details: Json) -> str:
    """Return the page: one HTML document, complete without JavaScript."""
    rows = [(key, html.escape(text), css) for key, text, css in facts(status, details)]
    texts, counts = {key: text for key, text, _ in rows}, status["counts"]
    history, most = status["history"], status["max_workers"]
    total, lowest = details["total_memory_bytes"], details["min_free_memory_bytes"]
    tiles = (("Running", len(status["running"]), f"/{most}" if most else "", ""),
             ("Succeeded", counts["succeeded"], "", ""),
             ("Failed", counts["failed"], "", "bad"),
             ("Died or timed out", counts["died"] + counts["timed_out"], "", "bad"),
             ("Waiting for central", len(status["waiting"]), "", ""))  # fmt: skip
    plots = (("Load average", "load_average", 1, details["max_load"], "{:g}"),
             ("Free memory", "free_memory_bytes", total or 1, lowest, ""),
             ("Units per minute", "units_per_minute", 1, 0, "{:,.0f}"))  # fmt: skip
    tables = (("Running", "running", "limit"), ("Failed last", "failed", "reason"),
              ("Waiting for central", "waiting", "outcome"),
              ("Ended last", "recent", "outcome"))  # fmt: skip
    return PAGE.format(
        style=PAGE_STYLE, script=PAGE_SCRIPT, now=time.strftime("%H:%M:%S"),
        name=html.escape(one_line(f"{status['host']}:{status['port']}")),
        tag=html.escape(one_line(details["tag"])), word=rows[0][1], mood=rows[0][2],
        about=texts["Node"], central=texts["Central"],
        notes="".join(f'<p class="note {css}">{text}</p>'
                      for key, text, css in rows if not key),
        tiles="".join(f'<li class="{css if n else "zero"}"><b>{n:,}{of}</b>{title}</li>'
                      for title, n, of, css in tiles),
        plots="".join(render_plot(title, texts.get(title, ""), history, *scale)
                      for title, *scale in plots),
        tables="".join(render_units(title, status[key], last, details["time_limits"])
                       for title, key, last in tables),
        facts="".join(f"<dt>{key}</dt><dd>{text}</dd>" for key, text, _ in rows[-3:]),
    )  # fmt: skip


def render_units(title: str, units: list[Json], last: str, limits: Json) -> str:
    """Return a table of *units* as HTML, whose last column is *last*."""
    if not units:
        return f"<h2>{title} <small>none</small></h2>"
    when = "Started" if last == "limit" else "Ended"
    rows = f"<tr><th>{when}<th>Action<th>Job<th>Unit<th>Input<th>Time<th>{last.title()}"
    for unit in units[:SHOWN]:
        text = {key: html.escape(one_line(value)) for key, value in unit.items()}
        at, seconds = unit.get("ended_at") or unit["started_at"], unit["seconds"]
        kind, reason = text.get("outcome", "").replace("_", " "), text.get("reason")
        cell = kind if kind == "succeeded" else f'<b class="bad">{kind}</b>'
        if last == "reason":
            cell = reason if reason and kind == "failed" else f"{cell} {reason}"
        if last == "limit":
            seconds, limit, cell = int(seconds), limits.get(unit["action"]), ""
            if limit:
                meter = f'max="{limit:g}" high="{limit * 0.9:g}" value="{seconds}"'
                cell = f'of {duration(limit)} <meter optimum="0" {meter}></meter>'
        rows += f"<tr><td>{clock(at)}<td>{text['action']} <small>{text['stage']}"
        rows += f"</small><td>{text['job_id']}<td>{text['id']}<td>{text['input']}"
        rows += f"<td>{duration(seconds)}<td>{cell}"
    more = f"<small>and {len(units) - SHOWN:,} more</small>" if units[SHOWN:] else ""
    table = f'<section><table class="{last}">{rows}</table>{more}</section>'
    return f"<h2>{title}</h2>{table}"


def render_plot(title: str, now: str, history: list[Json], *scale: Any) -> str:
    """Return a plot of the last hour, a point a minute, as HTML.

    *scale*: key, least maximum, limit or None, format of a value ("": of memory)."""
    (key, least, limit, style), line, path, dot = scale, "", "", ""
    label = style.format if style else memory
    known = [minute[key] for minute in history if minute[key] is not None]
    now = now or (label(known[-1]) if known else "unknown")
    head = f"<figure><figcaption>{title} <b>{now}</b></figcaption>"
    if not known:
        return f"{head}</figure>"
    top = max(*known, least)
    top = math.ceil(limit if limit and top < limit < 1.5 * top else top)
    for x, minute in enumerate(history, 60 - len(history)):
        y = None if minute[key] is None else 100 - 100 * minute[key] / top
        path += "" if y is None else f"L{x} {y:.1f}" if dot else f"M{x} {y:.1f}h0"
        dot = "" if y is None else f"M{x} {y:.1f}h0"
    if limit and 0.05 * top < limit <= top:
        y = round(100 - 100 * limit / top)
        line = f'<line x2="100%" y1="{y}%" y2="{y}%"/><text x="4" y="{y}%" dy="'
        line += f'{-4 if y > 25 else 13}">limit {label(limit)}</text>'
    return (
        f'{head}<svg role="img" aria-label="{title} {now}"><rect width="100%" '
        f'height="100%"/><text class="end" x="-6" y="10">{label(top)}</text>'
        '<text class="end" x="-6" y="100%">0</text><text y="100%" dy="15">−60 min'
        '</text><text class="end" x="100%" y="100%" dy="15">now</text>'
        f'<svg viewBox="0 0 59 100" preserveAspectRatio="none"><path d="{path}"/>'
        f'<path class="dot" d="{dot}"/></svg>{line}</svg></figure>'
    )


# ---------------------------------------------------------------------------
# HTTP: the node's routes.
# ---------------------------------------------------------------------------

REQUEST_DEADLINE = 20  # seconds for a whole request
HEAD_LIMIT = 64 * 1024  # bytes of a request's head
MAX_CONNECTIONS = 1024
FORM_FIELDS = 1000
OVERLOADED_MESSAGE = "Node Overloaded"  # the body by which central knows a refusal
FORM_TYPE = "application/x-www-form-urlencoded"
SERVER_NAME = "crowdnode"
TEXT_TYPE = "text/plain;charset=utf-8"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CHALLENGE = 'WWW-Authenticate: Basic realm="CloudCrowd"\r\n'


class BadRequest(Exception):
    """A request at fault: a sentence for its sender, a status, a header."""

    def __init__(self, sentence: str, status: int = 400, header: str = "") -> None:
        super().__init__(sentence)
        self.status = status
        self.header = header


class Server(http.server.ThreadingHTTPServer):
    """A server without HTTPServer's look-up of its own name, which can take minutes."""

    def server_bind(self) -> None:
        """Bind; keep the address."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()


class NodeServer(Server):
    """Listens for central: a thread for each connection, one request on each.

    A request has a deadline as a whole: after it, reading from its connection is shut
    down.  The oldest unfinished one goes when there are too many: central gets in."""

    # The kernel shortens it.  A sender that finds it full tries again after 1 s or 3.
    request_queue_size = 4096
    node: Node

    def __init__(self, config: Config, port: int, listener: int | None = None) -> None:
        """Bind and listen, or go on with *listener*, a descriptor.  Raises OSError."""
        # Time of arrival; None: the request is complete; 0: shut down, for it was late.
        self.connections: dict[Any, float | None] = {}
        self.lock = threading.Lock()
        if ":" in config.bind:
            self.address_family = socket.AF_INET6
        super().__init__((config.bind, port), NodeHandler, listener is None)
        if listener is not None:
            self.socket.close()
            self.socket = socket.socket(fileno=listener)
            self.socket.set_inheritable(False)
            self.server_address = self.socket.getsockname()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; without a free descriptor, shut the oldest one."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.shut_oldest()
                time.sleep(0.05)  # accept fails again until a thread has closed it
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether ``allow`` admits the client; else answer 403, unread."""
        allow = self.node.config.allow
        if not allow:
            return True
        client = ipaddress.ip_address(str(client_address[0]).partition("%")[0])
        client = getattr(client, "ipv4_mapped", None) or client
        if any(client in ipaddress.ip_network(item) for item in allow):
            return True
        with contextlib.suppress(OSError):
            request.settimeout(1)
            request.sendall(http_answer(403, f"{client} is not in this node's allow."))
            request.shutdown(socket.SHUT_WR)
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request; answer it here where none can be had."""
        with self.lock:
            self.connections[request] = time.monotonic()
        request.settimeout(REQUEST_DEADLINE + 5)  # of one read or write
        if len(self.connections) > MAX_CONNECTIONS:
            self.shut_oldest()
        try:  # without threading.Thread, which takes 0.05 ms more
            handle = self.process_request_thread
            _thread.start_new_thread(handle, (request, client_address))
        except RuntimeError:
            self.node.overload.update("start", "can't start a thread")
            request.settimeout(1)
            self.process_request_thread(request, client_address)

    def service_actions(self) -> None:
        """Shut connections whose request is overdue (called twice a second)."""
        while self.shut_oldest(REQUEST_DEADLINE):
            pass

    def shut_oldest(self, age: float = 0.0) -> bool:
        """Let nothing more be read from the oldest connection whose request is unread,
        if that is *age* seconds old; return whether there was one."""
        latest = time.monotonic() - age
        with self.lock:
            for request, since in self.connections.items():
                if not since:
                    continue
                if since > latest:  # as are all that came after it
                    return False
                self.connections[request] = 0.0
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RD)
                return True
        return False

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and forget it."""
        with self.lock:
            self.connections.pop(request, None)
        self.close_request(request)

    def finish(self, seconds: float) -> None:
        """Accept no more connections; wait for the requests under way."""
        deadline = time.monotonic() + seconds
        self.shutdown()
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.01)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong; no request ends the server."""
        log.exception("a request of %s failed", client_address)


def http_answer(
    status: int, body: str, kind: str = TEXT_TYPE, header: str = ""
) -> bytes:
    """Return an HTTP answer, to be sent at once."""
    data = body.encode("utf-8", "replace")
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{header}"
        f"Content-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
        f"Connection: close\r\nServer: {SERVER_NAME}\r\n\r\n"
    )
    return head.encode("latin-1") + data


class NodeHandler(http.server.BaseHTTPRequestHandler):
    """The routes.  The answers are those of CloudCrowd's node, but a bad request gets a
    status and a sentence where that one answers 500."""

    server: NodeServer
    rbufsize = 8192

    def handle(self) -> None:
        """Read one request and answer it, so that the sender can read the answer."""
        self.command = self.path = ""
        self.is_read = False
        self.fields: dict[str, str] = {}  # the headers, by name in lower case
        try:
            try:
                if not self.read_head():
                    return  # connected and closed, as port scanners do
                self.answer()
            except BadRequest as error:
                self.reply(str(error), error.status, header=error.header)
            except OSError:
                raise
            except MemoryError:  # a 500 would end central's round
                self.reply(OVERLOADED_MESSAGE, 503)
                self.server.node.refused("there is no memory")
            except Exception:
                log.exception("%s %s failed", self.command, self.path[:200])
                self.reply("This is a fault of the node; its log has more.", 500)
            if not self.is_read:  # closed with unread bytes, the connection is reset
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(2)
                deadline = time.monotonic() + REQUEST_DEADLINE
                while time.monotonic() < deadline and self.connection.recv(READ_SIZE):
                    pass
        except OSError as error:
            log.debug("%s has gone: %s", self.client_address[0], error)

    def read_head(self) -> bool:
        """Read the request's line and headers; return False where there is no request.

        http.server's parse_request has the email package parse the headers, which takes
        0.1 ms, 7 % of a unit, and 6 MB of them.  Raises BadRequest."""
        head, line, size = bytearray(), b"", 0
        while not head or line.strip(b"\r\n"):
            line = self.rfile.readline(HEAD_LIMIT + 1 - size)
            size += len(line)
            if head or line.strip():  # blank lines may come first
                head += line
            if size > HEAD_LIMIT:
                status = 431 if b"\n" in head else 414
                sentence = f"The request header exceeds {HEAD_LIMIT} bytes."
                raise BadRequest(sentence, status)
            if not size and self.server.connections.get(self.request):
                return False
            if not line.endswith(b"\n"):
                raise self.cut_short("head")
        first, *lines = re.split(r"\r?\n", head.decode("latin-1").strip("\r\n"))
        match = re.fullmatch(r"(\S+)\s+(\S+)\s+(HTTP/1\.[0-9])\s*", first)
        if not match:
            raise BadRequest("The request's first line is not METHOD PATH HTTP/1.1.")
        self.command, self.path, version = match.groups()
        for text in lines:
            name, colon, value = text.partition(":")
            if not colon or name != name.strip():
                raise BadRequest("A header is not NAME: VALUE.")
            earlier = self.fields.get(name.lower())
            value = value.strip() if earlier is None else f"{earlier}, {value.strip()}"
            self.fields[name.lower()] = value
        expected = self.fields.get("expect", "").lower()
        if expected == "100-continue" and version != "HTTP/1.0":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def cut_short(self, what: str) -> BadRequest:
        """Return the error for a request that has ended too early."""
        if self.server.connections.get(self.request) == 0.0:
            return BadRequest("The request was too slow.", 408)
        return BadRequest(f"The {what} has ended too early.")

    def read_body(self) -> bytes:
        """Read the body before anything is answered: central would lose an answer that
        is sent over unread bytes, and drop this node.  Raises BadRequest."""
        length = self.fields.get("content-length")
        is_chunked = "transfer-encoding" in self.fields
        if is_chunked or length is None:
            if self.command == "POST":
                raise BadRequest("Content-Length is required.", 411)
            self.is_read = not is_chunked
            return b""
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise BadRequest("The Content-Length is not a single number.")
        left, limit = int(length), self.server.node.config.max_request_size
        is_too_large = left > limit * MEGABYTE
        body = self.rfile.read(READ_SIZE if is_too_large else left)
        left -= len(body)
        if is_too_large:
            digest = hashlib.blake2b(body, digest_size=16)
            while piece := self.rfile.read(min(left, MEGABYTE)):
                left -= len(piece)
                digest.update(piece)
        if left:
            raise self.cut_short("body")
        self.is_read = True
        return too_large_unit(body, digest.hexdigest(), limit) if is_too_large else body

    def reply(
        self, body: str, status: int = 200, kind: str = TEXT_TYPE, header: str = ""
    ) -> None:
        """Send the whole answer.  Raises OSError where the peer has gone."""
        data = http_answer(status, body, kind, header)
        if self.command == "HEAD":
            data = data[: data.index(b"\r\n\r\n") + 4]
        self.connection.sendall(data)

    def answer(self) -> None:
        """Answer the request whose head has been read.  Raises BadRequest."""
        self.require_login()
        node = self.server.node
        path, fields = self.read_fields()
        self.server.connections[self.request] = None  # it has no deadline any more
        method = "GET" if self.command == "HEAD" else self.command
        if method == "POST":  # Rack's method override; protocol.md, "The unit"
            override = self.fields.get("x-http-method-override", "")
            method = fields.get("_method", override).upper() or "POST"
        known = {"/heartbeat": "GET", "/work": "POST"}
        known.update(dict.fromkeys(("/status", "/metrics", "/"), "GET"))
        if path not in known:
            raise BadRequest("Not Found", 404)
        if method != known[path]:
            allowed = known[path].replace("GET", "GET, HEAD")
            header = f"Allow: {allowed}\r\n"
            raise BadRequest(f"{path} accepts only {allowed}.", 405, header)
        if path == "/heartbeat":
            self.reply(HEARTBEAT)
        elif path == "/work":
            self.accept_unit(fields)
        elif path == "/status":
            self.reply(json.dumps(node.status()), kind="application/json")
        elif path == "/metrics":
            of = node.counters
            text = metrics_text(node.status(), of.outcomes, of.durations)
            self.reply(text, kind=METRICS_TYPE)
        else:
            page = render_page(node.status(), node.details())
            self.reply(page, 200, "text/html; charset=utf-8", page_policy())

    def require_login(self) -> None:
        """Raise BadRequest unless the credentials are right.

        As Rack has it: another scheme, or what does not decode, is 400."""
        config = self.server.node.config
        if not config.http_authentication:
            return
        refusal = BadRequest("Authorization Required", 401, CHALLENGE)
        if "authorization" not in self.fields:
            raise refusal
        scheme, _, credentials = self.fields["authorization"].partition(" ")
        try:
            pair = base64.b64decode(credentials.strip(), validate=True)
        except ValueError:
            pair = b""
        if scheme.lower() != "basic" or not pair:
            raise BadRequest("Bad Request")
        if not hmac.compare_digest(pair, f"{config.login}:{config.password}".encode()):
            raise refusal

    def read_fields(self) -> tuple[str, dict[str, str]]:
        """Return the path, and the fields of the query and of the form."""
        try:
            path, _, query = self.path.partition("?")
            if "://" in path:
                path = str(urllib.parse.urlsplit(path).path)
            fields = form_fields(query.encode("latin-1"))
            body = self.read_body()
            kind = self.fields.get("content-type", "").partition(";")[0].strip().lower()
            if kind in ("", FORM_TYPE) and self.command == "POST":
                fields.update(form_fields(body))
        except UnicodeError as error:
            raise BadRequest(f"The form is not UTF-8: {error}.") from None
        except ValueError as error:
            raise BadRequest(f"The form can't be read: {error}.") from None
        return path, fields

    def accept_unit(self, fields: dict[str, str]) -> None:
        """Answer POST /work."""
        node = self.server.node
        if "origin" in self.fields or "sec-fetch-site" in self.fields:
            raise BadRequest("A web page must not send units.", 403)
        if "work_unit" not in fields:
            raise BadRequest("There is no field work_unit in the form.")
        request = parse_unit(fields["work_unit"])
        try:
            unit = node.accept(request)
        except NodeOverloaded as error:
            try:
                return self.reply(OVERLOADED_MESSAGE, 503)
            finally:  # central takes this node for busy from now on
                node.refused(str(error))
        is_written = False
        try:
            self.reply(f'{{"pid":{unit.worker}}}', kind="application/json")
            is_written = True
        finally:
            node.replied(unit, is_written)


def form_fields(form: bytes) -> dict[str, str]:
    """Return a form's or query's fields, the last of a name.  Raises ValueError."""
    pairs = form.split(b"&", FORM_FIELDS)
    if len(pairs) > FORM_FIELDS:
        raise ValueError(f"it has over {FORM_FIELDS} fields")
    split = (pair.partition(b"=") for pair in pairs if pair)
    return {unquoted(key).decode(): unquoted(value).decode() for key, _, value in split}


def unquoted(value: bytes) -> bytes:
    """Return the bytes of a form's *value*, by the quoted-printable codec: 50 times
    as fast as urllib.parse, in a tenth of its memory."""
    value = value.replace(b"=", b"=3D").replace(b"+", b" ").replace(b"%", b"=")
    return binascii.a2b_qp(value)


def too_large_unit(start: bytes, digest: str, limit: float) -> bytes:
    """Return a form with a unit that fails, in place of one that is too large.

    Central would send it for ever, and end each of its rounds with it.  The *digest* of
    the whole form tells another attempt from the same one.  Raises BadRequest where the
    unit's id can't be read from the form's *start*."""
    sentence = f"The request is over max_request_size, {limit:g} MB."
    text = unquoted(start).decode("utf-8", "replace")
    id, job_id = (re.search(rf'"{key}": ?(\d+)', text) for key in ("id", "job_id"))
    if not id or not text.startswith("work_unit="):
        raise BadRequest(sentence, 413)
    unit: Json = {"id": int(id[1]), "job_id": int(job_id[1]) if job_id else 0}
    unit.update({"action": "", "input": "", "status": PROCESSING, TOO_LARGE: sentence})
    unit["options"] = {"digest": digest}
    return form_encoded([("work_unit", json.dumps(unit).encode())])


def parse_unit(text: str) -> Json:
    """Parse a unit as it came in the field work_unit.  Raises BadRequest."""
    try:
        unit = strict_json(text)
    except ValueError as error:
        raise BadRequest(f"work_unit is not JSON: {error}") from None
    if not isinstance(unit, dict):
        raise BadRequest("work_unit is not a JSON object")
    if is_nested_deeper(unit, NESTING_LIMIT):  # Ruby can't write it
        raise BadRequest(f"work_unit is nested more than {NESTING_LIMIT} deep")
    for key, default in (("job_id", 0), ("attempts", 0), ("options", {})):
        if unit.get(key) is None:
            unit[key] = default
    for key in ("id", "job_id"):
        is_plain = type(unit.get(key)) in (int, str)
        if not is_plain or not UNIT_ID.fullmatch(str(unit[key])):
            rule = "a whole number or 1 to 64 of A-Za-z0-9_-"
            raise BadRequest(f"the unit's {key} is not {rule}")
    if type(unit.get("status")) is not int or unit["status"] not in STAGES:
        raise BadRequest("the unit's status is not 1 (process), 4 (split) or 5 (merge)")
    kinds = {str: "a string", dict: "an object", int: "a number"}
    keys = {"input": str, "action": str, "options": dict, "attempts": int}
    for key, kind in keys.items():
        if not isinstance(unit.get(key), kind):
            raise BadRequest(f"the unit's {key} is not {kinds[kind]}")
    return unit


# ---------------------------------------------------------------------------
# A central server for one job: what --run puts in front of a real node.
# ---------------------------------------------------------------------------


class Task:
    """A work unit as central sees it."""

    def __init__(
        self, id: int, place: tuple[int, ...], status: int, input: str
    ) -> None:
        self.id = id
        self.place = place  # of its output in the job's; first the number of its input
        self.status = status
        self.input = input
        self.attempts = 0
        self.output: Any = None
        self.is_over = False
        self.reason: str | None = None  # why it failed for good


class LocalCentralHandler(http.server.BaseHTTPRequestHandler):
    """Passes the node's calls to the LocalCentral."""

    server: LocalCentral

    def do_PUT(self) -> None:
        """Handle a check-in, a check-out or a report."""
        status = 401
        if self.headers.get("Authorization") == basic_credentials(self.server.config):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status = self.server.answer(self.command, self.path, form_fields(body))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_DELETE = do_PUT

    def log_message(self, format: str, *args: Any) -> None:
        """Keep no access log."""


class LocalCentral(Server):
    """A central server for one job and one node, with CloudCrowd's stages and retries,
    on a free loopback port.

    It speaks the seed's dialect: it records a pid before it takes a report.  config:
    the node's, for both have the same credentials.  *ended* is called with each task
    whose report has come, before the report is answered."""

    def __init__(self, config: Config, ended: Callable[[Task], None]) -> None:
        super().__init__(("127.0.0.1", 0), LocalCentralHandler)
        self.config = config
        self.ended = ended
        # Part of the names of what units save, so no other job may have it, not even
        # one of the same microsecond.  53 bits: jq has doubles.
        self.job: Json = {"job_id": int.from_bytes(os.urandom(7), "big") >> 3}
        self.stages: list[str] = []
        self.changed = threading.Condition()
        self.finished = threading.Event()
        self.pending: deque[Task] = deque()
        self.sent: dict[int, Task] = {}  # by id
        self.done: list[Task] = []
        self.failures: list[Task] = []
        self.by_input: dict[int, list[Task]] = {}  # -1: the merge
        self.merged: Task | None = None
        self.last_id = 0
        self.node: str | None = None  # HOST:PORT
        self.is_busy = False
        self.room = 0
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        start_thread(self.serve_forever)

    def start(
        self, action: str, stages: list[str], inputs: list[str], options: Json
    ) -> None:
        """Start the job."""
        self.job.update(action=action, options=options)
        status = SPLITTING if "split" in stages else PROCESSING
        with self.changed:
            self.stages = stages
            for number, input in enumerate(inputs):
                self._add((number,), status, input)
            self._advance()
        start_thread(self._dispatch)

    def counts(self) -> tuple[int, int]:
        """Return how many of the job's pieces have ended, and how many there are."""
        with self.changed:
            rest = [*self.pending, *self.sent.values()]
            failed = sum(task.status != MERGING for task in self.failures)
            ended = len(self.done) + failed
            return ended, ended + sum(task.status != MERGING for task in rest)

    def outputs(self) -> list[Any]:
        """Return the job's outputs, in the order of its inputs."""
        if "merge" in self.stages:
            merged = self.merged
            return [merged.output] if merged and merged.reason is None else []
        tasks = sorted(self.done + self.failures, key=lambda task: task.place)
        return [task.output for task in tasks]

    def answer(self, method: str, path: str, fields: dict[str, str]) -> int:
        """Handle a call of the node; return the status to answer."""
        kind, _, name = path.strip("/").partition("/")
        with self.changed:
            if kind == "node" and method == "DELETE":
                self._release()
            elif kind == "node":
                self.node = f"{name}:{fields['port']}"
                self.is_busy = fields.get("busy") == "true"
                self.room = int(fields.get("max_workers") or 0)
            else:
                task = self.sent.pop(int(name), None) if name.isdigit() else None
                if kind != "work" or task is None:
                    return 404
                output = json.loads(fields["output"])["output"]
                self._take(task, fields["status"] == "succeeded", output)
            self.changed.notify_all()
        return 204

    def _release(self) -> None:
        """Give the node's units to the next one that checks in."""
        self.node = None
        self.pending.extendleft(self.sent.values())
        self.sent.clear()

    def _take(self, task: Task, is_success: bool, output: Any) -> None:
        """Take a report."""
        task.attempts += 1
        self.ended(task)
        if not is_success and task.attempts < self.config.work_unit_retries:
            self.pending.appendleft(task)  # at once: --fail-fast waits for its end
        elif not is_success:
            self._fail(task, str(output))
        else:
            task.output = output
            if task.status == SPLITTING:
                for number, input in enumerate(flattened(output)):
                    text = input if isinstance(input, str) else to_json(input)
                    self._add((*task.place, number), PROCESSING, text)
            elif task.status == PROCESSING:
                self.done.append(task)
            task.is_over = True
            self._advance()

    def _fail(self, task: Task, reason: str) -> None:
        task.reason, task.is_over = reason, True
        self.failures.append(task)
        self._advance()

    def _add(self, place: tuple[int, ...], status: int, input: str) -> Task:
        self.last_id += 1
        task = Task(self.last_id, place, status, input)
        self.pending.append(task)
        self.by_input.setdefault(place[0], []).append(task)
        return task

    def _advance(self) -> None:
        """When a stage is over, go to the next, or finish."""
        if self.pending or self.sent:
            return
        if "merge" in self.stages and not self.failures and self.merged is None:
            ordered = sorted(self.done, key=lambda task: task.place)
            outputs = to_json([task.output for task in ordered])
            self.merged = self._add((-1,), MERGING, outputs)
        else:
            self.finished.set()

    def _dispatch(self) -> None:
        while not self.finished.is_set():
            with self.changed:
                is_full = self.room and len(self.sent) >= self.room
                if not self.node or self.is_busy or not self.pending or is_full:
                    if not self.changed.wait(1):
                        self.is_busy = False  # try it again, as CloudCrowd does
                    continue
                task, node = self.pending.popleft(), self.node
                self.sent[task.id] = task
            status, reason = self._post(node, task)
            with self.changed:
                if status != 200 and self.sent.pop(task.id, None) is not None:
                    self.is_busy = status not in (400, 413)
                    if self.is_busy:  # or it has died, and one will follow
                        self.pending.appendleft(task)
                    else:  # the node will never take it
                        self._fail(task, reason)

    def _post(self, node: str, task: Task) -> tuple[int, str]:
        """Send a unit to the node; return the status, 0 without an answer, and why."""
        keys = ("id", "input", "attempts", "status")
        unit = {**self.job, **{key: getattr(task, key) for key in keys}}
        data = form_encoded([("work_unit", json.dumps(unit).encode())])
        headers = {"Authorization": basic_credentials(self.config)}
        request = urllib.request.Request(f"http://{node}/work", data, headers)
        try:
            with self.opener.open(request, timeout=30) as reply:
                return int(reply.status), ""
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode("utf-8", "replace")
        except (OSError, ValueError, http.client.HTTPException) as error:
            return 0, str(error)


def json_line(value: Any) -> bytes:
    """Return *value* as a line of JSON in UTF-8, whatever a file's name holds."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # \udce9 is JSON, too


def flattened(value: Any) -> list[Any]:
    """Return a split's output as CloudCrowd takes it: without nested lists."""
    if not isinstance(value, list):
        return [value]
    return [item for element in value for item in flattened(element)]


CLEAR_LINE = "\r\033[K"  # of a terminal, where the bar stands
TROUBLE_PATIENCE = 2  # seconds until what keeps the job from going on is shown

FRAMES = re.compile(r" \(((?:[^();]+, line \d+, in [^();]+(?:; )?)+)\)$")


class LocalRun:
    """Runs one job: starts a LocalCentral and a node, and shows progress, what actions
    print, and failures on standard error."""

    def __init__(self, config: Config, arguments: argparse.Namespace) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, NODE_SIGNALS)  # until run()
        self.arguments = arguments
        self.names: list[str] = arguments.names
        place = config.temp_storage_path
        if place == config.state_file("work"):  # the default: no node need be here
            place = tempfile.gettempdir()
        try:
            make_private_directory(place)
            self.directory = tempfile.mkdtemp(prefix="crowdnode-", dir=place)
        except OSError as error:
            raise CrowdError(f"can't use {place}: {error.strerror}") from None
        self.log: deque[str] = deque(maxlen=100)  # the node's last lines
        self.trouble, self.trouble_at = "", 0.0  # its last warning, and since when
        self.shown_trouble = ""
        # The user's configuration, but on loopback, for this job alone and at once.
        values = {**vars(config), "max_workers": config.max_workers or processors()}
        values.update(host="127.0.0.1", bind="127.0.0.1", port=0, dialect="seed")
        values.update(tag=None, allow=[], drain_time=0.0, max_load=None)
        values.update(min_free_memory=None, min_available_memory=None)
        # No other user can send work to this node.
        password = os.urandom(16).hex()
        values.update(http_authentication=True, login="run", password=password)
        work = os.path.join(self.directory, "work")
        values.update(state_path=self.directory, temp_storage_path=work, is_job=True)
        self.config = Config(**values)
        self.central = LocalCentral(self.config, self._ended)
        url = f"http://127.0.0.1:{self.central.server_address[1]}"
        vars(self.config)["central_server"] = url
        self.node: subprocess.Popen[bytes] | None = None
        self.began = time.monotonic()
        # By a task's id: how much of what it has printed was read, and the last line.
        self.printed: dict[int, tuple[int, bytes]] = {}
        self.shown_failures = 0
        self.is_over = False  # signals have no effect any more
        self.is_patient = self.is_interrupted = False  # see _interrupt()
        self.lock = threading.Lock()  # for standard error
        self.file: Any = None  # of --json-lines

    def run(self) -> int:
        """Do the job and print its outputs.  Returns the exit status."""
        for number in NODE_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._interrupt)
        arguments, failures = self.arguments, self.central.failures
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, NODE_SIGNALS)
            self._start_job()
            self.is_patient = True
            self._wait()
            self.is_patient = False
        except KeyboardInterrupt:
            self._say("interrupted")
            return EXIT_INTERRUPTED
        finally:
            self._clean_up()
        if not arguments.json_lines and not (arguments.fail_fast and failures):
            self._write(self.central.outputs())
        return EXIT_FAILED if failures else EXIT_OK

    def _interrupt(self, number: int, frame: Any) -> None:
        """End the job at the first signal; people press Ctrl-C more than once.

        What is being printed is finished, unless a second signal comes."""
        if self.is_patient and not self.is_interrupted:
            self.is_interrupted = True
        elif not self.is_over:
            self.is_over = True
            raise KeyboardInterrupt

    def _start_job(self) -> None:
        """Start the node; when its actions are loaded, start the job.

        Raises UsageError where the action is not among them."""
        action, options = self.arguments.run, self.arguments.options
        node, patience = self._start_node(), 2.0
        assert node.stdout
        while not is_readable(node.stdout.fileno(), patience):
            self._say("starting the node and loading the actions")
            patience = LOAD_DEADLINE
        line = node.stdout.readline()
        if not line:
            self.reader.join()
            log = "".join(self.log)
            said = log.partition("crowdnode: ")[2].strip()
            raise CrowdError(said or f"the node does not run:\n{log}")
        actions, problems = json.loads(line)
        own = re.compile(rf"(/|the action ){re.escape(action)}(\.\w+)? (is|takes) ")
        own_problems = [text for _, text in problems if own.search(text)]
        if action not in actions:
            reasons = [text for text in own_problems if " is left out" in text]
            remedy = nearest(action, sorted(actions)) if actions else "there is none"
            reason = "; ".join(reasons) or f"no such action: {remedy}"
            raise UsageError(f"--run {action}: {reason}")
        for text in own_problems:  # it takes long to load
            self._say(text)
        if self.arguments.json_lines and self.arguments.output:
            self.file = open(self.arguments.output, "wb")  # noqa: SIM115
        self.central.start(action, actions[action], self.arguments.inputs, options)

    def _start_node(self) -> subprocess.Popen[bytes]:
        self.node = subprocess.Popen(
            [PYTHON, PROGRAM, ATTENDED_FLAG],
            stdin=subprocess.PIPE,  # its end tells the node to stop
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes here, and we stop the node
        )
        assert self.node.stdin
        self.reader = start_thread(self._read_log, self.node.stderr)
        with contextlib.suppress(BrokenPipeError):  # it has died: its log says why
            self.node.stdin.write(json.dumps(vars(self.config)).encode() + b"\n")
            self.node.stdin.flush()
        return self.node

    def _read_log(self, pipe: Any) -> None:
        """Keep the end of the node's log, and notice what keeps it from working."""
        for data in pipe:
            line = data.decode("utf-8", "replace")
            self.log.append(line)
            warning = re.search(r"\] (?:warning|error): (.*)", line)
            if warning and self.central.stages:  # the job has begun
                self.trouble_at = self.trouble_at or time.monotonic()
                self.trouble = warning[1]
            elif "info: accepting work" in line:
                self.trouble, self.trouble_at = "", 0.0

    def _wait(self) -> None:
        """Wait for the end of the job; start the node again if it dies."""
        central, starts = self.central, 1
        while not central.finished.wait(0.05):
            self._show_progress()
            if self.is_interrupted:
                self.is_over = True
                raise KeyboardInterrupt
            if self.arguments.fail_fast and central.failures:
                break
            assert self.node
            if self.node.poll() is None:
                continue
            if starts == 5:
                raise CrowdError(f"the node does not run:\n{''.join(self.log)}")
            starts += 1
            self._start_node()
        self._show_progress()
        tasks = [*central.done, *([central.merged] if central.merged else [])]
        nothing = sum(task.output is None and not task.reason for task in tasks)
        if nothing:
            what = f"{self.arguments.run} returned nothing for {nothing}"
            self._say(f"{what} of {len(tasks)} units")
        self._say(self._counts())

    def _counts(self) -> str:
        done, total = self.central.counts()
        return f"{done} of {total} done, {len(self.central.failures)} failed"

    def _name(self, task: Task) -> str:
        is_merge = task.status == MERGING
        return "merge" if is_merge else one_line(self.names[task.place[0]])

    def _ended(self, task: Task) -> None:
        """Show the rest of what a task has printed."""
        self.trouble, self.trouble_at = "", 0.0
        self._show_printed(task)
        rest = self.printed.pop(task.id)[1]
        if rest:
            self._say(f"{self._name(task)}: {rest.decode('utf-8', 'replace')}")

    def _show_printed(self, task: Task) -> None:
        """Show the lines that a task has printed since the last time."""
        seen, rest = self.printed.get(task.id, (0, b""))
        path = os.path.join(self.config.units_path, f"{task.id}.out")
        with contextlib.suppress(OSError), open(path, "rb") as file:
            seen = min(seen, os.fstat(file.fileno()).st_size)  # it may be cut back
            file.seek(seen)
            data = file.read()
            seen, rest = seen + len(data), rest + data
        *lines, rest = rest.split(b"\n")
        for line in lines:
            self._say(f"{self._name(task)}: {line.decode('utf-8', 'replace')}")
        self.printed[task.id] = seen, rest

    def _show_failure(self, task: Task) -> None:
        """Show why a task has failed for good, and the frames in the user's files."""
        reason = one_line(task.reason, FAILURE_LIMIT)
        if is_url(task.input):  # it is the line's first word already
            reason = reason.replace(without_secrets(task.input), "it")
        frames = FRAMES.search(reason)
        reason = reason[: frames.start()] if frames else reason
        tries = f"{task.attempts} tries" if task.attempts > 1 else "1 try"
        lines = [f"{self._name(task)}: {reason} ({tries})"]
        lines += frames[1].split("; ") if frames else []
        self._say("\n    ".join(lines), True)

    def _show_progress(self) -> None:
        """Show what is new, and on a terminal a bar that fits it."""
        central = self.central
        with central.changed:
            for task in central.sent.values():
                self._show_printed(task)
            failures = central.failures[self.shown_failures :]
        for task in failures:
            self._show_failure(task)
            self.shown_failures += 1
        if self.arguments.json_lines:
            self._write_lines()
        is_late = time.monotonic() - self.trouble_at > TROUBLE_PATIENCE
        trouble = self.trouble if is_late else ""
        if trouble and trouble != self.shown_trouble and not sys.stderr.isatty():
            self._say(trouble)
            self.shown_trouble = trouble
        if not sys.stderr.isatty() or self.arguments.quiet:
            return
        done, total = central.counts()
        rate = done / max(0.001, time.monotonic() - self.began)
        bar = f"[{'#' * (20 * done // max(1, total)):<20}] "
        line = f"{self._counts()}, {len(central.sent)} running, {rate:.1f}/s"
        left = f", {duration((total - done) / rate)} left" if rate else ""
        if trouble:
            line, left = f"{self._counts()}: {trouble}", ""
        size = os.get_terminal_size(sys.stderr.fileno())
        chosen = shutil.get_terminal_size(size).columns  # COLUMNS, if that is set
        width = min(size.columns or 80, chosen or 80) - 1
        forms = [bar + line + left, line + left, line]
        line = next((form for form in forms if len(form) <= width), line[:width])
        self._show(f"{CLEAR_LINE}{line}")

    def _write_lines(self) -> None:
        """Write the lines of --json-lines for the inputs that are done."""
        with self.central.changed:
            by_input = self.central.by_input
            ended = [n for n, of in by_input.items() if all(t.is_over for t in of)]
        for number in ended:
            tasks = by_input[number]
            line: Json = {"input": None if number < 0 else self.names[number]}
            reasons = [task.reason for task in tasks if task.reason is not None]
            tasks.sort(key=lambda task: task.place)
            if reasons:
                line["error"] = reasons[0]
            elif tasks[0].status == SPLITTING:
                line["output"] = [task.output for task in tasks[1:]]
            else:
                line["output"] = tasks[0].output
            self._print(line)
            del by_input[number]

    def _print(self, value: Any) -> None:
        if not self.file and sys.stderr.isatty():
            self._show(CLEAR_LINE)
        file = self.file or sys.stdout.buffer
        try:
            file.write(json_line(value))
            file.flush()
        except OSError as error:
            if file is not self.file:
                raise
            path = self.arguments.output
            raise CrowdError(f"--output {path}: {error.strerror}") from None

    def _write(self, outputs: list[Any]) -> None:
        path = self.arguments.output
        self.is_over = False  # to open a FIFO may block: Ctrl-C must work again
        if path is None:
            return self._print(outputs)
        try:
            with open(path, "wb") as file:
                file.write(json_line(outputs))
        except OSError as error:
            self._print(outputs)  # do not lose the outputs of a long job
            reason = f"{error.strerror}; wrote the outputs to standard output instead"
            raise CrowdError(f"--output {path}: {reason}") from None

    def _say(self, sentence: str, always: bool = False) -> None:
        """Print a line, in the place of the bar; with --quiet only if *always*."""
        clear = CLEAR_LINE if sys.stderr.isatty() else ""
        if always or not self.arguments.quiet:
            self._show(f"{clear}{sentence}\n")

    def _show(self, text: str) -> None:
        """Write to standard error; without it the job goes on."""
        with self.lock:
            try:
                print(text, end="", file=sys.stderr, flush=True)
            except OSError:  # a full disk, a reader that has gone
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def _clean_up(self) -> None:
        """Leave no process and no file, however impatient the user is."""
        self.is_over = True
        if self.node:
            self.node.terminate()
            try:
                self.node.wait(TERM_GRACE)
            except subprocess.TimeoutExpired:
                self.node.kill()
                self.node.wait()
            for pipe in (self.node.stdin, self.node.stdout, self.node.stderr):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        shutil.rmtree(self.directory, ignore_errors=True)


def check_output(path: str) -> None:
    """Raise UsageError for a FILE that can't be written, before any work is done."""
    place = path if os.path.exists(path) else os.path.dirname(os.path.realpath(path))
    if not path or os.path.isdir(path):
        raise UsageError(f"--output {path}: is not the path of a file")
    if not os.access(place, os.W_OK):
        raise UsageError(f"--output {path}: {place} is not a writable directory")


def input_of(argument: str) -> str:
    """Return what central gets for an INPUT that is a file or a URL."""
    if not argument:
        raise UsageError("an INPUT is empty; use --strings for plain strings")
    if is_url(argument):
        return argument
    path = os.path.abspath(argument)
    if os.path.isfile(path):
        return file_url(path)
    wrong = "no such file, and not a URL"
    if os.path.exists(path):
        wrong = "is a directory" if os.path.isdir(path) else "is not a regular file"
    raise UsageError(f"{argument}: {wrong}; use --strings for plain strings")


# ---------------------------------------------------------------------------
# Daemon: start, stop, replace, upgrade.
# ---------------------------------------------------------------------------

WEDGED_AFTER = 30  # seconds without a heartbeat until --daemon replaces a node
HEARTBEAT_DEADLINE = 2  # seconds
RELOAD_DEADLINE = 300  # seconds


def run_node(
    lock: NodeLock,
    load: Callable[[], Config],
    arguments: argparse.Namespace,
    started: Callable[[], None] = lambda: None,
) -> int:
    """Run the node, with *lock* held, until a signal stops it; call *started* when it
    has checked in.  Raises CrowdError.

    A start that hangs, whatever it is that hangs, is ended by faulthandler's thread,
    which logs what all threads do, and exits.  So are a stop that hangs, and a node
    that gets no fork server; cron or systemd starts the next one."""
    config, node = lock.config, None
    lock_file, listener = arguments.inherit or (None, None)
    try:
        patience = READY_PATIENCE + 2 * config.central_timeout  # of the check-in
        faulthandler.dump_traceback_later(patience, exit=True)
        path = config.state_file("node.log") if arguments.daemon else None
        set_up_log(path, config.log_level)
        lock.write()  # with --daemon, the parent took the lock
        prepare_directories(config)
        lock.lock_work()
        # A job of --run may save nothing; what ran before an upgrade goes on.
        if not arguments.attended and not arguments.inherit:
            check_storage(config)
        call_c("mallopt", M_ARENA_MAX, 1)  # else each thread keeps memory of its own
        become_subreaper()
        raise_descriptor_limit()
        log_problems(("warning", text) for text in preflight_warnings(config))
        server = listen(config, lock.earlier.get("port") or 0, listener)
        port, is_inherited = int(server.server_address[1]), listener is not None
        node = Node(config, port, lock, load, server.finish, is_inherited)
        server.node = node
        lock.write(port=port)
        start_thread(server.serve_forever)
        if arguments.attended:
            start_thread(stop_at_end_of_input, node)
        if node.run(started):
            execute_new_version(config, arguments, lock, server)
        return EXIT_OK
    except Exception as error:
        if not isinstance(error, (CrowdError, OSError, RuntimeError)):
            log.exception("a fault of this program")
        if not isinstance(error, CrowdError):
            error = CrowdError(f"can't start: {error}")
        if arguments.daemon:  # in the foreground main() says it
            log.error("%s", error)
        raise error from None
    finally:
        if node and node.fork_server:
            node.is_stopping = True
            node.fork_server.finish()
        is_known = lock.content.get("checked_in") and not (node and node.is_checked_out)
        lock.release(forget=not is_known)


def listen(config: Config, earlier: int, listener: int | None) -> NodeServer:
    """Return a listening server; with port 0 on the *earlier* node's port, if free."""
    if not config.port and earlier and listener is None:
        with contextlib.suppress(OSError):
            return NodeServer(config, earlier)
    try:
        return NodeServer(config, config.port, listener)
    except OSError as error:
        hint = ""
        if error.errno == errno.EADDRINUSE:
            other = "another program has it: choose another with --port"
            hint = f"; {other_node(config) or other}"
        where = f"{config.bind} port {config.port}"
        raise CrowdError(f"can't listen on {where}: {error.strerror}{hint}") from None


def execute_new_version(
    config: Config, arguments: argparse.Namespace, lock: NodeLock, server: NodeServer
) -> None:
    """Execute this program's file in this process, with the same lock and listener.

    Raises OSError."""
    command = [PYTHON, PROGRAM, *config.arguments()]
    command += ["--daemon"] if arguments.daemon else []
    command.append(INHERIT_FLAG)
    for descriptor in (lock.descriptor, server.fileno()):
        os.set_inheritable(descriptor, True)
        command.append(str(descriptor))
    os.execv(PYTHON, command)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files, which macOS sets to 256."""
    from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit

    (soft, hard), wanted = getrlimit(RLIMIT_NOFILE), 4 * MAX_CONNECTIONS
    if hard != RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            setrlimit(RLIMIT_NOFILE, (wanted, hard))


def stop_at_end_of_input(node: Node) -> None:
    """Stop the node when the process that started it has ended."""
    while os.read(0, READ_SIZE):
        pass
    node.wake(signal.SIGTERM)


def run_in_foreground(
    config: Config, load: Callable[[], Config], arguments: argparse.Namespace
) -> int:
    """Run a node in the foreground, its log on standard error."""
    lock = NodeLock(config)
    if arguments.inherit:
        lock.inherit(arguments.inherit[0])
    elif not lock.acquire(0.3):
        pid, place = lock.read().get("pid"), f"(state_path {config.state_path})"
        raise CrowdError(f"a node runs here already, as process {pid} {place}")
    return run_node(lock, load, arguments)


def run_in_background(
    config: Config, load: Callable[[], Config], arguments: argparse.Namespace
) -> int:
    """Start a background node unless one is running (--daemon).  Raises CrowdError."""
    for name in os.listdir("/dev/fd"):  # what cron or a shell has left open
        with contextlib.suppress(OSError):
            os.closerange(max(3, int(name)), int(name) + 1)
    lock = NodeLock(config)
    give_up = time.monotonic() + WEDGED_AFTER
    while not lock.acquire():
        if ask_node(lock, "/heartbeat"):
            return EXIT_OK
        if time.monotonic() > give_up:
            pid = lock.read().get("pid")
            how = f"has not answered for {WEDGED_AFTER} s; replacing it"
            print(f"crowdnode: the node (process {pid}) {how}", file=sys.stderr)
            with contextlib.suppress(NotRunning):
                end_node(lock, TERM_GRACE)
            give_up = time.monotonic() + WEDGED_AFTER
        time.sleep(0.1)
    reader, writer = os.pipe()
    coding: Json = {"encoding": "utf-8", "errors": "surrogateescape"}
    pid = os.fork()
    if pid:
        os.close(writer)
        os.waitpid(pid, 0)
        with open(reader, **coding) as pipe:  # until it runs, or says why not
            status, _, message = pipe.read().partition(" ")
        if message or not status:
            message = message or f"the node died; see {config.state_file('node.log')}"
            print(f"crowdnode: {message}", file=sys.stderr)
        elif sys.stdout.isatty():
            host = local_host(config)
            host = f"[{host}]" if ":" in host else host
            page = f"http://{host}:{lock.read().get('port')}/"
            print(f"page: {page}\nlog:  {config.state_file('node.log')}")
        return int(status or EXIT_FAILED)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(EXIT_OK)

    pipe = open(writer, "w", **coding)  # noqa: SIM115

    def tell(status: int, sentence: str = "") -> None:
        # OSError: nothing waits any more; ValueError: it was told before.
        with contextlib.suppress(OSError, ValueError), pipe:
            pipe.write(f"{status} {sentence}")

    try:
        os.chdir("/")
        null, flags = os.open(os.devnull, os.O_RDWR), os.O_WRONLY | os.O_APPEND
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        with contextlib.suppress(OSError):  # what Python itself has to say
            name = config.state_file("node.log")
            os.dup2(os.open(name, flags | os.O_CREAT, 0o600), 2)
        return run_node(lock, load, arguments, lambda: tell(EXIT_OK))
    except (CrowdError, OSError) as error:
        code = error.status if isinstance(error, CrowdError) else EXIT_FAILED
        tell(code, str(error))
        return code


def signal_node(lock: NodeLock, number: int) -> int:
    """Signal the node that runs here; return its pid.  Raises CrowdError."""
    holder = lock.holder()
    if not holder:
        raise not_running(lock.config)
    pid = int(holder.get("pid") or 0)
    if not is_same_process(pid, float(holder.get("started") or 0), holder):
        wrong = f"{lock.path} is locked, but process {pid} is not the node"
        raise CrowdError(f"{wrong}: it may run in another container, or be starting")
    try:
        os.kill(pid, number)
    except PermissionError:
        raise CrowdError(f"the node, process {pid}, is another user's") from None
    except ProcessLookupError:
        pass
    return pid


def end_node(lock: NodeLock, patience: float) -> None:
    """Send TERM, after *patience* seconds KILL; return when the lock is free."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            pid = signal_node(lock, number)
        except NotRunning:
            if number == signal.SIGTERM:
                raise
            return  # it has ended just now
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            holder = lock.holder()
            if not holder or holder.get("pid") != pid:
                return
            time.sleep(0.02)
    raise CrowdError(f"process {pid} has not ended after KILL")


def ask_node(lock: NodeLock, path: str) -> Any:
    """GET *path* from the node that runs here; return status and body, or ()."""
    port = lock.read().get("port") or lock.config.port
    return get_from_node(lock.config, port, path) if port else ()


def local_host(config: Config) -> str:
    """Return the address at which this machine reaches a node's ``bind``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.bind, config.bind)


def get_from_node(config: Config, port: int, path: str) -> Any:
    """GET *path* from the node on *port*; return status and body, () without one."""
    headers = {}
    if config.http_authentication:
        headers["Authorization"] = basic_credentials(config)
    host = local_host(config)
    connection = http.client.HTTPConnection(host, port, timeout=HEARTBEAT_DEADLINE)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path, headers=headers)
            reply = connection.getresponse()
            server = reply.headers["Server"]
            if server != SERVER_NAME:  # its answer may never end
                return ()
            return reply.status, reply.read().decode()
        except (OSError, ValueError, http.client.HTTPException):
            return ()


def other_node(config: Config) -> str | None:
    """Return a sentence about another node that answers on our port, or None."""
    if not config.port or not get_from_node(config, config.port, "/heartbeat"):
        return None
    user, where = os.geteuid(), f"answers on port {config.port}"
    with contextlib.suppress(OSError):  # Linux alone; see proc(5)
        for family in ("tcp", "tcp6"):
            for line in read_file(f"/proc/net/{family}").decode().splitlines():
                words = line.split()
                if words[1].endswith(f":{config.port:04X}") and words[3] == "0A":
                    user = int(words[7])
    if user == os.geteuid():
        return f"a node with another state_path {where}: see --config and --set"
    import pwd

    name = str(user)
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(user).pw_name
    options = f"--config {config.file} " if config.file else ""
    command = f"sudo -H -u {name} python3 {PROGRAM} {options}--status"
    return f"a node of user {name} {where}: {command}"


def not_running(config: Config) -> NotRunning:
    """Return the error for a node that is needed and does not run."""
    other = other_node(config)
    return NotRunning("no node runs here" + (f", but {other}" if other else ""))


def reload_node(config: Config) -> int:
    """Have the node reload, wait, and print what came of it (--reload)."""
    lock = NodeLock(config)
    before, pid = lock.read().get("reload"), signal_node(lock, signal.SIGHUP)
    deadline = time.monotonic() + RELOAD_DEADLINE
    while time.monotonic() < deadline:
        holder = lock.holder()
        if not holder or holder.get("pid") != pid:
            raise CrowdError(f"the node has ended; see {config.state_file('node.log')}")
        note = holder.get("reload")
        if note and note != before:
            print(note["said"], file=sys.stdout if note["is_done"] else sys.stderr)
            return EXIT_OK if note["is_done"] else EXIT_FAILED
        time.sleep(0.05)
    raise CrowdError(f"process {pid} has not reloaded for {RELOAD_DEADLINE} s")


# ---------------------------------------------------------------------------
# Command line.
# ---------------------------------------------------------------------------

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
STUB_MARK = "# Written by crowdnode.py --stubs"


def show_status(config: Config, as_json: bool) -> int:
    """Print what the node is doing (--status), in colour on a terminal."""
    lock = NodeLock(config)
    holder, answer = lock.holder(), ask_node(lock, "/status")
    if not holder:
        raise not_running(config)
    code, text = answer or (None, "")
    if code != 200:
        hints = {401: ": its login and password are not those here; use --reload"}
        hints[403] = ": allow does not include 127.0.0.1"
        said = f"answers {code}{hints.get(code, '')}" if code else "does not answer"
        sentence = f"(process {holder.get('pid')}) {said}"
        print(f"crowdnode: the node {sentence}", file=sys.stderr)
        return EXIT_SILENT
    if as_json:
        print(text)
        return EXIT_OK
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(status_text(json.loads(text), in_colour), end="")
    return EXIT_OK


def ruby_problem(name: str) -> str | None:
    """Return why central can't have an action of this *name*, or None."""
    if name.lower() not in RUBY_CLASSES:
        return None
    whose = "a class of Ruby's own or of central's, which makes central fail every job"
    return f"{camelized(name)} is {whose}: rename the action"


def camelized(name: str) -> str:
    """Return the Ruby class name for *name*, as CloudCrowd's Inflector has it."""
    return re.sub(r"(?:^|_)(.)", lambda match: match[1].upper(), name)


def ruby_stub(name: str, stages: list[str]) -> str:
    """Return the Ruby class of an action, with empty methods for its stages."""
    methods = "".join(f"  def {stage}\n  end\n" for stage in stages)
    mark = f"{STUB_MARK}: central asks this class for the action's stages."
    return f"{mark}\nclass {camelized(name)} < CloudCrowd::Action\n{methods}end\n"


def write_stubs(config: Config, directory: str) -> int:
    """Write the Ruby class of each action for central's actions directory (--stubs).

    Files that this command has not written are left alone.  Raises CrowdError."""
    if not directory:
        raise UsageError("--stubs: DIR is empty")
    loader = ActionLoader(config, BUILT_IN_ACTIONS)
    actions, problems = sorted(loader.load().items()), []
    for level, sentence in loader.problems:
        print(f"{level}: {sentence}", file=sys.stderr)
    try:
        os.makedirs(directory, exist_ok=True)
        for name, action in actions:
            path = os.path.join(directory, f"{name}.rb")
            stub = ruby_stub(name, stages_of(action)).encode()
            old = read_file(path) if os.path.exists(path) else stub
            if ruby_problem(name):
                problems.append(f"{name}: {ruby_problem(name)}")
            elif old == stub or old.startswith(STUB_MARK.encode()):
                with open(f"{path}.part", "wb") as file:
                    file.write(stub)
                os.replace(f"{path}.part", path)
                print(path)
            elif BUILT_IN_ACTIONS.get(name) is not action:  # else crowd install's own
                problems.append(f"{path}: not written by --stubs; left alone")
    except OSError as error:
        where = error.filename or directory
        raise CrowdError(f"--stubs: can't write {where}: {error.strerror}") from None
    for problem in problems:
        print(problem, file=sys.stderr)
    is_complete = not problems and "error" not in dict(loader.problems)
    return EXIT_OK if is_complete else EXIT_FAILED


def check(config: Config) -> int:
    """Print a line for each preflight check (--check)."""
    loader = ActionLoader(config, BUILT_IN_ACTIONS)
    names = sorted(loader.load())
    lines = [("ok", f"configuration: {config.file or 'no file, all defaults'}")]
    lines += loader.problems
    for name in filter(ruby_problem, names):
        lines.append(("error", f"action {name}: {ruby_problem(name)}"))
    actions = ("ok", f"actions: {', '.join(names)}")
    lines.append(actions if names else ("error", "no action"))
    places = [PROGRAM, *([config.file] if config.file else [])]
    for directory, _, files in os.walk(config.actions_path):
        places += [directory, *(os.path.join(directory, name) for name in files)]
    there = filter(os.path.exists, places)  # not a link to nowhere
    for place in sorted(set(filter(None, map(find_insecure, there)))):
        danger = f"others can write to {place}, and so run code in this node"
        lines.append(("warning", f"{danger}: chmod go-w {place}"))
    lock = NodeLock(config)
    try:
        prepare_directories(config)
        check_storage(config)
        lines.append(("ok", f"directories: {config.state_path}"))
        lines += [("warning", text) for text in preflight_warnings(config)]
        holder = lock.holder()
        if holder and ask_node(lock, "/heartbeat"):
            lines.append(("ok", f"port: this node runs, on {holder.get('port')}"))
        elif holder:
            process = f"process {holder.get('pid')}"
            lines.append(("error", f"port: this node, {process}, does not answer"))
        else:
            lock.lock_work()
            listen(config, 0, None).server_close()
            lines.append(("ok", f"port: {config.bind} port {config.port} is free"))
    except CrowdError as error:
        lines.append(("error", str(error)))
    warnings = [("warning", text) for text in host_warnings(config)]
    lines += warnings or [("ok", f"host: {config.host} resolves")]
    is_local = ipaddress.ip_address(config.bind).is_loopback
    if not is_local and not config.http_authentication and not config.allow:
        danger = "anybody who can connect can send units and read results"
        remedy = "set http_authentication, or allow"
        lines.append(("warning", f"bind = {config.bind}: {danger}: {remedy}"))
    lines += check_central(config)
    for level, sentence in lines:
        print(f"{'ok' if level == 'info' else level}: {sentence}")
    return EXIT_FAILED if "error" in dict(lines) else EXIT_OK


def check_central(config: Config) -> list[tuple[str, str]]:
    """Return whether central answers, and is CloudCrowd."""
    name = f"central: {config.central_server}"
    central = CentralServer(config, config.central_server, config.port)
    try:
        body = central.heartbeat()
    except CentralError as error:
        return [("error", f"{name}: {error}")]
    if body.strip() != HEARTBEAT.encode():
        wrong = f"answers, but is not CloudCrowd: its heartbeat is not {HEARTBEAT}"
        remedy = "check central_server, and any proxy in front of it"
        return [("error", f"{name} {wrong}: {remedy}")]
    return [("ok", f"{name} answers")]


def run_job(config: Config, arguments: argparse.Namespace) -> int:
    """Do a job here and print its outputs (--run)."""
    inputs, options = arguments.inputs, arguments.options or "{}"
    if "-" in inputs:
        with open(0, "rb", closefd=False) as file:  # names may be in any encoding
            data = re.sub(rb"\A\xef\xbb\xbf", b"", file.read())
        lines = [line.rstrip("\r") for line in os.fsdecode(data).split("\n")]
        place = inputs.index("-")
        inputs[place : place + 1] = [line for line in lines if line.strip()]
    if not inputs:
        raise UsageError("--run: needs at least one INPUT")
    try:
        arguments.options = strict_json(options)
    except ValueError as error:
        raise UsageError(f"--options {options}: is not JSON: {error}") from None
    if not isinstance(arguments.options, dict):
        raise UsageError(f"--options {options}: must be a JSON object")
    if arguments.output is not None:
        check_output(arguments.output)
    arguments.names = [without_secrets(x) if is_url(x) else x for x in inputs]
    if not arguments.strings:
        arguments.inputs = [input_of(item) for item in inputs]
    return LocalRun(config, arguments).run()


# Each with what it takes, "" for nothing, and what it does.
COMMANDS = (
    ("--daemon", "", "start a background node unless one is running"),
    ("--check", "", "run the preflight checks"),
    ("--status", "", "show what the node is doing"),
    ("--stop", "", "stop the node and wait for its end"),
    ("--reload", "", "have the node read configuration and actions again"),
    ("--run", "ACTION", "do one job on this machine"),
    ("--stubs", "DIR", "write the Ruby classes that central needs"),
)
# Options with the command that each goes with, "" for all; and the same.
OPTIONS = (
    ("--config", "", "FILE", "default: crowdnode.conf here, else beside this file"),
    ("--port", "", "N", "the same as --set port=N"),
    ("--options", "run", "JSON", "the options of the job"),
    ("--output", "run", "FILE", "write the outputs to FILE"),
    ("--json-lines", "run", "", "print a line of JSON for each input when it is done"),
    ("--strings", "run", "", "inputs are strings"),
    ("--quiet", "run", "", "no progress"),
    ("--fail-fast", "run", "", "stop at the first input that fails"),
    ("--json", "status", "", "the document of GET /status"),
)

HELP_EPILOG = """\
configuration:
  crowdnode.conf lists all keys and defaults; --set KEY=VALUE overrides one.
  A node whose central is on this machine needs none.

exit status:
  0  done                                 2  usage or configuration
  1  could not start, or the job failed   3  no node runs here
  130  Ctrl-C during --run                4  it runs but does not answer

examples:
  crowdnode.py --run word_count *.txt
  find . -name '*.pdf' | crowdnode.py --run process_pdfs - --output result.json
  crowdnode.py --config /etc/crowdnode.conf --check

in a crontab:
  * * * * * /usr/bin/python3 /opt/crowdnode/crowdnode.py --daemon
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; argparse ends the process with 2 where it is wrong."""
    hidden, version = argparse.SUPPRESS, f"crowdnode {__version__}"
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

    def add(group: Any, name: str, takes: str, does: str) -> None:
        kind: Json = {"metavar": takes} if takes else {"action": "store_true"}
        group.add_argument(name, help=does, **kind)

    command = parser.add_argument_group("commands").add_mutually_exclusive_group()
    for row in COMMANDS:
        add(command, *row)
    command.add_argument("--version", action="version", version=version)
    command.add_argument("--help", "-h", action="help")
    command.add_argument(ATTENDED_FLAG, action="store_true", help=hidden)
    options = parser.add_argument_group("options")
    about = "with --run: a file or a URL, with --strings any string; - reads inputs "
    about += "from standard input, one per line"
    options.add_argument("inputs", nargs="*", metavar="INPUT", help=about)
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key"
    )
    for name, goes_with, takes, does in OPTIONS:
        add(options, name, takes, f"with --{goes_with}: {does}" if goes_with else does)
    options.add_argument(INHERIT_FLAG, nargs=2, type=int, help=hidden)

    commands = [name for name, _, _ in COMMANDS]
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_intermixed_args(argv[:end])
    arguments.inputs += argv[end + 1 :]
    for name, goes_with, _, _ in OPTIONS:
        is_given = getattr(arguments, name[2:].replace("-", "_")) not in (None, False)
        if goes_with and is_given and not getattr(arguments, goes_with):
            parser.error(f"{name} goes with --{goes_with}")
    if arguments.inputs and arguments.run is None:
        word = f"--{arguments.inputs[0]}".replace("--start", "--daemon")
        hint = f"; did you mean {word}?" if word in commands else ""
        parser.error(f"unrecognized arguments: {' '.join(arguments.inputs)}{hint}")
    return arguments


def parse_settings(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Return what --set and --port say, in pairs.  Raises UsageError."""
    settings = []
    for setting in arguments.set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: must be KEY=VALUE")
        settings.append((key.strip(), value))
    return settings + ([] if arguments.port is None else [("port", arguments.port)])


def find_config(given: str | None) -> str | None:
    """Return the path of the configuration file; *given*: --config, empty for none."""
    if given is not None:
        return os.path.abspath(given) if given else None
    for directory in (".", os.path.dirname(PROGRAM)):  # the former may be gone
        path = os.path.join(directory, "crowdnode.conf")
        with contextlib.suppress(OSError):
            if directory != "." or os.stat(path).st_uid in (0, os.geteuid()):
                return os.path.abspath(path) if os.path.exists(path) else None
    return None


def dispatch(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for.  Raises CrowdError."""
    path, settings = find_config(arguments.config), parse_settings(arguments)
    asks = arguments.stop or arguments.status or arguments.reload
    if arguments.run is not None:
        settings.append(("host", "127.0.0.1"))  # whatever this machine is called

    asks = asks and not arguments.inherit  # a new version must understand it all
    values: Json = {}
    if arguments.attended:
        with open(0, "rb", 0, closefd=False) as file:
            values = json.loads(file.readline())

    def load() -> Config:
        if values:
            return Config(**values)
        return (find_config_of_node if asks else load_config)(path, settings)

    config = load()
    if arguments.daemon and not arguments.inherit:
        return run_in_background(config, load, arguments)
    if arguments.stop:
        end_node(NodeLock(config), config.drain_time + CHECK_OUT_TIMEOUT + TERM_GRACE)
        return EXIT_OK
    if arguments.reload:
        return reload_node(config)
    if arguments.status:
        return show_status(config, arguments.json)
    if arguments.check:
        return check(config)
    if arguments.stubs is not None:
        return write_stubs(config, arguments.stubs)
    if arguments.run is not None:
        return run_job(config, arguments)
    return run_in_foreground(config, load, arguments)


def tidy_process() -> None:
    """Reset what the parent process may have changed.

    Without descriptors 0 to 2 the next files would get these numbers, and with SIGCHLD
    ignored no child can be waited for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    descriptor = 0
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a test's own stream
            getattr(sys, name).reconfigure(errors="backslashreplace")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.  Returns the exit status."""
    try:
        tidy_process()
        status = dispatch(parse_arguments(sys.argv[1:] if argv is None else argv))
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
