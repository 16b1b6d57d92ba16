import { ROOT_CONTEXT, type Span, SpanKind, SpanStatusCode, trace } from "@opentelemetry/api";
import { W3CTraceContextPropagator } from "@opentelemetry/core";
import { defaultResource, detectResources, envDetector, resourceFromAttributes } from "@opentelemetry/resources";
import { AlwaysOnSampler, BatchSpanProcessor, type SpanProcessor, TracerProvider } from "@opentelemetry/sdk-trace";
import { Metadata } from "@grpc/grpc-js";

import { messageOf, tell } from "./output.js";

const PROGRAM = "unisono-batch";
/** A collector that does not answer holds up the end no longer. */
const EXPORT_TIMEOUT_MS = 5_000;

/**
 * The program's own span: the root of the batch's trace. It is exported, over HTTP, only where
 * OTEL_EXPORTER_OTLP_ENDPOINT says where to; the service's own spans hang under it in either case.
 */
export class BatchTrace {
  private readonly span: Span;
  private readonly provider: TracerProvider;

  static async start(): Promise<BatchTrace> {
    const processors: SpanProcessor[] = [];
    if (process.env["OTEL_EXPORTER_OTLP_ENDPOINT"] || process.env["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]) {
      // Loaded only here: it is most of what there is to load.
      const { OTLPTraceExporter } = await import("@opentelemetry/exporter-trace-otlp-proto");
      processors.push(new BatchSpanProcessor({ exporter: new OTLPTraceExporter() }));
    }
    return new BatchTrace(processors);
  }

  private constructor(spanProcessors: SpanProcessor[]) {
    const resource = defaultResource()
      .merge(resourceFromAttributes({ "service.name": PROGRAM }))
      // OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
      .merge(detectResources({ detectors: [envDetector] }));
    this.provider = new TracerProvider({ resource, sampler: new AlwaysOnSampler(), spanProcessors });
    this.span = this.provider.getTracer(PROGRAM).startSpan(PROGRAM, { kind: SpanKind.CLIENT }, ROOT_CONTEXT);
  }

  get id(): string {
    return this.span.spanContext().traceId;
  }

  /** Call metadata with a W3C traceparent. */
  get metadata(): Metadata {
    const metadata = new Metadata();
    new W3CTraceContextPropagator().inject(trace.setSpan(ROOT_CONTEXT, this.span), metadata, {
      set: (carrier, name, value) => carrier.set(name, value),
    });
    return metadata;
  }

  /** Ends the span, and exports it. */
  async end(batchId: string, error: unknown): Promise<void> {
    this.span.setAttribute("unisono.batch_id", batchId);
    if (error !== undefined) {
      this.span.setStatus({ code: SpanStatusCode.ERROR, message: messageOf(error) });
    }
    this.span.end();
    const inTime = new Promise<never>((_, reject) => {
      setTimeout(() => reject(new Error("the collector does not answer")), EXPORT_TIMEOUT_MS).unref();
    });
    try {
      await Promise.race([this.provider.shutdown(), inTime]);
    } catch (failure) {
      tell(`${PROGRAM}: the trace was not exported: ${messageOf(failure)}`);
    }
  }
}
