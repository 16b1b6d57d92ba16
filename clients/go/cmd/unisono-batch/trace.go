package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"
)

const (
	programName = "unisono-batch"
	// A collector that does not answer holds up the end no longer.
	exportTimeout = 5 * time.Second
)

// batchTrace is the program's own span: the root of the batch's trace.
type batchTrace struct {
	id       string
	span     trace.Span
	provider *sdk.TracerProvider
}

// startTrace begins the span, and puts it into the context's call metadata as a W3C traceparent. It is exported, over
// HTTP, only where OTEL_EXPORTER_OTLP_ENDPOINT says where to; the service's own spans hang under it in either case.
func startTrace(ctx context.Context) (context.Context, *batchTrace, error) {
	settings := []sdk.TracerProviderOption{sdk.WithSampler(sdk.AlwaysSample())}
	if os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != "" {
		exporter, err := otlptracehttp.New(ctx)
		if err != nil {
			return nil, nil, fmt.Errorf("OTEL_EXPORTER_OTLP_ENDPOINT: %w", err)
		}
		// What the environment says (OTEL_SERVICE_NAME) comes after the name, and so before it.
		about, err := resource.New(ctx,
			resource.WithAttributes(attribute.String("service.name", programName)),
			resource.WithTelemetrySDK(), resource.WithFromEnv())
		if err != nil {
			return nil, nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
		}
		settings = append(settings, sdk.WithBatcher(exporter), sdk.WithResource(about))
	}
	provider := sdk.NewTracerProvider(settings...)
	ctx, span := provider.Tracer(programName).Start(ctx, programName, trace.WithSpanKind(trace.SpanKindClient))
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	for name, value := range carrier {
		ctx = metadata.AppendToOutgoingContext(ctx, name, value)
	}
	return ctx, &batchTrace{id: span.SpanContext().TraceID().String(), span: span, provider: provider}, nil
}

// end ends the span, and exports it.
func (t *batchTrace) end(batchID string, err error) {
	t.span.SetAttributes(attribute.String("unisono.batch_id", batchID))
	if err != nil {
		t.span.SetStatus(codes.Error, err.Error())
	}
	t.span.End()
	ctx, cancel := context.WithTimeout(context.Background(), exportTimeout)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "%s: the trace was not exported: %v\n", programName, err)
	}
}
