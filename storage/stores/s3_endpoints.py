"""Which S3 endpoints are talked to: none with credentials in its URL, and none that is a cloud's metadata service."""

import ipaddress
import socket
import stringprep
import unicodedata
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from blocksight.storage.stores.locations import CREDENTIALS_WANTED
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
"""Of clouds whose metadata service is not on a link-local address, or not on that alone."""
NAT64 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96", "::/96")))
"""Networks whose addresses hold an IPv4 address in their last 32 bits."""
LOOPBACK = ipaddress.IPv6Address("::1")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_endpoint(endpoint_url: str) -> None:
    """Refuses an endpoint with credentials in it, of another scheme, or on a metadata address (StoreError)."""
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
    """Refuses, beside what `check_endpoint` does, a name that the resolver turns into such an address."""
    check_endpoint(endpoint_url)
    _, host = _scheme_and_host(endpoint_url)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return  # the connection will say so
    for *_, place in found:
        address = _address(str(place[0]))
        if address is not None and _is_metadata_address(address):
            raise StoreError(f"endpoint {endpoint_url!r} resolves to {address}, a link-local or metadata address")


def _scheme_and_host(url: str) -> tuple[str, str]:
    with suppress(ValueError):  # brackets or a port that are none
        parts = urlsplit(url)
        if parts.port != 0:
            host = unicodedata.normalize("NFKC", unquote(parts.hostname or "")).replace("。", ".")
            seen = "".join(one for one in host if not stringprep.in_table_b1(one))  # a resolver leaves soft hyphens out
            return parts.scheme, seen.lower().rstrip(".")
    return "", ""


def _is_metadata_host(host: str) -> bool:
    return any(host == name or ("." in name and host.endswith(f".{name}")) for name in METADATA_HOSTS)


def _is_metadata_address(address: Address) -> bool:
    return address.is_link_local or address in METADATA_ADDRESSES


def _address(host: str) -> Address | None:
    """The IP address in any spelling that the system's resolver takes (2852039166 is one); None: a name."""
    with suppress(OSError, UnicodeError, ValueError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    with suppress(ValueError):
        return _inner(ipaddress.IPv6Address(host))
    return None


def _inner(address: ipaddress.IPv6Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, or itself."""
    for inner in (address.ipv4_mapped, address.sixtofour):
        if inner is not None:
            return inner
    if address != LOOPBACK and any(address in network for network in NAT64):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
