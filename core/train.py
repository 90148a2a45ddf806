"""The one training loop.

`fit` reads in the order in which a run happens. A run's folder is its memory: the same command run again goes on from
`last.pt`, and ends with the same bits as a run that was never stopped.
"""

import copy
import gc
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from core import checkpoint, distributed
from core.accumulation import LossOf, backward_in_parts, total_loss
from core.config import TrainConfig
from core.configfile import changed_flags, to_yaml
from core.errors import UserError
from core.files import remove_unfinished
from core.runlog import LOG, SHOWN, RunLog, commit, draw_curves, environment, read_log, write_json, write_text
from core.stopping import StopAsked, StopRequested, stop_requests
from core.types import Batch, Targets

Criterion = Callable[[Any, Targets, int, int], dict[str, Tensor]]
Batches = Callable[[int], Iterator[Batch]]
Evaluate = Callable[[nn.Module, StopAsked], Mapping[str, float]]
Picture = Callable[[nn.Module, int], None]

NEVER = torch.iinfo(torch.int64).max  # the first non-finite step of a run that has none
FREE_FIELDS = (
    "out",
    "data",
    "workers",
    "device",
    "compile",
    "rank_timeout",
    "log_every",
    "save_every",
    "picture_every",
    "tensorboard",
    "preset",
)  # may differ on resuming


