#!/usr/bin/env bash
# Check within minutes that training and colorization work on this machine's GPUs, or on its CPU if it has none.
#
#     bash tests/gpu_smoke.sh            the last line should be "gpu_smoke: passed"
#
# The output is also written to gpu_smoke.log; send this file when a step fails.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
exec > >(tee gpu_smoke.log) 2>&1

train() {  # name, flags: logs to $work/name
    python train.py --image_dir "$work/images" --model_path "$work/$1" --log_path "$work/$1" --load_size 72 \
        --crop_size 64 --batch_size 4 --num_workers 1 --lr 3e-4 --num_epochs 3 --loss_step 1 "${@:2}" >"$work/$1.out" 2>&1 ||
        { cat "$work/$1.out"; echo "FAILED: train.py ${*:2}"; exit 1; }
}

compare() { python tests/gpu_smoke.py "$@"; }

echo "1. machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no NVIDIA driver"
gpus=$(compare machine "$work")

echo "2. training: 16 steps, then 4 more after a stop"
train first --max_steps 16
train first --max_steps 20 --continue_train
compare falls "$work/first"

echo "3. mixed precision compared with float32 (on a CPU: the same)"
train float32 --amp off --max_steps 4
compare same "$work/first" "$work/float32" 0.03

echo "4. one process compared with two"
weights="$work/first/epoch_latest_model.pdparams"
if [ "$gpus" = 1 ]; then
    echo "skipped: one GPU"
else
    [ "$gpus" = 0 ] && launch="--nproc_per_node 2 --backend gloo" || launch="--gpus 0,1"
    python() { command python ${launcher:-} "$@"; }
    train one --amp off --init_from "$weights" --freeze_bn --max_steps 4
    launcher="-m paddle.distributed.launch --log_dir $work/launch $launch"
    train two --amp off --init_from "$weights" --freeze_bn --max_steps 4
    unset launcher
    compare same "$work/one" "$work/two" 0.01
fi

echo "5. colorization, on this device and on the CPU"
for where in here cpu; do
    [ $where = here ] || export CUDA_VISIBLE_DEVICES=
    python test.py "$work/originals" --load_model "$weights" --precision float32 --result_path "$work/$where"
done
compare pictures "$work/here" "$work/cpu" 1
echo "gpu_smoke: passed ($gpus GPUs)"
