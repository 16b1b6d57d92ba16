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
HTTP_REQUEST_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
# The reason of core/errors.py.
ERROR_TYPE: Final = "error.type"

# -- Generative AI -----------------------------------------------------------------------------------------------
# On the spans of calls, and on no other: who reads such spans takes each for a call, and adds up what they used.

OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
OUTPUT_TYPE: Final = "gen_ai.output.type"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_STREAM: Final = "gen_ai.request.stream"
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
# Of all items together. Each item's own are `gen_ai.usage.…`.
PROMPT_TOKENS: Final = "unisono.prompt_tokens"
CACHED_PROMPT_TOKENS: Final = "unisono.cached_prompt_tokens"
COMPLETION_TOKENS: Final = "unisono.completion_tokens"

GROUP: Final = "unisono.group"
GROUPS: Final = "unisono.groups"
BACKEND: Final = "unisono.backend"
MODEL: Final = "unisono.model"
DIGEST: Final = "unisono.digest"
# Followed by the name of the runner's option.
RUNNER_PREFIX: Final = "unisono.runner."
IS_LOADED: Final = "unisono.is_loaded"
SLOTS: Final = "unisono.slots"
SLOT_SOURCE: Final = "unisono.slot_source"
# So many items held a slot at one time; so many of ours may now; and where there is only one, why, and what to do.
SLOTS_AT_LEAST: Final = "unisono.slots_at_least"
SLOTS_LIMIT: Final = "unisono.slots_limit"
SLOTS_REASON: Final = "unisono.slots_reason"
SLOTS_REMEDY: Final = "unisono.slots_remedy"
# Why the context is as large as it is.
CONTEXT_REASON: Final = "unisono.context_reason"
# What a runner takes in memory: derived from the model's shape, and as the backend says.
MEMORY_ESTIMATE_BYTES: Final = "unisono.memory_estimate_bytes"
MEMORY_MEASURED_BYTES: Final = "unisono.memory_measured_bytes"
# Groups of items whose prompts begin alike, and the items of the largest; in a report at most 100 are listed.
FAMILIES: Final = "unisono.families"
LARGEST_FAMILY: Final = "unisono.largest_family"
WAVES: Final = "unisono.waves"
LOADS: Final = "unisono.loads"

PASSES: Final = "unisono.passes"
PASSES_METHOD: Final = "unisono.pass_method"
PASSES_CONFIDENCE: Final = "unisono.pass_confidence"
PASSES_IMPUTED_SHARE: Final = "unisono.pass_imputed_share"
FEWEST_PASSES: Final = "unisono.fewest_passes"
PASSES_ITEMS_MEAN: Final = "unisono.items_per_pass"

# From a group's first release to its last end; how long its items would have taken one at a time; the quotient.
DURATION_S: Final = "unisono.duration_s"
ONE_AT_A_TIME_S: Final = "unisono.one_at_a_time_s"
GAIN: Final = "unisono.gain"
# Slots × seconds that were not used: the first, the reason's name, the last.
IDLE_PREFIX: Final = "unisono.idle_"
IDLE_SUFFIX: Final = "_s"
# What things cost on the runner, in seconds, and on how many passes that rests.
PASSES_COST_S: Final = "unisono.pass_cost_s"
TOKENS_COST_S: Final = "unisono.token_cost_s"
PROMPT_TOKENS_COST_S: Final = "unisono.prompt_token_cost_s"
SINGLE_STREAM_TOKENS_COST_S: Final = "unisono.single_stream_token_cost_s"
PASSES_MEASURED: Final = "unisono.passes_measured"
# Of all the context of all slots, the largest share that was used at one time.
CONTEXT_USED: Final = "unisono.context_used"
RUNNER_DEATHS: Final = "unisono.runner_deaths"

WAVE: Final = "unisono.wave"
# Why the item was the next to go, and the lane that it was meant for.
RELEASE_REASON: Final = "unisono.release_reason"
LANE: Final = "unisono.lane"
# Requests of other batches in the same wave.
OTHERS: Final = "unisono.others"
# Where there are such: whether this span is the one that the items of those batches link to.
STANDS_FOR_WAVE: Final = "unisono.stands_for_wave"
# From the first to the last final byte.
SPREAD_S: Final = "unisono.spread_s"
WAS_LOADED: Final = "unisono.was_loaded"

ITEM_ID: Final = "unisono.item_id"
INDEX: Final = "unisono.index"
ATTEMPT: Final = "unisono.attempt"
ATTEMPTS: Final = "unisono.attempts"
AGAIN_IN_S: Final = "unisono.again_in_s"
# Times that it was broken off because another item ended the runner; and how such an attempt ended. No error.type:
# the item has made no error.
DISTURBED: Final = "unisono.disturbed"
BROKEN_OFF_BY: Final = "unisono.broken_off_by"
# Items that went in one request; that request is part of the first one's trace.
BUNDLE_SIZE: Final = "unisono.bundle_size"
SHARED_WITH: Final = "unisono.shared_with"
# From its staging (all but the last byte of its request) to its release.
HELD_S: Final = "unisono.held_s"
# From the batch's acceptance to its release; and from there until it had a slot.
QUEUED_S: Final = "unisono.queued_s"
SLOT_WAIT_S: Final = "unisono.slot_wait_s"
# Only where content capture is on: a message can quote the backend, and the backend the prompt.
ERROR_MESSAGE: Final = "unisono.error_message"
