#!/usr/bin/env node
/**
 * Runs a file of requests as one batch, and writes each result as a line of JSON when it is there.
 *
 *     unisono-batch [--target HOST:PORT] [--model NAME] [--resume BATCH_ID [--after SEQUENCE]] FILE|-
 */
import { type FileHandle, open } from "node:fs/promises";
import { parseArgs } from "node:util";
import { credentials } from "@grpc/grpc-js";

import { BatchInferenceClient } from "../gen/unisono/v1/batch_inference.js";
import { readBatch } from "./batchfile/lines.js";
import { messageOf, OutputError, tell } from "./output.js";
import { NoItemsError, RefusedError, Session, type SessionOptions } from "./session.js";
import { BatchTrace } from "./trace.js";

const USAGE = "usage: unisono-batch [--target HOST:PORT] [--model NAME] [--resume BATCH_ID [--after SEQUENCE]] FILE|-";
const DEFAULT_TARGET = "127.0.0.1:50051";
const MAX_SEQUENCE = 2n ** 64n - 1n;
/** What is read of a file at once. */
const PIECE_BYTES = 64 * 1024;

const ExitCode = {
  allCompleted: 0,
  someFailed: 1, // or were refused, or could not be read
  wrongUsage: 2,
  lost: 3, // no service, or none any more
  interrupted: 130,
} as const;

// A service whose machine vanished is noticed in half a minute; it permits a ping every ten seconds.
const CHANNEL_OPTIONS = { "grpc.keepalive_time_ms": 20_000, "grpc.keepalive_timeout_ms": 10_000 };

interface Options extends SessionOptions {
  target: string;
  /** Whether the target was given as an argument, and so must be given again. */
  hasTarget: boolean;
}

class UsageError extends Error {}

/** What the arguments say; undefined where they ask for help. */
function parseArguments(argv: string[]): Options | undefined {
  const { values, positionals } = parseArgs({
    args: argv,
    allowPositionals: true,
    options: {
      target: { type: "string" },
      model: { type: "string", default: "" },
      resume: { type: "string", default: "" },
      after: { type: "string", default: "0" },
      help: { type: "boolean", short: "h" },
    },
  });
  if (values.help === true) {
    return undefined;
  }
  const [file] = positionals;
  if (file === undefined || positionals.length > 1) {
    throw new UsageError("one FILE is needed, or - for standard input");
  }
  if (!/^\d{1,20}$/.test(values.after) || BigInt(values.after) > MAX_SEQUENCE) {
    throw new UsageError("--after must be a sequence number");
  }
  const after = BigInt(values.after);
  if (after > 0n && values.resume === "") {
    throw new UsageError("--after needs --resume");
  }
  const { model, resume } = values;
  const target = values.target ?? (process.env["UNISONO_TARGET"] || DEFAULT_TARGET);
  return { target, hasTarget: values.target !== undefined, model, resume, after, file };
}

/** The command that goes on after a sequence, as a shell takes it. */
function resumeCommand(options: Options, batchId: string, after: bigint): string {
  const target = options.hasTarget ? ["--target", options.target] : [];
  const words = ["unisono-batch", ...target, "--resume", batchId, "--after", String(after), options.file];
  return words.map((word) => (/^[\w./:=@%+,-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`)).join(" ");
}

/** Does it all, and returns the exit code. */
async function run(options: Options): Promise<number> {
  let file: FileHandle | undefined;
  let client: BatchInferenceClient;
  try {
    file = options.file === "-" ? undefined : await open(options.file);
    // For TLS: credentials.createSsl().
    client = new BatchInferenceClient(options.target, credentials.createInsecure(), CHANNEL_OPTIONS);
  } catch (error) {
    throw new UsageError(messageOf(error));
  }
  const trace = await BatchTrace.start();
  tell(`trace ${trace.id}`);

  const source = file?.createReadStream({ highWaterMark: PIECE_BYTES }) ?? process.stdin;
  // The session hears it by itself; an event without any listener would end the program.
  process.stdout.on("error", () => {});
  const session = new Session(client, trace.metadata, options, readBatch(source), process.stdout);
  process.on("SIGINT", () => {
    if (session.wasInterrupted) {
      process.exit(ExitCode.interrupted);
    }
    tell("cancelling the batch; once more ends at once");
    session.interrupt();
  });
  const error: unknown = await session.run().then(
    () => undefined,
    (reason: unknown) => reason,
  );
  const code = conclude(options, session, error);
  await trace.end(session.batchId, error);
  return code;
}

/** Says how it went, and gives the exit code. */
function conclude(options: Options, session: Session, error: unknown): number {
  let code: number = session.hasAllCompleted ? ExitCode.allCompleted : ExitCode.someFailed;
  if (error instanceof NoItemsError) {
    tell(`unisono-batch: ${options.file} ${error.message}`);
    return ExitCode.wrongUsage;
  } else if (error instanceof RefusedError) {
    tell(`unisono-batch: the service refused: ${error.message}`);
    code = ExitCode.someFailed;
  } else if (error !== undefined && session.batchId === "") {
    tell(`unisono-batch: no service at ${options.target}: ${messageOf(error)}`);
    return ExitCode.lost;
  } else if (error !== undefined) {
    const command = resumeCommand(options, session.batchId, session.sequence);
    const what = error instanceof OutputError ? "results cannot be written" : "the connection was lost";
    tell(`unisono-batch: ${what}: ${messageOf(error)}\nTo go on where it ended:\n  ${command}`);
    code = ExitCode.lost;
  }
  tell(session.tally);
  return session.wasInterrupted ? ExitCode.interrupted : code;
}

async function main(): Promise<number> {
  try {
    const options = parseArguments(process.argv.slice(2));
    if (options === undefined) {
      process.stdout.write(`${USAGE}\n`);
      return ExitCode.allCompleted;
    }
    return await run(options);
  } catch (error) {
    // parseArgs has errors of its own for what it does not know.
    if (!(error instanceof UsageError || (error instanceof TypeError && "code" in error))) {
      throw error;
    }
    tell(`unisono-batch: ${error.message}\n${USAGE}`);
    return ExitCode.wrongUsage;
  }
}

const code = await main();
// What may still be open (standard input, the channel) holds up nothing; what was written comes first.
process.stdout.write("", () => process.exit(code));
