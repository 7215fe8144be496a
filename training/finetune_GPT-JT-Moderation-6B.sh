#!/usr/bin/env bash
# Fine-tune GPT-JT-6B into a moderation model on 8 GPUs of 40 GB: 4 replicas, which share the optimizer's state, of 2
# pipeline ranks with 2 stages of 7 layers each.
# First: python pretrained/GPT-J-6B/prepare.py --model-name togethercomputer/GPT-JT-6B-v1
#        python data/OIG-moderation/prepare.py
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
#
# 64 rows a step and AdamW at 1e-5 after 100 steps of warm-up are those of GPT-JT-Moderation-6B. Its number of steps is
# not published; 1000 is a guess to change. For another base give --model-name, of EleutherAI/gpt-j-6b for instance.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=GPT-JT-Moderation-6B
BASE_MODEL=$root/pretrained/GPT-J-6B/togethercomputer_GPT-JT-6B-v1
SOURCES=$OIG_MODERATION/prosocial_plus_regular.jsonl:1
TOTAL_STEPS=1000
CHECKPOINT_STEPS=100

train 8 \
    --model-type gptj --num-layers 7 --embedding-dim 4096 \
    --pipeline-group-size 2 --data-group-size 4 \
    --pp-mode interleaved --stages-per-rank 2 --dp-mode sharded \
    --packing documents --loss-on responses --seq-length 2048 \
    --batch-size 16 --micro-batch-size 1 --gradient-accumulate-step 1 \
    --optimizer adamw --lr 1e-5 --warmup-steps 100 \
    --precision auto --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
