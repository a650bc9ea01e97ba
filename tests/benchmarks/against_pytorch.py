"""Compare the training step and inference with a PyTorch copy of the network; print ratios of medians.

    pip install torch==2.13.0                                     (for this benchmark only)
    python tests/benchmarks/against_pytorch.py [step] [float32] [bf16] [--rounds 7]

The two run alternately, each in a process of its own with the same number of threads.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ((64, 2, 2, 1), (128, 2, 2, 1), (256, 3, 2, 1), (512, 3, 1, 1), (512, 3, 1, 2), (512, 3, 1, 2), (512, 3, 1, 1))


def torch_network():
    from torch import nn

    layers, before = [], 1
    for channels, convs, stride, dilation in STAGES:
        for i in range(convs):
            step = stride if i == convs - 1 else 1
            layers += [nn.Conv2d(before, channels, 3, step, dilation, dilation), nn.ReLU()]
            before = channels
        layers.append(nn.BatchNorm2d(channels))
    layers += [nn.ConvTranspose2d(512, 256, 4, 2, 1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(256, 313, 1))


def torch_side(job, threads, batch, size):
    """Return a function that does the job once."""
    import torch

    torch.set_num_threads(threads)
    network = torch_network()
    x = 25 * torch.randn(batch, 1, *size)
    if job != "step":
        network = network.eval()
        if job == "bf16":
            network, x = network.bfloat16(), x.bfloat16()
        # The layout that is the faster one for PyTorch here.
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

        @torch.no_grad()
        def run():
            torch.softmax(network(x).float() / 0.38, dim=1)

        return run
    optimizer = torch.optim.Adam(network.parameters(), 3e-5, (0.9, 0.99), weight_decay=1e-3)
    indices = torch.randint(0, 313, (batch, 5, size[0] // 4, size[1] // 4))
    weights = torch.rand(indices.shape)
    weights /= weights.sum(1, keepdim=True)

    def run():
        nats = -(torch.log_softmax(network(x), 1).gather(1, indices) * weights).sum(1)
        (nats.sum() / batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def paddle_side(job, threads, batch, size):
    sys.path.insert(0, str(ROOT))
    from support.convolutions import convolve_in_parts
    from support.cpu import keep_freed_memory, use_all_cores
    from support.inference import make_predictor

    import paddle

    from colorizer import INPUT_SHAPE
    from model import CIC
    from utils import soft_cross_entropy

    use_all_cores(1 if job == "step" else threads)
    network = CIC()
    x = 25 * paddle.randn([batch, 1, *size])
    if job != "step":
        predict, _ = make_predictor(lambda: network, INPUT_SHAPE, job)
        return lambda: predict(x)
    convolve_in_parts(network, threads)  # as train.py does
    keep_freed_memory()
    optimizer = paddle.optimizer.Adam(3e-5, 0.9, 0.99, parameters=network.parameters(), weight_decay=1e-3)
    indices = paddle.randint(0, 313, [batch, 5, size[0] // 4, size[1] // 4])
    weights = paddle.rand(indices.shape)
    weights = weights / weights.sum(axis=1, keepdim=True)

    def run():
        (soft_cross_entropy(network(x), indices, weights).sum() / batch).backward()
        optimizer.step()
        optimizer.clear_grad()

    return run


def serve(pipe, side, job, threads, *arguments):
    """Run in a process of its own: do the job on request and answer with the seconds it took.

    With one thread they are the processor's, which hardly depend on what else the machine is doing.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    run = side(job, threads, *arguments)
    clock = time.process_time if threads == 1 else time.perf_counter
    run()
    pipe.send("ready")
    while pipe.recv():
        run()  # untimed: what was idle meanwhile is cold
        start = clock()
        run()
        pipe.send(clock() - start)


def compare(job, threads, batch, size, rounds):
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for side in (paddle_side, torch_side):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, side, job, threads, batch, size), daemon=True))
        processes[-1].start()
        ours.recv()
        pipes.append(ours)
    times = [[], []]
    for _ in range(rounds):
        for pipe, seconds in zip(pipes, times):
            time.sleep(0.5)  # the other's threads spin for a moment before they sleep
            pipe.send(True)
            seconds.append(pipe.recv())
    for pipe, process in zip(pipes, processes):
        pipe.send(False)
        process.join()  # left running, it would be told to stop, which Paddle answers with a stack dump
    ratios = [a / b for a, b in zip(*times)]
    ours, theirs = map(statistics.median, times)
    print(
        f"{job:8s} batch {batch} at {size[1]}x{size[0]}, {threads} threads: Paddle {ours:.3f} s, PyTorch {theirs:.3f} s"
    )
    print(f"{'':8s} ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("jobs", nargs="*", default=["step", "float32", "bf16"], help="step, float32, bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()))
    args = parser.parse_args()
    for job in args.jobs:
        compare(job, args.threads, *((8, (176, 176)) if job == "step" else (1, (224, 224))), args.rounds)


if __name__ == "__main__":
    main()
