#!/usr/bin/env bash
# Fine-tune Pythia-6.9B into a chat model on 8 GPUs of 40 GB: 2 replicas, which share the optimizer's state, of 4
# pipeline ranks with 2 stages of 4 layers each.
# First: python pretrained/Pythia-6.9B-deduped/prepare.py, python data/OIG/prepare.py
# Flags of dist_clm_train.py, --config among them, and FINETUNE_* variables win over what is set here: see README.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_recipe.sh"

NAME=Pythia-Chat-Base-7B
BASE_MODEL=$root/pretrained/Pythia-6.9B-deduped/EleutherAI_pythia-6.9b-deduped
SOURCES=$OIG_MIXTURE
TOTAL_STEPS=20000
CHECKPOINT_STEPS=100

train 8 \
    --model-type gptneox --num-layers 4 --embedding-dim 4096 \
    --pipeline-group-size 4 --data-group-size 2 \
    --pp-mode interleaved --stages-per-rank 2 --dp-mode sharded \
    --packing concat --loss-on all --seq-length 2048 \
    --batch-size 32 --micro-batch-size 1 --gradient-accumulate-step 1 \
    --optimizer adam --lr 1e-5 --warmup-steps 10 \
    --fp16 --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
