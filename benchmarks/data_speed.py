"""How many images a second one core can read, from each kind of place, and where its time goes.

    python3 benchmarks/data_speed.py [--quick] [--data_dir DIR]

The pictures are made here: faces of the demo set under noise whose amplitude falls with the
frequency as in photographs. Rates through `open_dataset(...)[i]` are of processor time, so that
other work on the machine does not count; those through `load_batches` (one worker reads, the
caller only takes) are of the clock. All files are in the page cache: disks are not measured.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Figures, machine, show
from dbae.data import ImageDataset, decode, demo, open_dataset, transform
from dbae.data.datasets import FileImages
from dbae.data.lmdb_writer import LmdbConfig, write_lmdb
from dbae.data.loader import collate, in_batches, load_batches

_BATCH = 32


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A picture with the statistics of a photograph: RGB, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None])
    frequency[0, 0] = 1
    grey, *colours = rng.standard_normal((4, height, width), dtype=np.float32)
    noise = []
    for colour in colours:
        spectrum = np.fft.rfft2(0.8 * grey + 0.6 * colour) / frequency
        plane = np.fft.irfft2(spectrum, s=(height, width))
        noise.append(30 * plane / plane.std())
    face = Image.fromarray(demo.draw(seed, 64)).resize((width, height), Image.Resampling.BICUBIC)
    levels = 0.6 * np.asarray(face, dtype=np.float32) + 50 + np.stack(noise, axis=-1)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def write_folder(path: Path, width: int, height: int, count: int) -> None:
    """`count` pictures as JPEG, of quality 95 and 90 by turns."""
    path.mkdir()
    for i in range(count):
        picture(width, height, i).save(path / f"{i:04d}.jpg", quality=90 if i % 2 else 95)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Processor time of one call: the median after one that finds the caches cold."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def per_core(dataset: ImageDataset, repeats: int) -> float:
    """Images a second that one core reads, one by one."""
    used = range(min(len(dataset), 256))
    return len(used) / seconds(lambda: [dataset[i] for i in used], repeats)


def loaded(dataset: ImageDataset, batches: int) -> float:
    """Images a second that one worker hands over, once it runs."""
    positions = [i % len(dataset) for i in range((batches + 5) * _BATCH)]
    stream = load_batches(dataset, in_batches(positions, _BATCH), 1, pin_memory=False)
    for _ in range(3):  # it starts, and fills its queue
        next(stream)
    times = []
    for _ in range(batches):
        started = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - started)
    return _BATCH / statistics.median(times)


def profile(dataset: ImageDataset, repeats: int) -> str:
    """Microseconds an image of each part of the work."""
    images = dataset.images
    assert isinstance(images, FileImages)
    wanted = dataset.size if images.fast else None
    records = [images.source.read(i) for i in range(min(len(images), _BATCH))]
    pictures = [decode(data, "record", wanted) for data in records]
    items = [dataset[i] for i in range(len(records))]
    parts: dict[str, Callable[[], object]] = {
        "read": lambda: [images.source.read(i) for i in range(len(records))],
        "decode": lambda: [decode(data, "record", wanted) for data in records],
        "cut, resize, to tensor": lambda: [
            transform(image, dataset.size, images.crop, images.fit) for image in pictures
        ],
        "collate": lambda: collate(items),
    }
    return ", ".join(
        f"{name} {1e6 * seconds(work, repeats) / len(records):.0f}" for name, work in parts.items()
    )


def cases(folder: Path, quick: bool) -> Iterator[tuple[str, ImageDataset]]:
    """Each data set to be measured, by name; all files are put into `folder`."""
    count = 64 if quick else 256
    for preset, width, height in (("celeba", 178, 218), ("ffhq", 256, 256)):
        source = folder / preset
        write_folder(source, width, height, count)
        whole = folder / f"{preset}-lmdb"
        write_lmdb(str(source), str(whole), LmdbConfig(workers=0))
        size = 64 if preset == "celeba" else 128
        places: dict[str, Path | str] = {
            "LMDB": whole,
            "zip": shutil.make_archive(str(source), "zip", source),
            "folder": source,
        }
        for kind, path in places.items():
            yield f"{preset} {width}×{height} → {size}, {kind}", _open(preset, path, size)
    small = folder / "small"
    write_lmdb(str(source), str(small), LmdbConfig(size=128, workers=0))
    yield "ffhq, LMDB by make_lmdb --size 128 → 128", _open("ffhq", small, 128)
    for width, height, size, number in ((1024, 1024, 128, 8), (4032, 3024, 64, 2)):
        source = folder / str(width)
        write_folder(source, width, height, number)
        for fast in (False, True):
            name = f"folder {width}×{height} → {size}{', fast_decode' if fast else ''}"
            yield name, _open("folder", source, size, fast)


def _open(preset: str, path: Path | str, size: int, fast: bool = False) -> ImageDataset:
    return open_dataset(preset, str(path), size, "all", fast_decode=fast)


def errors(folder: Path) -> Iterator[tuple[str, str]]:
    """How far `fast_decode` moves the pixels of the large pictures in `folder`."""
    for width, size in ((1024, 128), (1024, 64), (4032, 64), (4032, 128)):
        fast, plain = (_open("folder", folder / str(width), size, fast) for fast in (True, False))
        pairs = [(fast[i].image.double(), plain[i].image.double()) for i in range(len(plain))]
        apart = torch.stack([a - b for a, b in pairs])
        rms, most = float(apart.square().mean().sqrt()), int(apart.abs().max())
        figure = f"RMS {rms:.2f}, at most {most} grey levels from plain"
        yield f"fast_decode, {width} → {size}", figure


def encodings(repeats: int) -> Iterator[tuple[str, str]]:
    """What the records of a 128-pixel LMDB could be: size, and time to read one."""
    image = picture(1024, 1024, 0).resize((128, 128), Image.Resampling.BILINEAR)
    for name, options in (
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
    ):
        out = io.BytesIO()
        image.save(out, name, **options)
        data = out.getvalue()
        took = seconds(lambda data=data: decode(data, "record"), repeats)  # type: ignore[misc]
        yield f"128 pixels as {name}", f"{len(data) / 1024:.0f} KiB, decoded in {1e6 * took:.0f} µs"


def measure(quick: bool, data_dir: str | None = None) -> Figures:
    """Rates, profiles and errors of everything that `cases` makes, and of `data_dir`."""
    repeats = 3 if quick else 7
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        given = [(f"folder, {data_dir}", _open("folder", data_dir, 64))] if data_dir else []
        for name, dataset in [*given, *cases(Path(folder), quick)]:
            figure = f"{per_core(dataset, repeats):5.0f} images/s a core"
            if len(dataset) >= _BATCH:
                figure += f", {loaded(dataset, 20 if quick else 60):5.0f} by one worker"
            rows += [(name, figure), ("    µs an image", profile(dataset, repeats))]
        rows += [*errors(Path(folder)), *encodings(10 * repeats)]
    torch.set_num_threads(threads)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer pictures, under a minute")
    parser.add_argument("--data_dir", help="a folder, zip or LMDB to be measured as well")
    options = parser.parse_args()
    print(machine())
    show("data", measure(options.quick, options.data_dir))


if __name__ == "__main__":
    main()
