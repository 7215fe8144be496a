#!/usr/bin/env bash
# Fine-tune GPT-JT-6B into a moderation model on 8 GPUs of 40 GB: 2 replicas of 4 pipeline stages of 7 layers.
# First: python pretrained/GPT-J-6B/prepare.py --model-name togethercomputer/GPT-JT-6B-v1
#        python data/OIG-moderation/prepare.py
#
#   FINETUNE_TOTAL_STEPS, FINETUNE_CHECKPOINT_STEPS, FINETUNE_CHECKPOINT_PATH   as set below
#   FINETUNE_DATA     FILE:WEIGHT,... instead of the list below
#   other arguments   go to training/dist_clm_train.py, after those below, and win over them
#
# 64 rows a step and AdamW at 1e-5 behind 100 steps of warmup are those of GPT-JT-Moderation-6B. Its number of steps is
# not published; 1000 is a guess to change. Another base: --model-name and --tokenizer-name, EleutherAI/gpt-j-6b say.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/environment.sh"
python=$(kit_python)

MODEL_NAME=GPT-JT-Moderation-6B
BASE_MODEL=$root/pretrained/GPT-J-6B/togethercomputer_GPT-JT-6B-v1
OIG_MODERATION=$root/data/OIG-moderation/files
DATASETS=(
    "$OIG_MODERATION/prosocial_plus_regular.jsonl:1"
)
TASKS=$(IFS=, && echo "${DATASETS[*]}")

ARGS=(
    --model-name "$BASE_MODEL"
    --tokenizer-name "$BASE_MODEL"
    --model-type gptj
    --load-pretrained-model true
    --task-name "${FINETUNE_DATA:-$TASKS}"
    --packing documents
    --loss-on responses
    --checkpoint-path "${FINETUNE_CHECKPOINT_PATH:-$root/model_ckpts/$MODEL_NAME}"
    --total-steps "${FINETUNE_TOTAL_STEPS:-1000}"
    --checkpoint-steps "${FINETUNE_CHECKPOINT_STEPS:-100}"
    --keep-checkpoints 2
    --num-layers 7 --embedding-dim 4096
    --pipeline-group-size 4 --data-group-size 2
    --dist-url tcp://127.0.0.1:7033
    --pp-mode 1f1b
    --dp-mode allreduce --dp-backend nccl
    --seq-length 2048
    --batch-size 32 --micro-batch-size 1 --gradient-accumulate-step 1
    --optimizer adamw --lr 1e-5 --warmup-steps 100
    --precision auto
    --activation-checkpointing true
    --seed 42
    --train-log-backend print
)

exec "$python" "$root/training/launch.py" --world-size 8 "$root/training/dist_clm_train.py" "${ARGS[@]}" "$@"
