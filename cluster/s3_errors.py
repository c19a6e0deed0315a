"""What S3's errors mean: whether to try again, and what to tell the user."""

from __future__ import annotations

import email.utils
import time

import botocore.exceptions as aws
import urllib3.exceptions

from cluster.storage import StorageError, StoreAway
from jobs.errors import Problem

TRANSIENT_CODES = frozenset(
    {
        "500",
        "502",
        "503",
        "504",
        "429",
        "BadDigest",  # the bytes were changed on the way: our own checksum is right
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",  # another conditional write is under way; it may fail
        "IncompleteBody",
        "InternalError",
        "InternalServerError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
_SPOILT_CODES = frozenset({"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})
_WRONG_CREDENTIALS = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthFailure", "InvalidToken"}
    | {"InvalidSecurity", "UnrecognizedClientException", "InvalidClientTokenId"}
)
_EXPIRED = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
)
_WRONG_REGION = frozenset(
    {
        "301",
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    }
)
_CREDENTIALS_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile (AWS_PROFILE, or "
    "access.profile in the job file); for a public bucket set access.anonymous: true"
)

S3_ERRORS = (
    aws.BotoCoreError,
    aws.ClientError,
    aws.HTTPClientError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
"""All that a request to S3 may raise."""


def error_code(error: BaseException) -> str:
    """S3's code such as `NoSuchKey`, or `404` where the answer had no body; empty for others."""
    if isinstance(error, aws.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def is_missing(error: BaseException) -> bool:
    """Whether the error says that there is no such object."""
    return error_code(error) in ("NoSuchKey", "404", "NotFound")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, aws.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        unfinished = status >= 500 and status != 501
        return unfinished or status == 429 or error_code(error) in TRANSIENT_CODES
    if isinstance(error, aws.SSLError | urllib3.exceptions.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    return isinstance(
        error,
        aws.ConnectionError
        | aws.HTTPClientError
        | aws.IncompleteReadError
        | aws.FlexibleChecksumError
        | urllib3.exceptions.HTTPError
        | ConnectionError
        | TimeoutError,
    )


def has_expired(error: BaseException) -> bool:
    """Whether the credentials were good once: others may have taken their place."""
    return error_code(error) in _EXPIRED


def wanted_pause(error: BaseException | None) -> float:
    """Seconds for which the answer asks to be left alone (Retry-After); 0 without."""
    if not isinstance(error, aws.ClientError):
        return 0.0
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    text = headers.get("retry-after", "")
    if text.isdigit():
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, at.timestamp() - time.time())


def describe(
    error: BaseException, *, doing: str, uri: str, endpoint: str, credentials: str
) -> StorageError:
    """The error for the user: `doing` is "read", `uri` what it was done to.

    `credentials` says where they came from, such as "the variables AWS_ACCESS_KEY_ID ...". It is a
    StoreAway where the same request may succeed later.
    """
    message, hint = _explain(error, uri=uri, endpoint=endpoint, credentials=credentials)
    problem = Problem(f"cannot {doing} {uri}: {message}", hint)
    if not is_transient(error) or _is_spoilt(error):
        return StorageError(problem)
    away = StoreAway(problem)
    away.after_seconds = wanted_pause(error)
    return away


def _is_spoilt(error: BaseException) -> bool:
    """Whether other bytes came than were sent: waiting does not mend what does that each time."""
    return isinstance(error, aws.FlexibleChecksumError) or error_code(error) in _SPOILT_CODES


def _explain(
    error: BaseException, *, uri: str, endpoint: str, credentials: str
) -> tuple[str, str | None]:
    """(what is wrong, what to type)."""
    if isinstance(error, aws.ClientError):
        return _explain_answer(error, uri=uri, endpoint=endpoint, credentials=credentials)
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return "no credentials were found", _CREDENTIALS_HINT
    if isinstance(error, aws.CredentialRetrievalError | aws.MetadataRetrievalError | aws.SSOError):
        return (
            f"the credentials could not be had ({type(error).__name__})",
            "sign in again (for single sign-on: aws sso login), or " + _CREDENTIALS_HINT,
        )
    if isinstance(error, aws.SSLError | urllib3.exceptions.SSLError):
        return (
            f"the certificate of {endpoint} is not trusted",
            "set access.ca_bundle or AWS_CA_BUNDLE to the file of the authority that signed it",
        )
    if isinstance(error, aws.ProxyConnectionError):
        return (
            "the HTTP proxy cannot be reached",
            "correct HTTP_PROXY and HTTPS_PROXY, or list the store's host in NO_PROXY",
        )
    if isinstance(error, aws.FlexibleChecksumError):
        return "the bytes that came do not match their checksum", "try again; check the network"
    if isinstance(error, aws.ParamValidationError | aws.InvalidDNSNameError | aws.ValidationError):
        return f"the request is not valid ({type(error).__name__})", "check the URI of the store"
    if is_transient(error):
        return (
            f"{endpoint} does not answer ({type(error).__name__})",
            "check that the store runs and that access.endpoint_url or AWS_ENDPOINT_URL_S3 is "
            "right; for the embedded store run: shoal up",
        )
    return type(error).__name__, None


def _explain_answer(
    error: aws.ClientError, *, uri: str, endpoint: str, credentials: str
) -> tuple[str, str | None]:
    """(what is wrong, what to type) where the store answered with an error."""
    code = error_code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if error.operation_name.startswith("AssumeRole"):
        return (
            f"the role in AWS_ROLE_ARN or the profile could not be assumed ({code})",
            "check the role's trust policy, and the web identity token or source profile",
        )
    if code in _WRONG_CREDENTIALS:
        return f"the store does not accept {credentials} ({code})", _CREDENTIALS_HINT
    if code in _EXPIRED:
        return f"{credentials} have expired ({code})", "sign in again, then repeat the command"
    if code == "RequestTimeTooSkewed":
        return "this machine's clock differs from the store's", "set the clock (NTP)"
    if code == "NoSuchBucket":
        return (
            f"{endpoint} has no bucket {bucket}",
            f"correct the URI or the endpoint, or create it: aws s3 mb s3://{bucket}",
        )
    if code == "InvalidBucketName":
        return f"{bucket} is no valid name of a bucket", "correct the URI"
    if code in _WRONG_REGION:
        region = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return (
            f"the bucket is in another region ({code})",
            f"set access.region or AWS_REGION to {region.get('x-amz-bucket-region', 'its region')}",
        )
    if status == 403 or code == "AccessDenied":
        return (
            f"access denied for {credentials} ({code})",
            f"allow {_action(error.operation_name)} on it in the policy of the bucket or role",
        )
    if code == "BadDigest":
        return (
            "the store got other bytes than were sent (BadDigest)",
            "try again; check the network",
        )
    if code in ("QuotaExceeded", "EntityTooLarge", "507") or status == 507:
        return f"the store has no room for it ({code})", "free space in the store"
    if is_transient(error):
        return f"{endpoint} keeps failing ({code}, HTTP {status})", "try again later"
    if code in ("NotImplemented", "501") and error.operation_name == "ListMultipartUploads":
        return f"{endpoint} does not support {error.operation_name}", None
    if code in ("NotImplemented", "501"):
        return (
            f"{endpoint} does not support {error.operation_name} with these arguments",
            "use a store with conditional writes, such as AWS S3 or the embedded one (shoal up); "
            "for one without them set store_lease: none",
        )
    text = error.response.get("Error", {}).get("Message", "")
    return f"{code} {text}".strip() + f" (HTTP {status})", None


def _action(operation: str) -> str:
    """The permission of IAM that an operation needs."""
    return {
        # Without the right to list, S3 answers so for absent objects too.
        "GetObject": "s3:GetObject and s3:ListBucket",
        "HeadObject": "s3:GetObject and s3:ListBucket",
        "ListObjectsV2": "s3:ListBucket",
        "ListMultipartUploads": "s3:ListBucketMultipartUploads",
        "HeadBucket": "s3:ListBucket",
        "DeleteObjects": "s3:DeleteObject",
        "CreateMultipartUpload": "s3:PutObject",
        "UploadPart": "s3:PutObject",
        "CompleteMultipartUpload": "s3:PutObject",
    }.get(operation, f"s3:{operation}")
