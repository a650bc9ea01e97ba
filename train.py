"""Train the network on a folder of images, nested or flat.

    python train.py --image_dir DIR --val_dir DIR                                    one process
    python -m paddle.distributed.launch --gpus 0,1,2,3 train.py --image_dir DIR      four GPUs
    python train.py --image_dir DIR --continue_train                                 resume after a stop

Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save `latest` and end the run. Exit codes: 0 finished, 1 an error (reported
on one line), 2 a usage error, 128 + its number if a signal stopped it (130: Ctrl-C, 143: SIGTERM), 141 standard output
was closed.

The defaults are those of the paper's final model, except for 20 epochs instead of --max_steps 450000. Variants of the
loss: --gamma 0.5 (the default, the paper's model), --rebalance False (the paper's "class"), --gamma 0 (of an earlier
Paddle port) and --loss l2 (the paper's baseline).

At its first step, every --loss_step steps and at its last step, a run prints a line (and writes the same values as
JSON to <log_path>/train.jsonl):

    epoch   0  step    100  loss   12345.6  cross_entropy 3.4560  kl 2.3450
    images_per_second 12.3  waiting 1%  lr 3.16e-05  (on the same line)
"""

import logging
import math
import os
import sys
import warnings
import zlib
from contextlib import ExitStack, contextmanager
from typing import Callable, NamedTuple

from support import cli, convolutions, cpu, gpu, processes, runs
from support.cli import UserError, note, number, whole
from support.logs import Log, Meter, finish
from support.neighbors import Lookup
from support.workers import default_workers, from_workers, make_loader

import numpy as np
import paddle
import paddle.distributed as dist
from tqdm import tqdm

import dataset
import utils
from model import CIC
from pretrained import find_weights, initialize

PANEL_IMAGES = 3  # validation images in VisualDL's picture
FORMATS = {  # of the values in the log
    "epoch": "3d",
    "step": "6d",
    "loss": "9.1f",
    "cross_entropy": ".4f",
    "kl": ".4f",
    "rmse": ".3f",
    "auc": ".2%",
    "lr": ".3g",
    "images_per_second": ".1f",
    "waiting": ".0%",
}
PICTURE = "validation/gray, colored, true"
ADVICE = "resume it with --continue_train, replace it with --overwrite, or choose another --model_path and --log_path"
ENTRIES = ("load_size", "epoch", "step")  # stored with the weights, for programs that use them
CLASSIFICATION = ("rebalance", "gamma", "NN", "sigma", "prior")  # flags that apply to this loss alone
# Flags that define the loss: a run cannot be resumed with others.
LOSS = ("loss", *CLASSIFICATION)
# Flags that define the order of the images, as these do: after a change, an epoch cannot be resumed in the middle.
ORDER = ("seed", "batch_size")
# Flags that may change when a run is resumed.
FREE = ("crop_size", "load_size", "lr", "lr_steps", "beta1", "beta2", "weight_decay", "amp", "freeze_bn")

# -------------------------------------------------------------------------------------------------
# Loss


class Constants(NamedTuple):
    """Tensors, tables and settings that a loss uses at every step."""

    ab_bins: paddle.Tensor  # float32 [Q, 2]
    bin_weights: paddle.Tensor  # float32 [Q], w of Eq. 4
    lookup: Lookup  # the --NN nearest bins of a color
    sigma: float  # of the soft-encoding
    autocast: dict  # arguments of `paddle.amp.auto_cast`


def make_constants(args, autocast):
    ab_bins, prior = utils.load_ab_bins(), utils.load_prior(args.prior)
    bin_weights = utils.rebalancing_weights(prior, args.gamma) if args.rebalance else paddle.ones_like(prior)
    return Constants(ab_bins, bin_weights, Lookup(ab_bins, args.NN), args.sigma, autocast)


