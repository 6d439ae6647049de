"""A repository on the Hugging Face Hub that one delta, or a checkpoint merged from it, is uploaded to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from adapeft.errors import AdapeftError
from cluster.failure import WorkerError

IDENTITY = "adapeft_delta"
"""Key of a card's metadata: SHA-256 of the delta that the repository holds, or that was merged."""

_CARD = "README.md"
_OF_THE_HUB = {".gitattributes"}


class Repository:
    """A repository, which may not exist yet.

    Args:
        name: ``me/name``, or ``name`` for one of the user's own.
        private: whether only its owners see it.

    Raises:
        AdapeftError: no repository can have this name.
    """

    def __init__(self, name: str, *, private: bool) -> None:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise AdapeftError(f"{name}: no name of a repository on the hub: {error}") from error
        self.name, self._private = name, private
        self._api = HfApi()
        self._parent: str | None = None
        """Newest commit of a repository that exists."""

    def check(self, identity: str) -> None:
        """Check that the repository is new or empty, or holds an earlier upload of the same delta.

        Raises:
            AdapeftError: it holds anything else, is public where it should be private or the reverse, or this user has
                no valid token.
            WorkerError: the hub cannot be reached.
        """
        with self._reaching():
            user = self._api.whoami()["name"]
            if "/" not in self.name:
                self.name = f"{user}/{self.name}"
            try:
                found = self._api.model_info(self.name)
            except RepositoryNotFoundError:
                return
        if bool(found.private) != self._private:
            now, other = ("private", "--private") if found.private else ("public", "--public")
            raise AdapeftError(f"{self.name} exists and is {now}. Say so with {other}, or give another name.")
        files = sorted({file.rfilename for file in found.siblings or ()} - _OF_THE_HUB)
        known = None if found.card_data is None else found.card_data.get(IDENTITY)
        if files and known != identity:
            raise AdapeftError(
                f"{self.name} exists and holds something else ({', '.join(files[:3])}{' …' * (len(files) > 3)}). Give "
                "another name, or delete the repository."
            )
        self._parent = found.sha

    def upload(self, files: Mapping[str, Path], card: ModelCard, message: str) -> str:
        """Upload files and card in one commit, so that all become visible at once, and return the commit's URL.

        Args:
            files: path in the repository → file.
            card: model card.
            message: title of the commit.

        Raises:
            AdapeftError: this user may not write there, or somebody has changed the repository since ``check``.
            WorkerError: the hub cannot be reached.
        """
        contents: dict[str, Path | bytes] = {**files, _CARD: str(card).encode()}
        added = [CommitOperationAdd(name, content) for name, content in contents.items()]
        with self._reaching():
            if self._parent is None:
                self._api.create_repo(self.name, private=self._private)
            commit = self._api.create_commit(self.name, added, commit_message=message, parent_commit=self._parent)
        return commit.commit_url

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn errors of the hub into ours."""
        try:
            yield
        except LocalTokenNotFoundError as error:
            raise AdapeftError(
                f"{self.name}: this user has no token for the hub. Run `hf auth login`, or set HF_TOKEN."
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            refusal = f"{self.name}: the hub refuses ({error.server_message or str(error).splitlines()[0]})."
            if status >= 500:
                raise WorkerError(f"{refusal} Nothing of this upload is visible there: push again.") from error
            remedy = {
                401: "Its token is invalid: run `hf auth login`, or set HF_TOKEN.",
                403: "Give a token that may write there, or another name.",
                412: "Somebody else has changed the repository: push again.",
            }
            raise AdapeftError(f"{refusal} {remedy.get(status, 'Nothing of this upload is visible there.')}") from error
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: a file could not be sent
            cause = error.__cause__ or error
            raise WorkerError(
                f"{self.name}: the hub cannot be reached ({type(cause).__name__}: {cause}). Nothing of this upload is "
                "visible there: push again."
            ) from error
