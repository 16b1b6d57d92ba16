package dev.unisono.batchfile;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import com.google.protobuf.Descriptors.FieldDescriptor;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message.Builder;
import com.google.protobuf.util.JsonFormat;
import dev.unisono.v1.ChatRequest;
import dev.unisono.v1.GenerateRequest;
import dev.unisono.v1.Item;
import dev.unisono.v1.Message;
import dev.unisono.v1.Options;
import dev.unisono.v1.ResponseFormat;
import dev.unisono.v1.Role;
import dev.unisono.v1.RunnerOptions;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Set;

/** What a line asks, in each of its forms. */
final class Body {
  private static final Map<String, Role> ROLES =
      Map.of(
          "system", Role.ROLE_SYSTEM,
          "developer", Role.ROLE_SYSTEM, // OpenAI's newer name for it
          "user", Role.ROLE_USER,
          "assistant", Role.ROLE_ASSISTANT);

  /** The field that each OpenAI address asks with. */
  private static final Map<String, String> FIELD_OF =
      Map.of("/v1/chat/completions", "messages", "/v1/completions", "prompt");

  /** Options that OpenAI writes beside the messages, and what the contract calls them. */
  private static final List<Map.Entry<String, String>> OPENAI_OPTIONS =
      List.of(
          Map.entry("max_tokens", "num_predict"),
          Map.entry("max_completion_tokens", "num_predict"),
          Map.entry("temperature", "temperature"),
          Map.entry("top_p", "top_p"),
          Map.entry("seed", "seed"),
          Map.entry("stop", "stop"),
          Map.entry("presence_penalty", "presence_penalty"),
          Map.entry("frequency_penalty", "frequency_penalty"));

  private Body() {}

  /** Reads a line in either form, its id left out. */
  static Item.Builder itemOf(Fields f) {
    if (!f.has("body") && !f.has("url") && !f.has("method")) {
      return read(f, true);
    }
    String method = f.text("method");
    if (!method.isEmpty() && !method.equals("POST")) {
      f.refuse("method", "must be POST");
    }
    String field = FIELD_OF.get(f.text("url"));
    Fields body = f.child("body");
    if (field == null) {
      f.refuse("url", "must be /v1/chat/completions or /v1/completions");
    } else if (!body.has(field)) {
      body.refuse(field, "is missing");
    }
    Item.Builder item = read(body, false);
    body.end();
    return item;
  }

  /** Reads what is asked. A plain line may have its system prompt beside the messages. */
  private static Item.Builder read(Fields f, boolean isPlain) {
    Item.Builder item = Item.newBuilder().setModel(f.text("model"));
    if (f.has("messages") && f.has("prompt")) {
      f.refuse("prompt", "stands beside messages; a line is one of them");
    } else if (f.has("messages")) {
      ChatRequest.Builder chat = item.getChatBuilder();
      if (isPlain && f.has("system")) {
        chat.addMessagesBuilder().setRole(Role.ROLE_SYSTEM).setContent(f.text("system"));
      }
      readMessages(f, chat);
      readFormat(f).ifPresent(chat::setFormat);
    } else if (f.has("prompt")) {
      GenerateRequest.Builder generate = item.getGenerateBuilder();
      generate.setSystem(f.text("system")).setRaw(f.flag("raw")).setPrompt(f.text("prompt"));
      if (generate.getPrompt().isEmpty()) {
        f.refuse("prompt", "is empty");
      }
      readFormat(f).ifPresent(generate::setFormat);
    } else {
      f.refuse("", "has neither messages nor a prompt");
    }
    Options options = readOptions(f);
    if (!options.equals(Options.getDefaultInstance())) {
      item.setOptions(options);
    }
    return item;
  }

  private static void readMessages(Fields f, ChatRequest.Builder chat) {
    List<Fields> list = f.children("messages");
    if (list.isEmpty()) {
      f.refuse("messages", "must hold at least one message");
    }
    for (Fields each : list) {
      Message.Builder message = chat.addMessagesBuilder();
      Role role = ROLES.get(each.text("role"));
      if (role == null) {
        each.refuse("role", "must be system, developer, user or assistant");
      } else {
        message.setRole(role);
      }
      if (!each.has("content")) {
        each.refuse("content", "is missing");
      }
      message.setContent(each.text("content"));
      each.end();
    }
  }

