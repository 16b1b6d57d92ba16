import assert from "node:assert/strict";
import { createReadStream, existsSync } from "node:fs";
import { test } from "node:test";

import {
  ChatRequest,
  GenerateRequest,
  Item,
  Message,
  Options,
  Role,
  RunnerOptions,
} from "../gen/unisono/v1/item.js";
import { LineError, MAX_LINE_BYTES, readBatch } from "../src/batchfile/lines.js";

/** What lines become that are read in pieces. */
async function read(...pieces: (string | Buffer)[]): Promise<(Item | LineError)[]> {
  const all: (Item | LineError)[] = [];
  async function* source() {
    yield* pieces.map((piece) => Buffer.from(piece));
  }
  for await (const some of readBatch(source())) {
    all.push(...some);
  }
  return all;
}

function chat(messages: Message[], more: Partial<ChatRequest> = {}): Item["request"] {
  return { $case: "chat", value: ChatRequest.create({ messages, ...more }) };
}

function generate(more: Partial<GenerateRequest>): Item["request"] {
  return { $case: "generate", value: GenerateRequest.create({ prompt: "Hi", ...more }) };
}

const system = (content: string): Message => Message.create({ role: Role.ROLE_SYSTEM, content });
const user = (content: string): Message => Message.create({ role: Role.ROLE_USER, content });

const ITEMS: [line: string, item: Partial<Item>][] = [
  [
    '{"id": "a", "prompt": "Hi", "raw": true, "options": {"num_predict": 5, "temperature": 0, "seed": -1}}',
    {
      itemId: "a",
      request: generate({ raw: true }),
      options: Options.create({ numPredict: 5, temperature: 0, seed: -1n }),
    },
  ],
  [
    '{"messages": [{"role": "user", "content": "Hi"}], "system": "Be kind", "model": "m", "options": {"num_ctx": 64}}',
    {
      itemId: "line-1",
      model: "m",
      request: chat([system("Be kind"), user("Hi")]),
      options: Options.create({ runner: RunnerOptions.create({ numCtx: 64 }) }),
    },
  ],
  [
    // Keys keep their order, and the seed its last digits.
    '{"id": 7, "prompt": "Hi", "format": {"b": 1.0, "1": ["}"]}, "options": {"stop": "x", "seed": 9007199254740993}}',
    {
      itemId: "7",
      request: generate({ format: { kind: { $case: "jsonSchema", value: '{"b": 1.0, "1": ["}"]}' } } }),
      options: Options.create({ stop: ["x"], seed: 9007199254740993n }),
    },
  ],
  [
    '{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {' +
      '"messages": [{"role": "developer", "content": ""}], "max_tokens": 4, "stop": ["x", "y"], "seed": null,' +
      '"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}}',
    {
      itemId: "b",
      request: chat([system("")], { format: { kind: { $case: "jsonSchema", value: "{}" } } }),
      options: Options.create({ numPredict: 4, stop: ["x", "y"] }),
    },
  ],
  [
    '{"url": "/v1/completions", "body": {"prompt": "Hi", "max_completion_tokens": 4}}',
    { itemId: "line-1", request: generate({}), options: Options.create({ numPredict: 4 }) },
  ],
  [
    // Quotes, backslashes and braces in a text are no structure.
    String.raw`{"pr\u006fmpt": "Hi\\\"}, {\\", "id": "\\"}`,
    { itemId: "\\", request: generate({ prompt: 'Hi\\"}, {\\' }) },
  ],
];

for (const [line, item] of ITEMS) {
  test(`${line} becomes its item`, async () => {
    assert.deepEqual(await read(line), [Item.create(item)]);
  });
}

