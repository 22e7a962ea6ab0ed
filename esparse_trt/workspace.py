"""Who owns a build folder: one recipe, and one process at a time."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from esparse_trt import system
from esparse_trt.artifacts import BuildDir, Manifest, load_manifest, write_atomic
from esparse_trt.errors import EsparseError
from esparse_trt.recipe import Recipe

_LOCK = ".lock"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def claim(
    recipe: Recipe,
    folder: BuildDir,
    *,
    fresh: bool = False,
    redo: Collection[str] = (),
    reread: Collection[str] = (),
) -> Iterator[Manifest]:
    """Hold a build folder for one recipe while the body runs.

    If the body raises an EsparseError before it has made anything, the folder is left as it was; temporary
    files are removed whatever it raises.

    Args:
        recipe: the recipe that builds here.
        folder: made if it does not exist.
        fresh: delete an earlier build first.
        redo: stages whose records are forgotten, so that they run again.
        reread: recipe sections that may differ from the earlier build, as only stages in `redo` read them.

    Yields:
        the manifest: that of the build to resume, or a new one.

    Raises:
        EsparseError: the folder cannot be written, holds something else, belongs to another recipe, or is
            in use by another process; or the body ran out of disk space, or was refused access to a file.
    """
    made = [path for path in (folder.root, *folder.root.parents) if not path.exists()]
    try:
        _refuse_strangers(folder)
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = (folder.root / _LOCK).open("w")
    except OSError as error:
        raise EsparseError(
            f"cannot write here: {error.strerror}",
            where=folder.root,
            fix="choose a writable folder with --out",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EsparseError(
                "another esparse-trt process is building here",
                where=folder.root,
                fix="wait for it, or use --out",
            ) from error
        try:
            with _os_errors(folder):
                yield _open(recipe, folder, fresh, redo, reread)
        except EsparseError:
            _withdraw(folder, made)
            raise
        finally:
            _remove_temporaries(folder)


def preview(
    recipe: Recipe,
    folder: BuildDir,
    *,
    fresh: bool = False,
    redo: Collection[str] = (),
    reread: Collection[str] = (),
) -> Manifest:
    """The manifest that `claim` would yield; nothing is written.

    Raises:
        EsparseError: the folder holds something else, or belongs to another recipe.
    """
    _refuse_strangers(folder)
    return _resume(recipe, folder, None if fresh else load_manifest(folder), redo, reread)


def _open(
    recipe: Recipe, folder: BuildDir, fresh: bool, redo: Collection[str], reread: Collection[str]
) -> Manifest:
    if fresh:
        _clear(folder)
    old = load_manifest(folder)
    new = _resume(recipe, folder, old, redo, reread)
    changed = old is not None and old.fingerprint != new.fingerprint
    if "prune" in redo or (old is not None and changed and not _begun(folder, old)):
        shutil.rmtree(folder.journal, ignore_errors=True)
    write_atomic(folder.manifest, new.model_dump_json(indent=1))
    return new


def _resume(
    recipe: Recipe, folder: BuildDir, old: Manifest | None, redo: Collection[str], reread: Collection[str]
) -> Manifest:
    """A manifest for the recipe with what remains valid of the old one."""
    new = Manifest(
        version=system.package_version("esparse-trt") or "source tree",
        recipe=recipe.canonical(),
        fingerprint=recipe.fingerprint(),
        environment=system.environment(),
    )
    if old is None:
        return new
    if old.fingerprint != new.fingerprint and _begun(folder, old):
        _check_change(old, new, folder, reread)
    return new.model_copy(update={"stages": {k: v for k, v in old.stages.items() if k not in redo}})


def _begun(folder: BuildDir, manifest: Manifest) -> bool:
    """Whether the folder holds work that was done for the manifest's recipe and for no other."""
    return bool(manifest.stages) or any(folder.journal.glob("block-*")) or folder.ablation.exists()


def _check_change(old: Manifest, new: Manifest, folder: BuildDir, reread: Collection[str]) -> None:
    """Accept a changed recipe only if every change concerns sections that are read again."""
    changed = sorted(_differences(old.recipe, new.recipe))
    if all(key.split(".")[0] in {*reread, "name", "description"} for key in changed):
        return
    raise EsparseError(
        f"the folder belongs to another recipe (different: {_listed(changed, old, new)})",
        where=folder.root,
        fix="use --out for a new folder, --from STAGE to redo what reads these keys, or --fresh",
    )


def _listed(changed: list[str], old: Manifest, new: Manifest) -> str:
    """The first keys that changed, with both values."""
    shown = [
        f"{key} was {_value(old.recipe, key)!r} and is {_value(new.recipe, key)!r}" for key in changed[:4]
    ]
    more = [f"{len(changed) - 4} more"] if len(changed) > 4 else []
    return "; ".join(shown + more)


def _value(recipe: object, key: str) -> object:
    for part in key.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe


def _differences(a: object, b: object, prefix: str = "") -> Iterator[str]:
    """Dotted keys at which two canonical recipes differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix


def _refuse_strangers(folder: BuildDir) -> None:
    """Never write into, or with `fresh` delete, a folder that holds something else."""
    if folder.manifest.exists() or not folder.root.is_dir():
        return
    strangers = sorted(path.name for path in folder.root.iterdir() if path.name != _LOCK)
    if strangers:
        raise EsparseError(
            f"the folder is not empty and no build of ours (it holds {', '.join(strangers[:5])})",
            where=folder.root,
            fix="choose another folder with --out",
        )


@contextmanager
def _os_errors(folder: BuildDir) -> Iterator[None]:
    """A full disk and refused access are the user's to mend; other errors of the system are bugs of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports errors of the system in words only
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or "(os error 28)" in str(error):
            free = shutil.disk_usage(folder.root).free
            raise EsparseError(
                f"the disk is full ({free / 2**20:.0f} MiB left)",
                where=folder.root,
                fix="make room and run the command again: it resumes; --dry-run prints what a build needs",
            ) from error
        if isinstance(error, OSError) and number in _REFUSED:
            raise EsparseError(
                f"the system says: {error.strerror}",
                where=error.filename or folder.root,
                fix="give yourself access to it, or use --out for a folder that you can write",
            ) from error
        raise


def _withdraw(folder: BuildDir, made: list[Path]) -> None:
    """Take back what `claim` made, if nothing has come of it."""
    _remove_temporaries(folder)
    if {path.name for path in folder.root.iterdir()} - {_LOCK, folder.manifest.name, folder.journal.name}:
        return
    manifest = load_manifest(folder)
    if manifest is not None and _begun(folder, manifest):
        return
    _clear(folder)
    (folder.root / _LOCK).unlink()
    for path in made:
        path.rmdir()


def _remove_temporaries(folder: BuildDir) -> None:
    """Remove what a failed or killed process was about to rename."""
    for path in list(folder.root.rglob(".*.tmp")):
        _remove(path)


def _clear(folder: BuildDir) -> None:
    for path in folder.root.iterdir():
        if path.name != _LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
