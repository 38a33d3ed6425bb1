"""Prometheus' files, the dashboard and the pages about them: held against what is exported, and run by Prometheus."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bilm_server.errors import Code
from bilm_server.observability.call_record import CallRecord
from bilm_server.observability.metrics import Metrics
from bilm_server.observability.resources import Gpu
from bilm_server.observability.server_metrics import NO_DROPS, EngineView, ServerCollector, ServerView, Taken
from bilm_server.protocols.http import names as http
from bilm_server.protocols.kserve import methods as kserve
from bilm_server.protocols.ops.metrics_endpoint import MetricsExporter

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = (PROMETHEUS / "rules.yml").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "bilm-serve.json").read_text(encoding="utf-8"))
ALERTS = re.findall(r"^ *- alert: (\w+)$", RULES, flags=re.MULTILINE)

PANELS = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}


class FakeNvml:
    """There is no GPU here, but its metrics belong to the dashboard, too."""

    NVMLError = RuntimeError

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any:  # noqa: N802
        return type("Memory", (), {"used": 10, "total": 100})

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any:  # noqa: N802
        return type("Rates", (), {"gpu": 35})


def new_metrics(serving: Callable[[], bool] = lambda: True) -> Metrics:
    room = Taken(1, 10, 1, 10, 1)
    engine = EngineView(
        model={"name": "tiny", "version": "abc", "precision": "float32", "backend": "cpu", "tokenizer": "moses-en"},
        kernel_paths=lambda: {"products": "prepacked", "elementwise": "fused"},
        fallbacks=lambda: {"results": 2},
        max_rows=128,
        stalled_s=lambda: 0.0,
        rows=lambda: 3,
        waiting_sentences=lambda: 5,
        waiting_by_priority=lambda: {"interactive": 5, "batch": 0},
        rows_by_priority=lambda: {"interactive": 3, "batch": 0},
        cache=lambda: (70, 30),
        ticks=lambda: 11,
    )
    view = ServerView(
        engines=lambda: [engine],
        max_connections=lambda: 900,
        serving=serving,
        admitted=lambda: {"unary": room, "stream": room},
        drops=NO_DROPS,
        no_log_calls=lambda: {"team-a": 1},
        spans_failed=lambda: 0,
        gpu=lambda: Gpu(FakeNvml(), None),
    )
    metrics = Metrics(["tiny"])
    metrics.registry.register(ServerCollector(view))
    return metrics


def serve_a_call(metrics: Metrics, code: Code, reason: str = "") -> None:
    call = CallRecord("Embed", "ipv4:127.0.0.1:4711", model="tiny", code=code, reason=reason, duration_s=0.1)
    metrics.begin(call)
    if code is Code.OK:
        call.computed(tokens=7, queue_s=0.01, inference_s=0.05)
    metrics.end(call)
    metrics.round("tiny", 3)


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Labels by the name of every sample."""
    metrics = new_metrics()
    serve_a_call(metrics, Code.RESOURCE_EXHAUSTED, "OVERLOADED")
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:bilm|process)_[a-z_]+", text))


# ---- what one file says of another ----


def test_every_metric_of_the_rules_and_their_tests_is_exported(exported: dict[str, set[str]]) -> None:
    tests = (PROMETHEUS / "rules_test.yml").read_text(encoding="utf-8")
    for text in (RULES, tests):
        assert names_in(text) - set(exported) == set()
        assert names_in(text)


@pytest.mark.parametrize("title", PANELS)
def test_every_metric_and_label_of_the_dashboard_is_exported(exported: dict[str, set[str]], title: str) -> None:
    for expression in PANELS[title]:
        found = re.findall(r"(\w+)\{([^}]*)\}", expression)
        assert names_in(expression) == {name for name, _ in found} != set()
        for name, matchers in found:
            labels = set(re.findall(r"(\w+)=", matchers))
            assert labels - {"job", "instance"} <= exported[name]
        for grouping in re.findall(r"by \(([^)]*)\)", expression):
            labels = {label.strip() for label in grouping.split(",")} - {"instance"}
            assert all(labels <= exported[name] for name, _ in found)


def test_the_panels_of_embedding_calls_have_those_of_all_protocols() -> None:
    asked = {found for panel in PANELS.values() for text in panel for found in re.findall(r'method=~?"([^"]*)"', text)}
    assert {tuple(sorted(each.split("|"))) for each in asked} == {
        tuple(sorted(("Embed", kserve.INFER_METHOD, *http.INFER_METHODS)))
    }


def test_panels_have_titles_of_their_own() -> None:
    assert len(PANELS) == len(DASHBOARD["panels"])
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)


