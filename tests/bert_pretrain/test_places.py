"""Mistyped folders and names are refused at once, with the nearest one; the hub is asked for its names, once."""

import importlib

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from tiny_runs import make_folders, train
from transformers import AutoTokenizer

from bert_pretrain.places import find_pretrained
from bert_pretrain.prepare.tokenizer import load_tokenizer
from packing.files.errors import near_path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("places"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with prepared/tokenizer, prepared/train and packed."""
    for folder in ("prepared/tokenizer", "prepared/train", "packed"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that fails every test that asks it."""

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(HfApi, "model_info", refuse)


@pytest.fixture
def hub(monkeypatch):
    """A hub that lists what it was asked for, and raises `answer` if there is one."""
    asked = []

    def model_info(self, name, timeout=None, **kwargs):
        asked.append((name, timeout))
        if hub.answer is not None:
            raise hub.answer
        return name

    hub.answer, hub.asked = None, asked
    monkeypatch.setattr(HfApi, "model_info", model_info)
    return hub


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("prepard/tokenizer", "prepared/tokenizer"),
        ("prepared/tokeniser", "prepared/tokenizer"),
        ("./prepared/tokenzier", "prepared/tokenizer"),
        ("paked", "packed"),
        ("preparde/trane", None),  # one letter or two, in one place
        ("something/else", None),
        ("packed", None),
    ],
)
def test_a_near_folder_is_found(here, mistyped, meant):
    near = near_path(mistyped, only_folders=True)
    assert (near if near is None else str(near)) == meant


@pytest.mark.parametrize("name", ["prepared/tokeniser", "./tokenizer", "/nowhere/at/all", "a/b/c", "a b"])
def test_what_can_only_be_a_folder_is_refused_without_the_hub(here, no_hub, name):
    with pytest.raises(ValueError, match=f"tokenizer='{name}' does not exist"):
        find_pretrained("tokenizer", name)


def test_a_folder_is_what_it_is(here, no_hub):
    assert find_pretrained("tokenizer", "prepared/tokenizer/") == "prepared/tokenizer/"


def test_a_file_is_refused(here, no_hub):
    (here / "vocab.txt").write_text("[PAD]")
    with pytest.raises(ValueError, match=r"model='vocab.txt' is a file; give the folder that it is in"):
        find_pretrained("model", "vocab.txt")


@pytest.mark.parametrize("name", ["bert-base-uncased", "someone/bert"])
def test_a_name_that_the_hub_has_is_passed_on(here, hub, name):
    assert find_pretrained("model", name) == name
    assert [asked for asked, _ in hub.asked] == [name] and all(0 < timeout <= 10 for _, timeout in hub.asked)


def test_a_name_that_the_hub_does_not_have_is_refused(here, hub):
    client = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx, or what follows it
    response = client.Response(404, request=client.Request("GET", "https://hub"))
    hub.answer = RepositoryNotFoundError("404 Client Error", response=response)
    message = r"no such folder, and no such model on the hub \(a private one.*\); did you mean 'packed'\?"
    with pytest.raises(ValueError, match=message):
        find_pretrained("model", "paced")


def test_a_hub_that_is_busy_is_asked_again_by_transformers(here, hub):
    client = importlib.import_module(HTTPError.__module__.partition(".")[0])
    response = client.Response(429, request=client.Request("GET", "https://hub"))
    hub.answer = HfHubHTTPError("429 Too Many Requests", response=response)
    assert find_pretrained("model", "someone/bert") == "someone/bert"


def test_without_a_hub_a_name_is_refused_at_once_or_found_where_it_was_downloaded_to(here, hub, monkeypatch, folders):
    hub.answer = HTTPError("Name or service not known")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    message = r"model='someone/bert': there is no such folder, and the hub cannot be reached \(Name or service not kn"
    with pytest.raises(ValueError, match=message):
        find_pretrained("model", "someone/bert")
    snapshot = here / "cache" / "models--someone--bert" / "snapshots" / "0123"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    AutoTokenizer.from_pretrained(folders["tokenizer"]).save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(here / "cache"), raising=False)
    assert find_pretrained("tokenizer", "someone/bert") == str(snapshot)
    assert load_tokenizer("someone/bert").get_vocab() == AutoTokenizer.from_pretrained(snapshot).get_vocab()


@pytest.mark.parametrize(
    ("option", "wrong", "messages"),
    [
        (
            "dataset",
            "{dataset}d",
            ["does not exist; give the folder that pack-dataset wrote; did you mean '{dataset}'?"],
        ),
        ("tokenizer", "{prepared}/tokenizr", ["does not exist; did you mean '{tokenizer}'?"]),
        ("tokenizer", "{prepared}", ["holds no tokenizer; did you mean '{tokenizer}'?"]),
        ("tokenizer", "{dataset}", ["holds no tokenizer; give a folder with tokenizer.json"]),
        ("model", "./bert", ["--model ./bert does not exist"]),
        ("model", "{prepared}", ["--model {prepared} holds no checkpoint of transformers"]),
    ],
)
def test_the_command_says_it_in_one_line_and_at_once(folders, tmp_path, capsys, no_hub, option, wrong, messages):
    assert train(folders, tmp_path / "bert", **{option: wrong.format(**folders)}) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"bert-pretrain train: --{option} "), error
    for message in messages:
        assert message.format(**folders) in error, error
