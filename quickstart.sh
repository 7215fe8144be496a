#!/usr/bin/env bash
# From nothing to a chat, in about ten minutes on two cores: data, model, training over two stages, conversion, answers,
# and answers from an index.
#
#   bash quickstart.sh      a second run does only what is missing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. tools/environment.sh

data=data/python-docs/files
base=pretrained/Quickstart
model=huggingface_models/Quickstart
index=$data/index
steps=7
number=0

# step WHAT OUTPUT COMMAND...: say what is done and do it, unless the file that it leaves last is there ("": always).
step() {
    local what=$1 output=$2 status=0
    shift 2
    number=$((number + 1))
    if [ -e "$output" ]; then
        echo "[$(elapsed)] $number/$steps $what: done before"
        return
    fi
    echo "[$(elapsed)] $number/$steps $what"
    "$@" || status=$?
    if [ "$status" -eq 75 ] || [ "$status" -eq 130 ]; then
        echo "Stopped in step $number/$steps after $(elapsed). What is done is kept: bash quickstart.sh goes on from there."
        exit "$status"
    fi
    if [ "$status" -ne 0 ]; then
        echo "error: step $number of quickstart.sh ended with status $status, see above; run it again to go on from there" >&2
        exit "$status"
    fi
}

elapsed() {
    printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60))
}

make_environment
python=$kit_venv/bin/python
# The steps below find each other's outputs where this script expects them.
unset FINETUNE_CHECKPOINT_PATH FINETUNE_DATA

step "Writing questions and answers from the docstrings of your Python" "$data/passages.jsonl" \
    "$python" data/python-docs/prepare.py
step "Making a small GPT-NeoX model and its tokenizer" "$base/Quickstart/manifest.json" \
    "$python" pretrained/Quickstart/prepare.py
# A port of its own: somebody else on this machine may be training by the recipe too.
step "Training it over a pipeline of two stages" "$model/config.json" \
    bash training/finetune_Quickstart.sh --dist-url "tcp://127.0.0.1:$((20000 + RANDOM % 10000))"
step "Converting it to Hugging Face format" "$model/config.json" \
    "$python" tools/convert_to_hf_gptneox.py --ckpt-path model_ckpts/Quickstart --save-path "$model"
step "Asking it questions it was not trained on, each with a passage" "" \
    "$python" tools/quickstart_score.py --model "$model" --questions 30
# By words alone: questions are about names, and no encoder is needed.
step "Making an index of all passages" "$index/manifest.json" \
    "$python" retrieval/build_index.py build --index "$index" --encoder none "$data/passages.jsonl"
step "Asking it the same kind of questions without passages, which it looks up in the index" "" \
    "$python" tools/quickstart_score.py --model "$model" --retrieval "$index" --questions 30

cat <<END

[$(elapsed)] Done. To go on chatting:

    .venv/bin/python inference/bot.py --model $model --retrieval $index --retrieval-k 1

(It looks names of Python up, and says where it found them; /passage TEXT gives the next question a passage of yours;
/help lists the rest.) To look things up in files of your own:

    .venv/bin/python retrieval/build_index.py build --index mine.index --encoder none FOLDER

To fine-tune on chats of your own, a jsonl file of {"text": "<human>: ...\n<bot>: ...\n"}:

    FINETUNE_DATA=chats.jsonl FINETUNE_CHECKPOINT_PATH=model_ckpts/mine bash training/finetune_Quickstart.sh

README.md says how to do the same with a larger model.
END