@dataclass
class State:
    """A run between two steps, as a checkpoint holds it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None = None  # with moving averages of the weights, where `ema` asks for them
    step: int = 0  # steps done
    evaluated: int = -1  # step of the last evaluation
    best: dict[str, float] = field(default_factory=dict)  # metrics and step of the best evaluation
    sums: dict[str, Tensor] = field(default_factory=dict)  # since the last log line, on the device
    summed: int = 0  # steps in them


class Guard(NamedTuple):
    """What is needed to name the first non-finite step without waiting for the device at every step."""

    first_bad: Tensor  # step number on the device, or NEVER
    image_ids: dict[int, list[int]]  # of the steps since the flag was read last


def fit(
    model: nn.Module,
    criterion: Criterion,
    batches: Batches,
    evaluate: Evaluate,
    config: TrainConfig,
    *,
    steps: int,
    device: torch.device,
    metadata: Mapping[str, Any],
    picture: Picture | None = None,
) -> dict[str, float]:
    """Train a model in the run folder `config.out`, or go on where that folder's run was stopped.

    Args:
        model: called as model(images, sizes); anything that lies in its forward runs under autocast.
        criterion: (outputs, targets, step, steps) to named scalars; the sum of those whose name begins with loss is
            minimised, the others are only logged. `step` counts from 1.
        batches: from a start step, the batches of the steps start + 1 ... steps of this rank.
        evaluate: the model in evaluation mode to metrics, `AP` among them; called on every rank, the main rank's count.
            It raises `StopRequested` on every rank soon after its second argument says so on one.
        metadata: plain values that travel in every checkpoint: method, categories, geometry, profile, fingerprint ...
        picture: (model in evaluation mode, step), called every `config.picture_every` steps on the main rank only. It
            leaves weights, log and random states as they are.

    Returns:
        Metrics and step of the best evaluation.

    Raises:
        UserError: when the folder holds another run, a step is not finite, or the disk is full.
        SystemExit: code 0 after SIGTERM or Ctrl-C, once everything is saved.
    """
    folder = Path(config.out)
    facts = {**metadata, "config": asdict(config), "steps": steps, "commit": commit() if distributed.is_main() else ""}
    state = prepare(model, config, device)
    resume(state, folder, facts, config)
    _warn_of_damaged_best(state, folder)
    if state.step == steps and state.evaluated == steps:
        _say(f"{folder} is a finished run: {_describe_best(state)}")
        return state.best
    _open_folder(folder, config, facts, device)
    _say(f"{folder}: steps {state.step + 1} to {steps} on {device}, commit {facts['commit'][:10]}")
    _say(describe_batch(config, distributed.world_size()))
    network = wrap(state.model, config, device)
    guard = Guard(torch.full((), NEVER, device=device), {})
    with _open_log(folder, state, steps, config) as log, stop_requests() as stop_asked:
        if _due(state.step, config.eval_every, steps) and state.evaluated < state.step:
            validate(state, evaluate, folder, facts, log, stop_asked)
        for batch in batches(state.step):
            state.step += 1
            lr = learn(network, criterion, batch, state, guard, config, steps)
            stopping = _agree(stop_asked, state.step, config, device)
            logs = _due(state.step, config.log_every, steps)
            evaluates = _due(state.step, config.eval_every, steps)
            saves = evaluates or stopping or _due(state.step, config.save_every, steps)
            if log:
                log.bar.update()
            if logs or saves:
                stop_if_nonfinite(guard)
            if logs:
                write_log(state, lr, log)
            if saves:
                save(state, folder, facts, log)
            if picture and config.picture_every and _due(state.step, config.picture_every, steps):
                draw(state, picture, log)
            if stopping:
                leave(state, folder, log)
            if evaluates:
                validate(state, evaluate, folder, facts, log, stop_asked)
    if state.step != steps:
        raise ValueError(f"batches ended after step {state.step} of {steps}")
    _say(f"{folder}: {_describe_best(state)}")
    return state.best


def describe_batch(config: TrainConfig, ranks: int) -> str:
    """Where the learning rate comes from and how the images of a step are shared out, in one line."""
    rate = f"learning rate {config.learning_rate:g}"
    if config.lr is None and config.batch_size != config.paper_batch_size:
        rate += f" ({config.paper_lr:g} x {config.batch_size} / {config.paper_batch_size} images, linear scaling)"
    share = config.batch_size // (ranks * config.accumulate)
    shared = [f"{ranks} processes"] * (ranks > 1) + [f"{config.accumulate} parts"] * (config.accumulate > 1)
    batch = f"{config.batch_size} images a step" + (f" ({' x '.join(shared)} of {share})" if shared else "")
    return f"{rate}, {batch}"


def prepare(model: nn.Module, config: TrainConfig, device: torch.device) -> State:
    """The state before the first step: the model on its device in training mode, its optimiser, its average."""
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    model.train()
    return State(model, build_optimizer(model, config), average)


def learn(
    network: nn.Module, criterion: Criterion, batch: Batch, state: State, guard: Guard, config: TrainConfig, steps: int
) -> float:
    """One step: forward, loss, backward, update; returns the learning rate. Never waits for the device."""
    lr = set_lr(state.optimizer, lr_at(state.step - 1, steps, config))
    guard.image_ids[state.step] = batch.image_ids.tolist()
    batch = batch.to(guard.first_bad.device)
    precision = torch.autocast(batch.images.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    loss_of = lambda outputs, targets: criterion(outputs, targets, state.step, steps)  # noqa: E731
    losses = backward(network, loss_of, batch, config.accumulate, precision)
    loss = total_loss(losses)
    norm = clip_gradients(state.model, config.clip_grad_norm)
    mask_nonfinite_step(state.optimizer, loss, norm, state.step, guard)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        decay = min(config.ema, state.step / (state.step + 10))  # short at first: the initial weights mean nothing
        get_ema_multi_avg_fn(decay)(list(state.average.parameters()), list(state.model.parameters()), None)
    add_up(state, {"loss": loss, **losses, "gradient_norm": norm})
    return lr


def backward(
    network: nn.Module, loss_of: LossOf, batch: Batch, parts: int, precision: torch.autocast
) -> dict[str, Tensor]:
    """Forward, loss and backward of this rank's images, in `parts` of them where that is above 1; the loss's terms."""
    if parts > 1:
        return backward_in_parts(network, loss_of, batch, parts, precision)
    with precision:
        outputs = network(batch.images, batch.sizes)
    losses = loss_of(outputs, batch.targets)  # casts to float32 itself
    total_loss(losses).backward()
    return losses


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD over everything trainable; parameters named bias have a learning rate factor and a weight decay of their own.

    The fused kernels leave parameters and momentum alone where `found_inf` is set on the device, which is how a
    non-finite step is masked without waiting for it (`mask_nonfinite_step`).
    """
    trainable = [(name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [parameter for name, parameter in trainable if "bias" not in name]
    biases = [parameter for name, parameter in trainable if "bias" in name]
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr_factor": 1.0, "weight_decay": config.weight_decay},
        {"params": biases, "lr_factor": config.bias_lr_factor, "weight_decay": config.bias_weight_decay},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)


def lr_at(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of an update: warm-up, then a drop at each milestone (Goyal et al. 2017; He et al. 2016).

    Args:
        step: updates done before it, 0 ... steps - 1.
        steps: length of the run; milestones are fractions of it, and warm-up takes a tenth of it at most.
        config: peak rate, warm-up and milestones.
    """
    warmup = min(config.warmup_steps, steps // 10)
    factor = 1.0
    if step < warmup:
        rise = step / warmup if config.warmup == "linear" else 0.0
        factor = config.warmup_factor + (1 - config.warmup_factor) * rise
    drops = sum(step >= round(milestone * steps) for milestone in config.milestones)
    return config.learning_rate * factor * config.lr_decay**drops


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Give every parameter group the rate times its factor; returns the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def wrap(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model as the loop calls it: compiled if asked for, and with gradients averaged over ranks.

    Buffers stay each rank's own: trainable batch norm counts per rank, and frozen ones never change.
    """
    network: Any = model
    if config.compile:
        torch._dynamo.config.recompile_limit = 64  # one graph for each canvas of the loader's short list
        network = torch.compile(network, dynamic=False)
    if distributed.world_size() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    accepted = inspect.signature(DistributedDataParallel).parameters
    own_buffers: Any = {"forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers": False}
    return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True, **own_buffers)


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Norm of all gradients before clipping, as a device scalar; clips in place where `largest` is above 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest > 0:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def mask_nonfinite_step(optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor, step: int, guard: Guard) -> None:
    """Make the coming update do nothing where loss or gradient is not finite, and note the first such step.

    Everything stays on the device: the optimiser's kernels read the flag.
    """
    bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm))
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    guard.first_bad.copy_(torch.where(bad, guard.first_bad.clamp(max=step), guard.first_bad))


