"""The folder of one daemon. Imports nothing heavy: commands must answer at once."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memory.errors import NoHome, Unreadable

if TYPE_CHECKING:
    import sqlite3

PROGRAM_NAME = "kedit-daemon"
MODELS_FOLDER = "models"
FOLDER_MODE = 0o750  # facts may be confidential; the group may read


def restrict_umask() -> None:
    """Keep others from writing what this process creates from now on."""
    os.umask(os.umask(0o077) | 0o022)


@dataclass(frozen=True)
class Home:
    """The folder of one daemon and the places in it."""

    root: Path
    shared_cache: Path | None = None  # of this user's homes; None where this one keeps all in it

    @classmethod
    def from_environ(cls, option: Path | None, environ: Mapping[str, str]) -> "Home":
        """Return the home of the option, else $KEDIT_HOME, systemd's or the XDG state folder; it
        shares $KEDIT_CACHE, else a folder in the XDG cache folder, with others."""
        return cls(_find_root(option, environ), _find_cache(environ))

    @property
    def config_file(self) -> Path:
        """The settings, written by `init`."""
        return self.root / "config.toml"

    @property
    def review_file(self) -> Path:
        """Datasette's metadata for the database, written by `init`."""
        return self.root / "review.yaml"

    @property
    def inbox_folder(self) -> Path:
        """The folder that files of facts are dropped into."""
        return self.root / "inbox"

    @property
    def state_folder(self) -> Path:
        """The files that the daemon writes for itself."""
        return self.root / "state"

    @property
    def database_file(self) -> Path:
        """The only truth; everything else in the folder can be rebuilt from it."""
        return self.state_folder / "kedit.db"

    @property
    def generations_folder(self) -> Path:
        """Edited weights, one safetensors file a generation."""
        return self.state_folder / "generations"

    @property
    def side_folder(self) -> Path:
        """The shards of the side memory."""
        return self.state_folder / "side"

    @property
    def pictures_folder(self) -> Path:
        """The pictures that facts are about, by their digests."""
        return self.state_folder / "pictures"

    @property
    def index_folder(self) -> Path:
        """The retrieval index."""
        return self.state_folder / "index"

    @property
    def lock_file(self) -> Path:
        """The file that the running daemon holds locked."""
        return self.state_folder / "daemon.lock"

    @property
    def socket_file(self) -> Path:
        """The socket on which the running daemon listens for commands."""
        return self.state_folder / "control.sock"

    @property
    def head_file(self) -> Path:
        """The newest link of the audit chain, kept outside the database."""
        return self.state_folder / "audit.head"

    @property
    def models_folder(self) -> Path:
        """Models that were converted from GGUF files; all of it can be made again."""
        return (self.shared_cache or self.state_folder) / MODELS_FOLDER

    def create_folders(self) -> None:
        """Make the folders that are missing; those that exist keep their modes."""
        inside_inbox = [self.inbox_folder / name for name in ("work", "done", "failed")]
        inside_state = [self.generations_folder, self.side_folder, self.index_folder]
        inside_state.append(self.pictures_folder)
        try:
            self.root.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            for folder in (self.inbox_folder, self.state_folder, *inside_inbox, *inside_state):
                folder.mkdir(FOLDER_MODE, exist_ok=True)
        except OSError as error:
            raise NoHome(
                f"cannot make a home in {self.root}: {error}",
                hint="choose a folder you may write with --home DIR or KEDIT_HOME",
            ) from error


def _find_root(option: Path | None, environ: Mapping[str, str]) -> Path:
    if option is not None:
        return option.expanduser().absolute()
    if given := environ.get("KEDIT_HOME"):
        return Path(given).expanduser().absolute()
    # systemd joins several state directories with colons; ours comes first.
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given).absolute()
    return _find_xdg_folder("XDG_STATE_HOME", ".local/state", environ)


def _find_cache(environ: Mapping[str, str]) -> Path | None:
    if given := environ.get("KEDIT_CACHE"):
        return Path(given).expanduser().absolute()
    try:
        return _find_xdg_folder("XDG_CACHE_HOME", ".cache", environ)
    except RuntimeError:  # this user has no folder, as often in a container
        return None


def _find_xdg_folder(variable: str, default: str, environ: Mapping[str, str]) -> Path:
    # The XDG specification wants relative paths ignored.
    if (given := environ.get(variable, "")).startswith("/"):
        return Path(given) / PROGRAM_NAME
    user = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    return user.absolute() / default / PROGRAM_NAME


@contextmanager
def open_database(home: Home) -> Iterator["sqlite3.Connection"]:
    """Open the home's database for reading. Raises Unreadable."""
    import sqlite3

    from memory.db.queries import open_readonly

    conn = open_readonly(home.database_file)
    try:
        yield conn
    except sqlite3.Error as error:
        problem = f"{home.database_file} cannot be read: {error}"
        raise Unreadable(problem, hint="kedit-daemon doctor") from error
    finally:
        conn.close()
