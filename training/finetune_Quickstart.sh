#!/usr/bin/env bash
# Train the quickstart's small model on two CPU cores: 2 pipeline stages of 2 layers, one process each.
# First: python data/python-docs/prepare.py, python pretrained/Quickstart/prepare.py
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=Quickstart
BASE_MODEL=$root/pretrained/Quickstart/Quickstart
SOURCES=$root/data/python-docs/files/train.jsonl
TOTAL_STEPS=2800
CHECKPOINT_STEPS=700

train 2 \
    --model-type gptneox --num-layers 2 --embedding-dim 128 \
    --use-cuda false --dp-backend gloo \
    --pipeline-group-size 2 --data-group-size 1 --pp-mode 1f1b \
    --packing none --loss-on responses --seq-length 208 \
    --batch-size 8 --micro-batch-size 2 --gradient-accumulate-step 1 \
    --optimizer adamw --lr 5e-3 --warmup-steps 50 \
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --max-grad-norm 1.0 \
    --activation-checkpointing false \
    --seed 1 \
    --overrides "$@"
