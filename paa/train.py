"""Train PAA.

    python -m paa.train                        # the paper's schedule on COCO
    python -m paa.train --preset quick         # drawn images, CPU, a few minutes
    torchrun --nproc-per-node 8 -m paa.train   # the paper's run on eight GPUs

The same command again goes on where its run folder stopped.
"""

from functools import partial

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
    """One run from data to the best model, in the order in which it happens; returns the best metrics on val."""
    from core import distributed
    from core.backbone import load_backbone_weights
    from core.config import total_steps
    from core.data.loader import train_batches
    from core.data.sampler import training_images
    from core.data.sources import open_data
    from core.inference import describe_run, example_images, load_start_weights, on_validation
    from core.train import fit, seed_everything
    from paa.explain import pictures_of_run
    from paa.losses import compute_losses
    from paa.model import PAA
    from paa.postprocess import detect

    with distributed.process_group(config.device) as device:
        data = open_data(config.data, config.seed)
        steps = total_steps(config, len(training_images(data.train, config.empty_images)))
        seed_everything(config.seed, deterministic=config.deterministic)
        model = PAA(config, len(data.categories))
        if not config.weights:
            with distributed.main_first():
                load_backbone_weights(model.backbone, config.backbone_weights, config)
        load_start_weights(model, config, "paa")
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
            metadata=describe_run("paa", data, config),
            picture=pictures_of_run(config, data.val, device),
        )
        if distributed.is_main():
            print(f"draw its detections: python -m paa.predict {config.out}/best.pt {example_images(data)} --score 0.5")
    return best


if __name__ == "__main__":
    cli.run(main)
