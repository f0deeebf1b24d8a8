"""What a path that holds no model in Hugging Face's layout is instead, and what to do about it.

Every answer is one or two sentences: what the path is, and the path or the command that is right.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cpt.errors import ConfigError
from data_pipeline.config.links import dangling_link
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.store.file_kinds import FileKind, kind_of_file

CONFIG = "config.json"
DEFAULT_REPOSITORY = "openai/gpt-oss-20b"
_RELEASED = ("gpt-oss-20b", "gpt-oss-120b")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_CHECKPOINTS = "checkpoints"
_STEP_FOLDER = re.compile(r"step-\d{8}")
_FILES_OF_RUN = ("config.resolved.yaml", "metrics.jsonl")
"""What a run writes before its first checkpoint."""
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def download_command(repository: str = DEFAULT_REPOSITORY, folder: Path | None = None) -> str:
    """Return the command that fetches the released weights without their two other copies.

    Args:
        folder: Where they are wanted; by default the repository's name below models/.
    """
    target = folder or Path("models", repository.rpartition("/")[2])
    return (
        f'hf download {repository} --exclude "original/*" --exclude "metal/*" '
        f"--local-dir {shlex.quote(str(target))}"
    )


def why_no_model(path: Path) -> str:
    """Return why a path is no directory with a config.json, and the cure."""
    link = dangling_link(path) or dangling_link(path / CONFIG)
    if link:
        return link
    if path.is_file():
        return _of_file(path)
    if path.is_dir():
        return _of_directory(path)
    return _of_nothing(path)


def why_no_config(path: Path, model_type: object) -> str:
    """Return what a directory is whose config.json is of another kind of model."""
    told = f"{path / CONFIG}: model_type is {model_type!r}, must be 'gpt_oss'."
    is_original = (path / "dtypes.json").is_file() or path.name == "original"
    if model_type is None and is_original:
        return (
            f"{told} It is OpenAI's own format, which is not read. Hugging Face's files are in the "
            f"folder above in the same repository: {download_command()}"
        )
    return told


def run_and_step(path: Path) -> tuple[Path | None, int | None]:
    """Return the run directory and the step that a path names; (None, None) if it names neither.

    A run directory has no step; RUN@STEP has both.
    """
    if path.exists():
        return (path, None) if _is_run(path) else (None, None)
    name, at, step = path.name.rpartition("@")
    run_dir = path.with_name(name) if name else path
    if not at or not step.isdecimal() or not _is_run(run_dir):
        return None, None
    return run_dir, int(step)


def _is_run(path: Path) -> bool:
    if (path / CONFIG).exists():
        return False
    return (path / _CHECKPOINTS).is_dir() or any((path / name).exists() for name in _FILES_OF_RUN)


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint of a run, in its run directory or out of it."""
    return (path / "manifest.json").is_file() and not (path / CONFIG).exists()


def run_of(path: Path) -> Path | None:
    """Return the run directory of a checkpoint, by its path alone; None if it lies elsewhere."""
    if path.parent.name == _CHECKPOINTS and _STEP_FOLDER.fullmatch(path.name):
        return path.parent.parent
    return None


