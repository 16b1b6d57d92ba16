/**
 * Reads batch files: JSON lines, each of which becomes an item of a batch.
 *
 * Three forms of line are read, and each field that is not known is refused by its name:
 *
 *     {"id": …, "prompt": …, "options": {…}}
 *     {"id": …, "messages": [{"role": …, "content": …}], "options": {…}}
 *     {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": …, "max_tokens": …}}
 */
import { Item } from "../../gen/unisono/v1/item.js";
import { itemOf } from "./body.js";
import { Fields, Problem } from "./fields.js";

/** Longer lines cannot become an item that the service takes. */
export const MAX_LINE_BYTES = 16 * 1024 * 1024;
const MAX_ID_BYTES = 256;
const NEWLINE = 0x0a;

/** A line that is no item. The lines after it can still be read. */
export class LineError extends Error {
  constructor(
    /** The line's number, from 1. */
    readonly line: number,
    /** What is wrong, beginning with the field's path. */
    readonly problem: string,
  ) {
    super(`line ${line}: ${problem}`);
  }
}

/** Gives what the lines of each piece of a file become, as soon as the piece is there. */
export async function* readBatch(source: AsyncIterable<Buffer>): AsyncGenerator<(Item | LineError)[], void> {
  const lines = new Lines();
  for await (const piece of source) {
    yield [...lines.add(piece)];
  }
  yield [...lines.end()];
}

/** Puts lines together, and makes items of them. */
class Lines {
  private number = 0;
  /** The line that has not ended yet; no more of it is kept than may be long. */
  private pieces: Buffer[] = [];
  private size = 0;
  /** The line of each id that was given. */
  private readonly lineOf = new Map<string, number>();
  // Bytes that are no text are refused, and not replaced.
  private readonly decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

  *add(piece: Buffer): Generator<Item | LineError> {
    let start = 0;
    for (let end = piece.indexOf(NEWLINE); end >= 0; end = piece.indexOf(NEWLINE, start)) {
      this.keep(piece.subarray(start, end));
      yield* this.finish();
      start = end + 1;
    }
    this.keep(piece.subarray(start));
  }

  *end(): Generator<Item | LineError> {
    if (this.size > 0) {
      yield* this.finish();
    }
  }

  private keep(part: Buffer): void {
    this.size += part.length;
    if (this.size <= MAX_LINE_BYTES) {
      this.pieces.push(part);
    } else {
      this.pieces = [];
    }
  }

  /** What the line becomes; nothing where it is empty. */
  private *finish(): Generator<Item | LineError> {
    this.number++;
    const [line, size] = [Buffer.concat(this.pieces), this.size];
    [this.pieces, this.size] = [[], 0];
    try {
      if (size > MAX_LINE_BYTES) {
        throw new Problem(`is longer than ${MAX_LINE_BYTES} bytes`);
      }
      const text = this.decode(line);
      if (text.trim() !== "") {
        yield this.itemOf(text);
      }
    } catch (error) {
      if (!(error instanceof Problem)) {
        throw error;
      }
      yield new LineError(this.number, error.message);
    }
  }

  private decode(line: Buffer): string {
    try {
      return this.decoder.decode(line);
    } catch {
      throw new Problem("is not UTF-8");
    }
  }

  private itemOf(text: string): Item {
    const fields = Fields.parse(text);
    const id = this.takeId(fields);
    const item = itemOf(fields);
    fields.end();
    item.itemId = id;
    // Only ids of items that are sent are taken: a line that was refused keeps no other from using its id.
    this.lineOf.set(id, this.number);
    return item;
  }

  /** The line's id, or the one that its number makes. */
  private takeId(fields: Fields): string {
    const names = ["id", "item_id", "custom_id"].filter((name) => fields.has(name));
    if (names[1] !== undefined) {
      fields.refuse(names[1], "says again what another id says");
    }
    const id = names[0] === undefined ? `line-${this.number}` : idOf(fields, names[0]);
    const former = this.lineOf.get(id);
    if (former !== undefined) {
      fields.refuse("", `${JSON.stringify(id)} is the id of line ${former} already`);
    }
    return id;
  }
}

/** Takes a text, or a whole number as its digits. */
function idOf(fields: Fields, name: string): string {
  const written = fields.take(name) ?? '""';
  if (/^-?\d{1,19}$/.test(written)) {
    return written;
  }
  const id: unknown = JSON.parse(written);
  if (typeof id !== "string") {
    return fields.refuse(name, "must be text");
  }
  if (id === "") {
    fields.refuse(name, "is empty; leave it out to have the line's number for an id");
  }
  if (Buffer.byteLength(id) > MAX_ID_BYTES) {
    fields.refuse(name, `is longer than ${MAX_ID_BYTES} bytes`);
  }
  if (/\p{Cc}/u.test(id)) {
    fields.refuse(name, "must not hold control characters");
  }
  return id;
}
