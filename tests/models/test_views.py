"""Positions, windows, sparse layers and dropout in the family `neox`, against formulas in float64; cut, cached, packed.

The network in formulas reads one document by itself, so that documents which share a row are compared with it, too.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from model_configs import FAMILIES

from openchatkit.errors import UserError
from openchatkit.libraries import pytorch
from openchatkit.models import dropout
from openchatkit.models.cuts import WHOLE, Part, cut_shard
from openchatkit.models.documents import find_borders
from openchatkit.models.dropout import row_keys
from openchatkit.models.layers import RotaryTable
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.stage import Stage
from openchatkit.models.views import BlocksSeen, Views

LAYERS, HEADS, WIDTH, LENGTH = 2, 4, 8, 12
RAW = FAMILIES["neox"] | {
    "model_type": "neox",
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "rotary_pct": 0.5,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
SPARSE = {"sparsity_config": {"block": 2, "num_local_blocks": 2, "seed": 3}}
CASES = {
    "learned": {"pos_emb": "learned"},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 10},
    "rpe of 2021": {"pos_emb": "rpe", "rpe_num_buckets": 4, "rpe_max_distance": 6, "rpe_scaled": False},
    "alibi": {"pos_emb": "alibi", "num_kv_heads": 2, "use_parallel_residual": False},
    "none": {"pos_emb": "none"},
    "window": {"sliding_window_width": 3},
    "window and alibi": {"sliding_window_width": 1, "pos_emb": "alibi"},
    "local": SPARSE | {"attention_config": ["local", "global"]},
    "sparse kinds": SPARSE | {"attention_config": ["sparse_fixed", "bigbird"], "pos_emb": "rpe"},
    "others": SPARSE | {"attention_config": ["sparse_variable", "bslongformer"], "pos_emb": "learned"},
}
TOKENS = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
STARTS = torch.tensor([[0] * 5 + [5] * 7, [0] * 2 + [2] * 9 + [11]])
DROPPING = {"hidden_dropout": 0.25, "attention_dropout": 0.5}
NUMBERS = {"rtol": 0, "atol": 1e-11}
CPU = torch.device("cpu")
PLACE = {"positions": torch.arange(LENGTH), "before": 0}


def config_of(case, **changes):
    return config_from_hf(RAW | CASES[case] | changes)


def make(config, **options):
    stage = Stage(config, **options).double()
    stage.init_weights(0)
    return stage


# The network in formulas: of one document, which begins at a place of its row.


def scores_of(case, layer, head, distance):
    """What is added to the score of a token that is `distance` tokens before another."""
    settings = CASES[case]
    if settings.get("pos_emb") == "alibi":
        return -distance * 2.0 ** (-8 * (head + 1) / HEADS)
    if settings.get("pos_emb") == "rpe":
        buckets, farthest = settings.get("rpe_num_buckets", 32), settings.get("rpe_max_distance", 128)
        half = buckets // 2
        bucket = distance
        if distance >= half:
            bucket = min(half + int(math.log(distance / half) / math.log(farthest / half) * half), buckets - 1)
        factor = math.sqrt(WIDTH) if settings.get("rpe_scaled", True) else 1.0
        return layer["attention.rpe.weight"][bucket, head] * factor
    return 0.0


def sees(case, number, query, key, *, start):
    """Whether a token sees one before it, both by their places in the document, which begins at `start` of its row."""
    settings = CASES[case]
    if (window := settings.get("sliding_window_width")) is not None:
        return query - key <= window
    kind = settings.get("attention_config", ["global"] * LAYERS)[number]
    row, column = (query + start) // 2, (key + start) // 2  # blocks of two tokens
    return {
        "global": True,
        "local": column >= row - 1,
        "sparse_fixed": row // 2 == column // 2 or column % 2 == 1,
        "sparse_variable": row // 4 == column // 4 or column == 0,
        "bigbird": column >= row - 1 or column == 0 or column == random_block(number, row),
        "bslongformer": column >= row - 1 or column == 0,
    }[kind]


def random_block(layer, row):
    """The block that a row of a bigbird layer sees by chance: that with the smallest number."""
    numbers = []
    for column in range(row + 1):
        key = torch.tensor(0)
        for number in (SPARSE["sparsity_config"]["seed"], layer, 0, row, column):
            key = dropout.mix(key, number)
        numbers.append(key.item())
    return numbers.index(min(numbers))


def rotate(x):
    angles = torch.arange(len(x)).unsqueeze(1) * 10000.0 ** (-torch.arange(2) / 2)
    cos, sin = (each.double() for each in (angles.float().cos(), angles.float().sin()))  # the tables are of float32
    first, second, rest = x[:, :2], x[:, 2:4], x[:, 4:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], 1)


def normed(x, parameters, name):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return y * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def linear(x, parameters, name):
    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


def attend(case, x, layer, number, *, start):
    mixed, groups = linear(x, layer, "attention.query_key_value"), CASES[case].get("num_kv_heads", HEADS)
    if groups == HEADS:
        query, key, value = mixed.view(len(x), HEADS, 3, WIDTH).unbind(2)
    else:
        query, key, value = mixed.view(len(x), -1, WIDTH).split([HEADS, groups, groups], 1)
    turn = rotate if CASES[case].get("pos_emb", "rotary") == "rotary" else lambda heads: heads
    results = []
    for head in range(HEADS):
        of = head * groups // HEADS
        products = turn(query[:, head]) @ turn(key[:, of]).T / math.sqrt(WIDTH)
        rows = []
        for place in range(len(x)):
            seen = [other for other in range(place + 1) if sees(case, number, place, other, start=start)]
            weights = torch.stack(
                [products[place, other] + scores_of(case, layer, head, place - other) for other in seen]
            ).exp()
            rows.append(weights / weights.sum() @ value[seen, of])
        results.append(torch.stack(rows))
    return linear(torch.cat(results, 1), layer, "attention.dense")


def positions_of(case, length, shards):
    kind = CASES[case].get("pos_emb")
    if kind == "learned":
        return shards["embed"]["position_embeddings.weight"][:length]
    if kind == "sinusoidal":
        angles = torch.arange(length).unsqueeze(1) * 10000.0 ** (-2 * torch.arange(16) / 32)
        return torch.cat([angles.float().sin(), angles.float().cos()], 1).double()
    return 0.0


def logits_of(case, tokens, shards, *, start=0):
    x = shards["embed"]["embed_in.weight"][tokens] + positions_of(case, len(tokens), shards)
    for number in range(LAYERS):
        layer = shards[f"layer_{number:05d}"]
        attended = attend(case, normed(x, layer, "input_layernorm"), layer, number, start=start)
        y = x if (RAW | CASES[case])["use_parallel_residual"] else x + attended
        inner = linear(normed(y, layer, "post_attention_layernorm"), layer, "mlp.dense_h_to_4h")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + attended + linear(inner, layer, "mlp.dense_4h_to_h")
    return normed(x, shards["head"], "final_layer_norm") @ shards["head"]["embed_out.weight"].T


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_formulas(case):
    stage = make(config_of(case))
    found = stage.logits(stage(TOKENS, STARTS))
    shards = {
        shard: {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        for shard, module in stage.named_shards()
    }
    expected = []
    for row, starts in zip(TOKENS, STARTS.tolist(), strict=True):
        for first, last in itertools.pairwise([*sorted(set(starts)), LENGTH]):
            expected.append(logits_of(case, row[first:last], shards, start=first))
    torch.testing.assert_close(found, torch.cat(expected).view_as(found), **NUMBERS)
    found.square().mean().backward()
    torch.cat(expected).square().mean().backward()
    for shard, module in stage.named_shards():
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, shards[shard][name].grad, **NUMBERS)
    # Rows that are one document, which are given in another way.
    torch.testing.assert_close(stage.logits(stage(TOKENS[:1]))[0], logits_of(case, TOKENS[0], shards), **NUMBERS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [7, 1, 4]], ids=str)
@torch.inference_mode()
def test_pieces_with_a_cache_give_what_the_whole_gives(case, pieces):
    stage = make(config_of(case))
    cache = stage.new_cache(2, 16)
    found = torch.cat([stage(piece, cache=cache) for piece in TOKENS.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, stage(TOKENS), **NUMBERS)


@pytest.mark.parametrize("case", ["learned", "rpe", "window", "local"])
@torch.inference_mode()
def test_documents_go_on_in_a_cache(case):
    """As rows that are filled up from the left do."""
    stage = make(config_of(case))
    starts, cache = STARTS.clone(), stage.new_cache(2, 16)
    pieces = zip(TOKENS.split([8, 1, 3], 1), starts.split([8, 1, 3], 1), strict=True)
    found = torch.cat([stage(tokens, of_tokens, cache=cache) for tokens, of_tokens in pieces], dim=1)
    torch.testing.assert_close(found, stage(TOKENS, STARTS), **NUMBERS)


@pytest.mark.parametrize("case", ["sinusoidal", "alibi", "window"])
@torch.inference_mode()
def test_a_mask_of_the_callers_takes_the_place_of_what_comes_before(case):
    """Here of rows whose first three tokens see each other, but for a window's end."""
    stage, config = make(config_of(case)), config_of(case)
    place = torch.arange(LENGTH)
    mask = (place <= place.unsqueeze(1)) | (place < 3)
    found, plain = stage(TOKENS, mask=mask), stage(TOKENS)
    assert not torch.allclose(found[:, 0], plain[:, 0])
    torch.testing.assert_close(stage(TOKENS, mask=place <= place.unsqueeze(1)), plain, **NUMBERS)
    assert config.options.pos_emb in ("sinusoidal", "alibi", "rotary")