  /** Reads how the answer must be shaped: Ollama's `format` or OpenAI's `response_format`; nothing for free text. */
  private static Optional<ResponseFormat> readFormat(Fields f) {
    if (f.has("format") && f.has("response_format")) {
      f.refuse("response_format", "says again what format says");
    }
    if (f.has("format")) {
      return Optional.of(formatOf(f, "format"));
    }
    Fields format = f.child("response_format");
    Optional<ResponseFormat> found = Optional.empty();
    String type = format.text("type");
    switch (type) {
      case "", "text" -> { }
      case "json_object" -> found = Optional.of(ResponseFormat.newBuilder().setJson(true).build());
      // Beside the schema stand a name, a description and `strict`, which change nothing here.
      case "json_schema" -> found = Optional.of(formatOf(format.child("json_schema"), "schema"));
      default -> format.refuse("type", "must be text, json_object or json_schema, not \"" + type + "\"");
    }
    format.end();
    return found;
  }

  private static ResponseFormat formatOf(Fields f, String name) {
    JsonElement value = f.take(name);
    if (value instanceof JsonPrimitive one && one.isString() && one.getAsString().equals("json")) {
      return ResponseFormat.newBuilder().setJson(true).build();
    }
    if (!(value instanceof JsonObject)) {
      f.refuse(name, "must be a JSON schema");
    }
    // The order of keys and the digits of numbers are kept.
    return ResponseFormat.newBuilder().setJsonSchema(String.valueOf(value)).build();
  }

  /** Reads Ollama's `options`, and OpenAI's beside it. The contract says which there are, and their types. */
  private static Options readOptions(Fields f) {
    Options.Builder options = Options.newBuilder();
    Fields inner = f.child("options");
    Set<String> said = new HashSet<>();
    for (String name : inner.names()) {
      FieldDescriptor field = Options.getDescriptor().findFieldByName(name);
      if (RunnerOptions.getDescriptor().findFieldByName(name) != null) {
        setOption(inner, name, name, options.getRunnerBuilder());
      } else if (field != null
          && field.getJavaType() != FieldDescriptor.JavaType.MESSAGE
          && !name.equals("extra_options_json")) {
        said.add(name);
        setOption(inner, name, name, options);
      }
    }
    inner.end();
    for (Map.Entry<String, String> each : OPENAI_OPTIONS) {
      String theirs = each.getKey();
      String ours = each.getValue();
      if (f.has(theirs)) {
        if (!said.add(ours)) {
          f.refuse(theirs, "says again what is said elsewhere; write one of them");
        }
        setOption(f, theirs, ours, options);
      }
    }
    return options.build();
  }

  /** Takes the field `name` for the option that the contract calls `ours`. */
  private static void setOption(Fields f, String name, String ours, Builder options) {
    FieldDescriptor field = options.getDescriptorForType().findFieldByName(ours);
    JsonElement value = f.take(name);
    JsonArray values = new JsonArray();
    if (field.isRepeated() && value.isJsonArray()) {
      values.addAll(value.getAsJsonArray());
    } else {
      values.add(value);
    }
    JsonObject one = new JsonObject();
    one.add(ours, field.isRepeated() ? values : value);
    try {
      for (JsonElement each : values) {
        requireKind(field, each);
      }
      // Whole numbers and ranges are its business.
      JsonFormat.parser().merge(one.toString(), options);
    } catch (InvalidProtocolBufferException e) {
      f.refuse(name, "cannot be " + value);
    }
  }

  /** JsonFormat would take a number for a text, and a list of one for its member. */
  private static void requireKind(FieldDescriptor field, JsonElement value) throws InvalidProtocolBufferException {
    boolean isText = field.getJavaType() == FieldDescriptor.JavaType.STRING;
    if (!(value instanceof JsonPrimitive one) || (isText && !one.isString())) {
      throw new InvalidProtocolBufferException("not of the field's kind");
    }
  }
}
