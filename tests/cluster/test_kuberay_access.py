"""How a Kubernetes cluster is reached, and what is told of all that it refuses."""

from __future__ import annotations

import base64
import http.server
import json
import logging
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import kuberay_config
from cluster.kuberay import KubeRay
from cluster.kuberay_errors import KubernetesError
from jobs.errors import EnvironmentFault, ShoalError, SpecError, render_error
from tests.kubernetes_api.manifests import rayjob
from tests.kubernetes_api.schemas import RAYJOB
from tests.kubernetes_api.server import TOKEN, KubernetesApi

NAME = "sentiment-1"
GET = "GET .*rayjobs/sentiment-1"
PATCH = "PATCH .*rayjobs"


@pytest.fixture
def kuberay(api: KubernetesApi) -> KubeRay:
    return KubeRay.of("default", context=None, patience_seconds=4.0)


def refused(kuberay: KubeRay, **changes: Any) -> KubernetesError:
    """What applying a RayJob fails with."""
    manifest = rayjob()
    manifest["spec"].update(changes)
    with pytest.raises(KubernetesError) as error:
        kuberay.apply(manifest)
    return error.value


def text(error: ShoalError) -> str:
    return render_error(error)


# ---------------------------------------------------------------------------- what the API refuses


def test_wrong_credentials(api: KubernetesApi, kuberay: KubeRay) -> None:
    api.users.clear()
    error = refused(kuberay)
    assert (error.code, error.exit_code) == (401, 3)
    assert "does not accept the credentials" in text(error)
    assert "kubectl auth whoami" in text(error)
    # Once more with credentials that were read anew, and not again and again.
    assert len(api.requests) == 2


@pytest.mark.parametrize("verb", ["get", "patch", "create"])
def test_a_missing_right_is_named_with_how_to_ask_for_it(
    api: KubernetesApi, kuberay: KubeRay, verb: str
) -> None:
    api.forbidden.add((verb, "rayjobs"))
    told = text(refused(kuberay))
    assert f"you have no right to {verb} rayjobs.ray.io in the namespace default" in told
    rule = f'apiGroups: ["ray.io"], resources: ["rayjobs"], verbs: ["{verb}"]'
    assert rule in told
    assert f"kubectl auth can-i {verb} rayjobs.ray.io --namespace default" in told


def test_a_rule_of_the_cluster_is_no_missing_right(api: KubernetesApi, kuberay: KubeRay) -> None:
    message = 'admission webhook "rules.example.com" denied the request: no image tag'
    api.fail(on=PATCH, code=403, reason="Forbidden", message=message)
    told = text(refused(kuberay))
    assert message in told
    assert "ask its administrator" in told
    assert "apiGroups" not in told


def test_a_cluster_without_kuberay(api: KubernetesApi, kuberay: KubeRay) -> None:
    api.kinds.remove(RAYJOB)
    error = refused(kuberay)
    assert error.reason == "KubeRayMissing"
    assert "KubeRay is not installed there" in text(error)
    assert "helm install kuberay-operator" in text(error)


def test_a_namespace_that_is_not_there(api: KubernetesApi) -> None:
    kuberay = KubeRay.of("nowhere", context=None)
    told = text(refused(kuberay))
    assert "there is no namespace nowhere" in told
    assert "cluster.namespace" in told


def test_a_field_that_somebody_else_has(api: KubernetesApi, kuberay: KubeRay) -> None:
    applied = rayjob()
    api.objects.create(RAYJOB, "default", applied, manager="kubectl-edit")
    changed = rayjob()
    changed["spec"]["backoffLimit"] = 9
    with pytest.raises(KubernetesError) as error:
        # As for a RayJob that comes between the look and the apply.
        kuberay._ray(
            "PATCH",
            "patch",
            NAME,
            query={"fieldManager": "shoal", "fieldValidation": "Strict"},
            body=changed,
            content_type="application/apply-patch+yaml",
        )
    assert error.value.code == 409
    told = text(error.value)
    assert '.spec.backoffLimit (conflict with "kubectl-edit" using ray.io/v1)' in told
    assert "--show-managed-fields" in told


def test_wrong_values_are_told_with_their_fields(kuberay: KubeRay) -> None:
    error = refused(kuberay, backoffLimit="two")
    assert (error.code, error.exit_code) == (422, 2)
    assert "spec.backoffLimit: Invalid value: 'two' is not of type 'integer'" in text(error)


def test_a_name_that_is_not_allowed(api: KubernetesApi, kuberay: KubeRay) -> None:
    manifest = rayjob()
    manifest["metadata"]["name"] = "Sentiment_1"
    with pytest.raises(KubernetesError) as error:
        kuberay.apply(manifest)
    assert "metadata.name" in text(error.value)


