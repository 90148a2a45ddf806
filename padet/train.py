"""Train PADet.

    python -m padet.train                          # VGG-16 at 384 x 384, 160 epochs of COCO, as in the paper
    python -m padet.train --size 512               # with the levels and anchors of 512 x 512
    python -m padet.train --preset quick           # drawn images, CPU, a few minutes
    torchrun --nproc-per-node 2 -m padet.train     # the paper's run on two GPUs

The same command again goes on where its run folder stopped.
"""

from core import cli
from padet.config import PRESETS, Config


def main() -> None:
    """Parse the command line, then train; torch is imported only when there is something to do."""
    description = "Train PADet on COCO-format images, a VOC folder, a dataset YAML or drawn shapes."
    train(cli.parse_config(PRESETS, "padet", description, describe_model=describe_model))


def describe_model(config: Config) -> str:
    """Parameters and multiply-adds of a configuration's model."""
    from core.complexity import describe, model_complexity
    from padet.model import PADet

    return describe(model_complexity(config, PADet))


def train(config: Config) -> dict[str, float]:
    """One run from data to the best model; returns the best metrics on val."""
    from core.commands import train
    from padet.augment import augmentation
    from padet.explain import pictures_of_run
    from padet.losses import compute_losses
    from padet.model import PADet
    from padet.postprocess import detect
    from padet.vgg import load_weights

    return train(config, "padet", PADet, compute_losses, detect, pictures_of_run, load_weights, augmentation(config))


if __name__ == "__main__":
    cli.run(main)