def run(config, *, rows=TOKENS, first=100, halves=False, **options):
    """Hidden states and gradients of rows that are samples `first` and so on, with dropout."""
    cuts = [(0, 1, True, False), (1, 2, False, True)] if halves else [(0, 2, True, True)]
    stages = [Stage(config, *layers, embed=embed, head=head, **options) for *layers, embed, head in cuts]
    x, keys = rows, row_keys(9, first, len(rows))
    for stage in stages:
        stage.init_weights(0)
        x = stage(x, dropout_keys=keys)
    stages[-1].logits(x).square().sum().backward()
    return x, [parameter.grad for stage in stages for parameter in stage.parameters()]


def assert_same_bits(one, other):
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(left, right) for left, right in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_stages_and_recomputed_layers_have_the_bits_of_one(case):
    config = config_of(case, **DROPPING)
    whole = run(config)
    assert_same_bits(run(config, halves=True), whole)
    for selective in (False, True):
        assert_same_bits(run(config, recompute=True, selective=selective), whole)
    assert not torch.equal(run(config, first=101)[0], whole[0])


def test_rows_are_dropped_of_alike_in_any_micro_batch():
    config = config_of("none", **DROPPING)
    (whole, gradients), *alone = [run(config), run(config, rows=TOKENS[:1]), run(config, rows=TOKENS[1:], first=101)]
    torch.testing.assert_close(torch.cat([hidden for hidden, _ in alone]), whole, rtol=0, atol=1e-5)
    for left, right, both in zip(alone[0][1], alone[1][1], gradients, strict=True):
        torch.testing.assert_close(left + right, both, rtol=0, atol=1e-4 * both.abs().max().item())


