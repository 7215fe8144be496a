#!/usr/bin/env bash
# Fine-tune Pythia-1.4B into a moderation model on one GPU of 24 GB, in bfloat16 with 8-bit optimizer state.
# First: python tools/convert_from_hf_gptneox.py --model-name EleutherAI/pythia-1.4b-deduped \
#            --save-dir pretrained/Pythia-1.4B-deduped
#        python data/OIG-moderation/prepare.py
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
#
# 64 rows a step, the learning rate and its warm-up are those of GPT-JT-Moderation-6B; 1000 steps are a guess to change.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=Pythia-Moderation-1.4B
BASE_MODEL=$root/pretrained/Pythia-1.4B-deduped/EleutherAI_pythia-1.4b-deduped
SOURCES=$OIG_MODERATION/prosocial_plus_regular.jsonl:1
TOTAL_STEPS=1000
CHECKPOINT_STEPS=100

train 1 \
    --model-type gptneox --num-layers 24 --embedding-dim 2048 \
    --pipeline-group-size 1 --data-group-size 1 \
    --packing documents --loss-on responses --seq-length 2048 \
    --batch-size 64 --micro-batch-size 4 --gradient-accumulate-step 1 \
    --optimizer 8bit-adam --lr 1e-5 --warmup-steps 100 \
    --precision auto --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
