"""Keys of the `meta` table, which holds single values as text. Imports nothing: `status` reads it.

The strings are the format of the database: a new name here leaves them as they are.
"""

# Of the daemon that loaded its model last.
PID, STARTED_AT = "pid", "started_at"
MODEL, MODEL_HASH, DEVICE = "model", "model_hash", "device"
PAUSED = "paused"  # why no work is taken; "" or no row: it is

# Of the weights and the side memory.
BASE_HASH = "base_hash"  # sha256 of the unedited weights
ACTIVE_GENERATION = "active_generation"
INDEX_SHA256 = "index_sha256"  # which file holds the retrieval index
AMENDED = "amended"  # JSON, ids of facts that are to be learned again from other texts
FLUSH_HELD = "flush_held"  # why flushes wait for a person or for capacity
WEIGHTS_CAPACITY = "weights_capacity"  # facts that the weights are estimated to take
WEIGHTS_LIMIT = "weights_limit"  # the figure that reaches its limit there
WEIGHTS_TRIALS = "weights_trials"  # JSON, solves not published: [facts, figures] each, newest last

# Of audits and probes.
AUDIT_ACTS = "audit_acts"  # JSON, what audits did: [when, what] each, newest last
AUDIT_DISARMED = "audit_disarmed"  # set while the weights were not healthy since a consolidation
RETENTION_PROBES = "retention_probes"  # count of probes so far: it seeds the sample

# Of publishing.
PUBLISHED = "published"  # the generation that was published last, and the settings
PUBLISH_FAILED = "publish_failed"  # why the last attempt failed
