"""Translates refusals of S3 servers and of Azure into the errors of buquet."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from obstore.exceptions import AlreadyExistsError, PermissionDeniedError, PreconditionError, UnauthenticatedError

from buquet.errors import AccessDenied, BucketMissing, StoreError, StoreFull, StoreRefused, StoreUnavailable, StoreUnfit

if TYPE_CHECKING:
    from buquet.store.open import Location

STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>\s*([\w.]+)\s*</Code>")
MESSAGE = re.compile(r"<Message>([^<]{1,300})")

NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"}
FULL = {"QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", "InsufficientStorage"}
DENIED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
"""Refusals of credentials with status 400."""
LACKING = {"AccessDenied", "AuthorizationPermissionMismatch"}
"""Refusals of valid credentials that lack a right."""
RIGHTS = {"GET": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
PASSING = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
ROLE = ("169.254.169.254", "/latest/api/token", "/latest/meta-data")
"""Where obstore asks for the role of a machine, if it finds no other credentials."""

SIGNS = {
    "ConnectionRefused": "nothing listens there: connection refused",
    "ConnectionReset": "connection reset",
    "dns error": "the host's name is not known",
    "kind: Timeout": "not in time",
    "TimedOut": "not in time",
    "certificate": "its certificate is not trusted",
}
"""Words in obstore's description of a request without an answer, and their meaning."""


def status_of(error: BaseException) -> int:
    """Return the HTTP status in an obstore error; 0 if there was no answer."""
    match = STATUS.search(str(error))
    return int(match[1]) if match else 0


def code_of(error: BaseException) -> str:
    """Return the code in an obstore error, such as NoSuchBucket; empty if it has none."""
    match = CODE.search(str(error))
    return match[1] if match else ""


def is_conflict(error: BaseException) -> bool:
    """Tell whether the condition of a PUT was not met. 409: another conditional write of the key was in flight."""
    if code_of(error) in NO_BUCKET:  # the 404 of a conditional PUT comes as a PreconditionError, too
        return False
    return isinstance(error, AlreadyExistsError | PreconditionError) or status_of(error) in {409, 412}


def is_missing(error: BaseException) -> bool:
    """Tell whether the key, but not the bucket, is missing."""
    return isinstance(error, FileNotFoundError) and code_of(error) not in NO_BUCKET


def is_no_version(error: BaseException) -> bool:
    """Tell whether a version does not exist. S3 answers 400 to an id that it never made, 405 to a delete marker."""
    return (status_of(error), code_of(error)) in {(400, "InvalidArgument"), (400, "NoSuchVersion"), (405, "MethodNotAllowed")}


def explain(error: BaseException, what: str, location: Location, *, answered: bool) -> StoreError:
    """Return the error of buquet for an obstore error. `answered`: whether the store ever answered a request with success."""
    status, code = status_of(error), code_of(error)
    said = _said(error, status, code)
    where = location.endpoint or ("AWS" if location.scheme == "s3" else "Azure")
    if code in NO_BUCKET:
        how = f"Create it, or run `buquet init --url {shlex.quote(location.url)}`" if location.scheme == "s3" else "Create it"
        return BucketMissing(f"there is no bucket {location.bucket!r} at {where}. {how}")
    if any(sign in str(error) for sign in ROLE):
        if answered:  # the role gave credentials before, and will again
            return StoreUnavailable(f"{what} in {location.url}: the machine's role could not be asked ({said})")
        return AccessDenied(f"no credentials were found for {what} in {location.url}. {_looked(location)}")
    if code in FULL or status == 507:
        return StoreFull(f"{what} in {location.url}: {said}. Free space or raise the quota; nothing was written")
    if code in ELSEWHERE or "incorrectly configured region" in str(error) or status == 301:
        return StoreRefused(f"{what} in {location.url}: {said}. Name the bucket's own region, by ?region= or AWS_REGION")
    if code in LACKING:
        return AccessDenied(f"{what} in {location.url} was denied: {said}. {_right(what, location)}")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in {401, 403} or code in DENIED:
        return AccessDenied(f"{what} in {location.url} was denied: {said}. {_looked(location)}")
    if status == 501 or code == "NotImplemented":
        return StoreUnfit(f"{what}: {where} does not do this ({said}). buquet needs PUT with If-None-Match and If-Match")
    if status in {0, 408, 409, 412, 429} or status >= 500 or code in PASSING:
        return StoreUnavailable(f"{what} in {location.url}: {said}")
    return StoreRefused(f"{what} in {location.url}: {said}")


def _right(what: str, location: Location) -> str:
    """Return which right valid credentials lack."""
    verb, _, key = what.partition(" ")
    if location.scheme == "az":
        return f"The identity lacks the right to {verb} blobs there: give it the role Storage Blob Data Contributor"
    folder, slash, _ = key.partition("/")
    bucket = f"arn:aws:s3:::{location.bucket}"
    objects = "/".join(filter(None, (bucket, location.prefix, folder, slash and "*")))
    missing = f"s3:ListBucket on {bucket}" if verb == "LIST" else f"{RIGHTS[verb]} on {objects}"
    hidden = f", or s3:ListBucket on {bucket} where there is no such object" if verb == "GET" else ""
    return f"The credentials lack the right {missing}{hidden}"


def _looked(location: Location) -> str:
    if location.scheme == "az":
        return "Credentials are taken from AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or other AZURE_… variables"
    return (
        "Credentials are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else from AWS_PROFILE and the files in ~/.aws "
        "(with boto3 installed), else from the role of this container or machine"
    )


def _said(error: BaseException, status: int, code: str) -> str:
    """Return the answer in a few words. All of it would show signed headers that it may quote."""
    text = str(error)
    if status:
        message = MESSAGE.search(text)
        return " ".join(filter(None, (str(status), code, message[1].strip().rstrip(".") if message else "")))
    for sign, meaning in SIGNS.items():
        if sign in text:
            return f"no answer ({meaning})"
    return "no answer: " + text.partition("\n")[0][-200:]
