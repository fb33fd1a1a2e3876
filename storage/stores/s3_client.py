"""Connects to an S3 server: bounded timeouts and retries, a checked endpoint, no redirects."""

import os
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from s3fs import S3FileSystem

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


def connect(endpoint_url: str | None) -> tuple[S3FileSystem, str]:
    """A connected client and its endpoint, which comes from the environment if none is given.

    Raises StoreError if the endpoint is refused.
    """
    connection = S3FileSystem(
        endpoint_url=endpoint_url,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "http_session_cls": NoRedirectSession,
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
            # some stores do not know the checksums that newer clients add by default; a bucket with Object Lock needs
            # them, and the user sets the variable
            "request_checksum_calculation": os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
            "response_checksum_validation": "when_required",
        },
    )
    connection.retries = 1
    try:
        client: Any = connection.connect()
    except ValueError:  # its text may hold credentials
        raise StoreError(
            "the endpoint in the environment (AWS_ENDPOINT_URL) is not of the form https://host:port"
        ) from None
    found = str(client.meta.endpoint_url)
    check_resolved_endpoint(found)
    return connection, found
