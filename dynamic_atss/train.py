"""Train Dynamic ATSS.

    python -m dynamic_atss.train                          # the paper's best ResNet-50 run on COCO
    python -m dynamic_atss.train --preset quick           # drawn images, CPU, a few minutes
    python -m dynamic_atss.train --preset gflv2_combined_r50_1x
    torchrun --nproc-per-node 8 -m dynamic_atss.train     # the paper's run on eight GPUs

The same command again goes on where its run folder stopped.
"""

from core import cli
from dynamic_atss.config import PRESETS, Config


def main() -> None:
    """Parse the command line, then train; torch is imported only when there is something to do."""
    description = "Train ATSS, GFLV2 or VFNet with Combined IoUs on COCO-format images, a dataset YAML or drawn shapes."
    train(cli.parse_config(PRESETS, "dynamic_atss", description, describe_model=describe_model))


def describe_model(config: Config) -> str:
    """Parameters and multiply-adds of a configuration's model."""
    from core.complexity import describe, model_complexity
    from dynamic_atss.model import DynamicATSS

    return describe(model_complexity(config, DynamicATSS))


def train(config: Config) -> dict[str, float]:
    """One run from data to the best model; returns the best metrics on val."""
    from core.commands import train
    from dynamic_atss.explain import pictures_of_run
    from dynamic_atss.losses import compute_losses
    from dynamic_atss.model import DynamicATSS
    from dynamic_atss.postprocess import detect

    return train(config, "dynamic_atss", DynamicATSS, compute_losses, detect, pictures_of_run)


if __name__ == "__main__":
    cli.run(main)
