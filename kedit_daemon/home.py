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
FOLDER_MODE = 0o750  # facts may be confidential; the group may read


def restrict_umask() -> None:
    """Keep others from writing what this process creates from now on."""
    os.umask(os.umask(0o077) | 0o022)


@dataclass(frozen=True)
class Home:
    """The folder of one daemon and the places in it."""

    root: Path

    @classmethod
    def from_environ(cls, option: Path | None, environ: Mapping[str, str]) -> "Home":
        """Return the home of the option, else $KEDIT_HOME, systemd's or the XDG state folder."""
        if option is not None:
            return cls(option.expanduser().absolute())
        if given := environ.get("KEDIT_HOME"):
            return cls(Path(given).expanduser().absolute())
        # systemd joins several state directories with colons; ours comes first.
        if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
            return cls(Path(given).absolute())
        # The XDG specification wants relative paths ignored.
        if (given := environ.get("XDG_STATE_HOME", "")).startswith("/"):
            return cls(Path(given) / PROGRAM_NAME)
        user = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
        return cls(user.absolute() / ".local/state" / PROGRAM_NAME)

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

    def create_folders(self) -> None:
        """Make the folders that are missing; those that exist keep their modes."""
        inside_inbox = [self.inbox_folder / name for name in ("work", "done", "failed")]
        inside_state = [self.generations_folder, self.side_folder, self.index_folder]
        try:
            self.root.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            for folder in (self.inbox_folder, self.state_folder, *inside_inbox, *inside_state):
                folder.mkdir(FOLDER_MODE, exist_ok=True)
        except OSError as error:
            raise NoHome(
                f"cannot make a home in {self.root}: {error}",
                hint="choose a folder you may write with --home DIR or KEDIT_HOME",
            ) from error


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
