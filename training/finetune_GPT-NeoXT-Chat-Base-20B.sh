#!/usr/bin/env bash
# Fine-tune GPT-NeoX-20B into a chat model on 8 GPUs of 80 GB: 8 pipeline stages of 6 layers (the last has 2), 1 replica.
# First: python pretrained/GPT-NeoX-20B/prepare.py, python data/OIG/prepare.py
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=GPT-Neo-XT-Chat-Base-20B
BASE_MODEL=$root/pretrained/GPT-NeoX-20B/EleutherAI_gpt-neox-20b
SOURCES=$OIG_MIXTURE
TOTAL_STEPS=20000
CHECKPOINT_STEPS=100

train 8 \
    --model-type gptneox --num-layers 6 --embedding-dim 6144 \
    --pipeline-group-size 8 --data-group-size 1 \
    --packing concat --loss-on all --seq-length 2048 \
    --batch-size 64 --micro-batch-size 1 --gradient-accumulate-step 1 \
    --optimizer adam --lr 1e-6 --warmup-steps 10 \
    --fp16 --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
