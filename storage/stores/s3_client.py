"""The client of an S3 server: bounded patience, a checked endpoint, and no redirect is followed."""

import os
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from s3fs import S3FileSystem

from blocksight.storage.stores.s3_endpoints import check_resolved_endpoint
from blocksight.storage.stores.store import StoreError

CONNECT_SECONDS = 4
"""Three attempts and the pauses between them end within 15 s at an endpoint that never answers."""
READ_SECONDS = 60
"""Of silence, not of the whole transfer."""
ATTEMPTS = 3
"""Per request, by botocore; s3fs's own repetition is set to one, for the two would multiply."""


class _Direct:
    """A session of aiohttp, whose requests end at the server that they were sent to."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def request(self, method: str, **options: Any) -> Any:
        return self.session.request(method, allow_redirects=False, **options)


class DirectSession(AIOHTTPSession):
    """aiobotocore's session, which would follow a redirect to any host: a store could send us to one of its choice.

    A bucket of another region is still found: botocore does that by its region, at an address of its own making.
    """

    async def _get_session(self, proxy_url: str | None) -> Any:
        return _Direct(await super()._get_session(proxy_url))


def connected(endpoint_url: str | None) -> tuple[S3FileSystem, str]:
    """A client with bounded patience, and the endpoint that it found, in the environment where none is given.

    Raises StoreError where that is refused.
    """
    connection = S3FileSystem(
        endpoint_url=endpoint_url,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "http_session_cls": DirectSession,
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
            # some stores do not know the checksums that newer clients add by default; a bucket with Object Lock wants
            # them, and the user says so
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
