#!/usr/bin/env bash
# Fine-tune GPT-J-6B into a chat model on 2 GPUs of 80 GB, which share each layer: a tensor group, and no pipeline.
# First: python pretrained/GPT-J-6B/prepare.py, python data/OIG/prepare.py
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
#
# 64 rows a step and Adam at 1e-5 after 10 steps of warm-up are those of the original kit.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=GPT-J-Chat-6B
BASE_MODEL=$root/pretrained/GPT-J-6B/EleutherAI_gpt-j-6b
SOURCES=$OIG_MIXTURE
TOTAL_STEPS=20000
CHECKPOINT_STEPS=100

train 2 \
    --model-type gptj --embedding-dim 4096 \
    --tensor-group-size 2 --pipeline-group-size 1 --data-group-size 1 \
    --packing concat --loss-on all --seq-length 2048 \
    --batch-size 64 --micro-batch-size 2 --gradient-accumulate-step 1 \
    --optimizer adam --lr 1e-5 --warmup-steps 10 \
    --precision auto --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
