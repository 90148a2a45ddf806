"""torchvision's FCOS with ResNet-18, the peer that PAA is compared with at an equal budget.

    python -m benchmarks.baselines.fcos --data bccd.yaml --backbone-weights resnet18.pth --out runs/fcos-0/metrics.json

Architecture, targets, losses and decoding are torchvision's (Tian et al., ICCV 2019). The recipe is
torchvision's reference one for the batch: learning rate 0.01 / 16 an image, gradients clipped at 10, one drop.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from core import cli
from core.backbone import read_weights
from core.data.sources import open_data
from core.data.table import Table
from core.errors import UserError
from core.evaluator import DetectionArrays, coco_metrics, concatenate, ground_truth_from_table
from core.runlog import write_json

SIZE = (256, 342)  # height, width in pixels of every input
LR = 0.01 / 16  # per image of the batch, torchvision's reference recipe
WARMUP_STEPS = 50  # linear
DROP_AT = 0.75  # fraction of the run at which the learning rate falls to a tenth
MAX_GRAD_NORM = 10.0
SCORE_THRESHOLD = 0.05  # PAA's; lower than torchvision's, which costs FCOS recall and is measured beside it
TORCHVISION_THRESHOLD = 0.2
MAX_DETECTIONS = 100


class Example(NamedTuple):
    """An image at input size with its objects."""

    image: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (n, 4) float32 xyxy, pixels of `image`
    labels: Tensor  # (n,) int64, 0..C-1


def build_fcos(num_classes: int, backbone_weights: str) -> FCOS:
    """FCOS on ResNet-18 with frozen batch norm; stem and first stage are frozen, as in PAA's presets.

    Args:
        num_classes: C.
        backbone_weights: file with a torchvision ResNet-18 state dict, or none.
    """
    pyramid = LastLevelP6P7(256, 256)  # P6 from P5, as torchvision's fcos_resnet50_fpn
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=3, returned_layers=[2, 3, 4], extra_blocks=pyramid
    )
    if backbone_weights != "none":
        load_body(backbone.body, Path(backbone_weights))
    net = FCOS(backbone, num_classes, *SIZE, score_thresh=SCORE_THRESHOLD, detections_per_img=MAX_DETECTIONS)
    return net.to(memory_format=torch.channels_last)


def load_body(body: nn.Module, path: Path) -> None:
    """The weights of a torchvision ResNet without its classifier. UserError if the file is no such state dict."""
    saved = read_weights(path)
    try:
        body.load_state_dict({name: saved[name] for name in body.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: no torchvision ResNet-18 state dict ({error})") from None


def load_examples(table: Table) -> list[Example]:
    """All images of a split, resized to `SIZE` whatever their shape, with the boxes that are no crowds."""
    return [load_example(table, index) for index in range(len(table))]


def load_example(table: Table, index: int) -> Example:
    """One image of a split; see `load_examples`."""
    height, width = SIZE
    image = Image.fromarray(table.read_image(index))
    scale = torch.tensor([width / image.width, height / image.height] * 2)
    pixels = torch.from_numpy(np.array(image.resize((width, height)))).permute(2, 0, 1)
    rows = table.box_slice(index)
    keep = ~table.crowd[rows]
    boxes = torch.tensor(table.boxes_xywh[rows][keep], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Example(pixels, boxes * scale, torch.tensor(table.labels[rows][keep], dtype=torch.int64))


def learning_rate(step: int, steps: int, batch_size: int) -> float:
    """Learning rate of step 1..steps: linear warm-up, one drop by ten."""
    warmup = min(1.0, step / WARMUP_STEPS)
    return LR * batch_size * warmup * (0.1 if step > steps * DROP_AT else 1.0)


def flip(example: Example) -> Example:
    """The example mirrored left to right."""
    width = example.image.shape[-1]
    x1, y1, x2, y2 = example.boxes.unbind(-1)
    return Example(example.image.flip(-1), torch.stack([width - x2, y1, width - x1, y2], -1), example.labels)


def train(net: FCOS, examples: list[Example], steps: int, batch_size: int, seed: int, device: torch.device) -> None:
    """SGD over batches drawn with replacement; half of the images are mirrored."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, batch_size)
        drawn = [examples[i] for i in torch.randint(len(examples), (batch_size,), generator=generator).tolist()]
        mirrored = torch.rand(batch_size, generator=generator) < 0.5
        batch = [flip(example) if m else example for example, m in zip(drawn, mirrored.tolist(), strict=True)]
        images = [example.image.to(device).float() / 255 for example in batch]
        targets = [{"boxes": example.boxes.to(device), "labels": example.labels.to(device)} for example in batch]
        loss = torch.stack(list(net(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)


def detect(net: FCOS, table: Table, device: torch.device) -> DetectionArrays:
    """Detections of a split in pixels of the image files."""
    net.eval()
    return concatenate([detect_image(net, table, index, device) for index in range(len(table))])


@torch.no_grad()
def detect_image(net: FCOS, table: Table, index: int, device: torch.device) -> DetectionArrays:
    """Detections of one image of a split; `net` in evaluation mode."""
    (found,) = net([load_example(table, index).image.to(device).float() / 255])
    boxes = found["boxes"].double().cpu().numpy()
    boxes *= np.tile([table.widths[index] / SIZE[1], table.heights[index] / SIZE[0]], 2)
    boxes[:, 2:] -= boxes[:, :2]
    category_ids = np.array([category.id for category in table.categories], dtype=np.int64)
    image_ids = np.full(len(boxes), table.image_ids[index], dtype=np.int64)
    return DetectionArrays(
        image_ids, category_ids[found["labels"].cpu().numpy()], boxes, found["scores"].double().cpu().numpy()
    )


def above(detections: DetectionArrays, threshold: float) -> DetectionArrays:
    """The detections whose score exceeds a threshold: what the network finds when that is its own threshold."""
    keep = detections.scores > threshold
    return DetectionArrays(*(column[keep] for column in detections))


def measure(net: FCOS, table: Table, device: torch.device) -> dict[str, float]:
    """COCO metrics on a split, and AP, AP50 and AP75 at torchvision's own score threshold."""
    truth, found = ground_truth_from_table(table), detect(net, table, device)
    default = coco_metrics(truth, above(found, TORCHVISION_THRESHOLD))
    shown = {f"{name}_at_score_{TORCHVISION_THRESHOLD}": default[name] for name in ("AP", "AP50", "AP75")}
    return coco_metrics(truth, found) | shown


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset YAML or COCO folder; tested on test, else on val")
    parser.add_argument("--backbone-weights", default="none", help="torchvision ResNet-18 state dict, or none")
    parser.add_argument("--steps", type=int, default=240, help="optimiser steps [240]")
    parser.add_argument("--batch-size", type=int, default=8, help="images of a step [8]")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, order and flips [0]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the metrics")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data = open_data(options.data, options.seed)
    device = torch.device(options.device)
    net = build_fcos(len(data.categories), options.backbone_weights).to(device)
    start = time.perf_counter()
    train(net, load_examples(data.train), options.steps, options.batch_size, options.seed, device)
    seconds = time.perf_counter() - start
    metrics = measure(net, data.test or data.val, device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"steps": options.steps, "seed": options.seed, "seconds": seconds, **metrics})
    print("  ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50", "AP75")), f" {options.out}")


if __name__ == "__main__":
    cli.run(main)
