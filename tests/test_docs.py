"""README and docs/ tell the truth: examples run, outputs are real, options, paths, names and links exist.

Each page is a session: its blocks run in order, in a folder that holds what the page's examples name (see `workspace`).
A block under `<!-- not run: why -->` is parsed only, by the parsers of the commands.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
from pairs import make_tokenizer
from tiny_runs import write_text

from bert_pretrain.cli import main as bert_pretrain
from packing.cli import COMMANDS as SUBCOMMANDS
from packing.cli import find_subcommand, make_parser
from packing.cli import main as pack_dataset

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
COMMANDS = {"pack-dataset": pack_dataset, "bert-pretrain": bert_pretrain}
NOT_RUN = {  # why not: their words are checked instead, or another program would be tested
    "make": "its targets exist",
    "pip": "its extras exist; make wheel installs",
    "python": "its paths exist; tests/test_evidence.py runs the benchmarks",
    "pytest": "its paths exist; these tests would run themselves",
    "git": "not ours",
    "pre-commit": "not ours",
    "ray": "not ours",
    "sbatch": "not ours",
}
LANGUAGES = {"python", "sh", "console", "yaml", ""}  # "": a drawing, or output
OTHER_OPTIONS = {
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"),  # torchrun
    *("--head", "--address", "--signal", "--dist", "--strict"),  # ray, sbatch, pytest, mypy
}
SMALL = {"hidden-size": 16, "num-hidden-layers": 1, "num-attention-heads": 2}
SHORT = {"max-steps": 1, "use-cpu": True, "report-to": "none", "disable-tqdm": True}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Block(NamedTuple):
    """A fenced block. why_not: the reason that its comment gives for not running it."""

    line: int
    language: str
    text: str
    why_not: str | None


def blocks(page):
    found, above = [], ""
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if line.startswith("```"):
            inside = []
            for _, content in lines:
                if content.startswith("```"):
                    break
                inside.append(content)
            why_not = re.fullmatch(r"<!-- not run: (.+) -->", above)
            found.append(Block(number, line.strip("`"), "\n".join(inside), why_not and why_not[1]))
        above = line
    return found


def commands(block):
    """[(words, output lines)] of a shell block; a console block shows its commands behind a $."""
    text = block.text.replace("\\\n", " ")
    if block.language == "sh":
        return [(words, None) for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    shown = [part.splitlines() for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    return [(shlex.split(command, comments=True), output) for command, *output in shown]


def ours(words):
    """The words from one of our commands on, which torchrun may start; None: it is another program's."""
    if words[0] == "torchrun":
        at = words.index("$(which") + 1
        return [words[at].rstrip(")"), *words[at + 1 :]]
    return words if words[0] in COMMANDS else None


# --- what the pages need -------------------------------------------------------------------------------------------


def rows(number=300, seed=0):
    """Tokens of `make_tokenizer`: [CLS] … [SEP]."""
    rng = np.random.default_rng(seed)
    tokens = [[2, *rng.integers(5, 60, n).tolist(), 3] for n in rng.integers(1, 60, number)]
    return datasets.Dataset.from_dict({"input_ids": tokens, "label": rng.integers(0, 2, number).tolist()})


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with everything that the examples name, as small as it can be."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("pages")
    source = rows()
    source.save_to_disk(folder / "tokenized")
    types = source.map(lambda row: {"token_type_ids": [0] * len(row["input_ids"])})
    types.to_parquet(folder / "rows.parquet")
    (folder / "data").mkdir()
    for part in range(2):
        source.shard(2, part).to_parquet(folder / f"data/train-{part}.parquet")
    padded = source.map(lambda row: {"input_ids": row["input_ids"] + [0] * (64 - len(row["input_ids"]))})
    padded.save_to_disk(folder / "padded")
    reviews = datasets.Dataset.from_dict({"review": [f"w{i} w{i + 1}" for i in range(20)], "label": [0, 1] * 10})
    reviews.to_json(folder / "reviews.jsonl")
    reviews.to_csv(folder / "reviews.csv")
    (folder / "notes.txt").write_text("w1 w2\nw3\n")
    shutil.copy(ROOT / "packing/data/squad_1_1_384.csv", folder / "lengths.csv")
    (folder / "text").mkdir()
    write_text(folder / "text/one.txt", num_paragraphs=400)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=60, max_position_embeddings=512, **shape)
    BertForMaskedLM(config).save_pretrained(folder / "bert-base-uncased")  # the hub's name, and no hub
    make_tokenizer().save_pretrained(folder / "bert-base-uncased")
    return folder


