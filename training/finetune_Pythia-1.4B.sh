#!/usr/bin/env bash
# Fine-tune Pythia-1.4B into a chat model on one GPU of 24 GB, in bfloat16 with 8-bit optimizer state.
# First: python tools/convert_from_hf_gptneox.py --model-name EleutherAI/pythia-1.4b-deduped \
#            --save-dir pretrained/Pythia-1.4B-deduped
#        python data/OIG/prepare.py --files unified_chip2
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=Pythia-Chat-1.4B
BASE_MODEL=$root/pretrained/Pythia-1.4B-deduped/EleutherAI_pythia-1.4b-deduped
SOURCES=$OIG/unified_chip2.jsonl:1
TOTAL_STEPS=20000
CHECKPOINT_STEPS=100

train 1 \
    --model-type gptneox --num-layers 24 --embedding-dim 2048 \
    --pipeline-group-size 1 --data-group-size 1 \
    --packing concat --loss-on all --seq-length 2048 \
    --batch-size 32 --micro-batch-size 4 --gradient-accumulate-step 1 \
    --optimizer 8bit-adam --lr 1e-5 --warmup-steps 10 \
    --precision auto --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
