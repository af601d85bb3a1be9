"""Folders and names that a user gives: a mistyped one is refused at once, with the nearest one that exists.

prepraed/tokenizer   prepared/tokenizer exists            -> did you mean 'prepared/tokenizer'?
someone/bert         no such folder, but a hub's name     -> ask the hub once; transformers would try for a minute
"""

from pathlib import Path

from packing.files.errors import Option, OptionError, path_suggestion

CACHED = ("config.json", "tokenizer_config.json", "tokenizer.json")
"""A downloaded repository has one of them."""
HUB_SECONDS = 10


def find_pretrained(option: str, name: str) -> str:
    """What from_pretrained can load: a folder, the name of a model on the hub, or, offline, the downloaded copy.

    option: "model" or "tokenizer", for messages. Raises ValueError where there is none.
    """
    path = Path(name)
    if path.is_dir():
        return name
    if path.exists():
        raise OptionError(f"{Option(option, name)} is a file; give the folder that it is in")
    if not _may_be_on_the_hub(name):
        raise OptionError(f"{Option(option, name)} does not exist{path_suggestion(name, only_folders=True)}")
    return _on_the_hub(option, name)


def _may_be_on_the_hub(name: str) -> bool:
    """Whether it is OWNER/NAME or NAME, and OWNER is no folder here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" not in name or not Path(name).parent.exists()


def _on_the_hub(option: str, name: str) -> str:
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
        return name
    except errors.GatedRepoError:  # a RepositoryNotFoundError, too
        return name  # transformers says what must be agreed to
    except errors.RepositoryNotFoundError:
        raise OptionError(
            f"{Option(option, name)}: there is no such folder, and no such model on the hub (a private one needs a "
            f"token: hf auth login){path_suggestion(name, only_folders=True)}"
        ) from None
    except errors.HfHubHTTPError:
        return name  # the hub answers, perhaps it is busy: transformers knows when to ask again
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        for file in CACHED:
            if isinstance(cached := try_to_load_from_cache(name, file), str):
                return str(Path(cached).parent)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"{Option(option, name)}: there is no such folder, and the hub cannot be reached "
            f"({reason}){path_suggestion(name, only_folders=True)}"
        ) from None
