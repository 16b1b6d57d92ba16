"""The names of attributes: those of OpenTelemetry's semantic conventions, and this service's own.

They are written out instead of imported. The package `opentelemetry-semantic-conventions` keeps those below in
modules that it calls incubating and moves at will, and marks the GenAI ones deprecated since they have a repository
of their own (https://github.com/open-telemetry/semantic-conventions-genai). A test holds each name against the
installed package where that knows it.

The names under `unisono.` are flat: by the conventions a name must not be another one's namespace.
"""

from __future__ import annotations

from typing import Final

# -- Calls (rpc), hosts, errors ----------------------------------------------------------------------------------

# The conventions for rpc have settled on `rpc.system.name` and the full name in `rpc.method`; `rpc.system` and
# `rpc.service` are deprecated.
RPC_SYSTEM_NAME: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
# The reason of core/errors.py.
ERROR_TYPE: Final = "error.type"

# -- Generative AI -----------------------------------------------------------------------------------------------

OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
OUTPUT_TYPE: Final = "gen_ai.output.type"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_STOP_SEQUENCES: Final = "gen_ai.request.stop_sequences"
REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
EMBEDDINGS_DIMENSION_COUNT: Final = "gen_ai.embeddings.dimension.count"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
# Seconds.
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
# Only where content capture is on.
SYSTEM_INSTRUCTIONS: Final = "gen_ai.system_instructions"
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"

# Values of OPERATION_NAME.
CHAT: Final = "chat"
TEXT_COMPLETION: Final = "text_completion"
EMBEDDINGS: Final = "embeddings"

# -- This service's own ------------------------------------------------------------------------------------------

BATCH_ID: Final = "unisono.batch_id"
STATE: Final = "unisono.state"
ITEMS: Final = "unisono.items"
ITEMS_COMPLETED: Final = "unisono.items_completed"
ITEMS_FAILED: Final = "unisono.items_failed"
ITEMS_CANCELLED: Final = "unisono.items_cancelled"
ITEMS_EXPIRED: Final = "unisono.items_expired"
# Items, waves and plans that have no span, since there were too many.
ITEMS_LEFT_OUT: Final = "unisono.items_left_out"
WAVES_LEFT_OUT: Final = "unisono.waves_left_out"
PLANS_LEFT_OUT: Final = "unisono.plans_left_out"
RETRIES: Final = "unisono.retries"

GROUP: Final = "unisono.group"
GROUPS: Final = "unisono.groups"
BACKEND: Final = "unisono.backend"
DIGEST: Final = "unisono.digest"
# Followed by the name of the runner's option.
RUNNER_PREFIX: Final = "unisono.runner."
IS_LOADED: Final = "unisono.is_loaded"
SLOTS: Final = "unisono.slots"
SLOT_SOURCE: Final = "unisono.slot_source"
WAVES: Final = "unisono.waves"
LOADS: Final = "unisono.loads"

PASSES: Final = "unisono.passes"
PASSES_METHOD: Final = "unisono.pass_method"
PASSES_CONFIDENCE: Final = "unisono.pass_confidence"
PASSES_IMPUTED_SHARE: Final = "unisono.pass_imputed_share"
FEWEST_PASSES: Final = "unisono.fewest_passes"
PASSES_ITEMS_MEAN: Final = "unisono.items_per_pass"

WAVE: Final = "unisono.wave"
# Requests of other batches in the same wave.
OTHERS: Final = "unisono.others"
# From the first to the last final byte.
SPREAD_S: Final = "unisono.spread_s"
WAS_LOADED: Final = "unisono.was_loaded"

ITEM_ID: Final = "unisono.item_id"
INDEX: Final = "unisono.index"
ATTEMPT: Final = "unisono.attempt"
ATTEMPTS: Final = "unisono.attempts"
AGAIN_IN_S: Final = "unisono.again_in_s"
SHARED_WITH: Final = "unisono.shared_with"
QUEUED_S: Final = "unisono.queued_s"
SLOT_WAIT_S: Final = "unisono.slot_wait_s"
# Only where content capture is on: a message can quote the backend, and the backend the prompt.
ERROR_MESSAGE: Final = "unisono.error_message"
