"""A daemon of the demo: a home with a few settings of its own, and the process that runs in it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from kedit_daemon import config, control
from kedit_daemon.editing.measurement_cache import copy_measured
from kedit_daemon.home import Home
from kedit_daemon.ingest.submit import format_native
from memory.db import queries
from memory.db.overview import fetch_overview
from memory.errors import KeditError
from memory.facts import LIVE_STATES, Fact

START_SECONDS = 300.0  # the first start on a model measures it
EDIT_SECONDS = 600.0
ASK_TOKENS = 16  # of an answer that is shown and compared


def format_settings(model: str, settings: Mapping[str, float]) -> str:
    """Format the default settings, with a model and other values of some keys."""
    text = config.render_default_config(model)
    for key, value in settings.items():
        pattern = f"^(# )?{key} = .*$"
        text, found = re.subn(pattern, f"{key} = {value}", text, flags=re.MULTILINE)
        if not found:
            raise KeditError(f"the default settings have no {key}", code="demo")
    return text


class DemoDaemon:
    """A daemon process and its home."""

    def __init__(self, root: Path, model: str, settings: Mapping[str, float]) -> None:
        self.home = Home(root)
        self.home.create_folders()
        self.home.config_file.write_text(format_settings(model, settings), encoding="utf-8")

    def take_measurements(self, other: "DemoDaemon") -> None:
        """Take over what another daemon has measured of the same model."""
        copy_measured(other.home.state_folder, self.home.state_folder)

    @property
    def command_line(self) -> list[str]:
        """The daemon's command line; -P: no modules of the current folder are used."""
        program = [sys.executable, "-P", "-m", "kedit_daemon"]
        return [*program, "--home", str(self.home.root), "run"]

    @contextmanager
    def run_process(self) -> Iterator[None]:
        """Run the daemon within the block, and stop it by SIGTERM after it."""
        environ = os.environ | {"HF_HUB_OFFLINE": "1"}
        with (self.home.root / "daemon.log").open("wb") as log:
            process = subprocess.Popen(self.command_line, stderr=log, stdout=log, env=environ)
            try:
                self._wait_for_socket(process)
                yield
            finally:
                process.terminate()
                process.wait()

    def _wait_for_socket(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.home.socket_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = (self.home.root / "daemon.log").read_text(errors="replace")[-2000:]
                raise KeditError(f"the daemon did not start: {tail}", code="demo")
            time.sleep(0.1)

    def send_command(self, name: str, **arguments: Any) -> dict[str, Any]:
        return control.send_request(self.home.socket_file, name, arguments)

    def ask_prompts(self, prompts: list[str]) -> list[str]:
        asked = ({"prompt": prompt, "max_tokens": ASK_TOKENS} for prompt in prompts)
        return [str(self.send_command("ask", **one)["answer"]) for one in asked]

    def drop_facts(self, facts: Sequence[Fact]) -> float:
        """Put the facts into the inbox as one file; return the seconds until all are live."""
        lines = "".join(f"{format_native(fact)}\n" for fact in facts)
        began = time.monotonic()
        (self.home.inbox_folder / "facts.jsonl").write_text(lines, encoding="utf-8")
        self.wait_until_live(len(facts))
        return time.monotonic() - began

    def wait_until_live(self, count: int) -> None:
        """Wait until `count` facts are live, in either tier."""
        deadline = time.monotonic() + EDIT_SECONDS
        while sum(self.count_states().get(s, 0) for s in LIVE_STATES) < count:
            if time.monotonic() > deadline:
                raise KeditError(f"the facts are not live: {self.count_states()}", code="demo")
            time.sleep(0.05)

    def read_weights_hash(self) -> str:
        """Read the sha256 of the edited weights, as the newest generation has it."""
        with closing(queries.open_readonly(self.home.database_file)) as connection:
            return str(queries.fetch_generations(connection, 1)[0]["weights_hash"])

    def count_states(self) -> Mapping[str, int]:
        with closing(queries.open_readonly(self.home.database_file)) as connection:
            states: Mapping[str, int] = fetch_overview(connection)["states"]
        return states
