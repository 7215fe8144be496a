#!/usr/bin/env bash
# Fine-tune GPT-NeoX-20B into a chat model on 8 GPUs of 80 GB: 8 pipeline stages of 6 layers (the last has 2), 1 replica.
# First: python pretrained/GPT-NeoX-20B/prepare.py, python data/OIG/prepare.py
#
#   FINETUNE_TOTAL_STEPS, FINETUNE_CHECKPOINT_STEPS, FINETUNE_CHECKPOINT_PATH   as set below
#   FINETUNE_DATA     FILE:WEIGHT,... instead of the list below
#   other arguments   go to training/dist_clm_train.py, after those below, and win over them
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/environment.sh"
python=$(kit_python)

MODEL_NAME=GPT-Neo-XT-Chat-Base-20B
BASE_MODEL=$root/pretrained/GPT-NeoX-20B/EleutherAI_gpt-neox-20b
OIG=$root/data/OIG/files
DATASETS=(
    "$OIG/unified_ni.jsonl:0.2"
    "$OIG/unified_p3.jsonl:0.5"
    "$OIG/unified_flan.jsonl:0.2"
    "$OIG/unified_chip2.jsonl:0.01"
    "$OIG/unified_rallio_safety_and_prosocial.jsonl:0.1"
    "$OIG/unified_soda_dialog.jsonl:0.1"
    "$OIG/unified_unifiedskg_instructions.jsonl:0.1"
    "$OIG/unified_merged_code_xp3.jsonl:0.1"
    "$OIG/unified_oscar_en_sample_dialog.jsonl:0.1"
    "$OIG/unified_ul2_plus_oscar_en_sample_dialog.jsonl:0.1"
    "$OIG/unified_multi_news.jsonl:0.05"
    "$OIG/unified_openai_summarize_tldr.jsonl:0.05"
    "$OIG/unified_squad_v2.jsonl:0.01"
    "$OIG/unified_nq.jsonl:0.01"
    "$OIG/unified_poetry_instructions.jsonl:0.01"
    "$OIG/unified_sqlv2.jsonl:0.01"
    "$OIG/unified_unnatural_instructions.jsonl:0.01"
    "$OIG/unified_conv_finqa.jsonl:0.01"
    "$OIG/unified_essays.jsonl:0.01"
    "$OIG/unified_plot_screenplay_books_dialog.jsonl:0.01"
    "$OIG/unified_grade_school_math_instructions.jsonl:0.01"
    "$OIG/unified_mathqa_flanv2_kojma_cot.jsonl:0.01"
    "$OIG/unified_joke_explanations.jsonl:0.01"
    "$OIG/unified_cuad.jsonl:0.01"
    "$OIG/unified_abstract_infill.jsonl:0.1"
    "$OIG/unified_image_prompts_instructions.jsonl:0.01"
)
TASKS=$(IFS=, && echo "${DATASETS[*]}")

ARGS=(
    --model-name "$BASE_MODEL"
    --tokenizer-name "$BASE_MODEL"
    --model-type gptneox
    --load-pretrained-model true
    --task-name "${FINETUNE_DATA:-$TASKS}"
    --packing concat
    --loss-on all
    --checkpoint-path "${FINETUNE_CHECKPOINT_PATH:-$root/model_ckpts/$MODEL_NAME}"
    --total-steps "${FINETUNE_TOTAL_STEPS:-20000}"
    --checkpoint-steps "${FINETUNE_CHECKPOINT_STEPS:-100}"
    --keep-checkpoints 2
    --num-layers 6 --embedding-dim 6144
    --pipeline-group-size 8 --data-group-size 1
    --dist-url tcp://127.0.0.1:7033
    --pp-mode 1f1b
    --dp-mode allreduce --dp-backend nccl
    --seq-length 2048
    --batch-size 64 --micro-batch-size 1 --gradient-accumulate-step 1
    --optimizer adam --lr 1e-6 --warmup-steps 10
    --fp16
    --activation-checkpointing true
    --seed 42
    --train-log-backend print
)

exec "$python" "$root/training/launch.py" --world-size 8 "$root/training/dist_clm_train.py" "${ARGS[@]}" "$@"