def forward(network, rgb, constants):
    """Return the network's output for images, uint8 [N, 3, H, W], and the ab that they have at its positions.

    Returns:
        tuple[Tensor, Tensor]: The output, logits or ab, float32 [N, Q or 2, H/4, W/4]; ab, float32 [N, 2, H/4, W/4].
    """
    lightness, ab = dataset.targets(rgb)  #                                    [N, 1, H, W], [N, 2, H/4, W/4]
    with paddle.amp.auto_cast(**constants.autocast):
        output = network(lightness - 50)
    return output.astype("float32"), ab


def classification(logits, ab, constants):
    """Compute the loss of each image (Eq. 2): -sum_hw v(Z_hw) sum_q Z_hwq log Z^_hwq.

    Args:
        logits (Tensor): float32 [N, Q, H/4, W/4].
        ab (Tensor): float32 [N, 2, H/4, W/4]. The ground truth.
        constants (Constants): Result of `make_constants`.

    Returns:
        Tensor: The values of each image, float32 [N, 3]: its loss (0 if it is gray) and, without gradients,
        cross-entropy and KL, both not re-weighted, in nats per position.
    """
    # Z, given by its few non-zero entries: their bins and probabilities.
    lookup, sigma = constants.lookup, constants.sigma
    indices, probabilities = dataset.soft_encode(ab, constants.ab_bins, lookup.k, sigma, lookup)
    entropy = utils.entropy(probabilities).mean(axis=[1, 2])  #                                  [N]
    v = utils.position_weight(indices, ab, constants.bin_weights)  #                             [N, H/4, W/4]
    losses = utils.soft_cross_entropy(logits, indices, probabilities)  #                         [N, H/4, W/4]
    cross_entropy = losses.detach().mean(axis=[1, 2])  #                                         [N]
    return paddle.stack([(v * losses).sum(axis=[1, 2]), cross_entropy, cross_entropy - entropy], axis=1)


def l2(predicted, ab, constants):
    """Compute the loss of each image of the paper's baseline (Eq. 1): 1/2 sum_hw |Y_hw - Y^_hw|^2.

    All images count, gray ones too: Eq. 1 has no weights.

    Args:
        predicted (Tensor): float32 [N, 2, H/4, W/4]. The predicted ab; the others are those of `classification`.

    Returns:
        Tensor: The values of each image, float32 [N, 2]: its loss and, without gradients, the mean squared distance of
        ab per position.
    """
    squared = (predicted - ab).square().sum(axis=1)  #                                           [N, H/4, W/4]
    return paddle.stack([squared.sum(axis=[1, 2]) / 2, squared.detach().mean(axis=[1, 2])], axis=1)


class Objective(NamedTuple):
    """A loss, and how it is logged."""

    compute: Callable  # (output, ab, constants) -> values of each image [N, len(columns)]
    columns: dict  # names of the values and functions of their means; the first is the loss, the last selects `best`
    meaning: str  # of the columns
    head: str  # of the network
    predict: Callable  # (output, constants) -> ab


OBJECTIVES = {
    "classification": Objective(
        classification,
        {"loss": float, "cross_entropy": float, "kl": float},
        "loss, rebalanced and summed over positions; cross_entropy, kl: in nats per position",
        "conv8_313",
        lambda logits, constants: utils.annealed_mean(logits, constants.ab_bins),
    ),
    "l2": Objective(
        l2,
        {"loss": float, "rmse": math.sqrt},
        "loss, summed over positions; rmse: distance of predicted and true ab per position, root mean square",
        "conv8_ab",
        lambda ab, constants: ab,
    ),
}


def set_training(network, args):
    """Switch to training mode; with --freeze_bn, batch norm keeps using its stored statistics."""
    network.train()
    for layer in network.sublayers():
        if args.freeze_bn and isinstance(layer, paddle.nn.BatchNorm2D):
            layer.eval()


def make_optimizer(network, args):
    """Return Adam and its schedule: the learning rate falls by sqrt(10) at each of --lr_steps."""
    rates = [args.lr / math.sqrt(10) ** i for i in range(len(args.lr_steps) + 1)]
    schedule = paddle.optimizer.lr.PiecewiseDecay(args.lr_steps, rates)
    adam = paddle.optimizer.Adam(schedule, args.beta1, args.beta2, 1e-8, network.parameters(), args.weight_decay)
    return adam, schedule


