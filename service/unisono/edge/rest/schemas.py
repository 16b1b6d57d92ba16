"""What answers of the HTTP port look like, as JSON Schema: the components of its description."""

from __future__ import annotations

from typing import Any, Final

from unisono.edge.batchfile.line import FORMS

Schema = dict[str, Any]


def record(description: str, required: Schema, optional: Schema | None = None) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "description": description,
        "required": list(required),
        "properties": {**required, **(optional or {})},
        "additionalProperties": False,
    }


def ref(name: str) -> Schema:
    """A schema of this module."""
    return {"$ref": f"#/components/schemas/{name}"}


def a(kind: str, description: str = "", **more: object) -> Schema:
    """A value of a type of JSON."""
    return {"type": kind, **({"description": description} if description else {}), **more}


def maybe(schema: Schema) -> Schema:
    """That, or null."""
    kind = schema.get("type")
    return {**schema, "type": [kind, "null"]} if kind else {"oneOf": [schema, {"type": "null"}]}


def many(schema: Schema) -> Schema:
    """A list of these."""
    return {"type": "array", "items": schema}


TEXT: Final = a("string")
COUNT: Final = a("integer", minimum=0)
_MOMENT: Final = a("integer", "Seconds since 1970.")
_MAYBE_MOMENT: Final = maybe(_MOMENT)
_MAYBE_TEXT: Final = maybe(TEXT)
_METADATA: Final = a("object", "The caller's own words.", additionalProperties=TEXT)
_DURATION: Final = a("integer", "Nanoseconds.", minimum=0)
_SPAN_WORDS: Final = "A span of time: text with units (500ms, 1h30m), or a number of seconds."
_SPAN: Final = {"description": _SPAN_WORDS, "type": ["string", "number"]}


def _page(of: str) -> Schema:
    return record(
        "A page of a list.",
        {
            "object": {"const": "list"},
            "data": many(ref(of)),
            "first_id": _MAYBE_TEXT,
            "last_id": {**_MAYBE_TEXT, "description": "What to ask `after` for the next page."},
            "has_more": a("boolean"),
        },
    )


_ERRORS: Final[Schema] = {
    "OpenAIError": record(
        "An error as OpenAI writes it.",
        {
            "error": record(
                "What is wrong.",
                {
                    "message": TEXT,
                    "type": a(
                        "string",
                        enum=[
                            "invalid_request_error",
                            "authentication_error",
                            "permission_error",
                            "rate_limit_error",
                            "server_error",
                        ],
                    ),
                    "param": {**_MAYBE_TEXT, "description": "The place in the request."},
                    "code": {**_MAYBE_TEXT, "description": "A name for what is wrong."},
                },
            )
        },
    ),
    "OllamaError": record("An error as Ollama writes it.", {"error": TEXT}),
}

_FILES: Final[Schema] = {
    "File": record(
        "A file.",
        {
            "id": TEXT,
            "object": {"const": "file"},
            "bytes": COUNT,
            "created_at": _MOMENT,
            "expires_at": _MAYBE_MOMENT,
            "filename": TEXT,
            "purpose": a("string", enum=["batch", "batch_output"]),
            "status": {"const": "processed"},
            "status_details": {"type": "null"},
        },
    ),
    "FilePage": _page("File"),
    "DeletedFile": record(
        "A file that is gone.", {"id": TEXT, "object": {"const": "file"}, "deleted": {"const": True}}
    ),
}

