"""Where this machine keeps what Addenda makes for itself."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache folder: ``cache_dir``, else ``$ADDENDA_HOME``, else ``$XDG_CACHE_HOME/addenda``, else the
    platform's own place.

    Example:
        >>> cache_root("/data/models").as_posix()
        '/data/models'
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    if home := os.environ.get("ADDENDA_HOME"):
        return Path(home).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "addenda"
    import platformdirs

    return Path(platformdirs.user_cache_dir("addenda", appauthor=False))