const PROBLEMS: [line: string | Buffer, problem: string][] = [
  ['{"prompt"', "not JSON"],
  ['{"prompt": "a"} {}', "not JSON"],
  ['["prompt"]', "must be a JSON object"],
  ["null", "must be a JSON object"],
  [Buffer.from('{"prompt": "\xff"}', "latin1"), "is not UTF-8"],
  ["{}", "has neither messages nor a prompt"],
  ['{"prompt": ""}', "prompt: is empty"],
  ['{"prompt": 5}', "prompt: must be text"],
  ['{"prompt": "a", "messages": [{}]}', "prompt: stands beside messages"],
  ['{"prompt": "a", "promt": "b"}', "promt: not known here"],
  ['{"prompt": "a", "id": ""}', "id: is empty"],
  ['{"prompt": "a", "id": "\\n"}', "id: must not hold control characters"],
  ['{"prompt": "a", "id": true}', "id: must be text"],
  ['{"prompt": "a", "id": "x", "custom_id": "y"}', "custom_id: says again"],
  ['{"messages": []}', "messages: must hold"],
  ['{"messages": {}}', "messages: must be a list"],
  ['{"messages": [{"role": "user", "content": "a"}, 1]}', "messages[1]: must be a JSON object"],
  ['{"messages": [{"role": "me", "content": "a"}]}', "messages[0].role: must be"],
  ['{"messages": [{"role": "user"}]}', "messages[0].content: is missing"],
  ['{"prompt": "a", "options": {"num_predict": 1.5}}', "options.num_predict: cannot be 1.5"],
  ['{"prompt": "a", "options": {"num_ctx": -1}}', "options.num_ctx: cannot be -1"],
  ['{"prompt": "a", "options": {"seed": 9223372036854775808}}', "options.seed: cannot be 9223372036854775808"],
  ['{"prompt": "a", "options": {"temperature": 1e39}}', "options.temperature: cannot be 1e39"],
  ['{"prompt": "a", "options": {"stop": [1]}}', "options.stop: cannot be [1]"],
  ['{"prompt": "a", "options": {"nun_predict": 1}}', "options.nun_predict: not known here"],
  ['{"prompt": "a", "options": {"seed": 1}, "seed": 2}', "seed: says again"],
  ['{"url": "/v1/embeddings", "body": {"input": "a"}}', "url: must be"],
  ['{"url": "/v1/completions", "method": "GET", "body": {"prompt": "a"}}', "method: must be POST"],
  ['{"url": "/v1/completions", "body": {"messages": []}}', "body.prompt: is missing"],
  ['{"url": "/v1/completions", "body": {"prompt": "a", "n": 2}}', "body.n: not known here"],
  ['{"prompt": "a", "response_format": {"type": "xml"}}', "response_format.type: must be"],
  ['{"prompt": "a", "response_format": {"type": "json_schema"}}', "response_format.json_schema.schema: must be"],
  [`{"prompt": "a", "id": "${"x".repeat(257)}"}`, "id: is longer than 256 bytes"],
  [`{"prompt": "${"x".repeat(MAX_LINE_BYTES)}"}`, "is longer than"],
];

for (const [line, problem] of PROBLEMS) {
  test(`${String(line).slice(0, 80)} is told: ${problem}`, async () => {
    const [error, ...more] = await read(line);
    assert.ok(error instanceof LineError && error.line === 1);
    assert.equal(error.problem.slice(0, problem.length), problem);
    assert.deepEqual(more, []);
  });
}

test("a bad line costs only itself, however the file is cut", async () => {
  const file = '{"prompt": "é"}\n\nbad\n{"id": "line-1", "prompt": "b"}\r\n{"prompt": "c"}';
  const one = await read(file);
  const named = one.map((each) => (each instanceof LineError ? each.message.slice(0, 7) : each.itemId));
  assert.deepEqual(named, ["line-1", "line 3:", "line 4:", "line-5"]);
  const bytes = [...Buffer.from(file)].map((byte) => Buffer.of(byte));
  assert.deepEqual(await read(...bytes), one);
});

const EXAMPLE = new URL("../../../../service/unisono/examples/batch.jsonl", import.meta.url);

test("the example batch is read", { skip: !existsSync(EXAMPLE) && "the client stands alone" }, async () => {
  let count = 0;
  for await (const some of readBatch(createReadStream(EXAMPLE))) {
    assert.ok(some.every((each) => !(each instanceof LineError)));
    count += some.length;
  }
  assert.equal(count, 24);
});
