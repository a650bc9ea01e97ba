"""Trains the network on a folder of photographs, nested or flat.

    python train.py --image_dir DIR --val_dir DIR                                    one process
    python -m paddle.distributed.launch --gpus 0,1,2,3 train.py --image_dir DIR      four GPUs
    python train.py --image_dir DIR --continue_train                                 go on after a stop

SIGTERM and Ctrl-C save `latest` before they end the run. Exit codes: 0 done, 1 a mistake or a fault (one line says
which), 2 unknown flags, 130 stopped by Ctrl-C, 143 by SIGTERM.

The defaults are the paper's (its final model: 450,000 steps of 40 images). The results table's variants:
full --gamma 0.5 · non-rebalance --rebalance False · rebalance --gamma 0.

Prints a line, and writes one of JSON to <log_path>/train.jsonl, every --loss_step steps and at the last:

    epoch 0  step    100  loss 12345.6  nats 3.456  kl 2.345  lr 3.16e-05  images/s 12.3  waiting 1%
"""

import math
import re
import sys
import warnings

from support.checkpoints import Run, claim, load_weights
from support.cli import (
    SEED,
    SIDE,
    WORKERS,
    Parser,
    UserError,
    add_bool_flag,
    check_crop,
    note,
    number,
    run_script,
    whole,
)
from support.convolutions import convolve_in_parts, parts_of_a_batch
from support.cpu import cores_each, keep_freed_memory, use_all_cores
from support.gpu import check_gpu, mixed_precision, on_gpu, search_kernels, to_device
from support.images import list_images
from support.logs import Log, Meter
from support.processes import (
    StopRequest,
    all_reduce,
    check_synchronized,
    first_decides,
    is_first,
    share_statistics,
)
from support.sheets import tile
from support.workers import begin_worker, default_workers, from_workers

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.io import DataLoader, Subset
from tqdm import tqdm

from dataset import ColorizationDataset, EpochSampler, lab_to_rgb, rgb_to_lab, soft_encode, targets, to_uint8
from model import CIC
from pretrained import find_weights
from utils import (
    MAX_THRESHOLD,
    annealed_mean,
    auc,
    entropy,
    error_histogram,
    load_ab_bins,
    load_prior,
    position_weight,
    rebalancing_weights,
    soft_cross_entropy,
    upsample_ab,
)

warnings.filterwarnings("ignore", message="When training, we now always track")  # says nothing that one could mend

PANEL_IMAGES = 6  # validation images in the picture on the board
LINE = (
    "epoch {epoch:3d}  step {step:6d}  loss {loss:9.1f}  nats {nats:.4f}  kl {kl:.4f}  lr {lr:.3g}  "
    "images/s {images_per_second:.1f}  waiting {waiting:.0%}"
)
VAL_LINE = (
    "epoch {epoch:3d}  step {step:6d}  validation: nats {val_cross_entropy:.4f}  kl {val_kl:.4f}  raw AuC {val_auc:.2%}"
)
TAGS = {  # what VisualDL calls the figures, in its order; a figure of training beside its like of validation
    "loss": "training/loss",
    "nats": "training/cross-entropy (nats)",
    "kl": "training/KL (nats)",
    "lr": "training/learning rate",
    "images_per_second": "training/images per second",
    "waiting": "training/share of time waiting for data",
    "val_cross_entropy": "validation/cross-entropy (nats)",
    "val_kl": "validation/KL (nats)",
    "val_auc": "validation/AuC, raw",
}
PICTURE = "validation/gray, colored, true"
# Flags that say what is optimized: a run that goes on with others would be neither the one nor the other.
OBJECTIVE = ("rebalance", "gamma", "NN", "sigma")
# Flags that say which image comes when: with others the place within an epoch means nothing.
ORDER = ("seed", "batch_size", "images")
# Flags that may change on the way.
FREE = ("crop_size", "load_size", "lr", "lr_steps", "beta1", "beta2", "weight_decay", "amp", "freeze_bn")

