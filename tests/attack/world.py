"""What an attack may harm: canaries of the host, and a look at whether one was touched."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agentkd.sandbox.inside.wire import receive, send

SECRET_VARIABLE = "AGENTKD_ATTACK_SECRET"

_CANARY = """
import ctypes, sys
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_long(-1))  # may be looked at, where the Yama module guards
held = ctypes.create_string_buffer(sys.stdin.buffer.readline().strip())
print(ctypes.addressof(held), flush=True)
sys.stdin.read()
"""


class World:
    """A file, a folder, a module, a process and sockets of the host.

    Attributes:
        targets: where they are; what an attack is given.
        secret: the text that must not come out.
    """

    def __init__(self) -> None:
        self.secret = f"s{secrets.token_hex(12)}"
        self.folder = Path(tempfile.mkdtemp(prefix="agentkd-attack-"))
        self.file, self.module = self.folder / "canary", self.folder / "canary_module.py"
        self.file.write_text(self.secret)
        self.module.write_text(f"SECRET = {self.secret!r}\n")
        self.file.chmod(0o600)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _CANARY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={SECRET_VARIABLE: self.secret},
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(self.secret.encode() + b"\n")
        self.process.stdin.flush()
        address = int(self.process.stdout.readline())
        self.sockets = {
            "tcp": socket.create_server(("127.0.0.1", 0)),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "abstract": socket.socket(socket.AF_UNIX),
            "datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        }
        abstract = f"agentkd-{secrets.token_hex(8)}"
        self.sockets["udp"].bind(("127.0.0.1", 0))
        self.sockets["abstract"].bind("\0" + abstract)
        self.sockets["abstract"].listen()
        self.sockets["datagram"].bind(str(self.folder / "socket"))
        for sock in self.sockets.values():
            sock.setblocking(False)
        for path in (self.folder, self.folder / "socket"):
            path.chmod(0o777)
        self.targets: dict[str, Any] = {
            "file": str(self.file),
            "folder": str(self.folder),
            "module": str(self.module),
            "pid": self.process.pid,
            "address": address,
            "length": len(self.secret),
            "tcp": self.sockets["tcp"].getsockname()[1],
            "udp": self.sockets["udp"].getsockname()[1],
            "abstract": abstract,
            "datagram": str(self.folder / "socket"),
            "near": [],
            "generations": 3,
        }
        self._was = self._look()

    def _look(self) -> dict[str, Any]:
        seen: dict[str, Any] = {"names": sorted(p.name for p in self.folder.iterdir())}
        for path in (self.file, self.module):
            if path.exists():
                info = path.stat()
                seen[path.name] = (
                    path.read_text(),
                    info.st_mode,
                    info.st_mtime_ns,
                    info.st_uid,
                    info.st_nlink,
                )
        return seen

    def touched(self) -> list[str]:
        """What is not as it was."""
        found = [name for name, value in self._look().items() if self._was.get(name) != value]
        found += [name for name in self._was if name not in self._look()]
        if self.process.poll() is not None:
            found.append("process ended")
        else:
            status = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            found += ["process stopped"] * (status[0] in "Tt")
        for name, sock in self.sockets.items():
            with contextlib.suppress(BlockingIOError):
                if name in ("tcp", "abstract"):
                    sock.accept()[0].close()
                else:
                    sock.recv(100)
                found.append(f"socket {name}")
        return found

    def close(self) -> None:
        """End and remove all of it."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self.process.wait()
        for sock in self.sockets.values():
            sock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def unbounded(codes: list[str], world: World, seconds: float) -> dict[str, Any]:
    """Run actions in a plain process of this user; what came of it.

    "value" and "size" (characters printed or returned), or "error"; "ended" when it did not
    answer in time.
    """
    ours, theirs = socket.socketpair()
    place = tempfile.mkdtemp(prefix="agentkd-control-")
    control = Path(__file__).with_name("control.py")
    environment = {"PATH": os.environ.get("PATH", ""), SECRET_VARIABLE: world.secret}
    process = subprocess.Popen(
        [sys.executable, "-s", str(control), str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=place,
        env=environment,
        start_new_session=True,
    )
    theirs.close()
    try:
        send(ours, {"codes": codes, "targets": world.targets})
        answer = receive(ours, time.monotonic() + seconds)
    except (OSError, ValueError) as exc:
        answer = {"ended": str(exc) or type(exc).__name__}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session, and all that it has left
        process.wait()
        ours.close()
        subprocess.run(["rm", "-rf", place], check=False)  # shutil.rmtree is recursive
    return answer if answer is not None else {"ended": f"exit status {process.returncode}"}


def harm(shows: str, answer: dict[str, Any], world: World) -> str:
    """The harm that shows, or "" when there is none."""
    if shows == "secret":
        return "secret" if world.secret in json.dumps(answer) else ""
    if shows == "world":
        return ", ".join(world.touched())
    if shows == "big":
        return "big" if answer.get("size", 0) > 1_000_000 else ""
    if shows == "ends":
        return str(answer.get("ended") or answer.get("error") or "")
    return "value" if answer.get("value") else ""
