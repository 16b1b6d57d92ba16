package dev.unisono.batch;

import com.google.gson.JsonObject;
import dev.unisono.v1.ItemAcknowledged;
import dev.unisono.v1.Result;
import java.io.IOException;
import java.io.OutputStream;
import java.nio.charset.StandardCharsets;

/** A result as it is written. */
record ResultLine(String state, JsonObject json) {
  static final String COMPLETED = "COMPLETED";
  static final String REFUSED = "REFUSED";
  private static final String PREFIX = "ITEM_STATE_";

  /** A whole result: {@code parts} is the text that came before it in messages of its own. */
  static ResultLine of(Result result, String parts) {
    String name = result.getState().name();
    String state = name.startsWith(PREFIX) ? name.substring(PREFIX.length()) : name;
    JsonObject json = new JsonObject();
    json.addProperty("id", result.getItemId());
    // The item's own id, for one of several answers.
    if (!result.getVariantOf().isEmpty()) {
      json.addProperty("variant_of", result.getVariantOf());
    }
    json.addProperty("state", state);
    if (result.hasCompletion()) {
      json.addProperty("content", parts + result.getCompletion().getContent());
    }
    if (result.hasError()) {
      json.add("error", Problem.of(result.getError()).toJson());
    }
    return new ResultLine(state, json);
  }

  /** An item that the service did not take. */
  static ResultLine ofRefusal(ItemAcknowledged item) {
    JsonObject json = new JsonObject();
    json.addProperty("id", item.getItemId());
    json.addProperty("state", REFUSED);
    json.add("error", Problem.of(item.getRefusal()).toJson());
    return new ResultLine(REFUSED, json);
  }

  /** Writes it whole, so that who reads has each result at once. */
  void writeTo(OutputStream out) throws IOException {
    out.write((json + "\n").getBytes(StandardCharsets.UTF_8));
    out.flush();
  }
}
