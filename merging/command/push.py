"""Uploading a finished merge to the Hub: what can be wrong is found before the merge, and a failure loses nothing."""

from pathlib import Path

import yaml

from merging.command.recipe_files import located


def check_push(repo: str) -> None:
    """Refuse, before anything is merged, what could not be uploaded afterwards.

    Args:
        repo: OWNER/NAME on the Hub.

    Raises:
        ValueError: it is no such name, or there is no token that may write.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        sound = repo.count("/") == 1
    except HFValidationError:
        sound = False
    if not sound:
        raise ValueError(f"--push {repo!r}: must be OWNER/NAME, as repositories of the Hub are called")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push: HF_HUB_OFFLINE is set; unset it, or upload the merge later by the same command")
    if get_token() is None:
        raise ValueError("--push: there is no token of the Hub; run hf auth login, or set HF_TOKEN")
    try:
        user = HfApi().whoami()
    except Exception as error:
        raise ValueError(f"--push: the Hub does not take the token ({_reason(error)}); run hf auth login") from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("--push: the token may only read; take one that may write, and run hf auth login again")


def push(out: Path, repo: str) -> str:
    """Upload the folder of a finished merge, and return the address of the repository, which is made if need be.

    The recipe is uploaded with the names of local models in place of their paths.

    Args:
        out: the folder.
        repo: OWNER/NAME on the Hub.

    Raises:
        OSError: one line: it failed, and how to try again.
    """
    from huggingface_hub import HfApi

    api, message = HfApi(), "Upload a merged model"
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_file(
            path_or_fileobj=public_recipe(out).encode(),
            path_in_repo="merging.yaml",
            repo_id=repo,
            commit_message=message,
        )
        api.upload_folder(repo_id=repo, folder_path=out, ignore_patterns=["merging.yaml"], commit_message=message)
    except Exception as error:  # network, rights, quota: whatever it is, the merge is there
        raise OSError(
            f"{out}: the merge is complete, but its upload to {repo} failed ({_reason(error)}); the same command again "
            "uploads it without merging anew"
        ) from None
    return str(address)


def public_recipe(out: Path) -> str:
    """Return merging.yaml without local paths: a model on this machine is named by the last part of its path."""
    values = yaml.safe_load((out / "merging.yaml").read_text(encoding="utf-8"))

    def public(given: str) -> str:
        path = Path(located(given, out))
        return path.resolve().name if path.exists() else given

    values |= {"base": public(values["base"]), "experts": list(map(public, values["experts"]))}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
