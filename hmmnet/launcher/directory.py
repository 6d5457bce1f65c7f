"""The runtime directory of a machine: who runs it, how to reach it, what it logs.

One folder for each machine below ``$HMMNET_DIR``, else ``$XDG_RUNTIME_DIR/hmmnet``, else ``/tmp/hmmnet-UID``::

    NAME/lock           held (flock) by the launcher as long as it lives: the kernel lets go of it however the launcher dies; it holds
                        the record as it was at the beginning, by which a machine can be ended whose `machine.json` is damaged
    NAME/machine.json   what runs, as of now; replaced whole, so a reader never sees half of it
    NAME/secret         what peers must show (0600)
    NAME/logs/          one file of JSON lines for each process
    NAME/*              sockets; in a short folder of their own where this one's path is too long for a socket

A folder whose lock nobody holds is *stale*: its machine is gone. A machine that ended well leaves no folder; one that failed leaves its
record and its logs, until ``hmmnet clean`` or the next ``up`` of that name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from hmmnet.errors import HmmnetError, WrongUse
from hmmnet.wire.secrets import new_secret, read_secret, write_secret

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z")
SOCKET_PATH_MAX = 107
"""Bytes in the path of a Unix socket (sun_path, less its final zero)."""
SOCKET_NAME_MAX = 40
"""Bytes kept free for a socket's own name and its slash."""
NO_LOGS = 'no machine runs, and none left its logs; start one with "hmmnet up"'
LOCK_TRIES = 10
LOCK_PAUSE_S = 0.02
"""`Directory.alive` takes the lock for an instant, so a launcher that finds it taken looks again before it gives up."""


class MachineExists(HmmnetError):
    """A machine of this name runs already."""

    def __init__(self, name: str, record: MachineRecord | None) -> None:
        self.name = name
        self.record = record
        what = "starts just now" if record is None else f"runs already ({record.topology}, process {record.pid})"
        super().__init__(
            f'machine "{name}" {what}: use it with "hmmnet run WORKLOAD --on {name}", end it with "hmmnet down {name}", '
            'or start another with "--name OTHER"'
        )


class DeviceRecord(msgspec.Struct):
    """A device as `hmmnet ps` shows it: ``starting``, ``ready``, ``lost`` (`how` says how) or ``unplugged``.

    It is lost as soon as the host has lost it: its process may run on for a while, held or cut off. `Crew.has_ended` tells.
    """

    name: str
    model: str
    memory_bytes: int
    pid: int = 0
    state: str = "starting"
    how: str = ""


class MachineRecord(msgspec.Struct):
    """What `machine.json` says. `kind` is ``up`` (the command) or ``program`` (embedded); `state` ``starting``, ``running`` or
    ``failed``.
    """

    name: str
    topology: str
    kind: str
    pid: int
    process_started: int
    """Start time of process `pid` in clock ticks since boot, which tells it from a later process of that number."""
    started_s: float
    rate: float = 0.0
    state: str = "starting"
    why: str = ""
    host_pid: int = 0
    client_endpoint: str = ""
    sockets: str = ""
    """Folder of the sockets when it is not the machine's own; goes when the machine does."""
    devices: list[DeviceRecord] = []
    faults: dict[str, int] = {}
    """How often faults have happened, by kind, on a machine under ``up``."""


def base_directory() -> Path:
    """Where this user's machines are; made if need be. Raises HmmnetError when the place belongs to somebody else."""
    given = os.environ.get("HMMNET_DIR")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if given:
        base = Path(given)
    elif runtime and Path(runtime).is_dir():
        base = Path(runtime) / "hmmnet"
    else:
        base = Path(tempfile.gettempdir()) / f"hmmnet-{os.getuid()}"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = base.stat(follow_symlinks=False)
    except OSError as error:
        raise HmmnetError(f"{base}: cannot be used for machines: {error.strerror}; set HMMNET_DIR to a folder of your own") from error
    if not given and (about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode)):
        raise HmmnetError(f"{base}: belongs to somebody else; set HMMNET_DIR to a folder of your own")
    return base.absolute()


def check_name(name: str) -> str:
    """`name`, if a machine may be called that. Raises WrongUse."""
    if NAME.match(name) is None:
        raise WrongUse(
            f"{name!r} cannot name a machine: up to 32 letters, digits, dots, dashes and underscores, beginning with a letter or digit"
        )
    return name


