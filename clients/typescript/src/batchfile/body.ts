import {
  ChatRequest,
  GenerateRequest,
  Item,
  Message,
  Options,
  ResponseFormat,
  Role,
  RunnerOptions,
} from "../../gen/unisono/v1/item.js";
import { type Fields } from "./fields.js";

const ROLES: ReadonlyMap<string, Role> = new Map([
  ["system", Role.ROLE_SYSTEM],
  ["developer", Role.ROLE_SYSTEM], // OpenAI's newer name for it
  ["user", Role.ROLE_USER],
  ["assistant", Role.ROLE_ASSISTANT],
]);

/** The field that each OpenAI address asks with. */
const FIELD_OF: ReadonlyMap<string, string> = new Map([
  ["/v1/chat/completions", "messages"],
  ["/v1/completions", "prompt"],
]);

/** Reads a line in either form, its id left out. */
export function itemOf(fields: Fields): Item {
  if (!fields.has("body") && !fields.has("url") && !fields.has("method")) {
    return bodyOf(fields, true);
  }
  if (fields.has("method") && fields.text("method") !== "POST") {
    fields.refuse("method", "must be POST");
  }
  const asked = FIELD_OF.get(fields.text("url"));
  if (asked === undefined) {
    fields.refuse("url", "must be /v1/chat/completions or /v1/completions");
  }
  const body = fields.child("body");
  if (!body.has(asked)) {
    body.refuse(asked, "is missing");
  }
  const item = bodyOf(body, false);
  body.end();
  return item;
}

/** Reads what is asked. A plain line may have its system prompt beside the messages. */
function bodyOf(fields: Fields, isPlain: boolean): Item {
  const item = Item.create({ model: fields.text("model") });
  if (fields.has("messages") && fields.has("prompt")) {
    fields.refuse("prompt", "stands beside messages; a line is one of them");
  } else if (fields.has("messages")) {
    const messages = messagesOf(fields);
    if (isPlain && fields.has("system")) {
      messages.unshift(Message.create({ role: Role.ROLE_SYSTEM, content: fields.text("system") }));
    }
    item.request = { $case: "chat", value: ChatRequest.create({ messages, format: formatOf(fields) }) };
  } else if (fields.has("prompt")) {
    const prompt = fields.text("prompt");
    if (prompt === "") {
      fields.refuse("prompt", "is empty");
    }
    const generate = { prompt, system: fields.text("system"), raw: fields.flag("raw"), format: formatOf(fields) };
    item.request = { $case: "generate", value: GenerateRequest.create(generate) };
  } else {
    fields.refuse("", "has neither messages nor a prompt");
  }
  item.options = optionsOf(fields);
  return item;
}

function messagesOf(fields: Fields): Message[] {
  const list = fields.children("messages");
  if (list.length === 0) {
    fields.refuse("messages", "must hold at least one message");
  }
  return list.map((each) => {
    const role = ROLES.get(each.text("role"));
    if (role === undefined) {
      each.refuse("role", "must be system, developer, user or assistant");
    }
    if (!each.has("content")) {
      each.refuse("content", "is missing");
    }
    const message = Message.create({ role, content: each.text("content") });
    each.end();
    return message;
  });
}

// -- How the answer must be shaped -----------------------------------------------------------------------------------

/** Ollama's `format` or OpenAI's `response_format`; undefined for free text. */
function formatOf(fields: Fields): ResponseFormat | undefined {
  if (fields.has("format") && fields.has("response_format")) {
    fields.refuse("response_format", "says again what format says");
  }
  if (fields.has("format")) {
    return schemaOf(fields, "format");
  }
  const format = fields.child("response_format");
  const kind = format.text("type");
  let found: ResponseFormat | undefined;
  switch (kind) {
    case "":
    case "text":
      break;
    case "json_object":
      found = { kind: { $case: "json", value: true } };
      break;
    case "json_schema":
      // Beside the schema stand a name, a description and `strict`, which change nothing here.
      found = schemaOf(format.child("json_schema"), "schema");
      break;
    default:
      format.refuse("type", `must be text, json_object or json_schema, not ${JSON.stringify(kind)}`);
  }
  format.end();
  return found;
}

