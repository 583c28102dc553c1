"""Attacks over sockets."""

from __future__ import annotations

from .record import RAW, Attack

ATTACKS = (
    Attack(
        "TCP",
        "import socket\nsocket.create_connection(('127.0.0.1', T['tcp']), 1).close()",
        "sends data away, reaches services of the machine and its network",
        "world",
    ),
    Attack(
        "UDP",
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('127.0.0.1', T['udp']))",
        "sends data away in DNS questions",
        "world",
    ),
    Attack(
        "TCP by ctypes",
        RAW
        + """
import struct
fd = call((41, 198), 2, 1, 0)
address = ctypes.create_string_buffer(struct.pack("=H", 2) + struct.pack("!H4B", T["tcp"], 127, 0, 0, 1) + bytes(8), 16)
call((42, 203), fd, address, 16)
""",
        "connects without Python's socket module",
        "world",
    ),
    Attack(
        "HTTP client",
        "import urllib.request\nurllib.request.urlopen(f\"http://127.0.0.1:{T['tcp']}/\", timeout=0.5).read()",
        "asks the cloud's metadata service for credentials",
        "world",
    ),
    Attack(
        "abstract Unix socket",
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect(chr(0) + T['abstract'])",
        "talks to desktop and container services, which no file mode protects",
        "world",
    ),
    Attack(
        "datagram to a Unix socket",
        """
import socket
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
a.sendto(b"x", T["datagram"])
""",
        "writes to the system's log and service sockets, with a pair of sockets and no connect",
        "world",
    ),
    Attack(
        "socket seen through a link",
        """
import os, socket
os.symlink(T["datagram"], "s")
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
a.sendmsg([b"x"], [], 0, "s")
""",
        "the same through scratch",
        "world",
    ),
    Attack(
        "server",
        "import socket\ns = socket.create_server(('0.0.0.0', 0))\ns.getsockname()[1]",
        "opens a port for others",
    ),
    Attack(
        "netlink",
        "import socket\ns = socket.socket(16, socket.SOCK_RAW, 0)\ns.fileno()",
        "reads and changes the network's configuration",
    ),
    Attack(
        "System V shared memory",
        RAW + "call((29, 194), 0, 4096, 0o1600) >= 0 and call((29, 194), 0, 4096, 0o1600) + 1",
        "leaves memory behind that outlives the process",
        control=RAW + "n = call((29, 194), 0, 4096, 0o1600)\ncall((31, 195), n, 0, 0)\nn >= 0",
    ),
    Attack(
        "message queue",
        RAW + "call((240, 180), f'agentkd-{os.getpid()}'.encode(), os.O_CREAT | os.O_RDWR, 0o600, 0) >= 0",
        "leaves a queue behind that outlives the process",
        control=RAW
        + "n = f'agentkd-{os.getpid()}'.encode()\nfd = call((240, 180), n, os.O_CREAT | os.O_RDWR, 0o600, 0)\n"
        "call((241, 181), n)\nfd >= 0",
    ),
)
