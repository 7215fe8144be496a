#!/usr/bin/env bash
# Fine-tune RedPajama-INCITE-7B-Base into a chat model on 8 GPUs of 24 GB: 2 replicas, which share the optimizer's 8-bit
# state, of 4 pipeline ranks with 2 stages of 4 layers each.
# First: python tools/convert_from_hf_gptneox.py --model-name togethercomputer/RedPajama-INCITE-7B-Base \
#            --save-dir pretrained/RedPajama-7B
#        python data/OIG/prepare.py --files unified_chip2
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
#
# 32 rows a step and 1e-5 without warm-up are those of the original kit, which trained the chat model further. To do so,
# prepare togethercomputer/RedPajama-INCITE-7B-Chat and give its folder as --model-name. 1000 steps are a guess to change.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=RedPajama-INCITE-7B-Chat
BASE_MODEL=$root/pretrained/RedPajama-7B/togethercomputer_RedPajama-INCITE-7B-Base
SOURCES=$OIG/unified_chip2.jsonl:1
TOTAL_STEPS=1000
CHECKPOINT_STEPS=100

train 8 \
    --model-type gptneox --num-layers 4 --embedding-dim 4096 \
    --pipeline-group-size 4 --data-group-size 2 \
    --pp-mode interleaved --stages-per-rank 2 --dp-mode sharded \
    --packing concat --loss-on all --seq-length 2048 \
    --batch-size 16 --micro-batch-size 1 --gradient-accumulate-step 1 \
    --optimizer 8bit-adam --lr 1e-5 --warmup-steps 0 \
    --precision auto --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
