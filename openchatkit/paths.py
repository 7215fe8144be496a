"""Where things are in a checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = ROOT / "pretrained"
MODEL_CKPTS = ROOT / "model_ckpts"
HUGGINGFACE_MODELS = ROOT / "huggingface_models"
TOKEN_CACHE = ROOT / "data" / ".cache"