@pytest.mark.parametrize("drops", [{"hidden_dropout": 0.25}, {"attention_dropout": 0.5}])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_layer_drops_each_branch_after_its_bias_and_attentions_weights(drops, parallel):
    config = config_of("none", use_parallel_residual=parallel, **drops)
    layer = make(config).shards["layer_00001"]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    keys = row_keys(9, 100, 2)
    views = Views(
        config, Part(0, 1), rows=2, positions=torch.arange(LENGTH), before=0, seen=None, dtype=torch.float64, keys=keys
    )
    keys = dropout.mix(keys, 2)  # of layer 1: 0 is the embedding
    kept = {
        site: dropout.drop_hidden(torch.ones_like(x), keys, site, config.options.hidden_dropout)
        for site in (dropout.ATTENTION_OUTPUT, dropout.MLP_OUTPUT)
    }
    ones = torch.ones(2, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    weights_kept = dropout.drop_weights(ones, keys, config.options.attention_dropout)
    y = layer.input_layernorm(x)
    query, key, value = (
        each.transpose(1, 2) for each in layer.attention.query_key_value(y).view(2, LENGTH, HEADS, 3, WIDTH).unbind(3)
    )
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    weights = (query @ key.mT / math.sqrt(WIDTH)).masked_fill(later, -torch.inf).softmax(-1) * weights_kept
    attended = layer.attention.dense((weights @ value).transpose(1, 2).flatten(-2)) * kept[dropout.ATTENTION_OUTPUT]
    expected = x + attended
    inner = layer.mlp(layer.post_attention_layernorm(x if parallel else expected)) * kept[dropout.MLP_OUTPUT]
    cos, sin = RotaryTable(0, 1.0)(LENGTH, CPU)
    torch.testing.assert_close(layer(x, cos, sin, views.of_layer("layer_00001")), expected + inner, **NUMBERS)


def test_the_embedding_drops_the_sum_with_positions():
    config = config_of("learned", hidden_dropout=0.25)
    stage = Stage(config, 0, 0, head=False)
    stage.init_weights(0)
    keys = row_keys(9, 100, 2)
    embed = stage.shards["embed"]
    summed = embed.embed_in.weight[TOKENS] + embed.position_embeddings.weight[:LENGTH]
    expected = dropout.drop_hidden(summed, dropout.mix(keys, 0), dropout.EMBEDDING, 0.25)
    assert torch.equal(stage(TOKENS, dropout_keys=keys), expected)


@pytest.mark.parametrize("case", ["learned", "sinusoidal", "rpe", "alibi", "sparse kinds", "local"])
def test_parts_compute_the_whole(case):
    """With dropout, and patterns of sparse layers that differ by head."""
    sparsity = CASES[case].get("sparsity_config", {}) | {"different_layout_per_head": True}
    config = config_of(case, **DROPPING, sparsity_config=sparsity)
    cuts, whole, keys = family(config).cuts(config), make(config), row_keys(9, 100, 2)
    parts = [Stage(config, part=Part(index, 2)).double() for index in range(2)]
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cos, sin = RotaryTable(config.rotary_dim, config.rotary_base)(LENGTH, CPU)
    embedded, added = [], []
    for stage in (whole, *parts):
        for shard in ("embed", "layer_00001"):
            tensors = whole.shards[shard].state_dict()
            stage.shards[shard].load_state_dict(cut_shard(tensors, cuts, stage.part))
        views = Views(
            config,
            stage.part,
            rows=2,
            positions=torch.arange(LENGTH),
            before=0,
            seen=None,
            dtype=torch.float64,
            keys=keys,
        )
        embedded.append(stage.shards["embed"](TOKENS, views.of_embedding()))
        layer, view = stage.shards["layer_00001"], views.of_layer("layer_00001")
        added.append(dropout.drop_hidden(layer.attention(x, cos, sin, view), view.keys, dropout.ATTENTION_OUTPUT, 0.25))
    for one, *others in (embedded, added):
        torch.testing.assert_close(sum(others), one, **NUMBERS)


def test_all_layers_start_with_one_table_of_relative_biases():
    config = config_of("rpe")
    whole, parts = make(config), [Stage(config, part=Part(index, 2)).double() for index in range(2)]
    tables = [whole.shards[f"layer_{number:05d}"].attention.rpe.weight for number in range(LAYERS)]
    assert torch.equal(*tables)
    assert 0.5 < tables[0].std() / math.sqrt(2 / (8 + HEADS)) < 1.5  # Glorot and Bengio's
    for part in parts:
        part.init_weights(0)
    pieces = [part.shards["layer_00001"].attention.rpe.weight for part in parts]
    assert torch.equal(torch.cat(pieces, 1), tables[0])


def test_all_layers_of_a_kind_run_one_compiled_program():
    programs = []

    def keep(module, _):
        programs.append(module)
        return module.forward

    stage = Stage(config_of("rpe", **DROPPING))
    stage.init_weights(0)
    keys = [row_keys(9, first, 2) for first in (100, 102)]
    plain = [stage(TOKENS, STARTS, dropout_keys=each) for each in keys]
    torch.compiler.reset()
    stage.compile_layers(keep)
    found = [stage(TOKENS, STARTS, dropout_keys=each) for each in keys]
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    assert len(programs) == 1


def test_rows_longer_than_the_table_of_positions_are_refused():
    stage = make(config_of("learned"))
    with pytest.raises(UserError, match="33 tokens a row: the model has learned 32 positions; make rows shorter"):
        stage(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dropout": 1}, "hidden_dropout is 1, expected a number of at least 0 and below 1"),
        ({"attention_dropout": "0.1"}, "attention_dropout is '0.1', expected a number"),
        ({"rpe_num_buckets": 7}, "rpe_num_buckets is 7, expected an even number of at least 2"),
        ({"rpe_max_distance": 16}, "rpe_max_distance is 16, expected more than half of rpe_num_buckets 32"),
        ({"sliding_window_width": 0}, "sliding_window_width is 0, expected a positive whole number, or null"),
        (
            {"sliding_window_width": 4, "attention_config": ["local", "global"]},
            "sliding_window_width is of layers with global attention",
        ),
        ({"sparsity_config": {"blocks": 4}}, "sparsity_config: blocks is not known"),
        ({"attention_config": ["sparse_fixed"] * 2, "sparsity_config": {"num_global_blocks": 3}}, "a divisor of"),
        (
            {"pos_emb": "sinusoidal", "hidden_size": 36 + 1, "num_attention_heads": 1},
            "need an even hidden_size, it is 37",
        ),
    ],
)
def test_models_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(RAW | changes)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("case", ["local", "others"])
@torch.inference_mode()
def test_blocks_show_what_masks_do(case, by_head, monkeypatch):
    """As on GPUs, by torch's flex attention, which on a CPU has a slow forward and no backward."""
    sparsity = CASES[case]["sparsity_config"] | {"different_layout_per_head": by_head}
    stage = Stage(config_of(case, num_kv_heads=2, sparsity_config=sparsity))
    stage.init_weights(0)
    expected = [stage(TOKENS), stage(TOKENS, STARTS)]
    monkeypatch.setattr(pytorch, "attends_to_blocks", lambda *_: True)
    torch.testing.assert_close(stage(TOKENS), expected[0], rtol=0, atol=1e-5)
    if case == "others":
        # Documents as GPUs have them, which a CPU has masks for.
        documents = dataclasses.replace(stage.confine(STARTS, CPU), seen=find_borders(STARTS))
        torch.testing.assert_close(stage(TOKENS, documents), expected[1], rtol=0, atol=1e-5)
        view = Views(stage.config, WHOLE, rows=2, **PLACE, seen=documents.seen, dtype=torch.float32)
        assert isinstance(view.of_layer("layer_00000").seen, BlocksSeen)
