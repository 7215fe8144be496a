# The head, the end and the OIG mixture of the recipes, for bash 3.2 and newer. A recipe sources this file, sets the
# variables that `train` names, and calls it.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/environment.sh"
python=$(kit_python)

# train RANKS FLAGS... --overrides USER'S FLAGS...
#
# Train $NAME from $BASE_MODEL on $SOURCES, with a process a rank. The user's flags, --config among them, win over all.
#
#   FINETUNE_TOTAL_STEPS, FINETUNE_CHECKPOINT_STEPS   instead of the recipe's $TOTAL_STEPS and $CHECKPOINT_STEPS
#   FINETUNE_CHECKPOINT_PATH                          instead of model_ckpts/$NAME
#   FINETUNE_DATA                                     FILE:WEIGHT,... instead of $SOURCES
#   FINETUNE_MAX_RESTARTS                             restarts without a new checkpoint, instead of 3
train() {
    local ranks=$1
    shift
    exec "$python" "$root/training/launch.py" --world-size "$ranks" --max-restarts "${FINETUNE_MAX_RESTARTS:-3}" \
        "$root/training/dist_clm_train.py" \
        --model-name "$BASE_MODEL" \
        --task-name "${FINETUNE_DATA:-$SOURCES}" \
        --checkpoint-path "${FINETUNE_CHECKPOINT_PATH:-$root/model_ckpts/$NAME}" \
        --total-steps "${FINETUNE_TOTAL_STEPS:-$TOTAL_STEPS}" \
        --checkpoint-steps "${FINETUNE_CHECKPOINT_STEPS:-$CHECKPOINT_STEPS}" \
        --dist-url tcp://127.0.0.1:7033 \
        "$@"
}

# Print sources with commas between them, as --task-name takes them.
mix() {
    local IFS=,
    echo "$*"
}

OIG=$root/data/OIG/files
OIG_MODERATION=$root/data/OIG-moderation/files
# The mixture of the published chat models.
OIG_MIXTURE=$(mix \
    "$OIG/unified_ni.jsonl:0.2" \
    "$OIG/unified_p3.jsonl:0.5" \
    "$OIG/unified_flan.jsonl:0.2" \
    "$OIG/unified_chip2.jsonl:0.01" \
    "$OIG/unified_rallio_safety_and_prosocial.jsonl:0.1" \
    "$OIG/unified_soda_dialog.jsonl:0.1" \
    "$OIG/unified_unifiedskg_instructions.jsonl:0.1" \
    "$OIG/unified_merged_code_xp3.jsonl:0.1" \
    "$OIG/unified_oscar_en_sample_dialog.jsonl:0.1" \
    "$OIG/unified_ul2_plus_oscar_en_sample_dialog.jsonl:0.1" \
    "$OIG/unified_multi_news.jsonl:0.05" \
    "$OIG/unified_openai_summarize_tldr.jsonl:0.05" \
    "$OIG/unified_squad_v2.jsonl:0.01" \
    "$OIG/unified_nq.jsonl:0.01" \
    "$OIG/unified_poetry_instructions.jsonl:0.01" \
    "$OIG/unified_sqlv2.jsonl:0.01" \
    "$OIG/unified_unnatural_instructions.jsonl:0.01" \
    "$OIG/unified_conv_finqa.jsonl:0.01" \
    "$OIG/unified_essays.jsonl:0.01" \
    "$OIG/unified_plot_screenplay_books_dialog.jsonl:0.01" \
    "$OIG/unified_grade_school_math_instructions.jsonl:0.01" \
    "$OIG/unified_mathqa_flanv2_kojma_cot.jsonl:0.01" \
    "$OIG/unified_joke_explanations.jsonl:0.01" \
    "$OIG/unified_cuad.jsonl:0.01" \
    "$OIG/unified_abstract_infill.jsonl:0.1" \
    "$OIG/unified_image_prompts_instructions.jsonl:0.01")
