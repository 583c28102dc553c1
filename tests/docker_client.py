"""A stand-in for the docker client, for machines without a daemon: ``docker_client.py ARGUMENTS``.

It does with bubblewrap what the flags ask for: no network, a read-only root, a small scratch
folder, the mounted folder, another user. The program in the "image" is this machine's Python.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FLAGS = {"--interactive", "--rm", "--read-only"}
HIDDEN = {"proc", "dev", "tmp", "scratch", "agentkd"}


def options(arguments: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Flags with their values, and what follows them."""
    found: dict[str, list[str]] = {}
    while arguments and arguments[0].startswith("-"):
        name = arguments.pop(0)
        found.setdefault(name, []).append("" if name in FLAGS else arguments.pop(0))
    return found, arguments


def run(arguments: list[str]) -> None:
    given, (_image, *command) = options(arguments)
    view = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc"]
    if given["--network"] == ["none"]:
        view.append("--unshare-net")
    uid, _, gid = given["--user"][0].partition(":")
    view += ["--uid", uid, "--gid", gid, "--cap-drop", given["--cap-drop"][0]]
    bind = "--ro-bind" if "--read-only" in given else "--bind"
    for path in sorted(Path("/").iterdir()):
        if path.is_symlink():
            view += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir() and path.name not in HIDDEN:
            view += [bind, str(path), str(path)]
    for prefix in {sys.prefix, sys.base_prefix}:
        if prefix.startswith("/tmp/"):
            view += [bind, prefix, prefix]
    view += ["--proc", "/proc", "--dev", "/dev"]
    for mount in given["--mount"]:
        parts = dict(part.partition("=")[::2] for part in mount.split(","))
        view += ["--ro-bind" if "readonly" in parts else "--bind", parts["source"], parts["target"]]
    for tmpfs in given["--tmpfs"]:
        path, _, how = tmpfs.partition(":")
        parts = dict(part.partition("=")[::2] for part in how.split(","))
        size = int(parts["size"].rstrip("m")) << 20
        view += ["--perms", parts["mode"], "--size", str(size), "--tmpfs", path]
    view += ["--clearenv"]
    for setting in given["--env"]:
        name, _, value = setting.partition("=")
        view += ["--setenv", name, value]
    view += ["--chdir", given["--workdir"][0], "--remount-ro", "/"]
    assert given["--entrypoint"] == ["python3"]
    os.execvp(view[0], [*view, "--", sys.executable, *command])


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "run":
        run(rest)
    if what == "version":
        print("28.0.0")
    if what == "image" and rest[-1].startswith("absent"):
        sys.exit("Error response from daemon: No such image")


main()
