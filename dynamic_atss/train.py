"""Train Dynamic ATSS.

    python -m dynamic_atss.train                        # the paper's schedule on COCO
    python -m dynamic_atss.train --preset quick         # drawn images, CPU, a few minutes
    torchrun --nproc-per-node 8 -m dynamic_atss.train   # the paper's run on eight GPUs

The same command again goes on where its run folder stopped.
"""

from functools import partial

from core import cli
from dynamic_atss.config import PRESETS, Config


def main() -> None:
    """Parse the command line, then train; torch is imported only when there is something to do."""
    description = "Train Dynamic ATSS on COCO-format images, a dataset YAML or drawn shapes."
    train(cli.parse_config(PRESETS, "dynamic_atss", description, describe_model=describe_model))


def describe_model(config: Config) -> str:
    """Parameters and multiply-adds of a configuration's model."""
    from core.complexity import describe, model_complexity
    from dynamic_atss.model import DynamicATSS

    return describe(model_complexity(config, DynamicATSS))


def train(config: Config) -> dict[str, float]:
    """One run from data to the best model, in the order in which it happens; returns the best metrics on val."""
    from core import distributed
    from core.backbone import load_backbone_weights
    from core.config import total_steps
    from core.data.loader import train_batches
    from core.data.sampler import training_images
    from core.data.sources import open_data
    from core.inference import describe_run, example_images, load_start_weights, on_validation
    from core.train import fit, seed_everything
    from dynamic_atss.losses import compute_losses
    from dynamic_atss.model import DynamicATSS
    from dynamic_atss.postprocess import detect

    with distributed.process_group(config.device) as device:
        data = open_data(config.data, config.seed)
        steps = total_steps(config, len(training_images(data.train, config.empty_images)))
        seed_everything(config.seed, deterministic=config.deterministic)
        model = DynamicATSS(config, len(data.categories))
        if not config.weights:
            with distributed.main_first():
                load_backbone_weights(model.backbone, config.backbone_weights, config)
        load_start_weights(model, config, "dynamic_atss")
        best = fit(
            model,
            partial(compute_losses, config=config),
            lambda start: train_batches(
                data.train,
                config,
                start=start,
                steps=steps,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
            ),
            on_validation(partial(detect, config=config), data.val, config, device),
            config,
            steps=steps,
            device=device,
            metadata=describe_run("dynamic_atss", data, config),
        )
        if distributed.is_main():
            weights = f"{config.out}/best.pt"
            print(f"draw its detections: python -m dynamic_atss.predict {weights} {example_images(data)} --score 0.5")
    return best


if __name__ == "__main__":
    cli.run(main)
