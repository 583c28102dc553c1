from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentkd.doctor import examine
from agentkd.errors import ConfigError, SandboxError
from agentkd.sandbox.machine import Machine, look, remedy

LINUX = sys.platform == "linux"
GOOD = Machine(
    platform="linux",
    architecture="x86_64",
    user=1000,
    bwrap="/usr/bin/bwrap",
    landlock=4,
    filtered=True,
    namespaces="",
    user_ids=4294967295,
    container="",
    system_admin=False,
    cgroups="v2",
    clone_switch=1,
    most_namespaces=96365,
    apparmor_switch=0,
)
REFUSED = GOOD._replace(namespaces="new namespaces: Operation not permitted")


def diagnose(machine: Machine, fails: tuple[str, ...] = ()) -> Any:
    def try_fork(kind: str) -> str:
        if kind in fails or machine.namespaces:
            raise SandboxError("The sandbox did not start.", "")
        return "works"

    return examine(only=("sandbox",), machine=machine, try_fork=try_fork)


@pytest.mark.parametrize(
    ("machine", "command"),
    [
        (REFUSED._replace(clone_switch=0), "sysctl -w kernel.unprivileged_userns_clone=1"),
        (REFUSED._replace(most_namespaces=0), "sysctl -w user.max_user_namespaces="),
        (REFUSED._replace(apparmor_switch=1), "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
        (REFUSED._replace(container="docker"), "docker run --security-opt seccomp=unconfined"),
        (REFUSED._replace(container="docker", user=0), "docker run --cap-add SYS_ADMIN"),
        (REFUSED._replace(container="podman"), "podman run"),
        (REFUSED._replace(container="kubernetes"), "kubectl patch"),
        (REFUSED._replace(user=0), "setpriv --reuid"),
        (GOOD._replace(user=0, user_ids=1, system_admin=True), "setpriv --reuid"),
        (GOOD._replace(platform="darwin", bwrap=None, landlock=0), "docker"),
        (GOOD._replace(platform="win32", bwrap=None, landlock=0), "e2b"),
        (GOOD._replace(architecture="riscv64", filtered=False), "e2b"),
    ],
)
def test_every_obstacle_has_its_command(machine: Machine, command: str) -> None:
    found = diagnose(machine, fails=("bubblewrap", "landlock"))
    assert found.exit_code == 5
    first = found.checks[0]
    assert first.state == "broken" and first.part == "sandbox"
    assert command in first.mend
    assert "\n" not in first.mend


def test_a_mac_is_told_what_to_use_instead() -> None:
    found = diagnose(GOOD._replace(platform="darwin", bwrap=None, landlock=0))
    assert "docker or e2b" in found.checks[0].says


def test_no_bubblewrap_is_fine_where_landlock_is() -> None:
    found = diagnose(GOOD._replace(bwrap=None))
    assert found.exit_code == 0
    states = {check.name: check for check in found.checks}
    assert states["fork, landlock (default)"].state == "ok"
    assert states["fork, bubblewrap"].state == "missing"
    assert "bubblewrap" in states["fork, bubblewrap"].mend
    neither = diagnose(GOOD._replace(bwrap=None, landlock=0))
    assert neither.exit_code == 5
    assert "bubblewrap" in neither.checks[0].mend


def test_what_is_not_the_default_may_fail() -> None:
    found = diagnose(GOOD, fails=("landlock",))
    assert found.exit_code == 0
    assert diagnose(GOOD, fails=("bubblewrap",)).exit_code == 5


def test_an_unknown_isolation_in_the_environment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKD_SANDBOX_ISOLATION", "gvisor")
    found = diagnose(GOOD)
    assert found.exit_code == 5
    assert found.checks[0].mend == "unset AGENTKD_SANDBOX_ISOLATION"


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(ConfigError, match="'sandboxes'"):
        examine(only=("sandboxes",))


def doctor(*arguments: str, before: tuple[str, ...] = (), **environment: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*before, sys.executable, "-m", "agentkd", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.skipif(not LINUX, reason="the fork sandbox needs Linux")
def test_here_it_agrees_with_the_sandbox_itself() -> None:
    from agentkd.sandbox import open_sandbox

    try:
        session = open_sandbox("fork")
        works = session("1 + 1").output == 2
        session.cleanup()
    except SandboxError:
        works = False
    code, found = doctor("--only", "sandbox")
    assert (code == 0) is works is found["ok"]
    if works:
        default = next(check for check in found["checks"] if "default" in check["name"])
        assert default["state"] == "ok" and "as user" in default["says"] and "refused" in default["says"]


@pytest.mark.skipif(not LINUX or not look().landlock, reason="needs Landlock")
def test_a_path_without_bubblewrap(tmp_path: Path) -> None:
    code, found = doctor("--only", "sandbox", PATH=str(tmp_path))
    names = {check["name"]: check for check in found["checks"]}
    assert names["fork, bubblewrap"]["state"] == "missing"
    assert "install" in names["fork, bubblewrap"]["mend"]
    assert names["docker"]["state"] == "missing"
    assert (code == 0) is (names["fork, landlock (default)"]["state"] == "ok")


@pytest.mark.skipif(
    not LINUX or os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv"
)
def test_root_without_the_right_to_make_namespaces() -> None:
    code, found = doctor(
        "--only", "sandbox", before=("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all")
    )
    assert code == 5
    assert found["checks"][0]["state"] == "broken"
    assert "Namespaces" in found["checks"][0]["says"] or "namespace" in found["checks"][0]["says"]
    assert found["checks"][0]["mend"]


@pytest.mark.skipif(
    not LINUX or not look().bwrap or look().namespaces != "", reason="needs bubblewrap that works"
)
def test_a_user_whose_namespaces_are_used_up() -> None:
    shut = (
        "bwrap",
        "--dev-bind",
        "/",
        "/",
        "--unshare-user",
        "--disable-userns",
        "--cap-drop",
        "ALL",
        "--uid",
        "1000",
        "--",
    )
    if subprocess.run([*shut, "true"], capture_output=True).returncode:
        pytest.skip("this bubblewrap cannot switch user namespaces off")
    code, found = doctor("--only", "sandbox", before=shut)
    assert code == 5
    namespaces = next(check for check in found["checks"] if check["name"] == "namespaces")
    assert "limit" in namespaces["says"] and "max_user_namespaces" in remedy(
        GOOD._replace(namespaces=namespaces["says"])
    )


def test_extras_come_from_what_is_installed() -> None:
    found = examine(only=("extra", "python"))
    names = {check.name: check for check in found.checks}
    assert "vllm" in names or names["agentkd"].state == "missing"
    for check in found.checks:
        assert check.state == "ok" or check.mend.startswith("pip install")


class Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        wrong = self.path.startswith("/wrong")
        data = b"<html>" if wrong else json.dumps({"data": [{"id": "teacher"}]}).encode()
        locked = self.path.startswith("/locked")
        self.send_response(401 if locked else 200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [("/v1", 0, "teacher"), ("/wrong", 4, "must end in /v1"), ("/locked", 4, "401")],
)
def test_an_endpoint_is_asked_for_its_models(server: str, path: str, code: int, said: str) -> None:
    found = examine(server + path, only=("endpoint",))
    assert found.exit_code == code
    assert said in found.checks[0].says


def test_an_endpoint_that_is_not_there() -> None:
    for url in ("http://127.0.0.1:9/v1", "not a url", "http://[bad"):
        found = examine(url, only=("endpoint",))
        assert found.exit_code == 4 and found.checks[0].mend
