package dev.unisono.batchfile;

import dev.unisono.v1.Item;
import java.io.BufferedInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.StandardCharsets;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;

/**
 * Gives the items of a batch file: JSON lines, each of which becomes an item.
 *
 * <p>Three forms of line are read, and each field that is not known is refused by its name:
 *
 * <pre>
 * {"id": …, "prompt": …, "options": {…}}
 * {"id": …, "messages": [{"role": …, "content": …}], "options": {…}}
 * {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": …, "max_tokens": …}}
 * </pre>
 */
public final class BatchReader {
  /** Longer lines cannot become an item that the service takes. */
  static final int MAX_LINE_BYTES = 16 << 20;

  private static final int MAX_ID_BYTES = 256;
  private static final int BUFFER_BYTES = 64 << 10;

  private final InputStream source;
  private int number;
  /** The line of each id that was given. */
  private final Map<String, Integer> lineOf = new HashMap<>();

  /** Reads no further than it has to. */
  public BatchReader(InputStream source) {
    this.source = new BufferedInputStream(source, BUFFER_BYTES);
  }

  /**
   * Returns the next item; nothing at the end.
   *
   * @throws LineException where a line is none; the next ones can still be read
   * @throws IOException where the file itself cannot be read any further
   */
  public Optional<Item> next() throws IOException, LineException {
    while (true) {
      ByteArrayOutputStream line = new ByteArrayOutputStream();
      long length = readLine(line);
      if (length < 0) {
        return Optional.empty();
      }
      number++;
      if (length > MAX_LINE_BYTES) {
        throw new LineException(number, "is longer than " + MAX_LINE_BYTES + " bytes");
      }
      String text = textOf(line);
      if (!text.isBlank()) {
        return Optional.of(readItem(text));
      }
    }
  }

  /** Reads a line, of which no more is kept than may be long; its length, or -1 at the end. */
  private long readLine(ByteArrayOutputStream line) throws IOException {
    long length = 0;
    for (int c = source.read(); c >= 0; c = source.read()) {
      if (c == '\n') {
        return length;
      }
      if (++length <= MAX_LINE_BYTES) {
        line.write(c);
      }
    }
    return length > 0 ? length : -1;
  }

  private String textOf(ByteArrayOutputStream line) throws LineException {
    try {
      return StandardCharsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(line.toByteArray())).toString();
    } catch (CharacterCodingException e) {
      throw new LineException(number, "is not UTF-8");
    }
  }

  private Item readItem(String line) throws LineException {
    Fields f = Fields.parse(line);
    String id = takeId(f);
    Item.Builder item = Body.itemOf(f);
    f.end();
    if (f.problem() != null) {
      throw new LineException(number, f.problem());
    }
    // Only ids of items that are sent are taken: a line that was refused keeps no other from using its id.
    lineOf.put(id, number);
    return item.setItemId(id).build();
  }

  /** Returns the line's id, or the one that its number makes. */
  private String takeId(Fields f) {
    String id = "";
    for (String name : List.of("id", "item_id", "custom_id")) {
      if (!f.has(name)) {
        continue;
      }
      if (!id.isEmpty()) {
        f.refuse(name, "says again what another id says");
      }
      id = f.textOrNumber(name);
      checkId(f, name, id);
    }
    if (id.isEmpty()) {
      id = "line-" + number;
    }
    if (lineOf.containsKey(id)) {
      f.refuse("", "\"" + id + "\" is the id of line " + lineOf.get(id) + " already");
    }
    return id;
  }

  private static void checkId(Fields f, String name, String id) {
    if (id.isEmpty()) {
      f.refuse(name, "is empty; leave it out to have the line's number for an id");
    } else if (id.getBytes(StandardCharsets.UTF_8).length > MAX_ID_BYTES) {
      f.refuse(name, "is longer than " + MAX_ID_BYTES + " bytes");
    } else if (id.chars().anyMatch(Character::isISOControl)) {
      f.refuse(name, "must not hold control characters");
    }
  }
}
