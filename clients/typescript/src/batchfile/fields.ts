/** Escapes of a JSON text that are no half of a pair of surrogates, as far as they could be taken for one. */
const WHOLE_ESCAPE = /\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}|\\[^u]/gi;
const HALF_ESCAPE = /\\ud[89a-f]/i;

/** Why a line is no item: what is wrong, after the field's path. */
export class Problem extends Error {}

/**
 * The fields of one JSON object. Each is taken by name and type; `end` refuses what nobody took, so a field that is not
 * known cannot be passed over in silence.
 *
 * Members are kept as they are written, which `JSON.parse` alone does not: a seed of 64 bits keeps its last digits, and
 * a schema the order of its keys.
 */
export class Fields {
  private readonly path: string;
  private readonly left = new Map<string, string>();

  /** Reads a JSON object and nothing after it. */
  static parse(text: string): Fields {
    try {
      JSON.parse(text);
    } catch (error) {
      throw new Problem(`not JSON: ${(error as Error).message}`);
    }
    // It would be sent as another character.
    if (HALF_ESCAPE.test(text) && HALF_ESCAPE.test(text.replace(WHOLE_ESCAPE, ""))) {
      throw new Problem("holds half of a surrogate pair, which is not Unicode text");
    }
    return new Fields("", text.trim());
  }

  private constructor(path: string, text: string) {
    this.path = path;
    if (!text.startsWith("{")) {
      this.refuse("", "must be a JSON object");
    }
    const parts = partsOf(text);
    for (let at = 0; at + 1 < parts.length; at += 2) {
      this.left.set(JSON.parse(parts[at]!) as string, parts[at + 1]!);
    }
    // null says nothing, so it is as good as absent.
    for (const [name, member] of this.left) {
      if (member === "null") {
        this.left.delete(name);
      }
    }
  }

  /** Ends the line; an empty name stands for the object itself. */
  refuse(name: string, problem: string): never {
    const path = this.at(name);
    throw new Problem(path === "" ? problem : `${path}: ${problem}`);
  }

  has(name: string): boolean {
    return this.left.has(name);
  }

  /** The names of what is left, in order. */
  get names(): string[] {
    return [...this.left.keys()].sort();
  }

  /** Takes a member out, as it is written. */
  take(name: string): string | undefined {
    const member = this.left.get(name);
    this.left.delete(name);
    return member;
  }

  /** Takes a text; empty where it is absent. */
  text(name: string): string {
    const value: unknown = JSON.parse(this.take(name) ?? '""');
    return typeof value === "string" ? value : this.refuse(name, "must be text");
  }

  /** Takes a truth value; false where it is absent. */
  flag(name: string): boolean {
    const value: unknown = JSON.parse(this.take(name) ?? "false");
    return typeof value === "boolean" ? value : this.refuse(name, "must be true or false");
  }

  /** Takes an object; one without members where it is absent. */
  child(name: string): Fields {
    return new Fields(this.at(name), this.take(name) ?? "{}");
  }

  /** Takes a list of objects; an empty one where it is absent. */
  children(name: string): Fields[] {
    const list = this.take(name) ?? "[]";
    if (!list.startsWith("[")) {
      this.refuse(name, "must be a list of objects");
    }
    return partsOf(list).map((member, number) => new Fields(`${this.at(name)}[${number}]`, member));
  }

  /** Refuses what is left: the first by name. */
  end(): void {
    for (const name of this.names) {
      this.refuse(name, "not known here");
    }
  }

  private at(name: string): string {
    return this.path === "" || name === "" ? this.path + name : `${this.path}.${name}`;
  }
}

/** The members of a list, or the names and values of an object in turn. The text must be known to be JSON. */
function partsOf(text: string): string[] {
  const parts: string[] = [];
  let depth = 0;
  let start = 1;
  const cut = (end: number) => {
    const part = text.slice(start, end).trim();
    if (part !== "") {
      parts.push(part); // it is empty only where there are no members
    }
    start = end + 1;
  };
  for (let at = 0; at < text.length; at++) {
    switch (text[at]) {
      case '"':
        at = closingQuote(text, at);
        break;
      case "{":
      case "[":
        depth++;
        break;
      case "}":
      case "]":
        depth--;
        if (depth === 0) {
          cut(at);
        }
        break;
      case ",":
      case ":":
        if (depth === 1) {
          cut(at);
        }
        break;
    }
  }
  return parts;
}

function closingQuote(text: string, opening: number): number {
  for (let at = text.indexOf('"', opening + 1); ; at = text.indexOf('"', at + 1)) {
    let backslashes = 0;
    while (text[at - 1 - backslashes] === "\\") {
      backslashes++;
    }
    if (backslashes % 2 === 0) {
      return at;
    }
  }
}
