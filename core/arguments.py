"""The command lines of `evaluate`, `predict`, `visualize`, `convert`, the same for every method (imports no torch)."""

from collections.abc import Sequence
from pathlib import Path

from core.cli import OneLineParser

SPLIT_HELP = "default: val; test-dev: COCO's test images without annotations, only detections.json is written"


def evaluate_parser(method: str) -> OneLineParser:
    """`python -m <method>.evaluate WEIGHTS [--data D] [--split val]`."""
    parser = OneLineParser(
        prog=f"python -m {method}.evaluate",
        description="The 12 COCO numbers of a trained model; also writes metrics.json and detections.json.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="runs/.../best.pt or a released .safetensors")
    parser.add_argument(
        "--data", help="COCO or VOC folder, dataset YAML or shapes; default: what the model was trained on"
    )
    parser.add_argument("--split", choices=("train", "val", "test", "test-dev"), default="val", help=SPLIT_HELP)
    parser.add_argument(
        "--out", type=Path, help="folder of results; default: WEIGHTS' folder + /evaluate-<split>[-tta]"
    )
    parser.add_argument("--backend", choices=("faster", "pycocotools"), default="faster", help="who computes AP")
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--batch-size", type=int, help="images of a forward over all processes")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation: 26 views of each image, merged")
    add_hardware(parser)
    return parser


def predict_parser(method: str) -> OneLineParser:
    """`python -m <method>.predict WEIGHTS IMAGE|FOLDER... [--score 0.3]`."""
    parser = OneLineParser(
        prog=f"python -m {method}.predict",
        description="Draws a trained model's detections into images and writes them all to predictions.json.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="runs/.../best.pt or a released .safetensors")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders of them, or shapes")
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: WEIGHTS' folder + /predictions")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score that is drawn and written; default: 0.3")
    add_hardware(parser)
    return parser


def visualize_parser(method: str) -> OneLineParser:
    """`python -m <method>.visualize WEIGHTS IMAGE... [--data D] [--split val]`."""
    parser = OneLineParser(
        prog=f"python -m {method}.visualize",
        description="Draws which anchors become positive and negative for each object of an image, and why.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="runs/.../best.pt or a released .safetensors")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="file names or ids of the data's images, or shapes for drawn ones"
    )
    parser.add_argument(
        "--data", help="COCO or VOC folder, dataset YAML or shapes; default: what the model was trained on"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="val", help="the images' split; default: val"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the pictures; default: WEIGHTS' folder + /visualize-<split>"
    )
    add_hardware(parser)
    return parser


def convert_parser(method: str, detectors: Sequence[str] = ()) -> OneLineParser:
    """`python -m <method>.convert IN OUT.safetensors [--detector D] [--classes FILE]`; D where there are several."""
    parser = OneLineParser(
        prog=f"python -m {method}.convert",
        description="A checkpoint of the authors' code, of MMDetection or of our training as a released model: one "
        "safetensors file with configuration, classes, geometry and profile inside. No code in the checkpoint is run.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="checkpoint, such as a .pth or runs/.../best.pt")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="released model to write")
    parser.set_defaults(detector=None)
    if detectors:
        parser.add_argument(
            "--detector", choices=detectors, help="whose weights; needed where the file does not say it"
        )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="annotation file, or one name a line; default: COCO's 80"
    )
    parser.add_argument("--licence", metavar="TEXT", help="note on the licence of the weights, kept in the file")
    parser.add_argument("--force", action="store_true", help="replace OUT.safetensors if it exists")
    return parser


def add_hardware(parser: OneLineParser) -> None:
    """Where and how the network runs."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of the network")
    parser.add_argument("--deterministic", action="store_true", help="one image per forward, deterministic kernels")