def test_the_page_lists_every_metric_with_its_labels() -> None:
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8").partition("## Logs")[0]
    listed: dict[str, tuple[str, str]] = {}
    for names, kind, labels in re.findall(r"^\| (`[^|]*) \| (\w+) \|([^|]*)\|", page, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            listed[name] = (kind, ", ".join(sorted(re.findall(r"`(\w+)`", labels))))
    expected = {}
    metrics = new_metrics()
    serve_a_call(metrics, Code.RESOURCE_EXHAUSTED, "OVERLOADED")
    for family in metrics.registry.collect():
        suffix, kind = {"counter": ("_total", "counter"), "info": ("_info", "gauge")}.get(
            family.type, ("", family.type)
        )
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        expected[family.name + suffix] = (kind, ", ".join(sorted(labels)))
    assert listed == expected


def test_every_alert_is_in_the_runbook_and_the_other_way_round() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert list(sections) == ALERTS
    for section in sections.values():
        assert re.findall(r"^\*\*(\w+)\.\*\*", section, flags=re.MULTILINE) == ["Meaning", "Check", "Fix"]
    assert re.findall(r"runbook: docs/runbook.md#(\w+)", RULES) == [alert.lower() for alert in ALERTS]


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = (PROMETHEUS / "rules_test.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"alertname: (\w+)\n +exp_alerts:\n", tests)) == set(ALERTS)
    assert set(re.findall(r"alertname: (\w+)\n +exp_alerts: \[\]", tests)) == set(ALERTS)


# ---- what the real programs say ----


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs the program {name} (Debian's package prometheus)")
    return path


def run(*command: str) -> None:
    found = subprocess.run(command, check=False, cwd=PROMETHEUS, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr


def test_promtool_accepts_the_files_and_the_rules_pass_their_tests() -> None:
    promtool = program("promtool")
    run(promtool, "check", "config", "prometheus.yml")
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", "rules.yml")
    run(promtool, "test", "rules", "rules_test.yml")


class Prometheus:
    """The real one, on our configuration, with a replica that runs in this process."""

    def __init__(self, folder: Path, replica: str) -> None:
        config = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
        config, n_replaced = re.subn(r"targets: \[.*\]", f'targets: ["{replica}"]', config, count=1)
        assert n_replaced == 1
        config = re.sub(r"(scrape|evaluation)_interval: \d+s", r"\1_interval: 200ms", config)
        (folder / "prometheus.yml").write_text(config, encoding="utf-8")
        shutil.copy(PROMETHEUS / "rules.yml", folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._url = f"http://{address}"
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.load(response)["data"]

    def value(self, expression: str) -> float | None:
        """Of an expression with one result; None: it has none yet."""
        found = self.get("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """For what another process does in its own time."""
        deadline_s = time.monotonic() + 30
        while True:
            try:
                if condition():
                    return
            except (urllib.error.URLError, ConnectionError):
                pass  # it has not opened its port yet
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self._log.seek(0)
                pytest.fail(f"it never happened: {what}\n{self._log.read()}")
            time.sleep(0.05)


class Replica:
    """What can be scraped of a server."""

    def __init__(self) -> None:
        self.serving = True
        self.metrics = new_metrics(lambda: self.serving)
        self.exporter = MetricsExporter(self.metrics.registry, "127.0.0.1:0")
        self.exporter.open()


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    replica = Replica()
    yield replica
    replica.exporter.close()


@pytest.fixture(scope="module")
def prometheus(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program("prometheus")
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), replica.exporter.address)
    try:
        prometheus.wait(lambda: prometheus.value('up{job="bilm-serve"}') == 1, "the first scrape")
        yield prometheus
    finally:
        prometheus.stop()


@pytest.mark.slow
def test_prometheus_counts_what_the_server_counts(prometheus: Prometheus, replica: Replica) -> None:
    calls = 'bilm_requests_total{method="Embed",code="OK",model="tiny"}'
    before = prometheus.value(calls)
    assert before is not None
    for _ in range(10):
        serve_a_call(replica.metrics, Code.OK)
    prometheus.wait(
        lambda: prometheus.value(calls) == before + 10,
        "ten calls more",
    )


@pytest.mark.slow
def test_prometheus_evaluates_every_panel(prometheus: Prometheus, replica: Replica) -> None:
    for code, reason in ((Code.OK, ""), (Code.RESOURCE_EXHAUSTED, "OVERLOADED")):
        serve_a_call(replica.metrics, code, reason)
    wanted = {
        expression.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$model", ".*")
        for expressions in PANELS.values()
        for expression in expressions
    }
    prometheus.wait(lambda: all(prometheus.get("query", query=each)["result"] for each in wanted), "data everywhere")


@pytest.mark.slow
def test_prometheus_evaluates_every_rule(prometheus: Prometheus, replica: Replica) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    prometheus.wait(lambda: {rule["health"] for rule in rules()} == {"ok"}, "an evaluation")
    assert [rule["name"] for rule in rules()] == ALERTS
    replica.serving = False
    waiting = {"BilmNotServing", "BilmNoReplicaServing"}
    prometheus.wait(lambda: waiting <= {r["name"] for r in rules() if r["state"] == "pending"}, "alerts that wait")