function schemaOf(fields: Fields, name: string): ResponseFormat {
  const schema = fields.take(name);
  if (schema === '"json"') {
    return { kind: { $case: "json", value: true } };
  }
  if (!schema?.startsWith("{")) {
    fields.refuse(name, "must be a JSON schema");
  }
  return { kind: { $case: "jsonSchema", value: schema } };
}

// -- Options ---------------------------------------------------------------------------------------------------------

type Kind = "int32" | "uint32" | "int64" | "float" | "bool" | "texts";

// The contract's options and their types: what it has and these lists have not does not compile.
const OF_ANSWER = {
  numKeep: "int32",
  seed: "int64",
  numPredict: "int32",
  topK: "int32",
  topP: "float",
  minP: "float",
  typicalP: "float",
  repeatLastN: "int32",
  temperature: "float",
  repeatPenalty: "float",
  presencePenalty: "float",
  frequencyPenalty: "float",
  stop: "texts",
} as const satisfies Record<Exclude<keyof Options, "runner" | "extraOptionsJson">, Kind>;
const OF_RUNNER = {
  numCtx: "uint32",
  numBatch: "uint32",
  numGpu: "int32",
  mainGpu: "int32",
  useMmap: "bool",
  numThread: "uint32",
  draftNumPredict: "uint32",
} as const satisfies Record<keyof RunnerOptions, Kind>;

/** Options that OpenAI writes beside the messages, and what the contract calls them. */
const OF_OPENAI: readonly (readonly [theirs: string, ours: keyof typeof OF_ANSWER])[] = [
  ["max_tokens", "numPredict"],
  ["max_completion_tokens", "numPredict"],
  ["temperature", "temperature"],
  ["top_p", "topP"],
  ["seed", "seed"],
  ["stop", "stop"],
  ["presence_penalty", "presencePenalty"],
  ["frequency_penalty", "frequencyPenalty"],
];

/** Ollama's `options`, and OpenAI's beside it; undefined where nothing is said. */
function optionsOf(fields: Fields): Options | undefined {
  const inner = fields.child("options");
  const ofAnswer = taken(inner, OF_ANSWER);
  const ofRunner = taken(inner, OF_RUNNER);
  inner.end();
  for (const [theirs, ours] of OF_OPENAI) {
    if (!fields.has(theirs)) {
      continue;
    }
    if (ours in ofAnswer) {
      fields.refuse(theirs, "says again what is said elsewhere; write one of them");
    }
    ofAnswer[ours] = valueOf(fields, theirs, OF_ANSWER[ours]);
  }
  const runner = Object.keys(ofRunner).length > 0 ? RunnerOptions.create(ofRunner) : undefined;
  if (runner === undefined && Object.keys(ofAnswer).length === 0) {
    return undefined;
  }
  return Options.create({ ...ofAnswer, runner });
}

/** Takes those options that are there, by the names that Ollama writes: num_ctx for numCtx. */
function taken(fields: Fields, kinds: Readonly<Record<string, Kind>>): Record<string, unknown> {
  const found: Record<string, unknown> = {};
  for (const [name, kind] of Object.entries(kinds)) {
    const theirs = name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
    if (fields.has(theirs)) {
      found[name] = valueOf(fields, theirs, kind);
    }
  }
  return found;
}

function valueOf(fields: Fields, name: string, kind: Kind): unknown {
  const text = fields.take(name) ?? "null";
  const value: unknown = JSON.parse(text);
  const isIn = (least: number, most: number) =>
    typeof value === "number" && Number.isInteger(value) && least <= value && value <= most;
  switch (kind) {
    case "int32":
      if (isIn(-(2 ** 31), 2 ** 31 - 1)) return value;
      break;
    case "uint32":
      if (isIn(0, 2 ** 32 - 1)) return value;
      break;
    case "int64":
      // From its digits: a number has fewer.
      if (/^-?\d{1,19}$/.test(text) && BigInt.asIntN(64, BigInt(text)) === BigInt(text)) return BigInt(text);
      break;
    case "float":
      if (typeof value === "number" && Number.isFinite(Math.fround(value))) return value;
      break;
    case "bool":
      if (typeof value === "boolean") return value;
      break;
    case "texts": {
      const texts: unknown[] = Array.isArray(value) ? value : [value];
      if (texts.every((each) => typeof each === "string")) return texts;
      break;
    }
  }
  return fields.refuse(name, `cannot be ${text.slice(0, 100)}`);
}
