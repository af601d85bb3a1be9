"""AutoTokenizer without torch: its module imports torch, which takes longer than to tokenize 50 MB of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS = {
    "BertTokenizer": "bert",
    "RobertaTokenizer": "roberta",
    "PreTrainedTokenizer": "modernbert",
    "TokenizersBackend": "modernbert",
}
"""{class that a tokenizer's folder names, without Fast: the only model type beside it for which no other is taken}"""


def load_pretrained(name: str) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained(name), and raises as that does."""
    class_ = _named_class(Path(name))
    if class_ is None:
        from transformers import AutoTokenizer as class_
    return class_.from_pretrained(name)


def _named_class(folder: Path) -> Any:
    """The class that AutoTokenizer would take; None: only AutoTokenizer knows.

    It takes the class that tokenizer_config.json names, unless code comes with it, or config.json names another model.
    """
    about, model = _read(folder / "tokenizer_config.json"), _read(folder / "config.json")
    if about is None or "auto_map" in about or "auto_map" in (model or {}):
        return None
    named = str(about.get("tokenizer_class")).removesuffix("Fast")
    if named not in MODELS or (model is not None and model.get("model_type") != MODELS[named]):
        return None
    import transformers

    found = getattr(transformers, "TokenizersBackend" if named == "PreTrainedTokenizer" else named, None)
    is_fast = isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerFast)
    return found if is_fast else None


def _read(file: Path) -> dict[str, Any] | None:
    """None: there is no such file. {} for one that is damaged, of which transformers says so."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
