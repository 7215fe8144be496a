#!/usr/bin/env bash
# Fine-tune Pythia-1.4B into a moderation model on one GPU of 24 GB, in bfloat16 with 8-bit optimizer state.
# First: python tools/convert_from_hf_gptneox.py --model-name EleutherAI/pythia-1.4b-deduped \
#            --save-dir pretrained/Pythia-1.4B-deduped
#        python data/OIG-moderation/prepare.py
#
#   FINETUNE_TOTAL_STEPS, FINETUNE_CHECKPOINT_STEPS, FINETUNE_CHECKPOINT_PATH   as set below
#   FINETUNE_DATA     FILE:WEIGHT,... instead of the list below
#   other arguments   go to training/dist_clm_train.py, after those below, and win over them
#
# 64 rows a step, the learning rate and its warmup are those of GPT-JT-Moderation-6B; 1000 steps are a guess to change.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/environment.sh"
python=$(kit_python)

MODEL_NAME=Pythia-Moderation-1.4B
BASE_MODEL=$root/pretrained/Pythia-1.4B-deduped/EleutherAI_pythia-1.4b-deduped
OIG_MODERATION=$root/data/OIG-moderation/files
DATASETS=(
    "$OIG_MODERATION/prosocial_plus_regular.jsonl:1"
)
TASKS=$(IFS=, && echo "${DATASETS[*]}")

ARGS=(
    --model-name "$BASE_MODEL"
    --tokenizer-name "$BASE_MODEL"
    --model-type gptneox
    --load-pretrained-model true
    --task-name "${FINETUNE_DATA:-$TASKS}"
    --packing documents
    --loss-on responses
    --checkpoint-path "${FINETUNE_CHECKPOINT_PATH:-$root/model_ckpts/$MODEL_NAME}"
    --total-steps "${FINETUNE_TOTAL_STEPS:-1000}"
    --checkpoint-steps "${FINETUNE_CHECKPOINT_STEPS:-100}"
    --keep-checkpoints 2
    --num-layers 24 --embedding-dim 2048
    --pipeline-group-size 1 --data-group-size 1
    --dist-url tcp://127.0.0.1:7033
    --pp-mode 1f1b
    --dp-mode allreduce --dp-backend nccl
    --seq-length 2048
    --batch-size 64 --micro-batch-size 4 --gradient-accumulate-step 1
    --optimizer 8bit-adam --lr 1e-5 --warmup-steps 100
    --precision auto
    --activation-checkpointing true
    --seed 42
    --train-log-backend print
)

exec "$python" "$root/training/launch.py" --world-size 1 "$root/training/dist_clm_train.py" "${ARGS[@]}" "$@"