@pytest.fixture
def workspace(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pack_dataset(["tokenized", "packed", "--max-sequence-length", "128"])
    for block in (block for page in PAGES for block in blocks(page) if block.language == "yaml"):
        Path(block.text.splitlines()[0].removeprefix("# ")).write_text(block.text, encoding="utf-8")


# --- the examples run ----------------------------------------------------------------------------------------------


@each_page
def test_no_block_hides(page):
    """Every block is found, and says what it is: else it would not be run."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^[ \t>*-]+(?:```|~~~).*$", text, flags=re.MULTILINE) == []
    for block in blocks(page):
        assert block.language in LANGUAGES or block.language.startswith("{"), block  # {toctree}: Sphinx runs it
        if not block.language:
            assert not re.search(r"^(\$|pack-dataset|bert-pretrain|import|from \w+ import)\b", block.text, re.MULTILINE)


@each_page
def test_every_command_is_run_or_says_why_not(page):
    for block in blocks(page):
        if block.language in ("sh", "console"):
            assert commands(block), block
            for words, _ in commands(block):
                assert block.why_not or words[0] in COMMANDS or words[0] in NOT_RUN, (page.name, block.line, words)


def smaller(words):
    """A training command, for one step of a tiny model."""
    options = SHORT if "--model" in words else SMALL | SHORT
    return [*words, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def remove_target(words):
    """Remove what a command writes: no reader has it before."""
    places = [word for word in words[1:] if not word.startswith("-") and word not in SUBCOMMANDS]
    if words[0] == "pack-dataset":
        targets = [] if {"verify", "plan", "compare"} & set(words) else places[1:2]
    else:
        targets = [words[words.index("--output") + 1]] if "--output" in words else []
    for target in targets:
        shutil.rmtree(target, ignore_errors=True)


def run(words):
    if words[:2] == ["bert-pretrain", "train"]:
        words = smaller(words)
        if not Path("prepared").exists():  # by the commands of another page
            run(["bert-pretrain", "prepare", "--text", "text", "--output", "prepared", "--max-sequence-length", "64"])
            run(["pack-dataset", "prepared", "packed"])
    remove_target(words)
    assert COMMANDS[words[0]](words[1:]) == 0, words


def check_output(expected, printed):
    """A line of … stands for any lines; all others must be there, in this order. Counts of bytes depend on versions."""
    expected, printed = (
        [re.sub(r"[\d,]+ bytes", "N bytes", line.rstrip()) for line in text] for text in (expected, printed)
    )
    parts = [r"(?:.*\n)*?.*" if line == "…" else re.escape(line) for line in "\n".join(expected).strip().split("\n")]
    assert re.fullmatch(r"\n".join(parts), "\n".join(printed).strip()), "\n".join(["it is", *printed])


@pytest.mark.filterwarnings("default")  # of transformers, about models as small as these
@each_page
def test_examples_run(page, workspace, capsys):
    names = {"tokenized_test": rows(8, seed=1), "trainer": Mock()}
    for block in blocks(page):
        if block.why_not is not None:
            continue
        if block.language == "python":
            for folder in re.findall(r'output="(\w+)"', block.text):
                shutil.rmtree(folder, ignore_errors=True)
            exec(compile("\n" * block.line + block.text, page.name, "exec"), names)
        if block.language in ("sh", "console"):
            for words, output in commands(block):
                if words[0] in COMMANDS:
                    capsys.readouterr()
                    run(words)
                    if output:
                        check_output(output, capsys.readouterr().out.splitlines())


@each_page
def test_commands_parse(page, workspace):
    for block in blocks(page):
        if block.language in ("sh", "console"):
            for words, _ in commands(block):
                check_command(words)


def check_command(words):
    if words[0] == "make":
        targets = re.findall(r"^([\w./%-]+):", (ROOT / "Makefile").read_text().replace("%", "dev"), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", words[2])) <= set(extras), words
    elif words[0] in ("python", "pytest"):
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word), words
    elif (command := ours(words)) is not None:
        parse(command)
    else:
        assert words[0] in NOT_RUN, words


def parse(words):
    from transformers import TrainingArguments

    from bert_pretrain.options import parse as parse_options
    from bert_pretrain.options import read_config_file
    from bert_pretrain.prepare.prepare import PrepareConfig
    from bert_pretrain.train.config import PretrainConfig

    name, *arguments = words
    if name == "pack-dataset":
        subcommand, prog, rest = find_subcommand(arguments)
        make_parser(subcommand, prog).parse(rest)
        return
    command, *arguments = arguments
    kinds = {"prepare": (PrepareConfig,), "train": (PretrainConfig, TrainingArguments)}[command]
    file, flags = (None, arguments) if arguments[0].startswith("-") else (arguments[0], arguments[1:])
    values = read_config_file(file) if file and Path(file).exists() else {}
    parse_options(kinds, name, file, values, flags)


# --- the examples have types -----------------------------------------------------------------------------------------

USERS_SCRIPT = """
from typing import Any, assert_type

from datasets import Dataset
from transformers import AutoTokenizer, BertModel

from bert_pretrain.attention import use_attention
from collate import DataCollatorWithPacking, PackedTrainer, PackLayout, isolate_sequences
from packing import PackPlan, length_histogram, pack_dataset, packed_info, plan_packs, verify_packed

dataset = Dataset.from_dict({"input_ids": [[2, 7, 3], [2, 3]]})
packed = pack_dataset(dataset)
first = packed[0]
assert_type(pack_dataset(dataset, output=None), Dataset)
assert_type(pack_dataset(dataset, output="packed"), Dataset | None)
pack_dataset(dataset, output="packed")[0]  # type: ignore[index]
pack_dataset(dataset, max_sequence_length="512")  # type: ignore[call-overload]
pack_dataset(dataset, max_sequence_lenght=512)  # type: ignore[call-overload]
assert_type(plan_packs(length_histogram([3, 2])), PackPlan)
assert_type(plan_packs(length_histogram([3, 2])).packing_factor, float)
assert_type(packed_info(packed).packer, str)
assert_type(verify_packed("packed").ok, bool)

collator = DataCollatorWithPacking(AutoTokenizer.from_pretrained("bert"), mlm_probability=None).for_dataset(packed)
assert_type(collator, DataCollatorWithPacking)
assert_type(collator([first]), dict[str, Any])
assert_type(PackLayout(collator([first])["sequence_ids"]).num_sequences, int)
DataCollatorWithPacking(pad_to="512")  # type: ignore[call-arg, arg-type]

model = BertModel.from_pretrained("bert")
assert_type(isolate_sequences(model), BertModel)
assert_type(use_attention(model, "local"), BertModel)
trainer = PackedTrainer(model, data_collator=collator, train_dataset=packed)
trainer.train()
trainer.evaluate()
trainer.predict(packed)
trainer.save_model("model")
"""
NEEDED = """
from datasets import Dataset
from collate import PackedTrainer
tokenized_test: Dataset
trainer: PackedTrainer
"""  # of what a page takes from its reader
STRICT = """
[tool.mypy]
strict = true
follow_imports = "silent"
ignore_missing_imports = true
"""
UNREAD = """
[[tool.mypy.overrides]]
module = ["torch.*", "transformers.*", "accelerate.*"]
follow_imports = "skip"
"""  # their types take mypy half a minute to read


@pytest.mark.parametrize("unread", [UNREAD, pytest.param("", marks=pytest.mark.long)], ids=["ours", "torch, too"])
def test_examples_pass_mypy(tmp_path, unread):
    """`mypy --strict`, by someone who has the packages installed: their own errors show, ours do not."""
    scripts = {"users_script": USERS_SCRIPT}
    for page in PAGES:
        code = "\n".join(block.text for block in blocks(page) if block.language == "python")
        if code:
            scripts[f"page_{page.stem}".replace("-", "_")] = NEEDED + code
    (tmp_path / "scripts").mkdir()
    for name, code in scripts.items():
        (tmp_path / "scripts" / f"{name}.py").write_text(code, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(STRICT + unread)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "scripts"]
    ran = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# --- what is named exists ------------------------------------------------------------------------------------------


def prose(page):
    """A page without what other programs say in its blocks."""
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def options():
    """Every option that our commands list in --help, with hyphens."""
    import contextlib
    import io

    said = io.StringIO()
    pages = [(pack_dataset, [name, "--help"]) for name in SUBCOMMANDS]
    pages += [(bert_pretrain, [name, "--help"]) for name in ("prepare", "train")]
    with contextlib.redirect_stdout(said):
        for command, words in [(pack_dataset, ["--help"]), *pages]:
            with contextlib.suppress(SystemExit):
                command(words)
    return {found.replace("_", "-") for found in re.findall(r"--[a-z][\w-]*", said.getvalue())}


@each_page
def test_options_exist(page, options):
    named = {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--[a-z][\w-]*\w", prose(page))}
    assert named - options - OTHER_OPTIONS - {"--help"} == set()


@each_page
def test_paths_exist(page):
    """`collate/layout.py`, and the folders of README's file map."""
    named = re.findall(
        r"(?<![\w./-])((?:packing|collate|bert_pretrain|tests|benchmarks|notebooks|docs)/[\w./-]*)", prose(page)
    )
    assert [path for path in named if not (ROOT / path.rstrip(".")).exists()] == []


@each_page
def test_names_exist(page):
    """`collate.training.refused`, `bert_pretrain.attention.use_attention`"""
    for dotted in re.findall(r"`((?:packing|collate|bert_pretrain)(?:\.\w+)+)`", prose(page)):
        module, _, name = dotted.rpartition(".")
        try:
            importlib.import_module(dotted)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), name), dotted


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


# --- the pages themselves ------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_readmes_examples_are_short():
    assert [block.line for block in blocks(README) if block.language and len(block.text.splitlines()) > 8] == []


def test_every_page_is_linked():
    readme, index = README.read_text(encoding="utf-8"), (DOCS / "index.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        if page.stem != "index":
            assert f"(docs/{page.name})" in readme
            assert f"\n{page.stem}\n" in index


@pytest.mark.long
def test_docs_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    folders = ["-d", tmp_path / "trees", DOCS, tmp_path / "html"]
    ran = subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", *folders], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
