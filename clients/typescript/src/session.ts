import { once } from "node:events";
import { type ClientDuplexStream, Metadata, type ServiceError, status } from "@grpc/grpc-js";

import {
  type BatchInferenceClient,
  BatchConfig,
  type GetServerInfoResponse,
  OnDisconnect,
  StreamBatchOpen,
  type StreamBatchRequest,
  type StreamBatchResponse,
  ValidationMode,
} from "../gen/unisono/v1/batch_inference.js";
import { type BatchEvent, BatchState, type Progress } from "../gen/unisono/v1/event.js";
import { type Item } from "../gen/unisono/v1/item.js";
import { LineError } from "./batchfile/lines.js";
import { type Failure, failureOf, failureOfCall, type Line, lineOf, messageOf, tell, write } from "./output.js";

/**
 * Items of one message. A message holds what was read at once, a piece of the file and the line before it, so its
 * bytes need no limit of their own.
 */
const MAX_ITEMS = 100;
const PROGRESS_EVERY_MS = 2_000;
const CANCEL_TIMEOUT_MS = 10_000;

/** A status with a reason of the service's: trying again changes nothing. */
export class RefusedError extends Error {
  constructor(failure: Failure) {
    super(`${failure.reason}: ${failure.message}`);
  }
}

/** There is nothing to open a batch for. */
export class NoItemsError extends Error {
  constructor() {
    super("holds no items");
  }
}

/** What the session needs to know of the arguments. */
export interface SessionOptions {
  model: string;
  /** The batch to go on with, or empty for a new one. */
  resume: string;
  /** Events up to this one are known. */
  after: bigint;
  /** Where lines come from, for messages. */
  file: string;
}

/** Something that happens once, and can be waited for. */
class Once<T> {
  happen!: (value: T) => void;
  hasHappened = false;
  readonly happened = new Promise<T>((resolve) => {
    this.happen = (value) => {
      this.hasHappened = true;
      resolve(value);
    };
  });
}

/**
 * One StreamBatch call.
 *
 * Two things go on side by side. The writer, which alone sends, reads lines, sends them as far as the credit goes, and
 * half-closes when there are no more; afterwards it waits to cancel. The reader, which is `run` itself, writes results
 * as they come, and ends when the stream ends.
 */
export class Session {
  batchId = "";
  /** The last event that was taken whole: a batch that is resumed goes on after it. */
  sequence: bigint;

  private stream!: ClientDuplexStream<StreamBatchRequest, StreamBatchResponse>;
  /** Items that were read before there was a stream. */
  private ahead: Item[] = [];
  private readonly interrupted = new Once<void>();
  private readonly accepted = new Once<void>();
  /** Wakes the writer, which looks whether the credit, or what was sent, has changed. */
  private wake = (): void => {};

  /** Parts of the result that comes next. */
  private parts = "";
  /** How the batch ended, once that was heard. */
  private end: BatchState | undefined;
  /** Items that may be sent in all, and those that were, refused ones not counted. */
  private credit = 0;
  private sent = 0;
  /** The most items that a batch may have, as far as that was asked and answered. */
  private maxItems = Infinity;
  private hasAsked = false;
  /** Lines that were written, by state. */
  private readonly count: Record<string, number> = {};
  private unreadable = 0;
  private progress: Progress | undefined;

  constructor(
    private readonly client: BatchInferenceClient,
    private readonly metadata: Metadata,
    private readonly options: SessionOptions,
    private readonly lines: AsyncGenerator<(Item | LineError)[], void>,
    private readonly out: NodeJS.WritableStream,
  ) {
    this.sequence = options.after;
    if (options.resume !== "") {
      this.accept(options.resume);
    }
  }

  get wasInterrupted(): boolean {
    return this.interrupted.hasHappened;
  }

  /** Cancels the batch; `run` goes on to its end. */
  interrupt(): void {
    this.interrupted.happen();
    this.wake();
  }

