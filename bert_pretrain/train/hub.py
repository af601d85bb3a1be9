"""Uploads to the hub that fail: what is missing there, where it lies on the disk, and how to upload it.

--push_to_hub uploads the model in the background at each save, and once more at the end. Trainer (transformers 5.23)
never asks how the former ended. Here a warning reports a failed upload, training continues, and the next save uploads
again. What is missing on the hub at the very end is an error.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import HfHubHTTPError, HTTPError  # its client's error: httpx or requests

from collate import PackedTrainer
from collate.training.hooks import overrides_trainer

logger = logging.getLogger(__name__)


class Upload(NamedTuple):
    """An upload in the background. path_in_repo: of a checkpoint's folder; None for the model in output_dir."""

    folder: str
    path_in_repo: str | None
    job: Future


class Secret(str):
    """A token that is pickled as None; otherwise it is a string like any other.

    Trainer pickles its arguments into training_args.bin beside each model, which goes to the hub.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()


@overrides_trainer
class SaysWhatFailed(PackedTrainer):
    """Errors of the hub name what failed, where it lies on the disk, and how to upload it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._uploads: list[Upload] = []
        self._not_on_the_hub: dict[str | None, str] = {}
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with _hub_errors("push_to_hub: make a token known (hf auth login), or leave the option out"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        output_dir = str(self.args.output_dir)
        with _hub_errors(f"the model is saved in {output_dir}: {self._command(output_dir, None)}"):
            pushed = super().push_to_hub(*args, **kwargs)
        self._not_on_the_hub.pop(None, None)
        if self._not_on_the_hub:
            raise OSError("; ".join(self._not_on_the_hub.values()))
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._look_after_uploads()
        before = self._jobs()
        super()._push_from_checkpoint(checkpoint_folder)
        new = [job for job in self._jobs() if job not in before]  # the model, and by some hub_strategies a checkpoint
        places = (None, "last-checkpoint" if self.args.hub_strategy == "checkpoint" else Path(checkpoint_folder).name)
        self._uploads += [Upload(checkpoint_folder, *of) for of in zip(places, new, strict=False)]

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._look_after_uploads()

    def _jobs(self) -> list[Future]:
        in_progress = getattr(self, "push_in_progress", None)  # rank 0 has one
        return [] if in_progress is None else list(in_progress.jobs)

    def _look_after_uploads(self) -> None:
        """Warn of uploads that failed; forget a failure once a later upload has sent the same."""
        ended = [upload for upload in self._uploads if upload.job.done()]
        self._uploads = [upload for upload in self._uploads if upload not in ended]
        for folder, path_in_repo, job in ended:
            self._not_on_the_hub.pop(path_in_repo, None)
            if (error := job.exception()) is None:
                continue
            what = (
                f"the model of {Path(folder).name}"
                if path_in_repo is None
                else f"{Path(folder).name} as {path_in_repo}"
            )
            message = (
                f"{what} could not be uploaded to {self.hub_model_id} ({_first_line(error)}); {folder} is complete on "
                f"the disk: {self._command(folder, path_in_repo)}"
            )
            self._not_on_the_hub[path_in_repo] = message
            logger.warning("%s; or wait: the next upload sends what is newer", message)

    def _command(self, folder: str, path_in_repo: str | None) -> str:
        """What to type in a shell to upload it."""
        repository = getattr(self, "hub_model_id", None) or "OWNER/NAME"
        if path_in_repo is None:
            return f"hf upload {repository} {self.args.output_dir} . --exclude 'checkpoint-*' --exclude '_*'"
        return f"hf upload {repository} {folder} {path_in_repo}"


@contextmanager
def _hub_errors(cure: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, HfHubHTTPError) as error:
        raise OSError(f"the hub cannot be reached, or refuses ({_first_line(error)}); {cure}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
