"""Image files as they lie on disks: turned, of other depths, damaged; against what a viewer shows."""

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin
from torchvision import transforms as v1

from ncfinetune.datamodules import ImageFolder, Recipe
from ncfinetune.datamodules.decoding import (
    CENTRE,
    Decoding,
    UnknownRangeError,
    UnreadableError,
    centre_seen,
    read_image,
)


def _picture(width: int, height: int) -> Image.Image:
    """Smooth, and different at each corner and along each axis."""
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 4)], axis=-1)
    return Image.fromarray(((waves + 1) * 100 + 20).astype(np.uint8))


def _save_turned(image: Image.Image, file: Any, orientation: int, kind: str = "JPEG") -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, kind, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "size"),
    [("JPEG", (120, 90)), ("JPEG", (500, 700)), ("PNG", (120, 90)), ("WEBP", (120, 90)), ("TIFF", (120, 90))],
)  # the larger JPEG is decoded at a part of its size
def test_images_are_upright(orientation: int, kind: str, size: tuple[int, int]) -> None:
    out, plain = io.BytesIO(), io.BytesIO()
    _save_turned(_picture(*size), out, orientation, kind)
    upright = ImageOps.exif_transpose(Image.open(out)).convert("RGB")
    upright.save(plain, "BMP")
    whole, expected = (read_image("x", 32, content=file.getvalue()).float() for file in (out, plain))
    assert (whole - expected).abs().max() <= (8 if kind == "JPEG" and size == (500, 700) else 0)
    boxes = [[10.0, 20.0, 60.0, 40.0], [5.0, 40.0, 50.0, 45.0]]
    asked = []

    def crop(height: int, width: int) -> list[list[float]]:
        asked.append((width, height))
        return [[side * min(size) / 90 for side in box] for box in boxes]

    views = read_image("x", 24, crop, out.getvalue()).float()
    assert asked == [upright.size]
    for view, (top, left, height, width) in zip(views, crop(*upright.size), strict=True):
        region = (left, top, left + width, top + height)
        shown = np.asarray(upright.resize((24, 24), Image.Resampling.BILINEAR, box=region), np.float32)
        assert np.abs(view.permute(1, 2, 0).numpy() - shown).mean() < 1.5


def test_an_image_of_more_pixels_than_pillow_reads_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    _picture(20, 16).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 159)
    message = (
        f"cannot read {path} as an image: it states more pixels than Pillow's limit of 318 allows; if the file is "
        "intact, make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS, which is half of the limit (159)"
    )
    with pytest.raises(UnreadableError) as caught:
        read_image(str(path), 8)
    assert str(caught.value) == message
    assert centre_seen([str(path)], 8) == CENTRE
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 320)
    assert read_image(str(path), 8).shape == (1, 3, 8, 8)


def test_orientation_holds_in_training_and_in_memory(tmp_path: Path) -> None:
    for part, name in ((part, name) for part in ("train", "val") for name in "ab"):
        (tmp_path / part / name).mkdir(parents=True)
        picture = Image.new("RGB", (40, 40), "black")
        picture.paste("white", (0, 0, 40, 20))
        _save_turned(picture, tmp_path / part / name / f"{part}{name}.jpg", 8)  # the white half ends on the left
    crop = Recipe(min_area=0.95, max_aspect=1.01)
    for in_memory in (False, True):
        data = ImageFolder(str(tmp_path), image_size=8, num_workers=0, augmentation=crop, in_memory=in_memory)
        with pytest.warns(UserWarning, match="byte for byte"):
            data.setup("fit")
        for loader in (data.train_plain_dataloader(), data.train_dataloader(), data.val_dataloader()):
            images, _ = next(iter(loader))  # type: ignore[arg-type]
            assert images[..., 1].min() > 200
            assert images[..., -2].max() < 50


def test_damaged_exif_data_leave_the_picture(tmp_path: Path) -> None:
    _picture(40, 30).save(tmp_path / "image.jpg", exif=b"Exif\x00\x00no TIFF header", quality=95)
    assert read_image(str(tmp_path / "image.jpg"), 8).shape == (1, 3, 8, 8)


def _ramp(low: float, high: float, kind: Any) -> np.ndarray:
    return np.tile(np.linspace(low, high, 64), (64, 1)).astype(kind)


def _saved(values: np.ndarray, path: Path, **arguments: Any) -> str:
    Image.fromarray(values).save(path, **arguments)
    return str(path)


EXPECTED = np.tile(np.linspace(0, 255, 64), (64, 1))


def _assert_ramp(path: str, value_range: tuple[float, float] | None = None) -> None:
    found = read_image(path, 64, decoding=Decoding(value_range=value_range))[0].float().numpy()
    assert np.abs(found - EXPECTED).max() <= 1.01  # 16 bits of a colour are cut to the upper eight


def _tiff(path: Path, tags: dict[int, Any]) -> dict[str, Any]:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag] = value
    return {"tiffinfo": info}


