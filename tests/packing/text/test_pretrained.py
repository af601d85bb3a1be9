"""A tokenizer's folder is loaded as AutoTokenizer does, and mostly without torch."""

import json
import subprocess
import sys

import pytest
from tokenizer_families import family
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from packing.text.pretrained import MODELS, _named_class, load_pretrained
from packing.text.tokenizer import describe

FAMILY = {"BertTokenizer": "BERT", "RobertaTokenizer": "RoBERTa"} | dict.fromkeys(
    ("PreTrainedTokenizer", "TokenizersBackend"), "ModernBERT"
)


def saved(folder, class_, **changes):
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    tokenizer = Tokenizer.from_str(family(FAMILY.get(class_.removesuffix("Fast"), "BERT")))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": class_} | changes))
    return folder


def facts(tokenizer):
    return type(tokenizer), describe(tokenizer), tokenizer.all_special_tokens, tokenizer.model_input_names


@pytest.mark.parametrize("fast", ["", "Fast"])
@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("class_", MODELS)
def test_the_tokenizer_of_auto_tokenizer(tmp_path, class_, fast, with_model):
    folder = saved(tmp_path, class_ + fast)
    if with_model:
        (folder / "config.json").write_text(json.dumps({"model_type": MODELS[class_]}))
    assert _named_class(folder) is not None
    assert facts(load_pretrained(str(folder))) == facts(AutoTokenizer.from_pretrained(str(folder)))


OTHERS = {
    "of another class": lambda folder: saved(folder, "LlamaTokenizer"),
    "of no class": lambda folder: saved(folder, ""),
    "of a class in Python": lambda folder: saved(folder, "CanineTokenizer"),
    "with code": lambda folder: saved(folder, "BertTokenizer", auto_map={"AutoTokenizer": ["code.Mine", None]}),
    "without its file": lambda folder: (saved(folder, "BertTokenizer") / "tokenizer_config.json").unlink(),
    "damaged": lambda folder: (saved(folder, "BertTokenizer") / "tokenizer_config.json").write_text("{"),
    "of another model": lambda folder: (saved(folder, "BertTokenizer") / "config.json").write_text(
        '{"model_type": "mpnet"}'
    ),
    "of a damaged model": lambda folder: (saved(folder, "BertTokenizer") / "config.json").write_text("[]"),
    "that is not there": lambda folder: None,
}


@pytest.mark.parametrize("case", OTHERS)
def test_auto_tokenizer_decides_about_all_others(tmp_path, case):
    OTHERS[case](tmp_path)
    assert _named_class(tmp_path) is None


def test_torch_is_not_imported(tmp_path):
    saved(tmp_path, "BertTokenizer")
    code = (
        "import sys; from packing.text.tokenizer import open_tokenizer; "
        f"open_tokenizer({str(tmp_path)!r}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
