// The official Node client on our server; started by test_node.py, which says where that is.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const { REAL_URL, REAL_MODEL, ABLE_URL, ABLE_MODEL, KEY } = process.env;
const able = new OpenAI({ baseURL: ABLE_URL, apiKey: KEY, maxRetries: 0 });
const real = new OpenAI({ baseURL: REAL_URL, apiKey: KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "Find 7." }];
const asked = { model: ABLE_MODEL, messages };
const palette = { targets: { words: { at_most: 8 } }, candidates: 8 };
const far = { targets: { words: { at_most: 0.5 } }, candidates: 4 };
const find = {
  name: "find",
  parameters: { type: "object", properties: { number: { type: "integer" } } },
};

test("models", async () => {
  const found = [];
  for await (const model of real.models.list()) found.push(model.id);
  assert.deepEqual(found, [REAL_MODEL]);
});

test("a model's answer, with usage", async () => {
  const answer = await real.chat.completions.create({ model: REAL_MODEL, messages, seed: 5 });
  assert.equal(answer.choices[0].message.role, "assistant");
  assert.ok(answer.choices[0].message.content);
  const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
  assert.equal(total_tokens, prompt_tokens + completion_tokens);
  assert.equal(answer.palette, undefined);
});

test("a palette is a field like others, and so is its report", async () => {
  const answer = await able.chat.completions.create({ ...asked, palette });
  assert.equal(answer.palette.status, "met");
  assert.ok(answer.usage.completion_tokens_details.rejected_prediction_tokens > 0);
  assert.match(answer._request_id, /^req_/);
});

test("a stream adds up and ends with usage and the report", async () => {
  const whole = await able.chat.completions.create({ ...asked, palette, seed: 3 });
  const stream = await able.chat.completions.create({
    ...asked, palette, seed: 3, stream: true, stream_options: { include_usage: true },
  });
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(chunks.at(-2).choices[0].finish_reason, "stop");
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.deepEqual(chunks.at(-1).usage, whole.usage);
  assert.deepEqual(chunks.at(-1).palette.realised, whole.palette.realised);
});

test("its stream helper on a model", async () => {
  const asks = { model: REAL_MODEL, messages, seed: 5, palette: { targets: { words: "keep" } } };
  const whole = await real.chat.completions.create(asks);
  const found = await real.chat.completions.stream(asks).finalChatCompletion();
  assert.equal(found.choices[0].message.content, whole.choices[0].message.content);
});

test("two choices, log-probabilities, stop", async () => {
  const answer = await able.chat.completions.create({
    ...asked, palette, n: 2, seed: 3, logprobs: true, top_logprobs: 2, stop: ["lorem"],
  });
  assert.notEqual(answer.choices[0].message.content, answer.choices[1].message.content);
  for (const choice of answer.choices) {
    const text = choice.logprobs.content.map((entry) => entry.token).join("");
    assert.equal(text, choice.message.content);
    assert.ok(choice.logprobs.content.every((entry) => entry.top_logprobs.length === 2));
  }
});

test("a tool is called, streamed, and its result read", async () => {
  const called = [];
  const runner = able.chat.completions.runTools({
    ...asked, palette, stream: true,
    tools: [{
      type: "function",
      function: { ...find, parse: JSON.parse, function: ({ number }) => { called.push(number); return "found"; } },
    }],
  });
  assert.ok(await runner.finalContent());
  assert.deepEqual(called, [7]);
});

test("a schema", async () => {
  const schema = { type: "object", properties: { word: { type: "string" } } };
  const answer = await able.chat.completions.parse({
    ...asked, response_format: { type: "json_schema", json_schema: { name: "found", schema } },
  });
  assert.deepEqual(JSON.parse(answer.choices[0].message.content), { word: "Find 7." });
});

test("text completions", async () => {
  const answer = await able.completions.create({ model: ABLE_MODEL, prompt: ["a", "b"], n: 2 });
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2, 3]);
});

for (const stream of [false, true]) {
  for (const [status, kind, code, fields] of [
    [400, OpenAI.BadRequestError, "invalid_value", { temperature: 9 }],
    [404, OpenAI.NotFoundError, "model_not_found", { model: "gpt-9" }],
    [413, OpenAI.APIError, "body_too_large",
      { messages: [{ role: "user", content: "x".repeat(3_000_000) }] }],
    [422, OpenAI.UnprocessableEntityError, "palette_infeasible", { palette: far }],
  ]) {
    test(`error ${status}${stream ? ", stream" : ""}`, async () => {
      await assert.rejects(able.chat.completions.create({ ...asked, ...fields, stream }), (error) => {
        assert.ok(error instanceof kind);
        assert.deepEqual([error.status, error.code], [status, code]);
        assert.match(error.requestID, /^req_/);
        if (status === 422) assert.deepEqual(error.error.palette.certificate.direction, { words: -1 });
        return true;
      });
    });
  }
}

test("a wrong key", async () => {
  const client = new OpenAI({ baseURL: ABLE_URL, apiKey: "sk-wrong", maxRetries: 0 });
  await assert.rejects(client.models.list(), OpenAI.AuthenticationError);
});

// Of servers in states of their own.
const { BUSY_URL, STOPPING_URL, SLOW_URL } = process.env;
for (const [status, url, kind, code] of [
  [429, BUSY_URL, OpenAI.RateLimitError, "queue_full"],
  [503, STOPPING_URL, OpenAI.InternalServerError, "draining"],
  [504, SLOW_URL, OpenAI.InternalServerError, "request_timeout"],
]) {
  test(`error ${status}`, async () => {
    const client = new OpenAI({ baseURL: url, apiKey: KEY, maxRetries: 0 });
    await assert.rejects(client.chat.completions.create(asked), (error) => {
      assert.ok(error instanceof kind);
      assert.deepEqual([error.status, error.code], [status, code]);
      if (status !== 504) assert.ok(Number(error.headers.get("retry-after")) >= 1);
      return true;
    });
  });
}
