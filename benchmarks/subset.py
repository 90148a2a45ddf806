"""A data set of the first images of another one, for a detector to learn by heart.

    python -m benchmarks.subset coco.yaml --images 16 --out runs/sixteen/data.yaml

Its train and val are the same images.
"""

import argparse
import json
from pathlib import Path

from core import cli
from core.data.sources import data_files
from core.errors import UserError


def write_subset(source: Path, count: int, out: Path) -> None:
    """Write a dataset YAML and its annotation file beside it; images stay where they are.

    Args:
        source: dataset YAML or COCO folder.
        count: number of training images, those of the lowest ids.
        out: the YAML to write.

    Raises:
        UserError: fewer than one image wanted, or data that cannot be opened.
    """
    if count < 1:
        raise UserError(f"--images must be at least 1, got {count}")
    images, annotations = data_files(source)["train"]
    content = json.loads(annotations.read_text(encoding="utf-8"))
    chosen = sorted(content["images"], key=lambda image: image["id"])[:count]
    ids = {image["id"] for image in chosen}
    rows = [row for row in content["annotations"] if row["image_id"] in ids]
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".json")
    part.write_text(json.dumps({**content, "images": chosen, "annotations": rows}), encoding="utf-8")
    split = json.dumps({"images": str(images.resolve()), "annotations": part.name})  # JSON is YAML
    out.write_text(f"train: {split}\nval: {split}\n", encoding="utf-8")
    print(f"{len(chosen)} images and {len(rows)} boxes in {out}")


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="DATA", help="dataset YAML or COCO folder")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="number of images, default 16")
    parser.add_argument("--out", type=Path, required=True, metavar="YAML", help="dataset YAML to write")
    options = parser.parse_args()
    write_subset(options.source, options.images, options.out)


if __name__ == "__main__":
    cli.run(main)