# -------------------------------------------------------------------------------------------------
# What is minimized


def objective(network, rgb, ab_bins, bin_weights, args, autocast):
    """Eq. 2: the mean over images of -sum_hw v(Z_hw) sum_q Z_hwq log Z^_hwq, and figures of it for the log.

    rgb uint8 [N, 3, H, W], ab_bins [Q, 2], bin_weights [Q] -> the loss, and without gradients [3]: the loss,
    cross-entropy and KL, both not re-weighted, in nats per position.
    """
    with paddle.no_grad():
        lightness, ab = targets(rgb)  #                                        [N, 1, H, W], [N, 2, H/4, W/4]
        # Z, by its few entries that are not 0: their bins and their weights.
        indices, weights = soft_encode(ab, ab_bins, args.NN, args.sigma)  #            both [N, K, H/4, W/4]
        v = position_weight(indices, ab, bin_weights)  #                                     [N, H/4, W/4]
    with paddle.amp.auto_cast(**autocast):
        logits = network(lightness - 50)  #                                               [N, Q, H/4, W/4]
    nats = soft_cross_entropy(logits.astype("float32"), indices, weights)  #                 [N, H/4, W/4]
    # Divided by all images, gray ones too: no process need know what another one drew.
    loss = (v * nats).sum() / len(rgb)
    with paddle.no_grad():
        mean_nats = nats.mean()
        return loss, paddle.stack([loss, mean_nats, mean_nats - entropy(weights).mean()])


def set_training(network, args):
    """Training mode; with --freeze_bn, batch norm keeps to its stored statistics."""
    network.train()
    if args.freeze_bn:
        for layer in network.sublayers():
            if isinstance(layer, paddle.nn.BatchNorm2D):
                layer.eval()


# -------------------------------------------------------------------------------------------------
# Data


def training_data(args):
    """The training set's loader and its sampler."""
    dataset = ColorizationDataset(
        first_decides(list_images, args.image_dir), args.load_size, args.crop_size, augment=True, seed=args.seed
    )
    if len(dataset) < args.batch_size:
        raise UserError(f"{args.image_dir}: {len(dataset)} images do not fill one --batch_size {args.batch_size}")
    sampler = EpochSampler(dataset, args.batch_size // dist.get_world_size())
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.num_workers, worker_init_fn=begin_worker)
    return loader, sampler


