"""The data of a GPT-NeoX configuration, as the trainer's data: stores, their weights, and the split of one store."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.formats import token_store
from openchatkit.formats.token_store import TokenStore
from openchatkit.neox.config import NeoxConfig

_PARTS = ("train", "valid", "test")
_PACKINGS = {"packed": "concat", "pack_until_overflow": "overflow", "unpacked": "none"}


def translate(config: NeoxConfig) -> dict[str, Any]:
    """Return the trainer's settings of data and evaluation; UserError for data that is not there or does not fit."""
    seq_length, positions = config.need("seq_length", "max_position_embeddings")
    if seq_length > positions:
        raise UserError(f"{config.where('seq_length')} is above max_position_embeddings {positions}: make it smaller")
    given = [name for name in ("data_path", "train_data_paths") if config.get(name)]
    if len(given) != 1:
        found = "both are given" if given else "none of them is given"
        raise UserError(f"give data_path or train_data_paths, one of the two: {found}")
    _check_epochs(config)
    wanted = config.get("eval_interval") > 0 and config.get("eval_iters") > 0
    if given == ["data_path"]:
        parts = _split_store(config, evaluated=wanted)
    else:
        parts = {part: _join_stores(config, part) for part in _PARTS}
    valid = parts["valid"] if wanted else None
    test = parts["test"] if config.get("eval_iters") > 0 else None
    used = [part for part, data in zip(_PARTS, (parts["train"], valid, test), strict=True) if data]
    return {
        "task_name": parts["train"],
        "seq_length": seq_length,
        "data_order": "neox",
        "packing": _PACKINGS[config.get("pack_impl")],
        "allow_chopped": config.get("allow_chopped"),
        "mask_end_of_text": config.get("eod_mask_loss"),
        "seed": config.get("seed"),
        "evaluation_data": valid,
        "evaluation_steps": config.get("eval_interval") if valid else 0,
        "test_data": test,
        "evaluation_num_batch": config.get("eval_iters") if valid or test else None,
        "character_perplexity": config.get("char_level_ppl"),
        **_follow_labels(config, used),
    }


def _check_epochs(config: NeoxConfig) -> None:
    """Raise UserError for what does not go with `train_epochs`, in GPT-NeoX neither."""
    if config.get("train_epochs") is None:
        return
    equal = set(config.get("train_data_weights") or []) <= {1}
    for name, fine in (
        ("pack_impl", config.get("pack_impl") == "packed"),
        ("weight_by_num_documents", not config.get("weight_by_num_documents")),
        ("train_data_weights", equal),
    ):
        if not fine:
            raise UserError(
                f"{config.where(name)}: it does not go with train_epochs: give train_iters, or leave it out"
            )


def split_documents(split: str, documents: int) -> list[int]:
    """Return the borders of training, validation and test among some documents, by GPT-NeoX's rounding.

    `split` is shares such as "969, 30, 1", or with `/`; missing ones are 0. UserError for anything else.
    """
    texts = [text.strip() for text in re.split("[,/]", split)]
    try:
        shares = [float(text) for text in texts]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UserError(f"split {split!r}: expected shares of training, validation and test such as 969,30,1")
    shares += [0.0] * (3 - len(shares))
    borders = [0]
    for share in shares:
        borders.append(borders[-1] + round(share / sum(shares) * documents))
    beyond = borders[-1] - documents
    return [0, *(border - beyond for border in borders[1:])]


def weigh_by_documents(documents: Sequence[int], alpha: float) -> list[float]:
    """Return the weights of stores by their numbers of documents, as GPT-NeoX's `weight_by_num_documents` has them.

    A store is drawn in proportion to its share of the documents to the power of `alpha`, times what is not its share
    (alpha as in arXiv 1911.02116, section 3).
    """
    if len(documents) == 1:
        return [1.0]
    shares = [count / sum(documents) for count in documents]
    powers = [share**alpha for share in shares]
    weights = [power / sum(powers) * (1 - share) for power, share in zip(powers, shares, strict=True)]
    return [weight / sum(weights) for weight in weights]


