import { type Metadata, type ServiceError } from "@grpc/grpc-js";

import { ErrorInfo } from "../gen/google/rpc/error_details.js";
import { Status } from "../gen/google/rpc/status.js";
import { ItemState, type Result } from "../gen/unisono/v1/event.js";

/** A result as it is written. */
export interface Line {
  id: string;
  /** The item's own id, for one of several answers. */
  variant_of?: string;
  state: string;
  content?: string;
  error?: Failure;
}

export interface Failure {
  /** For programs: one of the README's list. Empty where the status has none. */
  reason: string;
  code: number;
  message: string;
}

const ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo";

export function failureOf(status: Status): Failure {
  const info = status.details.find((detail) => detail.typeUrl === ERROR_INFO);
  const reason = info === undefined ? "" : ErrorInfo.decode(info.value).reason;
  return { reason, code: status.code, message: status.message };
}

/** How a call failed: the whole status travels beside gRPC's own, which has no details. */
export function failureOfCall(error: ServiceError): Failure {
  // Where the connection broke there is no such thing.
  const metadata: Metadata | undefined = error.metadata;
  const [bytes] = metadata?.get("grpc-status-details-bin") ?? [];
  const details = Buffer.isBuffer(bytes) ? Status.decode(bytes).details : [];
  return failureOf({ code: error.code, message: error.details, details });
}

/** A whole result: `parts` is the text that came before it in messages of its own. */
export function lineOf(result: Result, parts: string): Line {
  const line: Line = { id: result.itemId, state: (ItemState[result.state] ?? "UNKNOWN").replace("ITEM_STATE_", "") };
  if (result.variantOf !== "") {
    line.variant_of = result.variantOf;
  }
  switch (result.outcome?.$case) {
    case "completion":
      line.content = parts + result.outcome.value.content;
      break;
    case "error":
      line.error = failureOf(result.outcome.value);
      break;
  }
  return line;
}

/** What results go to has gone. */
export class OutputError extends Error {}

/** Writes one line, whole, so that who reads has each result at once; waits where nobody reads. */
export async function write(out: NodeJS.WritableStream, line: Line): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    out.write(`${JSON.stringify(line)}\n`, (error) => (error ? reject(new OutputError(error.message)) : resolve()));
  });
}

/** Says something that is no result. */
export function tell(text: string): void {
  process.stderr.write(`${text}\n`);
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
