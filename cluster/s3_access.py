"""How S3 is reached: one resolver for boto3 and pyarrow, from the job file and the AWS settings.

pyarrow.fs reads other variables than boto3 (it ignores AWS_ENDPOINT_URL_S3, for one), so that
left to themselves the two may end up in different stores. Both get what `resolve` found.
"""

from __future__ import annotations

import configparser
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

import boto3.session
import botocore.awsrequest
import botocore.config
import botocore.exceptions
import botocore.loaders
import botocore.session
import botocore.utils

from cluster.storage import Transfer
from jobs.errors import Problem, SpecError
from jobs.spec import StoreAccess

if TYPE_CHECKING:
    import pyarrow.fs
    from mypy_boto3_s3.client import S3Client

DEFAULT_REGION = "us-east-1"
AddressingStyle = Literal["auto", "path", "virtual"]

_REQUESTS_PER_ATTEMPT = 1
"""Requests that botocore makes for one attempt of ours. It would repeat one at once, whatever
pause the server has asked for."""
_ARROW_ATTEMPTS = 8
_TRUE_WORDS = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Keys:
    """A pair of keys; never shown."""

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)


@dataclass(frozen=True)
class S3Settings:
    """Everything that a client needs but the credentials, which are looked up where it is made."""

    endpoint_url: str | None
    """None: AWS itself."""
    region: str | None
    """None: not set anywhere; AWS_REGION's absence is harmless for own endpoints."""
    profile: str | None
    """Profile named in the job file; None leaves the choice to AWS_PROFILE."""
    anonymous: bool
    addressing_style: AddressingStyle
    """`auto` is left only for AWS itself: virtual hosts, but for bucket names with dots."""
    ca_bundle: str | None
    server_side_encryption: str | None
    kms_key_id: str | None
    conditional_writes: bool
    """False: the server does not know them; see StoreAccess."""
    transfer: Transfer

    @property
    def is_loopback(self) -> bool:
        """Whether the endpoint is on this machine, where no proxy could reach it."""
        host = urlsplit(self.endpoint_url or "").hostname or ""
        return host in ("localhost", "::1") or host.startswith("127.")

    @property
    def encryption(self) -> dict[str, Any]:
        """Arguments of the writing requests that ask for encryption."""
        arguments: dict[str, Any] = {}
        if self.server_side_encryption is not None:
            arguments["ServerSideEncryption"] = self.server_side_encryption
        if self.kms_key_id is not None:
            arguments["SSEKMSKeyId"] = self.kms_key_id
        return arguments


def resolve(access: StoreAccess, *, transfer: Transfer | None = None) -> S3Settings:
    """The settings of one store; what `access` leaves open comes from variables and profiles.

    Reads the environment and the AWS configuration files, and sends nothing. Raises SpecError
    for a profile or file that does not exist, and for an endpoint that is no plain URL.
    """
    session = botocore.session.Session(profile=access.profile)
    profile = _profile_settings(session)
    s3_section = profile.get("s3")
    s3_settings: Mapping[str, Any] = s3_section if isinstance(s3_section, Mapping) else {}
    endpoint_url = access.endpoint_url or _configured_endpoint(session, profile)
    if endpoint_url is not None:
        _check_endpoint(endpoint_url)
    if access.kms_key_id and access.server_side_encryption not in ("aws:kms", "aws:kms:dsse"):
        raise SpecError(
            Problem(
                "access.kms_key_id has no effect without a KMS encryption",
                "set access.server_side_encryption to aws:kms",
            )
        )
    return S3Settings(
        endpoint_url=endpoint_url,
        region=access.region
        or os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or profile.get("region"),
        profile=access.profile,
        anonymous=access.anonymous,
        addressing_style=_addressing_style(
            access.addressing_style,
            configured=s3_settings.get("addressing_style"),
            own_endpoint=endpoint_url is not None,
        ),
        ca_bundle=_existing_bundle(
            access.ca_bundle or os.environ.get("AWS_CA_BUNDLE") or profile.get("ca_bundle")
        ),
        server_side_encryption=access.server_side_encryption,
        kms_key_id=access.kms_key_id,
        conditional_writes=access.conditional_writes,
        transfer=transfer or Transfer(),
    )


def make_session(settings: S3Settings, *, keys: Keys | None = None) -> boto3.session.Session:
    """A session of the settings' profile; its credentials are looked up, and renewed, by it.

    `keys` take the place of all looking up.
    """
    own = botocore.session.get_session()
    if settings.profile is not None:
        own.set_config_variable("profile", settings.profile)
    own.register_component("data_loader", _service_models(own.get_config_variable("data_path")))
    return boto3.session.Session(
        aws_access_key_id=keys.access_key if keys else None,
        aws_secret_access_key=keys.secret_key if keys else None,
        region_name=settings.region or DEFAULT_REGION,
        botocore_session=own,
    )


@functools.cache
def _service_models(data_path: str | None) -> botocore.loaders.Loader:
    """What botocore knows of its services; to parse it takes most of the time to make a client."""
    return botocore.loaders.create_loader(data_path)


def make_client(session: boto3.session.Session, settings: S3Settings) -> S3Client:
    """A thread-safe client. May ask a metadata service for credentials, but not the store."""
    transfer = settings.transfer
    options: dict[str, Any] = {
        "s3": {"addressing_style": settings.addressing_style},
        "connect_timeout": transfer.connect_timeout_seconds,
        "read_timeout": transfer.read_timeout_seconds,
        "max_pool_connections": transfer.max_connections,
        "tcp_keepalive": True,
        "retries": {"mode": "standard", "total_max_attempts": _REQUESTS_PER_ATTEMPT},
        # `resolve` has looked at them; looking twice could find two endpoints.
        "ignore_configured_endpoint_urls": True,
    }
    if settings.is_loopback:
        options["proxies"] = {}
    if settings.anonymous:
        options["signature_version"] = botocore.UNSIGNED
    client = session.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        verify=settings.ca_bundle,
        config=botocore.config.Config(**options),
    )
    client.meta.events.register("before-sign.s3.UploadPart", _sign_without_body)
    return client


