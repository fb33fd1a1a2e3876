"""Connects to an S3 server: bounded timeouts and retries, a checked endpoint, no redirects."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from fsspec.asyn import sync
from s3fs import S3FileSystem

from blocksight.storage.stores.s3_access import client_options
from blocksight.storage.stores.s3_endpoints import check_resolved_endpoint
from blocksight.storage.stores.store import StoreError

CONNECT_SECONDS = 4
"""Three attempts and their pauses end within 15 s if an endpoint never answers."""
READ_SECONDS = 60
"""Limit for one silence, not for the whole transfer."""
ATTEMPTS = 3
"""Attempts per request, by botocore. s3fs's own retries are set to one, as the two would multiply."""


class _NoRedirects:
    """A session of aiohttp that follows no redirect."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def request(self, method: str, **options: Any) -> Any:
        return self.session.request(method, allow_redirects=False, **options)


class NoRedirectSession(AIOHTTPSession):
    """aiobotocore's session without redirects: a store could redirect us to any host.

    A bucket of another region is still found: botocore builds that region's address itself.
    """

    async def _get_session(self, proxy_url: str | None) -> Any:
        return _NoRedirects(await super()._get_session(proxy_url))


@dataclass(frozen=True)
class Connection:
    """A connected client, and what its errors tell the user."""

    filesystem: S3FileSystem
    endpoint: str
    region: str
    credentials: str | None
    """Where they were found, such as `env`; None: requests are not signed."""


def connect(place: str, endpoint_url: str | None) -> Connection:
    """A connected client for a normal place; its endpoint comes from the environment if none is given.

    Requests are not signed if no credentials are found, which a warning says. Raises StoreError if the endpoint is
    refused, or a variable of `s3_access` has no sense.
    """
    filesystem = S3FileSystem(
        endpoint_url=endpoint_url,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "http_session_cls": NoRedirectSession,
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
            # some stores do not know the checksums that newer clients add by default; every write has its Content-MD5
            "request_checksum_calculation": os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
            "response_checksum_validation": "when_required",
        },
        **client_options(place),
    )
    filesystem.retries = 1
    try:
        client: Any = filesystem.connect()
    except ValueError:  # its text may hold credentials
        raise StoreError(
            "the endpoint in the environment (AWS_ENDPOINT_URL) is not of the form https://host:port"
        ) from None
    found = str(client.meta.endpoint_url)
    check_resolved_endpoint(found)
    source = None if filesystem.anon else _credentials_source(filesystem)
    if source is None and not filesystem.anon:
        filesystem.anon = True
        filesystem.connect(refresh=True)
        logging.getLogger(__name__).warning("no credentials were found: %s is asked without them (unsigned)", place)
    return Connection(filesystem, found, str(client.meta.region_name), source)


def _credentials_source(filesystem: S3FileSystem) -> str | None:
    """Where the client finds credentials; None if it finds none. Raises BotoCoreError if they are incomplete."""
    session: Any = filesystem.session
    found = sync(filesystem.loop, session.get_credentials)
    return None if found is None else str(found.method)
