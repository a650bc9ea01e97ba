"""Trains the network on a folder of photographs, nested or flat.

    python train.py --image_dir DIR --val_dir DIR                                    one process
    python -m paddle.distributed.launch --gpus 0,1,2,3 train.py --image_dir DIR      four GPUs
    python train.py --image_dir DIR --continue_train                                 go on after a stop

SIGTERM and Ctrl-C save `latest` before they end the run. Exit codes: 0 done, 1 a mistake or a fault (one line says
which), 2 unknown flags, 130 stopped by Ctrl-C, 143 by SIGTERM.

The defaults are the paper's (its final model: 450,000 steps of 40 images). The results table's variants:
full --gamma 0.5 · non-rebalance --rebalance False · rebalance --gamma 0.

Prints a line, and writes one of JSON to <log_path>/train.jsonl, every --loss_step steps:

    epoch 0  step    100  loss 12345.6  nats 3.456  kl 2.345  lr 3.16e-05  images/s 12.3  waiting 1%
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
import zlib  # noqa: F401  ahead of Paddle, whose 2.x GPU builds carry a zlib with which Pillow reads no PNG
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.io import DataLoader, DistributedBatchSampler, Subset
from tqdm import tqdm

from dataset import ColorizationDataset, lab_to_rgb, list_images, rgb_to_lab, rgb_to_lightness, soft_encode, to_uint8
from model import CIC
from utils import (
    MAX_THRESHOLD,
    HelpFormatter,
    UserError,
    add_bool_flag,
    annealed_mean,
    atomic_path,
    auc,
    available_cores,
    check_at_least,
    check_crop,
    entropy,
    error_histogram,
    is_gray,
    keep_freed_memory,
    load_ab_bins,
    load_checkpoint,
    load_prior,
    load_weights,
    note,
    printable,
    rebalancing_weights,
    remove_temporaries,
    save_checkpoint,
    set_weights,
    soft_cross_entropy,
    use_all_cores,
)

warnings.filterwarnings("ignore", message="When training, we now always track")  # says nothing that one could mend

INIT_IMAGES = 8  # that data-dependent initialization looks at
ASK_SECONDS = 1  # between two questions among the processes whether to stop: after Ctrl-C a launcher may give them 4
PART_PIXELS = 2**16  # found by measuring: 16 squares of 64 pixels are as fast in one part as in two
PANEL_IMAGES = 6  # validation images in VisualDL's picture
LINE = (
    "epoch {epoch:3d}  step {step:6d}  loss {loss:9.1f}  nats {nats:.4f}  kl {kl:.4f}  lr {lr:.3g}  "
    "images/s {images_per_second:.1f}  waiting {waiting:.0%}"
)
VAL_LINE = (
    "epoch {epoch:3d}  step {step:6d}  validation: nats {val_cross_entropy:.4f}  kl {val_kl:.4f}  raw AuC {val_auc:.2%}"
)
BOARD = {  # what VisualDL calls the figures, in its order; a figure of training beside its like of validation
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

# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Trains the colorization network on a folder of photographs.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--image_dir", required=True, help="folder of training photographs, nested or flat")
    add("--val_dir", help="folder of validation photographs, looked at after each epoch (default: none)")
    add("--load_size", type=int, default=256, help="the short side is resized to this many pixels")
    add("--crop_size", type=int, default=176, help="side of the random crops in pixels, a multiple of 8")
    add("--num_workers", type=int, default=min(8, cores_each()), help="processes that decode, for each device")
    add("--max_broken", type=float, default=0.1, help="share of unreadable images in an epoch that stops the run")

    group = parser.add_argument_group("method")
    add_bool_flag(group, "--rebalance", True, "weight rare colors up in the loss")
    add = group.add_argument
    add("--gamma", type=float, default=0.5, help="lambda of Eq. 4: share of the uniform in the prior, 0 to 1")
    add("--prior", help="file of 313 probabilities (resources/estimate_prior.py) (default: the shipped prior)")
    add("--NN", type=int, default=5, help="nearest bins that share in a color's soft-encoding")
    add("--sigma", type=float, default=5.0, help="of the soft-encoding's Gaussian, in ab units")

    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--num_epochs", "--num_epoch", type=int, default=20, help="passes over the training set")
    add("--max_steps", type=int, help="stop after this many steps, whatever the epoch (default: after --num_epochs)")
    add("--batch_size", type=int, default=40, help="images in a step, over all processes together")
    add("--lr", type=float, default=3.16e-5, help="Adam's learning rate")
    add("--lr_steps", type=int, nargs="*", default=[200_000, 375_000], help="steps at which it falls by sqrt(10)")
    add("--beta1", type=float, default=0.9, help="Adam's decay of the first moment, for each step")
    add("--beta2", type=float, default=0.99, help="Adam's decay of the second moment, for each step")
    add("--weight_decay", type=float, default=1e-3, help="L2 penalty, beside a loss that sums over positions")
    add("--seed", type=int, default=0, help="of the initialization, the order of images and their crops")
    add(
        "--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision; auto: what the GPU has"
    )
    add_bool_flag(
        group, "--data_init", False, "scale each layer of a new network to unit variance on a few photographs"
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
        help="start from these weights (fine-tuning), all else new (default: random)",
    )
    add_bool_flag(group, "--continue_train", False, "go on where a run in --model_path was stopped")
    add("--which_epoch", default="latest", help="the one to go on from: latest, or an epoch's number")
    add("--save_latest", type=int, default=2000, help="steps between saves of epoch_latest_model.pdparams")
    add("--save_freq", type=int, default=1, help="epochs between saves of epoch_{N}_model.pdparams")
    add("--keep", type=int, default=0, help="numbered checkpoints to keep, the newest; 0 keeps all")
    add("--loss_step", type=int, default=50, help="steps between lines of the log")
    return parser.parse_args(argv)


def check_args(args, processes):
    """Turns contradictions among the flags into one clear line before any work is done."""
    check_at_least(args, load_size=1, crop_size=1, batch_size=1, num_epochs=1, save_latest=1, save_freq=1, loss_step=1)
    for name in ("lr", "sigma"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    check_crop(args, multiple=8)
    if args.batch_size % processes:
        raise UserError(f"--batch_size {args.batch_size}: cannot be shared out evenly among {processes} processes")
    for name in ("num_workers", "keep", "max_broken", "weight_decay"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must not be negative")
    if args.freeze_bn and args.sync_bn:
        raise UserError("--freeze_bn and --sync_bn exclude each other")
    if args.continue_train and args.init_from:
        raise UserError("--continue_train and --init_from exclude each other")
    if not re.fullmatch(r"latest|\d+", args.which_epoch):
        raise UserError(f"--which_epoch {args.which_epoch}: is neither latest nor a number")


# -------------------------------------------------------------------------------------------------
# Data


class EpochSampler(DistributedBatchSampler):
    """Random batches of the whole set, shared out among the processes, from anywhere in any epoch.

    The order follows from seed and epoch alone, whatever the number of processes: each takes its part of every
    batch. (Paddle's own order depends on their number, as it fills the set up to a multiple of it beforehand.)
    """

    def begin(self, seed, epoch, skip):
        self.seed, self.epoch, self.skip = seed, epoch, skip

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
        for batch in range(self.skip, len(self)):
            start = (batch * self.nranks + self.local_rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()

    def __len__(self):
        """Batches in an epoch; the few images that do not fill one wait for the next epoch."""
        return len(self.dataset) // (self.batch_size * self.nranks)


def begin_worker(_):
    """In a process that reads images: it ends when its parent does, whatever ends that, and not before.

    Ctrl-C and a launcher's SIGTERM reach a whole group of processes, which a worker therefore leaves. Paddle's own
    watch over the parent waits for work first, so that a worker would outlive a parent that was killed.
    """
    os.setpgrp()
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()


def leave_with(parent):
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def batches(loader):
    """What the loader yields. Raises UserError when a process that reads images is gone."""
    iterator = iter(loader)
    # Paddle would raise an error wherever this process is, once for each worker that ends, also amid a save. Without
    # that it notices in some seconds, here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from iterator
    except SystemError as error:
        for worker in multiprocessing.active_children():  # one may wait for a lock that the dead one held
            worker.kill()
        raise UserError(
            "a process that reads images was killed or failed (too little memory, or too little in /dev/shm?); "
            "go on with --continue_train, perhaps with fewer --num_workers"
        ) from error
    finally:
        iterator._try_shutdown_all()  # left to Paddle, one that was not read to its end could hang at the exit


def list_once(folder):
    """`list_images`, by the first process for all: they need agree, and a large folder is slow to walk through."""
    listing = [list_images(folder) if is_first() else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(listing, src=0)
    return listing[0]


def training_data(args):
    """The training set's loader and its sampler."""
    dataset = ColorizationDataset(
        list_once(args.image_dir), args.load_size, args.crop_size, augment=True, seed=args.seed
    )
    if len(dataset) < args.batch_size:
        raise UserError(
            f"{printable(args.image_dir)}: {len(dataset)} images do not fill one --batch_size {args.batch_size}"
        )
    sampler = EpochSampler(dataset, args.batch_size // dist.get_world_size())
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.num_workers, worker_init_fn=begin_worker)
    return loader, sampler


def validation_data(args):
    """Center squares of the validation set, this process's share of them; None without --val_dir."""
    if not args.val_dir:
        return None
    side = args.load_size // 8 * 8
    dataset = ColorizationDataset(list_once(args.val_dir), args.load_size, side)
    share = Subset(dataset, range(dist.get_rank(), len(dataset), dist.get_world_size()))
    batch_size = max(1, args.batch_size // dist.get_world_size() // 2)  # larger images than in training
    return DataLoader(share, batch_size=batch_size, num_workers=args.num_workers, worker_init_fn=begin_worker)


def targets(rgb):
    """uint8 [N, 3, H, W] -> lightness [N, 1, H, W] and the ab to predict [N, 2, H/4, W/4].

    ab at a quarter of the resolution is every 4th pixel, as in the authors' graph.
    """
    return rgb_to_lightness(rgb), rgb_to_lab(rgb[:, :, ::4, ::4])[:, 1:]


# -------------------------------------------------------------------------------------------------
# The network's beginning


def set_training(network, args):
    """Training mode; with --freeze_bn, batch norm keeps to its stored statistics."""
    network.train()
    if args.freeze_bn:
        for layer in network.sublayers():
            if isinstance(layer, paddle.nn.BatchNorm2D):
                layer.eval()


@paddle.no_grad()
def data_dependent_init(network, lightness):
    """Scales each convolution so that its outputs have mean 0 and variance 1 on these images, channel by channel.

    After Krähenbühl et al. (ICLR 2016), as the authors did for this network. One forward pass: every layer is
    mended as the images reach it, so the next one already sees mended inputs.
    """

    def standardize(layer, _, output):
        mean = output.mean(axis=[0, 2, 3])
        centered = output - mean.reshape([1, -1, 1, 1])
        scale = 1 / ((centered**2).mean(axis=[0, 2, 3]) + 1e-8).sqrt()
        transposed = isinstance(layer, paddle.nn.Conv2DTranspose)  # its weight is [in, out, k, k]
        layer.weight.set_value(layer.weight * scale.reshape([1, -1, 1, 1] if transposed else [-1, 1, 1, 1]))
        layer.bias.set_value((layer.bias - mean) * scale)
        return centered * scale.reshape([1, -1, 1, 1])

    convolutions = [x for x in network.sublayers() if isinstance(x, (paddle.nn.Conv2D, paddle.nn.Conv2DTranspose))]
    hooks = [layer.register_forward_post_hook(standardize) for layer in convolutions]
    network(lightness - 50)
    for hook in hooks:
        hook.remove()


# -------------------------------------------------------------------------------------------------
# Validation


@paddle.no_grad()
def validate(network, loader, ab_bins, args, stop):
    """Cross-entropy and KL in nats per position, raw AuC, and a picture; over the validation images of all processes.

    The figures need no rebalancing, so that they compare between variants. None when asked to stop meanwhile.
    """
    share_statistics(network)
    network.eval()
    sums, histogram, panel = np.zeros(3), 0, []
    for rgb, broken in tqdm(
        batches(loader), "validating", len(loader), unit="batch", leave=False, disable=None if is_first() else True
    ):
        if stop.noticed:
            break
        readable = np.flatnonzero(broken.numpy() == 0)
        if not len(readable):
            continue
        rgb = paddle.gather(rgb, paddle.to_tensor(readable))
        lightness, ab = targets(rgb)
        indices, weights = soft_encode(ab, ab_bins, args.NN, args.sigma)
        logits = network(lightness - 50)
        nats = soft_cross_entropy(logits, indices, weights).mean(axis=[1, 2])
        kl = nats - entropy(weights).mean(axis=[1, 2])
        sums += [float(nats.sum()), float(kl.sum()), len(rgb)]
        lab = rgb_to_lab(rgb)
        colored = F.interpolate(annealed_mean(logits, ab_bins), scale_factor=4, mode="bilinear")
        histogram = histogram + error_histogram(colored.numpy().swapaxes(0, 1), lab[:, 1:].numpy().swapaxes(0, 1))
        if len(panel) < PANEL_IMAGES:
            panel += [compare(*images) for images in zip(lab, colored, rgb)]
    if stop.agreed():
        return None
    totals = all_reduce(np.concatenate([sums, histogram if sums[2] else np.zeros(MAX_THRESHOLD + 2)]))
    if not totals[2]:
        raise UserError(f"{printable(args.val_dir)}: none of the images can be read")
    figures = {"val_cross_entropy": totals[0] / totals[2], "val_kl": totals[1] / totals[2], "val_auc": auc(totals[3:])}
    return figures, arrange(panel[:PANEL_IMAGES]) if panel else None


def compare(lab, ab, rgb):
    """gray | colored | true, side by side: Lab [3, H, W], ab [2, H, W], uint8 [3, H, W] -> uint8 [H, 3W, 3]."""
    lightness = lab[:1]
    candidates = paddle.stack([paddle.concat([lightness, paddle.zeros_like(ab)]), paddle.concat([lightness, ab])])
    gray, colored = to_uint8(lab_to_rgb(candidates))
    return np.concatenate([x.numpy().transpose(1, 2, 0) for x in (gray, colored, rgb)], axis=1)


def arrange(panel):
    """Comparisons [H, 3W, 3] in rows of two on white: VisualDL's frame is twice as wide as high."""
    gap = max(2, len(panel[0]) // 16)
    cells = [np.pad(x, ((0, gap), (0, gap), (0, 0)), constant_values=255) for x in panel]
    if len(cells) % 2 and len(cells) > 1:
        cells.append(np.full_like(cells[0], 255))
    return np.concatenate([np.concatenate(cells[i : i + 2], axis=1) for i in range(0, len(cells), 2)])


# -------------------------------------------------------------------------------------------------
# Processes


def is_first():
    return dist.get_rank() == 0


def cores_each():
    """The cores of this machine for each of the processes that train on it."""
    return max(1, available_cores() // int(os.environ.get("PADDLE_LOCAL_SIZE", 1)))


def parts_of_a_batch(batch_size, crop_size):
    """Into how many parts a batch is cut for the cores of a CPU (see model.py).

    A part of fewer than PART_PIXELS spends its time on reading the weights, which then all cores better do together.
    """
    return max(1, min(cores_each(), batch_size, batch_size * crop_size**2 // PART_PIXELS))


def all_reduce(values, operation=dist.ReduceOp.SUM):
    """The sum (or maximum) of a float64 array over the processes."""
    if dist.get_world_size() == 1:
        return values
    total = paddle.to_tensor(values)
    dist.all_reduce(total, operation)
    return total.numpy()


@paddle.no_grad()
def share_statistics(network):
    """Gives all processes the mean of their batch norm statistics, which each gathers from its own images."""
    if dist.get_world_size() > 1:
        for tensor in network.state_dict().values():
            if tensor.stop_gradient:  # a statistic, not a weight
                dist.all_reduce(tensor)
                tensor.set_value(tensor / dist.get_world_size())


class StopRequest:
    """SIGTERM or Ctrl-C: noted here, obeyed between two steps. A second Ctrl-C leaves at once.

    So is the end of the launcher, which of several processes is the parent: one kind of it (that of gloo) has no
    ear for SIGTERM and dies without a word to them.
    """

    def __init__(self):
        self.launcher = os.getppid() if dist.get_world_size() > 1 else None
        self.noticed = 0  # by this process
        self.signal = 0  # that all processes agreed to obey
        self.steps, self.pause, self.asked = 0, 1, time.perf_counter()
        self.before = {number: signal.signal(number, self.notice) for number in (signal.SIGINT, signal.SIGTERM)}

    def notice(self, number, _):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # but not SIGTERM: a launcher sends it several times
        if not self.noticed and is_first():
            # Not by print: the signal may have come amid one.
            os.write(2, b"\nstopping after this step; Ctrl-C once more leaves at once\n")
        self.noticed = self.noticed or number

    def agreed(self):
        """The signal that any of the processes was sent, or 0; to be asked by all of them at the same place."""
        if self.launcher and os.getppid() != self.launcher:
            self.noticed = self.noticed or signal.SIGTERM
        self.signal = int(all_reduce(np.array([self.noticed], np.float64), dist.ReduceOp.MAX)[0])
        return self.signal

    def after_step(self):
        """`agreed`, but several processes in fact ask each other every second or so only."""
        if dist.get_world_size() == 1:
            return self.agreed()
        self.steps += 1
        if self.steps < self.pause:
            return 0
        now = time.perf_counter()
        seconds = all_reduce(np.array([now - self.asked]), dist.ReduceOp.MAX)[0]
        self.pause = max(1, int(ASK_SECONDS * self.steps / seconds))  # the same in all processes, as it must be
        self.steps, self.asked = 0, now
        return self.agreed()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------
# Mixed precision


def mixed_precision(choice):
    """The autocast arguments and the loss scaler for --amp. Without mixed precision both do nothing."""
    on_gpu = paddle.get_device().startswith("gpu")
    if choice == "auto":
        choice = "off" if not on_gpu else "bf16" if paddle.amp.is_bfloat16_supported() else "fp16"
    if choice != "off" and not on_gpu:
        note(f"--amp {choice}: Paddle has mixed precision on GPUs only, so this run is in float32")
        choice = "off"
    dtype = "bfloat16" if choice == "bf16" else "float16"
    scaler = paddle.amp.GradScaler(enable=choice == "fp16", init_loss_scaling=1024.0)
    return {"enable": choice != "off", "dtype": dtype}, scaler


# -------------------------------------------------------------------------------------------------
# Checkpoints and resumption

# Flags that say what is optimized: a run that goes on with others would be neither the one nor the other.
OBJECTIVE = ("rebalance", "gamma", "NN", "sigma")
# Flags that say which image comes when: with others the place within the epoch means nothing.
ORDER = ("seed", "batch_size", "images")
# Flags that may change on the way.
FREE = ("crop_size", "load_size", "lr", "lr_steps", "beta1", "beta2", "weight_decay", "amp", "freeze_bn")


class Run:
    """Network, optimizer, scaler and how far they are: what a checkpoint holds.

    `epoch` and `batch` are what comes next, `step` counts the steps done. Of random state there is only the
    seed: which image comes when, and its crop, follow from seed, epoch and index.
    """

    def __init__(self, args, network, optimizer, scaler, prior, images):
        self.args, self.network, self.optimizer, self.scaler = args, network, optimizer, scaler
        self.folder = Path(args.model_path)
        self.epoch = self.batch = self.step = 0
        self.best_kl = math.inf
        flags = {name: getattr(args, name) for name in (*OBJECTIVE, *FREE, "seed", "batch_size")}
        self.flags = {**flags, "images": images, "prior": prior.numpy()}
        if is_first():
            remove_temporaries(self.folder)

    def save(self, *names):
        """Writes `epoch_{name}_model.pdparams`, and beside it all that is needed to go on.

        The training state holds the weights as well, so that it is whole by itself: a stop between the two
        files leaves no weights beside another step's moments.
        """
        share_statistics(self.network)
        if not is_first():
            return
        weights = self.network.state_dict()
        if not all(bool(paddle.isfinite(tensor).all()) for tensor in weights.values()):
            raise UserError("the weights are not finite, so they are not saved: try a lower --lr, or --continue_train")
        state = {
            "network": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {k: getattr(self, k) for k in ("epoch", "batch", "step", "best_kl")},
            "flags": self.flags,
        }
        for name in names:
            save_checkpoint(state, self.folder / f"epoch_{name}_state.pdopt")
            self.save_weights(name)
        self.prune()

    def save_weights(self, name):
        if is_first():
            save_checkpoint(self.network.state_dict(), self.folder / f"epoch_{name}_model.pdparams")

    def prune(self):
        """Removes numbered checkpoints beyond the newest --keep; never `latest` nor `best`."""
        matches = [re.fullmatch(r"epoch_(\d+)_model\.pdparams", path.name) for path in self.folder.glob("epoch_*")]
        # Later ones than this run's are another's, and not newer.
        epochs = sorted(int(match[1]) for match in matches if match and int(match[1]) < self.epoch)
        for epoch in epochs[: -self.args.keep] if self.args.keep else []:
            for name in ("model.pdparams", "state.pdopt"):
                (self.folder / f"epoch_{epoch}_{name}").unlink(missing_ok=True)

    def resume(self, name):
        """Restores all that `save` wrote. Raises UserError when the flags ask for another training than that was."""
        path = self.folder / f"epoch_{name}_state.pdopt"
        if not path.exists() and path.with_name(f"epoch_{name}_model.pdparams").exists():
            raise UserError(f"{printable(path)}: not there; weights alone can start a training: --init_from FILE")
        state = load_checkpoint(path)
        if missing := {"network", "optimizer", "scaler", "progress", "flags"} - state.keys():
            raise UserError(
                f"{printable(path)}: not a training state of train.py, it lacks {', '.join(sorted(missing))}"
            )
        self.compare_flags(state["flags"], path)
        set_weights(self.network, state["network"], path)
        self.optimizer.set_state_dict(to_tensors(state["optimizer"]))
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for key, value in state["progress"].items():
            setattr(self, key, value)
        if any(state["flags"].get(key) != self.flags[key] for key in ORDER) and self.batch:
            note(f"beginning epoch {self.epoch} again: its order of images is another one now")
            self.batch = 0

    def compare_flags(self, before, path):
        def changed(names):
            return [f"--{x} {before.get(x)} is now {self.flags[x]}" for x in names if before.get(x) != self.flags[x]]

        other = changed(OBJECTIVE)
        if self.args.rebalance and not np.allclose(before["prior"], self.flags["prior"]):
            other.append("the prior is another one")
        if other:
            raise UserError(
                f"{printable(path)}: trained otherwise: {'; '.join(other)} (to start anew from it: --init_from)"
            )
        for difference in changed((*ORDER, *FREE)):
            note(f"continuing with a changed setting: {difference.replace('--images', 'number of images')}")


def to_tensors(state):
    """NumPy arrays in nested dicts -> tensors."""
    if isinstance(state, dict):
        return {key: to_tensors(value) for key, value in state.items()}
    return paddle.to_tensor(state) if isinstance(state, np.ndarray) else state


# -------------------------------------------------------------------------------------------------
# Logs


class Log:
    """Lines on the terminal, JSON lines and VisualDL; of the first process, silent in the others."""

    def __init__(self, folder, step, to_validate):
        """Of a run that begins after `step`, if `to_validate` with a validation: lines of what comes are removed.

        They are there when an earlier run was killed.
        """
        self.folder, self.file, self.board = folder, None, None
        if not is_first():
            return
        from visualdl import LogWriter

        path = Path(folder) / "train.jsonl"
        last = (step, not to_validate)
        with self.one_line():
            before = path.read_text().splitlines(keepends=True) if path.exists() and step else []
            with atomic_path(path) as temporary:
                temporary.write_text("".join(line for line in before if place(line) <= last))
            self.file = open(path, "a")  # noqa: SIM115
            records = continued_records(Path(folder), last) if step else ""
            with redirect_stdout(None):  # it would announce that it goes on in a file
                self.board = LogWriter(logdir=str(folder), file_name=records)

    @contextmanager
    def one_line(self):
        """A full disk or a folder that is not writable: what went wrong in one line."""
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{printable(self.folder)}: the log cannot be written: {reason}") from error

    def write(self, line, figures, step):
        if self.file is None:
            return
        tqdm.write(line)
        with self.one_line():
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            self.file.flush()
            for name, tag in BOARD.items():
                if name in figures:
                    self.board.add_scalar(tag, figures[name], step)

    def picture(self, image, step):
        if self.file is not None and image is not None:
            self.board.add_image(PICTURE, image, step)

    def close(self):
        if self.file is not None:
            with suppress(OSError):  # told already, when it was written
                self.file.close()
                self.board.close()


def place(line):
    """Of a line of train.jsonl: its step and whether it comes after the step, from a validation."""
    try:
        figures = json.loads(line)
    except ValueError:  # cut off when the run was killed
        return math.inf, True
    return figures["step"], "val_kl" in figures


def continued_records(folder, last):
    """The name of the file in which VisualDL's records go on, up to the place `last`; "" for a new one.

    VisualDL shows only the latest file of a folder, so that one must hold what came before a stop too. A file of which
    something must go is left as it is, for a server that is reading it, and a later one begins with the rest.
    """
    before = max(folder.glob("vdlrecords.*.log"), default=None)
    if before is None:
        return ""
    kept = b"".join(record for record, *where in board_records(before) if tuple(where) <= last)
    if len(kept) == before.stat().st_size:
        return before.name
    with atomic_path(folder / f"vdlrecords.{time.time():010.0f}.log") as temporary:
        temporary.write_bytes(kept)
    return max(folder.glob("vdlrecords.*.log")).name


def board_records(path):
    """VisualDL's records as they lie in a file, each with its step and whether it is of a validation."""
    from google.protobuf.message import DecodeError
    from visualdl.proto.record_pb2 import Record

    data, start = path.read_bytes(), 0
    while start < len(data):
        end = start + 8 + int.from_bytes(data[start : start + 8], "little")  # its length in 8 bytes, then the record
        if end > len(data):  # cut off when the run was killed
            return
        try:
            value = Record.FromString(data[start + 8 : end]).values[0]
        except (DecodeError, IndexError):  # or spoiled by a power cut
            return
        yield data[start:end], value.id, value.tag.startswith("validation/")
        start = end


class Meter:
    """Sums of the steps' figures, kept on the device: reading them there would make it wait in every step."""

    def __init__(self):
        self.begin_epoch()
        self.begin_interval()

    def begin_epoch(self):
        self.broken, self.seen = 0, 0

    def begin_interval(self):
        self.sums, self.steps, self.images, self.waited, self.began = 0, 0, 0, 0.0, time.perf_counter()

    def add(self, figures, broken):
        """`figures`: loss, nats and kl of a step, a tensor [3]; `broken`: int64 [N], of its images."""
        self.sums = self.sums + figures
        self.broken = self.broken + broken.sum()
        self.steps += 1
        self.images += len(broken)
        self.seen += len(broken)

    def timed(self, batches):
        """The batches, with the time spent waiting for them added up."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def check(self, max_broken):
        """Raises UserError for a loss that is not finite and for too many broken images, over all processes."""
        local = [*np.asarray(self.sums + paddle.zeros([3])), float(self.broken), self.seen]
        *sums, broken, seen = all_reduce(np.array(local, np.float64)).tolist()
        tried = seen + broken  # a broken image is replaced by another one
        if not math.isfinite(sums[0]):
            raise UserError(
                f"the loss is not finite ({sums[0]}, over the last {self.steps} steps): try a lower --lr, "
                "or go on from the last checkpoint with --continue_train"
            )
        if broken > max_broken * max(tried, 20):  # a few are let pass in the smallest sets
            raise UserError(f"{broken:.0f} of {tried:.0f} images cannot be read: more than --max_broken {max_broken:g}")
        return sums, int(broken), int(tried)

    def read(self, max_broken):
        """The means of the interval that ends here, over all processes."""
        (loss, nats, kl), _, _ = self.check(max_broken)
        world, seconds = dist.get_world_size(), time.perf_counter() - self.began
        figures = {name: x / (self.steps * world) for name, x in (("loss", loss), ("nats", nats), ("kl", kl))}
        figures.update(images_per_second=self.images * world / seconds, waiting=self.waited / seconds)
        self.begin_interval()
        return figures


# -------------------------------------------------------------------------------------------------


@paddle.utils.unique_name.guard()  # Adam's state goes by names that Paddle counts up: from 0 in every run
def main(args):
    # Setup
    if dist.ParallelEnv().world_size > 1:
        dist.init_parallel_env()
    check_args(args, dist.get_world_size())
    on_gpu = paddle.get_device().startswith("gpu")
    parts = 0 if on_gpu else parts_of_a_batch(args.batch_size // dist.get_world_size(), args.crop_size)
    use_all_cores(cores_each() // max(1, parts))
    paddle.seed(args.seed)
    if on_gpu:
        paddle.set_flags({"FLAGS_cudnn_exhaustive_search": True})  # worth its search: the shapes never change
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
        load_weights(network, args.init_from)
    elif args.data_init and not args.continue_train:
        few = range(0, len(loader.dataset), math.ceil(len(loader.dataset) / INIT_IMAGES))
        squares = np.stack([loader.dataset[i][0] for i in few])
        data_dependent_init(network, rgb_to_lightness(paddle.to_tensor(squares)))
    network.parts = parts
    if args.sync_bn:
        if not on_gpu:
            raise UserError("--sync_bn: Paddle has synchronized batch norm on GPUs only")
        network = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(network)

    # Optimizer
    rates = [args.lr / math.sqrt(10) ** i for i in range(len(args.lr_steps) + 1)]
    schedule = paddle.optimizer.lr.PiecewiseDecay(args.lr_steps, rates)
    optimizer = paddle.optimizer.Adam(
        schedule, args.beta1, args.beta2, parameters=network.parameters(), weight_decay=args.weight_decay
    )
    autocast, scaler = mixed_precision(args.amp)

    # Where an earlier run stopped
    run = Run(args, network, optimizer, scaler, prior, len(loader.dataset))
    if args.continue_train:
        run.resume(args.which_epoch)
    schedule.step(run.step)  # from the flags, not from the checkpoint: a changed --lr holds
    log = Log(args.log_path, run.step, to_validate=run.batch == len(sampler))
    model = paddle.DataParallel(network) if dist.get_world_size() > 1 else network
    set_training(network, args)
    last_step = args.max_steps or args.num_epochs * len(sampler)

    def train_step(rgb):
        """One step on uint8 [N, 3, H, W]; returns loss, nats and kl as a tensor [3], which nobody need wait for."""
        with paddle.no_grad():
            lightness, ab = targets(rgb)
            indices, weights = soft_encode(ab, ab_bins, args.NN, args.sigma)
            importance = paddle.gather(bin_weights, indices[:, 0].flatten()).reshape(indices[:, 0].shape)
            importance = importance * (~is_gray(ab)).astype("float32").reshape([-1, 1, 1])
        with paddle.amp.auto_cast(**autocast):
            logits = model(lightness - 50)
        nats = soft_cross_entropy(logits.astype("float32"), indices, weights)
        # Divided by all images, gray ones too: no process need know what another one drew.
        loss = (importance * nats).sum() / len(rgb)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad()
        schedule.step()
        with paddle.no_grad():
            mean_nats = nats.mean()
            kl = mean_nats - entropy(weights).mean()
            return paddle.stack([loss, mean_nats, kl])

    # Loop
    stop = StopRequest()
    meter = Meter()
    progress = tqdm(
        total=min(last_step, args.num_epochs * len(sampler)),
        initial=run.step,
        unit="step",
        disable=None if is_first() else True,
    )

    def report():
        figures = {"epoch": run.epoch, **meter.read(args.max_broken), "lr": schedule.get_lr()}
        log.write(LINE.format(step=run.step, **figures), figures, run.step)
        progress.set_postfix({x: f"{figures[x]:.3f}" for x in ("nats", "kl")}, refresh=False)

    def train_epoch():
        """What is left of the epoch, or as much as --max_steps or a signal lets be done."""
        sampler.begin(args.seed, run.epoch, skip=run.batch)
        loader.dataset.epoch = run.epoch
        meter.begin_epoch()
        for rgb, broken in meter.timed(batches(loader)):
            meter.add(train_step(rgb), broken)
            run.step += 1
            run.batch += 1
            progress.update()
            if run.step % args.loss_step == 0:
                report()
            if run.step % args.save_latest == 0:
                meter.check(args.max_broken)  # weights that went bad must not replace good ones
                run.save("latest")
            if stop.after_step() or run.step >= last_step:
                break
        _, broken, tried = meter.check(args.max_broken)
        if broken and is_first():
            note(f"epoch {run.epoch}: {broken} of {tried} images could not be read; others took their place")

    def validate_epoch():
        figures, picture = validate(network, val_loader, ab_bins, args, stop) or (None, None)
        set_training(network, args)
        if figures is None:  # stopped
            return
        log.write(VAL_LINE.format(epoch=run.epoch, step=run.step, **figures), figures, run.step)
        log.picture(picture, run.step)
        if figures["val_kl"] < run.best_kl:
            run.best_kl = figures["val_kl"]
            run.save_weights("best")

    try:
        while run.epoch < args.num_epochs and run.step < last_step and not stop.signal:
            train_epoch()
            if not stop.agreed() and val_loader:
                validate_epoch()
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
    sys.exit(main(parse_args()))
