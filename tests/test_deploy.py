"""deploy/: the Kubernetes manifests, and the files for Prometheus and Grafana."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import numpy as np
import pytest
import yaml

import service
from bench import record
from service import config
from tests.balancers import balancing
from tests.engines import FakeRunner
from tests.local import FakeServer, locally
from tests.servers import PATIENCE, ROOT, Json, ServerProcess, eventually, needs, serving, settings_of, write_npy

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


def read(path: Path) -> Any:
    """A YAML or JSON file."""
    return yaml.safe_load(path.read_text())


# Kubernetes: the manifests that kustomize builds.

Builds = tuple[str, ...]
LARGE = ("sd", "sdxl")
ON_GPUS = ("gpu", "sd-gpu", "sdxl-gpu")
BUILDS: list[Builds] = [
    ("base",),
    ("gpu",),
    ("base", "own-weights"),
    ("gpu", "own-weights", "public"),
    ("sd",),
    ("sd-gpu", "public"),
    ("sdxl", "public"),
    ("sdxl-gpu",),
]


def build(folder: str, *components: str) -> dict[str, Json]:
    """The manifests of a folder with components, by kind. Implements the kustomize features that our files use."""
    kustomization = read(KUBERNETES / folder / "kustomization.yaml")
    manifests: dict[str, Json] = {}
    for name in kustomization["resources"]:
        path = KUBERNETES / folder / name
        if path.is_dir():
            manifests |= build(path.resolve().name)
        else:
            manifest = read(path)
            assert manifest["kind"] not in manifests
            manifests[manifest["kind"]] = manifest
    own = (os.path.relpath(KUBERNETES / folder / name, KUBERNETES) for name in kustomization.get("components", []))
    layers = [read(KUBERNETES / name / "kustomization.yaml") for name in (*own, folder, *components)]
    for layer in layers:
        assert layer.keys() <= {"apiVersion", "kind", "resources", "components", "images", "patches"}
        for patch in layer.get("patches", []):
            manifest = manifests[patch["target"]["kind"]]
            assert manifest["metadata"]["name"] == patch["target"]["name"]
            for operation in yaml.safe_load(patch["patch"]):
                apply(manifest, **operation)
        for image in layer.get("images", []):
            container = container_of(manifests)
            assert container["image"].partition(":")[0] == image["name"]
            container["image"] = f"{image['name']}:{image['newTag']}"
    return manifests


def apply(document: Any, op: str, path: str, value: object = None) -> None:
    """Apply an RFC 6902 operation."""
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:])
    for part in parents:
        document = document[int(part) if isinstance(document, list) else part]
    if op == "test":
        assert document[last] == value
    elif op == "remove":
        document.pop(int(last) if isinstance(document, list) else last)
    elif op == "add" and isinstance(document, list):
        assert last == "-"
        document.append(value)
    else:
        assert op == "add" or (op == "replace" and last in document)
        document[last] = value


def pod_of(manifests: dict[str, Json]) -> Json:
    pod: Json = manifests["Deployment"]["spec"]["template"]["spec"]
    return pod


def container_of(manifests: dict[str, Json]) -> Json:
    [container] = pod_of(manifests)["containers"]
    assert isinstance(container, dict)
    return container


@pytest.fixture(params=BUILDS, ids="+".join)
def manifests(request: pytest.FixtureRequest) -> dict[str, Json]:
    return build(*request.param)


@pytest.fixture
def settings(manifests: dict[str, Json], monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    """The program's settings in the pod."""
    env = container_of(manifests)["env"]
    return settings_of({variable["name"]: variable.get("value", "a-secret") for variable in env}, monkeypatch)