  /** Returns after the batch's end; throws a NoItemsError, a RefusedError, or what ended the connection. */
  async run(): Promise<void> {
    if (this.options.resume === "") {
      await Promise.race([this.lookAhead(), this.interrupted.happened]);
      if (this.wasInterrupted) {
        return;
      }
      if (this.ahead.length === 0) {
        throw new NoItemsError();
      }
    }
    this.stream = this.client.streamBatch(this.metadata);
    // The reader hears it by itself; an event without any listener would end the program.
    this.stream.on("error", () => {});
    const telling = setInterval(() => this.tellProgress(), PROGRESS_EVERY_MS);
    // Where sending fails the stream has ended, and the reader hears why.
    void this.write().catch((error: Error) => this.stream.destroy(error));
    try {
      for await (const message of this.stream) {
        await this.hear(message as StreamBatchResponse);
      }
    } catch (error) {
      throw refusalOf(error) ?? error;
    } finally {
      clearInterval(telling);
      this.stream.cancel();
    }
    if (this.end === undefined) {
      throw new Error("the stream ended before the batch");
    }
    if (this.end !== BatchState.BATCH_STATE_COMPLETED && !this.wasInterrupted) {
      // Somebody else cancelled it, say; there may be lines that it never took.
      tell(`unisono-batch: the batch ended before its time: ${BatchState[this.end]?.replace("BATCH_STATE_", "")}`);
    }
  }

  // -- Out -----------------------------------------------------------------------------------------------------------

  private async write(): Promise<void> {
    await this.send({ $case: "open", value: StreamBatchOpen.create({ batch: this.opening() }) });
    await this.writeItems();
    if (this.wasInterrupted) {
      await this.send({ $case: "cancelItems", value: { itemIds: [] } });
      this.stream.end();
      return;
    }
    this.stream.end(); // it also releases what was added
    // Nothing more can be said on the stream, so that the batch is cancelled by its name.
    await this.interrupted.happened;
    await this.accepted.happened;
    const request = { batchId: this.batchId, itemIds: [] };
    const options = { deadline: Date.now() + CANCEL_TIMEOUT_MS };
    this.client.cancelBatch(request, new Metadata(), options, (error) => {
      if (error !== null) {
        tell(`unisono-batch: cancelling: ${error.details}`);
      }
    });
  }

  private opening(): StreamBatchOpen["batch"] {
    if (this.options.resume !== "") {
      const reopen = { batchId: this.options.resume, afterSequence: this.options.after, deltas: undefined };
      return { $case: "reopen", value: reopen };
    }
    const config = BatchConfig.create({
      model: this.options.model,
      // A malformed item costs itself, and not those that happen to be in the same message.
      validation: ValidationMode.VALIDATION_MODE_PER_ITEM,
      // So that there is something to resume.
      onDisconnect: OnDisconnect.ON_DISCONNECT_DETACH,
    });
    return { $case: "config", value: config };
  }

  /** Reads up to the first items, or to the end. */
  private async lookAhead(): Promise<void> {
    for (let items = await this.read(); items !== undefined; items = await this.read()) {
      if (items.length > 0) {
        this.ahead = items;
        return;
      }
    }
  }

  /** Returns after the last item, or when interrupted. */
  private async writeItems(): Promise<void> {
    let items: Item[] | undefined | void = this.ahead;
    for (;;) {
      if (!items) {
        return;
      }
      while (items.length > 0) {
        const room = await this.waitForCredit();
        if (room === 0) {
          return;
        }
        const chunk = items.splice(0, Math.min(room, MAX_ITEMS));
        this.sent += chunk.length;
        await this.send({ $case: "addItems", value: { items: chunk } });
      }
      items = await Promise.race([this.read(), this.interrupted.happened]);
    }
  }

  /** The items of the next piece of the file, undefined at its end; what cannot be read is told and counted. */
  private async read(): Promise<Item[] | undefined> {
    const items: Item[] = [];
    try {
      const { value, done } = await this.lines.next();
      if (done === true) {
        return undefined;
      }
      for (const each of value) {
        if (each instanceof LineError) {
          this.tellUnreadable(each);
        } else {
          items.push(each);
        }
      }
      return items;
    } catch (error) {
      this.tellUnreadable(error); // the file itself, which cannot be read any further
      return undefined;
    }
  }

