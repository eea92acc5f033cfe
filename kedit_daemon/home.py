"""Where everything of one daemon lies. Imports nothing heavy: commands must answer at once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memory.errors import KeditError

NAME = "kedit-daemon"
FOLDER_MODE = 0o750  # facts may be confidential; the group may read


def keep_writers_out() -> None:
    """What this process makes from now on is nobody else's to write, however loose its umask."""
    os.umask(os.umask(0o077) | 0o022)


@dataclass(frozen=True)
class Home:
    """The folder of one daemon and the places in it."""

    root: Path

    @classmethod
    def find(cls, option: Path | None, environ: Mapping[str, str]) -> "Home":
        """The home asked for, else $KEDIT_HOME, systemd's state folder, or the XDG state folder."""
        if option is not None:
            return cls(option.expanduser().absolute())
        if given := environ.get("KEDIT_HOME"):
            return cls(Path(given).expanduser().absolute())
        # systemd joins several state directories with colons; ours comes first.
        if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
            return cls(Path(given).absolute())
        # The XDG specification wants relative paths ignored.
        if (given := environ.get("XDG_STATE_HOME", "")).startswith("/"):
            return cls(Path(given) / NAME)
        user = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
        return cls(user.absolute() / ".local/state" / NAME)

    @property
    def config(self) -> Path:
        """The settings, written by `init`."""
        return self.root / "config.toml"

    @property
    def review(self) -> Path:
        """What datasette needs to show the database to people, written by `init`."""
        return self.root / "review.yaml"

    @property
    def inbox(self) -> Path:
        """Where files of facts are dropped."""
        return self.root / "inbox"

    @property
    def state(self) -> Path:
        """Everything the daemon writes for itself."""
        return self.root / "state"

    @property
    def database(self) -> Path:
        """The only truth; what lies beside it can be rebuilt from it."""
        return self.state / "kedit.db"

    @property
    def generations(self) -> Path:
        """Edited weights, one safetensors file a generation."""
        return self.state / "generations"

    @property
    def side(self) -> Path:
        """The shards of the side memory."""
        return self.state / "side"

    @property
    def index(self) -> Path:
        """The retrieval index."""
        return self.state / "index"

    @property
    def lock(self) -> Path:
        """Held by the running daemon."""
        return self.state / "daemon.lock"

    @property
    def socket(self) -> Path:
        """Where the running daemon listens for commands."""
        return self.state / "control.sock"

    @property
    def head(self) -> Path:
        """The newest link of the audit chain, kept outside the database."""
        return self.state / "audit.head"

    def create(self) -> None:
        """Make the folders that are missing; those that exist keep their modes."""
        inside = [self.inbox / "work", self.inbox / "done", self.inbox / "failed"]
        try:
            self.root.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            for folder in (self.inbox, self.state):
                folder.mkdir(FOLDER_MODE, exist_ok=True)
            for folder in (*inside, self.generations, self.side, self.index):
                folder.mkdir(FOLDER_MODE, exist_ok=True)
        except OSError as error:
            raise KeditError(
                f"cannot make a home in {self.root}: {error}",
                code="no-home",
                hint="choose a folder you may write with --home DIR or KEDIT_HOME",
            ) from error
