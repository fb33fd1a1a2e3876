"""Checks S3 endpoints: refuses credentials in the URL and the metadata services of clouds."""

import ipaddress
import socket
import stringprep
import unicodedata
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from blocksight.storage.stores.locations import CREDENTIALS_WANTED
from blocksight.storage.stores.s3_access import value_for, values_by_place
from blocksight.storage.stores.store import StoreError

METADATA_HOSTS = (
    "metadata",
    "metadata.goog",
    "metadata.google.internal",
    "metadata.azure.internal",
    "metadata.azure.com",
    "metadata.tencentyun.com",
    "metadata.oraclecloud.com",
    "metadata.packet.net",
    "metadata.platformequinix.com",
    "rancher-metadata",
    "instance-data",
    "instance-data.ec2.internal",
)
METADATA_ADDRESSES = {
    ipaddress.ip_address(text)
    for text in (
        "fd00:ec2::254",
        "fd20:ce::254",
        "fd00:42::42",
        "fd00:c1::a9fe:a9fe",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
    )
}
"""Addresses of metadata services that are not link-local."""
NAT64 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96", "::/96")))
"""Networks whose addresses hold an IPv4 address in their last 32 bits."""
LOOPBACK = ipaddress.IPv6Address("::1")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_endpoints(text: str) -> None:
    """Checks every endpoint of `URL,BUCKET=URL,…` as `check_endpoint`. Raises StoreError."""
    for endpoint_url in values_by_place(text).values() or [text]:
        check_endpoint(endpoint_url)


def endpoint_for(place: str, text: str | None) -> str | None:
    """The endpoint of a normal place, from `URL,BUCKET=URL,…`; None: the environment's, or AWS.

    Raises StoreError as `check_endpoint`.
    """
    if text is None:
        return None
    check_endpoints(text)
    return value_for(place, text)


def check_endpoint(endpoint_url: str) -> None:
    """Raises StoreError for an endpoint with credentials, another scheme, or a metadata address."""
    if set("@?#") & set(endpoint_url):
        raise StoreError(
            f"the endpoint URL holds user info, a query or a fragment; take it out and {CREDENTIALS_WANTED}"
        )
    scheme, host = _scheme_and_host(endpoint_url)
    if scheme not in ("http", "https") or not host:
        raise StoreError(f"endpoint {endpoint_url!r} is not of the form https://host:port")
    address = _address(host)
    if _is_metadata_host(host) or (address is not None and _is_metadata_address(address)):
        raise StoreError(f"endpoint {endpoint_url!r} is a link-local or metadata address, no object store")


def check_resolved_endpoint(endpoint_url: str) -> None:
    """Checks as `check_endpoint`, and raises StoreError for a name that resolves to a metadata address."""
    check_endpoint(endpoint_url)
    _, host = _scheme_and_host(endpoint_url)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return  # the connection will fail and say why
    for *_, place in found:
        address = _address(str(place[0]))
        if address is not None and _is_metadata_address(address):
            raise StoreError(f"endpoint {endpoint_url!r} resolves to {address}, a link-local or metadata address")


def _scheme_and_host(url: str) -> tuple[str, str]:
    with suppress(ValueError):  # malformed brackets or port
        parts = urlsplit(url)
        if parts.port != 0:
            host = unicodedata.normalize("NFKC", unquote(parts.hostname or "")).replace("。", ".")
            seen = "".join(one for one in host if not stringprep.in_table_b1(one))  # resolvers ignore soft hyphens
            return parts.scheme, seen.lower().rstrip(".")
    return "", ""


def _is_metadata_host(host: str) -> bool:
    return any(host == name or ("." in name and host.endswith(f".{name}")) for name in METADATA_HOSTS)


def _is_metadata_address(address: Address) -> bool:
    return address.is_link_local or address in METADATA_ADDRESSES


def _address(host: str) -> Address | None:
    """The IP address, in any spelling that the system's resolver accepts (such as 2852039166); None for a name."""
    with suppress(OSError, UnicodeError, ValueError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    with suppress(ValueError):
        return _inner(ipaddress.IPv6Address(host))
    return None


def _inner(address: ipaddress.IPv6Address) -> Address:
    """The IPv4 address inside an IPv6 address, or the IPv6 address itself."""
    for inner in (address.ipv4_mapped, address.sixtofour):
        if inner is not None:
            return inner
    if address != LOOPBACK and any(address in network for network in NAT64):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
