"""Real texts of many languages: the messages of Django, as people have translated them."""

import ast
import importlib.util
from pathlib import Path

import pytest

LANGUAGES = ["ar", "de", "el", "fa", "fr", "he", "hi", "ja", "ko", "ru", "ta", "th", "vi", "zh_Hans"]


def messages(language: str) -> list[str]:
    """The translations of a language, in which escapes are read."""
    package = importlib.util.find_spec("django")
    if package is None or package.origin is None:
        pytest.skip("needs django: pip install --no-deps --requirement tests/references.txt")
    files = sorted(Path(package.origin).parent.glob(f"**/locale/{language}/LC_MESSAGES/*.po"))
    found: list[str] = []
    is_translation = False
    for line in "\n".join(file.read_text("utf-8") for file in files).splitlines():
        if line.startswith("msg"):
            is_translation = line.startswith("msgstr")
            found += [""] * is_translation
        if is_translation and line.endswith('"'):
            found[-1] += ast.literal_eval(line[line.index('"') :])
    return [text for text in found if text]