def _split_store(config: NeoxConfig, *, evaluated: bool) -> dict[str, str | None]:
    """Return the documents of `data_path` to train on, those to validate and those to test with, by part."""
    prefix = _find_store(config, "data_path", config.get("data_path"))
    documents = TokenStore(prefix).documents
    borders = split_documents(config.get("split"), documents)
    _, train, valid, _ = borders
    if train < 1:
        raise UserError(
            f"{config.where('split')}: it leaves none of the {documents} documents of {prefix} for training: give "
            "another split"
        )
    if valid == train and evaluated:
        raise UserError(
            f"{config.where('split')}: it leaves none of the {documents} documents of {prefix} for validation, and "
            f"eval_iters is {config.get('eval_iters')}: give another split, or eval_iters 0"
        )
    return {
        part: f"{prefix}[{first}:{last}]" if last > first else None
        for part, (first, last) in zip(_PARTS, pairwise(borders), strict=True)
    }


def _join_stores(config: NeoxConfig, part: str) -> str | None:
    """Return stores with their weights, which are all 1 where none are given."""
    name, weights = f"{part}_data_paths", config.get(f"{part}_data_weights")
    paths: Sequence[str] = config.get(name) or []
    if not paths:
        return None
    weights = [1] * len(paths) if weights is None else weights
    if len(weights) != len(paths):
        raise UserError(f"{config.where(f'{part}_data_weights')}: {len(weights)} weights for {len(paths)} {name}")
    if min(weights) <= 0:
        raise UserError(f"{config.where(f'{part}_data_weights')}: expected numbers above 0: leave the store out")
    prefixes = [_find_store(config, name, path) for path in paths]
    if config.get("weight_by_num_documents"):
        weights = weigh_by_documents(
            [TokenStore(prefix).documents for prefix in prefixes], config.get("weighted_sampler_alpha")
        )
    stores = list(map(str, prefixes))
    if labels := config.get(key := f"{part}_label_data_paths"):
        if len(labels) != len(paths):
            raise UserError(f"{config.where(key)}: {len(labels)} label stores for {len(paths)} {name}")
        stores = [
            f"{store}[labels={_find_store(config, key, path)}]" for store, path in zip(stores, labels, strict=True)
        ]
    return ",".join(f"{store}:{weight}" for store, weight in zip(stores, weights, strict=True))


def _follow_labels(config: NeoxConfig, parts: Sequence[str]) -> dict[str, Any]:
    """Return the trainer's settings that follow label stores, which all of these parts have, or none of them."""
    labels = {part: config.get(f"{part}_label_data_paths") for part in parts}
    if not any(labels.values()):
        return {}
    with_labels = next(part for part in parts if labels[part])
    name = f"{with_labels}_label_data_paths"
    if config.get("data_path"):
        raise UserError(f"{config.where(name)}: label stores go with {with_labels}_data_paths, not with data_path")
    if without := next((part for part in parts if not labels[part]), None):
        raise UserError(
            f"{config.where(name)}: {without}_label_data_paths is missing: give it for {without}_data_paths"
        )
    # A document without a label to train on is context alone in GPT-NeoX, too.
    return {"loss_on": "responses", "max_without_reply": 1.0}


def _find_store(config: NeoxConfig, name: str, path: str) -> Path:
    prefix = token_store.find_prefix(Path(path))
    if prefix is None:
        raise UserError(
            f"{config.given[name].where}: {name} {path}: there is no {token_store.idx_path(Path(path))}: "
            "make the store with prepare_data.py or tools/preprocess_data.py, or name another one"
        )
    if re.search(r"[,:\[\]]", str(prefix)):
        raise UserError(f"{config.given[name].where}: {name} {path}: commas, colons and brackets cannot be named here")
    return prefix
