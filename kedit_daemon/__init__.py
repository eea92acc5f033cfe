"""The daemon: process, configuration, command line, inbox, schedule."""