def test_a_kuberay_that_is_too_old_for_a_field(api: KubernetesApi, kuberay: KubeRay) -> None:
    error = refused(kuberay, preWarmSeconds=3)
    assert error.code == 500
    told = text(error)
    assert "its definition of RayJob has no .spec.preWarmSeconds" in told
    assert "kubectl apply --server-side -k" in told
    # It is no fault that passes.
    assert sum(a.method == "PATCH" for a in api.requests) == 1


def test_an_answer_that_is_not_of_kubernetes_is_not_shown(
    api: KubernetesApi, kuberay: KubeRay
) -> None:
    api.fail(on=GET, code=407, body=b"<html>Proxy login for jane:secret-page</html>")
    told = text(refused(kuberay))
    assert "407" in told
    assert "secret-page" not in told
    api.fail(on=GET, code=200, body=b"<html>welcome</html>")
    assert "did not answer with JSON" in text(refused(kuberay))


# --------------------------------------------------------------------------------- faults that pass


PASSING: dict[str, dict[str, Any]] = {
    "too many requests": {"code": 429, "reason": "TooManyRequests", "retry_after": 1},
    "an error inside": {"code": 500, "reason": "InternalError", "message": "etcd: leader changed"},
    "a proxy without a server": {"code": 503, "body": b"<html>no backend</html>"},
    "a connection that is cut": {},
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
@pytest.mark.parametrize("on", [GET, PATCH], ids=["get", "apply"])
def test_what_passes_is_tried_again(
    api: KubernetesApi, kuberay: KubeRay, fault: dict[str, Any], on: str
) -> None:
    api.fail(on=on, **fault)
    assert kuberay.apply(rayjob()).seen.name == NAME
    assert len(api.objects.list(RAYJOB, "default")) == 1


def test_the_time_that_the_api_asks_for_is_waited_or_not_borne(api: KubernetesApi) -> None:
    kuberay = KubeRay.of("default", context=None, patience_seconds=4.0)
    api.fail(on=GET, code=429, reason="TooManyRequests", retry_after=30)
    with pytest.raises(KubernetesError) as error:
        kuberay.get(NAME)
    assert error.value.retry_after_seconds == 30
    assert len(api.requests) == 1, "it was asked again before the time"


def test_an_answer_that_is_lost_leaves_one_rayjob(api: KubernetesApi) -> None:
    """The API makes the RayJob, and its answer comes too late: the next try finds what is there."""
    kuberay = KubeRay.of("default", context=None, patience_seconds=4.0, answer_seconds=0.3)
    api.fail(on=PATCH, seconds=0.6)
    assert kuberay.apply(rayjob()).seen.name == NAME
    assert len(api.objects.list(RAYJOB, "default")) == 1


def test_an_api_that_is_away_for_a_while_is_waited_for_aloud(api: KubernetesApi) -> None:
    said: list[str] = []
    kuberay = KubeRay.of("default", context=None, patience_seconds=10.0, tell=said.append)
    api.go_away()
    timer = threading.Timer(1.5, api.start)
    timer.start()
    assert kuberay.apply(rayjob()).is_new
    timer.join()
    (sentence,) = said
    assert "Connection refused" in sentence
    assert "trying again for 10 s" in sentence


def test_an_api_that_stays_away_is_given_up(api: KubernetesApi) -> None:
    kuberay = KubeRay.of("default", context=None, patience_seconds=0.6)
    api.go_away()
    error = refused(kuberay)
    assert error.exit_code == 3
    assert "does not answer: [Errno 111] Connection refused" in text(error)


def test_who_only_looks_does_not_wait(api: KubernetesApi) -> None:
    kuberay = KubeRay.of("default", context=None, patience_seconds=0.0, answer_seconds=0.2)
    api.fail(on=GET, seconds=1.0)
    with pytest.raises(KubernetesError):
        kuberay.get(NAME)
    assert len(api.requests) == 1


def test_a_name_that_nobody_knows_is_not_waited_for(
    api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    tree["clusters"][0]["cluster"]["server"] = "http://kubernetes.invalid"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(tree))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    kuberay = KubeRay.of("default", context=None, patience_seconds=60.0)
    with pytest.raises(KubernetesError) as error:
        kuberay.get(NAME)
    assert "kubernetes.invalid" in text(error.value)


# ------------------------------------------------------------------------------- which cluster


def test_a_context_is_taken_from_the_option_or_the_variable(
    api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KubeRay.of("default", context=None).server == api.url
    assert KubeRay.of("default", context="elsewhere").server == "http://127.0.0.1:9"
    monkeypatch.setenv("SHOAL_CONTEXT", "elsewhere")
    assert KubeRay.of("default", context=None).server == "http://127.0.0.1:9"
    assert KubeRay.of("default", context="here").server == api.url


def test_a_context_that_is_not_there(api: KubernetesApi) -> None:
    with pytest.raises(SpecError) as error:
        KubeRay.of("default", context="production")
    assert "has no context production; it has here, elsewhere" in text(error.value)


def test_several_files_are_one_configuration(
    api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").write_text("apiVersion: v1\nkind: Config\ncurrent-context: here\n")
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'empty'}:{tmp_path / 'kubeconfig'}:/nowhere")
    assert KubeRay.of("default", context=None).server == api.url


def test_nothing_says_how_to_reach_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(EnvironmentFault) as error:
        KubeRay.of("default", context=None)
    assert "KUBECONFIG is not set" in text(error.value)
    assert "shoal render RUN | kubectl apply -f -" in text(error.value)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(EnvironmentFault) as error:
        KubeRay.of("default", context=None)
    assert "no such file is there" in text(error.value)


WRONG: dict[str, str] = {
    "no YAML": "{[canary-in-text",
    "no current context": "apiVersion: v1\nkind: Config\n",
    "another form": "current-context: a\ncontexts: canary\nclusters: 3\n",
    "no cluster of the context": yaml.safe_dump(
        {
            "current-context": "a",
            "contexts": [{"name": "a", "context": {"cluster": "b", "user": "u"}}],
            "clusters": [],
            "users": [{"name": "u", "user": {"token": "canary-token"}}],
        }
    ),
    "a key that is missing inside a user": yaml.safe_dump(
        {
            "current-context": "a",
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "u"}}],
            "clusters": [{"name": "a", "cluster": {"server": "https://127.0.0.1:1"}}],
            "users": [
                {
                    "name": "u",
                    "user": {
                        "auth-provider": {
                            "name": "oidc",
                            "config": {"client-secret": "canary-oidc"},
                        }
                    },
                }
            ],
        }
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_kubeconfig_that_is_wrong_is_told_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    (tmp_path / "kubeconfig").write_text(wrong)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(EnvironmentFault) as error:
        KubeRay.of("default", context=None)
    assert str(tmp_path / "kubeconfig") in text(error.value)
    assert "canary" not in text(error.value)


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.delitem(sys.modules, "kubernetes.client", raising=False)
    with pytest.raises(EnvironmentFault) as error:
        KubeRay.of("default", context=None)
    assert 'pip install "shoal[kubernetes]"' in text(error.value)
    assert "kubectl apply -f -" in text(error.value)


def test_a_pod_has_the_account_of_its_own(
    api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    host, port = api.url.removeprefix("http://").split(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    with pytest.raises(EnvironmentFault) as error:
        KubeRay.of("default", context=None)
    assert "the account of this pod is not usable" in text(error.value)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ca.crt").write_text("a certificate")
    assert KubeRay.of("default", context=None).server == f"https://{host}:{port}"


# ------------------------------------------------------------------------------------- credentials


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A program that gives the tokens of a file, one a call, the last again and again."""
    program = tmp_path / "plugin"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        f"tokens = {str(tmp_path / 'tokens')!r}\n"
        "now, *later = open(tokens).read().split()\n"
        "open(tokens, 'w').write(' '.join(later or [now]))\n"
        "if now == 'broken':\n"
        "    print('session of jane has expired', file=sys.stderr); sys.exit(1)\n"
        "token, _, end = now.partition('@')\n"
        "status = {'token': token} | ({'expirationTimestamp': end} if end else {})\n"
        "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', "
        "'kind': 'ExecCredential', 'status': status}))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def use_plugin(api: KubernetesApi, plugin: Path, *tokens: str) -> KubeRay:
    (plugin.parent / "tokens").write_text(" ".join(tokens))
    exec_ = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}
    api.write_kubeconfig(plugin.parent / "kubeconfig", exec=exec_)
    return KubeRay.of("default", context=None)


def test_a_token_that_has_expired_is_made_anew(api: KubernetesApi, plugin: Path) -> None:
    kuberay = use_plugin(
        api, plugin, f"{TOKEN}@2020-01-01T00:00:00Z", f"{TOKEN}@2099-01-01T00:00:00Z"
    )
    assert kuberay.get(NAME) is None


def test_a_token_that_is_refused_is_made_anew_once(api: KubernetesApi, plugin: Path) -> None:
    kuberay = use_plugin(api, plugin, "revoked-token-of-jane", TOKEN)
    assert kuberay.get(NAME) is None
    given = [a.headers["authorization"] for a in api.requests]
    assert given == ["Bearer revoked-token-of-jane", f"Bearer {TOKEN}"]


def test_a_plugin_that_fails_is_told_and_prints_nothing(
    api: KubernetesApi,
    plugin: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(EnvironmentFault) as error:
        use_plugin(api, plugin, "broken")
    assert "session of jane has expired" in text(error.value)
    assert "log in to the cluster again" in text(error.value)
    shown = capsys.readouterr()
    assert shown.out + shown.err + caplog.text == ""


# ------------------------------------------------------------------------------------------ proxies


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Refuses what comes, and remembers it."""

    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Proxy-Authorization")))
        self.send_response(502)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        return None


@pytest.fixture
def proxy() -> Iterator[http.server.ThreadingHTTPServer]:
    handler = type("Proxy", (_Proxy,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("by", ["kubeconfig", "environment"])
def test_a_proxy_is_used(
    api: KubernetesApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proxy: http.server.ThreadingHTTPServer,
    by: str,
) -> None:
    url = f"http://127.0.0.1:{proxy.server_address[1]}"
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    if by == "environment":
        monkeypatch.setenv("HTTP_PROXY", url)
    else:
        tree = yaml.safe_load((tmp_path / "kubeconfig").read_text())
        tree["clusters"][0]["cluster"]["proxy-url"] = url
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(tree))
    kuberay = KubeRay.of("default", context=None, patience_seconds=0.0)
    with pytest.raises(KubernetesError) as error:
        kuberay.get(NAME)
    assert "it answered 502" in text(error.value)
    ((path, _),) = proxy.RequestHandlerClass.seen  # type: ignore[attr-defined]
    assert path.startswith(api.url)
    assert api.requests == []


def test_a_host_can_be_kept_from_the_proxy(
    api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert KubeRay.of("default", context=None).get(NAME) is None


# ----------------------------------------------------------------------------------------- canaries

CANARY = "canary-7d1f"


def canary_kubeconfigs(api: KubernetesApi, path: Path) -> Iterator[dict[str, Any]]:
    """Configurations with a secret in every place that one may be in."""
    key = base64.b64encode(f"{CANARY}-key".encode()).decode()
    yield {"token": f"{CANARY}-token"}
    yield {"username": "jane", "password": f"{CANARY}-password"}
    yield {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": "/nonexistent/plugin",
            "env": [{"name": "PLUGIN_SECRET", "value": f"{CANARY}-env"}],
        }
    }
    yield {
        "auth-provider": {
            "name": "oidc",
            "config": {
                "id-token": f"{CANARY}.id.token",
                "refresh-token": f"{CANARY}-refresh",
                "client-secret": f"{CANARY}-client",
            },
        }
    }
    yield {"client-certificate-data": key, "client-key-data": key, "token": f"{CANARY}-both"}


def test_no_secret_is_ever_told(
    api: KubernetesApi,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An API that tells all that it was given, in each kind of refusal, and a proxy with a
    password: errors, logs and outputs hold none of it."""
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    faults: list[dict[str, Any]] = [
        {"code": code, "reason": "X", "message": "you sent {authorization}"}
        for code in (400, 401, 403, 404, 409, 410, 422, 429, 500, 503)
    ]
    faults += [{"code": 502, "body": b"{authorization}"}, {"code": 200, "body": b"{authorization}"}]
    faults += [{}]
    tried = 0
    for user in canary_kubeconfigs(api, tmp_path):
        api.write_kubeconfig(tmp_path / "kubeconfig", **user)
        tree = yaml.safe_load((tmp_path / "kubeconfig").read_text())
        for proxy_url in (None, f"http://jane:{CANARY}-proxy@127.0.0.1:9"):
            if proxy_url is not None:
                tree["clusters"][0]["cluster"]["proxy-url"] = proxy_url
                (tmp_path / "kubeconfig").write_text(yaml.safe_dump(tree))
            for fault in faults:
                tried += _try(api, fault, told)
    shown = capfd.readouterr()
    everything = "\n".join([*told, shown.out, shown.err, caplog.text])
    assert CANARY not in everything
    assert base64.b64encode(CANARY.encode()).decode()[:10] not in everything
    assert "***" in everything, "nothing was sent back that had to be taken out"
    assert len(told) >= tried > 50


def _try(api: KubernetesApi, fault: dict[str, Any], told: list[str]) -> int:
    """One attempt under a fault that sends back what it was sent; 1."""
    api.echoes = True
    api.fail(on="", times=3, **fault)
    try:
        kuberay = KubeRay.of(
            "default", context=None, patience_seconds=0.0, answer_seconds=1.0, tell=told.append
        )
        told.append(repr(kuberay.get(NAME)))
    except ShoalError as error:
        told += [text(error), repr(error), json.dumps([str(p) for p in error.problems])]
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        told.append(repr(cause))
    api.forget_faults()
    return 1


def test_secrets_are_found_wherever_a_user_has_them() -> None:
    tree = {"users": [{"name": "jane", "user": {"a": [{"value": "deep-secret"}], "n": None}}]}
    assert list(kuberay_config._secrets(tree)) == ["deep-secret"]