_BATCHES: Final[Schema] = {
    "NewBatch": record(
        "A batch that is to be made of a file.",
        {
            "input_file_id": TEXT,
            "endpoint": a("string", enum=list(FORMS)),
            "completion_window": a("string", "24h, or another span of time up to 30d."),
        },
        {
            "metadata": {**_METADATA, "type": ["object", "null"], "maxProperties": 16},
            "output_expires_after": maybe(
                record(
                    "How long its files are kept.",
                    {
                        "anchor": {"const": "created_at"},
                        "seconds": a("integer", minimum=3_600, maximum=2_592_000),
                    },
                )
            ),
        },
    ),
    "Batch": record(
        "A batch. What came by gRPC has no file, no endpoint and no window.",
        {
            "id": TEXT,
            "object": {"const": "batch"},
            "endpoint": _MAYBE_TEXT,
            "errors": maybe(ref("BatchErrors")),
            "input_file_id": _MAYBE_TEXT,
            "completion_window": _MAYBE_TEXT,
            "model": _MAYBE_TEXT,
            "status": a(
                "string",
                enum=[
                    "validating",
                    "failed",
                    "in_progress",
                    "finalizing",
                    "completed",
                    "expired",
                    "cancelling",
                    "cancelled",
                ],
            ),
            "output_file_id": _MAYBE_TEXT,
            "error_file_id": _MAYBE_TEXT,
            "created_at": _MOMENT,
            "in_progress_at": _MAYBE_MOMENT,
            "expires_at": _MAYBE_MOMENT,
            "finalizing_at": _MAYBE_MOMENT,
            "completed_at": _MAYBE_MOMENT,
            "failed_at": _MAYBE_MOMENT,
            "expired_at": _MAYBE_MOMENT,
            "cancelling_at": _MAYBE_MOMENT,
            "cancelled_at": _MAYBE_MOMENT,
            "request_counts": record("Items.", {"total": COUNT, "completed": COUNT, "failed": COUNT}),
            "usage": record(
                "Tokens so far.",
                {
                    "input_tokens": COUNT,
                    "input_tokens_details": record("Of these.", {"cached_tokens": COUNT}),
                    "output_tokens": COUNT,
                    "output_tokens_details": record("Of these.", {"reasoning_tokens": COUNT}),
                    "total_tokens": COUNT,
                },
            ),
            "metadata": maybe(_METADATA),
        },
    ),
    "BatchErrors": record(
        "Why a file is no batch.",
        {
            "object": {"const": "list"},
            "data": many(
                record(
                    "One thing.",
                    {
                        "code": TEXT,
                        "message": TEXT,
                        "param": _MAYBE_TEXT,
                        "line": maybe(a("integer", "From 1.", minimum=1)),
                    },
                )
            ),
        },
    ),
    "BatchPage": _page("Batch"),
    "ResultLine": record(
        "A result as a line of an output file, with its number in the batch's journal and how the item ended.",
        {
            "id": TEXT,
            "custom_id": TEXT,
            "response": maybe(
                record(
                    "What the item was answered: a body of its endpoint, or an error.",
                    {"status_code": a("integer"), "request_id": TEXT, "body": a("object")},
                )
            ),
            "error": maybe(
                record(
                    "Why it was never run.",
                    {"code": a("string", enum=["batch_expired", "batch_cancelled"]), "message": TEXT},
                )
            ),
            "sequence": a("integer", minimum=1),
            "state": a("string", enum=["completed", "failed", "cancelled", "expired"]),
        },
    ),
    "ResultPage": record(
        "Results so far, in the order in which they came.",
        {
            "object": {"const": "list"},
            "data": many(ref("ResultLine")),
            "has_more": a("boolean"),
            "last_sequence": a("integer", "What to ask `after` for the next page.", minimum=0),
        },
    ),
    "Retry": record(
        "Another try.",
        {},
        {"request_id": maybe(a("string", "Sent again under the same one, it is the same batch."))},
    ),
}


def _ollama_batch(path: str) -> Schema:
    return record(
        f"Requests of {path}, side by side.",
        {
            "requests": {
                "type": "array",
                "minItems": 1,
                "items": a("object", f"A body of {path}, not streamed; `id` names it in the answer."),
            }
        },
        {
            "model": a("string", "For requests that name none."),
            "options": a("object", "Beneath the requests' own."),
            "keep_alive": {**_SPAN, "description": f"How long the model stays. {_SPAN_WORDS}"},
            "max_batch_size": a("integer", "So many at the backend at one time, at most.", minimum=1),
            "batch_timeout": {
                **_SPAN,
                "description": "How long requests may wait for company: none does, as all are there. " + _SPAN_WORDS,
            },
            "stream": a("boolean", "A line for each answer as it is there, and one for the whole."),
        },
    )