def test_the_whole_range_of_16_bits(tmp_path: Path) -> None:
    for suffix in ("png", "tif", "pgm", "jp2"):
        _assert_ramp(_saved(_ramp(0, 65535, np.uint16), tmp_path / f"ramp.{suffix}"))


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        (_ramp(0, 4095, np.uint16), (0, 4095)),
        (_ramp(1000, 2000, np.uint16), (1000, 2000)),
        (_ramp(0, 255, np.int32), (0, 255)),
        (_ramp(-1000, 3000, np.int32), (-1000, 3000)),
        (_ramp(0, 1, np.float32), (0, 1)),
    ],
)
def test_a_range_that_is_given_or_stated(values: np.ndarray, value_range: tuple[float, float], tmp_path: Path) -> None:
    path = tmp_path / "ramp.tif"
    with pytest.raises(UnknownRangeError, match=r"cannot use .*ramp.tif: its .*value_range"):
        read_image(_saved(values, path), 8)
    _assert_ramp(str(path), value_range)
    kind = "f" if values.dtype == np.float32 else None
    limits = (
        {340: value_range[0], 341: value_range[1]} if kind else {340: int(value_range[0]), 341: int(value_range[1])}
    )
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in limits.items():
        info.tagtype[tag] = 11 if kind else 9  # a float, or a signed number of 32 bits
        info[tag] = value
    _assert_ramp(_saved(values, tmp_path / "stated.tif", tiffinfo=info))


def test_12_bits_in_a_png_are_refused_by_name_and_read_by_the_option(tmp_path: Path) -> None:
    path = _saved(_ramp(0, 4095, np.uint16), tmp_path / "scan.png")
    message = r"cannot use .*scan.png: its 16-bit pixels end at 4095, which would be nearly black; give the values that"
    with pytest.raises(UnknownRangeError, match=message):
        read_image(path, 8)
    _assert_ramp(path, (0, 4095))
    assert read_image(path, 64, decoding=Decoding(value_range=(0, 65535))).max() == 16
    assert read_image(_saved(np.zeros((8, 8), np.uint16), tmp_path / "black.png"), 8).max() == 0


def _pgm(path: Path, values: np.ndarray, largest: int) -> str:
    path.write_bytes(b"P5 %d %d %d\n" % (*values.shape[::-1], largest) + values.astype(">u2").tobytes())
    return str(path)


def test_a_pgm_states_its_range_unless_that_is_all(tmp_path: Path) -> None:
    """Pillow stretches what it reads of one by the largest value that it states."""
    values = _ramp(0, 4095, np.uint16)
    stated = _pgm(tmp_path / "stated.pgm", values, 4095)
    _assert_ramp(stated)
    _assert_ramp(stated, (0, 4095))
    half = _pgm(tmp_path / "half.pgm", _ramp(1000, 2000, np.uint16), 4095)
    _assert_ramp(half, (1000, 2000))
    dark = _pgm(tmp_path / "dark.pgm", values // 8, 4095)  # whose range is known
    assert read_image(dark, 64).max() == round(511 / 4095 * 255)
    for path in (_pgm(tmp_path / "all.pgm", values, 65535), _saved(values, tmp_path / "all.jp2")):
        with pytest.raises(UnknownRangeError, match="its 16-bit pixels end at 4095, which would be nearly black"):
            read_image(path, 8)
        _assert_ramp(path, (0, 4095))


def test_a_very_long_image_is_not_resized_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *a, **k: sizes.append(size) or resize(image, size, *a, **k)
    )
    values = np.random.default_rng(0).integers(0, 256, (16, 1600, 3), dtype=np.uint8)
    values = np.repeat(np.repeat(values, 2, 0), 2, 1)
    for name, pixels in (("wide", values), ("high", values.swapaxes(0, 1))):
        path = _saved(np.ascontiguousarray(pixels), tmp_path / f"{name}.png")
        sizes.clear()
        found = read_image(path, 28)[0].permute(1, 2, 0).float().numpy()
        assert sizes == [(28, 28)]
        with Image.open(path) as image:
            usual = np.asarray(v1.Compose([v1.Resize(32), v1.CenterCrop(28)])(image), np.float32)
        assert np.abs(found - usual).max() <= 2  # rounded once, not between rows and columns
    assert (read_image(_saved(np.full((1, 4000, 3), 7, np.uint8), tmp_path / "thin.png"), 224) == 7).all()
    assert sizes[-1] == (224, 224)


