"""What commands share: files that are whole, progress bars that look alike, and an exit code."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

INTERRUPTED = 130  # the exit code after Ctrl-C


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that readers see the old one or the whole new one, never a part.

    Args:
        path: where, in a folder that exists. A link stays one, and so does what is no file, such as
            /dev/null; that is written to directly.
        text: written as UTF-8.

    Raises:
        OSError: the file cannot be written; what was there is unchanged.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder, "b.txt"), "text")
        ...     Path(folder, "b.txt").read_text()
        'text'
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write what ``json.dumps`` takes, as ``write_atomically`` does."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def progress_bar(console: Console, **options: Any) -> Progress:
    """Bars with description, count and time; ``options`` are those of rich.progress.Progress."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, **options)
