"""How deep a chat reply lies: Python frames of the library between `inference/bot.py:main` and the model's forward."""

import traceback
from pathlib import Path

from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

import openchatkit

LIBRARY = Path(openchatkit.__file__).parent
LIMIT = 12


def test_a_reply_takes_few_frames_from_the_command_to_the_model(random_models, piped, capsys):
    stacks = []

    def record(module, _):
        if isinstance(module, PreTrainedModel):
            frames = traceback.extract_stack()
            stacks.append(
                [
                    f"{Path(frame.filename).relative_to(LIBRARY)}:{frame.name}"
                    for frame in frames
                    if LIBRARY in Path(frame.filename).parents
                ]
            )

    hook = register_module_forward_pre_hook(record)
    try:
        done = piped("hello\n", random_models["neox"], "--max-tokens", "3", "--no-sample")
    finally:
        hook.remove()
    assert done.status == 0, done.stderr
    # The prompt, then the tokens.
    assert len(stacks) >= 3
    deepest = max(stacks, key=len)
    with capsys.disabled():
        print(f"\n{len(deepest)} frames:", *deepest, sep="\n  ")
    assert len(deepest) <= LIMIT
