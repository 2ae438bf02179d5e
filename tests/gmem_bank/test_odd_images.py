"""Odd images of every kind, made here from known numbers, and what a person would see of them."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from gmem_bank.decoding import decode_image
from gmem_bank.errors import SourceError
from tests.picture_oracle import CHANNELS, chunk, over_white, read_png, write_png, write_tiff

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
LARGE = np.kron(PICTURE, np.ones((16, 16, 1), np.uint8))
"""Flat blocks, which lossy formats keep."""
TURNED = {
    1: np.asarray, 2: lambda a: a[:, ::-1], 3: lambda a: np.rot90(a, 2), 4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}  # fmt: skip
"""What a viewer does to the stored pixels for each EXIF orientation."""


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def near(got: np.ndarray, wanted: np.ndarray, tolerance: float = 0) -> None:
    assert got.shape == (*wanted.shape[:2], 3)
    assert np.abs(got.astype(float) - wanted).max() <= tolerance


def grey(values: list[list[int]]) -> np.ndarray:
    return np.repeat(np.array(values)[..., None], 3, axis=2)


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize(
    ("depth", "colour_type"), [(d, c) for c, ds in ((0, (1, 2, 4, 8, 16)), (2, (8, 16)), (4, (8, 16)), (6, (8, 16))) for d in ds]
)  # fmt: skip
def test_png_of_every_depth_with_and_without_a_clear_colour(depth: int, colour_type: int, clear: bool) -> None:
    """Samples of 1 to 16 bits, with alpha or one transparent colour, equal the formula over white; 16 bits to a step or two."""
    samples = np.random.default_rng(depth).integers(0, 2**depth, (9, 13, CHANNELS[colour_type]))
    samples[4] = samples[0, 0] = 2**depth * 3 // 7
    extra = ()
    if clear and colour_type in (0, 2):
        extra = (chunk(b"tRNS", struct.pack(f">{samples.shape[2]}H", *samples[0, 0].tolist())),)
    data = write_png(samples, depth, colour_type, *extra)
    wanted = read_png(data)
    assert (wanted[4] == 255).all() or not extra
    near(decode_image(data), wanted, (1 if colour_type < 4 else 2) if depth == 16 else 0)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_png_with_alpha(depth: int) -> None:
    """Every colour of a palette has its own transparency; those past the list have none."""
    rng = np.random.default_rng(depth)
    samples = rng.integers(0, 2**depth, (8, 9, 1))
    palette = chunk(b"PLTE", rng.integers(0, 256, 3 * 2**depth, dtype=np.uint8).tobytes())
    alphas = chunk(b"tRNS", rng.integers(0, 256, 2**depth - 1, dtype=np.uint8).tobytes())
    data = write_png(samples, depth, 3, palette, alphas)
    near(decode_image(data), read_png(data), 1)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "TGA", "JPEG2000", "PNG"])
def test_alpha_of_every_format_is_over_white(kind: str) -> None:
    """The composite is colour · alpha + white · (1 − alpha), whatever file holds it."""
    alpha = np.random.default_rng(1).integers(0, 256, (6, 10, 1), dtype=np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(np.concatenate([PICTURE, alpha], axis=2)), kind, **options)
    near(decode_image(data), over_white(PICTURE / 255, alpha / 255), 1)


def test_the_clear_colour_of_a_gif_and_a_palette_tiff() -> None:
    """A palette's colours are seen, and through its clear one white."""
    index = np.arange(60, dtype=np.uint8).reshape(6, 10)
    palette = np.random.default_rng(6).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    near(decode_image(saved(image, "TIFF")), palette[index])
    wanted = palette[index].copy()
    wanted[0, 7] = 255
    near(decode_image(saved(image, "GIF", transparency=7)), wanted)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_every_format(kind: str, orientation: int) -> None:
    """The stored pixels are turned as the EXIF standard draws it, once, in every format that carries EXIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    }
    options["MPO"] = options["JPEG"]
    data = saved(Image.fromarray(LARGE), kind, exif=exif, **options.get(kind, {}))
    wanted = TURNED[orientation](LARGE).astype(float)
    got = decode_image(data).astype(float)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted)[8::16, 8::16].max() <= (0 if kind in ("PNG", "TIFF", "WEBP") else 12)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i2", ">i2", "<u4", "<i4", ">i4", "<f4", ">f4"])
def test_grey_tiff_of_every_sample_format(dtype: str) -> None:
    """Black is 0 and white the largest number of the type (1 for floats); below black is black."""
    kind = np.dtype(dtype)
    white = 1.0 if kind.kind == "f" else float(np.iinfo(kind).max)
    shares = np.linspace(0, 1, 30).reshape(5, 6)
    samples = (shares * white).astype(kind)
    wanted = np.rint(samples.astype(float) / white * 255)
    if kind.kind != "u":
        samples[0, 0] = -3
    near(decode_image(write_tiff(samples)), grey(wanted), 0)


def test_grey_beyond_8_bits_where_white_is_something_else() -> None:
    """12 bits end at 4095, WhiteIsZero is turned round, 32-bit integers and floats may hold smaller ranges, gaps are black."""
    twelve = np.array([[0, 2048, 4095, 273]], np.uint16)
    near(decode_image(write_tiff(twelve, bits=12)), grey([[0, 128, 255, 17]]))
    near(decode_image(write_tiff(np.array([[0, 65535, 257]], "<u2"), photometric=0)), grey([[255, 0, 254]]))
    near(decode_image(write_tiff(np.array([[0, 65535, 257]], "<i4"))), grey([[0, 255, 1]]))
    near(decode_image(write_tiff(np.array([[0, 255, 7]], "<f4"))), grey([[0, 255, 7]]))
    near(decode_image(write_tiff(np.array([[0, 65535, 257]], "<f4"))), grey([[0, 255, 1]]))
    near(decode_image(write_tiff(np.array([[0, 1e6, 2e5]], "<f4"))), grey([[0, 255, 51]]))
    near(decode_image(write_tiff(np.array([[np.nan, np.inf, -np.inf, 0.4]], "<f4"))), grey([[0, 255, 0, 102]]))
    near(decode_image(b"P5 3 1 1023\n" + np.array([0, 1023, 341], ">u2").tobytes()), grey([[0, 255, 85]]))
    near(decode_image(b"Pf 3 1 -1.0\n" + np.array([0, 1, 0.2], "<f4").tobytes()), grey([[0, 255, 51]]))


def test_16_bit_colour_tiff() -> None:
    """Of 16 bits a channel the upper 8 are seen."""
    samples = np.random.default_rng(2).integers(0, 65536, (5, 7, 3)).astype("<u2")
    data = write_tiff(samples.reshape(5, 21), (256, 7), (277, 3), photometric=2)
    near(decode_image(data), samples / 257, 1)


def ink(cmyk: np.ndarray) -> np.ndarray:
    """RGB of inks without a profile: each of cyan, magenta and yellow darkens its opposite, black all."""
    return (1 - cmyk[..., :3] / 255) * (1 - cmyk[..., 3:] / 255) * 255


def test_cmyk_jpeg_tiff_and_the_inks_of_adobe() -> None:
    """Inverted inks in JPEG by Adobe, plain ones in other JPEG and in TIFF, and YCCK, where Y, Cb and Cr stand for the inverted inks."""
    inks = np.random.default_rng(3).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    image = Image.fromarray(np.kron(inks, np.ones((16, 16, 1), np.uint8)), "CMYK")
    near(decode_image(saved(image, "TIFF"))[8::16, 8::16], ink(inks), 2)
    data = saved(image, "JPEG", quality=100, subsampling=0)
    near(decode_image(data)[8::16, 8::16], ink(inks), 6)
    marker = data.index(b"\xff\xee")
    plain = data[:marker] + data[marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big") :]
    near(decode_image(plain)[8::16, 8::16], ink(255 - inks), 6)  # what was written inverted is now meant as it stands
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    ycck = data[:transform] + b"\x02" + data[transform + 1 :]
    y, cb, cr, k = np.moveaxis(255 - inks.astype(float), 2, 0)
    rgb = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    complement = np.stack(rgb, axis=2).clip(0, 255)  # libjpeg: C = 255 − R, and Adobe stores 255 − C
    near(decode_image(ycck)[8::16, 8::16], ink(np.concatenate([complement, 255 - k[..., None]], axis=2)), 6)


def test_lab_and_embedded_profiles() -> None:
    """L*a*b* shows its colours; a sound, a damaged and a foreign colour profile change no pixel."""
    lab = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 0], [137, 80, 67]]], np.uint8), "LAB")
    got = decode_image(saved(lab, "TIFF")).astype(int)[0]
    assert np.abs(got[:2] - [[255] * 3, [0] * 3]).max() <= 1
    assert got[2, 0] > 230 > 60 > got[2, 1]  # L* 54, a* 80, b* 67: red
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for wrong in (profile, profile[:50], b"\0" * 500):
        near(decode_image(saved(Image.fromarray(PICTURE), "PNG", icc_profile=wrong)), PICTURE)
        near(decode_image(saved(Image.fromarray(PICTURE), "TIFF", icc_profile=wrong)), PICTURE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_damaged_exif_loses_no_picture(kind: str) -> None:
    """Metadata cut, scrambled or absurd leave the pixels as they are stored."""
    whole = Image.Exif()
    whole[0x0112], whole[0x010E] = 1, "words"
    sound = whole.tobytes()
    rng = np.random.default_rng(4)
    bad = [b"", b"Exif\0\0", b"junk" * 9, sound[:12], sound[:-9], b"Exif\0\0II*\0\xff\xff\xff\xff"]
    bad += [bytes(rng.integers(0, 256, 64, dtype=np.uint8)) for _ in range(9)]
    for number in (0, 9, 65535):
        whole[0x0112] = number
        bad.append(whole.tobytes())
    plain = decode_image(saved(Image.fromarray(LARGE), kind, lossless=True))
    for exif in bad:
        data = _with_exif(kind, exif)
        near(decode_image(data), plain)


def _with_exif(kind: str, exif: bytes) -> bytes:
    if kind == "PNG":
        return write_png(LARGE, 8, 2, chunk(b"eXIf", exif))
    plain = saved(Image.fromarray(LARGE), kind, lossless=True)
    if kind == "JPEG":
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    if kind == "WEBP":
        vp8l = plain[12:]
        header = b"VP8X" + struct.pack("<I", 10) + b"\x08\0\0\0" + struct.pack("<HBHB", 159, 0, 95, 0)
        body = b"WEBP" + header + vp8l + b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return plain + exif


def test_of_animations_the_first_frame() -> None:
    """GIF, WebP, APNG, TIFF and AVIF of three frames give their first."""
    frames = [Image.fromarray(np.roll(LARGE, 16 * shift, axis=0)) for shift in range(3)]
    for kind, tolerance in (("PNG", 0), ("TIFF", 0), ("WEBP", 0), ("AVIF", 12), ("GIF", 0)):
        options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "AVIF" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        near(decode_image(data)[8::16, 8::16], PICTURE, tolerance)


def test_what_is_no_image_is_named() -> None:
    """A HEIC, a web page and their like are told apart from a damaged file by what they hold."""
    for data, word in (
        (write_tiff(np.ones((2, 2))), "a TIFF of a kind"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC image: convert"), (b"<!DOCTYPE html><html></html>", "web page"),
        (b"8BPS\0\1", "Photoshop"), (b"\xff\x0a\x7f\x7f", "JPEG XL"), (b"\x89PNG\r\n\x1a\n", "not a readable"),
        (b"\xff\xd8\xff\xe0", "not a readable"), (b"II*\0\x08\0\0\0", "not a readable"), (b"\0", "not known"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=word) as caught:
            decode_image(data)
        assert "0x" not in str(caught.value)


def test_sizes_beyond_the_cap_are_refused_before_memory_is_taken() -> None:
    """A header that promises 3.6 thousand million pixels costs nothing, however it is said."""
    for width, height in ((60_000, 60_000), (2**31 - 1, 1), (1, 178_956_971)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        with pytest.raises(SourceError, match="pixels"):
            decode_image(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(SourceError, match="pixels"):
        decode_image(b"P6 50000 50000 255\n")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TGA", "TIFF", "QOI", "JPEG2000", "PPM", "AVIF"])
def test_cut_and_scrambled_files_never_crash(kind: str) -> None:
    """A file cut anywhere in its first nine tenths is refused, or shown whole; scrambled bytes give pixels or the reason."""
    data = saved(Image.fromarray(LARGE), kind)
    rng = np.random.default_rng(5)
    for share in rng.uniform(0.02, 0.9, 12):
        with pytest.raises(SourceError):
            decode_image(data[: int(share * len(data))])
    for _ in range(60):
        noisy = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            noisy[place] = rng.integers(0, 256)
        try:
            pixels = decode_image(bytes(noisy), max_pixels=10**6)
        except SourceError:
            continue
        assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