_ANSWER_END: Final[Schema] = {
    "logprobs": many(a("object")),
    "total_duration": _DURATION,
    "load_duration": _DURATION,
    "prompt_eval_count": COUNT,
    "prompt_eval_duration": _DURATION,
    "eval_count": COUNT,
    "eval_duration": _DURATION,
}
_ANSWER: Final[Schema] = {
    "index": a("integer", "The request's place, from 0.", minimum=0),
    "model": TEXT,
    "created_at": a("string", format="date-time"),
    "done": {"const": True},
    "done_reason": TEXT,
}


def _batch_answer(answer: str) -> Schema:
    return record(
        "All answers, in the order of their requests.",
        {
            "batch_id": TEXT,
            "processed_at": a("string", format="date-time"),
            "stats": ref("BatchStats"),
            "responses": many({"oneOf": [ref(answer), ref("FailedAnswer")]}),
        },
    )


_OLLAMA: Final[Schema] = {
    "ChatBatch": _ollama_batch("/api/chat"),
    "GenerateBatch": _ollama_batch("/api/generate"),
    "ChatAnswer": record(
        "An answer of /api/chat.",
        {
            **_ANSWER,
            "message": record(
                "What the model said.",
                {"role": {"const": "assistant"}, "content": TEXT},
                {"thinking": TEXT, "tool_calls": many(a("object"))},
            ),
        },
        {"id": TEXT, **_ANSWER_END},
    ),
    "GenerateAnswer": record(
        "An answer of /api/generate.",
        {**_ANSWER, "response": TEXT},
        {"id": TEXT, "thinking": TEXT, "tool_calls": many(a("object")), **_ANSWER_END},
    ),
    "FailedAnswer": record(
        "A request without an answer.",
        {
            "index": a("integer", "The request's place, from 0.", minimum=0),
            "error": TEXT,
            "reason": a("string", "The service's own name for it: MODEL_NOT_FOUND."),
        },
        {"id": TEXT},
    ),
    "ChatBatchAnswer": _batch_answer("ChatAnswer"),
    "GenerateBatchAnswer": _batch_answer("GenerateAnswer"),
    "BatchEnd": record(
        "The whole, behind the last answer.",
        {"batch_id": TEXT, "processed_at": a("string", format="date-time"), "stats": ref("BatchStats")},
    ),
    "BatchStats": record(
        "Figures of the batch: measured, or absent.",
        {"batch_size": COUNT, "processing_time": _DURATION},
        {
            "memory_efficiency": a(
                "number", "The largest share of the reserved context that was in use at one time.", minimum=0
            ),
            "throughput_gain": a("number", "How long one at a time ÷ how long it took.", minimum=0),
        },
    ),
    "BatchStatus": record(
        "How batches are.",
        {
            "batch_enabled": a("boolean", "Whether requests of single callers are gathered."),
            "max_batch_size": maybe(
                a("integer", "So many go at one time; null: as many as the runner has slots.", minimum=1)
            ),
            "batch_timeout": a("string", "They go after so long at the latest: 10ms."),
            "pending_batches": a("integer", "Batches of every kind that have not ended.", minimum=0),
            "processed_batches": a("integer", "That have ended since the service was started.", minimum=0),
        },
    ),
}

_STANDING: Final[Schema] = {
    "Health": record("It lives.", {"status": {"const": "ok"}}),
    "Readiness": record("It takes work.", {"status": {"const": "ready"}}),
}

SCHEMAS: Final[Schema] = {**_ERRORS, **_FILES, **_BATCHES, **_OLLAMA, **_STANDING}