def validation_data(args):
    """Center squares of the validation set, this process's share of them; None without --val_dir."""
    if not args.val_dir:
        return None
    side = args.load_size // 8 * 8
    dataset = ColorizationDataset(first_decides(list_images, args.val_dir), args.load_size, side)
    share = Subset(dataset, range(dist.get_rank(), len(dataset), dist.get_world_size()))
    batch_size = max(1, args.batch_size // dist.get_world_size() // 2)  # larger images than in training
    return DataLoader(share, batch_size=batch_size, num_workers=args.num_workers, worker_init_fn=begin_worker)


# -------------------------------------------------------------------------------------------------
# Validation


@paddle.no_grad()
def validate(network, loader, ab_bins, args, autocast, stop):
    """Cross-entropy and KL in nats per position, raw AuC, and a picture; over the validation images of all processes.

    The figures need no rebalancing, so that they compare between variants. None when asked to stop meanwhile.
    """
    share_statistics(network)
    network.eval()
    sums, histogram, panel = np.zeros(3), 0, []
    bar = {"unit": "batch", "leave": False, "disable": None if is_first() else True}
    for rgb, broken in tqdm(from_workers(loader, stop), "validating", len(loader), **bar):
        if stop.noticed:
            break
        readable = np.flatnonzero(broken.numpy() == 0)
        if not len(readable):
            continue
        rgb = paddle.gather(to_device(rgb), paddle.to_tensor(readable))
        lightness, ab = targets(rgb)
        indices, weights = soft_encode(ab, ab_bins, args.NN, args.sigma)
        with paddle.amp.auto_cast(**autocast):
            logits = network(lightness - 50)
        logits = logits.astype("float32")
        nats = soft_cross_entropy(logits, indices, weights).mean(axis=[1, 2])
        kl = nats - entropy(weights).mean(axis=[1, 2])
        sums += [float(nats.sum()), float(kl.sum()), len(rgb)]
        lab = rgb_to_lab(rgb)
        colored = upsample_ab(annealed_mean(logits, ab_bins), *rgb.shape[2:])
        histogram = histogram + error_histogram(colored.numpy().swapaxes(0, 1), lab[:, 1:].numpy().swapaxes(0, 1))
        if len(panel) < PANEL_IMAGES:
            panel += [side_by_side(*images) for images in zip(lab, colored, rgb)]
    if stop.agreed():
        return None
    totals = all_reduce(np.concatenate([sums, histogram if sums[2] else np.zeros(MAX_THRESHOLD + 2)]))
    if not totals[2]:
        raise UserError(f"{args.val_dir}: none of the images can be read")
    figures = {"val_cross_entropy": totals[0] / totals[2], "val_kl": totals[1] / totals[2], "val_auc": auc(totals[3:])}
    return figures, tile(panel[:PANEL_IMAGES]) if panel else None


def side_by_side(lab, ab, rgb):
    """gray | colored | true, side by side: Lab [3, H, W], ab [2, H, W], uint8 [3, H, W] -> uint8 [H, 3W, 3]."""
    lightness = lab[:1]
    candidates = paddle.stack([paddle.concat([lightness, paddle.zeros_like(ab)]), paddle.concat([lightness, ab])])
    gray, colored = to_uint8(lab_to_rgb(candidates))
    return np.concatenate([x.numpy().transpose(1, 2, 0) for x in (gray, colored, rgb)], axis=1)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = Parser(description="Trains the colorization network on a folder of photographs.")
    add = parser.add_argument_group("data").add_argument
    add("--image_dir", required=True, help="folder of training photographs, nested or flat")
    add("--val_dir", help="folder of validation photographs, looked at after each epoch (default: none)")
    add("--load_size", type=SIDE, default=256, help="the short side is resized to this many pixels")
    add("--crop_size", type=SIDE, default=176, help="side of the random crops in pixels, a multiple of 8")
    add("--num_workers", type=WORKERS, default=min(8, default_workers()), help="processes that decode, for each device")
    add(
        "--max_broken", type=number(0, 1), default=0.1, help="share of unreadable images in an epoch that stops the run"
    )

    group = parser.add_argument_group("method")
    add_bool_flag(group, "--rebalance", True, "weight rare colors up in the loss")
    add = group.add_argument
    add("--gamma", type=number(0, 1), default=0.5, help="lambda of Eq. 4: share of the uniform in the prior, 0 to 1")
    add("--prior", help="file of 313 probabilities (resources/estimate_prior.py) (default: the shipped prior)")
    add("--NN", type=whole(1, 313), default=5, help="nearest bins that share in a color's soft-encoding")
    add("--sigma", type=number(1e-3, 1e3), default=5.0, help="of the soft-encoding's Gaussian, in ab units")

    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--num_epochs", "--num_epoch", type=whole(), default=20, help="passes over the training set")
    add(
        "--max_steps", type=whole(), help="stop after this many steps, whatever the epoch (default: after --num_epochs)"
    )
    add("--batch_size", type=whole(), default=40, help="images in a step, over all processes together")
    add("--lr", type=number(1e-38, 1e38), default=3.16e-5, help="Adam's learning rate")
    add("--lr_steps", type=whole(), nargs="*", default=[200_000, 375_000], help="steps at which it falls by sqrt(10)")
    add("--beta1", type=number(0, 0.999999), default=0.9, help="Adam's decay of the first moment, for each step")
    add("--beta2", type=number(0, 0.999999), default=0.99, help="Adam's decay of the second moment, for each step")
    add("--weight_decay", type=number(0, 1e38), default=1e-3, help="L2 penalty, beside a loss that sums over positions")
    add("--seed", type=SEED, default=0, help="of the initialization, the order of images and their crops")
    add(
        "--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision; auto: what the GPU has"
    )
    add_bool_flag(group, "--sync_bn", False, "batch norm over the images of all GPUs, not of each alone")
    add_bool_flag(group, "--freeze_bn", False, "batch norm with its stored statistics (fine-tuning on small batches)")

    group = parser.add_argument_group("checkpoints and logs")
    add = group.add_argument
    add("--model_path", default="./model", help="folder of the checkpoints epoch_{N}_model.pdparams")
    add("--log_path", default="./log", help="folder of train.jsonl and VisualDL's records")
    add(
        "--init_from",
        metavar="FILE",
        help="start from these weights (fine-tuning), all else new: a checkpoint, or small, those that come with the "
        "project (default: random)",
    )
    add_bool_flag(group, "--continue_train", False, "go on where a run in --model_path was stopped")
    add_bool_flag(group, "--overwrite", False, "begin anew where --model_path or --log_path hold an earlier run")
    add("--which_epoch", default="latest", help="the one to go on from: latest, or an epoch's number")
    add("--save_latest", type=whole(), default=2000, help="steps between saves of epoch_latest_model.pdparams")
    add("--save_freq", type=whole(), default=1, help="epochs between saves of epoch_{N}_model.pdparams")
    add("--keep", type=whole(0), default=0, help="numbered checkpoints to keep, the newest; 0 keeps all")
    add("--loss_step", type=whole(), default=50, help="steps between lines of the log")
    return parser.parse_args(argv)


def check_args(args, processes):
    """Turns contradictions among the flags into one clear line before any work is done."""
    check_crop(args, multiple=8)
    if args.batch_size % processes:
        raise UserError(f"--batch_size {args.batch_size}: cannot be shared out evenly among {processes} processes")
    if args.freeze_bn and args.sync_bn:
        raise UserError("--freeze_bn and --sync_bn exclude each other")
    if args.continue_train and args.init_from:
        raise UserError("--continue_train and --init_from exclude each other")
    if args.continue_train and args.overwrite:
        raise UserError("--continue_train and --overwrite exclude each other")
    if not re.fullmatch(r"latest|\d+", args.which_epoch):
        raise UserError(f"--which_epoch {args.which_epoch}: is neither latest nor a number")
    if args.which_epoch != "latest" and not args.continue_train:
        raise UserError(f"--which_epoch {args.which_epoch}: says where --continue_train goes on, which is not given")


# -------------------------------------------------------------------------------------------------


@paddle.utils.unique_name.guard()  # Adam's state goes by names that Paddle counts up: from 0 in every run
def main(args):
    # Setup
    if dist.ParallelEnv().world_size > 1:
        dist.init_parallel_env()
    check_gpu()
    check_args(args, dist.get_world_size())
    claim(args.model_path, args.log_path, replace=args.continue_train or args.overwrite)
    parts = 1 if on_gpu() else parts_of_a_batch(args.batch_size // dist.get_world_size(), args.crop_size**2)
    use_all_cores(cores_each() // parts)
    paddle.seed(args.seed)
    if on_gpu():
        search_kernels()
    else:
        keep_freed_memory()

    # Data
    loader, sampler = training_data(args)
    val_loader = validation_data(args)
    ab_bins, prior = load_ab_bins(), load_prior(args.prior)
    bin_weights = rebalancing_weights(prior, args.gamma) if args.rebalance else paddle.ones_like(prior)

    # Network
    network = CIC()
    if args.init_from:
        load_weights(network, find_weights(args.model_path, args.init_from))
    if args.sync_bn:
        if not on_gpu():
            raise UserError("--sync_bn: Paddle has synchronized batch norm on GPUs only")
        network = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if not on_gpu():
        convolve_in_parts(network, parts)

    # Optimizer
    rates = [args.lr / math.sqrt(10) ** i for i in range(len(args.lr_steps) + 1)]
    schedule = paddle.optimizer.lr.PiecewiseDecay(args.lr_steps, rates)
    optimizer = paddle.optimizer.Adam(
        schedule, args.beta1, args.beta2, parameters=network.parameters(), weight_decay=args.weight_decay
    )
    autocast, scaler = mixed_precision(args.amp)

    # Where an earlier run stopped
    flags = {name: getattr(args, name) for name in (*OBJECTIVE, *ORDER[:2], *FREE)}
    flags.update(images=len(loader.dataset), prior=prior.numpy())
    run = Run(args.model_path, network, optimizer, scaler, flags, args.keep)
    if args.continue_train:
        run.resume(args.which_epoch, (*OBJECTIVE, "prior") if args.rebalance else OBJECTIVE, ORDER)
    schedule.step(run.step)  # from the flags, not from the checkpoint: a changed --lr holds
    last_step = min(args.max_steps or math.inf, args.num_epochs * len(sampler))

    # Loop
    log = Log(args.log_path, TAGS, last=(run.step, run.batch != len(sampler)))
    meter = Meter("loss", "nats", "kl")
    model = paddle.DataParallel(network) if dist.get_world_size() > 1 else network
    set_training(network, args)
    stop = StopRequest()
    progress = tqdm(total=last_step, initial=run.step, unit="step", disable=None if is_first() else True)
    try:
        # An epoch whose steps are done may still lack its validation, when a signal came amid that.
        while run.epoch < args.num_epochs and (run.step < last_step or run.batch == len(sampler)) and not stop.signal:
            # What is left of the epoch, or as much as --max_steps or a signal lets be done
            sampler.begin(args.seed, run.epoch, skip=run.batch)
            loader.dataset.epoch = run.epoch
            meter.begin_epoch()
            for rgb, broken in meter.timed(from_workers(loader, stop)):
                loss, figures = objective(model, to_device(rgb), ab_bins, bin_weights, args, autocast)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.clear_grad()
                schedule.step()
                del loss  # and with it what it was computed from
                meter.add(figures, broken)
                run.step += 1
                run.batch += 1
                progress.update()
                if args.sync_bn and meter.steps == 1:
                    check_synchronized(network)
                if run.step % args.loss_step == 0 or run.step == last_step:
                    means = meter.read(args.max_broken)
                    figures = {"step": run.step, "epoch": run.epoch, **means, "lr": schedule.get_lr()}
                    log.write(LINE.format(**figures), figures)
                if run.step % args.save_latest == 0:
                    meter.check(args.max_broken)  # weights that went bad must not replace good ones
                    run.save("latest")
                if stop.after_step() or run.step >= last_step:
                    break
            meter.end_epoch(run.epoch, args.max_broken)

            # Validation, and the epoch's end
            if not stop.agreed() and val_loader:
                figures, picture = validate(network, val_loader, ab_bins, args, autocast, stop) or ({}, None)
                set_training(network, args)
                if figures:  # not stopped meanwhile
                    figures = {"step": run.step, **figures}
                    log.write(VAL_LINE.format(epoch=run.epoch, **figures), figures)
                    log.picture(PICTURE, picture, run.step)
                    if figures["val_kl"] < run.best_kl:
                        run.best_kl = figures["val_kl"]
                        run.save_weights("best")
            if run.batch == len(sampler) and not stop.signal:
                run.epoch, run.batch = run.epoch + 1, 0
                if run.epoch % args.save_freq == 0 or run.epoch == args.num_epochs:
                    run.save(run.epoch - 1, "latest")
        run.save("latest")
    finally:
        progress.close()
        stop.restore()
        log.close()

    latest = run.folder / "epoch_latest_model.pdparams"
    if stop.signal:
        if is_first():
            note(f"stopped at step {run.step}: {latest}; to go on: --continue_train")
        return 128 + stop.signal
    if is_first():
        print(f"{latest}: {run.step} steps; log in {args.log_path} (visualdl --logdir {args.log_path})")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
