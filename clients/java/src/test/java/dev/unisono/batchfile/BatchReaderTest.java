package dev.unisono.batchfile;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import com.google.protobuf.TextFormat;
import dev.unisono.v1.Item;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Optional;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.MethodSource;

class BatchReaderTest {
  private static final Path EXAMPLE = Path.of("../../service/unisono/examples/batch.jsonl");

  private static BatchReader reading(String text) {
    return new BatchReader(new ByteArrayInputStream(text.getBytes(StandardCharsets.UTF_8)));
  }

  static Stream<Arguments> forms() {
    return Stream.of(
        Arguments.of(
            """
            {"id": "a", "prompt": "Hi", "raw": true, "options": {"num_predict": 5, "temperature": 0, "seed": -1}}""",
            """
            item_id: "a" generate { prompt: "Hi" raw: true } options { num_predict: 5 temperature: 0 seed: -1 }"""),
        Arguments.of(
            """
            {"messages": [{"role": "user", "content": "Hi"}], "system": "Be kind", "model": "m", \
            "options": {"num_ctx": 64}}""",
            """
            item_id: "line-1" model: "m" options { runner { num_ctx: 64 } }
            chat { messages { role: ROLE_SYSTEM content: "Be kind" } messages { role: ROLE_USER content: "Hi" } }"""),
        Arguments.of(
            """
            {"id": 7, "prompt": "Hi", "format": {"type": "object", "maximum": 1.0}, "options": {"stop": "x"}}""",
            """
            item_id: "7" options { stop: "x" }
            generate { prompt: "Hi" format { json_schema: '{"type":"object","maximum":1.0}' } }"""),
        Arguments.of(
            """
            {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": { \
            "messages": [{"role": "developer", "content": ""}], "max_tokens": 4, "stop": ["x", "y"], "seed": null, \
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}}""",
            """
            item_id: "b" options { num_predict: 4 stop: "x" stop: "y" }
            chat { messages { role: ROLE_SYSTEM } format { json_schema: "{}" } }"""),
        Arguments.of(
            """
            {"url": "/v1/completions", "body": {"prompt": "Hi", "max_completion_tokens": 4}}""",
            """
            item_id: "line-1" generate { prompt: "Hi" } options { num_predict: 4 }"""));
  }

  @ParameterizedTest
  @MethodSource("forms")
  void eachFormBecomesItsItem(String line, String item) throws Exception {
    assertEquals(TextFormat.parse(item, Item.class), reading(line).next().orElseThrow());
  }

  /** A line, with ' for ", and what is said of it. */
  private static Arguments wrong(String line, String problem) {
    String name = line.length() > 100 ? "a long line" : line;
    return Arguments.of(name, line.replace('\'', '"'), problem);
  }

