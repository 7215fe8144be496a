#!/usr/bin/env bash
# Fine-tune RedPajama-INCITE-Base-3B-v1 into a chat model on 4 GPUs of 24 GB: 2 replicas, which share the optimizer's
# state, of 2 pipeline ranks with 2 stages of 8 layers each.
# First: python pretrained/RedPajama-3B/prepare.py, python data/OIG/prepare.py --files unified_chip2
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
#
# 32 rows a step and Adam at 1e-5 without warm-up are those of the original kit, which trained the chat model further.
# To do so, prepare.py --model-name togethercomputer/RedPajama-INCITE-Chat-3B-v1, and give its folder as --model-name.
# 1000 steps are a guess to change.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=RedPajama-INCITE-Chat-3B
BASE_MODEL=$root/pretrained/RedPajama-3B/togethercomputer_RedPajama-INCITE-Base-3B-v1
SOURCES=$OIG/unified_chip2.jsonl:1
TOTAL_STEPS=1000
CHECKPOINT_STEPS=100

train 4 \
    --model-type gptneox --num-layers 8 --embedding-dim 2560 \
    --pipeline-group-size 2 --data-group-size 2 \
    --pp-mode interleaved --stages-per-rank 2 --dp-mode sharded \
    --packing concat --loss-on all --seq-length 2048 \
    --batch-size 16 --micro-batch-size 1 --gradient-accumulate-step 1 \
    --optimizer adam --lr 1e-5 --warmup-steps 0 \
    --precision auto --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
