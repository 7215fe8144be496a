#!/usr/bin/env bash
# Fine-tune GPT-NeoX-20B into a chat model on 8 GPUs of 80 GB: 2 replicas, which share the optimizer's state, of 2
# pipeline ranks of 2 GPUs, which share each layer. A pipeline rank has 2 stages of 11 layers.
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
    --model-type gptneox --num-layers 11 --embedding-dim 6144 \
    --tensor-group-size 2 --pipeline-group-size 2 --data-group-size 2 \
    --pp-mode interleaved --stages-per-rank 2 --dp-mode sharded \
    --packing concat --loss-on all --seq-length 2048 \
    --batch-size 32 --micro-batch-size 1 --gradient-accumulate-step 1 \
    --optimizer adam --lr 1e-6 --warmup-steps 10 \
    --fp16 --activation-checkpointing true \
    --seed 42 \
    --overrides "$@"
