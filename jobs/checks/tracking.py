"""Where the job's trackers send metrics, as the environment says, and whether they could."""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import urllib3

from jobs.checks.finding import (
    ENVIRONMENT_EXIT_CODE,
    Finding,
    not_checked,
    ok,
    problem,
    warning,
)
from jobs.spec import JobSpec, KubeRayCluster
from trainers.data.cache import cache_folder

PART = "tracking"
_ANSWER_SECONDS = 3.0
_WANDB_URL = "https://api.wandb.ai"
_VARIABLES = {
    "mlflow": "MLFLOW_TRACKING_URI",
    "wandb": "WANDB_API_KEY",
}


def check_tracking(spec: JobSpec, *, is_here: bool) -> Iterator[Finding]:
    """Where MLflow and W&B are, and whether they can be told of a run; `is_here`: whether the
    workers are on this machine. A server that does not answer is a warning: the run goes on."""
    checks = {"mlflow": _check_mlflow, "wandb": _check_wandb}
    for name in (name for name in checks if name in spec.tracking):
        if not is_here:
            yield _elsewhere(spec, name)
        elif importlib.util.find_spec(name) is None:
            yield problem(
                PART,
                f"tracking has {name}, but the package {name} is not installed here",
                f'run: pip install "shoal[{name}]", or remove {name} from tracking',
                exit_code=ENVIRONMENT_EXIT_CODE,
            )
        else:
            yield checks[name](spec, os.environ)


def _elsewhere(spec: JobSpec, name: str) -> Finding:
    variable, extra = _VARIABLES[name], f"shoal[{name}]"
    if isinstance(spec.cluster, KubeRayCluster):
        where, what = "the pods", f"{variable} by cluster.env_from_secrets"
    else:
        where, what = "the nodes of the Ray cluster", f"{variable} in the environment of their Ray"
    return not_checked(
        PART,
        f"whether {where} have {extra}, and reach what {variable} stands for there",
        f"install {extra} there, and give them {what}",
    )


def _check_mlflow(spec: JobSpec, environment: Mapping[str, str]) -> Finding:
    uri = environment.get("MLFLOW_TRACKING_URI")
    if not uri:
        return problem(
            PART,
            "tracking has mlflow, but MLFLOW_TRACKING_URI is not set",
            "export MLFLOW_TRACKING_URI=http://HOST:5000, or remove mlflow from tracking",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
    experiment = environment.get("MLFLOW_EXPERIMENT_NAME") or spec.name
    shown = re.sub(r"//[^/@]*@", "//***@", uri)
    why = _does_not_answer(uri) if uri.startswith(("http://", "https://")) else None
    if why is not None:
        return warning(
            PART,
            f"MLflow at {shown} does not answer: {why}; runs go on without it",
            "see that it runs, and that MLFLOW_TRACKING_URI is right",
        )
    return ok(PART, f"MLflow at {shown}, experiment {experiment}")


def _does_not_answer(uri: str) -> str | None:
    """Why a server is not reached; any answer is one, as that of a proxy that wants a password."""
    with urllib3.PoolManager(timeout=_ANSWER_SECONDS, retries=False) as http:
        try:
            answer = http.request("GET", uri.rstrip("/") + "/health", redirect=False)
        except urllib3.exceptions.HTTPError as error:
            return re.sub(r"^<[^>]*>: |^[^:]*object at 0x[^:]*: ", "", str(error))
    return f"HTTP status {answer.status}" if answer.status >= 500 else None


def _check_wandb(spec: JobSpec, environment: Mapping[str, str]) -> Finding:
    mode = environment.get("WANDB_MODE", "online")
    project = environment.get("WANDB_PROJECT") or spec.name
    if mode == "disabled":
        return warning(PART, "tracking has wandb, but WANDB_MODE is disabled", "unset WANDB_MODE")
    if mode in ("offline", "dryrun"):
        folder = Path(environment.get("WANDB_DIR") or cache_folder()) / "wandb"
        return ok(PART, f"W&B offline: {folder}, project {project}; send it with: wandb sync")
    url = environment.get("WANDB_BASE_URL") or _WANDB_URL
    if not _has_key(url, environment):
        return warning(
            PART,
            f"there is no key for W&B at {url}, so that it will take nothing",
            "export WANDB_API_KEY, run: wandb login, or set WANDB_MODE=offline",
        )
    entity = environment.get("WANDB_ENTITY")
    return ok(PART, f"W&B at {url}, project {f'{entity}/' if entity else ''}{project}")


def _has_key(url: str, environment: Mapping[str, str]) -> bool:
    """Whether W&B will find a key, which `wandb login` puts into the file netrc."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return (
            netrc.netrc(environment.get("NETRC")).authenticators(urlsplit(url).netloc) is not None
        )
    except (OSError, netrc.NetrcParseError):
        return False