def as_name(text: str) -> str:
    """`text`, which people may have written with any letters, as the beginning of a machine's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "machine"


def process_started(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def new_record(name: str, topology: str, kind: str) -> MachineRecord:
    """The record of a machine that this process starts now."""
    pid = os.getpid()
    return MachineRecord(name=name, topology=topology, kind=kind, pid=pid, process_started=process_started(pid), started_s=time.time())


class Directory:
    """A machine's folder, from inside (the launcher, which holds its lock) or from outside (everybody else)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._lock: int | None = None
        self._said = False

    @property
    def logs(self) -> Path:
        """Folder of the log files."""
        return self.path / "logs"

    @classmethod
    def named(cls, name: str) -> Directory:
        """The folder of machine `name`, whether it exists or not."""
        return cls(base_directory() / check_name(name))

    @classmethod
    def create(cls, name: str, record: MachineRecord | None = None) -> Directory:
        """Make the folder and hold its lock; what a dead machine of that name left is removed. Raises MachineExists.

        `record` is what others see from the first moment on: with it a machine can be ended even if the disk fills up later.

        Raises HmmnetError when the folder cannot be written, for example on a full disk; then nothing of it stays.
        """
        directory = cls.named(name)
        directory.begin(record)
        return directory

    def begin(self, record: MachineRecord | None) -> None:
        """See `create`."""
        try:
            self._fill()
            if record is not None:
                self.sign(record)
                self._replace(record)
        except OSError as error:
            if self._lock is not None:
                self.remove()
            mend = "free some room there, or set HMMNET_DIR to a folder elsewhere"
            raise HmmnetError(f"{self.path}: cannot be written: {error.strerror}; {mend}") from error

    def sign(self, record: MachineRecord) -> None:
        """Whose folder it is, for who cannot read its record; by who holds the lock. Raises OSError, for example on a full disk: then the
        record stays that was there before, if there was one.
        """
        assert self._lock is not None, "who signs a folder holds it"
        text = msgspec.json.encode(record)
        os.posix_fallocate(self._lock, 0, len(text))
        os.pwrite(self._lock, text, 0)
        os.ftruncate(self._lock, len(text))

    def _fill(self) -> None:
        for _ in range(LOCK_TRIES):
            self.path.mkdir(mode=0o700, exist_ok=True)
            if self.take_lock():
                break
            time.sleep(LOCK_PAUSE_S)
        else:
            raise MachineExists(self.name, self.read())
        self.empty()
        self.logs.mkdir(mode=0o700)
        write_secret(self.secret_file, new_secret())

    def take_lock(self) -> bool:
        """Hold the lock, if nobody does; then whatever is in the folder is stale."""
        path = self.path / "lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the folder was removed under our hands: made again by the caller
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = path.stat().st_ino == os.fstat(lock).st_ino
        except OSError:
            same = False
        if not same:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def empty(self) -> None:
        """Remove what a dead machine left; the lock is held."""
        self._remove_sockets()
        for entry in self.path.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)

    def alive(self) -> bool:
        """Whether a launcher holds this folder."""
        if self._lock is not None:
            return True
        try:
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(lock)
        return False

    def read(self) -> MachineRecord | None:
        """The record; None when there is none, or none that can be read."""
        return _record_in(self.record_file)

    def signature(self) -> MachineRecord | None:
        """The record that the last holder of the lock began with (`sign`); None when there is none, or none that can be read."""
        return _record_in(self.path / "lock")

    def holders(self) -> list[int]:
        """Processes that hold the lock, as the kernel says; those that cannot be looked at are left out."""
        lock = self.path / "lock"
        try:
            number = str(lock.stat().st_ino)
            rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        except OSError:
            return []
        pids = sorted({int(row[4]) for row in rows if row[1] == "FLOCK" and row[5].rpartition(":")[2] == number})
        return [pid for pid in pids if _has_open(pid, lock)]

    def write(self, record: MachineRecord) -> None:
        """Replace the record. On a full disk it is written over the old one; where even that fails the old one stays, which is said
        once on stderr: the machine is worth more than its record.
        """
        try:
            self._replace(record)
        except OSError:
            try:
                self._write_over(record)
            except OSError as error:
                self._say(error)

    def _replace(self, record: MachineRecord) -> None:
        """Nobody sees half a record."""
        new = self.path / "machine.json.new"
        try:
            new.write_bytes(msgspec.json.encode(record))
            new.replace(self.record_file)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    def _write_over(self, record: MachineRecord) -> None:
        """In place: needs no room as long as the record fits into its old blocks."""
        text = msgspec.json.encode(record)
        with self.record_file.open("r+b", buffering=0) as file:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate()

    def _say(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            print(
                f'hmmnet: {self.record_file}: cannot be written: {error.strerror}; "hmmnet ps" will not see what changes', file=sys.stderr
            )

    @property
    def record_file(self) -> Path:
        """File of the record."""
        return self.path / "machine.json"

    @property
    def secret_file(self) -> Path:
        """File of what peers must show."""
        return self.path / "secret"

    @property
    def keys_file(self) -> Path:
        """CURVE keys of a machine that is reached over a network."""
        return self.path / "keys.json"

    def secret(self) -> bytes:
        """What peers must show. Raises HmmnetError."""
        return read_secret(self.secret_file)

    def sockets(self) -> Path:
        """A folder for sockets: this one, or a short one of its own under /tmp that must go with `MachineRecord.sockets`."""
        if len(os.fsencode(self.path)) + SOCKET_NAME_MAX <= SOCKET_PATH_MAX:
            return self.path
        return Path(tempfile.mkdtemp(prefix=f"hmmnet-{self.name[:16]}-", dir="/tmp"))

    def remove(self) -> None:
        """Remove the folder and everything in it, and let go of the lock."""
        self._remove_sockets()
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def _remove_sockets(self) -> None:
        record = self.read() or self.signature()
        folder = Path(record.sockets) if record is not None else Path()
        if folder.parent == Path("/tmp") and folder.name.startswith("hmmnet-"):  # noqa: S108 - see `sockets`
            shutil.rmtree(folder, ignore_errors=True)

    def release(self) -> None:
        """Let go of the lock and leave the folder as it is."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _record_in(file: Path) -> MachineRecord | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=MachineRecord)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _has_open(pid: int, file: Path) -> bool:
    """Whether a process has that very file open."""
    try:
        opened = [Path(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
        return any(one.samefile(file) for one in opened if one.exists())
    except OSError:
        return False


def directories() -> Iterator[Directory]:
    """Every machine's folder, running or stale, by name."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(base_directory().iterdir()):
            if path.is_dir() and NAME.match(path.name) and ((path / "lock").exists() or (path / "machine.json").exists()):
                yield Directory(path)


def remove_stale() -> list[str]:
    """Remove the folders of machines that are gone; their names."""
    removed = []
    for directory in directories():
        if directory.take_lock():
            directory.remove()
            removed.append(directory.name)
    return removed


def running_machine(name: str | None) -> Directory:
    """The folder of the running machine `name`; of the only one, or of "default", when None. Raises HmmnetError."""
    if name is None:
        return _the_one([directory for directory in directories() if directory.alive()], 'no machine runs; start one with "hmmnet up"')
    found, missing = running_machines([name])
    if missing:
        raise HmmnetError(missing)
    return found[0]


def running_machines(names: Sequence[str]) -> tuple[list[Directory], str]:
    """The folders of those of the machines `names` that run, and what is to be said of the others: nothing when there are none."""
    found, said, missing = list[Directory](), list[str](), list[str]()
    for name in dict.fromkeys(names):
        try:
            directory = Directory.named(name)
        except HmmnetError as error:
            said.append(str(error))
            continue
        record = directory.read()
        if directory.alive():
            found.append(directory)
        elif record is not None and record.state == "failed":
            said.append(f'machine "{name}" has failed: {record.why}; start it anew with "hmmnet up --name {name}"')
        else:
            missing.append(name)
    if missing:
        others = [directory.name for directory in directories() if directory.alive() and directory.name not in names]
        there = f"running: {', '.join(others)}" if others else f'start it with "hmmnet up --name {missing[0]}"'
        quoted = " or ".join(f'"{name}"' for name in missing)
        said.append(f"no machine {quoted} runs; {there}")
    return found, "\n".join(said)


def refuse_if_running(name: str) -> None:
    """Raise MachineExists when a machine of that name runs; `Directory.create` decides, this only says it sooner."""
    directory = Directory.named(name)
    if directory.alive():
        raise MachineExists(name, directory.read())


def known_machine(name: str | None) -> Directory:
    """As `running_machine`, for machines that left their logs as well; a running one is preferred when `name` is None."""
    known = list(directories())
    if name is None:
        return _the_one([directory for directory in known if directory.alive()] or known, NO_LOGS)
    directory = Directory.named(name)
    if not directory.path.is_dir():
        there = f"there are: {', '.join(other.name for other in known)}" if known else "none runs, and none left its logs"
        raise HmmnetError(f'there is no machine "{name}"; {there}')
    return directory


def _the_one(candidates: list[Directory], none: str) -> Directory:
    chosen = [directory for directory in candidates if directory.name == "default"] or candidates
    if not chosen:
        raise HmmnetError(none)
    if len(chosen) > 1:
        raise HmmnetError(f"several machines are there, say which: {', '.join(directory.name for directory in chosen)}")
    return chosen[0]
