"""Pictures that strangers send: bounded, decoded, and fetched only from hosts on a list.

Bytes are untrusted. The format and the size in the header are looked at before anything is
decoded; an animated picture gives its first frame, EXIF rotation is applied, all modes become RGB.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image, ImageOps, UnidentifiedImageError

from spo.engines.chat import Picture
from spo.serving.problems import Problem

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_HIGH_DEPTH = ("I", "F", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureLimits:
    """What may be sent."""

    max_bytes: int
    max_pixels: int
    hosts: tuple[str, ...] = ()
    """Hosts to fetch from by https; none: fetching is off."""
    timeout_s: float = 10.0


async def open_picture(url: str, limits: PictureLimits) -> Picture:
    """The picture of an `image_url`; Problem says why it cannot be used."""
    if url[:5].lower() == "data:":
        data = _decode_data_url(url, limits.max_bytes)
    else:
        data = await _fetch(url, limits)
    return await asyncio.to_thread(decode, data, limits.max_pixels)


def _refuse(message: str) -> Problem:
    return Problem(400, "invalid_image", message)


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refuse("expected data:image/...;base64,... in image_url, got another data URL")
    if len(body) * 3 // 4 > max_bytes + 3:
        raise Problem(413, "image_too_large", f"a picture has at most {max_bytes} bytes")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refuse(f"the picture's base64 is damaged: {error}") from error


def decode(data: bytes, max_pixels: int) -> Picture:
    """Decode untrusted bytes; Problem when they are no picture, damaged or too large."""
    try:
        with warnings.catch_warnings():
            # Our own limit replaces the bomb warning; damaged metadata is the sender's affair.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Problem(
                        413,
                        "image_too_large",
                        f"the picture has {width} x {height} pixels, at most {max_pixels} are "
                        "allowed; scale it down",
                    )
                rgb = _as_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise Problem(
            413, "image_too_large", f"a picture has at most {max_pixels} pixels; scale it down"
        ) from error
    except UnidentifiedImageError as error:
        raise _refuse(f"expected a picture ({', '.join(FORMATS)}), got something else") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        ArithmeticError,
        IndexError,
        KeyError,
        AttributeError,
        EOFError,
        struct.error,
    ) as error:
        # All that Pillow's decoders were seen to raise on damaged files.
        raise _refuse(f"the picture cannot be decoded: {error}"[:200]) from error
    return Picture(width=rgb.width, height=rgb.height, rgb=rgb.tobytes())


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _HIGH_DEPTH:
        # convert("RGB") would clip 16-bit grey to white.
        low, high = image.getextrema()
        scale = 255.0 / (float(high) - float(low)) if high != low else 0.0  # type: ignore[arg-type]
        image = image.convert("F").point(lambda value: value * scale - low * scale)  # type: ignore[operator]
        return image.convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        ground = Image.new("RGBA", over.size, "white")
        ground.alpha_composite(over)
        return ground.convert("RGB")
    return image.convert("RGB")


async def _fetch(url: str, limits: PictureLimits) -> bytes:
    """Bytes from an allowed host; no redirects, no private addresses, no more than the limit."""
    if not limits.hosts:
        raise _refuse("pictures are taken as data URLs only; fetching from the web is off here")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise _refuse("image_url is not a URL") from error
    if parts.scheme.lower() != "https" or host not in limits.hosts or port not in (None, 443):
        raise _refuse(f"image_url must be https on one of {list(limits.hosts)}")
    if parts.username or parts.password:
        raise _refuse("image_url must not carry a user name or password")
    try:
        # The resolver checks the very addresses that are then connected to.
        connector = aiohttp.TCPConnector(resolver=PublicResolver())
        timeout = aiohttp.ClientTimeout(total=limits.timeout_s)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise _refuse(f"{host} answered with status {answer.status}, expected 200")
            data = bytearray()
            async for chunk in answer.content.iter_chunked(1 << 16):
                data += chunk
                if len(data) > limits.max_bytes:
                    raise Problem(
                        413, "image_too_large", f"a picture has at most {limits.max_bytes} bytes"
                    )
            return bytes(data)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise _refuse(f"the picture could not be fetched from {host}: {error}"[:200]) from error


class PublicResolver(AbstractResolver):
    """DNS that gives only public addresses (server-side request forgery)."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of a host; OSError when one of them is not public."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        refuse_private([entry[4][0] for entry in found], host)
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for kind, _, _, _, address in found
        ]

    async def close(self) -> None:
        """Nothing is held."""


def refuse_private(addresses: Sequence[Any], host: str) -> None:
    """Raise OSError unless every address is public."""
    for text in addresses:
        address = ipaddress.ip_address(str(text).partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or address
        if not mapped.is_global or mapped.is_multicast:
            raise OSError(f"{host} resolves to an address that is not public")