  /**
   * Returns how many more items may be sent; 0 when interrupted.
   *
   * Items that wait for nothing but a release cannot use up the credit for good: without another word they are released
   * when they have waited for 50 ms, and items that end bring new credit. Only a batch that is as large as a batch may
   * be gets no more, and the service refuses the rest, each with its reason. How large that is, the service is asked:
   * that all items have ended cannot be seen here where some did so before the batch was resumed.
   */
  private async waitForCredit(): Promise<number> {
    while (!this.wasInterrupted) {
      if (this.sent < this.credit) {
        return this.credit - this.sent;
      }
      if (this.credit >= this.maxItems) {
        return MAX_ITEMS;
      }
      if (this.sent > 0) {
        this.askMaxItems();
      }
      await new Promise<void>((resolve) => {
        this.wake = resolve;
      });
    }
    return 0;
  }

  /** Asks for the most items that a batch may have, once; the writer is woken by the answer. */
  private askMaxItems(): void {
    if (this.hasAsked) {
      return;
    }
    this.hasAsked = true;
    this.client.getServerInfo({}, (error, info?: GetServerInfoResponse) => {
      if (error !== null && !this.stream.destroyed) {
        tell(`unisono-batch: asking for the service's limits: ${error.details}`);
      }
      this.maxItems = info?.limits?.maxItems || Infinity;
      this.wake();
    });
  }

  private async send(message: StreamBatchRequest["message"]): Promise<void> {
    if (!this.stream.write({ message })) {
      await once(this.stream, "drain");
    }
  }

  // -- In ------------------------------------------------------------------------------------------------------------

  private accept(batchId: string): void {
    this.batchId = batchId;
    tell(`batch ${batchId}`);
    this.accepted.happen();
  }

  /** Takes a message. It fails where the output cannot be written. */
  private async hear({ message }: StreamBatchResponse): Promise<void> {
    switch (message?.$case) {
      case "credit":
        this.credit = Math.max(this.credit, Number(message.value.totalItems));
        break;
      case "itemsAcknowledged":
        for (const { itemId, refusal } of message.value.items) {
          if (refusal !== undefined) {
            this.sent--;
            await this.put({ id: itemId, state: "REFUSED", error: failureOf(refusal) });
          }
        }
        break;
      case "event":
        await this.hearEvent(message.value);
        break;
    }
    this.wake();
  }

  private async hearEvent({ event, sequence }: BatchEvent): Promise<void> {
    switch (event?.$case) {
      case "accepted":
        if (this.batchId === "") {
          this.accept(event.value.batchId);
        }
        break;
      case "resultPart":
        this.parts += event.value.content;
        return; // its sequence counts when the result is whole
      case "result":
        await this.put(lineOf(event.value, this.parts));
        this.parts = "";
        break;
      case "progress":
        this.progress = event.value;
        break;
      case "summary":
        this.end = event.value.state;
        break;
    }
    this.sequence = sequence ?? this.sequence;
  }

  private async put(line: Line): Promise<void> {
    await write(this.out, line);
    this.count[line.state] = this.counted(line.state) + 1;
  }

  // -- What is told --------------------------------------------------------------------------------------------------

  private tellUnreadable(error: unknown): void {
    tell(`${this.options.file}: ${messageOf(error)}`);
    this.unreadable++;
  }

  private tellProgress(): void {
    const { inFlight = 0, queued = 0 } = this.progress ?? {};
    tell(`progress: ${this.tally}; ${inFlight} running, ${queued} waiting`);
  }

  get tally(): string {
    const states = ["completed", "failed", "cancelled", "expired", "refused"];
    const counts = states.map((state) => `${this.counted(state.toUpperCase())} ${state}`);
    return [...counts, `${this.unreadable} unreadable`].join(", ");
  }

  get hasAllCompleted(): boolean {
    const isWhole = this.end === BatchState.BATCH_STATE_COMPLETED && this.unreadable === 0;
    return isWhole && Object.keys(this.count).every((state) => state === "COMPLETED");
  }

  private counted(state: string): number {
    return this.count[state] ?? 0;
  }
}

/** The service's own refusal, where it is one. */
function refusalOf(error: unknown): RefusedError | undefined {
  if (!(error instanceof Error && "code" in error && "details" in error)) {
    return undefined;
  }
  const failure = failureOfCall(error as ServiceError);
  return failure.reason === "" || failure.code === status.UNAVAILABLE ? undefined : new RefusedError(failure);
}
