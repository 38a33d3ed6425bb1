"""The files in deploy/ for Kubernetes, Envoy, systemd and compose: whether what reads them takes them."""

import configparser
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bilm_server.checking import memory_sum
from bilm_server.config import ServerConfig
from bilm_server.config_sources import load_config
from bilm_server.preflight import plan_serving
from grpc_health.v1 import health_pb2

from tests.fault.balancer_support import HAPROXY_CONFIG, ROOT, program
from tests.integration.integration_support import health_stub
from tests.support.servers import LoopServer, serving

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes" / "bilm-serve.yaml"
ENVOY = DEPLOY / "envoy" / "envoy.yaml"
SYSTEMD = DEPLOY / "systemd" / "bilm-serve@.service"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
COMPOSE_GPU = DEPLOY / "compose" / "compose.gpu.yaml"
KUBERNETES_GPU = DEPLOY / "kubernetes" / "gpu-patch.yaml"
SERVING = health_pb2.HealthCheckResponse.SERVING


def said(*command: str | Path) -> str:
    """What a checker wrote; fails with it if it doesn't take the file."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_choices(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    """The configuration that a server reads from these variables; fails for one that it doesn't know."""
    known = {f"BILM_{name.upper()}" for name in ServerConfig.model_fields}
    assert {name for name in environment if name.startswith("BILM_")} <= known
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_config([])


# ---- HAProxy ----


def test_haproxy_takes_its_configuration_without_a_warning() -> None:
    assert "WARNING" not in said(program("haproxy"), "-c", "-f", HAPROXY_CONFIG)


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Type, flags, stream and payload of HTTP/2 frames."""
    found = []
    while data:
        length, rest = int.from_bytes(data[:3], "big"), data[9:]
        found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), rest[:length]))
        assert len(rest) >= length
        data = rest[length:]
    return found


def test_the_bytes_of_haproxys_check_are_what_the_comments_say() -> None:
    sent = bytes.fromhex("".join(re.findall(r"tcp-check send-binary (\w+)", HAPROXY_CONFIG.read_text())))
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert sent.startswith(preface)
    settings, acknowledged, *calls = frames(sent.removeprefix(preface))
    assert (settings, acknowledged) == ((4, 0, 0, b""), (4, 1, 0, b""))
    for stream, service in ((1, "inference"), (3, "")):
        (head, data), calls = calls[:2], calls[2:]
        message = health_pb2.HealthCheckRequest(service=service).SerializeToString()
        assert data == (0, 1, stream, b"\0" + len(message).to_bytes(4, "big") + message)
        assert head[:3] == (1, 4, stream)
        assert b"\x04\x1c/grpc.health.v1.Health/Check" in head[3]
    assert calls == []


# ---- Kubernetes ----


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """The objects of the file, by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(KUBERNETES.read_text())}


@pytest.fixture
def container(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    [container] = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


TYPES = {"Deployment": "V1Deployment", "Service": "V1Service", "PodDisruptionBudget": "V1PodDisruptionBudget"}


@pytest.mark.parametrize("kind", TYPES)
def test_kubernetes_objects_have_known_fields_of_the_right_types(objects: dict[str, dict[str, Any]], kind: str) -> None:
    models = pytest.importorskip("kubernetes.client.models", reason="needs the package kubernetes")
    check_object(objects[kind], TYPES[kind], models, kind)


def check_object(found: Any, type_name: str, models: Any, where: str) -> None:
    """Fails for a field that the API's model of the type hasn't, or a value of another type."""
    if type_name.startswith("List["):
        assert isinstance(found, list), where
        for index, item in enumerate(found):
            check_object(item, type_name[5:-1], models, f"{where}[{index}]")
    elif type_name.startswith("Dict["):
        assert isinstance(found, dict), where
        for key, value in found.items():
            assert isinstance(key, str), where
            check_object(value, type_name.partition(", ")[2][:-1], models, f"{where}.{key}")
    elif (model := getattr(models, type_name, None)) is not None:
        names = {json_name: name for name, json_name in model.attribute_map.items()}
        assert set(found) <= set(names), f"{where}: {set(found) - set(names)}"
        for json_name, value in found.items():
            check_object(value, model.openapi_types[names[json_name]], models, f"{where}.{json_name}")
        model(**{names[key]: value for key, value in found.items()})  # says what is missing
    else:
        types: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "object": (int, str)}
        assert isinstance(found, types[type_name]), f"{where}: {found!r} is no {type_name}"


