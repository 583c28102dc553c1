"""Landlock: which files the process and its children may still open.

Kernel documentation: ``userspace-api/landlock``. The numbers of the three calls are the same on
every architecture.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from .kernel import syscall

__all__ = ["restrict", "version"]

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_FIFO = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 10
MAKE_SYM, REFER, TRUNCATE = 1 << 12, 1 << 13, 1 << 14
_READ = READ_FILE | READ_DIR
_WRITE = _READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM
_FILE_ONLY = READ_FILE | WRITE_FILE | TRUNCATE
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}


def version() -> int:
    """Version of the kernel's Landlock; 0 when it has none."""
    try:
        return syscall(_CREATE, None, 0, 1)
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str], devices: Iterable[str]) -> int:
    """Allow reading beneath ``readable``, everything but running beneath ``writable``, nothing else.

    ``devices`` are files to read and write.

    From version 4 on TCP is closed too, from version 6 on abstract Unix sockets and signals to
    processes outside. Nothing may be executed.

    Returns:
        The version used; 0 when the kernel has no Landlock and nothing was restricted.

    Raises:
        OSError: as the kernel says.
    """
    abi = version()
    if not abi:
        return 0
    handled = _HANDLED.get(abi, (1 << 16) - 1)
    attributes = struct.pack("=QQQ", handled, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = syscall(_CREATE, ctypes.create_string_buffer(attributes[:size], size), size, 0)
    try:
        kinds = ((readable, _READ), (devices, _FILE_ONLY), (writable, _WRITE | REFER | TRUNCATE))
        for paths, wanted in kinds:
            for path in paths:
                _allow(ruleset, path, wanted & handled)
        syscall(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)
    return abi


def _allow(ruleset: int, path: str, wanted: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rights = wanted if os.path.isdir(path) else wanted & _FILE_ONLY
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
        syscall(_ADD_RULE, ruleset, 1, rule, 0)
    finally:
        os.close(fd)