def _of_file(path: Path) -> str:
    try:
        kind = kind_of_file(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if kind is FileKind.GGUF:
        return (
            f"{path} is {kind.words}: its weights are quantized for llama.cpp and not read. Train "
            f"from the original ones: {download_command()}"
        )
    if path.name == CONFIG or kind is FileKind.SAFETENSORS:
        return f"{path} is a file. Give its directory, which must have a {CONFIG}: {path.parent}"
    what = "text" if kind is FileKind.TEXT else kind.words
    return f"{path} is a file ({what}), must be a Hugging Face directory with a {CONFIG}."


def _of_directory(path: Path) -> str:
    missing = f"{path / CONFIG} does not exist."
    kinds = (_of_cache, _of_run, _of_adapter, _of_original, _of_other_weights, _of_folder_above)
    for describe in kinds:
        told = describe(path)
        if told:
            return f"{missing} {told}"
    return f"{missing} Give a Hugging Face directory. The released one: {download_command()}"


def _of_cache(path: Path) -> str:
    """Return what to say of the Hub's cache, or of one model in it."""
    snapshots = path / "snapshots"
    if snapshots.is_dir():
        found = _snapshot(path)
        if found is None:
            name = path.name.removeprefix("models--").replace("--", "/")
            return (
                f"It is a model in the Hub's cache, but no folder below {snapshots} has a "
                f"{CONFIG}. Fetch it again: hf download {name}"
            )
        return f"It is a model in the Hub's cache, whose files are in {found}"
    models = sorted(path.glob("models--*"))
    if not models:
        return ""
    gpt_oss = [folder for folder in models if "gpt-oss" in folder.name]
    found = _snapshot((gpt_oss or models)[0])
    where = "" if found is None else f", such as {found}"
    return f"It is the Hub's cache: give the folder of one model{where}"


def _snapshot(model: Path) -> Path | None:
    """Return the snapshot of a model in the Hub's cache that `main` names, or the newest one."""
    snapshots = [file.parent for file in (model / "snapshots").glob(f"*/{CONFIG}")]
    main = model / "refs" / "main"
    if main.is_file():
        named = model / "snapshots" / main.read_text(encoding="utf-8", errors="replace").strip()
        if named in snapshots:
            return named
    return max(snapshots, key=lambda folder: folder.stat().st_mtime, default=None)


def _of_run(path: Path) -> str:
    """Return what to say of a run directory or a checkpoint of this project."""
    run_dir = None
    step = ""
    if _is_run(path):
        run_dir = path
        if not (path / _CHECKPOINTS).is_dir():
            return (
                "It is the directory of a run of this project that has saved no checkpoint yet. "
                "Wait for one, or give another model."
            )
    elif is_checkpoint(path):
        run_dir = run_of(path)
        step = "" if run_dir is None else f" --step {int(path.name.removeprefix('step-'))}"
    if run_dir is None:
        return ""
    return (
        "It belongs to a run of this project, which only model.path of another run takes as it is. "
        "Export its weights first: "
        f"cpt export --run_dir {run_dir}{step} --out DIRECTORY"
    )


def _of_adapter(path: Path) -> str:
    if not any((path / name).is_file() for name in _ADAPTER_FILES):
        return ""
    return (
        "It holds an adapter alone, in PEFT's format, without the model below it. To go on with "
        "the adapter: cpt import-adapter. For one model with the adapter added: cpt export "
        "--format bf16 of the run that trained it, or PEFT's merge_and_unload and save_pretrained."
    )


def _of_original(path: Path) -> str:
    if (path / "dtypes.json").is_file() or (path / "original").is_dir():
        return (
            "It holds OpenAI's own format (original/), which is not read. Fetch Hugging Face's "
            f"files of the same repository: {download_command()}"
        )
    return ""


def _of_other_weights(path: Path) -> str:
    """Return what to say of a directory with weights that are not read."""
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if gguf:
        return (
            f"It holds {gguf[0]}: GGUF is quantized for llama.cpp and not read. Train from the "
            f"original weights: {download_command()}"
        )
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return (
            f"It holds {pickles[0]}: pickles can run code and are not read. Save the model as "
            f"safetensors, or fetch it: {download_command()}"
        )
    if any(path.glob("*.safetensors")):
        return f"Its weights are there: fetch {CONFIG} from where they are from, too."
    return ""


def _of_folder_above(path: Path) -> str:
    """Return the folders below that hold a model."""
    below = sorted(file.parent for file in path.glob(f"*/{CONFIG}"))
    if not below:
        return ""
    return f"Did you mean {below[-1]}?"


def _of_nothing(path: Path) -> str:
    told = f"{path} does not exist."
    text = str(path)
    if "$" in text or "~" in path.parts:
        return f"{told} Variables such as $HOME are not filled in here: write the path itself."
    if path.parent.name == "models" and path.name in _RELEASED:
        return f"{told} Fetch the release: {download_command(f'openai/{path.name}', path)}"
    if path.parent.name == "runs":
        return (
            f"{told} A recipe that begins from a run needs that run first. Train it, or give an "
            "export or the release: --set model.path=DIRECTORY."
        )
    repository = "/".join(path.parts[-2:])
    is_like_repository = not path.parent.exists() and path.parent.parent.exists()
    if is_like_repository or path.parent.name == "openai":
        return (
            f"{told} If {repository} is a name on the Hugging Face Hub, fetch it first and give "
            f"the folder: {download_command(repository)}"
        )
    beside = [file.parent.name for file in path.parent.glob(f"*/{CONFIG}")]
    if beside:
        return told + nearest(path.name, beside)
    return f"{told} Give a Hugging Face directory with a {CONFIG}."
