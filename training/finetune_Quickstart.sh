#!/usr/bin/env bash
# Train the quickstart's small model on two CPU cores: 2 pipeline stages of 2 layers, one process each.
# First: python data/python-docs/prepare.py, python pretrained/Quickstart/prepare.py
#
#   FINETUNE_TOTAL_STEPS, FINETUNE_CHECKPOINT_STEPS, FINETUNE_CHECKPOINT_PATH   as set below
#   FINETUNE_DATA     FILE:WEIGHT,... instead of the file below
#   other arguments   go to training/dist_clm_train.py, after those below, and win over them
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/environment.sh"
python=$(kit_python)

MODEL_NAME=Quickstart
BASE_MODEL=$root/pretrained/Quickstart/Quickstart
TASKS=$root/data/python-docs/files/train.jsonl

ARGS=(
    --model-name "$BASE_MODEL"
    --tokenizer-name "$BASE_MODEL"
    --model-type gptneox
    --load-pretrained-model true
    --task-name "${FINETUNE_DATA:-$TASKS}"
    --packing none
    --loss-on responses
    --checkpoint-path "${FINETUNE_CHECKPOINT_PATH:-$root/model_ckpts/$MODEL_NAME}"
    --total-steps "${FINETUNE_TOTAL_STEPS:-2800}"
    --checkpoint-steps "${FINETUNE_CHECKPOINT_STEPS:-700}"
    --keep-checkpoints 2
    --num-layers 2 --embedding-dim 128
    --use-cuda false
    --pipeline-group-size 2 --data-group-size 1
    --dist-url tcp://127.0.0.1:7033
    --pp-mode 1f1b
    --dp-mode allreduce --dp-backend gloo
    --seq-length 208
    --batch-size 8 --micro-batch-size 2 --gradient-accumulate-step 1
    --optimizer adamw --lr 5e-3 --warmup-steps 50
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --max-grad-norm 1.0
    --activation-checkpointing false
    --seed 1
    --train-log-backend print
)

exec "$python" "$root/training/launch.py" --world-size 2 "$root/training/dist_clm_train.py" "${ARGS[@]}" "$@"
