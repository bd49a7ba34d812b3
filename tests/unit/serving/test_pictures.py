"""A corpus of pictures that strangers send: decoded or refused with a reason, never a crash."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from spo.serving.pictures import (
    PictureLimits,
    PublicResolver,
    decode,
    open_picture,
    refuse_private,
)
from spo.serving.problems import Problem

LIMIT = 1_000_000


def scene(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((0, 0, 10, 10), fill="red")
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def pixel(data: bytes, x: int, y: int) -> tuple[int, ...]:
    picture = decode(data, LIMIT)
    value = picture.open().getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    return encoded(scene(), "JPEG", exif=exif)


def animated() -> bytes:
    frames = [scene(), Image.new("RGB", (40, 30), "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def sixteen_bit() -> bytes:
    ramp = np.linspace(0, 60000, 40 * 30).reshape(30, 40).astype(np.uint16)
    return encoded(Image.fromarray(ramp), "PNG")


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (encoded(scene(), "PNG"), (40, 30)),
        (encoded(scene("CMYK"), "JPEG"), (40, 30)),
        (encoded(scene("L"), "PNG"), (40, 30)),
        (encoded(scene("P"), "PNG"), (40, 30)),
        (encoded(scene("1"), "PNG"), (40, 30)),
        (encoded(scene("LA"), "PNG"), (40, 30)),
        (encoded(scene("RGBA"), "WEBP"), (40, 30)),
        (encoded(scene(), "BMP"), (40, 30)),
        (encoded(scene("I;16"), "TIFF"), (40, 30)),
        (encoded(scene("F"), "TIFF"), (40, 30)),
        (animated(), (40, 30)),
        (rotated(), (30, 40)),
        (sixteen_bit(), (40, 30)),
    ],
    ids=[
        "png",
        "cmyk",
        "grey",
        "palette",
        "bits",
        "alpha",
        "webp",
        "bmp",
        "tiff16",
        "float",
        "animated",
        "rotated",
        "png16",
    ],
)
def test_every_kind_becomes_rgb(data: bytes, size: tuple[int, int]) -> None:
    picture = decode(data, LIMIT)
    assert (picture.width, picture.height) == size
    assert len(picture.rgb) == size[0] * size[1] * 3


def test_colours_survive() -> None:
    assert pixel(encoded(scene(), "PNG"), 2, 2) == (255, 0, 0)
    red, green, blue = pixel(encoded(scene("CMYK"), "JPEG", quality=95), 2, 2)
    assert red > 200
    assert green < 60
    assert blue < 60
    assert pixel(animated(), 2, 2)[0] > 200, "the first frame"
    right_top = pixel(rotated(), 27, 2)
    assert right_top[0] > 200, "the red corner turned with the picture"
    assert right_top[1] < 90
    dark, light = pixel(sixteen_bit(), 0, 0), pixel(sixteen_bit(), 39, 29)
    assert dark[0] < 5
    assert light[0] > 250, "16 bits are scaled, not cut off"


def test_transparent_is_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG"), 1, 1) == (255, 255, 255)


def bomb() -> bytes:
    """A few hundred bytes that claim 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    content = zlib.compress(bytes(100000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (bomb(), 413),
        (encoded(scene(size=(1001, 1000)), "PNG"), 413),
        (b"", 400),
        (b"GIF89a", 400),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400),
        (b"%PDF-1.7", 400),
        (encoded(scene(), "JPEG")[:200], 400),
        (encoded(scene(), "PNG")[:-30], 400),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), 400),
    ],
    ids=["bomb", "large", "empty", "gif-head", "svg", "pdf", "short-jpeg", "short-png", "zeros"],
)
def test_what_is_no_usable_picture_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(Problem) as caught:
        decode(data, LIMIT)
    assert caught.value.status == status
    assert len(caught.value.message) < 400


SEEDS = [
    encoded(scene(), "PNG"),
    encoded(scene(), "JPEG"),
    encoded(scene("RGBA"), "WEBP"),
    animated(),
    encoded(scene(), "BMP"),
    encoded(scene("I;16"), "TIFF"),
    rotated(),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_damaged_pictures_are_decoded_or_refused(seed: bytes, data: st.DataObject) -> None:
    damaged = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(1, len(damaged)))]
    with contextlib.suppress(Problem):  # any other error fails the test
        picture = decode(bytes(damaged), LIMIT)
        assert len(picture.rgb) == picture.width * picture.height * 3


def limits(hosts: tuple[str, ...] = ()) -> PictureLimits:
    return PictureLimits(max_bytes=10_000, max_pixels=LIMIT, hosts=hosts, timeout_s=2.0)


@pytest.mark.parametrize(
    "url",
    [
        "https://pictures.example/a.png",
        "http://allowed.example/a.png",
        "https://allowed.example:8443/a.png",
        "https://user:word@allowed.example/a.png",
        "https://allowed.example.evil.example/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/a.png",
        "file:///etc/passwd",
        "ftp://allowed.example/a.png",
        "//allowed.example/a.png",
        "https://[broken",
        "data:text/html,<script>",
        "",
    ],
)
def test_only_listed_hosts_are_asked(url: str) -> None:
    with pytest.raises(Problem):
        asyncio.run(open_picture(url, limits(("allowed.example",))))


def test_a_listed_name_that_points_inside_is_not_asked() -> None:
    """`localhost` is on the list, as a name that an attacker's DNS turns inside would be."""
    with pytest.raises(Problem, match="could not be fetched"):
        asyncio.run(open_picture("https://localhost/a.png", limits(("localhost",))))
    with pytest.raises(OSError, match="not public"):
        asyncio.run(PublicResolver().resolve("localhost", 443))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "::1",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "0.0.0.0",
    ],
)
def test_private_addresses(address: str) -> None:
    with pytest.raises(OSError, match="not public"):
        refuse_private([address], "somewhere")


def test_public_addresses() -> None:
    refuse_private(["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"], "example.com")


def test_a_data_url_is_bounded_before_it_is_decoded() -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(20_000)).decode()
    with pytest.raises(Problem) as caught:
        asyncio.run(open_picture(url, limits()))
    assert caught.value.status == 413
