package dev.unisono.batch;

import io.grpc.ClientInterceptor;
import io.grpc.Metadata;
import io.grpc.stub.MetadataUtils;
import io.opentelemetry.api.trace.Span;
import io.opentelemetry.api.trace.SpanKind;
import io.opentelemetry.api.trace.StatusCode;
import io.opentelemetry.api.trace.propagation.W3CTraceContextPropagator;
import io.opentelemetry.context.Context;
import io.opentelemetry.sdk.autoconfigure.AutoConfiguredOpenTelemetrySdk;
import io.opentelemetry.sdk.common.CompletableResultCode;
import io.opentelemetry.sdk.trace.SdkTracerProvider;
import io.opentelemetry.sdk.trace.samplers.Sampler;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.logging.Level;
import java.util.logging.Logger;

/** The program's own span: the root of the batch's trace. */
final class BatchTrace {
  private static final String NAME = "unisono-batch";
  /** A collector that does not answer holds up the end no longer. */
  private static final long EXPORT_TIMEOUT_S = 5;

  /** What goes wrong is told in the program's own words, and without a trace of the stack. */
  private static final Logger LIBRARY = Logger.getLogger("io.opentelemetry");

  private final SdkTracerProvider provider;
  private final Span span;

  private BatchTrace(SdkTracerProvider provider) {
    this.provider = provider;
    this.span = provider.get(NAME).spanBuilder(NAME).setSpanKind(SpanKind.CLIENT).setNoParent().startSpan();
  }

  /**
   * Begins the span.
   *
   * <p>It is exported, over HTTP, only where OTEL_EXPORTER_OTLP_ENDPOINT says where to; the service's own spans hang
   * under it in either case.
   */
  static BatchTrace start() {
    LIBRARY.setLevel(Level.OFF);
    boolean isExported = isSet("OTEL_EXPORTER_OTLP_ENDPOINT") || isSet("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
    return new BatchTrace(isExported ? exporting() : SdkTracerProvider.builder().build());
  }

  private static boolean isSet(String name) {
    String value = System.getenv(name);
    return value != null && !value.isEmpty();
  }

  /** The environment's settings are heard, but for those that would leave the shown id without a trace. */
  private static SdkTracerProvider exporting() {
    return AutoConfiguredOpenTelemetrySdk.builder()
        .addPropertiesSupplier(() -> Map.of("otel.service.name", NAME))
        .addPropertiesCustomizer(
            config ->
                Map.of(
                    "otel.exporter.otlp.protocol", "http/protobuf",
                    "otel.exporter.otlp.traces.protocol", "http/protobuf",
                    "otel.metrics.exporter", "none",
                    "otel.logs.exporter", "none"))
        .addSamplerCustomizer((sampler, config) -> Sampler.alwaysOn())
        .disableShutdownHook()
        .build()
        .getOpenTelemetrySdk()
        .getSdkTracerProvider();
  }

  String id() {
    return span.getSpanContext().getTraceId();
  }

  /** Makes calls part of the trace: they say its traceparent (W3C). */
  ClientInterceptor asMetadata() {
    Metadata metadata = new Metadata();
    W3CTraceContextPropagator.getInstance()
        .inject(
            Context.root().with(span),
            metadata,
            (carrier, name, value) ->
                carrier.put(Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER), value));
    return MetadataUtils.newAttachHeadersInterceptor(metadata);
  }

  /** Ends the span, and exports it; {@code problem} is null where there was none. */
  void end(String batchId, Exception problem) {
    span.setAttribute("unisono.batch_id", batchId);
    if (problem != null) {
      span.setStatus(StatusCode.ERROR, String.valueOf(problem.getMessage()));
    }
    span.end();
    CompletableResultCode ended = provider.shutdown().join(EXPORT_TIMEOUT_S, TimeUnit.SECONDS);
    if (!ended.isSuccess()) {
      Throwable why = ended.getFailureThrowable();
      System.err.println(NAME + ": the trace was not exported" + (why == null ? "" : ": " + why.getMessage()));
    }
  }
}
