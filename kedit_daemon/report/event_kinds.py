"""The kinds of events in the log, with their meanings: for filters, completion and help.

A test compares this list with the code that writes the events.
"""

from memory.facts import FactState

EVENT_KINDS = {
    "fact_received": "a fact was accepted, and waits",
    "fact_revived": "a fact that had ended was submitted again",
    "fact_duplicate": "a fact was submitted that is known already",
    "fact_amended": "a known fact was submitted with other terms, which hold from now on",
    "id_shared": "two facts that have not ended have the same id of yours",
    f"fact_{FactState.SCHEDULED}": "it waits for its valid_from",
    f"fact_{FactState.LIVE_SIDE}": "the side memory answers with it",
    f"fact_{FactState.LIVE_WEIGHTS}": "the weights answer with it",
    f"fact_{FactState.SUPERSEDED}": "a later fact replaced it",
    f"fact_{FactState.REVERTED}": "it was taken out, by hand or by an audit",
    f"fact_{FactState.EXPIRED}": "its validity ended",
    f"fact_{FactState.REJECTED}": "it was refused",
    f"fact_{FactState.FAILED}": "the model could not be edited to state it",
    "chat_probed": "a live fact was not answered in a chat, or was learned again for that",
    "edit_failed": "an attempt at a fact failed; it may be tried again",
    "quarantined": "it was found to harm the weights",
    "sent_beside": "it waits for the side memory instead of a batch",
    "weights_full": "the weights are at capacity, so it waits for the side memory",
    "file_taken": "a file from the inbox was processed",
    "file_refused": "a file in the inbox could not be read",
    "record_failed": "a record of a file states no fact",
    "flush_refused": "facts were not moved into the weights",
    "flush_too_large": "a batch was too large for the weights, and was made smaller",
    "generation_switched": "another generation of the weights is served",
    "generation_rebuilt": "weights were solved again from the stored facts",
    "published": "a generation was exported, and servers were notified",
    "publish_failed": "publishing failed; it is tried again",
    "mended": "a damaged file was rebuilt",
    "audit": "the health of the weights was measured",
    "retention": "old facts were asked again",
    "paused": "no work is accepted",
    "resumed": "work is accepted again",
    "clock_jump": "the clock was changed",
    "daemon_started": "the daemon started",
    "daemon_stopped": "the daemon stopped",
}
