"""Every kind of event that the log may hold, and what it says: for filters, completion and help.

The words stand where the events are written; a test keeps this list equal to them.
"""

from memory.facts import FactState

EVENT_KINDS = {
    "fact_received": "a fact was taken in, and waits",
    "fact_revived": "a fact that had ended was handed in again",
    "fact_duplicate": "a fact was handed in that is there already",
    f"fact_{FactState.LIVE_SIDE}": "the side memory answers with it",
    f"fact_{FactState.LIVE_WEIGHTS}": "the weights answer with it",
    f"fact_{FactState.SUPERSEDED}": "a later fact took its place",
    f"fact_{FactState.REVERTED}": "it was taken out, by hand or by an audit",
    f"fact_{FactState.EXPIRED}": "its time was over",
    f"fact_{FactState.REJECTED}": "it was refused",
    f"fact_{FactState.FAILED}": "the model could not be made to say it",
    "edit_failed": "an attempt at a fact failed; it may be tried again",
    "quarantined": "it was found to harm the weights",
    "sent_beside": "it waits for the side memory instead of a batch",
    "weights_full": "the weights bear no more, so it waits for the side memory",
    "file_taken": "a file from the inbox was taken in",
    "file_refused": "a file in the inbox could not be read",
    "record_failed": "a record of a file states no fact",
    "flush_refused": "facts were not moved into the weights",
    "flush_too_large": "a batch was too much for the weights, and was made smaller",
    "generation_switched": "other weights are served",
    "generation_rebuilt": "weights were solved again from the stored facts",
    "published": "a generation was exported, and servers were told",
    "publish_failed": "that went wrong; it is tried again",
    "mended": "what was damaged was made anew",
    "audit": "the health of the weights was measured",
    "retention": "old facts were asked again",
    "paused": "no work is taken on",
    "resumed": "work is taken on again",
    "clock_jump": "the clock was set",
    "daemon_started": "the daemon started",
    "daemon_stopped": "the daemon stopped",
}
