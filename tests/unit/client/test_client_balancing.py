"""Addresses of several servers, and the service config that spreads calls over them."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_bench.settings import load_settings as load_bench_settings
from bilm_client import AsyncClient, Client, RetryPolicy
from bilm_client._core.balancing import as_target, each_target, service_config
from bilm_client._core.settings import Settings
from bilm_client.batch.settings import load_settings
from bilm_client.cli.settings_sources import UsageError
from bilm_client.policy import Balance

SEVERAL = "10.0.0.1:50051,10.0.0.2:50051"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("localhost:50051", "localhost:50051"),
        ("unix:/a/path", "unix:/a/path"),
        ("dns:///bilm-serve:50051", "dns:///bilm-serve:50051"),
        (f"ipv4:{SEVERAL}", f"ipv4:{SEVERAL}"),
        (SEVERAL, f"ipv4:{SEVERAL}"),
        ("10.0.0.1:50051, 10.0.0.2:50051", f"ipv4:{SEVERAL}"),
        (["10.0.0.1:50051", "10.0.0.2:50051"], f"ipv4:{SEVERAL}"),
        (("[::1]:1", "[2001:DB8::2]:2"), "ipv6:[::1]:1,[2001:db8::2]:2"),
        (["[::1]:1", "10.0.0.2:2"], "ipv6:[::1]:1,[::ffff:10.0.0.2]:2"),
        (["bilm-serve:50051"], "bilm-serve:50051"),
    ],
)
def test_targets(target: Any, expected: str) -> None:
    assert as_target(target) == expected
    assert as_target(expected) == expected


@pytest.mark.parametrize(
    "bad",
    ["bilm-1:50051", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:+1", "::1:1", "unix:/a", ""],
)
def test_an_address_that_a_list_can_not_have_is_named(bad: str) -> None:
    for target in (["10.0.0.1:1", bad], f"10.0.0.1:1,{bad}"):
        with pytest.raises(ValueError, match="expected IPV4:PORT or") as error:
            Client(target)
        assert repr(bad) in str(error.value)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("dns:///bilm-serve:50051", ["dns:///bilm-serve:50051"]),
        ("unix:/a,b", ["unix:/a,b"]),
        (f"ipv4:{SEVERAL}", ["ipv4:10.0.0.1:50051", "ipv4:10.0.0.2:50051"]),
        ("ipv6:[::1]:1,[2001:db8::2]:2", ["ipv6:[::1]:1", "ipv6:[2001:db8::2]:2"]),
    ],
)
def test_each_server_of_a_target(target: str, expected: list[str]) -> None:
    assert each_target(target) == expected


@pytest.mark.parametrize("target", [7, None, ["10.0.0.1:1", 7], b"10.0.0.1:1"])
def test_a_target_of_another_type(target: Any) -> None:
    with pytest.raises(TypeError, match="target must be a str or a sequence of str"):
        AsyncClient(target)


def test_an_empty_list() -> None:
    with pytest.raises(ValueError, match="empty list"):
        Client([])


def test_an_unknown_way_to_balance() -> None:
    with pytest.raises(ValueError, match="balance must be 'first', 'round_robin' or 'weighted', got 'random'"):
        Client("localhost:1", balance="random")  # type: ignore[arg-type]


@pytest.mark.parametrize(("balance", "policy"), [("round_robin", "round_robin"), ("weighted", "weighted_round_robin")])
def test_balancing_keeps_the_retry_policy_and_watches_readiness(balance: Balance, policy: str) -> None:
    config = json.loads(service_config(RetryPolicy(max_attempts=3), balance))
    ((name, _),) = config["loadBalancingConfig"][0].items()
    assert name == policy
    assert config["healthCheckConfig"] == {"serviceName": ""}
    assert config["methodConfig"][0]["retryPolicy"]["maxAttempts"] == 3


def test_the_first_server_is_left_to_the_channel_options() -> None:
    config = json.loads(service_config(RetryPolicy(), "first"))
    assert not {"loadBalancingConfig", "healthCheckConfig"} & set(config)


def test_a_service_config_of_the_caller_replaces_the_fields_that_it_has() -> None:
    own: dict[str, Any] = {"loadBalancingConfig": [{"ring_hash_experimental": {}}]}
    settings = Settings(target="a:1", balance="weighted", channel_options=[("grpc.service_config", json.dumps(own))])
    config = json.loads(dict(settings.channel_arguments())["grpc.service_config"])
    assert config["loadBalancingConfig"] == own["loadBalancingConfig"]
    assert config["methodConfig"] == json.loads(RetryPolicy().service_config())["methodConfig"]


@pytest.mark.parametrize("given", ["{", "[]", 7])
def test_a_service_config_that_is_none_is_refused_at_once(given: Any) -> None:
    with pytest.raises(ValueError, match=r"grpc\.service_config must be a JSON object"):
        Client("localhost:1", channel_options=[("grpc.service_config", given)])


def test_a_list_needs_a_name_for_tls() -> None:
    tls = grpc.ssl_channel_credentials()
    with pytest.raises(ValueError, match=r"a list without a name \(expected a DNS name"):
        Client(SEVERAL, credentials=tls)
    for key in ("grpc.default_authority", "grpc.ssl_target_name_override"):
        Client(SEVERAL, credentials=tls, channel_options=[(key, "bilm.example.org")]).close()
    Client("dns:///bilm-serve:50051", credentials=tls, balance="weighted").close()


def test_the_commands_take_lists(tmp_path: Path) -> None:
    (text := tmp_path / "text").write_text("a\n", encoding="utf-8")
    flags = ["--target", SEVERAL, "--balance", "weighted"]
    embed, bench = [str(text), str(tmp_path / "out.npz")], ["--text", str(text)]
    for settings in (load_settings([*embed, *flags]), load_bench_settings([*bench, *flags])):
        assert (settings.target, settings.balance) == (f"ipv4:{SEVERAL}", "weighted")
        assert settings.credentials() == (None, None)
    with pytest.raises(UsageError, match="target: .*a list without a name"):
        load_settings([*embed, *flags, "--tls"]).credentials()
    with pytest.raises(UsageError, match="target: .*expected IPV4:PORT"):
        load_settings([*embed, "--target", "bilm-1:1,bilm-2:1"])
