"""Publish a folder on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

CARD = "README.md"


def push_folder(directory: Path, repository: str, *, card: str, private: bool = False) -> str:
    """Upload the files of `directory` with `card` as model card, in one commit, and return the repository's
    address.

    The repository is created where it does not exist; files there that `directory` does not have are left
    alone.

    Raises:
        ValueError: the hub refuses: no such name, no permission, or nobody is logged in.
    """
    paths = sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).as_posix() != CARD
    )
    files = [CommitOperationAdd(path.relative_to(directory).as_posix(), path) for path in paths]
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        operations = [*files, CommitOperationAdd(CARD, card.encode())]
        api.create_commit(repository, operations, commit_message="Upload a model quantized by tfmq")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise ValueError(
            f"cannot push to {repository}: {str(error).strip().splitlines()[0]}; log in with hf auth login"
        ) from error
    return str(address)
