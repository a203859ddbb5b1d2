"""`buquet init`: prepares a bucket with versions and lifecycle rules, or a file. It may be run again at any time."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from buquet import keys
from buquet.errors import AccessDenied, BucketMissing, StoreRefused, UsageError, install
from buquet.records import Layout
from buquet.store.base import Location

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.queue.client import Client

RULE = "buquet"
VOLATILE = (keys.WORKERS, keys.NOTES, keys.CONTROL, keys.BELLS, keys.READY, keys.LATER)
LONGEST_NAME = 200
DEFAULT_REGION = "us-east-1"
ABSENT = {"NoSuchLifecycleConfiguration", "NoSuchLifecycle"}
MISSING = {"404", "NoSuchBucket", "NotFound"}
OURS = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
DENIED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}


class InitStep(NamedTuple):
    """One step of the preparation."""

    what: str
    done: bool
    detail: str
    by_hand: str = ""
    """If the step was not done: the JSON to set by other means."""


async def prepare(client: Client, *, keep_versions_days: int = 30) -> AsyncIterator[InitStep]:
    """Prepare the client's store, and yield each step.

    On S3: create the bucket if it is missing, turn versions on, and add lifecycle rules for the URL's prefix. They remove earlier
    versions after `keep_versions_days`, markers of deleted objects, and unfinished uploads. If the server refuses a step, this is
    reported, and the other steps are done. Then write the layout. S3 needs boto3, the extra `s3`. Raises UsageError,
    AccessDenied, StoreRefused.
    """
    if keep_versions_days < 1:
        raise UsageError(f"earlier versions are kept for a day at least, not {keep_versions_days}")
    store = client.store
    place = getattr(store, "location", None)
    if isinstance(place, Location) and place.scheme == "s3":
        for step in await asyncio.to_thread(_Bucket(place).prepare, keep_versions_days):
            yield step
    await client.open()
    await _obey_control_only(client)
    if isinstance(place, Location):
        if place.scheme != "s3":
            yield InitStep(
                "bucket", done=True, detail=f"{place.bucket} is there; versions and lifecycle rules are left as they are"
            )
        yield InitStep("layout", done=True, detail="buquet.json says in which format the rest is")
    elif store.url.startswith("sqlite:"):
        yield InitStep("file", done=True, detail=f"{store.url.removeprefix('sqlite:')} is there")
    else:
        yield InitStep("memory", done=True, detail="there is nothing to prepare, and nothing will be kept")


async def _obey_control_only(client: Client) -> None:
    """Let future workers ignore requests to pause and drain in `notes/`, where producers may write."""
    held = await client.register.read(Layout, keys.LAYOUT)
    while held is not None and not held.record.control:
        held = (await client.register.update(held, msgspec.structs.replace(held.record, control=True))).held
    client.control_only = True


def lifecycle_rules(prefix: str, keep_versions_days: int) -> list[dict[str, Any]]:
    """Return the lifecycle rules of a prefix (empty: the whole bucket), in S3's format.

    One rule covers everything: records, payloads, the journal. Each folder of `VOLATILE`, whose objects change often and whose
    earlier versions nobody reads, has a rule that removes earlier versions after a day. Where two rules apply, S3 uses the
    shorter time.
    """
    folder = f"{prefix}/" if prefix else ""
    # the name distinguishes the prefixes of one bucket; S3 allows 255 bytes
    name = folder if len(folder) <= LONGEST_NAME else hashlib.sha256(folder.encode()).hexdigest()
    return [
        {
            "ID": f"{RULE}:{name}",
            "Status": "Enabled",
            "Filter": {"Prefix": folder},
            "NoncurrentVersionExpiration": {"NoncurrentDays": keep_versions_days},
            "Expiration": {"ExpiredObjectDeleteMarker": True},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
        },
        *(
            {
                "ID": f"{RULE}-{part[:-1]}:{name}",
                "Status": "Enabled",
                "Filter": {"Prefix": f"{folder}{part}"},
                "NoncurrentVersionExpiration": {"NoncurrentDays": 1},
                "Expiration": {"ExpiredObjectDeleteMarker": True},
            }
            for part in VOLATILE
        ),
    ]


def merged(existing: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the existing rules and ours, which replace existing ones of the same name."""
    names = {rule["ID"] for rule in ours}
    return [*(rule for rule in existing if rule.get("ID") not in names), *ours]