def test_packed_12_bit_tiffs_state_their_range(tmp_path: Path) -> None:
    """A file of 12 bits a sample, which Pillow reads and cannot write: two pixels in three bytes."""
    values = _ramp(0, 4095, np.uint16)
    left, right = values[:, 0::2].astype(int), values[:, 1::2].astype(int)
    data = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=-1).astype(np.uint8).tobytes()
    tags = [(256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "packed.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory)
    _assert_ramp(str(tmp_path / "packed.tif"))


def test_white_is_zero_in_16_bits_too(tmp_path: Path) -> None:
    arguments = _tiff(tmp_path, {262: 0})
    values = _ramp(0, 65535, np.uint16)
    path = _saved(values, tmp_path / "image.tif", **arguments)
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0  # type: ignore[attr-defined]
        stored = np.asarray(image)
    found = read_image(path, 64)[0, 0].float().numpy()
    assert np.abs(found - (255 - stored / 257.0)).max() <= 1.01


def _png16(values: np.ndarray) -> bytes:
    """A colour PNG of 16 bits a channel, which Pillow cannot write."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "colour.png"
    path.write_bytes(_png16(np.stack([_ramp(0, 65535, np.uint16)] * 3, axis=-1)))
    _assert_ramp(str(path))
    path.write_bytes(_png16(np.stack([_ramp(0, 4095, np.uint16)] * 3, axis=-1)))
    for value_range in (None, (0, 4095)):
        with pytest.raises(
            UnknownRangeError, match=r"16 bits a channel, of which only the upper 8 are read and end at"
        ):
            read_image(str(path), 8, decoding=Decoding(value_range=value_range))
    assert read_image(str(path), 8, decoding=Decoding(value_range=(0, 65535))).max() <= 16


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    values = _ramp(0, 1, np.float32)
    values[3, 3] = np.nan
    with pytest.raises(UnreadableError, match="cannot read .*: some of its pixels are not finite numbers"):
        read_image(_saved(values, tmp_path / "nan.tif"), 8, decoding=Decoding(value_range=(0, 1)))


def _first_batch(data: ImageFolder) -> Any:
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_a_range_of_a_data_set(tmp_path: Path) -> None:
    for name, low in (("a", 0), ("b", 1000)):
        for number in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            _saved(_ramp(low + number, 4095, np.uint16), tmp_path / name / f"{number}.png")
    data = ImageFolder(str(tmp_path), image_size=64, num_workers=0, val_fraction=0.25)
    for spoilt in (data, ImageFolder(str(tmp_path), skip_broken=True)):
        with pytest.raises(UnknownRangeError, match="value_range"):  # not left out as broken
            _first_batch(spoilt)
    data = ImageFolder(str(tmp_path), image_size=64, num_workers=0, val_fraction=0.25, value_range=(0, 4095))
    data.setup("fit")
    for loader in (data.train_plain_dataloader(), data.val_dataloader()):
        assert next(iter(loader))[0].max() == 255  # type: ignore[arg-type]
    assert next(iter(data.train_dataloader()))[0].max() > 128  # a crop; 16 by the range of the file
    data.predict_files(tmp_path)
    assert next(iter(data.predict_dataloader()))[0].max() == 255
    with pytest.raises(
        ValueError, match=r"expected value_range to be black and white, black below white, got \(5, 5\)"
    ):
        ImageFolder(str(tmp_path), value_range=(5, 5))


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged tags
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "JPEG2000"])
def test_damaged_files_raise_one_error(kind: str) -> None:
    """Whatever bytes are changed or lacking, a file is read, or is refused by the one error that names it."""
    rng = random.Random(0)
    out = io.BytesIO()
    _picture(40, 30).save(out, kind)
    whole, refused = out.getvalue(), 0
    for _ in range(60):
        spoilt = bytearray(whole)
        for _ in range(rng.randrange(1, 12)):
            spoilt[rng.randrange(len(spoilt) if rng.random() < 0.5 else min(len(spoilt), 80))] = rng.randrange(256)
        cut = bytes(spoilt[: rng.randrange(1, len(spoilt) + 1)] if rng.random() < 0.5 else spoilt)
        try:
            assert read_image("x", 8, content=cut).shape == (1, 3, 8, 8)
        except (UnreadableError, UnknownRangeError):
            refused += 1
    assert refused


def test_rows_of_a_banner_are_not_seen(tmp_path: Path) -> None:
    """At full size and where a JPEG is decoded at an eighth; the filter must not reach into the banner either."""
    for width, height in ((60, 40), (1600, 1200)):
        image = Image.new("RGB", (width, height + 20), "white")
        image.paste("black", (0, 0, width, height))
        for suffix in ("png", "jpg"):
            path = str(tmp_path / f"{width}.{suffix}")
            image.save(path, quality=100)
            asked: list[tuple[int, int]] = []

            def everything(high: int, wide: int, asked: list[tuple[int, int]] = asked) -> list[list[float]]:
                asked.append((wide, high))
                return [[0.0, 0.0, high, wide], [high / 2, 0.0, high / 2, wide]]

            found = read_image(path, 32, everything, decoding=Decoding(banner=20))
            assert asked == [(width, height)]
            assert found.max() <= (0 if suffix == "png" else 12)
            assert read_image(path, 32, decoding=Decoding(banner=20)).max() <= (0 if suffix == "png" else 12)
    with pytest.raises(UnreadableError, match="it has 60 rows, 99 of which are a banner"):
        read_image(str(tmp_path / "60.png"), 8, decoding=Decoding(banner=99))
    assert read_image(str(tmp_path / "60.png"), 8, lambda h, w: [[h - 8.0, 0.0, 8.0, 8.0]]).min() == 255