  static Stream<Arguments> wrongs() {
    return Stream.of(
        wrong("{'prompt'", "not JSON"),
        wrong("{'prompt': 'a'} {}", "something follows"),
        wrong("['prompt']", "must be a JSON object"),
        wrong("null", "must be a JSON object"),
        wrong("{}", "neither messages nor a prompt"),
        wrong("{'prompt': ''}", "prompt: is empty"),
        wrong("{'prompt': 5}", "prompt: must be text"),
        wrong("{'prompt': 'a', 'messages': [{}]}", "prompt: stands beside messages"),
        wrong("{'prompt': 'a', 'promt': 'b'}", "promt: not known here"),
        wrong("{'prompt': 'a', 'id': ''}", "id: is empty"),
        wrong("{'prompt': 'a', 'id': '\\n'}", "id: must not hold control characters"),
        wrong("{'prompt': 'a', 'id': true}", "id: must be text"),
        wrong("{'prompt': 'a', 'id': 'x', 'custom_id': 'y'}", "custom_id: says again"),
        wrong("{'messages': []}", "messages: must hold"),
        wrong("{'messages': [{'role': 'user', 'content': 'a'}, 1]}", "messages[1]: must be"),
        wrong("{'messages': [{'role': 'me', 'content': 'a'}]}", "messages[0].role: must be"),
        wrong("{'messages': [{'role': 'user'}]}", "messages[0].content: is missing"),
        wrong("{'prompt': 'a', 'options': {'num_predict': 1.5}}", "options.num_predict: cannot be 1.5"),
        wrong("{'prompt': 'a', 'options': {'num_predict': [1]}}", "options.num_predict: cannot be [1]"),
        wrong("{'prompt': 'a', 'options': {'stop': [1]}}", "options.stop: cannot be [1]"),
        wrong("{'prompt': 'a', 'options': {'nun_predict': 1}}", "options.nun_predict: not known"),
        wrong("{'prompt': 'a', 'options': {'seed': 1}, 'seed': 2}", "seed: says again"),
        wrong("{'url': '/v1/embeddings', 'body': {'input': 'a'}}", "url: must be"),
        wrong("{'url': '/v1/completions', 'method': 'GET', 'body': {'prompt': 'a'}}", "method: must be POST"),
        wrong("{'url': '/v1/completions', 'body': {'messages': []}}", "body.prompt: is missing"),
        wrong("{'url': '/v1/completions', 'body': {'prompt': 'a', 'n': 2}}", "body.n: not known here"),
        wrong("{'prompt': 'a', 'response_format': {'type': 'xml'}}", "response_format.type: must be"),
        wrong("{'prompt': 'a', 'response_format': {'type': 'json_schema'}}", "json_schema.schema: must be"),
        wrong("{'prompt': 'a', 'id': '" + "x".repeat(257) + "'}", "id: is longer than 256 bytes"),
        wrong("{'prompt': '" + "x".repeat(BatchReader.MAX_LINE_BYTES) + "'}\n{'prompt': 1}", "is longer than"));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("wrongs")
  void whatIsWrongIsNamed(String name, String line, String problem) {
    LineException wrong = assertThrows(LineException.class, reading(line)::next);
    assertTrue(wrong.problem().contains(problem), wrong.problem());
  }

  @Test
  void whatIsNearlyJsonIsRefused() {
    LineException wrong = assertThrows(LineException.class, reading("{'prompt': 'a'}")::next);
    assertTrue(wrong.problem().startsWith("not JSON"), wrong.problem());
  }

  @Test
  void whatIsNotUtf8IsRefused() {
    byte[] line = "{\"prompt\": \"é\"}".getBytes(StandardCharsets.ISO_8859_1);
    LineException wrong =
        assertThrows(LineException.class, new BatchReader(new ByteArrayInputStream(line))::next);
    assertEquals("is not UTF-8", wrong.problem());
  }

  @Test
  void aBadLineCostsOnlyItself() throws IOException {
    BatchReader lines =
        reading("{\"prompt\": \"a\"}\n\nbad\n{\"id\": \"line-1\", \"prompt\": \"b\"}\r\n{\"prompt\": \"c\"}");
    List<String> got = new ArrayList<>();
    for (boolean isMore = true; isMore; ) {
      try {
        Optional<Item> item = lines.next();
        isMore = item.isPresent();
        item.ifPresent(one -> got.add(one.getItemId()));
      } catch (LineException e) {
        got.add("line " + e.line() + " is wrong");
      }
    }
    assertEquals(List.of("line-1", "line 3 is wrong", "line 4 is wrong", "line-5"), got);
  }

  @Test
  void theExampleBatchIsRead() throws Exception {
    assumeTrue(Files.exists(EXAMPLE), "the project stands alone, without the service's example");
    int count = 0;
    try (InputStream source = Files.newInputStream(EXAMPLE)) {
      BatchReader lines = new BatchReader(source);
      while (lines.next().isPresent()) {
        count++;
      }
    }
    assertEquals(24, count);
  }
}
