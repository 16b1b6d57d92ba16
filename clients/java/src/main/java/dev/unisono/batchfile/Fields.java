package dev.unisono.batchfile;

import com.google.gson.Gson;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import com.google.gson.Strictness;
import com.google.gson.TypeAdapter;
import com.google.gson.stream.JsonReader;
import com.google.gson.stream.JsonToken;
import com.google.gson.stream.MalformedJsonException;
import java.io.EOFException;
import java.io.IOException;
import java.io.StringReader;
import java.util.ArrayList;
import java.util.List;
import java.util.SortedMap;
import java.util.SortedSet;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * The fields of one JSON object.
 *
 * <p>Each is taken by name and type; {@link #end} refuses what nobody took, so a field that is not known cannot be
 * passed over in silence. The first problem is kept, in all objects of a line together.
 */
final class Fields {
  private static final TypeAdapter<JsonElement> ANY = new Gson().getAdapter(JsonElement.class);

  /** Escapes of a JSON text that are no half of a pair of surrogates, as far as they could be taken for one. */
  private static final Pattern WHOLE_ESCAPE =
      Pattern.compile("\\\\u[dD][89abAB]\\p{XDigit}{2}\\\\u[dD][c-fC-F]\\p{XDigit}{2}|\\\\[^u]");

  private static final Pattern HALF_ESCAPE = Pattern.compile("\\\\u[dD][89a-fA-F]");

  /** Where Gson says that something is wrong. */
  private static final Pattern PLACE = Pattern.compile(" at line \\d+ column (\\d+)");

  private final String path;
  private final Problem problem;
  private final SortedMap<String, JsonElement> left = new TreeMap<>();

  /** The first problem of a line. */
  private static final class Problem {
    String text;
  }

  /** There is more on the line than one value. */
  private static final class FollowedException extends IOException {
    private static final long serialVersionUID = 1L;
  }

  private Fields(String path, Problem problem) {
    this.path = path;
    this.problem = problem;
  }

  /** Reads a JSON object and nothing after it; what is wrong is the problem. */
  static Fields parse(String text) {
    Fields fields = new Fields("", new Problem());
    try {
      // Before it is parsed: Gson takes such a text for no JSON at all.
      if (holdsHalfOfAPair(text)) {
        fields.refuse("", "holds half of a surrogate pair, which is not Unicode text");
      }
      fields.open("", parseValue(text));
    } catch (FollowedException e) {
      fields.refuse("", "not JSON: something follows the object");
    } catch (EOFException e) {
      fields.refuse("", "not JSON: it ends too early");
    } catch (IOException | RuntimeException e) {
      // What Gson says is for those who write programs; where it was, is for all.
      Matcher place = PLACE.matcher(String.valueOf(e.getMessage()));
      fields.refuse("", "not JSON" + (place.find() ? ", at column " + place.group(1) : ""));
    }
    return fields;
  }

  private static boolean holdsHalfOfAPair(String text) {
    return HALF_ESCAPE.matcher(text).find()
        && HALF_ESCAPE.matcher(WHOLE_ESCAPE.matcher(text).replaceAll("")).find();
  }

  private static JsonElement parseValue(String text) throws IOException {
    JsonReader reader = new JsonReader(new StringReader(text));
    // Otherwise it reads much that is not JSON.
    reader.setStrictness(Strictness.STRICT);
    JsonElement value = ANY.read(reader);
    boolean isAll;
    try {
      isAll = reader.peek() == JsonToken.END_DOCUMENT;
    } catch (MalformedJsonException e) {
      isAll = false;
    }
    if (!isAll) {
      throw new FollowedException();
    }
    return value;
  }

  /** Reads the members; null says nothing, so it is as good as absent. */
  private void open(String name, JsonElement value) {
    if (!(value instanceof JsonObject object)) {
      refuse(name, "must be a JSON object");
      return;
    }
    object.entrySet().stream()
        .filter(member -> !member.getValue().isJsonNull())
        .forEach(member -> left.put(member.getKey(), member.getValue()));
  }

  /** The first problem; null where there is none. */
  String problem() {
    return problem.text;
  }

  /** Keeps a problem, unless there is one already. An empty name stands for the object itself. */
  void refuse(String name, String what) {
    if (problem.text == null) {
      String at = at(name);
      problem.text = at.isEmpty() ? what : at + ": " + what;
    }
  }

  private String at(String name) {
    return path.isEmpty() || name.isEmpty() ? path + name : path + "." + name;
  }

  boolean has(String name) {
    return left.containsKey(name);
  }

  /** Takes a member out; null where it is absent. */
  JsonElement take(String name) {
    return left.remove(name);
  }

  /** Takes a text; empty where it is absent. */
  String text(String name) {
    JsonElement member = take(name);
    if (member == null) {
      return "";
    }
    if (member instanceof JsonPrimitive one && one.isString()) {
      return one.getAsString();
    }
    refuse(name, "must be text");
    return "";
  }

  /** Takes a text, or a whole number as its digits. */
  String textOrNumber(String name) {
    if (left.get(name) instanceof JsonPrimitive one && one.isNumber() && one.getAsString().matches("-?\\d+")) {
      return take(name).getAsString();
    }
    return text(name);
  }

  /** Takes a truth value; false where it is absent. */
  boolean flag(String name) {
    JsonElement member = take(name);
    if (member != null && !(member instanceof JsonPrimitive one && one.isBoolean())) {
      refuse(name, "must be true or false");
      return false;
    }
    return member != null && member.getAsBoolean();
  }

  /** Takes an object; one without members where it is absent or none. */
  Fields child(String name) {
    Fields inner = new Fields(at(name), problem);
    JsonElement member = take(name);
    if (member != null) {
      inner.open("", member);
    }
    return inner;
  }

  /** Takes a list of objects. */
  List<Fields> children(String name) {
    List<Fields> list = new ArrayList<>();
    JsonElement member = take(name);
    if (member != null && !member.isJsonArray()) {
      refuse(name, "must be a list of objects");
    } else if (member != null) {
      for (JsonElement each : member.getAsJsonArray()) {
        Fields inner = new Fields(at(name) + "[" + list.size() + "]", problem);
        inner.open("", each);
        list.add(inner);
      }
    }
    return list;
  }

  /** The members that were not taken, in order. */
  SortedSet<String> names() {
    return new TreeSet<>(left.keySet());
  }

  /** Refuses what is left: the first by name. */
  void end() {
    left.keySet().forEach(name -> refuse(name, "not known here"));
  }
}