def test_kubernetes_labels_select_what_they_should(objects: dict[str, dict[str, Any]]) -> None:
    template = objects["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert objects[kind]["spec"]["selector"]["matchLabels"].items() <= labels
    assert objects["Service"]["spec"]["selector"].items() <= labels
    [container] = template["spec"]["containers"]
    ports = {each["name"] for each in container["ports"]}
    assert {each["targetPort"] for each in objects["Service"]["spec"]["ports"]} <= ports


def test_kubernetes_waits_as_long_as_a_drain_takes(
    objects: dict[str, dict[str, Any]], container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check_choices({each["name"]: each["value"] for each in container["env"]}, monkeypatch)
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > config.drain_delay_s + config.grace_s
    probe = container["readinessProbe"]  # callers stop coming before they are refused
    assert probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"] < config.drain_delay_s


def test_kubernetes_gives_it_the_memory_that_it_may_take(
    objects: dict[str, dict[str, Any]], container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check_choices({each["name"]: each["value"] for each in container["env"]}, monkeypatch)
    needed = memory_sum(config, [*plan_serving(config).models.values()], config.max_connections).total
    kernels, limit = (
        int(value.removesuffix("Mi")) * 2**20
        for value in (
            objects["Deployment"]["spec"]["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"],
            container["resources"]["limits"]["memory"],
        )
    )
    assert needed + kernels <= limit <= 1.2 * (needed + kernels)


def test_kubernetes_runs_it_as_nobody(objects: dict[str, dict[str, Any]], container: dict[str, Any]) -> None:
    pod = objects["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert (pod["runAsNonRoot"], pod["runAsUser"], pod["runAsGroup"]) == (True, int(user[1]), int(user[2]))
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}


def test_the_patch_for_gpus_has_known_fields_and_settings(
    container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("kubernetes.client.models", reason="needs the package kubernetes")
    pod = yaml.safe_load(KUBERNETES_GPU.read_text())["spec"]["template"]["spec"]
    check_object(pod, "V1PodSpec", models, "pod")
    [patch] = pod["containers"]
    assert patch["name"] == container["name"]  # by which the two are merged
    config = check_choices({each["name"]: each["value"] for each in patch["env"]}, monkeypatch)
    assert (config.device, config.require_kernels) == ("cuda", True)
    assert {each["name"] for each in patch["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


@pytest.fixture(scope="module")
def server() -> Iterator[LoopServer]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_kubernetes_probes_are_answered_by_a_server(container: dict[str, Any], server: LoopServer, probe: str) -> None:
    """The call that the kubelet makes, without credentials, with the name that the file gives."""
    wanted = container[probe]
    request = health_pb2.HealthCheckRequest(service=wanted["grpc"]["service"])
    answer = health_stub(server.channel()).Check(request, timeout=wanted["timeoutSeconds"])
    assert answer.status == SERVING
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["BILM_HEALTH_LISTEN"].endswith(f":{wanted['grpc']['port']}")


# ---- Envoy ----


def test_envoy_takes_its_configuration() -> None:
    envoy = program("envoy")
    assert f"configuration '{ENVOY}' OK" in said(envoy, "--mode", "validate", "-c", ENVOY)


# ---- systemd ----


class _Unit(configparser.ConfigParser):
    def optionxform(self, optionstr: str) -> str:
        return optionstr


@pytest.fixture
def unit() -> configparser.ConfigParser:
    unit = _Unit(interpolation=None)
    unit.read_string(SYSTEMD.read_text())
    return unit


def test_systemd_takes_the_unit(tmp_path: Path, unit: configparser.ConfigParser) -> None:
    analyze = program("systemd-analyze")
    program_path = shlex.split(unit["Service"]["ExecStart"])[0]
    assert Path(program_path).name == "bilm-serve"
    instance = tmp_path / "bilm-serve@1.service"
    instance.write_text(SYSTEMD.read_text().replace(program_path, "/bin/true"))  # verify wants it to be there
    assert said(analyze, "verify", "--man=no", instance) == ""


def test_systemd_waits_as_long_as_a_drain_takes(unit: configparser.ConfigParser) -> None:
    service, config = unit["Service"], load_config([])
    assert int(service["TimeoutStopSec"]) > config.drain_delay_s + config.grace_s
    assert (service["Restart"], service["KillSignal"]) == ("on-failure", "SIGTERM")


# ---- compose ----


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert isinstance(services, dict)
    return services


def test_compose_takes_the_file() -> None:
    assert said(program("docker-compose"), "-f", COMPOSE, "config", "--quiet") == ""


def test_compose_takes_the_file_for_gpus_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = yaml.safe_load(said(program("docker-compose"), "-f", COMPOSE, "-f", COMPOSE_GPU, "config"))
    for name in ("replica1", "replica2"):
        replica = found["services"][name]
        config = check_choices(replica["environment"], monkeypatch)
        assert (config.device, config.require_kernels) == ("cuda", True)
        cache = str(config.kernel_cache)
        folders = [each.split(":")[0] for each in replica["tmpfs"]]
        assert "/tmp" in folders
        assert any(cache.startswith(f"{folder}/") for folder in folders)
        assert replica["read_only"]


def test_compose_mounts_what_is_there(services: dict[str, dict[str, Any]]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    for source in (mount.split(":")[0] for mount in mounts if mount.startswith(".")):
        assert (COMPOSE.parent / source).exists(), source


def test_composes_haproxy_finds_the_replicas(services: dict[str, dict[str, Any]]) -> None:
    environment = services["haproxy"]["environment"]
    for number in (1, 2):
        replica = services[f"replica{number}"]
        address = replica["networks"]["bilm"]["ipv4_address"]
        port = replica["environment"]["BILM_LISTEN"].rpartition(":")[2]
        health_port = replica["environment"]["BILM_HEALTH_LISTEN"].rpartition(":")[2]
        assert environment[f"BILM_REPLICA_{number}"] == f"{address}:{port}"
        assert environment[f"BILM_REPLICA_{number}_HEALTH_PORT"] == health_port
    used = set(re.findall(r"\$\{(BILM_\w+)-", HAPROXY_CONFIG.read_text()))
    assert set(environment) <= used


def test_composes_replicas_are_hardened_and_drain(
    services: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = services["replica1"]
    config = check_choices(replica["environment"], monkeypatch)
    assert int(replica["stop_grace_period"].removesuffix("s")) > config.drain_delay_s + config.grace_s
    assert (replica["read_only"], replica["cap_drop"]) == (True, ["ALL"])
