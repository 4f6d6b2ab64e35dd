"""Which addresses a service may be sent to by a stranger's URL: those of the public internet only."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

# ipaddress knows the private networks, some only in later versions of Python. Beyond those: IETF protocols
# (a cloud's metadata among them), what used to relay IPv6, and the host agent of Azure, which every one of
# its machines answers at a number that is public elsewhere.
_INSIDE_IPV4 = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"), IPv4Network("168.63.129.16/32"))
_UNICAST_IPV6 = IPv6Network("2000::/3")
# Protocol assignments with Teredo and the like, 6to4 and documentation: an IPv4 address may hide in them.
_INSIDE_IPV6 = (IPv6Network("2001::/23"), IPv6Network("2002::/16"), IPv6Network("3fff::/20"))
_NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 literal is an ordinary host of the internet.

    Private, loopback, link-local (where clouds keep their metadata), carrier-grade NAT, multicast and
    reserved addresses are not, nor is an IPv6 address that carries one of those inside it. What is no
    address literal is not either.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return _is_public_ipv4(parsed) if isinstance(parsed, IPv4Address) else _is_public_ipv6(parsed)


def _is_public_ipv4(address: IPv4Address) -> bool:
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _INSIDE_IPV4)
    )


def _is_public_ipv6(address: IPv6Address) -> bool:
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return _is_public_ipv4(address.ipv4_mapped)
    if address in _NAT64:
        return _is_public_ipv4(IPv4Address(int(address) & 0xFFFF_FFFF))
    return address in _UNICAST_IPV6 and address.is_global and not any(address in network for network in _INSIDE_IPV6)