# -------------------------------------------------------------------------------------------------
# Data


def training_data(args):
    """Return the loader of the training set and its sampler."""
    paths = processes.first_decides(dataset.list_images, args.image_dir)
    images = dataset.ColorizationDataset(paths, args.load_size, args.crop_size, augment=True, seed=args.seed)
    if len(images) < args.batch_size:
        raise UserError(f"{args.image_dir}: {len(images)} images do not fill one --batch_size {args.batch_size}")
    sampler = dataset.EpochSampler(images, args.batch_size // dist.get_world_size())
    return make_loader(images, sampler, args.num_workers), sampler


def validation_data(args, training):
    """Return the loader of this process's share of the validation set, center crops; None without --val_dir."""
    if not args.val_dir:
        return None
    paths = processes.first_decides(dataset.list_images, args.val_dir)
    images = dataset.ColorizationDataset(paths, args.load_size, args.load_size // 8 * 8)
    processes.on_first(warn_of_overlap, training, images, args)
    share = range(dist.get_rank(), len(images), dist.get_world_size())
    size = max(1, args.batch_size // dist.get_world_size() // 2)  # larger images than in training
    return make_loader(images, [share[i : i + size] for i in range(0, len(share), size)], args.num_workers)


def names_in(folder, images):
    """Return the paths of a dataset's images, relative to their folder."""
    return [images.path(i)[len(folder) :].strip(os.sep) for i in range(len(images))]


def describe(images, folder):
    """Return the number of a dataset's images and a checksum of their names, e.g. "4 (names 1f0c2d3a)"."""
    names = "\n".join(names_in(folder, images)).replace(os.sep, "/")
    return f"{len(images)} (names {zlib.crc32(os.fsencode(names)):08x})"


def warn_of_overlap(images, val_images, args):
    """Print a note if images for validation are also used for training."""
    top = os.path.realpath(args.image_dir)
    validation = {os.path.realpath(val_images.path(i)) for i in range(len(val_images))}
    both = sum(f"{top}{os.sep}{name}" in validation for name in names_in(args.image_dir, images))
    if both:
        note(f"{args.val_dir}: {both} of {len(val_images)} images for validation are also used for training")


# -------------------------------------------------------------------------------------------------
# Validation


@paddle.no_grad()
def validate(run, loader, constants, args, stop):
    """Log the values, raw AuC and a picture for the validation images of all processes; save the best weights.

    The values are not re-weighted, so variants of the loss can be compared. A stop request ends this without a result.
    """
    processes.share_statistics(run.network)
    run.network.eval()
    objective = OBJECTIVES[args.loss]
    sums, histogram, panel = np.zeros(len(objective.columns)), np.zeros(utils.MAX_THRESHOLD + 2), []
    batches = from_workers(loader, stop)
    for rgb, broken in tqdm(batches, "validating", len(loader), unit="batch", leave=False, disable=None):
        if stop.noticed:
            break
        readable = np.flatnonzero(broken.numpy() == 0)
        if not len(readable):
            continue
        rgb = paddle.gather(gpu.to_device(rgb), paddle.to_tensor(readable))
        output, ab = forward(run.network, rgb, constants)
        sums += objective.compute(output, ab, constants).sum(axis=0).numpy()
        lab = dataset.rgb_to_lab(rgb)
        colored = utils.upsample_ab(objective.predict(output, constants), *rgb.shape[2:])
        distance = np.hypot(*(colored - lab[:, 1:]).numpy().swapaxes(0, 1))
        # An output that is not finite makes the sums so, too, and all processes report it together.
        histogram += utils.error_histogram(np.nan_to_num(distance, nan=math.inf))[0]
        if len(panel) < PANEL_IMAGES:
            panel.extend(side_by_side(lab, colored, rgb))
    if stop.agreed():
        return
    sums, histogram = processes.all_reduce(sums), processes.all_reduce(histogram)
    side = loader.dataset.crop_size
    images = histogram.sum() / side**2
    if not images:
        raise UserError(f"{args.val_dir}: none of the images can be read")
    if not np.isfinite(sums).all():
        raise UserError("the network's output for the validation images is not finite: try a lower --lr")
    epoch = run.progress["epoch"] - (run.progress["batch"] == 0)  # the one that this step belongs to
    step, values = run.progress["step"], finish(objective.columns, sums / images)
    shown = {f"val_{name}": value for name, value in values.items() if name != "loss"}
    run.log.write({"epoch": epoch, "step": step, **shown, "val_auc": float(utils.auc(histogram))})
    run.log.pictures(PICTURE, panel[:PANEL_IMAGES], step)
    run.progress["validated"] = step
    last = list(objective.columns)[-1]
    run.save_best(last, values[last], f"{run.flags['val_images']}, {side}x{side} pixels")


def side_by_side(lab, ab, rgb):
    """Compose gray | colorized | ground truth: Lab, ab [N, 2, H, W], uint8 [N, 3, H, W] -> uint8 [N, H, 3W, 3]."""
    lightness, gray = lab[:, :1], paddle.zeros_like(ab)
    drawn = [dataset.to_uint8(dataset.lab_to_rgb(paddle.concat([lightness, x], axis=1))) for x in (gray, ab)]
    return paddle.concat([*drawn, rgb], axis=3).transpose([0, 2, 3, 1]).numpy()


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = cli.Parser(description="Train the colorization network on a folder of images.")
    add = parser.add_argument_group("data").add_argument
    add("--image_dir", required=True, help="folder of training images, nested or flat")
    add("--val_dir", help="folder of validation images, evaluated after each epoch (default: none)")
    add("--load_size", type=cli.SIDE, default=256, help="resize the shorter side to this many pixels")
    add("--crop_size", type=cli.SIDE, default=176, help="side of the random crops in pixels, a multiple of 8")
    add("--num_workers", type=cli.WORKERS, default=min(8, default_workers()), help="processes that read, per device")
    add("--max_broken", type=number(0, 1), default=0.1, help="stop if a larger share of the files is unreadable")

    group = parser.add_argument_group("method")
    group.add_argument("--loss", choices=OBJECTIVES, default="classification", help="l2: Eq. 1, the paper's baseline")
    cli.add_bool_flag(group, "--rebalance", True, "give rare colors more weight in the loss")
    add = group.add_argument
    add("--gamma", type=number(0, 1), default=0.5, help="lambda of Eq. 4, the prior's uniform share; 1: no rebalancing")
    add("--prior", help="file of 313 probabilities (resources/estimate_prior.py) (default: the bundled prior)")
    add("--NN", type=whole(1, 313), default=5, help="number of nearest bins in a color's soft-encoding")
    add("--sigma", type=number(1e-3, 1e3), default=5.0, help="sigma of the soft-encoding's Gaussian, in ab units")

    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--num_epochs", "--num_epoch", type=whole(), default=20, help="passes over the training set")
    add("--max_steps", type=whole(), help="stop after this many steps, in any epoch (default: after --num_epochs)")
    add("--batch_size", type=whole(), default=40, help="images per step, over all processes together")
    add("--lr", type=number(1e-38, 1e38), default=3.16e-5, help="Adam's learning rate")
    add("--lr_steps", type=whole(), nargs="*", default=[200_000, 375_000], help="steps at which it falls by sqrt(10)")
    add("--beta1", type=number(0, 0.999999), default=0.9, help="Adam's decay rate of the first moment, per step")
    add("--beta2", type=number(0, 0.999999), default=0.99, help="Adam's decay rate of the second moment, per step")
    add("--weight_decay", type=number(0, 1e38), default=1e-3, help="L2 penalty, added to a loss summed over positions")
    add("--seed", type=cli.SEED, default=0, help="random seed for initialization, image order and crops")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision; auto: if available")
    cli.add_bool_flag(group, "--freeze_bn", False, "use batch norm's stored statistics (fine-tuning on small batches)")

    group = parser.add_argument_group("checkpoints and logs")
    add = group.add_argument
    add("--model_path", default="./model", help="folder of the checkpoints epoch_{N}_model.pdparams")
    add("--log_path", default="./log", help="folder of train.jsonl and VisualDL's records")
    add("--init_from", metavar="FILE", help="weights to fine-tune: FILE, small or official (default: random weights)")
    cli.add_bool_flag(group, "--continue_train", False, "resume the run in --model_path")
    cli.add_bool_flag(group, "--overwrite", False, "remove an earlier run in both folders and start a new one")
    add("--which_epoch", default="latest", help="checkpoint to resume: latest, or an epoch's number")
    add("--save_latest", type=whole(), default=2000, help="steps between saves of epoch_latest_model.pdparams")
    add("--save_freq", type=whole(), default=1, help="epochs between saves of epoch_{N}_model.pdparams")
    add("--keep", type=whole(0), default=0, help="number of numbered checkpoints to keep, the newest; 0 keeps all")
    add("--loss_step", type=whole(), default=50, help="steps between lines of the log")
    args = parser.parse_args(argv)
    args.changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    return args


def check_args(args, world_size):
    """Raise UserError for flags that contradict each other."""
    cli.check_crop(args, multiple=8)
    if args.batch_size % world_size:
        raise UserError(f"--batch_size {args.batch_size}: not a multiple of the number of processes, {world_size}")
    if args.continue_train and (args.init_from or args.overwrite):
        raise UserError("--continue_train: cannot be combined with --init_from or --overwrite")
    if args.loss == "l2" and (wrong := sorted(args.changed & {*CLASSIFICATION})):
        raise UserError(f"--{wrong[0]}: does not apply to --loss l2")
    if args.which_epoch != "latest" and not args.continue_train:
        raise UserError(f"--which_epoch {args.which_epoch}: only valid with --continue_train")


# -------------------------------------------------------------------------------------------------
# Begin and end of a run


def set_up(args, opened):
    """Start the processes, check the flags, lock the folders and configure the device.

    The locks stay until `opened`, an ExitStack, closes them.

    Returns:
        tuple[bool, int]: Whether an earlier run is resumed, and the number of chunks for convolutions.
    """
    warnings.filterwarnings("ignore", message="When training, we now always track")  # users cannot act on this warning
    logging.getLogger().setLevel(logging.CRITICAL)  # messages of Paddle's loader would follow this program's own
    if dist.ParallelEnv().world_size > 1:
        dist.init_parallel_env()
    gpu.check_gpu()
    check_args(args, dist.get_world_size())
    for lock in runs.lock_folders(args.model_path, args.log_path):
        opened.enter_context(lock)
    resumes = processes.first_decides(find_earlier_run, args)
    paddle.seed(args.seed)
    if gpu.on_gpu():
        gpu.search_kernels()
        return resumes, 1
    cpu.keep_freed_memory()
    parts = convolutions.parts_of_a_batch(args.batch_size // dist.get_world_size(), args.crop_size**2)
    cpu.use_all_cores(cpu.available_cores() // parts)
    return resumes, parts


def find_earlier_run(args):
    """Return whether to resume an earlier run. Raise UserError if there is one, but no flag says what to do with it."""
    if args.continue_train and (runs.has_state(args.model_path) or args.which_epoch != "latest"):
        return True
    earlier = runs.earlier_files(args.model_path, args.log_path)
    if earlier and not args.overwrite:
        raise UserError(f"{earlier[0]}: belongs to an earlier run; {ADVICE}")
    if args.continue_train:
        note(f"{args.model_path}: nothing to resume yet; starting a new run")
    return False


def build_network(args, parts):
    """Return the network, with random weights or those of --init_from."""
    network = CIC(OBJECTIVES[args.loss].head)
    if args.init_from:
        path = find_weights(args.model_path, args.init_from)
        if head := initialize(network, path):
            processes.on_first(note, f"{path}: from a network with another last layer; {head} starts at random")
    if not gpu.on_gpu():
        convolutions.convolve_in_parts(network, parts)
    return network


def make_run(args, network, optimizer, scaler, loader, val_loader):
    """Return the state of a new run."""
    flags = {name: getattr(args, name) for name in (*LOSS, *ORDER, *FREE)}
    flags["prior"] = utils.load_prior(args.prior).numpy()
    flags["images"] = describe(loader.dataset, args.image_dir)
    flags["val_images"] = "none" if val_loader is None else describe(val_loader.dataset, args.val_dir)
    # `epoch` and `batch` come next, `step` steps are done, the weights after step `validated` were validated
    progress = {"epoch": 0, "batch": 0, "step": 0, "validated": 0}
    log = Log(args.log_path, FORMATS)
    return runs.Run(args.model_path, log, network, optimizer, scaler, flags, progress, ENTRIES, args.keep)


def resume(run, args, steps_per_epoch):
    """Restore the state of --which_epoch, and report the flags that have changed since."""
    progress, changes = run.progress, run.resume(args.which_epoch, fixed=LOSS)
    for text in changes.values():
        note(f"resuming with a changed setting: {text}")
    if progress["batch"] and changes.keys() & {"images", *ORDER}:
        note(f"starting epoch {progress['epoch']} again, because the order of its images has changed")
        progress.update(batch=0, validated=progress["step"])  # no epoch ends here, so there is nothing to validate
    if progress["batch"] == steps_per_epoch:  # earlier versions could save an epoch before they counted it
        progress.update(epoch=progress["epoch"] + 1, batch=0)


def last_step_of(progress, args, steps_per_epoch):
    """Return the step at which the run ends, from its progress so far."""
    epoch_start, epochs_left = progress["step"] - progress["batch"], args.num_epochs - progress["epoch"]
    return min(args.max_steps or math.inf, epoch_start + epochs_left * steps_per_epoch)


def announce(args, loader, val_loader, autocast):
    """Print the number of images and steps, the device, the output folders, and the meaning of the log's columns."""
    for_validation = "" if val_loader is None else f", {len(val_loader.dataset)} for validation"
    precision = autocast["dtype"] if autocast["enable"] else "float32"
    data = f"{cli.counted(len(loader.dataset), 'image')}{for_validation}; {cli.counted(len(loader), 'step')} per epoch"
    folders = f"{cli.printable(args.model_path)}, {cli.printable(args.log_path)}"
    others = "lr: learning rate; waiting: share of time spent waiting for images"
    columns = f"columns: {OBJECTIVES[args.loss].meaning};\n  {others}"
    lines = f"data: {data}\ndevice: {paddle.get_device()}, {precision}\noutput: {folders}\n{columns}"
    processes.on_first(print, lines)


@contextmanager
def advice_for_errors(run):
    """Add to the message of a UserError whether the run can be resumed."""
    try:
        yield
    except UserError as error:
        advice = "--continue_train resumes from the last save" if run.saved else "nothing was saved"
        raise UserError(f"{error}; {advice}") from error


def check_color(meter, args):
    """Raise UserError if all images so far are gray."""
    meter.check()
    if not meter.learned:
        raise UserError(f"{args.image_dir}: all {meter.images} images so far are gray, so there is nothing to learn")


def due_checkpoints(progress, args, last_step, validates):
    """Return the names of the checkpoints to save after a step."""
    epoch, step, epoch_ends = progress["epoch"], progress["step"], progress["batch"] == 0
    names = []
    if epoch_ends and (epoch % args.save_freq == 0 or epoch == args.num_epochs):
        names.append(epoch - 1)
    before_validation = validates and (epoch_ends or step == last_step)  # which may fail
    # The first step does not show yet whether the weights diverge.
    if names or before_validation or step == 2 or step % args.save_latest == 0:
        names.append("latest")
    return names


def report(run, args, stop):
    """Print how the run ended. Return its exit code."""
    done = f"{run.folder / 'epoch_latest_model.pdparams'}: {cli.counted(run.progress['step'], 'step')}"
    if stop.signal:
        processes.on_first(note, f"{done}; stopped; resume with --continue_train")
        return 128 + stop.signal
    processes.on_first(print, cli.printable(f"{done}; log in {args.log_path} (visualdl --logdir {args.log_path})"))
    return 0


# -------------------------------------------------------------------------------------------------


def take_step(model, rgb, constants, compute, scaler, optimizer, schedule):
    """Change the weights by one step of Adam. Return the values of each image, without gradients."""
    values = compute(*forward(model, gpu.to_device(rgb), constants), constants)
    scaler.scale(values[:, 0].mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.clear_grad(set_to_zero=isinstance(model, paddle.DataParallel))  # it keeps its gradients
    schedule.step()
    return values.detach()


@paddle.utils.unique_name.guard()  # Adam's state is named by counters of Paddle, which this starts at 0 in every run
def main(args):
    with ExitStack() as opened:  # files, locks and signal handlers, closed however far the run comes
        # Setup
        resumes, parts = set_up(args, opened)

        # Data
        loader, sampler = training_data(args)
        val_loader = validation_data(args, loader.dataset)
        validates = val_loader is not None

        # Network and optimizer
        network = build_network(args, parts)
        optimizer, schedule = make_optimizer(network, args)
        autocast, scaler = gpu.mixed_precision(args.amp)
        objective, constants = OBJECTIVES[args.loss], make_constants(args, autocast)

        # State
        run = make_run(args, network, optimizer, scaler, loader, val_loader)
        opened.callback(run.log.close)
        progress = run.progress
        if resumes:
            resume(run, args, len(sampler))
        schedule.step(progress["step"])  # from the flags, not from the checkpoint, so that a changed --lr takes effect
        first_step, last_step = progress["step"] + 1, last_step_of(progress, args, len(sampler))

        # Loop
        announce(args, loader, val_loader, autocast)
        model = paddle.DataParallel(network) if dist.get_world_size() > 1 else network
        meter = Meter(objective.columns, args.batch_size, args.max_broken)
        bar = opened.enter_context(tqdm(total=last_step, initial=progress["step"], unit="step", disable=None))
        stop = opened.enter_context(processes.StopRequest())
        opened.enter_context(advice_for_errors(run))
        while not stop.signal:
            # Validation, after an epoch and at the end; it comes first because a kill may have prevented it
            ended = progress["step"] >= last_step
            if validates and progress["validated"] < progress["step"] and (ended or progress["batch"] == 0):
                validate(run, val_loader, constants, args, stop)
            if ended:
                break

            # The rest of an epoch, up to --max_steps or a signal
            set_training(network, args)
            sampler.begin(args.seed, progress["epoch"], skip=progress["batch"])
            loader.dataset.epoch = progress["epoch"]
            for rgb, broken in meter.timed(from_workers(loader, stop)):
                values = take_step(model, rgb, constants, objective.compute, scaler, optimizer, schedule)
                meter.add(values, broken)
                progress["step"] += 1
                bar.update()
                if progress["step"] % args.loss_step == 0 or progress["step"] in (first_step, last_step):
                    where = {"epoch": progress["epoch"], "step": progress["step"]}
                    run.log.write({**where, **meter.read(), "lr": schedule.get_lr()})
                progress["batch"] += 1
                if progress["batch"] == len(sampler):
                    progress.update(epoch=progress["epoch"] + 1, batch=0)
                if names := due_checkpoints(progress, args, last_step, validates):
                    meter.check()
                    if run.saved or meter.learned:  # the first save may replace an earlier run
                        run.save(*names)
                if stop.after_step(progress["step"]) or progress["step"] == last_step:
                    break
            if not (stop.agreed() or run.saved):
                check_color(meter, args)
        run.save("latest")
        return report(run, args, stop)


if __name__ == "__main__":
    sys.exit(cli.run_script(main, parse_args))