def stop_if_nonfinite(guard: Guard) -> None:
    """Wait for the device; end the run if a step since the last call was not finite. Every rank must call it.

    Raises:
        UserError: naming the step and the ids of its images on all ranks.
    """
    step = min(distributed.gather_objects(int(guard.first_bad)))
    if step != NEVER:
        ids = [str(i) for part in distributed.gather_objects(guard.image_ids.get(step, [])) for i in part]
        raise UserError(
            f"step {step}: loss or gradient is not finite, images {', '.join(ids)}; nothing was saved since;"
            " check these images (python -m core.data check) or lower --lr"
        )
    guard.image_ids.clear()


def add_up(state: State, terms: Mapping[str, Tensor]) -> None:
    """Add a step's numbers to the sums of the log interval, on the device."""
    for name, term in terms.items():
        term = term.detach().float()
        state.sums[name] = state.sums[name] + term if name in state.sums else term
    state.summed += 1


def write_log(state: State, lr: float, log: RunLog | None) -> None:
    """Log the means over the interval and all ranks, and begin the next interval. Every rank must call it."""
    names = list(state.sums)
    means = distributed.mean_over_ranks(torch.stack([state.sums[name] for name in names]) / state.summed).tolist()
    state.sums, state.summed = {}, 0
    if log:
        log.train(state.step, {**dict(zip(names, means, strict=True)), "lr": lr})


