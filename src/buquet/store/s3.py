"""A bucket on S3 or on a server that speaks its protocol."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError
from obstore.store import S3Store as Client

from buquet.errors import AccessDenied, install
from buquet.store.answers import Place
from buquet.store.objects import ObjectStore, check_place

if TYPE_CHECKING:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Config

    from buquet.clock import Clock

REGION = "us-east-1"
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class S3Store(ObjectStore):
    """Objects in a bucket, under a prefix. No request is sent before the first operation.

    Credentials are looked for where AWS's own tools do: in the environment, in a profile or shared file (needs boto3), and then
    at the container or machine, for its role.
    Raises InvalidURL for a bucket, prefix or endpoint that cannot be meant.
    """

    def __init__(
        self, bucket: str, prefix: str = "", endpoint: str | None = None, region: str | None = None, clock: Clock | None = None
    ) -> None:
        place = Place(bucket, prefix.strip("/"), endpoint.rstrip("/") if endpoint else None, region)
        check_place(place._replace(endpoint=endpoint), CREDENTIALS)
        super().__init__(place, clock)

    def _connect(self) -> Client:
        place = self.place
        endpoint = place.endpoint or next(filter(None, map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))), None)
        provider = _profile()
        found = provider.config.get("region") if provider else None
        region = place.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or found or REGION
        config: S3Config = {
            "bucket": place.bucket,
            "region": region,
            # names with dots do not fit AWS's certificates, and other servers seldom know names of buckets as hosts
            "virtual_hosted_style_request": endpoint is None and "." not in place.bucket,
            "disable_bulk_delete": True,
        }
        if endpoint is not None:
            config["aws_endpoint_url_s3"] = endpoint
        try:
            return Client(
                prefix=place.prefix or None,
                config=config,
                client_options=self._client_options(endpoint),
                retry_config={"max_retries": 0},
                credential_provider=provider,
            )
        except (BaseError, ValueError) as error:
            problem = self._cannot_open(error)
        raise problem


def _profile() -> Boto3CredentialProvider | None:
    """Return boto3's credentials where a profile or a shared file is the place that AWS's tools would look at first."""
    environ = os.environ
    named = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE")
    if environ.get("AWS_ACCESS_KEY_ID") or (environ.get("AWS_WEB_IDENTITY_TOKEN_FILE") and not named):
        return None
    files = (environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), environ.get("AWS_CONFIG_FILE", "~/.aws/config"))
    if not named and not any(_exists(file) for file in files):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 - boto3 is slow to import, and optional
    except ImportError:
        if not named:
            return None
        msg = f"the AWS profile {named!r} takes boto3 to read: {install('s3')}, or put the keys into the environment"
        raise AccessDenied(msg) from None
    try:
        return Boto3CredentialProvider()
    except ValueError:  # none there: obstore's own chain is next
        return None
    except Exception as error:  # noqa: BLE001 - botocore's errors, which have no types to check against
        raise AccessDenied(f"the AWS profile cannot be used: {error}") from None


def _exists(file: str) -> bool:
    try:
        return Path(file).expanduser().exists()
    except (OSError, RuntimeError):  # no rights, or no home directory
        return False
