"""Who owns a build folder: one recipe, and one process at a time."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from esparse_trt import system
from esparse_trt.artifacts import BuildDir, Manifest, load_manifest, write_atomic
from esparse_trt.errors import EsparseError
from esparse_trt.recipe import Recipe

_LOCK = ".lock"


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
            in use by another process.
    """
    _refuse_strangers(folder)
    try:
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
        yield _open(recipe, folder, fresh, redo, reread)


def _open(
    recipe: Recipe, folder: BuildDir, fresh: bool, redo: Collection[str], reread: Collection[str]
) -> Manifest:
    if fresh:
        _clear(folder)
    old = load_manifest(folder)
    new = Manifest(
        version=system.package_version("esparse-trt") or "source tree",
        recipe=recipe.canonical(),
        fingerprint=recipe.fingerprint(),
        environment=system.environment(),
    )
    if old is not None:
        if old.fingerprint != new.fingerprint:
            _check_change(old, new, folder, reread)
        new = new.model_copy(update={"stages": {k: v for k, v in old.stages.items() if k not in redo}})
    if "prune" in redo:
        shutil.rmtree(folder.journal, ignore_errors=True)
    write_atomic(folder.manifest, new.model_dump_json(indent=1))
    return new


def _check_change(old: Manifest, new: Manifest, folder: BuildDir, reread: Collection[str]) -> None:
    """Accept a changed recipe only if every change concerns sections that are read again."""
    changed = sorted(_differences(old.recipe, new.recipe))
    if all(key.split(".")[0] in {*reread, "name", "description"} for key in changed):
        return
    raise EsparseError(
        f"the folder belongs to another recipe (different: {', '.join(changed[:6])})",
        where=folder.root,
        fix="use --out for a new folder, --from STAGE to redo what reads these keys, or --fresh",
    )


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


def _clear(folder: BuildDir) -> None:
    for path in folder.root.iterdir():
        if path.name == _LOCK:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