def validate(
    state: State, evaluate: Evaluate, folder: Path, facts: Mapping[str, Any], log: RunLog | None, stop_asked: StopAsked
) -> None:
    """Evaluate, keep the model if it is the best so far, and save. Every rank must call it.

    Raises:
        SystemExit: code 0 when asked to stop; the state was saved before, and the resumed run evaluates again.
    """
    distributed.broadcast_buffers(state.model)
    model = state.model
    if state.average is not None:
        model = state.average
        for kept, current in zip(model.buffers(), state.model.buffers(), strict=True):
            kept.copy_(current)  # only weights are averaged
    model.eval()
    try:
        with torch.no_grad():
            metrics = distributed.broadcast(dict(evaluate(model, stop_asked)))
    except StopRequested:
        leave(state, folder, log)
    state.model.train()
    state.evaluated = state.step
    is_best = not state.best or metrics["AP"] > state.best["AP"] or state.best["AP"] != state.best["AP"]  # a NaN loses
    if is_best:
        state.best = {**metrics, "step": state.step}
    if log:
        log.val(state.step, metrics)
        if is_best:
            best = {**facts, "model": model.state_dict(), "step": state.step, "metrics": metrics}
            checkpoint.save(folder / "best.pt", best)
        write_json(folder / "metrics.json", {"best": state.best, "last": {**metrics, "step": state.step}})
        draw_curves(read_log(folder / LOG), folder / "curves.png", str(folder))
        gc.collect()  # a figure is a cycle of megabytes, and Python looks at old objects seldom
    save(state, folder, facts, log)


def save(state: State, folder: Path, facts: Mapping[str, Any], log: RunLog | None) -> None:
    """Write last.pt, with every rank's random states and running sums. Every rank must call it."""
    own = {
        "random": random_states(),
        "sums": {name: value.cpu() for name, value in state.sums.items()},
        "summed": state.summed,
    }
    ranks = distributed.gather_objects(own)
    if log:
        log.sync()  # before the checkpoint: a resumed run keeps the rows up to its step
    if distributed.is_main():
        content = {
            **facts,
            "step": state.step,
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "average": state.average.state_dict() if state.average is not None else None,
            "evaluated": state.evaluated,
            "best": state.best,
            "ranks": ranks,
        }
        checkpoint.save_rotating(folder, content)
    if log:
        log.restart_clock(state.step)  # evaluating and saving is not training speed


def draw(state: State, picture: Picture, log: RunLog | None) -> None:
    """Let a picture be drawn on the main rank, between two steps that notice nothing of it."""
    if not distributed.is_main():
        return
    before = random_states()
    state.model.eval()
    with torch.no_grad():
        picture(state.model, state.step)
    gc.collect()  # as after the curves
    state.model.train()
    set_random_states(before)
    if log:
        log.restart_clock(state.step)  # drawing is not training speed


def resume(state: State, folder: Path, facts: Mapping[str, Any], config: TrainConfig) -> None:
    """Put the run folder's newest checkpoint into the state; without one, leave the state as it is.

    Raises:
        UserError: when it belongs to a run with another configuration, data or length.
    """
    checkpoint.check_plain(facts, "metadata")
    content = None
    if distributed.is_main():  # one rank reads, so that ranks need no common disk and a bad file is one line
        content = checkpoint.load_latest(folder, method=facts.get("method"))
        if content is not None:
            _refuse_other_run(content, facts, config, folder)
    content = distributed.broadcast(content)
    if content is None:
        return
    if "optimizer" not in content:
        raise UserError(f"{folder}: its checkpoint holds a model but no training state; start from it with --weights")
    checkpoint.load_weights(state.model, content, folder)
    state.optimizer.load_state_dict(content["optimizer"])
    if state.average is not None:
        state.average.load_state_dict(content["average"])
    state.step, state.evaluated, state.best = content["step"], content["evaluated"], content["best"]
    own = share_of_rank(content["ranks"], distributed.rank(), distributed.world_size())
    device = next(state.model.parameters()).device
    state.sums = {name: value.to(device) for name, value in own["sums"].items()}
    state.summed = own["summed"]
    set_random_states(own["random"])