@pytest.mark.slow
@needs("kubectl")
@pytest.mark.parametrize("names", BUILDS, ids="+".join)
def test_kustomize_builds_the_same(names: Builds, tmp_path: Path) -> None:
    base, *components = (os.path.relpath(KUBERNETES / name, tmp_path) for name in names)  # they must be relative
    (tmp_path / "kustomization.yaml").write_text(json.dumps({"resources": [base], "components": components}))
    built = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, check=True, text=True).stdout
    assert {manifest["kind"]: manifest for manifest in yaml.safe_load_all(built)} == build(*names)


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_field(manifests: dict[str, Json], version: str) -> None:
    assert manifests.keys() == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_manifests_mean_the_same_pods(manifests: dict[str, Json]) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    [spread] = pod_of(manifests)["topologySpreadConstraints"]
    selectors = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ]
    assert selectors == [labels] * 4
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": manifests["Deployment"]["apiVersion"],
        "kind": "Deployment",
        "name": manifests["Deployment"]["metadata"]["name"],
    }
    assert "replicas" not in manifests["Deployment"]["spec"]  # the autoscaler sets them


def test_the_image_is_this_version(manifests: dict[str, Json], request: pytest.FixtureRequest) -> None:
    kind = "cuda" if request.node.callspec.params["manifests"][0] in ON_GPUS else "cpu"
    assert container_of(manifests)["image"] == f"stepwise:{service.__version__}-{kind}"


