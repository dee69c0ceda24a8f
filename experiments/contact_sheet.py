"""A picture of what each recipe makes of some images: one row an image, as the model sees it.

    python experiments/contact_sheet.py --out experiments/results/augmentation.png
    python experiments/contact_sheet.py FOLDER --rows 8

FOLDER has train/CLASS/ in it, as for ImageFolder. Without one, the photographs are those that come with scikit-learn
(china.jpg by danielbuechele, flower.jpg by vultilion, both CC BY 2.0) and with matplotlib (grace_hopper.jpg, public
domain). A seed fixes the picture.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sklearn.datasets
import torch
from matplotlib import cbook
from PIL import Image, ImageDraw
from torch import Tensor

from ncfinetune.datamodules import ImageFolder

VIEWS = 3
COLUMNS: dict[str, dict[str, Any]] = {
    "plain": {"augmentation": "plain"},
    "standard, strength 0.5": {"augmentation": "standard", "strength": 0.5, "views": VIEWS},
    "standard": {"augmentation": "standard", "views": VIEWS},
    "trivial": {"augmentation": "trivial", "views": VIEWS},
    "simclr, strength 0.5": {"augmentation": "simclr", "strength": 0.5, "views": VIEWS},
    "simclr": {"augmentation": "simclr", "views": VIEWS},
    "mixup": {"augmentation": "plain", "mixup": 1.0},
    "cutmix": {"augmentation": "plain", "cutmix": 1.0},
}
TITLE = 16  # pixels


class FirstBatch(pl.LightningModule):
    """Keeps the first batch that it would train on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.images = batch[0]
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def write_photographs(root: Path) -> None:
    """Three photographs, each a class of its own, so that they make an ImageFolder."""
    own = Path(sklearn.datasets.__file__).parent / "images"
    for path in (
        own / "china.jpg",
        own / "flower.jpg",
        Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))),
    ):
        (root / path.stem).mkdir(parents=True)
        shutil.copy(path, root / path.stem)


def training_batch(root: str, rows: int, size: int, **arguments: Any) -> Tensor:
    """Images of the first training batch in 0..255, (rows, views, 3, size, size)."""
    pl.seed_everything(1, verbose=False)
    data = ImageFolder(root, image_size=size, batch_size=rows, num_workers=0, val_fraction=0, **arguments)
    model = FirstBatch()
    pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)
    images = model.images if model.images.ndim == 5 else model.images.unsqueeze(1)
    pixels = images * data.std.view(-1, 1, 1) + data.mean.view(-1, 1, 1)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--out", default="augmentation.png")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--image_size", type=int, default=224, help="side of the images that the model would see")
    parser.add_argument("--shown_size", type=int, default=64, help="side of an image in the picture")
    options = parser.parse_args()
    side, gap = options.shown_size, options.shown_size // 4
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "train")
        columns = {
            title: training_batch(options.folder or folder, options.rows, options.image_size, **arguments)
            for title, arguments in COLUMNS.items()
        }
    width = sum(images.shape[1] * side + gap for images in columns.values())
    sheet = Image.new("RGB", (width, TITLE + options.rows * side), "white")
    left = 0
    for title, images in columns.items():
        ImageDraw.Draw(sheet).text((left, 2), title, fill="black")
        for row, views in enumerate(images):
            for column, view in enumerate(views):
                tile = Image.fromarray(view.permute(1, 2, 0).numpy()).resize((side, side))
                sheet.paste(tile.crop((0, 0, side - 1, side - 1)), (left + column * side, TITLE + row * side))
        left += images.shape[1] * side + gap
    sheet.quantize(256).save(options.out)


if __name__ == "__main__":
    main()