def share_of_rank(saved: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> Mapping[str, Any]:
    """What a rank takes over from the ranks that wrote a checkpoint: random states and the sums of the log interval.

    Another number of ranks goes on from the mean of the sums, which is what the log will say of these steps. A rank
    that was not there draws the random numbers of the first.
    """
    own = saved[rank] if rank < len(saved) else saved[0]
    if len(saved) == world_size:
        return own
    means = {name: torch.stack([part["sums"][name] for part in saved]).mean(dim=0) for name in own["sums"]}
    return {**own, "sums": means}


def _refuse_other_run(content: Mapping[str, Any], facts: Mapping[str, Any], config: TrainConfig, folder: Path) -> None:
    """The same command resumes; anything that changes the numbers needs a folder of its own."""
    differences = changed_flags(content["config"], config, FREE_FIELDS)
    compared = [name for name in facts if name not in ("config", "commit") and content.get(name) != facts[name]]
    if differences:
        compared = [name for name in compared if name != "steps"]  # follows from them
    differences += [f"{name} {_short(content.get(name))}, now {_short(facts[name])}" for name in compared]
    if differences:
        raise UserError(f"{folder} holds another run ({'; '.join(differences)}); choose another --out or delete it")


def _short(value: object) -> str:
    """A value in a line: long ones, such as fingerprints and lists of classes, by their beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}... ({len(text)} characters)"


def _warn_of_damaged_best(state: State, folder: Path) -> None:
    """Training does not read best.pt, so it goes on without it; whoever wants the model should know now."""
    best = folder / "best.pt"
    if state.best and distributed.is_main() and not checkpoint.is_whole(best):
        problem = "is damaged" if best.exists() else "is missing"
        print(
            f"warning: {best} {problem}; a later evaluation writes it anew only if it beats {_describe_best(state)}",
            file=sys.stderr,
        )


def random_states() -> dict[str, Any]:
    """States of all random number generators as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002, libraries draw from it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "python": random.getstate(),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Undo everything drawn since `random_states`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed all generators before the model is made; `deterministic` also refuses kernels that are not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)  # sums on a CPU depend on how many threads share them


def leave(state: State, folder: Path, log: RunLog | None) -> NoReturn:
    """End a run that was asked to stop and is saved.

    Raises:
        SystemExit: always, with code 0.
    """
    if log:
        draw_curves(read_log(folder / LOG), folder / "curves.png", str(folder))
        log.say(f"{folder}: saved at step {state.step}; the same command goes on from there")
    raise SystemExit(0)


def _agree(asked: StopAsked, step: int, config: TrainConfig, device: torch.device) -> bool:
    """Whether any rank was asked to stop, the same answer on all; on GPUs only when we log, since it waits for them."""
    if distributed.world_size() == 1:
        return asked()
    if device.type != "cpu" and step % config.log_every:
        return False
    return bool(distributed.sum_over_ranks(torch.tensor(float(asked()), device=device)) > 0)


def _due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step > 0 and step % every == 0)


def _open_folder(folder: Path, config: TrainConfig, facts: Mapping[str, Any], device: torch.device) -> None:
    ranks = distributed.world_size()
    if config.batch_size % ranks:
        raise UserError(f"batch_size {config.batch_size} does not divide among {ranks} processes")
    if config.batch_size % (ranks * config.accumulate):
        share = config.batch_size // ranks
        raise UserError(
            f"accumulate {config.accumulate} does not divide the {share} images of a process into equal parts"
        )
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.yaml", LOG):
            if (folder / name).exists() and not (folder / "environment.json").exists():
                raise UserError(f"{folder / name}: not of a run of this project; choose another --out")
        remove_unfinished(folder)
        write_json(folder / "environment.json", environment(device, distributed.world_size(), facts))
        write_text(folder / "config.yaml", to_yaml(config))


def _open_log(folder: Path, state: State, steps: int, config: TrainConfig) -> Any:
    if not distributed.is_main():
        return nullcontext()
    return RunLog(
        folder,
        step=state.step,
        evaluated=state.evaluated,
        steps=steps,
        batch_size=config.batch_size,
        tensorboard=config.tensorboard,
    )


def _describe_best(state: State) -> str:
    shown = ", ".join(f"{name} {state.best[name]:.3f}" for name in SHOWN if name in state.best)
    return f"best at step {state.best['step']}: {shown}"


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)
