"""Where this service keeps what outlives it: folders by the settings, or as the XDG specification says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from unisono.config import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisono.config import Settings

_SLOTS_FILE = "slots.json"


def data_folder(settings: Settings, environ: Mapping[str, str]) -> Path | None:
    """Where batches are kept; None: nowhere, or no home to put it in. Raises SettingError."""
    return _folder("UNISONO_DATA_DIR", settings.data_dir, environ, "XDG_DATA_HOME", ".local/share")


def slots_path(settings: Settings, environ: Mapping[str, str]) -> Path | None:
    """The file of remembered slots; None where there is to be none, or no home to put it in. Raises SettingError."""
    folder = _folder("UNISONO_STATE_DIR", settings.state_dir, environ, "XDG_STATE_HOME", ".local/state")
    return folder / _SLOTS_FILE if folder is not None else None


def _folder(name: str, setting: str, environ: Mapping[str, str], variable: str, in_home: str) -> Path | None:
    """The folder that a setting names; else that of the XDG Base Directory Specification. None: none, or no home."""
    if setting.strip().lower() == "none":
        return None
    if setting:
        try:
            return Path(setting).expanduser()
        except RuntimeError as error:
            raise SettingError(f"{name}: {setting}: there is no such home; write the folder out") from error
    base = Path(environ.get(variable, ""))
    if not base.is_absolute():
        # A relative path is to be ignored, says the specification.
        try:
            base = Path.home() / in_home
        except RuntimeError:
            return None
    return base / "unisono"
