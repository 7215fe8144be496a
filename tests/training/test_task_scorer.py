"""A model in training, as tasks ask it, against the same weights as a whole model."""

from functools import partial

import gloo_ranks
import pytest
import ranks
import torch

from openchatkit.data.batch import IGNORE
from openchatkit.errors import UserError
from openchatkit.loading import model_kinds, stages
from openchatkit.tools.evaluation.scoring import StageScorer
from openchatkit.training import command, config, curve_names, sinks
from openchatkit.training.row_scores import RowScores
from openchatkit.training.task_scorer import StopRequested, TaskScorer

PAIRS = [([5 + n, 17, 3 * n + 9], [60, 22 + n, 9][: 1 + n % 3]) for n in range(11)] + [([7] * 30 + [8], [9] * 40)]
OPTIONS = {"max_new_tokens": 6, "end_of_text": 399, "is_done": lambda new: len(new) == 4}


@pytest.mark.parametrize("model", ["neox", "tied", "gptj", "options"])
def test_figures_are_those_of_the_whole_model(flags, prepared, tmp_path, model):
    given = {**flags, "model_name": prepared[model], "checkpoint_path": tmp_path, "use_cuda": "false"}
    stage = stages.load_stage(stages.open_shards(model_kinds.find(prepared[model])), torch.device("cpu"))
    whole = StageScorer(stage, torch.device("cpu"), batch_size=4)
    whole.max_length = flags["seq_length"]
    greedy = whole.generate([context for context, _ in PAIRS], **OPTIONS)
    # Some of them greedy decoding gives.
    pairs = [*PAIRS, *((context, new[:3]) for (context, _), new in zip(PAIRS, greedy, strict=True))]
    stopping: list[int] = []
    settings = config.parse(ranks.to_argv({**given, "precision": "float32"}))
    with command._prepare_loop(settings, None) as loop:
        scorer = TaskScorer(loop.trainer, stopping)
        with scorer.asking():
            found = scorer.score(pairs)
            texts = scorer.generate([context for context, _ in PAIRS], **OPTIONS)
            with pytest.raises(UserError, match="a task generates 48 tokens, training reads 48: leave that task out"):
                scorer.generate([[5]], **{**OPTIONS, "max_new_tokens": 48})
            stopping.append(15)
            with pytest.raises(StopRequested):
                scorer.score(pairs)
    expected = whole.score(pairs)
    assert [each for each, _ in found] == pytest.approx([each for each, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in found)
    assert texts == greedy


def make_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A projection of 12 tokens, hidden states [4, 3, 8] and labels; two of the tokens are equally likely."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(12, 8, generator=generator), torch.randn(4, 3, 8, generator=generator)
    weight[7] = weight[2]
    hidden[2, 0] = 4 * weight[2]
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, IGNORE], [7, 11, 0], [IGNORE, 3, IGNORE]])
    return weight, hidden, labels


def score_part(count: int, rank: int) -> torch.Tensor:
    """Score rows on a rank that has an equal share of the vocabulary."""
    weight, hidden, labels = make_rows()
    size = len(weight) // count
    projection = torch.nn.Linear(8, size, bias=False)
    projection.weight.data = weight[rank * size : (rank + 1) * size]
    group = torch.distributed.group.WORLD if count > 1 else None
    scores = RowScores(projection, len(labels), group=group, first=rank * size)
    scores.add(hidden, labels, torch.arange(len(labels)).unsqueeze(1).expand(-1, 3))
    return scores.sums


def test_a_vocabulary_in_parts_gives_the_same_figures_on_all_ranks(tmp_path):
    weight, hidden, labels = make_rows()
    likely = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for row, place in (labels != IGNORE).nonzero().tolist():
        label, best = labels[row, place], likely[row, place].argmax()  # the first of equal ones
        expected[row] += torch.stack([likely[row, place, label], (label != best).double(), best.double()])
    for found in (score_part(1, 0), *gloo_ranks.run(partial(score_part, 2), 2, tmp_path)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_metrics_of_tasks_are_curves_and_a_line_of_the_log():
    row = {"step": 40, "eval": {"piqa_acc": 0.625, "lambada_perplexity": None}}
    assert curve_names.flatten(row) == {"eval/piqa_acc": 0.625}
    assert sinks.format_evaluation(row) == "step 40 | piqa_acc 0.625, lambada_perplexity not finite"
