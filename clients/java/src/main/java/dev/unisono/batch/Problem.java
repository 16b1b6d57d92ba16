package dev.unisono.batch;

import com.google.gson.JsonObject;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.google.rpc.Status;

/**
 * Why something failed.
 *
 * @param reason for programs: one of the service's list; empty where the status has none
 * @param code gRPC's number of the kind of failure
 * @param message for people
 */
record Problem(String reason, int code, String message) {
  static Problem of(Status status) {
    String reason = "";
    for (Any detail : status.getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        try {
          reason = detail.unpack(ErrorInfo.class).getReason();
        } catch (InvalidProtocolBufferException e) {
          // A detail that cannot be read says nothing.
        }
      }
    }
    return new Problem(reason, status.getCode(), status.getMessage());
  }

  JsonObject toJson() {
    JsonObject json = new JsonObject();
    json.addProperty("reason", reason);
    json.addProperty("code", code);
    json.addProperty("message", message);
    return json;
  }
}
