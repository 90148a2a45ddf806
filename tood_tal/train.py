"""Train TOOD.

    python -m tood_tal.train                          # the paper's ResNet-50 run on COCO
    python -m tood_tal.train --preset quick           # drawn images, CPU, a few minutes
    python -m tood_tal.train --preset r50_anchor_based_1x
    torchrun --nproc-per-node 8 -m tood_tal.train     # the paper's run on eight GPUs

The same command again goes on where its run folder stopped.
"""

from core import cli
from tood_tal.config import PRESETS, Config


def main() -> None:
    """Parse the command line, then train; torch is imported only when there is something to do."""
    description = "Train TOOD on COCO-format images, a dataset YAML or drawn shapes."
    train(cli.parse_config(PRESETS, "tood_tal", description, describe_model=describe_model))


def describe_model(config: Config) -> str:
    """Parameters and multiply-adds of a configuration's model."""
    from core.complexity import describe, model_complexity
    from tood_tal.model import TOOD

    return describe(model_complexity(config, TOOD))


def train(config: Config) -> dict[str, float]:
    """One run from data to the best model; returns the best metrics on val."""
    from core.commands import train
    from tood_tal.explain import pictures_of_run
    from tood_tal.losses import compute_losses
    from tood_tal.model import TOOD
    from tood_tal.postprocess import detect

    return train(config, "tood_tal", TOOD, compute_losses, detect, pictures_of_run)


if __name__ == "__main__":
    cli.run(main)
