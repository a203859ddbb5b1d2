"""A container of Azure Blob Storage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError
from obstore.store import AzureStore as Client

from buquet.errors import AccessDenied
from buquet.store.answers import Place
from buquet.store.objects import ObjectStore, check_place

if TYPE_CHECKING:
    from obstore.store import AzureConfig

    from buquet.clock import Clock

CREDENTIALS = "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"


class AzureStore(ObjectStore):
    """Blobs in a container, under a prefix. No request is sent before the first operation.

    The account is AZURE_STORAGE_ACCOUNT_NAME. Credentials are AZURE_STORAGE_ACCOUNT_KEY, a SAS token, a service principal or a
    managed identity, as the client finds them in AZURE_… variables.
    Raises InvalidURL for a container, prefix or endpoint that cannot be meant.
    """

    def __init__(self, container: str, prefix: str = "", endpoint: str | None = None, clock: Clock | None = None) -> None:
        place = Place(container, prefix.strip("/"), endpoint.rstrip("/") if endpoint else None, None, "az")
        check_place(place._replace(endpoint=endpoint), CREDENTIALS)
        super().__init__(place, clock)

    def _connect(self) -> Client:
        place = self.place
        if not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
            msg = f"{self.url}: whose container that is, is not known. Name the account in AZURE_STORAGE_ACCOUNT_NAME"
            raise AccessDenied(msg)
        config: AzureConfig = {"container_name": place.bucket}
        if place.endpoint is not None:
            config["endpoint"] = place.endpoint
        try:
            return Client(
                prefix=place.prefix or None,
                config=config,
                client_options=self._client_options(place.endpoint),
                retry_config={"max_retries": 0},
            )
        except (BaseError, ValueError) as error:
            problem = self._cannot_open(error)
        raise problem
