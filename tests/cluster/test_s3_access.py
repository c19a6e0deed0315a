"""Where endpoint, region, credentials and the rest come from; nothing here asks the network."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest
from botocore.awsrequest import AWSPreparedRequest

from cluster.s3_access import Keys, S3Settings, make_client, make_filesystem, make_session, resolve
from cluster.storage import Transfer, open_store
from jobs.errors import SpecError
from jobs.spec import StoreAccess

CONFIG = """
[default]
region = eu-north-1

[profile lake]
region = eu-west-3
endpoint_url = https://lake.example
ca_bundle = {bundle}
s3 =
  addressing_style = virtual

[profile served]
services = local
endpoint_url = https://all.example

[services local]
s3 =
  endpoint_url = https://s3.example

[profile role]
role_arn = arn:aws:iam::123456789012:role/training
source_profile = lake
"""
CREDENTIALS = """
[lake]
aws_access_key_id = lake-id
aws_secret_access_key = lake-secret
"""


class RequestIsReadyError(Exception):
    """Raised in place of sending a request; its text is the URL."""


@pytest.fixture(autouse=True)
def aws_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without AWS variables, with the files above; the bundle's path."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    (tmp_path / "config").write_text(CONFIG.format(bundle=bundle))
    (tmp_path / "credentials").write_text(CREDENTIALS)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return bundle


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection, and any look-up of a name, is an error."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_nothing_set_means_aws_itself() -> None:
    settings = resolve(StoreAccess())
    assert settings == S3Settings(
        endpoint_url=None,
        region="eu-north-1",
        profile=None,
        anonymous=False,
        addressing_style="auto",
        ca_bundle=None,
        server_side_encryption=None,
        kms_key_id=None,
        conditional_writes=True,
        transfer=Transfer(),
    )


def test_variables_are_taken_in_the_documented_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "served")
    assert resolve(StoreAccess()).endpoint_url == "https://s3.example"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all:1")
    assert resolve(StoreAccess()).endpoint_url == "http://all:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3:2")
    assert resolve(StoreAccess()).endpoint_url == "http://s3:2"
    assert resolve(StoreAccess(endpoint_url="http://job:3")).endpoint_url == "http://job:3"
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert resolve(StoreAccess()).endpoint_url is None
    monkeypatch.setenv("AWS_DEFAULT_REGION", "r1")
    assert resolve(StoreAccess()).region == "r1"
    monkeypatch.setenv("AWS_REGION", "r2")
    assert resolve(StoreAccess()).region == "r2"
    assert resolve(StoreAccess(region="r3")).region == "r3"


def test_a_profile_brings_all_that_it_holds(aws_files: Path) -> None:
    settings = resolve(StoreAccess(profile="lake"))
    assert settings.endpoint_url == "https://lake.example"
    assert settings.region == "eu-west-3"
    assert settings.addressing_style == "virtual"
    assert settings.ca_bundle == str(aws_files)
    keys = make_session(settings).get_credentials()
    assert keys is not None
    assert keys.get_frozen_credentials().access_key == "lake-id"


def test_a_profile_in_the_job_file_wins_over_keys_in_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "variable-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "variable-secret")
    for profile, expected in (("lake", "lake-id"), (None, "variable-id")):
        keys = make_session(resolve(StoreAccess(profile=profile))).get_credentials()
        assert keys is not None
        assert keys.access_key == expected


@pytest.mark.parametrize(
    ("endpoint", "style", "expected"),
    [
        (None, "auto", "auto"),
        (None, "path", "path"),
        ("http://store:1", "auto", "path"),
        ("http://store:1", "virtual", "virtual"),
    ],
)
def test_own_endpoints_are_spoken_to_in_path_style_unless_told(
    endpoint: str | None, style: str, expected: str
) -> None:
    access = StoreAccess.model_validate({"endpoint_url": endpoint, "addressing_style": style})
    assert resolve(access).addressing_style == expected


@pytest.mark.parametrize(
    ("access", "url"),
    [
        ({}, "https://bucket.s3.eu-north-1.amazonaws.com/a/k"),
        ({"addressing_style": "path"}, "https://s3.eu-north-1.amazonaws.com/bucket/a/k"),
        ({"endpoint_url": "http://store:1"}, "http://store:1/bucket/a/k"),
        (
            {"endpoint_url": "http://store:1", "addressing_style": "virtual"},
            "http://bucket.store:1/a/k",
        ),
    ],
)
def test_the_client_asks_the_url_that_was_resolved(
    offline: None, access: dict[str, str], url: str
) -> None:
    settings = resolve(StoreAccess.model_validate({**access, "anonymous": True}))
    client = make_client(make_session(settings), settings)

    def stop(request: AWSPreparedRequest, **_: object) -> None:
        raise RequestIsReadyError(request.url)

    client.meta.events.register("before-send.s3.GetObject", stop)
    with pytest.raises(RequestIsReadyError) as caught:
        client.get_object(Bucket="bucket", Key="a/k")
    assert str(caught.value) == url


def test_pyarrow_gets_what_boto3_gets(
    offline: None, monkeypatch: pytest.MonkeyPatch, aws_files: Path
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr("pyarrow.fs.S3FileSystem", lambda **options: asked.update(options))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(aws_files))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.example:9000/base")
    settings = resolve(StoreAccess(region="r1"))
    session = make_session(settings, keys=Keys("id", "private"))
    client = make_client(session, settings)
    make_filesystem(session, client, settings, region="r1")
    assert client.meta.endpoint_url == "https://store.example:9000/base"
    assert (asked["scheme"], asked["endpoint_override"]) == ("https", "store.example:9000/base")
    assert (asked["access_key"], asked["secret_key"]) == ("id", "private")
    assert asked["region"] == client.meta.region_name == "r1"
    assert asked["tls_ca_file_path"] == str(aws_files)
    assert asked["force_virtual_addressing"] is False
    anonymous = resolve(StoreAccess(anonymous=True, addressing_style="virtual"))
    make_filesystem(session, client, anonymous, region="r1")
    assert asked["anonymous"] is True
    assert asked["force_virtual_addressing"] is True


def test_nothing_is_asked_before_the_first_request(
    offline: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/training")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    (tmp_path / "token").write_text("a private token")
    for access in (StoreAccess(), StoreAccess(profile="role"), StoreAccess(anonymous=True)):
        store = open_store("s3://bucket/a", access)
        assert b"private" not in pickle.dumps(store)
        settings = resolve(access)
        session = make_session(settings)
        make_client(session, settings)
    for profile, method in ((None, "assume-role-with-web-identity"), ("role", "assume-role")):
        credentials = make_session(resolve(StoreAccess(profile=profile))).get_credentials()
        assert credentials is not None
        assert credentials.method == method


def test_settings_and_keys_show_no_secret() -> None:
    assert "private" not in repr(Keys("id-private", "private"))
    assert "lake-secret" not in repr(resolve(StoreAccess(profile="lake")))


def test_an_unknown_profile_is_answered_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="no AWS profile lage") as caught:
        resolve(StoreAccess(profile="lage"))
    assert "lake" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://me:private@store:1", "https://private@store", "ftp://store", "store:9000", "http://"],
)
def test_an_endpoint_that_is_no_plain_url_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    with pytest.raises(SpecError, match="endpoint URL") as caught:
        open_store("s3://bucket/a")
    assert "private" not in str(caught.value)


def test_a_missing_file_of_authorities_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nonexistent/ca.pem")
    with pytest.raises(SpecError, match=r"/nonexistent/ca\.pem does not exist"):
        resolve(StoreAccess())


def test_a_damaged_configuration_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("no section = here")
    with pytest.raises(SpecError, match="cannot be read"):
        resolve(StoreAccess())


def test_encryption_is_part_of_each_write() -> None:
    access = StoreAccess(server_side_encryption="aws:kms", kms_key_id="key")
    assert resolve(access).encryption == {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key"}
    assert resolve(StoreAccess()).encryption == {}


def test_a_kms_key_without_its_encryption_is_refused() -> None:
    with pytest.raises(SpecError, match="has no effect"):
        resolve(StoreAccess(kms_key_id="key"))
