"""A folder that all nodes of a cluster reach: any path that fsspec knows.

``/shared/run``, ``s3://bucket/run``, ``gs://bucket/run``; credentials come from the environment of
each node.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agentkd.errors import ConfigError, StorageError, boundary

__all__ = ["Mirror", "Store"]

_HINT = "Give a --store that every node can read and write."


class Store:
    """Files by name under one URL.

    Args:
        url: what fsspec takes.

    Raises:
        ConfigError: fsspec, or its package for this protocol, is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with boundary(ConfigError, f"opening {url}", "Install it by: pip install 'agentkd[ray]'."):
            import fsspec

            fs, root = fsspec.core.url_to_fs(url)
        self._fs: Any = fs
        self._root = root.rstrip("/")

    def put(self, local: Path, name: str) -> None:
        """Copy a file into the store; it is there whole or as it was before.

        Raises:
            StorageError: the store cannot be written.
        """
        target = f"{self._root}/{name}"
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        with boundary(StorageError, f"writing {name} to {self.url}", _HINT):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(local), partial)
            self._fs.mv(partial, target)

    def get(self, name: str, local: Path) -> None:
        """Copy a file out of the store."""
        with boundary(StorageError, f"reading {name} from {self.url}", _HINT):
            local.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(f"{self._root}/{name}", str(local))

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with boundary(StorageError, f"deleting {name} in {self.url}", _HINT):
            if self._fs.exists(f"{self._root}/{name}"):
                self._fs.rm_file(f"{self._root}/{name}")

    def files(self, folder: str) -> dict[str, int]:
        """Name and size in bytes of the files below a folder; files that are being written apart."""
        top = f"{self._root}/{folder}".rstrip("/")
        self._fs.invalidate_cache()
        with boundary(StorageError, f"listing {self.url}", _HINT):
            if not self._fs.exists(top):
                return {}
            found = self._fs.find(top, detail=True)
        return {
            path[len(self._root) + 1 :]: int(entry["size"] or 0)
            for path, entry in found.items()
            if not path.endswith(".partial")
        }


class Mirror:
    """Copies a folder and what is below it into a store again and again, for as long as the block lasts.

    Args:
        folder: may not exist yet.
        store: where the copy goes.
        name: folder in the store.
        every: seconds between two copies.
        leave: names of files at the top of the folder that are not copied.
    """

    def __init__(self, folder: Path, store: Store, name: str, every: float, leave: Iterable[str]) -> None:
        self.folder, self.store, self.name, self.every = folder, store, name, every
        self.leave = set(leave)
        self._sent: dict[str, tuple[int, int]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)

    def copy(self) -> None:
        """Copy what has changed since the last time, and delete what is gone."""
        present: dict[str, tuple[int, int]] = {}
        for path in sorted(self.folder.rglob("*")) if self.folder.is_dir() else ():
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in self.leave and path.suffix not in (".partial", ".lock"):
                stat = path.stat()
                present[name] = (stat.st_size, stat.st_mtime_ns)
        for name, state in present.items():
            if self._sent.get(name) != state:
                self.store.put(self.folder / name, f"{self.name}/{name}")
        for name in self._sent.keys() - present.keys():
            self.store.remove(f"{self.name}/{name}")
        self._sent = present

    def _loop(self) -> None:
        while not self._ended.wait(self.every):
            try:
                self.copy()
            except (StorageError, OSError):
                continue  # the next copy, or at the latest the last one, tries again

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.copy()
