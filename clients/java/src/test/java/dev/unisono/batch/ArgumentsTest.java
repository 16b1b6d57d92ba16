package dev.unisono.batch;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class ArgumentsTest {
  @Test
  void theCommandThatGoesOnIsReadBack() throws Exception {
    Arguments first = Arguments.parse(List.of("--target=host:1", "--model", "m", "it's a file"));
    assertEquals(
        "unisono-batch --target host:1 --resume b1 --after 7 'it'\\''s a file'", first.resumeCommand("b1", 7));
    Arguments again =
        Arguments.parse(List.of("--target", "host:1", "--resume", "b1", "--after", "7", "it's a file"));
    assertEquals(new Arguments("host:1", true, "", "b1", 7, "it's a file"), again);
  }

  @ParameterizedTest
  @ValueSource(strings = {"", "a b", "--nosuch -", "--model", "--after 5 -", "--resume b --after -1 -", "-x"})
  void whatIsWrongIsTold(String words) {
    List<String> list = words.isEmpty() ? List.of() : List.of(words.split(" "));
    assertThrows(Arguments.UsageException.class, () -> Arguments.parse(list));
  }
}
