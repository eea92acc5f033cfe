"""Entry point of `python -m kedit_daemon`."""

from kedit_daemon.cli.main import main

main()
