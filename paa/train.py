"""Train PAA.

    python -m paa.train                        # the paper's schedule on COCO
    python -m paa.train --preset quick         # drawn images, CPU, a few minutes
    torchrun --nproc-per-node 8 -m paa.train   # the paper's run on eight GPUs

The same command again goes on where its run folder stopped.
"""

from core import cli
from paa.config import PRESETS, Config


def main() -> None:
    """Parse the command line, then train; torch is imported only when there is something to do."""
    description = "Train PAA on COCO-format images, a dataset YAML or drawn shapes."
    train(cli.parse_config(PRESETS, "paa", description, describe_model=describe_model))


def describe_model(config: Config) -> str:
    """Parameters and multiply-adds of a configuration's model."""
    from core.complexity import describe, model_complexity
    from paa.model import PAA

    return describe(model_complexity(config, PAA))


def train(config: Config) -> dict[str, float]:
    """One run from data to the best model; returns the best metrics on val."""
    from core.commands import train
    from paa.explain import pictures_of_run
    from paa.losses import compute_losses
    from paa.model import PAA
    from paa.postprocess import detect

    return train(config, "paa", PAA, compute_losses, detect, pictures_of_run)


if __name__ == "__main__":
    cli.run(main)
