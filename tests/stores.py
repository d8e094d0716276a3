"""Data sets of few small images, packed, and the same in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedsam.data.datasets import Dataset
from fedsam.data.sources.listing import Listing, Part
from fedsam.data.sources.load import load
from fedsam.data.sources.pictures import Encoded
from fedsam.data.store import Store
from fedsam.pack.writer import encoded, write


def listing_of(dataset: Dataset, folder: Path) -> Listing:
    """Return a listing of PNG files with a data set's pixels, and of its masks in a folder."""
    parts = []
    for name in ("train", "test"):
        images, targets = getattr(dataset, f"{name}_images"), getattr(dataset, f"{name}_labels")
        files = [
            Encoded(f"{name} {row}", encoded(pixels.permute(1, 2, 0).numpy(), "png"))
            for row, pixels in enumerate(images)
        ]
        paths = []
        for row, mask in enumerate(targets if targets.dim() == 3 else ()):
            paths.append(str(folder / f"{name}{row}.png"))
            Image.fromarray(mask.numpy()).save(paths[-1])
        columns = {
            what: column.numpy()
            for what in ("classes", "domains")
            if (column := getattr(dataset, f"{name}_{what}")) is not None
        }
        parts.append(Part(files, paths or targets.numpy(), **columns))
    names = tuple(map(str, range(dataset.classes)))
    train, test = parts
    return Listing(
        dataset.name,
        train,
        test,
        names,
        domains=dataset.domain_names,
        task=dataset.task,
        ignore=dataset.ignore,
    )


def packed_of(dataset: Dataset, out: Path, encoding: str = "png") -> Path:
    """Return a new folder with a data set packed in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    channels = dataset.train_images.shape[1]
    listing = listing_of(dataset, out.parent)
    write(out, listing, side=0, encoding=encoding, channels=channels)
    return out


def pixels_of(store: Store) -> torch.Tensor:
    """Return all images of a store (N, C, H, W)."""
    return store.read(torch.arange(len(store))).permute(0, 3, 1, 2).contiguous()


def in_memory(folder: Path) -> Dataset:
    """Return a packed data set with all of its pixels in memory: a --dataset of its --data-root."""
    dataset = load(str(folder), folder)
    held: dict[str, Any] = {
        f"{part}_images": pixels_of(getattr(dataset, f"{part}_images")) for part in PARTS
    }
    for part in PARTS:
        targets = getattr(dataset, f"{part}_labels")
        if not isinstance(targets, torch.Tensor):
            held[f"{part}_labels"] = pixels_of(targets)[:, 0]
    return replace(dataset, **held)


def noise(many: int, height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Return uint8 (N, H, W, C), smooth enough for a JPEG to be near it."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (many, 2, 3, channels), dtype=np.uint8)
    out = []
    for image in small:
        picture = Image.fromarray(image[..., 0] if channels == 1 else image)
        out.append(np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)))
    return np.stack(out).reshape(many, height, width, channels)


PARTS = ("train", "test")
