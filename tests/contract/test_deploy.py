"""The deployment examples: valid by their schemas, with commands that ``agentkd serve`` takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from agentkd.cli import app

DEPLOY = Path(__file__).resolve().parents[2] / "examples" / "deploy"


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))


def compose() -> dict[str, Any]:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def docker_commands() -> dict[str, list[str]]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    found = re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)
    return {name: json.loads(value) for name, value in found}


def deployment() -> dict[str, Any]:
    (found,) = [it for it in manifests() if it["kind"] == "Deployment"]
    return found


def container() -> dict[str, Any]:
    (found,) = deployment()["spec"]["template"]["spec"]["containers"]
    return found  # type: ignore[no-any-return]


def options(arguments: list[str]) -> dict[str, Any]:
    """As ``agentkd serve`` reads them."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    with command.make_context("serve", list(arguments)) as context:
        return dict(context.params)


MANIFESTS = [
    ("Deployment", "agentkd"),
    ("Service", "agentkd"),
    ("PersistentVolumeClaim", "agentkd-student"),
    ("PersistentVolumeClaim", "agentkd-models"),
    ("PodDisruptionBudget", "agentkd"),
    ("NetworkPolicy", "agentkd"),
]


def test_no_manifest_is_left_out() -> None:
    assert [(it["kind"], it["metadata"]["name"]) for it in manifests()] == MANIFESTS


@pytest.mark.parametrize(("kind", "name"), MANIFESTS)
def test_the_manifests_are_valid(kind: str, name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    (manifest,) = [it for it in manifests() if (it["kind"], it["metadata"]["name"]) == (kind, name)]
    for version in ("1.29", validator.latest_version()):
        validator.validate(manifest, version, strict=True)
    spoilt = {**manifest, "spec": {**manifest["spec"], "replicaz": 3}}
    with pytest.raises(validator.ValidationError):
        validator.validate(spoilt, "1.29", strict=True)


def test_the_compose_file_is_valid() -> None:
    specification = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    plain = text.replace("${STUDENT:?the folder of the student}", "/student")
    plain = plain.replace("${TOKENS:-./tokens.txt}", "./tokens.txt")
    read = specification.PyCompose.from_yaml(plain)
    read.validate()
    assert read.service_names() == ["agentkd"]
    with pytest.raises(ValueError):
        specification.PyCompose.from_yaml(plain.replace("cap_drop", "cap_dropp"))
    with pytest.raises(ValueError):
        specification.PyCompose.from_yaml(plain.replace("      - tokens", "      - other")).validate()


def test_the_commands_are_ones_that_serve_takes() -> None:
    commands = docker_commands()
    assert commands["ENTRYPOINT"] == ["agentkd", "serve"]
    for arguments in (commands["CMD"], compose()["services"]["agentkd"]["command"], container()["args"]):
        read = options(arguments)
        assert read["what"] == ["/student"]
        assert (read["host"], read["port"], read["engine"]) == ("0.0.0.0", 8000, "vllm")
    assert options(container()["args"])["token_file"] == Path("/run/agentkd/tokens.txt")


def test_there_is_time_to_drain() -> None:
    spec = deployment()["spec"]["template"]["spec"]
    pause = float(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = options(container()["args"])["drain_seconds"]
    assert spec["terminationGracePeriodSeconds"] > pause + drain
    service = compose()["services"]["agentkd"]
    assert float(service["stop_grace_period"].rstrip("s")) > options(service["command"])["drain_seconds"]


def test_replicas_stand_behind_one_service() -> None:
    (service,) = [it for it in manifests() if it["kind"] == "Service"]
    labels = deployment()["spec"]["template"]["metadata"]["labels"]
    assert deployment()["spec"]["replicas"] > 1
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"][0]["targetPort"] in {it["name"] for it in container()["ports"]}
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container())
    volumes = {it["name"] for it in deployment()["spec"]["template"]["spec"]["volumes"]}
    assert {it["name"] for it in container()["volumeMounts"]} == volumes


def test_the_base_model_is_there_where_nothing_can_be_fetched() -> None:
    (policy,) = [it for it in manifests() if it["kind"] == "NetworkPolicy"]
    assert "Egress" in policy["spec"]["policyTypes"] and not policy["spec"].get("egress"), "nothing goes out"
    home = re.search(r"HF_HOME=(\S+)", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    assert home is not None
    (mount,) = [it for it in container()["volumeMounts"] if it["mountPath"] == home[1]]
    (volume,) = [
        it for it in deployment()["spec"]["template"]["spec"]["volumes"] if it["name"] == mount["name"]
    ]
    assert volume["persistentVolumeClaim"]["claimName"] in {name for _, name in MANIFESTS}
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container()["env"]