def test_a_pod_is_not_killed_before_it_has_finished(manifests: dict[str, Json], settings: config.Settings) -> None:
    before_sigterm = container_of(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    left = pod_of(manifests)["terminationGracePeriodSeconds"] - before_sigterm - settings.drain_timeout
    assert before_sigterm > 0
    assert left >= 10  # for the last pass and for sending answers


def probes(manifests: dict[str, Json]) -> dict[str, Json]:
    container = container_of(manifests)
    return {name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}


def test_probes_are_answered_as_they_mean_it(manifests: dict[str, Json], server: ServerProcess) -> None:
    """While the model loads, and when it is ready."""
    paths = {name: probe["httpGet"]["path"] for name, probe in probes(manifests).items()}
    assert {server.client.get(path).status_code for path in paths.values()} == {200}
    runner = FakeRunner({1: 1.0})
    runner.hold()
    with locally(loading := FakeServer(runner)):
        runner.next_pass()
        codes = {name: loading.client.get(path).status_code for name, path in paths.items()}
    assert codes == {"startup": 503, "liveness": 200, "readiness": 503}


def test_probes_leave_the_server_the_time_to_end_a_hang_itself(manifests: dict[str, Json]) -> None:
    """All probes are answered at once, whatever a pass takes. A start may take long."""
    startup, liveness, readiness = probes(manifests).values()
    for probe in (startup, liveness, readiness):
        assert 1 < probe["timeoutSeconds"] <= probe["periodSeconds"] + 1
    allowed = startup["periodSeconds"] * startup["failureThreshold"]
    assert allowed >= 600
    assert manifests["Deployment"]["spec"]["progressDeadlineSeconds"] > allowed


def test_ports_are_the_programs(manifests: dict[str, Json], settings: config.Settings) -> None:
    http, metrics = container_of(manifests)["ports"]
    assert http["containerPort"] == settings.port
    assert metrics["containerPort"] == settings.metrics_port
    [exposed] = manifests["Service"]["spec"]["ports"]  # without the port for metrics
    assert {exposed["targetPort"], *(probe["httpGet"]["port"] for probe in probes(manifests).values())} == {
        http["name"]
    }


def test_metrics_are_where_prometheus_looks(manifests: dict[str, Json]) -> None:
    annotations = manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(container_of(manifests)["ports"][1]["containerPort"])
    with locally(server := FakeServer(metrics_port=0, api_keys="alpha")):
        url = f"{server.metrics_url}{annotations['prometheus.io/path']}"
        assert "stepwise_images_total" in httpx.get(url, trust_env=False).text


def test_a_pod_without_its_secret_does_not_start() -> None:
    """With a wrongly named Secret, the server was once open to the public."""
    for base in ("base", "gpu"):
        [keys] = [e for e in container_of(build(base))["env"] if e["name"] == "STEPWISE_API_KEYS"]
        assert keys["valueFrom"]["secretKeyRef"] == {"name": "stepwise", "key": "api-keys"}  # not `optional`
        assert not [e for e in container_of(build(base, "public"))["env"] if "KEY" in e["name"]]


def test_kubernetes_sets_no_settings(manifests: dict[str, Json]) -> None:
    """For a Service named stepwise, pods get STEPWISE_PORT=tcp://10.96.0.1:8000, which is not a port."""
    assert f"{manifests['Service']['metadata']['name'].upper()}_PORT" == f"{config.PREFIX}PORT"
    assert pod_of(manifests)["enableServiceLinks"] is False


def test_the_pod_is_restricted(manifests: dict[str, Json]) -> None:
    """As the Pod Security Standards require. The file system is read-only, too."""
    pod, container = pod_of(manifests), container_of(manifests)
    uid = pod["securityContext"]["runAsUser"]
    assert f"--uid {uid} " in (ROOT / "Dockerfile").read_text()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"}
    for volume in pod["volumes"]:
        assert volume.keys() <= {"name", "emptyDir", "persistentVolumeClaim"}


def test_the_pod_can_write_where_the_program_does(manifests: dict[str, Json], settings: config.Settings) -> None:
    volumes = {volume["name"]: volume for volume in pod_of(manifests)["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container_of(manifests)["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    for path in (str(settings.cache_dir), "/tmp"):
        assert not mounts[path].get("readOnly")
        volume = volumes[mounts[path]["name"]]
        if "persistentVolumeClaim" not in volume:
            assert "sizeLimit" in volume["emptyDir"]  # without a limit it may fill the node's disk


def test_own_weights_are_read_from_their_volume() -> None:
    for names in (("base", "own-weights"), ("gpu", "own-weights"), ("sd",), ("sd-gpu",), ("sdxl",), ("sdxl-gpu",)):
        manifests = build(*names)
        [setting] = [e["value"] for e in container_of(manifests)["env"] if e["name"] == "STEPWISE_WEIGHTS"]
        [mount] = [m for m in container_of(manifests)["volumeMounts"] if setting.startswith(f"{m['mountPath']}/")]
        assert mount["readOnly"] is True
        [volume] = [v for v in pod_of(manifests)["volumes"] if v["name"] == mount["name"]]
        assert volume["persistentVolumeClaim"]["readOnly"] is True


@pytest.mark.parametrize("name", LARGE)
def test_large_weights_on_the_cpu_keep_their_cache(name: str) -> None:
    [volume] = [volume for volume in pod_of(build(name))["volumes"] if volume["name"] == "cache"]
    assert volume == {"name": "cache", "persistentVolumeClaim": {"claimName": "stepwise-cache"}}
    [unlike] = [volume for volume in pod_of(build(f"{name}-gpu"))["volumes"] if volume["name"] == "cache"]
    assert "emptyDir" in unlike  # nothing is converted for GPUs


@pytest.mark.parametrize("name", LARGE)
def test_a_large_image_on_the_cpu_has_its_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the default is needed: a single image may take that long."""
    env = {e["name"]: e.get("value", "a-secret") for e in container_of(build(name))["env"]}
    settings = settings_of(env, monkeypatch)
    assert settings.timeout > config.Settings.model_fields["timeout"].default
    assert settings.timeout > settings.drain_timeout > config.Settings.model_fields["drain_timeout"].default
    [metric] = build(name)["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert 2 < float(metric["pods"]["target"]["averageValue"]) < settings.timeout


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("sd", "SD 1.5, Stepwise, first start, 512x512"),
        ("sdxl", "SDXL base, Stepwise, first start, 1024x1024"),
    ],
)
def test_a_pod_has_a_quarter_more_memory_than_a_first_start_took(name: str, start: str) -> None:
    peak = record.read("text").tables["start"].cell(start, "peak, GB")
    if not peak:
        pytest.skip("not measured")
    limit = container_of(build(name))["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    assert int(limit.removesuffix("Gi")) * 2**30 >= 1.25 * 1e9 * float(peak)


@pytest.mark.parametrize("name", ["base", *LARGE])
def test_a_pod_on_the_cpu_has_its_cores_for_itself(name: str) -> None:
    manifests = build(name)
    resources = container_of(manifests)["resources"]
    assert resources["requests"] == resources["limits"]
    assert re.fullmatch(r"\d+", resources["limits"]["cpu"])  # whole cores: half a core would throttle a thread
    assert manifests["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_pod_on_a_gpu_has_one_and_an_update_needs_none_that_is_free(name: str) -> None:
    manifests = build(name)
    assert container_of(manifests)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "STEPWISE_DEVICE", "value": "cuda"} in container_of(manifests)["env"]
    assert manifests["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_the_autoscaler_reads_what_the_adapter_makes(manifests: dict[str, Json], server: ServerProcess) -> None:
    [metric] = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    [rule] = read(KUBERNETES / "prometheus-adapter.yaml")["rules"]["custom"]
    name = metric["pods"]["metric"]["name"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].partition("{")[0] == name
    assert (name, frozenset[tuple[str, str]]()) in server.metrics()


# Monitoring: files that use metrics.

DASHBOARD = read(DEPLOY / "grafana" / "dashboards" / "stepwise.json")
PANELS: list[Json] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES: list[Json] = [rule for group in read(DEPLOY / "alerts.yml")["groups"] for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """All queries to Prometheus by their source, with the variables of Grafana and the adapter filled in."""
    found = {
        f"{panel['title']}, {target['refId']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$instance", ".*")
        for panel in PANELS
        for target in panel["targets"]
    }
    [rule] = read(KUBERNETES / "prometheus-adapter.yaml")["rules"]["custom"]
    found["the adapter"] = (
        rule["metricsQuery"]
        .replace("<<.Series>>", rule["name"]["as"])
        .replace("<<.LabelMatchers>>", 'namespace="test",pod=~"stepwise-1|stepwise-2"')
        .replace("<<.GroupBy>>", "pod")
    )
    assert not [text for text in found.values() if "$" in text or "<<" in text]
    return found


@pytest.fixture(scope="module")
def monitored() -> Iterator[ServerProcess]:
    """A server with all metrics, including those of decoding."""
    with serving(WEIGHTS="emoji", MAX_BATCH=2) as server:
        yield server


def ask_for_images(server: ServerProcess) -> None:
    """Send requests that fill the metrics of each endpoint."""
    latents = np.zeros(server.client.get("/info").json()["latent_shape"], np.float32)
    image = {"image": write_npy(latents)}
    assert server.client.get("/health/ready").status_code == 200
    assert server.client.post("/sample", json={"num_images": 2, "num_inference_steps": 2}).status_code == 200
    for path in ("/denoise", "/noise"):
        assert server.client.post(path, files=image, data={"timestep": "5"}).status_code == 200


@pytest.mark.slow
@needs("promtool")
@pytest.mark.parametrize(
    "check",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_promtool_is_content(check: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *check], cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_metrics_that_are_asked_for_exist(monitored: ServerProcess) -> None:
    """Labels must exist too: a negative matcher also matches series without the label."""
    ask_for_images(monitored)
    exist = {name: {key for key, _ in labels} for name, labels in monitored.metrics()}
    asked = " ".join([*expressions().values(), *(rule["expr"] for rule in RULES)])
    assert set(re.findall(r"\b(?:stepwise|process)_\w+", asked)) <= exist.keys()
    for name, matchers in re.findall(r"\b((?:stepwise|process)_\w+)\{([^}]*)\}", asked):
        keys = set(re.findall(r'(\w+)(?:=|!=|=~|!~)"', matchers))
        assert keys <= exist[name] | {"instance", "job", "namespace", "pod"}, f"{name}{{{matchers}}}"


@pytest.mark.slow
def test_alerts_are_tested_with_metrics_that_exist(monitored: ServerProcess) -> None:
    """Labels must exist too: a rule and its test may agree on a label that no series has."""
    ask_for_images(monitored)
    samples = [(name, dict(labels)) for name, labels in monitored.metrics()]
    tests = read(DEPLOY / "alerts_test.yml")["tests"]
    for series in (series["series"] for test in tests for series in test["input_series"]):
        name, _, inner = series.partition("{")
        labels = dict(re.findall(r'(\w+)="([^"]*)"', inner))
        if name != "up":
            fixed = {key: labels[key] for key in ("reason", "outcome") if key in labels}
            assert any(
                sample == name and labels.keys() - {"instance", "job"} <= has.keys() and fixed.items() <= has.items()
                for sample, has in samples
            ), series


def test_every_alert_is_seen_to_fire() -> None:
    fired = {
        alert["alertname"]
        for test in read(DEPLOY / "alerts_test.yml")["tests"]
        for alert in test["alert_rule_test"]
        if alert.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in RULES}


def test_every_panel_says_what_it_shows() -> None:
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["legendFormat"] or target.get("format") == "table"
            assert target["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}


def test_latency_is_shown_for_every_path_that_draws(server: ServerProcess) -> None:
    """Through whichever API programs ask: latencies of all images, and of nothing that answers at once."""
    paths = server.client.get("/openapi.json").json()["paths"]
    answered_at_once = {"/sdapi/v1/interrupt", "/sdapi/v1/options"}
    drawing = {path for path, operations in paths.items() if "post" in operations} - answered_at_once
    assert {"/sample", "/noise", "/v1/images/generations", "/sdapi/v1/txt2img"} <= drawing
    shown = [re.findall(r'request_seconds_bucket{.*endpoint=~"(.*?)"', text) for text in expressions().values()]
    for [endpoints] in filter(None, shown):
        assert {path for path in paths if re.fullmatch(endpoints, path)} == drawing


def test_no_panel_hides_another() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(places, 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_grafana_knows_how_often_prometheus_looks() -> None:
    [source] = read(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert source["jsonData"]["timeInterval"] == read(DEPLOY / "prometheus.yml")["global"]["scrape_interval"]


# Monitoring: a real Prometheus that scrapes a real server, and HAProxy if it is installed.


@contextmanager
def running(*command: str | Path, log: Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, **more) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()  # has no effect on a process that has ended


@contextmanager
def haproxy(server: ServerProcess) -> Iterator[str | None]:
    """HAProxy in front of a server. Yields the address of HAProxy's metrics."""
    if shutil.which("haproxy") is None:
        yield None
        return
    host, port = server.address
    with balancing([host], port) as balancer:
        balancer.wait_until(up=1)
        yield "{}:{}".format(*balancer.metrics_address)


class Prometheus:
    """A Prometheus process that starts or runs.

    Args:
        log: of the process.
        jobs: to scrape.

    Attributes:
        now: the time of all queries in seconds; the present if None.
    """

    now: float | None = None

    def __init__(self, process: subprocess.Popen[bytes], log: Path, jobs: set[str]) -> None:
        def address() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r'msg="Listening on" address=(\S+)', log.read_text())
            return found[1] if found else None

        self._client = httpx.Client(base_url=f"http://{eventually(address)}/api/v1", timeout=PATIENCE, trust_env=False)
        self._jobs = jobs

    def get(self, path: str, **parameters: str) -> Any:
        def data() -> Any:
            response = self._client.get(path, params=parameters)
            if response.status_code == 503:  # still starting
                return None
            document = response.json()
            assert document["status"] == "success", f"{parameters}: {document}"
            return document["data"]

        return eventually(data)

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series in the result."""
        when = {} if self.now is None else {"time": repr(self.now)}
        series = self.get("/query", query=expression, **when)["result"]
        return [(one["metric"], float(one["value"][1])) for one in series]

    def look_twice(self) -> None:
        """Wait for two more scrapes of every job. The first of them may have begun before this call."""

        def looks() -> dict[str, float]:
            return {labels["job"]: number for labels, number in self.ask("sum_over_time(up[10m])")}

        before = looks()
        eventually(lambda: all(looks().get(job, 0) >= before.get(job, 0) + 2 for job in self._jobs) or None)

    def stop_the_clock(self) -> None:
        """Query at a fixed time, at which all scrapes worked. On a busy machine some scrapes fail."""
        [(_, self.now)] = eventually(lambda: self.ask("max(timestamp(up)) and min(up) == 1") or None)

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def prometheus(monitored: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus after scraping a server that draws. It has compose's configuration with other addresses and times."""
    folder = tmp_path_factory.mktemp("prometheus")
    with haproxy(monitored) as haproxy_metrics:
        targets = {"stepwise": "{}:{}".format(*monitored.address)}
        if haproxy_metrics is not None:
            targets["haproxy"] = haproxy_metrics
        whole = read(DEPLOY / "prometheus.yml")
        whole["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        whole["rule_files"] = [str(DEPLOY / name) for name in whole["rule_files"]]
        whole["scrape_configs"] = [
            {
                **{key: value for key, value in job.items() if not key.endswith("_configs")},
                "static_configs": [
                    # Labels of pods on Kubernetes.
                    {"targets": [targets[job["job_name"]]], "labels": {"namespace": "test", "pod": "stepwise-1"}}
                ],
            }
            for job in whole["scrape_configs"]
            if job["job_name"] in targets
        ]
        (folder / "prometheus.yml").write_text(json.dumps(whole))
        with running(
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            log=folder / "prometheus.log",
        ) as process:
            prometheus = Prometheus(process, folder / "prometheus.log", set(targets))
            for _ in range(2):  # the count at a series' first scrape gives no rate
                prometheus.look_twice()
                ask_for_images(monitored)
            prometheus.look_twice()
            prometheus.stop_the_clock()
            yield prometheus
            prometheus.close()


@pytest.mark.slow
@needs("prometheus")
@pytest.mark.parametrize("where", expressions())
def test_prometheus_answers_what_is_asked(prometheus: Prometheus, where: str) -> None:
    expression = expressions()[where]
    answer = prometheus.ask(expression)
    if "haproxy_" in expression and shutil.which("haproxy") is None:
        return  # valid PromQL
    assert answer
    assert all(math.isfinite(value) for _, value in answer)
    if where == "the adapter":
        assert [labels for labels, _ in answer] == [{"pod": "stepwise-1"}]
        return
    [target] = [t for panel in PANELS for t in panel["targets"] if f"{panel['title']}, {t['refId']}" == where]
    for name in re.findall(r"{{(\w+)}}", target["legendFormat"]):
        assert all(labels.get(name) for labels, _ in answer), f"no label {name} for the legend"


@pytest.mark.slow
@needs("prometheus")
def test_prometheus_counts_replicas(prometheus: Prometheus) -> None:
    for letter in "AB":  # reachable, ready
        assert prometheus.ask(expressions()[f"Replicas, {letter}"]) == [({}, 1.0)]


@pytest.mark.slow
@needs("prometheus")
def test_prometheus_can_evaluate_every_alert(prometheus: Prometheus) -> None:
    def rules() -> list[Json] | None:
        found = [rule for group in prometheus.get("/rules")["groups"] for rule in group["rules"]]
        return None if any(rule["health"] == "unknown" for rule in found) else found

    known = eventually(rules)
    assert [rule["name"] for rule in known] == [rule["alert"] for rule in RULES]
    assert {rule["health"] for rule in known} == {"ok"}, [rule.get("lastError") for rule in known]
    assert [rule["name"] for rule in known if rule["state"] == "firing"] == []