class _Bucket:
    def __init__(self, place: Location) -> None:
        try:
            boto3 = cast("Any", importlib.import_module("boto3"))
            self.errors = cast("Any", importlib.import_module("botocore.exceptions"))
        except ImportError:
            raise UsageError(
                f"`buquet init` needs boto3 to prepare a bucket: {install('s3')}. Or create the bucket by other "
                "means and turn its versions on; buquet itself does not need boto3"
            ) from None
        self.place = place
        region = place.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        self.region: str = region or boto3.session.Session().region_name or DEFAULT_REGION
        own_endpoint = place.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        config = cast("Any", importlib.import_module("botocore.config")).Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"max_attempts": 3, "mode": "standard"},
            # other servers rarely support bucket names as hosts
            s3={"addressing_style": "path" if own_endpoint else "auto"},
        )
        self.boto = boto3.client("s3", endpoint_url=place.endpoint, region_name=self.region, config=config)

    def prepare(self, keep_versions_days: int) -> list[InitStep]:
        return [self._create(), self._turn_versions_on(), self._set_rules(keep_versions_days)]

    def _ask(self, request: Callable[..., Any], **words: Any) -> tuple[Any, str, str]:
        """Return the answer, and the code and text of a refusal. Raises AccessDenied, StoreRefused if there is no answer."""
        try:
            return request(Bucket=self.place.bucket, **words), "", ""
        except self.errors.ClientError as error:
            said = error.response.get("Error", {})
            code = str(said.get("Code", ""))
            return None, code or "?", f"{code} {said.get('Message', '')}".strip().rstrip(".")
        except self.errors.NoCredentialsError:
            raise AccessDenied(
                f"no credentials were found for {self.place.url}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, or run where a role is given"
            ) from None
        except self.errors.BotoCoreError as error:
            raise StoreRefused(f"{self.place.url} does not answer: {error}. Look at the endpoint and the network") from None

    def _create(self) -> InitStep:
        bucket = self.place.bucket
        _, code, said = self._ask(self.boto.head_bucket)
        if not code:
            return InitStep("bucket", done=True, detail=f"{bucket} is there")
        if code not in MISSING:
            raise AccessDenied(
                f"the bucket {bucket} cannot be read: {said}. Does it belong to another account, or is s3:ListBucket not granted?"
            )
        needs_region = self.place.endpoint is None and self.region != DEFAULT_REGION
        words = {"CreateBucketConfiguration": {"LocationConstraint": self.region}} if needs_region else {}
        _, code, said = self._ask(self.boto.create_bucket, **words)
        if code and code not in OURS:
            kind = AccessDenied if code in DENIED else BucketMissing
            raise kind(f"the bucket {bucket} is missing and cannot be created: {said}. Create it by other means, or name another")
        where = f" in {self.region}" if self.place.endpoint is None else ""
        return InitStep("bucket", done=True, detail=f"{bucket} was created{where}")

    def _turn_versions_on(self) -> InitStep:
        answer, code, _ = self._ask(self.boto.get_bucket_versioning)
        if not code and answer.get("Status") == "Enabled":
            return InitStep("versions", done=True, detail="are on")
        wanted = {"Status": "Enabled"}
        _, code, said = self._ask(self.boto.put_bucket_versioning, VersioningConfiguration=wanted)
        if code:
            detail = f"could not be turned on ({said}). Tasks work without versions: only the full earlier records are not kept"
            return InitStep("versions", done=False, detail=detail, by_hand=_json(wanted))
        return InitStep("versions", done=True, detail="were turned on")

    def _set_rules(self, keep_versions_days: int) -> InitStep:
        ours = lifecycle_rules(self.place.prefix, keep_versions_days)
        where = f"under {self.place.prefix}/" if self.place.prefix else "in the whole bucket"
        good = (
            f"{where}: earlier versions are removed after {keep_versions_days} days (of {', '.join(VOLATILE)} after a day), "
            "markers of deleted objects then, too, unfinished uploads after a day"
        )
        answer, code, said = self._ask(self.boto.get_bucket_lifecycle_configuration)
        if code and code not in ABSENT:
            detail = f"the rules could not be read ({said}), so none were written: set them by hand"
            return InitStep("lifecycle", done=False, detail=detail, by_hand=_json({"Rules": ours}))
        existing = cast("list[dict[str, Any]]", [] if code else answer.get("Rules", []))
        rules = merged(existing, ours)
        if _json(rules) == _json(existing):
            return InitStep("lifecycle", done=True, detail=good + "; as before")
        _, code, said = self._ask(self.boto.put_bucket_lifecycle_configuration, LifecycleConfiguration={"Rules": rules})
        if code:
            detail = f"the rules were refused ({said}): set them by hand, or earlier versions are kept for ever"
            return InitStep("lifecycle", done=False, detail=detail, by_hand=_json({"Rules": rules}))
        others = len(rules) - len(ours)
        kept = f"; {others} other rule{'s' * (others > 1)} left as they are" if others else ""
        return InitStep("lifecycle", done=True, detail=good + kept)


def _json(value: Any) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()