def _sign_without_body(request: botocore.awsrequest.AWSRequest, **_: object) -> None:
    """Signs a part by its headers alone, one of which is the checksum of its bytes.

    botocore would do so over TLS where the checksum were its own; else it takes a SHA-256 of each
    part, which costs as much as sending it. A checkpoint's parts have theirs in its manifest.
    """
    held = request.context["client_config"]
    unsigned = botocore.config.Config(s3=cast(Any, {**held.s3, "payload_signing_enabled": False}))
    request.context["client_config"] = held.merge(unsigned)


def make_filesystem(
    session: boto3.session.Session, client: S3Client, settings: S3Settings, *, region: str
) -> pyarrow.fs.S3FileSystem:
    """The same store for pyarrow, with the session's credentials of this moment."""
    import pyarrow.fs

    url = urlsplit(settings.endpoint_url or client.meta.endpoint_url)
    # pyarrow takes virtual hosts for AWS and paths for any endpoint that it is given.
    own_host = settings.endpoint_url is not None or settings.addressing_style == "path"
    arguments: dict[str, Any] = {
        "scheme": url.scheme,
        "endpoint_override": url.netloc + url.path.rstrip("/") if own_host else None,
        "region": region,
        "force_virtual_addressing": settings.addressing_style == "virtual",
        "tls_ca_file_path": settings.ca_bundle,
        "connect_timeout": settings.transfer.connect_timeout_seconds,
        "request_timeout": settings.transfer.read_timeout_seconds,
        "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_ARROW_ATTEMPTS),
        "proxy_options": None
        if settings.is_loopback
        else botocore.utils.get_environ_proxies(url.geturl()).get(url.scheme),
    }
    if settings.anonymous:
        return pyarrow.fs.S3FileSystem(anonymous=True, **arguments)
    credentials = session.get_credentials()
    if credentials is None:
        raise botocore.exceptions.NoCredentialsError
    keys = credentials.get_frozen_credentials()
    return pyarrow.fs.S3FileSystem(
        access_key=keys.access_key,
        secret_key=keys.secret_key,
        session_token=keys.token,
        **arguments,
    )


def _profile_settings(session: botocore.session.Session) -> Mapping[str, Any]:
    """The settings of the profile in force; empty where no file names it."""
    try:
        return session.get_scoped_config()
    except botocore.exceptions.ProfileNotFound as error:
        name = session.get_config_variable("profile")
        known = ", ".join(sorted(session.available_profiles)) or "none"
        raise SpecError(
            Problem(
                f"there is no AWS profile {name}; the configuration files have: {known}",
                f"set access.profile or AWS_PROFILE to one of them, or run: "
                f"aws configure --profile {name}",
            )
        ) from error
    except (botocore.exceptions.ConfigParseError, configparser.Error) as error:
        raise SpecError(
            Problem(
                "the AWS configuration files cannot be read",
                "look at ~/.aws/config and ~/.aws/credentials, or at the files that "
                "AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE name",
            )
        ) from error


def _configured_endpoint(
    session: botocore.session.Session, profile: Mapping[str, Any]
) -> str | None:
    """The endpoint in the documented order: variable for S3, variable for all, profile's service
    section, profile.

    Source: AWS SDKs and Tools Reference Guide, "Service-specific endpoints".
    """
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS") or profile.get(
        "ignore_configured_endpoint_urls", ""
    )
    if str(ignored).lower() in _TRUE_WORDS:
        return None
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    section = services.get("s3")
    candidates = (
        os.environ.get("AWS_ENDPOINT_URL_S3"),
        os.environ.get("AWS_ENDPOINT_URL"),
        section.get("endpoint_url") if isinstance(section, Mapping) else None,
        profile.get("endpoint_url"),
    )
    return next((url for url in candidates if url), None)


def _check_endpoint(url: str) -> None:
    """SpecError unless http(s) and free of secrets; the URL is shown only where it has none."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SpecError(
            Problem(
                f"the endpoint URL of {parts.netloc.rpartition('@')[2]} has a user or password",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead",
            )
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise SpecError(
            Problem(
                f"the endpoint URL {url.partition('?')[0]} is no plain http:// or https:// URL",
                "set access.endpoint_url or AWS_ENDPOINT_URL_S3 to one, such as "
                "http://127.0.0.1:8333",
            )
        )


def _addressing_style(
    asked: AddressingStyle, *, configured: object, own_endpoint: bool
) -> AddressingStyle:
    """How the bucket gets into the URL: as asked, as the profile says, or by the endpoint."""
    if asked != "auto":
        return asked
    if configured == "path" or configured == "virtual":
        return configured
    return "path" if own_endpoint else "auto"


def _existing_bundle(path: str | None) -> str | None:
    """The file of authorities as an absolute path; SpecError where there is none."""
    if not path:
        return None
    bundle = Path(path).expanduser().absolute()
    if not bundle.exists():
        raise SpecError(
            Problem(
                f"the file of certificate authorities {path} does not exist",
                "correct access.ca_bundle or AWS_CA_BUNDLE, or remove it for the system's own",
            )
        )
    return str(bundle)
