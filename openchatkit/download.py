"""Models from the Hugging Face hub or from a folder. Only data is fetched: no code, and no pickle if avoidable."""

from collections.abc import Sequence
from pathlib import Path

from openchatkit.errors import UserError


def fetch_model(name: str, small: Sequence[str], *weights: Sequence[str]) -> Path:
    """The folder of a model: `name` itself if it is one, else fetched from the hub into its cache (resumable).

    `small` and `weights` are patterns of file names; of the sets of weights, the first that the hub has is fetched.
    UserError, with what to do, when the hub cannot be reached or knows no such model.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if local.exists() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise UserError(f"{name}: no such folder; pass a folder or a hub name such as EleutherAI/pythia-1.4b")
    folder = _fetch(name, small)
    for patterns in weights:
        folder = _fetch(name, patterns)
        if any(match for pattern in patterns for match in folder.glob(pattern)):
            break
    return folder


def _fetch(name: str, patterns: Sequence[str]) -> Path:
    # The hub's client is only needed, and only imported, when something is to be fetched.
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        reason, advice = "the hub asks for its licence to be accepted", "accept it there and set HF_TOKEN"
        raise UserError(f"cannot fetch {name}: {reason}; {advice}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"cannot fetch {name}: the hub knows no such model; check the spelling, or set HF_TOKEN if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"cannot fetch {name}: no hub name; expected ORG/MODEL or a folder") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
        raise UserError(
            f"cannot fetch {name}: the hub cannot be reached and it is not in the cache; "
            "connect and run again, or pass a folder that holds the model"
        ) from error
